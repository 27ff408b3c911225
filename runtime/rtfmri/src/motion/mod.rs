//! Where the head moved: six-parameter rigid realignment to a run's first volume.
//!
//! Steps: both volumes are seen through the same small blur; points of the reference's
//! head are compared with the volume at their moved places; a Gauss-Newton step moves
//! the points (inverse compositional, Baker and Matthews 2004: the reference's gradient
//! serves every volume). A wide blur first, for large motion, on a thinned grid; then a
//! narrow one, with few points until the head is near and with all for the last steps.
//! Residuals far beyond the others' count less (Tukey's biweight).
//!
//! A motion `M` takes a place in the head as the reference shows it to where it is in the
//! volume, so that a volume is realigned by sampling it at `M x`.

mod level;
mod rigid;

use nalgebra::Vector3;

use self::level::{Level, Look, Room, Until};
pub(crate) use self::level::{head_limit, shuffled};
pub use self::rigid::Rigid;
use crate::interpolation;
use crate::spline::count;
use crate::volume::Volume;

/// For large motion, and for small.
const LOOKS: [Look; 2] = [
    Look {
        fwhm_mm: 8.0,
        spacing_mm: 6.5,
        points: 4_000,
        scouts: 4_000,
    },
    Look {
        fwhm_mm: 2.0,
        spacing_mm: 0.0,
        points: 16_000,
        scouts: 4_000,
    },
];
/// Where the wide blur, the scouts and all points stop.
const COARSE: Until = Until { still_mm: 0.1 };
const NEAR: Until = Until { still_mm: 0.03 };
const STILL: Until = Until { still_mm: 2e-3 };
/// Places of the head that stand for all of it.
const HEAD_PLACES: usize = 4_096;

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

/// Realigns the volumes of a run to its first one.
pub struct Realigner {
    /// Slices, rows, columns.
    shape: [usize; 3],
    centre: Vector3<f64>,
    levels: [Level; 2],
    /// LPS, millimetres.
    head: Vec<[f64; 3]>,
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
        let level = |look| Level::new(reference, centre, look);
        Ok(Self {
            shape: [slices, rows, columns],
            centre,
            levels: [level(LOOKS[0])?, level(LOOKS[1])?],
            head: head_places(reference),
        })
    }

    /// What rotations turn about: the centre of the reference's grid, LPS, millimetres.
    #[must_use]
    pub fn centre_lps(&self) -> [f64; 3] {
        self.centre.into()
    }

    /// Voxel centres of the reference's head, a few thousand spread over all of it.
    ///
    /// Returns LPS, millimetres; for [`Interpolation::at`] and with it the head's DVARS.
    ///
    /// [`Interpolation::at`]: crate::interpolation::Interpolation::at
    #[must_use]
    pub fn head(&self) -> &[[f64; 3]] {
        &self.head
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
        let to_index = interpolation::inverse(&volume.affine_lps).ok_or(MotionError::Singular)?;
        let [wide, narrow] = &self.levels;
        let (wide_view, narrow_view) = (wide.see(volume)?, narrow.see(volume)?);
        let mut room = Room::new();
        let mut from = |start: &Rigid| {
            let mut motion = start.about(self.centre);
            for (level, view, points, until) in [
                (wide, &wide_view, wide.points(), COARSE),
                (narrow, &narrow_view, narrow.scouts(), NEAR),
                (narrow, &narrow_view, narrow.points(), STILL),
            ] {
                motion = level.descend(view, &to_index, points, until, motion, &mut room)?;
            }
            Ok(motion)
        };
        // A start that leads astray must not lose the rest of the run.
        from(start).or_else(|_| from(&Rigid::identity()))
    }
}

/// Voxel centres of the head, thinned to a few thousand, in the grid's order.
fn head_places(reference: &Volume) -> Vec<[f64; 3]> {
    let bright = reference.voxels.iter().map(|value| f64::from(*value));
    let limit = head_limit(bright) * level::HEAD_SHARE;
    let inside = reference.voxels.indexed_iter();
    let inside = inside.filter(|(_, value)| f64::from(**value) > limit);
    let mut places: Vec<_> = shuffled(inside.map(|(at, _)| at).collect());
    places.truncate(HEAD_PLACES);
    places.sort_unstable();
    let place = |(slice, row, column)| reference.position_lps([column, row, slice].map(count));
    places.into_iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use nalgebra::{Matrix3, Rotation3};
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
                time_ms: None,
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
        let [l, p, s] = shift;
        let [about_l, about_p, about_s] = turn;
        Rigid::from_parameters([l, p, s, about_l, about_p, about_s], centre)
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
