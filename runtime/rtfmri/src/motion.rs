//! Where the head moved: six-parameter rigid realignment to a run's first volume.
//!
//! Steps: both volumes are seen through the same small blur; points of the reference's
//! head are compared with the volume at their moved places; a Gauss-Newton step moves
//! the points (inverse compositional, Baker and Matthews 2004: the reference's gradient
//! serves every volume). A wide blur first, for large motion, then a narrow one, with
//! residuals far beyond the others' counting less (Tukey's biweight).
//!
//! A motion `M` takes a place in the head as the reference shows it to where it is in the
//! volume, so that a volume is realigned by sampling it at `M x`.

use nalgebra::{Matrix3, Matrix4, Rotation3, SMatrix, SVector, Vector3};

use crate::spline::{Spline, count, gaussian};
use crate::volume::{Affine, Volume};

/// Blur of each level, full width at half maximum, beside the spline's own.
const LEVELS_FWHM_MM: [f64; 2] = [8.0, 2.0];
/// A level's steps; a smooth volume needs five.
const MAX_STEPS: usize = 20;
/// A step that moves no point of the head further than this ends a level.
const STILL_MM: f64 = 1e-3;
/// What a rotation moves is judged at this distance from the centre.
const HEAD_RADIUS_MM: f64 = 80.0;
/// Points compared at each level; more make nothing better.
const MAX_POINTS: usize = 20_000;
/// Fewer points than this determine nothing.
const MIN_POINTS: usize = 200;
/// A voxel brighter than this share of the head's mean belongs to the head.
const HEAD_SHARE: f64 = 0.3;
/// A head whose values spread less than this share of their mean is no head.
const MIN_SPREAD: f64 = 1e-3;
/// A volume that resembles the realigned reference less than this is not of its run.
const MIN_CORRELATION: f64 = 0.5;
/// Largest motion believed: beyond it the head is not the reference's.
const MAX_SHIFT_MM: f64 = 40.0;
const MAX_TURN_RAD: f64 = 0.6;
/// Tukey's constant, in robust standard deviations.
const TUKEY: f64 = 4.685;

/// Why a volume was not realigned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MotionError {
    /// The affine has no inverse or holds what is no number.
    #[error("volume affine is singular or not finite")]
    Singular,
    /// The volume's sides differ from the reference's.
    #[error("volume has {found:?} slices, rows and columns, the reference {expected:?}")]
    Shape {
        /// The reference's slices, rows, columns.
        expected: [usize; 3],
        /// The volume's.
        found: [usize; 3],
    },
    /// There is too little in the image, or too little of it left in view.
    #[error("{found} points of the head can be compared, {expected} are needed")]
    TooFewPoints {
        /// Points needed.
        expected: usize,
        /// Points found.
        found: usize,
    },
    /// The image does not determine a motion: it is flat, or holds what is no number.
    #[error("volume has too little structure to determine a motion")]
    Undetermined,
    /// Realigned as well as can be, the volume still does not look like the reference.
    #[error(
        "volume correlates with the reference by {correlation:.2}, at least {least} is expected"
    )]
    Unlike {
        /// Least correlation expected.
        least: f64,
        /// Correlation found.
        correlation: f64,
    },
    /// The search left the range of a head in a coil.
    #[error("motion of {shift_mm:.1} mm and {turn_rad:.2} rad is not believed")]
    TooFar {
        /// Length of the centre's shift.
        shift_mm: f64,
        /// Angle of the rotation.
        turn_rad: f64,
    },
}

/// A rigid motion of the head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rigid {
    rotation: Rotation3<f64>,
    /// Shift of the centre, LPS, millimetres.
    shift: Vector3<f64>,
    /// What the rotation turns about, LPS, millimetres.
    centre: Vector3<f64>,
}

impl Rigid {
    /// No motion.
    #[must_use]
    pub fn identity() -> Self {
        Self {
            rotation: Rotation3::identity(),
            shift: Vector3::zeros(),
            centre: Vector3::zeros(),
        }
    }

    /// The motion as a matrix from LPS to LPS, millimetres.
    #[must_use]
    pub fn matrix_lps(&self) -> Affine {
        let matrix = self.homogeneous();
        std::array::from_fn(|row| std::array::from_fn(|column| matrix[(row, column)]))
    }

    /// The motion as a matrix from RAS to RAS, millimetres.
    #[must_use]
    pub fn matrix_ras(&self) -> Affine {
        let sign = |axis: usize| if axis < 2 { -1.0 } else { 1.0 };
        let lps = self.matrix_lps();
        std::array::from_fn(|row| {
            std::array::from_fn(|column| sign(row) * sign(column) * lps[row][column])
        })
    }

    /// The six numbers of the motion, for a confound or a plot: the shift of the grid's
    /// centre along L, P and S, millimetres, then the angles about those axes, radians
    /// (turned about L first, S last).
    #[must_use]
    pub fn parameters(&self) -> [f64; 6] {
        let (about_l, about_p, about_s) = self.rotation.euler_angles();
        let [l, p, s] = self.shift.into();
        [l, p, s, about_l, about_p, about_s]
    }

    /// Where a place of the reference is in the volume.
    ///
    /// - `place`: LPS, millimetres.
    #[must_use]
    pub fn apply(&self, place: [f64; 3]) -> [f64; 3] {
        let place = Vector3::from(place) - self.centre;
        (self.rotation * place + self.shift + self.centre).into()
    }

    fn homogeneous(&self) -> Matrix4<f64> {
        let shift = self.shift + self.centre - self.rotation * self.centre;
        self.rotation.to_homogeneous().append_translation(&shift)
    }

    /// The same motion, its turn about another centre.
    fn about(&self, centre: Vector3<f64>) -> Self {
        Self {
            rotation: self.rotation,
            shift: Vector3::from(self.apply(centre.into())) - centre,
            centre,
        }
    }

    /// This motion after the inverse of a small one about the same centre.
    fn after_inverse_of(&self, shift: Vector3<f64>, turn: Vector3<f64>) -> Self {
        let inverse = Rotation3::new(-turn);
        let rotation = self.rotation * inverse;
        Self {
            rotation,
            shift: self.shift - rotation * shift,
            centre: self.centre,
        }
    }

    fn check(&self) -> Result<(), MotionError> {
        let (shift_mm, turn_rad) = (self.shift.norm(), self.rotation.angle());
        if shift_mm <= MAX_SHIFT_MM && turn_rad <= MAX_TURN_RAD {
            return Ok(());
        }
        Err(MotionError::TooFar { shift_mm, turn_rad })
    }
}

/// A point of the reference's head.
struct Point {
    /// From the centre, LPS, millimetres.
    place: Vector3<f64>,
    /// What its value gains per mm of shift, per radian of turn, and as it stands.
    slopes: SVector<f64, 7>,
}

/// The points of the reference as one blur shows them.
struct Level {
    fwhm_mm: f64,
    points: Vec<Point>,
}

/// Realigns the volumes of a run to its first one.
pub struct Realigner {
    /// Slices, rows, columns.
    shape: [usize; 3],
    centre: Vector3<f64>,
    levels: Vec<Level>,
}

impl std::fmt::Debug for Realigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Realigner")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl Realigner {
    /// Prepares a reference.
    ///
    /// # Errors
    /// [`MotionError`] where it does not show enough of a head.
    pub fn new(reference: &Volume) -> Result<Self, MotionError> {
        let (slices, rows, columns) = reference.voxels.dim();
        let middle = [columns, rows, slices].map(|side| (count(side) - 1.0) / 2.0);
        let centre = Vector3::from(reference.position_lps(middle));
        let levels = LEVELS_FWHM_MM
            .iter()
            .map(|&fwhm_mm| Level::new(reference, centre, fwhm_mm))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            shape: [slices, rows, columns],
            centre,
            levels,
        })
    }

    /// Finds the motion from the reference to a volume.
    ///
    /// - `start`: the motion of the volume before, or [`Rigid::identity`].
    ///
    /// # Errors
    /// [`MotionError`]; the caller then has no better guess than the volume before.
    pub fn realign(&self, volume: &Volume, start: &Rigid) -> Result<Rigid, MotionError> {
        let (slices, rows, columns) = volume.voxels.dim();
        if [slices, rows, columns] != self.shape {
            return Err(MotionError::Shape {
                expected: self.shape,
                found: [slices, rows, columns],
            });
        }
        let inverse = inverse(&volume.affine_lps)?;
        let splines = self
            .levels
            .iter()
            .map(|level| blurred(volume, level.fwhm_mm));
        let splines = splines.collect::<Result<Vec<_>, _>>()?;
        let from = |start: &Rigid| {
            let mut motion = start.about(self.centre);
            for (level, spline) in self.levels.iter().zip(&splines) {
                motion = level.descend(spline, &inverse, self.shape, motion)?;
            }
            Ok(motion)
        };
        // A start that leads astray must not lose the rest of the run.
        from(start).or_else(|_| from(&Rigid::identity()))
    }
}

impl Level {
    fn new(reference: &Volume, centre: Vector3<f64>, fwhm_mm: f64) -> Result<Self, MotionError> {
        let to_index = inverse(&reference.affine_lps)?;
        // A gradient along the axes of the grid, to one along the patient's.
        let turn: Matrix3<f64> = to_index.fixed_view::<3, 3>(0, 0).transpose();
        let spline = blurred(reference, fwhm_mm)?;
        let (slices, rows, columns) = reference.voxels.dim();
        let inner = |side: usize| 1..side.saturating_sub(1);
        let places = inner(slices).flat_map(|slice| {
            inner(rows).flat_map(move |row| inner(columns).map(move |column| [column, row, slice]))
        });
        let places: Vec<([f64; 3], f64)> = places
            .map(|place| {
                let place = place.map(count);
                (place, f64::from(spline.value(place)))
            })
            .collect();
        let limit = head_limit(places.iter().map(|(_, value)| *value)) * HEAD_SHARE;
        let mut head: Vec<_> = places.iter().filter(|(_, value)| *value > limit).collect();
        if head.len() < MIN_POINTS {
            return Err(MotionError::TooFewPoints {
                expected: MIN_POINTS,
                found: head.len(),
            });
        }
        let (mean, spread) = moments(head.iter().map(|(_, value)| *value));
        if spread.is_nan() || spread < MIN_SPREAD * mean {
            return Err(MotionError::Undetermined);
        }
        if head.len() > MAX_POINTS {
            // Every so many in the grid's order would leave out whole columns.
            head = shuffled(head);
            head.truncate(MAX_POINTS);
        }
        let points = head.into_iter().map(|&(at, value)| {
            let slope = |axis: usize| {
                let shifted = |by: f64| {
                    let mut at = at;
                    at[axis] += by;
                    f64::from(spline.value(at))
                };
                shifted(0.5) - shifted(-0.5)
            };
            let gradient = turn * Vector3::new(slope(0), slope(1), slope(2));
            let place = Vector3::from(reference.position_lps(at)) - centre;
            let turned = place.cross(&gradient);
            let [a, b, c] = gradient.into();
            let [d, e, f] = turned.into();
            Point {
                place,
                slopes: SVector::from([a, b, c, d, e, f, value]),
            }
        });
        Ok(Self {
            fwhm_mm,
            points: points.collect(),
        })
    }

    /// Steps until the head stands still.
    fn descend(
        &self,
        spline: &Spline,
        to_index: &Matrix4<f64>,
        shape: [usize; 3],
        mut motion: Rigid,
    ) -> Result<Rigid, MotionError> {
        let last = [shape[2], shape[1], shape[0]].map(|side| count(side) - 2.0);
        let mut weights = vec![1.0; self.points.len()];
        let mut values = vec![None; self.points.len()];
        for _ in 0..MAX_STEPS {
            let map = to_index * motion.homogeneous();
            let turn: Matrix3<f64> = map.fixed_view::<3, 3>(0, 0).into();
            let origin = map.transform_point(&motion.centre.into()).coords;
            let mut square = SMatrix::<f64, 7, 7>::zeros();
            let mut right = SVector::<f64, 7>::zeros();
            let mut found = 0;
            for ((point, weight), value) in self.points.iter().zip(&weights).zip(&mut values) {
                let at = turn * point.place + origin;
                // Closer to an edge the blur would see what is beyond it.
                let inside = (0..3).all(|axis| (1.0..=last[axis]).contains(&at[axis]));
                *value = inside.then(|| f64::from(spline.value(at.into())));
                let Some(value) = *value else { continue };
                found += 1;
                let weighted = point.slopes * *weight;
                square.ger(1.0, &weighted, &point.slopes, 1.0);
                right.axpy(value, &weighted, 1.0);
            }
            if found < MIN_POINTS {
                return Err(MotionError::TooFewPoints {
                    expected: MIN_POINTS,
                    found,
                });
            }
            let solved = square.cholesky().map(|c| c.solve(&right));
            let solved = solved.filter(|s| s.iter().all(|s| s.is_finite()) && s[6] > 0.0);
            let solved = solved.ok_or(MotionError::Undetermined)?;
            let shift = Vector3::new(solved[0], solved[1], solved[2]) / solved[6];
            let turn = Vector3::new(solved[3], solved[4], solved[5]) / solved[6];
            motion = motion.after_inverse_of(shift, turn);
            motion.check()?;
            if shift.norm() + turn.norm() * HEAD_RADIUS_MM < STILL_MM {
                break;
            }
            self.weigh(&values, &solved, &mut weights);
        }
        let correlation = self.correlation(&values);
        if correlation >= MIN_CORRELATION {
            return Ok(motion);
        }
        Err(MotionError::Unlike {
            least: MIN_CORRELATION,
            correlation,
        })
    }

    /// How much the volume's values go with the reference's, 0 where either is flat.
    fn correlation(&self, values: &[Option<f64>]) -> f64 {
        let pairs = self.points.iter().zip(values);
        let pairs = pairs.filter_map(|(point, value)| value.map(|value| (point.slopes[6], value)));
        let (mean_a, spread_a) = moments(pairs.clone().map(|(a, _)| a));
        let (mean_b, spread_b) = moments(pairs.clone().map(|(_, b)| b));
        let (product, _) = moments(pairs.map(|(a, b)| (a - mean_a) * (b - mean_b)));
        if spread_b < MIN_SPREAD * mean_b.abs() {
            return 0.0;
        }
        let correlation = product / (spread_a * spread_b);
        if correlation.is_nan() {
            0.0
        } else {
            correlation
        }
    }

    /// Weighs each point by how far its residual lies from what the others show.
    fn weigh(&self, values: &[Option<f64>], solved: &SVector<f64, 7>, weights: &mut [f64]) {
        let residual = |(point, value): (&Point, &Option<f64>)| {
            value.map(|value| (value - point.slopes.dot(solved)).abs())
        };
        let mut sizes: Vec<f64> = self
            .points
            .iter()
            .zip(values)
            .filter_map(residual)
            .collect();
        if sizes.is_empty() {
            return;
        }
        let middle = sizes.len() / 2;
        let (_, median, _) = sizes.select_nth_unstable_by(middle, f64::total_cmp);
        let limit = TUKEY * *median / 0.6745;
        for (weight, pair) in weights.iter_mut().zip(self.points.iter().zip(values)) {
            let share = residual(pair).map_or(0.0, |size| size / limit);
            *weight = if share < 1.0 {
                (1.0 - share * share).powi(2)
            } else if limit > 0.0 {
                0.0
            } else {
                1.0
            };
        }
    }
}

fn inverse(affine: &Affine) -> Result<Matrix4<f64>, MotionError> {
    let matrix = Matrix4::from_fn(|row, column| affine[row][column]);
    let inverse = matrix.try_inverse().ok_or(MotionError::Singular)?;
    if inverse.iter().all(|value| value.is_finite()) {
        Ok(inverse)
    } else {
        Err(MotionError::Singular)
    }
}

fn blurred(volume: &Volume, fwhm_mm: f64) -> Result<Spline, MotionError> {
    if !volume.voxels.iter().all(|value| value.is_finite()) {
        return Err(MotionError::Undetermined);
    }
    let affine = &volume.affine_lps;
    let std_dev_mm = fwhm_mm / (8.0 * std::f64::consts::LN_2).sqrt();
    let std_dev = [2, 1, 0].map(|axis| {
        let squares: f64 = (0..3).map(|row| affine[row][axis].powi(2)).sum();
        std_dev_mm / squares.sqrt()
    });
    Ok(Spline::blurring(
        gaussian(volume.voxels.view(), std_dev).view(),
    ))
}

/// The mean of what is brighter than the mean.
fn head_limit(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let (all, _) = moments(values.clone());
    let (bright, _) = moments(values.filter(|value| *value > all));
    bright
}

/// Mean and population standard deviation; NaN of nothing.
fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let (sum, len) = values
        .clone()
        .fold((0.0, 0.0), |(sum, len), value| (sum + value, len + 1.0));
    let mean = sum / len;
    let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / len).sqrt())
}

/// The same items in an order that follows no grid, the same every time.
fn shuffled<T>(items: Vec<T>) -> Vec<T> {
    let mut keyed: Vec<(u32, T)> = (0_u32..)
        .map(|i| {
            i.wrapping_mul(0x9e37_79b1)
                .swap_bytes()
                .wrapping_mul(0x85eb_ca6b)
        })
        .zip(items)
        .collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, item)| item).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;
    use proptest::prelude::*;

    use super::*;
    use crate::volume::{PatientTag, SeriesUid, VolumeHeader};

    /// A head of smooth lumps, known everywhere; LPS, millimetres.
    fn head([x, y, z]: [f64; 3]) -> f64 {
        let inside = 1.0 - (x / 60.0).powi(2) - (y / 75.0).powi(2) - (z / 55.0).powi(2);
        let skull = 1.0 / (1.0 + (-12.0 * inside).exp());
        let lumps = (x / 9.0).sin() * (y / 11.0 + 1.0).cos() + (z / 10.0 + x / 20.0).sin();
        skull * (600.0 + 120.0 * lumps)
    }

    /// The head as a tilted grid shows it once it has moved.
    fn volume(motion: &Rigid) -> Volume {
        let tilt = Rotation3::from_euler_angles(0.1, -0.05, 0.2);
        let axes = tilt.matrix() * Matrix3::from_diagonal(&Vector3::new(3.0, 3.5, 4.0));
        let (slices, rows, columns) = (24, 44, 40);
        let origin = -(axes * Vector3::new(19.5, 21.5, 11.5)) + Vector3::new(2.0, -3.0, 5.0);
        let mut affine_lps = [[0.0, 0.0, 0.0, 1.0]; 4];
        for (row, line) in affine_lps[..3].iter_mut().enumerate() {
            *line = [axes[(row, 0)], axes[(row, 1)], axes[(row, 2)], origin[row]];
        }
        let mut volume = Volume {
            voxels: Array3::zeros((slices, rows, columns)),
            affine_lps,
            header: VolumeHeader {
                series_uid: SeriesUid::new("2.25.1"),
                patient: PatientTag::default(),
                acquisition: 1,
                instance: None,
                tr_ms: 1500.0,
                slice_times_ms: None,
            },
        };
        let back = motion.homogeneous().try_inverse().unwrap();
        volume.voxels = Array3::from_shape_fn((slices, rows, columns), |(k, j, i)| {
            let place = volume.position_lps([count(i), count(j), count(k)]);
            let place = back.transform_point(&place.into());
            #[expect(clippy::cast_possible_truncation, reason = "a voxel's value")]
            let value = head(place.coords.into()) as f32;
            value
        });
        volume
    }

    fn rigid(shift: [f64; 3], turn: [f64; 3], centre: [f64; 3]) -> Rigid {
        Rigid {
            rotation: Rotation3::from_euler_angles(turn[0], turn[1], turn[2]),
            shift: shift.into(),
            centre: centre.into(),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]
        #[test]
        fn known_motion_is_found(
            shift in prop::array::uniform3(-4.0_f64..4.0),
            turn in prop::array::uniform3(-0.06_f64..0.06),
        ) {
            let truth = rigid(shift, turn, [2.0, -3.0, 5.0]);
            let realigner = Realigner::new(&volume(&Rigid::identity())).unwrap();
            let found = realigner.realign(&volume(&truth), &Rigid::identity()).unwrap();
            for place in [[50.0, 0.0, 0.0], [0.0, 50.0, 0.0], [0.0, -30.0, 40.0]] {
                let off = Vector3::from(found.apply(place)) - Vector3::from(truth.apply(place));
                prop_assert!(off.norm() < 0.05, "{} mm at {place:?}", off.norm());
            }
            for (found, truth) in found.parameters().iter().zip(truth.parameters()) {
                prop_assert!((found - truth).abs() < 0.05);
            }
        }

        #[test]
        fn motion_and_its_matrix_agree_whatever_the_centre(
            shift in prop::array::uniform3(-9.0_f64..9.0),
            turn in prop::array::uniform3(-0.3_f64..0.3),
            centre in prop::array::uniform3(-90.0_f64..90.0),
            place in prop::array::uniform3(-90.0_f64..90.0),
        ) {
            let motion = rigid(shift, turn, centre);
            let moved = Vector3::from(motion.apply(place));
            let matrix = crate::volume::apply(&motion.matrix_lps(), place);
            prop_assert!((moved - Vector3::from(matrix)).norm() < 1e-9);
            let other = motion.about(Vector3::new(7.0, -80.0, 3.0)).apply(place);
            prop_assert!((moved - Vector3::from(other)).norm() < 1e-9);
            let [x, y, z] = place;
            let [x, y, z] = crate::volume::apply(&motion.matrix_ras(), [-x, -y, z]);
            prop_assert!((moved - Vector3::new(-x, -y, z)).norm() < 1e-9);
        }
    }

    #[test]
    fn start_that_leads_astray_is_given_up() {
        let realigner = Realigner::new(&volume(&Rigid::identity())).unwrap();
        let astray = rigid([500.0, 0.0, 0.0], [0.0; 3], [0.0; 3]);
        let found = realigner.realign(&volume(&Rigid::identity()), &astray);
        let [x, ..] = found.unwrap().apply([0.0; 3]);
        assert!(x.abs() < 1e-3);
    }

    #[test]
    fn brighter_volume_does_not_move_the_head() {
        let truth = rigid([1.0, -2.0, 0.5], [0.01, 0.0, -0.02], [0.0; 3]);
        let realigner = Realigner::new(&volume(&Rigid::identity())).unwrap();
        let mut bright = volume(&truth);
        bright.voxels *= 1.7;
        let found = realigner.realign(&bright, &Rigid::identity()).unwrap();
        let off = Vector3::from(found.apply([40.0; 3])) - Vector3::from(truth.apply([40.0; 3]));
        assert!(off.norm() < 0.05, "{} mm", off.norm());
    }

    #[test]
    fn volumes_without_a_head_are_refused() {
        let reference = volume(&Rigid::identity());
        let realigner = Realigner::new(&reference).unwrap();
        for value in [0.0, 5.0, f32::NAN, f32::MAX] {
            let mut empty = reference.clone();
            empty.voxels.fill(value);
            assert!(Realigner::new(&empty).is_err(), "reference of {value}");
            let found = realigner.realign(&empty, &Rigid::identity());
            assert!(found.is_err(), "volume of {value}: {found:?}");
        }
        let mut noise = reference.clone();
        let mut state = 1_u32;
        noise.voxels.mapv_inplace(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from(state.to_be_bytes()[0])
        });
        let found = realigner.realign(&noise, &Rigid::identity());
        assert!(found.is_err(), "noise: {found:?}");
        let mut thin = reference.clone();
        thin.voxels = Array3::ones((1, 64, 64));
        assert!(matches!(
            Realigner::new(&thin),
            Err(MotionError::TooFewPoints { found: 0, .. })
        ));
        assert!(matches!(
            realigner.realign(&thin, &Rigid::identity()),
            Err(MotionError::Shape { .. })
        ));
    }
}
