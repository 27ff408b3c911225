//! Networks of a bundle: their names, files, inputs and outputs.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A network shared by all subjects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageName {
    /// Ridge output to CLIP tokens, retrieval embedding and blurry latent.
    Backbone,
    /// Blurry latent to picture.
    BlurryDecoder,
    /// Brain tokens to CLIP image tokens, one denoising call.
    Prior,
    /// One denoising call of the unCLIP UNet.
    Unclip,
    /// Latent to picture.
    VaeDecoder,
    /// Picture to latent moments.
    VaeEncoder,
    /// CLIP image tokens to the captioner's vision tokens.
    CaptionBridge,
    /// Vision tokens to the keys and values that every word reads.
    CaptionerPrefix,
    /// One word, with keys and values so far, to the scores of the next.
    Captioner,
    /// CLIP-L text tower.
    #[serde(rename = "text_encoder_1")]
    TextEncoder1,
    /// OpenCLIP text tower.
    #[serde(rename = "text_encoder_2")]
    TextEncoder2,
    /// One denoising call of the SDXL refiner.
    Refiner,
    /// The refiner's own autoencoder: picture to latent moments.
    RefinerVaeEncoder,
    /// The refiner's own autoencoder: latent to picture.
    RefinerVaeDecoder,
    /// Picture to CLIP image tokens.
    ImageEncoder,
    /// Latent to a small, quick picture.
    PreviewDecoder,
}

impl StageName {
    /// Every stage that a bundle can hold.
    pub const ALL: [StageName; 16] = [
        StageName::Backbone,
        StageName::BlurryDecoder,
        StageName::Prior,
        StageName::Unclip,
        StageName::VaeDecoder,
        StageName::VaeEncoder,
        StageName::CaptionBridge,
        StageName::CaptionerPrefix,
        StageName::Captioner,
        StageName::TextEncoder1,
        StageName::TextEncoder2,
        StageName::Refiner,
        StageName::RefinerVaeEncoder,
        StageName::RefinerVaeDecoder,
        StageName::ImageEncoder,
        StageName::PreviewDecoder,
    ];

    /// The name in manifests and file names.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            StageName::Backbone => "backbone",
            StageName::BlurryDecoder => "blurry_decoder",
            StageName::Prior => "prior",
            StageName::Unclip => "unclip",
            StageName::VaeDecoder => "vae_decoder",
            StageName::VaeEncoder => "vae_encoder",
            StageName::CaptionBridge => "caption_bridge",
            StageName::CaptionerPrefix => "captioner_prefix",
            StageName::Captioner => "captioner",
            StageName::TextEncoder1 => "text_encoder_1",
            StageName::TextEncoder2 => "text_encoder_2",
            StageName::Refiner => "refiner",
            StageName::RefinerVaeEncoder => "refiner_vae_encoder",
            StageName::RefinerVaeDecoder => "refiner_vae_decoder",
            StageName::ImageEncoder => "image_encoder",
            StageName::PreviewDecoder => "preview_decoder",
        }
    }
}

impl fmt::Display for StageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One ONNX graph with its external data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Path of the ONNX file inside the bundle.
    pub graph: String,
    /// Path of its external data; `None` where every tensor is tiny and inline.
    #[serde(default)]
    pub weights: Option<String>,
    /// Graph inputs in order.
    pub inputs: Vec<TensorSpec>,
    /// Graph outputs in order.
    pub outputs: Vec<TensorSpec>,
    /// Bytes of the intermediate values alive at once at batch 1; 0 where the exporter did not say.
    #[serde(default)]
    pub working_bytes: u64,
}

impl Stage {
    /// The input of this name.
    #[must_use]
    pub fn input(&self, name: &str) -> Option<&TensorSpec> {
        self.inputs.iter().find(|spec| spec.name == name)
    }

    /// The output of this name.
    #[must_use]
    pub fn output(&self, name: &str) -> Option<&TensorSpec> {
        self.outputs.iter().find(|spec| spec.name == name)
    }
}

/// A graph input or output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// Name in the graph.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Axes, outermost first.
    pub shape: Vec<Dim>,
}

impl TensorSpec {
    /// The length of an axis that does not depend on the batch; `None` for the batch or past the last axis.
    #[must_use]
    pub fn fixed(&self, axis: usize) -> Option<u64> {
        match self.shape.get(axis) {
            Some(Dim::Fixed(len)) => Some(*len),
            _ => None,
        }
    }
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} [", self.name, self.dtype)?;
        for (axis, dim) in self.shape.iter().enumerate() {
            if axis > 0 {
                f.write_str(", ")?;
            }
            match dim {
                Dim::Batch(_) => f.write_str("batch")?,
                Dim::Fixed(len) => write!(f, "{len}")?,
            }
        }
        f.write_str("]")
    }
}

/// Element type of a graph input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// 64-bit signed integer.
    I64,
}

/// One axis of a graph input or output; in JSON `"batch"` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dim {
    /// Chosen at each call.
    Batch(BatchWord),
    /// The same in every call.
    Fixed(u64),
}

impl Dim {
    /// The axis whose length is chosen at each call.
    pub const BATCH: Dim = Dim::Batch(BatchWord::Batch);
}

/// The word that stands for a free axis in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BatchWord {
    /// `"batch"`.
    Batch,
}
