//! An orthonormal basis of a design, and the whitened model in that basis.
//!
//! The design's columns are made orthonormal (Gram-Schmidt, twice), the probe last, so that
//! its beta is the weight of one orthonormal column over that column's scale, whatever the
//! units of the confounds. A nuisance column that the others already span adds nothing and
//! is left out.
//!
//! The whitened model's row is `x_i - rho x_(i-1)`, the first row unchanged. Its normal
//! equations are sums of products of the same volume, of neighbouring volumes, and of the few
//! rows at the run's end and around missing volumes; so a voxel's right-hand side at any
//! `rho` follows from sums over its series that do not depend on `rho`, and the series is
//! read once.
//!
//! Across missing volumes, `g` volumes apart, the noise is correlated by `rho^g`, and the
//! whitened row is scaled to the variance of the others.

use nalgebra::DMatrix;
use ndarray::{Array2, ArrayView1};

use super::{Design, GlmError, Regressor};

/// A column whose part outside the others is smaller than this share of it is dependent.
const DEPENDENT: f64 = 1e-9;

/// An orthonormal basis of a design, its last column the probe's own part.
pub(super) struct Basis {
    /// `[regressor][volume]`
    columns: Vec<Vec<f64>>,
    /// Length of the probe's own part, regressor units.
    pub(super) probe_scale: f64,
    /// Volumes from the row before to this one; 0 in the first row.
    steps: Vec<usize>,
}

impl Basis {
    pub(super) fn new(design: &Design) -> Result<Self, GlmError> {
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
            others: design.regressors.len().saturating_sub(1),
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

    /// Columns of the basis, at most the design's.
    pub(super) fn len(&self) -> usize {
        self.columns.len()
    }

    /// Volumes of the design.
    pub(super) fn rows(&self) -> usize {
        self.steps.len()
    }

    /// Whether row `i` follows its predecessor with no volume missing between.
    pub(super) fn follows(&self, i: usize) -> bool {
        self.steps.get(i) == Some(&1)
    }

    /// `[volume, regressor]`
    pub(super) fn by_volume(&self) -> Array2<f64> {
        Array2::from_shape_fn((self.rows(), self.len()), |(i, a)| self.columns[a][i])
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

/// What one voxel's series comes to; all that its fit needs.
pub(super) struct VoxelSums<'a> {
    /// Products with the basis, `[regressor]`.
    pub(super) fitted: &'a [f64],
    /// Products with each basis column's neighbours in time, `[regressor]`.
    pub(super) crossed: &'a [f64],
    /// Sum of squares.
    pub(super) squares: f64,
    /// Sum of products of volumes that follow each other.
    pub(super) products: f64,
}

/// The basis seen through first-order autoregressive noise.
pub(super) struct Whitening<'a> {
    basis: &'a Basis,
    /// `[volume][regressor]`
    rows: Vec<Vec<f64>>,
    /// `[regressor, regressor]`: products of basis columns one volume apart, both ways.
    pub(super) lagged: Array2<f64>,
    /// `[volume, 2 regressor]`: the basis, then its neighbours in time, summed.
    pub(super) weights: Array2<f64>,
    /// Pairs of volumes that follow each other.
    pub(super) pairs: usize,
    /// Rows whose next volume is missing, the last row among them.
    ends: Vec<usize>,
    /// Rows whose volume before is missing, but for the first.
    gaps: Vec<usize>,
}

/// A row after missing volumes: `scale (x_i - carry x_(i-1))`.
struct Gap {
    row: usize,
    /// Weight of the product of the row with itself, beyond the usual one.
    own: f64,
    /// Weight of the product with the row before.
    across: f64,
    /// Weight of the product of the row before with itself.
    before: f64,
}

/// The whitened model at one coefficient, solved.
pub(super) struct Factor {
    rho: f64,
    gaps: Vec<Gap>,
    /// Inverse of the Cholesky factor of the normal equations, column by column, each from
    /// its diagonal down.
    inverse: Vec<Vec<f64>>,
}

/// What the whitened model says of one voxel.
pub(super) struct Whitened {
    /// Weight of the probe's own part.
    pub(super) probe: f64,
    /// Sum of squares of the whitened residuals.
    pub(super) residual: f64,
    /// Variance of `probe` where the whitened noise has variance one.
    pub(super) variance: f64,
}

impl<'a> Whitening<'a> {
    pub(super) fn new(basis: &'a Basis) -> Self {
        let (rows, count) = (basis.rows(), basis.len());
        let own = basis.by_volume();
        let weights = Array2::from_shape_fn((rows, 2 * count), |(i, column)| {
            let Some(column) = column.checked_sub(count) else {
                return own[[i, column]];
            };
            let before = if basis.follows(i) {
                own[[i - 1, column]]
            } else {
                0.0
            };
            let after = if basis.follows(i + 1) {
                own[[i + 1, column]]
            } else {
                0.0
            };
            before + after
        });
        let lagged = Array2::from_shape_fn((count, count), |(a, b)| {
            (0..rows)
                .map(|i| own[[i, a]] * weights[[i, count + b]])
                .sum()
        });
        Self {
            basis,
            rows: own.rows().into_iter().map(|row| row.to_vec()).collect(),
            lagged,
            weights,
            pairs: (1..rows).filter(|&i| basis.follows(i)).count(),
            ends: (0..rows).filter(|&i| !basis.follows(i + 1)).collect(),
            gaps: (1..rows).filter(|&i| !basis.follows(i)).collect(),
        }
    }

    /// Solves the normal equations for the coefficient `rho`, between -1 and 1.
    ///
    /// `None` where they cannot be solved, which only numbers that are not finite bring about.
    pub(super) fn factor(&self, rho: f64) -> Option<Factor> {
        let count = self.basis.len();
        let gaps: Vec<Gap> = self
            .gaps
            .iter()
            .map(|&row| {
                let carry = power(rho, self.basis.steps[row]);
                let scale = (1.0 - rho * rho) / (1.0 - carry * carry);
                Gap {
                    row,
                    own: scale - 1.0,
                    across: -scale * carry,
                    before: scale * carry * carry,
                }
            })
            .collect();
        let mut normal = DMatrix::from_fn(count, count, |a, b| {
            let same = if a == b { 1.0 + rho * rho } else { 0.0 };
            let mut sum = same - rho * self.lagged[[a, b]];
            for &end in &self.ends {
                sum -= rho * rho * self.rows[end][a] * self.rows[end][b];
            }
            for gap in &gaps {
                let (here, before) = (&self.rows[gap.row], &self.rows[gap.row - 1]);
                sum += gap.own * here[a] * here[b];
                sum += gap.across * (here[a] * before[b] + before[a] * here[b]);
                sum += gap.before * before[a] * before[b];
            }
            sum
        });
        // Rounding leaves the two halves a hair apart.
        normal.fill_lower_triangle_with_upper_triangle();
        let lower = normal.cholesky()?.unpack();
        let inverse = lower.solve_lower_triangular(&DMatrix::identity(count, count))?;
        let inverse = (0..count)
            .map(|column| {
                inverse
                    .column(column)
                    .iter()
                    .skip(column)
                    .copied()
                    .collect()
            })
            .collect();
        Some(Factor { rho, gaps, inverse })
    }

    /// Fits one voxel.
    ///
    /// - `value`: the voxel's value in a row of the design.
    /// - `scratch`: any values, replaced.
    pub(super) fn solve(
        &self,
        factor: &Factor,
        sums: &VoxelSums<'_>,
        value: impl Fn(usize) -> f64,
        scratch: &mut Scratch,
    ) -> Whitened {
        let rho = factor.rho;
        let (same, squared) = (1.0 + rho * rho, rho * rho);
        let Scratch { right, solution } = scratch;
        right.clear();
        right.extend(
            sums.fitted
                .iter()
                .zip(sums.crossed)
                .map(|(fitted, crossed)| same * fitted - rho * crossed),
        );
        let mut total = same * sums.squares - 2.0 * rho * sums.products;
        for &end in &self.ends {
            let y = value(end);
            add_scaled(right, -squared * y, &self.rows[end]);
            total -= squared * y * y;
        }
        for gap in &factor.gaps {
            let (here, before) = (value(gap.row), value(gap.row - 1));
            let own = gap.own * here + gap.across * before;
            let other = gap.across * here + gap.before * before;
            add_scaled(right, own, &self.rows[gap.row]);
            add_scaled(right, other, &self.rows[gap.row - 1]);
            total += own * here + other * before;
        }
        solution.clear();
        solution.resize(right.len(), 0.0);
        for (column, (inverse, &weight)) in factor.inverse.iter().zip(right.iter()).enumerate() {
            add_scaled(&mut solution[column..], weight, inverse);
        }
        let explained: f64 = solution.iter().map(|part| part * part).sum();
        let last = factor.inverse.last().and_then(|column| column.first());
        let last = last.copied().unwrap_or(f64::NAN);
        Whitened {
            probe: solution.last().copied().unwrap_or(f64::NAN) * last,
            residual: total - explained,
            variance: last * last,
        }
    }
}

/// Room for [`Whitening::solve`], kept from voxel to voxel.
#[derive(Default)]
pub(super) struct Scratch {
    right: Vec<f64>,
    solution: Vec<f64>,
}

/// Adds `weight * row` to `sums`.
fn add_scaled(sums: &mut [f64], weight: f64, row: &[f64]) {
    for (sum, value) in sums.iter_mut().zip(row) {
        *sum += weight * value;
    }
}

/// `rho` to the power of a number of volumes.
fn power(rho: f64, volumes: usize) -> f64 {
    i32::try_from(volumes).map_or(0.0, |volumes| rho.powi(volumes))
}
