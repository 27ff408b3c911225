//! Checkpoints in their original containers, read lazily and without executing anything.
//!
//! [`Checkpoint::open`] reads the table of contents alone: the zip directory and `data.pkl` of a
//! `PyTorch` file, the pickles of a legacy one, the header of a safetensors file. Numbers are read
//! when a [`TensorRef`] is asked for them, in chunks, with `pread`; a zip entry's CRC-32 is
//! compared on the way.

pub mod inspect;
mod pickle;
mod safetensors;
mod torch;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

pub use pickle::PickleError;

use crate::lora::Delta;

/// Bytes read at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// Storages that cannot be streamed (compressed or strided) are held whole up to this.
const MAX_HELD_BYTES: u64 = 1 << 30;

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

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The system refused.
    #[error("cannot read the file")]
    Io(#[from] std::io::Error),
    /// Not a container this program knows.
    #[error("expected a PyTorch zip or legacy checkpoint or a safetensors file, found {found}")]
    Container {
        /// What the file looks like.
        found: String,
    },
    /// A zip archive that is damaged.
    #[error("expected a whole PyTorch zip archive; is the file truncated? Fetch it again")]
    Zip(#[source] zip::result::ZipError),
    /// An entry is missing or not as needed.
    #[error("{entry}: {problem}")]
    Entry {
        /// Entry of the archive.
        entry: String,
        /// Expected and found.
        problem: String,
    },
    /// The pickle is refused.
    #[error("{entry} is refused")]
    Pickle {
        /// Entry of the archive.
        entry: String,
        /// Why.
        source: PickleError,
    },
    /// The header of a safetensors file is wrong.
    #[error("the safetensors header is wrong:\n{}", .problems.iter().map(|p| format!("  {p}")).collect::<Vec<_>>().join("\n"))]
    Header {
        /// Every problem found.
        problems: Vec<String>,
    },
    /// Tensors whose numbers are not all there.
    #[error("{} cannot be read:\n{}", if .problems.len() == 1 { "1 tensor".into() } else { format!("{} tensors", .problems.len()) }, .problems.iter().map(|p| format!("  {p}")).collect::<Vec<_>>().join("\n"))]
    Tensors {
        /// One line each: key, expected, found.
        problems: Vec<String>,
    },
    /// The checksum of an entry does not match.
    #[error(
        "{entry}: expected CRC-32 {expected:08x}, found {found:08x}: the file is damaged, fetch it again"
    )]
    Crc {
        /// Entry of the archive.
        entry: String,
        /// Checksum in the archive's directory.
        expected: u32,
        /// Checksum of the bytes.
        found: u32,
    },
    /// No section of this name.
    #[error("expected a dictionary {wanted:?} at the top, found {found}")]
    Section {
        /// What was asked for.
        wanted: String,
        /// The keys at the top.
        found: String,
    },
    /// A tensor too large to be held whole.
    #[error("{name}: expected at most {limit} bytes that cannot be streamed, found {found}")]
    TooLarge {
        /// The tensor.
        name: String,
        /// What is held at most.
        limit: u64,
        /// Its size.
        found: u64,
    },
}

/// The kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// `torch.save` since 1.6.
    TorchZip,
    /// `torch.save` before 1.6.
    TorchLegacy,
    /// safetensors.
    Safetensors,
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Container::TorchZip => "PyTorch zip",
            Container::TorchLegacy => "PyTorch legacy",
            Container::Safetensors => "safetensors",
        })
    }
}

/// Bytes of one storage in the file.
#[derive(Clone, Debug)]
struct Storage {
    entry: String,
    offset: u64,
    /// Bytes of the numbers.
    len_bytes: u64,
    /// Bytes in the file where the entry is compressed.
    packed: Option<u64>,
    crc: Option<u32>,
}

/// A tensor inside a storage.
#[derive(Clone, Debug)]
struct Entry {
    dtype: TensorDType,
    shape: Vec<u64>,
    strides: Vec<u64>,
    /// First element.
    offset: u64,
    storage: usize,
}

impl Entry {
    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    fn contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape
            .iter()
            .zip(&self.strides)
            .rev()
            .all(|(&len, &stride)| {
                let fits = len == 1 || stride == expected;
                expected *= len;
                fits
            })
    }
}

/// An open checkpoint: its table of contents.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    file: File,
    container: Container,
    storages: Vec<Storage>,
    /// Tensors by section (key at the top, empty for tensors at the top itself), then by key.
    sections: BTreeMap<String, BTreeMap<String, Entry>>,
    /// Keys at the top.
    top: Vec<String>,
    /// Storages whose checksum was found right.
    checked: Mutex<BTreeSet<usize>>,
}

impl Checkpoint {
    /// Reads the table of contents.
    ///
    /// # Errors
    /// [`CheckpointError`] names the entry, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut head = Vec::new();
        Read::by_ref(&mut file).take(512).read_to_end(&mut head)?;
        let contents = match sniff(&head, len)? {
            Container::TorchZip => torch::read_zip(&file)?,
            Container::TorchLegacy => torch::read_legacy(&file, len)?,
            Container::Safetensors => safetensors::read(&file, len)?,
        };
        let Contents {
            container,
            storages,
            sections,
            top,
        } = contents;
        Ok(Checkpoint {
            path: path.to_owned(),
            file,
            container,
            storages,
            sections,
            top,
            checked: Mutex::default(),
        })
    }

    /// The kind of file.
    #[must_use]
    pub fn container(&self) -> Container {
        self.container
    }

    /// Keys at the top of the file.
    #[must_use]
    pub fn top_keys(&self) -> &[String] {
        &self.top
    }

    /// Sections that hold tensors, with the number of tensors; the empty name is the top itself.
    pub fn sections(&self) -> impl Iterator<Item = (&str, usize)> {
        self.sections
            .iter()
            .map(|(name, tensors)| (name.as_str(), tensors.len()))
    }

    /// The tensors below one key at the top, by their key below it.
    ///
    /// # Errors
    /// [`CheckpointError::Section`] where there are none.
    pub fn section(&self, name: &str) -> Result<Vec<(String, TensorRef<'_>)>, CheckpointError> {
        if self.sections.contains_key(name) {
            return Ok(self.tensors(name));
        }
        let top: Vec<&str> = self.top.iter().take(12).map(String::as_str).collect();
        let found = if top.is_empty() {
            "none".into()
        } else {
            top.join(", ")
        };
        Err(CheckpointError::Section {
            wanted: name.into(),
            found,
        })
    }

    /// The tensors at the top of the file, by key.
    #[must_use]
    pub fn root(&self) -> Vec<(String, TensorRef<'_>)> {
        self.tensors("")
    }

    fn tensors(&self, section: &str) -> Vec<(String, TensorRef<'_>)> {
        let entries = self.sections.get(section).into_iter().flatten();
        entries
            .map(|(name, entry)| {
                (
                    name.clone(),
                    TensorRef {
                        checkpoint: self,
                        name,
                        entry,
                        deltas: Vec::new(),
                    },
                )
            })
            .collect()
    }
}

/// What a container's reader finds.
struct Contents {
    container: Container,
    storages: Vec<Storage>,
    sections: BTreeMap<String, BTreeMap<String, Entry>>,
    top: Vec<String>,
}

fn sniff(head: &[u8], len: u64) -> Result<Container, CheckpointError> {
    let refuse = |found: &str| {
        Err(CheckpointError::Container {
            found: found.into(),
        })
    };
    let text = String::from_utf8_lossy(head);
    let lower = text.trim_start().to_ascii_lowercase();
    if len == 0 {
        return refuse("an empty file");
    }
    if head.starts_with(b"PK\x03\x04") {
        return Ok(Container::TorchZip);
    }
    if lower.starts_with("<!doctype") || lower.starts_with("<html") {
        return refuse("an HTML page: the download returned a web page, fetch the file itself");
    }
    if lower.starts_with("version https://git-lfs") {
        return refuse("a git-lfs pointer: fetch the file itself with `git lfs pull`");
    }
    if torch::is_legacy(head) {
        return Ok(Container::TorchLegacy);
    }
    if head.len() > 8 && head[8] == b'{' {
        return Ok(Container::Safetensors);
    }
    if head.len() >= 2 && head[0] == 0x80 && (2..=5).contains(&head[1]) {
        return refuse("a bare pickle: refused, nothing was executed");
    }
    if head.get(257..262) == Some(b"ustar") {
        return refuse("a tar archive, the container of PyTorch before 0.1.10");
    }
    refuse("something else")
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

    /// Name of the checkpoint's file, without its folder.
    #[must_use]
    pub fn file_name(&self) -> String {
        self.checkpoint
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
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
        let mut values = Vec::with_capacity(usize::try_from(self.elements()).unwrap_or(0));
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

    /// The numbers as they are in the file.
    fn for_each_stored_chunk(
        &self,
        mut consume: impl FnMut(u64, &[f32]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let storage = &self.checkpoint.storages[self.entry.storage];
        let size = self.entry.dtype.len_bytes();
        if self.entry.elements() == 0 {
            return Ok(());
        }
        if storage.packed.is_none() && self.entry.contiguous() {
            let whole = self.entry.offset == 0 && self.entry.elements() * size == storage.len_bytes;
            if !whole {
                self.checkpoint.verify(self.entry.storage)?;
            }
            let start = self.entry.offset * size;
            let mut values = Vec::with_capacity(BLOCK_BYTES / 2);
            let mut done = 0;
            return self.checkpoint.stream(
                self.entry.storage,
                start,
                self.entry.elements() * size,
                whole,
                |bytes| {
                    values.clear();
                    convert(self.entry.dtype, bytes, &mut values);
                    consume(done, &values)?;
                    done += values.len() as u64;
                    Ok(())
                },
            );
        }
        let held = self.checkpoint.hold(self.entry.storage, self.name)?;
        self.gather(&held, consume)
    }

    /// Numbers of a strided view, row-major.
    fn gather(
        &self,
        held: &[u8],
        mut consume: impl FnMut(u64, &[f32]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let size = usize::try_from(self.entry.dtype.len_bytes()).unwrap_or(8);
        let mut at = vec![0_u64; self.entry.shape.len()];
        let mut values = Vec::with_capacity(BLOCK_BYTES / 4);
        let mut done = 0;
        for _ in 0..self.entry.elements() {
            let element = self.entry.offset
                + at.iter()
                    .zip(&self.entry.strides)
                    .map(|(i, stride)| i * stride)
                    .sum::<u64>();
            // Opening compared the farthest element with the storage.
            let start = usize::try_from(element)
                .unwrap_or(usize::MAX)
                .saturating_mul(size);
            convert(
                self.entry.dtype,
                held.get(start..start.saturating_add(size))
                    .unwrap_or_default(),
                &mut values,
            );
            if values.len() == BLOCK_BYTES / 4 {
                consume(done, &values)?;
                done += values.len() as u64;
                values.clear();
            }
            for (index, &len) in at.iter_mut().zip(&self.entry.shape).rev() {
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
            consume(done, &values)
        }
    }
}

impl Checkpoint {
    /// Reads part of a storage block by block; compares the checksum where the part is the whole.
    fn stream(
        &self,
        storage: usize,
        start: u64,
        len_bytes: u64,
        whole: bool,
        mut consume: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let place = &self.storages[storage];
        let mut block = vec![0; BLOCK_BYTES];
        let mut crc = flate2::Crc::new();
        let mut done = 0;
        while done < len_bytes {
            let len = usize::try_from(len_bytes - done)
                .unwrap_or(BLOCK_BYTES)
                .min(BLOCK_BYTES);
            self.file
                .read_exact_at(&mut block[..len], place.offset + start + done)?;
            if whole && place.crc.is_some() {
                crc.update(&block[..len]);
            }
            consume(&block[..len])?;
            done += len as u64;
        }
        if whole {
            self.compare(storage, crc.sum())
        } else {
            Ok(())
        }
    }

    fn compare(&self, storage: usize, found: u32) -> Result<(), CheckpointError> {
        let place = &self.storages[storage];
        match place.crc {
            Some(expected) if expected != found => Err(CheckpointError::Crc {
                entry: place.entry.clone(),
                expected,
                found,
            }),
            _ => {
                self.checked
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .insert(storage);
                Ok(())
            }
        }
    }

    /// Compares a storage's checksum, once.
    fn verify(&self, storage: usize) -> Result<(), CheckpointError> {
        let place = &self.storages[storage];
        let known = self
            .checked
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .contains(&storage);
        if known || place.crc.is_none() {
            return Ok(());
        }
        self.stream(storage, 0, place.len_bytes, true, |_| Ok(()))
    }

    /// A whole storage in memory: compressed entries and strided views.
    fn hold(&self, storage: usize, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let place = &self.storages[storage];
        let largest = place.len_bytes.max(place.packed.unwrap_or(0));
        if largest > MAX_HELD_BYTES {
            return Err(CheckpointError::TooLarge {
                name: name.into(),
                limit: MAX_HELD_BYTES,
                found: largest,
            });
        }
        let in_file =
            usize::try_from(place.packed.unwrap_or(place.len_bytes)).unwrap_or(usize::MAX);
        let mut raw = vec![0; in_file];
        self.file.read_exact_at(&mut raw, place.offset)?;
        let bytes = match place.packed {
            None => raw,
            Some(_) => {
                let mut bytes = Vec::new();
                flate2::read::DeflateDecoder::new(raw.as_slice())
                    .take(place.len_bytes + 1)
                    .read_to_end(&mut bytes)?;
                bytes
            }
        };
        if bytes.len() as u64 != place.len_bytes {
            let problem = format!("expected {} bytes, found {}", place.len_bytes, bytes.len());
            return Err(CheckpointError::Entry {
                entry: place.entry.clone(),
                problem,
            });
        }
        let mut crc = flate2::Crc::new();
        crc.update(&bytes);
        self.compare(storage, crc.sum())?;
        Ok(bytes)
    }
}

/// Appends little-endian numbers of one type as fp32; integers are exact up to 2^24.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "the target is single precision"
)]
fn convert(dtype: TensorDType, bytes: &[u8], values: &mut Vec<f32>) {
    fn each<const N: usize>(bytes: &[u8], values: &mut Vec<f32>, number: impl Fn([u8; N]) -> f32) {
        let (chunks, _) = bytes.as_chunks::<N>();
        values.extend(chunks.iter().map(|&chunk| number(chunk)));
    }
    match dtype {
        TensorDType::F32 => each(bytes, values, f32::from_le_bytes),
        TensorDType::F16 => each(bytes, values, |b| half::f16::from_le_bytes(b).to_f32()),
        TensorDType::BF16 => each(bytes, values, |b| half::bf16::from_le_bytes(b).to_f32()),
        TensorDType::F64 => each(bytes, values, |b| f64::from_le_bytes(b) as f32),
        TensorDType::I64 => each(bytes, values, |b| i64::from_le_bytes(b) as f32),
        TensorDType::I32 => each(bytes, values, |b| i32::from_le_bytes(b) as f32),
        TensorDType::I16 => each(bytes, values, |b| f32::from(i16::from_le_bytes(b))),
        TensorDType::I8 => each(bytes, values, |b| f32::from(i8::from_le_bytes(b))),
        TensorDType::U8 | TensorDType::Bool => each(bytes, values, |[b]: [u8; 1]| f32::from(b)),
    }
}
