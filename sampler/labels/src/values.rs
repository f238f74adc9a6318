//! Label values, each with its source.

use std::sync::Arc;

use sampler_core::cgroup_path::{HostUser, Kind, Runtime};
use sampler_core::identity::ContainerRecord;
use strum::{EnumCount as _, VariantArray as _};

use super::details::UserDetails;
use super::visible::VisibleGpus;

/// Longer values are truncated, since they are part of every sample of a series. Kubernetes limits its own names to 253 bytes.
const MAX_VALUE_BYTES: usize = 1024;
/// A UID has 36 characters, a static pod's 32.
const MAX_UID_BYTES: usize = 64;

/// The source of a label, with the name used in the `source` label and in `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Source {
    Cgroup,
    Bundle,
    DockerFile,
    CrioFile,
    PodmanFile,
    Logs,
    Mountinfo,
    Environ,
    Manifest,
    Kubelet,
    Docker,
    Podman,
    Cri,
    Crio,
}

impl Source {
    /// The sources that are queried: all except the cgroup path, which is parsed.
    pub const QUERIED: [Source; 13] = [
        Source::Bundle,
        Source::DockerFile,
        Source::CrioFile,
        Source::PodmanFile,
        Source::Logs,
        Source::Mountinfo,
        Source::Environ,
        Source::Manifest,
        Source::Kubelet,
        Source::Docker,
        Source::Podman,
        Source::Cri,
        Source::Crio,
    ];

    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether queries go to a socket. Unlike a file, a socket may hang, and may not know a new container yet.
    pub fn is_socket(self) -> bool {
        matches!(self, Source::Kubelet | Source::Docker | Source::Podman | Source::Cri | Source::Crio)
    }

    /// Whether it has the record of a container before it makes the cgroup, and so for all of the container's life.
    pub fn knows_before_cgroup(self) -> bool {
        matches!(self, Source::Docker | Source::Podman)
    }

    /// Whether it has the specification of a container, and so its GPUs.
    pub fn has_specification(self) -> bool {
        matches!(self, Source::Bundle | Source::CrioFile | Source::PodmanFile)
    }

    /// Whether the source can provide this label.
    pub fn provides(self, label: Label) -> bool {
        match self {
            Source::Cgroup => label == Label::Name,
            Source::Logs => matches!(label, Label::Namespace | Label::Pod | Label::Container),
            Source::Kubelet => matches!(label, Label::Namespace | Label::Pod),
            Source::Mountinfo => label == Label::Container,
            Source::Environ => false,
            _ => true,
        }
    }

    /// A higher authority may overwrite a lower one. In descending order: the runtime's own record, the pods' API, names found in paths.
    pub fn authority(self) -> u8 {
        match self {
            Source::Cgroup | Source::Logs | Source::Mountinfo | Source::Environ => 1,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::EnumCount, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Label {
    Name,
    Image,
    Namespace,
    Pod,
    Container,
}

impl Label {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelValue {
    pub value: Arc<str>,
    pub source: Source,
}

/// The values that one source provides for one container. An absent value and an empty one are equivalent: neither overwrites a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Indexed like [`Label`].
    pub labels: [Option<String>; Label::COUNT],
    pub pod_uid: Option<String>,
    pub runtime: Option<Runtime>,
    pub sandbox: bool,
    /// Only from a source that has the specification of the container.
    pub visible: Option<VisibleGpus>,
    /// Only of a job, unit or login session.
    pub details: Option<Box<UserDetails>>,
    /// The source knows whether the container is in a pod: if it reports no pod, there is none.
    pub pod_status_known: bool,
}

impl Facts {
    pub fn set(&mut self, label: Label, value: Option<&str>) {
        if let Some(value) = value.filter(|v| !v.is_empty()) {
            self.labels[label as usize] = Some(value.to_owned());
        }
    }

    /// Reads the labels that the kubelet sets on its containers.
    pub fn from_kubelet_labels<'a>(&mut self, get: impl Fn(&str) -> Option<&'a str>) {
        self.set(Label::Namespace, get("io.kubernetes.pod.namespace"));
        self.set(Label::Pod, get("io.kubernetes.pod.name"));
        self.set(Label::Container, get("io.kubernetes.container.name"));
        self.pod_uid = get("io.kubernetes.pod.uid").filter(|uid| !uid.is_empty()).map(str::to_owned);
    }

    /// Fills empty values from dockershim's name `k8s_<container>_<pod>_<namespace>_<uid>_<attempt>`.
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

/// The labels of a container at one time; or of a pod's own cgroup, a job, a unit or a login session.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerLabels {
    /// The path of the root cgroup; never empty.
    pub id: Arc<str>,
    /// The UID of a pod, the short name of a job, unit or login session.
    pub container_id: Arc<str>,
    /// It is inside another container.
    pub is_nested: bool,
    pub kind: Kind,
    pub host_user: Option<HostUser>,
    /// `None` until a process of the user was read.
    pub details: Option<Arc<UserDetails>>,
    /// The GPUs in its specification.
    pub visible: Option<Arc<VisibleGpus>>,
    /// The container, and the pod, around a job.
    pub outer_container_id: Option<Arc<str>>,
    pub runtime: Option<Runtime>,
    pub pod_uid: Option<String>,
    /// Indexed like [`Label`].
    values: [Option<LabelValue>; Label::COUNT],
    /// A source that knows whether the container is in a pod has been read.
    pod_status_known: bool,
    /// The labels are complete, or the container is old enough to be exported with incomplete labels.
    pub settled: bool,
    /// Time from the cgroup's creation until the labels were complete; `None` before that, or if the creation was not observed.
    pub resolved_after_ns: Option<u64>,
}

impl ContainerLabels {
    pub fn from_path(record: &ContainerRecord) -> Self {
        let identity = &record.identity;
        let mut labels = Self {
            id: record.cgroup_path.as_str().into(),
            container_id: identity.short_name().into(),
            is_nested: identity.outer_container_id.is_some(),
            kind: identity.kind,
            host_user: identity.host_user.clone(),
            details: None,
            visible: None,
            outer_container_id: identity.outer_container_id.as_deref().map(Into::into),
            runtime: identity.runtime,
            pod_uid: identity.pod_uid.clone(),
            values: Default::default(),
            pod_status_known: false,
            settled: false,
            resolved_after_ns: None,
        };
        let mut facts = Facts::default();
        // These runtimes have no label source; their containers are known by id.
        let unnamed = matches!(identity.runtime, Some(Runtime::Garden | Runtime::Mesos));
        facts.set(Label::Name, identity.name.as_deref().or(identity.container_id.as_deref().filter(|_| unnamed)));
        labels.merge(Source::Cgroup, &facts);
        labels
    }

    pub fn get(&self, label: Label) -> Option<&LabelValue> {
        self.values[label as usize].as_ref()
    }

    /// The value of the `state` label of `gpu_sampler_containers`.
    pub fn state(&self) -> &'static str {
        match (self.complete(), self.values.iter().any(Option::is_some)) {
            (true, _) => "complete",
            (false, true) => "partial",
            (false, false) => "identified",
        }
    }

    /// The value as exported: empty if unknown.
    pub fn text(&self, label: Label) -> &str {
        self.get(label).map_or("", |v| &v.value)
    }

    /// Merges the values of a source, label by label. An empty value changes nothing, a lower authority does not overwrite, and at equal
    /// authority the first source wins, since otherwise a series would alternate between two spellings of an image. Returns whether
    /// anything changed.
    pub fn merge(&mut self, source: Source, facts: &Facts) -> bool {
        let mut changed = false;
        // The runtime reports that there is no pod: mounts or log files that suggest one are ignored.
        let pod_overruled = self.pod_status_known && !self.in_pod() && source.authority() < 3;
        for ((label, slot), value) in Label::VARIANTS.iter().zip(&mut self.values).zip(&facts.labels) {
            if pod_overruled && matches!(label, Label::Namespace | Label::Pod | Label::Container) {
                continue;
            }
            let Some(value) = value.as_deref().map(bounded).filter(|v| !v.is_empty()) else { continue };
            let wins = slot.as_ref().is_none_or(|current| {
                source.authority() > current.source.authority() || (source == current.source && *current.value != *value)
            });
            if wins {
                *slot = Some(LabelValue { value: value.into(), source });
                changed = true;
            }
        }
        let uid = facts.pod_uid.clone().filter(|uid| !uid.is_empty() && uid.len() <= MAX_UID_BYTES);
        let pod_uid = uid.filter(|_| self.pod_uid.is_none() && !pod_overruled);
        let runtime = self.runtime.is_none().then_some(facts.runtime).flatten();
        changed |= pod_uid.is_some() || runtime.is_some();
        self.pod_uid = self.pod_uid.take().or(pod_uid);
        self.runtime = self.runtime.or(runtime);
        if let Some(details) = facts.details.as_deref().filter(|details| self.details.as_deref() != Some(details)) {
            (self.details, changed) = (Some(Arc::new(details.clone())), true);
        }
        if let Some(visible) = facts.visible.as_ref().filter(|visible| self.visible.as_deref() != Some(visible)) {
            (self.visible, changed) = (Some(Arc::new(visible.clone())), true);
        }
        if facts.sandbox && self.kind != Kind::Sandbox {
            (self.kind, changed) = (Kind::Sandbox, true);
        }
        if facts.pod_status_known && !self.pod_status_known {
            (self.pod_status_known, changed) = (true, true);
        }
        changed
    }

    /// Whether the container is known to be in a pod.
    pub fn in_pod(&self) -> bool {
        self.pod_uid.is_some() || [Label::Namespace, Label::Pod].iter().any(|l| self.get(*l).is_some())
    }

    /// Whether this kind of container can have the label; `None` while that is unknown.
    fn applies(&self, label: Label) -> Option<bool> {
        use Runtime::{Containerd, CriO, Docker, Ecs, Garden, Lxc, Mesos, Nspawn, Podman, Rkt};
        match label {
            _ if self.host_user.is_some() => Some(false),
            Label::Name | Label::Image | Label::Container if self.kind == Kind::Pod => Some(false),
            Label::Image | Label::Container if self.kind == Kind::Sandbox => Some(false),
            // These run file systems, not images.
            Label::Image if matches!(self.runtime, Some(Lxc | Nspawn | Garden | Mesos)) => Some(false),
            Label::Name | Label::Image => Some(true),
            Label::Namespace | Label::Pod | Label::Container => match (self.in_pod(), self.pod_status_known, self.runtime) {
                (true, _, _) => Some(true),
                (false, true, _) => Some(false),
                // The kubelet's containers of these runtimes are below a pod's cgroup.
                (false, false, Some(Docker | Podman | Ecs | Lxc | Nspawn | Garden | Mesos)) => Some(false),
                (false, false, None | Some(Containerd | CriO | Rkt)) => None,
            },
        }
    }

    /// Labels that this container lacks although a container of its kind has them, or may have them.
    pub fn missing(&self) -> impl Iterator<Item = Label> + '_ {
        Label::VARIANTS.iter().copied().filter(|l| self.get(*l).is_none() && self.applies(*l) != Some(false))
    }

    /// Labels that a container of this kind cannot have.
    pub fn not_applicable(&self) -> impl Iterator<Item = Label> + '_ {
        Label::VARIANTS.iter().copied().filter(|l| self.get(*l).is_none() && self.applies(*l) == Some(false))
    }

    pub fn complete(&self) -> bool {
        self.missing().next().is_none()
    }

    /// Whether a process may still show what it stands for. A unit of the machine says all by its name.
    pub fn lacks_details(&self) -> bool {
        let has_owner = |user: &HostUser| !matches!(user, HostUser::Unit(unit) if unit.uid.is_none());
        self.details.is_none() && self.host_user.as_ref().is_some_and(has_owner)
    }
}

pub(super) fn bounded(value: &str) -> &str {
    &value[..value.floor_char_boundary(MAX_VALUE_BYTES)]
}
