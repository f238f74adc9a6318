//! The schedule of label queries, without IO: the resolver returns the queries that are due, receives their outcomes, and never gives up
//! a running container.
//!
//! ```text
//!  per container:  Identified (path only) -> Partial -> Complete        any -> Gone (queried until one result, for 10 s) -> evicted with its record
//!  per (container, target):
//!      file    when it appears (a list 30 ms later), from 100 ms on (logs; mounts from 500), then after 1 s, growing with its age to
//!             30 s; all but the first at multiples of 250 ms, or at an event of an engine
//!      socket  250 ms after it appeared (an earlier query races its creation), then 0.5 s, growing as well
//!  per socket:     absent -> closed --5 transport errors--> open --a probe every second, later every 30 s--> closed
//! ```
//! A target is a source at an endpoint; a source may have several. The runtime that the path suggests sets the order of the sources and
//! excludes none. "Not found" is a result, not an error. A query without a result after a second counts as an error, no longer counts
//! against the limit of queries in flight, and may be repeated while it is pending: the recovery of a runtime that hung is detected
//! within a second, and the result of a slow one is still used.
//!
//! Not part of this module: the timeout of a query, and what an endpoint is. The caller provides both.

mod entry;
#[cfg(test)]
mod histories;
mod slots;
mod target;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use self::entry::{Entry, Slot};
pub use self::entry::{QueryAttempt, QueryOutcome, can_resolve, is_likely};
use self::slots::Slots;
use self::target::Target;
pub use self::target::{ABSENT, FILES_IN_FLIGHT};
use super::values::{ContainerLabels, Facts, Label, Source};
use sampler_core::identity::ContainerRecord;
use sampler_core::units::{BootNs, ContainerKey};

const MS: u64 = 1_000_000;
const MAX_BACK_OFF: u64 = 30_000 * MS;
/// A container of this age, or a quarter of a second more, is exported with the labels it has.
const SETTLED_AFTER: u64 = 2_000 * MS;
/// Most containers are resolved by the first queries; those that are not may be of a runtime that is not known yet.
const SEARCHED_FOR_AFTER: u64 = 500 * MS;
/// A runtime may have the record of a container for some time after its cgroup was removed, and may not respond before.
const QUERIED_AFTER_END: u64 = 10_000 * MS;
/// Some for each target; those of errors vary.
const MAX_SHARED_TEXTS: usize = 256;

/// Index of a target (a source at one endpoint), in the order of addition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetId(pub u16);

/// One query to execute.
#[derive(Clone, Debug)]
pub struct Query {
    pub key: ContainerKey,
    pub target: TargetId,
    pub source: Source,
    pub record: Arc<ContainerRecord>,
    /// Its cgroup was removed, so it has no processes.
    pub is_gone: bool,
    /// `None` if not known yet.
    pub pod_uid: Option<String>,
    /// Distinguishes two queries for the same container and target.
    number: u64,
}

impl Query {
    /// A query that is not scheduled by the resolver.
    pub fn unscheduled(record: Arc<ContainerRecord>, target: TargetId, source: Source, pod_uid: Option<String>) -> Self {
        Self { key: record.key, target, source, record, is_gone: false, pod_uid, number: 0 }
    }

    /// The id that runtimes use; empty if the path has none.
    pub fn container_id(&self) -> &str {
        self.record.identity.container_id.as_deref().unwrap_or_default()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Found(Facts),
    NotFound,
    /// Nothing was queried, for lack of an endpoint or of a valid id; the state of the endpoint is unknown.
    NotQueried,
    /// Transport error, timeout, or invalid response.
    Failed,
}

/// Due times of queries.
type Queue = BTreeSet<(BootNs, ContainerKey, TargetId)>;

#[derive(Debug, Default)]
pub struct LabelResolver {
    targets: Vec<Target>,
    entries: HashMap<ContainerKey, Entry>,
    by_id: HashMap<Arc<str>, Vec<ContainerKey>>,
    /// Pods with processes in their own cgroups, and jobs in containers; there are few.
    named_by_container: BTreeSet<ContainerKey>,
    /// Outdated entries are skipped when they become due.
    queue: Queue,
    /// Times at which containers settle with incomplete labels.
    settling: BTreeSet<(BootNs, ContainerKey)>,
    changed: HashSet<ContainerKey>,
    /// Includes all containers that need queries, the oldest first. The others are removed by [`LabelResolver::has_unresolved`].
    unresolved: BTreeSet<(BootNs, ContainerKey)>,
    sent_count: u64,
    /// Texts of results: most containers have the same.
    texts: HashSet<Arc<str>>,
}

impl LabelResolver {
    /// `present`: whether the endpoint exists. An absent endpoint is not queried.
    pub fn add_target(&mut self, source: Source, endpoint: &str, present: bool, now: BootNs) -> TargetId {
        let id = TargetId(u16::try_from(self.targets.len()).unwrap_or(u16::MAX));
        self.targets.push(Target::new(source, endpoint.into(), present));
        self.add_slots(id, now);
        id
    }

    /// Gives every container without one a slot of a present target.
    fn add_slots(&mut self, id: TargetId, now: BootNs) {
        let Some(target) = self.targets.get(usize::from(id.0)).filter(|target| target.present) else { return };
        for (key, entry) in self.entries.iter_mut().filter(|(_, entry)| entry.slots.get(id).is_none()) {
            self.queue.extend(entry.add_slot(id, target.source, now).map(|at| (at, *key, id)));
        }
    }

    pub fn targets(&self) -> impl Iterator<Item = (TargetId, Source, &str)> {
        let all = self.targets.iter().enumerate().filter(|(_, t)| !t.retired);
        all.map(|(n, t)| (TargetId(n as u16), t.source, &*t.endpoint))
    }

    /// Adds a container. Returns whether its path alone makes its labels complete.
    pub fn appeared(&mut self, record: Arc<ContainerRecord>, now: BootNs) -> bool {
        let key = record.key;
        let mut entry = Entry::new(record, now);
        let can_know = |target: &&Target| target.present && can_resolve(target.source, entry.labels());
        entry.slots = Slots::with_room_for(self.targets.iter().filter(can_know).count());
        entry.forged = self.is_forged(&entry);
        self.revoke_forged_labels(&entry);
        for (n, target) in self.targets.iter().enumerate().filter(|(_, target)| target.present) {
            let id = TargetId(n as u16);
            self.queue.extend(entry.add_slot(id, target.source, now).map(|at| (at, key, id)));
        }
        let complete = entry.labels().complete();
        if complete {
            entry.complete(now);
        } else {
            self.settling.insert((settles_at(now), key));
            self.unresolved.insert((now, key));
        }
        self.by_id.entry(Arc::clone(&entry.labels().container_id)).or_default().push(key);
        let is_named_by_container = entry.is_named_by_container();
        self.entries.insert(key, entry);
        self.changed.insert(key);
        if is_named_by_container {
            self.named_by_container.insert(key);
            let containers: Vec<ContainerKey> = self.entries.keys().copied().collect();
            containers.into_iter().for_each(|container| self.share_names(container, now));
        }
        complete
    }

    /// A pod has the names that a container in it has, and a job those of the container around it.
    fn share_names(&mut self, container: ContainerKey, now: BootNs) {
        if self.named_by_container.is_empty() {
            return;
        }
        let can_name = |entry: &&Entry| entry.record.identity.is_container() && !entry.forged;
        let Some(entry) = self.entries.get(&container).filter(can_name) else { return };
        let Some((source, facts)) = entry.pod_names() else { return };
        let is_named = |key: &&ContainerKey| self.entries.get(key).is_some_and(|other| entry.names(other));
        let named: Vec<ContainerKey> = self.named_by_container.iter().filter(is_named).copied().collect();
        for key in named {
            let Some(entry) = self.entries.get_mut(&key).filter(|e| e.labels().get(Label::Namespace).is_none()) else { continue };
            entry.merge(source, &facts);
            entry.complete(now);
            self.changed.insert(key);
        }
    }

    /// Whether a nested cgroup uses the id of another container. A tenant that can create cgroups inside its container can name one after
    /// another tenant's container, and must not receive that container's labels. If a container with the same id is not nested, runtimes
    /// mean that one.
    fn is_forged(&self, entry: &Entry) -> bool {
        // Includes containers that are gone, since runtimes keep their records for longer.
        let mut same_id =
            self.by_id.get(&entry.labels().container_id).into_iter().flatten().filter_map(|key| self.entries.get(key));
        entry.labels().is_nested && same_id.any(|other| !other.labels().is_nested)
    }

    /// Removes the labels of nested containers that appeared before the genuine one with their id.
    fn revoke_forged_labels(&mut self, genuine: &Entry) {
        if genuine.labels().is_nested {
            return;
        }
        for key in self.by_id.get(&genuine.labels().container_id).into_iter().flatten() {
            if let Some(other) = self.entries.get_mut(key).filter(|other| other.labels().is_nested && !other.forged) {
                other.forge();
                self.changed.insert(*key);
            }
        }
    }

    /// The container's cgroup was removed. Sources that may still know it are queried immediately, and for a few seconds.
    pub fn gone(&mut self, key: ContainerKey, at: BootNs, now: BootNs) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.end(at);
            requeue(&mut self.queue, &self.targets, entry, now, None);
        }
    }

    /// Identity has evicted the container.
    pub fn evicted(&mut self, key: ContainerKey) {
        let Some(entry) = self.entries.remove(&key) else { return };
        if let Some(keys) = self.by_id.get_mut(&entry.labels().container_id) {
            keys.retain(|k| *k != key);
            if keys.is_empty() {
                self.by_id.remove(&entry.labels().container_id);
            }
        }
        for target in &mut self.targets {
            target.forget(key);
        }
        for (id, slot) in entry.slots.iter() {
            self.queue.remove(&(slot.next, key, id));
        }
        self.settling.remove(&(settles_at(entry.seen), key));
        self.unresolved.remove(&(entry.seen, key));
        self.named_by_container.remove(&key);
        self.changed.insert(key);
    }

    /// A runtime reported an event of this container: its queries become due without waiting for the back-off.
    pub fn hint(&mut self, container_id: &str, now: BootNs) {
        for key in self.by_id.get(container_id).into_iter().flatten() {
            if let Some(entry) = self.entries.get_mut(key) {
                requeue(&mut self.queue, &self.targets, entry, now, None);
            }
        }
    }

    /// The endpoint appeared or was replaced.
    pub fn endpoint_present(&mut self, id: TargetId, now: BootNs) {
        if let Some(target) = self.targets.get_mut(usize::from(id.0)) {
            target.reset();
            self.add_slots(id, now);
            for entry in self.entries.values_mut() {
                // Results from before do not apply to what is there now.
                if let Some(slot) = entry.slots.get_mut(id) {
                    slot.has_result = false;
                }
                requeue(&mut self.queue, &self.targets, entry, now, Some(id));
            }
        }
    }

    pub fn is_present(&self, id: TargetId) -> bool {
        self.targets.get(usize::from(id.0)).is_some_and(|t| t.present)
    }

    /// Finds a retired target, to revive it.
    pub fn retired(&self, source: Source, endpoint: &str) -> Option<TargetId> {
        let matches = |t: &Target| t.retired && t.source == source && *t.endpoint == *endpoint;
        self.targets.iter().position(matches).map(|n| TargetId(n as u16))
    }

    pub fn revive(&mut self, id: TargetId, present: bool, now: BootNs) {
        let Some(target) = self.targets.get_mut(usize::from(id.0)).filter(|t| t.retired) else { return };
        target.retired = false;
        target.reset();
        target.present = present;
        self.add_slots(id, now);
    }

    /// Excludes a target from queries and from the output; its endpoint is gone permanently.
    pub fn retire(&mut self, id: TargetId) {
        let Some(target) = self.targets.get_mut(usize::from(id.0)) else { return };
        target.retire();
        for (key, entry) in &mut self.entries {
            if let Some(slot) = entry.slots.remove(id) {
                self.queue.remove(&(slot.next, *key, id));
            }
        }
    }

    /// The endpoint disappeared.
    pub fn endpoint_absent(&mut self, id: TargetId) {
        if let Some(target) = self.targets.get_mut(usize::from(id.0)) {
            target.present = false;
        }
    }

    /// The queries that are due; each is pending until [`LabelResolver::record_outcome`].
    pub fn due(&mut self, now: BootNs) -> Vec<Query> {
        while let Some((at, key)) = self.settling.first().copied().filter(|(at, _)| *at <= now) {
            self.settling.remove(&(at, key));
            if let Some(entry) = self.entries.get_mut(&key).filter(|e| !e.labels().settled) {
                entry.labels_mut().settled = true;
                self.changed.insert(key);
            }
        }
        while let Some((at, key, id)) = self.queue.first().copied().filter(|(at, ..)| *at <= now) {
            self.queue.remove(&(at, key, id));
            let Some(target) = self.targets.get_mut(usize::from(id.0)) else { continue };
            let Some(entry) = self.entries.get_mut(&key).filter(|e| e.needs_query_to(id, now)) else { continue };
            let Some(slot) = entry.slots.get_mut(id).filter(|s| s.next == at) else { continue };
            match (slot.busy_until(now), slot.is_socket) {
                (Some(until), true) => {
                    slot.next = until;
                    self.queue.insert((until, key, id));
                }
                // The pending query's outcome sets the next time.
                (Some(_), false) => {}
                (None, _) => target.enqueue(at, key),
            }
        }
        let mut queries = Vec::new();
        for (n, target) in self.targets.iter_mut().enumerate() {
            let id = TargetId(n as u16);
            target.expire(now);
            while target.has_room(now)
                && let Some(key) = target.pop_waiting()
            {
                let Some(entry) = self.entries.get_mut(&key).filter(|e| e.needs_query_to(id, now)) else { continue };
                let Some(slot) = entry.slots.get_mut(id) else { continue };
                self.sent_count += 1;
                target.record_sent(self.sent_count, key, now);
                slot.record_sent(now);
                // Without an outcome by then, the query is repeated while this one is pending.
                if target.source.is_socket() {
                    slot.next = now.plus(target::OVERDUE);
                    self.queue.insert((slot.next, key, id));
                }
                queries.push(Query {
                    key,
                    target: id,
                    source: target.source,
                    record: Arc::clone(&entry.record),
                    is_gone: entry.gone.is_some(),
                    pod_uid: entry.labels().pod_uid.clone(),
                    number: self.sent_count,
                });
            }
        }
        queries
    }

    /// Returns whether the outcome completed the labels for the first time; then [`ContainerLabels::resolved_after_ns`] is set.
    pub fn record_outcome(&mut self, query: &Query, outcome: &Outcome, attempt: QueryAttempt, now: BootNs) -> bool {
        let Some(target) = self.targets.get_mut(usize::from(query.target.0)) else { return false };
        let was_open = target.is_open();
        let healthy = target.record_outcome(query.number, outcome, now);
        let closed = was_open && !target.is_open();
        let QueryAttempt { status, at, detail } = attempt;
        let attempt = QueryAttempt { status, at: at.map(|at| self.shared_text(at)), detail: self.shared_text(detail) };
        let mut completed = false;
        if let Some(entry) = self.entries.get_mut(&query.key) {
            let mut reopened = false;
            // The container may have been found to be forged while the query was pending.
            if let (Outcome::Found(facts), false) = (outcome, entry.forged) {
                let before = entry.labels().complete();
                if entry.merge(query.source, facts) {
                    self.changed.insert(query.key);
                }
                // If the pod is learned last, its labels are missing and complete labels become incomplete.
                reopened = before && !entry.labels().complete();
                if !before && entry.labels().complete() {
                    completed = entry.labels().resolved_after_ns.is_none();
                    entry.complete(now);
                    self.settling.remove(&(settles_at(entry.seen), query.key));
                }
            }
            if let Some(slot) = entry.slots.get_mut(query.target) {
                self.queue.remove(&(slot.next, query.key, query.target));
                slot.record_outcome(query.key, entry.gone, *outcome != Outcome::Failed || healthy, attempt, now);
                let next = slot.next;
                if entry.needs_query_to(query.target, now) {
                    self.queue.insert((next, query.key, query.target));
                }
            }
            if reopened {
                self.unresolved.insert((entry.seen, query.key));
                requeue(&mut self.queue, &self.targets, entry, now, None);
            }
        }
        self.share_names(query.key, now);
        if closed {
            // The endpoint responds again: queries that were delayed by its failure are due now.
            for entry in self.entries.values_mut() {
                requeue(&mut self.queue, &self.targets, entry, now, Some(query.target));
            }
        }
        completed
    }

    fn shared_text(&mut self, text: Arc<str>) -> Arc<str> {
        if let Some(known) = self.texts.get(&text) {
            return Arc::clone(known);
        }
        if self.texts.len() >= MAX_SHARED_TEXTS {
            self.texts.clear();
        }
        self.texts.insert(Arc::clone(&text));
        text
    }

    /// When [`LabelResolver::due`] may return something new; outcomes may bring this time forward.
    pub fn next_due(&self, now: BootNs) -> Option<BootNs> {
        let targets_due = self.targets.iter().filter_map(|t| t.next_room(now));
        let queue = self.queue.first().map(|(at, ..)| *at);
        let settling = self.settling.first().map(|(at, _)| *at);
        targets_due.chain(queue).chain(settling).min()
    }

    pub fn labels(&self, key: ContainerKey) -> Option<&Arc<ContainerLabels>> {
        self.entries.get(&key).map(Entry::labels)
    }

    /// Containers with changed labels, or evicted, since the last call.
    pub fn take_changed(&mut self) -> Vec<ContainerKey> {
        self.changed.drain().collect()
    }

    /// The last result of every target for a container, in the order of the targets.
    pub fn attempts(&self, key: ContainerKey, now: BootNs) -> Vec<(Source, Arc<str>, QueryAttempt)> {
        let Some(entry) = self.entries.get(&key) else { return Vec::new() };
        let attempt_at = |slot: &Slot, target: &Target| {
            let is_current = target.present || slot.last_attempt.as_ref().is_some_and(|t| t.status == QueryOutcome::Ok);
            slot.pending_attempt(now).or_else(|| slot.last_attempt.clone()).filter(|_| is_current)
        };
        let of_target = |(n, target): (usize, &Target)| {
            let attempt = entry.slots.get(TargetId(n as u16)).and_then(|slot| attempt_at(slot, target));
            let attempt = attempt.unwrap_or_else(|| target.not_queried(entry.labels().complete(), entry.gone.is_some()));
            (target.source, Arc::clone(&target.endpoint), attempt)
        };
        let can_know = |(_, target): &(usize, &Target)| !target.retired && can_resolve(target.source, entry.labels());
        self.targets.iter().enumerate().filter(can_know).map(of_target).collect()
    }

    /// Whether a container still needs queries some time after it appeared. A container that needs none is skipped once.
    pub fn has_unresolved(&mut self, now: BootNs) -> bool {
        while let Some((seen, key)) = self.unresolved.first().copied() {
            if self.entries.get(&key).is_some_and(|entry| entry.needs_queries(now)) {
                return now.saturating_since(seen) >= SEARCHED_FOR_AFTER;
            }
            self.unresolved.remove(&(seen, key));
        }
        false
    }
}

/// Brings forward the scheduled queries of a container, to all present targets or to `only` one, and restarts their back-off.
fn requeue(queue: &mut Queue, targets: &[Target], entry: &mut Entry, now: BootNs, only: Option<TargetId>) {
    let key = entry.record.key;
    let (seen, gone) = (entry.seen, entry.gone.is_some());
    let is_selected = |id: &TargetId| only.is_none_or(|only| only == *id) && entry.needs_query_to(*id, now);
    let selected: Vec<TargetId> = entry.slots.iter().map(|(id, _)| id).filter(is_selected).collect();
    for id in selected {
        let Some(slot) = entry.slots.get_mut(id) else { continue };
        let floor = if slot.is_socket && !gone { seen.plus(entry::SOCKET_DELAY) } else { now };
        queue.remove(&(slot.next, key, id));
        slot.restart(floor.max(now), now);
        if targets.get(usize::from(id.0)).is_some_and(|target| target.present) {
            queue.insert((slot.next, key, id));
        }
    }
}

/// With the queries of other containers, as they are.
fn settles_at(seen: BootNs) -> BootNs {
    entry::together_after(seen.plus(SETTLED_AFTER))
}

/// Subtracts up to a quarter, depending on container and attempt, so that the queries of many containers spread out.
fn jittered(full: u64, key: ContainerKey, attempt: u32) -> u64 {
    let mixed = (key.0 ^ u64::from(attempt) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
    full - full / 4 * mixed / 1024
}
