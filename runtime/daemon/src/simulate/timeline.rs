//! What happens when: the whole simulation, decided before it begins.
//!
//! Times are seconds of the scanner from the first pulse; `--speed` divides them. A volume is
//! acquired for one TR, which its pulse begins, and exported when it is over.

use serde::Serialize;

use super::base::count;
use super::faults::{Fault, FaultError, Which};
use super::noise::uniform;

/// The run that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Volumes of a whole series.
    pub(super) volumes: usize,
    /// Seconds.
    pub(super) tr_s: f64,
    /// Pulses before the first volume.
    pub(super) dummies: usize,
    /// From the end of a volume's acquisition to its export, seconds.
    pub(super) export_s: f64,
    /// The byte of a pulse.
    pub(super) pulse_byte: u8,
    /// Draws what the faults hit.
    pub(super) seed: u64,
}

/// What a series is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Role {
    /// The run.
    Run,
    /// The run's beginning; it was broken off.
    Aborted,
    /// The same volumes once more, at the same time.
    Twin,
}

/// One series.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Series {
    /// What it is.
    pub(super) role: Role,
    /// The series whose volumes these are; itself but for a twin.
    pub(super) source: usize,
    /// Volumes.
    pub(super) volumes: usize,
    /// When the first of them begins, seconds.
    pub(super) first_s: f64,
    /// Volumes acquired before it.
    pub(super) offset: usize,
}

/// One volume leaves the scanner.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Delivery {
    /// When, seconds.
    pub(super) at_s: f64,
    /// Which series, from 0.
    pub(super) series: usize,
    /// Which of its volumes, from 1.
    pub(super) volume: usize,
    /// It left before.
    pub(super) again: bool,
    /// How much of the file is there, where not all of it.
    pub(super) kept_share: Option<f64>,
}

/// What a byte on the pulse line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PulseKind {
    /// Before the first volume.
    Dummy,
    /// The start of a volume.
    Volume,
    /// Nothing began.
    Spurious,
    /// Another byte.
    Noise,
}

/// One byte on the pulse line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Pulse {
    /// When, seconds.
    pub(super) at_s: f64,
    /// The byte.
    pub(super) byte: u8,
    /// What it is.
    pub(super) kind: PulseKind,
    /// The series it belongs to, from 1.
    pub(super) series: usize,
    /// The volume that it begins or follows, from 1; 0 before the first.
    pub(super) volume: usize,
    /// It was sent; a lost pulse was not.
    pub(super) sent: bool,
}

/// A place that a fault hit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Hit {
    /// Series, from 1.
    pub(super) series: usize,
    /// Volume within it, from 1.
    pub(super) volume: usize,
}

/// A fault as it was injected.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Injected {
    /// Its name.
    pub(super) fault: &'static str,
    /// The volumes that it hit.
    pub(super) hits: Vec<Hit>,
    /// Seconds of a stall or a pause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seconds: Option<f64>,
    /// When a stall began, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) at_s: Option<f64>,
    /// Shift of a motion step, RAS, millimetres.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) shift_ras_mm: Option<[f64; 3]>,
    /// Clock drift, millionths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ppm: Option<f64>,
}

impl Injected {
    fn new(fault: &Fault) -> Injected {
        Injected {
            fault: fault.name(),
            hits: Vec::new(),
            seconds: None,
            at_s: None,
            shift_ras_mm: None,
            ppm: None,
        }
    }
}

/// The head lies elsewhere from a volume on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct MotionStep {
    /// First volume of all that are acquired, from 1.
    pub(super) at: usize,
    /// RAS, millimetres.
    pub(super) shift_ras_mm: [f64; 3],
}

/// All that will happen.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Timeline {
    /// In the order in which they begin, twins last.
    pub(super) series: Vec<Series>,
    /// By time.
    pub(super) deliveries: Vec<Delivery>,
    /// By time; lost ones too.
    pub(super) pulses: Vec<Pulse>,
    /// As given.
    pub(super) faults: Vec<Injected>,
    /// Where the head is moved by a fault.
    pub(super) motion_steps: Vec<MotionStep>,
    /// How much faster the clock in the headers runs, millionths.
    pub(super) clock_drift_ppm: f64,
}

/// Plans a simulation.
///
/// # Errors
/// [`FaultError`] for a fault that cannot happen in this run.
pub(super) fn plan(run: &Run, faults: &[Fault]) -> Result<Timeline, FaultError> {
    for (index, fault) in faults.iter().enumerate() {
        let once = matches!(
            fault,
            Fault::Abort { .. } | Fault::TwoSeries | Fault::ClockDrift { .. }
        );
        if once
            && faults[..index]
                .iter()
                .any(|other| other.name() == fault.name())
        {
            return Err(FaultError::Twice(fault.name()));
        }
    }
    let mut timeline = Timeline {
        series: series(run, faults)?,
        deliveries: Vec::new(),
        pulses: Vec::new(),
        faults: Vec::new(),
        motion_steps: Vec::new(),
        clock_drift_ppm: 0.0,
    };
    let mut exports = vec![Export::default(); total(&timeline.series)];
    timeline.pulses = pulses(run, &timeline.series);
    for fault in faults {
        let mut injected = Injected::new(fault);
        timeline.inject(run, fault, &mut exports, &mut injected)?;
        timeline.faults.push(injected);
    }
    timeline.deliveries = deliveries(run, &timeline.series, &exports);
    // Stalls hold back whatever they find on its way.
    for (fault, injected) in faults.iter().zip(&mut timeline.faults) {
        if let Fault::Stall { at, seconds } = fault {
            let hit = locate(&timeline.series, as_index(*at));
            let began = hit.map_or(0.0, |hit| {
                let series = &timeline.series[hit.series - 1];
                series.first_s + count(hit.volume) * run.tr_s + run.export_s
            });
            injected.at_s = Some(began);
            for delivery in &mut timeline.deliveries {
                if (began..began + seconds).contains(&delivery.at_s) {
                    delivery.at_s = began + seconds;
                }
            }
        }
    }
    timeline
        .deliveries
        .sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
    timeline.pulses.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
    Ok(timeline)
}

/// What becomes of one volume's export.
#[derive(Clone, Copy, Debug, Default)]
struct Export {
    dropped: bool,
    twice: bool,
    late: bool,
    kept_share: Option<f64>,
}

fn as_index(volume: u32) -> usize {
    usize::try_from(volume).unwrap_or(usize::MAX)
}

fn series(run: &Run, faults: &[Fault]) -> Result<Vec<Series>, FaultError> {
    let dummies_s = count(run.dummies) * run.tr_s;
    let whole = Series {
        role: Role::Run,
        source: 0,
        volumes: run.volumes,
        first_s: dummies_s,
        offset: 0,
    };
    let mut all = vec![whole];
    let abort = faults.iter().find_map(|fault| match fault {
        Fault::Abort { at, pause_s } => Some((*at, *pause_s)),
        _ => None,
    });
    if let Some((at, pause_s)) = abort {
        let volumes = as_index(at);
        if volumes >= run.volumes {
            return Err(FaultError::Volume {
                name: "abort",
                volume: at,
                last: run.volumes.saturating_sub(1),
            });
        }
        let again = Series {
            source: 1,
            first_s: dummies_s + count(volumes) * run.tr_s + pause_s + dummies_s,
            offset: volumes,
            ..all[0].clone()
        };
        all[0].role = Role::Aborted;
        all[0].volumes = volumes;
        all.push(again);
    }
    if faults.contains(&Fault::TwoSeries) {
        let twin = |series: &Series| Series {
            role: Role::Twin,
            ..series.clone()
        };
        let twins: Vec<Series> = all.iter().map(twin).collect();
        all.extend(twins);
    }
    Ok(all)
}

/// The series that are acquired, with their numbers: all but the twins.
fn acquired(series: &[Series]) -> impl Iterator<Item = (usize, &Series)> {
    let numbered = series.iter().enumerate();
    numbered.filter(|(_, series)| series.role != Role::Twin)
}

/// How many volumes are acquired.
fn total(series: &[Series]) -> usize {
    acquired(series).map(|(_, series)| series.volumes).sum()
}

/// The series and volume of the nth volume acquired, all from 1.
fn locate(series: &[Series], volume: usize) -> Option<Hit> {
    acquired(series).find_map(|(index, series)| {
        let within = volume.checked_sub(series.offset)?;
        (1..=series.volumes).contains(&within).then_some(Hit {
            series: index + 1,
            volume: within,
        })
    })
}

fn pulses(run: &Run, series: &[Series]) -> Vec<Pulse> {
    let mut pulses = Vec::new();
    for (index, series) in acquired(series) {
        let pulse = |at_s: f64, kind: PulseKind, volume: usize| Pulse {
            at_s,
            byte: run.pulse_byte,
            kind,
            series: index + 1,
            volume,
            sent: true,
        };
        for dummy in (1..=run.dummies).rev() {
            let at_s = series.first_s - count(dummy) * run.tr_s;
            pulses.push(pulse(at_s, PulseKind::Dummy, 0));
        }
        for volume in 1..=series.volumes {
            let at_s = series.first_s + count(volume - 1) * run.tr_s;
            pulses.push(pulse(at_s, PulseKind::Volume, volume));
        }
    }
    pulses
}

impl Timeline {
    fn inject(
        &mut self,
        run: &Run,
        fault: &Fault,
        exports: &mut [Export],
        injected: &mut Injected,
    ) -> Result<(), FaultError> {
        let all = total(&self.series);
        let volumes = |which: &Which| which.volumes(fault, run.seed, all);
        let one = |at: u32| Which::Listed(vec![at]).volumes(fault, run.seed, all);
        let mut hit: Vec<usize> = match fault {
            Fault::Drop(which)
            | Fault::Duplicate(which)
            | Fault::Reorder(which)
            | Fault::Truncate(which)
            | Fault::LostPulses(which)
            | Fault::SpuriousPulses(which)
            | Fault::NoiseBytes(which) => volumes(which)?,
            Fault::Stall { at, .. } | Fault::Abort { at, .. } | Fault::MotionStep { at, .. } => {
                one(*at)?
            }
            Fault::TwoSeries | Fault::ClockDrift { .. } => Vec::new(),
        };
        match fault {
            Fault::Drop(_) => hit.iter().for_each(|n| exports[n - 1].dropped = true),
            Fault::Duplicate(_) => hit.iter().for_each(|n| exports[n - 1].twice = true),
            Fault::Reorder(which) => {
                let ends = |n: usize| {
                    let hit = locate(&self.series, n);
                    hit.is_none_or(|hit| hit.volume == self.series[hit.series - 1].volumes)
                };
                if let (Which::Listed(_), Some(last)) = (which, hit.iter().find(|n| ends(**n))) {
                    // Nothing follows that it could come after.
                    return Err(FaultError::Volume {
                        name: "reorder",
                        volume: u32::try_from(*last).unwrap_or(u32::MAX),
                        last: last - 1,
                    });
                }
                hit.retain(|n| !ends(*n));
                hit.iter().for_each(|n| exports[n - 1].late = true);
            }
            Fault::Truncate(_) => {
                for n in &hit {
                    let share = 0.02 + 0.96 * uniform(run.seed, fault.purpose(1), *n);
                    exports[n - 1].kept_share = Some(share);
                }
            }
            Fault::LostPulses(_) => {
                for pulse in &mut self.pulses {
                    let series = &self.series[pulse.series - 1];
                    let lost = hit.contains(&(series.offset + pulse.volume));
                    if pulse.kind == PulseKind::Volume && lost {
                        pulse.sent = false;
                    }
                }
            }
            Fault::SpuriousPulses(_) | Fault::NoiseBytes(_) => {
                for n in &hit {
                    self.disturb(run, fault, *n);
                }
            }
            Fault::MotionStep { mm, .. } => {
                let at = hit.first().copied().unwrap_or(1);
                let shift_ras_mm = direction(run.seed, fault, at).map(|part| part * mm);
                injected.shift_ras_mm = Some(shift_ras_mm);
                self.motion_steps.push(MotionStep { at, shift_ras_mm });
            }
            Fault::ClockDrift { ppm } => {
                injected.ppm = Some(*ppm);
                self.clock_drift_ppm = *ppm;
            }
            Fault::Stall { seconds, .. } => injected.seconds = Some(*seconds),
            Fault::Abort { pause_s, .. } => injected.seconds = Some(*pause_s),
            Fault::TwoSeries => {}
        }
        injected.hits = hit
            .iter()
            .filter_map(|n| locate(&self.series, *n))
            .collect();
        Ok(())
    }

    /// A byte that begins no volume, some time within the nth volume acquired.
    fn disturb(&mut self, run: &Run, fault: &Fault, n: usize) {
        let Some(hit) = locate(&self.series, n) else {
            return;
        };
        let series = &self.series[hit.series - 1];
        let phase = 0.05 + 0.9 * uniform(run.seed, fault.purpose(1), n);
        let noise = matches!(fault, Fault::NoiseBytes(_));
        let byte = if noise {
            other_byte(run.pulse_byte, uniform(run.seed, fault.purpose(2), n))
        } else {
            run.pulse_byte
        };
        self.pulses.push(Pulse {
            at_s: series.first_s + (count(hit.volume - 1) + phase) * run.tr_s,
            byte,
            kind: if noise {
                PulseKind::Noise
            } else {
                PulseKind::Spurious
            },
            series: hit.series,
            volume: hit.volume,
            sent: true,
        });
    }
}

/// Any byte but one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a draw below 1 makes a number below 255"
)]
fn other_byte(than: u8, draw: f64) -> u8 {
    let byte = (draw * 255.0) as u8;
    if byte >= than { byte + 1 } else { byte }
}

/// A direction in space, RAS, of length one.
fn direction(seed: u64, fault: &Fault, n: usize) -> [f64; 3] {
    let z = 2.0 * uniform(seed, fault.purpose(1), n) - 1.0;
    let around = std::f64::consts::TAU * uniform(seed, fault.purpose(2), n);
    let across = (1.0 - z * z).sqrt();
    [across * around.cos(), across * around.sin(), z]
}

/// All exports in their order, before any stall.
fn deliveries(run: &Run, all: &[Series], exports: &[Export]) -> Vec<Delivery> {
    // Of what leaves at one time: a volume, its copy, its twin, then the one that is late.
    let mut ordered: Vec<(f64, u8, Delivery)> = Vec::new();
    for (index, series) in all.iter().enumerate() {
        for volume in 1..=series.volumes {
            let export = if series.role == Role::Twin {
                Export::default()
            } else {
                exports[series.offset + volume - 1]
            };
            if export.dropped {
                continue;
            }
            let end = if export.late { volume + 1 } else { volume };
            let at_s = series.first_s + count(end) * run.tr_s + run.export_s;
            let delivery = Delivery {
                at_s,
                series: index,
                volume,
                again: false,
                kept_share: export.kept_share,
            };
            let rank = match (series.role, export.late) {
                (Role::Twin, _) => 2,
                (_, true) => 3,
                (_, false) => 0,
            };
            ordered.push((at_s, rank, delivery));
            if export.twice {
                let again = Delivery {
                    again: true,
                    kept_share: None,
                    ..delivery
                };
                ordered.push((at_s, rank.max(1), again));
            }
        }
    }
    ordered.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    ordered
        .into_iter()
        .map(|(_, _, delivery)| delivery)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::str::FromStr;

    use proptest::prelude::*;

    use super::*;

    const RUN: Run = Run {
        volumes: 20,
        tr_s: 2.0,
        dummies: 2,
        export_s: 0.0,
        pulse_byte: b'5',
        seed: 11,
    };

    fn planned(faults: &[&str]) -> Result<Timeline, FaultError> {
        let faults: Result<Vec<Fault>, _> = faults.iter().map(|f| Fault::from_str(f)).collect();
        plan(&RUN, &faults?)
    }

    /// `(series, volume)` in the order in which they leave.
    fn order(timeline: &Timeline) -> Vec<(usize, usize)> {
        let places = timeline.deliveries.iter();
        places.map(|d| (d.series, d.volume)).collect()
    }

    fn plain(volumes: impl IntoIterator<Item = usize>) -> Vec<(usize, usize)> {
        volumes.into_iter().map(|volume| (0, volume)).collect()
    }

    #[test]
    fn plain_run_exports_each_volume_a_tr_after_its_pulse() {
        let timeline = planned(&[]).unwrap();
        assert_eq!(order(&timeline), plain(1..=20));
        let pulses: Vec<f64> = timeline.pulses.iter().map(|pulse| pulse.at_s).collect();
        let expected: Vec<f64> = (0..22).map(|i| f64::from(i) * 2.0).collect();
        assert_eq!(pulses, expected);
        assert_eq!(timeline.pulses[1].kind, PulseKind::Dummy);
        assert_eq!(timeline.pulses[2].kind, PulseKind::Volume);
        assert_eq!(timeline.deliveries[0].at_s, 6.0);
    }

    #[test]
    fn dropped_doubled_and_late_volumes_are_where_they_should_be() {
        let timeline = planned(&["drop=3,7", "duplicate=5", "reorder=9"]).unwrap();
        let expected = [1, 2, 4, 5, 5, 6, 8, 10, 9];
        let expected = plain(expected.into_iter().chain(11..=20));
        assert_eq!(order(&timeline), expected);
        assert_eq!(timeline.deliveries.iter().filter(|d| d.again).count(), 1);
        let hits = &timeline.faults[0].hits;
        let volumes: Vec<usize> = hits.iter().map(|hit| hit.volume).collect();
        assert_eq!(volumes, [3, 7]);
        assert!(planned(&["reorder=20"]).is_err());
        assert!(planned(&["reorder=100%"]).is_ok());
    }

    #[test]
    fn stall_holds_exports_back_and_lets_them_go_at_once_in_order() {
        let timeline = planned(&["stall=4:5"]).unwrap();
        assert_eq!(order(&timeline), plain(1..=20));
        // Volume 4 is due at 12 s; 5 and 6 are caught as well.
        let held: Vec<f64> = timeline.deliveries[3..7].iter().map(|d| d.at_s).collect();
        assert_eq!(held, [17.0, 17.0, 17.0, 18.0]);
        assert_eq!(timeline.faults[0].at_s, Some(12.0));
        let pulses = planned(&[]).unwrap().pulses;
        assert_eq!(timeline.pulses, pulses);
    }

    #[test]
    fn abort_ends_a_series_and_a_whole_one_follows() {
        let timeline = planned(&["abort=6:10", "drop=8"]).unwrap();
        let roles: Vec<Role> = timeline.series.iter().map(|series| series.role).collect();
        assert_eq!(roles, [Role::Aborted, Role::Run]);
        // Two dummies (4 s), six volumes (12 s), the pause, two dummies again.
        assert_eq!(timeline.series[1].first_s, 4.0 + 12.0 + 10.0 + 4.0);
        let first: Vec<_> = (1..=6).map(|volume| (0, volume)).collect();
        let second: Vec<_> = (1..=20).filter(|v| *v != 2).map(|v| (1, v)).collect();
        assert_eq!(order(&timeline), [first, second].concat());
        let hit = Hit {
            series: 2,
            volume: 2,
        };
        assert_eq!(timeline.faults[1].hits, [hit]);
        assert!(planned(&["abort=20"]).is_err());
        assert!(planned(&["abort=3", "abort=4"]).is_err());
    }

    #[test]
    fn twin_volumes_follow_their_own_and_have_no_pulses() {
        let timeline = planned(&["two-series"]).unwrap();
        let expected: Vec<_> = (1..=20).flat_map(|v| [(0, v), (1, v)]).collect();
        assert_eq!(order(&timeline), expected);
        assert_eq!(timeline.series[1].source, 0);
        assert_eq!(timeline.pulses.len(), 22);
    }

    #[test]
    fn pulses_are_lost_and_found_where_the_record_says() {
        let timeline = planned(&["lost-pulses=4", "spurious-pulses=9", "noise-bytes=11"]).unwrap();
        let lost: Vec<usize> = timeline
            .pulses
            .iter()
            .filter(|pulse| !pulse.sent)
            .map(|pulse| pulse.volume)
            .collect();
        assert_eq!(lost, [4]);
        let of = |kind: PulseKind| timeline.pulses.iter().find(move |pulse| pulse.kind == kind);
        let spurious = of(PulseKind::Spurious).unwrap();
        // Volume 9 lasts from 20 s to 22 s.
        assert!((20.1..21.9).contains(&spurious.at_s) && spurious.byte == b'5');
        let noise = of(PulseKind::Noise).unwrap();
        assert!(noise.byte != b'5' && (24.1..25.9).contains(&noise.at_s));
        assert!(timeline.pulses.is_sorted_by(|a, b| a.at_s <= b.at_s));
    }

    #[test]
    fn truncated_volume_keeps_a_part_and_its_copy_all() {
        let timeline = planned(&["truncate=5", "duplicate=5"]).unwrap();
        let shares: Vec<Option<f64>> = timeline
            .deliveries
            .iter()
            .filter(|delivery| delivery.volume == 5)
            .map(|delivery| delivery.kept_share)
            .collect();
        assert!(matches!(shares[..], [Some(share), None] if (0.02..0.98).contains(&share)));
    }

    proptest! {
        /// Whatever goes wrong: each volume that is not dropped leaves once, each doubled one twice.
        #[test]
        fn every_volume_leaves_as_often_as_it_should(
            drop in 0_u32..60,
            duplicate in 0_u32..60,
            reorder in 0_u32..60,
            stall in 1_u32..20,
            seconds in 0_u32..30,
            seed in any::<u64>(),
        ) {
            let texts = [
                format!("drop={drop}%"),
                format!("duplicate={duplicate}%"),
                format!("reorder={reorder}%"),
                format!("stall={stall}:{seconds}"),
            ];
            let faults: Vec<Fault> = texts.iter().map(|f| Fault::from_str(f).unwrap()).collect();
            let timeline = plan(&Run { seed, ..RUN }, &faults).unwrap();
            let hits = |n: usize| -> Vec<usize> {
                timeline.faults[n].hits.iter().map(|hit| hit.volume).collect()
            };
            let (dropped, doubled) = (hits(0), hits(1));
            let mut found = BTreeMap::new();
            for delivery in &timeline.deliveries {
                *found.entry(delivery.volume).or_insert(0) += 1;
            }
            for volume in 1..=20 {
                let expected = if dropped.contains(&volume) {
                    None
                } else if doubled.contains(&volume) {
                    Some(2)
                } else {
                    Some(1)
                };
                prop_assert_eq!(found.get(&volume).copied(), expected);
            }
            prop_assert!(timeline.deliveries.is_sorted_by(|a, b| a.at_s <= b.at_s));
        }
    }
}
