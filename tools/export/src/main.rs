//! `afterimage-export`: checkpoints to bundles, on a workstation.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use export::check::{self, CheckOptions};
use export::checkpoint::{Checkpoint, inspect};
use export::export::export;
use export::plan::Plan;
use export::pool::{PoolOptions, embed};
use export::section::chain;

/// Turns trained MindEye2 checkpoints into signed bundles for the Afterimage box.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "A first bundle:\n  \
    afterimage-export keygen --secret site.key --public site.pub\n  \
    afterimage-export bundle --folder checkpoints --precision fp16 --out mindeye2\n  \
    afterimage-export check --bundle mindeye2 --golden golden\n  \
    afterimage-export sign --bundle mindeye2 --secret site.key\n  \
    afterimage-export verify --bundle mindeye2 --public site.pub"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the tensors of a checkpoint without loading them
    Inspect {
        /// A .pth, .ckpt or .safetensors file, an index of shards (.index.json), or a folder of DeepSpeed ZeRO or diffusers
        file: PathBuf,
    },
    /// Build a bundle from checkpoints
    Bundle(BundleArgs),
    /// Replay recorded reference vectors through a bundle and print a parity table
    Check {
        /// The bundle
        #[arg(long)]
        bundle: PathBuf,
        /// Folder with io_*.safetensors and config.json
        #[arg(long)]
        golden: PathBuf,
        /// Also write the table as JSON
        #[arg(long)]
        json: Option<PathBuf>,
        /// The ONNX Runtime library (default: ORT_DYLIB_PATH, then beside this program)
        #[arg(long)]
        onnxruntime: Option<PathBuf>,
    },
    /// Embed candidate pictures for retrieval with a bundle's image encoder
    Pool(PoolArgs),
    /// Generate a key pair; existing files are never overwritten
    Keygen {
        /// Where the secret key goes; keep it on this workstation
        #[arg(long)]
        secret: PathBuf,
        /// Where the public key goes; the box needs it
        #[arg(long)]
        public: PathBuf,
    },
    /// Sign a bundle, after comparing its files with its manifest
    Sign {
        /// The bundle
        #[arg(long)]
        bundle: PathBuf,
        /// The secret key
        #[arg(long)]
        secret: PathBuf,
    },
    /// Verify a bundle's signature and every file
    Verify {
        /// The bundle
        #[arg(long)]
        bundle: PathBuf,
        /// The public key
        #[arg(long)]
        public: PathBuf,
    },
}

#[derive(Args)]
struct BundleArgs {
    /// Recipe (TOML) that names sources, precision and settings
    #[arg(long, conflicts_with_all = ["folder", "precision"], required_unless_present = "folder")]
    recipe: Option<PathBuf>,
    /// Folder with the released files under their usual names
    #[arg(long, requires = "precision")]
    folder: Option<PathBuf>,
    /// Arithmetic of the graphs, with --folder
    #[arg(long)]
    precision: Option<PrecisionArg>,
    /// Export although a checkpoint holds tensors that the networks do not know
    #[arg(long)]
    allow_unexpected: bool,
    /// Write an fp16 bundle without running its networks first; the manifest says so
    #[arg(long)]
    no_audit: bool,
    /// Where the audit's figures go as JSON, with times and memory
    #[arg(long)]
    report: Option<PathBuf>,
    /// The ONNX Runtime library of the audit (default: ORT_DYLIB_PATH, then beside this program)
    #[arg(long)]
    onnxruntime: Option<PathBuf>,
    /// Stages to leave out though the checkpoints hold them, with commas between
    #[arg(long, value_delimiter = ',', value_parser = stage_name)]
    without: Vec<bundle::StageName>,
    /// The bundle's folder; must not exist yet
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args)]
struct PoolArgs {
    /// The bundle
    #[arg(long)]
    bundle: PathBuf,
    /// Folder of PNG and JPEG files; folders in it are looked into
    #[arg(long)]
    images: PathBuf,
    /// The pool's file; must not exist yet
    #[arg(long)]
    out: PathBuf,
    /// Keep all tokens, also where the file exceeds 4 GiB; otherwise large pools keep sketches
    #[arg(long)]
    exact: bool,
    /// The ONNX Runtime library (default: ORT_DYLIB_PATH, then beside this program)
    #[arg(long)]
    onnxruntime: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum PrecisionArg {
    /// Single precision: CPUs, parity runs
    Fp32,
    /// Half precision: GPUs
    Fp16,
    /// 8-bit integer products in the large networks: CPUs that have instructions for them
    Int8,
}

impl From<PrecisionArg> for bundle::Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Fp32 => bundle::Precision::Fp32,
            PrecisionArg::Fp16 => bundle::Precision::Fp16,
            PrecisionArg::Int8 => bundle::Precision::Int8,
        }
    }
}

fn stage_name(text: &str) -> Result<bundle::StageName, String> {
    let known = bundle::StageName::ALL;
    known
        .into_iter()
        .find(|name| name.as_str() == text)
        .ok_or_else(|| {
            format!(
                "expected one of {}",
                known.map(bundle::StageName::as_str).join(", ")
            )
        })
}

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Inspect { file } => run_inspect(&file),
        Command::Bundle(args) => run_bundle(args),
        Command::Check {
            bundle,
            golden,
            json,
            onnxruntime,
        } => {
            return match check::run(
                &CheckOptions {
                    bundle,
                    golden,
                    json,
                    onnxruntime,
                },
                &mut std::io::stdout().lock(),
            ) {
                Ok(true) => ExitCode::SUCCESS,
                Ok(false) => ExitCode::FAILURE,
                Err(error) => fail(&error),
            };
        }
        Command::Pool(args) => run_pool(args),
        Command::Keygen { secret, public } => bundle::generate_keys(&secret, &public, None)
            .map_err(Failure::from)
            .and_then(|key| {
                say(&format!(
                    "key {}: public {}, secret {}",
                    key.id(),
                    public.display(),
                    secret.display()
                ))
            }),
        Command::Sign { bundle, secret } => run_sign(&bundle, &secret),
        Command::Verify { bundle, public } => run_verify(&bundle, &public),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error.as_ref()),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    // Nothing can be done about a closed standard error.
    let _ = writeln!(std::io::stderr(), "error: {}", chain(error));
    ExitCode::FAILURE
}

fn say(line: &str) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}

fn run_inspect(file: &std::path::Path) -> Result<(), Failure> {
    let checkpoint =
        Checkpoint::open(file).map_err(|error| format!("{}: {}", file.display(), chain(&error)))?;
    std::io::stdout().write_all(inspect::render(&checkpoint).as_bytes())?;
    Ok(())
}

fn run_bundle(args: BundleArgs) -> Result<(), Failure> {
    let mut plan = match (args.recipe, args.folder, args.precision) {
        (Some(recipe), ..) => Plan::from_recipe(&recipe)?,
        (None, Some(folder), Some(precision)) => {
            Plan::from_folder(&folder, precision.into(), args.allow_unexpected)?
        }
        _ => return Err("give --recipe FILE, or --folder DIR with --precision".into()),
    };
    plan.allow_unexpected |= args.allow_unexpected;
    plan.audit &= !args.no_audit;
    plan.onnxruntime = args.onnxruntime;
    plan.without.extend(args.without);
    for note in &plan.notes {
        progress(&format!("note: {note}"));
    }
    let report = export(&plan, &args.out, &mut progress)?;
    if let Some(path) = &args.report {
        let mut bytes = serde_json::to_vec_pretty(&report)?;
        bytes.push(b'\n');
        std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    say(&format!(
        "{}: {} bundle, not signed yet",
        args.out.display(),
        plan.precision
    ))
}

/// Progress is a courtesy; a closed standard error stops nothing.
fn progress(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn run_pool(args: PoolArgs) -> Result<(), Failure> {
    let options = PoolOptions {
        bundle: args.bundle,
        images: args.images,
        out: args.out,
        exact: args.exact,
        onnxruntime: args.onnxruntime,
    };
    let summary = embed(&options, &mut progress)?;
    say(&format!(
        "{}: {} pictures, {}, {} bytes",
        options.out.display(),
        summary.pictures,
        if summary.exact {
            "all tokens"
        } else {
            "sketches only"
        },
        summary.len_bytes
    ))
}

fn run_sign(dir: &std::path::Path, secret: &std::path::Path) -> Result<(), Failure> {
    bundle::sign(dir, &bundle::SecretKey::from_file(secret, None)?)?;
    say(&format!("{}: signed", dir.display()))
}

fn run_verify(dir: &std::path::Path, public: &std::path::Path) -> Result<(), Failure> {
    let key = bundle::PublicKey::from_file(public)?;
    let bundle = bundle::open(dir)?.verify(&key)?;
    let manifest = bundle.manifest();
    say(&format!(
        "{}: version {}, {}, {} files, signed by {}",
        dir.display(),
        manifest.bundle_version,
        manifest.precision,
        manifest.files.len(),
        key.id()
    ))
}
