//! Ridge regression: one person's betas to the shared hidden space.
//!
//! `betas [batch, voxels]` to `ridge [batch, 1, hidden]`; `ridge.linears.N` of the checkpoint.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Graph};
use crate::layers::linear;
use crate::section::Section;

/// Indices of the people in a checkpoint.
#[must_use]
pub fn indices(s: &Section<'_>) -> Vec<u64> {
    (0..s.count("ridge.linears.")).collect()
}

/// Voxels of one person.
#[must_use]
pub fn voxels(s: &Section<'_>, index: u64) -> u64 {
    s.axis(&format!("ridge.linears.{index}.weight"), 2, 1)
}

/// The graph of one person's ridge layer; `hidden` is the backbone's width.
#[must_use]
pub fn build<'c>(s: &Section<'c>, index: u64, hidden: u64, precision: Precision) -> Graph<'c> {
    let mut g = Graph::new("subject", precision);
    let betas = g.input("betas", &[BATCH, Axis::Len(voxels(s, index))]);
    let act = g.act();
    let x = g.cast(&betas, act);
    let x = linear(
        &mut g,
        s,
        &format!("ridge.linears.{index}"),
        &x,
        hidden,
        true,
    );
    let x = g.reshape(&x, &[BATCH, Axis::Len(1), Axis::Len(hidden)]);
    g.output("ridge", &x);
    g
}
