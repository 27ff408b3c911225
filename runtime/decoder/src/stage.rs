//! One network: an ONNX graph of a bundle, opened and called by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bundle::{Bundle, DType, Dim, Stage as StageSpec, TensorSpec};
use ndarray::{ArrayD, ArrayViewD};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::{Outlet, Tensor, TensorElementType, TensorRef, ValueType};

use crate::Runtime;

/// Why a network cannot be opened or called.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The graph's file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// ONNX Runtime refuses the graph.
    #[error("ONNX Runtime cannot load {path}")]
    Load {
        /// The graph.
        path: PathBuf,
        /// Its reason.
        source: ort::Error,
    },
    /// The graph has other inputs or outputs than the manifest says.
    #[error("{path}: the manifest says {expected}, the graph has {found}")]
    Interface {
        /// The graph.
        path: PathBuf,
        /// As in the manifest.
        expected: String,
        /// As in the graph.
        found: String,
    },
    /// A call without one of the inputs, or with one too many.
    #[error("{graph} takes {expected}, it was given {found}")]
    Inputs {
        /// The graph.
        graph: String,
        /// Names it takes.
        expected: String,
        /// Names given.
        found: String,
    },
    /// A call with an input of the wrong shape.
    #[error("{graph}: expected {expected}, was given shape {found:?}")]
    Shape {
        /// The graph.
        graph: String,
        /// As in the manifest.
        expected: String,
        /// As given.
        found: Vec<usize>,
    },
    /// ONNX Runtime failed in the call.
    #[error("{graph} failed")]
    Run {
        /// The graph.
        graph: String,
        /// Its reason.
        source: ort::Error,
    },
    /// A result that is not a number.
    #[error("{graph}: {output} is {value} at flat index {index}")]
    NotFinite {
        /// The graph.
        graph: String,
        /// Name of the output.
        output: String,
        /// Where.
        index: usize,
        /// What.
        value: f32,
    },
}

/// A network, opened. Calls from several threads wait for one another.
pub struct Stage {
    spec: StageSpec,
    session: Mutex<Session>,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stage")
            .field("graph", &self.spec.graph)
            .finish_non_exhaustive()
    }
}

impl Stage {
    /// Opens a graph of a verified bundle and compares its inputs and outputs with the manifest.
    ///
    /// # Errors
    /// [`StageError`] where the graph cannot be loaded or is not the one the manifest describes.
    pub fn open(runtime: &Runtime, bundle: &Bundle, spec: &StageSpec) -> Result<Stage, StageError> {
        let path = bundle.dir().join(&spec.graph);
        let bytes = std::fs::read(&path).map_err(|source| StageError::Read {
            path: path.clone(),
            source,
        })?;
        Stage::of_session(
            path,
            spec,
            open_session(runtime, bundle.dir(), &bytes, None),
        )
    }

    /// Opens a graph for looking into it: operator by operator as it is written, without ONNX
    /// Runtime's optimisations, some of which would remove what is being looked at.
    ///
    /// - `root`: the folder that the graph's external data is named from.
    /// - `spec`: what the graph takes and gives; its path stands in messages only.
    ///
    /// # Errors
    /// [`StageError`] where the graph cannot be loaded or is not the one that is described.
    pub fn open_as_written(
        runtime: &Runtime,
        root: &Path,
        spec: &StageSpec,
        graph: &[u8],
    ) -> Result<Stage, StageError> {
        let level = Some(GraphOptimizationLevel::Disable);
        let session = open_session(runtime, root, graph, level);
        Stage::of_session(root.join(&spec.graph), spec, session)
    }

    fn of_session(
        path: PathBuf,
        spec: &StageSpec,
        session: ort::Result<Session>,
    ) -> Result<Stage, StageError> {
        let session = session.map_err(|source| StageError::Load {
            path: path.clone(),
            source,
        })?;
        compare(&path, &spec.inputs, session.inputs())?;
        compare(&path, &spec.outputs, session.outputs())?;
        Ok(Stage {
            spec: spec.clone(),
            session: Mutex::new(session),
        })
    }

    /// Inputs and outputs, as in the manifest.
    #[must_use]
    pub fn spec(&self) -> &StageSpec {
        &self.spec
    }

    /// Calls the network.
    ///
    /// - `inputs`: name and values of every input, in any order, shapes as in the manifest; an input
    ///   of integers (token ids) takes whole numbers below 2^24.
    ///
    /// Returns every output by name; each is finite.
    ///
    /// # Errors
    /// [`StageError`] for missing, unknown or misshapen inputs, and for results that are no numbers.
    pub fn run(
        &self,
        inputs: &[(&str, ArrayViewD<'_, f32>)],
    ) -> Result<BTreeMap<String, ArrayD<f32>>, StageError> {
        let outputs = self.run_unchecked(inputs)?;
        for spec in &self.spec.outputs {
            let Some(values) = outputs.get(&spec.name) else {
                continue;
            };
            if let Some((index, &value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
                return Err(StageError::NotFinite {
                    graph: self.spec.graph.clone(),
                    output: spec.name.clone(),
                    index,
                    value,
                });
            }
        }
        Ok(outputs)
    }

    /// As [`Self::run`], for those who want to see results that are no numbers.
    ///
    /// # Errors
    /// [`StageError`] for missing, unknown or misshapen inputs.
    pub fn run_unchecked(
        &self,
        inputs: &[(&str, ArrayViewD<'_, f32>)],
    ) -> Result<BTreeMap<String, ArrayD<f32>>, StageError> {
        let graph = || self.spec.graph.clone();
        let failed = |source| StageError::Run {
            graph: graph(),
            source,
        };
        let complete = inputs.len() == self.spec.inputs.len()
            && self
                .spec
                .inputs
                .iter()
                .all(|spec| inputs.iter().any(|(name, _)| *name == spec.name));
        if !complete {
            let names: Vec<&str> = self
                .spec
                .inputs
                .iter()
                .map(|spec| spec.name.as_str())
                .collect();
            let given: Vec<&str> = inputs.iter().map(|(name, _)| *name).collect();
            return Err(StageError::Inputs {
                graph: graph(),
                expected: names.join(", "),
                found: given.join(", "),
            });
        }
        let mut standard = Vec::with_capacity(inputs.len());
        for (name, values) in inputs {
            if let Some(spec) = self.spec.input(name)
                && !fits(spec, values.shape())
            {
                return Err(StageError::Shape {
                    graph: graph(),
                    expected: spec.to_string(),
                    found: values.shape().to_vec(),
                });
            }
            standard.push((*name, values.as_standard_layout()));
        }
        let mut feed: Vec<(&str, SessionInputValue<'_>)> = Vec::with_capacity(standard.len());
        for (name, values) in &standard {
            let whole = self
                .spec
                .input(name)
                .is_some_and(|spec| spec.dtype == DType::I64);
            let value = if whole {
                #[expect(clippy::cast_possible_truncation, reason = "whole numbers below 2^24")]
                let values = values.mapv(|value| value as i64);
                Tensor::from_array(values).map_err(failed)?.into()
            } else {
                TensorRef::from_array_view(values.view())
                    .map_err(failed)?
                    .into()
            };
            feed.push((name, value));
        }
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let results = session.run(feed).map_err(failed)?;
        let mut outputs = BTreeMap::new();
        for spec in &self.spec.outputs {
            let Some(value) = results.get(&spec.name) else {
                continue;
            };
            let values = value.try_extract_array::<f32>().map_err(failed)?.to_owned();
            outputs.insert(spec.name.clone(), values);
        }
        Ok(outputs)
    }
}

fn open_session(
    runtime: &Runtime,
    root: &Path,
    graph: &[u8],
    level: Option<GraphOptimizationLevel>,
) -> ort::Result<Session> {
    // Weights are named relative to the bundle's root. Given as bytes, a graph has no folder of its
    // own, and ONNX Runtime takes this one instead.
    let folder = root.to_string_lossy();
    let mut builder = Session::builder(runtime.environment())?
        .with_intra_threads(runtime.threads())?
        .with_config_entry(
            "session.model_external_initializers_file_folder_path",
            folder,
        )?
        // Prepacking doubles resident weights and gains at most a seventh of the time.
        .with_prepacking(false)?
        // Fusions, and no blocked layout of convolutions: that copies their weights (1.4 GB of a UNet's)
        // and doubles the time of loading for a twentieth of a call.
        .with_optimization_level(GraphOptimizationLevel::Level2)?
        // Patterns of allocations reserve the whole working memory once more at the second call.
        .with_memory_pattern(false)?
        .with_deterministic_compute(true)?;
    if let Some(level) = level {
        builder = builder.with_optimization_level(level)?;
    }
    builder.commit_from_memory(graph)
}

fn fits(spec: &TensorSpec, shape: &[usize]) -> bool {
    spec.shape.len() == shape.len()
        && spec.shape.iter().zip(shape).all(|(dim, &len)| match dim {
            Dim::Batch(_) => len > 0,
            Dim::Fixed(expected) => *expected == len as u64,
        })
}

fn compare(path: &Path, specs: &[TensorSpec], found: &[Outlet]) -> Result<(), StageError> {
    let same = specs.len() == found.len()
        && specs
            .iter()
            .zip(found)
            .all(|(spec, outlet)| matches(spec, outlet));
    if same {
        return Ok(());
    }
    let expected: Vec<String> = specs.iter().map(TensorSpec::to_string).collect();
    let found: Vec<String> = found
        .iter()
        .map(|outlet| format!("{} {}", outlet.name(), outlet.dtype()))
        .collect();
    Err(StageError::Interface {
        path: path.into(),
        expected: expected.join(", "),
        found: found.join(", "),
    })
}

fn matches(spec: &TensorSpec, outlet: &Outlet) -> bool {
    let ValueType::Tensor { ty, shape, .. } = outlet.dtype() else {
        return false;
    };
    let element = match spec.dtype {
        DType::F32 => TensorElementType::Float32,
        DType::I64 => TensorElementType::Int64,
    };
    spec.name == outlet.name()
        && *ty == element
        && shape.len() == spec.shape.len()
        && spec
            .shape
            .iter()
            .zip(shape.iter())
            .all(|(dim, &len)| match dim {
                Dim::Batch(_) => len == -1,
                Dim::Fixed(expected) => i64::try_from(*expected) == Ok(len),
            })
}
