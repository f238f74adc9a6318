//! One container on the ladder, and what it has to do with each target.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::target::OVERDUE;
use super::{ASKED_ON_AFTER_END, BACK_OFF_LAST, MS, TargetId, jittered};
use crate::values::{ContainerLabels, Source};
use sampler_core::cgroup_path::{Kind, Runtime};
use sampler_core::identity::ContainerRecord;
use sampler_core::units::{BootNs, ContainerKey};

const FILE_STEPS: [u64; 5] = [0, 10 * MS, 30 * MS, 100 * MS, 300 * MS];
pub(super) const SOCKET_AFTER: u64 = 250 * MS;
/// What reads more than one small file waits for what reads one.
const WIDE_AFTER: u64 = 30 * MS;
/// A path may mislead: those whom it does not suggest come later.
const UNLIKELY_AFTER: u64 = 5_000 * MS;
const BACK_OFF_FIRST: u64 = 500 * MS;
/// The back-off is this part of the time since the asking began, so what began to answer after a fault is asked within a quarter
/// of the fault's length.
const BACK_OFF_PART: u64 = 4;

/// What came of a question, as `explain` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryOutcome {
    Ok,
    NotFound,
    Error,
    Timeout,
    NotTried,
}

impl QueryOutcome {
    pub fn name(self) -> &'static str {
        match self {
            QueryOutcome::Ok => "ok",
            QueryOutcome::NotFound => "not-found",
            QueryOutcome::Error => "error",
            QueryOutcome::Timeout => "timeout",
            QueryOutcome::NotTried => "not-tried",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryAttempt {
    pub told: QueryOutcome,
    /// Where it was found, when that is not the endpoint itself.
    pub at: Option<Arc<str>>,
    pub detail: Arc<str>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub record: Arc<ContainerRecord>,
    pub labels: ContainerLabels,
    pub seen: BootNs,
    pub slots: BTreeMap<TargetId, Slot>,
    pub gone: Option<BootNs>,
    /// It has another container's id: nobody is asked about it.
    pub forged: bool,
}

impl Entry {
    pub fn new(record: Arc<ContainerRecord>, seen: BootNs) -> Self {
        let labels = ContainerLabels::from_path(&record);
        Self { record, labels, seen, slots: BTreeMap::new(), gone: None, forged: false }
    }

    /// When it is to be asked first; `None` for what this source can know nothing about.
    pub fn add_slot(&mut self, id: TargetId, source: Source, now: BootNs) -> Option<BootNs> {
        let after = first_after(source, &self.labels)?;
        let next = self.seen.plus(after).max(now);
        let slot = Slot {
            is_socket: source.is_socket(),
            began: self.seen,
            attempts: 0,
            put: now,
            flights: 0,
            next,
            looked: false,
            tried: None,
        };
        self.slots.insert(id, slot);
        self.is_asked_for(id, now).then_some(next)
    }

    /// Whether anybody is still asked about it.
    pub fn is_asked_about(&self, now: BootNs) -> bool {
        !self.forged && !self.labels.complete() && self.gone.is_none_or(|at| now.saturating_since(at) < ASKED_ON_AFTER_END)
    }

    /// Files come before their container and go with it: of one that is gone they are looked for once.
    pub fn is_asked_for(&self, id: TargetId, now: BootNs) -> bool {
        let looked_for = |slot: &Slot| slot.is_socket || self.gone.is_none() || !slot.looked;
        self.is_asked_about(now) && self.slots.get(&id).is_some_and(looked_for)
    }

    pub fn complete(&mut self, now: BootNs) {
        self.labels.settled = true;
        let created = self.record.creation_seen.then_some(self.record.created);
        self.labels.resolved_after_ns = created.map(|at| now.saturating_since(at));
    }
}

/// Whether this source can know anything of such a container.
pub fn can_know(source: Source, labels: &ContainerLabels) -> bool {
    first_after(source, labels).is_some()
}

/// Whether what is known of such a container suggests this source.
pub fn is_likely(source: Source, labels: &ContainerLabels) -> bool {
    first_after(source, labels).is_some_and(|after| after < UNLIKELY_AFTER)
}

/// From seeing a container to the first question to this source, by what is known of the container.
fn first_after(source: Source, labels: &ContainerLabels) -> Option<u64> {
    use Runtime::{Containerd, CriO, Docker, Ecs, Nspawn, Podman, Rkt};
    // These engines complete names and beginnings of ids: asked about anything else they would answer about another container.
    let engines = matches!(
        source,
        Source::DockerFile | Source::Docker | Source::PodmanFile | Source::Podman | Source::CrioFile | Source::Crio
    );
    if engines && !is_engines_id(&labels.container_id) {
        return None;
    }
    let (runtime, in_pod) = (labels.runtime, labels.in_pod());
    let one_of = |wanted: &[Runtime]| runtime.is_none_or(|r| wanted.contains(&r));
    let pods = in_pod || one_of(&[Containerd, CriO]);
    let likely = match source {
        Source::Cgroup => return None,
        // Pods' manifests are all there is of these, and nothing to the others.
        Source::Manifest if labels.kind == Kind::Container && matches!(runtime, Some(Rkt | Nspawn)) => true,
        Source::Manifest => return None,
        Source::Bundle => one_of(&[Containerd]),
        Source::DockerFile | Source::Docker => one_of(&[Docker, Ecs]),
        Source::CrioFile | Source::Crio => one_of(&[CriO]),
        Source::PodmanFile | Source::Podman => one_of(&[Podman]) && !in_pod,
        Source::Cri => one_of(&[Containerd, CriO]) || in_pod,
        Source::Logs | Source::Mountinfo | Source::Kubelet => pods,
    };
    let wide = matches!(source, Source::Logs | Source::Mountinfo | Source::PodmanFile);
    Some(match (likely, source.is_socket()) {
        (false, _) => UNLIKELY_AFTER,
        (true, true) => SOCKET_AFTER,
        (true, false) if wide => WIDE_AFTER,
        (true, false) => 0,
    })
}

fn is_engines_id(id: &str) -> bool {
    id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

/// One container at one target.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub is_socket: bool,
    /// When the asking began, or began anew.
    began: BootNs,
    attempts: u32,
    /// When it was last asked, and how many answers are outstanding.
    put: BootNs,
    flights: u32,
    pub next: BootNs,
    /// It has answered; a failure is no answer.
    pub looked: bool,
    pub tried: Option<QueryAttempt>,
}

impl Slot {
    /// While an answer is outstanding, the earliest time to ask beside it; files are not asked twice at once.
    pub fn busy_until(&self, now: BootNs) -> Option<BootNs> {
        let overdue = self.put.plus(OVERDUE);
        (self.flights > 0 && (!self.is_socket || now < overdue)).then_some(overdue)
    }

    /// What to say of a question that has no answer yet.
    pub fn unanswered(&self, now: BootNs) -> Option<QueryAttempt> {
        let since = now.saturating_since(self.put);
        let (told, detail) = match (self.flights, since) {
            (0, _) => return None,
            (_, ..OVERDUE) => (QueryOutcome::NotTried, "it is being asked".into()),
            _ => (QueryOutcome::Timeout, format!("asked {:.1} s ago, no answer yet", since as f64 / 1e9).into()),
        };
        // What it said before says more than that it is asked again.
        let known = told == QueryOutcome::NotTried && self.tried.is_some();
        (!known).then_some(QueryAttempt { told, at: None, detail })
    }

    pub fn put(&mut self, now: BootNs) {
        self.put = now;
        self.flights += 1;
    }

    /// `paced`: the endpoint answers, so this container's own back-off sets the pace; else the breaker does.
    pub fn answered(&mut self, key: ContainerKey, paced: bool, tried: QueryAttempt, now: BootNs) {
        self.flights = self.flights.saturating_sub(1);
        self.attempts += 1;
        self.looked |= !matches!(tried.told, QueryOutcome::Error | QueryOutcome::Timeout);
        self.tried = Some(tried);
        let step = FILE_STEPS.iter().map(|after| self.began.plus(*after)).find(|at| *at > now).filter(|_| !self.is_socket);
        let age = now.saturating_since(self.began);
        let full =
            if paced || !self.is_socket { (age / BACK_OFF_PART).clamp(BACK_OFF_FIRST, BACK_OFF_LAST) } else { BACK_OFF_FIRST };
        self.next = step.unwrap_or_else(|| now.plus(jittered(full, key, self.attempts)));
    }

    /// At `at`, or before it where that was planned; the back-off begins anew.
    pub fn again(&mut self, at: BootNs, now: BootNs) {
        self.began = now;
        self.next = self.next.min(at).max(now);
    }
}
