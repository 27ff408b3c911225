//! Which voxels a subject's model takes, found in a volume by world position.
//!
//! A mask is a NIfTI image on the functional grid; its voxels are ordered as the image's
//! C order, `i` slowest. A volume may run its rows or slices the other way (dcm2niix
//! flips the row axis), so each voxel is looked up by its place in the patient.

use nalgebra::{Matrix4, Vector4};
use ndarray::{Array1, Array3};

use crate::interpolation::{self, Interpolation, InterpolationError};
use crate::nifti::{self, NiftiError};
use crate::volume::{Affine, Volume, apply};

/// How far, in voxels, a mask voxel's centre may lie from the volume's.
const GRID_TOLERANCE: f64 = 0.02;

/// Why a mask does not fit a volume.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MaskError {
    /// The grids have different sizes.
    #[error("mask grid is {mask:?} voxels, volume's columns, rows and slices are {volume:?}")]
    Shape {
        /// The mask's sides, on the volume's axes where those are known.
        mask: [usize; 3],
        /// The volume's columns, rows and slices.
        volume: [usize; 3],
    },
    /// A corner of the mask's grid is no voxel centre of the volume's.
    #[error(
        "mask voxel {voxel:?} lies at {mask_lps_mm:?} mm LPS, the volume's nearest voxel at {volume_lps_mm:?}"
    )]
    Grid {
        /// The mask's voxel, `[i, j, k]`.
        voxel: [usize; 3],
        /// Where it lies.
        mask_lps_mm: [f64; 3],
        /// Where the nearest voxel of the volume lies.
        volume_lps_mm: [f64; 3],
    },
    /// The volume's affine has no inverse.
    #[error("volume affine is singular")]
    Singular,
    /// The volume cannot be read between its voxels.
    #[error("volume cannot be interpolated")]
    Interpolation(#[from] InterpolationError),
    /// A mask voxel lies outside the mask's own grid.
    #[error("mask voxel {voxel:?} is outside a grid of {shape:?}")]
    Outside {
        /// The voxel, `[i, j, k]`.
        voxel: [usize; 3],
        /// The grid's sides.
        shape: [usize; 3],
    },
}

/// The voxels of one subject's model, in the order of their axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Mask {
    shape: [usize; 3],
    affine_ras: Affine,
    voxels: Vec<[usize; 3]>,
}

impl Mask {
    /// Reads a mask: every voxel that is not zero.
    ///
    /// # Errors
    /// [`NiftiError`] where the bytes are no 3-D NIfTI-1 image.
    pub fn from_nifti(bytes: &[u8]) -> Result<Self, NiftiError> {
        let image = nifti::read(bytes)?;
        let (ni, nj, nk) = image.values.dim();
        let chosen = image
            .values
            .indexed_iter()
            .filter(|(_, value)| **value != 0.0);
        Ok(Self {
            shape: [ni, nj, nk],
            affine_ras: image.affine_ras,
            voxels: chosen.map(|((i, j, k), _)| [i, j, k]).collect(),
        })
    }

    /// A mask of chosen voxels on a grid; the order becomes the mask's own.
    ///
    /// - `shape`: the grid's `[i, j, k]` sides, voxels.
    /// - `affine_ras`: `(i, j, k)` to RAS, millimetres.
    /// - `voxels`: `[i, j, k]` each; doubles count once.
    ///
    /// # Errors
    /// [`MaskError::Outside`] for a voxel that the grid does not hold.
    pub fn from_voxels(
        shape: [usize; 3],
        affine_ras: Affine,
        voxels: &[[usize; 3]],
    ) -> Result<Self, MaskError> {
        let mut voxels = voxels.to_vec();
        voxels.sort_unstable();
        voxels.dedup();
        for voxel in &voxels {
            if voxel.iter().zip(shape).any(|(index, side)| *index >= side) {
                return Err(MaskError::Outside {
                    voxel: *voxel,
                    shape,
                });
            }
        }
        Ok(Self {
            shape,
            affine_ras,
            voxels,
        })
    }

    /// Writes the mask as a `.nii.gz` image of zeros and ones.
    ///
    /// # Errors
    /// [`NiftiError`] where the grid does not fit the format.
    pub fn to_nifti(&self) -> Result<Vec<u8>, NiftiError> {
        let mut values = Array3::zeros(self.shape);
        for voxel in &self.voxels {
            values[*voxel] = 1;
        }
        nifti::write(&values, &self.affine_ras)
    }

    /// How many voxels the mask holds.
    pub fn len(&self) -> usize {
        self.voxels.len()
    }

    /// Whether the mask holds no voxel.
    pub fn is_empty(&self) -> bool {
        self.voxels.is_empty()
    }

    /// Where the voxels lie, `[voxel]` of `[x, y, z]`, RAS, millimetres.
    pub fn positions_ras(&self) -> Vec<[f64; 3]> {
        let place = |voxel: &[usize; 3]| apply(&self.affine_ras, voxel.map(as_f64));
        self.voxels.iter().map(place).collect()
    }

    /// Takes the mask's voxels out of a volume.
    ///
    /// Returns `[voxel]`, scanner units.
    ///
    /// # Errors
    /// [`MaskError`], naming both values, where the two grids are not the same places.
    pub fn sample(&self, volume: &Volume) -> Result<Array1<f32>, MaskError> {
        let grid = self.grid_in(volume)?;
        let mut values = Array1::zeros(self.voxels.len());
        for (value, voxel) in values.iter_mut().zip(&self.voxels) {
            let [column, row, slice] = grid.find(*voxel, &self.affine_ras)?;
            *value = volume.voxels[[slice, row, column]];
        }
        Ok(values)
    }

    /// Takes the mask's voxels out of a volume of any grid, in one interpolation.
    ///
    /// Each voxel is looked up where `map` puts it: for a mask of the trained space that is
    /// motion after registration ([`Registration::then`]). One that is outside the volume
    /// takes the value at the nearest edge; [`Mask::count_outside`] tells how many are.
    ///
    /// - `map`: from the mask's space to the volume's, LPS to LPS, millimetres.
    ///
    /// Returns `[voxel]`, scanner units.
    ///
    /// [`Registration::then`]: crate::registration::Registration::then
    #[must_use]
    pub fn sample_through(&self, image: &Interpolation, map: &Affine) -> Array1<f32> {
        let map = self.index_map(image.to_index(), map);
        let voxels = self.voxels.iter().map(|voxel| voxel.map(as_f64));
        image.along(voxels, &map).collect()
    }

    /// How many of the mask's voxels lie outside a volume, by more than half a voxel.
    ///
    /// - `map`: as for [`Mask::sample_through`].
    ///
    /// # Errors
    /// [`MaskError::Singular`] where the volume has no places.
    pub fn count_outside(&self, volume: &Volume, map: &Affine) -> Result<usize, MaskError> {
        let grid = Grid::of(volume)?;
        let map = self.index_map(&grid.inverse, map);
        let outside = |voxel: &&[usize; 3]| {
            let at = interpolation::transformed(&map, voxel.map(as_f64));
            let within = |axis: usize| (-0.5..=as_f64(grid.shape[axis]) - 0.5).contains(&at[axis]);
            !(0..3).all(within)
        };
        Ok(self.voxels.iter().filter(outside).count())
    }

    /// Whether the mask's grid is a volume's, corner by corner.
    ///
    /// # Errors
    /// As [`Mask::sample`].
    pub fn check_grid(&self, volume: &Volume) -> Result<(), MaskError> {
        self.grid_in(volume).map(|_| ())
    }

    /// The matrix from the mask's voxels to a volume's.
    fn index_map(&self, to_index: &Matrix4<f64>, map: &Affine) -> Matrix4<f64> {
        let flip = Matrix4::from_diagonal(&Vector4::new(-1.0, -1.0, 1.0, 1.0));
        to_index * interpolation::matrix(map) * flip * interpolation::matrix(&self.affine_ras)
    }

    /// Finds the mask's grid in a volume, corner by corner.
    fn grid_in<'a>(&self, volume: &'a Volume) -> Result<Grid<'a>, MaskError> {
        let grid = Grid::of(volume)?;
        if grid.shape.contains(&0) {
            return Err(MaskError::Shape {
                mask: self.shape,
                volume: grid.shape,
            });
        }
        // The map between two grids is affine: where the corners fit, all voxels fit.
        let mut spans = [[usize::MAX, 0]; 3];
        for corner in 0..8_usize {
            let pick = |axis: usize| {
                let last = self.shape[axis].saturating_sub(1);
                if corner >> axis & 1 == 1 { last } else { 0 }
            };
            let index = grid.find([pick(0), pick(1), pick(2)], &self.affine_ras)?;
            for (span, index) in spans.iter_mut().zip(index) {
                *span = [span[0].min(index), span[1].max(index)];
            }
        }
        let covered = spans.map(|[first, last]| last - first + 1);
        if covered != grid.shape {
            return Err(MaskError::Shape {
                mask: self.shape,
                volume: grid.shape,
            });
        }
        Ok(grid)
    }
}

/// A volume's voxel centres, for finding places in it.
struct Grid<'a> {
    volume: &'a Volume,
    inverse: Matrix4<f64>,
    /// Columns, rows, slices.
    shape: [usize; 3],
}

impl<'a> Grid<'a> {
    fn of(volume: &'a Volume) -> Result<Self, MaskError> {
        let affine = &volume.affine_lps;
        let forward = Matrix4::from_fn(|row, column| affine[row][column]);
        let inverse = forward.try_inverse().ok_or(MaskError::Singular)?;
        let (slices, rows, columns) = volume.voxels.dim();
        Ok(Self {
            volume,
            inverse,
            shape: [columns, rows, slices],
        })
    }

    /// The volume's `[column, row, slice]` at a mask voxel's place.
    fn find(&self, voxel: [usize; 3], affine_ras: &Affine) -> Result<[usize; 3], MaskError> {
        let [x, y, z] = apply(affine_ras, voxel.map(as_f64));
        let lps = [-x, -y, z];
        let found = self.inverse * Vector4::new(lps[0], lps[1], lps[2], 1.0);
        let mut index = [0; 3];
        let mut fits = true;
        for axis in 0..3 {
            let side = self.shape[axis];
            let nearest = found[axis].round().clamp(0.0, as_f64(side) - 1.0);
            fits &= (found[axis] - nearest).abs() <= GRID_TOLERANCE;
            index[axis] = rounded(nearest);
        }
        if fits {
            return Ok(index);
        }
        Err(MaskError::Grid {
            voxel,
            mask_lps_mm: lps,
            volume_lps_mm: self.volume.position_lps(index.map(as_f64)),
        })
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the caller clamps to a voxel index; a float that is no number becomes 0"
)]
fn rounded(index: f64) -> usize {
    index as usize
}

/// An index as a float; indices here are far below 2^32.
fn as_f64(index: usize) -> f64 {
    f64::from(u32::try_from(index).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::motion::Rigid;
    use crate::volume::{PatientTag, SeriesUid, VolumeHeader};

    fn volume() -> Volume {
        Volume {
            voxels: Array3::from_shape_fn((4, 5, 6), |(slice, row, column)| {
                f32::from(u16::try_from(slice * 100 + row * 10 + column).unwrap())
            }),
            affine_lps: [
                [3.0, 0.0, 0.0, -9.0],
                [0.0, 3.0, 0.0, -7.0],
                [0.0, 0.0, 4.0, 5.0],
                [0.0, 0.0, 0.0, 1.0],
            ],
            header: VolumeHeader {
                series_uid: SeriesUid::new("2.25.1"),
                patient: PatientTag::default(),
                acquisition: 1,
                instance: None,
                tr_ms: 1500.0,
                slice_times_ms: None,
                time_ms: None,
            },
        }
    }

    /// The volume's grid in RAS with the row axis turned round, as dcm2niix writes it.
    const FLIPPED: Affine = [
        [-3.0, 0.0, 0.0, 9.0],
        [0.0, 3.0, 0.0, -5.0],
        [0.0, 0.0, 4.0, 5.0],
        [0.0, 0.0, 0.0, 1.0],
    ];

    #[test]
    fn voxels_are_found_through_a_flipped_row_axis() {
        let mask = Mask::from_voxels([6, 5, 4], FLIPPED, &[[2, 0, 3], [1, 4, 0]]).unwrap();
        let values = mask.sample(&volume()).unwrap();
        assert_eq!(values.to_vec(), [1.0, 342.0]);
        let again = Mask::from_nifti(&mask.to_nifti().unwrap()).unwrap();
        assert_eq!(again, mask);
    }

    #[test]
    fn voxels_are_followed_where_the_head_moves() {
        let mask = Mask::from_voxels([6, 5, 4], FLIPPED, &[[2, 2, 2], [3, 2, 1]]).unwrap();
        let volume = volume();
        let image = Interpolation::new(&volume).unwrap();
        let still = mask.sample_through(&image, &Rigid::identity().matrix_lps());
        for (moved, plain) in still.iter().zip(&mask.sample(&volume).unwrap()) {
            assert!((moved - plain).abs() < 1e-3);
        }
    }

    #[test]
    fn voxels_are_found_through_any_affine_and_those_outside_are_counted() {
        let mask = Mask::from_voxels([6, 5, 4], FLIPPED, &[[2, 2, 2], [3, 2, 1]]).unwrap();
        let volume = volume();
        let image = Interpolation::new(&volume).unwrap();
        // One column to the left and half a slice up: another step along the volume's axes.
        let mut map = Rigid::identity().matrix_lps();
        (map[0][3], map[2][3]) = (3.0, 2.0);
        let values = mask.sample_through(&image, &map);
        let still = Rigid::identity().matrix_lps();
        let at = |index| image.at(&[volume.position_lps(index)], &still)[0];
        // The volume's own columns, rows and slices of those places.
        let expected = [at([3.0, 2.0, 2.5]), at([4.0, 2.0, 1.5])];
        for (value, expected) in values.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-3, "{value} and {expected}");
        }
        assert_eq!(mask.count_outside(&volume, &map).unwrap(), 0);
        map[0][3] = 9.0;
        assert_eq!(mask.count_outside(&volume, &map).unwrap(), 1);
        map[0][3] = 90.0;
        assert_eq!(mask.count_outside(&volume, &map).unwrap(), 2);
        // Outside, the nearest edge's value.
        let edge = mask.sample_through(&image, &map);
        assert!((edge[0] - at([5.0, 2.0, 2.5])).abs() < 1e-3);
    }

    #[test]
    fn empty_volume_is_refused() {
        let mask = Mask::from_voxels([6, 5, 4], FLIPPED, &[[2, 2, 2]]).unwrap();
        let mut volume = volume();
        volume.voxels = Array3::zeros((4, 0, 6));
        for outcome in [mask.sample(&volume).map(|_| ()), mask.check_grid(&volume)] {
            assert!(matches!(outcome, Err(MaskError::Shape { .. })));
        }
    }

    #[test]
    fn shifted_or_smaller_grid_is_refused() {
        let mut shifted = FLIPPED;
        shifted[0][3] += 0.5;
        let mask = Mask::from_voxels([6, 5, 4], shifted, &[[0, 0, 0]]).unwrap();
        assert!(matches!(
            mask.sample(&volume()),
            Err(MaskError::Grid { .. })
        ));
        let mask = Mask::from_voxels([6, 5, 3], FLIPPED, &[[0, 0, 0]]).unwrap();
        assert!(matches!(
            mask.sample(&volume()),
            Err(MaskError::Shape { .. })
        ));
    }
}
