//! Constants and schedules of the samplers, with the ranges they must keep.

use serde::{Deserialize, Serialize};

use super::{MAX_TABLE, ManifestError, field_error, positive};

/// Constants of the blurry picture.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlurrySettings {
    /// The blurry latent is divided by this before decoding; 0.18215 in the released models.
    pub latent_scale: f32,
}

/// Constants and noise schedule of the diffusion prior.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriorSettings {
    /// CLIP image tokens.
    pub tokens: u64,
    /// Channels of a token.
    pub dim: u64,
    /// Training timesteps, the length of each table.
    pub timesteps: u32,
    /// Sampling steps of the `reference` fidelity.
    pub sampling_steps: u32,
    /// DDIM noise share, 1 in the original.
    pub eta: f32,
    /// Condition weight, 1 in the original.
    pub cond_scale: f32,
    /// Noise schedule as stored in the checkpoint.
    pub tables: PriorTables,
}

/// The prior's noise schedule, `[timesteps]` each, as stored in the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriorTables {
    /// Cumulative product of 1 - beta.
    pub alphas_cumprod: Vec<f32>,
    /// The same one step earlier, 1 at the start.
    pub alphas_cumprod_prev: Vec<f32>,
    /// `sqrt(1 / alphas_cumprod)`.
    pub sqrt_recip_alphas_cumprod: Vec<f32>,
    /// `sqrt(1 / alphas_cumprod - 1)`.
    pub sqrt_recipm1_alphas_cumprod: Vec<f32>,
    /// Weight of the predicted start in the posterior mean.
    pub posterior_mean_coef1: Vec<f32>,
    /// Weight of the current sample in the posterior mean.
    pub posterior_mean_coef2: Vec<f32>,
    /// Logarithm of the posterior variance, clipped below.
    pub posterior_log_variance_clipped: Vec<f32>,
}

impl PriorTables {
    /// The tables with their names in the checkpoint.
    #[must_use]
    pub fn named(&self) -> [(&'static str, &[f32]); 7] {
        [
            ("alphas_cumprod", &self.alphas_cumprod),
            ("alphas_cumprod_prev", &self.alphas_cumprod_prev),
            ("sqrt_recip_alphas_cumprod", &self.sqrt_recip_alphas_cumprod),
            (
                "sqrt_recipm1_alphas_cumprod",
                &self.sqrt_recipm1_alphas_cumprod,
            ),
            ("posterior_mean_coef1", &self.posterior_mean_coef1),
            ("posterior_mean_coef2", &self.posterior_mean_coef2),
            (
                "posterior_log_variance_clipped",
                &self.posterior_log_variance_clipped,
            ),
        ]
    }
}

/// Constants of the unCLIP sampler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnclipSettings {
    /// Latent channels.
    pub latent_channels: u64,
    /// Latent rows.
    pub latent_height: u64,
    /// Latent columns.
    pub latent_width: u64,
    /// Latents are divided by this before decoding.
    pub scale_factor: f32,
    /// Weight of the condition in the `reference` fidelity.
    pub guidance: f32,
    /// Euler steps of the `reference` fidelity.
    pub steps: u32,
    /// Share of per-sample offset noise in the start.
    pub offset_noise: f32,
    /// Conditioning vector of the UNet, `[adm]`: sinusoids of the picture sizes.
    pub vector: Vec<f32>,
    /// Noise levels.
    pub schedule: EdmSchedule,
    /// Picture = clamp(`image_scale` * decoded + `image_shift`, 0, 1).
    pub image_scale: f32,
    /// See `image_scale`.
    pub image_shift: f32,
    /// The few-step fidelity.
    pub edge: EdgeSettings,
}

/// The discrete sigma table: square-root-linear betas of latent diffusion.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdmSchedule {
    /// First beta.
    pub linear_start: f64,
    /// Last beta.
    pub linear_end: f64,
    /// Table length.
    pub steps: u32,
}

/// The few-step sampler of the `edge` fidelity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSettings {
    /// LCM steps.
    pub steps: u32,
}

impl PriorSettings {
    pub(super) fn validate(&self) -> Result<(), ManifestError> {
        let expected = usize::try_from(self.timesteps).unwrap_or(usize::MAX);
        if !(2..=MAX_TABLE).contains(&expected) {
            return Err(field_error(
                "prior.timesteps",
                format!("2..={MAX_TABLE}"),
                self.timesteps,
            ));
        }
        if !(1..=self.timesteps).contains(&self.sampling_steps) {
            return Err(field_error(
                "prior.sampling_steps",
                format!("1..={}", self.timesteps),
                self.sampling_steps,
            ));
        }
        for (name, table) in self.tables.named() {
            if table.len() != expected {
                return Err(field_error(
                    format!("prior.tables.{name}"),
                    format!("{expected} values"),
                    table.len(),
                ));
            }
            if let Some(bad) = table.iter().find(|value| !value.is_finite()) {
                return Err(field_error(
                    format!("prior.tables.{name}"),
                    "finite values",
                    bad,
                ));
            }
        }
        if !self.eta.is_finite() || self.eta < 0.0 {
            return Err(field_error("prior.eta", "0 or more", self.eta));
        }
        if !self.cond_scale.is_finite() {
            return Err(field_error(
                "prior.cond_scale",
                "a finite number",
                self.cond_scale,
            ));
        }
        Ok(())
    }
}

impl UnclipSettings {
    pub(super) fn validate(&self) -> Result<(), ManifestError> {
        for (name, value) in [
            ("latent_channels", self.latent_channels),
            ("latent_height", self.latent_height),
            ("latent_width", self.latent_width),
        ] {
            if !(1..=4096).contains(&value) {
                return Err(field_error(format!("unclip.{name}"), "1..=4096", value));
            }
        }
        positive("unclip.scale_factor", self.scale_factor)?;
        for (name, value) in [
            ("guidance", self.guidance),
            ("offset_noise", self.offset_noise),
            ("image_scale", self.image_scale),
            ("image_shift", self.image_shift),
        ] {
            if !value.is_finite() {
                return Err(field_error(
                    format!("unclip.{name}"),
                    "a finite number",
                    value,
                ));
            }
        }
        if self.vector.len() > MAX_TABLE || self.vector.iter().any(|value| !value.is_finite()) {
            return Err(field_error(
                "unclip.vector",
                format!("at most {MAX_TABLE} finite values"),
                self.vector.len(),
            ));
        }
        let schedule = &self.schedule;
        let ordered = schedule.linear_start > 0.0
            && schedule.linear_end > schedule.linear_start
            && schedule.linear_end < 1.0;
        if !ordered {
            return Err(field_error(
                "unclip.schedule",
                "0 < linear_start < linear_end < 1",
                format!("{} and {}", schedule.linear_start, schedule.linear_end),
            ));
        }
        if !(2..=100_000).contains(&schedule.steps) {
            return Err(field_error(
                "unclip.schedule.steps",
                "2..=100000",
                schedule.steps,
            ));
        }
        for (name, value) in [("steps", self.steps), ("edge.steps", self.edge.steps)] {
            if !(1..=schedule.steps).contains(&value) {
                return Err(field_error(
                    format!("unclip.{name}"),
                    format!("1..={}", schedule.steps),
                    value,
                ));
            }
        }
        Ok(())
    }
}
