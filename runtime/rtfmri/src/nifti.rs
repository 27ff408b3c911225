//! A bounded reader and a small writer for NIfTI-1 (`.nii`, `.nii.gz`).
//!
//! Steps: unpack with a size cap, read the 348-byte header in its own byte order, check
//! the stated sizes against the bytes present, then read the values. The world affine
//! is the sform where set, else the qform.

use std::io::{Read, Write};

use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use ndarray::Array3;

use crate::volume::Affine;

/// The largest image that is unpacked, bytes.
const MAX_BYTES: usize = 64 << 20;
/// No grid of a functional run has more voxels; the values kept are eight bytes each.
const MAX_VOXELS: usize = 4 << 20;
const HEADER_BYTES: usize = 352;

/// Why bytes are not an image that we read.
#[derive(Debug, thiserror::Error)]
pub enum NiftiError {
    /// The gzip stream is broken.
    #[error("gzip stream cannot be unpacked")]
    Gzip(#[source] std::io::Error),
    /// The image unpacks to more than is allowed.
    #[error("image unpacks to more than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// The grid is larger than any functional run's.
    #[error("image of {shape:?} voxels, at most {MAX_VOXELS} are read")]
    TooManyVoxels {
        /// The grid's sides.
        shape: [usize; 3],
    },
    /// Not a single-file NIfTI-1 image.
    #[error("not a single-file NIfTI-1 image")]
    NotNifti,
    /// A header field holds what we do not read.
    #[error("NIfTI {field} is {found}, expected {expected}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// The value found.
        found: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// The file ends before its last value.
    #[error("NIfTI data needs {expected} bytes, {found} are there")]
    Truncated {
        /// Bytes needed.
        expected: usize,
        /// Bytes present.
        found: usize,
    },
    /// The matrix from voxels to the world is absent, not finite or flat.
    #[error("NIfTI affine is missing or singular")]
    Affine,
}

/// One 3-D image.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// `[i, j, k]`, scaled by the header's slope and intercept.
    pub values: Array3<f64>,
    /// `(i, j, k)` to RAS, millimetres.
    pub affine_ras: Affine,
}

struct Fields<'a> {
    bytes: &'a [u8],
    big: bool,
}

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        if let Some(slice) = self.bytes.get(at..at + N) {
            out.copy_from_slice(slice);
        }
        if self.big {
            out.reverse();
        }
        out
    }
    fn i16(&self, at: usize) -> i16 {
        i16::from_le_bytes(self.array(at))
    }
    fn f32(&self, at: usize) -> f64 {
        f64::from(f32::from_le_bytes(self.array(at)))
    }
}

/// Reads one 3-D image, packed or not.
///
/// # Errors
/// [`NiftiError`], naming the field.
pub fn read(bytes: &[u8]) -> Result<Image, NiftiError> {
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return read_plain(bytes);
    }
    let mut plain = Vec::new();
    let cap = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX) + 1;
    MultiGzDecoder::new(bytes)
        .take(cap)
        .read_to_end(&mut plain)
        .map_err(NiftiError::Gzip)?;
    if plain.len() > MAX_BYTES {
        return Err(NiftiError::TooLarge { limit: MAX_BYTES });
    }
    read_plain(&plain)
}

fn read_plain(bytes: &[u8]) -> Result<Image, NiftiError> {
    if bytes.len() < HEADER_BYTES || bytes.get(344..348) != Some(b"n+1\0") {
        return Err(NiftiError::NotNifti);
    }
    let big = match bytes[..4] {
        [0x5c, 1, 0, 0] => false,
        [0, 0, 1, 0x5c] => true,
        _ => return Err(NiftiError::NotNifti),
    };
    let fields = Fields { bytes, big };
    let bad = |field, found, expected| NiftiError::Field {
        field,
        found,
        expected,
    };
    let rank = fields.i16(40);
    if !(3..=7).contains(&rank) {
        return Err(bad("dim[0]", f64::from(rank), "3 to 7"));
    }
    let mut shape = [1_usize; 3];
    for (axis, side) in shape.iter_mut().enumerate() {
        let len = fields.i16(42 + 2 * axis);
        if len < 1 {
            return Err(bad("dim", f64::from(len), "1 or more"));
        }
        *side = usize::from(len.unsigned_abs());
    }
    for axis in 3..usize::from(rank.unsigned_abs()) {
        let len = fields.i16(42 + 2 * axis);
        if len != 1 {
            return Err(bad("dim", f64::from(len), "1 from the fourth on"));
        }
    }
    let code = fields.i16(70);
    let width = match code {
        2 => 1,
        4 | 512 => 2,
        8 | 16 => 4,
        64 => 8,
        _ => {
            let expected = "2, 4, 8, 16, 64 or 512";
            return Err(bad("datatype", f64::from(code), expected));
        }
    };
    let start = data_start(&fields).ok_or(bad(
        "vox_offset",
        fields.f32(108),
        "a whole number from 352 to the file's length",
    ))?;
    let count = shape.into_iter().fold(1, usize::saturating_mul);
    if count > MAX_VOXELS {
        return Err(NiftiError::TooManyVoxels { shape });
    }
    let expected = count * width;
    let found = bytes.len().saturating_sub(start);
    if found < expected {
        return Err(NiftiError::Truncated { expected, found });
    }
    let (slope, intercept) = match (fields.f32(112), fields.f32(116)) {
        (0.0, _) => (1.0, 0.0),
        (slope, intercept) if slope.is_finite() && intercept.is_finite() => (slope, intercept),
        (slope, _) => return Err(bad("scl_slope", slope, "a finite number")),
    };
    let value = |index: usize| {
        let at = start + index * width;
        match code {
            2 => f64::from(bytes[at]),
            4 => f64::from(fields.i16(at)),
            512 => f64::from(u16::from_le_bytes(fields.array(at))),
            8 => f64::from(i32::from_le_bytes(fields.array(at))),
            16 => fields.f32(at),
            _ => f64::from_le_bytes(fields.array(at)),
        }
    };
    let [ni, nj, _] = shape;
    let values = Array3::from_shape_fn((shape[0], shape[1], shape[2]), |(i, j, k)| {
        value(i + ni * (j + nj * k)) * slope + intercept
    });
    Ok(Image {
        values,
        affine_ras: affine(&fields)?,
    })
}

/// Where the values begin, from the header's float.
fn data_start(fields: &Fields<'_>) -> Option<usize> {
    let offset = fields.f32(108);
    // The header ends at 352 and extensions are short: compare instead of casting blindly.
    let whole = ((352.0..=1e6).contains(&offset) && offset.fract() == 0.0).then_some(offset)?;
    let start = whole_to_usize(whole);
    (start <= fields.bytes.len()).then_some(start)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the caller checked a whole number from 352 to 1e6"
)]
fn whole_to_usize(value: f64) -> usize {
    value as usize
}

fn affine(fields: &Fields<'_>) -> Result<Affine, NiftiError> {
    let mut affine = [[0.0; 4]; 4];
    affine[3][3] = 1.0;
    if fields.i16(254) > 0 {
        for (row, numbers) in affine[..3].iter_mut().enumerate() {
            for (column, number) in numbers.iter_mut().enumerate() {
                *number = fields.f32(280 + 16 * row + 4 * column);
            }
        }
    } else if fields.i16(252) > 0 {
        let (b, c, d) = (fields.f32(256), fields.f32(260), fields.f32(264));
        let a = (1.0 - b * b - c * c - d * d).max(0.0).sqrt();
        let flip = if fields.f32(76) < 0.0 { -1.0 } else { 1.0 };
        let size = [fields.f32(80), fields.f32(84), fields.f32(88) * flip];
        let rotation = [
            [
                a * a + b * b - c * c - d * d,
                2.0 * (b * c - a * d),
                2.0 * (b * d + a * c),
            ],
            [
                2.0 * (b * c + a * d),
                a * a + c * c - b * b - d * d,
                2.0 * (c * d - a * b),
            ],
            [
                2.0 * (b * d - a * c),
                2.0 * (c * d + a * b),
                a * a + d * d - b * b - c * c,
            ],
        ];
        for row in 0..3 {
            for column in 0..3 {
                affine[row][column] = rotation[row][column] * size[column];
            }
            affine[row][3] = fields.f32(268 + 4 * row);
        }
    }
    let matrix = nalgebra::Matrix3::from_fn(|row, column| affine[row][column]);
    let finite = affine.iter().flatten().all(|value| value.is_finite());
    if finite && matrix.determinant().abs() > 1e-9 {
        Ok(affine)
    } else {
        Err(NiftiError::Affine)
    }
}

/// Writes a `.nii.gz` image of bytes.
///
/// - `values`: `[i, j, k]`, dimensionless.
/// - `affine_ras`: `(i, j, k)` to RAS, millimetres; kept as 32-bit floats.
///
/// # Errors
/// [`NiftiError::Field`] where a side does not fit 16 bits; [`NiftiError::Gzip`].
pub fn write(values: &Array3<u8>, affine_ras: &Affine) -> Result<Vec<u8>, NiftiError> {
    let mut header = vec![0_u8; HEADER_BYTES];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &348_i32.to_le_bytes());
    put(40, &3_i16.to_le_bytes());
    for axis in 0..7 {
        let len = values.shape().get(axis).copied().unwrap_or(1);
        let len = i16::try_from(len).map_err(|_| NiftiError::Field {
            field: "dim",
            found: f64::from(u32::try_from(len).unwrap_or(u32::MAX)),
            expected: "at most 32767",
        })?;
        put(42 + 2 * axis, &len.to_le_bytes());
    }
    put(70, &2_i16.to_le_bytes());
    put(72, &8_i16.to_le_bytes());
    put(76, &1_f32.to_le_bytes());
    for axis in 0..3 {
        let squares: f64 = affine_ras[..3].iter().map(|row| row[axis].powi(2)).sum();
        put(80 + 4 * axis, &single(squares.sqrt()).to_le_bytes());
    }
    put(108, &352_f32.to_le_bytes());
    put(112, &1_f32.to_le_bytes());
    put(123, &[2]);
    put(254, &1_i16.to_le_bytes());
    for (row, numbers) in affine_ras[..3].iter().enumerate() {
        for (column, number) in numbers.iter().enumerate() {
            put(280 + 16 * row + 4 * column, &single(*number).to_le_bytes());
        }
    }
    put(344, b"n+1\0");
    let columns_first = values.view().reversed_axes();
    let mut packer = GzEncoder::new(Vec::new(), Compression::default());
    let data: Vec<u8> = columns_first.iter().copied().collect();
    packer.write_all(&header).map_err(NiftiError::Gzip)?;
    packer.write_all(&data).map_err(NiftiError::Gzip)?;
    packer.finish().map_err(NiftiError::Gzip)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the format holds 32-bit floats; the rounding is its own"
)]
fn single(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AFFINE: Affine = [
        [-3.0, 0.0, 0.5, 90.0],
        [0.0, 3.0, 0.0, -110.0],
        [0.25, 0.0, 4.0, -20.0],
        [0.0, 0.0, 0.0, 1.0],
    ];

    #[test]
    fn written_image_reads_back() {
        let values = Array3::from_shape_fn((3, 4, 5), |(i, j, k)| u8::from((i + j * k) % 3 == 0));
        let image = read(&write(&values, &AFFINE).unwrap()).unwrap();
        assert_eq!(image.values, values.mapv(f64::from));
        assert_eq!(image.affine_ras, AFFINE);
    }

    #[test]
    fn cut_image_is_refused() {
        let packed = write(&Array3::ones((3, 4, 5)), &AFFINE).unwrap();
        for end in 0..packed.len() - 8 {
            assert!(read(&packed[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn gzip_bomb_is_refused_at_the_limit() {
        let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
        for _ in 0..MAX_BYTES / (1 << 20) + 1 {
            packer.write_all(&[0; 1 << 20]).unwrap();
        }
        let bomb = packer.finish().unwrap();
        assert!(bomb.len() < 1 << 20);
        assert!(matches!(read(&bomb), Err(NiftiError::TooLarge { .. })));
    }

    #[test]
    fn grid_larger_than_any_run_is_refused() {
        let mut header = vec![0; 4096];
        header[..4].copy_from_slice(&348_i32.to_le_bytes());
        for (at, value) in [(40, 3_i16), (42, 32767), (44, 32767), (46, 32767), (70, 2)] {
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        header[108..112].copy_from_slice(&352_f32.to_le_bytes());
        header[344..348].copy_from_slice(b"n+1\0");
        assert!(matches!(
            read(&header),
            Err(NiftiError::TooManyVoxels { .. })
        ));
    }

    proptest! {
        #[test]
        fn changed_bytes_give_an_answer(
            changes in prop::collection::vec((0_usize..400, any::<u8>()), 0..12),
        ) {
            let packed = write(&Array3::ones((3, 4, 5)), &AFFINE).unwrap();
            let mut plain = Vec::new();
            MultiGzDecoder::new(packed.as_slice()).read_to_end(&mut plain).unwrap();
            for (at, value) in changes {
                plain[at] = value;
            }
            if let Ok(image) = read(&plain) {
                prop_assert!(image.values.len() <= plain.len());
            }
        }
    }
}
