//! Boards as memory plans: whether a bundle fits, known before a byte of it is loaded.
//!
//! What counts, on ONNX Runtime's CPU provider:
//!
//! - fp32 and int8 weights are mapped from their files. The system may drop such pages and read them
//!   again; only the stage that is being called must be there whole, so the largest stage counts.
//! - fp16 weights are widened to fp32 while they are loaded: twice their size, of every stage.
//! - Working memory is what the exporter computed from the graph. A stage keeps it after its first call.
//! - The process itself, with the runtime's library and buffers inside operators: [`PROCESS_BYTES`].

use std::fmt;
use std::fs;

use bundle::{Manifest, Precision, Stage, StageName};
use serde::{Deserialize, Serialize};

/// Program, runtime and operators' own buffers.
const PROCESS_BYTES: u64 = 512 << 20;
/// Stages that serve the workstation alone.
const OFFLINE: [StageName; 1] = [StageName::ImageEncoder];

/// What a box can do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Feature {
    /// Refined pictures.
    Refiner,
    /// Captions.
    Captioner,
    /// Quick small pictures between steps.
    Preview,
    /// The low-level picture.
    Blurry,
}

impl Feature {
    /// In the order in which they are given up.
    const ALL: [Feature; 4] = [
        Feature::Refiner,
        Feature::Captioner,
        Feature::Preview,
        Feature::Blurry,
    ];

    /// The stages that serve it alone.
    pub(crate) fn stages(self) -> &'static [StageName] {
        match self {
            Feature::Refiner => &[
                StageName::Refiner,
                StageName::RefinerVaeEncoder,
                StageName::RefinerVaeDecoder,
                StageName::TextEncoder1,
                StageName::TextEncoder2,
            ],
            Feature::Captioner => &[
                StageName::CaptionBridge,
                StageName::CaptionerPrefix,
                StageName::Captioner,
            ],
            Feature::Preview => &[StageName::PreviewDecoder],
            Feature::Blurry => &[StageName::BlurryDecoder],
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Feature::Refiner => "refiner",
            Feature::Captioner => "captioner",
            Feature::Preview => "preview",
            Feature::Blurry => "blurry",
        })
    }
}

/// The stages of features, for [`bundle::Bundle::without`].
pub(crate) fn stages_of(features: &[Feature]) -> Vec<StageName> {
    features
        .iter()
        .flat_map(|feature| feature.stages())
        .copied()
        .collect()
}

/// Why a bundle does not fit.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The bundle needs more than there is.
    #[error(
        "the {precision} bundle needs {} and {} are available: {stages}; {advice}",
        gigabytes(*.needed), gigabytes(*.available)
    )]
    TooLarge {
        /// The bundle's precision.
        precision: Precision,
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        available: u64,
        /// What each stage needs.
        stages: String,
        /// What to leave out.
        advice: String,
    },
    /// The size of this machine cannot be read.
    #[error("cannot read /proc/meminfo; set memory.limit_mib")]
    Unknown,
}

/// What one stage needs, bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Need {
    name: String,
    /// Mapped weights.
    mapped: u64,
    /// Weights in memory of their own.
    held: u64,
    working: u64,
}

impl Need {
    fn of(manifest: &Manifest, name: &str, stage: &Stage) -> Need {
        let files = stage
            .weights
            .iter()
            .filter_map(|path| manifest.files.get(path));
        let weights: u64 = files.map(|file| file.len_bytes).sum();
        let (mapped, held) = match manifest.precision {
            Precision::Fp32 | Precision::Int8 => (weights, 0),
            Precision::Fp16 => (0, 2 * weights),
        };
        Need {
            name: name.into(),
            mapped,
            held,
            working: stage.working_bytes,
        }
    }
}

/// What a bundle needs on the CPU provider, without some features.
fn needs(manifest: &Manifest, subject: &str, without: &[Feature]) -> Vec<Need> {
    let left_out = stages_of(without);
    let shared = manifest
        .stages
        .iter()
        .filter(|(name, _)| !left_out.contains(name) && !OFFLINE.contains(name))
        .map(|(name, stage)| Need::of(manifest, name.as_str(), stage));
    let person = manifest.subject(subject);
    let person = person.map(|person| Need::of(manifest, subject, &person.stage));
    shared.chain(person).collect()
}

fn total(needs: &[Need]) -> u64 {
    let anonymous: u64 = needs.iter().map(|need| need.held + need.working).sum();
    let mapped = needs.iter().map(|need| need.mapped).max().unwrap_or(0);
    PROCESS_BYTES + anonymous + mapped
}

/// Compares a bundle with the memory there is.
///
/// - `limit`: bytes that the board grants; the machine's memory where it does not say.
///
/// Returns the bytes needed.
///
/// # Errors
/// [`MemoryError::TooLarge`] with both figures, each stage's share and what to leave out.
pub(crate) fn check(
    manifest: &Manifest,
    subject: &str,
    without: &[Feature],
    limit: Option<u64>,
) -> Result<u64, MemoryError> {
    let available = match limit {
        Some(limit) => limit,
        None => machine().ok_or(MemoryError::Unknown)?,
    };
    let mut all = needs(manifest, subject, without);
    let needed = total(&all);
    if needed <= available {
        return Ok(needed);
    }
    all.sort_by_key(|need| std::cmp::Reverse(need.mapped + need.held + need.working));
    let shown: Vec<String> = all
        .iter()
        .map(|need| {
            let kind = if need.held > 0 {
                "held as fp32"
            } else {
                "mapped"
            };
            format!(
                "{} {} ({} weights {kind}, {} working)",
                need.name,
                gigabytes(need.mapped + need.held + need.working),
                gigabytes(need.mapped + need.held),
                gigabytes(need.working)
            )
        })
        .collect();
    Err(MemoryError::TooLarge {
        precision: manifest.precision,
        needed,
        available,
        stages: shown.join(", "),
        advice: advice(manifest, subject, without, available),
    })
}

fn advice(manifest: &Manifest, subject: &str, without: &[Feature], available: u64) -> String {
    let mut given_up = without.to_vec();
    let mut least = total(&needs(manifest, subject, without));
    for feature in Feature::ALL {
        let there = feature.stages().iter();
        if given_up.contains(&feature)
            || !there.clone().any(|name| manifest.stages.contains_key(name))
        {
            continue;
        }
        given_up.push(feature);
        least = total(&needs(manifest, subject, &given_up));
        if least <= available {
            let names: Vec<String> = given_up.iter().map(|name| format!("\"{name}\"")).collect();
            return format!(
                "set model.without = [{}], which needs {}",
                names.join(", "),
                gigabytes(least)
            );
        }
    }
    let smaller = match manifest.precision {
        Precision::Fp16 => {
            "; on a CPU fp16 weights are widened to fp32, export fp32 or int8 for this board"
        }
        Precision::Fp32 => "; export int8 for this board",
        Precision::Int8 => "",
    };
    format!(
        "with everything optional left out it still needs {}{smaller}",
        gigabytes(least)
    )
}

/// A remark on a bundle that fits and is not what this machine runs well.
pub(crate) fn remark(precision: Precision) -> Option<&'static str> {
    match precision {
        Precision::Fp16 => Some(
            "fp16 weights are widened to fp32 on a CPU: twice the memory and a slow start; export fp32 or int8 for this board",
        ),
        Precision::Int8 if !has_integer_products() => Some(
            "this CPU has no instructions for 8-bit products (VNNI): int8 is slow here and its sums may saturate; export fp32 for this board",
        ),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
fn has_integer_products() -> bool {
    std::arch::is_x86_feature_detected!("avx512vnni")
        || std::arch::is_x86_feature_detected!("avxvnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_integer_products() -> bool {
    // Arm's products of bytes are exact with and without the dot product's instructions.
    true
}

/// Memory of this machine, bytes.
fn machine() -> Option<u64> {
    read_kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Resident memory of this process, bytes: its own, and mapped from files.
pub(crate) fn resident() -> (u64, u64) {
    resident_of("self")
}

/// Resident memory of a process, by its id in `/proc`, as [`resident`] has it; 0 where it is gone.
pub(crate) fn resident_of(process: &str) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = |name| read_kib(&status, name).unwrap_or(0);
    (line("RssAnon:"), line("RssFile:"))
}

fn read_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes as people say them.
#[expect(clippy::cast_precision_loss, reason = "shown with two decimals")]
pub(crate) fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bundle::{FORMAT_VERSION, FileEntry};

    use super::*;

    const GB: u64 = 1_000_000_000;

    /// A manifest whose stages have weights and working memory of so many gigabytes.
    fn manifest(precision: Precision, stages: &[(StageName, u64, u64)]) -> Manifest {
        let mut files = BTreeMap::new();
        let stage = |&(name, weights, working): &(StageName, u64, u64)| {
            let path = format!("weights/{name}.bin");
            files.insert(
                path.clone(),
                FileEntry {
                    sha256: String::new(),
                    len_bytes: weights * GB,
                },
            );
            let stage = Stage {
                graph: format!("graphs/{name}.onnx"),
                weights: Some(path),
                inputs: Vec::new(),
                outputs: Vec::new(),
                working_bytes: working * GB,
            };
            (name, stage)
        };
        let stages = stages.iter().map(stage).collect();
        Manifest {
            format_version: FORMAT_VERSION,
            bundle_version: 1,
            family: "mindeye2".into(),
            precision,
            random_weights: true,
            stages,
            subjects: Vec::new(),
            blurry: None,
            prior: None,
            unclip: None,
            refiner: None,
            tokenizers: None,
            audit: None,
            loras: Vec::new(),
            sources: Vec::new(),
            licences: Vec::new(),
            files,
        }
    }

    const FULL: [(StageName, u64, u64); 5] = [
        (StageName::Backbone, 8, 0),
        (StageName::Unclip, 10, 1),
        (StageName::VaeDecoder, 0, 2),
        (StageName::Refiner, 11, 1),
        (StageName::ImageEncoder, 7, 1),
    ];

    #[test]
    fn mapped_weights_count_for_the_largest_stage_alone() {
        let manifest = manifest(Precision::Fp32, &FULL);
        let needed = check(&manifest, "subj01", &[], Some(100 * GB)).unwrap();
        assert_eq!(needed, PROCESS_BYTES + 11 * GB + 4 * GB);
        let needed = check(&manifest, "subj01", &[Feature::Refiner], Some(100 * GB)).unwrap();
        assert_eq!(needed, PROCESS_BYTES + 10 * GB + 3 * GB);
    }

    #[test]
    fn a_bundle_too_large_is_refused_with_both_figures_and_what_to_leave_out() {
        let manifest = manifest(Precision::Fp32, &FULL);
        let message = check(&manifest, "subj01", &[], Some(14 * GB))
            .unwrap_err()
            .to_string();
        for part in [
            "needs 15.54 GB and 14.00 GB",
            "refiner 12.00 GB (11.00 GB weights mapped, 1.00 GB working)",
            "model.without = [\"refiner\"], which needs 13.54 GB",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }

    #[test]
    fn fp16_on_a_cpu_counts_twice_and_says_so() {
        let manifest = manifest(Precision::Fp16, &FULL);
        let message = check(&manifest, "subj01", &[], Some(16 * GB))
            .unwrap_err()
            .to_string();
        for part in [
            "22.00 GB weights held as fp32",
            "widened to fp32",
            "export fp32 or int8",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }

    #[test]
    fn this_process_and_machine_have_memory() {
        assert!(resident().0 > 0);
        assert!(machine().is_some_and(|bytes| bytes > resident().0));
    }
}
