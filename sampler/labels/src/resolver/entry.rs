//! The state of one container in the resolver, and its schedule at each target.

use std::sync::Arc;

use super::slots::Slots;
use super::target::OVERDUE;
use super::{MAX_BACK_OFF, MS, QUERIED_AFTER_END, TargetId, jittered};
use crate::values::{ContainerLabels, Facts, Label, Source};
use sampler_core::cgroup_path::{Kind, Runtime};
use sampler_core::identity::ContainerRecord;
use sampler_core::units::{BootNs, ContainerKey};

/// A runtime may write its record somewhat later than it makes the cgroup: files are read again once, before sockets are queried or soon
/// after.
const SECOND_FILES_DELAY: u64 = 100 * MS;
const FILE_ROUNDS: u32 = 2;
pub(super) const SOCKET_DELAY: u64 = 250 * MS;
/// A list of all containers is read after the files of one.
const LIST_DELAY: u64 = 30 * MS;
/// The least of the labels, from files of which there are many: queried once the runtime's own record should be there.
const LOGS_DELAY: u64 = 100 * MS;
/// The mounts of a process are the most expensive to read, and only needed where no socket knows the container.
const MOUNTS_DELAY: u64 = 500 * MS;
/// The bundles of Docker's containers have no labels, only their GPUs.
const DOCKER_BUNDLE_DELAY: u64 = 200 * MS;
/// A path may mislead, so sources that it does not suggest are queried as well, but later.
const UNLIKELY_DELAY: u64 = 5_000 * MS;
/// All queries of files but the first, and those after an event of an engine, are due at multiples of this, together with those of other
/// containers: to wake up for one costs more than to read it.
const TOGETHER: u64 = 250 * MS;
const MIN_BACK_OFF: u64 = 500 * MS;
/// A file that was absent twice is rarely written later; sockets are queried before.
const MIN_FILE_BACK_OFF: u64 = 1_000 * MS;
/// The back-off is the time since the first query divided by this, so an endpoint that recovers from a fault is queried within a quarter
/// of the fault's length.
const BACK_OFF_DIVISOR: u64 = 4;

/// The result of a query, with the name used in `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum QueryOutcome {
    Ok,
    NotFound,
    Error,
    Timeout,
    NotTried,
}

impl QueryOutcome {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryAttempt {
    pub status: QueryOutcome,
    /// Where the result was found, if not at the endpoint itself.
    pub at: Option<Arc<str>>,
    pub detail: Arc<str>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub record: Arc<ContainerRecord>,
    /// Shared with those who display them.
    labels: Arc<ContainerLabels>,
    pub seen: BootNs,
    pub slots: Slots,
    pub gone: Option<BootNs>,
    /// The container uses another container's id: it is not queried.
    pub forged: bool,
}

impl Entry {
    pub fn new(record: Arc<ContainerRecord>, seen: BootNs) -> Self {
        let labels = Arc::new(ContainerLabels::from_path(&record));
        Self { record, labels, seen, slots: Slots::default(), gone: None, forged: false }
    }

    pub fn labels(&self) -> &Arc<ContainerLabels> {
        &self.labels
    }

    /// A copy of them, if they are displayed.
    pub fn labels_mut(&mut self) -> &mut ContainerLabels {
        Arc::make_mut(&mut self.labels)
    }

    /// Removes what sources have said: it was about another container.
    pub fn forge(&mut self) {
        let mut labels = ContainerLabels::from_path(&self.record);
        labels.settled = self.labels.settled;
        (self.forged, self.labels) = (true, Arc::new(labels));
    }

    /// Adds a target. Returns the time of the first query; `None` if the source cannot know the container.
    pub fn add_slot(&mut self, id: TargetId, source: Source, now: BootNs) -> Option<BootNs> {
        let after = initial_delay(source, &self.labels)?;
        let (is_socket, has_specification) = (source.is_socket(), source.has_specification() && after < UNLIKELY_DELAY);
        let records_late = is_socket && !source.knows_before_cgroup();
        let due = self.seen.plus(after);
        let next = if is_socket || after < SECOND_FILES_DELAY { due } else { together_after(due) }.max(now);
        let reads_processes = source == Source::Mountinfo;
        let slot = Slot {
            is_socket,
            records_late,
            has_specification,
            reads_processes,
            started: self.seen,
            last_sent: now,
            next,
            ..Slot::default()
        };
        self.slots.insert(id, slot);
        self.needs_query_to(id, now).then_some(next)
    }

    /// Whether any source still has to be queried for the container.
    pub fn needs_queries(&self, now: BootNs) -> bool {
        let is_incomplete = !self.labels.complete() || self.labels.lacks_details();
        !self.forged && is_incomplete && self.gone.is_none_or(|at| now.saturating_since(at) < QUERIED_AFTER_END)
    }

    /// Whether this target still has to be queried. One result is enough for a container that is gone: files and records exist before
    /// their container, and are not made after its end.
    pub fn needs_query_to(&self, id: TargetId, now: BootNs) -> bool {
        let is_unresolved = |slot: &Slot| self.gone.is_none() || !slot.has_result && !slot.reads_processes;
        let is_needed = |slot: &Slot| self.needs_queries(now) && is_unresolved(slot) || self.needs_specification(slot);
        self.slots.get(id).is_some_and(is_needed)
    }

    /// Which GPUs a container is given, its specification says once and for all, however well its labels are known. It may be written
    /// late.
    fn needs_specification(&self, slot: &Slot) -> bool {
        let may_appear = !slot.has_result || slot.attempts < FILE_ROUNDS;
        slot.has_specification && !slot.was_found && may_appear && !self.forged && self.gone.is_none()
    }

    /// The container has no cgroup any more. Sockets that may have got to know it late are queried once more, files until they were read as
    /// often as those of a container that lives.
    pub fn end(&mut self, at: BootNs) {
        self.gone = Some(at);
        let is_read = |slot: &Slot| slot.is_socket || slot.reads_processes || slot.attempts >= FILE_ROUNDS;
        let is_open = |slot: &Slot| slot.records_late || !is_read(slot);
        self.slots.iter_mut().filter(|(_, slot)| is_open(slot)).for_each(|(_, slot)| slot.has_result = false);
    }

    /// Merges what a source says; returns whether that changes anything.
    pub fn merge(&mut self, source: Source, facts: &Facts) -> bool {
        // Unchanged labels stay shared.
        let mut labels = ContainerLabels::clone(&self.labels);
        let changed = labels.merge(source, facts);
        if changed {
            self.labels = Arc::new(labels);
        }
        changed
    }

    /// Whether this is a pod, or a job in a container: a container in the same pod has its namespace and pod.
    pub fn is_named_by_container(&self) -> bool {
        self.labels.kind == Kind::Pod || self.labels.host_user.is_some() && self.labels.is_nested
    }

    /// Whether this container is in the pod, or around the job.
    pub fn names(&self, other: &Entry) -> bool {
        // By cgroups: what a source says about a container may be what its tenant wants.
        let is_below = |path: &str, root: &str| path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/'));
        match other.labels.kind {
            Kind::Pod => is_below(&self.labels.id, &other.labels.id),
            _ => {
                is_below(&other.labels.id, &self.labels.id)
                    && other.labels.outer_container_id.as_ref() == Some(&self.labels.container_id)
            }
        }
    }

    /// Namespace and name of its pod, with their source.
    pub fn pod_names(&self) -> Option<(Source, Facts)> {
        let (namespace, pod) = (self.labels.get(Label::Namespace)?, self.labels.get(Label::Pod)?);
        let mut facts = Facts::default();
        facts.set(Label::Namespace, Some(&namespace.value));
        facts.set(Label::Pod, Some(&pod.value));
        let weaker = if namespace.source.authority() < pod.source.authority() { namespace } else { pod };
        Some((weaker.source, facts))
    }

    pub fn complete(&mut self, now: BootNs) {
        // Others appear here when they are first used.
        let created = (self.record.creation_seen && self.record.identity.is_container()).then_some(self.record.created);
        let labels = self.labels_mut();
        (labels.settled, labels.resolved_after_ns) = (true, created.map(|at| now.saturating_since(at)));
    }
}

/// Whether this source can provide labels of such a container.
pub fn can_resolve(source: Source, labels: &ContainerLabels) -> bool {
    initial_delay(source, labels).is_some()
}

/// Whether the known labels of the container suggest this source.
pub fn is_likely(source: Source, labels: &ContainerLabels) -> bool {
    initial_delay(source, labels).is_some_and(|after| after < UNLIKELY_DELAY)
}

/// Delay from the container's appearance to the first query of this source, by the known labels of the container.
fn initial_delay(source: Source, labels: &ContainerLabels) -> Option<u64> {
    use Runtime::{Containerd, CriO, Docker, Ecs, Nspawn, Podman, Rkt};
    match (labels.kind, source) {
        (Kind::Job | Kind::Unit | Kind::Login, Source::Environ) => return Some(0),
        (Kind::Job | Kind::Unit | Kind::Login, _) | (_, Source::Environ) => return None,
        (Kind::Pod, Source::Logs) => return Some(0),
        (Kind::Pod, Source::Kubelet) => return Some(SOCKET_DELAY),
        // The others know pods by their containers.
        (Kind::Pod, _) => return None,
        _ => {}
    }
    // These engines also match names and prefixes of ids: for anything but a full id they might return another container.
    let is_engine = matches!(
        source,
        Source::DockerFile | Source::Docker | Source::PodmanFile | Source::Podman | Source::CrioFile | Source::Crio
    );
    if is_engine && !is_full_id(&labels.container_id) {
        return None;
    }
    let (runtime, in_pod) = (labels.runtime, labels.in_pod());
    let runtime_in = |candidates: &[Runtime]| runtime.is_none_or(|r| candidates.contains(&r));
    let pods = in_pod || runtime_in(&[Containerd, CriO]);
    let likely = match source {
        Source::Cgroup | Source::Environ => return None,
        // For these runtimes pod manifests are the only source; the other runtimes have none.
        Source::Manifest if labels.kind == Kind::Container && matches!(runtime, Some(Rkt | Nspawn)) => true,
        Source::Manifest => return None,
        Source::Bundle if runtime_in(&[Docker, Ecs]) && !runtime_in(&[Containerd]) => return Some(DOCKER_BUNDLE_DELAY),
        Source::Bundle => runtime_in(&[Containerd]),
        Source::DockerFile | Source::Docker => runtime_in(&[Docker, Ecs]),
        Source::CrioFile | Source::Crio => runtime_in(&[CriO]),
        Source::PodmanFile | Source::Podman => runtime_in(&[Podman]) && !in_pod,
        Source::Cri => runtime_in(&[Containerd, CriO]) || in_pod,
        Source::Logs | Source::Mountinfo | Source::Kubelet => pods,
    };
    Some(match (likely, source.is_socket()) {
        (false, _) => UNLIKELY_DELAY,
        (true, true) => SOCKET_DELAY,
        (true, false) => match source {
            Source::PodmanFile => LIST_DELAY,
            Source::Logs => LOGS_DELAY,
            Source::Mountinfo => MOUNTS_DELAY,
            _ => 0,
        },
    })
}

fn together_before(at: BootNs) -> BootNs {
    BootNs(at.0 - at.0 % TOGETHER)
}

pub(super) fn together_after(at: BootNs) -> BootNs {
    BootNs(at.0.next_multiple_of(TOGETHER))
}

fn is_full_id(id: &str) -> bool {
    id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The schedule of one container at one target.
#[derive(Clone, Debug, Default)]
pub(super) struct Slot {
    pub is_socket: bool,
    /// The source may get to know a container only after its cgroup exists.
    records_late: bool,
    has_specification: bool,
    /// The source reads files of the container's processes, of which one that is gone has none.
    reads_processes: bool,
    /// The source once had it: unlike `has_result`, also after its places have changed.
    was_found: bool,
    /// When the back-off started or was last restarted.
    started: BootNs,
    attempts: u32,
    last_sent: BootNs,
    /// Queries without an outcome.
    pending: u32,
    pub next: BootNs,
    /// A query returned a result other than a failure. Of a source that records late and a container that is gone: a query that was sent
    /// after its end.
    pub has_result: bool,
    pub last_attempt: Option<QueryAttempt>,
}

impl Slot {
    /// While a query is pending, the earliest time to repeat it; file reads are not repeated while pending.
    pub fn busy_until(&self, now: BootNs) -> Option<BootNs> {
        let overdue = self.last_sent.plus(OVERDUE);
        (self.pending > 0 && (!self.is_socket || now < overdue)).then_some(overdue)
    }

    /// The state of a pending query; `None` if there is none, or if an earlier result is more informative.
    pub fn pending_attempt(&self, now: BootNs) -> Option<QueryAttempt> {
        let since = now.saturating_since(self.last_sent);
        let (status, detail) = match (self.pending, since) {
            (0, _) => return None,
            (_, ..OVERDUE) => (QueryOutcome::NotTried, "query in progress".into()),
            _ => (QueryOutcome::Timeout, format!("queried {:.1} s ago, no response yet", since as f64 / 1e9).into()),
        };
        // An earlier result says more than that the query is repeated.
        let has_earlier = status == QueryOutcome::NotTried && self.last_attempt.is_some();
        (!has_earlier).then_some(QueryAttempt { status, at: None, detail })
    }

    pub fn record_sent(&mut self, now: BootNs) {
        self.last_sent = now;
        self.pending += 1;
    }

    /// `endpoint_healthy`: the endpoint responds, so this container's own back-off sets the next time; otherwise the breaker does.
    pub fn record_outcome(
        &mut self,
        key: ContainerKey,
        gone: Option<BootNs>,
        endpoint_healthy: bool,
        attempt: QueryAttempt,
        now: BootNs,
    ) {
        self.pending = self.pending.saturating_sub(1);
        self.attempts += 1;
        let is_result = !matches!(attempt.status, QueryOutcome::Error | QueryOutcome::Timeout);
        self.has_result |= is_result && (!self.records_late || gone.is_none_or(|at| self.last_sent >= at));
        self.was_found |= attempt.status == QueryOutcome::Ok;
        self.last_attempt = Some(attempt);
        let second = self.started.plus(SECOND_FILES_DELAY);
        let second = (!self.is_socket && second > now).then(|| together_after(second));
        let age = now.saturating_since(self.started);
        let least = if self.is_socket { MIN_BACK_OFF } else { MIN_FILE_BACK_OFF };
        let full =
            if endpoint_healthy || !self.is_socket { (age / BACK_OFF_DIVISOR).clamp(least, MAX_BACK_OFF) } else { MIN_BACK_OFF };
        let later = || now.plus(jittered(full, key, self.attempts));
        self.next = second.unwrap_or_else(|| if self.is_socket { later() } else { together_before(later()) });
    }

    /// Restarts the back-off; the next query is at `at`, or earlier if it was scheduled earlier.
    pub fn restart(&mut self, at: BootNs, now: BootNs) {
        self.started = now;
        self.next = self.next.min(at).max(now);
    }
}
