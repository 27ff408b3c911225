//! The file of a pool: one header, then sections at multiples of 4 KiB, all little-endian.
//!
//! ```text
//! header   128 bytes: magic, version, tokens, dim, sketch length, whether all tokens are there, reserved,
//!          count, length of the names, seed, reserved, digest of the image encoder,
//!          SHA-256 of the 96 bytes before and of the names
//! names    one line each, UTF-8, without control characters
//! table    [count, 2] f32: 1 / norm of the tokens; dot product of the unit tokens and the centre
//! centre   [tokens * dim] f32, only with sketches
//! sketches [count, sketch length] f16
//! tokens   [count, tokens * dim] f16, as the image encoder gives them
//! ```
//!
//! Nothing is believed before it fits the length of the file: no length here leads to an allocation
//! larger than the file's names.

use std::ops::Range;

use sha2::{Digest, Sha256};

use super::PoolError;

const MAGIC: &[u8; 8] = b"AFPOOL\r\n";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 128;
const SIGNED_LEN: usize = 96;
const PAGE: u64 = 4096;
/// Longest name of a picture.
pub(super) const MAX_NAME_BYTES: usize = 1024;
/// Longest side of an embedding; the released tower has 256 tokens of 1664 values.
const MAX_AXIS: u32 = 1 << 16;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) tokens: u32,
    pub(super) dim: u32,
    /// 0: no sketches.
    pub(super) sketch_len: u32,
    /// Whether all tokens of all pictures are in the file.
    pub(super) exact: bool,
    pub(super) count: u64,
    pub(super) names_len: u64,
    pub(super) seed: u64,
    pub(super) encoder: [u8; 32],
}

/// Where the sections lie, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sections {
    pub(super) names: Range<u64>,
    pub(super) table: Range<u64>,
    pub(super) centre: Range<u64>,
    pub(super) sketches: Range<u64>,
    pub(super) tokens: Range<u64>,
}

impl Header {
    /// Values of one embedding.
    pub(super) fn values(&self) -> u64 {
        u64::from(self.tokens) * u64::from(self.dim)
    }

    /// `None` where the lengths exceed 64 bits.
    pub(super) fn sections(&self) -> Option<Sections> {
        let mut end = HEADER_LEN as u64;
        let mut section = |len: u64| {
            let start = end.checked_next_multiple_of(PAGE)?;
            end = start.checked_add(len)?;
            Some(start..end)
        };
        let half = |values: u64| self.count.checked_mul(values)?.checked_mul(2);
        let with_sketches = u64::from(self.sketch_len > 0);
        Some(Sections {
            names: section(self.names_len)?,
            table: section(self.count.checked_mul(8)?)?,
            centre: section(self.values() * 4 * with_sketches)?,
            sketches: section(half(self.sketch_len.into())?)?,
            tokens: section(half(if self.exact { self.values() } else { 0 })?)?,
        })
    }

    pub(super) fn to_bytes(self, names: &[u8]) -> [u8; HEADER_LEN] {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend_from_slice(MAGIC);
        for word in [
            VERSION,
            self.tokens,
            self.dim,
            self.sketch_len,
            u32::from(self.exact),
            0,
        ] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for word in [self.count, self.names_len, self.seed, 0] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.encoder);
        let digest = digest(&bytes, names);
        bytes.extend_from_slice(&digest);
        let mut header = [0; HEADER_LEN];
        header.copy_from_slice(&bytes);
        header
    }

    /// Reads and checks a header; `bytes` is the whole file.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<(Header, Sections), PoolError> {
        let Some(head) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(field(
                "header",
                format!("{HEADER_LEN} bytes"),
                bytes.len().to_string(),
            ));
        };
        if !head.starts_with(MAGIC) {
            return Err(field(
                "magic",
                "a pool written by `afterimage-export pool`",
                format!("{:02x?}", &head[..MAGIC.len()]),
            ));
        }
        let mut fields = Fields { head, at: 8 };
        let version = fields.word();
        if version != VERSION {
            return Err(field("version", VERSION.to_string(), version.to_string()));
        }
        let [tokens, dim, sketch_len, exact, reserved] = [(); 5].map(|()| fields.word());
        let [count, names_len, seed, reserved_too] = [(); 4].map(|()| fields.long());
        for (name, value, range) in [
            ("tokens", tokens, 1..=MAX_AXIS),
            ("dim", dim, 1..=MAX_AXIS),
            ("sketch length", sketch_len, 0..=MAX_AXIS),
            ("exact", exact, 0..=1),
            ("reserved", reserved, 0..=0),
        ] {
            if !range.contains(&value) {
                let expected = format!("{}..={}", range.start(), range.end());
                return Err(field(name, expected, value.to_string()));
            }
        }
        if reserved_too != 0 {
            return Err(field("reserved", "0", reserved_too.to_string()));
        }
        if exact == 0 && sketch_len == 0 {
            return Err(field("exact", "tokens or sketches", "neither"));
        }
        let mut encoder = [0; 32];
        encoder.copy_from_slice(&head[64..SIGNED_LEN]);
        let header = Header {
            tokens,
            dim,
            sketch_len,
            exact: exact == 1,
            count,
            names_len,
            seed,
            encoder,
        };
        if count == 0 {
            return Err(field("count", "at least 1 picture", "0"));
        }
        let len = bytes.len() as u64;
        let Some(sections) = header.sections().filter(|s| s.tokens.end == len) else {
            let expected = header.sections().map_or("countless".into(), |sections| {
                sections.tokens.end.to_string()
            });
            return Err(field("length in bytes", expected, len.to_string()));
        };
        let names = &bytes[place(&sections.names)];
        let (expected, found) = (digest(&head[..SIGNED_LEN], names), &head[SIGNED_LEN..]);
        if expected != found {
            return Err(field(
                "SHA-256 of header and names",
                hex(&expected),
                hex(found),
            ));
        }
        Ok((header, sections))
    }
}

struct Fields<'b> {
    head: &'b [u8; HEADER_LEN],
    at: usize,
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.head[self.at..self.at + N]);
        self.at += N;
        bytes
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// A section as a range of a file that was found to be long enough.
pub(super) fn place(section: &Range<u64>) -> Range<usize> {
    let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    index(section.start)..index(section.end)
}

/// The names, split where each ends.
pub(super) fn names(bytes: &[u8], count: u64) -> Result<Vec<String>, PoolError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| field("names", "UTF-8", format!("byte {}", error.valid_up_to())))?;
    let found = text.lines().count() as u64;
    if found != count || !text.ends_with('\n') {
        return Err(field("names", format!("{count} lines"), found.to_string()));
    }
    for (at, name) in text.lines().enumerate() {
        check_name(&format!("name {at}"), name)?;
    }
    Ok(text.lines().map(str::to_owned).collect())
}

pub(super) fn check_name(what: &str, name: &str) -> Result<(), PoolError> {
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    let shown: String = name.chars().take(60).collect();
    Err(field(
        what,
        format!("1 to {MAX_NAME_BYTES} bytes without control characters"),
        format!("{shown:?}, {} bytes", name.len()),
    ))
}

fn digest(head: &[u8], names: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(head);
    hasher.update(names);
    hasher.finalize().into()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn field(
    field: impl Into<String>,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> PoolError {
    PoolError::Field {
        field: field.into(),
        expected: expected.into(),
        found: found.into(),
    }
}
