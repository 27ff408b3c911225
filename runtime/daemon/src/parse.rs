//! The parser child: reads file bytes from standard input, answers on standard output.
//!
//! It opens nothing, limits itself before the first byte, and may be killed at any time.

use std::io::{self, BufReader, BufWriter};
use std::process::ExitCode;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::SigSet;
use wire::{FrameError, ParseReply};

use crate::logging::chain;
use crate::pipeline;

/// Runs until standard input ends.
pub(crate) fn main(memory_bytes: u64) -> ExitCode {
    // The one who started this has blocked signals for its own purposes.
    if SigSet::all().thread_unblock().is_err() {
        return ExitCode::FAILURE;
    }
    let limits = [
        (Resource::RLIMIT_AS, memory_bytes),
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_NPROC, 0),
        (Resource::RLIMIT_NOFILE, 3),
        (Resource::RLIMIT_CORE, 0),
    ];
    for (resource, limit) in limits {
        if setrlimit(resource, limit, limit).is_err() {
            return ExitCode::FAILURE;
        }
    }
    let mut input = BufReader::new(io::stdin().lock());
    let mut output = BufWriter::new(io::stdout().lock());
    loop {
        let bytes = match wire::read_bytes(&mut input) {
            Ok(bytes) => bytes,
            Err(FrameError::Closed) => return ExitCode::SUCCESS,
            Err(_) => return ExitCode::FAILURE,
        };
        let reply = match pipeline::read_volume(&bytes) {
            Ok(volume) => ParseReply::Volume(volume),
            Err(error) => ParseReply::Refused {
                reason: chain(&error),
            },
        };
        if wire::write(&mut output, &reply).is_err() {
            return ExitCode::FAILURE;
        }
    }
}
