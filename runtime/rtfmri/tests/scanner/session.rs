//! The whole path on a simulated run: files to betas.

use std::path::Path;

use ndarray::{Array1, Array2, ArrayView1};
use rtfmri::events;
use rtfmri::glm::{GlmSettings, Hrf, Noise, fit_trial, volumes_needed};
use rtfmri::motion::{Realigner, Rigid};
use rtfmri::{Mask, Volume, dicom};

use crate::motion::{error_mm, from_parameters, ras, to_vector};
use crate::{json, matrix, read, scanner, table, unpack};

/// The least mean pattern correlation, without realignment.
const LEAST_CORRELATION: f64 = 0.60;

/// Every volume of the run, in acquisition order.
fn volumes(dir: &Path) -> Vec<Volume> {
    let mut volumes: Vec<Volume> = ["dicom_part1.tar.zst", "dicom_part2.tar.zst"]
        .iter()
        .flat_map(|part| unpack(dir.join(part)))
        .map(|(name, bytes)| {
            dicom::decode(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"))
        })
        .collect();
    volumes.sort_by_key(|volume| volume.header.acquisition);
    volumes
}

fn correlation(a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>) -> f64 {
    let a = &a - a.mean().unwrap();
    let b = &b - b.mean().unwrap();
    a.dot(&b) / (a.dot(&a) * b.dot(&b)).sqrt()
}

/// Mean over trials of the correlation of estimated with true betas.
///
/// - `series`: `[volume, voxel]`, scanner units.
/// - `confounds`: `[volume, confound]`, any units.
fn recovery(
    dir: &Path,
    series: &Array2<f32>,
    confounds: Option<&Array2<f64>>,
    noise: Noise,
) -> f64 {
    let events = events::parse(&read(dir.join("events.tsv"))).unwrap();
    let truth = matrix(dir.join("true_betas.npy"));
    let settings = GlmSettings::new(1.5, Hrf::Glover, noise);
    let by_trial = (0..events.len()).map(|trial| {
        // What has been acquired when the trial is decoded, and no more.
        let acquired = volumes_needed(events[trial].onset_s, settings.tr_s, settings.delay_s);
        let frames: Vec<usize> = (0..acquired).collect();
        let seen = series.slice(ndarray::s![..acquired, ..]);
        let confounds = confounds.map(|c| c.slice(ndarray::s![..acquired, ..]));
        let betas = fit_trial(&settings, &events, trial, &frames, seen, confounds).unwrap();
        correlation(betas.view(), truth.row(trial))
    });
    by_trial.collect::<Array1<f64>>().mean().unwrap()
}

#[test]
fn mask_lists_its_voxels_in_the_order_of_the_truth() {
    let Some(data) = scanner() else { return };
    let dir = data.join("session/e11_120tr");
    let mask = Mask::from_nifti(&read(dir.join("mask.nii.gz"))).unwrap();
    let listed = table(dir.join("mask_voxels.csv"));
    assert_eq!(mask.len(), listed.nrows());
    for (voxel, (position, listed)) in mask.positions_ras().iter().zip(listed.rows()).enumerate() {
        for axis in 0..3 {
            let off_mm = (position[axis] - listed[3 + axis]).abs();
            assert!(off_mm < 1e-3, "voxel {voxel} is off by {off_mm} mm");
        }
    }
}

#[test]
fn betas_of_the_simulated_run_are_recovered() {
    let Some(data) = scanner() else { return };
    let dir = data.join("session/e11_120tr");
    let volumes = volumes(&dir);
    assert_eq!(volumes.len(), 120);
    let numbers = volumes.iter().map(|volume| volume.header.acquisition);
    assert!(numbers.eq(1..=120));

    let mask = Mask::from_nifti(&read(dir.join("mask.nii.gz"))).unwrap();
    let mut series = Array2::zeros((volumes.len(), mask.len()));
    for (volume, mut row) in volumes.iter().zip(series.rows_mut()) {
        row.assign(&mask.sample(volume).unwrap());
    }
    let truth = json(dir.join("truth.json"));
    let centre = to_vector(&truth["rotation_centre_ras_mm"]);
    let realigner = Realigner::new(&volumes[0]).unwrap();
    let mut moved = series.clone();
    let mut confounds = Array2::zeros((volumes.len(), 6));
    let mut true_confounds = Array2::zeros((volumes.len(), 6));
    let mut motion = Rigid::identity();
    let mut errors = Vec::new();
    for (row, volume) in volumes.iter().enumerate() {
        motion = realigner.realign(volume, &motion).unwrap();
        moved
            .row_mut(row)
            .assign(&mask.sample_moved(volume, &motion).unwrap());
        confounds
            .row_mut(row)
            .assign(&Array1::from_iter(motion.parameters()));
        errors.push(error_mm(
            &from_parameters(&truth["motion_params_txyz_mm_rxyz_deg"][row], centre),
            &ras(&motion),
            centre,
        ));
        for column in 0..6 {
            true_confounds[[row, column]] = truth["motion_params_txyz_mm_rxyz_deg"][row][column]
                .as_f64()
                .unwrap();
        }
    }
    eprintln!(
        "motion error mean {:.4} max {:.4}",
        errors.iter().sum::<f64>() / 120.0,
        errors.iter().fold(0.0_f64, |a, b| a.max(*b))
    );
    for noise in [Noise::Ols, Noise::Ar1] {
        for (name, data, confounds) in [
            ("none none", &series, None),
            ("none motion", &series, Some(&confounds)),
            ("none true motion", &series, Some(&true_confounds)),
            ("moved none", &moved, None),
            ("moved motion", &moved, Some(&confounds)),
            ("moved true motion", &moved, Some(&true_confounds)),
        ] {
            let mean = recovery(&dir, data, confounds, noise);
            eprintln!("{name} {noise:?}: mean pattern correlation {mean:.4}");
        }
    }
}
