//! Single network calls: ridge, backbone, prior, autoencoders, UNet.

use std::collections::BTreeMap;
use std::time::Instant;

use bundle::{StageName, TensorSpec};
use decoder::Stage;
use ndarray::{ArrayD, ArrayViewD, Axis, IxDyn};

use super::{CheckError, Parity, Row, Rows, Tolerance, Variant, Vectors};

/// Against `ref64`, where the mixer's single-element norm is exact.
const BACKBONE_EXACT: Tolerance = Tolerance::Close(2e-5);
const BLURRY_EXACT: Tolerance = Tolerance::Close(5e-5);
/// Against float32 results, which carry the rounding noise of that norm.
const BACKBONE_NOISY: Tolerance = Tolerance::Close(6e-4);
const RIDGE: Tolerance = Tolerance::Close(1e-5);
const PRIOR_NET: Tolerance = Tolerance::Close(5e-5);
const SEQ2: Tolerance = Tolerance::Close(1e-5);
const AUTOENC: Tolerance = Tolerance::Close(4e-4);
const UNET: Tolerance = Tolerance::Close(2e-5);
const VAE: Tolerance = Tolerance::Close(4e-5);
/// Single-precision tables that were computed in double precision: one unit in the last place.
const TABLE: f64 = 1.2e-7;

pub(super) type Outputs = BTreeMap<String, ArrayD<f32>>;

pub(super) fn call(
    stage: &Stage,
    name: &str,
    inputs: &[(&str, ArrayViewD<'_, f32>)],
) -> Result<Outputs, CheckError> {
    stage.run(inputs).map_err(|source| CheckError::Stage {
        stage: name.into(),
        source,
    })
}

pub(super) fn take(outputs: &mut Outputs, name: &str) -> ArrayD<f32> {
    // The stage compared its outputs with the manifest when it was opened.
    outputs
        .remove(name)
        .unwrap_or_else(|| ArrayD::zeros(IxDyn(&[0])))
}

pub(super) fn batch_of(value: f32, batch: usize) -> ArrayD<f32> {
    ArrayD::from_elem(IxDyn(&[batch]), value)
}

#[expect(clippy::cast_precision_loss, reason = "timesteps are far below 2^24")]
pub(super) fn as_floats(values: &[i64]) -> ArrayD<f32> {
    ArrayD::from_shape_vec(
        IxDyn(&[values.len()]),
        values.iter().map(|&value| value as f32).collect(),
    )
    .unwrap_or_default()
}

/// `[batch, 1, voxels]` as the ridge stage takes it.
fn flat_voxels(voxels: &ArrayD<f32>) -> ArrayD<f32> {
    let (batch, width) = (voxels.shape()[0], voxels.shape()[voxels.ndim() - 1]);
    voxels
        .to_shape(IxDyn(&[batch, width]))
        .map(|view| view.into_owned())
        .unwrap_or_default()
}

impl Parity {
    pub(super) fn mindeye_rows(&self) -> Rows {
        let main = [
            "ridge",
            "backbone",
            "average",
            "prior_net",
            "prior_schedule",
            "prior_ddim",
            "prior_ddpm",
        ];
        let mut rows = Vec::new();
        let absent = |rows: &mut Vec<Row>, names: &[&str], note: &str| {
            let present = names
                .iter()
                .filter(|name| self.golden.join(format!("io_{name}.safetensors")).is_file());
            rows.extend(present.map(|name| Row::absent(name, note)));
        };
        let variant = self.variant();
        match variant {
            Some(Variant::Main) => {
                rows.extend(self.ridge_rows()?);
                rows.extend(self.backbone_rows()?);
                rows.extend(self.average_rows()?);
                rows.extend(self.prior_rows()?);
            }
            Some(Variant::Half) => {
                rows.extend(self.half_rows()?);
                absent(
                    &mut rows,
                    &[
                        "ridge",
                        "average",
                        "prior_net",
                        "prior_schedule",
                        "prior_ddim",
                        "prior_ddpm",
                    ],
                    "recorded with last.pth",
                );
            }
            _ => absent(&mut rows, &main, "recorded with last.pth"),
        }
        for (name, file, own) in [
            ("legacy", "last_legacy.pth", Variant::Legacy),
            ("seq2", "extra_seq2.pth", Variant::TwoTokens),
            ("control", "hostile/control_ok.pth", Variant::Control),
        ] {
            if variant == Some(own) {
                rows.extend(self.small_model_rows(name)?);
            } else {
                absent(&mut rows, &[name], &format!("recorded with {file}"));
            }
        }
        Ok(rows)
    }

    fn row(
        &self,
        vectors: &str,
        quantity: &str,
        found: &ArrayD<f32>,
        expected: &ArrayD<f32>,
        tolerance: Tolerance,
    ) -> Row {
        Row::compare(
            vectors,
            quantity,
            found.view(),
            expected.view(),
            tolerance,
            self.precision(),
        )
    }

    fn ridge(&self, index: u32, voxels: &ArrayD<f32>) -> Result<Option<ArrayD<f32>>, CheckError> {
        let Some(subject) = self
            .bundle
            .manifest()
            .subjects
            .iter()
            .find(|subject| subject.index == index)
        else {
            return Ok(None);
        };
        let stage = self.open(&subject.id, &subject.stage)?;
        let betas = flat_voxels(voxels);
        if betas.shape()[1] as u64 != subject.voxels {
            return Ok(None);
        }
        let mut outputs = call(&stage, &subject.id, &[("betas", betas.view())])?;
        Ok(Some(take(&mut outputs, "ridge")))
    }

    fn ridge_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("ridge")? else {
            return Ok(Vec::new());
        };
        self.ridges("ridge", &vectors)
    }

    /// `voxels_subjN` to `ridge_subjN` for every N that is recorded.
    fn ridges(&self, name: &str, vectors: &Vectors) -> Rows {
        let mut rows = Vec::new();
        let recorded: Vec<u32> = vectors
            .names()
            .filter_map(|name| name.strip_prefix("voxels_subj")?.parse().ok())
            .collect();
        for index in recorded {
            let quantity = format!("ridge_subj{index}");
            match self.ridge(index, vectors.floats(&format!("voxels_subj{index}"))?)? {
                Some(found) => {
                    rows.push(self.row(name, &quantity, &found, vectors.floats(&quantity)?, RIDGE))
                }
                None => rows.push(Row::absent(
                    name,
                    format!("{quantity}: no such subject with as many voxels"),
                )),
            }
        }
        Ok(rows)
    }

    fn backbone_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("backbone")? else {
            return Ok(Vec::new());
        };
        let Some(stage) = self.stage(StageName::Backbone)? else {
            return Ok(vec![Row::absent("backbone", "no such stage")]);
        };
        if !fits(
            &fixed(stage.spec().input("ridge")),
            vectors.floats("ridge_out")?.shape(),
        ) {
            return Ok(vec![Row::absent("backbone", "recorded for another width")]);
        }
        let clock = Instant::now();
        let outputs = call(
            &stage,
            "backbone",
            &[("ridge", vectors.floats("ridge_out")?.view())],
        )?;
        let time = clock.elapsed();
        let mut rows = self.token_rows("backbone", &vectors, &outputs, BACKBONE_NOISY)?;
        if let Some(first) = rows.first_mut() {
            *first = first.clone().took(time);
        }
        if vectors.maybe("b_aux").is_some() {
            rows.push(Row::absent(
                "backbone",
                "b_aux: a training target, not exported",
            ));
        }
        Ok(rows)
    }

    /// Backbone outputs against `ref64/*` where it is recorded, else against the float32 result.
    fn token_rows(
        &self,
        name: &str,
        vectors: &Vectors,
        outputs: &Outputs,
        noisy: Tolerance,
    ) -> Rows {
        let mut rows = Vec::new();
        for (output, quantity, exact) in [
            ("brain_tokens", "backbone", BACKBONE_EXACT),
            ("retrieval", "clip_voxels", BACKBONE_EXACT),
            ("blurry_latent", "blurry_latent", BLURRY_EXACT),
        ] {
            let Some(recorded) = vectors.maybe(quantity) else {
                continue;
            };
            let Some(found) = outputs.get(output) else {
                rows.push(Row::absent(
                    name,
                    format!("{quantity}: the bundle has no such output"),
                ));
                continue;
            };
            rows.push(match vectors.maybe(&format!("ref64/{quantity}")) {
                Some(exact_value) => self
                    .row(name, quantity, found, exact_value, exact)
                    .remark("against ref64"),
                None => self.row(name, quantity, found, recorded, noisy),
            });
        }
        Ok(rows)
    }

    fn half_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("backbone")? else {
            return Ok(Vec::new());
        };
        let Some(stage) = self.stage(StageName::Backbone)? else {
            return Ok(Vec::new());
        };
        let outputs = call(
            &stage,
            "backbone",
            &[("ridge", vectors.floats("ridge_out")?.view())],
        )?;
        let mut rows = Vec::new();
        for (output, quantity) in [
            ("brain_tokens", "backbone_fp16"),
            ("retrieval", "clip_voxels_fp16"),
        ] {
            if let (Some(found), Some(recorded)) = (outputs.get(output), vectors.maybe(quantity)) {
                rows.push(self.row("backbone", quantity, found, recorded, BACKBONE_NOISY));
            }
        }
        Ok(rows)
    }

    fn average_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("average")? else {
            return Ok(Vec::new());
        };
        let Some(stage) = self.stage(StageName::Backbone)? else {
            return Ok(Vec::new());
        };
        let voxels = vectors.floats("voxels")?;
        let mut sums: BTreeMap<String, Vec<ArrayD<f32>>> = BTreeMap::new();
        for sample in voxels.axis_iter(Axis(0)) {
            let Some(ridge) = self.ridge(0, &sample.to_owned().insert_axis(Axis(1)))? else {
                return Ok(vec![Row::absent(
                    "average",
                    "no subject 0 with as many voxels",
                )]);
            };
            for (name, values) in call(&stage, "backbone", &[("ridge", ridge.view())])? {
                sums.entry(name)
                    .or_default()
                    .push(values.mean_axis(Axis(0)).unwrap_or_default());
            }
        }
        let mut rows = Vec::new();
        for (output, quantity, tolerance) in [
            ("brain_tokens", "backbone_avg", BACKBONE_EXACT),
            ("retrieval", "clip_voxels_avg", BACKBONE_EXACT),
            ("blurry_latent", "blurry_latent_avg", BLURRY_EXACT),
        ] {
            let (Some(samples), Some(expected)) = (
                sums.get(output),
                vectors.maybe(&format!("ref64/{quantity}")),
            ) else {
                continue;
            };
            let views: Vec<ArrayViewD<'_, f32>> =
                samples.iter().map(|sample| sample.view()).collect();
            let found = ndarray::stack(Axis(0), &views).unwrap_or_default();
            rows.push(
                self.row("average", quantity, &found, expected, tolerance)
                    .remark("against ref64"),
            );
        }
        Ok(rows)
    }

    fn prior_rows(&self) -> Rows {
        let Some(stage) = self.stage(StageName::Prior)? else {
            return Ok(vec![Row::absent("prior_net", "the bundle has no prior")]);
        };
        let mut rows = Vec::new();
        if let Some(vectors) = self.vectors("prior_net")? {
            let times = as_floats(vectors.ints("timesteps")?);
            let clock = Instant::now();
            let pred =
                self.prior_call(&stage, &vectors, "image_embed", "text_embed", &times, 1.0)?;
            let time = clock.elapsed();
            let null =
                self.prior_call(&stage, &vectors, "image_embed", "text_embed", &times, 0.0)?;
            let guided = &null + &((&pred - &null) * 3.0);
            rows.push(
                self.row(
                    "prior_net",
                    "pred",
                    &pred,
                    vectors.floats("pred")?,
                    PRIOR_NET,
                )
                .took(time),
            );
            rows.push(self.row(
                "prior_net",
                "pred_null",
                &null,
                vectors.floats("pred_null")?,
                PRIOR_NET,
            ));
            rows.push(self.row(
                "prior_net",
                "pred_cond_scale_3",
                &guided,
                vectors.floats("pred_cond_scale_3")?,
                PRIOR_NET,
            ));
        }
        rows.extend(self.prior_sampler_rows(&stage)?);
        Ok(rows)
    }

    fn prior_call(
        &self,
        stage: &Stage,
        vectors: &Vectors,
        image: &str,
        text: &str,
        times: &ArrayD<f32>,
        keep: f32,
    ) -> Result<ArrayD<f32>, CheckError> {
        let keep = batch_of(keep, times.len());
        let mut outputs = call(
            stage,
            "prior",
            &[
                ("tokens_noised", vectors.floats(image)?.view()),
                ("timestep", times.view()),
                ("brain_tokens", vectors.floats(text)?.view()),
                ("keep", keep.view()),
            ],
        )?;
        Ok(take(&mut outputs, "pred"))
    }

    /// `io_legacy`, `io_seq2` and `io_control`: a small model of their own.
    fn small_model_rows(&self, name: &str) -> Rows {
        let path = if name == "control" {
            self.golden.join("hostile")
        } else {
            self.golden.clone()
        };
        let Some(vectors) = Vectors::read(&path, name)?.or(Vectors::read(&self.golden, name)?)
        else {
            return Ok(Vec::new());
        };
        let mut rows = Vec::new();
        let tolerance = if name == "seq2" {
            SEQ2
        } else {
            Tolerance::Close(4e-4)
        };
        let ridge = match (
            vectors.maybe("x"),
            vectors.maybe("ridge_subj0"),
            vectors.maybe("ridge"),
        ) {
            (Some(x), ..) => x.clone(),
            (_, Some(ridge), _) => {
                rows.extend(self.ridges(name, &vectors)?);
                ridge.clone()
            }
            (_, _, Some(ridge)) => {
                if let Some(found) = self.ridge(0, vectors.floats("voxels")?)? {
                    rows.push(self.row(name, "ridge", &found, ridge, RIDGE));
                }
                ridge.clone()
            }
            _ => return Ok(rows),
        };
        if let Some(stage) = self.stage(StageName::Backbone)? {
            let outputs = call(&stage, "backbone", &[("ridge", ridge.view())])?;
            rows.extend(self.token_rows(name, &vectors, &outputs, tolerance)?);
        }
        if let (Some(expected), Some(stage)) =
            (vectors.maybe("prior_pred"), self.stage(StageName::Prior)?)
        {
            let times = as_floats(vectors.ints("prior_timesteps")?);
            let pred = self.prior_call(
                &stage,
                &vectors,
                "prior_image_embed",
                "prior_text_embed",
                &times,
                1.0,
            )?;
            rows.push(self.row(name, "prior_pred", &pred, expected, Tolerance::Close(4e-5)));
        }
        Ok(rows)
    }

    pub(super) fn blurry_rows(&self) -> Rows {
        let Some(vectors) = self.vectors("autoenc")? else {
            return Ok(Vec::new());
        };
        let Some(stage) = self.stage(StageName::BlurryDecoder)? else {
            return Ok(vec![Row::absent(
                "autoenc",
                "the bundle has no blurry_decoder",
            )]);
        };
        let scale = self
            .bundle
            .manifest()
            .blurry
            .map_or(1.0, |blurry| blurry.latent_scale);
        let latent = vectors.floats("blurry_latent")?.mapv(|value| value / scale);
        if !fits(
            &stage_latent(self, StageName::BlurryDecoder),
            latent.shape(),
        ) {
            return Ok(vec![Row::absent(
                "autoenc",
                "recorded for another latent size",
            )]);
        }
        let clock = Instant::now();
        let mut outputs = call(&stage, "blurry_decoder", &[("latent", latent.view())])?;
        let time = clock.elapsed();
        let raw = take(&mut outputs, "image");
        let picture = raw.mapv(|value| (value / 2.0 + 0.5).clamp(0.0, 1.0));
        Ok(vec![
            self.row(
                "autoenc",
                "decoded_raw",
                &raw,
                vectors.floats("decoded_raw")?,
                AUTOENC,
            )
            .took(time),
            self.row(
                "autoenc",
                "blurry_image",
                &picture,
                vectors.floats("blurry_image")?,
                Tolerance::Picture(4e-4),
            ),
            Row::absent(
                "autoenc",
                "small_decoded: recorded for another latent size than the stage's",
            ),
            Row::absent("autoenc", "enc_*: the encoder is not exported yet"),
        ])
    }

    pub(super) fn unclip_rows(&self) -> Rows {
        let mut rows = self.schedule_rows()?;
        if let Some(vectors) = self.vectors("unet_unclip")? {
            match self.stage(StageName::Unclip)? {
                Some(stage)
                    if fits(
                        &stage_latent(self, StageName::Unclip),
                        vectors.floats("x")?.shape(),
                    ) =>
                {
                    rows.extend(self.unet_rows("unet_unclip", &stage, &vectors)?);
                }
                Some(_) => rows.push(Row::absent(
                    "unet_unclip",
                    "recorded for another latent size",
                )),
                None => rows.push(Row::absent(
                    "unet_unclip",
                    self.without(&[StageName::Unclip]),
                )),
            }
        }
        if let Some(vectors) = self.vectors("vae_unclip")? {
            match self.stage(StageName::VaeDecoder)? {
                Some(stage)
                    if fits(
                        &stage_latent(self, StageName::VaeDecoder),
                        vectors.floats("latent_scaled")?.shape(),
                    ) =>
                {
                    let scale = self
                        .bundle
                        .manifest()
                        .unclip
                        .as_ref()
                        .map_or(1.0, |unclip| unclip.scale_factor);
                    let latent = vectors.floats("latent_scaled")?.mapv(|value| value / scale);
                    let clock = Instant::now();
                    let mut outputs = call(&stage, "vae_decoder", &[("latent", latent.view())])?;
                    let time = clock.elapsed();
                    let decoded = take(&mut outputs, "image");
                    rows.push(
                        self.row(
                            "vae_unclip",
                            "decoded",
                            &decoded,
                            vectors.floats("decoded")?,
                            VAE,
                        )
                        .took(time),
                    );
                }
                Some(_) => rows.push(Row::absent(
                    "vae_unclip",
                    "recorded for another latent size",
                )),
                None => rows.push(Row::absent("vae_unclip", "the bundle has no vae_decoder")),
            }
        }
        rows.extend(self.unclip_sampler_rows()?);
        Ok(rows)
    }

    /// A denoising network's calls as they were recorded in `file`.
    pub(super) fn unet_rows(&self, file: &str, stage: &Stage, vectors: &Vectors) -> Rows {
        let times = as_floats(vectors.ints("timestep_idx")?);
        let clock = Instant::now();
        let mut outputs = call(
            stage,
            "unclip",
            &[
                ("latent", vectors.floats("x")?.view()),
                ("timestep", times.view()),
                ("context", vectors.floats("context")?.view()),
                ("vector", vectors.floats("y")?.view()),
            ],
        )?;
        let time = clock.elapsed();
        let eps = take(&mut outputs, "eps");
        let mut rows = vec![
            self.row(file, "eps", &eps, vectors.floats("eps")?, UNET)
                .took(time),
        ];
        rows.extend(self.denoiser_rows(file, stage, vectors)?);
        Ok(rows)
    }

    /// A row of numbers that do not depend on the bundle's precision: single-precision tables.
    pub(super) fn table_row(
        &self,
        vectors: &str,
        quantity: &str,
        found: &ArrayD<f32>,
        expected: &ArrayD<f32>,
    ) -> Row {
        Row::compare(
            vectors,
            quantity,
            found.view(),
            expected.view(),
            Tolerance::Relative(TABLE),
            self.precision(),
        )
    }

    /// A row that no network takes part in: the same in every precision.
    pub(super) fn fp32_row(
        &self,
        vectors: &str,
        quantity: &str,
        found: &ArrayD<f32>,
        expected: &ArrayD<f32>,
        tolerance: Tolerance,
    ) -> Row {
        Row::compare(
            vectors,
            quantity,
            found.view(),
            expected.view(),
            tolerance,
            bundle::Precision::Fp32,
        )
    }

    /// A row of indices, which are equal or wrong.
    pub(super) fn exact_row(
        &self,
        vectors: &str,
        quantity: &str,
        found: &ArrayD<f32>,
        expected: &ArrayD<f32>,
    ) -> Row {
        Row::compare(
            vectors,
            quantity,
            found.view(),
            expected.view(),
            Tolerance::Exact,
            self.precision(),
        )
    }

    /// A row for sampler checks in the sibling module.
    pub(super) fn compared(
        &self,
        vectors: &str,
        quantity: &str,
        found: &ArrayD<f32>,
        expected: &ArrayD<f32>,
        tolerance: Tolerance,
    ) -> Row {
        self.row(vectors, quantity, found, expected, tolerance)
    }
}

/// Fixed axes of a stage's `latent` input.
fn stage_latent(parity: &Parity, name: StageName) -> Vec<Option<u64>> {
    let stage = parity.bundle.manifest().stages.get(&name);
    fixed(stage.and_then(|stage| stage.input("latent")))
}

/// Fixed axes; none where there is no such input.
pub(super) fn fixed(spec: Option<&TensorSpec>) -> Vec<Option<u64>> {
    let axes = |spec: &TensorSpec| (0..spec.shape.len()).map(|axis| spec.fixed(axis)).collect();
    spec.map(axes).unwrap_or_default()
}

pub(super) fn fits(axes: &[Option<u64>], shape: &[usize]) -> bool {
    axes.len() == shape.len()
        && axes
            .iter()
            .zip(shape)
            .all(|(axis, &len)| axis.is_none_or(|axis| axis == len as u64))
}
