//! DICOM files to volumes.
