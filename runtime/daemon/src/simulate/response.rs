//! What the head answers: each trial's response at the voxels of a mask.
//!
//! A trial's regressor is its stimulus seen through the haemodynamic response, as the single-trial
//! model itself expects it (a stimulus of 3 s peaks at 0.95 with Glover's response). A beta is the
//! height of that regressor, in scanner units or in per cent of the base's value at the voxel.

use std::path::PathBuf;

use ndarray::{Array1, Array2, Array3};
use rtfmri::events::Event;
use rtfmri::glm::{self, Design, GlmSettings, Hrf};
use rtfmri::{Mask, Volume};

use super::base::{Base, count};
use super::noise::single;

/// What is known of a response after this it is over, seconds: the design's own limit.
const MAX_DELAY_S: f64 = 120.0;
/// A longer stimulus would outlast that limit.
const MAX_STIMULUS_S: f64 = 80.0;

/// Why there are no responses.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResponseError {
    /// The mask is of another grid.
    #[error("the mask does not fit the base")]
    Mask(#[from] rtfmri::MaskError),
    /// The mask has nothing in it.
    #[error("the mask {path} holds no voxel")]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// Betas of another run or another subject.
    #[error(
        "the betas {path} are {found:?}, expected [{trials}, {voxels}]: {trials} events by \
         {voxels} voxels of the mask"
    )]
    Betas {
        /// Which file.
        path: PathBuf,
        /// Its shape.
        found: Vec<usize>,
        /// Events.
        trials: usize,
        /// Voxels of the mask.
        voxels: usize,
    },
    /// Betas that are no numbers.
    #[error("the betas {path}: trial {trial}, voxel {voxel} is not finite")]
    NotFinite {
        /// Which file.
        path: PathBuf,
        /// Row, from 1.
        trial: usize,
        /// Column, from 1.
        voxel: usize,
    },
    /// A stimulus too long to be simulated.
    #[error("event {event} lasts {found} s, at most {MAX_STIMULUS_S} s can be simulated")]
    Stimulus {
        /// Row, from 1, by onset.
        event: usize,
        /// Its length, seconds.
        found: f64,
    },
    /// The regressors.
    #[error("the regressor of event {event} cannot be computed")]
    Regressor {
        /// Row, from 1, by onset.
        event: usize,
        /// Why.
        source: glm::GlmError,
    },
}

/// The mask's voxels `[slice, row, column]` in the base's arrays, in the mask's order.
///
/// # Errors
/// [`ResponseError::Mask`] where the two grids are not the same places.
pub(super) fn places(mask: &Mask, base: &Base) -> Result<Vec<[usize; 3]>, ResponseError> {
    // The mask knows how to find its voxels in a volume by world position: let it look up voxels
    // that hold their own number. Twenty-four bits are exact in single precision.
    let (slices, rows, columns) = base.volume.voxels.dim();
    let numbered = Volume {
        voxels: Array3::from_shape_fn((slices, rows, columns), |(slice, row, column)| {
            single(count((slice * rows + row) * columns + column))
        }),
        affine_lps: base.volume.affine_lps,
        header: base.volume.header.clone(),
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number that was put there above"
    )]
    let number = |value: &f32| *value as usize;
    let found = mask.sample(&numbered)?;
    let places = found.iter().map(number);
    Ok(places
        .map(|at| [at / (rows * columns), at / columns % rows, at % columns])
        .collect())
}

/// The responses of one run.
#[derive(Debug)]
pub(super) struct Responses {
    /// `[slice, row, column]` of each voxel.
    places: Vec<[usize; 3]>,
    /// `[trial, voxel]`, scanner units.
    pub(super) betas: Array2<f32>,
    /// `[volume, trial]`, dimensionless.
    regressors: Array2<f32>,
}

impl Responses {
    /// - `places`: of each voxel.
    /// - `betas`: `[trial, voxel]`, scanner units.
    pub(super) fn new(
        places: Vec<[usize; 3]>,
        betas: Array2<f32>,
        events: &[Event],
        timing: &Timing,
    ) -> Result<Responses, ResponseError> {
        let regressors = regressors(events, timing)?;
        Ok(Responses {
            places,
            betas,
            regressors,
        })
    }

    /// Adds what volume `frame` (from 0) shows.
    ///
    /// - `voxels`: `[slice, row, column]`, scanner units.
    pub(super) fn add_to(&self, voxels: &mut Array3<f32>, frame: usize) {
        let answer: Array1<f32> = self.regressors.row(frame).dot(&self.betas);
        for (place, answer) in self.places.iter().zip(&answer) {
            voxels[*place] += answer;
        }
    }

    /// The largest value of any regressor.
    pub(super) fn peak(&self) -> f32 {
        self.regressors.iter().copied().fold(0.0, f32::max)
    }
}

/// When volumes come, and how a response looks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Seconds.
    pub(super) tr_s: f64,
    /// Volumes of the run.
    pub(super) volumes: usize,
    /// Shape of the response.
    pub(super) hrf: Hrf,
}

/// Each trial's response over the run, `[volume, trial]`.
fn regressors(events: &[Event], timing: &Timing) -> Result<Array2<f32>, ResponseError> {
    let frames: Vec<usize> = (0..timing.volumes).collect();
    let last_s = count(timing.volumes.saturating_sub(1)) * timing.tr_s;
    let mut columns = Array2::zeros((timing.volumes, events.len()));
    for (trial, event) in events.iter().enumerate() {
        if event.duration_s > MAX_STIMULUS_S {
            return Err(ResponseError::Stimulus {
                event: trial + 1,
                found: event.duration_s,
            });
        }
        if event.onset_s >= last_s {
            continue;
        }
        let settings = GlmSettings {
            // The whole run, and not only what is known at the trial's decode time.
            delay_s: (last_s + timing.tr_s / 4.0 - event.onset_s).min(MAX_DELAY_S),
            high_pass_hz: 0.0,
            ..GlmSettings::new(timing.tr_s, timing.hrf, glm::Noise::Ols)
        };
        let alone = std::slice::from_ref(event);
        let design = Design::build(&settings, alone, 0, &frames, None).map_err(|source| {
            ResponseError::Regressor {
                event: trial + 1,
                source,
            }
        })?;
        for (row, &frame) in design.frames.iter().enumerate() {
            columns[[frame, trial]] = single(design.values[[row, 0]]);
        }
    }
    Ok(columns)
}

/// Betas in per cent of the base, as betas in scanner units.
pub(super) fn of_percent(betas: &mut Array2<f32>, places: &[[usize; 3]], base: &Base) {
    for (mut column, place) in betas.columns_mut().into_iter().zip(places) {
        let brightness = base.volume.voxels[*place];
        column.mapv_inplace(|beta| beta * brightness / 100.0);
    }
}

#[cfg(test)]
mod tests {
    use super::super::base::Grid;
    use super::*;

    fn base() -> Base {
        Base::synthetic(Grid {
            sides: [16, 18, 12],
            voxel_mm: [8.0, 8.0, 8.0],
        })
    }

    fn event(onset_s: f64, duration_s: f64) -> Event {
        Event::new(onset_s, duration_s, "picture")
    }

    const TIMING: Timing = Timing {
        tr_s: 1.5,
        volumes: 60,
        hrf: Hrf::Glover,
    };

    #[test]
    fn places_follow_the_masks_order() {
        let base = base();
        let voxels = base.responding(40).unwrap();
        let mask = Mask::from_voxels(base.sides(), base.affine_ras(), &voxels).unwrap();
        let found = places(&mask, &base).unwrap();
        let expected: Vec<_> = voxels.iter().map(|[i, j, k]| [*k, *j, *i]).collect();
        assert_eq!(found, expected);
        let other = Mask::from_voxels([16, 18, 11], base.affine_ras(), &voxels[..1]);
        assert!(matches!(
            places(&other.unwrap(), &base),
            Err(ResponseError::Mask(_))
        ));
    }

    #[test]
    fn responses_add_up_where_the_mask_is_and_nowhere_else() {
        let events = [event(10.0, 3.0), event(30.0, 3.0)];
        let betas = Array2::from_shape_fn((2, 2), |(trial, voxel)| {
            single(count(1 + trial * 2 + voxel))
        });
        let places = vec![[1, 2, 3], [4, 5, 6]];
        let responses = Responses::new(places, betas, &events, &TIMING).unwrap();
        // 0.95, less where no volume is taken at the peak.
        let peak = responses.peak();
        assert!((0.88..0.96).contains(&peak), "{peak}");
        let at = |frame: usize| {
            let mut voxels = Array3::zeros((12, 18, 16));
            responses.add_to(&mut voxels, frame);
            assert!(voxels.iter().filter(|value| **value != 0.0).count() <= 2);
            [voxels[[1, 2, 3]], voxels[[4, 5, 6]]]
        };
        assert_eq!(at(0), [0.0, 0.0]);
        // Some 5 s after the middle of the first stimulus, before the second.
        let [first, second] = at(11);
        assert!(
            (second / first - 2.0).abs() < 1e-5 && first > 0.8,
            "{first}"
        );
        let [first, second] = at(24);
        assert!(first > 2.0 && second > first, "{first} and {second}");
    }

    #[test]
    fn stimulus_beyond_the_design_is_refused_and_a_late_one_has_no_response() {
        let long = Responses::new(
            Vec::new(),
            Array2::zeros((1, 0)),
            &[event(0.0, 90.0)],
            &TIMING,
        );
        assert!(matches!(
            long,
            Err(ResponseError::Stimulus { event: 1, .. })
        ));
        let late = [event(-5.0, 1.0), event(500.0, 3.0)];
        let late = Responses::new(Vec::new(), Array2::zeros((2, 0)), &late, &TIMING).unwrap();
        assert_eq!(late.regressors.column(1).sum(), 0.0);
        assert!(late.regressors.column(0).sum() > 0.0);
    }

    #[test]
    fn per_cent_is_of_the_voxels_own_brightness() {
        let base = base();
        let places = vec![[6, 9, 8], [5, 9, 8]];
        let mut betas = Array2::from_elem((1, 2), 2.0);
        of_percent(&mut betas, &places, &base);
        for (beta, place) in betas.iter().zip(places) {
            assert!((beta - base.volume.voxels[place] * 0.02).abs() < 1e-3);
        }
    }
}
