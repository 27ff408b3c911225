//! What the kernel tells of a folder and those below it (inotify).

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

/// Folders that are watched; the scan looks into the others.
const MAX_FOLDERS: usize = 1024;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// A file was closed after writing, or moved in.
    Closed(PathBuf),
    /// A file was created or written to.
    Changing(PathBuf),
    /// A folder was created or moved in.
    Folder(PathBuf),
    /// Events were lost.
    Overflow,
    /// The watched folder is gone.
    Gone,
}

/// The watched folders.
pub(super) struct Events {
    inotify: Inotify,
    root: PathBuf,
    root_is: (u64, u64),
    folders: HashMap<WatchDescriptor, PathBuf>,
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

impl Events {
    /// Begins with one folder; `None` where the kernel has no watch for it.
    pub(super) fn new(root: &Path) -> Option<Events> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok()?;
        let mut events = Events {
            inotify,
            root: root.into(),
            root_is: identity(root)?,
            folders: HashMap::new(),
        };
        events.add(root).then_some(events)
    }

    /// Watches one more folder; whether it is watched now.
    pub(super) fn add(&mut self, folder: &Path) -> bool {
        if self.folders.len() >= MAX_FOLDERS {
            return false;
        }
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ONLYDIR;
        match self.inotify.add_watch(folder, flags) {
            // The same folder has the same descriptor, also under a new name.
            Ok(descriptor) => {
                self.folders.insert(descriptor, folder.into());
                true
            }
            Err(_) => false,
        }
    }

    /// Whether the folder's path leads to another one than when the watch began, as after a mount.
    pub(super) fn is_stale(&self) -> bool {
        identity(&self.root).is_some_and(|now| now != self.root_is)
    }

    /// Waits until something happened, or for that long.
    pub(super) fn wait(&self, wait: Duration) {
        // Rounded up, so that the wait is over when this returns.
        let millis = u16::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        // A signal is no reason to wait longer.
        let _ = poll(&mut fds, PollTimeout::from(millis));
    }

    /// What happened since the last time.
    pub(super) fn read(&mut self) -> Vec<Told> {
        let mut told = Vec::new();
        for event in self.inotify.read_events().unwrap_or_default() {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                told.push(Told::Overflow);
                continue;
            }
            if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                if self.folders.remove(&event.wd).as_deref() == Some(&*self.root) {
                    told.push(Told::Gone);
                }
                continue;
            }
            let (Some(folder), Some(name)) = (self.folders.get(&event.wd), event.name) else {
                continue;
            };
            let path = folder.join(name);
            let arrived = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
            let whole = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO;
            told.push(if event.mask.contains(AddWatchFlags::IN_ISDIR) {
                if !event.mask.intersects(arrived) {
                    continue;
                }
                Told::Folder(path)
            } else if event.mask.intersects(whole) {
                Told::Closed(path)
            } else {
                Told::Changing(path)
            });
        }
        // A writer tells of every piece.
        told.dedup();
        told
    }
}
