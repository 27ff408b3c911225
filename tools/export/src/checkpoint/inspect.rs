//! `inspect`: a checkpoint's table of contents as text.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::Checkpoint;
use crate::section::show_shape;

/// Container, files, element types, sections, tensors and sums; deterministic, sorted by key.
#[must_use]
pub fn render(checkpoint: &Checkpoint) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(text, "{} container", checkpoint.container());
    if checkpoint.parts().len() > 1 {
        for part in checkpoint.parts() {
            let _ = writeln!(text, "file: {}", part.name);
        }
    }
    if !checkpoint.top_keys().is_empty() {
        let keys: Vec<&str> = checkpoint
            .top_keys()
            .iter()
            .take(16)
            .map(String::as_str)
            .collect();
        let more = checkpoint.top_keys().len().saturating_sub(keys.len());
        let tail = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        let _ = writeln!(text, "top: {}{tail}", keys.join(", "));
    }
    for (section, count) in checkpoint.sections() {
        let title = if section.is_empty() { "(top)" } else { section };
        let tensors = checkpoint.tensors(section);
        let (mut elements, mut bytes) = (0_u64, 0_u64);
        let mut mix = BTreeMap::new();
        for (_, tensor) in &tensors {
            let len = tensor.elements().saturating_mul(tensor.dtype().len_bytes());
            elements = elements.saturating_add(tensor.elements());
            bytes = bytes.saturating_add(len);
            let (count, sum) = mix.entry(tensor.dtype()).or_insert((0_u64, 0_u64));
            *count += 1;
            *sum = sum.saturating_add(len);
        }
        let _ = writeln!(
            text,
            "\n{title}: {count} tensors, {elements} elements, {bytes} bytes"
        );
        for (dtype, (count, bytes)) in mix {
            let _ = writeln!(text, "  {dtype:<9} in {count} tensors, {bytes} bytes");
        }
        for (name, tensor) in tensors {
            let len = tensor.elements().saturating_mul(tensor.dtype().len_bytes());
            let spelt = checkpoint
                .names()
                .spelt(&name)
                .map_or_else(String::new, |spelt| format!(" = {spelt}"));
            let _ = writeln!(
                text,
                "  {:<9} {len:>14} {:<24} {name}{spelt}",
                tensor.dtype(),
                show_shape(tensor.shape())
            );
        }
    }
    text
}
