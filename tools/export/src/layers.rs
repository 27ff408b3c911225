//! Layers that several networks share, written with the graph's operators.
//!
//! Precision: linear layers and convolutions run in the activation type; statistics of norms,
//! softmax and embeddings of time run in fp32 whatever the activation type is.

use crate::graph::{Axis, BATCH, Elem, Graph, Layout, Reduction, Value};
use crate::section::Section;

/// Linear layer `<key>.weight` `[out, in]`, with bias where asked, on the last axis of `x`.
///
/// Two axes become a Gemm, so that the largest matrices are written as stored; more axes a MatMul.
pub fn linear<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    key: &str,
    x: &Value,
    out: u64,
    bias: bool,
) -> Value {
    let inner = x.last();
    let bias = bias.then(|| s.weight(g, &format!("{key}.bias"), &[out]));
    if x.shape().len() == 2 {
        let weight = s.weight(g, &format!("{key}.weight"), &[out, inner]);
        return g.gemm(x, &weight, bias.as_ref());
    }
    product(
        g,
        s,
        &format!("{key}.weight"),
        &[out, inner],
        x,
        bias.as_ref(),
    )
}

/// `x` `[.., row, in]` times the transpose of a matrix `[out, in]` (`stored` are its axes in the
/// checkpoint, perhaps with ones behind), plus `bias` `[out]`; in 8-bit integers where the graph is quantised.
pub fn product<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    name: &str,
    stored: &[u64],
    x: &Value,
    bias: Option<&Value>,
) -> Value {
    let turned = [stored[1], stored[0]];
    if g.is_quantised() {
        let weight = s.weight_as(g, name, stored, Elem::I8, &turned, Layout::Quantised);
        let scales = s.weight_as(g, name, stored, Elem::F32, &[stored[0]], Layout::Scales);
        return g.matmul_dynamic(x, &weight, &scales, bias);
    }
    let act = g.act();
    let weight = s.weight_as(g, name, stored, act, &turned, Layout::Transposed);
    let product = g.matmul(x, &weight);
    match bias {
        Some(bias) => g.add(&product, bias),
        None => product,
    }
}

/// Linear layer whose width is read from its weight.
pub fn linear_to<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    key: &str,
    x: &Value,
    bias: bool,
) -> Value {
    let out = s.axis(&format!("{key}.weight"), 2, 0);
    linear(g, s, key, x, out, bias)
}

/// Convolution `<key>` with bias and half-kernel padding; its kernel is given, its width read from the weight.
pub fn conv<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    key: &str,
    x: &Value,
    kernel: u64,
    stride: u64,
) -> Value {
    let out = s.axis(&format!("{key}.weight"), 4, 0);
    conv_out(g, s, key, x, out, kernel, stride)
}

/// Convolution `<key>` with bias to `out` channels.
pub fn conv_out<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    key: &str,
    x: &Value,
    out: u64,
    kernel: u64,
    stride: u64,
) -> Value {
    let weight = s.weight(
        g,
        &format!("{key}.weight"),
        &[out, x.len(1), kernel, kernel],
    );
    let bias = s.weight(g, &format!("{key}.bias"), &[out]);
    g.conv(x, &weight, &bias, stride)
}

/// Layer norm `<key>.weight`, `<key>.bias` over the last axis, in fp32.
pub fn layer_norm<'c>(g: &mut Graph<'c>, s: &Section<'c>, key: &str, x: &Value, eps: f32) -> Value {
    let width = [x.last()];
    let gain = s.weight_as(
        g,
        &format!("{key}.weight"),
        &width,
        Elem::F32,
        &width,
        Layout::AsStored,
    );
    let bias = s.weight_as(
        g,
        &format!("{key}.bias"),
        &width,
        Elem::F32,
        &width,
        Layout::AsStored,
    );
    let wide = g.cast(x, Elem::F32);
    let normed = g.layer_norm(&wide, &gain, Some(&bias), eps);
    g.cast(&normed, x.elem())
}

/// Group norm `<key>.weight`, `<key>.bias` of `x` `[batch, channel, height, width]`, in fp32.
///
/// Reshape, InstanceNormalization, Reshape, Mul, Add: three times cheaper on CPUs than the
/// decomposed GroupNormalization and readable for TensorRT 10.3.
pub fn group_norm<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    key: &str,
    x: &Value,
    groups: u64,
    eps: f32,
) -> Value {
    let channels = x.len(1);
    if !channels.is_multiple_of(groups) {
        s.problem(
            &format!("{key}.weight"),
            format!("expected a multiple of {groups} channels, found {channels}"),
        );
        return x.clone();
    }
    let affine = [channels, 1, 1];
    let gain = s.weight_as(
        g,
        &format!("{key}.weight"),
        &[channels],
        Elem::F32,
        &affine,
        Layout::AsStored,
    );
    let bias = s.weight_as(
        g,
        &format!("{key}.bias"),
        &[channels],
        Elem::F32,
        &affine,
        Layout::AsStored,
    );
    let wide = g.cast(x, Elem::F32);
    let (height, width) = (x.len(2), x.len(3));
    let grouped = g.reshape(
        &wide,
        &[
            x.shape()[0],
            Axis::Len(groups),
            Axis::Len(channels / groups * height * width),
        ],
    );
    let normed = g.instance_norm(&grouped, eps);
    let normed = g.reshape(&normed, x.shape());
    let scaled = g.mul(&normed, &gain);
    let shifted = g.add(&scaled, &bias);
    g.cast(&shifted, x.elem())
}

/// Exact GELU, `x/2 (1 + erf(x / sqrt 2))`.
pub fn gelu(g: &mut Graph<'_>, x: &Value) -> Value {
    let root = g.scalar(std::f32::consts::SQRT_2, x.elem());
    let scaled = g.div(x, &root);
    let erf = g.erf(&scaled);
    let one = g.scalar(1.0, x.elem());
    let raised = g.add(&erf, &one);
    let product = g.mul(x, &raised);
    g.scale(&product, 0.5)
}

/// SiLU, `x sigmoid(x)`.
pub fn silu(g: &mut Graph<'_>, x: &Value) -> Value {
    let sigmoid = g.sigmoid(x);
    g.mul(x, &sigmoid)
}

/// `x` over its Euclidean norm along the last axis, times `factor`; in fp32, norm at least 1e-12.
pub fn l2_normalise(g: &mut Graph<'_>, x: &Value, factor: f32) -> Value {
    let wide = g.cast(x, Elem::F32);
    let norm = g.reduce_last(Reduction::L2, &wide);
    let floor = g.scalar(1e-12, Elem::F32);
    let norm = g.max(&norm, &floor);
    let unit = g.div(&wide, &norm);
    let scaled = g.scale(&unit, factor);
    g.cast(&scaled, x.elem())
}

/// Softmax over the last axis, in fp32.
pub fn softmax(g: &mut Graph<'_>, x: &Value) -> Value {
    let wide = g.cast(x, Elem::F32);
    let shares = g.softmax(&wide);
    g.cast(&shares, x.elem())
}

/// `x sigmoid(1.702 x)`, the GELU of the first CLIP models.
pub fn quick_gelu(g: &mut Graph<'_>, x: &Value) -> Value {
    let scaled = g.scale(x, 1.702);
    let sigmoid = g.sigmoid(&scaled);
    g.mul(x, &sigmoid)
}

/// `x` `[batch, n, heads * width]` as `[batch, n, head, width]`, its axes in the given order.
pub fn split_heads(g: &mut Graph<'_>, x: &Value, heads: u64, order: [usize; 4]) -> Value {
    let axes = [
        BATCH,
        Axis::Len(x.len(1)),
        Axis::Len(heads),
        Axis::Len(x.last() / heads),
    ];
    let x = g.reshape(x, &axes);
    g.transpose(&x, &order)
}

/// Attention of `q` `[batch, n, inner]` over `k`, `v` `[batch, m, inner]` in `heads` heads; `[batch, n, inner]`.
pub fn attention(g: &mut Graph<'_>, q: &Value, k: &Value, v: &Value, heads: u64) -> Value {
    masked_attention(g, q, k, v, heads, None)
}

/// What hides later tokens from earlier ones: `[n, n]`, zero or a number whose softmax share is zero.
pub fn causal_mask(g: &mut Graph<'_>, tokens: u64) -> Value {
    // Finite, and far within half precision: a row is never hidden altogether.
    const HIDDEN: f32 = decoder::caption::HIDDEN;
    let side = usize::try_from(tokens).expect("token counts fit memory");
    let row = |query: usize| (0..side).map(move |key| if key > query { HIDDEN } else { 0.0 });
    let values = (0..side).flat_map(row).collect();
    let act = g.act();
    g.table(
        &format!("causal_mask_{tokens}"),
        act,
        &[tokens, tokens],
        values,
    )
}

/// As [`attention`], with `mask` (broadcast to `[batch, head, n, m]`) added to the scores.
pub fn masked_attention(
    g: &mut Graph<'_>,
    q: &Value,
    k: &Value,
    v: &Value,
    heads: u64,
    mask: Option<&Value>,
) -> Value {
    let inner = q.last();
    let width = inner / heads;
    // The scale goes onto the queries, which are fewer than the scores and stay small in fp16.
    let scaled = g.scale(q, 1.0 / as_f32(width).sqrt());
    let q_heads = split_heads(g, &scaled, heads, [0, 2, 1, 3]);
    let k_heads = split_heads(g, k, heads, [0, 2, 3, 1]);
    let v_heads = split_heads(g, v, heads, [0, 2, 1, 3]);
    let mut scores = g.matmul(&q_heads, &k_heads);
    if let Some(mask) = mask {
        scores = g.add(&scores, mask);
    }
    let shares = softmax(g, &scores);
    let mixed = g.matmul(&shares, &v_heads);
    let mixed = g.transpose(&mixed, &[0, 2, 1, 3]);
    g.reshape(&mixed, &[BATCH, Axis::Len(q.len(1)), Axis::Len(inner)])
}

/// Sinusoids of `time` `[batch]`: `[batch, 2 * frequencies]`, the two halves in the given order; in fp32.
pub fn sinusoids(
    g: &mut Graph<'_>,
    time: &Value,
    name: &str,
    frequencies: Vec<f32>,
    order: Sinusoids,
) -> Value {
    let half = frequencies.len() as u64;
    let table = g.table(name, Elem::F32, &[1, half], frequencies);
    let column = g.reshape(time, &[BATCH, Axis::Len(1)]);
    let angles = g.mul(&column, &table);
    let (sin, cos) = (g.sin(&angles), g.cos(&angles));
    match order {
        Sinusoids::SinCos => g.concat(&[&sin, &cos], 1),
        Sinusoids::CosSin => g.concat(&[&cos, &sin], 1),
    }
}

/// Which half of an embedding comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sinusoids {
    /// Sines, then cosines.
    SinCos,
    /// Cosines, then sines.
    CosSin,
}

/// Frequencies from 1 down to about 1/10000: `10000^(-i / divisor)`.
#[expect(
    clippy::cast_possible_truncation,
    reason = "computed in double precision, stored in single"
)]
#[must_use]
pub fn frequencies(count: u64, divisor: f64) -> Vec<f32> {
    (0..count)
        .map(|i| (-(10_000_f64.ln()) * as_f64(i) / divisor).exp() as f32)
        .collect()
}

/// A length as a number to compute with; lengths are far below 2^24.
#[expect(
    clippy::cast_precision_loss,
    reason = "axes of networks are far below 2^24"
)]
#[must_use]
pub fn as_f32(len: u64) -> f32 {
    len as f32
}

/// A length as a number to compute with.
#[expect(
    clippy::cast_precision_loss,
    reason = "axes of networks are far below 2^53"
)]
#[must_use]
pub fn as_f64(len: u64) -> f64 {
    len as f64
}
