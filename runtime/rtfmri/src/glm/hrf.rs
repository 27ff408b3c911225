//! The haemodynamic response, and a stimulus seen through it.
//!
//! The response is a difference of two gamma densities, with the parameters of Glover
//! (1999) or of SPM. Numbers follow nilearn 0.14: sampled at `TR / 50` over 32 s, summing
//! to one; stimuli are laid on a grid of the same step that begins 24 s before the first
//! volume, convolved, and read off at the frame times by linear interpolation.
//!
//! A stimulus is a box, so its convolution is a difference of two values of the response's
//! running sum. That makes the cost one look-up per stimulus edge and frame, and the fine
//! grid is never stored.

use super::floor_index;

/// Grid points per TR.
pub(super) const OVERSAMPLING: u32 = 50;
/// Start of the stimulus grid, seconds from the first volume.
const MIN_ONSET_S: f64 = -24.0;
/// Length of the response, seconds.
const LENGTH_S: f64 = 32.0;

/// Shape of the haemodynamic response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hrf {
    /// Glover (1999).
    Glover,
    /// SPM's canonical response.
    Spm,
}

struct Gammas {
    peak: f64,
    undershoot: f64,
    dispersion: f64,
    ratio: f64,
}

impl Hrf {
    fn gammas(self) -> Gammas {
        match self {
            Self::Glover => Gammas {
                peak: 6.0,
                undershoot: 12.0,
                dispersion: 0.9,
                ratio: 0.48,
            },
            Self::Spm => Gammas {
                peak: 6.0,
                undershoot: 16.0,
                dispersion: 1.0,
                ratio: 0.167,
            },
        }
    }

    /// Samples the response at `tr_s / oversampling` seconds; the samples sum to one.
    ///
    /// Both arguments must be positive; the result is empty where 32 s hold no sample.
    #[must_use]
    pub fn sample(self, tr_s: f64, oversampling: u32) -> Vec<f64> {
        let gammas = self.gammas();
        let dt = tr_s / f64::from(oversampling);
        let count = floor_index((LENGTH_S / dt).round_ties_even());
        // nilearn spreads the samples over 0..=32 s, so they lie a little wider than dt.
        let step = LENGTH_S / (count.saturating_sub(1)) as f64;
        let density = |t: f64, shape: f64| {
            gamma_density(t - dt, shape / gammas.dispersion, gammas.dispersion)
        };
        let mut samples: Vec<f64> = (0..count)
            .map(|i| {
                let t = i as f64 * step;
                density(t, gammas.peak) - gammas.ratio * density(t, gammas.undershoot)
            })
            .collect();
        let sum: f64 = samples.iter().sum();
        for sample in &mut samples {
            *sample /= sum;
        }
        samples
    }
}

/// Boxes convolved with a response, read at frame times `0, tr_s, 2 tr_s, ...`.
pub(super) struct Convolution {
    /// Running sum of the response, then its total for ever.
    running_sum: Vec<f64>,
    grid: Grid,
    tr_s: f64,
}

impl Convolution {
    /// For a run of `volumes` frames, at least 2.
    pub(super) fn new(hrf: Hrf, tr_s: f64, volumes: usize) -> Self {
        let mut total = 0.0;
        let running_sum = hrf
            .sample(tr_s, OVERSAMPLING)
            .into_iter()
            .map(|sample| {
                total += sample;
                total
            })
            .collect();
        Self {
            running_sum,
            grid: Grid::new(tr_s, volumes),
            tr_s,
        }
    }

    /// The regressor of `stimuli` (onset and duration, seconds) at `frames`.
    pub(super) fn regressor(&self, stimuli: &[(f64, f64)], frames: &[usize]) -> Vec<f64> {
        let last = self.grid.count - 1;
        let edges: Vec<(usize, usize)> = stimuli
            .iter()
            .map(|&(onset_s, duration_s)| {
                let start = self.grid.search(onset_s).min(last);
                let end = self.grid.search(onset_s + duration_s).min(last);
                // An impulse lasts one grid step.
                let end = if end == start && end < last {
                    end + 1
                } else {
                    end
                };
                (start, end)
            })
            .collect();
        let at_grid = |i: usize| -> f64 {
            edges
                .iter()
                .map(|&(start, end)| self.step_response(i, start) - self.step_response(i, end))
                .sum()
        };
        frames
            .iter()
            .map(|&frame| {
                let time_s = frame as f64 * self.tr_s;
                let high = self.grid.search(time_s).clamp(1, last);
                let (t0, t1) = (self.grid.time(high - 1), self.grid.time(high));
                let (y0, y1) = (at_grid(high - 1), at_grid(high));
                (y1 - y0) / (t1 - t0) * (time_s - t0) + y0
            })
            .collect()
    }

    /// Response at grid point `i` to a step up at grid point `start`.
    fn step_response(&self, i: usize, start: usize) -> f64 {
        if i < start {
            return 0.0;
        }
        let end = self.running_sum.len().saturating_sub(1);
        self.running_sum
            .get((i - start).min(end))
            .copied()
            .unwrap_or(0.0)
    }
}

/// nilearn's fine time grid, computed where it is asked for.
struct Grid {
    start: f64,
    stop: f64,
    step: f64,
    count: usize,
}

impl Grid {
    fn new(tr_s: f64, volumes: usize) -> Self {
        // The order of operations is nilearn's: an onset on the grid must fall to the same
        // side of the same rounding error.
        let frames = (volumes - 1) as f64;
        let last_s = frames * tr_s;
        let start = MIN_ONSET_S;
        let stop = last_s * (1.0 + 1.0 / frames);
        let count = frames / last_s * (stop - 0.0 - MIN_ONSET_S) * f64::from(OVERSAMPLING) + 1.0;
        let count = floor_index(count.round_ties_even()).max(2);
        Self {
            start,
            stop,
            step: (stop - start) / (count - 1) as f64,
            count,
        }
    }

    fn time(&self, i: usize) -> f64 {
        if i + 1 == self.count {
            self.stop
        } else {
            i as f64 * self.step + self.start
        }
    }

    /// The first grid point at or after `time_s`, `count` if there is none.
    fn search(&self, time_s: f64) -> usize {
        let guess = ((time_s - self.start) / self.step).floor();
        let mut i = floor_index(guess).min(self.count);
        while i > 0 && self.time(i - 1) >= time_s {
            i -= 1;
        }
        while i < self.count && self.time(i) < time_s {
            i += 1;
        }
        i
    }
}

/// Density of the gamma distribution with `shape` and `scale` at `x`.
fn gamma_density(x: f64, shape: f64, scale: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    let x = x / scale;
    ((shape - 1.0) * x.ln() - x - ln_gamma(shape)).exp() / scale
}

/// Logarithm of the gamma function for `x >= 0.5` (Lanczos 1964, g = 7, nine terms).
fn ln_gamma(x: f64) -> f64 {
    const G: f64 = 7.0;
    const FIRST: f64 = 0.999_999_999_999_809_9;
    const TERMS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    let x = x - 1.0;
    let series = TERMS
        .iter()
        .zip(1_u32..)
        .fold(FIRST, |sum, (term, i)| sum + term / (x + f64::from(i)));
    let t = x + G + 0.5;
    0.5 * std::f64::consts::TAU.ln() + (x + 0.5) * t.ln() - t + series.ln()
}

#[cfg(test)]
mod tests {
    use super::{Convolution, Grid, Hrf, ln_gamma};

    #[test]
    fn ln_gamma_equals_factorials_and_a_half_integer() {
        let mut factorial = 1.0_f64;
        for n in 1_u32..20 {
            assert!(
                (ln_gamma(f64::from(n)) - factorial.ln()).abs() < 1e-13,
                "{n}"
            );
            factorial *= f64::from(n);
        }
        let half = std::f64::consts::PI.sqrt() / 2.0;
        assert!((ln_gamma(1.5) - half.ln()).abs() < 1e-14);
    }

    #[test]
    fn grid_search_equals_a_search_through_the_stored_grid() {
        let grid = Grid::new(1.5, 20);
        let times: Vec<f64> = (0..grid.count).map(|i| grid.time(i)).collect();
        for i in -900..1500 {
            let time_s = f64::from(i) * 0.03 + f64::from(i % 3) * 1e-9;
            assert_eq!(grid.search(time_s), times.partition_point(|&t| t < time_s));
        }
    }

    #[test]
    fn regressor_equals_a_plain_convolution() {
        let (tr_s, volumes) = (1.3, 40);
        let stimuli = [
            (-30.0, 2.0),
            (3.21, 0.0),
            (7.0, 3.0),
            (8.0, 3.0),
            (51.0, 9.0),
        ];
        let grid = Grid::new(tr_s, volumes);
        let times: Vec<f64> = (0..grid.count).map(|i| grid.time(i)).collect();
        let mut boxes = vec![0.0; grid.count];
        for (onset_s, duration_s) in stimuli {
            let find = |s: f64| times.partition_point(|&t| t < s).min(grid.count - 1);
            let (start, mut end) = (find(onset_s), find(onset_s + duration_s));
            if start == end && end < grid.count - 1 {
                end += 1;
            }
            boxes[start..end].iter_mut().for_each(|b| *b += 1.0);
        }
        let response = Hrf::Glover.sample(tr_s, super::OVERSAMPLING);
        let slow = |i: usize| -> f64 {
            let reach = response.len().min(i + 1);
            (0..reach).map(|j| response[j] * boxes[i - j]).sum()
        };
        let frames: Vec<usize> = (0..volumes).collect();
        let fast = Convolution::new(Hrf::Glover, tr_s, volumes).regressor(&stimuli, &frames);
        for (&frame, &value) in frames.iter().zip(&fast) {
            let time_s = frame as f64 * tr_s;
            let high = times.partition_point(|&t| t < time_s).max(1);
            let part = (time_s - times[high - 1]) / (times[high] - times[high - 1]);
            let expected = slow(high - 1) * (1.0 - part) + slow(high) * part;
            assert!((value - expected).abs() < 1e-12, "frame {frame}");
        }
    }
}
