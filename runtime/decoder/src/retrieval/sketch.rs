//! Short stand-ins for long embeddings, and dot products with fp16 rows.
//!
//! A count sketch (Charikar, Chen, Farach-Colton 2002): every value goes, with a random sign, into one
//! of `len` sums. The dot product of two sketches has the dot product of the embeddings as its mean;
//! its standard deviation is at most `sqrt((|a|² |b|² + (a·b)²) / len)`, 0.03 for unrelated unit
//! embeddings and 1024 sums. Embeddings of pictures share most of their direction; what all of them
//! share (the centre) is therefore taken away first and accounted for exactly, and the error is
//! that of the small rests.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Values that are converted at a time.
const BLOCK: usize = 1024;
const LANES: usize = 16;

/// Which sum every value goes to, and with which sign.
#[derive(Debug)]
pub(super) struct Projection {
    /// Twice the sum's index, plus one for a minus.
    places: Vec<u32>,
    len: usize,
}

impl Projection {
    /// From embeddings of `values` to sketches of `len`; the same seed gives the same projection.
    pub(super) fn new(values: usize, len: usize, seed: u64) -> Projection {
        let sums = u64::try_from(len.max(1)).unwrap_or(1);
        let mut state = seed;
        let places = (0..values).map(|_| {
            let word = split_mix(&mut state);
            // The upper half, scaled, for the sum; the lowest bit for the sign.
            let sum = ((word >> 32) * sums) >> 32;
            u32::try_from(sum * 2 + (word & 1)).unwrap_or(0)
        });
        Projection {
            places: places.collect(),
            len,
        }
    }

    /// The sketch of `values`, each scaled and less its share of `centre`.
    pub(super) fn apply(&self, values: &[f32], scale: f32, centre: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0_f32; self.len];
        for ((place, value), centre) in self.places.iter().zip(values).zip(centre) {
            let rest = value * scale - centre;
            let sum = &mut sums[(place >> 1) as usize];
            if place & 1 == 0 {
                *sum += rest;
            } else {
                *sum -= rest;
            }
        }
        sums
    }
}

/// Steele, Lea, Flood 2014: equal on every machine.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Dot product; sums of 1024 in single, their sum in double precision.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.chunks(BLOCK)
        .zip(b.chunks(BLOCK))
        .map(|(a, b)| f64::from(dot_block(a, b)))
        .sum()
}

/// Dot product of an fp16 row and a vector, converted block by block in the first cache.
pub(super) fn dot_half(row: &[f16], vector: &[f32]) -> f64 {
    let mut block = [0.0_f32; BLOCK];
    row.chunks(BLOCK)
        .zip(vector.chunks(BLOCK))
        .map(|(row, vector)| {
            let block = &mut block[..row.len()];
            row.convert_to_f32_slice(block);
            f64::from(dot_block(block, vector))
        })
        .sum()
}

/// Sixteen independent sums, which the compiler keeps in vector registers.
fn dot_block(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0_f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
