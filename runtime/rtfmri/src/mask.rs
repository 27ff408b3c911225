//! To follow: mask.
