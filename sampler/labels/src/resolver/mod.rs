//! When to ask whom: sans-IO. It says what it wants asked, is told the answers, and never gives a living container up.
//!
//! ```text
//!  per container:  Identified (path only) -> Partial -> Complete        any -> Gone (asked on for 10 s) -> evicted with its record
//!  per (container, target):
//!      file    0, 10, 30, 100, 300 ms after it was seen, then 0.5 s, growing with its age to 30 s
//!      socket  250 ms after it was seen (asking earlier races its creation), then the same back-off
//!  per socket:     absent -> closed --5 transport errors--> open --a probe every second, later every 30 s--> closed
//! ```
//! A target is a source at an endpoint; there may be several of one source. What the path says of the runtime orders whom to ask, and
//! excludes nobody. "Not found" is an answer, not an error. A question without an answer after a second is taken for an
//! error, does not count against the bound of open questions any more, and may be put again beside itself: a runtime that hangs
//! and recovers is noticed within a second, and one that is slow is still listened to.
//!
//! Deliberately not here: how long a question may take at most, and what an endpoint is; the caller knows.

mod entry;
#[cfg(test)]
mod histories;
mod target;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use self::entry::{Entry, Slot};
pub use self::entry::{QueryAttempt, QueryOutcome, can_know, is_likely};
use self::target::Target;
pub use self::target::{ABSENT, FILES_IN_FLIGHT};
use super::values::{ContainerLabels, Facts, Source};
use sampler_core::identity::ContainerRecord;
use sampler_core::units::{BootNs, ContainerKey};

const MS: u64 = 1_000_000;
const BACK_OFF_LAST: u64 = 30_000 * MS;
/// A container this old is shown with what is known.
const SHOWN_AFTER: u64 = 2_000 * MS;
/// A runtime may know a container for a while after its cgroup.
const ASKED_ON_AFTER_END: u64 = 10_000 * MS;

/// A source at one endpoint, in the order in which they were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetId(pub u16);

/// One question to put.
#[derive(Clone, Debug)]
pub struct Query {
    pub key: ContainerKey,
    pub target: TargetId,
    pub source: Source,
    pub record: Arc<ContainerRecord>,
    /// As far as it is known by now.
    pub pod_uid: Option<String>,
    /// Tells two questions about the same thing apart.
    number: u64,
}

impl Query {
    /// A question outside the ladder.
    pub fn once(record: Arc<ContainerRecord>, target: TargetId, source: Source, pod_uid: Option<String>) -> Self {
        Self { key: record.key, target, source, record, pod_uid, number: 0 }
    }

    /// As runtimes know it; blank where the path told none.
    pub fn container_id(&self) -> &str {
        self.record.identity.container_id.as_deref().unwrap_or_default()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Found(Facts),
    NotFound,
    /// There was nothing to ask, or nobody: it says nothing about the endpoint.
    NotAsked,
    /// Transport error, timeout, or an answer that makes no sense.
    Failed,
}

#[derive(Debug, Default)]
pub struct LabelResolver {
    targets: Vec<Target>,
    entries: HashMap<ContainerKey, Entry>,
    by_id: HashMap<Arc<str>, Vec<ContainerKey>>,
    /// When which question falls due. Entries that no longer hold are skipped when their time comes.
    queue: BTreeSet<(BootNs, ContainerKey, TargetId)>,
    /// When a container is shown with what is known.
    shown: BTreeSet<(BootNs, ContainerKey)>,
    changed: HashSet<ContainerKey>,
    asked: u64,
}

impl LabelResolver {
    /// `present`: whether there is anything at the endpoint. What is absent is not asked.
    pub fn add_target(&mut self, source: Source, endpoint: &str, present: bool, now: BootNs) -> TargetId {
        let id = TargetId(u16::try_from(self.targets.len()).unwrap_or(u16::MAX));
        self.targets.push(Target::new(source, endpoint.into(), present));
        self.add_slots(id, source, now);
        id
    }

    fn add_slots(&mut self, id: TargetId, source: Source, now: BootNs) {
        for (key, entry) in &mut self.entries {
            if let Some(at) = entry.add_slot(id, source, now) {
                self.queue.insert((at, *key, id));
            }
        }
    }

    pub fn targets(&self) -> impl Iterator<Item = (TargetId, Source, &str)> {
        let all = self.targets.iter().enumerate().filter(|(_, t)| !t.retired);
        all.map(|(n, t)| (TargetId(n as u16), t.source, &*t.endpoint))
    }

    /// Whether it is complete by its path alone.
    pub fn appeared(&mut self, record: Arc<ContainerRecord>, now: BootNs) -> bool {
        let key = record.key;
        let mut entry = Entry::new(record, now);
        entry.forged = self.is_forged(&entry);
        self.expose_forgeries(&entry);
        for (n, target) in self.targets.iter().enumerate().filter(|(_, t)| !t.retired) {
            let id = TargetId(n as u16);
            if let Some(at) = entry.add_slot(id, target.source, now) {
                self.queue.insert((at, key, id));
            }
        }
        let complete = entry.labels.complete();
        if complete {
            entry.complete(now);
        } else {
            self.shown.insert((now.plus(SHOWN_AFTER), key));
        }
        self.by_id.entry(Arc::clone(&entry.labels.container_id)).or_default().push(key);
        self.entries.insert(key, entry);
        self.changed.insert(key);
        complete
    }

    /// Who may make cgroups in a container can give one the name of somebody else's: that one must not get his labels. Where a
    /// container of the same id is not inside another, it is the one that runtimes know.
    fn is_forged(&self, entry: &Entry) -> bool {
        let outer = |record: &ContainerRecord| record.identity.outer_container_id.is_some();
        let same = self.by_id.get(&entry.labels.container_id).into_iter().flatten().filter_map(|key| self.entries.get(key));
        // Also of one that is gone: runtimes know it for longer.
        outer(&entry.record) && same.into_iter().any(|other| !outer(&other.record))
    }

    /// The other order: what the nested one has been given is taken back.
    fn expose_forgeries(&mut self, genuine: &Entry) {
        if genuine.record.identity.outer_container_id.is_some() {
            return;
        }
        for key in self.by_id.get(&genuine.labels.container_id).into_iter().flatten() {
            let nested = self.entries.get_mut(key).filter(|other| other.record.identity.outer_container_id.is_some());
            if let Some(other) = nested.filter(|other| !other.forged) {
                let settled = other.labels.settled;
                (other.forged, other.labels) = (true, ContainerLabels::from_path(&other.record));
                other.labels.settled = settled;
                self.changed.insert(*key);
            }
        }
    }

    /// Its cgroup was removed. Whoever may still know it is asked at once, and for a few seconds.
    pub fn gone(&mut self, key: ContainerKey, at: BootNs, now: BootNs) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.gone = Some(at);
            requeue(&mut self.queue, entry, now, |_| true);
        }
    }

    /// Identity has forgotten it.
    pub fn evicted(&mut self, key: ContainerKey) {
        let Some(entry) = self.entries.remove(&key) else { return };
        if let Some(keys) = self.by_id.get_mut(&entry.labels.container_id) {
            keys.retain(|k| *k != key);
            if keys.is_empty() {
                self.by_id.remove(&entry.labels.container_id);
            }
        }
        for target in &mut self.targets {
            target.forget(key);
        }
        for (id, slot) in &entry.slots {
            self.queue.remove(&(slot.next, key, *id));
        }
        self.shown.remove(&(entry.seen.plus(SHOWN_AFTER), key));
        self.changed.insert(key);
    }

    /// A runtime spoke of this container: ask now instead of waiting for the back-off.
    pub fn hint(&mut self, container_id: &str, now: BootNs) {
        for key in self.by_id.get(container_id).into_iter().flatten() {
            if let Some(entry) = self.entries.get_mut(key) {
                requeue(&mut self.queue, entry, now, |_| true);
            }
        }
    }

    /// Something appeared at the endpoint, or took the place of what was there.
    pub fn endpoint_back(&mut self, id: TargetId, now: BootNs) {
        if let Some(target) = self.targets.get_mut(usize::from(id.0)) {
            target.back();
            for entry in self.entries.values_mut() {
                // What was looked for elsewhere may be here.
                if let Some(slot) = entry.slots.get_mut(&id) {
                    slot.looked = false;
                }
                requeue(&mut self.queue, entry, now, |target| target == id);
            }
        }
    }

    pub fn is_present(&self, id: TargetId) -> bool {
        self.targets.get(usize::from(id.0)).is_some_and(|t| t.present)
    }

    /// One that was retired, should it be wanted again.
    pub fn retired(&self, source: Source, endpoint: &str) -> Option<TargetId> {
        let is = |t: &Target| t.retired && t.source == source && *t.endpoint == *endpoint;
        self.targets.iter().position(is).map(|n| TargetId(n as u16))
    }

    pub fn revive(&mut self, id: TargetId, present: bool, now: BootNs) {
        let Some(target) = self.targets.get_mut(usize::from(id.0)).filter(|t| t.retired) else { return };
        target.retired = false;
        target.back();
        target.present = present;
        let source = target.source;
        self.add_slots(id, source, now);
    }

    /// Nobody will be at the endpoint again: it is not spoken of any more.
    pub fn retire(&mut self, id: TargetId) {
        let Some(target) = self.targets.get_mut(usize::from(id.0)) else { return };
        target.retire();
        for (key, entry) in &mut self.entries {
            if let Some(slot) = entry.slots.remove(&id) {
                self.queue.remove(&(slot.next, *key, id));
            }
        }
    }

    /// There is nothing at the endpoint any more.
    pub fn endpoint_absent(&mut self, id: TargetId) {
        if let Some(target) = self.targets.get_mut(usize::from(id.0)) {
            target.present = false;
        }
    }

    /// What to ask now; each is being asked until [`LabelResolver::answered`].
    pub fn due(&mut self, now: BootNs) -> Vec<Query> {
        while let Some((at, key)) = self.shown.first().copied().filter(|(at, _)| *at <= now) {
            self.shown.remove(&(at, key));
            if let Some(entry) = self.entries.get_mut(&key).filter(|e| !e.labels.settled) {
                entry.labels.settled = true;
                self.changed.insert(key);
            }
        }
        while let Some((at, key, id)) = self.queue.first().copied().filter(|(at, ..)| *at <= now) {
            self.queue.remove(&(at, key, id));
            let Some(target) = self.targets.get_mut(usize::from(id.0)) else { continue };
            let Some(entry) = self.entries.get_mut(&key).filter(|e| e.is_asked_for(id, now)) else { continue };
            let Some(slot) = entry.slots.get_mut(&id).filter(|s| s.next == at) else { continue };
            match (slot.busy_until(now), slot.is_socket) {
                (Some(until), true) => {
                    slot.next = until;
                    self.queue.insert((until, key, id));
                }
                // Its answer sets the next time.
                (Some(_), false) => {}
                (None, _) => target.wait(at, key),
            }
        }
        let mut asks = Vec::new();
        for (n, target) in self.targets.iter_mut().enumerate() {
            let id = TargetId(n as u16);
            target.overdue(now);
            while target.has_room(now)
                && let Some(key) = target.next_waiting()
            {
                let Some(entry) = self.entries.get_mut(&key).filter(|e| e.is_asked_for(id, now)) else { continue };
                let Some(slot) = entry.slots.get_mut(&id) else { continue };
                self.asked += 1;
                target.put(self.asked, key, now);
                slot.put(now);
                // Should the answer not come, it is asked again beside this question.
                if target.source.is_socket() {
                    slot.next = now.plus(target::OVERDUE);
                    self.queue.insert((slot.next, key, id));
                }
                let (record, pod_uid) = (Arc::clone(&entry.record), entry.labels.pod_uid.clone());
                asks.push(Query { key, target: id, source: target.source, record, pod_uid, number: self.asked });
            }
        }
        asks
    }

    /// Whether it is complete only now; then [`ContainerLabels::resolved_after_ns`] has been set.
    pub fn answered(&mut self, ask: &Query, outcome: &Outcome, tried: QueryAttempt, now: BootNs) -> bool {
        let Some(target) = self.targets.get_mut(usize::from(ask.target.0)) else { return false };
        let was_open = target.is_open();
        let healthy = target.answered(ask.number, outcome, now);
        let closed = was_open && !target.is_open();
        let (mut completed, mut reopened) = (false, false);
        if let Some(entry) = self.entries.get_mut(&ask.key) {
            // A question may have been under way when it was found to be forged.
            if let (Outcome::Found(facts), false) = (outcome, entry.forged) {
                let before = entry.labels.complete();
                if entry.labels.merge(ask.source, facts) {
                    self.changed.insert(ask.key);
                }
                // A pod may be told of when everything else was known: then there is more to know.
                reopened = before && !entry.labels.complete();
                if !before && entry.labels.complete() {
                    completed = entry.labels.resolved_after_ns.is_none();
                    entry.complete(now);
                    self.shown.remove(&(entry.seen.plus(SHOWN_AFTER), ask.key));
                }
            }
            if let Some(slot) = entry.slots.get_mut(&ask.target) {
                self.queue.remove(&(slot.next, ask.key, ask.target));
                slot.answered(ask.key, *outcome != Outcome::Failed || healthy, tried, now);
                if entry.is_asked_for(ask.target, now) {
                    self.queue.insert((entry.slots[&ask.target].next, ask.key, ask.target));
                }
            }
        }
        if let Some(entry) = self.entries.get_mut(&ask.key).filter(|_| reopened) {
            requeue(&mut self.queue, entry, now, |_| true);
        }
        if closed {
            // It answers again: whoever waited for it is asked about now.
            for entry in self.entries.values_mut() {
                requeue(&mut self.queue, entry, now, |target| target == ask.target);
            }
        }
        completed
    }

    /// When [`LabelResolver::due`] may have something new; answers may bring it forward.
    pub fn next_due(&self, now: BootNs) -> Option<BootNs> {
        let of_targets = self.targets.iter().filter_map(|t| t.next_room(now));
        let queue = self.queue.first().map(|(at, ..)| *at);
        let shown = self.shown.first().map(|(at, _)| *at);
        of_targets.chain(queue).chain(shown).min()
    }

    pub fn labels(&self, key: ContainerKey) -> Option<&ContainerLabels> {
        self.entries.get(&key).map(|e| &e.labels)
    }

    /// Those whose labels changed, or that were evicted, since the last call.
    pub fn take_changed(&mut self) -> Vec<ContainerKey> {
        self.changed.drain().collect()
    }

    /// What came of every target, in the order of the targets.
    pub fn tried(&self, key: ContainerKey, now: BootNs) -> Vec<(Source, Arc<str>, QueryAttempt)> {
        let Some(entry) = self.entries.get(&key) else { return Vec::new() };
        let one = |(id, slot): (&TargetId, &Slot)| {
            let target = self.targets.get(usize::from(id.0))?;
            let settled = target.present || slot.tried.as_ref().is_some_and(|t| t.told == QueryOutcome::Ok);
            let tried = slot.unanswered(now).or_else(|| slot.tried.clone()).filter(|_| settled);
            Some((
                target.source,
                Arc::clone(&target.endpoint),
                tried.unwrap_or_else(|| target.not_tried(entry.labels.complete())),
            ))
        };
        entry.slots.iter().filter_map(one).collect()
    }

    /// Whether anybody is still asked about.
    pub fn is_asking(&self, now: BootNs) -> bool {
        self.entries.values().any(|e| e.is_asked_about(now))
    }
}

/// Brings forward what is scheduled for later, and begins the back-off anew.
fn requeue(
    queue: &mut BTreeSet<(BootNs, ContainerKey, TargetId)>,
    entry: &mut Entry,
    now: BootNs,
    which: impl Fn(TargetId) -> bool,
) {
    if !entry.is_asked_about(now) {
        return;
    }
    let key = entry.record.key;
    let (seen, gone) = (entry.seen, entry.gone.is_some());
    for (id, slot) in entry.slots.iter_mut().filter(|(id, slot)| (slot.is_socket || !gone || !slot.looked) && which(**id)) {
        let floor = if slot.is_socket && !gone { seen.plus(entry::SOCKET_AFTER) } else { now };
        queue.remove(&(slot.next, key, *id));
        slot.again(floor.max(now), now);
        queue.insert((slot.next, key, *id));
    }
}

/// Less up to a quarter that depends on container and attempt: many containers must not ask as one.
fn jittered(full: u64, key: ContainerKey, attempt: u32) -> u64 {
    let mixed = (key.0 ^ u64::from(attempt) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
    full - full / 4 * mixed / 1024
}
