//! Writing images: masks, and series of volumes as they come.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use ndarray::Array3;

use super::header::NIFTI1_BYTES;
use super::{NiftiError, single};
use crate::volume::Affine;

/// How a series' values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// 16 bits with sign.
    I16,
    /// 16 bits without.
    U16,
    /// Single precision.
    F32,
}

/// What a series' header says.
#[derive(Debug, Clone, PartialEq)]
pub struct SeriesHeader {
    /// Sides of the grid, `[i, j, k]`, voxels.
    pub shape: [usize; 3],
    /// Volumes that follow.
    pub volumes: usize,
    /// `(i, j, k)` to RAS, millimetres; kept as 32-bit floats.
    pub affine_ras: Affine,
    /// Repetition time, milliseconds; kept as a 32-bit float of seconds.
    pub tr_ms: f64,
    /// How values are stored.
    pub stored: Stored,
}

/// Writes a `.nii.gz` of volumes, one after the other, to any stream.
#[derive(Debug)]
pub struct SeriesWriter<W: Write> {
    packer: GzEncoder<W>,
    header: SeriesHeader,
    written: usize,
}

impl<W: Write> SeriesWriter<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// [`NiftiError::Field`] where a side does not fit 16 bits; [`NiftiError::Write`].
    pub fn new(stream: W, header: SeriesHeader) -> Result<SeriesWriter<W>, NiftiError> {
        let mut packer = GzEncoder::new(stream, Compression::fast());
        packer
            .write_all(&header_bytes(&header)?)
            .map_err(NiftiError::Write)?;
        Ok(SeriesWriter {
            packer,
            header,
            written: 0,
        })
    }

    /// Adds a volume.
    ///
    /// - `voxels`: `[k, j, i]`, values that the stored type holds exactly.
    ///
    /// # Errors
    /// [`NiftiError::Field`] where the shape or a value is not what the header says;
    /// [`NiftiError::Write`].
    pub fn push(&mut self, voxels: &Array3<f32>) -> Result<(), NiftiError> {
        let [ni, nj, nk] = self.header.shape;
        if voxels.dim() != (nk, nj, ni) || self.written == self.header.volumes {
            return Err(NiftiError::Field {
                field: "dim",
                found: crate::dicom::as_f64(voxels.len()),
                expected: "the header's voxels, and no more volumes than it states",
            });
        }
        let mut bytes = Vec::with_capacity(voxels.len() * 4);
        for value in voxels {
            match self.header.stored {
                Stored::I16 => bytes.extend(signed(*value)?.to_le_bytes()),
                Stored::U16 => bytes.extend(unsigned(*value)?.to_le_bytes()),
                Stored::F32 => bytes.extend(value.to_le_bytes()),
            }
        }
        self.packer.write_all(&bytes).map_err(NiftiError::Write)?;
        self.written += 1;
        Ok(())
    }

    /// Ends the file and gives the stream back.
    ///
    /// # Errors
    /// [`NiftiError::Field`] where volumes are missing; [`NiftiError::Write`].
    pub fn finish(self) -> Result<W, NiftiError> {
        if self.written != self.header.volumes {
            return Err(NiftiError::Field {
                field: "dim[4]",
                found: crate::dicom::as_f64(self.written),
                expected: "as many volumes as the header states",
            });
        }
        self.packer.finish().map_err(NiftiError::Write)
    }
}

fn inexact(value: f32) -> NiftiError {
    NiftiError::Field {
        field: "voxel",
        found: f64::from(value),
        expected: "a whole number that the stored type holds",
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the range and the fraction are checked first"
)]
fn signed(value: f32) -> Result<i16, NiftiError> {
    let fits = (-32_768.0..=32_767.0).contains(&value) && value.fract() == 0.0;
    fits.then_some(value as i16).ok_or(inexact(value))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range and the fraction are checked first"
)]
fn unsigned(value: f32) -> Result<u16, NiftiError> {
    let fits = (0.0..=65_535.0).contains(&value) && value.fract() == 0.0;
    fits.then_some(value as u16).ok_or(inexact(value))
}

/// A NIfTI-1 header of a series.
fn header_bytes(series: &SeriesHeader) -> Result<Vec<u8>, NiftiError> {
    let (code, bits) = match series.stored {
        Stored::I16 => (4, 16),
        Stored::U16 => (512, 16),
        Stored::F32 => (16, 32),
    };
    let [ni, nj, nk] = series.shape;
    let sides = [ni, nj, nk, series.volumes];
    let mut header = head(4, &sides, code, bits, &series.affine_ras)?;
    let tr_s = single(series.tr_ms / 1000.0);
    put(&mut header, 92, &tr_s.to_le_bytes());
    // Millimetres and seconds.
    put(&mut header, 123, &[2 | 8]);
    Ok(header)
}

fn put(header: &mut [u8], at: usize, bytes: &[u8]) {
    header[at..at + bytes.len()].copy_from_slice(bytes);
}

/// - `sides`: of the axes that are used.
fn head(
    rank: i16,
    sides: &[usize],
    code: i16,
    bits: i16,
    affine_ras: &Affine,
) -> Result<Vec<u8>, NiftiError> {
    let mut header = vec![0_u8; NIFTI1_BYTES];
    put(&mut header, 0, &348_i32.to_le_bytes());
    put(&mut header, 40, &rank.to_le_bytes());
    for axis in 0..7 {
        let len = sides.get(axis).copied().unwrap_or(1);
        let len = i16::try_from(len).map_err(|_| NiftiError::Field {
            field: "dim",
            found: crate::dicom::as_f64(len),
            expected: "at most 32767",
        })?;
        put(&mut header, 42 + 2 * axis, &len.to_le_bytes());
    }
    put(&mut header, 70, &code.to_le_bytes());
    put(&mut header, 72, &bits.to_le_bytes());
    put(&mut header, 76, &1_f32.to_le_bytes());
    for axis in 0..3 {
        let squares: f64 = affine_ras[..3].iter().map(|row| row[axis].powi(2)).sum();
        put(
            &mut header,
            80 + 4 * axis,
            &single(squares.sqrt()).to_le_bytes(),
        );
    }
    put(&mut header, 108, &352_f32.to_le_bytes());
    put(&mut header, 112, &1_f32.to_le_bytes());
    put(&mut header, 123, &[2]);
    put(&mut header, 254, &1_i16.to_le_bytes());
    for (row, numbers) in affine_ras[..3].iter().enumerate() {
        for (column, number) in numbers.iter().enumerate() {
            put(
                &mut header,
                280 + 16 * row + 4 * column,
                &single(*number).to_le_bytes(),
            );
        }
    }
    put(&mut header, 344, b"n+1\0");
    Ok(header)
}

/// Writes a `.nii.gz` image of bytes.
///
/// - `values`: `[i, j, k]`, dimensionless.
/// - `affine_ras`: `(i, j, k)` to RAS, millimetres; kept as 32-bit floats.
///
/// # Errors
/// [`NiftiError::Field`] where a side does not fit 16 bits; [`NiftiError::Write`].
pub fn write(values: &Array3<u8>, affine_ras: &Affine) -> Result<Vec<u8>, NiftiError> {
    let header = head(3, values.shape(), 2, 8, affine_ras)?;
    let columns_first = values.view().reversed_axes();
    let data: Vec<u8> = columns_first.iter().copied().collect();
    let mut packer = GzEncoder::new(Vec::new(), Compression::default());
    let packed = |packer: &mut GzEncoder<Vec<u8>>| -> io::Result<()> {
        packer.write_all(&header)?;
        packer.write_all(&data)
    };
    packed(&mut packer).map_err(NiftiError::Write)?;
    packer.finish().map_err(NiftiError::Write)
}
