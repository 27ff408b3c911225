use clap::Parser;
use ndarray::{Array2, Axis, s};
use ndarray_npy::ReadNpyExt;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

/// Runs the command as its line is typed, in a folder; what it says or refuses.
fn run(dir: &Path, options: &str) -> Result<String, String> {
    let words = options
        .split_whitespace()
        .map(|word| match word.strip_prefix('@') {
            Some(file) => dir.join(file).into_os_string(),
            None => word.into(),
        });
    let line = std::iter::once("betas".into()).chain(words);
    let line = Line::try_parse_from(line).map_err(|error| error.to_string())?;
    let mut said = Vec::new();
    betas(&line.arguments, &mut said).map_err(|error| chain(&error))?;
    Ok(String::from_utf8(said).unwrap())
}

fn matrix(path: impl AsRef<Path>) -> Array2<f64> {
    let path = path.as_ref();
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Array2::read_npy(file).unwrap()
}

/// A small run: 60 volumes of 12 voxels, stimuli `a b a b ...` every 9 s from 12 s.
fn small(dir: &Path) -> Array2<f32> {
    let series = Array2::from_shape_fn((60, 12), |(i, voxel)| {
        let step = u8::try_from((i * i * (voxel + 2) + 5 * i) % 23).unwrap();
        300.0 + 0.5 * f32::from(step)
    });
    series
        .write_npy(File::create(dir.join("bold.npy")).unwrap())
        .unwrap();
    let mut events = String::from("onset\tduration\ttrial_type\n");
    for trial in 0_u8..8 {
        let name = if trial % 2 == 0 { "a" } else { "b" };
        events += &format!("{}\t3\t{name}\n", 12.0 + 9.0 * f64::from(trial));
    }
    std::fs::write(dir.join("events.tsv"), events).unwrap();
    series
}

const SMALL: &str = "--bold @bold.npy --events @events.tsv --tr 1.5 --hrf glover --noise ar1";

#[test]
fn betas_and_scores_equal_the_references() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/scanner/glm");
    if !data.is_dir() {
        eprintln!("{} was not found, its test passes unseen", data.display());
        return;
    }
    let out = tempfile::tempdir().unwrap();
    for folder in ["run_a", "run_b_jittered_onsets"] {
        let dir = data.join(folder);
        for (hrf, noise) in [
            ("glover", "ols"),
            ("glover", "ar1"),
            ("spm", "ols"),
            ("spm", "ar1"),
        ] {
            let betas = out.path().join(format!("{folder}_{hrf}_{noise}.npy"));
            let options = format!(
                "--bold @bold.npy --events @events.tsv --confounds @confounds.tsv --tr 1.5 \
                 --hrf {hrf} --noise {noise} --out {}",
                betas.display()
            );
            let said = run(&dir, &options).unwrap();
            assert!(
                said.contains("betas of 60 of 60 trials, 300 voxels"),
                "{said}"
            );
            let scores = out
                .path()
                .join(format!("{folder}_{hrf}_{noise}_zscored.npy"));
            let expected = matrix(dir.join(format!("betas_{hrf}_{noise}.npy")));
            let limit = 1e-6 * expected.pow2().mean().unwrap().sqrt();
            let off = (&matrix(&betas) - &expected).abs();
            let outside = off.iter().filter(|off| **off > limit).count();
            // A coefficient on a bin's edge falls to either side: 1 in 1000 fits at most.
            let allowed = if noise == "ar1" { off.len() / 1000 } else { 0 };
            assert!(outside <= allowed, "{folder} {hrf} {noise}: {outside}");
            let expected = matrix(dir.join(format!("zscored_{hrf}_{noise}.npy")));
            let off = (&matrix(&scores) - &expected).abs();
            let outside = off
                .columns()
                .into_iter()
                .filter(|voxel| voxel.iter().any(|off| *off > 1e-6));
            // One beta of a voxel changes the scores of all its later trials.
            let outside = outside.count();
            assert!(
                outside <= allowed,
                "{folder} {hrf} {noise}: scores of {outside} voxels"
            );
        }
    }
}

#[test]
fn double_and_single_precision_and_nifti_give_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let series = small(dir);
    run(dir, &format!("{SMALL} --out @single.npy --variance")).unwrap();
    let double = series.mapv(f64::from);
    double
        .write_npy(File::create(dir.join("double.npy")).unwrap())
        .unwrap();
    let options = SMALL.replace("bold.npy", "double.npy");
    run(
        dir,
        &format!("{options} --out @double_betas.npy --variance"),
    )
    .unwrap();
    // The same voxels in a grid of 3 x 2 x 4, half of which the mask leaves out.
    std::fs::write(dir.join("run.nii"), nifti_run(&series)).unwrap();
    std::fs::write(dir.join("mask.nii.gz"), mask()).unwrap();
    let options = SMALL.replace("bold.npy", "run.nii");
    run(
        dir,
        &format!("{options} --mask @mask.nii.gz --out @masked --variance"),
    )
    .unwrap();
    // Without a mask the voxels that are zero drop out by themselves.
    run(dir, &format!("{options} --out @above.npy --variance")).unwrap();
    let expected = matrix(dir.join("single.npy"));
    assert_eq!(expected.dim(), (8, 12));
    assert!(expected.iter().all(|beta| beta.is_finite()));
    for (betas, variance) in [
        ("double_betas.npy", "double_betas_variance.npy"),
        ("masked", "masked_variance.npy"),
        ("above.npy", "above_variance.npy"),
    ] {
        assert_eq!(matrix(dir.join(betas)), expected, "{betas}");
        let variances = matrix(dir.join("single_variance.npy"));
        assert_eq!(matrix(dir.join(variance)), variances, "{variance}");
    }
}

/// Where voxel `v` of the small run lies in the grid: every other place in C order.
fn place(voxel: usize) -> [usize; 3] {
    let place = 2 * voxel + 1;
    [place / 8, place / 4 % 2, place % 4]
}

fn nifti_run(series: &Array2<f32>) -> Vec<u8> {
    let mut bytes = vec![0; 352];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &348_i32.to_le_bytes());
    for (at, value) in [
        (40, 4_i16),
        (42, 3),
        (44, 2),
        (46, 4),
        (48, 60),
        (70, 16),
        (254, 1),
    ] {
        put(at, &value.to_le_bytes());
    }
    put(108, &352_f32.to_le_bytes());
    for axis in 0..3 {
        put(280 + 20 * axis, &3_f32.to_le_bytes());
    }
    put(344, b"n+1\0");
    for row in series.rows() {
        let mut image = ndarray::Array3::<f32>::zeros((3, 2, 4));
        for (voxel, value) in row.iter().enumerate() {
            image[place(voxel)] = *value;
        }
        for value in image.view().reversed_axes() {
            bytes.extend(value.to_le_bytes());
        }
    }
    bytes
}

fn mask() -> Vec<u8> {
    let mut affine = [[0.0; 4]; 4];
    for (axis, row) in affine.iter_mut().enumerate() {
        row[axis] = if axis < 3 { 3.0 } else { 1.0 };
    }
    let voxels: Vec<_> = (0..12).map(place).collect();
    Mask::from_voxels([3, 2, 4], affine, &voxels)
        .unwrap()
        .to_nifti()
        .unwrap()
}

#[test]
fn missing_volumes_and_trials_that_come_too_late_are_rows_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut series = small(dir);
    // Trial 2 begins with frame 14 and peaks by frame 19.
    series.slice_mut(s![15..18, ..]).fill(f32::NAN);
    series
        .write_npy(File::create(dir.join("holes.npy")).unwrap())
        .unwrap();
    // The last trial begins at 75 s: frame 54 is still needed.
    let cut = series.slice(s![..54, ..]).to_owned();
    cut.write_npy(File::create(dir.join("cut.npy")).unwrap())
        .unwrap();
    let options = SMALL.replace("bold.npy", "cut.npy");
    let said = run(dir, &format!("{options} --out @out.npy --repeats")).unwrap();
    assert!(said.contains("betas of 6 of 8 trials"), "{said}");
    let betas = matrix(dir.join("out.npy"));
    let scores = matrix(dir.join("out_zscored.npy"));
    for (trial, fitted) in [true, false, true, true, true, true, true, false]
        .into_iter()
        .enumerate()
    {
        for table in [&betas, &scores] {
            assert!(
                table
                    .row(trial)
                    .iter()
                    .all(|value| value.is_finite() == fitted),
                "{trial}"
            );
        }
    }
    // Trials a: 1, 3, 5, 7; the third of them averages three scores.
    let repeats = matrix(dir.join("out_repeats.npy"));
    let mean = (&scores.row(0) + &scores.row(2) + scores.row(4)) / 3.0;
    assert!(
        (&repeats.row(4) - &mean)
            .iter()
            .all(|off| off.abs() < 1e-12)
    );
    // Enough of the run was recorded after the last onset for a fit at its end.
    let said = run(dir, &format!("{options} --tier end --out @end.npy")).unwrap();
    assert!(said.contains("betas of 7 of 8 trials"), "{said}");
    let scores = matrix(dir.join("end_zscored.npy"));
    let scored = scores.select(Axis(0), &[0, 2, 3, 4, 5, 6, 7]);
    assert!(
        scored
            .mean_axis(Axis(0))
            .unwrap()
            .iter()
            .all(|mean| mean.abs() < 1e-9)
    );
    let said = run(dir, &format!("{options} --tier slow --out @slow.npy")).unwrap();
    assert!(said.contains("betas of 4 of 8 trials"), "{said}");
}

#[test]
fn what_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let series = small(dir);
    let refused = |options: &str, parts: &[&str]| {
        let message = run(dir, &format!("{options} --out @out.npy")).unwrap_err();
        for part in parts {
            assert!(message.contains(part), "{message}");
        }
        assert!(!dir.join("out.npy").exists() && !dir.join("out_zscored.npy").exists());
    };
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
    write("bad.tsv", "onset\tduration\ttrial_type\n1\tn/a\ta\n");
    refused(
        &SMALL.replace("events.tsv", "bad.tsv"),
        &["bad.tsv", "line 2, column `duration`"],
    );
    write("bad.tsv", "onset\tduration\ttrial_type\n");
    refused(
        &SMALL.replace("events.tsv", "bad.tsv"),
        &["bad.tsv", "at least one event"],
    );
    write("bad.tsv", "x\ty\n1\t2\n");
    let confounds = format!("{SMALL} --confounds @bad.tsv");
    refused(&confounds, &["bad.tsv", "expected 60 rows", "found 1"]);
    write("bad.tsv", "x\ty\n1\tn/a\n");
    refused(&confounds, &["bad.tsv", "line 2, column `y`", "`n/a`"]);
    refused(&SMALL.replace("1.5", "1500"), &["--tr", "1.5, not 1500"]);
    refused(
        &format!("{SMALL} --tier slow --delay 3"),
        &["--delay", "slow_s = 3"],
    );
    refused(&format!("{SMALL} --mask @bad.tsv"), &["--mask", ".npy"]);
    refused(&SMALL.replace("bold.npy", "none.npy"), &["none.npy"]);
    refused(
        &SMALL.replace("bold.npy", "events.tsv"),
        &["events.tsv", ".nii.gz"],
    );
    let flat = series.row(0).to_owned();
    flat.write_npy(File::create(dir.join("flat.npy")).unwrap())
        .unwrap();
    refused(
        &SMALL.replace("bold.npy", "flat.npy"),
        &["flat.npy", "[volume, voxel]", "[12]"],
    );
    let whole = series.mapv(|value| value.to_bits());
    whole
        .write_npy(File::create(dir.join("whole.npy")).unwrap())
        .unwrap();
    refused(
        &SMALL.replace("bold.npy", "whole.npy"),
        &["whole.npy", "float32 or float64"],
    );
    let mut broken = series;
    broken[[3, 4]] = f32::INFINITY;
    broken
        .write_npy(File::create(dir.join("broken.npy")).unwrap())
        .unwrap();
    refused(
        &SMALL.replace("bold.npy", "broken.npy"),
        &["volume 4, voxel 5", "found inf"],
    );
    write("late.tsv", "onset\tduration\ttrial_type\n500\t3\ta\n");
    refused(
        &SMALL.replace("events.tsv", "late.tsv"),
        &["none of the 1 trials"],
    );
    let message = run(dir, &format!("{SMALL} --out @nowhere/out.npy")).unwrap_err();
    assert!(message.contains("nowhere"), "{message}");
}

#[test]
fn other_arrays_are_named_after_the_betas() {
    for (out, expected) in [
        ("a/b.npy", "a/b_zscored.npy"),
        ("b.npy", "b_zscored.npy"),
        ("a/b", "a/b_zscored.npy"),
        ("a/b.c.npy", "a/b.c_zscored.npy"),
    ] {
        assert_eq!(beside(Path::new(out), "zscored"), Path::new(expected));
    }
}
