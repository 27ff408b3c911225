//! `torch.save` files: the zip container and the legacy one.

mod archive;
mod legacy;
mod place;

use std::collections::BTreeMap;
use std::fs::File;

use super::pickle::{Id, MAX_NAME_BYTES, Pickled, TensorValue, Value};
use super::storage::Storage;
use super::tensor::Entry;
use super::{CheckpointError, Container, Contents, container};
pub(super) use place::Placer;

/// Longest `data.pkl` that is read: the released checkpoints have less than 2 MB.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Dictionaries deeper than this hold no weights.
const MAX_DEPTH: usize = 16;
/// Most places of a pickle that are looked at for tensors.
const MAX_VISITS: usize = 4_000_000;
/// Most bytes of tensors' names: a small pickle can spell endless names by sharing its parts.
const MAX_NAMES_BYTES: usize = 64 << 20;
/// The first pickle of a legacy file: protocol 2, LONG1 of ten bytes.
const LEGACY_HEAD: &[u8] = &[
    0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19,
];

/// Whether a file starts like a legacy checkpoint.
pub(super) fn is_legacy(head: &[u8]) -> bool {
    head.starts_with(LEGACY_HEAD)
}

/// A file's pickle and where its storages lie.
pub(super) struct Unpickled {
    pub(super) pickled: Pickled,
    container: Container,
    /// Storages by the key that the pickle names.
    lookup: BTreeMap<String, Storage>,
}

/// Reads the pickle of a file that starts with `head` and finds its storages.
pub(super) fn unpickle(file: &File, head: &[u8], len: u64) -> Result<Unpickled, CheckpointError> {
    match container::sniff(head, len)? {
        Container::TorchZip => archive::unpickle(file, len),
        Container::TorchLegacy => legacy::unpickle(file, len),
        other => Err(CheckpointError::Container {
            found: format!("a {other} file"),
        }),
    }
}

/// Lists the tensors of a pickle by section.
pub(super) fn contents(unpickled: &Unpickled) -> Result<Contents, CheckpointError> {
    let pickled = &unpickled.pickled;
    let mut walk = Walk {
        pickled,
        found: Vec::new(),
        visits: 0,
        names_bytes: 0,
    };
    let mut top = Vec::new();
    let mut sections: BTreeMap<String, Vec<(String, &TensorValue)>> = BTreeMap::new();
    let Value::Dict(items) = pickled.get(pickled.root) else {
        return Err(CheckpointError::Entry {
            entry: "data.pkl".into(),
            problem: "expected a dictionary at the top".into(),
        });
    };
    for &(key, value) in items {
        let Some(name) = key_text(pickled, key)? else {
            continue;
        };
        walk.count(name.len())?;
        top.push(name.clone());
        if let Value::Tensor(tensor) = pickled.get(value) {
            sections
                .entry(String::new())
                .or_default()
                .push((name, &**tensor));
        } else {
            walk.visit(value, String::new(), 0)?;
            if !walk.found.is_empty() {
                sections.entry(name).or_default().append(&mut walk.found);
            }
        }
    }
    let mut placer = Placer::new(unpickled);
    let mut problems = Vec::new();
    let mut placed: BTreeMap<String, BTreeMap<String, Entry>> = BTreeMap::new();
    for (section, tensors) in sections {
        for (name, tensor) in tensors {
            match placer.place(tensor) {
                Ok(view) => {
                    let tensors = placed.entry(section.clone()).or_default();
                    if tensors.insert(name.clone(), Entry::of(view)).is_some() {
                        problems.push(format!("{name}: expected each key once, found it twice"));
                    }
                }
                Err(problem) => problems.push(format!("{name}: {problem}")),
            }
        }
    }
    if problems.is_empty() {
        Ok(Contents {
            container: unpickled.container,
            storages: placer.storages,
            sections: placed,
            top,
        })
    } else {
        Err(CheckpointError::Tensors { problems })
    }
}

fn key_text(pickled: &Pickled, id: Id) -> Result<Option<String>, CheckpointError> {
    match pickled.get(id) {
        Value::Text(text) if text.len() > MAX_NAME_BYTES => Err(beyond(format!(
            "expected keys of at most {MAX_NAME_BYTES} bytes, found {}",
            text.len()
        ))),
        Value::Text(text) => Ok(Some(text.clone())),
        Value::Int(number) => Ok(Some(number.to_string())),
        _ => Ok(None),
    }
}

fn beyond(problem: String) -> CheckpointError {
    CheckpointError::Entry {
        entry: "data.pkl".into(),
        problem,
    }
}

struct Walk<'p> {
    pickled: &'p Pickled,
    found: Vec<(String, &'p TensorValue)>,
    visits: usize,
    names_bytes: usize,
}

impl Walk<'_> {
    /// Counts bytes of names that are kept.
    fn count(&mut self, bytes: usize) -> Result<(), CheckpointError> {
        self.names_bytes += bytes;
        if self.names_bytes > MAX_NAMES_BYTES {
            return Err(beyond(format!(
                "expected at most {MAX_NAMES_BYTES} bytes of names, found more"
            )));
        }
        Ok(())
    }

    /// Notes the tensors below a value; their keys are joined with dots.
    fn visit(&mut self, id: Id, name: String, depth: usize) -> Result<(), CheckpointError> {
        self.visits += 1;
        if self.visits > MAX_VISITS {
            return Err(beyond(format!(
                "expected at most {MAX_VISITS} places that could hold a tensor, found more"
            )));
        }
        if depth > MAX_DEPTH {
            return Ok(());
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(beyond(format!(
                "expected names of at most {MAX_NAME_BYTES} bytes, found {}",
                name.len()
            )));
        }
        let below = |key: &str| {
            if name.is_empty() {
                key.to_owned()
            } else {
                format!("{name}.{key}")
            }
        };
        match self.pickled.get(id) {
            Value::Tensor(tensor) => {
                self.count(name.len() + size_of::<Entry>())?;
                self.found.push((name, &**tensor));
            }
            Value::Dict(items) => {
                for &(key, value) in items {
                    if let Some(key) = key_text(self.pickled, key)? {
                        self.visit(value, below(&key), depth + 1)?;
                    }
                }
            }
            Value::List(items) | Value::Tuple(items) => {
                for (at, &item) in items.iter().enumerate() {
                    self.visit(item, below(&at.to_string()), depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
