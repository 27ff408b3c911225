//! TAESDXL's decoder (O. Boer Bohan, MIT): a latent to a small, quick picture.
//!
//! `latent [batch, 4, h, w]`, as the sampler has it and not divided by the scale factor, to
//! `image [batch, 3, 8 h, 8 w]` in 0..1, which the host clamps. In order: the latent squashed to
//! -3..3, a convolution, residual blocks between doublings, a convolution.
//!
//! The layers are numbered and not named: a block is told by its own convolutions, a doubling by the
//! number that has no weight. Diffusers' `AutoencoderTiny` numbers them from zero, the original
//! counts the squashing too; diffusers maps the picture to -1..1 afterwards, which is not done here.

use bundle::Precision;

use crate::graph::{Axis, BATCH, Graph, Value};
use crate::layers::{conv, conv_out};
use crate::section::Section;

/// The latent is squashed to this much on either side.
const MAGNITUDE: f32 = 3.0;
const COLOURS: u64 = 3;
/// Doublings at most, so that no picture is out of proportion.
const MAX_DOUBLINGS: u32 = 6;

/// Where a decoder's layers lie in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviewKeys {
    prefix: &'static str,
    /// Number of the first convolution.
    first: u64,
}

impl PreviewKeys {
    /// The spelling that a checkpoint has.
    #[must_use]
    pub fn read(s: &Section<'_>) -> PreviewKeys {
        let spellings = [("decoder.layers.", 0), ("decoder.", 1), ("", 1)];
        let (prefix, first) = spellings
            .into_iter()
            .find(|(prefix, _)| !s.numbers(prefix).is_empty())
            .unwrap_or(("", 1));
        PreviewKeys { prefix, first }
    }

    fn layer(&self, number: u64) -> String {
        format!("{}{number}", self.prefix)
    }

    /// Channels of the latent.
    #[must_use]
    pub fn channels(&self, s: &Section<'_>) -> u64 {
        s.axis(&format!("{}.weight", self.layer(self.first)), 4, 1)
    }
}

/// Builds the graph; `height` and `width` are the latent's.
#[must_use]
pub fn build<'c>(
    s: &Section<'c>,
    keys: &PreviewKeys,
    [height, width]: [u64; 2],
    precision: Precision,
) -> Graph<'c> {
    let mut graph = Graph::new("preview_decoder", precision);
    let g = &mut graph;
    let axes = [keys.channels(s), height, width].map(Axis::Len);
    let latent = g.input("latent", &[BATCH, axes[0], axes[1], axes[2]]);
    let act = g.act();
    let x = g.cast(&latent, act);
    let x = g.scale(&x, 1.0 / MAGNITUDE);
    let x = g.tanh(&x);
    let x = g.scale(&x, MAGNITUDE);
    let x = conv(g, s, &keys.layer(keys.first), &x, 3, 1);
    let mut x = g.relu(&x);
    // Two further on: the rectifier after the first convolution has a number too.
    let mut number = keys.first + 2;
    let mut doublings = 0;
    loop {
        let layer = keys.layer(number);
        if s.has_prefix(&format!("{layer}.conv.")) {
            x = block(g, s, &layer, &x);
            number += 1;
        } else if s.has(&format!("{layer}.weight")) {
            let image = conv_out(g, s, &layer, &x, COLOURS, 3, 1);
            g.output("image", &image);
            return graph;
        } else if s.has(&format!("{}.weight", keys.layer(number + 1)))
            && !s.has(&format!("{}.bias", keys.layer(number + 1)))
            && doublings < MAX_DOUBLINGS
        {
            let larger = g.upsample(&x);
            x = plain_conv(g, s, &keys.layer(number + 1), &larger, 3);
            doublings += 1;
            number += 2;
        } else {
            let message = format!(
                "expected a block ({layer}.conv.0.weight), the last convolution ({layer}.weight), or a \
                 doubling and at most {MAX_DOUBLINGS} of them ({}.weight without bias), found none",
                keys.layer(number + 1)
            );
            s.problem(&layer, message);
            // What follows is not known to be wrong.
            s.ignore(keys.prefix);
            g.output("image", &x);
            return graph;
        }
    }
}

/// `relu(convolutions(x) + x)`, with a convolution on the way round where the width changes.
fn block<'c>(g: &mut Graph<'c>, s: &Section<'c>, key: &str, x: &Value) -> Value {
    let h = conv(g, s, &format!("{key}.conv.0"), x, 3, 1);
    let h = g.relu(&h);
    let h = conv(g, s, &format!("{key}.conv.2"), &h, 3, 1);
    let h = g.relu(&h);
    let h = conv_out(g, s, &format!("{key}.conv.4"), &h, h.len(1), 3, 1);
    let skip = if h.len(1) == x.len(1) {
        x.clone()
    } else {
        let key = format!("{key}.skip");
        let weight = s.weight(g, &format!("{key}.weight"), &[h.len(1), x.len(1), 1, 1]);
        g.conv_without_bias(x, &weight)
    };
    let sum = g.add(&h, &skip);
    g.relu(&sum)
}

fn plain_conv<'c>(g: &mut Graph<'c>, s: &Section<'c>, key: &str, x: &Value, side: u64) -> Value {
    let key = format!("{key}.weight");
    let out = s.axis(&key, 4, 0);
    let weight = s.weight(g, &key, &[out, x.len(1), side, side]);
    g.conv_without_bias(x, &weight)
}
