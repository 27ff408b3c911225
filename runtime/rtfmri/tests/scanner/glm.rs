//! Betas, z-scores and the response against nilearn.

use std::path::Path;

use ndarray::{Array1, Array2, ArrayView2};
use ndarray_npy::ReadNpyExt;
use rtfmri::events::{self, Event};
use rtfmri::glm::{Design, GlmSettings, Hrf, Noise, fit_trial};
use rtfmri::zscore::RunningZScore;

use crate::{matrix, read, scanner, table, tolerance};

const TR_S: f64 = 1.5;
const RUNS: [&str; 2] = ["run_a", "run_b_jittered_onsets"];
const RESPONSES: [(&str, Hrf); 2] = [("glover", Hrf::Glover), ("spm", Hrf::Spm)];

/// One run as it would arrive.
struct Run {
    events: Vec<Event>,
    /// `[volume, voxel]`, scanner units.
    series: Array2<f32>,
    /// `[volume, confound]`, mm and radians.
    confounds: Array2<f64>,
    frames: Vec<usize>,
}

impl Run {
    fn read(dir: &Path) -> Self {
        let series = Array2::<f32>::read_npy(read(dir.join("bold.npy")).as_slice()).unwrap();
        Self {
            events: events::parse(&read(dir.join("events.tsv"))).unwrap(),
            confounds: table(dir.join("confounds.tsv")),
            frames: (0..series.nrows()).collect(),
            series,
        }
    }

    /// Every trial's betas, `[trial, voxel]`, scanner units.
    fn fit(&self, hrf: Hrf, noise: Noise) -> Array2<f64> {
        let settings = GlmSettings::new(TR_S, hrf, noise);
        let mut betas = Array2::zeros((self.events.len(), self.series.ncols()));
        for (trial, mut row) in betas.rows_mut().into_iter().enumerate() {
            let fitted = fit_trial(
                &settings,
                &self.events,
                trial,
                &self.frames,
                self.series.view(),
                Some(self.confounds.view()),
            );
            row.assign(&fitted.unwrap().betas);
        }
        betas
    }
}

/// Every trial's score at its own decode time.
fn scores(betas: ArrayView2<'_, f64>) -> Array2<f64> {
    let mut running = RunningZScore::new(betas.ncols());
    let mut out = Array2::zeros(betas.dim());
    for (betas, mut row) in betas.rows().into_iter().zip(out.rows_mut()) {
        row.assign(&running.push(betas).unwrap());
    }
    out
}

fn rms(values: ArrayView2<'_, f64>) -> f64 {
    values.pow2().mean().unwrap().sqrt()
}

/// The largest difference of each voxel over the trials, `[voxel]`.
fn worst_by_voxel(found: &Array2<f64>, expected: &Array2<f64>) -> Array1<f64> {
    let off = (found - expected).abs();
    off.columns()
        .into_iter()
        .map(|voxel| voxel.fold(0.0, |worst: f64, off| worst.max(*off)))
        .collect()
}

#[test]
fn ordinary_least_squares_equals_nilearn() {
    let Some(data) = scanner() else { return };
    for run in RUNS {
        let dir = data.join("glm").join(run);
        let series = Run::read(&dir);
        for (name, hrf) in RESPONSES {
            let found = series.fit(hrf, Noise::Ols);
            let expected = matrix(dir.join(format!("betas_{name}_ols.npy")));
            let worst = worst_by_voxel(&found, &expected).fold(0.0, |a: f64, b| a.max(*b));
            let share = worst / rms(expected.view());
            let scored = matrix(dir.join(format!("zscored_{name}_ols.npy")));
            let off = worst_by_voxel(&scores(found.view()), &scored);
            let off = off.fold(0.0, |a: f64, b| a.max(*b));
            eprintln!(
                "{run} {name} ols: betas off by {share:.1e} of their RMS, scores by {off:.1e}"
            );
            assert!(share <= tolerance::BETA, "{run} {name}");
            assert!(off <= tolerance::Z_SCORE, "{run} {name}");
        }
    }
}

#[test]
fn autoregressive_noise_equals_nilearn_but_for_bin_edges() {
    let Some(data) = scanner() else { return };
    for run in RUNS {
        let dir = data.join("glm").join(run);
        let series = Run::read(&dir);
        for (name, hrf) in RESPONSES {
            let found = series.fit(hrf, Noise::Ar1);
            let expected = matrix(dir.join(format!("betas_{name}_ar1.npy")));
            let limit = tolerance::BETA * rms(expected.view());
            let off = (&found - &expected).abs();
            let outside = off.iter().filter(|off| **off > limit).count();
            eprintln!("{run} {name} ar1: {outside} of {} betas outside", off.len());
            // A coefficient on a bin's edge falls to either side: 1 in 1000 fits at most.
            assert!(outside * 1000 <= off.len(), "{run} {name}");
        }
    }
}

#[test]
fn designs_equal_nilearn() {
    let Some(data) = scanner() else { return };
    for run in RUNS {
        let dir = data.join("glm").join(run);
        let series = Run::read(&dir);
        for (name, hrf) in RESPONSES {
            for trial in [1, 2, 5, 20, 40, 60] {
                let expected = table(dir.join(format!("design_{name}_trial{trial:02}.csv")));
                let design = Design::build(
                    &GlmSettings::new(TR_S, hrf, Noise::Ols),
                    &series.events,
                    trial - 1,
                    &series.frames,
                    Some(series.confounds.view()),
                );
                let found = design.unwrap().values;
                assert_eq!(found.dim(), expected.dim(), "{run} {name} trial {trial}");
                let off = (&found - &expected).abs();
                let worst = off.fold(0.0, |a: f64, b| a.max(*b));
                assert!(
                    worst <= tolerance::DESIGN,
                    "{run} {name} {trial}: {worst:e}"
                );
            }
        }
    }
}

#[test]
fn responses_equal_nilearn() {
    let Some(data) = scanner() else { return };
    for oversampling in [16, 50] {
        let file = format!("hrf_tr1.5_oversampling{oversampling}.csv");
        let expected = table(data.join("glm/hrf").join(file));
        for (column, (name, hrf)) in (1..).zip(RESPONSES) {
            let found = Array1::from_vec(hrf.sample(TR_S, oversampling));
            let expected = expected.column(column);
            assert_eq!(found.len(), expected.len(), "{name}");
            let peak = expected.fold(0.0, |a: f64, b| a.max(*b));
            let worst = (&found - &expected).abs().fold(0.0, |a: f64, b| a.max(*b));
            assert!(worst <= tolerance::RESPONSE * peak, "{name}: {worst:e}");
        }
    }
}

#[test]
fn single_event_regressors_equal_nilearn() {
    let Some(data) = scanner() else { return };
    let expected = table(data.join("glm/hrf/regressor_examples_tr1.5_oversampling50.csv"));
    let cases = [(12.0, 3.0), (13.37, 3.0), (12.0, 0.0)];
    let frames: Vec<usize> = (0..expected.nrows()).collect();
    for (response, (name, hrf)) in RESPONSES.into_iter().enumerate() {
        for (case, (onset_s, duration_s)) in cases.into_iter().enumerate() {
            let event = Event::new(onset_s, duration_s, "a");
            let mut settings = GlmSettings::new(TR_S, hrf, Noise::Ols);
            // Late enough that every frame of the example is used, and not one more.
            #[expect(clippy::cast_precision_loss, reason = "a few dozen frames")]
            let last_s = (frames.len() - 1) as f64 * TR_S;
            settings.delay_s = last_s - onset_s + 0.1;
            let design = Design::build(&settings, &[event], 0, &frames, None).unwrap();
            let expected = expected.column(1 + response * cases.len() + case);
            assert_eq!(design.frames, frames);
            let off = (&design.values.column(0) - &expected).abs();
            let worst = off.fold(0.0, |a: f64, b| a.max(*b));
            assert!(worst <= tolerance::DESIGN, "{name} {case}: {worst:e}");
        }
    }
}
