//! What to export: from a recipe or from a folder that holds the released files.
//!
//! Whatever weights cannot tell stands in [`ModelSettings`], whose defaults are the released
//! models' values; a recipe's `[settings]` or a folder's `config.json` overrides them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bundle::Precision;
use serde::Deserialize;

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
        "{path} holds none of last.pth, unclip6*.ckpt, sd_image_var_autoenc.pth, sd_xl_base*.safetensors, \
         bigG_to_L*.pth: nothing to export"
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
    /// People to export; empty for all.
    pub subjects: Vec<SubjectPlan>,
    /// What weights cannot tell.
    pub settings: ModelSettings,
    /// Export although the checkpoint holds tensors that the network does not know.
    pub allow_unexpected: bool,
    /// Usual files that were looked for and not found, and files that this version does not export.
    pub notes: Vec<String>,
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

/// What weights cannot tell; defaults are the released models' values.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// unCLIP latent rows and columns.
    pub latent_hw: [u64; 2],
    /// Channels of one UNet attention head.
    pub num_head_channels: u64,
    /// The refiner's latent rows and columns.
    pub refiner_latent_hw: [u64; 2],
    /// Channels of one attention head of the refiner's UNet.
    pub refiner_head_channels: u64,
    /// Attention heads of CLIP-L's text tower.
    pub clip_l_heads: u64,
    /// Layers of CLIP-L's text tower that run; the last is left out in SDXL.
    pub clip_l_layer: u64,
    /// Attention heads of OpenCLIP's text tower.
    pub open_clip_heads: u64,
    /// Channels of one attention head of OpenCLIP's image tower.
    pub vision_head_width: u64,
    /// Attention heads of the captioner.
    pub caption_heads: u64,
    /// Vision tokens of the captioner.
    pub caption_vision: u64,
    /// Longest caption in tokens, the first one included.
    pub caption_words: u64,
    /// Side of the picture that the image tower takes, pixels.
    pub vision_side: u64,
    /// Tokens of the UNet's context where there is no MindEye2 checkpoint to tell.
    pub context_tokens: u64,
    /// Latents are divided by this before decoding.
    pub scale_factor: f32,
    /// Guidance of the `reference` fidelity.
    pub guidance: f32,
    /// Euler steps of the `reference` fidelity.
    pub unclip_steps: u32,
    /// Share of offset noise in the start.
    pub offset_noise: f32,
    /// First beta of the noise schedule.
    pub linear_start: f64,
    /// Last beta.
    pub linear_end: f64,
    /// Entries of the sigma table.
    pub schedule_steps: u32,
    /// Numbers that stand for one number of the conditioning vector.
    pub vector_embed_dim: u64,
    /// Original picture size, then crop offset: the conditioning vector's numbers.
    pub vector_values: Vec<f32>,
    /// Picture = clamp(scale * decoded + shift).
    pub image_scale: f32,
    /// See `image_scale`.
    pub image_shift: f32,
    /// LCM steps of the `edge` fidelity.
    pub edge_steps: u32,
    /// Prior steps of the `reference` fidelity.
    pub prior_steps: u32,
    /// Share of fresh noise in the prior's DDIM.
    pub prior_eta: f32,
    /// Condition weight of the prior.
    pub prior_cond_scale: f32,
    /// The blurry latent is divided by this.
    pub blurry_scale: f32,
    /// Blurry latent rows and columns where there is no blurry head to tell.
    pub blurry_latent_hw: [u64; 2],
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            latent_hw: [96, 96],
            num_head_channels: 64,
            refiner_latent_hw: [96, 96],
            refiner_head_channels: 64,
            clip_l_heads: 12,
            clip_l_layer: 11,
            open_clip_heads: 20,
            vision_head_width: 104,
            caption_heads: 12,
            caption_vision: 257,
            caption_words: 20,
            vision_side: 224,
            context_tokens: 256,
            scale_factor: 0.13025,
            guidance: 5.0,
            unclip_steps: 38,
            offset_noise: 0.04,
            linear_start: 0.00085,
            linear_end: 0.012,
            schedule_steps: 1000,
            vector_embed_dim: 256,
            vector_values: vec![768.0, 768.0, 0.0, 0.0],
            image_scale: 0.8,
            image_shift: 0.2,
            edge_steps: 4,
            prior_steps: 20,
            prior_eta: 1.0,
            prior_cond_scale: 1.0,
            blurry_scale: 0.18215,
            blurry_latent_hw: [28, 28],
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    #[serde(default = "first_version")]
    bundle_version: u64,
    precision: Precision,
    #[serde(default)]
    random_weights: bool,
    #[serde(default)]
    allow_unexpected: bool,
    #[serde(default)]
    licences: Vec<String>,
    sources: Sources,
    #[serde(default)]
    subjects: Vec<SubjectPlan>,
    #[serde(default)]
    settings: ModelSettings,
}

fn first_version() -> u64 {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sources {
    mindeye: Option<PathBuf>,
    unclip: Option<PathBuf>,
    autoenc: Option<PathBuf>,
    sdxl: Option<PathBuf>,
    bridge: Option<PathBuf>,
    captioner: Option<PathBuf>,
}

impl Plan {
    /// Reads a recipe; its paths are relative to its own folder.
    ///
    /// # Errors
    /// [`PlanError`] names the line or field.
    pub fn from_recipe(path: &Path) -> Result<Plan, PlanError> {
        let text = read_text(path)?;
        let recipe: Recipe = toml::from_str(&text).map_err(|error| PlanError::Recipe {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        let base = path.parent().unwrap_or(Path::new(""));
        let at = |file: Option<PathBuf>| file.map(|file| base.join(file));
        let subjects = recipe
            .subjects
            .into_iter()
            .map(|subject| SubjectPlan {
                mask: at(subject.mask.clone()),
                ..subject
            })
            .collect();
        let plan = Plan {
            bundle_version: recipe.bundle_version,
            precision: recipe.precision,
            random_weights: recipe.random_weights,
            licences: recipe.licences,
            mindeye: at(recipe.sources.mindeye),
            unclip: at(recipe.sources.unclip),
            autoenc: at(recipe.sources.autoenc),
            sdxl: at(recipe.sources.sdxl),
            bridge: at(recipe.sources.bridge),
            captioner: at(recipe.sources.captioner),
            subjects,
            settings: recipe.settings,
            allow_unexpected: recipe.allow_unexpected,
            notes: Vec::new(),
        };
        plan.checked(path)
    }

    /// Looks for the released files under their usual names.
    ///
    /// # Errors
    /// [`PlanError`] where the folder cannot be read, holds nothing to export, or its `config.json` is wrong.
    pub fn from_folder(
        dir: &Path,
        precision: Precision,
        allow_unexpected: bool,
    ) -> Result<Plan, PlanError> {
        let names = file_names(dir)?;
        let mut notes = Vec::new();
        let mut find =
            |role: &str, prefix: &str, suffix: &str| -> Result<Option<PathBuf>, PlanError> {
                let found: Vec<&String> = names
                    .iter()
                    .filter(|name| name.starts_with(prefix) && name.ends_with(suffix))
                    .collect();
                match found.as_slice() {
                    [] => {
                        let wild = if prefix.ends_with(suffix) { "" } else { "*" };
                        let pattern = if wild.is_empty() {
                            prefix.to_owned()
                        } else {
                            format!("{prefix}*{suffix}")
                        };
                        notes.push(format!("{pattern} is missing: without {role}"));
                        Ok(None)
                    }
                    [name] => Ok(Some(dir.join(name))),
                    several => {
                        let names = several
                            .iter()
                            .map(|name| name.as_str())
                            .collect::<Vec<_>>()
                            .join(", ");
                        Err(PlanError::Ambiguous {
                            path: dir.to_owned(),
                            names,
                        })
                    }
                }
            };
        let mindeye = find("subject, backbone and prior", "last.pth", "last.pth")?;
        let unclip = find("unclip and vae_decoder", "unclip6", ".ckpt")?;
        let autoenc = find(
            "blurry_decoder",
            "sd_image_var_autoenc.pth",
            "sd_image_var_autoenc.pth",
        )?;
        let sdxl = find(
            "refiner and its text encoders",
            "sd_xl_base",
            ".safetensors",
        )?;
        let bridge = find("caption_bridge", "bigG_to_L", ".pth")?;
        let captioner = find_captioner(dir, &names, &mut notes);
        let (mut settings, random_weights) = read_config(dir, &names)?;
        if captioner.is_some() {
            read_captioner_config(&dir.join("git"), &mut settings)?;
        }
        let plan = Plan {
            bundle_version: 1,
            precision,
            random_weights,
            licences: Vec::new(),
            mindeye,
            unclip,
            autoenc,
            sdxl,
            bridge,
            captioner,
            subjects: Vec::new(),
            settings,
            allow_unexpected,
            notes,
        };
        plan.checked(dir)
    }

    fn checked(self, path: &Path) -> Result<Plan, PlanError> {
        let sources = [
            &self.captioner,
            &self.mindeye,
            &self.unclip,
            &self.autoenc,
            &self.sdxl,
            &self.bridge,
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

/// The captioner's weights in `git/`, in either of the containers they are released in.
fn find_captioner(
    dir: &Path,
    names: &BTreeSet<String>,
    notes: &mut Vec<String>,
) -> Option<PathBuf> {
    let folder = dir.join("git");
    let found = ["model.safetensors", "pytorch_model.bin"]
        .map(|name| folder.join(name))
        .into_iter()
        .find(|path| path.is_file());
    if found.is_none() {
        let what = if names.contains("git") {
            "git holds neither model.safetensors nor pytorch_model.bin"
        } else {
            "git/ is missing"
        };
        notes.push(format!("{what}: without captioner"));
    }
    found
}

/// The captioner's own `config.json`, as released beside its weights.
fn read_captioner_config(folder: &Path, settings: &mut ModelSettings) -> Result<(), PlanError> {
    let path = folder.join("config.json");
    if !path.is_file() {
        return Ok(());
    }
    let json: serde_json::Value =
        serde_json::from_str(&read_text(&path)?).map_err(|source| PlanError::Json {
            path: path.clone(),
            source,
        })?;
    let reader = ConfigReader {
        path: &path,
        json: &json,
    };
    reader.take(
        "/num_attention_heads",
        "a whole number",
        &mut settings.caption_heads,
    )?;
    let (mut side, mut patch) = (0_u64, 0_u64);
    reader.take("/vision_config/image_size", "a whole number", &mut side)?;
    reader.take("/vision_config/patch_size", "a whole number", &mut patch)?;
    if side > 0 && patch > 0 {
        // One token per patch and the class token.
        settings.caption_vision = (side / patch).pow(2) + 1;
    }
    Ok(())
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

fn file_names(dir: &Path) -> Result<BTreeSet<String>, PlanError> {
    let error = |source| PlanError::Read {
        path: dir.to_owned(),
        source,
    };
    let entries = fs::read_dir(dir).map_err(error)?;
    entries
        .map(|entry| {
            entry
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .map_err(error)
        })
        .collect()
}

/// Settings of a `config.json` in the layout of the reference vectors; absent fields keep their defaults.
fn read_config(dir: &Path, names: &BTreeSet<String>) -> Result<(ModelSettings, bool), PlanError> {
    let mut settings = ModelSettings::default();
    if !names.contains("config.json") {
        return Ok((settings, false));
    }
    let path = dir.join("config.json");
    let json: serde_json::Value =
        serde_json::from_str(&read_text(&path)?).map_err(|source| PlanError::Json {
            path: path.clone(),
            source,
        })?;
    let reader = ConfigReader {
        path: &path,
        json: &json,
    };
    reader.take(
        "/unclip/latent_hw",
        "two whole numbers",
        &mut settings.latent_hw,
    )?;
    reader.take(
        "/unclip/unet/num_head_channels",
        "a whole number",
        &mut settings.num_head_channels,
    )?;
    reader.take(
        "/sdxl/latent_hw",
        "two whole numbers",
        &mut settings.refiner_latent_hw,
    )?;
    for (pointer, into) in [
        (
            "/sdxl/unet/num_head_channels",
            &mut settings.refiner_head_channels,
        ),
        (
            "/sdxl/clip_l/num_attention_heads",
            &mut settings.clip_l_heads,
        ),
        ("/sdxl/layer_idx", &mut settings.clip_l_layer),
        ("/sdxl/openclip/text/heads", &mut settings.open_clip_heads),
        (
            "/unclip/openclip/vision/head_width",
            &mut settings.vision_head_width,
        ),
        (
            "/unclip/openclip/vision/image_size",
            &mut settings.vision_side,
        ),
    ] {
        reader.take(pointer, "a whole number", into)?;
    }
    reader.take("/me/tokens", "a whole number", &mut settings.context_tokens)?;
    reader.take(
        "/constants/scale_factor",
        "a number",
        &mut settings.scale_factor,
    )?;
    reader.take("/constants/cfg_scale", "a number", &mut settings.guidance)?;
    reader.take(
        "/constants/unclip_steps",
        "a whole number",
        &mut settings.unclip_steps,
    )?;
    reader.take(
        "/constants/offset_noise_level",
        "a number",
        &mut settings.offset_noise,
    )?;
    reader.take(
        "/constants/linear_start",
        "a number",
        &mut settings.linear_start,
    )?;
    reader.take(
        "/constants/linear_end",
        "a number",
        &mut settings.linear_end,
    )?;
    reader.take(
        "/constants/discrete_idx",
        "a whole number",
        &mut settings.schedule_steps,
    )?;
    reader.take(
        "/constants/vector_embed_dim",
        "a whole number",
        &mut settings.vector_embed_dim,
    )?;
    reader.take(
        "/constants/prior_ddim_steps",
        "a whole number",
        &mut settings.prior_steps,
    )?;
    reader.take("/constants/prior_eta", "a number", &mut settings.prior_eta)?;
    reader.take(
        "/constants/autoenc_latent_scale",
        "a number",
        &mut settings.blurry_scale,
    )?;
    let (mut original, mut crop) = (settings.vector_values[0], settings.vector_values[2]);
    reader.take("/constants/size_values/original", "a number", &mut original)?;
    reader.take("/constants/size_values/crop", "a number", &mut crop)?;
    settings.vector_values = vec![original, original, crop, crop];
    let mut random_weights = false;
    reader.take("/random_weights", "true or false", &mut random_weights)?;
    Ok((settings, random_weights))
}

struct ConfigReader<'a> {
    path: &'a Path,
    json: &'a serde_json::Value,
}

impl ConfigReader<'_> {
    fn take<T: for<'de> Deserialize<'de>>(
        &self,
        pointer: &str,
        expected: &'static str,
        into: &mut T,
    ) -> Result<(), PlanError> {
        let Some(value) = self.json.pointer(pointer) else {
            return Ok(());
        };
        *into = T::deserialize(value).map_err(|_| PlanError::Field {
            path: self.path.to_owned(),
            field: pointer.trim_start_matches('/').replace('/', "."),
            expected,
            found: value.to_string(),
        })?;
        Ok(())
    }
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
