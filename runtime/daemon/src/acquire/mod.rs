//! The role that waits for nobody: volumes in, trials out, everything on record.
//!
//! ```text
//! watch thread ──files──► parse thread ──(child)──► main thread: runs, trials, record ──► publisher
//! ```
//!
//! The main thread owns all state and drains one bounded queue. The two threads before it may wait
//! for room: files stay in the folder and are found again. Nothing waits for a listener.

mod parser;
mod quarantine;
mod run;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use rtfmri::glm::GlmSettings;
use rtfmri::{Mask, NiftiError, events};
use sha2::{Digest, Sha256};
use wire::{FromAcquire, ParseReply, SessionMessage, VolumeMessage};

use self::parser::{Parser, ParserError};
use self::quarantine::Quarantine;
use self::run::{Outcome, Plan, Run};
use self::watch::{Found, Notice, Watcher};
use crate::link::{Keep, Publisher, trial_key};
use crate::logging::chain;
use crate::record::{self, About, Session};
use crate::roles::RoleError;
use crate::settings::{ExistingFiles, Settings};

/// The socket's name in the runtime folder.
pub(crate) const SOCKET: &str = "acquire.sock";
const TICK: Duration = Duration::from_millis(100);
/// How long to wait for another acquire to end.
const LOCK_WITHIN: Duration = Duration::from_secs(10);
/// How often a file is tried again when the box, and not the file, is at fault.
const TRIES: u32 = 25;
/// Runs of one session that are held; more means that series are being misread.
const MAX_RUNS: usize = 32;
const MAX_MASK_BYTES: u64 = 64 << 20;

/// What the main thread hears.
enum Event {
    /// A file was read, for better or worse.
    Read(Box<ReadFile>),
    /// Something to tell the operator.
    Fault(String),
}

/// One file and what became of it.
struct ReadFile {
    file: Found,
    arrived_ms: u64,
    reply: Result<ParseReply, String>,
    /// Its bytes, where it must be put aside.
    bytes: Vec<u8>,
}

/// Files that were read and wait for the main thread: each may be a whole volume.
const READ_AHEAD: usize = 4;

/// Runs the role until `stop`.
///
/// # Errors
/// [`RoleError`] where it cannot start; what happens to a single file or run is a fault and no end.
pub(crate) fn main(settings: &Settings, stop: &Arc<AtomicBool>) -> Result<(), RoleError> {
    let _lock = lock(settings)?;
    let (mask, mask_sha256) = load_mask(settings)?;
    let about = About {
        label: settings.label.clone(),
        subject: settings.subject.clone(),
        mask: mask_sha256,
        seed: settings.seed,
    };
    let session = Session::open(&settings.state_dir, about)?;
    tracing::info!(session = %session.file.id, resumed = session.resumed, "session");
    let publisher = Publisher::bind(
        &settings.runtime_dir.join(SOCKET),
        "acquire",
        settings.queue,
    )
    .map_err(|source| RoleError::Socket { source })?;
    let mut acquire = Acquire::new(settings, mask, session, publisher)?;
    let (sender, receiver) = sync_channel(READ_AHEAD);
    let started_at_ms = acquire.session.file.started_at_ms;
    spawn_readers(
        settings,
        started_at_ms,
        acquire.known_files(),
        &sender,
        stop,
    )?;
    drop(sender);
    crate::roles::ready();
    acquire.drain(&receiver, stop)
}

/// One acquire at a time writes the record; the one before may be on its way out.
fn lock(settings: &Settings) -> Result<Flock<File>, RoleError> {
    record::create_private(&settings.state_dir).map_err(record::at(&settings.state_dir))?;
    let path = settings.state_dir.join("lock");
    let mut file = File::create(&path).map_err(record::at(&path))?;
    let deadline = Instant::now() + LOCK_WITHIN;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, _)) if Instant::now() < deadline => file = back,
            Err(_) => return Err(RoleError::Locked { path }),
        }
        thread::sleep(TICK);
    }
}

/// The mask, from the site or from the signed bundle, of as many voxels as the bundle maps; and the
/// hash of its file.
fn load_mask(settings: &Settings) -> Result<(Mask, String), RoleError> {
    let unverified = bundle::open(&settings.bundle)?;
    let subjects = &unverified.manifest().subjects;
    let Some(subject) = subjects
        .iter()
        .find(|subject| subject.id == settings.subject)
        .cloned()
    else {
        let known: Vec<&str> = subjects.iter().map(|subject| subject.id.as_str()).collect();
        return Err(RoleError::Setting(format!(
            "subject.id = {:?}: the bundle has {}",
            settings.subject,
            known.join(", ")
        )));
    };
    let (place, bytes) = match (&settings.mask, &subject.mask) {
        (Some(path), _) => {
            let place = format!("subject.mask = {}", path.display());
            let bytes = read_bounded(path, MAX_MASK_BYTES)
                .map_err(|error| RoleError::Setting(format!("{place}: {error}")))?;
            (place, bytes)
        }
        (None, Some(inside)) => {
            let key = bundle::PublicKey::from_file(&settings.key)?;
            (
                format!("{inside} of the bundle"),
                unverified.read_verified(&key, inside)?,
            )
        }
        (None, None) => {
            return Err(RoleError::Setting(format!(
                "subject.mask is not set and the bundle carries no mask for {}",
                subject.id
            )));
        }
    };
    let wrong = |reason: String| RoleError::Setting(format!("{place}: {reason}"));
    let mask = Mask::from_nifti(&bytes).map_err(|error: NiftiError| wrong(chain(&error)))?;
    if mask.len() as u64 != subject.voxels {
        return Err(wrong(format!(
            "expected {} voxels for {}, found {}",
            subject.voxels,
            subject.id,
            mask.len()
        )));
    }
    let hash = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok((mask, hash))
}

fn read_bounded(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(std::io::Error::other(format!("more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Starts the threads that find and read files.
fn spawn_readers(
    settings: &Settings,
    started_at_ms: u64,
    known: BTreeSet<[u8; 16]>,
    sender: &SyncSender<Event>,
    stop: &Arc<AtomicBool>,
) -> Result<(), RoleError> {
    let thread_error = |source| RoleError::Thread { source };
    let since = match settings.existing_files {
        ExistingFiles::Ignore => Some(started_at_ms),
        ExistingFiles::Take => None,
    };
    let (files, found) = sync_channel::<Found>(settings.queue);
    let (watching, stopping) = (sender.clone(), Arc::clone(stop));
    let folder = settings.folder.clone();
    thread::Builder::new()
        .name("watch".into())
        .spawn(move || {
            let watcher = Watcher::new(folder, since);
            watcher.run(&stopping, |notice| match notice {
                Notice::Found(file) if known.contains(&file.id) => true,
                Notice::Found(file) => files.send(file).is_ok(),
                Notice::FolderLost(reason) => watching
                    .send(Event::Fault(format!(
                        "The scanner's folder (scanner.folder) cannot be read: {reason}. Check the \
                         mount; volumes that arrive meanwhile are taken when it is back"
                    )))
                    .is_ok(),
                Notice::Full => watching
                    .send(Event::Fault(
                        "The scanner's folder (scanner.folder) holds too many files to watch, new \
                         ones are not taken: clear it out"
                            .into(),
                    ))
                    .is_ok(),
                Notice::FolderBack => watching
                    .send(Event::Fault("The scanner's folder is back".into()))
                    .is_ok(),
                Notice::Ignored(count) => {
                    tracing::info!(count, "files from before the session are ignored");
                    true
                }
            });
        })
        .map_err(thread_error)?;

    let (parsed, reading) = (sender.clone(), Arc::clone(stop));
    let limit = settings.max_file_bytes;
    let mut parser = Parser::new(settings.parse_timeout, settings.parse_memory_bytes);
    thread::Builder::new()
        .name("read".into())
        .spawn(move || {
            for file in found {
                let arrived_ms = arrival(&file);
                let (reply, bytes) = read_file(&file, limit, &mut parser, &reading);
                let read = ReadFile {
                    file,
                    arrived_ms,
                    reply,
                    bytes,
                };
                if parsed.send(Event::Read(Box::new(read))).is_err() {
                    return;
                }
            }
        })
        .map_err(thread_error)?;
    Ok(())
}

/// When a file arrived: by its own time of change, where that is believable, since a backlog is read
/// later than it arrived.
fn arrival(file: &Found) -> u64 {
    let now = record::now_ms();
    let believable = now.saturating_sub(24 * 3_600_000)..=now;
    if believable.contains(&file.changed_ms) {
        file.changed_ms
    } else {
        now
    }
}

/// Reads and parses one file; its bytes come back where it must be put aside.
fn read_file(
    file: &Found,
    limit: u64,
    parser: &mut Parser,
    stop: &AtomicBool,
) -> (Result<ParseReply, String>, Vec<u8>) {
    if file.len_bytes > limit {
        let reason = format!("it has {} bytes, expected at most {limit}", file.len_bytes);
        return (Err(reason), Vec::new());
    }
    let mut last = String::new();
    for _ in 0..TRIES {
        match read_bounded(&file.path, limit) {
            Ok(bytes) => match parser.parse(&bytes) {
                Ok(reply @ ParseReply::Volume(_)) => return (Ok(reply), Vec::new()),
                Ok(refused @ ParseReply::Refused { .. }) => return (Ok(refused), bytes),
                // The box is short of something; the file is not to blame.
                Err(error @ ParserError::Start(_)) => last = chain(&error),
                Err(error) => return (Err(chain(&error)), bytes),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return (Err("it is gone".into()), Vec::new());
            }
            // The system's reason alone: the name of the file is not shown.
            Err(error) => last = format!("it cannot be read: {}", error.kind()),
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        thread::sleep(2 * TICK);
    }
    (Err(last), Vec::new())
}

/// The role's state.
struct Acquire {
    settings: Settings,
    plan: Plan,
    session: Session,
    publisher: Publisher,
    quarantine: Quarantine,
    runs: BTreeMap<[u8; 16], Run>,
    refused_series: BTreeSet<[u8; 16]>,
    faults: u64,
}

impl Acquire {
    fn new(
        settings: &Settings,
        mask: Mask,
        session: Session,
        publisher: Publisher,
    ) -> Result<Acquire, RoleError> {
        let glm = GlmSettings {
            delay_s: settings.delay_s,
            max_missing_share: settings.max_missing_share,
            ..GlmSettings::new(1.0, settings.hrf, settings.noise)
        };
        let plan = Plan {
            mask,
            events: Vec::new(),
            glm,
            tr_ms: settings.tr_ms,
        };
        let quarantine = Quarantine::open(session.dir.join("quarantine"));
        let mut acquire = Acquire {
            settings: settings.clone(),
            plan,
            session,
            publisher,
            quarantine,
            runs: BTreeMap::new(),
            refused_series: BTreeSet::new(),
            faults: 0,
        };
        let session = &acquire.session.file;
        let message = FromAcquire::Session(SessionMessage {
            id: session.id.clone(),
            label: session.label.clone(),
            seed: session.seed,
        });
        acquire.publisher.publish(&message, Keep::Under(0));
        acquire.resume()?;
        Ok(acquire)
    }

    /// Takes up every run that is on record.
    fn resume(&mut self) -> Result<(), RoleError> {
        for index in self.session.runs()? {
            let dir = self.session.run_dir(index)?;
            let plan = self.plan_of_run(index);
            match Run::resume(index, dir, plan) {
                Ok(Some(run)) => {
                    tracing::info!(run = index, volumes = run.volumes(), "run taken up again");
                    for trial in run.messages() {
                        let key = trial_key(trial.run, trial.trial, 0);
                        self.publisher
                            .publish(&FromAcquire::Trial(trial), Keep::Under(key));
                    }
                    self.runs.insert(run.series, run);
                }
                Ok(None) => {}
                Err(error) => {
                    let reason = chain(&error);
                    self.fault(format!(
                        "Run {index} on record cannot be taken up again: {reason}"
                    ));
                }
            }
        }
        Ok(())
    }

    fn known_files(&self) -> BTreeSet<[u8; 16]> {
        self.runs.values().flat_map(Run::files).collect()
    }

    fn drain(&mut self, events: &Receiver<Event>, stop: &Arc<AtomicBool>) -> Result<(), RoleError> {
        while !stop.load(Ordering::Relaxed) {
            match events.recv_timeout(TICK) {
                Ok(Event::Fault(text)) => self.fault(text),
                Ok(Event::Read(read)) => match read.reply {
                    Ok(ParseReply::Volume(volume)) => {
                        self.volume(volume, &read.file, read.arrived_ms);
                    }
                    Ok(ParseReply::Refused { reason }) | Err(reason) => {
                        self.put_aside(&read.file, &read.bytes, &reason);
                    }
                },
                Err(RecvTimeoutError::Timeout) => {
                    for run in self.runs.values_mut() {
                        run.give_up_holes();
                        run.write_arrays();
                    }
                }
                // A reader thread is gone, which only a defect can cause; the session stays open.
                Err(RecvTimeoutError::Disconnected) => return Err(RoleError::Readers),
            }
            self.fit_what_is_due();
        }
        self.finish();
        Ok(())
    }

    fn volume(&mut self, volume: VolumeMessage, file: &Found, arrived_ms: u64) {
        let span = tracing::info_span!("volume.ingest", volume = volume.number);
        let _entered = span.enter();
        let series = volume.series;
        if self.refused_series.contains(&series) {
            tracing::debug!("volume of a refused series ignored");
            return;
        }
        if !self.runs.contains_key(&series)
            && let Err(reason) = self.begin_run(&volume)
        {
            self.refused_series.insert(series);
            self.fault(format!("A series is refused: {reason}"));
            return;
        }
        let Some(run) = self.runs.get_mut(&series) else {
            return;
        };
        let index = run.index;
        let number = volume.number;
        match run.add(volume, arrived_ms, file.id) {
            Ok(Some(volume)) => {
                let took_ms = file.noticed.elapsed().as_secs_f64() * 1e3;
                tracing::info!(run = index, took_ms, "volume in");
                let message = FromAcquire::Volume {
                    run: index,
                    volume,
                    took_ms,
                };
                self.publisher.publish(&message, Keep::Under(2));
            }
            Ok(None) => tracing::info!(run = index, "volume was in already, ignored"),
            Err(error) => {
                let reason = chain(&error);
                self.fault(format!(
                    "Run {index}: volume {number} is not used: {reason}"
                ));
            }
        }
    }

    fn begin_run(&mut self, first: &VolumeMessage) -> Result<(), String> {
        if self.runs.len() >= MAX_RUNS {
            return Err(format!(
                "this session has {MAX_RUNS} runs already; begin another session"
            ));
        }
        let recorded = self.session.runs().map_err(|error| chain(&error))?;
        let held = self.runs.values().map(|run| run.index);
        let index = held.chain(recorded).max().unwrap_or(0) + 1;
        let dir = self.session.run_dir(index).map_err(|error| chain(&error))?;
        let plan = self.plan_of_run(index);
        let begun = Run::begin(index, dir.clone(), plan, first);
        let run = begun.map_err(|error| {
            // A run that never began leaves no folder.
            let _ = fs::remove_dir_all(&dir);
            chain(&error)
        })?;
        tracing::info!(
            run = index,
            tr_ms = run.tr_ms,
            trials = run.trials(),
            "run began"
        );
        self.announce(&run);
        self.runs.insert(run.series, run);
        Ok(())
    }

    fn announce(&self, run: &Run) {
        let message = FromAcquire::RunStarted {
            run: run.index,
            tr_ms: run.tr_ms,
            trials: run.trials(),
        };
        self.publisher.publish(&message, Keep::Under(1));
    }

    /// The plan with the events as they are now: copied into the record at the first look, so that
    /// a later change of the file does not change a run.
    fn plan_of_run(&mut self, index: u32) -> Plan {
        let mut plan = self.plan.clone();
        match self.events_of_run(index) {
            Ok(events) => plan.events = events,
            Err(reason) => self.fault(format!(
                "Run {index} is recorded, but no trial of it can be decoded now: the events file {} \
                 {reason}",
                self.settings.events.display()
            )),
        }
        plan
    }

    fn events_of_run(&self, index: u32) -> Result<Vec<events::Event>, String> {
        let kept = self
            .session
            .run_dir(index)
            .map_err(|error| chain(&error))?
            .join("events.tsv");
        let path: PathBuf = if kept.is_file() {
            kept.clone()
        } else {
            self.settings.events.clone()
        };
        let bytes = read_bounded(&path, events::MAX_LEN_BYTES as u64)
            .map_err(|error| format!("cannot be read: {error}"))?;
        let parsed =
            events::parse(&bytes).map_err(|error| format!("is wrong: {}", chain(&error)))?;
        if path != kept {
            record::write_whole(&kept, &bytes).map_err(|error| chain(&error))?;
        }
        Ok(parsed)
    }

    fn fit_what_is_due(&mut self) {
        let mut told = Vec::new();
        let mut faults = Vec::new();
        for run in self.runs.values_mut() {
            let mut started = Instant::now();
            while let Some(outcome) = run.next_due() {
                let took_ms = started.elapsed().as_secs_f64() * 1e3;
                tracing::info!(run = run.index, took_ms, "trial.fit");
                match outcome {
                    Outcome::Ready(trial) => told.push(trial),
                    Outcome::Skipped { trial, reason } => {
                        faults.push(format!(
                            "Run {}: trial {trial} is skipped: {reason}",
                            run.index
                        ));
                    }
                }
                started = Instant::now();
            }
            faults.extend(run.alarm());
            faults.extend(run.ended_early(false));
        }
        for trial in told {
            let key = trial_key(trial.run, trial.trial, 0);
            self.publisher
                .publish(&FromAcquire::Trial(trial), Keep::Under(key));
        }
        for fault in faults {
            self.fault(fault);
        }
    }

    fn put_aside(&mut self, file: &Found, bytes: &[u8], reason: &str) {
        let kept = self.quarantine.keep(file.id, bytes, reason);
        let name = quarantine::plain_name(&file.path);
        let fault = match kept {
            Ok(Some(place)) => {
                format!("File {name} is not used: {reason}. A copy is kept as quarantine/{place}")
            }
            Ok(None) => format!("File {name} is not used: {reason}"),
            Err(error) => format!(
                "File {name} is not used: {reason}. No copy could be kept: {}",
                chain(&error)
            ),
        };
        self.fault(fault);
    }

    fn fault(&mut self, text: String) {
        tracing::warn!(fault = %text, "fault");
        self.faults += 1;
        // The last few dozen are told again to a page that comes later.
        let slot = 3 + self.faults % 12;
        self.publisher
            .publish(&FromAcquire::Fault { text }, Keep::Under(slot));
    }

    fn finish(&mut self) {
        let mut ended = Vec::new();
        for run in self.runs.values_mut() {
            run.write_arrays();
            ended.extend(run.ended_early(true));
        }
        for fault in ended {
            self.fault(fault);
        }
    }
}
