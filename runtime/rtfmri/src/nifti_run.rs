//! A whole run in one NIfTI-1 file (`.nii`, `.nii.gz`), volume by volume.
//!
//! The file is unpacked once, with a size cap; each volume is then read as the 3-D image it is,
//! under the file's header with the fourth side taken off.

use std::io::Read;

use flate2::read::MultiGzDecoder;

use crate::nifti::{self, Image, NiftiError};

/// The largest run that is unpacked, bytes.
const MAX_BYTES: usize = 4 << 30;
const HEADER_BYTES: usize = 352;
/// `vox_offset` of the images that are handed on.
const START: f32 = 352.0;

/// The volumes of one run.
pub struct NiftiRun {
    plain: Vec<u8>,
    volumes: usize,
    volume_bytes: usize,
    start: usize,
    big_endian: bool,
}

impl NiftiRun {
    /// Reads a run; a 3-D image is a run of one volume.
    ///
    /// # Errors
    /// [`NiftiError`], naming the field.
    pub fn read(bytes: Vec<u8>) -> Result<Self, NiftiError> {
        let plain = if bytes.starts_with(&[0x1f, 0x8b]) {
            let mut plain = Vec::new();
            let cap = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX) + 1;
            MultiGzDecoder::new(bytes.as_slice())
                .take(cap)
                .read_to_end(&mut plain)
                .map_err(NiftiError::Gzip)?;
            plain
        } else {
            bytes
        };
        if plain.len() > MAX_BYTES {
            return Err(NiftiError::TooLarge { limit: MAX_BYTES });
        }
        if plain.len() < HEADER_BYTES || plain.get(344..348) != Some(b"n+1\0") {
            return Err(NiftiError::NotNifti);
        }
        let big_endian = match plain[..4] {
            [0x5c, 1, 0, 0] => false,
            [0, 0, 1, 0x5c] => true,
            _ => return Err(NiftiError::NotNifti),
        };
        let short = |at: usize| {
            let pair = [plain[at], plain[at + 1]];
            if big_endian {
                i16::from_be_bytes(pair)
            } else {
                i16::from_le_bytes(pair)
            }
        };
        let bad = |field, found, expected| NiftiError::Field {
            field,
            found,
            expected,
        };
        let rank = short(40);
        if !(3..=7).contains(&rank) {
            return Err(bad("dim[0]", f64::from(rank), "3 to 7"));
        }
        // Sides, then the bits of one value.
        let mut sides = [1_usize; 4];
        for (axis, side) in sides
            .iter_mut()
            .enumerate()
            .take(usize::from(rank.unsigned_abs()))
        {
            let len = short(42 + 2 * axis);
            if len < 1 {
                return Err(bad("dim", f64::from(len), "1 or more"));
            }
            *side = usize::from(len.unsigned_abs());
        }
        for axis in 4..usize::from(rank.unsigned_abs()) {
            let len = short(42 + 2 * axis);
            if len != 1 {
                return Err(bad("dim", f64::from(len), "1 from the fifth on"));
            }
        }
        let width = match short(70) {
            2 => 1,
            4 | 512 => 2,
            8 | 16 => 4,
            64 => 8,
            code => {
                let expected = "2, 4, 8, 16, 64 or 512";
                return Err(bad("datatype", f64::from(code), expected));
            }
        };
        let [columns, rows, slices, volumes] = sides;
        let volume_bytes = columns * rows * slices * width;
        let mut run = Self {
            plain,
            volumes,
            volume_bytes,
            start: HEADER_BYTES,
            big_endian,
        };
        run.start = run.find_start()?;
        let expected = volume_bytes.saturating_mul(volumes);
        let found = run.plain.len() - run.start;
        if found < expected {
            return Err(NiftiError::Truncated { expected, found });
        }
        Ok(run)
    }

    /// Where the values begin: the header's float, compared and never cast.
    fn find_start(&self) -> Result<usize, NiftiError> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.plain[108..112]);
        let offset = if self.big_endian {
            f32::from_be_bytes(bytes)
        } else {
            f32::from_le_bytes(bytes)
        };
        // Extensions are short: a million bytes is beyond any.
        (HEADER_BYTES..=1_000_000)
            .take_while(|&start| start <= self.plain.len())
            .find(|&start| start as f64 == f64::from(offset))
            .ok_or(NiftiError::Field {
                field: "vox_offset",
                found: f64::from(offset),
                expected: "a whole number from 352 to the file's length",
            })
    }

    /// Volumes of the run, at least one.
    #[must_use]
    pub fn volumes(&self) -> usize {
        self.volumes
    }

    /// Reads one volume, counted from 0.
    ///
    /// # Errors
    /// [`NiftiError`], naming the field; [`NiftiError::Truncated`] beyond the last volume.
    pub fn volume(&self, index: usize) -> Result<Image, NiftiError> {
        let from = self.start + index.saturating_mul(self.volume_bytes);
        let values = self.plain.get(from..from.saturating_add(self.volume_bytes));
        let values = values.ok_or(NiftiError::Truncated {
            expected: from.saturating_add(self.volume_bytes),
            found: self.plain.len(),
        })?;
        let mut image = Vec::with_capacity(HEADER_BYTES + values.len());
        image.extend_from_slice(&self.plain[..HEADER_BYTES]);
        let mut put = |at: usize, little: &[u8]| {
            let place = &mut image[at..at + little.len()];
            place.copy_from_slice(little);
            if self.big_endian {
                place.reverse();
            }
        };
        put(40, &3_i16.to_le_bytes());
        for axis in 3..7 {
            put(42 + 2 * axis, &1_i16.to_le_bytes());
        }
        put(108, &START.to_le_bytes());
        image.extend_from_slice(values);
        nifti::read(&image)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use ndarray::Array3;
    use proptest::prelude::*;

    use super::NiftiRun;
    use crate::nifti::NiftiError;

    /// A run of `u16` volumes, little or big endian, scaled by 0.5 with intercept 3.
    fn file(big: bool, start: u16, volumes: u16) -> Vec<u8> {
        let mut bytes = vec![0; usize::from(start)];
        let mut put = |at: usize, little: &[u8]| {
            let mut value = little.to_vec();
            if big {
                value.reverse();
            }
            bytes[at..at + value.len()].copy_from_slice(&value);
        };
        put(0, &348_i32.to_le_bytes());
        for (at, value) in [(40, 4), (42, 2), (44, 3), (46, 4), (48, volumes), (50, 1)] {
            put(at, &value.to_le_bytes());
        }
        put(70, &512_i16.to_le_bytes());
        put(108, &f32::from(start).to_le_bytes());
        put(112, &0.5_f32.to_le_bytes());
        put(116, &3_f32.to_le_bytes());
        put(254, &1_i16.to_le_bytes());
        for axis in 0..3 {
            put(280 + 20 * axis, &2_f32.to_le_bytes());
        }
        bytes[344..348].copy_from_slice(b"n+1\0");
        for value in 0..24 * volumes {
            bytes.extend(if big {
                value.to_be_bytes()
            } else {
                value.to_le_bytes()
            });
        }
        bytes
    }

    fn expected(volume: u16) -> Array3<f64> {
        Array3::from_shape_fn((2, 3, 4), |(i, j, k)| {
            let index = u16::try_from(i + 2 * (j + 3 * k)).unwrap() + 24 * volume;
            3.0 + 0.5 * f64::from(index)
        })
    }

    #[test]
    fn every_volume_of_a_run_is_read_in_either_byte_order() {
        for (big, start) in [(false, 352), (true, 352), (false, 384), (true, 400)] {
            let run = NiftiRun::read(file(big, start, 5)).unwrap();
            assert_eq!(run.volumes(), 5);
            for volume in 0..5 {
                let image = run.volume(usize::from(volume)).unwrap();
                assert_eq!(image.values, expected(volume));
                assert_eq!(image.affine_ras[1][1], 2.0);
            }
            assert!(matches!(run.volume(5), Err(NiftiError::Truncated { .. })));
        }
    }

    #[test]
    fn packed_run_is_read_and_a_cut_one_refused() {
        let plain = file(false, 352, 3);
        let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
        packer.write_all(&plain).unwrap();
        let run = NiftiRun::read(packer.finish().unwrap()).unwrap();
        assert_eq!(run.volume(2).unwrap().values, expected(2));
        for end in 0..plain.len() {
            assert!(
                NiftiRun::read(plain[..end].to_vec()).is_err(),
                "cut at {end}"
            );
        }
    }

    proptest! {
        #[test]
        fn changed_bytes_give_an_answer(
            changes in prop::collection::vec((0_usize..500, any::<u8>()), 0..12),
        ) {
            let mut plain = file(false, 352, 3);
            for (at, value) in changes {
                let len = plain.len();
                plain[at % len] = value;
            }
            if let Ok(run) = NiftiRun::read(plain) {
                for volume in 0..run.volumes() {
                    let _ = run.volume(volume);
                }
            }
        }
    }
}
