//! `torch.save` files: the zip container and the legacy one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, Id, Pickled, TensorValue, Value};
use super::{CheckpointError, Container, Contents, Entry, Storage};

/// Longest `data.pkl` that is read: the released checkpoints have less than 2 MB.
const MAX_PICKLE_BYTES: u64 = 256 << 20;
/// Dictionaries deeper than this hold no weights.
const MAX_DEPTH: usize = 16;
/// Most places of a pickle that are looked at for tensors.
const MAX_VISITS: usize = 8_000_000;
/// The first pickle of a legacy file: protocol 2, LONG1 of ten bytes.
const LEGACY_HEAD: &[u8] = &[
    0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19,
];

/// Whether a file starts like a legacy checkpoint.
pub(super) fn is_legacy(head: &[u8]) -> bool {
    head.starts_with(LEGACY_HEAD)
}

/// Reads directory and pickle of a zip checkpoint.
pub(super) fn read_zip(file: &File) -> Result<Contents, CheckpointError> {
    let mut archive = ZipArchive::new(file).map_err(CheckpointError::Zip)?;
    let mut entries = BTreeMap::new();
    let mut pickle_at = None;
    let mut byte_order_at = None;
    for at in 0..archive.len() {
        let entry = archive.by_index_raw(at).map_err(CheckpointError::Zip)?;
        let name = entry.name().map_err(CheckpointError::Zip)?.into_owned();
        let base = name.rsplit('/').next().unwrap_or_default();
        if base == "data.pkl" && name.matches('/').count() == 1 {
            pickle_at = Some((at, name.clone()));
        } else if base == "byteorder" {
            byte_order_at = Some(at);
        }
        let packed = match entry.compression() {
            CompressionMethod::Stored => None,
            CompressionMethod::Deflated => Some(entry.compressed_size()),
            other => {
                let problem = format!("expected a stored or deflated entry, found {other}");
                return Err(CheckpointError::Entry {
                    entry: name,
                    problem,
                });
            }
        };
        let Some(offset) = entry.data_start() else {
            return Err(CheckpointError::Entry {
                entry: name,
                problem: "expected its data in the archive, found none".into(),
            });
        };
        let storage = Storage {
            entry: name.clone(),
            offset,
            len_bytes: entry.size(),
            packed,
            crc: Some(entry.crc32()),
        };
        entries.insert(name, storage);
    }
    let Some((at, pickle_name)) = pickle_at else {
        return Err(CheckpointError::Entry {
            entry: "data.pkl".into(),
            problem: "expected in the archive, found none".into(),
        });
    };
    if let Some(at) = byte_order_at {
        let order = read_entry(&mut archive, at, 64)?;
        if order != b"little" {
            let problem = format!(
                "expected little, found {:?}",
                String::from_utf8_lossy(&order)
            );
            return Err(CheckpointError::Entry {
                entry: "byteorder".into(),
                problem,
            });
        }
    }
    let bytes = read_entry(&mut archive, at, MAX_PICKLE_BYTES)?;
    let pickled = pickle::read(&bytes).map_err(|source| CheckpointError::Pickle {
        entry: pickle_name.clone(),
        source,
    })?;
    let folder = pickle_name
        .strip_suffix("data.pkl")
        .unwrap_or_default()
        .to_owned();
    collect(&pickled, Container::TorchZip, |key| {
        entries.get(&format!("{folder}data/{key}")).cloned()
    })
}

fn read_entry(
    archive: &mut ZipArchive<&File>,
    at: usize,
    limit: u64,
) -> Result<Vec<u8>, CheckpointError> {
    let entry = archive.by_index(at).map_err(CheckpointError::Zip)?;
    let name = entry.name().map_err(CheckpointError::Zip)?.into_owned();
    let problem = |problem| CheckpointError::Entry {
        entry: name.clone(),
        problem,
    };
    if entry.size() > limit {
        return Err(problem(format!(
            "expected at most {limit} bytes, found {}",
            entry.size()
        )));
    }
    let mut bytes = Vec::new();
    entry
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| problem(format!("cannot be unpacked: {error}")))?;
    if bytes.len() as u64 > limit {
        return Err(problem(format!("expected at most {limit} bytes")));
    }
    Ok(bytes)
}

/// Reads the pickles of a legacy checkpoint and finds its storages behind them.
pub(super) fn read_legacy(file: &File, len: u64) -> Result<Contents, CheckpointError> {
    let mut at = 0;
    let mut pickles = Vec::new();
    for name in [
        "magic number",
        "protocol",
        "system",
        "contents",
        "storage keys",
    ] {
        let mut window = usize::try_from((len - at).min(1 << 20)).unwrap_or(1 << 20);
        let pickled = loop {
            let mut bytes = vec![0; window];
            file.read_exact_at(&mut bytes, at)?;
            match pickle::read(&bytes) {
                // Perhaps only the window ends early.
                Err(pickle::PickleError::Truncated { .. })
                    if (window as u64) < (len - at).min(MAX_PICKLE_BYTES) =>
                {
                    window =
                        usize::try_from((window as u64 * 8).min(len - at).min(MAX_PICKLE_BYTES))
                            .unwrap_or(window);
                }
                Err(source) => {
                    return Err(CheckpointError::Pickle {
                        entry: format!("pickle of the {name}"),
                        source,
                    });
                }
                Ok(pickled) => break pickled,
            }
        };
        at += pickled.len_bytes as u64;
        pickles.push(pickled);
    }
    let (contents, keys) = (&pickles[3], &pickles[4]);
    check_legacy_version(&pickles[1])?;
    let declared = declared_storages(contents);
    let Value::List(keys_list) = keys.get(keys.root) else {
        return Err(CheckpointError::Entry {
            entry: "storage keys".into(),
            problem: "expected a list".into(),
        });
    };
    let mut storages = BTreeMap::new();
    for &id in keys_list {
        let Value::Text(key) = keys.get(id) else {
            return Err(CheckpointError::Entry {
                entry: "storage keys".into(),
                problem: "expected text".into(),
            });
        };
        let entry = format!("storage {key}");
        let Some(&size) = declared.get(key.as_str()) else {
            return Err(CheckpointError::Entry {
                entry,
                problem: "expected a tensor that uses it, found none".into(),
            });
        };
        let mut count = [0; 8];
        if at + 8 > len {
            let problem = format!(
                "expected its length at byte {at}, the file ends at {len}: it is truncated, fetch it again"
            );
            return Err(CheckpointError::Entry { entry, problem });
        }
        file.read_exact_at(&mut count, at)?;
        let len_bytes = u64::from_le_bytes(count).saturating_mul(size);
        at += 8;
        if len_bytes > len - at {
            let problem = format!(
                "expected {len_bytes} bytes at byte {at}, found {}: the file is truncated, fetch it again",
                len - at
            );
            return Err(CheckpointError::Entry { entry, problem });
        }
        storages.insert(
            key.clone(),
            Storage {
                entry,
                offset: at,
                len_bytes,
                packed: None,
                crc: None,
            },
        );
        at += len_bytes;
    }
    collect(contents, Container::TorchLegacy, |key| {
        storages.get(key).cloned()
    })
}

fn check_legacy_version(pickled: &Pickled) -> Result<(), CheckpointError> {
    match pickled.get(pickled.root) {
        Value::Int(1001) => Ok(()),
        other => Err(CheckpointError::Entry {
            entry: "protocol".into(),
            problem: format!("expected 1001, found {other:?}"),
        }),
    }
}

/// Element size of every storage a legacy pickle names.
fn declared_storages(pickled: &Pickled) -> BTreeMap<&str, u64> {
    pickled
        .storages()
        .map(|storage| (storage.key.as_str(), storage.dtype.len_bytes()))
        .collect()
}

/// Walks the dictionaries of a pickle and lists its tensors by section.
fn collect(
    pickled: &Pickled,
    container: Container,
    find: impl Fn(&str) -> Option<Storage>,
) -> Result<Contents, CheckpointError> {
    let mut walk = Walk {
        pickled,
        found: Vec::new(),
        visits: 0,
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
        let Some(name) = key_text(pickled, key) else {
            continue;
        };
        top.push(name.clone());
        if let Value::Tensor(tensor) = pickled.get(value) {
            sections
                .entry(String::new())
                .or_default()
                .push((name, tensor));
        } else {
            walk.visit(value, String::new(), 0)?;
            if !walk.found.is_empty() {
                sections.entry(name).or_default().append(&mut walk.found);
            }
        }
    }
    let mut storages = Vec::new();
    let mut by_key: BTreeMap<String, usize> = BTreeMap::new();
    let mut problems = Vec::new();
    let mut placed: BTreeMap<String, BTreeMap<String, Entry>> = BTreeMap::new();
    for (section, tensors) in sections {
        for (name, tensor) in tensors {
            match place(tensor, &mut storages, &mut by_key, &find) {
                Ok(entry) => {
                    placed
                        .entry(section.clone())
                        .or_default()
                        .insert(name, entry);
                }
                Err(problem) => problems.push(format!("{name}: {problem}")),
            }
        }
    }
    if problems.is_empty() {
        Ok(Contents {
            container,
            storages,
            sections: placed,
            top,
        })
    } else {
        Err(CheckpointError::Tensors { problems })
    }
}

fn key_text(pickled: &Pickled, id: Id) -> Option<String> {
    match pickled.get(id) {
        Value::Text(text) => Some(text.clone()),
        Value::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

struct Walk<'p> {
    pickled: &'p Pickled,
    found: Vec<(String, &'p TensorValue)>,
    visits: usize,
}

impl Walk<'_> {
    /// Notes the tensors below a value; their keys are joined with dots.
    fn visit(&mut self, id: Id, name: String, depth: usize) -> Result<(), CheckpointError> {
        self.visits += 1;
        if self.visits > MAX_VISITS {
            let problem = format!("expected at most {MAX_VISITS} places that could hold a tensor");
            return Err(CheckpointError::Entry {
                entry: "data.pkl".into(),
                problem,
            });
        }
        if depth > MAX_DEPTH {
            return Ok(());
        }
        let below = |key: &str| {
            if name.is_empty() {
                key.to_owned()
            } else {
                format!("{name}.{key}")
            }
        };
        match self.pickled.get(id) {
            Value::Tensor(tensor) => self.found.push((name, tensor)),
            Value::Dict(items) => {
                for &(key, value) in items {
                    if let Some(key) = key_text(self.pickled, key) {
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

/// Compares a tensor with its storage; what is wrong as text.
fn place(
    tensor: &TensorValue,
    storages: &mut Vec<Storage>,
    by_key: &mut BTreeMap<String, usize>,
    find: &impl Fn(&str) -> Option<Storage>,
) -> Result<Entry, String> {
    let TensorValue {
        storage,
        offset,
        shape,
        strides,
    } = tensor;
    let at = match by_key.get(&storage.key) {
        Some(&at) => at,
        None => {
            let Some(found) = find(&storage.key) else {
                return Err(format!(
                    "expected its numbers in storage {}, which is missing from the file",
                    storage.key
                ));
            };
            storages.push(found);
            by_key.insert(storage.key.clone(), storages.len() - 1);
            storages.len() - 1
        }
    };
    let size = storage.dtype.len_bytes();
    let (declared, found) = (storage.elements.checked_mul(size), storages[at].len_bytes);
    if declared != Some(found) {
        return Err(format!(
            "expected {} elements of {size} bytes in {}, found {found} bytes",
            storage.elements, storages[at].entry
        ));
    }
    let reach = || {
        let mut last = *offset;
        for (&len, &stride) in shape.iter().zip(strides) {
            if len == 0 {
                return Some(0);
            }
            last = last.checked_add((len - 1).checked_mul(stride)?)?;
        }
        last.checked_add(1)
    };
    let elements = shape
        .iter()
        .try_fold(1_u64, |product, &len| product.checked_mul(len));
    match (reach(), elements) {
        // A view that repeats elements (stride 0) could claim more numbers than any file holds.
        (Some(reach), Some(elements))
            if reach <= storage.elements && elements <= storage.elements.saturating_mul(4096) => {}
        _ => {
            return Err(format!(
                "expected a view within {} elements, found shape {shape:?}, strides {strides:?}, offset {offset}",
                storage.elements
            ));
        }
    }
    Ok(Entry {
        dtype: storage.dtype,
        shape: shape.clone(),
        strides: strides.clone(),
        offset: *offset,
        storage: at,
    })
}
