//! Reference vectors: a folder of `io_*.safetensors`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::{ArrayD, IxDyn};
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;

/// Largest file of reference vectors that is read.
const MAX_BYTES: u64 = 1 << 30;

/// Why reference vectors cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Not a safetensors file.
    #[error("{path} is not a safetensors file")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: safetensors::SafeTensorError,
    },
    /// Not JSON, or without what is needed of it.
    #[error("{path} is not as expected")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A tensor that is not there.
    #[error("{path}: {tensor} is missing")]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
}

/// The tensors of one `io_*.safetensors`.
#[derive(Debug)]
pub struct Vectors {
    path: PathBuf,
    floats: BTreeMap<String, ArrayD<f32>>,
    ints: BTreeMap<String, Vec<i64>>,
    doubles: BTreeMap<String, Vec<f64>>,
}

impl Vectors {
    /// Reads `io_<name>.safetensors`; `None` where the folder has no such file.
    ///
    /// # Errors
    /// [`GoldenError`] where it is there and cannot be used.
    pub fn read(dir: &Path, name: &str) -> Result<Option<Vectors>, GoldenError> {
        let path = dir.join(format!("io_{name}.safetensors"));
        let Some(bytes) = read(&path)? else {
            return Ok(None);
        };
        let tensors = SafeTensors::deserialize(&bytes).map_err(|source| GoldenError::Format {
            path: path.clone(),
            source,
        })?;
        let (mut floats, mut ints, mut doubles) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (name, view) in tensors.tensors() {
            match view.dtype() {
                Dtype::F32 => {
                    let values = view
                        .data()
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                        .collect();
                    // The format guarantees that shape and data agree.
                    if let Ok(array) = ArrayD::from_shape_vec(IxDyn(view.shape()), values) {
                        floats.insert(name, array);
                    }
                }
                Dtype::I64 => {
                    let value = |b: &[u8]| {
                        i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
                    };
                    ints.insert(name, view.data().chunks_exact(8).map(value).collect());
                }
                Dtype::F64 => {
                    let (chunks, _) = view.data().as_chunks::<8>();
                    let values = chunks.iter().map(|&chunk| f64::from_le_bytes(chunk));
                    doubles.insert(name, values.collect());
                }
                _ => {}
            }
        }
        Ok(Some(Vectors {
            path,
            floats,
            ints,
            doubles,
        }))
    }

    /// A float tensor.
    ///
    /// # Errors
    /// [`GoldenError::Missing`].
    pub fn floats(&self, name: &str) -> Result<&ArrayD<f32>, GoldenError> {
        self.floats.get(name).ok_or_else(|| self.missing(name))
    }

    /// A float tensor, or `None`.
    #[must_use]
    pub fn maybe(&self, name: &str) -> Option<&ArrayD<f32>> {
        self.floats.get(name)
    }

    /// An integer tensor, flat.
    ///
    /// # Errors
    /// [`GoldenError::Missing`].
    pub fn ints(&self, name: &str) -> Result<&[i64], GoldenError> {
        self.ints
            .get(name)
            .map(Vec::as_slice)
            .ok_or_else(|| self.missing(name))
    }

    /// Double-precision tensors whose names begin with `prefix`, by the rest of their names.
    pub fn doubles(&self, prefix: &str) -> impl Iterator<Item = (&str, &[f64])> {
        self.doubles
            .iter()
            .filter_map(move |(name, values)| Some((name.strip_prefix(prefix)?, values.as_slice())))
    }

    /// Names of all float tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.floats.keys().map(String::as_str)
    }

    fn missing(&self, name: &str) -> GoldenError {
        GoldenError::Missing {
            path: self.path.clone(),
            tensor: name.into(),
        }
    }
}

/// A JSON file of the reference set; `None` where the folder has no such file.
///
/// # Errors
/// [`GoldenError`] where it is there and cannot be used.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, GoldenError> {
    let Some(bytes) = read(path)? else {
        return Ok(None);
    };
    let value = serde_json::from_slice(&bytes).map_err(|source| GoldenError::Json {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(value))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, GoldenError> {
    let error = |source| GoldenError::Read {
        path: path.to_owned(),
        source,
    };
    let len = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(missing) if missing.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(other) => return Err(error(other)),
    };
    if len > MAX_BYTES {
        return Err(error(std::io::Error::other(format!(
            "{len} bytes, expected at most {MAX_BYTES}"
        ))));
    }
    fs::read(path).map(Some).map_err(error)
}
