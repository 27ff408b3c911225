//! Real-time fMRI: bytes and arrays in, arrays out.
//!
//! A scanner's DICOM file becomes a [`Volume`] or a [`Slice`] ([`dicom::decode`]), slices become
//! volumes ([`assembly`]), a [`Mask`] picks
//! its voxels by world position, wherever the head has moved ([`motion`]), and the
//! single-trial model ([`glm`]) turns a run of
//! masked volumes into one beta per voxel, z-scored over trials ([`zscore`]).
//! There is no file, no clock and no thread in this crate.

pub mod assembly;
pub mod confounds;
pub mod dicom;
pub mod enhanced;
pub mod events;
pub mod glm;
pub mod interpolation;
pub mod mask;
pub mod mosaic;
pub mod motion;
pub mod nifti;
pub mod quality;
pub mod registration;
pub mod resample;
pub mod slices;
mod spline;
pub mod timing;
pub mod volume;
pub mod zscore;

pub use mask::{Mask, MaskError};
pub use motion::{MotionError, Realigner, Rigid};
pub use nifti::NiftiError;
pub use resample::ResampleError;
pub use volume::{PatientTag, SeriesUid, Slice, SliceHeader, SliceOrder, Volume, VolumeHeader};
