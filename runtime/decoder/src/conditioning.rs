//! The conditioning vector of SDXL-family networks: sinusoids of picture sizes.

/// Values that stand for one size in the released SDXL-family networks.
pub const SIZE_DIM: u64 = 256;

/// Embeds numbers as SDXL does: each becomes `dim` values, cosines first, then sines.
///
/// - `values`: sizes and crops in pixels, in the order of the network's conditioner.
/// - `dim`: values per number, even; 256 in the released models.
///
/// Returns `values.len() * dim` numbers. Source: sgm's `ConcatTimestepEmbedderND`.
#[must_use]
pub fn vector(values: &[f32], dim: u64) -> Vec<f32> {
    let half = dim / 2;
    let mut out = Vec::new();
    for &value in values {
        out.extend(angles(value, half).map(|angle| narrow(libm::cos(angle))));
        out.extend(angles(value, half).map(|angle| narrow(libm::sin(angle))));
    }
    out
}

#[expect(clippy::cast_precision_loss, reason = "half is a few hundred")]
fn angles(value: f32, half: u64) -> impl Iterator<Item = f64> {
    let max_period = 10_000_f64;
    (0..half).map(move |index| {
        let frequency = libm::exp(-libm::log(max_period) * index as f64 / half as f64);
        f64::from(value) * frequency
    })
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "single precision is what the network takes"
)]
fn narrow(value: f64) -> f32 {
    value as f32
}
