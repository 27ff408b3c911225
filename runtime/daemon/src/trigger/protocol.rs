//! From bytes to pulses: no allocation, no clock, no state beyond a few words.

/// Bytes that mean a pulse, and how they are wrapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Protocol {
    /// One bit per byte.
    codes: [u64; 4],
    mask: u8,
    frame: Option<Frame>,
}

/// An event of several bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Its first byte.
    pub(crate) start: u8,
    /// Its length, bytes; at least 2.
    pub(crate) len: u8,
    /// Which byte holds the code, from 0; not the first.
    pub(crate) code_at: u8,
    /// Bytes further apart than this are not of one event, nanoseconds.
    pub(crate) gap_ns: u64,
}

impl Protocol {
    /// - `codes`: bytes that mean a pulse, after `mask`.
    pub(crate) fn new(codes: &[u8], mask: u8, frame: Option<Frame>) -> Protocol {
        let mut set = [0; 4];
        for &code in codes {
            set[usize::from(code >> 6)] |= 1 << (code & 63);
        }
        Protocol {
            codes: set,
            mask,
            frame,
        }
    }

    fn means_pulse(&self, byte: u8) -> bool {
        let code = byte & self.mask;
        self.codes[usize::from(code >> 6)] >> (code & 63) & 1 == 1
    }
}

/// A pulse among the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pulse {
    /// When its first byte came, nanoseconds.
    pub(crate) at_ns: u64,
    /// The byte that said so.
    pub(crate) code: u8,
}

/// What else came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ignored {
    /// Bytes that mean no pulse: buttons, noise.
    pub(crate) bytes: u64,
    /// The last of them.
    pub(crate) last: Option<u8>,
    /// Pulses too soon after another.
    pub(crate) bounced: u64,
}

/// Tells pulses that are too soon after another.
#[derive(Clone, Debug)]
pub(crate) struct Debounce {
    ns: u64,
    last_ns: Option<u64>,
}

impl Debounce {
    pub(crate) fn new(ns: u64) -> Debounce {
        Debounce { ns, last_ns: None }
    }

    /// Whether a pulse is one of its own.
    pub(crate) fn passes(&mut self, at_ns: u64) -> bool {
        let soon = self
            .last_ns
            .is_some_and(|last| at_ns.saturating_sub(last) < self.ns);
        if !soon {
            self.last_ns = Some(at_ns);
        }
        !soon
    }
}

/// Reads one byte after another.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    protocol: Protocol,
    debounce: Debounce,
    /// Bytes of the event so far, its code, when it began and when it went on.
    held: u8,
    code: u8,
    began_ns: u64,
    last_ns: u64,
    ignored: Ignored,
}

impl Decoder {
    pub(crate) fn new(protocol: Protocol, debounce_ns: u64) -> Decoder {
        Decoder {
            protocol,
            debounce: Debounce::new(debounce_ns),
            held: 0,
            code: 0,
            began_ns: 0,
            last_ns: 0,
            ignored: Ignored::default(),
        }
    }

    /// Everything so far that was no pulse.
    pub(crate) fn ignored(&self) -> Ignored {
        self.ignored
    }

    /// Takes a byte that came at `at_ns`.
    pub(crate) fn byte(&mut self, byte: u8, at_ns: u64) -> Option<Pulse> {
        let Some(frame) = self.protocol.frame else {
            return self.code(byte, 1, at_ns);
        };
        if self.held > 0 && at_ns.saturating_sub(self.last_ns) > frame.gap_ns {
            // An event that broke off; this byte may begin another.
            self.ignore(self.code, self.held);
            self.held = 0;
        }
        self.last_ns = at_ns;
        if self.held == 0 {
            if byte != frame.start {
                self.ignore(byte, 1);
                return None;
            }
            self.began_ns = at_ns;
            self.code = byte;
        }
        if self.held == frame.code_at {
            self.code = byte;
        }
        self.held += 1;
        if self.held < frame.len {
            return None;
        }
        self.held = 0;
        self.code(self.code, frame.len, self.began_ns)
    }

    fn code(&mut self, code: u8, len: u8, at_ns: u64) -> Option<Pulse> {
        if !self.protocol.means_pulse(code) {
            self.ignore(code, len);
            return None;
        }
        if !self.debounce.passes(at_ns) {
            self.ignored.bounced += 1;
            return None;
        }
        Some(Pulse { at_ns, code })
    }

    fn ignore(&mut self, byte: u8, len: u8) {
        self.ignored.bytes += u64::from(len);
        self.ignored.last = Some(byte);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn xid() -> Protocol {
        let frame = Frame {
            start: b'k',
            len: 6,
            code_at: 1,
            gap_ns: 33 * MS,
        };
        Protocol::new(&[0xb0], 255, Some(frame))
    }

    fn pulses(protocol: Protocol, debounce_ns: u64, bytes: &[(u8, u64)]) -> (Vec<Pulse>, Ignored) {
        let mut decoder = Decoder::new(protocol, debounce_ns);
        let pulses = bytes
            .iter()
            .filter_map(|&(byte, at_ns)| decoder.byte(byte, at_ns))
            .collect();
        (pulses, decoder.ignored())
    }

    #[test]
    fn a_code_is_a_pulse_and_buttons_are_ignored() {
        let protocol = Protocol::new(b"5", 255, None);
        let (pulses, ignored) = pulses(protocol, 0, &[(b'1', 1), (b'5', 2), (b'x', 3)]);
        assert_eq!(
            pulses,
            [Pulse {
                at_ns: 2,
                code: b'5'
            }]
        );
        assert_eq!((ignored.bytes, ignored.last), (2, Some(b'x')));
    }

    #[test]
    fn a_pulse_too_soon_after_another_is_the_same_one() {
        let protocol = Protocol::new(b"5", 255, None);
        let bytes = [(b'5', 0), (b'5', 9 * MS), (b'5', 10 * MS), (b'5', 19 * MS)];
        let (pulses, ignored) = pulses(protocol, 10 * MS, &bytes);
        let at: Vec<u64> = pulses.iter().map(|pulse| pulse.at_ns).collect();
        assert_eq!(at, [0, 10 * MS]);
        assert_eq!(ignored.bounced, 2);
    }

    #[test]
    fn a_mask_leaves_the_bits_that_count() {
        let protocol = Protocol::new(&[0b10], 0b10, None);
        let (pulses, _) = pulses(protocol, 0, &[(0b1110, 1), (0b1101, 2), (0b10, 3)]);
        assert_eq!(pulses.len(), 2);
    }

    #[test]
    fn a_frame_is_a_pulse_at_the_time_of_its_first_byte() {
        // Pressed, with 'k' among the bytes of the box's time; released; a button.
        let mut bytes = Vec::new();
        for (frame, at) in [
            ([b'k', 0xb0, b'k', 1, 2, 3], 100 * MS),
            ([b'k', 0xa0, 9, 1, 2, 3], 150 * MS),
            ([b'k', 0x30, 9, 1, 2, 3], 200 * MS),
        ] {
            bytes.extend((0..6).zip(frame).map(|(i, byte)| (byte, at + i * MS)));
        }
        let (pulses, ignored) = pulses(xid(), 0, &bytes);
        assert_eq!(
            pulses,
            [Pulse {
                at_ns: 100 * MS,
                code: 0xb0
            }]
        );
        assert_eq!((ignored.bytes, ignored.last), (12, Some(0x30)));
    }

    #[test]
    fn a_broken_frame_does_not_take_the_next_one_along() {
        let mut bytes = vec![(b'k', MS), (0xb0, MS), (b'?', 900 * MS)];
        bytes.extend([b'k', 0xb0, 0, 0, 0, 0].map(|byte| (byte, 1000 * MS)));
        let (pulses, ignored) = pulses(xid(), 0, &bytes);
        assert_eq!(pulses.len(), 1);
        assert_eq!(pulses[0].at_ns, 1000 * MS);
        assert_eq!(ignored.bytes, 3);
    }

    /// Slow and obvious: cut at silences, then look for whole frames from the left.
    fn framed_slowly(frame: Frame, code: u8, bytes: &[(u8, u64)]) -> Vec<u64> {
        let mut bursts: Vec<Vec<(u8, u64)>> = Vec::new();
        let mut last: Option<u64> = None;
        for &(byte, at) in bytes {
            if last.is_none_or(|last| at - last > frame.gap_ns) {
                bursts.push(Vec::new());
            }
            last = Some(at);
            bursts.last_mut().unwrap().push((byte, at));
        }
        let mut pulses = Vec::new();
        for burst in bursts {
            let mut rest = &burst[..];
            while !rest.is_empty() {
                if rest[0].0 != frame.start {
                    rest = &rest[1..];
                } else if rest.len() >= usize::from(frame.len) {
                    if rest[usize::from(frame.code_at)].0 == code {
                        pulses.push(rest[0].1);
                    }
                    rest = &rest[usize::from(frame.len)..];
                } else {
                    rest = &[];
                }
            }
        }
        pulses
    }

    fn any_protocol() -> impl Strategy<Value = Protocol> {
        let frame = (any::<u8>(), 2_u8..=32).prop_flat_map(|(start, len)| {
            (1..len, 0..100 * MS).prop_map(move |(code_at, gap_ns)| Frame {
                start,
                len,
                code_at,
                gap_ns,
            })
        });
        (
            prop::collection::vec(any::<u8>(), 1..5),
            any::<u8>(),
            prop::option::of(frame),
        )
            .prop_map(|(codes, mask, frame)| Protocol::new(&codes, mask, frame))
    }

    proptest! {
        /// Any bytes at any times: no panic, every byte is accounted for, and a pulse is a code's.
        #[test]
        fn any_stream_is_pulses_of_codes_and_counted_rest(
            protocol in any_protocol(),
            debounce in 0..20 * MS,
            bytes in prop::collection::vec((any::<u8>(), 0..40 * MS), 0..500),
        ) {
            let mut decoder = Decoder::new(protocol.clone(), debounce);
            let (mut now, mut pulses) = (0, Vec::new());
            for &(byte, gap) in &bytes {
                now += gap;
                if let Some(pulse) = decoder.byte(byte, now) {
                    prop_assert!(protocol.means_pulse(pulse.code));
                    prop_assert!(pulse.at_ns <= now);
                    pulses.push(pulse);
                }
            }
            let len = protocol.frame.map_or(1, |frame| u64::from(frame.len));
            let ignored = decoder.ignored();
            let accounted = ignored.bytes
                + (pulses.len() as u64 + ignored.bounced) * len
                + u64::from(decoder.held);
            prop_assert_eq!(accounted, bytes.len() as u64);
            for pair in pulses.windows(2) {
                prop_assert!(pair[1].at_ns - pair[0].at_ns >= debounce);
            }
        }

        #[test]
        fn frames_are_those_of_the_slow_reference(
            // Few values, so that frames happen.
            bytes in prop::collection::vec((0_u8..3, prop_oneof![4 => 0..MS, 1 => 30 * MS..50 * MS]), 0..200),
            len in 2_u8..6,
        ) {
            let frame = Frame { start: 1, len, code_at: 1, gap_ns: 20 * MS };
            let mut now = 0;
            let timed: Vec<(u8, u64)> = bytes
                .iter()
                .map(|&(byte, gap)| { now += gap; (byte, now) })
                .collect();
            let (found, _) = pulses(Protocol::new(&[2], 255, Some(frame)), 0, &timed);
            let at: Vec<u64> = found.iter().map(|pulse| pulse.at_ns).collect();
            prop_assert_eq!(at, framed_slowly(frame, 2, &timed));
        }
    }
}
