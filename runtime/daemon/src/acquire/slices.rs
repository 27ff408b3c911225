//! Volumes that arrive slice by slice: one assembler for each series.

use std::collections::VecDeque;

use rtfmri::assembly::{Added, Assembler, Limits};
use sha2::{Digest, Sha256};
use wire::{SliceMessage, VolumeMessage};

use super::watch::Found;
use crate::logging::chain;
use crate::pipeline;

/// Series whose slices are held at a time; a run and the series around it are fewer.
const MAX_SERIES: usize = 4;
/// Faults of one series that are told one by one; the rest would say the same.
const MAX_FAULTS: usize = 8;

/// The series that come as slices, the latest last.
#[derive(Default)]
pub(crate) struct Slices {
    series: VecDeque<Series>,
}

struct Series {
    series: [u8; 16],
    patient: u64,
    assembler: Assembler,
    faults: usize,
}

/// What became of a slice.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Its volume waits for others.
    Waiting,
    /// It completes its volume.
    Complete(Box<VolumeMessage>),
    /// It is of no use: it was there already, or its series has been told to be unusable.
    Useless,
}

impl Slices {
    /// Takes a slice.
    ///
    /// # Errors
    /// A sentence for the operator, where the slice cannot be part of its volume; a series that goes on
    /// so is silent after a few.
    pub(crate) fn add(&mut self, message: SliceMessage) -> Result<Taken, String> {
        let (key, patient, number) = (message.series, message.patient, message.number);
        let slice = pipeline::slice_of(message).ok_or_else(|| {
            format!("A slice of volume {number}: its pixels do not fill its shape")
        })?;
        let series = self.series_of(key, patient);
        match series.assembler.add(slice) {
            Ok(Added::Complete(volume)) => Ok(Taken::Complete(Box::new(VolumeMessage {
                series: key,
                patient: series.patient,
                ..pipeline::volume_message(*volume)
            }))),
            Ok(Added::Waiting { .. }) => Ok(Taken::Waiting),
            Ok(Added::Duplicate) => Ok(Taken::Useless),
            Err(error) => {
                series.faults += 1;
                if series.faults > MAX_FAULTS {
                    tracing::debug!(error = %chain(&error), "slice dropped");
                    return Ok(Taken::Useless);
                }
                Err(format!(
                    "A slice of volume {number} is not used: {}",
                    chain(&error)
                ))
            }
        }
    }

    fn series_of(&mut self, key: [u8; 16], patient: u64) -> &mut Series {
        let known = self.series.iter().position(|series| series.series == key);
        if let Some(known) = known.and_then(|known| self.series.remove(known)) {
            self.series.push_back(known);
        } else {
            if self.series.len() >= MAX_SERIES {
                self.series.pop_front();
            }
            self.series.push_back(Series {
                series: key,
                patient,
                assembler: Assembler::new(Limits::default()),
                faults: 0,
            });
        }
        let last = self.series.len() - 1;
        &mut self.series[last]
    }

    /// What never became a volume, as sentences for the operator.
    pub(crate) fn incomplete(&self) -> Vec<String> {
        let waiting = self
            .series
            .iter()
            .flat_map(|series| series.assembler.incomplete());
        waiting
            .map(|volume| {
                let expected = match volume.expected {
                    Some(expected) => format!(" of {expected}"),
                    None => String::new(),
                };
                let missing = match volume.missing.as_deref() {
                    Some(places @ [_, ..]) => {
                        let places: Vec<String> = places
                            .iter()
                            .take(16)
                            .map(|place| (place + 1).to_string())
                            .collect();
                        format!("; slices {} are missing", places.join(", "))
                    }
                    _ => String::new(),
                };
                format!(
                    "Volume {} is incomplete: {} slices{expected} came{missing}",
                    volume.number, volume.present
                )
            })
            .collect()
    }
}

/// The last slice's file as the volume's: with an identity that no file has, so that a restart reads
/// all slices of it again and not all but one.
pub(crate) fn of_volume(file: &Found, volume: &VolumeMessage) -> Found {
    let mut hash = Sha256::new();
    hash.update(b"volume of slices");
    hash.update(volume.series);
    hash.update(volume.number.to_le_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finalize()[..16]);
    Found { id, ..file.clone() }
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;
    use rtfmri::slices::{SliceVendor, encode};
    use rtfmri::{PatientTag, Volume, VolumeHeader, mosaic};
    use wire::ParseReply;

    use super::*;

    fn slices(series: u128, number: u32) -> (Volume, Vec<SliceMessage>) {
        let volume = Volume {
            voxels: Array3::from_shape_fn((4, 3, 2), |(k, j, i)| {
                f32::from(u8::try_from(k * 6 + j * 2 + i).unwrap())
            }),
            affine_lps: [
                [3.0, 0.0, 0.0, -7.0],
                [0.0, 2.0, 0.0, -5.0],
                [0.0, 0.0, 4.0, 1.0],
                [0.0, 0.0, 0.0, 1.0],
            ],
            header: VolumeHeader {
                series_uid: mosaic::series_uid(series),
                patient: PatientTag::default(),
                acquisition: number,
                instance: None,
                tr_ms: 900.0,
                slice_times_ms: None,
                time_ms: Some(5000.0),
            },
        };
        let files = encode(&volume, SliceVendor::Philips).unwrap();
        let read = files.iter().map(|bytes| match pipeline::read_file(bytes) {
            Ok(ParseReply::Slice(slice)) => slice,
            other => panic!("a slice was written: {other:?}"),
        });
        (volume, read.collect())
    }

    #[test]
    fn slices_of_two_series_become_their_volumes() {
        let mut held = Slices::default();
        let (first, first_slices) = slices(1, 1);
        let (_, second_slices) = slices(2, 1);
        let mut complete = Vec::new();
        for (a, b) in first_slices.into_iter().zip(second_slices) {
            for slice in [a, b] {
                match held.add(slice).unwrap() {
                    Taken::Complete(volume) => complete.push(volume),
                    Taken::Waiting => {}
                    Taken::Useless => panic!("every slice is of use"),
                }
            }
        }
        assert_eq!(complete.len(), 2);
        assert_ne!(complete[0].series, complete[1].series);
        let expected = pipeline::volume_message(first);
        assert_eq!(complete[0].series, expected.series);
        assert_eq!(complete[0].patient, expected.patient);
        assert_eq!(complete[0].voxels, expected.voxels);
        assert_eq!(complete[0].time_ms, Some(5000.0));
        assert!(held.incomplete().is_empty());
    }

    #[test]
    fn a_missing_slice_is_named_by_its_place() {
        let mut held = Slices::default();
        for slice in slices(1, 1).1 {
            held.add(slice).unwrap();
        }
        for slice in slices(1, 2).1.into_iter().skip(1) {
            assert!(matches!(held.add(slice), Ok(Taken::Waiting)));
        }
        assert_eq!(
            held.incomplete(),
            ["Volume 2 is incomplete: 3 slices of 4 came; slices 1 are missing"]
        );
    }

    #[test]
    fn a_series_of_misfits_falls_silent() {
        let mut held = Slices::default();
        let (_, good) = slices(1, 1);
        held.add(good[0].clone()).unwrap();
        let mut told = 0;
        for _ in 0..3 * MAX_FAULTS {
            let mut bad = good[1].clone();
            bad.pixel_mm = [9.0, 9.0];
            told += usize::from(held.add(bad).is_err());
        }
        assert_eq!(told, MAX_FAULTS);
    }
}
