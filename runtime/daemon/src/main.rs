//! The program of the box: `afterimage run` starts its roles; the other commands work offline.
//!
//! Exit codes: 0 done, 1 a fault (worth another try), 2 a wrong command line, 78 a setting, bundle
//! or key that no other try will mend.

mod acquire;
mod bench;
mod betas;
mod decode;
mod link;
mod logging;
mod memory;
mod motion;
mod parse;
mod pipeline;
mod reconstruct;
mod record;
mod replay;
mod roles;
mod sandbox;
mod session;
mod settings;
mod show;
mod simulate;
mod supervise;
mod trigger;
mod volumes;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use wire::RoleName;

/// Shows at the bedside, while it happens, the picture that a person in an MRI scanner sees.
#[derive(Parser)]
#[command(name = "afterimage", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run all roles, supervised, until SIGTERM
    ///
    /// Settings are merged from the defaults, boards/BOARD.toml, the site file and the
    /// environment (AFTERIMAGE__WEB__LISTEN for web.listen). A site file needs at least
    /// scanner.folder, task.events, model.bundle and model.key.
    Run {
        /// The site's settings (TOML); paths in it are relative to its folder
        #[arg(long)]
        config: Option<PathBuf>,
    },
    Simulate(Box<simulate::Arguments>),
    /// Decode recorded betas into PNG files, without a scanner
    Reconstruct(reconstruct::Arguments),
    /// Run a recorded session again and compare: same betas to the bit, same pictures to the byte
    Replay(replay::Arguments),
    Session(session::Arguments),
    Betas(betas::Arguments),
    Motion(motion::Arguments),
    /// Turn a folder of scanner files into NIfTI images with their times, offline
    Volumes(volumes::Arguments),
    Bench(bench::Arguments),
    /// One role as its own process; started by `run` or by systemd
    #[command(hide = true)]
    Role {
        role: Role,
        #[arg(long)]
        config: Option<PathBuf>,
        /// Address space of the parser
        #[arg(long)]
        memory_bytes: Option<u64>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Acquire,
    Parse,
    Decode,
    Show,
}

impl From<Role> for RoleName {
    fn from(role: Role) -> RoleName {
        match role {
            Role::Acquire => RoleName::Acquire,
            Role::Parse => RoleName::Parse,
            Role::Decode => RoleName::Decode,
            Role::Show => RoleName::Show,
        }
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run { config } => supervise::main(config.as_deref()),
        Command::Simulate(arguments) => simulate::main(&arguments),
        Command::Reconstruct(arguments) => reconstruct::main(&arguments),
        Command::Replay(arguments) => replay::main(&arguments),
        Command::Session(arguments) => session::main(&arguments),
        Command::Betas(arguments) => betas::main(&arguments),
        Command::Motion(arguments) => motion::main(&arguments),
        Command::Volumes(arguments) => volumes::main(&arguments),
        Command::Bench(arguments) => bench::main(&arguments),
        Command::Role {
            role,
            config,
            memory_bytes,
        } => roles::main(role.into(), config.as_deref(), memory_bytes),
    }
}
