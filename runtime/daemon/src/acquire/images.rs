//! NIfTI images in the watched folder: one file per volume, or one file that grows.
//!
//! A file of one volume is numbered by the last number of its name. A growing `.nii` begins with one
//! volume too: the first file of a series is held until it grows or another one shows what it is. It is
//! read volume by volume: each time it has grown, the header and the new volumes' bytes go to the
//! parser, nothing is read twice. Packed files cannot be read from the middle and hold one volume.

use std::collections::{BTreeMap, VecDeque};
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
/// First volumes that are held at a time; each may be large.
const MAX_HELD: usize = 4;
/// A file that has not grown for so many TR holds one volume for good.
const HELD_TR: f64 = 3.0;

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
    /// Volumes that were handed on of a growing file, and their series.
    handed_on: BTreeMap<PathBuf, (u64, [u8; 16])>,
    /// The number that the first volume's name has, 0 or 1, by series.
    base: BTreeMap<[u8; 16], u32>,
    /// Files of one volume of which nothing tells yet whether they grow.
    held: VecDeque<Held>,
}

/// A file of one volume, and the volume.
struct Held {
    found: Found,
    volume: VolumeMessage,
}

impl Held {
    fn series(&self) -> Option<[u8; 16]> {
        series_of(&self.found.path).map(|(series, _)| series)
    }

    fn is_over(&self) -> bool {
        let waited_ms = self.found.noticed.elapsed().as_secs_f64() * 1e3;
        waited_ms > HELD_TR * self.volume.tr_ms
    }
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
            held: VecDeque::new(),
        }
    }

    /// Tells the volumes that have been held long enough; `false` where nobody listens any more.
    pub(crate) fn let_go(&mut self, tell: Tell<'_>) -> bool {
        while let Some(over) = self.held.iter().position(Held::is_over) {
            if !self.let_go_of(over, tell) {
                return false;
            }
        }
        true
    }

    fn let_go_of(&mut self, place: usize, tell: Tell<'_>) -> bool {
        let Some(held) = self.held.remove(place) else {
            return true;
        };
        let volume = self.numbered(held.volume, &held.found.path);
        tell(held.found, volume.map(ParseReply::Volume))
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
            return self.single(found, volume, tell);
        }
        if packed {
            return Err(
                "it is a packed image of several volumes, expected one volume or a .nii that grows"
                    .into(),
            );
        }
        self.grown(found, &image, &mut file, limit, parser, tell)
    }

    /// Tells a file's only volume, or holds it where it may be the first of a file that grows.
    fn single(
        &mut self,
        found: &Found,
        volume: VolumeMessage,
        tell: Tell<'_>,
    ) -> Result<bool, String> {
        let volume = self.with_tr(volume)?;
        self.held.retain(|held| held.found.path != found.path);
        let series = series_of(&found.path).map(|(series, _)| series);
        let mut listening = true;
        // What a second file of its series shows is no beginning of a growing one.
        let first = |held: &Held| series.is_some() && held.series() == series;
        while let Some(first) = self.held.iter().position(first) {
            listening &= self.let_go_of(first, tell);
        }
        if is_packed(&found.path) || series.is_some_and(|series| self.base.contains_key(&series)) {
            let volume = self.numbered(volume, &found.path)?;
            return Ok(listening && tell(found.clone(), Ok(ParseReply::Volume(volume))));
        }
        if self.held.len() >= MAX_HELD {
            listening &= self.let_go_of(0, tell);
        }
        self.held.push_back(Held {
            found: found.clone(),
            volume,
        });
        Ok(listening)
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
        let known = self.handed_on.get(&found.path).copied();
        let head = read_at(file, 0, image.start)?;
        let (from, series) = match known {
            Some((from, series)) if from <= complete => (from, series),
            // A shorter file under the same name is another one: another run, whose first volume is
            // another. The same file after a restart is the same run.
            _ if complete > 0 => {
                let first = read_at(file, image.start, volume_bytes)?;
                (0, hash(b"growing image", &found.path, &first))
            }
            _ => return Ok(true),
        };
        // Its first volume came when it was first seen.
        let first = self
            .held
            .iter()
            .position(|held| held.found.path == found.path);
        let first = first.and_then(|first| self.held.remove(first));
        for index in from..complete {
            let mut bytes = head.clone();
            let at = image.start + index * volume_bytes;
            bytes.extend(read_at(file, at, volume_bytes)?);
            let volume = ask(parser, &bytes)?.volume.ok_or("it is cut short")?;
            let mut volume = self.with_tr(volume)?;
            volume.series = series;
            volume.number = u32::try_from(index + 1).unwrap_or(u32::MAX);
            self.handed_on
                .insert(found.path.clone(), (index + 1, series));
            let mut id = Sha256::new();
            id.update(series);
            id.update(index.to_le_bytes());
            let came = first.as_ref().filter(|_| index == 0);
            let mut part = came.map_or(found, |first| &first.found).clone();
            part.id.copy_from_slice(&id.finalize()[..16]);
            if !tell(part, Ok(ParseReply::Volume(volume))) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A volume of its own file: its series is what the names have in common.
    fn numbered(&mut self, volume: VolumeMessage, path: &Path) -> Result<VolumeMessage, String> {
        let (series, number) =
            series_of(path).ok_or("its name holds no number, expected the volume's")?;
        if self.base.len() >= MAX_KNOWN && !self.base.contains_key(&series) {
            return Err(format!("{MAX_KNOWN} series of images came already"));
        }
        // After a restart the first that comes is not the first that came.
        let base = if number > 0 && named_zero(path).is_some_and(|zero| zero.exists()) {
            0
        } else {
            number.min(1)
        };
        let base = *self.base.entry(series).or_insert(base);
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

/// The series of a file of one volume, what the names have in common, and its number in it.
fn series_of(path: &Path) -> Option<([u8; 16], u32)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (prefix, number) = last_number(&name)?;
    let folder = path.parent().unwrap_or(path);
    Some((hash(b"image", folder, prefix.as_bytes()), number))
}

/// The file of its series whose number is 0.
fn named_zero(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let (prefix, _) = last_number(name)?;
    let digits = name.get(prefix.len()..)?;
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    let zero = format!("{prefix}{}{}", "0".repeat(end), digits.get(end..)?);
    Some(path.with_file_name(zero))
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

fn hash(kind: &[u8], path: &Path, more: &[u8]) -> [u8; 16] {
    let mut hash = Sha256::new();
    for part in [kind, path.as_os_str().as_encoded_bytes(), more] {
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

    fn found(path: &Path) -> Found {
        Found {
            path: path.into(),
            id: [0; 16],
            len_bytes: 0,
            changed_ms: 0,
            noticed: std::time::Instant::now(),
            spooled: None,
        }
    }

    #[test]
    fn the_first_file_of_a_series_is_told_with_the_second_or_when_it_has_not_grown() {
        let mut images = Images::new(Some(10.0));
        let mut told = Vec::new();
        let mut single = |images: &mut Images, name: &str| {
            let mut tell = |file: Found, reply: Result<ParseReply, String>| {
                let number = match reply {
                    Ok(ParseReply::Volume(volume)) => Ok(volume.number),
                    other => Err(format!("{other:?}")),
                };
                told.push((file.path, number));
                true
            };
            let path = Path::new(name);
            assert!(images.single(&found(path), volume(), &mut tell).unwrap());
            told.len()
        };
        assert_eq!(single(&mut images, "/in/b.nii"), 0);
        assert_eq!(single(&mut images, "/in/a_1.nii"), 0);
        // It came again and did not grow.
        assert_eq!(single(&mut images, "/in/a_1.nii"), 0);
        assert_eq!(single(&mut images, "/in/a_2.nii"), 2);
        assert_eq!(single(&mut images, "/in/a_3.nii"), 3);
        // Packed files do not grow.
        assert_eq!(single(&mut images, "/in/c_1.nii.gz"), 4);
        // What another series shows says nothing of this one.
        std::thread::sleep(std::time::Duration::from_millis(40));
        let mut late = Vec::new();
        assert!(images.let_go(&mut |file, reply| {
            late.push((file.path, reply.is_err()));
            true
        }));
        assert_eq!(late, [(PathBuf::from("/in/b.nii"), true)]);
        let numbers: Vec<Result<u32, String>> = told.into_iter().map(|(_, n)| n).collect();
        assert_eq!(numbers, [Ok(1), Ok(2), Ok(3), Ok(1)]);
    }

    #[test]
    fn after_a_restart_a_series_from_nought_keeps_its_numbers() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a_000.nii"), "").unwrap();
        let mut images = Images::new(Some(1500.0));
        let path = dir.path().join("a_030.nii");
        assert_eq!(images.numbered(volume(), &path).unwrap().number, 31);
        let other = dir.path().join("b_030.nii");
        assert_eq!(images.numbered(volume(), &other).unwrap().number, 30);
    }
}
