//! `afterimage motion`: where the head was in each volume of a recorded run, offline.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use ndarray::ArrayView1;
use rtfmri::interpolation::{Interpolation, InterpolationError};
use rtfmri::motion::{MotionError, Realigner, Rigid};
use rtfmri::nifti::SeriesReader;
use rtfmri::quality::{Monitor, Quality, QualitySettings, Signal};
use rtfmri::{NiftiError, Volume};
use serde::Serialize;

use crate::logging::chain;
use crate::record;

/// Longest file of a run.
const MAX_BYTES: u64 = 4 << 30;
/// Keys and units, for whoever opens the file without the manual.
const CONVENTION: &str = "y = M x, RAS millimetres: M takes a head point from its place in the \
    reference volume to its place in volume k, so volume k is realigned by sampling it at M x; \
    M = Translate(t) Translate(c) Rz Ry Rx Translate(-c), c = rotation_centre_ras_mm";

/// Realign every volume of a run and write where the head was, as JSON
///
/// BOLD is a 4-D NIfTI file (.nii or .nii.gz). Every volume is realigned to one of them, the
/// first unless --reference says otherwise, by the code that runs during a session, and judged:
/// framewise displacement, DVARS over the head, running tSNR, spikes and slow drift.
///
/// The JSON holds, one entry per volume and null where a volume could not be realigned:
///   matrices_ras   4 x 4, RAS millimetres; y = M x takes a head point from its place in the
///                  reference to its place in the volume
///   parameters     tx ty tz (mm), rx ry rz (degrees), about rotation_centre_ras_mm
///   quality        fd_power_mm, fd_jenkinson_mm, displacement_mm, drift_mm, dvars and its
///                  percent and standardised forms, tsnr, and the flags
/// and in `unrealigned` each volume without an entry, with the reason.
///
/// Exit code 0 if any volume was realigned (the reference itself does not count), else 1.
///
/// Example: afterimage motion sub-01_bold.nii.gz --out motion.json
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Arguments {
    /// The run: a 4-D NIfTI file, .nii or .nii.gz
    bold: PathBuf,
    /// Where the JSON goes; an older one is replaced once the new one is whole
    #[arg(long)]
    out: PathBuf,
    /// The volume that the others are realigned to, from 0
    #[arg(long, default_value_t = 0)]
    reference: usize,
    /// Framewise displacement (Power) above which a volume is a spike, mm
    #[arg(long, default_value_t = QualitySettings::default().fd_limit_mm)]
    fd_limit_mm: f64,
}

#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: expected at most {MAX_BYTES} bytes, found more")]
    TooLarge { path: PathBuf },
    #[error("{path} is no run of volumes")]
    Bold { path: PathBuf, source: NiftiError },
    #[error("--reference {found}: {path} has {volumes} volumes, expected 0 to {last}", last = volumes - 1)]
    Reference {
        path: PathBuf,
        found: usize,
        volumes: usize,
    },
    #[error("--fd-limit-mm {found}: expected a number above 0")]
    Limit { found: f64 },
    #[error("{path}: volume {volume}, the reference, cannot be used")]
    Unusable {
        path: PathBuf,
        volume: usize,
        source: VolumeError,
    },
    #[error("the motion cannot be written")]
    Write(#[from] record::RecordError),
    #[error(
        "{path}: none of the {volumes} volumes beside the reference could be realigned; {out} says why"
    )]
    None {
        path: PathBuf,
        out: PathBuf,
        volumes: usize,
    },
    #[error("cannot write to standard output")]
    Say(#[from] std::io::Error),
}

#[derive(Debug, thiserror::Error)]
enum VolumeError {
    #[error("the volume cannot be read")]
    Read(#[from] NiftiError),
    #[error("the head cannot be found")]
    Motion(#[from] MotionError),
    #[error("the volume cannot be interpolated")]
    Interpolation(#[from] InterpolationError),
}

type Matrix = [[f64; 4]; 4];

#[derive(Serialize)]
struct Report {
    bold: String,
    software: &'static str,
    n_volumes: usize,
    reference_volume_index: usize,
    tr_ms: f64,
    convention: &'static str,
    rotation_centre_ras_mm: [f64; 3],
    matrices_ras: Vec<Option<Matrix>>,
    parameters_order: [&'static str; 6],
    parameters: Vec<Option<[f64; 6]>>,
    quality_limits: Limits,
    quality: Vec<Option<QualityNote>>,
    unrealigned: Vec<Unrealigned>,
}

#[derive(Serialize)]
struct Limits {
    sphere_radius_mm: f64,
    fd_limit_mm: f64,
    dvars_limit_robust_std_devs: f64,
    drift_limit_mm: f64,
}

#[derive(Serialize)]
struct Unrealigned {
    volume: usize,
    reason: String,
}

/// [`Quality`] over the head, with its units in its names.
#[derive(Serialize)]
struct QualityNote {
    compared_with_volume: Option<u32>,
    displacement_mm: f64,
    fd_power_mm: Option<f64>,
    fd_jenkinson_mm: Option<f64>,
    drift_mm: f64,
    head_mean: f64,
    dvars: Option<f64>,
    dvars_percent: Option<f64>,
    dvars_standardised: Option<f64>,
    tsnr: Option<f64>,
    motion_spike: bool,
    dvars_spike: bool,
    drifting: bool,
}

impl From<Quality> for QualityNote {
    fn from(quality: Quality) -> Self {
        let Signal {
            mean,
            dvars,
            dvars_percent,
            dvars_standardised,
            tsnr,
            spike,
        } = quality.head;
        Self {
            compared_with_volume: quality.compared_with,
            displacement_mm: quality.displacement_mm,
            fd_power_mm: quality.fd_power_mm,
            fd_jenkinson_mm: quality.fd_jenkinson_mm,
            drift_mm: quality.drift_mm,
            head_mean: mean,
            dvars,
            dvars_percent,
            dvars_standardised,
            tsnr,
            motion_spike: quality.motion_spike,
            dvars_spike: spike,
            drifting: quality.drifting,
        }
    }
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match motion(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn motion(arguments: &Arguments) -> Result<(), CommandError> {
    let path = &arguments.bold;
    let found = arguments.fd_limit_mm;
    if found.is_nan() || found <= 0.0 {
        return Err(CommandError::Limit { found });
    }
    let bytes = read(path)?;
    let reference = reference(path, &bytes, arguments.reference)?;
    let unusable = |source| CommandError::Unusable {
        path: path.clone(),
        volume: arguments.reference,
        source,
    };
    let realigner = Realigner::new(&reference).map_err(|error| unusable(error.into()))?;
    drop(reference);
    let report = realign(arguments, &bytes, &realigner)?;
    record::write_json(&arguments.out, &report)?;
    let beside = |(volume, matrix): &(usize, &Option<Matrix>)| {
        *volume != arguments.reference && matrix.is_some()
    };
    let matrices = report.matrices_ras.iter().enumerate();
    let realigned = matrices.filter(beside).count();
    let volumes = report.n_volumes - 1;
    if volumes > 0 && realigned == 0 {
        return Err(CommandError::None {
            path: path.clone(),
            out: arguments.out.clone(),
            volumes,
        });
    }
    let quality = report.quality.iter().flatten();
    let spikes = quality.filter(|note| note.motion_spike || note.dvars_spike);
    writeln!(
        std::io::stdout(),
        "{}: {realigned} of {volumes} volumes realigned to volume {}, {} spikes",
        arguments.out.display(),
        arguments.reference,
        spikes.count()
    )?;
    Ok(())
}

/// Every volume in turn, as during a session.
fn realign(
    arguments: &Arguments,
    bytes: &[u8],
    realigner: &Realigner,
) -> Result<Report, CommandError> {
    let mut bold = open(&arguments.bold, bytes)?;
    let settings = QualitySettings {
        fd_limit_mm: arguments.fd_limit_mm,
        ..QualitySettings::default()
    };
    let [l, p, s] = realigner.centre_lps();
    let n_volumes = bold.volumes();
    let name = arguments.bold.file_name().unwrap_or_default();
    let mut report = Report {
        bold: name.to_string_lossy().into_owned(),
        software: env!("CARGO_PKG_VERSION"),
        n_volumes,
        reference_volume_index: arguments.reference,
        tr_ms: bold.tr_ms(),
        convention: CONVENTION,
        rotation_centre_ras_mm: [-l, -p, s],
        matrices_ras: Vec::new(),
        parameters_order: ["tx_mm", "ty_mm", "tz_mm", "rx_deg", "ry_deg", "rz_deg"],
        parameters: Vec::new(),
        quality_limits: Limits {
            sphere_radius_mm: settings.radius_mm,
            fd_limit_mm: settings.fd_limit_mm,
            dvars_limit_robust_std_devs: settings.dvars_limit,
            drift_limit_mm: settings.drift_limit_mm,
        },
        quality: Vec::new(),
        unrealigned: Vec::new(),
    };
    let mut monitor = Monitor::new(settings, realigner.centre_lps());
    let mut motion = Rigid::from_parameters([0.0; 6], realigner.centre_lps());
    for (index, read) in std::iter::from_fn(|| bold.read()).enumerate() {
        say_progress(index, n_volumes);
        let one = || -> Result<(Rigid, Quality), VolumeError> {
            let volume = read?;
            let found = if index == arguments.reference {
                Rigid::from_parameters([0.0; 6], realigner.centre_lps())
            } else {
                realigner.realign(&volume, &motion)?
            };
            let image = Interpolation::new(&volume)?;
            let head = image.at(realigner.head(), &found.matrix_lps());
            let number = u32::try_from(index).unwrap_or(u32::MAX);
            let none = ArrayView1::from(&[]);
            let quality = monitor.push(number, &found, none, ArrayView1::from(&head));
            Ok((found, quality))
        };
        match one() {
            Ok((found, quality)) => {
                motion = found;
                report.matrices_ras.push(Some(found.matrix_ras()));
                report.parameters.push(Some(ras_degrees(&found)));
                report.quality.push(Some(quality.into()));
            }
            Err(error) => {
                report.matrices_ras.push(None);
                report.parameters.push(None);
                report.quality.push(None);
                report.unrealigned.push(Unrealigned {
                    volume: index,
                    reason: chain(&error),
                });
            }
        }
    }
    say_progress(n_volumes, n_volumes);
    Ok(report)
}

/// `tx ty tz`, millimetres, `rx ry rz`, degrees, as the RAS matrix is composed of them.
fn ras_degrees(motion: &Rigid) -> [f64; 6] {
    let [l, p, s, about_l, about_p, about_s] = motion.parameters();
    // Left and posterior are right and anterior turned by half about the third axis.
    [
        -l,
        -p,
        s,
        -about_l.to_degrees(),
        -about_p.to_degrees(),
        about_s.to_degrees(),
    ]
}

/// Progress is a courtesy; a closed standard error stops nothing.
fn say_progress(done: usize, volumes: usize) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let end = if done == volumes { "\n" } else { "" };
        let _ = write!(stderr, "\rvolume {done} of {volumes}{end}");
    }
}

fn open<'b>(path: &Path, bytes: &'b [u8]) -> Result<SeriesReader<'b>, CommandError> {
    SeriesReader::open(bytes).map_err(|source| CommandError::Bold {
        path: path.into(),
        source,
    })
}

fn reference(path: &Path, bytes: &[u8], index: usize) -> Result<Volume, CommandError> {
    let mut bold = open(path, bytes)?;
    let volumes = bold.volumes();
    let mut last = None;
    for _ in 0..=index {
        last = bold.read();
        // A volume before it may be damaged; one after is then read in its own place.
        if last.is_none() {
            break;
        }
    }
    let missing = CommandError::Reference {
        path: path.into(),
        found: index,
        volumes,
    };
    last.ok_or(missing)?
        .map_err(|source| CommandError::Unusable {
            path: path.into(),
            volume: index,
            source: source.into(),
        })
}

fn read(path: &Path) -> Result<Vec<u8>, CommandError> {
    let wrong = |source| CommandError::Read {
        path: path.into(),
        source,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(wrong)?;
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(wrong)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(CommandError::TooLarge { path: path.into() });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use written_out::compose;

    use super::*;

    /// The README's composition, written out.
    mod written_out {
        use super::Matrix;

        fn times(a: &Matrix, b: &Matrix) -> Matrix {
            std::array::from_fn(|row| {
                std::array::from_fn(|column| (0..4).map(|at| a[row][at] * b[at][column]).sum())
            })
        }

        fn shift(by: [f64; 3]) -> Matrix {
            [
                [1.0, 0.0, 0.0, by[0]],
                [0.0, 1.0, 0.0, by[1]],
                [0.0, 0.0, 1.0, by[2]],
                [0.0, 0.0, 0.0, 1.0],
            ]
        }

        fn turn(axis: usize, degrees: f64) -> Matrix {
            let (sin, cos) = degrees.to_radians().sin_cos();
            let (a, b) = ((axis + 1) % 3, (axis + 2) % 3);
            let mut out = shift([0.0; 3]);
            (out[a][a], out[b][b]) = (cos, cos);
            (out[a][b], out[b][a]) = (-sin, sin);
            out
        }

        pub(super) fn compose(parameters: [f64; 6], centre: [f64; 3]) -> Matrix {
            let [x, y, z, about_x, about_y, about_z] = parameters;
            let steps = [
                shift([x, y, z]),
                shift(centre),
                turn(2, about_z),
                turn(1, about_y),
                turn(0, about_x),
                shift(centre.map(|part| -part)),
            ];
            steps
                .iter()
                .fold(shift([0.0; 3]), |all, step| times(&all, step))
        }
    }

    #[test]
    fn parameters_compose_to_the_matrix_as_the_convention_says() {
        let centre = [4.0, -7.0, 12.0];
        let motion = Rigid::from_parameters([1.0, -2.0, 0.5, 0.03, -0.02, 0.05], centre);
        let found = compose(ras_degrees(&motion), [-4.0, 7.0, 12.0]);
        for (found, expected) in found
            .iter()
            .flatten()
            .zip(motion.matrix_ras().iter().flatten())
        {
            assert!((found - expected).abs() < 1e-9, "{found} and {expected}");
        }
    }

    const SIDES: [i16; 3] = [32, 36, 28];
    const SPACING_MM: f64 = 5.0;

    /// A NIfTI-1 run of bytes: a head of lumps, shifted to the right in each volume.
    fn run(shifts_mm: &[Option<f64>]) -> Vec<u8> {
        let mut bytes = vec![0; 352];
        let mut put = |at: usize, number: &[u8]| {
            bytes[at..at + number.len()].copy_from_slice(number);
        };
        put(0, &348_i32.to_le_bytes());
        let volumes = i16::try_from(shifts_mm.len()).unwrap();
        for (at, number) in [(40, 4), (48, volumes), (70, 2), (254, 1)] {
            put(at, &number.to_le_bytes());
        }
        for (axis, side) in SIDES.into_iter().enumerate() {
            put(42 + 2 * axis, &side.to_le_bytes());
            put(280 + 20 * axis, &5_f32.to_le_bytes());
        }
        for (at, number) in [(92, 2_f32), (108, 352.0), (112, 1.0)] {
            put(at, &number.to_le_bytes());
        }
        put(344, b"n+1\0");
        let middle = SIDES.map(|side| f64::from(side - 1) / 2.0);
        for shift in shifts_mm {
            for k in 0..SIDES[2] {
                for j in 0..SIDES[1] {
                    for i in 0..SIDES[0] {
                        let at = [i, j, k].map(f64::from);
                        let [x, y, z]: [f64; 3] =
                            std::array::from_fn(|axis| SPACING_MM * (at[axis] - middle[axis]));
                        let value = shift.map_or(9.0, |shift| head([x - shift, y, z]));
                        #[expect(
                            clippy::cast_possible_truncation,
                            clippy::cast_sign_loss,
                            reason = "a byte's worth of a head"
                        )]
                        bytes.push(value as u8);
                    }
                }
            }
        }
        bytes
    }

    fn head([x, y, z]: [f64; 3]) -> f64 {
        let inside = 1.0 - (x / 55.0).powi(2) - (y / 65.0).powi(2) - (z / 50.0).powi(2);
        let lumps = (x / 9.0).sin() * (y / 11.0 + 1.0).cos() + (z / 10.0 + x / 20.0).sin();
        (140.0 + 40.0 * lumps) / (1.0 + (-12.0 * inside).exp())
    }

    fn arguments(bold: PathBuf, out: PathBuf, reference: usize) -> Arguments {
        Arguments {
            bold,
            out,
            reference,
            fd_limit_mm: 0.5,
        }
    }

    #[test]
    fn volumes_that_cannot_be_realigned_are_null_with_their_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (bold, out) = (dir.path().join("run.nii"), dir.path().join("motion.json"));
        let mut bytes = run(&[Some(0.0), Some(2.0), None, Some(-1.0), Some(0.0)]);
        bytes.truncate(bytes.len() - 7);
        std::fs::write(&bold, bytes).unwrap();
        motion(&arguments(bold, out.clone(), 0)).unwrap();
        let report: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
        let shift = |volume: usize| report["matrices_ras"][volume][0][3].as_f64();
        assert_eq!(shift(0), Some(0.0));
        assert!((shift(1).unwrap() - 2.0).abs() < 0.1, "{:?}", shift(1));
        assert!((shift(3).unwrap() + 1.0).abs() < 0.1, "{:?}", shift(3));
        let quality = &report["quality"];
        assert_eq!(quality[1]["motion_spike"], true);
        assert_eq!(quality[3]["compared_with_volume"], 1);
        for (entry, volume, reason) in [(0, 2, "correlates"), (1, 4, "bytes")] {
            let unrealigned = &report["unrealigned"][entry];
            assert_eq!(unrealigned["volume"], volume);
            assert!(
                unrealigned["reason"].as_str().unwrap().contains(reason),
                "{unrealigned}"
            );
            for list in ["matrices_ras", "parameters", "quality"] {
                assert!(report[list][volume].is_null(), "{list}");
            }
        }
        assert_eq!(report["unrealigned"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn run_without_a_head_and_reference_that_is_not_there_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (bold, out) = (dir.path().join("run.nii"), dir.path().join("motion.json"));
        std::fs::write(&bold, run(&[Some(0.0), None, None])).unwrap();
        let none = motion(&arguments(bold.clone(), out.clone(), 0));
        assert!(
            matches!(none, Err(CommandError::None { volumes: 2, .. })),
            "{none:?}"
        );
        let flat = motion(&arguments(bold.clone(), out.clone(), 1));
        assert!(
            matches!(flat, Err(CommandError::Unusable { volume: 1, .. })),
            "{flat:?}"
        );
        let beyond = motion(&arguments(bold, out, 3));
        assert!(
            matches!(beyond, Err(CommandError::Reference { found: 3, .. })),
            "{beyond:?}"
        );
    }
}
