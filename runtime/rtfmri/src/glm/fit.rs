//! Solves the single-trial model for its probe, at every voxel at once.
//!
//! The design's columns are made orthonormal (Gram-Schmidt, twice), the probe last, so that
//! its beta is the weight of one orthonormal column over that column's scale, whatever the
//! units of the confounds. A nuisance column that the others already span adds nothing and
//! is left out.
//!
//! - Ordinary least squares: a beta is one weighted sum of the voxel's volumes, and the
//!   weights are the same at every voxel.
//! - AR(1): in one pass over the series the residuals' lag-0 and lag-1 sums are gathered per
//!   voxel (as quadratic forms, no residual is stored); they give the voxel's coefficient,
//!   truncated to 0.01. Each coefficient in use then has its own weights: the whitened model
//!   `x_t - rho x_(t-1)`, first row unchanged, solved once. A second pass sums.
//!
//! Across missing volumes, `g` volumes apart, the noise is correlated by `rho^g`, and the
//! whitened row is scaled to the variance of the others.

use nalgebra::{DMatrix, DVector};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, s};

use super::{Design, GlmError, GlmSettings, Noise, Regressor};
use crate::events::Event;

/// A column whose part outside the others is smaller than this share of it is dependent.
const DEPENDENT: f64 = 1e-9;
/// Residuals smaller than this share of a voxel's variation are rounding, not noise.
const EXACT_FIT: f64 = 1e-20;
/// Bins of the autoregressive coefficient to either side of zero, 0.01 wide.
const BINS: i32 = 99;
/// Voxels per pass, so that the sums of all regressors stay in the cache.
const BLOCK: usize = 256;

/// Fits one trial's response at every voxel, given the run so far.
///
/// - `trial`: index into `events`.
/// - `frames`: frame number (0 = first volume of the run) of each row of `series`, rising;
///   rows after the trial's decode time are not used.
/// - `series`: `[volume, voxel]`, scanner units.
/// - `confounds`: `[volume, confound]`, any units, one row per row of `series`.
///
/// Returns betas, `[voxel]`, scanner units. Solved in double precision.
///
/// # Errors
/// [`GlmError::TooFewVolumes`] while volumes do not outnumber regressors,
/// [`GlmError::MissingVolumes`] when the trial's window has holes, and others by name.
pub fn fit_trial(
    settings: &GlmSettings,
    events: &[Event],
    trial: usize,
    frames: &[usize],
    series: ArrayView2<'_, f32>,
    confounds: Option<ArrayView2<'_, f64>>,
) -> Result<Array1<f64>, GlmError> {
    if series.nrows() != frames.len() {
        return Err(GlmError::Rows {
            array: "series",
            expected: frames.len(),
            found: series.nrows(),
        });
    }
    let design = Design::build(settings, events, trial, frames, confounds)?;
    let series = series.slice(s![..design.frames.len(), ..]);
    let basis = Basis::new(&design)?;
    let betas = match settings.noise {
        Noise::Ols => fit_ols(&basis, series),
        Noise::Ar1 => fit_ar1(&basis, series),
    };
    match betas.iter().position(|beta| !beta.is_finite()) {
        None => Ok(betas),
        Some(voxel) => Err(GlmError::Series { voxel }),
    }
}

/// An orthonormal basis of a design, its last column the probe's own part.
struct Basis {
    /// `[regressor][volume]`
    columns: Vec<Vec<f64>>,
    /// Length of the probe's own part, regressor units.
    probe_scale: f64,
    /// Volumes from the row before to this one; 0 in the first row.
    steps: Vec<usize>,
}

impl Basis {
    fn new(design: &Design) -> Result<Self, GlmError> {
        let mut columns: Vec<Vec<f64>> = Vec::with_capacity(design.regressors.len());
        let values = &design.values;
        // The constant first and the probe last; the others' order does not matter.
        let nuisance = (0..design.regressors.len())
            .rev()
            .filter(|&column| design.regressors[column] != Regressor::Probe);
        for column in nuisance {
            if let Some((unit, _)) = outside(&columns, values.column(column)) {
                columns.push(unit);
            }
        }
        let probe = design
            .regressors
            .iter()
            .position(|&regressor| regressor == Regressor::Probe)
            .and_then(|column| outside(&columns, values.column(column)));
        let (unit, probe_scale) = probe.ok_or(GlmError::NotEstimable {
            others: design.regressors.len() - 1,
        })?;
        columns.push(unit);
        let steps = std::iter::once(0)
            .chain(design.frames.windows(2).map(|pair| pair[1] - pair[0]))
            .collect();
        Ok(Self {
            columns,
            probe_scale,
            steps,
        })
    }

    fn rows(&self) -> usize {
        self.steps.len()
    }

    fn probe(&self) -> &[f64] {
        &self.columns[self.columns.len() - 1]
    }

    /// Whether row `i` follows its predecessor with no volume missing between.
    fn follows(&self, i: usize) -> bool {
        self.steps.get(i) == Some(&1)
    }

    /// Weights of the volumes in the probe's beta when noise has the coefficient `rho`.
    fn ar1_weights(&self, rho: f64) -> Vec<f64> {
        let rows = self.rows();
        // Row i of the whitened model: scale * (x_i - carry * x_(i-1)).
        let (carry, scale): (Vec<f64>, Vec<f64>) = self
            .steps
            .iter()
            .map(|&step| match step {
                0 => (0.0, 1.0),
                1 => (rho, 1.0),
                _ => {
                    let carry = rho.powf_steps(step);
                    let scale = ((1.0 - rho * rho) / (1.0 - carry * carry)).sqrt();
                    (carry, scale)
                }
            })
            .unzip();
        let whitened = DMatrix::from_fn(rows, self.columns.len(), |i, column| {
            let x = &self.columns[column];
            let before = if i == 0 { 0.0 } else { x[i - 1] };
            scale[i] * (x[i] - carry[i] * before)
        });
        let last = self.columns.len() - 1;
        let mut solution = DVector::zeros(self.columns.len());
        solution[last] = 1.0 / self.probe_scale;
        // |rho| <= 0.99 keeps the whitening invertible, so the matrix is positive definite.
        if let Some(cholesky) = whitened.tr_mul(&whitened).cholesky() {
            cholesky.solve_mut(&mut solution);
        } else {
            solution.fill(f64::NAN);
        }
        let fitted = &whitened * solution;
        (0..rows)
            .map(|i| {
                let own = scale[i] * fitted[i];
                let after = (i + 1 < rows).then(|| scale[i + 1] * carry[i + 1] * fitted[i + 1]);
                own - after.unwrap_or(0.0)
            })
            .collect()
    }
}

/// `rho` to the power of a number of volumes.
trait PowSteps {
    fn powf_steps(self, steps: usize) -> f64;
}

impl PowSteps for f64 {
    fn powf_steps(self, steps: usize) -> f64 {
        i32::try_from(steps).map_or(0.0, |steps| self.powi(steps))
    }
}

/// The part of `column` outside the span of `columns`, with unit length, and its length.
fn outside(columns: &[Vec<f64>], column: ArrayView1<'_, f64>) -> Option<(Vec<f64>, f64)> {
    let mut rest = column.to_vec();
    let before = dot(&rest, &rest).sqrt();
    // Twice is enough (Kahan and Parlett): the second pass removes the first's rounding.
    for _ in 0..2 {
        for unit in columns {
            let part = dot(unit, &rest);
            for (value, unit) in rest.iter_mut().zip(unit) {
                *value -= part * unit;
            }
        }
    }
    let after = dot(&rest, &rest).sqrt();
    if after.is_nan() || after <= DEPENDENT * before {
        return None;
    }
    for value in &mut rest {
        *value /= after;
    }
    Some((rest, after))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Adds `weight * row` to `sums`.
fn add_scaled(sums: &mut [f64], weight: f64, row: &[f64]) {
    for (sum, value) in sums.iter_mut().zip(row) {
        *sum += weight * value;
    }
}

/// A block of voxels of `series`, row by row, less each voxel's first value: the baseline is
/// far larger than the response and would cost digits.
fn for_each_row(
    series: ArrayView2<'_, f32>,
    voxels: std::ops::Range<usize>,
    mut take: impl FnMut(usize, &[f64]),
) {
    let block = series.slice(s![.., voxels]);
    let first = block.row(0).mapv(f64::from).to_vec();
    let mut row = vec![0.0; first.len()];
    for (i, values) in block.rows().into_iter().enumerate() {
        for ((row, &value), first) in row.iter_mut().zip(values).zip(&first) {
            *row = f64::from(value) - first;
        }
        take(i, &row);
    }
}

fn blocks(voxels: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..voxels)
        .step_by(BLOCK)
        .map(move |start| start..(start + BLOCK).min(voxels))
}

fn fit_ols(basis: &Basis, series: ArrayView2<'_, f32>) -> Array1<f64> {
    let mut betas = vec![0.0; series.ncols()];
    for voxels in blocks(series.ncols()) {
        let sums = &mut betas[voxels.clone()];
        for_each_row(series, voxels, |i, row| {
            add_scaled(sums, basis.probe()[i] / basis.probe_scale, row);
        });
    }
    Array1::from_vec(betas)
}

fn fit_ar1(basis: &Basis, series: ArrayView2<'_, f32>) -> Array1<f64> {
    let mut bins = Vec::with_capacity(series.ncols());
    let estimator = RhoEstimator::new(basis);
    for voxels in blocks(series.ncols()) {
        estimator.push_bins(series, voxels, &mut bins);
    }

    // `place[bin]` is the column of the bin's weights.
    let mut place = [None; 2 * BINS as usize + 1];
    let mut weights: Vec<Vec<f64>> = Vec::new();
    let voxel_weights: Vec<usize> = bins
        .iter()
        .map(|&bin| {
            let slot = &mut place[usize::try_from(bin + BINS).unwrap_or_default()];
            *slot.get_or_insert_with(|| {
                weights.push(basis.ar1_weights(f64::from(bin) / 100.0));
                weights.len() - 1
            })
        })
        .collect();
    let weights = Array2::from_shape_fn((basis.rows(), weights.len()), |(i, w)| weights[w][i]);

    let mut betas = vec![0.0; series.ncols()];
    for voxels in blocks(series.ncols()) {
        let sums = &mut betas[voxels.clone()];
        let choice = &voxel_weights[voxels.clone()];
        for_each_row(series, voxels, |i, row| {
            let weights = weights.row(i);
            for ((sum, value), &which) in sums.iter_mut().zip(row).zip(choice) {
                *sum += weights[which] * value;
            }
        });
    }
    Array1::from_vec(betas)
}

/// Lag-1 autocorrelation of each voxel's residuals.
struct RhoEstimator<'a> {
    basis: &'a Basis,
    /// `[volume, regressor]`: each basis column's two neighbours in time, summed.
    neighbours: Array2<f64>,
    /// `[regressor, regressor]`: products of basis columns one volume apart.
    lagged: Array2<f64>,
    pairs: usize,
}

impl<'a> RhoEstimator<'a> {
    fn new(basis: &'a Basis) -> Self {
        let (rows, count) = (basis.rows(), basis.columns.len());
        let neighbours = Array2::from_shape_fn((rows, count), |(i, column)| {
            let x = &basis.columns[column];
            let before = if basis.follows(i) { x[i - 1] } else { 0.0 };
            let after = if basis.follows(i + 1) { x[i + 1] } else { 0.0 };
            before + after
        });
        let lagged = Array2::from_shape_fn((count, count), |(a, b)| {
            (1..rows)
                .filter(|&i| basis.follows(i))
                .map(|i| basis.columns[a][i - 1] * basis.columns[b][i])
                .sum()
        });
        Self {
            basis,
            neighbours,
            lagged,
            pairs: (1..rows).filter(|&i| basis.follows(i)).count(),
        }
    }

    /// Appends the bin of every voxel of the block.
    ///
    /// The residuals' grand mean is not taken off: the constant is in the design, so it is
    /// zero.
    fn push_bins(
        &self,
        series: ArrayView2<'_, f32>,
        voxels: std::ops::Range<usize>,
        bins: &mut Vec<i32>,
    ) {
        let (width, count) = (voxels.len(), self.basis.columns.len());
        let mut fitted = vec![vec![0.0; width]; count];
        let mut crossed = vec![vec![0.0; width]; count];
        let mut squares = vec![0.0; width];
        let mut products = vec![0.0; width];
        let mut before = vec![0.0; width];
        for_each_row(series, voxels, |i, row| {
            for (square, value) in squares.iter_mut().zip(row) {
                *square += value * value;
            }
            if self.basis.follows(i) {
                for ((product, value), before) in products.iter_mut().zip(row).zip(&before) {
                    *product += value * before;
                }
            }
            before.copy_from_slice(row);
            for column in 0..count {
                add_scaled(&mut fitted[column], self.basis.columns[column][i], row);
                add_scaled(&mut crossed[column], self.neighbours[[i, column]], row);
            }
        });
        for voxel in 0..width {
            let mut lag_0 = squares[voxel];
            let mut lag_1 = products[voxel];
            for a in 0..count {
                let weight = fitted[a][voxel];
                lag_0 -= weight * weight;
                let both: f64 = (0..count)
                    .map(|b| self.lagged[[a, b]] * fitted[b][voxel])
                    .sum();
                lag_1 += weight * (both - crossed[a][voxel]);
            }
            bins.push(self.bin(lag_0, lag_1, squares[voxel]));
        }
    }

    fn bin(&self, lag_0: f64, lag_1: f64, squares: f64) -> i32 {
        if self.pairs == 0 || lag_0 <= EXACT_FIT * squares {
            return 0;
        }
        let rho = (lag_1 / self.pairs as f64) / (lag_0 / self.basis.rows() as f64);
        truncate_bin(rho)
    }
}

/// The coefficient's bin, toward zero; NaN (a voxel that will be refused) becomes 0.
#[expect(
    clippy::cast_possible_truncation,
    reason = "clamped to the bins first; truncation toward zero is the rule"
)]
fn truncate_bin(rho: f64) -> i32 {
    (rho * 100.0).clamp(f64::from(-BINS), f64::from(BINS)) as i32
}
