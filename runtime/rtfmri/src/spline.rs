//! Cubic B-splines over a volume: values between voxels.
//!
//! A spline through the voxels needs its coefficients found first (a recursive filter
//! along each axis, mirrored at the ends; Unser, Aldroubi and Eden 1993). A spline whose
//! coefficients are the voxels themselves blurs the volume by the same small kernel
//! everywhere, on a voxel and between; that is what comparing two volumes wants.
//!
//! Every pass along an axis works on lines side by side, so that the inner loop runs over
//! neighbours in memory and the compiler makes vector instructions of it; lines along the
//! fastest axis are turned a block at a time.

use std::borrow::Cow;

use ndarray::ArrayView3;

/// The filter's pole, `sqrt(3) - 2`.
const POLE: f32 = -0.267_949_2;
/// The filter's gain along one axis, `(1 - POLE) (1 - 1 / POLE)`.
const GAIN: f32 = 6.0;
/// Terms of the mirrored sum that starts the filter; `POLE^14` is below single precision.
const START_TERMS: usize = 14;
/// Lines along the fastest axis that are worked on side by side.
const SIDE_BY_SIDE: usize = 16;

/// A volume that has a value everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Spline<'v> {
    /// Slices, rows, columns.
    shape: [usize; 3],
    /// `[slice, row, column]`, standard layout.
    coefficients: Cow<'v, [f32]>,
}

/// Where four neighbouring coefficients stand along one axis, and their weights.
struct Reach {
    places: [usize; 4],
    weights: [f32; 4],
}

impl Spline<'static> {
    /// The spline through the voxels.
    ///
    /// - `values`: `[slice, row, column]`, not empty.
    pub(crate) fn through(values: ArrayView3<'_, f32>) -> Self {
        let (slices, rows, columns) = values.dim();
        // An axis of one voxel is left as it is.
        let gain = [slices, rows, columns]
            .into_iter()
            .filter(|side| *side > 1)
            .fold(1.0, |gain, _| gain * GAIN);
        let mut coefficients: Vec<f32> = match values.to_slice() {
            Some(values) => values.iter().map(|value| value * gain).collect(),
            None => values.iter().map(|value| value * gain).collect(),
        };
        filter(&mut coefficients, rows * columns);
        for slice in coefficients.chunks_exact_mut(rows * columns) {
            filter(slice, columns);
        }
        let mut block = vec![0.0; columns * SIDE_BY_SIDE];
        for lines in coefficients.chunks_mut(columns * SIDE_BY_SIDE) {
            turn_into(lines, columns, &mut block);
            filter(&mut block, SIDE_BY_SIDE);
            turn_back(&block, columns, lines);
        }
        Self {
            shape: [slices, rows, columns],
            coefficients: Cow::Owned(coefficients),
        }
    }
}

impl<'v> Spline<'v> {
    /// The spline that blurs the voxels by a Gaussian and by its own kernel.
    ///
    /// At an edge the Gaussian is cut and its rest weighs more. Where there is neither
    /// blur nor thinning the voxels are borrowed and not copied.
    ///
    /// - `values`: `[slice, row, column]`, any unit, not empty.
    /// - `std_dev`: of the Gaussian along each of those axes, voxels; 0 leaves an axis.
    /// - `keep`: of every so many voxels along those axes one is kept, the first always.
    pub(crate) fn blurring(
        values: ArrayView3<'v, f32>,
        std_dev: [f64; 3],
        keep: [usize; 3],
    ) -> Self {
        let (slices, rows, columns) = values.dim();
        let mut shape = [slices, rows, columns];
        let mut coefficients = match values.to_slice() {
            Some(values) => Cow::Borrowed(values),
            None => Cow::Owned(values.iter().copied().collect()),
        };
        for axis in 0..3 {
            let kernel = Kernel::new(std_dev[axis], shape[axis], keep[axis]);
            if kernel.is_none() {
                continue;
            }
            let len = shape[axis];
            shape[axis] = len.div_ceil(kernel.keep);
            let kept = shape[axis];
            let mut out = vec![0.0; shape.iter().product()];
            match axis {
                0 => kernel.blur(&coefficients, rows * columns, &mut out),
                1 => {
                    let slices = coefficients.chunks_exact(len * columns);
                    for (slice, out) in slices.zip(out.chunks_exact_mut(kept * columns)) {
                        kernel.blur(slice, columns, out);
                    }
                }
                _ => {
                    let mut block = vec![0.0; len * SIDE_BY_SIDE];
                    let mut blurred = vec![0.0; kept * SIDE_BY_SIDE];
                    let lines = coefficients.chunks(len * SIDE_BY_SIDE);
                    for (lines, out) in lines.zip(out.chunks_mut(kept * SIDE_BY_SIDE)) {
                        turn_into(lines, len, &mut block);
                        kernel.blur(&block, SIDE_BY_SIDE, &mut blurred);
                        turn_back(&blurred, kept, out);
                    }
                }
            }
            coefficients = Cow::Owned(out);
        }
        Self {
            shape,
            coefficients,
        }
    }

    /// Slices, rows, columns.
    pub(crate) fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// The value at an index; one outside the volume is that of the nearest edge.
    ///
    /// - `at`: `[column, row, slice]`, voxels.
    pub(crate) fn value(&self, at: [f64; 3]) -> f32 {
        let [slices, rows, columns] = self.shape;
        let [x, y, z] = [
            reach(at[0], columns),
            reach(at[1], rows),
            reach(at[2], slices),
        ];
        let mut sum = 0.0;
        for (slice, slice_weight) in z.places.into_iter().zip(z.weights) {
            let mut in_slice = 0.0;
            for (row, row_weight) in y.places.into_iter().zip(y.weights) {
                let start = (slice * rows + row) * columns;
                let line = &self.coefficients[start..start + columns];
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

    /// The value at an index that has two voxels around it on every axis, quicker.
    ///
    /// - `at`: `[column, row, slice]`, each from 1 to the side less 2, voxels.
    ///
    /// # Panics
    /// Further out, where four voxels are not there.
    #[inline]
    pub(crate) fn value_inside(&self, at: [f32; 3]) -> f32 {
        let [slices, rows, columns] = self.shape;
        let (x, x_weights) = reach_inside(at[0], columns);
        let (y, y_weights) = reach_inside(at[1], rows);
        let (z, z_weights) = reach_inside(at[2], slices);
        let mut sums = [0.0_f32; 4];
        for (slice, slice_weight) in z_weights.into_iter().enumerate() {
            let mut in_slice = [0.0_f32; 4];
            for (row, row_weight) in y_weights.into_iter().enumerate() {
                let start = ((z + slice) * rows + y + row) * columns + x;
                let line = &self.coefficients[start..start + 4];
                for lane in 0..4 {
                    in_slice[lane] += line[lane] * row_weight;
                }
            }
            for lane in 0..4 {
                sums[lane] += in_slice[lane] * slice_weight;
            }
        }
        sums[0] * x_weights[0]
            + sums[1] * x_weights[1]
            + sums[2] * x_weights[2]
            + sums[3] * x_weights[3]
    }

    /// Whether an index has two voxels around it on every axis.
    ///
    /// - `at`: `[column, row, slice]`, voxels.
    #[inline]
    pub(crate) fn holds(&self, at: [f32; 3]) -> bool {
        let [slices, rows, columns] = self.shape;
        let within = |at: f32, side: usize| side > 3 && at >= 1.0 && at <= count_single(side) - 2.0;
        within(at[0], columns) & within(at[1], rows) & within(at[2], slices)
    }
}

/// The first of four voxels about a place, and the weights of all four.
#[inline]
fn reach_inside(at: f32, len: usize) -> (usize, [f32; 4]) {
    let first = floor_single(at).min(len - 3);
    let t = at - count_single(first);
    let s = 1.0 - t;
    let weights = [
        s * s * s / 6.0,
        2.0 / 3.0 - t * t * (1.0 - t / 2.0),
        2.0 / 3.0 - s * s * (1.0 - s / 2.0),
        t * t * t / 6.0,
    ];
    (first - 1, weights)
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

/// Turns values, the gain already in them, into coefficients along an axis.
///
/// - `values`: `[along, beside]`.
/// - `width`: of `beside`.
fn filter(values: &mut [f32], width: usize) {
    let len = values.len() / width;
    if len < 2 {
        return;
    }
    let mirrored = |i: usize| {
        let i = i % (2 * len - 2);
        if i < len { i } else { 2 * len - 2 - i }
    };
    let mut start = vec![0.0; width];
    let mut power = 1.0;
    for i in 0..START_TERMS {
        let line = &values[mirrored(i) * width..][..width];
        for (start, value) in start.iter_mut().zip(line) {
            *start += power * value;
        }
        power *= POLE;
    }
    values[..width].copy_from_slice(&start);
    for i in 1..len {
        let (before, here) = values.split_at_mut(i * width);
        let before = &before[(i - 1) * width..];
        for (value, before) in here[..width].iter_mut().zip(before) {
            *value += POLE * before;
        }
    }
    let (before, last) = values.split_at_mut((len - 1) * width);
    let before = &before[(len - 2) * width..];
    for (value, before) in last.iter_mut().zip(before) {
        *value = POLE / (POLE * POLE - 1.0) * (*value + POLE * before);
    }
    for i in (0..len - 1).rev() {
        let (here, after) = values.split_at_mut((i + 1) * width);
        let here = &mut here[i * width..];
        for (value, after) in here.iter_mut().zip(&after[..width]) {
            *value = POLE * (after - *value);
        }
    }
}

/// Lays lines side by side: `[line, along]` to `[along, SIDE_BY_SIDE]`.
fn turn_into(lines: &[f32], len: usize, block: &mut [f32]) {
    for (at, line) in lines.chunks_exact(len).enumerate() {
        for (value, beside) in line.iter().zip(block.chunks_exact_mut(SIDE_BY_SIDE)) {
            beside[at] = *value;
        }
    }
}

/// The way back of [`turn_into`].
fn turn_back(block: &[f32], len: usize, lines: &mut [f32]) {
    for (at, line) in lines.chunks_exact_mut(len).enumerate() {
        for (value, beside) in line.iter_mut().zip(block.chunks_exact(SIDE_BY_SIDE)) {
            *value = beside[at];
        }
    }
}

/// One half of a Gaussian, from its middle, and how many voxels are kept of its result.
struct Kernel {
    weights: Vec<f32>,
    keep: usize,
}

impl Kernel {
    fn new(std_dev: f64, len: usize, keep: usize) -> Self {
        let radius = floor(3.0 * std_dev).min(len);
        let weight = |i: usize| {
            if i == 0 {
                1.0
            } else {
                single((-0.5 * (count(i) / std_dev).powi(2)).exp())
            }
        };
        Self {
            weights: (0..=radius).map(weight).collect(),
            keep: keep.max(1),
        }
    }

    /// Whether it changes nothing.
    fn is_none(&self) -> bool {
        self.weights.len() == 1 && self.keep == 1
    }

    /// Blurs along an axis.
    ///
    /// - `values`: `[along, beside]`; `out`: the same of those kept.
    /// - `width`: of `beside`.
    fn blur(&self, values: &[f32], width: usize, out: &mut [f32]) {
        let len = values.len() / width;
        let radius = self.weights.len() - 1;
        for (kept, out) in out.chunks_exact_mut(width).enumerate() {
            let middle = kept * self.keep;
            let (first, last) = (
                middle.saturating_sub(radius),
                (middle + radius).min(len - 1),
            );
            let weight = |at: usize| self.weights[at.abs_diff(middle)];
            let total: f32 = (first..=last).map(weight).sum();
            out.fill(0.0);
            for at in first..=last {
                let share = weight(at) / total;
                for (out, value) in out.iter_mut().zip(&values[at * width..][..width]) {
                    *out += share * value;
                }
            }
        }
    }
}

/// A voxel count or index as a float; those here are far below 2^32.
pub(crate) fn count(value: usize) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

/// The same in single precision; those here are below 2^16.
#[inline]
fn count_single(value: usize) -> f32 {
    f32::from(u16::try_from(value).unwrap_or(u16::MAX))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rounding down is what it is for; below 0 or no number becomes 0"
)]
pub(crate) fn floor(value: f64) -> usize {
    value as usize
}

#[inline]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rounding down is what it is for; below 0 or no number becomes 0"
)]
fn floor_single(value: f32) -> usize {
    usize::from(value as u16)
}

#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "volumes are kept in single precision"
)]
pub(crate) fn single(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, Axis};
    use proptest::prelude::*;

    use super::*;

    fn wave(shape: [usize; 3]) -> Array3<f32> {
        Array3::from_shape_fn(shape, |(k, j, i)| {
            single((count(k) * 0.4).sin() + (count(j) * 0.3).cos() * (count(i) * 0.35).sin())
        })
    }

    /// The same blur, a voxel at a time and in double precision.
    fn blurred_slowly(values: &Array3<f32>, std_dev: [f64; 3], keep: [usize; 3]) -> Array3<f64> {
        let mut out = values.mapv(f64::from);
        for axis in 0..3 {
            let len = out.len_of(Axis(axis));
            let radius = if std_dev[axis] > 0.0 {
                floor(3.0 * std_dev[axis])
            } else {
                0
            };
            let mut shape = out.raw_dim();
            shape[axis] = len.div_ceil(keep[axis]);
            out = Array3::from_shape_fn(shape, |(k, j, i)| {
                let mut at = [k, j, i];
                let middle = at[axis] * keep[axis];
                let (mut sum, mut total) = (0.0, 0.0);
                for from in 0..len {
                    if from.abs_diff(middle) <= radius {
                        at[axis] = from;
                        let far = count(from.abs_diff(middle)) / std_dev[axis].max(1e-9);
                        let weight = (-0.5 * far * far).exp();
                        sum += weight * out[at];
                        total += weight;
                    }
                }
                sum / total
            });
        }
        out
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
        let spline = Spline::blurring(values.view(), [1.5, 2.0, 0.0], [1, 1, 1]);
        for at in [[0.3, 0.0, 1.7], [-5.0, 9.0, 2.0], [1.0, 0.0, 0.0]] {
            assert!((spline.value(at) - 7.0).abs() < 1e-5);
        }
    }

    #[test]
    fn voxels_in_another_order_in_memory_give_the_same_spline() {
        let values = wave([7, 6, 5]);
        let turned = values.t().as_standard_layout().into_owned();
        for at in [[1.5, 2.5, 3.5], [0.0, 5.0, 6.0]] {
            let (plain, other) = (Spline::through(values.view()), Spline::through(turned.t()));
            assert!((plain.value(at) - other.value(at)).abs() < 1e-6);
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

        #[test]
        fn quick_value_is_the_careful_one(
            shape in prop::array::uniform3(4_usize..9),
            share in prop::array::uniform3(0.0_f32..=1.0),
        ) {
            let values = wave(shape);
            let spline = Spline::through(values.view());
            let sides = [shape[2], shape[1], shape[0]];
            let at: [f32; 3] = std::array::from_fn(|axis| {
                1.0 + share[axis] * (count_single(sides[axis]) - 3.0)
            });
            prop_assert!(spline.holds(at));
            let careful = spline.value(at.map(f64::from));
            prop_assert!((spline.value_inside(at) - careful).abs() < 1e-5);
        }

        #[test]
        fn blur_is_that_of_one_voxel_at_a_time(
            shape in prop::array::uniform3(1_usize..20),
            std_dev in prop::array::uniform3(0.0_f64..2.0),
            keep in prop::array::uniform3(1_usize..4),
        ) {
            let values = wave(shape);
            let found = Spline::blurring(values.view(), std_dev, keep);
            let slowly = blurred_slowly(&values, std_dev, keep);
            prop_assert_eq!(&found.shape()[..], slowly.shape());
            for (found, slowly) in found.coefficients.iter().zip(&slowly) {
                prop_assert!((f64::from(*found) - slowly).abs() < 1e-5);
            }
        }
    }
}
