//! Images over the network: clients that nobody here wrote deliver a series by C-STORE, and one
//! that says what no client should.
//!
//! `storescu` and `echoscu` come with dcmtk, `pynetdicom` with pip (for the `python3` that is found,
//! or the one that `PYTHON` names), `openssl` with itself. Where one is missing, its test says so and passes.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![expect(clippy::print_stdout, reason = "a test says what it was done without")]

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dicom_ul::association::{
    Association, ClientAssociation, ClientAssociationOptions, SyncAssociation,
};
use dicom_ul::pdu::{PDataValue, PDataValueType, Pdu};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use system_tests::daemon::{Daemon, PATIENCE};
use system_tests::material::{TRIALS, phantom, signed};
use system_tests::one_at_a_time;
use system_tests::program::{Ended, finish};
use system_tests::scanner::files_of;
use system_tests::site::Site;

/// Titles of the box and of who may send.
const BOX: &str = "AFTERIMAGE";
const SCANNER: &str = "MR-SCANNER";
const MR_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.4";
const VERIFICATION: &str = "1.2.840.10008.1.1";
const EXPLICIT: &str = "1.2.840.10008.1.2.1";
const C_STORE: u16 = 0x0001;
const C_ECHO: u16 = 0x0030;
const NO_DATA_SET: u16 = 0x0101;
/// Exit code of settings that no other try will mend.
const SETTING: i32 = 78;
/// Statuses of C-STORE.
const SUCCESS: u16 = 0x0000;
const TOO_LONG: u16 = 0xc001;

/// Switches the receiver of a site on, at a port that is free now.
fn listening(site: &Site) -> SocketAddr {
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    site.change(
        "[task]",
        &format!("[receive]\nlisten = \"{address}\"\nallow = [\"{SCANNER}\"]\n[task]"),
    );
    address
}

/// Volumes that the newest start of the daemon and those before it say are in.
fn volumes_in(daemon: &Daemon<'_>) -> usize {
    daemon.log().matches("volume in").count()
}

#[track_caller]
fn wait_for_volumes(daemon: &mut Daemon<'_>, volumes: usize) {
    daemon.wait(&format!("{volumes} volumes"), |daemon| {
        (volumes_in(daemon) >= volumes).then_some(())
    });
}

/// Objects that wait in the session's spool.
fn spooled(site: &Site) -> usize {
    fs::read_dir(site.session().join("incoming"))
        .unwrap()
        .count()
}

/// A program of another's making, where it is there.
fn outside(program: &str, arguments: &[&str]) -> Option<Command> {
    let there = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    there.then(|| Command::new(program))
}

fn storescu() -> Option<Command> {
    let found = outside("storescu", &["--version"]);
    if found.is_none() {
        println!("storescu (dcmtk) was not found, nothing is tested with it");
    }
    found
}

fn send_with_storescu(title: &str, to: SocketAddr, files: &[PathBuf]) -> Option<Ended> {
    let mut command = storescu()?;
    command
        .args(["-v", "-aet", title, "-aec", BOX])
        .arg(to.ip().to_string())
        .arg(to.port().to_string())
        .args(files);
    Some(finish(command))
}

#[test]
fn storescu_delivers_a_series() {
    let _turn = one_at_a_time();
    if storescu().is_none() {
        return;
    }
    let site = Site::of_phantom(signed(), phantom());
    let address = listening(&site);
    let mut daemon = Daemon::start(&site);
    let files = &phantom().files;
    if let Some(mut echo) = outside("echoscu", &["--version"]) {
        echo.args(["-aet", SCANNER, "-aec", BOX])
            .arg(address.ip().to_string())
            .arg(address.port().to_string());
        finish(echo).succeeded();
    }

    let began = Instant::now();
    let sent = send_with_storescu(SCANNER, address, files)
        .unwrap()
        .succeeded();
    let took = began.elapsed();
    println!(
        "storescu: {} volumes acknowledged in {took:.2?}, {:.1} ms each",
        files.len(),
        took.as_secs_f64() * 1e3 / files.len() as f64
    );
    let acknowledged = format!("{}{}", sent.stdout, sent.stderr)
        .matches("Store Response (Success)")
        .count();
    assert_eq!(acknowledged, files.len(), "{sent:?}");
    wait_for_volumes(&mut daemon, files.len());
    daemon.wait_for_trials(TRIALS);

    // The same series again changes nothing.
    send_with_storescu(SCANNER, address, files)
        .unwrap()
        .succeeded();
    // Another title is refused before it sends anything.
    let refused = send_with_storescu("STRANGER", address, files).unwrap();
    assert!(!refused.status.success(), "{refused:?}");
    daemon.wait("the refusal to be said", |daemon| {
        let said = |fault: &String| fault.contains("STRANGER") && fault.contains("receive.allow");
        daemon.faults().iter().any(said).then_some(())
    });
    assert_eq!(volumes_in(&daemon), files.len());
    daemon.check(
        daemon.faults().len() == 1,
        "a series without faults has faults",
    );
    assert_eq!(daemon.pictured().len(), TRIALS as usize);
    assert_eq!(spooled(&site), 0);
    daemon.stop();
}

/// Writes a key and a certificate for a name; one's own where nobody signs.
fn certificate(dir: &Path, name: &str, signer: Option<&str>) {
    let file = |name: &str, end: &str| dir.join(format!("{name}.{end}"));
    let mut openssl = Command::new("openssl");
    openssl
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args(["-subj", &format!("/CN={name}")])
        .arg("-keyout")
        .arg(file(name, "key"))
        .arg("-out")
        .arg(file(name, "crt"));
    if let Some(signer) = signer {
        openssl
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1"])
            .arg("-CA")
            .arg(file(signer, "crt"))
            .arg("-CAkey")
            .arg(file(signer, "key"));
    }
    finish(openssl).succeeded();
}

#[test]
fn storescu_delivers_encrypted_and_only_with_a_certificate() {
    let _turn = one_at_a_time();
    let signs = outside("openssl", &["req", "-help"]).is_some();
    if storescu().is_none() || !signs {
        println!("openssl or storescu was not found, nothing is tested");
        return;
    }
    let site = Site::of_phantom(signed(), phantom());
    let address = listening(&site);
    let dir = site.dir();
    certificate(dir, "hospital", None);
    certificate(dir, "box", Some("hospital"));
    certificate(dir, "scanner", Some("hospital"));
    certificate(dir, "stranger", None);
    site.change(
        "[task]",
        "[receive.tls]\ncertificate = \"box.crt\"\nkey = \"box.key\"\nclients = \
         \"hospital.crt\"\n[task]",
    );
    let mut daemon = Daemon::start(&site);
    let files = &phantom().files;
    let send = |who: &str| {
        let mut command = storescu().unwrap();
        let path = |end: &str| dir.join(format!("{who}.{end}"));
        command
            .args(["-v", "-aet", SCANNER, "-aec", BOX])
            .arg("+tls")
            .arg(path("key"))
            .arg(path("crt"))
            .arg("+cf")
            .arg(dir.join("hospital.crt"))
            .arg(address.ip().to_string())
            .arg(address.port().to_string())
            .args(files);
        finish(command)
    };
    assert!(!send("stranger").status.success());
    let clear = send_with_storescu(SCANNER, address, &files[..1]).unwrap();
    assert!(!clear.status.success(), "{clear:?}");
    daemon.wait("the refusal to be said", |daemon| {
        let said = |fault: &String| fault.contains("receive.tls");
        daemon.faults().iter().any(said).then_some(())
    });
    assert_eq!(volumes_in(&daemon), 0);
    send("scanner").succeeded();
    wait_for_volumes(&mut daemon, files.len());
    daemon.stop();

    fs::write(dir.join("box.key"), "no key").unwrap();
    let mut daemon = Daemon::spawn(&site);
    let status = daemon.ended(PATIENCE);
    assert_eq!(status.code(), Some(SETTING), "{}", daemon.log());
    assert!(daemon.log().contains("receive.tls.key"), "{}", daemon.log());
}

/// Sends files one by one over one association, and an echo before; says each status.
const PYNETDICOM: &str = r#"
import sys
import pydicom
from pynetdicom import AE
from pynetdicom.sop_class import MRImageStorage, Verification

host, port, title, called, *files = sys.argv[1:]
ae = AE(ae_title=title)
ae.add_requested_context(Verification)
ae.add_requested_context(MRImageStorage)
association = ae.associate(host, int(port), ae_title=called)
if not association.is_established:
    print("rejected" if association.is_rejected else "not established")
    sys.exit(3)
print("echo", hex(association.send_c_echo().Status))
for file in files:
    print("store", hex(association.send_c_store(pydicom.dcmread(file)).Status))
association.release()
"#;

fn pynetdicom(title: &str, to: SocketAddr, files: &[PathBuf]) -> Option<Ended> {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let Some(mut command) = outside(&python, &["-c", "import pynetdicom"]) else {
        println!("pynetdicom was not found, nothing is tested with it");
        return None;
    };
    command
        .args(["-c", PYNETDICOM])
        .arg(to.ip().to_string())
        .arg(to.port().to_string())
        .args([title, BOX])
        .args(files);
    Some(finish(command))
}

#[test]
fn pynetdicom_delivers_a_series() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let address = listening(&site);
    let mut daemon = Daemon::start(&site);
    let files = &phantom().files;
    let Some(sent) = pynetdicom(SCANNER, address, files) else {
        return;
    };
    let sent = sent.succeeded();
    assert!(sent.stdout.contains("echo 0x0\n"), "{sent:?}");
    assert_eq!(
        sent.stdout.matches("store 0x0\n").count(),
        files.len(),
        "{sent:?}"
    );
    daemon.wait_for_trials(TRIALS);
    let refused = pynetdicom("STRANGER", address, &files[..1]).unwrap();
    assert_eq!(refused.code(), Some(3), "{refused:?}");
    assert_eq!(refused.stdout.trim(), "rejected");
    assert_eq!(volumes_in(&daemon), files.len());
    daemon.stop();
}

fn associate(title: &str, called: &str, to: SocketAddr) -> Option<ClientAssociation<TcpStream>> {
    ClientAssociationOptions::new()
        .calling_ae_title(title.to_owned())
        .called_ae_title(called.to_owned())
        .with_presentation_context(MR_IMAGE, vec![EXPLICIT])
        .with_presentation_context(VERIFICATION, vec![EXPLICIT])
        .establish(to)
        .ok()
}

fn context(association: &ClientAssociation<TcpStream>, class: &str) -> u8 {
    let contexts = Association::presentation_contexts(association);
    let of_class = contexts
        .iter()
        .find(|context| context.abstract_syntax == class);
    of_class.unwrap().id
}

fn element(tag: u16, value: &[u8]) -> Vec<u8> {
    let mut value = value.to_vec();
    value.resize(value.len().next_multiple_of(2), 0);
    let len = u32::try_from(value.len()).unwrap();
    let tag = [&[0, 0][..], &tag.to_le_bytes(), &len.to_le_bytes()].concat();
    [tag, value].concat()
}

fn request(field: u16, class: &str, data_set: u16, instance: &str) -> Vec<u8> {
    [
        element(0x0002, class.as_bytes()),
        element(0x0100, &field.to_le_bytes()),
        element(0x0110, &1_u16.to_le_bytes()),
        element(0x0800, &data_set.to_le_bytes()),
        element(0x1000, instance.as_bytes()),
    ]
    .concat()
}

fn send(
    association: &mut ClientAssociation<TcpStream>,
    class: &str,
    value_type: PDataValueType,
    is_last: bool,
    data: &[u8],
) -> bool {
    let presentation_context_id = context(association, class);
    let value = PDataValue {
        presentation_context_id,
        value_type,
        is_last,
        data: data.to_vec(),
    };
    SyncAssociation::send(association, &Pdu::PData { data: vec![value] }).is_ok()
}

fn status(association: &mut ClientAssociation<TcpStream>) -> u16 {
    let Pdu::PData { data } = SyncAssociation::receive(association).unwrap() else {
        panic!("no response");
    };
    let set = &data[0].data;
    let status = element(0x0900, &[0, 0]);
    let at = set
        .windows(8)
        .position(|eight| eight == &status[..8])
        .unwrap();
    u16::from_le_bytes([set[at + 8], set[at + 9]])
}

fn store(association: &mut ClientAssociation<TcpStream>, instance: &str, data: &[u8]) -> u16 {
    let set = request(C_STORE, MR_IMAGE, 1, instance);
    assert!(send(
        association,
        MR_IMAGE,
        PDataValueType::Command,
        true,
        &set
    ));
    let mut pieces = data.chunks(30_000).peekable();
    while let Some(piece) = pieces.next() {
        let last = pieces.peek().is_none();
        assert!(send(
            association,
            MR_IMAGE,
            PDataValueType::Data,
            last,
            piece
        ));
    }
    status(association)
}

/// A file's data set, behind preamble and meta group, whose length is its first element.
fn data_set(file: &Path) -> Vec<u8> {
    let bytes = fs::read(file).unwrap();
    let meta = u32::from_le_bytes(bytes[140..144].try_into().unwrap());
    bytes[144 + meta as usize..].to_vec()
}

#[test]
fn what_no_client_should_say_is_refused_and_the_run_goes_on() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    site.change("[scanner]", "[scanner]\nmax_file_mib = 1");
    let address = listening(&site);
    let mut daemon = Daemon::start(&site);
    let files = &phantom().files;
    let mut instances = 0..;
    let mut send_file = |association: &mut ClientAssociation<TcpStream>, file: &Path| {
        let instance = format!("2.25.{}", 1000 + instances.next().unwrap());
        assert_eq!(store(association, &instance, &data_set(file)), SUCCESS);
    };

    assert!(associate("STRANGER", BOX, address).is_none());
    assert!(associate(SCANNER, "ANOTHER-BOX", address).is_none());
    let mut association = associate(SCANNER, BOX, address).unwrap();
    let set = request(C_ECHO, VERIFICATION, NO_DATA_SET, "");
    assert!(send(
        &mut association,
        VERIFICATION,
        PDataValueType::Command,
        true,
        &set
    ));
    assert_eq!(status(&mut association), SUCCESS);
    for file in &files[..20] {
        send_file(&mut association, file);
    }
    let long = vec![1; 2 << 20];
    assert_eq!(store(&mut association, "2.25.1", &long), TOO_LONG);
    // A transfer that stops in the middle.
    let mut cut = associate(SCANNER, BOX, address).unwrap();
    let set = request(C_STORE, MR_IMAGE, 1, "2.25.2");
    assert!(send(
        &mut cut,
        MR_IMAGE,
        PDataValueType::Command,
        true,
        &set
    ));
    assert!(send(
        &mut cut,
        MR_IMAGE,
        PDataValueType::Data,
        false,
        &data_set(&files[20])[..20_000]
    ));
    SyncAssociation::abort(cut).unwrap();
    // What is no image is put aside as a file would be.
    assert_eq!(store(&mut association, "2.25.3", b"no image"), SUCCESS);
    for file in &files[20..] {
        send_file(&mut association, file);
    }
    SyncAssociation::release(association).unwrap();
    daemon.wait_for_trials(TRIALS);
    let faults = daemon.faults();
    for said in [
        "STRANGER",
        "ANOTHER-BOX",
        "scanner.max_file_mib",
        "in the middle of an object",
        "received-000021",
    ] {
        daemon.check(
            faults.iter().any(|fault| fault.contains(said)),
            &format!("no fault says {said}: {faults:?}"),
        );
    }
    daemon.check(faults.len() == 5, &format!("five faults, yet {faults:?}"));
    assert_eq!(volumes_in(&daemon), files.len());
    assert_eq!(spooled(&site), 0);
    daemon.stop();
}

#[test]
fn what_was_acknowledged_survives_the_death_of_acquire() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let address = listening(&site);
    let mut daemon = Daemon::start(&site);
    let files = &phantom().files;
    let (before, after) = files.split_at(30);
    let instance = |file: &Path| {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let number: u32 = name.rsplit('_').next().unwrap().parse().unwrap();
        format!("2.25.{number}")
    };
    let mut association = associate(SCANNER, BOX, address).unwrap();
    let mut parser = None;
    for (number, file) in before.iter().enumerate() {
        if number == 25 {
            // A parser that hangs: what comes now is acknowledged and not read.
            parser = daemon.role("parse");
            kill(Pid::from_raw(parser.unwrap()), Signal::SIGSTOP).unwrap();
        }
        assert_eq!(
            store(&mut association, &instance(file), &data_set(file)),
            SUCCESS
        );
    }
    assert!(parser.is_some());
    daemon.kill_role("acquire");
    let waited = spooled(&site);
    drop(association);
    let mut association = daemon.wait("another association", |_| associate(SCANNER, BOX, address));
    // A careful sender repeats what it is not sure of.
    for file in files[25..30].iter().chain(after) {
        assert_eq!(
            store(&mut association, &instance(file), &data_set(file)),
            SUCCESS
        );
    }
    SyncAssociation::release(association).unwrap();
    println!("{waited} objects were in the spool when acquire was killed");
    assert!(waited > 0, "none was left to be read again");
    daemon.wait_for_trials(TRIALS);
    let faults = daemon.faults();
    daemon.check(
        faults.is_empty(),
        &format!("nothing was lost, yet {faults:?}"),
    );
    daemon.wait("an empty spool", |_| (spooled(&site) == 0).then_some(()));
    std::thread::sleep(Duration::from_millis(200));
    daemon.stop();
}

#[test]
fn storescu_delivers_a_real_series_and_no_name_appears() {
    let _turn = one_at_a_time();
    let shared =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/scanner/session/e11_120tr");
    if !shared.is_dir() {
        println!("{} was not found, nothing is tested", shared.display());
        return;
    }
    if storescu().is_none() {
        return;
    }
    let site = Site::new(
        signed(),
        &shared.join("mask.nii.gz"),
        &shared.join("events.tsv"),
    );
    let address = listening(&site);
    let packed = fs::File::open(shared.join("dicom_part1.tar.zst")).unwrap();
    let unpacked = zstd::Decoder::new(packed).unwrap();
    tar::Archive::new(unpacked).unpack(site.dir()).unwrap();
    let files: Vec<PathBuf> = files_of(&site.dir().join("dicom"))
        .into_iter()
        .take(20)
        .collect();
    let mut daemon = Daemon::start(&site);
    send_with_storescu(SCANNER, address, &files)
        .unwrap()
        .succeeded();
    wait_for_volumes(&mut daemon, files.len());
    daemon.check(daemon.faults().is_empty(), "there are faults");
    daemon.check(!daemon.log().contains("ZZ"), "the log names a patient");
    let names = fs::read_dir(site.session().join("incoming")).unwrap();
    assert_eq!(names.count(), 0);
    daemon.stop();
}
