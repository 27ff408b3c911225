//! `cargo xtask synth`: checkpoints with random weights in the original containers.
//!
//! 1. [`size`] holds the hyper-parameters, released or tiny;
//! 2. [`layout`] makes the list of tensors from them;
//! 3. [`fill`] gives each tensor its numbers, [`schedule`] the tables that must be real;
//! 4. [`pickle`] and [`container`] write them the way `torch.save` does.
//!
//! The weights keep the variance of what passes through them, so the networks give finite, non-constant output. They
//! mean nothing: `config.json` says `random_weights`, and everything made of them has to say so too.

pub(crate) mod container;
mod fill;
mod layout;
pub(crate) mod pickle;
mod refinement;
mod safetensors;
mod schedule;
mod size;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use container::Container;
use layout::{DType, Fill, Tensor, Types};
use pickle::Value;
use size::Size;

/// What to write.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Request {
    /// The released models' sizes (26 GB), or a few megabytes of the same build.
    #[arg(long, value_enum, default_value = "tiny")]
    pub(crate) size: Scale,
    /// Voxels of each subject: one number for all, or one per subject with commas between.
    #[arg(long, value_delimiter = ',', default_value = "15724", value_parser = clap::value_parser!(u64).range(1..=4_000_000))]
    pub(crate) voxels: Vec<u64>,
    /// How many subjects; as many as there are numbers in `--voxels` unless given.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) subjects: Option<u8>,
    /// The folder to write to; made if it is not there.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Another seed gives other weights.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// How the unCLIP file stores its numbers: matrices as halves, or everything as singles.
    #[arg(long, value_enum, default_value = "mixed")]
    pub(crate) unclip_types: UnclipTypes,
    /// Only these files, with commas between; all of the full size and the first three of the tiny one
    /// where not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) only: Vec<Part>,
}

impl Request {
    /// A few megabytes for one person.
    pub(crate) fn tiny(voxels: u64, out: &Path) -> Request {
        Request {
            size: Scale::Tiny,
            voxels: vec![voxels],
            subjects: None,
            out: out.into(),
            seed: 1,
            unclip_types: UnclipTypes::Mixed,
            only: Vec::new(),
        }
    }

    fn parts(&self) -> &[Part] {
        const ALL: [Part; 6] = [
            Part::Mindeye,
            Part::Unclip,
            Part::Autoenc,
            Part::Sdxl,
            Part::Bridge,
            Part::Captioner,
        ];
        match (self.only.as_slice(), self.size) {
            ([], Scale::Full) => &ALL,
            ([], Scale::Tiny) => &ALL[..3],
            (only, _) => only,
        }
    }
}

/// One of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// Ridge, backbone, prior: `last.pth`.
    Mindeye,
    /// The unCLIP engine.
    Unclip,
    /// The blurry picture's autoencoder.
    Autoenc,
    /// The refiner's engine: SDXL base.
    Sdxl,
    /// The bridge to the captioner.
    Bridge,
    /// GIT, in a folder of its own.
    Captioner,
}

/// How large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scale {
    /// A few megabytes.
    Tiny,
    /// As released.
    Full,
}

/// Types of the unCLIP file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum UnclipTypes {
    /// Matrices and convolutions fp16, the rest fp32.
    Mixed,
    /// Everything fp32.
    Fp32,
}

/// Why the checkpoints could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SynthError {
    /// `--subjects` and `--voxels` disagree.
    #[error(
        "--subjects is {subjects}, but --voxels holds {numbers} numbers; give one number or one per subject"
    )]
    Subjects {
        /// As given.
        subjects: u8,
        /// How many numbers of voxels.
        numbers: usize,
    },
    /// The disk is too small.
    #[error("{dir} has {free} bytes free, {needed} are needed")]
    DiskSpace {
        /// Where to.
        dir: PathBuf,
        /// There.
        free: u64,
        /// Needed.
        needed: u64,
    },
    /// The file system refused.
    #[error("cannot write {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// What a file holds beside its weights.
#[derive(Clone, Copy)]
enum Wrapping {
    /// Training state, with everything that training leaves behind.
    MindEye,
    /// A Lightning checkpoint.
    Lightning,
    /// Epoch and state dict.
    Epoch,
    /// Nothing: a bare state dict.
    Bare,
    /// Another container: safetensors.
    Safetensors,
}

struct Checkpoint {
    name: &'static str,
    wrapping: Wrapping,
    tensors: Vec<Tensor>,
}

impl Checkpoint {
    fn len_bytes(&self) -> u64 {
        self.tensors
            .iter()
            .filter(|tensor| !matches!(tensor.fill, Fill::SameAs(_)))
            .map(Tensor::len_bytes)
            .sum()
    }
}

impl Part {
    fn checkpoint(self, size: &Size, types: Types) -> Checkpoint {
        let (name, wrapping, tensors) = match self {
            Part::Mindeye => (
                "last.pth",
                Wrapping::MindEye,
                layout::mindeye(&size.mindeye),
            ),
            Part::Unclip => (
                "unclip6_epoch0_step110000.ckpt",
                Wrapping::Lightning,
                layout::unclip(&size.unclip, types),
            ),
            Part::Autoenc => (
                "sd_image_var_autoenc.pth",
                Wrapping::Bare,
                layout::autoencoder(&size.autoencoder),
            ),
            Part::Sdxl => (
                "sd_xl_base_1.0.safetensors",
                Wrapping::Safetensors,
                refinement::sdxl(&size.sdxl),
            ),
            Part::Bridge => (
                "bigG_to_L_epoch8.pth",
                Wrapping::Epoch,
                refinement::bridge(
                    size.mindeye.tokens,
                    size.mindeye.dim,
                    size.captioner.vision.width,
                ),
            ),
            Part::Captioner => (
                "git/model.safetensors",
                Wrapping::Safetensors,
                refinement::captioner(&size.captioner),
            ),
        };
        Checkpoint {
            name,
            wrapping,
            tensors,
        }
    }
}

/// Writes the checkpoints and their `config.json`.
pub(crate) fn write(request: &Request) -> Result<(), SynthError> {
    let voxels = match (request.voxels.as_slice(), request.subjects) {
        (voxels, None) => voxels.to_vec(),
        ([voxels], Some(subjects)) => vec![*voxels; usize::from(subjects)],
        (voxels, Some(subjects)) if voxels.len() == usize::from(subjects) => voxels.to_vec(),
        (voxels, Some(subjects)) => {
            return Err(SynthError::Subjects {
                subjects,
                numbers: voxels.len(),
            });
        }
    };
    let size = match request.size {
        Scale::Tiny => Size::tiny(voxels),
        Scale::Full => Size::full(voxels),
    };
    let types = match request.unclip_types {
        UnclipTypes::Mixed => Types::Mixed,
        UnclipTypes::Fp32 => Types::Single,
    };
    let parts = request.parts();
    let checkpoints: Vec<Checkpoint> = parts
        .iter()
        .map(|part| part.checkpoint(&size, types))
        .collect();

    let dir = &request.out;
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| SynthError::Io { path, source }
    };
    fs::create_dir_all(dir).map_err(failed(dir))?;
    if parts.contains(&Part::Captioner) {
        let git = dir.join("git");
        fs::create_dir_all(&git).map_err(failed(&git))?;
        let config = format!("{:#}\n", size.captioner.config());
        for (name, text) in [
            ("config.json", config),
            ("vocab.txt", size.captioner.vocabulary_text()),
        ] {
            let path = git.join(name);
            fs::write(&path, text).map_err(failed(&path))?;
        }
    }
    // A tenth of a percent and a few megabytes for headers, padding and the pickles.
    let weights: u64 = checkpoints.iter().map(Checkpoint::len_bytes).sum();
    let needed = weights + weights / 1000 + (8 << 20);
    let free = free_bytes(dir).map_err(failed(dir))?;
    if free < needed {
        return Err(SynthError::DiskSpace {
            dir: dir.clone(),
            free,
            needed,
        });
    }

    for checkpoint in &checkpoints {
        let began = Instant::now();
        let path = dir.join(checkpoint.name);
        let written = write_checkpoint(&path, checkpoint, request.seed).map_err(failed(&path))?;
        println!(
            "{}: {} tensors, {written} bytes, {:.1} s",
            path.display(),
            checkpoint.tensors.len(),
            began.elapsed().as_secs_f64()
        );
    }
    let path = dir.join("config.json");
    let config = size.config(request.seed, types == Types::Mixed);
    fs::write(&path, format!("{config:#}\n")).map_err(failed(&path))
}

/// Free space for an ordinary user.
fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(dir)?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

/// Writes beside the place, then renames: a file under its own name is whole.
fn write_checkpoint(path: &Path, checkpoint: &Checkpoint, seed: u64) -> io::Result<u64> {
    let part = path.with_extension("part");
    let outcome = File::create(&part).and_then(|file| {
        let (file, written) = stream(BufWriter::with_capacity(1 << 20, file), checkpoint, seed)?;
        file.into_inner()?.sync_all()?;
        Ok(written)
    });
    match outcome {
        Ok(written) => {
            fs::rename(&part, path)?;
            Ok(written)
        }
        Err(error) => {
            // The first error is the one worth telling.
            let _ = fs::remove_file(&part);
            Err(error)
        }
    }
}

fn stream<W: Write>(out: W, checkpoint: &Checkpoint, seed: u64) -> io::Result<(W, u64)> {
    let stem = checkpoint.name.split('.').next().unwrap_or(checkpoint.name);
    if matches!(checkpoint.wrapping, Wrapping::Safetensors) {
        let mut progress = Progress::new(checkpoint.name, checkpoint.len_bytes());
        return safetensors::write(out, &checkpoint.tensors, |out, tensor| {
            let mut out = Counted {
                out,
                progress: &mut progress,
            };
            fill::write(&mut out, seed, stem, tensor)
        });
    }
    let mut container = Container::new(out, stem);
    let mut plan = Plan::default();
    let content = plan.content(checkpoint);
    container.bytes("data.pkl", &pickle::pickle(&content))?;
    container.bytes("byteorder", b"little")?;

    // torch writes the storages in the order of their names as strings.
    let mut storages: Vec<(String, Stored)> = plan
        .storages
        .into_iter()
        .enumerate()
        .map(|(key, stored)| (key.to_string(), stored))
        .collect();
    storages.sort_by(|one, other| one.0.cmp(&other.0));
    let mut progress = Progress::new(checkpoint.name, checkpoint.len_bytes());
    for (key, stored) in storages {
        let name = format!("data/{key}");
        match stored {
            Stored::Tensor(place) => {
                let tensor = &checkpoint.tensors[place];
                container.entry(&name, tensor.len_bytes(), |out| {
                    let mut out = Counted {
                        out,
                        progress: &mut progress,
                    };
                    fill::write(&mut out, seed, stem, tensor)
                })?;
            }
            Stored::Numbers(numbers) => {
                let bytes: Vec<u8> = numbers
                    .iter()
                    .flat_map(|number| number.to_le_bytes())
                    .collect();
                container.bytes(&name, &bytes)?;
            }
        }
    }
    container.bytes("version", b"3\n")?;
    container.bytes(".data/serialization_id", format!("{seed:040}").as_bytes())?;
    container.finish()
}

/// Where the numbers of a storage come from.
enum Stored {
    /// From a tensor of the list.
    Tensor(usize),
    /// These, of the optimizer.
    Numbers(Vec<f32>),
}

/// Gives storages their keys while the content is put together.
#[derive(Default)]
struct Plan {
    storages: Vec<Stored>,
}

impl Plan {
    fn content(&mut self, checkpoint: &Checkpoint) -> Value {
        let tensors = self.tensors(&checkpoint.tensors);
        match checkpoint.wrapping {
            Wrapping::Bare | Wrapping::Safetensors => Value::Ordered(tensors, None),
            Wrapping::Epoch => Value::dict([
                ("epoch", Value::Int(8)),
                ("model_state_dict", Value::Ordered(tensors, None)),
            ]),
            Wrapping::Lightning => Value::dict([
                ("state_dict", Value::Ordered(tensors, None)),
                ("epoch", Value::Int(0)),
                ("global_step", Value::Int(110_000)),
            ]),
            Wrapping::MindEye => {
                let metadata = Value::dict([("_metadata", metadata(&checkpoint.tensors))]);
                Value::dict([
                    ("epoch", Value::Int(149)),
                    (
                        "model_state_dict",
                        Value::Ordered(tensors, Some(Box::new(metadata))),
                    ),
                    ("optimizer_state_dict", self.optimizer()),
                    ("lr_scheduler", scheduler()),
                    ("train_losses", floats(&[1.25, 0.75])),
                    ("test_losses", floats(&[1.5])),
                    ("lrs", floats(&[0.0003])),
                ])
            }
        }
    }

    fn tensors(&mut self, tensors: &[Tensor]) -> Vec<(Value, Value)> {
        let mut keys: Vec<usize> = Vec::with_capacity(tensors.len());
        tensors
            .iter()
            .enumerate()
            .map(|(place, tensor)| {
                let key = match tensor.fill {
                    Fill::SameAs(other) => keys[other],
                    _ => {
                        self.storages.push(Stored::Tensor(place));
                        self.storages.len() - 1
                    }
                };
                keys.push(key);
                (
                    Value::text(&tensor.name),
                    rebuilt(key, tensor.dtype, &tensor.shape),
                )
            })
            .collect()
    }

    fn numbers(&mut self, shape: &[u64], numbers: Vec<f32>) -> Value {
        self.storages.push(Stored::Numbers(numbers));
        rebuilt(self.storages.len() - 1, DType::F32, shape)
    }

    /// AdamW with one parameter of three numbers, enough to be in a reader's way.
    fn optimizer(&mut self) -> Value {
        let state = Value::dict([
            ("step", self.numbers(&[], vec![1.0])),
            ("exp_avg", self.numbers(&[3], vec![0.1, 0.2, 0.3])),
            ("exp_avg_sq", self.numbers(&[3], vec![0.01, 0.02, 0.03])),
        ]);
        let group = Value::dict([
            ("weight_decay", Value::Float(0.01)),
            ("lr", Value::Float(0.0003)),
            (
                "betas",
                Value::Tuple(vec![Value::Float(0.85), Value::Float(0.999)]),
            ),
            ("eps", Value::Float(1e-8)),
            ("amsgrad", Value::Bool(false)),
            ("foreach", Value::None),
            ("fused", Value::None),
            ("params", Value::List(vec![Value::Int(0)])),
        ]);
        Value::dict([
            ("state", Value::Dict(vec![(Value::Int(0), state)])),
            ("param_groups", Value::List(vec![group])),
        ])
    }
}

/// A tensor as `torch.save` describes it, contiguous and at the start of its storage.
fn rebuilt(key: usize, dtype: DType, shape: &[u64]) -> Value {
    let class = match dtype {
        DType::F16 => "HalfStorage",
        DType::F32 => "FloatStorage",
        DType::I64 => "LongStorage",
    };
    let mut strides: Vec<u64> = Vec::with_capacity(shape.len());
    let mut len = 1;
    for extent in shape.iter().rev() {
        strides.push(len);
        len *= extent;
    }
    strides.reverse();
    let storage = Value::Tuple(vec![
        Value::text("storage"),
        Value::Global("torch", class),
        Value::Text(key.to_string()),
        Value::text("cpu"),
        int(len),
    ]);
    let extents = |list: &[u64]| Value::Tuple(list.iter().copied().map(int).collect());
    Value::Call(
        Box::new(Value::Global("torch._utils", "_rebuild_tensor_v2")),
        vec![
            Value::Persistent(Box::new(storage)),
            Value::Int(0),
            extents(shape),
            extents(&strides),
            Value::Bool(false),
            Value::Ordered(Vec::new(), None),
        ],
    )
}

/// The state dict's `_metadata`: a version for every module.
fn metadata(tensors: &[Tensor]) -> Value {
    let mut modules = BTreeSet::from([""]);
    for tensor in tensors {
        modules.extend(
            tensor
                .name
                .match_indices('.')
                .map(|(end, _)| &tensor.name[..end]),
        );
    }
    let version = |module: &&str| {
        (
            Value::text(module),
            Value::dict([("version", Value::Int(1))]),
        )
    };
    Value::Ordered(modules.iter().map(version).collect(), None)
}

/// A `OneCycleLR`'s state, with the reference to a function that torch 2.1 pickles through `getattr`.
fn scheduler() -> Value {
    let annealing = Value::Call(
        Box::new(Value::Global("__builtin__", "getattr")),
        vec![
            Value::Global("torch.optim.lr_scheduler", "OneCycleLR"),
            Value::text("_annealing_cos"),
        ],
    );
    Value::dict([
        ("total_steps", Value::Int(20)),
        ("_schedule_phases", Value::List(Vec::new())),
        ("anneal_func", annealing),
        ("cycle_momentum", Value::Bool(true)),
        ("use_beta1", Value::Bool(true)),
        ("base_lrs", floats(&[1.2e-5])),
        ("last_epoch", Value::Int(1)),
        ("verbose", Value::Bool(false)),
        ("_step_count", Value::Int(2)),
        ("_get_lr_called_within_step", Value::Bool(false)),
        ("_last_lr", floats(&[0.0003])),
    ])
}

fn floats(numbers: &[f64]) -> Value {
    Value::List(numbers.iter().copied().map(Value::Float).collect())
}

/// A count; the largest here is far below 2^63.
fn int(count: u64) -> Value {
    Value::Int(i64::try_from(count).unwrap_or(i64::MAX))
}

/// Says how far a large file is, once per gibibyte.
struct Progress {
    file: &'static str,
    whole: u64,
    written: u64,
}

impl Progress {
    fn new(file: &'static str, whole: u64) -> Self {
        Self {
            file,
            whole,
            written: 0,
        }
    }

    fn advance(&mut self, len_bytes: usize) {
        let before = self.written >> 30;
        self.written += len_bytes as u64;
        if self.written >> 30 > before {
            println!("{}: {} of {} bytes", self.file, self.written, self.whole);
        }
    }
}

struct Counted<'a> {
    out: &'a mut dyn Write,
    progress: &'a mut Progress,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len_bytes = self.out.write(bytes)?;
        self.progress.advance(len_bytes);
        Ok(len_bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn request(out: &Path) -> Request {
        Request {
            size: Scale::Tiny,
            voxels: vec![301, 257],
            subjects: None,
            out: out.to_path_buf(),
            seed: 7,
            unclip_types: UnclipTypes::Mixed,
            only: Vec::new(),
        }
    }

    #[test]
    fn tiny_folder_holds_the_released_files_and_every_storage_at_its_length() {
        let dir = tempfile::tempdir().unwrap();
        write(&request(dir.path())).unwrap();
        let mut names: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "config.json",
                "last.pth",
                "sd_image_var_autoenc.pth",
                "unclip6_epoch0_step110000.ckpt"
            ]
        );

        let tensors = layout::mindeye(&Size::tiny(vec![301, 257]).mindeye);
        let file = File::open(dir.path().join("last.pth")).unwrap();
        let mut archive = zip::ZipArchive::new(file).unwrap();
        // Key 193 is the shared rotary storage; the optimizer's three come last.
        assert_eq!(archive.len(), 210 + 3 + 4);
        for (key, place) in [(0, 0), (193, 193), (194, 194), (208, 209)] {
            let mut bytes = Vec::new();
            let mut entry = archive.by_name(&format!("last/data/{key}")).unwrap();
            entry.read_to_end(&mut bytes).unwrap();
            assert_eq!(
                bytes.len() as u64,
                tensors[place].len_bytes(),
                "{}",
                tensors[place].name
            );
        }
    }

    #[test]
    fn writing_twice_gives_the_same_bytes() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(&request(one.path())).unwrap();
        write(&request(two.path())).unwrap();
        for entry in fs::read_dir(one.path()).unwrap() {
            let name = entry.unwrap().file_name();
            let same = fs::read(one.path().join(&name)).unwrap()
                == fs::read(two.path().join(&name)).unwrap();
            assert!(same, "{}", name.to_string_lossy());
        }
    }

    #[test]
    fn every_part_can_be_asked_for_alone() {
        for (part, expected) in [
            (
                Part::Sdxl,
                vec!["config.json", "sd_xl_base_1.0.safetensors"],
            ),
            (Part::Bridge, vec!["bigG_to_L_epoch8.pth", "config.json"]),
            (Part::Captioner, vec!["config.json", "git"]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let mut request = request(dir.path());
            request.only = vec![part];
            write(&request).unwrap();
            let mut names: Vec<String> = fs::read_dir(dir.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            assert_eq!(names, expected);
        }
    }

    #[test]
    fn subjects_that_disagree_with_voxels_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut request = request(dir.path());
        request.subjects = Some(3);
        let error = write(&request).unwrap_err().to_string();
        assert!(error.contains('3') && error.contains('2'), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
