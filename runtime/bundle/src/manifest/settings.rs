//! Constants and schedules of the samplers, with the ranges they must keep.

use serde::{Deserialize, Serialize};

use super::{MAX_TABLE, ManifestError, field_error, positive};

/// Consistency models are distilled on a schedule of 50 steps.
const MAX_EDGE_STEPS: u32 = 50;
const MAX_SIZES: usize = 64;
const MAX_PROMPT_BYTES: usize = 4096;

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
    /// Sampling steps of the `reference` fidelity; the original counts one more than it calls.
    pub sampling_steps: u32,
    /// Sampling steps of the `edge` fidelity, counted the same way.
    pub edge_steps: u32,
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSettings {
    /// The method the weights were distilled for.
    pub sampler: FewStepSampler,
    /// Steps of its schedule, 1 to 50.
    pub steps: u32,
    /// Share of fresh noise in [`FewStepSampler::Tcd`], 0 to 1; the others take none.
    pub eta: f32,
}

/// How a distilled network is sampled in a few calls, without a guidance pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FewStepSampler {
    /// Latent consistency.
    Lcm,
    /// Trajectory consistency.
    Tcd,
    /// Euler's method from the noisiest timestep: Lightning, Turbo, Hyper.
    EulerTrailing,
    /// DDIM from the noisiest timestep.
    DdimTrailing,
}

impl FewStepSampler {
    /// The name in manifests, recipes and reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            FewStepSampler::Lcm => "lcm",
            FewStepSampler::Tcd => "tcd",
            FewStepSampler::EulerTrailing => "euler_trailing",
            FewStepSampler::DdimTrailing => "ddim_trailing",
        }
    }
}

/// Where an image-to-image run enters its schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entrance {
    /// By the share of the schedule that is run, above 0 and at most 1.
    Strength(f32),
    /// By step: so many entries of the schedule's end are kept. The `reference` schedule counts
    /// its closing zero: 13 kept of 25 are 12 steps.
    Kept(u32),
}

/// Constants of the refiner: image to image with the caption as prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefinerSettings {
    /// Latent channels.
    pub latent_channels: u64,
    /// Latent rows.
    pub latent_height: u64,
    /// Latent columns.
    pub latent_width: u64,
    /// Latents are divided by this before decoding.
    pub scale_factor: f32,
    /// Weight of the prompt in the `reference` fidelity.
    pub guidance: f32,
    /// Euler steps of the whole schedule in the `reference` fidelity.
    pub steps: u32,
    /// Where the `reference` fidelity enters it.
    pub entrance: Entrance,
    /// Noise levels.
    pub schedule: EdmSchedule,
    /// Picture size, crop and target size, whose sinusoids follow the pooled text in the vector.
    pub sizes: Vec<f32>,
    /// What the picture must not be like.
    pub negative_prompt: String,
    /// Picture = clamp(`image_scale` * decoded + `image_shift`, 0, 1).
    pub image_scale: f32,
    /// See `image_scale`.
    pub image_shift: f32,
    /// Side that pictures are brought to before refining and for blending, pixels.
    pub side: u64,
    /// Share of the refined picture in the final one; the rest is the blurry picture.
    pub blend: f32,
    /// The few-step fidelity.
    pub edge: RefinerEdgeSettings,
}

/// The refiner in the `edge` fidelity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefinerEdgeSettings {
    /// Method and steps.
    pub sampler: EdgeSettings,
    /// Where the schedule is entered.
    pub entrance: Entrance,
    /// unCLIP's latent goes to the refiner as it is, without becoming a picture in between.
    pub keep_latent: bool,
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
        for (name, steps) in [
            ("sampling_steps", self.sampling_steps),
            ("edge_steps", self.edge_steps),
        ] {
            // The first of the original's steps makes no call.
            if !(2..=self.timesteps).contains(&steps) {
                let expected = format!("2..={}", self.timesteps);
                return Err(field_error(format!("prior.{name}"), expected, steps));
            }
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
        self.schedule.validate("unclip.schedule")?;
        check_steps("unclip.steps", self.steps, &self.schedule)?;
        self.edge.validate("unclip.edge")?;
        Ok(())
    }
}

impl EdmSchedule {
    fn validate(&self, field: &str) -> Result<(), ManifestError> {
        let ordered =
            self.linear_start > 0.0 && self.linear_end > self.linear_start && self.linear_end < 1.0;
        if !ordered {
            return Err(field_error(
                field,
                "0 < linear_start < linear_end < 1",
                format!("{} and {}", self.linear_start, self.linear_end),
            ));
        }
        if !(2..=100_000).contains(&self.steps) {
            return Err(field_error(
                format!("{field}.steps"),
                "2..=100000",
                self.steps,
            ));
        }
        Ok(())
    }
}

fn check_steps(field: &str, steps: u32, schedule: &EdmSchedule) -> Result<(), ManifestError> {
    if (1..=schedule.steps).contains(&steps) {
        return Ok(());
    }
    Err(field_error(field, format!("1..={}", schedule.steps), steps))
}

impl EdgeSettings {
    fn validate(&self, field: &str) -> Result<(), ManifestError> {
        if !(1..=MAX_EDGE_STEPS).contains(&self.steps) {
            let expected = format!("1..={MAX_EDGE_STEPS}");
            return Err(field_error(format!("{field}.steps"), expected, self.steps));
        }
        if !(0.0..=1.0).contains(&self.eta) {
            return Err(field_error(format!("{field}.eta"), "0 to 1", self.eta));
        }
        Ok(())
    }
}

impl Entrance {
    /// - `entries`: of the schedule.
    /// - `least`: entries that must be kept.
    fn validate(self, field: &str, entries: u32, least: u32) -> Result<(), ManifestError> {
        match self {
            Entrance::Strength(share) if share > 0.0 && share <= 1.0 => Ok(()),
            Entrance::Strength(share) => Err(field_error(
                format!("{field}.strength"),
                "above 0, at most 1",
                share,
            )),
            Entrance::Kept(kept) if (least..=entries).contains(&kept) => Ok(()),
            Entrance::Kept(kept) => Err(field_error(
                format!("{field}.kept"),
                format!("{least}..={entries}"),
                kept,
            )),
        }
    }
}

impl RefinerSettings {
    pub(super) fn validate(&self) -> Result<(), ManifestError> {
        for (name, value) in [
            ("latent_channels", self.latent_channels),
            ("latent_height", self.latent_height),
            ("latent_width", self.latent_width),
            ("side", self.side),
        ] {
            if !(1..=4096).contains(&value) {
                return Err(field_error(format!("refiner.{name}"), "1..=4096", value));
            }
        }
        positive("refiner.scale_factor", self.scale_factor)?;
        let numbers = [
            ("guidance", self.guidance),
            ("image_scale", self.image_scale),
            ("image_shift", self.image_shift),
        ];
        for (name, value) in numbers {
            if !value.is_finite() {
                return Err(field_error(
                    format!("refiner.{name}"),
                    "a finite number",
                    value,
                ));
            }
        }
        if !(0.0..=1.0).contains(&self.blend) {
            return Err(field_error("refiner.blend", "0 to 1", self.blend));
        }
        let few = self.sizes.len() <= MAX_SIZES;
        if !few || self.sizes.iter().any(|value| !value.is_finite()) {
            let expected = format!("at most {MAX_SIZES} finite values");
            return Err(field_error("refiner.sizes", expected, self.sizes.len()));
        }
        if self.negative_prompt.len() > MAX_PROMPT_BYTES {
            let expected = format!("at most {MAX_PROMPT_BYTES} bytes");
            return Err(field_error(
                "refiner.negative_prompt",
                expected,
                self.negative_prompt.len(),
            ));
        }
        self.schedule.validate("refiner.schedule")?;
        check_steps("refiner.steps", self.steps, &self.schedule)?;
        self.entrance
            .validate("refiner.entrance", self.steps + 1, 2)?;
        let edge = &self.edge;
        edge.sampler.validate("refiner.edge.sampler")?;
        edge.entrance
            .validate("refiner.edge.entrance", edge.sampler.steps, 1)
    }
}
