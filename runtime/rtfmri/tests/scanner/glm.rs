//! Betas, z-scores and designs against nilearn.
