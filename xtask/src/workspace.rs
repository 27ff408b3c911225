//! Where the workspace lies and how its programs are started.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// What goes wrong when another program is started or fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// The program could not be started at all.
    #[error("cannot start `{program}`")]
    NotStarted {
        /// The program, as it would be typed.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// The program ended with something other than success.
    #[error("`{program}` ended with {status}")]
    Failed {
        /// The program with its arguments.
        program: String,
        /// How it ended.
        status: ExitStatus,
    },
}

impl CommandError {
    /// The exit code to pass on: the program's own where it had one.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NotStarted { .. } => 1,
            Self::Failed { status, .. } => status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .filter(|code| *code != 0)
                .unwrap_or(1),
        }
    }
}

/// The root of the workspace.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// The build folder: `CARGO_TARGET_DIR` where set, `target/` otherwise.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) if !dir.is_empty() => root().join(dir),
        _ => root().join("target"),
    }
}

/// A program that `cargo build` has just made.
pub(crate) fn built(program: &str) -> PathBuf {
    target_dir().join("debug").join(program)
}

/// The cargo that runs us, or the one on the path.
pub(crate) fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// Runs a program to its end, its output going where ours goes.
pub(crate) fn run(command: &mut Command) -> Result<(), CommandError> {
    let status = command
        .status()
        .map_err(|source| CommandError::NotStarted {
            program: spelled(command),
            source,
        })?;
    if status.success() {
        return Ok(());
    }
    Err(CommandError::Failed {
        program: spelled(command),
        status,
    })
}

/// A command as it would be typed; the program without its folder.
pub(crate) fn spelled(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(command.get_program());
    std::iter::once(program)
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}
