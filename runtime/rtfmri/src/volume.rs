//! One 3-D image of a run, and the little of its header that the pipeline needs.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use ndarray::Array3;

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
