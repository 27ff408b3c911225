//! The parser child: one scanner file at a time, in a process that may die.
//!
//! A spare one waits beside it: where a file kills its parser, the next file is not late.

use std::io::{self, BufReader};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use wire::{FrameError, ParseReply};

/// The longest pipe that everybody may have.
const PIPE_BYTES: i32 = 1 << 20;

/// Why a file has no reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParserError {
    /// The child cannot be started; the file is not to blame.
    #[error("the parser cannot be started")]
    Start(#[source] io::Error),
    /// A child that was started for this file died over it.
    #[error("the parser died over it")]
    Died,
    /// The child took too long and was killed.
    #[error("the parser took longer than {} ms over it and was stopped", .limit.as_millis())]
    TooSlow {
        /// The limit.
        limit: Duration,
    },
}

/// A parser process, and the one that takes its place when it dies.
pub(crate) struct Parser {
    timeout: Duration,
    memory_bytes: u64,
    child: Option<Running>,
    spare: Option<Running>,
}

struct Running {
    process: Child,
    files: SyncSender<Vec<u8>>,
    replies: Receiver<Result<ParseReply, FrameError>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already gone, most likely.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Parser {
    /// A parser; its first processes are started here where they can be, else with the first file.
    ///
    /// - `timeout`: longest time for one file.
    /// - `memory_bytes`: address space of the child.
    pub(crate) fn new(timeout: Duration, memory_bytes: u64) -> Parser {
        Parser {
            timeout,
            memory_bytes,
            child: start(memory_bytes).ok(),
            spare: start(memory_bytes).ok(),
        }
    }

    /// The process that has the next file, where one runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(|running| running.process.id())
    }

    /// Has one file parsed.
    ///
    /// A process that waited may have died of something else, the spare one unnoticed: a file is
    /// blamed where one dies over it that was started for it.
    ///
    /// # Errors
    /// [`ParserError`] where the child cannot answer; the next file gets a new child.
    pub(crate) fn parse(&mut self, bytes: &[u8]) -> Result<ParseReply, ParserError> {
        let answer = self.parse_until_answered(bytes);
        if self.child.is_none() {
            self.child = self.spare.take();
        }
        if self.spare.is_none() {
            // Where it cannot be started now, the next file tries.
            self.spare = start(self.memory_bytes).ok();
        }
        answer
    }

    fn parse_until_answered(&mut self, bytes: &[u8]) -> Result<ParseReply, ParserError> {
        while let Some(waiting) = self.child.take().or_else(|| self.spare.take()) {
            match self.ask(waiting, bytes) {
                Err(ParserError::Died) => {
                    tracing::warn!("the parser is gone, another one takes over");
                }
                answer => return answer,
            }
        }
        let fresh = start(self.memory_bytes).map_err(ParserError::Start)?;
        self.ask(fresh, bytes)
    }

    fn ask(&mut self, running: Running, bytes: &[u8]) -> Result<ParseReply, ParserError> {
        if running.files.send(bytes.to_vec()).is_err() {
            return Err(ParserError::Died);
        }
        match running.replies.recv_timeout(self.timeout) {
            Ok(Ok(reply)) => {
                self.child = Some(running);
                Ok(reply)
            }
            Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => Err(ParserError::Died),
            Err(RecvTimeoutError::Timeout) => Err(ParserError::TooSlow {
                limit: self.timeout,
            }),
        }
    }
}

/// Asks for a pipe that holds a volume: each time it is full, the one side waits for the other to be
/// woken, which takes long where the processors are busy.
fn widen(pipe: &impl AsFd) {
    if let Err(error) = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES)) {
        tracing::debug!(%error, "the parser's pipe stays as it is");
    }
}

fn start(memory_bytes: u64) -> io::Result<Running> {
    // The running program itself, also after an update has replaced its file.
    let mut process = Command::new("/proc/self/exe")
        .arg0("afterimage")
        .args(["role", "parse", "--memory-bytes", &memory_bytes.to_string()])
        .env_clear()
        // The C library looks at a file before it gives memory of further arenas back, which the
        // sandbox forbids.
        .env("MALLOC_ARENA_MAX", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // A library's panic message may quote the header.
        .stderr(Stdio::null())
        .spawn()?;
    let (Some(mut input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
        return Err(io::Error::other("the parser has no pipes"));
    };
    widen(&input);
    widen(&output);
    let (files, waiting) = sync_channel::<Vec<u8>>(1);
    let (sender, replies) = sync_channel(1);
    // A child that neither reads nor writes holds up this thread, and the timeout ends both.
    thread::Builder::new()
        .name("parse-pipe".into())
        .spawn(move || {
            let mut output = BufReader::new(output);
            for bytes in waiting {
                let reply = wire::write_bytes(&mut input, &bytes)
                    .and_then(|()| wire::read_reply(&mut output));
                let last = reply.is_err();
                if sender.send(reply).is_err() || last {
                    return;
                }
            }
        })?;
    tracing::info!(pid = process.id(), "parser started");
    Ok(Running {
        process,
        files,
        replies,
    })
}
