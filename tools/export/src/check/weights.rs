//! A bundle's weights, read back under the names and in the order of the checkpoint.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use bundle::{Bundle, StageName};
use half::f16;
use prost::Message;

use crate::onnx::{GraphProto, ModelProto, TensorProto, element};

/// Largest graph that is read; weights are outside of it.
const MAX_GRAPH_BYTES: u64 = 1 << 28;

/// Why a bundle's weights cannot be read back.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file of the bundle cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A graph is not ONNX.
    #[error("{path} is not an ONNX graph")]
    Graph {
        /// The file.
        path: PathBuf,
        /// Where it breaks.
        source: prost::DecodeError,
    },
    /// A weight does not say where it lies.
    #[error("{weight}: expected a place in the stage's weights, found {found}")]
    Place {
        /// The weight.
        weight: String,
        /// What is there.
        found: String,
    },
}

/// The weights of one stage by their checkpoint's key.
#[derive(Debug)]
pub(super) struct StageWeights {
    path: PathBuf,
    by_key: BTreeMap<String, (TensorProto, bool)>,
}

impl StageWeights {
    /// Reads a stage's graph; `None` where the bundle has no such stage or it has no weights.
    pub(super) fn open(
        bundle: &Bundle,
        stage: StageName,
    ) -> Result<Option<StageWeights>, WeightsError> {
        let Some(spec) = bundle.manifest().stages.get(&stage) else {
            return Ok(None);
        };
        let weights = spec.weights.as_ref().and_then(|path| bundle.file(path));
        let (Some(graph), Some(path)) = (bundle.file(&spec.graph), weights) else {
            return Ok(None);
        };
        let error = |source| WeightsError::Read {
            path: graph.clone(),
            source,
        };
        let len = std::fs::metadata(&graph).map_err(error)?.len();
        if len > MAX_GRAPH_BYTES {
            return Err(error(std::io::Error::other(format!(
                "{len} bytes, expected at most {MAX_GRAPH_BYTES}"
            ))));
        }
        let bytes = std::fs::read(&graph).map_err(error)?;
        let model = ModelProto::decode(bytes.as_slice()).map_err(|source| WeightsError::Graph {
            path: graph.clone(),
            source,
        })?;
        let graph = model.graph.unwrap_or_default();
        let external = graph
            .initializer
            .iter()
            .filter(|tensor| tensor.data_location == Some(1));
        let by_key = external
            .filter_map(|tensor| {
                // Names are `key[axes]:type`.
                let (key, _) = tensor.name.rsplit_once('[')?;
                Some((
                    key.to_owned(),
                    (tensor.clone(), is_turned(&graph, key, &tensor.name)),
                ))
            })
            .collect();
        Ok(Some(StageWeights { path, by_key }))
    }

    /// A weight's numbers, row-major in the checkpoint's order; `None` where the stage has none of
    /// this key, or holds it in another type than floating point.
    pub(super) fn read(&self, key: &str) -> Result<Option<Vec<f32>>, WeightsError> {
        let Some((tensor, turned)) = self.by_key.get(key) else {
            return Ok(None);
        };
        let size = match tensor.data_type {
            element::FLOAT => 4,
            element::FLOAT16 => 2,
            _ => return Ok(None),
        };
        let place = |name: &str| -> Result<u64, WeightsError> {
            let entry = tensor.external_data.iter().find(|entry| entry.key == name);
            let text = entry.map_or("nothing", |entry| entry.value.as_str());
            text.parse().map_err(|_| WeightsError::Place {
                weight: tensor.name.clone(),
                found: format!("{name} {text}"),
            })
        };
        let (offset, len) = (place("offset")?, place("length")?);
        let error = |source| WeightsError::Read {
            path: self.path.clone(),
            source,
        };
        let file = File::open(&self.path).map_err(error)?;
        let held = file.metadata().map_err(error)?.len();
        let elements: i64 = tensor.dims.iter().product();
        if offset.checked_add(len).is_none_or(|end| end > held)
            || u64::try_from(elements).ok().map(|count| count * size) != Some(len)
        {
            return Err(WeightsError::Place {
                weight: tensor.name.clone(),
                found: format!("{len} bytes at {offset} for axes {:?}", tensor.dims),
            });
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, offset).map_err(error)?;
        let values: Vec<f32> = if size == 4 {
            let (chunks, _) = bytes.as_chunks::<4>();
            chunks
                .iter()
                .map(|&chunk| f32::from_le_bytes(chunk))
                .collect()
        } else {
            let (chunks, _) = bytes.as_chunks::<2>();
            chunks
                .iter()
                .map(|&chunk| f16::from_le_bytes(chunk).to_f32())
                .collect()
        };
        let rows = tensor
            .dims
            .first()
            .and_then(|&rows| usize::try_from(rows).ok());
        Ok(Some(match rows {
            Some(rows) if *turned => as_stored(&values, rows),
            _ => values,
        }))
    }
}

/// Whether a weight lies with its axes exchanged: MatMul takes `[in, out]`, and checkpoints hold
/// `[out, in]` but for OpenCLIP's projections, which are no layer's `weight`.
fn is_turned(graph: &GraphProto, key: &str, name: &str) -> bool {
    let multiplied = graph.node.iter().any(|node| {
        node.op_type == "MatMul" && node.input.get(1).is_some_and(|input| input == name)
    });
    multiplied && key.ends_with("weight")
}

/// A matrix of `rows` rows, column after column.
fn as_stored(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| values[row * columns + column]))
        .collect()
}
