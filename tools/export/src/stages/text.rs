//! The two text towers of SDXL.
//!
//! - [`clip_l`]: the transformers spelling, quick GELU; `tokens [batch, 77]` to `hidden [batch, 77, dim]`,
//!   the output of an inner layer (the eleventh of twelve), without final norm.
//! - [`open_clip`]: the OpenCLIP spelling, exact GELU; `tokens` to `hidden` (the input of the last
//!   block) and `pooled [batch, projection]` (last block, final norm, row of the largest token id,
//!   projected).
//!
//! Both see earlier tokens only and know no padding.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Graph, Value};
use crate::layers::{
    causal_mask, gelu, layer_norm, linear, linear_to, masked_attention, quick_gelu,
};
use crate::section::Section;
use crate::stages::blocks::{BlockKeys, residual_block};

const EPS: f32 = 1e-5;

/// Embedded tokens with their positions, `[batch, token, dim]`.
fn embed<'c>(g: &mut Graph<'c>, s: &Section<'c>, words: &str, positions: &str) -> Value {
    let (vocabulary, dim) = (s.axis(words, 2, 0), s.axis(words, 2, 1));
    let count = s.axis(positions, 2, 0);
    let tokens = g.input_ints("tokens", &[BATCH, Axis::Len(count)]);
    let table = s.weight(g, words, &[vocabulary, dim]);
    let rows = g.rows(&table, &tokens);
    let places = s.weight(g, positions, &[count, dim]);
    g.add(&rows, &places)
}

/// Builds CLIP-L's text tower up to the output of layer `layer_idx`.
#[must_use]
pub fn clip_l<'c>(
    s: &Section<'c>,
    prefix: &str,
    heads: u64,
    layer_idx: u64,
    precision: Precision,
) -> Graph<'c> {
    let mut graph = Graph::new("text_encoder_1", precision);
    let g = &mut graph;
    let embeddings = format!("{prefix}embeddings.");
    let mut x = embed(
        g,
        s,
        &format!("{embeddings}token_embedding.weight"),
        &format!("{embeddings}position_embedding.weight"),
    );
    let layers = s.count(&format!("{prefix}encoder.layers."));
    if layer_idx > layers {
        let message = format!("expected at least {layer_idx} layers, found {layers}");
        s.problem(&format!("{prefix}encoder.layers"), message);
    }
    check_heads(s, prefix, x.last(), heads);
    let mask = causal_mask(g, x.len(1));
    for layer in 0..layer_idx.min(layers) {
        let key = format!("{prefix}encoder.layers.{layer}.");
        let normed = layer_norm(g, s, &format!("{key}layer_norm1"), &x, EPS);
        let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| {
            linear(
                g,
                s,
                &format!("{key}self_attn.{name}"),
                &normed,
                normed.last(),
                true,
            )
        });
        let mixed = masked_attention(g, &q, &k, &v, heads.max(1), Some(&mask));
        let mixed = linear(
            g,
            s,
            &format!("{key}self_attn.out_proj"),
            &mixed,
            x.last(),
            true,
        );
        x = g.add(&x, &mixed);
        let normed = layer_norm(g, s, &format!("{key}layer_norm2"), &x, EPS);
        let inner = linear_to(g, s, &format!("{key}mlp.fc1"), &normed, true);
        let inner = quick_gelu(g, &inner);
        let inner = linear(g, s, &format!("{key}mlp.fc2"), &inner, x.last(), true);
        x = g.add(&x, &inner);
    }
    g.output("hidden", &x);
    graph
}

/// Builds OpenCLIP's text tower.
#[must_use]
pub fn open_clip<'c>(s: &Section<'c>, prefix: &str, heads: u64, precision: Precision) -> Graph<'c> {
    let mut graph = Graph::new("text_encoder_2", precision);
    let g = &mut graph;
    let mut x = embed(
        g,
        s,
        &format!("{prefix}token_embedding.weight"),
        &format!("{prefix}positional_embedding"),
    );
    check_heads(s, prefix, x.last(), heads);
    let mask = causal_mask(g, x.len(1));
    let blocks = s.count(&format!("{prefix}transformer.resblocks."));
    if blocks == 0 {
        s.problem(
            &format!("{prefix}transformer.resblocks"),
            "expected blocks, found none".into(),
        );
    }
    let keys =
        |block: u64| BlockKeys::open_clip(&format!("{prefix}transformer.resblocks.{block}."));
    for block in 0..blocks.saturating_sub(1) {
        x = residual_block(g, s, &keys(block), &x, heads.max(1), Some(&mask), gelu);
    }
    g.output("hidden", &x);
    let last = residual_block(
        g,
        s,
        &keys(blocks.saturating_sub(1)),
        &x,
        heads.max(1),
        Some(&mask),
        gelu,
    );
    let last = layer_norm(g, s, &format!("{prefix}ln_final"), &last, EPS);
    let tokens = g.declared("tokens");
    let pick = g.first_largest(&tokens);
    let row = g.matmul(&pick, &last);
    let row = g.reshape(&row, &[BATCH, Axis::Len(last.last())]);
    let key = format!("{prefix}text_projection");
    let projection = s.weight(g, &key, &[last.last(), s.axis(&key, 2, 1)]);
    let pooled = g.matmul(&row, &projection);
    g.output("pooled", &pooled);
    graph
}

fn check_heads(s: &Section<'_>, prefix: &str, dim: u64, heads: u64) {
    if heads == 0 || !dim.is_multiple_of(heads.max(1)) {
        s.problem(
            prefix,
            format!("expected a width that {heads} heads divide, found {dim}"),
        );
    }
}
