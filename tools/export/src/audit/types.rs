//! Element type of every value of a graph, told from the graph alone.

use std::collections::{BTreeSet, HashMap};

use crate::onnx::{GraphProto, NodeProto, element};

/// Element types by value name, as in [`element`].
#[derive(Clone, Debug)]
pub(crate) struct Types(HashMap<String, i32>);

impl Types {
    /// Types of a graph whose nodes are in the order they run. Initializers in `as_half` count as
    /// fp16 whatever they are stored in: the graph was written for fp16.
    pub(crate) fn of(graph: &GraphProto, as_half: &BTreeSet<String>) -> Types {
        let mut types = HashMap::new();
        for input in &graph.input {
            let tensor = input.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
            types.insert(input.name.clone(), tensor.map_or(0, |t| t.elem_type));
        }
        for tensor in &graph.initializer {
            let half = as_half.contains(&tensor.name);
            let elem = if half {
                element::FLOAT16
            } else {
                tensor.data_type
            };
            types.insert(tensor.name.clone(), elem);
        }
        for node in &graph.node {
            let elem = result(node, &types);
            for output in &node.output {
                types.insert(output.clone(), elem);
            }
        }
        Types(types)
    }

    /// Whether a value is fp16.
    pub(crate) fn is_half(&self, name: &str) -> bool {
        self.0.get(name) == Some(&element::FLOAT16)
    }

    /// Whether a value is fp16 or fp32.
    pub(crate) fn is_float(&self, name: &str) -> bool {
        matches!(self.0.get(name), Some(&(element::FLOAT | element::FLOAT16)))
    }
}

fn result(node: &NodeProto, types: &HashMap<String, i32>) -> i32 {
    let of = |input: usize| {
        let name = node.input.get(input);
        name.and_then(|name| types.get(name)).copied().unwrap_or(0)
    };
    match node.op_type.as_str() {
        "Cast" => cast_to(node),
        "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Equal" | "Not" | "And" | "Or"
        | "IsNaN" | "IsInf" => element::BOOL,
        "ArgMax" | "ArgMin" | "Shape" => element::INT64,
        "Where" => of(1),
        _ => of(0),
    }
}

/// The element type that a Cast gives; 0 for anything else.
pub(crate) fn cast_to(node: &NodeProto) -> i32 {
    let to = node.attribute.iter().find(|a| a.name == "to");
    let to = to.filter(|_| node.op_type == "Cast").and_then(|a| a.i);
    to.and_then(|to| i32::try_from(to).ok()).unwrap_or(0)
}

/// Whether an operator moves or picks elements and never makes a new one.
pub(crate) fn moves_only(node: &NodeProto) -> bool {
    // Resize is nearest neighbour in every graph of the exporter.
    matches!(
        node.op_type.as_str(),
        "Concat"
            | "Expand"
            | "Flatten"
            | "Gather"
            | "Identity"
            | "Max"
            | "Min"
            | "Pad"
            | "ReduceMax"
            | "Reshape"
            | "Resize"
            | "Slice"
            | "Split"
            | "Squeeze"
            | "Transpose"
            | "Unsqueeze"
            | "Where"
    )
}
