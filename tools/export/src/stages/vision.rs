//! OpenCLIP's image tower, as MindEye2 reads its tokens.
//!
//! `image [batch, 3, side, side]`, normalised, to `tokens [batch, patches, dim]`: after the final
//! norm, without the class token and without projection. Patch convolution without bias; exact GELU.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Graph};
use crate::layers::{gelu, layer_norm};
use crate::section::Section;
use crate::stages::blocks::{BlockKeys, residual_block};

const EPS: f32 = 1e-5;

/// Builds the graph; `side` is the picture's.
#[must_use]
pub fn build<'c>(
    s: &Section<'c>,
    prefix: &str,
    side: u64,
    head_width: u64,
    precision: Precision,
) -> Graph<'c> {
    let mut graph = Graph::new("image_encoder", precision);
    let g = &mut graph;
    let key = format!("{prefix}conv1.weight");
    let (dim, channels, patch) = (s.axis(&key, 4, 0), s.axis(&key, 4, 1), s.axis(&key, 4, 2));
    let image = g.input(
        "image",
        &[BATCH, Axis::Len(channels), Axis::Len(side), Axis::Len(side)],
    );
    let act = g.act();
    let x = g.cast(&image, act);
    let weight = s.weight(g, &key, &[dim, channels, patch, patch]);
    if patch == 0 || !side.is_multiple_of(patch.max(1)) {
        s.problem(
            &key,
            format!("expected patches that divide {side} pixels, found {patch}"),
        );
    }
    let maps = g.patches(&x, &weight);
    let count = maps.len(2) * maps.len(3);
    let rows = g.reshape(&maps, &[BATCH, Axis::Len(dim), Axis::Len(count)]);
    let rows = g.transpose(&rows, &[0, 2, 1]);
    // The class token goes in front: a row of zeros, to which it is added with its position.
    let padded = g.pad_front_row(&rows);
    let class = s.weight_as(
        g,
        &format!("{prefix}class_embedding"),
        &[dim],
        act,
        &[1, dim],
        crate::graph::Layout::AsStored,
    );
    let class = g.pad_rows_after(&class, count);
    let with_class = g.add(&padded, &class);
    let places = s.weight(
        g,
        &format!("{prefix}positional_embedding"),
        &[count + 1, dim],
    );
    let x = g.add(&with_class, &places);
    let mut x = layer_norm(g, s, &format!("{prefix}ln_pre"), &x, EPS);
    if head_width == 0 || !dim.is_multiple_of(head_width.max(1)) {
        s.problem(
            &key,
            format!("expected a width that heads of {head_width} divide, found {dim}"),
        );
    }
    let heads = (dim / head_width.max(1)).max(1);
    for block in 0..s.count(&format!("{prefix}transformer.resblocks.")) {
        let keys = BlockKeys::open_clip(&format!("{prefix}transformer.resblocks.{block}."));
        x = residual_block(g, s, &keys, &x, heads, None, gelu);
    }
    let x = layer_norm(g, s, &format!("{prefix}ln_post"), &x, EPS);
    let tokens = g.slice(&x, 1, 1, count + 1);
    g.output("tokens", &tokens);
    graph
}
