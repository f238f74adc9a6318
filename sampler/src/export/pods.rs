//! Pods with processes in their own cgroups: under gVisor all processes of a pod are there, and its containers' cgroups are empty. If
//! only one container of the pod has GPUs, what the pod uses is that container's.

use std::sync::Arc;

use foldhash::HashMap;
use sampler_core::cgroup_path::Kind;
use sampler_core::snapshot::Snapshot;
use sampler_core::units::ContainerKey;
use sampler_labels::{ContainerLabels, Facts, Label, Source};

use super::assigned::AssignedGpus;
use super::exposition::{ExportedPair, Exposition};
use super::ledger::labels_of;
use crate::labels::LabelView;

/// Pods that are exposed as their only container with GPUs, with its labels. One stays so until it has left the snapshot: its series
/// would otherwise change their labels, and so their values, when the container restarts or ends.
#[derive(Debug, Default)]
pub struct ExposedPods(HashMap<ContainerKey, ExposedPod>);

#[derive(Debug)]
struct ExposedPod {
    /// Those of the container; `None` while it has no cgroup of its own.
    source: Option<Arc<ContainerLabels>>,
    /// The same with the path of the pod: what the container's own cgroup uses, if anything, has series of its own.
    labels: Arc<ContainerLabels>,
}

impl ExposedPods {
    pub fn update(&mut self, snapshot: &Snapshot, labels: &LabelView, assigned: &AssignedGpus) {
        let is_pod = |kind: Kind| kind == Kind::Pod;
        let pods = || snapshot.containers.iter().filter(|c| is_pod(c.record.identity.kind) && !c.gpus.is_empty());
        let present: Vec<ContainerKey> = pods().map(|pod| pod.record.key).collect();
        self.0.retain(|key, _| present.contains(key));
        for pod in pods() {
            let Some(of_pod) = labels_of(&pod.record, labels, snapshot.at) else { continue };
            let Some(name) = assigned.only_container_of(&of_pod) else { continue };
            let is_below = |path: &str| path.strip_prefix(&*of_pod.id).is_some_and(|rest| rest.starts_with('/'));
            let living = snapshot.containers.iter().filter(|c| c.gone.is_none() && is_below(&c.record.cgroup_path));
            let mut settled = living.filter_map(|container| labels_of(&container.record, labels, snapshot.at));
            let source = settled.find(|labels| labels.text(Label::Container) == name);
            let is_current = |known: &ExposedPod| match (&known.source, &source) {
                (Some(known), Some(source)) => Arc::ptr_eq(known, source),
                // It has ended, or has not started.
                (_, None) => true,
                (None, Some(_)) => false,
            };
            if !self.0.get(&pod.record.key).is_some_and(is_current) {
                let labels = match &source {
                    Some(container) => {
                        let mut labels = ContainerLabels::clone(container);
                        labels.id = Arc::clone(&of_pod.id);
                        labels
                    }
                    None => with_container(&of_pod, name),
                };
                self.0.insert(pod.record.key, ExposedPod { source, labels: Arc::new(labels) });
            }
        }
    }
}

impl Exposition {
    /// Exposes these pods as their containers, each without the container's own pair where that is not used.
    pub fn expose_pods_as_containers(&mut self, pods: &ExposedPods) {
        for (pod, ExposedPod { labels, .. }) in &pods.0 {
            let of_pod: Vec<_> = self.pairs.iter().filter(|pair| pair.key == *pod).map(|pair| pair.gpu().clone()).collect();
            let replaced = |pair: &ExportedPair| {
                pair.key != *pod
                    && pair.labels.container_id == labels.container_id
                    && of_pod.contains(pair.gpu())
                    && !is_used(pair)
            };
            let assigned: Vec<_> =
                self.pairs.iter().filter(|pair| replaced(pair)).map(|pair| (pair.gpu().clone(), pair.assigned)).collect();
            self.pairs.retain(|pair| !replaced(pair));
            for pair in self.pairs.iter_mut().filter(|pair| pair.key == *pod) {
                let of_container = assigned.iter().find(|(gpu, _)| gpu == pair.gpu()).and_then(|(_, source)| *source);
                pair.assigned = pair.assigned.or(of_container);
                (pair.container_id, pair.labels) = (Arc::clone(&labels.container_id), Arc::clone(labels));
            }
            self.only_containers.insert(*pod, Arc::clone(labels));
        }
    }
}

fn is_used(pair: &ExportedPair) -> bool {
    let usage = &pair.usage;
    usage.samples > 0 || !usage.engines.is_empty() || usage.memory_used_bytes.is_some_and(|bytes| bytes > 0)
}

/// The labels of the pod, where its container has no cgroup of its own.
fn with_container(pod: &ContainerLabels, name: &str) -> ContainerLabels {
    let mut labels = pod.clone();
    let mut facts = Facts::default();
    facts.set(Label::Container, Some(name));
    labels.merge(Source::Kubelet, &facts);
    labels
}

#[cfg(test)]
mod tests {
    use sampler_core::cgroup_path::parse;
    use sampler_core::device::GpuInfo;
    use sampler_core::identity::ContainerRecord;
    use sampler_core::snapshot::{ContainerGpu, ContainerView, GpuView};
    use sampler_core::units::{BootNs, GpuUuid, WallTime};
    use sampler_labels::Assignment;

    use crate::labels::AssignedView;

    use super::super::ledger::{Ledger, tests::gpu_view};
    use super::*;

    const UID: &str = "8bb25662-de9a-11e9-84e7-f8f21e04010c";

    fn view(key: u64, path: &str, usage: Option<f64>, gone: bool) -> ContainerView {
        let (identity, key) = (parse(path), ContainerKey(key));
        let record = ContainerRecord { key, cgroup_path: path.into(), identity, created: BootNs(0), creation_seen: true };
        let gpus = usage.map(|seconds| ContainerGpu { seconds, samples: seconds as u64, ..ContainerGpu::default() });
        ContainerView { record: Arc::new(record), gone: gone.then_some(BootNs(1)), gpus: gpus.into_iter().collect(), waits: None }
    }

    fn labelled(view: &ContainerView, container: &str) -> (ContainerKey, Arc<ContainerLabels>) {
        let mut labels = ContainerLabels::from_path(&view.record);
        let mut facts = Facts::default();
        for (label, text) in [(Label::Namespace, "prod"), (Label::Pod, "p"), (Label::Container, container)] {
            facts.set(label, Some(text));
        }
        labels.merge(Source::Bundle, &facts);
        labels.settled = true;
        (view.record.key, Arc::new(labels))
    }

    /// `container id seconds` of each pair; ids are shortened to their first two characters.
    fn pairs(page: &Exposition) -> Vec<String> {
        let pair = |pair: &ExportedPair| {
            let (container, id) = (pair.labels.text(Label::Container), pair.container_id.get(..2).unwrap_or_default());
            format!("{container} {id} {}", pair.usage.seconds)
        };
        page.pairs.iter().map(pair).collect()
    }

    #[test]
    fn a_pod_is_its_only_container_with_gpus_until_the_pod_ends() {
        let pod_path = format!("/kubepods/pod{UID}");
        let (first, second) = (format!("{pod_path}/{}", "a".repeat(64)), format!("{pod_path}/{}", "b".repeat(64)));
        let gpu: GpuView = gpu_view(GpuInfo { uuid: GpuUuid("GPU-1".into()), ..GpuInfo::default() });
        let assignment = |container: &str| Assignment {
            pod_uid: Some(UID.into()),
            container: container.into(),
            resource: "nvidia.com/gpu".into(),
            device_ids: vec!["GPU-1".into()],
            ..Assignment::default()
        };
        let mut ledger = Ledger::default();
        let mut show = |containers: Vec<ContainerView>, assigned: &[Assignment]| {
            let mut labels = LabelView::new();
            for view in &containers {
                let name = if view.record.identity.kind == Kind::Pod { "" } else { "main" };
                let (key, of_view) = labelled(view, name);
                labels.insert(key, of_view);
            }
            let gpus = vec![gpu.clone()];
            let snapshot = Snapshot { at: BootNs(10_000_000_000), wall: WallTime(1), gpus, containers };
            ledger.update(&snapshot, &labels);
            let view = AssignedView { assignments: assigned.to_vec(), assigns_gpus: true };
            pairs(&ledger.view(&snapshot, &labels, &AssignedGpus::new(&view, &snapshot, Arc::default())))
        };
        let pod = |seconds| view(1, &pod_path, Some(seconds), false);
        // Which of its containers works is not known.
        assert_eq!(show(vec![pod(1.0), view(2, &first, None, false)], &[]), [" 8b 1"]);
        let both = [assignment("main"), assignment("other")];
        assert_eq!(show(vec![pod(1.0), view(2, &first, None, false)], &both), [" 8b 1", "main aa 0"]);
        // No idle row of the container.
        let one = [assignment("main")];
        assert_eq!(show(vec![pod(2.0), view(2, &first, None, false)], &one), ["main aa 2"]);
        // The assignment is withdrawn, and the container ends, before the pod does.
        assert_eq!(show(vec![pod(3.0), view(2, &first, None, true)], &[]), ["main aa 3"]);
        // It has started again.
        assert_eq!(show(vec![pod(4.0), view(3, &second, None, false)], &one), ["main bb 4"]);
        // What the container's own cgroup uses has series of its own.
        assert_eq!(show(vec![pod(5.0), view(3, &second, Some(1.0), false)], &one), ["main bb 5", "main /k 1"]);
        assert_eq!(show(vec![view(3, &second, Some(1.0), false)], &one), ["main bb 1"]);
    }
}
