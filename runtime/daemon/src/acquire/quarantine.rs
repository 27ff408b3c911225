//! Scanner files that could not be used, kept with their reason.
//!
//! They hold what the scanner wrote, patient's name and all: the folder is readable by this user
//! alone, and no name of theirs appears anywhere else.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::record::{self, RecordError};

/// Files and bytes that are kept; later ones are only reported.
const MAX_FILES: usize = 256;
const MAX_BYTES: usize = 1 << 30;

#[derive(Serialize)]
struct Note<'n> {
    reason: &'n str,
    len_bytes: usize,
    at_ms: u64,
}

/// The folder.
pub(super) struct Quarantine {
    dir: PathBuf,
    files: usize,
    bytes: usize,
}

impl Quarantine {
    /// Counts what is there already.
    pub(super) fn open(dir: PathBuf) -> Quarantine {
        let (mut files, mut bytes) = (0, 0);
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            files += usize::from(entry.path().extension().is_some_and(|end| end == "json"));
            bytes += entry
                .metadata()
                .map_or(0, |m| usize::try_from(m.len()).unwrap_or(MAX_BYTES));
        }
        Quarantine { dir, files, bytes }
    }

    /// Keeps a copy; returns its name, `None` where the folder is full.
    pub(super) fn keep(
        &mut self,
        id: [u8; 16],
        bytes: &[u8],
        reason: &str,
    ) -> Result<Option<String>, RecordError> {
        let name: String = id[..6].iter().map(|byte| format!("{byte:02x}")).collect();
        if self.dir.join(format!("{name}.json")).exists() {
            // The same file as before a restart.
            return Ok(Some(name));
        }
        if self.files >= MAX_FILES || self.bytes + bytes.len() > MAX_BYTES {
            return Ok(None);
        }
        record::write_whole(&self.dir.join(format!("{name}.bin")), bytes)?;
        let note = Note {
            reason,
            len_bytes: bytes.len(),
            at_ms: record::now_ms(),
        };
        record::write_json(&self.dir.join(format!("{name}.json")), &note)?;
        self.files += 1;
        self.bytes += bytes.len();
        Ok(Some(name))
    }
}

/// A file's name as it may be shown.
///
/// Sites put patients' names, record numbers, birth dates and UIDs into file names: unknown words
/// and every number but the last, which tells volumes apart, are masked.
pub(super) fn plain_name(path: &Path) -> String {
    const KNOWN: [&str; 10] = [
        "dcm", "ima", "im", "mr", "vol", "volume", "img", "nii", "gz", "bin",
    ];
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let class = |c: char| (c.is_alphabetic(), c.is_ascii_digit());
    let mut parts = Vec::new();
    let mut rest = name.as_str();
    while let Some(first) = rest.chars().next() {
        let end = rest
            .find(|c| class(c) != class(first))
            .unwrap_or(rest.len());
        let (part, tail) = rest.split_at(end);
        parts.push((class(first), part));
        rest = tail;
    }
    let last_number = parts.iter().rposition(|((_, number), _)| *number);
    let mut shown = String::new();
    for (place, ((word, number), part)) in parts.into_iter().enumerate() {
        if word && !KNOWN.contains(&part.to_ascii_lowercase().as_str()) {
            shown.push('x');
        } else if number && (part.len() > 6 || Some(place) != last_number) {
            shown.push('#');
        } else {
            shown.extend(part.chars().filter(|c| !c.is_control()).take(6));
        }
    }
    shown.chars().take(48).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_uids_in_file_names_are_masked() {
        let plain = |name: &str| plain_name(Path::new(name));
        assert_eq!(plain("/x/001_000013_000001.dcm"), "#_#_000001.dcm");
        assert_eq!(plain("ZZCANARY^PAT.MR.0012.IMA"), "x^x.MR.0012.IMA");
        assert_eq!(plain("1.2.840.113619207.5.dcm"), "#.#.#.#.5.dcm");
        assert_eq!(plain("Müller_1970-01-01.dcm"), "x_#-#-01.dcm");
    }

    #[test]
    fn a_copy_is_kept_with_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let mut quarantine = Quarantine::open(dir.path().into());
        let name = quarantine
            .keep([7; 16], b"bytes", "it is no DICOM file")
            .unwrap()
            .unwrap();
        assert_eq!(
            std::fs::read(dir.path().join(format!("{name}.bin"))).unwrap(),
            b"bytes"
        );
        let note = std::fs::read_to_string(dir.path().join(format!("{name}.json"))).unwrap();
        assert!(note.contains("it is no DICOM file"));
        assert_eq!(Quarantine::open(dir.path().into()).files, 1);
    }
}
