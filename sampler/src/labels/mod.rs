//! The label service: one task drives the ladder, and each question is a task of its own, so no source waits for another.
//!
//! ```text
//!  core thread --containers--> driver (ladder) --questions--> sources (files, sockets)
//!  sockets appear, go, are replaced --^   ^-- answers, hints, where the runtimes keep things
//!                                     driver --view--> whoever exports
//! ```

mod assigned;
mod discover;
mod driver;
mod found;
mod once;
mod root;
mod sockets;
pub mod source;
mod stats;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use sampler_core::identity::ContainerRecord;
use sampler_core::labels::{ABSENT, Ask, ContainerLabels, Source, TargetId, Told, Tried, is_likely};
use sampler_core::units::{BootNs, ContainerKey};
use serde::Serialize;
use tokio::sync::mpsc::{Sender, UnboundedReceiver, channel};
use tokio::sync::oneshot;

pub use self::assigned::AssignedView;
use self::discover::Places;
use self::driver::Driver;
pub use self::found::Found;
use self::found::FoundSocket;
pub use self::once::once;
pub use self::root::Root;
use self::source::{Answer, Sources};
use self::stats::Stats;
pub use self::stats::{LabelStats, RESOLVE_BOUNDS};
use crate::config::Config;
use crate::observe::kernel::layout::Layout;

/// The endpoint of sources that have none.
pub const FILES: &str = "files";
/// Answers and hints that wait for the driver; their senders wait with them.
const WORDS: usize = 1024;

#[derive(Clone, Debug)]
pub struct LabelConfig {
    /// The host's file system.
    pub rootfs: PathBuf,
    pub procfs: PathBuf,
    /// Where the cgroup hierarchies are mounted.
    pub cgroups: Vec<PathBuf>,
    pub sources: Vec<Source>,
    /// Sockets given by the operator. A source that is among them is asked nowhere else.
    pub endpoints: Vec<(Source, PathBuf)>,
}

impl LabelConfig {
    pub fn new(config: &Config, layout: &Layout) -> Self {
        Self {
            rootfs: config.path_rootfs.clone(),
            procfs: config.path_procfs.clone(),
            cgroups: layout.mounts().map(|(_, mount)| mount.to_owned()).collect(),
            sources: config.label_sources.clone(),
            endpoints: config.label_endpoints.clone(),
        }
    }

    fn gives(&self, source: Source) -> bool {
        self.endpoints.iter().any(|(s, _)| *s == source)
    }

    /// Sources that could know such a container, and are not to be asked.
    fn left_out(&self, labels: &ContainerLabels) -> Vec<TriedView> {
        let out = Source::ASKED.into_iter().filter(|s| !self.sources.contains(s) && is_likely(*s, labels));
        let tried = Tried { told: Told::NotTried, at: None, detail: "left out by label_sources".into() };
        out.map(|source| TriedView::new(source, "", &tried)).collect()
    }

    /// The sockets to ask, with their paths here: what was given, else what was found.
    fn sockets(&self, places: &Places, root: &Root) -> Vec<(Source, PathBuf)> {
        let given = self.endpoints.iter().cloned();
        let found = places.sockets.iter().filter(|(source, _)| !self.gives(*source)).map(|(s, path)| (*s, root.path(path)));
        let mut all: Vec<(Source, PathBuf)> = Vec::new();
        for one in given.chain(found).filter(|(source, _)| self.sources.contains(source)) {
            if !all.contains(&one) {
                all.push(one);
            }
        }
        all
    }
}

#[derive(Clone)]
pub enum ContainerEvent {
    Appeared(Arc<ContainerRecord>),
    Gone(ContainerKey, BootNs),
    Evicted(ContainerKey),
}

pub type LabelView = HashMap<ContainerKey, Arc<ContainerLabels>>;

/// What came of one source, as `explain` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct TriedView {
    pub source: &'static str,
    pub endpoint: String,
    pub outcome: &'static str,
    pub detail: String,
}

impl TriedView {
    pub fn is_absent(&self) -> bool {
        self.detail == ABSENT
    }

    fn new(source: Source, endpoint: &str, tried: &Tried) -> Self {
        Self {
            source: source.name(),
            endpoint: tried.at.as_deref().unwrap_or(endpoint).to_owned(),
            outcome: tried.told.name(),
            detail: tried.detail.to_string(),
        }
    }
}

struct Shared {
    view: ArcSwap<LabelView>,
    stats: Stats,
    words: Sender<Word>,
    assigned: ArcSwap<AssignedView>,
}

#[derive(Clone)]
pub struct LabelService(Arc<Shared>);

impl LabelService {
    pub fn view(&self) -> Arc<LabelView> {
        self.0.view.load_full()
    }

    /// Devices that the kubelet assigned.
    pub fn assigned(&self) -> Arc<AssignedView> {
        self.0.assigned.load_full()
    }

    pub fn stats(&self) -> LabelStats {
        self.0.stats.view()
    }

    /// Every source for one container; empty when it is unknown.
    pub async fn tried(&self, key: ContainerKey) -> Vec<TriedView> {
        let (answer, answered) = oneshot::channel();
        // The driver ends only with the process.
        let _ended = self.0.words.send(Word::Tried(key, answer)).await;
        answered.await.unwrap_or_default()
    }
}

/// What reaches the driver beside containers.
pub enum Word {
    Answered(Ask, Answer),
    /// A runtime spoke of this container.
    Hint(String),
    /// Something appeared at this endpoint, or was replaced.
    Back(TargetId),
    Absent(TargetId),
    Found(Found),
    Usual(Vec<FoundSocket>),
    /// What is wrong with a socket that nobody was asked about.
    Probed(TargetId, Result<(), String>),
    Tried(ContainerKey, oneshot::Sender<Vec<TriedView>>),
}

/// Starts the service; it ends when `events` is closed. Call it inside the IO runtime.
pub fn spawn(config: LabelConfig, events: UnboundedReceiver<ContainerEvent>) -> std::io::Result<LabelService> {
    let (words, inbox) = channel(WORDS);
    let (watched, wanted) = std::sync::mpsc::channel();
    let shared = Arc::new(Shared {
        view: ArcSwap::default(),
        stats: Stats::default(),
        words: words.clone(),
        assigned: ArcSwap::default(),
    });
    let service = LabelService(Arc::clone(&shared));
    let root = Root::new(&config.rootfs);
    let sources = Arc::new(Sources::new(root, config.procfs.clone(), config.cgroups.clone()));
    std::thread::Builder::new().name("label-sockets".into()).spawn(move || sockets::watch(&wanted, &words))?;
    if config.sources.contains(&Source::Kubelet) {
        tokio::spawn(assigned::follow(Arc::clone(&sources), Arc::clone(&shared)));
    }
    let driver = Driver::new(config, sources, shared, watched);
    tokio::spawn(driver.run(events, inbox));
    Ok(service)
}
