//! What the image tower expects: its size, as kornia resizes, and CLIP's normalisation.

use ndarray::{Array1, Array2, Array4, ArrayD, ArrayView4, ArrayViewD, Axis};

/// Channel means and deviations of CLIP's training pictures.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD_DEV: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];
/// The parameter of torch's bicubic kernel.
const CUBIC: f64 = -0.75;

/// Normalises pictures as sgm's `FrozenOpenCLIPImageEmbedder` does.
///
/// - `images`: `[batch, 3, height, width]`, intensities 0..1. The original maps them by `(x + 1) / 2`,
///   as if they were in -1..1, although MindEye2 passes 0..1; that is repeated here.
///
/// Returns an array of the same shape.
#[must_use]
pub fn normalise(images: ArrayViewD<'_, f32>) -> ArrayD<f32> {
    let mut out = images.to_owned();
    for ((mut channel, mean), std_dev) in out.axis_iter_mut(Axis(1)).zip(MEAN).zip(STD_DEV) {
        channel.mapv_inplace(|value| (f32::midpoint(value, 1.0) - mean) / std_dev);
    }
    out
}

/// Resizes to the tower's size as kornia's `resize(…, "bicubic", align_corners=True, antialias=True)`.
///
/// Neither cropped nor padded: the sides are stretched, as the original does it. Where a side
/// shrinks, a Gaussian blur on both goes before (`std_dev` of half the factor minus a half, borders
/// reflected). Pictures that have the size already stay as they are.
///
/// - `images`: `[batch, channel, height, width]`, no side of 0.
/// - `to`: rows and columns.
#[must_use]
pub fn resize(images: ArrayView4<'_, f32>, to: [usize; 2]) -> Array4<f32> {
    let (_, _, height, width) = images.dim();
    let from = [height, width];
    if from == to {
        return images.to_owned();
    }
    let shrinks = from.iter().zip(to).any(|(&from, to)| from > to);
    let map = |from: usize, to: usize| {
        // Blur and bicubic are both linear along one axis: one matrix does both.
        let kernel = if shrinks {
            blur_kernel(from, to)
        } else {
            Array1::ones(1)
        };
        taps(from, to, &kernel)
    };
    let (down, across) = (
        map(height, to[0]).mapv(narrow),
        map(width, to[1]).mapv(narrow),
    );
    let across = across.t();
    let mut out = Array4::zeros((images.dim().0, images.dim().1, to[0], to[1]));
    for (image, mut image_out) in images.outer_iter().zip(out.outer_iter_mut()) {
        for (plane, mut plane_out) in image.outer_iter().zip(image_out.outer_iter_mut()) {
            plane_out.assign(&down.dot(&plane).dot(&across));
        }
    }
    out
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the target is single precision"
)]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// A kernel with mirrored ends, then bicubic interpolation with aligned corners and repeated edges,
/// `[to, from]`.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sides of pictures, and places that are not negative"
)]
fn taps(from: usize, to: usize, kernel: &Array1<f64>) -> Array2<f64> {
    let mut taps = Array2::zeros((to, from));
    let step = if to > 1 {
        (from - 1) as f64 / (to - 1) as f64
    } else {
        0.0
    };
    let near = |x: f64| ((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((CUBIC * x - 5.0 * CUBIC) * x + 8.0 * CUBIC) * x - 4.0 * CUBIC;
    let half = kernel.len() / 2;
    for (index, mut row) in taps.rows_mut().into_iter().enumerate() {
        let place = step * index as f64;
        let low = place.floor();
        let share = place - low;
        let weights = [
            far(share + 1.0),
            near(share),
            near(1.0 - share),
            far(2.0 - share),
        ];
        for (offset, weight) in weights.into_iter().enumerate() {
            let centre = (low as usize + offset).saturating_sub(1).min(from - 1);
            for (at, share) in kernel.iter().enumerate() {
                row[reflected(centre + at, half, from)] += weight * share;
            }
        }
    }
    taps
}

/// Kornia's Gaussian before shrinking.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sides of pictures, and kernels of a few times their quotient"
)]
fn blur_kernel(from: usize, to: usize) -> Array1<f64> {
    let std_dev = ((from as f64 / to as f64 - 1.0) / 2.0).max(0.001);
    let len = ((4.0 * std_dev).max(3.0) as usize) | 1;
    let half = len / 2;
    let kernel: Array1<f64> = (0..len)
        .map(|at| {
            let distance = at as f64 - half as f64;
            libm::exp(-distance * distance / (2.0 * std_dev * std_dev))
        })
        .collect();
    &kernel / kernel.sum()
}

/// The place `index - half` of a line of `len`, mirrored at its ends without repeating them.
fn reflected(index: usize, half: usize, len: usize) -> usize {
    let period = 2 * (len - 1);
    if period == 0 {
        return 0;
    }
    let place = (index + period * half.div_ceil(period) - half) % period;
    place.min(period - place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array4;

    #[test]
    fn the_same_size_changes_nothing() {
        let image = Array4::from_shape_fn((1, 3, 5, 4), |(_, c, y, x)| (c * 20 + y * 4 + x) as f32);
        assert_eq!(resize(image.view(), [5, 4]), image);
    }

    #[test]
    fn corners_keep_their_values_where_a_picture_grows() {
        let image = Array4::from_shape_fn((1, 1, 3, 2), |(_, _, y, x)| (y * 2 + x) as f32);
        let grown = resize(image.view(), [7, 5]);
        for (found, expected) in [((0, 0), 0.0), ((0, 4), 1.0), ((6, 0), 4.0), ((6, 4), 5.0)] {
            let found = grown[[0, 0, found.0, found.1]];
            assert!((found - expected).abs() < 1e-6, "{found} for {expected}");
        }
    }

    #[test]
    fn a_grey_picture_stays_grey_at_every_size() {
        for (rows, columns) in [(1, 1), (1, 300), (300, 1), (640, 427), (225, 8)] {
            let grey = Array4::from_elem((1, 3, rows, columns), 0.25_f32);
            let resized = resize(grey.view(), [224, 224]);
            assert_eq!(resized.dim(), (1, 3, 224, 224));
            assert!(
                resized.iter().all(|value| (value - 0.25).abs() < 1e-5),
                "{rows} x {columns}"
            );
        }
    }

    #[test]
    fn places_beyond_an_end_are_mirrored() {
        let found: Vec<usize> = (0..8).map(|index| reflected(index, 2, 4)).collect();
        assert_eq!(found, [2, 1, 0, 1, 2, 3, 2, 1]);
    }
}
