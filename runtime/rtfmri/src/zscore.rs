//! To follow: zscore.
