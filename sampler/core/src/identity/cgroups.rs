//! The tree of cgroups of each hierarchy, and the container of each cgroup.
//!
//! ```text
//!            parent known up to the root             removed, or not found by a scan          60 s, or too many
//!  unplaced ----------------------------> placed ----------------------------------> removed ------------------> forgotten
//! ```
//! Guarantees: one identity for each container, over all hierarchies and sub-cgroups; a removed cgroup still resolves for
//! [`KEEP_REMOVED_NS`]; a renamed cgroup resolves as of the requested time; a cgroup that is not placed is unknown and does not count as
//! the host. Paths are joined here from parents and names, so they are never truncated.

use std::cmp::Reverse;
use std::collections::{BTreeSet, VecDeque};

use foldhash::HashMap;

use super::containers::{Container, ContainerChange, Containers};
use crate::cgroup_path::{CgroupIdentity, Kind, parse};
use crate::observation::{CgroupChange, CgroupFact, CgroupMembership};
use crate::units::{BootNs, CgroupKey, ContainerKey};

/// Removed cgroups can be resolved for this long: no sample is older.
pub const KEEP_REMOVED_NS: u64 = 60_000_000_000;
/// Maximum number of removed cgroups (a minute of 500 containers a second). Beyond it the oldest are dropped and counted.
const MAX_REMOVED: usize = 65_536;
/// Cgroups deeper than this are not placed; a path that a process can use is far shorter.
const MAX_DEPTH: usize = 4096;
/// Maximum number of former containers kept for a cgroup that is renamed repeatedly.
const MAX_FORMER: usize = 16;

#[derive(Clone, Debug)]
struct Node {
    parent: Option<CgroupKey>,
    name: Box<str>,
    /// When it had this name.
    named: BootNs,
    created: BootNs,
    creation_seen: bool,
    removed: Option<Removed>,
    /// Every ancestor is placed, so `container` is valid.
    placed: bool,
    container: Option<ContainerKey>,
    /// Its containers before it, or an ancestor, was renamed, oldest first.
    #[expect(clippy::box_collection, reason = "a rename is rare, and every cgroup pays for this field")]
    former: Option<Box<Vec<FormerContainer>>>,
    generation: u32,
}

/// Of what the hierarchies of one process may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Precedence {
    /// Or a login session.
    Unit,
    Pod,
    /// Or a job.
    Container,
}

/// `(until, container)`.
type FormerContainer = (BootNs, Option<ContainerKey>);

#[derive(Clone, Copy, Debug)]
struct Removed {
    at: BootNs,
    /// An event reported the removal; otherwise a scan did not find the cgroup.
    observed: bool,
}

#[derive(Debug, Default)]
pub struct Cgroups {
    nodes: HashMap<CgroupKey, Node>,
    /// (parent, child).
    children: BTreeSet<(CgroupKey, CgroupKey)>,
    containers: Containers,
    removed: VecDeque<(BootNs, CgroupKey)>,
    /// Cgroups that wait for their parent to be placed, by parent.
    orphans: HashMap<CgroupKey, Vec<CgroupKey>>,
    generation: u32,
    /// Removed cgroups and gone containers that were dropped before their time.
    pub evicted: u64,
}

impl Cgroups {
    /// Returns true when the finding of a scan contradicts the table, so an event must have been lost.
    pub fn apply(&mut self, fact: &CgroupFact) -> bool {
        match fact.change {
            CgroupChange::Removed => {
                // Unknown cgroups are inserted as removed, so that a scan that still found them does not add them again.
                self.insert(fact);
                self.remove(fact.key, fact.at, true);
            }
            CgroupChange::Renamed => {
                self.insert(fact);
                self.rename(fact);
            }
            CgroupChange::Created => self.insert(fact),
            CgroupChange::Seen => return self.seen(fact),
        }
        false
    }

    fn seen(&mut self, fact: &CgroupFact) -> bool {
        let generation = self.generation;
        let Some(node) = self.nodes.get_mut(&fact.key) else {
            self.insert(fact);
            return true;
        };
        match node.removed {
            // The scan found the directory just before it was removed.
            Some(Removed { observed: true, .. }) => false,
            Some(Removed { observed: false, .. }) => {
                self.forget(fact.key);
                self.removed.retain(|(_, key)| *key != fact.key);
                self.insert(fact);
                true
            }
            None => {
                node.generation = generation;
                // An event that is newer than the scan takes precedence.
                let renamed = *node.name != *fact.name && node.named < fact.at;
                if renamed {
                    self.rename(fact);
                }
                renamed
            }
        }
    }

    fn insert(&mut self, fact: &CgroupFact) {
        if self.nodes.contains_key(&fact.key) {
            return;
        }
        let node = Node {
            parent: fact.parent,
            name: fact.name.as_str().into(),
            named: fact.at,
            created: fact.at,
            creation_seen: fact.change == CgroupChange::Created,
            removed: None,
            placed: false,
            container: None,
            former: None,
            generation: self.generation,
        };
        self.nodes.insert(fact.key, node);
        if let Some(parent) = fact.parent {
            self.children.insert((parent, fact.key));
        }
        self.identify(fact.key);
    }

    /// Places a cgroup if its parent is placed, and then those that waited for it.
    fn identify(&mut self, key: CgroupKey) {
        let mut due = vec![key];
        while let Some(key) = due.pop() {
            let parent = self.nodes.get(&key).and_then(|node| node.parent);
            match parent.filter(|parent| !self.nodes.get(parent).is_some_and(|node| node.placed)) {
                Some(parent) => self.orphans.entry(parent).or_default().push(key),
                None => {
                    self.place(key);
                    due.extend(self.orphans.remove(&key).unwrap_or_default());
                }
            }
        }
    }

    fn place(&mut self, key: CgroupKey) {
        let Some(path) = self.path(key) else { return };
        let identity = parse(&path);
        let container = match identity.kind {
            // A monitor, a build step or a pod's own cgroup inside a container belongs to that container. Its processes may name a cgroup
            // after the pod of another tenant.
            Kind::Monitor | Kind::Build | Kind::Pod | Kind::NotContainer if identity.outer_container_id.is_some() => {
                self.parent_container(key)
            }
            Kind::Monitor | Kind::Build | Kind::NotContainer => None,
            Kind::Container | Kind::Sandbox | Kind::Pod | Kind::Job | Kind::Unit | Kind::Login => {
                self.container_for(key, &path, identity)
            }
        };
        let Some(node) = self.nodes.get_mut(&key) else { return };
        (node.container, node.placed) = (container, true);
        // Removed before it could be placed: its container must not wait for a removal that was already reported.
        if let (Some(container), Some(removed)) = (container, node.removed) {
            self.containers.remove_root(container, key, removed.at);
        }
    }

    /// A cgroup below a container's root belongs to the root's container, even if another hierarchy has a container with the same id.
    fn container_for(&mut self, key: CgroupKey, path: &str, identity: CgroupIdentity) -> Option<ContainerKey> {
        if path.len() == identity.root_len {
            let node = self.nodes.get(&key)?;
            return Some(self.containers.add_root(key, path, identity, node.created, node.creation_seen));
        }
        let up = path.get(identity.root_len..)?.split('/').filter(|name| !name.is_empty()).count();
        let root = std::iter::successors(Some(key), |key| self.nodes.get(key)?.parent).nth(up)?;
        self.nodes.get(&root)?.container
    }

    fn parent_container(&self, key: CgroupKey) -> Option<ContainerKey> {
        self.nodes.get(&self.nodes.get(&key)?.parent?)?.container
    }

    fn remove(&mut self, key: CgroupKey, at: BootNs, observed: bool) {
        let Some(node) = self.nodes.get_mut(&key) else { return };
        if node.removed.is_some() {
            return;
        }
        node.removed = Some(Removed { at, observed });
        self.removed.push_back((at, key));
        if let Some(container) = node.container {
            self.containers.remove_root(container, key, at);
        }
    }

    /// Only v1 supports renames. The paths of all descendants change too.
    fn rename(&mut self, fact: &CgroupFact) {
        let Some(node) = self.nodes.get_mut(&fact.key) else { return };
        (node.name, node.named) = (fact.name.as_str().into(), fact.at);
        let mut due = VecDeque::from([fact.key]);
        while let Some(key) = due.pop_front() {
            due.extend(self.children_of(key));
            let Some(before) = self.nodes.get(&key).filter(|n| n.placed).map(|n| n.container) else { continue };
            self.place(key);
            let Some(node) = self.nodes.get_mut(&key) else { continue };
            if node.container == before {
                continue;
            }
            let former = node.former.get_or_insert_default();
            former.retain(|(until, _)| fact.at.saturating_since(*until) < KEEP_REMOVED_NS);
            if former.len() >= MAX_FORMER {
                former.remove(0);
            }
            former.push((fact.at, before));
            if let Some(container) = before {
                self.containers.remove_root(container, key, fact.at);
            }
        }
    }

    fn children_of(&self, parent: CgroupKey) -> impl Iterator<Item = CgroupKey> + '_ {
        let (first, last) = (CgroupKey { hierarchy: 0, id: 0 }, CgroupKey { hierarchy: u32::MAX, id: u64::MAX });
        self.children.range((parent, first)..=(parent, last)).map(|(_, child)| *child)
    }

    /// The full path within its hierarchy; `None` while an ancestor is unknown.
    pub fn path(&self, key: CgroupKey) -> Option<String> {
        let mut names = Vec::new();
        let mut at = key;
        for _ in 0..MAX_DEPTH {
            let node = self.nodes.get(&at)?;
            match node.parent {
                None => {
                    names.reverse();
                    return Some(format!("/{}", names.join("/")));
                }
                Some(parent) => {
                    names.push(&*node.name);
                    at = parent;
                }
            }
        }
        None
    }

    /// The cgroup that currently has this path, v2 first.
    pub fn at_path(&self, path: &str) -> Option<CgroupKey> {
        let mut roots: Vec<CgroupKey> = self.nodes.iter().filter(|(_, n)| n.parent.is_none()).map(|(key, _)| *key).collect();
        roots.sort_unstable();
        let has_name = |key: &CgroupKey, name: &str| self.nodes.get(key).is_some_and(|n| n.removed.is_none() && *n.name == *name);
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        let child = |at, name: &str| self.children_of(at).find(|child| has_name(child, name));
        let descend = |root: CgroupKey| names.iter().try_fold(root, |at, name| child(at, name));
        roots.into_iter().find_map(descend)
    }

    /// The container, pod, job, unit or login session of a membership at a time: by v2, then by the followed v1 hierarchy (on a hybrid host
    /// processes may be in v2's root, or in the unit of the engine that started them). `None`, which means the host, only if no hierarchy
    /// has one and none is unknown.
    pub fn container_of(&self, membership: &CgroupMembership, at: BootNs) -> Result<Option<ContainerKey>, UnknownCgroup> {
        let mut result = Err(UnknownCgroup);
        let mut unknown = false;
        let mut best: Option<(Precedence, ContainerKey)> = None;
        for key in membership.keys() {
            let Some(node) = self.nodes.get(&key).filter(|node| node.placed) else {
                unknown = true;
                continue;
            };
            let former = node.former.iter().flat_map(|all| all.iter()).find(|(until, _)| at < *until);
            if let Some(container) = former.map_or(node.container, |(_, container)| *container) {
                let precedence = self.precedence(container);
                if precedence == Precedence::Container {
                    return Ok(Some(container));
                }
                if best.is_none_or(|(known, _)| known < precedence) {
                    best = Some((precedence, container));
                }
            }
            result = Ok(best.map(|(_, container)| container));
        }
        if unknown { Err(UnknownCgroup) } else { result }
    }

    fn precedence(&self, key: ContainerKey) -> Precedence {
        match self.containers.get(key).map(|container| container.record.identity.kind) {
            Some(Kind::Unit | Kind::Login) | None => Precedence::Unit,
            Some(Kind::Pod) => Precedence::Pod,
            Some(_) => Precedence::Container,
        }
    }

    /// Whether it is a container, a pod or a job. Units and login sessions have most other processes of a machine.
    pub fn is_workload(&self, key: ContainerKey) -> bool {
        self.precedence(key) > Precedence::Unit
    }

    /// The current container of a cgroup.
    pub fn container_at(&self, key: CgroupKey) -> Option<ContainerKey> {
        self.nodes.get(&key)?.container
    }

    /// The most informative path of a membership: the one in a container, job or unit, else the first of v2 and v1 that is not the root, else any.
    pub fn path_of(&self, membership: &CgroupMembership) -> Option<String> {
        let container = |key: &CgroupKey| self.nodes.get(key).and_then(|node| Some(self.precedence(node.container?)));
        let innermost = membership.keys().filter(|key| container(key).is_some()).min_by_key(|key| Reverse(container(key)));
        let is_below_root = |path: &String| path != "/";
        let paths = || membership.keys().filter_map(|key| self.path(key));
        innermost.and_then(|key| self.path(key)).or_else(|| paths().find(is_below_root)).or_else(|| paths().next())
    }

    pub fn containers(&self) -> impl Iterator<Item = &Container> {
        self.containers.all()
    }

    pub fn container(&self, key: ContainerKey) -> Option<&Container> {
        self.containers.get(key)
    }

    /// Keys and names of the existing cgroups.
    #[cfg(test)]
    pub fn living(&self) -> impl Iterator<Item = (CgroupKey, &str)> {
        self.nodes.iter().filter(|(_, n)| n.removed.is_none()).map(|(key, n)| (*key, &*n.name))
    }

    /// Number of nodes, and their size in bytes.
    pub fn size(&self) -> (usize, usize) {
        let names: usize = self.nodes.values().map(|n| n.name.len() + 16).sum();
        let buckets = super::exited::buckets(self.nodes.capacity());
        let children = self.children.len() * size_of::<(CgroupKey, CgroupKey)>() * 3 / 2;
        (self.nodes.len(), names + children + buckets * (size_of::<(CgroupKey, Node)>() + 1))
    }

    pub fn take_changes(&mut self) -> Vec<ContainerChange> {
        self.containers.take_changes()
    }

    pub fn begin_scan(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Removes cgroups that the scan that began at `began` did not find, unless they were created later. Returns their number.
    pub fn sweep(&mut self, began: BootNs) -> u64 {
        let stale = |n: &Node| n.removed.is_none() && n.generation != self.generation && n.created < began;
        let gone: Vec<CgroupKey> = self.nodes.iter().filter(|(_, n)| stale(n)).map(|(key, _)| *key).collect();
        for key in &gone {
            self.remove(*key, began, false);
        }
        gone.len() as u64
    }

    fn forget(&mut self, key: CgroupKey) {
        if let Some(parent) = self.nodes.remove(&key).and_then(|node| node.parent) {
            self.children.remove(&(parent, key));
        }
    }

    /// `used`: whether a container has GPU time; its series outlive it.
    pub fn expire(&mut self, now: BootNs, used: impl Fn(ContainerKey) -> bool) {
        let mut forgotten = false;
        while let Some(&(at, key)) = self.removed.front() {
            let over = self.removed.len() > MAX_REMOVED;
            if !over && now.saturating_since(at) < KEEP_REMOVED_NS {
                break;
            }
            self.evicted += u64::from(over);
            self.removed.pop_front();
            self.forget(key);
            forgotten = true;
        }
        if forgotten && !self.orphans.is_empty() {
            let nodes = &self.nodes;
            self.orphans.retain(|_, waiting| {
                waiting.retain(|key| nodes.contains_key(key));
                !waiting.is_empty()
            });
        }
        self.evicted += self.containers.expire(now, used);
    }
}

/// The cgroup of a process, or one of its ancestors, was not reported by any event or scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownCgroup;
