//! The task that owns the resolver: it executes due queries, records their outcomes, publishes labels, and searches for runtimes.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use sampler_core::units::{BootNs, ContainerKey};
use sampler_labels::{LabelResolver, Query, Source, TargetId};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::task::AbortHandle;

use super::activation::{Dormant, Presence};
use super::config::LabelConfig;
use super::discovered::{Discovery, FoundSocket};
use super::file_reader::FileReader;
use super::message::{ContainerEvent, LabelMessage};
use super::process_search::ProcessSearch;
use super::shared::SharedLabels;
use super::sockets::WatchedSocket;
use super::source::reply::SourceReply;
use super::source::{self, KnownProcesses, LabelSources};
use super::view::{AttemptView, FILES, LabelView};
use crate::observe::clock::boot_now;

/// Minimum interval between two steps of the task.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// Maximum interval between two steps.
const IDLE_PAUSE: Duration = Duration::from_secs(1);
/// A publication copies what changed, so there is not one for each of many replies.
const PUBLISH_EVERY: Duration = Duration::from_millis(20);
/// While containers lack labels, the search for runtimes is repeated at this interval, which doubles up to the maximum.
const MIN_SEARCH_PAUSE: Duration = Duration::from_secs(1);
/// The same for new containers: where many start, most are of the runtimes that are known.
const CONTAINER_SEARCH_PAUSE: Duration = Duration::from_secs(4);
const MAX_SEARCH_PAUSE: Duration = Duration::from_secs(60);
const MAX_SEARCHES: usize = 2;
/// A discovered socket that is absent for this long has moved, or its runtime was removed.
const RETIRE_AFTER: Duration = Duration::from_secs(60);
const RETIRE_EVERY: Duration = Duration::from_secs(1);
/// Interval of probes to failing endpoints.
const PROBE_EVERY: Duration = Duration::from_secs(10);
/// Bounds the targets that discovery adds; a machine has a handful.
const MAX_TARGETS: usize = 64;

pub(super) struct LabelTask {
    config: LabelConfig,
    /// Where queries to sockets run: what an engine sends, however much, does not delay the resolver.
    io: Handle,
    sources: Arc<LabelSources>,
    files: FileReader,
    resolver: LabelResolver,
    shared: Arc<SharedLabels>,
    /// The source of the next published view.
    view: LabelView,
    published: Instant,
    unpublished: bool,
    watched: mpsc::Sender<WatchedSocket>,
    /// Tasks that follow the events of engines.
    followers: HashMap<TargetId, AbortHandle>,
    /// When failing endpoints were last probed.
    probed: Instant,
    /// Absent endpoints, with the time from which they are absent.
    absent: HashMap<TargetId, Instant>,
    /// When those that are absent for long were last retired.
    retired_at: Instant,
    /// Endpoints that are not queried because a connection would start an engine.
    dormant: HashMap<TargetId, Dormant>,
    /// Source and endpoint of every socket of the last search.
    discovered_sockets: HashSet<(Source, String)>,
    /// A search that hangs in a file system keeps its thread; the permits limit them to two.
    search_permits: Arc<Semaphore>,
    process_search: Arc<Mutex<ProcessSearch>>,
    /// The next search has to inspect all processes.
    search_all: bool,
    searching: bool,
    /// Requests another search: after an event during a search, or after one that needs a search although no container lacks labels.
    search_again: bool,
    /// When the last search began.
    searched: Instant,
    /// Time of the next search.
    search_at: Option<Instant>,
    search_pause: Duration,
}

impl LabelTask {
    pub fn new(
        config: LabelConfig,
        io: Handle,
        sources: Arc<LabelSources>,
        shared: Arc<SharedLabels>,
        watched: mpsc::Sender<WatchedSocket>,
    ) -> Self {
        let (of_reader, known) = (Arc::clone(&sources), KnownProcesses::default());
        let read = move |query: &Query| source::read_files(&of_reader, query, &known);
        Self {
            config,
            io,
            sources,
            files: FileReader::new(Arc::new(read), shared.messages.clone()),
            resolver: LabelResolver::default(),
            shared,
            view: LabelView::new(),
            published: Instant::now(),
            unpublished: false,
            watched,
            followers: HashMap::new(),
            probed: Instant::now(),
            absent: HashMap::new(),
            retired_at: Instant::now(),
            dormant: HashMap::new(),
            discovered_sockets: HashSet::new(),
            search_permits: Arc::new(Semaphore::new(MAX_SEARCHES)),
            process_search: Arc::default(),
            search_all: false,
            searching: false,
            search_again: false,
            searched: Instant::now(),
            search_at: None,
            search_pause: MIN_SEARCH_PAUSE,
        }
    }

    pub async fn run(mut self, mut events: UnboundedReceiver<ContainerEvent>, mut inbox: Receiver<LabelMessage>) {
        let files = self.config.sources.clone();
        for source in files.into_iter().filter(|s| !s.is_socket()) {
            self.sources.add(source, Path::new(""));
            self.resolver.add_target(source, FILES, true, boot_now());
        }
        self.add_default_sockets();
        self.search();
        loop {
            let pause = self.step();
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => {
                        self.apply_container_event(event);
                        while let Ok(event) = events.try_recv() {
                            self.apply_container_event(event);
                        }
                    }
                    None => return,
                },
                Some(message) = inbox.recv() => {
                    self.handle_message(message);
                    while let Ok(message) = inbox.try_recv() {
                        self.handle_message(message);
                    }
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Adds targets for new sockets, and revives retired ones.
    fn add_sockets(&mut self, sockets: Vec<FoundSocket>) {
        for socket in sockets {
            let endpoint = socket.endpoint();
            let is_known = self.resolver.targets().any(|(_, source, known)| source == socket.source && known == endpoint);
            self.discovered_sockets.insert((socket.source, endpoint.clone()));
            if is_known || self.resolver.targets().count() >= MAX_TARGETS {
                continue;
            }
            let (present, now) = (matches!(socket.presence, Presence::Present(_)), boot_now());
            let retired = self.resolver.retired(socket.source, &endpoint);
            let id = match retired {
                Some(id) => {
                    self.resolver.revive(id, present, now);
                    id
                }
                None => {
                    self.sources.add(socket.source, &socket.path);
                    self.resolver.add_target(socket.source, &endpoint, present, now)
                }
            };
            if let Presence::Dormant(dormant) = socket.presence {
                tracing::info!("labels: {} at {endpoint}: {dormant}", socket.source.name());
                self.dormant.insert(id, dormant);
            } else if present {
                tracing::info!("labels: {} at {endpoint}", socket.source.name());
                self.probe(id);
            } else if self.config.endpoints.contains(&(socket.source, socket.path.clone())) {
                self.shared.stats.absent(socket.source, &endpoint, true);
            }
            if matches!(socket.source, Source::Docker | Source::Podman) {
                let (guard, messages) = (Arc::clone(&self.sources.guard), self.shared.messages.clone());
                let follower = self.io.spawn(source::docker::follow_events(guard, socket.path.clone(), messages));
                self.followers.insert(id, follower.abort_handle());
            }
            if retired.is_none() {
                // The watching thread ends only with the process.
                let _ended = self.watched.send(WatchedSocket { target: id, path: socket.path, presence: socket.presence });
            }
        }
    }

    /// Adds configured and default sockets, before the first search of processes.
    fn add_default_sockets(&mut self) {
        let (config, messages) = (self.config.clone(), self.shared.messages.clone());
        let guard = Arc::clone(&self.sources.guard);
        tokio::task::spawn_blocking(move || {
            // The task ends only with the process.
            let _ended = messages.blocking_send(LabelMessage::DefaultSockets(Discovery::defaults(&config, &guard).sockets));
        });
    }

    /// Starts a search. If it hangs in a file system, another one follows after the maximum interval.
    fn search(&mut self) {
        self.searched = Instant::now();
        self.search_at = Some(self.searched + MAX_SEARCH_PAUSE);
        let Ok(permit) = Arc::clone(&self.search_permits).try_acquire_owned() else { return };
        let all = std::mem::take(&mut self.search_all);
        (self.searching, self.search_again) = (true, false);
        let (config, messages) = (self.config.clone(), self.shared.messages.clone());
        let (process_search, guard) = (Arc::clone(&self.process_search), Arc::clone(&self.sources.guard));
        tokio::task::spawn_blocking(move || {
            let _held = permit;
            let discovery = match process_search.try_lock() {
                Ok(mut search) if !all => Discovery::search_with(&config, &guard, &mut search),
                Ok(mut search) => {
                    *search = ProcessSearch::default();
                    Discovery::search_with(&config, &guard, &mut search)
                }
                // Another search hangs, or one has panicked.
                Err(_) => Discovery::search(&config, &guard),
            };
            // The task ends only with the process.
            let _ended = messages.blocking_send(LabelMessage::Discovery(discovery));
        });
    }

    /// A new container may belong to a new runtime.
    fn search_for_container(&mut self) {
        self.search_pause = self.search_pause.min(CONTAINER_SEARCH_PAUSE / 2);
        let at = (Instant::now() + MIN_SEARCH_PAUSE).max(self.searched + CONTAINER_SEARCH_PAUSE);
        self.search_at = self.search_at.map(|known| known.min(at));
    }

    /// Requests a search even if no container lacks labels.
    fn search_now(&mut self) {
        self.search_pause = MIN_SEARCH_PAUSE;
        if !self.searching {
            self.search_at = self.search_at.map(|at| at.min(Instant::now() + MIN_SEARCH_PAUSE));
        }
        (self.search_again, self.search_all) = (true, true);
    }

    /// Retires targets that have been absent for long and that the last search did not find.
    fn retire(&mut self) {
        let long_gone = self.absent.iter().filter(|(_, since)| since.elapsed() >= RETIRE_AFTER).map(|(id, _)| *id);
        for id in long_gone.collect::<Vec<_>>() {
            let Some(socket) = self.target(id).filter(|socket| !self.discovered_sockets.contains(socket)) else { continue };
            self.absent.remove(&id);
            self.dormant.remove(&id);
            self.resolver.retire(id);
            self.shared.stats.retired(socket.0, &socket.1);
            if let Some(follower) = self.followers.remove(&id) {
                follower.abort();
            }
        }
    }

    fn take_discovery(&mut self, discovery: Discovery) {
        let before = self.sources.places.load_full();
        let mut places = discovery.places;
        places.keep_from(&before);
        // Sockets are not kept: those of a stopped runtime are unused.
        let changed = !before.has_same_places(&places);
        self.searching = false;
        self.search_pause =
            if changed || self.search_again { MIN_SEARCH_PAUSE } else { (self.search_pause * 2).min(MAX_SEARCH_PAUSE) };
        self.search_at = Some(Instant::now() + self.search_pause);
        // Also if the paths are unchanged, since a symlink in one of them may have changed.
        self.discovered_sockets.clear();
        self.add_sockets(discovery.sockets);
        let inner_kubelets = before.inner_kubelets != places.inner_kubelets;
        if changed || inner_kubelets {
            self.sources.places.store(Arc::new(places));
        }
        if changed {
            self.sources.host.forget_absent();
            let files: Vec<TargetId> = self.resolver.targets().filter(|(_, s, _)| !s.is_socket()).map(|(id, ..)| id).collect();
            files.into_iter().for_each(|id| self.resolver.endpoint_present(id, boot_now()));
        }
    }

    /// Executes due queries and publishes; returns the time until the next step.
    fn step(&mut self) -> Duration {
        let now = boot_now();
        let (to_sockets, to_files): (Vec<Query>, Vec<Query>) =
            self.resolver.due(now).into_iter().partition(|query| query.source.is_socket());
        for query in to_sockets {
            let (sources, messages) = (Arc::clone(&self.sources), self.shared.messages.clone());
            self.io.spawn(async move {
                // A panic must not leave the query pending forever.
                let reply = AssertUnwindSafe(source::execute(sources, &query)).catch_unwind().await;
                let reply = reply.unwrap_or_else(|_| SourceReply::error("the query panicked"));
                // The task ends only with the process.
                let _ended = messages.send(LabelMessage::QueryFinished(query, reply)).await;
            });
        }
        self.files.add(to_files);
        let (replies, supervise_in) = self.files.supervise();
        for (query, reply) in replies {
            self.record_reply(&query, &reply, now);
        }
        if self.retired_at.elapsed() >= RETIRE_EVERY {
            self.retired_at = Instant::now();
            self.retire();
        }
        if self.search_at.is_some_and(|at| at <= Instant::now()) && (self.search_again || self.resolver.has_unresolved(now)) {
            self.search();
        }
        self.probe_failing();
        let unpublished = self.publish();
        let wait = self.resolver.next_due(now).map_or(u64::MAX, |next| next.saturating_since(boot_now()));
        Duration::from_nanos(wait).min(unpublished).min(supervise_in).clamp(SHORTEST_PAUSE, IDLE_PAUSE)
    }

    /// Publishes the view if it changed and the interval has passed; returns the time until the next publication.
    fn publish(&mut self) -> Duration {
        for key in self.resolver.take_changed() {
            self.unpublished = true;
            match self.resolver.labels(key) {
                Some(labels) => drop(self.view.insert(key, Arc::clone(labels))),
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

    fn apply_container_event(&mut self, event: ContainerEvent) {
        let now = boot_now();
        match event {
            ContainerEvent::Appeared(record) => {
                let key = record.key;
                if record.identity.is_in_container() {
                    self.search_for_container();
                }
                if self.resolver.appeared(record, now) {
                    self.resolved(key);
                }
            }
            ContainerEvent::Gone(key, at) => self.resolver.gone(key, at, now),
            ContainerEvent::Evicted(key) => self.resolver.evicted(key),
        }
    }

    fn resolved(&self, key: ContainerKey) {
        if let Some(ns) = self.resolver.labels(key).and_then(|l| l.resolved_after_ns) {
            self.shared.stats.resolved(ns);
        }
    }

    fn record_reply(&mut self, query: &Query, reply: &SourceReply, now: BootNs) {
        if self.resolver.record_outcome(query, &reply.outcome, reply.to_attempt(), now) {
            self.resolved(query.key);
        }
        // Late replies of retired targets are not counted.
        if let Some((source, endpoint)) = self.target(query.target) {
            self.shared.stats.record_outcome(source, &endpoint, reply);
            // A query that ended with its engine.
            if self.dormant.contains_key(&query.target) {
                self.shared.stats.retired(source, &endpoint);
            }
        }
    }

    fn handle_message(&mut self, message: LabelMessage) {
        let now = boot_now();
        match message {
            LabelMessage::QueryFinished(query, reply) => self.record_reply(&query, &reply, now),
            LabelMessage::FilesRead(replies) => {
                for (query, reply) in replies {
                    self.record_reply(&query, &reply, now);
                }
            }
            LabelMessage::Hint(id) => self.resolver.hint(&id, now),
            LabelMessage::EndpointChanged { target, presence } => match (self.target(target), presence) {
                // The socket of a retired target changed: a search finds its current runtime.
                (None, _) => self.search_now(),
                (Some((_, endpoint)), Presence::Present(_)) => {
                    match self.dormant.remove(&target) {
                        Some(_) => tracing::info!("labels: the engine at {endpoint} runs"),
                        None => tracing::info!("labels: {endpoint} appeared or was replaced"),
                    }
                    self.absent.remove(&target);
                    self.resolver.endpoint_present(target, now);
                    self.probe(target);
                }
                (Some((source, endpoint)), Presence::Dormant(dormant)) => {
                    tracing::info!("labels: {endpoint}: {dormant}");
                    self.dormant.insert(target, dormant);
                    // An engine that an operator has stopped does not fail.
                    self.shared.stats.retired(source, &endpoint);
                    self.resolver.endpoint_absent(target);
                    self.absent.insert(target, Instant::now());
                }
                (Some((source, endpoint)), Presence::Absent) => {
                    self.dormant.remove(&target);
                    self.shared.stats.absent(source, &endpoint, false);
                    tracing::info!("labels: {endpoint} is gone");
                    self.resolver.endpoint_absent(target);
                    self.absent.insert(target, Instant::now());
                    // The socket may have moved.
                    self.search_now();
                }
            },
            LabelMessage::Discovery(discovery) => self.take_discovery(discovery),
            LabelMessage::DefaultSockets(sockets) => self.add_sockets(sockets),
            LabelMessage::Probed(target, result) => {
                if let Some((source, endpoint)) = self.target(target).filter(|_| self.resolver.is_present(target)) {
                    self.shared.stats.probed(source, &endpoint, result.err().as_deref());
                }
            }
            LabelMessage::Attempts(key, to) => {
                let all = self.resolver.attempts(key, now);
                let view = all.iter().map(|(source, endpoint, attempt)| {
                    let mut view = AttemptView::new(*source, endpoint, attempt);
                    if let Some(dormant) = self.dormant_at(*source, endpoint).filter(|_| view.is_absent()) {
                        view.detail = dormant.to_string();
                    }
                    view
                });
                let excluded_sources =
                    self.resolver.labels(key).into_iter().flat_map(|labels| self.config.excluded_sources(labels));
                let view = view.chain(excluded_sources).collect();
                // The requester may have gone.
                let _gone = to.send(view);
            }
        }
    }

    fn dormant_at(&self, source: Source, endpoint: &str) -> Option<Dormant> {
        let all = self.resolver.targets().filter(|(_, of, at)| *of == source && *at == endpoint);
        all.filter_map(|(id, ..)| self.dormant.get(&id).copied()).next()
    }

    fn probe(&self, target: TargetId) {
        let (sources, messages) = (Arc::clone(&self.sources), self.shared.messages.clone());
        self.io.spawn(async move {
            let result = source::probe(sources, target).await;
            // The task ends only with the process.
            let _ended = messages.send(LabelMessage::Probed(target, result)).await;
        });
    }

    /// Probes failing endpoints, since without a query due their state would not be updated.
    fn probe_failing(&mut self) {
        if self.probed.elapsed() < PROBE_EVERY {
            return;
        }
        self.probed = Instant::now();
        let present = self.resolver.targets().filter(|(id, source, _)| source.is_socket() && self.resolver.is_present(*id));
        let failing = present.filter(|(_, source, endpoint)| self.shared.stats.is_down(*source, endpoint));
        failing.for_each(|(id, ..)| self.probe(id));
    }

    /// Source and endpoint of a target; `None` if it is retired.
    fn target(&self, target: TargetId) -> Option<(Source, String)> {
        self.resolver.targets().find(|(id, ..)| *id == target).map(|(_, source, endpoint)| (source, endpoint.to_owned()))
    }
}
