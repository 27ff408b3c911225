//! How late stamps are on this machine, from a pseudo-terminal.
//!
//! The clock is read, a byte is written, and the trigger thread's stamp compared with that reading; the
//! next byte follows some milliseconds after the stamp is in. The figure holds the kernel's way through
//! the terminal (a kernel worker of ordinary priority hands bytes on) and the waking of the thread, and no
//! adapter. The sending thread stands for hardware, which is never preempted, and asks for FIFO scheduling
//! as well.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use nix::errno::Errno;
use nix::pty::{OpenptyResult, openpty};

use super::port::{LineSettings, Parity};
use super::protocol::Protocol;
use super::settings::Source;
use super::{FIFO_PRIORITY, Heard, TriggerSettings, ask_for_fifo, millis, now_ns, spawn};

/// Longest wait for one stamp.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum LatencyError {
    #[error("cannot make a pseudo-terminal")]
    Terminal(#[source] Errno),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("pulse {pulse} of {pulses} got no stamp within 5 s")]
    NoStamp { pulse: u32, pulses: u32 },
    #[error("cannot write to the pseudo-terminal")]
    Send(#[source] Errno),
}

/// How late each pulse's stamp was.
pub(crate) struct Latency {
    /// `[pulse]`, milliseconds.
    pub(crate) late_ms: Vec<f64>,
    /// The trigger thread had FIFO scheduling.
    pub(crate) fifo: bool,
}

/// A terminal of our own and the settings that listen at its end.
pub(super) fn terminal() -> Result<(OpenptyResult, TriggerSettings), LatencyError> {
    let pty = openpty(None, None).map_err(LatencyError::Terminal)?;
    let device: PathBuf = nix::unistd::ttyname(&pty.slave).map_err(LatencyError::Terminal)?;
    let settings = TriggerSettings {
        device,
        line: LineSettings {
            baud: 115_200,
            data_bits: 8,
            parity: Parity::None,
            stop_bits: 1,
        },
        source: Source::Bytes(Protocol::new(b"5", 255, None)),
        debounce_ns: 0,
        pulses_per_volume: 1,
        dummy_volumes: None,
    };
    Ok((pty, settings))
}

/// Sends pulses and compares. The calling thread keeps the FIFO scheduling that it asks for.
///
/// - `busy`: threads that compute without a pause meanwhile.
pub(crate) fn measure(pulses: u32, busy: u32) -> Result<Latency, LatencyError> {
    let (pty, settings) = terminal()?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut line = spawn(&settings, Arc::clone(&stop)).map_err(LatencyError::Thread)?;
    let opened = Instant::now();
    while !line.state().connected && opened.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..busy {
        let stop = Arc::clone(&stop);
        thread::Builder::new()
            .name("busy".into())
            .spawn(move || {
                let mut value = 1.0_f64;
                while !stop.load(Ordering::Relaxed) {
                    value = std::hint::black_box(value).sqrt() + 1.0;
                }
            })
            .map_err(LatencyError::Thread)?;
    }
    ask_for_fifo(FIFO_PRIORITY + 1);
    let mut late = Vec::new();
    let result = (1..=pulses).try_for_each(|pulse| {
        // Some milliseconds, each time others: no beat of the scheduler's is met.
        thread::sleep(Duration::from_micros(2000 + u64::from(pulse * 7919 % 6000)));
        let sent_ns = now_ns();
        nix::unistd::write(&pty.master, b"5").map_err(LatencyError::Send)?;
        let waited = Instant::now();
        loop {
            let stamp = line.drain().find_map(|heard| match heard {
                Heard::Pulse { at_ms, .. } => Some(at_ms),
                Heard::Told(_) => None,
            });
            if let Some(at_ms) = stamp {
                late.push(at_ms - millis(sent_ns));
                return Ok(());
            }
            if waited.elapsed() > PATIENCE {
                return Err(LatencyError::NoStamp { pulse, pulses });
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
    let fifo = line.state().fifo;
    stop.store(true, Ordering::Relaxed);
    result?;
    Ok(Latency {
        late_ms: late,
        fifo,
    })
}
