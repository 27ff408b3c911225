//! Euler's method over the sigmas of given timesteps, without guidance, as diffusers 0.31's
//! `EulerDiscreteScheduler`: what Lightning, Turbo and Hyper models are run with.

use ndarray::ArrayD;

use super::{Network, SamplerError, SigmaTable, Watch, call};

/// The noise level that a run starts from: what a standard normal latent is multiplied by.
///
/// # Errors
/// [`SamplerError`] where there are no timesteps or one is not of the table.
pub fn first_sigma(table: &SigmaTable, times: &[usize]) -> Result<f32, SamplerError> {
    match times.first() {
        Some(&time) => table.sigma(time),
        None => Err(SamplerError::Steps {
            steps: 0,
            limit: table.sigmas().len(),
        }),
    }
}

/// Draws a latent.
///
/// - `times`: timesteps, descending, from [`super::spacing`].
/// - `start`: `[batch, channel, height, width]`, standard normal times the first level.
/// - `network`: scaled latent and timestep to predicted noise.
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
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let mut latent = start;
    for (step, &time) in times.iter().enumerate() {
        let sigma = table.sigma(time)?;
        let next = match times.get(step + 1) {
            Some(&next) => table.sigma(next)?,
            None => 0.0,
        };
        let scaled = &latent / (sigma * sigma + 1.0).sqrt();
        let predicted = call(network, &scaled, time, step)?;
        latent = latent + predicted * (next - sigma);
        watch(step, &latent);
    }
    Ok(latent)
}
