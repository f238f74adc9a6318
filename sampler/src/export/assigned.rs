//! Which container which GPU is assigned to, by index of the GPU.
//!
//! What the kubelet's lists say about a container is taken alone: it may be a part of what the container's specification shows. Without them
//! the specification counts, except `all` in a pod of a node on which a device plugin or claims assign GPUs: those of images and of the
//! node's own services (a device plugin, an exporter) have been given nothing. Reservation pods hold a GPU on behalf of others, which have it
//! in their specifications.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use sampler_core::cgroup_path::Kind;
use sampler_core::device::GpuInfo;
use sampler_core::snapshot::Snapshot;
use sampler_labels::{AssignmentSource, ContainerLabels, Device, Label, VisibleGpus};

use crate::labels::AssignedView;

/// GPUs by container: by the pod's UID and the container's name, and by namespace, pod and container.
#[derive(Debug, Default)]
pub struct AssignedGpus {
    by_uid: HashMap<(Inside, String, String), GpuSources>,
    by_name: HashMap<(Inside, String, String, String), GpuSources>,
    assigns_gpus: bool,
    /// The namespaces of reservation pods.
    reservations: Arc<[String]>,
}

/// The container of the kubelet's node; `None` on the host. What is assigned there is no container's elsewhere.
type Inside = Option<String>;

/// By index into the snapshot's GPUs: the most exact source of the assignment.
type GpuSources = BTreeMap<usize, AssignmentSource>;

fn add(known: &mut GpuSources, gpus: &[usize], source: AssignmentSource) {
    for gpu in gpus {
        let of_gpu = known.entry(*gpu).or_insert(source);
        *of_gpu = source.min(*of_gpu);
    }
}

impl AssignedGpus {
    pub fn new(view: &AssignedView, snapshot: &Snapshot, reservations: Arc<[String]>) -> Self {
        let mut all = Self { assigns_gpus: view.assigns_gpus, reservations, ..Self::default() };
        for assignment in &view.assignments {
            let gpus: Vec<usize> = assignment.devices().iter().filter_map(|device| gpu_of(device, snapshot)).collect();
            let (source, inside) = (assignment.source, &assignment.inside);
            if let Some(uid) = &assignment.pod_uid {
                add(all.by_uid.entry((inside.clone(), uid.clone(), assignment.container.clone())).or_default(), &gpus, source);
            }
            if let (Some(namespace), Some(pod)) = (&assignment.namespace, &assignment.pod) {
                let names = (inside.clone(), namespace.clone(), pod.clone(), assignment.container.clone());
                add(all.by_name.entry(names).or_default(), &gpus, source);
            }
        }
        all
    }

    /// The container of this pod with GPUs, if it is the only one.
    pub fn only_container_of(&self, pod: &ContainerLabels) -> Option<&str> {
        let uid = pod.pod_uid.as_deref();
        let (namespace, name) = (pod.text(Label::Namespace), pod.text(Label::Pod));
        let inside = inside(pod);
        let of_uid = self.by_uid.iter().filter(|((of_node, of, _), _)| *of_node == inside && Some(of.as_str()) == uid);
        let is_named =
            |of_node: &Inside, in_namespace: &str, of: &str| *of_node == inside && in_namespace == namespace && of == name;
        let of_name = self.by_name.iter().filter(|((of_node, in_namespace, of, _), _)| is_named(of_node, in_namespace, of));
        // Also one with devices of which it is not known which GPU they are.
        let by_uid = of_uid.map(|((.., container), _)| container);
        let by_name = of_name.map(|((.., container), _)| container);
        let mut all = by_uid.chain(by_name);
        let first = all.next()?;
        all.all(|other| other == first).then_some(first)
    }

    /// Indices into the snapshot's GPUs.
    pub fn gpus_of(&self, labels: &ContainerLabels, snapshot: &Snapshot) -> Vec<(usize, AssignmentSource)> {
        if self.reserves(labels.text(Label::Namespace)) {
            return Vec::new();
        }
        let by_kubelet = self.by_kubelet(labels);
        // In another container a tenant writes specifications, and their numbers are those of that container's GPUs.
        let counts = by_kubelet.is_empty() && labels.kind == Kind::Container && labels.outer_container_id.is_none();
        match labels.visible.as_deref().filter(|_| counts) {
            None => by_kubelet,
            Some(VisibleGpus::All) if self.assigns_gpus && labels.in_pod() => by_kubelet,
            Some(VisibleGpus::All) => {
                let leaves = snapshot.gpus.iter().enumerate().filter(|(_, gpu)| gpu.info.is_leaf());
                leaves.map(|(gpu, _)| (gpu, AssignmentSource::Bundle)).collect()
            }
            Some(VisibleGpus::These(devices)) => {
                let gpus: BTreeSet<usize> = devices.iter().filter_map(|device| gpu_of(device, snapshot)).collect();
                gpus.into_iter().map(|gpu| (gpu, AssignmentSource::Bundle)).collect()
            }
        }
    }

    /// Whether the pods of this namespace only hold the place of others.
    pub fn reserves(&self, namespace: &str) -> bool {
        self.reservations.iter().any(|reserved| reserved == namespace)
    }

    /// Empty if the name of the container within its pod is unknown.
    fn by_kubelet(&self, labels: &ContainerLabels) -> Vec<(usize, AssignmentSource)> {
        let text = |label| labels.text(label).to_owned();
        let container = text(Label::Container);
        if container.is_empty() || self.by_uid.is_empty() && self.by_name.is_empty() {
            return Vec::new();
        }
        let uid = labels.pod_uid.as_ref();
        let by_uid = uid.and_then(|uid| self.by_uid.get(&(inside(labels), uid.clone(), container.clone())));
        let by_name = self.by_name.get(&(inside(labels), text(Label::Namespace), text(Label::Pod), container));
        by_uid.or(by_name).into_iter().flatten().map(|(gpu, source)| (*gpu, *source)).collect()
    }
}

/// The container around a container.
fn inside(labels: &ContainerLabels) -> Inside {
    labels.outer_container_id.as_deref().map(str::to_owned)
}

/// A MIG device that could not be opened as a device resolves to its GPU.
pub fn gpu_of(device: &Device, snapshot: &Snapshot) -> Option<usize> {
    let is_whole = |info: &GpuInfo| info.parent.is_none();
    let find = |is_device: &dyn Fn(&GpuInfo) -> bool| snapshot.gpus.iter().position(|gpu| is_device(&gpu.info));
    match device {
        Device::Uuid(uuid) => find(&|info| *info.uuid.0 == **uuid),
        Device::Index(index) => find(&|info| is_whole(info) && info.index == *index),
        Device::Minor(minor) => find(&|info| is_whole(info) && info.minor == Some(*minor)),
        Device::Mig(uuid) => find(&|info| *info.uuid.0 == **uuid).or_else(|| find(&|info| info.mig_uuids.contains(uuid))),
        // Never the whole GPU.
        Device::Instance { minor, gpu_instance } => {
            let parent = find(&|info| is_whole(info) && info.minor == Some(*minor))?;
            let parent = &snapshot.gpus[parent].info.uuid;
            let is_in_instance =
                |info: &GpuInfo| info.parent.as_ref() == Some(parent) && info.gpu_instance == Some(*gpu_instance);
            // Several of them may share one.
            let mut all = (0..snapshot.gpus.len()).filter(|index| is_in_instance(&snapshot.gpus[*index].info));
            all.next().filter(|_| all.next().is_none())
        }
        Device::Unknown(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sampler_core::cgroup_path::parse;
    use sampler_core::device::MigMode;
    use sampler_core::identity::ContainerRecord;
    use sampler_core::units::{BootNs, ContainerKey, GpuUuid};
    use sampler_labels::{Assignment, Facts, Source};

    use super::super::ledger::tests::gpu_view;
    use super::*;

    const UID: &str = "8bb25662-de9a-11e9-84e7-f8f21e04010c";

    /// Two GPUs, of which the second one has two MIG devices.
    fn node() -> Snapshot {
        let gpu = |uuid: &str, minor, parent: Option<&str>, gpu_instance, mig_uuids: &[&str]| {
            gpu_view(GpuInfo {
                uuid: GpuUuid(uuid.into()),
                index: minor,
                minor: Some(minor),
                parent: parent.map(|parent| GpuUuid(parent.into())),
                gpu_instance,
                mig_uuids: mig_uuids.iter().map(|uuid| (*uuid).to_owned()).collect(),
                mig_mode: if mig_uuids.is_empty() { MigMode::Disabled } else { MigMode::Enabled },
                ..GpuInfo::default()
            })
        };
        let migs = ["MIG-a", "MIG-b"];
        let gpus = vec![
            gpu("GPU-0", 0, None, None, &[]),
            gpu("GPU-1", 1, None, None, &migs),
            gpu("MIG-a", 1, Some("GPU-1"), Some(3), &[]),
            gpu("MIG-b", 1, Some("GPU-1"), Some(7), &[]),
        ];
        Snapshot { gpus, ..Snapshot::default() }
    }

    fn labels(path: &str, namespace: &str, container: &str, visible: Option<VisibleGpus>) -> ContainerLabels {
        let (identity, key, cgroup_path) = (parse(path), ContainerKey(1), path.to_owned());
        let record = ContainerRecord { key, cgroup_path, identity, created: BootNs(0), creation_seen: true };
        let mut labels = ContainerLabels::from_path(&record);
        let mut facts = Facts { pod_status_known: true, visible, ..Facts::default() };
        for (label, text) in [(Label::Namespace, namespace), (Label::Container, container)] {
            facts.set(label, Some(text));
        }
        labels.merge(Source::Bundle, &facts);
        labels
    }

    fn pod(id: char) -> String {
        format!("/kubepods/pod{UID}/{}", id.to_string().repeat(64))
    }

    fn view(devices: &[&str], inside: Option<String>) -> AssignedView {
        let assignment = |id: &&str| Assignment {
            pod_uid: Some(UID.into()),
            container: "main".into(),
            resource: "nvidia.com/gpu".into(),
            device_ids: vec![(*id).to_owned()],
            inside: inside.clone(),
            ..Assignment::default()
        };
        AssignedView { assignments: devices.iter().map(assignment).collect(), assigns_gpus: !devices.is_empty() }
    }

    /// Indices of GPUs, each with the source's name.
    fn gpus(view: &AssignedView, labels: &ContainerLabels) -> Vec<(usize, &'static str)> {
        let reservations: Arc<[String]> = ["reserved".to_owned()].into();
        let node = node();
        let all = AssignedGpus::new(view, &node, reservations);
        all.gpus_of(labels, &node).into_iter().map(|(gpu, source)| (gpu, source.name())).collect()
    }

    #[test]
    fn the_kubelets_lists_come_before_what_the_specification_shows() {
        let of_spec = |devices: &[Device]| Some(VisibleGpus::These(devices.to_vec()));
        let first = || of_spec(&[Device::Index(0)]);
        assert_eq!(gpus(&view(&["MIG-b"], None), &labels(&pod('a'), "ml", "main", first())), [(3, "checkpoint")]);
        // A fraction of a GPU: a reservation pod has it in the kubelet's lists.
        assert_eq!(gpus(&view(&["GPU-0"], None), &labels(&pod('a'), "ml", "other", first())), [(0, "bundle")]);
        assert_eq!(gpus(&view(&["GPU-0"], None), &labels(&pod('a'), "reserved", "main", first())), []);
        assert_eq!(
            gpus(
                &view(&[], None),
                &labels(&format!("/docker/{}", "a".repeat(64)), "", "", of_spec(&[Device::Mig("MIG-a".into())]))
            ),
            [(2, "bundle")]
        );
    }

    #[test]
    fn all_gpus_are_those_of_a_node_without_a_plugin() {
        let all = || Some(VisibleGpus::All);
        let leaves = [(0, "bundle"), (2, "bundle"), (3, "bundle")];
        assert_eq!(gpus(&view(&[], None), &labels(&pod('a'), "ml", "main", all())), leaves);
        // An exporter on a node with a device plugin.
        assert_eq!(gpus(&view(&["GPU-0"], None), &labels(&pod('a'), "monitoring", "exporter", all())), []);
        assert_eq!(gpus(&view(&["GPU-0"], None), &labels(&format!("/docker/{}", "a".repeat(64)), "", "", all())), leaves);
    }

    #[test]
    fn a_kubelet_in_a_container_assigns_to_containers_in_that_one() {
        let node = "b".repeat(64);
        let nested = format!("/docker/{node}/kubelet/{}", pod('a').trim_start_matches('/'));
        let nested = labels(&nested, "ml", "main", None);
        assert_eq!(nested.outer_container_id.as_deref(), Some(&*node));
        assert_eq!(gpus(&view(&["GPU-0"], Some(node)), &nested), [(0, "checkpoint")]);
        assert_eq!(gpus(&view(&["GPU-0"], Some("c".repeat(64))), &nested), []);
        assert_eq!(gpus(&view(&["GPU-0"], None), &nested), [], "a tenant may name a pod after another one");
        assert_eq!(gpus(&view(&["GPU-0"], Some("c".repeat(64))), &labels(&pod('a'), "ml", "main", None)), []);
        let nested = format!("/docker/{}/docker/{}", "a".repeat(64), "b".repeat(64));
        assert_eq!(gpus(&view(&[], None), &labels(&nested, "", "", Some(VisibleGpus::All))), []);
    }

    #[test]
    fn an_instance_of_gke_is_the_mig_device_with_its_number() {
        let main = || labels(&pod('a'), "ml", "main", None);
        assert_eq!(gpus(&view(&["nvidia1/gi7"], None), &main()), [(3, "checkpoint")]);
        assert_eq!(gpus(&view(&["nvidia1/gi3/vgpu0"], None), &main()), [(2, "checkpoint")]);
        assert_eq!(gpus(&view(&["nvidia1/gi1"], None), &main()), []);
    }
}
