//! Opening, verifying and signing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{
    ENGINES_DIR, MANIFEST_FILE, Manifest, ManifestError, PublicKey, SIGNATURE_FILE, SecretKey,
    StageName,
};

/// Longest manifest and signature that are read.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;
const MAX_SIGNATURE_BYTES: u64 = 4096;

/// Why a bundle is refused. Every message names the bundle's folder or the file in it.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file that must be there cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file longer than its kind may be.
    #[error("{path} has {found} bytes, expected at most {limit}")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The longest allowed.
        limit: u64,
    },
    /// The manifest is wrong.
    #[error("{path}")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// No signature beside the manifest.
    #[error("{path} is missing: the bundle is not signed; sign it with `afterimage-export sign`")]
    Unsigned {
        /// The signature that was looked for.
        path: PathBuf,
    },
    /// The signature does not fit the manifest and the key.
    #[error("{path} does not fit the manifest and the key {key}")]
    Signature {
        /// The signature.
        path: PathBuf,
        /// Id of the key it was checked with.
        key: String,
        /// The library's reason.
        source: minisign::PError,
    },
    /// A file has another length than the manifest says.
    #[error("{path} has {found} bytes, the manifest says {expected}")]
    Length {
        /// The file.
        path: PathBuf,
        /// Length in the manifest.
        expected: u64,
        /// Length found.
        found: u64,
    },
    /// A file has another content than the manifest says.
    #[error("{path} has SHA-256 {found}, the manifest says {expected}")]
    Hash {
        /// The file.
        path: PathBuf,
        /// Hash in the manifest.
        expected: String,
        /// Hash found.
        found: String,
    },
    /// A file that the manifest does not list, or something that is not a plain file.
    #[error("{path} is not a file listed in the manifest")]
    Unlisted {
        /// What was found.
        path: PathBuf,
    },
    /// The signature cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Signing failed.
    #[error("cannot sign {path}")]
    Sign {
        /// The manifest.
        path: PathBuf,
        /// The library's reason.
        source: minisign::PError,
    },
}

/// A bundle whose manifest was read and nothing else; it cannot be loaded.
#[derive(Debug)]
pub struct UnverifiedBundle {
    dir: PathBuf,
    manifest: Manifest,
    manifest_bytes: Vec<u8>,
}

/// A bundle whose every listed byte was compared with its manifest.
#[derive(Clone, Debug)]
pub struct Bundle {
    dir: PathBuf,
    manifest: Manifest,
    digest: String,
}

/// Reads a bundle's manifest.
///
/// # Errors
/// [`BundleError::Read`], [`BundleError::TooLong`], [`BundleError::Manifest`].
pub fn open(dir: &Path) -> Result<UnverifiedBundle, BundleError> {
    let path = dir.join(MANIFEST_FILE);
    let manifest_bytes = read_bounded(&path, MAX_MANIFEST_BYTES)?;
    let manifest = Manifest::from_json(&manifest_bytes)
        .map_err(|source| BundleError::Manifest { path, source })?;
    Ok(UnverifiedBundle {
        dir: dir.to_owned(),
        manifest,
        manifest_bytes,
    })
}

/// Signs a bundle's manifest, replacing an earlier signature.
///
/// The files are compared with the manifest first: a signature never covers a damaged bundle.
///
/// # Errors
/// Any [`BundleError`] of verifying, and [`BundleError::Sign`], [`BundleError::Write`].
pub fn sign(dir: &Path, key: &SecretKey) -> Result<(), BundleError> {
    let unverified = open(dir)?;
    unverified.check_files()?;
    let manifest_path = dir.join(MANIFEST_FILE);
    let comment = format!(
        "afterimage bundle version {}",
        unverified.manifest.bundle_version
    );
    let boxed = minisign::sign(
        None,
        &key.0,
        Cursor::new(&unverified.manifest_bytes),
        Some(&comment),
        Some("afterimage bundle"),
    )
    .map_err(|source| BundleError::Sign {
        path: manifest_path,
        source,
    })?;
    let path = dir.join(SIGNATURE_FILE);
    let error = |source| BundleError::Write {
        path: path.clone(),
        source,
    };
    let partial = dir.join(format!("{SIGNATURE_FILE}.partial"));
    let mut file = File::create(&partial).map_err(error)?;
    file.write_all(boxed.into_string().as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(error)?;
    fs::rename(&partial, &path).map_err(error)?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(error)
}

impl UnverifiedBundle {
    /// What the bundle says about itself, not yet believed.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Checks the signature, then every file's length and hash.
    ///
    /// # Errors
    /// The first [`BundleError`] found.
    pub fn verify(self, key: &PublicKey) -> Result<Bundle, BundleError> {
        self.check_signature(key)?;
        self.verify_hashes()
    }

    /// Reads one small file of the bundle after checking the signature and that file alone.
    ///
    /// For a process that needs a mask and not the gigabytes of weights beside it.
    ///
    /// # Errors
    /// [`BundleError`] where the signature, the file's length or its hash is wrong, or where the file
    /// is not listed or longer than 64 MiB.
    pub fn read_verified(&self, key: &PublicKey, relative: &str) -> Result<Vec<u8>, BundleError> {
        self.check_signature(key)?;
        let path = self.dir.join(relative);
        let Some(entry) = self.manifest.files.get(relative) else {
            return Err(BundleError::Unlisted { path });
        };
        let bytes = read_bounded(&path, MAX_MANIFEST_BYTES * 4)?;
        let found = hex::encode(Sha256::digest(&bytes));
        if found != entry.sha256 {
            return Err(BundleError::Hash {
                path,
                expected: entry.sha256.clone(),
                found,
            });
        }
        Ok(bytes)
    }

    fn check_signature(&self, key: &PublicKey) -> Result<(), BundleError> {
        let path = self.dir.join(SIGNATURE_FILE);
        if !path.exists() {
            return Err(BundleError::Unsigned { path });
        }
        let text = read_bounded(&path, MAX_SIGNATURE_BYTES)?;
        let error = |source| BundleError::Signature {
            path: path.clone(),
            key: key.id(),
            source,
        };
        let boxed =
            minisign::SignatureBox::from_string(&String::from_utf8_lossy(&text)).map_err(error)?;
        minisign::verify(
            &key.0,
            &boxed,
            Cursor::new(&self.manifest_bytes),
            true,
            false,
            false,
        )
        .map_err(error)
    }

    /// Checks every file's length and hash, but not who made them.
    ///
    /// For tools on the workstation that made the bundle; the box uses [`Self::verify`].
    ///
    /// # Errors
    /// The first [`BundleError`] found.
    pub fn verify_hashes(self) -> Result<Bundle, BundleError> {
        self.check_files()?;
        let digest = hex::encode(Sha256::digest(&self.manifest_bytes));
        Ok(Bundle {
            dir: self.dir,
            manifest: self.manifest,
            digest,
        })
    }

    fn check_files(&self) -> Result<(), BundleError> {
        for (relative, entry) in &self.manifest.files {
            let path = self.dir.join(relative);
            let found = fs::symlink_metadata(&path).map_err(|source| BundleError::Read {
                path: path.clone(),
                source,
            })?;
            if !found.is_file() {
                return Err(BundleError::Unlisted { path });
            }
            if found.len() != entry.len_bytes {
                return Err(BundleError::Length {
                    path,
                    expected: entry.len_bytes,
                    found: found.len(),
                });
            }
            let hash = hash_file(&path).map_err(|source| BundleError::Read {
                path: path.clone(),
                source,
            })?;
            if hash != entry.sha256 {
                return Err(BundleError::Hash {
                    path,
                    expected: entry.sha256.clone(),
                    found: hash,
                });
            }
        }
        self.refuse_unlisted()
    }

    /// A file that nobody vouches for has no place beside those that are signed.
    fn refuse_unlisted(&self) -> Result<(), BundleError> {
        let listed: BTreeSet<PathBuf> = self
            .manifest
            .files
            .keys()
            .map(|path| self.dir.join(path))
            .collect();
        let own = [MANIFEST_FILE, SIGNATURE_FILE].map(|name| self.dir.join(name));
        let mut folders = vec![self.dir.clone()];
        while let Some(folder) = folders.pop() {
            let error = |source| BundleError::Read {
                path: folder.clone(),
                source,
            };
            for entry in fs::read_dir(&folder).map_err(error)? {
                let entry = entry.map_err(error)?;
                let (path, kind) = (entry.path(), entry.file_type().map_err(error)?);
                if path == self.dir.join(ENGINES_DIR) && kind.is_dir() {
                    continue;
                }
                if kind.is_dir() {
                    folders.push(path);
                } else if !listed.contains(&path) && !own.contains(&path) {
                    return Err(BundleError::Unlisted { path });
                }
            }
        }
        Ok(())
    }
}

impl Bundle {
    /// The same bundle as if it had not these stages: a box without them opens none of their files.
    #[must_use]
    pub fn without(mut self, stages: &[StageName]) -> Bundle {
        self.manifest
            .stages
            .retain(|name, _| !stages.contains(name));
        self
    }

    /// The bundle's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the bundle holds.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the manifest, lower-case hex: names this bundle in records.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Where a listed file lies; `None` for a path the manifest does not list.
    #[must_use]
    pub fn file(&self, path: &str) -> Option<PathBuf> {
        self.manifest
            .files
            .contains_key(path)
            .then(|| self.dir.join(path))
    }
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, BundleError> {
    let error = |source| BundleError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(error)?;
    let found = bytes.len() as u64;
    if found > limit {
        return Err(BundleError::TooLong {
            path: path.to_owned(),
            found,
            limit,
        });
    }
    Ok(bytes)
}

fn hash_file(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut block = vec![0_u8; 1 << 20];
    loop {
        let read = file.read(&mut block)?;
        if read == 0 {
            return Ok(hex::encode(hasher.finalize()));
        }
        hasher.update(&block[..read]);
    }
}
