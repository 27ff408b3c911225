//! Runs of numbers in the files, and how they are read.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;

use super::{Checkpoint, CheckpointError};

/// Bytes read at a time; a multiple of every element's size.
pub(super) const BLOCK_BYTES: usize = 1 << 20;
/// Storages of strided views are held whole up to this.
pub(super) const MAX_HELD_BYTES: u64 = 1 << 30;

/// Bytes of one storage in a file.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    pub(super) entry: String,
    /// File of the checkpoint that it lies in.
    pub(super) part: usize,
    pub(super) offset: u64,
    /// Bytes of the numbers.
    pub(super) len_bytes: u64,
    /// Bytes in the file where the entry is compressed.
    pub(super) packed: Option<u64>,
    pub(super) crc: Option<u32>,
}

/// Part of a file as a stream.
struct Window<'f> {
    file: &'f File,
    at: u64,
    end: u64,
}

impl Read for Window<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let len = into.len().min(left);
        let read = self.file.read_at(&mut into[..len], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Checkpoint {
    fn file(&self, storage: &Storage) -> Result<&File, CheckpointError> {
        self.parts[storage.part]
            .file
            .as_ref()
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound).into())
    }

    /// The storage's entry, with its file where the checkpoint has several.
    fn place_name(&self, storage: &Storage) -> String {
        if self.parts.len() == 1 {
            storage.entry.clone()
        } else {
            format!("{}: {}", self.parts[storage.part].name, storage.entry)
        }
    }

    /// Hands `len_bytes` of a storage from `start` on to `consume`, block by block.
    ///
    /// A checksum covers the whole storage: where only a part of it is read, it is compared before.
    pub(super) fn stream(
        &self,
        at: usize,
        start: u64,
        len_bytes: u64,
        mut consume: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let storage = &self.storages[at];
        if storage.packed.is_none() && (start, len_bytes) != (0, storage.len_bytes) {
            self.verify(at)?;
            let begin = storage.offset + start;
            return self.blocks(storage, begin, len_bytes, |_, block| consume(block));
        }
        let end = start + len_bytes;
        self.all(at, |done, block| {
            let clip = |at: u64| {
                let inside = at.saturating_sub(done).min(block.len() as u64);
                usize::try_from(inside).unwrap_or(block.len())
            };
            let part = &block[clip(start)..clip(end)];
            if part.is_empty() {
                Ok(())
            } else {
                consume(part)
            }
        })
    }

    /// All of a storage, unpacked, block by block; its length and checksum are compared at the end.
    fn all(
        &self,
        at: usize,
        mut consume: impl FnMut(u64, &[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let storage = &self.storages[at];
        let mut crc = flate2::Crc::new();
        let mut take = |done: u64, block: &[u8]| {
            if storage.crc.is_some() {
                crc.update(block);
            }
            consume(done, block)
        };
        if let Some(packed) = storage.packed {
            let window = Window {
                file: self.file(storage)?,
                at: storage.offset,
                end: storage.offset + packed,
            };
            let mut unpacked = flate2::bufread::DeflateDecoder::new(BufReader::new(window));
            let mut block = Vec::with_capacity(BLOCK_BYTES);
            let mut done = 0;
            loop {
                block.clear();
                let read = Read::by_ref(&mut unpacked)
                    .take(BLOCK_BYTES as u64)
                    .read_to_end(&mut block);
                let len = block.len() as u64;
                let problem = match read {
                    Ok(_) if done + len > storage.len_bytes => Some("more".to_owned()),
                    Ok(0) if done < storage.len_bytes => Some(done.to_string()),
                    Ok(_) => None,
                    Err(error) => Some(format!("that they cannot be unpacked: {error}")),
                };
                if let Some(found) = problem {
                    return Err(CheckpointError::Entry {
                        entry: self.place_name(storage),
                        problem: format!("expected {} bytes, found {found}", storage.len_bytes),
                    });
                }
                if len == 0 {
                    break;
                }
                take(done, &block)?;
                done += len;
            }
        } else {
            self.blocks(storage, storage.offset, storage.len_bytes, &mut take)?;
        }
        self.compare(at, crc.sum())
    }

    fn blocks(
        &self,
        storage: &Storage,
        begin: u64,
        len_bytes: u64,
        mut consume: impl FnMut(u64, &[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let file = self.file(storage)?;
        let block_len = usize::try_from(len_bytes)
            .unwrap_or(BLOCK_BYTES)
            .min(BLOCK_BYTES);
        let mut block = vec![0; block_len];
        let mut done = 0;
        while done < len_bytes {
            let len = usize::try_from(len_bytes - done)
                .unwrap_or(BLOCK_BYTES)
                .min(BLOCK_BYTES);
            file.read_exact_at(&mut block[..len], begin + done)?;
            consume(done, &block[..len])?;
            done += len as u64;
        }
        Ok(())
    }

    fn compare(&self, at: usize, found: u32) -> Result<(), CheckpointError> {
        let storage = &self.storages[at];
        match storage.crc {
            Some(expected) if expected != found => Err(CheckpointError::Crc {
                entry: self.place_name(storage),
                expected,
                found,
            }),
            _ => {
                self.checked
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(at);
                Ok(())
            }
        }
    }

    /// Compares a storage's checksum, once.
    fn verify(&self, at: usize) -> Result<(), CheckpointError> {
        let known = self
            .checked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&at);
        if known || self.storages[at].crc.is_none() {
            return Ok(());
        }
        self.all(at, |_, _| Ok(()))
    }

    /// A whole storage in memory, for the strided view `name`.
    pub(super) fn hold(&self, at: usize, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let found = self.storages[at].len_bytes;
        if found > MAX_HELD_BYTES {
            return Err(CheckpointError::TooLarge {
                name: name.into(),
                limit: MAX_HELD_BYTES,
                found,
            });
        }
        // Grows with what is really there; a compressed entry may promise more.
        let mut bytes = Vec::new();
        self.all(at, |_, block| {
            bytes.extend_from_slice(block);
            Ok(())
        })?;
        Ok(bytes)
    }
}
