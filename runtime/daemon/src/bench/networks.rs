//! Time and memory of every stage of a bundle on this machine.
//!
//! 1. Each stage alone: opened, called with noise, closed.
//! 2. All stages of a picture, as the box holds them, and one whole picture.
//!
//! Peaks of memory are looked at every few milliseconds while a stage runs.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bundle::{Bundle, DType, Dim, PublicKey, Stage as StageSpec, TensorSpec};
use clap::Args;
use decoder::{Decoder, Fidelity, Noise, NoiseKey, Runtime, Stage, Stream, Tier, Timings};
use ndarray::{Array2, ArrayD};
use serde::Serialize;

use super::Resident;
use crate::memory::{self, Feature};

/// How often memory is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Noise of the inputs.
const KEY: NoiseKey = NoiseKey {
    session_seed: 0,
    run: 1,
    trial: 1,
    tier: Tier::End,
};

/// What to measure, and how often.
#[derive(Args)]
#[group(skip)]
#[command(next_help_heading = "Networks")]
pub(super) struct Arguments {
    /// Measure the networks of the bundle in this folder
    #[arg(long, value_name = "DIR")]
    pub(super) bundle: Option<PathBuf>,
    /// Public key that must have signed the bundle; without it only the files' hashes are checked
    #[arg(long, conflicts_with = "front_end")]
    key: Option<PathBuf>,
    /// Whose ridge to use; the bundle's first where not given
    #[arg(long, conflicts_with = "front_end")]
    subject: Option<String>,
    /// Calls of each stage; the median counts
    #[arg(long, conflicts_with = "front_end", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    calls: u32,
    /// Only these stages, with commas between, and no whole picture
    #[arg(long, conflicts_with = "front_end", value_delimiter = ',')]
    stages: Vec<String>,
    /// Threads of the networks
    #[arg(long, conflicts_with = "front_end", default_value_t = 2)]
    threads: usize,
    /// What to do without, with commas between
    #[arg(long, conflicts_with = "front_end", value_enum, value_delimiter = ',')]
    without: Vec<Feature>,
    /// Memory that the networks may have; the machine's where not given
    #[arg(long, conflicts_with = "front_end")]
    memory_mib: Option<u64>,
    /// ONNX Runtime's library, where it is not beside the program
    #[arg(long, conflicts_with = "front_end")]
    onnxruntime: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum NetworksError {
    #[error("the bundle cannot be used")]
    Bundle(#[from] bundle::BundleError),
    #[error("--key cannot be used")]
    Key(#[from] bundle::KeyError),
    #[error("the bundle does not fit this machine")]
    Memory(#[from] memory::MemoryError),
    #[error("ONNX Runtime cannot be used")]
    Runtime(#[from] decoder::RuntimeError),
    #[error("the bundle has no stage {asked}; it has {known}")]
    Unknown { asked: String, known: String },
    #[error("{stage}")]
    Stage {
        stage: String,
        source: decoder::StageError,
    },
    #[error("the whole picture cannot be decoded")]
    Decode(#[from] decoder::DecodeError),
    #[error("cannot write to standard output")]
    Say(#[source] std::io::Error),
}

impl NetworksError {
    /// No other try will mend it.
    pub(super) fn is_setting(&self) -> bool {
        matches!(
            self,
            NetworksError::Bundle(_) | NetworksError::Key(_) | NetworksError::Memory(_)
        )
    }
}

/// One stage's figures.
#[derive(Debug, Serialize)]
struct StageFigures {
    stage: String,
    /// Bytes of the weights' file.
    weights: u64,
    /// Bytes of intermediate values, as the manifest says.
    working: u64,
    load_ms: f64,
    /// Median.
    call_ms: f64,
    /// What the stage added, after it was opened.
    loaded: Resident,
    /// What it added at most while it was called.
    peak: Resident,
}

impl StageFigures {
    const HEADER: &str = "stage                   weights    working    load ms    call ms     loaded     mapped       peak     mapped";
}

impl fmt::Display for StageFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: u64| bytes / 1_000_000;
        write!(
            f,
            "{:<20} {:>10} {:>10} {:>10.1} {:>10.1} {:>10} {:>10} {:>10} {:>10}",
            self.stage,
            megabytes(self.weights),
            megabytes(self.working),
            self.load_ms,
            self.call_ms,
            megabytes(self.loaded.anonymous),
            megabytes(self.loaded.mapped),
            megabytes(self.peak.anonymous),
            megabytes(self.peak.mapped)
        )
    }
}

/// The whole box's figures.
#[derive(Debug, Serialize)]
struct PictureFigures {
    fidelity: Fidelity,
    steps: usize,
    load_ms: f64,
    /// One picture, from betas to pixels; the stages were called before, alone.
    picture_ms: f64,
    timings: Timings,
    loaded: Resident,
    peak: Resident,
}

impl fmt::Display for PictureFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |millis: f64| millis / 1e3;
        write!(
            f,
            "whole picture, {} steps: {:.1} s, loaded in {:.1} s\n  \
             brain {:.1} s, blurry {:.1} s, prior {:.1} s, unclip {:.1} s, vae {:.1} s\n  \
             the box: {} of its own after load, {} of its own and {} mapped at most",
            self.steps,
            seconds(self.picture_ms),
            seconds(self.load_ms),
            seconds(self.timings.brain_ms),
            seconds(self.timings.blurry_ms),
            seconds(self.timings.prior_ms),
            seconds(self.timings.unclip_ms),
            seconds(self.timings.vae_ms),
            memory::gigabytes(self.loaded.anonymous),
            memory::gigabytes(self.peak.anonymous),
            memory::gigabytes(self.peak.mapped)
        )
    }
}

/// The networks' figures.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    bundle: String,
    precision: bundle::Precision,
    random_weights: bool,
    threads: usize,
    calls: u32,
    /// What the memory plan expects, bytes.
    planned: u64,
    stages: Vec<StageFigures>,
    picture: Option<PictureFigures>,
}

/// Measures a bundle; each line is said when it is known.
pub(super) fn bench(
    arguments: &Arguments,
    bundle: &Path,
    out: &mut impl Write,
) -> Result<Figures, NetworksError> {
    let unverified = bundle::open(bundle)?;
    let bundle = match &arguments.key {
        Some(path) => unverified.verify(&PublicKey::from_file(path)?)?,
        None => unverified.verify_hashes()?,
    };
    let first = bundle.manifest().subjects.first();
    let first = first.map(|subject| subject.id.clone());
    let subject = arguments.subject.clone().or(first).unwrap_or_default();
    let (without, limit) = (&arguments.without, arguments.memory_mib);
    let planned = memory::check(
        bundle.manifest(),
        &subject,
        without,
        limit.map(|mib| mib << 20),
    )?;
    let bundle = bundle.without(&memory::stages_of(without));
    let manifest = bundle.manifest();
    if let Some(remark) = memory::remark(manifest.precision) {
        let _ = writeln!(std::io::stderr(), "note: {remark}");
    }
    let library = decoder::runtime::find_library(arguments.onnxruntime.as_deref())?;
    let runtime = Runtime::load(&library, arguments.threads)?;

    let random = if manifest.random_weights {
        ", random weights"
    } else {
        ""
    };
    writeln!(
        out,
        "{} bundle{random}, {} threads, median of {} calls, planned {}; MB: weights' file, working memory as \
         the manifest says, what the stage added after load and at most",
        manifest.precision,
        arguments.threads,
        arguments.calls,
        memory::gigabytes(planned)
    )
    .and_then(|()| writeln!(out, "{}", StageFigures::HEADER))
    .map_err(NetworksError::Say)?;
    let mut figures = Figures {
        bundle: bundle.digest().into(),
        precision: manifest.precision,
        random_weights: manifest.random_weights,
        threads: arguments.threads,
        calls: arguments.calls,
        planned,
        stages: Vec::new(),
        picture: None,
    };
    for (name, spec) in chosen(&bundle, &subject, &arguments.stages)? {
        let measured = measure(&runtime, &bundle, &name, spec, arguments.calls)?;
        writeln!(out, "{measured}").map_err(NetworksError::Say)?;
        figures.stages.push(measured);
    }
    if arguments.stages.is_empty() && manifest.subject(&subject).is_some() {
        let picture = whole_picture(&runtime, &bundle, &subject)?;
        writeln!(out, "{picture}").map_err(NetworksError::Say)?;
        figures.picture = Some(picture);
    }
    Ok(figures)
}

/// The person's ridge and the shared stages, or those that were asked for.
fn chosen<'b>(
    bundle: &'b Bundle,
    subject: &str,
    asked: &[String],
) -> Result<Vec<(String, &'b StageSpec)>, NetworksError> {
    let manifest = bundle.manifest();
    let ridge = manifest
        .subject(subject)
        .map(|subject| ("subject".to_owned(), &subject.stage));
    let shared = manifest
        .stages
        .iter()
        .map(|(name, stage)| (name.as_str().to_owned(), stage));
    let all: Vec<(String, &StageSpec)> = ridge.into_iter().chain(shared).collect();
    if let Some(asked) = asked
        .iter()
        .find(|asked| all.iter().all(|(name, _)| name != *asked))
    {
        let known: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        return Err(NetworksError::Unknown {
            asked: asked.clone(),
            known: known.join(", "),
        });
    }
    let wanted = |name: &String| asked.is_empty() || asked.contains(name);
    Ok(all.into_iter().filter(|(name, _)| wanted(name)).collect())
}

fn measure(
    runtime: &Runtime,
    bundle: &Bundle,
    name: &str,
    spec: &StageSpec,
    calls: u32,
) -> Result<StageFigures, NetworksError> {
    let failed = |source| NetworksError::Stage {
        stage: name.into(),
        source,
    };
    let inputs: Vec<(&str, ArrayD<f32>)> = spec
        .inputs
        .iter()
        .map(|input| (input.name.as_str(), example(input)))
        .collect();
    let views: Vec<_> = inputs
        .iter()
        .map(|(name, values)| (*name, values.view()))
        .collect();
    let before = Resident::now();
    let watch = Watch::start();
    let clock = Instant::now();
    let stage = Stage::open(runtime, bundle, spec).map_err(failed)?;
    let load_ms = millis(clock);
    let loaded = Resident::now().since(before);
    let mut times = Vec::new();
    for _ in 0..calls {
        let clock = Instant::now();
        stage.run(&views).map_err(failed)?;
        times.push(millis(clock));
    }
    times.sort_by(f64::total_cmp);
    let peak = watch.stop().since(before);
    let weights = spec
        .weights
        .as_ref()
        .and_then(|path| bundle.manifest().files.get(path));
    Ok(StageFigures {
        stage: name.into(),
        weights: weights.map_or(0, |file| file.len_bytes),
        working: spec.working_bytes,
        load_ms,
        call_ms: times[times.len() / 2],
        loaded,
        peak,
    })
}

/// Noise of a stage's input at batch 1; token ids, which must be in a vocabulary, are the first one.
fn example(spec: &TensorSpec) -> ArrayD<f32> {
    let shape: Vec<usize> = spec
        .shape
        .iter()
        .map(|dim| match dim {
            Dim::Batch(_) => 1,
            Dim::Fixed(len) => usize::try_from(*len).unwrap_or(usize::MAX),
        })
        .collect();
    match (spec.dtype, spec.name.as_str()) {
        (DType::I64, _) => ArrayD::zeros(shape),
        (_, "timestep") => ArrayD::from_elem(shape, 50.0),
        (_, "keep") => ArrayD::ones(shape),
        _ => Noise::new(KEY, Stream::Unclip).draw(&shape),
    }
}

fn whole_picture(
    runtime: &Runtime,
    bundle: &Bundle,
    subject: &str,
) -> Result<PictureFigures, NetworksError> {
    let watch = Watch::start();
    let clock = Instant::now();
    let decoder = Decoder::load(runtime, bundle, subject, Fidelity::Edge)?;
    let load_ms = millis(clock);
    let loaded = Resident::now();
    let betas = Noise::new(KEY, Stream::Prior).draw(&[decoder.voxels()]);
    let betas = Array2::from_shape_fn((1, decoder.voxels()), |(_, voxel)| betas[[voxel]]);
    let clock = Instant::now();
    let made = decoder.decode(betas.view(), KEY, &mut |_| {})?;
    let picture_ms = millis(clock);
    Ok(PictureFigures {
        fidelity: decoder.fidelity(),
        steps: made.steps,
        load_ms,
        picture_ms,
        timings: made.timings,
        loaded,
        peak: watch.stop(),
    })
}

fn millis(clock: Instant) -> f64 {
    clock.elapsed().as_secs_f64() * 1e3
}

/// Looks at this process's memory until it is stopped.
struct Watch {
    done: Arc<AtomicBool>,
    thread: thread::JoinHandle<Resident>,
}

impl Watch {
    fn start() -> Watch {
        let done = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&done);
        let thread = thread::spawn(move || {
            let mut most = Resident::now();
            while !told.load(Ordering::Relaxed) {
                thread::sleep(LOOK_EVERY);
                most = most.max(Resident::now());
            }
            most
        });
        Watch { done, thread }
    }

    /// The most of each kind that was seen.
    fn stop(self) -> Resident {
        self.done.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watch_sees_memory_that_is_gone_when_it_stops() {
        let before = Resident::now();
        let watch = Watch::start();
        let touched = vec![1_u8; 256 << 20];
        thread::sleep(20 * LOOK_EVERY);
        drop(touched);
        let peak = watch.stop().since(before);
        assert!(peak.anonymous >= 200 << 20, "{peak:?}");
    }
}
