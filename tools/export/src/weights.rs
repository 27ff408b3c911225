//! Weights on their way into a bundle: converted, checked, 4 KiB aligned.
//!
//! Tensors stream in blocks of a megabyte, so that one of seven gigabytes takes no more memory than a
//! small one. Matrices that are turned are held once, in the bundle's element type. What keeps its
//! type is looked at and copied, not converted. Quantised matrices are turned band by band.

use std::collections::HashMap;

use bundle::WeightsWriter;
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::checkpoint::{self, CheckpointError, Chunk, TensorDType, TensorRef};
use crate::export::ExportError;
use crate::graph::{Elem, Layout, Numbers, Weight};
use crate::section::Problem;

/// Matrices of at most this many elements are turned in memory (512 MiB of fp32).
const MAX_TURNED: u64 = 1 << 27;
/// Values converted at a time.
const CHUNK: usize = 1 << 18;
/// Values added up in single precision at a time, and side by side.
const PART: usize = 1 << 12;
const LANES: usize = 8;
/// Rows turned at a time: what a column gets of them fills a cache line in half precision.
const BAND: usize = 32;

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
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Rounding {
    /// Every number is what it was.
    #[default]
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
        "expected at most {limit} in fp16, found {value} at flat index {index}; export this bundle in fp32, or with the audit{}",
        merged(weight)
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
    let mut scales = HashMap::new();
    for weight in weights {
        let offset = out.align();
        let looked = match &weight.numbers {
            Numbers::Table(values) => write_table(weight.elem, values, out),
            Numbers::Tensor(tensor, Layout::AsStored) => {
                write_stored(weight.elem, tensor, out).map_err(|error| unreadable(weight, error))?
            }
            Numbers::Tensor(tensor, Layout::Transposed) => {
                let [columns, rows] = [weight.shape[0], weight.shape[1]];
                let turned = turn(weight.elem, tensor, rows, columns);
                match turned.map_err(|error| unreadable(weight, error))? {
                    Ok((mut turned, looked)) => {
                        out.write(turned.finish());
                        looked
                    }
                    Err(bad) => Looked::bad(bad),
                }
            }
            Numbers::Tensor(tensor, Layout::Quantised) => {
                let mut quantiser = Quantiser::new(&weight.shape);
                tensor
                    .for_each_f32_chunk(|first, values| {
                        quantiser.take(first, values, out);
                        Ok(())
                    })
                    .map_err(|error| unreadable(weight, error))?;
                scales.insert(tensor.name().to_owned(), quantiser.scales);
                quantiser.checked.looked()
            }
            Numbers::Tensor(tensor, Layout::Scales) => match scales.remove(tensor.name()) {
                Some(scales) => write_table(weight.elem, &scales, out),
                None => Looked::bad(
                    "expected its matrix before its scales: a fault of this program".into(),
                ),
            },
            // Reported when it was asked for; an export with problems never comes here.
            Numbers::Missing => Looked::default(),
        };
        if let Some(message) = looked.bad {
            let (file, key) = origin(weight);
            let message = format!("{message}{}", merged(weight));
            problems.push(Problem { file, key, message });
        }
        let rounding = looked.rounding;
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

/// What became of a weight's numbers on the way.
#[derive(Default)]
struct Looked {
    /// What is wrong with the first bad one.
    bad: Option<String>,
    rounding: Rounding,
}

impl Looked {
    fn bad(message: String) -> Looked {
        Looked {
            bad: Some(message),
            rounding: Rounding::default(),
        }
    }
}

fn write_table(elem: Elem, values: &[f32], out: &mut WeightsWriter) -> Looked {
    let mut block = Block::new(elem);
    for (part, values) in (0_u64..).zip(values.chunks(CHUNK)) {
        block.take_values(part * CHUNK as u64, values);
        out.write(&block.bytes);
    }
    block.looked()
}

/// All numbers in order.
fn write_stored(
    elem: Elem,
    tensor: &TensorRef<'_>,
    out: &mut WeightsWriter,
) -> Result<Looked, CheckpointError> {
    let mut block = Block::new(elem);
    tensor.for_each_chunk(|first, chunk| {
        block.take(first, chunk);
        out.write(&block.bytes);
        Ok(())
    })?;
    Ok(block.looked())
}

/// A matrix `[rows, columns]` column after column, or what is wrong with it.
fn turn(
    elem: Elem,
    tensor: &TensorRef<'_>,
    rows: u64,
    columns: u64,
) -> Result<Result<(Turned, Looked), String>, CheckpointError> {
    if rows.saturating_mul(columns) > MAX_TURNED {
        return Ok(Err(format!(
            "expected at most {MAX_TURNED} elements in a matrix that is turned, found {rows} x {columns}"
        )));
    }
    let mut block = Block::new(elem);
    let mut turned = Turned::new(index(rows), index(columns), index(elem.len_bytes()));
    tensor.for_each_chunk(|first, chunk| {
        block.take(first, chunk);
        turned.take(&block.bytes);
        Ok(())
    })?;
    let looked = block.looked();
    Ok(match looked.bad {
        None => Ok((turned, looked)),
        Some(bad) => Err(bad),
    })
}

fn index(len: u64) -> usize {
    usize::try_from(len).expect("bounded by MAX_TURNED")
}

/// Numbers converted to the bundle's element type; remembers the first bad one.
struct Block {
    elem: Elem,
    /// Little-endian numbers of that type.
    bytes: Vec<u8>,
    values: Vec<f32>,
    halves: Vec<f16>,
    /// What the halves stand for.
    rounded: Vec<f32>,
    bad: Option<String>,
    /// The first number that fp16 cannot hold, and where it is.
    beyond: Option<(f32, u64)>,
    /// Sums of squares of what rounding took, and of the numbers it was taken from.
    lost: f64,
    squares: f64,
}

impl Block {
    fn new(elem: Elem) -> Block {
        Block {
            elem,
            bytes: Vec::new(),
            values: Vec::new(),
            halves: Vec::new(),
            rounded: Vec::new(),
            bad: None,
            beyond: None,
            lost: 0.0,
            squares: 0.0,
        }
    }

    /// Takes numbers of a checkpoint; `first` is the flat index of the first one.
    fn take(&mut self, first: u64, chunk: Chunk<'_>) {
        let (dtype, stored) = match chunk {
            Chunk::Stored(dtype, stored) => (dtype, stored),
            Chunk::Values(values) => return self.take_values(first, values),
        };
        let finite = match (dtype, self.elem) {
            (TensorDType::F16, Elem::F16) => {
                let (halves, _) = stored.as_chunks::<2>();
                let largest = halves.iter().fold(0, |largest, &half| {
                    (u16::from_le_bytes(half) & 0x7fff).max(largest)
                });
                largest <= f16::MAX.to_bits()
            }
            _ => false,
        };
        if finite {
            self.bytes.clear();
            self.bytes.extend_from_slice(stored);
            return;
        }
        let mut values = std::mem::take(&mut self.values);
        values.clear();
        checkpoint::convert(dtype, stored, &mut values);
        self.take_values(first, &values);
        self.values = values;
    }

    fn take_values(&mut self, first: u64, values: &[f32]) {
        self.check(first, values);
        self.bytes.clear();
        if self.elem == Elem::F16 {
            self.halves.resize(values.len(), f16::ZERO);
            self.halves.convert_from_f32_slice(values);
            self.account(values);
            self.bytes.resize(2 * values.len(), 0);
            let (places, _) = self.bytes.as_chunks_mut::<2>();
            for (place, half) in places.iter_mut().zip(&self.halves) {
                *place = half.to_le_bytes();
            }
        } else {
            self.bytes.resize(4 * values.len(), 0);
            let (places, _) = self.bytes.as_chunks_mut::<4>();
            for (place, value) in places.iter_mut().zip(values) {
                *place = value.to_le_bytes();
            }
        }
    }

    /// Adds up what rounding takes.
    fn account(&mut self, values: &[f32]) {
        self.rounded.resize(values.len(), 0.0);
        self.halves.convert_to_f32_slice(&mut self.rounded);
        let (mut lost, mut squares) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        // Sums of a few thousand squares each, so that single precision is enough for a share.
        for (values, rounded) in values.chunks(PART).zip(self.rounded.chunks(PART)) {
            for (values, rounded) in values.chunks(LANES).zip(rounded.chunks(LANES)) {
                for (at, (value, rounded)) in values.iter().zip(rounded).enumerate() {
                    let difference = value - rounded;
                    lost[at] += difference * difference;
                    squares[at] += value * value;
                }
            }
            let drain = |lanes: &mut [f32; LANES]| -> f64 {
                std::mem::take(lanes).into_iter().map(f64::from).sum()
            };
            self.lost += drain(&mut lost);
            self.squares += drain(&mut squares);
        }
    }

    fn looked(self) -> Looked {
        let rounding = match self.beyond {
            Some((value, index)) => Rounding::Beyond { value, index },
            None if self.lost == 0.0 => Rounding::Exact,
            None if self.lost <= self.squares * MAX_LOST * MAX_LOST => Rounding::Near,
            None => Rounding::Lossy,
        };
        Looked {
            bad: self.bad,
            rounding,
        }
    }

    fn check(&mut self, first: u64, values: &[f32]) {
        let limit = match self.elem {
            Elem::F16 => f16::MAX.to_f32(),
            _ => f32::MAX,
        };
        // Without their signs, floats are ordered as their bits are, and what is not finite comes last.
        let largest = values.iter().fold(0, |largest, value| {
            (value.to_bits() & 0x7fff_ffff).max(largest)
        });
        if largest <= limit.to_bits() || self.bad.is_some() {
            return;
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let (value, place) = (values[at], first + at as u64);
            self.bad = Some(format!(
                "expected finite values, found {value} at flat index {place}"
            ));
        } else if self.beyond.is_none() {
            // What rounds down to the largest half is still within.
            let beyond = |value: &f32| f16::from_f32(*value).is_infinite();
            let at = values.iter().position(beyond);
            self.beyond = at.map(|at| (values[at], first + at as u64));
        }
    }
}

/// A matrix being turned, some rows at a time.
struct Turned {
    rows: usize,
    columns: usize,
    /// Bytes of an element.
    size: usize,
    /// Rows before the band.
    done: usize,
    /// Rows that are not turned yet.
    band: Vec<u8>,
    /// `[column, row]`.
    turned: Vec<u8>,
}

impl Turned {
    fn new(rows: usize, columns: usize, size: usize) -> Turned {
        Turned {
            rows,
            columns,
            size,
            done: 0,
            band: Vec::with_capacity(BAND * columns * size),
            turned: vec![0; rows * columns * size],
        }
    }

    fn take(&mut self, mut bytes: &[u8]) {
        let full = BAND * self.columns * self.size;
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(full - self.band.len()));
            self.band.extend_from_slice(now);
            bytes = later;
            if self.band.len() == full {
                self.turn_band();
            }
        }
    }

    fn turn_band(&mut self) {
        match self.size {
            1 => self.turn_numbers::<1>(),
            2 => self.turn_numbers::<2>(),
            _ => self.turn_numbers::<4>(),
        }
        self.band.clear();
    }

    fn turn_numbers<const N: usize>(&mut self) {
        let (band, _) = self.band.as_chunks::<N>();
        let (turned, _) = self.turned.as_chunks_mut::<N>();
        let rows = band.len() / self.columns;
        for column in 0..self.columns {
            let begin = column * self.rows + self.done;
            let places = &mut turned[begin..begin + rows];
            let numbers = band[column..].iter().step_by(self.columns);
            for (place, number) in places.iter_mut().zip(numbers) {
                *place = *number;
            }
        }
        self.done += rows;
    }

    /// The whole matrix, turned; what was taken is forgotten.
    fn finish(&mut self) -> &[u8] {
        if !self.band.is_empty() {
            self.turn_band();
        }
        self.done = 0;
        &self.turned
    }
}

/// A matrix on its way to 8-bit integers, a scale for each of its rows, which become columns.
struct Quantiser {
    checked: Block,
    /// Length of a stored row.
    inner: usize,
    /// The row that is not whole yet.
    row: Vec<f32>,
    integers: Vec<u8>,
    band: Turned,
    /// Rows in the band so far.
    rows: usize,
    scales: Vec<f32>,
}

impl Quantiser {
    /// `shape`: `[in, out]` or `[band, in, out of the band]`, as in the bundle.
    fn new(shape: &[u64]) -> Quantiser {
        let (inner, columns) = (index(shape[shape.len() - 2]), index(shape[shape.len() - 1]));
        Quantiser {
            checked: Block::new(Elem::F32),
            inner,
            row: Vec::with_capacity(inner),
            integers: Vec::with_capacity(inner),
            band: Turned::new(columns, inner, 1),
            rows: 0,
            scales: Vec::new(),
        }
    }

    fn take(&mut self, first: u64, mut values: &[f32], out: &mut WeightsWriter) {
        self.checked.check(first, values);
        while !values.is_empty() {
            let (now, later) = values.split_at(values.len().min(self.inner - self.row.len()));
            self.row.extend_from_slice(now);
            values = later;
            if self.row.len() == self.inner {
                self.end_row(out);
            }
        }
    }

    fn end_row(&mut self, out: &mut WeightsWriter) {
        let scale = quantise(&self.row, &mut self.integers);
        self.scales.push(scale);
        self.row.clear();
        self.band.take(&self.integers);
        self.rows += 1;
        if self.rows == self.band.rows {
            out.write(self.band.finish());
            self.rows = 0;
        }
    }
}

/// Rounds to integers of -127..=127 times the scale returned; a row of zeros has scale 0.
fn quantise(row: &[f32], integers: &mut Vec<u8>) -> f32 {
    const LARGEST: f32 = 127.0;
    // As in `Block::check`, the order of bits is that of magnitudes.
    let largest = row.iter().fold(0, |largest, value| {
        (value.to_bits() & 0x7fff_ffff).max(largest)
    });
    let largest = f32::from_bits(largest);
    let inverse = if largest > 0.0 {
        LARGEST / largest
    } else {
        0.0
    };
    integers.clear();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "within -127..=127 after rounding; negative integers in two's complement"
    )]
    integers.extend(
        row.iter()
            .map(|value| (value * inverse).round_ties_even() as i8 as u8),
    );
    largest / LARGEST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_turned_in_bands_is_its_transpose() {
        for (rows, columns) in [(1, 1), (5, 3), (32, 7), (100, 33), (33, 64)] {
            let numbers: Vec<u8> = (0_u16..)
                .take(rows * columns)
                .flat_map(u16::to_le_bytes)
                .collect();
            let mut turned = Turned::new(rows, columns, 2);
            for piece in numbers.chunks(10) {
                turned.take(piece);
            }
            let found = turned.finish().to_vec();
            for (at, number) in found.as_chunks::<2>().0.iter().enumerate() {
                let (column, row) = (at / rows, at % rows);
                let expected = u16::try_from(row * columns + column).unwrap();
                assert_eq!(
                    u16::from_le_bytes(*number),
                    expected,
                    "{rows} x {columns} at {at}"
                );
            }
        }
    }

    #[test]
    fn a_quantised_row_is_within_half_a_step_of_what_it_was() {
        let row = [0.5, -1.0, 0.25, 1e-4, 0.0, 0.999];
        let mut integers = Vec::new();
        let scale = quantise(&row, &mut integers);
        for (value, integer) in row.iter().zip(&integers) {
            let found = f32::from(integer.cast_signed()) * scale;
            assert!(
                (found - value).abs() <= scale / 2.0 + 1e-7,
                "{value}: {found}"
            );
        }
        assert_eq!(integers[1].cast_signed(), -127);
        assert_eq!(quantise(&[0.0, -0.0], &mut integers), 0.0);
        assert_eq!(integers, [0, 0]);
        // The smallest numbers have no inverse; their row is as good as zero.
        let scale = quantise(&[f32::from_bits(1), 0.0], &mut integers);
        assert!(scale.is_finite(), "{scale}");
    }

    #[test]
    fn halves_are_copied_and_bad_ones_named() {
        let bytes = |values: &[f16]| -> Vec<u8> {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        };
        let mut block = Block::new(Elem::F16);
        let fine = bytes(&[f16::MIN, f16::NEG_ZERO, f16::from_bits(1), f16::MAX]);
        block.take(0, Chunk::Stored(TensorDType::F16, &fine));
        assert_eq!((&block.bytes, &block.bad), (&fine, &None));
        for bad in [
            f16::NAN,
            f16::INFINITY,
            f16::NEG_INFINITY,
            f16::from_bits(0xfc01),
        ] {
            let mut block = Block::new(Elem::F16);
            block.take(
                7,
                Chunk::Stored(TensorDType::F16, &bytes(&[f16::ONE, bad, f16::ONE])),
            );
            let message = block.bad.expect("noticed");
            assert!(message.ends_with("at flat index 8"), "{message}");
        }
    }

    #[test]
    fn a_number_too_large_for_halves_is_found_with_its_place() {
        let beyond = |elem, values: &[f32]| {
            let mut block = Block::new(elem);
            block.take_values(10, values);
            block.looked().rounding
        };
        let found = beyond(Elem::F16, &[1.0, -65_504.0, 65_520.0]);
        let (value, index) = (65_520.0, 12);
        assert_eq!(found, Rounding::Beyond { value, index });
        // Rounds to the largest half.
        assert_eq!(beyond(Elem::F16, &[65_505.0]), Rounding::Near);
        assert_eq!(
            beyond(Elem::F32, &[1.0, f32::MAX, f32::MIN]),
            Rounding::Exact
        );
    }

    #[test]
    fn what_rounding_takes_is_told() {
        let rounding = |values: &[f32]| {
            let mut block = Block::new(Elem::F16);
            block.take_values(0, values);
            block.looked().rounding
        };
        assert_eq!(rounding(&[0.5, -2.0, 1.0 / 1024.0]), Rounding::Exact);
        assert_eq!(rounding(&vec![0.1; 10_000]), Rounding::Near);
        assert_eq!(rounding(&[3e-8, 4e-8, 5e-8]), Rounding::Lossy);
    }
}
