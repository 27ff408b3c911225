//! The whole path on a simulated run: files to betas.
