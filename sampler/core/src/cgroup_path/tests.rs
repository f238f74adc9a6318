use std::ops::ControlFlow;

use proptest::prelude::*;

use super::segment::Segment;
use super::*;

const H: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const O: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";
const U: &str = "8bb25662-de9a-11e9-84e7-f8f21e04010c";
/// Uid of a static pod.
const S: &str = "0123456789abcdef0123456789abcdef";
/// Id of BuildKit.
const B: &str = "0123456789abcdefghijklmno";
/// Id of Garden.
const G: &str = "6f265890-5165-7fab-6b52-18d1";

fn filled(text: &str) -> String {
    let systemd = U.replace('-', "_");
    let escaped = U.replace('-', r"\x2d");
    [("<H>", H), ("<O>", O), ("<U>", U), ("<V>", &systemd), ("<X>", &escaped), ("<S>", S), ("<B>", B), ("<G>", G)]
        .iter()
        .fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
}

/// `kind runtime id [pod UID] [in OUTER] [name NAME]`, `-` for none. Jobs, units and login sessions have tests of their own.
fn summary(identity: &CgroupIdentity) -> String {
    let kind = if identity.host_user.is_some() { Kind::NotContainer } else { identity.kind };
    let mut text = kind.name().to_owned();
    for word in [identity.runtime.map(Runtime::name), identity.container_id.as_deref()] {
        text += " ";
        text += word.unwrap_or("-");
    }
    for (word, value) in [("pod", &identity.pod_uid), ("in", &identity.outer_container_id), ("name", &identity.name)] {
        if let Some(value) = value {
            text += &format!(" {word} {value}");
        }
    }
    text
}

/// A `|` in the path marks the end of the root; without it the root is the whole path, or empty. `<H>` and so on are placeholders for ids,
/// `<V>` and `<X>` for U in the notation of systemd.
fn check(path: &str, expect: &str) {
    let (root, path) = (path.split('|').next().unwrap_or_default(), path.replace('|', ""));
    let (root, path, expect) = (filled(root), filled(&path), filled(expect));
    let got = parse(&path);
    assert_eq!(summary(&got), expect, "{path}");
    if got.host_user.is_none() {
        let root = if got.kind == Kind::NotContainer { "" } else { &root };
        assert_eq!(&path[..got.root_len], root, "{path}");
        assert_eq!(parse(root), got, "the root of {path}");
    }
    if got.container_id.is_some() {
        for sub in ["container", "init.scope", "payload", "supervisor", "libpod", "a/b/c", "user.slice/session-2.scope"] {
            assert_eq!(parse(&format!("{root}/{sub}")), got, "{sub} in {root}");
        }
    }
    if let Some(relative) = path.strip_prefix('/') {
        let root_len = got.root_len.saturating_sub(1);
        assert_eq!(parse(relative), CgroupIdentity { root_len, ..got }, "{relative}");
    }
}

#[test]
fn docker() {
    check("/docker/<H>", "container docker <H>");
    check("/docker/<H>|/init.scope", "container docker <H>");
    check("/docker/<H>|/", "container docker <H>");
    check("/system.slice/docker-<H>.scope", "container docker <H>");
    check("/system.slice/docker-<H>.scope|/system.slice/ssh.service", "container docker <H>");
    check("/user.slice/user-1000.slice/user@1000.service/user.slice/docker-<H>.scope", "container docker <H>");
    check("/user.slice/user-1000.slice/user@1000.service/app.slice/docker.service/docker/<H>", "container docker <H>");
    check("/actions_job/<H>", "container docker <H>");
    check("/batch.slice/batch-gpu.slice/docker-<H>.scope", "container docker <H>");
    check("/system.slice:docker:<H>", "container docker <H>");
    // Any `--cgroup-parent` with the cgroupfs driver; namespaces of containerd look the same.
    check("/batch/gpu/<H>", "container - <H>");
    check("/system.slice/slurmd.service/<H>", "container - <H>");
}

#[test]
fn kubernetes() {
    check("/kubepods/besteffort/pod<U>/<H>", "container - <H> pod <U>");
    check("/kubepods/pod<U>/<H>|/sub", "container - <H> pod <U>");
    check("/kubepods/burstable/pod<S>/<H>", "container - <H> pod <S>");
    check("/kubepods/burstable/pod<U>/crio-<H>", "container cri-o <H> pod <U>");
    let burstable = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<V>.slice";
    let guaranteed = "/kubepods.slice/kubepods-pod<V>.slice";
    let fixed = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod<S>.slice";
    let kubelet =
        "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod<V>.slice";
    for (slice, uid) in [(burstable, "<U>"), (guaranteed, "<U>"), (fixed, "<S>"), (kubelet, "<U>")] {
        for (prefix, runtime) in [("cri-containerd", "containerd"), ("docker", "docker"), ("crio", "cri-o")] {
            check(&format!("{slice}/{prefix}-<H>.scope"), &format!("container {runtime} <H> pod {uid}"));
            check(&format!("{slice}/{prefix}-<H>.scope|/container"), &format!("container {runtime} <H> pod {uid}"));
        }
        check(&format!("{slice}/cri-containerd-<H>"), &format!("container containerd <H> pod {uid}"));
        check(&format!("{slice}/docker-<H>"), &format!("container docker <H> pod {uid}"));
        check(&format!("{slice}/crio-<H>"), &format!("sandbox cri-o <H> pod {uid}"));
        check(&format!("{slice}/crio-conmon-<H>.scope"), &format!("monitor cri-o - pod {uid}"));
        check(slice, &format!("pod - - pod {uid}"));
    }
    check("/kubepods-burstable-pod<V>.slice:cri-containerd:<H>", "container containerd <H> pod <U>");
    check("/kubepods-pod<V>.slice:crio:<H>|/container", "container cri-o <H> pod <U>");
    check(
        "/system.slice/containerd.service/kubepods-besteffort-pod<S>.slice:cri-containerd:<H>",
        "container containerd <H> pod <S>",
    );
    check("/system.slice/containerd.service/kubelet-kubepods-pod<V>.slice:docker:<H>", "container docker <H> pod <U>");
    check("/kubepods/burstable/pod<U>/crio-conmon-<H>", "monitor cri-o - pod <U>");
    // The only cgroups of gVisor and Kata on the host.
    check("/kubepods/burstable/pod<U>", "pod - - pod <U>");
    check("/kubepods/burstable/pod<U>|/kata_<H>", "pod - - pod <U>");
    check("/kata_overhead/<H>", "sandbox - <H>");
}

#[test]
fn private_cgroup_namespaces() {
    check("/../cri-containerd-<H>.scope", "container containerd <H>");
    check("/../../pod<U>/<H>", "container - <H> pod <U>");
    check("/../<H>|/sub", "container - <H>");
    check("/../../../default/redis", "container containerd redis");
    check("/../lxc.payload.web|/init.scope", "container lxc web name web");
    check("/..", "not-container - -");
    check("/../..", "not-container - -");
}

#[test]
fn podman() {
    check("/machine.slice/libpod-<H>.scope", "container podman <H>");
    check("/machine.slice/libpod-<H>.scope|/container", "container podman <H>");
    check("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-<H>.scope|/container", "container podman <H>");
    check("/machine.slice/machine-libpod_pod_<O>.slice/libpod-<H>.scope", "container podman <H>");
    check("/libpod_parent/libpod-<H>|/ctr", "container podman <H>");
    check("/libpod_parent/<O>/libpod-<H>", "container podman <H>");
    check("/system.slice/web.service/libpod-payload-<H>", "container podman <H>");
    check("/machine.slice/libpod-conmon-<H>.scope", "monitor podman -");
    check("/libpod_parent/conmon", "monitor podman -");
    check("/batch/conmon", "monitor - -");
    check("/machine.slice/machine-libpod_pod_<O>.slice", "not-container - -");
    check("/libpod_parent/<O>", "not-container - -");
}

#[test]
fn containerd() {
    check("/system.slice/nerdctl-<H>.scope", "container containerd <H>");
    check("/user.slice/user-1000.slice/user@1000.service/user.slice/nerdctl-<H>.scope", "container containerd <H>");
    check("/default/<H>", "container containerd <H>");
    check("/k8s.io/<H>|/init.scope", "container containerd <H>");
    check("/default/redis-server_7.2|/sub", "container containerd redis-server_7.2");
    check("/k8s.io/web", "container containerd web");
    // Only at the top, only ids, and only well-known namespaces.
    for other in ["/default", "/default/", "/default/web.service", "/default/a b", "/user.slice/default/web", "/mine/web"] {
        check(other, "not-container - -");
    }
}

#[test]
fn builds() {
    check("/docker/buildkit/<B>", "build docker -");
    check("/docker/buildkit/<B>|/init.scope", "build docker -");
    check("/system.slice/docker-<B>.scope", "build docker -");
    check("/buildkit/<B>", "build - -");
    check("/docker/<O>/docker/buildkit/<B>", "build docker - in <O>");
    for other in ["/docker/buildkit", "/docker/<B>", "/docker/buildkit/<B>.scope", "/docker/buildkit/x"] {
        check(other, "not-container - -");
    }
}

#[test]
fn nested() {
    check("/docker/<O>/docker/<H>", "container docker <H> in <O>");
    let kind = "/docker/<O>/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod<V>.slice";
    check(&format!("{kind}/cri-containerd-<H>.scope"), "container containerd <H> pod <U> in <O>");
    check("/docker/<O>/kubelet/kubepods/besteffort/pod<U>/<H>|/init.scope", "container - <H> pod <U> in <O>");
    check("/system.slice/docker-<O>.scope/kubepods/pod<U>/<H>", "container - <H> pod <U> in <O>");
    check("/docker/<O>/kubelet/kubepods/pod<U>", "pod - - pod <U> in <O>");
    check("/docker/<O>/libpod_parent/conmon", "monitor podman - in <O>");
    check("/docker/<O>|/system.slice/<H>.service", "container docker <O>");
    check("/docker/<O>|/system.slice/containerd.service", "container docker <O>");
    // The pod belongs to the outer container.
    check("/kubepods/pod<U>/<O>/docker/<H>", "container docker <H> in <O>");
    check("/lxc/100/ns/docker/<H>", "container docker <H> in 100");
    check("/lxc.payload.ci/lxc.payload.job", "container lxc job in ci name job");
    check(r"/machine.slice/machine-dev\x2dbox.scope/payload/system.slice/docker-<H>.scope", "container docker <H> in dev-box");
    // The nearest container around it.
    check("/lxc/100/docker/<O>/docker/<H>", "container docker <H> in <O>");
}

#[test]
fn lxc() {
    check("/lxc/web|/ns/init.scope", "container lxc web name web");
    check("/lxc.payload.web|/init.scope", "container lxc web name web");
    check("/lxc.payload/web|/system.slice/ssh.service", "container lxc web name web");
    check("/user.slice/user-1000.slice/session-1.scope/lxc/x", "container lxc x name x");
    check("/user.slice/user-1000.slice/session-1.scope/lxc.payload.x", "container lxc x name x");
    check("/lxc/<H>", "container lxc <H> name <H>");
    check(r"/machine.slice/machine-lxc\x2d63139\x2dweb\x2d1.scope|/libvirt", "container lxc lxc-63139-web-1 name web-1");
    check("/lxc.monitor.web", "monitor lxc -");
    check("/lxc.monitor/web", "monitor lxc -");
    for other in ["/lxc", "/lxc/", "/lxc.payload", "/lxc.payload.", "/lxc.pivot", "/lxc.monitor", "/lxcfs/web", "/lxc.x/web"] {
        check(other, "not-container - -");
    }
}

#[test]
fn machines() {
    check("/machine.slice/machine-web.scope", "container nspawn web name web");
    check(r"/machine.slice/machine-dev\x2dbox.scope|/payload/init.scope", "container nspawn dev-box name dev-box");
    check(r"/machine.slice/systemd-nspawn@dev\x2dbox.service|/supervisor", "container nspawn dev-box name dev-box");
    check("/machine.slice/systemd-nspawn@x.service|/payload", "container nspawn x name x");
    check("/machine.slice/machine-qemubox.scope", "container nspawn qemubox name qemubox");
    check(r"/machine.slice/machine-rkt\x2d<X>.scope|/init.scope", "container rkt <U>");
    check(r"/machine.slice/machine-rkt\x2d<X>.scope|/system.slice/systemd-journald.service", "container rkt <U>");
    check(r"/machine.slice/machine-rkt\x2d<X>.scope/system.slice/web.service|/sub", "container rkt <U> name web");
    // A name that does not decode to UTF-8 is not changed.
    check(r"/machine.slice/machine-a\xffb.scope", r"container nspawn a\xffb name a\xffb");
    for other in [
        r"/machine.slice/machine-qemu\x2d1\x2dweb.scope/libvirt/emulator",
        r"/machine.slice/machine-qemu\x2dweb.scope",
        r"/machine.slice/machine-ch\x2d2\x2dweb.scope",
        "/machine.slice/machine-.scope",
        "/system.slice/machine-web.scope",
        "/machine.slice",
        "/machine.slice/systemd-nspawn@.service",
        "/system.slice/systemd-machined.service",
    ] {
        check(other, "not-container - -");
    }
}

#[test]
fn others() {
    check("/ecs/<S>/<H>", "container ecs <H>");
    check("/ecs/<U>/<H>|/sub", "container ecs <H>");
    check("/ecs/cluster/<S>/<H>", "container ecs <H>");
    check("/ecs/<S>/<S>-1234567890|/sub", "container ecs <S>-1234567890");
    // A container of docker: its path has more information than that of ECS.
    check("/ecstasks.slice/ecstasks-<S>.slice/docker-<H>.scope", "container docker <H>");
    check("/garden/<G>", "container garden <G>");
    check("/garden/<U>|/sub", "container garden <U>");
    check("/garden/bad/<U>", "container garden <U>");
    check("/garden/good/check-1", "container garden check-1");
    check("/system.slice/<G>", "container garden <G>");
    check("/mesos/<U>", "container mesos <U>");
    check("/mesos/<U>/mesos/debug|/sub", "container mesos debug in <U>");
    for other in ["/ecs/<S>", "/<S>/<S>-1", "/garden", "/garden/good", "/mesos", "/mesos/agent", "/mesos/slave/x"] {
        check(other, "not-container - -");
    }
}

#[test]
fn not_containers() {
    for other in [
        "",
        "/",
        "//",
        "/docker",
        "/init.scope",
        "/system.slice/<H>.service",
        "/system.slice/<H>.scope",
        "/system.slice/docker-<H>.service",
        "/system.slice/var-lib-docker-containers-<H>-mounts-shm.mount",
        "/system.slice/docker-<H>.mount",
        "/system.slice/run-<H>.scope",
        "/system.slice/containerd.service",
        "/system.slice/run-r<S>.scope",
        "/user.slice/user-1000.slice/session-2.scope",
        "/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-x-1.scope",
        "/user.slice/user-1000.slice/user@1000.service/init.scope",
        "/kubepods",
        "/kubepods.slice/kubepods-burstable.slice",
        "/kubepods/podnot-a-uid",
        "/system.slice/system-pod<V>.slice",
        "/slurm/uid_1000/job_12/step_0",
    ] {
        check(other, "not-container - -");
    }
    let upper = H.to_uppercase();
    check(&format!("/docker/{upper}"), "not-container - -");
    check(&format!("/system.slice/docker-{upper}.scope"), "not-container - -");
    check(&format!("/kubepods/pod{}", U.to_uppercase()), "not-container - -");
    check(&format!("/docker/{}", &H[1..]), "not-container - -");
    check(&format!("/docker/0{H}"), "not-container - -");
}

/// A path with one container (or pod): (path, runtime, id, pod).
#[derive(Clone, Debug)]
struct Layer(String, Option<Runtime>, String, Option<String>);

fn layer() -> impl Strategy<Value = Layer> {
    let uid = prop_oneof!["[0-9a-f]{32}", "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"];
    let qos = prop_oneof![Just(""), Just("burstable"), Just("besteffort")];
    let root = prop_oneof![Just(""), Just("kubelet"), Just("a-b")];
    ("[0-9a-f]{64}", uid, qos, root, "[a-z][a-z0-9-]{0,40}[0-9]", 0..9).prop_map(|(id, uid, qos, root, name, form)| {
        let (pod, qos_dash) = (Some(uid.clone()), if qos.is_empty() { String::new() } else { format!("{qos}-") });
        let root = if root.is_empty() { String::new() } else { format!("{root}-") };
        let unit = format!("{root}kubepods-{qos_dash}pod{}.slice", uid.replace('-', "_"));
        match form {
            0 => Layer(format!("/docker/{id}"), Some(Runtime::Docker), id, None),
            1 => Layer(format!("/system.slice/docker-{id}.scope"), Some(Runtime::Docker), id, None),
            2 => Layer(format!("/user.slice/user-7.slice/libpod-{id}.scope"), Some(Runtime::Podman), id, None),
            3 => Layer(format!("/kubepods/{qos}/pod{uid}/{id}"), None, id, pod),
            4 => Layer(format!("/{root}kubepods.slice/{unit}/cri-containerd-{id}.scope"), Some(Runtime::Containerd), id, pod),
            5 => Layer(format!("/{root}kubepods.slice/{unit}/crio-{id}.scope"), Some(Runtime::CriO), id, pod),
            6 => Layer(format!("/{unit}:cri-containerd:{id}"), Some(Runtime::Containerd), id, pod),
            7 => Layer(format!("/lxc.payload.{name}"), Some(Runtime::Lxc), name, None),
            _ => {
                let unit = format!("/machine.slice/machine-n{}.scope", name.replace('-', r"\x2d"));
                Layer(unit, Some(Runtime::Nspawn), format!("n{name}"), None)
            }
        }
    })
}

/// Paths of words that are relevant, almost relevant or irrelevant, of any length.
fn words() -> impl Strategy<Value = String> {
    let known = [
        "lxc",
        "lxc.payload",
        "lxc.payload.n",
        "lxc.monitor",
        "lxc.monitor.n",
        "mesos",
        "agent",
        "garden",
        "good",
        "bad",
        "conmon",
        "default",
        "k8s.io",
        "docker",
        "buildkit",
        "ecs",
        "libpod_parent",
        "machine.slice",
        "machine-n.scope",
        "system.slice",
        "..",
        "a.service",
        "systemd-nspawn@n.service",
        r"machine-rkt\x2d<X>.scope",
        r"machine-qemu\x2d1\x2dn.scope",
        "<H>",
        "<O>",
        "<B>",
        "<G>",
        "<S>",
        "<S>-1",
        "<U>",
        "pod<U>",
        "pod<S>",
        "kubepods-pod<V>.slice",
        "a-kubepods-burstable-pod<S>.slice",
        "crio-<H>",
        "docker-<H>.scope",
        "docker-<B>.scope",
        "crio-conmon-<H>.scope",
        "slurmstepd.scope",
        "job_7",
        "uid_7",
        "user.slice",
        "user-7.slice",
        "session-3.scope",
        "x.service",
        "pbspro",
        "7.server",
        "kubepods-pod<V>.slice:cri-containerd:<H>",
        "a.slice:b:<H>",
        "kata_overhead",
        "",
    ];
    let word = prop_oneof![
        4 => proptest::sample::select(known.to_vec()).prop_map(filled),
        1 => "[a-z]{0,70}",
        1 => "\\PC{0,3}",
    ];
    proptest::collection::vec(word, 0..12).prop_map(|words| words.iter().map(|word| format!("/{word}")).collect())
}

fn check_invariants(path: &str) -> Result<(), TestCaseError> {
    let got = parse(path);
    let root = path.get(..got.root_len);
    prop_assert!(root.is_some());
    prop_assert!(matches!(path.as_bytes().get(got.root_len), None | Some(b'/')) || got.root_len == 0, "{path}: {got:?}");
    prop_assert_eq!(got.root_len == 0, got.kind == Kind::NotContainer);
    let is_container = matches!(got.kind, Kind::Container | Kind::Sandbox);
    prop_assert_eq!(got.container_id.is_some(), is_container);
    prop_assert!(is_container || got.name.is_none());
    let of_root = parse(root.unwrap_or_default());
    match &got.host_user {
        // Its root has no step, task or session.
        Some(user) => prop_assert_eq!((of_root.kind, of_root.host_user.map(|user| user.name())), (got.kind, Some(user.name()))),
        None => prop_assert_eq!(of_root, got),
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_text_is_parsed(path in "(/|\\PC)*") {
        check_invariants(&path)?;
    }

    #[test]
    fn any_words_are_parsed(path in words()) {
        check_invariants(&path)?;
    }

    #[test]
    fn valid_paths_are_parsed_correctly(layers in proptest::collection::vec(layer(), 1..4), sub in "(/[a-b]{1,9}){0,3}") {
        let root: String = layers.iter().map(|layer| layer.0.as_str()).collect();
        let inner = &layers[layers.len() - 1];
        let name = matches!(inner.1, Some(Runtime::Lxc | Runtime::Nspawn)).then(|| inner.2.clone());
        let outer_container_id = layers.len().checked_sub(2).map(|at| layers[at].2.clone());
        let expect = CgroupIdentity {
            kind: Kind::Container,
            runtime: inner.1,
            container_id: Some(inner.2.clone()),
            name,
            pod_uid: inner.3.clone(),
            outer_container_id,
            host_user: None,
            outer_job: None,
            root_len: root.len(),
        };
        prop_assert_eq!(parse(&format!("{root}{sub}")), expect);
    }

    /// The scan of many segments at once visits every segment that an individual check recognizes.
    #[test]
    fn no_relevant_segment_is_skipped(path in words()) {
        let mut visited = Vec::new();
        scan::leaf_to_root(path.as_bytes(), |start, end| {
            visited.push((start, end));
            ControlFlow::Continue(())
        });
        prop_assert!(visited.is_sorted_by(|later, earlier| later.0 > earlier.0), "{path}: {visited:?}");
        let mut start = 1;
        for text in path.split('/').skip(1) {
            let end = start + text.len();
            let segment = Segment::new(&path, start, end);
            let relevant = segment.member().is_some() || segment.pod_uid(false).is_some();
            prop_assert!(!relevant || visited.contains(&(start, end)), "{path}: {text}");
            start = end + 1;
        }
    }
}

/// In addition to the invariants: no id, name or UID is invented, and an id is never a path.
#[test]
fn fuzz_cgroup_path() {
    devkit::fuzz(file!(), "cgroup_path", move |bytes| {
        let path = String::from_utf8_lossy(bytes);
        check_invariants(&path).unwrap();
        let got = parse(&path);
        let user = got.host_user.as_ref().map(HostUser::name);
        assert!(user.is_none_or(|name| name.len() <= path.len() + 64), "{path}");
        for text in [&got.container_id, &got.name, &got.pod_uid, &got.outer_container_id].into_iter().flatten() {
            assert!(!text.is_empty() && text.len() <= path.len(), "{path}: {text}");
            // Systemd's escapes are decoded, and its `_` in a UID is a dash.
            let is_part = path.replace('_', "-").contains(&text.replace('_', "-"));
            assert!(is_part || path.contains(r"\x"), "{path}: {text}");
        }
        let named = matches!(got.runtime, Some(Runtime::Lxc | Runtime::Nspawn));
        assert!(named || got.container_id.is_none_or(|id| !id.contains('/')), "{path}");
    });
}
