//! Checkpoints in their original containers, read lazily and without executing anything.
//!
//! [`Checkpoint::open`] reads the table of contents alone: the zip directory and `data.pkl` of a
//! `PyTorch` file, the pickles of a legacy one, the header of a safetensors file, the index of
//! shards, the model states of a ZeRO folder. Numbers are read when a [`TensorRef`] is asked for
//! them, in chunks, with `pread`; a zip entry's CRC-32 is compared on the way.
//!
//! A checkpoint of several files looks like one of a single file: each tensor is a row of views,
//! one behind the other, into the storages of whichever files hold them.

mod container;
mod diffusers;
mod dtype;
mod error;
mod folder;
pub mod inspect;
mod names;
mod pickle;
mod safetensors;
mod sharded;
mod storage;
mod tensor;
mod torch;
mod zero;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

pub use container::Container;
pub use dtype::TensorDType;
pub(crate) use dtype::convert;
pub use error::CheckpointError;
pub use folder::{is_diffusers, is_zero};
pub use names::Names;
pub use pickle::PickleError;
use storage::Storage;
use tensor::Entry;
pub use tensor::{Chunk, TensorRef};

/// One file of a checkpoint.
#[derive(Debug)]
pub struct Part {
    /// Name for people: the file's name, with its folders from the checkpoint's own on.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Open where numbers are read from it.
    file: Option<File>,
}

/// An open checkpoint: its table of contents.
#[derive(Debug)]
pub struct Checkpoint {
    container: Container,
    parts: Vec<Part>,
    storages: Vec<Storage>,
    /// Tensors by section (key at the top, empty for tensors at the top itself), then by key.
    sections: Sections,
    /// Keys at the top.
    top: Vec<String>,
    names: Names,
    /// Storages whose checksum was found right.
    checked: Mutex<BTreeSet<usize>>,
}

type Sections = BTreeMap<String, BTreeMap<String, Entry>>;

/// What a container's reader finds.
struct Contents {
    container: Container,
    storages: Vec<Storage>,
    sections: Sections,
    top: Vec<String>,
}

impl Checkpoint {
    /// Reads the table of contents of a file, of an index of shards (`*.index.json`), or of a
    /// folder: DeepSpeed ZeRO (stage 1 or 2), diffusers (SDXL), or one index of shards.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file and entry, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
        if path.is_dir() {
            return folder::open(path);
        }
        if sharded::is_index(path) {
            return sharded::open(path);
        }
        let (file, contents) = open_file(path)?;
        let mut parts = Assembly::default();
        parts.add(file_name(path), path, file, contents.storages);
        let Contents {
            container,
            sections,
            top,
            ..
        } = contents;
        Ok(parts.checkpoint(container, sections, top))
    }

    /// The kind of file.
    #[must_use]
    pub fn container(&self) -> Container {
        self.container
    }

    /// Every file that was read or that numbers are read from, in a fixed order.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// How this checkpoint spells keys that it shows in another spelling.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.names
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

    /// The tensors of one model: below the key it is usually saved under, or at the top where the
    /// file holds nothing else.
    ///
    /// # Errors
    /// [`CheckpointError::Section`] where there are none.
    pub fn model(&self, usual: &str) -> Result<Vec<(String, TensorRef<'_>)>, CheckpointError> {
        let bare = self.sections.get("").is_some_and(|root| !root.is_empty());
        if bare && !self.top.iter().any(|key| key == usual) {
            return Ok(self.root());
        }
        self.section(usual)
    }

    fn tensors(&self, section: &str) -> Vec<(String, TensorRef<'_>)> {
        let entries = self.sections.get(section).into_iter().flatten();
        entries
            .map(|(name, entry)| (name.clone(), TensorRef::new(self, name, entry)))
            .collect()
    }
}

/// Opens one file and reads its table of contents.
fn open_file(path: &Path) -> Result<(File, Contents), CheckpointError> {
    let (file, head, len) = open_raw(path)?;
    let contents = match container::sniff(&head, len)? {
        Container::Safetensors => safetensors::read(&file, len)?,
        _ => torch::contents(&torch::unpickle(&file, &head, len)?)?,
    };
    Ok((file, contents))
}

/// A file, its first bytes and its length.
fn open_raw(path: &Path) -> Result<(File, Vec<u8>, u64), CheckpointError> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut head = Vec::new();
    Read::by_ref(&mut file).take(512).read_to_end(&mut head)?;
    Ok((file, head, len))
}

fn file_name(path: &Path) -> String {
    // A path such as `.` or `..` has no name of its own; the folder behind it has.
    let full = path.file_name().map_or_else(
        || path.canonicalize().unwrap_or_else(|_| path.to_owned()),
        |_| path.to_owned(),
    );
    full.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The files of a checkpoint while they are put together.
#[derive(Default)]
struct Assembly {
    parts: Vec<Part>,
    storages: Vec<Storage>,
    names: Names,
}

impl Assembly {
    /// Notes a file that was read whole, such as an index.
    fn note(&mut self, name: String, path: &Path) {
        self.parts.push(Part {
            name,
            path: path.to_owned(),
            file: None,
        });
    }

    /// Adds a file with its storages; returns how far their numbers moved.
    fn add(&mut self, name: String, path: &Path, file: File, storages: Vec<Storage>) -> usize {
        let (part, base) = (self.parts.len(), self.storages.len());
        self.parts.push(Part {
            name,
            path: path.to_owned(),
            file: Some(file),
        });
        self.storages.extend(
            storages
                .into_iter()
                .map(|storage| Storage { part, ..storage }),
        );
        base
    }

    /// Adds all of another checkpoint's files; returns how far its storages moved.
    fn join(&mut self, other: Checkpoint, folder: &str) -> (usize, Sections) {
        let (part_base, base) = (self.parts.len(), self.storages.len());
        self.parts.extend(other.parts.into_iter().map(|part| Part {
            name: format!("{folder}/{}", part.name),
            ..part
        }));
        self.storages
            .extend(other.storages.into_iter().map(|storage| Storage {
                part: storage.part + part_base,
                ..storage
            }));
        (base, other.sections)
    }

    fn checkpoint(self, container: Container, sections: Sections, top: Vec<String>) -> Checkpoint {
        Checkpoint {
            container,
            parts: self.parts,
            storages: self.storages,
            sections,
            top,
            names: self.names,
            checked: Mutex::default(),
        }
    }
}
