//! The thread itself, on pseudo-terminals.

use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::pty::OpenptyResult;

use super::latency::{measure, terminal};
use super::*;

const WAIT: Duration = Duration::from_secs(20);

/// Drains until `enough`.
fn heard_until(line: &mut TriggerLine, enough: impl Fn(&[Heard]) -> bool) -> Vec<Heard> {
    let (began, mut heard) = (Instant::now(), Vec::new());
    while !enough(&heard) {
        assert!(began.elapsed() < WAIT, "{heard:?} {:?}", line.state());
        heard.extend(line.drain());
        thread::sleep(Duration::from_millis(2));
    }
    heard
}

fn wait_connected(line: &TriggerLine) {
    let began = Instant::now();
    while !line.state().connected {
        assert!(began.elapsed() < WAIT, "{:?}", line.state());
        thread::sleep(Duration::from_millis(2));
    }
}

fn pulses(heard: &[Heard]) -> usize {
    heard
        .iter()
        .filter(|heard| matches!(heard, Heard::Pulse { .. }))
        .count()
}

fn told(heard: &[Heard]) -> Vec<&str> {
    heard
        .iter()
        .filter_map(|heard| match heard {
            Heard::Told(text) => Some(text.as_str()),
            Heard::Pulse { .. } => None,
        })
        .collect()
}

fn send(master: &OwnedFd, bytes: &[u8]) {
    assert_eq!(nix::unistd::write(master, bytes), Ok(bytes.len()));
}

/// A stop flag that is set whatever happens to the test: a thread that goes on would take the terminals of
/// others, whose numbers are used again.
pub(super) struct Stop(pub(super) Arc<AtomicBool>);

impl Stop {
    pub(super) fn new() -> Stop {
        Stop(Arc::new(AtomicBool::new(false)))
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn pulses_are_stamped_between_their_sending_and_their_taking() {
    let (pty, settings) = terminal().unwrap();
    let stop = Stop::new();
    let mut line = spawn(&settings, Arc::clone(&stop.0)).unwrap();
    wait_connected(&line);
    for _ in 0..20 {
        let before = now_ms();
        send(&pty.master, b"5");
        let heard = heard_until(&mut line, |heard| pulses(heard) == 1);
        let Heard::Pulse { at_ms, code } = heard[0] else {
            panic!("{heard:?}");
        };
        assert!((before..=now_ms()).contains(&at_ms));
        assert_eq!(code, b'5');
    }
    // Buttons and noise are counted and shown.
    send(&pty.master, b"1x\x005");
    heard_until(&mut line, |heard| pulses(heard) == 1);
    thread::sleep(Duration::from_millis(20));
    let state = line.state();
    assert_eq!((state.pulses, state.ignored), (21, 3));
    assert_eq!(state.last_ignored, Some(0));
    assert!(state.last_pulse_ms.unwrap() < 20_000.0);
}

/// Puts a device where another was, as udev does.
fn plug(link: &Path, settings: &TriggerSettings) {
    let _ = std::fs::remove_file(link);
    symlink(&settings.device, link).unwrap();
}

#[test]
fn a_line_that_hangs_up_is_said_once_and_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("box");
    let (OpenptyResult { master, slave }, mut settings) = terminal().unwrap();
    plug(&link, &settings);
    settings.device.clone_from(&link);
    let stop = Stop::new();
    let mut line = spawn(&settings, Arc::clone(&stop.0)).unwrap();
    wait_connected(&line);
    send(&master, b"5");
    let first = heard_until(&mut line, |heard| pulses(heard) == 1);
    assert_eq!(told(&first), [""; 0]);

    // The name goes with the device: another terminal may get its number.
    std::fs::remove_file(&link).unwrap();
    drop((master, slave));
    let gone = heard_until(&mut line, |heard| !told(heard).is_empty());
    assert!(told(&gone)[0].contains("trigger.device"), "{gone:?}");
    assert!(!line.state().connected);
    // It goes on trying, in silence.
    thread::sleep(Duration::from_millis(3 * u64::from(LOOK_EVERY_MS)));
    assert_eq!(line.drain().count(), 0);

    let (pty, other) = terminal().unwrap();
    plug(&link, &other);
    let back = heard_until(&mut line, |heard| !told(heard).is_empty());
    assert_eq!(told(&back), ["The trigger line is back"]);
    send(&pty.master, b"5");
    assert_eq!(
        pulses(&heard_until(&mut line, |heard| pulses(heard) == 1)),
        1
    );
    assert_eq!(line.state().pulses, 2);
}

#[test]
fn a_port_that_another_program_has_is_said_so() {
    let (_pty, settings) = terminal().unwrap();
    let held = Port::open(&settings.device, settings.line);
    assert!(held.is_ok());
    // The superuser opens what is exclusive; the lock on it holds for everybody.
    let again = Port::open(&settings.device, settings.line);
    assert_eq!(again.err(), Some(Absence::Taken));
}

#[test]
fn what_is_no_serial_port_and_what_is_not_there_are_told_apart() {
    let (_pty, settings) = terminal().unwrap();
    let open = |path: &Path| Port::open(path, settings.line).err();
    let file = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(open(file.path()), Some(Absence::Unfit));
    assert_eq!(open(Path::new("/dev/no-such-box")), Some(Absence::NotThere));
}

#[test]
fn modem_lines_that_cannot_be_waited_for_are_said_and_not_polled() {
    let (_pty, mut settings) = terminal().unwrap();
    settings.source = Source::Edge(ModemLine::Dcd, Edge::Rising);
    let stop = Stop::new();
    let mut line = spawn(&settings, Arc::clone(&stop.0)).unwrap();
    let heard = heard_until(&mut line, |heard| !told(heard).is_empty());
    assert!(told(&heard)[0].contains("trigger.codes"), "{heard:?}");
}

#[test]
fn a_ring_without_room_counts_what_it_drops() {
    let (pty, settings) = terminal().unwrap();
    let stop = Stop::new();
    let mut line = spawn(&settings, Arc::clone(&stop.0)).unwrap();
    wait_connected(&line);
    let burst = [b'5'; 100];
    for sent in 1..=12 {
        send(&pty.master, &burst);
        let began = Instant::now();
        while line.state().pulses < sent * 100 {
            assert!(began.elapsed() < WAIT, "{:?}", line.state());
            thread::sleep(Duration::from_millis(2));
        }
    }
    let dropped = 1200 - (RING as u64 - 1);
    assert_eq!(line.state().overflowed, dropped);
    let heard: Vec<Heard> = line.drain().collect();
    assert_eq!(pulses(&heard), RING - 1);
    assert_eq!(told(&heard).len(), 1);
    assert!(told(&heard)[0].starts_with(&format!("{dropped} trigger pulses")));
    assert_eq!(line.drain().count(), 0);
}

#[test]
fn waiting_costs_next_to_nothing() {
    let (_pty, settings) = terminal().unwrap();
    let stop = Stop::new();
    // Connected, and with a port that is not there.
    let _line = spawn(&settings, Arc::clone(&stop.0)).unwrap();
    let mut gone = settings.clone();
    gone.device = "/dev/no-such-box".into();
    let _gone = spawn(&gone, Arc::clone(&stop.0)).unwrap();
    thread::sleep(Duration::from_millis(300));
    let spent = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .flatten()
            .filter_map(|task| {
                let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
                let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
                (name.trim() == "trigger")
                    .then(|| stat.split(' ').next()?.parse::<u64>().ok())
                    .flatten()
            })
            .sum::<u64>()
    };
    let before = spent();
    thread::sleep(Duration::from_secs(2));
    let busy_ms = spent().saturating_sub(before) / 1_000_000;
    // Threads of the tests beside this one are among them; a loop that never waits would take 2,000.
    assert!(busy_ms < 500, "{busy_ms} ms in 2 s");
}

#[test]
fn latency_can_be_measured() {
    let latency = measure(20, 0).unwrap();
    assert_eq!(latency.late_ms.len(), 20);
    assert!(latency.late_ms.iter().all(|late| *late > 0.0));
}
