//! Benches of the pure core.

use criterion::{Criterion, criterion_group, criterion_main};
use sampler_core::cgroup_path::parse;

/// The length of the longest paths; the target for each path is 2 us.
const LONGEST: usize = 4096;

/// Repeats `unit` up to the length of the longest path.
fn filled(unit: &str) -> String {
    unit.repeat(LONGEST / unit.len())
}

fn paths(c: &mut Criterion) {
    let id = "0123456789abcdef".repeat(4);
    let short = format!("/kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{id}");
    let systemd = format!(
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod8bb25662_de9a_11e9_84e7_f8f21e04010c.slice/cri-containerd-{id}.scope"
    );
    let nested = format!("/docker/{id}/kubelet.slice/kubelet-{}/init.scope", &systemd[1..]);
    let service = "/system.slice/containerd.service".to_owned();
    let long = format!("/{}{short}", "a".repeat(LONGEST - short.len() - 1));
    let deep = format!("{short}{}", "/x".repeat((LONGEST - short.len()) / 2));
    let deep_above = format!("{}{short}", "/x".repeat((LONGEST - short.len()) / 2));
    let typical: [(&str, String); 8] = [
        ("short", short),
        ("systemd", systemd),
        ("nested", nested),
        ("service", service),
        ("long", long),
        ("deep", deep),
        ("deep-above", deep_above),
        ("slashes", filled("/")),
    ];
    // Paths that a container could create: as many almost matching parts as fit.
    let no_id = format!("/docker-{}g.scope", &id[1..]);
    let no_runtime = format!("/dockes-{id}.scope");
    let no_slice = format!("/kubepods:crio:{id}");
    let podman_pod = format!("/libpod_parent/{id}");
    let adversarial: [(&str, &str); 24] = [
        ("one-letter", "/x"),
        ("lxc", "/lxd"),
        ("lxc-childless", "/lxc/"),
        ("mesos", "/meso5"),
        ("mesos-agent", "/mesos/agent"),
        ("garden", "/gardem"),
        ("garden-childless", "/garden/good/"),
        ("conmon", "/conmon"),
        ("default", "/default"),
        ("lxc-payload", "/lxc.payloaf"),
        ("lxc-monitor", "/lxc.monitor.x"),
        ("machine", "/machine-x.scope"),
        ("machine-virtual", r"/machine-.slice/machine-ch\x2d1\x2dx.scope"),
        ("nspawn", "/systemd-nspawn@.service"),
        ("build-id", "/0123456789abcdefghijklmno"),
        ("build", "/docker/buildkit/0123456789abcdefghijklmno"),
        ("garden-id", "/01234567-89ab-cdef-0123-456g"),
        ("fargate", "/0123456789abcdef0123456789abcdef/0123456789abcdef0123456789abcdef-1"),
        ("pod", "/pod8bb25662-de9a-11e9-84e7-f8f21e04010g"),
        ("pod-slice", "/kubepods-pod8bb25662_de9a_11e9_84e7_f8f21e04010g.slice"),
        ("no-id", &no_id),
        ("no-runtime", &no_runtime),
        ("no-slice", &no_slice),
        ("podman-pod", &podman_pod),
    ];
    let adversarial = adversarial.map(|(name, unit)| (format!("adversarial/{name}"), filled(unit)));
    for (name, path) in typical.map(|(name, path)| (name.to_owned(), path)).into_iter().chain(adversarial) {
        c.bench_function(&format!("parse/{name}"), |b| b.iter(|| parse(std::hint::black_box(&path))));
    }
}

criterion_group!(benches, paths);
criterion_main!(benches);
