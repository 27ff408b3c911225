//! The hyper-parameters of a set of checkpoints: the released models', and a tiny one of the same build.

use serde_json::{Value, json};

/// Width of one attention head of the diffusion prior; weights cannot tell it.
pub(crate) const PRIOR_HEAD: u64 = 52;
/// Steps of the diffusion prior's noise schedule.
pub(crate) const PRIOR_STEPS: u32 = 100;
/// Steps of the latent diffusion's noise schedule.
pub(crate) const DIFFUSION_STEPS: u32 = 1000;
/// First beta of the latent diffusion's schedule.
pub(crate) const LINEAR_START: f64 = 0.000_85;
/// Last beta of the latent diffusion's schedule.
pub(crate) const LINEAR_END: f64 = 0.012;

/// Everything that decides names and shapes.
#[derive(Clone, Debug)]
pub(crate) struct Size {
    pub(crate) mindeye: MindEye,
    pub(crate) autoencoder: Autoencoder,
    pub(crate) unclip: Unclip,
    pub(crate) sdxl: Sdxl,
    pub(crate) captioner: Captioner,
}

/// `last.pth`: ridge, backbone, prior.
#[derive(Clone, Debug)]
pub(crate) struct MindEye {
    /// One entry per subject.
    pub(crate) voxels: Vec<u64>,
    pub(crate) hidden: u64,
    pub(crate) blocks: u64,
    pub(crate) sequence: u64,
    pub(crate) tokens: u64,
    pub(crate) dim: u64,
    pub(crate) blurry: bool,
    pub(crate) prior_depth: u64,
}

/// `sd_image_var_autoenc.pth`: the autoencoder of the blurry picture.
#[derive(Clone, Debug)]
pub(crate) struct Autoencoder {
    pub(crate) channels: Vec<u64>,
    pub(crate) layers: u64,
}

/// `unclip6*.ckpt`: UNet, image tower, VAE.
#[derive(Clone, Debug)]
pub(crate) struct Unclip {
    pub(crate) latent_height: u64,
    pub(crate) latent_width: u64,
    pub(crate) unet: Unet,
    pub(crate) vae: Vae,
    pub(crate) image_tower: ImageTower,
}

/// The UNet.
#[derive(Clone, Debug)]
pub(crate) struct Unet {
    pub(crate) channels: u64,
    pub(crate) channel_mult: Vec<u64>,
    pub(crate) res_blocks: u64,
    pub(crate) attention_at: Vec<u64>,
    pub(crate) transformer_depth: Vec<u64>,
    pub(crate) head_channels: u64,
    pub(crate) vector: u64,
}

/// The VAE.
#[derive(Clone, Debug)]
pub(crate) struct Vae {
    pub(crate) channels: u64,
    pub(crate) channel_mult: Vec<u64>,
    pub(crate) res_blocks: u64,
}

/// OpenCLIP's image tower, and what the checkpoint keeps of its text tower.
#[derive(Clone, Debug)]
pub(crate) struct ImageTower {
    pub(crate) embedding: u64,
    pub(crate) image: u64,
    pub(crate) patch: u64,
    pub(crate) layers: u64,
    pub(crate) width: u64,
    pub(crate) head: u64,
    pub(crate) mlp: u64,
    pub(crate) text_context: u64,
    pub(crate) text_vocabulary: u64,
    pub(crate) text_width: u64,
}

/// `sd_xl_base*.safetensors`: the refiner's engine.
#[derive(Clone, Debug)]
pub(crate) struct Sdxl {
    pub(crate) latent: u64,
    pub(crate) unet: Unet,
    pub(crate) vae: Vae,
    pub(crate) clip_l: ClipL,
    pub(crate) open_clip: OpenClip,
}

/// CLIP-L's text tower.
#[derive(Clone, Debug)]
pub(crate) struct ClipL {
    pub(crate) vocabulary: u64,
    pub(crate) context: u64,
    pub(crate) width: u64,
    pub(crate) mlp: u64,
    pub(crate) layers: u64,
    pub(crate) heads: u64,
}

/// OpenCLIP's text tower.
#[derive(Clone, Debug)]
pub(crate) struct OpenClip {
    pub(crate) vocabulary: u64,
    pub(crate) context: u64,
    pub(crate) width: u64,
    pub(crate) embedding: u64,
    pub(crate) layers: u64,
    pub(crate) heads: u64,
}

/// `git/`: the captioner.
#[derive(Clone, Debug)]
pub(crate) struct Captioner {
    pub(crate) vocabulary: u64,
    pub(crate) positions: u64,
    pub(crate) width: u64,
    pub(crate) mlp: u64,
    pub(crate) layers: u64,
    pub(crate) heads: u64,
    pub(crate) vision: VisionTower,
}

/// The captioner's own image tower.
#[derive(Clone, Debug)]
pub(crate) struct VisionTower {
    pub(crate) image: u64,
    pub(crate) patch: u64,
    pub(crate) width: u64,
    pub(crate) mlp: u64,
    pub(crate) layers: u64,
    pub(crate) heads: u64,
}

impl VisionTower {
    /// Patches and the class token.
    pub(crate) fn tokens(&self) -> u64 {
        (self.image / self.patch).pow(2) + 1
    }
}

impl Sdxl {
    fn tiny() -> Self {
        Self {
            latent: 16,
            unet: Unet {
                channels: 32,
                channel_mult: vec![1, 1, 1],
                res_blocks: 2,
                attention_at: vec![4, 2],
                transformer_depth: vec![1, 1, 2],
                head_channels: 16,
                vector: 20 + 6 * 256,
            },
            vae: Vae {
                channels: 32,
                channel_mult: vec![1, 1, 2, 1],
                res_blocks: 1,
            },
            clip_l: ClipL {
                vocabulary: 49_408,
                context: 77,
                width: 6,
                mlp: 24,
                layers: 12,
                heads: 2,
            },
            open_clip: OpenClip {
                vocabulary: 49_408,
                context: 77,
                width: 8,
                embedding: 20,
                layers: 4,
                heads: 2,
            },
        }
    }

    fn full() -> Self {
        Self {
            latent: 96,
            unet: Unet {
                channels: 320,
                channel_mult: vec![1, 2, 4],
                res_blocks: 2,
                attention_at: vec![4, 2],
                transformer_depth: vec![1, 2, 10],
                head_channels: 64,
                vector: 1280 + 6 * 256,
            },
            vae: Vae {
                channels: 128,
                channel_mult: vec![1, 2, 4, 4],
                res_blocks: 2,
            },
            clip_l: ClipL {
                vocabulary: 49_408,
                context: 77,
                width: 768,
                mlp: 3072,
                layers: 12,
                heads: 12,
            },
            open_clip: OpenClip {
                vocabulary: 49_408,
                context: 77,
                width: 1280,
                embedding: 1280,
                layers: 32,
                heads: 20,
            },
        }
    }

    fn config(&self) -> Value {
        json!({
            "latent_hw": [self.latent, self.latent],
            "layer_idx": self.clip_l.layers - 1,
            "unet": { "num_head_channels": self.unet.head_channels },
            "clip_l": { "num_attention_heads": self.clip_l.heads },
            "openclip": { "text": { "heads": self.open_clip.heads } },
        })
    }
}

impl Captioner {
    fn tiny() -> Self {
        Self {
            vocabulary: 912,
            positions: 64,
            width: 32,
            mlp: 48,
            layers: 3,
            heads: 4,
            vision: VisionTower {
                image: 56,
                patch: 14,
                width: 32,
                mlp: 64,
                layers: 1,
                heads: 4,
            },
        }
    }

    fn full() -> Self {
        Self {
            vocabulary: 30_522,
            positions: 1024,
            width: 768,
            mlp: 3072,
            layers: 6,
            heads: 12,
            vision: VisionTower {
                image: 224,
                patch: 14,
                width: 1024,
                mlp: 4096,
                layers: 24,
                heads: 16,
            },
        }
    }

    /// The `config.json` beside the captioner's weights.
    pub(crate) fn config(&self) -> Value {
        let vision = &self.vision;
        json!({
            "architectures": ["GitForCausalLM"],
            "model_type": "git",
            "bos_token_id": 101,
            "eos_token_id": 102,
            "pad_token_id": 0,
            "hidden_act": "gelu",
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": self.positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "vision_config": {
                "model_type": "git_vision_model",
                "hidden_size": vision.width,
                "image_size": vision.image,
                "intermediate_size": vision.mlp,
                "num_attention_heads": vision.heads,
                "num_hidden_layers": vision.layers,
                "patch_size": vision.patch,
            },
        })
    }

    /// A vocabulary of made-up words with BERT's special tokens in their places.
    pub(crate) fn vocabulary_text(&self) -> String {
        (0..self.vocabulary)
            .map(|id| match id {
                0 => "[PAD]\n".to_owned(),
                100 => "[UNK]\n".to_owned(),
                101 => "[CLS]\n".to_owned(),
                102 => "[SEP]\n".to_owned(),
                103 => "[MASK]\n".to_owned(),
                _ => format!("word{id}\n"),
            })
            .collect()
    }
}

impl Size {
    /// A model of a few megabytes with every part of the released one.
    pub(crate) fn tiny(voxels: Vec<u64>) -> Self {
        Self {
            mindeye: MindEye {
                voxels,
                hidden: 64,
                blocks: 4,
                sequence: 1,
                tokens: 16,
                dim: 104,
                blurry: true,
                prior_depth: 2,
            },
            autoencoder: Autoencoder {
                channels: vec![32, 32, 64, 32],
                layers: 1,
            },
            unclip: Unclip {
                latent_height: 16,
                latent_width: 16,
                unet: Unet {
                    channels: 32,
                    channel_mult: vec![1, 2, 1],
                    res_blocks: 2,
                    attention_at: vec![4, 2],
                    transformer_depth: vec![1, 1, 2],
                    head_channels: 16,
                    vector: 1024,
                },
                vae: Vae {
                    channels: 32,
                    channel_mult: vec![1, 2, 1, 1],
                    res_blocks: 1,
                },
                image_tower: ImageTower {
                    embedding: 24,
                    image: 224,
                    patch: 56,
                    layers: 2,
                    width: 104,
                    head: 52,
                    mlp: 512,
                    text_context: 77,
                    text_vocabulary: 64,
                    text_width: 16,
                },
            },
            sdxl: Sdxl::tiny(),
            captioner: Captioner::tiny(),
        }
    }

    /// The released models' sizes.
    pub(crate) fn full(voxels: Vec<u64>) -> Self {
        Self {
            mindeye: MindEye {
                voxels,
                hidden: 4096,
                blocks: 4,
                sequence: 1,
                tokens: 256,
                dim: 1664,
                blurry: true,
                prior_depth: 6,
            },
            autoencoder: Autoencoder {
                channels: vec![128, 256, 512, 512],
                layers: 2,
            },
            unclip: Unclip {
                latent_height: 96,
                latent_width: 96,
                unet: Unet {
                    channels: 320,
                    channel_mult: vec![1, 2, 4],
                    res_blocks: 2,
                    attention_at: vec![4, 2],
                    transformer_depth: vec![1, 2, 10],
                    head_channels: 64,
                    vector: 1024,
                },
                vae: Vae {
                    channels: 128,
                    channel_mult: vec![1, 2, 4, 4],
                    res_blocks: 2,
                },
                image_tower: ImageTower {
                    embedding: 1280,
                    image: 224,
                    patch: 14,
                    layers: 48,
                    width: 1664,
                    head: 104,
                    mlp: 8192,
                    text_context: 77,
                    text_vocabulary: 49_408,
                    text_width: 1280,
                },
            },
            sdxl: Sdxl::full(),
            captioner: Captioner::full(),
        }
    }

    /// The `config.json` beside the checkpoints: what weights cannot tell, and that these weights are random.
    pub(crate) fn config(&self, seed: u64, mixed: bool) -> Value {
        let me = &self.mindeye;
        let unclip = &self.unclip;
        let tower = &unclip.image_tower;
        json!({
            "random_weights": true,
            "seed": seed,
            "me": {
                "voxels": me.voxels,
                "h": me.hidden,
                "n_blocks": me.blocks,
                "seq_len": me.sequence,
                "tokens": me.tokens,
                "dim": me.dim,
                "blurry": me.blurry,
                "prior_depth": me.prior_depth,
            },
            "autoenc": {
                "channels": self.autoencoder.channels,
                "layers": self.autoencoder.layers,
                "fp16": true,
            },
            "unclip": {
                "mixed": mixed,
                "latent_hw": [unclip.latent_height, unclip.latent_width],
                "unet": {
                    "model_channels": unclip.unet.channels,
                    "channel_mult": unclip.unet.channel_mult,
                    "num_res_blocks": unclip.unet.res_blocks,
                    "attention_resolutions": unclip.unet.attention_at,
                    "transformer_depth": unclip.unet.transformer_depth,
                    "num_head_channels": unclip.unet.head_channels,
                    "adm_in_channels": unclip.unet.vector,
                },
                "vae": {
                    "ch": unclip.vae.channels,
                    "ch_mult": unclip.vae.channel_mult,
                    "num_res_blocks": unclip.vae.res_blocks,
                },
                "openclip": {
                    "embed_dim": tower.embedding,
                    "vision": {
                        "image_size": tower.image,
                        "layers": tower.layers,
                        "width": tower.width,
                        "head_width": tower.head,
                        "mlp_ratio": 4.9231,
                        "patch_size": tower.patch,
                    },
                    "text": {
                        "context_length": tower.text_context,
                        "vocab_size": tower.text_vocabulary,
                        "width": tower.text_width,
                    },
                },
            },
            "sdxl": self.sdxl.config(),
            "constants": {
                "prior_timesteps": PRIOR_STEPS,
                "prior_ddim_steps": 20,
                "prior_dim_head": PRIOR_HEAD,
                "prior_eta": 1.0,
                "scale_factor": 0.13025,
                "offset_noise_level": 0.04,
                "cfg_scale": 5.0,
                "unclip_steps": 38,
                "autoenc_latent_scale": 0.18215,
                "discrete_idx": DIFFUSION_STEPS,
                "linear_start": LINEAR_START,
                "linear_end": LINEAR_END,
                "vector_embed_dim": 256,
                "size_values": { "original": 768, "crop": 0, "target": 1024 },
            },
        })
    }
}
