//! Pods with processes in their own cgroups: under gVisor all processes of a pod are there, and its containers' cgroups are empty. If
//! only one container of the pod has a GPU, what the pod uses is that container's.

use std::sync::Arc;

use sampler_core::cgroup_path::Kind;
use sampler_core::snapshot::Snapshot;
use sampler_core::units::ContainerKey;
use sampler_labels::{ContainerLabels, Facts, Label, Source};

use super::assigned::AssignedGpus;
use super::exposition::{ExportedPair, Exposition};
use crate::labels::LabelView;

impl Exposition {
    /// Exposes each such pod as its only container with a GPU, instead of that container's own pair on the GPU, which is not used.
    pub fn expose_pods_as_containers(&mut self, snapshot: &Snapshot, labels: &LabelView, assigned: &AssignedGpus) {
        let pods: Vec<(ContainerKey, Arc<ContainerLabels>)> = self
            .pairs
            .chunk_by(|a, b| a.key == b.key)
            .filter(|pairs| pairs[0].labels.kind == Kind::Pod)
            .map(|pairs| (pairs[0].key, Arc::clone(&pairs[0].labels)))
            .collect();
        for (pod, pod_labels) in pods {
            let Some(name) = assigned.only_container_of(&pod_labels) else { continue };
            let is_it = |other: &ContainerLabels| {
                other.pod_uid == pod_labels.pod_uid
                    && other.outer_container_id == pod_labels.outer_container_id
                    && other.text(Label::Container) == name
            };
            let living = snapshot.containers.iter().filter(|container| container.gone.is_none());
            let mut known = living.filter_map(|container| labels.get(&container.record.key)).filter(|other| is_it(other));
            let container = known.next().cloned().unwrap_or_else(|| Arc::new(with_container(&pod_labels, name)));
            if !self.pairs.iter().any(|pair| is_it(&pair.labels) && is_used(pair)) {
                self.expose_as(pod, &container, is_it);
            }
        }
    }

    fn expose_as(&mut self, pod: ContainerKey, container: &Arc<ContainerLabels>, is_it: impl Fn(&ContainerLabels) -> bool) {
        let of_pod: Vec<_> = self.pairs.iter().filter(|pair| pair.key == pod).map(|pair| pair.gpu().clone()).collect();
        let replaced = |pair: &ExportedPair| pair.key != pod && is_it(&pair.labels) && of_pod.contains(pair.gpu());
        let assigned: Vec<_> =
            self.pairs.iter().filter(|pair| replaced(pair)).map(|pair| (pair.gpu().clone(), pair.assigned)).collect();
        self.pairs.retain(|pair| !replaced(pair));
        for pair in self.pairs.iter_mut().filter(|pair| pair.key == pod) {
            let of_container = assigned.iter().find(|(gpu, _)| gpu == pair.gpu()).and_then(|(_, source)| *source);
            pair.assigned = pair.assigned.or(of_container);
            (pair.container_id, pair.labels) = (Arc::clone(&container.container_id), Arc::clone(container));
        }
        self.only_containers.insert(pod, Arc::clone(container));
    }
}

fn is_used(pair: &ExportedPair) -> bool {
    pair.usage.samples > 0 || pair.usage.memory_used_bytes.is_some_and(|bytes| bytes > 0)
}

/// The labels of the pod, where its container has no cgroup of its own.
fn with_container(pod: &ContainerLabels, name: &str) -> ContainerLabels {
    let mut labels = pod.clone();
    let mut facts = Facts::default();
    facts.set(Label::Container, Some(name));
    labels.merge(Source::Kubelet, &facts);
    labels
}
