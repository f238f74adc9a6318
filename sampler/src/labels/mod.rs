//! The label service: one task drives the ladder, and each question is a task of its own, so no source waits for another.
//!
//! ```text
//!  core thread --containers--> driver (ladder) --questions--> sources (files, sockets)
//!  sockets appear, go, are replaced --^   ^-- answers, hints, where the runtimes keep things
//!                                     driver --view--> whoever exports
//! ```

mod assigned;
mod config;
mod discover;
mod discovered;
mod message;
mod one_shot;
mod root;
mod shared;
mod sockets;
pub mod source;
mod stamp;
mod stats;
mod task;
mod view;

use std::sync::Arc;

use arc_swap::ArcSwap;
use sampler_core::units::ContainerKey;
use sampler_labels::Source;
use tokio::sync::mpsc::{UnboundedReceiver, channel};
use tokio::sync::oneshot;

pub use self::assigned::AssignedView;
pub use self::config::LabelConfig;
pub use self::discovered::Discovery;
pub use self::message::{ContainerEvent, LabelMessage};
pub use self::one_shot::once;
pub use self::root::Root;
use self::shared::SharedLabels;
use self::source::LabelSources;
use self::stats::Stats;
pub use self::stats::{LabelStats, RESOLVE_BOUNDS};
use self::task::LabelTask;
pub use self::view::{FILES, LabelView, TriedView};

/// Answers and hints that wait for the driver; their senders wait with them.
const WORDS: usize = 1024;

#[derive(Clone)]
pub struct LabelService(Arc<SharedLabels>);

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
        let _ended = self.0.words.send(LabelMessage::Attempts(key, answer)).await;
        answered.await.unwrap_or_default()
    }
}

/// Starts the service; it ends when `events` is closed. Call it inside the IO runtime.
pub fn spawn(config: LabelConfig, events: UnboundedReceiver<ContainerEvent>) -> std::io::Result<LabelService> {
    let (words, inbox) = channel(WORDS);
    let (watched, wanted) = std::sync::mpsc::channel();
    let shared = Arc::new(SharedLabels {
        view: ArcSwap::default(),
        stats: Stats::default(),
        words: words.clone(),
        assigned: ArcSwap::default(),
    });
    let service = LabelService(Arc::clone(&shared));
    let root = Root::new(&config.rootfs);
    let sources = Arc::new(LabelSources::new(root, config.procfs.clone(), config.cgroups.clone()));
    std::thread::Builder::new().name("label-sockets".into()).spawn(move || sockets::watch(&wanted, &words))?;
    if config.sources.contains(&Source::Kubelet) {
        tokio::spawn(assigned::follow(Arc::clone(&sources), Arc::clone(&shared)));
    }
    let driver = LabelTask::new(config, sources, shared, watched);
    tokio::spawn(driver.run(events, inbox));
    Ok(service)
}
