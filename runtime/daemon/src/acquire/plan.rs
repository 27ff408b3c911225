//! What a session and a run are about, read from files: the mask, and each run's events.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use bundle::PublicKey;
use ndarray::ArrayView2;
use ndarray_npy::ViewNpyExt;
use rtfmri::registration::Freedom;
use rtfmri::{Mask, NiftiError, Volume, events, nifti};
use sha2::{Digest, Sha256};

use crate::logging::chain;
use crate::record::{self, entry::StoredPrior};
use crate::roles::RoleError;
use crate::settings::Settings;

const MAX_MASK_BYTES: u64 = 64 << 20;
const MAX_REFERENCE_BYTES: u64 = 64 << 20;
const MAX_PRIOR_BYTES: u64 = 64 << 20;

/// The mask, from the site or from the signed bundle, of as many voxels as the bundle maps; and the
/// hash of its file.
pub(super) fn load_mask(settings: &Settings) -> Result<(Mask, String), RoleError> {
    let unverified = bundle::open(&settings.bundle)?;
    let subjects = &unverified.manifest().subjects;
    let Some(subject) = subjects
        .iter()
        .find(|subject| subject.id == settings.subject)
        .cloned()
    else {
        let known: Vec<&str> = subjects.iter().map(|subject| subject.id.as_str()).collect();
        return Err(RoleError::Setting(format!(
            "subject.id = {:?}: the bundle has {}",
            settings.subject,
            known.join(", ")
        )));
    };
    let (place, bytes) = match (&settings.mask, &subject.mask) {
        (Some(path), _) => {
            let place = format!("subject.mask = {}", path.display());
            let bytes = read_bounded(path, MAX_MASK_BYTES)
                .map_err(|error| RoleError::Setting(format!("{place}: {error}")))?;
            (place, bytes)
        }
        (None, Some(inside)) => {
            let key = PublicKey::from_file(&settings.key)?;
            (
                format!("{inside} of the bundle"),
                unverified.read_verified(&key, inside)?,
            )
        }
        (None, None) => {
            return Err(RoleError::Setting(format!(
                "subject.mask is not set and the bundle carries no mask for {}",
                subject.id
            )));
        }
    };
    let wrong = |reason: String| RoleError::Setting(format!("{place}: {reason}"));
    let mask = Mask::from_nifti(&bytes).map_err(|error: NiftiError| wrong(chain(&error)))?;
    if mask.len() as u64 != subject.voxels {
        return Err(wrong(format!(
            "expected {} voxels for {}, found {}",
            subject.voxels,
            subject.id,
            mask.len()
        )));
    }
    let hash = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok((mask, hash))
}

/// A file's bytes, where it has no more than `limit`.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(std::io::Error::other(format!("more than {limit} bytes")));
    }
    Ok(bytes)
}

/// The volume that mask and model were made on, where the site names one: runs are then registered to
/// it, and their grid may be another.
pub(super) fn load_trained(settings: &Settings) -> Result<Option<(Volume, Freedom)>, RoleError> {
    let Some(path) = &settings.reference else {
        return Ok(None);
    };
    let wrong = |reason: String| {
        RoleError::Setting(format!("subject.reference = {}: {reason}", path.display()))
    };
    let bytes =
        read_bounded(path, MAX_REFERENCE_BYTES).map_err(|error| wrong(error.to_string()))?;
    let (_, volume) = nifti::read_volume(&bytes, 0).map_err(|error| wrong(chain(&error)))?;
    Ok(Some((volume, settings.registration)))
}

/// Mean and spread of each voxel's betas in earlier sessions, where the site has them.
pub(super) fn load_prior(
    settings: &Settings,
    voxels: usize,
) -> Result<Option<StoredPrior>, RoleError> {
    let Some(path) = &settings.prior else {
        return Ok(None);
    };
    let wrong = |reason: String| {
        RoleError::Setting(format!("subject.prior = {}: {reason}", path.display()))
    };
    let bytes = read_bounded(path, MAX_PRIOR_BYTES).map_err(|error| wrong(error.to_string()))?;
    let values = ArrayView2::<f64>::view_npy(&bytes)
        .map_err(|error| wrong(format!("expected an array of float64, [2, voxel]: {error}")))?;
    if values.dim() != (2, voxels) {
        return Err(wrong(format!(
            "expected mean and standard deviation of {voxels} voxels, [2, {voxels}], found {:?}",
            values.shape()
        )));
    }
    let prior = StoredPrior {
        mean: values.row(0).to_vec(),
        std_dev: values.row(1).to_vec(),
        trials: settings.prior_trials,
    };
    prior.score().map_err(|error| wrong(error.to_string()))?;
    Ok(Some(prior))
}

/// The events file of a run.
///
/// - `number`: of the run among those that are seen through, from 1: a run that was aborted and
///   started again has the same events.
///
/// `{run}` in the file's name stands for the number, `{run:02}` for the number with two digits.
pub(super) fn events_path(setting: &Path, number: u32) -> PathBuf {
    match setting.to_str() {
        Some(text) if text.contains("{run") => text
            .replace("{run:02}", &format!("{number:02}"))
            .replace("{run}", &number.to_string())
            .into(),
        _ => setting.to_owned(),
    }
}

/// A run's events: as they are on record, else as they are now, and on record from here on.
///
/// # Errors
/// Why they cannot be used, as a sentence's end.
pub(super) fn events_of_run(dir: &Path, path: &Path) -> Result<Vec<events::Event>, String> {
    let kept = dir.join("events.tsv");
    let recorded = kept.is_file();
    let path = if recorded { &kept } else { path };
    let bytes = read_bounded(path, events::MAX_LEN_BYTES as u64)
        .map_err(|error| format!("cannot be read: {error}"))?;
    let parsed = events::parse(&bytes).map_err(|error| format!("is wrong: {}", chain(&error)))?;
    if !recorded {
        record::write_whole(&kept, &bytes).map_err(|error| chain(&error))?;
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_has_the_events_of_its_number() {
        let path = |setting: &str| events_path(Path::new(setting), 3);
        assert_eq!(path("events.tsv"), Path::new("events.tsv"));
        assert_eq!(path("run-{run}.tsv"), Path::new("run-3.tsv"));
        assert_eq!(path("ses/run-{run:02}.tsv"), Path::new("ses/run-03.tsv"));
    }
}
