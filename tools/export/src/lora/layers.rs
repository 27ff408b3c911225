//! The layers that a LoRA may change, told by a checkpoint's own keys, with every name they go by.
//!
//! kohya joins a layer's path with `_`, which its parts hold as well (`to_out_0`, `time_emb_proj`).
//! Nothing is split here: the known layers are joined the same way and compared whole.

use std::collections::{BTreeMap, BTreeSet};

use super::unet_names;
use crate::section::Section;

/// The prefix of the UNet's keys in sgm's engines.
const UNET: &str = "model.diffusion_model.";
const CLIP_L: &str = "conditioner.embedders.0.transformer.";
const OPEN_CLIP: &str = "conditioner.embedders.1.model.";

/// What a LoRA's keys say they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Unet,
    ClipL,
    OpenClip,
}

/// How a name is spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Spelling {
    /// `down_blocks.1.attentions.0`
    Dotted,
    /// `down_blocks_1_attentions_0`
    Joined,
}

/// A layer that may be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    /// The stored weight.
    pub(super) key: String,
    /// Rows, columns, kernel height and width of the layer, as a LoRA sees it.
    pub(super) shape: [u64; 4],
    /// Its first row in the stored weight.
    pub(super) first_row: u64,
    /// The weight is stored with its axes exchanged.
    pub(super) turned: bool,
}

/// What a name fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found<'l> {
    /// One layer; the number tells layers apart.
    Layer(usize, &'l Layer),
    /// None.
    Nothing,
    /// Several, whose joined names are the same.
    Several(Vec<&'l str>),
}

/// The layers of one engine.
#[derive(Debug, Default)]
pub(super) struct Layers {
    layers: Vec<Layer>,
    names: BTreeMap<(Part, Spelling, String), BTreeSet<usize>>,
}

impl Layers {
    /// The layers of an engine: its UNet and, where asked, the text towers of SDXL.
    pub(super) fn of(section: &Section<'_>, with_text: bool) -> Layers {
        let mut layers = Layers::default();
        layers.unet(section);
        if with_text {
            layers.clip_l(section);
            layers.open_clip(section);
        }
        layers
    }

    /// The layer that an entry names.
    pub(super) fn find(&self, entry: &str) -> Found<'_> {
        let name = place(entry);
        let Some(found) = name.and_then(|name| self.names.get(&name)) else {
            return Found::Nothing;
        };
        let mut found = found.iter().copied();
        match (found.next(), found.next()) {
            (Some(index), None) => Found::Layer(index, &self.layers[index]),
            (Some(first), Some(second)) => Found::Several(
                [first, second]
                    .into_iter()
                    .chain(found)
                    .map(|index| self.layers[index].key.as_str())
                    .collect(),
            ),
            _ => Found::Nothing,
        }
    }

    fn add(&mut self, part: Part, layer: Layer, names: &[String]) {
        let index = self.layers.len();
        self.layers.push(layer);
        for name in names {
            for (spelling, name) in [
                (Spelling::Dotted, name.clone()),
                (Spelling::Joined, name.replace('.', "_")),
            ] {
                self.names
                    .entry((part, spelling, name))
                    .or_default()
                    .insert(index);
            }
        }
    }

    fn unet(&mut self, section: &Section<'_>) {
        let modules = unet_names::modules(section, UNET);
        for (key, shape) in weights(section, UNET) {
            let path = &key[UNET.len()..key.len() - ".weight".len()];
            let mut names = vec![path.to_owned()];
            names.extend(unet_names::diffusers(&modules, path));
            self.add(Part::Unet, whole(key, shape), &names);
        }
    }

    fn clip_l(&mut self, section: &Section<'_>) {
        for (key, shape) in weights(section, CLIP_L) {
            let path = key[CLIP_L.len()..key.len() - ".weight".len()].to_owned();
            if path.contains(".embeddings.") {
                continue;
            }
            self.add(Part::ClipL, whole(key, shape), &[path]);
        }
    }

    /// OpenCLIP's blocks under transformers' names, which LoRA files use; queries, keys and values
    /// are thirds of one stored matrix.
    fn open_clip(&mut self, section: &Section<'_>) {
        for block in section.numbers(&format!("{OPEN_CLIP}transformer.resblocks.")) {
            let own = format!("transformer.resblocks.{block}.");
            let theirs = format!("text_model.encoder.layers.{block}.");
            for (ours, other) in [
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ] {
                let key = format!("{OPEN_CLIP}{own}{ours}.weight");
                if let Some(shape) = section.shape(&key).and_then(|shape| four(&shape)) {
                    let names = [format!("{own}{ours}"), format!("{theirs}{other}")];
                    self.add(Part::OpenClip, whole(key, shape), &names);
                }
            }
            let key = format!("{OPEN_CLIP}{own}attn.in_proj_weight");
            let Some([rows, columns, 1, 1]) = section.shape(&key).and_then(|shape| four(&shape))
            else {
                continue;
            };
            for (third, name) in (0_u64..).zip(["q_proj", "k_proj", "v_proj"]) {
                let layer = Layer {
                    key: key.clone(),
                    shape: [rows / 3, columns, 1, 1],
                    first_row: third * (rows / 3),
                    turned: false,
                };
                self.add(
                    Part::OpenClip,
                    layer,
                    &[format!("{theirs}self_attn.{name}")],
                );
            }
        }
        let key = format!("{OPEN_CLIP}text_projection");
        if let Some([inner, out, 1, 1]) = section.shape(&key).and_then(|shape| four(&shape)) {
            let layer = Layer {
                key,
                shape: [out, inner, 1, 1],
                first_row: 0,
                turned: true,
            };
            self.add(Part::OpenClip, layer, &["text_projection".into()]);
        }
    }
}

/// Matrices and convolutions below a prefix, with their shapes as four numbers.
fn weights(section: &Section<'_>, prefix: &str) -> Vec<(String, [u64; 4])> {
    let below = section.keys().filter(|key| key.starts_with(prefix));
    below
        .filter(|key| key.ends_with(".weight"))
        .filter_map(|key| Some((key.to_owned(), four(&section.shape(key)?)?)))
        .collect()
}

fn four(shape: &[u64]) -> Option<[u64; 4]> {
    match *shape {
        [rows, columns] => Some([rows, columns, 1, 1]),
        [rows, columns, height, width] => Some([rows, columns, height, width]),
        _ => None,
    }
}

fn whole(key: String, shape: [u64; 4]) -> Layer {
    Layer {
        key,
        shape,
        first_row: 0,
        turned: false,
    }
}

/// What an entry's name says about where it belongs.
fn place(entry: &str) -> Option<(Part, Spelling, String)> {
    for (prefix, part) in [
        ("lora_unet_", Part::Unet),
        ("lora_te1_", Part::ClipL),
        ("lora_te2_", Part::OpenClip),
    ] {
        if let Some(name) = entry.strip_prefix(prefix) {
            return Some((part, Spelling::Joined, name.into()));
        }
    }
    let mut name = entry;
    let mut part = None;
    loop {
        let stripped = [
            ("base_model.model.", None),
            ("unet.", Some(Part::Unet)),
            ("model.diffusion_model.", Some(Part::Unet)),
            ("diffusion_model.", Some(Part::Unet)),
            ("text_encoder.", Some(Part::ClipL)),
            ("text_encoder_2.", Some(Part::OpenClip)),
        ]
        .into_iter()
        .find_map(|(prefix, told)| Some((name.strip_prefix(prefix)?, told)));
        match stripped {
            // Only one prefix may say which network it is.
            Some((_, Some(_))) if part.is_some() => return None,
            Some((rest, told)) => {
                name = rest;
                part = part.or(told);
            }
            None => break,
        }
    }
    // A file of one network alone may name none: the UNet's paths begin unlike the towers'.
    let part = part.unwrap_or(Part::Unet);
    Some((part, Spelling::Dotted, name.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(names: &[&str]) -> Layers {
        let mut layers = Layers::default();
        for name in names {
            layers.add(
                Part::Unet,
                whole((*name).into(), [1, 1, 1, 1]),
                &[(*name).into()],
            );
        }
        layers
    }

    fn key<'l>(layers: &'l Layers, entry: &str) -> Option<&'l str> {
        match layers.find(entry) {
            Found::Layer(_, layer) => Some(&layer.key),
            _ => None,
        }
    }

    #[test]
    fn joined_names_are_compared_whole() {
        let known = layers(&[
            "mid.attn1.to_out.0",
            "mid.attn1.to_out",
            "mid.1.0",
            "mid.10",
        ]);
        assert_eq!(
            key(&known, "lora_unet_mid_attn1_to_out_0"),
            Some("mid.attn1.to_out.0")
        );
        assert_eq!(
            key(&known, "lora_unet_mid_attn1_to_out"),
            Some("mid.attn1.to_out")
        );
        assert_eq!(key(&known, "lora_unet_mid_1_0"), Some("mid.1.0"));
        assert_eq!(key(&known, "lora_unet_mid_10"), Some("mid.10"));
        assert_eq!(key(&known, "lora_unet_mid_1"), None);
        assert_eq!(key(&known, "lora_te1_mid_10"), None);
    }

    #[test]
    fn two_layers_of_one_joined_name_are_both_named() {
        let known = layers(&["a_b.c", "a.b_c"]);
        assert_eq!(
            known.find("lora_unet_a_b_c"),
            Found::Several(vec!["a_b.c", "a.b_c"])
        );
        // Dots tell them apart.
        assert_eq!(key(&known, "unet.a.b_c"), Some("a.b_c"));
    }

    #[test]
    fn prefixes_of_peft_may_stand_in_either_order() {
        let known = layers(&["mid_block.x"]);
        for entry in [
            "unet.mid_block.x",
            "mid_block.x",
            "base_model.model.mid_block.x",
            "base_model.model.unet.mid_block.x",
            "unet.base_model.model.mid_block.x",
            "diffusion_model.mid_block.x",
        ] {
            assert_eq!(key(&known, entry), Some("mid_block.x"), "{entry}");
        }
        for entry in [
            "text_encoder.mid_block.x",
            "unet.unet.mid_block.x",
            "unet.mid_block_x",
        ] {
            assert_eq!(key(&known, entry), None, "{entry}");
        }
    }
}
