//! Why a checkpoint cannot be read.

use super::PickleError;

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
    /// Not a folder this program knows.
    #[error(
        "expected a DeepSpeed ZeRO folder, a diffusers folder or a folder with one index of shards, found {found}"
    )]
    Folder {
        /// What the folder holds.
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
    /// The directory of a zip archive does not fit the file.
    #[error("the archive's directory is wrong:\n{}", listed(.problems))]
    Directory {
        /// Every problem found.
        problems: Vec<String>,
    },
    /// The header of a safetensors file is wrong.
    #[error("the safetensors header is wrong:\n{}", listed(.problems))]
    Header {
        /// Every problem found.
        problems: Vec<String>,
    },
    /// Tensors whose numbers are not all there.
    #[error("{} cannot be read:\n{}", counted(.problems.len(), "tensor"), listed(.problems))]
    Tensors {
        /// One line each: key, expected, found.
        problems: Vec<String>,
    },
    /// A checkpoint of several files that do not fit each other.
    #[error("{} in its files:\n{}", counted(.problems.len(), "problem"), listed(.problems))]
    Parts {
        /// One line each: file, key, expected, found.
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

fn listed(problems: &[String]) -> String {
    let lines: Vec<String> = problems.iter().map(|p| format!("  {p}")).collect();
    lines.join("\n")
}

fn counted(count: usize, what: &str) -> String {
    if count == 1 {
        format!("1 {what}")
    } else {
        format!("{count} {what}s")
    }
}
