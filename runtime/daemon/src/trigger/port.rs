//! The serial port: opened for this program alone, raw, and as quick as its driver can be.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use serde::Deserialize;
use serialport::{ClearBuffer, DataBits, FlowControl, SerialPort, StopBits, TTYPort};

use super::ioctl;

/// Parity bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Parity {
    /// None.
    None,
    /// Odd.
    Odd,
    /// Even.
    Even,
}

/// Rate and format of the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LineSettings {
    /// Baud.
    pub(crate) baud: u32,
    /// 7 or 8.
    pub(crate) data_bits: u8,
    /// Parity bit.
    pub(crate) parity: Parity,
    /// 1 or 2.
    pub(crate) stop_bits: u8,
}

/// An input of a serial port besides its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ModemLine {
    /// Data carrier detect.
    Dcd,
    /// Clear to send.
    Cts,
    /// Data set ready.
    Dsr,
    /// Ring indicator.
    Ri,
}

impl ModemLine {
    /// As `TIOCM_*` names it.
    pub(super) fn bit(self) -> i32 {
        match self {
            ModemLine::Dcd => libc::TIOCM_CAR,
            ModemLine::Cts => libc::TIOCM_CTS,
            ModemLine::Dsr => libc::TIOCM_DSR,
            ModemLine::Ri => libc::TIOCM_RNG,
        }
    }

    /// How often it has changed.
    pub(super) fn changes(self, counters: &ioctl::Counters) -> i32 {
        match self {
            ModemLine::Dcd => counters.dcd,
            ModemLine::Cts => counters.cts,
            ModemLine::Dsr => counters.dsr,
            ModemLine::Ri => counters.ri,
        }
    }
}

/// Which change of a modem line is the pulse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Edge {
    /// It goes up.
    Rising,
    /// It goes down.
    Falling,
}

/// Whether a line went the wanted way between two looks.
///
/// - `was_up`, `is_up`: at the looks.
/// - `changes`: counted between them. A driver counts a pulse that is over before it looks once only.
pub(super) fn edge_came(edge: Edge, was_up: bool, is_up: bool, changes: u32) -> bool {
    let over_already = (changes % 2 == 1) == (was_up == is_up);
    let changes = if over_already { changes + 1 } else { changes };
    match (edge, was_up) {
        (Edge::Rising, false) | (Edge::Falling, true) => changes >= 1,
        // The other edge has to come first.
        (Edge::Rising, true) | (Edge::Falling, false) => changes >= 2,
    }
}

/// Why a port is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absence {
    /// No such file.
    NotThere,
    /// This user may not open it.
    Denied,
    /// Another program has it.
    Taken,
    /// It takes no such rate or format, or is no serial port.
    Unfit,
    /// It has no modem lines that can be waited for.
    NoModemLines,
    /// It was unplugged, or its driver failed.
    Lost,
}

impl Absence {
    /// The rest of a sentence.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Absence::NotThere => "it is not there; check the cable and trigger.device",
            Absence::Denied => {
                "this user may not open it; the user afterimage has to be in its group (dialout)"
            }
            Absence::Taken => "another program has it",
            Absence::Unfit => "it is no serial port, or takes no such rate or format",
            Absence::NoModemLines => "its modem lines cannot be waited for; set trigger.codes",
            Absence::Lost => "it was unplugged or failed; check the cable",
        }
    }
}

/// An open port.
pub(super) struct Port {
    tty: TTYPort,
    /// The driver hands bytes on at once.
    pub(super) low_latency: bool,
}

impl Port {
    pub(super) fn open(device: &Path, line: LineSettings) -> Result<Port, Absence> {
        if !device.exists() {
            return Err(Absence::NotThere);
        }
        let Some(path) = device.to_str() else {
            return Err(Absence::NotThere);
        };
        let tty = serialport::new(path, line.baud)
            .data_bits(if line.data_bits == 7 {
                DataBits::Seven
            } else {
                DataBits::Eight
            })
            .parity(match line.parity {
                Parity::None => serialport::Parity::None,
                Parity::Odd => serialport::Parity::Odd,
                Parity::Even => serialport::Parity::Even,
            })
            .stop_bits(if line.stop_bits == 2 {
                StopBits::Two
            } else {
                StopBits::One
            })
            .flow_control(FlowControl::None)
            .timeout(Duration::ZERO)
            .exclusive(true)
            .open_native()
            .map_err(|error| match error.kind() {
                serialport::ErrorKind::Io(std::io::ErrorKind::NotFound) => Absence::NotThere,
                serialport::ErrorKind::Io(std::io::ErrorKind::PermissionDenied) => Absence::Denied,
                serialport::ErrorKind::NoDevice
                | serialport::ErrorKind::Io(std::io::ErrorKind::WouldBlock) => Absence::Taken,
                _ => Absence::Unfit,
            })?;
        // What came before would be stamped with the wrong time.
        let _ = tty.clear(ClearBuffer::Input);
        let by_driver = ioctl::low_latency(ioctl::borrow(&tty)).is_ok();
        let by_timer = latency_timer(device);
        Ok(Port {
            tty,
            low_latency: by_driver || by_timer,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        ioctl::borrow(&self.tty)
    }
}

/// Sets an FTDI adapter's timer to its shortest, 1 ms, where this user may.
fn latency_timer(device: &Path) -> bool {
    let Ok(real) = device.canonicalize() else {
        return false;
    };
    let Some(name) = real.file_name() else {
        return false;
    };
    let timer = Path::new("/sys/class/tty")
        .join(name)
        .join("device/latency_timer");
    timer.exists() && fs::write(timer, "1").is_ok()
}

/// What an error says about the port.
pub(super) fn absence(error: Errno) -> Absence {
    match error {
        Errno::ENOTTY | Errno::EINVAL | Errno::ENOSYS => Absence::NoModemLines,
        _ => Absence::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_told_from_levels_and_counts() {
        use Edge::{Falling, Rising};
        for (edge, was_up, is_up, changes, came) in [
            (Rising, false, true, 1, true),
            (Rising, true, false, 1, false),
            (Falling, true, false, 1, true),
            (Falling, false, true, 1, false),
            // A whole pulse, counted twice or, where it was over at once, once.
            (Rising, false, false, 2, true),
            (Rising, false, false, 1, true),
            (Falling, false, false, 1, true),
            (Rising, true, true, 2, true),
            (Falling, true, true, 1, true),
            (Rising, true, false, 3, true),
            (Rising, false, false, 0, false),
            (Falling, true, true, 0, false),
        ] {
            assert_eq!(
                edge_came(edge, was_up, is_up, changes),
                came,
                "{edge:?} {was_up} {is_up} {changes}"
            );
        }
    }
}
