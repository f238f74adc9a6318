//! The recorder thread, and the handle to it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sampler_core::experiment::ExperimentFact;
use sampler_core::fact::{Fact, GpuFact};
use strum::EnumCount as _;
use tokio::sync::oneshot;

pub use super::manager::SessionInputs;
use super::manager::SessionManager;
use super::request::Request;
use super::store::{Phase, SessionStatus, Store, StoreError};
use crate::observe::clock::{boot_now, wall_now};

/// How often triggers and ends of sessions are checked.
const TURN_EVERY: Duration = Duration::from_millis(250);
/// Maximum number of facts that wait for the thread: several seconds on a large node. Above it only facts that change the state are kept.
const MAX_WAITING: usize = 1_000_000;

enum RecorderMessage {
    Facts(Vec<Fact>),
    Start(Box<Request>, oneshot::Sender<Result<String, StoreError>>),
    Stop(String, oneshot::Sender<Result<(), StoreError>>),
    Experiment(String, Box<ExperimentFact>, oneshot::Sender<Result<(), StoreError>>),
    /// Completed when the sender is dropped.
    Close(Sender<()>),
}

struct RecorderShared {
    to: Sender<RecorderMessage>,
    store: Arc<Store>,
    waiting: AtomicUsize,
    /// Facts dropped since the thread last checked.
    lost: AtomicU64,
    gauges: Gauges,
}

#[derive(Default)]
struct Gauges {
    ring_bytes: AtomicU64,
    ring_ns: AtomicU64,
    dropped_frames: AtomicU64,
}

/// The state of the recorder, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecorderView {
    /// Indexed like [`Phase`].
    pub sessions: [u64; Phase::COUNT],
    pub dropped_frames: u64,
    pub ring_bytes: u64,
    pub ring_seconds: f64,
}

/// A handle to the recorder thread, which ends with the process.
#[derive(Clone)]
pub struct Recorder(Arc<RecorderShared>);

/// Whether a fact must be kept even if facts arrive faster than they are encoded: the state must stay correct.
fn changes_state(fact: &Fact) -> bool {
    match fact {
        Fact::Time { .. } | Fact::Pressure(_) | Fact::Waited(_) | Fact::Engine(_) => false,
        Fact::Gpu { fact, .. } => matches!(fact, GpuFact::Opened(_) | GpuFact::Gone),
        _ => true,
    }
}

impl Recorder {
    pub fn spawn(store: Arc<Store>, sources: SessionInputs, ring_bytes: usize) -> anyhow::Result<Self> {
        let (to, from) = channel();
        let shared = Arc::new(RecorderShared {
            to,
            store: Arc::clone(&store),
            waiting: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
            gauges: Gauges::default(),
        });
        let manager = SessionManager::new(sources, store, ring_bytes).context("cannot initialize compression")?;
        let thread_shared = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("recorder".into())
            .spawn(move || run(manager, &from, &thread_shared))
            .context("cannot start the recorder thread")?;
        Ok(Self(shared))
    }

    fn send(&self, message: RecorderMessage) {
        // The thread ends only with the process.
        let _ended = self.0.to.send(message);
    }

    /// Sends facts to the recorder, in order. Never waits for the recorder or for a disk.
    pub fn send_facts(&self, mut facts: Vec<Fact>) {
        let count = facts.len();
        if self.0.waiting.load(Ordering::Relaxed) > MAX_WAITING {
            facts.retain(changes_state);
            self.0.lost.fetch_add((count - facts.len()) as u64, Ordering::Relaxed);
        }
        if !facts.is_empty() {
            self.0.waiting.fetch_add(facts.len(), Ordering::Relaxed);
            self.send(RecorderMessage::Facts(facts));
        }
    }

    /// Starts a session, which records or waits for its trigger; returns its id.
    pub async fn start(&self, request: Request) -> Result<String, StoreError> {
        self.blocking(|store| store.prepare()).await?;
        let (reply, replied) = oneshot::channel();
        self.send(RecorderMessage::Start(Box::new(request), reply));
        replied.await.unwrap_or_else(|_| Err(ended()))
    }

    pub async fn stop(&self, id: String) -> Result<(), StoreError> {
        let (reply, replied) = oneshot::channel();
        self.send(RecorderMessage::Stop(id, reply));
        replied.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Writes a fact about an experiment into a session that records.
    pub async fn experiment(&self, id: String, fact: ExperimentFact) -> Result<(), StoreError> {
        let (reply, replied) = oneshot::channel();
        self.send(RecorderMessage::Experiment(id, Box::new(fact), reply));
        replied.await.unwrap_or_else(|_| Err(ended()))
    }

    pub fn list(&self) -> Vec<SessionStatus> {
        self.0.store.list(boot_now())
    }

    pub fn status(&self, id: &str) -> Result<SessionStatus, StoreError> {
        self.0.store.status(id, boot_now())
    }

    pub async fn open(&self, id: String) -> Result<(File, PathBuf), StoreError> {
        self.blocking(move |store| store.open(&id)).await
    }

    pub async fn remove(&self, id: String) -> Result<(), StoreError> {
        self.blocking(move |store| store.remove(&id)).await
    }

    /// Lists the sessions of earlier runs.
    pub async fn list_earlier(&self) -> Result<(), StoreError> {
        self.blocking(|store| store.list_earlier()).await
    }

    /// Runs on a separate thread, because a disk may hang.
    async fn blocking<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.0.store);
        tokio::task::spawn_blocking(move || operation(&store)).await.unwrap_or_else(|_| Err(ended()))
    }

    pub fn store(&self) -> Arc<Store> {
        Arc::clone(&self.0.store)
    }

    pub fn view(&self) -> RecorderView {
        let gauges = &self.0.gauges;
        RecorderView {
            sessions: self.0.store.counts(),
            dropped_frames: gauges.dropped_frames.load(Ordering::Relaxed),
            ring_bytes: gauges.ring_bytes.load(Ordering::Relaxed),
            ring_seconds: gauges.ring_ns.load(Ordering::Relaxed) as f64 / 1e9,
        }
    }

    /// Ends all sessions, waiting for at most `at_most`. Blocks.
    pub fn close(&self, at_most: Duration) {
        let begun = Instant::now();
        let (done, is_done) = channel();
        self.send(RecorderMessage::Close(done));
        // The sender is dropped without a message.
        let _closed = is_done.recv_timeout(at_most);
        while self.0.store.active() > 0 && begun.elapsed() < at_most {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn ended() -> StoreError {
    StoreError::Conflict("the agent is stopping".into())
}

fn run(mut manager: SessionManager, from: &Receiver<RecorderMessage>, shared: &RecorderShared) {
    let mut turned = Instant::now();
    loop {
        match from.recv_timeout(TURN_EVERY.saturating_sub(turned.elapsed())) {
            Ok(RecorderMessage::Facts(facts)) => {
                shared.waiting.fetch_sub(facts.len(), Ordering::Relaxed);
                manager.facts(&facts, boot_now());
            }
            // The client may no longer wait for the reply.
            Ok(RecorderMessage::Start(request, reply)) => drop(reply.send(manager.start(*request, boot_now(), wall_now()))),
            Ok(RecorderMessage::Stop(id, reply)) => drop(reply.send(manager.stop(&id, boot_now()))),
            Ok(RecorderMessage::Experiment(id, fact, reply)) => drop(reply.send(manager.experiment(&id, *fact, boot_now()))),
            Ok(RecorderMessage::Close(_done)) => manager.close(boot_now()),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if turned.elapsed() >= TURN_EVERY {
            turned = Instant::now();
            let now = boot_now();
            let lost = shared.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                manager.lost(lost, now);
            }
            manager.turn(now, wall_now());
            let gauges = &shared.gauges;
            gauges.ring_bytes.store(manager.ring.bytes() as u64, Ordering::Relaxed);
            let ring_ns = manager.ring.since().map_or(0, |since| now.saturating_since(since));
            gauges.ring_ns.store(ring_ns, Ordering::Relaxed);
            gauges.dropped_frames.store(manager.dropped_frames, Ordering::Relaxed);
        }
    }
}
