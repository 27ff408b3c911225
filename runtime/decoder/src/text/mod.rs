//! Text to token ids and back, and prompts to what the refiner is conditioned on.
//!
//! ```text
//! prompt ─ clean ─ CLIP byte pairs ─► ids ─ both text towers ─► context, vector     (ClipTokenizer, Prompter)
//! ids of the captioner ─ join word pieces ─► caption                                (WordPiece)
//! ```
//!
//! The models are those of the `tokenizers` crate. Their own file format names classes and nests
//! them freely; a bundle carries plain lists instead ([`ClipVocabulary`], [`WordPieceVocabulary`]),
//! every rule of which is checked here before a model is built.

mod clean;
mod clip;
mod prompt;
mod word_piece;

pub use clip::{ClipTokenizer, ClipVocabulary, Padding};
pub use prompt::{Condition, PromptError, Prompter};
pub use word_piece::{WordPiece, WordPieceVocabulary};

/// Longest vocabulary file, bytes.
pub const MAX_FILE_BYTES: usize = 16 << 20;
/// Bytes of a text that are read; what follows is cut off. The towers take 77 tokens.
pub const MAX_TEXT_BYTES: usize = 16 << 10;

/// Why a vocabulary cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// More than a vocabulary can be.
    #[error("a vocabulary of {found} bytes, expected at most {MAX_FILE_BYTES}")]
    TooLong {
        /// Its length.
        found: usize,
    },
    /// Not JSON, a missing or an unknown field, a wrong type.
    #[error("is not a vocabulary file")]
    Json(#[source] serde_json::Error),
    /// A field that breaks a rule.
    #[error("{field}: expected {expected}, found {found}")]
    Field {
        /// The field.
        field: String,
        /// What is allowed.
        expected: String,
        /// What is there.
        found: String,
    },
}

fn field_error(
    field: impl Into<String>,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> TextError {
    TextError::Field {
        field: field.into(),
        expected: expected.into(),
        found: found.into(),
    }
}

/// A vocabulary file of at most [`MAX_FILE_BYTES`].
fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, TextError> {
    if bytes.len() > MAX_FILE_BYTES {
        return Err(TextError::TooLong { found: bytes.len() });
    }
    serde_json::from_slice(bytes).map_err(TextError::Json)
}

/// The part of a text that is read: whole characters within [`MAX_TEXT_BYTES`].
fn bounded(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT_BYTES)]
}
