//! Weights on their way into a bundle: converted, checked, 4 KiB aligned.
//!
//! Tensors stream in chunks, so that one of seven gigabytes takes no more memory than a small one;
//! only matrices that are turned are held whole.

use bundle::WeightsWriter;
use half::f16;

use crate::checkpoint::{CheckpointError, TensorRef};
use crate::export::ExportError;
use crate::graph::{Elem, Layout, Numbers, Weight};
use crate::section::Problem;

/// Matrices of at most this many elements are turned in memory (512 MiB of fp32).
const MAX_TURNED: u64 = 1 << 27;
/// Values converted at a time.
const CHUNK: usize = 1 << 18;

/// Rounding that costs a weight more than this share of its Euclidean norm is no ordinary rounding:
/// numbers within fp16's range lose about a tenth of it.
const MAX_LOST: f64 = 1.0 / 512.0;

/// A weight in the bundle.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// Where it starts in the file.
    pub offset: u64,
    /// What its element type did to its numbers.
    pub rounding: Rounding,
}

/// What an element type does to a weight's numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Rounding {
    /// Every number is what it was.
    Exact,
    /// Ordinary rounding.
    Near,
    /// Numbers are so small that fp16 keeps too little of them.
    Lossy,
    /// A number is larger than fp16 can hold.
    Beyond {
        /// The number.
        value: f32,
        /// Its place in the checkpoint's tensor.
        index: u64,
    },
}

/// The problem that a weight beyond fp16 is where nothing may be kept in fp32.
#[must_use]
pub fn beyond(weight: &Weight<'_>, value: f32, index: u64) -> Problem {
    let (file, key) = origin(weight);
    let limit = f16::MAX;
    let message = format!(
        "expected at most {limit} in fp16, found {value} at flat index {index}; export this bundle in fp32, or with the audit"
    );
    Problem { file, key, message }
}

/// Appends all weights; returns where each lies. Bad numbers go to `problems`.
///
/// # Errors
/// [`ExportError`] where the bundle cannot be written or a tensor cannot be read.
pub fn write(
    weights: &[Weight<'_>],
    out: &mut WeightsWriter,
    problems: &mut Vec<Problem>,
) -> Result<Vec<Written>, ExportError> {
    let mut written = Vec::with_capacity(weights.len());
    for weight in weights {
        let offset = out.align()?;
        let mut sink = Sink {
            weight,
            out: &mut *out,
            bytes: Vec::new(),
            bad: None,
            beyond: None,
            lost: 0.0,
            squares: 0.0,
            failed: None,
        };
        match &weight.numbers {
            Numbers::Table(values) => sink.put(0, values),
            Numbers::Tensor(tensor, Layout::AsStored) => {
                let read = tensor.for_each_f32_chunk(|offset, values| {
                    sink.put(offset, values);
                    Ok(())
                });
                read.map_err(|source| unreadable(weight, source))?;
            }
            Numbers::Tensor(tensor, Layout::Transposed) => sink.put_turned(tensor)?,
            // Reported when it was asked for; an export with problems never comes here.
            Numbers::Missing => {}
        }
        let rounding = sink.rounding();
        if let Some(failed) = sink.failed {
            return Err(failed.into());
        }
        if let Some(message) = sink.bad {
            let (file, key) = origin(weight);
            let message = format!("{message}{}", merged(weight));
            problems.push(Problem { file, key, message });
        }
        written.push(Written { offset, rounding });
    }
    Ok(written)
}

fn unreadable(weight: &Weight<'_>, source: CheckpointError) -> ExportError {
    ExportError::Tensor {
        key: origin(weight).1,
        source,
    }
}

/// Which LoRA entries a weight was changed by, for messages.
fn merged(weight: &Weight<'_>) -> String {
    let Numbers::Tensor(tensor, _) = &weight.numbers else {
        return String::new();
    };
    let entries: Vec<&str> = tensor.deltas().iter().map(|d| &*d.entry).collect();
    if entries.is_empty() {
        return String::new();
    }
    format!("; this is after merging {}", entries.join(", "))
}

fn origin(weight: &Weight<'_>) -> (String, String) {
    match &weight.numbers {
        Numbers::Tensor(tensor, _) => (tensor.file_name(), tensor.label()),
        _ => ("computed".into(), weight.name.clone()),
    }
}

/// Converts chunks to the weight's element type and remembers the first bad number.
struct Sink<'w, 'c> {
    weight: &'w Weight<'c>,
    out: &'w mut WeightsWriter,
    bytes: Vec<u8>,
    bad: Option<String>,
    /// The first number that fp16 cannot hold, and where it is.
    beyond: Option<(f32, u64)>,
    /// Sum of the squares of what rounding took, and of the numbers.
    lost: f64,
    squares: f64,
    failed: Option<bundle::WriteError>,
}

impl Sink<'_, '_> {
    fn put(&mut self, offset: u64, values: &[f32]) {
        for (part, values) in (0_u64..).zip(values.chunks(CHUNK)) {
            self.check(offset + part * CHUNK as u64, values);
            self.bytes.clear();
            match self.weight.elem {
                Elem::F16 => {
                    for &value in values {
                        let half = f16::from_f32(value);
                        let lost = f64::from(value - half.to_f32());
                        self.lost += lost * lost;
                        self.squares += f64::from(value) * f64::from(value);
                        self.bytes.extend(half.to_le_bytes());
                    }
                }
                _ => self
                    .bytes
                    .extend(values.iter().flat_map(|value| value.to_le_bytes())),
            }
            if self.failed.is_none() {
                self.failed = self.out.write(&self.bytes).err();
            }
        }
    }

    fn check(&mut self, offset: u64, values: &[f32]) {
        if self.bad.is_some() {
            return;
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            self.bad = Some(format!(
                "expected finite values, found {} at flat index {}",
                values[at],
                offset + at as u64
            ));
        } else if self.weight.elem == Elem::F16
            && self.beyond.is_none()
            && let Some(at) = values
                .iter()
                .position(|&value| f16::from_f32(value).is_infinite())
        {
            self.beyond = Some((values[at], offset + at as u64));
        }
    }

    fn rounding(&self) -> Rounding {
        match self.beyond {
            Some((value, index)) => Rounding::Beyond { value, index },
            None if self.lost == 0.0 => Rounding::Exact,
            None if self.lost <= self.squares * MAX_LOST * MAX_LOST => Rounding::Near,
            None => Rounding::Lossy,
        }
    }

    fn put_turned(&mut self, tensor: &TensorRef<'_>) -> Result<(), ExportError> {
        let (rows, columns) = (self.weight.shape[1], self.weight.shape[0]);
        if rows * columns > MAX_TURNED {
            self.bad = Some(format!(
                "expected at most {MAX_TURNED} elements in a matrix that is turned, found {rows} x {columns}"
            ));
            return Ok(());
        }
        let stored = tensor
            .read_f32()
            .map_err(|source| unreadable(self.weight, source))?;
        // Named by the checkpoint's own index, before the matrix is turned.
        self.check(0, &stored);
        if self.bad.is_some() {
            return Ok(());
        }
        let turned = ndarray::ArrayView2::from_shape((index(rows), index(columns)), &stored)
            .map(|matrix| turn(matrix));
        match turned {
            Ok(values) => self.put(0, &values),
            Err(error) => {
                self.bad = Some(format!(
                    "expected {rows} x {columns} values, found {}: {error}",
                    stored.len()
                ))
            }
        }
        Ok(())
    }
}

/// Column after column of a matrix, in blocks that stay in the cache.
fn turn(matrix: ndarray::ArrayView2<'_, f32>) -> Vec<f32> {
    const BLOCK: usize = 32;
    let (rows, columns) = matrix.dim();
    let mut turned = vec![0.0; rows * columns];
    for row_block in (0..rows).step_by(BLOCK) {
        for column_block in (0..columns).step_by(BLOCK) {
            for column in column_block..(column_block + BLOCK).min(columns) {
                for row in row_block..(row_block + BLOCK).min(rows) {
                    turned[column * rows + row] = matrix[[row, column]];
                }
            }
        }
    }
    turned
}

fn index(len: u64) -> usize {
    usize::try_from(len).expect("bounded by MAX_TURNED")
}
