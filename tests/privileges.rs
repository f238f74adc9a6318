//! Every feature as another user with exactly the documented capabilities, and what fails without each of them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{CgroupTree, Layout, attach};
use gpu_sampler_tests::{Agent, Docker, Running, Sample, Sim, run_cli, sum, var, wait_for};

/// The set of docs/security.md.
const NEEDED: [&str; 5] = ["bpf", "perfmon", "sys_ptrace", "dac_read_search", "sys_resource"];
/// A user that owns nothing.
const USER: &str = "65534";
const STEP: &str = "slurm/uid_1000/job_41/step_0/task_0";

/// A folder of that user, with a copy of the agent: the build may be in a folder of root.
fn home() -> Result<tempfile::TempDir> {
    let home = tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o755)).tempdir()?;
    std::fs::copy(var("GPU_SAMPLER_BIN")?, home.path().join("gpu-sampler"))?;
    let owned = Command::new("chown").arg("-R").arg(format!("{USER}:{USER}")).arg(home.path()).status()?;
    ensure!(owned.success(), "chown failed");
    Ok(home)
}

/// An agent of that user with these capabilities.
fn agent(sim: &Sim, home: &Path, capabilities: &[&str]) -> Result<Agent> {
    let own = effective(std::process::id())?;
    // A container may lack sys_resource, which only kernels before 5.11 need.
    let has = |name: &&&str| **name != "sys_resource" || own & (1 << 24) != 0;
    let set = capabilities.iter().filter(has).fold("-all".to_owned(), |set, name| format!("{set},+{name}"));
    let mut command = Command::new("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--clear-groups", "--no-new-privs"]);
    command.args(["--inh-caps", &set, "--ambient-caps", &set, "--bounding-set", &set]);
    command.arg(home.join("gpu-sampler")).arg("run").arg("--nvml-lib").arg(sim.library());
    command.env("NVML_SIM_DIR", sim.dir.path()).env("GPU_SAMPLER_PATH_DEVFS", sim.devices());
    Agent::start_as(Layout::Machine, command, &["--session-dir", &home.join("sessions").display().to_string()])
}

/// How many of the needed capabilities this process can give: a container may have fewer than all.
fn given() -> Result<u32> {
    // By number, as in linux/capability.h: dac_read_search, sys_ptrace, sys_resource, perfmon, bpf.
    let needed = [2, 19, 24, 38, 39].iter().fold(0, |set, bit| set | 1_u64 << bit);
    Ok((effective(std::process::id())? & needed).count_ones())
}

/// The capabilities that a process has.
fn effective(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff")?;
    Ok(u64::from_str_radix(line.trim(), 16)?)
}

fn share_to(sim: &Sim) -> Result<()> {
    // The simulated driver is a folder of this test.
    let opened = Command::new("chmod").args(["-R", "a+rwX"]).arg(sim.dir.path()).status()?;
    ensure!(opened.success(), "chmod failed");
    Ok(())
}

#[test]
fn every_feature_works_with_exactly_the_needed_capabilities() -> Result<()> {
    let (sim, docker, home) = (Sim::new("[[gpus]]")?, Docker::new()?, home()?);
    share_to(&sim)?;
    let agent = agent(&sim, home.path(), &NEEDED)?;
    ensure!(effective(agent.process.0.id())?.count_ones() == given()?, "it has other capabilities");
    let (id, pid) = docker.pod("prod", "trainer-0", 120)?;
    let _load = sim.load(pid, 0, 0.4, &[])?;
    let tree = CgroupTree::new("privileges")?;
    let cgroup = tree.make(STEP)?;
    let job = Running(
        Command::new("setpriv")
            .args(["--reuid", "1000", "--regid", "1000", "--clear-groups", "sleep", "300"])
            .env("SLURM_JOB_ID", "41")
            .env("SLURM_JOB_NAME", "finetune")
            .spawn()?,
    );
    attach(job.0.id(), &cgroup)?;
    let _job_load = sim.load(job.0.id(), 0, 0.2, &[])?;
    let page = wait_for("both users have GPU time", Duration::from_secs(30), || {
        let page = agent.scrape()?;
        let has = |name: &str, labels: &[(&str, &str)]| sum(&page, name, labels).is_some_and(|seconds| seconds > 0.5);
        let is_complete =
            has("container_gpu_seconds_total", &[("pod", "trainer-0")]) && has("gpu_user_seconds_total", &[("kind", "job")]);
        Ok(is_complete.then_some(page))
    })?;
    let is = |name: &str, labels: &[(&str, &str)], value: f64| {
        let found = sum(&page, name, labels);
        ensure!(found == Some(value), "{name} {labels:?}: {found:?}, not {value}");
        Ok(())
    };
    is("gpu_sampler_kernel_mode", &[("mode", "raw_tracepoint")], 1.0)?;
    is("gpu_sampler_source_up", &[("source", "nvml")], 1.0)?;
    let labelled = page.iter().find(|s| s.name == "container_accelerator_duty_cycle" && s.labels["pod"] == "trainer-0");
    let labelled = labelled.context("no series of the container")?;
    for label in ["image", "name", "namespace", "container"] {
        ensure!(!labelled.labels[label].is_empty(), "{label} is blank: {labelled:?}");
    }
    let details = page.iter().find(|s| s.name == "gpu_user_info" && s.labels["kind"] == "job").context("no job")?;
    ensure!(details.labels["job_name"] == "finetune", "the environment of another user's process was not read: {details:?}");
    let pressure = |s: &&Sample| s.name == "container_gpu_pressure_seconds_total" && s.labels["pod"] == "trainer-0";
    wait_for("pressure is read", Duration::from_secs(20), || Ok(agent.scrape()?.iter().find(pressure).map(|_| ())))?;
    let url = format!("http://127.0.0.1:{}", agent.port);
    let file = home.path().join("s.gpus").display().to_string();
    for args in [
        &["record", "--agent", &url, "--duration", "2s", "-o", &file][..],
        &["explain", "--agent", &url, "--pid", &pid.to_string()],
        &["explain", "--agent", &url, "--container", &id],
        &["explain", "--agent", &url, "--gpu", "0"],
        &["top", "--once", "--agent", &url],
        &["release", "--agent", &url, "--for", "1s"],
    ] {
        let (code, out, error) = run_cli(args)?;
        ensure!(code == Some(0) && !out.is_empty(), "{args:?}: {out}{error}");
    }
    Ok(())
}

#[test]
fn an_agent_of_root_keeps_the_needed_capabilities_alone_and_starts_no_program() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let agent = Agent::start(Some(&sim), &[])?;
    let pid = agent.process.0.id();
    ensure!(effective(pid)?.count_ones() == given()?, "{:x}", effective(pid)?);
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let has = |line: &str| status.lines().any(|found| found.split_whitespace().eq(line.split(' ')));
        ensure!(has("NoNewPrivs: 1") && has("Seccomp: 2"), "{status}");
    }
    let kept = Agent::start(Some(&sim), &["--keep-capability", "sys_admin,mknod", "--seccomp", "false"])?;
    let all = effective(kept.process.0.id())?;
    // sys_admin and mknod.
    ensure!(all & (1 << 21 | 1 << 27) == effective(std::process::id())? & (1 << 21 | 1 << 27), "{all:x}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", kept.process.0.id()))?;
    ensure!(status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "0"])), "{status}");
    Ok(())
}

#[test]
fn without_one_of_the_capabilities_the_named_part_fails_and_is_reported() -> Result<()> {
    let (sim, docker, home) = (Sim::new("[[gpus]]")?, Docker::new()?, home()?);
    share_to(&sim)?;
    let (_, pid) = docker.pod("prod", "trainer-0", 300)?;
    let _load = sim.load(pid, 0, 0.4, &[])?;
    for missing in ["bpf", "perfmon", "dac_read_search", "sys_ptrace"] {
        let rest: Vec<&str> = NEEDED.into_iter().filter(|name| *name != missing).collect();
        let agent = agent(&sim, home.path(), &rest)?;
        wait_for(&format!("the effect of missing {missing}"), Duration::from_secs(30), || {
            let page = agent.scrape()?;
            let is_inotify = sum(&page, "gpu_sampler_kernel_mode", &[("mode", "inotify")]) == Some(1.0);
            let has_time = sum(&page, "container_gpu_seconds_total", &[]).is_some_and(|seconds| seconds > 0.5);
            let lacks_labels = sum(&page, "gpu_sampler_label_missing", &[("label", "image")]).is_some_and(|n| n > 0.0);
            let foreign = sum(&page, "gpu_sampler_pid_space", &[("state", "local")]) != Some(1.0);
            Ok(match missing {
                "bpf" | "perfmon" => is_inotify && has_time,
                "dac_read_search" => lacks_labels,
                _ => foreign || lacks_labels,
            }
            .then_some(()))
        })?;
    }
    Ok(())
}
