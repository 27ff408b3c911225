//! The numbers of a synthetic tensor.
//!
//! Each tensor has a ChaCha8 stream of its own, keyed by the seed, the file and the tensor's name, so the numbers do
//! not depend on the order of writing and a tensor keeps them when others come or go.

use std::io::{self, Write};

use half::f16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

use super::layout::{DType, Fill, Tensor};

/// Bytes of randomness drawn at a time.
const CHUNK: usize = 1 << 18;

/// Writes a tensor's numbers, little-endian, in bounded memory. A shared storage has none of its own.
pub(crate) fn write(out: &mut dyn Write, seed: u64, file: &str, tensor: &Tensor) -> io::Result<()> {
    match &tensor.fill {
        Fill::SameAs(_) => Ok(()),
        Fill::Table(values) => {
            let bytes: Vec<u8> = match tensor.dtype {
                DType::F32 => values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect(),
                // There are no tables of integers but counts.
                DType::I64 => Vec::new(),
                DType::F16 => values
                    .iter()
                    .flat_map(|value| f16::from_f32(*value).to_le_bytes())
                    .collect(),
            };
            out.write_all(&bytes)
        }
        Fill::Counting => {
            (0..tensor.len()).try_for_each(|count| out.write_all(&count.to_le_bytes()))
        }
        Fill::Uniform { centre, reach } => uniform(
            out,
            &mut stream(seed, file, &tensor.name),
            tensor,
            *centre,
            *reach,
        ),
    }
}

fn stream(seed: u64, file: &str, name: &str) -> ChaCha8Rng {
    let key = Sha256::new()
        .chain_update(seed.to_le_bytes())
        .chain_update(file.as_bytes())
        .chain_update([0])
        .chain_update(name.as_bytes())
        .finalize();
    ChaCha8Rng::from_seed(key.into())
}

/// Each number takes as many random bits as it has bits: 16 for a half, 32 for a single.
fn uniform(
    out: &mut dyn Write,
    rng: &mut ChaCha8Rng,
    tensor: &Tensor,
    centre: f32,
    reach: f32,
) -> io::Result<()> {
    let mut left = tensor.len_bytes();
    let mut random = vec![0; CHUNK];
    let mut bytes = vec![0; CHUNK];
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        rng.fill_bytes(&mut random);
        match tensor.dtype {
            DType::F16 => {
                let scale = reach / 32_768.0;
                for (place, bits) in bytes.chunks_exact_mut(2).zip(random.chunks_exact(2)) {
                    let step = f32::from(i16::from_le_bytes([bits[0], bits[1]]));
                    place.copy_from_slice(&f16::from_f32(centre + step * scale).to_le_bytes());
                }
            }
            // Not drawn; the lengths are checked where the file is written.
            DType::I64 => bytes.fill(0),
            DType::F32 => {
                // 24 bits, so that every step is exact.
                let scale = reach / 8_388_608.0;
                for (place, bits) in bytes.chunks_exact_mut(4).zip(random.chunks_exact(4)) {
                    let step = exact(i32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]) >> 8);
                    place.copy_from_slice(&(centre + step * scale).to_le_bytes());
                }
            }
        }
        out.write_all(&bytes[..len])?;
        left -= len as u64;
    }
    Ok(())
}

#[expect(
    clippy::cast_precision_loss,
    reason = "at most 24 bits, which f32 holds"
)]
fn exact(step: i32) -> f32 {
    step as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: DType, len: u64) -> Tensor {
        Tensor {
            name: "weight".to_owned(),
            dtype,
            shape: vec![len],
            fill: Fill::Uniform {
                centre: 1.0,
                reach: 0.5,
            },
        }
    }

    fn numbers(seed: u64, tensor: &Tensor) -> Vec<f32> {
        let mut bytes = Vec::new();
        write(&mut bytes, seed, "last", tensor).unwrap();
        match tensor.dtype {
            DType::I64 => panic!("integers are not drawn"),
            DType::F32 => bytes
                .chunks_exact(4)
                .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
                .collect(),
            DType::F16 => bytes
                .chunks_exact(2)
                .map(|bytes| f16::from_le_bytes(bytes.try_into().unwrap()).to_f32())
                .collect(),
        }
    }

    #[test]
    fn numbers_fill_their_range_evenly() {
        for dtype in [DType::F16, DType::F32] {
            let found = numbers(1, &tensor(dtype, 300_000));
            assert_eq!(found.len(), 300_000);
            assert!(found.iter().all(|value| (0.5..=1.5).contains(value)));
            let mean = found.iter().map(|value| f64::from(*value)).sum::<f64>() / 3e5;
            let variance = found
                .iter()
                .map(|value| (f64::from(*value) - mean).powi(2))
                .sum::<f64>()
                / 3e5;
            assert!((mean - 1.0).abs() < 0.005, "{mean}");
            assert!((variance - 1.0 / 12.0).abs() < 0.001, "{variance}");
        }
    }

    #[test]
    fn numbers_depend_on_seed_and_name_alone() {
        let short = numbers(1, &tensor(DType::F32, 10));
        let long = numbers(1, &tensor(DType::F32, 100_000));
        assert_eq!(short, long[..10]);
        assert_ne!(short, numbers(2, &tensor(DType::F32, 10)));
        let mut other = tensor(DType::F32, 10);
        other.name = "bias".to_owned();
        assert_ne!(short, numbers(1, &other));
    }
}
