//! `afterimage trigger-latency`: how late stamps are on this machine, from a pseudo-terminal.
//!
//! The clock is read, a byte is written, and the trigger thread's stamp compared with that reading; the
//! next byte follows some milliseconds after the stamp is in. The figure holds the kernel's way through
//! the terminal (a kernel worker of ordinary priority hands bytes on) and the waking of the thread, and no
//! adapter. The sending thread stands for hardware, which is never preempted, and asks for FIFO scheduling
//! as well.

use std::io::{Write, stderr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

use clap::Args;
use nix::errno::Errno;
use nix::pty::{OpenptyResult, openpty};

use super::port::{LineSettings, Parity};
use super::protocol::Protocol;
use super::settings::Source;
use super::{FIFO_PRIORITY, Heard, TriggerSettings, ask_for_fifo, millis, now_ns, spawn};
use crate::logging::chain;

/// Longest wait for one stamp.
const PATIENCE: Duration = Duration::from_secs(5);

/// What to measure.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Pulses to send
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pulses: u32,
    /// Threads that keep the processors busy meanwhile
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=256))]
    busy: u32,
}

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

/// Lateness of stamps, milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    pub(crate) pulses: usize,
    pub(crate) busy: u32,
    pub(crate) fifo: bool,
    pub(crate) median_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) most_ms: f64,
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} pulses, {} busy threads, {}: median {:.3} ms, p99 {:.3} ms, at most {:.3} ms",
            self.pulses,
            self.busy,
            if self.fifo {
                "FIFO scheduling"
            } else {
                "normal scheduling"
            },
            self.median_ms,
            self.p99_ms,
            self.most_ms
        )
    }
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match measure(arguments.pulses, arguments.busy) {
        Ok(latency) => {
            let _ = writeln!(io::stdout(), "{latency}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
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

/// - `busy`: threads that compute without a pause.
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
    late.sort_by(f64::total_cmp);
    let at = |share: usize| late[(late.len() * share / 100).min(late.len() - 1)];
    Ok(Latency {
        pulses: late.len(),
        busy,
        fifo,
        median_ms: at(50),
        p99_ms: at(99),
        most_ms: at(100),
    })
}
