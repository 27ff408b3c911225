//! What each stage of a bundle costs on this machine, and how near it comes to its reference.

use std::time::Instant;

use bundle::{DType, Dim, Stage as StageSpec};
use ndarray::{ArrayD, IxDyn};
use serde::Serialize;

use super::{CheckError, Parity, Row, Verdict};
use crate::audit::memory::{Resident, Watch};

/// One stage: its parity rows summed up, and one call of one picture or person.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageFigures {
    /// The stage; ridges are `subject` and the person's id.
    pub stage: String,
    /// Its parity rows as the bundle computes on this machine; `None` where nothing was compared.
    pub parity: Option<Worst>,
    /// Its parity rows with every intermediate rounded to fp16, for fp16 bundles.
    pub rounded: Option<Worst>,
    /// Wall time of opening it, milliseconds.
    pub load_milliseconds: f64,
    /// Wall time of one call of batch 1, milliseconds.
    pub milliseconds: f64,
    /// Memory of this process around both.
    pub memory: Resident,
    /// Resident and not backed by a file once it was open, bytes.
    pub loaded_anonymous_bytes: u64,
}

/// The worst of several comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Worst {
    /// Largest absolute difference.
    pub max_error: f64,
    /// Smallest cosine.
    pub cosine: f64,
    /// Smallest signal-to-noise ratio of pictures, dB.
    pub psnr_db: Option<f64>,
}

/// The stage whose single calls a row compares; `None` for samplers, tables and whole chains.
pub(super) fn stage_of(vectors: &str, quantity: &str) -> Option<&'static str> {
    let brain = |quantity: &str| match quantity {
        "prior_pred" => "prior",
        ridge if ridge.starts_with("ridge") => "subject",
        _ => "backbone",
    };
    Some(match (vectors, quantity) {
        ("ridge" | "backbone" | "legacy" | "seq2" | "control", _) => brain(quantity),
        ("prior_net", "pred" | "pred_null") => "prior",
        ("autoenc", "decoded_raw" | "blurry_image") => "blurry_decoder",
        ("unet_unclip", "eps") => "unclip",
        ("vae_unclip", "decoded" | "picture") => "vae_decoder",
        ("vae_unclip", "enc_mean" | "enc_logvar") => "vae_encoder",
        ("text", "clip_l_hidden") => "text_encoder_1",
        ("text", "openclip_penultimate" | "pooled") => "text_encoder_2",
        ("clip_convert", _) => "caption_bridge",
        ("clip_vision", _) => "image_encoder",
        ("git", "first_step_logits") => "captioner",
        ("unet_sdxl", "eps") => "refiner",
        ("vae_sdxl", "decoded" | "picture") => "refiner_vae_decoder",
        ("vae_sdxl", "enc_mean" | "enc_logvar") => "refiner_vae_encoder",
        _ => return None,
    })
}

fn worst(rows: &[Row], stage: &str, rounded: bool) -> Option<Worst> {
    let of_stage = |row: &&Row| {
        row.verdict != Verdict::NotInThisBundle
            && row.rounded == rounded
            && stage_of(&row.vectors, &row.quantity) == Some(stage)
    };
    rows.iter().filter(of_stage).fold(None, |worst, row| {
        let (max_error, cosine) = (row.max_error.unwrap_or(0.0), row.cosine.unwrap_or(1.0));
        let so_far = worst.unwrap_or(Worst {
            max_error,
            cosine,
            psnr_db: row.psnr_db,
        });
        let psnr = [so_far.psnr_db, row.psnr_db].into_iter().flatten();
        Some(Worst {
            max_error: so_far.max_error.max(max_error),
            cosine: so_far.cosine.min(cosine),
            psnr_db: psnr.reduce(f64::min),
        })
    })
}

impl Parity {
    /// Every stage of the bundle, called once.
    pub(super) fn figures(&self, rows: &[Row]) -> Result<Vec<StageFigures>, CheckError> {
        let manifest = self.bundle.manifest();
        let mut figures = Vec::new();
        for subject in &manifest.subjects {
            let name = format!("subject {}", subject.id);
            figures.push(self.figure(&name, "subject", &subject.stage, rows)?);
        }
        for (name, stage) in &manifest.stages {
            figures.push(self.figure(name.as_str(), name.as_str(), stage, rows)?);
        }
        Ok(figures)
    }

    fn figure(
        &self,
        name: &str,
        kind: &str,
        spec: &StageSpec,
        rows: &[Row],
    ) -> Result<StageFigures, CheckError> {
        let watch = Watch::start();
        let clock = Instant::now();
        let stage = self.open(name, spec)?;
        let load = clock.elapsed();
        let loaded_anonymous_bytes = Watch::anonymous_bytes();
        let inputs: Vec<(&str, ArrayD<f32>)> = spec
            .inputs
            .iter()
            .map(|input| {
                let lens = input.shape.iter().map(|dim| match dim {
                    Dim::Batch(_) => 1,
                    Dim::Fixed(len) => usize::try_from(*len).unwrap_or(usize::MAX),
                });
                let lens: Vec<usize> = lens.collect();
                // Neither time nor memory depends on the numbers; zero is an index of every table.
                let value = if input.dtype == DType::I64 { 0.0 } else { 0.5 };
                (input.name.as_str(), ArrayD::from_elem(IxDyn(&lens), value))
            })
            .collect();
        let feed: Vec<_> = inputs
            .iter()
            .map(|(name, values)| (*name, values.view()))
            .collect();
        let clock = Instant::now();
        stage
            .run_unchecked(&feed)
            .map_err(|source| CheckError::Stage {
                stage: name.into(),
                source,
            })?;
        let time = clock.elapsed();
        Ok(StageFigures {
            stage: name.into(),
            parity: worst(rows, kind, false),
            rounded: worst(rows, kind, true),
            load_milliseconds: load.as_secs_f64() * 1e3,
            milliseconds: time.as_secs_f64() * 1e3,
            memory: watch.stop(),
            loaded_anonymous_bytes,
        })
    }
}
