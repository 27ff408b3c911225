//! LoRA files merged at export: `W + weight * alpha / rank * up @ down`.
//!
//! An entry belongs to the layer whose name it has, in sgm's, diffusers', transformers' or
//! OpenCLIP's spelling; which layers there are is told by the checkpoint. The sum is made while the
//! weight streams, in single precision, and is checked like any other weight.

mod delta;
mod entries;
mod layers;
mod pattern;
mod record;
mod unet_names;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

pub use delta::Delta;
use entries::Entry;
use layers::{Found, Layer, Layers};
pub(crate) use record::Merged;

use crate::checkpoint::TensorRef;
use crate::section::{Problem, Section};

/// Which networks a LoRA is merged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The SDXL refiner and its text towers.
    Refiner,
    /// The unCLIP UNet.
    Unclip,
}

impl Target {
    /// The network's name.
    #[must_use]
    pub fn stage(self) -> bundle::StageName {
        match self {
            Target::Refiner => bundle::StageName::Refiner,
            Target::Unclip => bundle::StageName::Unclip,
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Target::Refiner => "refiner or its text encoders",
            Target::Unclip => "unclip",
        }
    }
}

/// A LoRA file's tensors and what is to be done with them.
#[derive(Debug)]
pub(crate) struct Adapter<'c, 'p> {
    /// Place in the plan.
    pub(crate) index: usize,
    /// File name without its folder.
    pub(crate) file: String,
    /// Its tensors.
    pub(crate) tensors: Vec<(String, TensorRef<'c>)>,
    /// Where it goes.
    pub(crate) into: Target,
    /// What its changes are multiplied with.
    pub(crate) weight: f32,
    /// Names, with `*`, of entries that may fit no layer.
    pub(crate) allow_unmatched: &'p [String],
}

/// What became of a file's entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Entries that fit a layer.
    pub(crate) merged: Vec<String>,
    /// Entries that fit no layer, and may.
    pub(crate) left_out: Vec<String>,
    /// Everything that is wrong.
    pub(crate) problems: Vec<Problem>,
}

impl<'c> Adapter<'c, '_> {
    /// Gives every layer of `section` that the file changes its change.
    pub(crate) fn merge(&self, section: &mut Section<'c>) -> Outcome {
        let layers = Layers::of(section, self.into == Target::Refiner);
        let contents = entries::read(&self.file, self.tensors.iter().cloned());
        let mut outcome = Outcome {
            problems: contents.problems,
            ..Outcome::default()
        };
        if self.tensors.is_empty() {
            outcome.problems.push(self.problem(
                "the top of the file",
                "expected LoRA entries, found no tensors".into(),
            ));
        }
        for key in contents.foreign {
            let message = "expected a key of a LoRA file, found another".into();
            self.unmatched(&key, &[], (&key, message), &mut outcome);
        }
        let mut taken: BTreeMap<usize, String> = BTreeMap::new();
        let mut deltas = Vec::new();
        for entry in contents.entries {
            let (layer_index, layer) = match self.layer(&layers, &entry) {
                Ok(found) => found,
                Err((key, message)) => {
                    let factors = [Some(&entry.up), Some(&entry.down), entry.mid.as_ref()];
                    let keys: Vec<&str> =
                        factors.into_iter().flatten().map(TensorRef::name).collect();
                    self.unmatched(&entry.name, &keys, (&key, message), &mut outcome);
                    continue;
                }
            };
            if let Some(other) = taken.insert(layer_index, entry.name.clone()) {
                let message = format!("expected one entry per layer, {other} is for the same one");
                outcome.problems.push(self.problem(&entry.name, message));
                continue;
            }
            outcome.merged.push(entry.name.clone());
            deltas.push((layer.key.clone(), self.delta(entry, layer)));
        }
        if outcome.problems.is_empty() {
            for (key, delta) in deltas {
                section.merge(&key, delta);
            }
        }
        outcome
    }

    fn problem(&self, key: &str, message: String) -> Problem {
        Problem {
            file: self.file.clone(),
            key: key.into(),
            message,
        }
    }

    /// The layer of an entry, or the key that does not fit and why.
    fn layer<'l>(
        &self,
        layers: &'l Layers,
        entry: &Entry<'c>,
    ) -> Result<(usize, &'l Layer), (String, String)> {
        let (index, layer) = match layers.find(&entry.name) {
            Found::Layer(index, layer) => (index, layer),
            Found::Nothing => {
                let message = format!(
                    "expected a layer of {}, found none of this name",
                    self.into.describe()
                );
                return Err((entry.down.name().into(), message));
            }
            Found::Several(keys) => {
                let message = format!("expected one layer of this name, found {}", keys.join(", "));
                return Err((entry.down.name().into(), message));
            }
        };
        let (expected, found) = (layer.shape, entry.shape());
        if expected == found {
            return Ok((index, layer));
        }
        let wrong = if expected[0] != found[0] {
            &entry.up
        } else if expected[1] != found[1] || entry.mid.is_none() {
            &entry.down
        } else {
            entry.mid.as_ref().unwrap_or(&entry.down)
        };
        let message = format!(
            "expected {} as {} has it, found {}",
            show_layer(expected),
            layer.key,
            show_layer(found)
        );
        Err((wrong.name().into(), message))
    }

    fn delta(&self, entry: Entry<'c>, layer: &Layer) -> Delta<'c> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "weights are single precision"
        )]
        let scale = (f64::from(self.weight) * entry.scale) as f32;
        Delta {
            adapter: self.index,
            entry: Arc::from(entry.name),
            up: entry.up,
            down: entry.down,
            mid: entry.mid,
            scale,
            first_row: usize::try_from(layer.first_row).expect("a row of a weight in a file"),
            turned: layer.turned,
        }
    }

    /// Notes an entry that fits nothing: left out where it may be, else a problem.
    fn unmatched(
        &self,
        name: &str,
        keys: &[&str],
        (key, message): (&str, String),
        outcome: &mut Outcome,
    ) {
        let allowed = self.allow_unmatched.iter().any(|pattern| {
            pattern::fits(pattern, name) || keys.iter().any(|key| pattern::fits(pattern, key))
        });
        if allowed {
            outcome.left_out.push(name.into());
        } else {
            let message = format!("{message}; allow_unmatched leaves it out by name");
            outcome.problems.push(self.problem(key, message));
        }
    }
}

/// A layer's rows, columns and, for convolutions, kernel.
fn show_layer([rows, columns, height, width]: [u64; 4]) -> String {
    if (height, width) == (1, 1) {
        format!("{rows} x {columns}")
    } else {
        format!("{rows} x {columns} with a kernel of {height} x {width}")
    }
}
