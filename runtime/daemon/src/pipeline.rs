//! The way of the data, one function per arrow. Read this first.
//!
//! ```text
//!                 parse            acquire                  acquire               decode
//! file bytes ──► Volume ──► AlignedVolume [voxel] ──► TrialBetas [voxel] ──► BrainTokens ─► Latent ─► Picture
//!            read_volume    align                     fit_trial              decode_trial
//! ```
//!
//! Each role takes its arrows in a process of its own; what travels between them is in `wire`.

use std::hash::{DefaultHasher, Hash, Hasher};

use decoder::{DecodeError, Decoder, NoiseKey, Progress, Reconstruction, Tier};
use ndarray::{Array1, Array3, ArrayView2};
use rtfmri::dicom::{self, DicomError};
use rtfmri::events::Event;
use rtfmri::glm::{Design, GlmError, GlmSettings, TrialFit};
use rtfmri::{Mask, MaskError, MotionError, Realigner, Rigid, SeriesUid, Volume, VolumeHeader};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use wire::{TrialMessage, VolumeMessage};

/// File bytes → volume; runs in the parser child.
///
/// # Errors
/// [`DicomError`], which carries no header value.
pub(crate) fn read_volume(bytes: &[u8]) -> Result<VolumeMessage, DicomError> {
    let volume = dicom::decode(bytes)?;
    let (slices, rows, columns) = volume.voxels.dim();
    let side = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
    let mut series = [0; 16];
    series.copy_from_slice(&Sha256::digest(volume.header.series_uid.expose().as_bytes())[..16]);
    let mut patient = DefaultHasher::new();
    volume.header.patient.hash(&mut patient);
    Ok(VolumeMessage {
        shape: [side(slices), side(rows), side(columns)],
        voxels: volume.voxels.iter().copied().collect(),
        affine_lps: volume.affine_lps,
        series,
        patient: patient.finish(),
        number: volume.header.acquisition,
        tr_ms: volume.header.tr_ms,
    })
}

/// The parser's message as the volume it stands for; `None` where shape and voxels disagree.
pub(crate) fn volume_of(message: VolumeMessage) -> Option<Volume> {
    let [slices, rows, columns] = message
        .shape
        .map(|len| usize::try_from(len).unwrap_or(usize::MAX));
    Some(Volume {
        voxels: Array3::from_shape_vec((slices, rows, columns), message.voxels).ok()?,
        affine_lps: message.affine_lps,
        header: VolumeHeader {
            series_uid: SeriesUid::new(""),
            patient: rtfmri::PatientTag::default(),
            acquisition: message.number,
            instance: None,
            tr_ms: message.tr_ms,
            slice_times_ms: None,
        },
    })
}

/// A volume's voxels of the mask, where the head was when it was taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct AlignedVolume {
    /// Volume of the run, from 0.
    pub(crate) frame: u32,
    /// Shift (LPS, mm) and angles (radians) against the run's reference.
    pub(crate) motion: [f64; 6],
    /// `[voxel]`, scanner units.
    pub(crate) voxels: Vec<f32>,
    /// When its file arrived, Unix milliseconds.
    pub(crate) arrived_ms: u64,
    /// Hash of the file's name, so that a restart does not read it again.
    pub(crate) file: [u8; 16],
}

/// Why a volume has no place in its run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AlignError {
    /// Another grid than the mask's.
    #[error("the volume does not fit the mask of this subject")]
    Mask(#[from] MaskError),
    /// The head cannot be found in it.
    #[error("the volume cannot be realigned")]
    Motion(#[from] MotionError),
}

/// Volume → its masked voxels, realigned to the run's reference.
///
/// - `previous`: where the head was in the volume before, to start from.
///
/// Returns the head's motion and `[voxel]`, scanner units.
///
/// # Errors
/// [`AlignError`] where the grid or the head is another one.
pub(crate) fn align(
    volume: &Volume,
    mask: &Mask,
    realigner: &Realigner,
    previous: &Rigid,
) -> Result<(Rigid, Array1<f32>), AlignError> {
    let motion = realigner.realign(volume, previous)?;
    let voxels = mask.sample_moved(volume, &motion)?;
    Ok((motion, voxels))
}

/// Aligned volumes so far → one trial's betas and their variance, `[voxel]`, scanner units.
///
/// - `volumes`: of the run, from its first, that the fit may use; missing ones count.
/// - `frames`: the volumes' frames, rising; holes are missing volumes.
/// - `series`: `[volume, voxel]`, scanner units; a row per frame.
///
/// # Errors
/// [`GlmError`] where the trial cannot be estimated.
pub(crate) fn fit_trial(
    settings: &GlmSettings,
    events: &[Event],
    trial: usize,
    volumes: usize,
    frames: &[usize],
    series: ArrayView2<'_, f32>,
) -> Result<TrialFit, GlmError> {
    // The voxels were sampled where the head was: motion as confounds on top takes signal away
    // (measured on the reference session: pattern correlation 0.69 with, 0.76 without).
    let design = Design::build_at(settings, events, trial, volumes, frames, None)?;
    let rows: Vec<&[f32]> = series
        .outer_iter()
        .take(design.frames.len())
        .filter_map(|row| row.to_slice())
        .collect();
    design.fit(settings.noise, &rows)
}

/// What a trial's noise is drawn by: the same trial at another decode time has other noise.
pub(crate) fn noise_key(session_seed: u64, trial: &TrialMessage) -> NoiseKey {
    NoiseKey {
        session_seed,
        run: trial.run,
        trial: trial.trial,
        tier: match trial.tier {
            wire::Tier::Fast => Tier::Fast,
            wire::Tier::Slow => Tier::Slow,
            wire::Tier::End => Tier::End,
        },
    }
}

/// Trial → pictures; runs in the decode role.
///
/// # Errors
/// [`DecodeError`] where betas and bundle do not fit or a network fails.
pub(crate) fn decode_trial(
    decoder: &Decoder,
    trial: &TrialMessage,
    session_seed: u64,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Reconstruction, DecodeError> {
    let key = noise_key(session_seed, trial);
    let zbetas = ArrayView2::from_shape((1, trial.zbetas.len()), &trial.zbetas)
        .map_err(|_| DecodeError::Empty)?;
    decoder.decode(zbetas, key, progress)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A volume of one voxel, for those who need a message and no picture.
    pub(crate) fn message(number: u32) -> VolumeMessage {
        VolumeMessage {
            shape: [1, 1, 1],
            voxels: vec![1.0],
            affine_lps: [
                [1.0, 0.0, 0.0, 0.0],
                [0.0, 1.0, 0.0, 0.0],
                [0.0, 0.0, 1.0, 0.0],
                [0.0, 0.0, 0.0, 1.0],
            ],
            series: [1; 16],
            patient: 0,
            number,
            tr_ms: 1500.0,
        }
    }

    #[test]
    fn a_message_whose_voxels_do_not_fill_its_shape_is_no_volume() {
        assert!(volume_of(message(1)).is_some());
        let short = VolumeMessage {
            shape: [1, 1, 2],
            ..message(1)
        };
        assert!(volume_of(short).is_none());
    }
}
