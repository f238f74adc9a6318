//! One source at one endpoint: its waiting containers, its pending queries, and its circuit breaker.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::entry::{QueryAttempt, QueryOutcome};
use super::{MAX_BACK_OFF, MS, Outcome, jittered};
use crate::values::Source;
use sampler_core::units::{BootNs, ContainerKey};

/// The detail of queries to an endpoint that does not exist.
pub const ABSENT: &str = "there is nothing at this endpoint";
/// Bounds the load on a runtime.
pub(super) const SOCKET_IN_FLIGHT: usize = 4;
pub const FILES_IN_FLIGHT: usize = 16;
/// Includes overdue queries, which would otherwise accumulate at a socket that reappears repeatedly and never responds.
pub(super) const MAX_OPEN: usize = 24;
/// A query without a result after this time counts as an error.
pub(super) const OVERDUE: u64 = 1_000 * MS;
pub(super) const BREAKER_ERRORS: u32 = 5;
const PROBE_INTERVAL: u64 = 1_000 * MS;
/// After an outage of this length the probe interval grows.
const LONG_OUTAGE: u64 = 600_000 * MS;

#[derive(Debug)]
struct PendingQuery {
    sent_at: BootNs,
    overdue: bool,
}

#[derive(Debug)]
pub(super) struct Target {
    pub source: Source,
    pub endpoint: Arc<str>,
    pub present: bool,
    pub retired: bool,
    /// Containers with a due query that is not sent yet, the longest waiting first.
    waiting: BTreeSet<(BootNs, ContainerKey)>,
    waiting_since: BTreeMap<ContainerKey, BootNs>,
    pending: BTreeMap<u64, PendingQuery>,
    errors: u32,
    open: Option<Open>,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    since: BootNs,
    probe_at: BootNs,
}

impl Target {
    pub fn new(source: Source, endpoint: Arc<str>, present: bool) -> Self {
        let (waiting, waiting_since, pending) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
        Self { source, endpoint, present, retired: false, waiting, waiting_since, pending, errors: 0, open: None }
    }

    pub fn enqueue(&mut self, since: BootNs, key: ContainerKey) {
        if let Entry::Vacant(vacant) = self.waiting_since.entry(key) {
            vacant.insert(since);
            self.waiting.insert((since, key));
        }
    }

    pub fn pop_waiting(&mut self) -> Option<ContainerKey> {
        let (_, key) = self.waiting.pop_first()?;
        self.waiting_since.remove(&key);
        Some(key)
    }

    pub fn forget(&mut self, key: ContainerKey) {
        if let Some(since) = self.waiting_since.remove(&key) {
            self.waiting.remove(&(since, key));
        }
    }

    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    fn not_overdue(&self) -> usize {
        self.pending.values().filter(|f| !f.overdue).count()
    }

    pub fn has_room(&self, now: BootNs) -> bool {
        // Pending queries that count against the limit, and the limit. Files rarely hang; if one does, its source is blocked until the
        // read ends.
        let is_socket = self.source.is_socket();
        let (open, most) = if is_socket { (self.not_overdue(), SOCKET_IN_FLIGHT) } else { (self.pending.len(), FILES_IN_FLIGHT) };
        self.present && open < most && self.pending.len() < MAX_OPEN && self.open.is_none_or(|o| o.probe_at <= now)
    }

    /// When a waiting query may be sent without another one completing before.
    pub fn next_room(&self, now: BootNs) -> Option<BootNs> {
        if !self.present || (self.waiting.is_empty() && self.pending.is_empty()) {
            return None;
        }
        let probe = self.open.filter(|_| !self.waiting.is_empty()).map(|o| o.probe_at);
        let overdue = self.pending.values().filter(|f| !f.overdue).map(|f| f.sent_at.plus(OVERDUE)).min();
        let overdue = overdue.filter(|_| self.source.is_socket());
        let now = (self.has_room(now) && !self.waiting.is_empty()).then_some(now);
        probe.into_iter().chain(overdue).chain(now).min()
    }

    pub fn record_sent(&mut self, number: u64, key: ContainerKey, now: BootNs) {
        self.pending.insert(number, PendingQuery { sent_at: now, overdue: false });
        if let Some(open) = &mut self.open {
            let outage = now.saturating_since(open.since);
            let pause = if outage < LONG_OUTAGE { PROBE_INTERVAL } else { (outage / 8).min(MAX_BACK_OFF) };
            open.probe_at = now.plus(jittered(pause, key, self.errors));
        }
    }

    /// Counts overdue queries as errors.
    pub fn expire(&mut self, now: BootNs) {
        if !self.source.is_socket() {
            return;
        }
        let mut late = 0;
        for query in self.pending.values_mut().filter(|f| !f.overdue && now.saturating_since(f.sent_at) >= OVERDUE) {
            query.overdue = true;
            late += 1;
        }
        for _ in 0..late {
            self.record_failure(now);
        }
    }

    fn record_failure(&mut self, now: BootNs) {
        self.errors = self.errors.saturating_add(1);
        // An invalid file does not imply that other files are invalid.
        if self.errors >= BREAKER_ERRORS && self.open.is_none() && self.source.is_socket() {
            self.open = Some(Open { since: now, probe_at: now.plus(PROBE_INTERVAL) });
        }
    }

    /// Returns whether the endpoint was known to respond before this outcome.
    pub fn record_outcome(&mut self, number: u64, outcome: &Outcome, now: BootNs) -> bool {
        let query = self.pending.remove(&number);
        let healthy = self.errors == 0;
        match outcome {
            Outcome::Found(_) | Outcome::NotFound => (self.errors, self.open) = (0, None),
            Outcome::Failed if query.is_some_and(|f| !f.overdue) => self.record_failure(now),
            Outcome::Failed | Outcome::NotQueried => {}
        }
        healthy
    }

    pub fn retire(&mut self) {
        (self.retired, self.present) = (true, false);
        self.waiting.clear();
        self.waiting_since.clear();
    }

    /// The endpoint was replaced: pending queries to the old one no longer count against the limit.
    pub fn reset(&mut self) {
        if self.retired {
            return;
        }
        (self.present, self.errors, self.open) = (true, 0, None);
        for query in self.pending.values_mut() {
            query.overdue = true;
        }
    }

    pub fn not_queried(&self, complete: bool, gone: bool) -> QueryAttempt {
        let reason = match (self.present, complete) {
            (false, _) => ABSENT,
            (true, true) => "not needed: other sources provided all labels",
            (true, false) if self.open.is_some() => "the endpoint fails; it is probed, and queries resume once it responds",
            (true, false) if gone => "not queried before the container's end",
            (true, false) => "not queried yet",
        };
        QueryAttempt { status: QueryOutcome::NotTried, at: None, detail: reason.into() }
    }

    #[cfg(test)]
    pub fn open_queries(&self) -> (usize, usize) {
        (self.not_overdue(), self.pending.len())
    }
}
