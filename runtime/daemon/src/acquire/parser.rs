//! The parser child: one scanner file at a time, in a process that may die.

use std::io::{self, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use wire::{FrameError, ParseReply};

/// Why a file has no reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParserError {
    /// The child cannot be started; the file is not to blame.
    #[error("the parser cannot be started")]
    Start(#[source] io::Error),
    /// A fresh child died over this file.
    #[error("the parser died over it")]
    Died,
    /// The child took too long and was killed.
    #[error("the parser took longer than {} ms over it and was stopped", .limit.as_millis())]
    TooSlow {
        /// The limit.
        limit: Duration,
    },
}

/// A parser process; started when it is needed and again when it died.
pub(crate) struct Parser {
    timeout: Duration,
    memory_bytes: u64,
    child: Option<Running>,
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
    /// A parser that is not started yet.
    ///
    /// - `timeout`: longest time for one file.
    /// - `memory_bytes`: address space of the child.
    pub(crate) fn new(timeout: Duration, memory_bytes: u64) -> Parser {
        Parser {
            timeout,
            memory_bytes,
            child: None,
        }
    }

    /// Has one file parsed.
    ///
    /// A child that served before may have died of something else: the file gets a fresh one before
    /// it is blamed.
    ///
    /// # Errors
    /// [`ParserError`] where the child cannot answer; the next file gets a new child.
    pub(crate) fn parse(&mut self, bytes: &[u8]) -> Result<ParseReply, ParserError> {
        if let Some(served) = self.child.take() {
            match self.ask(served, bytes) {
                Err(ParserError::Died) => {
                    tracing::warn!("the parser is gone, another one is started")
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

fn start(memory_bytes: u64) -> io::Result<Running> {
    // The running program itself, also after an update has replaced its file.
    let mut process = Command::new("/proc/self/exe")
        .arg0("afterimage")
        .args(["role", "parse", "--memory-bytes", &memory_bytes.to_string()])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // A library's panic message may quote the header.
        .stderr(Stdio::null())
        .spawn()?;
    let (Some(mut input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
        return Err(io::Error::other("the parser has no pipes"));
    };
    let (files, waiting) = sync_channel::<Vec<u8>>(1);
    let (sender, replies) = sync_channel(1);
    // A child that neither reads nor writes holds up this thread, and the timeout ends both.
    thread::Builder::new()
        .name("parse-pipe".into())
        .spawn(move || {
            let mut output = BufReader::new(output);
            for bytes in waiting {
                let reply =
                    wire::write_bytes(&mut input, &bytes).and_then(|()| wire::read(&mut output));
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
