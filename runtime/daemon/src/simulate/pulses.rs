//! The scanner's trigger line: a pseudo-terminal whose other end is linked to where it is wanted.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{ttyname, write};

use super::pace::Clock;
use super::timeline::Pulse;

/// A line that is told to stop does so within this.
const NAP: Duration = Duration::from_millis(50);

/// Why there is no line.
#[derive(Debug, thiserror::Error)]
pub(super) enum PulseError {
    /// The pseudo-terminal.
    #[error("no pseudo-terminal can be opened")]
    Open(#[source] Errno),
    /// The link.
    #[error("cannot link the pulse line at {path}")]
    Link {
        /// Where.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Something that is not ours.
    #[error("{path} is there and is no link; --pulses replaces only links")]
    Taken {
        /// Where.
        path: PathBuf,
    },
    /// The line went away.
    #[error("a pulse cannot be sent")]
    Send(#[source] Errno),
}

/// Both ends of the line; the link goes with it.
#[derive(Debug)]
pub(super) struct PulseLine {
    master: OwnedFd,
    /// Kept open: the last to close it would undo its raw mode.
    _slave: OwnedFd,
    link: PathBuf,
}

impl PulseLine {
    /// Opens a line and links it at `link`, over a link that an earlier one left.
    pub(super) fn open(link: &Path) -> Result<PulseLine, PulseError> {
        let io = |source| PulseError::Link {
            path: link.into(),
            source,
        };
        match std::fs::symlink_metadata(link) {
            Ok(found) if !found.file_type().is_symlink() => {
                return Err(PulseError::Taken { path: link.into() });
            }
            Ok(_) => std::fs::remove_file(link).map_err(io)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        let ends = openpty(None, None).map_err(PulseError::Open)?;
        // As a serial line: bytes as they come, no echo.
        let mut mode = tcgetattr(&ends.slave).map_err(PulseError::Open)?;
        cfmakeraw(&mut mode);
        tcsetattr(&ends.slave, SetArg::TCSANOW, &mode).map_err(PulseError::Open)?;
        // Nobody who does not read holds the scanner up.
        let flags = FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
        fcntl(&ends.master, flags).map_err(PulseError::Open)?;
        let name = ttyname(&ends.slave).map_err(PulseError::Open)?;
        std::os::unix::fs::symlink(name, link).map_err(io)?;
        Ok(PulseLine {
            master: ends.master,
            _slave: ends.slave,
            link: link.into(),
        })
    }

    /// Sends each pulse at its time, until all are sent or `stop` is set.
    ///
    /// Returns how many found the line full, because nobody reads it.
    pub(super) fn send(
        &self,
        pulses: &[Pulse],
        clock: &Clock,
        stop: &AtomicBool,
    ) -> Result<usize, PulseError> {
        let mut unread = 0;
        for pulse in pulses.iter().filter(|pulse| pulse.sent) {
            let moment = clock.at(pulse.at_s);
            loop {
                if stop.load(Ordering::Relaxed) {
                    return Ok(unread);
                }
                let left = moment.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                std::thread::sleep(left.min(NAP));
            }
            match write(self.master.as_fd(), &[pulse.byte]) {
                Ok(_) => {}
                Err(Errno::EAGAIN) => unread += 1,
                Err(error) => return Err(PulseError::Send(error)),
            }
        }
        Ok(unread)
    }
}

impl Drop for PulseLine {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.link);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::super::timeline::PulseKind;
    use super::*;

    fn pulse(at_s: f64, byte: u8) -> Pulse {
        Pulse {
            at_s,
            byte,
            kind: PulseKind::Volume,
            series: 1,
            volume: 1,
            sent: byte != b'x',
        }
    }

    #[test]
    fn bytes_come_through_the_link_raw_and_lost_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("trigger");
        std::os::unix::fs::symlink("/nowhere", &link).unwrap();
        let line = PulseLine::open(&link).unwrap();
        let mut reader = std::fs::File::open(&link).unwrap();
        let clock = Clock::starting_in(Duration::ZERO, 1000.0);
        // A newline, an interrupt and an end of file are bytes like others.
        let sent = [b'5', b'\n', 3, b'x', 4, b'\r'];
        let pulses: Vec<Pulse> = sent.iter().map(|byte| pulse(0.5, *byte)).collect();
        let stop = AtomicBool::new(false);
        assert_eq!(line.send(&pulses, &clock, &stop).unwrap(), 0);
        let mut found = [0; 5];
        reader.read_exact(&mut found).unwrap();
        assert_eq!(found, [b'5', b'\n', 3, 4, b'\r']);
        drop(line);
        assert!(std::fs::symlink_metadata(&link).is_err());
    }

    #[test]
    fn line_that_nobody_reads_is_counted_and_holds_nothing_up() {
        let dir = tempfile::tempdir().unwrap();
        let line = PulseLine::open(&dir.path().join("trigger")).unwrap();
        let clock = Clock::starting_in(Duration::ZERO, 1000.0);
        let pulses = vec![pulse(0.0, b'5'); 100_000];
        let unread = line.send(&pulses, &clock, &AtomicBool::new(false)).unwrap();
        assert!(unread > 0 && unread < pulses.len());
    }

    #[test]
    fn file_in_the_links_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trigger");
        std::fs::write(&path, "kept").unwrap();
        assert!(matches!(
            PulseLine::open(&path),
            Err(PulseError::Taken { .. })
        ));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
    }
}
