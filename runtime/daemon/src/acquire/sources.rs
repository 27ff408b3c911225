//! Where files come from, and the threads that find and read them.
//!
//! ```text
//! watch thread ──files──► read thread ──(parser child)──► events of the main thread
//! ```

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use wire::ParseReply;

use super::TICK;
use super::images::{self, Images};
use super::parser::{Parser, ParserError};
use super::plan::read_bounded;
use super::receive::{self, Limits, StartError};
use super::watch::{Found, Notice, Watcher};
use crate::logging::chain;
use crate::record;
use crate::roles::RoleError;
use crate::settings::{ExistingFiles, Settings};

/// How often a file is tried again when the box, and not the file, is at fault.
const TRIES: u32 = 25;

/// What the main thread hears.
pub(super) enum Event {
    /// A file was read, for better or worse.
    Read(Box<ReadFile>),
    /// Something to tell the operator.
    Fault(String),
}

/// One file and what became of it.
pub(super) struct ReadFile {
    pub(super) file: Found,
    pub(super) arrived_ms: u64,
    pub(super) reply: Result<ParseReply, String>,
    /// Its bytes, where it must be put aside.
    pub(super) bytes: Vec<u8>,
}

impl ReadFile {
    /// Whether another try would change nothing: the file was read, or its copy is at hand.
    pub(super) fn can_be_given_up(&self) -> bool {
        self.reply.is_ok() || !self.bytes.is_empty()
    }
}

/// Files that were read and wait for the main thread: each may be a whole volume.
pub(super) const READ_AHEAD: usize = 4;

/// Starts the threads that find and read files.
///
/// - `known`: files and objects that are on record.
/// - `incoming`: where received objects wait.
///
/// Returns the threads, which end at `stop` and not before.
pub(super) fn spawn_readers(
    settings: &Settings,
    started_at_ms: u64,
    known: BTreeSet<[u8; 16]>,
    incoming: PathBuf,
    sender: &SyncSender<Event>,
    stop: &Arc<AtomicBool>,
) -> Result<Vec<JoinHandle<()>>, RoleError> {
    let mut threads = Vec::new();
    let thread_error = |source| RoleError::Thread { source };
    let since = match settings.existing_files {
        ExistingFiles::Ignore => Some(started_at_ms),
        ExistingFiles::Take => None,
    };
    let (files, found) = sync_channel::<Found>(settings.queue);
    if let Some(receive) = &settings.receive {
        let limits = Limits {
            object_bytes: settings.max_file_bytes,
            waiting: settings.queue,
        };
        threads.push(receive::spawn(
            receive,
            incoming,
            limits,
            known.iter().copied(),
            files.clone(),
            sender.clone(),
            stop,
        )?);
    }
    let (watching, stopping) = (sender.clone(), Arc::clone(stop));
    let folder = settings.folder.clone();
    let watch = thread::Builder::new()
        .name("watch".into())
        .spawn(move || {
            let watcher = Watcher::new(folder, since);
            watcher.run(&stopping, |notice| match notice {
                Notice::Found(file) if known.contains(&file.id) => true,
                Notice::Found(file) => files.send(file).is_ok(),
                Notice::FolderLost(reason) => watching
                    .send(Event::Fault(format!(
                        "The scanner's folder (scanner.folder) cannot be read: {reason}. Check the \
                         mount; volumes that arrive meanwhile are taken when it is back"
                    )))
                    .is_ok(),
                Notice::Full => watching
                    .send(Event::Fault(
                        "The scanner's folder (scanner.folder) holds too many files to watch, new \
                         ones are not taken: clear it out"
                            .into(),
                    ))
                    .is_ok(),
                Notice::FolderBack => watching
                    .send(Event::Fault("The scanner's folder is back".into()))
                    .is_ok(),
                Notice::Ignored(count) => {
                    tracing::info!(count, "files from before the session are ignored");
                    true
                }
            });
        })
        .map_err(thread_error)?;

    let (parsed, reading) = (sender.clone(), Arc::clone(stop));
    let (limit, tr_ms) = (settings.max_file_bytes, settings.tr_ms);
    let mut parser = Parser::new(settings.parse_timeout, settings.parse_memory_bytes);
    let read = thread::Builder::new()
        .name("read".into())
        .spawn(move || {
            let mut images = Images::new(tr_ms);
            let mut tell = |file: Found, reply| {
                let read = ReadFile {
                    arrived_ms: arrival(&file),
                    file,
                    reply,
                    bytes: Vec::new(),
                };
                parsed.send(Event::Read(Box::new(read))).is_ok()
            };
            loop {
                let file = match found.recv_timeout(TICK) {
                    Ok(file) => file,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) if images.let_go(&mut tell) => continue,
                    Err(RecvTimeoutError::Timeout) => return,
                };
                if images::is_image(&file.path) {
                    if images.read(&file, limit, &mut parser, &mut tell) {
                        continue;
                    }
                    return;
                }
                let arrived_ms = arrival(&file);
                let (reply, bytes) = read_file(&file, limit, &mut parser, &reading);
                let read = ReadFile {
                    file,
                    arrived_ms,
                    reply,
                    bytes,
                };
                if parsed.send(Event::Read(Box::new(read))).is_err() {
                    return;
                }
            }
        })
        .map_err(thread_error)?;
    threads.extend([watch, read]);
    Ok(threads)
}

impl From<StartError> for RoleError {
    fn from(error: StartError) -> RoleError {
        match error {
            StartError::Record(error) => RoleError::Record(error),
            StartError::Tls(error) => RoleError::Setting(chain(&error)),
            StartError::Thread(source) => RoleError::Thread { source },
        }
    }
}

/// When a file arrived: by its own time of change, where that is believable, since a backlog is read
/// later than it arrived.
fn arrival(file: &Found) -> u64 {
    let now = record::now_ms();
    let believable = now.saturating_sub(24 * 3_600_000)..=now;
    if believable.contains(&file.changed_ms) {
        file.changed_ms
    } else {
        now
    }
}

/// Reads and parses one file; its bytes come back where it must be put aside.
fn read_file(
    file: &Found,
    limit: u64,
    parser: &mut Parser,
    stop: &AtomicBool,
) -> (Result<ParseReply, String>, Vec<u8>) {
    if file.len_bytes > limit {
        let reason = format!("it has {} bytes, expected at most {limit}", file.len_bytes);
        return (Err(reason), Vec::new());
    }
    let mut last = String::new();
    for _ in 0..TRIES {
        match read_bounded(&file.path, limit) {
            Ok(bytes) => match parser.parse(&bytes) {
                Ok(reply @ (ParseReply::Volume(_) | ParseReply::Slice(_))) => {
                    return (Ok(reply), Vec::new());
                }
                // An image under another name than an image's: nothing tells its number.
                Ok(ParseReply::Image(_)) => {
                    let reason =
                        "it is a NIfTI image, expected a name that ends in .nii or .nii.gz";
                    return (Err(reason.into()), bytes);
                }
                Ok(refused @ ParseReply::Refused { .. }) => return (Ok(refused), bytes),
                // The box is short of something; the file is not to blame.
                Err(error @ ParserError::Start(_)) => last = chain(&error),
                Err(error) => return (Err(chain(&error)), bytes),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return (Err("it is gone".into()), Vec::new());
            }
            // The system's reason alone: the name of the file is not shown.
            Err(error) => last = format!("it cannot be read: {}", error.kind()),
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        thread::sleep(2 * TICK);
    }
    (Err(last), Vec::new())
}
