//! The recorder's thread, and the handle that everybody else has of it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sampler_core::fact::{Fact, GpuFact};
use tokio::sync::oneshot;

pub use super::manager::SessionInputs;
use super::manager::SessionManager;
use super::request::Request;
use super::store::{Phase, SessionStatus, Store, StoreError};
use crate::observe::clock::{boot_now, wall_now};

/// How often conditions and ends are looked at.
const TURN_EVERY: Duration = Duration::from_millis(250);
/// Facts that wait for the thread: seconds of a large node. Beyond it only those that change the state get through.
const MAX_WAITING: usize = 1_000_000;

enum RecorderMessage {
    Facts(Vec<Fact>),
    Start(Box<Request>, oneshot::Sender<Result<String, StoreError>>),
    Stop(String, oneshot::Sender<Result<(), StoreError>>),
    /// Answered by being dropped.
    Close(Sender<()>),
}

struct RecorderShared {
    to: Sender<RecorderMessage>,
    store: Arc<Store>,
    waiting: AtomicUsize,
    /// Facts that were left out since the thread last looked.
    lost: AtomicU64,
    gauges: Gauges,
}

#[derive(Default)]
struct Gauges {
    ring_bytes: AtomicU64,
    ring_ns: AtomicU64,
    dropped_frames: AtomicU64,
}

/// About itself, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecorderView {
    /// Indexed as [`Phase::ALL`].
    pub sessions: [u64; Phase::ALL.len()],
    pub dropped_frames: u64,
    pub ring_bytes: u64,
    pub ring_seconds: f64,
}

/// Whoever has it can record. The thread ends with the process.
#[derive(Clone)]
pub struct Recorder(Arc<RecorderShared>);

/// What may be left out where facts come faster than they are encoded: the state must stay right.
fn changes_state(fact: &Fact) -> bool {
    match fact {
        Fact::Time { .. } | Fact::Pressure(_) => false,
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
        let desk = SessionManager::new(sources, store, ring_bytes).context("cannot set compression up")?;
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("recorder".into())
            .spawn(move || run(desk, &from, &of_thread))
            .context("cannot start the recorder thread")?;
        Ok(Self(shared))
    }

    fn send(&self, word: RecorderMessage) {
        // The thread ends only with the process.
        let _ended = self.0.to.send(word);
    }

    /// Takes facts, in their order. Never waits for the recorder or for a disk.
    pub fn tell(&self, mut facts: Vec<Fact>) {
        let told = facts.len();
        if self.0.waiting.load(Ordering::Relaxed) > MAX_WAITING {
            facts.retain(changes_state);
            self.0.lost.fetch_add((told - facts.len()) as u64, Ordering::Relaxed);
        }
        if !facts.is_empty() {
            self.0.waiting.fetch_add(facts.len(), Ordering::Relaxed);
            self.send(RecorderMessage::Facts(facts));
        }
    }

    /// The id of a session that records now, or waits for its condition.
    pub async fn start(&self, request: Request) -> Result<String, StoreError> {
        self.blocking(|store| store.prepare()).await?;
        let (answer, answered) = oneshot::channel();
        self.send(RecorderMessage::Start(Box::new(request), answer));
        answered.await.unwrap_or_else(|_| Err(ended()))
    }

    pub async fn stop(&self, id: String) -> Result<(), StoreError> {
        let (answer, answered) = oneshot::channel();
        self.send(RecorderMessage::Stop(id, answer));
        answered.await.unwrap_or_else(|_| Err(ended()))
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

    /// Lists what earlier runs left.
    pub async fn look(&self) -> Result<(), StoreError> {
        self.blocking(|store| store.look()).await
    }

    /// A disk may hang: not on the threads that serve.
    async fn blocking<T: Send + 'static>(
        &self,
        what: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.0.store);
        tokio::task::spawn_blocking(move || what(&store)).await.unwrap_or_else(|_| Err(ended()))
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

    /// Ends all sessions in order, as far as that takes no longer than `at_most`. Blocks.
    pub fn close(&self, at_most: Duration) {
        let begun = Instant::now();
        let (done, is_done) = channel();
        self.send(RecorderMessage::Close(done));
        // Closed without a word.
        let _closed = is_done.recv_timeout(at_most);
        while self.0.store.active() > 0 && begun.elapsed() < at_most {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn ended() -> StoreError {
    StoreError::Conflict("the agent is stopping".into())
}

fn run(mut desk: SessionManager, from: &Receiver<RecorderMessage>, shared: &RecorderShared) {
    let mut turned = Instant::now();
    loop {
        match from.recv_timeout(TURN_EVERY.saturating_sub(turned.elapsed())) {
            Ok(RecorderMessage::Facts(facts)) => {
                shared.waiting.fetch_sub(facts.len(), Ordering::Relaxed);
                desk.facts(&facts, boot_now());
            }
            // Whoever asked may have gone.
            Ok(RecorderMessage::Start(request, answer)) => drop(answer.send(desk.start(*request, boot_now(), wall_now()))),
            Ok(RecorderMessage::Stop(id, answer)) => drop(answer.send(desk.stop(&id, boot_now()))),
            Ok(RecorderMessage::Close(_done)) => desk.close(boot_now()),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if turned.elapsed() >= TURN_EVERY {
            turned = Instant::now();
            let now = boot_now();
            let lost = shared.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                desk.lost(lost, now);
            }
            desk.turn(now, wall_now());
            let gauges = &shared.gauges;
            gauges.ring_bytes.store(desk.ring.bytes() as u64, Ordering::Relaxed);
            let ring_ns = desk.ring.since().map_or(0, |since| now.saturating_since(since));
            gauges.ring_ns.store(ring_ns, Ordering::Relaxed);
            gauges.dropped_frames.store(desk.dropped_frames, Ordering::Relaxed);
        }
    }
}
