//! Slow and obvious: the whole run at once, every period and phase tried.

/// The start of every frame, milliseconds, from all pulses of a run.
///
/// Tries each period within `spread` of the nominal one, in steps that shift the last volume by no more
/// than `step_ms`, and each of the first pulses as the phase; the one that most pulses lie on
/// wins, and of equals the one that they lie nearest to. Frame 0
/// begins on beat `dummies`, counted from the first pulse that lies on it.
pub(super) fn starts(
    pulses: &[f64],
    tr_ms: f64,
    frames: u32,
    spread: f64,
    dummies: u32,
) -> Vec<f64> {
    let (step_ms, near_ms) = (1.0, 3.0);
    let step = step_ms / f64::from(frames);
    let steps = (spread * tr_ms / step).ceil();
    let mut best = (0, f64::INFINITY, 0.0, 0.0);
    let mut index = -steps;
    while index <= steps {
        let period = tr_ms + index * step;
        for &phase in pulses.iter().take(20) {
            let offs: Vec<f64> = pulses
                .iter()
                .map(|&at| {
                    let beats = (at - phase) / period;
                    (beats - beats.round()).abs() * period
                })
                .filter(|&off_ms| off_ms <= near_ms)
                .collect();
            let (hits, off_ms) = (offs.len(), offs.iter().sum::<f64>());
            if hits > best.0 || (hits == best.0 && off_ms < best.1) {
                best = (hits, off_ms, period, phase);
            }
        }
        index += 1.0;
    }
    let (_, _, period, phase) = best;
    let on_beat = |at: f64| {
        let beats = (at - phase) / period;
        (beats - beats.round()).abs() * period <= near_ms
    };
    let first = pulses
        .iter()
        .copied()
        .find(|&at| on_beat(at))
        .unwrap_or(phase);
    (0..frames)
        .map(|frame| first + f64::from(frame + dummies) * period)
        .collect()
}
