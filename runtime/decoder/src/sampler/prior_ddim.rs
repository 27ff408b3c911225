//! DDIM over the diffusion prior, exactly as MindEye2 samples it.
//!
//! Song et al. 2020 (arXiv:2010.02502) as written in DALLE2-pytorch, whose tables are read one step
//! early (`alphas_cumprod_prev` in place of `alphas_cumprod`): "20 steps of 100" are 19 calls at
//! 94, 89, … 4. The network predicts the clean tokens; the noise is recomputed from them.
//!
//! 1. Call the network at `t`.
//! 2. Recompute the noise with the tables at `t`.
//! 3. Step to the next `t`, with fresh noise weighed by `eta`; the last step returns the prediction.

use bundle::PriorSettings;
use ndarray::ArrayD;

use super::{Network, NoiseSource, SamplerError, Watch, call};

/// Timesteps of the network calls, descending.
///
/// - `timesteps`: length of the schedule.
/// - `steps`: sampling steps as the original counts them; there is one call fewer.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "timesteps are far below 2^24, and negative ones are dropped"
)]
pub fn times(timesteps: u32, steps: u32) -> Vec<usize> {
    // torch.linspace(-1, timesteps, steps + 1)[:-1] in single precision, from both ends.
    let count = steps as usize + 1;
    let (start, end) = (-1.0_f32, timesteps as f32);
    let step = (end - start) / steps as f32;
    let value = |index: usize| {
        if index < count / 2 {
            start + step * index as f32
        } else {
            end - step * (count - 1 - index) as f32
        }
    };
    let ascending = (0..steps as usize).map(|index| value(index) as i64);
    let mut times: Vec<usize> = ascending
        .filter(|&time| time >= 0)
        .map(|time| time as usize)
        .collect();
    times.reverse();
    times
}

/// Draws clean tokens.
///
/// - `steps`: sampling steps as the original counts them, one of the two the settings hold.
/// - `start`: `[batch, token, dim]`, standard normal.
/// - `network`: tokens and timestep to predicted clean tokens.
/// - `noise`: drawn at every step but the last, in order.
/// - `watch`: sees the tokens after every step.
///
/// Returns `[batch, token, dim]`.
///
/// # Errors
/// [`SamplerError`] where the network fails or there are no steps.
pub fn sample(
    settings: &PriorSettings,
    steps: u32,
    start: ArrayD<f32>,
    network: &mut Network<'_>,
    noise: &mut NoiseSource<'_>,
    watch: &mut Watch<'_>,
) -> Result<ArrayD<f32>, SamplerError> {
    let tables = &settings.tables;
    let limit = tables.alphas_cumprod_prev.len();
    let times = times(settings.timesteps, steps);
    if times.is_empty() || times.iter().any(|&time| time >= limit) {
        return Err(SamplerError::Steps {
            steps: steps as usize,
            limit,
        });
    }
    let alphas = &tables.alphas_cumprod_prev;
    let mut tokens = start;
    for (step, &time) in times.iter().enumerate() {
        let clean = call(network, &tokens, time, step)?;
        let Some(&next) = times.get(step + 1) else {
            watch(step, &clean);
            return Ok(clean);
        };
        let (recip, recipm1) = (
            tables.sqrt_recip_alphas_cumprod[time],
            tables.sqrt_recipm1_alphas_cumprod[time],
        );
        let predicted = (&tokens * recip - &clean) / recipm1;
        let (alpha, alpha_next) = (alphas[time], alphas[next]);
        let fresh =
            settings.eta * ((1.0 - alpha / alpha_next) * (1.0 - alpha_next) / (1.0 - alpha)).sqrt();
        let kept = ((1.0 - alpha_next) - fresh * fresh).sqrt();
        tokens = clean * alpha_next.sqrt() + predicted * kept;
        // The original draws none on the way to timestep 0, where alpha_next is 1.
        if next > 0 {
            tokens = tokens + noise() * fresh;
        }
        watch(step, &tokens);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twenty_of_a_hundred_are_nineteen_calls() {
        let expected: Vec<usize> = (0..19).map(|index| 94 - 5 * index).collect();
        assert_eq!(times(100, 20), expected);
    }

    #[test]
    fn one_step_of_a_schedule_has_no_call() {
        assert_eq!(times(100, 1), Vec::<usize>::new());
    }
}
