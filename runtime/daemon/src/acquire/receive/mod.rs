//! The DICOM receiver: a scanner sends its images (C-STORE) instead of writing files.
//!
//! ```text
//! association ──PDUs──► command, data set ──► spool, on the disk ──► read thread, as a file
//!                                                   └──► C-STORE response
//! ```
//!
//! One thread serves a few associations at a time. A data set is never looked into here: with the
//! head of a file before it, it goes to the parser child as the files of the folder do. The response
//! is sent once the object is on the disk ([`spool`]), so that the scanner does not wait for the
//! parser and nothing it was told to be safe is lost. When the reader is behind, the response is
//! "out of resources", and nothing grows. Whoever stalls, lies about a length or sends what is no
//! PDU loses its association and nothing else.
//!
//! What peers write (titles, UIDs, comments) is not shown; a title appears with everything but
//! letters, digits, `-` and `_` replaced.

mod association;
mod dimse;
mod spool;
mod tls;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dicom_ul::association::ServerAssociationOptions;
use dicom_ul::association::server::AccessControl;
use dicom_ul::pdu::{AssociationRJServiceUserReason, UserIdentity};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use self::association::serve;
use self::dimse::Status;
pub(super) use self::spool::Spooled;
use self::spool::{KeepError, Spool};
use self::tls::TlsError;
use super::TICK;
use super::sources::Event;
use super::watch::Found;
use crate::logging::chain;
use crate::record::RecordError;
use crate::settings::Receive;

/// C-ECHO.
const VERIFICATION: &str = "1.2.840.10008.1.1";
/// What is taken: the images that fMRI comes as. A scanner's raw data, spectra and reports are
/// refused when the association is negotiated, and so is compressed pixel data.
const CLASSES: [&str; 3] = [
    // MR Image Storage.
    "1.2.840.10008.5.1.4.1.1.4",
    // Enhanced MR Image Storage.
    "1.2.840.10008.5.1.4.1.1.4.1",
    // Legacy Converted Enhanced MR Image Storage.
    "1.2.840.10008.5.1.4.1.1.4.4",
];
/// Explicit and implicit VR little endian.
const TRANSFER_SYNTAXES: [&str; 2] = ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"];
/// Longest PDU that is read, and that peers are told of.
const MAX_PDU_BYTES: u32 = 128 << 10;
/// How long to wait before the address is tried again.
const BIND_AGAIN: Duration = Duration::from_secs(5);
/// How often one kind of trouble is told; an outsider can repeat it at will.
const TELL_EVERY: Duration = Duration::from_secs(30);
/// How long a refused peer may take to close its connection.
const HOLD: Duration = Duration::from_secs(1);
/// Peers that are told in turn that there is no place for them.
const MAX_TURNED_AWAY: usize = 8;
/// A-ASSOCIATE-RJ: transient, of the provider, local limit exceeded (PS3.8, 9.3.4).
const NO_PLACE: [u8; 10] = [3, 0, 0, 0, 0, 4, 0, 2, 3, 2];

/// What goes on between a peer and this box.
struct Receiver {
    settings: Receive,
    /// Longest object.
    max_bytes: u64,
    tls: Option<Arc<rustls::ServerConfig>>,
    spool: Arc<Spool>,
    files: SyncSender<Found>,
    faults: SyncSender<Event>,
    /// Bytes of objects that are coming in.
    coming: AtomicU64,
    told: Mutex<Told>,
}

/// What was told to the operator, and what the main thread has had no room for yet.
#[derive(Default)]
struct Told {
    last: BTreeMap<Trouble, Instant>,
    waiting: BTreeMap<Trouble, String>,
}

/// What is told to the operator, each once in a while.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    Address,
    Tls,
    Calling,
    Called,
    NoContext,
    NoPlace,
    Busy,
    TooLong,
    Disk,
    Protocol,
}

/// Starts the thread; what an earlier process left in the spool is handed on first.
///
/// - `incoming`: the spool's folder.
/// - `known`: objects that are on record.
///
/// Returns the thread, which ends at `stop` and not before.
///
/// # Errors
/// [`RecordError`] where the spool cannot be used; [`io::Error`] where no thread can be started. An
/// address that cannot be bound is a fault and tried again: the folder works without it.
pub(super) fn spawn(
    settings: &Receive,
    incoming: std::path::PathBuf,
    limits: Limits,
    known: impl IntoIterator<Item = [u8; 16]>,
    files: SyncSender<Found>,
    faults: SyncSender<Event>,
    stop: &Arc<AtomicBool>,
) -> Result<JoinHandle<()>, StartError> {
    let tls = settings.tls.as_ref().map(tls::config).transpose()?;
    let (spool, left) = Spool::open(incoming, known, limits.waiting)?;
    let receiver = Receiver {
        settings: settings.clone(),
        max_bytes: limits.object_bytes,
        tls,
        spool,
        files,
        faults,
        coming: AtomicU64::new(0),
        told: Mutex::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("receive-disk")
        .max_blocking_threads(receiver.settings.max_associations)
        .build()?;
    let stop = Arc::clone(stop);
    let thread = std::thread::Builder::new()
        .name("receive".into())
        .spawn(move || {
            if !left.is_empty() {
                tracing::info!(
                    count = left.len(),
                    "received objects are read again after a restart"
                );
            }
            for found in left {
                if receiver.files.send(found).is_err() {
                    return;
                }
            }
            runtime.block_on(listen(&Arc::new(receiver), &stop));
            // An association must not hold up the end.
            runtime.shutdown_background();
        })?;
    Ok(thread)
}

/// What may be held.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Longest object.
    pub(super) object_bytes: u64,
    /// Objects that may wait for the reader.
    pub(super) waiting: usize,
}

/// Why the receiver does not start.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// The spool.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The files of `receive.tls`.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The thread.
    #[error("no thread can be started")]
    Thread(#[from] io::Error),
}

/// Accepts connections until `stop`.
async fn listen(receiver: &Arc<Receiver>, stop: &AtomicBool) {
    let places = Arc::new(Semaphore::new(receiver.settings.max_associations));
    let turned_away = Arc::new(Semaphore::new(MAX_TURNED_AWAY));
    let Some(listener) = bind(receiver, stop).await else {
        return;
    };
    while !stop.load(Ordering::Relaxed) {
        receiver.tell_what_waits();
        let Ok(accepted) = timeout(TICK, listener.accept()).await else {
            continue;
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                receiver.tell(
                    Trouble::NoPlace,
                    format!("The DICOM receiver cannot take a connection: {error}"),
                );
                tokio::time::sleep(TICK).await;
                continue;
            }
        };
        let allowed = &receiver.settings.peers;
        if !allowed.is_empty() && !allowed.contains(&peer.ip().to_canonical()) {
            let peer = peer.ip();
            receiver.tell(
                Trouble::Address,
                format!("A DICOM sender at {peer} was refused: it is not in receive.peers"),
            );
            continue;
        }
        // Responses are short and waited for.
        let _ = stream.set_nodelay(true);
        match Arc::clone(&places).try_acquire_owned() {
            Ok(place) => {
                let receiver = Arc::clone(receiver);
                tokio::spawn(async move {
                    serve_stream(&receiver, stream, peer).await;
                    drop(place);
                });
            }
            Err(_) => {
                let limit = receiver.settings.max_associations;
                receiver.tell(
                    Trouble::NoPlace,
                    format!(
                        "A DICOM sender was turned away: {limit} associations are open \
                         (receive.max_associations)"
                    ),
                );
                if let Ok(place) = Arc::clone(&turned_away).try_acquire_owned() {
                    tokio::spawn(async move {
                        turn_away(stream).await;
                        drop(place);
                    });
                }
            }
        }
    }
}

/// Binds the address, again and again where it cannot be had; `None` at the end.
async fn bind(receiver: &Receiver, stop: &AtomicBool) -> Option<TcpListener> {
    let address = receiver.settings.listen;
    let mut last: Option<Instant> = None;
    while !stop.load(Ordering::Relaxed) {
        if last.is_none_or(|last| last.elapsed() >= BIND_AGAIN) {
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    tracing::info!(%address, "DICOM receiver listens");
                    return Some(listener);
                }
                Err(error) => receiver.tell(
                    Trouble::Address,
                    format!(
                        "The DICOM receiver cannot listen on receive.listen = {address}: {error}. It \
                         is tried again; files of the scanner's folder are taken as before"
                    ),
                ),
            }
            last = Some(Instant::now());
        }
        receiver.tell_what_waits();
        tokio::time::sleep(TICK).await;
    }
    None
}

/// Says that there is no place, in the words of the protocol.
async fn turn_away(mut stream: TcpStream) {
    let say = async {
        stream.write_all(&NO_PLACE).await?;
        stream.shutdown().await?;
        // Closing on unread bytes would reset the connection before the answer is read.
        let mut rest = [0_u8; 4096];
        let mut heard = 0;
        while heard < MAX_PDU_BYTES as usize {
            match stream.read(&mut rest).await? {
                0 => break,
                len => heard += len,
            }
        }
        io::Result::Ok(())
    };
    // A courtesy; who does not want to hear it is gone anyway.
    let _ = timeout(Duration::from_secs(1), say).await;
}

/// Who may call whom; remembers why it said no.
struct Gate {
    allow: Vec<String>,
    refusal: Arc<Mutex<Option<(Trouble, String)>>>,
}

impl AccessControl for Gate {
    fn check_access(
        &self,
        this_ae_title: &str,
        calling_ae_title: &str,
        called_ae_title: &str,
        _user_identity: Option<&UserIdentity>,
    ) -> Result<(), AssociationRJServiceUserReason> {
        let (trouble, title, reason) = if called_ae_title.trim() != this_ae_title {
            (
                Trouble::Called,
                called_ae_title,
                AssociationRJServiceUserReason::CalledAETitleNotRecognized,
            )
        } else if !self
            .allow
            .iter()
            .any(|allowed| allowed == calling_ae_title.trim())
        {
            (
                Trouble::Calling,
                calling_ae_title,
                AssociationRJServiceUserReason::CallingAETitleNotRecognized,
            )
        } else {
            return Ok(());
        };
        let refusal = Some((trouble, plain_title(title)));
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = refusal;
        Err(reason)
    }
}

/// A title as it may be shown.
fn plain_title(title: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let title = title.trim().chars().take(16);
    title.map(|c| if plain(c) { c } else { '?' }).collect()
}

/// A second hold on a connection: the first one closes with a refusal, and a peer that sees the end
/// together with its reason may report a broken line instead.
fn twice(stream: TcpStream) -> io::Result<(TcpStream, Option<TcpStream>)> {
    let stream = stream.into_std()?;
    let line = TcpStream::from_std(stream.try_clone()?)?;
    Ok((TcpStream::from_std(stream)?, Some(line)))
}

/// Waits for the peer to close the connection, for a moment (PS3.8, 9.1.5).
async fn hold(mut line: TcpStream) {
    let mut rest = [0_u8; 512];
    // Whatever else it says is not heard.
    let _ = timeout(HOLD, line.read(&mut rest)).await;
}

async fn serve_stream(receiver: &Arc<Receiver>, stream: TcpStream, peer: SocketAddr) {
    let refusal = Arc::new(Mutex::new(None));
    let mut options = ServerAssociationOptions::new()
        .ae_access_control(Gate {
            allow: receiver.settings.allow.clone(),
            refusal: Arc::clone(&refusal),
        })
        .ae_title(receiver.settings.ae_title.clone())
        .max_pdu_length(MAX_PDU_BYTES)
        .strict(true)
        .write_timeout(receiver.settings.association_timeout);
    for class in CLASSES.into_iter().chain([VERIFICATION]) {
        options = options.with_abstract_syntax(class);
    }
    for syntax in TRANSFER_SYNTAXES {
        options = options.with_transfer_syntax(syntax);
    }
    let Ok((stream, mut line)) = twice(stream) else {
        return;
    };
    let patience = receiver.settings.association_timeout;
    let agreed = if let Some(config) = &receiver.tls {
        let options = options.tls_config(Arc::clone(config));
        match timeout(patience, options.establish_tls_async(stream)).await {
            Ok(Ok(association)) => {
                line = None;
                serve(receiver, association, peer).await;
                true
            }
            _ => false,
        }
    } else {
        match timeout(patience, options.establish_async(stream)).await {
            Ok(Ok(association)) => {
                line = None;
                serve(receiver, association, peer).await;
                true
            }
            _ => false,
        }
    };
    let refused = refusal
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    match refused {
        Some((Trouble::Called, title)) => receiver.tell(
            Trouble::Called,
            format!(
                "A DICOM sender was refused: it calls {title}, receive.ae_title is {}",
                receiver.settings.ae_title
            ),
        ),
        Some((trouble, title)) => receiver.tell(
            trouble,
            format!("A DICOM sender was refused: its title {title} is not in receive.allow"),
        ),
        None if agreed => {}
        None if receiver.tls.is_some() => receiver.tell(
            Trouble::Tls,
            format!(
                "A DICOM sender at {} was refused: no encrypted association could be agreed upon \
                 (receive.tls)",
                peer.ip()
            ),
        ),
        // Port scanners, health checks of load balancers, half-open connections.
        None => tracing::debug!(peer = %peer.ip(), "a connection asked for no association"),
    }
    if let Some(line) = line {
        hold(line).await;
    }
}

impl Receiver {
    /// Puts an object into the spool and hands it on.
    async fn keep(self: &Arc<Receiver>, id: [u8; 16], bytes: Vec<u8>) -> Status {
        if self.spool.is_safe(&id) {
            tracing::info!("an object was sent again, ignored");
            return Status::Success;
        }
        let spool = Arc::clone(&self.spool);
        let kept = tokio::task::spawn_blocking(move || spool.keep(id, &bytes)).await;
        let found = match kept {
            Ok(Ok(found)) => found,
            Ok(Err(KeepError::Known)) => return Status::Success,
            Ok(Err(KeepError::Full { .. })) => return Status::OutOfResources,
            Ok(Err(KeepError::Record(error))) => {
                self.tell(
                    Trouble::Disk,
                    format!(
                        "A DICOM object cannot be kept: {}. The scanner must send it again",
                        chain(&error)
                    ),
                );
                return Status::ProcessingFailure;
            }
            // Only the end of the process stops such a task.
            Err(_) => return Status::ProcessingFailure,
        };
        match self.files.try_send(found) {
            Ok(()) => Status::Success,
            Err(TrySendError::Full(found) | TrySendError::Disconnected(found)) => {
                self.spool.take_back(&found);
                Status::OutOfResources
            }
        }
    }

    /// Tells the operator, unless the same was told a moment ago.
    fn tell(&self, trouble: Trouble, text: String) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = told
            .last
            .get(&trouble)
            .is_some_and(|last| last.elapsed() < TELL_EVERY);
        if !recent {
            told.last.insert(trouble, Instant::now());
            told.waiting.insert(trouble, text);
        }
        drop(told);
        self.tell_what_waits();
    }

    /// Tells what there was no room for; nothing here waits for the main thread.
    fn tell_what_waits(&self) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((trouble, text)) = told.waiting.pop_first() {
            match self.faults.try_send(Event::Fault(text)) {
                Ok(()) => {}
                Err(TrySendError::Full(Event::Fault(text))) => {
                    told.waiting.insert(trouble, text);
                    return;
                }
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests;
