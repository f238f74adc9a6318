//! What a cgroup path says about its container: a pure parser, no IO.
//!
//! Scans leaf to root; the innermost match wins and the outer id is kept. One identity per container root: whatever lies below
//! it is the same container. "64 hex digits somewhere" alone is not enough: services, scopes of sessions and monitors are not
//! containers.

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
    pub container_id: Option<String>,
    /// Dashed where it is a UUID.
    pub pod_uid: Option<String>,
    pub outer_container_id: Option<String>,
    /// Bytes of the path that name the container's root: everything behind it is a sub-cgroup of the same container.
    pub root_len: usize,
}

struct Found {
    kind: Kind,
    runtime: Option<Runtime>,
    id: Option<String>,
}

pub fn parse(path: &str) -> CgroupIdentity {
    let mut answer = CgroupIdentity {
        kind: Kind::NotContainer,
        runtime: None,
        container_id: None,
        pod_uid: None,
        outer_container_id: None,
        root_len: 0,
    };
    let mut end = path.len();
    while end > 0 {
        let start = path[..end].rfind('/').map_or(0, |slash| slash + 1);
        let segment = &path[start..end];
        let parent = &path[..start.saturating_sub(1)];
        if let Some(found) = container(segment, parent) {
            if answer.kind == Kind::NotContainer {
                (answer.kind, answer.runtime, answer.container_id, answer.root_len) = (found.kind, found.runtime, found.id, end);
            } else if answer.outer_container_id.is_none() && found.kind == Kind::Container {
                answer.outer_container_id = found.id;
            }
        }
        // A pod outside the innermost container's own is another node's business.
        if answer.pod_uid.is_none() && answer.outer_container_id.is_none() {
            answer.pod_uid = pod_uid(segment);
            if answer.pod_uid.is_some() && answer.kind == Kind::NotContainer {
                (answer.kind, answer.root_len) = (Kind::Pod, end);
            }
        }
        end = start.saturating_sub(1);
    }
    answer
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
}

/// One path segment, seen below `parent`.
fn container(segment: &str, parent: &str) -> Option<Found> {
    let found = |kind, runtime, id: &str| Some(Found { kind, runtime, id: Some(id.to_owned()) });
    let (bare, scope) = match segment.strip_suffix(".scope") {
        Some(bare) => (bare, true),
        None => (segment, false),
    };
    if segment.ends_with(".service") {
        return None;
    }
    // systemd-style path with the cgroupfs driver: `kubepods-burstable-podU.slice:cri-containerd:H`.
    if let Some((_, rest)) = segment.split_once(".slice:")
        && let Some((prefix, id)) = rest.split_once(':')
        && is_id(id)
    {
        return found(Kind::Container, prefix_runtime(prefix), id);
    }
    for monitor in ["crio-conmon-", "libpod-conmon-"] {
        if bare.strip_prefix(monitor).is_some_and(is_id) {
            return Some(Found { kind: Kind::Monitor, runtime: prefix_runtime(monitor.split('-').next()?), id: None });
        }
    }
    if let Some((prefix, id)) = bare.rsplit_once('-')
        && is_id(id)
        && let Some(runtime) = prefix_runtime(prefix)
    {
        // Under systemd CRI-O's sandbox is the unit without `.scope`.
        let below_slice = parent.rsplit('/').next().is_some_and(|p| p.ends_with(".slice"));
        let sandbox = runtime == Runtime::CriO && !scope && below_slice;
        return found(if sandbox { Kind::Sandbox } else { Kind::Container }, Some(runtime), id);
    }
    let above = parent.rsplit('/').next().unwrap_or_default();
    if above == "buildkit" {
        return Some(Found { kind: Kind::Build, runtime: Some(Runtime::Docker), id: None });
    }
    if is_id(segment) && !above.ends_with(".service") {
        let runtime = if above == "docker" { Some(Runtime::Docker) } else { None };
        let runtime = if parent.contains("/ecs/") { Some(Runtime::Ecs) } else { runtime };
        return found(Kind::Container, runtime, segment);
    }
    if let Some(name) = segment.strip_prefix("lxc.payload.") {
        return found(Kind::Container, Some(Runtime::Lxc), name);
    }
    match above {
        "lxc" if !segment.is_empty() => found(Kind::Container, Some(Runtime::Lxc), segment),
        "mesos" if !segment.is_empty() => found(Kind::Container, Some(Runtime::Mesos), segment),
        _ => None,
    }
}

fn prefix_runtime(prefix: &str) -> Option<Runtime> {
    match prefix {
        "docker" => Some(Runtime::Docker),
        "cri-containerd" | "nerdctl" => Some(Runtime::Containerd),
        "crio" => Some(Runtime::CriO),
        "libpod" | "libpod-payload" => Some(Runtime::Podman),
        _ => None,
    }
}

/// `podU` (cgroupfs) or `...-podU.slice` (systemd, `_` for `-`); U is a UUID or a static pod's 32 hex digits.
fn pod_uid(segment: &str) -> Option<String> {
    let text = segment.split(".slice").next().unwrap_or(segment);
    let text = match text.rfind("-pod") {
        Some(at) if text.starts_with("kube") => &text[at + 4..],
        _ => text.strip_prefix("pod")?,
    };
    let uid = text.replace('_', "-");
    let hex = |s: &str| s.bytes().all(|b| b.is_ascii_hexdigit());
    let lengths: Vec<usize> = uid.split('-').map(str::len).collect();
    let uuid = lengths == [8, 4, 4, 4, 12] && uid.split('-').all(hex);
    (uuid || (uid.len() == 32 && hex(&uid))).then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const H: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const O: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";
    const U: &str = "8bb25662-de9a-11e9-84e7-f8f21e04010c";

    /// H, O, U and V (U with underscores) stand for ids in `path`; expects kind, runtime, id, pod, outer and the root's end.
    fn check(
        path: &str,
        kind: Kind,
        runtime: Option<Runtime>,
        id: Option<&str>,
        pod: Option<&str>,
        outer: Option<&str>,
        root: &str,
    ) {
        let fill = |s: &str| s.replace("<H>", H).replace("<O>", O).replace("<U>", U).replace("<V>", &U.replace('-', "_"));
        let path = fill(path);
        let got = parse(&path);
        let own = |s: Option<&str>| s.map(str::to_owned);
        assert_eq!(
            (got.kind, got.runtime, got.container_id, got.pod_uid, got.outer_container_id),
            (kind, runtime, own(id), own(pod), own(outer)),
            "{path}"
        );
        assert_eq!(&path[..got.root_len], fill(root), "{path}");
    }

    #[test]
    fn paths() {
        use Kind::{Build, Container, Monitor, NotContainer, Pod, Sandbox};
        use Runtime::{Containerd, CriO, Docker, Podman};
        check("/docker/<H>", Container, Some(Docker), Some(H), None, None, "/docker/<H>");
        check("/docker/<H>/init.scope", Container, Some(Docker), Some(H), None, None, "/docker/<H>");
        check("/system.slice/docker-<H>.scope", Container, Some(Docker), Some(H), None, None, "/system.slice/docker-<H>.scope");
        check("/actions_job/<H>", Container, None, Some(H), None, None, "/actions_job/<H>");
        check("/kubepods/burstable/pod<U>/<H>", Container, None, Some(H), Some(U), None, "/kubepods/burstable/pod<U>/<H>");
        check("/kubepods/burstable/pod<U>", Pod, None, None, Some(U), None, "/kubepods/burstable/pod<U>");
        let slice = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod<V>.slice";
        check(
            &format!("{slice}/cri-containerd-<H>.scope"),
            Container,
            Some(Containerd),
            Some(H),
            Some(U),
            None,
            &format!("{slice}/cri-containerd-<H>.scope"),
        );
        check(
            &format!("{slice}/crio-<H>.scope/container"),
            Container,
            Some(CriO),
            Some(H),
            Some(U),
            None,
            &format!("{slice}/crio-<H>.scope"),
        );
        check(&format!("{slice}/crio-<H>"), Sandbox, Some(CriO), Some(H), Some(U), None, &format!("{slice}/crio-<H>"));
        check(
            &format!("{slice}/crio-conmon-<H>.scope"),
            Monitor,
            Some(CriO),
            None,
            Some(U),
            None,
            &format!("{slice}/crio-conmon-<H>.scope"),
        );
        let colon = "/system.slice/containerd.service/kubepods-burstable-pod<V>.slice:cri-containerd:<H>";
        check(colon, Container, Some(Containerd), Some(H), Some(U), None, colon);
        check(
            "/machine.slice/libpod-<H>.scope/container",
            Container,
            Some(Podman),
            Some(H),
            None,
            None,
            "/machine.slice/libpod-<H>.scope",
        );
        check("/libpod_parent/libpod-<H>", Container, Some(Podman), Some(H), None, None, "/libpod_parent/libpod-<H>");
        check(
            "/docker/<O>/kubelet/kubepods/pod<U>/<H>",
            Container,
            None,
            Some(H),
            Some(U),
            Some(O),
            "/docker/<O>/kubelet/kubepods/pod<U>/<H>",
        );
        check(
            "/docker/buildkit/0123456789abcdefghijklmno",
            Build,
            Some(Docker),
            None,
            None,
            None,
            "/docker/buildkit/0123456789abcdefghijklmno",
        );
        for other in
            ["/", "", "/system.slice/<H>.service", "/user.slice/session-2.scope", "/system.slice/containerd.service", "/docker"]
        {
            check(other, NotContainer, None, None, None, None, "");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(path in "\\PC*") {
            let got = parse(&path);
            proptest::prop_assert!(path.get(..got.root_len).is_some());
        }
    }
}
