//! What a serial port can be asked beyond reading: no crate offers it safely.
#![expect(
    unsafe_code,
    reason = "modem line waits, edge counts and the driver's low-latency flag are ioctls that no crate \
              wraps, and serialport lends its descriptor only as a number. Each call here gets a \
              descriptor that is open as long as it is borrowed and memory of the kernel's own layout"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;
use serialport::TTYPort;

/// `ASYNC_LOW_LATENCY` of `linux/tty_flags.h`.
const LOW_LATENCY: i32 = 1 << 13;

/// `struct serial_struct` of `linux/serial.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct SerialStruct {
    kind: i32,
    line: i32,
    port: u32,
    irq: i32,
    flags: i32,
    xmit_fifo_size: i32,
    custom_divisor: i32,
    baud_base: i32,
    close_delay: u16,
    io_type: u8,
    reserved: u8,
    hub6: i32,
    closing_wait: u16,
    closing_wait2: u16,
    iomem_base: usize,
    iomem_reg_shift: u16,
    port_high: u32,
    iomap_base: libc::c_ulong,
}

/// `struct serial_icounter_struct` of `linux/serial.h`: changes of each modem line since boot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    pub(super) cts: i32,
    pub(super) dsr: i32,
    pub(super) ri: i32,
    pub(super) dcd: i32,
    rx: i32,
    tx: i32,
    frame: i32,
    overrun: i32,
    parity: i32,
    brk: i32,
    buf_overrun: i32,
    reserved: [i32; 9],
}

/// The port's descriptor.
pub(super) fn borrow(port: &TTYPort) -> BorrowedFd<'_> {
    // SAFETY: the port owns the descriptor and closes it only when dropped, which the borrow prevents.
    unsafe { BorrowedFd::borrow_raw(port.as_raw_fd()) }
}

/// Asks the driver to hand bytes on at once; FTDI adapters wait up to 16 ms otherwise.
pub(super) fn low_latency(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut serial = SerialStruct::default();
    // SAFETY: the kernel writes one `serial_struct`, which `serial` has the layout of.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGSERIAL, &raw mut serial) })?;
    serial.flags |= LOW_LATENCY;
    // SAFETY: the kernel reads one `serial_struct`: the one that it wrote, with one flag more.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSSERIAL, &raw const serial) })?;
    Ok(())
}

/// Waits until one of the modem lines of `mask` changes.
pub(super) fn wait_for_change(fd: BorrowedFd<'_>, mask: i32) -> Result<(), Errno> {
    // SAFETY: the argument is a plain number; no memory is touched.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCMIWAIT, mask) })?;
    Ok(())
}

/// How often each modem line has changed.
pub(super) fn counters(fd: BorrowedFd<'_>) -> Result<Counters, Errno> {
    let mut counters = Counters::default();
    // SAFETY: the kernel writes one `serial_icounter_struct`, which `counters` has the layout of.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGICOUNT, &raw mut counters) })?;
    Ok(counters)
}

/// Which modem lines are up, as `TIOCM_*` bits.
pub(super) fn lines(fd: BorrowedFd<'_>) -> Result<i32, Errno> {
    let mut lines = 0_i32;
    // SAFETY: the kernel writes one int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCMGET, &raw mut lines) })?;
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_kernels() {
        // Sizes on 64-bit Linux, as `sizeof` says.
        assert_eq!(size_of::<SerialStruct>(), 72);
        assert_eq!(size_of::<Counters>(), 80);
        assert_eq!(std::mem::offset_of!(SerialStruct, flags), 16);
        assert_eq!(std::mem::offset_of!(SerialStruct, iomem_base), 48);
    }
}
