//! The folder that the scanner exports into.
//!
//! inotify tells of files that were closed or moved in; a scan twice a second finds what it missed
//! (sub-folders, overflowing queues, mounts that do not tell). A file is handed on once it is
//! complete: closed after writing, or unchanged between two scans.

use std::collections::HashMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use sha2::{Digest, Sha256};

/// File times come from a clock that ticks every few milliseconds.
const CLOCK_SLACK_MS: u64 = 20;
/// How often the whole folder is looked at.
const SCAN_EVERY: Duration = Duration::from_millis(500);
/// A file of which nobody told that it was closed is complete when two scans find the same.
const SCANS_UNTIL_COMPLETE: u32 = 2;
/// Folders below the watched one that are looked into.
const MAX_DEPTH: usize = 4;
/// Files that are remembered; beyond that the folder is not one run's export.
const MAX_FILES: usize = 500_000;

/// A file that is complete.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Hash of its name, length and time of change: stands for the file wherever it is kept.
    pub(crate) id: [u8; 16],
    /// Its length.
    pub(crate) len_bytes: u64,
    /// When it was last changed, Unix milliseconds.
    pub(crate) changed_ms: u64,
    /// When it was noticed.
    pub(crate) noticed: Instant,
}

fn file_id(folder: &Path, path: &Path, stamp: Stamp) -> [u8; 16] {
    let name = path.strip_prefix(folder).unwrap_or(path);
    let mut hash = Sha256::new();
    hash.update(name.as_os_str().as_encoded_bytes());
    hash.update(stamp.len.to_le_bytes());
    hash.update(stamp.modified_ns.to_le_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finalize()[..16]);
    id
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified_ns: i128,
}

struct Seen {
    stamp: Stamp,
    handed_on: bool,
    /// The scan that saw it last.
    scan: u64,
}

/// What the watcher tells.
pub(crate) enum Notice {
    /// A file is complete.
    Found(Found),
    /// The folder cannot be read; once per interruption.
    FolderLost(String),
    /// The folder is back.
    FolderBack,
    /// Files that were there before the session, ignored.
    Ignored(usize),
    /// More files than are watched; once.
    Full,
}

/// Watches one folder until told to stop.
pub(crate) struct Watcher {
    folder: PathBuf,
    /// Files changed before this are not of this session, Unix milliseconds.
    since_ms: Option<u64>,
    seen: HashMap<PathBuf, Seen>,
    ignored: usize,
    scans: u64,
    full: Fullness,
    lost: bool,
}

/// Whether files had to be left out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fullness {
    No,
    Now,
    Told,
}

impl Watcher {
    /// - `since_ms`: files created or last changed before this are ignored; `None` takes all.
    pub(crate) fn new(folder: PathBuf, since_ms: Option<u64>) -> Watcher {
        Watcher {
            folder,
            since_ms,
            seen: HashMap::new(),
            ignored: 0,
            scans: 0,
            full: Fullness::No,
            lost: false,
        }
    }

    /// Runs until `stop`; `tell` may wait, files are found again by the next scan.
    pub(crate) fn run(mut self, stop: &Arc<AtomicBool>, mut tell: impl FnMut(Notice) -> bool) {
        let mut inotify = None;
        let mut next_scan = Instant::now();
        let mut first = true;
        // What lies there already is known to be complete after two scans. Until then new files
        // wait as well: overtaken volumes would be taken for lost.
        let mut scans_to_go = SCANS_UNTIL_COMPLETE;
        let mut found = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            if inotify.is_none() {
                inotify = self.arm();
            }
            let wait = next_scan.saturating_duration_since(Instant::now());
            self.wait_for_events(&mut inotify, wait, &mut found);
            if Instant::now() >= next_scan {
                match self.scan(&mut found) {
                    Ok(()) => {
                        scans_to_go = scans_to_go.saturating_sub(1);
                        if std::mem::take(&mut self.lost) && !tell(Notice::FolderBack) {
                            return;
                        }
                        if self.full == Fullness::Now {
                            self.full = Fullness::Told;
                            if !tell(Notice::Full) {
                                return;
                            }
                        }
                        if std::mem::take(&mut first)
                            && self.ignored > 0
                            && !tell(Notice::Ignored(self.ignored))
                        {
                            return;
                        }
                    }
                    Err(error) => {
                        inotify = None;
                        scans_to_go = SCANS_UNTIL_COMPLETE;
                        if !std::mem::replace(&mut self.lost, true)
                            && !tell(Notice::FolderLost(error.to_string()))
                        {
                            return;
                        }
                    }
                }
                next_scan = Instant::now() + SCAN_EVERY;
            }
            if scans_to_go > 0 {
                continue;
            }
            // The scanner numbers its files: names keep volumes in order where several are new.
            found.sort_by(|a, b| a.path.cmp(&b.path));
            for file in found.drain(..) {
                if !tell(Notice::Found(file)) {
                    return;
                }
            }
        }
    }

    fn arm(&self) -> Option<Inotify> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok()?;
        let events =
            AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(&self.folder, events).ok()?;
        Some(inotify)
    }

    fn wait_for_events(
        &mut self,
        inotify: &mut Option<Inotify>,
        wait: Duration,
        found: &mut Vec<Found>,
    ) {
        let Some(watch) = inotify.as_ref() else {
            std::thread::sleep(wait);
            return;
        };
        let millis = u16::try_from(wait.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, PollTimeout::from(millis)), Ok(1..)) {
            return;
        }
        let Ok(events) = watch.read_events() else {
            return;
        };
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                // The folder was removed or unmounted; the scan says so.
                *inotify = None;
                return;
            }
            if let Some(name) = event.name {
                let path = self.folder.join(name);
                self.look(&path, true, found);
            }
        }
    }

    fn scan(&mut self, found: &mut Vec<Found>) -> std::io::Result<()> {
        let mut folders = vec![(self.folder.clone(), 0)];
        while let Some((folder, depth)) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                // A sub-folder may go while it is looked at.
                Err(_) if depth > 0 => continue,
                Err(error) => return Err(error),
            };
            for entry in entries.flatten() {
                let Ok(kind) = entry.file_type() else {
                    continue;
                };
                if kind.is_dir() && depth < MAX_DEPTH {
                    folders.push((entry.path(), depth + 1));
                } else if kind.is_file() {
                    self.look(&entry.path(), false, found);
                }
            }
        }
        // Files that are gone need no memory.
        let scan = self.scans;
        self.seen.retain(|_, seen| seen.scan == scan);
        self.scans += 1;
        Ok(())
    }

    /// Looks at one file and hands it on if it is complete and new.
    fn look(&mut self, path: &Path, closed: bool, found: &mut Vec<Found>) {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        let temporary = [b".tmp".as_slice(), b".part", b".filepart", b"~"];
        if name.starts_with(b".") || temporary.iter().any(|end| name.ends_with(end)) {
            return;
        }
        let Ok(metadata) = fs::metadata(path) else {
            return;
        };
        if !metadata.is_file() {
            return;
        }
        let stamp = Stamp {
            len: metadata.len(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000
                + i128::from(metadata.mtime_nsec()),
        };
        let changed = metadata.ctime() * 1000 + metadata.ctime_nsec() / 1_000_000;
        let changed_ms = u64::try_from(changed).unwrap_or(0);
        let scan = self.scans;
        match self.seen.get_mut(path) {
            Some(seen) if seen.stamp == stamp => {
                seen.scan = scan;
                if seen.handed_on {
                    return;
                }
                // Unchanged since the last look: complete.
                seen.handed_on = true;
            }
            known => {
                let first_sight = known.is_none();
                if first_sight && self.seen.len() >= MAX_FILES {
                    if self.full == Fullness::No {
                        self.full = Fullness::Now;
                    }
                    return;
                }
                // Only what the first scan finds can be older than the session; the clock of a
                // mounted share may be behind ours.
                let ignore = first_sight
                    && scan == 0
                    && self
                        .since_ms
                        .is_some_and(|since| changed_ms + CLOCK_SLACK_MS < since);
                self.ignored += usize::from(ignore);
                self.seen.insert(
                    path.into(),
                    Seen {
                        stamp,
                        handed_on: closed || ignore,
                        scan,
                    },
                );
                if !closed || ignore {
                    return;
                }
            }
        }
        found.push(Found {
            path: path.into(),
            id: file_id(&self.folder, path, stamp),
            len_bytes: stamp.len,
            changed_ms,
            noticed: Instant::now(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, sync_channel};

    fn watch(folder: &Path, since_ms: Option<u64>) -> (Receiver<String>, Arc<AtomicBool>) {
        let (sender, receiver) = sync_channel(64);
        let stop = Arc::new(AtomicBool::new(false));
        let (watcher, stopping) = (Watcher::new(folder.into(), since_ms), Arc::clone(&stop));
        std::thread::spawn(move || {
            watcher.run(&stopping, |notice| {
                let text = match notice {
                    Notice::Found(found) => {
                        found.path.file_name().unwrap().to_str().unwrap().to_owned()
                    }
                    Notice::FolderLost(_) => "lost".into(),
                    Notice::FolderBack => "back".into(),
                    Notice::Ignored(count) => format!("ignored {count}"),
                    Notice::Full => "full".into(),
                };
                sender.send(text).is_ok()
            });
        });
        (receiver, stop)
    }

    const WAIT: Duration = Duration::from_secs(10);

    #[test]
    fn files_come_once_each_and_in_order_of_names() {
        let dir = tempfile::tempdir().unwrap();
        let (found, stop) = watch(dir.path(), None);
        std::thread::sleep(Duration::from_millis(200));
        for name in ["b.dcm", "a.dcm", ".hidden", "c.dcm.part"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        fs::create_dir(dir.path().join("series")).unwrap();
        fs::write(dir.path().join("series/d.dcm"), "d").unwrap();
        let mut names: Vec<String> = (0..3).map(|_| found.recv_timeout(WAIT).unwrap()).collect();
        names.sort();
        assert_eq!(names, ["a.dcm", "b.dcm", "d.dcm"]);
        assert!(found.recv_timeout(Duration::from_millis(1500)).is_err());
        // A file that is written again is another file.
        fs::write(dir.path().join("a.dcm"), "longer than before").unwrap();
        assert_eq!(found.recv_timeout(WAIT).unwrap(), "a.dcm");
        stop.store(true, Ordering::Relaxed);
    }

    #[test]
    fn files_from_before_the_session_are_ignored_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("old.dcm"), "old").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let (found, stop) = watch(dir.path(), Some(crate::record::now_ms()));
        assert_eq!(found.recv_timeout(WAIT).unwrap(), "ignored 1");
        fs::write(dir.path().join("new.dcm"), "new").unwrap();
        assert_eq!(found.recv_timeout(WAIT).unwrap(), "new.dcm");
        stop.store(true, Ordering::Relaxed);
    }

    #[test]
    fn a_new_file_does_not_overtake_what_lay_there() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["1.dcm", "2.dcm"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let (found, stop) = watch(dir.path(), None);
        std::thread::sleep(Duration::from_millis(100));
        fs::write(dir.path().join("3.dcm"), "3").unwrap();
        let names: Vec<String> = (0..3).map(|_| found.recv_timeout(WAIT).unwrap()).collect();
        assert_eq!(names, ["1.dcm", "2.dcm", "3.dcm"]);
        stop.store(true, Ordering::Relaxed);
    }

    #[test]
    fn a_folder_that_goes_and_comes_back_is_said_once_each() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("in");
        fs::create_dir(&folder).unwrap();
        let (found, stop) = watch(&folder, None);
        std::thread::sleep(Duration::from_millis(700));
        fs::remove_dir(&folder).unwrap();
        assert_eq!(found.recv_timeout(WAIT).unwrap(), "lost");
        fs::create_dir(&folder).unwrap();
        assert_eq!(found.recv_timeout(WAIT).unwrap(), "back");
        fs::write(folder.join("x.dcm"), "x").unwrap();
        assert_eq!(found.recv_timeout(WAIT).unwrap(), "x.dcm");
        stop.store(true, Ordering::Relaxed);
    }
}
