//! A volume as the files of the format that was asked for.

use clap::ValueEnum;
use rtfmri::Volume;
use rtfmri::enhanced;
use rtfmri::mosaic::{self, MosaicError};
use rtfmri::slices::{self, SliceVendor};
use rtfmri::volume::Affine;

use super::noise::single;
use super::stamp::{Stamp, StampError};

/// Bytes before the values.
const NIFTI_HEADER: usize = 352;
/// Where a NIfTI header says how many volumes there are.
pub(super) const NIFTI_VOLUMES_AT: u64 = 48;

/// What the scanner exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// One DICOM file per volume, Siemens mosaic (VB to VE)
    Mosaic,
    /// One DICOM file per volume, enhanced multi-frame (Siemens XA)
    Xa,
    /// One DICOM file per slice, GE classic
    Ge,
    /// One DICOM file per slice, Philips classic
    Philips,
    /// One NIfTI file per volume
    Nifti,
    /// One NIfTI file per series that grows by a volume at a time
    Nifti4d,
}

impl Format {
    /// Ending of a file's name.
    pub(super) fn ending(self) -> &'static str {
        match self {
            Format::Mosaic | Format::Xa | Format::Ge | Format::Philips => "dcm",
            Format::Nifti | Format::Nifti4d => "nii",
        }
    }

    /// It has a header with times, and can be sent by C-STORE.
    pub(super) fn is_dicom(self) -> bool {
        match self {
            Format::Mosaic | Format::Xa | Format::Ge | Format::Philips => true,
            Format::Nifti | Format::Nifti4d => false,
        }
    }

    /// A file holds a slice and not a volume.
    pub(super) fn is_sliced(self) -> bool {
        match self {
            Format::Ge | Format::Philips => true,
            Format::Mosaic | Format::Xa | Format::Nifti | Format::Nifti4d => false,
        }
    }
}

/// Why a volume has no file.
#[derive(Debug, thiserror::Error)]
pub(super) enum EncodeError {
    /// The mosaic, the enhanced file or the slices.
    #[error(transparent)]
    Mosaic(#[from] MosaicError),
    /// The header's times.
    #[error(transparent)]
    Stamp(#[from] StampError),
    /// A side that NIfTI cannot hold.
    #[error("a side of {0} voxels does not fit NIfTI, at most 32767")]
    Side(usize),
}

/// Encodes one volume: a file, or one for each slice; of a growing file, what its first volume makes.
pub(super) fn encode(
    format: Format,
    volume: &Volume,
    stamp: &Stamp,
) -> Result<Vec<Vec<u8>>, EncodeError> {
    let sliced = |vendor| {
        let files = slices::encode(volume, vendor)?;
        files
            .iter()
            .map(|file| Ok(stamp.put(file)?))
            .collect::<Result<Vec<_>, EncodeError>>()
    };
    Ok(match format {
        Format::Mosaic => vec![stamp.put(&mosaic::encode(volume)?)?],
        Format::Xa => vec![stamp.put(&enhanced::encode(volume)?)?],
        Format::Ge => sliced(SliceVendor::Ge)?,
        Format::Philips => sliced(SliceVendor::Philips)?,
        Format::Nifti => vec![nifti(volume, 3)?],
        Format::Nifti4d => vec![nifti(volume, 4)?],
    })
}

/// A NIfTI-1 file of one volume, 16 bits without sign.
fn nifti(volume: &Volume, rank: i16) -> Result<Vec<u8>, EncodeError> {
    let (slices, rows, columns) = volume.voxels.dim();
    let mut file = vec![0; NIFTI_HEADER];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &348_i32.to_le_bytes());
    put(40, &rank.to_le_bytes());
    for (axis, side) in [columns, rows, slices, 1, 1, 1, 1].into_iter().enumerate() {
        let side = i16::try_from(side).map_err(|_| EncodeError::Side(side))?;
        put(42 + 2 * axis, &side.to_le_bytes());
    }
    put(70, &512_i16.to_le_bytes());
    put(72, &16_i16.to_le_bytes());
    let affine = ras(&volume.affine_lps);
    for axis in 0..3 {
        let step: f64 = affine[..3].iter().map(|row| row[axis].powi(2)).sum();
        put(80 + 4 * axis, &single(step.sqrt()).to_le_bytes());
    }
    put(76, &1_f32.to_le_bytes());
    put(92, &single(volume.header.tr_ms / 1e3).to_le_bytes());
    put(108, &352_f32.to_le_bytes());
    put(112, &1_f32.to_le_bytes());
    // Millimetres and seconds.
    put(123, &[2 | 8]);
    // The scanner's coordinates.
    put(254, &1_i16.to_le_bytes());
    for (row, numbers) in affine[..3].iter().enumerate() {
        for (column, number) in numbers.iter().enumerate() {
            put(280 + 16 * row + 4 * column, &single(*number).to_le_bytes());
        }
    }
    put(344, b"n+1\0");
    file.reserve(volume.voxels.len() * 2);
    file.extend(
        volume
            .voxels
            .iter()
            .flat_map(|value| stored(*value).to_le_bytes()),
    );
    Ok(file)
}

/// The values alone of a NIfTI file that [`encode`] made.
pub(super) fn nifti_values(file: &[u8]) -> &[u8] {
    file.get(NIFTI_HEADER..).unwrap_or_default()
}

fn ras(affine_lps: &Affine) -> Affine {
    let mut affine = *affine_lps;
    for row in &mut affine[..2] {
        for value in row {
            *value = -*value;
        }
    }
    affine
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rendered volume holds whole numbers of 16 bits"
)]
fn stored(value: f32) -> u16 {
    value as u16
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use rtfmri::nifti;

    use super::super::base::{Base, Grid};
    use super::*;

    #[test]
    fn nifti_reads_back_with_the_same_places() {
        let grid = Grid {
            sides: [10, 12, 8],
            voxel_mm: [3.0, 3.5, 4.0],
        };
        let mut volume = Base::synthetic(grid).volume;
        volume.voxels.mapv_inplace(f32::round);
        volume.header.tr_ms = 1500.0;
        let now = chrono::NaiveDateTime::from_str("2026-01-01T00:00:00").unwrap();
        let stamp = Stamp {
            began: now,
            acquired: now,
            created: now,
            study: String::new(),
            series: 1,
            description: "",
            patient: None,
        };
        let image = nifti::read(&encode(Format::Nifti, &volume, &stamp).unwrap()[0]).unwrap();
        assert_eq!(image.affine_ras, ras(&volume.affine_lps));
        for ((i, j, k), value) in image.values.indexed_iter() {
            assert!((value - f64::from(volume.voxels[[k, j, i]])).abs() < 1e-9);
        }
        let growing = encode(Format::Nifti4d, &volume, &stamp).unwrap();
        assert_eq!(nifti::read(&growing[0]).unwrap(), image);
        assert_eq!(nifti_values(&growing[0]).len(), 10 * 12 * 8 * 2);
    }
}
