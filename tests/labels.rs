//! Labels of containers that real engines made, from every source that has them, each alone.

use std::path::Path;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::containerd::{Containerd, IMAGE, PodSpec};
use gpu_sampler_tests::kernel::Layout;
use gpu_sampler_tests::labels::{AT_ONCE, SOON, UID, each, words};
use gpu_sampler_tests::{Agent, Docker, Engine};
use serde_json::{Value, json};

fn alone(sources: &str, endpoint: Option<(&str, &Path)>) -> Result<Agent> {
    alone_in(Layout::Machine, sources, endpoint)
}

fn alone_in(layout: Layout, sources: &str, endpoint: Option<(&str, &Path)>) -> Result<Agent> {
    let mut args = vec!["--label-sources".to_owned(), sources.to_owned()];
    if let Some((flag, socket)) = endpoint {
        args.extend([flag.to_owned(), format!("unix://{}", socket.display())]);
    }
    Agent::start_in(layout, None, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Every label's source is this one, but for the id.
fn all_from(told: &Value, source: &str) {
    let sources = each(told, "source");
    assert!(sources.iter().all(|(label, from)| label == "id" || from == source), "{told:#}");
}

#[test]
fn dockers_containers_from_its_files_and_from_its_socket() -> Result<()> {
    let docker = Docker::new()?;
    let (plain, _) = docker.run("plain", &json!({"a": "b"}), "300")?;
    let (pod, _) = docker.pod("prod", "trainer-0", 300)?;
    let key = |name: &str| format!("io.kubernetes.{name}");
    let labels = json!({key("docker.type"): "podsandbox", key("pod.name"): "trainer-0", key("pod.namespace"): "prod",
        key("container.name"): "POD"});
    let (sandbox, _) = docker.run("sandbox", &labels, "300")?;
    for source in ["docker-file", "docker"] {
        let agent = alone(source, None)?;
        let (told, _) = agent.complete(&plain, AT_ONCE)?;
        all_from(&told, source);
        assert_eq!(told["not_applicable"], json!(["namespace", "pod", "container"]));
        assert_eq!(words(&told), format!("-/-/- gpu-sampler-test-{}-plain {}", std::process::id(), docker.image()));
        let (told, _) = agent.complete(&pod, AT_ONCE)?;
        all_from(&told, source);
        assert!(words(&told).starts_with("prod/trainer-0/main "), "{told:#}");
        assert_eq!((&told["runtime"], &told["pod_uid"]), (&json!("docker"), &json!(UID)));
        let (told, _) = agent.complete(&sandbox, AT_ONCE)?;
        assert!(told["kind"] == "sandbox" && words(&told).starts_with("prod/trainer-0/POD "), "{told:#}");
    }
    Ok(())
}

#[test]
fn a_thousand_labels_names_at_their_limits_and_letters_of_any_script() -> Result<()> {
    let docker = Docker::new()?;
    let mut labels: serde_json::Map<String, Value> = (0..1_000).map(|n| (format!("label-{n}"), json!("x".repeat(200)))).collect();
    let (namespace, pod, container) = ("n".repeat(63), "p".repeat(253), "größe-日本");
    for (key, value) in [("pod.namespace", &*namespace), ("pod.name", &*pod), ("container.name", container), ("pod.uid", UID)] {
        labels.insert(format!("io.kubernetes.{key}"), json!(value));
    }
    let (id, _) = docker.run("many", &Value::Object(labels), "300")?;
    for source in ["docker-file", "docker"] {
        let (told, _) = alone(source, None)?.complete(&id, AT_ONCE)?;
        assert!(words(&told).starts_with(&format!("{namespace}/{pod}/{container} ")), "{told:#}");
    }
    Ok(())
}

/// What a pod's container and its sandbox must say, by the source asked alone.
fn check_pod(agent: &Agent, source: &str, sandbox: &str, container: &str, spec: &PodSpec) -> Result<()> {
    let (told, _) = agent.complete(container, AT_ONCE)?;
    all_from(&told, source);
    assert_eq!(words(&told), format!("{}/{}/main {container} {IMAGE}", spec.namespace, spec.name));
    let expected = (&json!("container"), &json!("containerd"), &json!(spec.uid));
    assert_eq!((&told["kind"], &told["runtime"], &told["pod_uid"]), expected);
    let (told, _) = agent.complete(sandbox, AT_ONCE)?;
    assert_eq!(told["kind"], "sandbox");
    assert!(words(&told).starts_with(&format!("{}/{}/- {sandbox} ", spec.namespace, spec.name)), "{told:#}");
    Ok(())
}

#[test]
fn pods_of_containerd_from_bundles_and_over_cri() -> Result<()> {
    let containerd = Containerd::start()?;
    let spec = PodSpec::new("prod", "trainer-0", UID);
    let sandbox = containerd.run_pod(&spec)?;
    let (first, _) = containerd.run(&sandbox, "main", 0, &["/bin/sleep", "300"])?;
    // A static pod's UID is a hash of its manifest.
    let fixed = PodSpec::new("kube-system", "fixed-node-1", "0123456789abcdef0123456789abcdef");
    let fixed_sandbox = containerd.run_pod(&fixed)?;
    let (fixed_main, _) = containerd.run(&fixed_sandbox, "main", 0, &["/bin/sleep", "300"])?;
    let address = containerd.address();
    for (source, endpoint) in [("bundle", None), ("cri", Some(("--cri-endpoint", &*address))), ("cri", None)] {
        let agent = alone(source, endpoint)?;
        check_pod(&agent, source, &sandbox, &first, &spec)?;
        check_pod(&agent, source, &fixed_sandbox, &fixed_main, &fixed)?;
        // Restarted by the kubelet: a new container of the same name in the same pod.
        let (second, _) = containerd.run(&sandbox, "main", 1, &["/bin/sleep", "300"])?;
        check_pod(&agent, source, &sandbox, &second, &spec)?;
        containerd.stop_container(&second)?;
        containerd.remove_container(&second)?;
    }
    // An init container, which ends, and one that is added to a running pod.
    let agent = alone("bundle", None)?;
    for name in ["init-db", "debugger-x7k2p"] {
        let (id, _) = containerd.run(&sandbox, name, 0, &["/bin/sleep", "2"])?;
        let (told, _) = agent.complete(&id, AT_ONCE)?;
        assert_eq!(words(&told), format!("prod/trainer-0/{name} {id} {IMAGE}"));
    }
    Ok(())
}

#[test]
fn containers_that_no_kubelet_made_from_containerd_itself() -> Result<()> {
    let containerd = Containerd::start()?;
    // The images are the kubelet's namespace's; ctr wants them in its own.
    containerd.ctr(&["namespaces", "create", "lab"])?;
    let archive = gpu_sampler_tests::image::archive(&containerd.state(), IMAGE)?;
    containerd.ctr_in("lab", &["images", "import", &archive.to_string_lossy()])?;
    let id = "c".repeat(64);
    let cgroup = format!("/lab/{id}");
    containerd.ctr_in(
        "lab",
        &["run", "--detach", "--cgroup", &cgroup, "--label", "nerdctl/name=web", IMAGE, &id, "/bin/sleep", "300"],
    )?;
    let address = containerd.address();
    let agent = alone("cri", Some(("--cri-endpoint", &address)))?;
    let (told, _) = agent.complete(&id, SOON)?;
    all_from(&told, "cri");
    assert_eq!(words(&told), format!("-/-/- web {IMAGE}"));
    containerd.ctr_in("lab", &["tasks", "kill", "--signal", "SIGKILL", &id])?;
    gpu_sampler_tests::wait_for("it is removed", SOON, || Ok(containerd.ctr_in("lab", &["containers", "rm", &id]).ok()))?;
    gpu_sampler_tests::leftovers::remove_cgroup("/lab");
    Ok(())
}

#[test]
fn pods_by_their_logs_and_mounts_whatever_the_runtime() -> Result<()> {
    let containerd = Containerd::start()?;
    let root = tempfile::tempdir()?;
    let mut spec = PodSpec::new("prod", "trainer-0", UID);
    spec.log_root = Some(root.path().join("var/log"));
    spec.kubelet_root = Some(root.path().join("var/lib/kubelet"));
    let sandbox = containerd.run_pod(&spec)?;
    let (id, _) = containerd.run(&sandbox, "main", 0, &["/bin/sleep", "300"])?;
    let root = root.path().to_string_lossy().into_owned();
    let told = |sources: &str, expect: &str| -> Result<Value> {
        let agent = Agent::start(None, &["--label-sources", sources, "--path-rootfs", &root])?;
        gpu_sampler_tests::wait_for(expect, AT_ONCE, || Ok(agent.container(&id)?.filter(|told| words(told).starts_with(expect))))
    };
    told("logs", "prod/trainer-0/main ")?;
    told("mountinfo", "-/-/main ")?;
    let both = told("logs,mountinfo", "prod/trainer-0/main ")?;
    // Neither a name nor an image can be found in paths: that is said, and who would tell.
    assert_eq!(both["missing"], json!(["name", "image"]));
    Ok(())
}

#[test]
fn on_cgroup_v2_alone() -> Result<()> {
    let engine = Engine::start(Layout::PureV2)?;
    let (id, _) = engine.docker.run("plain", &json!({}), "300")?;
    for source in ["docker-file", "docker"] {
        let agent = alone_in(Layout::PureV2, source, Some(("--docker-endpoint", engine.docker.socket())))?;
        all_from(&agent.complete(&id, AT_ONCE)?.0, source);
    }
    Ok(())
}

#[test]
fn in_a_steady_state_nobody_is_asked() -> Result<()> {
    let docker = Docker::new()?;
    let agent = Agent::start(None, &[])?;
    let mut ids = Vec::new();
    for n in 0..3 {
        ids.push(docker.pod("prod", &format!("steady-{n}"), 300)?.0);
    }
    for id in &ids {
        let (told, _) = agent.complete(id, SOON)?;
        all_from(&told, "docker-file");
        let docker = told["tried"].as_array().context("tried")?.iter().find(|t| t["source"] == "docker").context("docker")?;
        assert_eq!(docker["outcome"], "not-tried", "{told:#}");
    }
    let before = agent.calls()?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    // Also when containers come, as long as their files can be read.
    let (more, _) = docker.pod("prod", "steady-more", 300)?;
    agent.complete(&more, SOON)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert_eq!(agent.calls()?, before);
    Ok(())
}
