//! From z-scored betas to a picture, on ONNX Runtime.
//!
//! ```text
//! zbetas [repetition, voxel]
//!   ridge, backbone, mean over repetitions
//!     → brain tokens [token, dim], retrieval embedding, blurry latent → blurry picture
//!   diffusion prior (DDIM)          → CLIP image tokens [token, dim]
//!   unCLIP (Euler EDM | few steps)  → latent [channel, height, width]
//!   VAE decoder                     → picture
//!   bridge, captioner               → caption
//!   refiner, prompted by it; blend  → final picture
//! ```
//!
//! [`Decoder`] is the whole way; [`sampler`] holds one sampler per file, each a plain function
//! over a network call, so that recorded noise and recorded networks can be put in its place.
//! The method is MindEye2's (Scotti et al. 2024, arXiv:2403.11207).

pub mod caption;
pub mod conditioning;
mod decode;
mod narrator;
mod networks;
mod noise;
mod painter;
mod picture;
mod refiner;
pub mod resize;
pub mod retrieval;
pub mod runtime;
pub mod sampler;
mod stage;
pub mod text;
pub mod vision;

pub use decode::{
    DecodeError, Decoder, Fidelity, LoadOptions, Progress, Reconstruction, SwitchedOff, Timings,
};
pub use noise::{Draw, KeyedNoise, Noise, NoiseKey, Stream, Tier};
pub use picture::{Picture, PictureError, Range};
pub use runtime::{Runtime, RuntimeError};
pub use sampler::SamplerError;
pub use stage::{Stage, StageError};
