//! Whose the assigned GPUs are: the kubelet's list, by container and by index of the GPU.

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
        for one in assignments {
            let gpus: BTreeSet<usize> = one.devices().filter_map(|device| gpu(&device, snapshot)).collect();
            if let Some(uid) = &one.pod_uid {
                all.by_uid.entry((uid.clone(), one.container.clone())).or_default().extend(&gpus);
            }
            if let (Some(namespace), Some(pod)) = (&one.namespace, &one.pod) {
                all.by_name.entry((namespace.clone(), pod.clone(), one.container.clone())).or_default().extend(&gpus);
            }
        }
        all
    }

    /// Indices into the snapshot's GPUs. A container whose name in its pod is unknown has none that could be told.
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

/// A MIG device is a device; where it could not be opened as one, it is on its GPU.
fn gpu(device: &Device, snapshot: &Snapshot) -> Option<usize> {
    let whole = |info: &GpuInfo| info.parent.is_none();
    let find = |is: &dyn Fn(&GpuInfo) -> bool| snapshot.gpus.iter().position(|gpu| is(&gpu.info));
    match device {
        Device::Uuid(uuid) => find(&|info| *info.uuid.0 == **uuid),
        Device::Index(index) => find(&|info| whole(info) && info.index == *index),
        Device::Minor(minor) => find(&|info| whole(info) && info.minor == Some(*minor)),
        Device::Mig(uuid) => find(&|info| *info.uuid.0 == **uuid).or_else(|| find(&|info| info.mig_uuids.contains(uuid))),
        Device::Unknown(_) => None,
    }
}
