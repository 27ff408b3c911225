//! Every stage's graph from open checkpoints, and all that is wrong with them at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bundle::{
    BlurrySettings, EdgeSettings, EdmSchedule, PriorSettings, RefinerEdgeSettings, RefinerSettings,
    StageName, UnclipSettings,
};

use crate::export::{ExportError, LORA, Opened, Place, Planned};
use crate::graph::Graph;
use crate::lora::{Adapter, Merged, Outcome, Target};
use crate::plan::{LoraPlan, ModelSettings, Plan};
use crate::section::{Problem, Section, chain};
use crate::stages::{
    autoencoder, backbone, bridge, captioner, preview, prior, subject, text, unet, vision,
};
use crate::vocabulary;

/// Keys of sgm engines that no stage needs: what is left of the towers, training's losses and tables.
const UNUSED_OF_ENGINES: [&str; 6] = [
    "first_stage_model.encoder.",
    "first_stage_model.quant_conv.",
    "first_stage_model.loss.",
    "conditioner.",
    "denoiser.",
    "model_ema.",
];

/// Everything the manifest needs but hashes.
pub(crate) struct Description<'c> {
    /// Graphs in the order they are written.
    pub(crate) planned: Vec<Planned<'c>>,
    /// Constants of the blurry picture.
    pub(crate) blurry: Option<BlurrySettings>,
    /// Constants of the prior.
    pub(crate) prior: Option<PriorSettings>,
    /// Constants of unCLIP.
    pub(crate) unclip: Option<UnclipSettings>,
    /// Constants of the refiner.
    pub(crate) refiner: Option<RefinerSettings>,
    /// The file of CLIP's vocabulary.
    pub(crate) clip: Option<Vec<u8>>,
    /// The file of the captioner's vocabulary.
    pub(crate) caption: Option<Vec<u8>>,
    /// What each LoRA file of the plan did.
    pub(crate) loras: Vec<Merged>,
}

/// Builds every graph; fails with all problems of all checkpoints at once.
pub(crate) fn describe<'c>(
    plan: &Plan,
    opened: &'c [Opened],
) -> Result<Description<'c>, ExportError> {
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
            refiner: None,
            clip: None,
            caption: None,
            loras: Vec::new(),
        },
        loras: opened
            .iter()
            .filter(|source| source.role == LORA)
            .zip(&plan.loras)
            .collect(),
        outcomes: BTreeMap::new(),
    };
    for source in opened.iter().filter(|source| source.role != LORA) {
        let root = match source.role {
            "mindeye" | "bridge" => Some("model_state_dict"),
            "unclip" => Some("state_dict"),
            _ => None,
        };
        match source.section(root) {
            Ok(mut section) => match source.role {
                "mindeye" => builder.mindeye(section),
                "unclip" => {
                    builder.merge(Target::Unclip, &mut section);
                    builder.unclip(section);
                }
                "sdxl" => {
                    builder.merge(Target::Refiner, &mut section);
                    builder.sdxl(section);
                }
                "bridge" => builder.bridge(section),
                "captioner" => builder.captioner(section),
                "preview" => builder.preview(section),
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
    /// LoRA files and what is to be done with them, in order.
    loras: Vec<(&'c Opened, &'p LoraPlan)>,
    /// What became of each, by its place.
    outcomes: BTreeMap<usize, Outcome>,
}

impl<'c> Builder<'_, 'c> {
    /// Gives the layers of an engine the changes of all LoRA files that go into it.
    fn merge(&mut self, target: Target, section: &mut Section<'c>) {
        for (index, (source, lora)) in self.loras.iter().enumerate() {
            if lora.into != target {
                continue;
            }
            let adapter = Adapter {
                index,
                file: source.file(),
                tensors: source.root(),
                into: lora.into,
                weight: lora.weight,
                allow_unmatched: &lora.allow_unmatched,
            };
            let mut outcome = adapter.merge(section);
            self.problems.append(&mut outcome.problems);
            self.outcomes.insert(index, outcome);
        }
    }

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
            edge_steps: settings.prior_edge_steps,
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
            schedule: schedule(settings),
            image_scale: settings.image_scale,
            image_shift: settings.image_shift,
            edge: EdgeSettings {
                sampler: settings.edge_sampler,
                steps: settings.edge_steps,
                eta: settings.edge_eta,
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
        let channels = unet::latent_channels(&s);
        self.description.refiner = Some(refiner_settings(settings, channels));
        self.clip_vocabulary(
            &s,
            [
                format!("{clip_l}embeddings.token_embedding.weight"),
                format!("{open_clip}token_embedding.weight"),
            ],
        );
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

    /// CLIP's vocabulary, where both towers have a row for each of its ids.
    fn clip_vocabulary(&mut self, s: &Section<'c>, embeddings: [String; 2]) {
        for key in embeddings {
            if let Some(rows) = s.shape(&key).and_then(|shape| shape.first().copied())
                && rows < vocabulary::CLIP_IDS
            {
                let expected = vocabulary::CLIP_IDS;
                s.problem(
                    &key,
                    format!("expected at least CLIP's {expected} rows, found {rows}"),
                );
            }
        }
        match vocabulary::clip() {
            Ok(bytes) => self.description.clip = Some(bytes),
            Err(error) => s.problem("tokenizers.clip", chain(&error)),
        }
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
        let rows = s.shape("git.embeddings.word_embeddings.weight");
        let rows = rows.and_then(|shape| shape.first().copied());
        let weights = self.plan.captioner.as_deref();
        let folder = weights.and_then(Path::parent).unwrap_or(Path::new(""));
        match vocabulary::caption(folder, rows) {
            Ok(bytes) => self.description.caption = Some(bytes),
            Err(problems) => self.problems.extend(problems),
        }
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

    fn preview(&mut self, s: Section<'c>) {
        let keys = preview::PreviewKeys::read(&s);
        let channels = keys.channels(&s);
        let unclip = self.description.unclip.as_ref();
        if let Some(expected) = unclip.map(|unclip| unclip.latent_channels)
            && expected != channels
        {
            s.problem(
                "latent",
                format!("expected unclip's {expected} channels, found {channels}"),
            );
        }
        let latent = self.plan.settings.latent_hw;
        let graph = preview::build(&s, &keys, latent, self.plan.precision);
        self.add(StageName::PreviewDecoder, graph);
        s.ignore("encoder.");
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
            let planned = &self.description.planned;
            self.description.loras = self
                .outcomes
                .iter()
                .map(|(&index, outcome)| Merged::of(index, outcome, planned))
                .collect();
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

fn schedule(settings: &ModelSettings) -> EdmSchedule {
    EdmSchedule {
        linear_start: settings.linear_start,
        linear_end: settings.linear_end,
        steps: settings.schedule_steps,
    }
}

fn refiner_settings(settings: &ModelSettings, latent_channels: u64) -> RefinerSettings {
    let [latent_height, latent_width] = settings.refiner_latent_hw;
    RefinerSettings {
        latent_channels,
        latent_height,
        latent_width,
        scale_factor: settings.scale_factor,
        guidance: settings.guidance,
        steps: settings.refiner_steps,
        entrance: settings.refiner_entrance,
        schedule: schedule(settings),
        sizes: settings.refiner_sizes.clone(),
        negative_prompt: settings.negative_prompt.clone(),
        // The SDXL base decodes to -1..1.
        image_scale: 0.5,
        image_shift: 0.5,
        side: settings.blend_side,
        blend: settings.blend,
        edge: RefinerEdgeSettings {
            sampler: EdgeSettings {
                sampler: settings.refiner_edge_sampler,
                steps: settings.refiner_edge_steps,
                eta: settings.edge_eta,
            },
            entrance: settings.refiner_edge_entrance,
            keep_latent: settings.refiner_keep_latent,
        },
    }
}
