//! Euler's method over a discrete EDM denoiser with guidance, as sgm samples MindEye2's unCLIP.
//!
//! 1. Start: `(z + (noise + level * offset) * sigma0) / sqrt(1 + sigma0²)`, times the same root.
//! 2. Denoise twice at each level, without and with the condition, and weigh the difference.
//! 3. Follow the slope `(x - denoised) / sigma` to the next level; the last level is zero.
//!
//! The denoiser snaps a level to the table, scales its input by `1 / sqrt(sigma² + 1)` and gives
//! the table's index to the network as timestep.

use bundle::Entrance;
use ndarray::{ArrayD, Axis};

use super::{GuidanceScale, Network, SamplerError, Sigma, SigmaTable, Watch, call};

/// The noise that a picture starts from.
#[derive(Clone, Debug)]
pub struct Start {
    /// `[batch, channel, height, width]`, standard normal: the original's random "image" latent.
    pub z: ArrayD<f32>,
    /// `[batch, channel, height, width]`, standard normal.
    pub noise: ArrayD<f32>,
    /// `[batch]`, standard normal, one per sample.
    pub offset: ArrayD<f32>,
    /// Share of `offset`.
    pub offset_level: f32,
}

impl Start {
    /// The sample at the first level.
    fn at(&self, sigma: Sigma) -> ArrayD<f32> {
        let per_sample = (1..self.noise.ndim()).fold(self.offset.clone(), |offset, axis| {
            offset.insert_axis(Axis(axis))
        });
        let noise = &self.noise + &(per_sample * self.offset_level);
        let root = (1.0 + sigma.0 * sigma.0).sqrt();
        (&self.z + &(noise * sigma.0)) / root * root
    }
}

/// The denoised sample at a level, without guidance.
///
/// - `network`: scaled sample and table index to predicted noise.
///
/// # Errors
/// [`SamplerError`] where the network fails.
pub fn denoise(
    table: &SigmaTable,
    sample: &ArrayD<f32>,
    sigma: Sigma,
    network: &mut Network<'_>,
    step: usize,
) -> Result<ArrayD<f32>, SamplerError> {
    let (level, index) = table.nearest(sigma);
    let scaled = sample * (1.0 / (level.0 * level.0 + 1.0).sqrt());
    let predicted = call(network, &scaled, index, step)?;
    Ok(predicted * -level.0 + sample)
}

/// Draws a latent.
///
/// - `steps`: levels taken from the table, at least 1.
/// - `conditioned`, `unconditioned`: scaled sample and table index to predicted noise; the second
///   is not called where guidance is 1.
/// - `watch`: sees the latent after every step.
///
/// Returns `[batch, channel, height, width]`, scaled as the network was trained.
///
/// # Errors
/// [`SamplerError`] where a network fails or `steps` does not fit the table.
pub fn sample(
    table: &SigmaTable,
    steps: usize,
    guidance: GuidanceScale,
    start: &Start,
    conditioned: &mut Network<'_>,
    unconditioned: &mut Network<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let limit = table.sigmas().len();
    if steps == 0 || steps > limit {
        return Err(SamplerError::Steps { steps, limit });
    }
    let levels = table.descending(steps);
    let latent = start.at(levels[0]);
    follow(
        table,
        &levels,
        guidance,
        latent,
        conditioned,
        unconditioned,
        watch,
    )
}

/// The levels of an image-to-image run, with the closing zero.
///
/// MindEye2's refiner keeps 13 of a run of 25, which are 12 steps. A share of the schedule means
/// what sgm's `Img2ImgDiscretizationWrapper` means by `strength`.
///
/// # Errors
/// [`SamplerError::Steps`] where fewer than two levels are kept or more than there are.
pub fn entered(
    table: &SigmaTable,
    steps: usize,
    entrance: Entrance,
) -> Result<Vec<Sigma>, SamplerError> {
    let limit = table.sigmas().len();
    let kept = match entrance {
        Entrance::Kept(kept) => kept as usize,
        Entrance::Strength(share) => share_of(steps + 1, share),
    };
    if steps == 0 || steps > limit || kept < 2 || kept > steps + 1 {
        return Err(SamplerError::Steps {
            steps: kept,
            limit: steps.min(limit) + 1,
        });
    }
    Ok(table.descending(steps).split_off(steps + 1 - kept))
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "levels are at most 100,001, and the manifest's shares are positive"
)]
fn share_of(levels: usize, share: f32) -> usize {
    // One level is the closing zero alone: no step. sgm would return the picture as it is.
    ((f64::from(share) * levels as f64) as usize).min(levels)
}

/// Draws a latent that begins as a picture's: noised to the first level, then followed down.
///
/// - `levels`: from [`entered`].
/// - `latent`: `[batch, channel, height, width]`, the picture's, scaled as the network was trained.
/// - `noise`: the same shape, standard normal.
///
/// The rest is as in [`sample`]. The original divides the noised latent by `sqrt(1 + sigma_max²)` and
/// its sampler multiplies it back; the two cancel and are left out.
///
/// # Errors
/// [`SamplerError`] where a network fails.
#[expect(
    clippy::too_many_arguments,
    reason = "a sampler's inputs, two networks among them"
)]
pub fn sample_from(
    table: &SigmaTable,
    levels: &[Sigma],
    guidance: GuidanceScale,
    latent: &ArrayD<f32>,
    noise: &ArrayD<f32>,
    conditioned: &mut Network<'_>,
    unconditioned: &mut Network<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let first = levels.first().map_or(0.0, |sigma| sigma.0);
    let start = latent + &(noise * first);
    follow(
        table,
        levels,
        guidance,
        start,
        conditioned,
        unconditioned,
        watch,
    )
}

/// Follows the slope from level to level.
fn follow(
    table: &SigmaTable,
    levels: &[Sigma],
    guidance: GuidanceScale,
    start: ArrayD<f32>,
    conditioned: &mut Network<'_>,
    unconditioned: &mut Network<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let mut latent = start;
    for (step, pair) in levels.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let mut denoised = denoise(table, &latent, sigma, conditioned, step)?;
        #[expect(clippy::float_cmp, reason = "exactly 1 means no second call")]
        if guidance.0 != 1.0 {
            let without = denoise(table, &latent, sigma, unconditioned, step)?;
            denoised = &without + &((denoised - &without) * guidance.0);
        }
        let slope = (&latent - &denoised) / sigma.0;
        latent = latent + slope * (next.0 - sigma.0);
        watch(step, &latent);
    }
    Ok(latent)
}
