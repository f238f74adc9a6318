//! When to poll: twice a period while the GPU is in use, so that each reply holds one new sample at most; a little more often than
//! once a period while it is not. Slower where the budgets say so, and then at random times: of the samples between two polls one has its
//! process queried, and which one it is must not depend on what the GPU does.

use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

use super::budget::{Budget, Coverage};
use super::ring::SampleRing;

/// Twice a period and a little more: at exactly half of it, polls would keep their place between two samples, and the best bound
/// on the GPU's clock comes from a poll just after one.
const USED_PERIODS: f64 = 0.45;
/// Until the period is known: below half of the finest grid seen on real drivers (~167 ms) and of a 100 ms one.
const UNLEARNED: Duration = Duration::from_millis(50);
/// As much for a GPU that nobody uses: a ring that is dry teaches no period.
const UNLEARNED_UNUSED: Duration = Duration::from_millis(90);
/// Devices without a ring, and those that fail or are lost.
pub const SLOW: Duration = Duration::from_secs(1);
/// A GPU counts as used for so long after something was seen of it.
const USED_FOR: Duration = Duration::from_secs(10);
/// Polls that are rarer than samples come this much earlier or later than their mean, at most.
const JITTER: f64 = 0.25;
/// Coverage that has changed for so long is reported.
const SETTLED: Duration = Duration::from_secs(10);

pub struct Pace {
    deadline: Instant,
    used: Instant,
    pub coverage: Coverage,
    random: RandomState,
    polls: u64,
    /// What is reported, and since when it has not been so.
    said: Coverage,
    differs: Option<Instant>,
}

impl Pace {
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            deadline: now,
            used: now,
            coverage: Coverage::Whole,
            random: RandomState::new(),
            polls: 0,
            said: Coverage::Whole,
            differs: None,
        }
    }

    pub fn used(&mut self) {
        self.used = Instant::now();
    }

    /// The interval from one poll to the next.
    pub fn ring(&mut self, ring: &SampleRing, budget: &Budget) -> Duration {
        let period = ring.period();
        let wanted = match (period, self.used.elapsed() < USED_FOR) {
            (None, true) => UNLEARNED,
            (None, false) => UNLEARNED_UNUSED,
            (Some(period), true) => period.mul_f64(USED_PERIODS),
            (Some(period), false) => period.mul_f64(2.0 * USED_PERIODS),
        };
        let (interval, coverage) = budget.ring_interval(wanted, ring.period_or_usual(), ring.half());
        self.coverage = coverage;
        if coverage == Coverage::Whole { interval } else { interval.mul_f64(self.around_one()).min(ring.half()) }
    }

    fn around_one(&mut self) -> f64 {
        self.polls += 1;
        let drawn = self.random.hash_one(self.polls) as f64 / u64::MAX as f64;
        1.0 + JITTER * (2.0 * drawn - 1.0)
    }

    /// What is to be said of the coverage now, when that has changed.
    pub fn changed(&mut self) -> Option<Coverage> {
        if self.coverage == self.said {
            self.differs = None;
            return None;
        }
        if self.differs.get_or_insert_with(Instant::now).elapsed() < SETTLED {
            return None;
        }
        self.said = self.coverage;
        Some(self.said)
    }

    /// When the next poll is due. Late ones are not caught up with.
    pub fn next(&mut self, interval: Duration) -> Instant {
        self.deadline = (self.deadline + interval).max(Instant::now());
        self.deadline
    }
}
