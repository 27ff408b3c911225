//! Entries that wait for a disk that is full.
//!
//! A log of which entries are missing would tell another run, so they are written in their order or not
//! at all: once too many wait, the log ends with those, however much room there is later.

use std::collections::VecDeque;

use crate::record::RecordError;
use crate::record::entry::RunEntry;

/// Entries that may wait: ten minutes of volumes at a TR of a second.
const MAX_WAITING: usize = 600;

/// What is not written yet.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    waiting: VecDeque<RunEntry>,
    cut: bool,
}

impl Backlog {
    /// Writes an entry behind those that wait; keeps it where that fails.
    ///
    /// # Errors
    /// Those of `write`, at the first entry that it does not take.
    pub(super) fn write(
        &mut self,
        entry: &RunEntry,
        mut write: impl FnMut(&RunEntry) -> Result<(), RecordError>,
    ) -> Result<(), RecordError> {
        let written = self.flush(&mut write);
        if self.cut {
            return written;
        }
        let written = written.and_then(|()| write(entry));
        if written.is_err() {
            if self.waiting.len() < MAX_WAITING {
                self.waiting.push_back(entry.clone());
            } else {
                self.cut = true;
            }
        }
        written
    }

    /// Writes what waits, as far as that goes.
    ///
    /// # Errors
    /// As [`Backlog::write`].
    pub(super) fn flush(
        &mut self,
        mut write: impl FnMut(&RunEntry) -> Result<(), RecordError>,
    ) -> Result<(), RecordError> {
        while let Some(entry) = self.waiting.front() {
            write(entry)?;
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// Whether everything is written.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && !self.cut
    }

    /// Whether entries were left out, so that the log has ended.
    pub(super) fn is_cut(&self) -> bool {
        self.cut
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn entry(frame: u32) -> RunEntry {
        RunEntry::Lost { frame, at_ms: 0 }
    }

    fn full(_: &RunEntry) -> Result<(), RecordError> {
        let error = std::io::Error::from(std::io::ErrorKind::StorageFull);
        Err(crate::record::at(Path::new("run.log"))(error))
    }

    /// What a log with room takes of the entries from `from` on, one by one.
    fn taken(backlog: &mut Backlog, frames: std::ops::Range<u32>) -> Vec<RunEntry> {
        let mut log = Vec::new();
        for frame in frames {
            let write = |entry: &RunEntry| {
                log.push(entry.clone());
                Ok(())
            };
            backlog.write(&entry(frame), write).unwrap();
        }
        log
    }

    #[test]
    fn what_waited_is_written_once_and_in_its_order() {
        let mut backlog = Backlog::default();
        assert_eq!(taken(&mut backlog, 0..2), [entry(0), entry(1)]);
        for frame in 2..5 {
            assert!(backlog.write(&entry(frame), full).is_err());
        }
        let expected: Vec<RunEntry> = (2..8).map(entry).collect();
        assert_eq!(taken(&mut backlog, 5..8), expected);
        assert!(!backlog.is_cut());
    }

    #[test]
    fn a_log_from_which_entries_are_missing_ends() {
        let mut backlog = Backlog::default();
        let most = u32::try_from(MAX_WAITING).unwrap();
        for frame in 0..most + 3 {
            assert!(backlog.write(&entry(frame), full).is_err());
        }
        assert!(backlog.is_cut());
        // Room again: those that waited, each once, and nothing behind the gap.
        let expected: Vec<RunEntry> = (0..most).map(entry).collect();
        assert_eq!(taken(&mut backlog, most + 3..most + 9), expected);
    }
}
