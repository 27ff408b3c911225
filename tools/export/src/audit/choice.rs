//! Which nodes and weights may or must be kept in fp32.

use std::collections::{BTreeSet, HashMap};

use super::HEADROOM;
use super::types::Types;
use crate::onnx::{ModelProto, element};

/// Values whose nodes read or make what fp16 might not hold.
pub(super) fn beyond_range(
    typed: &ModelProto,
    largest: &HashMap<String, f32>,
    wide: &BTreeSet<String>,
) -> BTreeSet<String> {
    let limit = half::f16::MAX.to_f32() / HEADROOM;
    let Some(graph) = &typed.graph else {
        return BTreeSet::new();
    };
    let types = Types::of(graph, wide);
    let beyond = |name: &&String| {
        types.is_half(name) && largest.get(*name).is_some_and(|&value| value > limit)
    };
    let nodes = graph.node.iter().filter(|node| node.op_type != "Cast");
    nodes
        .filter(|node| {
            node.input
                .iter()
                .chain(&node.output)
                .any(|name| beyond(&name))
        })
        .flat_map(|node| node.output.iter().cloned())
        .collect()
}

/// Every value that a node computes in fp16.
pub(super) fn candidates(typed: &ModelProto, wide: &BTreeSet<String>) -> Vec<String> {
    let Some(graph) = &typed.graph else {
        return Vec::new();
    };
    let types = Types::of(graph, wide);
    let nodes = graph.node.iter().filter(|node| node.op_type != "Cast");
    nodes
        .flat_map(|node| node.output.iter())
        .filter(|output| types.is_half(output))
        .cloned()
        .collect()
}

pub(super) fn half_weights(typed: &ModelProto, wide: &BTreeSet<String>) -> BTreeSet<String> {
    let tensors = typed.graph.iter().flat_map(|graph| &graph.initializer);
    tensors
        .filter(|tensor| {
            let half = tensor.data_type == element::FLOAT16 || wide.contains(&tensor.name);
            half && !tensor.external_data.is_empty()
        })
        .map(|tensor| tensor.name.clone())
        .collect()
}
