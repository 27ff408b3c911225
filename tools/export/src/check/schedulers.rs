//! Few-step samplers against recorded runs of diffusers, step by step.
//!
//! A run keeps every draw and the latent after every step; its "network" is a formula, so that a
//! row says something about the sampler alone and is the same for every bundle.

use std::collections::{BTreeMap, VecDeque};

use bundle::EdmSchedule;
use decoder::SamplerError;
use decoder::sampler::{SigmaTable, ddim, euler, lcm, spacing, tcd};
use ndarray::{ArrayD, Axis};
use serde::Deserialize;

use super::golden::read_json;
use super::networks::as_floats;
use super::samplers::{floats, stack};
use super::{CheckError, Parity, Row, Rows, Tolerance, Vectors};

/// Single precision, a few operations per step; as a share of the largest value of the run, since
/// the levels reach 4096.
const STEPS: Tolerance = Tolerance::Close(4e-6);

/// Stable Diffusion's schedule, which all runs were recorded with.
const SCHEDULE: EdmSchedule = EdmSchedule {
    linear_start: 0.00085,
    linear_end: 0.012,
    steps: 1000,
};

#[derive(Deserialize)]
struct Recorded {
    runs: BTreeMap<String, Run>,
}

#[derive(Deserialize)]
struct Run {
    steps: usize,
    timesteps: Vec<f32>,
    class: String,
    config: Config,
    #[serde(default)]
    step_kwargs: StepSettings,
}

#[derive(Deserialize)]
struct Config {
    timestep_spacing: String,
    steps_offset: usize,
    rescale_betas_zero_snr: bool,
}

#[derive(Default, Deserialize)]
struct StepSettings {
    eta: Option<f64>,
}

impl Parity {
    pub(super) fn scheduler_rows(&self) -> Rows {
        let recorded: Option<Recorded> = read_json(&self.golden.join("io_schedulers.json"))?;
        let (Some(recorded), Some(vectors)) = (recorded, self.vectors("schedulers")?) else {
            return Ok(Vec::new());
        };
        let plain = SigmaTable::new(&SCHEDULE);
        let shifted = plain.with_zero_terminal_snr();
        let mut rows = Vec::new();
        for (name, run) in &recorded.runs {
            let table = if run.config.rescale_betas_zero_snr {
                &shifted
            } else {
                &plain
            };
            rows.extend(self.scheduler_run(name, run, table, &vectors)?);
        }
        Ok(rows)
    }

    fn scheduler_run(&self, name: &str, run: &Run, table: &SigmaTable, vectors: &Vectors) -> Rows {
        let failed = |source: SamplerError| CheckError::Sampler {
            sampler: "few-step",
            source,
        };
        let times = times(name, run, table.sigmas().len()).map_err(failed)?;
        let recorded = floats(&run.timesteps);
        let whole: Vec<i64> = times
            .iter()
            .map(|&time| i64::try_from(time).unwrap_or(-1))
            .collect();
        let quantity = format!("{name}, timesteps");
        let mut rows = vec![self.exact_row("schedulers", &quantity, &as_floats(&whole), &recorded)];

        let of = |what: &str| vectors.floats(&format!("{name}/{what}"));
        let (start, expected) = (of("x_init")?, of("x_per_step")?);
        let mut draws: VecDeque<ArrayD<f32>> = of("noise")
            .map(|draws| draws.axis_iter(Axis(0)).map(|draw| draw.to_owned()))
            .map(Iterator::collect)
            .unwrap_or_default();
        let mut network = |latent: &ArrayD<f32>, _: usize| Ok(latent * 0.1 + 0.05);
        // A draw too many shows as a difference.
        let mut draw = || {
            let none = || ArrayD::from_elem(start.raw_dim(), f32::NAN);
            draws.pop_front().unwrap_or_else(none)
        };
        let mut after = Vec::new();
        let mut watch = |_: usize, latent: &ArrayD<f32>| after.push(latent.clone());
        let first = start.clone();
        let sampled = match run.class.as_str() {
            "LCMScheduler" => {
                lcm::sample(table, &times, first, &mut network, &mut draw, &mut watch)
            }
            "TCDScheduler" => {
                let eta = run.step_kwargs.eta.unwrap_or(DEFAULT_TCD_ETA);
                tcd::sample(
                    table,
                    &times,
                    eta,
                    first,
                    &mut network,
                    &mut draw,
                    &mut watch,
                )
            }
            "EulerDiscreteScheduler" => {
                euler::sample(table, &times, first, &mut network, &mut watch)
            }
            "DDIMScheduler" => {
                let stride = table.sigmas().len() / run.steps.max(1);
                ddim::sample(table, &times, stride, first, &mut network, &mut watch)
            }
            other => {
                rows.push(Row::absent(
                    "schedulers",
                    format!("{name}: no sampler for {other}"),
                ));
                return Ok(rows);
            }
        };
        sampled.map_err(failed)?;
        let largest = |values: &ArrayD<f32>| values.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
        let scale = largest(start).max(largest(expected));
        let found = stack(&after) / scale;
        let row = self.fp32_row("schedulers", name, &found, &(expected / scale), STEPS);
        let left = draws.len();
        rows.push(if left == 0 {
            row
        } else {
            row.failed(&format!("{left} recorded draws were not used"))
        });
        Ok(rows)
    }
}

/// What diffusers takes where a run says nothing.
const DEFAULT_TCD_ETA: f64 = 0.3;

fn times(name: &str, run: &Run, len: usize) -> Result<Vec<usize>, SamplerError> {
    match (run.class.as_str(), run.config.timestep_spacing.as_str()) {
        ("LCMScheduler" | "TCDScheduler", _) => {
            // Strength is an argument of the call, which only the run's name keeps.
            let share = name.split_once("strength_").map(|(_, share)| share);
            let strength = share.and_then(|share| share.parse().ok()).unwrap_or(1.0);
            spacing::distilled(len, run.steps, strength)
        }
        (_, "leading") => spacing::leading(len, run.steps, run.config.steps_offset),
        _ => spacing::trailing(len, run.steps),
    }
}
