//! Writing a pool, one picture at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::layout::{Header, Sections, check_name, field, place};
use super::sketch::{Projection, dot};
use super::{EncoderDigest, PoolError};

/// Sums of a sketch.
const SKETCH_LEN: u32 = 1024;
/// Pictures whose mean is the centre.
const CENTRE_PICTURES: usize = 64;
/// Seed of the projection: any number does, the same one gives the same file.
const SEED: u64 = 0x6166_7465_7269_6d61;

/// What goes into a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolShape {
    /// Tokens of an embedding.
    pub tokens: u32,
    /// Values of a token.
    pub dim: u32,
    /// Whether all tokens of all pictures are kept, so that cosines are exact.
    pub keep_tokens: bool,
}

/// A pool being written to an empty file.
#[derive(Debug)]
pub struct PoolWriter<'f> {
    file: &'f File,
    header: Header,
    sections: Sections,
    projection: Projection,
    centre: Vec<f32>,
    /// Pictures that wait for the centre.
    waiting: Vec<Vec<f16>>,
    table: Vec<f32>,
    written: u64,
}

impl<'f> PoolWriter<'f> {
    /// Begins a pool of as many pictures as there are names.
    ///
    /// Embeddings no longer than a sketch are kept whole, whatever `shape` says.
    ///
    /// # Errors
    /// [`PoolError::Field`] for names and lengths that a pool cannot have, [`PoolError::Write`].
    pub fn begin(
        file: &'f File,
        shape: PoolShape,
        names: &[String],
        encoder: EncoderDigest,
    ) -> Result<PoolWriter<'f>, PoolError> {
        let mut lines = String::new();
        for (at, name) in names.iter().enumerate() {
            check_name(&format!("name {at}"), name)?;
            lines.push_str(name);
            lines.push('\n');
        }
        let short = u64::from(shape.tokens) * u64::from(shape.dim) <= SKETCH_LEN.into();
        let header = Header {
            tokens: shape.tokens,
            dim: shape.dim,
            sketch_len: if short { 0 } else { SKETCH_LEN },
            exact: shape.keep_tokens || short,
            count: names.len() as u64,
            names_len: lines.len() as u64,
            seed: SEED,
            encoder: encoder.0,
        };
        let Some(sections) = header.sections() else {
            return Err(field("length in bytes", "a number of 64 bits", "more"));
        };
        let values = place(&(0..header.values())).end;
        let write = |bytes: &[u8], at| file.write_all_at(bytes, at).map_err(PoolError::Write);
        file.set_len(sections.tokens.end)
            .map_err(PoolError::Write)?;
        write(&header.to_bytes(lines.as_bytes()), 0)?;
        write(lines.as_bytes(), sections.names.start)?;
        Ok(PoolWriter {
            file,
            projection: Projection::new(
                if short { 0 } else { values },
                header.sketch_len as usize,
                header.seed,
            ),
            header,
            sections,
            centre: vec![0.0; values],
            waiting: Vec::new(),
            table: Vec::new(),
            written: 0,
        })
    }

    /// Whether all tokens are kept.
    #[must_use]
    pub fn keeps_tokens(&self) -> bool {
        self.header.exact
    }

    /// Adds the next picture.
    ///
    /// - `embedding`: `[token * dim]`, the image encoder's tokens, row-major.
    ///
    /// # Errors
    /// [`PoolError::Field`] for another length, for values that fp16 cannot hold and for a picture too
    /// many; [`PoolError::Write`].
    pub fn push(&mut self, embedding: &[f32]) -> Result<(), PoolError> {
        let at = self.written + self.waiting.len() as u64;
        if at >= self.header.count {
            let expected = format!("{} pictures", self.header.count);
            return Err(field("count", expected, "one more"));
        }
        if embedding.len() as u64 != self.header.values() {
            return Err(field(
                format!("embedding {at}"),
                format!("{} x {} values", self.header.tokens, self.header.dim),
                embedding.len().to_string(),
            ));
        }
        let half: Vec<f16> = embedding.iter().map(|&v| f16::from_f32(v)).collect();
        if let Some(bad) = half.iter().position(|value| !value.is_finite()) {
            return Err(field(
                format!("embedding {at}, value {bad}"),
                "a number of half precision",
                embedding[bad].to_string(),
            ));
        }
        self.waiting.push(half);
        let awaited = if self.written > 0 { 1 } else { CENTRE_PICTURES };
        if self.waiting.len() >= awaited || at + 1 == self.header.count {
            self.write_waiting()?;
        }
        Ok(())
    }

    fn write_waiting(&mut self) -> Result<(), PoolError> {
        let rows = std::mem::take(&mut self.waiting);
        let wide: Vec<Vec<f32>> = rows.iter().map(|row| row.to_f32_vec()).collect();
        let inverse: Vec<f32> = wide.iter().map(|row| inverse_norm(row)).collect();
        if self.written == 0 && self.header.sketch_len > 0 {
            #[expect(clippy::cast_precision_loss, reason = "at most 64 pictures")]
            let share = 1.0 / rows.len() as f32;
            for (row, inverse) in wide.iter().zip(&inverse) {
                for (sum, value) in self.centre.iter_mut().zip(row) {
                    *sum += value * inverse * share;
                }
            }
            self.write(
                bytemuck::cast_slice(&self.centre),
                self.sections.centre.start,
            )?;
        }
        for ((half, row), inverse) in rows.iter().zip(&wide).zip(inverse) {
            if self.header.sketch_len > 0 {
                let sketch = self.projection.apply(row, inverse, &self.centre);
                let sketch: Vec<f16> = sketch.into_iter().map(f16::from_f32).collect();
                let len = u64::from(self.header.sketch_len) * 2;
                let start = self.sections.sketches.start + self.written * len;
                self.write(bytemuck::cast_slice(&sketch), start)?;
            }
            if self.header.exact {
                let start = self.sections.tokens.start + self.written * self.header.values() * 2;
                self.write(bytemuck::cast_slice(half), start)?;
            }
            let along = dot(row, &self.centre) * f64::from(inverse);
            self.table.extend([inverse, super::narrow(along)]);
            self.written += 1;
        }
        Ok(())
    }

    /// Completes the file and puts it on the disk.
    ///
    /// # Errors
    /// [`PoolError::Field`] where pictures are missing, [`PoolError::Write`].
    pub fn finish(self) -> Result<(), PoolError> {
        if self.written != self.header.count {
            let expected = format!("{} pictures", self.header.count);
            return Err(field("count", expected, self.written.to_string()));
        }
        self.write(bytemuck::cast_slice(&self.table), self.sections.table.start)?;
        self.file.sync_all().map_err(PoolError::Write)
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<(), PoolError> {
        self.file.write_all_at(bytes, at).map_err(PoolError::Write)
    }
}

/// 0 for an embedding of zeros, which resembles nothing.
fn inverse_norm(values: &[f32]) -> f32 {
    let norm = dot(values, values).sqrt();
    if norm > 0.0 {
        super::narrow(1.0 / norm)
    } else {
        0.0
    }
}
