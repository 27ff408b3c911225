//! `afterimage reconstruct`: recorded betas to PNG files, offline.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bundle::{Bundle, PublicKey};
use clap::{Args, ValueEnum};
use decoder::{Decoder, Fidelity, NoiseKey, Progress, Runtime, Tier};
use ndarray::{Array3, ArrayD, ArrayViewD, Axis, Ix3};
use ndarray_npy::ViewNpyExt;
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;

use crate::decode::encode;
use crate::logging::chain;
use crate::memory::{self, Feature};
use crate::record;
use crate::roles::EXIT_SETTING;

/// Longest file of betas.
const MAX_BYTES: u64 = 4 << 30;

/// What to decode, with what, into which folder.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The bundle's folder
    #[arg(long)]
    bundle: PathBuf,
    /// Betas, z-scored: .npy (f32 or f64) or .safetensors (tensor `betas`, or the only one);
    /// `[voxel]`, `[trial, voxel]` or `[trial, repetition, voxel]`
    #[arg(long)]
    betas: PathBuf,
    /// Where the pictures go; created where it is not there
    #[arg(long)]
    out: PathBuf,
    /// Public key that must have signed the bundle; without it only the files' hashes are checked
    #[arg(long)]
    key: Option<PathBuf>,
    /// Whose ridge to use; the bundle's first where not given
    #[arg(long)]
    subject: Option<String>,
    /// How closely the original's sampling is followed
    #[arg(long, value_enum, default_value = "reference")]
    fidelity: FidelityArgument,
    /// Seed of all noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads of the networks
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// ONNX Runtime's library, where it is not beside the program
    #[arg(long)]
    onnxruntime: Option<PathBuf>,
    /// What to do without, with commas between
    #[arg(long, value_enum, value_delimiter = ',')]
    without: Vec<Feature>,
    /// Memory that the networks may have; the machine's where not given
    #[arg(long)]
    memory_mib: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum FidelityArgument {
    /// The original inference: 38 guided Euler steps in the released models
    Reference,
    /// A few consistency steps
    Edge,
}

#[derive(Debug, thiserror::Error)]
enum ReconstructError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {message}")]
    Betas { path: PathBuf, message: String },
    #[error("the bundle cannot be used")]
    Bundle(#[from] bundle::BundleError),
    #[error("--key cannot be used")]
    Key(#[from] bundle::KeyError),
    #[error("ONNX Runtime cannot be used")]
    Runtime(#[from] decoder::RuntimeError),
    #[error("the bundle does not fit this machine")]
    Memory(#[from] memory::MemoryError),
    #[error("trial {trial} cannot be decoded")]
    Decode {
        trial: usize,
        source: decoder::DecodeError,
    },
    #[error("the bundle's networks cannot be loaded")]
    Load(#[from] decoder::DecodeError),
    #[error("a picture cannot be written")]
    Png(#[from] display::png::PngError),
    #[error("the pictures cannot be written")]
    Write(#[from] record::RecordError),
    #[error("cannot write to standard output")]
    Say(#[from] std::io::Error),
}

#[derive(Serialize)]
struct Note<'n> {
    trial: u32,
    subject: &'n str,
    bundle: &'n str,
    random_weights: bool,
    fidelity: Fidelity,
    steps: usize,
    refiner_steps: usize,
    caption: Option<&'n str>,
    noise: NoiseKey,
    timings: decoder::Timings,
    software: &'n str,
}

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match reconstruct(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            match error {
                ReconstructError::Bundle(_)
                | ReconstructError::Key(_)
                | ReconstructError::Memory(_) => ExitCode::from(EXIT_SETTING),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn reconstruct(arguments: &Arguments) -> Result<(), ReconstructError> {
    let betas = read_betas(&arguments.betas)?;
    let bundle = open(&arguments.bundle, arguments.key.as_deref())?;
    let first = bundle.manifest().subjects.first();
    let first = first.map(|subject| subject.id.clone());
    let subject = arguments.subject.clone().or(first).unwrap_or_default();
    let (without, limit) = (&arguments.without, arguments.memory_mib);
    memory::check(
        bundle.manifest(),
        &subject,
        without,
        limit.map(|mib| mib << 20),
    )?;
    if let Some(remark) = memory::remark(bundle.manifest().precision) {
        let _ = writeln!(std::io::stderr(), "note: {remark}");
    }
    let bundle = bundle.without(&memory::stages_of(without));
    let manifest = bundle.manifest();
    let library = decoder::runtime::find_library(arguments.onnxruntime.as_deref())?;
    let runtime = Runtime::load(&library, arguments.threads)?;
    let fidelity = match arguments.fidelity {
        FidelityArgument::Reference => Fidelity::Reference,
        FidelityArgument::Edge => Fidelity::Edge,
    };
    let decoder = Decoder::load(&runtime, &bundle, &subject, fidelity)?;
    for off in decoder.switched_off() {
        let (feature, lacks) = (off.feature, off.lacks);
        let _ = writeln!(
            std::io::stderr(),
            "note: no {feature}, the bundle has no {lacks}"
        );
    }
    std::fs::create_dir_all(&arguments.out).map_err(record::at(&arguments.out))?;
    let trials = betas.len_of(Axis(0));
    for (index, zbetas) in betas.outer_iter().enumerate() {
        let trial = u32::try_from(index + 1).unwrap_or(u32::MAX);
        let noise = NoiseKey {
            session_seed: arguments.seed,
            run: 1,
            trial,
            tier: Tier::End,
        };
        let terminal = std::io::stderr().is_terminal();
        let mut progress = |progress: Progress<'_>| {
            if let Progress::Step { sampler, step, of } = progress
                && (terminal || step == of)
            {
                let (start, end) = if terminal { ("\r", "   ") } else { ("", "\n") };
                // Progress is a courtesy; a closed standard error stops nothing.
                let _ = write!(
                    std::io::stderr(),
                    "{start}trial {trial} of {trials}: {sampler} step {step} of {of}{end}"
                );
            }
        };
        let made = decoder
            .decode(zbetas, noise, &mut progress)
            .map_err(|source| ReconstructError::Decode {
                trial: index + 1,
                source,
            })?;
        let pictures = [
            ("blurry", &made.blurry),
            ("unrefined", &made.picture),
            ("refined", &made.refined),
        ];
        for (kind, picture) in pictures {
            if let Some(picture) = picture {
                let png = encode(picture, bundle.digest(), noise, manifest.random_weights)?;
                let name = format!("trial{trial:03}-{kind}.png");
                record::write_whole(&arguments.out.join(name), &png)?;
            }
        }
        let note = Note {
            trial,
            subject: &subject,
            bundle: bundle.digest(),
            random_weights: manifest.random_weights,
            fidelity,
            steps: made.steps,
            refiner_steps: made.refiner_steps,
            caption: made.caption.as_deref(),
            noise,
            timings: made.timings,
            software: env!("CARGO_PKG_VERSION"),
        };
        record::write_json(&arguments.out.join(format!("trial{trial:03}.json")), &note)?;
    }
    if std::io::stderr().is_terminal() {
        let _ = writeln!(std::io::stderr());
    }
    let random = if manifest.random_weights {
        "; the weights are random"
    } else {
        ""
    };
    writeln!(
        std::io::stdout(),
        "{}: {trials} trials of {subject}{random}",
        arguments.out.display()
    )?;
    Ok(())
}

fn open(dir: &Path, key: Option<&Path>) -> Result<Bundle, ReconstructError> {
    let unverified = bundle::open(dir)?;
    match key {
        Some(path) => Ok(unverified.verify(&PublicKey::from_file(path)?)?),
        None => {
            let _ = writeln!(
                std::io::stderr(),
                "note: no --key was given, the bundle's signature is not checked"
            );
            Ok(unverified.verify_hashes()?)
        }
    }
}

/// Betas as `[trial, repetition, voxel]`.
fn read_betas(path: &Path) -> Result<Array3<f32>, ReconstructError> {
    let wrong = |message: String| ReconstructError::Betas {
        path: path.into(),
        message,
    };
    let read = |source| ReconstructError::Read {
        path: path.into(),
        source,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .map_err(read)?
        .take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(wrong(format!(
            "expected at most {MAX_BYTES} bytes, found more"
        )));
    }
    let values = match path.extension().and_then(|end| end.to_str()) {
        Some("npy") => npy(&bytes).map_err(wrong)?,
        Some("safetensors") => safetensors(&bytes).map_err(wrong)?,
        _ => {
            return Err(wrong(
                "expected a file ending in .npy or .safetensors".into(),
            ));
        }
    };
    let found = values.shape().to_vec();
    let shaped = match values.ndim() {
        1 => values.insert_axis(Axis(0)).insert_axis(Axis(0)),
        2 => values.insert_axis(Axis(1)),
        _ => values,
    };
    shaped.into_dimensionality::<Ix3>().map_err(|_| {
        wrong(format!(
            "expected [voxel], [trial, voxel] or [trial, repetition, voxel], found shape {found:?}"
        ))
    })
}

/// Views compare the header's shape with the length before anything is allocated.
pub(crate) fn npy(bytes: &[u8]) -> Result<ArrayD<f32>, String> {
    match ArrayViewD::<f32>::view_npy(bytes) {
        Ok(values) => Ok(values.to_owned()),
        Err(error) => match ArrayViewD::<f64>::view_npy(bytes) {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "networks take single precision"
            )]
            Ok(values) => Ok(values.mapv(|value| value as f32)),
            Err(_) => Err(format!("expected an array of float32 or float64: {error}")),
        },
    }
}

fn safetensors(bytes: &[u8]) -> Result<ArrayD<f32>, String> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let names = tensors.names();
    let name = match names.as_slice() {
        [only] => *only,
        _ => "betas",
    };
    let view = tensors.tensor(name).map_err(|_| {
        let names: Vec<&str> = names.iter().take(8).map(|name| &**name).collect();
        format!("expected a tensor betas, found {}", names.join(", "))
    })?;
    if view.dtype() != Dtype::F32 {
        return Err(format!("{name}: expected F32, found {:?}", view.dtype()));
    }
    let values: Vec<f32> = view
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    ArrayD::from_shape_vec(view.shape().to_vec(), values).map_err(|error| error.to_string())
}
