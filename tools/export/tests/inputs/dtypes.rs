//! Mixtures of element types in every container.

use std::path::Path;

use export::checkpoint::{Checkpoint, TensorDType, inspect};

use crate::write::{Py, Saved, safetensors, text};
use crate::{file, refused, root};

const FLOATS: [TensorDType; 4] = [
    TensorDType::BF16,
    TensorDType::F16,
    TensorDType::F32,
    TensorDType::F64,
];

/// Numbers that every type holds exactly.
fn values() -> Vec<f64> {
    vec![0.0, -1.5, 2.0, 0.25, 96.0, -0.0078125]
}

fn expect_mixture(path: &Path) {
    let checkpoint = Checkpoint::open(path).unwrap();
    for (name, tensor) in checkpoint.root() {
        assert_eq!(tensor.dtype().to_string(), name);
        assert_eq!(tensor.shape(), [2, 3]);
        #[expect(clippy::cast_possible_truncation, reason = "exact in single precision")]
        let expected: Vec<f32> = values().iter().map(|&value| value as f32).collect();
        assert_eq!(tensor.read_f32().unwrap(), expected, "{name}");
    }
    assert_eq!(checkpoint.root().len(), FLOATS.len());
    let shown = inspect::render(&checkpoint);
    for dtype in FLOATS {
        let line = format!("  {dtype:<9} in 1 tensors, {} bytes", 6 * dtype.len_bytes());
        assert!(shown.contains(&line), "{line}\n{shown}");
    }
}

#[test]
fn every_float_type_is_read_from_every_container() {
    let dir = tempfile::tempdir().unwrap();
    let names = FLOATS.map(|dtype| dtype.to_string());
    let tensors: Vec<(&str, TensorDType, &[i64], Vec<f64>)> = names
        .iter()
        .zip(FLOATS)
        .map(|(name, dtype)| (name.as_str(), dtype, [2_i64, 3].as_slice(), values()))
        .collect();
    let saved = Saved::tensors(&tensors);
    expect_mixture(&file(&dir, "a.pth", &saved.zip()));
    expect_mixture(&file(&dir, "b.pth", &saved.legacy()));
    expect_mixture(&file(&dir, "c.safetensors", &safetensors(&tensors)));
    let packed = saved.zip_of(zip::CompressionMethod::Deflated, "little");
    expect_mixture(&file(&dir, "d.pth", &packed));
}

#[test]
fn double_precision_streams_in_order_over_many_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let numbers: Vec<f64> = (0..300_007).map(f64::from).collect();
    let tensors: [(&str, TensorDType, &[i64], Vec<f64>); 1] =
        [("x", TensorDType::F64, &[300_007], numbers)];
    let saved = Saved::tensors(&tensors);
    for (name, bytes) in [
        ("a.pth", saved.zip()),
        (
            "b.pth",
            saved.zip_of(zip::CompressionMethod::Deflated, "little"),
        ),
        ("c.pth", saved.legacy()),
        ("d.safetensors", safetensors(&tensors)),
    ] {
        let checkpoint = Checkpoint::open(&file(&dir, name, &bytes)).unwrap();
        let mut next = 0_u32;
        let (_, tensor) = checkpoint.root().remove(0);
        tensor
            .for_each_f32_chunk(|offset, values| {
                assert_eq!(offset, u64::from(next));
                for &value in values {
                    assert_eq!(f64::from(value), f64::from(next));
                    next += 1;
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(next, 300_007, "{name}");
    }
}

#[test]
fn views_into_one_compressed_storage_read_their_own_part() {
    let dir = tempfile::tempdir().unwrap();
    let mut saved = Saved::tensors(&[(
        "all",
        TensorDType::F32,
        &[7],
        (0..7).map(f64::from).collect(),
    )]);
    let Py::Dict(items) = &mut saved.value else {
        unreachable!("a dictionary was made")
    };
    items.push((text("part"), Py::Tensor(0, 2, vec![3], vec![1])));
    items.push((text("turned"), Py::Tensor(0, 1, vec![2, 3], vec![1, 2])));
    for method in [
        zip::CompressionMethod::Stored,
        zip::CompressionMethod::Deflated,
    ] {
        let path = file(&dir, "a.pth", &saved.zip_of(method, "little"));
        let read = root(&Checkpoint::open(&path).unwrap());
        assert_eq!(read["part"], [2.0, 3.0, 4.0]);
        assert_eq!(read["turned"], [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
    }
}

#[test]
fn a_double_beyond_single_precision_is_not_finite() {
    let dir = tempfile::tempdir().unwrap();
    let tensors: [(&str, TensorDType, &[i64], Vec<f64>); 1] =
        [("linear1.weight", TensorDType::F64, &[2], vec![1.0, 1e300])];
    let path = file(&dir, "a.safetensors", &safetensors(&tensors));
    let read = root(&Checkpoint::open(&path).unwrap());
    assert_eq!(read["linear1.weight"], [1.0, f32::INFINITY]);
    // Whoever asks for it as a weight is told.
    let checkpoint = Checkpoint::open(&path).unwrap();
    let section = export::section::Section::new("a.safetensors", checkpoint.root());
    section.require("linear1.weight", &[2]);
    let problems: Vec<String> = section.problems().iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        ["a.safetensors: linear1.weight: expected finite values, found inf at flat index 1"]
    );
}

#[test]
fn numbers_of_the_other_byte_order_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved::tensors(&[("x", TensorDType::F32, &[1], vec![1.0])]);
    let big = saved.zip_of(zip::CompressionMethod::Stored, "big");
    let message = refused(&file(&dir, "a.pth", &big));
    assert!(
        message.contains("byteorder: expected little, found \"big\""),
        "{message}"
    );
    let message = refused(&file(&dir, "b.pth", &saved.legacy_of(1001, false)));
    assert!(message.contains("expected little_endian"), "{message}");
}
