//! `afterimage volumes`: a folder of scanner files to NIfTI images, offline.
//!
//! Steps: every file below the folder goes through the sandboxed parser of the running box; slices
//! are put together; volumes wait in a file of their own per series; at the end each series is
//! written in order of its volumes' numbers, as a 4-D image and a JSON file. All of it is written
//! into a hidden folder that becomes the wanted one when everything is done.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use ndarray::Array3;
use rtfmri::NiftiError;
use rtfmri::assembly::{Added, Assembler, Limits};
use rtfmri::nifti::{SeriesHeader, SeriesWriter, Stored};
use serde::Serialize;
use wire::{ParseReply, SliceMessage, VolumeMessage};

use crate::acquire::parser::Parser;
use crate::logging::chain;
use crate::{pipeline, record, roles};

/// Longest file: what fits one message to the parser.
const MAX_FILE_BYTES: u64 = 63 << 20;
/// Longest time for one file, on a machine that may be busy.
const PARSE_WITHIN: Duration = Duration::from_secs(10);
const PARSE_MEMORY_BYTES: u64 = 512 << 20;
/// Series of one folder: each has a file open.
const MAX_SERIES: usize = 256;
/// Files of one folder.
const MAX_FILES: usize = 2_000_000;
const MAX_DEPTH: usize = 32;
/// Reasons that are listed.
const MAX_REASONS: usize = 20;
/// An export slice by slice holds nearly a whole run before its first volume is complete.
const WAITING: Limits = Limits {
    volumes: 65_536,
    bytes: 8 << 30,
};
/// A day of the scanner's clock.
const DAY_MS: f64 = 86_400_000.0;
const SAY_EVERY: Duration = Duration::from_millis(500);

/// What to read, and where to write.
#[derive(Args)]
#[command(after_help = HELP)]
pub(crate) struct Arguments {
    /// The folder with the scanner's files; folders in it are searched as well
    dir: PathBuf,
    /// The folder to write; not there yet, or empty
    #[arg(long)]
    out: PathBuf,
}

const HELP: &str = "\
Every file below DIR is read in the same sandboxed process that reads the scanner's files on the box:
Siemens mosaics and XA multi-frame files, GE and Philips files of one slice. What is something else
is counted with its reason.

For each series OUT gets series001.nii.gz, ... (4-D; voxels as the scanner stored them, Philips' in
its floating-point units; volumes in order of their numbers) and series001.json: repetition time,
slice times, affine, files of each volume, and which volumes are missing or incomplete. No name of a
patient or of a file goes into them. OUT appears when all is written.

Exit code: 0 done, 1 where no series could be read.

Example:
  afterimage volumes /data/export/monday --out monday-nifti";

#[derive(Debug, thiserror::Error)]
enum VolumesError {
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("--out {path} exists already")]
    Exists { path: PathBuf },
    #[error("{path} holds more than {MAX_FILES} files")]
    TooMany { path: PathBuf },
    #[error("{path} cannot be written")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("an image cannot be written")]
    Image(#[from] NiftiError),
    #[error(transparent)]
    Record(#[from] record::RecordError),
    #[error("signals cannot be waited for")]
    Signals(#[source] std::io::Error),
    #[error("stopped; nothing was written")]
    Stopped,
    #[error("no file below {path} is a volume or a slice of one")]
    Nothing { path: PathBuf },
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match convert(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn convert(arguments: &Arguments) -> Result<(), VolumesError> {
    let out = &arguments.out;
    // A folder with nothing in it is replaced by the rename at the end.
    let empty = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    if out.exists() && !empty {
        return Err(VolumesError::Exists { path: out.clone() });
    }
    let stop = roles::stop_on_signal().map_err(VolumesError::Signals)?;
    let files = files_below(&arguments.dir)?;
    let scratch = Scratch::beside(out)?;
    let mut found = Found::new(scratch.dir.clone());
    let mut parser = Parser::new(PARSE_WITHIN, PARSE_MEMORY_BYTES);
    let mut progress = Progress::new(files.len());
    for (index, path) in files.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(VolumesError::Stopped);
        }
        progress.say(index);
        found.take(path, &mut parser)?;
    }
    progress.end();
    found.finish_slices()?;
    let written = found.write(&stop)?;
    report(&written, &found.refused);
    if written.is_empty() {
        return Err(VolumesError::Nothing {
            path: arguments.dir.clone(),
        });
    }
    scratch.become_folder(out)
}

/// Every plain file below a folder, by name.
fn files_below(dir: &Path) -> Result<Vec<PathBuf>, VolumesError> {
    let read = |path: &Path| {
        let path = path.to_path_buf();
        move |source| VolumesError::Read { path, source }
    };
    let mut files = Vec::new();
    let mut folders = vec![(dir.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(read(&folder))? {
            let entry = entry.map_err(read(&folder))?;
            let kind = entry.file_type().map_err(read(&folder))?;
            if kind.is_dir() && depth < MAX_DEPTH {
                folders.push((entry.path(), depth + 1));
            } else if kind.is_file()
                // Links to files are followed, and none to folders: those may lead in circles.
                || (kind.is_symlink() && fs::metadata(entry.path()).is_ok_and(|to| to.is_file()))
            {
                files.push(entry.path());
            }
            if files.len() > MAX_FILES {
                return Err(VolumesError::TooMany { path: dir.into() });
            }
        }
    }
    files.sort();
    Ok(files)
}

/// From one time of day to another, milliseconds: the scanner's clock begins anew at midnight.
fn since(time_ms: f64, first_ms: f64) -> f64 {
    let after_ms = time_ms - first_ms;
    if after_ms < -DAY_MS / 2.0 {
        after_ms + DAY_MS
    } else {
        after_ms
    }
}

/// A hidden folder beside the wanted one; gone with all that is in it unless it becomes that.
struct Scratch {
    dir: PathBuf,
    kept: bool,
}

impl Scratch {
    fn beside(out: &Path) -> Result<Scratch, VolumesError> {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let hidden = format!(".{name}.{}.partial", std::process::id());
        let dir = out.with_file_name(hidden);
        let write = |path: &Path| {
            let path = path.to_path_buf();
            move |source| VolumesError::Write { path, source }
        };
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(write(parent))?;
        }
        fs::create_dir(&dir).map_err(write(&dir))?;
        Ok(Scratch { dir, kept: false })
    }

    fn become_folder(mut self, out: &Path) -> Result<(), VolumesError> {
        fs::rename(&self.dir, out).map_err(|source| VolumesError::Write {
            path: out.into(),
            source,
        })?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.kept {
            // What cannot be removed is hidden, and its name says what it is.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Says on standard error how far the reading is, for work that takes long enough.
struct Progress {
    total: usize,
    started: Instant,
    said: Option<Instant>,
    terminal: bool,
}

impl Progress {
    fn new(total: usize) -> Progress {
        Progress {
            total,
            started: Instant::now(),
            said: None,
            terminal: std::io::stderr().is_terminal(),
        }
    }

    fn say(&mut self, done: usize) {
        let every = if self.terminal {
            SAY_EVERY
        } else {
            20 * SAY_EVERY
        };
        if self.said.unwrap_or(self.started).elapsed() < every {
            return;
        }
        self.said = Some(Instant::now());
        let (start, end) = if self.terminal {
            ("\r", "")
        } else {
            ("", "\n")
        };
        let total = self.total;
        let _ = write!(std::io::stderr(), "{start}{done} of {total} files{end}");
    }

    fn end(&self) {
        if self.terminal && self.said.is_some() {
            let total = self.total;
            let _ = writeln!(std::io::stderr(), "\r{total} of {total} files");
        }
    }
}

/// What the files turned out to be.
struct Found {
    dir: PathBuf,
    series: BTreeMap<[u8; 16], Series>,
    /// Series in the order in which they were met.
    order: Vec<[u8; 16]>,
    /// Files that are no part of any series, by reason.
    refused: BTreeMap<String, usize>,
}

/// One series as far as it is read.
#[derive(Default)]
struct Series {
    assembler: Option<Assembler>,
    spool: Option<Spool>,
    volumes: BTreeMap<u32, Kept>,
    duplicates: usize,
}

/// Voxels that wait to be written, single precision.
struct Spool {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    shape: [u32; 3],
    affine_lps: [[f64; 4]; 4],
    tr_ms: f64,
    patient: u64,
    least: f32,
    most: f32,
    whole: bool,
}

/// A volume in the spool.
struct Kept {
    at: u64,
    files: usize,
    time_ms: Option<f64>,
    slice_times_ms: Option<Vec<f32>>,
}

impl Found {
    fn new(dir: PathBuf) -> Found {
        Found {
            dir,
            series: BTreeMap::new(),
            order: Vec::new(),
            refused: BTreeMap::new(),
        }
    }

    fn refuse(&mut self, reason: String) {
        *self.refused.entry(reason).or_default() += 1;
    }

    /// Reads one file.
    fn take(&mut self, path: &Path, parser: &mut Parser) -> Result<(), VolumesError> {
        let mut bytes = Vec::new();
        let read =
            File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes));
        if let Err(error) = read {
            self.refuse(format!("cannot be read: {}", error.kind()));
            return Ok(());
        }
        if bytes.len() as u64 > MAX_FILE_BYTES {
            self.refuse(format!("larger than {} MiB", MAX_FILE_BYTES >> 20));
            return Ok(());
        }
        match parser.parse(&bytes) {
            Ok(ParseReply::Volume(volume)) => self.volume(volume, 1),
            Ok(ParseReply::Slice(slice)) => self.slice(slice),
            Ok(ParseReply::Image(_)) => {
                self.refuse("a NIfTI image already".into());
                Ok(())
            }
            Ok(ParseReply::Refused { reason }) => {
                self.refuse(reason);
                Ok(())
            }
            Err(error) => {
                self.refuse(chain(&error));
                Ok(())
            }
        }
    }

    fn series_of(&mut self, key: [u8; 16]) -> Option<&mut Series> {
        if !self.series.contains_key(&key) {
            if self.series.len() >= MAX_SERIES {
                self.refuse(format!("of more than {MAX_SERIES} series"));
                return None;
            }
            self.order.push(key);
        }
        Some(self.series.entry(key).or_default())
    }

    fn slice(&mut self, message: SliceMessage) -> Result<(), VolumesError> {
        let (key, patient) = (message.series, message.patient);
        let Some(slice) = pipeline::slice_of(message) else {
            self.refuse("pixels do not fill their shape".into());
            return Ok(());
        };
        let Some(series) = self.series_of(key) else {
            return Ok(());
        };
        let assembler = series
            .assembler
            .get_or_insert_with(|| Assembler::new(WAITING));
        match assembler.add(slice) {
            Ok(Added::Complete(volume)) => {
                let files = volume.voxels.dim().0;
                let message = VolumeMessage {
                    series: key,
                    patient,
                    ..pipeline::volume_message(*volume)
                };
                self.volume(message, files)
            }
            Ok(Added::Waiting { .. }) => Ok(()),
            Ok(Added::Duplicate) => {
                series.duplicates += 1;
                Ok(())
            }
            Err(error) => {
                self.refuse(chain(&error));
                Ok(())
            }
        }
    }

    /// Volumes of series whose files do not state how many slices there are.
    fn finish_slices(&mut self) -> Result<(), VolumesError> {
        for key in self.order.clone() {
            let assembler = self.series.get_mut(&key).and_then(|s| s.assembler.as_mut());
            let finished = assembler.map(Assembler::finish).unwrap_or_default();
            for volume in finished {
                match volume {
                    Ok(volume) => {
                        let files = volume.voxels.dim().0;
                        let message = VolumeMessage {
                            series: key,
                            patient: 0,
                            ..pipeline::volume_message(volume)
                        };
                        self.volume(message, files)?;
                    }
                    Err(error) => self.refuse(chain(&error)),
                }
            }
        }
        Ok(())
    }

    /// - `files`: that the volume came in.
    fn volume(&mut self, volume: VolumeMessage, files: usize) -> Result<(), VolumesError> {
        let hash: String = volume
            .series
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let path = self.dir.join(format!("{hash}.voxels"));
        let Some(series) = self.series_of(volume.series) else {
            return Ok(());
        };
        if let Some(at) = series.volumes.get(&volume.number).map(|kept| kept.at) {
            let same = match &mut series.spool {
                Some(spool) => spool.voxels(at)?.iter().eq(&volume.voxels),
                None => false,
            };
            if same {
                series.duplicates += files;
            } else {
                self.refuse("another image of a volume that is there already".into());
            }
            return Ok(());
        }
        let spool = match &mut series.spool {
            Some(spool) => spool,
            none => none.insert(Spool::begin(path, &volume)?),
        };
        if let Some(reason) = spool.refusal(&volume) {
            self.refuse(reason.into());
            return Ok(());
        }
        let at = spool.push(&volume.voxels)?;
        series.volumes.insert(
            volume.number,
            Kept {
                at,
                files,
                time_ms: volume.time_ms,
                slice_times_ms: volume.slice_times_ms,
            },
        );
        Ok(())
    }

    /// Writes every series that has a volume; returns what was written.
    fn write(&mut self, stop: &AtomicBool) -> Result<Vec<Written>, VolumesError> {
        let mut written: Vec<Written> = Vec::new();
        for key in &self.order {
            let Some(series) = self.series.get_mut(key) else {
                continue;
            };
            if series.volumes.is_empty() {
                continue;
            }
            if stop.load(Ordering::Relaxed) {
                return Err(VolumesError::Stopped);
            }
            let name = format!("series{:03}", written.len() + 1);
            let note = series.write(&self.dir, &name)?;
            written.push(Written { name, note });
        }
        for series in self.series.values_mut() {
            if let Some(spool) = series.spool.take() {
                fs::remove_file(&spool.path).map_err(|source| VolumesError::Write {
                    path: spool.path.clone(),
                    source,
                })?;
            }
        }
        Ok(written)
    }
}

impl Spool {
    fn begin(path: PathBuf, first: &VolumeMessage) -> Result<Spool, VolumesError> {
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        Ok(Spool {
            file: file.map_err(|source| VolumesError::Write {
                path: path.clone(),
                source,
            })?,
            path,
            len_bytes: 0,
            shape: first.shape,
            affine_lps: first.affine_lps,
            tr_ms: first.tr_ms,
            patient: first.patient,
            least: f32::INFINITY,
            most: f32::NEG_INFINITY,
            whole: true,
        })
    }

    /// Why a volume is none of this series.
    fn refusal(&self, volume: &VolumeMessage) -> Option<&'static str> {
        let rows = self.affine_lps.iter().zip(&volume.affine_lps);
        let moved = rows
            .flat_map(|(own, other)| own.iter().zip(other))
            .any(|(own, other)| (own - other).abs() > 1e-3);
        if self.patient != volume.patient {
            Some("of another patient than its series' first volume")
        } else if self.shape != volume.shape || moved {
            Some("of another grid than its series' first volume")
        } else if (self.tr_ms - volume.tr_ms).abs() > 0.5 {
            Some("of another repetition time than its series' first volume")
        } else {
            None
        }
    }

    fn failed(&self) -> impl Fn(std::io::Error) -> VolumesError + use<> {
        let path = self.path.clone();
        move |source| VolumesError::Write {
            path: path.clone(),
            source,
        }
    }

    /// Keeps voxels; returns where.
    fn push(&mut self, voxels: &[f32]) -> Result<u64, VolumesError> {
        let mut bytes = Vec::with_capacity(voxels.len() * 4);
        for value in voxels {
            self.least = self.least.min(*value);
            self.most = self.most.max(*value);
            self.whole &= value.fract() == 0.0;
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        let at = self.len_bytes;
        // A look at an earlier volume leaves the place behind that.
        self.file.seek(SeekFrom::Start(at)).map_err(self.failed())?;
        self.file.write_all(&bytes).map_err(self.failed())?;
        self.len_bytes += bytes.len() as u64;
        Ok(at)
    }

    fn voxels(&mut self, at: u64) -> Result<Array3<f32>, VolumesError> {
        let [slices, rows, columns] = self.shape.map(|side| side as usize);
        let mut bytes = vec![0; slices * rows * columns * 4];
        let failed = self.failed();
        self.file.seek(SeekFrom::Start(at)).map_err(&failed)?;
        self.file.read_exact(&mut bytes).map_err(&failed)?;
        let (values, _) = bytes.as_chunks::<4>();
        let values = values.iter().map(|value| f32::from_le_bytes(*value));
        let voxels = Array3::from_shape_vec((slices, rows, columns), values.collect());
        voxels.map_err(|_| failed(std::io::ErrorKind::UnexpectedEof.into()))
    }

    /// The smallest type that holds every value exactly.
    fn stored(&self) -> Stored {
        if self.whole && self.least >= -32_768.0 && self.most <= 32_767.0 {
            Stored::I16
        } else if self.whole && self.least >= 0.0 && self.most <= 65_535.0 {
            Stored::U16
        } else {
            Stored::F32
        }
    }
}

impl Series {
    fn write(&mut self, dir: &Path, name: &str) -> Result<Note, VolumesError> {
        let Some(spool) = &mut self.spool else {
            return Err(VolumesError::Nothing { path: dir.into() });
        };
        let [slices, rows, columns] = spool.shape;
        let mut affine_ras = spool.affine_lps;
        for row in &mut affine_ras[..2] {
            *row = row.map(|value| 0.0 - value);
        }
        let header = SeriesHeader {
            shape: [columns, rows, slices].map(|side| side as usize),
            volumes: self.volumes.len(),
            affine_ras,
            tr_ms: spool.tr_ms,
            stored: spool.stored(),
        };
        let path = dir.join(format!("{name}.nii.gz"));
        let failed = |source| VolumesError::Write {
            path: path.clone(),
            source,
        };
        let file = File::create_new(&path).map_err(failed)?;
        let mut writer = SeriesWriter::new(BufWriter::new(file), header)?;
        for kept in self.volumes.values() {
            writer.push(&spool.voxels(kept.at)?)?;
        }
        let file = writer.finish()?.into_inner();
        let file = file.map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        let note = self.note(affine_ras);
        record::write_json(&dir.join(format!("{name}.json")), &note)?;
        Ok(note)
    }

    fn note(&self, affine_ras: [[f64; 4]; 4]) -> Note {
        let (shape, tr_ms) = self
            .spool
            .as_ref()
            .map_or(([0; 3], 0.0), |spool| (spool.shape, spool.tr_ms));
        let [slices, rows, columns] = shape;
        // First volumes of multi-band series are known to carry another protocol's times.
        let times = self
            .volumes
            .values()
            .skip(1)
            .chain(self.volumes.values().take(1))
            .find_map(|kept| kept.slice_times_ms.as_ref());
        let first_ms = self.volumes.values().find_map(|kept| kept.time_ms);
        let last = self.volumes.keys().last().copied().unwrap_or(0);
        let first = self.volumes.keys().next().copied().unwrap_or(1);
        let waiting = self.assembler.as_ref().map(Assembler::incomplete);
        let waiting = waiting.unwrap_or_default();
        let incomplete: Vec<IncompleteNote> = waiting
            .into_iter()
            .map(|volume| IncompleteNote {
                number: volume.number,
                slices: volume.present,
                of: volume.expected,
                missing_slices: volume.missing,
            })
            .collect();
        let known: BTreeSet<u32> = incomplete.iter().map(|volume| volume.number).collect();
        Note {
            tr_s: seconds(tr_ms),
            slice_times_s: times.map(|times| {
                let times = times.iter().map(|time| seconds(f64::from(*time)));
                times.collect()
            }),
            affine_ras,
            shape: [columns, rows, slices, side(self.volumes.len())],
            volumes: self
                .volumes
                .iter()
                .map(|(number, kept)| VolumeNote {
                    number: *number,
                    files: kept.files,
                    after_first_s: kept
                        .time_ms
                        .zip(first_ms)
                        .map(|(time_ms, first_ms)| seconds(since(time_ms, first_ms))),
                })
                .collect(),
            missing: (first..last)
                .filter(|number| !self.volumes.contains_key(number) && !known.contains(number))
                .take(10_000)
                .collect(),
            incomplete,
            duplicates: self.duplicates,
        }
    }
}

fn side(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Milliseconds as seconds, to the nanosecond.
fn seconds(time_ms: f64) -> f64 {
    (time_ms * 1e6).round() / 1e9
}

/// A series' JSON file; times as BIDS names them.
#[derive(Serialize)]
struct Note {
    #[serde(rename = "RepetitionTime")]
    tr_s: f64,
    /// In the order of the image's third axis; null where the scanner stores none.
    #[serde(rename = "SliceTiming")]
    slice_times_s: Option<Vec<f64>>,
    /// `(i, j, k)` to RAS, millimetres.
    affine_ras: [[f64; 4]; 4],
    shape: [u32; 4],
    volumes: Vec<VolumeNote>,
    /// Numbers between the first and the last volume of which no file came.
    missing: Vec<u32>,
    incomplete: Vec<IncompleteNote>,
    /// Files that were there twice.
    duplicates: usize,
}

#[derive(Serialize)]
struct VolumeNote {
    number: u32,
    files: usize,
    /// By the scanner's clock, where headers have it.
    after_first_s: Option<f64>,
}

#[derive(Serialize)]
struct IncompleteNote {
    number: u32,
    slices: usize,
    of: Option<usize>,
    /// By place from 0, where a complete volume tells the places.
    missing_slices: Option<Vec<usize>>,
}

struct Written {
    name: String,
    note: Note,
}

/// Says what was written, and what was not and why.
fn report(written: &[Written], refused: &BTreeMap<String, usize>) {
    let mut out = std::io::stdout().lock();
    for Written { name, note } in written {
        let [i, j, k, volumes] = note.shape;
        let times = match note.slice_times_s {
            Some(_) => "with slice times",
            None => "no slice times",
        };
        let mut line = format!(
            "{name}.nii.gz  {i} x {j} x {k}, {volumes} volumes, TR {} s, {times}",
            note.tr_s
        );
        for (count, what) in [
            (note.missing.len(), "missing"),
            (note.incomplete.len(), "incomplete"),
        ] {
            if count > 0 {
                line += &format!(", {count} {what}");
            }
        }
        if note.duplicates > 0 {
            line += &format!(", {} files twice", note.duplicates);
        }
        let _ = writeln!(out, "{line}");
    }
    let mut reasons: Vec<(&String, &usize)> = refused.iter().collect();
    reasons.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    if !reasons.is_empty() {
        let files: usize = refused.values().sum();
        let _ = writeln!(out, "{files} files are not used:");
    }
    for (reason, count) in reasons.iter().take(MAX_REASONS) {
        let _ = writeln!(out, "{count:>7}  {reason}");
    }
    if let Some(rest) = reasons.get(MAX_REASONS..).filter(|rest| !rest.is_empty()) {
        let files: usize = rest.iter().map(|(_, count)| **count).sum();
        let _ = writeln!(out, "{files:>7}  for {} other reasons", rest.len());
    }
}
