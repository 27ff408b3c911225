//! What an association that was agreed upon says: commands, data sets, and their answers.
//!
//! ```text
//! PDUs ──► command ──► data set ──► Receiver::keep ──► response
//! ```

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dicom_ul::association::{
    Association, AsyncAssociation, AsyncServerAssociation, Error as UpperLayerError,
};
use dicom_ul::pdu::{PDataValue, PDataValueType, Pdu, PresentationContextResultReason};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::dimse::{self, Command, Request, Status};
use super::{MAX_PDU_BYTES, Receiver, TICK, Trouble, plain_title};

/// How much longer than allowed an object may be before its sender is cut off instead of heard out.
const HEAR_OUT: u64 = 4;

/// Why an association ended before its peer released it. No message holds what the peer wrote.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("nothing came for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("an object took longer than {} s", .0.as_secs())]
    Slow(Duration),
    #[error("the connection ended in the middle of {0}")]
    Gone(&'static str),
    #[error("the peer aborted")]
    Aborted,
    #[error("it sent what is no PDU, or one longer than {MAX_PDU_BYTES} bytes")]
    NoPdu,
    #[error("it sent {0}")]
    Unexpected(&'static str),
    #[error(transparent)]
    Command(#[from] dimse::CommandError),
    #[error("an object went on after {0} bytes")]
    Endless(u64),
    #[error("no response can be sent to it")]
    Deaf,
}

/// An object that is coming in.
struct Coming {
    command: Command,
    context: u8,
    transfer_syntax: String,
    /// The object as a file; nothing where it is refused already.
    bytes: Vec<u8>,
    /// What has come of the data set.
    heard: u64,
    status: Status,
    share: Share,
}

/// Its part of what all objects that are coming in may take.
struct Share {
    receiver: Arc<Receiver>,
    bytes: u64,
}

impl Share {
    /// Whether there is room for more.
    fn grow(&mut self, bytes: u64) -> bool {
        let limit = 2 * self.receiver.max_bytes;
        let grown =
            self.receiver
                .coming
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                    held.checked_add(bytes).filter(|held| *held <= limit)
                });
        if grown.is_ok() {
            self.bytes += bytes;
        }
        grown.is_ok()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.receiver
            .coming
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Coming {
    fn new(receiver: &Arc<Receiver>, command: Command, context: u8, transfer_syntax: &str) -> Self {
        let mut coming = Coming {
            command,
            context,
            transfer_syntax: transfer_syntax.into(),
            bytes: Vec::new(),
            heard: 0,
            status: Status::Success,
            share: Share {
                receiver: Arc::clone(receiver),
                bytes: 0,
            },
        };
        if let Request::Store { class, instance } = &coming.command.request
            && let Some(instance) = instance
        {
            coming.bytes = dimse::file_head(class, instance, &coming.transfer_syntax);
        }
        coming
    }

    /// Refuses the object; what still comes of it is heard and dropped.
    fn refuse(&mut self, status: Status) {
        self.status = status;
        self.bytes = Vec::new();
    }

    fn add(&mut self, receiver: &Receiver, data: &[u8]) -> Result<(), Ended> {
        self.heard += data.len() as u64;
        if self.heard > HEAR_OUT * receiver.max_bytes {
            return Err(Ended::Endless(self.heard));
        }
        if self.status != Status::Success {
            return Ok(());
        }
        if self.bytes.len() as u64 + data.len() as u64 > receiver.max_bytes {
            self.refuse(Status::TooLong);
        } else if !self.share.grow(data.len() as u64) {
            self.refuse(Status::OutOfResources);
        } else {
            self.bytes.extend_from_slice(data);
        }
        Ok(())
    }
}

/// What an association waits for.
enum Waiting {
    /// A command, of which this has come.
    Command(Vec<u8>),
    /// The data set of one.
    DataSet(Box<Coming>),
}

/// Serves one association to its end.
pub(super) async fn serve<S>(
    receiver: &Arc<Receiver>,
    mut association: AsyncServerAssociation<S>,
    peer: SocketAddr,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let title = plain_title(association.peer_ae_title());
    let accepted = |reason: &PresentationContextResultReason| {
        *reason == PresentationContextResultReason::Acceptance
    };
    let contexts = Association::presentation_contexts(&association);
    if !contexts.iter().any(|context| accepted(&context.reason)) {
        receiver.tell(
            Trouble::NoContext,
            format!(
                "The DICOM sender {title} offers nothing that is taken: expected MR images, \
                 uncompressed, little endian"
            ),
        );
    }
    tracing::debug!(peer = %peer.ip(), title, "association opened");
    let contexts: BTreeMap<u8, (String, String)> = contexts
        .iter()
        .filter(|context| accepted(&context.reason))
        .map(|context| {
            let syntaxes = (
                context.abstract_syntax.clone(),
                context.transfer_syntax.clone(),
            );
            (context.id, syntaxes)
        })
        .collect();
    match converse(receiver, &mut association, &contexts).await {
        Ok(()) => tracing::debug!(title, "association released"),
        Err(ended) => {
            // Most who come here are gone already.
            let _ = timeout(TICK, AsyncAssociation::abort(association)).await;
            match ended {
                Ended::Silent(_) | Ended::Aborted => {
                    tracing::debug!(title, reason = %ended, "association ended");
                }
                ended => receiver.tell(
                    Trouble::Protocol,
                    format!("The association of the DICOM sender {title} ended: {ended}"),
                ),
            }
        }
    }
}

async fn converse<S>(
    receiver: &Arc<Receiver>,
    association: &mut AsyncServerAssociation<S>,
    contexts: &BTreeMap<u8, (String, String)>,
) -> Result<(), Ended>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let settings = &receiver.settings;
    let mut waiting = Waiting::Command(Vec::new());
    let mut deadline = None;
    loop {
        let begun = match &waiting {
            Waiting::Command(part) => !part.is_empty(),
            Waiting::DataSet(_) => true,
        };
        // A message has one deadline as a whole: who trickles must not keep its place.
        let until = match (begun, deadline) {
            (true, Some(until)) => until,
            (true, None) => *deadline.insert(Instant::now() + settings.object_timeout),
            (false, _) => {
                deadline = None;
                Instant::now() + settings.idle_timeout
            }
        };
        let received = tokio::time::timeout_at(until.into(), association.receive()).await;
        let pdu = match received {
            Ok(Ok(pdu)) => pdu,
            Ok(Err(UpperLayerError::ConnectionClosed { .. })) if !begun => {
                return Err(Ended::Aborted);
            }
            Ok(Err(UpperLayerError::ConnectionClosed { .. })) => {
                return Err(Ended::Gone("an object"));
            }
            Ok(Err(error)) => return Err(ended_by(&error)),
            Err(_) if begun => return Err(Ended::Slow(settings.object_timeout)),
            Err(_) => return Err(Ended::Silent(settings.idle_timeout)),
        };
        match pdu {
            Pdu::PData { data } if data.is_empty() => {
                return Err(Ended::Unexpected("an empty P-DATA"));
            }
            Pdu::PData { data } => {
                for value in data {
                    waiting = hear(receiver, association, contexts, waiting, value).await?;
                }
            }
            Pdu::ReleaseRQ => {
                return association
                    .send(&Pdu::ReleaseRP)
                    .await
                    .map_err(|_| Ended::Deaf);
            }
            Pdu::AbortRQ { .. } if begun => return Err(Ended::Gone("an object")),
            Pdu::AbortRQ { .. } => return Err(Ended::Aborted),
            Pdu::Unknown { .. } => return Err(Ended::NoPdu),
            _ => return Err(Ended::Unexpected("a PDU that has no place there")),
        }
    }
}

/// What an error of the upper layer means; its own message may hold what the peer wrote.
fn ended_by(error: &UpperLayerError) -> Ended {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if cause.downcast_ref::<io::Error>().is_some() {
            return Ended::Gone("the association");
        }
        source = cause.source();
    }
    Ended::NoPdu
}

/// Takes one value in and says what is waited for next.
async fn hear<S>(
    receiver: &Arc<Receiver>,
    association: &mut AsyncServerAssociation<S>,
    contexts: &BTreeMap<u8, (String, String)>,
    waiting: Waiting,
    value: PDataValue,
) -> Result<Waiting, Ended>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let id = value.presentation_context_id;
    let Some((class, transfer_syntax)) = contexts.get(&id) else {
        return Err(Ended::Unexpected("data of a context that was not accepted"));
    };
    match (waiting, value.value_type) {
        (Waiting::Command(mut set), PDataValueType::Command) => {
            set.extend(value.data);
            if set.len() > dimse::MAX_COMMAND_BYTES {
                return Err(Ended::Unexpected("a command set without end"));
            }
            if !value.is_last {
                return Ok(Waiting::Command(set));
            }
            let command = Command::parse(&set)?;
            let mut coming = Coming::new(receiver, command, id, transfer_syntax);
            match &coming.command.request {
                Request::Store { class: named, .. } if named.as_str() != class => {
                    coming.refuse(Status::OtherClass);
                }
                Request::Store { instance: None, .. } => coming.refuse(Status::InvalidInstance),
                Request::Store { .. } if !coming.command.has_data_set => {
                    coming.refuse(Status::NoDataSet);
                }
                Request::Store { .. } | Request::Echo => {}
                Request::Other | Request::Cancel | Request::Response => {
                    coming.refuse(Status::UnrecognizedOperation);
                }
            }
            if coming.command.has_data_set {
                return Ok(Waiting::DataSet(Box::new(coming)));
            }
            respond(receiver, association, coming).await
        }
        (Waiting::DataSet(mut coming), PDataValueType::Data) if coming.context == id => {
            coming.add(receiver, &value.data)?;
            if !value.is_last {
                return Ok(Waiting::DataSet(coming));
            }
            respond(receiver, association, *coming).await
        }
        (Waiting::Command(_), PDataValueType::Data) => {
            Err(Ended::Unexpected("a data set without a command"))
        }
        (Waiting::DataSet(_), _) => Err(Ended::Unexpected("something else within a data set")),
    }
}

/// Settles what came, and answers.
async fn respond<S>(
    receiver: &Arc<Receiver>,
    association: &mut AsyncServerAssociation<S>,
    mut coming: Coming,
) -> Result<Waiting, Ended>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let next = Ok(Waiting::Command(Vec::new()));
    let status = match &coming.command.request {
        Request::Cancel | Request::Response => return next,
        Request::Store {
            instance: Some(instance),
            ..
        } if coming.status == Status::Success => {
            let bytes = std::mem::take(&mut coming.bytes);
            receiver.keep(instance.object_id(), bytes).await
        }
        _ => coming.status,
    };
    let told = match status {
        Status::TooLong => Some((
            Trouble::TooLong,
            format!(
                "A DICOM object of {} bytes was refused: expected at most {} (scanner.max_file_mib)",
                coming.heard, receiver.max_bytes
            ),
        )),
        Status::OutOfResources => Some((
            Trouble::Busy,
            "DICOM objects are refused for now: too many wait to be read. The scanner must send them \
             again"
                .into(),
        )),
        _ => None,
    };
    if let Some((trouble, text)) = told {
        receiver.tell(trouble, text);
    }
    let response = Pdu::PData {
        data: vec![PDataValue {
            presentation_context_id: coming.context,
            value_type: PDataValueType::Command,
            is_last: true,
            data: coming.command.response(status),
        }],
    };
    match timeout(
        receiver.settings.association_timeout,
        association.send(&response),
    )
    .await
    {
        Ok(Ok(())) => next,
        _ => Err(Ended::Deaf),
    }
}
