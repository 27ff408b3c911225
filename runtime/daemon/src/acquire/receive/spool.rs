//! What was acknowledged and is not on record yet.
//!
//! A sender forgets an object once it is acknowledged, and must not wait for the parser, the fit or
//! a slow disk of the record: the object goes to the session's `incoming/` first, flushed to the
//! disk, and is acknowledged then. It is removed when what became of it is on record. What a crash
//! leaves there is read again at the next start; what a clean end leaves stays with its session.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::super::watch::Found;
use crate::record::{self, RecordError};

/// Bytes that may wait; more is answered with "out of resources".
const MAX_BYTES: u64 = 1 << 30;
/// Objects of a session that are remembered, so that one sent again is known.
const MAX_REMEMBERED: usize = 1_000_000;

/// How far an object is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Being written, not acknowledged.
    Begun,
    /// On the disk, in the spool or in the record.
    Safe,
}

struct Held {
    objects: BTreeMap<[u8; 16], Fate>,
    files: usize,
    bytes: u64,
    next: u32,
}

/// The folder.
pub(in super::super) struct Spool {
    dir: PathBuf,
    max_files: usize,
    held: Mutex<Held>,
}

/// Why an object was not kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeepError {
    /// It is there already, and safe.
    #[error("the object is there already")]
    Known,
    /// As many as may wait do so, or the same object is just being written.
    #[error("{files} objects of {bytes} bytes are waiting")]
    Full {
        /// Objects.
        files: usize,
        /// Their bytes.
        bytes: u64,
    },
    /// The disk.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// An object's place in the spool.
#[derive(Clone)]
pub(in super::super) struct Spooled {
    spool: Arc<Spool>,
    number: u32,
}

impl fmt::Debug for Spooled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Spooled({})", self.number)
    }
}

impl Spooled {
    /// What the operator may call it.
    pub(in super::super) fn name(&self) -> String {
        format!("received-{:06}", self.number)
    }

    /// Gives the place up: what became of the object is on record, or it was not taken.
    pub(in super::super) fn settle(&self, file: &Found) {
        if fs::remove_file(&file.path).is_ok() {
            let mut held = self.spool.held();
            held.files = held.files.saturating_sub(1);
            held.bytes = held.bytes.saturating_sub(file.len_bytes);
        }
    }
}

impl Spool {
    /// Opens the folder and returns what an earlier process left there, in the order in which it
    /// came. Objects that are on record (`known`) are removed.
    ///
    /// - `max_files`: objects that may wait.
    ///
    /// # Errors
    /// [`RecordError`] where the folder cannot be used.
    pub(super) fn open(
        dir: PathBuf,
        known: impl IntoIterator<Item = [u8; 16]>,
        max_files: usize,
    ) -> Result<(Arc<Spool>, Vec<Found>), RecordError> {
        record::create_private(&dir).map_err(record::at(&dir))?;
        let mut objects: BTreeMap<[u8; 16], Fate> =
            known.into_iter().map(|id| (id, Fate::Safe)).collect();
        let mut left = Vec::new();
        let mut next = 1;
        for entry in fs::read_dir(&dir).map_err(record::at(&dir))? {
            let path = entry.map_err(record::at(&dir))?.path();
            let Some((number, id)) = parse_name(&path) else {
                // Cut short by a crash, and never acknowledged.
                if path.extension().is_some_and(|end| end == "tmp") {
                    let _ = fs::remove_file(&path);
                }
                continue;
            };
            next = next.max(number.saturating_add(1));
            if objects.insert(id, Fate::Safe).is_some() {
                let _ = fs::remove_file(&path);
                continue;
            }
            left.push((number, id, path));
        }
        left.sort();
        let spool = Arc::new(Spool {
            dir,
            max_files,
            held: Mutex::new(Held {
                objects,
                files: 0,
                bytes: 0,
                next,
            }),
        });
        let found = left.into_iter().filter_map(|(number, id, path)| {
            let metadata = fs::metadata(&path).ok()?;
            let changed = metadata.modified().ok()?;
            let since = changed.duration_since(std::time::UNIX_EPOCH).ok()?;
            let mut held = spool.held();
            held.files += 1;
            held.bytes += metadata.len();
            Some(Found {
                path,
                id,
                len_bytes: metadata.len(),
                changed_ms: u64::try_from(since.as_millis()).unwrap_or(0),
                noticed: Instant::now(),
                spooled: Some(Spooled {
                    spool: Arc::clone(&spool),
                    number,
                }),
            })
        });
        let found = found.collect();
        Ok((spool, found))
    }

    /// Whether an object is on the disk already.
    pub(super) fn is_safe(&self, id: &[u8; 16]) -> bool {
        self.held().objects.get(id) == Some(&Fate::Safe)
    }

    /// Keeps an object; it is on the disk when this returns.
    ///
    /// # Errors
    /// [`KeepError`], and nothing is kept.
    pub(super) fn keep(self: &Arc<Spool>, id: [u8; 16], bytes: &[u8]) -> Result<Found, KeepError> {
        let len_bytes = bytes.len() as u64;
        let number = {
            let mut held = self.held();
            match held.objects.get(&id) {
                Some(Fate::Safe) => return Err(KeepError::Known),
                None if held.files < self.max_files && held.bytes + len_bytes <= MAX_BYTES => {}
                Some(Fate::Begun) | None => {
                    return Err(KeepError::Full {
                        files: held.files,
                        bytes: held.bytes,
                    });
                }
            }
            if held.objects.len() < MAX_REMEMBERED {
                held.objects.insert(id, Fate::Begun);
            }
            held.files += 1;
            held.bytes += len_bytes;
            let number = held.next;
            held.next = number.saturating_add(1);
            number
        };
        let path = self.dir.join(name(number, &id));
        let written = record::write_whole(&path, bytes);
        let mut held = self.held();
        if let Err(error) = written {
            // What could not be written whole must not come back at the next start.
            let _ = fs::remove_file(&path);
            let _ = fs::remove_file(path.with_extension("dcm.tmp"));
            held.objects.remove(&id);
            held.files = held.files.saturating_sub(1);
            held.bytes = held.bytes.saturating_sub(len_bytes);
            return Err(error.into());
        }
        if let Some(fate) = held.objects.get_mut(&id) {
            *fate = Fate::Safe;
        }
        Ok(Found {
            path,
            id,
            len_bytes,
            changed_ms: record::now_ms(),
            noticed: Instant::now(),
            spooled: Some(Spooled {
                spool: Arc::clone(self),
                number,
            }),
        })
    }

    /// Takes back an object that nobody has room for.
    pub(super) fn take_back(&self, file: &Found) {
        self.held().objects.remove(&file.id);
        if let Some(spooled) = &file.spooled {
            spooled.settle(file);
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(number: u32, id: &[u8; 16]) -> String {
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{number:06}-{id}.dcm")
}

fn parse_name(path: &Path) -> Option<(u32, [u8; 16])> {
    let name = path.file_name()?.to_str()?.strip_suffix(".dcm")?;
    let (number, hex) = name.split_once('-')?;
    let mut id = [0; 16];
    if hex.len() != 32 || !hex.is_ascii() {
        return None;
    }
    for (byte, pair) in id.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some((number.parse().ok()?, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn what_is_kept_is_found_again_in_its_order_and_what_is_on_record_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (spool, left) = Spool::open(dir.path().into(), [], 8).unwrap();
        assert!(left.is_empty());
        for id in 1..=3_u8 {
            spool.keep([9 - id; 16], &[id; 100]).unwrap();
        }
        fs::write(dir.path().join("000009-cut.dcm.tmp"), "cut").unwrap();
        let (again, left) = Spool::open(dir.path().into(), [[7; 16]], 8).unwrap();
        let ids: Vec<u8> = left.iter().map(|found| found.id[0]).collect();
        assert_eq!(ids, [8, 6]);
        assert_eq!(files(dir.path()), 2);
        assert!(matches!(
            again.keep([8; 16], b"again"),
            Err(KeepError::Known)
        ));
        for found in &left {
            found.spooled.as_ref().unwrap().settle(found);
        }
        assert_eq!(files(dir.path()), 0);
        // Numbers go on, so that the order of names stays the order of arrival.
        let found = again.keep([1; 16], b"new").unwrap();
        assert_eq!(found.spooled.unwrap().name(), "received-000004");
    }

    #[test]
    fn a_full_spool_refuses_and_takes_again_when_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let (spool, _) = Spool::open(dir.path().into(), [], 2).unwrap();
        let first = spool.keep([1; 16], b"1").unwrap();
        spool.keep([2; 16], b"2").unwrap();
        assert!(matches!(
            spool.keep([3; 16], b"3"),
            Err(KeepError::Full { files: 2, bytes: 2 })
        ));
        first.spooled.as_ref().unwrap().settle(&first);
        spool.keep([3; 16], b"3").unwrap();
        assert!(spool.is_safe(&[1; 16]), "it is on record now");
    }

    #[test]
    fn an_object_taken_back_may_come_again() {
        let dir = tempfile::tempdir().unwrap();
        let (spool, _) = Spool::open(dir.path().into(), [], 2).unwrap();
        let found = spool.keep([1; 16], b"1").unwrap();
        spool.take_back(&found);
        assert_eq!(files(dir.path()), 0);
        assert!(!spool.is_safe(&[1; 16]));
        spool.keep([1; 16], b"1").unwrap();
    }
}
