//! A folder of diffusers for SDXL, shown under the names of the single file (sgm).
//!
//! Each network has its own folder: `unet`, `vae`, `text_encoder`, `text_encoder_2`, each with a
//! `config.json` and weights. Their tensors get the names that the single file has, so that the
//! same graphs are built from them: a block of the one is a block of the other. Where the single
//! file keeps one tensor for three (queries, keys and values of OpenCLIP), the three become one
//! of three views; where it keeps a matrix turned, the view is turned.

mod config;
mod text;
mod unet;
mod vae;

use std::collections::BTreeMap;
use std::path::Path;

use super::tensor::Entry;
use super::{Assembly, Checkpoint, CheckpointError, Container, Names, file_name, folder};
use crate::section::chain;
use config::Config;

type Tensors = BTreeMap<String, Entry>;

/// One network's folder: its settings, its tensors and what is wrong with them.
struct Component<'a> {
    name: &'static str,
    config: Option<Config>,
    tensors: Tensors,
    names: &'a mut Names,
    problems: &'a mut Vec<String>,
}

impl Component<'_> {
    /// Notes that keys starting with `spelt` here start with `shown` in the single file.
    fn pair(&mut self, spelt: &str, shown: String) {
        self.names.pair(shown, format!("{}: {spelt}", self.name));
    }

    fn problem(&mut self, problem: String) {
        self.problems.push(format!("{}: {problem}", self.name));
    }

    /// How many blocks `<prefix>0.`, `<prefix>1.` … the tensors name.
    fn count(&self, prefix: &str) -> u64 {
        let numbers = self
            .tensors
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .filter_map(|(key, _)| key[prefix.len()..].split('.').next()?.parse::<u64>().ok());
        // More blocks than tensors is not a network but a trick to make the table of names long.
        numbers
            .filter(|&number| number < self.tensors.len() as u64)
            .max()
            .map_or(0, |largest| largest + 1)
    }
}

/// Prefixes of keys: here, and in the single file.
type Pairs = Vec<(String, String)>;

/// Gives every tensor that a pair knows its new name; the rest keep theirs behind `unknown`.
fn rename(component: &mut Component<'_>, pairs: &Pairs, unknown: &str) -> Tensors {
    let tensors = std::mem::take(&mut component.tensors);
    for (spelt, shown) in pairs {
        component.pair(spelt, shown.clone());
    }
    component.pair("", unknown.to_owned());
    let mut by_prefix: BTreeMap<&str, &str> = BTreeMap::new();
    for (spelt, shown) in pairs {
        by_prefix.insert(spelt, shown);
    }
    let mut renamed = Tensors::new();
    for (key, entry) in tensors {
        // The longest known prefix ends at a dot or at the end of the key.
        let known = (0..=key.len())
            .rev()
            .filter(|&end| key.is_char_boundary(end))
            .find_map(|end| by_prefix.get(&key[..end]).map(|shown| (end, *shown)));
        let name = match known {
            Some((end, shown)) => format!("{shown}{}", &key[end..]),
            None => format!("{unknown}{key}"),
        };
        if renamed.insert(name, entry).is_some() {
            component.problem(format!(
                "{key}: expected each tensor once, found it under an older name as well"
            ));
        }
    }
    renamed
}

/// Opens the four networks of a folder.
pub(super) fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
    let own = file_name(dir);
    let mut assembly = Assembly::default();
    let mut names = Names::default();
    let mut problems = Vec::new();
    let mut tensors = Tensors::new();
    let index = dir.join("model_index.json");
    if index.is_file() {
        match config::pipeline(&index) {
            Ok(()) => assembly.note(format!("{own}/model_index.json"), &index),
            Err(error) => problems.push(format!("model_index.json: {}", chain(&error))),
        }
    }
    type Read = fn(&mut Component<'_>) -> Tensors;
    let components: [(&'static str, Read); 4] = [
        ("unet", unet::read),
        ("vae", vae::read),
        ("text_encoder", text::read_clip_l),
        ("text_encoder_2", text::read_open_clip),
    ];
    for (name, read) in components {
        let folder = dir.join(name);
        let Some(weights) = folder::weights(&folder) else {
            problems.push(format!(
                "{name}: expected diffusion_pytorch_model.safetensors or model.safetensors or an index of shards, found none"
            ));
            continue;
        };
        let checkpoint = match Checkpoint::open(&weights) {
            Ok(checkpoint) => checkpoint,
            Err(error) => {
                problems.push(format!("{name}/{}: {}", file_name(&weights), chain(&error)));
                continue;
            }
        };
        let path = folder.join("config.json");
        let config = path.is_file().then(|| Config::read(&path)).transpose();
        let config = config.unwrap_or_else(|error| {
            problems.push(format!("{name}/config.json: {}", chain(&error)));
            None
        });
        if config.is_some() {
            assembly.note(format!("{own}/{name}/config.json"), &path);
        }
        let (base, mut sections) = assembly.join(checkpoint, &format!("{own}/{name}"));
        let found = sections.remove("").unwrap_or_default();
        let mut component = Component {
            name,
            config,
            tensors: found
                .into_iter()
                .map(|(key, entry)| (key, entry.moved(base)))
                .collect(),
            names: &mut names,
            problems: &mut problems,
        };
        tensors.extend(read(&mut component));
    }
    if !problems.is_empty() {
        return Err(CheckpointError::Parts { problems });
    }
    assembly.names = names;
    let top = tensors.keys().cloned().collect();
    let sections = BTreeMap::from([(String::new(), tensors)]);
    Ok(assembly.checkpoint(Container::Diffusers, sections, top))
}
