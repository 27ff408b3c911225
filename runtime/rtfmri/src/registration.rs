//! Where the trained space lies in this session: once per session, from its reference volume.
//!
//! Steps: both volumes are blurred alike, in millimetres, whatever their grids; points of the
//! trained volume are looked up in the session's; what the session shows there is fitted by a
//! function of what the trained volume shows (piecewise linear, any shape, so that other
//! contrast and brightness do not matter) times a gain that may tilt across the head. A
//! Gauss-Newton step on what is left moves the points (inverse compositional, as in
//! [`crate::motion`]), with residuals far beyond the others' counting less. The wide blur
//! starts from the two headers and from the centres of mass, each also turned to six sides;
//! those that fit best go on to the narrower ones. How well a place fits is its correlation
//! ratio (Roche et al. 1998): the share of the session's variance that the function explains.
//!
//! A registration takes a place of the trained space to where it is in the session's
//! reference volume; followed by the head's motion it is one affine, and a mask's voxels are
//! interpolated once ([`Mask::sample_through`](crate::Mask::sample_through)).

use nalgebra::{DMatrix, DVector, Matrix3, Matrix4, Rotation3, Vector3, Vector4};

use crate::interpolation::{self, transformed};
use crate::motion::{Rigid, head_limit, shuffled};
use crate::spline::{Spline, count, single};
use crate::volume::{Affine, Volume};

/// Blur of each level in all, standard deviation, millimetres; and points compared.
const LEVELS: [(f64, usize); 3] = [(5.0, 3_000), (2.5, 8_000), (1.3, 16_000)];
/// A spline's own blur, voxels.
const SPLINE_STD_DEV: f64 = 0.577;
/// How far the starts are turned, radians.
const START_TURN_RAD: f64 = 0.22;
/// Starts that go on from the widest blur.
const GO_ON: usize = 3;
const MAX_STEPS: usize = 30;
/// A step that moves no point of the head further than this ends a level.
const STILL_MM: f64 = 1e-3;
/// No step moves further, turned or stretched parts taken at the arm's length.
const MAX_STEP_MM: f64 = 8.0;
/// Turns and stretches are counted in units that move this far from the centre one mm.
const ARM_MM: f64 = 50.0;
/// Brighter than this share of the head's mean is the head or its rim.
const RIM_SHARE: f64 = 0.12;
/// Fewer points determine nothing.
const MIN_POINTS: usize = 400;
/// Less of the trained head in the session's view is no match.
const MIN_OVERLAP: f64 = 0.4;
/// A session that the trained volume explains less of is another head, or none.
const MIN_CORRELATION_RATIO: f64 = 0.4;
/// Knots of the function from trained to session values.
const KNOTS: usize = 8;
/// Columns of the gain's tilt.
const TILTS: usize = 3;
/// Fits of the function, each with weights and shape from the one before.
const FIT_ROUNDS: usize = 3;
/// Tukey's constant, in robust standard deviations.
const TUKEY: f64 = 4.685;
/// Between two visits a head neither shrinks nor grows beyond this.
const MAX_STRETCH: f64 = 1.25;

/// Why a session cannot be registered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RegistrationError {
    /// An affine has no inverse or holds what is no number.
    #[error("affine of the {which} volume is singular or not finite")]
    Singular {
        /// Trained or session's.
        which: &'static str,
    },
    /// A volume shows too little, or holds what is no number.
    #[error("{which} volume shows no head: {found} points of one, {expected} are needed")]
    NoHead {
        /// Trained or session's.
        which: &'static str,
        /// Points needed.
        expected: usize,
        /// Points found.
        found: usize,
    },
    /// From no start did the two heads come to lie on each other.
    #[error("trained head is found nowhere in the session's volume")]
    NotFound,
    /// Registered as well as can be, the two do not look alike.
    #[error(
        "trained volume explains {found:.2} of the session's variance, at least {least:.2} is expected"
    )]
    Unlike {
        /// Least correlation ratio expected.
        least: f64,
        /// Correlation ratio found.
        found: f64,
    },
    /// The heads fit only stretched beyond what heads do.
    #[error("head would be stretched by {found:.2}, at most {most:.2} is believed")]
    Stretched {
        /// Most that is believed.
        most: f64,
        /// Stretch along the axis that is stretched or shrunk most.
        found: f64,
    },
}

/// What may differ between two visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freedom {
    /// Shift and turn: 6 degrees of freedom.
    Rigid,
    /// Stretch and shear too, for a scanner with other gradients: 12 degrees of freedom.
    Affine,
}

impl Freedom {
    fn unknowns(self) -> usize {
        match self {
            Self::Rigid => 6,
            Self::Affine => 12,
        }
    }
}

/// Where the trained space lies in a session.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Registration {
    map: Matrix4<f64>,
    correlation_ratio: f64,
    overlap: f64,
}

impl Registration {
    /// A session in the trained space itself.
    #[must_use]
    pub fn identity() -> Self {
        Self {
            map: Matrix4::identity(),
            correlation_ratio: 1.0,
            overlap: 1.0,
        }
    }

    /// From a place of the trained space to that of the session's reference volume, LPS to
    /// LPS, millimetres.
    #[must_use]
    pub fn matrix_lps(&self) -> Affine {
        interpolation::affine(&self.map)
    }

    /// Share of the session's variance over the head that the trained volume explains, 0 to 1.
    #[must_use]
    pub fn correlation_ratio(&self) -> f64 {
        self.correlation_ratio
    }

    /// Share of the trained head that the session's volume shows, 0 to 1.
    #[must_use]
    pub fn overlap(&self) -> f64 {
        self.overlap
    }

    /// From a place of the trained space to that of a volume in which the head has moved,
    /// LPS to LPS, millimetres.
    ///
    /// - `motion`: from the session's reference volume to that volume.
    #[must_use]
    pub fn then(&self, motion: &Rigid) -> Affine {
        interpolation::affine(&(motion.homogeneous() * self.map))
    }
}

/// Finds the trained space in a session.
///
/// - `trained`: the reference volume of the trained model's subject.
/// - `session`: the session's reference volume; its grid, field of view, brightness and
///   contrast may be others.
///
/// # Errors
/// [`RegistrationError`]; the session then has no way to the trained space.
pub fn register(
    trained: &Volume,
    session: &Volume,
    freedom: Freedom,
) -> Result<Registration, RegistrationError> {
    let centre = centre_of_mass(trained, "trained")?;
    let there = centre_of_mass(session, "session's")?;
    let coarsest = [trained, session].map(|volume| largest(spacing(volume)));
    let levels = LEVELS.map(|(std_dev_mm, points)| {
        // Neither may be sharper than the other's grid lets it be.
        let least = SPLINE_STD_DEV * largest(coarsest);
        Level::new(trained, session, centre, std_dev_mm.max(least), points)
    });
    let [wide, middle, narrow] = levels;
    let (wide, middle, narrow) = (wide?, middle?, narrow?);

    let mut places: Vec<Placed> = starts(centre, there)
        .filter_map(|start| wide.descend(start, Freedom::Rigid))
        .collect();
    places.sort_by(|a, b| b.ratio.total_cmp(&a.ratio));
    places.truncate(GO_ON);
    let placed = places.into_iter();
    let placed = placed.filter_map(|placed| middle.descend(placed.map, Freedom::Rigid));
    let placed = placed.max_by(|a, b| a.ratio.total_cmp(&b.ratio));
    let mut placed = placed.ok_or(RegistrationError::NotFound)?;
    if freedom == Freedom::Affine {
        let stretched = middle.descend(placed.map, freedom);
        placed = stretched.ok_or(RegistrationError::NotFound)?;
    }
    let placed = narrow.descend(placed.map, freedom);
    let placed = placed.ok_or(RegistrationError::NotFound)?;
    if placed.ratio.is_nan() || placed.ratio < MIN_CORRELATION_RATIO {
        return Err(RegistrationError::Unlike {
            least: MIN_CORRELATION_RATIO,
            found: placed.ratio,
        });
    }
    let linear: Matrix3<f64> = placed.map.fixed_view::<3, 3>(0, 0).into();
    for stretch in linear.singular_values().iter() {
        let found = stretch.max(1.0 / stretch);
        if found.is_nan() || found > MAX_STRETCH {
            return Err(RegistrationError::Stretched {
                most: MAX_STRETCH,
                found,
            });
        }
    }
    // Places were counted from the trained head's centre.
    Ok(Registration {
        map: placed.map * Matrix4::new_translation(&-centre),
        correlation_ratio: placed.ratio,
        overlap: placed.overlap,
    })
}

/// Where a descent came to rest.
struct Placed {
    /// From a place counted from the trained head's centre to the session, LPS, mm.
    map: Matrix4<f64>,
    ratio: f64,
    overlap: f64,
}

/// The headers' word and the centres of mass, each as it is and turned to six sides.
fn starts(centre: Vector3<f64>, there: Vector3<f64>) -> impl Iterator<Item = Matrix4<f64>> {
    [centre, there].into_iter().flat_map(|at| {
        let sides = (0..6).map(|side| {
            let mut axis = Vector3::zeros();
            axis[side / 2] = if side % 2 == 0 {
                START_TURN_RAD
            } else {
                -START_TURN_RAD
            };
            Rotation3::new(axis)
        });
        std::iter::once(Rotation3::identity())
            .chain(sides)
            .map(move |turn| turn.to_homogeneous().append_translation(&at))
    })
}

/// A point of the trained head.
struct Point {
    /// From the head's centre, LPS, millimetres.
    place: Vector3<f64>,
    /// Per millimetre.
    gradient: Vector3<f64>,
    /// In units of the head's mean.
    value: f64,
}

/// Both volumes as one blur shows them.
struct Level<'v> {
    points: Vec<Point>,
    /// Rising values of the trained volume.
    knots: Vec<f64>,
    session: Spline<'v>,
    to_index: Matrix4<f64>,
    /// What the session's values are divided by.
    unit: f64,
}

impl<'v> Level<'v> {
    fn new(
        trained: &Volume,
        session: &'v Volume,
        centre: Vector3<f64>,
        std_dev_mm: f64,
        points: usize,
    ) -> Result<Self, RegistrationError> {
        let singular = |which| RegistrationError::Singular { which };
        let grid = interpolation::inverse(&trained.affine_lps).ok_or(singular("trained"))?;
        let to_index = interpolation::inverse(&session.affine_lps);
        let to_index = to_index.ok_or(singular("session's"))?;
        let turn: Matrix3<f64> = grid.fixed_view::<3, 3>(0, 0).transpose();
        let spline = blurred(trained, std_dev_mm);
        let [slices, rows, columns] = spline.shape();
        let inner = |side: usize| 1..side.saturating_sub(1);
        let places = inner(slices).flat_map(|slice| {
            inner(rows).flat_map(move |row| inner(columns).map(move |column| [column, row, slice]))
        });
        let places: Vec<([f64; 3], f64)> = places
            .map(|place| place.map(count))
            .map(|place| (place, f64::from(spline.value(place))))
            .collect();
        let mean = head_limit(places.iter().map(|(_, value)| *value));
        let head = places
            .into_iter()
            .filter(|(_, value)| *value > mean * RIM_SHARE);
        let mut head = shuffled(head.collect());
        head.truncate(points);
        if head.len() < MIN_POINTS {
            return Err(RegistrationError::NoHead {
                which: "trained",
                expected: MIN_POINTS,
                found: head.len(),
            });
        }
        let points: Vec<Point> = head
            .into_iter()
            .map(|(at, value)| {
                let slope = |axis: usize| {
                    let shifted = |by: f64| {
                        let mut at = at;
                        at[axis] += by;
                        f64::from(spline.value(at))
                    };
                    shifted(0.5) - shifted(-0.5)
                };
                Point {
                    place: Vector3::from(trained.position_lps(at)) - centre,
                    gradient: turn * Vector3::new(slope(0), slope(1), slope(2)) / mean,
                    value: value / mean,
                }
            })
            .collect();
        Ok(Self {
            knots: knots(points.iter().map(|point| point.value).collect()),
            points,
            session: blurred(session, std_dev_mm),
            to_index,
            unit: head_limit(session.voxels.iter().map(|value| f64::from(*value))),
        })
    }

    /// Steps until the head stands still; `None` where it is lost on the way.
    fn descend(&self, start: Matrix4<f64>, freedom: Freedom) -> Option<Placed> {
        let mut map = start;
        let mut values = vec![f64::NAN; self.points.len()];
        for _ in 0..MAX_STEPS {
            self.look(&map, &mut values)?;
            let fit = self.fit(&values)?;
            let step = self.step(&values, &fit, freedom)?;
            let length = step.iter().take(6).map(|part| part.abs()).sum::<f64>();
            let step = step.as_slice();
            let shrink = (MAX_STEP_MM / length).min(1.0);
            let step: Vec<f64> = step.iter().map(|part| part * shrink).collect();
            map *= warp(&step).try_inverse()?;
            if length < STILL_MM {
                break;
            }
        }
        let overlap = self.look(&map, &mut values)?;
        let fit = self.fit(&values)?;
        let seen = values.iter().filter(|value| !value.is_nan());
        let mean = seen.clone().sum::<f64>() / seen.clone().fold(0.0, |len, _| len + 1.0);
        let total: f64 = seen.map(|value| (value - mean).powi(2)).sum();
        let left: f64 = fit
            .residuals
            .iter()
            .filter(|left| !left.is_nan())
            .map(|left| left * left)
            .sum();
        (overlap >= MIN_OVERLAP).then_some(Placed {
            map,
            ratio: 1.0 - left / total,
            overlap,
        })
    }

    /// Reads the session at the points' places; not a number out of view.
    ///
    /// Returns the share in view, `None` where that is too small to go on.
    fn look(&self, map: &Matrix4<f64>, values: &mut [f64]) -> Option<f64> {
        let map = self.to_index * map;
        let mut found = 0;
        for (point, value) in self.points.iter().zip(values) {
            let at = transformed(&map, point.place.into()).map(single);
            let inside = self.session.holds(at);
            *value = if inside {
                f64::from(self.session.value_inside(at)) / self.unit
            } else {
                f64::NAN
            };
            found += usize::from(inside);
        }
        let overlap = count(found) / count(self.points.len());
        (found >= MIN_POINTS / 2 && overlap >= MIN_OVERLAP / 2.0).then_some(overlap)
    }

    /// What the function's columns are for a point: hats over the knots, and the tilts.
    ///
    /// - `shape`: what is tilted, at the knots.
    ///
    /// Returns the knot below the point and how far the next is.
    fn columns(&self, point: &Point, shape: &[f64], columns: &mut [f64]) -> (usize, f64) {
        columns.fill(0.0);
        let last = self.knots.len() - 2;
        let above = self.knots.partition_point(|knot| *knot <= point.value);
        let first = above.saturating_sub(1).min(last);
        let width = self.knots[first + 1] - self.knots[first];
        let share = ((point.value - self.knots[first]) / width).clamp(0.0, 1.0);
        columns[first] = 1.0 - share;
        columns[first + 1] = share;
        let shown = shape[first] * (1.0 - share) + shape[first + 1] * share;
        let tilts = point.place / ARM_MM * shown;
        columns[self.knots.len()..].copy_from_slice(tilts.as_slice());
        (first, width)
    }

    /// Fits the session's values by the trained volume's.
    fn fit(&self, values: &[f64]) -> Option<Fit> {
        let unknowns = self.knots.len() + TILTS;
        let mut weights = vec![1.0; values.len()];
        let mut residuals = vec![f64::NAN; values.len()];
        let mut solved = DVector::zeros(unknowns);
        let mut columns = vec![0.0; unknowns];
        // What is tilted is the function itself, as far as it is known.
        let mut shape = self.knots.clone();
        for round in 0..FIT_ROUNDS {
            if round > 0 {
                shape.copy_from_slice(&solved.as_slice()[..self.knots.len()]);
            }
            let mut sums = Sums::new(unknowns);
            for ((point, value), weight) in self.points.iter().zip(values).zip(&weights) {
                if !value.is_nan() && *weight > 0.0 {
                    self.columns(point, &shape, &mut columns);
                    sums.add(&columns, *value, *weight);
                }
            }
            solved = sums.solve()?;
            for ((point, value), residual) in self.points.iter().zip(values).zip(&mut residuals) {
                self.columns(point, &shape, &mut columns);
                let shown: f64 = columns.iter().zip(&solved).map(|(a, b)| a * b).sum();
                *residual = value - shown;
            }
            let sizes = residuals.iter().map(|left| left.abs());
            let mut sizes: Vec<f64> = sizes.filter(|size| !size.is_nan()).collect();
            let middle = sizes.len() / 2;
            let (_, median, _) = sizes.select_nth_unstable_by(middle, f64::total_cmp);
            let limit = TUKEY / 0.6745 * *median;
            for (weight, residual) in weights.iter_mut().zip(&residuals) {
                let share = residual.abs() / limit.max(f64::MIN_POSITIVE);
                *weight = if share < 1.0 {
                    (1.0 - share * share).powi(2)
                } else {
                    0.0
                };
            }
            if limit == 0.0 {
                // The same volume twice: nothing is left to weigh by.
                weights.fill(1.0);
            }
        }
        Some(Fit {
            shape,
            solved,
            weights,
            residuals,
        })
    }

    /// The step that lowers what the fit leaves; function and tilt may follow it.
    fn step(&self, values: &[f64], fit: &Fit, freedom: Freedom) -> Option<DVector<f64>> {
        let (moves, free) = (freedom.unknowns(), self.knots.len() + TILTS);
        let mut sums = Sums::new(moves + free);
        let mut columns = vec![0.0; moves + free];
        for (index, point) in self.points.iter().enumerate() {
            let weight = fit.weights[index];
            if values[index].is_nan() || weight <= 0.0 {
                continue;
            }
            let (first, width) = self.columns(point, &fit.shape, &mut columns[moves..]);
            let tilt: f64 = (0..TILTS)
                .map(|axis| fit.solved[self.knots.len() + axis] * point.place[axis] / ARM_MM)
                .sum();
            let rise = |of: &[f64]| (of[first + 1] - of[first]) / width;
            let slope = rise(fit.solved.as_slice()) + tilt * rise(&fit.shape);
            let gradient = point.gradient * slope;
            columns[..3].copy_from_slice(gradient.as_slice());
            match freedom {
                Freedom::Rigid => {
                    let turned = point.place.cross(&gradient) / ARM_MM;
                    columns[3..6].copy_from_slice(turned.as_slice());
                }
                Freedom::Affine => {
                    for row in 0..3 {
                        for column in 0..3 {
                            columns[3 + 3 * row + column] =
                                gradient[row] * point.place[column] / ARM_MM;
                        }
                    }
                }
            }
            sums.add(&columns, fit.residuals[index], weight);
        }
        Some(sums.solve()?.rows(0, moves).into_owned())
    }
}

/// How the session's values follow from the trained volume's.
struct Fit {
    /// What the tilts tilt, at the knots.
    shape: Vec<f64>,
    /// The function at its knots, then the tilts.
    solved: DVector<f64>,
    /// `[point]`.
    weights: Vec<f64>,
    /// `[point]`, not a number out of view.
    residuals: Vec<f64>,
}

/// The small motion of a step: shift, then turn or linear part.
fn warp(step: &[f64]) -> Matrix4<f64> {
    let shift = Vector3::new(step[0], step[1], step[2]);
    if let [about_l, about_p, about_s] = step[3..] {
        let turn = Vector3::new(about_l, about_p, about_s) / ARM_MM;
        return Rotation3::new(turn)
            .to_homogeneous()
            .append_translation(&shift);
    }
    let linear = Matrix3::identity() + Matrix3::from_row_slice(&step[3..]) / ARM_MM;
    linear.to_homogeneous().append_translation(&shift)
}

/// Weighted sums of products of columns.
struct Sums {
    square: DMatrix<f64>,
    right: DVector<f64>,
}

impl Sums {
    fn new(unknowns: usize) -> Self {
        Self {
            square: DMatrix::zeros(unknowns, unknowns),
            right: DVector::zeros(unknowns),
        }
    }

    fn add(&mut self, columns: &[f64], value: f64, weight: f64) {
        for (a, column) in columns.iter().enumerate() {
            if *column == 0.0 {
                continue;
            }
            let weighted = column * weight;
            self.right[a] += weighted * value;
            for (b, other) in columns.iter().enumerate().skip(a) {
                self.square[(b, a)] += weighted * other;
            }
        }
    }

    fn solve(mut self) -> Option<DVector<f64>> {
        let trace = self.square.trace();
        for at in 0..self.square.nrows() {
            // A hat that no point stands under stays where it is.
            self.square[(at, at)] += 1e-10 * trace;
        }
        self.square.fill_upper_triangle_with_lower_triangle();
        let solved = self.square.cholesky()?.solve(&self.right);
        solved
            .iter()
            .all(|value| value.is_finite())
            .then_some(solved)
    }
}

/// Knots between which there are equally many values; at least two, rising.
fn knots(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    let mut knots: Vec<f64> = (0..KNOTS)
        .map(|at| values[at * last / (KNOTS - 1)])
        .collect();
    knots.dedup_by(|next, before| *next - *before < 1e-6);
    if knots.len() < 2 {
        knots.push(knots[0] + 1.0);
    }
    knots
}

/// The middle of the head's signal, LPS, millimetres.
fn centre_of_mass(volume: &Volume, which: &'static str) -> Result<Vector3<f64>, RegistrationError> {
    let values = volume.voxels.iter().map(|value| f64::from(*value));
    let limit = head_limit(values) * RIM_SHARE;
    let (mut sum, mut total, mut found) = (Vector3::zeros(), 0.0, 0);
    for ((slice, row, column), value) in volume.voxels.indexed_iter() {
        let value = f64::from(*value);
        if value > limit {
            let place = volume.position_lps([column, row, slice].map(count));
            sum += Vector3::from(place) * value;
            total += value;
            found += 1;
        }
    }
    let centre: Vector3<f64> = sum / total;
    if found >= MIN_POINTS && centre.iter().all(|value| value.is_finite()) {
        return Ok(centre);
    }
    Err(RegistrationError::NoHead {
        which,
        expected: MIN_POINTS,
        found,
    })
}

/// Distance between neighbours along slices, rows, columns, millimetres.
fn spacing(volume: &Volume) -> [f64; 3] {
    [2, 1, 0].map(|axis| {
        let rows = &volume.affine_lps[..3];
        Vector4::from_iterator(rows.iter().map(|row| row[axis]).chain([0.0])).norm()
    })
}

fn largest<const N: usize>(values: [f64; N]) -> f64 {
    values.into_iter().fold(0.0, f64::max)
}

/// A volume whose blur is that wide with the spline's own in it.
fn blurred(volume: &Volume, std_dev_mm: f64) -> Spline<'_> {
    let std_dev = spacing(volume).map(|spacing| {
        let own = SPLINE_STD_DEV * spacing;
        (std_dev_mm.powi(2) - own.powi(2)).max(0.0).sqrt() / spacing
    });
    Spline::blurring(volume.voxels.view(), std_dev, [1; 3])
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;

    use super::*;
    use crate::quality::rms_displacement_mm;
    use crate::volume::{PatientTag, SeriesUid, VolumeHeader};

    /// What a scanner shows of a place, LPS, millimetres.
    type Shown = fn([f64; 3]) -> f64;

    /// A head of smooth lumps, known everywhere.
    fn head([x, y, z]: [f64; 3]) -> f64 {
        let inside = 1.0 - (x / 60.0).powi(2) - (y / 75.0).powi(2) - (z / 55.0).powi(2);
        let skull = 1.0 / (1.0 + (-12.0 * inside).exp());
        let lumps = (x / 9.0).sin() * (y / 11.0 + 1.0).cos() + (z / 10.0 + x / 20.0).sin();
        skull * (600.0 + 120.0 * lumps)
    }

    /// The same head in other contrast: bright is dark, and brighter to the left.
    fn other([x, y, z]: [f64; 3]) -> f64 {
        let plain = head([x, y, z]);
        let inside = (plain / 300.0).min(1.0);
        (1800.0 * inside - 1.2 * plain).max(0.0) * (1.0 + x / 400.0)
    }

    /// - `sides`: slices, rows, columns; `spacing`: of columns, rows, slices.
    /// - `map`: where the head's places are in this volume.
    fn volume(
        shown: Shown,
        sides: [usize; 3],
        spacing: [f64; 3],
        tilt: [f64; 3],
        middle: [f64; 3],
        map: &Matrix4<f64>,
    ) -> Volume {
        let turn = Rotation3::from_euler_angles(tilt[0], tilt[1], tilt[2]);
        let axes = turn.matrix() * Matrix3::from_diagonal(&Vector3::from(spacing));
        let half = [sides[2], sides[1], sides[0]].map(|side| (count(side) - 1.0) / 2.0);
        let origin = Vector3::from(middle) - axes * Vector3::from(half);
        let grid = axes.to_homogeneous().append_translation(&origin);
        let back = map.try_inverse().unwrap();
        let mut volume = Volume {
            voxels: Array3::zeros((sides[0], sides[1], sides[2])),
            affine_lps: interpolation::affine(&grid),
            header: VolumeHeader {
                series_uid: SeriesUid::new("2.25.1"),
                patient: PatientTag::default(),
                acquisition: 1,
                instance: None,
                tr_ms: 1500.0,
                slice_times_ms: None,
                time_ms: None,
            },
        };
        volume.voxels = Array3::from_shape_fn(volume.voxels.dim(), |(slice, row, column)| {
            let place = volume.position_lps([column, row, slice].map(count));
            single(shown(transformed(&back, place)))
        });
        volume
    }

    fn trained() -> Volume {
        let still = Matrix4::identity();
        volume(
            head,
            [30, 52, 44],
            [3.0, 3.0, 4.0],
            [0.0; 3],
            [0.0; 3],
            &still,
        )
    }

    fn motion(shift: [f64; 3], turn: [f64; 3]) -> Matrix4<f64> {
        let turn = Rotation3::from_euler_angles(turn[0], turn[1], turn[2]);
        turn.to_homogeneous().append_translation(&shift.into())
    }

    /// RMS over the 50 mm sphere, millimetres.
    fn error_mm(found: &Registration, truth: &Matrix4<f64>) -> f64 {
        rms_displacement_mm(
            &found.matrix_lps(),
            &interpolation::affine(truth),
            [0.0; 3],
            50.0,
        )
    }

    #[test]
    fn same_volume_is_registered_by_the_identity() {
        for freedom in [Freedom::Rigid, Freedom::Affine] {
            let found = register(&trained(), &trained(), freedom).unwrap();
            let error = error_mm(&found, &Matrix4::identity());
            assert!(error < 1e-3, "{freedom:?}: {error} mm");
            assert!(found.correlation_ratio() > 0.999);
            assert!(found.overlap() > 0.9);
        }
    }

    #[test]
    fn known_motion_is_found_on_another_grid_in_another_contrast() {
        let truth = motion([9.0, -14.0, 11.0], [0.15, -0.06, 0.1]);
        for shown in [head as Shown, other as Shown] {
            let session = volume(
                shown,
                [34, 64, 60],
                [2.6, 2.6, 3.3],
                [0.12, 0.05, -0.1],
                [5.0, 3.0, -4.0],
                &truth,
            );
            let found = register(&trained(), &session, Freedom::Rigid).unwrap();
            let error = error_mm(&found, &truth);
            assert!(error < 0.1, "{error} mm");
        }
    }

    #[test]
    fn known_stretch_is_found() {
        let mut truth = motion([-6.0, 8.0, 5.0], [-0.08, 0.03, 0.05]);
        let stretch = Vector4::new(1.04, 0.97, 1.02, 1.0);
        truth *= Matrix4::from_diagonal(&stretch);
        let session = volume(
            other,
            [36, 64, 60],
            [2.6, 2.6, 3.3],
            [0.05, 0.0, 0.1],
            [2.0, 3.0, 1.0],
            &truth,
        );
        let found = register(&trained(), &session, Freedom::Affine).unwrap();
        let error = error_mm(&found, &truth);
        assert!(error < 0.15, "{error} mm");
    }

    #[test]
    fn field_of_view_that_leaves_out_a_third_of_the_head_suffices() {
        let truth = motion([4.0, 6.0, -3.0], [0.1, 0.04, -0.05]);
        // The slab shows the lower part alone.
        let session = volume(
            other,
            [20, 64, 60],
            [2.8, 2.8, 3.5],
            [0.05, 0.0, 0.0],
            [0.0, 4.0, -18.0],
            &truth,
        );
        let found = register(&trained(), &session, Freedom::Rigid).unwrap();
        let error = error_mm(&found, &truth);
        assert!(error < 0.1, "{error} mm");
    }

    #[test]
    fn motion_follows_the_registration_in_one_affine() {
        let registered = Registration {
            map: motion([1.0, 2.0, 3.0], [0.1, 0.0, -0.1]),
            correlation_ratio: 1.0,
            overlap: 1.0,
        };
        let moved = Rigid::from_parameters([0.5, -0.2, 0.1, 0.02, 0.01, -0.03], [3.0, 4.0, 5.0]);
        let place = [12.0, -30.0, 20.0];
        let steps = moved.apply(crate::volume::apply(&registered.matrix_lps(), place));
        let at_once = crate::volume::apply(&registered.then(&moved), place);
        assert!((Vector3::from(steps) - Vector3::from(at_once)).norm() < 1e-9);
    }

    #[test]
    fn session_without_the_head_is_refused() {
        let trained = trained();
        for value in [0.0, 5.0, f32::NAN] {
            let mut empty = trained.clone();
            empty.voxels.fill(value);
            let found = register(&trained, &empty, Freedom::Rigid);
            assert!(found.is_err(), "session of {value}: {found:?}");
            let found = register(&empty, &trained, Freedom::Rigid);
            assert!(found.is_err(), "trained volume of {value}: {found:?}");
        }
        let mut noise = trained.clone();
        let mut state = 1_u32;
        noise.voxels.mapv_inplace(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from(state.to_be_bytes()[0])
        });
        let found = register(&trained, &noise, Freedom::Affine);
        assert!(found.is_err(), "noise: {found:?}");
    }
}
