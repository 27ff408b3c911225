//! `afterimage session show`: what a recorded session holds, read from its logs alone.
//!
//! For each run every volume with its start, motion, quality and lateness, and every trial with its
//! decode time and, where it has none, why it has no estimate. Voxels and betas stay in the record.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;
use wire::{Tier, VolumeQuality};

use crate::acquire::run;
use crate::logging::chain;
use crate::pipeline::{AlignedVolume, StartKnown};
use crate::record::entry::{Began, RunEnd, RunEntry, SessionEntry, StoredTrial};
use crate::record::{self, RecordError, SessionFile, log};
use crate::replay::{self, ReplayError};

/// Look at a recorded session
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Show(Show),
}

/// Say what a session's record holds: its runs, volumes, trials and faults
///
/// Nothing is written, and a session in progress may be looked at. The JSON holds, per run:
///   volumes   frame (from 0), start_ms (Unix) and start_known (pulse, bridged over lost pulses,
///             header or arrival), arrived_ms and lateness_ms (from the end of its acquisition to
///             its file), late (after a later volume or the run's end), motion against the run's
///             first volume, quality
///   trials    per trial and decode time: volumes used and missing, skipped with the reason
/// and what came twice, was refused or never came; and of the session its faults, files put aside
/// and pulses. Times are Unix milliseconds, pulses milliseconds of the box's monotonic clock.
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Show {
    /// The session's folder: STATE/sessions/ID
    session: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, thiserror::Error)]
enum ShowError {
    #[error(transparent)]
    Session(#[from] ReplayError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the session cannot be put into JSON")]
    Json(#[from] serde_json::Error),
    #[error("cannot write to standard output")]
    Say(#[from] std::io::Error),
}

#[derive(Serialize)]
struct Report {
    session: SessionFile,
    runs: Vec<RunReport>,
    starts: Vec<Start>,
    faults: Vec<Told>,
    notes: Vec<Told>,
    put_aside: Vec<Told>,
    /// Of the trigger line, milliseconds of the box's monotonic clock.
    pulses_ms: Vec<f64>,
}

/// A process took the session up.
#[derive(Serialize)]
struct Start {
    software: String,
    at_ms: u64,
}

#[derive(Serialize)]
struct Told {
    text: String,
    at_ms: u64,
}

#[derive(Serialize)]
struct RunReport {
    run: u32,
    software: String,
    began_ms: u64,
    tr_ms: f64,
    voxels: u32,
    /// From the trained space to the run's first volume, LPS, millimetres.
    registration_lps: Option<[[f64; 4]; 4]>,
    /// Trials of its events file.
    events: usize,
    /// `complete`, `stopped`, `followed`; none while it goes on.
    end: Option<&'static str>,
    volumes: Vec<VolumeReport>,
    doubled: Vec<Frame>,
    lost: Vec<Frame>,
    refused: Vec<Refused>,
    trials: Vec<TrialReport>,
}

#[derive(Serialize)]
struct Frame {
    frame: u32,
    at_ms: u64,
}

#[derive(Serialize)]
struct Refused {
    number: u32,
    reason: String,
    at_ms: u64,
}

#[derive(Serialize)]
struct VolumeReport {
    frame: u32,
    start_ms: f64,
    start_known: &'static str,
    arrived_ms: u64,
    lateness_ms: f64,
    late: bool,
    motion: Motion,
    quality: VolumeQuality,
}

#[derive(Serialize)]
struct Motion {
    shift_lps_mm: [f64; 3],
    angles_rad: [f64; 3],
}

#[derive(Serialize)]
struct TrialReport {
    trial: u32,
    tier: Tier,
    onset_s: Option<f64>,
    volumes: u32,
    missing: u32,
    skipped: Option<String>,
    at_ms: u64,
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let Command::Show(show) = &arguments.command;
    let shown = report(&show.session).and_then(|report| {
        let mut out = BufWriter::new(std::io::stdout().lock());
        if show.json {
            serde_json::to_writer_pretty(&mut out, &report)?;
            writeln!(out)?;
        } else {
            summary(&report, &mut out)?;
        }
        Ok(out.flush()?)
    });
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn report(dir: &Path) -> Result<Report, ShowError> {
    let mut report = Report {
        session: replay::session_file(dir)?,
        runs: Vec::new(),
        starts: Vec::new(),
        faults: Vec::new(),
        notes: Vec::new(),
        put_aside: Vec::new(),
        pulses_ms: Vec::new(),
    };
    for entry in log::read::<SessionEntry>(&dir.join(record::SESSION_LOG))? {
        match entry {
            SessionEntry::Opened { software, at_ms } => {
                report.starts.push(Start { software, at_ms });
            }
            SessionEntry::Fault { text, at_ms } => report.faults.push(Told { text, at_ms }),
            SessionEntry::Note { text, at_ms } => report.notes.push(Told { text, at_ms }),
            SessionEntry::PutAside { reason, at_ms, .. } => report.put_aside.push(Told {
                text: reason,
                at_ms,
            }),
            SessionEntry::Pulses(pulses) => report.pulses_ms.extend(pulses),
        }
    }
    for (index, dir) in replay::runs(dir)? {
        // A run's folder is there before its log.
        if !dir.join(run::LOG).exists() {
            continue;
        }
        let mut entries = run::entries(&dir)?.into_iter();
        if let Some(RunEntry::Began(began)) = entries.next() {
            let events = replay::read_events(&dir)?;
            report.runs.push(run_report(index, began, events, entries));
        }
    }
    Ok(report)
}

fn run_report(
    run: u32,
    began: Began,
    events: Vec<rtfmri::events::Event>,
    entries: impl Iterator<Item = RunEntry>,
) -> RunReport {
    let tr_ms = began.reference.tr_ms;
    let mut report = RunReport {
        run,
        began_ms: began.at_ms,
        tr_ms,
        voxels: began.voxels,
        registration_lps: began.registration,
        events: events.len(),
        end: None,
        volumes: Vec::new(),
        doubled: Vec::new(),
        lost: Vec::new(),
        refused: Vec::new(),
        trials: Vec::new(),
        software: began.software,
    };
    for entry in entries {
        match entry {
            RunEntry::Began(_) => {}
            RunEntry::Volume(volume) => {
                // What follows a run that was taken to be over shows that it was not.
                report.end = None;
                report.lost.retain(|lost| lost.frame != volume.frame);
                report.volumes.push(volume_report(&volume, tr_ms));
            }
            RunEntry::Doubled { frame, at_ms } => report.doubled.push(Frame { frame, at_ms }),
            RunEntry::Lost { frame, at_ms } => report.lost.push(Frame { frame, at_ms }),
            RunEntry::Refused {
                number,
                reason,
                at_ms,
            } => report.refused.push(Refused {
                number,
                reason,
                at_ms,
            }),
            RunEntry::Trial(trial) => report.trials.push(trial_report(trial, &events)),
            RunEntry::Ended { end, .. } => {
                report.end = Some(match end {
                    RunEnd::Complete => "complete",
                    RunEnd::Stopped => "stopped",
                    RunEnd::Followed => "followed",
                });
            }
        }
    }
    report
}

#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds since 1970 are far below 2^52"
)]
fn volume_report(volume: &AlignedVolume, tr_ms: f64) -> VolumeReport {
    let [x, y, z, rx, ry, rz] = volume.motion;
    VolumeReport {
        frame: volume.frame,
        start_ms: volume.start.at_ms,
        start_known: match volume.start.known {
            StartKnown::Pulse => "pulse",
            StartKnown::Bridged => "bridged",
            StartKnown::Header => "header",
            StartKnown::Arrival => "arrival",
        },
        arrived_ms: volume.arrived_ms,
        lateness_ms: volume.arrived_ms as f64 - volume.start.at_ms - tr_ms,
        late: volume.late,
        motion: Motion {
            shift_lps_mm: [x, y, z],
            angles_rad: [rx, ry, rz],
        },
        quality: volume.quality,
    }
}

fn trial_report(trial: StoredTrial, events: &[rtfmri::events::Event]) -> TrialReport {
    let event = (trial.trial as usize)
        .checked_sub(1)
        .and_then(|index| events.get(index));
    TrialReport {
        trial: trial.trial,
        tier: trial.tier,
        onset_s: event.map(|event| event.onset_s),
        volumes: trial.volumes,
        missing: trial.missing,
        skipped: trial.estimate.err(),
        at_ms: trial.at_ms,
    }
}

/// For people: what there is of each kind, and every sentence that was told.
fn summary(report: &Report, out: &mut impl Write) -> std::io::Result<()> {
    let session = &report.session;
    writeln!(
        out,
        "session {}: {:?}, {} runs, {} starts, {} pulses, {} files put aside, {}",
        session.id,
        session.label,
        report.runs.len(),
        report.starts.len(),
        report.pulses_ms.len(),
        report.put_aside.len(),
        if session.ended_at_ms.is_some() {
            "ended"
        } else {
            "open"
        }
    )?;
    for run in &report.runs {
        summary_of_run(run, out)?;
    }
    for fault in &report.faults {
        writeln!(out, "fault: {}", fault.text)?;
    }
    Ok(())
}

fn summary_of_run(run: &RunReport, out: &mut impl Write) -> std::io::Result<()> {
    let count = |which: fn(&VolumeReport) -> bool| run.volumes.iter().filter(|v| which(v)).count();
    writeln!(
        out,
        "run {}: TR {} ms, {} voxels{}, {}",
        run.run,
        run.tr_ms,
        run.voxels,
        if run.registration_lps.is_some() {
            ", registered to the trained space"
        } else {
            ""
        },
        run.end.unwrap_or("not over")
    )?;
    writeln!(
        out,
        "  {} volumes: {} late, {} spikes, {} drifting; {} came twice, {} never, {} refused",
        run.volumes.len(),
        count(|volume| volume.late),
        count(|volume| volume.quality.spike),
        count(|volume| volume.quality.drifting),
        run.doubled.len(),
        run.lost.len(),
        run.refused.len()
    )?;
    let known = |how: &str| run.volumes.iter().filter(|v| v.start_known == how).count();
    writeln!(
        out,
        "  starts known by pulse {}, bridged {}, header {}, arrival {}",
        known("pulse"),
        known("bridged"),
        known("header"),
        known("arrival")
    )?;
    let largest = run
        .volumes
        .iter()
        .map(|volume| volume.quality.displacement_mm)
        .fold(0.0_f32, f32::max);
    writeln!(out, "  largest displacement {largest:.2} mm")?;
    for tier in Tier::ALL {
        let of_tier: Vec<&TrialReport> = run.trials.iter().filter(|t| t.tier == tier).collect();
        let skipped = of_tier.iter().filter(|t| t.skipped.is_some()).count();
        writeln!(
            out,
            "  {tier}: {} of {} trials, {skipped} skipped",
            of_tier.len() - skipped,
            run.events
        )?;
        for trial in of_tier {
            if let Some(reason) = &trial.skipped {
                writeln!(out, "    trial {} skipped: {reason}", trial.trial)?;
            }
        }
    }
    Ok(())
}
