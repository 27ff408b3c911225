//! The largest magnitude of every value of a network, found while it runs.
//!
//! Each operator that makes new numbers gets two reductions over its result, the largest magnitude
//! and a sum that is no number where one of its terms is none. ONNX Runtime puts reductions off to
//! the end of a run and keeps every value that they read till then, so a large network runs several
//! times, each time with the reductions of a part of its values ([`passes`]). Doing all at once in a
//! set order, by making whoever reads a value wait for its reductions, was tried: the graph has
//! thirteen times the nodes, and to open it takes ONNX Runtime longer than all the runs.

use std::collections::{BTreeMap, HashMap, HashSet};

use bundle::{DType, TensorSpec};
use ndarray::ArrayD;

use super::types::Types;
use crate::onnx::{
    AttributeProto, GraphProto, NodeProto, TensorShapeProto, TensorTypeProto, TypeProto,
    ValueInfoProto, element,
};

/// Names of the values of an fp32 graph that hold new numbers, in the order they are made.
pub(super) fn measured(graph: &GraphProto) -> Vec<String> {
    let types = Types::of(graph, &std::collections::BTreeSet::new());
    let weights: HashSet<&str> = graph
        .initializer
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    let mut values = Vec::new();
    for node in &graph.node {
        let weight_only = node.op_type == "Cast" && weights.contains(node.input[0].as_str());
        if follows(node) || weight_only {
            continue;
        }
        let floats = node.output.iter().filter(|output| types.is_float(output));
        values.extend(floats.cloned());
    }
    values
}

/// The values in groups that may be kept all together.
///
/// - `bytes`: of each value, by name; what is not there is taken to be small.
/// - `limit`: of a group, bytes; a value beyond it is a group of its own.
pub(super) fn passes(
    values: Vec<String>,
    bytes: &HashMap<&str, u64>,
    limit: u64,
) -> Vec<Vec<String>> {
    let mut groups: Vec<Vec<String>> = Vec::new();
    let mut held = u64::MAX;
    for value in values {
        let len = bytes.get(value.as_str()).copied().unwrap_or_default();
        held = held.saturating_add(len);
        match groups.last_mut() {
            Some(group) if held <= limit => group.push(value),
            _ => {
                held = len;
                groups.push(vec![value]);
            }
        }
    }
    groups
}

/// Values that are probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Probed {
    /// Names.
    values: Vec<String>,
}

/// Adds the reductions of some of its values to an fp32 graph.
pub(super) fn probe(graph: &mut GraphProto, values: Vec<String>) -> Probed {
    let wanted: HashSet<&str> = values.iter().map(String::as_str).collect();
    let mut nodes = Vec::with_capacity(graph.node.len() + 3 * values.len());
    for node in std::mem::take(&mut graph.node) {
        let made: Vec<String> = node
            .output
            .iter()
            .filter(|name| wanted.contains(name.as_str()))
            .cloned()
            .collect();
        nodes.push(node);
        for name in made {
            let at = |part: &str| format!("{name}/{part}");
            let reduction = |op: &str, from: &str, to: &str| NodeProto {
                attribute: vec![AttributeProto::int("keepdims", 0)],
                ..plain(op, &[from], to)
            };
            nodes.extend([
                plain("Abs", &[&name], &at("magnitudes")),
                reduction("ReduceMax", &at("magnitudes"), &at("largest")),
                reduction("ReduceSum", &name, &at("sum")),
            ]);
            graph.output.push(number(&at("largest")));
            graph.output.push(number(&at("sum")));
        }
    }
    graph.node = nodes;
    Probed { values }
}

fn plain(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        input: inputs.iter().map(|&name| name.to_owned()).collect(),
        output: vec![output.into()],
        name: format!("probe_{output}"),
        op_type: op.into(),
        ..NodeProto::default()
    }
}

/// An output of one number.
fn number(name: &str) -> ValueInfoProto {
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: element::FLOAT,
                shape: Some(TensorShapeProto { dim: Vec::new() }),
            }),
        }),
    }
}

impl Probed {
    /// What the added outputs are to those who call the graph.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        let spec = |name: String| TensorSpec {
            name,
            dtype: DType::F32,
            shape: Vec::new(),
        };
        let of = |value: &String| ["largest", "sum"].map(|part| spec(format!("{value}/{part}")));
        self.values.iter().flat_map(of).collect()
    }

    /// Takes the added outputs from a call's results.
    pub(super) fn take(&self, outputs: &mut BTreeMap<String, ArrayD<f32>>) -> Vec<Magnitude> {
        let mut numbers: Vec<f32> = Vec::new();
        for spec in self.specs() {
            numbers.extend(outputs.remove(&spec.name).unwrap_or_default());
        }
        let pairs = numbers.chunks_exact(2).zip(&self.values);
        pairs
            .map(|(pair, value)| Magnitude {
                value: value.clone(),
                largest: pair[0],
                sum: pair[1],
            })
            .collect()
    }
}

/// What the reductions found of one value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Magnitude {
    /// Name.
    pub(super) value: String,
    /// Largest magnitude.
    pub(super) largest: f32,
    /// Sum; no number where one of its terms is none.
    pub(super) sum: f32,
}

/// Whether a result holds no other magnitudes than the first input.
fn follows(node: &NodeProto) -> bool {
    matches!(
        node.op_type.as_str(),
        "Expand"
            | "Flatten"
            | "Identity"
            | "Pad"
            | "Reshape"
            | "Resize"
            | "Slice"
            | "Squeeze"
            | "Transpose"
            | "Unsqueeze"
    )
}

/// Largest magnitudes of every value of `graph`, those of values that only move elements taken from
/// what they move.
pub(super) fn spread(graph: &GraphProto, probed: BTreeMap<String, f32>) -> HashMap<String, f32> {
    let mut all: HashMap<String, f32> = probed.into_iter().collect();
    for node in &graph.node {
        let moved = node.input.iter().filter_map(|name| all.get(name));
        let largest = moved.copied().fold(0.0, f32::max);
        if follows(node) || node.op_type == "Cast" {
            for output in &node.output {
                all.entry(output.clone()).or_insert(largest);
            }
        }
    }
    all
}
