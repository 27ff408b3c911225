//! A whole run in one file: a 4-D NIfTI image (`.nii`, `.nii.gz`), one volume at a time.
//!
//! The bytes are unpacked as they are read, so that no more than one volume is held beside them.

use super::{Header, Image, NiftiError, Source, image, open, single, values, volume};
use crate::volume::Volume;

/// A run's image, read from its start.
pub struct SeriesReader<'b> {
    source: Source<'b>,
    header: Header,
    next: usize,
}

impl std::fmt::Debug for SeriesReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SeriesReader")
            .field("volumes", &self.header.volumes)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl<'b> SeriesReader<'b> {
    /// Reads the header; a 3-D image is a run of one volume.
    ///
    /// - `bytes`: the file's, packed or not.
    ///
    /// # Errors
    /// [`NiftiError`], naming the field, where they are no run of volumes.
    pub fn open(bytes: &'b [u8]) -> Result<Self, NiftiError> {
        let (header, source) = open(bytes)?;
        Ok(Self {
            source,
            header,
            next: 0,
        })
    }

    /// Volumes that the header states.
    #[must_use]
    pub fn volumes(&self) -> usize {
        self.header.volumes
    }

    /// Repetition time as the header has it, milliseconds; 0 where it has none.
    #[must_use]
    pub fn tr_ms(&self) -> f64 {
        self.header.tr_ms.unwrap_or(0.0)
    }

    /// Reads the next volume in single precision; `None` after the last. Its voxels may be no numbers.
    ///
    /// # Errors
    /// [`NiftiError`] where it is not all there; those after it are not there either.
    pub fn read(&mut self) -> Option<Result<Volume, NiftiError>> {
        let index = self.step()?;
        let read = values(&self.header, &mut self.source, 0, single);
        Some(read.and_then(|values| volume(&self.header, values, index)))
    }

    /// Reads the next volume as an image, with all its digits; `None` after the last.
    ///
    /// # Errors
    /// As [`SeriesReader::read`].
    pub fn read_image(&mut self) -> Option<Result<Image, NiftiError>> {
        self.step()?;
        let read = values(&self.header, &mut self.source, 0, |value| value);
        Some(read.and_then(|values| image(&self.header, values)))
    }

    /// The next volume's index, which is then behind; `None` after the last.
    fn step(&mut self) -> Option<usize> {
        let index = self.next;
        (index < self.header.volumes).then(|| self.next += 1)?;
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;
    use crate::nifti::NiftiError;

    /// A run of 2 x 3 x 4 voxels and three volumes, in either byte order.
    fn bytes_of(big: bool) -> Vec<u8> {
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
        for bytes in [bytes_of(false), bytes_of(true), packed(&bytes_of(false))] {
            let mut run = SeriesReader::open(&bytes).unwrap();
            assert_eq!((run.volumes(), run.tr_ms()), (3, 1500.0));
            for number in 0..3_u8 {
                let volume = run.read().unwrap().unwrap();
                assert_eq!(volume.voxels.dim(), (4, 3, 2));
                // Column fastest, then row, then slice; slope 2, intercept 1.
                let value = f32::from(number) * 48.0 + 2.0 * (1.0 + 2.0 * 2.0 + 6.0 * 3.0) + 1.0;
                assert_eq!(volume.voxels[[3, 2, 1]], value);
                assert_eq!(volume.position_lps([1.0, 0.0, 0.0]), [-4.0, 0.0, 0.0]);
                assert_eq!(volume.header.acquisition, u32::from(number) + 1);
            }
            assert!(run.read().is_none());
        }
    }

    #[test]
    fn cut_run_gives_the_volumes_that_are_whole() {
        let bytes = bytes_of(false);
        let mut run = SeriesReader::open(&bytes[..bytes.len() - 50]).unwrap();
        assert!(run.read().unwrap().is_ok());
        let cut = run.read().unwrap();
        assert!(matches!(
            cut,
            Err(NiftiError::Truncated {
                expected: 48,
                found: 46
            })
        ));
        assert!(matches!(
            run.read(),
            Some(Err(NiftiError::Truncated { .. }))
        ));
        assert!(run.read().is_none());
    }

    #[test]
    fn any_cut_or_changed_header_gets_an_answer() {
        let bytes = bytes_of(false);
        for end in 0..352 {
            assert!(SeriesReader::open(&bytes[..end]).is_err(), "cut at {end}");
        }
        for at in 0..352 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let Ok(mut run) = SeriesReader::open(&changed) else {
                    continue;
                };
                for _ in 0..4 {
                    if let Some(Ok(volume)) = run.read() {
                        assert!(volume.voxels.len() <= bytes.len());
                    }
                }
            }
        }
    }
}
