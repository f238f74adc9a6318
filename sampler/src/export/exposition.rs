//! What is exposed: GPUs, and pairs of a container and a GPU with their labels and contenders.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use sampler_core::device::GpuInfo;
use sampler_core::snapshot::{ContainerGpu, ContainerWaits, GpuView, Other, Snapshot};
use sampler_core::units::{ContainerKey, GpuUuid, WallTime};
use sampler_labels::{AssignmentSource, ContainerLabels, Label};

use super::encode::label_block;
use super::label_text::ContainerText;

/// One (container, GPU) pair as exposed; or that of another user and a GPU.
#[derive(Clone, Debug)]
pub struct ExportedPair {
    pub key: ContainerKey,
    /// The container's own id, unless another exposed container has the same one. The UID of a pod, the name of another user.
    pub container_id: Arc<str>,
    pub labels: Arc<ContainerLabels>,
    pub device: Arc<GpuInfo>,
    pub memory_total_bytes: Option<u64>,
    pub usage: ContainerGpu,
    /// When its counters were 0; `None` while the export has no state of it.
    pub created: Option<WallTime>,
    /// Those of `usage.contention` that may be exposed; empty in a page without them.
    pub contenders: Vec<ExportedContender>,
    /// Its last cgroup was removed.
    pub gone: bool,
    /// Where it is known from that the GPU, or a part of it, is assigned to the container; `None` if it is not.
    pub assigned: Option<AssignmentSource>,
    /// Of all its processes, on whichever GPU; `None` if none was ever probed.
    pub waits: Option<ContainerWaits>,
    /// For how long it has held the GPU without using it; 0 but in a scrape.
    pub held_idle_seconds: f64,
    /// Empty but in a scrape.
    pub text: Arc<ContainerText>,
}

impl ExportedPair {
    /// The labels of the container, for families that are not of a single GPU.
    pub fn container_block(&self) -> String {
        label_block(&[
            ("namespace", self.labels.text(Label::Namespace)),
            ("pod", self.labels.text(Label::Pod)),
            ("container", self.labels.text(Label::Container)),
            ("container_id", &self.container_id),
        ])
    }

    pub fn gpu(&self) -> &GpuUuid {
        &self.device.uuid
    }

    /// Whether the user is a job, unit or login session: it is not in the families of containers.
    pub fn is_host_user(&self) -> bool {
        self.labels.host_user.is_some()
    }
}

#[derive(Clone, Debug)]
pub struct ExportedGpu {
    pub view: GpuView,
    /// Busy seconds minus those that wait for labels.
    pub busy_seconds: f64,
    /// (namespace, kind of user) -> seconds; a blank namespace for users without one.
    pub credited: BTreeMap<(String, &'static str), f64>,
    /// When its counters were 0.
    pub created: Option<WallTime>,
}

#[derive(Clone, Debug, Default)]
pub struct Exposition {
    /// That of the snapshot.
    pub at: WallTime,
    pub gpus: Vec<ExportedGpu>,
    pub pairs: Vec<ExportedPair>,
    /// (state, runtime) -> containers.
    pub containers: BTreeMap<(&'static str, &'static str), u64>,
    /// Label -> live containers that lack it.
    pub missing: BTreeMap<&'static str, u64>,
    /// Pods that are exposed as their only container with a GPU.
    pub only_containers: HashMap<ContainerKey, Arc<ContainerLabels>>,
}

/// Another user of a container's GPU, and the GPU time that it received while the container was active and the GPU was saturated.
#[derive(Clone, Debug)]
pub struct ExportedContender {
    pub other: Other,
    /// `None` for host processes, unknown ones and the rest.
    pub labels: Option<Arc<ContainerLabels>>,
    /// As exported; the kind if it is not a container.
    pub container_id: Arc<str>,
    /// GPU-seconds.
    pub seconds: f64,
    /// Part of the container's pressure that is attributed to it.
    pub pressure_ratio: Option<f64>,
}

/// `_other` stands for all users beyond the first few.
pub fn contender_kind(other: Other) -> &'static str {
    match other {
        Other::Container(_) => "container",
        Other::Host => "host",
        Other::Unknown => "unknown",
        Other::Rest => "_other",
    }
}

impl ExportedContender {
    pub fn kind(&self) -> &'static str {
        self.labels.as_ref().map_or(contender_kind(self.other), |labels| labels.kind.user_kind())
    }

    pub fn text(&self, label: Label) -> &str {
        match (&self.labels, label) {
            (Some(labels), Label::Container) if labels.host_user.is_some() => &self.container_id,
            (Some(labels), _) => labels.text(label),
            // A legend by this label alone is then not blank.
            (None, Label::Container) => self.kind(),
            (None, _) => "",
        }
    }

    /// The labels that distinguish its series.
    pub fn series_labels(&self) -> [(&'static str, &str); 4] {
        [
            ("other_namespace", self.text(Label::Namespace)),
            ("other_pod", self.text(Label::Pod)),
            ("other_container", self.text(Label::Container)),
            ("other_container_id", &self.container_id),
        ]
    }

    pub fn has_series_of(&self, other: &ExportedContender) -> bool {
        let labels = [Label::Namespace, Label::Pod, Label::Container];
        self.container_id == other.container_id && labels.into_iter().all(|label| self.text(label) == other.text(label))
    }
}

impl Exposition {
    /// One pair of each container, of its newest run: for families that are not of a single GPU.
    pub fn one_pair_of_each_container(&self) -> Vec<&ExportedPair> {
        let containers = || self.pairs.iter().filter(|pair| !pair.is_host_user());
        let mut newest: HashMap<&str, ContainerKey> = HashMap::new();
        for pair in containers() {
            let key = newest.entry(&*pair.labels.id).or_insert(pair.key);
            *key = pair.key.max(*key);
        }
        let mut taken = HashSet::new();
        containers().filter(|pair| newest.get(&*pair.labels.id) == Some(&pair.key) && taken.insert(pair.key)).collect()
    }

    /// Marks the pairs of assigned GPUs. Adds a pair for a GPU that is assigned but was not used yet.
    pub fn add_assigned(
        &mut self,
        key: ContainerKey,
        labels: &Arc<ContainerLabels>,
        gpus: &[(usize, AssignmentSource)],
        snapshot: &Snapshot,
    ) {
        for (n, source) in gpus {
            let Some(gpu) = snapshot.gpus.get(*n) else { continue };
            // The pairs of one container are adjacent.
            let known = self.pairs.iter_mut().rev().take_while(|pair| pair.key == key).find(|pair| *pair.gpu() == gpu.info.uuid);
            if let Some(pair) = known {
                pair.assigned = Some(*source);
                continue;
            }
            // There is no sample of it: idle, as far as the GPU was observed.
            let is_observed = gpu.utilization_ratio.is_some();
            let unused = ContainerGpu {
                gpu: *n,
                duty_cycle_percent: is_observed.then_some(0.0),
                duty_cycle_stderr: is_observed.then_some(0.0),
                memory_used_bytes: gpu.readings.memory_used_bytes.map(|_| 0),
                energy_joules: gpu.unattributed_energy.map(|_| 0.0),
                ..ContainerGpu::default()
            };
            self.pairs.push(ExportedPair { assigned: Some(*source), ..exported_pair(key, labels, gpu, &unused) });
        }
    }
}

pub fn exported_pair(key: ContainerKey, labels: &Arc<ContainerLabels>, gpu: &GpuView, usage: &ContainerGpu) -> ExportedPair {
    ExportedPair {
        key,
        container_id: Arc::clone(&labels.container_id),
        labels: Arc::clone(labels),
        device: Arc::clone(&gpu.info),
        memory_total_bytes: gpu.readings.memory_total_bytes,
        usage: usage.clone(),
        created: None,
        contenders: Vec::new(),
        gone: false,
        assigned: None,
        waits: None,
        held_idle_seconds: 0.0,
        text: Arc::default(),
    }
}
