//! The chores of the workspace: `cargo xtask demo`, `cargo xtask test` and what they need.
#![expect(
    clippy::print_stdout,
    reason = "this program talks to the person who typed the command"
)]

mod checks;
mod demo;
mod fuzz;
mod onnxruntime;
mod synth;
mod workspace;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The chores of the workspace.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Simulated scanner, random weights, the real daemon, pictures in the browser.
    Demo(demo::Request),
    /// Runs the fuzz targets; needs a nightly toolchain and cargo-fuzz.
    Fuzz(fuzz::Request),
    /// Fetches ONNX Runtime's shared library with pip and checks it.
    Onnxruntime {
        /// Fetch the library of another architecture (x86_64, aarch64), for packaging.
        #[arg(long)]
        arch: Option<String>,
    },
    /// Writes checkpoints with random weights in the original containers.
    Synth(synth::Request),
    /// Runs every check: format, lints, documentation, dependencies, tests.
    Test,
}

fn main() -> ExitCode {
    let outcome: Result<(), Box<dyn Error>> = match Arguments::parse().chore {
        Chore::Onnxruntime { arch: Some(arch) } => onnxruntime::ensure_for(&arch)
            .map(|_| ())
            .map_err(Into::into),
        Chore::Onnxruntime { arch: None } => onnxruntime::ensure().map(|_| ()).map_err(Into::into),
        Chore::Demo(request) => demo::run(&request).map_err(Into::into),
        Chore::Fuzz(request) => fuzz::run(&request).map_err(Into::into),
        Chore::Test => checks::run(),
        Chore::Synth(request) => synth::write(&request).map_err(Into::into),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {}", chain(error.as_ref()));
            let code = error
                .downcast_ref::<workspace::CommandError>()
                .map_or(1, workspace::CommandError::exit_code);
            ExitCode::from(code)
        }
    }
}

/// An error and its causes, on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
