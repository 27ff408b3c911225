//! What a run is: all that its entries say, and what follows from them.
//!
//! No clock, no file: the same entries give the same state, betas and messages, live, after a
//! restart and at replay.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::{Array1, ArrayView2};
use rtfmri::events::Event;
use rtfmri::glm::{self, DecodeTimes, GlmError, GlmSettings, TrialFit};
use rtfmri::zscore::{RepeatAverage, RunningZScore, ZScoreError};
use wire::{Tier, TrialMessage};

use crate::pipeline::{self, AlignedVolume, StartKnown};
use crate::record::entry::{Began, Estimate, RunEnd, RunEntry, StoredTrial};

/// When trials are decoded, seconds after their onset; `None` where a tier is left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TierPlan {
    /// As soon as the response peaks.
    pub(crate) fast_s: Option<f64>,
    /// When later volumes have improved the estimate.
    pub(crate) slow_s: Option<f64>,
    /// Whether once more when the run is over.
    pub(crate) end: bool,
}

/// Betas of one tier.
struct TierState {
    /// Trials that were estimated or given up; they are taken in their order, because each is
    /// standardised over those before it.
    next: usize,
    zscore: RunningZScore,
    /// Where repetitions of a stimulus are averaged.
    repeats: Option<RepeatAverage>,
    betas: Vec<Option<Array1<f64>>>,
    zbetas: Vec<Option<Array1<f64>>>,
}

impl TierState {
    /// Z-scores a trial over those so far and, where that is asked for, averages it with the
    /// repetitions of its stimulus so far.
    fn score(&mut self, betas: &Array1<f64>, stimulus: &str) -> Result<Array1<f64>, ZScoreError> {
        let zbetas = self.zscore.push(betas.view())?;
        match &mut self.repeats {
            Some(repeats) => Ok(repeats.push(stimulus, zbetas.view())?.0),
            None => Ok(zbetas),
        }
    }
}

/// A volume without its voxels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// When its file arrived, Unix milliseconds.
    pub(crate) arrived_ms: u64,
    /// When its acquisition began, Unix milliseconds, where pulses tell.
    pub(crate) pulse_ms: Option<f64>,
    /// Hash of its file's name.
    pub(crate) file: [u8; 16],
}

/// The run's masked voxels, by rising frame.
struct Series {
    voxels: usize,
    frames: Vec<usize>,
    values: Vec<f32>,
}

impl Series {
    /// Puts a volume where its frame belongs; almost always at the end.
    fn insert(&mut self, frame: usize, voxels: &[f32]) {
        let row = self.frames.partition_point(|&known| known < frame);
        let at = row * self.voxels;
        self.frames.insert(row, frame);
        if at == self.values.len() {
            self.values.extend_from_slice(voxels);
        } else {
            self.values.splice(at..at, voxels.iter().copied());
        }
    }

    /// Frames, and `[volume, voxel]`; `None` where the two have come apart, which `insert` prevents.
    fn view(&self) -> Option<(&[usize], ArrayView2<'_, f32>)> {
        let shape = (self.frames.len(), self.voxels);
        let values = ArrayView2::from_shape(shape, &self.values).ok()?;
        Some((&self.frames, values))
    }
}

/// All that is known of a run.
pub(crate) struct State {
    /// The stimuli, by onset; empty where the events file could not be used.
    events: Vec<Event>,
    glm: GlmSettings,
    plan: TierPlan,
    /// Hash of its series' UID.
    pub(crate) series: [u8; 16],
    /// Hash of its patient module, for comparing alone.
    pub(crate) patient: u64,
    /// Repetition time, milliseconds.
    pub(crate) tr_ms: f64,
    places: BTreeMap<u32, Place>,
    samples: Series,
    lost: BTreeSet<u32>,
    tiers: [TierState; 3],
    ended: Option<RunEnd>,
}

/// What taking an entry gave.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Nothing to tell.
    Noted,
    /// A trial is ready to decode.
    Ready(TrialMessage),
    /// A trial has no betas in this tier.
    Skipped {
        /// From 1.
        trial: u32,
        /// When it was to be decoded.
        tier: Tier,
        /// Why, as a sentence's end.
        reason: String,
    },
}

impl State {
    /// The state of a run that has just begun; its reference is still to be taken as a volume.
    pub(crate) fn begin(events: Vec<Event>, began: &Began) -> State {
        let voxels = began.voxels as usize;
        // A prior was checked before it was written down; one that is wrong nevertheless is none.
        let prior = began.prior.as_ref();
        let prior = prior
            .filter(|prior| prior.mean.len() == voxels)
            .and_then(|prior| prior.score().ok());
        let average = began.model.average_repeats;
        let tier = || TierState {
            next: 0,
            zscore: prior.clone().unwrap_or_else(|| RunningZScore::new(voxels)),
            repeats: average.then(|| RepeatAverage::new(&events, voxels)),
            betas: Vec::new(),
            zbetas: Vec::new(),
        };
        let tiers = [tier(), tier(), tier()];
        State {
            events,
            glm: began.model.glm(began.reference.tr_ms / 1e3),
            plan: began.model.tiers(),
            series: began.reference.series,
            patient: began.reference.patient,
            tr_ms: began.reference.tr_ms,
            places: BTreeMap::new(),
            samples: Series {
                voxels,
                frames: Vec::new(),
                values: Vec::new(),
            },
            lost: BTreeSet::new(),
            tiers,
            ended: None,
        }
    }

    /// Takes what happened.
    ///
    /// - `run`: the run's number, for the message of a trial.
    pub(crate) fn take(&mut self, run: u32, entry: RunEntry) -> Taken {
        match entry {
            RunEntry::Volume(volume) => self.take_volume(&volume),
            RunEntry::Lost { frame, .. } => {
                self.lost.insert(frame);
            }
            RunEntry::Ended { end, .. } => self.ended = Some(end),
            RunEntry::Trial(trial) => return self.take_trial(run, trial),
            RunEntry::Began(_) | RunEntry::Doubled { .. } | RunEntry::Refused { .. } => {}
        }
        Taken::Noted
    }

    fn take_volume(&mut self, volume: &AlignedVolume) {
        // A record of another mask is not taken up; what is wrong nevertheless is left out.
        if volume.voxels.len() != self.samples.voxels || self.places.contains_key(&volume.frame) {
            return;
        }
        self.samples.insert(volume.frame as usize, &volume.voxels);
        let place = Place {
            arrived_ms: volume.arrived_ms,
            pulse_ms: match volume.start.known {
                StartKnown::Pulse | StartKnown::Bridged => Some(volume.start.at_ms),
                StartKnown::Header | StartKnown::Arrival => None,
            },
            file: volume.file,
        };
        self.places.insert(volume.frame, place);
        self.lost.remove(&volume.frame);
        // A run that goes on was not over.
        self.ended = None;
    }

    fn take_trial(&mut self, run: u32, stored: StoredTrial) -> Taken {
        let (number, tier) = (stored.trial, stored.tier);
        let voxels = self.samples.voxels;
        let betas = stored.estimate.and_then(|estimate| {
            let found = estimate.betas.len();
            let fits = found == voxels;
            fits.then(|| Array1::from(estimate.betas))
                .ok_or_else(|| format!("{found} betas where {voxels} voxels are expected"))
        });
        let state = &mut self.tiers[tier as usize];
        let stimulus = self.events.get(state.next).map(Event::stimulus_name);
        state.next += 1;
        let scored = match &betas {
            Ok(betas) => state
                .score(betas, stimulus.unwrap_or_default())
                .map_err(|error| error.to_string()),
            Err(reason) => Err(reason.clone()),
        };
        state.zbetas.push(scored.as_ref().ok().cloned());
        state.betas.push(betas.ok());
        let trial = state.next - 1;
        match scored {
            Ok(zbetas) => Taken::Ready(self.message(
                run,
                tier,
                trial,
                (stored.volumes, stored.missing),
                &zbetas,
            )),
            Err(reason) => Taken::Skipped {
                trial: number,
                tier,
                reason,
            },
        }
    }

    /// The stimuli.
    pub(crate) fn events(&self) -> &[Event] {
        &self.events
    }

    /// Voxels of the mask.
    pub(crate) fn voxels(&self) -> usize {
        self.samples.voxels
    }

    /// Volumes that are in, by frame.
    pub(crate) fn places(&self) -> &BTreeMap<u32, Place> {
        &self.places
    }

    /// Whether the run is taken to be over.
    pub(crate) fn ended(&self) -> Option<RunEnd> {
        self.ended
    }

    /// One more than the highest frame that is in.
    pub(crate) fn highest(&self) -> u32 {
        self.places
            .last_key_value()
            .map_or(0, |(frame, _)| frame + 1)
    }

    /// Frames below `end` that are neither in nor given up, and below the highest.
    pub(crate) fn holes(&self, end: u32) -> impl Iterator<Item = u32> + '_ {
        let end = end.min(self.highest());
        (0..end).filter(|frame| !self.places.contains_key(frame) && !self.lost.contains(frame))
    }

    /// Volumes that must have come before a trial can be decoded in a tier; `None` where it is not.
    fn needed(&self, tier: Tier, trial: usize) -> Option<u32> {
        let event = self.events.get(trial)?;
        let delay_s = match tier {
            Tier::Fast => self.plan.fast_s?,
            Tier::Slow => self.plan.slow_s?,
            Tier::End if self.plan.end && self.ended.is_some() => return Some(self.highest()),
            Tier::End => return None,
        };
        let needed = glm::volumes_needed(event.onset_s, self.glm.tr_s, delay_s);
        Some(count(needed))
    }

    /// Volumes that the last trial needs in the first tier.
    pub(crate) fn needed_by_all(&self) -> u32 {
        let last = self.events.len().checked_sub(1);
        let needed = |tier| last.and_then(|last| self.needed(tier, last));
        needed(Tier::Fast)
            .or_else(|| needed(Tier::Slow))
            .unwrap_or(0)
    }

    /// Trials of the first tier that are not decoded.
    pub(crate) fn waiting(&self) -> usize {
        let tier = match (self.plan.fast_s, self.plan.slow_s) {
            (Some(_), _) => Tier::Fast,
            (None, Some(_)) => Tier::Slow,
            (None, None) => Tier::End,
        };
        let next = self.tiers[tier as usize].next;
        self.events.len().saturating_sub(next)
    }

    /// The next trial that can be decoded, earlier tiers first.
    pub(crate) fn due(&self) -> Option<(Tier, usize)> {
        Tier::ALL.into_iter().find_map(|tier| {
            let trial = self.tiers[tier as usize].next;
            let needed = self.needed(tier, trial)?;
            let highest = self.highest();
            if tier == Tier::End {
                // What ended before the response peaked has none.
                let onset_s = self.events.get(trial)?.onset_s;
                let peak = glm::volumes_needed(
                    onset_s,
                    self.glm.tr_s,
                    DecodeTimes::default().end_of_run_s,
                );
                return (count(peak) <= highest).then_some((tier, trial));
            }
            let complete = highest > 0 && highest >= needed && self.holes(needed).next().is_none();
            complete.then_some((tier, trial))
        })
    }

    /// Estimates a trial from the volumes that are in.
    ///
    /// - `at_ms`: now, Unix milliseconds.
    pub(crate) fn fit(&self, tier: Tier, trial: usize, at_ms: u64) -> StoredTrial {
        let needed = self.needed(tier, trial).unwrap_or(0);
        let have = count(self.places.range(..needed).count());
        let fitted = match self.samples.view() {
            Some((frames, series)) => pipeline::fit_trial(
                &self.glm,
                &self.events,
                trial,
                needed as usize,
                frames,
                series,
            ),
            None => Err(GlmError::Rows {
                array: "series",
                expected: self.samples.frames.len(),
                found: 0,
            }),
        };
        #[expect(clippy::cast_possible_truncation, reason = "a variance needs no more")]
        let estimate = |fit: TrialFit| Estimate {
            betas: fit.betas.to_vec(),
            variance: fit.variance.iter().map(|&value| value as f32).collect(),
        };
        StoredTrial {
            trial: count(trial + 1),
            tier,
            volumes: have,
            missing: needed.saturating_sub(have),
            estimate: fitted.map(estimate).map_err(|error| error.to_string()),
            at_ms,
        }
    }

    /// Every trial that is estimated so far, ready to decode.
    pub(crate) fn messages(&self, run: u32) -> Vec<TrialMessage> {
        let mut messages = Vec::new();
        for tier in Tier::ALL {
            for (trial, zbetas) in self.tiers[tier as usize].zbetas.iter().enumerate() {
                let Some(zbetas) = zbetas else { continue };
                let needed = self.needed(tier, trial).unwrap_or(0);
                let have = count(self.places.range(..needed).count());
                let volumes = (have, needed.saturating_sub(have));
                messages.push(self.message(run, tier, trial, volumes, zbetas));
            }
        }
        messages
    }

    fn message(
        &self,
        run: u32,
        tier: Tier,
        trial: usize,
        (volumes, missing): (u32, u32),
        zbetas: &Array1<f64>,
    ) -> TrialMessage {
        let onset_s = self.events.get(trial).map_or(0.0, |e| e.onset_s);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "networks take single precision"
        )]
        let zbetas = zbetas.iter().map(|&value| value as f32).collect();
        TrialMessage {
            run,
            trial: count(trial + 1),
            tier,
            onset_s,
            stimulus_at_ms: self.wall_clock_ms(onset_s),
            volumes,
            missing,
            zbetas,
        }
    }

    /// When a time of the run was, Unix milliseconds: by the pulses of the volumes around it, else by
    /// their arrival. Volume `n` begins `n` TR after the run and arrives when it is complete.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "milliseconds and volume numbers are far below 2^52, and negative times saturate"
    )]
    fn wall_clock_ms(&self, time_s: f64) -> Option<u64> {
        let at = time_s / self.glm.tr_s;
        let frame = at.max(0.0) as u32;
        let (before, after) = (
            self.places.range(..=frame).next_back(),
            self.places.range(frame.saturating_add(1)..).next(),
        );
        if let Some((place, pulse_ms)) = before.and_then(|(n, place)| Some((n, place.pulse_ms?))) {
            return Some((pulse_ms + (at - f64::from(*place)) * self.tr_ms).max(0.0) as u64);
        }
        let arrival =
            |(frame, place): (&u32, &Place)| (f64::from(*frame) + 1.0, place.arrived_ms as f64);
        let (n, ms) = before.or(after).map(arrival)?;
        // The pace around this place: real time on a scanner, faster in a simulation.
        let pace = match after.map(arrival) {
            Some((next, next_ms)) if next > n => (next_ms - ms) / (next - n),
            _ => self.tr_ms,
        };
        Some((ms + (at - n) * pace).max(0.0) as u64)
    }

    /// Betas and z-scored betas of a tier, by trial; `None` where a trial has none.
    pub(crate) fn arrays(&self, tier: Tier) -> [&[Option<Array1<f64>>]; 2] {
        let state = &self.tiers[tier as usize];
        [&state.betas, &state.zbetas]
    }
}

/// A count that is shown or sent; far below 2^32 everywhere it is used.
fn count(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rtfmri::glm::{Hrf, Noise};
    use wire::{VolumeMessage, VolumeQuality};

    use super::*;
    use crate::pipeline::VolumeStart;
    use crate::record::entry::{StoredModel, StoredPrior};

    const VOXELS: usize = 5;
    const VOLUMES: u32 = 50;

    fn begun() -> State {
        begun_with(false, None)
    }

    fn begun_with(average_repeats: bool, prior: Option<StoredPrior>) -> State {
        let tiers = TierPlan {
            fast_s: Some(7.5),
            slow_s: Some(20.0),
            end: true,
        };
        let began = Began {
            reference: VolumeMessage {
                tr_ms: 1500.0,
                ..crate::pipeline::tests::message(1)
            },
            voxels: u32::try_from(VOXELS).unwrap(),
            registration: None,
            model: StoredModel::of(
                &GlmSettings::new(1.0, Hrf::Glover, Noise::Ar1),
                tiers,
                average_repeats,
            ),
            prior,
            software: "test".into(),
            at_ms: 0,
        };
        let table: String = (0..6)
            .map(|trial| {
                // The first two stimuli come again at the end.
                let picture = trial % 4;
                format!("{}\t3\tpicture{picture}\n", 4.5 + 9.0 * f64::from(trial))
            })
            .collect();
        let table = format!("onset\tduration\ttrial_type\n{table}");
        State::begin(rtfmri::events::parse(table.as_bytes()).unwrap(), &began)
    }

    fn volume(frame: u32) -> RunEntry {
        let voxels = (0..VOXELS).map(|voxel| {
            // Any numbers that no design spans.
            let mixed =
                (frame * 31 + u32::try_from(voxel).unwrap() * 7).wrapping_mul(2_654_435_761);
            1000.0 + f32::from(mixed.to_be_bytes()[0])
        });
        RunEntry::Volume(AlignedVolume {
            frame,
            motion: [0.0; 6],
            voxels: voxels.collect(),
            start: VolumeStart {
                at_ms: f64::from(frame) * 1500.0,
                known: StartKnown::Arrival,
            },
            quality: VolumeQuality::default(),
            late: false,
            arrived_ms: u64::from(frame) * 1500,
            file: [0; 16],
        })
    }

    fn fit_all(state: &mut State) -> Vec<(Tier, usize)> {
        let mut fitted = Vec::new();
        while let Some((tier, trial)) = state.due() {
            fitted.push((tier, trial));
            let stored = state.fit(tier, trial, 0);
            let _ = state.take(1, RunEntry::Trial(stored));
        }
        fitted
    }

    fn ended() -> RunEntry {
        RunEntry::Ended {
            end: RunEnd::Complete,
            at_ms: 0,
        }
    }

    /// Every volume in order, trials as soon as they are due.
    fn in_order() -> State {
        run_of(begun())
    }

    fn run_of(mut state: State) -> State {
        for frame in 0..VOLUMES {
            let _ = state.take(1, volume(frame));
            fit_all(&mut state);
        }
        let _ = state.take(1, ended());
        fit_all(&mut state);
        state
    }

    #[test]
    fn every_trial_is_decoded_early_later_and_at_the_end() {
        let state = in_order();
        for tier in Tier::ALL {
            let [betas, zbetas] = state.arrays(tier);
            assert_eq!(betas.len(), 6, "{tier}");
            assert!(zbetas.iter().all(Option::is_some), "{tier}");
        }
        let [fast, _] = state.arrays(Tier::Fast);
        let [end, _] = state.arrays(Tier::End);
        assert_ne!(fast, end);
        assert_eq!(state.messages(1).len(), 18);
    }

    #[test]
    fn repetitions_are_averaged_where_that_is_asked_for() {
        let (single, averaged) = (in_order(), run_of(begun_with(true, None)));
        for tier in Tier::ALL {
            let [betas, each] = single.arrays(tier);
            let [same, mean] = averaged.arrays(tier);
            assert_eq!(betas, same);
            assert_eq!(each[..4], mean[..4]);
            let expected = (each[0].clone().unwrap() + each[4].as_ref().unwrap()) / 2.0;
            let off = (expected - mean[4].as_ref().unwrap()).mapv(f64::abs);
            assert!(off.iter().all(|off| *off < 1e-12), "{tier}: {off}");
        }
    }

    #[test]
    fn a_prior_makes_the_first_trials_scores_useful() {
        let prior = StoredPrior {
            mean: vec![10.0; VOXELS],
            std_dev: vec![4.0; VOXELS],
            trials: 1e6,
        };
        let state = run_of(begun_with(false, Some(prior)));
        let [betas, zbetas] = state.arrays(Tier::Fast);
        let (beta, zbeta) = (betas[0].as_ref().unwrap(), zbetas[0].as_ref().unwrap());
        for (beta, zbeta) in beta.iter().zip(zbeta) {
            // Of so many trials one moves nothing.
            assert!((zbeta - (beta - 10.0) / 4.0).abs() < 1e-3 * beta.abs().max(1.0));
        }
        let [_, without] = in_order().arrays(Tier::Fast).map(<[_]>::to_vec);
        assert!(
            without[0]
                .as_ref()
                .unwrap()
                .iter()
                .all(|zbeta| *zbeta == 0.0)
        );
    }

    #[test]
    fn a_trial_waits_for_a_hole_until_it_is_given_up() {
        let mut state = begun();
        for frame in (0..20).filter(|frame| *frame != 5) {
            let _ = state.take(1, volume(frame));
        }
        assert_eq!(state.due(), None);
        let lost = RunEntry::Lost { frame: 5, at_ms: 0 };
        let _ = state.take(1, lost);
        assert_eq!(state.due(), Some((Tier::Fast, 0)));
        assert_eq!(state.fit(Tier::Fast, 0, 0).missing, 1);
        // A late volume is used from then on.
        let _ = state.take(1, volume(5));
        assert_eq!(state.fit(Tier::Fast, 0, 0).missing, 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_order_in_which_volumes_come_changes_no_beta(
            order in Just((0..VOLUMES).collect::<Vec<_>>()).prop_shuffle(),
            doubles in prop::collection::vec(0..VOLUMES, 0..10),
        ) {
            let expected = in_order();
            let mut state = begun();
            for frame in order.into_iter().chain(doubles) {
                let _ = state.take(1, volume(frame));
                fit_all(&mut state);
            }
            let _ = state.take(1, ended());
            fit_all(&mut state);
            for tier in Tier::ALL {
                prop_assert_eq!(state.arrays(tier), expected.arrays(tier));
            }
        }

        #[test]
        fn whatever_a_log_says_is_no_panic(
            entries in prop::collection::vec((0_u8..5, 0_u32..60, 0_usize..8), 0..80),
        ) {
            let mut state = begun();
            for (kind, frame, voxels) in entries {
                let entry = match kind {
                    0 => volume(frame),
                    1 => RunEntry::Lost { frame, at_ms: 0 },
                    2 => ended(),
                    3 => RunEntry::Refused { number: frame, reason: "no".into(), at_ms: 0 },
                    _ => RunEntry::Trial(StoredTrial {
                        trial: frame,
                        tier: Tier::ALL[voxels % 3],
                        volumes: 1,
                        missing: 0,
                        estimate: Ok(Estimate {
                            betas: vec![1.0; voxels],
                            variance: Vec::new(),
                        }),
                        at_ms: 0,
                    }),
                };
                let _ = state.take(1, entry);
                let _ = state.due().map(|(tier, trial)| state.fit(tier, trial, 0));
            }
        }
    }
}
