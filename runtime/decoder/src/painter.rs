//! Brain tokens to a picture: diffusion prior, unCLIP, autoencoder.

use bundle::{PriorSettings, StageName, UnclipSettings};
use ndarray::{ArrayD, IxDyn};

use crate::decode::Report;
use crate::networks::{Networks, eps, index, output, scalar, timestep};
use crate::noise::Draw;
use crate::sampler::{GuidanceScale, SamplerError, SigmaTable, euler_edm, few_step, prior_ddim};
use crate::{DecodeError, Fidelity, Progress, Range, Stage, Stream};

/// The networks from brain tokens to a picture; a bundle has all of them or none.
pub(crate) struct Painter {
    prior: Stage,
    prior_settings: PriorSettings,
    unclip: Stage,
    pub(crate) settings: UnclipSettings,
    table: SigmaTable,
    vae: Stage,
}

impl Painter {
    /// `None` where the bundle has no unCLIP.
    pub(crate) fn open(networks: Networks<'_>) -> Result<Option<Painter>, DecodeError> {
        let Some(unclip) = networks.find(StageName::Unclip)? else {
            return Ok(None);
        };
        let manifest = networks.bundle.manifest();
        let missing = |missing| DecodeError::Incomplete {
            missing,
            needed_by: "unclip",
        };
        let settings = manifest.unclip.clone().ok_or(missing("unclip settings"))?;
        let prior_settings = manifest.prior.clone().ok_or(missing("prior settings"))?;
        Ok(Some(Painter {
            prior: networks.need(StageName::Prior, "unclip")?,
            prior_settings,
            unclip,
            table: SigmaTable::new(&settings.schedule),
            settings,
            vae: networks.need(StageName::VaeDecoder, "unclip")?,
        }))
    }

    /// CLIP image tokens `[1, token, dim]` from brain tokens of the same shape.
    pub(crate) fn clip_tokens(
        &self,
        brain: &ArrayD<f32>,
        fidelity: Fidelity,
        draw: &mut Draw<'_>,
        report: &mut Report<'_>,
    ) -> Result<ArrayD<f32>, DecodeError> {
        let settings = &self.prior_settings;
        let steps = match fidelity {
            Fidelity::Reference => settings.sampling_steps,
            Fidelity::Edge => settings.edge_steps,
        };
        let shape = brain.shape().to_vec();
        let start = draw(Stream::Prior, &shape);
        let of = prior_ddim::times(settings.timesteps, steps).len();
        let (keep, drop) = (scalar(1.0), scalar(0.0));
        let mut call = |noised: &ArrayD<f32>, time: usize| {
            let time = timestep(time);
            let predict = |keep: &ArrayD<f32>| {
                let inputs = [
                    ("tokens_noised", noised),
                    ("timestep", &time),
                    ("brain_tokens", brain),
                    ("keep", keep),
                ];
                output(&self.prior, &inputs, "pred")
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
            steps,
            start,
            &mut call,
            &mut || draw(Stream::Prior, &shape),
            &mut |step, _| report.step("prior", step, of),
        )
        .map_err(failed("prior"))
    }

    /// A latent `[1, channel, height, width]` for CLIP image tokens `[1, token, dim]`, scaled as the
    /// network was trained, and the number of steps.
    pub(crate) fn latent(
        &self,
        context: &ArrayD<f32>,
        fidelity: Fidelity,
        draw: &mut Draw<'_>,
        report: &mut Report<'_>,
    ) -> Result<(ArrayD<f32>, usize), DecodeError> {
        let settings = &self.settings;
        let vector =
            ArrayD::from_shape_vec(IxDyn(&[1, settings.vector.len()]), settings.vector.clone())
                .unwrap_or_default();
        let shape = [
            1,
            index(settings.latent_channels),
            index(settings.latent_height),
            index(settings.latent_width),
        ];
        let mut conditioned =
            |latent: &ArrayD<f32>, time| eps(&self.unclip, latent, time, context, &vector);
        match fidelity {
            Fidelity::Reference => {
                // The original's order of draws.
                let z = draw(Stream::Unclip, &shape);
                let uncond = draw(Stream::Unclip, context.shape());
                let start = euler_edm::Start {
                    z,
                    noise: draw(Stream::Unclip, &shape),
                    offset: draw(Stream::Unclip, &[1]),
                    offset_level: settings.offset_noise,
                };
                let of = settings.steps as usize;
                let latent = euler_edm::sample(
                    &self.table,
                    of,
                    GuidanceScale(settings.guidance),
                    &start,
                    &mut conditioned,
                    &mut |latent, time| eps(&self.unclip, latent, time, &uncond, &vector),
                    &mut |step, _| report.step("unclip", step, of),
                )
                .map_err(failed("unclip"))?;
                Ok((latent, of))
            }
            Fidelity::Edge => {
                let mut stream = Stream::Unclip;
                few_step::sample(
                    &self.table,
                    &settings.edge,
                    few_step::Start::Noise,
                    &mut conditioned,
                    &mut || {
                        let drawn = draw(stream, &shape);
                        stream = Stream::UnclipSteps;
                        drawn
                    },
                    &mut |step, _| report.step("unclip", step, settings.edge.steps as usize),
                )
                .map_err(failed("unclip"))
            }
        }
    }

    /// A picture `[1, 3, height, width]`, intensities 0..1, of a latent.
    pub(crate) fn picture(&self, latent: &ArrayD<f32>) -> Result<ArrayD<f32>, DecodeError> {
        let range = Range {
            scale: self.settings.image_scale,
            shift: self.settings.image_shift,
        };
        decoded(
            &self.vae,
            "vae_decoder",
            latent,
            self.settings.scale_factor,
            range,
        )
    }
}

/// A picture `[1, 3, height, width]`, intensities 0..1, through an autoencoder's decoder.
///
/// - `latent`: `[1, channel, height, width]`; divided by `scale` first.
pub(crate) fn decoded(
    stage: &Stage,
    name: &'static str,
    latent: &ArrayD<f32>,
    scale: f32,
    range: Range,
) -> Result<ArrayD<f32>, DecodeError> {
    let latent = latent / scale;
    let image =
        output(stage, &[("latent", &latent)], "image").map_err(|source| DecodeError::Stage {
            stage: name.into(),
            source,
        })?;
    Ok(image.mapv_into(|value| range.apply(value)))
}

pub(crate) fn failed(network: &'static str) -> impl Fn(SamplerError) -> DecodeError {
    move |source| DecodeError::Sampler { network, source }
}

impl Report<'_> {
    /// A sampler's step is done; `step` counts from 0.
    pub(crate) fn step(&mut self, sampler: &'static str, step: usize, of: usize) {
        self.tell(Progress::Step {
            sampler,
            step: step + 1,
            of,
        });
    }
}
