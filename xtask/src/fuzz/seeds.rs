//! Small valid inputs for every fuzz target, so that a run begins behind the first checks.

use std::fs;
use std::path::Path;

use ndarray::Array3;
use rtfmri::slices::SliceVendor;
use rtfmri::{PatientTag, Volume, VolumeHeader, enhanced, mosaic, nifti, slices};

use super::{FuzzError, write};
use crate::synth::container::Container;
use crate::synth::pickle::{Value, pickle};

/// Writes the seeds of a target into its corpus.
pub(super) fn write_all(target: &str, corpus: &Path) -> Result<(), FuzzError> {
    fs::create_dir_all(corpus).map_err(|source| FuzzError::Write {
        path: corpus.into(),
        source,
    })?;
    for (name, bytes) in seeds(target) {
        write(&corpus.join(name), &bytes)?;
    }
    Ok(())
}

fn seeds(target: &str) -> Vec<(&'static str, Vec<u8>)> {
    match target {
        "torch_pickle" => vec![
            ("checkpoint", pickle(&checkpoint())),
            ("weights", pickle(&weights())),
            ("opcodes", OPCODES.to_vec()),
        ],
        "torch_zip" => vec![("checkpoint", archive())],
        "torch_legacy" => vec![("checkpoint", legacy())],
        "safetensors" => vec![("tensors", safetensors())],
        "manifest" => vec![("manifest", MANIFEST.as_bytes().to_vec())],
        "vocabulary" => vec![
            ("clip", CLIP.as_bytes().to_vec()),
            ("words", WORDS.as_bytes().to_vec()),
            (
                "text",
                "a photo of the Cafe\u{301}, it's 12 &amp; \u{4f60}".into(),
            ),
        ],
        "pool" => vec![("pool", pool())],
        "trigger_bytes" => vec![
            (
                "single",
                b"5t\xff\x0a\0\0\0\0\x005\x001\x085\x645\x05".to_vec(),
            ),
            (
                "framed",
                b"\xb0\xb0\xff\x0a\x01k\x04\0\x21k\0\xb0\x01k\0\0\0\0\0\0\0k\xc8\xb0\0".to_vec(),
            ),
        ],
        "dicom" => dicom(),
        "nifti" => nifti(),
        _ => Vec::new(),
    }
}

/// Opcodes that `torch.save` does not write but Python can: protocol 4, frames, short text, sets, bytes.
const OPCODES: &[u8] = b"\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94K\x01\x8c\x01b\x94C\x02xy\x94\x8c\x01c\x94\x8f\x94(K\x01K\x02\x90\x8c\x01d]\x94(N\x88\x89G?\xe0\x00\x00\x00\x00\x00\x00e\x8c\x01e\x8a\x02\x00\x01u.";

/// `_rebuild_tensor_v2` of a row-major tensor that fills its storage.
fn tensor(key: &str, storage: &'static str, shape: [i64; 2]) -> Value {
    let [rows, columns] = shape;
    let storage = Value::Persistent(Box::new(Value::Tuple(vec![
        Value::text("storage"),
        Value::Global("torch", storage),
        Value::text(key),
        Value::text("cpu"),
        Value::Int(rows * columns),
    ])));
    Value::Call(
        Box::new(Value::Global("torch._utils", "_rebuild_tensor_v2")),
        vec![
            storage,
            Value::Int(0),
            Value::Tuple(vec![Value::Int(rows), Value::Int(columns)]),
            Value::Tuple(vec![Value::Int(columns), Value::Int(1)]),
            Value::Bool(false),
            Value::Ordered(Vec::new(), None),
        ],
    )
}

/// Two tensors: 48 bytes of half precision in storage 0, 64 bytes of single precision in storage 1.
fn weights() -> Value {
    let entries = vec![
        (
            Value::text("layer.weight"),
            tensor("0", "HalfStorage", [4, 6]),
        ),
        (
            Value::text("layer.bias"),
            tensor("1", "FloatStorage", [16, 1]),
        ),
    ];
    Value::Ordered(entries, None)
}

fn checkpoint() -> Value {
    let function = Value::Call(
        Box::new(Value::Global("__builtin__", "getattr")),
        vec![
            Value::Global("torch.optim.lr_scheduler", "OneCycleLR"),
            Value::text("_annealing_cos"),
        ],
    );
    Value::dict([
        ("epoch", Value::Int(149)),
        ("model_state_dict", weights()),
        ("lr_scheduler", Value::dict([("anneal", function)])),
        ("lrs", Value::List(vec![Value::Float(0.5), Value::None])),
    ])
}

fn archive() -> Vec<u8> {
    let mut container = Container::new(Vec::new(), "archive");
    let written = container
        .bytes("data.pkl", &pickle(&checkpoint()))
        .and_then(|()| container.bytes("byteorder", b"little"))
        .and_then(|()| container.bytes("data/0", &[0x3c; 48]))
        .and_then(|()| container.bytes("data/1", &[0x40; 64]))
        .and_then(|()| container.finish());
    // Writing into memory cannot fail.
    written.map_or_else(|_| Vec::new(), |(bytes, _)| bytes)
}

/// What follows magic number, protocol and system: contents, keys of storages, storages.
fn legacy() -> Vec<u8> {
    let mut bytes = pickle(&checkpoint());
    let keys = Value::List(vec![Value::text("0"), Value::text("1")]);
    bytes.extend_from_slice(&pickle(&keys));
    bytes.extend_from_slice(&24_u64.to_le_bytes());
    bytes.extend_from_slice(&[0x3c; 48]);
    bytes.extend_from_slice(&16_u64.to_le_bytes());
    bytes.extend_from_slice(&[0x40; 64]);
    bytes
}

/// Behind two bytes of header length, as the target takes it.
fn safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[4],"data_offsets":[12,28]},"c":{"dtype":"I64","shape":[],"data_offsets":[28,36]}}"#;
    let len = u16::try_from(header.len()).unwrap_or(u16::MAX);
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&[0x3c; 36]);
    bytes
}

/// A manifest with every kind of entry.
const MANIFEST: &str = include_str!("manifest.json");

/// Vocabulary files of a bundle, and a text behind a zero.
const CLIP: &str =
    "{\"kind\":\"clip_bpe\",\"merges\":[\"t h\",\"th e</w>\",\"i n\",\"in g</w>\"]}\0the thing";
const WORDS: &str = "{\"kind\":\"word_piece\",\"tokens\":[\"[PAD]\",\"[UNK]\",\"[CLS]\",\"[SEP]\",\"a\",\"##s\",\"the\"],\"unknown\":\"[UNK]\",\"start\":\"[CLS]\",\"end\":\"[SEP]\",\"pad\":\"[PAD]\",\"other_special\":[],\"lowercase\":true,\"strip_accents\":true,\"split_chinese\":true,\"longest_word\":20}\0as the";

/// Two pictures of one token of four values; the target itself puts the digest right.
fn pool() -> Vec<u8> {
    let mut bytes = b"AFPOOL\r\n".to_vec();
    for word in [1_u32, 1, 4, 0, 1, 0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for word in [2_u64, 4, 7, 0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.resize(4096, 0);
    bytes.extend_from_slice(b"a\nb\n");
    bytes.resize(8192, 0);
    for number in [0.5_f32, 0.0, 0.25, 0.0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.resize(12_288, 0);
    bytes.extend_from_slice(&[0x3c; 16]);
    bytes
}

/// One volume of 3 slices with slice times.
fn volume() -> Volume {
    Volume {
        voxels: Array3::from_elem((3, 4, 5), 7.0),
        affine_lps: [
            [3.0, 0.0, 0.0, -7.0],
            [0.0, 3.0, 0.0, -5.0],
            [0.0, 0.0, 4.0, 1.0],
            [0.0, 0.0, 0.0, 1.0],
        ],
        header: VolumeHeader {
            series_uid: mosaic::series_uid(1),
            patient: PatientTag::default(),
            acquisition: 2,
            instance: Some(2),
            tr_ms: 900.0,
            slice_times_ms: Some(vec![0.0, 600.0, 300.0]),
            time_ms: Some(36_000_000.0),
        },
    }
}

/// A file of each kind that is read.
fn dicom() -> Vec<(&'static str, Vec<u8>)> {
    let volume = volume();
    let mut seeds = Vec::new();
    seeds.extend(mosaic::encode(&volume).map(|bytes| ("mosaic", bytes)));
    seeds.extend(enhanced::encode(&volume).map(|bytes| ("enhanced", bytes)));
    for (name, vendor) in [("ge", SliceVendor::Ge), ("philips", SliceVendor::Philips)] {
        let files = slices::encode(&volume, vendor).unwrap_or_default();
        seeds.extend(files.into_iter().take(1).map(|bytes| (name, bytes)));
    }
    seeds
}

/// Packed, and the header alone of the plain form.
fn nifti() -> Vec<(&'static str, Vec<u8>)> {
    let affine = [
        [3.0, 0.0, 0.0, -7.0],
        [0.0, 3.0, 0.0, -5.0],
        [0.0, 0.0, 4.0, 1.0],
        [0.0, 0.0, 0.0, 1.0],
    ];
    let packed = nifti::write(&Array3::from_elem((3, 4, 5), 1), &affine);
    let mut plain = vec![0; 352 + 2];
    plain[..4].copy_from_slice(&348_i32.to_le_bytes());
    for (at, value) in [(40, 3_i16), (42, 2), (44, 1), (46, 1), (70, 2), (254, 1)] {
        plain[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    for at in [280, 300, 320] {
        plain[at..at + 4].copy_from_slice(&2_f32.to_le_bytes());
    }
    plain[344..348].copy_from_slice(b"n+1\0");
    let mut seeds = vec![("plain", plain)];
    seeds.extend(packed.map(|bytes| ("packed", bytes)));
    seeds
}
