//! What a cgroup path says about its container: a pure parser, no IO.
//!
//! ```text
//!  scan     leaf to root, the segments that may say something, all others passed over many at a time
//!  segment  what one of them says, seen at its place: a container's root, a monitor, a pod
//!  parse    the innermost is the answer, the next container around it the outer one
//! ```
//! Promises: any text is accepted, in linear time (the bench `core` has the worst cases); one identity per container root, so a
//! sub-cgroup, whatever its name, is the container it is in; the root's own path gives the same identity; ids are whole.
//!
//! Deliberately does not guess: where no runtime would have made the path, it is not a container. "64 hex digits somewhere" is
//! not enough (services, monitors), nor is a name that anybody may give to a cgroup. It does not say whether what it names still
//! exists, and it does not know containers that share the cgroup of their sandbox (gVisor) or have none on the host (Kata).

mod scan;
mod segment;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use segment::{Member, Segment};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Container,
    Sandbox,
    Pod,
    Monitor,
    Build,
    NotContainer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
        match self {
            Runtime::Docker => "docker",
            Runtime::Containerd => "containerd",
            Runtime::CriO => "cri-o",
            Runtime::Podman => "podman",
            Runtime::Rkt => "rkt",
            Runtime::Lxc => "lxc",
            Runtime::Nspawn => "nspawn",
            Runtime::Garden => "garden",
            Runtime::Mesos => "mesos",
            Runtime::Ecs => "ecs",
        }
    }
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Container => "container",
            Kind::Sandbox => "sandbox",
            Kind::Pod => "pod",
            Kind::Monitor => "monitor",
            Kind::Build => "build",
            Kind::NotContainer => "not-container",
        }
    }
}

/// The parser's answer for one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupIdentity {
    pub kind: Kind,
    /// `None` where the path cannot tell (plain `kubepods/.../<id>`).
    pub runtime: Option<Runtime>,
    /// Of a container or sandbox, and of nothing else.
    pub container_id: Option<String>,
    /// What people call it, where the path itself says so: lxc, nspawn, and the app of a rkt pod.
    pub name: Option<String>,
    /// Of the innermost container. Dashed where it is a UUID.
    pub pod_uid: Option<String>,
    /// The nearest container around the innermost one.
    pub outer_container_id: Option<String>,
    /// Bytes of the path that name the container's root: everything behind it is a sub-cgroup of the same container.
    pub root_len: usize,
}

pub fn parse(path: &str) -> CgroupIdentity {
    if !path.is_empty() && !path.starts_with('/') {
        let mut identity = parse(&format!("/{path}"));
        identity.root_len = identity.root_len.saturating_sub(1);
        return identity;
    }
    let mut reading = Reading { inner: Segment::leaf(path).monitor(), ..Reading::default() };
    scan::leaf_to_root(path.as_bytes(), |start, end| reading.take(&Segment::new(path, start, end), end));
    reading.identity()
}

/// What the segments so far, leaf to root, have said.
#[derive(Default)]
struct Reading<'a> {
    inner: Option<Member<'a>>,
    outer: Option<Member<'a>>,
    /// As the path writes it.
    pod_uid: Option<&'a str>,
}

impl<'a> Reading<'a> {
    #[inline]
    fn take(&mut self, segment: &Segment<'a>, end: usize) -> ControlFlow<()> {
        let member = segment.member();
        if let Some(member) = member {
            match &self.inner {
                // A parent that names its child's runtime (`lxc/N`) may say again what the child has said itself.
                Some(inner) if member.root_len < inner.root_len => {
                    if member.is_container() {
                        self.outer = Some(member);
                        // A pod out here is the outer container's.
                        return ControlFlow::Break(());
                    }
                }
                _ => self.root(member),
            }
        }
        if self.pod_uid.is_none() {
            self.pod_uid = segment.pod_uid(member.is_some());
            if self.pod_uid.is_some() {
                self.root(Member::of(Kind::Pod, None, end));
            }
        }
        ControlFlow::Continue(())
    }

    /// The innermost, if there is none yet. A monitor's bare name says less than anything else about the same cgroup.
    fn root(&mut self, member: Member<'a>) {
        let open = |inner: Member<'_>| inner.kind == Kind::Monitor && inner.root_len == member.root_len;
        if self.inner.is_none_or(open) {
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
            // systemd's names have `_` for `-`.
            pod_uid: self.pod_uid.map(|uid| uid.replace('_', "-")),
            outer_container_id: self.outer.and_then(|outer| Some(outer.text(outer.id?))),
            root_len: inner.root_len,
        }
    }
}
