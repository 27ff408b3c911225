//! The tensors of one model inside a checkpoint, and everything that is wrong with them.
//!
//! A network's description asks for its tensors by key and expected shape. What is missing or
//! different is noted and the description goes on with the shape it expected, so that one run
//! names every problem of a file. What nobody asked for is named too: a tensor that the
//! description does not know means that the network is another one.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::checkpoint::{Names, TensorRef};
use crate::graph::{Elem, Graph, Layout, Numbers, Value};
use crate::lora::Delta;

/// Tensors of at most this many elements may be read whole for computing tables.
const MAX_TABLE: u64 = 1 << 24;

/// One thing that is wrong with a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// File name without its folder.
    pub file: String,
    /// Key of the tensor, or the field.
    pub key: String,
    /// What was expected and what was found.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.file, self.key, self.message)
    }
}

/// Axes as they stand in messages.
#[must_use]
pub fn show_shape(shape: &[u64]) -> String {
    let lens: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("[{}]", lens.join(", "))
}

/// The tensors of one model inside a checkpoint.
#[derive(Debug)]
pub struct Section<'c> {
    file: String,
    names: Option<&'c Names>,
    tensors: BTreeMap<String, TensorRef<'c>>,
    used: RefCell<BTreeSet<String>>,
    problems: RefCell<Vec<Problem>>,
}

impl<'c> Section<'c> {
    /// A section of these tensors; `file` stands in messages.
    #[must_use]
    pub fn new(
        file: &str,
        tensors: impl IntoIterator<Item = (String, TensorRef<'c>)>,
    ) -> Section<'c> {
        Section {
            file: file.into(),
            names: None,
            tensors: tensors.into_iter().collect(),
            used: RefCell::default(),
            problems: RefCell::default(),
        }
    }

    /// The same section; messages also have the file's own spelling of each key.
    #[must_use]
    pub fn spelt(mut self, names: &'c Names) -> Section<'c> {
        self.names = Some(names);
        self
    }

    /// Whether a tensor of this key is there.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Changes a tensor that is there, wherever it is read from now on.
    pub(crate) fn merge(&mut self, key: &str, delta: Delta<'c>) {
        if let Some(tensor) = self.tensors.get_mut(key) {
            *tensor = tensor.clone().with_delta(delta);
        }
    }

    /// Whether any key starts so.
    #[must_use]
    pub fn has_prefix(&self, prefix: &str) -> bool {
        self.tensors
            .range(prefix.to_owned()..)
            .next()
            .is_some_and(|(key, _)| key.starts_with(prefix))
    }

    /// The distinct numbers N of keys `<prefix>N.…` or `<prefix>N`, ascending.
    #[must_use]
    pub fn numbers(&self, prefix: &str) -> Vec<u64> {
        let found: BTreeSet<u64> = self
            .tensors
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .filter_map(|(key, _)| key[prefix.len()..].split('.').next()?.parse().ok())
            .collect();
        found.into_iter().collect()
    }

    /// How many blocks `<prefix>0 … <prefix>N-1` there are; a gap is a problem.
    #[must_use]
    pub fn count(&self, prefix: &str) -> u64 {
        let numbers = self.numbers(prefix);
        for (expected, &found) in (0_u64..).zip(&numbers) {
            if expected != found {
                self.problem(
                    &format!("{prefix}{expected}"),
                    format!("missing, though {prefix}{found} is there"),
                );
                return expected;
            }
        }
        numbers.len() as u64
    }

    /// Axes of a tensor, without asking for it.
    #[must_use]
    pub fn shape(&self, key: &str) -> Option<Vec<u64>> {
        self.tensors.get(key).map(|tensor| tensor.shape().to_vec())
    }

    /// Length of one axis; where the tensor is missing or has another rank, that is noted and 1 stands in.
    #[must_use]
    pub fn axis(&self, key: &str, rank: usize, axis: usize) -> u64 {
        match self.shape(key) {
            Some(shape) if shape.len() == rank && shape.iter().all(|&len| len > 0) => shape[axis],
            Some(shape) => {
                self.problem(
                    key,
                    format!(
                        "expected {rank} axes of at least 1, found {}",
                        show_shape(&shape)
                    ),
                );
                1
            }
            None => {
                self.problem(
                    key,
                    format!("expected a tensor of {rank} axes, the key is missing"),
                );
                1
            }
        }
    }

    /// Notes a problem.
    pub fn problem(&self, key: &str, message: String) {
        let tensor = self.tensors.get(key);
        let problem = Problem {
            file: tensor.map_or_else(|| self.file.clone(), TensorRef::file_name),
            key: self
                .names
                .map_or_else(|| key.into(), |names| names.label(key)),
            message,
        };
        let mut problems = self.problems.borrow_mut();
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }

    fn expect(&self, key: &str, expected: &[u64]) -> Option<TensorRef<'c>> {
        self.used.borrow_mut().insert(key.to_owned());
        let Some(tensor) = self.tensors.get(key) else {
            self.problem(
                key,
                format!(
                    "expected shape {}, the key is missing",
                    show_shape(expected)
                ),
            );
            return None;
        };
        if tensor.shape() != expected {
            self.problem(
                key,
                format!(
                    "expected shape {}, found {}",
                    show_shape(expected),
                    show_shape(tensor.shape())
                ),
            );
            return None;
        }
        if !tensor.dtype().is_float() {
            self.problem(
                key,
                format!("expected floating-point numbers, found {}", tensor.dtype()),
            );
            return None;
        }
        Some(tensor.clone())
    }

    /// A weight of the graph's activation type.
    pub fn weight(&self, graph: &mut Graph<'c>, key: &str, shape: &[u64]) -> Value {
        let elem = graph.act();
        self.weight_as(graph, key, shape, elem, shape, Layout::AsStored)
    }

    /// A matrix `[out, in]` of the checkpoint as `[in, out]`.
    pub fn transposed(&self, graph: &mut Graph<'c>, key: &str, out: u64, inner: u64) -> Value {
        let elem = graph.act();
        self.weight_as(
            graph,
            key,
            &[out, inner],
            elem,
            &[inner, out],
            Layout::Transposed,
        )
    }

    /// A weight in a chosen element type, shape and layout.
    pub fn weight_as(
        &self,
        graph: &mut Graph<'c>,
        key: &str,
        expected: &[u64],
        elem: Elem,
        shape: &[u64],
        layout: Layout,
    ) -> Value {
        let numbers = self
            .expect(key, expected)
            .map_or(Numbers::Missing, |tensor| Numbers::Tensor(tensor, layout));
        let lens: Vec<String> = shape.iter().map(u64::to_string).collect();
        graph.weight(&format!("{key}[{}]", lens.join(",")), elem, shape, numbers)
    }

    /// Numbers of a small tensor, row-major; zeros stand in for what is missing.
    #[must_use]
    pub fn read(&self, key: &str, expected: &[u64]) -> Vec<f32> {
        let len = expected.iter().product::<u64>();
        let zeros = || vec![0.0; usize::try_from(len.min(MAX_TABLE)).unwrap_or(0)];
        if len > MAX_TABLE {
            self.problem(
                key,
                format!(
                    "expected at most {MAX_TABLE} values, found {}",
                    show_shape(expected)
                ),
            );
            return zeros();
        }
        let Some(tensor) = self.expect(key, expected) else {
            return zeros();
        };
        match tensor.read_f32() {
            Ok(values) => {
                if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                    self.problem(
                        key,
                        format!(
                            "expected finite values, found {} at flat index {at}",
                            values[at]
                        ),
                    );
                }
                values
            }
            Err(error) => {
                self.problem(key, chain(&error));
                zeros()
            }
        }
    }

    /// Asks for a tensor that the original needs and the graph does not: its shape and numbers are checked.
    pub fn require(&self, key: &str, expected: &[u64]) {
        if let Some(tensor) = self.expect(key, expected) {
            self.check_finite(key, &tensor);
        }
    }

    /// Tensors that may be there and are of no use.
    pub fn ignore(&self, prefix: &str) {
        let known: Vec<String> = self
            .tensors
            .range(prefix.to_owned()..)
            .map(|(key, _)| key)
            .take_while(|key| key.starts_with(prefix))
            .cloned()
            .collect();
        self.used.borrow_mut().extend(known);
    }

    fn check_finite(&self, key: &str, tensor: &TensorRef<'c>) {
        let mut bad = None;
        let read = tensor.for_each_f32_chunk(|offset, values| {
            if bad.is_none()
                && let Some(at) = values.iter().position(|value| !value.is_finite())
            {
                bad = Some((offset + at as u64, values[at]));
            }
            Ok(())
        });
        if let Err(error) = read {
            self.problem(key, chain(&error));
        }
        if let Some((at, value)) = bad {
            self.problem(
                key,
                format!("expected finite values, found {value} at flat index {at}"),
            );
        }
    }

    /// Everything wrong so far.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        self.problems.borrow().clone()
    }

    /// Keys that no part of the network asked for.
    #[must_use]
    pub fn unexpected(&self) -> Vec<String> {
        let used = self.used.borrow();
        self.tensors
            .keys()
            .filter(|key| !used.contains(*key))
            .cloned()
            .collect()
    }

    /// Checks the numbers of every tensor that was asked for; used when an export has failed already.
    pub fn check_all_finite(&self) {
        let used: Vec<String> = self.used.borrow().iter().cloned().collect();
        for key in used {
            let float = |tensor: &&TensorRef<'c>| tensor.dtype().is_float();
            if let Some(tensor) = self.tensors.get(&key).filter(float) {
                self.check_finite(&key, tensor);
            }
        }
    }
}

/// An error with its causes on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
