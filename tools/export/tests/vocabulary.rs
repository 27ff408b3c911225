//! The vocabularies that bundles carry: CLIP's own, and the captioner's from its files.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::Path;

use decoder::text::{ClipTokenizer, Padding, WordPiece};
use export::vocabulary;

fn clip() -> ClipTokenizer {
    ClipTokenizer::from_bytes(&vocabulary::clip().unwrap()).unwrap()
}

#[test]
fn clip_has_its_ids() {
    let clip = clip();
    assert_eq!(clip.vocabulary(), 49_408);
    assert_eq!(clip.end(), 49_407);
    assert_eq!(
        clip.padded("a cat", 6, Padding::Zero),
        [49_406, 320, 2_368, 49_407, 0, 0]
    );
    assert_eq!(
        clip.padded("a cat", 6, Padding::EndToken),
        [49_406, 320, 2_368, 49_407, 49_407, 49_407]
    );
    // Cut, and the end token keeps the last place.
    assert_eq!(
        clip.padded("a cat a cat", 4, Padding::Zero),
        [49_406, 320, 2_368, 49_407]
    );
    assert!(clip.padded("a cat", 0, Padding::Zero).is_empty());
}

/// Ids by OpenCLIP 2.24.0's `SimpleTokenizer` with ftfy 6; see `data/text/README.md`.
#[test]
fn clip_cleans_text_as_the_original_does() {
    let clip = clip();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/text/clip_cleaning.json");
    let cases: Vec<(String, Vec<i64>)> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(cases.len() > 100);
    for (text, ids) in cases {
        assert_eq!(clip.encode(&text), ids, "{text:?}");
    }
}

const WORDS: [&str; 9] = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Stand", "stand", "##ing", ".",
];

fn tokenizer_json(words: &[&str]) -> serde_json::Value {
    let vocab: serde_json::Map<_, _> = words
        .iter()
        .zip(0..)
        .map(|(word, id)| ((*word).to_owned(), id.into()))
        .collect();
    serde_json::json!({
        "added_tokens": [{"id": 4, "content": "[MASK]", "special": true}],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    })
}

fn refusal(dir: &Path) -> String {
    let problems = vocabulary::caption(dir, Some(9)).expect_err("refused");
    problems
        .iter()
        .map(|problem| format!("{problem}\n"))
        .collect()
}

#[test]
fn either_file_gives_the_captioners_words() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("vocab.txt"), WORDS.join("\n")).unwrap();
    let from_words = vocabulary::caption(dir.path(), Some(9)).unwrap();
    let json = tokenizer_json(&WORDS).to_string();
    fs::write(dir.path().join("tokenizer.json"), &json).unwrap();
    let from_both = vocabulary::caption(dir.path(), Some(9)).unwrap();
    assert_eq!(from_words, from_both);
    let words = WordPiece::from_bytes(&from_both).unwrap();
    assert_eq!(words.encode("Standing. [CLS]"), [2, 6, 7, 8, 1, 1, 1, 3]);
    assert_eq!(words.decode(&[2, 6, 7, 8, 3, 0, 4, 99, -1]), "standing.");
    let special = words.special();
    assert_eq!((special.start, special.end, special.pad), (2, 3, 0));
    // The configuration has the last word on letters.
    let config = r#"{"do_lower_case": false, "cls_token": {"content": "[CLS]"}}"#;
    fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let cased = WordPiece::from_bytes(&vocabulary::caption(dir.path(), Some(9)).unwrap()).unwrap();
    assert_eq!(cased.encode("Stand stand"), [2, 5, 6, 3]);
}

#[test]
fn damaged_files_of_the_captioner_are_refused_by_file_and_field() {
    let whole = tokenizer_json(&WORDS);
    let changed = |pointer: &str, value: serde_json::Value| {
        let mut json = whole.clone();
        *json.pointer_mut(pointer).unwrap() = value;
        json.to_string()
    };
    let mut gap = WORDS.to_vec();
    gap.retain(|word| *word != "##ing");
    for (file, content, expected) in [
        (
            "other.txt",
            String::new(),
            "found neither tokenizer.json nor vocab.txt",
        ),
        (
            "tokenizer.json",
            "{".into(),
            "tokenizer.json: json: expected JSON",
        ),
        (
            "tokenizer.json",
            "[]".into(),
            "expected an object, found an array",
        ),
        (
            "tokenizer.json",
            changed("/model/type", "BPE".into()),
            "model.type: expected \"WordPiece\", found \"BPE\"",
        ),
        (
            "tokenizer.json",
            changed("/normalizer/type", "NFC".into()),
            "normalizer.type: expected \"BertNormalizer\", found \"NFC\"",
        ),
        (
            "tokenizer.json",
            changed("/model/vocab/stand", 60.into()),
            "model.vocab: expected ids without a gap, found none of 6",
        ),
        (
            "tokenizer.json",
            changed("/model/vocab/stand", 7.into()),
            "model.vocab: expected one token of id 7",
        ),
        (
            "tokenizer.json",
            changed("/model/vocab/stand", (-1).into()),
            "expected a whole number for \"stand\", found -1",
        ),
        (
            "tokenizer.json",
            changed("/model/vocab", 3.into()),
            "model.vocab: expected an object of ids, found a number",
        ),
        (
            "tokenizer.json",
            changed("/model/max_input_chars_per_word", 1_000_000.into()),
            "longest_word: expected 1..=256, found 1000000",
        ),
        (
            "vocab.txt",
            WORDS[1..].join("\n"),
            "pad: expected one of the tokens, found \"[PAD]\"",
        ),
        (
            "vocab.txt",
            format!("{}\nstand", WORDS[..8].join("\n")),
            "expected each token once, found \"stand\" with ids 6 and 8",
        ),
        (
            "vocab.txt",
            format!("{}\n\n.", WORDS[..8].join("\n")),
            "expected a token, found an empty one",
        ),
        (
            "vocab.txt",
            format!("{}\nmore", WORDS.join("\n")),
            "expected at most the word embedding's 9 rows, found 10",
        ),
        ("vocab.txt", String::new(), "expected one of the tokens"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(file), content).unwrap();
        let message = refusal(dir.path());
        assert!(message.contains(expected), "{expected}\n{message}");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("vocab.txt"), [0xff, b'a']).unwrap();
    assert!(refusal(dir.path()).contains("vocab.txt: text: expected UTF-8"));
    // Two files of one vocabulary that differ.
    fs::write(dir.path().join("vocab.txt"), gap.join("\n")).unwrap();
    fs::write(dir.path().join("tokenizer.json"), whole.to_string()).unwrap();
    let message = refusal(dir.path());
    assert!(
        message.contains(
            "vocab.txt: tokens: expected tokenizer.json's \"##ing\" on line 8, found \".\""
        ),
        "{message}"
    );
}
