//! A pure parser, without IO, of the identity in a cgroup path: a container, pod, job, unit or login session.
//!
//! ```text
//!  scan     from leaf to root: visits the segments that may be relevant, skips all others many at a time
//!  segment  classifies one of them by its name and its position: root of a container, monitor, pod
//!  parse    the innermost container is the result, the next container around it is the outer one
//!  host_user   jobs, units and login sessions, from the root on: what is outside of containers, or a job inside of one
//! ```
//! Guarantees: any text is accepted, in linear time (the bench `core` has the worst cases). There is one identity for each container root:
//! a sub-cgroup of any name belongs to the container that it is in, and the path of the root gives the same identity. Ids are complete.
//!
//! The parser does not guess: a path that no runtime would create is not a container. 64 hex digits somewhere in the path are not
//! sufficient (services, monitors), and neither is a name that any user may give to a cgroup. It does not check whether the container still
//! exists, and it does not detect containers that share the cgroup of their sandbox (gVisor) or have no cgroup on the host (Kata).
//!
//! ```
//! use sampler_core::cgroup_path::{Kind, Runtime, parse};
//!
//! let id = "4f1c0a".repeat(10) + "beef";
//! let pod = "kubepods-burstable-pod8bb25662_de9a_11e9_84e7_f8f21e04010c.slice";
//! let root = format!("/kubepods.slice/kubepods-burstable.slice/{pod}/cri-containerd-{id}.scope");
//! let identity = parse(&format!("{root}/init.scope"));
//!
//! assert_eq!((identity.kind, identity.runtime), (Kind::Container, Some(Runtime::Containerd)));
//! assert_eq!(identity.container_id, Some(id));
//! assert_eq!(identity.pod_uid.as_deref(), Some("8bb25662-de9a-11e9-84e7-f8f21e04010c"));
//! // `/init.scope` is a sub-cgroup of the container.
//! assert_eq!(identity.root_len, root.len());
//! let job = parse("/system.slice/slurmstepd.scope/job_7/step_0/user/task_1");
//! assert_eq!((job.kind, job.host_user.map(|user| user.name())), (Kind::Job, Some("slurm/7".to_owned())));
//! assert_eq!(parse("/system.slice").kind, Kind::NotContainer);
//! ```

mod host_user;
#[cfg(test)]
mod host_user_tests;
mod scan;
mod segment;
#[cfg(test)]
mod tests;

pub use host_user::{HostUser, Job, Login, Scheduler, Unit};

use std::ops::ControlFlow;

use segment::{Member, Segment};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Kind {
    Container,
    Sandbox,
    Pod,
    Monitor,
    Build,
    Job,
    Unit,
    Login,
    NotContainer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Runtime {
    Docker,
    Containerd,
    CriO,
    Podman,
    Rkt,
    Lxc,
    Nspawn,
    Garden,
    Mesos,
    Ecs,
}

impl Runtime {
    /// The value of the `runtime` label.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl Kind {
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// As a user of GPUs. A sandbox is a container.
    pub fn user_kind(self) -> &'static str {
        match self {
            Kind::Pod | Kind::Job | Kind::Unit | Kind::Login => self.name(),
            Kind::Container | Kind::Sandbox | Kind::Monitor | Kind::Build | Kind::NotContainer => Kind::Container.name(),
        }
    }
}

/// Characters of a container's id that distinguish it on a machine.
const SHORT_ID_CHARS: usize = 12;

/// The identity in one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupIdentity {
    pub kind: Kind,
    /// `None` where the path does not determine it (plain `kubepods/.../<id>`), and for what is not a container.
    pub runtime: Option<Runtime>,
    /// Set for a container or sandbox only.
    pub container_id: Option<String>,
    /// The name that users see, where the path contains it: lxc, nspawn, and the app of a rkt pod.
    pub name: Option<String>,
    /// The pod of the innermost container. With dashes if it is a UUID.
    pub pod_uid: Option<String>,
    /// The nearest container around the innermost one, or around the job.
    pub outer_container_id: Option<String>,
    /// The job, unit or login session, if that is the kind.
    pub host_user: Option<HostUser>,
    /// The job around a container.
    pub outer_job: Option<Job>,
    /// Length, in bytes, of the path of the root of the container, pod, job, unit or login session: everything after it is a sub-cgroup of
    /// the same one.
    pub root_len: usize,
}

impl CgroupIdentity {
    pub fn is_container(&self) -> bool {
        matches!(self.kind, Kind::Container | Kind::Sandbox)
    }

    /// Names one container, pod, job, unit or login session of the machine: the id of a container, the UID of a pod, else as
    /// [`HostUser::name`], with the beginning of the container's id for a job inside a container: each may have a scheduler of its own.
    pub fn short_name(&self) -> String {
        match (&self.host_user, &self.outer_container_id) {
            (Some(user), Some(around)) => {
                // Other ids are names.
                let is_full_id = around.len() == 64 && around.bytes().all(|byte| byte.is_ascii_hexdigit());
                let short = around.get(..SHORT_ID_CHARS).filter(|_| is_full_id).unwrap_or(around);
                format!("{short}/{}", user.name())
            }
            (Some(user), None) => user.name(),
            (None, _) if self.kind == Kind::Pod => self.pod_uid.clone().unwrap_or_default(),
            (None, _) => self.container_id.clone().unwrap_or_default(),
        }
    }

    /// Whether the cgroup is that of a container or pod, or inside one.
    pub fn is_in_container(&self) -> bool {
        let is_inside = self.outer_container_id.is_some() || self.pod_uid.is_some();
        is_inside || matches!(self.kind, Kind::Container | Kind::Sandbox | Kind::Pod | Kind::Build)
    }
}

pub fn parse(path: &str) -> CgroupIdentity {
    if !path.is_empty() && !path.starts_with('/') {
        let mut identity = parse(&format!("/{path}"));
        identity.root_len = identity.root_len.saturating_sub(1);
        return identity;
    }
    let mut reading = Reading { inner: Segment::leaf(path).monitor(), ..Reading::default() };
    scan::leaf_to_root(path.as_bytes(), |start, end| reading.take(&Segment::new(path, start, end), end));
    let mut identity = reading.identity();
    identity.add_host_user(path);
    identity
}

/// The result of the segments so far, from leaf to root.
#[derive(Default)]
struct Reading<'a> {
    inner: Option<Member<'a>>,
    outer: Option<Member<'a>>,
    /// As in the path.
    pod_uid: Option<&'a str>,
}

impl<'a> Reading<'a> {
    #[inline]
    fn take(&mut self, segment: &Segment<'a>, end: usize) -> ControlFlow<()> {
        let member = segment.member();
        if let Some(member) = member {
            match &self.inner {
                // A parent that names the runtime of its child (`lxc/N`) may yield the same root as the child itself.
                Some(inner) if member.root_len < inner.root_len => {
                    if member.is_container() {
                        self.outer = Some(member);
                        // A pod further out belongs to the outer container.
                        return ControlFlow::Break(());
                    }
                }
                _ => self.set_inner(member),
            }
        }
        if self.pod_uid.is_none() {
            self.pod_uid = segment.pod_uid(member.is_some());
            if self.pod_uid.is_some() {
                self.set_inner(Member::of(Kind::Pod, None, end));
            }
        }
        ControlFlow::Continue(())
    }

    /// Sets the innermost member, if there is none yet. Anything else about the same cgroup replaces a monitor that has only a name.
    fn set_inner(&mut self, member: Member<'a>) {
        let replaceable = |inner: Member<'_>| inner.kind == Kind::Monitor && inner.root_len == member.root_len;
        if self.inner.is_none_or(replaceable) {
            self.inner = Some(member);
        }
    }

    fn identity(self) -> CgroupIdentity {
        let inner = self.inner.unwrap_or(Member::of(Kind::NotContainer, None, 0));
        CgroupIdentity {
            kind: inner.kind,
            runtime: inner.runtime,
            container_id: inner.id.map(|id| inner.text(id)),
            name: inner.name.map(|name| inner.text(name)),
            // Names of systemd units have `_` instead of `-`.
            pod_uid: self.pod_uid.map(|uid| uid.replace('_', "-")),
            outer_container_id: self.outer.and_then(|outer| Some(outer.text(outer.id?))),
            host_user: None,
            outer_job: None,
            root_len: inner.root_len,
        }
    }
}
