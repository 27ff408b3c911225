//! The two text towers: CLIP-L is called the same in both, OpenCLIP's bigG is not.

use super::super::tensor::Entry;
use super::{Component, Pairs, Tensors, rename};
use crate::section::show_shape;

const CLIP_L: &str = "conditioner.embedders.0.transformer.";
const OPEN_CLIP: &str = "conditioner.embedders.1.model.";

fn check(tower: &mut Component<'_>, activation: &'static str) {
    let checks: [(&str, &[&str]); 2] = [
        ("hidden_act", &[activation]),
        ("layer_norm_eps", &["0.00001", "1e-5"]),
    ];
    for (field, expected) in checks {
        let config = tower.config.as_ref();
        if let Some(problem) = config.and_then(|c| c.differs(field, expected)) {
            tower.problem(problem);
        }
    }
}

/// `CLIPTextModel` of CLIP-L.
pub(super) fn read_clip_l(tower: &mut Component<'_>) -> Tensors {
    check(tower, "quick_gelu");
    let pairs = vec![("text_model.".to_owned(), format!("{CLIP_L}text_model."))];
    rename(tower, &pairs, "text_encoder.")
}

/// `CLIPTextModelWithProjection` of OpenCLIP's bigG.
pub(super) fn read_open_clip(tower: &mut Component<'_>) -> Tensors {
    check(tower, "gelu");
    let mut pairs = Pairs::new();
    let fixed = [
        ("text_model.embeddings.token_embedding.", "token_embedding."),
        (
            "text_model.embeddings.position_embedding.weight",
            "positional_embedding",
        ),
        ("text_model.embeddings.position_ids", "position_ids"),
        ("text_model.final_layer_norm.", "ln_final."),
        ("text_projection.weight", "text_projection"),
    ];
    for (spelt, shown) in fixed {
        pairs.push((spelt.into(), format!("{OPEN_CLIP}{shown}")));
    }
    let mut joined = Pairs::new();
    let layers = "text_model.encoder.layers.";
    for layer in 0..tower.count(layers) {
        let (from, to) = (
            format!("{layers}{layer}."),
            format!("{OPEN_CLIP}transformer.resblocks.{layer}."),
        );
        for (spelt, shown) in [
            ("layer_norm1.", "ln_1."),
            ("layer_norm2.", "ln_2."),
            ("self_attn.out_proj.", "attn.out_proj."),
            ("mlp.fc1.", "mlp.c_fc."),
            ("mlp.fc2.", "mlp.c_proj."),
        ] {
            pairs.push((format!("{from}{spelt}"), format!("{to}{shown}")));
        }
        for part in ["weight", "bias"] {
            let spelt = format!("{from}self_attn.in_proj_{part}");
            join(tower, &format!("{from}self_attn."), part, &spelt);
            let shown = format!("{to}attn.in_proj_{part}");
            joined.push((
                format!("{from}self_attn.(q|k|v)_proj.{part}"),
                shown.clone(),
            ));
            pairs.push((spelt, shown));
        }
    }
    let mut renamed = rename(tower, &pairs, "text_encoder_2.");
    // Messages name the three and not the one.
    for (spelt, shown) in joined {
        tower.pair(&spelt, shown);
    }
    // The single file has the projection as [width, projection].
    if let Some(projection) = renamed.get_mut(&format!("{OPEN_CLIP}text_projection")) {
        turn(projection);
    }
    renamed
}

/// Replaces queries, keys and values by one tensor of three views.
fn join(tower: &mut Component<'_>, prefix: &str, part: &str, joined: &str) {
    let keys = ["q_proj", "k_proj", "v_proj"].map(|name| format!("{prefix}{name}.{part}"));
    let missing: Vec<&String> = keys
        .iter()
        .filter(|key| !tower.tensors.contains_key(*key))
        .collect();
    if !missing.is_empty() {
        let problems: Vec<String> = missing
            .iter()
            .map(|key| format!("{key}: expected a tensor, the key is missing"))
            .collect();
        problems
            .into_iter()
            .for_each(|problem| tower.problem(problem));
        return;
    }
    let entries: Vec<Entry> = keys
        .iter()
        .filter_map(|key| tower.tensors.remove(key))
        .collect();
    let first = entries[0].clone();
    for (key, entry) in keys.iter().zip(&entries) {
        if entry.shape != first.shape || entry.shape.is_empty() {
            let (expected, found) = (show_shape(&first.shape), show_shape(&entry.shape));
            tower.problem(format!(
                "{key}: expected shape {expected} as q_proj has, found {found}"
            ));
            return;
        }
    }
    let mut shape = first.shape;
    shape[0] = shape[0].saturating_mul(3);
    // What the three have in common; the widest where they differ.
    let widest = entries
        .iter()
        .map(|entry| entry.dtype)
        .max_by_key(|dtype| (!dtype.is_float(), dtype.len_bytes()));
    let entry = Entry {
        dtype: widest.unwrap_or(first.dtype),
        shape,
        views: entries.into_iter().flat_map(|entry| entry.views).collect(),
    };
    tower.tensors.insert(joined.to_owned(), entry);
}

/// Exchanges the axes of a matrix that is one view.
fn turn(entry: &mut Entry) {
    if let ([view], 2) = (entry.views.as_mut_slice(), entry.shape.len()) {
        entry.shape.reverse();
        view.shape.reverse();
        view.strides.reverse();
    }
}
