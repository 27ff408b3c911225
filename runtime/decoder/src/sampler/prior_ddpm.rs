//! Ancestral sampling of the diffusion prior, one call per timestep (Ho et al. 2020).
//!
//! The posterior's mean mixes the predicted clean tokens with the current ones; its variance is the
//! clipped one of the checkpoint. No noise is added at timestep 0.

use bundle::PriorTables;
use ndarray::ArrayD;

use super::{Network, NoiseSource, SamplerError, Watch, call};

/// Draws clean tokens.
///
/// - `start`: `[batch, token, dim]`, standard normal.
/// - `network`: tokens and timestep to predicted clean tokens.
/// - `noise`: drawn at every step but the last.
///
/// Returns `[batch, token, dim]`.
///
/// # Errors
/// [`SamplerError`] where the network fails.
pub fn sample(
    tables: &PriorTables,
    start: ArrayD<f32>,
    network: &mut Network<'_>,
    noise: &mut NoiseSource<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let mut tokens = start;
    for (step, time) in (0..tables.alphas_cumprod.len()).rev().enumerate() {
        let clean = call(network, &tokens, time, step)?;
        tokens =
            clean * tables.posterior_mean_coef1[time] + tokens * tables.posterior_mean_coef2[time];
        if time > 0 {
            let std_dev = (0.5 * tables.posterior_log_variance_clipped[time]).exp();
            tokens = tokens + noise() * std_dev;
        }
        watch(step, &tokens);
    }
    Ok(tokens)
}
