//! The discrete noise levels of latent diffusion.

use bundle::EdmSchedule;

use super::SamplerError;

/// A diffusion noise level, dimensionless.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Sigma(pub f32);

/// Noise levels of a square-root-linear beta schedule, ascending.
///
/// `sigma = sqrt((1 - a) / a)` with `a` the cumulative product of `1 - beta`, computed in double
/// precision and kept in single, as sgm's `LegacyDDPMDiscretization` does.
#[derive(Clone, Debug, PartialEq)]
pub struct SigmaTable {
    sigmas: Vec<f32>,
    alphas_cumprod: Vec<f64>,
}

impl SigmaTable {
    /// The table of a schedule.
    #[must_use]
    pub fn new(schedule: &EdmSchedule) -> SigmaTable {
        let last = f64::from(schedule.steps.max(2) - 1);
        let (start, end) = (schedule.linear_start.sqrt(), schedule.linear_end.sqrt());
        let mut product = 1.0;
        let alphas_cumprod: Vec<f64> = (0..schedule.steps)
            .map(|index| {
                let root = start + (end - start) * f64::from(index) / last;
                product *= 1.0 - root * root;
                product
            })
            .collect();
        SigmaTable::of_alphas(alphas_cumprod)
    }

    /// The table shifted so that its last entry is pure noise (Lin et al. 2023, arXiv:2305.08891);
    /// that entry's product is 2^-24, as diffusers keeps it above zero.
    #[must_use]
    pub fn with_zero_terminal_snr(&self) -> SigmaTable {
        const LEAST: f64 = 1.0 / 16_777_216.0;
        let root = |index: usize| self.alphas_cumprod[index].sqrt();
        let count = self.alphas_cumprod.len();
        let (first, last) = (root(0), root(count - 1));
        let shifted = |index| (root(index) - last) * first / (first - last);
        let alphas = (0..count)
            .map(|index| shifted(index).powi(2).max(LEAST))
            .collect();
        SigmaTable::of_alphas(alphas)
    }

    fn of_alphas(alphas_cumprod: Vec<f64>) -> SigmaTable {
        let level = |alpha: &f64| super::narrow(((1.0 - alpha) / alpha).sqrt());
        let sigmas = alphas_cumprod.iter().map(level).collect();
        SigmaTable {
            sigmas,
            alphas_cumprod,
        }
    }

    /// The cumulative product of `1 - beta` at a timestep.
    pub(super) fn alpha(&self, time: usize) -> Result<f64, SamplerError> {
        let found = self.alphas_cumprod.get(time).copied();
        found.ok_or(SamplerError::Time {
            time,
            len: self.alphas_cumprod.len(),
        })
    }

    /// The noise level at a timestep.
    pub(super) fn sigma(&self, time: usize) -> Result<f32, SamplerError> {
        let found = self.sigmas.get(time).copied();
        found.ok_or(SamplerError::Time {
            time,
            len: self.sigmas.len(),
        })
    }

    /// All levels, ascending.
    #[must_use]
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Cumulative products of `1 - beta`, descending.
    #[must_use]
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }

    /// The nearest level of the table and its index.
    #[must_use]
    pub fn nearest(&self, sigma: Sigma) -> (Sigma, usize) {
        let distance = |index: usize| (self.sigmas[index] - sigma.0).abs();
        // The first of equally near ones, as the original's argmin.
        let index = (0..self.sigmas.len())
            .min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
            .unwrap_or(0);
        (Sigma(self.sigmas[index]), index)
    }

    /// Levels of a run of `steps` steps, descending, closed by zero: `steps + 1` values.
    ///
    /// Indices are those of `linspace(len - 1, 0, steps, no end point)`, truncated.
    #[must_use]
    pub fn descending(&self, steps: usize) -> Vec<Sigma> {
        let mut levels: Vec<Sigma> = self
            .indices(steps)
            .into_iter()
            .map(|index| Sigma(self.sigmas[index]))
            .collect();
        levels.push(Sigma(0.0));
        levels
    }

    /// Table indices of a run of `steps` steps, descending.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "indices of a table of at most 100,000 entries"
    )]
    pub fn indices(&self, steps: usize) -> Vec<usize> {
        let last = self.sigmas.len().saturating_sub(1);
        let step = -(last as f64) / steps as f64;
        (0..steps)
            .map(|index| (index as f64 * step + last as f64) as usize)
            .collect()
    }
}
