//! The denoising UNet of sgm (`openaimodel.UNetModel`): unCLIP and SDXL alike.
//!
//! `latent [batch, 4, h, w]` (already scaled), `timestep [batch]`, `context [batch, tokens, dim]`,
//! `vector [batch, adm]` to `eps [batch, 4, h, w]`. Channels, depths, where attention sits and how
//! deep it is all come from the keys; head width and latent size are arguments.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Graph, Value};
use crate::layers::{
    Sinusoids, as_f64, attention, conv, conv_out, frequencies, gelu, group_norm, layer_norm,
    linear, linear_to, product, silu, sinusoids,
};
use crate::section::Section;

const PREFIX: &str = "model.diffusion_model.";
const GROUPS: u64 = 32;
const BLOCK_NORM_EPS: f32 = 1e-5;
const TRANSFORMER_NORM_EPS: f32 = 1e-6;
const LAYER_NORM_EPS: f32 = 1e-5;

/// What a UNet's weights do not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnetOptions {
    /// Channels of one attention head.
    pub head_channels: u64,
    /// Latent rows and columns.
    pub latent: [u64; 2],
    /// Tokens of the context.
    pub tokens: u64,
}

/// Length of the conditioning vector.
#[must_use]
pub fn vector_len(s: &Section<'_>) -> u64 {
    s.axis(&format!("{PREFIX}label_emb.0.0.weight"), 2, 1)
}

/// Latent channels.
#[must_use]
pub fn latent_channels(s: &Section<'_>) -> u64 {
    s.axis(&format!("{PREFIX}input_blocks.0.0.weight"), 4, 1)
}

struct Unet<'s, 'c> {
    s: &'s Section<'c>,
    head_channels: u64,
    /// SiLU of the time embedding, `[batch, width]`: what every residual block reads.
    embedding: Value,
    context: Value,
}

/// Builds the graph.
#[must_use]
pub fn build<'c>(
    name: &str,
    s: &Section<'c>,
    options: UnetOptions,
    precision: Precision,
) -> Graph<'c> {
    let mut graph = Graph::new(name, precision);
    graph.quantise(precision);
    let g = &mut graph;
    let [height, width] = options.latent;
    let channels = latent_channels(s);
    let model_channels = s.axis(&format!("{PREFIX}input_blocks.0.0.weight"), 4, 0);
    let latent = g.input(
        "latent",
        &[
            BATCH,
            Axis::Len(channels),
            Axis::Len(height),
            Axis::Len(width),
        ],
    );
    let timestep = g.input("timestep", &[BATCH]);
    let context = g.input(
        "context",
        &[
            BATCH,
            Axis::Len(options.tokens),
            Axis::Len(context_width(s)),
        ],
    );
    let vector = g.input("vector", &[BATCH, Axis::Len(vector_len(s))]);
    check_latent(s, options.latent);

    let act = g.act();
    let embedding = embedding(g, s, &timestep, &vector, model_channels);
    let unet = Unet {
        s,
        head_channels: options.head_channels,
        embedding,
        context: g.cast(&context, act),
    };

    let mut x = g.cast(&latent, act);
    let mut skips = Vec::new();
    for block in 0..s.count(&format!("{PREFIX}input_blocks.")) {
        x = unet.sequence(g, &format!("{PREFIX}input_blocks.{block}."), &x);
        skips.push(x.clone());
    }
    x = unet.sequence(g, &format!("{PREFIX}middle_block."), &x);
    for block in 0..s.count(&format!("{PREFIX}output_blocks.")) {
        let prefix = format!("{PREFIX}output_blocks.{block}.");
        let Some(skip) = skips.pop() else {
            s.problem(
                &prefix,
                "expected as many output as input blocks, found more".into(),
            );
            break;
        };
        if skip.shape()[2..] != x.shape()[2..] {
            let message = format!(
                "expected maps of {:?} as its input block has, found {:?}",
                &skip.shape()[2..],
                &x.shape()[2..]
            );
            s.problem(&prefix, message);
            break;
        }
        let joined = g.concat(&[&x, &skip], 1);
        x = unet.sequence(g, &prefix, &joined);
    }
    if !skips.is_empty() {
        let message = format!(
            "expected as many output as input blocks, found {} fewer",
            skips.len()
        );
        s.problem(&format!("{PREFIX}output_blocks"), message);
    }
    let x = group_norm(g, s, &format!("{PREFIX}out.0"), &x, GROUPS, BLOCK_NORM_EPS);
    let x = silu(g, &x);
    let x = conv_out(g, s, &format!("{PREFIX}out.2"), &x, channels, 3, 1);
    g.output("eps", &x);
    graph
}

/// Latents must halve evenly as often as the network does, or the up path does not meet the down path.
fn check_latent(s: &Section<'_>, latent: [u64; 2]) {
    let halvings = (0..s.count(&format!("{PREFIX}input_blocks.")))
        .filter(|block| s.has(&format!("{PREFIX}input_blocks.{block}.0.op.weight")))
        .count();
    let unit = 1_u64 << halvings.min(16);
    if latent.iter().any(|&len| len == 0 || len % unit != 0) {
        s.problem(
            "latent_hw",
            format!(
                "expected multiples of {unit} for {halvings} halvings, found {} x {}",
                latent[0], latent[1]
            ),
        );
    }
}

/// Channels of the context, from the first cross-attention.
fn context_width(s: &Section<'_>) -> u64 {
    context_key(s).map_or_else(
        || {
            s.problem(
                PREFIX,
                "expected a cross-attention attn2.to_k, found none".into(),
            );
            1
        },
        |key| s.axis(&key, 2, 1),
    )
}

fn context_key(s: &Section<'_>) -> Option<String> {
    (0..s.count(&format!("{PREFIX}input_blocks.")))
        .map(|block| format!("{PREFIX}input_blocks.{block}.1."))
        .chain([format!("{PREFIX}middle_block.1.")])
        .map(|prefix| format!("{prefix}transformer_blocks.0.attn2.to_k.weight"))
        .find(|key| s.has(key))
}

/// SiLU of (network of the timestep's sinusoids + network of the vector); `[batch, width]`.
fn embedding<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    timestep: &Value,
    vector: &Value,
    model_channels: u64,
) -> Value {
    if !model_channels.is_multiple_of(2) || model_channels < 2 {
        let message = format!("expected an even number of channels, found {model_channels}");
        s.problem(&format!("{PREFIX}input_blocks.0.0.weight"), message);
    }
    let half = (model_channels / 2).max(1);
    let act = g.act();
    let waves = sinusoids(
        g,
        timestep,
        "time_frequencies",
        frequencies(half, as_f64(half)),
        Sinusoids::CosSin,
    );
    let waves = g.cast(&waves, act);
    let time = linear_to(g, s, &format!("{PREFIX}time_embed.0"), &waves, true);
    let time = silu(g, &time);
    let time = linear_to(g, s, &format!("{PREFIX}time_embed.2"), &time, true);
    let vector = g.cast(vector, act);
    let label = linear_to(g, s, &format!("{PREFIX}label_emb.0.0"), &vector, true);
    let label = silu(g, &label);
    let label = linear(
        g,
        s,
        &format!("{PREFIX}label_emb.0.2"),
        &label,
        time.last(),
        true,
    );
    let sum = g.add(&time, &label);
    silu(g, &sum)
}

impl<'c> Unet<'_, 'c> {
    /// The modules `0`, `1`, … of one block, each told by the keys it has.
    fn sequence(&self, g: &mut Graph<'c>, prefix: &str, x: &Value) -> Value {
        let s = self.s;
        let mut x = x.clone();
        for module in s.numbers(prefix) {
            let key = format!("{prefix}{module}");
            x = if s.has_prefix(&format!("{key}.in_layers.")) {
                self.resblock(g, &key, &x)
            } else if s.has_prefix(&format!("{key}.transformer_blocks.")) {
                self.transformer(g, &key, &x)
            } else if s.has_prefix(&format!("{key}.op.")) {
                conv_out(g, s, &format!("{key}.op"), &x, x.len(1), 3, 2)
            } else if s.has_prefix(&format!("{key}.conv.")) {
                let larger = g.upsample(&x);
                conv_out(g, s, &format!("{key}.conv"), &larger, larger.len(1), 3, 1)
            } else if s.has(&format!("{key}.weight")) {
                conv(g, s, &key, &x, 3, 1)
            } else {
                s.problem(
                    &key,
                    "expected a residual block, a transformer, a convolution or a change of size"
                        .into(),
                );
                x
            };
        }
        x
    }

    fn resblock(&self, g: &mut Graph<'c>, key: &str, x: &Value) -> Value {
        let s = self.s;
        let h = group_norm(
            g,
            s,
            &format!("{key}.in_layers.0"),
            x,
            GROUPS,
            BLOCK_NORM_EPS,
        );
        let h = silu(g, &h);
        let h = conv(g, s, &format!("{key}.in_layers.2"), &h, 3, 1);
        let channels = h.len(1);
        let shift = linear(
            g,
            s,
            &format!("{key}.emb_layers.1"),
            &self.embedding,
            channels,
            true,
        );
        let shift = g.reshape(
            &shift,
            &[BATCH, Axis::Len(channels), Axis::Len(1), Axis::Len(1)],
        );
        let h = g.add(&h, &shift);
        let h = group_norm(
            g,
            s,
            &format!("{key}.out_layers.0"),
            &h,
            GROUPS,
            BLOCK_NORM_EPS,
        );
        let h = silu(g, &h);
        let h = conv_out(g, s, &format!("{key}.out_layers.3"), &h, channels, 3, 1);
        let skip = if channels == x.len(1) {
            x.clone()
        } else {
            conv_out(g, s, &format!("{key}.skip_connection"), x, channels, 1, 1)
        };
        g.add(&skip, &h)
    }

    fn transformer(&self, g: &mut Graph<'c>, key: &str, x: &Value) -> Value {
        let s = self.s;
        let (channels, height, width) = (x.len(1), x.len(2), x.len(3));
        let normed = group_norm(
            g,
            s,
            &format!("{key}.norm"),
            x,
            GROUPS,
            TRANSFORMER_NORM_EPS,
        );
        let rows = g.reshape(
            &normed,
            &[BATCH, Axis::Len(channels), Axis::Len(height * width)],
        );
        let rows = g.transpose(&rows, &[0, 2, 1]);
        let mut h = self.projection(g, &format!("{key}.proj_in"), &rows, None);
        for block in 0..s.count(&format!("{key}.transformer_blocks.")) {
            h = self.transformer_block(g, &format!("{key}.transformer_blocks.{block}"), &h);
        }
        let h = self.projection(g, &format!("{key}.proj_out"), &h, Some(channels));
        let h = g.transpose(&h, &[0, 2, 1]);
        let h = g.reshape(&h, x.shape());
        g.add(x, &h)
    }

    /// `proj_in` and `proj_out`: matrices, or 1 x 1 convolutions in older checkpoints.
    fn projection(&self, g: &mut Graph<'c>, key: &str, rows: &Value, out: Option<u64>) -> Value {
        let name = format!("{key}.weight");
        let inner = rows.last();
        let stored = self.s.shape(&name).unwrap_or_default();
        let out = out.unwrap_or_else(|| self.s.axis(&name, stored.len().max(2), 0));
        let expected: &[u64] = if stored.len() == 4 {
            &[out, inner, 1, 1]
        } else {
            &[out, inner]
        };
        let bias = self.s.weight(g, &format!("{key}.bias"), &[out]);
        product(g, self.s, &name, expected, rows, Some(&bias))
    }

    fn transformer_block(&self, g: &mut Graph<'c>, key: &str, x: &Value) -> Value {
        let s = self.s;
        let normed = layer_norm(g, s, &format!("{key}.norm1"), x, LAYER_NORM_EPS);
        let h = self.attend(g, &format!("{key}.attn1"), &normed, &normed);
        let x = g.add(&h, x);
        let normed = layer_norm(g, s, &format!("{key}.norm2"), &x, LAYER_NORM_EPS);
        let h = self.attend(g, &format!("{key}.attn2"), &normed, &self.context);
        let x = g.add(&h, &x);
        let normed = layer_norm(g, s, &format!("{key}.norm3"), &x, LAYER_NORM_EPS);
        let inner = s.axis(&format!("{key}.ff.net.2.weight"), 2, 1);
        let both = linear(
            g,
            s,
            &format!("{key}.ff.net.0.proj"),
            &normed,
            2 * inner,
            true,
        );
        let value = g.slice(&both, 2, 0, inner);
        let gate = g.slice(&both, 2, inner, 2 * inner);
        let gate = gelu(g, &gate);
        let gated = g.mul(&value, &gate);
        let h = linear(g, s, &format!("{key}.ff.net.2"), &gated, x.last(), true);
        g.add(&h, &x)
    }

    fn attend(&self, g: &mut Graph<'c>, key: &str, x: &Value, source: &Value) -> Value {
        let s = self.s;
        let inner = s.axis(&format!("{key}.to_q.weight"), 2, 0);
        let heads = if inner.is_multiple_of(self.head_channels) {
            inner / self.head_channels
        } else {
            let message = format!(
                "expected a multiple of num_head_channels = {}, found {inner} rows",
                self.head_channels
            );
            s.problem(&format!("{key}.to_q.weight"), message);
            1
        };
        let q = linear(g, s, &format!("{key}.to_q"), x, inner, false);
        let k = linear(g, s, &format!("{key}.to_k"), source, inner, false);
        let v = linear(g, s, &format!("{key}.to_v"), source, inner, false);
        let mixed = attention(g, &q, &k, &v, heads);
        linear(g, s, &format!("{key}.to_out.0"), &mixed, x.last(), true)
    }
}
