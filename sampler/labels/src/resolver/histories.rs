//! Generated histories: containers come and go, endpoints fail, hang, vanish and come back in any order.
//!
//! After the last fault every living container that any one source can name is complete, and at no time a bound was passed, a
//! label went blank, or a complete container was asked about.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::target::{FILES_IN_FLIGHT, OPEN_AT_MOST, SOCKET_IN_FLIGHT};
use super::tests::{all_labels, docker, pod, tried};
use super::*;
use crate::Label;

/// The caller gives a question up after this long.
const TIMEOUT: u64 = 5_000 * MS;
const STEP: u64 = 10 * MS;
const FAULTS_END: u64 = 20_000 * MS;

#[derive(Clone, Copy, Debug)]
enum Mood {
    Answers,
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
    Mood(usize, Mood),
}

const SOURCES: [Source; 5] = [Source::Bundle, Source::Logs, Source::Docker, Source::Cri, Source::Podman];

fn mood() -> impl Strategy<Value = Mood> {
    prop_oneof![Just(Mood::Answers), Just(Mood::Fails), Just(Mood::Hangs), Just(Mood::Empty), Just(Mood::Absent)]
}

fn event() -> impl Strategy<Value = (u64, Event)> {
    let what = prop_oneof![
        4 => Just(Event::Appear),
        1 => (0..40usize).prop_map(Event::Gone),
        1 => (0..40usize).prop_map(Event::Evict),
        2 => (0..40usize).prop_map(Event::Hint),
        4 => (0..SOURCES.len(), mood()).prop_map(|(n, m)| Event::Mood(n, m)),
    ];
    (0..FAULTS_END / STEP, what)
}

struct World {
    ladder: LabelResolver,
    moods: Vec<Mood>,
    /// Which source can name a container, by (key, target).
    namer: BTreeMap<u64, usize>,
    living: Vec<u64>,
    open: Vec<(BootNs, Query)>,
    labels: BTreeMap<u64, [bool; Label::ALL.len()]>,
}

impl World {
    fn happen(&mut self, event: &Event, namers: &[usize], now: BootNs) {
        let pick = |living: &[u64], n: usize| (!living.is_empty()).then(|| living[n % living.len()]);
        match event {
            Event::Appear => {
                let key = self.namer.len() as u64 + 1;
                self.namer.insert(key, namers[key as usize % namers.len()]);
                self.living.push(key);
                self.ladder.appeared(if key.is_multiple_of(2) { docker(key) } else { pod(key) }, now);
            }
            Event::Gone(n) => {
                if let Some(key) = pick(&self.living, *n) {
                    self.living.retain(|k| *k != key);
                    self.ladder.gone(ContainerKey(key), now, now);
                }
            }
            Event::Evict(n) => {
                if let Some(key) = pick(&self.living, *n) {
                    self.living.retain(|k| *k != key);
                    self.labels.remove(&key);
                    self.ladder.evicted(ContainerKey(key));
                }
            }
            Event::Hint(n) => {
                if let Some(key) = pick(&self.living, *n) {
                    self.ladder.hint(&format!("{key:064x}"), now);
                }
            }
            Event::Mood(n, mood) => self.turn(*n, *mood, now),
        }
    }

    fn turn(&mut self, n: usize, mood: Mood, now: BootNs) {
        let id = TargetId(n as u16);
        match (self.moods[n], mood) {
            (_, Mood::Absent) => self.ladder.endpoint_absent(id),
            (Mood::Absent, _) => self.ladder.endpoint_back(id, now),
            _ => {}
        }
        self.moods[n] = mood;
    }

    fn answer(&self, ask: &Query) -> Option<Outcome> {
        let knows = self.namer[&ask.key.0] == usize::from(ask.target.0);
        match self.moods[usize::from(ask.target.0)] {
            Mood::Answers if knows => Some(Outcome::Found(all_labels())),
            Mood::Answers | Mood::Empty => Some(Outcome::NotFound),
            Mood::Fails | Mood::Absent => Some(Outcome::Failed),
            Mood::Hangs => None,
        }
    }

    fn step(&mut self, now: BootNs) {
        let late = |(put, _): &(BootNs, Query)| now.saturating_since(*put) >= TIMEOUT;
        for (_, ask) in self.open.extract_if(.., |q| late(q)).collect::<Vec<_>>() {
            self.ladder.answered(&ask, &Outcome::Failed, tried(&Outcome::Failed), now);
        }
        // An answer may make room for the next question.
        loop {
            let asks = self.ladder.due(now);
            if asks.is_empty() {
                break;
            }
            for ask in asks {
                assert!(self.ladder.labels(ask.key).is_some_and(|l| !l.complete()), "a complete container was asked about");
                self.open.push((now, ask));
            }
            self.bounds();
            for (put, ask) in std::mem::take(&mut self.open) {
                match self.answer(&ask).filter(|_| put == now) {
                    Some(outcome) => {
                        self.ladder.answered(&ask, &outcome, tried(&outcome), now);
                    }
                    None => self.open.push((put, ask)),
                }
            }
        }
        for key in self.ladder.take_changed() {
            let Some(labels) = self.ladder.labels(key) else { continue };
            let filled = Label::ALL.map(|l| labels.get(l).is_some());
            let before = self.labels.insert(key.0, filled).unwrap_or_default();
            assert!(before.iter().zip(filled).all(|(was, is)| !was || is), "a label went blank");
        }
    }

    fn bounds(&self) {
        for (n, source) in SOURCES.iter().enumerate() {
            let all = self.open.iter().filter(|(_, a)| usize::from(a.target.0) == n).count();
            let (young, known) = self.ladder.targets[n].open_questions();
            assert_eq!(all, known);
            let most = if source.is_socket() { OPEN_AT_MOST } else { FILES_IN_FLIGHT };
            assert!(all <= most && (!source.is_socket() || young <= SOCKET_IN_FLIGHT), "{source:?}: {young} {all}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whom_any_one_source_can_name_becomes_complete(
        events in vec(event(), 1..60),
        namers in vec(0..SOURCES.len(), 1..7),
    ) {
        let mut world = World {
            ladder: LabelResolver::default(),
            moods: vec![Mood::Answers; SOURCES.len()],
            namer: BTreeMap::new(),
            living: Vec::new(),
            open: Vec::new(),
            labels: BTreeMap::new(),
        };
        for source in SOURCES {
            world.ladder.add_target(source, source.name(), true, BootNs(0));
        }
        let mut events = events;
        events.sort_by_key(|(at, _)| *at);
        let mut events = events.into_iter().peekable();
        let mut now = BootNs(0);
        while now.0 < FAULTS_END {
            while let Some((_, event)) = events.next_if(|(at, _)| at * STEP <= now.0) {
                world.happen(&event, &namers, now);
            }
            world.step(now);
            now = now.plus(STEP);
        }
        for n in 0..SOURCES.len() {
            world.turn(n, Mood::Answers, now);
        }
        // A file that hung is read again once its read has timed out; the path's unlikely sources come after 5 s.
        while now.0 < FAULTS_END + 17_000 * MS {
            world.step(now);
            now = now.plus(STEP);
        }
        for key in &world.living {
            let labels = world.ladder.labels(ContainerKey(*key)).unwrap();
            prop_assert!(labels.complete() && labels.settled, "{key}: {labels:?} {:?}", world.ladder.tried(ContainerKey(*key), now));
        }
        prop_assert!(world.ladder.queue.len() <= world.namer.len() * SOURCES.len() * 2);
    }
}
