//! What happens to pictures and embeddings outside the networks, and the refiner's loop.

use bundle::{EdmSchedule, Entrance, StageName};
use decoder::sampler::{GuidanceScale, SigmaTable, euler_edm};
use decoder::{SamplerError, Stage, resize, retrieval};
use ndarray::{Array2, Array4, ArrayD, Axis, Ix4};

use super::networks::{as_floats, call, fits, fixed, take};
use super::samplers::{eps, floats, stack};
use super::{CheckError, Parity, Row, Rows, Tolerance, Vectors};

/// Values of 0..1, two multiplications and an addition in another order.
const RESIZED: Tolerance = Tolerance::Close(1e-6);
const SIMILARITY: Tolerance = Tolerance::Close(1e-6);
const REFINER_LATENT: Tolerance = Tolerance::Close(1e-4);
const ENCODED: Tolerance = Tolerance::Close(4e-5);
const DECODED: Tolerance = Tolerance::Close(4e-5);
const PICTURE: Tolerance = Tolerance::Picture(3e-5);
/// The size sinusoids are compared with single-precision ones: see `vector_cond`.
const VECTOR: Tolerance = Tolerance::Close(5e-4);

/// MindEye2's refiner: 25 steps, entered at the 13th level from the end.
const REFINER_STEPS: usize = 25;
const REFINER_KEPT: u32 = 13;

fn image(vectors: &Vectors, name: &str) -> Result<Array4<f32>, CheckError> {
    Ok(vectors
        .floats(name)?
        .clone()
        .into_dimensionality::<Ix4>()
        .unwrap_or_default())
}

fn sides(expected: &ArrayD<f32>) -> [usize; 2] {
    let shape = expected.shape();
    [shape[shape.len() - 2], shape[shape.len() - 1]]
}

impl Parity {
    /// Resizing, blending, retrieval: they do not depend on the bundle.
    pub(super) fn picture_rows(&self) -> Rows {
        let mut rows = Vec::new();
        if let Some(vectors) = self.vectors("resize")? {
            for (from, to) in [("x256", "to_big"), ("down_in", "down_96")] {
                let expected = vectors.floats(to)?;
                let found = resize::bilinear(image(&vectors, from)?.view(), sides(expected));
                rows.push(self.fp32_row("resize", to, &found.into_dyn(), expected, RESIZED));
            }
            let expected = vectors.floats("nearest_224")?;
            let found = resize::nearest(image(&vectors, "x256")?.view(), sides(expected));
            let channels: Vec<usize> = (0..expected.shape()[1]).collect();
            let first = found.select(Axis(1), &channels).into_dyn();
            rows.push(self.exact_row("resize", "nearest_224", &first, expected));
            rows.push(Row::absent(
                "resize",
                "down_96_antialias: what newer libraries do, and the original does not",
            ));
        }
        if let Some(vectors) = self.vectors("blend")? {
            let mut large = Vec::new();
            for (from, to) in [("enhanced", "enhanced_256"), ("blurry", "blurry_256")] {
                let expected = vectors.floats(to)?;
                let found = resize::bilinear(image(&vectors, from)?.view(), sides(expected));
                large.push(found.clone());
                rows.push(self.fp32_row("blend", to, &found.into_dyn(), expected, RESIZED));
            }
            let found = resize::blend(large[0].view(), large[1].view(), 0.75).into_dyn();
            rows.push(self.fp32_row("blend", "blend", &found, vectors.floats("blend")?, RESIZED));
        }
        rows.extend(self.retrieval_rows()?);
        rows.extend(self.refiner_rows()?);
        Ok(rows)
    }

    fn retrieval_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("retrieval")? else {
            return Ok(Vec::new());
        };
        let flat = |name: &str| -> Result<Array2<f32>, CheckError> {
            let values = vectors.floats(name)?;
            let rows = values.shape()[0];
            let width = values.len() / rows.max(1);
            Ok(values
                .clone()
                .into_shape_with_order((rows, width))
                .unwrap_or_default())
        };
        let (pool, brains) = (flat("clip_pool")?, flat("clip_voxels")?);
        let forward = retrieval::similarities(pool.view(), brains.view());
        let backward = retrieval::similarities(brains.view(), pool.view());
        let mut rows = Vec::new();
        for (name, found) in [("fwd_sim", &forward), ("bwd_sim", &backward)] {
            let expected = vectors.floats(name)?;
            rows.push(self.fp32_row(
                "retrieval",
                name,
                &found.clone().into_dyn(),
                expected,
                SIMILARITY,
            ));
        }
        for (name, found) in [
            ("brain_topk_for_image", &forward),
            ("image_topk_for_brain", &backward),
        ] {
            let expected = as_floats(vectors.ints(name)?);
            let count = expected.len() / found.nrows().max(1);
            let top: Vec<i64> = found
                .rows()
                .into_iter()
                .flat_map(|row| retrieval::top(&row.to_owned(), count))
                .map(|place| i64::try_from(place).unwrap_or(-1))
                .collect();
            rows.push(self.exact_row("retrieval", name, &as_floats(&top), &expected));
        }
        Ok(rows)
    }

    /// Image to image through the refiner, with the recorded prompt's conditioning.
    fn refiner_rows(&self) -> Rows {
        let mut rows = Vec::new();
        if let Some(vectors) = self.vectors("sdxl_cond")? {
            let found =
                decoder::conditioning::vector(&[768.0, 768.0, 0.0, 0.0, 1024.0, 1024.0], 256);
            let expected = vectors.floats("vector_suffix")?;
            let found = floats(&found).insert_axis(Axis(0));
            rows.push(self.compared("sdxl_cond", "vector_suffix", &found, expected, VECTOR));
        }
        let Some(vectors) = self.vectors("refiner")? else {
            return Ok(rows);
        };
        let (Some(unet), Some(encoder), Some(decoder)) = (
            self.stage(StageName::Refiner)?,
            self.stage(StageName::RefinerVaeEncoder)?,
            self.stage(StageName::RefinerVaeDecoder)?,
        ) else {
            rows.push(Row::absent("refiner", self.without(&[StageName::Refiner])));
            return Ok(rows);
        };
        if !fits(
            &fixed(unet.spec().input("latent")),
            vectors.floats("init_z")?.shape(),
        ) {
            rows.push(Row::absent("refiner", "recorded for another latent size"));
            return Ok(rows);
        }
        let refiner = Refiner {
            unet,
            encoder,
            decoder,
        };
        rows.extend(self.image_to_image_rows(&vectors, &refiner)?);
        rows.extend(self.pipeline_rows(&refiner)?);
        Ok(rows)
    }

    fn image_to_image_rows(&self, vectors: &Vectors, refiner: &Refiner) -> Rows {
        let of = |name: &str| vectors.floats(name);
        let kept = u32::try_from(of("sigmas")?.len()).unwrap_or(u32::MAX);
        let prompt = Prompt {
            with: (of("c_crossattn")?, of("c_vector")?),
            without: (of("uc_crossattn")?, of("uc_vector")?),
        };
        let refined = self.refine(
            refiner,
            of("image")?,
            of("enc_noise")?,
            of("noise")?,
            kept,
            &prompt,
        )?;
        Ok(vec![
            self.compared(
                "refiner",
                "latent_enc",
                &refined.encoded,
                of("latent_enc")?,
                ENCODED,
            ),
            self.table_row("refiner", "sigmas", &floats(&refined.levels), of("sigmas")?),
            self.compared(
                "refiner",
                "latent_per_step",
                &stack(&refined.steps),
                of("latent_per_step")?,
                REFINER_LATENT,
            ),
            self.compared(
                "refiner",
                "latent_final",
                &refined.latent,
                of("latent_final")?,
                REFINER_LATENT,
            ),
            self.compared(
                "refiner",
                "decoded_raw",
                &refined.raw,
                of("decoded_raw")?,
                DECODED,
            ),
            self.compared(
                "refiner",
                "samples",
                &refined.picture,
                of("samples")?,
                PICTURE,
            ),
        ])
    }

    /// The tail of a whole run: resized, refined with the recorded prompt, resized, blended.
    fn pipeline_rows(&self, refiner: &Refiner) -> Rows {
        let (Some(vectors), Some(prompts)) =
            (self.vectors("pipeline")?, self.vectors("sdxl_cond")?)
        else {
            return Ok(Vec::new());
        };
        let of = |name: &str| vectors.floats(name);
        let resized = |name: &str, from: &Array4<f32>| -> Result<(Array4<f32>, Row), CheckError> {
            let expected = of(name)?;
            let found = resize::bilinear(from.view(), sides(expected));
            let row = self.compared(
                "pipeline",
                name,
                &found.clone().into_dyn(),
                expected,
                PICTURE,
            );
            Ok((found, row))
        };
        let (small, small_row) = resized("unclip_256", &image(&vectors, "unclip_samples")?)?;
        let (input, input_row) = resized("refiner_in", &small)?;
        let prompt = Prompt {
            with: (of("c_crossattn")?, of("c_vector")?),
            without: (
                prompts.floats("uc_crossattn")?,
                prompts.floats("uc_vector")?,
            ),
        };
        let refined = self.refine(
            refiner,
            &input.into_dyn(),
            of("enc_noise")?,
            of("noise")?,
            REFINER_KEPT,
            &prompt,
        )?;
        let picture = refined
            .picture
            .clone()
            .into_dimensionality::<Ix4>()
            .unwrap_or_default();
        let (enhanced, enhanced_row) = resized("enhanced_256", &picture)?;
        let blurry = image(&vectors, "blurry_256")?;
        let blended = resize::blend(enhanced.view(), blurry.view(), 0.75).into_dyn();
        Ok(vec![
            small_row,
            input_row,
            self.compared(
                "pipeline",
                "latent_enc",
                &refined.encoded,
                of("latent_enc")?,
                ENCODED,
            ),
            self.compared(
                "pipeline",
                "latent_final",
                &refined.latent,
                of("latent_final")?,
                REFINER_LATENT,
            ),
            self.compared(
                "pipeline",
                "refined",
                &refined.picture,
                of("refined")?,
                PICTURE,
            ),
            enhanced_row,
            self.compared("pipeline", "final", &blended, of("final")?, PICTURE),
        ])
    }

    /// One picture through the refiner.
    ///
    /// - `image`: `[1, 3, height, width]`, 0..1.
    /// - `kept`: levels of the schedule's end that are run, the closing zero among them.
    fn refine(
        &self,
        refiner: &Refiner,
        image: &ArrayD<f32>,
        enc_noise: &ArrayD<f32>,
        noise: &ArrayD<f32>,
        kept: u32,
        prompt: &Prompt<'_>,
    ) -> Result<Refined, CheckError> {
        let (schedule, scale, guidance) = match &self.bundle.manifest().unclip {
            Some(unclip) => (unclip.schedule, unclip.scale_factor, unclip.guidance),
            None => {
                let released = EdmSchedule {
                    linear_start: 0.00085,
                    linear_end: 0.012,
                    steps: 1000,
                };
                (released, 0.13025, 5.0)
            }
        };
        // The encoder takes -1..1.
        let image = image.mapv(|value| value * 2.0 - 1.0);
        let mut outputs = call(
            &refiner.encoder,
            "refiner_vae_encoder",
            &[("image", image.view())],
        )?;
        let (mean, logvar) = (take(&mut outputs, "mean"), take(&mut outputs, "logvar"));
        let encoded = (mean + logvar.mapv(|value| (0.5 * value).exp()) * enc_noise) * scale;

        let table = SigmaTable::new(&schedule);
        let failed = |source: SamplerError| CheckError::Sampler {
            sampler: "refiner",
            source,
        };
        let levels =
            euler_edm::entered(&table, REFINER_STEPS, Entrance::Kept(kept)).map_err(failed)?;
        let mut steps = Vec::new();
        let latent = euler_edm::sample_from(
            &table,
            &levels,
            GuidanceScale(guidance),
            &encoded,
            noise,
            &mut |sample, time| eps(&refiner.unet, sample, time, prompt.with.0, prompt.with.1),
            &mut |sample, time| {
                eps(
                    &refiner.unet,
                    sample,
                    time,
                    prompt.without.0,
                    prompt.without.1,
                )
            },
            &mut |_, sample| steps.push(sample.clone()),
        )
        .map_err(failed)?;
        let scaled = latent.mapv(|value| value / scale);
        let mut outputs = call(
            &refiner.decoder,
            "refiner_vae_decoder",
            &[("latent", scaled.view())],
        )?;
        let raw = take(&mut outputs, "image");
        let picture = raw.mapv(|value| decoder::Range::SYMMETRIC.apply(value));
        let levels = levels.iter().map(|sigma| sigma.0).collect();
        Ok(Refined {
            encoded,
            levels,
            steps,
            latent,
            raw,
            picture,
        })
    }
}

/// The refiner's networks.
struct Refiner {
    unet: Stage,
    encoder: Stage,
    decoder: Stage,
}

/// Conditioning tokens and vector, with the prompt and without.
struct Prompt<'p> {
    with: (&'p ArrayD<f32>, &'p ArrayD<f32>),
    without: (&'p ArrayD<f32>, &'p ArrayD<f32>),
}

/// What the refiner did, step by step.
struct Refined {
    encoded: ArrayD<f32>,
    levels: Vec<f32>,
    steps: Vec<ArrayD<f32>>,
    latent: ArrayD<f32>,
    raw: ArrayD<f32>,
    picture: ArrayD<f32>,
}
