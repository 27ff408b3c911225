//! Pixels, as they are shown and stored.

use ndarray::{ArrayView3, ArrayViewD, Ix4};

/// How a network's raw output becomes intensities: `clamp(scale * value + shift, 0, 1)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// Factor.
    pub scale: f32,
    /// Added after the factor.
    pub shift: f32,
}

impl Range {
    /// From -1..1, as autoencoders are trained.
    pub const SYMMETRIC: Range = Range {
        scale: 0.5,
        shift: 0.5,
    };

    /// As it is, for what lies in 0..1 already.
    pub const UNIT: Range = Range {
        scale: 1.0,
        shift: 0.0,
    };

    /// One value's intensity, 0..=1.
    #[must_use]
    pub fn apply(self, value: f32) -> f32 {
        (self.scale * value + self.shift).clamp(0.0, 1.0)
    }
}

/// An output that is not a picture.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// Wrong axes.
    #[error("expected a picture of shape [1, 3, height, width], found {found:?}")]
    Shape {
        /// Shape found.
        found: Vec<usize>,
    },
}

/// A colour picture, 8 bits per channel.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `[row, column, channel]`, row-major; red, green, blue.
    pub rgb: Vec<u8>,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({} x {})", self.width, self.height)
    }
}

impl Picture {
    /// From a network's output.
    ///
    /// - `values`: `[1, 3, height, width]`, raw.
    ///
    /// # Errors
    /// [`PictureError::Shape`] for other axes.
    pub fn from_raw(values: ArrayViewD<'_, f32>, range: Range) -> Result<Picture, PictureError> {
        let error = || PictureError::Shape {
            found: values.shape().to_vec(),
        };
        let four = values
            .view()
            .into_dimensionality::<Ix4>()
            .map_err(|_| error())?;
        let (batch, channels, rows, columns) = four.dim();
        if batch != 1 || channels != 3 {
            return Err(error());
        }
        let height = u32::try_from(rows).map_err(|_| error())?;
        let width = u32::try_from(columns).map_err(|_| error())?;
        Ok(Picture {
            width,
            height,
            rgb: interleave(four.index_axis(ndarray::Axis(0), 0), range),
        })
    }
}

fn interleave(planes: ArrayView3<'_, f32>, range: Range) -> Vec<u8> {
    let pixels = planes.permuted_axes([1, 2, 0]);
    pixels
        .iter()
        .map(|&value| quantise(range.apply(value)))
        .collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an intensity of 0..=1 times 255 fits a byte"
)]
fn quantise(intensity: f32) -> u8 {
    (intensity * 255.0).round() as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{ArrayD, IxDyn};

    #[test]
    fn planes_become_interleaved_clamped_bytes() {
        let values =
            ArrayD::from_shape_vec(IxDyn(&[1, 3, 1, 2]), vec![-1.0, 1.0, 0.0, 3.0, -9.0, 0.5])
                .unwrap();
        let picture = Picture::from_raw(values.view(), Range::SYMMETRIC).unwrap();
        assert_eq!((picture.width, picture.height), (2, 1));
        assert_eq!(picture.rgb, [0, 128, 0, 255, 255, 191]);
    }

    #[test]
    fn a_batch_of_two_is_not_a_picture() {
        let values = ArrayD::<f32>::zeros(IxDyn(&[2, 3, 4, 4]));
        assert!(Picture::from_raw(values.view(), Range::SYMMETRIC).is_err());
    }
}
