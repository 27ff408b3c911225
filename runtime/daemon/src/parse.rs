//! The parser child: reads file bytes from standard input, answers on standard output.
//!
//! It enters its sandbox before the first byte, opens nothing, and may be killed at any time.

use std::io::{self, BufReader, BufWriter};
use std::process::ExitCode;

use nix::sys::signal::SigSet;
use wire::{FrameError, ParseReply};

use crate::logging::chain;
use crate::{pipeline, sandbox};

/// Runs until standard input ends.
pub(crate) fn main(memory_bytes: u64) -> ExitCode {
    // The one who started this has blocked signals for its own purposes.
    if SigSet::all().thread_unblock().is_err() {
        return ExitCode::FAILURE;
    }
    if sandbox::enter(memory_bytes).is_err() {
        return ExitCode::FAILURE;
    }
    let mut input = BufReader::new(io::stdin().lock());
    let mut output = BufWriter::new(io::stdout().lock());
    loop {
        let bytes = match wire::read_bytes(&mut input) {
            Ok(bytes) => bytes,
            Err(FrameError::Closed) => return ExitCode::SUCCESS,
            Err(_) => return ExitCode::FAILURE,
        };
        let reply = match pipeline::read_file(&bytes) {
            Ok(reply) => reply,
            Err(error) => ParseReply::Refused {
                reason: chain(&error),
            },
        };
        if wire::write_reply(&mut output, reply).is_err() {
            return ExitCode::FAILURE;
        }
    }
}
