//! Latent consistency sampling: a handful of calls, no guidance pass.
//!
//! Luo et al. 2023 (arXiv:2310.04378) as in diffusers 0.31's `LCMScheduler` with its defaults: the
//! schedule is thinned to 50 training steps, of which a few are taken from the noisiest down; each
//! call predicts the clean latent, which is noised again to the next timestep. The last one stays.

use ndarray::ArrayD;

use super::{Network, NoiseSource, SamplerError, SigmaTable, Watch, call};

/// Steps of the schedule that consistency models are distilled on.
const TRAINED_STEPS: usize = 50;
/// Standard deviation of the data and scale of timesteps in the boundary condition.
const SIGMA_DATA: f64 = 0.5;
const TIMESTEP_SCALING: f64 = 10.0;

/// Timesteps of a run of `steps` calls, descending.
///
/// # Errors
/// [`SamplerError::Steps`] for none, more than 50, or more than the schedule has.
pub fn times(schedule_len: usize, steps: usize) -> Result<Vec<usize>, SamplerError> {
    let limit = TRAINED_STEPS.min(schedule_len);
    if steps == 0 || steps > limit {
        return Err(SamplerError::Steps { steps, limit });
    }
    let stride = schedule_len / limit;
    // The thinned schedule, noisiest first, then every (limit / steps)-th of it, rounded down.
    Ok((0..steps)
        .map(|index| (limit - index * limit / steps) * stride - 1)
        .collect())
}

/// Draws a latent.
///
/// - `start`: `[batch, channel, height, width]`, standard normal.
/// - `network`: latent and timestep to predicted noise.
/// - `noise`: drawn between steps, `steps - 1` times.
///
/// Returns `[batch, channel, height, width]`, scaled as the network was trained.
///
/// # Errors
/// [`SamplerError`] where the network fails or `steps` does not fit.
pub fn sample(
    table: &SigmaTable,
    steps: usize,
    start: ArrayD<f32>,
    network: &mut Network<'_>,
    noise: &mut NoiseSource<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let alphas = table.alphas_cumprod();
    let times = times(alphas.len(), steps)?;
    let mut latent = start;
    for (step, &time) in times.iter().enumerate() {
        let predicted = call(network, &latent, time, step)?;
        let alpha = alphas[time];
        let clean = (&latent - &(predicted * narrow((1.0 - alpha).sqrt()))) / narrow(alpha.sqrt());
        let (skip, out) = boundary(time);
        let denoised = clean * narrow(out) + latent * narrow(skip);
        latent = match times.get(step + 1) {
            Some(&next) => {
                let alpha = alphas[next];
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

#[expect(
    clippy::cast_possible_truncation,
    reason = "latents are single precision"
)]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timesteps_are_those_of_diffusers() {
        assert_eq!(times(1000, 1).unwrap(), [999]);
        assert_eq!(times(1000, 2).unwrap(), [999, 499]);
        assert_eq!(times(1000, 4).unwrap(), [999, 759, 499, 259]);
        assert_eq!(
            times(1000, 8).unwrap(),
            [999, 879, 759, 639, 499, 379, 259, 139]
        );
    }

    #[test]
    fn more_steps_than_were_trained_are_refused() {
        assert!(times(1000, 0).is_err());
        assert!(times(1000, 51).is_err());
    }
}
