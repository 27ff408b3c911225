//! Typed views of a data set's elements: numbers and words, never more than is asked for.

use super::DicomError;
use super::scan::{DataSet, Node};
use crate::volume::{PatientTag, SeriesUid};

/// How a value is stored where the file itself does not say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vr {
    /// Characters, numbers among them.
    Text,
    /// 16 bits.
    Us,
    /// 16 bits with sign.
    Ss,
    /// 32 bits.
    Ul,
    /// 32 bits with sign.
    Sl,
    /// Single precision.
    Fl,
    /// Double precision.
    Fd,
    /// Bytes, or items.
    Other,
}

/// An element by number, type and name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tag {
    id: (u16, u16),
    vr: Vr,
    /// As messages call it.
    pub(super) name: &'static str,
}

const fn tag(group: u16, element: u16, vr: Vr, name: &'static str) -> Tag {
    Tag {
        id: (group, element),
        vr,
        name,
    }
}

/// A vendor's own element: its place depends on where the vendor's block begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrivateTag {
    group: u16,
    /// The block's owner, as it names itself.
    owner: &'static str,
    /// Where the block usually is.
    usual: u16,
    element: u16,
    vr: Vr,
}

const fn private(
    (group, element): (u16, u16),
    vr: Vr,
    owner: &'static str,
    usual: u16,
) -> PrivateTag {
    PrivateTag {
        group,
        owner,
        usual,
        element,
        vr,
    }
}

/// The elements that are read.
pub(super) mod tags {
    use super::{PrivateTag, Tag, Vr, private, tag};

    pub(crate) const IMAGE_TYPE: Tag = tag(0x0008, 0x0008, Vr::Text, "(0008,0008) ImageType");
    pub(crate) const SOP_CLASS: Tag = tag(0x0008, 0x0016, Vr::Text, "(0008,0016) SOPClassUID");
    pub(crate) const ACQUISITION_DATE_TIME: Tag =
        tag(0x0008, 0x002a, Vr::Text, "(0008,002a) AcquisitionDateTime");
    pub(crate) const ACQUISITION_TIME: Tag =
        tag(0x0008, 0x0032, Vr::Text, "(0008,0032) AcquisitionTime");
    pub(crate) const MANUFACTURER: Tag = tag(0x0008, 0x0070, Vr::Text, "(0008,0070) Manufacturer");
    pub(crate) const FRAME_TYPE: Tag = tag(0x0008, 0x9007, Vr::Text, "(0008,9007) FrameType");
    pub(crate) const COMPLEX_COMPONENT: Tag = tag(
        0x0008,
        0x9208,
        Vr::Text,
        "(0008,9208) ComplexImageComponent",
    );
    pub(crate) const ACQUISITION_CONTRAST: Tag =
        tag(0x0008, 0x9209, Vr::Text, "(0008,9209) AcquisitionContrast");
    pub(crate) const PATIENT_NAME: Tag = tag(0x0010, 0x0010, Vr::Text, "(0010,0010)");
    pub(crate) const PATIENT_ID: Tag = tag(0x0010, 0x0020, Vr::Text, "(0010,0020)");
    pub(crate) const PATIENT_BIRTH_DATE: Tag = tag(0x0010, 0x0030, Vr::Text, "(0010,0030)");
    pub(crate) const SLICE_THICKNESS: Tag =
        tag(0x0018, 0x0050, Vr::Text, "(0018,0050) SliceThickness");
    pub(crate) const REPETITION_TIME: Tag =
        tag(0x0018, 0x0080, Vr::Text, "(0018,0080) RepetitionTime");
    pub(crate) const ECHO_NUMBER: Tag = tag(0x0018, 0x0086, Vr::Text, "(0018,0086) EchoNumbers");
    pub(crate) const SLICE_SPACING: Tag =
        tag(0x0018, 0x0088, Vr::Text, "(0018,0088) SpacingBetweenSlices");
    pub(crate) const TRIGGER_TIME: Tag = tag(0x0018, 0x1060, Vr::Text, "(0018,1060) TriggerTime");
    pub(crate) const FRAME_TIME: Tag = tag(
        0x0018,
        0x9074,
        Vr::Text,
        "(0018,9074) FrameAcquisitionDateTime",
    );
    pub(crate) const ECHO_TIME: Tag = tag(0x0018, 0x9082, Vr::Fd, "(0018,9082) EffectiveEchoTime");
    pub(crate) const B_VALUE: Tag = tag(0x0018, 0x9087, Vr::Fd, "(0018,9087) DiffusionBValue");
    pub(crate) const TIMING: Tag = tag(
        0x0018,
        0x9112,
        Vr::Other,
        "(0018,9112) MRTimingAndRelatedParametersSequence",
    );
    pub(crate) const ECHO: Tag = tag(0x0018, 0x9114, Vr::Other, "(0018,9114) MREchoSequence");
    pub(crate) const DIFFUSION: Tag =
        tag(0x0018, 0x9117, Vr::Other, "(0018,9117) MRDiffusionSequence");
    pub(crate) const FRAME_TYPES: Tag = tag(
        0x0018,
        0x9226,
        Vr::Other,
        "(0018,9226) MRImageFrameTypeSequence",
    );
    pub(crate) const SERIES_UID: Tag =
        tag(0x0020, 0x000e, Vr::Text, "(0020,000e) SeriesInstanceUID");
    pub(crate) const ACQUISITION_NUMBER: Tag =
        tag(0x0020, 0x0012, Vr::Text, "(0020,0012) AcquisitionNumber");
    pub(crate) const INSTANCE_NUMBER: Tag =
        tag(0x0020, 0x0013, Vr::Text, "(0020,0013) InstanceNumber");
    pub(crate) const POSITION: Tag =
        tag(0x0020, 0x0032, Vr::Text, "(0020,0032) ImagePositionPatient");
    pub(crate) const ORIENTATION: Tag = tag(
        0x0020,
        0x0037,
        Vr::Text,
        "(0020,0037) ImageOrientationPatient",
    );
    pub(crate) const TEMPORAL_POSITION: Tag = tag(
        0x0020,
        0x0100,
        Vr::Text,
        "(0020,0100) TemporalPositionIdentifier",
    );
    pub(crate) const IN_STACK_POSITION: Tag =
        tag(0x0020, 0x9057, Vr::Ul, "(0020,9057) InStackPositionNumber");
    pub(crate) const FRAME_CONTENT: Tag = tag(
        0x0020,
        0x9111,
        Vr::Other,
        "(0020,9111) FrameContentSequence",
    );
    pub(crate) const PLANE_POSITION: Tag = tag(
        0x0020,
        0x9113,
        Vr::Other,
        "(0020,9113) PlanePositionSequence",
    );
    pub(crate) const PLANE_ORIENTATION: Tag = tag(
        0x0020,
        0x9116,
        Vr::Other,
        "(0020,9116) PlaneOrientationSequence",
    );
    pub(crate) const TEMPORAL_INDEX: Tag =
        tag(0x0020, 0x9128, Vr::Ul, "(0020,9128) TemporalPositionIndex");
    pub(crate) const FRAME_ACQUISITION: Tag =
        tag(0x0020, 0x9156, Vr::Us, "(0020,9156) FrameAcquisitionNumber");
    pub(crate) const SAMPLES: Tag = tag(0x0028, 0x0002, Vr::Us, "(0028,0002) SamplesPerPixel");
    pub(crate) const FRAMES: Tag = tag(0x0028, 0x0008, Vr::Text, "(0028,0008) NumberOfFrames");
    pub(crate) const ROWS: Tag = tag(0x0028, 0x0010, Vr::Us, "(0028,0010) Rows");
    pub(crate) const COLUMNS: Tag = tag(0x0028, 0x0011, Vr::Us, "(0028,0011) Columns");
    pub(crate) const PIXEL_SPACING: Tag = tag(0x0028, 0x0030, Vr::Text, "(0028,0030) PixelSpacing");
    pub(crate) const BITS_ALLOCATED: Tag = tag(0x0028, 0x0100, Vr::Us, "(0028,0100) BitsAllocated");
    pub(crate) const BITS_STORED: Tag = tag(0x0028, 0x0101, Vr::Us, "(0028,0101) BitsStored");
    pub(crate) const HIGH_BIT: Tag = tag(0x0028, 0x0102, Vr::Us, "(0028,0102) HighBit");
    pub(crate) const SIGN: Tag = tag(0x0028, 0x0103, Vr::Us, "(0028,0103) PixelRepresentation");
    pub(crate) const RESCALE_INTERCEPT: Tag =
        tag(0x0028, 0x1052, Vr::Text, "(0028,1052) RescaleIntercept");
    pub(crate) const RESCALE_SLOPE: Tag = tag(0x0028, 0x1053, Vr::Text, "(0028,1053) RescaleSlope");
    pub(crate) const PIXEL_MEASURES: Tag = tag(
        0x0028,
        0x9110,
        Vr::Other,
        "(0028,9110) PixelMeasuresSequence",
    );
    pub(crate) const RESCALE: Tag = tag(
        0x0028,
        0x9145,
        Vr::Other,
        "(0028,9145) PixelValueTransformationSequence",
    );
    pub(crate) const SHARED_GROUPS: Tag = tag(
        0x5200,
        0x9229,
        Vr::Other,
        "(5200,9229) SharedFunctionalGroupsSequence",
    );
    pub(crate) const FRAME_GROUPS: Tag = tag(
        0x5200,
        0x9230,
        Vr::Other,
        "(5200,9230) PerFrameFunctionalGroupsSequence",
    );
    pub(crate) const PIXEL_DATA: Tag = tag(0x7fe0, 0x0010, Vr::Other, "(7fe0,0010) PixelData");

    /// Siemens: slices in a mosaic.
    pub(crate) const IMAGES_IN_MOSAIC: PrivateTag =
        private((0x0019, 0x0a), Vr::Us, "SIEMENS MR HEADER", 0x10);
    /// Siemens: each slice's time, milliseconds.
    pub(crate) const MOSAIC_TIMES: PrivateTag =
        private((0x0019, 0x29), Vr::Fd, "SIEMENS MR HEADER", 0x10);
    /// Siemens: the image header, see `csa`.
    pub(crate) const CSA_IMAGE: PrivateTag =
        private((0x0029, 0x10), Vr::Other, "SIEMENS CSA HEADER", 0x10);
    /// Siemens: the series header, which holds the protocol as text.
    pub(crate) const CSA_SERIES: PrivateTag =
        private((0x0029, 0x20), Vr::Other, "SIEMENS CSA HEADER", 0x10);
    /// Siemens XA: private elements of a frame.
    pub(crate) const FRAME_PRIVATE: PrivateTag =
        private((0x0021, 0xfe), Vr::Other, "SIEMENS MR SDI 02", 0x11);
    /// Siemens XA: a frame's time after the start of the run, seconds.
    pub(crate) const TIME_AFTER_START: PrivateTag =
        private((0x0021, 0x04), Vr::Text, "SIEMENS MR SDI 02", 0x11);
    /// GE: slices of a volume.
    pub(crate) const LOCATIONS: PrivateTag = private((0x0021, 0x4f), Vr::Ss, "GEMS_RELA_01", 0x10);
    /// GE: the protocol, packed.
    pub(crate) const GE_PROTOCOL: PrivateTag =
        private((0x0025, 0x1b), Vr::Other, "GEMS_SERS_01", 0x10);
    /// Philips: slices of a volume.
    pub(crate) const PHILIPS_SLICES: PrivateTag =
        private((0x2001, 0x18), Vr::Sl, "Philips Imaging DD 001", 0x10);
    /// Philips: stored values per unit of signal.
    pub(crate) const SCALE_SLOPE: PrivateTag =
        private((0x2005, 0x0e), Vr::Fl, "Philips MR Imaging DD 001", 0x10);
}

/// The elements of one item, or of the whole data set.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item<'d> {
    set: &'d DataSet<'d>,
    from: usize,
    to: usize,
}

impl<'d> Item<'d> {
    /// - `from`, `to`: its nodes.
    pub(super) fn new(set: &'d DataSet<'_>, from: usize, to: usize) -> Item<'d> {
        Item { set, from, to }
    }

    fn place(&self, id: (u16, u16)) -> Option<usize> {
        let mut at = self.from;
        while at < self.to {
            if self.set.node(at)?.tag == id {
                return Some(at);
            }
            at = self.set.after(at);
        }
        None
    }

    fn node(&self, id: (u16, u16)) -> Option<&'d Node> {
        let node = self.set.node(self.place(id)?)?;
        (!node.sequence).then_some(node)
    }

    /// Where a vendor's element is in this file.
    fn id_of(&self, tag: PrivateTag) -> (u16, u16) {
        let owner = |block: u16| {
            let node = self.node((tag.group, block));
            node.is_some_and(|node| trimmed(self.set.value(node)) == tag.owner.as_bytes())
        };
        let mut at = self.from;
        let mut block = tag.usual;
        while let Some(node) = self.set.node(at).filter(|_| at < self.to) {
            let (group, element) = node.tag;
            if group == tag.group && (0x10..=0xff).contains(&element) && owner(element) {
                block = element;
                break;
            }
            at = self.set.after(at);
        }
        (tag.group, block << 8 | tag.element)
    }

    /// The items of a sequence; none where it is absent.
    pub(super) fn items(&self, tag: Tag) -> impl Iterator<Item = Item<'d>> + use<'d> {
        self.items_of(tag.id)
    }

    /// The items of a vendor's sequence; none where it is absent.
    pub(super) fn private_items(
        &self,
        tag: PrivateTag,
    ) -> impl Iterator<Item = Item<'d>> + use<'d> {
        self.items_of(self.id_of(tag))
    }

    fn items_of(&self, id: (u16, u16)) -> impl Iterator<Item = Item<'d>> + use<'d> {
        let set = self.set;
        let sequence = self
            .place(id)
            .filter(|at| set.node(*at).is_some_and(|node| node.sequence));
        let (mut at, end) = match sequence {
            Some(at) => (at + 1, set.after(at)),
            None => (0, 0),
        };
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let item = Item::new(set, at + 1, set.after(at).min(end));
            at = set.after(at);
            Some(item)
        })
    }

    /// Whether the element is there and not empty.
    pub(super) fn has(&self, tag: Tag) -> bool {
        self.bytes(tag).is_some_and(|bytes| !bytes.is_empty())
    }

    /// An element's bytes as they stand in the file.
    pub(super) fn bytes(&self, tag: Tag) -> Option<&'d [u8]> {
        Some(self.set.value(self.node(tag.id)?))
    }

    /// A vendor's element's bytes.
    pub(super) fn private_bytes(&self, tag: PrivateTag) -> Option<&'d [u8]> {
        Some(self.set.value(self.node(self.id_of(tag))?))
    }

    /// Plain text without padding.
    pub(super) fn text(&self, tag: Tag) -> Option<&'d str> {
        std::str::from_utf8(trimmed(self.bytes(tag)?)).ok()
    }

    /// The words of a text of several values.
    pub(super) fn words(&self, tag: Tag) -> impl Iterator<Item = &'d str> + use<'d> {
        let text = self.text(tag).unwrap_or_default();
        text.split('\\').map(str::trim)
    }

    /// Exactly `N` finite numbers.
    ///
    /// # Errors
    /// [`DicomError::Missing`] where they are not there or cannot be read.
    pub(super) fn numbers<const N: usize>(&self, tag: Tag) -> Result<[f64; N], DicomError> {
        let node = self.node(tag.id);
        node.and_then(|node| numbers(self.set.value(node), node.vr, tag.vr))
            .ok_or(DicomError::Missing { element: tag.name })
    }

    /// One finite number.
    ///
    /// # Errors
    /// As [`Item::numbers`].
    pub(super) fn number(&self, tag: Tag) -> Result<f64, DicomError> {
        self.numbers::<1>(tag).map(|[number]| number)
    }

    /// A vendor's number.
    pub(super) fn private_number(&self, tag: PrivateTag) -> Option<f64> {
        let node = self.node(self.id_of(tag))?;
        let [number] = numbers(self.set.value(node), node.vr, tag.vr)?;
        Some(number)
    }

    /// A whole number that is not negative.
    pub(super) fn whole(&self, tag: Tag) -> Option<u32> {
        whole(self.number(tag).ok()?)
    }

    /// A vendor's whole number that is not negative.
    pub(super) fn private_whole(&self, tag: PrivateTag) -> Option<u32> {
        whole(self.private_number(tag)?)
    }

    /// The series.
    ///
    /// # Errors
    /// [`DicomError::Missing`] where it has no UID.
    pub(super) fn series(&self) -> Result<SeriesUid, DicomError> {
        self.text(tags::SERIES_UID)
            .filter(|uid| !uid.is_empty() && uid.len() <= 64)
            .map(SeriesUid::new)
            .ok_or(DicomError::Missing {
                element: tags::SERIES_UID.name,
            })
    }

    /// Whose it is.
    pub(super) fn patient(&self) -> PatientTag {
        let parts = [
            tags::PATIENT_ID,
            tags::PATIENT_NAME,
            tags::PATIENT_BIRTH_DATE,
        ];
        // Names come in any character set; only sameness matters.
        PatientTag::of(&parts.map(|tag| {
            let bytes = self.bytes(tag)?;
            Some(String::from_utf8_lossy(trimmed(bytes)).into_owned())
        }))
    }

    /// The time of acquisition, milliseconds since midnight.
    pub(super) fn acquired_ms(&self) -> Option<f64> {
        let time = self.text(tags::ACQUISITION_TIME).and_then(time_ms);
        time.or_else(|| {
            self.text(tags::ACQUISITION_DATE_TIME)
                .and_then(date_time_ms)
        })
    }
}

/// Without the padding at both ends.
fn trimmed(bytes: &[u8]) -> &[u8] {
    let padding = |byte: &u8| matches!(byte, 0 | b' ');
    let start = bytes.iter().position(|byte| !padding(byte));
    let end = bytes.iter().rposition(|byte| !padding(byte));
    match (start, end) {
        (Some(start), Some(end)) => &bytes[start..=end],
        _ => &[],
    }
}

/// - `stated`: the type that the file states.
/// - `usual`: the type that the standard gives the element.
fn numbers<const N: usize>(bytes: &[u8], stated: Option<[u8; 2]>, usual: Vr) -> Option<[f64; N]> {
    let kind = match stated.as_ref() {
        Some(b"US") => Vr::Us,
        Some(b"SS") => Vr::Ss,
        Some(b"UL") => Vr::Ul,
        Some(b"SL") => Vr::Sl,
        Some(b"FL") => Vr::Fl,
        Some(b"FD") => Vr::Fd,
        Some(b"DS" | b"IS") => Vr::Text,
        _ => usual,
    };
    let mut out = [0.0_f64; N];
    let width = match kind {
        Vr::Text => {
            let text = std::str::from_utf8(trimmed(bytes)).ok()?;
            let mut words = text.split('\\');
            for value in &mut out {
                *value = words.next()?.trim().parse().ok()?;
            }
            let all = words.next().is_none() && out.iter().all(|value| value.is_finite());
            return all.then_some(out);
        }
        Vr::Us | Vr::Ss => 2,
        Vr::Ul | Vr::Sl | Vr::Fl => 4,
        Vr::Fd => 8,
        Vr::Other => return None,
    };
    if bytes.len() != width * N {
        return None;
    }
    for (value, stored) in out.iter_mut().zip(bytes.chunks_exact(width)) {
        *value = number(stored, kind)?;
    }
    out.iter().all(|value| value.is_finite()).then_some(out)
}

fn number(stored: &[u8], kind: Vr) -> Option<f64> {
    Some(match kind {
        Vr::Us => f64::from(u16::from_le_bytes(*stored.first_chunk()?)),
        Vr::Ss => f64::from(i16::from_le_bytes(*stored.first_chunk()?)),
        Vr::Ul => f64::from(u32::from_le_bytes(*stored.first_chunk()?)),
        Vr::Sl => f64::from(i32::from_le_bytes(*stored.first_chunk()?)),
        Vr::Fl => f64::from(f32::from_le_bytes(*stored.first_chunk()?)),
        Vr::Fd => f64::from_le_bytes(*stored.first_chunk()?),
        Vr::Text | Vr::Other => return None,
    })
}

/// Doubles as they are stored, finite or none at all.
pub(super) fn doubles(bytes: &[u8]) -> Option<Vec<f64>> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(8) {
        return None;
    }
    let values: Option<Vec<f64>> = bytes
        .chunks_exact(8)
        .map(|stored| number(stored, Vr::Fd))
        .collect();
    values.filter(|values| values.iter().all(|value| value.is_finite()))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range and the fraction are checked first"
)]
fn whole(value: f64) -> Option<u32> {
    let fits = (0.0..=f64::from(u32::MAX)).contains(&value) && value.fract() == 0.0;
    fits.then_some(value as u32)
}

/// Milliseconds since midnight of `HHMMSS.FFFFFF`, of which minutes and seconds may lack.
pub(super) fn time_ms(text: &str) -> Option<f64> {
    let (clock, fraction) = text.trim().split_once('.').unwrap_or((text.trim(), ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !matches!(clock.len(), 2 | 4 | 6)
        || fraction.len() > 6
        || !digits(clock)
        || !digits(fraction)
    {
        return None;
    }
    let part = |at: usize, limit: u32| -> Option<f64> {
        let Some(text) = clock.get(at..at + 2) else {
            return Some(0.0);
        };
        let value: u32 = text.parse().ok()?;
        (value < limit).then(|| f64::from(value))
    };
    // A leap second is 60.
    let seconds = part(0, 24)? * 3600.0 + part(2, 60)? * 60.0 + part(4, 61)?;
    let micros: u32 = if fraction.is_empty() {
        0
    } else {
        format!("{fraction:0<6}").parse().ok()?
    };
    Some(seconds * 1000.0 + f64::from(micros) / 1000.0)
}

/// Milliseconds since midnight of `YYYYMMDDHHMMSS.FFFFFF&ZZXX`.
pub(super) fn date_time_ms(text: &str) -> Option<f64> {
    let text = text.trim();
    let end = text.find(['+', '-']).unwrap_or(text.len());
    time_ms(text.get(8..end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_to_the_microsecond_and_nonsense_is_none() {
        assert_eq!(time_ms("120906.225000 "), Some(43_746_225.0));
        assert_eq!(time_ms("0906"), Some(32_760_000.0));
        assert_eq!(time_ms("235959.9"), Some(86_399_900.0));
        assert_eq!(date_time_ms("20220711120906.760000"), Some(43_746_760.0));
        assert_eq!(date_time_ms("20220711120906.76-0500"), Some(43_746_760.0));
        for text in ["", "1", "24", "126000", "12:09", "120906.1234567", "-10906"] {
            assert_eq!(time_ms(text), None, "{text}");
        }
        assert_eq!(date_time_ms("2022"), None);
    }

    #[test]
    fn numbers_follow_the_type_that_the_file_states() {
        let us = 300_u16.to_le_bytes();
        assert_eq!(numbers(&us, Some(*b"US"), Vr::Text), Some([300.0]));
        assert_eq!(numbers(&us, None, Vr::Us), Some([300.0]));
        assert_eq!(
            numbers(b"1\\-2.5 ", Some(*b"DS"), Vr::Us),
            Some([1.0, -2.5])
        );
        assert_eq!(numbers::<1>(b"1\\2", Some(*b"DS"), Vr::Us), None);
        assert_eq!(numbers::<1>(b"inf", Some(*b"DS"), Vr::Us), None);
        assert_eq!(numbers::<2>(&us, None, Vr::Us), None);
        assert_eq!(whole(-1.0), None);
        assert_eq!(whole(1.5), None);
        assert_eq!(whole(7.0), Some(7));
    }
}
