//! Tokenizers: prompts to ids, ids to captions, prompts to what the refiner is conditioned on.

use std::path::PathBuf;
use std::time::Instant;

use bundle::StageName;
use decoder::text::{ClipTokenizer, Padding, Prompter, WordPiece};
use ndarray::{ArrayD, Axis, Slice};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::golden::read_json;
use super::networks::as_floats;
use super::{CheckError, Parity, Row, Rows, Tolerance};

/// Of both towers' states; the limit and its reason are those of CLIP-L's alone.
const CONTEXT: Tolerance = Tolerance::Close(3e-4);
const POOLED: Tolerance = Tolerance::Close(1e-5);
/// Sinusoids, recorded in single precision and exact here.
const SINUSOIDS: Tolerance = Tolerance::Close(5e-4);
/// Original height and width, crop top and left, target height and width, pixels, as recorded.
const SIZES: [f32; 6] = [768.0, 768.0, 0.0, 0.0, 1024.0, 1024.0];

/// What is used of the reference set's `config.json`.
#[derive(Deserialize)]
struct Config {
    prompts: Vec<String>,
    negative_prompt: String,
}

#[derive(Deserialize)]
struct ClipCase {
    text: String,
    openclip: Vec<i64>,
    hf_clip: Vec<i64>,
}

#[derive(Deserialize)]
struct WordPieceCase {
    text: String,
    ids: Vec<i64>,
    decoded: String,
}

#[derive(Deserialize)]
struct Captions {
    captions: Vec<String>,
}

impl Parity {
    pub(super) fn word_rows(&self) -> Rows {
        let mut rows = self.clip_rows()?;
        rows.extend(self.word_piece_rows()?);
        rows.extend(self.prompt_rows()?);
        Ok(rows)
    }

    fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, CheckError> {
        Ok(read_json(&self.golden.join(name))?)
    }

    /// A vocabulary of the bundle, by the path that its manifest gives.
    fn vocabulary<T>(
        &self,
        file: Option<&String>,
        read: fn(&[u8]) -> Result<T, decoder::text::TextError>,
    ) -> Result<Option<T>, CheckError> {
        let Some(file) = file else { return Ok(None) };
        let path = self.bundle.dir().join(file);
        let bytes = std::fs::read(&path).map_err(|source| CheckError::Read { path, source })?;
        let vocabulary = read(&bytes).map_err(|source| CheckError::Vocabulary {
            file: PathBuf::from(file),
            source,
        })?;
        Ok(Some(vocabulary))
    }

    fn clip_rows(&self) -> Rows {
        let cases: Option<Vec<ClipCase>> = self.json("io_clip_token_cases.json")?;
        let (config, recorded) = (self.json::<Config>("config.json")?, self.vectors("text")?);
        let listed = self.bundle.manifest().tokenizers.as_ref();
        let file = listed.and_then(|tokenizers| tokenizers.clip.as_ref());
        let Some(tokenizer) = self.vocabulary(file, ClipTokenizer::from_bytes)? else {
            let absent = |name: &str| Row::absent(name, "the bundle has no CLIP vocabulary");
            let rows = [
                cases.is_some().then(|| absent("clip_token_cases")),
                recorded.is_some().then(|| absent("text")),
            ];
            return Ok(rows.into_iter().flatten().collect());
        };
        let mut rows = Vec::new();
        if let Some(cases) = cases {
            for (name, of) in [
                (
                    "openclip",
                    (|case| &case.openclip) as fn(&ClipCase) -> &Vec<i64>,
                ),
                ("hf_clip", |case| &case.hf_clip),
            ] {
                let compared = cases
                    .iter()
                    .map(|case| (case.text.as_str(), tokenizer.encode(&case.text), of(case)));
                rows.push(self.ids_row("clip_token_cases", name, compared));
            }
        }
        if let (Some(config), Some(recorded)) = (config, recorded) {
            for (name, padding) in [
                ("ids_clip_l", Padding::EndToken),
                ("ids_openclip", Padding::Zero),
            ] {
                let ids = recorded.ints(name)?;
                let length = ids.len() / config.prompts.len().max(1);
                let expected: Vec<Vec<i64>> =
                    ids.chunks(length.max(1)).map(<[i64]>::to_vec).collect();
                let found = config
                    .prompts
                    .iter()
                    .map(|prompt| (prompt, tokenizer.padded(prompt, length, padding)));
                let compared = found
                    .zip(&expected)
                    .map(|((prompt, found), expected)| (prompt.as_str(), found, expected));
                rows.push(self.ids_row("text", name, compared));
            }
        }
        Ok(rows)
    }

    /// Captions of the recorded pictures, in order; none where there is no such file.
    pub(super) fn recorded_captions(&self) -> Result<Vec<String>, CheckError> {
        let captions: Option<Captions> = self.json("io_git_captions.json")?;
        Ok(captions.map(|file| file.captions).unwrap_or_default())
    }

    fn word_piece_rows(&self) -> Rows {
        let cases: Option<Vec<WordPieceCase>> = self.json("io_wordpiece_cases.json")?;
        let captions: Option<Captions> = self.json("io_git_captions.json")?;
        let listed = self.bundle.manifest().tokenizers.as_ref();
        let file = listed.and_then(|tokenizers| tokenizers.caption.as_ref());
        let Some(words) = self.vocabulary(file, WordPiece::from_bytes)? else {
            let absent = |name: &str| Row::absent(name, "the bundle has no captioner's vocabulary");
            let rows = [
                cases.is_some().then(|| absent("wordpiece_cases")),
                captions.is_some().then(|| absent("git_captions")),
            ];
            return Ok(rows.into_iter().flatten().collect());
        };
        let mut rows = Vec::new();
        if let Some(cases) = cases {
            let compared = cases
                .iter()
                .map(|case| (case.text.as_str(), words.encode(&case.text), &case.ids));
            rows.push(self.ids_row("wordpiece_cases", "ids", compared));
            let compared = cases
                .iter()
                .map(|case| (words.decode(&case.ids), case.decoded.as_str()));
            rows.push(self.texts_row("wordpiece_cases", "decoded", compared));
        }
        if let (Some(captions), Some(git)) = (captions, self.vectors("git")?) {
            let ids = git.ints("generated_ids")?;
            let length = (ids.len() / captions.captions.len().max(1)).max(1);
            let compared = ids
                .chunks(length)
                .zip(&captions.captions)
                .map(|(ids, text)| (words.decode(ids), text.as_str()));
            rows.push(self.texts_row("git_captions", "captions", compared));
        }
        Ok(rows)
    }

    /// What the refiner is conditioned on, from the prompts' text.
    fn prompt_rows(&self) -> Rows {
        let recorded = self.vectors("sdxl_cond")?;
        let (Some(config), Some(recorded)) = (self.json::<Config>("config.json")?, recorded) else {
            return Ok(Vec::new());
        };
        let towers = [StageName::TextEncoder1, StageName::TextEncoder2];
        if towers.iter().any(|tower| self.is_merged(*tower)) {
            let note = format!("uc_*, empty_*: {}", self.without(&towers));
            return Ok(vec![Row::absent("sdxl_cond", note)]);
        }
        let Some(prompter) = Prompter::open(&self.runtime, &self.bundle)? else {
            return Ok(vec![Row::absent(
                "sdxl_cond",
                "uc_*, empty_*: the bundle has no text encoders",
            )]);
        };
        let refiner = self.vectors("refiner")?;
        let mut prompts = vec![
            (
                "sdxl_cond",
                &recorded,
                "uc",
                config.negative_prompt.as_str(),
            ),
            ("sdxl_cond", &recorded, "empty", ""),
        ];
        if let (Some(refiner), Some(first)) = (&refiner, config.prompts.first()) {
            prompts.push(("refiner", refiner, "c", first));
        }
        let mut rows = Vec::new();
        for (file, recorded, name, prompt) in prompts {
            let clock = Instant::now();
            let condition = prompter.condition(prompt, &SIZES)?;
            let time = clock.elapsed();
            let (context, vector) = (format!("{name}_crossattn"), format!("{name}_vector"));
            let expected = recorded.floats(&context)?;
            rows.push(
                self.compared(file, &context, &condition.context, expected, CONTEXT)
                    .took(time)
                    .remark("from the prompt's text"),
            );
            let expected = recorded.floats(&vector)?;
            let found = &condition.vector;
            if found.shape() != expected.shape() {
                rows.push(self.compared(file, &vector, found, expected, POOLED));
                continue;
            }
            let pooled = found.len_of(Axis(1)).saturating_sub(condition.sizes);
            for (part, columns, tolerance) in [
                ("pooled", Slice::from(..pooled), POOLED),
                ("sizes", Slice::from(pooled..), SINUSOIDS),
            ] {
                let of = |vector: &ArrayD<f32>| vector.slice_axis(Axis(1), columns).to_owned();
                let name = format!("{vector}, {part}");
                rows.push(self.compared(file, &name, &of(found), &of(expected), tolerance));
            }
        }
        Ok(rows)
    }

    /// Ids of several texts, equal or not; the first text that differs is named.
    fn ids_row<'t>(
        &self,
        file: &str,
        name: &str,
        compared: impl Iterator<Item = (&'t str, Vec<i64>, &'t Vec<i64>)>,
    ) -> Row {
        let (mut found, mut expected, mut remark) = (Vec::new(), Vec::new(), None);
        for (text, ids, recorded) in compared {
            if ids != *recorded && remark.is_none() {
                remark = Some(format!("{text:?}: expected {recorded:?}, found {ids:?}"));
            }
            // No id is negative: where one text ends shows in what is compared.
            found.extend(ids.into_iter().chain([-1]));
            expected.extend(recorded.iter().copied().chain([-1]));
        }
        let row = self.exact_row(file, name, &as_floats(&found), &as_floats(&expected));
        match remark {
            Some(remark) => row.remark(&remark),
            None => row,
        }
    }

    /// Texts, equal or not, by their characters; the first that differs is named.
    pub(super) fn texts_row<'t>(
        &self,
        file: &str,
        name: &str,
        compared: impl Iterator<Item = (String, &'t str)>,
    ) -> Row {
        let codes = |text: &str| -> Vec<i64> {
            let codes = text
                .chars()
                .map(|character| i64::from(u32::from(character)));
            codes.chain([-1]).collect()
        };
        let (mut found, mut expected, mut remark) = (Vec::new(), Vec::new(), None);
        for (text, recorded) in compared {
            if text != recorded && remark.is_none() {
                remark = Some(format!("expected {recorded:?}, found {text:?}"));
            }
            found.extend(codes(&text));
            expected.extend(codes(recorded));
        }
        let row = self.exact_row(file, name, &as_floats(&found), &as_floats(&expected));
        match remark {
            Some(remark) => row.remark(&remark),
            None => row,
        }
    }
}
