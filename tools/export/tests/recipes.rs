//! Every file of the reference set has a bundle in which it is compared: the folder's own, and the
//! recipes in `tests/recipes` for the checkpoints beside the main ones and for merged LoRA files.
//!
//! The set lies beside the repository (`../shared/golden`); a clone without it says so and passes.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bundle::Precision;
use export::check::{self, CheckOptions};
use export::export::export;
use export::plan::Plan;

/// Recipes and the reference files that only they can compare.
const RECIPES: [(&str, &str); 7] = [
    ("fp16", "backbone"),
    ("legacy", "legacy"),
    ("two_tokens", "seq2"),
    ("control", "control"),
    ("lora_kohya_sgm", "lora_kohya_sgm"),
    ("lora_kohya_diffusers", "lora_kohya_diffusers"),
    ("lora_peft", "lora_peft"),
];

/// Smallest cosine of a half-precision bundle with the reference.
const HALF_COSINE: f64 = 0.9995;

fn golden() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if path.is_dir() {
        return Some(path.canonicalize().unwrap());
    }
    eprintln!("not compared: the reference set ../shared/golden was not found");
    None
}

/// Exports a plan and checks the bundle; the rows of its report.
fn rows(plan: &Plan, golden: &Path) -> Vec<serde_json::Value> {
    let dir = tempfile::tempdir().unwrap();
    let (bundle, json) = (dir.path().join("bundle"), dir.path().join("report.json"));
    export(plan, &bundle, &mut |_| {}).unwrap();
    let options = CheckOptions {
        bundle,
        golden: golden.into(),
        json: Some(json.clone()),
        onnxruntime: None,
    };
    let mut table = Vec::new();
    let passed = check::run(&options, &mut table).unwrap();
    assert!(passed, "{}", String::from_utf8(table).unwrap());
    let report: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    report["rows"].as_array().unwrap().clone()
}

fn green(rows: &[serde_json::Value]) -> BTreeSet<String> {
    let green = rows.iter().filter(|row| row["verdict"] == "ok");
    green
        .map(|row| row["vectors"].as_str().unwrap().to_owned())
        .collect()
}

/// Quantities of one reference file that were compared and found good.
fn quantities<'r>(rows: &'r [serde_json::Value], vectors: &str) -> BTreeSet<&'r str> {
    let own = rows.iter().filter(|row| row["vectors"] == vectors);
    own.filter(|row| row["verdict"] == "ok")
        .map(|row| row["quantity"].as_str().unwrap())
        .collect()
}

fn every_file_is_green(precision: Precision) {
    let Some(golden) = golden() else { return };
    let folder = Plan::from_folder(&golden, precision, false).unwrap();
    let mut compared = green(&rows(&folder, &golden));
    for (name, vectors) in RECIPES {
        let recipe = format!("{}/tests/recipes/{name}.toml", env!("CARGO_MANIFEST_DIR"));
        let mut plan = Plan::from_recipe(Path::new(&recipe)).unwrap();
        plan.precision = precision;
        // `check` runs every fp16 network rounded as well; the folder's bundle is audited.
        plan.audit = false;
        let rows = rows(&plan, &golden);
        let own = quantities(&rows, vectors);
        assert!(!own.is_empty(), "{name}: {vectors} was not compared");
        if name.starts_with("lora_") {
            for quantity in ["f64/check", "merged", "eps_merged"] {
                assert!(
                    own.contains(quantity),
                    "{name}: {quantity} was not compared"
                );
            }
            assert_eq!(
                own.contains("te/crossattn") && own.contains("te/pooled"),
                name == "lora_kohya_sgm"
            );
            // The vectors of the unmerged UNet do not belong to this bundle.
            assert!(quantities(&rows, "unet_sdxl").is_empty());
            assert!(!quantities(&rows, "refiner").contains("latent_final"));
            // Token ids are the same whatever is merged into the towers.
            assert_eq!(
                quantities(&rows, "text").contains("clip_l_hidden"),
                name != "lora_kohya_sgm"
            );
        }
        if precision == Precision::Fp16 {
            let cosines = rows.iter().filter_map(|row| row["cosine"].as_f64());
            for cosine in cosines {
                assert!(cosine >= HALF_COSINE, "{name}: cosine {cosine}");
            }
        }
        compared.extend(green(&rows));
    }
    for entry in fs::read_dir(&golden).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let vectors = name
            .strip_prefix("io_")
            .and_then(|name| name.rsplit_once('.'))
            .map(|(vectors, _)| vectors);
        if let Some(vectors) = vectors {
            assert!(
                compared.contains(vectors),
                "{precision}: {name} has no green row in any bundle"
            );
        }
    }
}

#[test]
fn every_reference_file_has_a_green_row_in_fp32() {
    every_file_is_green(Precision::Fp32);
}

#[test]
fn every_reference_file_has_a_green_row_in_fp16() {
    every_file_is_green(Precision::Fp16);
}
