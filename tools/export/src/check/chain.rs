//! The whole way: betas in, final picture out, through the very code that the box runs.
//!
//! The reference set keeps every random draw of one run. [`decoder::Decoder`] is given these draws
//! and tells what each part hands to the next, so nothing of the chain is written twice here.

use std::collections::BTreeMap;

use decoder::{Decoder, Fidelity, LoadOptions, NoiseKey, Progress, Reconstruction, Stream, Tier};
use ndarray::{ArrayD, Axis};

use super::{CheckError, Parity, Row, Rows, Tolerance, Variant, Vectors};

/// Parts of the chain: what the decoder calls them, where they are recorded, how near they are.
///
/// The recorded run begins the prior with tokens that carry the rounding noise of a LayerNorm over a
/// single element (3.4e-5, see the reference set's README); ours are exact, which is what the first
/// row shows. Through the prior that noise grows to 6e-4 of the tokens, and is then 3e-4 of the
/// latent's size; given the recorded tokens, the prior is within 2e-4 (`prior_ddim`). So the three
/// rows behind the prior have three times what that noise makes of them, and the others, which the
/// blurry picture and the refiner's fresh noise keep apart from it, what the parts have alone.
const PARTS: [(&str, &str, &str, Tolerance); 9] = [
    (
        "brain_tokens",
        "average",
        "ref64/backbone_avg",
        Tolerance::Close(2e-5),
    ),
    (
        "clip_tokens",
        "prior_ddim",
        "prior_out",
        Tolerance::Close(2e-3),
    ),
    (
        "latent",
        "unclip_sample",
        "latent_final",
        Tolerance::Close(1.6e-2),
    ),
    (
        "unrefined",
        "unclip_sample",
        "samples",
        Tolerance::Picture(6e-4),
    ),
    (
        "blurry",
        "autoenc",
        "blurry_image",
        Tolerance::Picture(2e-4),
    ),
    (
        "refiner_in",
        "pipeline",
        "refiner_in",
        Tolerance::Picture(6e-4),
    ),
    (
        "refiner_latent",
        "pipeline",
        "latent_final",
        Tolerance::Close(4e-4),
    ),
    ("refined", "pipeline", "refined", Tolerance::Picture(1e-4)),
    ("final", "pipeline", "final", Tolerance::Picture(1e-4)),
];

/// The recorded draws, by purpose, in order.
type Draws = BTreeMap<Stream, Vec<ArrayD<f32>>>;

impl Parity {
    /// One recorded run from betas to the final picture, and what the `edge` fidelity's short cut
    /// from latent to latent costs.
    pub(super) fn chain_rows(&self) -> Rows {
        const NAMES: [&str; 5] = [
            "average",
            "prior_ddim",
            "unclip_sample",
            "autoenc",
            "pipeline",
        ];
        let mut recorded = BTreeMap::new();
        for name in NAMES {
            match self.vectors(name)? {
                Some(vectors) => recorded.insert(name, vectors),
                None => return Ok(vec![Row::absent("chain", format!("no io_{name}"))]),
            };
        }
        if self.variant() != Some(Variant::Main) {
            return Ok(vec![Row::absent(
                "chain",
                "recorded with other checkpoints",
            )]);
        }
        if !self.bundle.manifest().loras.is_empty() {
            return Ok(vec![Row::absent("chain", "recorded without LoRA files")]);
        }
        let Some(subject) = self
            .bundle
            .manifest()
            .subjects
            .iter()
            .find(|s| s.index == 0)
        else {
            return Ok(vec![Row::absent("chain", "recorded with subject 0")]);
        };
        let load =
            |options: LoadOptions| Decoder::load(&self.runtime, &self.bundle, &subject.id, options);
        let decoder = load(Fidelity::Reference.into())?;
        if let Some(off) = decoder.switched_off().first() {
            return Ok(vec![Row::absent(
                "chain",
                format!("the bundle has no {}", off.lacks),
            )]);
        }
        let voxels = first(recorded["average"].floats("voxels")?);
        if voxels.shape().last().map(|&len| len as u64) != Some(subject.voxels) {
            return Ok(vec![Row::absent("chain", "recorded with other voxels")]);
        }
        let mut rows = self.recorded_run(&decoder, &recorded, &voxels)?;
        let short_cut = |keep_latent| LoadOptions {
            keep_latent: Some(keep_latent),
            ..Fidelity::Edge.into()
        };
        let (through_latent, through_picture) = (load(short_cut(true))?, load(short_cut(false))?);
        rows.push(handover_row(&through_latent, &through_picture, &voxels)?);
        Ok(rows)
    }

    fn recorded_run(
        &self,
        decoder: &Decoder,
        recorded: &BTreeMap<&str, Vectors>,
        voxels: &ArrayD<f32>,
    ) -> Rows {
        let mut draws = draws(recorded)?;
        for of_purpose in draws.values_mut() {
            of_purpose.reverse();
        }
        let mut draw = |stream: Stream, shape: &[usize]| {
            let drawn = draws.get_mut(&stream).and_then(Vec::pop);
            // One draw too many shows as a difference, and is not hidden by a panic.
            drawn
                .filter(|drawn| drawn.shape() == shape)
                .unwrap_or_else(|| ArrayD::from_elem(shape, f32::NAN))
        };
        let mut parts = BTreeMap::new();
        let clock = std::time::Instant::now();
        let made = decode(
            decoder,
            voxels,
            &mut |progress| {
                if let Progress::Part { name, values } = progress {
                    parts.insert(name, values.clone());
                }
            },
            &mut draw,
        )?;
        let took = clock.elapsed();
        let mut rows = Vec::new();
        for (part, file, name, tolerance) in PARTS {
            let expected = recorded[file].floats(name)?;
            // Two of the files hold two samples; the run is the first.
            let expected = expected.slice_axis(Axis(0), (0..1).into()).to_owned();
            let found = parts.remove(part).unwrap_or_default();
            let row = self.compared("chain", part, &found, &expected, tolerance);
            rows.push(if part == "final" { row.took(took) } else { row });
        }
        if let Some(expected) = self.recorded_captions()?.first() {
            let found = made.caption.unwrap_or_default();
            let compared = std::iter::once((found, expected.as_str()));
            rows.push(self.texts_row("chain", "caption", compared));
        }
        Ok(rows)
    }
}

fn first(values: &ArrayD<f32>) -> ArrayD<f32> {
    values.index_axis(Axis(0), 0).to_owned()
}

/// The draws in the order the original made them.
fn draws(recorded: &BTreeMap<&str, Vectors>) -> Result<Draws, CheckError> {
    let sample = |values: &ArrayD<f32>| values.slice_axis(Axis(0), (0..1).into()).to_owned();
    let prior = &recorded["prior_ddim"];
    let mut of_prior = vec![sample(prior.floats("init_noise")?)];
    let steps = prior.floats("step_noise")?;
    of_prior.extend(
        steps
            .axis_iter(Axis(0))
            .map(|step| sample(&step.to_owned())),
    );
    let taken = |file: &str, names: &[&str]| {
        let vectors = &recorded[file];
        let draws = names.iter().map(|name| vectors.floats(name).cloned());
        draws.collect::<Result<Vec<_>, _>>()
    };
    let unclip = taken(
        "unclip_sample",
        &["z", "uncond_tokens", "noise", "offset_noise"],
    )?;
    let refiner = taken("pipeline", &["enc_noise", "noise"])?;
    Ok(Draws::from([
        (Stream::Prior, of_prior),
        (Stream::Unclip, unclip),
        (Stream::Refiner, refiner),
    ]))
}

fn decode(
    decoder: &Decoder,
    voxels: &ArrayD<f32>,
    progress: &mut dyn FnMut(Progress<'_>),
    draw: &mut decoder::Draw<'_>,
) -> Result<Reconstruction, CheckError> {
    let repetitions = voxels.len_of(Axis(0));
    let betas = voxels
        .view()
        .into_shape_with_order((repetitions, voxels.len() / repetitions.max(1)))
        .map_err(|_| decoder::DecodeError::Empty)?;
    Ok(decoder.decode_with(betas, draw, progress)?)
}

/// The `edge` picture refined from unCLIP's latent itself, beside the one refined from its picture.
///
/// Nothing says how near the two must be: the row is a measurement.
fn handover_row(
    through_latent: &Decoder,
    through_picture: &Decoder,
    voxels: &ArrayD<f32>,
) -> Result<Row, CheckError> {
    let key = NoiseKey {
        session_seed: 1,
        run: 1,
        trial: 1,
        tier: Tier::End,
    };
    let mut finals = Vec::new();
    for decoder in [through_latent, through_picture] {
        let mut noise = decoder::KeyedNoise::new(key);
        decode(
            decoder,
            voxels,
            &mut |progress| {
                if let Progress::Part {
                    name: "final",
                    values,
                } = progress
                {
                    finals.push(values.clone());
                }
            },
            &mut |stream, shape| noise.draw(stream, shape),
        )?;
    }
    let row = match finals.as_slice() {
        [found, expected] => {
            Row::measured("chain", "edge, latent kept", found.view(), expected.view())
        }
        _ => Row::absent("chain", "the edge fidelity made no final picture"),
    };
    Ok(row.remark("against the same picture refined from pixels: what the short cut costs"))
}
