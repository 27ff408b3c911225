//! The whole way from betas to a picture, with one bundle and one person.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bundle::{Bundle, PriorSettings, StageName, UnclipSettings};
use ndarray::{Array2, ArrayD, ArrayView2, Axis, IxDyn};
use serde::{Deserialize, Serialize};

use crate::sampler::{
    GuidanceScale, SamplerError, SigmaTable, euler_edm, lcm, prior_ddim, spacing,
};
use crate::{Noise, NoiseKey, Picture, PictureError, Range, Runtime, Stage, StageError, Stream};

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
}

/// What is known before the end.
#[derive(Debug)]
pub enum Progress<'p> {
    /// The low-level picture.
    Blurry(&'p Picture),
    /// A network call of a sampler is done.
    Step {
        /// `prior` or `unclip`.
        sampler: &'static str,
        /// From 1.
        step: usize,
        /// In all.
        of: usize,
    },
    /// The picture before refinement.
    Unrefined(&'p Picture),
}

/// Wall time of each part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Ridge and backbone, milliseconds.
    pub brain_ms: f64,
    /// Blurry picture, milliseconds.
    pub blurry_ms: f64,
    /// Diffusion prior, milliseconds.
    pub prior_ms: f64,
    /// unCLIP, milliseconds.
    pub unclip_ms: f64,
    /// Latent to picture, milliseconds.
    pub vae_ms: f64,
}

/// Everything decoded from one trial.
#[derive(Clone, Debug)]
pub struct Reconstruction {
    /// Low-level picture; `None` where the bundle has no blurry head.
    pub blurry: Option<Picture>,
    /// The picture; `None` where the bundle has no unCLIP.
    pub picture: Option<Picture>,
    /// Retrieval embedding `[token, dim]`; `None` where the backbone has none.
    pub retrieval: Option<Array2<f32>>,
    /// Network calls of unCLIP.
    pub steps: usize,
    /// Wall times.
    pub timings: Timings,
}

/// The networks from CLIP tokens to a picture; a bundle has all of them or none.
struct Painter {
    prior: Stage,
    prior_settings: PriorSettings,
    unclip: Stage,
    settings: UnclipSettings,
    table: SigmaTable,
    vae: Stage,
}

/// A bundle's networks, opened for one person.
pub struct Decoder {
    subject_id: String,
    voxels: usize,
    subject: Stage,
    backbone: Stage,
    blurry: Option<(Stage, f32)>,
    painter: Option<Painter>,
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
    /// # Errors
    /// [`DecodeError`] where the person is unknown, a network is missing or does not open.
    pub fn load(
        runtime: &Runtime,
        bundle: &Bundle,
        subject_id: &str,
        fidelity: Fidelity,
    ) -> Result<Decoder, DecodeError> {
        let manifest = bundle.manifest();
        let Some(subject) = manifest
            .subjects
            .iter()
            .find(|subject| subject.id == subject_id)
        else {
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
        let open = |name: &str, spec: &bundle::Stage| {
            Stage::open(runtime, bundle, spec).map_err(|source| DecodeError::Stage {
                stage: name.into(),
                source,
            })
        };
        let stage = |name: StageName| {
            manifest
                .stages
                .get(&name)
                .map(|spec| open(name.as_str(), spec))
                .transpose()
        };
        let missing = |missing: &'static str, needed_by: &'static str| DecodeError::Incomplete {
            missing,
            needed_by,
        };
        let backbone = stage(StageName::Backbone)?.ok_or(missing("backbone", "every picture"))?;
        let blurry = match (stage(StageName::BlurryDecoder)?, manifest.blurry) {
            (Some(stage), Some(settings)) if backbone.spec().output("blurry_latent").is_some() => {
                Some((stage, settings.latent_scale))
            }
            _ => None,
        };
        let painter = match stage(StageName::Unclip)? {
            None => None,
            Some(unclip) => {
                let settings = manifest
                    .unclip
                    .clone()
                    .ok_or(missing("unclip settings", "unclip"))?;
                let prior_settings = manifest
                    .prior
                    .clone()
                    .ok_or(missing("prior settings", "unclip"))?;
                Some(Painter {
                    prior: stage(StageName::Prior)?.ok_or(missing("prior", "unclip"))?,
                    prior_settings,
                    unclip,
                    table: SigmaTable::new(&settings.schedule),
                    settings,
                    vae: stage(StageName::VaeDecoder)?.ok_or(missing("vae_decoder", "unclip"))?,
                })
            }
        };
        Ok(Decoder {
            subject_id: subject_id.into(),
            voxels: usize::try_from(subject.voxels).unwrap_or(usize::MAX),
            subject: open(subject_id, &subject.stage)?,
            backbone,
            blurry,
            painter,
            fidelity,
        })
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
        self.check(zbetas)?;
        let mut timings = Timings::default();
        let clock = Instant::now();
        let mut brain = self.brain(zbetas)?;
        timings.brain_ms = millis(clock.elapsed());

        let clock = Instant::now();
        let blurry = match (&self.blurry, brain.remove("blurry_latent")) {
            (Some((stage, scale)), Some(latent)) => {
                let latent = latent / *scale;
                Some(paint(stage, "blurry_decoder", &latent, Range::SYMMETRIC)?)
            }
            _ => None,
        };
        if let Some(blurry) = &blurry {
            progress(Progress::Blurry(blurry));
            timings.blurry_ms = millis(clock.elapsed());
        }

        let (mut picture, mut steps) = (None, 0);
        if let (Some(painter), Some(tokens)) = (&self.painter, brain.remove("brain_tokens")) {
            let clock = Instant::now();
            let context = painter.prior(&tokens, key, progress)?;
            timings.prior_ms = millis(clock.elapsed());
            let clock = Instant::now();
            let latent;
            (latent, steps) = match self.fidelity {
                Fidelity::Reference => painter.euler(&context, key, progress)?,
                Fidelity::Edge => painter.lcm(&context, key, progress)?,
            };
            timings.unclip_ms = millis(clock.elapsed());
            let clock = Instant::now();
            let latent = latent / painter.settings.scale_factor;
            let range = Range {
                scale: painter.settings.image_scale,
                shift: painter.settings.image_shift,
            };
            let painted = paint(&painter.vae, "vae_decoder", &latent, range)?;
            timings.vae_ms = millis(clock.elapsed());
            progress(Progress::Unrefined(&painted));
            picture = Some(painted);
        }
        let retrieval = brain.remove("retrieval").and_then(|values| {
            values
                .index_axis_move(Axis(0), 0)
                .into_dimensionality()
                .ok()
        });
        Ok(Reconstruction {
            blurry,
            picture,
            retrieval,
            steps,
            timings,
        })
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

impl Painter {
    /// CLIP image tokens `[1, token, dim]` from brain tokens of the same shape.
    fn prior(
        &self,
        tokens: &ArrayD<f32>,
        key: NoiseKey,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<ArrayD<f32>, DecodeError> {
        let shape = tokens.shape().to_vec();
        let mut noise = Noise::new(key, Stream::Prior);
        let start = noise.draw(&shape);
        let (settings, keep) = (&self.prior_settings, scalar(1.0));
        let of = prior_ddim::times(settings.timesteps, settings.sampling_steps).len();
        let drop = scalar(0.0);
        let mut call = |noised: &ArrayD<f32>, time: usize| {
            let time = scalar(as_float(time));
            let predict = |keep: &ArrayD<f32>| {
                output(
                    &self.prior,
                    &[
                        ("tokens_noised", noised),
                        ("timestep", &time),
                        ("brain_tokens", tokens),
                        ("keep", keep),
                    ],
                    "pred",
                )
            };
            let with = predict(&keep)?;
            #[expect(clippy::float_cmp, reason = "exactly 1 means no second call")]
            if settings.cond_scale == 1.0 {
                return Ok(with);
            }
            let without = predict(&drop)?;
            Ok(&without + &((with - &without) * settings.cond_scale))
        };
        prior_ddim::sample(
            settings,
            start,
            &mut call,
            &mut || noise.draw(&shape),
            &mut |step, _| {
                progress(Progress::Step {
                    sampler: "prior",
                    step: step + 1,
                    of,
                })
            },
        )
        .map_err(|source| DecodeError::Sampler {
            network: "prior",
            source,
        })
    }

    fn shape(&self) -> [usize; 4] {
        let len = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let settings = &self.settings;
        [
            1,
            len(settings.latent_channels),
            len(settings.latent_height),
            len(settings.latent_width),
        ]
    }

    fn vector(&self) -> ArrayD<f32> {
        let values = self.settings.vector.clone();
        ArrayD::from_shape_vec(IxDyn(&[1, values.len()]), values).unwrap_or_default()
    }

    fn euler(
        &self,
        context: &ArrayD<f32>,
        key: NoiseKey,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(ArrayD<f32>, usize), DecodeError> {
        let mut noise = Noise::new(key, Stream::Unclip);
        // The original's order of draws.
        let z = noise.draw(&self.shape());
        let uncond = noise.draw(context.shape());
        let start = euler_edm::Start {
            z,
            noise: noise.draw(&self.shape()),
            offset: noise.draw(&[1]),
            offset_level: self.settings.offset_noise,
        };
        let of = self.settings.steps as usize;
        let vector = self.vector();
        let latent = euler_edm::sample(
            &self.table,
            of,
            GuidanceScale(self.settings.guidance),
            &start,
            &mut |latent, time| self.eps(latent, time, context, &vector),
            &mut |latent, time| self.eps(latent, time, &uncond, &vector),
            &mut |step, _| {
                progress(Progress::Step {
                    sampler: "unclip",
                    step: step + 1,
                    of,
                })
            },
        )
        .map_err(|source| DecodeError::Sampler {
            network: "unclip",
            source,
        })?;
        Ok((latent, of))
    }

    fn lcm(
        &self,
        context: &ArrayD<f32>,
        key: NoiseKey,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(ArrayD<f32>, usize), DecodeError> {
        let of = self.settings.edge.steps as usize;
        let vector = self.vector();
        let shape = self.shape();
        let mut fresh = Noise::new(key, Stream::UnclipSteps);
        let failed = |source| DecodeError::Sampler {
            network: "unclip",
            source,
        };
        let times = spacing::distilled(self.table.sigmas().len(), of, 1.0).map_err(failed)?;
        let latent = lcm::sample(
            &self.table,
            &times,
            Noise::new(key, Stream::Unclip).draw(&shape),
            &mut |latent, time| self.eps(latent, time, context, &vector),
            &mut || fresh.draw(&shape),
            &mut |step, _| {
                progress(Progress::Step {
                    sampler: "unclip",
                    step: step + 1,
                    of,
                })
            },
        )
        .map_err(|source| DecodeError::Sampler {
            network: "unclip",
            source,
        })?;
        Ok((latent, of))
    }

    fn eps(
        &self,
        latent: &ArrayD<f32>,
        time: usize,
        context: &ArrayD<f32>,
        vector: &ArrayD<f32>,
    ) -> Result<ArrayD<f32>, StageError> {
        let time = scalar(as_float(time));
        let inputs = [
            ("latent", latent),
            ("timestep", &time),
            ("context", context),
            ("vector", vector),
        ];
        output(&self.unclip, &inputs, "eps")
    }
}

/// One output of a network.
fn output(
    stage: &Stage,
    inputs: &[(&str, &ArrayD<f32>)],
    name: &str,
) -> Result<ArrayD<f32>, StageError> {
    let views: Vec<_> = inputs
        .iter()
        .map(|(name, values)| (*name, values.view()))
        .collect();
    let mut outputs = stage.run(&views)?;
    outputs.remove(name).ok_or_else(|| StageError::Interface {
        path: stage.spec().graph.clone().into(),
        expected: format!("output {name}"),
        found: "none of that name".into(),
    })
}

fn paint(
    stage: &Stage,
    name: &'static str,
    latent: &ArrayD<f32>,
    range: Range,
) -> Result<Picture, DecodeError> {
    let image =
        output(stage, &[("latent", latent)], "image").map_err(|source| DecodeError::Stage {
            stage: name.into(),
            source,
        })?;
    Picture::from_raw(image.view(), range).map_err(|source| DecodeError::Picture {
        stage: name,
        source,
    })
}

fn scalar(value: f32) -> ArrayD<f32> {
    ArrayD::from_elem(IxDyn(&[1]), value)
}

#[expect(clippy::cast_precision_loss, reason = "timesteps are far below 2^24")]
fn as_float(time: usize) -> f32 {
    time as f32
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
