//! SDXL as a folder of diffusers: where it is, and what its settings tell.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{ModelSettings, PlanError, read_text};
use crate::checkpoint::is_diffusers;

/// What the folder's settings tell that weights do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    refiner_head_channels: Option<u64>,
    clip_l_heads: Option<u64>,
    clip_l_layer: Option<u64>,
    open_clip_heads: Option<u64>,
}

#[derive(Deserialize)]
struct Unet {
    block_out_channels: Option<Vec<u64>>,
    /// The number of heads, in spite of its name.
    attention_head_dim: Option<Each>,
    num_attention_heads: Option<Each>,
}

#[derive(Deserialize)]
struct Tower {
    num_attention_heads: Option<u64>,
    num_hidden_layers: Option<u64>,
}

/// One number for all blocks, or one for each.
#[derive(Deserialize)]
#[serde(untagged)]
enum Each {
    All(u64),
    Blocks(Vec<u64>),
}

impl Told {
    /// Reads the settings of a source; nothing where it is no folder of diffusers.
    pub(super) fn read(source: Option<&Path>) -> Result<Told, PlanError> {
        let Some(dir) = source.filter(|path| path.is_dir() && is_diffusers(path)) else {
            return Ok(Told::default());
        };
        let first: Option<Tower> = config(&dir.join("text_encoder/config.json"))?;
        let second: Option<Tower> = config(&dir.join("text_encoder_2/config.json"))?;
        let layers = first.as_ref().and_then(|tower| tower.num_hidden_layers);
        Ok(Told {
            refiner_head_channels: head_channels(&dir.join("unet/config.json"))?,
            clip_l_heads: first.and_then(|tower| tower.num_attention_heads),
            // SDXL takes the output of the last layer but one.
            clip_l_layer: layers.map(|layers| layers.saturating_sub(1)),
            open_clip_heads: second.and_then(|tower| tower.num_attention_heads),
        })
    }

    /// Takes over what is told, but for the fields that `said` knows better.
    pub(super) fn apply(self, settings: &mut ModelSettings, said: impl Fn(&str) -> bool) {
        for (field, told, into) in [
            (
                "refiner_head_channels",
                self.refiner_head_channels,
                &mut settings.refiner_head_channels,
            ),
            (
                "clip_l_heads",
                self.clip_l_heads,
                &mut settings.clip_l_heads,
            ),
            (
                "clip_l_layer",
                self.clip_l_layer,
                &mut settings.clip_l_layer,
            ),
            (
                "open_clip_heads",
                self.open_clip_heads,
                &mut settings.open_clip_heads,
            ),
        ] {
            if let Some(told) = told.filter(|_| !said(field)) {
                *into = told;
            }
        }
    }
}

fn config<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, PlanError> {
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_str(&read_text(path)?)
        .map(Some)
        .map_err(|source| PlanError::Json {
            path: path.to_owned(),
            source,
        })
}

/// Channels of one head of the UNet, which are the same in all blocks.
fn head_channels(path: &Path) -> Result<Option<u64>, PlanError> {
    let Some(unet) = config::<Unet>(path)? else {
        return Ok(None);
    };
    let heads = unet.num_attention_heads.or(unet.attention_head_dim);
    let (Some(channels), Some(heads)) = (unet.block_out_channels, heads) else {
        return Ok(None);
    };
    let heads = match heads {
        Each::All(heads) => vec![heads; channels.len()],
        Each::Blocks(heads) => heads,
    };
    let pairs: Vec<(u64, u64)> = channels
        .iter()
        .copied()
        .zip(heads.iter().copied())
        .collect();
    let widths: Vec<Option<u64>> = pairs
        .iter()
        .map(|&(channels, heads)| (heads > 0 && channels % heads == 0).then(|| channels / heads))
        .collect();
    match widths.first() {
        Some(&Some(width))
            if heads.len() == channels.len() && widths.iter().all(|&w| w == Some(width)) =>
        {
            Ok(Some(width))
        }
        _ => Err(PlanError::Field {
            path: path.to_owned(),
            field: "attention_head_dim".into(),
            expected: "heads of one width in all blocks",
            found: format!("{heads:?} heads for {channels:?} channels"),
        }),
    }
}

/// Whether a folder of diffusers says that it is SDXL; others may lie beside it.
fn is_sdxl(dir: &Path) -> bool {
    #[derive(Deserialize)]
    struct Pipeline {
        #[serde(rename = "_class_name")]
        class: String,
    }
    let pipeline = config::<Pipeline>(&dir.join("model_index.json"));
    pipeline
        .ok()
        .flatten()
        .is_some_and(|pipeline| pipeline.class.starts_with("StableDiffusionXL"))
}

/// The folder's one source of SDXL: a single file, an index of shards, or a folder of diffusers.
pub(super) fn find<'n>(
    dir: &Path,
    names: impl Iterator<Item = &'n String>,
    notes: &mut Vec<String>,
) -> Result<Option<PathBuf>, PlanError> {
    let fits = |name: &&String| {
        let path = dir.join(name.as_str());
        if path.is_dir() {
            return is_diffusers(&path) && (name.starts_with("sd_xl_base") || is_sdxl(&path));
        }
        name.starts_with("sd_xl_base")
            && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"))
    };
    let found: Vec<&String> = names.filter(fits).collect();
    // The shards of an index begin as it does.
    let index = found.iter().find(|name| name.ends_with(".index.json"));
    let stem = index.map(|name| name.trim_end_matches(".safetensors.index.json").to_owned());
    let found: Vec<&String> = found
        .into_iter()
        .filter(|name| {
            name.ends_with(".index.json")
                || stem
                    .as_ref()
                    .is_none_or(|stem| !name.starts_with(stem.as_str()))
        })
        .collect();
    match found.as_slice() {
        [] => {
            notes.push(
                "sd_xl_base*.safetensors is missing: without refiner and its text encoders".into(),
            );
            Ok(None)
        }
        [name] => Ok(Some(dir.join(name.as_str()))),
        several => {
            let names: Vec<&str> = several.iter().map(|name| name.as_str()).collect();
            Err(PlanError::Ambiguous {
                path: dir.to_owned(),
                names: names.join(", "),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unet(json: &str) -> Result<Option<u64>, PlanError> {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).expect("written");
        head_channels(&path)
    }

    #[test]
    fn heads_of_the_released_unet_have_64_channels() {
        let json = r#"{"attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "num_attention_heads": null}"#;
        assert_eq!(unet(json).expect("one width"), Some(64));
    }

    #[test]
    fn heads_of_several_widths_are_refused() {
        let json = r#"{"attention_head_dim": 8, "block_out_channels": [320, 640, 1280]}"#;
        let message = unet(json).expect_err("40, 80 and 160").to_string();
        assert!(message.contains("attention_head_dim"), "{message}");
    }

    #[test]
    fn what_a_recipe_says_itself_is_kept() {
        let told = Told {
            clip_l_heads: Some(2),
            open_clip_heads: Some(4),
            ..Told::default()
        };
        let mut settings = ModelSettings::default();
        told.apply(&mut settings, |field| field == "clip_l_heads");
        assert_eq!((settings.clip_l_heads, settings.open_clip_heads), (12, 4));
    }
}
