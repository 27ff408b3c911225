//! The reference set through the exporter: parity, repeatability, refusals.
//!
//! The set lies beside the repository (`../shared/golden`); a clone without it says so and passes.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bundle::Precision;
use export::check::{self, CheckOptions};
use export::checkpoint::{Checkpoint, inspect};
use export::export::{ExportError, export};
use export::plan::Plan;

fn golden() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if path.is_dir() {
        return Some(path.canonicalize().unwrap());
    }
    eprintln!("not compared: the reference set ../shared/golden was not found");
    None
}

fn from_folder(dir: &Path, precision: Precision, out: &Path) {
    let plan = Plan::from_folder(dir, precision, false).unwrap();
    export(&plan, out, &mut |_| {}).unwrap();
}

fn from_recipe(dir: &Path, text: &str, out: &Path) -> Result<(), ExportError> {
    let recipe = dir.join("recipe.toml");
    fs::write(&recipe, text).unwrap();
    export(&Plan::from_recipe(&recipe).unwrap(), out, &mut |_| {}).map(|_| ())
}

/// Checks a bundle; returns whether it passed, and the table.
fn checked(bundle: &Path, golden: &Path, json: Option<PathBuf>) -> (bool, String) {
    let options = CheckOptions {
        bundle: bundle.into(),
        golden: golden.into(),
        json,
        onnxruntime: None,
    };
    let mut table = Vec::new();
    let passed = check::run(&options, &mut table).unwrap();
    (passed, String::from_utf8(table).unwrap())
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_path_buf();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

#[test]
fn fp32_bundle_of_the_folder_is_within_every_tolerance() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("bundle");
    from_folder(&golden, Precision::Fp32, &bundle);
    let json = dir.path().join("report.json");
    let (passed, table) = checked(&bundle, &golden, Some(json.clone()));
    assert!(passed, "{table}");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    for vectors in [
        "ridge",
        "backbone",
        "average",
        "prior_net",
        "prior_schedule",
        "prior_ddim",
        "prior_ddpm",
        "autoenc",
        "edm_schedule",
        "vector_cond",
        "unet_unclip",
        "vae_unclip",
        "unclip_sample",
        "unclip_sample4",
        "text",
        "clip_convert",
        "clip_vision",
        "unet_sdxl",
        "vae_sdxl",
        "resize",
        "blend",
        "retrieval",
        "refiner",
        "git",
        "pipeline",
        "chain",
        "schedulers",
        "sdxl_cond",
        "clip_token_cases",
        "wordpiece_cases",
        "git_captions",
    ] {
        let compared =
            |row: &&serde_json::Value| row["vectors"] == vectors && row["verdict"] == "ok";
        assert!(
            rows.iter().any(|row| compared(&row)),
            "{vectors} was not compared\n{table}"
        );
    }
}

#[test]
fn fp16_bundle_keeps_the_cosine_of_every_stage() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("bundle");
    from_folder(&golden, Precision::Fp16, &bundle);
    let (passed, table) = checked(&bundle, &golden, None);
    assert!(passed, "{table}");
}

#[test]
fn int8_bundle_keeps_the_pictures() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("bundle");
    from_folder(&golden, Precision::Int8, &bundle);
    let (passed, table) = checked(&bundle, &golden, None);
    assert!(passed, "{table}");
    // The products are quantised: the UNet is a quarter of its fp32 size and no longer exact.
    assert!(table.starts_with("int8 bundle"), "{table}");
    let eps = |line: &&str| line.starts_with("unet_unclip") && line.contains(" eps ");
    let line = table.lines().find(eps).expect("the UNet is compared");
    assert!(!line.contains("1.00000000"), "{line}");
}

#[test]
fn a_changed_weight_is_out_of_tolerance() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    // Another scale than the checkpoint was trained with: every picture is wrong by a factor.
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    for name in ["last.pth", "unclip6_tiny.ckpt", "sd_image_var_autoenc.pth"] {
        std::os::unix::fs::symlink(golden.join(name), folder.join(name)).unwrap();
    }
    let text = fs::read_to_string(golden.join("config.json")).unwrap();
    assert!(text.contains("\"scale_factor\": 0.13025"));
    let text = text.replace("\"scale_factor\": 0.13025", "\"scale_factor\": 0.14");
    fs::write(folder.join("config.json"), text).unwrap();
    let bundle = dir.path().join("bundle");
    from_folder(&folder, Precision::Fp32, &bundle);
    let (passed, table) = checked(&bundle, &golden, None);
    assert!(!passed && table.contains("OUT OF TOLERANCE"), "{table}");
}

#[test]
fn exporting_twice_gives_identical_bytes() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    for precision in [Precision::Fp32, Precision::Fp16, Precision::Int8] {
        let (first, second) = (
            dir.path().join(format!("{precision}-1")),
            dir.path().join(format!("{precision}-2")),
        );
        from_folder(&golden, precision, &first);
        from_folder(&golden, precision, &second);
        assert!(
            files(&first) == files(&second),
            "two {precision} exports differ"
        );
    }
}

#[test]
fn other_containers_widths_and_depths_are_within_tolerance() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "last_fp16.pth",
        "last_legacy.pth",
        "extra_seq2.pth",
        "hostile/control_ok.pth",
        "hostile/valid_strided_view.pth",
        "hostile/valid_deflated_zip.pth",
    ] {
        let text = format!(
            "precision = \"fp32\"\n[sources]\nmindeye = {:?}\n",
            golden.join(name)
        );
        let out = dir.path().join("bundle");
        from_recipe(dir.path(), &text, &out).unwrap();
        let (passed, table) = checked(&out, &golden, None);
        assert!(passed, "{name}\n{table}");
        fs::remove_dir_all(&out).unwrap();
    }
}

/// Every hostile checkpoint with a part of the message it must get.
const REFUSED: &[(&str, &str)] = &[
    ("truncated_half.pth", "truncated"),
    ("truncated_tail.pth", "truncated"),
    ("unclip_truncated.ckpt", "truncated"),
    ("empty.pth", "an empty file"),
    ("html_error_page.pth", "HTML"),
    ("lfs_pointer.pth", "git lfs pull"),
    ("missing_storage.pth", "missing from the file"),
    ("short_storage.pth", "expected 21632 elements of 2 bytes"),
    ("bitflip_crc.pth", "CRC-32"),
    ("missing_key.pth", "backbone.clip_proj.5.weight"),
    (
        "missing_prior_key.pth",
        "diffusion_prior.net.causal_transformer.layers.0.0.to_kv.weight",
    ),
    (
        "wrong_shape.pth",
        "backbone.backbone_linear.weight: expected shape [208, 16], found [207, 16]",
    ),
    (
        "nan_weight.pth",
        "backbone.clip_proj.5.weight: expected finite values, found NaN at flat index 5",
    ),
    (
        "inf_weight.pth",
        "ridge.linears.0.weight: expected finite values, found inf at flat index 3",
    ),
    (
        "integer_weight.pth",
        "backbone.backbone_linear.weight: expected floating-point numbers, found int32",
    ),
    ("unexpected_key.pth", "backbone.unexpected_extra.weight"),
    ("no_model_state_dict.pth", "model_state_dict"),
    ("evil_os_system.pth", "posix.system"),
    ("evil_eval_legacy.pth", "__builtin__.eval"),
    ("evil_raw_pickle.ckpt", "bare pickle"),
    ("evil_raw_pickle_p4.ckpt", "bare pickle"),
    ("evil_getattr_chain.pth", "refused, nothing was executed"),
    ("st_truncated.safetensors", "data_offsets"),
    ("st_header_len_huge.safetensors", "header of at most"),
    ("st_overlap.safetensors", "overlap"),
    ("st_shape_mismatch.safetensors", "expected 60 bytes"),
    ("st_offset_out_of_range.safetensors", "data_offsets"),
    ("st_unknown_dtype.safetensors", "F99"),
    ("st_bad_json.safetensors", "JSON"),
];

#[test]
fn hostile_checkpoints_are_refused_by_name_and_leave_nothing_behind() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    for (name, expected) in REFUSED {
        let file = golden.join("hostile").join(name);
        let role = if name.starts_with("unclip") {
            "unclip"
        } else {
            "mindeye"
        };
        let text = format!("precision = \"fp16\"\n[sources]\n{role} = {file:?}\n");
        let out = dir.path().join("bundle");
        let error = from_recipe(dir.path(), &text, &out).expect_err(name);
        let message = export::section::chain(&error);
        assert!(message.contains(expected), "{name}: {message}");
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["recipe.toml"], "{name} left something behind");
        // Looking at it is as safe as exporting it.
        if let Ok(checkpoint) = Checkpoint::open(&file) {
            assert!(!inspect::render(&checkpoint).is_empty());
        }
    }
    assert!(!Path::new("GOLDEN_PICKLE_WAS_EXECUTED").exists());
    assert!(!golden.join("hostile/GOLDEN_PICKLE_WAS_EXECUTED").exists());
    let known: Vec<&str> = REFUSED.iter().map(|(name, _)| *name).collect();
    for entry in fs::read_dir(golden.join("hostile")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let valid = name.contains("control") || name.starts_with("valid_");
        assert!(
            valid || known.contains(&name.as_str()),
            "{name} has no expectation here"
        );
    }
}

#[test]
fn an_unexpected_tensor_is_left_out_where_that_is_asked_for() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = golden.join("hostile/unexpected_key.pth");
    let text =
        format!("precision = \"fp32\"\nallow_unexpected = true\n[sources]\nmindeye = {file:?}\n");
    from_recipe(dir.path(), &text, &dir.path().join("bundle")).unwrap();
}
