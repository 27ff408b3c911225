//! What GE's packed protocol (0025,101b) says of the order of slices.
//!
//! The element is a length and a gzip stream of lines `NAME "value"`. The order follows
//! the scheme that dcm2niix documents for GE: odd slices first where interleaved, evenly over the
//! TR less the delay between volumes. Multi-band orders depend on the release and are left out.

use std::io::Read;

use flate2::read::GzDecoder;

use crate::volume::SliceOrder;

/// Unpacked protocols have some kilobytes.
const MAX_PROTOCOL_BYTES: u64 = 256 * 1024;

/// What a protocol says of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Protocol {
    /// The order of slices, where it is known.
    pub(super) order: Option<SliceOrder>,
    /// A pause after each volume that RepetitionTime leaves out, milliseconds.
    pub(super) pause_ms: f64,
}

/// Reads a protocol; `None` where it is in a form that is not known.
pub(super) fn read(bytes: &[u8]) -> Option<Protocol> {
    let packed = bytes
        .get(4..)
        .filter(|packed| packed.starts_with(&[0x1f, 0x8b]))?;
    let mut text = Vec::new();
    // What could be unpacked before a broken end is still text.
    let _ = GzDecoder::new(packed)
        .take(MAX_PROTOCOL_BYTES)
        .read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let value = |name: &str| {
        text.lines().find_map(|line| {
            let line = line.trim();
            let line = line.strip_prefix("set ").unwrap_or(line);
            let rest = line.strip_prefix(name)?;
            let quoted = rest.strip_prefix([' ', '\t'])?.trim();
            Some(quoted.trim_matches('"').to_owned())
        })
    };
    let number = |name: &str| {
        let number = value(name)?.parse::<f64>().ok()?;
        number.is_finite().then_some(number)
    };
    let options = value("IOPT")?;
    let bands = number("MBACCEL").unwrap_or(1.0);
    let delay_ms = number("DELACQNOAV").unwrap_or(0.0).max(0.0) * 1000.0;
    let minimum = value("DELACQ").is_some_and(|delay| delay == "Minimum");
    let functional = options.contains("FMRI");
    let (interleaved, pause_ms) = if functional {
        (number("SLICEORDER")? != 0.0, 0.0)
    } else if options.contains("MPhVar") {
        return Some(Protocol {
            order: None,
            pause_ms: 0.0,
        });
    } else if options.contains("MPh") {
        (true, if minimum { 0.0 } else { delay_ms })
    } else {
        return None;
    };
    let delay_ms = if functional { delay_ms } else { pause_ms };
    Some(Protocol {
        order: (bands <= 1.0).then_some(SliceOrder {
            interleaved,
            delay_ms,
        }),
        pause_ms,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn packed(text: &str) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(text.as_bytes()).unwrap();
        let mut out = vec![0; 4];
        out.extend(packer.finish().unwrap());
        out
    }

    #[test]
    fn orders_are_told_apart() {
        let order = |text: &str| read(&packed(text)).and_then(|protocol| protocol.order);
        let functional = "IOPT \"EPI, FMRI\"\nNOSLC \"15\"\nSLICEORDER \"1\"\n";
        let interleaved = |interleaved, delay_ms| {
            Some(SliceOrder {
                interleaved,
                delay_ms,
            })
        };
        assert_eq!(order(functional), interleaved(true, 0.0));
        let sequential = "set IOPT \"FMRI\"\nset SLICEORDER \"0\"\nDELACQNOAV \"0.5\"";
        assert_eq!(order(sequential), interleaved(false, 500.0));
        assert_eq!(
            order("IOPT \"EPI, MPh\"\nSLICEORDER \"0\""),
            interleaved(true, 0.0)
        );
        assert_eq!(
            order("IOPT \"FMRI\"\nSLICEORDER \"1\"\nMBACCEL \"3\""),
            None
        );
        assert_eq!(order("IOPT \"EDR\"\nSLICEORDER \"1\""), None);
        assert_eq!(read(b"no gzip stream"), None);
    }
}
