//! NIfTI images in the watched folder: one file per volume, or one file that grows.
//!
//! A file of one volume is numbered by the last number of its name. A growing `.nii` is read volume by
//! volume: each time it has grown, the header and the new volumes' bytes go to the parser, nothing
//! is read twice. Packed files cannot be read from the middle and hold one volume.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use wire::{ImageMessage, ParseReply, VolumeMessage};

use super::parser::Parser;
use super::watch::Found;
use crate::logging::chain;

/// What the header is looked for in.
const HEAD_BYTES: u64 = 4096;
/// Series and growing files that are remembered.
const MAX_KNOWN: usize = 4096;

/// Whether a file is one by its name.
pub(crate) fn is_image(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.to_ascii_lowercase();
    name.ends_with(".nii") || name.ends_with(".nii.gz")
}

fn is_packed(path: &Path) -> bool {
    path.extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("gz"))
}

/// What is known of the images that came.
pub(crate) struct Images {
    /// TR of images that state none, milliseconds.
    tr_ms: Option<f64>,
    /// Volumes that were handed on, by growing file.
    handed_on: BTreeMap<PathBuf, u64>,
    /// The number that the first volume's name has, 0 or 1, by series.
    base: BTreeMap<[u8; 16], u32>,
}

/// A reply and the file it belongs to; `false` ends the reading.
pub(crate) type Tell<'t> = &'t mut dyn FnMut(Found, Result<ParseReply, String>) -> bool;

impl Images {
    /// - `tr_ms`: of images that state none.
    pub(crate) fn new(tr_ms: Option<f64>) -> Images {
        Images {
            tr_ms,
            handed_on: BTreeMap::new(),
            base: BTreeMap::new(),
        }
    }

    /// Reads what is new of a file and tells each volume; `false` where nobody listens any more.
    ///
    /// - `limit`: bytes of a file, or of one volume of a growing one.
    pub(crate) fn read(
        &mut self,
        found: &Found,
        limit: u64,
        parser: &mut Parser,
        tell: Tell<'_>,
    ) -> bool {
        match self.read_new(found, limit, parser, tell) {
            Ok(listening) => listening,
            Err(reason) => tell(found.clone(), Err(reason)),
        }
    }

    fn read_new(
        &mut self,
        found: &Found,
        limit: u64,
        parser: &mut Parser,
        tell: Tell<'_>,
    ) -> Result<bool, String> {
        let packed = is_packed(&found.path);
        if packed && found.len_bytes > limit {
            return Err(format!(
                "it has {} bytes, expected at most {limit}",
                found.len_bytes
            ));
        }
        let mut file = File::open(&found.path).map_err(unreadable)?;
        let len = if packed { limit } else { HEAD_BYTES };
        let head = read_at(&mut file, 0, len)?;
        let image = ask(parser, &head)?;
        if image.volumes == 1 {
            let volume = match image.volume {
                Some(volume) => volume,
                None => {
                    let whole = image.start.saturating_add(image.volume_bytes);
                    if whole > limit {
                        return Err(format!("it has {whole} bytes, expected at most {limit}"));
                    }
                    let bytes = read_at(&mut file, 0, whole)?;
                    ask(parser, &bytes)?.volume.ok_or("it is cut short")?
                }
            };
            let volume = self.numbered(volume, &found.path)?;
            return Ok(tell(found.clone(), Ok(ParseReply::Volume(volume))));
        }
        if packed {
            return Err(
                "it is a packed image of several volumes, expected one volume or a .nii that grows"
                    .into(),
            );
        }
        self.grown(found, &image, &mut file, limit, parser, tell)
    }

    /// Hands on the volumes that a growing file has got since the last time.
    fn grown(
        &mut self,
        found: &Found,
        image: &ImageMessage,
        file: &mut File,
        limit: u64,
        parser: &mut Parser,
        tell: Tell<'_>,
    ) -> Result<bool, String> {
        let volume_bytes = image.volume_bytes.max(1);
        if image.start.saturating_add(volume_bytes) > limit {
            return Err(format!(
                "one volume of it has {volume_bytes} bytes, expected at most {limit}"
            ));
        }
        let complete = found.len_bytes.saturating_sub(image.start) / volume_bytes;
        let complete = complete.min(image.volumes);
        if self.handed_on.len() >= MAX_KNOWN && !self.handed_on.contains_key(&found.path) {
            return Err(format!("{MAX_KNOWN} growing images are watched already"));
        }
        let from = self.handed_on.get(&found.path).copied().unwrap_or(0);
        // A shorter file under the same name is another one.
        let from = if from > complete { 0 } else { from };
        let head = read_at(file, 0, image.start)?;
        let series = hash(b"growing image", &found.path, "");
        for index in from..complete {
            let mut bytes = head.clone();
            let at = image.start + index * volume_bytes;
            bytes.extend(read_at(file, at, volume_bytes)?);
            let volume = ask(parser, &bytes)?.volume.ok_or("it is cut short")?;
            let mut volume = self.with_tr(volume)?;
            volume.series = series;
            volume.number = u32::try_from(index + 1).unwrap_or(u32::MAX);
            self.handed_on.insert(found.path.clone(), index + 1);
            let mut id = Sha256::new();
            id.update(series);
            id.update(index.to_le_bytes());
            let mut part = found.clone();
            part.id.copy_from_slice(&id.finalize()[..16]);
            if !tell(part, Ok(ParseReply::Volume(volume))) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A volume of its own file: its series is what the names have in common.
    fn numbered(&mut self, volume: VolumeMessage, path: &Path) -> Result<VolumeMessage, String> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let (prefix, number) =
            last_number(&name).ok_or("its name holds no number, expected the volume's")?;
        let folder = path.parent().unwrap_or(path);
        let series = hash(b"image", folder, prefix);
        if self.base.len() >= MAX_KNOWN && !self.base.contains_key(&series) {
            return Err(format!("{MAX_KNOWN} series of images came already"));
        }
        let base = *self.base.entry(series).or_insert(number.min(1));
        let number = (number + 1)
            .checked_sub(base)
            .filter(|number| *number > 0)
            .ok_or("its number is 0 and the series began with another")?;
        let mut volume = self.with_tr(volume)?;
        volume.series = series;
        volume.number = number;
        Ok(volume)
    }

    fn with_tr(&self, mut volume: VolumeMessage) -> Result<VolumeMessage, String> {
        if volume.tr_ms <= 0.0 {
            volume.tr_ms = self
                .tr_ms
                .ok_or("it states no repetition time, and scanner.tr_ms is not set")?;
        }
        Ok(volume)
    }
}

fn ask(parser: &mut Parser, bytes: &[u8]) -> Result<ImageMessage, String> {
    match parser.parse(bytes) {
        Ok(ParseReply::Image(image)) => Ok(image),
        Ok(ParseReply::Refused { reason }) => Err(reason),
        Ok(_) => Err("it is no NIfTI image".into()),
        Err(error) => Err(chain(&error)),
    }
}

/// The system's reason alone: the name of the file is not shown.
fn unreadable(error: io::Error) -> String {
    format!("it cannot be read: {}", error.kind())
}

fn read_at(file: &mut File, at: u64, len: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(at)).map_err(unreadable)?;
    let mut part = file.by_ref().take(len);
    part.read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

fn hash(kind: &[u8], path: &Path, name: &str) -> [u8; 16] {
    let mut hash = Sha256::new();
    for part in [kind, path.as_os_str().as_encoded_bytes(), name.as_bytes()] {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    let mut out = [0; 16];
    out.copy_from_slice(&hash.finalize()[..16]);
    out
}

/// What stands before a name's last number, and the number.
fn last_number(name: &str) -> Option<(&str, u32)> {
    let name = name.split(".nii").next()?;
    let end = name.rfind(|c: char| c.is_ascii_digit())? + 1;
    let digits = name.get(..end)?;
    let start = digits.rfind(|c: char| !c.is_ascii_digit());
    let start = start.map_or(0, |at| {
        at + name[at..].chars().next().map_or(1, char::len_utf8)
    });
    Some((name.get(..start)?, name.get(start..end)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_their_last_number() {
        assert_eq!(last_number("vol_0012.nii"), Some(("vol_", 12)));
        assert_eq!(last_number("run2_0007.nii.gz"), Some(("run2_", 7)));
        assert_eq!(last_number("ä3.nii"), Some(("ä", 3)));
        assert_eq!(last_number("0004_bold.nii"), Some(("", 4)));
        assert_eq!(last_number("bold.nii"), None);
        assert_eq!(last_number("99999999999.nii"), None);
    }

    fn volume() -> VolumeMessage {
        VolumeMessage {
            shape: [1, 1, 1],
            voxels: vec![1.0],
            affine_lps: [[0.0; 4]; 4],
            series: [0; 16],
            patient: 0,
            number: 0,
            tr_ms: 0.0,
            time_ms: None,
            slice_times_ms: None,
        }
    }

    #[test]
    fn volumes_are_numbered_by_name_from_nought_or_one() {
        let mut images = Images::new(Some(1500.0));
        let mut number = |name: &str| {
            let volume = images.numbered(volume(), Path::new(name)).unwrap();
            assert_eq!(volume.tr_ms, 1500.0);
            (volume.series, volume.number)
        };
        let (zero_based, first) = number("/in/a_000.nii");
        assert_eq!(first, 1);
        assert_eq!(number("/in/a_001.nii"), (zero_based, 2));
        let (one_based, first) = number("/in/b_001.nii");
        assert_eq!(first, 1);
        assert_ne!(one_based, zero_based);
        assert_eq!(number("/in/b_005.nii").1, 5);
        let late = images.numbered(volume(), Path::new("/in/b_000.nii"));
        assert!(late.is_err());
        let without_tr = Images::new(None).numbered(volume(), Path::new("/in/c_1.nii"));
        assert!(without_tr.unwrap_err().contains("scanner.tr_ms"));
    }
}
