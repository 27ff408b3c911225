//! Append-only files of checksummed entries.
//!
//! ```text
//! file    "AFTLOG\x01\n", then entries to the end
//! entry   length of the payload   u32, little endian
//!         checksum                u32, little endian: CRC-32 (IEEE) of length and payload, begun with
//!                                 the checksum of the entry before (0 for the first)
//!         payload                 postcard: an enum's number and its fields in order, lengths and whole
//!                                 numbers as variable-length integers, floats little endian
//! ```
//!
//! The checksum of each entry covers those before it, so an entry that was changed, left out or put
//! elsewhere is found. An entry is on the disk when [`Log::append`] returns.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{RecordError, at, folder_of, now_ms};

/// How a log begins; the eighth byte but one is the format's version.
const MAGIC: [u8; 8] = *b"AFTLOG\x01\n";
/// Longest payload: a reference volume with room to spare.
pub(crate) const MAX_ENTRY_BYTES: usize = 64 << 20;

/// What a log's end looks like.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The last entry is whole.
    Clean,
    /// The file ends within an entry, as a crash leaves it.
    Torn,
    /// Bytes that no crash of this program leaves.
    Damaged(&'static str),
}

/// A log that is open for appending.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    /// Bytes of whole entries, the beginning included.
    len: u64,
    checksum: u32,
}

impl Log {
    /// Opens or begins a log and returns its whole entries.
    ///
    /// An entry that a crash cut short is cut off. Where anything else is wrong, the file as it was
    /// is kept beside the log before it goes on without the rest.
    pub(crate) fn open<T: DeserializeOwned>(path: &Path) -> Result<(Log, Vec<T>), RecordError> {
        let error = at(path);
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(&error)?;
        let whole = read_entries::<T>(path, &file)?;
        let (mut good, checksum) = (whole.len, whole.checksum);
        let len = file.metadata().map_err(&error)?.len();
        match whole.end {
            End::Clean => {}
            End::Torn => tracing::warn!(
                dropped_bytes = len - good,
                "the last entry of a log was torn, it is dropped"
            ),
            End::Damaged(reason) => {
                let kept = path.with_extension(format!("damaged-{}", now_ms()));
                fs::copy(path, &kept).map_err(at(&kept))?;
                tracing::error!(
                    reason,
                    dropped_bytes = len - good,
                    "a log is damaged, it is kept aside and goes on without the rest"
                );
            }
        }
        file.set_len(good).map_err(&error)?;
        if good == 0 {
            file.write_all(&MAGIC).map_err(&error)?;
            good = MAGIC.len() as u64;
            file.sync_data().map_err(&error)?;
            let folder = folder_of(path);
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .map_err(at(folder))?;
        }
        let log = Log {
            path: path.into(),
            file,
            len: good,
            checksum,
        };
        Ok((log, whole.entries))
    }

    /// Appends an entry; it is on the disk when this returns.
    pub(crate) fn append<T: Serialize>(&mut self, entry: &T) -> Result<(), RecordError> {
        let payload = postcard::to_stdvec(entry).map_err(|source| RecordError::Entry {
            path: self.path.clone(),
            source,
        })?;
        let long = RecordError::Long {
            path: self.path.clone(),
            found: payload.len(),
        };
        if payload.len() > MAX_ENTRY_BYTES {
            return Err(long);
        }
        let Ok(len) = u32::try_from(payload.len()) else {
            return Err(long);
        };
        let len = len.to_le_bytes();
        let checksum = checksum(self.checksum, len, &payload);
        let mut bytes = Vec::with_capacity(8 + payload.len());
        bytes.extend_from_slice(&len);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(&payload);
        let written = self
            .file
            .write_all(&bytes)
            .and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // A full disk must not leave half an entry in front of later ones.
            let _ = self.file.set_len(self.len);
            return Err(at(&self.path)(error));
        }
        self.len += bytes.len() as u64;
        self.checksum = checksum;
        Ok(())
    }
}

/// The whole entries of a log, read without touching it; for those who only look. The last entry may be
/// on its way.
///
/// # Errors
/// [`RecordError::Io`] where it cannot be read, [`RecordError::Magic`] where it is no log,
/// [`RecordError::Damaged`] where it holds what this version does not write: a part of it would pass for
/// the whole.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, RecordError> {
    let file = File::open(path).map_err(at(path))?;
    let whole = read_entries(path, &file)?;
    match whole.end {
        End::Clean | End::Torn => Ok(whole.entries),
        End::Damaged(reason) => Err(RecordError::Damaged {
            path: path.into(),
            entries: whole.entries.len(),
            reason,
        }),
    }
}

/// What stands in a log.
struct Whole<T> {
    entries: Vec<T>,
    len: u64,
    checksum: u32,
    end: End,
}

fn read_entries<T: DeserializeOwned>(path: &Path, file: &File) -> Result<Whole<T>, RecordError> {
    let error = at(path);
    let mut reader = BufReader::new(file);
    let mut whole = Whole {
        entries: Vec::new(),
        len: 0,
        checksum: 0,
        end: End::Clean,
    };
    let mut magic = Vec::new();
    reader
        .by_ref()
        .take(MAGIC.len() as u64)
        .read_to_end(&mut magic)
        .map_err(&error)?;
    if !MAGIC.starts_with(&magic) {
        return Err(RecordError::Magic { path: path.into() });
    }
    if magic.len() < MAGIC.len() {
        // The very first write was cut short.
        return Ok(whole);
    }
    whole.len = MAGIC.len() as u64;
    whole.end = loop {
        let mut head = [0; 8];
        match fill(&mut reader, &mut head).map_err(&error)? {
            0 => break End::Clean,
            8 => {}
            _ => break End::Torn,
        }
        let [a, b, c, d, e, f, g, h] = head;
        let len = u32::from_le_bytes([a, b, c, d]);
        let expected = u32::from_le_bytes([e, f, g, h]);
        if len as usize > MAX_ENTRY_BYTES {
            break End::Damaged("an entry claims more bytes than any has");
        }
        let mut payload = Vec::new();
        let read = reader
            .by_ref()
            .take(u64::from(len))
            .read_to_end(&mut payload)
            .map_err(&error)?;
        if read < len as usize {
            break End::Torn;
        }
        let found = checksum(whole.checksum, [a, b, c, d], &payload);
        if found != expected {
            break End::Damaged("an entry's checksum does not fit");
        }
        let Ok(entry) = postcard::from_bytes(&payload) else {
            break End::Damaged("an entry is not of this version");
        };
        whole.entries.push(entry);
        whole.len += 8 + u64::from(len);
        whole.checksum = found;
    };
    Ok(whole)
}

fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn checksum(before: u32, len: [u8; 4], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(before);
    hasher.update(&len);
    hasher.update(payload);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(path: &Path) -> Vec<u8> {
        let (mut log, none) = Log::open::<(u32, Vec<f32>)>(path).unwrap();
        assert!(none.is_empty());
        for index in 0..3_u32 {
            log.append(&(index, vec![0.5_f32; 100])).unwrap();
        }
        fs::read(path).unwrap()
    }

    fn kept_aside(dir: &Path) -> usize {
        let names = fs::read_dir(dir).unwrap();
        names
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name();
                name.to_string_lossy().contains("damaged")
            })
            .count()
    }

    #[test]
    fn every_cut_loses_the_torn_entry_alone_and_the_log_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.log");
        let whole = begun(&path);
        let entry = (whole.len() - MAGIC.len()) / 3;
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut log, kept) = Log::open::<(u32, Vec<f32>)>(&path).unwrap();
            assert_eq!(kept.len(), cut.saturating_sub(MAGIC.len()) / entry);
            log.append(&(9_u32, vec![1.0_f32])).unwrap();
            let (_, again) = Log::open::<(u32, Vec<f32>)>(&path).unwrap();
            assert_eq!(again.last(), Some(&(9, vec![1.0])));
            assert_eq!(again.len(), kept.len() + 1);
        }
        assert_eq!(kept_aside(dir.path()), 0);
    }

    #[test]
    fn every_changed_byte_is_found_and_the_file_kept_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.log");
        let whole = begun(&path);
        let entry = (whole.len() - MAGIC.len()) / 3;
        for place in MAGIC.len()..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 0x10;
            fs::write(&path, &bytes).unwrap();
            // A changed length may also look like an entry that is on its way.
            let kept = match read::<(u32, Vec<f32>)>(&path) {
                Err(RecordError::Damaged { entries, .. }) => entries,
                other => {
                    assert_eq!(
                        (place - MAGIC.len()) % entry / 4,
                        0,
                        "byte {place}: {other:?}"
                    );
                    other.unwrap().len()
                }
            };
            assert_eq!(kept, (place - MAGIC.len()) / entry, "byte {place}");
        }
        let (_, kept) = Log::open::<(u32, Vec<f32>)>(&path).unwrap();
        assert_eq!(kept.len(), 2);
        assert_eq!(kept_aside(dir.path()), 1);
    }

    #[test]
    fn an_entry_taken_out_of_the_middle_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.log");
        let whole = begun(&path);
        let entry = (whole.len() - MAGIC.len()) / 3;
        let first = MAGIC.len() + entry;
        let bytes = [&whole[..first], &whole[first + entry..]].concat();
        fs::write(&path, bytes).unwrap();
        let kept = read::<(u32, Vec<f32>)>(&path);
        assert!(matches!(kept, Err(RecordError::Damaged { entries: 1, .. })));
    }

    #[test]
    fn a_file_that_is_no_log_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.log");
        fs::write(&path, b"something else").unwrap();
        assert!(matches!(
            Log::open::<u32>(&path),
            Err(RecordError::Magic { .. })
        ));
    }
}
