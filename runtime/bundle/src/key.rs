//! minisign-compatible keys: what `minisign -S` and `minisign -V` also read.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A key that verifies bundles; safe to publish.
#[derive(Clone, Debug)]
pub struct PublicKey(pub(crate) minisign::PublicKey);

/// A key that signs bundles; never leaves the workstation.
pub struct SecretKey(pub(crate) minisign::SecretKey);

/// What is wrong with a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the key {path}")]
    Read {
        /// File asked for.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file cannot be written; an existing key is never overwritten.
    #[error("cannot write the key {path}; an existing key is never overwritten")]
    Write {
        /// File asked for.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Not a minisign key, or a wrong password.
    #[error("{what} is not a usable minisign {kind} key")]
    Format {
        /// File or text.
        what: String,
        /// `public` or `secret`.
        kind: &'static str,
        /// The library's reason.
        source: minisign::PError,
    },
    /// The system gave no randomness.
    #[error("cannot generate keys")]
    Generate(#[source] minisign::PError),
}

/// Longest key file that is read; real ones have some 200 bytes.
const MAX_KEY_BYTES: u64 = 4096;

fn read_text(path: &Path) -> Result<String, KeyError> {
    let error = |source| KeyError::Read {
        path: path.to_owned(),
        source,
    };
    let len = fs::metadata(path).map_err(error)?.len();
    if len > MAX_KEY_BYTES {
        return Err(error(std::io::Error::other(format!(
            "{len} bytes, a key has at most {MAX_KEY_BYTES}"
        ))));
    }
    fs::read_to_string(path).map_err(error)
}

impl PublicKey {
    /// Reads a `.pub` file.
    ///
    /// # Errors
    /// [`KeyError::Read`] or [`KeyError::Format`].
    pub fn from_file(path: &Path) -> Result<PublicKey, KeyError> {
        Self::parse(&read_text(path)?, &path.display().to_string())
    }

    /// Reads the text of a `.pub` file.
    ///
    /// # Errors
    /// [`KeyError::Format`].
    pub fn from_text(text: &str) -> Result<PublicKey, KeyError> {
        Self::parse(text, "the given text")
    }

    fn parse(text: &str, what: &str) -> Result<PublicKey, KeyError> {
        let error = |source| KeyError::Format {
            what: what.to_owned(),
            kind: "public",
            source,
        };
        let boxed = minisign::PublicKeyBox::from_string(text).map_err(error)?;
        boxed.into_public_key().map(PublicKey).map_err(error)
    }

    /// The key's number as minisign prints it, 16 hex digits.
    #[must_use]
    pub fn id(&self) -> String {
        hex::encode_upper(self.0.keynum().iter().rev().copied().collect::<Vec<u8>>())
    }
}

impl SecretKey {
    /// Reads an unencrypted secret key, or an encrypted one with its password.
    ///
    /// # Errors
    /// [`KeyError::Read`] or [`KeyError::Format`].
    pub fn from_file(path: &Path, password: Option<String>) -> Result<SecretKey, KeyError> {
        let error = |source| KeyError::Format {
            what: path.display().to_string(),
            kind: "secret",
            source,
        };
        let boxed = minisign::SecretKeyBox::from_string(&read_text(path)?).map_err(error)?;
        let key = match password {
            Some(password) => boxed.into_secret_key(Some(password)),
            None => boxed.into_unencrypted_secret_key(),
        };
        key.map(SecretKey).map_err(error)
    }
}

/// Generates a pair and writes both files; the secret one is readable by its owner alone.
///
/// # Errors
/// [`KeyError::Write`] where a file exists or cannot be made.
pub fn generate_keys(
    secret: &Path,
    public: &Path,
    password: Option<String>,
) -> Result<PublicKey, KeyError> {
    let pair = match &password {
        Some(password) => minisign::KeyPair::generate_encrypted_keypair(Some(password.clone())),
        None => minisign::KeyPair::generate_unencrypted_keypair(),
    }
    .map_err(KeyError::Generate)?;
    let secret_text = pair
        .sk
        .to_box(Some("afterimage secret key"))
        .map_err(KeyError::Generate)?
        .into_string();
    let public_text = pair.pk.to_box().map_err(KeyError::Generate)?.into_string();
    write_new(public, public_text.as_bytes(), 0o644)?;
    if let Err(error) = write_new(secret, secret_text.as_bytes(), 0o600) {
        // Half a pair is of no use; the public half was made by this call.
        let _ = fs::remove_file(public);
        return Err(error);
    }
    Ok(PublicKey(pair.pk))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), KeyError> {
    let error = |source| KeyError::Write {
        path: path.to_owned(),
        source,
    };
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(error)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(error)
}
