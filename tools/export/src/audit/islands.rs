//! fp32 islands in an fp16 graph: nodes that compute in fp32 between casts.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::types::{Types, cast_to};
use super::widen::cast;
use crate::onnx::{GraphProto, NodeProto, element};

/// What is kept in fp32.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Islands {
    /// Names of the values whose nodes compute in fp32.
    pub values: BTreeSet<String>,
    /// Weights that are stored in fp32; whoever reads one is part of an island.
    pub weights: BTreeSet<String>,
}

impl Islands {
    /// Whether a node is part of an island.
    pub(super) fn holds(&self, node: &NodeProto) -> bool {
        node.op_type != "Cast"
            && (node.output.iter().any(|name| self.values.contains(name))
                || node.input.iter().any(|name| self.weights.contains(name)))
    }

    /// Makes the nodes of the islands compute in fp32. Between two of them a value stays fp32; a
    /// value that was rounded from fp32 only to be read by one of them is read as it was.
    pub fn apply(&self, graph: &mut GraphProto) {
        let types = Types::of(graph, &self.weights);
        let mut islands = Rewritten {
            types,
            nodes: Vec::with_capacity(graph.node.len()),
            wide: self
                .weights
                .iter()
                .map(|name| (name.clone(), name.clone()))
                .collect(),
            kept: HashSet::new(),
            renamed: HashMap::new(),
        };
        for node in std::mem::take(&mut graph.node) {
            if self.holds(&node) {
                islands.widen(node);
            } else {
                islands.pass(node);
            }
        }
        graph.node = islands.nodes;
        drop_idle_casts(graph);
    }
}

struct Rewritten {
    types: Types,
    nodes: Vec<NodeProto>,
    /// fp16 value to the fp32 value that holds the same or more.
    wide: HashMap<String, String>,
    /// fp16 values that an island made, whose fp32 value is the real one.
    kept: HashSet<String>,
    /// Values that are gone, to what takes their place.
    renamed: HashMap<String, String>,
}

impl Rewritten {
    fn pass(&mut self, mut node: NodeProto) {
        self.rename(&mut node);
        if let ([input], [output]) = (node.input.as_slice(), node.output.as_slice()) {
            let to = cast_to(&node);
            if to == element::FLOAT && self.kept.contains(input) {
                let wide = self.wide[input].clone();
                self.renamed.insert(output.clone(), wide);
                return;
            }
            if to == element::FLOAT16 && !self.types.is_half(input) && self.types.is_float(input) {
                self.wide.insert(output.clone(), input.clone());
            }
        }
        self.nodes.push(node);
    }

    fn widen(&mut self, mut node: NodeProto) {
        self.rename(&mut node);
        for input in &mut node.input {
            if !self.types.is_half(input) {
                continue;
            }
            if !self.wide.contains_key(input) {
                let name = format!("{input}/wide");
                self.nodes.push(cast(input, &name, element::FLOAT));
                self.wide.insert(input.clone(), name);
            }
            *input = self.wide[input].clone();
        }
        let mut tail = Vec::new();
        for output in &mut node.output {
            if !self.types.is_half(output) {
                continue;
            }
            let name = format!("{output}/fp32");
            tail.push(cast(&name, output, element::FLOAT16));
            self.wide.insert(output.clone(), name.clone());
            self.kept.insert(output.clone());
            *output = name;
        }
        self.nodes.push(node);
        self.nodes.extend(tail);
    }

    fn rename(&self, node: &mut NodeProto) {
        for input in &mut node.input {
            if let Some(name) = self.renamed.get(input) {
                input.clone_from(name);
            }
        }
    }
}

/// Drops casts that nobody reads any more.
fn drop_idle_casts(graph: &mut GraphProto) {
    let mut read: HashSet<String> = graph.output.iter().map(|o| o.name.clone()).collect();
    let mut kept = Vec::with_capacity(graph.node.len());
    for node in std::mem::take(&mut graph.node).into_iter().rev() {
        if node.op_type == "Cast" && !node.output.iter().any(|name| read.contains(name)) {
            continue;
        }
        read.extend(node.input.iter().cloned());
        kept.push(node);
    }
    kept.reverse();
    graph.node = kept;
}
