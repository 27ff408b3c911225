//! What the image tower expects: CLIP's normalisation.

use ndarray::{ArrayD, ArrayViewD, Axis};

/// Channel means and deviations of CLIP's training pictures.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD_DEV: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

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
