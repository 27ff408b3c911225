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
        let mut motion = Rigid {
            rotation: start.rotation,
            shift: Vector3::from(start.apply(self.centre.into())) - self.centre,
            centre: self.centre,
        };
        for level in &self.levels {
            let spline = blurred(volume, level.fwhm_mm)?;
            motion = level.descend(&spline, &inverse, self.shape, motion)?;
        }
        Ok(motion)
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
        let keep_every = head.len().div_ceil(MAX_POINTS);
        // Every so many along the file's order would follow the grid; a shuffled order does not.
        head = shuffled(head);
        head.truncate(head.len() / keep_every);
        let points = head.into_iter().map(|&(at, value)| {
            let slope = |axis: usize| {
                let shifted = |by: f64| {
                    let mut at = at;
                    at[axis] += by;
                    f64::from(spline.value(at))
                };
                (shifted(0.5) - shifted(-0.5)) / 1.0
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
        Ok(motion)
    }

    /// Weighs each point by how far its residual lies from what the others show.
    fn weigh(&self, values: &[Option<f64>], solved: &SVector<f64, 7>, weights: &mut [f64]) {
        let residual = |(point, value): (&Point, &Option<f64>)| {
            value.map(|value| (value - point.slopes.dot(solved)).abs())
        };
        let mut sizes: Vec<f64> = self.points.iter().zip(values).filter_map(residual).collect();
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
    let mean = |values: &mut dyn Iterator<Item = f64>| {
        let (mut sum, mut len) = (0.0, 0.0);
        for value in values {
            sum += value;
            len += 1.0;
        }
        sum / f64::max(len, 1.0)
    };
    let all = mean(&mut values.clone());
    mean(&mut values.filter(|value| *value > all))
}

/// The same items in an order that follows no grid, the same every time.
fn shuffled<T>(items: Vec<T>) -> Vec<T> {
    let mut keyed: Vec<(u32, T)> = (0_u32..)
        .map(|i| i.wrapping_mul(0x9e37_79b1).swap_bytes().wrapping_mul(0x85eb_ca6b))
        .zip(items)
        .collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, item)| item).collect()
}
