//! Labels of real Docker containers, and what the agent leaves behind when it is killed.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use gpu_sampler_tests::{Agent, Docker, Sim, wait_for};

const LABELS: [&str; 11] =
    ["acc_id", "make", "model", "id", "name", "image", "namespace", "pod", "pod_name", "container", "container_name"];

#[test]
fn containers_started_before_and_after_the_agent_have_every_label() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let docker = Docker::new()?;
    let before = docker.pod("prod", "before-0", 120)?;
    let _load_before = sim.load(before.1, 0, 0.3, &[])?;
    let agent = Agent::start(Some(&sim), &[])?;
    let after = docker.pod("prod", "after-0", 120)?;
    let _load_after = sim.load(after.1, 0, 0.3, &[])?;
    for (pod, (id, _)) in [("before-0", &before), ("after-0", &after)] {
        for path in ["/metrics", "/metrics/cadvisor"] {
            let found = wait_for(&format!("{pod} in {path}"), Duration::from_secs(20), || {
                let samples = gpu_sampler_tests::parse(&gpu_sampler_tests::get(agent.port, path)?);
                let ours = |s: &gpu_sampler_tests::Sample| s.name == "container_accelerator_duty_cycle" && s.labels["pod"] == pod;
                Ok(samples.into_iter().find(ours))
            })?;
            for label in LABELS {
                assert!(found.labels.get(label).is_some_and(|v| !v.is_empty()), "{pod} lacks {label}: {found:?}");
            }
            assert_eq!(found.labels.len(), LABELS.len());
            assert_eq!(
                (&*found.labels["namespace"], &*found.labels["container"], &*found.labels["pod_name"]),
                ("prod", "main", pod)
            );
            assert!(found.labels["id"].contains(id.as_str()) && found.labels["image"].starts_with("gpu-sampler-test"));
        }
    }
    Ok(())
}

#[test]
fn pod_labels_can_be_limited_to_either_generation() -> Result<()> {
    let (sim, docker) = (Sim::new("[[gpus]]")?, Docker::new()?);
    let (_, pid) = docker.pod("prod", "labelled", 120)?;
    let _load = sim.load(pid, 0, 0.3, &[])?;
    for (which, has, lacks) in [
        ("old", ["pod_name", "container_name"], ["pod", "container"]),
        ("new", ["pod", "container"], ["pod_name", "container_name"]),
    ] {
        let agent = Agent::start(Some(&sim), &["--pod-labels", which])?;
        let found = wait_for("the container has a series", Duration::from_secs(20), || {
            Ok(agent.scrape()?.into_iter().find(|s| s.name == "container_accelerator_duty_cycle"))
        })?;
        assert!(has.iter().all(|l| found.labels.get(*l).is_some_and(|v| !v.is_empty())), "{found:?}");
        assert!(lacks.iter().all(|l| !found.labels.contains_key(*l)), "{found:?}");
    }
    Ok(())
}

fn programs() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(fds) = std::fs::read_dir(entry.path().join("fdinfo")) else { continue };
        for fd in fds.flatten() {
            let info = std::fs::read_to_string(fd.path()).unwrap_or_default();
            found.extend(info.lines().filter(|l| l.starts_with("prog_id:")).map(str::to_owned));
        }
    }
    Ok(found)
}

#[test]
fn a_killed_agent_leaves_nothing_in_the_kernel() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let before = programs()?.len();
    let mut agent = Agent::start(Some(&sim), &["--kernel-mode", "raw_tracepoint"])?;
    assert!(programs()?.len() >= before + 7, "the agent holds its programs");
    agent.process.ends_with(libc::SIGKILL)?;
    assert_eq!(programs()?.len(), before);
    // Nothing is pinned, so the BPF file system has no entry of the agent.
    let pinned = Command::new("find").args(["/sys/fs/bpf", "-name", "*sampler*"]).output()?;
    assert!(pinned.stdout.is_empty());
    Ok(())
}
