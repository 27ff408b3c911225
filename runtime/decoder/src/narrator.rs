//! CLIP image tokens to a caption in words: bridge, captioner, vocabulary.

use bundle::StageName;
use ndarray::{ArrayD, Ix3};

use crate::caption::Captioner;
use crate::networks::{Networks, output};
use crate::text::WordPiece;
use crate::{DecodeError, Stage};

/// The networks from CLIP tokens to a caption; a bundle has all of them or none.
pub(crate) struct Narrator {
    bridge: Stage,
    captioner: Captioner,
    words: WordPiece,
}

impl Narrator {
    /// `None` where the bundle has no captioner.
    pub(crate) fn open(networks: Networks<'_>) -> Result<Option<Narrator>, DecodeError> {
        let Some(step) = networks.find(StageName::Captioner)? else {
            return Ok(None);
        };
        let words = WordPiece::open(networks.bundle)?;
        let words = words.ok_or(DecodeError::Incomplete {
            missing: "vocabulary of captions",
            needed_by: "captioner",
        })?;
        let prefix = networks.need(StageName::CaptionerPrefix, "captioner")?;
        Ok(Some(Narrator {
            bridge: networks.need(StageName::CaptionBridge, "captioner")?,
            captioner: Captioner::new(prefix, step)?,
            words,
        }))
    }

    /// The caption of CLIP image tokens `[1, token, dim]`, as long as the networks have room for.
    pub(crate) fn caption(&self, tokens: &ArrayD<f32>) -> Result<String, DecodeError> {
        let vision = output(&self.bridge, &[("tokens", tokens)], "vision").map_err(|source| {
            DecodeError::Stage {
                stage: StageName::CaptionBridge.to_string(),
                source,
            }
        })?;
        let found = vision.shape().to_vec();
        let vision = vision
            .into_dimensionality::<Ix3>()
            .map_err(|_| DecodeError::Axes {
                stage: StageName::CaptionBridge.as_str(),
                found,
            })?;
        let (special, room) = (self.words.special(), self.captioner.room());
        let captions = self.captioner.greedy(vision.view(), special, room)?;
        Ok(self
            .words
            .decode(captions.first().map_or(&[], Vec::as_slice)))
    }
}
