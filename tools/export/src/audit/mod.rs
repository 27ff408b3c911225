//! fp16 that cannot lie: every network of an fp16 bundle is run before the bundle is written.
//!
//! 1. The fp32 graph runs on probe inputs ([`probes`]), with the checkpoint's own numbers; the largest
//!    magnitude of every intermediate is recorded ([`range`]). A value that is no number stops the
//!    export.
//! 2. Whatever comes within a factor of [`HEADROOM`] of fp16's largest number is kept in fp32, with
//!    those who read it ([`islands`]).
//! 3. The graph that will be written runs with every intermediate rounded to fp16 ([`widen`]); where
//!    that is too far from fp32, a small set of nodes that mends it is searched for ([`search`]).
//!
//! Latents are at most [`MAX_LATENT`] long on a side here: what networks do to numbers does not depend
//! on the size of the picture, and memory and time do. Weights are mapped from files; those that fp16
//! does not hold exactly lie in a passing file beside the bundle, of at most twice the bundle's own
//! size for that network. A run takes the memory of its activations and of one weight in fp32.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::Instant;

use bundle::{Precision, Stage as StageSpec, StageAudit, StageName, UnclipSettings};
use decoder::{Range, Runtime, Stage, StageError};
use ndarray::ArrayD;
use prost::Message;

use crate::check::{Distance, HALF_COSINE, HALF_PSNR_DB};
use crate::describe::Description;
use crate::export::{Place, Planned};
use crate::graph::{Elem, Graph};
use crate::onnx::{GraphProto, ModelProto, NodeProto, element};
use crate::plan::Plan;
use crate::weights::{Rounding as Kept, Written};

mod islands;
pub mod memory;
mod probes;
mod range;
mod reference;
mod search;
mod shipped;
mod types;
mod widen;

#[cfg(test)]
mod tests;

pub use islands::Islands;
use probes::{Chain, Inputs};
pub use shipped::{RewriteError, emulated};
pub use widen::{Rounding, widen};

/// Magnitudes are kept this far below fp16's largest number: other inputs than the probes may be larger.
pub const HEADROOM: f32 = 8.0;
/// Longest side of latents while networks are looked at.
pub const MAX_LATENT: u64 = 32;
/// Runs that the search for a small set of nodes may take.
const BUDGET: usize = 64;
/// Threads of the audit's runs; part of what makes its figures repeatable.
const THREADS: usize = 2;
/// Signal-to-noise ratio of what is equal, dB: JSON has no infinity.
const EQUAL_DB: f64 = 200.0;

/// Why a bundle is refused by the audit.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// ONNX Runtime is not there.
    #[error("the audit of an fp16 bundle needs ONNX Runtime; --no-audit exports without it")]
    Runtime(#[from] decoder::RuntimeError),
    /// A network cannot be run.
    #[error("{stage}")]
    Stage {
        /// The network.
        stage: String,
        /// Why.
        source: StageError,
    },
    /// A value that is no number.
    #[error("{stage}: {node}: expected finite values on probe inputs, found {value}")]
    NotFinite {
        /// The network.
        stage: String,
        /// The node that made it.
        node: String,
        /// What it is.
        value: f32,
    },
    /// fp32 arithmetic on fp32 weights is no better.
    #[error(
        "{stage}: expected a cosine of at least {HALF_COSINE} and {HALF_PSNR_DB} dB with every node in fp32, found {cosine}: \
         export this bundle in fp32"
    )]
    Loses {
        /// The network.
        stage: String,
        /// Cosine with the fp32 run.
        cosine: f64,
    },
}

/// What was found out about one network.
#[derive(Clone, Debug)]
pub struct Audited {
    /// What must be kept in fp32.
    pub islands: Islands,
    /// For the manifest.
    pub record: StageAudit,
    /// Wall time of the rounded run, milliseconds.
    pub milliseconds: f64,
    /// Memory while it ran.
    pub memory: memory::Resident,
}

/// What has to happen next.
pub(crate) enum Verdict {
    /// The graph can be written with these islands.
    Done(Box<Audited>),
    /// These weights must be stored in fp32 first.
    Store(BTreeSet<String>),
}

/// A network's weights in the bundle that is being written.
pub(crate) struct Held<'h> {
    /// Its file, relative to the bundle's root.
    pub(crate) path: &'h str,
    /// The graph that will be written.
    pub(crate) graph: &'h Graph<'h>,
    /// Where each of its weights lies.
    pub(crate) written: &'h [Written],
    /// Weights that are stored in fp32 although their graph wants fp16.
    pub(crate) wide: &'h BTreeSet<String>,
}

/// `plan` with latents that are quick to run.
pub(crate) fn reduced(plan: &Plan, precision: Precision) -> Plan {
    let mut plan = plan.clone();
    plan.precision = precision;
    let settings = &mut plan.settings;
    for sides in [
        &mut settings.latent_hw,
        &mut settings.refiner_latent_hw,
        &mut settings.blurry_latent_hw,
    ] {
        if sides.iter().any(|&side| side > MAX_LATENT) {
            *sides = [MAX_LATENT, MAX_LATENT];
        }
    }
    plan
}

/// Runs the networks of one export, in the order in which they feed one another.
pub(crate) struct Auditor<'c> {
    runtime: Runtime,
    root: PathBuf,
    wide: Vec<Planned<'c>>,
    half: Vec<Planned<'c>>,
    chain: Chain,
    unclip: Option<UnclipSettings>,
}

/// What a run in fp32 gave.
struct Reference {
    inputs: Inputs,
    outputs: BTreeMap<String, ArrayD<f32>>,
    largest: HashMap<String, f32>,
}

/// How far a rounded run is from the reference.
#[derive(Clone, Copy, Debug)]
struct Quality {
    max_error: f64,
    cosine: f64,
    psnr_db: Option<f64>,
}

impl Quality {
    fn is_good(&self) -> bool {
        self.cosine >= HALF_COSINE && self.psnr_db.is_none_or(|psnr| psnr >= HALF_PSNR_DB)
    }
}

impl<'c> Auditor<'c> {
    /// Loads ONNX Runtime; `wide` and `half` are [`reduced`] plans, described.
    pub(crate) fn new(
        plan: &Plan,
        root: PathBuf,
        wide: Description<'c>,
        half: Description<'c>,
    ) -> Result<Auditor<'c>, AuditError> {
        let library = decoder::runtime::find_library(plan.onnxruntime.as_deref())?;
        Ok(Auditor {
            runtime: Runtime::load(&library, THREADS)?,
            root,
            chain: Chain::new(&half),
            unclip: half.unclip,
            wide: wide.planned,
            half: half.planned,
        })
    }

    /// Weights of the fp32 graph that the bundle does not hold exactly.
    pub(crate) fn missing(&self, index: usize, held: &Held<'_>) -> Vec<crate::graph::Weight<'c>> {
        let exact = reference::exact(held);
        let weights = self.wide[index].graph.weights().iter();
        weights
            .filter(|weight| !exact.contains_key(reference::key(&weight.name)))
            .cloned()
            .collect()
    }

    /// Looks at one network.
    ///
    /// - `passing`: file and places of the weights that [`Self::missing`] named.
    pub(crate) fn look(
        &mut self,
        index: usize,
        held: &Held<'_>,
        passing: (&str, &[Written]),
    ) -> Result<Verdict, AuditError> {
        let typed = self.typed(index, held);
        let reference = self.reference(index, held, passing, &typed)?;
        let mut islands = Islands {
            values: beyond_range(&typed, &reference.largest, held.wide),
            weights: held.wide.clone(),
        };
        let mut run = self.rounded(index, &typed, &islands, &reference)?;
        if !run.quality.is_good() {
            let with = |more: &[String]| Islands {
                values: islands.values.iter().chain(more).cloned().collect(),
                weights: islands.weights.clone(),
            };
            let rest: Vec<String> = candidates(&typed, held.wide)
                .into_iter()
                .filter(|value| !islands.values.contains(value))
                .collect();
            let best = self.rounded(index, &typed, &with(&rest), &reference)?;
            if !best.quality.is_good() {
                let all = half_weights(&typed, held.wide);
                if all.len() > held.wide.len() {
                    return Ok(Verdict::Store(all));
                }
                return Err(AuditError::Loses {
                    stage: self.half[index].place.label(),
                    cosine: best.quality.cosine,
                });
            }
            let found = search::smallest(rest, BUDGET, &mut |part| {
                let run = self.rounded(index, &typed, &with(part), &reference)?;
                Ok::<_, AuditError>(run.quality.is_good())
            })?;
            islands = with(&found);
            run = self.rounded(index, &typed, &islands, &reference)?;
        }
        let record = record(&typed, &islands, &reference, run.quality);
        let place = &self.half[index].place;
        self.chain
            .learn(place, &reference.inputs, &reference.outputs);
        Ok(Verdict::Done(Box::new(Audited {
            islands,
            record,
            milliseconds: run.milliseconds,
            memory: run.memory,
        })))
    }

    /// The fp16 graph at the audit's size, reading the bundle's weights.
    fn typed(&self, index: usize, held: &Held<'_>) -> ModelProto {
        let places: HashMap<&str, u64> = held
            .graph
            .weights()
            .iter()
            .zip(held.written)
            .map(|(weight, written)| (weight.name.as_str(), written.offset))
            .collect();
        let graph = &self.half[index].graph;
        let offset = |name: &str| places.get(name).copied().unwrap_or_default();
        let weights = graph.weights().iter();
        let offsets: Vec<u64> = weights.map(|weight| offset(&weight.name)).collect();
        let mut model = graph.model(held.path, &offsets);
        for tensor in model.graph.iter_mut().flat_map(|g| &mut g.initializer) {
            if held.wide.contains(&tensor.name) {
                reference::store_wide(tensor);
            }
        }
        model
    }

    fn reference(
        &mut self,
        index: usize,
        held: &Held<'_>,
        passing: (&str, &[Written]),
        typed: &ModelProto,
    ) -> Result<Reference, AuditError> {
        let Planned { place, graph } = &self.wide[index];
        let mut model = reference::model(graph, held, passing);
        let (inputs, outputs) = graph.specs();
        let proto = model.graph.get_or_insert_default();
        let vocabulary = |input: &str| reference::rows_read_by(proto, input);
        let values = self.chain.inputs(place, &inputs, &vocabulary);
        widen(proto, Rounding::None);
        let probed = range::probe(proto);
        let mut spec = spec(place, inputs, outputs);
        spec.outputs.push(probed.spec());
        let mut outputs = self.run(place, &spec, &model, &values)?.0;
        let found = probed.take(&mut outputs);
        let typed = typed.graph.as_ref();
        let mut largest = BTreeMap::new();
        for magnitude in found {
            // A sum of finite numbers may be infinite; it is no number only where a term is none.
            let value = if magnitude.sum.is_nan() {
                magnitude.sum
            } else {
                magnitude.largest
            };
            if !value.is_finite() {
                return Err(AuditError::NotFinite {
                    stage: place.label(),
                    node: typed.map_or(magnitude.value.clone(), |g| label(g, &magnitude.value)),
                    value,
                });
            }
            largest.insert(magnitude.value, magnitude.largest);
        }
        for (name, values) in &values {
            let magnitude = values
                .iter()
                .fold(0.0_f32, |max, value| max.max(value.abs()));
            largest.insert(name.clone(), magnitude);
        }
        Ok(Reference {
            inputs: values,
            outputs,
            largest: typed.map_or_else(HashMap::new, |graph| range::spread(graph, largest)),
        })
    }

    /// The graph that would be written with these islands, every intermediate rounded.
    fn rounded(
        &self,
        index: usize,
        typed: &ModelProto,
        islands: &Islands,
        reference: &Reference,
    ) -> Result<Run, AuditError> {
        let Planned { place, graph } = &self.half[index];
        let mut model = typed.clone();
        let proto = model.graph.get_or_insert_default();
        islands.apply(proto);
        widen(proto, Rounding::Half);
        let (inputs, outputs) = graph.specs();
        let spec = spec(place, inputs, outputs);
        let (outputs, milliseconds, memory) = self.run(place, &spec, &model, &reference.inputs)?;
        let range = self.picture_range(place);
        Ok(Run {
            quality: quality(&outputs, &reference.outputs, range),
            milliseconds,
            memory,
        })
    }

    fn run(
        &self,
        place: &Place,
        spec: &StageSpec,
        model: &ModelProto,
        inputs: &Inputs,
    ) -> Result<(BTreeMap<String, ArrayD<f32>>, f64, memory::Resident), AuditError> {
        let failed = |source| AuditError::Stage {
            stage: place.label(),
            source,
        };
        let watch = memory::Watch::start();
        let bytes = model.encode_to_vec();
        let stage =
            Stage::open_as_written(&self.runtime, &self.root, spec, &bytes).map_err(failed)?;
        let feed: Vec<_> = inputs
            .iter()
            .map(|(name, values)| (name.as_str(), values.view()))
            .collect();
        let clock = Instant::now();
        let outputs = stage.run_unchecked(&feed).map_err(failed)?;
        let milliseconds = clock.elapsed().as_secs_f64() * 1e3;
        Ok((outputs, milliseconds, watch.stop()))
    }

    /// How a network's output becomes a picture of 0..1; `None` for other networks.
    fn picture_range(&self, place: &Place) -> Option<Range> {
        match place {
            Place::Shared(StageName::VaeDecoder) => Some(self.unclip.as_ref().map_or(
                Range::SYMMETRIC,
                |unclip| Range {
                    scale: unclip.image_scale,
                    shift: unclip.image_shift,
                },
            )),
            Place::Shared(StageName::RefinerVaeDecoder | StageName::BlurryDecoder) => {
                Some(Range::SYMMETRIC)
            }
            _ => None,
        }
    }
}

struct Run {
    quality: Quality,
    milliseconds: f64,
    memory: memory::Resident,
}

fn spec(
    place: &Place,
    inputs: Vec<bundle::TensorSpec>,
    outputs: Vec<bundle::TensorSpec>,
) -> StageSpec {
    StageSpec {
        graph: place.label(),
        weights: None,
        inputs,
        outputs,
    }
}

fn quality(
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
        // NaN is worse than anything.
        if !(distance.cosine >= worst.cosine) {
            worst.cosine = distance.cosine;
        }
        if let Some(range) = range {
            let picture = |values: &ArrayD<f32>| values.mapv(|value| range.apply(value));
            let distance = Distance::between(picture(found).view(), picture(expected).view());
            let psnr = distance.psnr_db.min(EQUAL_DB);
            worst.psnr_db = Some(worst.psnr_db.map_or(psnr, |least: f64| least.min(psnr)));
        }
    }
    worst
}

/// Values whose nodes read or make what fp16 might not hold.
fn beyond_range(
    typed: &ModelProto,
    largest: &HashMap<String, f32>,
    wide: &BTreeSet<String>,
) -> BTreeSet<String> {
    let limit = half::f16::MAX.to_f32() / HEADROOM;
    let Some(graph) = &typed.graph else {
        return BTreeSet::new();
    };
    let types = types::Types::of(graph, wide);
    let beyond = |name: &&String| {
        types.is_half(name) && largest.get(*name).is_some_and(|&value| value > limit)
    };
    let nodes = graph.node.iter().filter(|node| node.op_type != "Cast");
    nodes
        .filter(|node| {
            node.input
                .iter()
                .chain(&node.output)
                .any(|name| beyond(&name))
        })
        .flat_map(|node| node.output.iter().cloned())
        .collect()
}

/// Every value that a node computes in fp16.
fn candidates(typed: &ModelProto, wide: &BTreeSet<String>) -> Vec<String> {
    let Some(graph) = &typed.graph else {
        return Vec::new();
    };
    let types = types::Types::of(graph, wide);
    let nodes = graph.node.iter().filter(|node| node.op_type != "Cast");
    nodes
        .flat_map(|node| node.output.iter())
        .filter(|output| types.is_half(output))
        .cloned()
        .collect()
}

fn half_weights(typed: &ModelProto, wide: &BTreeSet<String>) -> BTreeSet<String> {
    let tensors = typed.graph.iter().flat_map(|graph| &graph.initializer);
    tensors
        .filter(|tensor| {
            let half = tensor.data_type == element::FLOAT16 || wide.contains(&tensor.name);
            half && !tensor.external_data.is_empty()
        })
        .map(|tensor| tensor.name.clone())
        .collect()
}

/// A node's name with the weight it reads: `Conv_45 (decoder.conv_in.weight)`.
fn label(graph: &GraphProto, value: &str) -> String {
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

fn record(
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
fn rounded_off(value: f64) -> f64 {
    format!("{value:.2e}").parse().unwrap_or(value)
}

/// Whether a plan's graphs are looked at before they are written.
pub(crate) fn wanted(plan: &Plan) -> bool {
    plan.audit && plan.precision == Precision::Fp16
}

/// Weights of a graph that cannot be stored in fp16, by what happened to them there.
pub(crate) fn unfit(graph: &Graph<'_>, written: &[Written]) -> BTreeSet<String> {
    let weights = graph.weights().iter().zip(written);
    weights
        .filter(|(weight, written)| {
            weight.elem == Elem::F16
                && matches!(written.rounding, Kept::Lossy | Kept::Beyond { .. })
        })
        .map(|(weight, _)| weight.name.clone())
        .collect()
}
