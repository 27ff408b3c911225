//! A receiver on a port of this machine, and peers that lie, stall and stutter.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener as StdListener, TcpStream as StdStream};
use std::path::Path;
use std::sync::mpsc::{Receiver as Channel, sync_channel};

use dicom_ul::association::{ClientAssociation, ClientAssociationOptions};
use dicom_ul::pdu::{PDataValue, PDataValueType, Pdu};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tempfile::TempDir;

use super::*;

const IMPLICIT: &str = "1.2.840.10008.1.2";
const JPEG_LOSSLESS: &str = "1.2.840.10008.1.2.4.70";
const MAX_BYTES: u64 = 1 << 20;

/// A receiver that runs until it is dropped.
struct Running {
    address: SocketAddr,
    dir: TempDir,
    files: Channel<Found>,
    faults: Channel<Event>,
    stop: Arc<AtomicBool>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn running(waiting: usize, change: impl FnOnce(&mut Receive)) -> Running {
    let free = StdListener::bind("127.0.0.1:0").unwrap();
    let mut settings = Receive {
        listen: free.local_addr().unwrap(),
        ae_title: "BOX".into(),
        allow: vec!["MR1".into()],
        peers: Vec::new(),
        max_associations: 4,
        association_timeout: Duration::from_secs(5),
        idle_timeout: Duration::from_secs(5),
        object_timeout: Duration::from_secs(5),
        tls: None,
    };
    drop(free);
    change(&mut settings);
    let address = settings.listen;
    let dir = tempfile::tempdir().unwrap();
    let (file_sender, files) = sync_channel(waiting);
    let (fault_sender, faults) = sync_channel(64);
    let stop = Arc::new(AtomicBool::new(false));
    let limits = Limits {
        object_bytes: MAX_BYTES,
        waiting: 64,
    };
    let incoming = dir.path().join("incoming");
    spawn(
        &settings,
        incoming,
        limits,
        [],
        file_sender,
        fault_sender,
        &stop,
    )
    .unwrap();
    let running = Running {
        address,
        dir,
        files,
        faults,
        stop,
    };
    let started = Instant::now();
    while StdStream::connect(address).is_err() {
        assert!(started.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
    running
}

impl Running {
    fn spooled(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("incoming"))
            .unwrap()
            .count()
    }

    fn fault(&self) -> String {
        match self.faults.recv_timeout(Duration::from_secs(10)).unwrap() {
            Event::Fault(text) => text,
            _ => panic!("not a fault"),
        }
    }

    fn call(&self) -> ClientAssociationOptions<'static> {
        ClientAssociationOptions::new()
            .calling_ae_title("MR1")
            .called_ae_title("BOX")
            .with_presentation_context(CLASSES[0], vec![IMPLICIT])
            .with_presentation_context(VERIFICATION, vec![IMPLICIT])
    }

    fn associate(&self) -> ClientAssociation<StdStream> {
        self.call().establish(self.address).unwrap()
    }
}

fn element(tag: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0];
    bytes.extend(tag.to_le_bytes());
    bytes.extend(u32::try_from(value.len()).unwrap().to_le_bytes());
    bytes.extend(value);
    bytes
}

fn request(field: u16, class: &str, instance: Option<&str>, data_set: u16) -> Vec<u8> {
    let even = |text: &str| {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(bytes.len().next_multiple_of(2), 0);
        bytes
    };
    let mut set = element(0x0002, &even(class));
    set.extend(element(0x0100, &field.to_le_bytes()));
    set.extend(element(0x0110, &9_u16.to_le_bytes()));
    set.extend(element(0x0800, &data_set.to_le_bytes()));
    if let Some(instance) = instance {
        set.extend(element(0x1000, &even(instance)));
    }
    set
}

fn command(context: u8, set: Vec<u8>) -> Pdu {
    value(context, PDataValueType::Command, true, set)
}

fn value(context: u8, value_type: PDataValueType, is_last: bool, data: Vec<u8>) -> Pdu {
    Pdu::PData {
        data: vec![PDataValue {
            presentation_context_id: context,
            value_type,
            is_last,
            data,
        }],
    }
}

/// The status of the next response.
fn status(association: &mut ClientAssociation<StdStream>) -> u16 {
    let Pdu::PData { data } = association.receive().unwrap() else {
        panic!("no response");
    };
    let set = &data[0].data;
    let at = set
        .windows(8)
        .position(|eight| eight == [0, 0, 0, 9, 2, 0, 0, 0])
        .unwrap();
    u16::from_le_bytes([set[at + 8], set[at + 9]])
}

fn context(association: &ClientAssociation<StdStream>, class: &str) -> u8 {
    association
        .presentation_contexts()
        .iter()
        .find(|context| context.abstract_syntax == class)
        .unwrap()
        .id
}

fn store(association: &mut ClientAssociation<StdStream>, instance: &str, bytes: &[u8]) -> u16 {
    let id = context(association, CLASSES[0]);
    let set = request(0x0001, CLASSES[0], Some(instance), 1);
    association.send(&command(id, set)).unwrap();
    let mut pieces = bytes.chunks(16_000).peekable();
    while let Some(piece) = pieces.next() {
        let last = pieces.peek().is_none();
        association
            .send(&value(id, PDataValueType::Data, last, piece.to_vec()))
            .unwrap();
    }
    status(association)
}

fn echo(running: &Running) -> u16 {
    let mut association = running.associate();
    let id = context(&association, VERIFICATION);
    let set = request(0x0030, VERIFICATION, None, 0x0101);
    association.send(&command(id, set)).unwrap();
    let status = status(&mut association);
    association.release().unwrap();
    status
}

#[test]
fn an_object_becomes_a_file_once_and_is_safe_when_it_is_acknowledged() {
    let running = running(8, |_| {});
    let data: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let mut association = running.associate();
    assert_eq!(store(&mut association, "1.2.3", &data), 0);
    assert_eq!(running.spooled(), 1);
    let found = running.files.try_recv().unwrap();
    let bytes = std::fs::read(&found.path).unwrap();
    assert_eq!(&bytes[128..132], b"DICM");
    assert!(bytes.ends_with(&data));
    assert_eq!(found.len_bytes, bytes.len() as u64);
    assert!(!found.path.to_str().unwrap().contains("1.2.3"));

    // Sent again, it is acknowledged and nothing comes of it; another one is another one.
    assert_eq!(store(&mut association, "1.2.3", &data), 0);
    assert!(running.files.try_recv().is_err());
    assert_eq!(store(&mut association, "1.2.4", &data), 0);
    assert_ne!(running.files.try_recv().unwrap().id, found.id);
    association.release().unwrap();
    found.give_up();
    assert_eq!(running.spooled(), 1);
    assert_eq!(echo(&running), 0);
}

#[test]
fn a_message_may_come_in_any_split() {
    let running = running(8, |_| {});
    let mut association = running.associate();
    let id = context(&association, CLASSES[0]);
    let set = request(0x0001, CLASSES[0], Some("1.2.3"), 1);
    // A command in two pieces, then command and data in the same PDU.
    let (first, second) = set.split_at(20);
    association
        .send(&value(id, PDataValueType::Command, false, first.to_vec()))
        .unwrap();
    let piece = |value_type, is_last, data: &[u8]| PDataValue {
        presentation_context_id: id,
        value_type,
        is_last,
        data: data.to_vec(),
    };
    let data = vec![
        piece(PDataValueType::Command, true, second),
        piece(PDataValueType::Data, false, b"ab"),
        piece(PDataValueType::Data, true, b"cd"),
    ];
    association.send(&Pdu::PData { data }).unwrap();
    assert_eq!(status(&mut association), 0);
    let found = running.files.try_recv().unwrap();
    assert!(std::fs::read(found.path).unwrap().ends_with(b"abcd"));
}

#[test]
fn a_reader_that_is_behind_makes_senders_come_back() {
    let running = running(1, |_| {});
    let mut association = running.associate();
    assert_eq!(store(&mut association, "1.2.1", b"one!"), 0);
    assert_eq!(store(&mut association, "1.2.2", b"two!"), 0xa700);
    assert_eq!(running.spooled(), 1, "a refused object leaves nothing");
    assert!(running.fault().contains("send them again"));
    running.files.try_recv().unwrap();
    assert_eq!(store(&mut association, "1.2.2", b"two!"), 0);
}

#[test]
fn objects_too_long_or_too_strange_are_refused_by_status_and_leave_nothing() {
    let running = running(8, |_| {});
    let mut association = running.associate();
    let long = vec![7; usize::try_from(MAX_BYTES).unwrap()];
    assert_eq!(store(&mut association, "1.2.1", &long), 0xc001);
    assert!(running.fault().contains("scanner.max_file_mib"));
    assert_eq!(store(&mut association, "ZZCANARY^PAT", b"data"), 0x0117);
    let id = context(&association, CLASSES[0]);
    let mut ask = |set: Vec<u8>, data: bool| {
        association.send(&command(id, set)).unwrap();
        if data {
            association
                .send(&value(id, PDataValueType::Data, true, b"data".to_vec()))
                .unwrap();
        }
        status(&mut association)
    };
    let other = request(0x0001, CLASSES[1], Some("1.2.3"), 1);
    assert_eq!(ask(other, true), 0xa900);
    let none = request(0x0001, CLASSES[0], Some("1.2.3"), 0x0101);
    assert_eq!(ask(none, false), 0xc002);
    let find = request(0x0020, CLASSES[0], None, 1);
    assert_eq!(ask(find, true), 0x0211);
    // The association is as good as before.
    assert_eq!(store(&mut association, "1.2.3", b"data"), 0);
    assert_eq!(running.spooled(), 1);
    // One that never ends is cut off.
    let set = request(0x0001, CLASSES[0], Some("1.2.4"), 1);
    association.send(&command(id, set)).unwrap();
    let piece = value(id, PDataValueType::Data, false, vec![0; 100_000]);
    let mut sent = 0;
    while association.send(&piece).is_ok() {
        sent += 100_000;
        assert!(sent < 100 * MAX_BYTES, "nobody stops it");
    }
    assert_eq!(running.spooled(), 1);
}

#[test]
fn who_is_not_expected_is_refused_with_the_reason_and_shown_in_plain_letters() {
    let refused = |options: ClientAssociationOptions<'static>, address| {
        let error = options.establish(address).unwrap_err();
        format!("{error}")
    };
    let running = running(8, |_| {});
    let options = running.call().calling_ae_title("ZZ^PAT\u{1b}[1m");
    let error = refused(options, running.address);
    assert!(error.contains("rejected"), "{error}");
    let fault = running.fault();
    assert!(fault.contains("receive.allow"), "{fault}");
    assert!(fault.contains("ZZ?PAT??1m"), "{fault}");
    let options = running.call().called_ae_title("ELSE");
    let error = refused(options, running.address);
    assert!(error.contains("rejected"), "{error}");
    let fault = running.fault();
    assert!(
        fault.contains("ELSE") && fault.contains("receive.ae_title is BOX"),
        "{fault}"
    );
    // The same again is not told again at once.
    let _ = running
        .call()
        .called_ae_title("ELSE")
        .establish(running.address);
    assert!(running.faults.try_recv().is_err());

    let elsewhere = super::tests::running(8, |settings| {
        settings.peers = vec!["192.0.2.1".parse().unwrap()];
    });
    assert!(elsewhere.call().establish(elsewhere.address).is_err());
    assert!(elsewhere.fault().contains("receive.peers"));
}

#[test]
fn what_is_not_taken_is_not_agreed_upon() {
    let running = running(8, |_| {});
    let csa_non_image = "1.3.12.2.1107.5.9.1";
    let association = ClientAssociationOptions::new()
        .calling_ae_title("MR1")
        .called_ae_title("BOX")
        .with_presentation_context(CLASSES[0], vec![JPEG_LOSSLESS])
        .with_presentation_context(csa_non_image, vec![IMPLICIT])
        .establish(running.address);
    let error = association.unwrap_err().to_string();
    assert!(error.contains("no presentation contexts"), "{error}");
    assert!(running.fault().contains("uncompressed"));
    let mut association = ClientAssociationOptions::new()
        .calling_ae_title("MR1")
        .called_ae_title("BOX")
        .with_presentation_context(CLASSES[0], vec![JPEG_LOSSLESS, IMPLICIT])
        .with_presentation_context(csa_non_image, vec![IMPLICIT])
        .establish(running.address)
        .unwrap();
    assert_eq!(association.presentation_contexts().len(), 1);
    assert_eq!(store(&mut association, "1.2.3", b"data"), 0);
}

#[test]
fn an_object_that_ends_in_the_middle_leaves_nothing() {
    let running = running(8, |_| {});
    let begin = || {
        let mut association = running.associate();
        let id = context(&association, CLASSES[0]);
        let set = request(0x0001, CLASSES[0], Some("1.2.3"), 1);
        association.send(&command(id, set)).unwrap();
        association
            .send(&value(id, PDataValueType::Data, false, vec![1; 5000]))
            .unwrap();
        association
    };
    begin().abort().unwrap();
    assert!(running.fault().contains("in the middle of an object"));
    begin().inner_stream().shutdown(Shutdown::Both).unwrap();
    let mut strange = begin();
    let id = context(&strange, CLASSES[0]);
    let set = request(0x0001, CLASSES[0], Some("1.2.3"), 1);
    strange.send(&command(id, set)).unwrap();
    assert!(matches!(
        strange.receive(),
        Ok(Pdu::AbortRQ { .. }) | Err(_)
    ));
    assert_eq!(echo(&running), 0);
    assert_eq!(running.spooled(), 0);
    assert!(running.files.try_recv().is_err());
}

#[test]
fn who_stalls_or_trickles_loses_its_place() {
    let running = running(8, |settings| {
        settings.max_associations = 3;
        settings.association_timeout = Duration::from_secs(1);
        settings.idle_timeout = Duration::from_secs(1);
        settings.object_timeout = Duration::from_secs(1);
    });
    // One says nothing, one agrees and then says nothing, one sends a byte now and then.
    let mut silent = StdStream::connect(running.address).unwrap();
    let mut idle = running.associate();
    let mut trickles = running.associate();
    let id = context(&trickles, CLASSES[0]);
    let set = request(0x0001, CLASSES[0], Some("1.2.3"), 1);
    trickles.send(&command(id, set)).unwrap();
    let started = Instant::now();
    // There is no place for a fourth, which is told so.
    let error = running.call().establish(running.address).unwrap_err();
    assert!(error.to_string().contains("rejected"), "{error}");
    while trickles
        .send(&value(id, PDataValueType::Data, false, vec![0, 0]))
        .is_ok()
    {
        assert!(started.elapsed() < Duration::from_secs(10), "it may go on");
        std::thread::sleep(Duration::from_millis(200));
    }
    let mut byte = [0];
    assert!(matches!(silent.read(&mut byte), Ok(0) | Err(_)));
    assert!(matches!(idle.receive(), Ok(Pdu::AbortRQ { .. }) | Err(_)));
    assert_eq!(echo(&running), 0);
}

#[test]
fn an_address_that_is_taken_is_a_fault_and_no_end() {
    let taken = StdListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let running = running(8, |settings| settings.listen = address);
    assert!(running.fault().contains("receive.listen"));
    drop(taken);
    let freed = Instant::now();
    while StdStream::connect(address).is_err() {
        assert!(
            freed.elapsed() < Duration::from_secs(20),
            "it is not tried again"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(echo(&running), 0);
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// The bytes of a whole association with one object.
fn conversation() -> Vec<u8> {
    let associate = Pdu::AssociationRQ(dicom_ul::pdu::AssociationRQ {
        protocol_version: 1,
        calling_ae_title: "MR1".into(),
        called_ae_title: "BOX".into(),
        application_context_name: "1.2.840.10008.3.1.1.1".into(),
        presentation_contexts: vec![dicom_ul::pdu::PresentationContextProposed {
            id: 1,
            abstract_syntax: CLASSES[0].into(),
            transfer_syntaxes: vec![IMPLICIT.into()],
        }],
        user_variables: vec![dicom_ul::pdu::UserVariableItem::MaxLength(16_384)],
    });
    let set = request(0x0001, CLASSES[0], Some("1.2.3"), 1);
    let pdus = [
        associate,
        command(1, set),
        value(1, PDataValueType::Data, false, vec![3; 300]),
        value(1, PDataValueType::Data, true, vec![4; 300]),
        Pdu::ReleaseRQ,
    ];
    let mut bytes = Vec::new();
    for pdu in &pdus {
        dicom_ul::pdu::write_pdu(&mut bytes, pdu).unwrap();
    }
    bytes
}

/// Says something and hangs up.
fn say(address: SocketAddr, bytes: &[u8]) {
    let mut stream = StdStream::connect(address).unwrap();
    // It may hang up first.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut answer = [0; 512];
    while matches!(stream.read(&mut answer), Ok(1..)) {}
}

fn left_in(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().to_string_lossy().into_owned()
    };
    std::fs::read_dir(dir).unwrap().map(name).collect()
}

#[test]
fn bytes_that_are_no_protocol_end_their_connection_and_nothing_else() {
    let running = running(64, |_| {});
    let whole = conversation();
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let noise = proptest::collection::vec(any::<u8>(), 0..400);
    // Noise, PDUs of any type that promise any length, and a conversation cut and bent anywhere.
    let promise = (0_u8..9, any::<u32>(), noise.clone()).prop_map(|(kind, len, rest)| {
        let mut bytes = vec![kind, 0];
        bytes.extend(len.to_be_bytes());
        bytes.extend(rest);
        bytes
    });
    let bent = (
        0..whole.len(),
        proptest::collection::vec((0..whole.len(), any::<u8>()), 0..4),
    )
        .prop_map(move |(cut, bends)| {
            let mut bytes = whole.clone();
            for (at, value) in bends {
                bytes[at] = value;
            }
            bytes.truncate(cut);
            bytes
        });
    let what = prop_oneof![noise, promise, bent];
    let before = resident();
    runner
        .run(&what, |bytes| {
            say(running.address, &bytes);
            Ok(())
        })
        .unwrap();
    // A length of four gigabytes is not believed, however much comes.
    let mut endless = vec![4, 0, 0xff, 0xff, 0xff, 0xff];
    endless.resize(8 << 20, 0);
    say(running.address, &endless);

    assert_eq!(echo(&running), 0, "it goes on");
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "grew by {grown} bytes");
    // Objects that came whole were kept whole: with their head and to their last byte.
    while let Ok(found) = running.files.try_recv() {
        let bytes = std::fs::read(&found.path).unwrap();
        assert_eq!(&bytes[128..132], b"DICM");
        found.give_up();
    }
    let left = left_in(&running.dir.path().join("incoming"));
    assert!(left.is_empty(), "{left:?}");
}
