//! Gaussian noise that can be drawn again.
//!
//! ChaCha20 (a counter-based generator) keyed with SHA-256 over the session's seed, the trial, the
//! tier and what the noise is for, turned into normal numbers by Box and Muller's formula with the
//! same `libm` on every machine. The same key gives the same bits everywhere, whatever was drawn
//! before for other purposes.

use std::collections::BTreeMap;

use ndarray::{ArrayD, IxDyn};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Which decoding of a trial this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// As soon as the response peaks.
    Fast,
    /// When later volumes have improved the estimate.
    Slow,
    /// At the end of the run.
    End,
}

impl Tier {
    /// The name in files.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Tier::Fast => "fast",
            Tier::Slow => "slow",
            Tier::End => "end",
        }
    }

    fn code(self) -> u8 {
        match self {
            Tier::Fast => 0,
            Tier::Slow => 1,
            Tier::End => 2,
        }
    }
}

/// What all noise of one decoding is derived from; recorded with the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoiseKey {
    /// Seed of the session.
    pub session_seed: u64,
    /// Run within the session.
    pub run: u32,
    /// Trial within the run.
    pub trial: u32,
    /// Which decoding of the trial.
    pub tier: Tier,
}

/// What a sequence of noise is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    /// The diffusion prior.
    Prior,
    /// unCLIP's starting point.
    Unclip,
    /// Noise between unCLIP's steps.
    UnclipSteps,
    /// The refiner: its encoder's sample, then its starting point.
    Refiner,
    /// Noise between the refiner's steps.
    RefinerSteps,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Stream::Prior => b"prior",
            Stream::Unclip => b"unclip",
            Stream::UnclipSteps => b"unclip-steps",
            Stream::Refiner => b"refiner",
            Stream::RefinerSteps => b"refiner-steps",
        }
    }
}

/// A sequence of standard normal numbers.
#[derive(Clone, Debug)]
pub struct Noise {
    generator: ChaCha20Rng,
    spare: Option<f32>,
}

impl Noise {
    /// The sequence of a key for one purpose.
    #[must_use]
    pub fn new(key: NoiseKey, stream: Stream) -> Noise {
        let mut hash = Sha256::new();
        hash.update(b"afterimage noise 1");
        hash.update(key.session_seed.to_le_bytes());
        hash.update(key.run.to_le_bytes());
        hash.update(key.trial.to_le_bytes());
        hash.update([key.tier.code()]);
        hash.update(stream.name());
        Noise {
            generator: ChaCha20Rng::from_seed(hash.finalize().into()),
            spare: None,
        }
    }

    /// The next numbers, in row-major order.
    pub fn draw(&mut self, shape: &[usize]) -> ArrayD<f32> {
        ArrayD::from_shape_simple_fn(IxDyn(shape), || self.next())
    }

    fn next(&mut self) -> f32 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        let (first, second) = (self.uniform(), self.uniform());
        let radius = libm::sqrt(-2.0 * libm::log(first));
        let (sine, cosine) = libm::sincos(std::f64::consts::TAU * second);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "single precision is what the networks take"
        )]
        let (value, spare) = ((radius * cosine) as f32, (radius * sine) as f32);
        self.spare = Some(spare);
        value
    }

    /// In (0, 1]: the logarithm above never sees zero.
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact in f64")]
    fn uniform(&mut self) -> f64 {
        ((self.generator.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

/// Draws standard normal numbers for one purpose, row-major in the given shape.
pub type Draw<'d> = dyn FnMut(Stream, &[usize]) -> ArrayD<f32> + 'd;

/// All sequences of one key, each begun when it is first needed.
#[derive(Clone, Debug)]
pub struct KeyedNoise {
    key: NoiseKey,
    streams: BTreeMap<Stream, Noise>,
}

impl KeyedNoise {
    /// The sequences of a key.
    #[must_use]
    pub fn new(key: NoiseKey) -> KeyedNoise {
        KeyedNoise {
            key,
            streams: BTreeMap::new(),
        }
    }

    /// The next numbers for one purpose.
    pub fn draw(&mut self, stream: Stream, shape: &[usize]) -> ArrayD<f32> {
        let key = self.key;
        let noise = self.streams.entry(stream);
        noise.or_insert_with(|| Noise::new(key, stream)).draw(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: NoiseKey = NoiseKey {
        session_seed: 7,
        run: 0,
        trial: 3,
        tier: Tier::Fast,
    };

    #[test]
    fn the_same_key_gives_the_same_numbers() {
        let first = Noise::new(KEY, Stream::Prior).draw(&[3, 5]);
        let again = Noise::new(KEY, Stream::Prior).draw(&[3, 5]);
        assert_eq!(first, again);
    }

    #[test]
    fn every_part_of_the_key_changes_the_numbers() {
        let first = Noise::new(KEY, Stream::Prior).draw(&[8]);
        let others = [
            Noise::new(
                NoiseKey {
                    session_seed: 8,
                    ..KEY
                },
                Stream::Prior,
            ),
            Noise::new(NoiseKey { run: 1, ..KEY }, Stream::Prior),
            Noise::new(NoiseKey { trial: 4, ..KEY }, Stream::Prior),
            Noise::new(
                NoiseKey {
                    tier: Tier::Slow,
                    ..KEY
                },
                Stream::Prior,
            ),
            Noise::new(KEY, Stream::Unclip),
        ];
        for mut other in others {
            assert_ne!(first, other.draw(&[8]));
        }
    }

    #[test]
    fn numbers_are_standard_normal() {
        let values = Noise::new(KEY, Stream::Unclip)
            .draw(&[200_000])
            .mapv(f64::from);
        let mean = values.mean().unwrap();
        let variance = values.mapv(|value| (value - mean).powi(2)).mean().unwrap();
        let beyond_two = values.iter().filter(|value| value.abs() > 2.0).count();
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((variance - 1.0).abs() < 0.02, "{variance}");
        // P(|x| > 2) = 0.0455.
        assert!((8_700..9_500).contains(&beyond_two), "{beyond_two}");
    }
}
