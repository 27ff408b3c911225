//! The built programs, and how one is run to its end.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long any command of these tests may take.
pub const COMMAND_WITHIN: Duration = Duration::from_secs(120);

/// The built program of that name, beside the folder of the test executable.
///
/// # Panics
/// Where the workspace was not built.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    // target/debug/deps/<test>
    let built = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(
        built.is_file(),
        "{} is not there: run `cargo build --workspace` first",
        built.display()
    );
    built
}

/// A command with that program, whose settings no variable of the surroundings changes.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(program(name));
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("AFTERIMAGE__") {
            command.env_remove(variable);
        }
    }
    command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
    command
}

/// A program that ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it said.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Ended {
    /// The exit code; a signal has none.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Itself, where it succeeded.
    ///
    /// # Panics
    /// With all that the program said, where it did not.
    #[track_caller]
    pub fn succeeded(self) -> Ended {
        assert!(self.status.success(), "{self:#?}");
        self
    }

    /// Itself, where it ended with `code` and standard error names every one of `words`.
    ///
    /// # Panics
    /// With all that the program said, where it did not.
    #[track_caller]
    pub fn refused(self, code: i32, words: &[&str]) -> Ended {
        assert_eq!(self.code(), Some(code), "{self:#?}");
        for word in words {
            assert!(
                self.stderr.contains(word),
                "expected {word:?} in standard error:\n{}",
                self.stderr
            );
        }
        assert!(
            !self.stderr.contains("panicked"),
            "bad input is never a panic:\n{}",
            self.stderr
        );
        self
    }
}

/// Runs a program to its end.
///
/// # Panics
/// Where it is not there or takes longer than [`COMMAND_WITHIN`].
#[track_caller]
pub fn run(name: &str, arguments: &[&dyn AsRef<OsStr>]) -> Ended {
    let mut command = command(name);
    command.args(arguments.iter().map(|argument| argument.as_ref()));
    finish(command)
}

/// Runs a prepared command to its end.
///
/// # Panics
/// Where it takes longer than [`COMMAND_WITHIN`].
#[track_caller]
pub fn finish(mut command: Command) -> Ended {
    // Files and no pipes: a child that is left over cannot keep us waiting.
    let said = tempfile::tempdir().unwrap();
    let (out, err) = (said.path().join("out"), said.path().join("err"));
    let mut child = command
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .spawn()
        .unwrap();
    let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Ended {
                status,
                stdout: read(&out),
                stderr: read(&err),
            };
        }
        if started.elapsed() > COMMAND_WITHIN {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!(
                "{command:?} did not end within {COMMAND_WITHIN:?}:\n{}{}",
                read(&out),
                read(&err)
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
