//! Which kind of checkpoint a folder is.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Checkpoint, CheckpointError, diffusers, file_name, sharded, zero};

/// Opens a folder.
pub(super) fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
    if is_zero(dir) {
        return zero::open(dir);
    }
    if is_diffusers(dir) {
        return diffusers::open(dir);
    }
    let names = names(dir)?;
    let indices: Vec<&String> = names
        .iter()
        .filter(|name| sharded::is_index(Path::new(name)))
        .collect();
    match indices.as_slice() {
        [one] => sharded::open(&dir.join(one)),
        [] => Err(CheckpointError::Folder {
            found: if names.is_empty() {
                "an empty folder".into()
            } else {
                let shown: Vec<&str> = names.iter().take(12).map(String::as_str).collect();
                shown.join(", ")
            },
        }),
        several => {
            let shown: Vec<&str> = several.iter().map(|name| name.as_str()).collect();
            Err(CheckpointError::Folder {
                found: format!("several: {}; name one of them", shown.join(", ")),
            })
        }
    }
}

/// Whether a folder is a checkpoint of DeepSpeed's ZeRO, or holds one that `latest` names.
#[must_use]
pub fn is_zero(dir: &Path) -> bool {
    let states =
        |name: &String| name.ends_with(zero::MODEL_STATES) || name.ends_with(zero::OPTIM_STATES);
    dir.join("latest").is_file() || names(dir).is_ok_and(|names| names.iter().any(states))
}

/// Whether a folder holds a pipeline of diffusers.
#[must_use]
pub fn is_diffusers(dir: &Path) -> bool {
    dir.join("model_index.json").is_file() || dir.join("unet/config.json").is_file()
}

/// Names of a folder's entries, sorted.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// A text file of at most `limit` bytes.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<String, CheckpointError> {
    let refuse = |problem: String| CheckpointError::Entry {
        entry: file_name(path),
        problem,
    };
    let len = fs::metadata(path)?.len();
    if len > limit {
        return Err(refuse(format!(
            "expected at most {limit} bytes, found {len}"
        )));
    }
    String::from_utf8(fs::read(path)?)
        .map_err(|error| refuse(format!("expected text, found: {error}")))
}

/// The weights of one network in its own folder: one file, or an index of shards. Full precision
/// goes before `fp16`, safetensors before pickles.
pub(super) fn weights(dir: &Path) -> Option<PathBuf> {
    let stems = ["diffusion_pytorch_model", "model"];
    let safe = |variant: &str| {
        let (dot, middle) = (variant.to_owned(), variant.to_owned());
        stems.into_iter().flat_map(move |stem| {
            [
                format!("{stem}{dot}.safetensors"),
                format!("{stem}.safetensors.index{middle}.json"),
                format!("{stem}{middle}.safetensors.index.json"),
            ]
        })
    };
    let pickled = |variant: &'static str| {
        ["diffusion_pytorch_model", "pytorch_model"]
            .into_iter()
            .flat_map(move |stem| {
                [
                    format!("{stem}{variant}.bin"),
                    format!("{stem}.bin.index{variant}.json"),
                ]
            })
    };
    safe("")
        .chain(safe(".fp16"))
        .chain(pickled(""))
        .chain(pickled(".fp16"))
        .map(|name| dir.join(name))
        .find(|path| path.is_file())
}
