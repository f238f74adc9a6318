//! The contenders of a container, with labels. A contender may be gone, and its labels dropped, long before the container: so its
//! labels are kept here for as long as the contention of any container refers to it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sampler_core::snapshot::{ContainerGpu, Contention, Other, Snapshot};
use sampler_core::units::ContainerKey;
use sampler_labels::{ContainerLabels, Label};

use super::ledger::labels_of;
use crate::labels::LabelView;

/// Another user of a container's GPU, and the GPU time that it received while the container was active and the GPU was saturated.
#[derive(Clone, Debug)]
pub struct ExportedContender {
    pub other: Other,
    /// Only for a container.
    labels: Option<Arc<ContainerLabels>>,
    /// As exported; the kind if it is not a container.
    pub container_id: Arc<str>,
    /// GPU-seconds.
    pub seconds: f64,
}

/// `_other` stands for all users beyond the first few.
fn kind(other: Other) -> &'static str {
    match other {
        Other::Container(_) => "container",
        Other::Host => "host",
        Other::Unknown => "unknown",
        Other::Rest => "_other",
    }
}

impl ExportedContender {
    pub fn kind(&self) -> &'static str {
        kind(self.other)
    }

    pub fn text(&self, label: Label) -> &str {
        match (&self.labels, label) {
            (Some(labels), _) => labels.text(label),
            // A legend by this label alone is then not blank.
            (None, Label::Container) => self.kind(),
            (None, _) => "",
        }
    }

    fn has_series_of(&self, other: &ExportedContender) -> bool {
        let labels = [Label::Namespace, Label::Pod, Label::Container];
        self.container_id == other.container_id && labels.into_iter().all(|label| self.text(label) == other.text(label))
    }
}

#[derive(Debug, Default)]
pub struct ContenderLabels(HashMap<ContainerKey, Arc<ContainerLabels>>);

impl ContenderLabels {
    pub fn update(&mut self, snapshot: &Snapshot, labels: &LabelView) {
        let usages = snapshot.containers.iter().flat_map(|container| &container.gpus);
        let named = usages.flat_map(|usage| &usage.contention).filter_map(|contention| match contention.other {
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
                None => kind(contention.other).into(),
            };
            Some(ExportedContender { other: contention.other, labels, container_id, seconds: contention.seconds })
        };
        usage.contention.iter().filter_map(contender).collect()
    }
}

/// Leaves one contender per series: the runs of a restarted container are one contender. `paths` has the containers that are exported
/// under their path instead of their id.
pub fn merge_series(contenders: &mut Vec<ExportedContender>, paths: &HashMap<ContainerKey, Arc<str>>) {
    let mut merged: Vec<ExportedContender> = Vec::with_capacity(contenders.len());
    for mut contender in contenders.drain(..) {
        if let Other::Container(key) = contender.other
            && let Some(path) = paths.get(&key)
        {
            contender.container_id = Arc::clone(path);
        }
        match merged.iter_mut().find(|known| known.has_series_of(&contender)) {
            Some(known) => known.seconds += contender.seconds,
            None => merged.push(contender),
        }
    }
    *contenders = merged;
}
