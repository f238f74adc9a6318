//! The tree of cgroups per hierarchy, and which container each belongs to.
//!
//! Promise: one identity per container, over all hierarchies and sub-cgroups; a removed cgroup still resolves for
//! [`KEEP_REMOVED_NS`]. Paths are joined here from parent and name, so they are never cut.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::ContainerRecord;
use super::processes::Place;
use crate::labels::{Kind, parse};
use crate::observation::{CgroupChange, CgroupFact};
use crate::units::{BootNs, CgroupKey, ContainerKey};

/// Removed cgroups and containers stay resolvable this long: samples arrive late, and series outlive their container.
pub const KEEP_REMOVED_NS: u64 = 330_000_000_000;
/// Deeper trees than this are cut off while joining a path; the kernel's own default limit is far below.
const MAX_DEPTH: usize = 4096;

#[derive(Clone, Debug)]
struct Node {
    parent: Option<CgroupKey>,
    name: String,
    removed: Option<BootNs>,
    container: Option<ContainerKey>,
}

#[derive(Clone, Debug)]
pub struct Container {
    pub record: Arc<ContainerRecord>,
    roots: HashSet<CgroupKey>,
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
    by_identity: HashMap<String, ContainerKey>,
    removed: VecDeque<(BootNs, CgroupKey)>,
    /// Known before their parent was: looked at again when it comes.
    orphans: HashMap<CgroupKey, Vec<CgroupKey>>,
    next_key: u64,
    changes: Vec<ContainerChange>,
}

impl Cgroups {
    pub fn apply(&mut self, fact: &CgroupFact) {
        match fact.change {
            CgroupChange::Removed => self.remove(fact.key, fact.at),
            CgroupChange::Renamed => {
                if let Some(node) = self.nodes.get_mut(&fact.key) {
                    node.name.clone_from(&fact.name);
                }
            }
            CgroupChange::Created | CgroupChange::Seen => self.insert(fact),
        }
    }

    fn insert(&mut self, fact: &CgroupFact) {
        // Removals win over a scan that saw the directory just before.
        if self.nodes.contains_key(&fact.key) {
            return;
        }
        let node = Node { parent: fact.parent, name: fact.name.clone(), removed: None, container: None };
        self.nodes.insert(fact.key, node);
        self.identify(fact.key, fact.at, fact.change == CgroupChange::Created);
    }

    fn identify(&mut self, key: CgroupKey, at: BootNs, creation_seen: bool) {
        if let Some(missing) = self.missing_ancestor(key) {
            self.orphans.entry(missing).or_default().push(key);
            return;
        }
        if let Some(path) = self.path(key) {
            let identity = parse(&path);
            if matches!(identity.kind, Kind::Container | Kind::Sandbox) && identity.container_id.is_some() {
                let whole = path.len() == identity.root_len;
                let root = path.get(..identity.root_len).unwrap_or(&path).to_owned();
                let name = identity.container_id.clone().unwrap_or_else(|| root.clone());
                let container = match self.by_identity.get(&name) {
                    Some(known) => *known,
                    None => self.add_container(name, root, identity, at, creation_seen),
                };
                if let Some(node) = self.nodes.get_mut(&key) {
                    node.container = Some(container);
                }
                if whole && let Some(c) = self.containers.get_mut(&container) {
                    c.roots.insert(key);
                }
            }
        }
        for child in self.orphans.remove(&key).unwrap_or_default() {
            self.identify(child, at, creation_seen);
        }
    }

    fn add_container(
        &mut self,
        name: String,
        root: String,
        identity: crate::labels::CgroupIdentity,
        at: BootNs,
        creation_seen: bool,
    ) -> ContainerKey {
        self.next_key += 1;
        let key = ContainerKey(self.next_key);
        let record = Arc::new(ContainerRecord { key, cgroup_path: root, identity, created: at, creation_seen });
        self.by_identity.insert(name, key);
        self.containers.insert(key, Container { record: Arc::clone(&record), roots: HashSet::new(), gone: None });
        self.changes.push(ContainerChange::Appeared(record));
        key
    }

    fn remove(&mut self, key: CgroupKey, at: BootNs) {
        let Some(node) = self.nodes.get_mut(&key) else { return };
        if node.removed.is_some() {
            return;
        }
        node.removed = Some(at);
        self.removed.push_back((at, key));
        let Some(container) = node.container else { return };
        if let Some(c) = self.containers.get_mut(&container)
            && c.roots.remove(&key)
            && c.roots.is_empty()
            && c.gone.is_none()
        {
            c.gone = Some(at);
            self.changes.push(ContainerChange::Gone(container, at));
            // Its id may come back (a restarted docker container): that is a new container with a new key.
            self.by_identity.retain(|_, k| *k != container);
        }
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
                    names.push(node.name.as_str());
                    at = parent;
                }
            }
        }
        None
    }

    /// The container of a process's place: v2 first, then the followed v1 hierarchy (on a hybrid host v2 may say nothing).
    /// `Err(())` when neither cgroup is known at all.
    pub fn container_of(&self, place: &Place) -> Result<Option<ContainerKey>, UnknownCgroup> {
        let mut known = false;
        for key in [Some(place.v2), place.v1].into_iter().flatten() {
            if let Some(node) = self.nodes.get(&key) {
                known = true;
                if node.container.is_some() {
                    return Ok(node.container);
                }
            }
        }
        if known { Ok(None) } else { Err(UnknownCgroup) }
    }

    pub fn containers(&self) -> impl Iterator<Item = &Container> {
        self.containers.values()
    }

    pub fn take_changes(&mut self) -> Vec<ContainerChange> {
        std::mem::take(&mut self.changes)
    }

    pub fn expire(&mut self, now: BootNs) {
        while let Some(&(at, key)) = self.removed.front() {
            if now.saturating_since(at) < KEEP_REMOVED_NS {
                break;
            }
            self.removed.pop_front();
            self.nodes.remove(&key);
            self.orphans.remove(&key);
        }
        self.containers.retain(|_, c| c.gone.is_none_or(|gone| now.saturating_since(gone) < KEEP_REMOVED_NS));
    }
}

/// A process's cgroup that no event and no scan has named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownCgroup;

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(change: CgroupChange, hierarchy: u32, id: u64, parent: u64, name: &str) -> CgroupFact {
        let key = |id| CgroupKey { hierarchy, id };
        CgroupFact { change, key: key(id), parent: (parent != 0).then(|| key(parent)), name: name.into(), at: BootNs(id) }
    }

    fn place(v2: u64, v1: u64) -> Place {
        Place { v2: CgroupKey { hierarchy: 0, id: v2 }, v1: Some(CgroupKey { hierarchy: 8, id: v1 }) }
    }

    #[test]
    fn paths_join_in_any_order_and_hierarchies_share_a_container() {
        let id = "a".repeat(64);
        let facts = [
            fact(CgroupChange::Seen, 0, 1, 0, ""),
            fact(CgroupChange::Seen, 8, 1, 0, ""),
            fact(CgroupChange::Created, 8, 20, 10, &id),
            fact(CgroupChange::Created, 8, 10, 1, "docker"),
            fact(CgroupChange::Created, 0, 30, 1, "docker"),
            fact(CgroupChange::Created, 0, 31, 30, &id),
            fact(CgroupChange::Created, 0, 32, 31, "init.scope"),
        ];
        let mut table = Cgroups::default();
        for f in &facts {
            table.apply(f);
        }
        let by_v1 = table.container_of(&place(1, 20)).expect("known");
        assert!(by_v1.is_some());
        assert_eq!(by_v1, table.container_of(&place(32, 1)).expect("known"));
        assert_eq!(table.container_of(&place(1, 1)), Ok(None));
        assert_eq!(table.container_of(&place(77, 78)), Err(UnknownCgroup));
        assert_eq!(table.path(CgroupKey { hierarchy: 0, id: 32 }), Some(format!("/docker/{id}/init.scope")));
        assert_eq!(table.take_changes().len(), 1);
        for key in [CgroupKey { hierarchy: 8, id: 20 }, CgroupKey { hierarchy: 0, id: 31 }] {
            table.apply(&CgroupFact { change: CgroupChange::Removed, key, parent: None, name: String::new(), at: BootNs(99) });
        }
        assert!(matches!(table.take_changes()[..], [ContainerChange::Gone(_, BootNs(99))]));
        assert!(table.container_of(&place(32, 1)).is_ok_and(|c| c.is_some()));
    }
}
