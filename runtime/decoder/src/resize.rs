//! Resizing of pictures as the original does it between its stages.
//!
//! The pinned torchvision resizes tensors bilinearly *without* anti-aliasing, with half-pixel
//! centres, in single precision; that is repeated here, also where it shrinks.

use ndarray::{Array4, ArrayView4, Axis, Zip};

/// Bilinear, half-pixel centres, edges repeated, no anti-aliasing.
///
/// - `images`: `[batch, channel, height, width]`.
/// - `to`: rows and columns.
#[must_use]
pub fn bilinear(images: ArrayView4<'_, f32>, [rows, columns]: [usize; 2]) -> Array4<f32> {
    let (batch, channels, height, width) = images.dim();
    let down = taps(height, rows);
    let across = taps(width, columns);
    let mut out = Array4::zeros((batch, channels, rows, columns));
    for (source, mut target) in images.outer_iter().zip(out.outer_iter_mut()) {
        for (plane, mut plane_out) in source.outer_iter().zip(target.outer_iter_mut()) {
            for (tap, mut row) in down.iter().zip(plane_out.rows_mut()) {
                let (upper, lower) = (plane.row(tap.low), plane.row(tap.high));
                for (x, value) in across.iter().zip(row.iter_mut()) {
                    let above = upper[x.low] * (1.0 - x.share) + upper[x.high] * x.share;
                    let below = lower[x.low] * (1.0 - x.share) + lower[x.high] * x.share;
                    *value = above * (1.0 - tap.share) + below * tap.share;
                }
            }
        }
    }
    out
}

/// The two places an output takes its value from, and the second one's share.
struct Tap {
    low: usize,
    high: usize,
    share: f32,
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sides of pictures, and places that are not negative"
)]
fn taps(from: usize, to: usize) -> Vec<Tap> {
    let scale = from as f32 / to as f32;
    let tap = |index: usize| {
        // One rounding, as in the compiled original.
        let place = scale.mul_add(index as f32 + 0.5, -0.5).max(0.0);
        let low = (place as usize).min(from - 1);
        Tap {
            low,
            high: (low + 1).min(from - 1),
            share: place - low as f32,
        }
    };
    (0..to).map(tap).collect()
}

/// The nearest pixel up and to the left, as torch's `nearest`.
///
/// - `images`: `[batch, channel, height, width]`.
#[must_use]
pub fn nearest(images: ArrayView4<'_, f32>, [rows, columns]: [usize; 2]) -> Array4<f32> {
    let (_, _, height, width) = images.dim();
    let down = images.select(Axis(2), &places(height, rows));
    down.select(Axis(3), &places(width, columns))
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sides of pictures"
)]
fn places(from: usize, to: usize) -> Vec<usize> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|index| ((index as f32 * scale) as usize).min(from - 1))
        .collect()
}

/// The original's last step: `share` of the enhanced picture, the rest of the blurry one; not clamped.
///
/// - `enhanced`, `blurry`: `[batch, channel, height, width]`, the same shape.
#[must_use]
pub fn blend(
    enhanced: ArrayView4<'_, f32>,
    blurry: ArrayView4<'_, f32>,
    share: f32,
) -> Array4<f32> {
    Zip::from(enhanced)
        .and(blurry)
        .map_collect(|e, b| e * share + b * (1.0 - share))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn the_same_size_changes_nothing() {
        let image = array![[[[1.0_f32, 2.0], [3.0, 4.0]]]];
        assert_eq!(bilinear(image.view(), [2, 2]), image);
        assert_eq!(nearest(image.view(), [2, 2]), image);
    }

    #[test]
    fn twice_the_size_repeats_edges_and_mixes_between() {
        let image = array![[[[0.0_f32, 4.0]]]];
        assert_eq!(
            bilinear(image.view(), [1, 4]),
            array![[[[0.0, 1.0, 3.0, 4.0]]]]
        );
        assert_eq!(
            nearest(image.view(), [1, 4]),
            array![[[[0.0, 0.0, 4.0, 4.0]]]]
        );
    }
}
