//! The single-trial general linear model.
