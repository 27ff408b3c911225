//! A bounded reader and a small writer for NIfTI (`.nii`, `.nii.gz`).
//!
//! Steps: read the header ([`Header`]) in its own byte order, from plain or packed bytes; check the
//! stated sizes before anything is allocated; unpack and convert the values piece by piece, so
//! that memory follows the values and never what a packed file may grow to. The world affine is
//! the sform where set, else the qform. A 4-D image may still grow: [`Header::complete`] tells
//! how many of its volumes are there.

mod header;
mod series;
mod write;

use std::io::{self, Read};

use flate2::read::MultiGzDecoder;
use ndarray::Array3;

pub use self::header::Header;
use self::header::{NIFTI1_BYTES, NIFTI2_BYTES};
pub use self::series::SeriesReader;
pub use self::write::{SeriesHeader, SeriesWriter, Stored, write};
use crate::volume::{Affine, PatientTag, SeriesUid, Volume, VolumeHeader};

/// No mask has more voxels.
pub const MAX_VOXELS: usize = 4 << 20;
/// No volume of a functional run has more voxels: a small packed file must not cost much time.
pub const MAX_VOLUME_VOXELS: usize = 2 << 20;
/// Bytes that are unpacked and converted at a time.
const PIECE_BYTES: usize = 64 << 10;

/// Why bytes are not an image that we read.
#[derive(Debug, thiserror::Error)]
pub enum NiftiError {
    /// The gzip stream is broken.
    #[error("gzip stream cannot be unpacked")]
    Gzip(#[source] io::Error),
    /// The image unpacks to more than is allowed.
    #[error("image unpacks to more than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// The grid is larger than any functional run's.
    #[error("image of {shape:?} voxels, at most {limit} are read")]
    TooManyVoxels {
        /// The grid's sides.
        shape: [usize; 3],
        /// Voxels that are read.
        limit: usize,
    },
    /// Not a single-file NIfTI image.
    #[error("not a single-file NIfTI image")]
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
    /// A voxel is no number.
    #[error("NIfTI voxel {index} is not a finite number")]
    NotFinite {
        /// The voxel, in the order of the file.
        index: usize,
    },
    /// The matrix from voxels to the world is absent, not finite or flat.
    #[error("NIfTI affine is missing or singular")]
    Affine,
    /// The image cannot be written.
    #[error("NIfTI image cannot be written")]
    Write(#[source] io::Error),
}

/// One 3-D image.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// `[i, j, k]`, scaled by the header's slope and intercept.
    pub values: Array3<f64>,
    /// `(i, j, k)` to RAS, millimetres.
    pub affine_ras: Affine,
}

/// Whether bytes begin as a NIfTI image, or as a gzip stream that may hold one, do.
#[must_use]
pub fn is_likely(bytes: &[u8]) -> bool {
    is_packed(bytes) || Header::read(bytes).is_ok() || header::has_magic(bytes)
}

fn is_packed(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0x1f, 0x8b])
}

/// Bytes as they are, or unpacked as they are read.
enum Source<'b> {
    Plain(&'b [u8]),
    Packed(Box<MultiGzDecoder<&'b [u8]>>),
}

impl<'b> Source<'b> {
    fn new(bytes: &'b [u8]) -> Source<'b> {
        if is_packed(bytes) {
            Source::Packed(Box::new(MultiGzDecoder::new(bytes)))
        } else {
            Source::Plain(bytes)
        }
    }

    /// Reads until the buffer is full or the source ends; returns how much.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, NiftiError> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let count = match self {
                Source::Plain(bytes) => bytes.read(rest),
                Source::Packed(stream) => stream.read(rest),
            };
            match count.map_err(NiftiError::Gzip)? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    /// Goes on by so many bytes; returns how many there were.
    fn skip(&mut self, mut count: u64) -> Result<u64, NiftiError> {
        let mut skipped = 0;
        if let Source::Plain(bytes) = self {
            let len = usize::try_from(count)
                .unwrap_or(usize::MAX)
                .min(bytes.len());
            *bytes = bytes.get(len..).unwrap_or_default();
            return Ok(u64::try_from(len).unwrap_or(u64::MAX));
        }
        let mut piece = [0; 4096];
        while count > 0 {
            let len = usize::try_from(count)
                .unwrap_or(usize::MAX)
                .min(piece.len());
            let got = self.fill(&mut piece[..len])?;
            let got_bytes = u64::try_from(got).unwrap_or(u64::MAX);
            skipped += got_bytes;
            count -= got_bytes;
            if got < len {
                break;
            }
        }
        Ok(skipped)
    }
}

/// Reads one 3-D image, packed or not.
///
/// # Errors
/// [`NiftiError`], naming the field.
pub fn read(bytes: &[u8]) -> Result<Image, NiftiError> {
    let (header, mut source) = open(bytes)?;
    if header.volumes != 1 {
        return Err(NiftiError::Field {
            field: "dim[4]",
            found: crate::dicom::as_f64(header.volumes),
            expected: "1",
        });
    }
    let values = values(&header, &mut source, 0, |value| value)?;
    image(&header, values)
}

/// Reads one volume of an image, packed or not, with the image's header.
///
/// The volume belongs to no series and no patient, its number is its place in the image, its
/// TR is the header's or 0 where that has none.
///
/// - `index`: from 0.
///
/// # Errors
/// [`NiftiError`], naming the field; voxels that are no finite numbers are refused.
pub fn read_volume(bytes: &[u8], index: usize) -> Result<(Header, Volume), NiftiError> {
    let (header, mut source) = open(bytes)?;
    if index >= header.volumes {
        return Err(NiftiError::Field {
            field: "dim[4]",
            found: crate::dicom::as_f64(header.volumes),
            expected: "more volumes",
        });
    }
    if header.shape.iter().product::<usize>() > MAX_VOLUME_VOXELS {
        return Err(NiftiError::TooManyVoxels {
            shape: header.shape,
            limit: MAX_VOLUME_VOXELS,
        });
    }
    let values = values(&header, &mut source, index, single)?;
    if let Some(index) = values.iter().position(|value: &f32| !value.is_finite()) {
        return Err(NiftiError::NotFinite { index });
    }
    let volume = volume(&header, values, index)?;
    Ok((header, volume))
}

/// One volume's values in the file's order as a volume.
fn volume(header: &Header, values: Vec<f32>, index: usize) -> Result<Volume, NiftiError> {
    let [ni, nj, nk] = header.shape;
    let voxels = Array3::from_shape_vec((nk, nj, ni), values).map_err(|_| NiftiError::NotNifti)?;
    let mut affine_lps = header.affine_ras;
    for row in &mut affine_lps[..2] {
        *row = row.map(|value| -value);
    }
    Ok(Volume {
        voxels,
        affine_lps,
        header: VolumeHeader {
            series_uid: SeriesUid::new(""),
            patient: PatientTag::default(),
            acquisition: u32::try_from(index + 1).unwrap_or(u32::MAX),
            instance: None,
            tr_ms: header.tr_ms.unwrap_or(0.0),
            slice_times_ms: None,
            time_ms: None,
        },
    })
}

/// One volume's values in the file's order as an image.
fn image(header: &Header, values: Vec<f64>) -> Result<Image, NiftiError> {
    let [ni, nj, nk] = header.shape;
    let image = Array3::from_shape_vec((nk, nj, ni), values);
    Ok(Image {
        values: image
            .map_err(|_| NiftiError::NotNifti)?
            .reversed_axes()
            .as_standard_layout()
            .into_owned(),
        affine_ras: header.affine_ras,
    })
}

/// The header, and the source where the first value begins.
fn open(bytes: &[u8]) -> Result<(Header, Source<'_>), NiftiError> {
    let mut source = Source::new(bytes);
    let mut head = [0; NIFTI2_BYTES];
    let mut len = source.fill(&mut head[..NIFTI1_BYTES])?;
    if len == NIFTI1_BYTES && header::is_second(&head) {
        len += source.fill(&mut head[NIFTI1_BYTES..])?;
    }
    let header = Header::read(&head[..len])?;
    let to_go = header.start - u64::try_from(len).unwrap_or(header.start);
    source.skip(to_go)?;
    Ok((header, source))
}

/// One volume's values in the file's order, scaled.
fn values<T>(
    header: &Header,
    source: &mut Source<'_>,
    index: usize,
    convert: impl Fn(f64) -> T,
) -> Result<Vec<T>, NiftiError> {
    let volume_bytes = header.volume_bytes();
    let before = u64::try_from(index)
        .ok()
        .and_then(|index| index.checked_mul(volume_bytes));
    let before = before.ok_or(NiftiError::NotNifti)?;
    let skipped = source.skip(before)?;
    let expected = usize::try_from(volume_bytes).unwrap_or(usize::MAX);
    if skipped < before {
        return Err(NiftiError::Truncated { expected, found: 0 });
    }
    if let Source::Plain(bytes) = source
        && bytes.len() < expected
    {
        return Err(NiftiError::Truncated {
            expected,
            found: bytes.len(),
        });
    }
    let width = header.kind.width();
    let mut piece = vec![0; PIECE_BYTES.min(expected)];
    let mut values = Vec::new();
    let mut found = 0;
    while found < expected {
        let len = piece.len().min(expected - found);
        let got = source.fill(&mut piece[..len])?;
        found += got;
        if got < len {
            return Err(NiftiError::Truncated { expected, found });
        }
        let stored = piece[..len].chunks_exact(width);
        values.extend(stored.map(|stored| {
            let value = header.kind.number(stored, header.big);
            convert(value * header.slope + header.intercept)
        }));
    }
    Ok(values)
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
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;

    const AFFINE: Affine = [
        [-3.0, 0.0, 0.5, 90.0],
        [0.0, 3.0, 0.0, -110.0],
        [0.25, 0.0, 4.0, -20.0],
        [0.0, 0.0, 0.0, 1.0],
    ];

    fn unpacked(packed: &[u8]) -> Vec<u8> {
        let mut plain = Vec::new();
        MultiGzDecoder::new(packed).read_to_end(&mut plain).unwrap();
        plain
    }

    /// A 4-D image of two volumes, packed.
    fn series(stored: Stored, volumes: &[Array3<f32>]) -> Vec<u8> {
        let (nk, nj, ni) = volumes[0].dim();
        let header = SeriesHeader {
            shape: [ni, nj, nk],
            volumes: volumes.len(),
            affine_ras: AFFINE,
            tr_ms: 1259.23,
            stored,
        };
        let mut writer = SeriesWriter::new(Vec::new(), header).unwrap();
        for volume in volumes {
            writer.push(volume).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn written_image_reads_back() {
        let values = Array3::from_shape_fn((3, 4, 5), |(i, j, k)| u8::from((i + j * k) % 3 == 0));
        let image = read(&write(&values, &AFFINE).unwrap()).unwrap();
        assert_eq!(image.values, values.mapv(f64::from));
        assert_eq!(image.affine_ras, AFFINE);
    }

    #[test]
    fn written_series_reads_back_volume_by_volume() {
        let volume = |factor: f32| {
            Array3::from_shape_fn((5, 4, 3), |(k, j, i)| {
                factor * f32::from(u16::try_from(100 * k + 10 * j + i).unwrap())
            })
        };
        for (stored, factors) in [
            (Stored::I16, [1.0, -2.0]),
            (Stored::U16, [1.0, 100.0]),
            (Stored::F32, [0.1, -1e9]),
        ] {
            let volumes = factors.map(volume);
            let packed = series(stored, &volumes);
            let plain = unpacked(&packed);
            for bytes in [&packed, &plain] {
                for (index, written) in volumes.iter().enumerate() {
                    let (header, found) = read_volume(bytes, index).unwrap();
                    assert_eq!(&found.voxels, written);
                    assert_eq!(header.volumes, 2);
                    assert_eq!(found.header.tr_ms, 1259.23);
                    assert_eq!(found.affine_lps[0][0], -AFFINE[0][0]);
                    assert_eq!(found.affine_lps[1][3], -AFFINE[1][3]);
                    assert_eq!(found.affine_lps[2], AFFINE[2]);
                }
                assert!(read_volume(bytes, 2).is_err());
                assert!(read(bytes).is_err(), "a series is no mask");
            }
        }
        let mut writer = SeriesWriter::new(
            Vec::new(),
            SeriesHeader {
                shape: [3, 4, 5],
                volumes: 1,
                affine_ras: AFFINE,
                tr_ms: 1.0,
                stored: Stored::I16,
            },
        )
        .unwrap();
        assert!(writer.push(&volume(0.5)).is_err(), "halves do not fit");
        assert!(writer.finish().is_err(), "a volume is missing");
    }

    #[test]
    fn a_growing_series_says_how_many_volumes_are_complete() {
        let volumes = [Array3::ones((5, 4, 3)), Array3::zeros((5, 4, 3))];
        let plain = unpacked(&series(Stored::F32, &volumes));
        let header = Header::read(&plain[..400]).unwrap();
        assert_eq!(header.volume_bytes(), 240);
        let complete = |len: u64| header.complete(len);
        assert_eq!(
            [0, 352, 591, 592, 831, 832].map(complete),
            [0, 0, 0, 1, 1, 2]
        );
        // A volume is its bytes behind the header.
        let mut second = plain[..352].to_vec();
        second.extend_from_slice(&plain[592..832]);
        assert_eq!(read_volume(&second, 0).unwrap().1.voxels, volumes[1]);
    }

    /// The same image in a form of the format: type, byte order, version.
    fn form(code: i16, big: bool, second: bool) -> Vec<u8> {
        fn put<const N: usize>(file: &mut [u8], big: bool, at: usize, mut bytes: [u8; N]) {
            if big {
                bytes.reverse();
            }
            file[at..at + N].copy_from_slice(&bytes);
        }
        let start: u16 = if second { 544 } else { 352 };
        let mut file = vec![0; usize::from(start)];
        let sides = [3_i16, 2, 1, 1, 1, 1, 1, 1];
        if second {
            put(&mut file, big, 0, 540_i32.to_le_bytes());
            file[4..8].copy_from_slice(b"n+2\0");
            put(&mut file, big, 12, code.to_le_bytes());
            for (axis, side) in sides.into_iter().enumerate() {
                put(&mut file, big, 16 + 8 * axis, i64::from(side).to_le_bytes());
            }
            put(&mut file, big, 168, i64::from(start).to_le_bytes());
            put(&mut file, big, 176, 2_f64.to_le_bytes());
            put(&mut file, big, 184, 1_f64.to_le_bytes());
            put(&mut file, big, 348, 1_i32.to_le_bytes());
            for axis in 0..3 {
                put(&mut file, big, 400 + 40 * axis, 2_f64.to_le_bytes());
            }
        } else {
            put(&mut file, big, 0, 348_i32.to_le_bytes());
            for (axis, side) in sides.into_iter().enumerate() {
                put(&mut file, big, 40 + 2 * axis, side.to_le_bytes());
            }
            put(&mut file, big, 70, code.to_le_bytes());
            put(&mut file, big, 108, f32::from(start).to_le_bytes());
            put(&mut file, big, 112, 2_f32.to_le_bytes());
            put(&mut file, big, 116, 1_f32.to_le_bytes());
            put(&mut file, big, 254, 1_i16.to_le_bytes());
            for axis in 0..3 {
                put(&mut file, big, 280 + 20 * axis, 2_f32.to_le_bytes());
            }
            file[344..348].copy_from_slice(b"n+1\0");
        }
        for value in [7_u8, 100] {
            let mut stored = match code {
                2 | 256 => vec![value],
                4 | 512 => u16::from(value).to_le_bytes().to_vec(),
                8 | 768 => u32::from(value).to_le_bytes().to_vec(),
                16 => f32::from(value).to_le_bytes().to_vec(),
                64 => f64::from(value).to_le_bytes().to_vec(),
                _ => u64::from(value).to_le_bytes().to_vec(),
            };
            if big {
                stored.reverse();
            }
            file.extend(stored);
        }
        file
    }

    #[test]
    fn every_type_byte_order_and_version_gives_the_same_image() {
        for code in [2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280] {
            for (big, second) in [(false, false), (true, false), (false, true), (true, true)] {
                let image = read(&form(code, big, second));
                let image = image.unwrap_or_else(|error| panic!("{code} {big} {second}: {error}"));
                assert_eq!(image.values.as_slice().unwrap(), [15.0, 201.0]);
                assert_eq!(image.affine_ras[2], [0.0, 0.0, 2.0, 0.0]);
            }
        }
        assert!(matches!(
            read(&form(32, false, false)),
            Err(NiftiError::Field {
                field: "datatype",
                ..
            })
        ));
    }

    #[test]
    fn voxels_that_are_no_numbers_are_refused_in_a_volume() {
        let mut file = form(16, false, false);
        let at = file.len() - 4;
        file[at..].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(matches!(
            read_volume(&file, 0),
            Err(NiftiError::NotFinite { index: 1 })
        ));
    }

    #[test]
    fn cut_image_is_refused() {
        let packed = write(&Array3::ones((3, 4, 5)), &AFFINE).unwrap();
        let values = unpacked(&packed).len();
        for end in 0..packed.len() - 8 {
            // The stream's checksum comes after the last value and is not waited for.
            if let Ok(image) = read(&packed[..end]) {
                assert_eq!(image.values.len() + 352, values, "cut at {end}");
            }
        }
        assert!(read(&packed[..packed.len() - 20]).is_err());
    }

    #[test]
    fn gzip_bomb_costs_no_more_than_the_image_it_states() {
        let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
        packer.write_all(&form(2, false, false)).unwrap();
        for _ in 0..256 {
            packer.write_all(&[0; 1 << 20]).unwrap();
        }
        // What follows the last value is never unpacked.
        let image = read(&packer.finish().unwrap()).unwrap();
        assert_eq!(image.values.len(), 2);
    }

    #[test]
    fn grid_larger_than_any_run_is_refused() {
        let mut header = form(2, false, false);
        for at in [42, 44, 46] {
            header[at..at + 2].copy_from_slice(&32767_i16.to_le_bytes());
        }
        assert!(matches!(
            read(&header),
            Err(NiftiError::TooManyVoxels { .. })
        ));
    }

    proptest! {
        #[test]
        fn changed_bytes_give_an_answer(
            second in any::<bool>(),
            changes in prop::collection::vec((0_usize..400, any::<u8>()), 0..12),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut plain = form(4, false, second);
            for (at, value) in changes {
                if let Some(byte) = plain.get_mut(at) {
                    *byte = value;
                }
            }
            for bytes in [plain.as_slice(), &plain[..cut.index(plain.len())]] {
                if let Ok(image) = read(bytes) {
                    prop_assert!(image.values.len() <= bytes.len());
                }
                let _ = read_volume(bytes, 1);
            }
        }
    }
}
