//! The GPUs that the kubelet has assigned, by container and by index of the GPU.

use std::collections::{BTreeSet, HashMap};

use sampler_core::device::GpuInfo;
use sampler_core::snapshot::Snapshot;
use sampler_labels::{Assignment, ContainerLabels, Device, Label};

/// GPUs by container: by the pod's UID and the container's name, and by namespace, pod and container.
#[derive(Debug, Default)]
pub struct AssignedGpus {
    by_uid: HashMap<(String, String), BTreeSet<usize>>,
    by_name: HashMap<(String, String, String), BTreeSet<usize>>,
}

impl AssignedGpus {
    pub fn new(assignments: &[Assignment], snapshot: &Snapshot) -> Self {
        let mut all = Self::default();
        for assignment in assignments {
            let gpus: BTreeSet<usize> = assignment.devices().filter_map(|device| gpu(&device, snapshot)).collect();
            if let Some(uid) = &assignment.pod_uid {
                all.by_uid.entry((uid.clone(), assignment.container.clone())).or_default().extend(&gpus);
            }
            if let (Some(namespace), Some(pod)) = (&assignment.namespace, &assignment.pod) {
                all.by_name.entry((namespace.clone(), pod.clone(), assignment.container.clone())).or_default().extend(&gpus);
            }
        }
        all
    }

    /// Indices into the snapshot's GPUs. Empty if the name of the container within its pod is unknown.
    pub fn gpus_of(&self, labels: &ContainerLabels) -> Vec<usize> {
        let text = |label| labels.text(label).to_owned();
        let container = text(Label::Container);
        if container.is_empty() || self.by_uid.is_empty() && self.by_name.is_empty() {
            return Vec::new();
        }
        let by_uid = labels.pod_uid.as_ref().and_then(|uid| self.by_uid.get(&(uid.clone(), container.clone())));
        let by_name = self.by_name.get(&(text(Label::Namespace), text(Label::Pod), container));
        by_uid.or(by_name).into_iter().flatten().copied().collect()
    }
}

/// A MIG device that could not be opened as a device resolves to its GPU.
fn gpu(device: &Device, snapshot: &Snapshot) -> Option<usize> {
    let is_whole = |info: &GpuInfo| info.parent.is_none();
    let find = |is_device: &dyn Fn(&GpuInfo) -> bool| snapshot.gpus.iter().position(|gpu| is_device(&gpu.info));
    match device {
        Device::Uuid(uuid) => find(&|info| *info.uuid.0 == **uuid),
        Device::Index(index) => find(&|info| is_whole(info) && info.index == *index),
        Device::Minor(minor) => find(&|info| is_whole(info) && info.minor == Some(*minor)),
        Device::Mig(uuid) => find(&|info| *info.uuid.0 == **uuid).or_else(|| find(&|info| info.mig_uuids.contains(uuid))),
        Device::Unknown(_) => None,
    }
}
