//! One run: its volumes, its trials, and which trial is due.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ndarray::{Array1, Array2};
use ndarray_npy::WriteNpyExt;
use rtfmri::events::Event;
use rtfmri::glm::{self, GlmError, GlmSettings};
use rtfmri::zscore::{RunningZScore, ZScoreError};
use rtfmri::{Mask, MotionError, Realigner, Rigid};
use serde::{Deserialize, Serialize};
use wire::{TrialMessage, VolumeMessage};

use crate::logging::chain;
use crate::pipeline::{self, AlignError, AlignedVolume};
use crate::record::{self, Journal, RecordError};

/// Volumes that must have come after a hole before the hole is taken for good.
const PATIENCE_VOLUMES: usize = 2;
/// Volumes that may be lost in one piece; a number further ahead is not believed.
const MAX_JUMP: u32 = 400;
/// Longest run: two hours at the shortest TR.
const MAX_VOLUMES: u32 = 24_000;

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

/// Why a run cannot begin.
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
    /// The record cannot be written or read.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// What a run needs to know besides its volumes.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The subject's voxels.
    pub(crate) mask: Mask,
    /// The stimuli, by onset; empty where the events file cannot be used.
    pub(crate) events: Vec<Event>,
    /// Model of the response, with a TR that each run replaces by its own.
    pub(crate) glm: GlmSettings,
    /// TR that every run must have, milliseconds.
    pub(crate) tr_ms: Option<f64>,
}

/// A trial's outcome, as it is recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum StoredTrial {
    /// Estimated.
    Fitted {
        /// From 1.
        trial: u32,
        /// Volumes used.
        volumes: u32,
        /// Volumes missing among those expected.
        missing: u32,
        /// `[voxel]`, scanner units.
        betas: Vec<f64>,
    },
    /// Given up.
    Skipped {
        /// From 1.
        trial: u32,
        /// Why, as a sentence's end.
        reason: String,
    },
}

/// What became of a due trial.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// Estimated.
    Ready(TrialMessage),
    /// Given up.
    Skipped {
        /// From 1.
        trial: u32,
        /// Why.
        reason: String,
    },
}

/// One run.
pub(crate) struct Run {
    /// Within the session, from 1.
    pub(crate) index: u32,
    /// Hash of its series' UID.
    pub(crate) series: [u8; 16],
    patient: u64,
    /// Repetition time, milliseconds.
    pub(crate) tr_ms: f64,
    dir: PathBuf,
    plan: Plan,
    realigner: Realigner,
    motion: Rigid,
    volumes: BTreeMap<u32, AlignedVolume>,
    volumes_journal: Journal,
    trials_journal: Journal,
    zscore: RunningZScore,
    betas: Vec<Option<Array1<f64>>>,
    zbetas: Vec<Option<Array1<f64>>>,
    next_trial: usize,
    /// Holes, by frame, with the moment each was noticed.
    holes: BTreeMap<u32, Instant>,
    /// Holes that were given up.
    lost: BTreeSet<u32>,
    last_arrival: Instant,
    end_reported: bool,
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
        plan.mask
            .sample(&volume)
            .map_err(AlignError::from)
            .map_err(VolumeError::from)?;
        let realigner = Realigner::new(&volume)?;
        let mut bytes = Vec::new();
        let path = dir.join("reference.bin");
        wire::write(&mut bytes, first).map_err(|source| RecordError::Frame {
            path: path.clone(),
            source,
        })?;
        let kept = record::write_whole(&path, &bytes);
        let mut run = Run::new(index, dir, plan, first, realigner)?;
        run.recorded(kept);
        Ok(run)
    }

    /// Takes a run up again from its record; `None` where it never had a reference.
    pub(crate) fn resume(index: u32, dir: PathBuf, plan: Plan) -> Result<Option<Run>, RunError> {
        let Ok(bytes) = fs::read(dir.join("reference.bin")) else {
            return Ok(None);
        };
        let Ok(first) = wire::read::<VolumeMessage>(&mut bytes.as_slice()) else {
            return Ok(None);
        };
        let volume = pipeline::volume_of(first.clone()).ok_or(VolumeError::Shape)?;
        let realigner = Realigner::new(&volume)?;
        Run::new(index, dir, plan, &first, realigner).map(Some)
    }

    fn new(
        index: u32,
        dir: PathBuf,
        plan: Plan,
        first: &VolumeMessage,
        realigner: Realigner,
    ) -> Result<Run, RunError> {
        let (volumes_journal, volumes) = Journal::open::<AlignedVolume>(&dir.join("volumes.bin"))?;
        let (trials_journal, trials) = Journal::open::<StoredTrial>(&dir.join("trials.bin"))?;
        let voxels = plan.mask.len();
        let mut plan = plan;
        plan.glm.tr_s = first.tr_ms / 1e3;
        let mut run = Run {
            index,
            series: first.series,
            patient: first.patient,
            tr_ms: first.tr_ms,
            dir,
            plan,
            realigner,
            motion: Rigid::identity(),
            volumes: volumes
                .into_iter()
                .filter(|volume| volume.voxels.len() == voxels)
                .map(|volume| (volume.frame, volume))
                .collect(),
            volumes_journal,
            trials_journal,
            zscore: RunningZScore::new(voxels),
            betas: Vec::new(),
            zbetas: Vec::new(),
            next_trial: 0,
            holes: BTreeMap::new(),
            lost: BTreeSet::new(),
            last_arrival: Instant::now(),
            end_reported: false,
            arrays_stale: false,
            recording: Recording::Works,
        };
        run.note_holes();
        for stored in trials {
            let betas = match stored {
                StoredTrial::Fitted { betas, .. } if betas.len() == voxels => Some(betas.into()),
                _ => None,
            };
            // What could be standardised once can be again.
            let _ = run.advance(betas);
            run.arrays_stale = true;
        }
        Ok(run)
    }

    /// Trials in the events file.
    pub(crate) fn trials(&self) -> u32 {
        u32::try_from(self.plan.events.len()).unwrap_or(u32::MAX)
    }

    /// Volumes that are in.
    pub(crate) fn volumes(&self) -> usize {
        self.volumes.len()
    }

    /// Hashes of the names of files that are in.
    pub(crate) fn files(&self) -> impl Iterator<Item = [u8; 16]> + '_ {
        self.volumes.values().map(|volume| volume.file)
    }

    /// Adds a volume; `None` where it was there already.
    pub(crate) fn add(
        &mut self,
        message: VolumeMessage,
        arrived_ms: u64,
        file: [u8; 16],
    ) -> Result<Option<u32>, VolumeError> {
        let number = message.number;
        let ahead = u32::try_from(self.highest())
            .unwrap_or(MAX_VOLUMES)
            .saturating_add(MAX_JUMP);
        let limit = if self.volumes.is_empty() {
            MAX_VOLUMES
        } else {
            ahead.min(MAX_VOLUMES)
        };
        if !(1..=limit).contains(&number) {
            return Err(VolumeError::Number {
                found: number,
                limit,
            });
        }
        if message.patient != self.patient {
            return Err(VolumeError::Patient);
        }
        if (message.tr_ms - self.tr_ms).abs() > 0.5 {
            return Err(VolumeError::Tr {
                expected: self.tr_ms,
                found: message.tr_ms,
            });
        }
        let frame = number - 1;
        if self.volumes.contains_key(&frame) {
            return Ok(None);
        }
        let volume = pipeline::volume_of(message).ok_or(VolumeError::Shape)?;
        let (motion, voxels) =
            pipeline::align(&volume, &self.plan.mask, &self.realigner, &self.motion)?;
        let aligned = AlignedVolume {
            frame,
            motion: motion.parameters(),
            voxels: voxels.to_vec(),
            arrived_ms,
            file,
        };
        // A full disk stops the recording and not the run.
        let kept = self.volumes_journal.append(&aligned);
        self.recorded(kept);
        self.motion = motion;
        self.volumes.insert(frame, aligned);
        self.note_holes();
        self.last_arrival = Instant::now();
        self.end_reported = false;
        Ok(Some(number))
    }

    /// Keeps track of frames that are missing below the highest.
    fn note_holes(&mut self) {
        let end = u32::try_from(self.highest()).unwrap_or(MAX_VOLUMES);
        self.holes
            .retain(|frame, _| !self.volumes.contains_key(frame));
        let known = self
            .holes
            .last_key_value()
            .map_or(0, |(frame, _)| frame + 1);
        let known = known.max(self.lost.last().map_or(0, |frame| frame + 1));
        // Frames below were looked at before; between two looks the highest only grows.
        let start = if self.holes.is_empty() && self.lost.is_empty() {
            0
        } else {
            known
        };
        let now = Instant::now();
        for frame in start..end {
            if !self.volumes.contains_key(&frame) {
                self.holes.insert(frame, now);
            }
        }
    }

    /// Takes holes for good: volumes came after them, and nothing has filled them for two TR.
    ///
    /// To be called when no file is waiting; files of a backlog come in any order.
    pub(crate) fn give_up_holes(&mut self) {
        let idle = self.last_arrival.elapsed() > self.idle();
        let mut given_up = Vec::new();
        for (&frame, noticed) in &self.holes {
            let after = self.volumes.range(frame..).count();
            if idle || (after >= PATIENCE_VOLUMES && noticed.elapsed() > self.idle()) {
                given_up.push(frame);
            }
        }
        for frame in given_up {
            self.holes.remove(&frame);
            self.lost.insert(frame);
        }
    }

    /// Remembers the first failure of the record until it is told.
    fn recorded(&mut self, kept: Result<(), RecordError>) {
        match kept {
            Ok(()) => {
                if self.recording == Recording::Told {
                    self.recording = Recording::Works;
                }
            }
            Err(error) => {
                if self.recording == Recording::Works {
                    self.recording = Recording::Failed(chain(&error));
                }
            }
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

    /// Fits the next trial if its volumes are in; call until there is none.
    ///
    /// Trials are fitted in their order, because each is standardised over those before it.
    pub(crate) fn next_due(&mut self) -> Option<Outcome> {
        let event = self.plan.events.get(self.next_trial)?;
        let glm = &self.plan.glm;
        let needed = glm::volumes_needed(event.onset_s, glm.tr_s, glm.delay_s);
        let end = u32::try_from(needed).unwrap_or(u32::MAX);
        let highest = self.highest();
        if highest == 0 || highest < needed || self.holes.range(..end).next().is_some() {
            return None;
        }
        let trial = self.next_trial;
        let fitted = pipeline::fit_trial(
            glm,
            &self.plan.events,
            trial,
            self.volumes.values(),
            self.plan.mask.len(),
        );
        Some(self.settle(trial, needed, fitted))
    }

    /// Gives up the trials that the run ended before; `None` while volumes may still come.
    pub(crate) fn ended_early(&mut self, stopping: bool) -> Option<String> {
        let waiting = self.plan.events.len().saturating_sub(self.next_trial);
        let idle = self.last_arrival.elapsed() > 10 * self.idle();
        if waiting == 0 || self.end_reported || !(stopping || idle) {
            return None;
        }
        self.end_reported = true;
        Some(format!(
            "run {}: no volume after number {}, {waiting} of {} trials are not complete: trial {} \
             onwards",
            self.index,
            self.highest(),
            self.plan.events.len(),
            self.next_trial + 1
        ))
    }

    fn idle(&self) -> Duration {
        Duration::from_secs_f64((2.0 * self.plan.glm.tr_s).max(1.0))
    }

    fn highest(&self) -> usize {
        let last = self
            .volumes
            .last_key_value()
            .map(|(frame, _)| *frame as usize + 1);
        last.unwrap_or(0)
    }

    /// How many of the first `needed` volumes are in.
    fn have(&self, needed: usize) -> usize {
        let end = u32::try_from(needed).unwrap_or(u32::MAX);
        self.volumes.range(..end).count()
    }

    fn settle(
        &mut self,
        trial: usize,
        needed: usize,
        fitted: Result<Array1<f64>, GlmError>,
    ) -> Outcome {
        let number = u32::try_from(trial + 1).unwrap_or(u32::MAX);
        let have = self.have(needed);
        let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let stored = match &fitted {
            Ok(betas) => StoredTrial::Fitted {
                trial: number,
                volumes: count(have),
                missing: count(needed.saturating_sub(have)),
                betas: betas.to_vec(),
            },
            Err(error) => StoredTrial::Skipped {
                trial: number,
                reason: error.to_string(),
            },
        };
        // On record first: what is told is never taken back.
        let kept = self.trials_journal.append(&stored);
        self.recorded(kept);
        let zbetas = self.advance(fitted.as_ref().ok().cloned());
        self.arrays_stale = true;
        let reason = match (&fitted, zbetas) {
            (Ok(_), Ok(Some(zbetas))) => return Outcome::Ready(self.message(trial, &zbetas)),
            (Ok(_), Err(error)) => error.to_string(),
            (Err(error), _) => error.to_string(),
            (Ok(_), Ok(None)) => "its betas are missing".into(),
        };
        Outcome::Skipped {
            trial: number,
            reason,
        }
    }

    /// Takes the next trial's betas, or that it has none.
    fn advance(&mut self, betas: Option<Array1<f64>>) -> Result<Option<Array1<f64>>, ZScoreError> {
        self.next_trial += 1;
        let zbetas = betas
            .as_ref()
            .map(|betas| self.zscore.push(betas.view()))
            .transpose();
        self.zbetas.push(zbetas.as_ref().ok().cloned().flatten());
        self.betas.push(betas);
        zbetas
    }

    /// Every trial that is estimated so far, ready to decode.
    pub(crate) fn messages(&self) -> Vec<TrialMessage> {
        let ready = self.zbetas.iter().enumerate();
        ready
            .filter_map(|(trial, zbetas)| Some(self.message(trial, zbetas.as_ref()?)))
            .collect()
    }

    fn message(&self, trial: usize, zbetas: &Array1<f64>) -> TrialMessage {
        let onset_s = self
            .plan
            .events
            .get(trial)
            .map_or(0.0, |event| event.onset_s);
        let glm = &self.plan.glm;
        let needed = glm::volumes_needed(onset_s, glm.tr_s, glm.delay_s);
        let have = self.have(needed);
        let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "networks take single precision"
        )]
        let zbetas = zbetas.iter().map(|&value| value as f32).collect();
        TrialMessage {
            run: self.index,
            trial: count(trial + 1),
            onset_s,
            stimulus_at_ms: self.wall_clock_ms(onset_s),
            volumes: count(have),
            missing: count(needed.saturating_sub(have)),
            zbetas,
        }
    }

    /// When a time of the run was, by the arrival of the volumes around it: volume `n` arrives when
    /// it is complete, `n` TR after the run began.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "milliseconds and volume numbers are far below 2^52, and negative times saturate"
    )]
    fn wall_clock_ms(&self, time_s: f64) -> Option<u64> {
        let at = time_s / self.plan.glm.tr_s;
        let arrival = |volumes: f64| {
            let frame = (volumes.max(1.0) - 1.0) as u32;
            let (low, before) = self.volumes.range(..=frame).next_back()?;
            Some((f64::from(*low) + 1.0, before.arrived_ms as f64))
        };
        let (n, ms) = arrival(at.floor())?;
        // The pace around this place: real time on a scanner, faster in a simulation.
        let pace = match arrival(at.floor() + 1.0) {
            Some((next, next_ms)) if next > n => (next_ms - ms) / (next - n),
            _ => self.tr_ms,
        };
        Some((ms + (at - n) * pace).max(0.0) as u64)
    }

    /// Writes `betas.npy` and `zbetas.npy`, `[trial, voxel]`, if trials came since the last time;
    /// skipped trials are NaN. For a quiet moment: the files are rewritten whole.
    pub(crate) fn write_arrays(&mut self) {
        if !std::mem::take(&mut self.arrays_stale) {
            return;
        }
        let written = [("betas.npy", &self.betas), ("zbetas.npy", &self.zbetas)]
            .into_iter()
            .try_for_each(|(name, rows)| {
                let mut array = Array2::from_elem((rows.len(), self.plan.mask.len()), f64::NAN);
                for (mut row, values) in array.rows_mut().into_iter().zip(rows) {
                    if let Some(values) = values {
                        row.assign(values);
                    }
                }
                write_npy(&self.dir.join(name), &array)
            });
        self.recorded(written);
    }
}

fn write_npy(path: &Path, array: &Array2<f64>) -> Result<(), RecordError> {
    let mut bytes = Vec::new();
    array
        .write_npy(&mut bytes)
        .map_err(|error| record::at(path)(std::io::Error::other(error.to_string())))?;
    record::write_whole(path, &bytes)
}
