//! Faults on request: what may go wrong between a scanner and us.
//!
//! Volumes are numbered from 1 as the scanner acquires them, on over an abort.

use std::str::FromStr;

use super::noise::{Purpose, uniform};

/// Largest number of a volume; far beyond any session.
const MAX_VOLUME: u32 = 100_000;

/// Why a fault cannot be injected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(super) enum FaultError {
    /// No fault has that name.
    #[error(
        "`{0}` is no fault, expected one of drop, duplicate, reorder, truncate, stall, abort, \
         two-series, lost-pulses, spurious-pulses, noise-bytes, motion-step, clock-drift"
    )]
    Name(String),
    /// The name is known, what follows is not.
    #[error("{name}={found}: expected {expected}, for example {example}")]
    Value {
        /// The fault.
        name: &'static str,
        /// What was given.
        found: String,
        /// What belongs there.
        expected: &'static str,
        /// How it is written.
        example: &'static str,
    },
    /// A volume that is never acquired.
    #[error("{name}={volume}: expected a volume from 1 to {last}")]
    Volume {
        /// The fault.
        name: &'static str,
        /// The volume asked for.
        volume: u32,
        /// The last that can be hit.
        last: usize,
    },
    /// A fault that happens once only.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// A fault that this output or source cannot show.
    #[error("{name} cannot be shown with {with}")]
    Cannot {
        /// The fault.
        name: &'static str,
        /// Which option forbids it.
        with: &'static str,
    },
}

/// Which volumes or pulses a fault hits.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Which {
    /// These, from 1, rising.
    Listed(Vec<u32>),
    /// Each with this probability.
    Share(f64),
}

impl Which {
    fn parse(name: &'static str, text: &str) -> Result<Which, FaultError> {
        let wrong = || FaultError::Value {
            name,
            found: text.into(),
            expected: "volumes from 1, ranges, or a percentage from 0 to 100",
            example: match name {
                "drop" => "drop=3,7,20-22 or drop=2%",
                "lost-pulses" => "lost-pulses=1%",
                _ => "3,7 or 1%",
            },
        };
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.parse().map_err(|_| wrong())?;
            return if (0.0..=100.0).contains(&percent) {
                Ok(Which::Share(percent / 100.0))
            } else {
                Err(wrong())
            };
        }
        let number = |text: &str| {
            let number = text.parse().ok();
            number
                .filter(|number| (1..=MAX_VOLUME).contains(number))
                .ok_or_else(wrong)
        };
        let mut listed = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(wrong());
            }
            listed.extend(first..=last);
        }
        listed.sort_unstable();
        listed.dedup();
        Ok(Which::Listed(listed))
    }

    /// The volumes that are hit, from 1, rising.
    ///
    /// # Errors
    /// [`FaultError::Volume`] for a listed one beyond `last`.
    pub(super) fn volumes(
        &self,
        fault: &Fault,
        seed: u64,
        last: usize,
    ) -> Result<Vec<usize>, FaultError> {
        match self {
            Which::Listed(listed) => {
                let index = |&volume: &u32| {
                    let index = usize::try_from(volume).ok().filter(|index| *index <= last);
                    index.ok_or(FaultError::Volume {
                        name: fault.name(),
                        volume,
                        last,
                    })
                };
                listed.iter().map(index).collect()
            }
            Which::Share(share) => Ok((1..=last)
                .filter(|&volume| uniform(seed, fault.purpose(0), volume) < *share)
                .collect()),
        }
    }
}

/// One fault.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fault {
    /// Volumes that are acquired and never exported.
    Drop(Which),
    /// Volumes that are exported twice.
    Duplicate(Which),
    /// Volumes that are exported after their successor.
    Reorder(Which),
    /// Volumes whose file ends too early.
    Truncate(Which),
    /// From this volume's export on, nothing is exported for a while, then all at once.
    Stall {
        /// The volume.
        at: u32,
        /// For how long.
        seconds: f64,
    },
    /// The series ends after this volume; after a pause, a new one begins from the start.
    Abort {
        /// The volume.
        at: u32,
        /// From the end of the one to the start of the other.
        pause_s: f64,
    },
    /// Every volume is exported in a second series as well.
    TwoSeries,
    /// Pulses that never come.
    LostPulses(Which),
    /// Pulses too many, some time after those of these volumes.
    SpuriousPulses(Which),
    /// Other bytes on the pulse line, some time after the pulses of these volumes.
    NoiseBytes(Which),
    /// From this volume on the head lies elsewhere.
    MotionStep {
        /// The volume.
        at: u32,
        /// How far.
        mm: f64,
    },
    /// The clock in the headers runs fast, or slow where this is below 0.
    ClockDrift {
        /// Millionths.
        ppm: f64,
    },
}

impl Fault {
    /// As `--fault` calls it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Fault::Drop(_) => "drop",
            Fault::Duplicate(_) => "duplicate",
            Fault::Reorder(_) => "reorder",
            Fault::Truncate(_) => "truncate",
            Fault::Stall { .. } => "stall",
            Fault::Abort { .. } => "abort",
            Fault::TwoSeries => "two-series",
            Fault::LostPulses(_) => "lost-pulses",
            Fault::SpuriousPulses(_) => "spurious-pulses",
            Fault::NoiseBytes(_) => "noise-bytes",
            Fault::MotionStep { .. } => "motion-step",
            Fault::ClockDrift { .. } => "clock-drift",
        }
    }

    /// What its numbers are drawn for; `aspect` tells which volumes it hits (0) from how.
    pub(super) fn purpose(&self, aspect: u32) -> Purpose {
        let number = match self {
            Fault::Drop(_) => 0,
            Fault::Duplicate(_) => 1,
            Fault::Reorder(_) => 2,
            Fault::Truncate(_) => 3,
            Fault::LostPulses(_) => 4,
            Fault::SpuriousPulses(_) => 5,
            Fault::NoiseBytes(_) => 6,
            Fault::MotionStep { .. } => 7,
            Fault::Stall { .. } => 8,
            Fault::Abort { .. } => 9,
            Fault::TwoSeries => 10,
            Fault::ClockDrift { .. } => 11,
        };
        Purpose::Fault(number * 4 + aspect)
    }
}

/// A volume and what belongs to it, `AT:NUMBER`.
fn at_volume(
    name: &'static str,
    text: &str,
    otherwise: Option<f64>,
    range: std::ops::RangeInclusive<f64>,
    (expected, example): (&'static str, &'static str),
) -> Result<(u32, f64), FaultError> {
    let parse = || {
        let (at, number) = match text.split_once(':') {
            Some((at, number)) => (at, number.parse().ok()?),
            None => (text, otherwise?),
        };
        let at = at.parse().ok().filter(|at| (1..=MAX_VOLUME).contains(at))?;
        range.contains(&number).then_some((at, number))
    };
    parse().ok_or_else(|| FaultError::Value {
        name,
        found: text.into(),
        expected,
        example,
    })
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Fault, FaultError> {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        match name {
            "drop" => Which::parse("drop", value).map(Fault::Drop),
            "duplicate" => Which::parse("duplicate", value).map(Fault::Duplicate),
            "reorder" => Which::parse("reorder", value).map(Fault::Reorder),
            "truncate" => Which::parse("truncate", value).map(Fault::Truncate),
            "lost-pulses" => Which::parse("lost-pulses", value).map(Fault::LostPulses),
            "spurious-pulses" => Which::parse("spurious-pulses", value).map(Fault::SpuriousPulses),
            // Without a number, a line that is somewhat noisy.
            "noise-bytes" if value.is_empty() => Ok(Fault::NoiseBytes(Which::Share(0.05))),
            "noise-bytes" => Which::parse("noise-bytes", value).map(Fault::NoiseBytes),
            "stall" => {
                let said = ("a volume and seconds from 0 to 3600", "stall=30:5");
                let (at, seconds) = at_volume("stall", value, None, 0.0..=3600.0, said)?;
                Ok(Fault::Stall { at, seconds })
            }
            "abort" => {
                let said = (
                    "a volume and, where it matters, seconds of pause from 0 to 3600",
                    "abort=15 or abort=15:20",
                );
                let (at, pause_s) = at_volume("abort", value, Some(5.0), 0.0..=3600.0, said)?;
                Ok(Fault::Abort { at, pause_s })
            }
            "motion-step" => {
                let said = (
                    "a volume and millimetres from 0 to 20",
                    "motion-step=40:1.5",
                );
                let (at, mm) = at_volume("motion-step", value, None, 0.0..=20.0, said)?;
                Ok(Fault::MotionStep { at, mm })
            }
            "clock-drift" => {
                let ppm = value
                    .parse()
                    .ok()
                    .filter(|ppm| (-10_000.0..=10_000.0).contains(ppm));
                let ppm = ppm.ok_or_else(|| FaultError::Value {
                    name: "clock-drift",
                    found: value.into(),
                    expected: "millionths from -10000 to 10000",
                    example: "clock-drift=200",
                })?;
                Ok(Fault::ClockDrift { ppm })
            }
            "two-series" if value.is_empty() => Ok(Fault::TwoSeries),
            "two-series" => Err(FaultError::Value {
                name: "two-series",
                found: value.into(),
                expected: "nothing",
                example: "two-series",
            }),
            _ => Err(FaultError::Name(name.chars().take(40).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Fault {
        Fault::from_str(text).unwrap()
    }

    #[test]
    fn faults_are_read_as_the_help_writes_them() {
        assert_eq!(
            parsed("drop=3,20-22,7,3"),
            Fault::Drop(Which::Listed(vec![3, 7, 20, 21, 22]))
        );
        assert_eq!(
            parsed("lost-pulses=1%"),
            Fault::LostPulses(Which::Share(0.01))
        );
        assert_eq!(parsed("noise-bytes"), Fault::NoiseBytes(Which::Share(0.05)));
        assert_eq!(
            parsed("stall=30:5"),
            Fault::Stall {
                at: 30,
                seconds: 5.0
            }
        );
        assert_eq!(
            parsed("abort=15"),
            Fault::Abort {
                at: 15,
                pause_s: 5.0
            }
        );
        assert_eq!(parsed("two-series"), Fault::TwoSeries);
        assert_eq!(
            parsed("motion-step=40:1.5"),
            Fault::MotionStep { at: 40, mm: 1.5 }
        );
        assert_eq!(
            parsed("clock-drift=-200"),
            Fault::ClockDrift { ppm: -200.0 }
        );
    }

    #[test]
    fn what_is_no_fault_is_refused_with_an_example() {
        for text in [
            "drop",
            "drop=",
            "drop=0",
            "drop=7-3",
            "drop=x",
            "drop=101%",
            "drop=-1%",
            "drop=nan%",
            "drop=1-100001",
            "stall=3",
            "stall=3:-1",
            "stall=3:inf",
            "abort=",
            "abort=0",
            "two-series=3",
            "motion-step=2:21",
            "clock-drift=nan",
            "clock-drift=",
        ] {
            let error = Fault::from_str(text).unwrap_err();
            assert!(matches!(error, FaultError::Value { .. }), "{text}: {error}");
        }
        let error = Fault::from_str("explode=3").unwrap_err().to_string();
        assert!(
            error.contains("explode") && error.contains("two-series"),
            "{error}"
        );
    }

    #[test]
    fn a_share_hits_as_many_as_it_says_and_the_same_ones_again() {
        let fault = parsed("lost-pulses=1%");
        let Fault::LostPulses(which) = &fault else {
            panic!("{fault:?}")
        };
        let hit = which.volumes(&fault, 4, 20_000).unwrap();
        assert!((150..250).contains(&hit.len()), "{}", hit.len());
        assert_eq!(hit, which.volumes(&fault, 4, 20_000).unwrap());
        assert_ne!(hit, which.volumes(&fault, 5, 20_000).unwrap());
        let none = Which::Share(0.0).volumes(&fault, 4, 500).unwrap();
        let all = Which::Share(1.0).volumes(&fault, 4, 500).unwrap();
        assert_eq!((none.len(), all.len()), (0, 500));
    }

    #[test]
    fn volume_that_is_never_acquired_is_named() {
        let fault = parsed("drop=3,121");
        let Fault::Drop(which) = &fault else {
            panic!("{fault:?}")
        };
        let error = which.volumes(&fault, 1, 120).unwrap_err();
        assert_eq!(
            error.to_string(),
            "drop=121: expected a volume from 1 to 120"
        );
    }
}
