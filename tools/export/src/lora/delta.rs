//! One low-rank change of a weight, added while the weight streams.
//!
//! The factors are read when the weight is, and forgotten with it: a LoRA file may be as large as
//! memory is meant to stay.

use std::sync::Arc;

use crate::checkpoint::{CheckpointError, TensorRef};

/// Columns merged at a time, so that a block of the down factor stays in the cache.
const BLOCK: usize = 1024;

/// What one entry of a LoRA file adds to rows of a stored weight: `scale * up @ down`.
#[derive(Clone, Debug)]
pub struct Delta<'c> {
    /// Place of the file in the plan.
    pub(crate) adapter: usize,
    /// The entry's name.
    pub(crate) entry: Arc<str>,
    /// `[out, rank]`, or with two axes of 1 behind.
    pub(super) up: TensorRef<'c>,
    /// `[rank, in]` or `[rank, in, k, k]`.
    pub(super) down: TensorRef<'c>,
    /// `[rank, rank, k, k]`: the kernel of a convolution whose other two factors are 1 x 1.
    pub(super) mid: Option<TensorRef<'c>>,
    /// Weight of the file times alpha over rank.
    pub(super) scale: f32,
    /// The first row it changes; the stored weight is seen as rows of its first axis.
    pub(super) first_row: usize,
    /// The weight is stored with its two axes exchanged.
    pub(super) turned: bool,
}

/// The numbers of a [`Delta`], as matrices.
#[derive(Debug)]
pub(crate) struct Factors {
    scale: f32,
    rank: usize,
    first_row: usize,
    columns: usize,
    /// `[row, rank]`.
    up: Vec<f32>,
    /// `[rank, column]`.
    down: Vec<f32>,
}

impl Delta<'_> {
    /// Reads the factors.
    pub(crate) fn factors(&self) -> Result<Factors, CheckpointError> {
        let (mut up, mut down) = (self.up.read_f32()?, self.down.read_f32()?);
        let mut rank = length(self.down.shape()[0]);
        if let Some(mid) = &self.mid {
            rank = length(mid.shape()[0]);
            let kernel = length(mid.shape()[2] * mid.shape()[3]);
            down = with_kernel(&mid.read_f32()?, &down, rank, kernel);
        }
        if self.turned {
            // (up @ down) turned is down turned @ up turned.
            (up, down) = (turned(&down, rank), turned(&up, up.len() / rank));
        }
        Ok(Factors {
            scale: self.scale,
            rank,
            first_row: self.first_row,
            columns: down.len() / rank,
            up,
            down,
        })
    }
}

/// `[rank, in, k, k]` from the kernel `mid` `[rank, inner, k, k]` and `down` `[inner, in]`.
fn with_kernel(mid: &[f32], down: &[f32], rank: usize, kernel: usize) -> Vec<f32> {
    let inner = mid.len() / rank / kernel;
    let inputs = down.len() / inner;
    let mut joined = vec![0.0; rank * inputs * kernel];
    for row in 0..rank {
        for through in 0..inner {
            let taps = &mid[(row * inner + through) * kernel..][..kernel];
            for input in 0..inputs {
                let share = down[through * inputs + input];
                let into = &mut joined[(row * inputs + input) * kernel..][..kernel];
                for (sum, tap) in into.iter_mut().zip(taps) {
                    *sum += share * tap;
                }
            }
        }
    }
    joined
}

/// A matrix of `rows` rows with its axes exchanged.
fn turned(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| values[row * columns + column]))
        .collect()
}

impl Factors {
    /// Adds to `values`, which begin at flat index `offset` of the stored weight.
    ///
    /// Each sum runs over the ranks in order, wherever a chunk begins: the same bytes every time.
    pub(crate) fn add(&self, offset: u64, values: &mut [f32]) {
        let columns = self.columns;
        let (begin, rows) = (length(offset), self.up.len() / self.rank);
        let end = begin + values.len();
        let first = (begin / columns).max(self.first_row);
        let last = end.div_ceil(columns).min(self.first_row + rows);
        let mut sums = [0.0_f32; BLOCK];
        for left in (0..columns).step_by(BLOCK) {
            for row in first..last {
                // The part of this row's block that lies in the chunk, as flat indices.
                let from = (row * columns + left).max(begin);
                let to = (row * columns + (left + BLOCK).min(columns)).min(end);
                if from >= to {
                    continue;
                }
                let sums = &mut sums[..to - from];
                let column = from - row * columns;
                self.sum(row - self.first_row, column, sums);
                for (value, sum) in values[from - begin..].iter_mut().zip(sums) {
                    *value += self.scale * *sum;
                }
            }
        }
    }

    /// Columns `column..` of one row of `up @ down`.
    fn sum(&self, row: usize, column: usize, sums: &mut [f32]) {
        let len = sums.len();
        let shares = &self.up[row * self.rank..][..self.rank];
        let line = |rank: usize| &self.down[rank * self.columns + column..][..len];
        sums.fill(0.0);
        let (fours, left) = shares.as_chunks::<4>();
        for (at, [a, b, c, d]) in fours.iter().enumerate() {
            let lines = [0, 1, 2, 3].map(|rank| line(at * 4 + rank));
            for (index, sum) in sums.iter_mut().enumerate() {
                // One after the other: the order of additions does not depend on the unrolling.
                let two = *sum + a * lines[0][index] + b * lines[1][index];
                *sum = two + c * lines[2][index] + d * lines[3][index];
            }
        }
        for (at, share) in left.iter().enumerate() {
            for (sum, value) in sums.iter_mut().zip(line(fours.len() * 4 + at)) {
                *sum += share * value;
            }
        }
    }
}

fn length(len: u64) -> usize {
    usize::try_from(len).expect("lengths were checked against the file's size")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed | 1;
        (0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                f32::from(u16::try_from(state >> 16).expect("16 bits")) / 65_536.0 - 0.5
            })
            .collect()
    }

    proptest! {
        #[test]
        fn merging_in_chunks_equals_the_formula(
            (rows, first_row, behind) in (1_usize..6, 0_usize..3, 0_usize..3),
            rank in 1_usize..11,
            columns in prop_oneof![1_usize..9, 1020_usize..1030, 2047_usize..2050],
            chunk in 1_usize..5000,
            seed in any::<u32>(),
        ) {
            let factors = Factors {
                scale: 0.75,
                rank,
                first_row,
                columns,
                up: numbers(rows * rank, seed),
                down: numbers(rank * columns, seed ^ 0x5bd1),
            };
            let stored = numbers((first_row + rows + behind) * columns, seed ^ 0x9e37);
            let mut merged = stored.clone();
            for (at, values) in merged.chunks_mut(chunk).enumerate() {
                factors.add((at * chunk) as u64, values);
            }
            for (at, (&found, &before)) in merged.iter().zip(&stored).enumerate() {
                let (row, column) = (at / columns, at % columns);
                let expected = if (first_row..first_row + rows).contains(&row) {
                    let mut sum = 0.0_f32;
                    for r in 0..rank {
                        sum += factors.up[(row - first_row) * rank + r] * factors.down[r * columns + column];
                    }
                    before + 0.75 * sum
                } else {
                    before
                };
                prop_assert_eq!(found.to_bits(), expected.to_bits(), "row {} column {}", row, column);
            }
        }

        #[test]
        fn kernel_between_two_factors_is_their_product(
            (rank, inner, inputs, kernel) in (1_usize..4, 1_usize..4, 1_usize..5, 1_usize..10),
            seed in any::<u32>(),
        ) {
            let mid = numbers(rank * inner * kernel, seed);
            let down = numbers(inner * inputs, seed ^ 0x77);
            let joined = with_kernel(&mid, &down, rank, kernel);
            for a in 0..rank {
                for i in 0..inputs {
                    for k in 0..kernel {
                        let expected: f32 = (0..inner)
                            .map(|b| mid[(a * inner + b) * kernel + k] * down[b * inputs + i])
                            .sum();
                        let found = joined[(a * inputs + i) * kernel + k];
                        prop_assert!((found - expected).abs() <= 1e-6, "{} {}", found, expected);
                    }
                }
            }
        }
    }
}
