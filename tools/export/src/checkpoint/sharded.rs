//! Checkpoints cut into several files, with an index: `{"weight_map": {key: file, …}}`.
//!
//! The index is the truth about which tensors there are and which file holds each; what differs
//! from it is a problem, and all problems of all files are in one report.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::safetensors::Members;
use super::{Assembly, Checkpoint, CheckpointError, Container, file_name, open_file};
use crate::section::chain;

/// Longest index that is read.
const MAX_INDEX_BYTES: u64 = 64 << 20;

#[derive(Deserialize)]
struct Index<'j> {
    #[serde(borrow)]
    weight_map: &'j RawValue,
}

/// Whether a path looks like an index: `model.safetensors.index.json`, also `….index.fp16.json`.
pub(super) fn is_index(path: &Path) -> bool {
    let name = file_name(path);
    name.ends_with(".json") && name.contains(".index.")
}

/// Opens an index and all its shards.
pub(super) fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let (map, mut problems) = read_index(path)?;
    let mut assembly = Assembly::default();
    assembly.note(file_name(path), path);
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (key, shard) in &map {
        shards.entry(shard).or_default().insert(key);
    }
    let mut found = BTreeMap::new();
    let mut opened = BTreeSet::new();
    for (&shard, listed) in &shards {
        let mut components = Path::new(shard).components();
        let plain = matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(name)), None) if name.to_str() == Some(shard)
        );
        if !plain {
            problems.push(format!(
                "{}: weight_map: expected the name of a file in the same folder, found {shard:?} for {} tensors",
                file_name(path),
                listed.len()
            ));
            continue;
        }
        let file = folder.join(shard);
        match open_file(&file) {
            Ok((open, contents)) => {
                opened.insert(shard);
                let base = assembly.add(shard.into(), &file, open, contents.storages);
                let tensors = contents
                    .sections
                    .into_iter()
                    .find(|(name, _)| name.is_empty());
                for (key, entry) in tensors.map(|(_, tensors)| tensors).unwrap_or_default() {
                    let twice = found.insert(key.clone(), (shard, entry.moved(base)));
                    if let Some((first, _)) = twice {
                        problems.push(format!(
                            "{shard}: {key}: expected in one shard, found in {first} as well"
                        ));
                    }
                }
            }
            Err(CheckpointError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                problems.push(format!(
                    "{shard}: expected a shard with {} tensors, the file is missing",
                    listed.len()
                ));
            }
            Err(error) => problems.push(format!("{shard}: {}", chain(&error))),
        }
    }
    // What is in a file that could not be opened was reported with the file.
    for (key, shard) in map
        .iter()
        .filter(|(_, shard)| opened.contains(shard.as_str()))
    {
        match found.get(key) {
            Some((other, _)) if other != shard => problems.push(format!(
                "{shard}: {key}: expected here as the index says, found in {other}"
            )),
            Some(_) => {}
            None => problems.push(format!(
                "{shard}: {key}: expected here as the index says, the key is missing"
            )),
        }
    }
    for (key, (shard, _)) in found.iter().filter(|(key, _)| !map.contains_key(*key)) {
        problems.push(format!(
            "{shard}: {key}: expected only tensors of the index, found one that it does not list"
        ));
    }
    if !problems.is_empty() {
        return Err(CheckpointError::Parts { problems });
    }
    let top = map.keys().cloned().collect();
    let tensors = found
        .into_iter()
        .map(|(key, (_, entry))| (key, entry))
        .collect();
    let sections = BTreeMap::from([(String::new(), tensors)]);
    Ok(assembly.checkpoint(Container::Sharded, sections, top))
}

/// The file of each key, and what is wrong with single keys.
fn read_index(path: &Path) -> Result<(BTreeMap<String, String>, Vec<String>), CheckpointError> {
    let refuse = |problem: String| CheckpointError::Entry {
        entry: file_name(path),
        problem,
    };
    let text = super::folder::read_text(path, MAX_INDEX_BYTES)?;
    let expected = "expected a JSON object with weight_map: {key: file}";
    let index: Index<'_> =
        serde_json::from_str(&text).map_err(|error| refuse(format!("{expected}: {error}")))?;
    let Members(members) = serde_json::from_str(index.weight_map.get())
        .map_err(|error| refuse(format!("{expected}: weight_map: {error}")))?;
    let mut map = BTreeMap::new();
    let mut problems = Vec::new();
    for (key, value) in members {
        let Ok(shard) = serde_json::from_str::<String>(value.get()) else {
            problems.push(format!(
                "{}: {key}: expected the name of a file, found {:.40}",
                file_name(path),
                value.get()
            ));
            continue;
        };
        if map.insert(key.clone(), shard).is_some() {
            problems.push(format!(
                "{}: {key}: expected each key once, found it twice",
                file_name(path)
            ));
        }
    }
    if map.is_empty() && problems.is_empty() {
        return Err(refuse("expected tensors in weight_map, found none".into()));
    }
    Ok((map, problems))
}
