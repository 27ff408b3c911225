//! How the head moves: one pose per volume.
//!
//! A pose `M` takes a place in the base to its place in the volume, both RAS, millimetres:
//! `M = T(t) T(c) Rz Ry Rx T(-c)`, right-handed turns about the patient's axes, `c` the middle of
//! the grid. A volume is then `base(inv(M) y)`, and realigning it means sampling it at `M x`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use rtfmri::volume::Affine;
use serde::Serialize;

use super::noise::{Purpose, normals};

/// Radius of the sphere over which a motion is judged (Jenkinson 1999), millimetres.
const SPHERE_MM: f64 = 50.0;
/// How much of the way walked so far is kept from one volume to the next.
const RETURN: f64 = 0.98;
/// No head in a coil moves further.
const MAX_SHIFT_MM: f64 = 50.0;
const MAX_TURN_DEG: f64 = 30.0;
/// Largest file of motion parameters, bytes.
const MAX_BYTES: u64 = 16 << 20;

/// Why there is no motion.
#[derive(Debug, thiserror::Error)]
pub(super) enum PathError {
    /// `--motion` is none of the ways there are.
    #[error(
        "`{found}` is no motion, expected still, walk=MM, steps=MM:SECONDS or file=PATH \
         with MM from 0 to 20 and SECONDS from 0.1 to 3600"
    )]
    Way {
        /// What was given.
        found: String,
    },
    /// The file.
    #[error("cannot read the motion {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Longer than any run's.
    #[error("the motion {path} has {found} bytes, at most {MAX_BYTES} are read")]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
    /// A line that is no pose.
    #[error("the motion {path}, line {line}: expected six numbers, found {found}")]
    Line {
        /// Which file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Numbers found.
        found: usize,
    },
    /// A number that is no motion.
    #[error("the motion {path}, line {line}, column {column}: {found} is outside -{most}..={most}")]
    Range {
        /// Which file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1: three shifts in millimetres, three turns in degrees.
        column: usize,
        /// The number.
        found: f64,
        /// Largest.
        most: f64,
    },
    /// Fewer poses than volumes.
    #[error("the motion {path} has {found} rows, the simulation {expected} volumes")]
    TooShort {
        /// Which file.
        path: PathBuf,
        /// Volumes.
        expected: usize,
        /// Rows.
        found: usize,
    },
}

/// Where the head is, in the file's and the truth's order: shifts along R, A and S, millimetres,
/// then turns about them, degrees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub(super) struct Pose([f64; 6]);

impl Pose {
    /// The pose as a matrix about a centre, RAS, millimetres.
    pub(super) fn matrix_ras(&self, centre: [f64; 3]) -> Affine {
        let [x, y, z] = [self.0[3], self.0[4], self.0[5]].map(f64::to_radians);
        let ((sx, cx), (sy, cy), (sz, cz)) = (x.sin_cos(), y.sin_cos(), z.sin_cos());
        let turn = [
            [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
            [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
            [-sy, cy * sx, cy * cx],
        ];
        let mut matrix = [[0.0; 4]; 4];
        matrix[3][3] = 1.0;
        for (row, numbers) in matrix[..3].iter_mut().enumerate() {
            numbers[..3].copy_from_slice(&turn[row]);
            let turned: f64 = (0..3).map(|axis| turn[row][axis] * centre[axis]).sum();
            numbers[3] = self.0[row] + centre[row] - turned;
        }
        matrix
    }

    /// Root mean square displacement over a solid sphere of 50 mm about the centre, millimetres.
    pub(super) fn displacement_mm(&self) -> f64 {
        let matrix = self.matrix_ras([0.0; 3]);
        let mut square: f64 = self.0[..3].iter().map(|shift| shift * shift).sum();
        for (row, numbers) in matrix[..3].iter().enumerate() {
            for (column, number) in numbers[..3].iter().enumerate() {
                let still = if row == column { 1.0 } else { 0.0 };
                square += SPHERE_MM.powi(2) / 5.0 * (number - still).powi(2);
            }
        }
        square.sqrt()
    }

    /// Shifted further, RAS, millimetres.
    pub(super) fn shifted(mut self, by: [f64; 3]) -> Pose {
        for (value, by) in self.0.iter_mut().zip(by) {
            *value += by;
        }
        self
    }

    fn scaled(self, by: f64) -> Pose {
        Pose(self.0.map(|value| value * by))
    }

    fn plus(self, other: Pose) -> Pose {
        Pose(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
}

/// A matrix as seen from another: `later` after undoing `first`. Both rigid.
pub(super) fn relative(later: &Affine, first: &Affine) -> Affine {
    let mut inverse = [[0.0; 4]; 4];
    inverse[3][3] = 1.0;
    for row in 0..3 {
        for column in 0..3 {
            inverse[row][column] = first[column][row];
        }
        inverse[row][3] = -(0..3).map(|i| first[i][row] * first[i][3]).sum::<f64>();
    }
    std::array::from_fn(|row| {
        std::array::from_fn(|column| (0..4).map(|i| later[row][i] * inverse[i][column]).sum())
    })
}

/// A motion in RAS as the same one in LPS, or back.
pub(super) fn turned_about_s(matrix: &Affine) -> Affine {
    let sign = |axis: usize| if axis < 2 { -1.0 } else { 1.0 };
    std::array::from_fn(|row| {
        std::array::from_fn(|column| sign(row) * sign(column) * matrix[row][column])
    })
}

/// How a head moves.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Way {
    /// Not at all.
    Still,
    /// A random walk whose displacement has this root mean square over the run.
    Walk {
        /// Millimetres.
        rms_mm: f64,
    },
    /// Still, but for a jump every so often.
    Steps {
        /// Displacement of one jump, millimetres.
        mm: f64,
        /// From one to the next, seconds.
        every_s: f64,
    },
    /// A file with six parameters per volume.
    File(PathBuf),
}

impl FromStr for Way {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Way, PathError> {
        let wrong = || PathError::Way { found: text.into() };
        let number = |text: &str, low: f64, high: f64| {
            let value = text
                .parse()
                .ok()
                .filter(|value| (low..=high).contains(value));
            value.ok_or_else(wrong)
        };
        match text.split_once('=') {
            None if text == "still" => Ok(Way::Still),
            Some(("walk", mm)) => Ok(Way::Walk {
                rms_mm: number(mm, 0.0, 20.0)?,
            }),
            Some(("steps", given)) => {
                let (mm, seconds) = given.split_once(':').ok_or_else(wrong)?;
                Ok(Way::Steps {
                    mm: number(mm, 0.0, 20.0)?,
                    every_s: number(seconds, 0.1, 3600.0)?,
                })
            }
            Some(("file", path)) if !path.is_empty() => Ok(Way::File(path.into())),
            _ => Err(wrong()),
        }
    }
}

impl Way {
    /// The poses of one series, `[volume]`.
    ///
    /// - `offset`: volumes before this series, which have the file's first rows.
    pub(super) fn poses(
        &self,
        seed: u64,
        series: usize,
        offset: usize,
        volumes: usize,
        tr_s: f64,
    ) -> Result<Vec<Pose>, PathError> {
        let mut noise = normals(seed, Purpose::Motion, series, 0);
        let mut step = || {
            let drawn = noise.draw(&[6]);
            Pose(std::array::from_fn(|i| f64::from(drawn[[i]])))
        };
        match self {
            Way::Still => Ok(vec![Pose::default(); volumes]),
            Way::Walk { rms_mm } => {
                let mut poses = vec![Pose::default(); volumes];
                for volume in 1..volumes {
                    poses[volume] = poses[volume - 1].scaled(RETURN).plus(step());
                }
                // Displacement is all but proportional to the parameters; twice is exact enough.
                for _ in 0..3 {
                    let found = rms(&poses);
                    if found > 0.0 {
                        poses = poses
                            .iter()
                            .map(|pose| pose.scaled(rms_mm / found))
                            .collect();
                    }
                }
                Ok(poses)
            }
            Way::Steps { mm, every_s } => {
                let (mut pose, mut poses) = (Pose::default(), Vec::new());
                let (mut jumps, mut time_s) = (1.0, 0.0);
                for _ in 0..volumes {
                    if time_s >= jumps * every_s {
                        jumps = (time_s / every_s).floor() + 1.0;
                        let way = step();
                        let length = way.displacement_mm().max(1e-9);
                        let jump = way.scaled(mm / length);
                        // Half the way back each time: jumps do not add up to a fall from the table.
                        pose = pose.scaled(0.5).plus(jump);
                    }
                    poses.push(pose);
                    time_s += tr_s;
                }
                Ok(poses)
            }
            Way::File(path) => {
                let all = read(path)?;
                let expected = offset + volumes;
                if all.len() < expected {
                    return Err(PathError::TooShort {
                        path: path.clone(),
                        expected,
                        found: all.len(),
                    });
                }
                Ok(all[offset..expected].to_vec())
            }
        }
    }
}

/// Root mean square of the displacements, millimetres.
pub(super) fn rms(poses: &[Pose]) -> f64 {
    let squares = poses.iter().map(|pose| pose.displacement_mm().powi(2));
    (squares.sum::<f64>() / super::base::count(poses.len().max(1))).sqrt()
}

/// Reads six numbers a line, with spaces, tabs or commas between; a first line of names is passed.
fn read(path: &Path) -> Result<Vec<Pose>, PathError> {
    let io = |source| PathError::Io {
        path: path.into(),
        source,
    };
    let found = std::fs::metadata(path).map_err(io)?.len();
    if found > MAX_BYTES {
        let path = path.into();
        return Err(PathError::TooLarge { path, found });
    }
    let text = std::fs::read_to_string(path).map_err(io)?;
    let mut poses = Vec::new();
    for (index, row) in text.lines().enumerate() {
        let fields: Vec<&str> = row
            .split([' ', '\t', ',', ';'])
            .filter(|field| !field.is_empty())
            .collect();
        let numbers: Vec<f64> = fields
            .iter()
            .filter_map(|field| field.parse().ok())
            .collect();
        if fields.is_empty() || (index == 0 && numbers.is_empty()) {
            continue;
        }
        let line = index + 1;
        let pose = <[f64; 6]>::try_from(numbers.as_slice());
        let pose = pose.ok().filter(|_| fields.len() == 6);
        let pose = pose.ok_or_else(|| PathError::Line {
            path: path.into(),
            line,
            found: numbers.len(),
        })?;
        for (column, &found) in pose.iter().enumerate() {
            let most = if column < 3 {
                MAX_SHIFT_MM
            } else {
                MAX_TURN_DEG
            };
            if !(-most..=most).contains(&found) {
                let (path, column) = (path.into(), column + 1);
                return Err(PathError::Range {
                    path,
                    line,
                    column,
                    found,
                    most,
                });
            }
        }
        poses.push(Pose(pose));
    }
    Ok(poses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walk_has_the_displacement_asked_for_and_begins_still() {
        let way = Way::from_str("walk=0.7").unwrap();
        let poses = way.poses(5, 0, 0, 200, 1.5).unwrap();
        assert_eq!(poses[0], Pose::default());
        assert!((rms(&poses) - 0.7).abs() < 1e-3, "{}", rms(&poses));
        assert_eq!(poses, way.poses(5, 0, 0, 200, 1.5).unwrap());
        assert_ne!(poses, way.poses(6, 0, 0, 200, 1.5).unwrap());
        assert_ne!(poses, way.poses(5, 1, 0, 200, 1.5).unwrap());
    }

    #[test]
    fn steps_jump_when_they_are_due_and_stand_still_between() {
        let poses = Way::from_str("steps=0.5:10").unwrap();
        let poses = poses.poses(1, 0, 0, 20, 2.0).unwrap();
        for (volume, pair) in poses.windows(2).enumerate() {
            let jump = (volume + 1).is_multiple_of(5);
            assert_eq!(pair[0] != pair[1], jump, "volume {}", volume + 1);
        }
        assert!((poses[5].displacement_mm() - 0.5).abs() < 1e-3);
    }

    #[test]
    fn turns_follow_the_right_hand_and_the_centre_stays() {
        let pose = Pose([0.0, 0.0, 0.0, 0.0, 0.0, 90.0]);
        let matrix = pose.matrix_ras([10.0, 0.0, 0.0]);
        // About S through (10, 0, 0): (11, 0, 0) goes to (10, 1, 0).
        let place = [11.0, 0.0, 0.0, 1.0];
        let moved: [f64; 3] =
            std::array::from_fn(|row| (0..4).map(|i| matrix[row][i] * place[i]).sum());
        for (found, expected) in moved.iter().zip([10.0, 1.0, 0.0]) {
            assert!((found - expected).abs() < 1e-12);
        }
        let pose = Pose([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let matrix = pose.matrix_ras([7.0, 8.0, 9.0]);
        let still = relative(&matrix, &matrix);
        for (row, numbers) in still.iter().enumerate() {
            for (column, number) in numbers.iter().enumerate() {
                let expected = if row == column { 1.0 } else { 0.0 };
                assert!((number - expected).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn file_of_poses_is_read_and_a_wrong_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("motion.tsv");
        let way = Way::File(path.clone());
        std::fs::write(
            &path,
            "x y z a b c\n0 0 0 0 0 0\n.1,0,0,0,0,2\n1\t2\t3\t0\t0\t0\n",
        )
        .unwrap();
        let poses = way.poses(0, 0, 1, 2, 1.0).unwrap();
        assert_eq!(poses[0], Pose([0.1, 0.0, 0.0, 0.0, 0.0, 2.0]));
        let short = way.poses(0, 0, 0, 4, 1.0).unwrap_err().to_string();
        assert!(
            short.contains("3 rows") && short.contains("4 volumes"),
            "{short}"
        );
        for (text, said) in [
            (
                "0 0 0 0 0 0\n0 0 0\n",
                "line 2: expected six numbers, found 3",
            ),
            (
                "0 0 0 0 0 0\n0 0 0 x 0 0\n",
                "line 2: expected six numbers, found 5",
            ),
            ("0 0 0 0 0 45\n", "line 1, column 6: 45 is outside -30..=30"),
            ("0 nan 0 0 0 0\n", "column 2: NaN"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = way.poses(0, 0, 0, 1, 1.0).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn unknown_ways_are_refused() {
        for text in [
            "",
            "walk",
            "walk=-1",
            "walk=x",
            "steps=1",
            "steps=1:0",
            "file=",
        ] {
            assert!(Way::from_str(text).is_err(), "{text}");
        }
    }
}
