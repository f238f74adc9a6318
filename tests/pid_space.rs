//! PIDs of another kernel are credited to no container, whichever local process has the same number; PIDs of this machine are credited
//! from the first sample on.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{Actor, CgroupTree, Layout};
use gpu_sampler_tests::record::{credited, expected};
use gpu_sampler_tests::{Agent, Running, Sim, get, run_cli, sum, var, wait_for};
use serde_json::Value;

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
const GPUS: usize = 3;

/// `nvml-sim run` of an idle process; it holds the device nodes of its GPU where the world has them.
fn run(sim: &Sim, gpu: usize, args: &[&str]) -> Result<Running> {
    let mut command = Command::new(var("NVML_SIM_BIN")?);
    command.arg("run").arg("--dir").arg(sim.dir.path()).args(["--gpu", &gpu.to_string(), "--demand", "1", "--mem", "1GiB"]);
    Ok(Running(command.args(args).args(["--", "sleep", "300"]).stdin(Stdio::null()).spawn()?))
}

fn state(agent: &Agent) -> Result<String> {
    let page = agent.scrape()?;
    let states: Vec<_> = page.iter().filter(|s| s.name == "gpu_sampler_pid_space" && s.value == 1.0).collect();
    assert_eq!(states.len(), 1, "one state holds: {states:?}");
    Ok(states[0].labels["state"].clone())
}

/// The message of the agent's `pid-space` condition, if it holds.
fn condition(agent: &Agent) -> Result<Option<String>> {
    let live: Value = serde_json::from_str(&get(agent.port, "/api/v1/live")?)?;
    let all = live["degraded"].as_array().context("degraded")?;
    Ok(all.iter().find(|c| c["what"] == "pid-space").and_then(|c| c["message"].as_str()).map(str::to_owned))
}

/// The result of doctor's check of the driver's PIDs: status, and the whole check.
fn doctor(sim: &Sim) -> Result<(String, String)> {
    let (library, devices) = (sim.library().display().to_string(), sim.devices().display().to_string());
    let args = ["doctor", "--json", "--listen", "127.0.0.1:0", "--nvml-lib", &library, "--path-devfs", &devices];
    let (_, out, err) = run_cli(&args)?;
    let report: Value = serde_json::from_str(&out).context(err)?;
    let checks = report["checks"].as_array().context("checks")?;
    let check = checks.iter().find(|c| c["name"] == "driver's pids").context("a check of the driver's pids")?;
    Ok((check["status"].as_str().context("status")?.to_owned(), check.to_string()))
}

fn unattributed(agent: &Agent, reason: &str) -> Result<f64> {
    Ok(sum(&agent.scrape()?, "gpu_unattributed_seconds_total", &[("reason", reason)]).unwrap_or_default())
}

/// One process in each of three containers, which do not use a GPU.
fn bystanders(tree: &CgroupTree) -> Result<(Vec<u32>, Vec<Actor>)> {
    let (mut pids, mut actors) = (Vec::new(), Vec::new());
    for n in 0..GPUS {
        let (_, dir) = tree.container(n)?;
        let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", "sleep", "300"])?;
        pids.push(actor.pid()?);
        actors.push(actor);
    }
    Ok((pids, actors))
}

/// Processes of another kernel with the PIDs of local processes in containers.
fn foreign(mode: &str) -> Result<()> {
    let sim = Sim::new(&format!("nodes = true\npid_rule = 'last'\nperiod_us = 100000\n{}", "[[gpus]]\n".repeat(GPUS)))?;
    let tree = CgroupTree::new("foreign")?;
    let (pids, actors) = bystanders(&tree)?;
    let mut loads = Vec::new();
    for (gpu, pid) in pids.iter().enumerate() {
        loads.push(run(&sim, gpu, &["--shown-as", &pid.to_string()])?);
    }
    let agent = Agent::start(Some(&sim), &["--kernel-mode", mode])?;
    let from = Instant::now();
    wait_for("the PID space is foreign", Duration::from_secs(20), || Ok((state(&agent)? == "foreign").then_some(())))?;
    println!("{mode}: foreign after {:.1} s", from.elapsed().as_secs_f64());
    std::thread::sleep(Duration::from_secs(3));
    let message = condition(&agent)?.context("the condition is reported")?;
    assert!(message.contains("not this machine's") && message.contains("kernel has the NVIDIA module"), "{message}");
    let page = agent.scrape()?;
    let (busy, unknown) = (
        sum(&page, "gpu_time_seconds_total", &[("state", "busy")]).context("busy")?,
        sum(&page, "gpu_unattributed_seconds_total", &[("reason", "pid_unknown")]).context("pid_unknown")?,
    );
    assert!(busy > 3.0 && (busy - unknown).abs() < 1e-6, "{busy} s busy, {unknown} s pid_unknown");
    // Neither seconds nor memory at any time: not even a series exists.
    let of_containers: Vec<_> = page.iter().filter(|s| s.name.starts_with("container_")).collect();
    assert!(of_containers.is_empty(), "{of_containers:?}");
    let (status, check) = doctor(&sim)?;
    assert!(status == "degraded" && check.contains("not this machine's"), "{check}");
    drop((loads, actors));
    Ok(())
}

#[test]
fn foreign_pids_that_collide_with_local_containers_credit_no_container() -> Result<()> {
    foreign("raw_tracepoint")
}

#[test]
fn foreign_pids_credit_no_container_in_kernel_mode_procfs() -> Result<()> {
    foreign("procfs")
}

#[test]
fn foreign_pids_without_a_local_process_are_detected() -> Result<()> {
    let sim = Sim::new(&format!("nodes = true\nforeign_pids = true\n{}", "[[gpus]]\n".repeat(GPUS)))?;
    let loads = (0..GPUS).map(|gpu| run(&sim, gpu, &[])).collect::<Result<Vec<_>>>()?;
    let agent = Agent::start(Some(&sim), &[])?;
    wait_for("the PID space is foreign", Duration::from_secs(20), || Ok((state(&agent)? == "foreign").then_some(())))?;
    let (status, check) = doctor(&sim)?;
    assert!(status == "degraded" && check.contains("not this machine's"), "{check}");
    drop(loads);
    Ok(())
}

#[test]
fn a_colliding_pid_is_not_credited_and_a_true_local_pid_settles_the_space() -> Result<()> {
    let sim = Sim::new("nodes = true\npid_rule = 'last'\n[[gpus]]\n[[gpus]]")?;
    let tree = CgroupTree::new("collides")?;
    let (pids, actors) = bystanders(&tree)?;
    let load = run(&sim, 0, &["--shown-as", &pids[0].to_string()])?;
    let agent = Agent::start(Some(&sim), &[])?;
    wait_for("a condition names the PID", Duration::from_secs(20), || {
        Ok(condition(&agent)?.filter(|message| message.contains(&format!("such as {}", pids[0]))))
    })?;
    assert_eq!(state(&agent)?, "unsettled");
    wait_for("its time is counted as pid_unknown", Duration::from_secs(10), || {
        Ok((unattributed(&agent, "pid_unknown")? > 1.0).then_some(()))
    })?;
    let page = agent.scrape()?;
    assert!(page.iter().all(|s| !s.name.starts_with("container_")), "no container is credited");
    let (status, check) = doctor(&sim)?;
    assert!(status == "degraded" && check.contains("not settled") && check.contains(&pids[0].to_string()), "{check}");
    let local = run(&sim, 1, &[])?;
    wait_for("a process that holds the nodes settles the space", Duration::from_secs(10), || {
        Ok((state(&agent)? == "local" && condition(&agent)?.is_none()).then_some(()))
    })?;
    let (status, check) = doctor(&sim)?;
    assert!(status == "ok", "{check}");
    drop((load, local, actors));
    Ok(())
}

/// Runs processes in two containers and returns the share of the driver's recorded samples that were credited to them.
fn credited_part(sim: &Sim, period_us: u64) -> Result<f64> {
    let tree = CgroupTree::new("local")?;
    let (_, first) = tree.container(1)?;
    let (_, second) = tree.container(2)?;
    let agent = Agent::start(Some(sim), &[])?;
    // The first process alone settles the space, on a GPU that was idle.
    std::thread::sleep(Duration::from_secs(1));
    let args = ["--count", "36", "--at-once", "6", "--lasting", "1500ms..2500ms", "--demand", "0.9"];
    let dirs: [&Path; 2] = [&first, &second];
    let lives = sim.lives(&dirs, &args)?.all()?;
    std::thread::sleep(Duration::from_secs(3));
    agent.scrape()?;
    let got = credited(&agent.scrape()?);
    let want = expected(&lives, &sim.samples()?, period_us)?;
    let all: u64 = want.values().sum();
    assert!(all > 200, "{all} samples");
    for reason in ["pid_unknown", "ambiguous", "no_pid"] {
        println!("{reason}: {:.2} s", unattributed(&agent, reason)?);
    }
    for (pair, n) in &got {
        assert!(want.get(pair).is_some_and(|most| n <= most), "{pair:?}: {n} credited, {want:?}");
    }
    Ok(got.values().sum::<u64>() as f64 / all as f64)
}

#[test]
fn local_pids_are_credited_from_the_start() -> Result<()> {
    for (nodes, expect) in [(true, "local"), (false, "unverifiable")] {
        let sim = Sim::new(&format!("nodes = {nodes}\npid_rule = 'last'\nperiod_us = 100000\n{}", "[[gpus]]\n".repeat(GPUS)))?;
        let part = credited_part(&sim, 100_000)?;
        println!("{expect}: {:.2} % of the driver's samples are credited", part * 100.0);
        assert!(part >= 0.99, "{expect}: {part}");
        let agent = Agent::start_in(Layout::Machine, Some(&sim), &[])?;
        assert_eq!(state(&agent)?, if nodes { "unsettled" } else { "unverifiable" });
        assert_eq!(condition(&agent)?, None, "an idle GPU is not a condition");
        let load = run(&sim, 0, &[])?;
        wait_for(expect, Duration::from_secs(10), || Ok((state(&agent)? == expect).then_some(())))?;
        assert_eq!(condition(&agent)?, None);
        let (status, check) = doctor(&sim)?;
        assert_eq!(status, "ok", "{check}");
        drop(load);
    }
    Ok(())
}
