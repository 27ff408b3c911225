//! One blur of the reference, and the descent on it.
//!
//! Everything here runs for every volume of a run, on one core, between two volumes:
//! numbers lie one kind after the other, eight at a time go through a step together, in
//! single precision with sums of a few hundred points kept in double, and nothing is
//! allocated within an iteration.

use nalgebra::{Matrix3, Matrix4, SMatrix, SVector, Vector3};

use super::{MotionError, Rigid};
use crate::interpolation;
use crate::spline::{Spline, count, single};
use crate::volume::Volume;

/// A stage's steps; a smooth volume needs five.
const MAX_STEPS: usize = 20;
/// What a rotation moves is judged at this distance from the centre.
const HEAD_RADIUS_MM: f64 = 80.0;
/// Turns are counted in units that move this far from the centre one mm, so that the
/// seven unknowns are of one size.
const ARM_MM: f64 = 50.0;
/// Fewer points than this determine nothing.
const MIN_POINTS: usize = 200;
/// A voxel brighter than this share of the head's mean belongs to the head.
pub(super) const HEAD_SHARE: f64 = 0.3;
/// A head whose values spread less than this share of their mean is no head.
const MIN_SPREAD: f64 = 1e-3;
/// A volume that resembles the realigned reference less than this is not of its run.
const MIN_CORRELATION: f64 = 0.5;
/// Tukey's constant, in robust standard deviations.
const TUKEY: f64 = 4.685;
/// Residuals whose median is taken; more make it no better.
const MEDIAN_OF: usize = 2048;
/// Points whose sums are kept in single precision.
const BLOCK: usize = 256;
/// Numbers that go through a step together.
const LANES: usize = 8;
/// Unknowns: three shifts, three turns, the gain.
const UNKNOWNS: usize = 7;
/// Entries of a symmetric matrix of the unknowns.
const PAIRS: usize = UNKNOWNS * (UNKNOWNS + 1) / 2;

/// What a level is made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    /// Blur, full width at half maximum, beside the spline's own.
    pub(super) fwhm_mm: f64,
    /// Voxels kept of the blurred volume are at most this far apart.
    pub(super) spacing_mm: f64,
    /// Points compared.
    pub(super) points: usize,
    /// Of these, points enough to come near.
    pub(super) scouts: usize,
}

/// How far a descent goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Until {
    /// A step that moves no point of the head further than this is the last.
    pub(super) still_mm: f64,
}

/// The points of the reference as one blur shows them.
pub(super) struct Level {
    look: Look,
    /// Voxels of the volume per voxel kept: slices, rows, columns.
    keep: [usize; 3],
    /// `[x, y, z][point]`, from the centre, LPS, millimetres.
    places: [Vec<f32>; 3],
    /// `[unknown][point]`: what a value gains per mm of shift, per mm that a turn moves at
    /// the arm's length, and the value itself.
    slopes: [Vec<f32>; UNKNOWNS],
    scouts: usize,
}

/// What a descent needs beside the volume, so that its steps allocate nothing.
pub(super) struct Room {
    /// `[point]`, not a number where a point is out of view.
    values: Vec<f32>,
    residuals: Vec<f32>,
}

impl Room {
    pub(super) fn new() -> Self {
        Self {
            values: Vec::new(),
            residuals: Vec::with_capacity(MEDIAN_OF),
        }
    }
}

/// Weighted sums of products over points.
struct Sums {
    square: [f64; PAIRS],
    right: [f64; UNKNOWNS],
    found: usize,
}

impl Level {
    pub(super) fn new(
        reference: &Volume,
        centre: Vector3<f64>,
        look: Look,
    ) -> Result<Self, MotionError> {
        let keep = keep(reference, look.spacing_mm);
        let spline = blurred(reference, look, keep)?;
        let to_index = interpolation::inverse(&reference.affine_lps);
        let to_index = to_index.ok_or(MotionError::Singular)?;
        // A gradient along the axes of the grid, to one along the patient's.
        let turn: Matrix3<f64> = to_index.fixed_view::<3, 3>(0, 0).transpose();
        let stride = [keep[2], keep[1], keep[0]].map(count);
        let [slices, rows, columns] = spline.shape();
        let inner = |side: usize| 1..side.saturating_sub(1);
        let places = inner(slices).flat_map(|slice| {
            inner(rows).flat_map(move |row| inner(columns).map(move |column| [column, row, slice]))
        });
        let places: Vec<([f64; 3], f64)> = places
            .map(|place| {
                let place = place.map(count);
                (place, f64::from(spline.value(place)))
            })
            .collect();
        let limit = head_limit(places.iter().map(|(_, value)| *value)) * HEAD_SHARE;
        let head: Vec<_> = places.iter().filter(|(_, value)| *value > limit).collect();
        if head.len() < MIN_POINTS {
            return Err(MotionError::TooFewPoints {
                expected: MIN_POINTS,
                found: head.len(),
            });
        }
        let (mean, spread) = moments(head.iter().map(|(_, value)| *value));
        if spread.is_nan() || spread < MIN_SPREAD * mean {
            return Err(MotionError::Undetermined);
        }
        // Every so many in the grid's order would leave out whole columns.
        let mut head = shuffled(head);
        head.truncate(look.points);
        // Scouts first; each part in the grid's order, which is the memory's.
        let scouts = look.scouts.min(head.len());
        let order = |a: &&([f64; 3], f64), b: &&([f64; 3], f64)| {
            let (a, b) = (a.0, b.0);
            a[2].total_cmp(&b[2])
                .then(a[1].total_cmp(&b[1]))
                .then(a[0].total_cmp(&b[0]))
        };
        head[..scouts].sort_by(order);
        head[scouts..].sort_by(order);
        let mut level = Self {
            look,
            keep,
            places: std::array::from_fn(|_| Vec::with_capacity(head.len())),
            slopes: std::array::from_fn(|_| Vec::with_capacity(head.len())),
            scouts,
        };
        for &(at, value) in head {
            let slope = |axis: usize| {
                let shifted = |by: f64| {
                    let mut at = at;
                    at[axis] += by;
                    f64::from(spline.value(at))
                };
                (shifted(0.5) - shifted(-0.5)) / stride[axis]
            };
            let gradient = turn * Vector3::new(slope(0), slope(1), slope(2));
            let at = std::array::from_fn(|axis| at[axis] * stride[axis]);
            let place = Vector3::from(reference.position_lps(at)) - centre;
            let turned = place.cross(&gradient) / ARM_MM;
            for (places, place) in level.places.iter_mut().zip(place.iter()) {
                places.push(single(*place));
            }
            let slopes = gradient.iter().chain(turned.iter()).chain([&value]);
            for (all, slope) in level.slopes.iter_mut().zip(slopes) {
                all.push(single(*slope));
            }
        }
        Ok(level)
    }

    /// The volume as this level sees it.
    pub(super) fn see<'v>(&self, volume: &'v Volume) -> Result<Spline<'v>, MotionError> {
        blurred(volume, self.look, self.keep)
    }

    /// Points enough to come near, and all.
    pub(super) fn scouts(&self) -> usize {
        self.scouts
    }

    pub(super) fn points(&self) -> usize {
        self.places[0].len()
    }

    /// Steps until the head stands still.
    ///
    /// - `spline`: the volume as this level sees it.
    /// - `to_index`: LPS, millimetres, to the volume's indices.
    /// - `points`: how many, from the first.
    pub(super) fn descend(
        &self,
        spline: &Spline<'_>,
        to_index: &Matrix4<f64>,
        points: usize,
        until: Until,
        mut motion: Rigid,
        room: &mut Room,
    ) -> Result<Rigid, MotionError> {
        let [slices, rows, columns] = self.keep.map(|keep| 1.0 / count(keep));
        let thin = Matrix4::from_diagonal(&nalgebra::Vector4::new(columns, rows, slices, 1.0));
        let to_index = thin * to_index;
        let points = points.min(self.points());
        room.values.clear();
        room.values.resize(points, 0.0);
        let (mut gain, mut limit) = (0.0, f32::INFINITY);
        for _ in 0..MAX_STEPS {
            let sums = self.look_at(spline, &to_index, &motion, &mut room.values, gain, limit);
            if sums.found < MIN_POINTS {
                return Err(MotionError::TooFewPoints {
                    expected: MIN_POINTS,
                    found: sums.found,
                });
            }
            let solved = sums.solve().ok_or(MotionError::Undetermined)?;
            gain += solved[6];
            if !(gain.is_finite() && gain > 0.0) {
                return Err(MotionError::Undetermined);
            }
            let shift = Vector3::new(solved[0], solved[1], solved[2]) / gain;
            let turn = Vector3::new(solved[3], solved[4], solved[5]) / (gain * ARM_MM);
            motion = motion.after_inverse_of(shift, turn);
            motion.check()?;
            if shift.norm() + turn.norm() * HEAD_RADIUS_MM < until.still_mm {
                break;
            }
            limit = self.limit(&solved, gain, room);
        }
        let correlation = self.correlation(&room.values);
        if correlation >= MIN_CORRELATION {
            return Ok(motion);
        }
        Err(MotionError::Unlike {
            least: MIN_CORRELATION,
            correlation,
        })
    }

    /// Compares the points with the volume at their moved places.
    ///
    /// A residual weighs by Tukey's biweight; one beyond `limit` weighs nothing.
    fn look_at(
        &self,
        spline: &Spline<'_>,
        to_index: &Matrix4<f64>,
        motion: &Rigid,
        values: &mut [f32],
        gain: f64,
        limit: f32,
    ) -> Sums {
        let map = to_index * motion.homogeneous();
        let turn = map.fixed_view::<3, 3>(0, 0).map(single);
        let origin = map
            .transform_point(&motion.centre().into())
            .coords
            .map(single);
        let gain = single(gain);
        let mut sums = Sums {
            square: [0.0; PAIRS],
            right: [0.0; UNKNOWNS],
            found: 0,
        };
        for (block, values) in values.chunks_mut(BLOCK).enumerate() {
            let part = block * BLOCK..block * BLOCK + values.len();
            let [x, y, z] = std::array::from_fn(|axis| &self.places[axis][part.clone()]);
            for (i, value) in values.iter_mut().enumerate() {
                let at = std::array::from_fn(|axis| {
                    turn[(axis, 0)] * x[i]
                        + turn[(axis, 1)] * y[i]
                        + turn[(axis, 2)] * z[i]
                        + origin[axis]
                });
                // Closer to an edge the blur would see what is beyond it.
                let inside = spline.holds(at);
                *value = if inside {
                    spline.value_inside(at)
                } else {
                    f32::NAN
                };
                sums.found += usize::from(inside);
            }
            let slopes = std::array::from_fn(|unknown| &self.slopes[unknown][part.clone()]);
            sums.add(slopes, values, gain, limit);
        }
        sums
    }

    /// Where Tukey's biweight ends, from the median residual after a step.
    fn limit(&self, solved: &SVector<f64, UNKNOWNS>, gain: f64, room: &mut Room) -> f32 {
        let every = room.values.len().div_ceil(MEDIAN_OF).max(1);
        let mut step: [f32; UNKNOWNS] = (*solved).map(single).into();
        step[6] = single(gain);
        let residual = |(i, value): (usize, &f32)| {
            let seen = (0..UNKNOWNS).map(|unknown| step[unknown] * self.slopes[unknown][i]);
            (value - seen.sum::<f32>()).abs()
        };
        let values = room.values.iter().enumerate().step_by(every);
        room.residuals.clear();
        let seen = values.map(residual).filter(|residual| !residual.is_nan());
        room.residuals.extend(seen);
        if room.residuals.is_empty() {
            return f32::INFINITY;
        }
        let middle = room.residuals.len() / 2;
        let (_, median, _) = room
            .residuals
            .select_nth_unstable_by(middle, f32::total_cmp);
        let limit = single(TUKEY / 0.6745) * *median;
        if limit > 0.0 { limit } else { f32::INFINITY }
    }

    /// How much the volume's values go with the reference's, 0 where either is flat.
    fn correlation(&self, values: &[f32]) -> f64 {
        let pairs = self.slopes[6].iter().zip(values);
        let pairs = pairs
            .filter(|(_, value)| !value.is_nan())
            .map(|(reference, value)| (f64::from(*reference), f64::from(*value)));
        let (mean_a, spread_a) = moments(pairs.clone().map(|(a, _)| a));
        let (mean_b, spread_b) = moments(pairs.clone().map(|(_, b)| b));
        let (product, _) = moments(pairs.map(|(a, b)| (a - mean_a) * (b - mean_b)));
        if spread_b < MIN_SPREAD * mean_b.abs() {
            return 0.0;
        }
        let correlation = product / (spread_a * spread_b);
        if correlation.is_nan() {
            0.0
        } else {
            correlation
        }
    }
}

impl Sums {
    /// Adds a block of points; those out of view count nothing.
    fn add(&mut self, slopes: [&[f32]; UNKNOWNS], values: &[f32], gain: f32, limit: f32) {
        let mut square = [[0.0_f32; LANES]; PAIRS];
        let mut right = [[0.0_f32; LANES]; UNKNOWNS];
        let scale = 1.0 / limit;
        for start in (0..values.len()).step_by(LANES) {
            let len = LANES.min(values.len() - start);
            let lanes = |from: &[f32]| {
                let mut lanes = [0.0; LANES];
                if let Some(whole) = from.get(start..start + LANES) {
                    lanes.copy_from_slice(whole);
                } else {
                    lanes[..len].copy_from_slice(&from[start..]);
                }
                lanes
            };
            let columns = slopes.map(lanes);
            let value = lanes(values);
            let (mut residual, mut weight) = ([0.0_f32; LANES], [0.0_f32; LANES]);
            for lane in 0..LANES {
                let far = value[lane] - gain * columns[6][lane];
                let share = far * scale;
                let near = 1.0 - share * share;
                // False also where the value is no number.
                let counts = near > 0.0;
                weight[lane] = if counts { near * near } else { 0.0 };
                residual[lane] = if counts { far } else { 0.0 };
            }
            let mut pair = 0;
            for a in 0..UNKNOWNS {
                let mut weighted = [0.0_f32; LANES];
                for lane in 0..LANES {
                    weighted[lane] = weight[lane] * columns[a][lane];
                    right[a][lane] += weighted[lane] * residual[lane];
                }
                for column in &columns[a..] {
                    for lane in 0..LANES {
                        square[pair][lane] += weighted[lane] * column[lane];
                    }
                    pair += 1;
                }
            }
        }
        let whole = |lanes: &[f32; LANES]| f64::from(lanes.iter().sum::<f32>());
        for (sum, lanes) in self.square.iter_mut().zip(&square) {
            *sum += whole(lanes);
        }
        for (sum, lanes) in self.right.iter_mut().zip(&right) {
            *sum += whole(lanes);
        }
    }

    /// The step, and what the gain gains; `None` where the points determine none.
    fn solve(&self) -> Option<SVector<f64, UNKNOWNS>> {
        let mut square = SMatrix::<f64, UNKNOWNS, UNKNOWNS>::zeros();
        let mut pairs = self.square.iter();
        for a in 0..UNKNOWNS {
            for b in a..UNKNOWNS {
                let sum = pairs.next()?;
                square[(a, b)] = *sum;
                square[(b, a)] = *sum;
            }
        }
        let solved = square.cholesky()?.solve(&SVector::from(self.right));
        solved
            .iter()
            .all(|value| value.is_finite())
            .then_some(solved)
    }
}

/// Of how many voxels along each axis one is kept: slices, rows, columns.
///
/// An axis is not thinned below eight voxels, so that thick slabs keep their slices.
fn keep(volume: &Volume, spacing_mm: f64) -> [usize; 3] {
    let (slices, rows, columns) = volume.voxels.dim();
    let sides = [slices, rows, columns];
    let spacing = spacing(volume);
    std::array::from_fn(|axis| {
        let wanted = crate::spline::floor(spacing_mm / spacing[axis]);
        wanted.min(sides[axis] / 8).max(1)
    })
}

/// Distance between neighbours along slices, rows, columns, millimetres.
fn spacing(volume: &Volume) -> [f64; 3] {
    [2, 1, 0].map(|axis| {
        let rows = &volume.affine_lps[..3];
        let squares: f64 = rows.iter().map(|row| row[axis].powi(2)).sum();
        squares.sqrt()
    })
}

fn blurred(volume: &Volume, look: Look, keep: [usize; 3]) -> Result<Spline<'_>, MotionError> {
    // The largest magnitude's bits tell whether any is infinite or no number.
    let sign = 0x7fff_ffff;
    let largest = volume.voxels.iter().fold(0, |most, value| {
        let bits = value.to_bits() & sign;
        if bits > most { bits } else { most }
    });
    if largest >= f32::INFINITY.to_bits() {
        return Err(MotionError::Undetermined);
    }
    let std_dev_mm = look.fwhm_mm / (8.0 * std::f64::consts::LN_2).sqrt();
    let std_dev = spacing(volume).map(|spacing| std_dev_mm / spacing);
    Ok(Spline::blurring(volume.voxels.view(), std_dev, keep))
}

/// The mean of what is brighter than the mean.
pub(crate) fn head_limit(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let (all, _) = moments(values.clone());
    let (bright, _) = moments(values.filter(|value| *value > all));
    bright
}

/// Mean and population standard deviation; NaN of nothing.
pub(crate) fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let (sum, len) = values
        .clone()
        .fold((0.0, 0.0), |(sum, len), value| (sum + value, len + 1.0));
    let mean = sum / len;
    let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / len).sqrt())
}

/// The same items in an order that follows no grid, the same every time.
pub(crate) fn shuffled<T>(items: Vec<T>) -> Vec<T> {
    let mut keyed: Vec<(u32, T)> = (0_u32..)
        .map(|i| {
            i.wrapping_mul(0x9e37_79b1)
                .swap_bytes()
                .wrapping_mul(0x85eb_ca6b)
        })
        .zip(items)
        .collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, item)| item).collect()
}
