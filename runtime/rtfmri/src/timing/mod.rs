//! When each volume began, on the box's clock: pulses and volumes meet by time, not by order.
//!
//! 1. The pulses give the scanner's clock (`beat`): lost ones leave gaps in it, spurious ones lie off it.
//! 2. Arrivals say which beat a volume can have begun on at the latest, since no volume arrives before
//!    it was acquired. That settles how many pulses went to volumes the scanner discards.
//! 3. From then on volume `n` begins `n` repetition times later, counted in beats, whatever is lost.
//!
//! Without usable pulses the header's times give the distances between volumes, and the quickest arrivals
//! the moment; without header times, the repetition time and the quickest arrivals do. Such times are late
//! by what the quickest export takes.
//!
//! Nothing here reads a clock: moments are milliseconds on the box's monotonic clock, as the caller
//! stamped them.

mod beat;
mod fault;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use self::beat::{Beat, Hold};
pub use self::fault::TimingFault;

/// Milliseconds of a day; header times begin anew at midnight.
const DAY_MS: f64 = 86_400_000.0;
/// An export may be as slow as this before pulses at the beginning are taken for discarded volumes'.
const EXPORT_LAG_MS: f64 = 2000.0;
/// Longest time that a scanner discards volumes for.
const MAX_DUMMIES_MS: f64 = 16_000.0;
/// A file's time of change may be older than its arrival by a tick of the system's clock.
const CLOCK_TICK_MS: f64 = 20.0;
/// Arrivals that decide about the first volume, and about the quickest export.
const ARRIVALS: usize = 64;
/// Volumes in a row without a pulse after which the line is said to be silent, and no longer each pulse.
const SILENT_VOLUMES: u32 = 4;
/// Drift that is worth a word, parts per million, and beats that it is measured over.
const DRIFT_PPM: f64 = 50.0;
const DRIFT_BEATS: f64 = 128.0;
/// Difference from the expected interval at which pulses are not those of this run.
const INTERVAL_SHARE: f64 = 0.02;
/// Headers in a row that disagree with those before until they are followed: the scanner's clock was set.
const HEADERS_TO_FOLLOW: u32 = 4;
/// Most pulses per volume: one per slice.
const MAX_PULSES_PER_VOLUME: u32 = 512;

/// What is known before the first volume.
#[derive(Clone, Debug, PartialEq)]
pub struct TimingSettings {
    /// Repetition time, milliseconds.
    pub tr_ms: f64,
    /// From a volume's start to the end of its last slice, milliseconds; the repetition time where the
    /// scanner does not pause between volumes.
    pub acquisition_ms: f64,
    /// Pulses per volume: 1, or the excitations of a volume where each sends one.
    pub pulses_per_volume: u32,
    /// Volumes at the beginning that the scanner discards, but sends pulses for; found from the arrivals
    /// where it is not given.
    pub dummy_volumes: Option<u32>,
    /// There is a trigger line, so that its silence is a fault.
    pub line: bool,
    /// A volume whose start is known already, on the same clock: frame and milliseconds. For a run that
    /// is taken up again.
    pub known: Option<(u32, f64)>,
}

impl TimingSettings {
    /// One pulse per volume, acquisition without pauses, nothing else known.
    #[must_use]
    pub fn new(tr_ms: f64) -> TimingSettings {
        TimingSettings {
            tr_ms,
            acquisition_ms: tr_ms,
            pulses_per_volume: 1,
            dummy_volumes: None,
            line: true,
            known: None,
        }
    }

    /// With the acquisition's length as the slices' times tell it: up to the last slice's start, and as
    /// long again as slices are apart.
    ///
    /// - `slice_times_ms`: from the volume's start, `[slice]`, milliseconds.
    #[must_use]
    pub fn with_slice_times(mut self, slice_times_ms: &[f64]) -> TimingSettings {
        let mut times: Vec<f64> = slice_times_ms.to_vec();
        times.sort_unstable_by(f64::total_cmp);
        times.dedup();
        if let (Some(&last), Some(&before)) = (times.last(), times.iter().rev().nth(1))
            && last.is_finite()
            && before.is_finite()
        {
            self.acquisition_ms = (last + (last - before)).min(self.tr_ms);
        }
        self
    }
}

/// A volume as it arrived.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// Number in the run, from 0.
    pub frame: u32,
    /// When it arrived, milliseconds on the box's clock.
    pub arrived_ms: f64,
    /// When its acquisition began by its header, milliseconds since midnight on the scanner's clock.
    pub header_ms: Option<f64>,
}

/// How a start is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Its own pulse was heard.
    Pulse,
    /// Its pulse was lost or came late; the scanner's clock, from the other pulses, bridges it.
    Bridged,
    /// From header times; later than the truth by what the quickest export takes.
    Header,
    /// From arrivals alone; later than the truth by what the quickest export takes.
    Arrival,
}

/// When a volume began.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VolumeTime {
    /// Number in the run, from 0.
    pub frame: u32,
    /// Its start, milliseconds on the box's clock.
    pub start_ms: f64,
    /// How it is known.
    pub how: How,
}

/// The state of a run's timing, for the operator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimingSummary {
    /// Pulses heard.
    pub pulses: u64,
    /// Pulses lost between heard ones.
    pub lost: u64,
    /// Pulses off the scanner's clock.
    pub spurious: u64,
    /// Discarded volumes that had pulses; negative where the first pulses were not heard.
    pub dummy_volumes: Option<i64>,
    /// The scanner's clock against the box's, parts per million.
    pub drift_ppm: Option<f64>,
    /// Robust standard deviation of the pulses about the scanner's clock, milliseconds.
    pub jitter_ms: Option<f64>,
}

/// What has been said once.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    basis: bool,
    interval: bool,
    drift: bool,
    late_export: bool,
    headers: bool,
    single: bool,
}

/// One run's clock.
#[derive(Clone, Debug)]
pub struct Timeline {
    settings: TimingSettings,
    beat: Beat,
    /// Beat of frame 0, and the numbering of beats that it belongs to.
    first: Option<(u32, i64)>,
    arrivals: VecDeque<Arrival>,
    headers: Option<Headers>,
    silent: u32,
    spurious_said: u64,
    said: Said,
}

/// Header times as a line that midnight does not break.
#[derive(Clone, Copy, Debug)]
struct Headers {
    frame: u32,
    at_ms: f64,
    /// Of the last believed header from `frame` on at the nominal repetition time, milliseconds.
    off_ms: f64,
    disbelieved: u32,
}

impl Timeline {
    /// Begins a run with what the line said lately: the pulses of its first volumes are among it.
    ///
    /// - `recent`: stamps before now, ascending, milliseconds on the box's clock.
    #[must_use]
    pub fn begin(settings: TimingSettings, recent: impl IntoIterator<Item = f64>) -> Timeline {
        let tr_ms = settings.tr_ms.max(1.0);
        let pulses = settings.pulses_per_volume.clamp(1, MAX_PULSES_PER_VOLUME);
        let settings = TimingSettings {
            tr_ms,
            acquisition_ms: settings.acquisition_ms.clamp(0.0, tr_ms),
            pulses_per_volume: pulses,
            ..settings
        };
        let mut beat = Beat::new(tr_ms / f64::from(pulses));
        beat.remember(recent);
        Timeline {
            settings,
            beat,
            first: None,
            arrivals: VecDeque::with_capacity(ARRIVALS),
            headers: None,
            silent: 0,
            spurious_said: 0,
            said: Said::default(),
        }
    }

    /// Takes a pulse.
    ///
    /// - `at_ms`: its stamp, milliseconds on the box's clock; not before the last one's.
    pub fn pulse(&mut self, at_ms: f64) {
        self.beat.pulse(at_ms);
    }

    /// Takes a volume and says when it began, as far as is known now; faults go to `faults`.
    pub fn volume(&mut self, arrival: Arrival, faults: &mut Vec<TimingFault>) -> VolumeTime {
        self.note(arrival, faults);
        self.check_interval(faults);
        self.settle_first(arrival, faults);
        let time = self.time_of(arrival.frame, arrival);
        self.report(&time, faults);
        time
    }

    /// When a volume began, by what is known now; `None` before any volume has arrived.
    #[must_use]
    pub fn start_of(&self, frame: u32) -> Option<VolumeTime> {
        let last = *self.arrivals.back()?;
        let wanted = Arrival {
            frame,
            ..self
                .arrivals
                .iter()
                .find(|arrival| arrival.frame == frame)
                .copied()
                .unwrap_or(Arrival {
                    header_ms: None,
                    ..last
                })
        };
        Some(self.time_of(frame, wanted))
    }

    /// Counts and drift so far.
    #[must_use]
    pub fn summary(&self) -> TimingSummary {
        let counts = self.beat.counts();
        TimingSummary {
            pulses: counts.pulses,
            lost: counts.lost,
            spurious: counts.spurious,
            dummy_volumes: self
                .first_beat()
                .map(|first| first.div_euclid(self.pulses_per_volume())),
            drift_ppm: self.beat.drift_ppm(DRIFT_BEATS),
            jitter_ms: (self.beat.hold() == Hold::Firm).then(|| self.beat.spread_ms()),
        }
    }

    fn pulses_per_volume(&self) -> i64 {
        i64::from(self.settings.pulses_per_volume)
    }

    /// The beat of frame 0, in the numbering of now.
    fn first_beat(&self) -> Option<i64> {
        match self.first {
            Some((epoch, first)) if epoch == self.beat.epoch() => {
                (self.beat.hold() != Hold::None).then_some(first)
            }
            _ => None,
        }
    }

    fn beat_of(&self, first: i64, frame: u32) -> i64 {
        first + i64::from(frame) * self.pulses_per_volume()
    }

    fn time_of(&self, frame: u32, arrival: Arrival) -> VolumeTime {
        if let Some(first) = self.first_beat() {
            let beat = self.beat_of(first, frame);
            let (start_ms, own) = self.beat.time_of(beat);
            let how = if own { How::Pulse } else { How::Bridged };
            return VolumeTime {
                frame,
                start_ms,
                how,
            };
        }
        let header = arrival
            .header_ms
            .and_then(|header_ms| self.along_header(frame, header_ms));
        let (along, how) = match header {
            Some(along) => (along, How::Header),
            None => (f64::from(frame) * self.settings.tr_ms, How::Arrival),
        };
        let lag = self
            .arrivals
            .iter()
            .filter_map(|known| {
                let known_along = match how {
                    How::Header => self.along_header(known.frame, known.header_ms?)?,
                    _ => f64::from(known.frame) * self.settings.tr_ms,
                };
                Some(known.arrived_ms - known_along)
            })
            .fold(f64::INFINITY, f64::min);
        let lag = if lag.is_finite() {
            lag
        } else {
            arrival.arrived_ms - along
        };
        VolumeTime {
            frame,
            start_ms: along + lag - self.settings.acquisition_ms,
            how,
        }
    }

    /// Milliseconds from frame 0 to a frame by its header; `None` for a header that is not believed.
    fn along_header(&self, frame: u32, header_ms: f64) -> Option<f64> {
        let headers = self.headers?;
        let off_ms = off_nominal(&headers, frame, header_ms, self.settings.tr_ms);
        ((off_ms - headers.off_ms).abs() <= 0.5 * self.settings.tr_ms)
            .then(|| f64::from(frame) * self.settings.tr_ms + off_ms)
    }

    /// Keeps what an arrival says.
    fn note(&mut self, arrival: Arrival, faults: &mut Vec<TimingFault>) {
        let tr_ms = self.settings.tr_ms;
        if let Some(header_ms) = arrival.header_ms.filter(|header| header.is_finite()) {
            let fresh = Headers {
                frame: arrival.frame,
                at_ms: header_ms,
                off_ms: 0.0,
                disbelieved: 0,
            };
            let headers = self.headers.get_or_insert(fresh);
            let off_ms = off_nominal(headers, arrival.frame, header_ms, tr_ms);
            let believed_ms = headers.off_ms;
            if (off_ms - believed_ms).abs() <= 0.5 * tr_ms {
                headers.off_ms = off_ms;
                headers.disbelieved = 0;
            } else {
                headers.disbelieved += 1;
                if headers.disbelieved >= HEADERS_TO_FOLLOW {
                    headers.off_ms = off_ms;
                    headers.disbelieved = 0;
                }
                if !std::mem::replace(&mut self.said.headers, true) {
                    faults.push(TimingFault::HeaderTime {
                        frame: arrival.frame,
                        off_ms: off_ms - believed_ms,
                    });
                }
            }
        }
        if self.arrivals.len() >= ARRIVALS {
            self.arrivals.pop_front();
        }
        self.arrivals.push_back(arrival);
    }

    /// Compares the time between pulses with what this run should have.
    fn check_interval(&mut self, faults: &mut Vec<TimingFault>) {
        let Some(found_ms) = self.beat.interval_ms() else {
            return;
        };
        let expected_ms = self.settings.tr_ms / f64::from(self.settings.pulses_per_volume);
        let ratio = expected_ms / found_ms;
        if (ratio - 1.0).abs() <= INTERVAL_SHARE || std::mem::replace(&mut self.said.interval, true)
        {
            return;
        }
        let per_volume = self.settings.tr_ms / found_ms;
        let whole = per_volume.round();
        let is_whole = (per_volume / whole - 1.0).abs() <= INTERVAL_SHARE;
        faults.push(
            if is_whole && (2.0..=f64::from(MAX_PULSES_PER_VOLUME)).contains(&whole) {
                TimingFault::PulsesPerVolume {
                    expected: self.settings.pulses_per_volume,
                    found: per_volume,
                }
            } else {
                TimingFault::Interval {
                    expected_ms,
                    found_ms,
                }
            },
        );
    }

    /// Finds the beat that frame 0 began on, and takes it back where an arrival proves it wrong.
    fn settle_first(&mut self, arrival: Arrival, faults: &mut Vec<TimingFault>) {
        self.follow_a_jump(arrival, faults);
        if self.beat.hold() == Hold::None {
            return;
        }
        let latest = self.latest_first();
        match self.first_beat() {
            Some(first) if first <= latest => {}
            None => {
                let first = self.infer_first(latest, faults);
                self.first = Some((self.beat.epoch(), first));
            }
            Some(_) => {
                let first = latest.div_euclid(self.pulses_per_volume()) * self.pulses_per_volume();
                self.first = Some((self.beat.epoch(), first));
                faults.push(TimingFault::FirstPulseMoved {
                    frame: arrival.frame,
                });
            }
        }
    }

    /// The last beat that frame 0 can have begun on: every volume was acquired before it arrived.
    fn latest_first(&self) -> i64 {
        let slack_ms = CLOCK_TICK_MS + INTERVAL_SHARE * self.settings.tr_ms;
        self.arrivals
            .iter()
            .map(|arrival| {
                let started_by = arrival.arrived_ms - self.settings.acquisition_ms + slack_ms;
                beat::to_beat(self.beat.beats_until(started_by).floor())
                    - i64::from(arrival.frame) * self.pulses_per_volume()
            })
            .min()
            .unwrap_or(0)
    }

    fn infer_first(&mut self, latest: i64, faults: &mut Vec<TimingFault>) -> i64 {
        let pulses = self.pulses_per_volume();
        if let Some((frame, start_ms)) = self.settings.known {
            let beat = beat::to_beat(self.beat.beats_until(start_ms).round());
            return beat - i64::from(frame) * pulses;
        }
        let volumes = latest.div_euclid(pulses);
        if let Some(dummies) = self.settings.dummy_volumes {
            return i64::from(dummies).min(volumes) * pulses;
        }
        if volumes <= 0 {
            // The first pulses were not heard.
            return volumes * pulses;
        }
        let lag_ms = self
            .arrivals
            .iter()
            .map(|arrival| {
                let beat = i64::from(arrival.frame) * pulses;
                arrival.arrived_ms - self.settings.acquisition_ms - self.beat.at(beat)
            })
            .fold(f64::INFINITY, f64::min);
        let dummies_ms = beat::whole(volumes) * self.settings.tr_ms;
        if lag_ms <= EXPORT_LAG_MS {
            0
        } else if dummies_ms <= MAX_DUMMIES_MS {
            faults.push(TimingFault::Dummies { volumes });
            volumes * pulses
        } else {
            if !std::mem::replace(&mut self.said.late_export, true) {
                faults.push(TimingFault::LateExport { lag_ms });
            }
            0
        }
    }

    /// Takes up a new beat where the old one has ended and this volume is not of its time.
    fn follow_a_jump(&mut self, arrival: Arrival, faults: &mut Vec<TimingFault>) {
        let Some(first) = self.first_beat() else {
            return;
        };
        let beat = self.beat_of(first, arrival.frame);
        let unexplained = self
            .beat
            .last()
            .is_some_and(|last| beat > last + i64::from(SILENT_VOLUMES) * self.pulses_per_volume());
        if unexplained && let Some(jump_ms) = self.beat.seek_again() {
            faults.push(TimingFault::Jumped {
                frame: arrival.frame,
                jump_ms,
            });
        }
    }

    /// Says what this volume and the pulses since the last one show.
    fn report(&mut self, time: &VolumeTime, faults: &mut Vec<TimingFault>) {
        match time.how {
            How::Header | How::Arrival => {
                if !std::mem::replace(&mut self.said.basis, true) {
                    faults.push(TimingFault::WithoutPulses {
                        line: self.settings.line,
                        how: time.how,
                    });
                }
                return;
            }
            How::Pulse | How::Bridged => {}
        }
        if std::mem::replace(&mut self.said.basis, false) {
            faults.push(TimingFault::PulsesFound { frame: time.frame });
        }
        if let Some(first) = self.first_beat() {
            let heard = self.beat.was_heard(self.beat_of(first, time.frame));
            self.report_lost(heard, time.frame, faults);
        }
        let spurious = self.beat.counts().spurious;
        if spurious > self.spurious_said {
            faults.push(TimingFault::Spurious {
                count: spurious - self.spurious_said,
            });
            self.spurious_said = spurious;
        }
        if let Some(ppm) = self.beat.drift_ppm(DRIFT_BEATS)
            && ppm.abs() >= DRIFT_PPM
            && !std::mem::replace(&mut self.said.drift, true)
        {
            faults.push(TimingFault::Drift { ppm });
        }
    }

    fn report_lost(&mut self, heard: bool, frame: u32, faults: &mut Vec<TimingFault>) {
        if heard {
            if self.silent >= SILENT_VOLUMES {
                faults.push(TimingFault::LineBack {
                    frame,
                    lost: self.silent,
                });
            }
            self.silent = 0;
            return;
        }
        self.silent += 1;
        if self.beat.matched() == 1 {
            // One pulse at the run's beginning is how some scanners are set up.
            if self.silent >= SILENT_VOLUMES && !std::mem::replace(&mut self.said.single, true) {
                faults.push(TimingFault::SinglePulse);
            }
        } else if self.silent < SILENT_VOLUMES {
            faults.push(TimingFault::Lost { frame });
        } else if self.silent == SILENT_VOLUMES {
            faults.push(TimingFault::LineSilent { frame });
        }
    }
}

/// How far a header time is from its place at the nominal repetition time, milliseconds, whatever midnight
/// lies between.
fn off_nominal(headers: &Headers, frame: u32, header_ms: f64, tr_ms: f64) -> f64 {
    let expected = headers.at_ms + (f64::from(frame) - f64::from(headers.frame)) * tr_ms;
    let off = (header_ms - expected).rem_euclid(DAY_MS);
    if off > 0.5 * DAY_MS {
        off - DAY_MS
    } else {
        off
    }
}
