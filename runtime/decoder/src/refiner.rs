//! The picture once more, with the caption as prompt: SDXL, image to image.
//!
//! ```text
//! unCLIP's picture ─ 256 pixels ─ the refiner's size ─ encoder, sampled ─┐
//! unCLIP's latent, handed over as it is (edge) ──────────────────────────┴─► latent
//! latent ─ noised ─ last steps of the schedule ─ decoder ─► refined ─ blend with blurry ─► final
//! ```

use bundle::{RefinerSettings, StageName};
use ndarray::{Array4, ArrayD, ArrayView4, Ix4};

use crate::decode::Report;
use crate::networks::{Networks, eps, index, outputs};
use crate::noise::Draw;
use crate::painter::{decoded, failed};
use crate::sampler::{GuidanceScale, SigmaTable, euler_edm, few_step};
use crate::text::{Condition, Prompter};
use crate::{DecodeError, Fidelity, Range, Stage, Stream, resize};

/// The refiner's networks; a bundle has all of them or none.
pub(crate) struct Refiner {
    unet: Stage,
    encoder: Stage,
    decoder: Stage,
    prompter: Prompter,
    settings: RefinerSettings,
    table: SigmaTable,
    /// Of the negative prompt, which never changes; the `edge` fidelity does without.
    without: Option<Condition>,
}

/// What the refiner begins with: one picture as both its forms.
#[derive(Clone, Copy)]
pub(crate) struct Unrefined<'u> {
    /// `[1, 3, height, width]`, intensities 0..1.
    pub(crate) picture: ArrayView4<'u, f32>,
    /// `[1, channel, height, width]`, scaled as unCLIP was trained.
    pub(crate) latent: &'u ArrayD<f32>,
    /// What unCLIP's latents are divided by before decoding.
    pub(crate) scale_factor: f32,
}

impl Refiner {
    /// `None` where the bundle has no refiner.
    pub(crate) fn open(networks: Networks<'_>) -> Result<Option<Refiner>, DecodeError> {
        let Some(unet) = networks.find(StageName::Refiner)? else {
            return Ok(None);
        };
        let missing = |missing| DecodeError::Incomplete {
            missing,
            needed_by: "refiner",
        };
        let settings = networks.bundle.manifest().refiner.clone();
        let mut settings = settings.ok_or(missing("refiner settings"))?;
        if let Some(keep_latent) = networks.options.keep_latent {
            settings.edge.keep_latent = keep_latent;
        }
        let prompter = Prompter::open(networks.runtime, networks.bundle)?;
        let prompter = prompter.ok_or(missing("text encoders"))?;
        #[expect(clippy::float_cmp, reason = "exactly 1 means no second call")]
        let guided = networks.options.fidelity == Fidelity::Reference && settings.guidance != 1.0;
        let without = guided
            .then(|| prompter.condition(&settings.negative_prompt, &settings.sizes))
            .transpose()?;
        Ok(Some(Refiner {
            unet,
            encoder: networks.need(StageName::RefinerVaeEncoder, "refiner")?,
            decoder: networks.need(StageName::RefinerVaeDecoder, "refiner")?,
            prompter,
            table: SigmaTable::new(&settings.schedule),
            settings,
            without,
        }))
    }

    /// Refines a picture: `[1, 3, height, width]`, intensities 0..1, and the number of steps.
    ///
    /// - `prompt`: the caption; empty where there is none.
    pub(crate) fn refine(
        &self,
        from: Unrefined<'_>,
        prompt: &str,
        fidelity: Fidelity,
        draw: &mut Draw<'_>,
        report: &mut Report<'_>,
    ) -> Result<(ArrayD<f32>, usize), DecodeError> {
        let settings = &self.settings;
        let with = self.prompter.condition(prompt, &settings.sizes)?;
        report.part("refiner_context", &with.context);
        report.part("refiner_vector", &with.vector);
        let handed = fidelity == Fidelity::Edge && settings.edge.keep_latent;
        let start = if handed && from.latent.shape()[1..] == self.latent_shape()[1..] {
            // The two engines scale their latents each by its own factor.
            from.latent * (settings.scale_factor / from.scale_factor)
        } else {
            self.encode(from.picture, draw, report)?
        };
        report.part("refiner_start", &start);
        let mut conditioned =
            |latent: &ArrayD<f32>, time| eps(&self.unet, latent, time, &with.context, &with.vector);
        let (latent, steps) = match fidelity {
            Fidelity::Reference => {
                let whole = settings.steps as usize;
                let levels = euler_edm::entered(&self.table, whole, settings.entrance)
                    .map_err(failed("refiner"))?;
                let of = levels.len() - 1;
                let noise = draw(Stream::Refiner, start.shape());
                let without = self.without.as_ref().unwrap_or(&with);
                let guidance = if self.without.is_some() {
                    settings.guidance
                } else {
                    1.0
                };
                let latent = euler_edm::sample_from(
                    &self.table,
                    &levels,
                    GuidanceScale(guidance),
                    &start,
                    &noise,
                    &mut conditioned,
                    &mut |latent, time| {
                        eps(&self.unet, latent, time, &without.context, &without.vector)
                    },
                    &mut |step, _| report.step("refiner", step, of),
                )
                .map_err(failed("refiner"))?;
                (latent, of)
            }
            Fidelity::Edge => {
                let edge = &settings.edge;
                let of = few_step::times(&self.table, &edge.sampler, Some(edge.entrance))
                    .map_err(failed("refiner"))?
                    .len();
                let mut stream = Stream::Refiner;
                few_step::sample(
                    &self.table,
                    &edge.sampler,
                    few_step::Start::Latent {
                        latent: &start,
                        entrance: edge.entrance,
                    },
                    &mut conditioned,
                    &mut || {
                        let drawn = draw(stream, start.shape());
                        stream = Stream::RefinerSteps;
                        drawn
                    },
                    &mut |step, _| report.step("refiner", step, of),
                )
                .map_err(failed("refiner"))?
            }
        };
        report.part("refiner_latent", &latent);
        let range = Range {
            scale: settings.image_scale,
            shift: settings.image_shift,
        };
        let scale = settings.scale_factor;
        let refined = decoded(&self.decoder, "refiner_vae_decoder", &latent, scale, range)?;
        report.part("refined", &refined);
        Ok((refined, steps))
    }

    fn latent_shape(&self) -> [usize; 4] {
        let settings = &self.settings;
        [
            1,
            index(settings.latent_channels),
            index(settings.latent_height),
            index(settings.latent_width),
        ]
    }

    /// A picture's latent `[1, channel, height, width]`, scaled as the network was trained.
    fn encode(
        &self,
        picture: ArrayView4<'_, f32>,
        draw: &mut Draw<'_>,
        report: &mut Report<'_>,
    ) -> Result<ArrayD<f32>, DecodeError> {
        let side = index(self.settings.side);
        let image = self.encoder.spec().input("image");
        let own = |axis| image.and_then(|spec| spec.fixed(axis)).map(index);
        let (Some(rows), Some(columns)) = (own(2), own(3)) else {
            return Err(DecodeError::Incomplete {
                missing: "input image of a fixed size",
                needed_by: "refiner_vae_encoder",
            });
        };
        let small = resize::bilinear(picture, [side, side]);
        let large = resize::bilinear(small.view(), [rows, columns]).into_dyn();
        report.part("refiner_in", &large);
        // The encoder takes -1..1.
        let symmetric = large.mapv_into(|value| value * 2.0 - 1.0);
        let [mean, logvar] = outputs(&self.encoder, &[("image", &symmetric)], ["mean", "logvar"])
            .map_err(|source| DecodeError::Stage {
            stage: "refiner_vae_encoder".into(),
            source,
        })?;
        let noise = draw(Stream::Refiner, mean.shape());
        let std_dev = logvar.mapv_into(|value| (0.5 * value).exp());
        Ok((mean + std_dev * noise) * self.settings.scale_factor)
    }

    /// The final picture: the refined one with a share of the blurry one, where there is one.
    ///
    /// `reference` blends at the size the original does; `edge` at the refined picture's own, which
    /// loses nothing of it. Values may lie a little outside 0..1, as in the original.
    ///
    /// - `refined`, `blurry`: `[1, 3, height, width]`, intensities 0..1.
    pub(crate) fn blend(
        &self,
        refined: ArrayView4<'_, f32>,
        blurry: Option<&ArrayD<f32>>,
        fidelity: Fidelity,
    ) -> Array4<f32> {
        let side = index(self.settings.side);
        let sides = match fidelity {
            Fidelity::Reference => [side, side],
            Fidelity::Edge => [refined.dim().2, refined.dim().3],
        };
        let refined = resize::bilinear(refined, sides);
        let blurry = blurry.and_then(|blurry| blurry.view().into_dimensionality::<Ix4>().ok());
        match blurry {
            Some(blurry) => {
                let blurry = resize::bilinear(blurry, sides);
                resize::blend(refined.view(), blurry.view(), self.settings.blend)
            }
            None => refined,
        }
    }
}
