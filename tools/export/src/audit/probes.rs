//! Inputs that a network is likely to see, drawn from the bundle's own chain.
//!
//! Betas are standard normal; what the fp32 networks make of them is what the next ones are given:
//! ridge, backbone, prior, unCLIP, decoders, bridge, captioner. Noised inputs follow the networks'
//! own schedules at four timesteps from the last to the first. What has no maker in the bundle is
//! standard normal, latents of autoencoders over their scale factor. Every number is seeded: the same
//! bundle gets the same probes.

use std::collections::BTreeMap;

use bundle::{
    DType, Dim, EdmSchedule, PriorSettings, RefinerSettings, StageName, TensorSpec, UnclipSettings,
};
use decoder::sampler::SigmaTable;
use decoder::{Noise, NoiseKey, Stream, Tier};
use ndarray::{ArrayD, Axis, IxDyn, Slice, concatenate};

use crate::describe::Description;
use crate::export::Place;

/// Rows of one call: as many timesteps.
const ROWS: usize = 4;
/// Rows of calls that take or make pictures.
const PICTURES: usize = 2;
/// Where nothing may be attended to: added to scores, as the captioner's host does.
const HIDDEN: f32 = decoder::caption::HIDDEN;
/// Side of the squares that smooth noise is constant over.
const SMOOTH: usize = 4;

/// Name and values of every input of a call.
pub(super) type Inputs = Vec<(String, ArrayD<f32>)>;

/// What the networks so far have made.
pub(super) struct Chain {
    known: BTreeMap<&'static str, ArrayD<f32>>,
    prior: Option<PriorSettings>,
    unclip: Option<UnclipSettings>,
    refiner: Option<RefinerSettings>,
    blurry_scale: f32,
    drawn: u32,
}

impl Chain {
    pub(super) fn new(description: &Description<'_>) -> Chain {
        Chain {
            known: BTreeMap::new(),
            prior: description.prior.clone(),
            unclip: description.unclip.clone(),
            refiner: description.refiner.clone(),
            blurry_scale: description.blurry.map_or(1.0, |blurry| blurry.latent_scale),
            drawn: 0,
        }
    }

    /// Inputs for one call of a network.
    ///
    /// - `specs`: what it takes.
    /// - `vocabulary`: rows of the table that an input of integers picks from.
    pub(super) fn inputs(
        &mut self,
        place: &Place,
        specs: &[TensorSpec],
        vocabulary: &dyn Fn(&str) -> u64,
    ) -> Inputs {
        let stage = match place {
            Place::Shared(name) => Some(*name),
            Place::Subject { .. } => None,
        };
        let rows = if pictures(stage) { PICTURES } else { ROWS };
        specs
            .iter()
            .map(|spec| {
                let shape = shape(spec, rows);
                let values = match spec.dtype {
                    DType::I64 => self.whole(&shape, vocabulary(&spec.name)),
                    DType::F32 => self.floats(stage, &spec.name, &shape),
                };
                (spec.name.clone(), values)
            })
            .collect()
    }

    fn floats(&mut self, stage: Option<StageName>, input: &str, shape: &[usize]) -> ArrayD<f32> {
        use StageName as S;
        match (stage, input) {
            (Some(S::Backbone), "ridge") => self.known_or_normal("ridge", shape),
            (Some(S::Prior), "tokens_noised") => self.noised_tokens(shape),
            (Some(S::Prior), "brain_tokens") => self.known_or_normal("brain_tokens", shape),
            (Some(S::Prior), "timestep") => each(&self.prior_times()),
            // The last row is the pass without condition.
            (Some(S::Prior), "keep") => each(&[1.0, 1.0, 1.0, 0.0]),
            (Some(S::Unclip | S::Refiner), "timestep") => each(&self.times()),
            (Some(S::Unclip | S::Refiner), "latent") => self.noised_latents(shape),
            (Some(S::Unclip), "context") => {
                let mut tokens = self.known_or_normal("clip_tokens", shape);
                // MindEye2's pass without condition reads normal tokens.
                let last = tokens.len_of(Axis(0)) - 1;
                let normal = self.normal(&shape[1..]);
                tokens.index_axis_mut(Axis(0), last).assign(&normal);
                tokens
            }
            (Some(S::Unclip), "vector") => {
                let vector = self.unclip.as_ref().map(|unclip| unclip.vector.clone());
                self.repeated(vector, shape)
            }
            (Some(S::Refiner), "context") => self.known_or_normal("prompt", shape),
            (Some(S::Refiner), "vector") => self.refiner_vector(shape),
            (Some(S::VaeDecoder | S::RefinerVaeDecoder | S::PreviewDecoder), "latent") => {
                let scale = match stage {
                    Some(S::VaeDecoder) => self.unclip.as_ref().map(|s| s.scale_factor),
                    Some(S::RefinerVaeDecoder) => self.refiner.as_ref().map(|s| s.scale_factor),
                    // Preview decoders take latents as samplers leave them.
                    _ => Some(1.0),
                };
                let mut latents = self.latents(shape);
                if let Some(known) = self.fitting("latent", &[&[1], &shape[1..]].concat()) {
                    latents
                        .slice_axis_mut(Axis(0), Slice::from(..1))
                        .assign(&known);
                }
                latents / scale.unwrap_or(1.0)
            }
            (Some(S::BlurryDecoder), "latent") => {
                self.known_or_normal("blurry_latent", shape) / self.blurry_scale
            }
            (Some(S::VaeEncoder | S::RefinerVaeEncoder), "image") => {
                let drawn = self.latents(shape) * 0.5;
                let image = self.fitting("image", shape).unwrap_or(drawn);
                image.mapv(|value| value.clamp(-1.0, 1.0))
            }
            (Some(S::ImageEncoder), "image") => self.latents(shape),
            (Some(S::CaptionBridge), "tokens") => self.known_or_normal("clip_tokens", shape),
            (Some(S::CaptionerPrefix), "vision") => self.known_or_normal("vision", shape),
            (Some(S::Captioner), "keys" | "values" | "hidden") => self.cached(input, shape),
            _ => self.normal(shape),
        }
    }

    /// Takes what later networks are given from a call's results.
    pub(super) fn learn(
        &mut self,
        place: &Place,
        inputs: &Inputs,
        outputs: &BTreeMap<String, ArrayD<f32>>,
    ) {
        use StageName as S;
        let Place::Shared(stage) = place else {
            self.keep("ridge", outputs.get("ridge"));
            return;
        };
        match stage {
            S::Backbone => {
                self.keep("brain_tokens", outputs.get("brain_tokens"));
                self.keep("blurry_latent", outputs.get("blurry_latent"));
            }
            S::Prior => self.keep("clip_tokens", outputs.get("pred")),
            S::Unclip => {
                let latent = inputs.iter().find(|(name, _)| name == "latent");
                if let (Some((_, latent)), Some(eps)) = (latent, outputs.get("eps")) {
                    let clean = self.denoised(latent, eps);
                    self.known.insert("latent", clean);
                }
            }
            S::VaeDecoder => self.keep("image", outputs.get("image")),
            S::CaptionBridge => self.keep("vision", outputs.get("vision")),
            S::CaptionerPrefix => {
                self.keep("keys", outputs.get("keys"));
                self.keep("values", outputs.get("values"));
            }
            S::TextEncoder1 => self.keep("prompt", outputs.get("hidden")),
            S::TextEncoder2 => {
                self.keep("pooled", outputs.get("pooled"));
                if let (Some(first), Some(second)) =
                    (self.known.get("prompt"), outputs.get("hidden"))
                    && let Ok(joined) = concatenate(Axis(2), &[first.view(), second.view()])
                {
                    self.known.insert("prompt", joined);
                }
            }
            _ => {}
        }
    }

    fn keep(&mut self, name: &'static str, values: Option<&ArrayD<f32>>) {
        if let Some(values) = values {
            self.known.insert(name, values.clone());
        }
    }

    /// What is known under a name where it has this shape, rows cut off or repeated.
    fn fitting(&self, name: &str, shape: &[usize]) -> Option<ArrayD<f32>> {
        let known = self.known.get(name)?;
        if known.ndim() != shape.len() || known.shape()[1..] != shape[1..] {
            return None;
        }
        let rows = known.len_of(Axis(0));
        let picked: Vec<usize> = (0..shape[0]).map(|row| row % rows.max(1)).collect();
        (rows > 0).then(|| known.select(Axis(0), &picked))
    }

    fn known_or_normal(&mut self, name: &str, shape: &[usize]) -> ArrayD<f32> {
        match self.fitting(name, shape) {
            Some(known) => known,
            None => self.normal(shape),
        }
    }

    fn normal(&mut self, shape: &[usize]) -> ArrayD<f32> {
        self.drawn += 1;
        let key = NoiseKey {
            session_seed: 0,
            run: 0,
            trial: self.drawn,
            tier: Tier::Fast,
        };
        Noise::new(key, Stream::Prior).draw(shape)
    }

    /// Unit variance, `[row, channel, height, width]`: noise and smooth noise in turn, as latents and
    /// pictures are smooth and what UNets start from is not.
    fn latents(&mut self, shape: &[usize]) -> ArrayD<f32> {
        let mut values = self.normal(shape);
        if shape.len() != 4 {
            return values;
        }
        for (row, mut map) in values.axis_iter_mut(Axis(0)).enumerate() {
            if row % 2 == 1 {
                let coarse = map.to_owned();
                map.indexed_iter_mut().for_each(|(at, value)| {
                    let corner = [at[0], at[1] / SMOOTH * SMOOTH, at[2] / SMOOTH * SMOOTH];
                    *value = coarse[IxDyn(&corner)];
                });
            }
        }
        values
    }

    fn noised_tokens(&mut self, shape: &[usize]) -> ArrayD<f32> {
        let clean = self.known_or_normal("brain_tokens", shape);
        let noise = self.normal(shape);
        let times = self.prior_times();
        let alphas = self.prior.as_ref().map(|p| p.tables.alphas_cumprod.clone());
        let alpha = |row: usize| {
            let table = alphas.as_ref()?;
            table.get(index(times[row % ROWS])).copied()
        };
        mixed(&clean, &noise, |row| {
            let alpha = alpha(row).unwrap_or(0.5);
            [alpha.sqrt(), (1.0 - alpha).sqrt()]
        })
    }

    fn noised_latents(&mut self, shape: &[usize]) -> ArrayD<f32> {
        let clean = self.latents(shape);
        let noise = self.normal(shape);
        let sigmas = self.sigmas();
        mixed(&clean, &noise, |row| {
            let sigma = sigmas[row % ROWS];
            let root = sigma.hypot(1.0);
            [1.0 / root, sigma / root]
        })
    }

    /// The clean latent that the call with the least noise predicts, `[1, …]`.
    fn denoised(&self, latent: &ArrayD<f32>, eps: &ArrayD<f32>) -> ArrayD<f32> {
        let sigma = self.sigmas()[ROWS - 1];
        let last = latent.len_of(Axis(0)).min(ROWS) - 1;
        let row = |values: &ArrayD<f32>| values.select(Axis(0), &[last]);
        row(latent) * sigma.hypot(1.0) - row(eps) * sigma
    }

    fn schedule(&self) -> EdmSchedule {
        let released = EdmSchedule {
            linear_start: 0.00085,
            linear_end: 0.012,
            steps: 1000,
        };
        let unclip = self.unclip.as_ref().map(|unclip| unclip.schedule);
        let refiner = self.refiner.as_ref().map(|refiner| refiner.schedule);
        unclip.or(refiner).unwrap_or(released)
    }

    fn times(&self) -> [f32; ROWS] {
        spaced(self.schedule().steps)
    }

    fn sigmas(&self) -> [f32; ROWS] {
        let table = SigmaTable::new(&self.schedule());
        self.times().map(|time| table.sigmas()[index(time)])
    }

    fn prior_times(&self) -> [f32; ROWS] {
        spaced(self.prior.as_ref().map_or(100, |prior| prior.timesteps))
    }

    fn refiner_vector(&mut self, shape: &[usize]) -> ArrayD<f32> {
        let sizes = decoder::conditioning::vector(&[768.0, 768.0, 0.0, 0.0, 1024.0, 1024.0], 256);
        let pooled = shape[1].checked_sub(sizes.len()).filter(|&width| width > 0);
        let Some(pooled) = pooled else {
            return self.normal(shape);
        };
        let pooled = self.known_or_normal("pooled", &[shape[0], pooled]);
        let sizes = self.repeated(Some(sizes.clone()), &[shape[0], sizes.len()]);
        concatenate(Axis(1), &[pooled.view(), sizes.view()]).unwrap_or(pooled)
    }

    fn repeated(&mut self, row: Option<Vec<f32>>, shape: &[usize]) -> ArrayD<f32> {
        let row = row.filter(|row| [row.len()] == shape[1..]);
        let row = row.and_then(|row| ArrayD::from_shape_vec(IxDyn(&shape[1..]), row).ok());
        let all = row.and_then(|row| Some(row.broadcast(IxDyn(shape))?.to_owned()));
        all.unwrap_or_else(|| self.normal(shape))
    }

    /// The captioner's cache with room for words: vision tokens are there, words are hidden.
    fn cached(&mut self, input: &str, shape: &[usize]) -> ArrayD<f32> {
        let known = self.known.get("keys").map(|keys| keys.shape()[2]);
        let vision = known.unwrap_or(usize::MAX);
        if input == "hidden" {
            let mut hidden = ArrayD::from_elem(IxDyn(shape), HIDDEN);
            let there = Slice::from(..vision.min(shape[1]));
            hidden.slice_axis_mut(Axis(1), there).fill(0.0);
            return hidden;
        }
        let there = [shape[0], shape[1], vision.min(shape[2]), shape[3]];
        let part = self.known_or_normal(if input == "keys" { "keys" } else { "values" }, &there);
        let mut all = ArrayD::zeros(IxDyn(shape));
        all.slice_axis_mut(Axis(2), Slice::from(..there[2]))
            .assign(&part);
        all
    }

    fn whole(&mut self, shape: &[usize], below: u64) -> ArrayD<f32> {
        #[expect(
            clippy::cast_precision_loss,
            reason = "vocabularies are far below 2^24"
        )]
        let below = below.max(1) as f32;
        let scaled = |value: f32| (value.abs() * 1000.0).floor() % below;
        self.normal(shape).mapv(scaled)
    }
}

fn pictures(stage: Option<StageName>) -> bool {
    use StageName as S;
    matches!(
        stage,
        Some(
            S::VaeDecoder
                | S::VaeEncoder
                | S::RefinerVaeDecoder
                | S::RefinerVaeEncoder
                | S::BlurryDecoder
                | S::PreviewDecoder
                | S::ImageEncoder
        )
    )
}

fn shape(spec: &TensorSpec, rows: usize) -> Vec<usize> {
    let len = |dim: &Dim| match dim {
        Dim::Batch(_) => rows,
        Dim::Fixed(len) => usize::try_from(*len).unwrap_or(usize::MAX),
    };
    spec.shape.iter().map(len).collect()
}

fn each(values: &[f32; ROWS]) -> ArrayD<f32> {
    ArrayD::from_shape_fn(IxDyn(&[ROWS]), |at| values[at[0]])
}

/// Four timesteps from the last to the first.
#[expect(clippy::cast_precision_loss, reason = "timesteps are far below 2^24")]
fn spaced(steps: u32) -> [f32; ROWS] {
    let last = steps.max(1) - 1;
    [last, last / 3 * 2, last / 3, 0].map(|time| time as f32)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "timesteps are small and whole"
)]
fn index(time: f32) -> usize {
    time as usize
}

/// `clean` and `noise` weighed row by row.
fn mixed(
    clean: &ArrayD<f32>,
    noise: &ArrayD<f32>,
    weights: impl Fn(usize) -> [f32; 2],
) -> ArrayD<f32> {
    let mut sum = clean.clone();
    for (row, (mut sum, noise)) in sum
        .axis_iter_mut(Axis(0))
        .zip(noise.axis_iter(Axis(0)))
        .enumerate()
    {
        let [kept, added] = weights(row);
        sum.zip_mut_with(&noise, |sum, noise| *sum = *sum * kept + noise * added);
    }
    sum
}
