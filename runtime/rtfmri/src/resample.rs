//! A volume with the head elsewhere: what the simulated scanner sees when somebody moves.
//!
//! Each voxel of the new volume is read from where the motion took it, between voxels by a
//! cubic spline. What comes in from outside takes the value at the nearest edge.

use nalgebra::{Matrix4, Vector4};

use crate::spline::Spline;
use crate::volume::{Affine, Volume};

/// Why a volume was not resampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResampleError {
    /// The volume's affine or the motion has no inverse, or holds what is no number.
    #[error("{0} is singular or not finite")]
    Singular(&'static str),
    /// There is nothing to read from.
    #[error("volume has no voxels")]
    Empty,
}

impl Volume {
    /// The volume with everything in it moved.
    ///
    /// - `matrix_lps`: takes a place in this volume to its place in the new one, LPS,
    ///   millimetres; [`crate::Rigid::matrix_lps`] of the motion that
    ///   [`crate::Realigner::realign`] then finds.
    ///
    /// Returns a volume on the same grid with the same header.
    ///
    /// # Errors
    /// [`ResampleError`] where a matrix cannot be inverted or there are no voxels.
    pub fn resampled(&self, matrix_lps: &Affine) -> Result<Volume, ResampleError> {
        let invertible = |matrix: &Affine, name| {
            let matrix = Matrix4::from_fn(|row, column| matrix[row][column]);
            let finite = matrix.iter().all(|value| value.is_finite());
            let inverse = matrix.try_inverse().filter(|_| finite);
            inverse
                .map(|inverse| (matrix, inverse))
                .ok_or(ResampleError::Singular(name))
        };
        let (to_place, to_index) = invertible(&self.affine_lps, "volume affine")?;
        let (_, back) = invertible(matrix_lps, "motion")?;
        if self.voxels.is_empty() {
            return Err(ResampleError::Empty);
        }
        let map = to_index * back * to_place;
        if (map - Matrix4::identity()).amax() < 1e-12 {
            return Ok(self.clone());
        }
        let spline = Spline::through(self.voxels.view());
        let along: Vector4<f64> = map.column(0).into();
        let mut voxels = self.voxels.clone();
        for ((slice, row), mut line) in lines(&mut voxels) {
            let start = map * Vector4::new(0.0, index(row), index(slice), 1.0);
            for (column, voxel) in line.iter_mut().enumerate() {
                let at = start + along * index(column);
                *voxel = spline.value([at[0], at[1], at[2]]);
            }
        }
        Ok(Volume {
            voxels,
            affine_lps: self.affine_lps,
            header: self.header.clone(),
        })
    }
}

/// Every row of voxels with its slice and row number.
fn lines(
    voxels: &mut ndarray::Array3<f32>,
) -> impl Iterator<Item = ((usize, usize), ndarray::ArrayViewMut1<'_, f32>)> {
    let (_, rows, _) = voxels.dim();
    let lanes = voxels.lanes_mut(ndarray::Axis(2)).into_iter();
    lanes
        .enumerate()
        .map(move |(line, lane)| ((line / rows, line % rows), lane))
}

/// A voxel index as a float; those here are far below 2^32.
fn index(value: usize) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;
    use proptest::prelude::*;

    use super::*;
    use crate::volume::{PatientTag, SeriesUid, VolumeHeader};

    /// A smooth blob about a place, sampled on an oblique grid.
    fn blob(centre: [f64; 3]) -> Volume {
        let affine_lps = [
            [2.9, 0.3, 0.0, -33.0],
            [-0.3, 2.9, 0.2, -31.0],
            [0.0, -0.2, 3.4, -30.0],
            [0.0, 0.0, 0.0, 1.0],
        ];
        let mut volume = Volume {
            voxels: Array3::zeros((18, 22, 24)),
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
        let places = volume.clone();
        for ((slice, row, column), voxel) in volume.voxels.indexed_iter_mut() {
            let place = places.position_lps([index(column), index(row), index(slice)]);
            let away: f64 = (0..3)
                .map(|axis| (place[axis] - centre[axis]).powi(2))
                .sum();
            #[expect(clippy::cast_possible_truncation, reason = "a brightness")]
            let value = 1000.0 * (-away / (2.0 * 9.0_f64.powi(2))).exp() as f32;
            *voxel = value;
        }
        volume
    }

    /// A turn about the superior axis and a shift, LPS, millimetres.
    fn motion(turn: f64, shift: [f64; 3]) -> Affine {
        let (sin, cos) = turn.sin_cos();
        [
            [cos, -sin, 0.0, shift[0]],
            [sin, cos, 0.0, shift[1]],
            [0.0, 0.0, 1.0, shift[2]],
            [0.0, 0.0, 0.0, 1.0],
        ]
    }

    #[test]
    fn no_motion_changes_nothing() {
        let volume = blob([0.0, 0.0, 0.0]);
        let same = volume.resampled(&motion(0.0, [0.0; 3])).unwrap();
        assert_eq!(same.voxels, volume.voxels);
    }

    #[test]
    fn flat_affine_and_empty_volume_are_refused() {
        let mut volume = blob([0.0, 0.0, 0.0]);
        let still = motion(0.0, [0.0; 3]);
        assert_eq!(
            volume.resampled(&[[0.0; 4]; 4]).err(),
            Some(ResampleError::Singular("motion"))
        );
        volume.affine_lps[0] = [f64::NAN; 4];
        assert_eq!(
            volume.resampled(&still).err(),
            Some(ResampleError::Singular("volume affine"))
        );
        let mut volume = blob([0.0, 0.0, 0.0]);
        volume.voxels = Array3::zeros((0, 2, 2));
        assert_eq!(volume.resampled(&still).err(), Some(ResampleError::Empty));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// The slow obvious reference: the blob drawn again where the motion takes it.
        #[test]
        fn moved_blob_is_a_blob_drawn_where_it_went(
            turn in -0.2_f64..0.2,
            shift in prop::array::uniform3(-5.0_f64..5.0),
        ) {
            let motion = motion(turn, shift);
            let from = [3.0, -4.0, 2.0];
            let to = [0, 1, 2].map(|axis: usize| {
                (0..3).map(|i| motion[axis][i] * from[i]).sum::<f64>() + motion[axis][3]
            });
            let moved = blob(from).resampled(&motion).unwrap();
            let drawn = blob(to);
            // Nearer to an edge than the motion goes, the blob comes in from outside.
            let inner = ndarray::s![4..14, 4..18, 4..20];
            let (moved, drawn) = (moved.voxels.slice(inner), drawn.voxels.slice(inner));
            for (found, expected) in moved.iter().zip(&drawn) {
                prop_assert!((found - expected).abs() < 2.0, "{found} for {expected}");
            }
        }
    }
}
