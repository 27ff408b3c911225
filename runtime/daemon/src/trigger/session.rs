//! The line over a session: what its runs need of it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rtfmri::timing::{Timeline, TimingSettings};

use super::{Heard, TriggerLine, TriggerSettings, TriggerState, spawn};

/// Pulses that are kept for a run whose first volume is still on its way.
const RECENT: usize = 128;

/// The trigger line of a session, or the lack of one.
pub(crate) struct Trigger {
    settings: Option<TriggerSettings>,
    line: Option<TriggerLine>,
    recent: VecDeque<f64>,
}

/// What came since the last look.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Drained {
    /// Stamps, ascending, milliseconds on the monotonic clock.
    pub(crate) pulses: Vec<f64>,
    /// Sentences for the operator.
    pub(crate) told: Vec<String>,
}

impl Trigger {
    /// Starts the line, where there is one.
    ///
    /// # Errors
    /// As [`spawn`].
    pub(crate) fn start(
        settings: Option<&TriggerSettings>,
        stop: &Arc<AtomicBool>,
    ) -> io::Result<Trigger> {
        Ok(Trigger {
            settings: settings.cloned(),
            line: settings
                .map(|settings| spawn(settings, Arc::clone(stop)))
                .transpose()?,
            recent: VecDeque::with_capacity(RECENT),
        })
    }

    /// Takes what came; never waits. Pulses go to the timelines of runs that have begun, and are kept
    /// for the next one.
    pub(crate) fn drain(&mut self) -> Drained {
        let mut drained = Drained::default();
        for heard in self.line.iter_mut().flat_map(TriggerLine::drain) {
            match heard {
                Heard::Pulse { at_ms, .. } => drained.pulses.push(at_ms),
                Heard::Told(text) => drained.told.push(text),
            }
        }
        for &at_ms in &drained.pulses {
            if self.recent.len() >= RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back(at_ms);
        }
        drained
    }

    /// The clock of a run that begins now, with the pulses drained so far.
    ///
    /// - `slice_times_ms`: of its first volume, where the header has them.
    /// - `known`: frame and start of a volume on record, for a run that is taken up again on the same
    ///   boot.
    pub(crate) fn timeline(
        &self,
        tr_ms: f64,
        slice_times_ms: Option<&[f64]>,
        known: Option<(u32, f64)>,
    ) -> Timeline {
        let mut timing = TimingSettings {
            line: self.line.is_some(),
            known,
            ..TimingSettings::new(tr_ms)
        };
        if let Some(settings) = &self.settings {
            timing.pulses_per_volume = settings.pulses_per_volume;
            timing.dummy_volumes = settings.dummy_volumes;
        }
        let timing = timing.with_slice_times(slice_times_ms.unwrap_or_default());
        Timeline::begin(timing, self.recent.iter().copied())
    }

    /// How the line is doing; `None` where there is none.
    pub(crate) fn state(&self) -> Option<TriggerState> {
        self.line.as_ref().map(TriggerLine::state)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use rtfmri::timing::{Arrival, How};

    use super::super::latency::terminal;
    use super::super::now_ms;
    use super::super::tests::Stop;
    use super::*;

    /// Pulses on a pseudo-terminal, one of them lost and one too many; volumes arrive when the next one is
    /// half over. A busy machine sends late, so that only the volume is told, not the millisecond.
    #[test]
    fn a_run_on_a_pseudo_terminal_is_timed_by_its_pulses() {
        let (pty, settings) = terminal().unwrap();
        let stop = Stop::new();
        let mut trigger = Trigger::start(Some(&settings), &stop.0).unwrap();
        let began = Instant::now();
        while !trigger.state().unwrap().connected {
            assert!(began.elapsed() < Duration::from_secs(20));
            thread::sleep(Duration::from_millis(2));
        }
        let tr_ms = 500.0;
        let first_ms = now_ms() + 50.0;
        let until = |at_ms: f64| {
            let wait = (at_ms - now_ms()).max(0.0);
            thread::sleep(Duration::from_secs_f64(wait / 1e3));
        };
        let (mut timeline, mut faults) = (None::<Timeline>, Vec::new());
        for frame in 0..12_u32 {
            let start = first_ms + f64::from(frame) * tr_ms;
            until(start);
            if frame != 6 {
                nix::unistd::write(&pty.master, b"5").unwrap();
            }
            if frame == 8 {
                until(start + 170.0);
                nix::unistd::write(&pty.master, b"5").unwrap();
            }
            until(start + 250.0);
            let drained = trigger.drain();
            assert_eq!(drained.told, [""; 0]);
            if let Some(timeline) = &mut timeline {
                drained.pulses.iter().for_each(|&at| timeline.pulse(at));
            }
            let Some(arrived) = frame.checked_sub(1) else {
                continue;
            };
            let timeline = timeline.get_or_insert_with(|| trigger.timeline(tr_ms, None, None));
            let arrival = Arrival {
                frame: arrived,
                arrived_ms: now_ms(),
                header_ms: None,
            };
            let time = timeline.volume(arrival, &mut faults);
            let planned = first_ms + f64::from(arrived) * tr_ms;
            let off = time.start_ms - planned;
            assert!(off.abs() < 0.5 * tr_ms, "{time:?} {off} {faults:?}");
            assert!(matches!(time.how, How::Pulse | How::Bridged), "{time:?}");
            assert!(arrived != 6 || time.how == How::Bridged, "{time:?}");
        }
        let texts: Vec<String> = faults.iter().map(ToString::to_string).collect();
        assert!(
            texts.iter().any(|text| text.contains("volume 7 was lost")),
            "{texts:?}"
        );
        assert!(timeline.unwrap().summary().spurious >= 1);
    }

    #[test]
    fn without_a_line_there_is_nothing_to_drain_and_headers_tell() {
        let stop = Stop::new();
        let mut trigger = Trigger::start(None, &stop.0).unwrap();
        assert_eq!(trigger.drain(), Drained::default());
        assert_eq!(trigger.state(), None);
        let mut timeline = trigger.timeline(1500.0, None, None);
        let mut faults = Vec::new();
        let arrival = Arrival {
            frame: 0,
            arrived_ms: 5000.0,
            header_ms: Some(1000.0),
        };
        assert_eq!(timeline.volume(arrival, &mut faults).how, How::Header);
        assert!(faults[0].to_string().contains("no trigger line"));
    }
}
