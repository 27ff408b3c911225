//! How far rounded results are from fp32 ones, and what of it goes into the manifest.

use std::collections::BTreeMap;

use bundle::StageAudit;
use decoder::Range;
use ndarray::ArrayD;

use super::{Islands, Reference, reference};
use crate::check::{Distance, HALF_COSINE, HALF_PSNR_DB};
use crate::onnx::{GraphProto, ModelProto, NodeProto};

/// Signal-to-noise ratio of what is equal, dB: JSON has no infinity.
const EQUAL_DB: f64 = 200.0;

/// How far a rounded run is from the reference.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quality {
    pub(super) max_error: f64,
    pub(super) cosine: f64,
    pub(super) psnr_db: Option<f64>,
}

impl Quality {
    /// Whether both limits of fp16 parity are kept.
    pub(super) fn is_good(&self) -> bool {
        self.cosine >= HALF_COSINE && self.psnr_db.is_none_or(|psnr| psnr >= HALF_PSNR_DB)
    }
}

/// The worst of all outputs; pictures are compared as `range` makes them.
pub(super) fn quality(
    found: &BTreeMap<String, ArrayD<f32>>,
    expected: &BTreeMap<String, ArrayD<f32>>,
    range: Option<Range>,
) -> Quality {
    let mut worst = Quality {
        max_error: 0.0,
        cosine: 1.0,
        psnr_db: None,
    };
    for (name, expected) in expected {
        let Some(found) = found.get(name) else {
            worst.cosine = f64::NAN;
            continue;
        };
        let distance = Distance::between(found.view(), expected.view());
        worst.max_error = worst.max_error.max(distance.max_error);
        // NaN is worse than anything, and stays.
        if distance.cosine.is_nan() || distance.cosine < worst.cosine {
            worst.cosine = distance.cosine;
        }
        if let Some(range) = range {
            let picture = |values: &ArrayD<f32>| values.mapv(|value| range.apply(value));
            let distance = Distance::between(picture(found).view(), picture(expected).view());
            let psnr = if distance.psnr_db.is_nan() {
                0.0
            } else {
                distance.psnr_db.min(EQUAL_DB)
            };
            worst.psnr_db = Some(worst.psnr_db.map_or(psnr, |least: f64| least.min(psnr)));
        }
    }
    worst
}

/// A node's name with the weight it reads: `Conv_45 (decoder.conv_in.weight)`.
pub(super) fn label(graph: &GraphProto, value: &str) -> String {
    let made = |node: &&NodeProto| node.output.iter().any(|output| output == value);
    let Some(node) = graph.node.iter().find(made) else {
        return value.to_owned();
    };
    let external = |name: &&String| {
        let tensor = graph
            .initializer
            .iter()
            .find(|tensor| tensor.name == **name);
        tensor.is_some_and(|tensor| !tensor.external_data.is_empty())
    };
    match node.input.iter().find(external) {
        Some(weight) => {
            let key = reference::key(weight);
            format!("{value} ({})", key.split('[').next().unwrap_or(key))
        }
        None => value.to_owned(),
    }
}

pub(super) fn record(
    typed: &ModelProto,
    islands: &Islands,
    reference: &Reference,
    quality: Quality,
) -> StageAudit {
    let nothing = GraphProto::default();
    let graph = typed.graph.as_ref().unwrap_or(&nothing);
    let made = graph.node.iter().flat_map(|node| &node.output);
    let mut top: Option<(&String, f32)> = None;
    for value in made {
        if let Some(&magnitude) = reference.largest.get(value)
            && top.is_none_or(|(_, most)| magnitude > most)
        {
            top = Some((value, magnitude));
        }
    }
    let rows = reference
        .inputs
        .first()
        .map_or(0, |(_, values)| values.shape()[0]);
    StageAudit {
        probes: u32::try_from(rows).unwrap_or(u32::MAX),
        largest: top.map_or(0.0, |(_, value)| rounded_off(f64::from(value))),
        at: top.map_or(String::new(), |(value, _)| label(graph, value)),
        islands: graph
            .node
            .iter()
            .filter(|node| islands.holds(node))
            .flat_map(|node| &node.output)
            .map(|value| label(graph, value))
            .collect(),
        fp32_weights: islands
            .weights
            .iter()
            .map(|name| reference::key(name).to_owned())
            .collect(),
        max_error: rounded_off(quality.max_error),
        cosine: 1.0 - rounded_off(1.0 - quality.cosine),
        psnr_db: quality.psnr_db.map(rounded_off),
    }
}

/// Three digits: more would be the order of summation and not the network.
pub(super) fn rounded_off(value: f64) -> f64 {
    format!("{value:.2e}").parse().unwrap_or(value)
}
