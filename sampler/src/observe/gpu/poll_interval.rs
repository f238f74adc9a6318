//! The poll interval. While the GPU is in use it is polled a little more than twice per sample period, so that each reply contains at
//! most one new sample; otherwise a little more than once. Within tight budgets polls are rarer, and then at random times: only one of
//! the samples between two polls has its process queried, and the choice must not depend on GPU activity.

use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

use super::budget::{Budget, Coverage, Part};
use super::ring::SampleRing;

/// Interval in periods. At exactly half a period, polls would keep a fixed phase between two samples; the best bound on the GPU's clock
/// comes from a poll shortly after a sample.
const USED_PERIODS: f64 = 0.45;
/// Interval until the period is known: at most half of 100 ms, and below half of the shortest period seen on real drivers (~167 ms).
const UNLEARNED: Duration = Duration::from_millis(50);
/// The same for an unused GPU: a dry sample ring does not reveal the period.
const UNLEARNED_UNUSED: Duration = Duration::from_millis(90);
/// Interval for devices without a sample ring, and for devices that fail or are lost.
pub const SLOW: Duration = Duration::from_secs(1);
/// A GPU counts as used for this time after its last activity.
const USED_FOR: Duration = Duration::from_secs(10);
/// Maximum relative deviation of an interval from its mean, for polls that are rarer than samples.
const JITTER: f64 = 0.25;
/// A change of coverage is reported after it has lasted this long.
const SETTLED: Duration = Duration::from_secs(10);

pub struct Pace {
    deadline: Instant,
    used: Instant,
    pub coverage: Coverage,
    random: RandomState,
    polls: u64,
    /// The reported coverage, and when the actual one began to differ.
    reported: Coverage,
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
            reported: Coverage::Whole,
            differs: None,
        }
    }

    pub fn used(&mut self) {
        self.used = Instant::now();
    }

    /// The interval to the next poll.
    pub fn ring(&mut self, ring: &SampleRing, budget: &Budget) -> Duration {
        let period = ring.period();
        let wanted = match (period, self.used.elapsed() < USED_FOR) {
            (None, true) => UNLEARNED,
            (None, false) => UNLEARNED_UNUSED,
            (Some(period), true) => period.mul_f64(USED_PERIODS),
            (Some(period), false) => period.mul_f64(2.0 * USED_PERIODS),
        };
        if ring.is_complete() {
            // A process that ends before the read is not named, so reads follow the grid where the budget allows it.
            self.coverage = Coverage::Whole;
            return budget.interval_of_ring(Part::SampleRing, 2 * wanted, ring.half());
        }
        let (interval, coverage) = budget.ring_interval(wanted, ring.period_or_usual(), ring.half());
        self.coverage = coverage;
        if coverage == Coverage::Whole { interval } else { interval.mul_f64(self.jitter()).min(ring.half()) }
    }

    /// A random factor with mean 1.
    fn jitter(&mut self) -> f64 {
        self.polls += 1;
        let uniform = self.random.hash_one(self.polls) as f64 / u64::MAX as f64;
        1.0 + JITTER * (2.0 * uniform - 1.0)
    }

    /// The coverage, if it has changed and the change is to be reported now.
    pub fn changed(&mut self) -> Option<Coverage> {
        if self.coverage == self.reported {
            self.differs = None;
            return None;
        }
        if self.differs.get_or_insert_with(Instant::now).elapsed() < SETTLED {
            return None;
        }
        self.reported = self.coverage;
        Some(self.reported)
    }

    /// The time of the next poll. Missed polls are not made up for.
    pub fn next(&mut self, interval: Duration) -> Instant {
        self.deadline = (self.deadline + interval).max(Instant::now());
        self.deadline
    }
}
