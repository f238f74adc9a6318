//! Limits of events: one per interval, with a burst; for all, or for each peer.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A longer interval is this long: later times cannot be represented.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

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
        Self { every: every.min(LONGEST), burst, paid: Mutex::default() }
    }

    /// Whether an event was admitted that is not paid for yet.
    fn is_in_use(&self, now: Instant) -> bool {
        self.paid.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|paid| paid > now)
    }

    pub fn admits(&self, now: Instant) -> bool {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let start = paid.filter(|paid| *paid > now).unwrap_or(now);
        let is_admitted = start.duration_since(now) + self.every <= self.every.saturating_mul(self.burst);
        if is_admitted {
            *paid = Some(start + self.every);
        }
        is_admitted
    }
}

/// A limit for each peer, and one for all of them together.
#[derive(Debug)]
pub struct PeerLimits {
    of_peer: (Duration, u32),
    peers: Mutex<HashMap<IpAddr, RateLimit>>,
    all: RateLimit,
}

impl PeerLimits {
    /// Peers with a limit of their own; more share the one of all.
    const MOST: usize = 256;

    pub fn new(of_peer: (Duration, u32), all: (Duration, u32)) -> Self {
        Self { of_peer, peers: Mutex::default(), all: RateLimit::new(all.0, all.1) }
    }

    pub fn admits(&self, peer: IpAddr, now: Instant) -> bool {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if !peers.contains_key(&peer) && peers.len() >= Self::MOST {
            peers.retain(|_, limit| limit.is_in_use(now));
        }
        let is_admitted = if peers.contains_key(&peer) || peers.len() < Self::MOST {
            let (every, burst) = self.of_peer;
            peers.entry(peer).or_insert_with(|| RateLimit::new(every, burst)).admits(now)
        } else {
            true
        };
        is_admitted && self.all.admits(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_above_its_limit_takes_nothing_from_others() {
        let second = Duration::from_secs(1);
        let limits = PeerLimits::new((second, 2), (second, 4));
        let zero = Instant::now();
        let admitted = |peer: u8| limits.admits([10, 0, 0, peer].into(), zero);
        assert_eq!([1, 1, 1, 1].map(admitted), [true, true, false, false]);
        assert_eq!([2, 2, 3].map(admitted), [true, true, false]);
        // The number of peers is bounded.
        let many = PeerLimits::new((second, 1), (Duration::from_nanos(1), u32::MAX));
        let at = |n: u32, now| many.admits(IpAddr::from(n.to_be_bytes()), now);
        assert_eq!((0..1000).filter(|n| at(*n, zero)).count(), 1000);
        assert!(!at(0, zero) && at(999, zero));
        assert!(at(999, zero + second) && !at(999, zero + second));
    }

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
