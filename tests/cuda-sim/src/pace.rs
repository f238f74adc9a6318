//! When a thread makes its next call. Pure.

use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    BackToBack,
    /// One call in each period; a period that passed during a call is left out.
    Every(Duration),
    /// This many calls a second on average: late ones are made up for.
    Rate(f64),
}

/// The work is done in the first `on` of each `on + off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    pub on: Duration,
    pub off: Duration,
}

pub fn phase(text: &str) -> Result<Phase, String> {
    let wrong = "expected the durations of work and of pauses, such as 3s:2s";
    let (on, off) = text.split_once(':').ok_or(wrong)?;
    let phase = Phase { on: nvidia_ml_sim::time::span(on)?, off: nvidia_ml_sim::time::span(off)? };
    if phase.on.is_zero() { Err(wrong.into()) } else { Ok(phase) }
}

/// Times are counted from the begin of the work.
#[derive(Debug)]
pub struct Timetable {
    pace: Pace,
    phase: Option<Phase>,
    due: Duration,
}

impl Timetable {
    pub fn new(pace: Pace, phase: Option<Phase>) -> Self {
        Self { pace, phase, due: Duration::ZERO }
    }

    /// The time of the next call, which may have passed.
    pub fn next(&mut self, now: Duration) -> Duration {
        let due = self.due;
        let at = match self.pace {
            Pace::BackToBack => now,
            Pace::Every(period) => {
                let passed = now.saturating_sub(due).as_nanos() / period.as_nanos().max(1);
                let at = due + period * u32::try_from(passed).unwrap_or(u32::MAX);
                self.due = at + period;
                at
            }
            Pace::Rate(per_second) => {
                self.due = due + Duration::from_secs_f64(1.0 / per_second);
                due
            }
        };
        let allowed = self.allowed(at.max(now));
        if allowed > at.max(now) {
            // The calls of a pause are left out; the next period begins after it.
            self.due = allowed + self.due.saturating_sub(at);
            return allowed;
        }
        at
    }

    fn allowed(&self, at: Duration) -> Duration {
        let Some(phase) = self.phase else { return at };
        let period_ns = (phase.on + phase.off).as_nanos().max(1);
        let into = Duration::from_nanos((at.as_nanos() % period_ns) as u64);
        if into < phase.on { at } else { at + (phase.on + phase.off - into) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn calls_are_due_by_pace_and_phase() {
        let mut every = Timetable::new(Pace::Every(MS(20)), None);
        assert_eq!([0, 5, 21, 95].map(|now| every.next(MS(now))), [0, 20, 40, 80].map(MS));
        let mut rate = Timetable::new(Pace::Rate(1_000.0), None);
        assert_eq!([0, 5, 5, 5].map(|now| rate.next(MS(now))), [0, 1, 2, 3].map(MS));
        let mut phased = Timetable::new(Pace::BackToBack, phase("3s:2s").ok());
        assert_eq!([0, 2_999, 3_000, 4_999, 5_000].map(|now| phased.next(MS(now))), [0, 2_999, 5_000, 5_000, 5_000].map(MS));
        let mut paused = Timetable::new(Pace::Every(MS(20)), phase("30ms:20ms").ok());
        assert_eq!([0, 5, 25, 51].map(|now| paused.next(MS(now))), [0, 20, 50, 70].map(MS));
    }

    #[test]
    fn phases_are_two_durations() {
        assert_eq!(phase("3s:500ms"), Ok(Phase { on: MS(3_000), off: MS(500) }));
        for wrong in ["", "3s", "3s:", "0s:1s", "3:2"] {
            assert!(phase(wrong).is_err(), "{wrong:?}");
        }
    }
}
