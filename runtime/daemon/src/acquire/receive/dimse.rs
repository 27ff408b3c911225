//! Command sets of DIMSE (PS3.7): the few that a receiver of images hears and says.
//!
//! A command set is a handful of elements of group 0000 in implicit VR little endian. It is read
//! here, by lengths that are checked against what has come, and not by a DICOM library, which
//! allocates what a length says. The data set that follows is never looked into.

use std::fmt;

use sha2::{Digest, Sha256};

/// Longest command set; a C-STORE request has about 250 bytes.
pub(super) const MAX_COMMAND_BYTES: usize = 4096;
/// Longest UID (PS3.5, 9.1).
const MAX_UID: usize = 64;
/// The command has no data set (PS3.7, E.1).
const NO_DATA_SET: u16 = 0x0101;

const C_STORE_RQ: u16 = 0x0001;
const C_ECHO_RQ: u16 = 0x0030;
const C_CANCEL_RQ: u16 = 0x0fff;
/// Of a response.
const RESPONSE: u16 = 0x8000;

const GROUP_LENGTH: u16 = 0x0000;
const AFFECTED_SOP_CLASS: u16 = 0x0002;
const COMMAND_FIELD: u16 = 0x0100;
const MESSAGE_ID: u16 = 0x0110;
const MESSAGE_ID_RESPONDED: u16 = 0x0120;
const DATA_SET_TYPE: u16 = 0x0800;
const STATUS: u16 = 0x0900;
const ERROR_COMMENT: u16 = 0x0902;
const AFFECTED_SOP_INSTANCE: u16 = 0x1000;

/// Why a command set is not understood. Nothing of its text is in the message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CommandError {
    /// It ends within an element.
    #[error("the command set ends at byte {found}, expected an element up to byte {expected}")]
    Truncated {
        /// Its length.
        found: usize,
        /// Where the element would end.
        expected: u64,
    },
    /// An element of another group than 0000.
    #[error("the command set has an element of group {group:04x} at byte {offset}, expected 0000")]
    Group {
        /// The group.
        group: u16,
        /// Where it begins.
        offset: usize,
    },
    /// An element that must be there, or has no value that it may have.
    #[error("the command set has no usable element (0000,{element:04x})")]
    Element {
        /// Which.
        element: u16,
    },
}

/// A UID: digits and dots, at most 64. What it is is not shown anywhere.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Uid(String);

impl fmt::Debug for Uid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Uid(..)")
    }
}

impl Uid {
    /// From an element's value, which may be padded; `None` where it is no UID.
    pub(super) fn from_value(value: &[u8]) -> Option<Uid> {
        let padded = value
            .iter()
            .rposition(|byte| !matches!(byte, 0 | b' '))
            .map_or(0, |last| last + 1);
        let value = &value[..padded];
        let plain = |byte: &u8| byte.is_ascii_digit() || *byte == b'.';
        if value.is_empty() || value.len() > MAX_UID || !value.iter().all(plain) {
            return None;
        }
        String::from_utf8(value.to_vec()).ok().map(Uid)
    }

    /// Its text.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands for the object of this instance UID wherever it is kept.
    pub(super) fn object_id(&self) -> [u8; 16] {
        let mut hash = Sha256::new();
        hash.update(b"sop instance\0");
        hash.update(self.0.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        id
    }
}

/// What a peer asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Whether anybody is there.
    Echo,
    /// To keep the object that follows.
    Store {
        /// What kind of object.
        class: Uid,
        /// Which object; `None` where it is no UID.
        instance: Option<Uid>,
    },
    /// To stop something; nothing here can be stopped.
    Cancel,
    /// A response, to which nothing is to be said.
    Response,
    /// Anything else.
    Other,
}

/// A command set as it was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Command {
    /// What is asked for.
    pub(super) request: Request,
    /// The command's field, for the response.
    pub(super) field: u16,
    /// The message's number, for the response.
    pub(super) message: u16,
    /// A data set follows.
    pub(super) has_data_set: bool,
}

/// The outcome of a request (PS3.7 annex C, PS3.4 table B.2-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Done.
    Success,
    /// There is no room now; the same object may be sent again.
    OutOfResources,
    /// The object is longer than any scanner file here; another try will not mend that.
    TooLong,
    /// Nothing came of the object.
    NoDataSet,
    /// The object cannot be kept.
    ProcessingFailure,
    /// The instance UID is none.
    InvalidInstance,
    /// The class is not the one that was agreed upon.
    OtherClass,
    /// The command is none that is known here.
    UnrecognizedOperation,
}

impl Status {
    /// As it goes over the wire.
    pub(super) fn code(self) -> u16 {
        match self {
            Status::Success => 0x0000,
            Status::OutOfResources => 0xa700,
            Status::TooLong => 0xc001,
            Status::NoDataSet => 0xc002,
            Status::ProcessingFailure => 0x0110,
            Status::InvalidInstance => 0x0117,
            Status::OtherClass => 0xa900,
            Status::UnrecognizedOperation => 0x0211,
        }
    }

    /// For whoever looks at the sender's screen; at most 64 characters.
    fn comment(self) -> Option<&'static str> {
        match self {
            Status::Success => None,
            Status::OutOfResources => Some("busy, send it again"),
            Status::TooLong => Some("longer than scanner.max_file_mib"),
            Status::NoDataSet => Some("no data set came"),
            Status::ProcessingFailure => Some("cannot be kept, see the operator's page"),
            Status::InvalidInstance => Some("SOP instance UID is not valid"),
            Status::OtherClass => Some("SOP class is not the context's"),
            Status::UnrecognizedOperation => Some("only C-STORE and C-ECHO are served"),
        }
    }
}

impl Command {
    /// Reads a command set.
    ///
    /// # Errors
    /// [`CommandError`] where it is none that can be answered.
    pub(super) fn parse(bytes: &[u8]) -> Result<Command, CommandError> {
        let (mut field, mut message, mut data_set) = (None, None, None);
        let (mut class, mut instance) = (None, None);
        let mut offset = 0;
        while offset < bytes.len() {
            let truncated = |expected| CommandError::Truncated {
                found: bytes.len(),
                expected,
            };
            let header = bytes
                .get(offset..offset + 8)
                .ok_or_else(|| truncated(offset as u64 + 8))?;
            let group = u16::from_le_bytes([header[0], header[1]]);
            let element = u16::from_le_bytes([header[2], header[3]]);
            let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
            if group != 0 {
                return Err(CommandError::Group { group, offset });
            }
            let start = offset + 8;
            let end = start as u64 + u64::from(len);
            let value = usize::try_from(end)
                .ok()
                .and_then(|end| bytes.get(start..end))
                .ok_or_else(|| truncated(end))?;
            match element {
                COMMAND_FIELD => field = number(value),
                MESSAGE_ID => message = number(value),
                DATA_SET_TYPE => data_set = number(value),
                AFFECTED_SOP_CLASS => class = Uid::from_value(value),
                AFFECTED_SOP_INSTANCE => instance = Uid::from_value(value),
                _ => {}
            }
            offset = start + value.len();
        }
        let missing = |element| CommandError::Element { element };
        let field = field.ok_or_else(|| missing(COMMAND_FIELD))?;
        let data_set = data_set.ok_or_else(|| missing(DATA_SET_TYPE))?;
        let request = match field {
            C_STORE_RQ => Request::Store {
                class: class.ok_or_else(|| missing(AFFECTED_SOP_CLASS))?,
                instance,
            },
            C_ECHO_RQ => Request::Echo,
            C_CANCEL_RQ => Request::Cancel,
            field if field & RESPONSE != 0 => Request::Response,
            _ => Request::Other,
        };
        let message = match request {
            Request::Cancel | Request::Response => message.unwrap_or(0),
            _ => message.ok_or_else(|| missing(MESSAGE_ID))?,
        };
        Ok(Command {
            request,
            field,
            message,
            has_data_set: data_set != NO_DATA_SET,
        })
    }

    /// The command set of the response to this.
    pub(super) fn response(&self, status: Status) -> Vec<u8> {
        let mut elements = Vec::new();
        let (class, instance) = match &self.request {
            Request::Store { class, instance } => (Some(class.as_str()), instance.as_ref()),
            Request::Echo => (Some(super::VERIFICATION), None),
            _ => (None, None),
        };
        if let Some(class) = class {
            put(&mut elements, AFFECTED_SOP_CLASS, class.as_bytes(), 0);
        }
        put_number(&mut elements, COMMAND_FIELD, self.field | RESPONSE);
        put_number(&mut elements, MESSAGE_ID_RESPONDED, self.message);
        put_number(&mut elements, DATA_SET_TYPE, NO_DATA_SET);
        put_number(&mut elements, STATUS, status.code());
        if let Some(comment) = status.comment() {
            put(&mut elements, ERROR_COMMENT, comment.as_bytes(), b' ');
        }
        if let Some(instance) = instance {
            put(
                &mut elements,
                AFFECTED_SOP_INSTANCE,
                instance.as_str().as_bytes(),
                0,
            );
        }
        let mut set = Vec::with_capacity(elements.len() + 12);
        let len = u32::try_from(elements.len()).unwrap_or(0);
        put(&mut set, GROUP_LENGTH, &len.to_le_bytes(), 0);
        set.extend(elements);
        set
    }
}

fn number(value: &[u8]) -> Option<u16> {
    Some(u16::from_le_bytes(value.try_into().ok()?))
}

fn put_number(set: &mut Vec<u8>, element: u16, value: u16) {
    put(set, element, &value.to_le_bytes(), 0);
}

/// Appends an element, padded to an even length.
fn put(set: &mut Vec<u8>, element: u16, value: &[u8], pad: u8) {
    let len = u32::try_from(value.len().next_multiple_of(2)).unwrap_or(0);
    set.extend([0, 0]);
    set.extend(element.to_le_bytes());
    set.extend(len.to_le_bytes());
    set.extend(value);
    if value.len() % 2 == 1 {
        set.push(pad);
    }
}

/// What a file of this object begins with (PS3.10, 7.1): the data set follows as it came.
pub(super) fn file_head(class: &Uid, instance: &Uid, transfer_syntax: &str) -> Vec<u8> {
    let mut meta = Vec::new();
    // The one element here whose value representation has a long length.
    meta.extend([0x02, 0x00, 0x01, 0x00, b'O', b'B', 0, 0, 2, 0, 0, 0, 0, 1]);
    for (element, value) in [
        (0x0002, class.as_str()),
        (0x0003, instance.as_str()),
        (0x0010, transfer_syntax),
        (0x0012, dicom_ul::IMPLEMENTATION_CLASS_UID),
    ] {
        put_uid(&mut meta, element, value);
    }
    let mut head = vec![0; 128];
    head.extend(b"DICM");
    head.extend([0x02, 0x00, 0x00, 0x00, b'U', b'L', 4, 0]);
    head.extend(u32::try_from(meta.len()).unwrap_or(0).to_le_bytes());
    head.extend(meta);
    head
}

fn put_uid(meta: &mut Vec<u8>, element: u16, value: &str) {
    let len = u16::try_from(value.len().next_multiple_of(2)).unwrap_or(0);
    meta.extend([0x02, 0x00]);
    meta.extend(element.to_le_bytes());
    meta.extend(b"UI");
    meta.extend(len.to_le_bytes());
    meta.extend(value.as_bytes());
    if value.len() % 2 == 1 {
        meta.push(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CLASS: &str = "1.2.840.10008.5.1.4.1.1.4";

    fn store(instance: &[u8]) -> Vec<u8> {
        let mut set = Vec::new();
        put(&mut set, GROUP_LENGTH, &[0; 4], 0);
        put(&mut set, AFFECTED_SOP_CLASS, CLASS.as_bytes(), 0);
        put_number(&mut set, COMMAND_FIELD, C_STORE_RQ);
        put_number(&mut set, MESSAGE_ID, 7);
        put_number(&mut set, DATA_SET_TYPE, 1);
        put(&mut set, AFFECTED_SOP_INSTANCE, instance, 0);
        set
    }

    #[test]
    fn a_store_request_is_understood_and_answered_in_its_own_terms() {
        let command = Command::parse(&store(b"1.2.3")).unwrap();
        assert_eq!(command.message, 7);
        assert!(command.has_data_set);
        let Request::Store { class, instance } = &command.request else {
            panic!("{command:?}");
        };
        assert_eq!(class.as_str(), CLASS);
        assert_eq!(instance.as_ref().unwrap().as_str(), "1.2.3");

        let answer = command.response(Status::OutOfResources);
        let declared = u32::from_le_bytes(answer[8..12].try_into().unwrap());
        assert_eq!(declared as usize, answer.len() - 12);
        let again = Command::parse(&answer).unwrap();
        assert_eq!(
            (again.request, again.field),
            (Request::Response, C_STORE_RQ | RESPONSE)
        );
        let status = answer
            .windows(10)
            .find(|ten| ten[..8] == [0, 0, 0, 9, 2, 0, 0, 0])
            .unwrap();
        assert_eq!(status[8..], [0x00, 0xa7]);
    }

    #[test]
    fn what_is_no_uid_is_no_instance_and_never_shown() {
        for wrong in [&b"ZZCANARY"[..], b"", b"1.2\\..", &[b'1'; 65]] {
            let command = Command::parse(&store(wrong)).unwrap();
            assert!(
                matches!(&command.request, Request::Store { instance: None, .. }),
                "{wrong:?}"
            );
        }
        let shown = format!("{:?}", Command::parse(&store(b"1.2.3.4")).unwrap());
        assert!(!shown.contains("1.2.3.4"), "{shown}");
    }

    #[test]
    fn a_length_beyond_the_set_is_refused_by_number() {
        let mut set = store(b"1.2.3");
        let len = set.len();
        set[len - 10..len - 6].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = Command::parse(&set).unwrap_err();
        assert!(matches!(error, CommandError::Truncated { .. }), "{error}");
        assert!(error.to_string().contains(&len.to_string()), "{error}");
    }

    #[test]
    fn the_same_instance_is_the_same_object_and_another_is_not() {
        let id = |uid: &[u8]| Uid::from_value(uid).unwrap().object_id();
        assert_eq!(id(b"1.2.3\0"), id(b"1.2.3"));
        assert_ne!(id(b"1.2.3"), id(b"1.2.4"));
    }

    #[test]
    fn a_file_begins_with_preamble_and_meta_group_of_the_declared_length() {
        let uid = |text: &str| Uid::from_value(text.as_bytes()).unwrap();
        let head = file_head(&uid(CLASS), &uid("1.2.3"), "1.2.840.10008.1.2.1");
        assert_eq!(&head[128..132], b"DICM");
        let declared = u32::from_le_bytes(head[140..144].try_into().unwrap());
        assert_eq!(declared as usize, head.len() - 144);
        assert_eq!(head.len() % 2, 0);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Command::parse(&bytes);
        }

        #[test]
        fn a_request_cut_or_bent_anywhere_is_refused_or_still_answered(
            cut in 0_usize..140,
            at in 0_usize..140,
            value in any::<u8>(),
        ) {
            let mut set = store(b"1.2.840.99.1.2");
            set.truncate(cut);
            if let Some(byte) = set.get_mut(at) {
                *byte = value;
            }
            if let Ok(command) = Command::parse(&set) {
                let answer = command.response(Status::Success);
                prop_assert!(answer.len() <= 256);
                prop_assert!(Command::parse(&answer).is_ok());
            }
        }
    }
}
