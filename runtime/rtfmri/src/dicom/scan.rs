//! A walk over a file's element headers that believes no length.
//!
//! Steps: the preamble and `DICM`; group 2 (always explicit little endian) for the
//! transfer syntax; then the data set, every element's length compared with the bytes
//! that are left, sequences entered to a fixed depth. Only a file that passes goes on
//! to the parser, so a lying length never makes it allocate.

use super::DicomError;

const UNDEFINED: u32 = 0xffff_ffff;
const MAX_DEPTH: usize = 16;
/// A mosaic holds some hundreds of elements, an enhanced multi-frame file some thousands.
const MAX_ELEMENTS: usize = 20_000;
/// Text is what the parser splits into many small values, so its total is bounded.
const MAX_TEXT_BYTES: usize = 256 * 1024;
const IMPLICIT_LE: &str = "1.2.840.10008.1.2";
const EXPLICIT_LE: &str = "1.2.840.10008.1.2.1";

/// Checks a whole file's structure.
///
/// # Errors
/// Anything but an uncompressed little-endian file whose lengths all fit.
pub(super) fn check(bytes: &[u8]) -> Result<(), DicomError> {
    if bytes.len() < 132 || bytes.get(128..132) != Some(b"DICM") {
        return Err(DicomError::NotDicom);
    }
    let mut scan = Scan { bytes, offset: 132 };
    let mut syntax = None;
    while scan.peek_group() == Some(2) {
        let element = scan.header(true)?;
        if element.len == UNDEFINED {
            return Err(scan.overrun(&element));
        }
        let value = scan.value(&element)?;
        if element.tag == (2, 0x10) {
            let text: String = value
                .iter()
                .map(|byte| char::from(*byte))
                .take_while(|c| c.is_ascii_digit() || *c == '.')
                .take(64)
                .collect();
            syntax = Some(text);
        }
    }
    let syntax = syntax.ok_or(DicomError::Missing {
        element: "(0002,0010) TransferSyntaxUID",
    })?;
    let explicit = match syntax.as_str() {
        EXPLICIT_LE => true,
        IMPLICIT_LE => false,
        _ => {
            return Err(DicomError::TransferSyntax {
                name: syntax_name(&syntax),
                uid: syntax,
            });
        }
    };
    scan.data_set(explicit)
}

/// The name of a transfer syntax that we refuse.
fn syntax_name(uid: &str) -> &'static str {
    match uid {
        "1.2.840.10008.1.2.1.99" => "deflated",
        "1.2.840.10008.1.2.2" => "explicit big endian",
        "1.2.840.10008.1.2.4.50" => "JPEG baseline",
        "1.2.840.10008.1.2.4.51" => "JPEG extended",
        "1.2.840.10008.1.2.4.57" | "1.2.840.10008.1.2.4.70" => "JPEG lossless",
        "1.2.840.10008.1.2.4.80" | "1.2.840.10008.1.2.4.81" => "JPEG-LS",
        "1.2.840.10008.1.2.4.90" => "JPEG 2000 lossless",
        "1.2.840.10008.1.2.4.91" => "JPEG 2000",
        "1.2.840.10008.1.2.4.201" | "1.2.840.10008.1.2.4.202" | "1.2.840.10008.1.2.4.203" => {
            "high-throughput JPEG 2000"
        }
        "1.2.840.10008.1.2.5" => "run-length encoding",
        _ => "unknown",
    }
}

/// Whether the parser keeps this value as plain bytes or words.
fn is_binary(element: &Element) -> bool {
    match &element.vr {
        Some(vr) => matches!(vr, b"OB" | b"OW" | b"UN" | b"OF" | b"OD" | b"OL" | b"OV"),
        None => element.tag.0 % 2 == 1 || element.tag == (0x7fe0, 0x10),
    }
}

struct Element {
    tag: (u16, u16),
    vr: Option<[u8; 2]>,
    len: u32,
    offset: usize,
}

/// An open sequence or item.
struct Level {
    /// Where it ends; `None` for an undefined length.
    end: Option<usize>,
    /// A sequence holds items; an item holds elements.
    sequence: bool,
    /// How its elements are encoded.
    explicit: bool,
}

struct Scan<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl Scan<'_> {
    fn u16_at(&self, offset: usize) -> Option<u16> {
        let pair = self.bytes.get(offset..offset.checked_add(2)?)?;
        Some(u16::from_le_bytes([pair[0], pair[1]]))
    }

    fn u32_at(&self, offset: usize) -> Option<u32> {
        let low = u32::from(self.u16_at(offset)?);
        Some(low | u32::from(self.u16_at(offset.checked_add(2)?)?) << 16)
    }

    fn peek_group(&self) -> Option<u16> {
        self.u16_at(self.offset)
    }

    fn header(&mut self, explicit: bool) -> Result<Element, DicomError> {
        let offset = self.offset;
        self.header_or_none(explicit)
            .ok_or(DicomError::Truncated { offset })
    }

    fn header_or_none(&mut self, explicit: bool) -> Option<Element> {
        let offset = self.offset;
        let tag = (self.u16_at(offset)?, self.u16_at(offset + 2)?);
        let (vr, len, size) = if !explicit || tag.0 == 0xfffe {
            (None, self.u32_at(offset + 4)?, 8)
        } else {
            let vr = [*self.bytes.get(offset + 4)?, *self.bytes.get(offset + 5)?];
            match &vr {
                b"AE" | b"AS" | b"AT" | b"CS" | b"DA" | b"DS" | b"DT" | b"FL" | b"FD" | b"IS"
                | b"LO" | b"LT" | b"PN" | b"SH" | b"SL" | b"SS" | b"ST" | b"TM" | b"UI" | b"UL"
                | b"US" => (Some(vr), u32::from(self.u16_at(offset + 6)?), 8),
                _ => (Some(vr), self.u32_at(offset + 8)?, 12),
            }
        };
        self.offset = offset + size;
        Some(Element {
            tag,
            vr,
            len,
            offset,
        })
    }

    fn overrun(&self, element: &Element) -> DicomError {
        DicomError::Length {
            group: element.tag.0,
            element: element.tag.1,
            offset: element.offset,
            len: element.len,
            left: self.bytes.len().saturating_sub(self.offset),
        }
    }

    fn end_of(&self, element: &Element) -> Result<usize, DicomError> {
        usize::try_from(element.len)
            .ok()
            .and_then(|len| self.offset.checked_add(len))
            .filter(|end| *end <= self.bytes.len())
            .ok_or_else(|| self.overrun(element))
    }

    fn value(&mut self, element: &Element) -> Result<&[u8], DicomError> {
        let end = self.end_of(element)?;
        let start = std::mem::replace(&mut self.offset, end);
        Ok(&self.bytes[start..end])
    }

    fn data_set(&mut self, explicit: bool) -> Result<(), DicomError> {
        let mut levels: Vec<Level> = Vec::new();
        let mut last_tag = (0, 0);
        let (mut elements, mut text_bytes) = (0_usize, 0_usize);
        loop {
            while let Some(end) = levels.last().and_then(|level| level.end) {
                if self.offset < end {
                    break;
                }
                if self.offset > end {
                    return Err(DicomError::Structure {
                        offset: self.offset,
                        what: "an element that runs past the end of its sequence",
                    });
                }
                levels.pop();
            }
            if levels.is_empty() && self.offset == self.bytes.len() {
                return Ok(());
            }
            let (in_sequence, explicit) = levels
                .last()
                .map_or((false, explicit), |level| (level.sequence, level.explicit));
            let element = self.header(explicit)?;
            let structure = |what| DicomError::Structure {
                offset: element.offset,
                what,
            };
            elements += 1;
            if elements > MAX_ELEMENTS {
                return Err(structure("too many elements"));
            }
            match (in_sequence, element.tag) {
                (true, (0xfffe, 0xe000)) => {
                    let end = self.defined_end(&element)?;
                    self.push(&mut levels, end, false, explicit)?;
                }
                (true, (0xfffe, 0xe0dd)) | (false, (0xfffe, 0xe00d)) => {
                    if element.len != 0 || levels.last().is_none_or(|level| level.end.is_some()) {
                        return Err(structure("a delimiter where none may stand"));
                    }
                    levels.pop();
                }
                (true, _) => return Err(structure("an element where an item was expected")),
                (false, (0xfffe, _)) => return Err(structure("an item outside a sequence")),
                (false, tag) => {
                    if levels.is_empty() {
                        if tag <= last_tag {
                            return Err(structure("an element out of order"));
                        }
                        last_tag = tag;
                    }
                    let is_sequence = element.vr == Some(*b"SQ");
                    if element.len == UNDEFINED {
                        if tag == (0x7fe0, 0x10) {
                            return Err(structure("encapsulated pixels in an uncompressed file"));
                        }
                        // A sequence of unknown type keeps the implicit encoding (PS3.5, 6.2.2).
                        let inner = explicit && element.vr != Some(*b"UN");
                        if explicit && !is_sequence && inner {
                            return Err(structure("an undefined length outside a sequence"));
                        }
                        self.push(&mut levels, None, true, inner)?;
                    } else if is_sequence {
                        let end = self.end_of(&element)?;
                        self.push(&mut levels, Some(end), true, explicit)?;
                    } else {
                        let end = self.end_of(&element)?;
                        if !is_binary(&element) {
                            text_bytes += end - self.offset;
                            if text_bytes > MAX_TEXT_BYTES {
                                return Err(structure("too much text"));
                            }
                        }
                        self.offset = end;
                    }
                }
            }
        }
    }

    fn defined_end(&self, element: &Element) -> Result<Option<usize>, DicomError> {
        if element.len == UNDEFINED {
            return Ok(None);
        }
        self.end_of(element).map(Some)
    }

    fn push(
        &self,
        levels: &mut Vec<Level>,
        end: Option<usize>,
        sequence: bool,
        explicit: bool,
    ) -> Result<(), DicomError> {
        if levels.len() >= MAX_DEPTH {
            return Err(DicomError::Structure {
                offset: self.offset,
                what: "sequences nested too deeply",
            });
        }
        levels.push(Level {
            end,
            sequence,
            explicit,
        });
        Ok(())
    }
}
