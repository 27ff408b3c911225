//! What merging did, for the operator and for the manifest.

use std::collections::{BTreeMap, BTreeSet};

use bundle::{Lora, Source, StageName};

use super::Outcome;
use crate::export::{Place, Planned};
use crate::graph::Numbers;
use crate::plan::LoraPlan;

/// What a file did to the networks that are exported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Merged {
    /// Entries that changed a weight, by stage.
    by_stage: BTreeMap<StageName, u64>,
    /// Entries of layers that no stage runs.
    unused: Vec<String>,
    /// Entries that fit no layer.
    left_out: Vec<String>,
}

impl Merged {
    /// Looks for a file's changes in the graphs.
    pub(crate) fn of(adapter: usize, outcome: &Outcome, planned: &[Planned<'_>]) -> Merged {
        let mut by_stage: BTreeMap<StageName, BTreeSet<&str>> = BTreeMap::new();
        for planned in planned {
            let Place::Shared(stage) = planned.place else {
                continue;
            };
            for weight in planned.graph.weights() {
                let Numbers::Tensor(tensor, _) = &weight.numbers else {
                    continue;
                };
                let of_file = tensor.deltas().iter().filter(|d| d.adapter == adapter);
                for delta in of_file {
                    by_stage.entry(stage).or_default().insert(&delta.entry);
                }
            }
        }
        let used: BTreeSet<&str> = by_stage.values().flatten().copied().collect();
        let unused = outcome
            .merged
            .iter()
            .filter(|name| !used.contains(name.as_str()));
        Merged {
            unused: unused.cloned().collect(),
            left_out: outcome.left_out.clone(),
            by_stage: by_stage
                .into_iter()
                .map(|(stage, entries)| (stage, entries.len() as u64))
                .collect(),
        }
    }

    /// Lines for the operator.
    pub(crate) fn say(&self, file: &str, say: &mut dyn FnMut(&str)) {
        let merged: Vec<String> = self
            .by_stage
            .iter()
            .map(|(stage, count)| format!("{stage} ({count})"))
            .collect();
        let merged = if merged.is_empty() {
            "no stage".into()
        } else {
            merged.join(", ")
        };
        say(&format!("{file}: entries merged into {merged}"));
        for (names, why) in [
            (&self.unused, "its layer is not run by any stage"),
            (&self.left_out, "left out, as allow_unmatched says"),
        ] {
            for name in names {
                say(&format!("{file}: {name}: {why}"));
            }
        }
    }

    /// The manifest's record.
    pub(crate) fn record(self, plan: &LoraPlan, source: Source) -> Lora {
        Lora {
            network: plan.into.stage(),
            file: source.file,
            len_bytes: source.len_bytes,
            sha256: source.sha256,
            weight: plan.weight,
            merged: self.by_stage,
            unused: self.unused,
            left_out: self.left_out,
        }
    }
}
