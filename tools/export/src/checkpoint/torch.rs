//! `torch.save` files: the zip container and the legacy one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, Id, MAX_NAME_BYTES, Pickled, TensorValue, Value};
use super::storage::Storage;
use super::tensor::{Entry, View};
use super::{CheckpointError, Container, Contents, container};
use crate::section::chain;

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
        Container::TorchZip => unpickle_zip(file, len),
        Container::TorchLegacy => unpickle_legacy(file, len),
        other => Err(CheckpointError::Container {
            found: format!("a {other} file"),
        }),
    }
}

/// The entries of an archive by name, and everything wrong with its directory.
fn directory(
    archive: &mut ZipArchive<&File>,
    len: u64,
) -> Result<BTreeMap<String, (usize, Storage)>, CheckpointError> {
    let mut entries = BTreeMap::new();
    let mut problems = Vec::new();
    if archive.has_duplicate_names() {
        problems.push("expected each entry once, found a name twice".into());
    }
    for at in 0..archive.len() {
        let entry = match archive.by_index_raw(at) {
            Ok(entry) => entry,
            Err(error) => {
                let why = chain(&error);
                problems.push(format!("entry {at}: expected its header, found: {why}"));
                continue;
            }
        };
        let name = match entry.name() {
            Ok(name) => name.into_owned(),
            Err(error) => {
                problems.push(format!("entry {at}: expected a name, found: {error}"));
                continue;
            }
        };
        let (size, packed_size) = (entry.size(), entry.compressed_size());
        let mut refuse = |problem: String| problems.push(format!("{name}: {problem}"));
        if entry.encrypted() {
            refuse("expected an entry in the clear, found it encrypted".into());
        }
        let packed = match entry.compression() {
            CompressionMethod::Stored => None,
            CompressionMethod::Deflated => Some(packed_size),
            other => {
                refuse(format!(
                    "expected a stored or deflated entry, found {other}"
                ));
                continue;
            }
        };
        if packed.is_none() && size != packed_size {
            refuse(format!(
                "expected the same length twice for a stored entry, found {size} and {packed_size}"
            ));
            continue;
        }
        let Some(offset) = entry.data_start() else {
            refuse("expected its data in the archive, found none".into());
            continue;
        };
        if packed_size > len.saturating_sub(offset) {
            refuse(format!(
                "expected {packed_size} bytes at byte {offset}, the file ends at {len}: it is truncated, fetch it again"
            ));
            continue;
        }
        let storage = Storage {
            entry: name.clone(),
            part: 0,
            offset,
            len_bytes: size,
            packed,
            crc: Some(entry.crc32()),
        };
        entries.insert(name, (at, storage));
    }
    let in_file = |storage: &Storage| storage.packed.unwrap_or(storage.len_bytes);
    let mut order: Vec<&Storage> = entries.values().map(|(_, storage)| storage).collect();
    order.retain(|storage| in_file(storage) > 0);
    order.sort_by_key(|storage| (storage.offset, in_file(storage)));
    for pair in order.windows(2) {
        let end = pair[0].offset + in_file(pair[0]);
        if end > pair[1].offset {
            problems.push(format!(
                "{}: expected to begin behind {}, which ends at byte {end}, found byte {}",
                pair[1].entry, pair[0].entry, pair[1].offset
            ));
        }
    }
    if problems.is_empty() {
        Ok(entries)
    } else {
        Err(CheckpointError::Directory { problems })
    }
}

/// Reads directory and pickle of a zip checkpoint.
fn unpickle_zip(file: &File, len: u64) -> Result<Unpickled, CheckpointError> {
    let mut archive = ZipArchive::new(file).map_err(CheckpointError::Zip)?;
    let entries = directory(&mut archive, len)?;
    let pickles: Vec<&String> = entries
        .keys()
        .filter(|name| name.ends_with("/data.pkl") && name.matches('/').count() == 1)
        .collect();
    let pickle_name = match pickles.as_slice() {
        [one] => (*one).clone(),
        other => {
            let found = other.len();
            return Err(CheckpointError::Entry {
                entry: "data.pkl".into(),
                problem: format!("expected one in the archive, found {found}"),
            });
        }
    };
    let folder = pickle_name
        .strip_suffix("data.pkl")
        .unwrap_or_default()
        .to_owned();
    if let Some(&(at, _)) = entries.get(&format!("{folder}byteorder")) {
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
    let bytes = read_entry(&mut archive, entries[&pickle_name].0, MAX_PICKLE_BYTES)?;
    let pickled = pickle::read(&bytes).map_err(|source| CheckpointError::Pickle {
        entry: pickle_name.clone(),
        source,
    })?;
    let data = format!("{folder}data/");
    let lookup = entries
        .into_iter()
        .filter_map(|(name, (_, storage))| Some((name.strip_prefix(&data)?.to_owned(), storage)))
        .collect();
    Ok(Unpickled {
        pickled,
        container: Container::TorchZip,
        lookup,
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
fn unpickle_legacy(file: &File, len: u64) -> Result<Unpickled, CheckpointError> {
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
    check_legacy_version(&pickles[1])?;
    check_legacy_system(&pickles[2])?;
    let mut pickles = pickles.drain(3..);
    let (Some(contents), Some(keys)) = (pickles.next(), pickles.next()) else {
        unreachable!("five pickles were read");
    };
    let declared = declared_storages(&contents);
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
        if storages.contains_key(key) {
            return Err(CheckpointError::Entry {
                entry,
                problem: "expected once in the list of storages, found twice".into(),
            });
        }
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
        let storage = Storage {
            entry,
            part: 0,
            offset: at,
            len_bytes,
            packed: None,
            crc: None,
        };
        storages.insert(key.clone(), storage);
        at += len_bytes;
    }
    drop(declared);
    Ok(Unpickled {
        pickled: contents,
        container: Container::TorchLegacy,
        lookup: storages,
    })
}

fn check_legacy_system(pickled: &Pickled) -> Result<(), CheckpointError> {
    let order = pickled.item(pickled.root, "little_endian");
    match order.map(|id| pickled.get(id)) {
        Some(Value::Bool(false)) => Err(CheckpointError::Entry {
            entry: "system".into(),
            problem: "expected little_endian, found big-endian numbers".into(),
        }),
        _ => Ok(()),
    }
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

/// Finds the storages of tensors.
pub(super) struct Placer<'u> {
    unpickled: &'u Unpickled,
    /// Those that were found, in the order they were asked for.
    pub(super) storages: Vec<Storage>,
    by_key: BTreeMap<&'u str, usize>,
}

impl<'u> Placer<'u> {
    pub(super) fn new(unpickled: &'u Unpickled) -> Placer<'u> {
        Placer {
            unpickled,
            storages: Vec::new(),
            by_key: BTreeMap::new(),
        }
    }

    fn storage(&mut self, key: &str) -> Option<usize> {
        if let Some(&at) = self.by_key.get(key) {
            return Some(at);
        }
        let (key, found) = self.unpickled.lookup.get_key_value(key)?;
        self.storages.push(found.clone());
        self.by_key.insert(key, self.storages.len() - 1);
        Some(self.storages.len() - 1)
    }

    /// Compares a tensor with its storage; what is wrong as text.
    pub(super) fn place(&mut self, tensor: &TensorValue) -> Result<View, String> {
        let TensorValue {
            storage,
            offset,
            shape,
            strides,
        } = tensor;
        let Some(at) = self.storage(&storage.key) else {
            return Err(format!(
                "expected its numbers in storage {}, which is missing from the file",
                storage.key
            ));
        };
        let size = storage.dtype.len_bytes();
        let found = self.storages[at].len_bytes;
        if storage.elements.checked_mul(size) != Some(found) {
            return Err(format!(
                "expected {} elements of {size} bytes in {}, found {found} bytes",
                storage.elements, self.storages[at].entry
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
                if reach <= storage.elements
                    && elements <= storage.elements.saturating_mul(4096) => {}
            _ => {
                return Err(format!(
                    "expected a view within {} elements, found shape {shape:?}, strides {strides:?}, offset {offset}",
                    storage.elements
                ));
            }
        }
        Ok(View {
            dtype: storage.dtype,
            shape: shape.clone(),
            strides: strides.clone(),
            offset: *offset,
            storage: at,
        })
    }
}
