//! The label service: one task, on a thread of its own, owns the resolver. Each query to a socket runs in a task of the IO runtime, and a
//! read that hangs is left to its thread, so no source waits for another.
//!
//! ```text
//!  core thread --containers--> task (resolver) --queries--> sources (files, sockets)
//!  sockets appear, disappear --^   ^-- replies, hints, discovered paths of runtimes
//!                              task --view--> exporter
//! ```

mod activation;
mod assigned;
mod config;
mod consent;
mod discover;
mod discovered;
mod file_reader;
mod inner_kubelet;
mod message;
mod one_shot;
mod process_search;
mod root;
mod runtime_config;
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

pub use self::activation::{ActivationGuard, Presence};
pub use self::assigned::AssignedView;
pub use self::config::LabelConfig;
pub use self::consent::{Consent, MAY_FREEZE, consent};
pub use self::discovered::Discovery;
pub use self::message::{ContainerEvent, LabelMessage};
pub use self::one_shot::resolve_once;
pub use self::root::Root;
use self::shared::SharedLabels;
use self::source::LabelSources;
use self::stats::Stats;
pub use self::stats::{LabelStats, RESOLVE_BOUNDS};
use self::task::LabelTask;
pub use self::view::{AttemptView, FILES, LabelView};

/// Capacity of the task's inbox; senders wait while it is full.
const MAX_PENDING_MESSAGES: usize = 1024;

#[derive(Clone)]
pub struct LabelService(Arc<SharedLabels>);

impl LabelService {
    pub fn view(&self) -> Arc<LabelView> {
        self.0.view.load_full()
    }

    /// The kubelet's GPU assignments.
    pub fn assigned(&self) -> Arc<AssignedView> {
        self.0.assigned.load_full()
    }

    pub fn stats(&self) -> LabelStats {
        self.0.stats.view()
    }

    /// The last result of every source for one container; empty if the container is unknown.
    pub async fn attempts(&self, key: ContainerKey) -> Vec<AttemptView> {
        let (sender, receiver) = oneshot::channel();
        // The task ends only with the process.
        let _ended = self.0.messages.send(LabelMessage::Attempts(key, sender)).await;
        receiver.await.unwrap_or_default()
    }
}

/// Starts the service, on a thread with a runtime of its own: what waits for HTTP clients does not delay it, and a wake-up of one thread
/// costs less than that of a pool. It ends when `events` is closed. Must be called inside the IO runtime, where
/// queries to sockets run.
pub fn spawn(config: LabelConfig, events: UnboundedReceiver<ContainerEvent>) -> std::io::Result<LabelService> {
    let (messages, inbox) = channel(MAX_PENDING_MESSAGES);
    let (watched, new_sockets) = std::sync::mpsc::channel();
    let shared = Arc::new(SharedLabels {
        view: ArcSwap::default(),
        stats: Stats::default(),
        messages: messages.clone(),
        assigned: ArcSwap::default(),
    });
    let service = LabelService(Arc::clone(&shared));
    let root = Root::new(&config.rootfs);
    let sources = Arc::new(LabelSources::new(root, config.procfs.clone(), config.cgroups.clone()));
    let guard = Arc::clone(&sources.guard);
    std::thread::Builder::new().name("label-sockets".into()).spawn(move || sockets::watch(&new_sockets, &guard, &messages))?;
    if config.sources.contains(&Source::Kubelet) {
        tokio::spawn(assigned::follow(Arc::clone(&sources), Arc::clone(&shared)));
    }
    let task = LabelTask::new(config, tokio::runtime::Handle::current(), sources, shared, watched);
    // A runtime must not be dropped where it cannot block, as here: it is built on its thread.
    let (built, is_built) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new().name("labels".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().thread_name("label-files").build();
        let (result, runtime) = runtime.map_or_else(|error| (Err(error), None), |runtime| (Ok(()), Some(runtime)));
        // The caller waits for it.
        let _sent = built.send(result);
        let Some(runtime) = runtime else { return };
        runtime.block_on(task.run(events, inbox));
        // A file read may hang in the kernel.
        runtime.shutdown_background();
    })?;
    is_built.recv().map_err(std::io::Error::other)??;
    Ok(service)
}
