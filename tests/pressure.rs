//! What containers wait for besides the GPU, from their real cgroups: a CPU quota of their own, of their pod, or none; and PSI.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{CgroupTree, Layout, attach, cgroup2};
use gpu_sampler_tests::{Agent, Running, Sample, Sim, sum};

const THROTTLED: &str = "container_gpu_cpu_throttled_seconds_total";
const PRESSURE: &str = "container_gpu_pressure_seconds_total";
/// 3 % of a processor: less than its share of a processor that all tests use.
const QUOTA_US: &str = "3000";
const WATCHED: Duration = Duration::from_secs(4);

/// A process that always wants the first processor.
fn busy() -> Result<Running> {
    let mut command = Command::new("taskset");
    command.args(["-c", "0", "sh", "-c", "while :; do :; done"]).stdin(Stdio::null());
    Ok(Running(command.spawn()?))
}

fn value(page: &[Sample], family: &str, id: &str, more: &[(&str, &str)]) -> Option<f64> {
    sum(page, family, &[&[("container_id", id)], more].concat())
}

/// Growth of a series between two pages; `None` where the series does not exist.
fn growth(before: &[Sample], after: &[Sample], family: &str, id: &str, more: &[(&str, &str)]) -> Option<f64> {
    Some(value(after, family, id, more)? - value(before, family, id, more)?)
}

fn limit(dir: &Path) -> Result<()> {
    std::fs::write(dir.join("cpu.cfs_quota_us"), QUOTA_US).with_context(|| dir.display().to_string())
}

/// Two scrapes, far enough apart.
fn watched(agent: &Agent) -> Result<(Vec<Sample>, Vec<Sample>)> {
    // A container is read from the second after its first sample on, and its series begins at 0.
    std::thread::sleep(Duration::from_secs(4));
    agent.scrape()?;
    std::thread::sleep(Duration::from_secs(1));
    let before = agent.scrape()?;
    std::thread::sleep(WATCHED);
    Ok((before, agent.scrape()?))
}

#[test]
fn throttling_by_a_containers_quota_or_its_pods_is_exported() -> Result<()> {
    const POD: &str = "kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c";
    let sim = Sim::new("[[gpus]]")?;
    let trees = [CgroupTree::new("pressure")?, CgroupTree::with_controller("cpu", "pressure")?];
    let agent = Agent::start(Some(&sim), &[])?;
    let mut processes = Vec::new();
    let mut ids = Vec::new();
    for n in 1..=3 {
        let id = format!("{:08x}{n:056x}", std::process::id());
        // For the second container, the pod has the quota.
        let path = if n == 2 { format!("{POD}/{id}") } else { id.clone() };
        let dirs = trees.iter().map(|tree| tree.make(&path)).collect::<Result<Vec<_>>>()?;
        match n {
            1 => limit(&dirs[1])?,
            2 => limit(dirs[1].parent().context("a pod")?)?,
            _ => {}
        }
        // Two processes in the last one, so that one of them waits for the processor.
        for _ in 0..if n == 3 { 2 } else { 1 } {
            let process = busy()?;
            dirs.iter().try_for_each(|dir| attach(process.0.id(), dir))?;
            processes.push(process);
        }
        let pid = processes[processes.len() - 1].0.id();
        processes.push(sim.load(pid, 0, 0.2, &[])?);
        ids.push(id);
    }
    let (before, after) = watched(&agent)?;
    let [own, of_pod, free] = [0, 1, 2].map(|n| growth(&before, &after, THROTTLED, &ids[n], &[]));
    let waited = growth(&before, &after, PRESSURE, &ids[2], &[("resource", "cpu")]);
    println!(
        "throttled in {WATCHED:?}: own quota {own:?}, the pod's {of_pod:?}, none {free:?}; waited for a processor {waited:?}"
    );
    for (which, got) in [("own", own), ("pod", of_pod)] {
        // The process is stopped for most of each period.
        let got = got.context(which)?;
        assert!((1.0..=WATCHED.as_secs_f64() + 1.5).contains(&got), "{which}: {got}");
    }
    assert_eq!(free, Some(0.0));
    assert!(waited.is_some_and(|s| s > 0.2), "{waited:?}");
    for resource in ["memory", "io"] {
        assert!(value(&after, PRESSURE, &ids[0], &[("resource", resource)]).is_some(), "{resource}");
    }
    let cost = sum(&after, "gpu_sampler_pressure_read_seconds_total", &[]).context("the cost is exported")?;
    let files = sum(&after, "gpu_sampler_pressure_reads_total", &[]).context("the reads are exported")?;
    println!("{files} files in {:.3} ms, {:.1} us each", cost * 1e3, cost / files * 1e6);
    assert_eq!(sum(&after, "gpu_sampler_pressure_reads_total", &[("outcome", "error")]), Some(0.0));
    drop(processes);
    Ok(())
}

/// Where v2 is the only hierarchy and has the cpu controller, the same numbers come from v2; without the controller they are absent.
#[test]
fn pressure_that_v2_alone_does_not_provide_is_absent() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let tree = CgroupTree::new("pressure2")?;
    let agent = Agent::start_in(Layout::PureV2, Some(&sim), &[])?;
    let has_cpu = std::fs::read_to_string(cgroup2()?.join("cgroup.controllers"))?.split_whitespace().any(|c| c == "cpu");
    let (id, dir) = tree.container(1)?;
    if has_cpu {
        std::fs::write(cgroup2()?.join("cgroup.subtree_control"), "+cpu")?;
        std::fs::write(dir.parent().context("a parent")?.join("cgroup.subtree_control"), "+cpu")?;
        std::fs::write(dir.join("cpu.max"), format!("{QUOTA_US} 100000"))?;
    }
    let process = busy()?;
    attach(process.0.id(), &dir)?;
    let _load = sim.load(process.0.id(), 0, 0.2, &[])?;
    let (before, after) = watched(&agent)?;
    let throttled = growth(&before, &after, THROTTLED, &id, &[]);
    println!("cpu controller on v2: {has_cpu}; throttled {throttled:?}");
    assert_eq!(throttled.is_some_and(|s| s > 1.0), has_cpu, "{throttled:?}");
    assert_eq!(throttled.is_some(), has_cpu, "unknown is absent");
    assert!(value(&after, PRESSURE, &id, &[("resource", "cpu")]).is_some());
    drop(process);
    Ok(())
}
