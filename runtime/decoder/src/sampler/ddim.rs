//! DDIM without fresh noise over latents (Song et al. 2020, arXiv:2010.02502), as diffusers 0.31's
//! `DDIMScheduler` with `eta` 0: each call's prediction carries the sample a whole stride down.

use ndarray::ArrayD;

use super::{Network, SamplerError, SigmaTable, Watch, call, narrow};

/// Draws a latent.
///
/// - `times`: timesteps, descending, from [`super::spacing`].
/// - `stride`: timesteps from one step to the next: the schedule's length over the steps of the
///   whole run, also where the first of them are left out.
/// - `start`: `[batch, channel, height, width]`, standard normal.
/// - `network`: latent and timestep to predicted noise.
///
/// Returns `[batch, channel, height, width]`, scaled as the network was trained.
///
/// # Errors
/// [`SamplerError`] where the network fails or a timestep is not of the table.
pub fn sample(
    table: &SigmaTable,
    times: &[usize],
    stride: usize,
    start: ArrayD<f32>,
    network: &mut Network<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let mut latent = start;
    for (step, &time) in times.iter().enumerate() {
        let alpha = table.alpha(time)?;
        // Below the schedule the first timestep stands in (`set_alpha_to_one` is false).
        let alpha_next = table.alpha(time.saturating_sub(stride))?;
        let predicted = call(network, &latent, time, step)?;
        let clean = (&latent - &(&predicted * narrow((1.0 - alpha).sqrt()))) / narrow(alpha.sqrt());
        latent = clean * narrow(alpha_next.sqrt()) + predicted * narrow((1.0 - alpha_next).sqrt());
        watch(step, &latent);
    }
    Ok(latent)
}
