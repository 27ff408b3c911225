//! Writers of checkpoint files: pickles, both containers of `torch.save`, safetensors.

use std::io::{Cursor, Write};

use export::checkpoint::TensorDType;
use half::{bf16, f16};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A storage with its numbers as they lie in the file.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) dtype: TensorDType,
    pub(crate) bytes: Vec<u8>,
}

/// A Python value.
#[derive(Clone, Debug)]
pub(crate) enum Py {
    None,
    Bool(bool),
    Int(i64),
    Text(String),
    List(Vec<Py>),
    Tuple(Vec<Py>),
    Dict(Vec<(Py, Py)>),
    Global(String, String),
    Call(Box<Py>, Vec<Py>),
    /// Storage by number, offset, shape, strides.
    Tensor(usize, i64, Vec<i64>, Vec<i64>),
}

pub(crate) fn text(text: &str) -> Py {
    Py::Text(text.into())
}

pub(crate) fn dict<const N: usize>(items: [(&str, Py); N]) -> Py {
    Py::Dict(
        items
            .into_iter()
            .map(|(key, value)| (text(key), value))
            .collect(),
    )
}

pub(crate) fn global(module: &str, name: &str) -> Py {
    Py::Global(module.into(), name.into())
}

/// `torch.Size` of these lengths.
pub(crate) fn size(lens: &[i64]) -> Py {
    let lens = lens.iter().map(|&len| Py::Int(len)).collect();
    Py::Call(Box::new(global("torch", "Size")), vec![Py::Tuple(lens)])
}

/// Numbers as the bytes of a type.
pub(crate) fn bytes(dtype: TensorDType, values: &[f64]) -> Vec<u8> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "tests choose numbers that fit"
    )]
    let each = |value: f64| match dtype {
        TensorDType::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        TensorDType::BF16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        TensorDType::F32 => (value as f32).to_le_bytes().to_vec(),
        TensorDType::F64 => value.to_le_bytes().to_vec(),
        TensorDType::I64 => (value as i64).to_le_bytes().to_vec(),
        TensorDType::I32 => (value as i32).to_le_bytes().to_vec(),
        TensorDType::I16 => (value as i16).to_le_bytes().to_vec(),
        TensorDType::I8 => (value as i8).to_le_bytes().to_vec(),
        TensorDType::U8 | TensorDType::Bool => vec![u8::from(value != 0.0)],
    };
    values.iter().flat_map(|&value| each(value)).collect()
}

/// A pickled value with its storages.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    pub(crate) value: Py,
    pub(crate) storages: Vec<Stored>,
}

impl Saved {
    /// A dictionary of contiguous tensors.
    pub(crate) fn tensors(tensors: &[(&str, TensorDType, &[i64], Vec<f64>)]) -> Saved {
        let mut saved = Saved {
            value: Py::None,
            storages: Vec::new(),
        };
        let items = tensors
            .iter()
            .map(|(name, dtype, shape, values)| (text(name), saved.tensor(*dtype, shape, values)))
            .collect();
        saved.value = Py::Dict(items);
        saved
    }

    /// Adds a storage; returns the contiguous tensor of it.
    pub(crate) fn tensor(&mut self, dtype: TensorDType, shape: &[i64], values: &[f64]) -> Py {
        self.storages.push(Stored {
            dtype,
            bytes: bytes(dtype, values),
        });
        let mut strides = vec![1; shape.len()];
        for at in (1..shape.len()).rev() {
            strides[at - 1] = strides[at] * shape[at];
        }
        Py::Tensor(self.storages.len() - 1, 0, shape.to_vec(), strides)
    }

    /// The pickle; `legacy` storage references have a sixth part.
    pub(crate) fn pickle(&self, legacy: bool) -> Vec<u8> {
        let mut out = vec![0x80, 2];
        self.put(&self.value, legacy, &mut out);
        out.push(b'.');
        out
    }

    fn put(&self, value: &Py, legacy: bool, out: &mut Vec<u8>) {
        match value {
            Py::None => out.push(b'N'),
            Py::Bool(value) => out.push(if *value { 0x88 } else { 0x89 }),
            Py::Int(value) => match i32::try_from(*value) {
                Ok(value) => {
                    out.push(b'J');
                    out.extend(value.to_le_bytes());
                }
                Err(_) => {
                    out.extend([0x8a, 8]);
                    out.extend(value.to_le_bytes());
                }
            },
            Py::Text(text) => {
                out.push(b'X');
                out.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
                out.extend(text.as_bytes());
            }
            Py::List(items) => {
                out.extend(b"](");
                items.iter().for_each(|item| self.put(item, legacy, out));
                out.push(b'e');
            }
            Py::Tuple(items) => {
                out.push(b'(');
                items.iter().for_each(|item| self.put(item, legacy, out));
                out.push(b't');
            }
            Py::Dict(items) => {
                out.extend(b"}(");
                for (key, value) in items {
                    self.put(key, legacy, out);
                    self.put(value, legacy, out);
                }
                out.push(b'u');
            }
            Py::Global(module, name) => out.extend(format!("c{module}\n{name}\n").as_bytes()),
            Py::Call(function, arguments) => {
                self.put(function, legacy, out);
                self.put(&Py::Tuple(arguments.clone()), legacy, out);
                out.push(b'R');
            }
            Py::Tensor(storage, offset, shape, strides) => {
                let stored = &self.storages[*storage];
                let class = match stored.dtype {
                    TensorDType::F16 => "HalfStorage",
                    TensorDType::BF16 => "BFloat16Storage",
                    TensorDType::F32 => "FloatStorage",
                    TensorDType::F64 => "DoubleStorage",
                    TensorDType::I64 => "LongStorage",
                    TensorDType::I32 => "IntStorage",
                    TensorDType::I16 => "ShortStorage",
                    TensorDType::I8 => "CharStorage",
                    TensorDType::U8 => "ByteStorage",
                    TensorDType::Bool => "BoolStorage",
                };
                let elements = stored.bytes.len() as u64 / stored.dtype.len_bytes();
                out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
                for part in [
                    text("storage"),
                    global("torch", class),
                    text(&storage.to_string()),
                    text("cpu"),
                    Py::Int(i64::try_from(elements).unwrap()),
                ] {
                    self.put(&part, legacy, out);
                }
                if legacy {
                    out.push(b'N');
                }
                out.extend(b"tQ");
                let lens = |lens: &[i64]| Py::Tuple(lens.iter().map(|&len| Py::Int(len)).collect());
                for part in [
                    Py::Int(*offset),
                    lens(shape),
                    lens(strides),
                    Py::Bool(false),
                    Py::Dict(Vec::new()),
                ] {
                    self.put(&part, legacy, out);
                }
                out.extend(b"tR");
            }
        }
    }

    /// The zip container.
    pub(crate) fn zip(&self) -> Vec<u8> {
        self.zip_of(CompressionMethod::Stored, "little")
    }

    /// The zip container with a chosen method and byte order.
    pub(crate) fn zip_of(&self, method: CompressionMethod, byte_order: &str) -> Vec<u8> {
        let mut entries = vec![
            ("archive/data.pkl".to_owned(), self.pickle(false)),
            ("archive/byteorder".to_owned(), byte_order.into()),
        ];
        for (at, stored) in self.storages.iter().enumerate() {
            entries.push((format!("archive/data/{at}"), stored.bytes.clone()));
        }
        entries.push(("archive/version".into(), b"3\n".to_vec()));
        archive(&entries, method)
    }

    /// The container of `torch.save` before 1.6.
    pub(crate) fn legacy(&self) -> Vec<u8> {
        self.legacy_of(1001, true)
    }

    /// The old container with a chosen protocol and byte order.
    pub(crate) fn legacy_of(&self, protocol: i64, little_endian: bool) -> Vec<u8> {
        let plain = |value: Py| {
            Saved {
                value,
                storages: Vec::new(),
            }
            .pickle(false)
        };
        // The magic number, a LONG1 of ten bytes.
        let mut out = vec![
            0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.',
        ];
        out.extend(plain(Py::Int(protocol)));
        out.extend(plain(dict([
            ("protocol_version", Py::Int(protocol)),
            ("little_endian", Py::Bool(little_endian)),
        ])));
        out.extend(self.pickle(true));
        let keys = (0..self.storages.len()).map(|at| text(&at.to_string()));
        out.extend(plain(Py::List(keys.collect())));
        for stored in &self.storages {
            let elements = stored.bytes.len() as u64 / stored.dtype.len_bytes();
            out.extend(elements.to_le_bytes());
            out.extend(&stored.bytes);
        }
        out
    }
}

/// A zip archive of these entries.
pub(crate) fn archive(entries: &[(String, Vec<u8>)], method: CompressionMethod) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(method);
    for (name, bytes) in entries {
        writer.start_file(name.as_str(), options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// A safetensors file with this header, word for word.
pub(crate) fn safetensors_raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

/// A safetensors file of these tensors.
pub(crate) fn safetensors(tensors: &[(&str, TensorDType, &[i64], Vec<f64>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, values) in tensors {
        let begin = data.len();
        data.extend(bytes(*dtype, values));
        let dtype = match dtype {
            TensorDType::F16 => "F16",
            TensorDType::BF16 => "BF16",
            TensorDType::F32 => "F32",
            TensorDType::F64 => "F64",
            TensorDType::I64 => "I64",
            TensorDType::I32 => "I32",
            TensorDType::I16 => "I16",
            TensorDType::I8 => "I8",
            TensorDType::U8 => "U8",
            TensorDType::Bool => "BOOL",
        };
        header.insert(
            (*name).to_owned(),
            serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}),
        );
    }
    safetensors_raw(&serde_json::Value::Object(header).to_string(), &data)
}
