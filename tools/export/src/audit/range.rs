//! The largest magnitude of every value of a network, found while it runs.
//!
//! Each operator that makes new numbers gets two reductions over its result, the largest magnitude
//! and a sum that is no number where one of its terms is none. Left to itself ONNX Runtime puts the
//! reductions off to the end and keeps every value till then, which is the quickest for small
//! networks ([`Order::Free`]). In large ones whoever reads a value reads it through a Reshape to its
//! own shape, to which a zero made from its sum was added ([`Order::Forced`]): the reductions come
//! first, nothing is copied, and the run takes no more memory than the network does; opening the
//! graph takes longer.

use std::collections::{BTreeMap, HashMap};

use bundle::{DType, Dim, TensorSpec};
use ndarray::ArrayD;

use super::types::Types;
use crate::onnx::{
    AttributeProto, DimensionProto, GraphProto, NodeProto, TensorProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto, element,
};

/// Output of largest magnitude and sum in turn, `[2 * value]`.
const PROBES: &str = "audit/probes";

/// When the reductions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// When the runtime likes: all values may be kept till the end.
    Free,
    /// Before anybody reads the value.
    Forced,
}

/// Values that are probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Probed {
    /// Names.
    pub(super) values: Vec<String>,
    order: Order,
}

/// Adds the reductions to an fp32 graph.
pub(super) fn probe(graph: &mut GraphProto, order: Order) -> Probed {
    let types = Types::of(graph, &std::collections::BTreeSet::new());
    let stored: Vec<&str> = graph
        .initializer
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    let weights: std::collections::HashSet<&str> = stored.into_iter().collect();
    let (one, none) = ("audit/one", "audit/none");
    let mut probed = Probed {
        values: Vec::new(),
        order,
    };
    let mut nodes = Vec::with_capacity(graph.node.len() * 8);
    let mut gathered = Vec::new();
    for mut node in std::mem::take(&mut graph.node) {
        let weight_only = node.op_type == "Cast" && weights.contains(node.input[0].as_str());
        let measured = !follows(&node) && !weight_only;
        let mut after = Vec::new();
        for output in &mut node.output {
            if !measured || !types.is_float(output) {
                continue;
            }
            let name = output.clone();
            if order == Order::Forced {
                *output = format!("{name}/made");
            }
            let at = |part: &str| format!("{name}/{part}");
            let reduction = |op: &str, from: &str, to: &str| NodeProto {
                attribute: vec![AttributeProto::int("keepdims", 0)],
                ..plain(op, &[from], to)
            };
            after.extend([
                plain("Abs", &[output], &at("magnitudes")),
                reduction("ReduceMax", &at("magnitudes"), &at("largest")),
                reduction("ReduceSum", output, &at("sum")),
            ]);
            probed.values.push(name.clone());
            if order == Order::Free {
                graph.output.push(tensor(&at("largest"), Vec::new()));
                graph.output.push(tensor(&at("sum"), Vec::new()));
                continue;
            }
            after.extend([
                plain("Reshape", &[&at("largest"), one], &at("largest_row")),
                plain("Reshape", &[&at("sum"), one], &at("sum_row")),
                plain("Concat", &[&at("largest_row"), &at("sum_row")], &at("both")),
                plain("IsNaN", &[&at("both")], &at("is_nan")),
                super::widen::cast(&at("is_nan"), &at("is_nan_int"), element::INT64),
                NodeProto {
                    attribute: vec![AttributeProto::int("keepdims", 1)],
                    ..plain("ReduceMax", &[&at("is_nan_int")], &at("flag"))
                },
                plain("Mul", &[&at("flag"), none], &at("nothing")),
                plain("Shape", &[output], &at("shape")),
                plain("Add", &[&at("shape"), &at("nothing")], &at("same_shape")),
                plain("Reshape", &[output, &at("same_shape")], &name),
            ]);
            gathered.push(at("both"));
        }
        nodes.push(node);
        nodes.extend(after);
    }
    if order == Order::Free {
        graph.node = nodes;
        return probed;
    }
    let rows: Vec<&str> = gathered.iter().map(String::as_str).collect();
    nodes.push(plain("Concat", &rows, PROBES));
    for node in nodes.iter_mut().filter(|node| node.op_type == "Concat") {
        if node.attribute.is_empty() {
            node.attribute = vec![AttributeProto::int("axis", 0)];
        }
    }
    let len = DimensionProto {
        dim_value: i64::try_from(2 * rows.len()).ok(),
        dim_param: None,
    };
    graph.output.push(tensor(PROBES, vec![len]));
    for (name, value) in [(one, 1_i64), (none, 0)] {
        graph.initializer.push(TensorProto {
            dims: vec![1],
            data_type: element::INT64,
            name: name.into(),
            raw_data: Some(value.to_le_bytes().to_vec()),
            ..TensorProto::default()
        });
    }
    graph.node = nodes;
    probed
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

fn tensor(name: &str, dim: Vec<DimensionProto>) -> ValueInfoProto {
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: element::FLOAT,
                shape: Some(TensorShapeProto { dim }),
            }),
        }),
    }
}

impl Probed {
    /// What the added outputs are to those who call the graph.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        let spec = |name: String, shape: Vec<Dim>| TensorSpec {
            name,
            dtype: DType::F32,
            shape,
        };
        match self.order {
            Order::Forced => {
                let len = Dim::Fixed(2 * self.values.len() as u64);
                vec![spec(PROBES.into(), vec![len])]
            }
            Order::Free => {
                let parts = ["largest", "sum"];
                let of = |value: &String| parts.map(|part| spec(format!("{value}/{part}"), vec![]));
                self.values.iter().flat_map(of).collect()
            }
        }
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
