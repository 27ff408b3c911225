//! A C-STORE client: the scanner pushes its images to a receiver.
//!
//! One association for as long as the receiver keeps it; a new one where it was closed, or where a
//! file needs a presentation context that was not agreed on.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use dicom_ul::pdu::{PDataValue, PDataValueType, PresentationContextResultReason};
use dicom_ul::{ClientAssociation, ClientAssociationOptions, Pdu};

use super::render::part_of;

/// A receiver that takes longer than this to answer is gone.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Why an image did not reach the receiver.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    /// No association.
    #[error("{address} ({called}) accepts no association")]
    Associate {
        /// Host and port.
        address: String,
        /// Its AE title.
        called: String,
        /// Why.
        source: Box<dicom_ul::association::Error>,
    },
    /// The receiver does not take such images.
    #[error("{address} does not accept images of class {class} in transfer syntax {syntax}")]
    Context {
        /// Host and port.
        address: String,
        /// SOP class UID.
        class: String,
        /// Transfer syntax UID.
        syntax: String,
    },
    /// The association broke.
    #[error("the association with {address} broke")]
    Broken {
        /// Host and port.
        address: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file is not one to send.
    #[error("a file has no DICOM meta header with class, instance and transfer syntax")]
    Meta,
}

/// What a file's meta header says, and where its data set begins.
#[derive(Debug, PartialEq, Eq)]
struct Meta {
    class: String,
    instance: String,
    syntax: String,
    data_set: usize,
}

/// A scanner's sending end.
#[derive(Debug)]
pub(super) struct Store {
    address: String,
    called: String,
    calling: String,
    association: Option<ClientAssociation<TcpStream>>,
    message: u16,
    refused: usize,
}

impl Store {
    /// - `address`: `host:port`.
    pub(super) fn new(address: &str, called: &str, calling: &str) -> Store {
        Store {
            address: address.into(),
            called: called.into(),
            calling: calling.into(),
            association: None,
            message: 0,
            refused: 0,
        }
    }

    /// Sends one file; with `kept_share`, only that much of its data set.
    ///
    /// A receiver that refuses an image is said at the end and stops nothing; one that closes the
    /// association over a broken image gets a new one for the next.
    pub(super) fn send(&mut self, file: &[u8], kept_share: Option<f64>) -> Result<(), StoreError> {
        let meta = Meta::of(file).ok_or(StoreError::Meta)?;
        let data = &file[meta.data_set..];
        let data = match kept_share {
            // Data sets have an even length, broken ones too.
            Some(share) => &data[..part_of(data.len(), share) & !1],
            None => data,
        };
        let kept = self.association.is_some();
        match self.try_send(&meta, data) {
            Err(StoreError::Broken { .. }) if kept_share.is_some() => {
                self.association = None;
                self.refused += 1;
                Ok(())
            }
            // It may have been closed since the last image.
            Err(StoreError::Broken { .. }) if kept => {
                self.association = None;
                self.try_send(&meta, data)
            }
            other => other,
        }
    }

    /// Releases the association.
    pub(super) fn close(mut self) -> Result<(), StoreError> {
        if self.refused > 0 {
            let mut out = std::io::stderr();
            // A courtesy; a closed standard error stops nothing.
            let _ = writeln!(out, "scanner: the receiver refused {} images", self.refused);
        }
        let address = self.address.clone();
        match self.association.take() {
            Some(association) => association.release().map_err(|source| StoreError::Broken {
                address,
                source: source.into(),
            }),
            None => Ok(()),
        }
    }

    fn broken(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
        StoreError::Broken {
            address: self.address.clone(),
            source: source.into(),
        }
    }

    fn try_send(&mut self, meta: &Meta, data: &[u8]) -> Result<(), StoreError> {
        let context = self.context(meta)?;
        self.message = self.message.wrapping_add(1).max(1);
        let command = PDataValue {
            presentation_context_id: context,
            value_type: PDataValueType::Command,
            is_last: true,
            data: store_request(meta, self.message),
        };
        let Some(association) = self.association.as_mut() else {
            return Err(self.broken("it is closed"));
        };
        let exchange = |association: &mut ClientAssociation<TcpStream>| {
            let command = Pdu::PData {
                data: vec![command],
            };
            association.send(&command)?;
            let mut writer = association.send_pdata(context);
            writer.write_all(data)?;
            writer.finish()?;
            status(association)
        };
        let status = exchange(association).map_err(|source| self.broken(source))?;
        // Success and warnings: the image is stored.
        if status != 0 && status >> 12 != 0xb {
            self.refused += 1;
        }
        Ok(())
    }

    /// The agreed presentation context of a file, over a new association where there is none.
    fn context(&mut self, meta: &Meta) -> Result<u8, StoreError> {
        let agreed = |association: &ClientAssociation<TcpStream>| {
            let mut contexts = association.presentation_contexts().iter();
            let found = contexts.find(|context| {
                context.reason == PresentationContextResultReason::Acceptance
                    && trimmed(&context.abstract_syntax) == meta.class
                    && trimmed(&context.transfer_syntax) == meta.syntax
            });
            found.map(|context| context.id)
        };
        if let Some(id) = self.association.as_ref().and_then(agreed) {
            return Ok(id);
        }
        if let Some(association) = self.association.take() {
            // It did not know this kind of image; what it thinks of the end does not matter.
            let _ = association.release();
        }
        let association = ClientAssociationOptions::new()
            .calling_ae_title(self.calling.as_str())
            .called_ae_title(self.called.as_str())
            .with_presentation_context(meta.class.as_str(), vec![meta.syntax.as_str()])
            .connection_timeout(CONNECT_WITHIN)
            .read_timeout(ANSWER_WITHIN)
            .write_timeout(ANSWER_WITHIN)
            .establish(self.address.as_str())
            .map_err(|source| StoreError::Associate {
                address: self.address.clone(),
                called: self.called.clone(),
                source: Box::new(source),
            })?;
        let id = agreed(&association).ok_or_else(|| StoreError::Context {
            address: self.address.clone(),
            class: meta.class.clone(),
            syntax: meta.syntax.clone(),
        })?;
        self.association = Some(association);
        Ok(id)
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Waits for the receiver's answer; returns its status.
fn status(association: &mut ClientAssociation<TcpStream>) -> Result<u16, Failure> {
    let mut command = Vec::new();
    loop {
        let Pdu::PData { data } = association.receive()? else {
            return Err("the receiver ended it instead of answering".into());
        };
        for value in data {
            if value.value_type == PDataValueType::Command {
                command.extend_from_slice(&value.data);
                if value.is_last {
                    let status = status_in(&command);
                    return status.ok_or_else(|| "the answer has no status".into());
                }
            }
        }
    }
}

/// A C-STORE request, implicit little endian.
fn store_request(meta: &Meta, message: u16) -> Vec<u8> {
    let mut elements = Vec::new();
    let mut element = |number: u16, value: &[u8]| {
        elements.extend_from_slice(&[0, 0]);
        elements.extend_from_slice(&number.to_le_bytes());
        let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
        elements.extend_from_slice(&len.to_le_bytes());
        elements.extend_from_slice(value);
    };
    let uid = |text: &str| {
        let mut bytes = text.as_bytes().to_vec();
        if bytes.len() % 2 == 1 {
            bytes.push(0);
        }
        bytes
    };
    element(0x0002, &uid(&meta.class));
    element(0x0100, &1_u16.to_le_bytes());
    element(0x0110, &message.to_le_bytes());
    element(0x0700, &0_u16.to_le_bytes());
    element(0x0800, &0_u16.to_le_bytes());
    element(0x1000, &uid(&meta.instance));
    let len = u32::try_from(elements.len()).unwrap_or(u32::MAX);
    let mut command = vec![0, 0, 0, 0, 4, 0, 0, 0];
    command.extend_from_slice(&len.to_le_bytes());
    command.append(&mut elements);
    command
}

/// The status of an answer, implicit little endian.
fn status_in(command: &[u8]) -> Option<u16> {
    let mut rest = command;
    loop {
        let (head, after) = rest.split_at_checked(8)?;
        let len = u32::from_le_bytes(head[4..8].try_into().ok()?);
        let (value, after) = after.split_at_checked(usize::try_from(len).ok()?)?;
        if head[..4] == [0, 0, 0, 9] {
            return Some(u16::from_le_bytes(value.get(..2)?.try_into().ok()?));
        }
        rest = after;
    }
}

fn trimmed(uid: &str) -> &str {
    uid.trim_end_matches(['\0', ' '])
}

impl Meta {
    fn of(file: &[u8]) -> Option<Meta> {
        let head = file.get(128..144)?;
        if !head.starts_with(b"DICM\x02\0\0\0UL\x04\0") {
            return None;
        }
        let len = u32::from_le_bytes(head[12..16].try_into().ok()?);
        let data_set = usize::try_from(len).ok()?.checked_add(144)?;
        let mut rest = file.get(144..data_set)?;
        let mut found = [None, None, None];
        while !rest.is_empty() {
            let element = u16::from_le_bytes(rest.get(2..4)?.try_into().ok()?);
            // OB and its like have two spare bytes and a longer length.
            let long = matches!(rest.get(4..6)?, b"OB" | b"OW" | b"UN");
            let (start, len) = if long {
                let len = u32::from_le_bytes(rest.get(8..12)?.try_into().ok()?);
                (12_usize, usize::try_from(len).ok()?)
            } else {
                let len = u16::from_le_bytes(rest.get(6..8)?.try_into().ok()?);
                (8, usize::from(len))
            };
            let value = rest.get(start..start.checked_add(len)?)?;
            let place = match element {
                0x0002 => Some(0),
                0x0003 => Some(1),
                0x0010 => Some(2),
                _ => None,
            };
            if let Some(place) = place {
                found[place] = Some(trimmed(std::str::from_utf8(value).ok()?).to_owned());
            }
            rest = rest.get(start + len..)?;
        }
        let [class, instance, syntax] = found;
        Some(Meta {
            class: class?,
            instance: instance?,
            syntax: syntax?,
            data_set,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use dicom_ul::ServerAssociationOptions;

    use super::super::base::{Base, Grid};
    use super::*;

    const CLASS: &str = "1.2.840.10008.5.1.4.1.1.4";
    const SYNTAX: &str = "1.2.840.10008.1.2.1";

    fn file(number: u32) -> Vec<u8> {
        let grid = Grid {
            sides: [32, 32, 9],
            voxel_mm: [6.0, 6.0, 8.0],
        };
        let mut volume = Base::synthetic(grid).volume;
        volume.voxels.mapv_inplace(f32::round);
        volume.header.series_uid = rtfmri::mosaic::series_uid(3);
        volume.header.acquisition = number;
        volume.header.tr_ms = 1000.0;
        rtfmri::mosaic::encode(&volume).unwrap()
    }

    /// A receiver on the same protocol library: takes `images` over as many associations as it
    /// gets, answers each with `status`, and closes after each where `curt`.
    fn receiver(images: usize, status: u16, curt: bool) -> (String, ReceiverThread) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let thread = std::thread::spawn(move || {
            let mut received = Vec::new();
            while received.len() < images {
                let (stream, _) = listener.accept().unwrap();
                let mut association = ServerAssociationOptions::new()
                    .accept_any()
                    .ae_title("BOX")
                    .with_abstract_syntax(CLASS)
                    .with_transfer_syntax(SYNTAX)
                    .establish(stream)
                    .unwrap();
                let (mut command, mut data_set) = (Vec::new(), Vec::new());
                while let Ok(Pdu::PData { data }) = association.receive() {
                    let mut whole = false;
                    let mut context = 0;
                    for value in data {
                        context = value.presentation_context_id;
                        if value.value_type == PDataValueType::Command {
                            command.extend(value.data);
                        } else {
                            data_set.extend(value.data);
                            whole = value.is_last;
                        }
                    }
                    if !whole {
                        continue;
                    }
                    received.push((std::mem::take(&mut command), std::mem::take(&mut data_set)));
                    let mut answer = vec![0, 0, 0, 9, 2, 0, 0, 0];
                    answer.extend(status.to_le_bytes());
                    let value = PDataValue {
                        presentation_context_id: context,
                        value_type: PDataValueType::Command,
                        is_last: true,
                        data: answer,
                    };
                    association.send(&Pdu::PData { data: vec![value] }).unwrap();
                    if curt || received.len() == images {
                        break;
                    }
                }
            }
            received
        });
        (address, thread)
    }

    type ReceiverThread = std::thread::JoinHandle<Vec<(Vec<u8>, Vec<u8>)>>;

    #[test]
    fn images_arrive_whole_with_their_class_and_instance() {
        let (address, thread) = receiver(3, 0, false);
        let mut store = Store::new(&address, "BOX", "SCANNER");
        for number in 1..=3 {
            store.send(&file(number), None).unwrap();
        }
        drop(store);
        for (number, (command, data_set)) in (1..).zip(thread.join().unwrap()) {
            let file = file(number);
            let meta = Meta::of(&file).unwrap();
            assert_eq!(meta.class, CLASS);
            assert_eq!(data_set, file[meta.data_set..]);
            let holds = |text: &str| command.windows(text.len()).any(|w| w == text.as_bytes());
            assert!(holds(CLASS) && holds(&meta.instance));
        }
    }

    #[test]
    fn receiver_that_closes_after_each_image_gets_a_new_association() {
        let (address, thread) = receiver(3, 0, true);
        let mut store = Store::new(&address, "BOX", "SCANNER");
        for number in 1..=3 {
            store.send(&file(number), None).unwrap();
        }
        assert_eq!(thread.join().unwrap().len(), 3);
    }

    #[test]
    fn truncated_image_is_sent_cut_and_a_refusal_is_counted() {
        let (address, thread) = receiver(1, 0xc000, false);
        let mut store = Store::new(&address, "BOX", "SCANNER");
        store.send(&file(1), Some(0.5)).unwrap();
        assert_eq!(store.refused, 1);
        drop(store);
        let received = thread.join().unwrap();
        let file = file(1);
        let whole = file.len() - Meta::of(&file).unwrap().data_set;
        assert_eq!(received[0].1.len(), (whole / 2) & !1);
    }

    #[test]
    fn nobody_there_is_said_with_the_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let error = Store::new(&address, "BOX", "SCANNER").send(&file(1), None);
        assert!(error.unwrap_err().to_string().contains(&address));
    }

    #[test]
    fn file_cut_within_its_meta_header_is_no_file_to_send() {
        let whole = file(1);
        let meta = Meta::of(&whole).unwrap();
        for end in 0..meta.data_set {
            assert_eq!(Meta::of(&whole[..end]), None, "cut at {end}");
        }
    }
}
