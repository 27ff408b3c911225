//! `manifest.json`: the typed description of a bundle.
//!
//! Unknown fields are refused, every reference to a file is checked against the file list, and
//! numbers are checked for range before anything is opened, so that what follows can trust them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The layout this crate reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Longest schedule table and largest tensor axis that a manifest may declare.
const MAX_TABLE: usize = 100_000;
const MAX_AXIS: u64 = 1 << 32;

/// Everything a bundle says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Layout of the folder and of this file; [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Monotone number of this model release, chosen by whoever exports it.
    pub bundle_version: u64,
    /// Model family, `mindeye2`.
    pub family: String,
    /// Arithmetic of the graphs.
    pub precision: Precision,
    /// The weights are random: pictures show that the box works, nothing else.
    #[serde(default)]
    pub random_weights: bool,
    /// The networks shared by all subjects.
    pub stages: BTreeMap<StageName, Stage>,
    /// The people whose voxels this bundle maps, in checkpoint order.
    pub subjects: Vec<Subject>,
    /// Constants of the blurry picture.
    #[serde(default)]
    pub blurry: Option<BlurrySettings>,
    /// Constants and noise schedule of the diffusion prior.
    #[serde(default)]
    pub prior: Option<PriorSettings>,
    /// Constants of the unCLIP sampler.
    #[serde(default)]
    pub unclip: Option<UnclipSettings>,
    /// The checkpoints this bundle was made from.
    pub sources: Vec<Source>,
    /// Licences of the weights, as the exporter was told.
    pub licences: Vec<String>,
    /// Every file of the bundle but the manifest, its signature and the engine cache.
    pub files: BTreeMap<String, FileEntry>,
}

/// Arithmetic of a bundle's graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// fp32 weights and activations.
    Fp32,
    /// fp16 weights and activations, fp32 statistics in norms and softmax, fp32 graph inputs and outputs.
    Fp16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::Fp32 => "fp32",
            Precision::Fp16 => "fp16",
        })
    }
}

/// A network shared by all subjects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageName {
    /// Ridge output to CLIP tokens, retrieval embedding and blurry latent.
    Backbone,
    /// Blurry latent to picture.
    BlurryDecoder,
    /// Brain tokens to CLIP image tokens, one denoising call.
    Prior,
    /// One denoising call of the unCLIP UNet.
    Unclip,
    /// Latent to picture.
    VaeDecoder,
    /// Picture to latent moments.
    VaeEncoder,
    /// CLIP image tokens to the captioner's vision tokens.
    CaptionBridge,
    /// Vision tokens to the keys and values that every word reads.
    CaptionerPrefix,
    /// One word, with keys and values so far, to the scores of the next.
    Captioner,
    /// CLIP-L text tower.
    #[serde(rename = "text_encoder_1")]
    TextEncoder1,
    /// OpenCLIP text tower.
    #[serde(rename = "text_encoder_2")]
    TextEncoder2,
    /// One denoising call of the SDXL refiner.
    Refiner,
    /// The refiner's own autoencoder: picture to latent moments.
    RefinerVaeEncoder,
    /// The refiner's own autoencoder: latent to picture.
    RefinerVaeDecoder,
    /// Picture to CLIP image tokens.
    ImageEncoder,
    /// Latent to a small, quick picture.
    PreviewDecoder,
}

impl StageName {
    /// Every stage that a bundle can hold.
    pub const ALL: [StageName; 16] = [
        StageName::Backbone,
        StageName::BlurryDecoder,
        StageName::Prior,
        StageName::Unclip,
        StageName::VaeDecoder,
        StageName::VaeEncoder,
        StageName::CaptionBridge,
        StageName::CaptionerPrefix,
        StageName::Captioner,
        StageName::TextEncoder1,
        StageName::TextEncoder2,
        StageName::Refiner,
        StageName::RefinerVaeEncoder,
        StageName::RefinerVaeDecoder,
        StageName::ImageEncoder,
        StageName::PreviewDecoder,
    ];

    /// The name in manifests and file names.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            StageName::Backbone => "backbone",
            StageName::BlurryDecoder => "blurry_decoder",
            StageName::Prior => "prior",
            StageName::Unclip => "unclip",
            StageName::VaeDecoder => "vae_decoder",
            StageName::VaeEncoder => "vae_encoder",
            StageName::CaptionBridge => "caption_bridge",
            StageName::CaptionerPrefix => "captioner_prefix",
            StageName::Captioner => "captioner",
            StageName::TextEncoder1 => "text_encoder_1",
            StageName::TextEncoder2 => "text_encoder_2",
            StageName::Refiner => "refiner",
            StageName::RefinerVaeEncoder => "refiner_vae_encoder",
            StageName::RefinerVaeDecoder => "refiner_vae_decoder",
            StageName::ImageEncoder => "image_encoder",
            StageName::PreviewDecoder => "preview_decoder",
        }
    }
}

impl fmt::Display for StageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One ONNX graph with its external data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Path of the ONNX file inside the bundle.
    pub graph: String,
    /// Path of its external data; `None` where every tensor is tiny and inline.
    #[serde(default)]
    pub weights: Option<String>,
    /// Graph inputs in order.
    pub inputs: Vec<TensorSpec>,
    /// Graph outputs in order.
    pub outputs: Vec<TensorSpec>,
}

impl Stage {
    /// The input of this name.
    #[must_use]
    pub fn input(&self, name: &str) -> Option<&TensorSpec> {
        self.inputs.iter().find(|spec| spec.name == name)
    }

    /// The output of this name.
    #[must_use]
    pub fn output(&self, name: &str) -> Option<&TensorSpec> {
        self.outputs.iter().find(|spec| spec.name == name)
    }
}

/// A graph input or output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// Name in the graph.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Axes, outermost first.
    pub shape: Vec<Dim>,
}

impl TensorSpec {
    /// The length of an axis that does not depend on the batch; `None` for the batch or past the last axis.
    #[must_use]
    pub fn fixed(&self, axis: usize) -> Option<u64> {
        match self.shape.get(axis) {
            Some(Dim::Fixed(len)) => Some(*len),
            _ => None,
        }
    }
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} [", self.name, self.dtype)?;
        for (axis, dim) in self.shape.iter().enumerate() {
            if axis > 0 {
                f.write_str(", ")?;
            }
            match dim {
                Dim::Batch(_) => f.write_str("batch")?,
                Dim::Fixed(len) => write!(f, "{len}")?,
            }
        }
        f.write_str("]")
    }
}

/// Element type of a graph input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// 64-bit signed integer.
    I64,
}

/// One axis of a graph input or output; in JSON `"batch"` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dim {
    /// Chosen at each call.
    Batch(BatchWord),
    /// The same in every call.
    Fixed(u64),
}

impl Dim {
    /// The axis whose length is chosen at each call.
    pub const BATCH: Dim = Dim::Batch(BatchWord::Batch);
}

/// The word that stands for a free axis in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BatchWord {
    /// `"batch"`.
    Batch,
}

/// One person's way into the shared space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// Folder name under `subjects/`: letters, digits, `-` and `_`.
    pub id: String,
    /// Index of the ridge layer in the checkpoint.
    pub index: u32,
    /// Voxels of this person's mask.
    pub voxels: u64,
    /// Ridge: `betas [batch, voxels]` to `ridge [batch, seq, hidden]`.
    pub stage: Stage,
    /// NIfTI mask inside the bundle.
    #[serde(default)]
    pub mask: Option<String>,
}

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

/// A checkpoint that went into the bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// What it was used for, e.g. `mindeye`.
    pub role: String,
    /// File name without its folder.
    pub file: String,
    /// Length in bytes.
    pub len_bytes: u64,
    /// SHA-256 of the whole file, lower-case hex.
    pub sha256: String,
}

/// Size and hash of a file in the bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// SHA-256, lower-case hex.
    pub sha256: String,
    /// Length in bytes.
    pub len_bytes: u64,
}

/// What is wrong with a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, a missing or an unknown field, a wrong type.
    #[error("is not a manifest of format {FORMAT_VERSION}")]
    Json(#[source] serde_json::Error),
    /// Written by another generation of the exporter.
    #[error(
        "format_version is {found}, this program reads {FORMAT_VERSION}: export the bundle again"
    )]
    Format {
        /// Version in the file.
        found: u32,
    },
    /// A field outside its range.
    #[error("{field}: expected {expected}, found {found}")]
    Field {
        /// Path of the field.
        field: String,
        /// What is allowed.
        expected: String,
        /// What is there.
        found: String,
    },
}

fn field_error(
    field: impl Into<String>,
    expected: impl Into<String>,
    found: impl fmt::Display,
) -> ManifestError {
    ManifestError::Field {
        field: field.into(),
        expected: expected.into(),
        found: found.to_string(),
    }
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// [`ManifestError`] names the field, what was expected and what was found.
    pub fn from_json(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let version: Version = serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        if version.format_version != FORMAT_VERSION {
            return Err(ManifestError::Format {
                found: version.format_version,
            });
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The bytes of `manifest.json`: sorted keys, two spaces, one final line feed.
    ///
    /// # Errors
    /// [`ManifestError`] where the manifest breaks its own rules.
    pub fn to_json(&self) -> Result<Vec<u8>, ManifestError> {
        self.validate()?;
        let mut bytes = serde_json::to_vec_pretty(self).map_err(ManifestError::Json)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The subject of this id.
    #[must_use]
    pub fn subject(&self, id: &str) -> Option<&Subject> {
        self.subjects.iter().find(|subject| subject.id == id)
    }

    fn validate(&self) -> Result<(), ManifestError> {
        for (path, entry) in &self.files {
            check_path(path)?;
            if entry.sha256.len() != 64
                || !entry
                    .sha256
                    .bytes()
                    .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            {
                return Err(field_error(
                    format!("files.{path}.sha256"),
                    "64 lower-case hex digits",
                    &entry.sha256,
                ));
            }
        }
        for (name, stage) in &self.stages {
            self.check_stage(&format!("stages.{name}"), stage)?;
        }
        let mut ids = std::collections::BTreeSet::new();
        for (at, subject) in self.subjects.iter().enumerate() {
            let field = format!("subjects[{at}]");
            let named = !subject.id.is_empty()
                && subject.id.len() <= 64
                && subject
                    .id
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
            if !named {
                return Err(field_error(
                    format!("{field}.id"),
                    "1 to 64 letters, digits, - or _",
                    format!("{:?}", subject.id),
                ));
            }
            if !ids.insert(subject.id.as_str()) {
                return Err(field_error(
                    format!("{field}.id"),
                    "each id once",
                    &subject.id,
                ));
            }
            self.check_stage(&format!("{field}.stage"), &subject.stage)?;
            let declared = subject.stage.input("betas").and_then(|spec| spec.fixed(1));
            if declared != Some(subject.voxels) {
                return Err(field_error(
                    format!("{field}.voxels"),
                    format!("the betas input's {declared:?}"),
                    subject.voxels,
                ));
            }
            if let Some(mask) = &subject.mask {
                self.check_listed(&format!("{field}.mask"), mask)?;
            }
        }
        if let Some(blurry) = &self.blurry {
            positive("blurry.latent_scale", blurry.latent_scale)?;
        }
        if let Some(prior) = &self.prior {
            prior.validate()?;
        }
        if let Some(unclip) = &self.unclip {
            unclip.validate()?;
        }
        Ok(())
    }

    fn check_stage(&self, field: &str, stage: &Stage) -> Result<(), ManifestError> {
        self.check_listed(&format!("{field}.graph"), &stage.graph)?;
        if let Some(weights) = &stage.weights {
            self.check_listed(&format!("{field}.weights"), weights)?;
        }
        for spec in stage.inputs.iter().chain(&stage.outputs) {
            for dim in &spec.shape {
                if let Dim::Fixed(len) = dim
                    && !(1..=MAX_AXIS).contains(len)
                {
                    return Err(field_error(
                        format!("{field}.{}", spec.name),
                        format!("axes of 1..={MAX_AXIS}"),
                        len,
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_listed(&self, field: &str, path: &str) -> Result<(), ManifestError> {
        if self.files.contains_key(path) {
            return Ok(());
        }
        Err(field_error(field, "a path listed under files", path))
    }
}

impl PriorSettings {
    fn validate(&self) -> Result<(), ManifestError> {
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
    fn validate(&self) -> Result<(), ManifestError> {
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

fn positive(field: &str, value: f32) -> Result<(), ManifestError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(field_error(field, "a positive number", value))
}

/// Paths stay inside the bundle: relative, forward slashes, no `.` or `..`, plain characters.
fn check_path(path: &str) -> Result<(), ManifestError> {
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    let fine = path.len() <= 256
        && path.split('/').all(plain)
        && path != crate::MANIFEST_FILE
        && path != crate::SIGNATURE_FILE
        && !path.starts_with("engines/");
    if fine {
        return Ok(());
    }
    Err(field_error(
        "files",
        "relative paths of letters, digits, '.', '-', '_' outside engines/",
        format!("{path:?}"),
    ))
}
