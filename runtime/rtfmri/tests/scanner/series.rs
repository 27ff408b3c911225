//! Every real series: the expected volumes, or a refusal by name.

use std::collections::BTreeMap;
use std::path::Path;

use dicom_dictionary_std::tags;
use nalgebra::{Matrix4, Vector4};
use rtfmri::assembly::{Added, Assembler, Limits};
use rtfmri::dicom::{self, DicomError, Image, decode_volume};
use rtfmri::{Slice, Volume, nifti};
use serde_json::Value;

use crate::{folder, json, read, scanner, tolerance};

#[test]
fn every_series_of_whole_volumes_gives_the_expected_ones() {
    let Some(data) = scanner() else { return };
    let (mut compared, mut refused) = (0, 0);
    for (series, kind) in all_series(&data) {
        if !matches!(
            kind.as_str(),
            "siemens_mosaic" | "siemens_enhanced_multiframe"
        ) {
            continue;
        }
        let expected = data.join("dicom/expected").join(&series);
        let description = json(expected.join("expected.json"));
        let output = &description["outputs"][0];
        let tr_ms = tr_ms(output);
        let volumes = output["volumes"].as_array().unwrap();
        for (index, volume) in volumes.iter().enumerate() {
            let file = volume["dicom"].as_str().unwrap();
            let what = format!("{series}/{file}");
            let bytes = read(data.join("dicom").join(&series).join(file));
            match decode_volume(&bytes) {
                Ok(found) => {
                    let image = read(expected.join(volume["nifti"].as_str().unwrap()));
                    let (_, image) = nifti::read_volume(&image, 0).unwrap();
                    let places = compare(&what, &found, &image, 0.0);
                    check_header(&what, &found, tr_ms, volume);
                    check_times(&what, &found, &places, volume);
                    assert_eq!(found.header.acquisition as usize, index + 1, "{what}");
                    compared += 1;
                }
                // Compressed pixels are outside this reader's scope.
                Err(DicomError::TransferSyntax { uid, name }) if uid.contains(".1.2.4.") => {
                    assert!(name.contains("JPEG"), "{what}: {name}");
                    assert_eq!(volume["TransferSyntaxUID"], uid);
                    refused += 1;
                }
                Err(error) => panic!("{what}: {error}"),
            }
        }
    }
    assert!(compared > 0);
    eprintln!("{compared} volumes equal, {refused} compressed ones refused by name");
}

#[test]
fn every_series_of_slices_gives_the_expected_volumes_in_any_order() {
    let Some(data) = scanner() else { return };
    let mut compared = 0;
    for (series, kind) in all_series(&data) {
        if !kind.ends_with("_classic_slices") {
            continue;
        }
        let expected = data.join("dicom/expected").join(&series);
        let description = json(expected.join("expected.json"));
        let output = &description["outputs"][0];
        let image = read(expected.join(output["file"].as_str().unwrap()));
        let slices: Vec<Slice> = folder(data.join("dicom").join(&series))
            .iter()
            .map(|(file, bytes)| match dicom::decode(bytes) {
                Ok(Image::Slice(slice)) => slice,
                other => panic!("{series}/{file}: {other:?}"),
            })
            .collect();
        // As they are named, and slice after slice from the last on: all volumes are open at once.
        let mut by_place: Vec<&Slice> = slices.iter().collect();
        by_place.sort_by(|a, b| b.position_lps[2].total_cmp(&a.position_lps[2]));
        for order in [slices.iter().collect(), by_place] {
            let volumes = assemble(&series, &order);
            let described = output["volumes"].as_array().unwrap();
            assert_eq!(volumes.len(), described.len(), "{series}");
            for (index, (number, found)) in volumes.iter().enumerate() {
                let what = format!("{series} volume {number}");
                assert_eq!(*number as usize, index + 1, "{what}");
                let (_, image) = nifti::read_volume(&image, index).unwrap();
                // Values in Philips' units are computed in single precision by both.
                let share = if kind.starts_with("philips") {
                    1e-6
                } else {
                    0.0
                };
                let places = compare(&what, found, &image, share);
                let off_ms = (found.header.tr_ms - tr_ms(output)).abs();
                assert!(
                    off_ms <= tolerance::TR_MS,
                    "{what}: {} ms",
                    found.header.tr_ms
                );
                check_slice_times(&what, found, &places, &output["slice_timing_s"]);
                compared += 1;
            }
        }
    }
    assert!(compared > 0);
    eprintln!("{compared} volumes of slices equal");
}

/// The volumes that come of slices, by number.
fn assemble(what: &str, slices: &[&Slice]) -> BTreeMap<u32, Volume> {
    let mut assembler = Assembler::new(Limits::default());
    let mut volumes = BTreeMap::new();
    for slice in slices {
        match assembler.add((*slice).clone()) {
            Ok(Added::Complete(volume)) => {
                volumes.insert(volume.header.acquisition, *volume);
            }
            Ok(Added::Waiting { missing }) => assert!(missing.is_some(), "{what}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    assert_eq!(assembler.incomplete(), [], "{what}");
    volumes
}

#[test]
fn clocks_of_headers_advance_by_one_tr_from_volume_to_volume() {
    let Some(data) = scanner() else { return };
    let run = |series: &str| {
        let files = folder(data.join("dicom").join(series));
        let mut slices = Vec::new();
        let mut volumes = BTreeMap::new();
        for (_, bytes) in &files {
            match dicom::decode(bytes).unwrap() {
                Image::Volume(volume) => {
                    volumes.insert(volume.header.acquisition, volume);
                }
                Image::Slice(slice) => slices.push(slice),
            }
        }
        if !slices.is_empty() {
            volumes = assemble(series, &slices.iter().collect::<Vec<_>>());
        }
        volumes
    };
    for series in [
        "siemens_e11_mosaic_run",
        "siemens_xa30_enhanced_run",
        "ge_ascending_triggertime",
        "philips_classic_fmri",
        "philips_classic_epi",
    ] {
        let volumes: Vec<Volume> = run(series).into_values().collect();
        for pair in volumes.windows(2) {
            let times = [0, 1].map(|index| pair[index].header.time_ms.unwrap());
            let step_ms = times[1] - times[0];
            let off_ms = (step_ms - pair[0].header.tr_ms).abs();
            // Clocks of headers tick in hundredths of a second at worst.
            assert!(off_ms <= 10.0, "{series}: {step_ms} ms");
        }
    }
    // Neither triggers nor a clock finer than the second: no time rather than a wrong one.
    let volumes = run("ge_interleaved_i2s");
    assert!(
        volumes
            .values()
            .all(|volume| volume.header.time_ms.is_none())
    );
}

#[test]
fn every_other_series_is_refused_by_name() {
    let Some(data) = scanner() else { return };
    let mut refused = 0;
    for (series, kind) in all_series(&data) {
        if kind != "philips_enhanced_multiframe" {
            continue;
        }
        for (file, bytes) in folder(data.join("dicom").join(&series)) {
            match dicom::decode(&bytes) {
                Err(DicomError::Unsupported { name }) => {
                    assert!(name.contains("Philips enhanced"), "{series}/{file}: {name}");
                }
                other => panic!("{series}/{file}: {other:?}"),
            }
            refused += 1;
        }
    }
    assert!(refused > 0);
}

/// Our index of elements against a general DICOM parser, on every uncompressed real file.
#[test]
fn a_general_parser_reads_the_same() {
    let Some(data) = scanner() else { return };
    let mut compared = 0;
    for (series, _) in all_series(&data) {
        for (file, bytes) in folder(data.join("dicom").join(&series)) {
            let what = format!("{series}/{file}");
            let reference = dicom_object::from_reader(bytes.as_slice()).unwrap();
            let whole = |tag| reference.get(tag).and_then(|e| e.to_int::<u32>().ok());
            let (uid, instance, sides) = match dicom::decode(&bytes) {
                Ok(Image::Volume(volume)) => {
                    let header = volume.header;
                    (header.series_uid, header.instance, None)
                }
                Ok(Image::Slice(slice)) => {
                    let pixels = reference.get(tags::PIXEL_DATA).unwrap();
                    let stored: Vec<u16> = pixels.to_multi_int().unwrap();
                    let zeros = |count: usize| stored.iter().take(count).filter(|v| **v == 0);
                    let own = slice.pixels.iter().filter(|value| **value == 0.0);
                    assert_eq!(zeros(stored.len()).count(), own.count(), "{what}");
                    let sides = slice.pixels.dim();
                    (slice.header.series_uid, slice.header.instance, Some(sides))
                }
                Err(_) => continue,
            };
            let text = reference.get(tags::SERIES_INSTANCE_UID).unwrap();
            let text = text.to_str().unwrap().into_owned();
            assert_eq!(
                uid,
                rtfmri::SeriesUid::new(text.trim_matches('\0')),
                "{what}"
            );
            assert_eq!(instance, whole(tags::INSTANCE_NUMBER), "{what}");
            if let Some((rows, columns)) = sides {
                assert_eq!(
                    Some(u32::try_from(rows).unwrap()),
                    whole(tags::ROWS),
                    "{what}"
                );
                assert_eq!(Some(u32::try_from(columns).unwrap()), whole(tags::COLUMNS));
            }
            compared += 1;
        }
    }
    assert!(compared > 0);
}

/// Every series with its kind.
fn all_series(data: &Path) -> Vec<(String, String)> {
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

/// The expected TR: `TR_s` is rounded to six digits where it is not round, the image's is not.
fn tr_ms(output: &Value) -> f64 {
    let stated = output["TR_s"].as_f64().unwrap() * 1000.0;
    let image = output["header_pixdim4_s"].as_f64().unwrap() * 1000.0;
    if (stated - image).abs() < 0.005 {
        image
    } else {
        stated
    }
}

/// Compares voxels and corners by world position; returns each slice's index in the expected image.
///
/// - `share`: how far a value may be off, as a share of it.
fn compare(what: &str, found: &Volume, expected: &Volume, share: f32) -> Vec<usize> {
    let affine = expected.affine_lps;
    let forward = Matrix4::from_fn(|row, column| affine[row][column]);
    let inverse = forward.try_inverse().unwrap();
    let lps = |index: [usize; 3]| {
        #[expect(clippy::cast_precision_loss, reason = "indices are small")]
        let [x, y, z] = found.position_lps(index.map(|i| i as f64));
        Vector4::new(x, y, z, 1.0)
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place outside becomes an index that is refused"
    )]
    let place = |index| {
        let at = inverse * lps(index);
        [at[0], at[1], at[2]].map(|value| value.round() as usize)
    };

    let (slices, rows, columns) = found.voxels.dim();
    assert_eq!(slices * rows * columns, expected.voxels.len(), "{what}");
    for ((slice, row, column), value) in found.voxels.indexed_iter() {
        let [i, j, k] = place([column, row, slice]);
        let other = expected.voxels.get([k, j, i]).unwrap();
        assert!(
            (value - other).abs() <= share * other.abs(),
            "{what}: slice {slice}, row {row}, column {column}: {value} for {other}"
        );
    }
    for corner in 0..8_usize {
        let pick = |axis: usize, side: usize| (corner >> axis & 1) * (side - 1);
        let index = [pick(0, columns), pick(1, rows), pick(2, slices)];
        #[expect(clippy::cast_precision_loss, reason = "indices are small")]
        let [i, j, k] = place(index).map(|i| i as f64);
        let off_mm = (forward * Vector4::new(i, j, k, 1.0) - lps(index)).norm();
        assert!(off_mm <= tolerance::CORNER_MM, "{what}: corner {off_mm} mm");
    }
    (0..slices).map(|slice| place([0, 0, slice])[2]).collect()
}

/// - `description`: the volume's entry in `expected.json`.
fn check_header(what: &str, found: &Volume, tr_ms: f64, description: &Value) {
    let off_ms = (found.header.tr_ms - tr_ms).abs();
    assert!(
        off_ms <= tolerance::TR_MS,
        "{what}: {} ms",
        found.header.tr_ms
    );
    let instance = found.header.instance.unwrap();
    assert_eq!(description["InstanceNumber"], instance, "{what}");
    assert_eq!(description["AcquisitionNumber"], found.header.acquisition);
}

/// - `places`: each slice's index in the expected image.
fn check_times(what: &str, found: &Volume, places: &[usize], description: &Value) {
    check_slice_times(
        what,
        found,
        places,
        &description["slice_timing_s_from_this_file"],
    );
}

/// - `expected`: seconds, or null.
fn check_slice_times(what: &str, found: &Volume, places: &[usize], expected: &Value) {
    let Some(expected) = expected.as_array() else {
        assert_eq!(found.header.slice_times_ms, None, "{what}");
        return;
    };
    let Some(own) = &found.header.slice_times_ms else {
        panic!("{what}: no slice times");
    };
    assert_eq!(own.len(), places.len(), "{what}");
    for ((slice, own_ms), place) in own.iter().enumerate().zip(places) {
        let expected_ms = expected[*place].as_f64().unwrap() * 1000.0;
        assert!(
            (own_ms - expected_ms).abs() <= tolerance::SLICE_TIME_MS,
            "{what}: slice {slice} at {own_ms} ms, expected {expected_ms} ms"
        );
    }
}
