//! `check`: recorded reference vectors through a bundle, stage by stage.
//!
//! The vectors were recorded with the original code in float32 on a CPU; the folder's README gives
//! sources and tolerances. Which file belongs to a bundle is told by the checkpoint it was
//! exported from; files of other variants are listed as not in this bundle.

mod chain;
mod figures;
mod golden;
mod lora;
mod networks;
mod pictures;
mod report;
mod samplers;
mod schedulers;
mod towers;
mod weights;
mod words;

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;

use bundle::{Bundle, BundleError, Precision, Stage as StageSpec, StageName};
use decoder::{Runtime, Stage};

use crate::audit::{self, RewriteError};
pub use figures::{StageFigures, Worst};
pub use golden::{GoldenError, Vectors};
pub(crate) use report::{Distance, HALF_COSINE, HALF_PSNR_DB};
pub use report::{Report, Row, Tolerance, Verdict};
pub use weights::WeightsError;

/// Longest list of hashes that is read.
const MAX_LIST_BYTES: u64 = 1 << 20;
/// Threads of the parity run.
const THREADS: usize = 2;

/// What to check.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// The bundle.
    pub bundle: PathBuf,
    /// Folder of reference vectors.
    pub golden: PathBuf,
    /// Where the report goes as JSON.
    pub json: Option<PathBuf>,
    /// The ONNX Runtime library.
    pub onnxruntime: Option<PathBuf>,
}

/// Why a check could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The bundle is refused.
    #[error("the bundle cannot be used")]
    Bundle(#[from] BundleError),
    /// ONNX Runtime cannot be loaded.
    #[error("ONNX Runtime cannot be used")]
    Runtime(#[from] decoder::RuntimeError),
    /// A stage cannot be opened or run.
    #[error("{stage}")]
    Stage {
        /// The stage.
        stage: String,
        /// What is wrong.
        source: decoder::StageError,
    },
    /// A stage's graph cannot be rewritten for the rounded rows.
    #[error("{path}")]
    Rewrite {
        /// The graph.
        path: PathBuf,
        /// Why.
        source: RewriteError,
    },
    /// A sampler cannot run.
    #[error("the {sampler} sampler failed")]
    Sampler {
        /// The sampler.
        sampler: &'static str,
        /// What is wrong.
        source: decoder::SamplerError,
    },
    /// The whole way cannot be gone.
    #[error("a trial cannot be decoded")]
    Decode(#[from] decoder::DecodeError),
    /// A caption cannot be made.
    #[error("captioning failed")]
    Caption(#[from] decoder::caption::CaptionError),
    /// A prompt cannot be conditioned on.
    #[error("conditioning on a prompt failed")]
    Prompt(#[from] decoder::text::PromptError),
    /// A vocabulary of the bundle is refused.
    #[error("{file} is refused")]
    Vocabulary {
        /// The file.
        file: PathBuf,
        /// Why.
        source: decoder::text::TextError,
    },
    /// A file of the bundle cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The reference vectors cannot be used.
    #[error("the reference vectors cannot be used")]
    Golden(#[from] GoldenError),
    /// The bundle's weights cannot be read back.
    #[error("the bundle's weights cannot be read back")]
    Weights(#[from] WeightsError),
    /// No folder of reference vectors.
    #[error("{path} is not a folder")]
    NoFolder {
        /// What was given.
        path: PathBuf,
    },
    /// The report cannot be written.
    #[error("cannot write the report to {path}")]
    Report {
        /// Where it should go.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The report cannot be put into JSON.
    #[error("cannot write the report as JSON")]
    Json(#[from] serde_json::Error),
}

/// Runs the check, prints the table to `out`; true where everything compared is near enough.
///
/// # Errors
/// [`CheckError`] where it could not be made.
pub fn run(options: &CheckOptions, out: &mut dyn Write) -> Result<bool, CheckError> {
    if !options.golden.is_dir() {
        return Err(CheckError::NoFolder {
            path: options.golden.clone(),
        });
    }
    let bundle = bundle::open(&options.bundle)?.verify_hashes()?;
    let library = decoder::runtime::find_library(options.onnxruntime.as_deref())?;
    let parity = Parity {
        runtime: Runtime::load(&library, THREADS)?,
        golden: options.golden.clone(),
        bundle,
        arithmetic: Arithmetic::AsLoaded,
    };
    let report = parity.report()?;
    let printed = |source| CheckError::Report {
        path: "standard output".into(),
        source,
    };
    report.print(out).map_err(printed)?;
    if let Some(path) = &options.json {
        let mut bytes = serde_json::to_vec_pretty(&report)?;
        bytes.push(b'\n');
        fs::write(path, bytes).map_err(|source| CheckError::Report {
            path: path.clone(),
            source,
        })?;
    }
    Ok(report.passed())
}

/// Which checkpoint of the reference set a bundle's MindEye2 stages were exported from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Main,
    Half,
    Legacy,
    TwoTokens,
    Control,
}

/// What becomes of intermediates that a graph holds in fp16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arithmetic {
    /// What ONNX Runtime makes of it.
    AsLoaded,
    /// Each is rounded to fp16.
    Rounded,
}

/// A bundle beside its reference vectors.
#[derive(Clone)]
struct Parity {
    arithmetic: Arithmetic,
    runtime: Runtime,
    bundle: Bundle,
    golden: PathBuf,
}

type Rows = Result<Vec<Row>, CheckError>;

impl Parity {
    fn report(&self) -> Result<Report, CheckError> {
        let mut rows = self.rows()?;
        if self.precision() == Precision::Fp16 {
            rows.extend(self.rounded_rows()?);
        }
        rows.extend(self.lora_rows()?);
        rows.extend(self.scheduler_rows()?);
        let arithmetic = match self.precision() {
            Precision::Fp32 => "ONNX Runtime on the CPU, fp32",
            Precision::Int8 => "ONNX Runtime on the CPU: 8-bit integer products, fp32 elsewhere",
            Precision::Fp16 => "ONNX Runtime on the CPU: fp16 weights, fp32 arithmetic",
        };
        Ok(Report {
            precision: self.precision(),
            arithmetic: arithmetic.into(),
            stages: self.figures(&rows)?,
            rows,
        })
    }

    /// Single calls of each stage with every intermediate rounded to fp16.
    fn rounded_rows(&self) -> Rows {
        let rounded = Parity {
            arithmetic: Arithmetic::Rounded,
            ..self.clone()
        };
        let mut rows = rounded.rows()?;
        rows.retain(|row| {
            row.verdict != Verdict::NotInThisBundle
                && figures::stage_of(&row.vectors, &row.quantity).is_some()
        });
        for row in &mut rows {
            row.rounded = true;
            let remark = match row.note.as_str() {
                "" => "rounded to fp16".into(),
                note => format!("rounded to fp16, {note}"),
            };
            row.note = remark;
        }
        Ok(rows)
    }

    /// Whether samplers are run: with every intermediate rounded, single calls tell enough.
    fn samples(&self) -> bool {
        self.arithmetic == Arithmetic::AsLoaded
    }

    fn rows(&self) -> Rows {
        let mut rows = Vec::new();
        rows.extend(self.mindeye_rows()?);
        rows.extend(self.blurry_rows()?);
        rows.extend(self.unclip_rows()?);
        rows.extend(self.tower_rows()?);
        if self.samples() {
            rows.extend(self.word_rows()?);
            rows.extend(self.picture_rows()?);
            rows.extend(self.chain_rows()?);
        }
        Ok(rows)
    }

    fn precision(&self) -> Precision {
        self.bundle.manifest().precision
    }

    /// The variant: the weights decide which vectors fit. The reference set's own list of hashes
    /// knows the checkpoint whatever it is called now; without one its name has to do.
    fn variant(&self) -> Option<Variant> {
        let sources = &self.bundle.manifest().sources;
        let source = sources.iter().find(|source| source.role == "mindeye")?;
        let recorded = self.recorded_name(&source.sha256);
        match recorded.as_deref().unwrap_or(&source.file) {
            "last.pth" => Some(Variant::Main),
            "last_fp16.pth" => Some(Variant::Half),
            "last_legacy.pth" => Some(Variant::Legacy),
            "extra_seq2.pth" => Some(Variant::TwoTokens),
            "control_ok.pth" | "valid_strided_view.pth" | "valid_deflated_zip.pth" => {
                Some(Variant::Control)
            }
            _ => None,
        }
    }

    /// The name that `MANIFEST.sha256` of the reference set gives to a file of this hash.
    fn recorded_name(&self, sha256: &str) -> Option<String> {
        let path = self.golden.join("MANIFEST.sha256");
        let mut text = String::new();
        fs::File::open(path)
            .ok()?
            .take(MAX_LIST_BYTES)
            .read_to_string(&mut text)
            .ok()?;
        let line = text.lines().find(|line| line.starts_with(sha256))?;
        let name = line.split_whitespace().nth(1)?.trim_start_matches('*');
        Some(name.rsplit('/').next().unwrap_or(name).to_owned())
    }

    fn vectors(&self, name: &str) -> Result<Option<Vectors>, CheckError> {
        Ok(Vectors::read(&self.golden, name)?)
    }

    /// A stage of the checkpoint's own weights; none where a LoRA was merged into it, because the
    /// vectors of the unmerged network do not belong to it.
    fn stage(&self, name: StageName) -> Result<Option<Stage>, CheckError> {
        if self.is_merged(name) {
            return Ok(None);
        }
        self.merged_stage(name)
    }

    fn is_merged(&self, name: StageName) -> bool {
        let loras = &self.bundle.manifest().loras;
        loras.iter().any(|lora| lora.merged.contains_key(&name))
    }

    /// Why [`Self::stage`] has none of these.
    fn without(&self, names: &[StageName]) -> String {
        let merged = names.iter().find(|name| self.is_merged(**name));
        if let Some(name) = merged {
            return format!("recorded without the LoRA that is merged into {name}");
        }
        let stages = &self.bundle.manifest().stages;
        let missing = names.iter().filter(|name| !stages.contains_key(name));
        let missing: Vec<&str> = missing.map(|name| name.as_str()).collect();
        format!("the bundle has no {}", missing.join(", no "))
    }

    /// A stage, whatever was merged into it.
    fn merged_stage(&self, name: StageName) -> Result<Option<Stage>, CheckError> {
        let Some(spec) = self.bundle.manifest().stages.get(&name) else {
            return Ok(None);
        };
        self.open(name.as_str(), spec).map(Some)
    }

    fn open(&self, name: &str, spec: &StageSpec) -> Result<Stage, CheckError> {
        let failed = |source| CheckError::Stage {
            stage: name.into(),
            source,
        };
        if self.arithmetic == Arithmetic::AsLoaded {
            return Stage::open(&self.runtime, &self.bundle, spec).map_err(failed);
        }
        let path = self.bundle.dir().join(&spec.graph);
        let bytes = fs::read(&path).map_err(|source| CheckError::Read {
            path: path.clone(),
            source,
        })?;
        let graph =
            audit::emulated(&bytes).map_err(|source| CheckError::Rewrite { path, source })?;
        Stage::open_as_written(&self.runtime, self.bundle.dir(), spec, &graph).map_err(failed)
    }
}
