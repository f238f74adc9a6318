//! Labels of containers of real engines, from every source that has them, each source alone.

use std::path::Path;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::containerd::{Containerd, IMAGE, PodSpec};
use gpu_sampler_tests::kernel::Layout;
use gpu_sampler_tests::labels::{AT_ONCE, SOON, UID, label_fields, summary};
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

/// Asserts that every label but the id comes from this source.
fn assert_all_from(explained: &Value, source: &str) {
    let sources = label_fields(explained, "source");
    assert!(sources.iter().all(|(label, from)| label == "id" || from == source), "{explained:#}");
}

#[test]
fn docker_containers_are_labelled_from_files_and_from_the_socket() -> Result<()> {
    let docker = Docker::new()?;
    let (plain, _) = docker.run("plain", &json!({"a": "b"}), "300")?;
    let (pod, _) = docker.pod("prod", "trainer-0", 300)?;
    let key = |name: &str| format!("io.kubernetes.{name}");
    let labels = json!({key("docker.type"): "podsandbox", key("pod.name"): "trainer-0", key("pod.namespace"): "prod",
        key("container.name"): "POD"});
    let (sandbox, _) = docker.run("sandbox", &labels, "300")?;
    for source in ["docker-file", "docker"] {
        let agent = alone(source, None)?;
        let (explained, _) = agent.complete(&plain, AT_ONCE)?;
        assert_all_from(&explained, source);
        assert_eq!(explained["not_applicable"], json!(["namespace", "pod", "container"]));
        assert_eq!(summary(&explained), format!("-/-/- gpu-sampler-test-{}-plain {}", std::process::id(), docker.image()));
        let (explained, _) = agent.complete(&pod, AT_ONCE)?;
        assert_all_from(&explained, source);
        assert!(summary(&explained).starts_with("prod/trainer-0/main "), "{explained:#}");
        assert_eq!((&explained["runtime"], &explained["pod_uid"]), (&json!("docker"), &json!(UID)));
        let (explained, _) = agent.complete(&sandbox, AT_ONCE)?;
        assert!(explained["kind"] == "sandbox" && summary(&explained).starts_with("prod/trainer-0/POD "), "{explained:#}");
    }
    Ok(())
}

#[test]
fn docker_labels_may_be_many_long_and_not_ascii() -> Result<()> {
    let docker = Docker::new()?;
    let mut labels: serde_json::Map<String, Value> = (0..1_000).map(|n| (format!("label-{n}"), json!("x".repeat(200)))).collect();
    let (namespace, pod, container) = ("n".repeat(63), "p".repeat(253), "größe-日本");
    for (key, value) in [("pod.namespace", &*namespace), ("pod.name", &*pod), ("container.name", container), ("pod.uid", UID)] {
        labels.insert(format!("io.kubernetes.{key}"), json!(value));
    }
    let (id, _) = docker.run("many", &Value::Object(labels), "300")?;
    for source in ["docker-file", "docker"] {
        let (explained, _) = alone(source, None)?.complete(&id, AT_ONCE)?;
        assert!(summary(&explained).starts_with(&format!("{namespace}/{pod}/{container} ")), "{explained:#}");
    }
    Ok(())
}

/// Checks the labels of a pod's container and of its sandbox, from this source alone.
fn check_pod(agent: &Agent, source: &str, sandbox: &str, container: &str, spec: &PodSpec) -> Result<()> {
    let (explained, _) = agent.complete(container, AT_ONCE)?;
    assert_all_from(&explained, source);
    assert_eq!(summary(&explained), format!("{}/{}/main {container} {IMAGE}", spec.namespace, spec.name));
    let expected = (&json!("container"), &json!("containerd"), &json!(spec.uid));
    assert_eq!((&explained["kind"], &explained["runtime"], &explained["pod_uid"]), expected);
    let (explained, _) = agent.complete(sandbox, AT_ONCE)?;
    assert_eq!(explained["kind"], "sandbox");
    assert!(summary(&explained).starts_with(&format!("{}/{}/- {sandbox} ", spec.namespace, spec.name)), "{explained:#}");
    Ok(())
}

#[test]
fn containerd_pods_are_labelled_from_bundles_and_over_cri() -> Result<()> {
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
    // An init container, which ends, and a container that is added to a running pod.
    let agent = alone("bundle", None)?;
    for name in ["init-db", "debugger-x7k2p"] {
        let (id, _) = containerd.run(&sandbox, name, 0, &["/bin/sleep", "2"])?;
        let (explained, _) = agent.complete(&id, AT_ONCE)?;
        assert_eq!(summary(&explained), format!("prod/trainer-0/{name} {id} {IMAGE}"));
    }
    Ok(())
}

#[test]
fn containers_without_a_kubelet_are_labelled_from_containerd() -> Result<()> {
    let containerd = Containerd::start()?;
    // The images are in the kubelet's namespace; ctr needs them in its own.
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
    let (explained, _) = agent.complete(&id, SOON)?;
    assert_all_from(&explained, "cri");
    assert_eq!(summary(&explained), format!("-/-/- web {IMAGE}"));
    containerd.ctr_in("lab", &["tasks", "kill", "--signal", "SIGKILL", &id])?;
    gpu_sampler_tests::wait_for("the container is removed", SOON, || {
        Ok(containerd.ctr_in("lab", &["containers", "rm", &id]).ok())
    })?;
    gpu_sampler_tests::leftovers::remove_cgroup("/lab");
    Ok(())
}

#[test]
fn pods_are_labelled_from_logs_and_mounts_of_any_runtime() -> Result<()> {
    let containerd = Containerd::start()?;
    let root = tempfile::tempdir()?;
    let mut spec = PodSpec::new("prod", "trainer-0", UID);
    spec.log_root = Some(root.path().join("var/log"));
    spec.kubelet_root = Some(root.path().join("var/lib/kubelet"));
    let sandbox = containerd.run_pod(&spec)?;
    let (id, _) = containerd.run(&sandbox, "main", 0, &["/bin/sleep", "300"])?;
    let root = root.path().to_string_lossy().into_owned();
    let labelled = |sources: &str, expect: &str| -> Result<Value> {
        let agent = Agent::start(None, &["--label-sources", sources, "--path-rootfs", &root])?;
        let matches = |explained: &Value| summary(explained).starts_with(expect);
        gpu_sampler_tests::wait_for(expect, AT_ONCE, || Ok(agent.container(&id)?.filter(matches)))
    };
    labelled("logs", "prod/trainer-0/main ")?;
    labelled("mountinfo", "-/-/main ")?;
    let both = labelled("logs,mountinfo", "prod/trainer-0/main ")?;
    // Paths contain neither a name nor an image, so both are reported as missing.
    assert_eq!(both["missing"], json!(["name", "image"]));
    Ok(())
}

#[test]
fn docker_containers_are_labelled_on_cgroup_v2_alone() -> Result<()> {
    let engine = Engine::start(Layout::PureV2)?;
    let (id, _) = engine.docker.run("plain", &json!({}), "300")?;
    for source in ["docker-file", "docker"] {
        let agent = alone_in(Layout::PureV2, source, Some(("--docker-endpoint", engine.docker.socket())))?;
        assert_all_from(&agent.complete(&id, AT_ONCE)?.0, source);
    }
    Ok(())
}

#[test]
fn in_a_steady_state_no_runtime_is_queried() -> Result<()> {
    let docker = Docker::new()?;
    let agent = Agent::start(None, &[])?;
    let mut ids = Vec::new();
    for n in 0..3 {
        ids.push(docker.pod("prod", &format!("steady-{n}"), 300)?.0);
    }
    for id in &ids {
        let (explained, _) = agent.complete(id, SOON)?;
        assert_all_from(&explained, "docker-file");
        let docker =
            explained["tried"].as_array().context("tried")?.iter().find(|t| t["source"] == "docker").context("docker")?;
        assert_eq!(docker["outcome"], "not-tried", "{explained:#}");
    }
    let before = agent.runtime_calls()?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    // Also when containers start, as long as their files can be read.
    let (more, _) = docker.pod("prod", "steady-more", 300)?;
    agent.complete(&more, SOON)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    if agent.knows_only(4.0)? {
        assert_eq!(agent.runtime_calls()?, before);
    }
    Ok(())
}
