//! Siemens' private image header (0029,1010), "CSA": a list of named text values.
//!
//! Both forms are read: CSA2 begins with `SV10`, CSA1 does not. The layout follows the
//! description in nibabel's documentation ("Siemens format DICOM with CSA header").
//! Only the few tags a mosaic needs are kept; every count is bounded.

use super::DicomError;

const MAX_TAGS: u32 = 1024;
const MAX_ITEMS: u32 = 4096;
const MAX_TEXT: usize = 64;

/// The values of one image header that a mosaic needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Csa {
    /// `NumberOfImagesInMosaic`.
    pub(super) images: Option<u32>,
    /// `SliceNormalVector`, LPS.
    pub(super) normal: Option<[f64; 3]>,
    /// `MosaicRefAcqTimes`, `[slice]`, milliseconds; empty where absent.
    pub(super) slice_times_ms: Vec<f64>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], DicomError> {
        let end = self.offset.checked_add(len);
        let slice = end.and_then(|end| self.bytes.get(self.offset..end));
        let slice = slice.ok_or(DicomError::Csa {
            offset: self.offset,
            what: "cut short",
        })?;
        self.offset += len;
        Ok(slice)
    }

    fn u32(&mut self) -> Result<u32, DicomError> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn count(&mut self, max: u32, what: &'static str) -> Result<u32, DicomError> {
        let offset = self.offset;
        let count = self.u32()?;
        if count > max {
            return Err(DicomError::Csa { offset, what });
        }
        Ok(count)
    }
}

/// Reads the header's tags.
///
/// # Errors
/// [`DicomError::Csa`] or [`DicomError::Value`] naming what does not fit.
pub(super) fn read(bytes: &[u8]) -> Result<Csa, DicomError> {
    let mut reader = Reader { bytes, offset: 0 };
    let csa2 = bytes.starts_with(b"SV10");
    if csa2 {
        reader.take(8)?;
    }
    let tags = reader.count(MAX_TAGS, "too many tags")?;
    let mark = reader.u32()?;
    if tags == 0 || (mark != 77 && mark != 205) {
        return Err(DicomError::Csa {
            offset: reader.offset - 4,
            what: "not a CSA header",
        });
    }
    let mut csa = Csa::default();
    let mut first_count = None;
    for _ in 0..tags {
        let name = text(reader.take(64)?);
        reader.take(12)?;
        let items = reader.count(MAX_ITEMS, "too many values in a tag")?;
        let first = *first_count.get_or_insert(items);
        reader.take(4)?;
        let wanted = matches!(
            name,
            "NumberOfImagesInMosaic" | "SliceNormalVector" | "MosaicRefAcqTimes"
        );
        let mut values = Vec::new();
        for _ in 0..items {
            let words = [reader.u32()?, reader.u32()?];
            reader.take(8)?;
            let len = if csa2 {
                words[1]
            } else {
                words[0].saturating_sub(first)
            };
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let value = reader.take(len)?;
            // Values are padded to four bytes; the last may end with the header.
            let padding = (4 - len % 4) % 4;
            reader.take(padding.min(bytes.len() - reader.offset))?;
            let value = text(value);
            if wanted && !value.is_empty() && value.len() <= MAX_TEXT {
                values.push(value);
            }
        }
        match name {
            "NumberOfImagesInMosaic" if !values.is_empty() => {
                csa.images = Some(values[0].parse().map_err(|_| DicomError::Value {
                    element: "CSA NumberOfImagesInMosaic",
                    what: "not a whole number",
                })?);
            }
            "SliceNormalVector" if !values.is_empty() => {
                let normal = numbers(&values, "CSA SliceNormalVector")?;
                let normal = <[f64; 3]>::try_from(normal);
                csa.normal = Some(normal.map_err(|_| DicomError::Value {
                    element: "CSA SliceNormalVector",
                    what: "not three numbers",
                })?);
            }
            "MosaicRefAcqTimes" => {
                csa.slice_times_ms = numbers(&values, "CSA MosaicRefAcqTimes")?;
            }
            _ => {}
        }
    }
    Ok(csa)
}

fn numbers(values: &[&str], element: &'static str) -> Result<Vec<f64>, DicomError> {
    values
        .iter()
        .map(|value| {
            let number = value.parse().ok().filter(|number: &f64| number.is_finite());
            number.ok_or(DicomError::Value {
                element,
                what: "not a number",
            })
        })
        .collect()
}

/// The text before the first zero byte; empty where it is not plain text.
fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|byte| *byte == 0);
    std::str::from_utf8(&bytes[..end.unwrap_or(bytes.len())])
        .unwrap_or_default()
        .trim()
}

/// Writes the smallest CSA2 header that [`read`] takes back.
///
/// - `slice_times_ms`: `[slice]`, milliseconds.
pub(crate) fn write(images: u32, normal: [f64; 3], slice_times_ms: &[f64]) -> Vec<u8> {
    let mut out = b"SV10\x04\x03\x02\x01".to_vec();
    let tags: [(&str, &[u8; 4], Vec<String>); 3] = [
        (
            "NumberOfImagesInMosaic",
            b"US\0\0",
            vec![images.to_string()],
        ),
        (
            "SliceNormalVector",
            b"FD\0\0",
            normal.iter().map(ToString::to_string).collect(),
        ),
        (
            "MosaicRefAcqTimes",
            b"FD\0\0",
            slice_times_ms.iter().map(ToString::to_string).collect(),
        ),
    ];
    let put = |out: &mut Vec<u8>, word: usize| {
        let word = u32::try_from(word).unwrap_or(u32::MAX);
        out.extend_from_slice(&word.to_le_bytes());
    };
    put(&mut out, tags.len());
    put(&mut out, 77);
    for (name, vr, values) in tags {
        let mut field = [0; 64];
        field[..name.len()].copy_from_slice(name.as_bytes());
        out.extend_from_slice(&field);
        put(&mut out, values.len());
        out.extend_from_slice(vr);
        put(&mut out, 0);
        put(&mut out, values.len());
        put(&mut out, 77);
        for value in values {
            let len = value.len() + 1;
            for word in [len, len, 77, len] {
                put(&mut out, word);
            }
            out.extend_from_slice(value.as_bytes());
            out.extend(std::iter::repeat_n(0, 1 + (4 - len % 4) % 4));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_header_reads_back() {
        let csa = read(&write(3, [0.0, -0.25, 1.0], &[0.0, 52.5, 1.25])).unwrap();
        assert_eq!(csa.images, Some(3));
        assert_eq!(csa.normal, Some([0.0, -0.25, 1.0]));
        assert_eq!(csa.slice_times_ms, [0.0, 52.5, 1.25]);
    }

    #[test]
    fn every_cut_of_a_header_is_an_error_and_no_panic() {
        let bytes = write(3, [0.0, 0.0, 1.0], &[1.0, 2.0]);
        for end in 0..bytes.len() - 4 {
            assert!(read(&bytes[..end]).is_err(), "cut at {end}");
        }
    }
}
