//! The role that waits for nobody: volumes in, trials out, everything on record.
//!
//! ```text
//! watch thread ────┐
//!                  ├─files─► read thread ──(child)──► main thread: runs, trials, record ──► publisher
//! receive thread ──┘
//! ```
//!
//! The main thread owns all state and drains one bounded queue. The threads before it may wait for
//! room: files stay in the folder and are found again, and who sends objects is told to send them
//! again. Nothing waits for a listener.

mod images;
pub(crate) mod parser;
mod plan;
mod quarantine;
mod receive;
pub(crate) mod run;
mod slices;
mod sources;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use rtfmri::Mask;
use rtfmri::glm::GlmSettings;
use rtfmri::timing::{Timeline, TimingFault};
use wire::{
    FromAcquire, ParseReply, SessionMessage, SliceMessage, Tier, TrialMessage, VolumeMessage,
};

pub(crate) use self::plan::read_bounded;
use self::quarantine::Quarantine;
pub(crate) use self::run::TierPlan;
use self::run::{Came, Hops, Plan, Run, RunError, Taken};
use self::slices::Slices;
use self::sources::{Event, READ_AHEAD, ReadFile, spawn_readers};
use self::watch::Found;
use crate::link::{Keep, Publisher, trial_key};
use crate::logging::chain;
use crate::record::entry::{SessionEntry, StoredModel};
use crate::record::log::Log;
use crate::record::{self, About, RecordError, Session};
use crate::roles::RoleError;
use crate::settings::Settings;
use crate::trigger::{self, Trigger};

/// The socket's name in the runtime folder.
pub(crate) const SOCKET: &str = "acquire.sock";
const TICK: Duration = Duration::from_millis(100);
/// How long to wait for another acquire to end.
const LOCK_WITHIN: Duration = Duration::from_secs(10);
/// Runs of one session that are held; more means that series are being misread.
const MAX_RUNS: usize = 32;
/// Files that are refused for one reason and named each; later ones are counted.
const MAX_NAMED: u64 = 12;
/// Reasons that are told apart when files are counted.
const MAX_REASONS: usize = 64;

/// Runs the role until `stop`.
///
/// # Errors
/// [`RoleError`] where it cannot start; what happens to a single file or run is a fault and no end.
pub(crate) fn main(settings: &Settings, stop: &Arc<AtomicBool>) -> Result<(), RoleError> {
    let _lock = lock(settings)?;
    let (mask, mask_sha256) = plan::load_mask(settings)?;
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
    let trigger = Trigger::start(settings.trigger.as_ref(), stop)
        .map_err(|source| RoleError::Thread { source })?;
    let mut acquire = Acquire::new(settings, mask, session, publisher, trigger)?;
    let (sender, receiver) = sync_channel(READ_AHEAD);
    let started_at_ms = acquire.session.file.started_at_ms;
    let incoming = acquire.session.dir.join("incoming");
    let readers = spawn_readers(
        settings,
        started_at_ms,
        acquire.known_files(),
        incoming,
        &sender,
        stop,
    )?;
    drop(sender);
    crate::roles::ready();
    acquire.drain(&receiver, &readers, stop)
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

/// Why a run does not begin.
enum Refusal {
    /// Its series is not one of this session's runs.
    Lasting(String),
    /// The disk has no room for it now.
    Now(String),
}

/// The clock of a run whose first volume this is.
fn timeline(trigger: &Trigger, first: &VolumeMessage, known: Option<(u32, f64)>) -> Timeline {
    let slice_times: Option<Vec<f64>> = first
        .slice_times_ms
        .as_ref()
        .map(|times| times.iter().map(|&time| f64::from(time)).collect());
    trigger.timeline(first.tr_ms, slice_times.as_deref(), known)
}

/// The role's state.
struct Acquire {
    settings: Settings,
    plan: Plan,
    session: Session,
    /// What belongs to no run.
    log: Log,
    publisher: Publisher,
    quarantine: Quarantine,
    runs: BTreeMap<[u8; 16], Run>,
    refused_series: BTreeSet<[u8; 16]>,
    /// Series whose run could not be recorded when it was to begin.
    delayed_series: BTreeSet<[u8; 16]>,
    /// Files put aside, by reason.
    put_aside: BTreeMap<String, u64>,
    trigger: Trigger,
    /// Files of slices whose volume is not complete, by series and volume.
    slice_files: BTreeMap<([u8; 16], u32), Vec<Found>>,
    /// Received objects whose run waits for room on the disk, with their series; the spool bounds them.
    unsettled: Vec<([u8; 16], Found)>,
    slices: Slices,
    faults: u64,
    hops: Hops,
}

impl Acquire {
    fn new(
        settings: &Settings,
        mask: Mask,
        session: Session,
        publisher: Publisher,
        trigger: Trigger,
    ) -> Result<Acquire, RoleError> {
        let glm = GlmSettings {
            max_missing_share: settings.max_missing_share,
            ..GlmSettings::new(1.0, settings.hrf, settings.noise)
        };
        let prior = plan::load_prior(settings, mask.len())?;
        let plan = Plan {
            mask,
            trained: plan::load_trained(settings)?,
            events: Vec::new(),
            model: StoredModel::of(&glm, settings.tiers, settings.average_repeats),
            prior,
            tr_ms: settings.tr_ms,
        };
        let quarantine = Quarantine::open(session.dir.join("quarantine"));
        let (log, _) = Log::open::<SessionEntry>(&session.dir.join(record::SESSION_LOG))?;
        let mut acquire = Acquire {
            settings: settings.clone(),
            plan,
            session,
            log,
            publisher,
            quarantine,
            runs: BTreeMap::new(),
            refused_series: BTreeSet::new(),
            delayed_series: BTreeSet::new(),
            put_aside: BTreeMap::new(),
            trigger,
            slice_files: BTreeMap::new(),
            unsettled: Vec::new(),
            slices: Slices::default(),
            faults: 0,
            hops: Hops {
                has_line: settings.trigger.is_some(),
                ..Hops::default()
            },
        };
        acquire.write_down(&SessionEntry::Opened {
            software: env!("CARGO_PKG_VERSION").into(),
            at_ms: record::now_ms(),
        });
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
            let clock = |first: &VolumeMessage, known| timeline(&self.trigger, first, known);
            match Run::resume(index, dir, plan, clock) {
                Ok(Some(run)) => {
                    let volumes = run.state().places().len();
                    tracing::info!(run = index, volumes, "run taken up again");
                    for trial in run.messages() {
                        self.tell_trial(trial);
                    }
                    self.runs.insert(run.state().series, run);
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

    fn drain(
        &mut self,
        events: &Receiver<Event>,
        readers: &[JoinHandle<()>],
        stop: &Arc<AtomicBool>,
    ) -> Result<(), RoleError> {
        while !stop.load(Ordering::Relaxed) {
            // Only a defect ends one of them before it is asked to; the session stays open.
            if readers.iter().any(JoinHandle::is_finished) && !stop.load(Ordering::Relaxed) {
                return Err(RoleError::Readers);
            }
            // One trial at a time, and none before a volume that waits.
            let due = self.runs.values().any(Run::is_due);
            let patience = if due { Duration::ZERO } else { TICK };
            let event = events.recv_timeout(patience);
            // A volume's pulse came before it did.
            self.take_pulses();
            match event {
                Ok(Event::Fault(text)) => self.fault(text),
                Ok(Event::Read(read)) => {
                    self.hops.file = Some(read.file.noticed);
                    self.read(*read);
                }
                Err(RecvTimeoutError::Timeout) => self.look_after_runs(due),
                // All of them are gone: asked to, or by a defect, which the next look tells apart.
                Err(RecvTimeoutError::Disconnected) => {}
            }
            self.fit_what_is_due();
            let alarms: Vec<String> = self.runs.values_mut().filter_map(Run::alarm).collect();
            self.faults(alarms);
        }
        self.finish();
        Ok(())
    }

    /// Takes what became of a file; its place is given up once that is on record, or said.
    fn read(&mut self, read: ReadFile) {
        let settled = read.can_be_given_up();
        match read.reply {
            Ok(ParseReply::Volume(volume)) => {
                let series = volume.series;
                self.volume(volume, &read.file, read.arrived_ms);
                self.settle(Some(series), read.file);
            }
            Ok(ParseReply::Slice(slice)) => self.slice(slice, read.file, read.arrived_ms),
            // Told as volumes by the reader.
            Ok(ParseReply::Image(_)) => self.settle(None, read.file),
            Ok(ParseReply::Refused { reason }) | Err(reason) => {
                if self.put_aside(&read.file, &read.bytes, &reason) && settled {
                    self.settle(None, read.file);
                }
            }
        }
    }

    fn slice(&mut self, slice: SliceMessage, file: Found, arrived_ms: u64) {
        let place = (slice.series, slice.number);
        match self.slices.add(slice) {
            // It is needed again, should this process die before its volume is whole.
            Ok(slices::Taken::Waiting) => self.hold(place, file),
            Ok(slices::Taken::Complete(volume)) => {
                let whole = slices::of_volume(&file, &volume);
                self.volume(*volume, &whole, arrived_ms);
                let held = self.slice_files.remove(&place).unwrap_or_default();
                for file in held.into_iter().chain([file]) {
                    self.settle(Some(place.0), file);
                }
            }
            Ok(slices::Taken::Useless) => self.settle(None, file),
            Err(reason) => {
                self.fault(reason);
                self.settle(None, file);
            }
        }
    }

    /// Gives a file's place up, now or once its run is on the disk: what was acknowledged to a sender
    /// lies nowhere else.
    fn settle(&mut self, series: Option<[u8; 16]>, file: Found) {
        let run = series.and_then(|series| self.runs.get(&series));
        if run.is_none() && series.is_some_and(|series| self.delayed_series.contains(&series)) {
            // It is not on record: a restart reads it again.
            return;
        }
        if run.is_none_or(Run::is_on_record) {
            file.give_up();
        } else if let Some(series) = series.filter(|_| file.spooled.is_some()) {
            self.unsettled.push((series, file));
        }
    }

    /// Keeps a slice's file until its volume is on record. An export that goes slice by slice through the
    /// whole run would fill the spool and wait for itself: of too many files the oldest are given up.
    fn hold(&mut self, place: ([u8; 16], u32), file: Found) {
        if file.spooled.is_none() {
            return;
        }
        self.slice_files.entry(place).or_default().push(file);
        let mut held: usize = self.slice_files.values().map(Vec::len).sum();
        while held > self.settings.queue / 2 {
            let noticed = |files: &Vec<Found>| files.first().map(|file| file.noticed);
            let oldest = self
                .slice_files
                .iter()
                .min_by_key(|(_, files)| noticed(files));
            let Some(oldest) = oldest.map(|(place, _)| *place) else {
                return;
            };
            let files = self.slice_files.remove(&oldest).unwrap_or_default();
            held -= files.len();
            files.iter().for_each(Found::give_up);
        }
    }

    /// What can wait until no file does.
    fn look_after_runs(&mut self, busy: bool) {
        let newest = self.runs.values().map(|run| run.index).max();
        let mut told = Vec::new();
        for run in self.runs.values_mut() {
            run.give_up_holes();
            told.extend(run.stall(&self.hops));
            told.extend(run.end_if_over(Some(run.index) != newest));
            if !busy {
                run.write_arrays();
            }
        }
        self.faults(told);
        for (series, file) in std::mem::take(&mut self.unsettled) {
            self.settle(Some(series), file);
        }
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
            && let Err(refusal) = self.begin_run(&volume)
        {
            match refusal {
                Refusal::Lasting(reason) => {
                    self.refused_series.insert(series);
                    self.fault(format!("A series is refused: {reason}"));
                }
                Refusal::Now(reason) => {
                    if self.delayed_series.insert(series) {
                        self.fault(format!(
                            "A run cannot begin: {reason}. It begins with the next volume for which \
                             there is room on the disk of paths.state"
                        ));
                    }
                }
            }
            return;
        }
        let Some(run) = self.runs.get_mut(&series) else {
            return;
        };
        let index = run.index;
        let number = volume.number;
        let came = Came {
            at_ms: arrived_ms,
            monotonic_ms: trigger::ms_of(file.noticed),
        };
        match run.add(volume, came, file.id) {
            Ok(Some(added)) => {
                let took_ms = file.noticed.elapsed().as_secs_f64() * 1e3;
                tracing::info!(run = index, took_ms, "volume in");
                let message = FromAcquire::Volume {
                    run: index,
                    volume: added.number,
                    took_ms,
                    quality: added.quality,
                };
                self.publisher.publish(&message, Keep::Under(2));
                self.tell_timing(index, &added.timing);
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

    /// Gives the pulses that came to the runs' clocks.
    fn take_pulses(&mut self) {
        let drained = self.trigger.drain();
        if !drained.pulses.is_empty() {
            self.hops.pulse = Some(Instant::now());
            for run in self.runs.values_mut() {
                drained.pulses.iter().for_each(|&at_ms| run.pulse(at_ms));
            }
            self.write_down(&SessionEntry::Pulses(drained.pulses));
        }
        self.faults(drained.told);
    }

    /// Says what a volume's timing shows: to the operator where there is a trigger line, on record
    /// where there is none to look after.
    fn tell_timing(&mut self, run: u32, found: &[TimingFault]) {
        for found in found {
            let text = format!("Run {run}: {found}");
            if self.settings.trigger.is_some() {
                self.fault(text);
            } else {
                tracing::info!(note = %text, "timing");
                self.write_down(&SessionEntry::Note {
                    text,
                    at_ms: record::now_ms(),
                });
            }
        }
    }

    fn begin_run(&mut self, first: &VolumeMessage) -> Result<(), Refusal> {
        if self.runs.len() >= MAX_RUNS {
            return Err(Refusal::Lasting(format!(
                "this session has {MAX_RUNS} runs already; begin another session"
            )));
        }
        let disk = |error: RecordError| Refusal::Now(chain(&error));
        let recorded = self.session.runs().map_err(disk)?;
        let held = self.runs.values().map(|run| run.index);
        let index = held.chain(recorded).max().unwrap_or(0) + 1;
        let dir = self.session.run_dir(index).map_err(disk)?;
        let plan = self.plan_of_run(index);
        let timeline = timeline(&self.trigger, first, None);
        let begun = Run::begin(index, dir.clone(), plan, first, timeline);
        let run = begun.map_err(|error| {
            // A run that never began leaves no folder.
            let _ = fs::remove_dir_all(&dir);
            match error {
                RunError::Record(error) => disk(error),
                error => Refusal::Lasting(chain(&error)),
            }
        })?;
        tracing::info!(
            run = index,
            tr_ms = run.state().tr_ms,
            trials = run.trials(),
            "run began"
        );
        if let Some(state) = self.trigger.state() {
            tracing::info!(run = run.index, ?state, "trigger line");
        }
        self.announce(&run);
        self.runs.insert(run.state().series, run);
        Ok(())
    }

    fn announce(&self, run: &Run) {
        let message = FromAcquire::RunStarted {
            run: run.index,
            tr_ms: run.state().tr_ms,
            trials: run.trials(),
        };
        self.publisher.publish(&message, Keep::Under(1));
    }

    /// The plan with the events as they are now: copied into the record at the first look, so that
    /// a later change of the file does not change a run.
    fn plan_of_run(&mut self, index: u32) -> Plan {
        let mut plan = self.plan.clone();
        let seen = self.runs.values().filter(|run| run.saw_every_trial());
        let number = u32::try_from(seen.count() + 1).unwrap_or(u32::MAX);
        let path = plan::events_path(&self.settings.events, number);
        let events = self
            .session
            .run_dir(index)
            .map_err(|error| chain(&error))
            .and_then(|dir| plan::events_of_run(&dir, &path));
        match events {
            Ok(events) => plan.events = events,
            Err(reason) => self.fault(format!(
                "Run {index} is recorded, but no trial of it can be decoded now: the events file {} \
                 {reason}",
                path.display()
            )),
        }
        plan
    }

    /// Fits one trial of each run that has one to fit.
    fn fit_what_is_due(&mut self) {
        let mut told = Vec::new();
        let mut faults = Vec::new();
        for run in self.runs.values_mut() {
            let started = Instant::now();
            let Some(taken) = run.fit_next() else {
                continue;
            };
            let took_ms = started.elapsed().as_secs_f64() * 1e3;
            tracing::info!(run = run.index, took_ms, "trial.fit");
            match taken {
                Taken::Ready(trial) => told.push(trial),
                // Said once: what cannot be estimated early is not said again later.
                Taken::Skipped {
                    trial,
                    tier: Tier::Fast,
                    reason,
                } => faults.push(format!(
                    "Run {}: trial {trial} is skipped: {reason}",
                    run.index
                )),
                Taken::Skipped {
                    trial,
                    tier,
                    reason,
                } => tracing::info!(run = run.index, trial, %tier, reason, "trial skipped"),
                Taken::Noted => {}
            }
        }
        for trial in told {
            self.tell_trial(trial);
        }
        self.faults(faults);
    }

    fn tell_trial(&self, trial: TrialMessage) {
        let key = trial_key(trial.run, trial.trial, trial.tier, 0);
        self.publisher
            .publish(&FromAcquire::Trial(trial), Keep::Under(key));
    }

    /// Puts a file aside; `false` where no copy of it could be kept.
    fn put_aside(&mut self, file: &Found, bytes: &[u8], reason: &str) -> bool {
        // Of what could not be read there is nothing to keep.
        let kept = match bytes {
            [] if file.len_bytes > 0 => Ok(None),
            bytes => self.quarantine.keep(file.id, bytes, reason),
        };
        let safe = kept.is_ok();
        self.write_down(&SessionEntry::PutAside {
            file: file.id,
            reason: reason.into(),
            at_ms: record::now_ms(),
        });
        let name = file.plain_name();
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
        // A localiser of two hundred slices is one sentence and not two hundred.
        let known = self.put_aside.len();
        let seen = match self.put_aside.get_mut(reason) {
            Some(seen) => {
                *seen += 1;
                *seen
            }
            // An outsider who makes up reasons is not named for each.
            None if known >= MAX_REASONS => MAX_NAMED + 1,
            None => {
                self.put_aside.insert(reason.into(), 1);
                1
            }
        };
        match seen.cmp(&MAX_NAMED) {
            std::cmp::Ordering::Less => self.fault(fault),
            std::cmp::Ordering::Equal => self.fault(format!(
                "{fault}. Further files with this reason are put aside without a word"
            )),
            std::cmp::Ordering::Greater => tracing::info!(reason, seen, "file put aside"),
        }
        safe
    }

    fn faults(&mut self, texts: Vec<String>) {
        for text in texts {
            self.fault(text);
        }
    }

    fn fault(&mut self, text: String) {
        tracing::warn!(fault = %text, "fault");
        self.write_down(&SessionEntry::Fault {
            text: text.clone(),
            at_ms: record::now_ms(),
        });
        self.faults += 1;
        // The last few dozen are told again to a page that comes later.
        let slot = 3 + self.faults % 12;
        self.publisher
            .publish(&FromAcquire::Fault { text }, Keep::Under(slot));
    }

    /// Writes to the session's log; where that fails, each run's own alarm says so.
    fn write_down(&mut self, entry: &SessionEntry) {
        if let Err(error) = self.log.append(entry) {
            tracing::warn!(error = %chain(&error), "the session's log cannot be written");
        }
    }

    fn finish(&mut self) {
        let mut ended = self.slices.incomplete();
        for run in self.runs.values_mut() {
            ended.extend(run.left_at_stop());
            run.write_arrays();
        }
        self.faults(ended);
    }
}
