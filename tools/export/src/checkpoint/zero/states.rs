//! The model states: names and shapes of the parameters, buffers, frozen parameters.

use std::collections::{BTreeMap, BTreeSet};

use super::super::pickle::{Id, Pickled, Value};
use super::super::tensor::{Entry, View};
use super::super::torch::{Placer, Unpickled};
use super::super::{CheckpointError, TensorDType};
use crate::section::show_shape;

/// What the model states hold.
pub(super) struct Model {
    /// Buffers and frozen parameters.
    pub(super) fixed: Vec<(String, Entry)>,
    /// Names and shapes of each group's parameters, in the order of the flat numbers.
    pub(super) groups: Vec<Vec<(String, Vec<u64>)>>,
    /// Second names, each with the first.
    pub(super) shared: Vec<(String, String)>,
}

/// The model states while they are read.
pub(super) struct ModelStates<'u> {
    pickled: &'u Pickled,
    pub(super) placer: Placer<'u>,
    file: &'u str,
    pub(super) problems: Vec<String>,
}

impl<'u> ModelStates<'u> {
    pub(super) fn new(unpickled: &'u Unpickled, file: &'u str) -> ModelStates<'u> {
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

    /// Reads all of it; what is wrong goes to `problems`.
    pub(super) fn read(&mut self) -> Result<Model, CheckpointError> {
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
                BTreeSet::new()
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
