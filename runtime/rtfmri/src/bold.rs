//! A whole run in one file: a 4-D NIfTI image (`.nii`, `.nii.gz`), one volume at a time.
//!
//! The bytes are unpacked as they are read, so that no more than one volume is held beside
//! them. Each volume is handed to the reader of 3-D images ([`nifti::read`]) behind the
//! run's own header, and gets that reader's checks.

use std::io::Read;

use flate2::read::MultiGzDecoder;

use crate::nifti::{self, NiftiError};
use crate::volume::{PatientTag, SeriesUid, Volume, VolumeHeader};

/// Bytes of a NIfTI-1 header with its extension flag.
const HEADER_BYTES: usize = 352;
/// No run has more volumes.
const MAX_VOLUMES: usize = 65_536;
/// No volume is larger, bytes.
const MAX_VOLUME_BYTES: usize = 64 << 20;

/// A run's image, read from its start.
pub struct Bold<'b> {
    bytes: Box<dyn Read + 'b>,
    header: Vec<u8>,
    volume_bytes: usize,
    volumes: usize,
    next: usize,
    tr_ms: f64,
}

impl std::fmt::Debug for Bold<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bold")
            .field("volumes", &self.volumes)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl<'b> Bold<'b> {
    /// Reads the header.
    ///
    /// - `bytes`: the file's, packed or not.
    ///
    /// # Errors
    /// [`NiftiError`], naming the field, where they are no run of volumes.
    pub fn open(bytes: &'b [u8]) -> Result<Self, NiftiError> {
        let mut source: Box<dyn Read + 'b> = if bytes.starts_with(&[0x1f, 0x8b]) {
            Box::new(MultiGzDecoder::new(bytes))
        } else {
            Box::new(bytes)
        };
        let mut header = Vec::with_capacity(HEADER_BYTES);
        read_up_to(&mut source, &mut header, HEADER_BYTES)?;
        let big = match header.get(..4) {
            Some([0x5c, 1, 0, 0]) => false,
            Some([0, 0, 1, 0x5c]) => true,
            _ => return Err(NiftiError::NotNifti),
        };
        if header.len() < HEADER_BYTES || header.get(344..348) != Some(b"n+1\0") {
            return Err(NiftiError::NotNifti);
        }
        let short = |at: usize| {
            let pair = [header[at], header[at + 1]];
            if big {
                i16::from_be_bytes(pair)
            } else {
                i16::from_le_bytes(pair)
            }
        };
        let float = |at: usize| {
            let four = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            f64::from(if big {
                f32::from_be_bytes(four)
            } else {
                f32::from_le_bytes(four)
            })
        };
        let bad = |field, found: f64, expected| NiftiError::Field {
            field,
            found,
            expected,
        };
        let rank = short(40);
        if !(3..=7).contains(&rank) {
            return Err(bad("dim[0]", f64::from(rank), "4"));
        }
        let mut sides = [1_usize; 7];
        for (axis, side) in sides
            .iter_mut()
            .enumerate()
            .take(usize::from(rank.unsigned_abs()))
        {
            let len = short(42 + 2 * axis);
            if len < 1 || (axis > 3 && len != 1) {
                let expected = if axis > 3 {
                    "1 from the fifth on"
                } else {
                    "1 or more"
                };
                return Err(bad("dim", f64::from(len), expected));
            }
            *side = usize::from(len.unsigned_abs());
        }
        let code = short(70);
        let width = match code {
            2 | 256 => 1,
            4 | 512 => 2,
            8 | 16 | 768 => 4,
            64 | 1024 | 1280 => 8,
            _ => return Err(bad("datatype", f64::from(code), "a type of real numbers")),
        };
        let volume_bytes = sides[..3]
            .iter()
            .fold(width, |all, side| side.saturating_mul(all));
        let volumes = sides[3];
        if volume_bytes > MAX_VOLUME_BYTES {
            let shape = [sides[0], sides[1], sides[2]];
            return Err(NiftiError::TooManyVoxels {
                shape,
                limit: nifti::MAX_VOXELS,
            });
        }
        if volumes > MAX_VOLUMES {
            let found = crate::spline::count(volumes);
            return Err(bad("dim[4]", found, "at most 65536 volumes"));
        }
        let offset = float(108);
        if !((352.0..=1e6).contains(&offset) && offset.fract() == 0.0) {
            return Err(bad("vox_offset", offset, "a whole number from 352 to 1e6"));
        }
        let mut between = Vec::new();
        let gap = crate::spline::floor(offset) - HEADER_BYTES;
        read_up_to(&mut source, &mut between, gap)?;
        let unit_ms = match header[123] & 0x38 {
            16 => 1.0,
            24 => 1e-3,
            _ => 1e3,
        };
        let tr_ms = float(92) * unit_ms;
        // From here on it is the header of one volume.
        let write = |number: i16| {
            if big {
                number.to_be_bytes()
            } else {
                number.to_le_bytes()
            }
        };
        for (at, number) in [(40, 3), (48, 1), (50, 1), (52, 1), (54, 1)] {
            header[at..at + 2].copy_from_slice(&write(number));
        }
        let start = if big {
            352_f32.to_be_bytes()
        } else {
            352_f32.to_le_bytes()
        };
        header[108..112].copy_from_slice(&start);
        Ok(Self {
            bytes: source,
            header,
            volume_bytes,
            volumes,
            next: 0,
            tr_ms,
        })
    }

    /// Volumes that the header states.
    #[must_use]
    pub fn volumes(&self) -> usize {
        self.volumes
    }

    /// Repetition time as the header has it, milliseconds; 0 where it has none.
    #[must_use]
    pub fn tr_ms(&self) -> f64 {
        self.tr_ms
    }

    /// Reads the next volume; `None` after the last.
    ///
    /// # Errors
    /// [`NiftiError`] where it is not all there; those after it are not there either.
    pub fn read(&mut self) -> Option<Result<Volume, NiftiError>> {
        if self.next == self.volumes {
            return None;
        }
        self.next += 1;
        let mut bytes = self.header.clone();
        let read = read_up_to(&mut self.bytes, &mut bytes, self.volume_bytes);
        Some(read.and_then(|()| self.volume(&bytes)))
    }

    fn volume(&self, bytes: &[u8]) -> Result<Volume, NiftiError> {
        let image = nifti::read(bytes)?;
        let slices_first = image.values.view().reversed_axes();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "volumes are kept in single precision"
        )]
        let voxels = slices_first.as_standard_layout().mapv(|value| value as f32);
        let mut affine_lps = image.affine_ras;
        for row in &mut affine_lps[..2] {
            *row = row.map(|number| -number);
        }
        Ok(Volume {
            voxels,
            affine_lps,
            header: VolumeHeader {
                series_uid: SeriesUid::new(""),
                patient: PatientTag::default(),
                acquisition: u32::try_from(self.next).unwrap_or(u32::MAX),
                instance: None,
                tr_ms: self.tr_ms,
                slice_times_ms: None,
                time_ms: None,
            },
        })
    }
}

/// Reads so many bytes more, or as many as there are.
fn read_up_to(source: &mut dyn Read, into: &mut Vec<u8>, len: usize) -> Result<(), NiftiError> {
    let len = u64::try_from(len).unwrap_or(u64::MAX);
    source
        .take(len)
        .read_to_end(into)
        .map_err(NiftiError::Gzip)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    /// A run of 2 x 3 x 4 voxels and three volumes, in either byte order.
    fn run(big: bool) -> Vec<u8> {
        let mut bytes = vec![0; 360];
        let mut put = |at: usize, little: &[u8]| {
            let mut number = little.to_vec();
            if big {
                number.reverse();
            }
            bytes[at..at + number.len()].copy_from_slice(&number);
        };
        put(0, &348_i32.to_le_bytes());
        for (at, number) in [
            (40, 4_i16),
            (42, 2),
            (44, 3),
            (46, 4),
            (48, 3),
            (70, 4),
            (254, 1),
        ] {
            put(at, &number.to_le_bytes());
        }
        let scale = [(92, 1.5_f32), (108, 360.0), (112, 2.0), (116, 1.0)];
        for (at, number) in scale {
            put(at, &number.to_le_bytes());
        }
        for (at, number) in [(280, -3.0_f32), (300, 3.0), (320, 4.0), (292, 7.0)] {
            put(at, &number.to_le_bytes());
        }
        bytes[123] = 2 + 8;
        bytes[344..348].copy_from_slice(b"n+1\0");
        for number in 0..72_i16 {
            let pair = if big {
                number.to_be_bytes()
            } else {
                number.to_le_bytes()
            };
            bytes.extend(pair);
        }
        bytes
    }

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }

    #[test]
    fn run_is_read_volume_by_volume() {
        for bytes in [run(false), run(true), packed(&run(false))] {
            let mut bold = Bold::open(&bytes).unwrap();
            assert_eq!((bold.volumes(), bold.tr_ms()), (3, 1500.0));
            for number in 0..3_u8 {
                let volume = bold.read().unwrap().unwrap();
                assert_eq!(volume.voxels.dim(), (4, 3, 2));
                // Column fastest, then row, then slice; slope 2, intercept 1.
                let value = f32::from(number) * 48.0 + 2.0 * (1.0 + 2.0 * 2.0 + 6.0 * 3.0) + 1.0;
                assert_eq!(volume.voxels[[3, 2, 1]], value);
                assert_eq!(volume.position_lps([1.0, 0.0, 0.0]), [-4.0, 0.0, 0.0]);
                assert_eq!(volume.header.acquisition, u32::from(number) + 1);
            }
            assert!(bold.read().is_none());
        }
    }

    #[test]
    fn cut_run_gives_the_volumes_that_are_whole() {
        let bytes = run(false);
        let mut bold = Bold::open(&bytes[..bytes.len() - 50]).unwrap();
        assert!(bold.read().unwrap().is_ok());
        let cut = bold.read().unwrap();
        assert!(matches!(
            cut,
            Err(NiftiError::Truncated {
                expected: 48,
                found: 46
            })
        ));
        assert!(matches!(
            bold.read(),
            Some(Err(NiftiError::Truncated { .. }))
        ));
        assert!(bold.read().is_none());
    }

    #[test]
    fn any_cut_or_changed_header_gets_an_answer() {
        let bytes = run(false);
        for end in 0..352 {
            assert!(Bold::open(&bytes[..end]).is_err(), "cut at {end}");
        }
        for at in 0..352 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let Ok(mut bold) = Bold::open(&changed) else {
                    continue;
                };
                for _ in 0..4 {
                    if let Some(Ok(volume)) = bold.read() {
                        assert!(volume.voxels.len() <= bytes.len());
                    }
                }
            }
        }
    }
}
