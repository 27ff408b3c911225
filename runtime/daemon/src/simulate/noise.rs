//! What makes a volume differ from the one before though nobody moved and nothing was shown.
//!
//! - the scanner's thermal noise: independent at every voxel, in both channels, so that the
//!   magnitude is Rician (Gudbjartsson and Patz 1995);
//! - the body's noise: proportional to the voxel's brightness, smooth in space, autoregressive of
//!   first order in time;
//! - the scanner's drift: slow, the same share of every voxel's brightness.
//!
//! All numbers are drawn by purpose, series and volume, never in the order in which they are
//! needed: a volume that a fault touches leaves every other one as it was.

use decoder::{Noise, NoiseKey, Stream, Tier};
use ndarray::Array3;
use sha2::{Digest, Sha256};

/// What numbers are drawn for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// The responses of a subject that has none.
    Betas,
    /// The way of a head that is never quite still.
    Motion,
    /// The body's noise.
    Body,
    /// The scanner's noise.
    Thermal,
    /// The drift's phases.
    Drift,
    /// Which volumes and pulses a fault hits, and how.
    Fault(u32),
}

impl Purpose {
    fn number(self) -> u32 {
        match self {
            Purpose::Betas => 1,
            Purpose::Motion => 2,
            Purpose::Body => 3,
            Purpose::Thermal => 4,
            Purpose::Drift => 5,
            Purpose::Fault(which) => 16 + which,
        }
    }
}

/// Standard normal numbers for one purpose in one volume of one series.
pub(super) fn normals(seed: u64, purpose: Purpose, series: usize, volume: usize) -> Noise {
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let key = NoiseKey {
        session_seed: seed,
        run: purpose.number() | number(series) << 8,
        trial: number(volume),
        tier: Tier::Fast,
    };
    Noise::new(key, Stream::Prior)
}

/// A number from 0 to 1, 1 excluded, for one purpose and one place in its sequence.
#[expect(clippy::cast_precision_loss, reason = "53 bits are exact in f64")]
pub(super) fn uniform(seed: u64, purpose: Purpose, index: usize) -> f64 {
    let mut hash = Sha256::new();
    hash.update(b"afterimage simulator 1");
    hash.update(seed.to_le_bytes());
    hash.update(purpose.number().to_le_bytes());
    hash.update((index as u64).to_le_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.finalize()[..8]);
    (u64::from_le_bytes(bytes) >> 11) as f64 / (1_u64 << 53) as f64
}

/// How strong each kind of noise is.
#[derive(Clone, Debug)]
pub(super) struct NoiseSettings {
    /// Scanner units, standard deviation in each channel.
    pub(super) thermal: f32,
    /// Share of a voxel's brightness, standard deviation.
    pub(super) body: f32,
    /// Correlation of the body's noise from one volume to the next.
    pub(super) ar1: f32,
    /// Smoothness of the body's noise: standard deviation of the kernel along slices, rows and
    /// columns, voxels.
    pub(super) std_dev_voxels: [f64; 3],
    /// Largest drift, share of a voxel's brightness.
    pub(super) drift: f64,
}

/// A smooth image that hangs together in time; every voxel has mean 0 and variance 1.
pub(super) struct BodyNoise {
    ar1: f32,
    kernels: [Vec<f32>; 3],
    /// `[slice, row, column]`, of the volume before.
    state: Option<Array3<f32>>,
}

impl BodyNoise {
    pub(super) fn new(settings: &NoiseSettings) -> BodyNoise {
        BodyNoise {
            ar1: settings.ar1,
            kernels: settings.std_dev_voxels.map(kernel),
            state: None,
        }
    }

    /// The next volume's noise.
    pub(super) fn next(&mut self, shape: [usize; 3], noise: &mut Noise) -> &Array3<f32> {
        let count = shape.iter().product();
        let white: Vec<f32> = noise.draw(&[count]).into_iter().collect();
        let mut fresh = Array3::from_shape_vec(shape, white).unwrap_or_default();
        for (axis, kernel) in self.kernels.iter().enumerate() {
            blur(&mut fresh, axis, kernel);
        }
        let state = match self.state.take() {
            None => fresh,
            Some(mut state) => {
                let (old, new) = (self.ar1, (1.0 - self.ar1 * self.ar1).sqrt());
                state.zip_mut_with(&fresh, |state, fresh| *state = old * *state + new * fresh);
                state
            }
        };
        self.state.insert(state)
    }
}

/// A Gaussian whose squares sum to one: it keeps the variance of white noise.
fn kernel(std_dev: f64) -> Vec<f32> {
    let mut radius = 0;
    while f64::from(radius) < 3.0 * std_dev {
        radius += 1;
    }
    let weight = |offset: i32| {
        if std_dev > 0.0 {
            (-0.5 * (f64::from(offset) / std_dev).powi(2)).exp()
        } else {
            1.0
        }
    };
    let weights: Vec<f64> = (-radius..=radius).map(weight).collect();
    let length: f64 = weights.iter().map(|w| w * w).sum::<f64>().sqrt();
    weights
        .iter()
        .map(|weight| single(weight / length))
        .collect()
}

/// Blurs along one axis, round the ends: the variance is then the same everywhere.
fn blur(values: &mut Array3<f32>, axis: usize, kernel: &[f32]) {
    if kernel.len() < 2 {
        return;
    }
    let (radius, side) = (kernel.len() / 2, values.shape()[axis]);
    let inner: usize = values.shape()[axis + 1..].iter().product();
    let Some(all) = values.as_slice_mut() else {
        return;
    };
    let mut block = vec![0.0_f32; side * inner];
    for values in all.chunks_exact_mut(side * inner) {
        block.copy_from_slice(values);
        for (place, line) in values.chunks_exact_mut(inner).enumerate() {
            line.fill(0.0);
            for (offset, weight) in kernel.iter().enumerate() {
                // A kernel wider than the axis goes round more than once.
                let from = (place + offset + side * radius - radius) % side;
                let source = &block[from * inner..(from + 1) * inner];
                for (value, source) in line.iter_mut().zip(source) {
                    *value += weight * source;
                }
            }
        }
    }
}

/// The drift of a run, `[volume]`, share of its largest: from -1 to 1, 0 at the first volume.
pub(super) fn drift(seed: u64, series: usize, volumes: usize, tr_s: f64) -> Vec<f64> {
    let draw = |index: usize| uniform(seed, Purpose::Drift, series * 8 + index);
    let slope = if draw(0) < 0.5 { -1.0 } else { 1.0 };
    // Slower than any high-pass of the field: 0.005 Hz and below.
    let period_s = 200.0 + 100.0 * draw(1);
    let phase = std::f64::consts::TAU * draw(2);
    let wave = |time_s: f64| (std::f64::consts::TAU * time_s / period_s + phase).sin();
    #[expect(clippy::cast_precision_loss, reason = "a run of minutes")]
    let time_s = |volume: usize| volume as f64 * tr_s;
    let end_s = time_s(volumes.max(2) - 1).max(period_s);
    (0..volumes)
        .map(time_s)
        .map(|time_s| 0.5 * slope * time_s / end_s + 0.25 * (wave(time_s) - wave(0.0)))
        .collect()
}

/// Adds thermal noise as a magnitude image shows it, and rounds as a scanner stores it.
///
/// Values beyond `most` are cut there.
pub(super) fn receive(values: &mut Array3<f32>, thermal: f32, most: f32, noise: &mut Noise) {
    if thermal <= 0.0 {
        values.mapv_inplace(|value| value.round().clamp(0.0, most));
        return;
    }
    let draws = noise.draw(&[values.len(), 2]);
    let draws = draws.as_slice().unwrap_or_default();
    for (value, pair) in values.iter_mut().zip(draws.chunks_exact(2)) {
        let (real, imaginary) = (*value + thermal * pair[0], thermal * pair[1]);
        *value = (real * real + imaginary * imaginary)
            .sqrt()
            .round()
            .clamp(0.0, most);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "volumes are kept in single precision"
)]
pub(super) fn single(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: [usize; 3] = [8, 12, 14];

    fn settings() -> NoiseSettings {
        NoiseSettings {
            thermal: 5.0,
            body: 0.01,
            ar1: 0.6,
            std_dev_voxels: [0.8, 1.1, 1.1],
            drift: 0.01,
        }
    }

    /// Of all voxels of many volumes, `[volume]` each.
    fn run(volumes: usize) -> Vec<Array3<f32>> {
        let mut body = BodyNoise::new(&settings());
        (0..volumes)
            .map(|volume| {
                let mut noise = normals(3, Purpose::Body, 0, volume);
                body.next(SHAPE, &mut noise).clone()
            })
            .collect()
    }

    fn mean_product(pairs: impl Iterator<Item = (f32, f32)>) -> f64 {
        let (mut sum, mut count) = (0.0, 0.0);
        for (a, b) in pairs {
            sum += f64::from(a) * f64::from(b);
            count += 1.0;
        }
        sum / count
    }

    #[test]
    fn body_noise_has_unit_variance_and_hangs_together_in_time_and_space() {
        let volumes = run(60);
        let all = |lag: usize| {
            let pairs = volumes.iter().zip(&volumes[lag..]);
            mean_product(pairs.flat_map(|(a, b)| a.iter().copied().zip(b.iter().copied())))
        };
        assert!((all(0) - 1.0).abs() < 0.05, "variance {}", all(0));
        assert!((all(1) - 0.6).abs() < 0.05, "lag 1: {}", all(1));
        assert!((all(2) - 0.36).abs() < 0.05, "lag 2: {}", all(2));
        let beside = volumes.iter().flat_map(|volume| {
            let rows = volume.lanes(ndarray::Axis(2)).into_iter();
            rows.flat_map(|row| {
                row.to_vec()
                    .windows(2)
                    .map(|w| (w[0], w[1]))
                    .collect::<Vec<_>>()
            })
        });
        // A Gaussian kernel's own correlation at distance d is exp(-d^2 / 4 sd^2).
        let expected = (-1.0 / (4.0 * 1.1_f64 * 1.1)).exp();
        let found = mean_product(beside);
        assert!((found - expected).abs() < 0.05, "{found} and {expected}");
    }

    #[test]
    fn blur_equals_a_plain_circular_convolution() {
        let mut noise = normals(1, Purpose::Body, 0, 0);
        let flat: Vec<f32> = noise.draw(&[3 * 4 * 5]).into_iter().collect();
        let values = Array3::from_shape_vec((3, 4, 5), flat).unwrap();
        for axis in 0..3 {
            let kernel = kernel(1.3);
            let mut blurred = values.clone();
            blur(&mut blurred, axis, &kernel);
            let radius = i32::try_from(kernel.len() / 2).unwrap();
            let side = i32::try_from(values.shape()[axis]).unwrap();
            for ((k, j, i), found) in blurred.indexed_iter() {
                let mut sum = 0.0;
                for offset in -radius..=radius {
                    let mut at = [k, j, i];
                    let place = i32::try_from(at[axis]).unwrap() + offset;
                    at[axis] = usize::try_from(place.rem_euclid(side)).unwrap();
                    sum += values[at] * kernel[usize::try_from(offset + radius).unwrap()];
                }
                assert!((found - sum).abs() < 1e-4, "axis {axis}");
            }
        }
    }

    #[test]
    fn air_is_rayleigh_and_bright_voxels_are_gaussian() {
        let mut noise = normals(2, Purpose::Thermal, 0, 0);
        let mut air = Array3::zeros((20, 40, 40));
        receive(&mut air, 50.0, 65_535.0, &mut noise);
        let mean = f64::from(air.sum()) / 32_000.0;
        // Of a Rayleigh distribution: sigma times sqrt(pi / 2).
        assert!((mean - 62.67).abs() < 1.0, "{mean}");
        let mut bright = Array3::from_elem((20, 40, 40), 4000.0);
        receive(&mut bright, 50.0, 65_535.0, &mut noise);
        let centred = bright.mapv(|value| f64::from(value) - 4000.0);
        let spread = (centred.mapv(|v| v * v).sum() / 32_000.0).sqrt();
        assert!((spread - 50.0).abs() < 1.0, "{spread}");
        let mut cut = Array3::from_elem((1, 1, 2), 9000.0);
        receive(&mut cut, 0.0, 4095.0, &mut noise);
        assert_eq!(cut.iter().copied().collect::<Vec<_>>(), [4095.0, 4095.0]);
    }

    #[test]
    fn drift_begins_at_nothing_and_stays_within_its_size() {
        for seed in 0..40 {
            let drift = drift(seed, 0, 300, 1.5);
            assert!(drift[0].abs() < 1e-12);
            assert!(drift.iter().all(|value| value.abs() <= 1.0));
            let step = drift.windows(2).map(|w| (w[1] - w[0]).abs());
            assert!(step.fold(0.0, f64::max) < 0.02);
        }
    }

    #[test]
    fn uniform_numbers_fill_their_range_and_repeat() {
        let draws: Vec<f64> = (0..4000)
            .map(|i| uniform(9, Purpose::Fault(1), i))
            .collect();
        let mean = draws.iter().sum::<f64>() / 4000.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        assert_eq!(
            draws[7].to_bits(),
            uniform(9, Purpose::Fault(1), 7).to_bits()
        );
        assert!((draws[7] - uniform(9, Purpose::Fault(2), 7)).abs() > 1e-9);
    }
}
