//! What CLIP's tokenizers do to a text before they split it.
//!
//! OpenCLIP runs `ftfy.fix_text`, unescapes HTML twice, collapses white space and lower-cases.
//! Of ftfy (6.x, default settings) this has: HTML entities, terminal escapes, C1 controls,
//! ligatures, widths of characters, curly quotes, control characters, NFC. Its repair of text that
//! was decoded with the wrong encoding is left out: prompts come from the captioner or a setting, as
//! UTF-8.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;
use unicode_normalization::UnicodeNormalization;

static ENTITY: LazyLock<Regex> =
    LazyLock::new(|| Regex::new("&#?[0-9A-Za-z]{1,24};").expect("the pattern is fixed"));
static TERMINAL_ESCAPE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new("\u{1b}\\[[0-9;]*[a-zA-Z]").expect("the pattern is fixed"));

/// Rounds of ftfy, which repeats itself until nothing changes; entities nest no deeper in earnest.
const ROUNDS: usize = 8;

/// The text as CLIP splits it: one line, single spaces, lower case.
pub(super) fn clean(text: &str) -> String {
    let mut text = text.to_owned();
    for _ in 0..ROUNDS {
        let fixed = fix(&text);
        if fixed == text {
            break;
        }
        text = fixed;
    }
    for _ in 0..2 {
        text = htmlize::unescape(text).into_owned();
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").to_lowercase()
}

/// One round of ftfy's repairs, in its order.
fn fix(text: &str) -> String {
    // ftfy takes a text with an opening bracket for HTML and leaves its entities alone.
    let text: Cow<'_, str> = if text.contains('<') {
        text.into()
    } else {
        ENTITY.replace_all(text, |found: &regex::Captures<'_>| {
            htmlize::unescape(&found[0]).into_owned()
        })
    };
    let text = TERMINAL_ESCAPE.replace_all(&text, "");
    let mut out = String::with_capacity(text.len());
    for character in text.chars().map(printable) {
        match ligature(character) {
            Some(letters) => out.push_str(letters),
            None => out.push(character),
        }
    }
    let mut plain = String::with_capacity(out.len());
    for character in out.chars() {
        match character {
            '\u{3000}' => plain.push(' '),
            '\u{ff01}'..='\u{ffef}' => plain.extend(std::iter::once(character).nfkc()),
            '\u{2bc}' | '\u{2018}'..='\u{201b}' => plain.push('\''),
            '\u{201c}'..='\u{201f}' => plain.push('"'),
            _ => plain.push(character),
        }
    }
    plain.retain(|character| !is_control(character));
    plain.nfc().collect()
}

/// What windows-1252 has where Latin-1 has a control character; five places are empty in both.
fn printable(character: char) -> char {
    const CHARACTERS: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž',
        '\u{8f}', '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}',
        'ž', 'Ÿ',
    ];
    u32::from(character)
        .checked_sub(0x80)
        .and_then(|place| CHARACTERS.get(usize::try_from(place).ok()?))
        .copied()
        .unwrap_or(character)
}

fn ligature(character: char) -> Option<&'static str> {
    Some(match character {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "ʼn",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        _ => return None,
    })
}

/// ftfy's control characters: those without a use in plain text.
fn is_control(character: char) -> bool {
    matches!(
        character,
        '\0'..='\u{8}'
            | '\u{b}'
            | '\u{e}'..='\u{1f}'
            | '\u{7f}'
            | '\u{206a}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffc}'
    )
}
