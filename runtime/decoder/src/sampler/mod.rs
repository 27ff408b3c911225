//! Samplers, one per file: plain functions over a network call and a source of noise.
//!
//! | Function | Network | Steps | Source |
//! |---|---|---|---|
//! | [`prior_ddim::sample`] | prior | 19 | DALLE2-pytorch, as MindEye2 calls it |
//! | [`prior_ddpm::sample`] | prior | 100 | Ho et al. 2020, arXiv:2006.11239 |
//! | [`euler_edm::sample`] | unCLIP | 38, guided | sgm; Karras et al. 2022, arXiv:2206.00364 |
//! | [`lcm::sample`] | unCLIP | 1 to 50 | Luo et al. 2023, arXiv:2310.04378; diffusers 0.31 |
//! | [`tcd::sample`] | unCLIP | 1 to 50 | Zheng et al. 2024, arXiv:2402.19159; diffusers 0.31 |
//! | [`euler::sample`] | unCLIP | few | `EulerDiscreteScheduler` of diffusers 0.31 |
//! | [`ddim::sample`] | unCLIP | few | `DDIMScheduler` of diffusers 0.31 |
//!
//! [`few_step::sample`] chooses among the last four, for pictures from noise or from a picture.

pub mod ddim;
pub mod euler;
pub mod euler_edm;
pub mod few_step;
pub mod lcm;
pub mod prior_ddim;
pub mod prior_ddpm;
mod sigmas;
pub mod spacing;
pub mod tcd;

use ndarray::ArrayD;

use crate::StageError;

pub use sigmas::{Sigma, SigmaTable};

/// Weight of the condition against its absence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuidanceScale(pub f32);

/// Why sampling stopped.
#[derive(Debug, thiserror::Error)]
pub enum SamplerError {
    /// A network call failed.
    #[error("the network call at step {step} failed")]
    Network {
        /// Step, from 0.
        step: usize,
        /// Why.
        source: StageError,
    },
    /// More steps than the schedule has.
    #[error("{steps} steps were asked for, the schedule allows 1 to {limit}")]
    Steps {
        /// Asked for.
        steps: usize,
        /// The most.
        limit: usize,
    },
    /// A timestep that the schedule does not have.
    #[error("timestep {time} is outside 0..{len}")]
    Time {
        /// The timestep.
        time: usize,
        /// Timesteps of the schedule.
        len: usize,
    },
    /// A network returned something of another shape.
    #[error("the network returned shape {found:?} at step {step}, expected {expected:?}")]
    Shape {
        /// Step, from 0.
        step: usize,
        /// Shape of the sample.
        expected: Vec<usize>,
        /// Shape returned.
        found: Vec<usize>,
    },
}

/// One network call: the sample and the timestep (a table index), batch 1 or more.
pub type Network<'n> = dyn FnMut(&ArrayD<f32>, usize) -> Result<ArrayD<f32>, StageError> + 'n;
/// Draws standard normal numbers in the shape of the sample.
pub type NoiseSource<'n> = dyn FnMut() -> ArrayD<f32> + 'n;
/// Sees the sample after each step.
pub type Watch<'n> = dyn FnMut(usize, &ArrayD<f32>) + 'n;

fn call(
    network: &mut Network<'_>,
    sample: &ArrayD<f32>,
    timestep: usize,
    step: usize,
) -> Result<ArrayD<f32>, SamplerError> {
    let result =
        network(sample, timestep).map_err(|source| SamplerError::Network { step, source })?;
    if result.shape() != sample.shape() {
        return Err(SamplerError::Shape {
            step,
            expected: sample.shape().to_vec(),
            found: result.shape().to_vec(),
        });
    }
    Ok(result)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "latents are single precision"
)]
fn narrow(value: f64) -> f32 {
    value as f32
}
