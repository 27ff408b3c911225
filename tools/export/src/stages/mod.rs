//! One file per network: from a checkpoint's keys to a graph.
//!
//! Every dimension that weights can tell is read from the weights; what they cannot tell is an
//! argument. Sources: MedARC-AI/MindEyeV2 (`src/models.py`), Stability-AI generative-models
//! (`sgm/modules/diffusionmodules`), lucidrains/DALLE2-pytorch, huggingface/diffusers 0.23.

pub mod autoencoder;
pub mod backbone;
pub mod blocks;
pub mod bridge;
pub mod captioner;
pub mod preview;
pub mod prior;
pub mod subject;
pub mod text;
pub mod unet;
pub mod vision;
