//! A latent autoencoder (`AutoencoderKL`): its decoder in both spellings of its keys, its encoder in
//! sgm's.
//!
//! Decoder: `latent [batch, 4, h, w]` to `image [batch, 3, h * 2^ups, w * 2^ups]`, unscaled and
//! unclamped: the host divides the latent by the scale factor before, and maps to 0..1 after.
//!
//! Encoder: `image [batch, 3, H, W]` in -1..1 to `mean` and `logvar` `[batch, 4, h, w]`, the second
//! clamped to -30..20; the host draws the latent and scales it.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Graph, Layout, Value};
use crate::layers::{attention, conv, conv_out, group_norm, silu};
use crate::section::Section;

const GROUPS: u64 = 32;
const GROUP_NORM_EPS: f32 = 1e-6;
/// Range of the encoder's log variance.
const LOGVAR: [f32; 2] = [-30.0, 20.0];

/// Where the parts of a decoder lie in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecoderKeys {
    /// Prefix up to and including `decoder.`.
    prefix: String,
    norm_out: &'static str,
    shortcut: &'static str,
    middle: [String; 2],
    attention: AttentionKeys,
    /// Up blocks from the smallest to the largest picture.
    ups: Vec<UpKeys>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct AttentionKeys {
    norm: String,
    q: String,
    k: String,
    v: String,
    out: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct UpKeys {
    resnets: Vec<String>,
    upsample: Option<String>,
}

impl DecoderKeys {
    /// The spelling of diffusers, `up_blocks.N.resnets.M`; also its older names of the attention.
    #[must_use]
    pub fn diffusers(s: &Section<'_>, prefix: &str) -> DecoderKeys {
        let middle = format!("{prefix}mid_block.attentions.0.");
        let attention = if s.has(&format!("{middle}query.weight")) {
            ["group_norm", "query", "key", "value", "proj_attn"]
        } else {
            ["group_norm", "to_q", "to_k", "to_v", "to_out.0"]
        };
        let ups = (0..s.count(&format!("{prefix}up_blocks.")))
            .map(|up| {
                let block = format!("{prefix}up_blocks.{up}.");
                let upsample = format!("{block}upsamplers.0.conv");
                UpKeys {
                    resnets: (0..s.count(&format!("{block}resnets.")))
                        .map(|n| format!("{block}resnets.{n}"))
                        .collect(),
                    upsample: s.has_prefix(&format!("{upsample}.")).then_some(upsample),
                }
            })
            .collect();
        DecoderKeys {
            prefix: prefix.into(),
            norm_out: "conv_norm_out",
            shortcut: "conv_shortcut",
            middle: [0, 1].map(|n| format!("{prefix}mid_block.resnets.{n}")),
            attention: AttentionKeys::new(&middle, attention),
            ups,
        }
    }

    /// The spelling of sgm, `up.N.block.M` with `up.0` the largest picture.
    #[must_use]
    pub fn sgm(s: &Section<'_>, prefix: &str) -> DecoderKeys {
        let ups = (0..s.count(&format!("{prefix}up.")))
            .rev()
            .map(|up| {
                let block = format!("{prefix}up.{up}.");
                let upsample = format!("{block}upsample.conv");
                UpKeys {
                    resnets: (0..s.count(&format!("{block}block.")))
                        .map(|n| format!("{block}block.{n}"))
                        .collect(),
                    upsample: s.has_prefix(&format!("{upsample}.")).then_some(upsample),
                }
            })
            .collect();
        DecoderKeys {
            prefix: prefix.into(),
            norm_out: "norm_out",
            shortcut: "nin_shortcut",
            middle: [1, 2].map(|n| format!("{prefix}mid.block_{n}")),
            attention: AttentionKeys::new(
                &format!("{prefix}mid.attn_1."),
                ["norm", "q", "k", "v", "proj_out"],
            ),
            ups,
        }
    }
}

impl AttentionKeys {
    fn new(prefix: &str, [norm, q, k, v, out]: [&str; 5]) -> AttentionKeys {
        let full = |name: &str| format!("{prefix}{name}");
        AttentionKeys {
            norm: full(norm),
            q: full(q),
            k: full(k),
            v: full(v),
            out: full(out),
        }
    }
}

/// Builds the graph of an autoencoder's decoder with its `post_quant_conv`.
///
/// `height` and `width` are the latent's.
#[must_use]
pub fn build<'c>(
    name: &str,
    s: &Section<'c>,
    post_quant_conv: &str,
    keys: &DecoderKeys,
    [height, width]: [u64; 2],
    precision: Precision,
) -> Graph<'c> {
    let mut g = Graph::new(name, precision);
    let channels = s.axis(&format!("{post_quant_conv}.weight"), 4, 1);
    let latent = g.input(
        "latent",
        &[
            BATCH,
            Axis::Len(channels),
            Axis::Len(height),
            Axis::Len(width),
        ],
    );
    let act = g.act();
    let x = g.cast(&latent, act);
    let x = conv(&mut g, s, post_quant_conv, &x, 1, 1);
    let image = decoder(&mut g, s, keys, &x);
    g.output("image", &image);
    g
}

/// The decoder alone: `x` `[batch, in, h, w]` to `[batch, out, h * 2^ups, w * 2^ups]`.
pub fn decoder<'c>(g: &mut Graph<'c>, s: &Section<'c>, keys: &DecoderKeys, x: &Value) -> Value {
    let prefix = &keys.prefix;
    if keys.ups.is_empty() {
        s.problem(prefix, "expected up blocks, found none".into());
    }
    let x = conv(g, s, &format!("{prefix}conv_in"), x, 3, 1);
    let x = resnet(g, s, keys.shortcut, &keys.middle[0], &x);
    let x = middle_attention(g, s, &keys.attention, &x);
    let mut x = resnet(g, s, keys.shortcut, &keys.middle[1], &x);
    for up in &keys.ups {
        for key in &up.resnets {
            x = resnet(g, s, keys.shortcut, key, &x);
        }
        if let Some(key) = &up.upsample {
            let larger = g.upsample(&x);
            x = conv_out(g, s, key, &larger, larger.len(1), 3, 1);
        }
    }
    let x = group_norm(
        g,
        s,
        &format!("{prefix}{}", keys.norm_out),
        &x,
        GROUPS,
        GROUP_NORM_EPS,
    );
    let x = silu(g, &x);
    conv(g, s, &format!("{prefix}conv_out"), &x, 3, 1)
}

/// Whether a checkpoint holds sgm's encoder under this prefix.
#[must_use]
pub fn has_encoder(s: &Section<'_>, prefix: &str) -> bool {
    s.has_prefix(&format!("{prefix}encoder.")) && s.has_prefix(&format!("{prefix}quant_conv."))
}

/// Pixels along one side of a latent element.
#[must_use]
pub fn pixels_per_latent(s: &Section<'_>, prefix: &str) -> u64 {
    let downs = s.count(&format!("{prefix}encoder.down."));
    let halves = |down: &u64| s.has_prefix(&format!("{prefix}encoder.down.{down}.downsample."));
    1 << (0..downs).filter(halves).count().min(16)
}

/// Builds the graph of sgm's encoder with its `quant_conv`, for latents of `height` and `width`.
#[must_use]
pub fn build_encoder<'c>(
    name: &str,
    s: &Section<'c>,
    prefix: &str,
    [height, width]: [u64; 2],
    precision: Precision,
) -> Graph<'c> {
    let mut graph = Graph::new(name, precision);
    let g = &mut graph;
    let channels = s.axis(&format!("{prefix}encoder.conv_in.weight"), 4, 1);
    let pixels = pixels_per_latent(s, prefix);
    let (rows, columns) = (Axis::Len(height * pixels), Axis::Len(width * pixels));
    let image = g.input("image", &[BATCH, Axis::Len(channels), rows, columns]);
    let act = g.act();
    let x = g.cast(&image, act);
    let encoder = format!("{prefix}encoder.");
    let mut x = conv(g, s, &format!("{encoder}conv_in"), &x, 3, 1);
    for down in 0..s.count(&format!("{encoder}down.")) {
        let block = format!("{encoder}down.{down}.");
        for n in 0..s.count(&format!("{block}block.")) {
            x = resnet(g, s, "nin_shortcut", &format!("{block}block.{n}"), &x);
        }
        let key = format!("{block}downsample.conv");
        if s.has_prefix(&format!("{key}.")) {
            let width = x.len(1);
            let weight = s.weight(g, &format!("{key}.weight"), &[width, width, 3, 3]);
            let bias = s.weight(g, &format!("{key}.bias"), &[width]);
            x = g.conv_halving(&x, &weight, &bias);
        }
    }
    let middle = format!("{encoder}mid.");
    let x = resnet(g, s, "nin_shortcut", &format!("{middle}block_1"), &x);
    let attention = AttentionKeys::new(
        &format!("{middle}attn_1."),
        ["norm", "q", "k", "v", "proj_out"],
    );
    let x = middle_attention(g, s, &attention, &x);
    let x = resnet(g, s, "nin_shortcut", &format!("{middle}block_2"), &x);
    let x = group_norm(
        g,
        s,
        &format!("{encoder}norm_out"),
        &x,
        GROUPS,
        GROUP_NORM_EPS,
    );
    let x = silu(g, &x);
    let x = conv(g, s, &format!("{encoder}conv_out"), &x, 3, 1);
    let moments = conv(g, s, &format!("{prefix}quant_conv"), &x, 1, 1);
    let half = moments.len(1) / 2;
    let mean = g.slice(&moments, 1, 0, half);
    let logvar = g.slice(&moments, 1, half, 2 * half);
    let logvar = g.clip(&logvar, LOGVAR[0], LOGVAR[1]);
    g.output("mean", &mean);
    g.output("logvar", &logvar);
    graph
}

fn resnet<'c>(g: &mut Graph<'c>, s: &Section<'c>, shortcut: &str, key: &str, x: &Value) -> Value {
    let h = group_norm(g, s, &format!("{key}.norm1"), x, GROUPS, GROUP_NORM_EPS);
    let h = silu(g, &h);
    let h = conv(g, s, &format!("{key}.conv1"), &h, 3, 1);
    let h = group_norm(g, s, &format!("{key}.norm2"), &h, GROUPS, GROUP_NORM_EPS);
    let h = silu(g, &h);
    let h = conv_out(g, s, &format!("{key}.conv2"), &h, h.len(1), 3, 1);
    let skip = if h.len(1) == x.len(1) {
        x.clone()
    } else {
        conv_out(g, s, &format!("{key}.{shortcut}"), x, h.len(1), 1, 1)
    };
    g.add(&skip, &h)
}

/// Single-head attention over the pixels; its weights are matrices or 1 x 1 convolutions.
fn middle_attention<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    keys: &AttentionKeys,
    x: &Value,
) -> Value {
    let (channels, height, width) = (x.len(1), x.len(2), x.len(3));
    let normed = group_norm(g, s, &keys.norm, x, GROUPS, GROUP_NORM_EPS);
    let rows = g.reshape(
        &normed,
        &[BATCH, Axis::Len(channels), Axis::Len(height * width)],
    );
    let rows = g.transpose(&rows, &[0, 2, 1]);
    let q = pixel_linear(g, s, &keys.q, &rows);
    let k = pixel_linear(g, s, &keys.k, &rows);
    let v = pixel_linear(g, s, &keys.v, &rows);
    let mixed = attention(g, &q, &k, &v, 1);
    let mixed = pixel_linear(g, s, &keys.out, &mixed);
    let map = g.transpose(&mixed, &[0, 2, 1]);
    let map = g.reshape(&map, x.shape());
    g.add(x, &map)
}

fn pixel_linear<'c>(g: &mut Graph<'c>, s: &Section<'c>, key: &str, rows: &Value) -> Value {
    let width = rows.last();
    let name = format!("{key}.weight");
    let stored: &[u64] = match s.shape(&name) {
        Some(shape) if shape.len() == 4 => &[width, width, 1, 1],
        _ => &[width, width],
    };
    let act = g.act();
    let weight = s.weight_as(g, &name, stored, act, &[width, width], Layout::Transposed);
    let bias = s.weight(g, &format!("{key}.bias"), &[width]);
    let product = g.matmul(rows, &weight);
    g.add(&product, &bias)
}
