//! Tensors of the refiner's engine and of the captioner: SDXL base, the bridge to GIT, GIT itself.

use super::layout::{DType, Fill, List, Tensor, Types, unet, vae};
use super::schedule;
use super::size::{
    Captioner, ClipL, DIFFUSION_STEPS, LINEAR_END, LINEAR_START, OpenClip, Sdxl, VisionTower,
};

/// `sd_xl_base_1.0.safetensors`: UNet, autoencoder and both text towers, all in half precision.
pub(crate) fn sdxl(size: &Sdxl) -> Vec<Tensor> {
    let mut list = List::new(Types::Half);
    unet(
        &mut list,
        &size.unet,
        size.clip_l.width + size.open_clip.width,
    );
    clip_l(&mut list, &size.clip_l);
    open_clip(&mut list, &size.open_clip);
    vae(&mut list, &size.vae);
    list.add_as(
        "denoiser.sigmas",
        DType::F32,
        &[u64::from(DIFFUSION_STEPS)],
        Fill::Table(schedule::denoiser_sigmas(
            DIFFUSION_STEPS,
            LINEAR_START,
            LINEAR_END,
        )),
    );
    list.tensors
}

fn clip_l(list: &mut List, size: &ClipL) {
    const AT: &str = "conditioner.embedders.0.transformer.text_model";
    embedding(
        list,
        &format!("{AT}.embeddings.position_embedding.weight"),
        size.context,
        size.width,
    );
    list.add_as(
        &format!("{AT}.embeddings.position_ids"),
        DType::I64,
        &[1, size.context],
        Fill::Counting,
    );
    embedding(
        list,
        &format!("{AT}.embeddings.token_embedding.weight"),
        size.vocabulary,
        size.width,
    );
    for layer in 0..size.layers {
        clip_layer(
            list,
            &format!("{AT}.encoder.layers.{layer}"),
            size.width,
            size.mlp,
        );
    }
    list.norm(&format!("{AT}.final_layer_norm"), size.width);
}

/// A layer as transformers' CLIP names it.
fn clip_layer(list: &mut List, at: &str, width: u64, mlp: u64) {
    list.norm(&format!("{at}.layer_norm1"), width);
    list.norm(&format!("{at}.layer_norm2"), width);
    list.linear(&format!("{at}.mlp.fc1"), width, mlp);
    list.linear(&format!("{at}.mlp.fc2"), mlp, width);
    for name in ["k_proj", "out_proj", "q_proj", "v_proj"] {
        list.linear(&format!("{at}.self_attn.{name}"), width, width);
    }
}

fn open_clip(list: &mut List, size: &OpenClip) {
    const AT: &str = "conditioner.embedders.1.model";
    list.norm(&format!("{AT}.ln_final"), size.width);
    // Initial value of the original: the logarithm of 1 / 0.07.
    list.scalar(&format!("{AT}.logit_scale"), 2.659_26);
    embedding(
        list,
        &format!("{AT}.positional_embedding"),
        size.context,
        size.width,
    );
    list.weight(
        &format!("{AT}.text_projection"),
        &[size.width, size.embedding],
    );
    embedding(
        list,
        &format!("{AT}.token_embedding.weight"),
        size.vocabulary,
        size.width,
    );
    for layer in 0..size.layers {
        let (at, width) = (format!("{AT}.transformer.resblocks.{layer}"), size.width);
        list.weight(&format!("{at}.attn.in_proj_weight"), &[3 * width, width]);
        list.bias(&format!("{at}.attn.in_proj_bias"), 3 * width);
        list.linear(&format!("{at}.attn.out_proj"), width, width);
        list.norm(&format!("{at}.ln_1"), width);
        list.norm(&format!("{at}.ln_2"), width);
        list.linear(&format!("{at}.mlp.c_fc"), width, 4 * width);
        list.linear(&format!("{at}.mlp.c_proj"), 4 * width, width);
    }
}

/// `bigG_to_L_epoch8.pth`: one token more, then the captioner's width.
pub(crate) fn bridge(tokens: u64, from: u64, to: u64) -> Vec<Tensor> {
    let mut list = List::new(Types::Single);
    list.linear("linear1", tokens, tokens + 1);
    list.linear("linear2", from, to);
    list.tensors
}

/// `git/model.safetensors`.
pub(crate) fn captioner(size: &Captioner) -> Vec<Tensor> {
    let (mut list, width) = (List::new(Types::Single), size.width);
    list.norm("git.embeddings.LayerNorm", width);
    embedding(
        &mut list,
        "git.embeddings.position_embeddings.weight",
        size.positions,
        width,
    );
    list.add_as(
        "git.embeddings.position_ids",
        DType::I64,
        &[1, size.positions],
        Fill::Counting,
    );
    embedding(
        &mut list,
        "git.embeddings.word_embeddings.weight",
        size.vocabulary,
        width,
    );
    for layer in 0..size.layers {
        let at = format!("git.encoder.layer.{layer}");
        list.norm(&format!("{at}.attention.output.LayerNorm"), width);
        list.linear(&format!("{at}.attention.output.dense"), width, width);
        for name in ["key", "query", "value"] {
            list.linear(&format!("{at}.attention.self.{name}"), width, width);
        }
        list.linear(&format!("{at}.intermediate.dense"), width, size.mlp);
        list.norm(&format!("{at}.output.LayerNorm"), width);
        list.linear(&format!("{at}.output.dense"), size.mlp, width);
    }
    vision(&mut list, &size.vision);
    let at = "git.visual_projection.visual_projection";
    list.linear(&format!("{at}.0"), size.vision.width, width);
    list.norm(&format!("{at}.1"), width);
    list.linear("output", width, size.vocabulary);
    list.tensors
}

fn vision(list: &mut List, size: &VisionTower) {
    const AT: &str = "git.image_encoder.vision_model";
    let (width, tokens) = (size.width, size.tokens());
    list.uniform(
        &format!("{AT}.embeddings.class_embedding"),
        &[width],
        0.0,
        0.5,
    );
    list.weight(
        &format!("{AT}.embeddings.patch_embedding.weight"),
        &[width, 3, size.patch, size.patch],
    );
    embedding(
        list,
        &format!("{AT}.embeddings.position_embedding.weight"),
        tokens,
        width,
    );
    list.add_as(
        &format!("{AT}.embeddings.position_ids"),
        DType::I64,
        &[1, tokens],
        Fill::Counting,
    );
    for layer in 0..size.layers {
        clip_layer(
            list,
            &format!("{AT}.encoder.layers.{layer}"),
            width,
            size.mlp,
        );
    }
    list.norm(&format!("{AT}.post_layernorm"), width);
    // Spelt so in the original.
    list.norm(&format!("{AT}.pre_layrnorm"), width);
}

fn embedding(list: &mut List, name: &str, rows: u64, width: u64) {
    list.uniform(name, &[rows, width], 0.0, 0.04);
}

#[cfg(test)]
mod tests {
    use super::super::size::Size;
    use super::*;

    /// Names, types and shapes, in the order of names as a safetensors file is listed.
    fn assert_listed(tensors: &[Tensor], expected: &str) {
        let mut found: Vec<String> = tensors
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
        found.sort();
        let expected: Vec<&str> = expected.lines().collect();
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found, expected);
        }
        assert_eq!(found.len(), expected.len());
    }

    #[test]
    fn tiny_refinement_is_listed_as_the_reference_files() {
        let size = Size::tiny(vec![1]);
        assert_listed(
            &sdxl(&size.sdxl),
            include_str!("../../tests/data/sd_xl_base_tiny.txt"),
        );
        assert_listed(
            &captioner(&size.captioner),
            include_str!("../../tests/data/git.txt"),
        );
        assert_listed(
            &bridge(
                size.mindeye.tokens,
                size.mindeye.dim,
                size.captioner.vision.width,
            ),
            include_str!("../../tests/data/bigG_to_L.txt"),
        );
    }

    #[test]
    fn full_refinement_has_the_published_parameter_counts() {
        let size = Size::full(vec![15_724]);
        let count = |tensors: &[Tensor], prefix: &str| -> u64 {
            tensors
                .iter()
                .filter(|tensor| tensor.name.starts_with(prefix) && tensor.dtype != DType::I64)
                .map(Tensor::len)
                .sum()
        };
        let sdxl = sdxl(&size.sdxl);
        assert_eq!(count(&sdxl, "model.diffusion_model."), 2_567_463_684);
        assert_eq!(count(&sdxl, "first_stage_model."), 83_653_863);
        assert_eq!(count(&sdxl, "conditioner.embedders.0."), 123_060_480);
        // CLIPTextModelWithProjection of SDXL's second text tower, and the temperature.
        assert_eq!(count(&sdxl, "conditioner.embedders.1."), 694_659_840 + 1);
    }
}
