//! The tree of cgroups per hierarchy, and which container each belongs to.
//!
//! Promise: one identity per container, over all hierarchies and sub-cgroups; a removed cgroup still resolves for
//! [`KEEP_REMOVED_NS`], a renamed one as of the time asked about. Paths are joined here from parent and name, so they are never cut.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::ContainerRecord;
use crate::labels::{Kind, parse};
use crate::observation::{CgroupChange, CgroupFact, Place};
use crate::units::{BootNs, CgroupKey, ContainerKey};

/// Removed cgroups stay resolvable this long: no sample is older.
pub const KEEP_REMOVED_NS: u64 = 60_000_000_000;
/// Containers outlive their cgroups this long, because their series do.
pub const KEEP_GONE_NS: u64 = 330_000_000_000;
/// More removed cgroups than this are given up, oldest first, and counted: a minute of 500 containers a second.
const MAX_REMOVED: usize = 65_536;
/// Deeper trees than this are cut off while joining a path; a path that a process can name is far shorter.
const MAX_DEPTH: usize = 4096;

#[derive(Clone, Debug)]
struct Node {
    parent: Option<CgroupKey>,
    name: Box<str>,
    created: BootNs,
    creation_seen: bool,
    removed: Option<Removed>,
    container: Option<ContainerKey>,
    /// What it was before it, or an ancestor, was renamed, oldest first.
    #[expect(clippy::box_collection, reason = "a rename is rare, and every cgroup pays for this field")]
    was: Option<Box<Vec<Was>>>,
    generation: u32,
}

/// `(until, container)`.
type Was = (BootNs, Option<ContainerKey>);

#[derive(Clone, Copy, Debug)]
struct Removed {
    /// By an event, not because a scan did not find it.
    observed: bool,
}

#[derive(Clone, Debug)]
pub struct Container {
    pub record: Arc<ContainerRecord>,
    roots: HashSet<CgroupKey>,
    identity: Box<str>,
    pub gone: Option<BootNs>,
}

/// What changed for the label pipeline.
#[derive(Clone, Debug)]
pub enum ContainerChange {
    Appeared(Arc<ContainerRecord>),
    Gone(ContainerKey, BootNs),
}

#[derive(Debug, Default)]
pub struct Cgroups {
    nodes: HashMap<CgroupKey, Node>,
    containers: HashMap<ContainerKey, Container>,
    by_identity: HashMap<Box<str>, ContainerKey>,
    removed: VecDeque<(BootNs, CgroupKey)>,
    /// Known before their parent was: looked at again when it comes.
    orphans: HashMap<CgroupKey, Vec<CgroupKey>>,
    next_key: u64,
    changes: Vec<ContainerChange>,
    generation: u32,
    /// Removed cgroups given up before their time.
    pub evicted: u64,
}

impl Cgroups {
    /// True when a scan's word contradicts the table, so an event must have been lost.
    pub fn apply(&mut self, fact: &CgroupFact) -> bool {
        match fact.change {
            CgroupChange::Removed => {
                // Not known yet: remembered as gone, so that a scan that still saw it does not bring it back.
                self.insert(fact);
                self.remove(fact.key, fact.at, true);
            }
            CgroupChange::Renamed => self.rename(fact),
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
            // The scan saw the directory just before it went.
            Some(Removed { observed: true }) => false,
            Some(Removed { observed: false }) => {
                self.nodes.remove(&fact.key);
                self.removed.retain(|(_, key)| *key != fact.key);
                self.insert(fact);
                true
            }
            None => {
                node.generation = generation;
                let renamed = *node.name != *fact.name;
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
            created: fact.at,
            creation_seen: fact.change == CgroupChange::Created,
            removed: None,
            container: None,
            was: None,
            generation: self.generation,
        };
        self.nodes.insert(fact.key, node);
        self.identify(fact.key);
    }

    /// Finds the container of a cgroup whose ancestors are all known, and of those that waited for it.
    fn identify(&mut self, key: CgroupKey) {
        if let Some(missing) = self.missing_ancestor(key) {
            self.orphans.entry(missing).or_default().push(key);
            return;
        }
        self.place(key);
        for child in self.orphans.remove(&key).unwrap_or_default() {
            self.identify(child);
        }
    }

    fn place(&mut self, key: CgroupKey) {
        let Some(path) = self.path(key) else { return };
        let identity = parse(&path);
        let mut container = None;
        if matches!(identity.kind, Kind::Container | Kind::Sandbox) && identity.container_id.is_some() {
            let whole = path.len() == identity.root_len;
            let root = path.get(..identity.root_len).unwrap_or(&path).to_owned();
            let name: Box<str> = identity.container_id.as_deref().unwrap_or(&root).into();
            let found = match self.by_identity.get(&name) {
                Some(known) => *known,
                None => self.add_container(key, name, root, identity),
            };
            container = Some(found);
            if whole && let Some(c) = self.containers.get_mut(&found) {
                c.roots.insert(key);
            }
        }
        if let Some(node) = self.nodes.get_mut(&key) {
            node.container = container;
        }
    }

    fn add_container(
        &mut self,
        of: CgroupKey,
        name: Box<str>,
        root: String,
        identity: crate::labels::CgroupIdentity,
    ) -> ContainerKey {
        self.next_key += 1;
        let key = ContainerKey(self.next_key);
        let (created, creation_seen) = self.nodes.get(&of).map_or((BootNs(0), false), |n| (n.created, n.creation_seen));
        let record = Arc::new(ContainerRecord { key, cgroup_path: root, identity, created, creation_seen });
        self.by_identity.insert(name.clone(), key);
        let container = Container { record: Arc::clone(&record), roots: HashSet::new(), identity: name, gone: None };
        self.containers.insert(key, container);
        self.changes.push(ContainerChange::Appeared(record));
        key
    }

    fn remove(&mut self, key: CgroupKey, at: BootNs, observed: bool) {
        let Some(node) = self.nodes.get_mut(&key) else { return };
        if node.removed.is_some() {
            return;
        }
        node.removed = Some(Removed { observed });
        self.removed.push_back((at, key));
        if let Some(container) = node.container {
            self.leave(container, key, at);
        }
    }

    /// A container whose last root is gone is gone.
    fn leave(&mut self, container: ContainerKey, root: CgroupKey, at: BootNs) {
        if let Some(c) = self.containers.get_mut(&container)
            && c.roots.remove(&root)
            && c.roots.is_empty()
            && c.gone.is_none()
        {
            c.gone = Some(at);
            self.changes.push(ContainerChange::Gone(container, at));
            // Its id may come back (a restarted docker container): that is a new container with a new key.
            if self.by_identity.get(&c.identity) == Some(&container) {
                self.by_identity.remove(&c.identity);
            }
        }
    }

    /// Only v1 can do it. Everything below changes its path too.
    fn rename(&mut self, fact: &CgroupFact) {
        let Some(node) = self.nodes.get_mut(&fact.key) else { return };
        node.name = fact.name.as_str().into();
        let below: Vec<CgroupKey> = self.nodes.keys().copied().filter(|key| self.is_below(*key, fact.key)).collect();
        for key in below {
            let before = self.nodes.get(&key).and_then(|n| n.container);
            self.place(key);
            let Some(node) = self.nodes.get_mut(&key) else { continue };
            if node.container != before {
                node.was.get_or_insert_default().push((fact.at, before));
                if let Some(container) = before {
                    self.leave(container, key, fact.at);
                }
            }
        }
    }

    fn is_below(&self, key: CgroupKey, ancestor: CgroupKey) -> bool {
        let parent = |key: &CgroupKey| self.nodes.get(key).and_then(|n| n.parent);
        std::iter::successors(Some(key), parent).take(MAX_DEPTH).any(|k| k == ancestor)
    }

    fn missing_ancestor(&self, key: CgroupKey) -> Option<CgroupKey> {
        let mut at = key;
        for _ in 0..MAX_DEPTH {
            match self.nodes.get(&at) {
                None => return Some(at),
                Some(Node { parent: None, .. }) => return None,
                Some(Node { parent: Some(parent), .. }) => at = *parent,
            }
        }
        None
    }

    /// The whole path within its hierarchy; `None` while an ancestor is unknown.
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

    /// The container of a process's place at a time: v2 first, then the followed v1 hierarchy (on a hybrid host v2 may say nothing).
    pub fn container_of(&self, place: &Place, at: BootNs) -> Result<Option<ContainerKey>, UnknownCgroup> {
        let mut known = false;
        for key in place.keys() {
            if let Some(node) = self.nodes.get(&key) {
                known = true;
                let was = node.was.iter().flat_map(|was| was.iter()).find(|(until, _)| at < *until);
                let container = was.map_or(node.container, |(_, container)| *container);
                if container.is_some() {
                    return Ok(container);
                }
            }
        }
        if known { Ok(None) } else { Err(UnknownCgroup) }
    }

    /// The container that a cgroup belongs to now.
    pub fn container_at(&self, key: CgroupKey) -> Option<ContainerKey> {
        self.nodes.get(&key)?.container
    }

    /// The path that says most about a place: the container's, else v2's, else v1's.
    pub fn path_of(&self, place: &Place) -> Option<String> {
        let in_container = |key: &CgroupKey| self.nodes.get(key).is_some_and(|n| n.container.is_some());
        let telling = |path: &String| path != "/";
        let paths = || place.keys().filter_map(|key| self.path(key));
        place
            .keys()
            .find(in_container)
            .and_then(|key| self.path(key))
            .or_else(|| paths().find(telling))
            .or_else(|| paths().next())
    }

    pub fn containers(&self) -> impl Iterator<Item = &Container> {
        self.containers.values()
    }

    pub fn container(&self, key: ContainerKey) -> Option<&Container> {
        self.containers.get(&key)
    }

    /// Keys and names of the cgroups that are there.
    pub fn living(&self) -> impl Iterator<Item = (CgroupKey, &str)> {
        self.nodes.iter().filter(|(_, n)| n.removed.is_none()).map(|(key, n)| (*key, &*n.name))
    }

    /// (nodes, bytes held by them).
    pub fn size(&self) -> (usize, usize) {
        let names: usize = self.nodes.values().map(|n| n.name.len() + 16).sum();
        let buckets = super::exited::buckets(self.nodes.capacity());
        (self.nodes.len(), names + buckets * (size_of::<(CgroupKey, Node)>() + 1))
    }

    pub fn take_changes(&mut self) -> Vec<ContainerChange> {
        std::mem::take(&mut self.changes)
    }

    pub fn begin_scan(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Removes what the scan that began at `began` did not find, unless it was made since. Returns how many.
    pub fn sweep(&mut self, began: BootNs) -> u64 {
        let stale = |n: &Node| n.removed.is_none() && n.generation != self.generation && n.created < began;
        let gone: Vec<CgroupKey> = self.nodes.iter().filter(|(_, n)| stale(n)).map(|(key, _)| *key).collect();
        for key in &gone {
            self.remove(*key, began, false);
        }
        let nodes = &self.nodes;
        self.orphans.retain(|_, waiting| {
            waiting.retain(|key| nodes.contains_key(key));
            !waiting.is_empty()
        });
        gone.len() as u64
    }

    pub fn expire(&mut self, now: BootNs) {
        while let Some(&(at, key)) = self.removed.front() {
            let over = self.removed.len() > MAX_REMOVED;
            if !over && now.saturating_since(at) < KEEP_REMOVED_NS {
                break;
            }
            self.evicted += u64::from(over);
            self.removed.pop_front();
            self.nodes.remove(&key);
            self.orphans.remove(&key);
        }
        self.containers.retain(|_, c| c.gone.is_none_or(|gone| now.saturating_since(gone) < KEEP_GONE_NS));
    }
}

/// A process's cgroup that no event and no scan has named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownCgroup;
