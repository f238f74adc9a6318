//! Containers, derived from their root cgroups: one entry for each container over all hierarchies.
//!
//! The same id in two hierarchies is one container. Twice in one hierarchy it is two containers, unless the first is gone: a container can
//! name one of its own cgroups after another container, and must not be mistaken for it.

use std::collections::VecDeque;
use std::sync::Arc;

use foldhash::{HashMap, HashSet};

use super::cgroups::KEEP_REMOVED_NS;
use crate::cgroup_path::CgroupIdentity;
use crate::units::{BootNs, CgroupKey, ContainerKey};

/// A container as derived from its cgroups; or a pod's own cgroup, a job, a unit or a login session, as its `identity.kind` says.
/// Immutable; labels are stored elsewhere.
#[derive(Clone, Debug)]
pub struct ContainerRecord {
    pub key: ContainerKey,
    /// The `id` label: the cgroup path of its root. Never empty.
    pub cgroup_path: String,
    pub identity: CgroupIdentity,
    /// When its cgroup was created, or first seen by the startup scan.
    pub created: BootNs,
    /// False when the container is older than the agent, so that `created` is only the time of the first sighting.
    pub creation_seen: bool,
}

/// Containers with GPU time are kept for this long after their cgroups are gone, because their series are; others as long as the cgroups.
pub const KEEP_GONE_NS: u64 = 330_000_000_000;
/// Maximum number of containers that are gone. Beyond it they are dropped and counted, oldest first, those without GPU time before others.
const MAX_GONE: usize = 16_384;

#[derive(Clone, Debug)]
pub struct Container {
    pub record: Arc<ContainerRecord>,
    roots: HashSet<CgroupKey>,
    name: Name,
    pub gone: Option<BootNs>,
}

/// A change of the set of containers, for the label pipeline.
#[derive(Clone, Debug)]
pub enum ContainerChange {
    Appeared(Arc<ContainerRecord>),
    Gone(ContainerKey, BootNs),
    /// Dropped: it will not be looked up any more.
    Evicted(ContainerKey),
}

/// Id of the outer container, if there is one; id of the container; and its name, because the apps of a rkt pod share an id.
type Name = (Option<String>, String, Option<String>);

#[derive(Debug, Default)]
pub(super) struct Containers {
    all: HashMap<ContainerKey, Container>,
    /// The living container of that name that was found first.
    /// With the hash that resists chosen keys: tenants choose names.
    by_name: std::collections::HashMap<Name, ContainerKey>,
    /// In the order of their end.
    gone: VecDeque<ContainerKey>,
    next_key: u64,
    changes: Vec<ContainerChange>,
}

impl Containers {
    /// The container with this root cgroup.
    pub fn add_root(
        &mut self,
        root: CgroupKey,
        path: &str,
        identity: CgroupIdentity,
        created: BootNs,
        creation_seen: bool,
    ) -> ContainerKey {
        // What is not a container is found by its path: that of a unit is the same in all hierarchies.
        let id = identity.container_id.clone().unwrap_or_else(|| path.to_owned());
        let name = (identity.outer_container_id.clone(), id, identity.name.clone());
        let known = self.by_name.get(&name).copied();
        if let Some(key) = known
            && let Some(container) = self.all.get_mut(&key)
            && container.roots.iter().all(|other| *other == root || other.hierarchy != root.hierarchy)
        {
            container.roots.insert(root);
            return key;
        }
        self.next_key += 1;
        let key = ContainerKey(self.next_key);
        let record = Arc::new(ContainerRecord { key, cgroup_path: path.to_owned(), identity, created, creation_seen });
        if known.is_none() {
            self.by_name.insert(name.clone(), key);
        }
        let container = Container { record: Arc::clone(&record), roots: HashSet::from_iter([root]), name, gone: None };
        self.all.insert(key, container);
        self.changes.push(ContainerChange::Appeared(record));
        key
    }

    /// Removes a root. A container without roots is gone.
    pub fn remove_root(&mut self, key: ContainerKey, root: CgroupKey, at: BootNs) {
        if let Some(container) = self.all.get_mut(&key)
            && container.roots.remove(&root)
            && container.roots.is_empty()
            && container.gone.is_none()
        {
            container.gone = Some(at);
            self.gone.push_back(key);
            self.changes.push(ContainerChange::Gone(key, at));
            // Its id may reappear (a restarted docker container): that is a new container with a new key.
            if self.by_name.get(&container.name) == Some(&key) {
                self.by_name.remove(&container.name);
            }
        }
    }

    pub fn all(&self) -> impl Iterator<Item = &Container> {
        self.all.values()
    }

    pub fn get(&self, key: ContainerKey) -> Option<&Container> {
        self.all.get(&key)
    }

    pub fn take_changes(&mut self) -> Vec<ContainerChange> {
        std::mem::take(&mut self.changes)
    }

    /// Returns the number of containers dropped before their time.
    pub fn expire(&mut self, now: BootNs, used: impl Fn(ContainerKey) -> bool) -> u64 {
        let over = self.gone.len().saturating_sub(MAX_GONE);
        let unused = if over == 0 { 0 } else { self.gone.iter().filter(|key| !used(**key)).count().min(over) };
        let (mut unused_over, mut used_over, mut evicted) = (unused, over - unused, 0);
        let (all, changes) = (&mut self.all, &mut self.changes);
        self.gone.retain(|key| {
            let Some(gone) = all.get(key).and_then(|c| c.gone) else { return false };
            let age = now.saturating_since(gone);
            if over == 0 && age < KEEP_REMOVED_NS {
                return true;
            }
            let used = used(*key);
            let room = if used { &mut used_over } else { &mut unused_over };
            let expired = age >= if used { KEEP_GONE_NS } else { KEEP_REMOVED_NS };
            if !expired && *room == 0 {
                return true;
            }
            *room = room.saturating_sub(1);
            evicted += u64::from(!expired);
            all.remove(key);
            changes.push(ContainerChange::Evicted(*key));
            false
        });
        evicted
    }
}
