//! The single-trial general linear model.
//!
//! Each trial is fitted as soon as its response has been seen, at its onset plus
//! [`GlmSettings::delay_s`], and again with the volumes of later times ([`DecodeTimes`]). The
//! model is least squares, single (Mumford et al. 2012): one regressor for this trial
//! (`probe`), one for every other trial begun by then (`reference`), the confounds, slow
//! cosines and a constant. In order:
//!
//! 1. [`volumes_needed`] or [`DecodeTimes::volumes`] says when the trial can be fitted;
//! 2. [`Design::build`] makes the regressors at the acquired frames ([`Hrf`]);
//! 3. [`Design::fit`] solves for the probe at every voxel at once, with white or
//!    first-order autoregressive noise ([`Noise`]); [`fit_trial`] does both.
//!
//! Numbers follow nilearn 0.14 (`make_first_level_design_matrix`, `run_glm`).

mod basis;
mod decode_time;
mod design;
mod fit;
mod hrf;
#[cfg(test)]
mod reference;

use thiserror::Error;

pub use decode_time::{DecodeTime, DecodeTimes, RunLength};
pub use design::{Design, Regressor};
pub use fit::{TrialFit, fit_trial};
pub use hrf::Hrf;

/// How the noise of one voxel hangs together in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Noise {
    /// Independent from volume to volume: ordinary least squares.
    Ols,
    /// First-order autoregressive, its coefficient estimated per voxel from the residuals
    /// of ordinary least squares and truncated to 0.01.
    Ar1,
}

/// What is fixed for a run. Public fields: the ranges are checked where they are used.
#[derive(Debug, Clone, PartialEq)]
pub struct GlmSettings {
    /// Repetition time, seconds.
    pub tr_s: f64,
    /// Shape of the response.
    pub hrf: Hrf,
    /// Noise model.
    pub noise: Noise,
    /// From a trial's onset to the last volume used for it, seconds.
    pub delay_s: f64,
    /// Slower changes than this are drift, hertz.
    pub high_pass_hz: f64,
    /// Largest share of volumes that may be missing between a trial's onset and its decode
    /// time, 0 to 1.
    pub max_missing_share: f64,
}

impl GlmSettings {
    /// The usual delay (7.5 s), high-pass (0.01 Hz) and missing share (a quarter).
    #[must_use]
    pub fn new(tr_s: f64, hrf: Hrf, noise: Noise) -> Self {
        Self {
            tr_s,
            hrf,
            noise,
            delay_s: 7.5,
            high_pass_hz: 0.01,
            max_missing_share: 0.25,
        }
    }

    fn check(&self) -> Result<(), GlmError> {
        let ranges = [
            ("tr_s", self.tr_s, 0.01, 60.0),
            ("delay_s", self.delay_s, 0.0, 120.0),
            ("high_pass_hz", self.high_pass_hz, 0.0, 10.0),
            ("max_missing_share", self.max_missing_share, 0.0, 1.0),
        ];
        for (field, found, low, high) in ranges {
            if !(low..=high).contains(&found) {
                return Err(GlmError::Setting {
                    field,
                    found,
                    low,
                    high,
                });
            }
        }
        Ok(())
    }
}

/// Why a trial was not fitted.
#[derive(Debug, Clone, Error, PartialEq)]
pub enum GlmError {
    /// A setting is outside its range.
    #[error("{field} = {found} is outside {low}..={high}")]
    Setting {
        /// Field of [`GlmSettings`].
        field: &'static str,
        /// Its value.
        found: f64,
        /// Least allowed.
        low: f64,
        /// Most allowed.
        high: f64,
    },
    /// There is no such trial.
    #[error("trial {trial} of {events} events, counted from 0")]
    NoSuchTrial {
        /// Index asked for.
        trial: usize,
        /// Events given.
        events: usize,
    },
    /// An event's onset or duration is not a usable number.
    #[error("event {event} has onset {onset_s} s and duration {duration_s} s")]
    Event {
        /// Index of the event.
        event: usize,
        /// Its onset, seconds.
        onset_s: f64,
        /// Its duration, seconds.
        duration_s: f64,
    },
    /// Frame numbers do not rise strictly.
    #[error("frame {next} follows frame {frame}, frames must rise")]
    FrameOrder {
        /// The earlier row's frame.
        frame: usize,
        /// The later row's frame.
        next: usize,
    },
    /// An array has another number of rows than there are frames.
    #[error("{array} has {found} rows for {expected} frames")]
    Rows {
        /// Which array.
        array: &'static str,
        /// Frames given.
        expected: usize,
        /// Rows found.
        found: usize,
    },
    /// A volume has another number of voxels than the first.
    #[error("the volume of frame {frame} has {found} voxels, the first has {expected}")]
    Voxels {
        /// Frame number.
        frame: usize,
        /// Voxels of the first volume.
        expected: usize,
        /// Voxels of this one.
        found: usize,
    },
    /// A confound is NaN or infinite.
    #[error("confound column {column} of frame {frame} is not finite")]
    Confound {
        /// Frame number.
        frame: usize,
        /// Column, from 0.
        column: usize,
    },
    /// Volumes do not outnumber regressors.
    #[error("{volumes} volumes cannot determine {regressors} regressors")]
    TooFewVolumes {
        /// Volumes acquired by the trial's decode time.
        volumes: usize,
        /// Regressors of the design.
        regressors: usize,
    },
    /// Too many volumes are missing while the trial's response was expected.
    #[error(
        "{missing} of the {window} volumes between the trial's onset and its decode time are \
         missing, more than the share {limit}"
    )]
    MissingVolumes {
        /// Volumes missing in the window.
        missing: usize,
        /// Volumes the window should hold.
        window: usize,
        /// Largest share allowed.
        limit: f64,
    },
    /// The probe regressor is a sum of the others, or zero.
    #[error("the trial's regressor cannot be told from the other {others} regressors")]
    NotEstimable {
        /// The other regressors.
        others: usize,
    },
    /// A voxel's series holds a NaN or an infinite value.
    #[error("the series of voxel {voxel} is not finite")]
    Series {
        /// The first such voxel.
        voxel: usize,
    },
}

/// Volumes that must have been acquired before the trial with this onset can be fitted:
/// every one that starts no later than `onset_s + delay_s`. 0 where that is before the run.
#[must_use]
pub fn volumes_needed(onset_s: f64, tr_s: f64, delay_s: f64) -> usize {
    floor_index(((onset_s + delay_s) / tr_s).floor() + 1.0)
}

/// Rounds down to an index; what is below 0 or not a number becomes 0, what is too large
/// the largest index.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "truncation and saturation are what this function is for"
)]
fn floor_index(value: f64) -> usize {
    value as usize
}
