//! Header elements that our encoders know nothing of: times, the series' number, a simulated name.
//!
//! They are put into an explicit little-endian file at their places, over whatever stood there.

use chrono::{NaiveDateTime, Timelike};

/// Why a file cannot be stamped: it is none of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("encoded file has no explicit little-endian element at its byte {0}")]
pub(super) struct StampError(usize);

/// What is put into the headers of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// When the series began.
    pub(super) began: NaiveDateTime,
    /// When the volume began.
    pub(super) acquired: NaiveDateTime,
    /// When the volume was whole.
    pub(super) created: NaiveDateTime,
    /// The study's UID: all series of a simulation are one visit.
    pub(super) study: String,
    /// The series' number, from 1.
    pub(super) series: usize,
    /// What the series is called.
    pub(super) description: &'static str,
    /// Who is said to lie in the scanner.
    pub(super) patient: Option<String>,
}

/// One element.
struct Element {
    tag: (u16, u16),
    vr: [u8; 2],
    value: String,
}

impl Stamp {
    /// When the volume began, milliseconds since midnight.
    pub(super) fn time_ms(&self) -> f64 {
        let time = self.acquired.time();
        f64::from(time.num_seconds_from_midnight()) * 1e3 + f64::from(time.nanosecond()) / 1e6
    }

    /// By tag.
    fn elements(&self) -> Vec<Element> {
        let date = |time: &NaiveDateTime| time.format("%Y%m%d").to_string();
        let time = |time: &NaiveDateTime| time.format("%H%M%S%.6f").to_string();
        let element = |tag, vr: &[u8; 2], value: String| Element {
            tag,
            vr: *vr,
            value,
        };
        let moment = format!("{}{}", date(&self.acquired), time(&self.acquired));
        let mut elements = vec![
            element((0x0008, 0x0020), b"DA", date(&self.began)),
            element((0x0008, 0x0021), b"DA", date(&self.began)),
            element((0x0008, 0x0022), b"DA", date(&self.acquired)),
            element((0x0008, 0x0023), b"DA", date(&self.created)),
            element((0x0008, 0x002a), b"DT", moment),
            element((0x0008, 0x0030), b"TM", time(&self.began)),
            element((0x0008, 0x0031), b"TM", time(&self.began)),
            element((0x0008, 0x0032), b"TM", time(&self.acquired)),
            element((0x0008, 0x0033), b"TM", time(&self.created)),
            element((0x0008, 0x103e), b"LO", self.description.into()),
        ];
        if let Some(patient) = &self.patient {
            elements.push(element((0x0010, 0x0010), b"PN", patient.clone()));
            elements.push(element((0x0010, 0x0020), b"LO", patient.clone()));
        }
        elements.push(element((0x0020, 0x000d), b"UI", self.study.clone()));
        elements.push(element((0x0020, 0x0011), b"IS", self.series.to_string()));
        elements
    }

    /// The file with these elements.
    pub(super) fn put(&self, file: &[u8]) -> Result<Vec<u8>, StampError> {
        let mut out = Vec::with_capacity(file.len() + 1024);
        let mut at = data_set(file)?;
        out.extend_from_slice(&file[..at]);
        for new in self.elements() {
            // What comes before it stays, what has its place goes.
            while let Some(old) = Old::at(file, at)? {
                if old.tag > new.tag {
                    break;
                }
                if old.tag < new.tag {
                    out.extend_from_slice(&file[at..at + old.len]);
                }
                at += old.len;
            }
            new.write(&mut out);
        }
        out.extend_from_slice(&file[at..]);
        Ok(out)
    }
}

impl Element {
    fn write(&self, out: &mut Vec<u8>) {
        let mut value = self.value.clone().into_bytes();
        if value.len() % 2 == 1 {
            value.push(if &self.vr == b"UI" { 0 } else { b' ' });
        }
        out.extend_from_slice(&self.tag.0.to_le_bytes());
        out.extend_from_slice(&self.tag.1.to_le_bytes());
        out.extend_from_slice(&self.vr);
        // Dates, times, numbers and a bounded name: far below 64 KiB.
        let len = u16::try_from(value.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&value);
    }
}

/// An element of the file: its tag and its length with its header, bytes.
struct Old {
    tag: (u16, u16),
    len: usize,
}

impl Old {
    /// The element at a byte; `None` at the end.
    fn at(file: &[u8], at: usize) -> Result<Option<Old>, StampError> {
        if at == file.len() {
            return Ok(None);
        }
        let parse = || {
            let bytes = file.get(at..)?;
            let word =
                |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
            let tag = (word(0)?, word(2)?);
            let vr = bytes.get(4..6)?;
            let long = [
                b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT",
                b"UV",
            ];
            let len = if long.iter().any(|long| long.as_slice() == vr) {
                let len = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
                // A length that is not given is nothing that our encoders write up here.
                12 + usize::try_from(len).ok().filter(|_| len != u32::MAX)?
            } else {
                8 + usize::from(word(6)?)
            };
            (vr.iter().all(u8::is_ascii_uppercase) && len <= bytes.len())
                .then_some(Old { tag, len })
        };
        parse().map(Some).ok_or(StampError(at))
    }
}

/// Where the data set begins, from the length of the file's meta group.
fn data_set(file: &[u8]) -> Result<usize, StampError> {
    let len = file.get(140..144).filter(|_| &file[128..132] == b"DICM");
    let len = len.and_then(|bytes| bytes.try_into().ok());
    let len = len.and_then(|bytes| usize::try_from(u32::from_le_bytes(bytes)).ok());
    let start = len
        .map(|len| 144 + len)
        .filter(|start| *start <= file.len());
    start.ok_or(StampError(128))
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use rtfmri::{PatientTag, Volume, VolumeHeader, dicom, mosaic};

    use super::*;

    fn file() -> Vec<u8> {
        let volume = Volume {
            voxels: ndarray::Array3::from_shape_fn((4, 5, 6), |(k, j, i)| {
                f32::from(u8::try_from(k * 30 + j * 6 + i).unwrap())
            }),
            affine_lps: [
                [3.0, 0.0, 0.0, -9.0],
                [0.0, 3.0, 0.0, -7.0],
                [0.0, 0.0, 4.0, 5.0],
                [0.0, 0.0, 0.0, 1.0],
            ],
            header: VolumeHeader {
                series_uid: mosaic::series_uid(5),
                patient: PatientTag::default(),
                acquisition: 2,
                instance: Some(2),
                tr_ms: 1500.0,
                slice_times_ms: Some(vec![0.0; 4]),
                time_ms: None,
            },
        };
        mosaic::encode(&volume).unwrap()
    }

    fn stamp() -> Stamp {
        let time = |text: &str| NaiveDateTime::from_str(text).unwrap();
        Stamp {
            began: time("2026-01-02T23:59:58"),
            acquired: time("2026-01-03T00:00:01.25"),
            created: time("2026-01-03T00:00:02.75"),
            study: "2.25.17".into(),
            series: 3,
            description: "simulated run",
            patient: Some("SIMULATED^NOBODY".into()),
        }
    }

    #[test]
    fn stamped_file_is_the_same_volume_with_its_times() {
        let plain = file();
        let stamped = stamp().put(&plain).unwrap();
        let (before, after) = (
            dicom::decode_volume(&plain).unwrap(),
            dicom::decode_volume(&stamped).unwrap(),
        );
        assert_eq!(before.voxels, after.voxels);
        assert_eq!(before.affine_lps, after.affine_lps);
        assert_ne!(before.header.patient, after.header.patient);
        let holds = |word: &str| stamped.windows(word.len()).any(|w| w == word.as_bytes());
        assert!(holds("20260103000001.250000") && holds("SIMULATED^NOBODY"));
        // Elements rise, none twice, and the series' number replaced the encoder's.
        let (mut at, mut tags) = (data_set(&stamped).unwrap(), Vec::new());
        while let Some(old) = Old::at(&stamped, at).unwrap() {
            if old.tag == (0x0020, 0x0011) {
                assert_eq!(&stamped[at + 8..at + 10], b"3 ");
            }
            tags.push(old.tag);
            at += old.len;
        }
        assert!(tags.is_sorted_by(|a, b| a < b), "{tags:x?}");
        // A second stamp puts the same elements at the same places.
        assert_eq!(stamp().put(&stamped).unwrap(), stamped);
    }

    #[test]
    fn what_is_no_file_of_ours_is_refused() {
        let plain = file();
        assert!(stamp().put(&[]).is_err());
        assert!(stamp().put(&plain[..160]).is_err());
        assert!(stamp().put(&plain[..400]).is_err());
        let mut broken = plain;
        let start = data_set(&broken).unwrap();
        broken[start + 4..start + 6].fill(0);
        assert_eq!(stamp().put(&broken), Err(StampError(start)));
    }
}
