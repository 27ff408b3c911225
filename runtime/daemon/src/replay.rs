//! `afterimage replay`: a recorded session once more, from its record alone.
//!
//! Every trial is estimated again from the recorded volumes, in the recorded order, and compared bit
//! by bit with the recorded betas; with a bundle, every picture is made again from the recorded seed
//! and compared byte by byte with the recorded file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bundle::{Bundle, PublicKey};
use clap::Args;
use decoder::{Decoder, Fidelity, Progress, Runtime};
use rtfmri::events;
use wire::{PictureKind, TrialMessage};

use crate::acquire::run::{self, State, Taken};
use crate::decode;
use crate::logging::chain;
use crate::pipeline;
use crate::record::entry::{RunEntry, StoredTrial};
use crate::record::{self, RecordError, SessionFile};
use crate::roles::EXIT_SETTING;

/// Differences that are named; more are counted.
const MAX_NAMED: usize = 20;

/// Which session, and what of it.
///
/// Exit code 0 where everything is as it was recorded, 1 where something differs.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The session's folder: STATE/sessions/ID
    session: PathBuf,
    /// The bundle it was decoded with; without it betas are replayed and no pictures
    #[arg(long, requires = "key")]
    bundle: Option<PathBuf>,
    /// Public key that must have signed the bundle
    #[arg(long)]
    key: Option<PathBuf>,
    /// Where the replayed betas (.npy) and pictures (.png) go; nothing is written without it
    #[arg(long)]
    out: Option<PathBuf>,
    /// Threads of the networks: as in the session, since sums may depend on it
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// ONNX Runtime's library, where it is not beside the program
    #[arg(long)]
    onnxruntime: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplayError {
    #[error("{path} is not a session's folder: expected session.json in it")]
    NoSession { path: PathBuf },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("{path} does not begin as a run does")]
    NoRun { path: PathBuf },
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is wrong")]
    Events {
        path: PathBuf,
        source: rtfmri::events::EventsError,
    },
    #[error("the bundle cannot be used")]
    Bundle(#[from] bundle::BundleError),
    #[error("--key cannot be used")]
    Key(#[from] bundle::KeyError),
    #[error("ONNX Runtime cannot be used")]
    Runtime(#[from] decoder::RuntimeError),
    #[error("the bundle's networks cannot be loaded")]
    Load(#[from] decoder::DecodeError),
    #[error("a picture cannot be encoded")]
    Png(#[from] display::png::PngError),
    #[error("cannot write to standard output")]
    Say(#[from] std::io::Error),
}

/// What was compared.
#[derive(Debug, Default)]
struct Tally {
    runs: usize,
    volumes: usize,
    betas: usize,
    skipped: usize,
    pictures: usize,
    undecoded: usize,
    differences: Vec<String>,
    more: usize,
}

impl Tally {
    fn differs(&mut self, what: String) {
        if self.differences.len() < MAX_NAMED {
            self.differences.push(what);
        } else {
            self.more += 1;
        }
    }
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match replay(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            match error {
                ReplayError::Bundle(_) | ReplayError::Key(_) => ExitCode::from(EXIT_SETTING),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn replay(arguments: &Arguments) -> Result<bool, ReplayError> {
    let session = session_file(&arguments.session)?;
    let mut tally = Tally::default();
    let mut trials = Vec::new();
    for (index, dir) in runs(&arguments.session)? {
        let Some((state, ready)) = replay_run(index, &dir, &mut tally)? else {
            continue;
        };
        if let Some(out) = &arguments.out {
            let out = out.join("runs").join(format!("{index:03}"));
            record::create_private(&out).map_err(record::at(&out))?;
            run::write_arrays(&out, &state)?;
        }
        trials.extend(ready);
    }
    if let (Some(dir), Some(key)) = (&arguments.bundle, &arguments.key) {
        let bundle = bundle::open(dir)?.verify(&PublicKey::from_file(key)?)?;
        Pictures {
            arguments,
            session: &session,
            bundle: &bundle,
        }
        .replay(&trials, &mut tally)?;
    }
    report(&session, &tally)?;
    Ok(tally.differences.is_empty())
}

/// What a session's folder says of the session.
///
/// # Errors
/// [`ReplayError::NoSession`].
pub(crate) fn session_file(session: &Path) -> Result<SessionFile, ReplayError> {
    record::read_json(&session.join("session.json")).map_err(|_| ReplayError::NoSession {
        path: session.to_path_buf(),
    })
}

/// The recorded runs, by number.
pub(crate) fn runs(session: &Path) -> Result<BTreeMap<u32, PathBuf>, ReplayError> {
    let dir = session.join("runs");
    let read = |source| ReplayError::Read {
        path: dir.clone(),
        source,
    };
    let mut runs = BTreeMap::new();
    for entry in fs::read_dir(&dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        runs.extend(number.map(|number| (number, entry.path())));
    }
    Ok(runs)
}

/// Estimates a run's trials again; returns the run and its trials as they were told, `None` where a
/// process was stopped before the run had begun.
fn replay_run(
    index: u32,
    dir: &Path,
    tally: &mut Tally,
) -> Result<Option<(State, Vec<TrialMessage>)>, ReplayError> {
    let path = dir.join(run::LOG);
    if !path.exists() {
        return Ok(None);
    }
    let mut entries = run::entries(dir)?.into_iter();
    let began = match entries.next() {
        Some(RunEntry::Began(began)) => began,
        Some(_) => return Err(ReplayError::NoRun { path }),
        None => return Ok(None),
    };
    let mut state = State::begin(read_events(dir)?, &began);
    let mut ready = Vec::new();
    tally.runs += 1;
    for entry in entries {
        match &entry {
            RunEntry::Trial(recorded) => compare(&state, index, recorded, tally),
            RunEntry::Volume(_) => tally.volumes += 1,
            _ => {}
        }
        if let Taken::Ready(trial) = state.take(index, entry) {
            ready.push(trial);
        }
    }
    Ok(Some((state, ready)))
}

/// The events as they were when the run began; none where they could not be used.
pub(crate) fn read_events(dir: &Path) -> Result<Vec<events::Event>, ReplayError> {
    let path = dir.join("events.tsv");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| {
            file.take(events::MAX_LEN_BYTES as u64 + 1)
                .read_to_end(&mut bytes)
        })
        .map_err(|source| ReplayError::Read {
            path: path.clone(),
            source,
        })?;
    events::parse(&bytes).map_err(|source| ReplayError::Events { path, source })
}

fn compare(state: &State, run: u32, recorded: &StoredTrial, tally: &mut Tally) {
    let (trial, tier) = (recorded.trial, recorded.tier);
    let place = format!("run {run}, trial {trial}, {tier}");
    let Some(index) = (trial as usize).checked_sub(1) else {
        tally.differs(format!("{place}: no such trial"));
        return;
    };
    let again = state.fit(tier, index, recorded.at_ms);
    tally.betas += usize::from(recorded.estimate.is_ok());
    tally.skipped += usize::from(recorded.estimate.is_err());
    let found = match (&again.estimate, &recorded.estimate) {
        (Ok(again), Ok(recorded)) => {
            let pairs = again.betas.iter().zip(&recorded.betas);
            let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            let variances = again.variance.iter().zip(&recorded.variance);
            let spread = variances
                .filter(|(a, b)| a.to_bits() != b.to_bits())
                .count();
            let same = differ + spread == 0 && again.betas.len() == recorded.betas.len();
            (!same).then(|| {
                let of = recorded.betas.len();
                format!("{differ} of {of} betas and {spread} variances differ")
            })
        }
        (Ok(_), Err(reason)) => Some(format!("it was skipped ({reason}) and can be estimated")),
        (Err(reason), Ok(_)) => Some(format!("it cannot be estimated: {reason}")),
        (Err(again), Err(recorded)) => {
            (again != recorded).then(|| format!("it is skipped because {again}, not {recorded}"))
        }
    };
    if let Some(found) = found {
        tally.differs(format!("{place}: {found}"));
    }
    if (again.volumes, again.missing) != (recorded.volumes, recorded.missing) {
        tally.differs(format!(
            "{place}: {} volumes, {} missing, recorded were {} and {}",
            again.volumes, again.missing, recorded.volumes, recorded.missing
        ));
    }
}

/// Makes pictures again.
struct Pictures<'a> {
    arguments: &'a Arguments,
    session: &'a SessionFile,
    bundle: &'a Bundle,
}

impl Pictures<'_> {
    fn replay(&self, trials: &[TrialMessage], tally: &mut Tally) -> Result<(), ReplayError> {
        let library = decoder::runtime::find_library(self.arguments.onnxruntime.as_deref())?;
        let runtime = Runtime::load(&library, self.arguments.threads)?;
        let recorded = self.arguments.session.join("pictures");
        let mut decoders: BTreeMap<&'static str, Decoder> = BTreeMap::new();
        for (done, trial) in trials.iter().enumerate() {
            progress(done + 1, trials.len());
            let Some(note) = decode::read_note(&recorded, trial) else {
                tally.undecoded += 1;
                continue;
            };
            let place = format!("run {}, trial {}, {}", trial.run, trial.trial, trial.tier);
            if note.bundle != self.bundle.digest() {
                tally.differs(format!(
                    "{place}: it was decoded with bundle {}, this one is {}",
                    note.bundle,
                    self.bundle.digest()
                ));
                continue;
            }
            let name = decode::fidelity_name(note.fidelity);
            if !decoders.contains_key(name) {
                let decoder = self.load(&runtime, note.fidelity)?;
                decoders.insert(name, decoder);
            }
            if let Some(decoder) = decoders.get(name) {
                self.compare(decoder, trial, &recorded, &place, tally)?;
            }
        }
        Ok(())
    }

    fn load(&self, runtime: &Runtime, fidelity: Fidelity) -> Result<Decoder, ReplayError> {
        let subject = &self.session.subject;
        Ok(Decoder::load(runtime, self.bundle, subject, fidelity)?)
    }

    fn compare(
        &self,
        decoder: &Decoder,
        trial: &TrialMessage,
        recorded: &Path,
        place: &str,
        tally: &mut Tally,
    ) -> Result<(), ReplayError> {
        let made =
            pipeline::decode_trial(decoder, trial, self.session.seed, &mut |_: Progress<'_>| {})?;
        let key = pipeline::noise_key(self.session.seed, trial);
        let random_weights = self.bundle.manifest().random_weights;
        let pictures = [
            (PictureKind::Blurry, &made.blurry),
            (PictureKind::Unrefined, &made.picture),
            (PictureKind::Refined, &made.refined),
        ];
        for (kind, picture) in pictures {
            let path = decode::picture_path(recorded, trial, kind);
            let before = fs::read(&path).ok();
            let Some(picture) = picture else {
                if before.is_some() {
                    tally.differs(format!("{place}: no {} picture now", kind.as_str()));
                }
                continue;
            };
            let png = decode::encode(picture, self.bundle.digest(), key, random_weights)?;
            if let Some(out) = &self.arguments.out {
                let out = out.join("pictures");
                record::create_private(&out).map_err(record::at(&out))?;
                record::write_whole(&decode::picture_path(&out, trial, kind), &png)?;
            }
            match before {
                Some(before) if before == png => tally.pictures += 1,
                Some(_) => tally.differs(format!("{place}: another {} picture", kind.as_str())),
                // What the box was told to do without then can be made now.
                None => tally.undecoded += 1,
            }
        }
        Ok(())
    }
}

fn progress(done: usize, of: usize) {
    let mut out = std::io::stderr();
    if out.is_terminal() {
        let end = if done == of { "\n" } else { "" };
        // A courtesy; a closed standard error stops nothing.
        let _ = write!(out, "\rtrial {done} of {of} {end}");
    }
}

fn report(session: &SessionFile, tally: &Tally) -> Result<(), ReplayError> {
    let mut out = std::io::stdout();
    writeln!(
        out,
        "session {}: {} runs, {} volumes; {} estimates and {} skipped trials replayed, {} pictures \
         the same to the byte, {} not on record",
        session.id,
        tally.runs,
        tally.volumes,
        tally.betas,
        tally.skipped,
        tally.pictures,
        tally.undecoded
    )?;
    for difference in &tally.differences {
        writeln!(out, "differs: {difference}")?;
    }
    if tally.more > 0 {
        writeln!(out, "and {} more differences", tally.more)?;
    }
    Ok(())
}
