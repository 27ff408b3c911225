//! How much memory a network's intermediate values need at once.

use std::collections::HashMap;

use super::{Axis, Graph, Value};

/// Operators whose result lies where their first input lies.
const VIEWS: [&str; 2] = ["Reshape", "Identity"];

/// Bytes of a value at batch 1.
pub(super) fn len_bytes(value: &Value) -> u64 {
    let elements = value.shape.iter().map(|axis| match axis {
        Axis::Batch(times) => *times,
        Axis::Len(len) => *len,
    });
    elements.product::<u64>() * value.elem.len_bytes()
}

impl Graph<'_> {
    /// Bytes of every value that a node makes, at batch 1, by name.
    #[must_use]
    pub fn value_bytes(&self) -> HashMap<&str, u64> {
        let nodes = self.nodes.iter().zip(&self.node_bytes);
        nodes
            .flat_map(|(node, &len)| node.output.iter().map(move |name| (name.as_str(), len)))
            .collect()
    }

    /// Bytes of the values alive at once at batch 1, inputs included, weights not: nodes run in
    /// order and a value is dropped after its last use. Buffers that operators use inside come on top.
    #[must_use]
    pub fn working_bytes(&self) -> u64 {
        // Views belong to the value that they show.
        let mut owners: HashMap<&str, &str> = HashMap::new();
        let mut last_use: HashMap<&str, usize> = HashMap::new();
        for (place, node) in self.nodes.iter().enumerate() {
            let owner_of =
                |owners: &HashMap<&str, _>, name| owners.get(name).copied().unwrap_or(name);
            for input in &node.input {
                last_use.insert(owner_of(&owners, input.as_str()), place);
            }
            let shown = VIEWS
                .contains(&node.op_type.as_str())
                .then(|| node.input.first());
            if let (Some(Some(input)), [output]) = (shown, node.output.as_slice()) {
                let owner = owner_of(&owners, input.as_str());
                owners.insert(output, owner);
            }
        }
        let mut ends: Vec<u64> = vec![0; self.nodes.len()];
        let mut alive: u64 = self.inputs.iter().map(len_bytes).sum();
        let mut most = alive;
        for (place, (node, &len)) in self.nodes.iter().zip(&self.node_bytes).enumerate() {
            let Some(output) = node.output.first() else {
                continue;
            };
            if !owners.contains_key(output.as_str()) {
                alive += len;
                // What nobody reads is a result, and stays.
                if let Some(&end) = last_use.get(output.as_str()) {
                    ends[end] += len;
                }
            }
            most = most.max(alive);
            alive -= ends[place];
        }
        most
    }
}

#[cfg(test)]
mod tests {
    use bundle::Precision;

    use super::super::{Axis, BATCH, Graph};

    #[test]
    fn values_count_from_their_making_to_their_last_use() {
        let mut graph = Graph::new("chain", Precision::Fp32);
        let g = &mut graph;
        let x = g.input("x", &[BATCH, Axis::Len(100)]);
        // 400 bytes each: x is given and stays, a lives until c, the reshaped a is a itself.
        let a = g.sigmoid(&x);
        let view = g.reshape(&a, &[BATCH, Axis::Len(10), Axis::Len(10)]);
        let b = g.sigmoid(&view);
        let c = g.add(&b, &view);
        g.output("y", &c);
        assert_eq!(graph.working_bytes(), 4 * 400);
    }
}
