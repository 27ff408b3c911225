//! A LoRA file's keys as entries: up, down, perhaps a kernel between them, perhaps alpha.
//!
//! Spellings: kohya (`.lora_up.weight`, `.lora_down.weight`, `.lora_mid.weight`, `.alpha`), PEFT
//! (`.lora_A.weight`, `.lora_B.weight`, also with an adapter's name before `.weight`) and older
//! diffusers (`.lora.up.weight`, `.lora_linear_layer.up.weight`, `.processor.to_q_lora.up.weight`).

use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::{TensorDType, TensorRef};
use crate::section::{Problem, chain, show_shape};

/// One of an entry's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Factor {
    Up,
    Down,
    Mid,
    Alpha,
}

const SUFFIXES: [(&str, Factor); 12] = [
    (".lora_up.weight", Factor::Up),
    (".lora_down.weight", Factor::Down),
    (".lora_mid.weight", Factor::Mid),
    (".alpha", Factor::Alpha),
    (".lora_B.weight", Factor::Up),
    (".lora_A.weight", Factor::Down),
    (".lora.up.weight", Factor::Up),
    (".lora.down.weight", Factor::Down),
    (".lora_linear_layer.up.weight", Factor::Up),
    (".lora_linear_layer.down.weight", Factor::Down),
    ("_lora.up.weight", Factor::Up),
    ("_lora.down.weight", Factor::Down),
];

/// Parts of keys that tell another way of adapting, by how they begin.
const OTHER_KINDS: [(&str, &str); 15] = [
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("ia3_", "IA3"),
    ("on_input", "IA3"),
    ("oft_", "OFT"),
    ("boft_", "BOFT"),
    ("vera_", "VeRA"),
    ("lora_embedding_", "a LoRA of an embedding"),
    ("diff", "a full difference"),
    ("w_norm", "a changed norm"),
    ("b_norm", "a changed norm"),
    ("a1", "GLoRA"),
    ("b1", "GLoRA"),
];

/// A well-formed entry.
#[derive(Clone, Debug)]
pub(super) struct Entry<'c> {
    /// Its keys without what tells up from down.
    pub(super) name: String,
    /// `[out, rank]` or `[out, rank, 1, 1]`.
    pub(super) up: TensorRef<'c>,
    /// `[rank, in]` or `[rank, in, k, k]`.
    pub(super) down: TensorRef<'c>,
    /// `[rank, rank, k, k]`.
    pub(super) mid: Option<TensorRef<'c>>,
    /// Alpha over rank; 1 without alpha.
    pub(super) scale: f64,
}

impl Entry<'_> {
    /// Rows, columns and kernel of the weight that it changes.
    pub(super) fn shape(&self) -> [u64; 4] {
        let kernel = self.mid.as_ref().unwrap_or(&self.down).shape();
        let side = |axis: usize| kernel.get(axis).copied().unwrap_or(1);
        [self.up.shape()[0], self.down.shape()[1], side(2), side(3)]
    }
}

#[derive(Default)]
struct Parts<'c> {
    up: Option<TensorRef<'c>>,
    down: Option<TensorRef<'c>>,
    mid: Option<TensorRef<'c>>,
    alpha: Option<TensorRef<'c>>,
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Contents<'c> {
    /// Entries in the order of their names.
    pub(super) entries: Vec<Entry<'c>>,
    /// Keys of no known spelling.
    pub(super) foreign: Vec<String>,
    /// Everything that is damaged or of another kind.
    pub(super) problems: Vec<Problem>,
}

/// Sorts a file's tensors into entries.
pub(super) fn read<'c>(
    file: &str,
    tensors: impl IntoIterator<Item = (String, TensorRef<'c>)>,
) -> Contents<'c> {
    let mut contents = Contents::default();
    let mut parts: BTreeMap<String, Parts<'c>> = BTreeMap::new();
    let mut of_other_kind = BTreeSet::new();
    let problem = |key: &str, message: String| Problem {
        file: file.into(),
        key: key.into(),
        message,
    };
    for (key, tensor) in tensors {
        if let Some((name, kind)) = other_kind(&key) {
            of_other_kind.insert(name.to_owned());
            let message = format!(
                "expected LoRA factors (up and down), found {kind}, a kind that is not supported"
            );
            contents.problems.push(problem(&key, message));
            continue;
        }
        let Some((name, factor)) = split(&key) else {
            contents.foreign.push(key);
            continue;
        };
        let parts = parts.entry(name).or_default();
        let place = match factor {
            Factor::Up => &mut parts.up,
            Factor::Down => &mut parts.down,
            Factor::Mid => &mut parts.mid,
            Factor::Alpha => &mut parts.alpha,
        };
        if let Some(other) = place.replace(tensor) {
            let message = format!(
                "expected one tensor of this role, found {} too",
                other.name()
            );
            contents.problems.push(problem(&key, message));
        }
    }
    for (name, parts) in parts {
        if of_other_kind.contains(&name) {
            continue;
        }
        let mut wrong = Vec::new();
        let entry = assemble(&name, parts, &mut |key, message| {
            wrong.push(problem(key, message));
        });
        contents.problems.extend(wrong);
        contents.entries.extend(entry);
    }
    contents
}

/// The entry's name and the kind where a key belongs to another way of adapting.
fn other_kind(key: &str) -> Option<(&str, &'static str)> {
    let mut start = 0;
    for part in key.split('.') {
        let kind = OTHER_KINDS.iter().find(|(begin, _)| match *begin {
            // Short words are parts of their own.
            "a1" | "b1" => part == *begin,
            "diff" => part == "diff" || part == "diff_b",
            begin => part.starts_with(begin),
        });
        if let Some((_, kind)) = kind {
            return Some((key[..start].trim_end_matches('.'), kind));
        }
        start += part.len() + 1;
    }
    [
        "lora_up.bias",
        "lora_down.bias",
        "lora_A.bias",
        "lora_B.bias",
    ]
    .iter()
    .find_map(|suffix| key.strip_suffix(suffix))
    .map(|name| (name.trim_end_matches('.'), "a LoRA with bias"))
}

/// A key as the entry's name and its factor.
fn split(key: &str) -> Option<(String, Factor)> {
    let plain = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((key.strip_suffix(suffix)?, *factor)));
    if let Some((name, factor)) = plain {
        return Some((without_processor(name), factor));
    }
    // PEFT with the adapter's name: `….lora_A.default.weight`.
    let named = key.strip_suffix(".weight")?;
    let (name, factor) = [(".lora_A.", Factor::Down), (".lora_B.", Factor::Up)]
        .into_iter()
        .find_map(|(middle, factor)| {
            let (name, adapter) = named.rsplit_once(middle)?;
            (!adapter.contains('.')).then_some((name, factor))
        })?;
    Some((name.into(), factor))
}

/// `….attn1.processor.to_out` is the attention's `….attn1.to_out.0`.
fn without_processor(name: &str) -> String {
    match name.rsplit_once(".processor.") {
        Some((attention, "to_out")) => format!("{attention}.to_out.0"),
        Some((attention, projection)) => format!("{attention}.{projection}"),
        None => name.into(),
    }
}

/// An entry from its parts; whatever is wrong with them goes to `note`.
fn assemble<'c>(
    name: &str,
    parts: Parts<'c>,
    note: &mut dyn FnMut(&str, String),
) -> Option<Entry<'c>> {
    let (Some(up), Some(down)) = (&parts.up, &parts.down) else {
        let found: Vec<&str> = [&parts.up, &parts.down, &parts.mid, &parts.alpha]
            .into_iter()
            .flatten()
            .map(TensorRef::name)
            .collect();
        let missing = match (&parts.up, &parts.down) {
            (None, None) => "up and down are",
            (None, _) => "up is",
            _ => "down is",
        };
        let key = found.first().copied().unwrap_or(name);
        note(
            key,
            format!("expected an up and a down factor of {name}, {missing} missing"),
        );
        return None;
    };
    let mut fine = true;
    let mut wrong = |key: &str, message: String| {
        fine = false;
        note(key, message);
    };
    for factor in [Some(up), Some(down), parts.mid.as_ref()]
        .into_iter()
        .flatten()
    {
        check_numbers(factor, &mut wrong);
    }
    let rank = check_shapes(up, down, parts.mid.as_ref(), &mut wrong);
    let alpha = parts.alpha.as_ref().map(|alpha| (alpha, read_alpha(alpha)));
    if let Some((alpha, Err(message))) = &alpha {
        wrong(alpha.name(), message.clone());
    }
    if !fine {
        return None;
    }
    let scale = match alpha {
        Some((_, Ok(alpha))) => alpha / crate::layers::as_f64(rank),
        _ => 1.0,
    };
    let Parts {
        up: Some(up),
        down: Some(down),
        mid,
        ..
    } = parts
    else {
        return None;
    };
    Some(Entry {
        name: name.into(),
        up,
        down,
        mid,
        scale,
    })
}

/// Compares the factors with each other; the rank.
fn check_shapes(
    up: &TensorRef<'_>,
    down: &TensorRef<'_>,
    mid: Option<&TensorRef<'_>>,
    wrong: &mut dyn FnMut(&str, String),
) -> u64 {
    let axes = |shape: &[u64]| matches!(shape.len(), 2 | 4) && shape.iter().all(|&len| len > 0);
    if !axes(down.shape()) {
        let found = show_shape(down.shape());
        wrong(
            down.name(),
            format!("expected [rank, in] or [rank, in, k, k], found {found}"),
        );
        return 1;
    }
    let rank = down.shape()[0];
    let point = |shape: &[u64]| shape[2..].iter().all(|&len| len == 1);
    if !axes(up.shape()) || up.shape()[1] != rank || !point(up.shape()) {
        wrong(
            up.name(),
            format!(
                "expected [out, {rank}] or [out, {rank}, 1, 1], as {} has rank {rank}, found {}",
                down.name(),
                show_shape(up.shape())
            ),
        );
    }
    if let Some(mid) = mid {
        let shape = mid.shape();
        if shape.len() != 4 || shape[..2] != [rank, rank] || shape[2..].contains(&0) {
            wrong(
                mid.name(),
                format!(
                    "expected [{rank}, {rank}, k, k], as {} has rank {rank}, found {}",
                    down.name(),
                    show_shape(shape)
                ),
            );
        }
        if !point(down.shape()) {
            wrong(
                down.name(),
                format!(
                    "expected [{rank}, in, 1, 1] beside {}, found {}",
                    mid.name(),
                    show_shape(down.shape())
                ),
            );
        }
    }
    rank
}

fn check_numbers(tensor: &TensorRef<'_>, wrong: &mut dyn FnMut(&str, String)) {
    if !matches!(
        tensor.dtype(),
        TensorDType::F16 | TensorDType::BF16 | TensorDType::F32 | TensorDType::F64
    ) {
        let found = tensor.dtype();
        wrong(
            tensor.name(),
            format!("expected floating-point numbers, found {found}"),
        );
        return;
    }
    let mut bad = None;
    let read = tensor.for_each_f32_chunk(|offset, values| {
        if bad.is_none()
            && let Some(at) = values.iter().position(|value| !value.is_finite())
        {
            bad = Some((offset + at as u64, values[at]));
        }
        Ok(())
    });
    if let Err(error) = read {
        wrong(tensor.name(), chain(&error));
    }
    if let Some((at, value)) = bad {
        wrong(
            tensor.name(),
            format!("expected finite values, found {value} at flat index {at}"),
        );
    }
}

/// One finite number; whole numbers occur.
fn read_alpha(alpha: &TensorRef<'_>) -> Result<f64, String> {
    if alpha.elements() != 1 {
        let found = show_shape(alpha.shape());
        return Err(format!("expected one number, found {found}"));
    }
    let values = alpha.read_f32().map_err(|error| chain(&error))?;
    match values.as_slice() {
        [value] if value.is_finite() => Ok(f64::from(*value)),
        other => Err(format!("expected one finite number, found {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_factor_is_known() {
        for (key, name, factor) in [
            ("lora_unet_a_b.lora_up.weight", "lora_unet_a_b", Factor::Up),
            ("lora_unet_a.alpha", "lora_unet_a", Factor::Alpha),
            ("unet.a.to_q.lora_A.weight", "unet.a.to_q", Factor::Down),
            (
                "unet.a.to_q.lora_B.default.weight",
                "unet.a.to_q",
                Factor::Up,
            ),
            ("unet.a.to_q.lora.down.weight", "unet.a.to_q", Factor::Down),
            (
                "unet.a.attn1.processor.to_out_lora.up.weight",
                "unet.a.attn1.to_out.0",
                Factor::Up,
            ),
            (
                "text_encoder.b.q_proj.lora_linear_layer.up.weight",
                "text_encoder.b.q_proj",
                Factor::Up,
            ),
        ] {
            assert_eq!(split(key), Some((name.to_owned(), factor)), "{key}");
            assert_eq!(other_kind(key), None, "{key}");
        }
        assert_eq!(split("bundle_emb.a.string_to_param"), None);
    }

    #[test]
    fn other_kinds_are_told_by_their_keys() {
        for (key, kind) in [
            ("lora_unet_a.dora_scale", "DoRA"),
            ("unet.a.lora_magnitude_vector.weight", "DoRA"),
            ("lora_unet_a.hada_w1_a", "LoHa"),
            ("lora_unet_a.hada_t1", "LoHa"),
            ("lora_unet_a.lokr_w1", "LoKr"),
            ("unet.a.ia3_l.weight", "IA3"),
            ("lora_unet_a.on_input", "IA3"),
            ("lora_unet_a.oft_blocks", "OFT"),
            ("lora_unet_a.diff_b", "a full difference"),
            ("unet.a.lora_B.bias", "a LoRA with bias"),
        ] {
            assert_eq!(other_kind(key).map(|(_, kind)| kind), Some(kind), "{key}");
        }
    }
}
