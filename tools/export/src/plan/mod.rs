//! What to export: from a recipe or from a folder that holds the released files.
//!
//! Whatever weights cannot tell stands in [`ModelSettings`], whose defaults are the released
//! models' values; a recipe's `[settings]` or a folder's `config.json` overrides them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bundle::{Precision, StageName};
use serde::Deserialize;

use crate::lora::Target;

mod diffusers;
mod folder;
mod recipe;
mod settings;

pub use settings::ModelSettings;

/// Longest recipe or `config.json` that is read.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A file or folder cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The recipe is not what this program understands.
    #[error("{path} is not a recipe: {message}")]
    Recipe {
        /// The recipe.
        path: PathBuf,
        /// Line, column and field.
        message: String,
    },
    /// `config.json` is not JSON.
    #[error("{path} is not JSON")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it breaks.
        source: serde_json::Error,
    },
    /// A field outside its range.
    #[error("{path}: {field}: expected {expected}, found {found}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is allowed.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// Nothing to export.
    #[error(
        "{path} holds none of last.pth, last/ (ZeRO), unclip6*.ckpt, sd_image_var_autoenc.pth, sd_xl_base*.safetensors, \
         a diffusers folder of SDXL, bigG_to_L*.pth, git/, taesdxl*: nothing to export"
    )]
    Empty {
        /// The folder or recipe.
        path: PathBuf,
    },
    /// Two files fit one name.
    #[error("{path} holds several files for one role: {names}; name one of them in a recipe")]
    Ambiguous {
        /// The folder.
        path: PathBuf,
        /// What was found.
        names: String,
    },
}

/// What to export.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Monotone number of the release.
    pub bundle_version: u64,
    /// Arithmetic of the graphs.
    pub precision: Precision,
    /// The checkpoints hold random weights.
    pub random_weights: bool,
    /// Licences of the weights.
    pub licences: Vec<String>,
    /// The MindEye2 checkpoint.
    pub mindeye: Option<PathBuf>,
    /// The unCLIP engine.
    pub unclip: Option<PathBuf>,
    /// The blurry picture's autoencoder.
    pub autoenc: Option<PathBuf>,
    /// The SDXL engine.
    pub sdxl: Option<PathBuf>,
    /// The bridge to the captioner.
    pub bridge: Option<PathBuf>,
    /// The captioner's weights.
    pub captioner: Option<PathBuf>,
    /// The decoder of quick previews.
    pub preview: Option<PathBuf>,
    /// People to export; empty for all.
    pub subjects: Vec<SubjectPlan>,
    /// LoRA files to merge, in order.
    pub loras: Vec<LoraPlan>,
    /// Stages that are not wanted though the checkpoints hold them.
    pub without: Vec<StageName>,
    /// What weights cannot tell.
    pub settings: ModelSettings,
    /// Export although the checkpoint holds tensors that the network does not know.
    pub allow_unexpected: bool,
    /// Run the networks of an fp16 bundle before it is written, and keep in fp32 what must be.
    pub audit: bool,
    /// The ONNX Runtime library of the audit; `None` to look in the usual places.
    pub onnxruntime: Option<PathBuf>,
    /// Usual files that were looked for and not found, and files that this version does not export.
    pub notes: Vec<String>,
}

/// One LoRA file to merge.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraPlan {
    /// The file.
    pub file: PathBuf,
    /// The network it changes; with the refiner, its text towers too.
    pub into: Target,
    /// What its changes are multiplied with.
    #[serde(default = "whole")]
    pub weight: f32,
    /// Names of entries, `*` standing for any characters, that may fit no layer or differ in shape.
    #[serde(default)]
    pub allow_unmatched: Vec<String>,
}

fn whole() -> f32 {
    1.0
}

/// One person to export.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubjectPlan {
    /// Index of the ridge layer.
    pub index: u64,
    /// Folder name in the bundle; `subj01` for index 0 where absent.
    pub id: Option<String>,
    /// NIfTI mask whose voxels are the ridge layer's inputs.
    pub mask: Option<PathBuf>,
}
impl Plan {
    fn checked(self, path: &Path) -> Result<Plan, PlanError> {
        let sources = [
            &self.captioner,
            &self.mindeye,
            &self.unclip,
            &self.autoenc,
            &self.sdxl,
            &self.bridge,
            &self.preview,
        ];
        if sources.iter().all(|source| source.is_none()) {
            return Err(PlanError::Empty {
                path: path.to_owned(),
            });
        }
        let field = |field: &str, expected, found: String| PlanError::Field {
            path: path.to_owned(),
            field: field.into(),
            expected,
            found,
        };
        let settings = &self.settings;
        for (name, [height, width]) in [
            ("latent_hw", settings.latent_hw),
            ("blurry_latent_hw", settings.blurry_latent_hw),
            ("refiner_latent_hw", settings.refiner_latent_hw),
        ] {
            if ![height, width].iter().all(|len| (1..=4096).contains(len)) {
                return Err(field(
                    name,
                    "two numbers of 1..=4096",
                    format!("{height} and {width}"),
                ));
            }
        }
        for (name, value) in [
            ("num_head_channels", settings.num_head_channels),
            ("context_tokens", settings.context_tokens),
            ("vector_embed_dim", settings.vector_embed_dim),
            ("refiner_head_channels", settings.refiner_head_channels),
            ("clip_l_heads", settings.clip_l_heads),
            ("clip_l_layer", settings.clip_l_layer),
            ("open_clip_heads", settings.open_clip_heads),
            ("vision_head_width", settings.vision_head_width),
            ("vision_side", settings.vision_side),
            ("caption_heads", settings.caption_heads),
            ("caption_vision", settings.caption_vision),
            ("caption_words", settings.caption_words),
        ] {
            if !(1..=65_536).contains(&value) {
                return Err(field(name, "1..=65536", value.to_string()));
            }
        }
        for (at, lora) in self.loras.iter().enumerate() {
            if !lora.weight.is_finite() {
                let name = format!("loras[{at}].weight");
                return Err(field(&name, "a finite number", lora.weight.to_string()));
            }
            let (source, expected) = match lora.into {
                Target::Refiner => (
                    &self.sdxl,
                    "a network whose source is named, here sources.sdxl",
                ),
                Target::Unclip => (
                    &self.unclip,
                    "a network whose source is named, here sources.unclip",
                ),
            };
            if source.is_none() {
                let found = format!("{} without it", lora.into.stage());
                return Err(field(&format!("loras[{at}].into"), expected, found));
            }
        }
        let mut seen = BTreeSet::new();
        for subject in &self.subjects {
            if !seen.insert(subject.index) {
                return Err(field(
                    "subjects.index",
                    "each index once",
                    subject.index.to_string(),
                ));
            }
        }
        Ok(self)
    }
}
fn read_text(path: &Path) -> Result<String, PlanError> {
    let error = |source| PlanError::Read {
        path: path.to_owned(),
        source,
    };
    let len = fs::metadata(path).map_err(error)?.len();
    if len > MAX_TEXT_BYTES {
        return Err(error(std::io::Error::other(format!(
            "{len} bytes, expected at most {MAX_TEXT_BYTES}"
        ))));
    }
    fs::read_to_string(path).map_err(error)
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_recipe_says_what_the_released_models_need() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipe.example.toml");
        let plan = Plan::from_recipe(&path).expect("the example is a recipe");
        assert_eq!(plan.settings, ModelSettings::default());
        assert_eq!(plan.subjects.len(), 1);
        assert!(plan.mindeye.is_some_and(|path| path.ends_with("last.pth")));
    }

    #[test]
    fn a_misspelled_field_of_a_recipe_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("r.toml");
        fs::write(&path, "precision = \"fp32\"\n[sources]\nmindey = \"x\"\n").expect("written");
        let message = Plan::from_recipe(&path).expect_err("refused").to_string();
        assert!(
            message.contains("mindey") && message.contains("line 3"),
            "{message}"
        );
    }
}
