//! The design of one trial: which regressors, and their values at the acquired frames.

use std::f64::consts::PI;
use std::fmt;

use ndarray::{Array2, ArrayView2};

use super::hrf::Convolution;
use super::{GlmError, GlmSettings, floor_index, volumes_needed};
use crate::events::Event;

/// Slow cosines beyond this are a mistake in the settings, and would be allocated.
const MAX_DRIFTS: usize = 1 << 10;

/// What a column of the design stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Regressor {
    /// The trial that is fitted.
    Probe,
    /// All other trials begun so far.
    Reference,
    /// A confound, by its column.
    Confound(usize),
    /// A slow cosine, by its number of half periods.
    Drift(usize),
    /// One everywhere.
    Constant,
}

impl fmt::Display for Regressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Probe => f.write_str("probe"),
            Self::Reference => f.write_str("reference"),
            Self::Confound(column) => write!(f, "confound_{column}"),
            Self::Drift(half_periods) => write!(f, "drift_{half_periods}"),
            Self::Constant => f.write_str("constant"),
        }
    }
}

/// The regressors of one trial at its decode time.
#[derive(Debug, Clone, PartialEq)]
pub struct Design {
    /// What each column is: probe, reference (if another trial has begun), confounds,
    /// drift, constant.
    pub regressors: Vec<Regressor>,
    /// `[volume, regressor]`; one row per acquired frame of the trial.
    pub values: Array2<f64>,
    /// Frame number of each row.
    pub frames: Vec<usize>,
}

impl Design {
    /// Makes the design of `events[trial]` at its decode time.
    ///
    /// The regressors are those of the whole run so far; rows whose volume is missing are
    /// left out.
    ///
    /// - `frames`: frame number (0 = first volume of the run) of each acquired volume,
    ///   rising; those after the decode time are not used.
    /// - `confounds`: `[volume, confound]`, one row per entry of `frames`.
    ///
    /// # Errors
    /// [`GlmError`] when an argument is out of range, when too many volumes of the trial's
    /// window are missing, or when volumes do not outnumber regressors.
    pub fn build(
        settings: &GlmSettings,
        events: &[Event],
        trial: usize,
        frames: &[usize],
        confounds: Option<ArrayView2<'_, f64>>,
    ) -> Result<Self, GlmError> {
        settings.check()?;
        let probe = find(events, trial)?;
        let volumes = volumes_needed(probe.onset_s, settings.tr_s, settings.delay_s);
        Self::build_at(settings, events, trial, volumes, frames, confounds)
    }

    /// Makes the design of `events[trial]` at any later time of the run.
    ///
    /// - `volumes`: volumes of the run so far, missing ones included; see
    ///   [`DecodeTimes::volumes`](super::DecodeTimes::volumes). Every trial begun by the last of
    ///   them is in the design.
    ///
    /// The other arguments and the errors are those of [`Design::build`]; the share of missing
    /// volumes is that of the same window, from the onset to `settings.delay_s` after it: later
    /// volumes do not make up for a peak that nobody saw.
    ///
    /// # Errors
    /// [`GlmError`].
    pub fn build_at(
        settings: &GlmSettings,
        events: &[Event],
        trial: usize,
        volumes: usize,
        frames: &[usize],
        confounds: Option<ArrayView2<'_, f64>>,
    ) -> Result<Self, GlmError> {
        settings.check()?;
        let probe = find(events, trial)?;
        check_events(events)?;
        check_frames(frames, confounds)?;

        let rows = frames.partition_point(|&frame| frame < volumes);
        let frames = &frames[..rows];
        if rows < 2 {
            return Err(GlmError::TooFewVolumes {
                volumes: rows,
                regressors: 2,
            });
        }
        check_window(settings, probe, volumes, frames)?;

        let last_s = (volumes - 1) as f64 * settings.tr_s;
        let others: Vec<(f64, f64)> = events
            .iter()
            .enumerate()
            .filter(|(i, event)| *i != trial && event.onset_s <= last_s)
            .map(|(_, event)| (event.onset_s, event.duration_s))
            .collect();
        let confound_columns = confounds.map_or(0, |confounds| confounds.ncols());
        // floor(2 n f TR) half periods, as SPM and nilearn count them, and with nilearn's TR: a product
        // that is a whole number must fall to the same side of its rounding.
        let step_s = if volumes > 1 {
            last_s / (volumes - 1) as f64
        } else {
            settings.tr_s
        };
        let drifts =
            floor_index(2.0 * volumes as f64 * settings.high_pass_hz * step_s).min(volumes - 1);

        let regressors: Vec<Regressor> = std::iter::once(Regressor::Probe)
            .chain((!others.is_empty()).then_some(Regressor::Reference))
            .chain((0..confound_columns).map(Regressor::Confound))
            .chain((1..=drifts.min(MAX_DRIFTS)).map(Regressor::Drift))
            .chain([Regressor::Constant])
            .collect();
        if rows <= regressors.len() || drifts > MAX_DRIFTS {
            return Err(GlmError::TooFewVolumes {
                volumes: rows,
                regressors: regressors.len(),
            });
        }

        let convolution = Convolution::new(settings.hrf, settings.tr_s, volumes);
        let probe = convolution.regressor(&[(probe.onset_s, probe.duration_s)], frames);
        let reference = convolution.regressor(&others, frames);
        let cosine = CosineDrift::new(volumes);
        let values = Array2::from_shape_fn((rows, regressors.len()), |(row, column)| {
            match regressors[column] {
                Regressor::Probe => probe[row],
                Regressor::Reference => reference[row],
                Regressor::Confound(column) => confounds.map_or(0.0, |c| c[[row, column]]),
                Regressor::Drift(half_periods) => cosine.value(half_periods, frames[row]),
                Regressor::Constant => 1.0,
            }
        });
        Ok(Self {
            regressors,
            values,
            frames: frames.to_vec(),
        })
    }
}

/// The type-II discrete cosine basis over all volumes of the run so far.
struct CosineDrift {
    volumes: f64,
    scale: f64,
}

impl CosineDrift {
    fn new(volumes: usize) -> Self {
        let volumes = volumes as f64;
        Self {
            volumes,
            scale: (2.0 / volumes).sqrt(),
        }
    }

    fn value(&self, half_periods: usize, frame: usize) -> f64 {
        let phase = PI / self.volumes * (frame as f64 + 0.5) * half_periods as f64;
        self.scale * phase.cos()
    }
}

fn find(events: &[Event], trial: usize) -> Result<&Event, GlmError> {
    events.get(trial).ok_or(GlmError::NoSuchTrial {
        trial,
        events: events.len(),
    })
}

fn check_events(events: &[Event]) -> Result<(), GlmError> {
    let usable = |event: &Event| {
        event.onset_s.is_finite() && event.duration_s.is_finite() && event.duration_s >= 0.0
    };
    match events.iter().position(|event| !usable(event)) {
        None => Ok(()),
        Some(event) => Err(GlmError::Event {
            event,
            onset_s: events[event].onset_s,
            duration_s: events[event].duration_s,
        }),
    }
}

fn check_frames(frames: &[usize], confounds: Option<ArrayView2<'_, f64>>) -> Result<(), GlmError> {
    if let Some(pair) = frames.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(GlmError::FrameOrder {
            frame: pair[0],
            next: pair[1],
        });
    }
    let Some(confounds) = confounds else {
        return Ok(());
    };
    if confounds.nrows() != frames.len() {
        return Err(GlmError::Rows {
            array: "confounds",
            expected: frames.len(),
            found: confounds.nrows(),
        });
    }
    match confounds
        .indexed_iter()
        .find(|(_, value)| !value.is_finite())
    {
        None => Ok(()),
        Some(((row, column), _)) => Err(GlmError::Confound {
            frame: frames[row],
            column,
        }),
    }
}

/// Counts the volumes missing from the first at or after the onset to the last used or the
/// last of the delay, whichever is earlier.
fn check_window(
    settings: &GlmSettings,
    probe: &Event,
    volumes: usize,
    frames: &[usize],
) -> Result<(), GlmError> {
    let first = floor_index((probe.onset_s / settings.tr_s).ceil()).min(volumes);
    let peak = volumes_needed(probe.onset_s, settings.tr_s, settings.delay_s);
    let end = volumes.min(peak).max(first);
    let window = end - first;
    let before = |end| frames.partition_point(|&frame| frame < end);
    let present = before(end) - before(first);
    let missing = window - present;
    if missing as f64 > settings.max_missing_share * window as f64 {
        return Err(GlmError::MissingVolumes {
            missing,
            window,
            limit: settings.max_missing_share,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::glm::{Hrf, Noise};

    /// Where 2 n f TR is a whole number, nilearn 0.14.1 (`make_first_level_design_matrix`, high_pass 0.01)
    /// falls to the one side or the other by its own order of operations.
    #[test]
    fn drifts_are_counted_as_the_reference_counts_them() {
        for (tr_s, expected) in [(0.4, 2), (0.8, 5), (1.6, 11)] {
            let events = [Event::new(20.0, 3.0, "a"), Event::new(40.0, 3.0, "b")];
            let settings = GlmSettings::new(tr_s, Hrf::Glover, Noise::Ols);
            let frames: Vec<usize> = (0..375).collect();
            let design = Design::build_at(&settings, &events, 1, 375, &frames, None).unwrap();
            let drifts = design.regressors.iter();
            let drifts = drifts.filter(|regressor| matches!(regressor, Regressor::Drift(_)));
            assert_eq!(drifts.count(), expected, "TR {tr_s} s");
        }
    }
}
