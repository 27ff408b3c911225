//! Writing a safetensors file, as a stream: a header of JSON, then every tensor's bytes.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use super::layout::{DType, Tensor};

/// Numbers begin at a multiple of this.
const ALIGNMENT: usize = 8;

/// Writes header and tensors in the order given; `fill` writes a tensor's numbers. Returns the file's length.
pub(crate) fn write<W: Write>(
    mut out: W,
    tensors: &[Tensor],
    mut fill: impl FnMut(&mut dyn Write, &Tensor) -> io::Result<()>,
) -> io::Result<(W, u64)> {
    let mut header = Map::new();
    let mut end = 0;
    for tensor in tensors {
        let begin = end;
        end += tensor.len_bytes();
        let dtype = match tensor.dtype {
            DType::F16 => "F16",
            DType::F32 => "F32",
            DType::I64 => "I64",
        };
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for tensor in tensors {
        fill(&mut out, tensor)?;
    }
    out.flush()?;
    Ok((out, 8 + header.len() as u64 + end))
}

#[cfg(test)]
mod tests {
    use super::super::layout::Fill;
    use super::*;

    #[test]
    fn the_header_says_where_the_numbers_are() {
        let tensor = |name: &str, dtype, shape: &[u64]| Tensor {
            name: name.into(),
            dtype,
            shape: shape.into(),
            fill: Fill::Counting,
        };
        let tensors = [
            tensor("b", DType::F16, &[3]),
            tensor("a", DType::I64, &[1, 2]),
        ];
        let (bytes, len) = write(Vec::new(), &tensors, |out, tensor| {
            out.write_all(&vec![
                tensor.name.as_bytes()[0];
                usize::try_from(tensor.len_bytes()).unwrap()
            ])
        })
        .unwrap();
        assert_eq!(bytes.len() as u64, len);
        let header_len =
            usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
        assert_eq!(header["b"]["data_offsets"], json!([0, 6]));
        assert_eq!(
            header["a"],
            json!({"dtype": "I64", "shape": [1, 2], "data_offsets": [6, 22]})
        );
        assert_eq!(&bytes[8 + header_len..], b"bbbbbbaaaaaaaaaaaaaaaa");
    }
}
