//! An enhanced multi-frame file as Siemens XA writes it, from a [`Volume`]: one frame per slice.
//!
//! Written from the public standard, for the simulated scanner and for tests.
//! [`crate::dicom::decode`] takes back what [`encode`] writes.

use crate::dicom::write::{self, ENHANCED_MR_IMAGE, Elements, decimal, decimals, derived_uid};
use crate::mosaic::{Geometry, MosaicError, check_header, side, slice_pixels};
use crate::volume::Volume;

/// Slices that a file can number.
const MAX_SLICES: usize = 1024;

/// Writes one volume as one file.
///
/// - `volume.voxels`: whole numbers from 0 to 65535.
/// - `volume.affine_lps`: perpendicular axes; kept to the 16 characters that a decimal string
///   has. A reader stacks slices along the right-handed normal.
///
/// # Errors
/// [`MosaicError`] for what the format cannot hold.
pub fn encode(volume: &Volume) -> Result<Vec<u8>, MosaicError> {
    let (slices, rows, columns) = volume.voxels.dim();
    let size = MosaicError::Size {
        slices,
        rows,
        columns,
    };
    let (Some(row_count), Some(column_count)) = (side(rows, 1), side(columns, 1)) else {
        return Err(size);
    };
    if !(1..=MAX_SLICES).contains(&slices) || rows == 0 || columns == 0 {
        return Err(size);
    }
    let header = &volume.header;
    let series = check_header(header)?;
    let geometry = Geometry::of(volume, 1)?;
    let instance_uid = derived_uid(series, header.acquisition, "instance");
    let image_type = "ORIGINAL\\PRIMARY\\FMRI\\NONE";
    let start = write::time(header.time_ms.unwrap_or_default());

    let mut data = Elements::default();
    data.text((0x0008, 0x0008), b"CS", image_type);
    data.text((0x0008, 0x0016), b"UI", ENHANCED_MR_IMAGE);
    data.text((0x0008, 0x0018), b"UI", &instance_uid);
    data.text((0x0008, 0x0060), b"CS", "MR");
    data.text((0x0008, 0x0070), b"LO", "Siemens Healthineers");
    data.text((0x0008, 0x1090), b"LO", "Afterimage simulator");
    data.text((0x0008, 0x9205), b"CS", "MONOCHROME");
    data.text((0x0008, 0x9208), b"CS", "MAGNITUDE");
    data.text((0x0008, 0x9209), b"CS", "UNKNOWN");
    data.text((0x0010, 0x0010), b"PN", "");
    data.text((0x0010, 0x0020), b"LO", "");
    data.text((0x0020, 0x000d), b"UI", &derived_uid(series, 0, "study"));
    data.text((0x0020, 0x000e), b"UI", series);
    data.text((0x0020, 0x0011), b"IS", "1");
    data.text((0x0020, 0x0012), b"IS", &header.acquisition.to_string());
    if let Some(instance) = header.instance {
        data.text((0x0020, 0x0013), b"IS", &instance.to_string());
    }
    data.text((0x0020, 0x0052), b"UI", &derived_uid(series, 0, "frame"));
    data.word((0x0028, 0x0002), 1);
    data.text((0x0028, 0x0004), b"CS", "MONOCHROME2");
    data.text((0x0028, 0x0008), b"IS", &slices.to_string());
    data.word((0x0028, 0x0010), row_count);
    data.word((0x0028, 0x0011), column_count);
    data.word((0x0028, 0x0100), 16);
    data.word((0x0028, 0x0101), 16);
    data.word((0x0028, 0x0102), 15);
    data.word((0x0028, 0x0103), 0);

    let mut timing = Elements::default();
    timing.text((0x0018, 0x0080), b"DS", &decimal(header.tr_ms));
    let mut shared = Elements::default();
    shared.sequence((0x0018, 0x9112), &[timing]);
    data.sequence((0x5200, 0x9229), &[shared]);
    let mut frames = Vec::with_capacity(slices);
    let mut pixels = Vec::with_capacity(slices * rows * columns * 2);
    for slice in 0..slices {
        frames.push(frame(volume, &geometry, slice, image_type, &start));
        pixels.extend(slice_pixels(volume, slice)?);
    }
    data.sequence((0x5200, 0x9230), &frames);
    data.long((0x7fe0, 0x0010), b"OW", &pixels);
    Ok(write::file(ENHANCED_MR_IMAGE, &instance_uid, data))
}

/// One frame's functional groups.
fn frame(
    volume: &Volume,
    geometry: &Geometry,
    slice: usize,
    image_type: &str,
    start: &str,
) -> Elements {
    let header = &volume.header;
    let place = u32::try_from(slice).unwrap_or(u32::MAX);
    let after_ms = header
        .slice_times_ms
        .as_ref()
        .and_then(|times| times.get(slice).copied());

    let mut types = Elements::default();
    types.text((0x0008, 0x9007), b"CS", image_type);
    types.text((0x0008, 0x9208), b"CS", "MAGNITUDE");
    let mut content = Elements::default();
    if let Some(time_ms) = header.time_ms {
        let taken = match after_ms {
            Some(after_ms) => write::time(time_ms + after_ms),
            None => start.to_owned(),
        };
        content.text((0x0018, 0x9074), b"DT", &format!("20000101{taken}"));
    }
    content.text((0x0020, 0x9056), b"SH", "1");
    content.longs((0x0020, 0x9057), &[place + 1]);
    content.longs((0x0020, 0x9128), &[header.acquisition]);
    content.longs((0x0020, 0x9157), &[1, place + 1, header.acquisition]);
    let mut position = Elements::default();
    let step = geometry
        .normal
        .map(|part| part * geometry.slice_mm * f64::from(place));
    let at = [0, 1, 2].map(|axis| geometry.position[axis] + step[axis]);
    position.text((0x0020, 0x0032), b"DS", &decimals(&at));
    let mut orientation = Elements::default();
    orientation.text((0x0020, 0x0037), b"DS", &decimals(&geometry.orientation));
    let mut measures = Elements::default();
    measures.text((0x0018, 0x0050), b"DS", &decimal(geometry.slice_mm));
    measures.text((0x0018, 0x0088), b"DS", &decimal(geometry.slice_mm));
    measures.text((0x0028, 0x0030), b"DS", &decimals(&geometry.pixel_mm));
    let mut rescale = Elements::default();
    rescale.text((0x0028, 0x1052), b"DS", "0");
    rescale.text((0x0028, 0x1053), b"DS", "1");

    let mut frame = Elements::default();
    frame.sequence((0x0018, 0x9226), &[types]);
    frame.sequence((0x0020, 0x9111), &[content]);
    frame.sequence((0x0020, 0x9113), &[position]);
    frame.sequence((0x0020, 0x9116), &[orientation]);
    if let Some(after_ms) = after_ms {
        let mut private = Elements::default();
        private.text((0x0021, 0x0011), b"LO", "SIEMENS MR SDI 02");
        private.text((0x0021, 0x1104), b"DS", &decimal(after_ms / 1000.0));
        frame.text((0x0021, 0x0011), b"LO", "SIEMENS MR SDI 02");
        frame.sequence((0x0021, 0x11fe), &[private]);
    }
    frame.sequence((0x0028, 0x9110), &[measures]);
    frame.sequence((0x0028, 0x9145), &[rescale]);
    frame
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dicom::{DicomError, decode_volume};
    use crate::mosaic::tests::volume;

    proptest! {
        #[test]
        fn written_volume_reads_back(volume in volume()) {
            let found = decode_volume(&encode(&volume).unwrap()).unwrap();
            prop_assert_eq!(&found.voxels, &volume.voxels);
            for (found, written) in found.affine_lps.iter().zip(&volume.affine_lps) {
                for (found, written) in found.iter().zip(written) {
                    prop_assert!((found - written).abs() < 1e-3, "{found} for {written}");
                }
            }
            let (found, written) = (&found.header, &volume.header);
            prop_assert!((found.tr_ms - written.tr_ms).abs() < 1e-9);
            match (&found.slice_times_ms, &written.slice_times_ms) {
                (Some(found), Some(written)) => {
                    for (found, written) in found.iter().zip(written) {
                        prop_assert!((found - written).abs() < 1e-6);
                    }
                }
                // Dates give times where the private ones are not there: all at once.
                (Some(found), None) => prop_assert!(found.iter().all(|time| *time == 0.0)),
                (found, written) => prop_assert_eq!(found, written),
            }
            prop_assert_eq!(&found.series_uid, &written.series_uid);
            prop_assert_eq!(found.acquisition, written.acquisition);
            prop_assert_eq!(found.instance, written.instance);
            prop_assert_eq!(found.time_ms.map(f64::round), written.time_ms);
        }

        #[test]
        fn changed_bytes_of_a_file_give_an_answer(
            volume in volume(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        ) {
            let mut bytes = encode(&volume).unwrap();
            for (index, value) in changes {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(found) = decode_volume(&bytes) {
                prop_assert!(found.voxels.len() * 2 <= bytes.len());
            }
        }

        #[test]
        fn any_cut_of_a_file_is_refused(volume in volume(), cut in any::<prop::sample::Index>()) {
            let bytes = encode(&volume).unwrap();
            prop_assert!(decode_volume(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }

    #[test]
    fn a_phase_image_is_refused_by_name() {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let volume = {
            use proptest::strategy::ValueTree;
            volume().new_tree(&mut runner).unwrap().current()
        };
        let mut bytes = encode(&volume).unwrap();
        let word = b"MAGNITUDE ";
        let at = bytes.windows(word.len()).position(|window| window == word);
        let at = at.unwrap();
        bytes[at..at + word.len()].copy_from_slice(b"PHASE     ");
        assert_eq!(
            decode_volume(&bytes),
            Err(DicomError::Unsupported {
                name: "a phase image"
            })
        );
    }
}
