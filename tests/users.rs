//! Users of GPUs that are not containers: jobs, units, login sessions, and pods with processes in their own cgroups.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{CgroupTree, Layout, attach, sleeper};
use gpu_sampler_tests::kubelet::{Kubelet, pod};
use gpu_sampler_tests::labels::{SOON, UID};
use gpu_sampler_tests::record::{Samples, expected_by};
use gpu_sampler_tests::{Agent, Running, Sample, Sim, run_cli, sum, wait_for};
use serde_json::Value;

/// Every sample has to be queried, on a machine that is busy with other things.
const ARGS: [&str; 4] = ["--kernel-mode", "raw_tracepoint", "--gpu-budget-percent", "50"];
const PERIOD_US: u64 = 167_139;
const SLURM_STEP: &str = "system.slice/slurmstepd.scope/job_7/step_0/user/task_0";
const OTHER_STEP: &str = "system.slice/slurmstepd.scope/job_8/step_batch/user/task_0";
const UNIT: &str = "system.slice/vllm.service";
const SESSION: &str = "user.slice/user-1000.slice/session-3.scope";

/// The cgroups of processes, each with the kind and name of its user.
const USERS: [(&str, &str, &str); 7] = [
    (SLURM_STEP, "job", "slurm/7"),
    (OTHER_STEP, "job", "slurm/8"),
    ("slurm/uid_1000/job_9/step_0/task_0", "job", "slurm/9"),
    (
        "nomad.slice/share.slice/b30be889-ebb4-8524-cc84-bfd79acd6057.web.scope",
        "job",
        "nomad/b30be889-ebb4-8524-cc84-bfd79acd6057/web",
    ),
    (UNIT, "unit", "vllm.service"),
    ("user.slice/user-1000.slice/user@1000.service/app.slice/jupyter.service", "unit", "uid/1000/jupyter.service"),
    (SESSION, "login", "uid/1000"),
];

/// Samples per (user, GPU uuid), from the metrics page.
fn credited(page: &[Sample]) -> Samples {
    let ours = page.iter().filter(|s| s.name == "gpu_user_samples_total" && s.value > 0.0);
    ours.map(|s| ((s.labels["user"].clone(), s.labels["uuid"].clone()), s.value as u64)).collect()
}

fn explained(path: &str) -> Result<Value> {
    let (code, out, err) = run_cli(&["explain", "--offline", "--json", "--cgroup", path])?;
    assert_eq!(code, Some(0), "{path}: {err}");
    Ok(serde_json::from_str(&out)?)
}

/// Processes in the order of a Slurm step's launch: forked in the scheduler's cgroup, moved, then exec'd.
fn launched(layout: Layout, tree: &CgroupTree) -> Result<()> {
    let sim = Sim::new(&format!("seed = 23\nperiod_us = {PERIOD_US}\n[[gpus]]\n[[gpus]]\npid_rule = 'last'\n"))?;
    let cgroups = USERS.iter().map(|(path, ..)| tree.make(path)).collect::<Result<Vec<PathBuf>>>()?;
    let agent = Agent::start_in(layout, Some(&sim), &ARGS)?;
    // The first read of the driver's rings only sets the watermarks.
    std::thread::sleep(Duration::from_secs(1));
    let dirs: Vec<&Path> = cgroups.iter().map(PathBuf::as_path).collect();
    let lives =
        sim.lives(&dirs, &["--launch", "0ms..20ms", "--lasting", "200ms..600ms", "--at-once", "3", "--count", "150"])?.all()?;
    std::thread::sleep(Duration::from_secs(12));
    agent.scrape()?;
    let page = agent.scrape()?;
    let name_of = |cgroup: &str| {
        let user = USERS.iter().find(|(path, ..)| cgroup.ends_with(path)).map(|(.., user)| (*user).to_owned());
        user.unwrap_or_else(|| cgroup.to_owned())
    };
    let (got, want) = (credited(&page), expected_by(&lives, &sim.samples()?, PERIOD_US, name_of)?);
    gpu_sampler_tests::record::assert_same(&page, &got, &want);
    assert_eq!(want.len(), 2 * USERS.len(), "each user had samples on each GPU: {want:?}");
    for reason in ["invalid_pid", "pid_unknown", "host", "mps", "ambiguous", "lost"] {
        assert_eq!(sum(&page, "gpu_unattributed_seconds_total", &[("reason", reason)]), Some(0.0), "{reason}");
    }
    // Sums count once: what is credited and what is not is the busy time.
    let total = |name: &str, labels: &[(&str, &str)]| sum(&page, name, labels).unwrap_or_default();
    let busy = total("gpu_time_seconds_total", &[("state", "busy")]);
    let parts = total("gpu_credited_seconds_total", &[]) + total("gpu_unattributed_seconds_total", &[]);
    assert!((busy - parts).abs() < 1e-3, "busy {busy} s, parts {parts} s");
    assert_eq!(sum(&page, "container_gpu_seconds_total", &[]), None, "dashboards of containers stay as they are");
    for kind in ["job", "unit", "login"] {
        let by_user = total("gpu_user_seconds_total", &[("kind", kind)]);
        let credited = total("gpu_credited_seconds_total", &[("kind", kind)]);
        assert!(by_user > 0.0 && (by_user - credited).abs() < 1e-3, "{kind}: {by_user} s, {credited} s");
    }
    for ((path, kind, user), dir) in USERS.iter().zip(&cgroups) {
        let explanation = explained(&tree.path_of(dir))?;
        assert_eq!((&explanation["kind"], &explanation["user"]), (&(*kind).into(), &(*user).into()), "{path}");
    }
    Ok(())
}

#[test]
fn jobs_units_and_sessions_are_credited_with_the_samples_of_their_processes() -> Result<()> {
    launched(Layout::Machine, &CgroupTree::new("users")?)
}

#[test]
fn jobs_units_and_sessions_are_credited_on_cgroup_v2_alone() -> Result<()> {
    launched(Layout::PureV2, &CgroupTree::new("users-v2")?)
}

#[test]
fn jobs_units_and_sessions_are_credited_on_cgroup_v1() -> Result<()> {
    launched(Layout::Machine, &CgroupTree::v1("users-v1")?)
}

/// A user that this machine's `/etc/passwd` has no name for.
const NAMELESS_UID: u32 = 1_987_654_321;

/// A process of the test's own in this cgroup, with these variables.
fn process_of_job(cgroup: &Path, environ: &[(&str, &str)]) -> Result<Running> {
    let mut command = Command::new("sleep");
    let running = Running(command.arg("300").env_clear().envs(environ.iter().copied()).uid(NAMELESS_UID).spawn()?);
    attach(running.0.id(), cgroup)?;
    Ok(running)
}

#[test]
fn contention_and_sessions_are_by_job_unit_and_container_alike() -> Result<()> {
    let sim = Sim::new("seed = 29\nperiod_us = 50000\n")?;
    let tree = CgroupTree::new("edges")?;
    let (container_id, container) = tree.container(0)?;
    let environ = [("SLURM_JOB_ID", "7"), ("SLURM_JOB_USER", "ann"), ("SLURM_JOB_PARTITION", "gpu"), ("SLURM_JOB_NAME", "train")];
    let job = process_of_job(&tree.make(SLURM_STEP)?, &environ)?;
    let others = [sleeper(&tree.make(OTHER_STEP)?)?, sleeper(&tree.make(UNIT)?)?, sleeper(&container)?];
    let agent = Agent::start(Some(&sim), &ARGS)?;
    let pids = std::iter::once(&job).chain(&others).map(|running| running.0.id());
    let loads = pids.zip([0.9, 0.8, 0.7, 0.6]).map(|(pid, demand)| sim.load(pid, 0, demand, &[])).collect::<Result<Vec<_>>>()?;
    let users = ["slurm/7", "slurm/8", "vllm.service", container_id.as_str()];

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("users.gpus").to_string_lossy().into_owned();
    let agent_url = format!("http://127.0.0.1:{}", agent.port);
    let (code, _, err) = run_cli(&["record", "--duration", "15s", "--lookback", "0s", "-o", &file, "--agent", &agent_url])?;
    assert_eq!(code, Some(0), "{err}");
    let page = agent.scrape()?;
    // Each contends with each, whatever they are.
    for user in users {
        let own = if user == container_id { ("container_id", user) } else { ("user", user) };
        let family =
            if user == container_id { "container_gpu_contention_seconds_total" } else { "gpu_user_contention_seconds_total" };
        for other in users.into_iter().filter(|other| *other != user) {
            let seconds = sum(&page, family, &[own, ("other_container_id", other)]);
            assert!(seconds > Some(0.5), "{user} with {other}: {seconds:?} s");
        }
    }
    let info = page.iter().find(|s| s.name == "gpu_user_info" && s.labels["user"] == "slurm/7").context("gpu_user_info")?;
    let expect = [
        ("kind", "job"),
        ("scheduler", "slurm"),
        ("job_id", "7"),
        ("job_name", "train"),
        ("uid", "1987654321"),
        ("user_name", "ann"),
        ("partition", "gpu"),
        ("unit", ""),
    ];
    for (label, value) in expect {
        assert_eq!(info.labels[label], value, "{label}");
    }

    // The report has the same users, with their GPU-seconds within the stated errors of the truth.
    let (code, out, err) = run_cli(&["report", &file, "--format", "json"])?;
    assert_eq!(code, Some(0), "{err}");
    let report: Value = serde_json::from_str(&out)?;
    let (start, seconds) = (report["start"].as_str().context("start")?, report["duration_seconds"].as_f64().context("duration")?);
    let end = humantime::parse_rfc3339(start)? + Duration::from_secs_f64(seconds);
    let end = humantime::format_rfc3339_millis(end).to_string();
    let truth = sim.truth(&["--from", start, "--to", &end])?;
    let of_pid = |pid: u32| {
        let processes = truth["gpus"][0]["processes"].as_array()?;
        processes.iter().find(|process| process["pid"] == pid)?["gpu_seconds"].as_f64()
    };
    let pids = std::iter::once(&job).chain(&others).map(|running| running.0.id());
    for ((user, pid), kind) in users.iter().zip(pids).zip(["job", "job", "unit", "container"]) {
        let all = report["users"].as_array().context("users")?;
        let found =
            all.iter().find(|found| found["user"] == *user || found["container_id"] == *user).with_context(|| out.clone())?;
        assert_eq!(found["kind"], kind, "{user}");
        let usage = &found["gpus"][0];
        let (got, error) = (usage["gpu_seconds"].as_f64(), usage["gpu_seconds_stderr"].as_f64());
        let (got, error, want) = (got.context("seconds")?, error.context("error")?, of_pid(pid).context("truth")?);
        assert!((got - want).abs() < 5.0 * error + 0.1, "{user}: {got} ± {error} s, truth {want} s");
        assert_eq!(usage["contenders"].as_array().map(Vec::len), Some(3), "{user}: {usage}");
    }
    let (_, text, _) = run_cli(&["report", &file])?;
    for user in ["slurm/7", "slurm/8", "vllm.service"] {
        assert!(text.contains(user), "{user} in {text}");
    }
    let (_, top, _) = run_cli(&["top", "--once", "--agent", &agent_url])?;
    for user in ["slurm/7", "slurm/8", "vllm.service"] {
        assert!(top.contains(user), "{user} in {top}");
    }
    drop(loads);
    Ok(())
}

#[test]
fn a_job_in_a_container_is_that_containers_job() -> Result<()> {
    let sim = Sim::new("seed = 31\nperiod_us = 50000\n")?;
    let tree = CgroupTree::new("nested")?;
    let (id, container) = tree.container(0)?;
    let step = tree.make(&format!("{}/{SLURM_STEP}", id))?;
    let (outside, inside) = (sleeper(&container)?, sleeper(&step)?);
    let agent = Agent::start(Some(&sim), &ARGS)?;
    let loads = [(&outside, 0.2), (&inside, 0.4)].map(|(running, demand)| sim.load(running.0.id(), 0, demand, &[]));
    let user = format!("{}/slurm/7", &id[..12]);
    let page = wait_for("both have GPU time", SOON, || {
        let page = agent.scrape()?;
        let own = sum(&page, "container_gpu_seconds_total", &[("container_id", &id)]);
        let of_job = sum(&page, "gpu_user_seconds_total", &[("user", &user), ("kind", "job")]);
        Ok((own > Some(0.1) && of_job > Some(0.1)).then_some(page))
    })?;
    let info = page.iter().find(|s| s.name == "gpu_user_info").context("gpu_user_info")?;
    assert_eq!(info.labels["container_id"], id);
    loads.into_iter().collect::<Result<Vec<_>>>().map(drop)
}

const GPU: &str = "GPU-11111111-2222-3333-4444-555555555555";

/// gVisor: all processes of a pod in the pod's own cgroup, an empty cgroup for each container, and a device of one container.
#[test]
fn what_a_pod_uses_is_its_only_containers_with_a_gpu() -> Result<()> {
    let (sim, root) = (Sim::new(&format!("period_us = 50000\n[[gpus]]\nuuid = '{GPU}'"))?, tempfile::tempdir()?);
    let folder = root.path().join("var/lib/kubelet/pod-resources");
    fs::create_dir_all(&folder)?;
    fs::create_dir_all(root.path().join(format!("var/log/pods/prod_trainer-0_{UID}")))?;
    let kubelet = Kubelet::start(&folder.join("kubelet.sock"))?;
    let tree = CgroupTree::new("gvisor")?;
    let id = "c".repeat(64);
    gpu_sampler_tests::labels::bundle(root.path(), &id, "trainer-0", UID)?;
    tree.make(&format!("kubepods/burstable/pod{UID}/{id}"))?;
    let sandbox = sleeper(&tree.make(&format!("kubepods/burstable/pod{UID}"))?)?;
    let rootfs = root.path().to_string_lossy().into_owned();
    let agent =
        Agent::start(Some(&sim), &[&ARGS[..], &["--path-rootfs", &rootfs, "--label-sources", "bundle,logs,kubelet"]].concat())?;
    let _load = sim.load(sandbox.0.id(), 0, 0.5, &[])?;
    // Without an assignment it is the pod's: which of its containers works is not known.
    let of_pod = [("namespace", "prod"), ("pod", "trainer-0")];
    wait_for("the pod has GPU time", SOON, || {
        let page = agent.scrape()?;
        let seconds =
            sum(&page, "container_gpu_seconds_total", &[&of_pod[..], &[("container", ""), ("container_id", UID)]].concat());
        Ok((seconds > Some(0.5)).then_some(()))
    })?;
    kubelet.set(vec![pod("prod", "trainer-0", "main", "nvidia.com/gpu", &[GPU])]);
    // The kubelet's socket does not change with its answers; without a checkpoint, a new container makes the agent query again.
    let other = tree.container(1)?;
    wait_for("the container has the pod's GPU time", SOON, || {
        let page = agent.scrape()?;
        let seconds =
            sum(&page, "container_gpu_seconds_total", &[&of_pod[..], &[("container", "main"), ("container_id", &id)]].concat());
        Ok((seconds > Some(1.0)).then_some(()))
    })?;
    let page = agent.scrape()?;
    let rows: Vec<&Sample> = page.iter().filter(|s| s.name == "container_accelerator_duty_cycle").collect();
    assert!(matches!(rows[..], [row] if row.value > 10.0 && row.labels["container"] == "main"), "no false 0: {rows:?}");
    assert_eq!(sum(&page, "gpu_unattributed_seconds_total", &[("reason", "host")]), Some(0.0));
    let explanation = explained(&tree.path_of(&tree.make(&format!("kubepods/burstable/pod{UID}"))?))?;
    assert_eq!((&explanation["kind"], &explanation["pod_uid"]), (&"pod".into(), &UID.into()));
    drop(other);
    Ok(())
}
