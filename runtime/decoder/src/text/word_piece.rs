//! BERT's word pieces (Devlin et al. 2018), which the captioner speaks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece as Model;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    Model as _, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer,
};

use super::{TextError, bounded, field_error, parse};
use crate::caption::SpecialTokens;

/// Begins a piece that continues a word.
const CONTINUES: &str = "##";
/// Most tokens; BERT's own vocabularies have up to 119,547.
const MAX_TOKENS: usize = 1 << 20;
/// Longest word that is split, characters; the work grows with its square.
const MAX_WORD: usize = 256;

/// What a bundle's file of the captioner's vocabulary holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WordPieceVocabulary {
    kind: Kind,
    /// Tokens in the order of their ids.
    pub tokens: Vec<String>,
    /// Stands for a word that no pieces make.
    pub unknown: String,
    /// Begins a text.
    pub start: String,
    /// Ends a text.
    pub end: String,
    /// Fills what follows.
    pub pad: String,
    /// Other tokens that are no text.
    pub other_special: Vec<String>,
    /// Letters are lower-cased.
    pub lowercase: bool,
    /// Accents are dropped.
    pub strip_accents: bool,
    /// Every Chinese character is a word.
    pub split_chinese: bool,
    /// Longer words are unknown, characters.
    pub longest_word: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    WordPiece,
}

impl WordPieceVocabulary {
    /// A vocabulary with BERT's usual special tokens and settings, not checked yet.
    ///
    /// - `tokens`: in the order of their ids.
    #[must_use]
    pub fn bert(tokens: Vec<String>) -> WordPieceVocabulary {
        WordPieceVocabulary {
            kind: Kind::WordPiece,
            other_special: tokens
                .iter()
                .filter(|token| *token == "[MASK]")
                .cloned()
                .collect(),
            tokens,
            unknown: "[UNK]".into(),
            start: "[CLS]".into(),
            end: "[SEP]".into(),
            pad: "[PAD]".into(),
            lowercase: true,
            strip_accents: true,
            split_chinese: true,
            longest_word: 100,
        }
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// [`TextError`] where the vocabulary breaks a rule.
    pub fn to_bytes(&self) -> Result<Vec<u8>, TextError> {
        WordPiece::new(self.clone())?;
        let mut bytes = serde_json::to_vec_pretty(self).map_err(TextError::Json)?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

/// The captioner's ids to text, and text to ids.
#[derive(Debug)]
pub struct WordPiece {
    model: Model,
    normaliser: BertNormalizer,
    /// `None` where the token is no text.
    texts: Vec<Option<String>>,
    special: SpecialTokens,
}

impl WordPiece {
    /// Reads the file of a bundle.
    ///
    /// # Errors
    /// [`TextError`] names the field, what was expected and what was found.
    pub fn from_bytes(bytes: &[u8]) -> Result<WordPiece, TextError> {
        WordPiece::new(parse(bytes)?)
    }

    fn new(file: WordPieceVocabulary) -> Result<WordPiece, TextError> {
        if file.tokens.len() > MAX_TOKENS {
            let found = file.tokens.len().to_string();
            return Err(field_error(
                "tokens",
                format!("at most {MAX_TOKENS}"),
                found,
            ));
        }
        if !(1..=MAX_WORD).contains(&file.longest_word) {
            let found = file.longest_word.to_string();
            return Err(field_error(
                "longest_word",
                format!("1..={MAX_WORD}"),
                found,
            ));
        }
        let mut ids: BTreeMap<&str, u32> = BTreeMap::new();
        for (token, id) in file.tokens.iter().zip(0_u32..) {
            let field = || format!("tokens[{id}]");
            if token.is_empty() {
                return Err(field_error(field(), "a token", "an empty one"));
            }
            if let Some(first) = ids.insert(token, id) {
                let found = format!("{token:?} with ids {first} and {id}");
                return Err(field_error(field(), "each token once", found));
            }
        }
        let id = |field: &str, token: &String| {
            let missing = || field_error(field, "one of the tokens", format!("{token:?}"));
            ids.get(token.as_str()).copied().ok_or_else(missing)
        };
        let special = SpecialTokens {
            start: id("start", &file.start)?.into(),
            end: id("end", &file.end)?.into(),
            pad: id("pad", &file.pad)?.into(),
        };
        let mut no_text = vec![id("unknown", &file.unknown)?];
        for token in [&file.start, &file.end, &file.pad]
            .into_iter()
            .chain(&file.other_special)
        {
            no_text.push(id("other_special", token)?);
        }
        let ids: Vocab = file.tokens.iter().cloned().zip(0_u32..).collect();
        let model = Model::builder()
            .vocab(ids)
            .unk_token(file.unknown)
            .continuing_subword_prefix(CONTINUES.into())
            .max_input_chars_per_word(file.longest_word)
            .build()
            .map_err(|error| field_error("tokens", "a word piece model", error.to_string()))?;
        let texts = file.tokens.into_iter().zip(0_u32..);
        Ok(WordPiece {
            model,
            normaliser: BertNormalizer::new(
                true,
                file.split_chinese,
                Some(file.strip_accents),
                file.lowercase,
            ),
            texts: texts
                .map(|(token, id)| (!no_text.contains(&id)).then_some(token))
                .collect(),
            special,
        })
    }

    /// Number of ids.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.texts.len()
    }

    /// Ids that begin, end and pad a caption.
    #[must_use]
    pub fn special(&self) -> SpecialTokens {
        self.special
    }

    /// Ids of a text between start and end token. No text makes a special token.
    ///
    /// What lies beyond [`super::MAX_TEXT_BYTES`] is cut off.
    #[must_use]
    pub fn encode(&self, text: &str) -> Vec<i64> {
        let mut text = NormalizedString::from(bounded(text));
        let normalised = self.normaliser.normalize(&mut text);
        normalised.expect("normalising has no way to fail");
        let mut words = PreTokenizedString::from(text);
        let split = BertPreTokenizer.pre_tokenize(&mut words);
        split.expect("splitting has no way to fail");
        let mut ids = vec![self.special.start];
        for (word, ..) in words.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            let pieces = self.model.tokenize(word);
            let pieces = pieces.expect("the vocabulary has a token for unknown words");
            ids.extend(pieces.iter().map(|piece| i64::from(piece.id)));
        }
        ids.push(self.special.end);
        ids
    }

    /// The text of ids: special tokens and ids outside the vocabulary are skipped, pieces joined,
    /// and spaces before punctuation removed as BERT's tokenizers do it.
    #[must_use]
    pub fn decode(&self, ids: &[i64]) -> String {
        let mut text = String::new();
        for &id in ids {
            let token = usize::try_from(id).ok().and_then(|id| self.texts.get(id));
            let Some(Some(token)) = token else { continue };
            match token.strip_prefix(CONTINUES) {
                Some(piece) if !text.is_empty() => text.push_str(piece),
                _ => {
                    if !text.is_empty() {
                        text.push(' ');
                    }
                    text.push_str(token);
                }
            }
        }
        for (spaced, joined) in [
            (" .", "."),
            (" ?", "?"),
            (" !", "!"),
            (" ,", ","),
            (" ' ", "'"),
            (" n't", "n't"),
            (" 'm", "'m"),
            (" 's", "'s"),
            (" 've", "'ve"),
            (" 're", "'re"),
        ] {
            text = text.replace(spaced, joined);
        }
        text
    }
}
