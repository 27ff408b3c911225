//! The whole way from betas to a picture, with one bundle and one person.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bundle::{Bundle, StageName};
use ndarray::{Array2, ArrayD, ArrayView2, ArrayView4, Axis, Ix4};
use serde::{Deserialize, Serialize};

use crate::caption::CaptionError;
use crate::narrator::Narrator;
use crate::networks::{Networks, index};
use crate::noise::{Draw, KeyedNoise};
use crate::painter::{Painter, decoded};
use crate::refiner::{Refiner, Unrefined};
use crate::sampler::SamplerError;
use crate::text::PromptError;
use crate::{NoiseKey, Picture, PictureError, Range, Runtime, Stage, StageError};

/// How closely the original's sampling is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fidelity {
    /// The original MindEye2 inference: 38 guided Euler steps in the released models.
    Reference,
    /// A few consistency steps without a guidance pass.
    Edge,
}

/// Why a picture cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bundle has no such person.
    #[error("the bundle has no subject {asked}; it has {known}")]
    Subject {
        /// Asked for.
        asked: String,
        /// In the bundle.
        known: String,
    },
    /// The bundle lacks a network that others need.
    #[error("the bundle has no {missing}, which {needed_by} needs")]
    Incomplete {
        /// What is not there.
        missing: &'static str,
        /// What would use it.
        needed_by: &'static str,
    },
    /// Betas of another length than this person's mask.
    #[error("expected betas of {expected} voxels for subject {subject}, found {found}")]
    Voxels {
        /// The person.
        subject: String,
        /// Voxels of the ridge.
        expected: usize,
        /// Voxels given.
        found: usize,
    },
    /// No repetition to decode.
    #[error("there are no betas to decode")]
    Empty,
    /// A beta that is not a number.
    #[error("the beta of voxel {voxel} in repetition {repetition} is {value}")]
    NotFinite {
        /// From 0.
        repetition: usize,
        /// From 0.
        voxel: usize,
        /// What it is.
        value: f32,
    },
    /// A network cannot be opened or called.
    #[error("{stage}")]
    Stage {
        /// The network.
        stage: String,
        /// Why.
        source: StageError,
    },
    /// A sampler stopped.
    #[error("sampling with the {network} failed")]
    Sampler {
        /// The network it calls.
        network: &'static str,
        /// Why.
        source: SamplerError,
    },
    /// A decoder's output is not a picture.
    #[error("{stage}")]
    Picture {
        /// The network.
        stage: &'static str,
        /// Why.
        source: PictureError,
    },
    /// An output with other axes than the next network takes.
    #[error("{stage} returned shape {found:?}, which the next network does not take")]
    Axes {
        /// The network.
        stage: &'static str,
        /// Its output's shape.
        found: Vec<usize>,
    },
    /// There is no caption.
    #[error("the picture cannot be captioned")]
    Caption(#[from] CaptionError),
    /// The caption's vocabulary or the text encoders cannot be used.
    #[error("text cannot be read")]
    Text(#[from] PromptError),
}

/// What is known before the end.
#[derive(Debug)]
pub enum Progress<'p> {
    /// The low-level picture.
    Blurry(&'p Picture),
    /// A network call of a sampler is done.
    Step {
        /// `prior`, `unclip` or `refiner`.
        sampler: &'static str,
        /// From 1.
        step: usize,
        /// In all.
        of: usize,
    },
    /// The picture before refinement.
    Unrefined(&'p Picture),
    /// What the captioner says is in it.
    Caption(&'p str),
    /// The refined picture, blended with the blurry one.
    Refined(&'p Picture),
    /// What one part hands to the next, for parity checks: `brain_tokens`, `clip_tokens`, `latent`,
    /// `unrefined`, `blurry`, `refiner_in`, `refiner_context`, `refiner_vector`, `refiner_start`,
    /// `refiner_latent`, `refined`, `final`.
    Part {
        /// Its name.
        name: &'static str,
        /// Its values; pictures are `[1, 3, height, width]` with intensities 0..1.
        values: &'p ArrayD<f32>,
    },
}

/// Tells somebody how far decoding is.
pub(crate) struct Report<'r>(&'r mut dyn FnMut(Progress<'_>));

impl Report<'_> {
    pub(crate) fn tell(&mut self, progress: Progress<'_>) {
        (self.0)(progress);
    }

    pub(crate) fn part(&mut self, name: &'static str, values: &ArrayD<f32>) {
        self.tell(Progress::Part { name, values });
    }
}

/// Wall time of each part, milliseconds; zero for what was not done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Ridge and backbone.
    pub brain_ms: f64,
    /// Blurry picture.
    pub blurry_ms: f64,
    /// Diffusion prior.
    pub prior_ms: f64,
    /// unCLIP.
    pub unclip_ms: f64,
    /// Latent to picture.
    pub vae_ms: f64,
    /// Bridge and captioner.
    pub caption_ms: f64,
    /// Text encoders, refiner and blend.
    pub refiner_ms: f64,
}

impl Timings {
    /// All of it.
    #[must_use]
    pub fn total_ms(&self) -> f64 {
        self.brain_ms
            + self.blurry_ms
            + self.prior_ms
            + self.unclip_ms
            + self.vae_ms
            + self.caption_ms
            + self.refiner_ms
    }
}

/// Everything decoded from one trial.
#[derive(Clone, Debug, Default)]
pub struct Reconstruction {
    /// Low-level picture; `None` where the bundle has no blurry head.
    pub blurry: Option<Picture>,
    /// The picture; `None` where the bundle has no unCLIP.
    pub picture: Option<Picture>,
    /// What is in it, in words; `None` where the bundle has no captioner.
    pub caption: Option<String>,
    /// The picture refined and blended with the blurry one; `None` where the bundle has no refiner.
    pub refined: Option<Picture>,
    /// Retrieval embedding `[token, dim]`; `None` where the backbone has none.
    pub retrieval: Option<Array2<f32>>,
    /// Steps of unCLIP.
    pub steps: usize,
    /// Steps of the refiner.
    pub refiner_steps: usize,
    /// Wall times.
    pub timings: Timings,
}

/// How a bundle is opened.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadOptions {
    /// How closely the original's sampling is followed.
    pub fidelity: Fidelity,
    /// Optional networks that are not opened, although the bundle has them.
    pub without: BTreeSet<StageName>,
    /// Whether unCLIP's latent goes to the refiner as it is in the `edge` fidelity, in place of
    /// what the manifest says.
    pub keep_latent: Option<bool>,
}

impl From<Fidelity> for LoadOptions {
    fn from(fidelity: Fidelity) -> Self {
        LoadOptions {
            fidelity,
            without: BTreeSet::new(),
            keep_latent: None,
        }
    }
}

/// A part of the way that a bundle has no networks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwitchedOff {
    /// What will not be there.
    pub feature: &'static str,
    /// The network that would make it.
    pub lacks: StageName,
}

/// A bundle's networks, opened for one person.
pub struct Decoder {
    subject_id: String,
    voxels: usize,
    subject: Stage,
    backbone: Stage,
    blurry: Option<(Stage, f32)>,
    painter: Option<Painter>,
    narrator: Option<Narrator>,
    refiner: Option<Refiner>,
    fidelity: Fidelity,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("subject", &self.subject_id)
            .field("voxels", &self.voxels)
            .field("fidelity", &self.fidelity)
            .finish_non_exhaustive()
    }
}

impl Decoder {
    /// Opens a person's ridge and every shared network.
    ///
    /// - `options`: a fidelity alone opens whatever the bundle has.
    ///
    /// # Errors
    /// [`DecodeError`] where the person is unknown, a network is missing or does not open.
    pub fn load(
        runtime: &Runtime,
        bundle: &Bundle,
        subject_id: &str,
        options: impl Into<LoadOptions>,
    ) -> Result<Decoder, DecodeError> {
        let options = options.into();
        let fidelity = options.fidelity;
        let manifest = bundle.manifest();
        let Some(subject) = manifest.subject(subject_id) else {
            let known: Vec<&str> = manifest
                .subjects
                .iter()
                .map(|subject| subject.id.as_str())
                .collect();
            return Err(DecodeError::Subject {
                asked: subject_id.into(),
                known: known.join(", "),
            });
        };
        let networks = Networks {
            runtime,
            bundle,
            options: &options,
        };
        let ridge =
            Stage::open(runtime, bundle, &subject.stage).map_err(|source| DecodeError::Stage {
                stage: subject_id.into(),
                source,
            })?;
        let backbone = networks.need(StageName::Backbone, "every picture")?;
        let blurry = match (networks.find(StageName::BlurryDecoder)?, manifest.blurry) {
            (Some(stage), Some(settings)) if backbone.spec().output("blurry_latent").is_some() => {
                Some((stage, settings.latent_scale))
            }
            _ => None,
        };
        let painter = Painter::open(networks)?;
        // Captions and refinement begin with unCLIP's tokens and picture.
        let painted = painter.is_some();
        let narrator = painted
            .then(|| Narrator::open(networks))
            .transpose()?
            .flatten();
        let refiner = painted
            .then(|| Refiner::open(networks))
            .transpose()?
            .flatten();
        Ok(Decoder {
            subject_id: subject_id.into(),
            voxels: index(subject.voxels),
            subject: ridge,
            backbone,
            blurry,
            painter,
            narrator,
            refiner,
            fidelity,
        })
    }

    /// What this bundle cannot show, and why.
    #[must_use]
    pub fn switched_off(&self) -> Vec<SwitchedOff> {
        let parts = [
            (
                "blurry pictures",
                StageName::BlurryDecoder,
                self.blurry.is_some(),
            ),
            ("pictures", StageName::Unclip, self.painter.is_some()),
            ("captions", StageName::Captioner, self.narrator.is_some()),
            (
                "refined pictures",
                StageName::Refiner,
                self.refiner.is_some(),
            ),
        ];
        let off = parts.into_iter().filter(|(.., there)| !there);
        off.map(|(feature, lacks, _)| SwitchedOff { feature, lacks })
            .collect()
    }

    /// Voxels of this person's mask.
    #[must_use]
    pub fn voxels(&self) -> usize {
        self.voxels
    }

    /// How the original is followed.
    #[must_use]
    pub fn fidelity(&self) -> Fidelity {
        self.fidelity
    }

    /// Decodes one trial.
    ///
    /// - `zbetas`: `[repetition, voxel]`, z-scored; the backbone's outputs are averaged over
    ///   repetitions, not the voxels.
    /// - `key`: what all noise is derived from.
    /// - `progress`: sees every part as it is ready.
    ///
    /// # Errors
    /// [`DecodeError`] where the betas do not fit or a network fails.
    pub fn decode(
        &self,
        zbetas: ArrayView2<'_, f32>,
        key: NoiseKey,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Reconstruction, DecodeError> {
        let mut noise = KeyedNoise::new(key);
        self.decode_with(
            zbetas,
            &mut |stream, shape| noise.draw(stream, shape),
            progress,
        )
    }

    /// As [`Self::decode`], with noise from elsewhere: parity checks give it what was recorded.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_with(
        &self,
        zbetas: ArrayView2<'_, f32>,
        draw: &mut Draw<'_>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Reconstruction, DecodeError> {
        self.check(zbetas)?;
        let report = &mut Report(progress);
        let mut made = Reconstruction::default();
        let clock = Instant::now();
        let mut brain = self.brain(zbetas)?;
        made.timings.brain_ms = millis(clock.elapsed());

        let clock = Instant::now();
        let blurry = match (&self.blurry, brain.remove("blurry_latent")) {
            (Some((stage, scale)), Some(latent)) => {
                let picture = decoded(stage, "blurry_decoder", &latent, *scale, Range::SYMMETRIC)?;
                report.part("blurry", &picture);
                Some(picture)
            }
            _ => None,
        };
        if let Some(blurry) = &blurry {
            let shown = picture("blurry_decoder", blurry)?;
            report.tell(Progress::Blurry(&shown));
            made.blurry = Some(shown);
            made.timings.blurry_ms = millis(clock.elapsed());
        }
        let retrieval = brain
            .remove("retrieval")
            .map(|values| values.index_axis_move(Axis(0), 0));
        made.retrieval = retrieval.and_then(|values| values.into_dimensionality().ok());
        if let (Some(painter), Some(tokens)) = (&self.painter, brain.remove("brain_tokens")) {
            report.part("brain_tokens", &tokens);
            self.paint(painter, &tokens, blurry.as_ref(), draw, report, &mut made)?;
        }
        Ok(made)
    }

    /// Brain tokens to picture, caption and refined picture.
    fn paint(
        &self,
        painter: &Painter,
        tokens: &ArrayD<f32>,
        blurry: Option<&ArrayD<f32>>,
        draw: &mut Draw<'_>,
        report: &mut Report<'_>,
        made: &mut Reconstruction,
    ) -> Result<(), DecodeError> {
        let clock = Instant::now();
        let context = painter.clip_tokens(tokens, self.fidelity, draw, report)?;
        report.part("clip_tokens", &context);
        made.timings.prior_ms = millis(clock.elapsed());

        let clock = Instant::now();
        let (latent, steps) = painter.latent(&context, self.fidelity, draw, report)?;
        report.part("latent", &latent);
        made.steps = steps;
        made.timings.unclip_ms = millis(clock.elapsed());

        let clock = Instant::now();
        let unrefined = painter.picture(&latent)?;
        report.part("unrefined", &unrefined);
        let shown = picture("vae_decoder", &unrefined)?;
        made.timings.vae_ms = millis(clock.elapsed());
        report.tell(Progress::Unrefined(&shown));
        made.picture = Some(shown);

        if let Some(narrator) = &self.narrator {
            let clock = Instant::now();
            let caption = narrator.caption(&context)?;
            made.timings.caption_ms = millis(clock.elapsed());
            report.tell(Progress::Caption(&caption));
            made.caption = Some(caption);
        }
        if let Some(refiner) = &self.refiner {
            let clock = Instant::now();
            let from = Unrefined {
                picture: planes("vae_decoder", &unrefined)?,
                latent: &latent,
                scale_factor: painter.settings.scale_factor,
            };
            let prompt = made.caption.as_deref().unwrap_or_default();
            let (refined, steps) = refiner.refine(from, prompt, self.fidelity, draw, report)?;
            let refined = planes("refiner_vae_decoder", &refined)?;
            let whole = refiner.blend(refined, blurry, self.fidelity).into_dyn();
            report.part("final", &whole);
            let shown = picture("refiner_vae_decoder", &whole)?;
            made.refiner_steps = steps;
            made.timings.refiner_ms = millis(clock.elapsed());
            report.tell(Progress::Refined(&shown));
            made.refined = Some(shown);
        }
        Ok(())
    }

    fn check(&self, zbetas: ArrayView2<'_, f32>) -> Result<(), DecodeError> {
        if zbetas.nrows() == 0 {
            return Err(DecodeError::Empty);
        }
        if zbetas.ncols() != self.voxels {
            return Err(DecodeError::Voxels {
                subject: self.subject_id.clone(),
                expected: self.voxels,
                found: zbetas.ncols(),
            });
        }
        match zbetas.indexed_iter().find(|(_, value)| !value.is_finite()) {
            Some(((repetition, voxel), &value)) => Err(DecodeError::NotFinite {
                repetition,
                voxel,
                value,
            }),
            None => Ok(()),
        }
    }

    /// The backbone's outputs, each averaged over repetitions to `[1, …]`.
    fn brain(
        &self,
        zbetas: ArrayView2<'_, f32>,
    ) -> Result<BTreeMap<String, ArrayD<f32>>, DecodeError> {
        let failed = |stage: &str| {
            let stage = stage.to_owned();
            move |source| DecodeError::Stage { stage, source }
        };
        let mut ridge = self
            .subject
            .run(&[("betas", zbetas.into_dyn())])
            .map_err(failed(&self.subject_id))?;
        let Some(ridge) = ridge.remove("ridge") else {
            return Err(DecodeError::Incomplete {
                missing: "output ridge",
                needed_by: "backbone",
            });
        };
        let outputs = self
            .backbone
            .run(&[("ridge", ridge.view())])
            .map_err(failed("backbone"))?;
        let averaged = outputs.into_iter().filter_map(|(name, values)| {
            Some((name, values.mean_axis(Axis(0))?.insert_axis(Axis(0))))
        });
        Ok(averaged.collect())
    }
}

/// A picture to show; what lies outside 0..1 is clipped.
fn picture(stage: &'static str, values: &ArrayD<f32>) -> Result<Picture, DecodeError> {
    Picture::from_raw(values.view(), Range::UNIT)
        .map_err(|source| DecodeError::Picture { stage, source })
}

fn planes<'v>(
    stage: &'static str,
    values: &'v ArrayD<f32>,
) -> Result<ArrayView4<'v, f32>, DecodeError> {
    let found = || values.shape().to_vec();
    let view = values.view().into_dimensionality::<Ix4>();
    view.map_err(|_| DecodeError::Axes {
        stage,
        found: found(),
    })
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
