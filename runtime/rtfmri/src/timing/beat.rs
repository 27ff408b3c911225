//! The scanner's beat: which pulses belong to its clock, and where that clock stands.
//!
//! 1. *Seek*: the longest chain of recent pulses that lie whole periods apart, still alive.
//! 2. *Follow*: each pulse is matched to the nearest beat; what lies off the beat is counted as spurious
//!    and moves nothing. Beats without a pulse are lost ones.
//! 3. *Fit*: a straight line through the last matched pulses, least squares over those within three
//!    robust standard deviations (Huber's rejection by the median absolute deviation), its slope drawn
//!    towards the nominal period while there are few of them.

use std::collections::VecDeque;

/// Pulses that are looked at when the beat is sought.
const RECENT: usize = 128;
/// Matched pulses that the line is fitted to.
const WINDOW: usize = 64;
/// Matched pulses whose own time is kept, for volumes that come late.
const KEPT: usize = 8192;
/// Beats in a row that may be lost while the beat is sought.
const MAX_GAP: f64 = 8.0;
/// Beats without a pulse after which a chain has died out.
const MAX_SILENCE: f64 = 3.5;
/// Pulses on one beat that make it certain.
const FIRM: usize = 4;
/// Distance from the beat at which a pulse still counts for it, share of the period.
const REACH: f64 = 0.06;
/// Pulses off the beat, none on it between them, after which the beat itself is doubted.
const DOUBT: u32 = 8;
/// How far the period may be from the nominal one before data say so, share of it.
const PERIOD_SPREAD: f64 = 1e-3;
/// Jitter that is assumed before it is known, milliseconds.
const ASSUMED_JITTER_MS: f64 = 2.0;
/// Intervals that the typical one is taken from.
const MIN_INTERVALS: usize = 6;

/// How sure the beat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// No pulses, or none that agree.
    None,
    /// A pulse or a few; one more may show that they were noise.
    Loose,
    /// Enough pulses agree.
    Firm,
}

/// A pulse and the beat it belongs to.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Matched {
    beat: i64,
    /// Its stamp.
    at_ms: f64,
    /// What is believed of the beat's time: the stamp, or the line's where the stamp is far from it.
    believed_ms: f64,
}

impl Matched {
    fn new(beat: i64, at_ms: f64) -> Matched {
        Matched {
            beat,
            at_ms,
            believed_ms: at_ms,
        }
    }
}

/// A straight line: `at_ms + slope_ms * (beat - centre)`.
#[derive(Clone, Copy, Debug)]
struct Line {
    centre: f64,
    at_ms: f64,
    slope_ms: f64,
}

/// What was heard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Pulses heard.
    pub(super) pulses: u64,
    /// Beats between heard ones without a pulse.
    pub(super) lost: u64,
    /// Pulses off the beat, or a second one on it.
    pub(super) spurious: u64,
}

/// The scanner's clock as far as the pulses tell.
#[derive(Clone, Debug)]
pub(super) struct Beat {
    period_ms: f64,
    recent: VecDeque<f64>,
    kept: VecDeque<Matched>,
    line: Line,
    spread_ms: f64,
    hold: Hold,
    /// Changes when beats are numbered anew.
    epoch: u32,
    off_in_a_row: u32,
    /// A beat near the beginning, for the drift over the whole run.
    anchor: Option<(f64, f64)>,
    counts: Counts,
}

impl Beat {
    pub(super) fn new(period_ms: f64) -> Beat {
        Beat {
            period_ms,
            recent: VecDeque::with_capacity(RECENT),
            kept: VecDeque::new(),
            line: Line {
                centre: 0.0,
                at_ms: 0.0,
                slope_ms: period_ms,
            },
            spread_ms: 0.0,
            hold: Hold::None,
            epoch: 0,
            off_in_a_row: 0,
            anchor: None,
            counts: Counts::default(),
        }
    }

    pub(super) fn hold(&self) -> Hold {
        self.hold
    }

    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Matched pulses at hand.
    pub(super) fn matched(&self) -> usize {
        self.kept.len()
    }

    /// The beat heard last.
    pub(super) fn last(&self) -> Option<i64> {
        self.kept.back().map(|matched| matched.beat)
    }

    /// Robust standard deviation of pulses about the beat, milliseconds.
    pub(super) fn spread_ms(&self) -> f64 {
        self.spread_ms
    }

    /// When a beat is, by the fitted line.
    pub(super) fn at(&self, beat: i64) -> f64 {
        self.line.at_ms + self.line.slope_ms * (whole(beat) - self.line.centre)
    }

    /// Beats, and a share of one, from beat 0 to a moment.
    pub(super) fn beats_until(&self, at_ms: f64) -> f64 {
        self.line.centre + (at_ms - self.line.at_ms) / self.line.slope_ms
    }

    /// When a beat was, and whether its own pulse says so.
    ///
    /// A beat between heard ones is put between them, whatever the clocks did since.
    pub(super) fn time_of(&self, beat: i64) -> (f64, bool) {
        match self.position(beat) {
            Ok(index) => {
                let matched = self.kept[index];
                (matched.believed_ms, matched.believed_ms == matched.at_ms)
            }
            Err(index) if index > 0 && index < self.kept.len() => {
                let (before, after) = (self.kept[index - 1], self.kept[index]);
                let share = whole(beat - before.beat) / whole(after.beat - before.beat);
                let between = share * (after.believed_ms - before.believed_ms);
                (before.believed_ms + between, false)
            }
            Err(_) => (self.at(beat), false),
        }
    }

    /// Whether a pulse came on a beat, however late its stamp.
    pub(super) fn was_heard(&self, beat: i64) -> bool {
        self.position(beat).is_ok()
    }

    fn position(&self, beat: i64) -> Result<usize, usize> {
        self.kept
            .binary_search_by_key(&beat, |matched| matched.beat)
    }

    /// The period's difference from the nominal one over the whole run, parts per million; `None` until
    /// pulses span enough of it.
    pub(super) fn drift_ppm(&self, min_beats: f64) -> Option<f64> {
        let (beat, at_ms) = self.anchor?;
        let beats = self.line.centre - beat;
        (beats >= min_beats)
            .then(|| ((self.line.at_ms - at_ms) / beats / self.period_ms - 1.0) * 1e6)
    }

    /// The typical time between pulses, milliseconds: the median, which neither lost nor spurious pulses
    /// move while they are few.
    pub(super) fn interval_ms(&self) -> Option<f64> {
        let mut intervals: Vec<f64> = self
            .recent
            .iter()
            .zip(self.recent.iter().skip(1))
            .map(|(a, b)| b - a)
            .collect();
        (intervals.len() >= MIN_INTERVALS).then(|| median(&mut intervals))
    }

    /// Takes what was heard before, and looks for the beat in it once.
    ///
    /// What came before the last silence belongs to another run.
    pub(super) fn remember(&mut self, pulses: impl IntoIterator<Item = f64>) {
        for at_ms in pulses {
            if let Some(&last) = self.recent.back()
                && at_ms - last > MAX_SILENCE * self.period_ms
            {
                self.recent.clear();
            }
            self.note(at_ms);
        }
        self.counts.pulses = self.recent.len() as u64;
        self.seek();
    }

    /// Takes a pulse; moments must not go backwards.
    pub(super) fn pulse(&mut self, at_ms: f64) {
        if !self.note(at_ms) {
            return;
        }
        if self.hold == Hold::Firm {
            self.follow(at_ms);
        } else {
            self.seek();
        }
    }

    /// Keeps a pulse among the recent ones; `false` where it cannot be one.
    fn note(&mut self, at_ms: f64) -> bool {
        if !at_ms.is_finite() || self.recent.back().is_some_and(|&last| at_ms < last) {
            return false;
        }
        self.counts.pulses += 1;
        push_bounded(&mut self.recent, at_ms, RECENT);
        true
    }

    /// Seeks the beat anew where pulses have left it for good; beats go on being numbered by the old one.
    ///
    /// Returns by how much the beat jumped, milliseconds.
    pub(super) fn seek_again(&mut self) -> Option<f64> {
        if self.hold != Hold::Firm || self.off_in_a_row < DOUBT {
            return None;
        }
        let chain = self.longest_chain();
        let first = *chain.first()?;
        let beat = self.beats_until(first).round();
        let jump_ms = first - (self.line.at_ms + self.line.slope_ms * (beat - self.line.centre));
        if chain.len() < FIRM || self.others(&chain) * 2 >= chain.len() {
            return None;
        }
        self.adopt(&chain, to_beat(beat));
        self.anchor = None;
        Some(jump_ms)
    }

    /// A pulse while the beat is certain.
    fn follow(&mut self, at_ms: f64) {
        let beat = to_beat(self.beats_until(at_ms).round());
        let off_ms = (at_ms - self.at(beat)).abs();
        if off_ms > REACH * self.period_ms {
            self.counts.spurious += 1;
            self.off_in_a_row += 1;
            return;
        }
        match self.kept.back().copied() {
            Some(last) if beat == last.beat => {
                // Two pulses on one beat: the nearer one is the scanner's.
                self.counts.spurious += 1;
                if off_ms < (last.at_ms - self.at(beat)).abs() {
                    self.kept.pop_back();
                    self.kept.push_back(Matched::new(beat, at_ms));
                }
            }
            Some(last) if beat < last.beat => self.counts.spurious += 1,
            last => {
                let skipped = last.map_or(0, |last| beat - last.beat - 1);
                self.counts.lost += skipped.unsigned_abs();
                push_bounded(&mut self.kept, Matched::new(beat, at_ms), KEPT);
                self.off_in_a_row = 0;
            }
        }
        self.fit();
        self.believe(1);
    }

    /// Looks for a beat among the recent pulses.
    fn seek(&mut self) {
        let chain = self.longest_chain();
        let others = self.others(&chain);
        let believed = match chain.len() {
            0 => false,
            // Alone, it may be the only pulse of the run.
            1 => others == 0,
            found => found > 2 * others,
        };
        if !believed {
            self.hold = Hold::None;
            return;
        }
        let known = self.kept.front().map(|matched| matched.at_ms);
        if known != chain.first().copied() {
            self.epoch += 1;
        }
        self.adopt(&chain, 0);
    }

    /// Makes a chain of pulses the beat; `first` is the number of its first one.
    fn adopt(&mut self, chain: &[f64], first: i64) {
        self.kept.clear();
        let mut beat = first;
        let mut last = None;
        for &at_ms in chain {
            if let Some(last) = last {
                let step: f64 = (at_ms - last) / self.period_ms;
                beat += to_beat(step.round());
            }
            last = Some(at_ms);
            self.kept.push_back(Matched::new(beat, at_ms));
        }
        self.line.slope_ms = self.period_ms;
        self.off_in_a_row = 0;
        self.hold = if chain.len() >= FIRM {
            let spanned = beat - first + 1;
            self.counts.lost += spanned.unsigned_abs().saturating_sub(chain.len() as u64);
            self.counts.spurious += self.others(chain) as u64;
            Hold::Firm
        } else {
            Hold::Loose
        };
        // Once for the slope, once for the spread about it.
        self.fit();
        self.fit();
        self.believe(chain.len());
    }

    /// Compares the last matched pulses with the line.
    fn believe(&mut self, count: usize) {
        let (line, tight_ms) = (self.line, self.tight_ms());
        for matched in self.kept.iter_mut().rev().take(count) {
            let expected = line.at_ms + line.slope_ms * (whole(matched.beat) - line.centre);
            let near = (matched.at_ms - expected).abs() <= tight_ms;
            matched.believed_ms = if near { matched.at_ms } else { expected };
        }
    }

    /// Recent pulses from about a chain's beginning on that are not in it.
    fn others(&self, chain: &[f64]) -> usize {
        let Some(&first) = chain.first() else {
            return self.recent.len();
        };
        let since = self
            .recent
            .iter()
            .filter(|&&at_ms| at_ms > first - self.period_ms)
            .count();
        since - chain.len()
    }

    /// The longest chain of recent pulses that lie whole periods apart and that has not died out; of
    /// equals the one that began first.
    fn longest_chain(&self) -> Vec<f64> {
        let Some(&now) = self.recent.back() else {
            return Vec::new();
        };
        let tolerance_ms = 3.0_f64.min(0.2 * self.period_ms) + 0.015 * self.period_ms;
        let mut best: Vec<f64> = Vec::new();
        for (index, &from) in self.recent.iter().enumerate() {
            let mut chain = vec![from];
            let mut last = from;
            for &at_ms in self.recent.iter().skip(index + 1) {
                let beats = ((at_ms - last) / self.period_ms).round();
                if beats > MAX_GAP {
                    break;
                }
                let off_ms = (at_ms - last - beats * self.period_ms).abs();
                if beats >= 1.0 && off_ms <= tolerance_ms {
                    chain.push(at_ms);
                    last = at_ms;
                }
            }
            let alive = now - last <= MAX_SILENCE * self.period_ms;
            if alive && chain.len() > best.len() {
                best = chain;
            }
        }
        best
    }

    /// Beyond this a pulse's own time is not believed.
    fn tight_ms(&self) -> f64 {
        (1.0 + 5.0 * self.spread_ms).min(REACH * self.period_ms)
    }

    /// Fits the line to the last matched pulses.
    fn fit(&mut self) {
        let window: Vec<Matched> = self.kept.iter().rev().take(WINDOW).copied().collect();
        let Some(&newest) = window.first() else {
            return;
        };
        // Relative to the newest pulse: milliseconds since boot have no digits to spare.
        let relative: Vec<(f64, f64)> = window
            .iter()
            .map(|matched| {
                let beats = whole(matched.beat - newest.beat);
                let expected = newest.at_ms + beats * self.line.slope_ms;
                (beats, matched.at_ms - expected)
            })
            .collect();
        let mut sorted: Vec<f64> = relative.iter().map(|&(_, off)| off).collect();
        let middle = median(&mut sorted);
        let mut deviations: Vec<f64> = relative
            .iter()
            .map(|&(_, off)| (off - middle).abs())
            .collect();
        self.spread_ms = 1.4826 * median(&mut deviations);
        let limit = 3.0 * self.spread_ms + 0.2;
        let inliers: Vec<(f64, f64)> = relative
            .into_iter()
            .filter(|&(_, off)| (off - middle).abs() <= limit)
            .collect();
        let count = inliers.len() as f64;
        let mean = |pick: fn(&(f64, f64)) -> f64| inliers.iter().map(pick).sum::<f64>() / count;
        let (centre, offset) = (mean(|point| point.0), mean(|point| point.1));
        let (mut across, mut along) = (0.0, 0.0);
        for &(beats, off) in &inliers {
            across += (beats - centre) * (beats - centre);
            along += (beats - centre) * (off - offset);
        }
        let slope = self.line.slope_ms;
        // The nominal period is one more observation.
        let prior = (ASSUMED_JITTER_MS / (PERIOD_SPREAD * self.period_ms)).powi(2);
        along += prior * (self.period_ms - slope);
        self.line = Line {
            centre: whole(newest.beat) + centre,
            at_ms: newest.at_ms + centre * slope + offset,
            slope_ms: slope + along / (across + prior),
        };
        if self.hold == Hold::Firm && self.anchor.is_none() && self.kept.len() >= WINDOW / 2 {
            self.anchor = Some((self.line.centre, self.line.at_ms));
        }
    }
}

fn push_bounded<T>(queue: &mut VecDeque<T>, value: T, most: usize) {
    if queue.len() >= most {
        queue.pop_front();
    }
    queue.push_back(value);
}

/// The median; of an even number the mean of the middle two. `values` must not be empty.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len().is_multiple_of(2) {
        f64::midpoint(values[half - 1], values[half])
    } else {
        values[half]
    }
}

/// Numbers of beats are far below 2^53.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
pub(super) fn whole(beat: i64) -> f64 {
    beat as f64
}

/// A whole number of beats.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a whole number; saturates for moments beyond any run"
)]
pub(super) fn to_beat(beats: f64) -> i64 {
    // Kept where sums of beats cannot overflow.
    beats.clamp(-1e15, 1e15) as i64
}
