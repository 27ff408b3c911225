//! A folder with everything one box needs, and its settings.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::material::{Phantom, Signed, short_folder};

/// A box's place: its state, its sockets, the scanner's folder and its settings. Gone when dropped.
#[derive(Debug)]
pub struct Site {
    dir: TempDir,
    /// Where the pages will be.
    pub listen: SocketAddr,
}

impl Site {
    /// A site for a bundle and a subject's mask and events, on a port that is free now.
    ///
    /// # Panics
    /// Where the folder cannot be written.
    pub fn new(signed: &Signed, mask: &Path, events: &Path) -> Site {
        let dir = short_folder();
        fs::create_dir(dir.path().join("in")).unwrap();
        let listen = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let site = Site { dir, listen };
        let boards = Path::new(env!("CARGO_MANIFEST_DIR")).join("../boards");
        let settings = format!(
            r#"[paths]
state = "state"
runtime = "run"
boards = {boards:?}
[session]
label = "System test"
seed = 7
[scanner]
folder = "in"
tr_ms = 1500
[task]
events = {events:?}
[subject]
mask = {mask:?}
[model]
bundle = {bundle:?}
key = {key:?}
threads = 1
[web]
listen = "{listen}"
"#,
            bundle = signed.bundle,
            key = signed.keys.public,
        );
        fs::write(site.config(), settings).unwrap();
        site
    }

    /// A site for the simulated subject.
    pub fn of_phantom(signed: &Signed, phantom: &Phantom) -> Site {
        let (mask, events) = (
            phantom.site.join("mask.nii"),
            phantom.site.join("events.tsv"),
        );
        Site::new(signed, &mask, &events)
    }

    /// Replaces a part of the settings.
    ///
    /// # Panics
    /// Where the part is not there.
    #[track_caller]
    pub fn change(&self, from: &str, to: &str) {
        let settings = fs::read_to_string(self.config()).unwrap();
        assert!(settings.contains(from), "no {from:?} in\n{settings}");
        fs::write(self.config(), settings.replace(from, to)).unwrap();
    }

    /// The site's folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The settings.
    pub fn config(&self) -> PathBuf {
        self.dir().join("site.toml")
    }

    /// The folder that the scanner exports into.
    pub fn scanner_folder(&self) -> PathBuf {
        self.dir().join("in")
    }

    /// The folder of all that is recorded.
    pub fn state(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// The folders of the recorded sessions, in the order in which they began.
    pub fn sessions(&self) -> Vec<PathBuf> {
        let mut sessions: Vec<PathBuf> = fs::read_dir(self.state().join("sessions"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        sessions.sort();
        sessions
    }

    /// The folder of the only session.
    ///
    /// # Panics
    /// Where there are more or none.
    #[track_caller]
    pub fn session(&self) -> PathBuf {
        let sessions = self.sessions();
        assert_eq!(sessions.len(), 1, "{sessions:?}");
        sessions.into_iter().next().unwrap()
    }
}
