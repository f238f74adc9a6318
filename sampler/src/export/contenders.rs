//! The contenders of a container, with labels. A contender may be gone, and its labels dropped, long before the container: so its
//! labels are kept here for as long as the contention of any container refers to it.

use std::sync::Arc;

use foldhash::{HashMap, HashSet};
use sampler_core::snapshot::{ContainerGpu, Contention, Other, Snapshot};
use sampler_core::units::ContainerKey;
use sampler_labels::ContainerLabels;

use super::exposition::{ExportedContender, contender_kind};
use super::ledger::labels_of;
use crate::labels::LabelView;

#[derive(Debug, Default)]
pub struct ContenderLabels(HashMap<ContainerKey, Arc<ContainerLabels>>);

impl ContenderLabels {
    pub fn update(&mut self, snapshot: &Snapshot, labels: &LabelView) {
        let usages = snapshot.containers.iter().flat_map(|container| &container.gpus);
        let named = usages.flat_map(|usage| usage.contention.iter()).filter_map(|contention| match contention.other {
            Other::Container(key) => Some(key),
            Other::Host | Other::Unknown | Other::Rest => None,
        });
        let named: HashSet<ContainerKey> = named.collect();
        self.0.retain(|key, _| named.contains(key));
        for container in snapshot.containers.iter().filter(|container| named.contains(&container.record.key)) {
            if let Some(labels) = labels_of(&container.record, labels, snapshot.at) {
                self.0.insert(container.record.key, labels);
            }
        }
    }

    /// The contenders of one pair. One without settled labels is left out, as its own series are.
    pub fn contenders(&self, usage: &ContainerGpu) -> Vec<ExportedContender> {
        let contender = |contention: &Contention| {
            let labels = match contention.other {
                Other::Container(key) => Some(Arc::clone(self.0.get(&key)?)),
                Other::Host | Other::Unknown | Other::Rest => None,
            };
            let container_id = match &labels {
                Some(labels) => Arc::clone(&labels.container_id),
                None => contender_kind(contention.other).into(),
            };
            let Contention { other, seconds, pressure_ratio } = *contention;
            Some(ExportedContender { other, labels, container_id, seconds, pressure_ratio })
        };
        usage.contention.iter().filter_map(contender).collect()
    }
}
