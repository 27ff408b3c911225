//! Z-scores of betas over the trials so far, voxel by voxel.
//!
//! At trial `k` each voxel's beta is compared with all betas of that voxel up to and
//! including this one: `z_k = (b_k - mean(b_1..b_k)) / (SD(b_1..b_k) + 1e-6)`, with the
//! population standard deviation, and `z_1 = 0`.
//! Mean and spread are carried from trial to trial (Welford 1962), so that a trial costs
//! one pass over the voxels however long the session is.

use ndarray::{Array1, ArrayView1};
use thiserror::Error;

/// Added to the standard deviation, in the betas' unit, so that a voxel that never
/// changes gets 0 and not a division by zero.
const STD_DEV_FLOOR: f64 = 1e-6;

/// Why a trial's betas were not taken.
#[derive(Debug, Error, PartialEq, Eq)]
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
}

/// Mean and spread of each voxel's betas so far.
#[derive(Debug, Clone)]
pub struct RunningZScore {
    trials: u32,
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl RunningZScore {
    /// Starts a session of `voxels` voxels.
    #[must_use]
    pub fn new(voxels: usize) -> Self {
        Self {
            trials: 0,
            mean: vec![0.0; voxels],
            squares: vec![0.0; voxels],
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
        if betas.len() != self.mean.len() {
            return Err(ZScoreError::VoxelCount {
                expected: self.mean.len(),
                found: betas.len(),
            });
        }
        if let Some(voxel) = betas.iter().position(|beta| !beta.is_finite()) {
            return Err(ZScoreError::NotFinite { voxel });
        }
        self.trials += 1;
        let trials = f64::from(self.trials);
        let scores = betas
            .iter()
            .zip(self.mean.iter_mut().zip(self.squares.iter_mut()))
            .map(|(&beta, (mean, squares))| {
                let before = beta - *mean;
                *mean += before / trials;
                let after = beta - *mean;
                *squares += before * after;
                after / ((*squares / trials).sqrt() + STD_DEV_FLOOR)
            });
        Ok(scores.collect())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2, array, s};
    use proptest::prelude::*;

    use super::{RunningZScore, ZScoreError};

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
    }
}
