//! Writing the ZIP container of `torch.save`, as a stream.
//!
//! Every entry is stored, its data begins at a multiple of 64 bytes (an extra field `FB` pads), its CRC follows it
//! in a data descriptor, and what passes 4 GiB gets ZIP64 records. Nothing is sought and nothing is kept but the
//! list of entries, so a file of any size is written in a few kilobytes of memory.

use std::io::{self, Write};

const ALIGNMENT: u64 = 64;
/// Sizes follow the data; names are UTF-8.
const FLAGS: u16 = 0x0808;
/// The value that sends a reader to the ZIP64 record.
const ELSEWHERE: u32 = u32::MAX;

/// A container being written.
pub(crate) struct Container<W: Write> {
    out: W,
    stem: String,
    written: u64,
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    begins: u64,
    len_bytes: u64,
    crc: u32,
}

impl Entry {
    fn is_large(&self) -> bool {
        self.len_bytes >= u64::from(ELSEWHERE)
    }
}

impl<W: Write> Container<W> {
    /// A container whose entries lie in the folder `stem`, as torch names it after the file.
    pub(crate) fn new(out: W, stem: &str) -> Self {
        Self {
            out,
            stem: stem.to_owned(),
            written: 0,
            entries: Vec::new(),
        }
    }

    /// Writes one entry of a length known beforehand; `fill` is given the place to write to.
    pub(crate) fn entry(
        &mut self,
        name: &str,
        len_bytes: u64,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut entry = Entry {
            name: format!("{}/{name}", self.stem),
            begins: self.written,
            len_bytes,
            crc: 0,
        };
        self.local_header(&entry)?;
        let mut data = Data {
            out: &mut self.out,
            crc: crc32fast::Hasher::new(),
            len_bytes: 0,
        };
        fill(&mut data)?;
        if data.len_bytes != len_bytes {
            return Err(io::Error::other(format!(
                "{}: {} bytes written, {len_bytes} announced",
                entry.name, data.len_bytes
            )));
        }
        entry.crc = data.crc.finalize();
        self.written += len_bytes;
        let mut descriptor = Record::new(b"PK\x07\x08");
        descriptor.u32(entry.crc);
        if entry.is_large() {
            descriptor.u64(len_bytes).u64(len_bytes);
        } else {
            descriptor.u32(low(len_bytes)).u32(low(len_bytes));
        }
        self.write(&descriptor.bytes)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Writes an entry from memory.
    pub(crate) fn bytes(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.entry(name, bytes.len() as u64, |out| out.write_all(bytes))
    }

    /// Writes the directory; returns the length of the whole file.
    pub(crate) fn finish(mut self) -> io::Result<(W, u64)> {
        let directory_begins = self.written;
        for entry in std::mem::take(&mut self.entries) {
            self.directory_entry(&entry)?;
            self.entries.push(entry);
        }
        let directory_len = self.written - directory_begins;
        let count = self.entries.len() as u64;
        let end_begins = self.written;
        let is_large = directory_begins >= u64::from(ELSEWHERE) || count >= u64::from(u16::MAX);
        if is_large {
            let mut end = Record::new(b"PK\x06\x06");
            end.u64(44).u16(45).u16(45).u32(0).u32(0);
            end.u64(count)
                .u64(count)
                .u64(directory_len)
                .u64(directory_begins);
            let mut locator = Record::new(b"PK\x06\x07");
            locator.u32(0).u64(end_begins).u32(1);
            self.write(&end.bytes)?;
            self.write(&locator.bytes)?;
        }
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        let mut end = Record::new(b"PK\x05\x06");
        end.u16(0).u16(0).u16(count).u16(count);
        end.u32(low(directory_len))
            .u32(low(directory_begins))
            .u16(0);
        self.write(&end.bytes)?;
        self.out.flush()?;
        Ok((self.out, self.written))
    }

    fn local_header(&mut self, entry: &Entry) -> io::Result<()> {
        let mut extra = Record::default();
        if entry.is_large() {
            extra
                .u16(1)
                .u16(16)
                .u64(entry.len_bytes)
                .u64(entry.len_bytes);
        }
        let unpadded = self.written + 30 + entry.name.len() as u64 + extra.bytes.len() as u64 + 4;
        let padding = usize::try_from(unpadded.next_multiple_of(ALIGNMENT) - unpadded)
            .map_err(io::Error::other)?;
        extra.bytes.extend_from_slice(b"FB");
        extra.u16(u16::try_from(padding).map_err(io::Error::other)?);
        extra.bytes.resize(extra.bytes.len() + padding, b'Z');

        let announced = if entry.is_large() { ELSEWHERE } else { 0 };
        let mut header = Record::new(b"PK\x03\x04");
        header
            .u16(if entry.is_large() { 45 } else { 0 })
            .u16(FLAGS)
            .u16(0);
        header.u32(0).u32(0).u32(announced).u32(announced);
        header
            .u16(short(entry.name.len())?)
            .u16(short(extra.bytes.len())?);
        header.bytes.extend_from_slice(entry.name.as_bytes());
        header.bytes.extend_from_slice(&extra.bytes);
        self.write(&header.bytes)
    }

    fn directory_entry(&mut self, entry: &Entry) -> io::Result<()> {
        let mut large = Record::default();
        if entry.is_large() {
            large.u64(entry.len_bytes).u64(entry.len_bytes);
        }
        if entry.begins >= u64::from(ELSEWHERE) {
            large.u64(entry.begins);
        }
        let mut extra = Record::default();
        if !large.bytes.is_empty() {
            extra.u16(1).u16(short(large.bytes.len())?);
            extra.bytes.extend_from_slice(&large.bytes);
        }
        let version = if extra.bytes.is_empty() { 0 } else { 45 };
        let mut header = Record::new(b"PK\x01\x02");
        header.u16(version).u16(version).u16(FLAGS).u16(0).u32(0);
        header
            .u32(entry.crc)
            .u32(low(entry.len_bytes))
            .u32(low(entry.len_bytes));
        header
            .u16(short(entry.name.len())?)
            .u16(short(extra.bytes.len())?);
        header.u16(0).u16(0).u16(0).u32(0).u32(low(entry.begins));
        header.bytes.extend_from_slice(entry.name.as_bytes());
        header.bytes.extend_from_slice(&extra.bytes);
        self.write(&header.bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// The lower 32 bits where they suffice, the sign to look elsewhere where not.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(ELSEWHERE)
}

fn short(len: usize) -> io::Result<u16> {
    u16::try_from(len).map_err(io::Error::other)
}

/// The data of one entry on their way out.
struct Data<'out, W: Write> {
    out: &'out mut W,
    crc: crc32fast::Hasher,
    len_bytes: u64,
}

impl<W: Write> Write for Data<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write_all(bytes)?;
        self.crc.update(bytes);
        self.len_bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A record of little-endian fields.
#[derive(Default)]
struct Record {
    bytes: Vec<u8>,
}

impl Record {
    fn new(signature: &[u8; 4]) -> Self {
        Self {
            bytes: signature.to_vec(),
        }
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Read};

    use super::*;

    #[test]
    fn entries_are_read_back_stored_and_aligned() {
        let mut container = Container::new(Vec::new(), "last");
        container.bytes("data.pkl", b"\x80\x02N.").unwrap();
        container.bytes("byteorder", b"little").unwrap();
        container.bytes("data/0", &[7; 1000]).unwrap();
        container.bytes("data/1", b"").unwrap();
        let (bytes, len_bytes) = container.finish().unwrap();
        assert_eq!(bytes.len() as u64, len_bytes);

        let mut archive = zip::ZipArchive::new(Cursor::new(&bytes)).unwrap();
        assert_eq!(archive.len(), 4);
        for (place, (name, expected)) in [
            ("last/data.pkl", &b"\x80\x02N."[..]),
            ("last/byteorder", b"little"),
            ("last/data/0", &[7; 1000]),
            ("last/data/1", b""),
        ]
        .into_iter()
        .enumerate()
        {
            let mut entry = archive.by_index(place).unwrap();
            assert_eq!(entry.name().unwrap(), name);
            assert_eq!(entry.compression(), zip::CompressionMethod::Stored);
            assert_eq!(entry.data_start().unwrap() % ALIGNMENT, 0, "{name}");
            let mut found = Vec::new();
            entry.read_to_end(&mut found).unwrap();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn entry_of_another_length_than_announced_is_an_error() {
        let mut container = Container::new(io::sink(), "last");
        let error = container
            .entry("data/0", 3, |out| out.write_all(b"four"))
            .unwrap_err();
        assert!(
            error.to_string().contains("4 bytes written, 3 announced"),
            "{error}"
        );
    }

    /// Keeps the last of what passes, and counts the rest: a file past 4 GiB without the disk for it.
    struct Tail {
        kept: Vec<u8>,
        dropped: u64,
    }

    impl Write for Tail {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.kept.extend_from_slice(bytes);
            if self.kept.len() > 1 << 22 {
                let surplus = self.kept.len() - (1 << 12);
                self.kept.drain(..surplus);
                self.dropped += surplus as u64;
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn file_past_four_gibibytes_gets_zip64_records() {
        const LARGE: u64 = (1 << 32) + (1 << 20);
        let mut container = Container::new(
            Tail {
                kept: Vec::new(),
                dropped: 0,
            },
            "last",
        );
        let zeros = vec![0; 1 << 20];
        container
            .entry("data/0", LARGE, |out| {
                (0..LARGE / zeros.len() as u64).try_for_each(|_| out.write_all(&zeros))
            })
            .unwrap();
        container.bytes("data/1", b"after").unwrap();
        let (tail, len_bytes) = container.finish().unwrap();
        assert_eq!(tail.dropped + tail.kept.len() as u64, len_bytes);
        let bytes = &tail.kept;
        let u64_at = |place: usize| u64::from_le_bytes(bytes[place..place + 8].try_into().unwrap());

        // End record, locator, ZIP64 end record, from behind.
        let locator = bytes.len() - 22 - 20;
        assert_eq!(bytes[locator..locator + 4], *b"PK\x06\x07");
        let end = usize::try_from(u64_at(locator + 8) - tail.dropped).unwrap();
        assert_eq!(bytes[end..end + 4], *b"PK\x06\x06");
        assert_eq!(u64_at(end + 32), 2);
        let directory = usize::try_from(u64_at(end + 48) - tail.dropped).unwrap();
        assert_eq!(bytes[directory..directory + 4], *b"PK\x01\x02");
        let extra = directory + 46 + "last/data/0".len();
        assert_eq!(bytes[extra..extra + 4], [1, 0, 16, 0]);
        assert_eq!((u64_at(extra + 4), u64_at(extra + 12)), (LARGE, LARGE));
        // The second entry is small and begins past 4 GiB.
        let second = extra + 20 + 46 + "last/data/1".len();
        assert_eq!(bytes[second..second + 4], [1, 0, 8, 0]);
        assert!(u64_at(second + 4) > LARGE);
    }
}
