//! LoRA files: what is merged, what is refused, what is recorded.
//!
//! The reference set lies beside the repository (`../shared/golden`); a clone without it says so and passes.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use bundle::{Manifest, StageName};
use export::export::export;
use export::onnx::ModelProto;
use export::plan::Plan;
use export::section::chain;
use prost::Message;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn golden() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if path.is_dir() {
        return Some(path.canonicalize().unwrap());
    }
    eprintln!("not compared: the reference set ../shared/golden was not found");
    None
}

const REFINER: &str = "\
[settings]
refiner_latent_hw = [16, 16]
refiner_head_channels = 16
clip_l_heads = 2
open_clip_heads = 2
";
const UNCLIP: &str = "\
[settings]
latent_hw = [16, 16]
num_head_channels = 16
context_tokens = 16
";

/// Exports a recipe; the manifest and what was said, or the message.
fn exported(dir: &Path, recipe: &str, out: &Path) -> Result<(Manifest, Vec<String>), String> {
    let path = dir.join("recipe.toml");
    fs::write(&path, recipe).unwrap();
    let plan = Plan::from_recipe(&path).map_err(|error| chain(&error))?;
    let mut said = Vec::new();
    export(&plan, out, &mut |line| said.push(line.to_owned())).map_err(|error| chain(&error))?;
    let manifest = Manifest::from_json(&fs::read(out.join("manifest.json")).unwrap()).unwrap();
    Ok((manifest, said))
}

fn refiner_recipe(golden: &Path, loras: &[(&Path, &str)]) -> String {
    let engine = golden.join("sd_xl_base_tiny.safetensors");
    let mut text = format!("precision = \"fp32\"\n[sources]\nsdxl = {engine:?}\n{REFINER}");
    for (file, rest) in loras {
        text += &format!("[[loras]]\nfile = {file:?}\ninto = \"refiner\"\n{rest}\n");
    }
    text
}

/// A tensor of a file that a test writes.
#[derive(Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn floats(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor {
        dtype: Dtype::F32,
        shape: shape.into(),
        bytes: values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    }
}

fn read(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: TensorView<'_>| Tensor {
        dtype: view.dtype(),
        shape: view.shape().into(),
        bytes: view.data().into(),
    };
    file.tensors()
        .into_iter()
        .map(|(name, view)| (name, tensor(view)))
        .collect()
}

fn write(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let views: HashMap<&String, TensorView<'_>> = tensors
        .iter()
        .map(|(name, t)| {
            (
                name,
                TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap(),
            )
        })
        .collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The fp32 numbers of the initializer whose name begins with `key`, and its axes.
fn weight(bundle: &Path, stage: StageName, key: &str) -> (Vec<i64>, Vec<f32>) {
    let graph = fs::read(bundle.join(format!("graphs/{stage}.onnx"))).unwrap();
    let graph = ModelProto::decode(graph.as_slice()).unwrap().graph.unwrap();
    let prefix = format!("{key}[");
    let tensor = graph
        .initializer
        .iter()
        .find(|tensor| tensor.name.starts_with(&prefix))
        .unwrap();
    let place = |name: &str| -> usize {
        let entry = tensor.external_data.iter().find(|entry| entry.key == name);
        entry.unwrap().value.parse().unwrap()
    };
    let bytes = fs::read(bundle.join(format!("weights/{stage}.bin"))).unwrap();
    let bytes = &bytes[place("offset")..][..place("length")];
    (tensor.dims.clone(), singles(bytes))
}

fn singles(bytes: &[u8]) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<4>();
    chunks
        .iter()
        .map(|&chunk| f32::from_le_bytes(chunk))
        .collect()
}

#[test]
fn entries_that_fit_no_layer_are_listed_at_once_and_left_out_by_name_alone() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("bundle");
    // An SDXL LoRA beside the unCLIP UNet: its cross-attention reads another context, its second
    // level has another width, and it has no text towers.
    let engine = golden.join("unclip6_tiny.ckpt");
    let lora = golden.join("lora_kohya_sgm.safetensors");
    let recipe = |allowed: &str| {
        format!(
            "precision = \"fp32\"\n[sources]\nunclip = {engine:?}\n{UNCLIP}\
             [[loras]]\nfile = {lora:?}\ninto = \"unclip\"\nallow_unmatched = {allowed}\n"
        )
    };
    let message = exported(dir.path(), &recipe("[]"), &out).unwrap_err();
    for expected in [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight: expected a layer of unclip, found none",
        "lora_te2_text_model_encoder_layers_3_self_attn_v_proj.lora_down.weight",
        "lora_unet_input_blocks_7_1_transformer_blocks_1_attn2_to_k.lora_down.weight: expected 32 x 104 as \
         model.diffusion_model.input_blocks.7.1.transformer_blocks.1.attn2.to_k.weight has it, found 32 x 14",
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight: expected 64 x 64",
    ] {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
    assert!(!out.exists());
    // Naming the towers leaves the shapes.
    let message = exported(dir.path(), &recipe("[\"lora_te1_*\"]"), &out).unwrap_err();
    assert!(
        !message.contains("lora_te1_")
            && message.contains("lora_te2_")
            && message.contains("attn2_to_k")
    );
    let all = "[\"lora_te1_*\", \"lora_te2_*\", \"lora_unet_*\"]";
    let (manifest, said) = exported(dir.path(), &recipe(all), &out).unwrap();
    let [lora] = manifest.loras.as_slice() else {
        panic!("one LoRA is recorded")
    };
    assert_eq!((lora.network, lora.weight), (StageName::Unclip, 1.0));
    assert_eq!(lora.file, "lora_kohya_sgm.safetensors");
    assert!(lora.merged[&StageName::Unclip] > 0, "{:?}", lora.merged);
    for name in [
        "lora_te1_text_model_encoder_layers_6_mlp_fc1",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k",
    ] {
        assert!(lora.left_out.iter().any(|left| left == name), "{name}");
        assert!(said.iter().any(|line| line.contains(name)), "{name}");
    }
    let entries = read(&golden.join("lora_kohya_sgm.safetensors"));
    let count = entries.keys().filter(|key| key.contains("lora_up")).count();
    let merged = usize::try_from(lora.merged[&StageName::Unclip]).unwrap();
    assert_eq!(
        merged + lora.left_out.len(),
        count,
        "nothing is dropped silently"
    );
}

#[test]
fn damaged_files_and_other_kinds_are_refused_with_every_key() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let sample = read(&golden.join("lora_kohya_sgm.safetensors"));
    let block = "lora_unet_input_blocks_4_1_transformer_blocks_0_";
    let mut damaged = sample.clone();
    let key = |name: &str| format!("{block}{name}");
    damaged.remove(&key("attn1_to_q.lora_up.weight")).unwrap();
    damaged.remove(&key("attn1_to_k.lora_down.weight")).unwrap();
    damaged.insert(
        key("attn1_to_v.lora_up.weight"),
        floats(&[32, 3], &[0.0; 96]),
    );
    let mut bad = vec![0.0; 128];
    bad[7] = f32::NAN;
    damaged.insert(key("attn1_to_out_0.lora_up.weight"), floats(&[32, 4], &bad));
    damaged.insert(key("attn2_to_q.alpha"), floats(&[], &[f32::INFINITY]));
    damaged.insert(key("attn2_to_k.dora_scale"), floats(&[1, 14], &[1.0; 14]));
    damaged.insert(key("ff_net_2.hada_w1_a"), floats(&[4, 4], &[1.0; 16]));
    damaged.insert(key("ff_net_0_proj.lokr_w1"), floats(&[4, 4], &[1.0; 16]));
    damaged.insert("unet.a.ia3_l".into(), floats(&[1, 4], &[1.0; 4]));
    damaged.insert("emb_params".into(), floats(&[1], &[1.0]));
    let file = dir.path().join("damaged.safetensors");
    write(&file, &damaged);
    let out = dir.path().join("bundle");
    // Names allow what fits no layer; they do not make a damaged file whole.
    let recipe = refiner_recipe(&golden, &[(&file, "allow_unmatched = [\"*_fc1\"]")]);
    let message = exported(dir.path(), &recipe, &out).unwrap_err();
    for (name, expected) in [
        ("attn1_to_q.lora_down.weight", "up is missing"),
        ("attn1_to_k.lora_up.weight", "down is missing"),
        ("attn1_to_v.lora_up.weight", "found [32, 3]"),
        ("attn1_to_out_0.lora_up.weight", "found NaN at flat index 7"),
        ("attn2_to_q.alpha", "one finite number"),
        ("attn2_to_k.dora_scale", "DoRA"),
        ("ff_net_2.hada_w1_a", "LoHa"),
        ("ff_net_0_proj.lokr_w1", "LoKr"),
    ] {
        let line = message.lines().find(|line| line.contains(&key(name)));
        let line = line.unwrap_or_else(|| panic!("{name} is not named\n{message}"));
        assert!(line.contains(expected), "{expected}: {line}");
        assert!(line.contains("damaged.safetensors"), "{line}");
    }
    assert!(message.contains("unet.a.ia3_l: ") && message.contains("IA3"));
    assert!(message.contains("emb_params: expected a key of a LoRA file"));
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        !left.iter().any(|name| name.starts_with("bundle")),
        "{left:?}"
    );
}

#[test]
fn half_of_a_file_twice_is_the_whole_once() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = golden.join("lora_kohya_sgm.safetensors");
    let recipes = [
        refiner_recipe(&golden, &[]),
        refiner_recipe(&golden, &[(&file, "")]),
        refiner_recipe(&golden, &[(&file, "weight = 0.5"), (&file, "weight = 0.5")]),
    ];
    let mut bundles = Vec::new();
    for (at, recipe) in recipes.iter().enumerate() {
        let out = dir.path().join(format!("bundle{at}"));
        exported(dir.path(), recipe, &out).unwrap();
        bundles.push(out);
    }
    for stage in ["refiner", "text_encoder_1", "text_encoder_2"] {
        let [plain, whole, halves] = [0, 1, 2].map(|at: usize| {
            let path = bundles[at].join(format!("weights/{stage}.bin"));
            singles(&fs::read(path).unwrap())
        });
        let far = |a: &[f32], b: &[f32]| {
            let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
            apart.fold(0.0_f32, f32::max)
        };
        assert_eq!((plain.len(), whole.len()), (whole.len(), halves.len()));
        // Two additions round twice.
        assert!(far(&whole, &halves) < 1e-6, "{stage}");
        assert!(far(&plain, &whole) > 1e-2, "{stage} was not changed");
    }
}

#[test]
fn a_projection_that_is_stored_turned_and_a_kernel_between_two_factors_are_merged() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("own.safetensors");
    let ramp = |count: usize, step: f32| -> Vec<f32> {
        (0..count).map(|at| step * (at % 17) as f32 - 0.1).collect()
    };
    // text_projection: 8 wide to 20, stored [8, 20].
    let (up, down) = (ramp(20 * 2, 0.02), ramp(2 * 8, 0.03));
    // A convolution 32 to 32 of 3 x 3 through rank 2: up [32, 2], mid [2, 2, 3, 3], down [2, 32].
    let (conv_up, mid, conv_down) = (ramp(64, 0.02), ramp(36, 0.01), ramp(64, 0.015));
    let conv = "base_model.model.unet.down_blocks.0.resnets.0.conv1";
    let layer = "lora_te1_text_model_encoder_layers_11_mlp_fc2";
    write(
        &file,
        &BTreeMap::from([
            (
                "text_encoder_2.text_projection.lora_B.weight".into(),
                floats(&[20, 2], &up),
            ),
            (
                "text_encoder_2.text_projection.lora_A.weight".into(),
                floats(&[2, 8], &down),
            ),
            (
                format!("{conv}.lora_up.weight"),
                floats(&[32, 2, 1, 1], &conv_up),
            ),
            (
                format!("{conv}.lora_mid.weight"),
                floats(&[2, 2, 3, 3], &mid),
            ),
            (
                format!("{conv}.lora_down.weight"),
                floats(&[2, 32, 1, 1], &conv_down),
            ),
            (format!("{conv}.alpha"), floats(&[], &[4.0])),
            // The last layer of the first tower does not run.
            (
                format!("{layer}.lora_up.weight"),
                floats(&[6, 1], &[1.0; 6]),
            ),
            (
                format!("{layer}.lora_down.weight"),
                floats(&[1, 24], &[1.0; 24]),
            ),
        ]),
    );
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    exported(dir.path(), &refiner_recipe(&golden, &[]), &before).unwrap();
    let recipe = refiner_recipe(&golden, &[(&file, "weight = -0.5")]);
    let (manifest, _) = exported(dir.path(), &recipe, &after).unwrap();
    let expected = BTreeMap::from([(StageName::Refiner, 1), (StageName::TextEncoder2, 1)]);
    assert_eq!(manifest.loras[0].merged, expected);
    assert_eq!(manifest.loras[0].unused, [layer]);

    let compare = |stage, key: &str, change: &dyn Fn(usize) -> f32| {
        let (dims, plain) = weight(&before, stage, key);
        let (same, merged) = weight(&after, stage, key);
        assert_eq!(dims, same);
        for (at, (plain, merged)) in plain.iter().zip(&merged).enumerate() {
            let expected = plain + change(at);
            assert!(
                (merged - expected).abs() < 1e-6,
                "{key} {at}: {expected}, {merged}"
            );
        }
    };
    let projection = "conditioner.embedders.1.model.text_projection";
    compare(StageName::TextEncoder2, projection, &|at| {
        let (inner, out) = (at / 20, at % 20);
        -0.5 * (0..2)
            .map(|r| up[out * 2 + r] * down[r * 8 + inner])
            .sum::<f32>()
    });
    let kernel = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight";
    compare(StageName::Refiner, kernel, &|at| {
        let (out, input, tap) = (at / 288, at / 9 % 32, at % 9);
        let mut sum = 0.0;
        for a in 0..2 {
            for b in 0..2 {
                sum +=
                    conv_up[out * 2 + a] * mid[(a * 2 + b) * 9 + tap] * conv_down[b * 32 + input];
            }
        }
        -0.5 * 4.0 / 2.0 * sum
    });
}

#[test]
fn a_recipe_with_a_wrong_lora_names_the_field() {
    let dir = tempfile::tempdir().unwrap();
    for (lora, expected) in [
        ("file = \"x\"\ninto = \"prior\"", "refiner"),
        ("file = \"x\"\ninto = \"refiner\"\nwight = 1.0", "wight"),
        (
            "file = \"x\"\ninto = \"refiner\"\nweight = nan",
            "loras[0].weight: expected a finite number",
        ),
        ("file = \"x\"\ninto = \"unclip\"", "loras[0].into"),
    ] {
        let recipe = format!("precision = \"fp32\"\n[sources]\nsdxl = \"y\"\n[[loras]]\n{lora}\n");
        let message = exported(dir.path(), &recipe, &dir.path().join("out")).unwrap_err();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn an_export_with_a_lora_gives_the_same_bytes_twice_and_names_what_overflows() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = golden.join("lora_kohya_diffusers.safetensors");
    let recipe = refiner_recipe(&golden, &[(&file, "")]);
    let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
    exported(dir.path(), &recipe, &one).unwrap();
    exported(dir.path(), &recipe, &two).unwrap();
    for name in [
        "manifest.json",
        "weights/refiner.bin",
        "graphs/refiner.onnx",
    ] {
        assert!(
            fs::read(one.join(name)).unwrap() == fs::read(two.join(name)).unwrap(),
            "{name}"
        );
    }
    // The audit would run the network and find that it computes nothing finite at all.
    let huge = refiner_recipe(&golden, &[(&file, "weight = 1e7")]).replace(
        "precision = \"fp32\"",
        "precision = \"fp16\"\naudit = false",
    );
    assert!(huge.contains("audit = false"));
    let message = exported(dir.path(), &huge, &dir.path().join("three")).unwrap_err();
    assert!(
        message.contains("model.diffusion_model.input_blocks.1.0.in_layers.2.weight: expected at most 65504 in fp16")
            && message.contains("after merging lora_unet_down_blocks_0_resnets_0_conv1"),
        "{message}"
    );
    assert!(!dir.path().join("three").exists());
}
