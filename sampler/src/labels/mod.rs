//! The label service: one task drives the ladder, and each question is a task of its own, so no source waits for another.

mod source;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use hdrhistogram::Histogram;
use sampler_core::identity::ContainerRecord;
use sampler_core::labels::{Ask, ContainerLabels, Ladder, Outcome, Source};
use sampler_core::units::{BootNs, ContainerKey};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use self::source::{Answer, docker, files};
use crate::config::LabelSources;

/// Upper bounds of `gpu_sampler_resolve_seconds`.
pub const RESOLVE_BOUNDS: [f64; 11] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
/// Longest resolution told apart.
const LONGEST_RESOLVE_NS: u64 = 3_600_000_000_000;
/// The ladder is looked at this often while a source has no room for more questions.
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// And at least this often.
const IDLE_PAUSE: Duration = Duration::from_secs(1);

pub struct LabelConfig {
    /// The host's file system.
    pub rootfs: PathBuf,
    pub docker_socket: PathBuf,
    pub sources: LabelSources,
    pub now: fn() -> BootNs,
}

pub enum ContainerEvent {
    Appeared(Arc<ContainerRecord>),
    Gone(ContainerKey, BootNs),
}

pub type LabelView = HashMap<ContainerKey, Arc<ContainerLabels>>;

#[derive(Clone, Debug, Default)]
pub struct LabelStats {
    /// Sources seen: whether the last answer was one, with their endpoint.
    pub up: BTreeMap<(&'static str, String), bool>,
    pub calls: BTreeMap<(&'static str, &'static str), u64>,
    pub resolve_count: u64,
    pub resolve_sum: f64,
    /// Cumulative, one per [`RESOLVE_BOUNDS`].
    pub resolve_buckets: Vec<u64>,
}

struct Shared {
    view: ArcSwap<LabelView>,
    stats: Mutex<(LabelStats, Histogram<u64>)>,
}

#[derive(Clone)]
pub struct LabelService(Arc<Shared>);

impl LabelService {
    pub fn view(&self) -> Arc<LabelView> {
        self.0.view.load_full()
    }

    pub fn stats(&self) -> LabelStats {
        let held = self.0.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let (stats, times) = &*held;
        let mut stats = stats.clone();
        stats.resolve_count = times.len();
        stats.resolve_buckets = RESOLVE_BOUNDS.map(|bound| times.count_between(0, (bound * 1e9) as u64)).to_vec();
        stats
    }
}

/// What comes back from a source, and what a runtime says unasked.
enum Word {
    Answered {
        ask: Ask,
        answer: Answer,
    },
    /// Docker spoke of this container.
    Hint(String),
    /// The event stream is up: what was missed meanwhile is asked again.
    Back(Source),
}

struct Driver {
    config: Arc<LabelConfig>,
    ladder: Ladder,
    shared: Arc<Shared>,
    words: UnboundedSender<Word>,
}

/// Starts the service; it ends when `events` is closed. Call it inside the IO runtime.
pub fn spawn(config: LabelConfig, mut events: UnboundedReceiver<ContainerEvent>) -> LabelService {
    let chosen = config.sources;
    let sources = [(Source::Bundle, chosen.bundle), (Source::DockerFile, chosen.docker_file), (Source::Docker, chosen.docker)];
    let sources = sources.into_iter().filter_map(|(source, on)| on.then_some(source)).collect();
    let times = Histogram::new_with_bounds(1, LONGEST_RESOLVE_NS, 2).expect("1 ns to 1 h at two digits are valid bounds");
    let shared = Arc::new(Shared { view: ArcSwap::default(), stats: Mutex::new((LabelStats::default(), times)) });
    let service = LabelService(Arc::clone(&shared));
    let (words, mut inbox) = unbounded_channel();
    if chosen.docker {
        tokio::spawn(docker::follow(config.docker_socket.clone(), words.clone()));
    }
    let mut driver = Driver { config: Arc::new(config), ladder: Ladder::new(sources), shared, words };
    tokio::spawn(async move {
        loop {
            let pause = driver.step();
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => {
                        driver.container(event);
                        while let Ok(event) = events.try_recv() {
                            driver.container(event);
                        }
                    }
                    None => return,
                },
                Some(word) = inbox.recv() => {
                    driver.word(word);
                    while let Ok(word) = inbox.try_recv() {
                        driver.word(word);
                    }
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    });
    service
}

impl Driver {
    fn now(&self) -> BootNs {
        (self.config.now)()
    }

    /// Asks what is due, publishes, and says how long nothing more is.
    fn step(&mut self) -> Duration {
        for ask in self.ladder.due(self.now()) {
            tokio::spawn(put(Arc::clone(&self.config), ask, self.words.clone()));
        }
        self.publish();
        let wait = self.ladder.next_due().map_or(u64::MAX, |next| next.saturating_since(self.now()));
        Duration::from_nanos(wait).clamp(BUSY_PAUSE, IDLE_PAUSE)
    }

    /// Labels that did not change keep their allocation.
    fn publish(&self) {
        let old = self.shared.view.load();
        let share = |key: ContainerKey, labels: &ContainerLabels| match old.get(&key) {
            Some(known) if **known == *labels => Arc::clone(known),
            _ => Arc::new(labels.clone()),
        };
        let new: LabelView = self.ladder.labels().map(|(key, labels)| (key, share(key, labels))).collect();
        let same = new.len() == old.len() && new.iter().all(|(key, l)| old.get(key).is_some_and(|o| Arc::ptr_eq(o, l)));
        if !same {
            self.shared.view.store(Arc::new(new));
        }
    }

    fn container(&mut self, event: ContainerEvent) {
        match event {
            ContainerEvent::Appeared(record) => self.ladder.appeared(record, self.now()),
            ContainerEvent::Gone(key, at) => self.ladder.gone(key, at),
        }
    }

    fn word(&mut self, word: Word) {
        let now = self.now();
        match word {
            Word::Answered { ask, answer } => {
                let resolved = |ladder: &Ladder| {
                    ladder.labels().find(|(key, _)| *key == ask.key).and_then(|(_, labels)| labels.resolved_after_ns)
                };
                let before = resolved(&self.ladder);
                self.ladder.answered(ask.key, ask.source, &answer.outcome, now);
                let after = resolved(&self.ladder);
                self.count(&ask, &answer, after.filter(|_| before.is_none()));
            }
            Word::Hint(id) => self.ladder.hint(&id, now),
            Word::Back(source) => self.ladder.endpoint_back(source, now),
        }
    }

    fn count(&self, ask: &Ask, answer: &Answer, resolved_ns: Option<u64>) {
        let mut held = self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let (stats, times) = &mut *held;
        *stats.calls.entry((ask.source.name(), answer.name)).or_default() += 1;
        if let Some(ns) = resolved_ns {
            times.saturating_record(ns.max(1));
            stats.resolve_sum += ns as f64 / 1e9;
        }
        if answer.name == "not-found" {
            return;
        }
        let endpoint = match ask.source {
            Source::Docker => format!("unix://{}", self.config.docker_socket.display()),
            _ => self.config.rootfs.display().to_string(),
        };
        let up = answer.outcome != Outcome::Failed;
        let before = stats.up.insert((ask.source.name(), endpoint.clone()), up);
        drop(held);
        match (up, before) {
            (false, None | Some(true)) => tracing::warn!(source = ask.source.name(), endpoint, "labels: {}", answer.detail),
            (false, Some(false)) => tracing::debug!(source = ask.source.name(), endpoint, "labels: {}", answer.detail),
            (true, Some(false)) => tracing::info!(source = ask.source.name(), endpoint, "labels: it answers again"),
            _ => {}
        }
    }
}

async fn put(config: Arc<LabelConfig>, ask: Ask, to: UnboundedSender<Word>) {
    let id = Arc::clone(&ask.container_id);
    let answer = match ask.source {
        Source::Docker => docker::inspect(&config.docker_socket, &id).await,
        source => {
            let read = tokio::task::spawn_blocking(move || match source {
                Source::Bundle => files::bundle(&config.rootfs, &id),
                _ => files::docker(&config.rootfs, &id),
            });
            read.await.unwrap_or_else(|error| Answer::failed("error", error))
        }
    };
    // The driver ends only with the process.
    let _ended = to.send(Word::Answered { ask, answer });
}
