//! Who kept a container waiting, by name. A contender may be gone, and its labels forgotten, long before the container that
//! it stood in the way of: so its labels are kept here for as long as somebody's seconds name it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sampler_core::snapshot::{ContainerGpu, Other, Snapshot};
use sampler_core::units::ContainerKey;
use sampler_labels::{ContainerLabels, Label};

use super::ledger::labels_of;
use crate::labels::LabelView;

/// Another user of a container's GPU, and what it got there while that one was active and the GPU saturated.
#[derive(Clone, Debug)]
pub struct ContenderRow {
    pub other: Other,
    /// Of a container.
    labels: Option<Arc<ContainerLabels>>,
    /// As exported; for who is no container its kind.
    pub container_id: Arc<str>,
    /// GPU-seconds.
    pub seconds: f64,
}

impl ContenderRow {
    /// `_other` is all those beyond the first few.
    pub fn kind(&self) -> &'static str {
        match self.other {
            Other::Container(_) => "container",
            Other::Host => "host",
            Other::Unknown => "unknown",
            Other::Rest => "_other",
        }
    }

    pub fn text(&self, label: Label) -> &str {
        match (&self.labels, label) {
            (Some(labels), _) => labels.text(label),
            // So that a legend by this label alone is not blank.
            (None, Label::Container) => self.kind(),
            (None, _) => "",
        }
    }

    fn is_series_of(&self, other: &ContenderRow) -> bool {
        let labels = [Label::Namespace, Label::Pod, Label::Container];
        self.container_id == other.container_id && labels.into_iter().all(|label| self.text(label) == other.text(label))
    }
}

#[derive(Debug, Default)]
pub struct Others(HashMap<ContainerKey, Arc<ContainerLabels>>);

impl Others {
    pub fn update(&mut self, snapshot: &Snapshot, labels: &LabelView) {
        let pairs = snapshot.containers.iter().flat_map(|container| &container.gpus);
        let named = pairs.flat_map(|pair| &pair.contention).filter_map(|contention| match contention.other {
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

    /// Those of one pair. Whose labels are not settled waits, as its own series do.
    pub fn of(&self, pair: &ContainerGpu) -> Vec<ContenderRow> {
        let row = |contention: &sampler_core::snapshot::Contention| {
            let labels = match contention.other {
                Other::Container(key) => Some(Arc::clone(self.0.get(&key)?)),
                Other::Host | Other::Unknown | Other::Rest => None,
            };
            let container_id = labels.as_ref().map(|labels| Arc::clone(&labels.container_id)).unwrap_or_default();
            let mut row = ContenderRow { other: contention.other, labels, container_id, seconds: contention.seconds };
            if row.labels.is_none() {
                row.container_id = row.kind().into();
            }
            Some(row)
        };
        pair.contention.iter().filter_map(row).collect()
    }
}

/// One row for each series: the lives of a restarted container are one to whoever waited for it. `called` are containers that are
/// exported under another id than their own.
pub fn one_series_each(others: &mut Vec<ContenderRow>, called: &HashMap<ContainerKey, Arc<str>>) {
    let mut all: Vec<ContenderRow> = Vec::with_capacity(others.len());
    for mut other in others.drain(..) {
        if let Other::Container(key) = other.other
            && let Some(id) = called.get(&key)
        {
            other.container_id = Arc::clone(id);
        }
        match all.iter_mut().find(|known| known.is_series_of(&other)) {
            Some(known) => known.seconds += other.seconds,
            None => all.push(other),
        }
    }
    *others = all;
}
