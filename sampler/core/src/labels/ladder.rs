//! When to ask whom: sans-IO. It says what it wants asked, is told the answers, and never gives a container up.
//!
//! ```text
//!  per container:  Observed (path only) -> Partial -> Complete          any -> Gone -> evicted with its identity
//!  per (container, source):
//!      file    0, 10, 30, 100, 300 ms after it was seen, then every 0.5 s doubling to 30 s
//!      socket  250 ms after it was seen (asking earlier races its creation), then the same back-off
//!  per socket:     closed --5 transport errors--> open --1 s doubling to 30 s--> one probe --answer--> closed
//! ```
//! At most [`IN_FLIGHT`] questions per source are open; one per container and source. "Not found" is an answer, not an error.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::values::{ContainerLabels, Facts, Source};
use crate::identity::{ContainerRecord, KEEP_GONE_NS};
use crate::units::{BootNs, ContainerKey};

const MS: u64 = 1_000_000;
const FILE_STEPS: [u64; 5] = [0, 10 * MS, 30 * MS, 100 * MS, 300 * MS];
const SOCKET_AFTER: u64 = 250 * MS;
const BACK_OFF_FIRST: u64 = 500 * MS;
const BACK_OFF_LAST: u64 = 30_000 * MS;
/// A runtime under load must not be asked for everything at once.
const IN_FLIGHT: usize = 4;
const BREAKER_ERRORS: u32 = 5;
const PROBE_FIRST: u64 = 1_000 * MS;
/// A container this old is shown with what is known.
const SHOWN_AFTER: u64 = 2_000 * MS;

/// One question to put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    pub key: ContainerKey,
    pub container_id: Arc<str>,
    pub source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Found(Facts),
    NotFound,
    /// Transport error, timeout, or an answer that makes no sense.
    Failed,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    attempts: u32,
    next: BootNs,
    in_flight: bool,
}

#[derive(Debug)]
struct Entry {
    record: Arc<ContainerRecord>,
    labels: ContainerLabels,
    seen: BootNs,
    slots: BTreeMap<Source, Slot>,
    gone: Option<BootNs>,
}

#[derive(Debug, Default)]
struct Breaker {
    errors: u32,
    open_until: Option<BootNs>,
    pause: u64,
    in_flight: usize,
}

#[derive(Debug)]
pub struct Ladder {
    sources: Vec<Source>,
    entries: HashMap<ContainerKey, Entry>,
    breakers: BTreeMap<Source, Breaker>,
}

impl Ladder {
    pub fn new(sources: Vec<Source>) -> Self {
        Self { sources, entries: HashMap::new(), breakers: BTreeMap::new() }
    }

    pub fn appeared(&mut self, record: Arc<ContainerRecord>, now: BootNs) {
        let slot = |source: &Source| {
            let after = if source.is_socket() { SOCKET_AFTER } else { 0 };
            (*source, Slot { attempts: 0, next: now.plus(after), in_flight: false })
        };
        let slots = self.sources.iter().map(slot).collect();
        let labels = ContainerLabels::from_path(&record);
        self.entries.insert(record.key, Entry { record, labels, seen: now, slots, gone: None });
    }

    pub fn gone(&mut self, key: ContainerKey, at: BootNs) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.gone = Some(at);
        }
    }

    /// A runtime spoke of this container: ask now instead of waiting for the back-off.
    pub fn hint(&mut self, container_id: &str, now: BootNs) {
        self.requeue(now, |labels| &*labels.container_id == container_id);
    }

    /// A runtime's socket appeared or came back.
    pub fn endpoint_back(&mut self, source: Source, now: BootNs) {
        self.breakers
            .insert(source, Breaker { in_flight: self.breakers.get(&source).map_or(0, |b| b.in_flight), ..Breaker::default() });
        self.requeue(now, |_| true);
    }

    fn requeue(&mut self, now: BootNs, which: impl Fn(&ContainerLabels) -> bool) {
        for entry in self.entries.values_mut().filter(|e| e.gone.is_none() && !e.labels.complete() && which(&e.labels)) {
            for (source, slot) in &mut entry.slots {
                let floor = if source.is_socket() { entry.seen.plus(SOCKET_AFTER) } else { now };
                slot.next = slot.next.min(floor.max(now));
                slot.attempts = slot.attempts.min(FILE_STEPS.len() as u32);
            }
        }
    }

    /// What to ask now; each is marked as being asked until [`Ladder::answered`].
    pub fn due(&mut self, now: BootNs) -> Vec<Ask> {
        self.entries.retain(|_, e| e.gone.is_none_or(|at| now.saturating_since(at) < KEEP_GONE_NS));
        let mut asks = Vec::new();
        for entry in self.entries.values_mut() {
            let complete = entry.labels.complete();
            entry.labels.settled |= complete || now.saturating_since(entry.seen) >= SHOWN_AFTER || entry.gone.is_some();
            // The files of a container that is gone may still be there for a moment: what was begun is tried out, quickly.
            let given_up = entry.gone.is_some_and(|at| now.saturating_since(at) > SHOWN_AFTER);
            if complete || given_up {
                continue;
            }
            for (source, slot) in &mut entry.slots {
                let breaker = self.breakers.entry(*source).or_default();
                if slot.in_flight || slot.next > now || breaker.in_flight >= IN_FLIGHT {
                    continue;
                }
                if let Some(until) = breaker.open_until {
                    // One probe at a time while it is open.
                    if until > now || breaker.in_flight > 0 {
                        continue;
                    }
                }
                breaker.in_flight += 1;
                slot.in_flight = true;
                let container_id = Arc::clone(&entry.labels.container_id);
                asks.push(Ask { key: entry.record.key, container_id, source: *source });
            }
        }
        asks
    }

    pub fn answered(&mut self, key: ContainerKey, source: Source, outcome: &Outcome, now: BootNs) {
        let breaker = self.breakers.entry(source).or_default();
        breaker.in_flight = breaker.in_flight.saturating_sub(1);
        if *outcome == Outcome::Failed {
            breaker.errors += 1;
            if breaker.errors >= BREAKER_ERRORS {
                breaker.pause = (breaker.pause * 2).clamp(PROBE_FIRST, BACK_OFF_LAST);
                breaker.open_until = Some(now.plus(breaker.pause));
            }
        } else {
            (breaker.errors, breaker.open_until, breaker.pause) = (0, None, 0);
        }
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if let Outcome::Found(facts) = outcome {
            let complete_before = entry.labels.complete();
            entry.labels.merge(source, facts);
            if !complete_before && entry.labels.complete() {
                entry.labels.settled = true;
                let created = entry.record.creation_seen.then_some(entry.record.created);
                entry.labels.resolved_after_ns = created.map(|at| now.saturating_since(at));
            }
        }
        if let Some(slot) = entry.slots.get_mut(&source) {
            slot.in_flight = false;
            slot.attempts += 1;
            let step = FILE_STEPS.get(slot.attempts as usize).filter(|_| !source.is_socket());
            slot.next = match step {
                Some(after) => entry.seen.plus(*after).max(now),
                None => now.plus(back_off(key, slot.attempts.saturating_sub(if source.is_socket() { 1 } else { 5 }))),
            };
        }
    }

    /// When [`Ladder::due`] may have something new.
    pub fn next_due(&self) -> Option<BootNs> {
        let of_entry = |entry: &Entry| {
            if entry.labels.complete() || entry.gone.is_some() && entry.labels.settled {
                return None;
            }
            let asks = entry.slots.values().filter(|s| !s.in_flight).map(|s| s.next).min();
            let shown = (!entry.labels.settled).then(|| entry.seen.plus(SHOWN_AFTER));
            asks.into_iter().chain(shown).min()
        };
        self.entries.values().filter_map(of_entry).min()
    }

    pub fn labels(&self) -> impl Iterator<Item = (ContainerKey, &ContainerLabels)> {
        self.entries.iter().map(|(key, entry)| (*key, &entry.labels))
    }

    /// Whether calls to this source are being held back.
    pub fn is_open(&self, source: Source) -> bool {
        self.breakers.get(&source).is_some_and(|b| b.open_until.is_some())
    }
}

/// 0.5 s doubling to 30 s, less up to a quarter that depends on container and attempt: many containers must not ask as one.
fn back_off(key: ContainerKey, doublings: u32) -> u64 {
    let full = BACK_OFF_FIRST.saturating_mul(1 << doublings.min(10)).min(BACK_OFF_LAST);
    let mixed = (key.0 ^ u64::from(doublings) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
    full - full / 4 * mixed / 1024
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::{Label, parse};

    fn record(key: u64, path: &str) -> Arc<ContainerRecord> {
        let identity = parse(path);
        let (key, created) = (ContainerKey(key), BootNs(0));
        Arc::new(ContainerRecord { key, cgroup_path: path.into(), identity, created, creation_seen: true })
    }

    fn docker(key: u64) -> Arc<ContainerRecord> {
        record(key, &format!("/docker/{key:064x}"))
    }

    fn plain() -> Outcome {
        let mut facts = Facts { knows_pods: true, ..Facts::default() };
        facts.set(Label::Name, Some("n"));
        facts.set(Label::Image, Some("i"));
        Outcome::Found(facts)
    }

    /// Runs the clock, answering each ask with `answer`; returns when each was asked, in ms.
    fn asked(ladder: &mut Ladder, until_ms: u64, answer: impl Fn(&Ask) -> Outcome) -> Vec<(u64, Source)> {
        let mut seen = Vec::new();
        let mut now = BootNs(0);
        loop {
            for ask in ladder.due(now) {
                seen.push((now.0 / MS, ask.source));
                ladder.answered(ask.key, ask.source, &answer(&ask), now);
            }
            match ladder.next_due() {
                Some(next) if next.0 <= until_ms * MS => now = BootNs(next.0.max(now.0 + MS)),
                _ => return seen,
            }
        }
    }

    #[test]
    fn files_first_then_sockets_then_for_ever() {
        let mut ladder = Ladder::new(vec![Source::DockerFile, Source::Docker]);
        ladder.appeared(docker(1), BootNs(0));
        let asked = asked(&mut ladder, 100_000, |_| Outcome::NotFound);
        let files: Vec<u64> = asked.iter().filter(|a| a.1 == Source::DockerFile).map(|a| a.0).collect();
        assert_eq!(files[..5], [0, 10, 30, 100, 300]);
        assert!((675..=800).contains(&files[5]), "{files:?}");
        assert_eq!(asked.iter().find(|a| a.1 == Source::Docker).map(|a| a.0), Some(250));
        assert!(files.windows(2).all(|w| w[1] - w[0] <= 30_000) && *files.last().unwrap() > 60_000, "{files:?}");
    }

    #[test]
    fn complete_ends_the_asking_and_settles() {
        let mut ladder = Ladder::new(vec![Source::DockerFile, Source::Docker]);
        ladder.appeared(docker(1), BootNs(0));
        assert_eq!(asked(&mut ladder, 100_000, |_| plain()), [(0, Source::DockerFile)]);
        let (_, labels) = ladder.labels().next().unwrap();
        assert!(labels.complete() && labels.settled && labels.resolved_after_ns == Some(0));
        assert_eq!((labels.text(Label::Name), labels.text(Label::Pod)), ("n", ""));
    }

    #[test]
    fn a_pod_without_its_names_is_shown_after_two_seconds_and_counted() {
        let mut ladder = Ladder::new(vec![Source::Bundle]);
        let path = format!("/kubepods/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{:064x}", 7);
        ladder.appeared(record(1, &path), BootNs(0));
        asked(&mut ladder, 1_900, |_| Outcome::NotFound);
        assert!(!ladder.labels().next().unwrap().1.settled);
        ladder.due(BootNs(2_000 * MS));
        let (_, labels) = ladder.labels().next().unwrap();
        assert!(labels.settled && labels.missing().count() == 5 && *labels.id == path);
    }

    #[test]
    fn the_breaker_holds_calls_back_and_probes() {
        let mut ladder = Ladder::new(vec![Source::Docker]);
        for key in 1..=20 {
            ladder.appeared(docker(key), BootNs(0));
        }
        let first = ladder.due(BootNs(300 * MS));
        assert_eq!(first.len(), IN_FLIGHT);
        for _ in 0..2 {
            let asks = if ladder.breakers[&Source::Docker].in_flight == 0 { ladder.due(BootNs(300 * MS)) } else { first.clone() };
            for ask in asks {
                ladder.answered(ask.key, ask.source, &Outcome::Failed, BootNs(300 * MS));
            }
        }
        assert!(ladder.is_open(Source::Docker));
        assert!(ladder.due(BootNs(310 * MS)).is_empty());
        assert_eq!(ladder.due(BootNs(10_000 * MS)).len(), 1);
        ladder.endpoint_back(Source::Docker, BootNs(10_000 * MS));
        assert_eq!(ladder.due(BootNs(10_000 * MS)).len(), IN_FLIGHT - 1);
    }

    #[test]
    fn dockershim_names_fill_what_is_empty() {
        let mut facts = Facts::default();
        facts.from_dockershim_name("k8s_train_trainer-0_prod_8bb25662-de9a-11e9-84e7-f8f21e04010c_0");
        assert_eq!(facts.labels[Label::Namespace as usize].as_deref(), Some("prod"));
        assert_eq!(facts.labels[Label::Container as usize].as_deref(), Some("train"));
        let before = facts.clone();
        facts.from_dockershim_name("k8s_not_enough");
        assert_eq!(facts, before);
    }
}
