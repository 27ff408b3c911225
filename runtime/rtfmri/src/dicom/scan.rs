//! A walk over a file's element headers that believes no length and copies no value.
//!
//! Steps: the preamble and `DICM`; group 2 (always explicit little endian) for the
//! transfer syntax; then the data set, every element's length compared with the bytes
//! that are left, sequences entered to a fixed depth. What comes out is an index into
//! the file ([`DataSet`]), so that memory is bounded by the number of elements and a
//! lying length allocates nothing. General DICOM parsers build every value and item as an
//! object of its own, which a hostile file multiplies (measured: 4 GiB for 262 bytes).

use super::DicomError;
use super::header::Item;

const UNDEFINED: u32 = 0xffff_ffff;
const MAX_DEPTH: usize = 16;
/// A mosaic holds some hundreds of elements, an enhanced file of 100 frames some ten thousand.
const MAX_ELEMENTS: usize = 100_000;
/// Elements point into the file with 32 bits.
const MAX_BYTES: usize = 1 << 30;
const IMPLICIT_LE: &str = "1.2.840.10008.1.2";
const EXPLICIT_LE: &str = "1.2.840.10008.1.2.1";
const ITEM: (u16, u16) = (0xfffe, 0xe000);

/// Sequences that a reader enters and that must be known by tag where the file does not
/// say what they are: implicit encoding, or rewritten as of unknown type.
const SEQUENCES: [(u16, u16); 13] = [
    (0x0018, 0x9112),
    (0x0018, 0x9114),
    (0x0018, 0x9117),
    (0x0018, 0x9226),
    (0x0020, 0x9111),
    (0x0020, 0x9113),
    (0x0020, 0x9116),
    (0x0021, 0x10fe),
    (0x0021, 0x11fe),
    (0x0028, 0x9110),
    (0x0028, 0x9145),
    (0x5200, 0x9229),
    (0x5200, 0x9230),
];

/// One element, item or sequence of a data set; the nodes of a sequence follow it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    /// Group and element.
    pub(super) tag: (u16, u16),
    /// Its type, where the file states one.
    pub(super) vr: Option<[u8; 2]>,
    /// Whether it holds items; items and plain elements do not.
    pub(super) sequence: bool,
    /// Where its value begins in the file.
    start: u32,
    /// Bytes of its value; 0 for sequences and items.
    len: u32,
    /// The node after it and all that it holds.
    next: u32,
}

/// A file whose structure was found whole.
#[derive(Debug)]
pub(super) struct DataSet<'a> {
    bytes: &'a [u8],
    nodes: Vec<Node>,
}

impl<'a> DataSet<'a> {
    /// The elements at the top.
    pub(super) fn top(&self) -> Item<'_> {
        Item::new(self, 0, self.nodes.len())
    }

    /// A node by its place in the index.
    pub(super) fn node(&self, at: usize) -> Option<&Node> {
        self.nodes.get(at)
    }

    /// The place after a node and all that it holds; always further on.
    pub(super) fn after(&self, at: usize) -> usize {
        let next = self.nodes.get(at).map_or(at, |node| as_usize(node.next));
        next.max(at + 1)
    }

    /// A plain element's value.
    pub(super) fn value(&self, node: &Node) -> &'a [u8] {
        let start = as_usize(node.start);
        let end = start.saturating_add(as_usize(node.len));
        self.bytes.get(start..end).unwrap_or_default()
    }
}

fn as_usize(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Checks a whole file's structure.
///
/// # Errors
/// Anything but an uncompressed little-endian file whose lengths all fit.
pub(super) fn read(bytes: &[u8]) -> Result<DataSet<'_>, DicomError> {
    if bytes.len() < 132 || bytes.get(128..132) != Some(b"DICM") {
        return Err(DicomError::NotDicom);
    }
    if bytes.len() > MAX_BYTES {
        return Err(DicomError::Structure {
            offset: MAX_BYTES,
            what: "more bytes than any volume has",
        });
    }
    let mut scan = Scan {
        bytes,
        offset: 132,
        nodes: Vec::new(),
    };
    let mut syntax = None;
    while scan.peek_group() == Some(2) {
        let element = scan.header(true)?;
        if element.len == UNDEFINED {
            return Err(scan.overrun(&element));
        }
        let value = scan.skip(&element)?;
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
    scan.data_set(explicit)?;
    Ok(DataSet {
        bytes,
        nodes: scan.nodes,
    })
}

/// The name of a transfer syntax that we refuse.
fn syntax_name(uid: &str) -> &'static str {
    match uid {
        "1.2.840.10008.1.2.1.99" => "deflated",
        "1.2.840.10008.1.2.2" => "explicit big endian",
        "1.2.840.113619.5.2" => "GE's implicit big endian",
        "1.2.840.10008.1.2.4.50" => "JPEG baseline",
        "1.2.840.10008.1.2.4.51" => "JPEG extended",
        "1.2.840.10008.1.2.4.57" | "1.2.840.10008.1.2.4.70" => "JPEG lossless",
        "1.2.840.10008.1.2.4.80" | "1.2.840.10008.1.2.4.81" => "JPEG-LS",
        "1.2.840.10008.1.2.4.90" => "JPEG 2000 lossless",
        "1.2.840.10008.1.2.4.91" => "JPEG 2000",
        "1.2.840.10008.1.2.4.110" | "1.2.840.10008.1.2.4.111" | "1.2.840.10008.1.2.4.112" => {
            "JPEG XL"
        }
        "1.2.840.10008.1.2.4.201" | "1.2.840.10008.1.2.4.202" | "1.2.840.10008.1.2.4.203" => {
            "high-throughput JPEG 2000"
        }
        "1.2.840.10008.1.2.5" => "run-length encoding",
        _ => "unknown",
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
    /// Its node.
    node: usize,
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
    nodes: Vec<Node>,
}

impl<'a> Scan<'a> {
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

    /// Goes past an element's value, which is returned.
    fn skip(&mut self, element: &Element) -> Result<&'a [u8], DicomError> {
        let end = self.end_of(element)?;
        let start = std::mem::replace(&mut self.offset, end);
        Ok(&self.bytes[start..end])
    }

    fn data_set(&mut self, explicit: bool) -> Result<(), DicomError> {
        let mut levels: Vec<Level> = Vec::new();
        let mut last_tag = (0, 0);
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
                self.close(levels.pop());
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
            if self.nodes.len() >= MAX_ELEMENTS {
                return Err(structure("too many elements"));
            }
            match (in_sequence, element.tag) {
                (true, ITEM) => {
                    let end = self.defined_end(&element)?;
                    self.open(&mut levels, &element, end, false, explicit)?;
                }
                (true, (0xfffe, 0xe0dd)) | (false, (0xfffe, 0xe00d)) => {
                    if element.len != 0 || levels.last().is_none_or(|level| level.end.is_some()) {
                        return Err(structure("a delimiter where none may stand"));
                    }
                    self.close(levels.pop());
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
                    let unknown = matches!(element.vr, None | Some([b'U', b'N']));
                    let is_sequence =
                        element.vr == Some(*b"SQ") || (unknown && SEQUENCES.contains(&tag));
                    // A sequence of unknown type keeps the implicit encoding (PS3.5, 6.2.2).
                    let inner = explicit && !unknown;
                    if element.len == UNDEFINED {
                        if tag == (0x7fe0, 0x10) {
                            return Err(structure("encapsulated pixels in an uncompressed file"));
                        }
                        if !is_sequence && !unknown {
                            return Err(structure("an undefined length outside a sequence"));
                        }
                        self.open(&mut levels, &element, None, true, inner)?;
                    } else if is_sequence {
                        let end = self.end_of(&element)?;
                        self.open(&mut levels, &element, Some(end), true, inner)?;
                    } else {
                        let start = self.offset;
                        self.skip(&element)?;
                        self.push(&element, start, element.len, false);
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

    fn push(&mut self, element: &Element, start: usize, len: u32, sequence: bool) {
        let place = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        self.nodes.push(Node {
            tag: element.tag,
            vr: element.vr,
            sequence,
            start: place(start),
            len,
            next: place(self.nodes.len() + 1),
        });
    }

    fn open(
        &mut self,
        levels: &mut Vec<Level>,
        element: &Element,
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
            node: self.nodes.len(),
            end,
            sequence,
            explicit,
        });
        self.push(element, self.offset, 0, sequence);
        Ok(())
    }

    /// A sequence or item has ended: what follows is no part of it.
    fn close(&mut self, level: Option<Level>) {
        let next = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        if let Some(node) = level.and_then(|level| self.nodes.get_mut(level.node)) {
            node.next = next;
        }
    }
}
