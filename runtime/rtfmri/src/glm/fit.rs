//! Solves the single-trial model for its probe, at every voxel at once.
//!
//! The series is read once, a block of voxels at a time: a matrix product gives each voxel's
//! sums with the columns of an orthonormal basis of the design and, for autoregressive noise,
//! with their neighbours in time. All else follows from these sums, voxel by voxel.
//!
//! - Ordinary least squares: the probe's sum is the beta, and what the sums leave of the
//!   voxel's variation is its noise.
//! - AR(1): the residuals' lag-0 and lag-1 sums are quadratic forms of the same sums, no
//!   residual is stored; they give the voxel's coefficient, truncated to 0.01. Each
//!   coefficient in use has its whitened model solved once.
//!
//! A beta's variance is nilearn's: the (whitened) residuals' sum of squares over volumes less
//! regressors, times the probe's entry of the inverse normal equations.

use std::borrow::Cow;
use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, s};

use super::basis::{Basis, Factor, Scratch, VoxelSums, Whitening};
use super::{Design, GlmError, GlmSettings, Noise};
use crate::events::Event;

/// Residuals smaller than this share of a voxel's variation are rounding, not noise.
const EXACT_FIT: f64 = 1e-14;
/// Bins of the autoregressive coefficient to either side of zero, 0.01 wide.
const BINS: i32 = 99;
/// Values of a block of voxels, so that it stays in the second-level cache.
const BLOCK_VALUES: usize = 1 << 15;

/// One trial's response at every voxel.
#[derive(Debug, Clone, PartialEq)]
pub struct TrialFit {
    /// `[voxel]`, scanner units.
    pub betas: Array1<f64>,
    /// Variance of each beta as an estimate, `[voxel]`, scanner units squared.
    pub variance: Array1<f64>,
    /// Volumes used, less regressors.
    pub degrees_of_freedom: usize,
}

/// Fits one trial's response at every voxel, given the run so far, at its decode time.
///
/// - `trial`: index into `events`.
/// - `frames`: frame number (0 = first volume of the run) of each row of `series`, rising;
///   rows after the trial's decode time are not used.
/// - `series`: `[volume, voxel]`, scanner units.
/// - `confounds`: `[volume, confound]`, any units, one row per row of `series`.
///
/// Solved in double precision. For another decode time see [`Design::build_at`], for volumes
/// that do not lie in one array [`Design::fit`].
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
) -> Result<TrialFit, GlmError> {
    if series.nrows() != frames.len() {
        return Err(GlmError::Rows {
            array: "series",
            expected: frames.len(),
            found: series.nrows(),
        });
    }
    let design = Design::build(settings, events, trial, frames, confounds)?;
    let series = series.slice(s![..design.frames.len(), ..]);
    let rows: Vec<Cow<'_, [f32]>> = series
        .rows()
        .into_iter()
        .map(|row| match row.to_slice() {
            Some(row) => Cow::Borrowed(row),
            None => Cow::Owned(row.to_vec()),
        })
        .collect();
    let rows: Vec<&[f32]> = rows.iter().map(AsRef::as_ref).collect();
    design.fit(settings.noise, &rows)
}

impl Design {
    /// Fits the probe at every voxel.
    ///
    /// - `volumes`: `[volume][voxel]`, scanner units; one per entry of `frames`.
    ///
    /// # Errors
    /// [`GlmError`] when the shapes do not fit, when the probe cannot be told from the other
    /// regressors, or when a value is not finite.
    pub fn fit<T: Copy + Into<f64>>(
        &self,
        noise: Noise,
        volumes: &[&[T]],
    ) -> Result<TrialFit, GlmError> {
        let (rows, regressors) = (self.frames.len(), self.regressors.len());
        for (array, found) in [("series", volumes.len()), ("design", self.values.nrows())] {
            if found != rows {
                return Err(GlmError::Rows {
                    array,
                    expected: rows,
                    found,
                });
            }
        }
        let voxels = volumes.first().map_or(0, |volume| volume.len());
        if let Some(row) = volumes.iter().position(|volume| volume.len() != voxels) {
            return Err(GlmError::Voxels {
                frame: self.frames[row],
                expected: voxels,
                found: volumes[row].len(),
            });
        }
        if rows <= regressors {
            return Err(GlmError::TooFewVolumes {
                volumes: rows,
                regressors,
            });
        }
        let basis = Basis::new(self)?;
        let mut fit = Fit {
            basis: &basis,
            volumes,
            degrees_of_freedom: rows - regressors,
            betas: Vec::with_capacity(voxels),
            variance: Vec::with_capacity(voxels),
        };
        match noise {
            Noise::Ols => fit.ols(voxels),
            Noise::Ar1 => fit.ar1(voxels),
        }
        match fit.betas.iter().position(|beta| !beta.is_finite()) {
            None => Ok(TrialFit {
                betas: fit.betas.into(),
                variance: fit.variance.into(),
                degrees_of_freedom: fit.degrees_of_freedom,
            }),
            Some(voxel) => Err(GlmError::Series { voxel }),
        }
    }
}

/// Betas in the making.
struct Fit<'a, T> {
    basis: &'a Basis,
    volumes: &'a [&'a [T]],
    degrees_of_freedom: usize,
    betas: Vec<f64>,
    variance: Vec<f64>,
}

impl<T: Copy + Into<f64>> Fit<'_, T> {
    fn ols(&mut self, voxels: usize) {
        let mut block = Block::new(self.volumes.len(), voxels, self.basis.by_volume());
        for range in block.ranges(voxels) {
            block.load(self.basis, self.volumes, range);
            for voxel in 0..block.width {
                let fitted = block.fitted(voxel);
                let explained: f64 = fitted.iter().map(|part| part * part).sum();
                let probe = fitted.last().copied().unwrap_or(f64::NAN);
                let squares = block.squares[voxel];
                self.push(probe, squares - explained, 1.0, squares);
            }
        }
    }

    fn ar1(&mut self, voxels: usize) {
        let whitening = Whitening::new(self.basis);
        let count = self.basis.len();
        let half_lagged = &whitening.lagged / 2.0;
        let mut block = Block::new(self.volumes.len(), voxels, whitening.weights.clone());
        let mut shifted = Array2::zeros((block.capacity, count));
        let mut factors: Vec<Option<Factor>> = (-BINS..=BINS).map(|_| None).collect();
        let mut scratch = Scratch::default();
        for range in block.ranges(voxels) {
            block.load(self.basis, self.volumes, range);
            let fitted = block.sums.slice(s![..block.width, ..count]);
            let mut shifted = shifted.slice_mut(s![..block.width, ..]);
            general_mat_mul(1.0, &fitted, &half_lagged, 0.0, &mut shifted);
            for voxel in 0..block.width {
                let (fitted, crossed) = block.fitted(voxel).split_at(count);
                let sums = VoxelSums {
                    fitted,
                    crossed,
                    squares: block.squares[voxel],
                    products: block.products[voxel],
                };
                let mut lag_0 = sums.squares;
                let mut lag_1 = sums.products;
                for ((fitted, crossed), shifted) in
                    fitted.iter().zip(crossed).zip(shifted.row(voxel))
                {
                    lag_0 -= fitted * fitted;
                    lag_1 += fitted * (shifted - crossed);
                }
                // The residuals' grand mean is not taken off: the constant is in the design, so
                // it is zero.
                let bin = if whitening.pairs == 0 || lag_0 <= EXACT_FIT * sums.squares {
                    0
                } else {
                    let variance = lag_0 / self.basis.rows() as f64;
                    truncate_bin(lag_1 / whitening.pairs as f64 / variance)
                };
                let place = &mut factors[usize::try_from(bin + BINS).unwrap_or_default()];
                if place.is_none() {
                    *place = whitening.factor(f64::from(bin) / 100.0);
                }
                let Some(factor) = place else {
                    self.push(f64::NAN, f64::NAN, f64::NAN, f64::NAN);
                    continue;
                };
                let found =
                    whitening.solve(factor, &sums, |row| block.value(row, voxel), &mut scratch);
                self.push(found.probe, found.residual, found.variance, sums.squares);
            }
        }
    }

    /// Appends a voxel.
    ///
    /// - `probe`: weight of the probe's own part; `variance`: its variance under noise of
    ///   variance one.
    /// - `residual`, `squares`: sums of squares of the residuals and of the series.
    fn push(&mut self, probe: f64, residual: f64, variance: f64, squares: f64) {
        let scale = self.basis.probe_scale;
        let residual = if residual <= EXACT_FIT * squares {
            0.0
        } else {
            residual
        };
        let noise = residual / self.degrees_of_freedom as f64;
        self.betas.push(probe / scale);
        self.variance.push(noise * variance / (scale * scale));
    }
}

/// A block of voxels and its sums.
struct Block {
    /// Most voxels of a block.
    capacity: usize,
    /// Voxels of this one.
    width: usize,
    /// `[volume][voxel]`, less each voxel's first value: the baseline is far larger than the
    /// response and would cost digits.
    values: Vec<f64>,
    /// `[volume, column]`
    weights: Array2<f64>,
    /// Products of values and weights, `[voxel, column]`.
    sums: Array2<f64>,
    /// Sums of squares, `[voxel]`.
    squares: Vec<f64>,
    /// Sums of products of volumes that follow each other, `[voxel]`.
    products: Vec<f64>,
    first: Vec<f64>,
}

impl Block {
    fn new(rows: usize, voxels: usize, weights: Array2<f64>) -> Self {
        let capacity = (BLOCK_VALUES / rows.max(1))
            .max(1)
            .next_multiple_of(16)
            .min(voxels);
        Self {
            capacity,
            width: 0,
            values: vec![0.0; rows * capacity],
            sums: Array2::zeros((capacity, weights.ncols())),
            weights,
            squares: vec![0.0; capacity],
            products: vec![0.0; capacity],
            first: vec![0.0; capacity],
        }
    }

    fn ranges(&self, voxels: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let capacity = self.capacity;
        (0..voxels)
            .step_by(capacity.max(1))
            .map(move |start| start..(start + capacity).min(voxels))
    }

    fn load<T: Copy + Into<f64>>(&mut self, basis: &Basis, volumes: &[&[T]], voxels: Range<usize>) {
        let width = voxels.len();
        self.width = width;
        let (squares, products) = (&mut self.squares[..width], &mut self.products[..width]);
        squares.fill(0.0);
        products.fill(0.0);
        let first = &mut self.first[..width];
        if let Some(volume) = volumes.first() {
            for (first, &value) in first.iter_mut().zip(&volume[voxels.clone()]) {
                *first = value.into();
            }
        }
        for (i, volume) in volumes.iter().enumerate() {
            let (before, rest) = self.values.split_at_mut(i * width);
            let row = &mut rest[..width];
            let source = &volume[voxels.clone()];
            for (((row, &value), first), square) in
                row.iter_mut().zip(source).zip(&*first).zip(&mut *squares)
            {
                let value = value.into() - first;
                *row = value;
                *square += value * value;
            }
            if basis.follows(i) {
                let before = &before[before.len() - width..];
                for ((product, value), before) in products.iter_mut().zip(&*row).zip(before) {
                    *product += value * before;
                }
            }
        }
        let values = &self.values[..volumes.len() * width];
        if let Ok(values) = ArrayView2::from_shape((volumes.len(), width), values) {
            let mut sums = self.sums.slice_mut(s![..width, ..]);
            general_mat_mul(1.0, &values.t(), &self.weights, 0.0, &mut sums);
        }
    }

    /// A voxel's sums, `[column]`.
    fn fitted(&self, voxel: usize) -> &[f64] {
        let columns = self.weights.ncols();
        self.sums
            .as_slice()
            .and_then(|sums| sums.get(voxel * columns..(voxel + 1) * columns))
            .unwrap_or_default()
    }

    fn value(&self, row: usize, voxel: usize) -> f64 {
        self.values[row * self.width + voxel]
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
