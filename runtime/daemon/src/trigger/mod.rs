//! The trigger line: the scanner's pulses, stamped as they come.
//!
//! ```text
//! serial port ──► trigger thread: wait, stamp, read, decode ──ring──► main side: drain
//! ```
//!
//! One thread waits in the kernel and stamps first thing on waking; between byte and stamp there is no
//! allocation, no lock and no other wait. It asks for FIFO scheduling and locked memory and works without.
//! The ring holds what the main side has not taken yet; what finds no room is counted. A port that is gone
//! is said once, as a sentence, and opened again when it is back.

mod ioctl;
pub(crate) mod latency;
mod port;
mod protocol;
mod session;
mod settings;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use heapless::spsc::{Consumer, Producer, Queue};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::time::{ClockId, clock_gettime};
use thread_priority::{
    RealtimeThreadSchedulePolicy, ThreadPriority, ThreadPriorityValue, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

use self::port::{Absence, Edge, ModemLine, Port, edge_came};
use self::protocol::{Debounce, Decoder, Ignored, Pulse};
pub(crate) use self::session::Trigger;
use self::settings::Source;
pub(crate) use self::settings::{PROTOCOLS, RawTrigger, TriggerSettings};

/// Events that wait for the main side: a pulse per slice, for ten seconds and more.
const RING: usize = 1024;
/// How often the thread looks whether it should stop, and for a port that is gone.
const LOOK_EVERY_MS: u16 = 200;
/// Above everything ordinary, below the kernel's own interrupt threads (50).
const FIFO_PRIORITY: u8 = 45;
/// No byte.
const NO_BYTE: u32 = 256;

/// What the thread puts into the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Pulse(Pulse),
    Gone(Absence),
    Back,
}

/// What the main side hears.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Heard {
    /// A pulse.
    Pulse {
        /// Its stamp, milliseconds on the monotonic clock ([`now_ms`]).
        at_ms: f64,
        /// The byte that said so; 0 for a modem line.
        code: u8,
    },
    /// Something an operator must know, as a sentence.
    Told(String),
}

/// What the thread counts, for whoever looks.
#[derive(Debug)]
struct Counts {
    connected: AtomicBool,
    low_latency: AtomicBool,
    fifo: AtomicBool,
    locked: AtomicBool,
    pulses: AtomicU64,
    last_pulse_ns: AtomicU64,
    ignored: AtomicU64,
    last_ignored: AtomicU32,
    bounced: AtomicU64,
    overflowed: AtomicU64,
}

impl Counts {
    fn new() -> Counts {
        Counts {
            connected: AtomicBool::new(false),
            low_latency: AtomicBool::new(false),
            fifo: AtomicBool::new(false),
            locked: AtomicBool::new(false),
            pulses: AtomicU64::new(0),
            last_pulse_ns: AtomicU64::new(0),
            ignored: AtomicU64::new(0),
            last_ignored: AtomicU32::new(NO_BYTE),
            bounced: AtomicU64::new(0),
            overflowed: AtomicU64::new(0),
        }
    }
}

/// The line as the operator's page shows it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TriggerState {
    /// `trigger.device`.
    pub(crate) device: String,
    /// The port is open.
    pub(crate) connected: bool,
    /// Its driver hands bytes on at once.
    pub(crate) low_latency: bool,
    /// The thread goes before all ordinary ones.
    pub(crate) fifo: bool,
    /// Its memory stays in memory.
    pub(crate) locked: bool,
    /// Pulses so far.
    pub(crate) pulses: u64,
    /// Since the last one, milliseconds.
    pub(crate) last_pulse_ms: Option<f64>,
    /// Bytes that mean no pulse.
    pub(crate) ignored: u64,
    /// The last of them.
    pub(crate) last_ignored: Option<u8>,
    /// Pulses too soon after another.
    pub(crate) bounced: u64,
    /// Pulses that nobody took in time.
    pub(crate) overflowed: u64,
}

/// The main side's end of the line.
pub(crate) struct TriggerLine {
    device: String,
    ring: Consumer<'static, Event>,
    counts: Arc<Counts>,
    overflow_said: u64,
    thread: thread::JoinHandle<()>,
}

/// Starts the trigger thread. It ends some time after `stop`; nobody has to wait for it.
///
/// # Errors
/// Where the system starts no thread; a port that is not there is no error, but said by
/// [`TriggerLine::drain`].
pub(crate) fn spawn(settings: &TriggerSettings, stop: Arc<AtomicBool>) -> io::Result<TriggerLine> {
    // Never freed: the thread may outlive whoever stops it. A process has one line.
    let queue: &'static mut Queue<Event, RING> = Box::leak(Box::new(Queue::new()));
    let (producer, consumer) = queue.split();
    let counts = Arc::new(Counts::new());
    let listener = Listener {
        settings: settings.clone(),
        stop,
        ring: producer,
        counts: Arc::clone(&counts),
    };
    let thread = thread::Builder::new()
        .name("trigger".into())
        .spawn(move || listener.run())?;
    Ok(TriggerLine {
        device: settings.device.display().to_string(),
        ring: consumer,
        counts,
        overflow_said: 0,
        thread,
    })
}

impl TriggerLine {
    /// What came since the last call, oldest first; never waits.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Heard> + '_ {
        let overflowed = self.counts.overflowed.load(Ordering::Relaxed);
        let missed = overflowed - self.overflow_said;
        self.overflow_said = overflowed;
        let overflow = (missed > 0).then(|| {
            Heard::Told(format!(
                "{missed} trigger pulses were not taken in time and are lost: this box is overloaded"
            ))
        });
        let device = &self.device;
        let ring = &mut self.ring;
        std::iter::from_fn(move || {
            ring.dequeue().map(|event| match event {
                Event::Pulse(pulse) => Heard::Pulse {
                    at_ms: millis(pulse.at_ns),
                    code: pulse.code,
                },
                Event::Gone(why) => Heard::Told(format!(
                    "The trigger line (trigger.device = {device}) cannot be used: {}. Volumes are timed \
                     without it until it is back",
                    why.reason()
                )),
                Event::Back => Heard::Told("The trigger line is back".into()),
            })
        })
        .chain(overflow)
    }

    /// How the line is doing.
    pub(crate) fn state(&self) -> TriggerState {
        let counts = &self.counts;
        let pulses = counts.pulses.load(Ordering::Relaxed);
        let last_ns = counts.last_pulse_ns.load(Ordering::Relaxed);
        TriggerState {
            device: self.device.clone(),
            connected: counts.connected.load(Ordering::Relaxed) && !self.thread.is_finished(),
            low_latency: counts.low_latency.load(Ordering::Relaxed),
            fifo: counts.fifo.load(Ordering::Relaxed),
            locked: counts.locked.load(Ordering::Relaxed),
            pulses,
            last_pulse_ms: (pulses > 0).then(|| millis(now_ns().saturating_sub(last_ns))),
            ignored: counts.ignored.load(Ordering::Relaxed),
            last_ignored: u8::try_from(counts.last_ignored.load(Ordering::Relaxed)).ok(),
            bounced: counts.bounced.load(Ordering::Relaxed),
            overflowed: counts.overflowed.load(Ordering::Relaxed),
        }
    }
}

/// Unix time, milliseconds, to set beside [`now_ms`].
pub(crate) fn now_unix_ms() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64() * 1e3
}

/// Now, milliseconds on the clock that pulses are stamped with.
pub(crate) fn now_ms() -> f64 {
    millis(now_ns())
}

/// A moment of the past on that clock.
pub(crate) fn ms_of(moment: Instant) -> f64 {
    now_ms() - moment.elapsed().as_secs_f64() * 1e3
}

/// `CLOCK_MONOTONIC`, nanoseconds.
fn now_ns() -> u64 {
    // This clock is always there.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|now| {
            let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
            seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
        })
        .unwrap_or(0)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a year of nanoseconds is exact to a quarter of a microsecond"
)]
fn millis(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// Puts this thread before all ordinary ones, where the system lets it.
fn ask_for_fifo(priority: u8) -> bool {
    ThreadPriorityValue::try_from(priority).is_ok_and(|priority| {
        set_thread_priority_and_policy(
            thread_native_id(),
            ThreadPriority::Crossplatform(priority),
            ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::Fifo),
        )
        .is_ok()
    })
}

/// The thread's side.
struct Listener {
    settings: TriggerSettings,
    stop: Arc<AtomicBool>,
    ring: Producer<'static, Event>,
    counts: Arc<Counts>,
}

impl Listener {
    fn run(mut self) {
        self.be_punctual();
        let mut said = None;
        while !self.stopped() {
            let why = match Port::open(&self.settings.device, self.settings.line) {
                Ok(port) => {
                    self.counts
                        .low_latency
                        .store(port.low_latency, Ordering::Relaxed);
                    self.counts.connected.store(true, Ordering::Relaxed);
                    if said.take().is_some() {
                        self.put(Event::Back);
                    }
                    let why = match self.settings.source.clone() {
                        Source::Bytes(protocol) => {
                            let decoder = Decoder::new(protocol, self.settings.debounce_ns);
                            self.listen(&port, decoder)
                        }
                        Source::Edge(line, edge) => self.listen_to_line(&port, line, edge),
                    };
                    self.counts.connected.store(false, Ordering::Relaxed);
                    why
                }
                Err(why) => why,
            };
            if self.stopped() {
                return;
            }
            // Said once, however often it fails, and again where it fails otherwise after it was back.
            if said.is_none() {
                self.put(Event::Gone(why));
                said = Some(why);
            }
            thread::sleep(Duration::from_millis(LOOK_EVERY_MS.into()));
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Asks for what keeps stamps early, and says what it got.
    fn be_punctual(&self) {
        // What is mapped now, and no future growth: a limit would make later allocations fail.
        let locked = mlockall(MlockAllFlags::MCL_CURRENT).is_ok();
        let fifo = ask_for_fifo(FIFO_PRIORITY);
        self.counts.fifo.store(fifo, Ordering::Relaxed);
        self.counts.locked.store(locked, Ordering::Relaxed);
        if fifo && locked {
            tracing::info!(device = %self.settings.device.display(), "trigger thread has FIFO scheduling and locked memory");
        } else {
            tracing::warn!(
                device = %self.settings.device.display(),
                fifo,
                locked,
                "trigger thread has not all that keeps stamps early (LimitRTPRIO, LimitMEMLOCK); they may be some milliseconds late under load"
            );
        }
    }

    /// Listens for bytes until the port is gone or the thread is to stop.
    fn listen(&mut self, port: &Port, mut decoder: Decoder) -> Absence {
        let before = Ignored {
            bytes: self.counts.ignored.load(Ordering::Relaxed),
            last: None,
            bounced: self.counts.bounced.load(Ordering::Relaxed),
        };
        let mut buffer = [0_u8; 256];
        while !self.stopped() {
            let mut fds = [PollFd::new(port.fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::from(LOOK_EVERY_MS));
            let at_ns = now_ns();
            match ready {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(_) => return Absence::Lost,
            }
            let readable = fds[0]
                .revents()
                .is_some_and(|events| events.contains(PollFlags::POLLIN));
            if !readable {
                return Absence::Lost;
            }
            let bytes = match nix::unistd::read(port.fd(), &mut buffer) {
                Ok(0) => return Absence::Lost,
                Ok(count) => buffer.get(..count).unwrap_or_default(),
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                Err(_) => return Absence::Lost,
            };
            for &byte in bytes {
                if let Some(pulse) = decoder.byte(byte, at_ns) {
                    self.pulse(pulse);
                }
            }
            let ignored = decoder.ignored();
            let counts = &self.counts;
            counts
                .ignored
                .store(before.bytes + ignored.bytes, Ordering::Relaxed);
            counts
                .bounced
                .store(before.bounced + ignored.bounced, Ordering::Relaxed);
            if let Some(last) = ignored.last {
                counts.last_ignored.store(last.into(), Ordering::Relaxed);
            }
        }
        Absence::Lost
    }

    /// Waits for a modem line's edges until the port is gone. The wait ends by an edge alone, so that
    /// stopping takes until the next one, or the process's end.
    fn listen_to_line(&mut self, port: &Port, line: ModemLine, edge: Edge) -> Absence {
        let mut debounce = Debounce::new(self.settings.debounce_ns);
        let look = |port: &Port| {
            let changes = line.changes(&ioctl::counters(port.fd())?);
            let up = ioctl::lines(port.fd())? & line.bit() != 0;
            Ok::<(i32, bool), Errno>((changes, up))
        };
        let (mut changes, mut up) = match look(port) {
            Ok(first) => first,
            Err(error) => return port::absence(error),
        };
        while !self.stopped() {
            let waited = ioctl::wait_for_change(port.fd(), line.bit());
            let at_ns = now_ns();
            match waited {
                Ok(()) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return port::absence(error),
            }
            let (changes_now, up_now) = match look(port) {
                Ok(now) => now,
                Err(error) => return port::absence(error),
            };
            let counted = changes_now.wrapping_sub(changes).cast_unsigned();
            let came = edge_came(edge, up, up_now, counted);
            (changes, up) = (changes_now, up_now);
            if !came {
                continue;
            }
            if debounce.passes(at_ns) {
                self.pulse(Pulse { at_ns, code: 0 });
            } else {
                self.counts.bounced.fetch_add(1, Ordering::Relaxed);
            }
        }
        Absence::Lost
    }

    fn pulse(&mut self, pulse: Pulse) {
        self.put(Event::Pulse(pulse));
        self.counts
            .last_pulse_ns
            .store(pulse.at_ns, Ordering::Relaxed);
        self.counts.pulses.fetch_add(1, Ordering::Relaxed);
    }

    fn put(&mut self, event: Event) {
        if self.ring.enqueue(event).is_err() {
            self.counts.overflowed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
