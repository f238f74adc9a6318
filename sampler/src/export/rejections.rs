//! Connections and requests that were rejected: counted by reason, and logged once for each peer and reason, then at most every ten
//! minutes, because a peer may repeat itself forever.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use strum::VariantArray as _;

const LOG_INTERVAL: Duration = Duration::from_secs(600);
/// Peers and reasons that are remembered; beyond them rejections are counted and not logged.
const MAX_LOGGED: usize = 256;

/// The label `reason` of `gpu_sampler_http_rejections_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum RejectionReason {
    /// A connection spoke plain HTTP on a port with TLS.
    PlainHttp,
    /// A TLS handshake failed, or did not end in time.
    TlsHandshake,
    /// No valid credentials.
    Unauthorized,
    /// Above the rate limit, or too many wrong passwords.
    RateLimit,
    /// A foreign Host, or an Origin of another page.
    ForeignHost,
}

#[derive(Debug)]
struct LogEntry {
    logged: Instant,
    /// Since then.
    suppressed: u64,
}

#[derive(Debug, Default)]
pub struct Rejections {
    counts: [AtomicU64; RejectionReason::VARIANTS.len()],
    log: Mutex<HashMap<(RejectionReason, IpAddr), LogEntry>>,
}

impl Rejections {
    pub fn record(&self, reason: RejectionReason, peer: IpAddr, message: &str) {
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.is_due(reason, peer, Instant::now()) {
            let message = message.trim_end();
            let reason = <&str>::from(reason);
            if suppressed == 0 {
                tracing::warn!(%peer, reason, "HTTP client rejected: {message}");
            } else {
                tracing::warn!(%peer, reason, suppressed, "HTTP client still rejected: {message}");
            }
        }
    }

    /// The number of rejections that were not logged, if this one is to be logged.
    fn is_due(&self, reason: RejectionReason, peer: IpAddr, now: Instant) -> Option<u64> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = log.get_mut(&(reason, peer)) {
            if now.duration_since(entry.logged) < LOG_INTERVAL {
                entry.suppressed += 1;
                return None;
            }
            entry.logged = now;
            return Some(std::mem::take(&mut entry.suppressed));
        }
        if log.len() >= MAX_LOGGED {
            log.retain(|_, entry| now.duration_since(entry.logged) < LOG_INTERVAL);
        }
        if log.len() >= MAX_LOGGED {
            return None;
        }
        log.insert((reason, peer), LogEntry { logged: now, suppressed: 0 });
        Some(0)
    }

    pub fn counts(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let count = |reason: RejectionReason| self.counts[reason as usize].load(Ordering::Relaxed) as f64;
        RejectionReason::VARIANTS.iter().map(move |reason| (<&str>::from(reason), count(*reason)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_rejection_is_logged_once_in_ten_minutes() {
        let (rejections, zero) = (Rejections::default(), Instant::now());
        let is_due = |n: u8, minutes: u64| {
            rejections.is_due(RejectionReason::Unauthorized, [10, 0, 0, n].into(), zero + Duration::from_secs(60 * minutes))
        };
        assert_eq!([is_due(1, 0), is_due(1, 1), is_due(2, 1), is_due(1, 9)], [Some(0), None, Some(0), None]);
        assert_eq!([is_due(1, 10), is_due(1, 11), is_due(1, 20)], [Some(2), None, Some(1)]);
    }

    #[test]
    fn the_number_of_remembered_peers_is_bounded() {
        let (rejections, zero) = (Rejections::default(), Instant::now());
        let is_due = |n: u32, at| rejections.is_due(RejectionReason::PlainHttp, IpAddr::from(n.to_be_bytes()), at);
        let logged = (0..2000).filter(|n| is_due(*n, zero).is_some()).count();
        assert_eq!(logged, MAX_LOGGED);
        assert_eq!(is_due(5000, zero + LOG_INTERVAL), Some(0));
    }
}
