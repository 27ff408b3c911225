//! A checkpoint folder of DeepSpeed's ZeRO, stage 1 or 2, as fp32 parameters.
//!
//! Each rank saved its part of the optimizer's fp32 copy of the weights: for every parameter group
//! one flat run of numbers. The runs of all ranks, in rank order, are the group's parameters one
//! behind the other in the order of `param_shapes`, then padding. Here a parameter becomes a row of
//! views into those runs; nothing is copied. Buffers come from the model states, as do frozen
//! parameters; shared parameters are second names.
//!
//! Source: DeepSpeed, `deepspeed/utils/zero_to_fp32.py`.

mod ranks;
mod states;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use super::torch::{self, Unpickled};
use super::{Assembly, Checkpoint, CheckpointError, Container, file_name, folder, open_raw};
use crate::section::chain;
use ranks::merge;
use states::ModelStates;

/// End of the names of files with model states.
pub(super) const MODEL_STATES: &str = "_model_states.pt";
/// End of the names of files with optimizer states.
pub(super) const OPTIM_STATES: &str = "_optim_states.pt";
const MODEL_FILE: &str = "mp_rank_00_model_states.pt";
/// Longest tag that is read.
const MAX_TAG_BYTES: u64 = 4096;

/// Opens the folder, or the one in it that its file `latest` names.
pub(super) fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
    let mut assembly = Assembly::default();
    let (states, prefix) = tagged(dir, &mut assembly)?;
    let names = folder::names(&states)?;
    let (model, optim) = files(&names)?;

    let mut problems = Vec::new();
    let at = |name: &str| (format!("{prefix}{name}"), states.join(name));
    let mut tensors = BTreeMap::new();
    let (name, path) = at(model);
    match read(&path).and_then(|(file, unpickled)| {
        let mut states = ModelStates::new(&unpickled, &name);
        let read = states.read();
        let (storages, wrong) = (states.placer.storages, states.problems);
        let base = assembly.add(name.clone(), &path, file, storages);
        problems.extend(wrong);
        read.map(|read| (read, base))
    }) {
        Ok((read, base)) => {
            let fixed = read.fixed.into_iter();
            tensors.extend(fixed.map(|(name, entry)| (name, entry.moved(base))));
            let merged = merge(
                &name,
                &read.groups,
                &optim,
                &at,
                &mut assembly,
                &mut tensors,
            );
            problems.extend(merged.err().unwrap_or_default());
            for (second, first) in read.shared {
                if let Some(entry) = tensors.get(&first).cloned() {
                    tensors.insert(second, entry);
                }
            }
        }
        Err(error) => problems.push(format!("{name}: {}", chain(&error))),
    }
    if !problems.is_empty() {
        return Err(CheckpointError::Parts { problems });
    }
    let top = tensors.keys().cloned().collect();
    let sections = BTreeMap::from([(String::new(), tensors)]);
    Ok(assembly.checkpoint(Container::Zero, sections, top))
}

/// The folder with the states, and how names of its files begin.
fn tagged(dir: &Path, assembly: &mut Assembly) -> Result<(PathBuf, String), CheckpointError> {
    let own = file_name(dir);
    let latest = dir.join("latest");
    // A tag's own folder may lie beside another one's `latest`; states go first.
    let here = folder::names(dir)?
        .iter()
        .any(|name| name.ends_with(MODEL_STATES) || name.ends_with(OPTIM_STATES));
    if here || !latest.is_file() {
        return Ok((dir.to_owned(), format!("{own}/")));
    }
    let text = folder::read_text(&latest, MAX_TAG_BYTES)?;
    let tag = text.trim();
    let refuse = |problem: String| CheckpointError::Entry {
        entry: "latest".into(),
        problem,
    };
    let mut components = Path::new(tag).components();
    if !matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    ) {
        return Err(refuse(format!(
            "expected the name of a folder beside it, found {tag:?}"
        )));
    }
    let states = dir.join(tag);
    if !states.is_dir() {
        return Err(refuse(format!(
            "expected a folder {tag} beside it, it is missing"
        )));
    }
    assembly.note(format!("{own}/latest"), &latest);
    Ok((states, format!("{own}/{tag}/")))
}

/// The file of the model states, and the optimizer states by rank.
fn files(names: &[String]) -> Result<(&str, Vec<&str>), CheckpointError> {
    let mut problems = Vec::new();
    let sharded =
        |name: &&String| name.starts_with("zero_pp_rank_") && name.ends_with(MODEL_STATES);
    if let Some(name) = names.iter().find(sharded) {
        problems.push(format!(
            "{name}: expected ZeRO stage 1 or 2, found stage 3, whose parameters are cut up: \
             save the model with stage3_gather_16bit_weights_on_model_save, or convert it with zero_to_fp32.py"
        ));
        return Err(CheckpointError::Parts { problems });
    }
    for name in names.iter().filter(|name| name.ends_with(MODEL_STATES)) {
        if name != MODEL_FILE {
            problems.push(format!(
                "{name}: expected {MODEL_FILE} alone, found model states of another part of the model"
            ));
        }
    }
    if !names.iter().any(|name| name == MODEL_FILE) {
        problems.push(format!(
            "{MODEL_FILE}: expected model states, the file is missing"
        ));
    }
    let mut ranks: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for name in names.iter().filter(|name| name.ends_with(OPTIM_STATES)) {
        match rank(name) {
            Some(rank) => ranks.entry(rank).or_default().push(name),
            None => problems.push(format!(
                "{name}: expected zero_pp_rank_N_mp_rank_00{OPTIM_STATES}, found another kind of optimizer state"
            )),
        }
    }
    if ranks.is_empty() {
        problems.push(format!(
            "zero_pp_rank_0_mp_rank_00{OPTIM_STATES}: expected optimizer states, the file is missing"
        ));
    }
    for (expected, (&found, names)) in (0_u64..).zip(&ranks) {
        if names.len() > 1 {
            problems.push(format!(
                "rank {found}: expected one file of optimizer states, found {}",
                names.join(" and ")
            ));
        }
        if expected != found {
            problems.push(format!(
                "rank {expected}: expected optimizer states as rank {found} has them, the file is missing"
            ));
            break;
        }
    }
    if problems.is_empty() {
        let ranks = ranks.into_values().flatten().collect();
        Ok((MODEL_FILE, ranks))
    } else {
        Err(CheckpointError::Parts { problems })
    }
}

/// Rank in `[bf16_|fp16_]zero_pp_rank_R_mp_rank_00_optim_states.pt`.
fn rank(name: &str) -> Option<u64> {
    let name = name.strip_suffix(OPTIM_STATES)?;
    let name = name
        .strip_prefix("bf16_")
        .or_else(|| name.strip_prefix("fp16_"))
        .unwrap_or(name);
    let rank = name
        .strip_prefix("zero_pp_rank_")?
        .strip_suffix("_mp_rank_00")?;
    rank.parse().ok()
}

fn read(path: &Path) -> Result<(File, Unpickled), CheckpointError> {
    let (file, head, len) = open_raw(path)?;
    let unpickled = torch::unpickle(&file, &head, len)?;
    Ok((file, unpickled))
}
