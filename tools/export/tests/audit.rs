//! fp16 bundles of checkpoints that fp16 alone would spoil.
//!
//! The checkpoints are the reference set's SDXL engine with the convolutions of its autoencoder's last
//! blocks multiplied by a power of two: group norms take the factor away again, so that the picture is
//! the same in fp32, and what flows between is out of fp16's range, as in the released SDXL VAE. The
//! set lies beside the repository (`../shared/golden`); a clone without it says so and passes.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bundle::{Bundle, Precision, StageName};
use decoder::{Noise, NoiseKey, Range, Runtime, Stage, Stream, Tier};
use export::export::{ExportError, Report, export};
use export::plan::Plan;
use export::section::chain;
use ndarray::ArrayD;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};

const DECODER: &str = "first_stage_model.decoder.";
/// PSNR that an fp16 picture must have with the fp32 one, dB.
const PSNR_DB: f64 = 35.0;

fn golden() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if path.is_dir() {
        return Some(path.canonicalize().unwrap());
    }
    eprintln!("not compared: the reference set ../shared/golden was not found");
    None
}

/// The SDXL engine of the reference set in fp32, each tensor's numbers changed by `change`.
fn engine(golden: &Path, folder: &Path, change: impl Fn(&str, &mut f32)) {
    let bytes = fs::read(golden.join("sd_xl_base_tiny.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut changed: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, view) in tensors.tensors() {
        let mut values: Vec<f32> = match view.dtype() {
            Dtype::F16 => view
                .data()
                .chunks_exact(2)
                .map(|pair| half::f16::from_le_bytes([pair[0], pair[1]]).to_f32())
                .collect(),
            Dtype::F32 => view
                .data()
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
                .collect(),
            // Tables of integers, which no network reads.
            _ => continue,
        };
        values.iter_mut().for_each(|value| change(&name, value));
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        changed.insert(name, (view.shape().to_vec(), bytes));
    }
    let views: BTreeMap<&str, TensorView<'_>> = changed
        .iter()
        .map(|(name, (shape, bytes))| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
            (name.as_str(), view)
        })
        .collect();
    fs::create_dir_all(folder).unwrap();
    serialize_to_file(views, None, &folder.join("sd_xl_base_tiny.safetensors")).unwrap();
    fs::copy(golden.join("config.json"), folder.join("config.json")).unwrap();
}

/// Multiplies everything that is added up in the decoder's last blocks by `factor`.
fn scaled(factor: f32) -> impl Fn(&str, &mut f32) {
    move |name, value| {
        let Some(key) = name.strip_prefix(DECODER) else {
            return;
        };
        let enters = key.starts_with("up.1.upsample.conv.");
        let adds = key.starts_with("up.0.block.")
            && (key.contains(".conv2.") || key.ends_with(".nin_shortcut.bias"));
        if enters || adds {
            *value *= factor;
        }
    }
}

fn exported(
    folder: &Path,
    precision: Precision,
    audit: bool,
    out: &Path,
) -> Result<Report, ExportError> {
    let mut plan = Plan::from_folder(folder, precision, false).unwrap();
    plan.audit = audit;
    export(&plan, out, &mut |_| {})
}

fn opened(dir: &Path) -> Bundle {
    bundle::open(dir).unwrap().verify_hashes().unwrap()
}

fn runtime() -> Runtime {
    let library = decoder::runtime::find_library(None).unwrap();
    Runtime::load(&library, 2).unwrap()
}

/// Raw pictures of latents that the audit never saw; with every intermediate rounded where asked.
fn decoded(bundle: &Bundle, rounded: bool) -> ArrayD<f32> {
    let spec = &bundle.manifest().stages[&StageName::RefinerVaeDecoder];
    let graph = fs::read(bundle.dir().join(&spec.graph)).unwrap();
    let graph = if rounded {
        export::audit::emulated(&graph).unwrap()
    } else {
        graph
    };
    let stage = Stage::open_as_written(&runtime(), bundle.dir(), spec, &graph).unwrap();
    let key = NoiseKey {
        session_seed: 1234,
        run: 1,
        trial: 1,
        tier: Tier::End,
    };
    let latents = Noise::new(key, Stream::Unclip).draw(&[2, 4, 16, 16]) / 0.13025;
    let inputs = [("latent", latents.view())];
    stage
        .run_unchecked(&inputs)
        .unwrap()
        .remove("image")
        .unwrap()
}

fn psnr_db(found: &ArrayD<f32>, expected: &ArrayD<f32>) -> f64 {
    let squares = found.iter().zip(expected).map(|(&found, &expected)| {
        let picture = |value| f64::from(Range::SYMMETRIC.apply(value));
        (picture(found) - picture(expected)).powi(2)
    });
    let mean = squares.sum::<f64>() / expected.len() as f64;
    if mean.is_nan() {
        0.0
    } else {
        -10.0 * mean.log10()
    }
}

#[test]
fn an_autoencoder_beyond_fp16_works_from_its_own_weights() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    engine(&golden, &at("plain"), |_, _| {});
    exported(&at("plain"), Precision::Fp32, false, &at("original")).unwrap();
    let original = decoded(&opened(&at("original")), false);

    for (power, weights_fit) in [(14, true), (20, false)] {
        let name = |what: &str| at(&format!("{what}-{power}"));
        engine(&golden, &name("folder"), scaled(2.0_f32.powi(power)));
        exported(&name("folder"), Precision::Fp32, false, &name("fp32")).unwrap();
        let expected = decoded(&opened(&name("fp32")), false);
        assert!(
            psnr_db(&expected, &original) > 80.0,
            "the picture is another one"
        );

        exported(&name("folder"), Precision::Fp16, true, &name("fp16")).unwrap();
        let bundle = opened(&name("fp16"));
        let audit =
            &bundle.manifest().audit.as_ref().unwrap().stages[&StageName::RefinerVaeDecoder];
        assert!(audit.largest > 65504.0, "{audit:?}");
        assert!(
            !audit.islands.is_empty() && audit.psnr_db >= Some(PSNR_DB),
            "{audit:?}"
        );
        assert_eq!(audit.fp32_weights.is_empty(), weights_fit, "{audit:?}");
        let in_fp16 = bundle.manifest().stages[&StageName::RefinerVaeDecoder]
            .graph
            .clone();
        let size = fs::metadata(bundle.dir().join(in_fp16)).unwrap().len();
        assert!(size > 0);
        let psnr = psnr_db(&decoded(&bundle, true), &expected);
        assert!(psnr >= PSNR_DB, "2^{power}: {psnr} dB, {audit:?}");

        // The same without islands is no picture, or no bundle at all.
        let blind = exported(&name("folder"), Precision::Fp16, false, &name("blind"));
        if weights_fit {
            blind.unwrap();
            let bundle = opened(&name("blind"));
            assert_eq!(bundle.manifest().audit, None);
            let psnr = psnr_db(&decoded(&bundle, true), &expected);
            assert!(psnr < PSNR_DB, "{psnr} dB without islands");
        } else {
            let message = chain(&blind.unwrap_err());
            assert!(
                message.contains("up.0.block") && message.contains("65504"),
                "{message}"
            );
        }
    }
}

#[test]
fn only_what_needs_it_is_kept_in_fp32() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (folder, out) = (dir.path().join("folder"), dir.path().join("bundle"));
    engine(&golden, &folder, scaled(2.0_f32.powi(14)));
    exported(&folder, Precision::Fp16, true, &out).unwrap();
    let bundle = opened(&out);
    let stages = &bundle.manifest().audit.as_ref().unwrap().stages;
    let islands = &stages[&StageName::RefinerVaeDecoder].islands;
    let named = |part: &str| islands.iter().any(|node| node.contains(part));
    assert!(
        named("up.1.upsample.conv") && named("up.0.block.1.conv2"),
        "{islands:?}"
    );
    for untouched in [
        "decoder.conv_in",
        "up.2.",
        "up.3.",
        "mid.",
        "conv_out",
        "up.0.block.0.conv1",
    ] {
        assert!(!named(untouched), "{untouched}: {islands:?}");
    }
    assert!(
        stages[&StageName::RefinerVaeEncoder].islands.is_empty(),
        "{stages:?}"
    );
}

#[test]
fn numbers_too_small_for_fp16_are_kept_as_well() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Weights of 2^-20 and below: fp16 keeps four bits of them or fewer.
    let small = |name: &str, value: &mut f32| {
        if name.starts_with(DECODER) && name.contains("up.1.block.0.conv1.") {
            *value *= 2.0_f32.powi(-18);
        }
    };
    engine(&golden, &at("folder"), small);
    exported(&at("folder"), Precision::Fp32, false, &at("fp32")).unwrap();
    exported(&at("folder"), Precision::Fp16, true, &at("fp16")).unwrap();
    let bundle = opened(&at("fp16"));
    let audit = &bundle.manifest().audit.as_ref().unwrap().stages[&StageName::RefinerVaeDecoder];
    let kept = audit
        .fp32_weights
        .iter()
        .any(|key| key.contains("up.1.block.0.conv1.weight"));
    assert!(kept, "{audit:?}");
    let psnr = psnr_db(
        &decoded(&bundle, true),
        &decoded(&opened(&at("fp32")), false),
    );
    assert!(psnr >= PSNR_DB, "{psnr} dB, {audit:?}");
}

#[test]
fn what_is_no_number_in_fp32_is_refused_by_name_and_leaves_nothing_behind() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    engine(&golden, &folder, |name, value| {
        if name == format!("{DECODER}conv_in.weight") {
            *value = 3e38;
        }
    });
    let out = dir.path().join("bundle");
    let message = chain(&exported(&folder, Precision::Fp16, true, &out).unwrap_err());
    for part in [
        "refiner_vae_decoder",
        "Conv_",
        "decoder.conv_in.weight",
        "found",
    ] {
        assert!(message.contains(part), "{message}");
    }
    assert!(
        message.ends_with("inf") || message.ends_with("NaN"),
        "{message}"
    );
    let left = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 1, "something was left behind");
}
