//! An fp16 graph computed in fp32, with or without the rounding that fp16 would do.
//!
//! ONNX Runtime's CPU provider computes fp16 graphs in fp32 and rounds where it likes. Here every
//! operator is fp32 and, where asked, every result that the typed graph holds in fp16 goes through
//! a cast to fp16 and back: what an fp16 machine computes, as far as it accumulates in fp32. Such
//! pairs of casts survive only in a session without optimisations
//! ([`decoder::Stage::open_as_written`]).

use std::collections::{BTreeSet, HashMap, HashSet};

use half::f16;

use super::types::{Types, cast_to, moves_only};
use crate::onnx::{AttributeProto, GraphProto, NodeProto, element};

/// What becomes of results that the typed graph holds in fp16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// They stay as fp32 computed them.
    None,
    /// They are rounded to fp16.
    Half,
}

pub(super) fn cast(from: &str, to: &str, elem: i32) -> NodeProto {
    NodeProto {
        input: vec![from.into()],
        output: vec![to.into()],
        name: format!("cast_{from}_to_{to}"),
        op_type: "Cast".into(),
        attribute: vec![AttributeProto::int("to", i64::from(elem))],
        ..NodeProto::default()
    }
}

/// Rewrites a typed graph so that it computes in fp32. Names of values stay what they were; weights
/// stay where they are and are cast up before they are used.
pub fn widen(graph: &mut GraphProto, rounding: Rounding) {
    let types = Types::of(graph, &BTreeSet::new());
    let mut wanted = widen_initializers(graph);
    let mut exact: HashSet<String> = graph.initializer.iter().map(|t| t.name.clone()).collect();
    exact.extend(wanted.keys().cloned());
    let mut nodes = Vec::with_capacity(graph.node.len() * 2);
    for mut node in std::mem::take(&mut graph.node) {
        // A weight is cast where it is first used, so that few of them are wide at a time.
        for input in &node.input {
            if let Some(stored) = wanted.remove(input) {
                nodes.push(cast(&stored, input, element::FLOAT));
            }
        }
        let half = node.output.iter().any(|output| types.is_half(output));
        if !half {
            nodes.push(node);
            continue;
        }
        let rounded_already = moves_only(&node)
            && node
                .input
                .iter()
                .filter(|input| types.is_half(input))
                .all(|input| exact.contains(input));
        if cast_to(&node) == element::FLOAT16 {
            node.attribute = vec![AttributeProto::int("to", i64::from(element::FLOAT))];
        }
        if rounding == Rounding::None || rounded_already {
            exact.extend(node.output.iter().cloned());
            nodes.push(node);
            continue;
        }
        let mut tail = Vec::new();
        for output in &mut node.output {
            let computed = format!("{output}/computed");
            let rounded = format!("{output}/rounded");
            tail.push(cast(&computed, &rounded, element::FLOAT16));
            tail.push(cast(&rounded, output, element::FLOAT));
            exact.insert(output.clone());
            *output = computed;
        }
        nodes.push(node);
        nodes.extend(tail);
    }
    graph.node = nodes;
}

/// Inline numbers become fp32; external ones are renamed, to be cast. Returns value to stored name.
fn widen_initializers(graph: &mut GraphProto) -> HashMap<String, String> {
    let mut wanted = HashMap::new();
    for tensor in &mut graph.initializer {
        if tensor.data_type != element::FLOAT16 {
            continue;
        }
        match tensor.raw_data.as_ref().map(|bytes| widened(bytes)) {
            Some(bytes) => {
                tensor.raw_data = Some(bytes);
                tensor.data_type = element::FLOAT;
            }
            None => {
                let stored = format!("{}/stored", tensor.name);
                wanted.insert(tensor.name.clone(), stored.clone());
                tensor.name = stored;
            }
        }
    }
    wanted
}

fn widened(bytes: &[u8]) -> Vec<u8> {
    let halves = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    halves
        .flat_map(|pair| f16::from_le_bytes(pair).to_f32().to_le_bytes())
        .collect()
}
