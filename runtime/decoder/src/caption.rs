//! Captions, word by word, with what earlier words computed kept.
//!
//! The prefix network turns the picture's vision tokens into keys and values once; the step network
//! takes one word and returns the scores of the next and its own keys and values, which join the
//! others. Greedy, as MindEye2 captions: the most likely word, until the end token or the length.

use std::collections::BTreeMap;

use ndarray::{Array2, Array3, ArrayD, ArrayView3, Axis, Ix2, Ix4, IxDyn, s};

use crate::{Stage, StageError};

/// Score of a place that is not there yet; its share of a softmax is zero also in half precision.
pub const HIDDEN: f32 = -4096.0;

/// Why there is no caption.
#[derive(Debug, thiserror::Error)]
pub enum CaptionError {
    /// A network failed.
    #[error("the captioner failed")]
    Stage(#[from] StageError),
    /// An input or output that the networks should have.
    #[error("the captioner's networks lack {missing}, or it has another shape")]
    Interface {
        /// Which.
        missing: &'static str,
    },
    /// More words than the networks have room for.
    #[error("a caption of {asked} tokens, the networks have room for {room}")]
    Length {
        /// Asked for.
        asked: usize,
        /// Room.
        room: usize,
    },
}

/// Token ids that begin, end and pad a caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialTokens {
    /// First token of every caption.
    pub start: i64,
    /// Ends a caption.
    pub end: i64,
    /// Fills what follows.
    pub pad: i64,
}

/// The two networks.
#[derive(Debug)]
pub struct Captioner {
    prefix: Stage,
    step: Stage,
    vision: usize,
    room: usize,
}

/// Keys and values so far, for a batch of captions.
#[derive(Clone, Debug)]
pub struct Words {
    keys: ArrayD<f32>,
    values: ArrayD<f32>,
    hidden: Array2<f32>,
    said: usize,
}

impl Captioner {
    /// - `prefix`: vision tokens to keys and values.
    /// - `step`: one word.
    ///
    /// # Errors
    /// [`CaptionError::Interface`] where the two do not fit together.
    pub fn new(prefix: Stage, step: Stage) -> Result<Captioner, CaptionError> {
        let len = |stage: &Stage, input: &str, axis: usize| {
            let len = stage.spec().input(input).and_then(|spec| spec.fixed(axis));
            len.and_then(|len| usize::try_from(len).ok())
        };
        let missing = |missing| CaptionError::Interface { missing };
        let vision = len(&prefix, "vision", 1).ok_or(missing("vision"))?;
        let known = len(&step, "hidden", 1).ok_or(missing("hidden"))?;
        let room = known.checked_sub(vision).ok_or(missing("room for words"))?;
        Ok(Captioner {
            prefix,
            step,
            vision,
            room,
        })
    }

    /// Most tokens of a caption.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room
    }

    /// Reads the pictures.
    ///
    /// - `vision`: `[batch, token, width]`, from the bridge.
    ///
    /// # Errors
    /// [`CaptionError`] where the network fails.
    pub fn look(&self, vision: ArrayView3<'_, f32>) -> Result<Words, CaptionError> {
        let mut outputs = self.prefix.run(&[("vision", vision.into_dyn())])?;
        let batch = vision.dim().0;
        let mut grown = |name: &'static str| {
            let prefix = take(&mut outputs, name)?;
            let prefix = prefix
                .into_dimensionality::<Ix4>()
                .map_err(|_| CaptionError::Interface { missing: name })?;
            let (_, layers, _, dim) = prefix.dim();
            let mut all = ArrayD::zeros(IxDyn(&[batch, layers, self.vision + self.room, dim]));
            all.slice_mut(s![.., .., ..self.vision, ..]).assign(&prefix);
            Ok::<_, CaptionError>(all)
        };
        let (keys, values) = (grown("keys")?, grown("values")?);
        let mut hidden = Array2::from_elem((batch, self.vision + self.room), HIDDEN);
        hidden.slice_mut(s![.., ..self.vision]).fill(0.0);
        Ok(Words {
            keys,
            values,
            hidden,
            said: 0,
        })
    }

    /// Says one more word of each caption.
    ///
    /// - `words`: `[batch]`, token ids.
    ///
    /// Returns the scores of the next word, `[batch, vocabulary]`.
    ///
    /// # Errors
    /// [`CaptionError`] where the network fails or there is no room.
    #[expect(
        clippy::cast_precision_loss,
        reason = "token ids and positions are far below 2^24"
    )]
    pub fn say(&self, so_far: &mut Words, words: &[i64]) -> Result<Array2<f32>, CaptionError> {
        if so_far.said >= self.room {
            return Err(CaptionError::Length {
                asked: so_far.said + 1,
                room: self.room,
            });
        }
        let ids: Vec<f32> = words.iter().map(|&id| id as f32).collect();
        let word = ArrayD::from_shape_vec(IxDyn(&[ids.len(), 1]), ids).unwrap_or_default();
        let position = ArrayD::from_elem(IxDyn(&[words.len(), 1]), so_far.said as f32);
        let mut outputs = self.step.run(&[
            ("word", word.view()),
            ("position", position.view()),
            ("keys", so_far.keys.view()),
            ("values", so_far.values.view()),
            ("hidden", so_far.hidden.view().into_dyn()),
        ])?;
        let place = self.vision + so_far.said;
        for (name, all) in [("key", &mut so_far.keys), ("value", &mut so_far.values)] {
            let own = take(&mut outputs, name)?;
            all.slice_mut(s![.., .., place..=place, ..]).assign(&own);
        }
        so_far.hidden.column_mut(place).fill(0.0);
        so_far.said += 1;
        let logits = take(&mut outputs, "logits")?;
        logits
            .into_dimensionality::<Ix2>()
            .map_err(|_| CaptionError::Interface { missing: "logits" })
    }

    /// Captions pictures greedily.
    ///
    /// - `vision`: `[batch, token, width]`.
    /// - `length`: tokens of a caption, the first one included.
    ///
    /// Returns `[batch][length]` token ids, padded after the end token.
    ///
    /// # Errors
    /// [`CaptionError`] where a network fails or `length` is more than there is room for.
    pub fn greedy(
        &self,
        vision: ArrayView3<'_, f32>,
        special: SpecialTokens,
        length: usize,
    ) -> Result<Vec<Vec<i64>>, CaptionError> {
        if length > self.room {
            return Err(CaptionError::Length {
                asked: length,
                room: self.room,
            });
        }
        let mut so_far = self.look(vision)?;
        let mut captions = vec![vec![special.start]; vision.dim().0];
        while captions
            .first()
            .is_some_and(|caption| caption.len() < length)
        {
            let words: Vec<i64> = captions
                .iter()
                .map(|caption| caption.last().copied().unwrap_or(special.pad))
                .collect();
            let scores = self.say(&mut so_far, &words)?;
            for (caption, row) in captions.iter_mut().zip(scores.rows()) {
                let ended = caption.contains(&special.end);
                let best = row
                    .iter()
                    .enumerate()
                    .max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
                let id = best
                    .and_then(|(id, _)| i64::try_from(id).ok())
                    .unwrap_or(special.pad);
                caption.push(if ended { special.pad } else { id });
            }
        }
        Ok(captions)
    }

    /// Scores of every next word while given words are said, `[batch, word, vocabulary]`.
    ///
    /// - `ids`: `[batch][word]`, as many of each.
    ///
    /// # Errors
    /// As [`Self::say`].
    pub fn forced(
        &self,
        vision: ArrayView3<'_, f32>,
        ids: &[Vec<i64>],
    ) -> Result<Array3<f32>, CaptionError> {
        let mut so_far = self.look(vision)?;
        let mut scores = Vec::new();
        for word in 0..ids.first().map_or(0, Vec::len) {
            let words: Vec<i64> = ids
                .iter()
                .map(|caption| caption.get(word).copied().unwrap_or_default())
                .collect();
            scores.push(self.say(&mut so_far, &words)?);
        }
        let views: Vec<_> = scores.iter().map(|row| row.view()).collect();
        ndarray::stack(Axis(1), &views).map_err(|_| CaptionError::Interface { missing: "logits" })
    }
}

fn take(
    outputs: &mut BTreeMap<String, ArrayD<f32>>,
    name: &'static str,
) -> Result<ArrayD<f32>, CaptionError> {
    outputs
        .remove(name)
        .ok_or(CaptionError::Interface { missing: name })
}
