//! The GIT captioner, in two graphs so that no token is computed twice.
//!
//! - [`prefix`]: `vision [batch, v, width]` to `keys` and `values` `[batch, layer, v, dim]`: vision
//!   tokens attend to one another only, so what words see of them is the same at every word.
//! - [`step`]: one word. `word`, `position` `[batch, 1]`; `keys`, `values`
//!   `[batch, layer, v + words, dim]`, of which `hidden [batch, v + words]` (0 or a large negative
//!   number) tells what is there; to `logits [batch, vocabulary]` and this word's own `key`, `value`
//!   `[batch, layer, 1, dim]`.
//!
//! Post-norm layers with exact GELU, eps 1e-12; the vision projection is a linear layer and a norm of
//! eps 1e-5. Source: transformers 4.37, `modeling_git.py`.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Graph, Value};
use crate::layers::{as_f32, attention, gelu, layer_norm, linear, linear_to, softmax, split_heads};
use crate::section::Section;

const EPS: f32 = 1e-12;
const PROJECTION_EPS: f32 = 1e-5;
const LAYERS: &str = "git.encoder.layer.";

/// What a captioner's weights do not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptionerOptions {
    /// Attention heads.
    pub heads: u64,
    /// Vision tokens.
    pub vision: u64,
    /// Longest caption in tokens, the first one included.
    pub words: u64,
}

/// Width of a hidden state, and how many layers there are.
fn shape(s: &Section<'_>, heads: u64) -> (u64, u64) {
    let dim = s.axis("git.embeddings.word_embeddings.weight", 2, 1);
    let layers = s.count(LAYERS);
    if layers == 0 {
        s.problem(LAYERS, "expected layers, found none".into());
    }
    if heads == 0 || !dim.is_multiple_of(heads.max(1)) {
        s.problem(
            LAYERS,
            format!("expected a width that {heads} heads divide, found {dim}"),
        );
    }
    (dim, layers)
}

fn projections<'c>(g: &mut Graph<'c>, s: &Section<'c>, layer: u64, x: &Value) -> [Value; 3] {
    ["query", "key", "value"].map(|name| {
        linear(
            g,
            s,
            &format!("{LAYERS}{layer}.attention.self.{name}"),
            x,
            x.last(),
            true,
        )
    })
}

/// What follows attention: output layer, norm, feed-forward, norm.
fn rest_of_layer<'c>(
    g: &mut Graph<'c>,
    s: &Section<'c>,
    layer: u64,
    x: &Value,
    mixed: &Value,
) -> Value {
    let key = format!("{LAYERS}{layer}.");
    let mixed = linear(
        g,
        s,
        &format!("{key}attention.output.dense"),
        mixed,
        x.last(),
        true,
    );
    let sum = g.add(&mixed, x);
    let x = layer_norm(g, s, &format!("{key}attention.output.LayerNorm"), &sum, EPS);
    let inner = linear_to(g, s, &format!("{key}intermediate.dense"), &x, true);
    let inner = gelu(g, &inner);
    let inner = linear(g, s, &format!("{key}output.dense"), &inner, x.last(), true);
    let sum = g.add(&inner, &x);
    layer_norm(g, s, &format!("{key}output.LayerNorm"), &sum, EPS)
}

fn with_layer_axis(g: &mut Graph<'_>, x: &Value) -> Value {
    g.reshape(
        x,
        &[
            BATCH,
            Axis::Len(1),
            Axis::Len(x.len(1)),
            Axis::Len(x.last()),
        ],
    )
}

/// Builds the graph of the vision tokens.
#[must_use]
pub fn prefix<'c>(s: &Section<'c>, options: CaptionerOptions, precision: Precision) -> Graph<'c> {
    let mut graph = Graph::new("captioner_prefix", precision);
    let g = &mut graph;
    let (_, layers) = shape(s, options.heads);
    let projection = "git.visual_projection.visual_projection.";
    let width = s.axis(&format!("{projection}0.weight"), 2, 1);
    let vision = g.input(
        "vision",
        &[BATCH, Axis::Len(options.vision), Axis::Len(width)],
    );
    let act = g.act();
    let x = g.cast(&vision, act);
    let x = linear_to(g, s, &format!("{projection}0"), &x, true);
    let mut x = layer_norm(g, s, &format!("{projection}1"), &x, PROJECTION_EPS);
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for layer in 0..layers {
        let [q, k, v] = projections(g, s, layer, &x);
        keys.push(with_layer_axis(g, &k));
        values.push(with_layer_axis(g, &v));
        // The last layer's own output is of no use: words read its keys and values only.
        if layer + 1 < layers {
            let mixed = attention(g, &q, &k, &v, options.heads.max(1));
            x = rest_of_layer(g, s, layer, &x, &mixed);
        }
    }
    for (name, parts) in [("keys", &keys), ("values", &values)] {
        if parts.is_empty() {
            continue;
        }
        let parts: Vec<&Value> = parts.iter().collect();
        let joined = g.concat(&parts, 1);
        g.output(name, &joined);
    }
    graph
}

/// Builds the graph of one word.
#[must_use]
pub fn step<'c>(s: &Section<'c>, options: CaptionerOptions, precision: Precision) -> Graph<'c> {
    let mut graph = Graph::new("captioner", precision);
    let g = &mut graph;
    let heads = options.heads.max(1);
    let (dim, layers) = shape(s, heads);
    let known = options.vision + options.words;
    let words = "git.embeddings.word_embeddings.weight";
    let places = "git.embeddings.position_embeddings.weight";
    let (vocabulary, longest) = (s.axis(words, 2, 0), s.axis(places, 2, 0));
    if longest < options.words {
        s.problem(
            places,
            format!(
                "expected at least {} positions, found {longest}",
                options.words
            ),
        );
    }
    let word = g.input_ints("word", &[BATCH, Axis::Len(1)]);
    let position = g.input_ints("position", &[BATCH, Axis::Len(1)]);
    let cache = [BATCH, Axis::Len(layers), Axis::Len(known), Axis::Len(dim)];
    let keys = g.input("keys", &cache);
    let values = g.input("values", &cache);
    let hidden = g.input("hidden", &[BATCH, Axis::Len(known)]);
    let act = g.act();
    let (keys, values, hidden) = (
        g.cast(&keys, act),
        g.cast(&values, act),
        g.cast(&hidden, act),
    );
    let hidden = g.reshape(
        &hidden,
        &[BATCH, Axis::Len(1), Axis::Len(1), Axis::Len(known)],
    );

    let table = s.weight(g, words, &[vocabulary, dim]);
    let x = g.rows(&table, &word);
    let table = s.weight(g, places, &[longest, dim]);
    let place = g.rows(&table, &position);
    let x = g.add(&x, &place);
    let mut x = layer_norm(g, s, "git.embeddings.LayerNorm", &x, EPS);
    let (mut own_keys, mut own_values) = (Vec::new(), Vec::new());
    for layer in 0..layers {
        let [q, k, v] = projections(g, s, layer, &x);
        own_keys.push(with_layer_axis(g, &k));
        own_values.push(with_layer_axis(g, &v));
        let before = |g: &mut Graph<'c>, cache: &Value| {
            let one = g.slice(cache, 1, layer, layer + 1);
            g.reshape(&one, &[BATCH, Axis::Len(known), Axis::Len(dim)])
        };
        let (before_k, before_v) = (before(g, &keys), before(g, &values));
        let mixed = attend(g, &q, [&before_k, &k], [&before_v, &v], &hidden, heads);
        x = rest_of_layer(g, s, layer, &x, &mixed);
    }
    let row = g.reshape(&x, &[BATCH, Axis::Len(dim)]);
    let logits = linear_to(g, s, "output", &row, true);
    g.output("logits", &logits);
    for (name, parts) in [("key", &own_keys), ("value", &own_values)] {
        if parts.is_empty() {
            continue;
        }
        let parts: Vec<&Value> = parts.iter().collect();
        let joined = g.concat(&parts, 1);
        g.output(name, &joined);
    }
    graph
}

/// One query over what was before (where `hidden` lets it) and itself; `[batch, 1, dim]`.
fn attend(
    g: &mut Graph<'_>,
    q: &Value,
    keys: [&Value; 2],
    values: [&Value; 2],
    hidden: &Value,
    heads: u64,
) -> Value {
    let dim = q.last();
    let width = dim / heads;
    let scaled = g.scale(q, 1.0 / as_f32(width).sqrt());
    let q = split_heads(g, &scaled, heads, [0, 2, 1, 3]);
    let [before, own] = keys.map(|k| {
        let k = split_heads(g, k, heads, [0, 2, 3, 1]);
        g.matmul(&q, &k)
    });
    let before = g.add(&before, hidden);
    let scores = g.concat(&[&before, &own], 3);
    let shares = softmax(g, &scores);
    let joined = g.concat(&values, 1);
    let v = split_heads(g, &joined, heads, [0, 2, 1, 3]);
    let mixed = g.matmul(&shares, &v);
    let mixed = g.transpose(&mixed, &[0, 2, 1, 3]);
    g.reshape(&mixed, &[BATCH, Axis::Len(1), Axis::Len(dim)])
}
