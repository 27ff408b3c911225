//! CLIP's byte pair encoding (Radford et al. 2021): one vocabulary for both text towers.
//!
//! A vocabulary is its list of merges: ids 0..256 are the bytes, 256..512 the bytes at the end of a
//! word, then one id per merge, then the start and the end token. The towers differ in what follows
//! the end token ([`Padding`]).

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Serialize};
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab};

use super::clean::clean;
use super::{TextError, bounded, field_error, parse};

/// Ends the last part of a word.
const WORD_END: &str = "</w>";
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Most merges; the released vocabulary has 48,894.
const MAX_MERGES: usize = 1 << 18;

/// Contractions, words, single digits, runs of anything else. The original also finds its start and
/// end tokens in a text; here no text can make one.
static WORDS: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
        .expect("the pattern is fixed")
});

/// What a bundle's file of CLIP's vocabulary holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipVocabulary {
    kind: Kind,
    /// Merges, the first the most urgent: two parts with one space between, bytes in CLIP's own
    /// letters, `</w>` at the end of a word.
    pub merges: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    ClipBpe,
}

impl ClipVocabulary {
    /// A vocabulary of these merges, not checked yet.
    #[must_use]
    pub fn new(merges: Vec<String>) -> ClipVocabulary {
        ClipVocabulary {
            kind: Kind::ClipBpe,
            merges,
        }
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// [`TextError`] where the vocabulary breaks a rule.
    pub fn to_bytes(&self) -> Result<Vec<u8>, TextError> {
        ClipTokenizer::new(self)?;
        let mut bytes = serde_json::to_vec_pretty(self).map_err(TextError::Json)?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

/// What fills the places after the end token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// The end token again: CLIP-L.
    EndToken,
    /// Id 0: OpenCLIP.
    Zero,
}

/// Text to the ids of CLIP's text towers.
#[derive(Debug)]
pub struct ClipTokenizer {
    model: BPE,
    letters: [char; 256],
    start: i64,
    end: i64,
}

impl ClipTokenizer {
    /// Reads the file of a bundle.
    ///
    /// # Errors
    /// [`TextError`] names the field, what was expected and what was found.
    pub fn from_bytes(bytes: &[u8]) -> Result<ClipTokenizer, TextError> {
        ClipTokenizer::new(&parse(bytes)?)
    }

    fn new(vocabulary: &ClipVocabulary) -> Result<ClipTokenizer, TextError> {
        let merges = &vocabulary.merges;
        if merges.len() > MAX_MERGES {
            let found = merges.len().to_string();
            return Err(field_error(
                "merges",
                format!("at most {MAX_MERGES}"),
                found,
            ));
        }
        let (letters, order) = letters();
        let mut tokens: Vec<String> = order.iter().map(char::to_string).collect();
        tokens.extend(order.iter().map(|letter| format!("{letter}{WORD_END}")));
        let mut known: BTreeSet<String> = tokens.iter().cloned().collect();
        let mut pairs = Vec::with_capacity(merges.len());
        for (at, merge) in merges.iter().enumerate() {
            let wrong = |expected: &str| {
                let shown: String = merge.chars().take(64).collect();
                field_error(format!("merges[{at}]"), expected, format!("{shown:?}"))
            };
            let (first, second) = merge
                .split_once(' ')
                .ok_or_else(|| wrong("two parts with one space between"))?;
            if first.ends_with(WORD_END) || !known.contains(first) || !known.contains(second) {
                return Err(wrong(
                    "parts that are bytes or earlier merges, the first not at a word's end",
                ));
            }
            let joined = format!("{first}{second}");
            if !known.insert(joined.clone()) {
                return Err(wrong("a part that no earlier merge makes"));
            }
            tokens.push(joined);
            pairs.push((first.to_owned(), second.to_owned()));
        }
        let start = tokens.len();
        for special in [START, END] {
            if !known.insert(special.to_owned()) {
                return Err(field_error("merges", "no start or end token", special));
            }
            tokens.push(special.to_owned());
        }
        let ids: Vocab = tokens.into_iter().zip(0_u32..).collect();
        // No cache: it would keep words of earlier prompts, and a prompt is short.
        let model = BPE::builder()
            .vocab_and_merges(ids, pairs)
            .end_of_word_suffix(WORD_END.into())
            .cache_capacity(0)
            .build()
            .map_err(|error| field_error("merges", "a byte pair model", error.to_string()))?;
        let start = i64::try_from(start).unwrap_or(i64::MAX - 1);
        Ok(ClipTokenizer {
            model,
            letters,
            start,
            end: start + 1,
        })
    }

    /// Number of ids, the start and the end token included.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.model.get_vocab_size()
    }

    /// Id of the token that ends a prompt.
    #[must_use]
    pub fn end(&self) -> i64 {
        self.end
    }

    /// Ids of a text, without start and end token, of any number.
    ///
    /// The text is cleaned as CLIP does it: HTML unescaped, spaces collapsed, lower case. What lies
    /// beyond [`super::MAX_TEXT_BYTES`] is cut off.
    #[must_use]
    pub fn encode(&self, text: &str) -> Vec<i64> {
        let text = clean(bounded(text));
        let mut ids = Vec::new();
        for word in WORDS.find_iter(&text) {
            let word: String = word
                .as_str()
                .bytes()
                .map(|byte| self.letters[usize::from(byte)])
                .collect();
            let tokens = self.model.tokenize(&word);
            let tokens = tokens.expect("every byte is in the vocabulary");
            ids.extend(tokens.iter().map(|token| i64::from(token.id)));
        }
        ids
    }

    /// Ids as a tower takes them: start token, text, end token, padding.
    ///
    /// A longer text is cut, and the end token keeps the last place.
    #[must_use]
    pub fn padded(&self, text: &str, length: usize, padding: Padding) -> Vec<i64> {
        let mut ids = vec![self.start];
        ids.extend(self.encode(text));
        ids.push(self.end);
        if ids.len() > length {
            ids.truncate(length);
            if let Some(last) = ids.last_mut() {
                *last = self.end;
            }
        }
        let fill = match padding {
            Padding::EndToken => self.end,
            Padding::Zero => 0,
        };
        ids.resize(length, fill);
        ids
    }
}

/// CLIP's letter of every byte, by byte and in the order of ids: the printable ones of Latin-1
/// stand for themselves and come first, the others follow from U+0100 on.
fn letters() -> ([char; 256], Vec<char>) {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut by_byte = ['\0'; 256];
    let mut order = Vec::with_capacity(256);
    for byte in (0..=u8::MAX).filter(printable) {
        by_byte[usize::from(byte)] = char::from(byte);
        order.push(char::from(byte));
    }
    let others = (0..=u8::MAX).filter(|byte| !printable(byte));
    for (byte, letter) in others.zip('\u{100}'..) {
        by_byte[usize::from(byte)] = letter;
        order.push(letter);
    }
    (by_byte, order)
}
