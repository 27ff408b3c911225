//! The fp32 graph with the checkpoint's own numbers, read from the bundle where it holds them.

use std::collections::HashMap;

use super::Held;
use crate::graph::{Elem, Graph};
use crate::onnx::{GraphProto, ModelProto, StringStringEntryProto, TensorProto, element};
use crate::weights::{Rounding, Written};

/// A weight's name without the element type: the same in graphs of every precision.
pub(super) fn key(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(key, _)| key)
}

/// Weights that the bundle holds exactly, by [`key`]: whether in fp16, and where.
pub(super) fn exact<'h>(held: &Held<'h>) -> HashMap<&'h str, (Elem, u64)> {
    let mut exact = HashMap::new();
    for (weight, written) in held.graph.weights().iter().zip(held.written) {
        let kept = weight.elem == Elem::F32 || written.rounding == Rounding::Exact;
        if kept {
            exact.insert(key(&weight.name), (weight.elem, written.offset));
        }
    }
    exact
}

/// The fp32 graph; `passing` is the file of the weights that the bundle does not hold exactly, in the
/// graph's order.
pub(super) fn model(
    graph: &Graph<'_>,
    held: &Held<'_>,
    (file, places): (&str, &[Written]),
) -> ModelProto {
    let exact = exact(held);
    let mut places = places.iter();
    let offsets: Vec<u64> = graph
        .weights()
        .iter()
        .map(|weight| match exact.get(key(&weight.name)) {
            Some((_, offset)) => *offset,
            None => places.next().map_or(0, |written| written.offset),
        })
        .collect();
    let mut model = graph.model(file, &offsets);
    for tensor in model.graph.iter_mut().flat_map(|g| &mut g.initializer) {
        if tensor.external_data.is_empty() {
            continue;
        }
        if let Some((elem, _)) = exact.get(key(&tensor.name)) {
            set(tensor, "location", held.path.to_owned());
            if *elem == Elem::F16 {
                tensor.data_type = element::FLOAT16;
                set(tensor, "length", (2 * elements(tensor)).to_string());
            }
        }
    }
    model
}

/// Says of an external fp16 tensor that it lies there in fp32.
pub(super) fn store_wide(tensor: &mut TensorProto) {
    tensor.data_type = element::FLOAT;
    set(tensor, "length", (4 * elements(tensor)).to_string());
}

fn elements(tensor: &TensorProto) -> i64 {
    tensor.dims.iter().product()
}

fn set(tensor: &mut TensorProto, key: &str, value: String) {
    tensor.external_data.retain(|entry| entry.key != key);
    tensor.external_data.push(StringStringEntryProto {
        key: key.into(),
        value,
    });
}

/// Rows of the table that an input of indices picks from; 1 where there is none.
pub(super) fn rows_read_by(graph: &GraphProto, input: &str) -> u64 {
    let reads = |node: &&crate::onnx::NodeProto| {
        node.op_type == "Gather" && node.input.get(1).is_some_and(|name| name == input)
    };
    let table = graph.node.iter().find(reads).map(|node| &node.input[0]);
    let tensor = graph
        .initializer
        .iter()
        .find(|tensor| Some(&tensor.name) == table);
    let rows = tensor.and_then(|tensor| tensor.dims.first());
    rows.and_then(|&rows| u64::try_from(rows).ok()).unwrap_or(1)
}
