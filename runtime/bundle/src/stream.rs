//! A file written and hashed on threads of its own.
//!
//! Whoever makes the bytes waits only while a few megabytes are pending. Long files are sent to the
//! disk while they grow: one flush at the end would find gigabytes in the page cache.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

/// Bytes handed over at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// Blocks under way at most.
const PENDING: usize = 8;
/// After so many bytes the disk is asked to keep what it has.
const FLUSH_BYTES: u64 = 128 << 20;

/// A file being written.
#[derive(Debug)]
pub(crate) struct Stream {
    block: Vec<u8>,
    full: SyncSender<Vec<u8>>,
    spare: Receiver<Vec<u8>>,
    thread: JoinHandle<io::Result<Sha256>>,
}

/// A file whose last bytes are on their way to the disk.
#[derive(Debug)]
pub(crate) struct Closing(JoinHandle<io::Result<Sha256>>);

impl Stream {
    /// Takes an empty file.
    pub(crate) fn new(file: File) -> io::Result<Stream> {
        let (full, blocks) = sync_channel(PENDING);
        let (give_back, spare) = sync_channel(PENDING);
        let thread = std::thread::Builder::new()
            .name("bundle.write".into())
            .spawn(move || write(file, &blocks, &give_back))?;
        Ok(Stream {
            block: Vec::with_capacity(BLOCK_BYTES),
            full,
            spare,
            thread,
        })
    }

    /// Appends bytes; an error of earlier bytes may come as late as [`Closing::wait`].
    pub(crate) fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK_BYTES - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == BLOCK_BYTES {
                self.hand_over();
            }
        }
    }

    fn hand_over(&mut self) {
        let mut next = self.spare.try_recv().unwrap_or_default();
        next.clear();
        next.reserve_exact(BLOCK_BYTES);
        let block = std::mem::replace(&mut self.block, next);
        // A writer that is gone has an error to tell, and tells it when the file is closed.
        let _ = self.full.send(block);
    }

    /// Ends the file.
    pub(crate) fn close(mut self) -> Closing {
        self.hand_over();
        Closing(self.thread)
    }
}

impl Closing {
    /// Waits until the file is on the disk; its hash.
    ///
    /// # Errors
    /// The first error of writing.
    pub(crate) fn wait(self) -> io::Result<Sha256> {
        self.0
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn write(
    mut file: File,
    blocks: &Receiver<Vec<u8>>,
    give_back: &SyncSender<Vec<u8>>,
) -> io::Result<Sha256> {
    let mut hasher = Sha256::new();
    let (flush, asked) = sync_channel::<()>(1);
    let same = file.try_clone()?;
    let flusher = std::thread::Builder::new()
        .name("bundle.flush".into())
        .spawn(move || asked.iter().try_for_each(|()| same.sync_data()))?;
    let mut since_flush = 0;
    for block in blocks {
        file.write_all(&block)?;
        hasher.update(&block);
        since_flush += block.len() as u64;
        if since_flush >= FLUSH_BYTES && flush.try_send(()).is_ok() {
            since_flush = 0;
        }
        // The other side may have ended already and need no more blocks.
        let _ = give_back.try_send(block);
    }
    drop(flush);
    flusher
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    file.sync_all()?;
    Ok(hasher)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_hash_are_those_of_the_pieces_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut stream = Stream::new(File::create_new(&path).unwrap()).unwrap();
        let mut expected = Vec::new();
        for (value, len) in (0_u8..).zip([0, 1, BLOCK_BYTES - 1, 3 * BLOCK_BYTES + 5, 7]) {
            stream.write(&vec![value; len]);
            expected.extend(vec![value; len]);
        }
        let hash = stream.close().wait().unwrap().finalize();
        assert!(std::fs::read(&path).unwrap() == expected);
        assert_eq!(hash, Sha256::digest(&expected));
    }

    #[test]
    fn a_device_that_is_full_is_an_error_when_the_file_is_closed() {
        let full = File::options().write(true).open("/dev/full");
        let Ok(file) = full else {
            eprintln!("/dev/full is not there: nothing to test");
            return;
        };
        let mut stream = Stream::new(file).unwrap();
        stream.write(&vec![1; 64 * BLOCK_BYTES]);
        assert!(stream.close().wait().is_err());
    }
}
