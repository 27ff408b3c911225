//! A plan from a folder that holds the released files under their usual names.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bundle::{Entrance, Precision};
use serde::Deserialize;

use super::diffusers::{self, Told};
use super::{ModelSettings, Plan, PlanError, read_text};
use crate::checkpoint::is_zero;

impl Plan {
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
        // Training with DeepSpeed leaves a folder where training without it leaves a file.
        let zero = dir.join("last");
        let mindeye = if !names.contains("last.pth") && is_zero(&zero) {
            Some(zero)
        } else {
            find("subject, backbone and prior", "last.pth", "last.pth")?
        };
        let unclip = find("unclip and vae_decoder", "unclip6", ".ckpt")?;
        let autoenc = find(
            "blurry_decoder",
            "sd_image_var_autoenc.pth",
            "sd_image_var_autoenc.pth",
        )?;
        let bridge = find("caption_bridge", "bigG_to_L", ".pth")?;
        let sdxl = diffusers::find(dir, names.iter(), &mut notes)?;
        let preview = find_preview(dir, &names, &mut notes)?;
        let captioner = find_captioner(dir, &names, &mut notes);
        let told = Told::read(sdxl.as_deref())?;
        let (mut settings, random_weights) = read_config(dir, &names, told)?;
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
            preview,
            subjects: Vec::new(),
            loras: Vec::new(),
            without: Vec::new(),
            settings,
            allow_unexpected,
            audit: true,
            onnxruntime: None,
            notes,
        };
        plan.checked(dir)
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

/// `taesdxl_decoder` in either container, or a whole `taesdxl`; its encoder is of no use.
fn find_preview(
    dir: &Path,
    names: &BTreeSet<String>,
    notes: &mut Vec<String>,
) -> Result<Option<PathBuf>, PlanError> {
    let fits = |name: &&String| {
        name.starts_with("taesdxl")
            && !name.contains("encoder")
            && [".pth", ".safetensors"]
                .iter()
                .any(|end| name.ends_with(end))
    };
    let found: Vec<&String> = names.iter().filter(fits).collect();
    match found.as_slice() {
        [] => {
            notes.push("taesdxl* is missing: without preview_decoder".into());
            Ok(None)
        }
        [name] => Ok(Some(dir.join(name))),
        several => {
            let names: Vec<&str> = several.iter().map(|name| name.as_str()).collect();
            Err(PlanError::Ambiguous {
                path: dir.to_owned(),
                names: names.join(", "),
            })
        }
    }
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
fn read_config(
    dir: &Path,
    names: &BTreeSet<String>,
    told: Told,
) -> Result<(ModelSettings, bool), PlanError> {
    let mut settings = ModelSettings::default();
    told.apply(&mut settings, |_| false);
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
    let mut target = settings.refiner_sizes[4];
    reader.take("/constants/size_values/target", "a number", &mut target)?;
    settings.refiner_sizes = vec![original, original, crop, crop, target, target];
    reader.take(
        "/constants/refiner_steps",
        "a whole number",
        &mut settings.refiner_steps,
    )?;
    let mut kept = 0;
    reader.take("/constants/img2img_timepoint", "a whole number", &mut kept)?;
    if kept > 0 {
        settings.refiner_entrance = Entrance::Kept(kept);
    }
    let mut shares = [settings.blend, 1.0 - settings.blend];
    reader.take("/constants/blend", "two numbers", &mut shares)?;
    settings.blend = shares[0];
    reader.take(
        "/constants/blend_size",
        "a whole number",
        &mut settings.blend_side,
    )?;
    reader.take("/negative_prompt", "a text", &mut settings.negative_prompt)?;
    reader.take(
        "/constants/git_max_length",
        "a whole number",
        &mut settings.caption_words,
    )?;
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
