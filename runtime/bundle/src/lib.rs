//! The model bundle: one folder that holds every network, table and mask the box needs.
//!
//! ```text
//! manifest.json          what is in the folder, each file with size and SHA-256
//! manifest.json.minisig  minisign signature of manifest.json
//! graphs/<stage>.onnx    small; all tensors external
//! weights/<stage>.bin    external data, 4 KiB aligned
//! tokenizers/<name>.json vocabularies of the text encoders and the captioner
//! subjects/<id>/         ridge graph and weights, mask
//! engines/               cache, outside the signature
//! ```
//!
//! A bundle is written once by [`BundleWriter`] and never edited. Reading goes one way:
//! [`open`] gives an [`UnverifiedBundle`], which shows its manifest and nothing else;
//! [`UnverifiedBundle::verify`] checks signature, sizes and hashes and gives the [`Bundle`] that
//! a decoder accepts. There is no other way to obtain one, but for
//! [`UnverifiedBundle::verify_hashes`], which offline tools use on a workstation.

mod key;
mod manifest;
mod read;
mod stream;
mod write;

pub use key::{KeyError, PublicKey, SecretKey, generate_keys};
pub use manifest::{
    Audit, BlurrySettings, DType, Dim, EdgeSettings, EdmSchedule, Entrance, FORMAT_VERSION,
    FewStepSampler, FileEntry, Lora, Manifest, ManifestError, Precision, PriorSettings,
    PriorTables, RefinerEdgeSettings, RefinerSettings, Source, Stage, StageAudit, StageName,
    Subject, TensorSpec, Tokenizers, UnclipSettings,
};
pub use read::{Bundle, BundleError, UnverifiedBundle, open, sign};
pub use write::{BundleWriter, WeightsWriter, WriteError};

/// The file that describes a bundle.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The detached signature of [`MANIFEST_FILE`].
pub const SIGNATURE_FILE: &str = "manifest.json.minisig";
/// The folder of compiled engines, a cache outside the signature.
pub const ENGINES_DIR: &str = "engines";
