//! From a plan to a bundle: open, describe, check, write.
//!
//! 1. Open every checkpoint; a container that cannot be read stops here.
//! 2. Describe each stage's graph. Missing keys, wrong shapes and unknown tensors are noted.
//! 3. Anything noted stops here, after the numbers of all tensors were looked at as well.
//! 4. Stream the weights, converted and checked.
//! 5. Run each network of an fp16 bundle ([`crate::audit`]), which decides what stays in fp32.
//! 6. Write the graphs, then the manifest.
//!
//! The target appears whole or not at all.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use bundle::{
    Audit, BundleWriter, FORMAT_VERSION, Manifest, Precision, Source, Stage, StageName, Subject,
    Tokenizers, WriteError,
};
use prost::Message;
use sha2::{Digest, Sha256};

use crate::audit::{self, AuditError, Audited, Auditor, Held, Islands, Verdict};
use crate::checkpoint::{Checkpoint, CheckpointError, Part, TensorRef};
use crate::describe::{Description, describe};
use crate::graph::Graph;
use crate::plan::Plan;
use crate::section::{Problem, Section, chain};
use crate::weights::{self, Rounding, Written};

/// Role of the files that are merged into other sources.
pub(crate) const LORA: &str = "lora";
/// Largest mask that is carried in a bundle.
const MAX_MASK_BYTES: u64 = 64 << 20;

/// What every key starts with where a model was saved in its wrapper.
const WRAPPER: &str = "module.";
/// Weights that only the audit needs; gone before the bundle is.
const PASSING: &str = "audit.bin";

/// Why no bundle was written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A checkpoint cannot be opened.
    #[error("{path}")]
    Open {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with its container.
        source: CheckpointError,
    },
    /// Several checkpoints cannot be opened.
    #[error("{} checkpoints cannot be opened:\n{}", .failures.len(), unopened(.failures))]
    OpenSeveral {
        /// Each with what is wrong with its container.
        failures: Vec<(PathBuf, CheckpointError)>,
    },
    /// The checkpoints are not what the networks need; every problem is listed.
    #[error("{} found, nothing was written:\n{}", counted(.problems.len()), listed(.problems))]
    Problems {
        /// All of them, by file and key.
        problems: Vec<Problem>,
    },
    /// A source or a mask cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The bundle cannot be written.
    #[error("cannot write the bundle")]
    Write(#[from] WriteError),
    /// A network does not do what it must in fp16.
    #[error("the audit found the bundle wanting, nothing was written")]
    Audit(#[from] AuditError),
    /// A tensor cannot be read while it is written to the bundle.
    #[error("cannot read {key}")]
    Tensor {
        /// Name of the weight.
        key: String,
        /// What is wrong.
        source: CheckpointError,
    },
}

fn unopened(failures: &[(PathBuf, CheckpointError)]) -> String {
    let line = |(path, error): &(PathBuf, CheckpointError)| {
        format!("  {}: {}", path.display(), chain(error))
    };
    failures.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn counted(problems: usize) -> String {
    if problems == 1 {
        "1 problem".into()
    } else {
        format!("{problems} problems")
    }
}

fn listed(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(|problem| format!("  {problem}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A graph and where it goes.
pub(crate) struct Planned<'c> {
    /// Where it goes.
    pub(crate) place: Place,
    /// The network.
    pub(crate) graph: Graph<'c>,
}

/// Where a graph goes in the bundle.
pub(crate) enum Place {
    Shared(StageName),
    Subject {
        id: String,
        index: u64,
        voxels: u64,
        mask: Option<PathBuf>,
    },
}

impl Place {
    pub(crate) fn label(&self) -> String {
        match self {
            Place::Shared(name) => name.to_string(),
            Place::Subject { id, .. } => format!("subject {id}"),
        }
    }

    fn paths(&self) -> (String, String) {
        match self {
            Place::Shared(name) => (format!("graphs/{name}.onnx"), format!("weights/{name}.bin")),
            Place::Subject { id, .. } => (
                format!("subjects/{id}/ridge.onnx"),
                format!("subjects/{id}/ridge.bin"),
            ),
        }
    }
}

/// A checkpoint of the plan, open.
pub(crate) struct Opened {
    /// What it is for.
    pub(crate) role: &'static str,
    path: PathBuf,
    checkpoint: Checkpoint,
}

impl Opened {
    /// File name without its folder.
    pub(crate) fn file(&self) -> String {
        file_name(&self.path)
    }

    /// The tensors at the top.
    pub(crate) fn root(&self) -> Vec<(String, TensorRef<'_>)> {
        self.checkpoint.root()
    }

    /// The tensors under the checkpoint's usual key, or at its root.
    pub(crate) fn section(&self, root: Option<&str>) -> Result<Section<'_>, Problem> {
        let mut tensors = match root {
            Some(root) => self.checkpoint.model(root).map_err(|error| Problem {
                file: self.file(),
                key: root.into(),
                message: chain(&error),
            })?,
            None => self.checkpoint.root(),
        };
        // Training on several GPUs wraps the model once more; the original loader takes that off too.
        if tensors.iter().all(|(key, _)| key.starts_with(WRAPPER)) {
            for (key, _) in &mut tensors {
                key.drain(..WRAPPER.len());
            }
        }
        Ok(Section::new(&self.file(), tensors).spelt(self.checkpoint.names()))
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn open(plan: &Plan) -> Result<Vec<Opened>, ExportError> {
    let sources = [
        ("mindeye", &plan.mindeye),
        ("unclip", &plan.unclip),
        ("autoenc", &plan.autoenc),
        ("sdxl", &plan.sdxl),
        ("bridge", &plan.bridge),
        ("captioner", &plan.captioner),
        ("preview", &plan.preview),
    ];
    let sources = sources
        .into_iter()
        .filter_map(|(role, path)| path.clone().map(|path| (role, path)))
        .chain(plan.loras.iter().map(|lora| (LORA, lora.file.clone())));
    let mut opened = Vec::new();
    let mut failures = Vec::new();
    for (role, path) in sources {
        match Checkpoint::open(&path) {
            // The manifest has one source for each file of the plan.
            Ok(checkpoint) if role == LORA && checkpoint.parts().len() != 1 => {
                let found = format!("a LoRA of {} files", checkpoint.parts().len());
                failures.push((path, CheckpointError::Container { found }));
            }
            Ok(checkpoint) => opened.push(Opened {
                role,
                path,
                checkpoint,
            }),
            Err(source) => failures.push((path, source)),
        }
    }
    match failures.len() {
        0 => Ok(opened),
        1 => {
            let (path, source) = failures.remove(0);
            Err(ExportError::Open { path, source })
        }
        _ => Err(ExportError::OpenSeveral { failures }),
    }
}

/// What an export says of each network that was audited.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Report {
    /// In the order they were written; empty for fp32 and without an audit.
    pub stages: Vec<StageReport>,
}

/// One network's audit, with what differs from run to run and is not kept in the manifest.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct StageReport {
    /// The network.
    pub stage: String,
    /// As in the manifest.
    #[serde(flatten)]
    pub audit: bundle::StageAudit,
    /// Wall time of one call with every intermediate rounded, milliseconds.
    pub milliseconds: f64,
    /// Memory around that call.
    pub memory: audit::memory::Resident,
}

/// Exports a plan to `out`; `say` is told of each step.
///
/// # Errors
/// [`ExportError`]; nothing is left behind.
pub fn export(plan: &Plan, out: &Path, say: &mut dyn FnMut(&str)) -> Result<Report, ExportError> {
    let opened = open(plan)?;
    let mut description = describe(plan, &opened)?;
    description.planned.retain(|planned| match planned.place {
        Place::Shared(name) => !plan.without.contains(&name),
        Place::Subject { .. } => true,
    });
    for (lora, merged) in plan.loras.iter().zip(&description.loras) {
        merged.say(&file_name(&lora.file), say);
    }
    let mut writer = BundleWriter::create(out)?;
    let mut auditor = if audit::wanted(plan) {
        let reduced = |precision| describe(&audit::reduced(plan, precision), &opened);
        let (wide, half) = (reduced(Precision::Fp32)?, reduced(Precision::Fp16)?);
        Some(Auditor::new(plan, writer.dir().to_owned(), wide, half)?)
    } else {
        None
    };
    let (stages, sources) = std::thread::scope(|scope| {
        let hashing = scope.spawn(|| {
            opened
                .iter()
                .map(hash_source)
                .collect::<Result<Vec<_>, _>>()
                .map(|sources| sources.concat())
        });
        let planned = &mut description.planned;
        let written = write_stages(planned, &mut writer, auditor.as_mut(), say);
        let sources = hashing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, ExportError>((written?, sources?))
    })?;

    let tokenizers = add_vocabularies(&mut writer, &description)?;
    // Sources were opened in this order: the plan's own, then its LoRA files.
    let (lora_files, sources): (Vec<Source>, Vec<Source>) =
        sources.into_iter().partition(|source| source.role == LORA);
    let mut manifest = Manifest {
        format_version: FORMAT_VERSION,
        bundle_version: plan.bundle_version,
        family: "mindeye2".into(),
        precision: plan.precision,
        random_weights: plan.random_weights,
        stages: BTreeMap::new(),
        subjects: Vec::new(),
        blurry: description.blurry,
        prior: description.prior,
        unclip: description.unclip,
        refiner: description.refiner,
        tokenizers,
        audit: auditor.is_some().then(Audit::default),
        sources,
        loras: lora_files
            .into_iter()
            .zip(plan.loras.iter().zip(description.loras))
            .map(|(source, (lora, merged))| merged.record(lora, source))
            .collect(),
        licences: plan.licences.clone(),
        files: BTreeMap::new(),
    };
    let mut report = Report::default();
    for (planned, (stage, audited)) in description.planned.into_iter().zip(stages) {
        if let (Some(audit), Some(audited)) = (&mut manifest.audit, audited) {
            report.stages.push(StageReport {
                stage: planned.place.label(),
                audit: audited.record.clone(),
                milliseconds: audited.milliseconds,
                memory: audited.memory,
            });
            match &planned.place {
                Place::Shared(name) => audit.stages.insert(*name, audited.record),
                Place::Subject { id, .. } => audit.subjects.insert(id.clone(), audited.record),
            };
        }
        match planned.place {
            Place::Shared(name) => {
                manifest.stages.insert(name, stage);
            }
            Place::Subject {
                id,
                index,
                voxels,
                mask,
            } => {
                let mask = mask
                    .map(|path| add_mask(&mut writer, &id, &path))
                    .transpose()?;
                let index = u32::try_from(index).unwrap_or(u32::MAX);
                manifest.subjects.push(Subject {
                    id,
                    index,
                    voxels,
                    stage,
                    mask,
                });
            }
        }
    }
    writer.finish(manifest)?;
    Ok(report)
}

fn add_vocabularies(
    writer: &mut BundleWriter,
    description: &Description<'_>,
) -> Result<Option<Tokenizers>, WriteError> {
    let mut add = |name: &str, bytes: &Option<Vec<u8>>| match bytes {
        Some(bytes) => {
            let relative = format!("tokenizers/{name}.json");
            writer.add(&relative, bytes)?;
            Ok::<_, WriteError>(Some(relative))
        }
        None => Ok(None),
    };
    let tokenizers = Tokenizers {
        clip: add("clip", &description.clip)?,
        caption: add("caption", &description.caption)?,
    };
    Ok((tokenizers != Tokenizers::default()).then_some(tokenizers))
}

fn add_mask(writer: &mut BundleWriter, id: &str, path: &Path) -> Result<String, ExportError> {
    let error = |source| ExportError::Read {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .map_err(error)?
        .take(MAX_MASK_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(error)?;
    if bytes.len() as u64 > MAX_MASK_BYTES {
        return Err(error(std::io::Error::other(format!(
            "expected at most {MAX_MASK_BYTES} bytes"
        ))));
    }
    let packed = bytes.starts_with(&[0x1f, 0x8b]);
    let relative = format!("subjects/{id}/mask.nii{}", if packed { ".gz" } else { "" });
    writer.add(&relative, &bytes)?;
    Ok(relative)
}

/// One row for each file that the checkpoint consists of, its index and settings included.
fn hash_source(opened: &Opened) -> Result<Vec<Source>, ExportError> {
    let parts = opened.checkpoint.parts().iter();
    parts.map(|part| hash_part(opened.role, part)).collect()
}

fn hash_part(role: &str, part: &Part) -> Result<Source, ExportError> {
    let error = |source| ExportError::Read {
        path: part.path.clone(),
        source,
    };
    let mut file = File::open(&part.path).map_err(error)?;
    let (mut hasher, mut len_bytes, mut block) = (Sha256::new(), 0_u64, vec![0_u8; 1 << 20]);
    loop {
        let read = file.read(&mut block).map_err(error)?;
        if read == 0 {
            break;
        }
        hasher.update(&block[..read]);
        len_bytes += read as u64;
    }
    let sha256 = hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(Source {
        role: role.into(),
        file: part.name.clone(),
        len_bytes,
        sha256,
    })
}

/// Writes weights and graphs in plan order; all numbers are checked, and all bad ones named, before it fails.
fn write_stages(
    planned: &mut [Planned<'_>],
    writer: &mut BundleWriter,
    mut auditor: Option<&mut Auditor<'_>>,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<(Stage, Option<Audited>)>, ExportError> {
    let mut problems = Vec::new();
    let mut weights = Vec::new();
    for stage in planned.iter() {
        let (written, len_bytes) = write_weights(stage, writer, &mut problems)?;
        say(&format!(
            "{}: {} tensors, {}",
            stage.place.label(),
            written.len(),
            megabytes(len_bytes)
        ));
        if auditor.is_none() {
            problems.extend(beyond(&stage.graph, &written));
        }
        weights.push(written);
    }
    if !problems.is_empty() {
        return Err(ExportError::Problems { problems });
    }
    let mut stages = Vec::new();
    for (index, (stage, mut written)) in planned.iter_mut().zip(weights).enumerate() {
        let audited = match auditor.as_deref_mut() {
            Some(auditor) => Some(look(auditor, index, stage, &mut written, writer, say)?),
            None => None,
        };
        if let Some(audited) = &audited {
            say(&told(&stage.place, audited));
        }
        let (graph_path, weights_path) = stage.place.paths();
        let offsets: Vec<u64> = written.iter().map(|written| written.offset).collect();
        let mut model = stage.graph.model(&weights_path, &offsets);
        let islands = audited
            .as_ref()
            .map_or(&Islands::default(), |a| &a.islands)
            .clone();
        islands.apply(model.graph.get_or_insert_default());
        writer.add(&graph_path, &model.encode_to_vec())?;
        let (inputs, outputs) = stage.graph.specs();
        let shipped = Stage {
            graph: graph_path,
            weights: Some(weights_path),
            inputs,
            outputs,
            working_bytes: stage.graph.working_bytes(),
        };
        stages.push((shipped, audited));
    }
    Ok(stages)
}

fn write_weights(
    stage: &Planned<'_>,
    writer: &mut BundleWriter,
    problems: &mut Vec<Problem>,
) -> Result<(Vec<Written>, u64), ExportError> {
    let mut file = writer.weights(&stage.place.paths().1)?;
    let written = weights::write(stage.graph.weights(), &mut file, problems)?;
    let len_bytes = file.len_bytes();
    writer.close(file)?;
    Ok((written, len_bytes))
}

fn beyond(graph: &Graph<'_>, written: &[Written]) -> Vec<Problem> {
    let all = graph.weights().iter().zip(written);
    all.filter_map(|(weight, written)| match written.rounding {
        Rounding::Beyond { value, index } => Some(weights::beyond(weight, value, index)),
        _ => None,
    })
    .collect()
}

/// Audits one network; writes its weights anew where some must be stored in fp32.
fn look(
    auditor: &mut Auditor<'_>,
    index: usize,
    stage: &mut Planned<'_>,
    written: &mut Vec<Written>,
    writer: &mut BundleWriter,
    say: &mut dyn FnMut(&str),
) -> Result<Audited, ExportError> {
    let path = stage.place.paths().1;
    // Numbers were checked when they were written first.
    let mut problems = Vec::new();
    let mut wide = audit::unfit(&stage.graph, written);
    loop {
        if !wide.is_empty() {
            stage.graph.keep_wide(&wide);
            writer.remove(&path)?;
            *written = write_weights(stage, writer, &mut problems)?.0;
        }
        let held = Held {
            path: &path,
            graph: &stage.graph,
            written,
            wide: &wide,
        };
        let mut file = writer.weights(PASSING)?;
        let places = weights::write(&auditor.missing(index, &held), &mut file, &mut problems)?;
        writer.close(file)?;
        writer.settle()?;
        let verdict = auditor.look(index, &held, (PASSING, &places), say);
        writer.remove(PASSING)?;
        match verdict? {
            Verdict::Done(audited) => return Ok(*audited),
            Verdict::Store(more) => wide = more,
        }
    }
}

fn told(place: &Place, audited: &Audited) -> String {
    let record = &audited.record;
    let psnr = record
        .psnr_db
        .map_or(String::new(), |psnr| format!(", {psnr:.1} dB"));
    format!(
        "{}: largest {} at {}; {} nodes and {} weights in fp32; rounded to fp16: cosine {:.6}{psnr}, {:.0} ms, {} at most",
        place.label(),
        record.largest,
        record.at,
        record.islands.len(),
        record.fp32_weights.len(),
        record.cosine,
        audited.milliseconds,
        megabytes(audited.memory.peak_bytes),
    )
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn megabytes(len: u64) -> String {
    format!("{:.1} MB", len as f64 / 1e6)
}
