//! The whole path on a simulated run: files to betas.

use std::path::Path;

use ndarray::{Array1, Array2, ArrayView1};
use rtfmri::events;
use rtfmri::glm::{GlmSettings, Hrf, Noise, fit_trial, volumes_needed};
use rtfmri::interpolation::Interpolation;
use rtfmri::motion::{Realigner, Rigid};
use rtfmri::{Mask, Volume, dicom};

use crate::motion::{error_mm, from_parameters, ras, to_vector};
use crate::{json, matrix, read, scanner, table, tolerance, unpack};

/// The least mean pattern correlation that is of use.
const LEAST_CORRELATION: f64 = 0.60;

/// Every volume of the run, in acquisition order.
fn volumes(dir: &Path) -> Vec<Volume> {
    let mut volumes: Vec<Volume> = ["dicom_part1.tar.zst", "dicom_part2.tar.zst"]
        .iter()
        .flat_map(|part| unpack(dir.join(part)))
        .map(|(name, bytes)| {
            dicom::decode_volume(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"))
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
        let fit = fit_trial(&settings, &events, trial, &frames, seen, confounds).unwrap();
        correlation(fit.betas.view(), truth.row(trial))
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

/// A run as the pipeline sees it.
struct Series {
    /// `[volume, voxel]`, scanner units, where the voxels lie in the scanner.
    still: Array2<f32>,
    /// `[volume, voxel]`, scanner units, followed as the head moves.
    moved: Array2<f32>,
    /// `[volume, parameter]`, mm and radians.
    parameters: Array2<f64>,
    /// Each volume's distance from its true motion, mm.
    errors_mm: Array1<f64>,
}

impl Series {
    fn read(dir: &Path) -> Self {
        let volumes = volumes(dir);
        let numbers = volumes.iter().map(|volume| volume.header.acquisition);
        assert!(numbers.eq(1..=120));
        let mask = Mask::from_nifti(&read(dir.join("mask.nii.gz"))).unwrap();
        let truth = json(dir.join("truth.json"));
        let centre = to_vector(&truth["rotation_centre_ras_mm"]);
        let mut series = Self {
            still: Array2::zeros((volumes.len(), mask.len())),
            moved: Array2::zeros((volumes.len(), mask.len())),
            parameters: Array2::zeros((volumes.len(), 6)),
            errors_mm: Array1::zeros(volumes.len()),
        };
        let realigner = Realigner::new(&volumes[0]).unwrap();
        let mut motion = Rigid::identity();
        for (row, volume) in volumes.iter().enumerate() {
            motion = realigner.realign(volume, &motion).unwrap();
            let truth = &truth["motion_params_txyz_mm_rxyz_deg"][row];
            let truth = from_parameters(truth, centre);
            series.errors_mm[row] = error_mm(&truth, &ras(&motion), centre);
            let still = mask.sample(volume).unwrap();
            let image = Interpolation::new(volume).unwrap();
            let moved = mask.sample_through(&image, &motion.matrix_lps());
            let parameters = Array1::from_iter(motion.parameters());
            series.still.row_mut(row).assign(&still);
            series.moved.row_mut(row).assign(&moved);
            series.parameters.row_mut(row).assign(&parameters);
        }
        series
    }
}

#[test]
fn betas_of_the_simulated_run_are_recovered() {
    let Some(data) = scanner() else { return };
    let dir = data.join("session/e11_120tr");
    let series = Series::read(&dir);
    let worst_mm = series.errors_mm.fold(0.0, |a: f64, b| a.max(*b));
    let mean_mm = series.errors_mm.mean().unwrap();
    eprintln!("session motion: mean error {mean_mm:.3} mm, largest {worst_mm:.3} mm");
    assert!(mean_mm <= tolerance::MOTION_MEAN_MM);
    assert!(worst_mm <= tolerance::MOTION_WORST_MM);

    let ceilings = &json(dir.join("truth.json"))["expected_recovery"];
    for (noise, name) in [(Noise::Ols, "ols"), (Noise::Ar1, "ar1")] {
        let ceiling = |kind: &str| {
            let found = &ceilings[format!("{kind}_{name}")]["pattern_r_mean_over_trials"];
            found.as_f64().unwrap()
        };
        let still = recovery(&dir, &series.still, None, noise);
        let parameters = Some(&series.parameters);
        let still_confounds = recovery(&dir, &series.still, parameters, noise);
        let moved = recovery(&dir, &series.moved, None, noise);
        let moved_confounds = recovery(&dir, &series.moved, parameters, noise);
        eprintln!(
            "mean pattern correlation, {name}: neither {still:.3}, \
             motion as confounds {still_confounds:.3}, realigned {moved:.3}, \
             both {moved_confounds:.3}"
        );
        for found in [moved, moved_confounds] {
            assert!(found >= LEAST_CORRELATION, "{name}");
            assert!(found >= ceiling("true_realignment") - 0.02, "{name}");
            assert!(found > ceiling("no_realignment"), "{name}");
        }
    }
}
