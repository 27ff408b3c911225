//! `afterimage bench`: what this machine takes.
//!
//! - [`networks`]: time and memory of every stage of a bundle, and of a whole picture;
//! - [`front`]: from a scanner's file to masked voxels, a trial's fit, the trigger line.
//!
//! Both call what the box calls. Memory is resident memory: a process's own pages (anonymous), and
//! pages mapped from files, which the system may drop.

mod front;
mod networks;

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Args};
use serde::Serialize;

use crate::logging::chain;
use crate::memory;
use crate::record::{self, RecordError};
use crate::roles::EXIT_SETTING;

/// Measure this machine: the networks of a bundle, or the front end
///
/// --bundle measures time and memory of every stage of a bundle and of a whole picture.
///
/// --front-end needs nothing but this program. For each --grid it simulates a head that moves,
/// writes one mosaic DICOM file per volume into a temporary folder (TMPDIR, removed at the end)
/// and takes it the way of the running box: the file is read, parsed by the sandboxed parser in
/// its own process, realigned, sampled at the mask's voxels and judged. It then fits trials to
/// these voxels and, with --triggers, stamps pulses of a pseudo-terminal. Columns are the median,
/// the 99th percentile and the maximum, by the clock unless `processor` says otherwise: what both
/// processes computed, whatever else the machine did meanwhile.
///
/// Promised on two processors that have nothing else to do: 99 of 100 volumes within 15 ms
/// (64x64x27) and 50 ms (76x90x74), a trial's AR(1) fit within 25 ms, 99 of 100 stamps within
/// 1 ms; and the last volumes of a run take no longer than its first.
///
/// Examples:
///   afterimage bench --bundle bundle --key box.pub
///   afterimage bench --front-end --triggers --json front-end.json
///   afterimage bench --front-end --grid 80x80x32 --voxels 8000 --volumes 300
#[derive(Args)]
#[command(
    verbatim_doc_comment,
    group = ArgGroup::new("what").required(true).args(["bundle", "front_end"])
)]
pub(crate) struct Arguments {
    /// Also write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    networks: networks::Arguments,
    #[command(flatten)]
    front: front::Arguments,
}

#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(transparent)]
    Networks(#[from] networks::NetworksError),
    #[error(transparent)]
    Front(#[from] front::FrontError),
    #[error(transparent)]
    Write(#[from] RecordError),
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match bench(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            match error {
                BenchError::Networks(error) if error.is_setting() => ExitCode::from(EXIT_SETTING),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn bench(arguments: &Arguments) -> Result<(), BenchError> {
    let mut out = std::io::stdout().lock();
    if let Some(bundle) = &arguments.networks.bundle {
        let figures = networks::bench(&arguments.networks, bundle, &mut out)?;
        arguments.write(&figures)
    } else {
        let figures = front::bench(&arguments.front, &mut out)?;
        arguments.write(&figures)
    }
}

impl Arguments {
    fn write(&self, figures: &impl Serialize) -> Result<(), BenchError> {
        match &self.json {
            Some(path) => Ok(record::write_json(path, figures)?),
            None => Ok(()),
        }
    }
}

/// Resident memory, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Resident {
    /// Pages of the process's own.
    anonymous: u64,
    /// Pages mapped from files.
    mapped: u64,
}

impl Resident {
    fn now() -> Resident {
        let (anonymous, mapped) = memory::resident();
        Resident { anonymous, mapped }
    }

    fn of(pid: u32) -> Resident {
        let (anonymous, mapped) = memory::resident_of(&pid.to_string());
        Resident { anonymous, mapped }
    }

    fn since(self, before: Resident) -> Resident {
        Resident {
            anonymous: self.anonymous.saturating_sub(before.anonymous),
            mapped: self.mapped.saturating_sub(before.mapped),
        }
    }

    fn max(self, other: Resident) -> Resident {
        Resident {
            anonymous: self.anonymous.max(other.anonymous),
            mapped: self.mapped.max(other.mapped),
        }
    }
}

/// How long something took each time, milliseconds.
///
/// Percentiles are by nearest rank: the smallest time that so many hundredths of all do not exceed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    median_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Spread {
    /// Of at least one time, in any order.
    fn of(times_ms: impl IntoIterator<Item = f64>) -> Spread {
        let mut sorted: Vec<f64> = times_ms.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        Spread {
            median_ms: percentile(&sorted, 50),
            p99_ms: percentile(&sorted, 99),
            max_ms: percentile(&sorted, 100),
        }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (median, p99, max) = (self.median_ms, self.p99_ms, self.max_ms);
        write!(f, "{median:>10.3} {p99:>10.3} {max:>10.3}")
    }
}

/// The nearest rank's time; no number where there are none.
fn percentile(sorted_ms: &[f64], hundredths: usize) -> f64 {
    let rank = (sorted_ms.len() * hundredths).div_ceil(100);
    let at = rank.saturating_sub(1);
    sorted_ms.get(at).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};
    use proptest::prelude::*;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(words: &str) -> Result<Arguments, String> {
        let words = std::iter::once("bench").chain(words.split_whitespace());
        Line::try_parse_from(words)
            .map(|line| line.arguments)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn networks_or_front_end_must_be_chosen_and_keep_their_own_arguments() {
        Line::command().debug_assert();
        assert!(parse("--bundle b --calls 2 --json f").is_ok());
        assert!(parse("--front-end --triggers --pulses 20 --json f").is_ok());
        for (words, said) in [
            ("", "--bundle"),
            ("", "--front-end"),
            ("--bundle b --front-end", "cannot be used with"),
            ("--bundle b --volumes 20", "cannot be used with"),
            ("--bundle b --triggers", "cannot be used with"),
            ("--front-end --calls 2", "cannot be used with"),
            ("--front-end --key k", "cannot be used with"),
            ("--front-end --pulses 20", "--triggers"),
            ("--front-end --grid 64x64", "as 64x64x27"),
            ("--front-end --volumes 3", "10.."),
        ] {
            let error = parse(words).err().unwrap();
            assert!(error.contains(said), "{words}: {error}");
        }
    }

    #[test]
    fn a_grid_of_ones_own_replaces_both() {
        let grids = |words| parse(words).unwrap().front.grid;
        assert_eq!(grids("--front-end"), [[64, 64, 27], [76, 90, 74]]);
        assert_eq!(grids("--front-end --grid 32x32x12"), [[32, 32, 12]]);
    }

    #[test]
    fn ranks_of_known_times() {
        let times = |count: u32| (1..=count).rev().map(f64::from);
        let spread = |count| {
            let spread = Spread::of(times(count));
            [spread.median_ms, spread.p99_ms, spread.max_ms]
        };
        assert_eq!(spread(1), [1.0, 1.0, 1.0]);
        assert_eq!(spread(2), [1.0, 2.0, 2.0]);
        assert_eq!(spread(99), [50.0, 99.0, 99.0]);
        assert_eq!(spread(100), [50.0, 99.0, 100.0]);
        assert_eq!(spread(1000), [500.0, 990.0, 1000.0]);
        assert!(Spread::of([]).median_ms.is_nan());
    }

    proptest! {
        #[test]
        fn so_many_hundredths_and_no_fewer_are_not_exceeded(
            times in prop::collection::vec(0.0_f64..100.0, 1..300),
            hundredths in 1_usize..=100,
        ) {
            let mut sorted = times.clone();
            sorted.sort_by(f64::total_cmp);
            let found = percentile(&sorted, hundredths);
            let within = |limit: f64| times.iter().filter(|time| **time <= limit).count();
            prop_assert!(within(found) * 100 >= times.len() * hundredths);
            let below = times.iter().copied().filter(|time| *time < found);
            if let Some(next) = below.max_by(f64::total_cmp) {
                prop_assert!(within(next) * 100 < times.len() * hundredths);
            }
        }
    }
}
