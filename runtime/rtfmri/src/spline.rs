//! Cubic B-splines over a volume: values between voxels.
//!
//! A spline through the voxels needs its coefficients found first (a recursive filter
//! along each axis, mirrored at the ends; Unser, Aldroubi and Eden 1993). A spline whose
//! coefficients are the voxels themselves blurs the volume by the same small kernel
//! everywhere, on a voxel and between; that is what comparing two volumes wants.

use ndarray::{Array3, ArrayView3, Axis};

/// The filter's pole, `sqrt(3) - 2`.
const POLE: f64 = -0.267_949_192_431_122_7;
/// Terms of the mirrored sum that starts the filter; `POLE^28` is below 1e-16.
const START_TERMS: usize = 28;

/// A volume that has a value everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Spline {
    /// `[slice, row, column]`, standard layout.
    coefficients: Array3<f32>,
}

/// Where four neighbouring coefficients stand along one axis, and their weights.
struct Reach {
    places: [usize; 4],
    weights: [f32; 4],
}

impl Spline {
    /// The spline through the voxels.
    ///
    /// - `values`: `[slice, row, column]`, not empty.
    pub(crate) fn through(values: ArrayView3<'_, f32>) -> Self {
        let mut coefficients = values.as_standard_layout().into_owned();
        for axis in 0..3 {
            let mut line = vec![0.0; coefficients.len_of(Axis(axis))];
            for mut lane in coefficients.lanes_mut(Axis(axis)) {
                for (value, voxel) in line.iter_mut().zip(&lane) {
                    *value = f64::from(*voxel);
                }
                filter(&mut line);
                for (voxel, value) in lane.iter_mut().zip(&line) {
                    *voxel = single(*value);
                }
            }
        }
        Self { coefficients }
    }

    /// The spline that blurs the voxels by its own kernel.
    ///
    /// - `values`: `[slice, row, column]`, not empty.
    pub(crate) fn blurring(values: ArrayView3<'_, f32>) -> Self {
        Self {
            coefficients: values.as_standard_layout().into_owned(),
        }
    }

    /// The value at an index; one outside the volume is that of the nearest edge.
    ///
    /// - `at`: `[column, row, slice]`, voxels.
    pub(crate) fn value(&self, at: [f64; 3]) -> f32 {
        let (slices, rows, columns) = self.coefficients.dim();
        let [x, y, z] = [
            reach(at[0], columns),
            reach(at[1], rows),
            reach(at[2], slices),
        ];
        let coefficients = self.coefficients.as_slice().unwrap_or_default();
        let mut sum = 0.0;
        for (slice, slice_weight) in z.places.into_iter().zip(z.weights) {
            let mut in_slice = 0.0;
            for (row, row_weight) in y.places.into_iter().zip(y.weights) {
                let start = (slice * rows + row) * columns;
                let line = &coefficients[start..start + columns];
                let mut in_row = 0.0;
                for (column, weight) in x.places.into_iter().zip(x.weights) {
                    in_row += line[column] * weight;
                }
                in_slice += in_row * row_weight;
            }
            sum += in_slice * slice_weight;
        }
        sum
    }
}

fn reach(at: f64, len: usize) -> Reach {
    let last = len - 1;
    let at = at.clamp(0.0, count(last));
    let first = floor(at).min(last.saturating_sub(1));
    let t = at - count(first);
    let s = 1.0 - t;
    let weights = [
        s * s * s / 6.0,
        2.0 / 3.0 - t * t * (1.0 - t / 2.0),
        2.0 / 3.0 - s * s * (1.0 - s / 2.0),
        t * t * t / 6.0,
    ];
    // The coefficients are mirrored about the first and about the last voxel.
    let before = if first == 0 { last.min(1) } else { first - 1 };
    let next = (first + 1).min(last);
    let after = if next + 1 > last {
        (2 * last).saturating_sub(next + 1)
    } else {
        next + 1
    };
    Reach {
        places: [before, first, next, after],
        weights: weights.map(single),
    }
}

/// Turns the values of one line into coefficients.
fn filter(line: &mut [f64]) {
    let len = line.len();
    if len < 2 {
        return;
    }
    let gain = (1.0 - POLE) * (1.0 - 1.0 / POLE);
    for value in line.iter_mut() {
        *value *= gain;
    }
    let mirrored = |i: usize| {
        let i = i % (2 * len - 2);
        if i < len { i } else { 2 * len - 2 - i }
    };
    let (mut start, mut power) = (0.0, 1.0);
    for i in 0..START_TERMS {
        start += power * line[mirrored(i)];
        power *= POLE;
    }
    line[0] = start;
    for i in 1..len {
        line[i] += POLE * line[i - 1];
    }
    line[len - 1] = POLE / (POLE * POLE - 1.0) * (line[len - 1] + POLE * line[len - 2]);
    for i in (0..len - 1).rev() {
        line[i] = POLE * (line[i + 1] - line[i]);
    }
}

/// Blurs a volume by a Gaussian.
///
/// At an edge the kernel is cut and its rest weighs more.
///
/// - `values`: `[slice, row, column]`, any unit.
/// - `std_dev`: along each of those axes, voxels; 0 leaves the axis as it is.
pub(crate) fn gaussian(values: ArrayView3<'_, f32>, std_dev: [f64; 3]) -> Array3<f32> {
    let mut out = values.as_standard_layout().into_owned();
    for (axis, std_dev) in std_dev.into_iter().enumerate() {
        let len = out.len_of(Axis(axis));
        let radius = floor(3.0 * std_dev).min(len);
        if radius == 0 {
            continue;
        }
        let kernel: Vec<f32> = (0..=radius)
            .map(|i| single((-0.5 * (count(i) / std_dev).powi(2)).exp()))
            .collect();
        let mut line = vec![0.0; len];
        for mut lane in out.lanes_mut(Axis(axis)) {
            for (value, voxel) in line.iter_mut().zip(&lane) {
                *value = *voxel;
            }
            for (i, voxel) in lane.iter_mut().enumerate() {
                let (mut sum, mut total) = (line[i] * kernel[0], kernel[0]);
                for (offset, weight) in kernel.iter().enumerate().skip(1) {
                    if let Some(value) = i.checked_sub(offset).and_then(|j| line.get(j)) {
                        sum += value * weight;
                        total += weight;
                    }
                    if let Some(value) = line.get(i + offset) {
                        sum += value * weight;
                        total += weight;
                    }
                }
                *voxel = sum / total;
            }
        }
    }
    out
}

/// A voxel count or index as a float; those here are far below 2^32.
pub(crate) fn count(value: usize) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rounding down is what it is for; below 0 or no number becomes 0"
)]
fn floor(value: f64) -> usize {
    value as usize
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "volumes are kept in single precision"
)]
fn single(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wave(shape: [usize; 3]) -> Array3<f32> {
        Array3::from_shape_fn(shape, |(k, j, i)| {
            single((count(k) * 0.4).sin() + (count(j) * 0.3).cos() * (count(i) * 0.35).sin())
        })
    }

    #[test]
    fn spline_goes_through_the_voxels_and_keeps_to_a_smooth_wave_between() {
        let values = wave([12, 14, 16]);
        let spline = Spline::through(values.view());
        for ((k, j, i), value) in values.indexed_iter() {
            let found = spline.value([count(i), count(j), count(k)]);
            assert!((found - value).abs() < 1e-5, "{k} {j} {i}");
        }
        let exact = (5.5_f64 * 0.4).sin() + (6.25_f64 * 0.3).cos() * (7.75_f64 * 0.35).sin();
        let found = f64::from(spline.value([7.75, 6.25, 5.5]));
        assert!((found - exact).abs() < 1e-3, "{found} and {exact}");
    }

    #[test]
    fn constant_volume_stays_constant_however_it_is_blurred() {
        let values = Array3::from_elem((3, 1, 2), 7.0);
        let smooth = gaussian(values.view(), [1.5, 2.0, 0.0]);
        let spline = Spline::blurring(smooth.view());
        for at in [[0.3, 0.0, 1.7], [-5.0, 9.0, 2.0], [1.0, 0.0, 0.0]] {
            assert!((spline.value(at) - 7.0).abs() < 1e-5);
        }
    }

    proptest! {
        #[test]
        fn any_place_in_any_shape_has_a_value(
            shape in prop::array::uniform3(1_usize..6),
            at in prop::array::uniform3(prop::num::f64::ANY),
        ) {
            let values = wave(shape);
            let value = Spline::through(values.view()).value(at);
            prop_assert!(value.is_finite() || at.iter().any(|at| at.is_nan()));
        }
    }
}
