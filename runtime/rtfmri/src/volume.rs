//! One 3-D image of a run or one slice of it, and the little of its header that is needed.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use ndarray::{Array2, Array3};

/// A voxel index to world matrix, `[4][4]`, row-major, millimetres.
pub type Affine = [[f64; 4]; 4];

/// Identifies a series; compares and hashes, and never shows itself.
///
/// A series UID leads back to a patient through the hospital's archive, so `Debug`
/// prints a short tag that only tells two series apart within one process's log.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SeriesUid(String);

impl SeriesUid {
    /// Takes the UID's text as it stands in a header.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The UID's text, for a writer of DICOM files.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SeriesUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        write!(f, "SeriesUid(#{:04x})", hasher.finish() & 0xffff)
    }
}

/// Tells one patient's volumes from another's; compares, and never shows itself.
///
/// A run's volumes all have the same tag. It is made from the header's patient
/// module, of which nothing else is kept; a file that names nobody has the default tag.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct PatientTag(Option<u64>);

impl PatientTag {
    /// - `parts`: what the header says of the patient, in a fixed order.
    pub(crate) fn of(parts: &[Option<String>]) -> Self {
        if parts.iter().flatten().all(String::is_empty) {
            return Self(None);
        }
        let mut hasher = DefaultHasher::new();
        parts.hash(&mut hasher);
        Self(Some(hasher.finish()))
    }

    /// The tag that another process computed and sent as a number.
    pub fn from_number(number: u64) -> Self {
        Self(Some(number))
    }
}

impl fmt::Debug for PatientTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PatientTag")
    }
}

/// What is kept of a volume's header; nothing of it names the patient.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeHeader {
    /// The series this volume belongs to.
    pub series_uid: SeriesUid,
    /// Whose it is; differs where another patient's file has the same series.
    pub patient: PatientTag,
    /// The volume's number in the run, from 1.
    pub acquisition: u32,
    /// The instance number within the series, where the header has one.
    pub instance: Option<u32>,
    /// Repetition time, milliseconds.
    pub tr_ms: f64,
    /// Each slice's time from the start of the volume, `[slice]`, milliseconds;
    /// `None` where the header stores none.
    pub slice_times_ms: Option<Vec<f64>>,
    /// When its acquisition began by the scanner's clock, milliseconds since midnight; `None` where
    /// the header does not say.
    pub time_ms: Option<f64>,
}

/// What is kept of a slice's header; nothing of it names the patient.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceHeader {
    /// The series this slice belongs to.
    pub series_uid: SeriesUid,
    /// Whose it is.
    pub patient: PatientTag,
    /// The number of its volume in the run, from 1.
    pub number: u32,
    /// Slices of a volume, where the header says so.
    pub slices: Option<u32>,
    /// The instance number within the series, where the header has one.
    pub instance: Option<u32>,
    /// Repetition time, milliseconds.
    pub tr_ms: f64,
    /// When it was acquired by the scanner's clock, milliseconds since midnight.
    pub time_ms: Option<f64>,
    /// When it was acquired, milliseconds from a moment that is the same for the whole run.
    pub taken_ms: Option<f64>,
    /// Its place among the volume's slices as the scanner counts them, from 0.
    pub rank: Option<u32>,
    /// In which order slices are acquired, where only the protocol says so.
    pub order: Option<SliceOrder>,
}

/// The order in which a volume's slices are acquired, evenly over the TR.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SliceOrder {
    /// The first, third, fifth slice and so on before the others; else one after the other.
    pub interleaved: bool,
    /// The part of the TR at its end in which nothing is acquired, milliseconds.
    pub delay_ms: f64,
}

/// One slice of a volume.
#[derive(Clone, PartialEq)]
pub struct Slice {
    /// `[row, column]`, scanner units.
    pub pixels: Array2<f32>,
    /// Where its first pixel lies, LPS, millimetres.
    pub position_lps: [f64; 3],
    /// The direction in which columns follow each other, LPS, unit length.
    pub columns_lps: [f64; 3],
    /// The direction in which rows follow each other, LPS, unit length.
    pub rows_lps: [f64; 3],
    /// Distances between rows and between columns, millimetres.
    pub pixel_mm: [f64; 2],
    /// Distance to the next slice as the header states it, millimetres.
    pub spacing_mm: Option<f64>,
    /// Where the slice belongs.
    pub header: SliceHeader,
}

impl fmt::Debug for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slice")
            .field("shape", &self.pixels.shape())
            .field("position_lps", &self.position_lps)
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

/// One 3-D image, one per TR.
#[derive(Clone, PartialEq)]
pub struct Volume {
    /// `[slice, row, column]`, scanner units.
    pub voxels: Array3<f32>,
    /// `(column, row, slice)` indices to patient LPS, millimetres.
    pub affine_lps: Affine,
    /// Where the volume belongs.
    pub header: VolumeHeader,
}

impl Volume {
    /// The LPS position of a voxel, millimetres.
    ///
    /// - `index`: `[column, row, slice]`, in voxels; may lie between voxels.
    pub fn position_lps(&self, index: [f64; 3]) -> [f64; 3] {
        apply(&self.affine_lps, index)
    }
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume")
            .field("shape", &self.voxels.shape())
            .field("affine_lps", &self.affine_lps)
            .field("header", &self.header)
            .finish()
    }
}

/// The scalar product.
pub(crate) fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// The world position, millimetres, of an index under an affine.
pub(crate) fn apply(affine: &Affine, index: [f64; 3]) -> [f64; 3] {
    let mut out = [0.0; 3];
    for (value, row) in out.iter_mut().zip(affine) {
        *value = row[0] * index[0] + row[1] * index[1] + row[2] * index[2] + row[3];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_of_a_series_uid_hides_its_text() {
        let uid = SeriesUid::new("1.2.840.ZZ");
        assert!(!format!("{uid:?}").contains("1.2"));
        assert_eq!(uid, SeriesUid::new("1.2.840.ZZ"));
    }
}
