//! Shards and their index.

use std::fs;
use std::path::Path;

use export::checkpoint::{Checkpoint, Container, TensorDType, inspect};

use crate::write::{Saved, safetensors};
use crate::{refused, root};

const INDEX: &str = "model.safetensors.index.json";

/// Two shards and an index with this weight map.
fn shards(dir: &Path, weight_map: &str) {
    let first = safetensors(&[
        ("a", TensorDType::F16, &[2], vec![1.0, 2.0]),
        ("b", TensorDType::F64, &[1, 1], vec![3.0]),
    ]);
    let second = safetensors(&[("c", TensorDType::BF16, &[3], vec![4.0, 5.0, 6.0])]);
    fs::write(dir.join("model-1.safetensors"), first).unwrap();
    fs::write(dir.join("model-2.safetensors"), second).unwrap();
    let index = format!(r#"{{"metadata": {{"total_size": 18}}, "weight_map": {weight_map}}}"#);
    fs::write(dir.join(INDEX), index).unwrap();
}

const WHOLE: &str =
    r#"{"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}"#;

#[test]
fn an_index_and_its_folder_open_as_one_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path(), WHOLE);
    for path in [dir.path().to_owned(), dir.path().join(INDEX)] {
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.container(), Container::Sharded);
        let read = root(&checkpoint);
        assert_eq!(read["a"], [1.0, 2.0]);
        assert_eq!(read["b"], [3.0]);
        assert_eq!(read["c"], [4.0, 5.0, 6.0]);
        let parts: Vec<&str> = checkpoint
            .parts()
            .iter()
            .map(|part| part.name.as_str())
            .collect();
        assert_eq!(parts, [INDEX, "model-1.safetensors", "model-2.safetensors"]);
        let tensors = checkpoint.root();
        assert_eq!(tensors[2].1.file_name(), "model-2.safetensors");
        let shown = inspect::render(&checkpoint);
        assert!(shown.starts_with("sharded container\n"), "{shown}");
        assert!(shown.contains("file: model-2.safetensors"), "{shown}");
    }
}

#[test]
fn shards_of_torch_files_open_too() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved::tensors(&[("a", TensorDType::F32, &[1], vec![7.0])]);
    fs::write(dir.path().join("pytorch_model-1.bin"), saved.zip()).unwrap();
    let index = r#"{"weight_map": {"a": "pytorch_model-1.bin"}}"#;
    fs::write(dir.path().join("pytorch_model.bin.index.json"), index).unwrap();
    assert_eq!(root(&Checkpoint::open(dir.path()).unwrap())["a"], [7.0]);
}

#[test]
fn everything_that_differs_from_the_index_is_in_one_report() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside.safetensors");
    fs::write(
        &outside,
        safetensors(&[("x", TensorDType::F32, &[1], vec![0.0])]),
    )
    .unwrap();
    let inner = dir.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let map = format!(
        r#"{{"a": "model-1.safetensors", "c": "model-1.safetensors", "d": "model-2.safetensors", "e": "model-3.safetensors",
            "x": "../outside.safetensors", "y": {outside:?}, "z": 5, "v": "sub/v.safetensors", "w": "", "u": ".",
            "a": "model-1.safetensors"}}"#
    );
    shards(&inner, &map);
    let message = refused(&inner);
    for expected in [
        "model-1.safetensors: b: expected only tensors of the index, found one that it does not list",
        "model-1.safetensors: c: expected here as the index says, found in model-2.safetensors",
        "model-2.safetensors: d: expected here as the index says, the key is missing",
        "model-3.safetensors: expected a shard with 1 tensors, the file is missing",
        "found \"../outside.safetensors\"",
        &format!("found {outside:?}"),
        "found \"sub/v.safetensors\"",
        "found \"\" for 1 tensors",
        "found \".\" for 1 tensors",
        "model.safetensors.index.json: z: expected the name of a file, found 5",
        "model.safetensors.index.json: a: expected each key once, found it twice",
    ] {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
    assert!(message.starts_with("11 problems in its files"), "{message}");
}

#[test]
fn a_damaged_shard_is_reported_with_the_others() {
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path(), WHOLE);
    let first = fs::read(dir.path().join("model-1.safetensors")).unwrap();
    fs::write(
        dir.path().join("model-1.safetensors"),
        &first[..first.len() - 1],
    )
    .unwrap();
    fs::write(dir.path().join("model-2.safetensors"), "<html>").unwrap();
    let message = refused(dir.path());
    assert!(
        message.contains("model-1.safetensors: the safetensors header is wrong"),
        "{message}"
    );
    assert!(
        message.contains("b: expected data_offsets within 0..=11, found 4..12"),
        "{message}"
    );
    assert!(
        message.contains("model-2.safetensors: expected a PyTorch zip"),
        "{message}"
    );
}

#[test]
fn a_wrong_index_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (text, expected) in [
        ("", "weight_map"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        (r#"{"weight_map": []}"#, "weight_map"),
        (
            r#"{"weight_map": {}}"#,
            "expected tensors in weight_map, found none",
        ),
        (r#"{"weight_map": {"a": "b""#, "weight_map"),
        ("\u{feff}{}", "weight_map"),
    ] {
        fs::write(dir.path().join(INDEX), text).unwrap();
        let message = refused(&dir.path().join(INDEX));
        assert!(
            message.contains(INDEX) && message.contains(expected),
            "{text}: {message}"
        );
    }
    fs::write(dir.path().join(INDEX), [0xff, 0xfe]).unwrap();
    assert!(refused(dir.path()).contains("expected text"));
}

#[test]
fn a_folder_that_is_no_checkpoint_is_told_by_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refused(dir.path()).contains("an empty folder"));
    fs::write(dir.path().join("notes.txt"), "").unwrap();
    assert!(refused(dir.path()).contains("found notes.txt"));
    shards(dir.path(), WHOLE);
    fs::write(dir.path().join("other.safetensors.index.json"), "{}").unwrap();
    let message = refused(dir.path());
    assert!(
        message.contains("several: model.safetensors.index.json, other"),
        "{message}"
    );
}
