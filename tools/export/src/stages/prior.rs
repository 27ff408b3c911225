//! The diffusion prior's network: noised CLIP tokens and brain tokens to clean CLIP tokens.
//!
//! `tokens_noised [batch, tokens, dim]`, `timestep [batch]`, `brain_tokens [batch, tokens, dim]`,
//! `keep [batch]` (1 conditioned, 0 both inputs replaced by the learned null embeddings) to
//! `pred [batch, tokens, dim]`, the predicted start.
//!
//! Sequence: brain tokens, one token of time, image tokens plus their learned positions. Each
//! layer: multi-query attention with cosine similarity, rotary positions on the first channels,
//! a learned null key in front, a bias by relative position; then a SiLU-gated feed-forward.
//! Source: MindEyeV2 `PriorNetwork`, DALLE2-pytorch 1.15.6.

use bundle::{Precision, PriorTables};

use crate::graph::{Axis, BATCH, Elem, Graph, Layout, Numbers, Reduction, Value};
use crate::layers::{
    Sinusoids, as_f64, frequencies, l2_normalise, linear, linear_to, silu, sinusoids, softmax,
};
use crate::section::Section;

const NET: &str = "diffusion_prior.net.";
const TRANSFORMER: &str = "diffusion_prior.net.causal_transformer.";
const SCHEDULE: &str = "diffusion_prior.noise_scheduler.";
const LAYER_NORM_EPS: f32 = 1e-5;
/// Queries and keys are unit vectors times this, so that logits are 16 times their cosine.
const COSINE_ROOT: f32 = 4.0;
/// Distance from which all keys share the last bucket; the number of buckets is in the weights.
const MAX_DISTANCE: f64 = 128.0;

/// Tokens and channels of the prior.
#[must_use]
pub fn token_shape(s: &Section<'_>) -> (u64, u64) {
    let key = format!("{NET}null_image_embed");
    (s.axis(&key, 2, 0), s.axis(&key, 2, 1))
}

/// Reads the noise schedule as stored; returns it with its number of timesteps.
#[must_use]
pub fn schedule(s: &Section<'_>) -> (u32, PriorTables) {
    let len = s.axis(&format!("{SCHEDULE}betas"), 1, 0);
    let table = |name: &str| s.read(&format!("{SCHEDULE}{name}"), &[len]);
    let tables = PriorTables {
        alphas_cumprod: table("alphas_cumprod"),
        alphas_cumprod_prev: table("alphas_cumprod_prev"),
        sqrt_recip_alphas_cumprod: table("sqrt_recip_alphas_cumprod"),
        sqrt_recipm1_alphas_cumprod: table("sqrt_recipm1_alphas_cumprod"),
        posterior_mean_coef1: table("posterior_mean_coef1"),
        posterior_mean_coef2: table("posterior_mean_coef2"),
        posterior_log_variance_clipped: table("posterior_log_variance_clipped"),
    };
    // The rest of the schedule follows from these and is only used in training.
    s.ignore(SCHEDULE);
    (u32::try_from(len).unwrap_or(u32::MAX), tables)
}

/// Builds the graph.
#[must_use]
pub fn build<'c>(s: &Section<'c>, precision: Precision) -> Graph<'c> {
    let mut graph = Graph::new("prior", precision);
    let g = &mut graph;
    let (tokens, dim) = token_shape(s);
    let shape = [BATCH, Axis::Len(tokens), Axis::Len(dim)];
    let noised = g.input("tokens_noised", &shape);
    let timestep = g.input("timestep", &[BATCH]);
    let brain = g.input("brain_tokens", &shape);
    let keep = g.input("keep", &[BATCH]);

    let keep = g.reshape(&keep, &[BATCH, Axis::Len(1), Axis::Len(1)]);
    let half = g.scalar(0.5, Elem::F32);
    let keep = g.greater(&keep, &half);
    let conditioned = |name: &str, x: &Value, g: &mut Graph<'c>| {
        let null = s.weight(g, &format!("{NET}{name}"), &[tokens, dim]);
        let act = g.act();
        let x = g.cast(x, act);
        g.choose(&keep, &x, &null)
    };
    let brain = conditioned("null_brain_embeds", &brain, g);
    let image = conditioned("null_image_embed", &noised, g);
    let positions = s.weight(g, &format!("{NET}learned_query"), &[tokens, dim]);
    let image = g.add(&image, &positions);
    let time = time_token(g, s, &timestep, dim);
    let mut x = g.concat(&[&brain, &time, &image], 1);

    let bias = position_bias(g, s, x.len(1));
    let layers = s.count(&format!("{TRANSFORMER}layers."));
    if layers == 0 {
        s.problem(
            &format!("{TRANSFORMER}layers"),
            "expected at least one layer, found none".into(),
        );
    }
    for layer in 0..layers {
        let key = format!("{TRANSFORMER}layers.{layer}");
        let attended = attention(g, s, &format!("{key}.0"), &x, &bias);
        x = g.add(&attended, &x);
        let forwarded = feed_forward(g, s, &format!("{key}.1"), &x);
        x = g.add(&forwarded, &x);
    }
    let x = final_norm(g, s, &x);
    let x = g.slice(&x, 1, tokens + 1, 2 * tokens + 1);
    let x = linear(g, s, &format!("{TRANSFORMER}project_out"), &x, dim, false);
    g.output("pred", &x);
    graph
}

/// Sinusoids of the timestep through a three-layer SiLU network; `[batch, 1, dim]`.
fn time_token<'c>(g: &mut Graph<'c>, s: &Section<'c>, timestep: &Value, dim: u64) -> Value {
    if !dim.is_multiple_of(2) || dim < 4 {
        s.problem(
            &format!("{NET}null_image_embed"),
            format!("expected an even token width of at least 4, found {dim}"),
        );
    }
    let half = (dim / 2).max(2);
    let embedding = sinusoids(
        g,
        timestep,
        "time_frequencies",
        frequencies(half, as_f64(half) - 1.0),
        Sinusoids::SinCos,
    );
    let act = g.act();
    let x = g.cast(&embedding, act);
    let x = linear_to(g, s, &format!("{NET}to_time_embeds.0.1.net.0.0"), &x, true);
    let x = silu(g, &x);
    let x = linear_to(g, s, &format!("{NET}to_time_embeds.0.1.net.1.0"), &x, true);
    let x = silu(g, &x);
    let x = linear(
        g,
        s,
        &format!("{NET}to_time_embeds.0.1.net.2"),
        &x,
        dim,
        true,
    );
    g.reshape(&x, &[BATCH, Axis::Len(1), Axis::Len(dim)])
}

/// Layer norm with a gain and no bias, in fp32.
fn gain_norm<'c>(g: &mut Graph<'c>, s: &Section<'c>, key: &str, x: &Value) -> Value {
    let width = [x.last()];
    let gain = s.weight_as(
        g,
        &format!("{key}.g"),
        &width,
        Elem::F32,
        &width,
        Layout::AsStored,
    );
    let wide = g.cast(x, Elem::F32);
    let normed = g.layer_norm(&wide, &gain, None, LAYER_NORM_EPS);
    g.cast(&normed, x.elem())
}

/// The last norm divides each row by its signed maximum first.
fn final_norm<'c>(g: &mut Graph<'c>, s: &Section<'c>, x: &Value) -> Value {
    let wide = g.cast(x, Elem::F32);
    let largest = g.reduce_last(Reduction::Max, &wide);
    let scaled = g.div(&wide, &largest);
    let normed = gain_norm(g, s, &format!("{TRANSFORMER}norm"), &scaled);
    g.cast(&normed, x.elem())
}

fn attention<'c>(g: &mut Graph<'c>, s: &Section<'c>, key: &str, x: &Value, bias: &Value) -> Value {
    let (rows, dim) = (x.len(1), x.last());
    let head = s.axis(&format!("{key}.null_kv"), 2, 1);
    let heads = bias.len(0);
    let normed = gain_norm(g, s, &format!("{key}.norm"), x);
    let q = linear(g, s, &format!("{key}.to_q"), &normed, heads * head, false);
    let q = g.reshape(
        &q,
        &[BATCH, Axis::Len(rows), Axis::Len(heads), Axis::Len(head)],
    );
    let q = g.transpose(&q, &[0, 2, 1, 3]);
    let kv = linear(g, s, &format!("{key}.to_kv"), &normed, 2 * head, false);
    let k = g.slice(&kv, 2, 0, head);
    let v = g.slice(&kv, 2, head, 2 * head);
    let (q, k) = rotate(g, s, key, &q, &k);
    let q = l2_normalise(g, &q, COSINE_ROOT);
    let k = l2_normalise(g, &k, COSINE_ROOT);
    let (k, v) = with_null_row(g, s, key, &k, &v);

    // One key head for all query heads: heads and rows share an axis in both products.
    let keys = rows + 1;
    let q = g.reshape(&q, &[BATCH, Axis::Len(heads * rows), Axis::Len(head)]);
    let k = g.transpose(&k, &[0, 2, 1]);
    let scores = g.matmul(&q, &k);
    let scores = g.reshape(
        &scores,
        &[BATCH, Axis::Len(heads), Axis::Len(rows), Axis::Len(keys)],
    );
    let wide = g.cast(&scores, Elem::F32);
    let biased = g.add(&wide, bias);
    let shares = softmax(g, &biased);
    let shares = g.cast(&shares, x.elem());
    let shares = g.reshape(&shares, &[BATCH, Axis::Len(heads * rows), Axis::Len(keys)]);
    let mixed = g.matmul(&shares, &v);
    let mixed = g.reshape(
        &mixed,
        &[BATCH, Axis::Len(heads), Axis::Len(rows), Axis::Len(head)],
    );
    let mixed = g.transpose(&mixed, &[0, 2, 1, 3]);
    let mixed = g.reshape(&mixed, &[BATCH, Axis::Len(rows), Axis::Len(heads * head)]);
    let out = linear(g, s, &format!("{key}.to_out.0"), &mixed, dim, false);
    gain_norm(g, s, &format!("{key}.to_out.1"), &out)
}

/// Rotary positions on interleaved pairs of the first channels of queries and keys.
///
/// `x cos + (x R) sin` over all channels, with cosine 1 and sine 0 where nothing turns; R exchanges
/// the two channels of a pair and negates one, exactly, in any precision.
fn rotate<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    key: &str,
    q: &Value,
    k: &Value,
) -> (Value, Value) {
    let name = format!("{key}.rotary_emb.freqs");
    if !s.has(&name) {
        return (q.clone(), k.clone());
    }
    let (rows, head) = (k.len(1), k.last());
    let count = s.axis(&name, 1, 0);
    if 2 * count > head {
        s.problem(
            &name,
            format!(
                "expected at most {} frequencies for heads of {head}, found {count}",
                head / 2
            ),
        );
        return (q.clone(), k.clone());
    }
    let freqs = s.read(&name, &[count]);
    let angle = |row: u64, channel: u64| {
        usize::try_from(channel / 2)
            .ok()
            .and_then(|pair| freqs.get(pair))
            .map(|&freq| as_f64(row) * f64::from(freq))
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "computed in double precision, stored in single"
    )]
    let table = |of: &dyn Fn(f64) -> f64, still: f64| -> Vec<f32> {
        (0..rows)
            .flat_map(|row| (0..head).map(move |channel| (row, channel)))
            .map(|(row, channel)| angle(row, channel).map_or(still, of) as f32)
            .collect()
    };
    // Layers share the table where they share the frequencies, which the original does.
    let bits: Vec<String> = freqs
        .iter()
        .map(|freq| format!("{:x}", freq.to_bits()))
        .collect();
    let id = fingerprint(&bits.concat());
    let act = g.act();
    let cos = g.table(
        &format!("rotary_cos_{id}"),
        Elem::F32,
        &[rows, head],
        table(&f64::cos, 1.0),
    );
    let sin = g.table(
        &format!("rotary_sin_{id}"),
        Elem::F32,
        &[rows, head],
        table(&f64::sin, 0.0),
    );
    let turn: Vec<f32> = (0..head)
        .flat_map(|row| (0..head).map(move |column| (row, column)))
        .map(|(row, column)| {
            match (
                row / 2 == column / 2 && row / 2 < count,
                row % 2,
                column % 2,
            ) {
                (true, 0, 1) => 1.0,
                (true, 1, 0) => -1.0,
                _ => 0.0,
            }
        })
        .collect();
    let turn = g.table(&format!("rotary_turn_{count}"), act, &[head, head], turn);
    let mut apply = |x: &Value| {
        let turned = g.matmul(x, &turn);
        let (x, turned) = (g.cast(x, Elem::F32), g.cast(&turned, Elem::F32));
        let along = g.mul(&x, &cos);
        let across = g.mul(&turned, &sin);
        let sum = g.add(&along, &across);
        g.cast(&sum, act)
    };
    (apply(q), apply(k))
}

/// The learned null key (normalised like the others, not rotated) and value in front of the rest.
fn with_null_row<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    key: &str,
    k: &Value,
    v: &Value,
) -> (Value, Value) {
    let (rows, head) = (k.len(1) + 1, k.last());
    let name = format!("{key}.null_kv");
    let null = s.read(&name, &[2, head]);
    let width = null.len() / 2;
    let norm = null[..width]
        .iter()
        .map(|&x| f64::from(x) * f64::from(x))
        .sum::<f64>()
        .sqrt()
        .max(1e-12);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "computed in double precision, stored in single"
    )]
    let null_key: Vec<f32> = null[..width]
        .iter()
        .map(|&x| (f64::from(x) / norm * f64::from(COSINE_ROOT)) as f32)
        .collect();
    let null_value = null[width..].to_vec();
    let act = g.act();
    let mut in_front = |x: &Value, first: Vec<f32>, part: &str| {
        let mut table = first;
        table.resize(
            usize::try_from(rows * head).expect("attention rows fit memory"),
            0.0,
        );
        let table = g.table(&format!("{name}.{part}"), act, &[1, rows, head], table);
        let padded = g.pad_front_row(x);
        g.add(&padded, &table)
    };
    (
        in_front(k, null_key, "key"),
        in_front(v, null_value, "value"),
    )
}

/// `[heads, rows, rows + 1]`: the bias of each query for each key, the null key at position 0.
fn position_bias<'c>(g: &mut Graph<'c>, s: &Section<'c>, rows: u64) -> Value {
    let key = format!("{TRANSFORMER}rel_pos_bias.relative_attention_bias.weight");
    let (buckets, heads) = (s.axis(&key, 2, 0), s.axis(&key, 2, 1));
    let weight = s.read(&key, &[buckets, heads]);
    let width = usize::try_from(heads).expect("heads fit memory");
    let row_of: Vec<usize> = (0..=rows)
        .map(|distance| bucket(distance, buckets))
        .collect();
    let at = |index: u64| usize::try_from(index).expect("attention rows fit memory");
    let mut table = Vec::new();
    for head in 0..width {
        for query in 0..rows {
            table.extend(
                (0..=rows).map(|key| weight[row_of[at(query.saturating_sub(key))] * width + head]),
            );
        }
    }
    let shape = [heads, rows, rows + 1];
    g.weight("position_bias", Elem::F32, &shape, Numbers::Table(table))
}

/// Bucket of a distance: exact for the first half, then logarithmic, the last one open.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a bucket is a small non-negative number"
)]
fn bucket(distance: u64, buckets: u64) -> usize {
    let exact = buckets / 2;
    if distance < exact.max(1) {
        return distance as usize;
    }
    let share = (as_f64(distance) / as_f64(exact)).ln() / (MAX_DISTANCE / as_f64(exact)).ln();
    let logarithmic = exact + (share * as_f64(buckets - exact)) as u64;
    logarithmic.min(buckets - 1) as usize
}

fn feed_forward<'c>(g: &mut Graph<'c>, s: &Section<'c>, key: &str, x: &Value) -> Value {
    let dim = x.last();
    let inner = s.axis(&format!("{key}.5.weight"), 2, 1);
    let x = gain_norm(g, s, &format!("{key}.0"), x);
    let both = linear(g, s, &format!("{key}.1"), &x, 2 * inner, false);
    let value = g.slice(&both, 2, 0, inner);
    let gate = g.slice(&both, 2, inner, 2 * inner);
    let gate = silu(g, &gate);
    let gated = g.mul(&value, &gate);
    linear(g, s, &format!("{key}.5"), &gated, dim, false)
}

/// A short stable name for a text.
fn fingerprint(text: &str) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(text.as_bytes())
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::bucket;

    /// `RelPosBias._relative_position_bucket` of DALLE2-pytorch with 32 buckets, in single precision as there.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "distances are small and the logarithm is positive"
    )]
    fn slow_bucket(distance: u64) -> u64 {
        let n = distance as f32;
        if n < 16.0 {
            return distance;
        }
        let large = 16.0 + ((n / 16.0).ln() / (128.0_f32 / 16.0).ln() * 16.0).trunc();
        (large as u64).min(31)
    }

    #[test]
    fn buckets_equal_the_original_up_to_a_thousand() {
        for distance in 0..1000 {
            assert_eq!(
                bucket(distance, 32) as u64,
                slow_bucket(distance),
                "distance {distance}"
            );
        }
    }
}
