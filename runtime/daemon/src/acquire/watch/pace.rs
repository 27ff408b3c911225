//! How often a folder is looked at.
//!
//! The kernel tells of files that this machine writes, and not of those that others write to a
//! mounted share: there the folder is listed, as often as the run's pace asks for. Twenty looks per
//! volume cost a share little, and a folder in which nothing happens is looked at twice a second.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::statfs::statfs;

/// Twice a second, also where events tell of everything.
pub(super) const SLOWEST: Duration = Duration::from_millis(500);
const QUICKEST: Duration = Duration::from_millis(50);
/// Looks per file.
const LOOKS: u32 = 20;
/// Gaps without a file after which the run is taken to be over.
const GAPS_UNTIL_IDLE: u32 = 10;
/// Files in a row of which no event told, until events are not relied on.
const UNTOLD: u32 = 3;
/// A listing may take this part of the time.
const SHARE_OF_TIME: u32 = 4;

/// Where the folder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mount {
    /// On this machine: events tell.
    Local,
    /// On another one, or behind something that does not tell.
    Remote,
}

/// File systems whose changes are not, or not all, made by this kernel (`statfs(2)`).
const REMOTE: [u32; 16] = [
    0x0000_6969, // NFS
    0x0000_517b, // SMB
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x6573_5546, // FUSE: sshfs, gvfs, virtiofs
    0x0102_1997, // 9P
    0x00c3_6400, // Ceph
    0x5346_414f, // OpenAFS
    0x6b41_4653, // AFS
    0x7375_7245, // Coda
    0x564c,      // NCP
    0x786f_4256, // shared folders of VirtualBox
    0x7c7c_6673, // shared folders of Parallels
    0x0116_1970, // GFS2
    0x7461_636f, // OCFS2
    0x0bd0_0bd0, // Lustre
];

impl Mount {
    /// Looks at the file system; what cannot be looked at is taken to be remote.
    pub(super) fn of(folder: &Path) -> Mount {
        let Ok(found) = statfs(folder) else {
            return Mount::Remote;
        };
        // The kernel's number has 32 bits, whatever the type that it comes in.
        let kind = u32::from_le_bytes({
            let [a, b, c, d, ..] = found.filesystem_type().0.to_le_bytes();
            [a, b, c, d]
        });
        if REMOTE.contains(&kind) {
            Mount::Remote
        } else {
            Mount::Local
        }
    }
}

/// The pace at which files come.
pub(super) struct Pace {
    mount: Mount,
    last: Option<Instant>,
    gap: Option<Duration>,
    untold: u32,
}

impl Pace {
    pub(super) fn new(mount: Mount) -> Pace {
        Pace {
            mount,
            last: None,
            gap: None,
            untold: 0,
        }
    }

    /// Another mount, or the same again.
    pub(super) fn mounted(&mut self, mount: Mount) {
        if self.mount != mount {
            *self = Pace::new(mount);
        }
    }

    /// A new file was seen; `told` says whether an event was the first to say so.
    pub(super) fn saw(&mut self, now: Instant, told: bool) {
        self.untold = if told { 0 } else { self.untold + 1 };
        if let Some(last) = self.last {
            let gap = now.saturating_duration_since(last);
            self.gap = Some(match self.gap {
                // A pause between two runs is no gap between two volumes.
                Some(before) if gap > GAPS_UNTIL_IDLE * before.max(QUICKEST) => before,
                Some(before) => (3 * before + gap) / 4,
                None => gap,
            });
        }
        self.last = Some(now);
    }

    /// How long until the folder is listed again, where events do not suffice; `None` where they do.
    ///
    /// - `took`: the last listing.
    pub(super) fn poll_every(&self, now: Instant, took: Duration) -> Option<Duration> {
        if self.mount == Mount::Local && self.untold < UNTOLD {
            return None;
        }
        let every = match (self.last, self.gap) {
            (Some(last), Some(gap))
                if now.saturating_duration_since(last) <= GAPS_UNTIL_IDLE * gap.max(SLOWEST) =>
            {
                (gap / LOOKS).clamp(QUICKEST, SLOWEST)
            }
            _ => SLOWEST,
        };
        Some(every.max(SHARE_OF_TIME * took))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TR: Duration = Duration::from_millis(1500);
    const NOTHING: Duration = Duration::ZERO;

    fn run(pace: &mut Pace, start: Instant, files: u32, gap: Duration, told: bool) -> Instant {
        for file in 0..files {
            pace.saw(start + file * gap, told);
        }
        start + files.saturating_sub(1) * gap
    }

    #[test]
    fn a_share_is_listed_at_the_pace_of_its_run_and_seldom_otherwise() {
        let mut pace = Pace::new(Mount::Remote);
        let start = Instant::now();
        assert_eq!(pace.poll_every(start, NOTHING), Some(SLOWEST));
        let last = run(&mut pace, start, 10, TR, false);
        assert_eq!(pace.poll_every(last, NOTHING), Some(TR / LOOKS));
        let later = last + 100 * TR;
        assert_eq!(pace.poll_every(later, NOTHING), Some(SLOWEST));
        // The next run is quick from its second file on.
        pace.saw(later, false);
        assert_eq!(pace.poll_every(later + TR, NOTHING), Some(TR / LOOKS));
        // Slices trickle in.
        let last = run(&mut pace, later, 200, Duration::from_millis(5), false);
        assert_eq!(pace.poll_every(last, NOTHING), Some(QUICKEST));
    }

    #[test]
    fn a_slow_listing_is_not_repeated_all_the_time() {
        let mut pace = Pace::new(Mount::Remote);
        let last = run(&mut pace, Instant::now(), 10, TR, false);
        let took = Duration::from_millis(300);
        assert_eq!(pace.poll_every(last, took), Some(4 * took));
    }

    #[test]
    fn a_local_folder_is_listed_only_where_events_prove_not_to_tell() {
        let mut pace = Pace::new(Mount::Local);
        let last = run(&mut pace, Instant::now(), 10, TR, true);
        assert_eq!(pace.poll_every(last, NOTHING), None);
        let last = run(&mut pace, last, UNTOLD, TR, false);
        assert!(pace.poll_every(last, NOTHING).is_some());
        pace.saw(last + TR, true);
        assert_eq!(pace.poll_every(last + TR, NOTHING), None);
    }

    #[test]
    fn a_folder_of_this_machine_is_local_and_a_missing_one_is_looked_at_often() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Mount::of(dir.path()), Mount::Local);
        assert_eq!(Mount::of(&dir.path().join("none")), Mount::Remote);
    }
}
