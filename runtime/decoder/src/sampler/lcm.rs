//! Latent consistency sampling: a handful of calls, no guidance pass.
//!
//! Luo et al. 2023 (arXiv:2310.04378) as in diffusers 0.31's `LCMScheduler` with its defaults: each
//! call predicts the clean latent, which is noised again to the next timestep. The last one stays.
//! Timesteps come from [`super::spacing::distilled`].

use ndarray::ArrayD;

use super::{Network, NoiseSource, SamplerError, SigmaTable, Watch, call, narrow};

/// Standard deviation of the data and scale of timesteps in the boundary condition.
const SIGMA_DATA: f64 = 0.5;
const TIMESTEP_SCALING: f64 = 10.0;

/// Draws a latent.
///
/// - `times`: timesteps, descending.
/// - `start`: `[batch, channel, height, width]`, standard normal.
/// - `network`: latent and timestep to predicted noise.
/// - `noise`: drawn between steps.
///
/// Returns `[batch, channel, height, width]`, scaled as the network was trained.
///
/// # Errors
/// [`SamplerError`] where the network fails or a timestep is not of the table.
pub fn sample(
    table: &SigmaTable,
    times: &[usize],
    start: ArrayD<f32>,
    network: &mut Network<'_>,
    noise: &mut NoiseSource<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let mut latent = start;
    for (step, &time) in times.iter().enumerate() {
        let alpha = table.alpha(time)?;
        let predicted = call(network, &latent, time, step)?;
        let clean = (&latent - &(predicted * narrow((1.0 - alpha).sqrt()))) / narrow(alpha.sqrt());
        let (skip, out) = boundary(time);
        let denoised = clean * narrow(out) + latent * narrow(skip);
        latent = match times.get(step + 1) {
            Some(&next) => {
                let alpha = table.alpha(next)?;
                denoised * narrow(alpha.sqrt()) + noise() * narrow((1.0 - alpha).sqrt())
            }
            None => denoised,
        };
        watch(step, &latent);
    }
    Ok(latent)
}

/// Weights of the sample itself and of the prediction.
#[expect(clippy::cast_precision_loss, reason = "timesteps are at most 100,000")]
fn boundary(time: usize) -> (f64, f64) {
    let scaled = time as f64 * TIMESTEP_SCALING;
    let total = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
    (SIGMA_DATA * SIGMA_DATA / total, scaled / total.sqrt())
}
