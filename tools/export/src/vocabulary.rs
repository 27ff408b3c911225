//! The vocabularies that a bundle carries.
//!
//! CLIP's is not in any checkpoint; the exporter has it (`vocab/`). The captioner's lies beside its
//! weights: `tokenizer.json` or `vocab.txt`, with `tokenizer_config.json` for its settings.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use decoder::text::{ClipVocabulary, MAX_FILE_BYTES, TextError, WordPiece, WordPieceVocabulary};
use flate2::read::GzDecoder;
use serde_json::Value;

use crate::section::{Problem, chain};

/// `bpe_simple_vocab_16e6.txt.gz` of OpenCLIP, which has it from CLIP.
const CLIP_MERGES: &[u8] = include_bytes!("../vocab/bpe_simple_vocab_16e6.txt.gz");
/// Merges that CLIP uses; the file holds more.
const CLIP_MERGE_COUNT: usize = 49_152 - 256 - 2;
/// Ids of CLIP's tokens.
pub const CLIP_IDS: u64 = 49_408;
/// Unpacked length of the file, at most.
const MAX_CLIP_BYTES: u64 = 8 << 20;

const TOKENIZER: &str = "tokenizer.json";
const WORDS: &str = "vocab.txt";
const CONFIG: &str = "tokenizer_config.json";

/// The bundle's file of CLIP's vocabulary.
///
/// # Errors
/// [`TextError`] where the exporter's own copy is damaged.
pub fn clip() -> Result<Vec<u8>, TextError> {
    let mut text = String::new();
    let read = GzDecoder::new(CLIP_MERGES)
        .take(MAX_CLIP_BYTES)
        .read_to_string(&mut text);
    read.map_err(|error| TextError::Field {
        field: "bpe_simple_vocab_16e6.txt.gz".into(),
        expected: "a whole gzip file".into(),
        found: error.to_string(),
    })?;
    // The first line names the version.
    let merges = text.lines().skip(1).take(CLIP_MERGE_COUNT);
    ClipVocabulary::new(merges.map(str::to_owned).collect()).to_bytes()
}

/// The bundle's file of the captioner's vocabulary.
///
/// - `folder`: where the captioner's weights lie.
/// - `rows`: of its word embedding.
///
/// # Errors
/// Everything that is wrong, by file and field.
pub fn caption(folder: &Path, rows: Option<u64>) -> Result<Vec<u8>, Vec<Problem>> {
    let mut reader = Reader {
        folder,
        problems: Vec::new(),
    };
    let vocabulary = reader.vocabulary();
    let Some((file, vocabulary)) = vocabulary else {
        return Err(reader.problems);
    };
    let bytes = match vocabulary.to_bytes() {
        Ok(bytes) => bytes,
        Err(error) => {
            reader.note(file, "tokens", chain(&error));
            Vec::new()
        }
    };
    let count = vocabulary.tokens.len() as u64;
    if let Some(rows) = rows
        && count > rows
    {
        let message = format!("expected at most the word embedding's {rows} rows, found {count}");
        reader.note(file, "tokens", message);
    }
    // What the box will read, by the code that will read it.
    if reader.problems.is_empty()
        && let Err(error) = WordPiece::from_bytes(&bytes)
    {
        reader.note(file, "tokens", chain(&error));
    }
    if reader.problems.is_empty() {
        Ok(bytes)
    } else {
        Err(reader.problems)
    }
}

struct Reader<'f> {
    folder: &'f Path,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn note(&mut self, file: &str, key: &str, message: String) {
        self.problems.push(Problem {
            file: file.into(),
            key: key.into(),
            message,
        });
    }

    /// The text of a file; `None` where there is none, or where it is no text, which is noted.
    fn text(&mut self, name: &str) -> Option<String> {
        let path = self.folder.join(name);
        if !path.exists() {
            return None;
        }
        let limit = MAX_FILE_BYTES as u64;
        let mut bytes = Vec::new();
        let read = File::open(&path)
            .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
            .map_err(|error| format!("expected a readable file, found: {error}"));
        let text = read.and_then(|_| {
            if bytes.len() as u64 > limit {
                return Err(format!("expected at most {limit} bytes, found more"));
            }
            String::from_utf8(bytes).map_err(|error| {
                let at = error.utf8_error().valid_up_to();
                format!("expected UTF-8 text, found other bytes at offset {at}")
            })
        });
        text.map_err(|message| self.note(name, "text", message))
            .ok()
    }

    fn json(&mut self, name: &str) -> Option<Value> {
        let text = self.text(name)?;
        match serde_json::from_str::<Value>(&text) {
            Ok(json) if json.is_object() => Some(json),
            Ok(other) => {
                self.note(
                    name,
                    "json",
                    format!("expected an object, found {}", kind(&other)),
                );
                None
            }
            Err(error) => {
                self.note(name, "json", format!("expected JSON, found: {error}"));
                None
            }
        }
    }

    fn vocabulary(&mut self) -> Option<(&'static str, WordPieceVocabulary)> {
        let words = self.text(WORDS).map(|text| lines(&text));
        let tokenizer = self.json(TOKENIZER);
        let config = self.json(CONFIG);
        if !self.problems.is_empty() {
            return None;
        }
        let (file, mut vocabulary) = match (tokenizer, words) {
            (Some(json), words) => {
                let vocabulary = self.tokenizer(&json)?;
                if let Some(words) = words {
                    self.compare(&vocabulary.tokens, &words);
                }
                (TOKENIZER, vocabulary)
            }
            (None, Some(words)) => (WORDS, WordPieceVocabulary::bert(words)),
            (None, None) => {
                let message = "expected the captioner's vocabulary beside its weights, found neither \
                               tokenizer.json nor vocab.txt";
                let folder = self.folder.file_name().unwrap_or_default();
                let folder = folder.to_string_lossy().into_owned();
                self.note(&folder, WORDS, message.into());
                return None;
            }
        };
        if let Some(config) = config {
            self.configure(&config, &mut vocabulary);
        }
        Some((file, vocabulary))
    }

    /// Both files of one vocabulary must agree.
    fn compare(&mut self, tokens: &[String], words: &[String]) {
        let differs = tokens.iter().zip(words).position(|(a, b)| a != b);
        let message = match differs {
            Some(at) => format!(
                "expected tokenizer.json's {:?} on line {}, found {:?}",
                tokens[at],
                at + 1,
                words[at]
            ),
            None if tokens.len() != words.len() => format!(
                "expected tokenizer.json's {} tokens, found {}",
                tokens.len(),
                words.len()
            ),
            None => return,
        };
        self.note(WORDS, "tokens", message);
    }

    /// A `tokenizer.json` of BERT's kind; any other part than BERT's own is refused.
    fn tokenizer(&mut self, json: &Value) -> Option<WordPieceVocabulary> {
        for (pointer, expected) in [
            ("/model/type", "WordPiece"),
            ("/model/continuing_subword_prefix", "##"),
            ("/normalizer/type", "BertNormalizer"),
            ("/pre_tokenizer/type", "BertPreTokenizer"),
            ("/decoder/type", "WordPiece"),
        ] {
            // Older files leave the model's type and the prefix out.
            let found = json.pointer(pointer);
            if found.is_some_and(|found| found != expected)
                || (found.is_none() && !pointer.starts_with("/model/"))
            {
                let found = found.map_or("nothing".into(), Value::to_string);
                self.note(
                    TOKENIZER,
                    &field(pointer),
                    format!("expected {expected:?}, found {found}"),
                );
            }
        }
        let tokens = self.tokens(json);
        let mut vocabulary = WordPieceVocabulary::bert(tokens);
        self.take(TOKENIZER, json, "/model/unk_token", &mut vocabulary.unknown);
        let mut longest = vocabulary.longest_word as u64;
        self.take(
            TOKENIZER,
            json,
            "/model/max_input_chars_per_word",
            &mut longest,
        );
        vocabulary.longest_word = usize::try_from(longest).unwrap_or(usize::MAX);
        self.take(
            TOKENIZER,
            json,
            "/normalizer/lowercase",
            &mut vocabulary.lowercase,
        );
        let mut accents = None;
        self.take(TOKENIZER, json, "/normalizer/strip_accents", &mut accents);
        vocabulary.strip_accents = accents.unwrap_or(vocabulary.lowercase);
        self.take(
            TOKENIZER,
            json,
            "/normalizer/handle_chinese_chars",
            &mut vocabulary.split_chinese,
        );
        let mut clean = true;
        self.take(TOKENIZER, json, "/normalizer/clean_text", &mut clean);
        if !clean {
            let message = "expected true, found false".into();
            self.note(TOKENIZER, "normalizer.clean_text", message);
        }
        vocabulary.other_special = self.added(json, &vocabulary);
        self.problems.is_empty().then_some(vocabulary)
    }

    /// `model.vocab` in the order of its ids, with tokens that were added behind it.
    fn tokens(&mut self, json: &Value) -> Vec<String> {
        let Some(Value::Object(vocab)) = json.pointer("/model/vocab") else {
            let found = json.pointer("/model/vocab").map_or("nothing", kind);
            self.note(
                TOKENIZER,
                "model.vocab",
                format!("expected an object of ids, found {found}"),
            );
            return Vec::new();
        };
        let mut by_id: BTreeMap<u64, String> = BTreeMap::new();
        let added = json.get("added_tokens").and_then(Value::as_array);
        let added = added.into_iter().flatten().map(|token| {
            let content = token.get("content").and_then(Value::as_str);
            (content.unwrap_or_default(), token.get("id"))
        });
        let listed = vocab.iter().map(|(token, id)| (token.as_str(), Some(id)));
        for (token, id) in listed.chain(added) {
            let Some(id) = id.and_then(Value::as_u64) else {
                let found = id.map_or("nothing".into(), Value::to_string);
                let message = format!("expected a whole number for {token:?}, found {found}");
                self.note(TOKENIZER, "model.vocab", message);
                return Vec::new();
            };
            let other = by_id.insert(id, token.to_owned());
            if let Some(other) = other.filter(|other| other != token) {
                let message =
                    format!("expected one token of id {id}, found {other:?} and {token:?}");
                self.note(TOKENIZER, "model.vocab", message);
                return Vec::new();
            }
        }
        if let Some((expected, (found, _))) = (0_u64..)
            .zip(&by_id)
            .find(|(expected, (id, _))| expected != *id)
        {
            let message =
                format!("expected ids without a gap, found none of {expected} before {found}");
            self.note(TOKENIZER, "model.vocab", message);
            return Vec::new();
        }
        by_id.into_values().collect()
    }

    /// Added tokens that are no text, beyond those that have a place of their own.
    fn added(&mut self, json: &Value, vocabulary: &WordPieceVocabulary) -> Vec<String> {
        let own = [
            &vocabulary.unknown,
            &vocabulary.start,
            &vocabulary.end,
            &vocabulary.pad,
        ];
        let added = json.get("added_tokens").and_then(Value::as_array);
        added
            .into_iter()
            .flatten()
            .filter(|token| token.get("special").and_then(Value::as_bool) == Some(true))
            .filter_map(|token| token.get("content")?.as_str())
            .filter(|token| !own.iter().any(|own| own == token))
            .map(str::to_owned)
            .collect()
    }

    /// `tokenizer_config.json` has the last word, as it has in the original.
    fn configure(&mut self, config: &Value, vocabulary: &mut WordPieceVocabulary) {
        self.take(CONFIG, config, "/do_lower_case", &mut vocabulary.lowercase);
        let mut accents: Option<bool> = None;
        self.take(CONFIG, config, "/strip_accents", &mut accents);
        if config.get("do_lower_case").is_some() || accents.is_some() {
            vocabulary.strip_accents = accents.unwrap_or(vocabulary.lowercase);
        }
        self.take(
            CONFIG,
            config,
            "/tokenize_chinese_chars",
            &mut vocabulary.split_chinese,
        );
        for (key, into) in [
            ("unk_token", &mut vocabulary.unknown),
            ("cls_token", &mut vocabulary.start),
            ("sep_token", &mut vocabulary.end),
            ("pad_token", &mut vocabulary.pad),
        ] {
            // A token is its text, or an object with its text and how it is matched.
            let pointer = match config.get(key) {
                Some(Value::Object(_)) => format!("/{key}/content"),
                _ => format!("/{key}"),
            };
            self.take(CONFIG, config, &pointer, into);
        }
    }

    /// A field into its place; absent and null leave it as it is.
    fn take<T: serde::de::DeserializeOwned>(
        &mut self,
        file: &str,
        json: &Value,
        pointer: &str,
        into: &mut T,
    ) {
        match json.pointer(pointer) {
            None | Some(Value::Null) => {}
            Some(value) => match T::deserialize(value) {
                Ok(value) => *into = value,
                Err(error) => self.note(
                    file,
                    &field(pointer),
                    format!("expected another type, found {value}: {error}"),
                ),
            },
        }
    }
}

/// One token per line; the last line may lack its line feed.
fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.trim_end().to_owned())
        .collect()
}

fn field(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
