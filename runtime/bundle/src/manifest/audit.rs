//! What the exporter found out about an fp16 bundle before it was written.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::StageName;

/// Every network run on probe inputs: in fp32, and with every intermediate rounded to fp16.
///
/// Holds what is the same in every run; times and memory are printed and not kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// The networks shared by all subjects.
    pub stages: BTreeMap<StageName, StageAudit>,
    /// Ridges, by subject.
    pub subjects: BTreeMap<String, StageAudit>,
}

/// What was found out about one network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageAudit {
    /// Rows of probe inputs.
    pub probes: u32,
    /// Largest magnitude of any intermediate value in fp32; fp16 holds up to 65504.
    pub largest: f64,
    /// The node that made it.
    pub at: String,
    /// Nodes that compute in fp32, because fp16 would overflow or lose too much.
    pub islands: Vec<String>,
    /// Weights that are stored in fp32, for the same reasons.
    pub fp32_weights: Vec<String>,
    /// Largest difference between an output rounded all the way and the fp32 one.
    pub max_error: f64,
    /// Smallest cosine between the two.
    pub cosine: f64,
    /// Smallest peak signal-to-noise ratio between the two, dB, for networks that make pictures.
    #[serde(default)]
    pub psnr_db: Option<f64>,
}
