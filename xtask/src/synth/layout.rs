//! From hyper-parameters to the names, shapes and types of a checkpoint's tensors.
//!
//! The rules are those of the original classes, so that a released size comes out as the released file:
//! MindEye2's `BrainNetwork` and `PriorNetwork` (MedARC-AI/MindEyeV2), Stability's `UNetModel` and `Encoder`/`Decoder`
//! (generative-models), OpenCLIP's image tower, diffusers' `AutoencoderKL`. Order is that of registration.

use super::schedule;
use super::size::{
    Autoencoder, DIFFUSION_STEPS, ImageTower, LINEAR_END, LINEAR_START, MindEye, PRIOR_HEAD,
    PRIOR_STEPS, Unclip, Unet, Vae,
};

/// How a number is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DType {
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
    /// 64-bit integer.
    I64,
}

impl DType {
    /// Size of one number.
    pub(crate) fn len_bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
            Self::I64 => 8,
        }
    }
}

/// Which type a tensor of a file gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Types {
    /// All F16.
    Half,
    /// All F32.
    Single,
    /// Matrices and convolutions F16, vectors and scalars F32.
    Mixed,
}

/// What a tensor is filled with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fill {
    /// Uniform in `centre ± reach`.
    Uniform {
        /// The middle.
        centre: f32,
        /// The largest distance from it.
        reach: f32,
    },
    /// These values.
    Table(Vec<f32>),
    /// 0, 1, 2 and so on.
    Counting,
    /// The storage of another tensor of the file, by its place in the list.
    SameAs(usize),
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Its key.
    pub(crate) name: String,
    /// Its type.
    pub(crate) dtype: DType,
    /// Its shape; empty for a scalar.
    pub(crate) shape: Vec<u64>,
    /// Its content.
    pub(crate) fill: Fill,
}

impl Tensor {
    /// How many numbers.
    pub(crate) fn len(&self) -> u64 {
        self.shape.iter().product()
    }

    /// How many bytes.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.len() * self.dtype.len_bytes()
    }
}

/// `last.pth`, `model_state_dict`.
pub(crate) fn mindeye(size: &MindEye) -> Vec<Tensor> {
    let mut list = List::new(Types::Single);
    for (subject, voxels) in size.voxels.iter().enumerate() {
        list.linear(&format!("ridge.linears.{subject}"), *voxels, size.hidden);
    }
    for (kind, width) in [
        ("mixer_blocks1", size.hidden),
        ("mixer_blocks2", size.sequence),
    ] {
        for block in 0..size.blocks {
            let at = format!("backbone.{kind}.{block}");
            list.norm(&format!("{at}.0"), width);
            list.linear(&format!("{at}.1.0"), width, width);
            list.linear(&format!("{at}.1.3"), width, width);
        }
    }
    let trunk = size.hidden * size.sequence;
    list.linear("backbone.backbone_linear", trunk, size.tokens * size.dim);
    for layer in [0, 3, 6] {
        list.norm(&format!("backbone.clip_proj.{layer}"), size.dim);
        list.linear(
            &format!("backbone.clip_proj.{}", layer + 2),
            size.dim,
            size.dim,
        );
    }
    if size.blurry {
        blurry_head(&mut list, trunk);
    }
    prior(&mut list, size);
    list.tensors
}

/// The low-level head: 64 maps of 7 x 7 from the trunk, then a small decoder to a 28 x 28 latent.
fn blurry_head(list: &mut List, trunk: u64) {
    list.linear("backbone.blin1", trunk, 4 * 28 * 28);
    list.norm("backbone.bnorm", 64);
    diffusers_decoder(list, "backbone.bupsampler", 64, 4, &[32, 64, 128], 1);
    let maps = "backbone.b_maps_projector";
    list.weight(&format!("{maps}.0.weight"), &[512, 64, 1, 1]);
    list.norm(&format!("{maps}.1"), 512);
    list.weight(&format!("{maps}.3.weight"), &[512, 512, 1, 1]);
    list.norm(&format!("{maps}.4"), 512);
    list.conv(&format!("{maps}.6"), 512, 512, 1);
}

/// The diffusion prior: schedule buffers, time embedding, multi-query transformer.
fn prior(list: &mut List, size: &MindEye) {
    for (name, values) in schedule::prior_buffers(PRIOR_STEPS) {
        list.table(&format!("diffusion_prior.noise_scheduler.{name}"), values);
    }
    let (dim, heads) = (size.dim, size.dim / PRIOR_HEAD);
    let net = "diffusion_prior.net";
    for name in ["learned_query", "null_brain_embeds", "null_image_embed"] {
        list.uniform(&format!("{net}.{name}"), &[size.tokens, dim], 0.0, 0.9);
    }
    let time = format!("{net}.to_time_embeds.0.1.net");
    list.linear(&format!("{time}.0.0"), dim, 2 * dim);
    list.linear(&format!("{time}.1.0"), 2 * dim, 2 * dim);
    list.linear(&format!("{time}.2"), 2 * dim, dim);
    let transformer = format!("{net}.causal_transformer");
    list.uniform(
        &format!("{transformer}.rel_pos_bias.relative_attention_bias.weight"),
        &[32, heads],
        0.0,
        0.9,
    );
    let mut rotary = None;
    for layer in 0..size.prior_depth {
        let at = format!("{transformer}.layers.{layer}");
        list.uniform(&format!("{at}.0.null_kv"), &[2, PRIOR_HEAD], 0.0, 1.0);
        list.gain(&format!("{at}.0.norm.g"), dim);
        list.weight(&format!("{at}.0.to_q.weight"), &[heads * PRIOR_HEAD, dim]);
        list.weight(&format!("{at}.0.to_kv.weight"), &[2 * PRIOR_HEAD, dim]);
        // One rotary embedding serves all layers, so the file holds one storage under several names.
        let name = format!("{at}.0.rotary_emb.freqs");
        match rotary {
            None => rotary = Some(list.table(&name, schedule::rotary_frequencies(32))),
            Some(first) => list.same_as(&name, first),
        }
        list.weight(
            &format!("{at}.0.to_out.0.weight"),
            &[dim, heads * PRIOR_HEAD],
        );
        list.gain(&format!("{at}.0.to_out.1.g"), dim);
        list.gain(&format!("{at}.1.0.g"), dim);
        list.weight(&format!("{at}.1.1.weight"), &[8 * dim, dim]);
        list.weight(&format!("{at}.1.5.weight"), &[dim, 4 * dim]);
    }
    list.gain(&format!("{transformer}.norm.g"), dim);
    list.weight(&format!("{transformer}.project_out.weight"), &[dim, dim]);
}

/// `sd_image_var_autoenc.pth`: a bare state dict.
pub(crate) fn autoencoder(size: &Autoencoder) -> Vec<Tensor> {
    let mut list = List::new(Types::Half);
    let channels = &size.channels;
    let last = channels.len() - 1;
    list.conv("encoder.conv_in", 3, channels[0], 3);
    for (level, width) in channels.iter().enumerate() {
        let at = format!("encoder.down_blocks.{level}");
        let mut from = channels[level.saturating_sub(1)];
        for block in 0..size.layers {
            diffusers_resnet(&mut list, &format!("{at}.resnets.{block}"), from, *width);
            from = *width;
        }
        if level != last {
            list.conv(&format!("{at}.downsamplers.0.conv"), *width, *width, 3);
        }
    }
    diffusers_middle(&mut list, "encoder", channels[last]);
    list.norm("encoder.conv_norm_out", channels[last]);
    list.conv("encoder.conv_out", channels[last], 8, 3);
    diffusers_decoder(&mut list, "decoder", 4, 3, channels, size.layers);
    list.conv("quant_conv", 8, 8, 1);
    list.conv("post_quant_conv", 4, 4, 1);
    list.tensors
}

fn diffusers_decoder(list: &mut List, at: &str, from: u64, to: u64, channels: &[u64], layers: u64) {
    let last = channels.len() - 1;
    list.conv(&format!("{at}.conv_in"), from, channels[last], 3);
    let mut width = channels[last];
    for level in 0..channels.len() {
        let next = channels[last - level];
        for block in 0..=layers {
            diffusers_resnet(
                list,
                &format!("{at}.up_blocks.{level}.resnets.{block}"),
                width,
                next,
            );
            width = next;
        }
        if level != last {
            list.conv(
                &format!("{at}.up_blocks.{level}.upsamplers.0.conv"),
                width,
                width,
                3,
            );
        }
    }
    diffusers_middle(list, at, channels[last]);
    list.norm(&format!("{at}.conv_norm_out"), channels[0]);
    list.conv(&format!("{at}.conv_out"), channels[0], to, 3);
}

fn diffusers_middle(list: &mut List, at: &str, width: u64) {
    let attention = format!("{at}.mid_block.attentions.0");
    list.norm(&format!("{attention}.group_norm"), width);
    for name in ["to_q", "to_k", "to_v", "to_out.0"] {
        list.linear(&format!("{attention}.{name}"), width, width);
    }
    for block in 0..2 {
        diffusers_resnet(
            list,
            &format!("{at}.mid_block.resnets.{block}"),
            width,
            width,
        );
    }
}

fn diffusers_resnet(list: &mut List, at: &str, from: u64, to: u64) {
    resnet(list, at, from, to, "conv_shortcut");
}

/// Two convolutions with their norms, and a shortcut where the width changes.
fn resnet(list: &mut List, at: &str, from: u64, to: u64, shortcut: &str) {
    list.norm(&format!("{at}.norm1"), from);
    list.conv(&format!("{at}.conv1"), from, to, 3);
    list.norm(&format!("{at}.norm2"), to);
    list.conv(&format!("{at}.conv2"), to, to, 3);
    if from != to {
        list.conv(&format!("{at}.{shortcut}"), from, to, 1);
    }
}

/// `unclip6*.ckpt`, `state_dict`. The context of the UNet is the image tower's tokens.
pub(crate) fn unclip(size: &Unclip, types: Types) -> Vec<Tensor> {
    let mut list = List::new(types);
    unet(&mut list, &size.unet, size.image_tower.width);
    list.table(
        "denoiser.sigmas",
        schedule::denoiser_sigmas(DIFFUSION_STEPS, LINEAR_START, LINEAR_END),
    );
    image_tower(&mut list, &size.image_tower);
    vae(&mut list, &size.vae);
    list.tensors
}

pub(super) fn unet(list: &mut List, size: &Unet, context: u64) {
    const AT: &str = "model.diffusion_model";
    let (base, time) = (size.channels, 4 * size.channels);
    list.linear(&format!("{AT}.time_embed.0"), base, time);
    list.linear(&format!("{AT}.time_embed.2"), time, time);
    list.linear(&format!("{AT}.label_emb.0.0"), size.vector, time);
    list.linear(&format!("{AT}.label_emb.0.2"), time, time);

    list.conv(&format!("{AT}.input_blocks.0.0"), 4, base, 3);
    let levels = size.channel_mult.len();
    let mut skips = vec![base];
    let (mut width, mut downscale, mut block) = (base, 1, 1);
    for (level, mult) in size.channel_mult.iter().enumerate() {
        for _ in 0..size.res_blocks {
            let at = format!("{AT}.input_blocks.{block}");
            unet_resnet(list, &format!("{at}.0"), width, mult * base, time);
            width = mult * base;
            if size.attention_at.contains(&downscale) {
                transformer(
                    list,
                    &format!("{at}.1"),
                    width,
                    context,
                    size.transformer_depth[level],
                );
            }
            skips.push(width);
            block += 1;
        }
        if level + 1 != levels {
            list.conv(&format!("{AT}.input_blocks.{block}.0.op"), width, width, 3);
            skips.push(width);
            block += 1;
            downscale *= 2;
        }
    }

    unet_resnet(list, &format!("{AT}.middle_block.0"), width, width, time);
    let depth = size.transformer_depth[levels - 1];
    transformer(list, &format!("{AT}.middle_block.1"), width, context, depth);
    unet_resnet(list, &format!("{AT}.middle_block.2"), width, width, time);

    let mut block = 0;
    for (level, mult) in size.channel_mult.iter().enumerate().rev() {
        for place in 0..=size.res_blocks {
            let at = format!("{AT}.output_blocks.{block}");
            let skip = skips.pop().unwrap_or(base);
            unet_resnet(list, &format!("{at}.0"), width + skip, mult * base, time);
            width = mult * base;
            let mut part = 1;
            if size.attention_at.contains(&downscale) {
                transformer(
                    list,
                    &format!("{at}.{part}"),
                    width,
                    context,
                    size.transformer_depth[level],
                );
                part += 1;
            }
            if level > 0 && place == size.res_blocks {
                list.conv(&format!("{at}.{part}.conv"), width, width, 3);
                downscale /= 2;
            }
            block += 1;
        }
    }
    list.norm(&format!("{AT}.out.0"), width);
    list.conv(&format!("{AT}.out.2"), width, 4, 3);
}

fn unet_resnet(list: &mut List, at: &str, from: u64, to: u64, time: u64) {
    list.norm(&format!("{at}.in_layers.0"), from);
    list.conv(&format!("{at}.in_layers.2"), from, to, 3);
    list.linear(&format!("{at}.emb_layers.1"), time, to);
    list.norm(&format!("{at}.out_layers.0"), to);
    list.conv(&format!("{at}.out_layers.3"), to, to, 3);
    if from != to {
        list.conv(&format!("{at}.skip_connection"), from, to, 1);
    }
}

fn transformer(list: &mut List, at: &str, width: u64, context: u64, depth: u64) {
    list.norm(&format!("{at}.norm"), width);
    list.linear(&format!("{at}.proj_in"), width, width);
    for block in 0..depth {
        let at = format!("{at}.transformer_blocks.{block}");
        let attention = |list: &mut List, name: &str, from: u64| {
            list.weight(&format!("{at}.{name}.to_q.weight"), &[width, width]);
            list.weight(&format!("{at}.{name}.to_k.weight"), &[width, from]);
            list.weight(&format!("{at}.{name}.to_v.weight"), &[width, from]);
            list.linear(&format!("{at}.{name}.to_out.0"), width, width);
        };
        attention(list, "attn1", width);
        list.linear(&format!("{at}.ff.net.0.proj"), width, 8 * width);
        list.linear(&format!("{at}.ff.net.2"), 4 * width, width);
        attention(list, "attn2", context);
        for norm in ["norm1", "norm2", "norm3"] {
            list.norm(&format!("{at}.{norm}"), width);
        }
    }
    list.linear(&format!("{at}.proj_out"), width, width);
}

fn image_tower(list: &mut List, size: &ImageTower) {
    const AT: &str = "conditioner.embedders.0.model";
    let (width, patches) = (size.width, (size.image / size.patch).pow(2));
    list.uniform(
        &format!("{AT}.positional_embedding"),
        &[size.text_context, size.text_width],
        0.0,
        0.02,
    );
    list.weight(
        &format!("{AT}.text_projection"),
        &[size.text_width, size.embedding],
    );
    // Initial value of the original: the logarithm of 1 / 0.07.
    list.scalar(&format!("{AT}.logit_scale"), 2.659_26);
    list.uniform(&format!("{AT}.visual.class_embedding"), &[width], 0.0, 0.5);
    list.uniform(
        &format!("{AT}.visual.positional_embedding"),
        &[patches + 1, width],
        0.0,
        0.5,
    );
    list.weight(&format!("{AT}.visual.proj"), &[width, size.embedding]);
    list.weight(
        &format!("{AT}.visual.conv1.weight"),
        &[width, 3, size.patch, size.patch],
    );
    list.norm(&format!("{AT}.visual.ln_pre"), width);
    for layer in 0..size.layers {
        let at = format!("{AT}.visual.transformer.resblocks.{layer}");
        list.norm(&format!("{at}.ln_1"), width);
        list.weight(&format!("{at}.attn.in_proj_weight"), &[3 * width, width]);
        list.bias(&format!("{at}.attn.in_proj_bias"), 3 * width);
        list.linear(&format!("{at}.attn.out_proj"), width, width);
        list.norm(&format!("{at}.ln_2"), width);
        list.linear(&format!("{at}.mlp.c_fc"), width, size.mlp);
        list.linear(&format!("{at}.mlp.c_proj"), size.mlp, width);
    }
    list.norm(&format!("{AT}.visual.ln_post"), width);
    list.uniform(
        &format!("{AT}.token_embedding.weight"),
        &[size.text_vocabulary, size.text_width],
        0.0,
        0.04,
    );
    list.norm(&format!("{AT}.ln_final"), size.text_width);
}

pub(super) fn vae(list: &mut List, size: &Vae) {
    const AT: &str = "first_stage_model";
    let widths: Vec<u64> = size
        .channel_mult
        .iter()
        .map(|mult| mult * size.channels)
        .collect();
    let last = widths.len() - 1;
    list.conv(&format!("{AT}.encoder.conv_in"), 3, size.channels, 3);
    let mut width = size.channels;
    for (level, next) in widths.iter().enumerate() {
        let at = format!("{AT}.encoder.down.{level}");
        for block in 0..size.res_blocks {
            resnet(
                list,
                &format!("{at}.block.{block}"),
                width,
                *next,
                "nin_shortcut",
            );
            width = *next;
        }
        if level != last {
            list.conv(&format!("{at}.downsample.conv"), width, width, 3);
        }
    }
    vae_middle(list, &format!("{AT}.encoder.mid"), width);
    list.norm(&format!("{AT}.encoder.norm_out"), width);
    list.conv(&format!("{AT}.encoder.conv_out"), width, 8, 3);

    list.conv(&format!("{AT}.decoder.conv_in"), 4, width, 3);
    vae_middle(list, &format!("{AT}.decoder.mid"), width);
    // `up.0` is the highest resolution and stands first, though it runs last.
    for (level, to) in widths.iter().enumerate() {
        let at = format!("{AT}.decoder.up.{level}");
        let mut from = widths[(level + 1).min(last)];
        for block in 0..=size.res_blocks {
            resnet(
                list,
                &format!("{at}.block.{block}"),
                from,
                *to,
                "nin_shortcut",
            );
            from = *to;
        }
        if level != 0 {
            list.conv(&format!("{at}.upsample.conv"), *to, *to, 3);
        }
    }
    list.norm(&format!("{AT}.decoder.norm_out"), widths[0]);
    list.conv(&format!("{AT}.decoder.conv_out"), widths[0], 3, 3);
    list.conv(&format!("{AT}.quant_conv"), 8, 8, 1);
    list.conv(&format!("{AT}.post_quant_conv"), 4, 4, 1);
}

fn vae_middle(list: &mut List, at: &str, width: u64) {
    resnet(list, &format!("{at}.block_1"), width, width, "nin_shortcut");
    list.norm(&format!("{at}.attn_1.norm"), width);
    for name in ["q", "k", "v", "proj_out"] {
        list.conv(&format!("{at}.attn_1.{name}"), width, width, 1);
    }
    resnet(list, &format!("{at}.block_2"), width, width, "nin_shortcut");
}

/// The tensors of one file as they are registered.
pub(super) struct List {
    types: Types,
    pub(super) tensors: Vec<Tensor>,
}

impl List {
    pub(super) fn new(types: Types) -> Self {
        Self {
            types,
            tensors: Vec::new(),
        }
    }

    fn add(&mut self, name: &str, shape: &[u64], fill: Fill) -> usize {
        let dtype = match self.types {
            Types::Half => DType::F16,
            Types::Single => DType::F32,
            Types::Mixed if shape.len() > 1 => DType::F16,
            Types::Mixed => DType::F32,
        };
        self.add_as(name, dtype, shape, fill)
    }

    /// A tensor of a type of its own.
    pub(super) fn add_as(&mut self, name: &str, dtype: DType, shape: &[u64], fill: Fill) -> usize {
        self.tensors.push(Tensor {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            fill,
        });
        self.tensors.len() - 1
    }

    /// A matrix or convolution that keeps the variance of its input.
    pub(super) fn weight(&mut self, name: &str, shape: &[u64]) {
        let fan_in: u64 = shape[1..].iter().product();
        self.uniform(name, shape, 0.0, (3.0 / short(fan_in)).sqrt());
    }

    pub(super) fn linear(&mut self, at: &str, from: u64, to: u64) {
        self.weight(&format!("{at}.weight"), &[to, from]);
        self.bias(&format!("{at}.bias"), to);
    }

    fn conv(&mut self, at: &str, from: u64, to: u64, kernel: u64) {
        self.weight(&format!("{at}.weight"), &[to, from, kernel, kernel]);
        self.bias(&format!("{at}.bias"), to);
    }

    pub(super) fn norm(&mut self, at: &str, width: u64) {
        self.gain(&format!("{at}.weight"), width);
        self.bias(&format!("{at}.bias"), width);
    }

    fn gain(&mut self, name: &str, width: u64) {
        self.uniform(name, &[width], 1.0, 0.1);
    }

    pub(super) fn bias(&mut self, name: &str, width: u64) {
        self.uniform(name, &[width], 0.0, 0.05);
    }

    pub(super) fn uniform(&mut self, name: &str, shape: &[u64], centre: f32, reach: f32) {
        self.add(name, shape, Fill::Uniform { centre, reach });
    }

    pub(super) fn scalar(&mut self, name: &str, value: f32) {
        self.add(name, &[], Fill::Table(vec![value]));
    }

    fn table(&mut self, name: &str, values: Vec<f32>) -> usize {
        let len = values.len() as u64;
        self.add(name, &[len], Fill::Table(values))
    }

    fn same_as(&mut self, name: &str, other: usize) {
        let shape = self.tensors[other].shape.clone();
        self.add(name, &shape, Fill::SameAs(other));
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a fan-in; seven digits are plenty"
)]
fn short(count: u64) -> f32 {
    count as f32
}

#[cfg(test)]
mod tests {
    use super::super::size::Size;
    use super::*;

    fn assert_listed(tensors: &[Tensor], expected: &str) {
        let found: Vec<String> = tensors
            .iter()
            .map(|tensor| {
                let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
                let shape = if shape.is_empty() {
                    "scalar".to_owned()
                } else {
                    shape.join("x")
                };
                format!("{} {:?} {shape}", tensor.name, tensor.dtype)
            })
            .collect();
        for (place, (found, expected)) in found.iter().zip(expected.lines()).enumerate() {
            assert_eq!(found, expected, "at place {place}");
        }
        assert_eq!(found.len(), expected.lines().count());
    }

    #[test]
    fn tiny_mindeye_is_listed_as_the_reference_file() {
        let size = Size::tiny(vec![301, 257]);
        assert_listed(
            &mindeye(&size.mindeye),
            include_str!("../../tests/data/last.txt"),
        );
    }

    #[test]
    fn tiny_unclip_is_listed_as_the_reference_file() {
        let size = Size::tiny(vec![1]);
        let tensors = unclip(&size.unclip, Types::Mixed);
        assert_listed(&tensors, include_str!("../../tests/data/unclip6_tiny.txt"));
    }

    #[test]
    fn tiny_autoencoder_is_listed_as_the_reference_file() {
        let size = Size::tiny(vec![1]);
        assert_listed(
            &autoencoder(&size.autoencoder),
            include_str!("../../tests/data/sd_image_var_autoenc.txt"),
        );
    }

    #[test]
    fn full_size_has_the_published_parameter_counts() {
        let size = Size::full(vec![15_724]);
        let count = |tensors: &[Tensor], prefix: &str| -> u64 {
            tensors
                .iter()
                .filter(|tensor| tensor.name.starts_with(prefix))
                .map(Tensor::len)
                .sum()
        };
        let unclip = unclip(&size.unclip, Types::Mixed);
        // SDXL's UNet, less what the narrower context (keys and values of 10 blocks of 640 and 60 of 1280) and the
        // narrower vector leave out.
        let sdxl = 2_567_463_684;
        let narrower = 2 * (2048 - 1664) * (10 * 640 + 60 * 1280) + (2816 - 1024) * 1280;
        assert_eq!(count(&unclip, "model.diffusion_model."), sdxl - narrower);
        // The SDXL autoencoder, and SD 1's of the same build.
        assert_eq!(count(&unclip, "first_stage_model."), 83_653_863);
        assert_eq!(count(&autoencoder(&size.autoencoder), ""), 83_653_863);

        let mindeye = mindeye(&size.mindeye);
        let largest = mindeye.iter().max_by_key(|tensor| tensor.len()).unwrap();
        assert_eq!(largest.name, "backbone.backbone_linear.weight");
        assert_eq!(largest.len_bytes(), 425_984 * 4096 * 4);
    }

    #[test]
    fn shared_storage_is_named_and_not_repeated() {
        let tensors = mindeye(&Size::tiny(vec![10]).mindeye);
        let shared: Vec<&Tensor> = tensors
            .iter()
            .filter(|tensor| matches!(tensor.fill, Fill::SameAs(_)))
            .collect();
        assert_eq!(shared.len(), 1);
        assert!(shared[0].name.ends_with("layers.1.0.rotary_emb.freqs"));
    }
}
