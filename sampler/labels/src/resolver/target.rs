//! One source at one endpoint: who waits for it, how many questions are open, and its breaker.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::entry::{QueryAttempt, QueryOutcome};
use super::{BACK_OFF_LAST, MS, Outcome, jittered};
use crate::values::Source;
use sampler_core::units::{BootNs, ContainerKey};

/// Why an endpoint without anybody was not asked.
pub const ABSENT: &str = "there is nothing at this endpoint";
/// A runtime under load must not be asked for everything at once.
pub(super) const SOCKET_IN_FLIGHT: usize = 4;
pub const FILES_IN_FLIGHT: usize = 16;
/// Overdue ones included; a socket that comes and goes and never answers must not gather them.
pub(super) const OPEN_AT_MOST: usize = 24;
/// A question without an answer by then is taken for an error.
pub(super) const OVERDUE: u64 = 1_000 * MS;
pub(super) const BREAKER_ERRORS: u32 = 5;
const PROBE_FIRST: u64 = 1_000 * MS;
/// An outage this long is probed less and less often.
const LONG_OUTAGE: u64 = 600_000 * MS;

#[derive(Debug)]
struct Flight {
    put: BootNs,
    overdue: bool,
}

#[derive(Debug)]
pub(super) struct Target {
    pub source: Source,
    pub endpoint: Arc<str>,
    pub present: bool,
    pub retired: bool,
    /// Due, and not asked yet; those that have waited longest first.
    waiting: BTreeSet<(BootNs, ContainerKey)>,
    waiting_since: BTreeMap<ContainerKey, BootNs>,
    flights: BTreeMap<u64, Flight>,
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
        let (waiting, waiting_since, flights) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
        Self { source, endpoint, present, retired: false, waiting, waiting_since, flights, errors: 0, open: None }
    }

    pub fn wait(&mut self, since: BootNs, key: ContainerKey) {
        if let Entry::Vacant(vacant) = self.waiting_since.entry(key) {
            vacant.insert(since);
            self.waiting.insert((since, key));
        }
    }

    pub fn next_waiting(&mut self) -> Option<ContainerKey> {
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

    fn young(&self) -> usize {
        self.flights.values().filter(|f| !f.overdue).count()
    }

    /// Files do not hang as sockets do; where one does, its source stands still until the read ends.
    fn in_flight(&self) -> (usize, usize) {
        if self.source.is_socket() { (self.young(), SOCKET_IN_FLIGHT) } else { (self.flights.len(), FILES_IN_FLIGHT) }
    }

    pub fn has_room(&self, now: BootNs) -> bool {
        let (open, most) = self.in_flight();
        self.present && open < most && self.flights.len() < OPEN_AT_MOST && self.open.is_none_or(|o| o.probe_at <= now)
    }

    /// When there may be room for those who wait, without an answer coming.
    pub fn next_room(&self, now: BootNs) -> Option<BootNs> {
        if !self.present || (self.waiting.is_empty() && self.flights.is_empty()) {
            return None;
        }
        let probe = self.open.filter(|_| !self.waiting.is_empty()).map(|o| o.probe_at);
        let overdue = self.flights.values().filter(|f| !f.overdue).map(|f| f.put.plus(OVERDUE)).min();
        let overdue = overdue.filter(|_| self.source.is_socket());
        let now = (self.has_room(now) && !self.waiting.is_empty()).then_some(now);
        probe.into_iter().chain(overdue).chain(now).min()
    }

    pub fn put(&mut self, number: u64, key: ContainerKey, now: BootNs) {
        self.flights.insert(number, Flight { put: now, overdue: false });
        if let Some(open) = &mut self.open {
            let outage = now.saturating_since(open.since);
            let pause = if outage < LONG_OUTAGE { PROBE_FIRST } else { (outage / 8).min(BACK_OFF_LAST) };
            open.probe_at = now.plus(jittered(pause, key, self.errors));
        }
    }

    /// Takes questions without an answer for errors.
    pub fn overdue(&mut self, now: BootNs) {
        if !self.source.is_socket() {
            return;
        }
        let mut late = 0;
        for flight in self.flights.values_mut().filter(|f| !f.overdue && now.saturating_since(f.put) >= OVERDUE) {
            flight.overdue = true;
            late += 1;
        }
        for _ in 0..late {
            self.failed(now);
        }
    }

    fn failed(&mut self, now: BootNs) {
        self.errors = self.errors.saturating_add(1);
        // A file is read or not; one that makes no sense says nothing about the others.
        if self.errors >= BREAKER_ERRORS && self.open.is_none() && self.source.is_socket() {
            self.open = Some(Open { since: now, probe_at: now.plus(PROBE_FIRST) });
        }
    }

    /// Whether the endpoint is known to answer, whatever came of this question.
    pub fn answered(&mut self, number: u64, outcome: &Outcome, now: BootNs) -> bool {
        let flight = self.flights.remove(&number);
        let healthy = self.errors == 0;
        match outcome {
            Outcome::Found(_) | Outcome::NotFound => (self.errors, self.open) = (0, None),
            Outcome::Failed if flight.is_some_and(|f| !f.overdue) => self.failed(now),
            Outcome::Failed | Outcome::NotAsked => {}
        }
        healthy
    }

    pub fn retire(&mut self) {
        (self.retired, self.present) = (true, false);
        self.waiting.clear();
        self.waiting_since.clear();
    }

    /// There is something new at the endpoint; what the old one owes is not waited for.
    pub fn back(&mut self) {
        if self.retired {
            return;
        }
        (self.present, self.errors, self.open) = (true, 0, None);
        for flight in self.flights.values_mut() {
            flight.overdue = true;
        }
    }

    pub fn not_tried(&self, complete: bool) -> QueryAttempt {
        let why = match (self.present, complete) {
            (false, _) => ABSENT,
            (true, true) => "not needed: others had told everything",
            (true, false) if self.open.is_some() => "it fails; it is probed, and everyone is asked about once it answers",
            (true, false) => "its turn has not come yet",
        };
        QueryAttempt { told: QueryOutcome::NotTried, at: None, detail: why.into() }
    }

    #[cfg(test)]
    pub fn open_questions(&self) -> (usize, usize) {
        (self.young(), self.flights.len())
    }
}
