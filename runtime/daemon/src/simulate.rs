//! `afterimage simulate`: a scanner that writes DICOM mosaics into a folder.
//!
//! A phantom head (an ellipsoid with some texture) moves a little and answers to each trial in the
//! voxels of a mask, with drift and noise on top. `--prepare` writes what a site knows beforehand
//! (mask, events) and the truth; the run itself then sends one file per volume, at `--speed` times
//! real time. `--replay` sends the files of an existing folder instead.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use decoder::{Noise, NoiseKey, Stream, Tier};
use ndarray::{Array1, Array2, Array3};
use ndarray_npy::WriteNpyExt;
use rtfmri::glm::{Design, GlmSettings, Hrf};
use rtfmri::{Mask, PatientTag, Volume, VolumeHeader, events, mosaic};

use crate::logging::chain;
use crate::record;

const SLICES: usize = 27;
const ROWS: usize = 64;
const COLUMNS: usize = 64;
const TR_S: f64 = 1.5;
const VOXEL_MM: [f64; 3] = [3.0, 3.0, 3.5];
/// Onset of the first trial and distance between trials, seconds.
const FIRST_ONSET_S: f64 = 12.0;
const TRIAL_EVERY_S: f64 = 6.0;
const STIMULUS_S: f64 = 3.0;
/// Time after the last onset, seconds.
const TAIL_S: f64 = 12.0;
/// Scanner units: the head, a response of one, thermal noise.
const HEAD: f32 = 900.0;
const RESPONSE: f32 = 25.0;
const NOISE: f32 = 4.0;

/// What to simulate.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Folder with the simulated site: mask.nii, events.tsv, true_betas.npy
    #[arg(long, required_unless_present = "replay")]
    site: Option<PathBuf>,
    /// Write the site's files and stop
    #[arg(long, requires = "site")]
    prepare: bool,
    /// The folder that the scanner exports into
    #[arg(long, required_unless_present = "prepare")]
    into: Option<PathBuf>,
    /// Send the files of this folder, in the order of their names, instead of the phantom
    #[arg(long, conflicts_with = "site")]
    replay: Option<PathBuf>,
    /// Trials of the run
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=500))]
    trials: u32,
    /// Voxels of the mask
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(8..=20_000))]
    voxels: u32,
    /// Seed of the phantom
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Times faster than real time
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
}

#[derive(Debug, thiserror::Error)]
enum SimulateError {
    #[error("--speed = {0} is outside 0.01..=1000")]
    Speed(f64),
    #[error("cannot read or write {path}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} cannot be used; was it written by --prepare?")]
    Site {
        path: PathBuf,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("volume {number} cannot be encoded")]
    Encode {
        number: u32,
        source: mosaic::MosaicError,
    },
    #[error("the response cannot be computed")]
    Design(#[from] rtfmri::glm::GlmError),
    #[error("{path} holds no files")]
    Empty { path: PathBuf },
    #[error(transparent)]
    Record(#[from] record::RecordError),
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> SimulateError {
    let path = path.to_path_buf();
    move |source| SimulateError::Io {
        path: path.clone(),
        source,
    }
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match simulate(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn simulate(arguments: &Arguments) -> Result<(), SimulateError> {
    if !(0.01..=1000.0).contains(&arguments.speed) {
        return Err(SimulateError::Speed(arguments.speed));
    }
    match (&arguments.site, &arguments.into, &arguments.replay) {
        (Some(site), _, _) if arguments.prepare => prepare(site, arguments),
        (Some(site), Some(into), _) => send_phantom(site, into, arguments),
        (_, Some(into), Some(folder)) => replay(folder, into, arguments.speed),
        // clap lets no other combination through.
        _ => Ok(()),
    }
}

/// Keeps the pace of a scanner.
struct Pace {
    next: Instant,
    step: Duration,
}

impl Pace {
    fn new(speed: f64) -> Pace {
        let step = Duration::from_secs_f64(TR_S / speed);
        Pace {
            next: Instant::now() + step,
            step,
        }
    }

    fn wait(&mut self) {
        std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
        self.next += self.step;
    }
}

/// Writes a file as scanners' exports do: under another name first, then renamed.
fn deliver(into: &Path, name: &str, bytes: &[u8]) -> Result<(), SimulateError> {
    let temporary = into.join(format!(".{name}.part"));
    let path = into.join(name);
    fs::write(&temporary, bytes).map_err(io(&temporary))?;
    fs::rename(&temporary, &path).map_err(io(&path))
}

/// Says how far the run is: in place on a terminal, now and then elsewhere.
fn progress(volume: usize, of: usize) {
    let mut out = std::io::stderr();
    // A courtesy; a closed standard error stops nothing.
    let _ = if out.is_terminal() {
        let end = if volume == of { "\n" } else { "" };
        write!(out, "\rscanner: volume {volume} of {of} {end}")
    } else if volume.is_multiple_of(20) || volume == of {
        writeln!(out, "scanner: volume {volume} of {of}")
    } else {
        Ok(())
    };
}

fn replay(folder: &Path, into: &Path, speed: f64) -> Result<(), SimulateError> {
    let entries = fs::read_dir(folder).map_err(io(folder))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(SimulateError::Empty {
            path: folder.into(),
        });
    }
    let mut pace = Pace::new(speed);
    for (index, file) in files.iter().enumerate() {
        pace.wait();
        let bytes = fs::read(file).map_err(io(file))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        deliver(into, &name, &bytes)?;
        progress(index + 1, files.len());
    }
    Ok(())
}

/// Numbers for one purpose of the phantom; the same on every machine.
fn noise(seed: u64, purpose: u32) -> Noise {
    Noise::new(
        NoiseKey {
            session_seed: seed,
            run: purpose,
            trial: 0,
            tier: Tier::Fast,
        },
        Stream::Prior,
    )
}

fn affine_lps() -> [[f64; 4]; 4] {
    let half = |len: usize, mm: f64| {
        #[expect(clippy::cast_precision_loss, reason = "a matrix side")]
        let len = len as f64;
        -(len - 1.0) / 2.0 * mm
    };
    [
        [VOXEL_MM[0], 0.0, 0.0, half(COLUMNS, VOXEL_MM[0])],
        [0.0, VOXEL_MM[1], 0.0, half(ROWS, VOXEL_MM[1])],
        [0.0, 0.0, VOXEL_MM[2], half(SLICES, VOXEL_MM[2])],
        [0.0, 0.0, 0.0, 1.0],
    ]
}

/// Brightness of the still head at a place, LPS, millimetres.
#[expect(clippy::cast_possible_truncation, reason = "a brightness")]
fn head(place: [f64; 3]) -> f32 {
    let [x, y, z] = place;
    let radius = ((x / 70.0).powi(2) + (y / 82.0).powi(2) + (z / 44.0).powi(2)).sqrt();
    let inside = 1.0 / (1.0 + ((radius - 1.0) * 16.0).exp());
    let texture = 1.0
        + 0.22 * (x / 11.0).sin() * (y / 13.0).cos()
        + 0.16 * (y / 7.0 + z / 9.0).sin()
        + 0.12 * (z / 6.0).cos() * (x / 17.0).cos();
    (inside * texture) as f32 * HEAD
}

fn index_to_lps(column: usize, row: usize, slice: usize) -> [f64; 3] {
    let affine = affine_lps();
    #[expect(clippy::cast_precision_loss, reason = "matrix indices")]
    let index = [column as f64, row as f64, slice as f64];
    std::array::from_fn(|axis| affine[axis][axis] * index[axis] + affine[axis][3])
}

/// The responding voxels `[column, row, slice]`: a patch at the back of the head.
fn responding(count: usize) -> Vec<[usize; 3]> {
    let mut voxels: Vec<(f64, [usize; 3])> = Vec::new();
    for column in 0..COLUMNS {
        for row in 0..ROWS {
            for slice in 1..SLICES - 1 {
                let [x, y, z] = index_to_lps(column, row, slice);
                let inside = (x / 66.0).powi(2) + (y / 78.0).powi(2) + (z / 40.0).powi(2) < 1.0;
                if inside {
                    let distance = x.powi(2) + (y - 60.0).powi(2) + z.powi(2);
                    voxels.push((distance, [column, row, slice]));
                }
            }
        }
    }
    voxels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut nearest: Vec<[usize; 3]> = voxels.into_iter().take(count).map(|(_, v)| v).collect();
    nearest.sort_unstable();
    nearest
}

fn prepare(site: &Path, arguments: &Arguments) -> Result<(), SimulateError> {
    fs::create_dir_all(site).map_err(io(site))?;
    let voxels = responding(arguments.voxels as usize);
    let mut affine_ras = affine_lps();
    for row in &mut affine_ras[..2] {
        for value in row {
            *value = -*value;
        }
    }
    let mask_path = site.join("mask.nii");
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| SimulateError::Site {
        path: mask_path.clone(),
        source: error,
    };
    let mask = Mask::from_voxels([COLUMNS, ROWS, SLICES], affine_ras, &voxels)
        .map_err(|error| wrong(error.into()))?;
    let bytes = mask.to_nifti().map_err(|error| wrong(error.into()))?;
    record::write_whole(&mask_path, &bytes)?;

    let mut table = String::from("onset\tduration\ttrial_type\n");
    for trial in 0..arguments.trials {
        let onset = FIRST_ONSET_S + f64::from(trial) * TRIAL_EVERY_S;
        table.push_str(&format!("{onset}\t{STIMULUS_S}\tpicture{:03}\n", trial + 1));
    }
    record::write_whole(&site.join("events.tsv"), table.as_bytes())?;

    let betas = true_betas(arguments.seed, arguments.trials as usize, mask.len());
    let path = site.join("true_betas.npy");
    let mut bytes = Vec::new();
    betas
        .write_npy(&mut bytes)
        .map_err(|error| SimulateError::Site {
            path: path.clone(),
            source: error.into(),
        })?;
    record::write_whole(&path, &bytes)?;
    Ok(())
}

/// `[trial, voxel]`, standard normal.
fn true_betas(seed: u64, trials: usize, voxels: usize) -> Array2<f32> {
    let flat: Vec<f32> = noise(seed, 1).draw(&[trials, voxels]).into_iter().collect();
    Array2::from_shape_vec((trials, voxels), flat).unwrap_or_default()
}

fn send_phantom(site: &Path, into: &Path, arguments: &Arguments) -> Result<(), SimulateError> {
    let read = |name: &str| {
        let path = site.join(name);
        fs::read(&path).map_err(io(&path))
    };
    let site_error =
        |name: &str, source: Box<dyn std::error::Error + Send + Sync>| SimulateError::Site {
            path: site.join(name),
            source,
        };
    let mask = Mask::from_nifti(&read("mask.nii")?)
        .map_err(|error| site_error("mask.nii", error.into()))?;
    let events = events::parse(&read("events.tsv")?)
        .map_err(|error| site_error("events.tsv", error.into()))?;
    let betas = true_betas(arguments.seed, events.len(), mask.len());
    let volumes = volumes_of(&events);
    let responses = responses(&events, volumes)?;

    let voxels = responding(mask.len());
    let mut drift_noise = noise(arguments.seed, 2);
    let mut walk = [0.0_f64; 3];
    let series =
        mosaic::series_uid(u128::from(arguments.seed) << 64 | u128::from(record::now_ms()));
    let mut pace = Pace::new(arguments.speed);
    for frame in 0..volumes {
        let number = u32::try_from(frame + 1).unwrap_or(u32::MAX);
        let steps = drift_noise.draw(&[3]);
        for (position, step) in walk.iter_mut().zip(&steps) {
            *position = *position * 0.98 + f64::from(*step) * 0.04;
        }
        let answer: Array1<f32> = responses.row(frame).dot(&betas);
        let thermal = noise(arguments.seed, number + 16).draw(&[SLICES * ROWS * COLUMNS]);
        let voxel_values = phantom(walk, &voxels, &answer, thermal.iter().copied());
        let volume = Volume {
            voxels: voxel_values,
            affine_lps: affine_lps(),
            header: VolumeHeader {
                series_uid: series.clone(),
                patient: PatientTag::default(),
                acquisition: number,
                instance: Some(number),
                tr_ms: TR_S * 1e3,
                slice_times_ms: Some(vec![0.0; SLICES]),
            },
        };
        let bytes =
            mosaic::encode(&volume).map_err(|source| SimulateError::Encode { number, source })?;
        pace.wait();
        deliver(into, &format!("001_{number:06}.dcm"), &bytes)?;
        progress(frame + 1, volumes);
    }
    Ok(())
}

/// Volumes until the last response has been seen.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a run of minutes"
)]
fn volumes_of(events: &[events::Event]) -> usize {
    let last = events.last().map_or(0.0, |event| event.onset_s);
    ((last + TAIL_S) / TR_S).ceil() as usize
}

/// Each trial's response over the run, `[volume, trial]`, as the model itself expects it.
fn responses(
    events: &[events::Event],
    volumes: usize,
) -> Result<Array2<f32>, rtfmri::glm::GlmError> {
    let frames: Vec<usize> = (0..volumes).collect();
    let mut columns = Array2::zeros((volumes, events.len()));
    for (trial, event) in events.iter().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "a run of minutes")]
        let run_s = volumes as f64 * TR_S;
        let settings = GlmSettings {
            // The whole run, and not only what is known at the trial's decode time.
            delay_s: (run_s - event.onset_s).min(120.0),
            high_pass_hz: 0.0,
            ..GlmSettings::new(TR_S, Hrf::Glover, rtfmri::glm::Noise::Ols)
        };
        let design = Design::build(&settings, std::slice::from_ref(event), 0, &frames, None)?;
        for (row, &frame) in design.frames.iter().enumerate() {
            if frame < volumes {
                #[expect(clippy::cast_possible_truncation, reason = "a regressor")]
                let value = design.values[[row, 0]] as f32;
                columns[[frame, trial]] = value;
            }
        }
    }
    Ok(columns)
}

/// One volume, `[slice, row, column]`: the head shifted by `walk` (mm), its answer and noise.
fn phantom(
    walk: [f64; 3],
    voxels: &[[usize; 3]],
    answer: &Array1<f32>,
    mut thermal: impl Iterator<Item = f32>,
) -> Array3<f32> {
    let mut values = Array3::from_shape_fn((SLICES, ROWS, COLUMNS), |(slice, row, column)| {
        let [x, y, z] = index_to_lps(column, row, slice);
        head([x - walk[0], y - walk[1], z - walk[2]])
    });
    for (&[column, row, slice], &response) in voxels.iter().zip(answer) {
        values[[slice, row, column]] += response * RESPONSE;
    }
    values.mapv_inplace(|value| {
        (value + NOISE * thermal.next().unwrap_or(0.0))
            .round()
            .clamp(0.0, 4095.0)
    });
    values
}
