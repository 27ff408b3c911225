//! A checkpoint folder of DeepSpeed's ZeRO, stage 1 or 2, as fp32 parameters.
//!
//! Each rank saved its part of the optimizer's fp32 copy of the weights: for every parameter group
//! one flat run of numbers. The runs of all ranks, in rank order, are the group's parameters one
//! behind the other in the order of `param_shapes`, then padding. Here a parameter becomes a row of
//! views into those runs; nothing is copied. Buffers come from the model states, as do frozen
//! parameters; shared parameters are second names.
//!
//! Source: DeepSpeed, `deepspeed/utils/zero_to_fp32.py`.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use super::pickle::{Id, Pickled, Value};
use super::storage::Storage;
use super::tensor::{Entry, View};
use super::torch::{self, Placer, Unpickled};
use super::{
    Assembly, Checkpoint, CheckpointError, Container, TensorDType, file_name, folder, open_raw,
};
use crate::section::{chain, show_shape};

/// End of the names of files with model states.
pub(super) const MODEL_STATES: &str = "_model_states.pt";
/// End of the names of files with optimizer states.
pub(super) const OPTIM_STATES: &str = "_optim_states.pt";
const MODEL_FILE: &str = "mp_rank_00_model_states.pt";
/// Longest tag that is read.
const MAX_TAG_BYTES: u64 = 4096;

/// One rank's fp32 numbers: a flat view for each parameter group.
struct Rank {
    name: String,
    stage: i64,
    partitions: i64,
    groups: Vec<View>,
}

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

/// What the model states hold.
struct Model {
    /// Buffers and frozen parameters.
    fixed: Vec<(String, Entry)>,
    /// Names and shapes of each group's parameters, in the order of the flat numbers.
    groups: Vec<Vec<(String, Vec<u64>)>>,
    /// Second names, each with the first.
    shared: Vec<(String, String)>,
}

struct ModelStates<'u> {
    pickled: &'u Pickled,
    placer: Placer<'u>,
    file: &'u str,
    problems: Vec<String>,
}

impl<'u> ModelStates<'u> {
    fn new(unpickled: &'u Unpickled, file: &'u str) -> ModelStates<'u> {
        ModelStates {
            pickled: &unpickled.pickled,
            placer: Placer::new(unpickled),
            file,
            problems: Vec::new(),
        }
    }

    fn problem(&mut self, key: &str, problem: String) {
        self.problems
            .push(format!("{}: {key}: {problem}", self.file));
    }

    /// A value at the top; `None` in the file is as good as missing.
    fn top(&self, key: &str) -> Option<Id> {
        let id = self.pickled.item(self.pickled.root, key)?;
        (*self.pickled.get(id) != Value::None).then_some(id)
    }

    fn needed(&mut self, key: &str, what: &str) -> Option<Id> {
        let found = self.top(key);
        if found.is_none() {
            self.problem(key, format!("expected {what}, the key is missing"));
        }
        found
    }

    /// Items of a dictionary whose keys are texts.
    fn items(&mut self, key: &str, id: Id) -> Vec<(String, Id)> {
        let Value::Dict(items) = self.pickled.get(id) else {
            self.problem(key, "expected a dictionary, found something else".into());
            return Vec::new();
        };
        let text = |id: Id| match self.pickled.get(id) {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        };
        let named: Vec<(String, Id)> = items
            .iter()
            .filter_map(|&(key, value)| Some((text(key)?, value)))
            .collect();
        if named.len() != items.len() {
            self.problem(key, "expected texts as keys, found something else".into());
        }
        named
    }

    fn shapes(&mut self, key: &str, id: Id) -> Vec<(String, Vec<u64>)> {
        let mut shapes = Vec::new();
        for (name, value) in self.items(key, id) {
            let axes = self.pickled.axes(value).filter(|axes| {
                let count = |product: u64, &len: &u64| product.checked_mul(len);
                axes.iter().try_fold(8, count).is_some()
            });
            match axes {
                Some(axes) => shapes.push((name, axes)),
                None => self.problem(
                    &format!("{key}.{name}"),
                    "expected a shape, found something else".into(),
                ),
            }
        }
        shapes
    }

    fn tensor(&mut self, key: &str, id: Id) -> Option<View> {
        let placed = match self.pickled.get(id) {
            Value::Tensor(tensor) => self.placer.place(tensor),
            _ => Err("expected a tensor, found something else".into()),
        };
        placed.map_err(|problem| self.problem(key, problem)).ok()
    }

    fn read(&mut self) -> Result<Model, CheckpointError> {
        if !matches!(self.pickled.get(self.pickled.root), Value::Dict(_)) {
            return Err(CheckpointError::Entry {
                entry: "data.pkl".into(),
                problem: "expected a dictionary at the top".into(),
            });
        }
        let mut fixed = self.buffers();
        fixed.extend(self.frozen());
        let mut groups = Vec::new();
        if let Some(id) = self.needed("param_shapes", "a list of shapes of each parameter group") {
            match self.pickled.get(id) {
                Value::List(items) | Value::Tuple(items) => {
                    for (group, &item) in items.iter().enumerate() {
                        let shapes = self.shapes(&format!("param_shapes.{group}"), item);
                        groups.push(shapes);
                    }
                }
                _ => self.problem(
                    "param_shapes",
                    "expected a list, found something else".into(),
                ),
            }
        }
        let mut shared = Vec::new();
        if let Some(id) = self.top("shared_params") {
            for (second, value) in self.items("shared_params", id) {
                match self.pickled.get(value) {
                    Value::Text(first) => shared.push((second, first.clone())),
                    _ => self.problem(
                        &format!("shared_params.{second}"),
                        "expected the name of a parameter, found something else".into(),
                    ),
                }
            }
        }
        Ok(Model {
            fixed,
            groups,
            shared,
        })
    }

    /// Those entries of `module` that `buffer_names` lists; as fp32, whatever they were.
    fn buffers(&mut self) -> Vec<(String, Entry)> {
        let names = self.needed("buffer_names", "a list of names");
        let module = self.needed("module", "the model's state");
        let (Some(names), Some(module)) = (names, module) else {
            return Vec::new();
        };
        let listed = match self.pickled.get(names) {
            Value::List(items) | Value::Tuple(items) => items
                .iter()
                .filter_map(|&id| match self.pickled.get(id) {
                    Value::Text(text) => Some(text.clone()),
                    _ => None,
                })
                .collect(),
            _ => {
                self.problem(
                    "buffer_names",
                    "expected a list, found something else".into(),
                );
                std::collections::BTreeSet::new()
            }
        };
        let mut buffers = Vec::new();
        for (name, id) in self.items("module", module) {
            if listed.contains(&name)
                && let Some(view) = self.tensor(&format!("module.{name}"), id)
            {
                let entry = Entry {
                    dtype: TensorDType::F32,
                    ..Entry::of(view)
                };
                buffers.push((name, entry));
            }
        }
        buffers
    }

    fn frozen(&mut self) -> Vec<(String, Entry)> {
        let Some(id) = self.top("frozen_param_shapes") else {
            return Vec::new();
        };
        let shapes = self.shapes("frozen_param_shapes", id);
        if shapes.is_empty() {
            return Vec::new();
        }
        let Some(fragments) = self.needed("frozen_param_fragments", "the frozen parameters") else {
            return Vec::new();
        };
        let fragments: BTreeMap<String, Id> = self
            .items("frozen_param_fragments", fragments)
            .into_iter()
            .collect();
        let mut frozen = Vec::new();
        for (name, shape) in shapes {
            let key = format!("frozen_param_fragments.{name}");
            let Some(&id) = fragments.get(&name) else {
                let expected = show_shape(&shape);
                self.problem(
                    &key,
                    format!("expected shape {expected}, the key is missing"),
                );
                continue;
            };
            let Some(view) = self.tensor(&key, id) else {
                continue;
            };
            if view.shape == shape {
                frozen.push((name, Entry::of(view)));
            } else {
                let (expected, found) = (show_shape(&shape), show_shape(&view.shape));
                self.problem(&key, format!("expected shape {expected}, found {found}"));
            }
        }
        frozen
    }
}

/// Adds every trainable parameter to `tensors`.
fn merge(
    model: &str,
    shapes: &[Vec<(String, Vec<u64>)>],
    optim: &[&str],
    at: &impl Fn(&str) -> (String, PathBuf),
    assembly: &mut Assembly,
    tensors: &mut BTreeMap<String, Entry>,
) -> Result<(), Vec<String>> {
    let mut problems = Vec::new();
    let mut ranks = Vec::new();
    for name in optim {
        let (name, path) = at(name);
        match read(&path) {
            Err(error) => problems.push(format!("{name}: {}", chain(&error))),
            Ok((file, unpickled)) => {
                let (rank, storages) = read_rank(&name, &unpickled, &mut problems);
                let base = assembly.add(name, &path, file, storages);
                if let Some(mut rank) = rank {
                    for view in &mut rank.groups {
                        view.storage += base;
                    }
                    ranks.push(rank);
                }
            }
        }
    }
    let world = optim.len() as u64;
    for rank in &ranks {
        if rank.stage != 1 && rank.stage != 2 {
            problems.push(format!(
                "{}: zero_stage: expected 1 or 2, found {}",
                rank.name, rank.stage
            ));
        }
        if u64::try_from(rank.partitions) != Ok(world) {
            problems.push(format!(
                "{}: partition_count: expected as many partitions as files, {world}, found {}: \
                 is a file missing, or left over from another run?",
                rank.name, rank.partitions
            ));
        }
        if rank.groups.len() != shapes.len() {
            problems.push(format!(
                "{}: single_partition_of_fp32_groups: expected {} groups as {model} has, found {}",
                rank.name,
                shapes.len(),
                rank.groups.len()
            ));
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    for (group, shapes) in shapes.iter().enumerate() {
        let runs: Vec<&View> = ranks.iter().map(|rank| &rank.groups[group]).collect();
        if let Err(problem) = cut(shapes, &runs, world, tensors) {
            problems.push(format!("{model}: param_shapes.{group}: {problem}"));
        }
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems)
    }
}

/// One rank's runs of numbers.
fn read_rank(
    name: &str,
    unpickled: &Unpickled,
    problems: &mut Vec<String>,
) -> (Option<Rank>, Vec<Storage>) {
    let pickled = &unpickled.pickled;
    let mut placer = Placer::new(unpickled);
    let before = problems.len();
    let mut refuse = |key: &str, problem: &str| problems.push(format!("{name}: {key}: {problem}"));
    let Some(state) = pickled.item(pickled.root, "optimizer_state_dict") else {
        refuse(
            "optimizer_state_dict",
            "expected a dictionary, the key is missing",
        );
        return (None, Vec::new());
    };
    let number = |id: Id| match pickled.get(id) {
        Value::Int(number) => Some(*number),
        _ => None,
    };
    let stage = pickled.item(state, "zero_stage").and_then(number);
    if stage.is_none() {
        refuse(
            "zero_stage",
            "expected a number, found none: no checkpoint of ZeRO",
        );
    }
    // Later versions count the partitions of every group; experts may have fewer.
    let partitions = pickled
        .item(state, "partition_count")
        .and_then(|id| match pickled.get(id) {
            Value::List(counts) | Value::Tuple(counts) => {
                counts.iter().filter_map(|&count| number(count)).max()
            }
            _ => number(id),
        });
    if partitions.is_none() {
        refuse(
            "partition_count",
            "expected a number or a list of them, found none",
        );
    }
    let mut groups = Vec::new();
    let key = "single_partition_of_fp32_groups";
    match pickled.item(state, key).map(|id| pickled.get(id)) {
        Some(Value::List(items) | Value::Tuple(items)) => {
            for (group, &item) in items.iter().enumerate() {
                let key = format!("{key}.{group}");
                let Value::Tensor(tensor) = pickled.get(item) else {
                    refuse(&key, "expected a tensor, found something else");
                    continue;
                };
                match placer.place(tensor) {
                    Ok(view) if view.shape.len() != 1 || !view.contiguous() => refuse(
                        &key,
                        &format!("expected a flat run, found {}", show_shape(&view.shape)),
                    ),
                    Ok(view) if !view.dtype.is_float() => refuse(
                        &key,
                        &format!("expected floating-point numbers, found {}", view.dtype),
                    ),
                    Ok(view) => groups.push(view),
                    Err(problem) => refuse(&key, &problem),
                }
            }
        }
        Some(_) => refuse(key, "expected a list of flat tensors, found something else"),
        None => match stage {
            Some(3) => refuse("zero_stage", "expected 1 or 2, found 3"),
            _ => refuse(key, "expected a list of flat tensors, the key is missing"),
        },
    }
    let rank = match (stage, partitions) {
        (Some(stage), Some(partitions)) if problems.len() == before => Some(Rank {
            name: name.into(),
            stage,
            partitions,
            groups,
        }),
        _ => None,
    };
    (rank, placer.storages)
}

/// Cuts one group's parameters out of the ranks' runs.
fn cut(
    shapes: &[(String, Vec<u64>)],
    runs: &[&View],
    world: u64,
    tensors: &mut BTreeMap<String, Entry>,
) -> Result<(), String> {
    let available: u64 = runs.iter().map(|run| run.elements()).sum();
    let mut wanted = 0_u64;
    for (_, shape) in shapes {
        wanted = wanted.saturating_add(shape.iter().product());
    }
    // Padding up to twice the number of ranks, which some versions save and others do not.
    let align = |len: u64| len.div_ceil(2 * world).saturating_mul(2 * world);
    if wanted > available || align(wanted) != align(available) {
        return Err(format!(
            "expected {wanted} numbers and less than {} of padding, found {available}",
            2 * world
        ));
    }
    let mut runs = runs.iter();
    let mut run = runs.next();
    let mut used = 0;
    for (name, shape) in shapes {
        let mut left: u64 = shape.iter().product();
        let mut views = Vec::new();
        while left > 0 {
            let Some(from) = run else {
                return Err(format!("{name}: expected {left} more numbers, found none"));
            };
            let len = left.min(from.elements() - used);
            if len > 0 {
                views.push(View::row_major(
                    from.dtype,
                    &[len],
                    from.offset + used,
                    from.storage,
                ));
            }
            (left, used) = (left - len, used + len);
            if used == from.elements() {
                (run, used) = (runs.next(), 0);
            }
        }
        let entry = Entry {
            dtype: TensorDType::F32,
            shape: shape.clone(),
            views,
        };
        tensors.insert(name.clone(), entry);
    }
    Ok(())
}
