//! Who holds a GPU, and how that is known: the answer to `/api/v1/explain?gpu=`.
//!
//! An assignment is known from one source, the most exact one; processes on the GPU are listed by the driver. Assignments without a running
//! container are listed, too: reservation pods, containers that have not started, and those that have ended but keep their GPU.

use sampler_core::device::{GpuInfo, Reason};
use sampler_core::snapshot::{GpuView, Snapshot};
use sampler_labels::{Assignment, Label};
use serde::{Deserialize, Serialize};

use super::assigned::gpu_of;
use super::exposition::{ExportedPair, Exposition};

/// Unknown values are null.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GpuHolders {
    pub uuid: String,
    pub index: u32,
    pub model: String,
    pub pci_bus_id: Option<String>,
    /// UUIDs of its MIG devices; the holders are theirs.
    pub mig_devices: Vec<String>,
    /// Longest GPU time first; of processes without a user, the GPU time of all such processes.
    pub holders: Vec<GpuHolder>,
    /// Assignments without a running container.
    pub unplaced: Vec<UnplacedAssignment>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GpuHolder {
    /// container, pod, job, unit, login; host for processes outside of these, unknown for those that are not resolved.
    pub kind: String,
    /// The UID of a pod, the short name of a job, unit or login session.
    pub container_id: String,
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub container: Option<String>,
    pub name: Option<String>,
    /// The GPU or MIG device.
    pub uuid: String,
    /// What the holding is known from: checkpoint, claim, pod-resources, bundle, process-list.
    pub known_from: Vec<String>,
    pub memory_used_bytes: Option<u64>,
    pub gpu_seconds: f64,
    pub duty_cycle_percent: Option<f64>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct UnplacedAssignment {
    pub source: String,
    pub resource: String,
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub pod_uid: Option<String>,
    pub container: String,
    /// It reserves the GPU for other pods.
    pub reservation: bool,
}

/// The assignments of containers that the export knows: whether one is that of this container.
fn is_of(assignment: &Assignment, pair: &ExportedPair) -> bool {
    let text = |label| pair.labels.text(label);
    let is_same_pod = match (&assignment.pod_uid, &pair.labels.pod_uid) {
        (Some(uid), Some(known)) => uid == known,
        _ => {
            let names = (assignment.namespace.as_deref(), assignment.pod.as_deref());
            names == (Some(text(Label::Namespace)), Some(text(Label::Pod)))
        }
    };
    let is_same_node = assignment.inside.as_deref() == pair.labels.outer_container_id.as_deref();
    is_same_node && is_same_pod && assignment.container == text(Label::Container)
}

impl GpuHolders {
    /// `selector`: a UUID or an index. `is_reservation`: the pod of this assignment holds the place of others. `None` if there is no such GPU.
    pub fn find(
        selector: &str,
        page: &Exposition,
        snapshot: &Snapshot,
        assignments: &[Assignment],
        is_reservation: impl Fn(&Assignment) -> bool,
    ) -> Option<Self> {
        let is_selected =
            |info: &GpuInfo| *info.uuid.0 == *selector || info.parent.is_none() && info.index.to_string() == selector;
        let gpu = &page.gpus.iter().find(|gpu| is_selected(&gpu.view.info))?.view.info;
        let is_part = |info: &GpuInfo| info.uuid == gpu.uuid || info.parent.as_ref() == Some(&gpu.uuid);
        let pairs: Vec<&ExportedPair> = page.pairs.iter().filter(|pair| is_part(&pair.device)).collect();
        // The process of a sample may be missing in the last list.
        let holds = |pair: &&&ExportedPair| {
            let is_in_use = pair.usage.duty_cycle_percent.is_some_and(|percent| percent > 0.0);
            !pair.gone && (pair.assigned.is_some() || pair.usage.is_listed || is_in_use)
        };
        let mut holders: Vec<GpuHolder> = pairs.iter().filter(holds).map(|pair| GpuHolder::new(pair)).collect();
        let parts = page.gpus.iter().map(|gpu| &gpu.view).filter(|view| is_part(&view.info));
        holders.extend(parts.flat_map(|view| view.unattributed_holders.iter().map(|held| GpuHolder::unattributed(view, *held))));
        holders.sort_by(|a, b| b.gpu_seconds.total_cmp(&a.gpu_seconds));
        // In a container a tenant may have written anything.
        let of_node = assignments.iter().filter(|assignment| assignment.inside.is_none());
        let is_here = |assignment: &&Assignment| {
            let mut gpus = assignment.devices().into_iter().filter_map(|device| gpu_of(&device, snapshot));
            gpus.any(|index| is_part(&snapshot.gpus[index].info))
        };
        let is_placed = |assignment: &Assignment| pairs.iter().any(|pair| !pair.gone && is_of(assignment, pair));
        let unplaced = of_node.filter(is_here).filter(|assignment| !is_placed(assignment));
        let migs = page.gpus.iter().filter(|other| other.view.info.parent.as_ref() == Some(&gpu.uuid));
        Some(Self {
            uuid: gpu.uuid.0.to_string(),
            index: gpu.index,
            model: gpu.model.clone(),
            pci_bus_id: Some(gpu.pci_bus_id.clone()).filter(|id| !id.is_empty()),
            mig_devices: migs.map(|mig| mig.view.info.uuid.0.to_string()).collect(),
            holders,
            unplaced: unplaced.map(|assignment| UnplacedAssignment::new(assignment, is_reservation(assignment))).collect(),
        })
    }
}

impl GpuHolder {
    fn new(pair: &ExportedPair) -> Self {
        let text = |label| Some(pair.labels.text(label)).filter(|text| !text.is_empty()).map(str::to_owned);
        let assigned = pair.assigned.map(|source| source.name().to_owned());
        Self {
            kind: pair.labels.kind.user_kind().to_owned(),
            container_id: pair.container_id.to_string(),
            namespace: text(Label::Namespace),
            pod: text(Label::Pod),
            container: text(Label::Container),
            name: text(Label::Name),
            uuid: pair.gpu().0.to_string(),
            known_from: assigned.into_iter().chain(pair.usage.is_listed.then(|| "process-list".to_owned())).collect(),
            memory_used_bytes: pair.usage.memory_used_bytes,
            gpu_seconds: pair.usage.seconds,
            duty_cycle_percent: pair.usage.duty_cycle_percent,
        }
    }

    /// Processes without a user. Their GPU time is not that of holders alone.
    fn unattributed(gpu: &GpuView, (reason, memory_used_bytes): (Reason, Option<u64>)) -> Self {
        let kind = if reason == Reason::Host { "host" } else { "unknown" };
        Self {
            kind: kind.to_owned(),
            container_id: reason.name().to_owned(),
            uuid: gpu.info.uuid.0.to_string(),
            known_from: vec!["process-list".to_owned()],
            memory_used_bytes,
            gpu_seconds: gpu.unattributed[reason as usize],
            ..Self::default()
        }
    }
}

impl UnplacedAssignment {
    fn new(assignment: &Assignment, reservation: bool) -> Self {
        Self {
            source: assignment.source.name().to_owned(),
            resource: assignment.resource.clone(),
            namespace: assignment.namespace.clone(),
            pod: assignment.pod.clone(),
            pod_uid: assignment.pod_uid.clone(),
            container: assignment.container.clone(),
            reservation,
        }
    }
}
