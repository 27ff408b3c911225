//! The zip container: its directory, and the pickle in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use zip::{CompressionMethod, ZipArchive};

use super::super::storage::Storage;
use super::super::{CheckpointError, Container, pickle};
use super::{MAX_PICKLE_BYTES, Unpickled};
use crate::section::chain;

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
pub(super) fn unpickle(file: &File, len: u64) -> Result<Unpickled, CheckpointError> {
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
