//! When a trial is decoded: more than once, each time with the volumes that are in by then.

use super::{GlmError, volumes_needed};

/// One of the times at which a trial is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DecodeTime {
    /// As soon as its response has peaked.
    Fast,
    /// When its response has run its course and later volumes have told it from its neighbours'.
    Slow,
    /// With every volume of the run, once the run is over.
    EndOfRun,
}

impl DecodeTime {
    /// All of them, in their order in time.
    pub const ALL: [Self; 3] = [Self::Fast, Self::Slow, Self::EndOfRun];
}

/// How many volumes a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunLength {
    /// More may come. Counted to the last one acquired, missing ones included.
    SoFar(usize),
    /// The run is over.
    Whole(usize),
}

/// Seconds from a trial's onset to each of its decode times. Public fields: the ranges are
/// checked by [`DecodeTimes::check`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeTimes {
    /// From onset to the last volume of [`DecodeTime::Fast`].
    pub fast_s: f64,
    /// From onset to the last volume of [`DecodeTime::Slow`].
    pub slow_s: f64,
    /// What the run must have recorded after the onset for [`DecodeTime::EndOfRun`].
    pub end_of_run_s: f64,
}

impl Default for DecodeTimes {
    /// 7.5 s, 29.5 s (both as published for real-time MindEye) and 5 s: by then the response
    /// to a brief stimulus has peaked, so that trials at a run's end are decoded too.
    fn default() -> Self {
        Self {
            fast_s: 7.5,
            slow_s: 29.5,
            end_of_run_s: 5.0,
        }
    }
}

impl DecodeTimes {
    /// Checks the ranges, and that slow is not before fast.
    ///
    /// # Errors
    /// [`GlmError::Setting`], naming the field.
    pub fn check(&self) -> Result<(), GlmError> {
        let ranges = [
            ("fast_s", self.fast_s, 0.0),
            ("slow_s", self.slow_s, self.fast_s),
            ("end_of_run_s", self.end_of_run_s, 0.0),
        ];
        for (field, found, low) in ranges {
            if !(low..=120.0).contains(&found) {
                return Err(GlmError::Setting {
                    field,
                    found,
                    low,
                    high: 120.0,
                });
            }
        }
        Ok(())
    }

    /// Volumes of the run that a trial's fit takes at a decode time, from the run's first, for
    /// [`Design::build_at`](super::Design::build_at).
    ///
    /// `None` while they are not all in, and for ever where the run ended before.
    #[must_use]
    pub fn volumes(
        &self,
        time: DecodeTime,
        onset_s: f64,
        tr_s: f64,
        run: RunLength,
    ) -> Option<usize> {
        let (RunLength::SoFar(have) | RunLength::Whole(have)) = run;
        let needed = |delay_s| volumes_needed(onset_s, tr_s, delay_s);
        match (time, run) {
            (DecodeTime::Fast, _) => Some(needed(self.fast_s)).filter(|&needed| needed <= have),
            (DecodeTime::Slow, _) => Some(needed(self.slow_s)).filter(|&needed| needed <= have),
            (DecodeTime::EndOfRun, RunLength::SoFar(_)) => None,
            (DecodeTime::EndOfRun, RunLength::Whole(_)) => {
                Some(have).filter(|&have| needed(self.end_of_run_s) <= have)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{DecodeTime, DecodeTimes, RunLength};
    use crate::glm::GlmError;

    #[test]
    fn each_time_waits_for_its_own_volumes() {
        let times = DecodeTimes::default();
        let at = |time, run| times.volumes(time, 12.0, 1.5, run);
        // 19.5 s is frame 13, 41.5 s is past frame 27, 17 s is past frame 11.
        assert_eq!(at(DecodeTime::Fast, RunLength::SoFar(13)), None);
        assert_eq!(at(DecodeTime::Fast, RunLength::SoFar(14)), Some(14));
        assert_eq!(at(DecodeTime::Fast, RunLength::SoFar(200)), Some(14));
        assert_eq!(at(DecodeTime::Slow, RunLength::SoFar(27)), None);
        assert_eq!(at(DecodeTime::Slow, RunLength::Whole(28)), Some(28));
        assert_eq!(at(DecodeTime::EndOfRun, RunLength::SoFar(200)), None);
        assert_eq!(at(DecodeTime::EndOfRun, RunLength::Whole(200)), Some(200));
        assert_eq!(at(DecodeTime::EndOfRun, RunLength::Whole(12)), Some(12));
        assert_eq!(at(DecodeTime::EndOfRun, RunLength::Whole(11)), None);
    }

    #[test]
    fn a_slow_time_before_the_fast_one_is_named() {
        let times = DecodeTimes {
            slow_s: 6.0,
            ..DecodeTimes::default()
        };
        let refused = GlmError::Setting {
            field: "slow_s",
            found: 6.0,
            low: 7.5,
            high: 120.0,
        };
        assert_eq!(times.check(), Err(refused));
        let nan = DecodeTimes {
            end_of_run_s: f64::NAN,
            ..DecodeTimes::default()
        };
        assert!(nan.check().is_err());
        assert_eq!(DecodeTimes::default().check(), Ok(()));
    }
}
