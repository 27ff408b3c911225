//! Text and image towers, the bridge, encoders, and the SDXL engine's own networks.

use std::time::Instant;

use bundle::StageName;
use decoder::caption::{Captioner, SpecialTokens};
use decoder::vision;
use ndarray::{ArrayD, Axis, Ix3, Ix4, IxDyn};

use super::networks::{as_floats, call, fits, fixed, take};
use super::{CheckError, Parity, Row, Rows, Tolerance, Vectors};

/// Three times the suggested 1e-4. The reference tower's norms run over six values, whose spread may
/// be so small that rounding grows 1/sqrt(eps) = 316-fold; the same formulas in numpy, in single
/// precision, are 3.3e-5 from the recorded ones (the original's own error is 1.1e-5), and ONNX
/// Runtime's order of summation gives 8.1e-5. Real towers are 768 wide.
pub(super) const CLIP_L: Tolerance = Tolerance::Close(3e-4);
const OPEN_CLIP: Tolerance = Tolerance::Close(2e-5);
pub(super) const POOLED: Tolerance = Tolerance::Close(1e-5);
const CAPTION: Tolerance = Tolerance::Close(3e-5);
const BRIDGE: Tolerance = Tolerance::Close(1e-5);
const VISION: Tolerance = Tolerance::Close(6e-5);
const PREPROCESSED: Tolerance = Tolerance::Close(3e-4);
const VISION_RESIZED: Tolerance = Tolerance::Close(1e-4);
const MOMENTS: Tolerance = Tolerance::Close(3e-5);
const MOMENTS_SDXL: Tolerance = Tolerance::Close(4e-5);
const VAE: Tolerance = Tolerance::Close(4e-5);

/// Recorded ids `[row, token]` as the text stages take them.
pub(super) fn ids(vectors: &Vectors, name: &str, tokens: usize) -> Result<ArrayD<f32>, CheckError> {
    let flat = as_floats(vectors.ints(name)?);
    let rows = flat.len() / tokens.max(1);
    Ok(flat
        .into_shape_with_order(IxDyn(&[rows, tokens]))
        .unwrap_or_default())
}

impl Parity {
    pub(super) fn tower_rows(&self) -> Rows {
        let mut rows = self.text_rows()?;
        rows.extend(self.single_rows(
            StageName::CaptionBridge,
            "clip_convert",
            ("tokens", "tokens"),
            ("vision", "converted"),
            BRIDGE,
        )?);
        rows.extend(self.vision_rows()?);
        rows.extend(self.caption_rows()?);
        rows.extend(self.encoder_rows(StageName::VaeEncoder, "vae_unclip", MOMENTS)?);
        rows.extend(self.encoder_rows(StageName::RefinerVaeEncoder, "vae_sdxl", MOMENTS_SDXL)?);
        rows.extend(self.refiner_vae_rows()?);
        rows.extend(self.refiner_unet_rows()?);
        Ok(rows)
    }

    fn text_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("text")? else {
            return Ok(Vec::new());
        };
        let (Some(first), Some(second)) = (
            self.stage(StageName::TextEncoder1)?,
            self.stage(StageName::TextEncoder2)?,
        ) else {
            let towers = [StageName::TextEncoder1, StageName::TextEncoder2];
            return Ok(vec![Row::absent("text", self.without(&towers))]);
        };
        let expected = vectors.floats("clip_l_hidden")?;
        let clip_l = ids(&vectors, "ids_clip_l", expected.shape()[1])?;
        let open_clip = ids(&vectors, "ids_openclip", expected.shape()[1])?;
        let clock = Instant::now();
        let mut outputs = call(&first, "text_encoder_1", &[("tokens", clip_l.view())])?;
        let first_time = clock.elapsed();
        let hidden = take(&mut outputs, "hidden");
        let clock = Instant::now();
        let mut outputs = call(&second, "text_encoder_2", &[("tokens", open_clip.view())])?;
        let second_time = clock.elapsed();
        let penultimate = take(&mut outputs, "hidden");
        let pooled = take(&mut outputs, "pooled");
        let joined =
            ndarray::concatenate(Axis(2), &[hidden.view(), penultimate.view()]).unwrap_or_default();
        let of = |name: &str| vectors.floats(name);
        Ok(vec![
            self.compared("text", "clip_l_hidden", &hidden, expected, CLIP_L)
                .took(first_time),
            self.compared(
                "text",
                "openclip_penultimate",
                &penultimate,
                of("openclip_penultimate")?,
                OPEN_CLIP,
            )
            .took(second_time),
            self.compared("text", "pooled", &pooled, of("pooled")?, POOLED),
            self.compared("text", "crossattn", &joined, of("crossattn")?, CLIP_L),
        ])
    }

    /// A stage of one input and one output that was recorded as such.
    fn single_rows(
        &self,
        name: StageName,
        file: &str,
        (input, recorded_input): (&str, &str),
        (output, recorded_output): (&str, &str),
        tolerance: Tolerance,
    ) -> Rows {
        let Some(vectors) = self.vectors(file)? else {
            return Ok(Vec::new());
        };
        let Some(stage) = self.stage(name)? else {
            return Ok(vec![Row::absent(file, format!("the bundle has no {name}"))]);
        };
        let values = vectors.floats(recorded_input)?;
        if !fits(&fixed(stage.spec().input(input)), values.shape()) {
            return Ok(vec![Row::absent(file, "recorded for another size")]);
        }
        let clock = Instant::now();
        let mut outputs = call(&stage, name.as_str(), &[(input, values.view())])?;
        let time = clock.elapsed();
        let found = take(&mut outputs, output);
        let expected = vectors.floats(recorded_output)?;
        Ok(vec![
            self.compared(file, recorded_output, &found, expected, tolerance)
                .took(time),
        ])
    }

    /// Scores of every word, and greedy captions, which are equal or wrong.
    fn caption_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("git")? else {
            return Ok(Vec::new());
        };
        let (Some(prefix), Some(step)) = (
            self.stage(StageName::CaptionerPrefix)?,
            self.stage(StageName::Captioner)?,
        ) else {
            return Ok(vec![Row::absent("git", "the bundle has no captioner")]);
        };
        let pixels = vectors.floats("pixel_values")?;
        if !fits(&fixed(prefix.spec().input("vision")), pixels.shape()) {
            return Ok(vec![Row::absent(
                "git",
                "recorded for another number of vision tokens",
            )]);
        }
        let vision = pixels
            .clone()
            .into_dimensionality::<Ix3>()
            .unwrap_or_default();
        let batch = vision.dim().0;
        let rows_of = |name: &str| -> Result<Vec<Vec<i64>>, CheckError> {
            let flat = vectors.ints(name)?;
            Ok(flat
                .chunks(flat.len() / batch.max(1))
                .map(<[i64]>::to_vec)
                .collect())
        };
        let captioner = Captioner::new(prefix, step)?;
        let forced = captioner.forced(vision.view(), &rows_of("teacher_forced_ids")?)?;
        let first = forced.index_axis(Axis(1), 0).to_owned().into_dyn();
        let expected_ids = rows_of("generated_ids")?;
        let length = expected_ids.first().map_or(0, Vec::len);
        // The ids of the BERT vocabulary that GIT was trained with.
        let special = SpecialTokens {
            start: 101,
            end: 102,
            pad: 0,
        };
        let clock = Instant::now();
        let captions = captioner.greedy(vision.view(), special, length)?;
        let time = clock.elapsed();
        let ids = |captions: &[Vec<i64>]| as_floats(&captions.concat());
        let of = |name: &str| vectors.floats(name);
        let logits = forced.into_dyn();
        Ok(vec![
            self.compared(
                "git",
                "first_step_logits",
                &first,
                of("first_step_logits")?,
                CAPTION,
            ),
            self.compared(
                "git",
                "teacher_forced_logits",
                &logits,
                of("teacher_forced_logits")?,
                CAPTION,
            ),
            self.exact_row("git", "generated_ids", &ids(&captions), &ids(&expected_ids))
                .took(time),
        ])
    }

    fn vision_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("clip_vision")? else {
            return Ok(Vec::new());
        };
        let Some(stage) = self.stage(StageName::ImageEncoder)? else {
            return Ok(vec![Row::absent(
                "clip_vision",
                "the bundle has no image_encoder",
            )]);
        };
        let images = vectors.floats("images_224")?;
        if !fits(&fixed(stage.spec().input("image")), images.shape()) {
            return Ok(vec![Row::absent(
                "clip_vision",
                "recorded for another size",
            )]);
        }
        let images = vision::normalise(images.view());
        let clock = Instant::now();
        let mut outputs = call(&stage, "image_encoder", &[("image", images.view())])?;
        let time = clock.elapsed();
        let tokens = take(&mut outputs, "tokens");
        let of = |name: &str| vectors.floats(name);
        let mut rows = vec![
            self.compared("clip_vision", "tokens", &tokens, of("tokens")?, VISION)
                .took(time),
        ];
        if let Some(odd) = vectors.maybe("preprocessed_odd") {
            let mut outputs = call(&stage, "image_encoder", &[("image", odd.view())])?;
            let tokens = take(&mut outputs, "tokens");
            let row = self.compared(
                "clip_vision",
                "tokens_odd",
                &tokens,
                of("tokens_odd")?,
                VISION,
            );
            rows.push(row.remark("from the recorded preprocessing"));
            let image = of("image_odd")?.clone().into_dimensionality::<Ix4>();
            let image = image.unwrap_or_default();
            let side = [odd.shape()[2], odd.shape()[3]];
            let own = vision::normalise(vision::resize(image.view(), side).into_dyn().view());
            let mut outputs = call(&stage, "image_encoder", &[("image", own.view())])?;
            let tokens = take(&mut outputs, "tokens");
            let expected = of("tokens_odd")?;
            let row = self.compared(
                "clip_vision",
                "tokens_odd",
                &tokens,
                expected,
                VISION_RESIZED,
            );
            rows.push(self.compared("clip_vision", "preprocessed_odd", &own, odd, PREPROCESSED));
            rows.push(row.remark("from our own preprocessing"));
        }
        Ok(rows)
    }

    fn encoder_rows(&self, name: StageName, file: &str, tolerance: Tolerance) -> Rows {
        let Some(vectors) = self.vectors(file)? else {
            return Ok(Vec::new());
        };
        let Some(stage) = self.stage(name)? else {
            return Ok(vec![Row::absent(
                file,
                format!("enc_*: the bundle has no {name}"),
            )]);
        };
        let image = vectors.floats("image")?;
        if !fits(&fixed(stage.spec().input("image")), image.shape()) {
            return Ok(vec![Row::absent(file, "enc_*: recorded for another size")]);
        }
        let clock = Instant::now();
        let mut outputs = call(&stage, name.as_str(), &[("image", image.view())])?;
        let time = clock.elapsed();
        let (mean, logvar) = (take(&mut outputs, "mean"), take(&mut outputs, "logvar"));
        let scale = self
            .bundle
            .manifest()
            .unclip
            .as_ref()
            .map_or(0.13025, |u| u.scale_factor);
        let noise = vectors.floats("enc_noise")?;
        let sample = (&mean + &(logvar.mapv(|value| (0.5 * value).exp()) * noise)) * scale;
        let of = |name: &str| vectors.floats(name);
        Ok(vec![
            self.compared(file, "enc_mean", &mean, of("enc_mean")?, tolerance)
                .took(time),
            self.compared(file, "enc_logvar", &logvar, of("enc_logvar")?, tolerance),
            self.compared(
                file,
                "enc_sample_scaled",
                &sample,
                of("enc_sample_scaled")?,
                tolerance,
            ),
        ])
    }

    fn refiner_vae_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("vae_sdxl")? else {
            return Ok(Vec::new());
        };
        let Some(stage) = self.stage(StageName::RefinerVaeDecoder)? else {
            return Ok(vec![Row::absent(
                "vae_sdxl",
                "the bundle has no refiner_vae_decoder",
            )]);
        };
        let latent = vectors.floats("latent_scaled")?;
        if !fits(&fixed(stage.spec().input("latent")), latent.shape()) {
            return Ok(vec![Row::absent(
                "vae_sdxl",
                "recorded for another latent size",
            )]);
        }
        let scale = self
            .bundle
            .manifest()
            .unclip
            .as_ref()
            .map_or(0.13025, |u| u.scale_factor);
        let latent = latent.mapv(|value| value / scale);
        let clock = Instant::now();
        let mut outputs = call(&stage, "refiner_vae_decoder", &[("latent", latent.view())])?;
        let time = clock.elapsed();
        let decoded = take(&mut outputs, "image");
        let expected = vectors.floats("decoded")?;
        Ok(vec![
            self.compared("vae_sdxl", "decoded", &decoded, expected, VAE)
                .took(time),
        ])
    }

    fn refiner_unet_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("unet_sdxl")? else {
            return Ok(Vec::new());
        };
        match self.stage(StageName::Refiner)? {
            Some(stage)
                if fits(
                    &fixed(stage.spec().input("latent")),
                    vectors.floats("x")?.shape(),
                ) =>
            {
                self.unet_rows("unet_sdxl", &stage, &vectors)
            }
            Some(_) => Ok(vec![Row::absent(
                "unet_sdxl",
                "recorded for another latent size",
            )]),
            None => Ok(vec![Row::absent(
                "unet_sdxl",
                self.without(&[StageName::Refiner]),
            )]),
        }
    }
}
