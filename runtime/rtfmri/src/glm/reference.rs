//! The fit written out the slow way, and properties of the fast one against it.
//!
//! Least squares by the inverse of the normal equations, residuals stored, and autoregressive noise as
//! generalised least squares with the inverse of the volumes' whole correlation matrix
//! `rho^|i - j|`, missing volumes and all; only the first volume's weight is nilearn's
//! (its row of the whitened model is left unchanged).

use nalgebra::{DMatrix, DVector};
use ndarray::{Array1, Array2, ArrayView1, array};
use proptest::prelude::*;

use super::{Design, GlmError, GlmSettings, Hrf, Noise, TrialFit, fit_trial};
use crate::events::Event;

const TR_S: f64 = 1.5;
/// Difference from the slow fit that rounding explains, share of the value's scale.
const ROUNDING: f64 = 1e-8;

/// Beta, its variance and the coefficient times 100 before it is truncated.
struct Slow {
    beta: f64,
    variance: f64,
    hundredths: f64,
    /// Square root of the variance where the residuals are as large as the series.
    scale: f64,
}

fn slow(design: &Design, noise: Noise, series: ArrayView1<'_, f64>) -> Slow {
    let (rows, columns) = design.values.dim();
    let x = DMatrix::from_fn(rows, columns, |i, a| design.values[[i, a]]);
    let mean = series.mean().unwrap();
    let y = DVector::from_fn(rows, |i, _| series[i] - mean);
    let solve = |weight: &DMatrix<f64>| {
        let normal = x.transpose() * weight * &x;
        let inverse = normal
            .try_inverse()
            .unwrap_or_else(|| DMatrix::zeros(columns, columns));
        let betas = &inverse * (x.transpose() * weight * &y);
        let residuals = &y - &x * &betas;
        let squares = (residuals.transpose() * weight * &residuals)[(0, 0)];
        let degrees = (rows - columns) as f64;
        let variance = squares / degrees * inverse[(0, 0)];
        let scale = (y.norm_squared() / degrees * inverse[(0, 0)]).sqrt();
        (betas[0], variance, residuals, scale)
    };
    let (beta, variance, residuals, scale) = solve(&DMatrix::identity(rows, rows));
    if noise == Noise::Ols {
        return Slow {
            beta,
            variance,
            hundredths: 0.5,
            scale,
        };
    }
    let frames = &design.frames;
    let neighbours: Vec<usize> = (1..rows)
        .filter(|&i| frames[i] == frames[i - 1] + 1)
        .collect();
    let lag_1: f64 = neighbours
        .iter()
        .map(|&i| residuals[i] * residuals[i - 1])
        .sum();
    let lag_0 = residuals.norm_squared() / rows as f64;
    let hundredths = lag_1 / neighbours.len() as f64 / lag_0 * 100.0;
    if !hundredths.is_finite() {
        // No two volumes follow each other: a whole number, which is passed over as an edge.
        return Slow {
            beta,
            variance,
            hundredths: 0.0,
            scale,
        };
    }
    let rho = hundredths.clamp(-99.0, 99.0).trunc() / 100.0;
    let correlation = DMatrix::from_fn(rows, rows, |i, j| {
        rho.powi(i32::try_from(frames[i].abs_diff(frames[j])).unwrap())
    });
    let mut weight = correlation.try_inverse().unwrap() * (1.0 - rho * rho);
    weight[(0, 0)] += rho * rho;
    let (beta, variance, _, scale) = solve(&weight);
    Slow {
        beta,
        variance,
        hundredths,
        scale,
    }
}

/// A run: events, frames that arrived, `[volume, voxel]` series, `[volume, confound]`.
#[derive(Debug, Clone)]
struct Case {
    events: Vec<Event>,
    frames: Vec<usize>,
    series: Array2<f32>,
    confounds: Array2<f64>,
}

impl Case {
    fn design(&self, trial: usize, volumes: usize) -> Result<Design, GlmError> {
        let mut settings = GlmSettings::new(TR_S, Hrf::Glover, Noise::Ols);
        settings.max_missing_share = 1.0;
        let confounds = Some(self.confounds.view());
        Design::build_at(
            &settings,
            &self.events,
            trial,
            volumes,
            &self.frames,
            confounds,
        )
    }

    fn fit(&self, design: &Design, noise: Noise) -> Result<TrialFit, GlmError> {
        let volumes: Vec<&[f32]> = self
            .series
            .rows()
            .into_iter()
            .take(design.frames.len())
            .map(|row| row.to_slice().unwrap())
            .collect();
        design.fit(noise, &volumes)
    }
}

/// Runs of 30 to 70 volumes with holes, and voxels of differing memory on a high baseline.
fn case(voxels: usize) -> impl Strategy<Value = Case> {
    let volume = prop::collection::vec(-1.0_f64..1.0, voxels + 2);
    let volumes = prop::collection::vec((volume, 0_u8..12), 30..70);
    let gaps = prop::collection::vec(2.0_f64..9.0, 3..10);
    (volumes, gaps).prop_map(move |(volumes, gaps)| {
        let mut onset_s = 0.0;
        let events = gaps.iter().enumerate().map(|(i, gap)| {
            onset_s += gap;
            Event::new(onset_s, if i % 3 == 0 { 0.0 } else { 3.0 }, "a")
        });
        let mut memory = vec![0.0; voxels];
        let (mut frames, mut series, mut confounds) = (Vec::new(), Vec::new(), Vec::new());
        for (frame, (noise, fate)) in volumes.iter().enumerate() {
            for (voxel, memory) in memory.iter_mut().enumerate() {
                let share = -0.6 + 1.5 * voxel as f64 / voxels as f64;
                *memory = share * *memory + noise[voxel];
            }
            if *fate == 0 {
                continue;
            }
            frames.push(frame);
            #[expect(
                clippy::cast_possible_truncation,
                reason = "single precision is the input's"
            )]
            series.extend(memory.iter().map(|value| (800.0 + 10.0 * value) as f32));
            confounds.extend([noise[voxels] * 0.3, noise[voxels + 1] * 1e-3]);
        }
        let rows = frames.len();
        Case {
            events: events.collect(),
            series: Array2::from_shape_vec((rows, voxels), series).unwrap(),
            confounds: Array2::from_shape_vec((rows, 2), confounds).unwrap(),
            frames,
        }
    })
}

proptest! {
    #[test]
    fn fit_equals_the_slow_fit_with_and_without_missing_volumes(
        case in case(5),
        trial in 0_usize..3,
        late in 0_usize..40,
    ) {
        let volumes = super::volumes_needed(case.events[trial].onset_s, TR_S, 7.5) + late;
        let Ok(design) = case.design(trial, volumes) else {
            return Ok(());
        };
        for noise in [Noise::Ols, Noise::Ar1] {
            let fast = match case.fit(&design, noise) {
                // Holes may hide all of a trial.
                Err(GlmError::NotEstimable { .. }) => return Ok(()),
                fast => fast.unwrap(),
            };
            let (rows, columns) = design.values.dim();
            prop_assert_eq!(fast.degrees_of_freedom, rows - columns);
            for (voxel, column) in case.series.columns().into_iter().enumerate() {
                let series = column.slice(ndarray::s![..rows]).mapv(f64::from);
                let slow = slow(&design, noise, series.view());
                // On a bin's edge rounding decides, and both are right.
                let edge = (slow.hundredths - slow.hundredths.round()).abs() < 1e-6;
                // A scale of zero: the slow way cannot invert the normal equations.
                if edge || slow.scale == 0.0 {
                    continue;
                }
                let off = (fast.betas[voxel] - slow.beta).abs();
                prop_assert!(
                    off <= ROUNDING * slow.scale,
                    "{noise:?} beta {} and {}", fast.betas[voxel], slow.beta
                );
                let off = (fast.variance[voxel] - slow.variance).abs();
                prop_assert!(
                    off <= ROUNDING * slow.scale * slow.scale,
                    "{noise:?} variance {} and {}", fast.variance[voxel], slow.variance
                );
            }
        }
    }

    #[test]
    fn fit_of_a_run_so_far_equals_the_fit_of_the_whole_run_cut_there(
        case in case(3),
        volumes in 15_usize..60,
    ) {
        let mut cut = case.clone();
        let rows = case.frames.partition_point(|&frame| frame < volumes);
        cut.frames.truncate(rows);
        cut.series = case.series.slice(ndarray::s![..rows, ..]).to_owned();
        cut.confounds = case.confounds.slice(ndarray::s![..rows, ..]).to_owned();
        let design = case.design(0, volumes);
        prop_assert_eq!(&design, &cut.design(0, volumes));
        if let Ok(design) = design {
            for noise in [Noise::Ols, Noise::Ar1] {
                prop_assert_eq!(case.fit(&design, noise), cut.fit(&design, noise));
            }
        }
    }

    #[test]
    fn a_voxel_is_fitted_the_same_among_many_and_alone(case in case(2)) {
        let Ok(design) = case.design(0, 40) else {
            return Ok(());
        };
        let volumes: Vec<Vec<f32>> = case.series.rows().into_iter()
            .map(|row| row.iter().copied().cycle().take(3000).collect())
            .collect();
        let volumes: Vec<&[f32]> = volumes.iter().map(Vec::as_slice).collect();
        for noise in [Noise::Ols, Noise::Ar1] {
            let many = design.fit(noise, &volumes[..design.frames.len()]);
            let (Ok(alone), Ok(many)) = (case.fit(&design, noise), many) else {
                return Ok(());
            };
            for (voxel, (beta, variance)) in many.betas.iter().zip(&many.variance).enumerate() {
                prop_assert_eq!(*beta, alone.betas[voxel % 2]);
                prop_assert_eq!(*variance, alone.variance[voxel % 2]);
            }
        }
    }
}

/// A run of 40 volumes, one voxel that counts up and down in small steps.
fn plain() -> (GlmSettings, Vec<Event>, Vec<usize>, Array2<f32>) {
    let events = (1_u8..5).map(|i| Event::new(6.0 * f64::from(i), 3.0, "a"));
    let series = Array2::from_shape_fn((40, 2), |(i, voxel)| {
        let step = u8::try_from((i * i + 3 * voxel) % 7).unwrap();
        500.0 + f32::from(step)
    });
    let settings = GlmSettings::new(TR_S, Hrf::Spm, Noise::Ar1);
    (settings, events.collect(), (0..40).collect(), series)
}

#[test]
fn voxel_that_never_changes_has_beta_and_variance_zero() {
    let (settings, events, frames, mut series) = plain();
    series.column_mut(1).fill(321.5);
    for noise in [Noise::Ols, Noise::Ar1] {
        let settings = GlmSettings {
            noise,
            ..settings.clone()
        };
        let fit = fit_trial(&settings, &events, 2, &frames, series.view(), None).unwrap();
        assert_eq!((fit.betas[1], fit.variance[1]), (0.0, 0.0));
        assert!(fit.variance[0] > 0.0);
    }
}

#[test]
fn confound_that_adds_nothing_leaves_betas_alone() {
    let (settings, events, frames, series) = plain();
    let fit = |confounds: Option<&Array2<f64>>| {
        let confounds = confounds.map(|confounds| confounds.view());
        fit_trial(&settings, &events, 2, &frames, series.view(), confounds).unwrap()
    };
    let without = fit(None);
    for confounds in [Array2::zeros((40, 1)), Array2::from_elem((40, 1), 3.0)] {
        let with = fit(Some(&confounds));
        assert_eq!(with.betas, without.betas);
        assert_eq!(with.degrees_of_freedom, without.degrees_of_freedom - 1);
    }
}

#[test]
fn value_that_is_not_finite_is_named() {
    let (settings, events, frames, series) = plain();
    for value in [f32::NAN, f32::INFINITY] {
        for row in [0, 3] {
            for noise in [Noise::Ols, Noise::Ar1] {
                let settings = GlmSettings {
                    noise,
                    ..settings.clone()
                };
                let mut series = series.clone();
                series[[row, 1]] = value;
                let found = fit_trial(&settings, &events, 0, &frames, series.view(), None);
                assert_eq!(found, Err(GlmError::Series { voxel: 1 }));
            }
        }
    }
}

#[test]
fn fit_waits_for_more_volumes_than_regressors() {
    let (settings, events, frames, series) = plain();
    let confounds = Array2::from_shape_fn((40, 8), |(i, a)| ((i + 1) * (a + 2)) as f64 % 5.0);
    let found = fit_trial(
        &settings,
        &events,
        0,
        &frames,
        series.view(),
        Some(confounds.view()),
    );
    let refused = GlmError::TooFewVolumes {
        volumes: 10,
        regressors: 11,
    };
    assert_eq!(found, Err(refused));
}

#[test]
fn holes_in_the_window_are_counted_up_to_the_delay_alone() {
    let (settings, events, mut frames, _) = plain();
    // Trial 1 begins at 12 s, frame 8, and peaks by 19.5 s, frame 13: six volumes.
    frames.retain(|&frame| !(9..12).contains(&frame));
    let refused = GlmError::MissingVolumes {
        missing: 3,
        window: 6,
        limit: 0.25,
    };
    let build = |volumes| Design::build_at(&settings, &events, 1, volumes, &frames, None);
    assert_eq!(build(14), Err(refused.clone()));
    assert_eq!(build(40), Err(refused));
    frames.extend(9..11);
    frames.sort_unstable();
    let build = |volumes| Design::build_at(&settings, &events, 1, volumes, &frames, None);
    assert!(build(14).is_ok() && build(40).is_ok());
}

#[test]
fn rows_of_other_lengths_are_refused() {
    let (settings, events, frames, _) = plain();
    let design = Design::build(&settings, &events, 1, &frames, None).unwrap();
    let row = Array1::<f64>::zeros(3);
    let mut volumes = vec![row.as_slice().unwrap(); design.frames.len()];
    volumes[5] = &[0.0, 1.0];
    let refused = GlmError::Voxels {
        frame: 5,
        expected: 3,
        found: 2,
    };
    assert_eq!(design.fit(Noise::Ols, &volumes), Err(refused));
    let refused = GlmError::Rows {
        array: "series",
        expected: 14,
        found: 13,
    };
    assert_eq!(design.fit(Noise::Ols, &volumes[1..]), Err(refused));
}

#[test]
fn run_without_voxels_has_no_betas() {
    let (settings, events, frames, _) = plain();
    let series = Array2::<f32>::zeros((40, 0));
    let fit = fit_trial(&settings, &events, 1, &frames, series.view(), None).unwrap();
    assert_eq!(fit.betas, array![] as Array1<f64>);
}
