//! One run as it happens: volumes in, each on record, trials when they are due, and its end.
//!
//! What the run *is* stands in [`state`] and follows from its log's entries alone; here are the
//! clock, the log and the decisions: which volume is taken, which hole is given up, when the run is
//! over. Each decision is an entry, written first and then taken.

mod backlog;
mod state;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ndarray::{Array1, Array2, ArrayView1};
use ndarray_npy::WriteNpyExt;
use rtfmri::events::Event;
use rtfmri::quality::{Monitor, Quality, QualitySettings};
use rtfmri::registration::{Freedom, RegistrationError, register};
use rtfmri::timing::{Arrival, Timeline, TimingFault};
use rtfmri::volume::Affine;
use rtfmri::{Mask, MotionError, Realigner, Rigid, Volume};
use wire::{Tier, TrialMessage, VolumeMessage, VolumeQuality};

use self::backlog::Backlog;
pub(crate) use self::state::{State, Taken, TierPlan};
use crate::logging::chain;
use crate::pipeline::{self, AlignError, AlignedVolume, VolumeStart};
use crate::record::entry::{Began, RunEnd, RunEntry, StoredModel, StoredPrior};
use crate::record::log::{self, Log};
use crate::record::{self, RecordError};
use crate::trigger;

/// The log's name in a run's folder.
pub(crate) const LOG: &str = "run.log";
/// Most of the mask that may be out of view, one in so many voxels.
const MAX_OUTSIDE: usize = 10;
/// Volumes that must have come after a hole before the hole is taken for good.
const PATIENCE_VOLUMES: usize = 2;
/// Volumes that may be lost in one piece; a number further ahead is not believed.
const MAX_JUMP: u32 = 400;
/// Longest run: two hours at the shortest TR.
const MAX_VOLUMES: u32 = 24_000;
/// Without a volume for so many TR, a run that expects more is said to stall.
const STALLED_TR: f64 = 1.5;
/// Pauses that proved ordinary raise that, up to here.
const MAX_STALLED_TR: f64 = 5.0;
/// Without a volume for so many TR, a run that has all its trials is over.
const OVER_TR: f64 = 3.0;
/// And one that has not.
const STOPPED_TR: f64 = 20.0;

/// Why a volume was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// Another TR than the run's.
    #[error("its TR is {found} ms, the run's is {expected} ms")]
    Tr {
        /// The run's.
        expected: f64,
        /// The volume's.
        found: f64,
    },
    /// Another patient's file in the same series.
    #[error("it is another patient's than the run's first volume")]
    Patient,
    /// A volume number beyond any run, or far ahead of this one.
    #[error("its number is {found}, expected 1..={limit}")]
    Number {
        /// The volume's.
        found: u32,
        /// The largest believed now.
        limit: u32,
    },
    /// Voxels that do not fill the declared shape.
    #[error("its voxels do not fill its shape")]
    Shape,
    /// Grid or head differ.
    #[error(transparent)]
    Align(#[from] AlignError),
}

/// Why a run cannot begin or be taken up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// A TR that the site does not expect.
    #[error("its TR is {found} ms, scanner.tr_ms says {expected} ms")]
    Tr {
        /// As set.
        expected: f64,
        /// The volume's.
        found: f64,
    },
    /// The volume's grid is not the mask's, or holds no head.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The first volume cannot serve as reference.
    #[error("the first volume cannot serve as reference")]
    Reference(#[from] MotionError),
    /// The run cannot be registered to the trained space.
    #[error("the first volume cannot be registered to subject.reference")]
    Registration(#[from] RegistrationError),
    /// Too much of the mask is out of view.
    #[error("{outside} of the mask's {voxels} voxels lie outside the first volume")]
    OutOfView {
        /// Voxels outside.
        outside: usize,
        /// Voxels of the mask.
        voxels: usize,
    },
    /// The record cannot be written or read.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// What a run needs to know besides its volumes.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The subject's voxels.
    pub(crate) mask: Mask,
    /// The volume that mask and model were made on, where runs are registered to it.
    pub(crate) trained: Option<(Volume, Freedom)>,
    /// The stimuli, by onset; empty where the events file cannot be used.
    pub(crate) events: Vec<Event>,
    /// How trials are estimated; each run has its own TR.
    pub(crate) model: StoredModel,
    /// What is known of the voxels' betas before.
    pub(crate) prior: Option<StoredPrior>,
    /// TR that every run must have, milliseconds.
    pub(crate) tr_ms: Option<f64>,
}

/// What was seen last on the way of a volume, for the sentence about a stall.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hops {
    /// The last file that was noticed, of any series.
    pub(crate) file: Option<Instant>,
    /// The last pulse of the trigger line; `None` also where there is no line.
    pub(crate) pulse: Option<Instant>,
    /// There is a trigger line.
    pub(crate) has_line: bool,
}

/// What follows the head and the clock from volume to volume.
struct Follow {
    realigner: Realigner,
    /// From the trained space to the run's reference.
    registration: Option<Affine>,
    /// Where the head was in the last volume.
    motion: Rigid,
    monitor: Monitor,
    timeline: Timeline,
}

impl Follow {
    fn new(realigner: Realigner, registration: Option<Affine>, timeline: Timeline) -> Follow {
        Follow {
            monitor: monitor(&realigner),
            realigner,
            registration,
            motion: Rigid::identity(),
            timeline,
        }
    }
}

fn monitor(realigner: &Realigner) -> Monitor {
    Monitor::new(QualitySettings::default(), realigner.centre_lps())
}

/// From the trained space to a run's first volume; `None` where mask and volumes have one grid.
///
/// Each run is registered anew: between two runs the head may lie anywhere, and a run's first volume
/// comes before any of its trials.
fn registration(plan: &Plan, first: &Volume) -> Result<Option<Affine>, RunError> {
    let Some((trained, freedom)) = &plan.trained else {
        plan.mask
            .check_grid(first)
            .map_err(AlignError::from)
            .map_err(VolumeError::from)?;
        return Ok(None);
    };
    let found = register(trained, first, *freedom)?;
    let map = found.matrix_lps();
    let outside = plan
        .mask
        .count_outside(first, &map)
        .map_err(AlignError::from)
        .map_err(VolumeError::from)?;
    tracing::info!(
        overlap = found.overlap(),
        correlation_ratio = found.correlation_ratio(),
        outside,
        "run registered to the trained space"
    );
    let voxels = plan.mask.len();
    if outside > voxels / MAX_OUTSIDE {
        return Err(RunError::OutOfView { outside, voxels });
    }
    Ok(Some(map))
}

/// When a file came, on both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Came {
    /// Unix milliseconds.
    pub(crate) at_ms: u64,
    /// Milliseconds on the box's monotonic clock.
    pub(crate) monotonic_ms: f64,
}

/// A volume that was taken.
#[derive(Debug)]
pub(crate) struct Added {
    /// From 1.
    pub(crate) number: u32,
    /// What it shows.
    pub(crate) quality: VolumeQuality,
    /// What its timing shows.
    pub(crate) timing: Vec<TimingFault>,
}

/// One run.
pub(crate) struct Run {
    /// Within the session, from 1.
    pub(crate) index: u32,
    dir: PathBuf,
    mask: Mask,
    state: State,
    log: Log,
    backlog: Backlog,
    follow: Follow,
    /// Holes, by frame, with the moment each was noticed.
    holes: BTreeMap<u32, Instant>,
    last_arrival: Instant,
    /// A stall was told, and no volume came since.
    stalled: bool,
    /// Pauses longer than this are told, TR.
    patience_tr: f64,
    arrays_stale: bool,
    recording: Recording,
}

/// Whether what happens is on record.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Recording {
    Works,
    /// It failed, and nobody has been told yet.
    Failed(String),
    /// It failed, and that was said.
    Told,
}

impl Run {
    /// Begins a run with its first volume as reference; the volume itself is still to be added.
    pub(crate) fn begin(
        index: u32,
        dir: PathBuf,
        plan: Plan,
        first: &VolumeMessage,
        timeline: Timeline,
    ) -> Result<Run, RunError> {
        if let Some(expected) = plan.tr_ms
            && (expected - first.tr_ms).abs() > 0.5
        {
            return Err(RunError::Tr {
                expected,
                found: first.tr_ms,
            });
        }
        let volume = pipeline::volume_of(first.clone()).ok_or(VolumeError::Shape)?;
        // A grid that is not the mask's is refused here, once, and not volume by volume.
        let registration = registration(&plan, &volume)?;
        let realigner = Realigner::new(&volume)?;
        let began = Began {
            reference: first.clone(),
            voxels: u32::try_from(plan.mask.len()).unwrap_or(u32::MAX),
            registration,
            model: plan.model,
            prior: plan.prior.clone(),
            software: env!("CARGO_PKG_VERSION").into(),
            at_ms: record::now_ms(),
        };
        let (log, _) = Log::open::<RunEntry>(&dir.join(LOG))?;
        let state = State::begin(plan.events, &began);
        let follow = Follow::new(realigner, registration, timeline);
        let mut run = Run::new(index, dir, plan.mask, state, log, follow);
        run.record(RunEntry::Began(began));
        Ok(run)
    }

    /// Takes a run up again from its log; `None` where it had not begun.
    ///
    /// - `timeline`: the run's clock, from its first volume and the last one whose start is known
    ///   (frame, and milliseconds on the box's monotonic clock).
    pub(crate) fn resume(
        index: u32,
        dir: PathBuf,
        plan: Plan,
        timeline: impl FnOnce(&VolumeMessage, Option<(u32, f64)>) -> Timeline,
    ) -> Result<Option<Run>, RunError> {
        let (log, entries) = Log::open::<RunEntry>(&dir.join(LOG))?;
        let mut entries = entries.into_iter();
        let Some(RunEntry::Began(began)) = entries.next() else {
            return Ok(None);
        };
        let volume = pipeline::volume_of(began.reference.clone()).ok_or(VolumeError::Shape)?;
        let realigner = Realigner::new(&volume)?;
        let mut state = State::begin(plan.events, &began);
        let mut monitor = monitor(&realigner);
        let mut motion = Rigid::identity();
        for entry in entries {
            if let RunEntry::Volume(volume) = &entry {
                let before = Rigid::from_parameters(volume.motion, realigner.centre_lps());
                let voxels = ArrayView1::from(&volume.voxels);
                if volume.voxels.len() == state.voxels() {
                    monitor.push(volume.frame, &before, voxels, ArrayView1::from(&[]));
                    motion = before;
                }
            }
            // What was told is told again all together, by `messages`.
            let _ = state.take(index, entry);
        }
        let known = state.places().iter().rev().find_map(|(frame, place)| {
            let since_ms = trigger::now_unix_ms() - place.pulse_ms?;
            Some((*frame, trigger::now_ms() - since_ms))
        });
        let follow = Follow {
            monitor,
            motion,
            ..Follow::new(
                realigner,
                began.registration,
                timeline(&began.reference, known),
            )
        };
        let mut run = Run::new(index, dir, plan.mask, state, log, follow);
        run.arrays_stale = true;
        run.note_holes();
        Ok(Some(run))
    }

    fn new(index: u32, dir: PathBuf, mask: Mask, state: State, log: Log, follow: Follow) -> Run {
        Run {
            index,
            dir,
            mask,
            state,
            log,
            backlog: Backlog::default(),
            follow,
            holes: BTreeMap::new(),
            last_arrival: Instant::now(),
            stalled: false,
            patience_tr: STALLED_TR,
            arrays_stale: false,
            recording: Recording::Works,
        }
    }

    /// What is known of the run.
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// Trials in the events file.
    pub(crate) fn trials(&self) -> u32 {
        u32::try_from(self.state.events().len()).unwrap_or(u32::MAX)
    }

    /// Hashes of the names of files that are in.
    pub(crate) fn files(&self) -> impl Iterator<Item = [u8; 16]> + '_ {
        self.state.places().values().map(|place| place.file)
    }

    /// Whether everything that happened is on the disk.
    pub(crate) fn is_on_record(&self) -> bool {
        self.backlog.is_empty()
    }

    /// Hears a pulse of the trigger line, milliseconds on the box's monotonic clock.
    pub(crate) fn pulse(&mut self, at_ms: f64) {
        if self.state.ended().is_none() {
            self.follow.timeline.pulse(at_ms);
        }
    }

    /// Adds a volume; `None` where it was there already.
    pub(crate) fn add(
        &mut self,
        message: VolumeMessage,
        came: Came,
        file: [u8; 16],
    ) -> Result<Option<Added>, VolumeError> {
        let number = message.number;
        let mut timing = Vec::new();
        match self.align(message, came, file, &mut timing) {
            Ok(Some(aligned)) => {
                let (late, quality) = (aligned.late, aligned.quality);
                self.record(RunEntry::Volume(aligned));
                self.note_holes();
                let pause_tr = self.pause_tr();
                if std::mem::take(&mut self.stalled) && !late {
                    // A scanner that hands over several volumes at once pauses like this every time.
                    self.patience_tr = (pause_tr * 1.2).clamp(self.patience_tr, MAX_STALLED_TR);
                }
                self.last_arrival = Instant::now();
                Ok(Some(Added {
                    number,
                    quality,
                    timing,
                }))
            }
            Ok(None) => {
                let frame = number.saturating_sub(1);
                // After a restart the parts of a volume are read again, and make the same one.
                let place = self.state.places().get(&frame);
                if place.is_none_or(|place| place.file != file) {
                    self.record(RunEntry::Doubled {
                        frame,
                        at_ms: record::now_ms(),
                    });
                }
                Ok(None)
            }
            Err(error) => {
                self.record(RunEntry::Refused {
                    number,
                    reason: chain(&error),
                    at_ms: record::now_ms(),
                });
                Err(error)
            }
        }
    }

    fn align(
        &mut self,
        message: VolumeMessage,
        came: Came,
        file: [u8; 16],
        timing: &mut Vec<TimingFault>,
    ) -> Result<Option<AlignedVolume>, VolumeError> {
        let (number, header_ms) = (message.number, message.time_ms);
        let highest = self.state.highest();
        let limit = match highest {
            0 => MAX_VOLUMES,
            highest => highest.saturating_add(MAX_JUMP).min(MAX_VOLUMES),
        };
        if !(1..=limit).contains(&number) {
            return Err(VolumeError::Number {
                found: number,
                limit,
            });
        }
        if message.patient != self.state.patient {
            return Err(VolumeError::Patient);
        }
        if (message.tr_ms - self.state.tr_ms).abs() > 0.5 {
            return Err(VolumeError::Tr {
                expected: self.state.tr_ms,
                found: message.tr_ms,
            });
        }
        let frame = number - 1;
        if self.state.places().contains_key(&frame) {
            return Ok(None);
        }
        let volume = pipeline::volume_of(message).ok_or(VolumeError::Shape)?;
        let follow = &mut self.follow;
        let (motion, voxels) = pipeline::align(
            &volume,
            &self.mask,
            &follow.realigner,
            follow.registration.as_ref(),
            &follow.motion,
        )?;
        follow.motion = motion;
        let arrival = Arrival {
            frame,
            arrived_ms: came.monotonic_ms,
            header_ms,
        };
        let start = follow.timeline.volume(arrival, timing);
        let quality = follow
            .monitor
            .push(frame, &motion, voxels.view(), ArrayView1::from(&[]));
        Ok(Some(AlignedVolume {
            frame,
            motion: motion.parameters(),
            voxels: voxels.to_vec(),
            start: VolumeStart {
                at_ms: trigger::now_unix_ms() + start.start_ms - trigger::now_ms(),
                known: start.how.into(),
            },
            quality: shown(&quality),
            late: self.state.ended().is_some() || number < highest,
            arrived_ms: came.at_ms,
            file,
        }))
    }

    /// Writes an entry down and takes it; a full disk stops the recording and not the run.
    fn record(&mut self, entry: RunEntry) -> Taken {
        let log = &mut self.log;
        let kept = self.backlog.write(&entry, |entry| log.append(entry));
        self.recorded(kept);
        self.state.take(self.index, entry)
    }

    /// Writes what waits for room.
    fn write_down(&mut self) {
        let log = &mut self.log;
        let kept = self.backlog.flush(|entry| log.append(entry));
        self.recorded(kept);
    }

    /// Remembers the first failure of the record until it is told.
    fn recorded(&mut self, kept: Result<(), RecordError>) {
        match (kept, &self.recording) {
            (Err(error), Recording::Works) => self.recording = Recording::Failed(chain(&error)),
            (Ok(()), Recording::Told) if !self.backlog.is_cut() => {
                self.recording = Recording::Works
            }
            _ => {}
        }
    }

    /// Keeps track of frames that are missing below the highest.
    fn note_holes(&mut self) {
        let now = Instant::now();
        let missing: Vec<u32> = self.state.holes(u32::MAX).collect();
        self.holes.retain(|frame, _| missing.contains(frame));
        for frame in missing {
            self.holes.entry(frame).or_insert(now);
        }
    }

    /// Takes holes for good: volumes came after them, and nothing has filled them for two TR.
    ///
    /// To be called when no file is waiting; files of a backlog come in any order.
    pub(crate) fn give_up_holes(&mut self) {
        let patience = self.tr(2.0).max(Duration::from_secs(1));
        let idle = self.last_arrival.elapsed() > patience;
        let given_up: Vec<u32> = self
            .holes
            .iter()
            .filter(|(frame, noticed)| {
                let after = self.state.places().range(**frame..).count();
                idle || (after >= PATIENCE_VOLUMES && noticed.elapsed() > patience)
            })
            .map(|(frame, _)| *frame)
            .collect();
        for frame in given_up {
            self.holes.remove(&frame);
            self.record(RunEntry::Lost {
                frame,
                at_ms: record::now_ms(),
            });
        }
    }

    /// What to tell about the record, once per failure.
    pub(crate) fn alarm(&mut self) -> Option<String> {
        match std::mem::replace(&mut self.recording, Recording::Told) {
            Recording::Failed(reason) => Some(format!(
                "Run {}: recording stopped: {reason}. The run goes on; make room on the disk of \
                 paths.state",
                self.index
            )),
            before => {
                self.recording = before;
                None
            }
        }
    }

    /// Whether every trial was decoded once.
    pub(crate) fn saw_every_trial(&self) -> bool {
        !self.state.events().is_empty() && self.state.waiting() == 0
    }

    /// Whether a trial can be decoded now.
    pub(crate) fn is_due(&self) -> bool {
        self.state.due().is_some()
    }

    /// Fits one trial that is due, earlier tiers first; `None` where there is none.
    pub(crate) fn fit_next(&mut self) -> Option<Taken> {
        let (tier, trial) = self.state.due()?;
        let stored = self.state.fit(tier, trial, record::now_ms());
        self.arrays_stale = true;
        // On record first: what is told is never taken back.
        Some(self.record(RunEntry::Trial(stored)))
    }

    /// Says, once per pause, that no volume comes although some should.
    pub(crate) fn stall(&mut self, hops: &Hops) -> Option<String> {
        let expects = self.state.highest() < self.state.needed_by_all();
        let pause_tr = self.pause_tr();
        if self.stalled
            || !expects
            || self.state.ended().is_some()
            || pause_tr < self.patience_tr
            || self.last_arrival.elapsed() < Duration::from_millis(500)
        {
            return None;
        }
        self.stalled = true;
        let recent = |at: Option<Instant>| at.is_some_and(|at| at.elapsed() < self.tr(2.0));
        let hop = if hops.file.is_some_and(|at| at > self.last_arrival) {
            "a file came since and is not a volume of this run yet: look at the faults above"
        } else if recent(hops.pulse) {
            "pulses still come, so the scanner scans: look at its export and at the network or share"
        } else if hops.has_line {
            "no pulse comes either: the scanner has stopped or paused"
        } else {
            "no file comes: the scanner has stopped, or its export or the share has"
        };
        Some(format!(
            "Run {}: no volume for {:.1} s ({pause_tr:.1} TR) after number {}: {hop}",
            self.index,
            self.last_arrival.elapsed().as_secs_f64(),
            self.state.highest(),
        ))
    }

    /// Takes the run to be over where it looks like it.
    ///
    /// - `followed`: a later run began.
    ///
    /// Returns what to tell where trials are left.
    pub(crate) fn end_if_over(&mut self, followed: bool) -> Option<String> {
        if self.state.ended().is_some() || self.state.highest() == 0 {
            return None;
        }
        let idle = self.last_arrival.elapsed();
        let over = idle > self.tr(OVER_TR).max(Duration::from_secs(2));
        let end = if over && self.state.waiting() == 0 {
            RunEnd::Complete
        } else if over && followed {
            RunEnd::Followed
        } else if idle > self.tr(STOPPED_TR).max(Duration::from_secs(20)) {
            RunEnd::Stopped
        } else {
            return None;
        };
        self.end(end)
    }

    /// Ends the run: what was seen of it is decoded once more.
    fn end(&mut self, end: RunEnd) -> Option<String> {
        self.record(RunEntry::Ended {
            end,
            at_ms: record::now_ms(),
        });
        self.left()
    }

    /// What to tell about trials that are not complete when the role stops.
    pub(crate) fn left_at_stop(&self) -> Option<String> {
        let open = self.state.ended().is_none() && self.state.highest() > 0;
        if open { self.left() } else { None }
    }

    fn left(&self) -> Option<String> {
        let (waiting, trials) = (self.state.waiting(), self.state.events().len());
        (waiting > 0).then(|| {
            format!(
                "Run {}: no volume after number {}, {waiting} of {trials} trials are not complete: \
                 trial {} onwards",
                self.index,
                self.state.highest(),
                trials - waiting + 1
            )
        })
    }

    fn tr(&self, times: f64) -> Duration {
        // A run's TR was checked when it began.
        Duration::try_from_secs_f64(times * self.state.tr_ms / 1e3)
            .unwrap_or(Duration::from_secs(5))
    }

    fn pause_tr(&self) -> f64 {
        self.last_arrival.elapsed().as_secs_f64() * 1e3 / self.state.tr_ms
    }

    /// Every trial that is estimated so far, ready to decode.
    pub(crate) fn messages(&self) -> Vec<TrialMessage> {
        self.state.messages(self.index)
    }

    /// Writes each tier's `betas.npy` and `zbetas.npy`, `[trial, voxel]`, if trials came since the
    /// last time; skipped trials are NaN. For a quiet moment: the files are rewritten whole.
    pub(crate) fn write_arrays(&mut self) {
        self.write_down();
        if !std::mem::take(&mut self.arrays_stale) {
            return;
        }
        let kept = write_arrays(&self.dir, &self.state);
        self.recorded(kept);
    }
}

/// A volume's quality as it is recorded and told.
#[expect(clippy::cast_possible_truncation, reason = "shown with a few digits")]
fn shown(quality: &Quality) -> VolumeQuality {
    let short = |value: Option<f64>| value.map(|value| value as f32);
    VolumeQuality {
        displacement_mm: quality.displacement_mm as f32,
        fd_power_mm: short(quality.fd_power_mm),
        fd_jenkinson_mm: short(quality.fd_jenkinson_mm),
        drift_mm: quality.drift_mm as f32,
        dvars: short(quality.mask.dvars),
        dvars_standardised: short(quality.mask.dvars_standardised),
        tsnr: short(quality.mask.tsnr),
        spike: quality.is_spike(),
        drifting: quality.drifting,
    }
}

/// Writes the arrays of every tier that has trials into `dir`.
pub(crate) fn write_arrays(dir: &Path, state: &State) -> Result<(), RecordError> {
    let voxels = state.voxels();
    for tier in Tier::ALL {
        for (name, rows) in ["betas", "zbetas"].into_iter().zip(state.arrays(tier)) {
            if rows.is_empty() {
                continue;
            }
            let path = dir.join(format!("{tier}-{name}.npy"));
            write_npy(&path, rows, voxels)?;
        }
    }
    Ok(())
}

fn write_npy(path: &Path, rows: &[Option<Array1<f64>>], voxels: usize) -> Result<(), RecordError> {
    let mut array = Array2::from_elem((rows.len(), voxels), f64::NAN);
    for (mut row, values) in array.rows_mut().into_iter().zip(rows) {
        if let Some(values) = values {
            row.assign(values);
        }
    }
    let mut bytes = Vec::new();
    array
        .write_npy(&mut bytes)
        .map_err(|error| record::at(path)(std::io::Error::other(error.to_string())))?;
    record::write_whole(path, &bytes)
}

/// Entries of a run's log, for those who only look.
pub(crate) fn entries(dir: &Path) -> Result<Vec<RunEntry>, RecordError> {
    log::read(&dir.join(LOG))
}
