//! `manifest.json`: the typed description of a bundle.
//!
//! Unknown fields are refused, every reference to a file is checked against the file list, and
//! numbers are checked for range before anything is opened, so that what follows can trust them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

mod audit;
mod lora;
mod settings;
mod stage;

pub use audit::{Audit, StageAudit};
pub use lora::Lora;
pub use settings::{
    BlurrySettings, EdgeSettings, EdmSchedule, Entrance, FewStepSampler, PriorSettings,
    PriorTables, RefinerEdgeSettings, RefinerSettings, UnclipSettings,
};
pub use stage::{DType, Dim, Stage, StageName, TensorSpec};

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
    /// Constants of the refiner.
    #[serde(default)]
    pub refiner: Option<RefinerSettings>,
    /// Vocabularies of the text encoders and of the captioner.
    #[serde(default)]
    pub tokenizers: Option<Tokenizers>,
    /// What fp16 does to the networks; `None` for fp32 and where the exporter was told not to look.
    #[serde(default)]
    pub audit: Option<Audit>,
    /// The checkpoints this bundle was made from.
    pub sources: Vec<Source>,
    /// LoRA files that were merged into its networks, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<Lora>,
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
    /// As fp32, but matrix products with the weights of the UNets and the largest layer of the backbone
    /// are done in 8-bit integers: a scale per column of weights, a scale per call of activations.
    /// For CPUs with instructions for it (x86 VNNI, Arm dot product). The prior stays in fp32: after
    /// its 19 steps a quantised one keeps a cosine of 0.988 only.
    Int8,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::Fp32 => "fp32",
            Precision::Fp16 => "fp16",
            Precision::Int8 => "int8",
        })
    }
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

/// Paths of vocabulary files inside the bundle; the decoder's `text` module reads them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokenizers {
    /// CLIP's byte pairs, for both text encoders.
    #[serde(default)]
    pub clip: Option<String>,
    /// The captioner's word pieces.
    #[serde(default)]
    pub caption: Option<String>,
}

/// A checkpoint that went into the bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// What it was used for, e.g. `mindeye`; a checkpoint of several files has one entry for each.
    pub role: String,
    /// File name without its folder; where the checkpoint is a folder, with the path from that folder's name on.
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
        if let Some(tokenizers) = &self.tokenizers {
            for (field, path) in [("clip", &tokenizers.clip), ("caption", &tokenizers.caption)] {
                if let Some(path) = path {
                    self.check_listed(&format!("tokenizers.{field}"), path)?;
                }
            }
        }
        for (at, lora) in self.loras.iter().enumerate() {
            lora.validate(&format!("loras[{at}]"))?;
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
        if let Some(refiner) = &self.refiner {
            refiner.validate()?;
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
