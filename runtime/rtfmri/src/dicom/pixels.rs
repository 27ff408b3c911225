//! How pixels are stored, and stored pixels as numbers.

use super::DicomError;
use super::header::{Item, Tag, tags};

/// Far above any mosaic, far below any danger: 2048 x 2048 pixels.
pub(super) const MAX_PIXELS: usize = 4 << 20;

/// The layout of a frame: 16-bit grey values, checked against the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Rows of a frame.
    pub(super) rows: usize,
    /// Columns of a frame.
    pub(super) columns: usize,
    signed: bool,
}

impl Layout {
    /// - `item`: the data set's top.
    ///
    /// # Errors
    /// [`DicomError`] where the file states anything but grey values of 16 bits.
    pub(super) fn of(item: &Item<'_>) -> Result<Layout, DicomError> {
        let exact = |tag: Tag, expected: u32, said: &'static str| {
            let found = item
                .whole(tag)
                .ok_or(DicomError::Missing { element: tag.name })?;
            if found == expected {
                return Ok(());
            }
            Err(DicomError::Range {
                element: tag.name,
                found: f64::from(found),
                expected: said,
            })
        };
        exact(tags::SAMPLES, 1, "1")?;
        exact(tags::BITS_ALLOCATED, 16, "16")?;
        // Values that begin above the lowest bit would be wrong by a factor.
        if let (Some(stored), Some(high)) =
            (item.whole(tags::BITS_STORED), item.whole(tags::HIGH_BIT))
            && (!(1..=16).contains(&stored) || high + 1 != stored)
        {
            return Err(DicomError::Range {
                element: tags::HIGH_BIT.name,
                found: f64::from(high),
                expected: "one below BitsStored, which is at most 16",
            });
        }
        let signed = match item.whole(tags::SIGN) {
            Some(0) => false,
            Some(1) => true,
            _ => {
                return Err(DicomError::Value {
                    element: tags::SIGN.name,
                    what: "neither 0 nor 1",
                });
            }
        };
        let side = |tag: Tag| {
            let side = item
                .whole(tag)
                .ok_or(DicomError::Missing { element: tag.name })?;
            usize::try_from(side)
                .ok()
                .filter(|side| (1..=65_535).contains(side))
                .ok_or(DicomError::Range {
                    element: tag.name,
                    found: f64::from(side),
                    expected: "1 to 65535",
                })
        };
        let (rows, columns) = (side(tags::ROWS)?, side(tags::COLUMNS)?);
        if rows * columns > MAX_PIXELS {
            return Err(DicomError::Value {
                element: "(0028,0010) Rows",
                what: "more than any functional image has, with these columns",
            });
        }
        Ok(Layout {
            rows,
            columns,
            signed,
        })
    }

    /// The pixel data, of exactly so many frames.
    ///
    /// # Errors
    /// [`DicomError::PixelBytes`] where there are more or fewer.
    pub(super) fn data<'d>(&self, item: &Item<'d>, frames: usize) -> Result<&'d [u8], DicomError> {
        let bytes = item.bytes(tags::PIXEL_DATA).ok_or(DicomError::Missing {
            element: tags::PIXEL_DATA.name,
        })?;
        let expected = (self.rows * self.columns * 2).saturating_mul(frames);
        if bytes.len() != expected {
            return Err(DicomError::PixelBytes {
                frames,
                rows: self.rows,
                columns: self.columns,
                expected,
                found: bytes.len(),
            });
        }
        Ok(bytes)
    }

    /// The numbers that stored pixels stand for; exact, 16 bits fit a float.
    pub(super) fn values<'p>(&self, stored: &'p [u8]) -> impl Iterator<Item = f32> + use<'p> {
        let signed = self.signed;
        let (pairs, _) = stored.as_chunks::<2>();
        pairs.iter().map(move |pair| {
            if signed {
                f32::from(i16::from_le_bytes(*pair))
            } else {
                f32::from(u16::from_le_bytes(*pair))
            }
        })
    }
}
