//! Why a file is neither a volume nor a slice.

/// Why a file is neither a volume nor a slice; no message repeats a header's text.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DicomError {
    /// The 128-byte preamble and `DICM` are not there.
    #[error("not a DICOM file: no DICM at byte 128")]
    NotDicom,
    /// A compressed, big-endian or unknown encoding.
    #[error("transfer syntax {uid} ({name}) is not supported, expected uncompressed little endian")]
    TransferSyntax {
        /// The transfer syntax's UID; digits and dots only.
        uid: String,
        /// Its name.
        name: &'static str,
    },
    /// A kind of image that this reader does not take.
    #[error("{name} is not supported, expected a volume or a slice of a functional run")]
    Unsupported {
        /// What the file is.
        name: &'static str,
    },
    /// The file ends within an element's header.
    #[error("file ends within the element at byte {offset}")]
    Truncated {
        /// Byte offset of the element.
        offset: usize,
    },
    /// An element claims more bytes than there are.
    #[error(
        "element ({group:04x},{element:04x}) at byte {offset} claims {len} bytes, {left} are left"
    )]
    Length {
        /// The tag's group.
        group: u16,
        /// The tag's element.
        element: u16,
        /// Byte offset of the element.
        offset: usize,
        /// The claimed length.
        len: u32,
        /// What the file has left.
        left: usize,
    },
    /// The data set's order or nesting is broken.
    #[error("{what} at byte {offset}")]
    Structure {
        /// Byte offset.
        offset: usize,
        /// What stands there.
        what: &'static str,
    },
    /// Frames of one file do not belong together.
    #[error("{element} of frame {frame} {what}")]
    Frame {
        /// Tag and keyword.
        element: &'static str,
        /// The frame, from 1.
        frame: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An element that a volume needs is absent or unreadable.
    #[error("{element} is missing or unreadable")]
    Missing {
        /// Tag and keyword.
        element: &'static str,
    },
    /// An element holds a value that no volume can have.
    #[error("{element} is {what}")]
    Value {
        /// Tag and keyword.
        element: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A number is out of range.
    #[error("{element} is {found}, expected {expected}")]
    Range {
        /// Tag and keyword.
        element: &'static str,
        /// The number found.
        found: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// Pixel data and the stated size disagree.
    #[error(
        "pixel data holds {found} bytes, {frames} frames of {rows} rows and {columns} columns need {expected}"
    )]
    PixelBytes {
        /// Frames of the file.
        frames: usize,
        /// Rows of a frame.
        rows: usize,
        /// Columns of a frame.
        columns: usize,
        /// Bytes needed.
        expected: usize,
        /// Bytes present.
        found: usize,
    },
    /// The slices do not tile the mosaic.
    #[error("{images} slices do not tile a mosaic of {rows} rows and {columns} columns")]
    Tiles {
        /// Slices stated.
        images: u32,
        /// Rows of the mosaic.
        rows: usize,
        /// Columns of the mosaic.
        columns: usize,
    },
    /// The private header is broken.
    #[error("Siemens CSA header (0029,1010): {what} at its byte {offset}")]
    Csa {
        /// Byte offset within the header.
        offset: usize,
        /// What is wrong.
        what: &'static str,
    },
}
