//! What a run's timing shows that an operator must know.

use std::fmt;

use super::How;

/// A finding about pulses and volumes; its text is a sentence's rest, to stand after "Run 1: ".
///
/// Frames are counted from 0 here and from 1 in the text, as an operator counts volumes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TimingFault {
    /// A volume's pulse was not heard.
    Lost {
        /// The volume.
        frame: u32,
    },
    /// Several volumes in a row had no pulse.
    LineSilent {
        /// The last of them so far.
        frame: u32,
    },
    /// Pulses are back after a silence.
    LineBack {
        /// The first volume that has one.
        frame: u32,
        /// Volumes without.
        lost: u32,
    },
    /// Pulses off the scanner's clock since the last volume, ignored.
    Spurious {
        /// How many.
        count: u64,
    },
    /// The run is timed without pulses.
    WithoutPulses {
        /// A trigger line is set, so there should be some.
        line: bool,
        /// What takes their place.
        how: How,
    },
    /// Pulses time the run after all.
    PulsesFound {
        /// From this volume on.
        frame: u32,
    },
    /// The only pulse was the one at the beginning.
    SinglePulse,
    /// Pulses come at another interval than this run's.
    Interval {
        /// By the repetition time, milliseconds.
        expected_ms: f64,
        /// Between pulses, milliseconds.
        found_ms: f64,
    },
    /// More pulses, or fewer, per volume than set.
    PulsesPerVolume {
        /// As set.
        expected: u32,
        /// By the time between pulses.
        found: f64,
    },
    /// Pulses at the beginning belong to volumes that the scanner discards.
    Dummies {
        /// How many volumes.
        volumes: i64,
    },
    /// Volumes arrive so late that they cannot tell which pulse was the first one's.
    LateExport {
        /// From the end of the quickest volume to its arrival, milliseconds.
        lag_ms: f64,
    },
    /// A volume arrived before it could have begun: the first volume's pulse was an earlier one.
    FirstPulseMoved {
        /// The volume.
        frame: u32,
    },
    /// The scanner's clock against the box's.
    Drift {
        /// Parts per million; positive where the scanner's repetition time is longer by the box's clock.
        ppm: f64,
    },
    /// The pulses went on out of step with those before.
    Jumped {
        /// The first volume after it.
        frame: u32,
        /// By how much, milliseconds.
        jump_ms: f64,
    },
    /// A header time that does not follow from those before; once.
    HeaderTime {
        /// The volume.
        frame: u32,
        /// By how much it is off, milliseconds.
        off_ms: f64,
    },
}

impl fmt::Display for TimingFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |frame: u32| u64::from(frame) + 1;
        match *self {
            TimingFault::Lost { frame } => write!(
                f,
                "the trigger pulse of volume {} was lost; its time is bridged",
                number(frame)
            ),
            TimingFault::LineSilent { frame } => write!(
                f,
                "no trigger pulses up to volume {}; times are bridged. Check the trigger cable",
                number(frame)
            ),
            TimingFault::LineBack { frame, lost } => write!(
                f,
                "trigger pulses are back at volume {} after {lost} volumes without",
                number(frame)
            ),
            TimingFault::Spurious { count: 1 } => {
                f.write_str("a trigger pulse off the scanner's clock is ignored")
            }
            TimingFault::Spurious { count } => {
                write!(
                    f,
                    "{count} trigger pulses off the scanner's clock are ignored"
                )
            }
            TimingFault::WithoutPulses { line, how } => {
                f.write_str(match line {
                    true => "no usable trigger pulses; ",
                    false => "there is no trigger line; ",
                })?;
                f.write_str(match how {
                    How::Header => "volumes are timed by their headers",
                    _ => "volumes are timed by their arrival",
                })
            }
            TimingFault::PulsesFound { frame } => write!(
                f,
                "volumes are timed by trigger pulses from volume {} on",
                number(frame)
            ),
            TimingFault::SinglePulse => f.write_str(
                "there was one trigger pulse, at the beginning; later volumes are counted from it",
            ),
            TimingFault::Interval {
                expected_ms,
                found_ms,
            } => write!(
                f,
                "trigger pulses come every {found_ms:.1} ms, expected {expected_ms:.1} ms by the \
                 repetition time"
            ),
            TimingFault::PulsesPerVolume { expected, found } => write!(
                f,
                "there are {found:.0} trigger pulses per volume, trigger.pulses_per_volume says \
                 {expected}"
            ),
            TimingFault::Dummies { volumes } => write!(
                f,
                "pulses of {volumes} volumes came before the first volume and are taken for volumes \
                 that the scanner discards; trigger.dummy_volumes settles it"
            ),
            TimingFault::LateExport { lag_ms } => write!(
                f,
                "volumes arrive {:.1} s after their acquisition, too late to tell whether the scanner \
                 discards volumes; trigger.dummy_volumes settles it",
                lag_ms / 1e3
            ),
            TimingFault::FirstPulseMoved { frame } => write!(
                f,
                "volume {} arrived before the pulse it was counted to; all volumes are counted from an \
                 earlier pulse",
                number(frame)
            ),
            TimingFault::Drift { ppm } => write!(
                f,
                "the scanner's clock differs from this box's by {ppm:+.0} millionths; times follow the \
                 scanner's"
            ),
            TimingFault::Jumped { frame, jump_ms } => write!(
                f,
                "trigger pulses went out of step by {jump_ms:.0} ms before volume {}",
                number(frame)
            ),
            TimingFault::HeaderTime { frame, off_ms } => write!(
                f,
                "the header time of volume {} is off by {off_ms:.0} ms and is not used",
                number(frame)
            ),
        }
    }
}
