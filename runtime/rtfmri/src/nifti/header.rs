//! The header of NIfTI-1 and NIfTI-2: sizes, type, scaling, affine, TR.

use super::{MAX_VOXELS, NiftiError};
use crate::volume::Affine;

/// Bytes of a NIfTI-1 header with the four that tell of extensions.
pub(super) const NIFTI1_BYTES: usize = 352;
/// The same of NIfTI-2.
pub(super) const NIFTI2_BYTES: usize = 544;
/// No run has more volumes.
const MAX_VOLUMES: i64 = 1_000_000;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Sides of the grid, `[i, j, k]`, voxels.
    pub shape: [usize; 3],
    /// Volumes that it states; a growing file may have fewer or more.
    pub volumes: usize,
    /// `(i, j, k)` to RAS, millimetres.
    pub affine_ras: Affine,
    /// Repetition time, milliseconds; `None` where the header has none.
    pub tr_ms: Option<f64>,
    pub(super) start: u64,
    pub(super) kind: Kind,
    pub(super) big: bool,
    pub(super) slope: f64,
    pub(super) intercept: f64,
}

/// How values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    F32,
    F64,
}

impl Kind {
    fn of(code: i64) -> Option<Kind> {
        Some(match code {
            2 => Kind::U8,
            4 => Kind::I16,
            8 => Kind::I32,
            16 => Kind::F32,
            64 => Kind::F64,
            256 => Kind::I8,
            512 => Kind::U16,
            768 => Kind::U32,
            1024 => Kind::I64,
            1280 => Kind::U64,
            _ => return None,
        })
    }

    /// Bytes of one value.
    pub(super) fn width(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 => 1,
            Kind::I16 | Kind::U16 => 2,
            Kind::I32 | Kind::U32 | Kind::F32 => 4,
            Kind::I64 | Kind::U64 | Kind::F64 => 8,
        }
    }

    /// A stored value; 64-bit integers as the nearest double.
    #[expect(
        clippy::cast_precision_loss,
        reason = "64-bit integers are read as the nearest double"
    )]
    pub(super) fn number(self, stored: &[u8], big: bool) -> f64 {
        match self {
            Kind::U8 => f64::from(u8::from_le_bytes(array(stored, big))),
            Kind::I8 => f64::from(i8::from_le_bytes(array(stored, big))),
            Kind::I16 => f64::from(i16::from_le_bytes(array(stored, big))),
            Kind::U16 => f64::from(u16::from_le_bytes(array(stored, big))),
            Kind::I32 => f64::from(i32::from_le_bytes(array(stored, big))),
            Kind::U32 => f64::from(u32::from_le_bytes(array(stored, big))),
            Kind::I64 => i64::from_le_bytes(array(stored, big)) as f64,
            Kind::U64 => u64::from_le_bytes(array(stored, big)) as f64,
            Kind::F32 => f64::from(f32::from_le_bytes(array(stored, big))),
            Kind::F64 => f64::from_le_bytes(array(stored, big)),
        }
    }
}

/// The first bytes in little-endian order.
fn array<const N: usize>(stored: &[u8], big: bool) -> [u8; N] {
    let mut out = stored.first_chunk().copied().unwrap_or([0; N]);
    if big {
        out.reverse();
    }
    out
}

/// Whether the bytes hold the second version's header, in either byte order.
pub(super) fn is_second(bytes: &[u8]) -> bool {
    bytes.get(4..8) == Some(b"n+2\0")
}

/// Whether the bytes name themselves NIfTI.
pub(super) fn has_magic(bytes: &[u8]) -> bool {
    is_second(bytes) || bytes.get(344..348) == Some(b"n+1\0")
}

struct Fields<'a> {
    bytes: &'a [u8],
    big: bool,
    second: bool,
}

impl Fields<'_> {
    fn stored<const N: usize>(&self, at: usize) -> [u8; N] {
        array(self.bytes.get(at..).unwrap_or_default(), self.big)
    }

    /// A whole number: 16 bits at the one place, or so many at the other.
    fn i16_or_i64(&self, first: usize, second: usize) -> i64 {
        if self.second {
            i64::from_le_bytes(self.stored(second))
        } else {
            i64::from(i16::from_le_bytes(self.stored(first)))
        }
    }

    fn i16_or_i32(&self, first: usize, second: usize) -> i64 {
        if self.second {
            i64::from(i32::from_le_bytes(self.stored(second)))
        } else {
            i64::from(i16::from_le_bytes(self.stored(first)))
        }
    }

    fn real(&self, first: usize, second: usize) -> f64 {
        if self.second {
            f64::from_le_bytes(self.stored(second))
        } else {
            f64::from(f32::from_le_bytes(self.stored(first)))
        }
    }

    fn dim(&self, axis: usize) -> i64 {
        self.i16_or_i64(40 + 2 * axis, 16 + 8 * axis)
    }

    fn pixdim(&self, axis: usize) -> f64 {
        self.real(76 + 4 * axis, 104 + 8 * axis)
    }
}

impl Header {
    /// Reads a header.
    ///
    /// - `bytes`: the file's first bytes, not packed; 352 of NIfTI-1, 544 of NIfTI-2 suffice.
    ///
    /// # Errors
    /// [`NiftiError`], naming the field.
    pub fn read(bytes: &[u8]) -> Result<Header, NiftiError> {
        let second = is_second(bytes);
        let (len, size) = if second {
            (NIFTI2_BYTES, 540_u32)
        } else {
            (NIFTI1_BYTES, 348)
        };
        if bytes.len() < len || !has_magic(bytes) {
            return Err(NiftiError::NotNifti);
        }
        let stated: [u8; 4] = array(bytes, false);
        let big = match stated {
            stated if stated == size.to_le_bytes() => false,
            stated if stated == size.to_be_bytes() => true,
            _ => return Err(NiftiError::NotNifti),
        };
        let fields = Fields { bytes, big, second };
        let (shape, volumes) = sizes(&fields)?;
        let code = i64::from(i16::from_le_bytes(fields.stored(if second {
            12
        } else {
            70
        })));
        let kind = Kind::of(code).ok_or(NiftiError::Field {
            field: "datatype",
            found: as_f64(code),
            expected: "2, 4, 8, 16, 64, 256, 512, 768, 1024 or 1280",
        })?;
        let (slope, intercept) = match (fields.real(112, 176), fields.real(116, 184)) {
            (0.0, _) => (1.0, 0.0),
            // Not a number stands for no scaling as well.
            (slope, _) if slope.is_nan() => (1.0, 0.0),
            (slope, intercept) if slope.is_finite() && intercept.is_finite() => (slope, intercept),
            (slope, _) => {
                return Err(NiftiError::Field {
                    field: "scl_slope",
                    found: slope,
                    expected: "a finite number",
                });
            }
        };
        Ok(Header {
            shape,
            volumes,
            affine_ras: affine(&fields)?,
            tr_ms: tr_ms(&fields)?,
            start: start(&fields, len)?,
            kind,
            big,
            slope,
            intercept,
        })
    }

    /// Bytes of one volume.
    #[must_use]
    pub fn volume_bytes(&self) -> u64 {
        let voxels: usize = self.shape.iter().product();
        u64::try_from(voxels * self.kind.width()).unwrap_or(u64::MAX)
    }

    /// Where the first value stands in the file.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Volumes that are complete in a file of so many bytes, not packed; a growing file's header may
    /// state fewer than there are.
    #[must_use]
    pub fn complete(&self, len_bytes: u64) -> u64 {
        len_bytes.saturating_sub(self.start) / self.volume_bytes().max(1)
    }
}

fn sizes(fields: &Fields<'_>) -> Result<([usize; 3], usize), NiftiError> {
    let bad = |field, found: i64, expected| NiftiError::Field {
        field,
        found: as_f64(found),
        expected,
    };
    let rank = fields.dim(0);
    if !(3..=7).contains(&rank) {
        return Err(bad("dim[0]", rank, "3 to 7"));
    }
    let mut shape = [1_usize; 3];
    for (axis, side) in shape.iter_mut().enumerate() {
        let len = fields.dim(1 + axis);
        *side = usize::try_from(len)
            .ok()
            .filter(|len| (1..=MAX_VOXELS).contains(len))
            .ok_or(bad("dim", len, "1 or more, and no more than a volume has"))?;
    }
    let mut volumes = 1;
    for axis in 4..=7 {
        let len = fields.dim(axis);
        if axis > usize::try_from(rank).unwrap_or(0) {
            continue;
        }
        if axis == 4 {
            volumes = usize::try_from(len)
                .ok()
                .filter(|_| (1..=MAX_VOLUMES).contains(&len))
                .ok_or(bad("dim[4]", len, "1 to 1000000"))?;
        } else if len != 1 {
            return Err(bad("dim", len, "1 from the fifth on"));
        }
    }
    let count = shape.into_iter().fold(1, usize::saturating_mul);
    if count > MAX_VOXELS {
        return Err(NiftiError::TooManyVoxels {
            shape,
            limit: MAX_VOXELS,
        });
    }
    Ok((shape, volumes))
}

/// Where the values begin.
fn start(fields: &Fields<'_>, len: usize) -> Result<u64, NiftiError> {
    let least = u64::try_from(len).unwrap_or(0);
    // The header ends there and extensions are short.
    let most = 1_000_000;
    let found = if fields.second {
        as_f64(i64::from_le_bytes(fields.stored(168)))
    } else {
        f64::from(f32::from_le_bytes(fields.stored(108)))
    };
    let mut at = least;
    if found.fract() == 0.0 && (as_float(least)..=as_float(most)).contains(&found) {
        at = whole(found);
    } else if found != 0.0 {
        return Err(NiftiError::Field {
            field: "vox_offset",
            found,
            expected: "a whole number from the header's length to 1000000",
        });
    }
    Ok(at)
}

/// A time from the fourth pixel dimension, milliseconds.
fn tr_ms(fields: &Fields<'_>) -> Result<Option<f64>, NiftiError> {
    let found = fields.pixdim(4);
    let units = if fields.second {
        i64::from(i32::from_le_bytes(fields.stored(500)))
    } else {
        i64::from(u8::from_le_bytes(fields.stored(123)))
    };
    let per_unit_ms = match units & 0x38 {
        // Without a unit, seconds are usual.
        0 | 8 => 1000.0,
        16 => 1.0,
        24 => 0.001,
        // Hertz and the like are no time.
        _ => return Ok(None),
    };
    let tr_ms = found * per_unit_ms;
    // Three-dimensional images leave 0 or 1 there.
    if found == 0.0 || fields.dim(0) < 4 && !(tr_ms > 0.0 && tr_ms <= 60_000.0) {
        return Ok(None);
    }
    if !(tr_ms > 0.0 && tr_ms <= 60_000.0) {
        return Err(NiftiError::Field {
            field: "pixdim[4]",
            found,
            expected: "a repetition time of at most 60 s",
        });
    }
    Ok(Some(rounded(tr_ms)))
}

/// A time kept in single precision, to the nanosecond: 1.5 and 1.2592324 s are meant.
fn rounded(tr_ms: f64) -> f64 {
    (tr_ms * 1e3).round() / 1e3
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the caller checked a whole number from 352 to 1e6"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

#[expect(
    clippy::cast_precision_loss,
    reason = "for messages and for numbers far below 2^53"
)]
fn as_f64(value: i64) -> f64 {
    value as f64
}

#[expect(clippy::cast_precision_loss, reason = "numbers here are at most 1e6")]
fn as_float(value: u64) -> f64 {
    value as f64
}

fn affine(fields: &Fields<'_>) -> Result<Affine, NiftiError> {
    let mut affine = [[0.0; 4]; 4];
    affine[3][3] = 1.0;
    if fields.i16_or_i32(254, 348) > 0 {
        for (row, numbers) in affine[..3].iter_mut().enumerate() {
            for (column, number) in numbers.iter_mut().enumerate() {
                *number = fields.real(280 + 16 * row + 4 * column, 400 + 32 * row + 8 * column);
            }
        }
    } else if fields.i16_or_i32(252, 344) > 0 {
        let (b, c, d) = (
            fields.real(256, 352),
            fields.real(260, 360),
            fields.real(264, 368),
        );
        let a = (1.0 - b * b - c * c - d * d).max(0.0).sqrt();
        let flip = if fields.pixdim(0) < 0.0 { -1.0 } else { 1.0 };
        let size = [fields.pixdim(1), fields.pixdim(2), fields.pixdim(3) * flip];
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
            affine[row][3] = fields.real(268 + 4 * row, 376 + 8 * row);
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
