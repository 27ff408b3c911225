//! Files that arrive in the watched folder one after the other, as a scanner's export does.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between two volumes: fast, yet slow enough for two cores that do other things as well.
pub const CLOCK: Duration = Duration::from_millis(60);

/// The files of a folder, in the order of their names.
pub fn files_of(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

/// The name of a file, which must be plain text.
pub fn name_of(file: &Path) -> &str {
    file.file_name().unwrap().to_str().unwrap()
}

/// Puts a file into the watched folder: under another name first, then renamed.
pub fn deliver(bytes: &[u8], into: &Path, name: &str) {
    let temporary = into.join(format!(".{name}.part"));
    fs::write(&temporary, bytes).unwrap();
    fs::rename(temporary, into.join(name)).unwrap();
}

/// Keeps the pace of a fast scanner.
#[derive(Debug)]
pub struct Scanner {
    into: PathBuf,
    next: Instant,
}

impl Scanner {
    /// A scanner that exports into a folder.
    pub fn new(into: &Path) -> Scanner {
        Scanner {
            into: into.into(),
            next: Instant::now(),
        }
    }

    /// Sends one file under its own name, at its time.
    pub fn send(&mut self, file: &Path) {
        self.send_as(&fs::read(file).unwrap(), name_of(file));
    }

    /// Sends some bytes under a name, at their time.
    pub fn send_as(&mut self, bytes: &[u8], name: &str) {
        self.next = self.next.max(Instant::now() - CLOCK) + CLOCK;
        std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
        deliver(bytes, &self.into, name);
    }

    /// Sends files one after the other.
    pub fn send_all(&mut self, files: &[PathBuf]) {
        for file in files {
            self.send(file);
        }
    }
}
