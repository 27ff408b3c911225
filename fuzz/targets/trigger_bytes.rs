//! A trigger box's bytes: the input is a protocol (9 bytes), then pairs of a byte and the milliseconds before it.
#![no_main]

use libfuzzer_sys::fuzz_target;

// A file of a program, which offers no library; it stands on nothing else.
#[allow(dead_code, reason = "the program uses what this target does not")]
#[path = "../../runtime/daemon/src/trigger/protocol.rs"]
mod protocol;

use protocol::{Decoder, Frame, Protocol};

fuzz_target!(|bytes: &[u8]| {
    let Some((&[code, other, mask, debounce_ms, framed, start, len, code_at, gap_ms], rest)) = bytes.split_first_chunk()
    else {
        return;
    };
    let len = len % 31 + 2;
    let frame = (framed % 2 == 1).then(|| Frame {
        start,
        len,
        code_at: code_at % (len - 1) + 1,
        gap_ns: u64::from(gap_ms) * 1_000_000,
    });
    let debounce_ns = u64::from(debounce_ms) * 1_000_000;
    let mut decoder = Decoder::new(Protocol::new(&[code, other], mask, frame), debounce_ns);
    let (mut now, mut last, mut pulses, mut fed) = (0, None, 0_u64, 0_u64);
    for pair in rest.chunks_exact(2) {
        now += u64::from(pair[1]) * 1_000_000;
        fed += 1;
        if let Some(pulse) = decoder.byte(pair[0], now) {
            assert!([code, other].contains(&(pulse.code & mask)));
            assert!(pulse.at_ns <= now);
            assert!(last.is_none_or(|last| pulse.at_ns - last >= debounce_ns));
            last = Some(pulse.at_ns);
            pulses += 1;
        }
    }
    let whole = if frame.is_some() { u64::from(len) } else { 1 };
    let ignored = decoder.ignored();
    let accounted = ignored.bytes + (pulses + ignored.bounced) * whole;
    assert!(accounted <= fed && fed - accounted < whole);
});
