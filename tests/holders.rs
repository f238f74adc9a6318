//! Who holds a GPU, though no device plugin or claim says so: devices of engines, fractions with reservation pods, kubelets in containers.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::CgroupTree;
use gpu_sampler_tests::kubelet::{checkpoint, entry};
use gpu_sampler_tests::labels::{SOON, UID, bundle};
use gpu_sampler_tests::podman::Podman;
use gpu_sampler_tests::{Agent, Docker, Running, Sample, Sim, get, parse, run_cli, sum, var, wait_for};
use serde_json::{Value, json};

const FIRST: &str = "GPU-11111111-2222-3333-4444-555555555555";
const SECOND: &str = "GPU-22222222-2222-3333-4444-555555555555";
const MIGS: [&str; 2] = ["MIG-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee", "MIG-bbbbbbbb-bbbb-cccc-dddd-eeeeeeeeeeee"];

fn uid(n: usize) -> String {
    format!("{n}bb25662-de9a-11e9-84e7-f8f21e04010c")
}

/// `who gpu source` of each series of assigned GPUs, sorted.
fn assigned(page: &[Sample], who: impl Fn(&Sample) -> String) -> Vec<String> {
    let ours = page.iter().filter(|s| s.name == "container_gpu_assigned");
    let mut all: Vec<String> = ours.map(|s| format!("{} {} {}", who(s), s.labels["uuid"], s.labels["source"])).collect();
    all.sort();
    all
}

fn wait_for_assigned(agent: &Agent, who: impl Fn(&Sample) -> String, expected: &[String]) -> Result<()> {
    let last = || agent.scrape().map(|page| assigned(&page, &who));
    wait_for("the expected GPUs are assigned", SOON, || Ok((last()? == expected).then_some(())))
        .with_context(|| format!("{:?}, expected {expected:?}", last()))
}

/// Gives a container's bundle this content in addition.
fn extend_bundle(root: &Path, id: &str, namespace: &str, more: &Value) -> Result<()> {
    let path = root.join("run/containerd/io.containerd.runtime.v2.task/k8s.io").join(id).join("config.json");
    let mut content: Value = serde_json::from_slice(&fs::read(&path)?)?;
    content["annotations"]["io.kubernetes.cri.sandbox-namespace"] = json!(namespace);
    for (key, value) in more.as_object().into_iter().flatten() {
        content[key] = value.clone();
    }
    Ok(fs::write(path, content.to_string())?)
}

#[test]
fn devices_of_docker_and_podman_are_assigned_without_a_plugin() -> Result<()> {
    let sim = Sim::new(&format!("[[gpus]]\nuuid = '{FIRST}'\nminor = 7\n[[gpus]]\nuuid = '{SECOND}'\nminor = 8\n"))?;
    let (docker, podman) = (Docker::new()?, Podman::start()?);
    let by_docker = docker.with_device("with-gpu", "/dev/null", "nvidia7")?;
    let (by_podman, _) = podman.run_with("with-gpu", 300, &["--device", "/dev/null:/dev/nvidia8"])?;
    let podman_endpoint = format!("unix://{}", podman.socket().display());
    let endpoints = ["--docker-endpoint", &var("DOCKER_HOST")?, "--podman-endpoint", &podman_endpoint];
    let agent = Agent::start(Some(&sim), &endpoints)?;
    let mut expected = [format!("{by_docker} {FIRST} bundle"), format!("{by_podman} {SECOND} bundle")];
    expected.sort();
    wait_for_assigned(&agent, |s| s.labels["container_id"].clone(), &expected)?;
    let (code, out, err) = run_cli(&["explain", "--gpu", FIRST, "--agent", &format!("http://127.0.0.1:{}", agent.port)])?;
    assert_eq!(code, Some(0), "{err}");
    let row = out.lines().find(|line| line.contains("with-gpu")).with_context(|| out.clone())?;
    assert!(row.contains("  bundle  ") && row.contains("  0.00  "), "{out}");
    // A process outside of containers, jobs and units holds it, too.
    let outside = Running(Command::new("sleep").arg("300").spawn()?);
    let _load = sim.load(outside.0.id(), 0, 0.2, &[])?;
    wait_for("the process of the host is listed", SOON, || {
        let (_, out, _) = run_cli(&["explain", "--gpu", FIRST, "--agent", &format!("http://127.0.0.1:{}", agent.port)])?;
        Ok(out.lines().any(|line| line.contains("process-list") && line.contains("1.0 GiB")).then_some(()))
    })?;
    let (code, _, err) = run_cli(&["explain", "--gpu", "GPU-none", "--agent", &format!("http://127.0.0.1:{}", agent.port)])?;
    assert!(code == Some(1) && err.contains("no GPU with the UUID or index GPU-none"), "{err}");
    Ok(())
}

#[test]
fn fractions_are_held_by_who_has_them_and_not_by_the_reservation() -> Result<()> {
    let mig = format!("{{ uuid = '{}', gi = 1, ci = 0 }}, {{ uuid = '{}', gi = 2, ci = 0 }}", MIGS[0], MIGS[1]);
    let sim =
        Sim::new(&format!("[[gpus]]\nuuid = '{FIRST}'\nminor = 0\n[[gpus]]\nuuid = '{SECOND}'\nminor = 1\nmig = [{mig}]\n"))?;
    let (root, tree) = (tempfile::tempdir()?, CgroupTree::new("fractions")?);
    let hook = json!({"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook"}]});
    let with_variable =
        |value: &str| json!({"hooks": hook, "process": {"env": ["PATH=/bin", format!("NVIDIA_VISIBLE_DEVICES={value}")]}});
    // KAI gives its workloads the GPU by the variable, and has a pod that the kubelet gave the GPU to.
    let pods = [
        ("reservation", "kai-resource-reservation", with_variable(FIRST)),
        ("half", "prod", with_variable(FIRST)),
        ("quarter", "prod", with_variable(FIRST)),
        ("exporter", "monitoring", with_variable("all")),
        (
            "instance",
            "prod",
            json!({"linux": {"devices": [{"path": "/dev/nvidia1"}, {"path": "/dev/nvidia-caps/nvidia-cap30"}]}}),
        ),
        ("void", "prod", with_variable("void")),
    ];
    for (n, (name, namespace, more)) in pods.iter().enumerate() {
        let id = format!("{n:064x}");
        bundle(root.path(), &id, name, &uid(n))?;
        extend_bundle(root.path(), &id, namespace, more)?;
        tree.make(&format!("kubepods/pod{}/{id}", uid(n)))?;
    }
    let entries =
        json!([entry(&uid(0), "main", "nvidia.com/gpu", &[FIRST]), entry(&uid(4), "main", "nvidia.com/gpu", &["nvidia1/gi2"])]);
    checkpoint(&root.path().join("var/lib/kubelet"), &entries)?;
    let rootfs = root.path().to_string_lossy().into_owned();
    let agent = Agent::start(Some(&sim), &["--path-rootfs", &rootfs, "--label-sources", "bundle,kubelet"])?;
    let expected =
        [format!("half {FIRST} bundle"), format!("instance {} checkpoint", MIGS[1]), format!("quarter {FIRST} bundle")];
    wait_for_assigned(&agent, |s| s.labels["pod"].clone(), &expected)?;
    let (code, out, err) = run_cli(&["explain", "--gpu", "0", "--json", "--agent", &format!("http://127.0.0.1:{}", agent.port)])?;
    assert_eq!(code, Some(0), "{err}");
    let explained: Value = serde_json::from_str(&out)?;
    let holders = explained["holders"].as_array().context("holders")?;
    let mut pods: Vec<&str> = holders.iter().filter_map(|holder| holder["pod"].as_str()).collect();
    pods.sort_unstable();
    assert_eq!(pods, ["half", "quarter"], "{out}");
    assert!(holders.iter().all(|holder| holder["known_from"] == json!(["bundle"])), "{out}");
    assert_eq!(
        (&explained["unplaced"][0]["reservation"], &explained["unplaced"][0]["container"]),
        (&json!(true), &json!("main"))
    );
    // They hold it, and do not use it.
    let held_idle = || -> Result<Option<f64>> {
        let page = parse(&get(agent.port, "/metrics?collect[]=holding")?);
        Ok(sum(&page, "container_gpu_held_idle_seconds_total", &[("pod", "half")]))
    };
    wait_for("the time without use is counted", SOON, || Ok(held_idle()?.filter(|seconds| *seconds > 0.5).map(drop)))?;
    // With no namespace of reservations, the kubelet's word counts for that pod, too.
    drop(agent);
    let args = ["--path-rootfs", &rootfs, "--label-sources", "bundle,kubelet", "--reservation-namespace", ""];
    let agent = Agent::start(Some(&sim), &args)?;
    let with_reservation = [&expected[..], &[format!("reservation {FIRST} checkpoint")]].concat();
    wait_for_assigned(&agent, |s| s.labels["pod"].clone(), &with_reservation)
}

/// A kubelet with a root of its own in a container's cgroup.
const KUBELET: &str = "
import os, sys, time
root, cgroup = sys.argv[1:]
open(cgroup + '/cgroup.procs', 'w').write(str(os.getpid()))
open('/proc/self/comm', 'w').write('kubelet')
os.chroot(root)
print('ready', flush=True)
time.sleep(300)
";

#[test]
fn a_kubelet_in_a_container_assigns_gpus_to_the_pods_in_it() -> Result<()> {
    let sim = Sim::new(&format!("[[gpus]]\nuuid = '{FIRST}'\n"))?;
    let (tree, inside, empty) = (CgroupTree::new("kind")?, tempfile::tempdir()?, tempfile::tempdir()?);
    // Other tests have containers, too.
    let id = |digit: &str| format!("{:08x}{}", std::process::id(), digit.repeat(56));
    let (node, other, inner, forged) = (id("a"), id("b"), id("c"), id("d"));
    let outside = tree.make(&format!("docker/{node}"))?;
    // A container that its tenant has named after the pod, in another container.
    for (node, id) in [(&node, &inner), (&other, &forged)] {
        tree.make(&format!("docker/{node}/kubelet/kubepods/pod{UID}/{id}"))?;
    }
    checkpoint(&inside.path().join("var/lib/kubelet"), &json!([entry(UID, "main", "nvidia.com/gpu", &[FIRST])]))?;
    let logs = empty.path().join("var/log/containers");
    fs::create_dir_all(&logs)?;
    for id in [&inner, &forged] {
        fs::write(logs.join(format!("in-kind_prod_main-{id}.log")), "")?;
    }
    let mut kubelet = Command::new("python3");
    kubelet.arg("-c").arg(KUBELET).arg(inside.path()).arg(&outside).stdout(Stdio::piped());
    let mut kubelet = Running(kubelet.spawn().context("python3")?);
    let mut line = String::new();
    BufReader::new(kubelet.0.stdout.take().context("stdout is a pipe")?).read_line(&mut line)?;
    let rootfs = empty.path().to_string_lossy().into_owned();
    let agent = Agent::start(Some(&sim), &["--path-rootfs", &rootfs, "--label-sources", "logs,kubelet"])?;
    let expected = [format!("{inner} {FIRST} checkpoint")];
    wait_for_assigned(&agent, |s| s.labels["container_id"].clone(), &expected)?;
    // Also once the labels of the other one are known.
    std::thread::sleep(Duration::from_secs(2));
    wait_for_assigned(&agent, |s| s.labels["container_id"].clone(), &expected)
}
