//! The front end on this machine: a scanner's file in, masked voxels out; a trial's fit; stamps.
//!
//! 1. Of each grid a simulated head is rendered, a few dozen volumes; each measured volume is one of
//!    them with a number and a time of its own, as a mosaic file in a temporary folder.
//! 2. File by file: read and parsed as the box's reader does, then what a run does with a volume:
//!    realigned, sampled at the mask's voxels, judged.
//! 3. Trials are fitted to the first grid's voxels.
//! 4. Pulses of a pseudo-terminal are stamped.
//!
//! Between two volumes the next file is made, which the figures do not hold.

mod figures;

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use ndarray::{Array2, ArrayView1};
use nix::errno::Errno;
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use rtfmri::events::Event;
use rtfmri::glm::{GlmError, GlmSettings, Hrf, Noise};
use rtfmri::quality::{Monitor, QualitySettings};
use rtfmri::{Mask, MotionError, Realigner, Rigid, Volume};
use tempfile::TempDir;
use wire::ParseReply;

use self::figures::{Figures, FitFigures, GridFigures, TriggerFigures, WindowFigures};
use super::{Resident, Spread};
use crate::acquire::parser::{Parser, ParserError};
use crate::acquire::read_bounded;
use crate::pipeline::{self, AlignError};
use crate::simulate::{HeadError, MovingHead, sides};
use crate::trigger::latency::{self, LatencyError};

/// Longest time for one file, on a machine that may be busy.
const PARSE_WITHIN: Duration = Duration::from_secs(10);
/// As `limits.parse_memory_mib` is where a site does not say otherwise.
const PARSE_MEMORY_BYTES: u64 = 512 << 20;
/// Longest file, as far as a message to the parser goes.
const MAX_FILE_BYTES: u64 = 63 << 20;
/// Volumes at a run's begin and at its end that are compared.
const WINDOW: usize = 100;
const TR_S: f64 = 1.5;
/// Volumes that trials are fitted to.
const FIT_VOLUMES: usize = 288;
/// Onset of the first trial, distance between trials, length of a stimulus, seconds.
const FIRST_ONSET_S: f64 = 12.0;
const TRIAL_EVERY_S: f64 = 4.0;
const STIMULUS_S: f64 = 3.0;
/// Between the last onset and the end of the run, seconds.
const TAIL_S: f64 = 12.0;

/// What to measure.
#[derive(Args)]
#[group(skip)]
#[command(next_help_heading = "Front end")]
pub(super) struct Arguments {
    /// Measure the front end: volumes, trials and, with --triggers, stamps
    #[arg(long)]
    front_end: bool,
    /// Columns, rows and slices of the volumes; more than one with commas between
    #[arg(long, value_name = "CxRxS", conflicts_with = "bundle", value_parser = sides,
        value_delimiter = ',', default_values = ["64x64x27", "76x90x74"])]
    pub(super) grid: Vec<[usize; 3]>,
    /// Voxels of the mask
    #[arg(long, conflicts_with = "bundle", default_value_t = 15_724,
        value_parser = clap::value_parser!(u32).range(8..=200_000))]
    voxels: u32,
    /// Volumes of each grid
    #[arg(long, conflicts_with = "bundle", default_value_t = 1000,
        value_parser = clap::value_parser!(u32).range(10..=20_000))]
    volumes: u32,
    /// Also measure how late the trigger line's stamps are
    #[arg(long, conflicts_with = "bundle")]
    triggers: bool,
    /// Pulses to send
    #[arg(long, requires = "triggers", default_value_t = 1000,
        value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pulses: u32,
    /// Threads that compute meanwhile [default: one per processor]
    #[arg(long, value_name = "THREADS", requires = "triggers",
        value_parser = clap::value_parser!(u32).range(0..=256))]
    busy: Option<u32>,
}

/// Why there are no figures, or not all.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrontError {
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error("no temporary folder can be made")]
    Folder(#[source] std::io::Error),
    #[error("cannot read or write {path}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("volume {volume} cannot be parsed")]
    Parser { volume: u32, source: ParserError },
    #[error("volume {volume}: the parser refuses the simulated file: {reason}")]
    Refused { volume: u32, reason: String },
    #[error("volume {volume}: expected a volume of {expected:?} voxels, found another message")]
    Reply { volume: u32, expected: [usize; 3] },
    #[error("the first volume cannot serve as reference")]
    Reference(#[from] MotionError),
    #[error("volume {volume} cannot be aligned")]
    Align { volume: u32, source: AlignError },
    #[error("trial {trial} cannot be fitted")]
    Fit { trial: usize, source: GlmError },
    #[error("a process's computing time cannot be read")]
    Clock(#[source] Errno),
    #[error("stamps cannot be measured")]
    Triggers(#[from] LatencyError),
    #[error("cannot write to standard output")]
    Say(#[source] std::io::Error),
}

/// Measures; each table is said when it is known.
pub(super) fn bench(arguments: &Arguments, out: &mut impl Write) -> Result<Figures, FrontError> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let mut say = |table: &dyn fmt::Display| writeln!(out, "{table}").map_err(FrontError::Say);
    let mut grids = Vec::new();
    let mut series = None;
    for grid in &arguments.grid {
        let (figures, voxels) = measure(*grid, arguments)?;
        say(&figures)?;
        grids.push(figures);
        series.get_or_insert(voxels);
    }
    let fit = measure_fits(series.unwrap_or_default())?;
    say(&fit)?;
    // Last: this thread keeps the scheduling that stamps are measured with.
    let triggers = match arguments.triggers {
        true => Some(measure_stamps(arguments, processors)?),
        false => None,
    };
    if let Some(triggers) = &triggers {
        say(triggers)?;
    }
    Ok(Figures {
        software: env!("CARGO_PKG_VERSION"),
        processors,
        grids,
        fit,
        triggers,
    })
}

/// One volume's times, milliseconds.
#[derive(Clone, Copy)]
struct Laps {
    read: f64,
    parse: f64,
    realign: f64,
    sample: f64,
    quality: f64,
    total: f64,
    processor: f64,
}

/// Times from one point to the next.
struct Lap(Instant);

impl Lap {
    fn next(&mut self) -> f64 {
        let now = Instant::now();
        millis(now - std::mem::replace(&mut self.0, now))
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What a process computed so far, milliseconds.
fn computed_ms(clock: ClockId) -> Result<f64, FrontError> {
    let time = clock_gettime(clock).map_err(FrontError::Clock)?;
    Ok(millis(Duration::from(time)))
}

/// The files' way into this process.
struct Source {
    head: MovingHead,
    sides: [usize; 3],
    folder: TempDir,
    parser: Parser,
    file_bytes: u64,
}

impl Source {
    fn new(sides: [usize; 3], voxels: usize) -> Result<Source, FrontError> {
        let folder = tempfile::Builder::new()
            .prefix("afterimage-bench-")
            .tempdir()
            .map_err(FrontError::Folder)?;
        Ok(Source {
            head: MovingHead::new(sides, voxels, TR_S)?,
            sides,
            folder,
            parser: Parser::new(PARSE_WITHIN, PARSE_MEMORY_BYTES),
            file_bytes: 0,
        })
    }

    /// Makes a volume's file.
    fn export(&mut self, number: u32) -> Result<PathBuf, FrontError> {
        let bytes = self.head.file(number)?;
        let path = self.folder.path().join(format!("001_{number:06}.dcm"));
        fs::write(&path, &bytes).map_err(at(&path))?;
        self.file_bytes = bytes.len() as u64;
        Ok(path)
    }

    /// A file's volume, as the box's reader gets it.
    fn parse(&mut self, number: u32, bytes: &[u8]) -> Result<Volume, FrontError> {
        let reply = self.parser.parse(bytes);
        let reply = reply.map_err(|source| FrontError::Parser {
            volume: number,
            source,
        })?;
        let volume = match reply {
            ParseReply::Volume(message) if message.number == number => pipeline::volume_of(message),
            ParseReply::Refused { reason } => {
                return Err(FrontError::Refused {
                    volume: number,
                    reason,
                });
            }
            _ => None,
        };
        let [columns, rows, slices] = self.sides;
        volume
            .filter(|volume| volume.voxels.dim() == (slices, rows, columns))
            .ok_or(FrontError::Reply {
                volume: number,
                expected: self.sides,
            })
    }

    fn parser_clock(&self) -> Result<(u32, ClockId), FrontError> {
        let pid = self.parser.pid().unwrap_or_default();
        let process = Pid::from_raw(i32::try_from(pid).unwrap_or_default());
        let clock = clock_getcpuclockid(process).map_err(FrontError::Clock)?;
        Ok((pid, clock))
    }
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> FrontError {
    let path = path.to_path_buf();
    move |source| FrontError::File {
        path: path.clone(),
        source,
    }
}

/// A run's part of the way.
struct Follow {
    mask: Mask,
    realigner: Realigner,
    monitor: Monitor,
    motion: Rigid,
}

/// Measures one grid; also gives voxels to fit, `[volume, voxel]`, scanner units.
fn measure(
    grid: [usize; 3],
    arguments: &Arguments,
) -> Result<(GridFigures, Array2<f32>), FrontError> {
    let wanted = usize::try_from(arguments.voxels).unwrap_or(usize::MAX);
    let mut source = Source::new(grid, wanted)?;
    let path = source.export(1)?;
    let bytes = read_bounded(&path, MAX_FILE_BYTES).map_err(at(&path))?;
    let first = source.parse(1, &bytes)?;
    let mut lap = Lap(Instant::now());
    let realigner = Realigner::new(&first)?;
    let reference_ms = lap.next();
    let mut follow = Follow {
        mask: source.head.mask().clone(),
        monitor: Monitor::new(QualitySettings::default(), realigner.centre_lps()),
        realigner,
        motion: Rigid::identity(),
    };
    drop((first, bytes));

    // Filled, so that its memory is there from the first volume on.
    let mut series = Array2::from_elem((FIT_VOLUMES, follow.mask.len()), f32::NAN);
    let volumes = usize::try_from(arguments.volumes).unwrap_or(usize::MAX);
    let window = WINDOW.min(volumes / 2);
    let (parser_pid, _) = source.parser_clock()?;
    let memory = || (Resident::now(), Resident::of(parser_pid));
    let (mut laps, mut moved_mm) = (Vec::with_capacity(volumes), 0.0_f64);
    let mut early = memory();
    for number in 1..=arguments.volumes {
        let path = source.export(number)?;
        let (times, voxels, displacement_mm) = one_volume(&mut source, &mut follow, number, &path)?;
        fs::remove_file(&path).map_err(at(&path))?;
        moved_mm = moved_mm.max(displacement_mm);
        if let Some(mut row) = series.outer_iter_mut().nth(laps.len()) {
            row.assign(&voxels);
        }
        laps.push(times);
        if laps.len() == window {
            early = memory();
        }
    }
    let late = memory();
    // A shorter run is gone through again and again.
    for row in laps.len()..FIT_VOLUMES {
        let before = series.row(row - laps.len()).to_owned();
        series.row_mut(row).assign(&before);
    }

    let spread = |laps: &[Laps], part: fn(&Laps) -> f64| Spread::of(laps.iter().map(part));
    let of_window = |laps: &[Laps], (resident, parser_resident)| WindowFigures {
        volumes: laps.len(),
        total: spread(laps, |laps| laps.total),
        processor: spread(laps, |laps| laps.processor),
        resident,
        parser_resident,
    };
    let figures = GridFigures {
        grid,
        voxel_mm: source.head.voxel_mm(),
        volumes: arguments.volumes,
        mask_voxels: follow.mask.len(),
        file_bytes: source.file_bytes,
        source: "mosaic files of a simulated head in a temporary folder",
        reference_ms,
        moved_mm,
        total: spread(&laps, |laps| laps.total),
        processor: spread(&laps, |laps| laps.processor),
        read: spread(&laps, |laps| laps.read),
        parse: spread(&laps, |laps| laps.parse),
        realign: spread(&laps, |laps| laps.realign),
        sample: spread(&laps, |laps| laps.sample),
        quality: spread(&laps, |laps| laps.quality),
        first: of_window(&laps[..window], early),
        last: of_window(&laps[laps.len() - window..], late),
    };
    Ok((figures, series))
}

/// One file's way; its times, its voxels, and how far the head was found from the reference.
fn one_volume(
    source: &mut Source,
    follow: &mut Follow,
    number: u32,
    path: &Path,
) -> Result<(Laps, ndarray::Array1<f32>, f64), FrontError> {
    let (_, parser_clock) = source.parser_clock()?;
    let own_clock = ClockId::CLOCK_PROCESS_CPUTIME_ID;
    let computed_before = computed_ms(own_clock)? + computed_ms(parser_clock)?;
    let began = Instant::now();
    let mut lap = Lap(began);
    let bytes = read_bounded(path, MAX_FILE_BYTES).map_err(at(path))?;
    let read = lap.next();
    let volume = source.parse(number, &bytes)?;
    let parse = lap.next();
    let failed = |source: AlignError| FrontError::Align {
        volume: number,
        source,
    };
    // The two steps of `pipeline::align`, each timed.
    let motion = follow.realigner.realign(&volume, &follow.motion);
    let motion = motion.map_err(|error| failed(error.into()))?;
    let realign = lap.next();
    let voxels = pipeline::sample(&volume, &follow.mask, &motion, None).map_err(failed)?;
    let sample = lap.next();
    follow.motion = motion;
    let none = ArrayView1::from(&[]);
    let quality = follow
        .monitor
        .push(number - 1, &motion, voxels.view(), none);
    let laps = Laps {
        read,
        parse,
        realign,
        sample,
        quality: lap.next(),
        total: millis(began.elapsed()),
        processor: computed_ms(own_clock)? + computed_ms(parser_clock)? - computed_before,
    };
    Ok((laps, voxels, quality.displacement_mm))
}

/// Fits each trial of a run as at its end, with each noise model.
fn measure_fits(series: Array2<f32>) -> Result<FitFigures, FrontError> {
    let (volumes, voxels) = series.dim();
    let frames: Vec<usize> = (0..volumes).collect();
    let mut events = Vec::new();
    let mut onset_s = FIRST_ONSET_S;
    #[expect(clippy::cast_precision_loss, reason = "a run of minutes")]
    let last_onset_s = volumes as f64 * TR_S - TAIL_S;
    while onset_s <= last_onset_s {
        events.push(Event::new(onset_s, STIMULUS_S, "picture"));
        onset_s += TRIAL_EVERY_S;
    }
    let fits = |noise| {
        let settings = GlmSettings::new(TR_S, Hrf::Glover, noise);
        let (mut times, mut computed) = (Vec::new(), Vec::new());
        for trial in 0..events.len() {
            let clock = ClockId::CLOCK_PROCESS_CPUTIME_ID;
            let before = computed_ms(clock)?;
            let mut lap = Lap(Instant::now());
            let view = series.view();
            pipeline::fit_trial(&settings, &events, trial, volumes, &frames, view).map_err(
                |source| FrontError::Fit {
                    trial: trial + 1,
                    source,
                },
            )?;
            times.push(lap.next());
            computed.push(computed_ms(clock)? - before);
        }
        Ok::<_, FrontError>((Spread::of(times), Spread::of(computed)))
    };
    let (ols, ols_processor) = fits(Noise::Ols)?;
    let (ar1, ar1_processor) = fits(Noise::Ar1)?;
    Ok(FitFigures {
        volumes,
        voxels,
        trials: events.len(),
        ols,
        ols_processor,
        ar1,
        ar1_processor,
    })
}

fn measure_stamps(arguments: &Arguments, processors: usize) -> Result<TriggerFigures, FrontError> {
    let each = u32::try_from(processors).unwrap_or(u32::MAX);
    let busy = arguments.busy.unwrap_or(each).min(256);
    let latency = latency::measure(arguments.pulses, busy)?;
    Ok(TriggerFigures {
        pulses: latency.late_ms.len(),
        busy_threads: busy,
        fifo: latency.fifo,
        late: Spread::of(latency.late_ms),
    })
}
