//! A scanner's DICOM file to a [`Volume`] or a [`Slice`]: uncompressed little endian.
//!
//! Steps: every length is checked against the bytes present and the elements are indexed
//! (`scan`); what the file says it is decides who reads it (`kind`): Siemens mosaics (`mosaic`,
//! with the private header in `csa`), Siemens XA's enhanced multi-frame files (`enhanced`), GE's
//! and Philips' files of one slice (`slice`). Other kinds of files are refused by name.
//! No message and no `Debug` here repeats a header's text.

pub(crate) mod csa;
mod enhanced;
mod error;
mod ge;
pub(crate) mod geometry;
mod header;
mod kind;
mod mosaic;
mod pixels;
mod scan;
mod slice;
pub(crate) mod stack;
pub(crate) mod write;

pub use error::DicomError;

use self::header::tags;
use self::kind::{Layout, Vendor, refuse};
use crate::volume::{Slice, Volume};

/// Slices of one volume, far more than any has.
const MAX_SLICE_STEPS: usize = 1024;

/// What a file holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Image {
    /// A whole volume.
    Volume(Volume),
    /// One slice of one, to be put together with others ([`crate::assembly`]).
    Slice(Slice),
}

/// Decodes one file.
///
/// # Errors
/// Whatever is neither a complete, uncompressed volume nor such a slice, by name.
pub fn decode(bytes: &[u8]) -> Result<Image, DicomError> {
    let data = scan::read(bytes)?;
    let top = data.top();
    let layout = Layout::of(top.text(tags::SOP_CLASS).unwrap_or_default())?;
    let vendor = Vendor::of(top.text(tags::MANUFACTURER).unwrap_or_default());
    if layout == Layout::Enhanced {
        return enhanced::decode(&top, vendor).map(Image::Volume);
    }
    match vendor {
        Vendor::Ge => slice::decode_ge(&top).map(Image::Slice),
        Vendor::Philips => slice::decode_philips(&top).map(Image::Slice),
        Vendor::Siemens | Vendor::Other | Vendor::Unnamed => {
            if top.words(tags::IMAGE_TYPE).any(|word| word == "MOSAIC") {
                return mosaic::decode(&top).map(Image::Volume);
            }
            refuse("an MR image whose ImageType holds no MOSAIC")
        }
    }
}

/// Decodes a file that holds a whole volume.
///
/// # Errors
/// As [`decode`]; a slice is refused by name.
pub fn decode_volume(bytes: &[u8]) -> Result<Volume, DicomError> {
    match decode(bytes)? {
        Image::Volume(volume) => Ok(volume),
        Image::Slice(_) => refuse("a file of one slice"),
    }
}

/// Tiles along each side of the square mosaic that holds so many slices.
pub(crate) fn grid_side(slices: usize) -> usize {
    let root = slices.isqrt();
    root + usize::from(root * root < slices)
}

/// A count as a float; counts here are far below 2^32.
pub(crate) fn as_f64(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "voxels are single precision; values of 16 bits fit exactly"
)]
fn single(value: f64) -> f32 {
    value as f32
}
