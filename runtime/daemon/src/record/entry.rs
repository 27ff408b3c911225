//! What stands in a log: everything that happened, in the order it happened.
//!
//! A run is taken up again, and replayed, from its entries alone: what is computed from them (betas'
//! z-scores, means) is not written down a second time, and what they were computed from is.

use rtfmri::glm::{GlmSettings, Hrf, Noise};
use rtfmri::zscore::{Prior, RunningZScore, ZScoreError};
use serde::{Deserialize, Serialize};
use wire::{Tier, VolumeMessage};

use crate::acquire::TierPlan;
use crate::pipeline::AlignedVolume;

/// One entry of a run's log. New kinds are added at the end: a kind's number is its place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(
    clippy::large_enum_variant,
    reason = "the large one is first in a run and there once"
)]
pub(crate) enum RunEntry {
    /// The run began with this volume as its reference; always first.
    Began(Began),
    /// A volume is in.
    Volume(AlignedVolume),
    /// A volume came that was in already.
    Doubled {
        /// Volume of the run, from 0.
        frame: u32,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
    /// A volume came and is not used.
    Refused {
        /// Its number in the run, from 1, as its header has it.
        number: u32,
        /// Why, as a sentence's end.
        reason: String,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
    /// A volume that did not come is waited for no longer.
    Lost {
        /// Volume of the run, from 0.
        frame: u32,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
    /// A trial's response was estimated, or given up.
    Trial(StoredTrial),
    /// The run is over; a volume that comes nevertheless is taken and marked late.
    Ended {
        /// Why it is taken to be over.
        end: RunEnd,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
}

/// How a run began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Began {
    /// The volume that others are realigned to.
    pub(crate) reference: VolumeMessage,
    /// Voxels of the mask.
    pub(crate) voxels: u32,
    /// From a place of the trained space to that of the reference, LPS, millimetres; `None` where
    /// mask and volumes have one grid.
    pub(crate) registration: Option<[[f64; 4]; 4]>,
    /// How its trials are estimated, whatever the settings say later.
    pub(crate) model: StoredModel,
    /// What was known of the voxels' betas before.
    pub(crate) prior: Option<StoredPrior>,
    /// Version of the program.
    pub(crate) software: String,
    /// When, Unix milliseconds.
    pub(crate) at_ms: u64,
}

/// How a run's trials are estimated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredModel {
    /// Shape of the response.
    pub(crate) hrf: StoredHrf,
    /// Noise model.
    pub(crate) noise: StoredNoise,
    /// Seconds from onset to the first decoding; `None` where there is none.
    pub(crate) fast_s: Option<f64>,
    /// To the second.
    pub(crate) slow_s: Option<f64>,
    /// Whether trials are decoded once more when the run is over.
    pub(crate) end: bool,
    /// Slower changes than this are drift, hertz.
    pub(crate) high_pass_hz: f64,
    /// Largest share of a trial's window that may be missing.
    pub(crate) max_missing_share: f64,
    /// Whether z-scored betas of one stimulus are averaged over its repetitions so far.
    pub(crate) average_repeats: bool,
}

/// Mean and spread of each voxel's betas in earlier sessions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredPrior {
    /// `[voxel]`, scanner units.
    pub(crate) mean: Vec<f64>,
    /// `[voxel]`, scanner units.
    pub(crate) std_dev: Vec<f64>,
    /// Trials that it counts as.
    pub(crate) trials: f64,
}

impl StoredPrior {
    /// A score that begins with this.
    ///
    /// # Errors
    /// [`ZScoreError`] where its numbers are none that a prior can have.
    pub(crate) fn score(&self) -> Result<RunningZScore, ZScoreError> {
        let prior = Prior::new(self.mean.clone(), self.std_dev.clone())?;
        RunningZScore::blended(prior, self.trials)
    }
}

/// See `rtfmri::glm::Hrf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum StoredHrf {
    Glover,
    Spm,
}

/// See `rtfmri::glm::Noise`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum StoredNoise {
    Ols,
    Ar1,
}

impl StoredModel {
    /// The model as it is written down.
    pub(crate) fn of(glm: &GlmSettings, tiers: TierPlan, average_repeats: bool) -> StoredModel {
        StoredModel {
            hrf: match glm.hrf {
                Hrf::Glover => StoredHrf::Glover,
                Hrf::Spm => StoredHrf::Spm,
            },
            noise: match glm.noise {
                Noise::Ols => StoredNoise::Ols,
                Noise::Ar1 => StoredNoise::Ar1,
            },
            fast_s: tiers.fast_s,
            slow_s: tiers.slow_s,
            end: tiers.end,
            high_pass_hz: glm.high_pass_hz,
            max_missing_share: glm.max_missing_share,
            average_repeats,
        }
    }

    /// The model of a run with this TR, seconds.
    pub(crate) fn glm(&self, tr_s: f64) -> GlmSettings {
        let hrf = match self.hrf {
            StoredHrf::Glover => Hrf::Glover,
            StoredHrf::Spm => Hrf::Spm,
        };
        let noise = match self.noise {
            StoredNoise::Ols => Noise::Ols,
            StoredNoise::Ar1 => Noise::Ar1,
        };
        let usual = GlmSettings::new(tr_s, hrf, noise);
        GlmSettings {
            // The window in which volumes may be missing ends with the first decoding.
            delay_s: self.fast_s.unwrap_or(usual.delay_s),
            high_pass_hz: self.high_pass_hz,
            max_missing_share: self.max_missing_share,
            ..usual
        }
    }

    /// When trials are decoded.
    pub(crate) fn tiers(&self) -> TierPlan {
        TierPlan {
            fast_s: self.fast_s,
            slow_s: self.slow_s,
            end: self.end,
        }
    }
}

/// Why a run is taken to be over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RunEnd {
    /// Every trial has been seen and no volume follows.
    Complete,
    /// No volume follows, and trials are left.
    Stopped,
    /// Another run began, and no volume follows.
    Followed,
}

/// A trial's outcome, as it is recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredTrial {
    /// From 1.
    pub(crate) trial: u32,
    /// When it was decoded.
    pub(crate) tier: Tier,
    /// Volumes used.
    pub(crate) volumes: u32,
    /// Volumes missing among those expected.
    pub(crate) missing: u32,
    /// What was found; or why nothing was, as a sentence's end.
    pub(crate) estimate: Result<Estimate, String>,
    /// When it was estimated, Unix milliseconds.
    pub(crate) at_ms: u64,
}

/// A trial's response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Estimate {
    /// `[voxel]`, scanner units.
    pub(crate) betas: Vec<f64>,
    /// Variance of each beta, `[voxel]`, its unit squared.
    pub(crate) variance: Vec<f32>,
}

/// One entry of the session's log: what belongs to no run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum SessionEntry {
    /// A process took the session up.
    Opened {
        /// Version of the program.
        software: String,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
    /// Something an operator was told.
    Fault {
        /// The sentence.
        text: String,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
    /// A file was put aside.
    PutAside {
        /// Hash of its name, length and time.
        file: [u8; 16],
        /// Why.
        reason: String,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
    /// Pulses of the trigger line, in their order: milliseconds of the box's monotonic clock.
    Pulses(Vec<f64>),
    /// Something that happened and is no fault.
    Note {
        /// The sentence.
        text: String,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
}
