//! To follow: mosaic.
