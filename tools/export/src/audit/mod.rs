//! fp16 that cannot lie: every network of an fp16 bundle is run before the bundle is written.
//!
//! 1. The fp32 graph runs on probe inputs (`probes`), with the checkpoint's own numbers; the largest
//!    magnitude of every intermediate is recorded (`range`). A value that is no number stops the
//!    export.
//! 2. Whatever comes within a factor of [`HEADROOM`] of fp16's largest number is kept in fp32, with
//!    those who read it (`islands`).
//! 3. The graph that will be written runs with every intermediate rounded to fp16 ([`widen()`]); where
//!    that is too far from fp32, a small set of nodes that mends it is searched for (`search`).
//!
//! Latents are at most [`MAX_LATENT`] long on a side here: what networks do to numbers does not depend
//! on the size of the picture, and memory and time do. Weights are mapped from files; those that fp16
//! does not hold exactly lie in a passing file beside the bundle, of at most twice the bundle's own
//! size for that network. A run takes the memory of its activations and of one weight in fp32.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::Instant;

use bundle::{
    Precision, RefinerSettings, Stage as StageSpec, StageAudit, StageName, UnclipSettings,
};
use decoder::{Range, Runtime, Stage, StageError};
use ndarray::ArrayD;
use prost::Message;

use crate::check::{HALF_COSINE, HALF_PSNR_DB};
use crate::describe::Description;
use crate::export::{Place, Planned};
use crate::graph::{Elem, Graph};
use crate::onnx::ModelProto;
use crate::plan::Plan;
use crate::weights::{Rounding as Kept, Written};

mod choice;
mod islands;
pub mod memory;
mod probes;
mod range;
mod record;
mod reference;
mod search;
mod shipped;
mod types;
mod widen;

#[cfg(test)]
mod tests;

use choice::{beyond_range, candidates, half_weights};
pub use islands::Islands;
use probes::{Chain, Inputs};
use record::{Quality, label, quality, record};
pub use shipped::{RewriteError, emulated};
pub use widen::{Rounding, widen};

/// Magnitudes are kept this far below fp16's largest number: other inputs than the probes may be larger.
pub const HEADROOM: f32 = 8.0;
/// Longest side of latents while networks are looked at.
pub const MAX_LATENT: u64 = 32;
/// Values of a network that may be kept together while it is looked at, at batch 1.
const MAX_KEPT_BYTES: u64 = 256 << 20;
/// Runs that the search for a small set of nodes may take.
const BUDGET: usize = 64;
/// Threads of the audit's runs; part of what makes its figures repeatable.
const THREADS: usize = 2;

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
    refiner: Option<RefinerSettings>,
}

/// What a run in fp32 gave.
struct Reference {
    inputs: Inputs,
    outputs: BTreeMap<String, ArrayD<f32>>,
    largest: HashMap<String, f32>,
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
            refiner: half.refiner,
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
        say: &mut dyn FnMut(&str),
    ) -> Result<Verdict, AuditError> {
        let typed = self.typed(index, held);
        let reference = self.reference(index, held, passing, &typed, say)?;
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
        say: &mut dyn FnMut(&str),
    ) -> Result<Reference, AuditError> {
        let Planned { place, graph } = &self.wide[index];
        let mut model = reference::model(graph, held, passing);
        let (inputs, outputs) = graph.specs();
        let proto = model.graph.get_or_insert_default();
        let vocabulary = |input: &str| reference::rows_read_by(proto, input);
        let values = self.chain.inputs(place, &inputs, &vocabulary);
        widen(proto, Rounding::None);
        let passes = range::passes(range::measured(proto), &graph.value_bytes(), MAX_KEPT_BYTES);
        let (mut outputs_of_network, mut found) = (BTreeMap::new(), Vec::new());
        let all = passes.len();
        for (pass, values_of_pass) in passes.into_iter().enumerate() {
            if all > 1 {
                say(&format!(
                    "{}: looking at its values, run {} of {all}",
                    place.label(),
                    pass + 1
                ));
            }
            let mut model = model.clone();
            let probed = range::probe(model.graph.get_or_insert_default(), values_of_pass);
            let mut spec = spec(place, inputs.clone(), outputs.clone());
            spec.outputs.extend(probed.specs());
            let mut called = self.run(place, &spec, &model, &values)?.outputs;
            found.extend(probed.take(&mut called));
            outputs_of_network = called;
        }
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
            outputs: outputs_of_network,
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
        let called = self.run(place, &spec, &model, &reference.inputs)?;
        let range = self.picture_range(place);
        Ok(Run {
            quality: quality(&called.outputs, &reference.outputs, range),
            milliseconds: called.milliseconds,
            memory: called.memory,
        })
    }

    fn run(
        &self,
        place: &Place,
        spec: &StageSpec,
        model: &ModelProto,
        inputs: &Inputs,
    ) -> Result<Called, AuditError> {
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
        Ok(Called {
            outputs,
            milliseconds,
            memory: watch.stop(),
        })
    }

    /// How a network's output becomes a picture of 0..1; `None` for other networks.
    fn picture_range(&self, place: &Place) -> Option<Range> {
        let range = |scale, shift| Range { scale, shift };
        match place {
            Place::Shared(StageName::VaeDecoder) => {
                let settings = self.unclip.as_ref();
                Some(settings.map_or(Range::SYMMETRIC, |s| range(s.image_scale, s.image_shift)))
            }
            Place::Shared(StageName::RefinerVaeDecoder) => {
                let settings = self.refiner.as_ref();
                Some(settings.map_or(Range::SYMMETRIC, |s| range(s.image_scale, s.image_shift)))
            }
            Place::Shared(StageName::BlurryDecoder) => Some(Range::SYMMETRIC),
            _ => None,
        }
    }
}

/// What one call of a network gave.
struct Called {
    outputs: BTreeMap<String, ArrayD<f32>>,
    milliseconds: f64,
    memory: memory::Resident,
}

/// How the rounded graph compares with the fp32 one.
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
        working_bytes: 0,
    }
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
