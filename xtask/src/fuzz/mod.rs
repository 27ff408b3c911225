//! `cargo xtask fuzz`: runs the targets of `fuzz/` from seeds made here, within limits of memory and time.
//!
//! They need a nightly toolchain and `cargo-fuzz`, so they are a package of their own outside the workspace. What a
//! run finds is kept in `target/fuzz/corpus`, what breaks a target in `target/fuzz/artifacts`.

mod seeds;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::workspace::{self, CommandError};

/// Every target, in the order in which they run.
pub(crate) const TARGETS: &[&str] = &[
    "torch_pickle",
    "torch_zip",
    "torch_legacy",
    "safetensors",
    "manifest",
    "vocabulary",
    "pool",
    "trigger_bytes",
    "dicom",
    "nifti",
];

/// Resident memory of a target, the sanitizer's own (about 100 MiB) included.
const MAX_RESIDENT_MIB: u32 = 512;
/// One allocation: the readers' blocks have 1 MiB, and no input is longer.
const MAX_ALLOCATION_MIB: u32 = 64;
/// Time for one input.
const MAX_INPUT_SECONDS: u32 = 5;
/// Inputs of each target in a check, and the most time they may take on a slow machine.
const BRIEF_RUNS: u32 = 2_000;
const BRIEF_SECONDS: u32 = 20;
/// What a check keeps, apart from what longer runs found.
const BRIEF_CORPUS: &str = "brief";
/// Longest input.
const MAX_INPUT_BYTES: u32 = 32_768;

/// What to fuzz, and for how long.
#[derive(clap::Args)]
pub(crate) struct Request {
    /// Targets; all where none is named.
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// What `cargo xtask test` does: every target from its seeds, the same mutations each time.
    #[arg(long, conflicts_with_all = ["targets", "seconds"])]
    brief: bool,
}

/// Why fuzzing cannot begin, or what it found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FuzzError {
    /// A program is missing.
    #[error(
        "fuzzing needs a nightly toolchain and cargo-fuzz: `rustup toolchain install nightly`, `cargo install cargo-fuzz`"
    )]
    NotInstalled,
    /// A seed or a folder cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The compiler does not say what it compiles for.
    #[error("`rustc -vV` names no host")]
    Host,
    /// The build or a target failed; its artifact is named above in its output.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Whether the nightly toolchain and `cargo-fuzz` are there.
pub(crate) fn present() -> bool {
    nightly(&["fuzz", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Builds all targets and runs the requested ones, one after the other.
pub(crate) fn run(request: &Request) -> Result<(), FuzzError> {
    if request.brief {
        return briefly();
    }
    let named: Vec<&str> = request.targets.iter().map(String::as_str).collect();
    let targets = if named.is_empty() {
        TARGETS
    } else {
        named.as_slice()
    };
    let until = [format!("-max_total_time={}", request.seconds)];
    each(targets, "corpus", &until)
}

/// Every target from its seeds alone, with the same mutations each time: a check that passed passes
/// again. What is new is looked for by [`run`].
pub(crate) fn briefly() -> Result<(), FuzzError> {
    let brief = workspace::target_dir().join("fuzz").join(BRIEF_CORPUS);
    match fs::remove_dir_all(&brief) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(FuzzError::Write {
                path: brief,
                source,
            });
        }
        _ => {}
    }
    let until = [
        "-seed=1".into(),
        format!("-runs={BRIEF_RUNS}"),
        format!("-max_total_time={BRIEF_SECONDS}"),
    ];
    each(TARGETS, BRIEF_CORPUS, &until)
}

fn each(targets: &[&str], corpora: &str, until: &[String]) -> Result<(), FuzzError> {
    if !present() {
        return Err(FuzzError::NotInstalled);
    }
    let home = workspace::target_dir().join("fuzz");
    let mut build = nightly(&["fuzz", "build", "--fuzz-dir", "fuzz"]);
    // Optimised, with overflows caught: the way of cargo-fuzz.
    build.arg("--target-dir").arg(&home);
    workspace::run(&mut build)?;
    let programs = home.join(host()?).join("release");
    for target in targets {
        let corpus = home.join(corpora).join(target);
        seeds::write_all(target, &corpus)?;
        let artifacts = home.join("artifacts").join(target);
        fs::create_dir_all(&artifacts).map_err(|source| FuzzError::Write {
            path: artifacts.clone(),
            source,
        })?;
        let mut run = Command::new(programs.join(target));
        run.arg(&corpus)
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(format!("-rss_limit_mb={MAX_RESIDENT_MIB}"))
            .arg(format!("-malloc_limit_mb={MAX_ALLOCATION_MIB}"))
            .arg(format!("-timeout={MAX_INPUT_SECONDS}"))
            .arg(format!("-max_len={MAX_INPUT_BYTES}"))
            .args(until)
            // Freed memory is held back for the sanitizer; with its usual 256 MiB it would look like ours.
            .env("ASAN_OPTIONS", "quarantine_size_mb=16:detect_leaks=0");
        println!("fuzz: {}", workspace::spelled(&run));
        let log = home.join(format!("{target}.log"));
        let file = fs::File::create(&log).map_err(|source| FuzzError::Write {
            path: log.clone(),
            source,
        })?;
        let outcome = workspace::run(run.stderr(file));
        tell(target, &log, outcome.is_err());
        outcome?;
    }
    Ok(())
}

/// The last line of a target's log, or the last forty of one that was broken.
fn tell(target: &str, log: &Path, broken: bool) {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let shown = lines.len().saturating_sub(if broken { 40 } else { 1 });
    for line in &lines[shown..] {
        println!("fuzz: {target}: {line}");
    }
}

/// `cargo` of the nightly toolchain, whatever this workspace pins.
fn nightly(arguments: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    command
        .current_dir(workspace::root())
        .args(["run", "nightly", "cargo"])
        .args(arguments);
    for pinned in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(pinned);
    }
    command
}

fn host() -> Result<String, FuzzError> {
    let output = Command::new("rustc")
        .arg("-vV")
        .output()
        .map_err(|source| CommandError::NotStarted {
            program: "rustc -vV".into(),
            source,
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or(FuzzError::Host)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), FuzzError> {
    fs::write(path, bytes).map_err(|source| FuzzError::Write {
        path: path.into(),
        source,
    })
}
