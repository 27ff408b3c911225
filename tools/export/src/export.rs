//! From a plan to a bundle: open, describe, check, write.
//!
//! 1. Open every checkpoint; a container that cannot be read stops here.
//! 2. Describe each stage's graph. Missing keys, wrong shapes and unknown tensors are noted.
//! 3. Anything noted stops here, after the numbers of all tensors were looked at as well.
//! 4. Stream the weights, converted and checked, then the graphs, then the manifest.
//!
//! The target appears whole or not at all.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use bundle::{
    BlurrySettings, BundleWriter, EdgeSettings, EdmSchedule, FORMAT_VERSION, Manifest,
    PriorSettings, Source, Stage, StageName, Subject, UnclipSettings, WriteError,
};
use prost::Message;
use sha2::{Digest, Sha256};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::graph::Graph;
use crate::plan::Plan;
use crate::section::{Problem, Section, chain};
use crate::stages::{autoencoder, backbone, bridge, captioner, prior, subject, text, unet, vision};
use crate::weights;

/// Largest mask that is carried in a bundle.
const MAX_MASK_BYTES: u64 = 64 << 20;

/// Keys of sgm engines that no stage needs: what is left of the towers, training's losses and tables.
const UNUSED_OF_ENGINES: [&str; 6] = [
    "first_stage_model.encoder.",
    "first_stage_model.quant_conv.",
    "first_stage_model.loss.",
    "conditioner.",
    "denoiser.",
    "model_ema.",
];

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
    /// A tensor cannot be read while it is written to the bundle.
    #[error("cannot read {key}")]
    Tensor {
        /// Name of the weight.
        key: String,
        /// What is wrong.
        source: CheckpointError,
    },
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
struct Planned<'c> {
    place: Place,
    graph: Graph<'c>,
}

enum Place {
    Shared(StageName),
    Subject {
        id: String,
        index: u64,
        voxels: u64,
        mask: Option<PathBuf>,
    },
}

impl Place {
    fn label(&self) -> String {
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
struct Opened {
    role: &'static str,
    path: PathBuf,
    checkpoint: Checkpoint,
}

impl Opened {
    fn file(&self) -> String {
        self.path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// The tensors under the checkpoint's usual key, or at its root.
    fn section(&self, root: Option<&str>) -> Result<Section<'_>, Problem> {
        let tensors = match root {
            Some(root) => self.checkpoint.section(root).map_err(|error| Problem {
                file: self.file(),
                key: root.into(),
                message: chain(&error),
            })?,
            None => self.checkpoint.root(),
        };
        Ok(Section::new(&self.file(), tensors))
    }
}

fn open(plan: &Plan) -> Result<Vec<Opened>, ExportError> {
    let sources = [
        ("mindeye", &plan.mindeye),
        ("unclip", &plan.unclip),
        ("autoenc", &plan.autoenc),
        ("sdxl", &plan.sdxl),
        ("bridge", &plan.bridge),
        ("captioner", &plan.captioner),
    ];
    sources
        .into_iter()
        .filter_map(|(role, path)| path.clone().map(|path| (role, path)))
        .map(|(role, path)| match Checkpoint::open(&path) {
            Ok(checkpoint) => Ok(Opened {
                role,
                path,
                checkpoint,
            }),
            Err(source) => Err(ExportError::Open { path, source }),
        })
        .collect()
}

/// Exports a plan to `out`; `say` is told of each step.
///
/// # Errors
/// [`ExportError`]; nothing is left behind.
pub fn export(plan: &Plan, out: &Path, say: &mut dyn FnMut(&str)) -> Result<(), ExportError> {
    let opened = open(plan)?;
    let description = describe(plan, &opened)?;
    let mut writer = BundleWriter::create(out)?;
    let (stages, sources) = std::thread::scope(|scope| {
        let hashing = scope.spawn(|| {
            opened
                .iter()
                .map(hash_source)
                .collect::<Result<Vec<_>, _>>()
        });
        let written = write_stages(&description.planned, &mut writer, say);
        let sources = hashing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, ExportError>((written?, sources?))
    })?;

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
        sources,
        licences: plan.licences.clone(),
        files: BTreeMap::new(),
    };
    for (planned, stage) in description.planned.into_iter().zip(stages) {
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
    Ok(())
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

fn hash_source(opened: &Opened) -> Result<Source, ExportError> {
    let error = |source| ExportError::Read {
        path: opened.path.clone(),
        source,
    };
    let mut file = File::open(&opened.path).map_err(error)?;
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
        role: opened.role.into(),
        file: opened.file(),
        len_bytes,
        sha256,
    })
}

/// Writes graphs and weights in plan order; all numbers are checked, and all bad ones named, before it fails.
fn write_stages(
    planned: &[Planned<'_>],
    writer: &mut BundleWriter,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Stage>, ExportError> {
    let mut stages = Vec::new();
    let mut problems = Vec::new();
    for Planned { place, graph } in planned {
        let (graph_path, weights_path) = place.paths();
        let mut file = writer.weights(&weights_path)?;
        let offsets = weights::write(graph.weights(), &mut file, &mut problems)?;
        say(&format!(
            "{}: {} tensors, {}",
            place.label(),
            offsets.len(),
            megabytes(file.len_bytes())
        ));
        writer.close(file)?;
        let model = graph.model(&weights_path, &offsets);
        writer.add(&graph_path, &model.encode_to_vec())?;
        let (inputs, outputs) = graph.specs();
        stages.push(Stage {
            graph: graph_path,
            weights: Some(weights_path),
            inputs,
            outputs,
        });
    }
    if problems.is_empty() {
        Ok(stages)
    } else {
        Err(ExportError::Problems { problems })
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn megabytes(len: u64) -> String {
    format!("{:.1} MB", len as f64 / 1e6)
}

/// Everything the manifest needs but hashes.
struct Description<'c> {
    planned: Vec<Planned<'c>>,
    blurry: Option<BlurrySettings>,
    prior: Option<PriorSettings>,
    unclip: Option<UnclipSettings>,
}

/// Builds every graph; fails with all problems of all checkpoints at once.
fn describe<'c>(plan: &Plan, opened: &'c [Opened]) -> Result<Description<'c>, ExportError> {
    let mut builder = Builder {
        plan,
        problems: Vec::new(),
        sections: Vec::new(),
        tokens: plan.settings.context_tokens,
        dim: None,
        blurry_latent: plan.settings.blurry_latent_hw,
        description: Description {
            planned: Vec::new(),
            blurry: None,
            prior: None,
            unclip: None,
        },
    };
    for source in opened {
        let root = match source.role {
            "mindeye" | "bridge" => Some("model_state_dict"),
            "unclip" => Some("state_dict"),
            _ => None,
        };
        match source.section(root) {
            Ok(section) => match source.role {
                "mindeye" => builder.mindeye(section),
                "unclip" => builder.unclip(section),
                "sdxl" => builder.sdxl(section),
                "bridge" => builder.bridge(section),
                "captioner" => builder.captioner(section),
                _ => builder.autoenc(section),
            },
            Err(problem) => builder.problems.push(problem),
        }
    }
    builder.finish()
}

struct Builder<'p, 'c> {
    plan: &'p Plan,
    problems: Vec<Problem>,
    sections: Vec<Section<'c>>,
    tokens: u64,
    dim: Option<u64>,
    blurry_latent: [u64; 2],
    description: Description<'c>,
}

impl<'c> Builder<'_, 'c> {
    fn add(&mut self, name: StageName, graph: Graph<'c>) {
        self.description.planned.push(Planned {
            place: Place::Shared(name),
            graph,
        });
    }

    fn mindeye(&mut self, s: Section<'c>) {
        let precision = self.plan.precision;
        let shape = backbone::BackboneShape::read(&s);
        self.tokens = shape.tokens;
        self.dim = Some(shape.dim);
        self.subjects(&s, shape.hidden);
        let graph = backbone::build(&s, shape, precision);
        let blurry = graph
            .specs()
            .1
            .into_iter()
            .find(|output| output.name == "blurry_latent");
        if let Some((Some(height), Some(width))) =
            blurry.map(|latent| (latent.fixed(2), latent.fixed(3)))
        {
            self.blurry_latent = [height, width];
        }
        self.add(StageName::Backbone, graph);
        if s.has_prefix("diffusion_prior.") {
            self.prior(&s, shape);
        }
        self.sections.push(s);
    }

    fn subjects(&mut self, s: &Section<'c>, hidden: u64) {
        let indices = subject::indices(s);
        if indices.is_empty() {
            s.problem(
                "ridge.linears.0.weight",
                "expected at least one subject, the key is missing".into(),
            );
        }
        let chosen: Vec<(u64, Option<String>, Option<PathBuf>)> = if self.plan.subjects.is_empty() {
            indices.iter().map(|&index| (index, None, None)).collect()
        } else {
            self.plan
                .subjects
                .iter()
                .map(|subject| (subject.index, subject.id.clone(), subject.mask.clone()))
                .collect()
        };
        for &index in indices
            .iter()
            .filter(|index| !chosen.iter().any(|(chosen, ..)| chosen == *index))
        {
            s.ignore(&format!("ridge.linears.{index}."));
        }
        for (index, id, mask) in chosen {
            let id = id.unwrap_or_else(|| format!("subj{:02}", index + 1));
            let graph = subject::build(s, index, hidden, self.plan.precision);
            let voxels = subject::voxels(s, index);
            self.description.planned.push(Planned {
                place: Place::Subject {
                    id,
                    index,
                    voxels,
                    mask,
                },
                graph,
            });
        }
    }

    fn prior(&mut self, s: &Section<'c>, shape: backbone::BackboneShape) {
        let settings = &self.plan.settings;
        let (tokens, dim) = prior::token_shape(s);
        if (tokens, dim) != (shape.tokens, shape.dim) {
            let message = format!(
                "expected the backbone's {} tokens of {}, found {tokens} of {dim}",
                shape.tokens, shape.dim
            );
            s.problem("diffusion_prior.net.null_image_embed", message);
        }
        let graph = prior::build(s, self.plan.precision);
        let (timesteps, tables) = prior::schedule(s);
        self.description.prior = Some(PriorSettings {
            tokens,
            dim,
            timesteps,
            sampling_steps: settings.prior_steps,
            eta: settings.prior_eta,
            cond_scale: settings.prior_cond_scale,
            tables,
        });
        self.add(StageName::Prior, graph);
    }

    fn unclip(&mut self, s: Section<'c>) {
        let (settings, precision) = (&self.plan.settings, self.plan.precision);
        let options = unet::UnetOptions {
            head_channels: settings.num_head_channels,
            latent: settings.latent_hw,
            tokens: self.tokens,
        };
        let graph = unet::build("unclip", &s, options, precision);
        let width = graph
            .specs()
            .0
            .iter()
            .find(|input| input.name == "context")
            .and_then(|context| context.fixed(2));
        if let (Some(width), Some(dim)) = (width, self.dim)
            && width != dim
        {
            s.problem(
                "model.diffusion_model",
                format!("expected a context of the backbone's {dim} channels, found {width}"),
            );
        }
        let adm = unet::vector_len(&s);
        let expected = settings.vector_embed_dim * settings.vector_values.len() as u64;
        if adm != expected {
            let message = format!(
                "expected {} values of {} numbers each = {expected} columns, found {adm}",
                settings.vector_values.len(),
                settings.vector_embed_dim
            );
            s.problem("model.diffusion_model.label_emb.0.0.weight", message);
        }
        let [latent_height, latent_width] = settings.latent_hw;
        self.description.unclip = Some(UnclipSettings {
            latent_channels: unet::latent_channels(&s),
            latent_height,
            latent_width,
            scale_factor: settings.scale_factor,
            guidance: settings.guidance,
            steps: settings.unclip_steps,
            offset_noise: settings.offset_noise,
            vector: decoder::conditioning::vector(
                &settings.vector_values,
                settings.vector_embed_dim,
            ),
            schedule: EdmSchedule {
                linear_start: settings.linear_start,
                linear_end: settings.linear_end,
                steps: settings.schedule_steps,
            },
            image_scale: settings.image_scale,
            image_shift: settings.image_shift,
            edge: EdgeSettings {
                steps: settings.edge_steps,
            },
        });
        self.add(StageName::Unclip, graph);
        let prefix = "first_stage_model.";
        let keys = autoencoder::DecoderKeys::sgm(&s, &format!("{prefix}decoder."));
        let graph = autoencoder::build(
            "vae_decoder",
            &s,
            &format!("{prefix}post_quant_conv"),
            &keys,
            settings.latent_hw,
            precision,
        );
        self.add(StageName::VaeDecoder, graph);
        if autoencoder::has_encoder(&s, prefix) {
            let latent = settings.latent_hw;
            let graph = autoencoder::build_encoder("vae_encoder", &s, prefix, latent, precision);
            self.add(StageName::VaeEncoder, graph);
        }
        let visual = "conditioner.embedders.0.model.visual.";
        if s.has_prefix(visual) {
            let (side, head) = (settings.vision_side, settings.vision_head_width);
            let graph = vision::build(&s, visual, side, head, precision);
            self.add(StageName::ImageEncoder, graph);
        }
        // Parts of the engine that nothing here uses, and tables that training leaves behind.
        for other in UNUSED_OF_ENGINES {
            s.ignore(other);
        }
        self.sections.push(s);
    }

    fn sdxl(&mut self, s: Section<'c>) {
        let (settings, precision) = (&self.plan.settings, self.plan.precision);
        let clip_l = "conditioner.embedders.0.transformer.text_model.";
        let open_clip = "conditioner.embedders.1.model.";
        let first = text::clip_l(
            &s,
            clip_l,
            settings.clip_l_heads,
            settings.clip_l_layer,
            precision,
        );
        let second = text::open_clip(&s, open_clip, settings.open_clip_heads, precision);
        let tokens = s.axis(&format!("{open_clip}positional_embedding"), 2, 0);
        let options = unet::UnetOptions {
            head_channels: settings.refiner_head_channels,
            latent: settings.refiner_latent_hw,
            tokens,
        };
        let graph = unet::build("refiner", &s, options, precision);
        self.add(StageName::TextEncoder1, first);
        self.add(StageName::TextEncoder2, second);
        self.add(StageName::Refiner, graph);
        let prefix = "first_stage_model.";
        let latent = settings.refiner_latent_hw;
        let keys = autoencoder::DecoderKeys::sgm(&s, &format!("{prefix}decoder."));
        let graph = autoencoder::build(
            "refiner_vae_decoder",
            &s,
            &format!("{prefix}post_quant_conv"),
            &keys,
            latent,
            precision,
        );
        self.add(StageName::RefinerVaeDecoder, graph);
        let graph =
            autoencoder::build_encoder("refiner_vae_encoder", &s, prefix, latent, precision);
        self.add(StageName::RefinerVaeEncoder, graph);
        for other in UNUSED_OF_ENGINES {
            s.ignore(other);
        }
        self.sections.push(s);
    }

    fn captioner(&mut self, s: Section<'c>) {
        let settings = &self.plan.settings;
        let options = captioner::CaptionerOptions {
            heads: settings.caption_heads,
            vision: settings.caption_vision,
            words: settings.caption_words,
        };
        let prefix = captioner::prefix(&s, options, self.plan.precision);
        let step = captioner::step(&s, options, self.plan.precision);
        self.add(StageName::CaptionerPrefix, prefix);
        self.add(StageName::Captioner, step);
        // The captioner sees through the bridge and not through its own image tower.
        for other in ["git.image_encoder.", "git.embeddings.position_ids"] {
            s.ignore(other);
        }
        self.sections.push(s);
    }

    fn bridge(&mut self, s: Section<'c>) {
        let graph = bridge::build(&s, self.plan.precision);
        self.add(StageName::CaptionBridge, graph);
        self.sections.push(s);
    }

    fn autoenc(&mut self, s: Section<'c>) {
        let keys = autoencoder::DecoderKeys::diffusers(&s, "decoder.");
        let graph = autoencoder::build(
            "blurry_decoder",
            &s,
            "post_quant_conv",
            &keys,
            self.blurry_latent,
            self.plan.precision,
        );
        self.add(StageName::BlurryDecoder, graph);
        self.description.blurry = Some(BlurrySettings {
            latent_scale: self.plan.settings.blurry_scale,
        });
        for other in ["encoder.", "quant_conv."] {
            s.ignore(other);
        }
        self.sections.push(s);
    }

    fn finish(mut self) -> Result<Description<'c>, ExportError> {
        for s in &self.sections {
            if !self.plan.allow_unexpected {
                for key in s.unexpected() {
                    s.problem(&key, "no part of the network knows this tensor; --allow-unexpected exports without it".into());
                }
            }
        }
        let broken =
            !self.problems.is_empty() || self.sections.iter().any(|s| !s.problems().is_empty());
        if !broken {
            return Ok(self.description);
        }
        for s in &self.sections {
            s.check_all_finite();
            self.problems.extend(s.problems());
        }
        self.problems.sort();
        Err(ExportError::Problems {
            problems: self.problems,
        })
    }
}
