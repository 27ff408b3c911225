//! Whole sampling loops, with the noise that was recorded, and the tables they read.

use std::collections::VecDeque;

use bundle::{EdmSchedule, StageName, UnclipSettings};
use decoder::sampler::{GuidanceScale, Sigma, SigmaTable, euler_edm, prior_ddim, prior_ddpm};
use decoder::{Range, SamplerError, Stage, StageError};
use ndarray::{ArrayD, Axis, IxDyn};

use super::networks::{as_floats, batch_of, call, take};
use super::{CheckError, Parity, Row, Rows, Tolerance, Vectors};

const PRIOR_DDIM: Tolerance = Tolerance::Close(2e-4);
const PRIOR_DDPM: Tolerance = Tolerance::Close(1e-4);
const VECTOR: Tolerance = Tolerance::Close(5e-4);
const DENOISED: Tolerance = Tolerance::Close(2e-5);
const LATENT: Tolerance = Tolerance::Close(4e-4);
const LATENT_STEP: Tolerance = Tolerance::Close(4e-4);
const DECODED: Tolerance = Tolerance::Close(4e-5);
const SAMPLES: Tolerance = Tolerance::Picture(3e-5);

fn sampler(sampler: &'static str) -> impl Fn(SamplerError) -> CheckError {
    move |source| CheckError::Sampler { sampler, source }
}

pub(super) fn floats(values: &[f32]) -> ArrayD<f32> {
    ArrayD::from_shape_vec(IxDyn(&[values.len()]), values.to_vec()).unwrap_or_default()
}

fn times(values: &[usize]) -> ArrayD<f32> {
    let wide: Vec<i64> = values
        .iter()
        .map(|&value| i64::try_from(value).unwrap_or(-1))
        .collect();
    as_floats(&wide)
}

/// The recorded draws, one after the other.
fn recorded(draws: &ArrayD<f32>) -> VecDeque<ArrayD<f32>> {
    draws
        .axis_iter(Axis(0))
        .map(|draw| draw.to_owned())
        .collect()
}

impl Parity {
    /// One row per table of the noise schedule, and the two loops over it.
    pub(super) fn prior_sampler_rows(&self, stage: &Stage) -> Rows {
        if !self.samples() {
            return Ok(Vec::new());
        }
        let Some(settings) = self.bundle.manifest().prior.clone() else {
            return Ok(Vec::new());
        };
        let mut rows = Vec::new();
        if let Some(vectors) = self.vectors("prior_schedule")? {
            for (name, table) in settings.tables.named() {
                let expected = vectors.floats(name)?;
                rows.push(self.table_row("prior_schedule", name, &floats(table), expected));
            }
        }
        let predict = |text: &ArrayD<f32>, tokens: &ArrayD<f32>, time: usize| {
            let batch = tokens.shape()[0];
            let (time, keep) = (times(&vec![time; batch]), batch_of(1.0, batch));
            let inputs = [
                ("tokens_noised", tokens.view()),
                ("timestep", time.view()),
                ("brain_tokens", text.view()),
                ("keep", keep.view()),
            ];
            Ok::<_, StageError>(take(&mut stage.run(&inputs)?, "pred"))
        };
        if let Some(vectors) = self.vectors("prior_ddim")? {
            let text = vectors.floats("text_embed")?;
            let expected_times = as_floats(vectors.ints("times")?);
            // As many steps as were recorded, whatever the bundle's own setting.
            let steps = u32::try_from(expected_times.len() + 1).unwrap_or(u32::MAX);
            let found = times(&prior_ddim::times(settings.timesteps, steps));
            rows.push(self.exact_row("prior_ddim", "times", &found, &expected_times));
            let mut draws = recorded(vectors.floats("step_noise")?);
            let shape = text.shape().to_vec();
            let mut before = vec![vectors.floats("init_noise")?.clone()];
            let mut predictions = Vec::new();
            let out = prior_ddim::sample(
                &settings,
                steps,
                before[0].clone(),
                &mut |tokens, time| {
                    let clean = predict(text, tokens, time)?;
                    predictions.push(clean.clone());
                    Ok(clean)
                },
                &mut || {
                    draws
                        .pop_front()
                        .unwrap_or_else(|| ArrayD::zeros(IxDyn(&shape)))
                },
                &mut |_, tokens| before.push(tokens.clone()),
            )
            .map_err(sampler("prior DDIM"))?;
            before.pop();
            for (name, steps) in [("x_per_step", &before), ("pred_per_step", &predictions)] {
                let expected = vectors.floats(name)?;
                rows.push(self.compared("prior_ddim", name, &stack(steps), expected, PRIOR_DDIM));
            }
            let expected = vectors.floats("prior_out")?;
            rows.push(self.compared("prior_ddim", "prior_out", &out, expected, PRIOR_DDIM));
        }
        if let Some(vectors) = self.vectors("prior_ddpm")? {
            let text = vectors.floats("text_embed")?;
            let mut draws = recorded(vectors.floats("step_noise")?);
            let shape = text.shape().to_vec();
            let out = prior_ddpm::sample(
                &settings.tables,
                vectors.floats("init_noise")?.clone(),
                &mut |tokens, time| predict(text, tokens, time),
                &mut || {
                    draws
                        .pop_front()
                        .unwrap_or_else(|| ArrayD::zeros(IxDyn(&shape)))
                },
                &mut |_, _| {},
            )
            .map_err(sampler("prior DDPM"))?;
            let expected = vectors.floats("prior_out")?;
            rows.push(self.compared("prior_ddpm", "prior_out", &out, expected, PRIOR_DDPM));
        }
        Ok(rows)
    }

    /// The sigma table, the levels of recorded runs and the sinusoids of sizes.
    pub(super) fn schedule_rows(&self) -> Rows {
        let mut rows = Vec::new();
        let Some(settings) = &self.bundle.manifest().unclip else {
            return Ok(rows);
        };
        if let Some(vectors) = self.vectors("edm_schedule")? {
            rows.extend(self.edm_rows(&settings.schedule, &vectors)?);
        }
        if let Some(vectors) = self.vectors("vector_cond")? {
            let sizes: Vec<f32> = vectors.floats("sizes")?.iter().copied().collect();
            let expected = vectors.floats("size_embeddings")?;
            let dim = expected.len() / sizes.len().max(1);
            let found = decoder::conditioning::vector(&sizes, dim as u64);
            let found = ArrayD::from_shape_vec(expected.raw_dim(), found).unwrap_or_default();
            rows.push(self.compared("vector_cond", "size_embeddings", &found, expected, VECTOR));
            let expected = vectors.floats("vector_suffix")?;
            let found = floats(&settings.vector).insert_axis(Axis(0));
            if found.shape() == expected.shape() {
                rows.push(self.compared("vector_cond", "vector_suffix", &found, expected, VECTOR));
            } else {
                rows.push(Row::absent(
                    "vector_cond",
                    "vector_suffix: recorded for another width",
                ));
            }
        }
        Ok(rows)
    }

    fn edm_rows(&self, schedule: &EdmSchedule, vectors: &Vectors) -> Rows {
        let table = SigmaTable::new(schedule);
        let expected = vectors.floats("table_sigmas")?;
        let found = floats(table.sigmas());
        let mut rows = vec![self.table_row("edm_schedule", "table_sigmas", &found, expected)];
        for name in vectors.names() {
            let Some(steps) = name
                .strip_prefix("sigmas_")
                .and_then(|text| text.parse().ok())
            else {
                continue;
            };
            let found: Vec<f32> = table
                .descending(steps)
                .iter()
                .map(|sigma| sigma.0)
                .collect();
            let expected = vectors.floats(name)?;
            rows.push(self.table_row("edm_schedule", name, &floats(&found), expected));
            if let Ok(indices) = vectors.ints(&format!("idx_{steps}")) {
                // The recorded list closes with an entry for the level zero.
                let expected = as_floats(&indices[..indices.len().min(steps)]);
                let quantity = format!("idx_{steps}");
                let found = times(&table.indices(steps));
                rows.push(self.exact_row("edm_schedule", &quantity, &found, &expected));
            }
        }
        Ok(rows)
    }

    /// The denoiser at recorded noise levels.
    pub(super) fn denoiser_rows(&self, file: &str, stage: &Stage, vectors: &Vectors) -> Rows {
        let Some(settings) = &self.bundle.manifest().unclip else {
            return Ok(Vec::new());
        };
        let table = SigmaTable::new(&settings.schedule);
        let (samples, contexts, suffixes) = (
            vectors.floats("den_x")?,
            vectors.floats("den_context")?,
            vectors.floats("den_y")?,
        );
        let (mut found, mut levels, mut indices) = (Vec::new(), Vec::new(), Vec::new());
        for (row, &sigma) in vectors.floats("den_sigma")?.iter().enumerate() {
            let one = |values: &ArrayD<f32>| values.index_axis(Axis(0), row).to_owned();
            let sample = one(samples).insert_axis(Axis(0));
            let context = one(contexts).insert_axis(Axis(0));
            let vector = one(suffixes).insert_axis(Axis(0));
            let denoised = euler_edm::denoise(
                &table,
                &sample,
                Sigma(sigma),
                &mut |scaled, time| eps(stage, scaled, time, &context, &vector),
                row,
            )
            .map_err(sampler("Euler"))?;
            found.push(denoised.index_axis_move(Axis(0), 0));
            let (level, index) = table.nearest(Sigma(sigma));
            levels.push(level.0);
            indices.push(index);
        }
        let expected_levels = vectors.floats("den_sigma_quantised")?;
        let expected_indices = as_floats(vectors.ints("den_idx")?);
        // denoised = x - sigma * eps: an error of the network arrives multiplied by sigma, so the
        // network's tolerance applies to both sides divided by it.
        let per_sigma = |values: &ArrayD<f32>| {
            let mut values = values.clone();
            for (mut row, level) in values.axis_iter_mut(Axis(0)).zip(&levels) {
                row.mapv_inplace(|value| value / level.max(1.0));
            }
            values
        };
        let (found, expected) = (
            per_sigma(&stack(&found)),
            per_sigma(vectors.floats("denoised")?),
        );
        let denoised = self.compared(file, "denoised", &found, &expected, DENOISED);
        Ok(vec![
            self.table_row(
                file,
                "den_sigma_quantised",
                &floats(&levels),
                expected_levels,
            ),
            self.exact_row(file, "den_idx", &times(&indices), &expected_indices),
            denoised.remark("divided by sigma where that is above 1"),
        ])
    }

    /// The guided loops, step by step, and their pictures.
    pub(super) fn unclip_sampler_rows(&self) -> Rows {
        let mut rows = Vec::new();
        if !self.samples() {
            return Ok(rows);
        }
        let Some(settings) = self.bundle.manifest().unclip.clone() else {
            return Ok(rows);
        };
        for name in ["unclip_sample", "unclip_sample4"] {
            let Some(vectors) = self.vectors(name)? else {
                continue;
            };
            let (Some(unclip), Some(vae)) = (
                self.stage(StageName::Unclip)?,
                self.stage(StageName::VaeDecoder)?,
            ) else {
                let needed = [StageName::Unclip, StageName::VaeDecoder];
                rows.push(Row::absent(name, self.without(&needed)));
                continue;
            };
            let latent = [
                settings.latent_channels,
                settings.latent_height,
                settings.latent_width,
            ];
            let same = vectors.floats("z")?.shape()[1..]
                .iter()
                .map(|&len| len as u64)
                .eq(latent);
            if same {
                rows.extend(self.loop_rows(name, &vectors, &settings, &unclip, &vae)?);
            } else {
                rows.push(Row::absent(name, "recorded for another latent size"));
            }
        }
        Ok(rows)
    }

    fn loop_rows(
        &self,
        name: &str,
        vectors: &Vectors,
        settings: &UnclipSettings,
        unclip: &Stage,
        vae: &Stage,
    ) -> Rows {
        let table = SigmaTable::new(&settings.schedule);
        let steps = vectors.floats("sigmas")?.len().saturating_sub(1);
        let start = euler_edm::Start {
            z: vectors.floats("z")?.clone(),
            noise: vectors.floats("noise")?.clone(),
            offset: vectors.floats("offset_noise")?.clone(),
            offset_level: settings.offset_noise,
        };
        let (context, uncond, vector) = (
            vectors.floats("prior_out")?,
            vectors.floats("uncond_tokens")?,
            vectors.floats("vector_suffix")?,
        );
        let mut after = Vec::new();
        let clock = std::time::Instant::now();
        let latent = euler_edm::sample(
            &table,
            steps,
            GuidanceScale(settings.guidance),
            &start,
            &mut |latent, time| eps(unclip, latent, time, context, vector),
            &mut |latent, time| eps(unclip, latent, time, uncond, vector),
            &mut |_, latent| after.push(latent.clone()),
        )
        .map_err(sampler("Euler"))?;
        let time = clock.elapsed();
        let scaled = latent.mapv(|value| value / settings.scale_factor);
        let mut outputs = call(vae, "vae_decoder", &[("latent", scaled.view())])?;
        let raw = take(&mut outputs, "image");
        let range = Range {
            scale: settings.image_scale,
            shift: settings.image_shift,
        };
        let picture = raw.mapv(|value| range.apply(value));
        let levels: Vec<f32> = table
            .descending(steps)
            .iter()
            .map(|sigma| sigma.0)
            .collect();
        let of = |quantity: &str| vectors.floats(quantity);
        Ok(vec![
            self.table_row(name, "sigmas", &floats(&levels), of("sigmas")?),
            self.compared(
                name,
                "latent_per_step",
                &stack(&after),
                of("latent_per_step")?,
                LATENT_STEP,
            ),
            self.compared(name, "latent_final", &latent, of("latent_final")?, LATENT)
                .took(time),
            self.compared(name, "decoded_raw", &raw, of("decoded_raw")?, DECODED),
            self.compared(name, "samples", &picture, of("samples")?, SAMPLES),
        ])
    }
}

pub(super) fn stack(arrays: &[ArrayD<f32>]) -> ArrayD<f32> {
    let views: Vec<_> = arrays.iter().map(|array| array.view()).collect();
    ndarray::stack(Axis(0), &views).unwrap_or_default()
}

pub(super) fn eps(
    stage: &Stage,
    latent: &ArrayD<f32>,
    time: usize,
    context: &ArrayD<f32>,
    vector: &ArrayD<f32>,
) -> Result<ArrayD<f32>, StageError> {
    let time = times(&vec![time; latent.shape()[0]]);
    let inputs = [
        ("latent", latent.view()),
        ("timestep", time.view()),
        ("context", context.view()),
        ("vector", vector.view()),
    ];
    Ok(take(&mut stage.run(&inputs)?, "eps"))
}
