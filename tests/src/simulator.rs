//! `afterimage simulate` beside a daemon: its files, its truth and its end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::SystemTime;

use serde_json::Value;
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::material::short_folder;
use crate::program::command;

/// A simulated scanner that works; gone when dropped.
#[derive(Debug)]
pub struct Simulator {
    child: Child,
    truth: TempDir,
}

impl Simulator {
    /// Starts it.
    ///
    /// - `into`: the folder that it exports into.
    /// - `words`: further arguments.
    /// - `paths`: further arguments that take a path.
    pub fn start(into: &Path, words: &[&str], paths: &[(&str, &Path)]) -> Simulator {
        let truth = short_folder();
        let mut simulate = command("afterimage");
        simulate.arg("simulate").args(words);
        for (name, path) in paths {
            simulate.arg(name).arg(path);
        }
        simulate.arg("--into").arg(into);
        simulate.arg("--truth").arg(truth.path());
        let child = simulate.stderr(Stdio::null()).spawn().unwrap();
        Simulator { child, truth }
    }

    /// Waits until it has sent everything.
    ///
    /// # Panics
    /// As [`Daemon::wait`] does, and where it ends with an error.
    #[track_caller]
    pub fn finish(&mut self, daemon: &mut Daemon<'_>) {
        let status = daemon.wait("the scanner's end", |_| self.child.try_wait().unwrap());
        assert!(status.success(), "the simulator ended with {status}");
    }

    /// What it has written down before its first volume.
    ///
    /// # Panics
    /// Where it has not come so far.
    pub fn truth(&self) -> Value {
        serde_json::from_slice(&fs::read(self.truth_file()).unwrap()).unwrap()
    }

    /// When it wrote that down, Unix milliseconds: its clock starts at once, or after its `--wait`.
    ///
    /// # Panics
    /// Where it has not come so far.
    pub fn zero_ms(&self) -> f64 {
        let written = fs::metadata(self.truth_file()).unwrap().modified().unwrap();
        let since = written.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        since.as_secs_f64() * 1e3
    }

    fn truth_file(&self) -> PathBuf {
        self.truth.path().join("truth.json")
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        // Already gone, most likely.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
