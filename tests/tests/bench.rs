//! `afterimage bench --front-end`, tiny: every figure is there and hangs together. How fast this
//! machine is stands in no test.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::Path;

use serde_json::Value;
use system_tests::material::short_folder;
use system_tests::program::{Ended, command, finish, run};

/// Runs it with a temporary folder of its own, which must be empty again at the end.
fn bench(dir: &Path, arguments: &[&str]) -> Ended {
    let temporary = dir.join("tmp");
    fs::create_dir(&temporary).unwrap();
    let mut command = command("afterimage");
    command
        .args(["bench", "--front-end"])
        .args(arguments)
        .env("TMPDIR", &temporary);
    let ended = finish(command);
    let left = fs::read_dir(&temporary).unwrap().count();
    assert_eq!(left, 0, "temporary files are left: {ended:?}");
    ended
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

/// Median, 99th percentile and maximum, which rise and are above nought.
#[track_caller]
fn spread(figures: &Value, name: &str) -> [f64; 3] {
    let spread = &figures[name];
    let values = ["median_ms", "p99_ms", "max_ms"].map(|rank| number(&spread[rank]));
    assert!(values[0] > 0.0, "{name}: {spread}");
    assert!(
        values.is_sorted() && values[2] < 120_000.0,
        "{name}: {spread}"
    );
    values
}

#[test]
fn every_figure_of_the_front_end_is_there_and_hangs_together() {
    let dir = short_folder();
    let json = dir.path().join("figures.json");
    let ended = bench(
        dir.path(),
        &[
            "--grid",
            "32x32x12,24x28x20",
            "--voxels",
            "200",
            "--volumes",
            "20",
            "--triggers",
            "--pulses",
            "10",
            "--busy",
            "1",
            "--json",
            json.to_str().unwrap(),
        ],
    )
    .succeeded();
    let figures: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert!(number(&figures["processors"]) >= 1.0);
    let grids = figures["grids"].as_array().unwrap();
    let named: Vec<&Value> = grids.iter().map(|grid| &grid["grid"]).collect();
    assert_eq!(
        named,
        [
            &serde_json::json!([32, 32, 12]),
            &serde_json::json!([24, 28, 20])
        ]
    );
    for (grid, pixels) in grids.iter().zip([32 * 32 * 16, 24 * 28 * 25]) {
        assert_eq!(grid["volumes"], 20);
        assert_eq!(grid["mask_voxels"], 200);
        // Two bytes for each pixel of a square mosaic, and a header.
        let bytes = number(&grid["file_bytes"]) - 2.0 * f64::from(pixels);
        assert!(
            (500.0..20_000.0).contains(&bytes),
            "{bytes} bytes of header"
        );
        assert!(number(&grid["reference_ms"]) > 0.0);
        // The simulated head wanders by 0.3 mm: one that is found at its place was not looked for.
        let moved_mm = number(&grid["moved_mm"]);
        assert!((0.1..1.5).contains(&moved_mm), "{moved_mm} mm");
        let total = spread(grid, "total");
        let parts = ["read", "parse", "realign", "sample", "quality"];
        for part in parts.map(|part| spread(grid, part)) {
            assert!(
                part.iter().zip(&total).all(|(part, total)| part <= total),
                "a part takes longer than all: {grid}"
            );
        }
        spread(grid, "processor");
        for window in ["first", "last"].map(|name| &grid[name]) {
            assert_eq!(window["volumes"], 10);
            assert!(spread(window, "total")[2] <= total[2]);
            spread(window, "processor");
            for process in ["resident", "parser_resident"] {
                let bytes = number(&window[process]["anonymous"]);
                assert!((1e5..1e9).contains(&bytes), "{process}: {bytes}");
            }
        }
    }
    let fit = &figures["fit"];
    assert_eq!(fit["volumes"], 288);
    assert_eq!(fit["voxels"], 200);
    // Every 4 s from 12 s to 12 s before the end of 432 s.
    assert_eq!(fit["trials"], 103);
    for noise in ["ols", "ar1", "ols_processor", "ar1_processor"] {
        spread(fit, noise);
    }
    let triggers = &figures["triggers"];
    assert_eq!(triggers["pulses"], 10);
    assert_eq!(triggers["busy_threads"], 1);
    assert!(triggers["fifo"].is_boolean());
    spread(triggers, "late");
    for said in [
        "32x32x12",
        "24x28x20",
        "file in, voxels out",
        "first 10 volumes",
        "AR(1)",
        "late",
    ] {
        assert!(ended.stdout.contains(said), "{said}: {}", ended.stdout);
    }
}

#[test]
fn a_head_too_small_for_the_mask_is_named_and_nothing_is_left() {
    let dir = short_folder();
    let json = dir.path().join("figures.json");
    let arguments = [
        "--grid",
        "16x16x8",
        "--voxels",
        "5000",
        "--json",
        json.to_str().unwrap(),
    ];
    bench(dir.path(), &arguments).refused(1, &["--voxels asks for 5000"]);
    assert!(!json.exists());
}

#[test]
fn the_networks_or_the_front_end_must_be_chosen() {
    run("afterimage", &[&"bench"]).refused(2, &["--bundle", "--front-end"]);
    let help = run("afterimage", &[&"bench", &"--help"]).succeeded().stdout;
    for said in [
        "the sandboxed parser",
        "Promised on two processors",
        "Examples:",
        "--triggers",
    ] {
        assert!(help.contains(said), "{said}: {help}");
    }
}
