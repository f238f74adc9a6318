//! A limit of events: one per interval, with a burst.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Events that are admitted: `burst` at once, then one per `every`.
#[derive(Debug)]
pub struct RateLimit {
    every: Duration,
    burst: u32,
    /// When the events admitted so far will have been paid for.
    paid: Mutex<Option<Instant>>,
}

impl RateLimit {
    pub fn new(every: Duration, burst: u32) -> Self {
        Self { every, burst, paid: Mutex::default() }
    }

    pub fn admits(&self, now: Instant) -> bool {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let start = paid.filter(|paid| *paid > now).unwrap_or(now);
        let is_admitted = start.duration_since(now) + self.every <= self.every * self.burst;
        if is_admitted {
            *paid = Some(start + self.every);
        }
        is_admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_admitted_and_then_one_event_per_interval() {
        let limit = RateLimit::new(Duration::from_secs(1), 3);
        let zero = Instant::now();
        let admitted = |ms: u64| limit.admits(zero + Duration::from_millis(ms));
        assert_eq!([0, 0, 0, 0].map(admitted), [true, true, true, false]);
        assert_eq!([900, 1000, 1001, 2000].map(admitted), [false, true, false, true]);
        // Idle time is worth a burst, not more.
        assert_eq!([60_000, 60_000, 60_000, 60_000].map(admitted), [true, true, true, false]);
    }
}
