//! The container of `torch.save` before 1.6: five pickles, then the storages one behind the other.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::super::pickle::{self, Pickled, Value};
use super::super::storage::Storage;
use super::super::{CheckpointError, Container};
use super::{MAX_PICKLE_BYTES, Unpickled};

/// Reads the pickles of a legacy checkpoint and finds its storages behind them.
pub(super) fn unpickle(file: &File, len: u64) -> Result<Unpickled, CheckpointError> {
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
