//! The header of a safetensors file, with every rule of the format checked.
//!
//! Eight bytes of header length, a JSON object of `name: {dtype, shape, data_offsets}`, then the
//! numbers. The ranges must cover the rest of the file without holes or overlaps.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::storage::Storage;
use super::tensor::{Entry, View};
use super::{CheckpointError, Container, Contents, TensorDType};

/// Longest header, as the reference implementation has it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most axes of a tensor.
const MAX_AXES: usize = 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    dtype: String,
    #[serde(deserialize_with = "axes")]
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Lengths of at most [`MAX_AXES`] axes.
fn axes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Axes;
    impl<'de> Visitor<'de> for Axes {
        type Value = Vec<u64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX_AXES} lengths")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
            let mut axes = Vec::new();
            while let Some(len) = seq.next_element()? {
                if axes.len() == MAX_AXES {
                    return Err(A::Error::invalid_length(MAX_AXES + 1, &self));
                }
                axes.push(len);
            }
            Ok(axes)
        }
    }
    deserializer.deserialize_seq(Axes)
}

/// Members of a JSON object in file order, unread; duplicates are kept so that they can be refused.
pub(super) struct Members(pub(super) Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

/// Reads and checks the header.
pub(super) fn read(file: &File, len: u64) -> Result<Contents, CheckpointError> {
    let refuse = |problem: String| CheckpointError::Header {
        problems: vec![problem],
    };
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0)?;
    let header_len = u64::from_le_bytes(prefix);
    let room = len.saturating_sub(8);
    if header_len > MAX_HEADER_BYTES || header_len > room {
        let limit = MAX_HEADER_BYTES.min(room);
        return Err(refuse(format!(
            "expected a header of at most {limit} bytes, found a length of {header_len}"
        )));
    }
    let mut bytes = vec![0; usize::try_from(header_len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 8)?;
    let Members(entries) = serde_json::from_slice(&bytes)
        .map_err(|error| refuse(format!("expected a JSON object, found: {error}")))?;
    let data_len = room - header_len;
    let mut problems = Vec::new();
    let mut tensors = BTreeMap::new();
    let mut storages: Vec<Storage> = Vec::new();
    for (name, json) in entries {
        if name == "__metadata__" {
            if let Err(error) = serde_json::from_str::<BTreeMap<String, String>>(json.get()) {
                problems.push(format!("__metadata__: expected texts by name: {error}"));
            }
            continue;
        }
        match entry(&json, data_len) {
            Ok((dtype, shape, [begin, end])) => {
                storages.push(Storage {
                    entry: name.clone(),
                    part: 0,
                    offset: 8 + header_len + begin,
                    len_bytes: end - begin,
                    packed: None,
                    crc: None,
                });
                let entry = Entry::of(View::row_major(dtype, &shape, 0, storages.len() - 1));
                if tensors.insert(name.clone(), entry).is_some() {
                    problems.push(format!("{name}: expected each name once, found it twice"));
                }
            }
            Err(problem) => problems.push(format!("{name}: {problem}")),
        }
    }
    if problems.is_empty() {
        problems.extend(uncovered(&storages, 8 + header_len, len));
    }
    if !problems.is_empty() {
        return Err(CheckpointError::Header { problems });
    }
    let top = tensors.keys().cloned().collect();
    Ok(Contents {
        container: Container::Safetensors,
        storages,
        sections: BTreeMap::from([(String::new(), tensors)]),
        top,
    })
}

fn entry(json: &RawValue, data_len: u64) -> Result<(TensorDType, Vec<u64>, [u64; 2]), String> {
    let described: Described = serde_json::from_str(json.get())
        .map_err(|error| format!("expected dtype, shape and data_offsets: {error}"))?;
    let dtype = match described.dtype.as_str() {
        "F16" => TensorDType::F16,
        "BF16" => TensorDType::BF16,
        "F32" => TensorDType::F32,
        "F64" => TensorDType::F64,
        "I64" => TensorDType::I64,
        "I32" => TensorDType::I32,
        "I16" => TensorDType::I16,
        "I8" => TensorDType::I8,
        "U8" => TensorDType::U8,
        "BOOL" => TensorDType::Bool,
        other => return Err(format!("expected a known dtype, found {other:?}")),
    };
    let [begin, end] = described.data_offsets;
    if begin > end || end > data_len {
        return Err(format!(
            "expected data_offsets within 0..={data_len}, found {begin}..{end}"
        ));
    }
    let size = described
        .shape
        .iter()
        .try_fold(dtype.len_bytes(), |size, &len| size.checked_mul(len));
    if size != Some(end - begin) {
        return Err(format!(
            "expected {} bytes for {dtype} {:?}, found {}",
            size.map_or("countless".into(), |size| size.to_string()),
            described.shape,
            end - begin
        ));
    }
    Ok((dtype, described.shape, [begin, end]))
}

/// Holes, overlaps and bytes behind the last tensor.
fn uncovered(storages: &[Storage], start: u64, end: u64) -> Vec<String> {
    let mut order: Vec<&Storage> = storages.iter().collect();
    order.sort_by_key(|storage| (storage.offset, storage.len_bytes));
    let mut at = start;
    let mut problems = Vec::new();
    for storage in order {
        if storage.offset != at {
            let what = if storage.offset < at {
                "an overlap"
            } else {
                "a hole"
            };
            problems.push(format!(
                "{}: expected to begin at byte {at}, found {what} at byte {}",
                storage.entry, storage.offset
            ));
        }
        at = storage.offset + storage.len_bytes;
    }
    if problems.is_empty() && at != end {
        problems.push(format!(
            "expected the file to end at byte {at}, found {end}"
        ));
    }
    problems
}
