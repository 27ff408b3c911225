//! The pre-norm transformer block that OpenCLIP's towers share.

use crate::graph::{Graph, Layout, Value};
use crate::layers::{layer_norm, linear, linear_to, masked_attention};
use crate::section::Section;

const EPS: f32 = 1e-5;

/// Keys of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockKeys {
    prefix: String,
}

impl BlockKeys {
    /// OpenCLIP's spelling: `ln_1`, `attn.in_proj_weight`, `mlp.c_fc`.
    #[must_use]
    pub fn open_clip(prefix: &str) -> BlockKeys {
        BlockKeys {
            prefix: prefix.into(),
        }
    }
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`; `x` `[batch, token, dim]`.
pub fn residual_block<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    keys: &BlockKeys,
    x: &Value,
    heads: u64,
    mask: Option<&Value>,
    activation: fn(&mut Graph<'_>, &Value) -> Value,
) -> Value {
    let key = &keys.prefix;
    let dim = x.last();
    let normed = layer_norm(g, s, &format!("{key}ln_1"), x, EPS);
    let act = g.act();
    // Queries, keys and values are stored as one matrix, [3 * dim, dim].
    let weight = s.weight_as(
        g,
        &format!("{key}attn.in_proj_weight"),
        &[3 * dim, dim],
        act,
        &[dim, 3 * dim],
        Layout::Transposed,
    );
    let bias = s.weight(g, &format!("{key}attn.in_proj_bias"), &[3 * dim]);
    let joined = g.matmul(&normed, &weight);
    let joined = g.add(&joined, &bias);
    let axis = joined.shape().len() - 1;
    let [q, k, v] = [0, 1, 2].map(|part| g.slice(&joined, axis, part * dim, (part + 1) * dim));
    let mixed = masked_attention(g, &q, &k, &v, heads, mask);
    let mixed = linear(g, s, &format!("{key}attn.out_proj"), &mixed, dim, true);
    let x = g.add(x, &mixed);
    let normed = layer_norm(g, s, &format!("{key}ln_2"), &x, EPS);
    let inner = linear_to(g, s, &format!("{key}mlp.c_fc"), &normed, true);
    let inner = activation(g, &inner);
    let inner = linear(g, s, &format!("{key}mlp.c_proj"), &inner, dim, true);
    g.add(&x, &inner)
}
