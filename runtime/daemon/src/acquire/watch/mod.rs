//! The folder that the scanner exports into.
//!
//! On a local disk inotify tells of files that were closed or moved in, at any depth; a share that
//! others write to is listed at the run's pace ([`pace`]). A scan twice a second finds what either
//! missed. A file is handed on once it is complete, and again whenever it has changed since:
//!
//! - it was closed after writing, or moved in under its name;
//! - or nothing has changed it for a while. How long depends on what is known: a file as long as the
//!   last complete one, and written to its end, needs two looks; one that its writer still holds
//!   open needs longer. A `.nii` that grows with the run is handed on after every piece of it.
//!
//! For that at most the last bytes of a file are read, and once.

mod events;
mod pace;

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use self::events::{Events, Told};
use self::pace::{Mount, Pace, SLOWEST};
use super::quarantine;
use super::receive::Spooled;

/// File times come from a clock that ticks every few milliseconds.
const CLOCK_SLACK_MS: u64 = 20;
/// How often the whole folder is looked at.
const SCAN_EVERY: Duration = SLOWEST;
/// What lies in the folder at the beginning is known after so many scans.
const SCANS_UNTIL_KNOWN: u32 = 2;
/// How often files that are not complete are looked at, and how many of them at a time.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const LOOKS: usize = 64;
/// How long nothing may have changed a file that is complete.
const STILL: Duration = Duration::from_millis(450);
/// The same for one that is as long as the last one and written to its end.
const STILL_ALIKE: Duration = Duration::from_millis(40);
/// The same for one that its writer holds open. Servers of shares close a file up to a second after
/// their client has.
const STILL_OPEN: Duration = Duration::from_millis(1500);
/// The same where it is open and as long as the last one.
const STILL_OPEN_ALIKE: Duration = Duration::from_millis(150);
/// The same for a `.nii` that may go on growing.
const STILL_GROWING: Duration = Duration::from_millis(100);
/// What is read of a file's end.
const END_BYTES: usize = 512;
/// A file that was handed on so long ago is not looked at with every scan.
const SETTLED: Duration = Duration::from_secs(60);
const SETTLED_SCANS: u64 = 10;
/// Folders below the watched one that are looked into.
const MAX_DEPTH: usize = 4;
/// Files that are remembered; beyond that the folder is not one run's export.
const MAX_FILES: usize = 500_000;

/// A file that is complete.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Hash of its name, length and time of change: stands for the file wherever it is kept. Of an
    /// object that was received, the hash of its instance UID.
    pub(crate) id: [u8; 16],
    /// Its length.
    pub(crate) len_bytes: u64,
    /// When it was last changed, Unix milliseconds.
    pub(crate) changed_ms: u64,
    /// When it was noticed.
    pub(crate) noticed: Instant,
    /// Its place among the received objects, where it is one.
    pub(in crate::acquire) spooled: Option<Spooled>,
}

impl Found {
    /// Its name as it may be shown.
    pub(crate) fn plain_name(&self) -> String {
        match &self.spooled {
            Some(spooled) => spooled.name(),
            None => quarantine::plain_name(&self.path),
        }
    }

    /// What became of it is on record: a received object is removed, a file of the folder is the
    /// scanner's and stays.
    pub(crate) fn give_up(&self) {
        if let Some(spooled) = &self.spooled {
            spooled.settle(self);
        }
    }
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

impl Stamp {
    fn of(metadata: &Metadata) -> Stamp {
        Stamp {
            len: metadata.len(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000
                + i128::from(metadata.mtime_nsec()),
        }
    }
}

/// How a file came to be looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sight {
    /// It was closed after writing, or moved in.
    Closed,
    /// Its writer is at it.
    Changing,
    /// It was seen in a list.
    Listed,
}

struct Seen {
    stamp: Stamp,
    /// Since when it is as it is.
    since: Instant,
    handed_on: bool,
    /// Its writer was at it and has not closed it.
    open: bool,
    /// Whether its end is written, once that was looked at.
    ended: Option<bool>,
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
    events: Option<Events>,
    pace: Pace,
    seen: HashMap<PathBuf, Seen>,
    /// Files that are not complete.
    pending: BTreeSet<PathBuf>,
    /// The folder of the newest file, and the file that was handed on last.
    active: PathBuf,
    last: Option<PathBuf>,
    /// Length of the last complete file, by the end of its name.
    lengths: HashMap<OsString, u64>,
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
            pace: Pace::new(Mount::of(&folder)),
            active: folder.clone(),
            folder,
            since_ms,
            events: None,
            seen: HashMap::new(),
            pending: BTreeSet::new(),
            last: None,
            lengths: HashMap::new(),
            ignored: 0,
            scans: 0,
            full: Fullness::No,
            lost: false,
        }
    }

    /// Runs until `stop`; `tell` may wait, files are found again by the next scan.
    pub(crate) fn run(mut self, stop: &Arc<AtomicBool>, mut tell: impl FnMut(Notice) -> bool) {
        let mut next_scan = Instant::now();
        let mut next_poll = None;
        let mut took = Duration::ZERO;
        let mut first = true;
        // Until what lies there already is known, new files wait as well: overtaken volumes would be
        // taken for lost.
        let mut scans_to_go = SCANS_UNTIL_KNOWN;
        let mut found = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            if self.events.is_none() {
                self.events = Events::new(&self.folder);
            }
            let mut until = next_poll.map_or(next_scan, |poll: Instant| poll.min(next_scan));
            if !self.pending.is_empty() {
                until = until.min(Instant::now() + LOOK_EVERY);
            }
            let wait = until.saturating_duration_since(Instant::now());
            if self.wait_for_events(wait, &mut found) {
                next_scan = Instant::now();
            }
            self.look_at_pending(&mut found);
            let began = Instant::now();
            if began >= next_scan {
                match self.scan(&mut found) {
                    Ok(()) => {
                        scans_to_go = scans_to_go.saturating_sub(1);
                        if std::mem::take(&mut self.lost) {
                            self.pace.mounted(Mount::of(&self.folder));
                            if !tell(Notice::FolderBack) {
                                return;
                            }
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
                        self.events = None;
                        scans_to_go = SCANS_UNTIL_KNOWN;
                        if !std::mem::replace(&mut self.lost, true)
                            && !tell(Notice::FolderLost(error.to_string()))
                        {
                            return;
                        }
                    }
                }
                took = began.elapsed();
                next_scan = Instant::now() + SCAN_EVERY.max(took);
            } else if next_poll.is_some_and(|poll| began >= poll) {
                self.poll(&mut found);
                took = began.elapsed();
            }
            if next_poll.is_none_or(|poll| began >= poll) {
                let now = Instant::now();
                next_poll = self.pace.poll_every(now, took).map(|every| now + every);
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

    /// Waits and looks at what was told; whether the folder must be scanned now.
    fn wait_for_events(&mut self, wait: Duration, found: &mut Vec<Found>) -> bool {
        let Some(events) = self.events.as_mut() else {
            std::thread::sleep(wait);
            return false;
        };
        events.wait(wait);
        let mut scan = false;
        for told in events.read() {
            match told {
                Told::Closed(path) => {
                    self.look(&path, Sight::Closed, found);
                }
                Told::Changing(path) => {
                    self.look(&path, Sight::Changing, found);
                }
                Told::Folder(folder) => self.enter(folder, found),
                Told::Overflow => scan = true,
                Told::Gone => {
                    // The folder was removed or unmounted; the scan says so.
                    self.events = None;
                    scan = true;
                }
            }
        }
        scan
    }

    /// Looks into a folder that has just appeared: its first files may be older than its watch.
    fn enter(&mut self, folder: PathBuf, found: &mut Vec<Found>) {
        let below = folder.strip_prefix(&self.folder);
        let depth = below.map_or(usize::MAX, |below| below.components().count());
        // One that is gone again needs no look.
        let _ = self.list(folder, depth, found);
    }

    /// Looks at the files that are not complete yet.
    fn look_at_pending(&mut self, found: &mut Vec<Found>) {
        let looks: Vec<PathBuf> = self.pending.iter().take(LOOKS).cloned().collect();
        for path in looks {
            if !self.look(&path, Sight::Listed, found) {
                self.pending.remove(&path);
            }
        }
    }

    /// Looks for new files where the newest one is, and whether the last one has changed.
    fn poll(&mut self, found: &mut Vec<Found>) {
        if let Some(last) = self.last.clone() {
            self.look(&last, Sight::Listed, found);
        }
        for entry in fs::read_dir(&self.active).into_iter().flatten().flatten() {
            let path = entry.path();
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            if is_file && !self.seen.contains_key(&path) {
                self.look(&path, Sight::Listed, found);
            }
        }
    }

    fn scan(&mut self, found: &mut Vec<Found>) -> std::io::Result<()> {
        if self.events.as_ref().is_some_and(Events::is_stale) {
            self.events = Events::new(&self.folder);
            self.pace.mounted(Mount::of(&self.folder));
        }
        self.list(self.folder.clone(), 0, found)?;
        // Files that are gone need no memory, as long as there are few: a share that goes and comes back
        // brings its old files along, and they are not new.
        let scan = self.scans;
        let few = self.seen.len() < MAX_FILES / 2;
        self.seen
            .retain(|_, seen| seen.scan == scan || (few && seen.handed_on));
        self.pending.retain(|path| self.seen.contains_key(path));
        self.scans += 1;
        Ok(())
    }

    /// Looks at every file of a folder and those below it.
    fn list(
        &mut self,
        folder: PathBuf,
        depth: usize,
        found: &mut Vec<Found>,
    ) -> std::io::Result<()> {
        let mut folders = vec![(folder, depth)];
        while let Some((folder, depth)) = folders.pop() {
            if depth > MAX_DEPTH {
                continue;
            }
            // Watched first: a file that comes while the list is read is seen twice, not missed.
            if depth > 0
                && let Some(events) = self.events.as_mut()
            {
                events.add(&folder);
            }
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
                let path = entry.path();
                if kind.is_dir() {
                    folders.push((path, depth + 1));
                } else if kind.is_file() && !self.is_settled(&path) {
                    self.look(&path, Sight::Listed, found);
                }
            }
        }
        Ok(())
    }

    /// Whether a file was handed on long ago and need not be looked at this time.
    fn is_settled(&mut self, path: &Path) -> bool {
        let scan = self.scans;
        let Some(seen) = self.seen.get_mut(path) else {
            return false;
        };
        let settled =
            seen.handed_on && seen.since.elapsed() > SETTLED && !scan.is_multiple_of(SETTLED_SCANS);
        if settled {
            seen.scan = scan;
        }
        settled
    }

    /// Looks at one file and hands it on if it is complete and new; whether it is there.
    fn look(&mut self, path: &Path, sight: Sight, found: &mut Vec<Found>) -> bool {
        if is_temporary(path) {
            return false;
        }
        let Ok(metadata) = fs::metadata(path) else {
            return false;
        };
        if !metadata.is_file() {
            return false;
        }
        let (stamp, now) = (Stamp::of(&metadata), Instant::now());
        // A file that was linked in has no writer.
        let open = sight == Sight::Changing && metadata.nlink() == 1;
        let changed = metadata.ctime() * 1000 + metadata.ctime_nsec() / 1_000_000;
        let changed_ms = u64::try_from(changed).unwrap_or(0);
        let scan = self.scans;
        match self.seen.get_mut(path) {
            Some(seen) if seen.stamp == stamp => {
                seen.scan = scan;
                if seen.handed_on {
                    return true;
                }
                if sight == Sight::Changing {
                    seen.open = open;
                    return true;
                }
            }
            known => {
                let first_sight = known.is_none();
                let open = open || (sight == Sight::Listed && known.is_some_and(|seen| seen.open));
                if first_sight && self.seen.len() >= MAX_FILES {
                    if self.full == Fullness::No {
                        self.full = Fullness::Now;
                    }
                    return true;
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
                        since: now,
                        handed_on: ignore,
                        open,
                        ended: None,
                        scan,
                    },
                );
                if ignore {
                    return true;
                }
                if first_sight && scan > 0 {
                    self.pace.saw(now, sight != Sight::Listed);
                    self.active = path.parent().unwrap_or(&self.folder).into();
                }
            }
        }
        if sight == Sight::Closed || self.is_still(path, now) {
            self.hand_on(path, changed_ms, found);
        } else {
            self.pending.insert(path.into());
        }
        true
    }

    /// Whether nothing has changed a file for long enough.
    fn is_still(&mut self, path: &Path, now: Instant) -> bool {
        let Some(seen) = self.seen.get_mut(path) else {
            return false;
        };
        let still = now.saturating_duration_since(seen.since);
        let end = path.extension().unwrap_or_default();
        if end.eq_ignore_ascii_case("nii") {
            return still >= STILL_GROWING;
        }
        let (alike, other) = if seen.open {
            (STILL_OPEN_ALIKE, STILL_OPEN)
        } else {
            (STILL_ALIKE, STILL)
        };
        if still >= other {
            return true;
        }
        still >= alike
            && self.lengths.get(end) == Some(&seen.stamp.len)
            && *seen
                .ended
                .get_or_insert_with(|| end_is_written(path, seen.stamp.len))
    }

    fn hand_on(&mut self, path: &Path, changed_ms: u64, found: &mut Vec<Found>) {
        self.pending.remove(path);
        let Some(seen) = self.seen.get_mut(path) else {
            return;
        };
        seen.handed_on = true;
        seen.open = false;
        let stamp = seen.stamp;
        let end: &OsStr = path.extension().unwrap_or_default();
        let known = self.lengths.len();
        if let Some(len) = self.lengths.get_mut(end) {
            *len = stamp.len;
        } else if known < LOOKS {
            // Not one per name where names have no ends.
            self.lengths.insert(end.into(), stamp.len);
        }
        self.last = Some(path.into());
        found.push(Found {
            path: path.into(),
            id: file_id(&self.folder, path, stamp),
            len_bytes: stamp.len,
            changed_ms,
            noticed: Instant::now(),
            spooled: None,
        });
    }
}

/// Names of files that their writer will rename.
fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let ends = [b".tmp".as_slice(), b".part", b".filepart", b"~"];
    name.starts_with(b".") || ends.iter().any(|end| name.ends_with(end))
}

/// Whether a file's last bytes are written. A writer that makes room first leaves zeros there, and
/// so may an image with a dark corner: that one only has to be still for longer.
fn end_is_written(path: &Path, len: u64) -> bool {
    let mut end = [0_u8; END_BYTES];
    let from = len.saturating_sub(END_BYTES as u64);
    let read = File::open(path).and_then(|file| file.read_at(&mut end, from));
    read.is_ok_and(|read| end[..read].iter().any(|byte| *byte != 0))
}

#[cfg(test)]
mod tests;
