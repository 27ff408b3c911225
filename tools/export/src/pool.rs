//! `pool`: candidate pictures for retrieval, embedded once on the workstation.
//!
//! 1. List the PNG and JPEG files below a folder and decode each; all that cannot be read are named
//!    together, before the first is embedded, which takes far longer.
//! 2. Decode again, resize and normalise as the original does, run the bundle's image encoder.
//! 3. Put the finished file in place.
//!
//! Pictures are decoded here and nowhere else: the box receives embeddings. That is why the crate
//! `image`, for files that strangers made, lives in this program.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bundle::{BundleError, StageName};
use decoder::retrieval::{EncoderDigest, PoolError, PoolShape, PoolWriter};
use decoder::{Runtime, RuntimeError, Stage, StageError, vision};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use ndarray::{Array3, Array4, Axis};

use crate::section::chain;

/// Threads of the image encoder.
const THREADS: usize = 2;
/// Largest file for which all tokens are kept unasked: 5,000 pictures of the released tower.
const KEEP_BYTES: u64 = 4 << 30;
/// Largest picture, in pixels; its numbers take 800 MB.
const MAX_PIXELS: u64 = 1 << 25;
/// Folders deeper than this are not looked into.
const MAX_DEPTH: usize = 16;
/// How often progress is told.
const PROGRESS: Duration = Duration::from_secs(2);

/// What to embed.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// The bundle whose image encoder embeds.
    pub bundle: PathBuf,
    /// Folder of pictures; folders in it are looked into.
    pub images: PathBuf,
    /// The pool's file; must not exist yet.
    pub out: PathBuf,
    /// Keep all tokens, however large the file becomes.
    pub exact: bool,
    /// The ONNX Runtime library.
    pub onnxruntime: Option<PathBuf>,
}

/// What was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSummary {
    /// Pictures in the pool.
    pub pictures: usize,
    /// Whether all tokens were kept.
    pub exact: bool,
    /// Length of the file.
    pub len_bytes: u64,
}

/// Why no pool was written.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    /// The target is there already.
    #[error("{path} exists already; a pool is written once")]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The bundle is refused.
    #[error("the bundle cannot be used")]
    Bundle(#[from] BundleError),
    /// The bundle cannot embed pictures.
    #[error(
        "{path}: expected a stage image_encoder, found none; it is exported from the unCLIP checkpoint"
    )]
    NoEncoder {
        /// The bundle.
        path: PathBuf,
    },
    /// The bundle's image encoder is not one.
    #[error("image_encoder: expected {expected}, found {found}")]
    Encoder {
        /// Inputs or outputs that are needed.
        expected: &'static str,
        /// What the manifest says.
        found: String,
    },
    /// ONNX Runtime cannot be loaded.
    #[error("ONNX Runtime cannot be used")]
    Runtime(#[from] RuntimeError),
    /// The image encoder fails.
    #[error("image_encoder failed on {picture}")]
    Stage {
        /// The picture, or the bundle where it could not be opened.
        picture: String,
        /// What is wrong.
        source: StageError,
    },
    /// A folder cannot be listed, or a file cannot be put in place.
    #[error("cannot use {path}")]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No pictures.
    #[error("{path}: expected PNG or JPEG files, found {others} other files and none of these")]
    Empty {
        /// The folder.
        path: PathBuf,
        /// Files that are neither.
        others: usize,
    },
    /// Pictures that cannot be read, all of them.
    #[error("{} of {of} pictures cannot be used, nothing was written:\n{}", .problems.len(), .problems.iter().map(|p| format!("  {p}")).collect::<Vec<_>>().join("\n"))]
    Pictures {
        /// Pictures there are.
        of: usize,
        /// One line each.
        problems: Vec<String>,
    },
    /// The pool cannot be written.
    #[error("{path}")]
    Pool {
        /// The target.
        path: PathBuf,
        /// What is wrong.
        source: PoolError,
    },
}

/// Embeds every picture below a folder; `say` is told of the progress.
///
/// # Errors
/// [`EmbedError`]; nothing is left behind.
pub fn embed(options: &PoolOptions, say: &mut dyn FnMut(&str)) -> Result<PoolSummary, EmbedError> {
    let out = &options.out;
    if out.symlink_metadata().is_ok() {
        return Err(EmbedError::Exists { path: out.clone() });
    }
    let pictures = list(&options.images, say)?;
    let tower = Tower::open(options)?;
    look_at_all(&pictures, say)?;
    let values = u64::from(tower.tokens) * u64::from(tower.dim);
    let shape = PoolShape {
        tokens: tower.tokens,
        dim: tower.dim,
        keep_tokens: options.exact
            || (pictures.len() as u64).saturating_mul(values * 2) <= KEEP_BYTES,
    };
    let folder = match out.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let io_error = |path: &Path, source| EmbedError::Io {
        path: path.into(),
        source,
    };
    let partial = tempfile::Builder::new()
        .prefix(".pool-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(|source| io_error(folder, source))?;
    let pool_error = |source| EmbedError::Pool {
        path: out.clone(),
        source,
    };
    let names: Vec<String> = pictures
        .iter()
        .map(|picture| picture.name.clone())
        .collect();
    let mut writer =
        PoolWriter::begin(partial.as_file(), shape, &names, tower.digest).map_err(pool_error)?;
    let exact = writer.keeps_tokens();
    if !exact {
        say("only sketches are kept: cosines will be estimates; --exact keeps all tokens");
    }
    let mut progress = Progress::new("embedded", pictures.len());
    for picture in &pictures {
        writer.push(&tower.embed(picture)?).map_err(pool_error)?;
        progress.step(say);
    }
    writer.finish().map_err(pool_error)?;
    let file = partial
        .persist_noclobber(out)
        .map_err(|error| io_error(out, error.error))?;
    let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
    let len_bytes = synced
        .and_then(|()| file.metadata())
        .map_err(|source| io_error(out, source))?
        .len();
    Ok(PoolSummary {
        pictures: pictures.len(),
        exact,
        len_bytes,
    })
}

/// The bundle's image encoder.
struct Tower {
    stage: Stage,
    digest: EncoderDigest,
    /// Rows and columns.
    side: [usize; 2],
    tokens: u32,
    dim: u32,
}

impl Tower {
    fn open(options: &PoolOptions) -> Result<Tower, EmbedError> {
        let bundle = bundle::open(&options.bundle)?.verify_hashes()?;
        let no_encoder = || EmbedError::NoEncoder {
            path: options.bundle.clone(),
        };
        let spec = bundle.manifest().stages.get(&StageName::ImageEncoder);
        let spec = spec.ok_or_else(no_encoder)?;
        let digest = EncoderDigest::of(&bundle).ok_or_else(no_encoder)?;
        let image = spec.input("image").filter(|image| image.shape.len() == 4);
        let sides = image.map(|image| [1, 2, 3].map(|axis| image.fixed(axis)));
        let Some([Some(3), Some(rows), Some(columns)]) = sides else {
            return Err(EmbedError::Encoder {
                expected: "an input image [batch, 3, height, width]",
                found: listed(&spec.inputs),
            });
        };
        let tokens = spec
            .output("tokens")
            .filter(|tokens| tokens.shape.len() == 3);
        let axes = tokens.and_then(|tokens| {
            let axis = |at| tokens.fixed(at).and_then(|len| u32::try_from(len).ok());
            Some((axis(1)?, axis(2)?))
        });
        let Some((tokens, dim)) = axes else {
            return Err(EmbedError::Encoder {
                expected: "an output tokens [batch, token, value]",
                found: listed(&spec.outputs),
            });
        };
        let library = decoder::runtime::find_library(options.onnxruntime.as_deref())?;
        let runtime = Runtime::load(&library, THREADS)?;
        let stage = Stage::open(&runtime, &bundle, spec).map_err(|source| EmbedError::Stage {
            picture: options.bundle.display().to_string(),
            source,
        })?;
        let side = |len| usize::try_from(len).unwrap_or(usize::MAX);
        Ok(Tower {
            stage,
            digest,
            side: [side(rows), side(columns)],
            tokens,
            dim,
        })
    }

    /// Tokens of a picture, `[token * dim]`.
    fn embed(&self, picture: &Listed) -> Result<Vec<f32>, EmbedError> {
        let image = read(&picture.path).map_err(|problem| EmbedError::Pictures {
            of: 1,
            problems: vec![format!("{}: {problem}", picture.name)],
        })?;
        let image = vision::normalise(vision::resize(image.view(), self.side).into_dyn().view());
        let stage_error = |source| EmbedError::Stage {
            picture: picture.name.clone(),
            source,
        };
        let mut outputs = self
            .stage
            .run(&[("image", image.view())])
            .map_err(stage_error)?;
        let tokens = outputs.remove("tokens").unwrap_or_default();
        Ok(tokens.into_iter().collect())
    }
}

fn listed(specs: &[bundle::TensorSpec]) -> String {
    let specs: Vec<String> = specs.iter().map(ToString::to_string).collect();
    specs.join(", ")
}

/// A picture's file.
struct Listed {
    path: PathBuf,
    /// Below the folder, with forward slashes.
    name: String,
}

/// PNG and JPEG files below a folder, sorted by name.
fn list(dir: &Path, say: &mut dyn FnMut(&str)) -> Result<Vec<Listed>, EmbedError> {
    let (mut found, mut problems, mut others) = (Vec::new(), Vec::new(), 0);
    let mut folders = vec![(dir.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let error = |source| EmbedError::Io {
            path: folder.clone(),
            source,
        };
        for entry in fs::read_dir(&folder).map_err(error)? {
            let path = entry.map_err(error)?.path();
            // Links to pictures are followed, links to folders could lead in circles.
            let is_dir = path.symlink_metadata().is_ok_and(|found| found.is_dir());
            if is_dir && depth < MAX_DEPTH {
                folders.push((path, depth + 1));
                continue;
            }
            let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
            let wanted = ["png", "jpg", "jpeg"];
            if is_dir
                || !wanted
                    .iter()
                    .any(|known| extension.eq_ignore_ascii_case(known))
            {
                others += 1;
                continue;
            }
            let below = path.strip_prefix(dir).unwrap_or(&path);
            match below.to_str() {
                Some(name) => found.push(Listed {
                    name: name.to_owned(),
                    path,
                }),
                None => problems.push(format!("{below:?}: expected a name in UTF-8")),
            }
        }
    }
    if found.is_empty() && problems.is_empty() {
        return Err(EmbedError::Empty {
            path: dir.into(),
            others,
        });
    }
    if !problems.is_empty() {
        let of = found.len() + problems.len();
        return Err(EmbedError::Pictures { of, problems });
    }
    if others > 0 {
        say(&format!(
            "{others} files are neither PNG nor JPEG by name, they are left out"
        ));
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Decodes every picture and names all that cannot be.
fn look_at_all(pictures: &[Listed], say: &mut dyn FnMut(&str)) -> Result<(), EmbedError> {
    let mut problems = Vec::new();
    let mut progress = Progress::new("looked at", pictures.len());
    for picture in pictures {
        if let Err(problem) = decode(&picture.path) {
            problems.push(format!("{}: {problem}", picture.name));
        }
        progress.step(say);
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(EmbedError::Pictures {
        of: pictures.len(),
        problems,
    })
}

/// A picture as intensities 0..1, `[1, 3, height, width]`; transparency is ignored.
fn read(path: &Path) -> Result<Array4<f32>, String> {
    let pixels = decode(path)?.into_rgb32f();
    let (width, height) = pixels.dimensions();
    let side = |len| usize::try_from(len).unwrap_or(usize::MAX);
    let pixels = Array3::from_shape_vec((side(height), side(width), 3), pixels.into_raw())
        .map_err(|error| error.to_string())?;
    Ok(pixels.permuted_axes([2, 0, 1]).insert_axis(Axis(0)))
}

/// Upright, whatever way the camera was held.
fn decode(path: &Path) -> Result<DynamicImage, String> {
    // By the first bytes alone: a name ending in .jpg makes no JPEG.
    let file = File::open(path).map_err(|error| chain(&error))?;
    let mut reader = ImageReader::new(BufReader::new(file))
        .with_guessed_format()
        .map_err(|error| chain(&error))?;
    match reader.format() {
        Some(ImageFormat::Png | ImageFormat::Jpeg) => {}
        Some(other) => return Err(format!("expected PNG or JPEG, found {other:?}")),
        None => return Err("expected PNG or JPEG, found neither's first bytes".into()),
    }
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_PIXELS * 8);
    reader.limits(limits);
    // The crate's text already holds its causes, some of them on lines of their own.
    let image_error = |error: ImageError| {
        let text = error.to_string();
        text.lines().next().unwrap_or_default().to_owned()
    };
    let mut decoder = reader.into_decoder().map_err(image_error)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > MAX_PIXELS {
        return Err(format!(
            "expected 1..={MAX_PIXELS} pixels, found {width} x {height}"
        ));
    }
    // A picture whose metadata cannot be read is taken as it lies.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(image_error)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Tells of long work, every other second.
struct Progress {
    verb: &'static str,
    done: usize,
    of: usize,
    began: Instant,
    told: Instant,
}

impl Progress {
    fn new(verb: &'static str, of: usize) -> Progress {
        let now = Instant::now();
        Progress {
            verb,
            done: 0,
            of,
            began: now,
            told: now,
        }
    }

    fn step(&mut self, say: &mut dyn FnMut(&str)) {
        self.done += 1;
        if self.told.elapsed() < PROGRESS && self.done < self.of {
            return;
        }
        self.told = Instant::now();
        #[expect(clippy::cast_precision_loss, reason = "shown in whole seconds")]
        let left =
            self.began.elapsed().as_secs_f64() / self.done as f64 * (self.of - self.done) as f64;
        say(&format!(
            "{} {} of {} pictures, {left:.0} s left",
            self.verb, self.done, self.of
        ));
    }
}
