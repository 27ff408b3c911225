//! The bridge from CLIP image tokens to the captioner's vision tokens (`CLIPConverter`).
//!
//! `tokens [batch, token, dim]` to `vision [batch, other tokens, other dim]`: a linear layer over the
//! token axis, then one over the channels.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Graph};
use crate::layers::linear_to;
use crate::section::Section;

/// Builds the graph.
#[must_use]
pub fn build<'c>(s: &Section<'c>, precision: Precision) -> Graph<'c> {
    let mut graph = Graph::new("caption_bridge", precision);
    let g = &mut graph;
    let tokens = s.axis("linear1.weight", 2, 1);
    let dim = s.axis("linear2.weight", 2, 1);
    let input = g.input("tokens", &[BATCH, Axis::Len(tokens), Axis::Len(dim)]);
    let act = g.act();
    let x = g.cast(&input, act);
    let x = g.transpose(&x, &[0, 2, 1]);
    let x = linear_to(g, s, "linear1", &x, true);
    let x = g.transpose(&x, &[0, 2, 1]);
    let x = linear_to(g, s, "linear2", &x, true);
    g.output("vision", &x);
    graph
}
