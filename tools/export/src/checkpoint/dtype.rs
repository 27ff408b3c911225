//! Element types, and their bytes as fp32.

use std::fmt;

use half::slice::HalfFloatSliceExt;

/// Element types of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorDType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// 16-bit signed integer.
    I16,
    /// 8-bit signed integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
    /// Truth value.
    Bool,
}

impl TensorDType {
    /// Bytes of one element.
    #[must_use]
    pub fn len_bytes(self) -> u64 {
        match self {
            TensorDType::F64 | TensorDType::I64 => 8,
            TensorDType::F32 | TensorDType::I32 => 4,
            TensorDType::F16 | TensorDType::BF16 | TensorDType::I16 => 2,
            TensorDType::I8 | TensorDType::U8 | TensorDType::Bool => 1,
        }
    }

    /// Whether the numbers are floating-point.
    #[must_use]
    pub fn is_float(self) -> bool {
        matches!(
            self,
            TensorDType::F16 | TensorDType::BF16 | TensorDType::F32 | TensorDType::F64
        )
    }
}

impl fmt::Display for TensorDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            TensorDType::F16 => "float16",
            TensorDType::BF16 => "bfloat16",
            TensorDType::F32 => "float32",
            TensorDType::F64 => "float64",
            TensorDType::I64 => "int64",
            TensorDType::I32 => "int32",
            TensorDType::I16 => "int16",
            TensorDType::I8 => "int8",
            TensorDType::U8 => "uint8",
            TensorDType::Bool => "bool",
        })
    }
}

/// Appends little-endian numbers of one type as fp32; integers are exact up to 2^24.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "the target is single precision"
)]
pub(crate) fn convert(dtype: TensorDType, bytes: &[u8], values: &mut Vec<f32>) {
    fn each<const N: usize>(bytes: &[u8], values: &mut Vec<f32>, number: impl Fn([u8; N]) -> f32) {
        let (chunks, _) = bytes.as_chunks::<N>();
        values.extend(chunks.iter().map(|&chunk| number(chunk)));
    }
    match dtype {
        TensorDType::F32 => each(bytes, values, f32::from_le_bytes),
        TensorDType::F16 => {
            // By the slice, so that whole registers are converted where the processor can.
            let (chunks, _) = bytes.as_chunks::<2>();
            let halves: Vec<half::f16> = chunks
                .iter()
                .map(|&chunk| half::f16::from_le_bytes(chunk))
                .collect();
            let begin = values.len();
            values.resize(begin + halves.len(), 0.0);
            halves.convert_to_f32_slice(&mut values[begin..]);
        }
        TensorDType::BF16 => each(bytes, values, |b| half::bf16::from_le_bytes(b).to_f32()),
        TensorDType::F64 => each(bytes, values, |b| f64::from_le_bytes(b) as f32),
        TensorDType::I64 => each(bytes, values, |b| i64::from_le_bytes(b) as f32),
        TensorDType::I32 => each(bytes, values, |b| i32::from_le_bytes(b) as f32),
        TensorDType::I16 => each(bytes, values, |b| f32::from(i16::from_le_bytes(b))),
        TensorDType::I8 => each(bytes, values, |b| f32::from(i8::from_le_bytes(b))),
        TensorDType::U8 | TensorDType::Bool => each(bytes, values, |[b]: [u8; 1]| f32::from(b)),
    }
}
