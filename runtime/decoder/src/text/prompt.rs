//! A prompt to what an SDXL network is conditioned on.

use bundle::{Bundle, StageName};
use ndarray::{ArrayD, Axis, IxDyn};

use super::{ClipTokenizer, Padding, TextError, WordPiece};
use crate::{Runtime, Stage, StageError, conditioning};

/// Why a prompt cannot be conditioned on.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// A part that prompts need.
    #[error("the bundle has text encoders but no {missing}: export it again")]
    Incomplete {
        /// What is not there.
        missing: &'static str,
    },
    /// The vocabulary's file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The vocabulary is refused.
    #[error("{file} is refused")]
    Vocabulary {
        /// The file.
        file: String,
        /// Why.
        source: TextError,
    },
    /// A tower cannot be opened or run.
    #[error("{stage}")]
    Stage {
        /// The tower.
        stage: &'static str,
        /// What is wrong.
        source: StageError,
    },
    /// The towers do not fit together.
    #[error("{stage}: expected {expected}, found another shape or none")]
    Interface {
        /// The tower.
        stage: &'static str,
        /// What it should have.
        expected: &'static str,
    },
}

/// A vocabulary of a bundle.
fn vocabulary<T>(
    bundle: &Bundle,
    file: &str,
    read: fn(&[u8]) -> Result<T, TextError>,
) -> Result<T, PromptError> {
    let path = bundle.dir().join(file);
    let bytes = std::fs::read(&path).map_err(|source| PromptError::Read { path, source })?;
    read(&bytes).map_err(|source| PromptError::Vocabulary {
        file: file.into(),
        source,
    })
}

impl WordPiece {
    /// Opens the captioner's vocabulary of a bundle; `None` where it has none.
    ///
    /// # Errors
    /// [`PromptError`] where the file cannot be read or is refused.
    pub fn open(bundle: &Bundle) -> Result<Option<WordPiece>, PromptError> {
        let listed = bundle.manifest().tokenizers.as_ref();
        let file = listed.and_then(|tokenizers| tokenizers.caption.as_ref());
        file.map(|file| vocabulary(bundle, file, WordPiece::from_bytes))
            .transpose()
    }
}

/// What an SDXL network is conditioned on.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// `[1, token, channel]`: CLIP-L's channels, then OpenCLIP's.
    pub context: ArrayD<f32>,
    /// `[1, column]`: OpenCLIP's pooled text, then the sizes.
    pub vector: ArrayD<f32>,
    /// Columns of `vector` that stand for the sizes, at its end.
    pub sizes: usize,
}

/// Both text towers with their tokenizer.
#[derive(Debug)]
pub struct Prompter {
    tokenizer: ClipTokenizer,
    first: Stage,
    second: Stage,
    tokens: [usize; 2],
}

impl Prompter {
    /// Opens the text towers and the tokenizer of a bundle; `None` where it has no text towers.
    ///
    /// # Errors
    /// [`PromptError`] where only a part is there or does not open.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Option<Prompter>, PromptError> {
        let manifest = bundle.manifest();
        let stage = |name: StageName| {
            let spec = manifest.stages.get(&name)?;
            Some(
                Stage::open(runtime, bundle, spec).map_err(|source| PromptError::Stage {
                    stage: name.as_str(),
                    source,
                }),
            )
        };
        let (first, second) = match (
            stage(StageName::TextEncoder1).transpose()?,
            stage(StageName::TextEncoder2).transpose()?,
        ) {
            (Some(first), Some(second)) => (first, second),
            (None, None) => return Ok(None),
            (None, _) => {
                return Err(PromptError::Incomplete {
                    missing: "text_encoder_1",
                });
            }
            (_, None) => {
                return Err(PromptError::Incomplete {
                    missing: "text_encoder_2",
                });
            }
        };
        let missing = PromptError::Incomplete {
            missing: "tokenizers.clip",
        };
        let listed = manifest.tokenizers.as_ref().and_then(|t| t.clip.as_ref());
        let file = listed.ok_or(missing)?;
        let tokenizer = vocabulary(bundle, file, ClipTokenizer::from_bytes)?;
        Prompter::new(tokenizer, first, second).map(Some)
    }

    /// - `first`: CLIP-L's tower, `second`: OpenCLIP's.
    ///
    /// # Errors
    /// [`PromptError::Interface`] where a tower has no fixed number of tokens.
    pub fn new(
        tokenizer: ClipTokenizer,
        first: Stage,
        second: Stage,
    ) -> Result<Prompter, PromptError> {
        let length = |stage: &Stage, name| {
            let fixed = stage.spec().input("tokens").and_then(|spec| spec.fixed(1));
            let length = fixed.and_then(|len| usize::try_from(len).ok());
            length.ok_or(PromptError::Interface {
                stage: name,
                expected: "an input tokens of fixed length",
            })
        };
        let tokens = [
            length(&first, "text_encoder_1")?,
            length(&second, "text_encoder_2")?,
        ];
        Ok(Prompter {
            tokenizer,
            first,
            second,
            tokens,
        })
    }

    /// The tokenizer of both towers.
    #[must_use]
    pub fn tokenizer(&self) -> &ClipTokenizer {
        &self.tokenizer
    }

    /// Conditions on a prompt; a longer one than the towers take is cut.
    ///
    /// - `sizes`: pixels, in the order of the network's conditioner; SDXL's base takes original
    ///   height and width, crop top and left, target height and width.
    ///
    /// # Errors
    /// [`PromptError`] where a tower fails or the two do not fit together.
    pub fn condition(&self, prompt: &str, sizes: &[f32]) -> Result<Condition, PromptError> {
        let [first_len, second_len] = self.tokens;
        let ids = self.tokenizer.padded(prompt, first_len, Padding::EndToken);
        let [hidden] = run(&self.first, "text_encoder_1", &ids, ["hidden"])?;
        let ids = self.tokenizer.padded(prompt, second_len, Padding::Zero);
        let [penultimate, pooled] =
            run(&self.second, "text_encoder_2", &ids, ["hidden", "pooled"])?;
        let misfit = |expected| PromptError::Interface {
            stage: "text_encoder_2",
            expected,
        };
        let parts = [hidden.view(), penultimate.view()];
        let context = ndarray::concatenate(Axis(2), &parts)
            .map_err(|_| misfit("hidden of as many tokens as text_encoder_1's"))?;
        let sizes = conditioning::vector(sizes, conditioning::SIZE_DIM);
        let columns = sizes.len();
        let sizes = ArrayD::from_shape_vec(IxDyn(&[1, sizes.len()]), sizes).unwrap_or_default();
        let vector = ndarray::concatenate(Axis(1), &[pooled.view(), sizes.view()])
            .map_err(|_| misfit("pooled of one row"))?;
        Ok(Condition {
            context,
            vector,
            sizes: columns,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "token ids are far below 2^24")]
fn run<const N: usize>(
    stage: &Stage,
    name: &'static str,
    ids: &[i64],
    outputs: [&'static str; N],
) -> Result<[ArrayD<f32>; N], PromptError> {
    let row: Vec<f32> = ids.iter().map(|&id| id as f32).collect();
    let row = ArrayD::from_shape_vec(IxDyn(&[1, row.len()]), row).unwrap_or_default();
    let failed = |source| PromptError::Stage {
        stage: name,
        source,
    };
    let mut found = stage.run(&[("tokens", row.view())]).map_err(failed)?;
    let taken = outputs.map(|output| found.remove(output));
    if taken.iter().any(Option::is_none) {
        return Err(PromptError::Interface {
            stage: name,
            expected: "outputs hidden and, of the second, pooled",
        });
    }
    Ok(taken.map(Option::unwrap_or_default))
}
