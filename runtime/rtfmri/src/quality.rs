//! How good a volume is: how far the head moved, how much the signal jumped, what noise it has.
//!
//! Steps for each volume, as it comes: the motion against the volume before (framewise
//! displacement, Power et al. 2012 and Jenkinson et al. 2002) and against the reference;
//! the signal against the volume before (DVARS, Smyser et al. 2010) over the mask and over the
//! head, also as a multiple of what the run shows otherwise (as Afyouni and Nichols 2018
//! divide by what is expected, which is here a running median); the running tSNR. What is
//! kept is a few numbers per voxel and the last [`RECENT`] values of DVARS, however long the run.
//!
//! tSNR is the mean over the standard deviation of what a parabola over time leaves:
//! Welford's recursion carries each voxel's covariance with time and with its square beside
//! its variance, so that slow drift of scanner or head is not taken for noise. Volumes with
//! a spike are not learned from.

use nalgebra::{Matrix2, Matrix4, Vector2, Vector3};
use ndarray::ArrayView1;

use crate::interpolation::matrix;
use crate::motion::Rigid;
use crate::volume::Affine;

/// Values of DVARS that the next is compared with.
pub const RECENT: usize = 64;
/// Fewer values of DVARS make no outlier.
const LEAST_RECENT: usize = 8;
/// Fewer volumes make no tSNR.
const LEAST_LEARNED: u32 = 10;
/// Of normal values, the standard deviation per median absolute deviation.
const STD_DEV_PER_MAD: f64 = 1.4826;
/// A spread of DVARS below this share of its median is not believed.
const LEAST_SPREAD: f64 = 0.01;
/// Time counts in this many volumes, so that its square stays of one size with it.
const TIME_UNIT_VOLUMES: f64 = 100.0;

/// What a flag needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QualitySettings {
    /// Radius of the sphere that stands for the head, millimetres.
    pub radius_mm: f64,
    /// Framewise displacement (Power) above which a volume is a spike, millimetres.
    pub fd_limit_mm: f64,
    /// Robust standard deviations above the running median beyond which DVARS is a spike.
    pub dvars_limit: f64,
    /// Displacement by small steps alone above which the head drifts, millimetres.
    pub drift_limit_mm: f64,
}

impl Default for QualitySettings {
    /// 50 mm and 0.5 mm as Power et al. 2012; half a usual voxel for drift.
    fn default() -> Self {
        Self {
            radius_mm: 50.0,
            fd_limit_mm: 0.5,
            dvars_limit: 4.0,
            drift_limit_mm: 1.5,
        }
    }
}

/// One set of voxels in one volume: the mask's, or the head's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Signal {
    /// Mean over the set, scanner units.
    pub mean: f64,
    /// Root mean square of the change since the volume compared with, scanner units; `None`
    /// where there is none.
    pub dvars: Option<f64>,
    /// The same as a share of the set's mean, percent.
    pub dvars_percent: Option<f64>,
    /// The same as a multiple of the run's running median, from the ninth value on:
    /// 1 is usual. Dimensionless.
    pub dvars_standardised: Option<f64>,
    /// The set's median tSNR over the volumes learned so far, this one among them,
    /// dimensionless; `None` before ten of them.
    pub tsnr: Option<f64>,
    /// Whether DVARS is an outlier of the run's last values.
    pub spike: bool,
}

/// What one volume shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quality {
    /// The volume of the run, from 0.
    pub volume: u32,
    /// The volume that changes are measured from: the one pushed before, further back than
    /// one where volumes are missing. `None` for the first, and for one that came late.
    pub compared_with: Option<u32>,
    /// Root mean square displacement from the reference over the sphere, millimetres.
    pub displacement_mm: f64,
    /// Framewise displacement as Power et al. have it: the sum of the three shifts' and of
    /// the three turns' absolute changes, the turns on the sphere's surface, millimetres.
    pub fd_power_mm: Option<f64>,
    /// Framewise displacement as Jenkinson et al. have it: root mean square over the
    /// sphere, millimetres.
    pub fd_jenkinson_mm: Option<f64>,
    /// Displacement, as above, by steps alone that were no spikes, since the first volume,
    /// millimetres.
    pub drift_mm: f64,
    /// Over the mask's voxels.
    pub mask: Signal,
    /// Over the head.
    pub head: Signal,
    /// Whether the head moved too far since the volume compared with.
    pub motion_spike: bool,
    /// Whether the head has slowly gone too far.
    pub drifting: bool,
}

impl Quality {
    /// Whether the volume is a spike, of motion or of signal.
    #[must_use]
    pub fn is_spike(&self) -> bool {
        self.motion_spike || self.mask.spike || self.head.spike
    }
}

/// Watches the volumes of a run.
#[derive(Debug, Clone)]
pub struct Monitor {
    settings: QualitySettings,
    /// LPS, millimetres.
    centre: Vector3<f64>,
    before: Option<(u32, Rigid)>,
    drift: Matrix4<f64>,
    mask: Watch,
    head: Watch,
}

impl Monitor {
    /// Starts with a run.
    ///
    /// - `centre_lps`: the middle of the sphere, LPS, millimetres; that of
    ///   [`Realigner::centre_lps`](crate::motion::Realigner::centre_lps).
    #[must_use]
    pub fn new(settings: QualitySettings, centre_lps: [f64; 3]) -> Self {
        Self {
            settings,
            centre: centre_lps.into(),
            before: None,
            drift: Matrix4::identity(),
            mask: Watch::default(),
            head: Watch::default(),
        }
    }

    /// Judges the next volume.
    ///
    /// Volumes come as they are taken. One whose number is not above the last one's came
    /// late: it is measured against the reference alone, and nothing is learned from it.
    ///
    /// - `volume`: of the run, from 0.
    /// - `motion`: of the head, from [`Realigner::realign`](crate::motion::Realigner::realign).
    /// - `mask`: the mask's voxels after realignment, `[voxel]`, scanner units; may be empty.
    /// - `head`: the head's, in an order of its own that stays, scanner units; may be empty.
    ///
    /// # Panics
    /// Where a set has another length than before, which is a fault of the caller.
    pub fn push(
        &mut self,
        volume: u32,
        motion: &Rigid,
        mask: ArrayView1<'_, f32>,
        head: ArrayView1<'_, f32>,
    ) -> Quality {
        let late = self.before.is_some_and(|(last, _)| volume <= last);
        let before = self.before.filter(|_| !late);
        let here = motion.matrix_lps();
        let rms = |a: &Affine, b: &Affine| {
            rms_displacement_mm(a, b, self.centre.into(), self.settings.radius_mm)
        };
        let still = Rigid::identity().matrix_lps();
        let fd_power_mm = before.map(|(_, before)| self.power(&before, motion));
        let motion_spike = fd_power_mm.is_some_and(|fd| fd > self.settings.fd_limit_mm);
        let fd_jenkinson_mm = before.map(|(_, before)| rms(&before.matrix_lps(), &here));
        let displacement_mm = rms(&still, &here);
        if let Some((_, before)) = before
            && !motion_spike
            && let Some(back) = before.homogeneous().try_inverse()
        {
            self.drift = motion.homogeneous() * back * self.drift;
        }
        let drift_mm = rms(&still, &crate::interpolation::affine(&self.drift));
        let compared = before.is_some();
        let limit = self.settings.dvars_limit;
        let mut mask_signal = self.mask.compare(mask, compared, limit);
        let mut head_signal = self.head.compare(head, compared, limit);
        if !late {
            let spike = motion_spike || mask_signal.spike || head_signal.spike;
            self.mask.keep(mask, mask_signal.dvars, volume, spike);
            self.head.keep(head, head_signal.dvars, volume, spike);
            self.before = Some((volume, *motion));
        }
        mask_signal.tsnr = self.mask.tsnr();
        head_signal.tsnr = self.head.tsnr();
        Quality {
            volume,
            compared_with: before.map(|(volume, _)| volume),
            displacement_mm,
            fd_power_mm,
            fd_jenkinson_mm,
            drift_mm,
            mask: mask_signal,
            head: head_signal,
            motion_spike,
            drifting: drift_mm > self.settings.drift_limit_mm,
        }
    }

    /// Framewise displacement as Power et al. have it, millimetres.
    fn power(&self, before: &Rigid, here: &Rigid) -> f64 {
        let [before, here] = [before, here].map(|motion| motion.about(self.centre).parameters());
        let change = |at: usize| (here[at] - before[at]).abs();
        let turn: f64 = (3..6).map(change).sum();
        (0..3).map(change).sum::<f64>() + self.settings.radius_mm * turn
    }
}

/// How far apart two motions put a sphere, root mean square over its inside, millimetres.
///
/// - `a`, `b`: LPS to LPS, or RAS to RAS, millimetres.
/// - `centre`: of the sphere, in the same space, millimetres.
#[must_use]
pub fn rms_displacement_mm(a: &Affine, b: &Affine, centre: [f64; 3], radius_mm: f64) -> f64 {
    let off = matrix(b) - matrix(a);
    let turn = off.fixed_view::<3, 3>(0, 0).into_owned();
    let shift = off.fixed_view::<3, 1>(0, 3) + turn * Vector3::from(centre);
    let spread = radius_mm * radius_mm / 5.0 * (turn.transpose() * turn).trace();
    (spread + shift.norm_squared()).sqrt()
}

/// What is known of one set of voxels.
#[derive(Debug, Clone, Default)]
struct Watch {
    /// The volume before, `[voxel]`, scanner units.
    before: Vec<f32>,
    /// The last values of DVARS, the oldest at `next` once there are [`RECENT`].
    recent: Vec<f64>,
    next: usize,
    trend: Trend,
    /// For medians.
    room: Vec<f64>,
}

impl Watch {
    fn compare(&mut self, values: ArrayView1<'_, f32>, compared: bool, limit: f64) -> Signal {
        assert!(
            self.before.is_empty() || self.before.len() == values.len(),
            "a set of voxels keeps its length over a run"
        );
        let len = crate::spline::count(values.len());
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / len;
        let mut signal = Signal {
            mean,
            dvars: None,
            dvars_percent: None,
            dvars_standardised: None,
            tsnr: None,
            spike: false,
        };
        if !compared || values.is_empty() {
            return signal;
        }
        let changes = values.iter().zip(&self.before);
        let squares: f64 = changes
            .map(|(here, before)| (f64::from(*here) - f64::from(*before)).powi(2))
            .sum();
        let dvars = (squares / len).sqrt();
        signal.dvars = Some(dvars);
        signal.dvars_percent = (mean > 0.0).then(|| 100.0 * dvars / mean);
        if self.recent.len() < LEAST_RECENT {
            return signal;
        }
        let usual = self.median_of_recent(|value| value);
        let spread = STD_DEV_PER_MAD * self.median_of_recent(|value| (value - usual).abs());
        let spread = spread.max(LEAST_SPREAD * usual);
        signal.dvars_standardised = (usual > 0.0).then(|| dvars / usual);
        signal.spike = dvars > usual + limit * spread;
        signal
    }

    fn median_of_recent(&mut self, of: impl Fn(f64) -> f64) -> f64 {
        self.room.clear();
        self.room.extend(self.recent.iter().map(|value| of(*value)));
        median(&mut self.room).unwrap_or(0.0)
    }

    /// Takes a volume as the one before the next.
    fn keep(&mut self, values: ArrayView1<'_, f32>, dvars: Option<f64>, volume: u32, spike: bool) {
        if let Some(dvars) = dvars {
            // A spike counts among them too: a run that stays noisy becomes the usual.
            if self.recent.len() < RECENT {
                self.recent.push(dvars);
            } else {
                self.recent[self.next] = dvars;
                self.next = (self.next + 1) % RECENT;
            }
        }
        if !spike {
            self.trend
                .learn(f64::from(volume) / TIME_UNIT_VOLUMES, values);
        }
        self.before.clear();
        self.before.extend(values);
    }

    /// The median tSNR of the set.
    fn tsnr(&mut self) -> Option<f64> {
        if self.trend.learned < LEAST_LEARNED {
            return None;
        }
        self.room.clear();
        self.room
            .extend(self.trend.tsnr().filter(|ratio| ratio.is_finite()));
        median(&mut self.room)
    }
}

/// The upper median; orders what it is given.
fn median(values: &mut [f64]) -> Option<f64> {
    let middle = values.len() / 2;
    if values.is_empty() {
        return None;
    }
    let (_, median, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    Some(*median)
}

/// Each voxel's mean, variance and covariance with time and with its square, so far.
#[derive(Debug, Clone, Default)]
struct Trend {
    learned: u32,
    /// Of time and its square.
    time_mean: Vector2<f64>,
    /// Sums of products of their deviations.
    time_square: Matrix2<f64>,
    /// `[voxel]`: mean, sums of products of deviations with themselves and with the times'.
    mean: Vec<f64>,
    square: Vec<f64>,
    with_time: [Vec<f64>; 2],
}

impl Trend {
    fn learn(&mut self, time: f64, values: ArrayView1<'_, f32>) {
        let len = values.len();
        for numbers in [&mut self.mean, &mut self.square]
            .into_iter()
            .chain(&mut self.with_time)
        {
            numbers.resize(len, 0.0);
        }
        self.learned += 1;
        let share = 1.0 / f64::from(self.learned);
        let times = Vector2::new(time, time * time);
        let off = times - self.time_mean;
        self.time_mean += off * share;
        self.time_square += off * (times - self.time_mean).transpose();
        let [first, second] = &mut self.with_time;
        let voxels = self.mean.iter_mut().zip(&mut self.square);
        let voxels = voxels.zip(first).zip(second).zip(values);
        for ((((mean, square), first), second), value) in voxels {
            let value = f64::from(*value);
            let old = value - *mean;
            *mean += old * share;
            let new = value - *mean;
            *square += old * new;
            *first += off[0] * new;
            *second += off[1] * new;
        }
    }

    /// Each voxel's mean over the standard deviation of what the parabola leaves.
    fn tsnr(&self) -> impl Iterator<Item = f64> {
        let solve = self.time_square.try_inverse().unwrap_or_default();
        let free = f64::from(self.learned) - 3.0;
        let [first, second] = &self.with_time;
        let voxels = self.mean.iter().zip(&self.square).zip(first).zip(second);
        voxels.map(move |(((mean, square), first), second)| {
            let with_time = Vector2::new(*first, *second);
            let explained = with_time.dot(&(solve * with_time));
            mean / ((square - explained).max(0.0) / free).sqrt()
        })
    }
}

#[cfg(test)]
mod tests {
    use nalgebra::{DMatrix, DVector};
    use ndarray::{Array1, Array2};
    use proptest::prelude::*;

    use super::*;

    /// Numbers that look random, from 0 to 1.
    fn noise(state: &mut u32) -> f32 {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(state.to_be_bytes()[0]) / 255.0
    }

    /// `[volume, voxel]` with drift, around 1000.
    fn series(volumes: usize, voxels: usize) -> Array2<f32> {
        let mut state = 3;
        Array2::from_shape_fn((volumes, voxels), |(volume, voxel)| {
            let time = f32::from(u16::try_from(volume).unwrap());
            let tilt = f32::from(u16::try_from(voxel % 7).unwrap());
            1000.0 + 0.4 * tilt * time - 0.002 * time * time + 20.0 * noise(&mut state)
        })
    }

    /// The residual's standard deviation of one voxel's fit of a parabola, all at once.
    fn tsnr_slowly(values: &[f64]) -> f64 {
        let time = |row: usize| f64::from(u32::try_from(row).unwrap());
        let design = DMatrix::from_fn(values.len(), 3, |row, power| {
            time(row).powi(i32::try_from(power).unwrap())
        });
        let values = DVector::from_column_slice(values);
        let square = design.transpose() * &design;
        let weights = square
            .cholesky()
            .unwrap()
            .solve(&(design.transpose() * &values));
        let left = &values - design * weights;
        let free = time(values.len()) - 3.0;
        values.mean() / (left.norm_squared() / free).sqrt()
    }

    fn push(monitor: &mut Monitor, volume: u32, motion: [f64; 6], values: &Array1<f32>) -> Quality {
        let motion = Rigid::from_parameters(motion, [1.0, 2.0, 3.0]);
        monitor.push(volume, &motion, values.view(), values.view())
    }

    fn monitor() -> Monitor {
        Monitor::new(QualitySettings::default(), [1.0, 2.0, 3.0])
    }

    #[test]
    fn tsnr_is_that_of_a_parabola_fitted_to_the_whole_run() {
        let series = series(80, 9);
        // So few voxels jump by chance.
        let settings = QualitySettings {
            dvars_limit: f64::INFINITY,
            ..QualitySettings::default()
        };
        let mut monitor = Monitor::new(settings, [1.0, 2.0, 3.0]);
        for (volume, values) in (0..).zip(series.rows()) {
            let quality = push(&mut monitor, volume, [0.0; 6], &values.to_owned());
            assert!(!quality.is_spike(), "volume {volume}");
            if volume + 1 < LEAST_LEARNED {
                assert_eq!(quality.mask.tsnr, None);
                continue;
            }
            let seen = 0..=usize::try_from(volume).unwrap();
            let of = |voxel: usize| -> Vec<f64> {
                seen.clone()
                    .map(|row| f64::from(series[[row, voxel]]))
                    .collect()
            };
            let mut slowly: Vec<f64> = (0..9).map(|voxel| tsnr_slowly(&of(voxel))).collect();
            slowly.sort_by(f64::total_cmp);
            let found = quality.mask.tsnr.unwrap();
            assert!(
                (found / slowly[4] - 1.0).abs() < 1e-6,
                "{found} and {}",
                slowly[4]
            );
        }
    }

    #[test]
    fn displacements_are_those_worked_by_hand() {
        let values = Array1::from_elem(4, 100.0);
        let mut monitor = monitor();
        let first = push(&mut monitor, 0, [0.0; 6], &values);
        assert_eq!((first.fd_power_mm, first.compared_with), (None, None));
        let moved = push(
            &mut monitor,
            1,
            [0.1, -0.2, 0.0, 0.002, 0.0, -0.001],
            &values,
        );
        let power = moved.fd_power_mm.unwrap();
        assert!((power - (0.3 + 50.0 * 0.003)).abs() < 1e-12, "{power}");
        // A shift alone moves everything by its length.
        let shifted = push(
            &mut monitor,
            3,
            [0.4, 0.2, 0.0, 0.002, 0.0, -0.001],
            &values,
        );
        let jenkinson = shifted.fd_jenkinson_mm.unwrap();
        assert!((jenkinson - 0.5).abs() < 1e-9, "{jenkinson}");
        assert_eq!(shifted.compared_with, Some(1));
        assert!(shifted.motion_spike);
        let late = push(&mut monitor, 2, [0.3, 0.0, 0.4, 0.0, 0.0, 0.0], &values);
        assert_eq!((late.fd_power_mm, late.mask.dvars), (None, None));
        assert!((late.displacement_mm - 0.5).abs() < 1e-9);
        let next = push(
            &mut monitor,
            4,
            [0.4, 0.2, 0.0, 0.002, 0.0, -0.001],
            &values,
        );
        assert_eq!((next.fd_power_mm, next.compared_with), (Some(0.0), Some(3)));
    }

    #[test]
    fn displacement_over_the_sphere_is_that_of_many_points_in_it() {
        let a = Rigid::from_parameters([1.0, -0.5, 0.2, 0.02, -0.01, 0.03], [5.0, 0.0, 9.0]);
        let b = Rigid::from_parameters([-0.3, 0.1, 0.0, 0.0, 0.04, 0.01], [0.0; 3]);
        let centre = [3.0, -8.0, 12.0];
        let (mut squares, mut points) = (0.0, 0.0);
        let mut state = 9;
        while points < 20_000.0 {
            let off: [f64; 3] = std::array::from_fn(|_| {
                50.0 * (2.0 * f64::from(noise(&mut state) + noise(&mut state) / 256.0) - 1.0)
            });
            if Vector3::from(off).norm() > 50.0 {
                continue;
            }
            let place: [f64; 3] = std::array::from_fn(|axis| centre[axis] + off[axis]);
            let apart = Vector3::from(a.apply(place)) - Vector3::from(b.apply(place));
            squares += apart.norm_squared();
            points += 1.0;
        }
        let slowly = (squares / points).sqrt();
        let found = rms_displacement_mm(&a.matrix_lps(), &b.matrix_lps(), centre, 50.0);
        assert!(
            (found - slowly).abs() < 0.02 * slowly,
            "{found} and {slowly}"
        );
    }

    #[test]
    fn jump_of_the_signal_is_a_spike_and_is_not_learned_from() {
        let series = series(60, 200);
        let mut monitor = monitor();
        let mut quiet = monitor.clone();
        for (volume, values) in (0..).zip(series.rows()) {
            let plain = push(&mut quiet, volume, [0.0; 6], &values.to_owned());
            let mut values = values.to_owned();
            if volume == 30 {
                values += 60.0;
            }
            let quality = push(&mut monitor, volume, [0.0; 6], &values);
            // The way back is as long as the way there.
            assert_eq!(
                quality.mask.spike,
                volume == 30 || volume == 31,
                "volume {volume}"
            );
            if volume == 30 {
                assert!(quality.mask.dvars_standardised.unwrap() > 3.0);
            }
            if volume == 59 {
                let (with, without) = (quality.mask.tsnr.unwrap(), plain.mask.tsnr.unwrap());
                assert!((with / without - 1.0).abs() < 0.05, "{with} and {without}");
            }
        }
    }

    #[test]
    fn small_steps_add_up_to_drift_and_a_jump_does_not() {
        let values = Array1::from_elem(4, 100.0);
        let (mut slow, mut jump) = (monitor(), monitor());
        for volume in 0..40 {
            let far = 0.05 * f64::from(volume);
            let drifted = push(&mut slow, volume, [far, 0.0, 0.0, 0.0, 0.0, 0.0], &values);
            assert!((drifted.drift_mm - far).abs() < 1e-9);
            assert_eq!(drifted.drifting, far > 1.5, "volume {volume}");
            let far = if volume < 20 { 0.0 } else { 3.0 };
            let jumped = push(&mut jump, volume, [far, 0.0, 0.0, 0.0, 0.0, 0.0], &values);
            assert_eq!(jumped.motion_spike, volume == 20);
            assert!(!jumped.drifting, "volume {volume}");
        }
    }

    #[test]
    fn empty_sets_have_no_numbers_and_no_flags() {
        let mut monitor = monitor();
        for volume in 0..20 {
            let quality = push(&mut monitor, volume, [0.0; 6], &Array1::zeros(0));
            assert!(!quality.is_spike());
            assert_eq!((quality.mask.dvars, quality.mask.tsnr), (None, None));
        }
    }

    proptest! {
        #[test]
        fn dvars_is_the_root_mean_square_change(
            values in prop::collection::vec((0.0_f32..2000.0, 0.0_f32..2000.0), 1..40),
        ) {
            let mut monitor = monitor();
            let (a, b): (Vec<f32>, Vec<f32>) = values.into_iter().unzip();
            push(&mut monitor, 0, [0.0; 6], &Array1::from(a.clone()));
            let found = push(&mut monitor, 1, [0.0; 6], &Array1::from(b.clone()));
            let mut squares = 0.0;
            for (a, b) in a.iter().zip(&b) {
                squares += (f64::from(*b) - f64::from(*a)).powi(2);
            }
            let slowly = (squares / f64::from(u32::try_from(a.len()).unwrap())).sqrt();
            prop_assert!((found.head.dvars.unwrap() - slowly).abs() <= 1e-9 * slowly);
        }
    }
}
