//! Which devices the kubelet has assigned to whom: its checkpoint and its pod-resources are read when either of the two changes, and
//! where there is no checkpoint also when containers have come or gone. In a steady state nobody is asked.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sampler_core::units::ContainerKey;
use sampler_labels::{Assignment, Source};
use tokio::sync::Semaphore;

use super::shared::SharedLabels;
use super::source::LabelSources;
use super::source::kubelet::{AssignmentReport, CHECKPOINT, Kubelet};
use super::stamp::{Stamp, stamp};

const LOOK_EVERY: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);
const AFTER_FAILURE: Duration = Duration::from_secs(10);

pub type AssignedView = Vec<Assignment>;

/// One kubelet's state folder, as last seen.
struct Watched {
    kubelet: Kubelet,
    checkpoint: Option<Stamp>,
    socket: Option<Stamp>,
    /// Who was there when it was last asked.
    containers: Option<HashSet<ContainerKey>>,
    assigned: Vec<Assignment>,
    failed: bool,
    not_before: Option<Instant>,
    /// A look that hangs keeps its thread: there is one.
    looks: Arc<Semaphore>,
}

/// For the life of the process.
pub(super) async fn follow(sources: Arc<LabelSources>, shared: Arc<SharedLabels>) {
    let mut watched: Vec<(std::path::PathBuf, Watched)> = Vec::new();
    loop {
        for folder in &sources.places.load().kubelet_roots {
            if !watched.iter().any(|(known, _)| known == folder) {
                let new = Watched::new(Kubelet::new(sources.root.path(folder)));
                watched.push((folder.clone(), new));
            }
        }
        let mut changed = false;
        for (_, one) in &mut watched {
            changed |= one.look(&shared).await;
        }
        if changed {
            shared.assigned.store(Arc::new(watched.iter().flat_map(|(_, w)| w.assigned.iter().cloned()).collect()));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

impl Watched {
    fn new(kubelet: Kubelet) -> Self {
        Self {
            kubelet,
            checkpoint: None,
            socket: None,
            containers: None,
            assigned: Vec::new(),
            failed: false,
            not_before: None,
            looks: Arc::new(Semaphore::new(1)),
        }
    }

    /// Whether what is known changed.
    async fn look(&mut self, shared: &SharedLabels) -> bool {
        if self.not_before.is_some_and(|at| at > Instant::now()) {
            return false;
        }
        let (checkpoint, socket) = (self.kubelet.root().join(CHECKPOINT), self.kubelet.socket().to_owned());
        // A file system may hang: not on a thread that serves others, and not for ever.
        let Ok(permit) = Arc::clone(&self.looks).try_acquire_owned() else { return false };
        let looked = tokio::task::spawn_blocking(move || {
            let _held = permit;
            (stamp(&checkpoint), stamp(&socket))
        });
        let Ok(Ok((checkpoint, socket))) = tokio::time::timeout(PATIENCE, looked).await else {
            self.not_before = Some(Instant::now() + AFTER_FAILURE);
            return false;
        };
        if checkpoint.is_none() && socket.is_none() && self.assigned.is_empty() {
            return false;
        }
        let view = shared.view.load_full();
        let same = |before: &HashSet<ContainerKey>| before.len() == view.len() && view.keys().all(|key| before.contains(key));
        let pods = !self.containers.as_ref().is_some_and(same);
        let asked_for = checkpoint.is_none() && socket.is_some() && pods;
        if checkpoint == self.checkpoint && socket == self.socket && !asked_for && !self.failed {
            return false;
        }
        let late = || AssignmentReport {
            problems: vec![format!("no answer within {} s", PATIENCE.as_secs())],
            ..AssignmentReport::default()
        };
        let found = tokio::time::timeout(PATIENCE, self.kubelet.assigned()).await.unwrap_or_else(|_| late());
        (self.checkpoint, self.socket, self.containers) = (checkpoint, socket, Some(view.keys().copied().collect()));
        self.failed = !found.problems.is_empty();
        self.not_before = self.failed.then(|| Instant::now() + AFTER_FAILURE);
        // Each problem names its own.
        let of = |name: &str| found.problems.iter().find(|problem| problem.contains(name)).map(String::as_str);
        if socket.is_some() {
            shared.stats.asked(Source::Kubelet, &format!("unix://{}", self.kubelet.socket().display()), of("unix://"));
        }
        if checkpoint.is_some() {
            let path = self.kubelet.root().join(CHECKPOINT);
            shared.stats.probed(Source::Kubelet, &path.to_string_lossy(), of(CHECKPOINT));
        }
        // A list that cannot be read now is not an empty one.
        if self.failed && found.assignments.is_empty() || found.assignments == self.assigned {
            return false;
        }
        self.assigned = found.assignments;
        true
    }
}
