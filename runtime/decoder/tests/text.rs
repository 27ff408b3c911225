//! Tokenizers against slow, obvious ones, and on what nobody would write.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;

use decoder::text::{
    ClipTokenizer, ClipVocabulary, MAX_TEXT_BYTES, Padding, WordPiece, WordPieceVocabulary,
};
use proptest::prelude::*;

const MERGES: [&str; 10] = [
    "t h",
    "th e</w>",
    "i n",
    "a n",
    "th e",
    "in g</w>",
    "an d</w>",
    "e r",
    "the r",
    "ther e</w>",
];

fn clip() -> ClipTokenizer {
    let vocabulary = ClipVocabulary::new(MERGES.map(str::to_owned).to_vec());
    ClipTokenizer::from_bytes(&vocabulary.to_bytes().unwrap()).unwrap()
}

/// Byte pairs as the paper has them: again and again the most urgent merge, everywhere in the word.
fn slow_ids(word: &str) -> Vec<i64> {
    // Bytes from '!' to '~' are the first ids; the last letter's are 256 on.
    let letters: Vec<char> = ('!'..='~').collect();
    let mut ids = BTreeMap::new();
    for (id, letter) in (0_i64..).zip(&letters) {
        ids.insert(letter.to_string(), id);
        ids.insert(format!("{letter}</w>"), id + 256);
    }
    for (id, merge) in (512_i64..).zip(MERGES) {
        ids.insert(merge.replace(' ', ""), id);
    }
    let mut parts: Vec<String> = word.chars().map(String::from).collect();
    if let Some(last) = parts.last_mut() {
        last.push_str("</w>");
    }
    loop {
        let urgent = MERGES.iter().find(|merge| {
            let (first, second) = merge.split_once(' ').unwrap();
            parts
                .windows(2)
                .any(|pair| pair[0] == first && pair[1] == second)
        });
        let Some((first, second)) = urgent.and_then(|merge| merge.split_once(' ')) else {
            return parts.iter().map(|part| ids[part]).collect();
        };
        let mut at = 0;
        while at + 1 < parts.len() {
            if parts[at] == first && parts[at + 1] == second {
                let second = parts.remove(at + 1);
                parts[at].push_str(&second);
            }
            at += 1;
        }
    }
}

#[test]
fn contractions_digits_and_signs_are_words_of_their_own() {
    let split = |text: &str, words: &[&str]| {
        let expected: Vec<i64> = words.iter().flat_map(|word| slow_ids(word)).collect();
        assert_eq!(clip().encode(text), expected, "{text}");
    };
    split("There's THE and", &["there", "'s", "the", "and"]);
    split("12 a&amp;b <p>", &["1", "2", "a", "&", "b", "<", "p", ">"]);
    // No text makes the start or the end token.
    split("<|endoftext|>", &["<|", "endoftext", "|>"]);
    split("\u{201c}don\u{2019}t\u{201d}", &["\"", "don", "'t", "\""]);
}

#[test]
fn a_vocabulary_that_breaks_a_rule_is_refused_by_merge() {
    for (merge, expected) in [
        ("ab", "two parts with one space between"),
        ("t  h", "parts that are bytes or earlier merges"),
        ("q xyz", "parts that are bytes or earlier merges"),
        ("e</w> r", "the first not at a word's end"),
        ("t h", "a part that no earlier merge makes"),
        ("", "two parts"),
    ] {
        let mut merges = MERGES.map(str::to_owned).to_vec();
        merges.push(merge.into());
        let message = ClipVocabulary::new(merges)
            .to_bytes()
            .unwrap_err()
            .to_string();
        assert!(message.starts_with("merges[10]: expected"), "{message}");
        assert!(message.contains(expected), "{merge}: {message}");
    }
    for bytes in [
        "",
        "[]",
        "{}",
        r#"{"kind":"word_piece","merges":[]}"#,
        r#"{"kind":"clip_bpe"}"#,
    ] {
        assert!(
            ClipTokenizer::from_bytes(bytes.as_bytes()).is_err(),
            "{bytes}"
        );
    }
}

#[test]
fn a_text_beyond_the_limit_is_cut() {
    let clip = clip();
    let long = "é ".repeat(MAX_TEXT_BYTES);
    let ids = clip.encode(&long);
    // Three bytes of the text for two ids.
    assert!(ids.len() <= MAX_TEXT_BYTES);
    assert_eq!(clip.padded(&long, 77, Padding::Zero).len(), 77);
    let one_word = "x".repeat(4 * MAX_TEXT_BYTES);
    assert_eq!(clip.encode(&one_word).len(), MAX_TEXT_BYTES);
}

fn words() -> WordPiece {
    let tokens = [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "##c", "ab", "don", "'", "t", ".", "##.",
    ];
    let vocabulary = WordPieceVocabulary::bert(tokens.map(str::to_owned).to_vec());
    WordPiece::from_bytes(&vocabulary.to_bytes().unwrap()).unwrap()
}

#[test]
fn pieces_join_and_punctuation_moves_up() {
    let words = words();
    assert_eq!(
        words.encode("ABC abcz don't."),
        [2, 7, 6, 1, 8, 9, 10, 11, 3]
    );
    assert_eq!(
        words.decode(&[2, 7, 6, 8, 9, 10, 11, 3, 0, 0]),
        "abc don't."
    );
    // A caption that begins in the middle of a word keeps the mark, as the original does.
    assert_eq!(words.decode(&[2, 5, 4]), "##b a");
    assert_eq!(words.decode(&[]), "");
    assert_eq!(words.decode(&[i64::MIN, -1, 13, i64::MAX]), "");
}

proptest! {
    #[test]
    fn words_are_merged_as_the_slow_way_does(word in "[theinagdr]{1,16}") {
        prop_assert_eq!(clip().encode(&word), slow_ids(&word));
    }

    #[test]
    fn any_text_has_ids_within_the_vocabulary(text in any::<String>(), length in 0..100_usize) {
        let (clip, words) = (clip(), words());
        for padding in [Padding::EndToken, Padding::Zero] {
            let ids = clip.padded(&text, length, padding);
            prop_assert_eq!(ids.len(), length);
            prop_assert!(ids.iter().all(|&id| (0..=clip.end()).contains(&id)));
        }
        let ids = words.encode(&text);
        prop_assert!(ids.iter().all(|&id| (0..13).contains(&id)));
        let _ = words.decode(&ids);
    }

    #[test]
    fn no_file_makes_a_tokenizer_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        merges in prop::collection::vec("[ -~]{0,4}( [ -~]{0,4})?", 0..8),
        tokens in prop::collection::vec("(\\[(PAD|UNK|CLS|SEP)\\]|#{0,2}[a-c.]{0,2})", 0..12),
        longest in any::<usize>(),
        text in "[a-c. #]{0,20}",
    ) {
        let _ = ClipTokenizer::from_bytes(&bytes);
        let _ = WordPiece::from_bytes(&bytes);
        if let Ok(bytes) = ClipVocabulary::new(merges).to_bytes() {
            let _ = ClipTokenizer::from_bytes(&bytes).unwrap().encode(&text);
        }
        let mut all: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"].map(str::to_owned).to_vec();
        all.extend(tokens);
        all.sort();
        all.dedup();
        let mut vocabulary = WordPieceVocabulary::bert(all);
        vocabulary.longest_word = longest % 300;
        if let Ok(bytes) = vocabulary.to_bytes() {
            let words = WordPiece::from_bytes(&bytes).unwrap();
            let _ = words.decode(&words.encode(&text));
        }
    }
}
