//! To follow: nifti.
