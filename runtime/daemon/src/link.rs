//! Who owns a socket publishes, who connects listens.
//!
//! A publisher never waits: each listener has a bounded queue and a thread of its own. A listener
//! whose queue is full is cut off; it connects again and is told again all that matters, which is
//! also how a restarted process catches up.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use wire::{FrameError, Hello, PROTOCOL, RoleName, Tier};

/// Most listeners of one socket.
const MAX_LISTENERS: usize = 8;
/// Most messages that are said again to a newcomer.
const MAX_KEPT: usize = 4096;
/// Most bytes of them.
const MAX_KEPT_BYTES: usize = 256 << 20;
const RETRY: Duration = Duration::from_millis(200);

/// Whether and where a message is kept for newcomers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Keep {
    /// Of interest only now.
    No,
    /// Kept under this key, in the order of keys; a later message under the key replaces it.
    /// Keys below 16 are never dropped for room.
    Under(u64),
}

/// The first key of messages about trials.
const TRIAL_KEYS: u64 = 1 << 60;

/// The key of a message about a trial at one of its decode times.
///
/// - `part`: which message, below 16.
pub(crate) fn trial_key(run: u32, trial: u32, tier: Tier, part: u8) -> u64 {
    let last = (tier as u64) << 4 | u64::from(part & 0xf);
    TRIAL_KEYS | (u64::from(run) << 40) | (u64::from(trial) << 8) | last
}

type Frame = Arc<Vec<u8>>;

#[derive(Default)]
struct Shared {
    kept: BTreeMap<u64, Frame>,
    kept_bytes: usize,
    listeners: Vec<Outlet>,
}

/// One listener's queue, and a token that its thread holds for as long as it serves.
struct Outlet {
    queue: SyncSender<Frame>,
    served: Weak<()>,
}

impl Shared {
    fn keep(&mut self, key: u64, frame: Frame) {
        self.kept_bytes += frame.len();
        if let Some(old) = self.kept.insert(key, frame) {
            self.kept_bytes -= old.len();
        }
        while self.kept.len() > MAX_KEPT || self.kept_bytes > MAX_KEPT_BYTES {
            let Some((&oldest, _)) = self.kept.range(16..).next() else {
                break;
            };
            if let Some(old) = self.kept.remove(&oldest) {
                self.kept_bytes -= old.len();
            }
        }
    }
}

/// The owner's side of a socket.
#[derive(Clone)]
pub(crate) struct Publisher {
    shared: Arc<Mutex<Shared>>,
    name: &'static str,
}

impl Publisher {
    /// Binds the socket, replacing what a dead process left, and starts to accept.
    ///
    /// # Errors
    /// The system's, where the socket cannot be bound.
    pub(crate) fn bind(path: &Path, name: &'static str, queue: usize) -> io::Result<Publisher> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        let publisher = Publisher {
            shared: Arc::default(),
            name,
        };
        let accepting = publisher.clone();
        thread::Builder::new()
            .name(format!("{name}-accept"))
            .spawn(move || accepting.accept(&listener, queue))?;
        Ok(publisher)
    }

    fn accept(&self, listener: &UnixListener, queue: usize) {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, most likely: wait for some to come back.
                thread::sleep(RETRY);
                continue;
            };
            let publisher = self.clone();
            let spawned = thread::Builder::new()
                .name(format!("{}-listener", self.name))
                .spawn(move || publisher.serve(stream, queue));
            if let Err(error) = spawned {
                tracing::warn!(%error, "a listener could not be served");
            }
        }
    }

    fn serve(&self, mut stream: UnixStream, queue: usize) {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
        let hello: Hello = match wire::read(&mut stream) {
            Ok(hello) => hello,
            Err(error) => {
                tracing::warn!(%error, socket = self.name, "a listener did not introduce itself");
                return;
            }
        };
        if hello.protocol != PROTOCOL {
            tracing::warn!(role = %hello.role, found = hello.protocol, expected = PROTOCOL, "a listener of another version was refused");
            return;
        }
        let serving = Arc::new(());
        let (kept, queue) = {
            let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared
                .listeners
                .retain(|listener| listener.served.strong_count() > 0);
            if shared.listeners.len() >= MAX_LISTENERS {
                tracing::warn!(role = %hello.role, limit = MAX_LISTENERS, "too many listeners, one was refused");
                return;
            }
            let (sender, receiver) = sync_channel(queue);
            shared.listeners.push(Outlet {
                queue: sender,
                served: Arc::downgrade(&serving),
            });
            (shared.kept.values().cloned().collect::<Vec<_>>(), receiver)
        };
        tracing::info!(role = %hello.role, socket = self.name, replayed = kept.len(), "listener connected");
        let outcome = send_all(&mut stream, kept, &queue);
        tracing::info!(role = %hello.role, socket = self.name, reason = %outcome, "listener gone");
        drop(serving);
    }

    /// Forgets what was kept about trials: it belongs to a session that is over.
    pub(crate) fn forget_trials(&self) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let about_trials = shared.kept.split_off(&TRIAL_KEYS);
        let gone: usize = about_trials.values().map(|frame| frame.len()).sum();
        shared.kept_bytes -= gone;
    }

    /// Says something to everybody who listens.
    pub(crate) fn publish<T: Serialize>(&self, message: &T, keep: Keep) {
        let mut bytes = Vec::new();
        if let Err(error) = wire::write(&mut bytes, message) {
            tracing::error!(%error, socket = self.name, "a message could not be sent");
            return;
        }
        let frame: Frame = Arc::new(bytes);
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Keep::Under(key) = keep {
            shared.keep(key, Arc::clone(&frame));
        }
        shared.listeners.retain(
            |listener| match listener.queue.try_send(Arc::clone(&frame)) {
                Ok(()) => true,
                Err(TrySendError::Full(_)) => {
                    tracing::warn!(
                        socket = self.name,
                        "a listener is too slow, it is cut off and may come back"
                    );
                    false
                }
                Err(TrySendError::Disconnected(_)) => false,
            },
        );
    }
}

fn send_all(stream: &mut UnixStream, kept: Vec<Frame>, queue: &Receiver<Frame>) -> String {
    use std::io::Write;
    let _ = stream.set_write_timeout(Some(Duration::from_secs(10)));
    for frame in kept {
        if let Err(error) = stream.write_all(&frame) {
            return error.to_string();
        }
    }
    for frame in queue {
        if let Err(error) = stream.write_all(&frame) {
            return error.to_string();
        }
    }
    "cut off".into()
}

/// What a subscription tells its owner.
pub(crate) enum Heard<T> {
    /// The connection stands.
    Connected,
    /// The connection is gone; it is tried again.
    Lost,
    /// A message.
    Message(T),
}

/// Listens to a socket for as long as the process lives, connecting again whenever it must.
///
/// `hear` runs on the subscription's own thread and may wait; the publisher does not.
///
/// # Errors
/// The system's, where no thread can be started.
pub(crate) fn subscribe<T: DeserializeOwned + 'static>(
    path: PathBuf,
    role: RoleName,
    name: &str,
    stop: Arc<AtomicBool>,
    mut hear: impl FnMut(Heard<T>) + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new()
        .name(format!("{name}-in"))
        .spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if let Ok(mut stream) = UnixStream::connect(&path) {
                    let hello = Hello {
                        protocol: PROTOCOL,
                        role,
                    };
                    if wire::write(&mut stream, &hello).is_ok() {
                        hear(Heard::Connected);
                        let error = listen(&mut stream, &mut hear);
                        if !matches!(error, FrameError::Closed) {
                            tracing::warn!(%error, "connection lost, trying again");
                        }
                        hear(Heard::Lost);
                    }
                }
                thread::sleep(RETRY);
            }
        })?;
    Ok(())
}

fn listen<T: DeserializeOwned>(
    stream: &mut UnixStream,
    hear: &mut impl FnMut(Heard<T>),
) -> FrameError {
    loop {
        match wire::read(stream) {
            Ok(message) => hear(Heard::Message(message)),
            Err(error) => return error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::FromAcquire;

    fn fault(text: &str) -> FromAcquire {
        FromAcquire::Fault { text: text.into() }
    }

    fn listener(path: &Path, stop: &Arc<AtomicBool>) -> Receiver<String> {
        let (sender, receiver) = sync_channel(64);
        subscribe(
            path.into(),
            RoleName::Show,
            "test",
            Arc::clone(stop),
            move |heard| {
                if let Heard::Message(FromAcquire::Fault { text }) = heard {
                    let _ = sender.send(text);
                }
            },
        )
        .unwrap();
        receiver
    }

    #[test]
    fn a_newcomer_is_told_again_what_was_kept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let publisher = Publisher::bind(&path, "test", 16).unwrap();
        publisher.publish(&fault("second"), Keep::Under(20));
        publisher.publish(&fault("first"), Keep::Under(0));
        publisher.publish(&fault("gone"), Keep::No);
        let stop = Arc::new(AtomicBool::new(false));
        let heard = listener(&path, &stop);
        let wait = Duration::from_secs(10);
        assert_eq!(heard.recv_timeout(wait).unwrap(), "first");
        assert_eq!(heard.recv_timeout(wait).unwrap(), "second");
        publisher.publish(&fault("now"), Keep::No);
        assert_eq!(heard.recv_timeout(wait).unwrap(), "now");
        stop.store(true, Ordering::Relaxed);
    }

    #[test]
    fn a_listener_that_never_reads_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let publisher = Publisher::bind(&path, "test", 4).unwrap();
        let mut silent = UnixStream::connect(&path).unwrap();
        wire::write(
            &mut silent,
            &Hello {
                protocol: PROTOCOL,
                role: RoleName::Show,
            },
        )
        .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let heard = listener(&path, &stop);
        publisher.publish(&fault("ready"), Keep::Under(0));
        assert_eq!(
            heard.recv_timeout(Duration::from_secs(10)).unwrap(),
            "ready"
        );
        let started = std::time::Instant::now();
        let long = "x".repeat(100_000);
        for _ in 0..200 {
            publisher.publish(&fault(&long), Keep::No);
        }
        assert!(started.elapsed() < Duration::from_secs(5));
        stop.store(true, Ordering::Relaxed);
    }
}
