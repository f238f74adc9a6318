//! The output types of the label service.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use sampler_core::units::ContainerKey;
use sampler_labels::{ABSENT, ContainerLabels, QueryAttempt, Source};
use serde::{Deserialize, Serialize};

/// The endpoint name of sources that read files.
pub const FILES: &str = "files";

/// A publication copies one pointer per shard, and the entries of each shard that changed since the last one: a 256th of the containers
/// for one change.
const SHARDS: usize = 256;

type Shard = HashMap<ContainerKey, Arc<ContainerLabels>>;

/// The labels of all containers at one time. A clone shares all shards with its origin; a change copies the shard of the container.
#[derive(Clone, Debug)]
pub struct LabelView(Vec<Arc<Shard>>);

impl LabelView {
    pub fn new() -> Self {
        Self(vec![Arc::default(); SHARDS])
    }

    pub fn get(&self, key: &ContainerKey) -> Option<&Arc<ContainerLabels>> {
        self.0[shard_of(*key)].get(key)
    }

    pub fn insert(&mut self, key: ContainerKey, labels: Arc<ContainerLabels>) -> Option<Arc<ContainerLabels>> {
        Arc::make_mut(&mut self.0[shard_of(key)]).insert(key, labels)
    }

    pub fn remove(&mut self, key: &ContainerKey) -> Option<Arc<ContainerLabels>> {
        let shard = &mut self.0[shard_of(*key)];
        if shard.contains_key(key) { Arc::make_mut(shard).remove(key) } else { None }
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(|shard| shard.len()).sum()
    }

    pub fn keys(&self) -> impl Iterator<Item = &ContainerKey> {
        self.0.iter().flat_map(|shard| shard.keys())
    }

    pub fn values(&self) -> impl Iterator<Item = &Arc<ContainerLabels>> {
        self.0.iter().flat_map(|shard| shard.values())
    }
}

impl Default for LabelView {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
impl LabelView {
    pub fn of_one(key: ContainerKey, labels: Arc<ContainerLabels>) -> Self {
        let mut view = Self::new();
        view.insert(key, labels);
        view
    }

    pub fn add_all(&mut self, other: &Self) {
        for (key, labels) in other.0.iter().flat_map(|shard| shard.iter()) {
            self.insert(*key, Arc::clone(labels));
        }
    }
}

/// Keys are consecutive numbers, so this spreads them evenly.
fn shard_of(key: ContainerKey) -> usize {
    key.0 as usize % SHARDS
}

/// The result of one source, as `explain` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttemptView {
    pub source: Cow<'static, str>,
    pub endpoint: String,
    pub outcome: Cow<'static, str>,
    pub detail: String,
}

impl AttemptView {
    pub fn is_absent(&self) -> bool {
        self.detail == ABSENT
    }

    pub fn new(source: Source, endpoint: &str, attempt: &QueryAttempt) -> Self {
        Self {
            source: source.name().into(),
            endpoint: attempt.at.as_deref().unwrap_or(endpoint).to_owned(),
            outcome: attempt.status.name().into(),
            detail: attempt.detail.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use sampler_core::cgroup_path::parse;
    use sampler_core::identity::ContainerRecord;
    use sampler_core::units::BootNs;

    use super::*;

    fn labels(n: u64) -> (ContainerKey, Arc<ContainerLabels>) {
        let cgroup_path = format!("/docker/{n:064x}");
        let (key, identity, created) = (ContainerKey(n), parse(&cgroup_path), BootNs(0));
        let record = ContainerRecord { key, cgroup_path, identity, created, creation_seen: true };
        (key, Arc::new(ContainerLabels::from_path(&record)))
    }

    #[test]
    fn a_change_after_a_publication_copies_one_shard() {
        const CONTAINERS: u64 = 10_000;
        let mut view = LabelView::new();
        for (key, labels) in (0..CONTAINERS).map(labels) {
            view.insert(key, labels);
        }
        let published = view.clone();
        let (key, changed) = labels(CONTAINERS / 2);
        view.insert(key, Arc::clone(&changed));
        view.remove(&ContainerKey(CONTAINERS));
        assert!(Arc::ptr_eq(view.get(&key).unwrap(), &changed) && !Arc::ptr_eq(published.get(&key).unwrap(), &changed));
        let copied: Vec<_> = view.0.iter().zip(&published.0).filter(|(now, before)| !Arc::ptr_eq(now, before)).collect();
        assert_eq!(copied.len(), 1);
        assert!(view.0.iter().all(|shard| shard.len() <= CONTAINERS as usize / SHARDS + 1));
        view.remove(&key);
        assert_eq!((published.len(), view.len()), (CONTAINERS as usize, CONTAINERS as usize - 1));
        assert_eq!((view.keys().count(), view.values().count(), view.get(&key)), (view.len(), view.len(), None));
    }
}
