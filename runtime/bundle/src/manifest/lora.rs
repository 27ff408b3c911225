//! LoRA files that were merged into a bundle's networks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ManifestError, StageName, field_error};

/// A LoRA file that was merged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// The network it was merged into, [`StageName::Refiner`] or [`StageName::Unclip`].
    pub network: StageName,
    /// File name without its folder.
    pub file: String,
    /// Length in bytes.
    pub len_bytes: u64,
    /// SHA-256 of the whole file, lower-case hex.
    pub sha256: String,
    /// What its changes were multiplied with.
    pub weight: f32,
    /// Entries that changed a weight, by stage; text encoders among them.
    pub merged: BTreeMap<StageName, u64>,
    /// Entries of layers that the checkpoint has and no stage of the bundle runs.
    pub unused: Vec<String>,
    /// Entries that fit no layer and were left out by name.
    pub left_out: Vec<String>,
}

impl Lora {
    pub(super) fn validate(&self, field: &str) -> Result<(), ManifestError> {
        if !matches!(self.network, StageName::Refiner | StageName::Unclip) {
            return Err(field_error(
                format!("{field}.network"),
                "refiner or unclip",
                self.network,
            ));
        }
        if !self.weight.is_finite() {
            return Err(field_error(
                format!("{field}.weight"),
                "a finite number",
                self.weight,
            ));
        }
        Ok(())
    }
}
