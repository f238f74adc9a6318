//! Generated histories: containers come and go, endpoints fail, hang, vanish and come back in any order.
//!
//! After the last fault, every running container that one source knows is complete. At no time a bound was exceeded, a label became
//! empty, or a complete container was queried.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use strum::{EnumCount as _, VariantArray as _};

use super::target::{FILES_IN_FLIGHT, MAX_OPEN, SOCKET_IN_FLIGHT};
use super::tests::{all_labels, attempt, docker, pod};
use super::*;
use crate::Label;

/// The caller's timeout of a query.
const TIMEOUT: u64 = 5_000 * MS;
const STEP: u64 = 10 * MS;
const FAULTS_END: u64 = 20_000 * MS;

#[derive(Clone, Copy, Debug)]
enum EndpointState {
    Responds,
    Fails,
    Hangs,
    Empty,
    Absent,
}

#[derive(Clone, Debug)]
enum Event {
    Appear,
    Gone(usize),
    Evict(usize),
    Hint(usize),
    EndpointState(usize, EndpointState),
}

const SOURCES: [Source; 5] = [Source::Bundle, Source::Logs, Source::Docker, Source::Cri, Source::Podman];

fn endpoint_state() -> impl Strategy<Value = EndpointState> {
    prop_oneof![
        Just(EndpointState::Responds),
        Just(EndpointState::Fails),
        Just(EndpointState::Hangs),
        Just(EndpointState::Empty),
        Just(EndpointState::Absent)
    ]
}

fn event() -> impl Strategy<Value = (u64, Event)> {
    let event = prop_oneof![
        4 => Just(Event::Appear),
        1 => (0..40usize).prop_map(Event::Gone),
        1 => (0..40usize).prop_map(Event::Evict),
        2 => (0..40usize).prop_map(Event::Hint),
        4 => (0..SOURCES.len(), endpoint_state()).prop_map(|(n, m)| Event::EndpointState(n, m)),
    ];
    (0..FAULTS_END / STEP, event)
}

struct World {
    resolver: LabelResolver,
    states: Vec<EndpointState>,
    /// The target that knows the container, by key.
    known_by: BTreeMap<u64, usize>,
    live: Vec<u64>,
    open: Vec<(BootNs, Query)>,
    labels: BTreeMap<u64, [bool; Label::COUNT]>,
}

impl World {
    fn apply(&mut self, event: &Event, knowing_sources: &[usize], now: BootNs) {
        let pick = |live: &[u64], n: usize| (!live.is_empty()).then(|| live[n % live.len()]);
        match event {
            Event::Appear => {
                let key = self.known_by.len() as u64 + 1;
                self.known_by.insert(key, knowing_sources[key as usize % knowing_sources.len()]);
                self.live.push(key);
                self.resolver.appeared(if key.is_multiple_of(2) { docker(key) } else { pod(key) }, now);
            }
            Event::Gone(n) => {
                if let Some(key) = pick(&self.live, *n) {
                    self.live.retain(|k| *k != key);
                    self.resolver.gone(ContainerKey(key), now, now);
                }
            }
            Event::Evict(n) => {
                if let Some(key) = pick(&self.live, *n) {
                    self.live.retain(|k| *k != key);
                    self.labels.remove(&key);
                    self.resolver.evicted(ContainerKey(key));
                }
            }
            Event::Hint(n) => {
                if let Some(key) = pick(&self.live, *n) {
                    self.resolver.hint(&format!("{key:064x}"), now);
                }
            }
            Event::EndpointState(n, endpoint_state) => self.set_state(*n, *endpoint_state, now),
        }
    }

    fn set_state(&mut self, n: usize, endpoint_state: EndpointState, now: BootNs) {
        let id = TargetId(n as u16);
        match (self.states[n], endpoint_state) {
            (_, EndpointState::Absent) => self.resolver.endpoint_absent(id),
            (EndpointState::Absent, _) => self.resolver.endpoint_present(id, now),
            _ => {}
        }
        self.states[n] = endpoint_state;
    }

    fn outcome_of(&self, query: &Query) -> Option<Outcome> {
        let is_known = self.known_by[&query.key.0] == usize::from(query.target.0);
        match self.states[usize::from(query.target.0)] {
            EndpointState::Responds if is_known => Some(Outcome::Found(all_labels())),
            EndpointState::Responds | EndpointState::Empty => Some(Outcome::NotFound),
            EndpointState::Fails | EndpointState::Absent => Some(Outcome::Failed),
            EndpointState::Hangs => None,
        }
    }

    fn step(&mut self, now: BootNs) {
        let late = |(sent, _): &(BootNs, Query)| now.saturating_since(*sent) >= TIMEOUT;
        for (_, query) in self.open.extract_if(.., |q| late(q)).collect::<Vec<_>>() {
            self.resolver.record_outcome(&query, &Outcome::Failed, attempt(&Outcome::Failed), now);
        }
        // An outcome may make room for the next query.
        loop {
            let queries = self.resolver.due(now);
            if queries.is_empty() {
                break;
            }
            for query in queries {
                // The GPUs of a container are in its specification, which is read once in any case.
                let is_needed =
                    self.resolver.labels(query.key).is_some_and(|l| !l.complete()) || query.source.has_specification();
                assert!(is_needed, "a complete container was queried");
                self.open.push((now, query));
            }
            self.check_bounds();
            for (sent, query) in std::mem::take(&mut self.open) {
                match self.outcome_of(&query).filter(|_| sent == now) {
                    Some(outcome) => {
                        self.resolver.record_outcome(&query, &outcome, attempt(&outcome), now);
                    }
                    None => self.open.push((sent, query)),
                }
            }
        }
        for key in self.resolver.take_changed() {
            let Some(labels) = self.resolver.labels(key) else { continue };
            let filled = std::array::from_fn(|n| labels.get(Label::VARIANTS[n]).is_some());
            let before = self.labels.insert(key.0, filled).unwrap_or_default();
            assert!(before.iter().zip(filled).all(|(was_filled, now_filled)| !was_filled || now_filled), "a label became empty");
        }
    }

    fn check_bounds(&self) {
        for (n, source) in SOURCES.iter().enumerate() {
            let all = self.open.iter().filter(|(_, a)| usize::from(a.target.0) == n).count();
            let (not_overdue, known) = self.resolver.targets[n].open_queries();
            assert_eq!(all, known);
            let most = if source.is_socket() { MAX_OPEN } else { FILES_IN_FLIGHT };
            assert!(all <= most && (!source.is_socket() || not_overdue <= SOCKET_IN_FLIGHT), "{source:?}: {not_overdue} {all}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_container_that_one_source_knows_becomes_complete(
        events in vec(event(), 1..60),
        knowing_sources in vec(0..SOURCES.len(), 1..7),
    ) {
        let mut world = World {
            resolver: LabelResolver::default(),
            states: vec![EndpointState::Responds; SOURCES.len()],
            known_by: BTreeMap::new(),
            live: Vec::new(),
            open: Vec::new(),
            labels: BTreeMap::new(),
        };
        for source in SOURCES {
            world.resolver.add_target(source, source.name(), true, BootNs(0));
        }
        let mut events = events;
        events.sort_by_key(|(at, _)| *at);
        let mut events = events.into_iter().peekable();
        let mut now = BootNs(0);
        while now.0 < FAULTS_END {
            while let Some((_, event)) = events.next_if(|(at, _)| at * STEP <= now.0) {
                world.apply(&event, &knowing_sources, now);
            }
            world.step(now);
            now = now.plus(STEP);
        }
        for n in 0..SOURCES.len() {
            world.set_state(n, EndpointState::Responds, now);
        }
        // A file that hung is read again after its read has timed out; sources that the path does not suggest are queried after 5 s.
        while now.0 < FAULTS_END + 17_000 * MS {
            world.step(now);
            now = now.plus(STEP);
        }
        for key in &world.live {
            let labels = world.resolver.labels(ContainerKey(*key)).unwrap();
            prop_assert!(labels.complete() && labels.settled, "{key}: {labels:?} {:?}", world.resolver.attempts(ContainerKey(*key), now));
        }
        prop_assert!(world.resolver.queue.len() <= world.known_by.len() * SOURCES.len() * 2);
    }
}
