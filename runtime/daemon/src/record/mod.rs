//! The session's record on disk.
//!
//! ```text
//! <state>/current                     id of the session in progress
//! <state>/sessions/<id>/session.json  label, seed, when it began
//!   session.log                       faults, files put aside and pulses outside of runs, as they came
//!   runs/001/run.log                  the run as it happened: each volume's fate, motion, voxels and
//!                                     timing, pulses, betas of each trial and decode time
//!   runs/001/events.tsv               the events file as it was when the run began
//!   runs/001/fast-{betas,zbetas}.npy  `[trial, voxel]`; rows of skipped trials are NaN; slow-, end- alike
//!   pictures/run001-trial001-fast-*.png  with one .json for each trial and decode time
//!   quarantine/                       scanner files that could not be used, each with its reason
//! ```
//!
//! Logs ([`log`]) are appended entry by entry ([`entry`]) and flushed to the disk before anybody is
//! told; what a crash cuts short is dropped at the next start. Everything else appears whole, by
//! renaming.

pub(crate) mod entry;
pub(crate) mod log;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The file that names the session in progress.
const CURRENT: &str = "current";
const SESSION_FILE: &str = "session.json";
/// What belongs to no run.
pub(crate) const SESSION_LOG: &str = "session.log";
/// An unfinished session older than this is not taken up again.
const MAX_AGE: Duration = Duration::from_secs(12 * 3600);

/// Why the record cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// A file or folder of the record.
    #[error("cannot write or read the record at {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// An entry that cannot be written in the log's form.
    #[error("cannot encode an entry of {path}")]
    Entry {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: postcard::Error,
    },
    /// An entry longer than any real one.
    #[error(
        "an entry of {found} bytes for {path}, expected at most {}",
        log::MAX_ENTRY_BYTES
    )]
    Long {
        /// Which file.
        path: PathBuf,
        /// Its length.
        found: usize,
    },
    /// A log that holds what this version does not write.
    #[error(
        "{path} is damaged, or of another version, after its first {entries} entries: {reason}"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Whole entries before.
        entries: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// A file that does not begin as a log does.
    #[error("{path} is no log of this program and version: it begins with other bytes")]
    Magic {
        /// The file.
        path: PathBuf,
    },
    /// Something that is not the record it should be.
    #[error("{path} is not a session of this program")]
    Session {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

pub(crate) fn at(path: &Path) -> impl Fn(io::Error) -> RecordError {
    let path = path.to_path_buf();
    move |source| RecordError::Io {
        path: path.clone(),
        source,
    }
}

/// `session.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionFile {
    /// Folder name.
    pub(crate) id: String,
    /// What the pages call it.
    pub(crate) label: String,
    /// Seed of all noise.
    pub(crate) seed: u64,
    /// Who lies in the scanner, as the bundle calls them.
    pub(crate) subject: String,
    /// SHA-256 of the mask's voxels.
    pub(crate) mask: String,
    /// When it began, Unix milliseconds.
    pub(crate) started_at_ms: u64,
    /// Version of this program.
    pub(crate) software: String,
    /// When it ended; absent while it goes on.
    pub(crate) ended_at_ms: Option<u64>,
}

/// A session's folder.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    /// The folder.
    pub(crate) dir: PathBuf,
    /// What `session.json` says.
    pub(crate) file: SessionFile,
    /// It was begun by an earlier process.
    pub(crate) resumed: bool,
}

/// What a session is about; another one of these is another session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct About {
    /// What the pages call it.
    pub(crate) label: String,
    /// Who lies in the scanner, as the bundle calls them.
    pub(crate) subject: String,
    /// SHA-256 of the mask's voxels.
    pub(crate) mask: String,
    /// Seed of all noise; drawn where absent.
    pub(crate) seed: Option<u64>,
}

impl Session {
    /// Takes up the session that a crash left open, or begins a new one.
    ///
    /// A session that is about something else (label, subject, mask, seed) is not taken up.
    pub(crate) fn open(state_dir: &Path, about: About) -> Result<Session, RecordError> {
        let current = state_dir.join(CURRENT);
        if let Ok(id) = fs::read_to_string(&current)
            && let Some(session) = Session::resume(state_dir, id.trim(), &about)
        {
            return Ok(session);
        }
        let now = now_ms();
        let seed = match about.seed {
            Some(seed) => seed,
            None => random_seed().map_err(at(Path::new("/dev/urandom")))?,
        };
        let id = format!("{now}-{:08x}", seed & 0xffff_ffff);
        let dir = session_dir(state_dir, &id);
        for folder in ["runs", "pictures", "quarantine"] {
            let folder = dir.join(folder);
            create_private(&folder).map_err(at(&folder))?;
        }
        let file = SessionFile {
            id: id.clone(),
            label: about.label,
            seed,
            subject: about.subject,
            mask: about.mask,
            started_at_ms: now,
            software: env!("CARGO_PKG_VERSION").into(),
            ended_at_ms: None,
        };
        write_json(&dir.join(SESSION_FILE), &file)?;
        write_whole(&current, id.as_bytes())?;
        Ok(Session {
            dir,
            file,
            resumed: false,
        })
    }

    fn resume(state_dir: &Path, id: &str, about: &About) -> Option<Session> {
        let dir = named_session(state_dir, id)?;
        let file: SessionFile = read_json(&dir.join(SESSION_FILE)).ok()?;
        let age = Duration::from_millis(now_ms().saturating_sub(file.started_at_ms));
        if file.ended_at_ms.is_some() || age >= MAX_AGE {
            return None;
        }
        let same = file.label == about.label
            && file.subject == about.subject
            && file.mask == about.mask
            && about.seed.is_none_or(|seed| seed == file.seed);
        if !same {
            tracing::warn!(session = %file.id, "the open session is about something else, another one begins");
            return None;
        }
        Some(Session {
            dir,
            file,
            resumed: true,
        })
    }

    /// The folder of a run, created where it is not there.
    pub(crate) fn run_dir(&self, run: u32) -> Result<PathBuf, RecordError> {
        let dir = self.dir.join("runs").join(format!("{run:03}"));
        create_private(&dir).map_err(at(&dir))?;
        Ok(dir)
    }

    /// Numbers of the runs that are on record, ascending.
    pub(crate) fn runs(&self) -> Result<Vec<u32>, RecordError> {
        let dir = self.dir.join("runs");
        let mut runs = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let name = entry.map_err(at(&dir))?.file_name();
            runs.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        runs.sort_unstable();
        Ok(runs)
    }
}

/// Ends the session in progress, where there is one: the next start begins another.
///
/// Only who was asked to stop may end a session; a role that dies or is killed leaves it open.
pub(crate) fn end_session(state_dir: &Path) -> Result<(), RecordError> {
    let current = state_dir.join(CURRENT);
    let Ok(id) = fs::read_to_string(&current) else {
        return Ok(());
    };
    if let Some(dir) = named_session(state_dir, id.trim())
        && let Ok(mut file) = read_json::<SessionFile>(&dir.join(SESSION_FILE))
    {
        file.ended_at_ms = Some(now_ms());
        write_json(&dir.join(SESSION_FILE), &file)?;
    }
    fs::remove_file(&current).map_err(at(&current))
}

/// The folder of a session whose id was read from a file: a name of our own making, or none.
fn named_session(state_dir: &Path, id: &str) -> Option<PathBuf> {
    let plain = !id.is_empty() && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    plain.then(|| session_dir(state_dir, id))
}

/// The folder of a session.
pub(crate) fn session_dir(state_dir: &Path, id: &str) -> PathBuf {
    state_dir.join("sessions").join(id)
}

/// Unix time, milliseconds.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn random_seed() -> io::Result<u64> {
    use std::io::Read;
    let mut bytes = [0_u8; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    // TOML and JSON readers hold 63 bits.
    Ok(u64::from_le_bytes(bytes) >> 1)
}

/// Creates a folder, and those above it, that only this user can look into.
pub(crate) fn create_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
}

/// The folder that a file lies in; of a bare name that is the present one.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Writes a file that appears whole or not at all, and is on the disk when this returns.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(folder_of(path))?.sync_all()
    };
    write().map_err(at(path))
}

/// Writes JSON as [`write_whole`] does.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), RecordError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|source| RecordError::Session {
        path: path.into(),
        source,
    })?;
    bytes.push(b'\n');
    write_whole(path, &bytes)
}

/// Reads JSON that this program wrote.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, RecordError> {
    let bytes = fs::read(path).map_err(at(path))?;
    serde_json::from_slice(&bytes).map_err(|source| RecordError::Session {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(label: &str) -> About {
        About {
            label: label.into(),
            subject: "subj01".into(),
            mask: "m".into(),
            seed: None,
        }
    }

    #[test]
    fn a_session_that_was_not_ended_is_taken_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let first = Session::open(dir.path(), about("One")).unwrap();
        let again = Session::open(dir.path(), about("One")).unwrap();
        assert!(!first.resumed && again.resumed);
        assert_eq!(first.file, again.file);
        end_session(dir.path()).unwrap();
        let third = Session::open(dir.path(), about("One")).unwrap();
        assert!(!third.resumed);
    }

    #[test]
    fn a_bare_name_lies_in_the_present_folder() {
        assert_eq!(folder_of(Path::new("motion.json")), Path::new("."));
        assert_eq!(folder_of(Path::new("out/motion.json")), Path::new("out"));
        assert_eq!(folder_of(Path::new("/motion.json")), Path::new("/"));
    }

    #[test]
    fn an_open_session_about_somebody_else_is_not_taken_up() {
        let dir = tempfile::tempdir().unwrap();
        Session::open(dir.path(), about("One")).unwrap();
        let other = About {
            subject: "subj02".into(),
            ..about("One")
        };
        assert!(!Session::open(dir.path(), other).unwrap().resumed);
    }
}
