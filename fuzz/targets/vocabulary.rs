//! Tokenizers: the input is a bundle's vocabulary file, a zero, and a text; or a text for small sound vocabularies.
#![no_main]

use std::sync::LazyLock;

use decoder::text::{ClipTokenizer, ClipVocabulary, Padding, WordPiece, WordPieceVocabulary};
use libfuzzer_sys::fuzz_target;

static CLIP: LazyLock<ClipTokenizer> = LazyLock::new(|| {
    let merges = ["t h", "th e</w>", "a t</w>", "i n", "in g</w>"];
    let vocabulary = ClipVocabulary::new(merges.map(str::to_owned).to_vec());
    ClipTokenizer::from_bytes(&vocabulary.to_bytes().expect("a sound vocabulary")).expect("the same")
});

static WORDS: LazyLock<WordPiece> = LazyLock::new(|| {
    let tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "##s", "##ing", ".", "n", "'"];
    let vocabulary = WordPieceVocabulary::bert(tokens.map(str::to_owned).to_vec());
    WordPiece::from_bytes(&vocabulary.to_bytes().expect("a sound vocabulary")).expect("the same")
});

fn with_clip(tokenizer: &ClipTokenizer, text: &str) {
    let within = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < tokenizer.vocabulary());
    assert!(tokenizer.encode(text).iter().all(within));
    for padding in [Padding::EndToken, Padding::Zero] {
        let padded = tokenizer.padded(text, 77, padding);
        assert_eq!(padded.len(), 77);
        assert!(padded.contains(&tokenizer.end()));
    }
}

fn with_words(words: &WordPiece, text: &str, ids: &[u8]) {
    let found = words.encode(text);
    let within = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < words.vocabulary());
    assert!(found.iter().all(within));
    let _ = words.decode(&found);
    // The captioner's own answer may be anything.
    let ids: Vec<i64> = ids.iter().map(|&byte| i64::from(byte) - 8).collect();
    let _ = words.decode(&ids);
}

fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let (file, text) = bytes.split_at(end);
    let text = String::from_utf8_lossy(text);
    if let Ok(tokenizer) = ClipTokenizer::from_bytes(file) {
        with_clip(&tokenizer, &text);
    }
    if let Ok(words) = WordPiece::from_bytes(file) {
        with_words(&words, &text, file);
    }
    let whole = String::from_utf8_lossy(bytes);
    with_clip(&CLIP, &whole);
    with_words(&WORDS, &whole, bytes);
});
