//! The MindEye2 backbone: hidden vector to CLIP tokens, retrieval embedding and blurry latent.
//!
//! `ridge [batch, seq, hidden]` to `brain_tokens [batch, tokens, dim]`, `retrieval` (the projector's
//! output, where the checkpoint has one) and `blurry_latent [batch, 4, h, w]` (where it has the
//! blurry head). The auxiliary head `b_maps_projector` is a training target and not exported.
//!
//! With one sequence token the second mixer of each block normalises a single element: the
//! normalised value is exactly 0, the mixer's output a constant, and because the two residual
//! streams are separate, the first mixers cannot reach the result. The trunk is then the ridge
//! output plus one scalar per block, computed here in double precision. In the original's float32
//! the norm leaves rounding noise instead; `ref64/*` of the goldens is the exact result.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Elem, Graph, Layout, Value};
use crate::layers::{gelu, group_norm, layer_norm, linear};
use crate::section::Section;
use crate::stages::autoencoder;

const LAYER_NORM_EPS: f32 = 1e-5;

/// Widths of a backbone, as its weights tell them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackboneShape {
    /// Width of the ridge output.
    pub hidden: u64,
    /// Sequence tokens, 1 in the released models.
    pub seq: u64,
    /// Mixer blocks.
    pub blocks: u64,
    /// CLIP image tokens.
    pub tokens: u64,
    /// Channels of a token.
    pub dim: u64,
}

impl BackboneShape {
    /// Reads the widths.
    #[must_use]
    pub fn read(s: &Section<'_>) -> BackboneShape {
        let hidden = s.axis("backbone.mixer_blocks1.0.0.weight", 1, 0);
        let seq = s.axis("backbone.mixer_blocks2.0.0.weight", 1, 0);
        let rows = s.axis("backbone.backbone_linear.bias", 1, 0);
        let dim = if s.has_prefix("backbone.clip_proj.") {
            s.axis("backbone.clip_proj.0.weight", 1, 0)
        } else {
            s.axis("diffusion_prior.net.null_image_embed", 2, 1)
        };
        if !rows.is_multiple_of(dim) {
            s.problem(
                "backbone.backbone_linear.bias",
                format!("expected a multiple of the token width {dim}, found {rows} rows"),
            );
        }
        BackboneShape {
            hidden,
            seq,
            blocks: s.count("backbone.mixer_blocks2."),
            tokens: (rows / dim).max(1),
            dim,
        }
    }
}

/// Builds the graph.
#[must_use]
pub fn build<'c>(s: &Section<'c>, shape: BackboneShape, precision: Precision) -> Graph<'c> {
    let mut g = Graph::new("backbone", precision);
    let BackboneShape {
        hidden,
        seq,
        tokens,
        dim,
        ..
    } = shape;
    let ridge = g.input("ridge", &[BATCH, Axis::Len(seq), Axis::Len(hidden)]);
    let trunk = if seq == 1 {
        constant_mixers(&mut g, s, &ridge, shape)
    } else {
        mixers(&mut g, s, &ridge, shape)
    };
    let flat = g.reshape(&trunk, &[BATCH, Axis::Len(seq * hidden)]);
    let key = "backbone.backbone_linear";
    let brain_tokens = if precision == Precision::Int8 {
        quantised_tokens(&mut g, s, key, &flat, shape)
    } else {
        let rows = linear(&mut g, s, key, &flat, tokens * dim, true);
        g.reshape(&rows, &[BATCH, Axis::Len(tokens), Axis::Len(dim)])
    };
    g.output("brain_tokens", &brain_tokens);
    if s.has_prefix("backbone.clip_proj.") {
        let retrieval = projector(&mut g, s, &brain_tokens);
        g.output("retrieval", &retrieval);
    }
    if s.has_prefix("backbone.blin1.") || s.has_prefix("backbone.bupsampler.") {
        let latent = blurry_head(&mut g, s, &flat);
        g.output("blurry_latent", &latent);
    }
    s.ignore("backbone.b_maps_projector.");
    g
}

/// The largest layer in 8-bit integers, a band of its rows for each token: bands are turned one by
/// one, which a matrix of seven gigabytes could not be as a whole.
fn quantised_tokens<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    key: &str,
    flat: &Value,
    shape: BackboneShape,
) -> Value {
    let (name, inner) = (format!("{key}.weight"), flat.last());
    let BackboneShape { tokens, dim, .. } = shape;
    let stored = [tokens * dim, inner];
    let bands = [tokens, inner, dim];
    let weight = s.weight_as(g, &name, &stored, Elem::I8, &bands, Layout::Quantised);
    let scales = s.weight_as(
        g,
        &name,
        &stored,
        Elem::F32,
        &[tokens, 1, dim],
        Layout::Scales,
    );
    let bias = s.weight_as(
        g,
        &format!("{key}.bias"),
        &[tokens * dim],
        Elem::F32,
        &[tokens, dim],
        Layout::AsStored,
    );
    let rows = g.reshape(flat, &[Axis::Len(1), BATCH, Axis::Len(inner)]);
    let products = g.matmul_dynamic(&rows, &weight, &scales, None);
    let products = g.transpose(&products, &[1, 0, 2]);
    g.add(&products, &bias)
}

/// The mixers where one sequence token makes each block add a constant.
fn constant_mixers<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    ridge: &Value,
    shape: BackboneShape,
) -> Value {
    let mut sum = 0.0_f64;
    for block in 0..shape.blocks {
        require_first_mixer(s, block, shape.hidden);
        let key = format!("backbone.mixer_blocks2.{block}");
        let read = |name: &str, len: &[u64]| {
            s.read(&format!("{key}.{name}"), len)
                .first()
                .copied()
                .map_or(0.0, f64::from)
        };
        s.require(&format!("{key}.0.weight"), &[1]);
        let normed = read("0.bias", &[1]);
        let inner = read("1.0.weight", &[1, 1]) * normed + read("1.0.bias", &[1]);
        let inner = 0.5 * inner * (1.0 + libm::erf(inner / std::f64::consts::SQRT_2));
        sum += read("1.3.weight", &[1, 1]) * inner + read("1.3.bias", &[1]);
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "computed in double precision, stored in single"
    )]
    let shift = g.table("mixer_constant", Elem::F32, &[1], vec![sum as f32]);
    // Kept in fp32: the constant may be small beside the hidden values it is added to.
    let moved = g.add(ridge, &shift);
    let act = g.act();
    g.cast(&moved, act)
}

fn require_first_mixer(s: &Section<'_>, block: u64, hidden: u64) {
    let key = format!("backbone.mixer_blocks1.{block}");
    for name in ["0.weight", "0.bias", "1.0.bias", "1.3.bias"] {
        s.require(&format!("{key}.{name}"), &[hidden]);
    }
    for name in ["1.0.weight", "1.3.weight"] {
        s.require(&format!("{key}.{name}"), &[hidden, hidden]);
    }
}

/// The mixers as the original runs them: two residual streams, each mixer adds its own.
fn mixers<'c>(g: &mut Graph<'c>, s: &Section<'c>, ridge: &Value, shape: BackboneShape) -> Value {
    let act = g.act();
    let mut x = g.cast(ridge, act);
    let mut residual1 = x.clone();
    let mut residual2 = g.transpose(&x, &[0, 2, 1]);
    for block in 0..shape.blocks {
        let mixed = mixer(g, s, &format!("backbone.mixer_blocks1.{block}"), &x);
        residual1 = g.add(&mixed, &residual1);
        let turned = g.transpose(&residual1, &[0, 2, 1]);
        let mixed = mixer(g, s, &format!("backbone.mixer_blocks2.{block}"), &turned);
        residual2 = g.add(&mixed, &residual2);
        x = g.transpose(&residual2, &[0, 2, 1]);
    }
    x
}

fn mixer<'c>(g: &mut Graph<'c>, s: &Section<'c>, key: &str, x: &Value) -> Value {
    let width = x.last();
    let x = layer_norm(g, s, &format!("{key}.0"), x, LAYER_NORM_EPS);
    let x = linear(g, s, &format!("{key}.1.0"), &x, width, true);
    let x = gelu(g, &x);
    linear(g, s, &format!("{key}.1.3"), &x, width, true)
}

/// Three times layer norm, GELU, linear.
fn projector<'c>(g: &mut Graph<'c>, s: &Section<'c>, tokens: &Value) -> Value {
    let width = tokens.last();
    let mut x = tokens.clone();
    for layer in [0, 3, 6] {
        x = layer_norm(
            g,
            s,
            &format!("backbone.clip_proj.{layer}"),
            &x,
            LAYER_NORM_EPS,
        );
        x = gelu(g, &x);
        x = linear(
            g,
            s,
            &format!("backbone.clip_proj.{}", layer + 2),
            &x,
            width,
            true,
        );
    }
    x
}

/// Features to a square map of the norm's channels, then a VAE-style decoder to the latent.
fn blurry_head<'c>(g: &mut Graph<'c>, s: &Section<'c>, flat: &Value) -> Value {
    let features = s.axis("backbone.blin1.bias", 1, 0);
    let channels = s.axis("backbone.bnorm.weight", 1, 0);
    let side = (features / channels).isqrt();
    if side * side * channels != features || side == 0 {
        let message =
            format!("expected {channels} channels times a square map, found {features} features");
        s.problem("backbone.blin1.bias", message);
    }
    let side = side.max(1);
    let x = linear(g, s, "backbone.blin1", flat, side * side * channels, true);
    let x = g.reshape(
        &x,
        &[BATCH, Axis::Len(channels), Axis::Len(side), Axis::Len(side)],
    );
    let x = group_norm(g, s, "backbone.bnorm", &x, 1, 1e-5);
    autoencoder::decoder(
        g,
        s,
        &autoencoder::DecoderKeys::diffusers(s, "backbone.bupsampler."),
        &x,
    )
}
