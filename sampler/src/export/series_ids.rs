//! One owner for each series: pairs and contenders that would have the same labels are merged or distinguished by the path of their cgroup.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sampler_core::snapshot::Other;
use sampler_core::units::{ContainerKey, GpuUuid};

use super::exposition::{ExportedContender, ExportedPair, Exposition};

/// The pairs of one container are adjacent.
fn of_one_container(a: &ExportedPair, b: &ExportedPair) -> bool {
    a.key == b.key
}

impl Exposition {
    /// Leaves no two pairs with the same GPU and container id. A restarted container keeps its id and the path of its cgroup: its series
    /// are those of its present run, and the reset is a counter reset. Different cgroups may have one id: a container inside another, two
    /// namespaces of containerd, the apps of a rkt pod. The cgroup that is not inside another then keeps the id, and among equals the
    /// first by path, whichever starts or restarts; the id of the others is their path.
    pub fn merge_series(&mut self) {
        self.keep_newest_runs();
        let mut owner: HashMap<Arc<str>, (bool, Arc<str>)> = HashMap::new();
        for pairs in self.pairs.chunk_by(of_one_container) {
            let labels = &pairs[0].labels;
            let rank = (labels.is_nested, Arc::clone(&labels.id));
            let first = owner.entry(Arc::clone(&labels.container_id)).or_insert_with(|| rank.clone());
            if rank < *first {
                *first = rank;
            }
        }
        for pairs in self.pairs.chunk_by_mut(of_one_container) {
            let labels = Arc::clone(&pairs[0].labels);
            if owner.get(&labels.container_id).is_some_and(|(_, path)| *path != labels.id) {
                pairs.iter_mut().for_each(|pair| pair.container_id = Arc::clone(&labels.id));
            }
        }
    }

    /// Leaves the newest run of each container on each GPU.
    fn keep_newest_runs(&mut self) {
        let mut ids = HashSet::new();
        if self.pairs.chunk_by(of_one_container).all(|pairs| ids.insert(&pairs[0].labels.id)) {
            return;
        }
        let mut newest: HashMap<(Arc<str>, GpuUuid), ContainerKey> = HashMap::new();
        for pair in &self.pairs {
            let key = newest.entry((Arc::clone(&pair.labels.id), pair.gpu().clone())).or_insert(pair.key);
            *key = pair.key.max(*key);
        }
        self.pairs.retain(|pair| newest.get(&(Arc::clone(&pair.labels.id), pair.gpu().clone())) == Some(&pair.key));
    }

    /// Leaves one contender per series.
    pub fn merge_contenders(&mut self) {
        let by_path = self.pairs.iter().filter(|pair| pair.container_id != pair.labels.container_id);
        let paths: HashMap<ContainerKey, Arc<str>> = by_path.map(|pair| (pair.key, Arc::clone(&pair.container_id))).collect();
        for pair in &mut self.pairs {
            for contender in &mut pair.contenders {
                if let Other::Container(key) = contender.other
                    && let Some(labels) = self.only_containers.get(&key)
                {
                    (contender.container_id, contender.labels) = (Arc::clone(&labels.container_id), Some(Arc::clone(labels)));
                }
            }
            merge_contenders(&mut pair.contenders, &paths);
        }
    }
}

/// Leaves one contender per series: the runs of a restarted container are one contender. `paths` has the containers that are exported
/// under their path instead of their id.
fn merge_contenders(contenders: &mut Vec<ExportedContender>, paths: &HashMap<ContainerKey, Arc<str>>) {
    let mut merged: Vec<ExportedContender> = Vec::with_capacity(contenders.len());
    for mut contender in contenders.drain(..) {
        if let Other::Container(key) = contender.other
            && let Some(path) = paths.get(&key)
        {
            contender.container_id = Arc::clone(path);
        }
        match merged.iter_mut().find(|known| known.has_series_of(&contender)) {
            Some(known) => {
                known.seconds += contender.seconds;
                let ratios = [known.pressure_ratio, contender.pressure_ratio];
                known.pressure_ratio = ratios.into_iter().flatten().reduce(|sum, ratio| sum + ratio);
            }
            None => merged.push(contender),
        }
    }
    *contenders = merged;
}
