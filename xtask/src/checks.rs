//! `cargo xtask test`: everything a change has to pass, in the order in which it is quickest to fail.

use std::error::Error;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::fuzz;
use crate::onnxruntime;
use crate::workspace;

/// Fuzzing comes last and takes up to ten minutes where its targets were not built before; a check that
/// has taken this long already leaves it to `cargo xtask fuzz --brief`, so that it ends within half an hour.
const FUZZING_UNTIL: Duration = Duration::from_secs(18 * 60);

/// Runs every check; stops at the first that fails.
pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    step("format", cargo(&["fmt", "--all", "--check"]))?;
    step(
        "lints",
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    let mut docs = cargo(&[
        "doc",
        "--workspace",
        "--no-deps",
        "--document-private-items",
        "--locked",
    ]);
    docs.env("RUSTDOCFLAGS", "-D warnings");
    step("documentation", docs)?;
    dependencies()?;
    clients();
    let library = onnxruntime::ensure()?;
    // The system tests start the built programs, so those come first.
    step("programs", cargo(&["build", "--workspace", "--locked"]))?;
    let mut tests = cargo(&["test", "--workspace", "--locked"]);
    tests.env(onnxruntime::OVERRIDE, &library);
    step("tests", tests)?;
    if began.elapsed() < FUZZING_UNTIL {
        fuzzing()?;
    } else {
        println!(
            "fuzzing: left out, the checks have taken {:.0} s already; `cargo xtask fuzz --brief` does it",
            began.elapsed().as_secs_f64()
        );
    }
    println!("all passed in {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// Every fuzz target for a moment, where a nightly toolchain and `cargo-fuzz` are installed.
fn fuzzing() -> Result<(), fuzz::FuzzError> {
    if !fuzz::present() {
        println!("fuzzing: not done, it needs a nightly toolchain and cargo-fuzz");
        return Ok(());
    }
    let began = Instant::now();
    fuzz::briefly()?;
    println!(
        "fuzzing: passed after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Licences, sources and bans of the dependencies, where `cargo-deny` is installed.
fn dependencies() -> Result<(), workspace::CommandError> {
    let present = cargo(&["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !present {
        println!(
            "dependencies: not checked, cargo-deny is not installed (`cargo install cargo-deny`)"
        );
        return Ok(());
    }
    // Advisories need a database from the network; `cargo deny check advisories` asks for it.
    let checks = ["deny", "--locked", "check", "bans", "licenses", "sources"];
    step("dependencies", cargo(&checks))
}

/// Says which clients of others, that the tests of the DICOM receiver use, are not installed.
fn clients() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let clients: [(&str, &str, &[&str]); 3] = [
        ("storescu (dcmtk)", "storescu", &["--version"]),
        ("pynetdicom", &python, &["-c", "import pynetdicom"]),
        ("openssl", "openssl", &["version"]),
    ];
    for (name, program, arguments) in clients {
        let present = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !present {
            println!("DICOM receiver: not tested with {name}, which is not installed");
        }
    }
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = workspace::cargo();
    command.args(arguments);
    command
}

/// Runs one step and says how long it took.
fn step(name: &str, mut command: Command) -> Result<(), workspace::CommandError> {
    println!("{name}: {}", workspace::spelled(&command));
    let began = Instant::now();
    let outcome = workspace::run(&mut command);
    let verdict = if outcome.is_ok() { "passed" } else { "failed" };
    println!(
        "{name}: {verdict} after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    outcome
}
