//! The simulated scanner's clock.

use std::time::{Duration, Instant};

use chrono::{NaiveDateTime, TimeDelta};

/// Seconds of the scanner to moments of this machine, and to what headers say.
///
/// Every moment is reckoned from the start: nothing adds up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    zero: Instant,
    speed: f64,
}

impl Clock {
    /// A clock that starts after `wait` and runs `speed` times as fast as ours.
    pub(super) fn starting_in(wait: Duration, speed: f64) -> Clock {
        Clock {
            zero: Instant::now() + wait,
            speed,
        }
    }

    /// The moment of a time of the scanner.
    pub(super) fn at(&self, time_s: f64) -> Instant {
        self.zero + Duration::from_secs_f64((time_s / self.speed).max(0.0))
    }

    /// Sleeps until a time of the scanner; returns how long it has been over, our seconds.
    pub(super) fn wait_until(&self, time_s: f64) -> f64 {
        let moment = self.at(time_s);
        let now = Instant::now();
        std::thread::sleep(moment.saturating_duration_since(now));
        now.saturating_duration_since(moment).as_secs_f64()
    }
}

/// The clock that writes headers.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeaderClock {
    /// What it shows at the start.
    pub(super) began: NaiveDateTime,
    /// How much faster than the scanner it runs, millionths.
    pub(super) drift_ppm: f64,
}

impl HeaderClock {
    /// What it shows at a time of the scanner, to the microsecond.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a session is far shorter than the years that microseconds hold"
    )]
    pub(super) fn at(&self, time_s: f64) -> NaiveDateTime {
        let shown_us = (time_s * (1e6 + self.drift_ppm)).round() as i64;
        let shown = TimeDelta::microseconds(shown_us);
        self.began.checked_add_signed(shown).unwrap_or(self.began)
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    #[test]
    fn header_clock_drifts_by_millionths_and_passes_midnight() {
        let clock = HeaderClock {
            began: NaiveDateTime::from_str("2025-12-31T23:59:59").unwrap(),
            drift_ppm: 200.0,
        };
        assert_eq!(clock.at(1000.0).to_string(), "2026-01-01 00:16:39.200");
        assert_eq!(clock.at(0.0), clock.began);
    }

    #[test]
    fn moments_come_from_the_start_and_a_past_one_is_not_waited_for() {
        let clock = Clock::starting_in(Duration::ZERO, 10.0);
        assert_eq!(clock.at(3.0) - clock.at(0.0), Duration::from_secs_f64(0.3));
        let began = Instant::now();
        assert!(clock.wait_until(0.4) <= 0.0);
        assert!(began.elapsed() >= Duration::from_millis(35));
        assert!(clock.wait_until(0.1) > 0.0);
    }
}
