//! A bundle's own fp16 graph, rewritten so that a CPU computes what an fp16 machine would.

use prost::Message;

use super::{Rounding, widen};
use crate::onnx::ModelProto;

/// Why a graph cannot be rewritten.
#[derive(Debug, thiserror::Error)]
pub enum RewriteError {
    /// Not an ONNX model.
    #[error("is not an ONNX model")]
    Decode(#[from] prost::DecodeError),
    /// More than the exporter writes: rewritten, it would be another graph.
    #[error("holds {lost} bytes that the exporter does not write")]
    Foreign {
        /// Bytes that reading and writing it again would lose.
        lost: usize,
    },
}

/// The graph in fp32 operators, every intermediate that it holds in fp16 rounded to fp16.
///
/// # Errors
/// [`RewriteError`] where the bytes are not a graph of the exporter's.
pub fn emulated(graph: &[u8]) -> Result<Vec<u8>, RewriteError> {
    let mut model = ModelProto::decode(graph)?;
    if model.encode_to_vec() != graph {
        return Err(RewriteError::Foreign {
            lost: graph.len().saturating_sub(model.encoded_len()),
        });
    }
    widen(model.graph.get_or_insert_default(), Rounding::Half);
    Ok(model.encode_to_vec())
}
