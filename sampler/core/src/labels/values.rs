//! Label values, each with the source that gave it.

use std::sync::Arc;

use super::path::{Kind, Runtime};
use crate::identity::ContainerRecord;

/// Longer values are cut here: they end up in every sample of a series. Kubernetes' own names end at 253 bytes.
const MAX_VALUE_BYTES: usize = 1024;

/// Where a label came from; names as in the `source` label and in `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    Cgroup,
    Bundle,
    DockerFile,
    CrioFile,
    PodmanFile,
    Logs,
    Mountinfo,
    Manifest,
    Kubelet,
    Docker,
    Podman,
    Cri,
    Crio,
}

impl Source {
    /// Those that are asked; the path is only read.
    pub const ASKED: [Source; 12] = [
        Source::Bundle,
        Source::DockerFile,
        Source::CrioFile,
        Source::PodmanFile,
        Source::Logs,
        Source::Mountinfo,
        Source::Manifest,
        Source::Kubelet,
        Source::Docker,
        Source::Podman,
        Source::Cri,
        Source::Crio,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Source::Cgroup => "cgroup",
            Source::Bundle => "bundle",
            Source::DockerFile => "docker-file",
            Source::CrioFile => "crio-file",
            Source::PodmanFile => "podman-file",
            Source::Logs => "logs",
            Source::Mountinfo => "mountinfo",
            Source::Manifest => "manifest",
            Source::Kubelet => "kubelet",
            Source::Docker => "docker",
            Source::Podman => "podman",
            Source::Cri => "cri",
            Source::Crio => "crio",
        }
    }

    /// A socket races the container's creation and may hang; a file does neither.
    pub fn is_socket(self) -> bool {
        matches!(self, Source::Kubelet | Source::Docker | Source::Podman | Source::Cri | Source::Crio)
    }

    /// A higher one may overwrite: the runtime's own record, then the pods' API, then names found in paths.
    pub fn authority(self) -> u8 {
        match self {
            Source::Cgroup | Source::Logs | Source::Mountinfo => 1,
            Source::Kubelet | Source::Manifest => 2,
            Source::Bundle
            | Source::DockerFile
            | Source::CrioFile
            | Source::PodmanFile
            | Source::Docker
            | Source::Podman
            | Source::Cri
            | Source::Crio => 3,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Label {
    Name,
    Image,
    Namespace,
    Pod,
    Container,
}

impl Label {
    pub const ALL: [Label; 5] = [Label::Name, Label::Image, Label::Namespace, Label::Pod, Label::Container];

    pub fn name(self) -> &'static str {
        match self {
            Label::Name => "name",
            Label::Image => "image",
            Label::Namespace => "namespace",
            Label::Pod => "pod",
            Label::Container => "container",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelValue {
    pub value: Arc<str>,
    pub source: Source,
}

/// What one source says about one container. Absent and empty are the same: neither overwrites anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Indexed like [`Label::ALL`].
    pub labels: [Option<String>; Label::ALL.len()],
    pub pod_uid: Option<String>,
    pub runtime: Option<Runtime>,
    pub sandbox: bool,
    /// The source would have known of a pod: without one there is none.
    pub knows_pods: bool,
}

impl Facts {
    pub fn set(&mut self, label: Label, value: Option<&str>) {
        if let Some(value) = value.filter(|v| !v.is_empty()) {
            self.labels[label as usize] = Some(value.to_owned());
        }
    }

    /// Fills what is still empty from dockershim's `k8s_<container>_<pod>_<namespace>_<uid>_<attempt>`.
    pub fn from_dockershim_name(&mut self, name: &str) {
        let parts: Vec<&str> = name.split('_').collect();
        if let ["k8s", container, pod, namespace, uid, _attempt] = parts[..] {
            for (label, value) in [(Label::Container, container), (Label::Pod, pod), (Label::Namespace, namespace)] {
                if self.labels[label as usize].is_none() {
                    self.set(label, Some(value));
                }
            }
            self.pod_uid.get_or_insert_with(|| uid.to_owned());
            self.sandbox |= container == "POD";
        }
    }
}

/// A container's labels at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerLabels {
    /// The cgroup path of the container's root; never blank.
    pub id: Arc<str>,
    pub container_id: Arc<str>,
    pub kind: Kind,
    pub runtime: Option<Runtime>,
    pub pod_uid: Option<String>,
    /// Indexed like [`Label::ALL`].
    values: [Option<LabelValue>; Label::ALL.len()],
    /// Whether a source has answered that would have known of a pod.
    pods_known: bool,
    /// Complete, or old enough to be shown with what is known.
    pub settled: bool,
    /// From the cgroup's creation to complete; `None` until then, or when the creation was not seen.
    pub resolved_after_ns: Option<u64>,
}

impl ContainerLabels {
    pub fn from_path(record: &ContainerRecord) -> Self {
        let identity = &record.identity;
        Self {
            id: record.cgroup_path.as_str().into(),
            container_id: identity.container_id.as_deref().unwrap_or_default().into(),
            kind: identity.kind,
            runtime: identity.runtime,
            pod_uid: identity.pod_uid.clone(),
            values: Default::default(),
            pods_known: false,
            settled: false,
            resolved_after_ns: None,
        }
    }

    pub fn get(&self, label: Label) -> Option<&LabelValue> {
        self.values[label as usize].as_ref()
    }

    /// The value as exported: blank when unknown.
    pub fn text(&self, label: Label) -> &str {
        self.get(label).map_or("", |v| &v.value)
    }

    /// Later answers of the same rank win; all of this sources are the runtime's own word.
    pub fn merge(&mut self, source: Source, facts: &Facts) {
        for (slot, value) in self.values.iter_mut().zip(&facts.labels) {
            if let Some(value) = value.as_deref().filter(|v| !v.is_empty()) {
                *slot = Some(LabelValue { value: bounded(value).into(), source });
            }
        }
        if facts.pod_uid.is_some() {
            self.pod_uid.clone_from(&facts.pod_uid);
        }
        self.runtime = facts.runtime.or(self.runtime);
        if facts.sandbox {
            self.kind = Kind::Sandbox;
        }
        self.pods_known |= facts.knows_pods;
    }

    fn in_pod(&self) -> bool {
        self.pod_uid.is_some() || [Label::Namespace, Label::Pod].iter().any(|l| self.get(*l).is_some())
    }

    /// Whether this kind of container can have the label; `None` while nobody has said.
    fn applies(&self, label: Label) -> Option<bool> {
        match label {
            Label::Image if self.kind == Kind::Sandbox => Some(false),
            Label::Container if self.kind == Kind::Sandbox => Some(false),
            Label::Name | Label::Image => Some(true),
            Label::Namespace | Label::Pod | Label::Container => match (self.in_pod(), self.pods_known) {
                (true, _) => Some(true),
                (false, true) => Some(false),
                (false, false) => None,
            },
        }
    }

    /// Labels that a container of this kind should have and this one lacks.
    pub fn missing(&self) -> impl Iterator<Item = Label> + '_ {
        Label::ALL.into_iter().filter(|l| self.get(*l).is_none() && self.applies(*l) == Some(true))
    }

    /// Labels that a container of this kind cannot have.
    pub fn not_applicable(&self) -> impl Iterator<Item = Label> + '_ {
        Label::ALL.into_iter().filter(|l| self.get(*l).is_none() && self.applies(*l) == Some(false))
    }

    pub fn complete(&self) -> bool {
        Label::ALL.iter().all(|l| self.get(*l).is_some() || self.applies(*l) == Some(false))
    }
}

fn bounded(value: &str) -> &str {
    let mut end = value.len().min(MAX_VALUE_BYTES);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    &value[..end]
}
