//! The GPUs that the kubelet has assigned, by container and by index of the GPU.

use std::collections::{BTreeMap, HashMap};

use sampler_core::device::GpuInfo;
use sampler_core::snapshot::{GpuView, Snapshot};
use sampler_labels::{Assignment, AssignmentSource, ContainerLabels, Device, Label};

/// GPUs by container: by the pod's UID and the container's name, and by namespace, pod and container.
#[derive(Debug, Default)]
pub struct AssignedGpus {
    by_uid: HashMap<(String, String), GpuSources>,
    by_name: HashMap<(String, String, String), GpuSources>,
}

/// By index into the snapshot's GPUs: the most exact source of the assignment.
type GpuSources = BTreeMap<usize, AssignmentSource>;

fn add(known: &mut GpuSources, gpus: &[usize], source: AssignmentSource) {
    for gpu in gpus {
        let of_gpu = known.entry(*gpu).or_insert(source);
        *of_gpu = source.min(*of_gpu);
    }
}

impl AssignedGpus {
    pub fn new(assignments: &[Assignment], snapshot: &Snapshot) -> Self {
        let mut all = Self::default();
        for assignment in assignments {
            let gpus: Vec<usize> = assignment.devices().iter().filter_map(|device| gpu(device, snapshot)).collect();
            let source = assignment.source;
            if let Some(uid) = &assignment.pod_uid {
                add(all.by_uid.entry((uid.clone(), assignment.container.clone())).or_default(), &gpus, source);
            }
            if let (Some(namespace), Some(pod)) = (&assignment.namespace, &assignment.pod) {
                let names = (namespace.clone(), pod.clone(), assignment.container.clone());
                add(all.by_name.entry(names).or_default(), &gpus, source);
            }
        }
        all
    }

    /// The container of this pod with GPUs, if it is the only one.
    pub fn only_container_of(&self, pod: &ContainerLabels) -> Option<&str> {
        let uid = pod.pod_uid.as_deref();
        let (namespace, name) = (pod.text(Label::Namespace), pod.text(Label::Pod));
        let of_uid = self.by_uid.iter().filter(|((of, _), _)| Some(of.as_str()) == uid);
        let of_name = self.by_name.iter().filter(|((in_namespace, of, _), _)| in_namespace == namespace && of == name);
        // Also one with devices of which it is not known which GPU they are.
        let by_uid = of_uid.map(|((_, container), _)| container);
        let by_name = of_name.map(|((_, _, container), _)| container);
        let mut all = by_uid.chain(by_name);
        let first = all.next()?;
        all.all(|other| other == first).then_some(first)
    }

    /// Indices into the snapshot's GPUs. Empty if the name of the container within its pod is unknown.
    pub fn gpus_of(&self, labels: &ContainerLabels) -> Vec<(usize, AssignmentSource)> {
        let text = |label| labels.text(label).to_owned();
        let container = text(Label::Container);
        if container.is_empty() || self.by_uid.is_empty() && self.by_name.is_empty() {
            return Vec::new();
        }
        let by_uid = labels.pod_uid.as_ref().and_then(|uid| self.by_uid.get(&(uid.clone(), container.clone())));
        let by_name = self.by_name.get(&(text(Label::Namespace), text(Label::Pod), container));
        by_uid.or(by_name).into_iter().flatten().map(|(gpu, source)| (*gpu, *source)).collect()
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
        // Which of several MIG devices has this number is not known. A whole GPU is not assigned.
        Device::Instance { minor, .. } => {
            let parent = find(&|info| is_whole(info) && info.minor == Some(*minor))?;
            let parent = &snapshot.gpus[parent].info.uuid;
            let of_parent = |(_, gpu): &(usize, &GpuView)| gpu.info.parent.as_ref() == Some(parent);
            let mut all = snapshot.gpus.iter().enumerate().filter(of_parent).map(|(index, _)| index);
            all.next().filter(|_| all.next().is_none())
        }
        Device::Unknown(_) => None,
    }
}
