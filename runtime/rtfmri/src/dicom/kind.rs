//! What kind of image a file holds, by its own words.

use super::DicomError;
use super::header::{Item, tags};

const MR_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.4";
const ENHANCED_MR_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.4.1";

/// Who built the scanner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vendor {
    Siemens,
    Philips,
    Ge,
    Other,
    /// The file does not say.
    Unnamed,
}

impl Vendor {
    /// - `name`: as the header gives it.
    pub(super) fn of(name: &str) -> Vendor {
        let name = name.to_ascii_uppercase();
        match name.as_str() {
            "" => Vendor::Unnamed,
            name if name.contains("SIEMENS") => Vendor::Siemens,
            name if name.contains("PHILIPS") => Vendor::Philips,
            name if name == "GE" || name.starts_with("GE ") => Vendor::Ge,
            _ => Vendor::Other,
        }
    }
}

/// How a file is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// One picture: a slice, or a mosaic.
    Classic,
    /// Frames with functional groups.
    Enhanced,
}

impl Layout {
    /// # Errors
    /// [`DicomError::Unsupported`] for what is no MR image.
    pub(super) fn of(sop_class: &str) -> Result<Layout, DicomError> {
        match sop_class {
            MR_IMAGE => Ok(Layout::Classic),
            ENHANCED_MR_IMAGE => Ok(Layout::Enhanced),
            _ => refuse("a file that is not an MR image"),
        }
    }
}

/// Refuses a file by the name of its kind.
pub(super) fn refuse<T>(name: &'static str) -> Result<T, DicomError> {
    Err(DicomError::Unsupported { name })
}

/// Refuses phase images, maps and the like, which a functional run does not hold.
///
/// - `image_type`: the words of ImageType or FrameType.
///
/// # Errors
/// [`DicomError::Unsupported`], naming the kind.
pub(super) fn refuse_other_contrasts<'t>(
    image_type: impl Iterator<Item = &'t str>,
) -> Result<(), DicomError> {
    for (place, word) in image_type.enumerate() {
        let word = word.to_ascii_uppercase();
        match (place, word.as_str()) {
            (1, "SECONDARY") => return refuse("an image derived from others"),
            (2.., "P" | "PHASE" | "PHASE MAP" | "PHASE_MAP") => return refuse("a phase image"),
            (2.., "R" | "REAL" | "I" | "IMAGINARY") => {
                return refuse("a real or imaginary part of an image");
            }
            (2.., "B0" | "B0 MAP" | "B0_MAP" | "FIELD_MAP" | "FIELD MAP") => {
                return refuse("a field map");
            }
            (2.., "DIFFUSION" | "ADC" | "FA" | "TRACEW" | "TENSOR") => {
                return refuse("a diffusion image");
            }
            (2.., "LOCALIZER" | "PROJECTION IMAGE") => return refuse("a localiser"),
            (2.., word) if word.ends_with(" MAP") || word.ends_with("_MAP") => {
                return refuse("a map computed from images");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Refuses what is not a run's first echo: it has the first one's number, and other values.
///
/// # Errors
/// [`DicomError::Unsupported`], naming the kind.
pub(super) fn refuse_later_echo(top: &Item<'_>) -> Result<(), DicomError> {
    match top.whole(tags::ECHO_NUMBER) {
        Some(echo) if echo > 1 => refuse("an image of a later echo"),
        _ => Ok(()),
    }
}
