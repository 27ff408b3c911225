//! Tensors: views into storages, read as fp32.

use std::fmt;

use super::storage::{BLOCK_BYTES, MAX_HELD_BYTES};
use super::{Checkpoint, CheckpointError, TensorDType, dtype};
use crate::lora::Delta;

/// Where some of a tensor's numbers lie.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) dtype: TensorDType,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
    /// First element.
    pub(super) offset: u64,
    pub(super) storage: usize,
}

impl View {
    /// All of a row-major tensor, or a run of numbers.
    pub(super) fn row_major(
        dtype: TensorDType,
        shape: &[u64],
        offset: u64,
        storage: usize,
    ) -> View {
        let mut strides = vec![1_u64; shape.len()];
        for at in (1..shape.len()).rev() {
            // Only a tensor without numbers can have axes whose product is beyond count.
            strides[at - 1] = strides[at].saturating_mul(shape[at]);
        }
        View {
            dtype,
            shape: shape.to_vec(),
            strides,
            offset,
            storage,
        }
    }

    pub(super) fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    pub(super) fn contiguous(&self) -> bool {
        let mut expected = 1_u64;
        self.shape
            .iter()
            .zip(&self.strides)
            .rev()
            .all(|(&len, &stride)| {
                let fits = len == 1 || stride == expected;
                expected = expected.saturating_mul(len);
                fits
            })
    }
}

/// A tensor: its views, one behind the other.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) dtype: TensorDType,
    pub(super) shape: Vec<u64>,
    pub(super) views: Vec<View>,
}

impl Entry {
    /// A tensor that is one view.
    pub(super) fn of(view: View) -> Entry {
        Entry {
            dtype: view.dtype,
            shape: view.shape.clone(),
            views: vec![view],
        }
    }

    /// The same tensor after its storages moved by `base`.
    pub(super) fn moved(mut self, base: usize) -> Entry {
        for view in &mut self.views {
            view.storage += base;
        }
        self
    }

    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// Some of a tensor's numbers, in order.
#[derive(Clone, Copy, Debug)]
pub enum Chunk<'a> {
    /// As they lie in the file: whole numbers, little-endian, for `super::convert`.
    Stored(TensorDType, &'a [u8]),
    /// Gathered from a strided view, or changed by a LoRA.
    Values(&'a [f32]),
}

/// A tensor of an open checkpoint.
#[derive(Clone)]
pub struct TensorRef<'c> {
    checkpoint: &'c Checkpoint,
    name: &'c str,
    entry: &'c Entry,
    /// What LoRA files add to it.
    deltas: Vec<Delta<'c>>,
}

impl fmt::Debug for TensorRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {:?}",
            self.name, self.entry.dtype, self.entry.shape
        )
    }
}

impl<'c> TensorRef<'c> {
    pub(super) fn new(
        checkpoint: &'c Checkpoint,
        name: &'c str,
        entry: &'c Entry,
    ) -> TensorRef<'c> {
        TensorRef {
            checkpoint,
            name,
            entry,
            deltas: Vec::new(),
        }
    }

    /// Key below its section.
    #[must_use]
    pub fn name(&self) -> &'c str {
        self.name
    }

    /// The tensor changed by a LoRA: its numbers are the sum from now on, however they are read.
    #[must_use]
    pub(crate) fn with_delta(mut self, delta: Delta<'c>) -> Self {
        self.deltas.push(delta);
        self
    }

    /// What LoRA files add to it.
    #[must_use]
    pub(crate) fn deltas(&self) -> &[Delta<'c>] {
        &self.deltas
    }

    /// Key for messages: with the file's own spelling where that is another one.
    #[must_use]
    pub fn label(&self) -> String {
        self.checkpoint.names().label(self.name)
    }

    /// Name of the file that holds the tensor's first numbers, without its folder; in a checkpoint
    /// that is a folder, with the path from that folder's name on.
    #[must_use]
    pub fn file_name(&self) -> String {
        let part = self
            .entry
            .views
            .first()
            .map_or(0, |view| self.checkpoint.storages[view.storage].part);
        self.checkpoint.parts[part].name.clone()
    }

    /// Element type in the file.
    #[must_use]
    pub fn dtype(&self) -> TensorDType {
        self.entry.dtype
    }

    /// Axes, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[u64] {
        &self.entry.shape
    }

    /// Numbers in it.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.entry.elements()
    }

    /// All numbers as fp32, row-major; for tensors that fit memory.
    ///
    /// # Errors
    /// [`CheckpointError::TooLarge`] above 1 GiB, and what reading brings.
    pub fn read_f32(&self) -> Result<Vec<f32>, CheckpointError> {
        let found = self.elements().saturating_mul(4);
        if found > MAX_HELD_BYTES {
            return Err(CheckpointError::TooLarge {
                name: self.name.into(),
                limit: MAX_HELD_BYTES,
                found,
            });
        }
        // Compressed entries and strided views may promise more than the file holds.
        let held = |view: &View| {
            view.contiguous() && self.checkpoint.storages[view.storage].packed.is_none()
        };
        let sure = self.entry.views.iter().all(held);
        let sure = if sure { self.elements() } else { 0 };
        let mut values = Vec::with_capacity(usize::try_from(sure).unwrap_or(0));
        self.for_each_f32_chunk(|_, chunk| {
            values.extend_from_slice(chunk);
            Ok(())
        })?;
        Ok(values)
    }

    /// Hands all numbers to `consume` in order, as fp32, with the flat index of each chunk's first.
    ///
    /// The checksum of a zip entry is known after its last chunk; an error then voids what was handed over.
    ///
    /// # Errors
    /// What reading brings, and what `consume` returns.
    pub fn for_each_f32_chunk(
        &self,
        mut consume: impl FnMut(u64, &[f32]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        if self.deltas.is_empty() {
            return self.for_each_stored_chunk(consume);
        }
        let factors = self
            .deltas
            .iter()
            .map(Delta::factors)
            .collect::<Result<Vec<_>, _>>()?;
        let mut merged = Vec::new();
        self.for_each_stored_chunk(|offset, values| {
            merged.clear();
            merged.extend_from_slice(values);
            for factors in &factors {
                factors.add(offset, &mut merged);
            }
            consume(offset, &merged)
        })
    }

    /// As [`Self::for_each_f32_chunk`], but numbers that need not be computed come as they are stored.
    ///
    /// # Errors
    /// What reading brings, and what `consume` returns.
    pub fn for_each_chunk(
        &self,
        mut consume: impl FnMut(u64, Chunk<'_>) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        if self.deltas.is_empty() {
            self.for_each_view_chunk(consume)
        } else {
            self.for_each_f32_chunk(|first, values| consume(first, Chunk::Values(values)))
        }
    }

    /// The numbers in the file, as fp32.
    fn for_each_stored_chunk(
        &self,
        mut consume: impl FnMut(u64, &[f32]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut converted = Vec::new();
        self.for_each_view_chunk(|first, chunk| match chunk {
            Chunk::Values(values) => consume(first, values),
            Chunk::Stored(dtype, bytes) => {
                converted.clear();
                dtype::convert(dtype, bytes, &mut converted);
                consume(first, &converted)
            }
        })
    }

    /// The numbers as they are in the file.
    fn for_each_view_chunk(
        &self,
        mut consume: impl FnMut(u64, Chunk<'_>) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut done = 0;
        for view in self.entry.views.iter().filter(|view| view.elements() > 0) {
            if view.contiguous() {
                let size = view.dtype.len_bytes();
                let (start, len) = (view.offset * size, view.elements() * size);
                self.checkpoint.stream(view.storage, start, len, |bytes| {
                    consume(done, Chunk::Stored(view.dtype, bytes))?;
                    done += bytes.len() as u64 / size;
                    Ok(())
                })?;
            } else {
                let held = self.checkpoint.hold(view.storage, self.name)?;
                gather(view, &held, |values| {
                    consume(done, Chunk::Values(values))?;
                    done += values.len() as u64;
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

/// Numbers of a strided view, row-major.
fn gather(
    view: &View,
    held: &[u8],
    mut consume: impl FnMut(&[f32]) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let size = usize::try_from(view.dtype.len_bytes()).unwrap_or(8);
    let mut at = vec![0_u64; view.shape.len()];
    let mut values = Vec::new();
    for _ in 0..view.elements() {
        let steps = at.iter().zip(&view.strides);
        let element = view.offset + steps.map(|(i, stride)| i * stride).sum::<u64>();
        // Opening compared the farthest element with the storage.
        let start = usize::try_from(element)
            .unwrap_or(usize::MAX)
            .saturating_mul(size);
        let bytes = held
            .get(start..start.saturating_add(size))
            .unwrap_or_default();
        dtype::convert(view.dtype, bytes, &mut values);
        if values.len() == BLOCK_BYTES / 4 {
            consume(&values)?;
            values.clear();
        }
        for (index, &len) in at.iter_mut().zip(&view.shape).rev() {
            *index += 1;
            if *index < len {
                break;
            }
            *index = 0;
        }
    }
    if values.is_empty() {
        Ok(())
    } else {
        consume(&values)
    }
}
