//! When GPUs that cannot be opened are tried again, and which of the known ones may be among them. Pure.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// Each try to open a GPU holds the driver's lock for seconds and writes lines to dmesg, so tries thin out. A GPU that returns is found
/// after this time at most.
pub const RARELY: Duration = Duration::from_secs(300);

/// Doubles its delay from one failure to the next.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    delay: Duration,
    next: Instant,
}

impl Backoff {
    /// `now`: the first failure.
    pub fn new(first: Duration, now: Instant) -> Self {
        Self { delay: first, next: now + first }
    }

    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    pub fn left(&self, now: Instant) -> Duration {
        self.next.saturating_duration_since(now)
    }

    pub fn failed(&mut self, now: Instant) {
        self.delay = (self.delay * 2).min(RARELY);
        self.next = now + self.delay;
    }
}

/// A list shows GPUs that cannot be opened only as indices. This remembers which known GPUs they may be, so that others that are missing
/// in the list are recognized as removed.
///
/// A GPU that is missing in the first list with more unopened indices than before may be one of those; one that is missing in another list
/// was removed.
#[derive(Debug, Default)]
pub struct Unseen {
    /// May be behind an index that cannot be opened.
    possible: Vec<Arc<str>>,
    /// The indices that cannot be opened, apart from those of `possible`: these GPUs were never opened.
    strangers: usize,
}

impl Unseen {
    /// Returns the removed ones of the known GPUs that a list does not contain. `unopened`: its indices that cannot be opened.
    pub fn removed(&mut self, missing: &[Arc<str>], unopened: usize) -> Vec<Arc<str>> {
        self.possible.retain(|uuid| missing.contains(uuid));
        self.strangers = self.strangers.min(unopened);
        // Indices disappear with their GPUs.
        let room = unopened - self.strangers;
        let (known, new): (Vec<_>, Vec<_>) = missing.iter().cloned().partition(|uuid| self.possible.contains(uuid));
        let is_possible = room > known.len();
        // Which of several it is cannot be determined.
        let kept = if room == 0 { 0 } else { known.len() };
        let mut removed: Vec<Arc<str>> = known.iter().skip(kept).cloned().collect();
        if is_possible {
            self.possible.extend(new);
        } else {
            removed.extend(new);
        }
        self.possible.retain(|uuid| !removed.contains(uuid));
        self.strangers = unopened - self.possible.len().min(unopened);
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_thin_out_up_to_the_bound() {
        let mut now = Instant::now();
        let begun = now;
        let mut backoff = Backoff::new(Duration::from_secs(5), now);
        let mut tries = Vec::new();
        while now < begun + Duration::from_secs(1500) {
            now += Duration::from_secs(1);
            if backoff.is_due(now) {
                tries.push((now - begun).as_secs());
                backoff.failed(now);
            }
        }
        assert_eq!(tries, [5, 15, 35, 75, 155, 315, 615, 915, 1215]);
        assert!(!backoff.left(now).is_zero() && backoff.left(now) <= RARELY);
    }

    #[test]
    fn removed_gpus_are_recognized_next_to_one_that_cannot_be_opened() {
        let ids = |names: &str| names.chars().map(|name| Arc::from(name.to_string())).collect::<Vec<Arc<str>>>();
        // Each list: the missing known GPUs, the number of unopened indices, and the GPUs recognized as removed.
        let check = |lists: &[(&str, usize, &str)]| {
            let mut unseen = Unseen::default();
            for (n, (missing, unopened, expect)) in lists.iter().enumerate() {
                assert_eq!(unseen.removed(&ids(missing), *unopened), ids(expect), "{lists:?} {n}");
            }
        };
        check(&[("a", 0, "a")]);
        // It fails to open, and does so until it is removed.
        check(&[("a", 1, ""), ("a", 1, ""), ("a", 0, "a")]);
        // A GPU that never opened, and another one that is removed later.
        check(&[("", 1, ""), ("a", 1, "a"), ("", 1, "")]);
        // One of them fails, another one is removed in the meantime.
        check(&[("a", 1, ""), ("ab", 1, "b"), ("a", 1, ""), ("", 0, ""), ("a", 0, "a")]);
        // Two are missing at once with one unopened index: it may be either.
        check(&[("ab", 1, ""), ("b", 0, "b")]);
        check(&[("", 1, ""), ("a", 2, ""), ("ab", 2, "b")]);
    }
}
