//! Every real series: Siemens mosaics give the expected voxels, all else a named refusal.

use nalgebra::{Matrix4, Vector4};
use rtfmri::dicom::{self, DicomError};
use rtfmri::{Volume, nifti};
use serde_json::Value;

use crate::{folder, json, read, scanner, tolerance};

#[test]
fn every_mosaic_series_gives_the_expected_volumes() {
    let Some(data) = scanner() else { return };
    let (mut compared, mut refused) = (0, 0);
    for (series, kind) in all_series(&data) {
        if kind != "siemens_mosaic" {
            continue;
        }
        let expected = data.join("dicom/expected").join(&series);
        let description = json(expected.join("expected.json"));
        let output = &description["outputs"][0];
        for volume in output["volumes"].as_array().unwrap() {
            let file = volume["dicom"].as_str().unwrap();
            let bytes = read(data.join("dicom").join(&series).join(file));
            match dicom::decode(&bytes) {
                Ok(found) => {
                    let image = read(expected.join(volume["nifti"].as_str().unwrap()));
                    let tr_s = output["TR_s"].as_f64().unwrap();
                    compare(&format!("{series}/{file}"), &found, &image, tr_s, volume);
                    compared += 1;
                }
                // Compressed pixels are outside this reader's scope.
                Err(DicomError::TransferSyntax { uid, name }) if uid.contains(".1.2.4.") => {
                    assert!(name.contains("JPEG"), "{series}/{file}: {name}");
                    assert_eq!(volume["TransferSyntaxUID"], uid);
                    refused += 1;
                }
                Err(error) => panic!("{series}/{file}: {error}"),
            }
        }
    }
    assert!(compared > 0);
    eprintln!("{compared} mosaics equal, {refused} compressed ones refused by name");
}

#[test]
fn every_other_series_is_refused_by_name() {
    let Some(data) = scanner() else { return };
    let mut refused = 0;
    for (series, kind) in all_series(&data) {
        let names: &[&str] = match kind.as_str() {
            "siemens_mosaic" => continue,
            kind if kind.starts_with("ge_") => &["a GE "],
            "philips_classic_slices" => &["a Philips single-slice"],
            kind if kind.contains("enhanced") => &["enhanced multi-frame"],
            _ => &[""],
        };
        for (file, bytes) in folder(data.join("dicom").join(&series)) {
            match dicom::decode(&bytes) {
                Err(DicomError::Unsupported { name }) => {
                    assert!(
                        names.iter().any(|part| name.contains(part)),
                        "{series}/{file}: {name}"
                    );
                }
                Err(DicomError::TransferSyntax { .. }) => {}
                other => panic!("{series}/{file}: {other:?}"),
            }
            refused += 1;
        }
    }
    assert!(refused > 0);
}

/// Every series with its kind.
fn all_series(data: &std::path::Path) -> Vec<(String, String)> {
    let mut series: Vec<_> = std::fs::read_dir(data.join("dicom/expected"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let kind = &json(entry.path().join("expected.json"))["kind"];
            let name = entry.file_name().into_string().unwrap();
            (name, kind.as_str().unwrap().to_owned())
        })
        .collect();
    series.sort();
    series
}

/// - `image`: the expected NIfTI file.
/// - `description`: the volume's entry in `expected.json`.
fn compare(what: &str, found: &Volume, image: &[u8], tr_s: f64, description: &Value) {
    let expected = nifti::read(image).unwrap();
    let affine = expected.affine_ras;
    let forward = Matrix4::from_fn(|row, column| affine[row][column]);
    let inverse = forward.try_inverse().unwrap();
    let ras = |index: [usize; 3]| {
        #[expect(clippy::cast_precision_loss, reason = "indices are small")]
        let [x, y, z] = found.position_lps(index.map(|i| i as f64));
        Vector4::new(-x, -y, z, 1.0)
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place outside becomes an index that is refused"
    )]
    let place = |index| {
        let at = inverse * ras(index);
        [at[0], at[1], at[2]].map(|value| value.round() as usize)
    };

    let (slices, rows, columns) = found.voxels.dim();
    assert_eq!(slices * rows * columns, expected.values.len(), "{what}");
    for ((slice, row, column), value) in found.voxels.indexed_iter() {
        let place = place([column, row, slice]);
        assert_eq!(
            Some(&f64::from(*value)),
            expected.values.get(place),
            "{what}: slice {slice}, row {row}, column {column}"
        );
    }
    for corner in 0..8_usize {
        let pick = |axis: usize, side: usize| (corner >> axis & 1) * (side - 1);
        let index = [pick(0, columns), pick(1, rows), pick(2, slices)];
        #[expect(clippy::cast_precision_loss, reason = "indices are small")]
        let [i, j, k] = place(index).map(|i| i as f64);
        let off_mm = (forward * Vector4::new(i, j, k, 1.0) - ras(index)).norm();
        assert!(off_mm <= tolerance::CORNER_MM, "{what}: corner {off_mm} mm");
    }
    let tr_ms = found.header.tr_ms;
    let off_ms = (tr_ms - tr_s * 1000.0).abs();
    assert!(off_ms <= tolerance::TR_MS, "{what}: {tr_ms} ms");
    assert_eq!(
        description["InstanceNumber"],
        found.header.instance.unwrap()
    );
    assert_eq!(description["AcquisitionNumber"], found.header.acquisition);

    // Where the header stores none, the expected ones are inferred from the protocol.
    let times = &description["slice_timing_s_from_this_file"];
    let stored = description["csa_MosaicRefAcqTimes_s"].is_array();
    let (true, Some(times)) = (stored, times.as_array()) else {
        return;
    };
    let own = found.header.slice_times_ms.as_ref().unwrap();
    assert_eq!(own.len(), slices, "{what}");
    for (slice, own_ms) in own.iter().enumerate() {
        let expected_ms = times[place([0, 0, slice])[2]].as_f64().unwrap() * 1000.0;
        assert!(
            (own_ms - expected_ms).abs() <= tolerance::SLICE_TIME_MS,
            "{what}: slice {slice} at {own_ms} ms, expected {expected_ms} ms"
        );
    }
}
