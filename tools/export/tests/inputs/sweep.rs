//! Every cut and every changed bit of a small file of each container: an error or the tensors,
//! never a panic.

use std::fs;
use std::path::Path;

use export::checkpoint::{Checkpoint, CheckpointError, TensorDType, inspect};
use zip::CompressionMethod;

use crate::write::{Saved, safetensors};

type Tensors = Vec<(String, Vec<f32>)>;

/// All tensors of all sections.
fn read(path: &Path) -> Result<Tensors, CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    assert!(!inspect::render(&checkpoint).is_empty());
    let sections: Vec<String> = checkpoint
        .sections()
        .map(|(name, _)| name.to_owned())
        .collect();
    let mut tensors = Vec::new();
    for section in sections {
        for (name, tensor) in checkpoint.section(&section)? {
            tensors.push((format!("{section}/{name}"), tensor.read_f32()?));
        }
    }
    Ok(tensors)
}

fn saved() -> Saved {
    let mut saved = Saved::tensors(&[("top", TensorDType::F32, &[2], vec![1.0, 2.0])]);
    let inner = saved.tensor(TensorDType::BF16, &[1, 2], &[3.0, 4.0]);
    let crate::write::Py::Dict(items) = &mut saved.value else {
        unreachable!("a dictionary was made")
    };
    items.push((
        crate::write::text("model"),
        crate::write::dict([("inner", inner)]),
    ));
    saved
}

/// Cuts the file at every length, then changes every bit of it; `checked` containers notice a
/// change or are none the worse for it.
fn sweep(bytes: &[u8], checked: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged");
    fs::write(&path, bytes).unwrap();
    let whole = read(&path).unwrap();
    for len in 0..bytes.len() {
        fs::write(&path, &bytes[..len]).unwrap();
        assert!(read(&path).is_err(), "a file cut at byte {len} was read");
    }
    let mut changed = bytes.to_vec();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            changed[at] ^= 1 << bit;
            fs::write(&path, &changed).unwrap();
            if let Ok(tensors) = read(&path)
                && checked
            {
                assert_eq!(tensors, whole, "bit {bit} of byte {at} was not noticed");
            }
            changed[at] = bytes[at];
        }
    }
}

#[test]
fn a_damaged_zip_is_refused_or_read_as_it_was() {
    sweep(&saved().zip(), true);
}

#[test]
fn a_damaged_compressed_zip_is_refused_or_read_as_it_was() {
    sweep(&saved().zip_of(CompressionMethod::Deflated, "little"), true);
}

#[test]
fn a_damaged_legacy_file_never_crashes_the_reader() {
    sweep(&saved().legacy(), false);
}

#[test]
fn a_damaged_safetensors_file_never_crashes_the_reader() {
    let bytes = safetensors(&[
        ("a", TensorDType::F64, &[2], vec![1.0, 2.0]),
        ("b", TensorDType::F16, &[1, 3], vec![3.0, 4.0, 5.0]),
    ]);
    sweep(&bytes, false);
}

/// Every file of a folder in turn, cut and changed here and there.
fn sweep_folder(from: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    let mut folders = vec![from.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let to = dir.path().join(path.strip_prefix(from).unwrap());
            if path.is_dir() {
                fs::create_dir(&to).unwrap();
                folders.push(path);
            } else {
                fs::copy(&path, &to).unwrap();
                files.push(to);
            }
        }
    }
    let whole = read(dir.path()).unwrap();
    for file in files {
        let bytes = fs::read(&file).unwrap();
        for at in (0..bytes.len()).step_by(7) {
            fs::write(&file, &bytes[..at]).unwrap();
            assert!(
                read(dir.path()).is_err(),
                "{} cut at byte {at} was read",
                file.display()
            );
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            fs::write(&file, &changed).unwrap();
            if let Ok(tensors) = read(dir.path()) {
                assert_eq!(tensors, whole, "byte {at} of {}", file.display());
            }
        }
        fs::write(&file, &bytes).unwrap();
    }
}

#[test]
fn a_damaged_zero_folder_is_refused_or_read_as_it_was() {
    sweep_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/zero/stage2"));
}

#[test]
fn a_damaged_index_never_crashes_the_reader() {
    let dir = tempfile::tempdir().unwrap();
    let shard = safetensors(&[("a", TensorDType::F32, &[1], vec![1.0])]);
    fs::write(dir.path().join("s.safetensors"), shard).unwrap();
    let index = dir.path().join("m.safetensors.index.json");
    let text = br#"{"metadata": {}, "weight_map": {"a": "s.safetensors"}}"#;
    for at in 0..text.len() {
        fs::write(&index, &text[..at]).unwrap();
        assert!(read(&index).is_err(), "an index cut at byte {at} was read");
        for bit in 0..8 {
            let mut changed = text.to_vec();
            changed[at] ^= 1 << bit;
            fs::write(&index, &changed).unwrap();
            if let Ok(tensors) = read(&index) {
                assert_eq!(tensors, [("/a".to_owned(), vec![1.0])]);
            }
        }
    }
}
