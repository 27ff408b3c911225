//! The exporter: trained checkpoints in, a signed bundle out.
//!
//! [`plan`] says what to export, [`checkpoint`] reads the original containers lazily and without
//! executing anything, [`stages`] describe each network as an ONNX graph, [`export`] writes the
//! bundle, [`check`] replays recorded reference vectors through it, [`pool`] embeds pictures for retrieval with it.

pub mod audit;
pub mod check;
pub mod checkpoint;
mod describe;
pub mod export;
pub mod graph;
pub mod layers;
pub mod lora;
pub mod onnx;
pub mod plan;
pub mod pool;
pub mod section;
pub mod stages;
pub mod vocabulary;
pub mod weights;
