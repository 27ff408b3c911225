//! Every kind of checkpoint that the exporter takes, whole and damaged.
//!
//! The files are written here, by writers of the tests' own, except for the two ZeRO folders in
//! `tests/data/zero`, which `torch` wrote.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod bombs;
mod damage;
mod diffusers;
mod dtypes;
mod large;
mod sharded;
mod sweep;
mod write;
mod zero;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use export::checkpoint::{Checkpoint, CheckpointError};
use export::plan::Plan;
use export::section::chain;

/// Every tensor at the top, in fp32.
fn root(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<f32>> {
    let tensors = checkpoint.root().into_iter();
    tensors
        .map(|(name, tensor)| (name, tensor.read_f32().unwrap()))
        .collect()
}

/// The message with which a path is refused.
fn refused(path: &Path) -> String {
    match Checkpoint::open(path) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => chain(&error),
    }
}

/// The message with which the first tensor at the top that cannot be read is refused.
fn unreadable(path: &Path) -> String {
    let checkpoint = Checkpoint::open(path).unwrap();
    let read = checkpoint
        .root()
        .into_iter()
        .map(|(_, tensor)| tensor.read_f32().map(drop));
    let error: CheckpointError = read.collect::<Result<Vec<()>, _>>().unwrap_err();
    chain(&error)
}

/// A file of these bytes in a folder.
fn file(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// The reference set beside the repository; a clone without it says so.
fn golden() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if path.is_dir() {
        return Some(path.canonicalize().unwrap());
    }
    eprintln!("not compared: the reference set ../shared/golden was not found");
    None
}

/// The plan of a recipe with this text in this folder.
fn recipe(dir: &Path, text: &str) -> Plan {
    let path = dir.join("recipe.toml");
    fs::write(&path, text).unwrap();
    Plan::from_recipe(&path).unwrap()
}

/// All files of a bundle but its manifest, which names the sources.
fn bundle_files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with("manifest.json") {
                let name = path.strip_prefix(dir).unwrap().to_owned();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}
