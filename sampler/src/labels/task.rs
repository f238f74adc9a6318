//! The one task that owns the ladder: puts what is due, takes answers, publishes, and looks for runtimes.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use sampler_core::units::ContainerKey;
use sampler_labels::{LabelResolver, Source, TargetId};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::task::AbortHandle;

use super::config::LabelConfig;
use super::discovered::{Discovery, FoundSocket};
use super::message::{ContainerEvent, LabelMessage};
use super::shared::SharedLabels;
use super::sockets::WatchedSocket;
use super::source::answer::Answer;
use super::source::{self, LabelSources};
use super::view::{FILES, LabelView, TriedView};
use crate::observe::clock::boot_now;

/// The driver looks at the ladder at most this often.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// And at least this often.
const IDLE_PAUSE: Duration = Duration::from_secs(1);
/// A view is a copy of a table of all containers: not for each of a thousand answers.
const PUBLISH_EVERY: Duration = Duration::from_millis(20);
/// Where runtimes keep things is looked for again while containers lack labels: this often, and less and less.
const FIND_FIRST: Duration = Duration::from_secs(1);
const FIND_LAST: Duration = Duration::from_secs(60);
const SEARCHES: usize = 2;
/// A socket that was found and is gone for so long has moved, or its runtime is no more.
const RETIRE_AFTER: Duration = Duration::from_secs(60);
/// Endpoints that fail and that nobody has to be asked about.
const PROBE_EVERY: Duration = Duration::from_secs(10);
/// A machine has a handful; discovery must not add them without end.
const MAX_TARGETS: usize = 64;

pub(super) struct LabelTask {
    config: LabelConfig,
    sources: Arc<LabelSources>,
    ladder: LabelResolver,
    shared: Arc<SharedLabels>,
    /// What the next view is a copy of.
    view: LabelView,
    published: Instant,
    unpublished: bool,
    watched: mpsc::Sender<WatchedSocket>,
    /// Of engines' events.
    followers: HashMap<TargetId, AbortHandle>,
    /// When failing endpoints were last looked at.
    probed: Instant,
    /// Since when nothing is at an endpoint that was found, not given.
    absent: HashMap<TargetId, Instant>,
    /// Source and endpoint of every socket that the last search found.
    wanted: HashSet<(Source, String)>,
    /// A search that hangs in a file system keeps its thread: there are two at most.
    searches: Arc<Semaphore>,
    finding: bool,
    /// Something happened while a search ran, or that makes one worth it though nobody lacks a label.
    find_again: bool,
    /// When runtimes are looked for next.
    find_at: Option<Instant>,
    find_pause: Duration,
}

impl LabelTask {
    pub fn new(
        config: LabelConfig,
        sources: Arc<LabelSources>,
        shared: Arc<SharedLabels>,
        watched: mpsc::Sender<WatchedSocket>,
    ) -> Self {
        Self {
            config,
            sources,
            ladder: LabelResolver::default(),
            shared,
            view: LabelView::new(),
            published: Instant::now(),
            unpublished: false,
            watched,
            followers: HashMap::new(),
            probed: Instant::now(),
            absent: HashMap::new(),
            wanted: HashSet::new(),
            searches: Arc::new(Semaphore::new(SEARCHES)),
            finding: false,
            find_again: false,
            find_at: None,
            find_pause: FIND_FIRST,
        }
    }

    pub async fn run(mut self, mut events: UnboundedReceiver<ContainerEvent>, mut inbox: Receiver<LabelMessage>) {
        let files = self.config.sources.clone();
        for source in files.into_iter().filter(|s| !s.is_socket()) {
            self.sources.add(source, Path::new(""));
            self.ladder.add_target(source, FILES, true, boot_now());
        }
        self.take_usual();
        self.find();
        loop {
            let pause = self.step();
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => {
                        self.container(event);
                        while let Ok(event) = events.try_recv() {
                            self.container(event);
                        }
                    }
                    None => return,
                },
                Some(word) = inbox.recv() => {
                    self.word(word);
                    while let Ok(word) = inbox.try_recv() {
                        self.word(word);
                    }
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Those that are new are asked from now on; those that nobody has any more are not spoken of.
    fn take_sockets(&mut self, found: Vec<FoundSocket>) {
        let known: Vec<(Source, String)> = self.ladder.targets().map(|(_, s, e)| (s, e.to_owned())).collect();
        for socket in found {
            let endpoint = socket.endpoint();
            let is_known = known.iter().any(|(s, e)| *s == socket.source && *e == endpoint);
            self.wanted.insert((socket.source, endpoint.clone()));
            if is_known || self.ladder.targets().count() >= MAX_TARGETS {
                continue;
            }
            let (present, now) = (socket.seen.is_some(), boot_now());
            let retired = self.ladder.retired(socket.source, &endpoint);
            let id = match retired {
                Some(id) => {
                    self.ladder.revive(id, present, now);
                    id
                }
                None => {
                    self.sources.add(socket.source, &socket.path);
                    self.ladder.add_target(socket.source, &endpoint, present, now)
                }
            };
            let given = self.config.endpoints.contains(&(socket.source, socket.path.clone()));
            match socket.seen {
                None if given => self.shared.stats.absent(socket.source, &endpoint, true),
                None => {}
                Some(_) => {
                    tracing::info!("labels: {} at {endpoint}", socket.source.name());
                    self.probe(id);
                }
            }
            if matches!(socket.source, Source::Docker | Source::Podman) {
                let follower = tokio::spawn(source::docker::follow(socket.path.clone(), self.shared.words.clone()));
                self.followers.insert(id, follower.abort_handle());
            }
            if retired.is_some() {
                continue;
            }
            // The watching thread ends only with the process.
            let _ended = self.watched.send(WatchedSocket { target: id, path: socket.path, seen: socket.seen });
        }
    }

    /// What was given, and what is usual, before the processes have been looked at.
    fn take_usual(&mut self) {
        let (config, words) = (self.config.clone(), self.shared.words.clone());
        tokio::task::spawn_blocking(move || {
            // The driver ends only with the process.
            let _ended = words.blocking_send(LabelMessage::Usual(Discovery::usual(&config).sockets));
        });
    }

    /// Should the search never answer, because it hangs in a file system, one more follows, much later.
    fn find(&mut self) {
        self.find_at = Some(Instant::now() + FIND_LAST);
        let Ok(permit) = Arc::clone(&self.searches).try_acquire_owned() else { return };
        (self.finding, self.find_again) = (true, false);
        let (config, words) = (self.config.clone(), self.shared.words.clone());
        tokio::task::spawn_blocking(move || {
            let _held = permit;
            // The driver ends only with the process.
            let _ended = words.blocking_send(LabelMessage::Discovery(Discovery::look(&config)));
        });
    }

    fn find_soon(&mut self) {
        self.find_pause = FIND_FIRST;
        if self.finding {
            self.find_again = true;
        } else {
            self.find_at = self.find_at.map(|at| at.min(Instant::now() + FIND_FIRST));
        }
    }

    /// Also when nobody lacks a label.
    fn find_now(&mut self) {
        self.find_soon();
        self.find_again = true;
    }

    /// Those that have been gone for long, and that nobody has any more, are not spoken of.
    fn retire(&mut self) {
        let long_gone = self.absent.iter().filter(|(_, since)| since.elapsed() >= RETIRE_AFTER).map(|(id, _)| *id);
        for id in long_gone.collect::<Vec<_>>() {
            let Some(source) = self.source(id) else { continue };
            let endpoint = self.endpoint(id);
            if self.wanted.contains(&(source, endpoint.clone())) {
                continue;
            }
            self.absent.remove(&id);
            self.ladder.retire(id);
            self.shared.stats.retired(source, &endpoint);
            if let Some(follower) = self.followers.remove(&id) {
                follower.abort();
            }
        }
    }

    fn found(&mut self, found: Discovery) {
        let before = self.sources.places.load_full();
        let mut places = found.places;
        places.keep(&before);
        // Sockets are taken as they were found: those of a stopped runtime are nobody's.
        let changed = *before != places;
        self.finding = false;
        self.find_pause = if changed || self.find_again { FIND_FIRST } else { (self.find_pause * 2).min(FIND_LAST) };
        self.find_at = Some(Instant::now() + self.find_pause);
        // Also when the places are the same: a link on the way to one may be new.
        self.wanted.clear();
        self.take_sockets(found.sockets);
        if changed {
            self.sources.places.store(Arc::new(places));
            let files: Vec<TargetId> = self.ladder.targets().filter(|(_, s, _)| !s.is_socket()).map(|(id, ..)| id).collect();
            files.into_iter().for_each(|id| self.ladder.endpoint_back(id, boot_now()));
        }
    }

    /// Asks what is due, publishes, and says how long nothing more is.
    fn step(&mut self) -> Duration {
        let now = boot_now();
        for ask in self.ladder.due(now) {
            let (sources, words) = (Arc::clone(&self.sources), self.shared.words.clone());
            tokio::spawn(async move {
                // In a task of its own: should it panic, its place is not held for ever.
                let asked = ask.clone();
                let answer = tokio::spawn(async move { source::put(sources, &asked).await }).await;
                let answer = answer.unwrap_or_else(Answer::error);
                // The driver ends only with the process.
                let _ended = words.send(LabelMessage::Answered(ask, answer)).await;
            });
        }
        self.retire();
        if self.find_at.is_some_and(|at| at <= Instant::now()) && (self.find_again || self.ladder.is_asking(now)) {
            self.find();
        }
        self.probe_the_failing();
        let unpublished = self.publish();
        let wait = self.ladder.next_due(now).map_or(u64::MAX, |next| next.saturating_since(boot_now()));
        Duration::from_nanos(wait).min(unpublished).clamp(SHORTEST_PAUSE, IDLE_PAUSE)
    }

    /// Until when something waits to be published.
    fn publish(&mut self) -> Duration {
        for key in self.ladder.take_changed() {
            self.unpublished = true;
            match self.ladder.labels(key) {
                Some(labels) => drop(self.view.insert(key, Arc::new(labels.clone()))),
                None => drop(self.view.remove(&key)),
            }
        }
        if !self.unpublished {
            return Duration::MAX;
        }
        let since = self.published.elapsed();
        if since < PUBLISH_EVERY {
            return PUBLISH_EVERY - since;
        }
        self.shared.view.store(Arc::new(self.view.clone()));
        (self.published, self.unpublished) = (Instant::now(), false);
        Duration::MAX
    }

    fn container(&mut self, event: ContainerEvent) {
        let now = boot_now();
        match event {
            ContainerEvent::Appeared(record) => {
                let key = record.key;
                // One that nobody knew before may have come with a runtime that nobody knew before.
                self.find_soon();
                if self.ladder.appeared(record, now) {
                    self.resolved(key);
                }
            }
            ContainerEvent::Gone(key, at) => self.ladder.gone(key, at, now),
            ContainerEvent::Evicted(key) => self.ladder.evicted(key),
        }
    }

    fn resolved(&self, key: ContainerKey) {
        if let Some(ns) = self.ladder.labels(key).and_then(|l| l.resolved_after_ns) {
            self.shared.stats.resolved(ns);
        }
    }

    fn word(&mut self, word: LabelMessage) {
        let now = boot_now();
        match word {
            LabelMessage::Answered(ask, answer) => {
                if self.ladder.answered(&ask, &answer.outcome, answer.tried(), now) {
                    self.resolved(ask.key);
                }
                // A late answer of one that is not spoken of any more says nothing.
                if self.source(ask.target).is_some() {
                    self.shared.stats.answered(ask.source, &self.endpoint(ask.target), &answer);
                }
            }
            LabelMessage::Hint(id) => self.ladder.hint(&id, now),
            // One that was given up as nobody's: the next search sees whose it is.
            LabelMessage::Back(target) | LabelMessage::Absent(target) if self.source(target).is_none() => self.find_now(),
            LabelMessage::Back(target) => {
                tracing::info!("labels: {} appeared or was replaced", self.endpoint(target));
                self.absent.remove(&target);
                self.ladder.endpoint_back(target, now);
                self.probe(target);
            }
            LabelMessage::Absent(target) => {
                let endpoint = self.endpoint(target);
                if let Some(source) = self.source(target) {
                    self.shared.stats.absent(source, &endpoint, false);
                }
                tracing::info!("labels: {endpoint} is gone");
                self.ladder.endpoint_absent(target);
                self.absent.insert(target, Instant::now());
                // It may have moved.
                self.find_now();
            }
            LabelMessage::Discovery(found) => self.found(found),
            LabelMessage::Usual(sockets) => self.take_sockets(sockets),
            LabelMessage::Probed(target, told) => {
                let source = self.source(target).filter(|_| self.ladder.is_present(target));
                if let Some(source) = source {
                    self.shared.stats.probed(source, &self.endpoint(target), told.err().as_deref());
                }
            }
            LabelMessage::Attempts(key, to) => {
                let all = self.ladder.tried(key, now);
                let view = all.iter().map(|(source, endpoint, tried)| TriedView::new(*source, endpoint, tried));
                let left_out = self.ladder.labels(key).into_iter().flat_map(|labels| self.config.left_out(labels));
                let view = view.chain(left_out).collect();
                // Whoever asked may have gone.
                let _gone = to.send(view);
            }
        }
    }

    fn probe(&self, target: TargetId) {
        let (sources, words) = (Arc::clone(&self.sources), self.shared.words.clone());
        tokio::spawn(async move {
            let told = source::probe(sources, target).await;
            // The driver ends only with the process.
            let _ended = words.send(LabelMessage::Probed(target, told)).await;
        });
    }

    /// An endpoint that failed when it was last asked would be called failing for as long as nobody has to be asked.
    fn probe_the_failing(&mut self) {
        if self.probed.elapsed() < PROBE_EVERY {
            return;
        }
        self.probed = Instant::now();
        let present = self.ladder.targets().filter(|(id, source, _)| source.is_socket() && self.ladder.is_present(*id));
        let failing = present.filter(|(_, source, endpoint)| self.shared.stats.is_down(*source, endpoint)).map(|(id, ..)| id);
        failing.collect::<Vec<_>>().into_iter().for_each(|id| self.probe(id));
    }

    fn source(&self, target: TargetId) -> Option<Source> {
        self.ladder.targets().find(|(id, ..)| *id == target).map(|(_, source, _)| source)
    }

    fn endpoint(&self, target: TargetId) -> String {
        self.ladder.targets().find(|(id, ..)| *id == target).map(|(.., e)| e.to_owned()).unwrap_or_default()
    }
}
