//! Trajectory consistency sampling: as [`super::lcm`], with a part of the noise kept.
//!
//! Zheng et al. 2024 (arXiv:2402.19159) as in diffusers 0.31's `TCDScheduler`: each call goes to a
//! timestep below the next one, `(1 - eta)` of it, and fresh noise takes the sample back up.
//! Timesteps come from [`super::spacing::distilled`].

use ndarray::ArrayD;

use super::{Network, NoiseSource, SamplerError, SigmaTable, Watch, call, narrow};

/// Draws a latent.
///
/// - `times`: timesteps, descending.
/// - `eta`: share of fresh noise, 0 for none.
/// - `start`: `[batch, channel, height, width]`, standard normal.
/// - `network`: latent and timestep to predicted noise.
/// - `noise`: drawn between steps where `eta` is above 0.
///
/// Returns `[batch, channel, height, width]`, scaled as the network was trained.
///
/// # Errors
/// [`SamplerError`] where the network fails or a timestep is not of the table.
pub fn sample(
    table: &SigmaTable,
    times: &[usize],
    eta: f64,
    start: ArrayD<f32>,
    network: &mut Network<'_>,
    noise: &mut NoiseSource<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let mut latent = start;
    for (step, &time) in times.iter().enumerate() {
        let next = times.get(step + 1).copied();
        let alpha = table.alpha(time)?;
        let alpha_next = table.alpha(next.unwrap_or(0))?;
        let alpha_below = table.alpha(below(next.unwrap_or(0), eta))?;
        let predicted = call(network, &latent, time, step)?;
        let clean = (&latent - &(&predicted * narrow((1.0 - alpha).sqrt()))) / narrow(alpha.sqrt());
        latent =
            clean * narrow(alpha_below.sqrt()) + predicted * narrow((1.0 - alpha_below).sqrt());
        if eta > 0.0 && next.is_some() {
            let share = alpha_next / alpha_below;
            latent = latent * narrow(share.sqrt()) + noise() * narrow((1.0 - share).sqrt());
        }
        watch(step, &latent);
    }
    Ok(latent)
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "timesteps are small, and eta above 1 saturates at timestep 0"
)]
fn below(next: usize, eta: f64) -> usize {
    ((1.0 - eta) * next as f64).floor() as usize
}
