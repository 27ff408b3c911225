//! The crate against the shared scanner data (`shared/scanner` beside the workspace).
//!
//! Where the data are not there, one line on stderr says so and every test passes: the
//! data are too large to travel with the sources.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod glm;
mod hostile;
mod motion;
mod series;
mod session;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Once;

use ndarray::Array2;
use ndarray_npy::ReadNpyExt;
use serde_json::Value;

/// Tolerances of the data's README, one name each.
mod tolerance {
    /// Corner of an affine, millimetres.
    pub(crate) const CORNER_MM: f64 = 0.01;
    /// Repetition time, milliseconds (one microsecond).
    pub(crate) const TR_MS: f64 = 1e-3;
    /// A slice's time, milliseconds.
    pub(crate) const SLICE_TIME_MS: f64 = 5.0;
    /// A beta in double precision, share of the RMS beta.
    pub(crate) const BETA: f64 = 1e-6;
    /// A z-score in double precision.
    pub(crate) const Z_SCORE: f64 = 1e-6;
    /// RMS distance from the true motion over a 50 mm sphere, mean over volumes, mm.
    pub(crate) const MOTION_MEAN_MM: f64 = 0.02;
    /// The same, of the worst volume, mm.
    pub(crate) const MOTION_WORST_MM: f64 = 0.05;
    /// RMS distance of a registration from the true one over a 50 mm sphere, mm.
    pub(crate) const REGISTRATION_MM: f64 = 0.1;
    /// The same in another contrast, mm: a tenth of a voxel of 3 x 3 x 4 mm. A voxel mixes
    /// tissues before contrast is looked at, so that the rim is no function of the other's.
    pub(crate) const OTHER_CONTRAST_MM: f64 = 0.3;
    /// A sample of the response, share of the largest.
    pub(crate) const RESPONSE: f64 = 1e-9;
    /// A value of a design, which the files give to 12 digits.
    pub(crate) const DESIGN: f64 = 1e-9;
}

/// The data's folder, or `None` with one line on stderr per run of this binary.
fn scanner() -> Option<PathBuf> {
    static ABSENT: Once = Once::new();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/scanner");
    if dir.is_dir() {
        return Some(dir);
    }
    ABSENT.call_once(|| eprintln!("{} was not found, its tests pass unseen", dir.display()));
    None
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    let path = path.as_ref();
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&read(path)).unwrap()
}

/// A `.npy` matrix of doubles.
fn matrix(path: impl AsRef<Path>) -> Array2<f64> {
    Array2::read_npy(read(path).as_slice()).unwrap()
}

/// A table of numbers below one line of names, separated by commas or tabs.
fn table(path: impl AsRef<Path>) -> Array2<f64> {
    let text = String::from_utf8(read(path)).unwrap();
    let rows: Vec<Vec<f64>> = text
        .lines()
        .skip(1)
        .map(|line| {
            let cells = line.split([',', '\t']);
            cells.map(|cell| cell.parse().unwrap()).collect()
        })
        .collect();
    let columns = rows[0].len();
    Array2::from_shape_vec((rows.len(), columns), rows.concat()).unwrap()
}

/// The files of a `.tar.zst`, by name without folders, in the archive's order.
fn unpack(path: impl AsRef<Path>) -> Vec<(String, Vec<u8>)> {
    let packed = read(path);
    let mut archive = tar::Archive::new(zstd::Decoder::new(packed.as_slice()).unwrap());
    let mut files = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = entry.path().unwrap().file_name().unwrap().to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        files.push((name.into_string().unwrap(), bytes));
    }
    files
}

/// The files of a folder, by name.
fn folder(path: impl AsRef<Path>) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), read(entry.path())))
        .collect();
    files.sort();
    files
}
