//! One door to the samplers of distilled networks: a handful of calls, none without the condition.
//!
//! 1. Space the timesteps as the method was distilled ([`super::spacing`]).
//! 2. Enter them at the start, from pure noise, or further down, from a picture's latent noised to
//!    the first timestep that is left.
//! 3. Sample.

use bundle::{EdgeSettings, Entrance, FewStepSampler};
use ndarray::ArrayD;

use super::{
    Network, NoiseSource, SamplerError, SigmaTable, Watch, ddim, euler, lcm, narrow, spacing, tcd,
};

/// What a run begins with.
#[derive(Clone, Copy, Debug)]
pub enum Start<'s> {
    /// Pure noise: the whole schedule is run.
    Noise,
    /// A picture.
    Latent {
        /// `[batch, channel, height, width]`, scaled as the network was trained.
        latent: &'s ArrayD<f32>,
        /// Where the schedule is entered.
        entrance: Entrance,
    },
}

/// Timesteps of a run, descending.
///
/// A share of the schedule means what diffusers 0.31 means by `strength`: consistency models space
/// all their steps over the share that is left, the trailing methods leave out the first steps.
///
/// # Errors
/// [`SamplerError::Steps`] where the schedule does not have as many steps.
pub fn times(
    table: &SigmaTable,
    settings: &EdgeSettings,
    entrance: Option<Entrance>,
) -> Result<Vec<usize>, SamplerError> {
    let (len, steps) = (table.sigmas().len(), settings.steps as usize);
    let distilled = matches!(settings.sampler, FewStepSampler::Lcm | FewStepSampler::Tcd);
    if let (true, Some(Entrance::Strength(share))) = (distilled, entrance) {
        return spacing::distilled(len, steps, f64::from(share));
    }
    let mut times = if distilled {
        spacing::distilled(len, steps, 1.0)?
    } else {
        spacing::trailing(len, steps)?
    };
    let kept = match entrance {
        None => steps,
        Some(Entrance::Kept(kept)) => kept as usize,
        Some(Entrance::Strength(share)) => share_of(steps, share),
    };
    if kept == 0 || kept > steps {
        return Err(SamplerError::Steps {
            steps: kept,
            limit: steps,
        });
    }
    Ok(times.split_off(steps - kept))
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at most 50 steps, and the manifest's shares are positive"
)]
fn share_of(steps: usize, share: f32) -> usize {
    ((steps as f64 * f64::from(share)) as usize).min(steps)
}

/// Draws a latent.
///
/// - `start`: pure noise, or a picture's latent.
/// - `network`: scaled latent and timestep to predicted noise.
/// - `noise`: the first draw starts the run, later ones are the method's own between steps.
///
/// Returns `[batch, channel, height, width]`, scaled as the network was trained, and the number of
/// network calls.
///
/// # Errors
/// [`SamplerError`] where the network fails or the schedule does not have as many steps.
pub fn sample(
    table: &SigmaTable,
    settings: &EdgeSettings,
    start: Start<'_>,
    network: &mut Network<'_>,
    noise: &mut NoiseSource<'_>,
    watch: &mut Watch<'_>,
) -> Result<(ArrayD<f32>, usize), SamplerError> {
    let times = times(
        table,
        settings,
        match start {
            Start::Noise => None,
            Start::Latent { entrance, .. } => Some(entrance),
        },
    )?;
    let fresh = noise();
    let euler = settings.sampler == FewStepSampler::EulerTrailing;
    let first = match start {
        Start::Noise if euler => fresh * euler::first_sigma(table, &times)?,
        Start::Noise => fresh,
        Start::Latent { latent, .. } if euler => {
            latent + &(fresh * euler::first_sigma(table, &times)?)
        }
        Start::Latent { latent, .. } => {
            let alpha = table.alpha(times.first().copied().unwrap_or(0))?;
            latent * narrow(alpha.sqrt()) + fresh * narrow((1.0 - alpha).sqrt())
        }
    };
    let latent = match settings.sampler {
        FewStepSampler::Lcm => lcm::sample(table, &times, first, network, noise, watch),
        FewStepSampler::Tcd => {
            let eta = f64::from(settings.eta);
            tcd::sample(table, &times, eta, first, network, noise, watch)
        }
        FewStepSampler::EulerTrailing => euler::sample(table, &times, first, network, watch),
        FewStepSampler::DdimTrailing => {
            let stride = table.sigmas().len() / (settings.steps as usize).max(1);
            ddim::sample(table, &times, stride, first, network, watch)
        }
    }?;
    Ok((latent, times.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bundle::EdmSchedule;
    use ndarray::IxDyn;

    const ALL: [FewStepSampler; 4] = [
        FewStepSampler::Lcm,
        FewStepSampler::Tcd,
        FewStepSampler::EulerTrailing,
        FewStepSampler::DdimTrailing,
    ];

    fn table() -> SigmaTable {
        SigmaTable::new(&EdmSchedule {
            linear_start: 0.00085,
            linear_end: 0.012,
            steps: 1000,
        })
    }

    fn settings(sampler: FewStepSampler, steps: u32) -> EdgeSettings {
        EdgeSettings {
            sampler,
            steps,
            eta: 0.3,
        }
    }

    #[test]
    fn entrance_by_step_keeps_the_end_of_the_schedule() {
        let kept = |sampler, kept| {
            times(&table(), &settings(sampler, 4), Some(Entrance::Kept(kept))).unwrap()
        };
        assert_eq!(kept(FewStepSampler::Lcm, 2), [499, 259]);
        assert_eq!(kept(FewStepSampler::EulerTrailing, 3), [749, 499, 249]);
    }

    #[test]
    fn entrance_by_strength_is_that_of_diffusers() {
        let share = |sampler, share| {
            let entrance = Entrance::Strength(share);
            times(&table(), &settings(sampler, 4), Some(entrance)).unwrap()
        };
        assert_eq!(share(FewStepSampler::Tcd, 0.6), [599, 459, 299, 159]);
        assert_eq!(share(FewStepSampler::DdimTrailing, 0.6), [499, 249]);
    }

    #[test]
    fn a_strength_that_leaves_no_step_is_refused() {
        let entrance = Some(Entrance::Strength(0.1));
        for sampler in ALL {
            assert!(times(&table(), &settings(sampler, 9), entrance).is_err());
        }
    }

    /// A network that knows the clean latent predicts exactly the noise that was put on it; every
    /// method then ends at the clean latent, from noise and from a picture alike.
    #[test]
    fn a_perfect_network_leads_every_method_to_the_clean_latent() {
        let table = table();
        let clean = ArrayD::from_shape_fn(IxDyn(&[1, 2, 3, 3]), |at| {
            f32::from(u8::try_from(at[1] * 9 + at[2] * 3 + at[3]).unwrap()) * 0.1 - 0.8
        });
        for sampler in ALL {
            let starts = [
                Start::Noise,
                Start::Latent {
                    latent: &clean,
                    entrance: Entrance::Kept(3),
                },
            ];
            for start in starts {
                let mut seed = 0.0_f32;
                let mut calls = 0;
                let (found, steps) = sample(
                    &table,
                    &settings(sampler, 4),
                    start,
                    &mut |sample, time| {
                        calls += 1;
                        let alpha = table.alpha(time).unwrap();
                        let (a, b) = (narrow(alpha.sqrt()), narrow((1.0 - alpha).sqrt()));
                        // Euler's input arrives scaled to the same variance as the others'.
                        Ok((sample - &(&clean * a)) / b)
                    },
                    &mut || {
                        seed += 1.0;
                        clean.mapv(|value| (value * 7.0 + seed).sin())
                    },
                    &mut |_, _| {},
                )
                .unwrap();
                assert_eq!(calls, steps);
                let worst = (&found - &clean)
                    .iter()
                    .fold(0.0_f32, |w, v| w.max(v.abs()));
                // LCM's boundary condition and the schedules' last level leave a little noise.
                let allowed = match sampler {
                    FewStepSampler::DdimTrailing | FewStepSampler::Tcd => 0.1,
                    _ => 2e-3,
                };
                assert!(worst < allowed, "{sampler:?} {start:?}: {worst}");
            }
        }
    }
}
