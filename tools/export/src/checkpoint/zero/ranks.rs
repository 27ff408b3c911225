//! The ranks' runs of fp32 numbers, and the parameters cut out of them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::super::pickle::{Id, Value};
use super::super::storage::Storage;
use super::super::tensor::{Entry, View};
use super::super::torch::{Placer, Unpickled};
use super::super::{Assembly, TensorDType};
use super::read;
use crate::section::{chain, show_shape};

/// One rank's fp32 numbers: a flat view for each parameter group.
struct Rank {
    name: String,
    stage: i64,
    partitions: i64,
    groups: Vec<View>,
}

/// Adds every trainable parameter to `tensors`.
pub(super) fn merge(
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
