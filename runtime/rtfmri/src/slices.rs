//! Classic files of one slice each, as GE and Philips write them, from a [`Volume`].
//!
//! Written from the public standard and the private elements that the readers use, for the
//! simulated scanner and for tests. [`crate::dicom::decode`] takes back what [`encode`] writes.

use crate::dicom::write::{self, Elements, MR_IMAGE, decimal, decimals, derived_uid};
use crate::mosaic::{Geometry, MosaicError, check_header, side, slice_pixels};
use crate::volume::Volume;

/// Slices that a file can number.
const MAX_SLICES: usize = 1024;

/// Whose files are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SliceVendor {
    /// Volumes by instance number, slice times as trigger times.
    Ge,
    /// Volumes by temporal position, no slice times, values in scaled units of 1.
    Philips,
}

/// Writes one volume as a file for each slice, from the first slice on.
///
/// - `volume.voxels`: whole numbers from 0 to 65535.
/// - `volume.affine_lps`: perpendicular axes. A reader stacks slices along the right-handed normal.
///
/// # Errors
/// [`MosaicError`] for what the format cannot hold.
pub fn encode(volume: &Volume, vendor: SliceVendor) -> Result<Vec<Vec<u8>>, MosaicError> {
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
    check_header(&volume.header)?;
    let geometry = Geometry::of(volume, 1)?;
    (0..slices)
        .map(|slice| {
            let sides = [row_count, column_count];
            encode_slice(volume, &geometry, slice, sides, vendor)
        })
        .collect()
}

fn encode_slice(
    volume: &Volume,
    geometry: &Geometry,
    slice: usize,
    [rows, columns]: [u16; 2],
    vendor: SliceVendor,
) -> Result<Vec<u8>, MosaicError> {
    let header = &volume.header;
    let series = header.series_uid.expose();
    let count = u32::try_from(volume.voxels.dim().0).unwrap_or(u32::MAX);
    let place = u32::try_from(slice).unwrap_or(u32::MAX);
    // Volume after volume.
    let instance = (header.acquisition.saturating_sub(1))
        .saturating_mul(count)
        .saturating_add(place + 1);
    let instance_uid = derived_uid(series, instance, "instance");
    let step = geometry
        .normal
        .map(|part| part * geometry.slice_mm * f64::from(place));
    let position = [0, 1, 2].map(|axis| geometry.position[axis] + step[axis]);
    let ge = vendor == SliceVendor::Ge;

    let mut data = Elements::default();
    data.text((0x0008, 0x0008), b"CS", "ORIGINAL\\PRIMARY\\M\\ND");
    data.text((0x0008, 0x0016), b"UI", MR_IMAGE);
    data.text((0x0008, 0x0018), b"UI", &instance_uid);
    if let Some(time_ms) = header.time_ms {
        data.text((0x0008, 0x0032), b"TM", &write::time(time_ms));
    }
    data.text((0x0008, 0x0060), b"CS", "MR");
    let maker = if ge {
        "GE MEDICAL SYSTEMS"
    } else {
        "Philips Medical Systems"
    };
    data.text((0x0008, 0x0070), b"LO", maker);
    data.text((0x0008, 0x1090), b"LO", "Afterimage simulator");
    data.text((0x0010, 0x0010), b"PN", "");
    data.text((0x0010, 0x0020), b"LO", "");
    data.text((0x0018, 0x0050), b"DS", &decimal(geometry.slice_mm));
    data.text((0x0018, 0x0080), b"DS", &decimal(header.tr_ms));
    data.text((0x0018, 0x0086), b"IS", "1");
    data.text((0x0018, 0x0088), b"DS", &decimal(geometry.slice_mm));
    if let Some(times) = header.slice_times_ms.as_ref().filter(|_| ge) {
        let after_ms = times.get(slice).copied().unwrap_or_default();
        let volumes = f64::from(header.acquisition.saturating_sub(1));
        // The end of a slice's acquisition: never 0.
        let taken_ms = volumes * header.tr_ms + after_ms + 1.0;
        data.text((0x0018, 0x1060), b"DS", &decimal(taken_ms));
    }
    data.text((0x0020, 0x000d), b"UI", &derived_uid(series, 0, "study"));
    data.text((0x0020, 0x000e), b"UI", series);
    data.text((0x0020, 0x0011), b"IS", "1");
    data.text((0x0020, 0x0012), b"IS", "1");
    data.text((0x0020, 0x0013), b"IS", &instance.to_string());
    data.text((0x0020, 0x0032), b"DS", &decimals(&position));
    data.text((0x0020, 0x0037), b"DS", &decimals(&geometry.orientation));
    data.text((0x0020, 0x0052), b"UI", &derived_uid(series, 0, "frame"));
    if !ge {
        data.text((0x0020, 0x0100), b"IS", &header.acquisition.to_string());
    }
    data.longs((0x0020, 0x9057), &[place + 1]);
    if ge {
        data.text((0x0021, 0x0010), b"LO", "GEMS_RELA_01");
        data.signed_word((0x0021, 0x104f), i16::try_from(count).unwrap_or(i16::MAX));
    }
    data.word((0x0028, 0x0002), 1);
    data.text((0x0028, 0x0004), b"CS", "MONOCHROME2");
    data.word((0x0028, 0x0010), rows);
    data.word((0x0028, 0x0011), columns);
    data.text((0x0028, 0x0030), b"DS", &decimals(&geometry.pixel_mm));
    data.word((0x0028, 0x0100), 16);
    data.word((0x0028, 0x0101), 16);
    data.word((0x0028, 0x0102), 15);
    data.word((0x0028, 0x0103), 0);
    if !ge {
        data.text((0x0028, 0x1052), b"DS", "0");
        data.text((0x0028, 0x1053), b"DS", "2");
        data.text((0x2001, 0x0010), b"LO", "Philips Imaging DD 001");
        data.signed_long((0x2001, 0x1018), i32::try_from(count).unwrap_or(i32::MAX));
        data.text((0x2005, 0x0010), b"LO", "Philips MR Imaging DD 001");
        data.float((0x2005, 0x100e), 1.0);
    }
    data.long((0x7fe0, 0x0010), b"OW", &slice_pixels(volume, slice)?);
    Ok(write::file(MR_IMAGE, &instance_uid, data))
}
