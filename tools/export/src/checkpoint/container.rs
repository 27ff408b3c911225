//! Which container a file is, told by its first bytes.

use std::fmt;

use super::{CheckpointError, torch};

/// The kind of checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// `torch.save` since 1.6.
    TorchZip,
    /// `torch.save` before 1.6.
    TorchLegacy,
    /// safetensors.
    Safetensors,
    /// Several files and an index that says which tensor lies where.
    Sharded,
    /// A folder of DeepSpeed's ZeRO, stage 1 or 2.
    Zero,
    /// A folder of diffusers, one folder for each network.
    Diffusers,
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Container::TorchZip => "PyTorch zip",
            Container::TorchLegacy => "PyTorch legacy",
            Container::Safetensors => "safetensors",
            Container::Sharded => "sharded",
            Container::Zero => "DeepSpeed ZeRO",
            Container::Diffusers => "diffusers",
        })
    }
}

/// The container of a file of `len` bytes that starts with `head`.
pub(super) fn sniff(head: &[u8], len: u64) -> Result<Container, CheckpointError> {
    let refuse = |found: &str| {
        Err(CheckpointError::Container {
            found: found.into(),
        })
    };
    let text = String::from_utf8_lossy(head);
    let lower = text.trim_start().to_ascii_lowercase();
    if len == 0 {
        return refuse("an empty file");
    }
    if head.starts_with(b"PK\x03\x04") {
        return Ok(Container::TorchZip);
    }
    if lower.starts_with("<!doctype") || lower.starts_with("<html") {
        return refuse("an HTML page: the download returned a web page, fetch the file itself");
    }
    if lower.starts_with("version https://git-lfs") {
        return refuse("a git-lfs pointer: fetch the file itself with `git lfs pull`");
    }
    if torch::is_legacy(head) {
        return Ok(Container::TorchLegacy);
    }
    if head.len() > 8 && head[8] == b'{' {
        return Ok(Container::Safetensors);
    }
    if head.len() >= 2 && head[0] == 0x80 && (2..=5).contains(&head[1]) {
        return refuse("a bare pickle: refused, nothing was executed");
    }
    if head.get(257..262) == Some(b"ustar") {
        return refuse("a tar archive, the container of PyTorch before 0.1.10");
    }
    refuse("something else")
}
