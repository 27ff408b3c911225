//! What a simulated site knows before a run: a mask, the events, and the truth.

use std::fs;
use std::path::{Path, PathBuf};

use ndarray::Array2;
use ndarray_npy::WriteNpyExt;
use rtfmri::Mask;

use super::base::{Base, BaseError};
use super::noise::{Purpose, normals};
use crate::record::{self, RecordError};

/// Onset of the first trial and distance between trials, seconds.
const FIRST_ONSET_S: f64 = 12.0;
const TRIAL_EVERY_S: f64 = 6.0;
const STIMULUS_S: f64 = 3.0;

/// Why a site was not prepared.
#[derive(Debug, thiserror::Error)]
pub(super) enum SiteError {
    /// The folder.
    #[error("cannot make the folder {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Too small a head.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The mask.
    #[error("the mask cannot be made")]
    Mask(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Numbers.
    #[error("{path} cannot be encoded")]
    Npy {
        /// Which.
        path: PathBuf,
        /// Why.
        source: ndarray_npy::WriteNpyError,
    },
    /// A file.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Writes `mask.nii`, `events.tsv` and `true_betas.npy`.
pub(super) fn prepare(
    site: &Path,
    base: &Base,
    seed: u64,
    trials: u32,
    voxels: usize,
) -> Result<(), SiteError> {
    fs::create_dir_all(site).map_err(|source| SiteError::Io {
        path: site.into(),
        source,
    })?;
    let mask = mask(base, voxels)?;
    let bytes = mask
        .to_nifti()
        .map_err(|error| SiteError::Mask(error.into()))?;
    record::write_whole(&site.join("mask.nii"), &bytes)?;

    let mut table = String::from("onset\tduration\ttrial_type\n");
    for trial in 0..trials {
        let onset = FIRST_ONSET_S + f64::from(trial) * TRIAL_EVERY_S;
        table.push_str(&format!("{onset}\t{STIMULUS_S}\tpicture{:03}\n", trial + 1));
    }
    record::write_whole(&site.join("events.tsv"), table.as_bytes())?;

    let trials = usize::try_from(trials).unwrap_or(usize::MAX);
    let betas = drawn_betas(seed, trials, mask.len());
    write_betas(&site.join("true_betas.npy"), &betas)
}

/// A mask of so many voxels that could respond.
pub(super) fn mask(base: &Base, voxels: usize) -> Result<Mask, SiteError> {
    let voxels = base.responding(voxels)?;
    Mask::from_voxels(base.sides(), base.affine_ras(), &voxels)
        .map_err(|error| SiteError::Mask(error.into()))
}

/// `[trial, voxel]`, standard normal.
pub(super) fn drawn_betas(seed: u64, trials: usize, voxels: usize) -> Array2<f32> {
    let mut noise = normals(seed, Purpose::Betas, 0, 0);
    let flat: Vec<f32> = noise.draw(&[trials, voxels]).into_iter().collect();
    Array2::from_shape_vec((trials, voxels), flat).unwrap_or_default()
}

/// Writes `[trial, voxel]` as `.npy`.
pub(super) fn write_betas(path: &Path, betas: &Array2<f32>) -> Result<(), SiteError> {
    let mut bytes = Vec::new();
    betas
        .write_npy(&mut bytes)
        .map_err(|source| SiteError::Npy {
            path: path.into(),
            source,
        })?;
    Ok(record::write_whole(path, &bytes)?)
}
