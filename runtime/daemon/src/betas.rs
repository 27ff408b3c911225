//! `afterimage betas`: a recorded run to single-trial betas and z-scores, offline.
//!
//! The same fit as in the running daemon, on files: read the run, events and confounds; fit each
//! trial with the volumes of its decode time; score; write.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use ndarray::{Array1, Array2, Axis};
use ndarray_npy::{ViewNpyExt, WriteNpyExt};
use rtfmri::confounds::{self, ConfoundsError};
use rtfmri::events::{self, Event, EventsError};
use rtfmri::glm::{
    DecodeTime, DecodeTimes, Design, GlmError, GlmSettings, Hrf, Noise, RunLength, TrialFit,
    volumes_needed,
};
use rtfmri::nifti::SeriesReader;
use rtfmri::zscore::{RepeatAverage, RunningZScore, ZScoreError};
use rtfmri::{Mask, MaskError, NiftiError, PatientTag, SeriesUid, Volume, VolumeHeader};

use crate::logging::chain;
use crate::record;

/// Longest file of a run.
const MAX_BYTES: u64 = 4 << 30;
/// Longest events, confounds or mask file; their readers have tighter bounds of their own.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Most values of a run's series, eight bytes each.
const MAX_VALUES: usize = 1 << 30;

/// Estimate every trial's response in a recorded run, and its z-score
///
/// Each trial has a model of its own (least squares, single): the trial, all others begun so far,
/// the confounds, slow cosines and a constant, fitted to the volumes acquired by its decode time.
///
/// Writes three arrays of doubles, [trial, voxel], trials by onset:
///   FILE.npy           betas, in the run's units
///   FILE_zscored.npy   each trial's betas, z-scored over the trials so far, itself included
///   FILE_variance.npy  variance of each beta, with --variance
///   FILE_repeats.npy   z-scores averaged over repeats of the stimulus so far, with --repeats
/// where FILE is --out without .npy: --out sub-01.npy also writes sub-01_zscored.npy.
///
/// A trial that cannot be fitted is a row of NaN and is named, with the reason, on standard error.
///
///   afterimage betas --bold run-1.npy --events run-1_events.tsv --confounds motion.tsv \
///     --tr 1.5 --hrf glover --noise ar1 --out run-1_betas.npy
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Arguments {
    /// The run: .npy, [volume, voxel], float32 or float64; or a 4-D .nii or .nii.gz. A volume that
    /// is NaN throughout is a missing one
    #[arg(long, value_name = "FILE")]
    bold: PathBuf,
    /// Which voxels of a NIfTI run, not zero in this NIfTI image, in C order of (i, j, k); without
    /// it all that are above zero in every volume
    #[arg(long, value_name = "FILE")]
    mask: Option<PathBuf>,
    /// BIDS events: tab-separated, columns onset and duration in seconds from the first volume, and
    /// trial_type; every row is a trial
    #[arg(long, value_name = "FILE")]
    events: PathBuf,
    /// Confounds such as head motion: tab-separated, names in the first line, one row per volume,
    /// every column used
    #[arg(long, value_name = "FILE")]
    confounds: Option<PathBuf>,
    /// Repetition time, seconds
    #[arg(long, value_name = "S", value_parser = repetition_time)]
    tr: f64,
    /// Shape of the response
    #[arg(long, value_enum)]
    hrf: HrfArgument,
    /// Noise model
    #[arg(long, value_enum)]
    noise: NoiseArgument,
    /// Which of a trial's decode times
    #[arg(long, value_enum, default_value = "fast")]
    tier: TierArgument,
    /// From onset to the last volume used, seconds: 7.5 where not given (fast) or 29.5 (slow); for
    /// --tier end what the run must have recorded after the onset, 5
    #[arg(long, value_name = "S")]
    delay: Option<f64>,
    /// Also write each beta's variance
    #[arg(long)]
    variance: bool,
    /// Also write averages over repeats: trials of one stim_file, or of one trial_type where the
    /// events name no file
    #[arg(long)]
    repeats: bool,
    /// Where the betas go
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum HrfArgument {
    /// Glover (1999)
    Glover,
    /// SPM's canonical response
    Spm,
}

#[derive(Clone, Copy, ValueEnum)]
enum NoiseArgument {
    /// White: ordinary least squares
    Ols,
    /// First-order autoregressive, per voxel
    Ar1,
}

#[derive(Clone, Copy, ValueEnum)]
enum TierArgument {
    /// As soon as the response has peaked
    Fast,
    /// When it has run its course
    Slow,
    /// With every volume of the run; scored over all its trials
    End,
}

/// Reads `--tr`.
fn repetition_time(text: &str) -> Result<f64, String> {
    let found = text.parse().ok();
    found
        .filter(|tr_s| (0.01..=60.0).contains(tr_s))
        .ok_or_else(|| "expected seconds, 0.01 to 60 (1.5, not 1500)".into())
}

#[derive(Debug, thiserror::Error)]
enum BetasError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {message}")]
    Content { path: PathBuf, message: String },
    #[error("{path} is not a run that can be used")]
    Nifti { path: PathBuf, source: NiftiError },
    #[error("{path}: the mask does not lie on the run's grid")]
    Mask { path: PathBuf, source: MaskError },
    #[error("{path} cannot be used")]
    Events { path: PathBuf, source: EventsError },
    #[error("{path} cannot be used")]
    Confounds {
        path: PathBuf,
        source: ConfoundsError,
    },
    #[error("--delay cannot be used with this --tier")]
    Delay(#[source] GlmError),
    #[error("trial {trial} cannot be fitted")]
    Fit { trial: usize, source: GlmError },
    #[error("trial {trial} cannot be scored")]
    Score { trial: usize, source: ZScoreError },
    #[error("none of the {trials} trials can be fitted")]
    NoTrial { trials: usize },
    #[error("the betas cannot be written")]
    Write(#[from] record::RecordError),
    #[error("cannot write to standard output")]
    Say(#[from] std::io::Error),
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match betas(arguments, &mut std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn betas(arguments: &Arguments, out: &mut dyn Write) -> Result<(), BetasError> {
    let folder = arguments
        .out
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return Err(BetasError::Content {
            path: arguments.out.clone(),
            message: format!("expected a folder {}, there is none", folder.display()),
        });
    }
    let events = read_events(&arguments.events)?;
    let run = Series::read(arguments)?;
    let confounds = match &arguments.confounds {
        Some(path) => Some(read_confounds(path, run.all)?),
        None => None,
    };
    for frame in (0..run.all).filter(|frame| run.frames.binary_search(frame).is_err()) {
        note(&format!("volume {} is NaN throughout: missing", frame + 1));
    }
    let fits = fit(arguments, &events, &run, confounds.as_ref())?;
    let voxels = run.values.ncols();
    let scored = score(arguments.tier, &fits, voxels)?;

    let select = |pick: fn(&TrialFit) -> &Array1<f64>| {
        let rows = fits.iter().map(|fit| fit.as_ref().map(pick));
        rows.collect::<Vec<Option<&Array1<f64>>>>()
    };
    let mut written = vec![beside(&arguments.out, "zscored")];
    write(
        &written[0],
        &table(
            &scored.iter().map(Option::as_ref).collect::<Vec<_>>(),
            voxels,
        ),
    )?;
    if arguments.variance {
        let path = beside(&arguments.out, "variance");
        write(&path, &table(&select(|fit| &fit.variance), voxels))?;
        written.push(path);
    }
    if arguments.repeats {
        let averaged = average(&events, &scored, voxels)?;
        let path = beside(&arguments.out, "repeats");
        let rows: Vec<_> = averaged.iter().map(Option::as_ref).collect();
        write(&path, &table(&rows, voxels))?;
        written.push(path);
    }
    // Last: where the betas are, the others are too.
    write(&arguments.out, &table(&select(|fit| &fit.betas), voxels))?;
    let fitted = fits.iter().flatten().count();
    let (path, trials) = (arguments.out.display(), fits.len());
    writeln!(
        out,
        "{path}: betas of {fitted} of {trials} trials, {voxels} voxels"
    )?;
    for path in written {
        writeln!(out, "{}", path.display())?;
    }
    Ok(())
}

/// Every trial's fit, `None` where it was skipped and named.
fn fit(
    arguments: &Arguments,
    events: &[Event],
    run: &Series,
    confounds: Option<&Array2<f64>>,
) -> Result<Vec<Option<TrialFit>>, BetasError> {
    let mut times = DecodeTimes::default();
    let time = match arguments.tier {
        TierArgument::Fast => DecodeTime::Fast,
        TierArgument::Slow => DecodeTime::Slow,
        TierArgument::End => DecodeTime::EndOfRun,
    };
    let delay_s = match time {
        DecodeTime::Fast => &mut times.fast_s,
        DecodeTime::Slow => &mut times.slow_s,
        DecodeTime::EndOfRun => &mut times.end_of_run_s,
    };
    *delay_s = arguments.delay.unwrap_or(*delay_s);
    let delay_s = *delay_s;
    if time == DecodeTime::Fast {
        times.slow_s = times.slow_s.max(times.fast_s);
    }
    times.check().map_err(BetasError::Delay)?;
    let hrf = match arguments.hrf {
        HrfArgument::Glover => Hrf::Glover,
        HrfArgument::Spm => Hrf::Spm,
    };
    let noise = match arguments.noise {
        NoiseArgument::Ols => Noise::Ols,
        NoiseArgument::Ar1 => Noise::Ar1,
    };
    let mut settings = GlmSettings::new(arguments.tr, hrf, noise);
    settings.delay_s = times.fast_s;

    let present = confounds.map(|confounds| confounds.select(Axis(0), &run.frames));
    let rows: Vec<&[f64]> = run
        .values
        .rows()
        .into_iter()
        .filter_map(|row| row.to_slice())
        .collect();
    let terminal = std::io::stderr().is_terminal();
    let mut fits = Vec::with_capacity(events.len());
    for (trial, event) in events.iter().enumerate() {
        if terminal {
            // Progress is a courtesy; a closed standard error stops nothing.
            let _ = write!(
                std::io::stderr(),
                "\rtrial {} of {}",
                trial + 1,
                events.len()
            );
        }
        let length = RunLength::Whole(run.all);
        let Some(volumes) = times.volumes(time, event.onset_s, arguments.tr, length) else {
            let needed = volumes_needed(event.onset_s, arguments.tr, delay_s);
            let reason = format!("{needed} volumes are needed, the run has {}", run.all);
            skipped(trial, event, &reason);
            fits.push(None);
            continue;
        };
        let confounds = present.as_ref().map(|confounds| confounds.view());
        let fitted = Design::build_at(&settings, events, trial, volumes, &run.frames, confounds)
            .and_then(|design| design.fit(noise, &rows[..design.frames.len()]));
        match fitted {
            Ok(fit) => fits.push(Some(fit)),
            Err(
                error @ (GlmError::TooFewVolumes { .. }
                | GlmError::MissingVolumes { .. }
                | GlmError::NotEstimable { .. }),
            ) => {
                skipped(trial, event, &error.to_string());
                fits.push(None);
            }
            Err(source) => {
                let trial = trial + 1;
                return Err(BetasError::Fit { trial, source });
            }
        }
    }
    if terminal {
        let _ = writeln!(std::io::stderr());
    }
    if fits.iter().all(Option::is_none) {
        let trials = fits.len();
        return Err(BetasError::NoTrial { trials });
    }
    Ok(fits)
}

fn skipped(trial: usize, event: &Event, reason: &str) {
    let (onset_s, name) = (event.onset_s, &event.trial_type);
    note(&format!(
        "trial {} ({name}, {onset_s} s) is skipped: {reason}",
        trial + 1
    ));
}

fn note(text: &str) {
    let start = if std::io::stderr().is_terminal() {
        "\r"
    } else {
        ""
    };
    let _ = writeln!(std::io::stderr(), "{start}note: {text}");
}

/// Every trial's z-scored betas.
fn score(
    tier: TierArgument,
    fits: &[Option<TrialFit>],
    voxels: usize,
) -> Result<Vec<Option<Array1<f64>>>, BetasError> {
    let mut score = RunningZScore::new(voxels);
    let at = |trial: usize| {
        move |source| BetasError::Score {
            trial: trial + 1,
            source,
        }
    };
    if matches!(tier, TierArgument::End) {
        for (trial, fit) in fits.iter().enumerate() {
            if let Some(fit) = fit {
                score.take(fit.betas.view()).map_err(at(trial))?;
            }
        }
    }
    let mut scored = Vec::with_capacity(fits.len());
    for (trial, fit) in fits.iter().enumerate() {
        let zbetas = fit.as_ref().map(|fit| match tier {
            TierArgument::Fast | TierArgument::Slow => score.push(fit.betas.view()),
            TierArgument::End => score.score(fit.betas.view()),
        });
        scored.push(zbetas.transpose().map_err(at(trial))?);
    }
    Ok(scored)
}

/// Every trial's z-scores averaged over its stimulus so far.
fn average(
    events: &[Event],
    scored: &[Option<Array1<f64>>],
    voxels: usize,
) -> Result<Vec<Option<Array1<f64>>>, BetasError> {
    let mut repeats = RepeatAverage::new(events, voxels);
    let trials = events.iter().zip(scored).enumerate();
    trials
        .map(|(trial, (event, zbetas))| {
            let averaged = zbetas
                .as_ref()
                .map(|zbetas| repeats.push(event.stimulus_name(), zbetas.view()))
                .transpose()
                .map_err(|source| BetasError::Score {
                    trial: trial + 1,
                    source,
                })?;
            Ok(averaged.map(|(mean, _)| mean))
        })
        .collect()
}

/// `[trial, voxel]`; skipped trials are NaN.
fn table(rows: &[Option<&Array1<f64>>], voxels: usize) -> Array2<f64> {
    let mut table = Array2::from_elem((rows.len(), voxels), f64::NAN);
    for (mut row, values) in table.rows_mut().into_iter().zip(rows) {
        if let Some(values) = values {
            row.assign(values);
        }
    }
    table
}

/// The file of another array: `FILE_what.npy` beside `FILE.npy` or `FILE`.
fn beside(out: &Path, what: &str) -> PathBuf {
    let mut name = match out.extension() {
        Some(end) if end == "npy" => out.file_stem(),
        _ => out.file_name(),
    }
    .unwrap_or_default()
    .to_owned();
    name.push(format!("_{what}.npy"));
    out.with_file_name(name)
}

fn write(path: &Path, array: &Array2<f64>) -> Result<(), BetasError> {
    let path = &std::path::absolute(path).map_err(record::at(path))?;
    let mut bytes = Vec::new();
    array
        .write_npy(&mut bytes)
        .map_err(|error| record::at(path)(std::io::Error::other(error.to_string())))?;
    Ok(record::write_whole(path, &bytes)?)
}

fn read(path: &Path, limit: u64) -> Result<Vec<u8>, BetasError> {
    let error = |source| BetasError::Read {
        path: path.into(),
        source,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .map_err(error)?
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(error)?;
    if bytes.len() as u64 > limit {
        return Err(BetasError::Content {
            path: path.into(),
            message: format!("expected at most {limit} bytes, found more"),
        });
    }
    Ok(bytes)
}

fn read_events(path: &Path) -> Result<Vec<Event>, BetasError> {
    let events =
        events::parse(&read(path, MAX_TABLE_BYTES)?).map_err(|source| BetasError::Events {
            path: path.into(),
            source,
        })?;
    if events.is_empty() {
        return Err(BetasError::Content {
            path: path.into(),
            message: "expected at least one event below the header, found none".into(),
        });
    }
    Ok(events)
}

/// `[volume, confound]`
fn read_confounds(path: &Path, volumes: usize) -> Result<Array2<f64>, BetasError> {
    let found = confounds::parse(&read(path, MAX_TABLE_BYTES)?);
    let found = found.map_err(|source| BetasError::Confounds {
        path: path.into(),
        source,
    })?;
    let rows = found.values.nrows();
    if rows != volumes {
        return Err(BetasError::Content {
            path: path.into(),
            message: format!("expected {volumes} rows, one per volume of --bold, found {rows}"),
        });
    }
    Ok(found.values)
}

/// A run's volumes.
struct Series {
    /// Volumes of the run, missing ones included.
    all: usize,
    /// Frame number of each row.
    frames: Vec<usize>,
    /// `[volume, voxel]`, all finite.
    values: Array2<f64>,
}

impl Series {
    fn read(arguments: &Arguments) -> Result<Self, BetasError> {
        let path = &arguments.bold;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let values = if name.ends_with(".npy") {
            if let Some(mask) = &arguments.mask {
                return Err(BetasError::Content {
                    path: mask.clone(),
                    message: "--mask picks voxels of a NIfTI run, a .npy has only its own".into(),
                });
            }
            npy(&read(path, MAX_BYTES)?).map_err(|message| BetasError::Content {
                path: path.clone(),
                message,
            })?
        } else if name.ends_with(".nii") || name.ends_with(".nii.gz") {
            nifti(path, arguments.mask.as_deref())?
        } else {
            return Err(BetasError::Content {
                path: path.clone(),
                message: "expected a file ending in .npy, .nii or .nii.gz".into(),
            });
        };
        Self::checked(values).map_err(|message| BetasError::Content {
            path: path.clone(),
            message,
        })
    }

    /// Takes out volumes that are NaN throughout, and refuses any other hole.
    fn checked(values: Array2<f64>) -> Result<Self, String> {
        let (all, voxels) = values.dim();
        if all == 0 || voxels == 0 {
            return Err(format!(
                "expected volumes and voxels, found {all} of {voxels}"
            ));
        }
        let mut frames = Vec::with_capacity(all);
        for (frame, row) in values.rows().into_iter().enumerate() {
            match row.iter().position(|value| !value.is_finite()) {
                None => frames.push(frame),
                Some(_) if row.iter().all(|value| value.is_nan()) => {}
                Some(voxel) => {
                    let found = row[voxel];
                    let (volume, voxel) = (frame + 1, voxel + 1);
                    return Err(format!(
                        "volume {volume}, voxel {voxel}: expected a finite value, found {found}"
                    ));
                }
            }
        }
        let values = if frames.len() == all {
            values
        } else {
            values.select(Axis(0), &frames)
        };
        Ok(Self {
            all,
            frames,
            values,
        })
    }
}

/// A view compares the header's shape with the length before anything is allocated.
fn npy(bytes: &[u8]) -> Result<Array2<f64>, String> {
    let double = match ndarray::ArrayViewD::<f32>::view_npy(bytes) {
        Ok(values) => values.mapv(f64::from),
        Err(_) => ndarray::ArrayViewD::<f64>::view_npy(bytes)
            .map_err(|error| {
                format!("expected an array of float32 or float64 (little-endian): {error}")
            })?
            .to_owned(),
    };
    let shape = double.shape().to_vec();
    let values = double.into_dimensionality::<ndarray::Ix2>();
    let values = values.map_err(|_| format!("expected shape [volume, voxel], found {shape:?}"))?;
    Ok(values.as_standard_layout().into_owned())
}

/// `[volume, voxel]` of a NIfTI run.
fn nifti(path: &Path, mask: Option<&Path>) -> Result<Array2<f64>, BetasError> {
    let wrong = |source| BetasError::Nifti {
        path: path.into(),
        source,
    };
    let bytes = read(path, MAX_BYTES)?;
    let open = || SeriesReader::open(&bytes).map_err(wrong);
    let volumes = open()?.volumes();
    let missing = || wrong(NiftiError::NotNifti);
    let first = open()?.read_image().ok_or_else(missing)?.map_err(wrong)?;
    let places = match mask {
        Some(mask) => masked(mask, &first)?,
        None => {
            let mut above: Vec<bool> = first.values.iter().map(|value| *value > 0.0).collect();
            let mut run = open()?;
            while let Some(image) = run.read_image() {
                let image = image.map_err(wrong)?;
                for (above, value) in above.iter_mut().zip(&image.values) {
                    *above &= *value > 0.0;
                }
            }
            (0..above.len()).filter(|&place| above[place]).collect()
        }
    };
    if places.is_empty() {
        return Err(BetasError::Content {
            path: mask.unwrap_or(path).into(),
            message: "expected voxels above zero, found none".into(),
        });
    }
    if places.len().saturating_mul(volumes) > MAX_VALUES {
        return Err(BetasError::Content {
            path: path.into(),
            message: format!(
                "{} voxels of {} volumes are too many, expected at most {MAX_VALUES} values: give \
                 a --mask",
                places.len(),
                volumes
            ),
        });
    }
    let mut values = Array2::zeros((volumes, places.len()));
    let mut run = open()?;
    for mut row in values.rows_mut() {
        let image = run.read_image().ok_or_else(missing)?.map_err(wrong)?;
        let image = image.values.as_standard_layout();
        let image = image.as_slice().unwrap_or_default();
        for (value, &place) in row.iter_mut().zip(&places) {
            *value = image.get(place).copied().unwrap_or(f64::NAN);
        }
    }
    Ok(values)
}

/// Where the mask's voxels are in an image on the same grid, as indices in its C order.
///
/// The mask looks for its voxels by their place in the world, in a volume of single precision;
/// so it is given one whose values are their own indices, and the image keeps its digits.
fn masked(path: &Path, image: &rtfmri::nifti::Image) -> Result<Vec<usize>, BetasError> {
    let mask = Mask::from_nifti(&read(path, MAX_TABLE_BYTES)?);
    let mask = mask.map_err(|source| BetasError::Nifti {
        path: path.into(),
        source,
    })?;
    let (ni, nj, nk) = image.values.dim();
    #[expect(
        clippy::cast_precision_loss,
        reason = "images have at most 2^22 voxels, single precision counts to 2^24"
    )]
    let index = |(k, j, i): (usize, usize, usize)| (k + nk * (j + nj * i)) as f32;
    let mut affine_lps = image.affine_ras;
    for row in &mut affine_lps[..2] {
        *row = row.map(|value| -value);
    }
    let volume = Volume {
        voxels: ndarray::Array3::from_shape_fn((nk, nj, ni), index),
        affine_lps,
        header: VolumeHeader {
            series_uid: SeriesUid::new(""),
            patient: PatientTag::default(),
            acquisition: 1,
            instance: None,
            tr_ms: 0.0,
            slice_times_ms: None,
            time_ms: None,
        },
    };
    let found = mask.sample(&volume).map_err(|source| BetasError::Mask {
        path: path.into(),
        source,
    })?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole numbers from 0, written above"
    )]
    Ok(found.iter().map(|&index| index as usize).collect())
}

#[cfg(test)]
mod tests;
