//! SDXL as a folder of diffusers gives the bundle that the single file gives.
//!
//! The folder is made from the single file of the reference set, with names worked out the other
//! way round than the exporter does it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bundle::Precision;
use export::check::{self, CheckOptions};
use export::checkpoint::{Checkpoint, Container, inspect};
use export::export::export;
use export::plan::Plan;
use export::section::chain;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::{bundle_files, golden, recipe, refused};

const FILE: &str = "sd_xl_base_tiny.safetensors";

/// A tensor to be written.
type Raw = (Dtype, Vec<usize>, Vec<u8>);
type Component = BTreeMap<String, Raw>;

/// Block and its entry of a list of blocks of three entries each.
fn three(index: &str) -> (usize, usize) {
    let index: usize = index.parse().unwrap();
    (index / 3, index % 3)
}

fn resnet(rest: &str) -> String {
    let (part, end) = rest.rsplit_once('.').unwrap();
    let name = match part {
        "in_layers.0" => "norm1",
        "in_layers.2" => "conv1",
        "emb_layers.1" => "time_emb_proj",
        "out_layers.0" => "norm2",
        "out_layers.3" => "conv2",
        "skip_connection" => "conv_shortcut",
        other => panic!("{other}"),
    };
    format!("{name}.{end}")
}

/// The UNet's key of an sgm key, for two residual blocks in each block.
fn unet(key: &str) -> String {
    let parts: Vec<&str> = key.splitn(4, '.').collect();
    match parts.as_slice() {
        ["input_blocks", "0", "0", end] => format!("conv_in.{end}"),
        ["input_blocks", index, module, rest] => {
            let index = index.parse::<usize>().unwrap() - 1;
            match (three(&index.to_string()), *module) {
                ((block, 2), "0") => format!(
                    "down_blocks.{block}.downsamplers.0.conv.{}",
                    rest.strip_prefix("op.").unwrap()
                ),
                ((block, at), "0") => format!("down_blocks.{block}.resnets.{at}.{}", resnet(rest)),
                ((block, at), _) => format!("down_blocks.{block}.attentions.{at}.{rest}"),
            }
        }
        ["output_blocks", index, module, rest] => {
            let (block, at) = three(index);
            match (*module, rest.strip_prefix("conv.")) {
                ("0", _) => format!("up_blocks.{block}.resnets.{at}.{}", resnet(rest)),
                (_, Some(end)) => format!("up_blocks.{block}.upsamplers.0.conv.{end}"),
                _ => format!("up_blocks.{block}.attentions.{at}.{rest}"),
            }
        }
        ["middle_block", "1", rest, last] => format!("mid_block.attentions.0.{rest}.{last}"),
        ["middle_block", module, rest, last] => {
            let at = module.parse::<usize>().unwrap() / 2;
            format!(
                "mid_block.resnets.{at}.{}",
                resnet(&format!("{rest}.{last}"))
            )
        }
        ["out", "0", end] => format!("conv_norm_out.{end}"),
        ["out", _, end] => format!("conv_out.{end}"),
        ["time_embed", at, end] => {
            format!(
                "time_embedding.linear_{}.{end}",
                if *at == "0" { 1 } else { 2 }
            )
        }
        ["label_emb", "0", at, end] => {
            format!(
                "add_embedding.linear_{}.{end}",
                if *at == "0" { 1 } else { 2 }
            )
        }
        _ => panic!("{key}"),
    }
}

/// The autoencoder's key of an sgm key, for four blocks.
fn vae(key: &str) -> String {
    let parts: Vec<&str> = key.split('.').collect();
    match parts.as_slice() {
        [side @ ("encoder" | "decoder"), "norm_out", end] => format!("{side}.conv_norm_out.{end}"),
        [side, "mid", "attn_1", name, end] => {
            let name = match *name {
                "norm" => "group_norm",
                "q" => "to_q",
                "k" => "to_k",
                "v" => "to_v",
                _ => "to_out.0",
            };
            format!("{side}.mid_block.attentions.0.{name}.{end}")
        }
        [side, "mid", block, name, end] => {
            let at = usize::from(*block == "block_2");
            format!("{side}.mid_block.resnets.{at}.{name}.{end}")
        }
        [side, way @ ("up" | "down"), index, rest @ ..] => {
            let index: usize = index.parse().unwrap();
            let block = if *way == "up" { 3 - index } else { index };
            let rest = match rest {
                ["block", at, "nin_shortcut", end] => format!("resnets.{at}.conv_shortcut.{end}"),
                ["block", at, name, end] => format!("resnets.{at}.{name}.{end}"),
                [size, "conv", end] => format!("{size}rs.0.conv.{end}"),
                other => panic!("{other:?}"),
            };
            format!("{side}.{way}_blocks.{block}.{rest}")
        }
        _ => key.to_owned(),
    }
}

/// Adds a tensor of OpenCLIP's tower under the names of transformers.
fn open_clip(tower: &mut Component, key: &str, (dtype, shape, bytes): Raw) {
    let layer = |rest: &str| {
        let (at, rest) = rest.split_once('.').unwrap();
        let rest = rest
            .replace("ln_1", "layer_norm1")
            .replace("ln_2", "layer_norm2")
            .replace("attn.out_proj", "self_attn.out_proj")
            .replace("mlp.c_fc", "mlp.fc1")
            .replace("mlp.c_proj", "mlp.fc2");
        format!("text_model.encoder.layers.{at}.{rest}")
    };
    match key {
        "logit_scale" => {}
        "positional_embedding" => {
            let name = "text_model.embeddings.position_embedding.weight";
            tower.insert(name.into(), (dtype, shape, bytes));
        }
        "text_projection" => {
            let (rows, columns) = (shape[0], shape[1]);
            let turned = (0..columns)
                .flat_map(|column| (0..rows).map(move |row| row * columns + column))
                .flat_map(|at| bytes[2 * at..2 * at + 2].to_vec())
                .collect();
            let raw = (dtype, vec![columns, rows], turned);
            tower.insert("text_projection.weight".into(), raw);
        }
        _ if key.contains("attn.in_proj_") => {
            let rest = key.strip_prefix("transformer.resblocks.").unwrap();
            let third = bytes.len() / 3;
            for (name, part) in ["q_proj", "k_proj", "v_proj"]
                .iter()
                .zip(bytes.chunks(third))
            {
                let mut shape = shape.clone();
                shape[0] /= 3;
                let key = layer(&rest.replace("attn.in_proj_", &format!("self_attn.{name}.")));
                tower.insert(key, (dtype, shape, part.to_vec()));
            }
        }
        _ => {
            let name = match key.strip_prefix("transformer.resblocks.") {
                Some(rest) => layer(rest),
                None if key.starts_with("ln_final.") => {
                    key.replace("ln_final", "text_model.final_layer_norm")
                }
                None => format!("text_model.embeddings.{key}"),
            };
            tower.insert(name, (dtype, shape, bytes));
        }
    }
}

fn components(golden: &Path) -> BTreeMap<&'static str, Component> {
    let bytes = fs::read(golden.join(FILE)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut found: BTreeMap<&'static str, Component> = BTreeMap::new();
    for (key, view) in file.tensors() {
        let mut raw = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        if let Some(rest) = key.strip_prefix("model.diffusion_model.") {
            found.entry("unet").or_default().insert(unet(rest), raw);
        } else if let Some(rest) = key.strip_prefix("first_stage_model.") {
            let name = vae(rest);
            // 1 x 1 convolutions there, matrices here.
            if name.contains(".to_") && name.ends_with(".weight") {
                raw.1.truncate(2);
            }
            found.entry("vae").or_default().insert(name, raw);
        } else if let Some(rest) = key.strip_prefix("conditioner.embedders.0.transformer.") {
            found
                .entry("text_encoder")
                .or_default()
                .insert(rest.into(), raw);
        } else if let Some(rest) = key.strip_prefix("conditioner.embedders.1.model.") {
            open_clip(found.entry("text_encoder_2").or_default(), rest, raw);
        }
    }
    found
}

fn save(path: &Path, tensors: &Component) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

const CONFIGS: [(&str, &str); 5] = [
    (
        "model_index.json",
        r#"{"_class_name": "StableDiffusionXLPipeline"}"#,
    ),
    (
        "unet/config.json",
        r#"{"_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_num_groups": 32, "addition_embed_type": "text_time",
            "flip_sin_to_cos": true, "freq_shift": 0, "layers_per_block": 2, "block_out_channels": [32, 32, 32], "attention_head_dim": [2, 2, 2]}"#,
    ),
    (
        "vae/config.json",
        r#"{"_class_name": "AutoencoderKL", "act_fn": "silu", "norm_num_groups": 32, "block_out_channels": [32, 32, 64, 32]}"#,
    ),
    (
        "text_encoder/config.json",
        r#"{"hidden_act": "quick_gelu", "num_attention_heads": 2, "num_hidden_layers": 12, "layer_norm_eps": 1e-05}"#,
    ),
    (
        "text_encoder_2/config.json",
        r#"{"hidden_act": "gelu", "num_attention_heads": 2, "num_hidden_layers": 4, "layer_norm_eps": 1e-05}"#,
    ),
];

/// Writes the folder; the UNet in two shards, the rest under the names that releases use.
fn folder(dir: &Path, components: &BTreeMap<&str, Component>) {
    for (name, tensors) in components {
        fs::create_dir_all(dir.join(name)).unwrap();
        let file = match *name {
            "vae" => "diffusion_pytorch_model.fp16.safetensors",
            "text_encoder" => "model.safetensors",
            "text_encoder_2" => "model.fp16.safetensors",
            _ => {
                let mut map = serde_json::Map::new();
                for shard in [0, 1] {
                    let file = format!(
                        "diffusion_pytorch_model-0000{}-of-00002.safetensors",
                        shard + 1
                    );
                    let half: Component = tensors
                        .iter()
                        .enumerate()
                        .filter(|(at, _)| at % 2 == shard)
                        .map(|(_, (key, raw))| (key.clone(), raw.clone()))
                        .collect();
                    map.extend(half.keys().map(|key| (key.clone(), file.clone().into())));
                    save(&dir.join(name).join(file), &half);
                }
                let index = serde_json::json!({ "weight_map": map }).to_string();
                let path = dir
                    .join(name)
                    .join("diffusion_pytorch_model.safetensors.index.json");
                fs::write(path, index).unwrap();
                continue;
            }
        };
        save(&dir.join(name).join(file), tensors);
    }
    for (path, text) in CONFIGS {
        fs::write(dir.join(path), text).unwrap();
    }
}

#[test]
fn a_diffusers_folder_gives_the_bundle_of_the_single_file() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let sdxl = dir.path().join("stable-diffusion-xl");
    folder(&sdxl, &components(&golden));
    let shown = inspect::render(&Checkpoint::open(&sdxl).unwrap());
    assert!(shown.starts_with("diffusers container\n"), "{shown}");
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    let text = format!(
        "precision = \"fp32\"\n[sources]\nsdxl = {:?}\n[settings]\nrefiner_latent_hw = [16, 16]\nrefiner_head_channels = 16\n\
         clip_l_heads = 2\nclip_l_layer = 11\nopen_clip_heads = 2\n",
        golden.join(FILE)
    );
    export(&recipe(dir.path(), &text), &one, &mut |_| {}).unwrap();
    // What the weights do not tell stands in the folder's own settings.
    let text = "precision = \"fp32\"\n[sources]\nsdxl = \"stable-diffusion-xl\"\n[settings]\nrefiner_latent_hw = [16, 16]\n";
    export(&recipe(dir.path(), text), &other, &mut |_| {}).unwrap();
    assert!(
        bundle_files(&one) == bundle_files(&other),
        "the two bundles differ"
    );
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(other.join("manifest.json")).unwrap()).unwrap();
    let sources: Vec<&str> = manifest["sources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|source| source["file"].as_str().unwrap())
        .collect();
    assert!(sources.contains(&"stable-diffusion-xl/vae/diffusion_pytorch_model.fp16.safetensors"));
    assert!(sources.contains(&"stable-diffusion-xl/unet/config.json"));
    let options = CheckOptions {
        bundle: other,
        golden,
        json: None,
        onnxruntime: None,
    };
    let mut table = Vec::new();
    let passed = check::run(&options, &mut table).unwrap();
    let table = String::from_utf8(table).unwrap();
    assert!(passed, "{table}");
    for row in ["text", "unet_sdxl", "vae_sdxl"] {
        assert!(table.contains(row), "{row}\n{table}");
    }
}

#[test]
fn a_folder_of_released_files_may_hold_sdxl_as_a_folder() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    folder(&dir.path().join("sd_xl_base_1.0"), &components(&golden));
    let plan = Plan::from_folder(dir.path(), Precision::Fp32, false).unwrap();
    assert_eq!(plan.sdxl, Some(dir.path().join("sd_xl_base_1.0")));
    assert_eq!(plan.settings.refiner_head_channels, 16);
    assert_eq!(plan.settings.clip_l_heads, 2);
    assert_eq!(plan.settings.open_clip_heads, 2);
    std::os::unix::fs::symlink(golden.join(FILE), dir.path().join(FILE)).unwrap();
    let message = Plan::from_folder(dir.path(), Precision::Fp32, false)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("sd_xl_base_1.0, sd_xl_base_tiny.safetensors"),
        "{message}"
    );
}

#[test]
fn the_older_names_of_the_autoencoders_attention_are_known() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut components = components(&golden);
    let vae = components.get_mut("vae").unwrap();
    *vae = std::mem::take(vae)
        .into_iter()
        .map(|(key, raw)| {
            let key = key
                .replace(".to_q.", ".query.")
                .replace(".to_k.", ".key.")
                .replace(".to_v.", ".value.")
                .replace(".to_out.0.", ".proj_attn.");
            (key, raw)
        })
        .collect();
    folder(dir.path(), &components);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.container(), Container::Diffusers);
    let names: Vec<String> = checkpoint
        .root()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(names.contains(&"first_stage_model.decoder.mid.attn_1.proj_out.weight".into()));
    assert!(!names.iter().any(|name| name.starts_with("vae.")));
}

#[test]
fn problems_name_the_folders_own_keys_and_come_all_at_once() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let sdxl = dir.path().join("sdxl");
    let mut parts = components(&golden);
    let unet = parts.get_mut("unet").unwrap();
    unet.remove("down_blocks.1.resnets.1.conv1.bias").unwrap();
    unet.get_mut("mid_block.attentions.0.proj_in.bias")
        .unwrap()
        .1 = vec![4, 8];
    unet.insert(
        "down_blocks.9.extra".into(),
        (Dtype::F16, vec![1], vec![0, 0]),
    );
    let tower = parts.get_mut("text_encoder_2").unwrap();
    let key = "text_model.encoder.layers.1.mlp.fc1.weight";
    tower.get_mut(key).unwrap().2[1] = 0x7c;
    tower.get_mut(key).unwrap().2[0] = 0;
    folder(&sdxl, &parts);
    let text = "precision = \"fp16\"\n[sources]\nsdxl = \"sdxl\"\n[settings]\nrefiner_latent_hw = [16, 16]\n";
    let out = dir.path().join("out");
    let error = export(&recipe(dir.path(), text), &out, &mut |_| {}).unwrap_err();
    let message = chain(&error);
    for expected in [
        "unet: down_blocks.1.resnets.1.conv1.bias (model.diffusion_model.input_blocks.5.0.in_layers.2.bias): expected shape [32], the key is missing",
        "sdxl/unet/diffusion_pytorch_model-0000",
        "unet: mid_block.attentions.0.proj_in.bias (model.diffusion_model.middle_block.1.proj_in.bias): expected shape [32], found [4, 8]",
        "unet: down_blocks.9.extra",
        "sdxl/text_encoder_2/model.fp16.safetensors: text_encoder_2: text_model.encoder.layers.1.mlp.fc1.weight",
        "expected finite values, found inf at flat index 0",
    ] {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
    assert!(!out.exists());
}

#[test]
fn folders_of_other_models_are_refused() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut parts = components(&golden);
    let tower = parts.get_mut("text_encoder_2").unwrap();
    tower
        .remove("text_model.encoder.layers.2.self_attn.k_proj.bias")
        .unwrap();
    tower
        .get_mut("text_model.encoder.layers.0.self_attn.v_proj.bias")
        .unwrap()
        .1 = vec![2, 4];
    folder(dir.path(), &parts);
    fs::remove_dir_all(dir.path().join("text_encoder")).unwrap();
    let config = dir.path().join("unet/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("\"silu\"", "\"gelu\"")
            .replace("text_time", "text"),
    )
    .unwrap();
    fs::write(dir.path().join("vae/config.json"), "{").unwrap();
    fs::write(
        dir.path().join("model_index.json"),
        r#"{"_class_name": "FluxPipeline"}"#,
    )
    .unwrap();
    let message = refused(dir.path());
    for expected in [
        "_class_name: expected StableDiffusionXLPipeline, found \"FluxPipeline\"",
        "unet: config.json: act_fn: expected silu or swish, found gelu",
        "unet: config.json: addition_embed_type: expected text_time, found text",
        "vae/config.json: config.json: expected a JSON object",
        "text_encoder: expected diffusion_pytorch_model.safetensors or model.safetensors",
        "text_encoder_2: text_model.encoder.layers.2.self_attn.k_proj.bias: expected a tensor, the key is missing",
        "text_encoder_2: text_model.encoder.layers.0.self_attn.v_proj.bias: expected shape [8] as q_proj has, found [2, 4]",
    ] {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
}
