//! Merged LoRA files: the weights themselves, the UNet and the text towers.
//!
//! A file of reference vectors `io_lora_NAME` belongs to bundles into whose refiner `lora_NAME`
//! was merged, alone and with the recorded weight.

use std::fs;
use std::time::Instant;

use bundle::{Lora, StageName};
use ndarray::{ArrayD, Axis, IxDyn, Slice};

use super::networks::{as_floats, call, fits, fixed, take};
use super::towers::{CLIP_L, POOLED, ids};
use super::weights::StageWeights;
use super::{CheckError, Parity, Row, Rows, Tolerance, Vectors, Verdict};

/// Single-precision sums of a few products.
const WEIGHTS: Tolerance = Tolerance::Close(1e-6);
const EPS: Tolerance = Tolerance::Close(2e-5);
/// With every convolution changed too, the recorded error of single precision is twice as large.
const EPS_CONVOLUTIONS: Tolerance = Tolerance::Close(5e-5);
/// Of a checksum, as a share of the weight's norm: rounding errors of single numbers are
/// independent, so that those of their sums stay a few times the unit (6e-8, in fp16 4.9e-4) of the norm.
const CHECKSUM: f64 = 1e-6;
const CHECKSUM_HALF: f64 = 2e-3;

const STAGES: [StageName; 3] = [
    StageName::Refiner,
    StageName::TextEncoder1,
    StageName::TextEncoder2,
];

impl Parity {
    pub(super) fn lora_rows(&self) -> Rows {
        let mut rows = Vec::new();
        for name in self.recorded_loras()? {
            let Some(vectors) = self.vectors(&name)? else {
                continue;
            };
            match self.merged_alone(&name) {
                Ok(lora) => rows.extend(self.rows_of_lora(&name, lora, &vectors)?),
                Err(why) => rows.push(Row::absent(&name, why)),
            }
        }
        Ok(rows)
    }

    /// Names of the recorded LoRA files, `lora_…`.
    fn recorded_loras(&self) -> Result<Vec<String>, CheckError> {
        let error = |source| super::GoldenError::Read {
            path: self.golden.clone(),
            source,
        };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.golden).map_err(error)? {
            let name = entry.map_err(error)?.file_name();
            let name = name.to_string_lossy();
            let stem = name
                .strip_prefix("io_")
                .and_then(|n| n.strip_suffix(".safetensors"));
            names.extend(
                stem.filter(|stem| stem.starts_with("lora_"))
                    .map(str::to_owned),
            );
        }
        names.sort();
        Ok(names)
    }

    /// The manifest's record where the bundle holds exactly this LoRA, or why it does not.
    fn merged_alone(&self, name: &str) -> Result<&Lora, String> {
        let loras = &self.bundle.manifest().loras;
        let into_refiner: Vec<&Lora> = loras
            .iter()
            .filter(|lora| lora.network == StageName::Refiner)
            .collect();
        let weight = self.recorded_weight();
        let wanted = format!("recorded with {name}.safetensors in the refiner, weight {weight}");
        let [lora] = into_refiner.as_slice() else {
            return Err(wanted);
        };
        let recorded = self.recorded_name(&lora.sha256);
        let found = recorded.as_deref().unwrap_or(&lora.file);
        if found != format!("{name}.safetensors")
            || lora.weight != weight
            || !lora.left_out.is_empty()
        {
            return Err(wanted);
        }
        Ok(lora)
    }

    /// The weight that the reference set was recorded with.
    fn recorded_weight(&self) -> f32 {
        let text = fs::read(self.golden.join("config.json")).unwrap_or_default();
        let config: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        let weight = config
            .pointer("/lora/multiplier")
            .and_then(serde_json::Value::as_f64);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "compared with a single-precision number"
        )]
        weight.map_or(1.0, |weight| weight as f32)
    }

    fn rows_of_lora(&self, name: &str, lora: &Lora, vectors: &Vectors) -> Rows {
        let mut weights = Vec::new();
        for stage in STAGES {
            weights.extend(StageWeights::open(&self.bundle, stage)?);
        }
        let mut rows = vec![self.checksum_row(name, lora, vectors, &weights)?];
        rows.extend(self.sample_row(name, vectors, &weights)?);
        rows.extend(self.merged_unet_row(name, vectors)?);
        rows.extend(self.merged_text_rows(name, vectors)?);
        Ok(rows)
    }

    /// Sum, norm and a sum that tells the order, of every merged weight; in fp64.
    fn checksum_row(
        &self,
        name: &str,
        lora: &Lora,
        vectors: &Vectors,
        weights: &[StageWeights],
    ) -> Result<Row, CheckError> {
        let limit = match self.precision() {
            bundle::Precision::Fp32 => CHECKSUM,
            bundle::Precision::Fp16 => CHECKSUM_HALF,
            // Rounded column by column; the networks' results say what that costs.
            bundle::Precision::Int8 => {
                return Ok(Row::absent(
                    name,
                    "sums of merged weights: the weights are 8-bit integers",
                ));
            }
        };
        let (mut compared, mut missing, mut worst) = (0_usize, Vec::new(), 0.0_f64);
        for (key, expected) in vectors.doubles("f64/check/") {
            let Some(values) = find(weights, key)? else {
                missing.push(key);
                continue;
            };
            let found = checksums(&values);
            let norm = expected.get(1).copied().unwrap_or_default();
            for (found, expected) in found.iter().zip(expected) {
                let error = (found - expected).abs() / norm;
                worst = if error.is_nan() {
                    f64::INFINITY
                } else {
                    worst.max(error)
                };
            }
            compared += 1;
        }
        // What no stage runs is in no stage's weights; nothing else may be missing.
        let explained = missing.len() <= lora.unused.len();
        let good = compared > 0 && worst <= limit && explained;
        let note = match missing.as_slice() {
            [] => format!("{compared} merged weights"),
            [first, ..] if !explained => {
                format!(
                    "{} weights are not in the bundle, {first} first",
                    missing.len()
                )
            }
            _ => format!(
                "{compared} merged weights; {} more are of layers that no stage runs",
                missing.len()
            ),
        };
        Ok(Row {
            quantity: "f64/check".into(),
            max_error: Some(worst),
            tolerance: Some(limit),
            verdict: if good { Verdict::Ok } else { Verdict::Fail },
            ..Row::absent(name, note)
        })
    }

    /// The recorded merged weights, number for number.
    fn sample_row(
        &self,
        name: &str,
        vectors: &Vectors,
        weights: &[StageWeights],
    ) -> Result<Option<Row>, CheckError> {
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for full in vectors.names() {
            let Some(key) = full.strip_prefix("merged/") else {
                continue;
            };
            expected.extend(vectors.floats(full)?.iter().copied());
            found.extend(find(weights, key)?.unwrap_or_default());
        }
        let flat = |values: Vec<f32>| {
            ArrayD::from_shape_vec(IxDyn(&[values.len()]), values).unwrap_or_default()
        };
        let any = !expected.is_empty();
        Ok(any.then(|| self.compared(name, "merged", &flat(found), &flat(expected), WEIGHTS)))
    }

    fn merged_unet_row(&self, name: &str, vectors: &Vectors) -> Result<Option<Row>, CheckError> {
        let (Some(expected), Some(inputs)) =
            (vectors.maybe("eps_merged"), self.vectors("unet_sdxl")?)
        else {
            return Ok(None);
        };
        let Some(stage) = self.merged_stage(StageName::Refiner)? else {
            return Ok(Some(Row::absent(
                name,
                "eps_merged: the bundle has no refiner",
            )));
        };
        let x = inputs.floats("x")?;
        if !fits(&fixed(stage.spec().input("latent")), x.shape()) {
            let note = "eps_merged: recorded for another latent size";
            return Ok(Some(Row::absent(name, note)));
        }
        let times = as_floats(inputs.ints("timestep_idx")?);
        let clock = Instant::now();
        let mut outputs = call(
            &stage,
            "refiner",
            &[
                ("latent", x.view()),
                ("timestep", times.view()),
                ("context", inputs.floats("context")?.view()),
                ("vector", inputs.floats("y")?.view()),
            ],
        )?;
        let time = clock.elapsed();
        let eps = take(&mut outputs, "eps");
        let changes_convolutions = vectors
            .doubles("f64/check/")
            .any(|(key, _)| key.contains(".in_layers."));
        let tolerance = if changes_convolutions {
            EPS_CONVOLUTIONS
        } else {
            EPS
        };
        let row = self.compared(name, "eps_merged", &eps, expected, tolerance);
        Ok(Some(row.took(time)))
    }

    /// The text towers on the first recorded prompts.
    fn merged_text_rows(&self, name: &str, vectors: &Vectors) -> Rows {
        let (Some(crossattn), Some(pooled), Some(text)) = (
            vectors.maybe("te/crossattn"),
            vectors.maybe("te/pooled"),
            self.vectors("text")?,
        ) else {
            return Ok(Vec::new());
        };
        let (Some(first), Some(second)) = (
            self.merged_stage(StageName::TextEncoder1)?,
            self.merged_stage(StageName::TextEncoder2)?,
        ) else {
            return Ok(vec![Row::absent(
                name,
                "te: the bundle has no text encoders",
            )]);
        };
        let (prompts, tokens) = (crossattn.shape()[0], crossattn.shape()[1]);
        let first_ids = |name: &str| -> Result<ArrayD<f32>, CheckError> {
            let all = ids(&text, name, tokens)?;
            let rows = Slice::from(..prompts.min(all.shape()[0]));
            Ok(all.slice_axis(Axis(0), rows).to_owned())
        };
        let tokens = first_ids("ids_clip_l")?;
        let mut outputs = call(&first, "text_encoder_1", &[("tokens", tokens.view())])?;
        let hidden = take(&mut outputs, "hidden");
        let tokens = first_ids("ids_openclip")?;
        let mut outputs = call(&second, "text_encoder_2", &[("tokens", tokens.view())])?;
        let penultimate = take(&mut outputs, "hidden");
        let joined =
            ndarray::concatenate(Axis(2), &[hidden.view(), penultimate.view()]).unwrap_or_default();
        let found = take(&mut outputs, "pooled");
        Ok(vec![
            self.compared(name, "te/crossattn", &joined, crossattn, CLIP_L),
            self.compared(name, "te/pooled", &found, pooled, POOLED),
        ])
    }
}

fn find(weights: &[StageWeights], key: &str) -> Result<Option<Vec<f32>>, CheckError> {
    for stage in weights {
        if let Some(values) = stage.read(key)? {
            return Ok(Some(values));
        }
    }
    Ok(None)
}

/// Sum, Euclidean norm and the sum of `value * cos(index)`.
fn checksums(values: &[f32]) -> [f64; 3] {
    let (mut sum, mut squares, mut waves, mut index) = (0.0, 0.0, 0.0, 0.0_f64);
    for &value in values {
        let value = f64::from(value);
        sum += value;
        squares += value * value;
        waves += value * index.cos();
        index += 1.0;
    }
    [sum, squares.sqrt(), waves]
}
