//! Without kernel events: what each mode can determine is right, the rest is unattributed with a reason, and the mode reports its limits.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{Actor, CgroupTree, Layout};
use gpu_sampler_tests::record::credited;
use gpu_sampler_tests::{Agent, Sim, run_cli, sum, var, wait_for};
use serde_json::Value;

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");

fn degraded(mode: &str, layout: Layout) -> Result<()> {
    let sim =
        Sim::new("seed = 9\nperiod_us = 100000\ndelay_us = 60000\npid_rule = 'last'\n[[gpus]]\n[[gpus]]\n[[gpus]]\n[[gpus]]")?;
    let tree = CgroupTree::new(&format!("modes-{mode}"))?;
    let (old, old_dir) = tree.container(1)?;
    let mut before = Actor::start(ACTOR, &["in", &old_dir.to_string_lossy(), "--", "sleep", "300"])?;
    let before_pid = before.pid()?;
    let agent = Agent::start_in(layout, Some(&sim), &["--kernel-mode", mode])?;
    let page = agent.scrape()?;
    assert_eq!(sum(&page, "gpu_sampler_kernel_mode", &[("mode", mode)]), Some(1.0));
    assert_eq!(sum(&page, "gpu_sampler_kernel_mode", &[]), Some(1.0), "one mode");
    let log = agent.log()?;
    assert_eq!(log.matches("an earlier move to another cgroup is not detected").count(), 1, "once in the log: {log}");

    let (new, new_dir) = tree.container(2)?;
    let mut after = Actor::start(ACTOR, &["in", &new_dir.to_string_lossy(), "--", "sleep", "300"])?;
    let after_pid = after.pid()?;
    let (deep, _) = tree.container(4)?;
    let nested = tree.make(&format!("{deep}/{}", vec!["n"; 1000].join("/")))?;
    let mut below = Actor::start(ACTOR, &["in", &nested.to_string_lossy(), "--", "sleep", "300"])?;
    let deep_pid = below.pid()?;
    std::thread::sleep(Duration::from_secs(1));
    let load = |pid, gpu| sim.load(pid, gpu, 1.0, &["--for", "4s"]);
    let mut loads = [load(before_pid, 0)?, load(after_pid, 1)?, load(deep_pid, 3)?];
    // These processes have ended when the driver names them, and were never seen.
    let (short_id, short) = tree.container(3)?;
    let lives = sim.lives(&[&short], &["--count", "100", "--at-once", "2", "--lasting", "5ms..40ms", "--gpus", "2"])?.all()?;
    for load in &mut loads {
        assert!(load.0.wait()?.success());
    }
    std::thread::sleep(Duration::from_secs(12));
    agent.scrape()?;
    let page = agent.scrape()?;
    let got = credited(&page);
    let samples = sim.samples()?;
    let value = |uuid: &str, name: &str, labels: &[(&str, &str)]| {
        sum(&page, name, &[&[("uuid", uuid)], labels].concat()).unwrap_or_default()
    };
    for (gpu, id) in [(0, &old), (1, &new), (3, &deep)] {
        let recorded = samples.iter().filter(|s| s.gpu == gpu).count() as u64;
        let uuid = samples.iter().find(|s| s.gpu == gpu).context("a recorded sample")?.uuid.clone();
        // On a busy machine polls are late, and their samples are not all queried.
        let unqueried = value(&uuid, "gpu_sampler_samples_total", &[]) - value(&uuid, "gpu_sampler_queried_samples_total", &[]);
        let credited = got.get(&(id.clone(), uuid.clone())).copied().unwrap_or_default();
        let is_within = credited <= recorded && (recorded - credited) as f64 <= unqueried;
        assert!(is_within, "{mode} {layout:?}: GPU {gpu}: {credited} of {recorded}, {unqueried} not queried: {got:?}");
        // All of the time has one user.
        let (busy, seconds) = (
            value(&uuid, "gpu_time_seconds_total", &[("state", "busy")]),
            value(&uuid, "container_gpu_seconds_total", &[("container_id", id)]),
        );
        assert!(
            credited > 0 && (busy - seconds).abs() < 1e-6,
            "{mode} {layout:?}: GPU {gpu}: {seconds} of {busy} s are credited"
        );
    }
    let unseen = &samples.iter().find(|s| s.gpu == 2).context("a recorded sample")?.uuid;
    // A read of /proc may find one by chance; nothing is guessed for the others.
    let found = value(unseen, "container_gpu_seconds_total", &[("container_id", &short_id)]);
    let unknown = value(unseen, "gpu_unattributed_seconds_total", &[("reason", "pid_unknown")]);
    let busy = value(unseen, "gpu_time_seconds_total", &[("state", "busy")]);
    assert!(!lives.is_empty() && unknown > 0.6 * busy, "{unknown} of {busy} s are pid_unknown");
    assert!((found + unknown - busy).abs() < 1e-6, "{found} s found and {unknown} s unknown of {busy} s busy");
    assert!(got.keys().all(|(id, uuid)| uuid != unseen || *id == short_id), "samples were credited by a guess: {got:?}");
    if mode == "inotify" {
        assert_watches_are_released(&agent, &tree)?;
    }
    // Moves are detected eventually, and so are the ends of containers.
    gpu_sampler_tests::kernel::attach(after_pid, &old_dir)?;
    wait_for("the move is detected", Duration::from_secs(10), || {
        Ok(agent.containers_of(after_pid)?.last().is_some_and(|id| *id == old).then_some(()))
    })?;
    std::fs::remove_dir(&new_dir)?;
    wait_for("the removal is detected", Duration::from_secs(10), || {
        Ok(gpu_sampler_tests::get(agent.port, &format!("/api/v1/explain?cgroup={}", tree.path_of(&new_dir))).err().map(|_| ()))
    })
}

/// cgroupfs itself never removes the watch of a removed directory.
fn assert_watches_are_released(agent: &Agent, tree: &CgroupTree) -> Result<()> {
    let watches = || Ok::<_, anyhow::Error>(sum(&agent.scrape()?, "gpu_sampler_inotify_watches", &[]).unwrap_or_default());
    let before = watches()?;
    for n in 100..600 {
        std::fs::remove_dir(tree.container(n)?.1)?;
    }
    // Other tests' engines may create and remove directories meanwhile.
    wait_for("the watches are released", Duration::from_secs(10), || Ok((watches()? < before + 100.0).then_some(())))
}

#[test]
fn inotify_mode_attributes_containers_and_processes_alive_when_named() -> Result<()> {
    degraded("inotify", Layout::Machine)
}

#[test]
fn inotify_mode_attributes_on_cgroup_v2_alone() -> Result<()> {
    degraded("inotify", Layout::PureV2)
}

#[test]
fn procfs_mode_attributes_processes_alive_when_scanned() -> Result<()> {
    degraded("procfs", Layout::Machine)
}

#[test]
fn procfs_mode_attributes_on_cgroup_v2_alone() -> Result<()> {
    degraded("procfs", Layout::PureV2)
}

#[test]
fn doctor_reports_what_works_and_the_limits_of_each_mode() -> Result<()> {
    let sim = Sim::new("[[gpus]]\n[[gpus]]")?;
    // The library finds its world in the folder next to it.
    let lib = sim.library().to_string_lossy().into_owned();
    let here = ["doctor", "--listen", "127.0.0.1:0", "--nvml-lib", &lib];
    let (code, out, err) = run_cli(&here)?;
    assert_eq!(code, Some(0), "{out}{err}");
    for part in ["raw_tracepoint", "pass their self-check", "2 GPUs", "the host's", "The agent can run here.\n"] {
        assert!(out.contains(part), "{part:?} in {out}");
    }
    assert!(!out.contains('\x1b'), "colours in a pipe: {out:?}");
    for (mode, limit) in [("inotify", "an earlier move to another cgroup is not detected"), ("procfs", "once a second")] {
        let (code, out, _) = run_cli(&[&here[..], &["--kernel-mode", mode, "--json"]].concat())?;
        let report: Value = serde_json::from_str(&out)?;
        assert_eq!((code, &report["can_run"], &report["kernel_mode"]), (Some(0), &true.into(), &mode.into()), "{out}");
        let checks = report["checks"].as_array().context("checks")?;
        let events = checks.iter().find(|c| c["name"] == "kernel events").context("kernel events")?;
        assert_eq!(events["status"], "degraded");
        assert!(events["detail"].as_str().is_some_and(|d| d.contains(limit)) && events["remedy"].is_string(), "{events}");
    }
    // In a private cgroup namespace, where paths are relative, doctor reports that.
    let apart = Command::new("unshare").arg("--cgroup").arg(var("GPU_SAMPLER_BIN")?).args(here).output()?;
    let out = String::from_utf8_lossy(&apart.stdout).into_owned();
    assert!(out.contains("degraded  cgroups") && out.contains("--cgroupns=host"), "{out}");
    let empty = tempfile::tempdir()?;
    let sysfs = empty.path().to_string_lossy().into_owned();
    let (code, out, _) = run_cli(&[&here[..], &["--path-sysfs", &sysfs, "--kernel-mode", "raw_tracepoint"]].concat())?;
    assert_eq!(code, Some(1), "{out}");
    assert!(out.contains("CONFIG_DEBUG_INFO_BTF") && out.contains("The agent cannot run here"), "{out}");
    let (code, out, _) = run_cli(&[&here[..], &["--path-sysfs", &sysfs]].concat())?;
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("mode inotify") && out.contains("CONFIG_DEBUG_INFO_BTF"), "{out}");
    // The listen address may be in use by an agent, which doctor queries, or by something else, which is a failure.
    let agent = Agent::start(Some(&sim), &[])?;
    let (code, out, _) = run_cli(&["doctor", "--nvml-lib", &lib, "--listen", &format!("127.0.0.1:{}", agent.port)])?;
    assert!(code == Some(0) && out.contains("already: mode raw_tracepoint, 0 kernel events lost"), "{code:?} {out}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let other = std::net::TcpListener::bind(taken)?;
    let disconnects = std::thread::spawn(move || drop(other.accept()));
    let (code, out, _) = run_cli(&["doctor", "--nvml-lib", &lib, "--listen", &taken.to_string()])?;
    assert!(code == Some(1) && out.contains("failed    address"), "{code:?} {out}");
    disconnects.join().expect("doctor connected");
    Ok(())
}

#[test]
fn a_closed_pipe_is_not_an_error_but_a_full_disk_is() -> Result<()> {
    let verbs = [&["config", "--default"][..], &["explain", "--cgroup", "/x", "--offline"], &["doctor", "--json"]];
    for args in verbs {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full")?;
        let output = Command::new(var("GPU_SAMPLER_BIN")?).args(args).stdout(full).output()?;
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && err.contains("standard output: No space left"), "{args:?}: {err}");
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let output = Command::new(var("GPU_SAMPLER_BIN")?).args(args).stdout(writer).output()?;
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(0) && err.is_empty(), "{args:?}: {:?} {err}", output.status);
    }
    Ok(())
}

#[test]
fn explain_reports_living_and_ended_processes_and_rejects_invalid_input() -> Result<()> {
    let tree = CgroupTree::new("explain")?;
    let (id, dir) = tree.container(1)?;
    let agent = Agent::start(None, &["--nvml-lib", &Sim::new("[[gpus]]")?.library().to_string_lossy()])?;
    let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", "sleep", "300"])?;
    let pid = actor.pid()?.to_string();
    let url = format!("http://127.0.0.1:{}", agent.port);
    let args = ["explain", "--pid", &pid, "--agent", &url, "--json"];
    let (code, out, err) = run_cli(&args)?;
    assert_eq!(code, Some(0), "{err}");
    let living: Value = serde_json::from_str(&out)?;
    for (key, value) in [("kind", "container"), ("container_id", &id), ("answered_by", "agent"), ("cgroup", &tree.path_of(&dir))]
    {
        assert_eq!(living[key], value, "{out}");
    }
    assert_eq!(living["labels"]["id"]["source"], "cgroup");
    assert!(living["process"]["lives"][0]["end"].is_null());
    drop(actor);
    let ended = wait_for("its end is known", Duration::from_secs(5), || {
        let (code, out, err) = run_cli(&args)?;
        assert_eq!(code, Some(0), "{err}");
        let explained: Value = serde_json::from_str(&out)?;
        Ok(explained["process"]["lives"][0]["end"].is_string().then_some(explained))
    })?;
    assert_eq!(ended["container_id"], id.as_str());
    let (code, _, err) = run_cli(&["explain", "--pid", "4194304", "--agent", &url])?;
    assert_eq!(code, Some(1));
    assert!(err.contains("4194304") && err.contains("40 s"), "{err}");

    // A missing cgroup is classified by its path, and reported as missing.
    let (code, out, _) = run_cli(&["explain", "--cgroup", "/no/such", "--agent", &url])?;
    assert!(code == Some(0) && out.contains("there is no such cgroup now"), "{code:?} {out}");
    let degraded =
        Agent::start(None, &["--kernel-mode", "inotify", "--nvml-lib", &Sim::new("[[gpus]]")?.library().to_string_lossy()])?;
    let url = format!("http://127.0.0.1:{}", degraded.port);
    let (code, _, err) = run_cli(&["explain", "--pid", "4194304", "--agent", &url])?;
    assert!(code == Some(1) && err.contains("only if the driver reported it before"), "{code:?} {err}");
    let thread = std::fs::read_dir(format!("/proc/{}/task", degraded.process.0.id()))?
        .flatten()
        .filter_map(|task| task.file_name().to_str()?.parse::<u32>().ok())
        .find(|tid| *tid != degraded.process.0.id())
        .context("the agent has threads")?;
    let (code, _, err) = run_cli(&["explain", "--pid", &thread.to_string(), "--agent", &url])?;
    assert!(code == Some(1) && err.contains("is a thread of the process"), "{code:?} {err}");

    let kube = format!("/kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{id}");
    let (code, out, _) = run_cli(&["explain", "--cgroup", &kube, "--offline", "--json"])?;
    let path: Value = serde_json::from_str(&out)?;
    assert_eq!((code, &path["pod_uid"]), (Some(0), &"8bb25662-de9a-11e9-84e7-f8f21e04010c".into()), "{out}");
    let (code, out, _) = run_cli(&["explain", "--cgroup", "/system.slice/ssh.service", "--offline"])?;
    assert_eq!(code, Some(0));
    assert!(out.contains("kind          unit\nuser          ssh.service\nunit          ssh.service\n"), "{out}");
    for (args, code, word) in [
        (&["explain"][..], 2, "--pid"),
        (&["explain", "--pid", "x"], 2, "invalid value 'x'"),
        (&["explain", "--pid", "1", "--offline"], 2, "cannot be used with"),
        (&["explain", "--cgroup", "kubepods", "--offline"], 1, "begins with /"),
        (&["explain", "--pid", "1", "--agent", "http://127.0.0.1:1"], 1, "no agent is reachable at http://127.0.0.1:1"),
        (&["explain", "--pid", "1", "--agent", "here"], 1, "give http://HOST:PORT"),
        (&["explain", "--cgroup", "/sys/fs/cgroup/x", "--offline"], 1, "contains the mount point"),
        (&["doctor", "--path-procfs", "/tmp"], 1, "there is no procfs"),
    ] {
        let (got, out, err) = run_cli(args)?;
        assert!(got == Some(code) && err.contains(word), "{args:?}: {got:?} {out}{err}");
    }
    Ok(())
}
