//! The decoder of quick previews, against the original class at a small width.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};

use bundle::StageName;
use decoder::{Runtime, Stage};
use export::check::Vectors;
use export::export::export;
use export::plan::Plan;
use export::section::chain;
use ndarray::ArrayD;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// Single precision, 31 convolutions, values of about a half; measured 1e-7.
const CLOSE: f32 = 1e-5;
/// Half precision: eleven bits, as many convolutions.
const HALF: f32 = 1e-2;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/preview")
}

fn bundled(weights: &Path, precision: &str, dir: &Path) -> Result<PathBuf, String> {
    let recipe = dir.join("recipe.toml");
    let text = format!(
        "precision = \"{precision}\"\n[sources]\npreview = {weights:?}\n[settings]\nlatent_hw = [3, 2]\n"
    );
    fs::write(&recipe, text).unwrap();
    let out = dir.join("bundle");
    let exported = export(&Plan::from_recipe(&recipe).unwrap(), &out, &mut |_| {});
    exported.map_err(|error| chain(&error)).map(|_| out)
}

fn farthest(bundle: &Path) -> f32 {
    let vectors = Vectors::read(&data(), "preview").unwrap().unwrap();
    let library = decoder::runtime::find_library(None).unwrap();
    let runtime = Runtime::load(&library, 1).unwrap();
    let bundle = bundle::open(bundle).unwrap().verify_hashes().unwrap();
    let spec = &bundle.manifest().stages[&StageName::PreviewDecoder];
    let stage = Stage::open(&runtime, &bundle, spec).unwrap();
    let latent = vectors.floats("latent").unwrap();
    let mut outputs = stage.run(&[("latent", latent.view())]).unwrap();
    let (found, expected) = (
        outputs.remove("image").unwrap(),
        vectors.floats("image").unwrap(),
    );
    assert_eq!(found.shape(), expected.shape());
    let apart: ArrayD<f32> = (found - expected).mapv(f32::abs);
    apart.iter().copied().fold(0.0, f32::max)
}

#[test]
fn both_spellings_paint_what_the_original_paints() {
    for name in [
        "taesdxl_decoder.safetensors",
        "taesdxl_diffusers.safetensors",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let bundle = bundled(&data().join(name), "fp32", dir.path()).unwrap();
        let apart = farthest(&bundle);
        assert!(apart <= CLOSE, "{name}: {apart}");
    }
}

#[test]
fn half_precision_paints_nearly_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let weights = data().join("taesdxl_decoder.safetensors");
    let apart = farthest(&bundled(&weights, "fp16", dir.path()).unwrap());
    assert!(apart <= HALF, "{apart}");
}

/// The fixture with some keys renamed or left out.
fn altered(dir: &Path, rename: impl Fn(&str) -> Option<String>) -> PathBuf {
    let bytes = fs::read(data().join("taesdxl_decoder.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<(String, TensorView<'_>)> = tensors
        .tensors()
        .into_iter()
        .filter_map(|(name, view)| Some((rename(&name)?, view)))
        .collect();
    let path = dir.join("taesdxl_altered.safetensors");
    fs::write(&path, safetensors::serialize(kept, None).unwrap()).unwrap();
    path
}

#[test]
fn a_damaged_decoder_is_refused_by_key() {
    for (missing, expected) in [
        (
            "1.weight",
            "1.weight: expected a tensor of 4 axes, the key is missing",
        ),
        (
            "3.conv.2.bias",
            "3.conv.2.bias: expected shape [5], the key is missing",
        ),
        ("8.", "8: expected a block (8.conv.0.weight)"),
        ("7.weight", "6: expected a block (6.conv.0.weight)"),
        ("19.", "19: expected a block"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let keep = |name: &str| (!name.starts_with(missing)).then(|| name.to_owned());
        let weights = altered(dir.path(), keep);
        let message = bundled(&weights, "fp32", dir.path()).expect_err(missing);
        assert!(message.contains(expected), "{missing}: {message}");
        assert!(!dir.path().join("bundle").exists());
    }
    let dir = tempfile::tempdir().unwrap();
    // A variant with a part that this program does not know, as TAEF2 has.
    let weights = altered(dir.path(), |name| {
        Some(if name == "18.conv.4.bias" {
            "18.pool.0.weight".into()
        } else {
            name.into()
        })
    });
    let message = bundled(&weights, "fp32", dir.path()).expect_err("refused");
    assert!(
        message.contains("18.pool.0.weight: no part of the network knows"),
        "{message}"
    );
}
