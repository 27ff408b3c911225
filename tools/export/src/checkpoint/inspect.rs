//! `inspect`: a checkpoint's table of contents as text.

use std::fmt::Write;

use super::Checkpoint;
use crate::section::show_shape;

/// Sections, tensors and sums; deterministic, sorted by key.
#[must_use]
pub fn render(checkpoint: &Checkpoint) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(text, "{} container", checkpoint.container());
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
        let elements: u64 = tensors.iter().map(|(_, tensor)| tensor.elements()).sum();
        let bytes: u64 = tensors
            .iter()
            .map(|(_, tensor)| tensor.elements() * tensor.dtype().len_bytes())
            .sum();
        let _ = writeln!(
            text,
            "\n{title}: {count} tensors, {elements} elements, {bytes} bytes"
        );
        for (name, tensor) in tensors {
            let len = tensor.elements() * tensor.dtype().len_bytes();
            let _ = writeln!(
                text,
                "  {:<9} {:>14} {:<24} {name}",
                tensor.dtype(),
                len,
                show_shape(tensor.shape())
            );
        }
    }
    text
}
