//! The kubelet's device assignments. Its checkpoint and its pod-resources are read when either of the two changes, and, if there is no
//! checkpoint, also when the set of containers changes. In a steady state nothing is queried.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sampler_core::units::ContainerKey;
use sampler_labels::{Assignment, Source};
use tokio::sync::Semaphore;

use super::inner_kubelet::InnerKubelet;
use super::shared::SharedLabels;
use super::source::LabelSources;
use super::source::checkpoint::CHECKPOINT;
use super::source::claims::CLAIMS;
use super::source::kubelet::{AssignmentReport, Kubelet};
use super::stamp::{Stamp, stamp};

const POLL_INTERVAL: Duration = Duration::from_secs(1);
const READ_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// Reads of files in containers that may hang.
const INNER_READS: usize = 2;

/// What all kubelets have assigned.
#[derive(Debug)]
pub struct AssignedView {
    pub assignments: Vec<Assignment>,
    /// Something assigns this node's GPUs to pods, or it is not known that nothing does: a device plugin is registered, claims are prepared,
    /// or the lists could not be read. What a pod without an assignment sees of them then, it has not been given.
    pub assigns_gpus: bool,
}

impl Default for AssignedView {
    /// Before the first read.
    fn default() -> Self {
        Self { assignments: Vec::new(), assigns_gpus: true }
    }
}

/// The last known state of one kubelet's folder.
struct KubeletState {
    kubelet: Kubelet,
    checkpoint: Option<Stamp>,
    /// The checkpoint of the DRA driver.
    claims: Option<Stamp>,
    socket: Option<Stamp>,
    /// The containers at the time of the last query.
    containers: Option<HashSet<ContainerKey>>,
    assigned: Vec<Assignment>,
    assigns_gpus: bool,
    failed: bool,
    not_before: Option<Instant>,
    /// A read that hangs keeps its thread; the permit limits them to one.
    read_permit: Arc<Semaphore>,
}

/// Polls all kubelets; never returns.
pub(super) async fn follow(sources: Arc<LabelSources>, shared: Arc<SharedLabels>) {
    let mut kubelets: Vec<(PathBuf, KubeletState)> = Vec::new();
    let (mut is_first, inner_reads) = (true, Arc::new(Semaphore::new(INNER_READS)));
    loop {
        let places = sources.places.load();
        for folder in &places.kubelet_roots {
            if !kubelets.iter().any(|(known, _)| known == folder) {
                let kubelet = Kubelet::new(sources.host.path(folder), Arc::clone(&sources.guard));
                kubelets.push((folder.clone(), KubeletState::new(kubelet)));
            }
        }
        for InnerKubelet { container_id, root } in &places.inner_kubelets {
            if !kubelets.iter().any(|(known, _)| known == root) {
                let (reads, guard) = (Arc::clone(&inner_reads), Arc::clone(&sources.guard));
                let kubelet = Kubelet::in_container(root, container_id.clone(), Arc::clone(&reads), guard);
                kubelets.push((root.clone(), KubeletState { read_permit: reads, ..KubeletState::new(kubelet) }));
            }
        }
        let all = kubelets.len();
        let is_known = |(folder, state): &(PathBuf, KubeletState)| {
            !state.kubelet.is_in_container() || places.inner_kubelets.iter().any(|inner| inner.root == *folder)
        };
        kubelets.retain(is_known);
        drop(places);
        let mut changed = kubelets.len() < all || std::mem::take(&mut is_first);
        for (_, state) in &mut kubelets {
            changed |= state.refresh(&shared).await;
        }
        if changed {
            let assignments = kubelets.iter().flat_map(|(_, state)| state.assigned.iter().cloned()).collect();
            // A kubelet in a container assigns nothing on the node.
            let assigns_gpus = kubelets.iter().any(|(_, state)| state.assigns_gpus && !state.kubelet.is_in_container());
            shared.assigned.store(Arc::new(AssignedView { assignments, assigns_gpus }));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

impl KubeletState {
    fn new(kubelet: Kubelet) -> Self {
        Self {
            kubelet,
            checkpoint: None,
            claims: None,
            socket: None,
            containers: None,
            assigned: Vec::new(),
            assigns_gpus: false,
            failed: false,
            not_before: None,
            read_permit: Arc::new(Semaphore::new(1)),
        }
    }

    /// Returns whether the assignments changed.
    async fn refresh(&mut self, shared: &SharedLabels) -> bool {
        if self.not_before.is_some_and(|at| at > Instant::now()) {
            return false;
        }
        let (checkpoint, socket) = (self.kubelet.root.join(CHECKPOINT), self.kubelet.socket.path.clone());
        let (claims, is_own) = (self.kubelet.root.join(CLAIMS), !self.kubelet.is_in_container());
        // A file system may hang, so the reads have their own thread and a timeout.
        let Ok(permit) = Arc::clone(&self.read_permit).try_acquire_owned() else { return false };
        let stamps = tokio::task::spawn_blocking(move || {
            let _held = permit;
            let of_own = |path| if is_own { stamp(path) } else { None };
            (stamp(&checkpoint), of_own(&claims), of_own(&socket))
        });
        let Ok(Ok((checkpoint, claims, socket))) = tokio::time::timeout(READ_TIMEOUT, stamps).await else {
            self.not_before = Some(Instant::now() + RETRY_AFTER);
            return !std::mem::replace(&mut self.assigns_gpus, true);
        };
        if checkpoint.is_none() && socket.is_none() && self.assigned.is_empty() {
            return false;
        }
        // Its process has ended: what it has assigned stays until a search finds the next one.
        if !is_own && checkpoint.is_none() {
            return false;
        }
        let view = shared.view.load_full();
        let is_same = |before: &HashSet<ContainerKey>| before.len() == view.len() && view.keys().all(|key| before.contains(key));
        let containers_changed = || !self.containers.as_ref().is_some_and(is_same);
        // Claims are prepared before their containers start, but pod-resources names a container only once it has been made.
        let is_listed_only = checkpoint.is_none() || claims.is_some();
        let pods_changed = is_listed_only && socket.is_some() && containers_changed();
        let files_changed = checkpoint != self.checkpoint || claims != self.claims || socket != self.socket;
        if !files_changed && !pods_changed && !self.failed {
            return false;
        }
        let found = tokio::time::timeout(READ_TIMEOUT, self.kubelet.assigned()).await.unwrap_or_else(|_| {
            let problem = format!("no response within {} s", READ_TIMEOUT.as_secs());
            AssignmentReport { problems: vec![problem], ..AssignmentReport::default() }
        });
        (self.checkpoint, self.claims, self.socket) = (checkpoint, claims, socket);
        self.containers = Some(view.keys().copied().collect());
        self.failed = !found.problems.is_empty();
        self.not_before = self.failed.then(|| Instant::now() + RETRY_AFTER);
        // Each problem names its endpoint or file.
        let problem_with = |name: &str| found.problems.iter().find(|problem| problem.contains(name)).map(String::as_str);
        if socket.is_some() {
            let endpoint = format!("unix://{}", self.kubelet.socket.path.display());
            shared.stats.queried(Source::Kubelet, &endpoint, problem_with("unix://"));
        }
        if claims.is_some() {
            let path = self.kubelet.root.join(CLAIMS);
            shared.stats.probed(Source::Kubelet, &path.to_string_lossy(), problem_with(CLAIMS));
        }
        if checkpoint.is_some() {
            let path = self.kubelet.root.join(CHECKPOINT);
            shared.stats.probed(Source::Kubelet, &path.to_string_lossy(), problem_with(CHECKPOINT));
        }
        // A list that cannot be read is not an empty list.
        if self.failed && found.assignments.is_empty() {
            return !std::mem::replace(&mut self.assigns_gpus, true);
        }
        let before = (std::mem::replace(&mut self.assigned, found.assignments), self.assigns_gpus);
        self.assigns_gpus = found.assigns_gpus;
        (&before.0, before.1) != (&self.assigned, self.assigns_gpus)
    }
}
