//! Broken, hostile and misplaced files: an answer for each, and never a patient's name.
//!
//! Outcomes in the manifest and what a decoder of single files owes to them:
//!
//! - `reject`: an error.
//! - `reject_or_use_configured_TR`: an error; the decoder knows no configured TR.
//! - `no_crash`: an error, or the true volume of the file that it was made from.
//! - `reject_or_ignore`: an error, except for a well-formed volume that only its run makes
//!   wrong (another series, another geometry, another patient). Such a file decodes here
//!   and the caller, who holds the run, refuses it: its `series_uid`, `patient`, shape or
//!   affine differ from the run's, which is asserted.

use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use rtfmri::dicom::decode_volume;
use rtfmri::dicom::{self, DicomError};
use rtfmri::{Mask, MaskError, Volume};

use crate::{folder, json, read, scanner, unpack};

/// No file of at most 1 MiB may take longer, on a machine that does nothing else; tests run beside
/// each other.
const LONGEST: Duration = Duration::from_millis(400);

#[test]
fn every_hostile_file_gets_its_expected_outcome() {
    let Some(data) = scanner() else { return };
    let manifest = json(data.join("dicom/hostile/manifest.json"));
    let files = unpack(data.join("dicom/hostile/hostile.tar.zst"));
    let source = manifest["source_of_mosaic"].as_str().unwrap();
    let truth = read(data.join("dicom/siemens_e11_mosaic_run").join(source));
    let mosaic = decode_volume(&truth).unwrap();
    let enhanced = data.join("dicom/siemens_xa30_enhanced_run");
    let enhanced: Vec<Volume> = folder(enhanced)
        .iter()
        .map(|(_, bytes)| decode_volume(bytes).unwrap())
        .collect();
    let entries = manifest["files"].as_array().unwrap();
    assert_eq!(entries.len(), files.len());
    for entry in entries {
        let name = entry["file"].as_str().unwrap();
        let (_, bytes) = files.iter().find(|file| file.0 == name).unwrap();
        let started = Instant::now();
        let outcome = catch_unwind(|| decode_volume(bytes));
        assert!(
            started.elapsed() < LONGEST,
            "{name}: {:?}",
            started.elapsed()
        );
        let outcome = outcome.unwrap_or_else(|_| panic!("{name}: the decoder panicked"));
        let said = match &outcome {
            Ok(volume) => format!("{volume:?}"),
            Err(error) => format!("{error} {error:?}"),
        };
        assert!(!said.contains("ZZ"), "{name} leaks: {said}");
        match (entry["expect"].as_str().unwrap(), &outcome) {
            (_, Err(_)) => {}
            ("no_crash", Ok(volume)) => {
                let mut true_ones = enhanced.iter().chain([&mosaic]);
                let true_voxels = true_ones.any(|truth| truth.voxels == volume.voxels);
                assert!(true_voxels, "{name}: {said}");
            }
            ("reject_or_ignore", Ok(volume)) => {
                assert!(is_foreign(volume, &mosaic), "{name}: {said}");
            }
            (expected, Ok(_)) => panic!("{name}: expected {expected}, decoded {said}"),
        }
    }
}

/// Whether a run that already holds `truth` can tell that `volume` is not its next one.
fn is_foreign(volume: &Volume, truth: &Volume) -> bool {
    volume.header.series_uid != truth.header.series_uid
        || volume.voxels.dim() != truth.voxels.dim()
        || volume.affine_lps != truth.affine_lps
        || volume.header.patient != truth.header.patient
}

#[test]
fn a_mask_refuses_a_volume_whose_geometry_changed() {
    let Some(data) = scanner() else { return };
    let files = unpack(data.join("dicom/hostile/hostile.tar.zst"));
    let (_, bytes) = files
        .iter()
        .find(|file| file.0 == "geometry_change.dcm")
        .unwrap();
    let Ok(volume) = decode_volume(bytes) else {
        return;
    };
    let expected = data.join("dicom/expected/siemens_e11_mosaic_run");
    let mask = Mask::from_nifti(&read(expected.join("001_000013_000003.nii.gz"))).unwrap();
    assert!(matches!(mask.sample(&volume), Err(MaskError::Grid { .. })));
}

#[test]
fn any_cut_of_a_real_file_is_refused() {
    let Some(data) = scanner() else { return };
    let files = [
        "siemens_e11_mosaic_run/001_000013_000001.dcm",
        "siemens_xa30_enhanced_run/xa30_0002.dcm",
        "ge_ascending_triggertime/0001_t187.dcm",
        "philips_classic_epi/201_EPI_asc_CLEAR_0002_05.dcm",
    ];
    for file in files {
        any_cut_is_refused(&read(data.join("dicom").join(file)));
    }
}

fn any_cut_is_refused(whole: &[u8]) {
    for end in (0..whole.len()).step_by(997).chain([whole.len() - 1]) {
        assert!(dicom::decode(&whole[..end]).is_err(), "cut at {end}");
    }
    assert_eq!(
        dicom::decode(&whole[..131]),
        Err(DicomError::NotDicom),
        "shorter than a preamble"
    );
}
