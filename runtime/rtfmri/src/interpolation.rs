//! One volume, read between its voxels: the only interpolation a value goes through.
//!
//! Motion, registration and the mask's own grid are affine, so that their product takes a
//! mask's voxel straight to its place in the volume. The spline is made once per volume
//! and serves the mask, the head and whatever else is asked of the volume.

use nalgebra::Matrix4;

use crate::spline::{Spline, single};
use crate::volume::{Affine, Volume};

/// Why a volume cannot be read between its voxels.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InterpolationError {
    /// The affine has no inverse or holds what is no number.
    #[error("volume affine is singular or not finite")]
    Singular,
    /// The volume has no voxel.
    #[error("volume of {shape:?} slices, rows and columns is empty")]
    Empty {
        /// Slices, rows, columns.
        shape: [usize; 3],
    },
}

/// A volume that has a value at every place of the patient.
#[derive(Debug)]
pub struct Interpolation {
    spline: Spline<'static>,
    /// LPS, millimetres, to `(column, row, slice)`.
    to_index: Matrix4<f64>,
}

impl Interpolation {
    /// The cubic spline through a volume's voxels.
    ///
    /// # Errors
    /// [`InterpolationError`] where the volume has no voxels or no places.
    pub fn new(volume: &Volume) -> Result<Self, InterpolationError> {
        let (slices, rows, columns) = volume.voxels.dim();
        if slices * rows * columns == 0 {
            return Err(InterpolationError::Empty {
                shape: [slices, rows, columns],
            });
        }
        Ok(Self {
            spline: Spline::through(volume.voxels.view()),
            to_index: inverse(&volume.affine_lps).ok_or(InterpolationError::Singular)?,
        })
    }

    /// The values at places, moved first.
    ///
    /// A place outside the volume has the value at the nearest edge.
    ///
    /// - `places`: LPS, millimetres.
    /// - `map`: LPS to LPS, millimetres; where in this volume a place is found.
    ///
    /// Returns one value per place, scanner units.
    #[must_use]
    pub fn at(&self, places: &[[f64; 3]], map: &Affine) -> Vec<f32> {
        let map = self.to_index * matrix(map);
        self.along(places.iter().copied(), &map).collect()
    }

    /// The values at whatever a matrix takes to indices of this volume.
    pub(crate) fn along(
        &self,
        places: impl Iterator<Item = [f64; 3]>,
        map: &Matrix4<f64>,
    ) -> impl Iterator<Item = f32> {
        places.map(move |place| {
            let at = transformed(map, place);
            let quick = at.map(single);
            if self.spline.holds(quick) {
                self.spline.value_inside(quick)
            } else {
                self.spline.value(at)
            }
        })
    }

    /// LPS, millimetres, to `(column, row, slice)`.
    pub(crate) fn to_index(&self) -> &Matrix4<f64> {
        &self.to_index
    }
}

/// A place under an affine matrix.
#[inline]
pub(crate) fn transformed(map: &Matrix4<f64>, [x, y, z]: [f64; 3]) -> [f64; 3] {
    std::array::from_fn(|row| {
        map[(row, 0)] * x + map[(row, 1)] * y + map[(row, 2)] * z + map[(row, 3)]
    })
}

/// An affine as a matrix.
pub(crate) fn matrix(affine: &Affine) -> Matrix4<f64> {
    Matrix4::from_fn(|row, column| affine[row][column])
}

/// A matrix as an affine.
pub(crate) fn affine(matrix: &Matrix4<f64>) -> Affine {
    std::array::from_fn(|row| std::array::from_fn(|column| matrix[(row, column)]))
}

/// The inverse of an affine, where it has a finite one.
pub(crate) fn inverse(affine: &Affine) -> Option<Matrix4<f64>> {
    let inverse = matrix(affine).try_inverse()?;
    inverse
        .iter()
        .all(|value| value.is_finite())
        .then_some(inverse)
}

/// An affine between LPS spaces as one between RAS spaces, and the other way round.
#[must_use]
pub(crate) fn lps_to_ras(affine: &Affine) -> Affine {
    let sign = |axis: usize| if axis < 2 { -1.0 } else { 1.0 };
    std::array::from_fn(|row| {
        std::array::from_fn(|column| sign(row) * sign(column) * affine[row][column])
    })
}
