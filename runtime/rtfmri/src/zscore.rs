//! Z-scores of betas over the trials so far, voxel by voxel, and averages over repeats.
//!
//! At trial `k` each voxel's beta is compared with all betas of that voxel up to and
//! including this one: `z_k = (b_k - mean(b_1..b_k)) / (SD(b_1..b_k) + 1e-6)`, with the
//! population standard deviation, and `z_1 = 0`.
//! Mean and spread are carried from trial to trial (Welford 1962), so that a trial costs
//! one pass over the voxels however long the session is.
//!
//! A [`Prior`], mean `m` and standard deviation `s` of a voxel's betas in earlier sessions,
//! makes the first trials' scores useful. Blended, it counts as `n` trials of that mean and
//! spread: after `k` trials with mean `a` and variance `v`,
//!
//! ```text
//! mean     = (n m + k a) / (n + k)
//! variance = (n s^2 + k v + n k / (n + k) (a - m)^2) / (n + k)
//! ```
//!
//! which is what the running sums give when they start from `n` trials instead of none.
//! Alone, it stays: `z = (b - m) / (s + 1e-6)`.
//!
//! Betas of different decode times are different estimates: each decode time has a score of
//! its own. At the end of a run, when all its trials are fitted again at once, take all of
//! them first ([`RunningZScore::take`]) and score each against all ([`RunningZScore::score`]).

use std::collections::HashMap;

use ndarray::{Array1, ArrayView1};
use thiserror::Error;

use crate::events::Event;

/// Added to the standard deviation, in the betas' unit, so that a voxel that never
/// changes gets 0 and not a division by zero.
const STD_DEV_FLOOR: f64 = 1e-6;
/// Most trials that a prior may count as; more is the prior alone.
const MAX_PSEUDO_TRIALS: f64 = 1e6;

/// Why a trial's betas or a prior were not taken.
#[derive(Debug, Error, PartialEq)]
pub enum ZScoreError {
    /// The trial has another number of voxels than the score was made for.
    #[error("{found} betas where {expected} voxels are expected")]
    VoxelCount {
        /// Voxels this score was made for.
        expected: usize,
        /// Betas given.
        found: usize,
    },
    /// A beta is NaN or infinite; taken in, it would spoil every later trial.
    #[error("the beta of voxel {voxel} is not finite")]
    NotFinite {
        /// The first such voxel.
        voxel: usize,
    },
    /// A prior's arrays differ in length.
    #[error("the prior has {means} means and {std_devs} standard deviations")]
    PriorLength {
        /// Means given.
        means: usize,
        /// Standard deviations given.
        std_devs: usize,
    },
    /// A prior's mean is not finite, or its standard deviation negative or not finite.
    #[error("the prior of voxel {voxel} has mean {mean} and standard deviation {std_dev}")]
    PriorValue {
        /// The first such voxel.
        voxel: usize,
        /// Its mean.
        mean: f64,
        /// Its standard deviation.
        std_dev: f64,
    },
    /// A prior cannot count as that many trials.
    #[error(
        "a prior counts as {found} trials, expected more than 0 and at most {MAX_PSEUDO_TRIALS}"
    )]
    PseudoTrials {
        /// Trials asked for.
        found: f64,
    },
}

/// Mean and spread of each voxel's betas in earlier sessions.
#[derive(Debug, Clone, PartialEq)]
pub struct Prior {
    mean: Vec<f64>,
    std_dev: Vec<f64>,
}

impl Prior {
    /// Checks a prior.
    ///
    /// - `mean`, `std_dev`: `[voxel]`, scanner units.
    ///
    /// # Errors
    /// [`ZScoreError::PriorLength`], [`ZScoreError::PriorValue`].
    pub fn new(mean: Vec<f64>, std_dev: Vec<f64>) -> Result<Self, ZScoreError> {
        if mean.len() != std_dev.len() {
            return Err(ZScoreError::PriorLength {
                means: mean.len(),
                std_devs: std_dev.len(),
            });
        }
        for (voxel, (&mean, &std_dev)) in mean.iter().zip(&std_dev).enumerate() {
            if !(mean.is_finite() && std_dev.is_finite() && std_dev >= 0.0) {
                return Err(ZScoreError::PriorValue {
                    voxel,
                    mean,
                    std_dev,
                });
            }
        }
        Ok(Self { mean, std_dev })
    }

    /// Voxels.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mean.len()
    }

    /// Whether it is of no voxel.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mean.is_empty()
    }
}

/// Mean and spread of each voxel's betas so far.
#[derive(Debug, Clone)]
pub struct RunningZScore {
    trials: u32,
    /// Trials that a prior counts as.
    pseudo_trials: f64,
    /// Whether trials change mean and spread.
    learns: bool,
    mean: Vec<f64>,
    /// Sums of squared differences from the mean.
    squares: Vec<f64>,
}

impl RunningZScore {
    /// Starts a session of `voxels` voxels, with nothing known before.
    #[must_use]
    pub fn new(voxels: usize) -> Self {
        Self {
            trials: 0,
            pseudo_trials: 0.0,
            learns: true,
            mean: vec![0.0; voxels],
            squares: vec![0.0; voxels],
        }
    }

    /// Starts a session with a prior that counts as `pseudo_trials` trials, not necessarily a
    /// whole number of them.
    ///
    /// # Errors
    /// [`ZScoreError::PseudoTrials`] where that is no sensible number.
    pub fn blended(prior: Prior, pseudo_trials: f64) -> Result<Self, ZScoreError> {
        if !(pseudo_trials > 0.0 && pseudo_trials <= MAX_PSEUDO_TRIALS) {
            return Err(ZScoreError::PseudoTrials {
                found: pseudo_trials,
            });
        }
        let squares = prior.std_dev.iter().map(|s| pseudo_trials * s * s);
        Ok(Self {
            trials: 0,
            pseudo_trials,
            learns: true,
            squares: squares.collect(),
            mean: prior.mean,
        })
    }

    /// Starts a session that is scored against a prior alone, whatever its trials are.
    #[must_use]
    pub fn prior_alone(prior: Prior) -> Self {
        Self {
            trials: 0,
            pseudo_trials: 1.0,
            learns: false,
            squares: prior.std_dev.iter().map(|s| s * s).collect(),
            mean: prior.mean,
        }
    }

    /// Trials taken so far.
    #[must_use]
    pub fn trials(&self) -> u32 {
        self.trials
    }

    /// Takes one more trial and scores it against all trials so far, itself included.
    ///
    /// - `betas`: `[voxel]`, scanner units.
    ///
    /// Returns z-scored betas, `[voxel]`, dimensionless.
    ///
    /// # Errors
    /// [`ZScoreError`] when the number of voxels differs or a beta is not finite;
    /// the trial is then not taken.
    pub fn push(&mut self, betas: ArrayView1<'_, f64>) -> Result<Array1<f64>, ZScoreError> {
        self.take(betas)?;
        self.score(betas)
    }

    /// Takes one more trial.
    ///
    /// - `betas`: `[voxel]`, scanner units.
    ///
    /// # Errors
    /// As [`RunningZScore::push`].
    pub fn take(&mut self, betas: ArrayView1<'_, f64>) -> Result<(), ZScoreError> {
        check(betas, self.mean.len())?;
        self.trials += 1;
        if !self.learns {
            return Ok(());
        }
        let weight = self.weight();
        let sums = self.mean.iter_mut().zip(&mut self.squares);
        for (&beta, (mean, squares)) in betas.iter().zip(sums) {
            let before = beta - *mean;
            *mean += before / weight;
            *squares += before * (beta - *mean);
        }
        Ok(())
    }

    /// Scores a trial against what was taken so far, and does not take it.
    ///
    /// - `betas`: `[voxel]`, scanner units.
    ///
    /// Returns z-scored betas, `[voxel]`, dimensionless.
    ///
    /// # Errors
    /// [`ZScoreError`] when the number of voxels differs or a beta is not finite.
    pub fn score(&self, betas: ArrayView1<'_, f64>) -> Result<Array1<f64>, ZScoreError> {
        check(betas, self.mean.len())?;
        let weight = self.weight();
        if weight == 0.0 {
            // Nothing to compare with, as for the first trial.
            return Ok(Array1::zeros(betas.len()));
        }
        let scores = betas.iter().zip(self.mean.iter().zip(&self.squares));
        let scores = scores.map(|(beta, (mean, squares))| {
            (beta - mean) / ((squares / weight).sqrt() + STD_DEV_FLOOR)
        });
        Ok(scores.collect())
    }

    /// Trials that mean and spread are made of.
    fn weight(&self) -> f64 {
        let trials = if self.learns { self.trials } else { 0 };
        self.pseudo_trials + f64::from(trials)
    }
}

fn check(betas: ArrayView1<'_, f64>, voxels: usize) -> Result<(), ZScoreError> {
    if betas.len() != voxels {
        return Err(ZScoreError::VoxelCount {
            expected: voxels,
            found: betas.len(),
        });
    }
    match betas.iter().position(|beta| !beta.is_finite()) {
        None => Ok(()),
        Some(voxel) => Err(ZScoreError::NotFinite { voxel }),
    }
}

/// The mean of a stimulus's z-scored betas over its repetitions so far, as MindEye2 averages
/// repetitions before it decodes.
///
/// Which trials repeat is known from the events, so only those are kept.
#[derive(Debug, Clone)]
pub struct RepeatAverage {
    voxels: usize,
    /// By stimulus shown more than once: repetitions so far and their sum, `[voxel]`.
    sums: HashMap<String, (u32, Option<Array1<f64>>)>,
}

impl RepeatAverage {
    /// Prepares for the trials of a session, of all its runs if the same stimuli come again.
    #[must_use]
    pub fn new<'e>(events: impl IntoIterator<Item = &'e Event>, voxels: usize) -> Self {
        let mut shown: HashMap<&str, u32> = HashMap::new();
        for event in events {
            *shown.entry(event.stimulus_name()).or_default() += 1;
        }
        let repeated = shown.into_iter().filter(|(_, times)| *times > 1);
        Self {
            voxels,
            sums: repeated
                .map(|(name, _)| (name.to_owned(), (0, None)))
                .collect(),
        }
    }

    /// Takes one more trial.
    ///
    /// - `zbetas`: `[voxel]`, dimensionless.
    ///
    /// Returns the mean over this stimulus's trials so far, `[voxel]`, and how many they are;
    /// the trial itself where its stimulus is shown once.
    ///
    /// # Errors
    /// [`ZScoreError`] when the number of voxels differs or a value is not finite; the trial is
    /// then not taken.
    pub fn push(
        &mut self,
        stimulus: &str,
        zbetas: ArrayView1<'_, f64>,
    ) -> Result<(Array1<f64>, u32), ZScoreError> {
        check(zbetas, self.voxels)?;
        let Some((repetitions, sum)) = self.sums.get_mut(stimulus) else {
            return Ok((zbetas.to_owned(), 1));
        };
        *repetitions += 1;
        let sum = match sum {
            Some(sum) => {
                *sum += &zbetas;
                &*sum
            }
            None => &*sum.insert(zbetas.to_owned()),
        };
        Ok((sum / f64::from(*repetitions), *repetitions))
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2, array, s};
    use proptest::prelude::*;

    use super::{Prior, RepeatAverage, RunningZScore, ZScoreError};
    use crate::events::Event;

    /// The definition, written out, for the last row.
    fn slow(betas: &Array2<f64>) -> Array1<f64> {
        let trials = f64::from(u32::try_from(betas.nrows()).unwrap());
        (0..betas.ncols())
            .map(|voxel| {
                let column = betas.column(voxel);
                let mean = column.sum() / trials;
                let variance = column.mapv(|b| (b - mean).powi(2)).sum() / trials;
                (column[betas.nrows() - 1] - mean) / (variance.sqrt() + 1e-6)
            })
            .collect()
    }

    #[test]
    fn first_trial_scores_zero() {
        let mut score = RunningZScore::new(2);
        assert_eq!(score.push(array![3.5, -1e6].view()), Ok(array![0.0, 0.0]));
    }

    #[test]
    fn trial_with_a_nan_is_refused_and_not_taken() {
        let mut score = RunningZScore::new(2);
        let bad = score.push(array![1.0, f64::NAN].view());
        assert_eq!(bad, Err(ZScoreError::NotFinite { voxel: 1 }));
        let short = score.push(array![1.0].view());
        assert_eq!(
            short,
            Err(ZScoreError::VoxelCount {
                expected: 2,
                found: 1
            })
        );
        assert_eq!(score.trials(), 0);
    }

    proptest! {
        #[test]
        fn running_score_equals_the_definition(
            values in prop::collection::vec(-1e4_f64..1e4, 3..90)
        ) {
            let trials = values.len() / 3;
            let betas = Array2::from_shape_vec((trials, 3), values[..trials * 3].to_vec()).unwrap();
            let mut score = RunningZScore::new(3);
            for k in 0..trials {
                let fast = score.push(betas.row(k)).unwrap();
                let slow = slow(&betas.slice(s![..=k, ..]).to_owned());
                for (a, b) in fast.iter().zip(&slow) {
                    prop_assert!((a - b).abs() < 1e-9, "trial {k}: {a} and {b}");
                }
            }
        }

        #[test]
        fn blended_prior_equals_that_many_trials_of_its_mean_and_spread(
            values in prop::collection::vec(-1e3_f64..1e3, 1..30),
            (mean, std_dev) in (-1e3_f64..1e3, 0.0_f64..300.0),
            pairs in 1_u8..9,
        ) {
            // Pairs of trials one standard deviation to either side have that mean and spread.
            let mut all: Vec<f64> = (0..pairs).flat_map(|_| [mean - std_dev, mean + std_dev]).collect();
            let prior = Prior::new(vec![mean], vec![std_dev]).unwrap();
            let mut score = RunningZScore::blended(prior, 2.0 * f64::from(pairs)).unwrap();
            for value in values {
                all.push(value);
                let expected = slow(&Array2::from_shape_vec((all.len(), 1), all.clone()).unwrap());
                let found = score.push(array![value].view()).unwrap();
                prop_assert!((found[0] - expected[0]).abs() < 1e-7, "{} and {}", found[0], expected[0]);
            }
        }

        #[test]
        fn trials_taken_first_are_scored_against_all(
            values in prop::collection::vec(-1e4_f64..1e4, 1..40)
        ) {
            let mut score = RunningZScore::new(1);
            for value in &values {
                score.take(array![*value].view()).unwrap();
            }
            let count = values.len() as f64;
            let mean = values.iter().sum::<f64>() / count;
            let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
            for value in values {
                let expected = (value - mean) / (variance.sqrt() + 1e-6);
                let found = score.score(array![value].view()).unwrap()[0];
                prop_assert!((found - expected).abs() < 1e-8, "{found} and {expected}");
            }
        }
    }

    #[test]
    fn prior_alone_never_changes() {
        let prior = Prior::new(vec![10.0, -5.0], vec![2.0, 0.0]).unwrap();
        let mut score = RunningZScore::prior_alone(prior);
        for trial in 1..4 {
            let scores = score.push(array![14.0, -5.0].view()).unwrap();
            assert!((scores[0] - 4.0 / 2.000_001).abs() < 1e-12, "{scores}");
            assert_eq!(scores[1], 0.0);
            assert_eq!(score.trials(), trial);
        }
    }

    #[test]
    fn prior_that_cannot_be_is_named() {
        let found = Prior::new(vec![0.0], vec![1.0, 1.0]);
        let refused = ZScoreError::PriorLength {
            means: 1,
            std_devs: 2,
        };
        assert_eq!(found, Err(refused));
        let found = Prior::new(vec![0.0, 1.0], vec![1.0, -1.0]);
        let refused = ZScoreError::PriorValue {
            voxel: 1,
            mean: 1.0,
            std_dev: -1.0,
        };
        assert_eq!(found, Err(refused));
        for found in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let prior = Prior::new(vec![0.0], vec![1.0]).unwrap();
            let error = RunningZScore::blended(prior, found).unwrap_err();
            assert!(matches!(error, ZScoreError::PseudoTrials { .. }), "{error}");
        }
    }

    #[test]
    fn repeats_are_averaged_by_stimulus_so_far() {
        let mut events = vec![
            Event::new(0.0, 3.0, "a"),
            Event::new(4.0, 3.0, "b"),
            Event::new(8.0, 3.0, "a"),
            Event::new(12.0, 3.0, "image"),
            Event::new(16.0, 3.0, "image"),
        ];
        events[3].stimulus = Some("cat.png".to_owned());
        events[4].stimulus = Some("dog.png".to_owned());
        let mut repeats = RepeatAverage::new(&events, 2);
        let values = [[1.0, 2.0], [5.0, 5.0], [3.0, -2.0], [7.0, 7.0], [9.0, 9.0]];
        let found = events.iter().zip(values).map(|(event, values)| {
            let zbetas = Array1::from(values.to_vec());
            repeats.push(event.stimulus_name(), zbetas.view()).unwrap()
        });
        let expected = [
            (array![1.0, 2.0], 1),
            (array![5.0, 5.0], 1),
            (array![2.0, 0.0], 2),
            (array![7.0, 7.0], 1),
            (array![9.0, 9.0], 1),
        ];
        assert!(found.eq(expected));
    }

    #[test]
    fn repeat_with_a_nan_is_refused_and_not_taken() {
        let events = [Event::new(0.0, 3.0, "a"), Event::new(4.0, 3.0, "a")];
        let mut repeats = RepeatAverage::new(&events, 1);
        let bad = repeats.push("a", array![f64::NAN].view());
        assert_eq!(bad, Err(ZScoreError::NotFinite { voxel: 0 }));
        assert_eq!(repeats.push("a", array![4.0].view()), Ok((array![4.0], 1)));
    }
}
