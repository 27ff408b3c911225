//! Writing DICOM files from the public standard: explicit little endian, our own 2.25 UIDs, no
//! patient, no date. For the simulated scanner and for tests.

use std::hash::{DefaultHasher, Hash, Hasher};

/// The class of a file of one picture.
pub(crate) const MR_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.4";
/// A random number as UID: this writer.
const IMPLEMENTATION_UID: &str = "2.25.192837465091827364550192837465";

/// The class of a file of frames.
pub(crate) const ENHANCED_MR_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.4.1";

/// A whole file: preamble, group 2, data set.
///
/// - `class`, `instance`: UIDs.
pub(crate) fn file(class: &str, instance: &str, mut data: Elements) -> Vec<u8> {
    let mut meta = Elements::default();
    meta.long((0x0002, 0x0001), b"OB", &[0, 1]);
    meta.text((0x0002, 0x0002), b"UI", class);
    meta.text((0x0002, 0x0003), b"UI", instance);
    meta.text((0x0002, 0x0010), b"UI", "1.2.840.10008.1.2.1");
    meta.text((0x0002, 0x0012), b"UI", IMPLEMENTATION_UID);
    let mut file = vec![0; 128];
    file.extend_from_slice(b"DICM");
    file.extend_from_slice(&[2, 0, 0, 0, b'U', b'L', 4, 0]);
    let meta_len = u32::try_from(meta.0.len()).unwrap_or(u32::MAX);
    file.extend_from_slice(&meta_len.to_le_bytes());
    file.append(&mut meta.0);
    file.append(&mut data.0);
    file
}

/// A UID that belongs to a series, the same for the same arguments.
pub(crate) fn derived_uid(series: &str, number: u32, role: &str) -> String {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, series, number, role).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    format!("2.25.{}", half(0) << 64 | half(1))
}

/// The value that 16 bits hold; `None` where it is none.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range and the fraction are checked first"
)]
pub(crate) fn stored_value(value: f32) -> Option<u16> {
    if (0.0..=65_535.0).contains(&value) && value.fract() == 0.0 {
        Some(value as u16)
    } else {
        None
    }
}

/// A decimal string: at most 16 characters, as many digits as fit.
pub(crate) fn decimal(value: f64) -> String {
    (0..=14)
        .rev()
        .map(|digits| format!("{value:.digits$}"))
        .find(|text| text.len() <= 16)
        .unwrap_or_else(|| format!("{value:.8e}"))
}

pub(crate) fn decimals(values: &[f64]) -> String {
    let texts: Vec<String> = values.iter().copied().map(decimal).collect();
    texts.join("\\")
}

/// Milliseconds since midnight as a time, `HHMMSS.FFFFFF`.
pub(crate) fn time(time_ms: f64) -> String {
    let day_us = 86_400_000_000.0;
    let micros = (time_ms * 1000.0).round().rem_euclid(day_us);
    let seconds = (micros / 1e6).floor();
    let (hours, minutes) = ((seconds / 3600.0).floor(), (seconds / 60.0).floor() % 60.0);
    let rest = micros - seconds * 1e6;
    format!(
        "{hours:02.0}{minutes:02.0}{:02.0}.{rest:06.0}",
        seconds % 60.0
    )
}

/// Explicit little-endian elements, in the order they are written.
#[derive(Default)]
pub(crate) struct Elements(Vec<u8>);

impl Elements {
    fn tag(&mut self, tag: (u16, u16), vr: &[u8; 2]) {
        self.0.extend_from_slice(&tag.0.to_le_bytes());
        self.0.extend_from_slice(&tag.1.to_le_bytes());
        self.0.extend_from_slice(vr);
    }

    fn short(&mut self, tag: (u16, u16), vr: &[u8; 2], value: &[u8]) {
        self.tag(tag, vr);
        let len = u16::try_from(value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_le_bytes());
        self.0.extend_from_slice(value);
    }

    pub(crate) fn text(&mut self, tag: (u16, u16), vr: &[u8; 2], value: &str) {
        let mut value = value.as_bytes().to_vec();
        if value.len() % 2 == 1 {
            value.push(if vr == b"UI" { 0 } else { b' ' });
        }
        self.short(tag, vr, &value);
    }

    pub(crate) fn word(&mut self, tag: (u16, u16), value: u16) {
        self.short(tag, b"US", &value.to_le_bytes());
    }

    /// 32-bit numbers.
    pub(crate) fn longs(&mut self, tag: (u16, u16), values: &[u32]) {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.short(tag, b"UL", &bytes);
    }

    /// A sequence of items, each of a stated length.
    pub(crate) fn sequence(&mut self, tag: (u16, u16), items: &[Elements]) {
        let mut inside = Vec::new();
        for item in items {
            inside.extend_from_slice(&[0xfe, 0xff, 0x00, 0xe0]);
            let len = u32::try_from(item.0.len()).unwrap_or(u32::MAX);
            inside.extend_from_slice(&len.to_le_bytes());
            inside.extend_from_slice(&item.0);
        }
        self.long(tag, b"SQ", &inside);
    }

    /// 16 bits with sign.
    pub(crate) fn signed_word(&mut self, tag: (u16, u16), value: i16) {
        self.short(tag, b"SS", &value.to_le_bytes());
    }

    /// 32 bits with sign.
    pub(crate) fn signed_long(&mut self, tag: (u16, u16), value: i32) {
        self.short(tag, b"SL", &value.to_le_bytes());
    }

    /// Single precision.
    pub(crate) fn float(&mut self, tag: (u16, u16), value: f32) {
        self.short(tag, b"FL", &value.to_le_bytes());
    }

    /// A value with a 32-bit length; every caller's value has an even length.
    pub(crate) fn long(&mut self, tag: (u16, u16), vr: &[u8; 2], value: &[u8]) {
        self.tag(tag, vr);
        let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
        self.0.extend_from_slice(&[0, 0]);
        self.0.extend_from_slice(&len.to_le_bytes());
        self.0.extend_from_slice(value);
    }
}
