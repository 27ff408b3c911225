//! Writing a bundle: into a folder beside the target, renamed when whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::stream::{Closing, Stream};
use crate::{FileEntry, MANIFEST_FILE, Manifest, ManifestError};

/// External data starts at multiples of this, so that it can be mapped.
const ALIGNMENT: u64 = 4096;

/// Why a bundle could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The target is there already; bundles are never edited.
    #[error("{path} exists already: a bundle is written once, choose another folder or remove it")]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot write {path}")]
    Io {
        /// What was being written.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The manifest breaks its own rules.
    #[error("the manifest of {path} is not valid")]
    Manifest {
        /// The target.
        path: PathBuf,
        /// What is wrong.
        source: ManifestError,
    },
}

/// A bundle being written. Dropped unfinished, it leaves nothing behind.
#[derive(Debug)]
pub struct BundleWriter {
    target: PathBuf,
    partial: PathBuf,
    files: BTreeMap<String, FileEntry>,
    /// The last long file, perhaps not on the disk yet.
    closing: Option<Pending>,
    finished: bool,
}

#[derive(Debug)]
struct Pending {
    relative: String,
    path: PathBuf,
    len_bytes: u64,
    closing: Closing,
}

impl BundleWriter {
    /// Starts a bundle that will appear at `target`.
    ///
    /// # Errors
    /// [`WriteError::Exists`] or [`WriteError::Io`].
    pub fn create(target: &Path) -> Result<BundleWriter, WriteError> {
        if fs::symlink_metadata(target).is_ok() {
            return Err(WriteError::Exists {
                path: target.to_owned(),
            });
        }
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let partial = target.with_file_name(format!(".{name}.partial-{}", std::process::id()));
        let error = |source| WriteError::Io {
            path: partial.clone(),
            source,
        };
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(error)?;
        }
        fs::create_dir_all(&partial).map_err(error)?;
        Ok(BundleWriter {
            target: target.to_owned(),
            partial,
            files: BTreeMap::new(),
            closing: None,
            finished: false,
        })
    }

    /// The folder that is being filled; renamed by [`Self::finish`].
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.partial
    }

    /// Writes a small file whole.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn add(&mut self, relative: &str, bytes: &[u8]) -> Result<(), WriteError> {
        let (path, mut file) = self.create_new(relative)?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(|source| WriteError::Io { path, source })?;
        self.enter(relative, bytes.len() as u64, Sha256::new_with_prefix(bytes));
        Ok(())
    }

    /// Starts a file that is written in pieces; hand it back to [`Self::close`].
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn weights(&self, relative: &str) -> Result<WeightsWriter, WriteError> {
        let (path, file) = self.create_new(relative)?;
        let stream = Stream::new(file).map_err(|source| WriteError::Io {
            path: path.clone(),
            source,
        })?;
        Ok(WeightsWriter {
            relative: relative.to_owned(),
            path,
            stream,
            len_bytes: 0,
        })
    }

    /// Ends a file; while its last bytes go to the disk, the next one may begin.
    ///
    /// # Errors
    /// [`WriteError::Io`] of an earlier file; this one's may come as late as [`Self::finish`].
    pub fn close(&mut self, file: WeightsWriter) -> Result<(), WriteError> {
        self.settle()?;
        self.closing = Some(Pending {
            relative: file.relative,
            path: file.path,
            len_bytes: file.len_bytes,
            closing: file.stream.close(),
        });
        Ok(())
    }

    /// Waits until every file that was closed is on the disk, so that others can read it.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn settle(&mut self) -> Result<(), WriteError> {
        if let Some(pending) = self.closing.take() {
            let hasher = pending.closing.wait().map_err(|source| WriteError::Io {
                path: pending.path,
                source,
            })?;
            self.enter(&pending.relative, pending.len_bytes, hasher);
        }
        Ok(())
    }

    fn create_new(&self, relative: &str) -> Result<(PathBuf, File), WriteError> {
        let path = self.partial.join(relative);
        let error = |source| WriteError::Io {
            path: path.clone(),
            source,
        };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(error)?;
        }
        let file = File::create_new(&path).map_err(error)?;
        Ok((path, file))
    }

    fn enter(&mut self, relative: &str, len_bytes: u64, hasher: Sha256) {
        let sha256 = hex::encode(hasher.finalize());
        self.files
            .insert(relative.to_owned(), FileEntry { sha256, len_bytes });
    }

    /// Removes a file that was started or closed, so that it can be written anew or not at all.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn remove(&mut self, relative: &str) -> Result<(), WriteError> {
        self.settle()?;
        let path = self.partial.join(relative);
        self.files.remove(relative);
        fs::remove_file(&path).map_err(|source| WriteError::Io { path, source })
    }

    /// Writes the manifest with the list of files and moves the bundle to its place.
    ///
    /// # Errors
    /// [`WriteError::Manifest`], [`WriteError::Io`], [`WriteError::Exists`].
    pub fn finish(mut self, mut manifest: Manifest) -> Result<(), WriteError> {
        self.settle()?;
        manifest.files = std::mem::take(&mut self.files);
        let bytes = manifest.to_json().map_err(|source| WriteError::Manifest {
            path: self.target.clone(),
            source,
        })?;
        let path = self.partial.join(MANIFEST_FILE);
        let error = |source| WriteError::Io {
            path: path.clone(),
            source,
        };
        let mut file = File::create_new(&path).map_err(error)?;
        file.write_all(&bytes)
            .and_then(|()| file.sync_all())
            .map_err(error)?;
        if fs::symlink_metadata(&self.target).is_ok() {
            return Err(WriteError::Exists {
                path: self.target.clone(),
            });
        }
        fs::rename(&self.partial, &self.target).map_err(|source| WriteError::Io {
            path: self.target.clone(),
            source,
        })?;
        self.finished = true;
        let parent = self
            .target
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(parent)
            .and_then(|folder| folder.sync_all())
            .map_err(|source| WriteError::Io {
                path: parent.to_owned(),
                source,
            })
    }
}

impl Drop for BundleWriter {
    fn drop(&mut self) {
        if !self.finished {
            if let Some(pending) = self.closing.take() {
                // Not a file more may appear in the folder; the error that ended this is told already.
                let _ = pending.closing.wait();
            }
            // Nothing more can be done about a folder that cannot be removed while failing already.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// A file of a bundle, hashed as it is written.
#[derive(Debug)]
pub struct WeightsWriter {
    relative: String,
    path: PathBuf,
    stream: Stream,
    len_bytes: u64,
}

impl WeightsWriter {
    /// Appends bytes; an error of writing them is told when the file or the bundle ends.
    pub fn write(&mut self, bytes: &[u8]) {
        self.stream.write(bytes);
        self.len_bytes += bytes.len() as u64;
    }

    /// Pads with zeros to the next 4 KiB and returns the offset reached, in bytes.
    pub fn align(&mut self) -> u64 {
        const ZEROS: [u8; 4096] = [0; 4096];
        let past = self.len_bytes % ALIGNMENT;
        if past != 0 {
            let padding = usize::try_from(ALIGNMENT - past).unwrap_or(ZEROS.len());
            self.write(&ZEROS[..padding]);
        }
        self.len_bytes
    }

    /// Bytes written so far.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}
