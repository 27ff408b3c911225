//! From arguments to a simulation, and the simulation itself.
//!
//! Everything is read, checked and decided first; then the truth is written, the pulse line opened
//! and the clock started. One thread sends pulses at their times, this one renders and exports.

use std::collections::BTreeMap;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use ndarray::Array2;
use rtfmri::events;
use rtfmri::glm::Hrf;
use rtfmri::{NiftiError, ResampleError, mosaic};

use super::arguments::{Arguments, HrfName};
use super::base::{Base, BaseError, count};
use super::encode::{EncodeError, Format, encode};
use super::faults::{Fault, FaultError};
use super::motion::{PathError, Pose, relative};
use super::output::{Output, OutputError, Parcel};
use super::pace::{Clock, HeaderClock};
use super::pulses::{PulseError, PulseLine};
use super::render::{Mix, Scanner, Subject, volumes_until};
use super::response::{ResponseError, Responses, Timing};
use super::shown::Shown;
use super::site::{SiteError, prepare, write_betas};
use super::stamp::Stamp;
use super::store::Store;
use super::timeline::{Delivery, Role, Run, Timeline, plan};
use super::truth::{BETAS_FILE, EventTruth, HeadTruth, ResponseTruth, Truth, of_any_source};
use crate::record;

/// Time after the last onset, seconds.
const TAIL_S: f64 = 12.0;
/// Longest run, volumes.
const MAX_VOLUMES: usize = 20_000;
/// So many volumes that leave at once are made ready beforehand.
const READY_AT_ONCE: usize = 64;
/// A volume that leaves later than this, seconds, is not on time.
const LATE_S: f64 = 0.05;

/// Why nothing was simulated, or not all of it.
#[derive(Debug, thiserror::Error)]
pub(super) enum SimulateError {
    #[error("cannot read or write {path}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("--volumes, --events or --site must say how long the run is")]
    Length,
    #[error("the run has {found} volumes, expected 3 to {MAX_VOLUMES}")]
    Volumes { found: usize },
    #[error("--{given} needs --{needs} or a --site")]
    Needs {
        given: &'static str,
        needs: &'static str,
    },
    #[error("--store sends DICOM, --format is not")]
    StoreFormat,
    #[error("the mask {path} cannot be read")]
    Mask { path: PathBuf, source: NiftiError },
    #[error("the events {path} cannot be read")]
    Events {
        path: PathBuf,
        source: events::EventsError,
    },
    #[error("the betas {path} cannot be read: {reason}")]
    Betas { path: PathBuf, reason: String },
    #[error("{path} holds no files")]
    EmptyFolder { path: PathBuf },
    #[error("volume {volume} of series {series} cannot be encoded")]
    Encode {
        series: usize,
        volume: usize,
        source: EncodeError,
    },
    #[error("--fault {0}")]
    Fault(#[from] FaultError),
    #[error(transparent)]
    Base(#[from] BaseError),
    #[error(transparent)]
    Motion(#[from] PathError),
    #[error(transparent)]
    Response(#[from] ResponseError),
    #[error(transparent)]
    Resample(#[from] ResampleError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Pulse(#[from] PulseError),
    #[error(transparent)]
    Site(#[from] SiteError),
    #[error(transparent)]
    Record(#[from] record::RecordError),
}

pub(super) fn io(path: &Path) -> impl Fn(std::io::Error) -> SimulateError {
    let path = path.to_path_buf();
    move |source| SimulateError::Io {
        path: path.clone(),
        source,
    }
}

/// Does what the arguments say.
pub(super) fn simulate(arguments: &Arguments) -> Result<(), SimulateError> {
    if let (Some(site), true) = (&arguments.site, arguments.prepare) {
        let voxels = usize::try_from(arguments.voxels).unwrap_or(usize::MAX);
        let base = base(arguments)?;
        return Ok(prepare(
            site,
            &base,
            arguments.seed,
            arguments.trials,
            voxels,
        )?);
    }
    Session::of(arguments)?.run(arguments)
}

fn base(arguments: &Arguments) -> Result<Base, BaseError> {
    match &arguments.base {
        Some(path) => Base::read(path),
        None => Ok(Base::synthetic(arguments.synthetic())),
    }
}

/// Where the files come from.
enum Source {
    /// A scanner makes them.
    Scanner(Box<Scanner>),
    /// They are there.
    Files(Vec<PathBuf>),
}

/// A simulation that can begin.
pub(super) struct Session {
    source: Source,
    timeline: Timeline,
    header_clock: HeaderClock,
    pub(super) truth: Truth,
    /// `[trial, voxel]`, scanner units.
    pub(super) betas: Option<Array2<f32>>,
    format: Format,
    /// UID of the study that all series belong to.
    study: String,
    patient: Option<String>,
}

impl Session {
    /// Reads and decides everything.
    pub(super) fn of(arguments: &Arguments) -> Result<Session, SimulateError> {
        if arguments.store.is_some() && !arguments.format.is_dicom() {
            return Err(SimulateError::StoreFormat);
        }
        possible(arguments)?;
        let began = arguments.start.unwrap_or_else(|| {
            let now_ms = i64::try_from(record::now_ms()).unwrap_or(i64::MAX);
            let now = DateTime::<Utc>::from_timestamp_millis(now_ms);
            now.unwrap_or_default().naive_utc()
        });
        match &arguments.replay {
            Some(folder) => Session::replaying(arguments, folder, began),
            None => Session::simulating(arguments, began),
        }
    }

    fn replaying(
        arguments: &Arguments,
        folder: &Path,
        began: chrono::NaiveDateTime,
    ) -> Result<Session, SimulateError> {
        let entries = fs::read_dir(folder).map_err(io(folder))?;
        let mut files: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_file())
            .collect();
        files.sort();
        if files.is_empty() {
            let path = folder.into();
            return Err(SimulateError::EmptyFolder { path });
        }
        let timeline = plan(&run(arguments, files.len()), &arguments.faults)?;
        let header_clock = HeaderClock {
            began,
            drift_ppm: 0.0,
        };
        let source = Source::Files(files);
        let named = |delivery: &Delivery| name(&source, arguments.format, delivery, "*");
        let truth = of_any_source(arguments, &timeline, &header_clock, named);
        Ok(Session {
            source,
            timeline,
            header_clock,
            truth,
            betas: None,
            format: arguments.format,
            study: String::new(),
            patient: None,
        })
    }

    fn simulating(
        arguments: &Arguments,
        began: chrono::NaiveDateTime,
    ) -> Result<Session, SimulateError> {
        let base = base(arguments)?;
        let shown = Shown::read(arguments, &base)?;
        let volumes = match (arguments.volumes, &shown) {
            (Some(volumes), _) => usize::try_from(volumes).unwrap_or(usize::MAX),
            (None, Some(shown)) => {
                let last_s = shown.events.last().map_or(0.0, |event| event.onset_s);
                volumes_until(last_s + TAIL_S, arguments.tr)
            }
            (None, None) => return Err(SimulateError::Length),
        };
        if !(3..=MAX_VOLUMES).contains(&volumes) {
            return Err(SimulateError::Volumes { found: volumes });
        }
        let timeline = plan(&run(arguments, volumes), &arguments.faults)?;
        let header_clock = HeaderClock {
            began,
            drift_ppm: timeline.clock_drift_ppm,
        };
        let timing = Timing {
            tr_s: arguments.tr,
            volumes,
            hrf: match arguments.hrf {
                HrfName::Glover => Hrf::Glover,
                HrfName::Spm => Hrf::Spm,
            },
        };
        let (events, responses) = match shown {
            Some(shown) => {
                let responses = Responses::new(shown.places, shown.betas, &shown.events, &timing)?;
                (shown.events, Some(responses))
            }
            None => (Vec::new(), None),
        };
        let poses = poses(arguments, &timeline)?;
        let mix = Mix {
            tsnr: arguments.tsnr,
            body_share: arguments.body_share,
            ar1: arguments.ar1,
            fwhm_mm: arguments.smooth_mm,
            drift_percent: arguments.drift,
        };
        let noise = mix.of(&base);
        let head = HeadTruth {
            dim: base.sides(),
            affine_ijk_to_ras_mm: base.affine_ras(),
            rotation_centre_ras_mm: base.centre_ras(),
            slice_timing: "every slice at the volume's start; do not correct slice timing",
            brightness: base.head,
            tsnr: mix.tsnr,
            thermal_sigma: noise.thermal,
            body_share: noise.body,
            ar1: mix.ar1,
            fwhm_mm: mix.fwhm_mm,
            drift_percent: mix.drift_percent,
        };
        let centre = base.centre_ras();
        let betas = responses.as_ref().map(|responses| responses.betas.clone());
        let response_truth = responses.as_ref().map(|responses| ResponseTruth {
            betas: BETAS_FILE,
            unit: "height of the trial's regressor, scanner units",
            hrf: match arguments.hrf {
                HrfName::Glover => "glover",
                HrfName::Spm => "spm",
            },
            n_trials: responses.betas.nrows(),
            n_mask_voxels: responses.betas.ncols(),
            peak_of_regressor: responses.peak(),
            events: events
                .into_iter()
                .map(|event| EventTruth {
                    onset: event.onset_s,
                    duration: event.duration_s,
                    trial_type: event.trial_type,
                })
                .collect(),
        });
        let subject = Subject {
            base,
            responses,
            noise,
            seed: arguments.seed,
            tr_s: arguments.tr,
        };
        // A series belongs to its seed and the moment it began at.
        let moment = u64::try_from(began.and_utc().timestamp_micros()).unwrap_or(0);
        let uid = |index: usize| {
            let low = u128::from(moment) << 8 | u128::try_from(index).unwrap_or(0);
            mosaic::series_uid(u128::from(arguments.seed) << 64 | low)
        };
        let study = uid(0).expose().to_owned();
        let uids: Vec<_> = (1..=timeline.series.len()).map(uid).collect();
        let source = Source::Scanner(Box::new(Scanner::new(
            subject,
            &timeline,
            uids.clone(),
            &poses,
        )));
        let named = |delivery: &Delivery| name(&source, arguments.format, delivery, "*");
        let mut truth = of_any_source(arguments, &timeline, &header_clock, named);
        truth.head = Some(head);
        truth.responses = response_truth;
        for (index, series) in truth.series.iter_mut().enumerate() {
            series.series_uid = Some(uids[index].expose().into());
            let poses = &poses[timeline.series[index].source];
            let from_base: Vec<_> = poses.iter().map(|pose| pose.matrix_ras(centre)).collect();
            series.motion_params_txyz_mm_rxyz_deg.clone_from(poses);
            series.matrices_ras = from_base
                .iter()
                .map(|matrix| relative(matrix, &from_base[0]))
                .collect();
            series.matrices_from_base_ras = from_base;
        }
        Ok(Session {
            source,
            timeline,
            header_clock,
            truth,
            betas,
            format: arguments.format,
            study,
            patient: arguments.patient.clone(),
        })
    }

    /// Lets it happen.
    fn run(mut self, arguments: &Arguments) -> Result<(), SimulateError> {
        let mut output = match (&arguments.into, &arguments.store) {
            (_, Some(address)) => {
                let store = Store::new(address, &arguments.called, &arguments.calling);
                Output::Store(Box::new(store))
            }
            (into, None) => {
                let into = into.clone().unwrap_or_default();
                fs::read_dir(&into).map_err(io(&into))?;
                match arguments.format {
                    Format::Nifti4d => Output::Growing(into, BTreeMap::new()),
                    _ => Output::Folder(into),
                }
            }
        };
        if let Some(dir) = arguments.truth.as_ref().or(arguments.site.as_ref()) {
            fs::create_dir_all(dir).map_err(io(dir))?;
            if let Some(betas) = &self.betas {
                write_betas(&dir.join(BETAS_FILE), betas)?;
            }
            record::write_json(&dir.join("truth.json"), &self.truth)?;
        }
        let line = match &arguments.pulses {
            Some(path) => Some(PulseLine::open(path)?),
            None => None,
        };
        let clock = Clock::starting_in(Duration::from_secs_f64(arguments.wait), arguments.speed);
        let pulses = std::mem::take(&mut self.timeline.pulses);
        let stop = AtomicBool::new(false);
        let (exported, sent) = std::thread::scope(|scope| {
            let sending = line.as_ref().map(|line| {
                let (clock, pulses, stop) = (&clock, &pulses, &stop);
                scope.spawn(move || line.send(pulses, clock, stop))
            });
            let exported = self.export(&mut output, &clock);
            if exported.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            let sent = sending.map(std::thread::ScopedJoinHandle::join);
            (exported, sent)
        });
        exported?;
        match sent {
            // A panic over there is one here as well.
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            Some(Ok(unread)) => {
                let unread = unread?;
                if unread > 0 {
                    say(&format!(
                        "nobody read the pulse line: {unread} pulses found it full"
                    ));
                }
            }
            None => {}
        }
        Ok(output.close()?)
    }

    /// Renders and sends every volume at its time.
    fn export(&mut self, output: &mut Output, clock: &Clock) -> Result<(), SimulateError> {
        let deliveries = std::mem::take(&mut self.timeline.deliveries);
        let (mut done, mut late, mut latest_s) = (0, 0, 0.0_f64);
        while let Some(next) = deliveries.get(done) {
            // What leaves at once is made ready together.
            let at_once = deliveries[done..]
                .iter()
                .take(READY_AT_ONCE)
                .take_while(|delivery| delivery.at_s <= next.at_s);
            let ready: Result<Vec<Vec<Parcel>>, _> =
                at_once.map(|delivery| self.parcels(delivery)).collect();
            let over_s = clock.wait_until(next.at_s);
            if over_s > LATE_S {
                late += 1;
                latest_s = latest_s.max(over_s);
            }
            for parcels in ready? {
                for parcel in &parcels {
                    output.deliver(parcel)?;
                }
                done += 1;
                progress(done, deliveries.len());
            }
        }
        if late > 0 {
            say(&format!(
                "{late} exports were late, by {latest_s:.2} s at most: this machine is slower than \
                 --speed asks for"
            ));
        }
        Ok(())
    }

    /// The files of one delivery: one, or one for each slice.
    pub(super) fn parcels(&mut self, delivery: &Delivery) -> Result<Vec<Parcel>, SimulateError> {
        let files = match &mut self.source {
            Source::Files(files) => {
                let file = &files[delivery.volume - 1];
                vec![fs::read(file).map_err(io(file))?]
            }
            Source::Scanner(scanner) => {
                let mut volume = scanner.volume(delivery)?;
                let series = &self.timeline.series[delivery.series];
                let tr_s = self.truth.tr_s;
                let start_s = series.first_s + count(delivery.volume - 1) * tr_s;
                let stamp = Stamp {
                    began: self.header_clock.at(series.first_s),
                    acquired: self.header_clock.at(start_s),
                    created: self.header_clock.at(start_s + tr_s),
                    study: self.study.clone(),
                    series: delivery.series + 1,
                    description: match series.role {
                        Role::Run | Role::Aborted => "simulated run",
                        Role::Twin => "simulated run, second series",
                    },
                    patient: self.patient.clone(),
                };
                volume.header.time_ms = Some(stamp.time_ms());
                encode(self.format, &volume, &stamp).map_err(|source| SimulateError::Encode {
                    series: delivery.series + 1,
                    volume: delivery.volume,
                    source,
                })?
            }
        };
        let last = files.len();
        Ok((1..)
            .zip(files)
            .map(|(slice, bytes)| Parcel {
                name: name(&self.source, self.format, delivery, &format!("{slice:03}")),
                bytes,
                // Of a volume that is cut short, the last slice is.
                kept_share: delivery.kept_share.filter(|_| slice == last),
            })
            .collect())
    }

    /// What leaves, in its order.
    #[cfg(test)]
    pub(super) fn deliveries(&self) -> Vec<Delivery> {
        self.timeline.deliveries.clone()
    }
}

fn run(arguments: &Arguments, volumes: usize) -> Run {
    Run {
        volumes,
        tr_s: arguments.tr,
        dummies: usize::try_from(arguments.dummies).unwrap_or(0),
        export_s: arguments.export_delay,
        pulse_byte: arguments.pulse_byte,
        seed: arguments.seed,
    }
}

/// Faults that what was asked for cannot show are refused.
fn possible(arguments: &Arguments) -> Result<(), FaultError> {
    for fault in &arguments.faults {
        let name = fault.name();
        let cannot = |with| Err(FaultError::Cannot { name, with });
        match fault {
            Fault::Abort { .. }
            | Fault::TwoSeries
            | Fault::MotionStep { .. }
            | Fault::ClockDrift { .. }
                if arguments.replay.is_some() =>
            {
                return cannot("--replay");
            }
            Fault::Drop(_)
            | Fault::Duplicate(_)
            | Fault::Reorder(_)
            | Fault::Truncate(_)
            | Fault::TwoSeries
                if arguments.format == Format::Nifti4d =>
            {
                return cannot("--format nifti4d");
            }
            Fault::ClockDrift { .. } if !arguments.format.is_dicom() => {
                return cannot("NIfTI, which has no clock");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Every acquired series' poses, the faults' steps among them.
fn poses(arguments: &Arguments, timeline: &Timeline) -> Result<Vec<Vec<Pose>>, PathError> {
    let acquired = timeline.series.iter().enumerate();
    let acquired = acquired.filter(|(_, series)| series.role != Role::Twin);
    acquired
        .map(|(index, series)| {
            let mut poses = arguments.motion.poses(
                arguments.seed,
                index,
                series.offset,
                series.volumes,
                arguments.tr,
            )?;
            for (frame, pose) in poses.iter_mut().enumerate() {
                for step in &timeline.motion_steps {
                    if series.offset + frame + 1 >= step.at {
                        *pose = pose.shifted(step.shift_ras_mm);
                    }
                }
            }
            Ok(poses)
        })
        .collect()
}

/// What a file is called: series and volume, or its own name where it had one.
///
/// - `slice`: which slice of the volume, where it has a file for each.
fn name(source: &Source, format: Format, delivery: &Delivery, slice: &str) -> String {
    let again = if delivery.again { "again-" } else { "" };
    match source {
        Source::Files(files) => {
            let name = files[delivery.volume - 1].file_name().unwrap_or_default();
            format!("{again}{}", name.to_string_lossy())
        }
        Source::Scanner(_) => {
            let (series, volume) = (delivery.series + 1, delivery.volume);
            match format {
                Format::Nifti4d => format!("{series:03}.{}", format.ending()),
                _ if format.is_sliced() => {
                    format!("{again}{series:03}_{volume:06}_{slice}.{}", format.ending())
                }
                _ => format!("{again}{series:03}_{volume:06}.{}", format.ending()),
            }
        }
    }
}

/// Says something on standard error; a courtesy, a closed one stops nothing.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "scanner: {text}");
}

/// Says how far the run is: in place on a terminal, now and then elsewhere.
fn progress(volume: usize, of: usize) {
    let mut out = std::io::stderr();
    let _ = if out.is_terminal() {
        let end = if volume == of { "\n" } else { "" };
        write!(out, "\rscanner: volume {volume} of {of} {end}")
    } else if volume.is_multiple_of(20) || volume == of {
        writeln!(out, "scanner: volume {volume} of {of}")
    } else {
        Ok(())
    };
}
