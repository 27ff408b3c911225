//! What weights cannot tell.

use bundle::{Entrance, FewStepSampler};
use serde::Deserialize;

/// MindEye2's negative prompt.
const NEGATIVE_PROMPT: &str = "painting, extra fingers, mutated hands, poorly drawn hands, \
    poorly drawn face, deformed, ugly, blurry, bad anatomy, bad proportions, extra limbs, \
    cloned face, skinny, glitchy, double torso, extra arms, extra hands, mangled fingers, \
    missing lips, ugly face, distorted face, extra legs, anime";

/// What weights cannot tell; defaults are the released models' values.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// unCLIP latent rows and columns.
    pub latent_hw: [u64; 2],
    /// Channels of one UNet attention head.
    pub num_head_channels: u64,
    /// The refiner's latent rows and columns.
    pub refiner_latent_hw: [u64; 2],
    /// Channels of one attention head of the refiner's UNet.
    pub refiner_head_channels: u64,
    /// Attention heads of CLIP-L's text tower.
    pub clip_l_heads: u64,
    /// Layers of CLIP-L's text tower that run; the last is left out in SDXL.
    pub clip_l_layer: u64,
    /// Attention heads of OpenCLIP's text tower.
    pub open_clip_heads: u64,
    /// Channels of one attention head of OpenCLIP's image tower.
    pub vision_head_width: u64,
    /// Attention heads of the captioner.
    pub caption_heads: u64,
    /// Vision tokens of the captioner.
    pub caption_vision: u64,
    /// Longest caption in tokens, the first one included.
    pub caption_words: u64,
    /// Side of the picture that the image tower takes, pixels.
    pub vision_side: u64,
    /// Tokens of the UNet's context where there is no MindEye2 checkpoint to tell.
    pub context_tokens: u64,
    /// Latents are divided by this before decoding.
    pub scale_factor: f32,
    /// Guidance of the `reference` fidelity.
    pub guidance: f32,
    /// Euler steps of the `reference` fidelity.
    pub unclip_steps: u32,
    /// Share of offset noise in the start.
    pub offset_noise: f32,
    /// First beta of the noise schedule.
    pub linear_start: f64,
    /// Last beta.
    pub linear_end: f64,
    /// Entries of the sigma table.
    pub schedule_steps: u32,
    /// Numbers that stand for one number of the conditioning vector.
    pub vector_embed_dim: u64,
    /// Original picture size, then crop offset: the conditioning vector's numbers.
    pub vector_values: Vec<f32>,
    /// Picture = clamp(scale * decoded + shift).
    pub image_scale: f32,
    /// See `image_scale`.
    pub image_shift: f32,
    /// Sampler of the `edge` fidelity: what the unCLIP weights, or a LoRA, were distilled for.
    pub edge_sampler: FewStepSampler,
    /// Its steps.
    pub edge_steps: u32,
    /// Share of fresh noise where it is `tcd`.
    pub edge_eta: f32,
    /// Prior steps of the `reference` fidelity.
    pub prior_steps: u32,
    /// Prior steps of the `edge` fidelity, counted as the original does: one more than calls.
    pub prior_edge_steps: u32,
    /// Share of fresh noise in the prior's DDIM.
    pub prior_eta: f32,
    /// Condition weight of the prior.
    pub prior_cond_scale: f32,
    /// Euler steps of the refiner's whole schedule in the `reference` fidelity.
    pub refiner_steps: u32,
    /// Where that schedule is entered: `{ kept = N }` or `{ strength = S }`.
    pub refiner_entrance: Entrance,
    /// What refined pictures must not be like.
    pub negative_prompt: String,
    /// Picture size, crop and target size that the refiner is told, rows before columns.
    pub refiner_sizes: Vec<f32>,
    /// Side of the picture between unCLIP and refiner, and of the final one, pixels.
    pub blend_side: u64,
    /// Share of the refined picture in the final one.
    pub blend: f32,
    /// Sampler of the refiner in the `edge` fidelity.
    pub refiner_edge_sampler: FewStepSampler,
    /// Its steps.
    pub refiner_edge_steps: u32,
    /// Where its schedule is entered.
    pub refiner_edge_entrance: Entrance,
    /// In the `edge` fidelity unCLIP's latent goes to the refiner as it is.
    pub refiner_keep_latent: bool,
    /// The blurry latent is divided by this.
    pub blurry_scale: f32,
    /// Blurry latent rows and columns where there is no blurry head to tell.
    pub blurry_latent_hw: [u64; 2],
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            latent_hw: [96, 96],
            num_head_channels: 64,
            refiner_latent_hw: [96, 96],
            refiner_head_channels: 64,
            clip_l_heads: 12,
            clip_l_layer: 11,
            open_clip_heads: 20,
            vision_head_width: 104,
            caption_heads: 12,
            caption_vision: 257,
            caption_words: 20,
            vision_side: 224,
            context_tokens: 256,
            scale_factor: 0.13025,
            guidance: 5.0,
            unclip_steps: 38,
            offset_noise: 0.04,
            linear_start: 0.00085,
            linear_end: 0.012,
            schedule_steps: 1000,
            vector_embed_dim: 256,
            vector_values: vec![768.0, 768.0, 0.0, 0.0],
            image_scale: 0.8,
            image_shift: 0.2,
            edge_sampler: FewStepSampler::Lcm,
            edge_steps: 4,
            edge_eta: 0.3,
            prior_steps: 20,
            prior_edge_steps: 6,
            prior_eta: 1.0,
            prior_cond_scale: 1.0,
            refiner_steps: 25,
            refiner_entrance: Entrance::Kept(13),
            negative_prompt: NEGATIVE_PROMPT.into(),
            refiner_sizes: vec![768.0, 768.0, 0.0, 0.0, 1024.0, 1024.0],
            blend_side: 256,
            blend: 0.75,
            refiner_edge_sampler: FewStepSampler::Lcm,
            refiner_edge_steps: 4,
            refiner_edge_entrance: Entrance::Strength(0.5),
            refiner_keep_latent: false,
            blurry_scale: 0.18215,
            blurry_latent_hw: [28, 28],
        }
    }
}
