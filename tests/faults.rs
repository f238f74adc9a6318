//! The fault matrix: sockets that return wrong data, fail, hang, vanish and come back, in front of real engines. Each fault is tested
//! with all sources, where files supply the labels meanwhile, and with that socket alone, where labels must be complete soon after the
//! fault ends.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::containerd::{Containerd, PodSpec};
use gpu_sampler_tests::kernel::Layout;
use gpu_sampler_tests::labels::{AT_ONCE, SOON, UID, Watch, summary};
use gpu_sampler_tests::podman::Podman;
use gpu_sampler_tests::proxy::{Fault, Proxy};
use gpu_sampler_tests::{Agent, Docker, Engine, Sim, sum, wait_for};
use serde_json::{Value, json};

/// Duration of a fault.
const FAULT: Duration = Duration::from_secs(5);

/// A proxy in front of the engine; its agents are given only the proxy's endpoint.
struct Front {
    dir: tempfile::TempDir,
    proxy: Proxy,
}

impl Front {
    fn new(upstream: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let proxy = Proxy::start(upstream, &dir.path().join("front.sock"))?;
        Ok(Self { dir, proxy })
    }

    fn agent(&self, sim: Option<&Sim>, flag: &str, more: &[&str]) -> Result<Agent> {
        let endpoint = format!("unix://{}", self.dir.path().join("front.sock").display());
        let args = [&[flag, &endpoint], more].concat();
        Agent::start(sim, &args)
    }
}

type JsonChange = fn(&str, Value) -> Value;

/// Changes `/version` to the response of an engine of this version.
fn version(name: &'static str, least_api: &'static str) -> impl Fn(&str, Value) -> Value + Send + Sync {
    move |path, mut json| {
        if path.ends_with("/version") {
            json["Version"] = name.into();
            json["MinAPIVersion"] = least_api.into();
        }
        json
    }
}

fn strange_inspect(path: &str, mut json: Value) -> Value {
    if path.ends_with("/json") {
        json["State"]["Status"] = "hibernating".into();
        json["State"]["Sleep"] = json!({"deep": [1, 2]});
        json["NewThing"] = json!([{"a": null}]);
        json["HostConfig"]["Isolation"] = "quantum".into();
    }
    json
}

fn bare_inspect(path: &str, json: Value) -> Value {
    if path.ends_with("/json") {
        return json!({"Name": json["Name"], "Config": {"Image": json["Config"]["Image"], "Labels": json["Config"]["Labels"]}});
    }
    json
}

#[test]
fn dockers_version_and_unknown_fields_do_not_matter() -> Result<()> {
    let docker = Docker::new()?;
    let front = Front::new(docker.socket())?;
    let alone = front.agent(None, "--docker-endpoint", &["--label-sources", "docker"])?;
    let all = front.agent(None, "--docker-endpoint", &[])?;
    let faults: [(&str, Fault); 7] = [
        ("version dev", Fault::Rewrite(Box::new(version("dev", "1.12")))),
        ("version blank", Fault::Rewrite(Box::new(version("", "")))),
        ("version twice", Fault::Rewrite(Box::new(version("20.10.10sp+fluent1.7.0", "1.12")))),
        ("a newer minimum API", Fault::Rewrite(Box::new(version("29.0.0", "9.99")))),
        ("unknown state and fields", Fault::Rewrite(Box::new(strange_inspect as JsonChange))),
        ("missing fields", Fault::Rewrite(Box::new(bare_inspect as JsonChange))),
        ("none", Fault::Pass),
    ];
    for (n, (case, fault)) in faults.into_iter().enumerate() {
        front.proxy.set(fault)?;
        let (id, _) = docker.pod("prod", &format!("word-{n}"), 300)?;
        for agent in [&alone, &all] {
            let (explained, _) = agent.complete(&id, AT_ONCE).context(case)?;
            assert!(summary(&explained).starts_with(&format!("prod/word-{n}/main ")), "{case}: {explained:#}");
        }
    }
    // No version is requested, and no path contains one, so no version can matter.
    let paths = front.proxy.paths();
    assert!(paths.iter().all(|path| !path.starts_with("/v1") && !path.ends_with("/version")), "{paths:?}");
    assert!(paths.iter().any(|path| path.starts_with("/events")), "events are followed: {paths:?}");
    Ok(())
}

#[test]
fn docker_events_about_a_container_trigger_the_next_query() -> Result<()> {
    let docker = Docker::new()?;
    let front = Front::new(docker.socket())?;
    let agent = front.agent(None, "--docker-endpoint", &["--label-sources", "docker"])?;
    let (id, _) = docker.run("hurried", &json!({}), "300")?;
    agent.complete(&id, AT_ONCE)?;
    let queries = |id: &str| front.proxy.paths().iter().filter(|path| path.contains(id)).count();
    // A container that Docker does not have yet is queried at growing intervals.
    front.proxy.set(Fault::Status(404))?;
    let (id, _) = docker.run("hurried-too", &json!({}), "300")?;
    std::thread::sleep(Duration::from_secs(20));
    for n in 0..4 {
        let before = queries(&id);
        docker.rename(&id, &format!("hurried-{n}"))?;
        wait_for("the container is queried at once", Duration::from_secs(4), || Ok((queries(&id) > before).then_some(())))?;
    }
    front.proxy.set(Fault::Pass)?;
    agent.complete(&id, SOON)?;
    Ok(())
}

/// Tests one fault with containers from before, during and after it.
fn assert_recovers(
    name: &str,
    proxy: &Proxy,
    fault: Fault,
    agents: [&Agent; 2],
    start: &mut impl FnMut(&str) -> Result<String>,
) -> Result<()> {
    let [all, alone] = agents;
    proxy.set(fault)?;
    let begun = Instant::now();
    let during = start(name)?;
    // Files supply the labels meanwhile.
    all.complete(&during, AT_ONCE).with_context(|| format!("{name}: with files"))?;
    std::thread::sleep(FAULT.saturating_sub(begun.elapsed()));
    let explained = alone.container(&during)?.context("a container is known by its path, independent of its runtime")?;
    ensure!(explained["labels"]["id"]["value"].as_str().is_some_and(|id| id.contains(&*during)), "{name}: {explained:#}");
    ensure!(explained["missing"].as_array().is_some_and(|m| !m.is_empty()), "{name}: the fault has no effect: {explained:#}");
    ensure!(explained["would_fill"]["name"].is_array(), "{name}: no source for the missing label is given: {explained:#}");
    proxy.set(Fault::Pass)?;
    let (_, took) = alone.complete(&during, SOON).with_context(|| format!("{name}: after its end"))?;
    let after = start(&format!("{name}-after"))?;
    alone.complete(&after, AT_ONCE).with_context(|| format!("{name}: a container from after it"))?;
    println!("{name:<22} complete {:>5} ms after the fault's end (aim 2000)", took.as_millis());
    Ok(())
}

fn up(agent: &Agent, source: &str) -> Result<Option<f64>> {
    Ok(sum(&agent.scrape()?, "gpu_sampler_source_up", &[("source", source)]))
}

#[test]
fn labels_are_complete_after_every_fault_of_dockers_socket() -> Result<()> {
    let docker = Docker::new()?;
    let front = Front::new(docker.socket())?;
    let sim = Sim::new("[[gpus]]")?;
    let all = front.agent(Some(&sim), "--docker-endpoint", &[])?;
    let alone = front.agent(Some(&sim), "--docker-endpoint", &["--label-sources", "docker"])?;
    let (watch, watch_all) = (Watch::start(&alone), Watch::start(&all));
    let mut loads = Vec::new();
    let mut start = |name: &str| {
        let (id, pid) = docker.run(name, &json!({}), "300")?;
        loads.push(sim.load(pid, 0, 0.05, &[])?);
        Ok(id)
    };
    for (name, fault) in [
        ("refuses", Fault::Refuse),
        ("hangs", Fault::Hang),
        ("404", Fault::Status(404)),
        ("500", Fault::Status(500)),
        ("garbage", Fault::Garbage),
        ("100-mb", Fault::Huge),
        ("closes-half-way", Fault::CloseHalfWay),
    ] {
        assert_recovers(name, &front.proxy, fault, [&all, &alone], &mut start)?;
        assert_eq!(up(&alone, "docker")?, Some(1.0), "after {name}");
    }
    let seen = watch.end()?;
    println!("longest of {} scrapes: {} ms (aim 50)", seen.scrapes, seen.longest.as_millis());
    seen.check_speed()?;
    // This agent could read the files: none of its series ever had a blank label.
    watch_all.end()?.check()
}

#[test]
fn labels_are_complete_after_faults_of_podmans_socket() -> Result<()> {
    let podman = Podman::start()?;
    let front = Front::new(&podman.socket())?;
    let all = front.agent(None, "--podman-endpoint", &[])?;
    let alone = front.agent(None, "--podman-endpoint", &["--label-sources", "podman"])?;
    let mut start = |name: &str| Ok(podman.run(name, 300, &[])?.0);
    for (name, fault) in [("refuses", Fault::Refuse), ("500", Fault::Status(500))] {
        assert_recovers(name, &front.proxy, fault, [&all, &alone], &mut start)?;
    }
    Ok(())
}

#[test]
fn every_source_is_reported_down_when_every_socket_refuses() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let mut args = Vec::new();
    for flag in ["--docker-endpoint", "--podman-endpoint", "--cri-endpoint"] {
        let path = dir.path().join(flag);
        // The listener is closed at once; the socket's file remains.
        drop(std::os::unix::net::UnixListener::bind(&path)?);
        args.extend([flag.to_owned(), format!("unix://{}", path.display())]);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let all = Agent::start(None, &args)?;
    let alone = Agent::start(None, &[&args[..], &["--label-sources", "docker,podman,cri,crio,kubelet"]].concat())?;
    let watch = Watch::start(&alone);
    let (id, _) = docker.pod("prod", "refused-0", 300)?;
    all.complete(&id, AT_ONCE)?;
    std::thread::sleep(FAULT);
    let explained = alone.container(&id)?.context("known by its path")?;
    assert_eq!(explained["missing"], json!(["name", "image"]), "{explained:#}");
    let page = alone.scrape()?;
    for source in ["docker", "podman", "cri"] {
        assert_eq!(sum(&page, "gpu_sampler_source_up", &[("source", source)]), Some(0.0), "{source}");
    }
    assert!(sum(&page, "gpu_sampler_label_missing", &[("label", "name")]).is_some_and(|n| n >= 1.0));
    watch.end()?.check_speed()
}

#[test]
fn labels_are_complete_after_every_fault_of_containerds_socket() -> Result<()> {
    let containerd = Containerd::start()?;
    let front = Front::new(&containerd.address())?;
    let sandbox = containerd.run_pod(&PodSpec::new("prod", "trainer-0", UID))?;
    let sim = Sim::new("[[gpus]]")?;
    let all = front.agent(Some(&sim), "--cri-endpoint", &[])?;
    let alone = front.agent(Some(&sim), "--cri-endpoint", &["--label-sources", "cri"])?;
    let (watch, watch_all) = (Watch::start(&alone), Watch::start(&all));
    let (mut attempt, mut loads) = (0, Vec::new());
    let mut start = |_: &str| {
        attempt += 1;
        let (id, pid) = containerd.run(&sandbox, "main", attempt, &["/bin/sleep", "300"])?;
        loads.push(sim.load(pid, 0, 0.05, &[])?);
        Ok(id)
    };
    for (name, fault) in [
        ("refuses", Fault::Refuse),
        ("hangs", Fault::Hang),
        ("garbage", Fault::Garbage),
        ("closes-half-way", Fault::CloseHalfWay),
    ] {
        assert_recovers(name, &front.proxy, fault, [&all, &alone], &mut start)?;
    }
    let seen = watch.end()?;
    println!("longest of {} scrapes: {} ms (aim 50)", seen.scrapes, seen.longest.as_millis());
    seen.check_speed()?;
    watch_all.end()?.check()
}

#[test]
fn labels_are_complete_after_containerd_hangs_or_restarts() -> Result<()> {
    let mut containerd = Containerd::start()?;
    let sandbox = containerd.run_pod(&PodSpec::new("prod", "trainer-0", UID))?;
    let endpoint = format!("unix://{}", containerd.address().display());
    let agent = Agent::start(None, &["--label-sources", "cri", "--cri-endpoint", &endpoint])?;
    // The container starts before the daemon stops; agents started later never get a response about it.
    let (id, _) = containerd.run(&sandbox, "main", 0, &["/bin/sleep", "300"])?;
    agent.complete(&id, AT_ONCE)?;
    containerd.pause()?;
    let late = Agent::start(None, &["--label-sources", "cri", "--cri-endpoint", &endpoint])?;
    let all = Agent::start(None, &["--cri-endpoint", &endpoint])?;
    all.complete(&id, AT_ONCE).context("with files, while it is stopped")?;
    std::thread::sleep(FAULT);
    ensure!(
        late.container(&id)?.is_some_and(|explained| explained["missing"] != json!([])),
        "a query succeeded while the daemon was stopped"
    );
    containerd.resume()?;
    let (_, took) = late.complete(&id, SOON)?;
    println!("stopped and continued: complete {} ms after (aim 2000)", took.as_millis());
    containerd.stop();
    let late = Agent::start(None, &["--label-sources", "cri", "--cri-endpoint", &endpoint])?;
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(up(&late, "cri")?, Some(0.0), "configured and not present");
    containerd.relaunch()?;
    let (_, took) = late.complete(&id, SOON)?;
    println!("restarted: complete {} ms after it responds (aim 2000)", took.as_millis());
    // The agent that was running all the time also resolves new containers.
    let (again, _) = containerd.run(&sandbox, "main", 1, &["/bin/sleep", "300"])?;
    agent.complete(&again, AT_ONCE)?;
    Ok(())
}

#[test]
fn a_socket_that_appears_late_is_used() -> Result<()> {
    let docker = Docker::new()?;
    let dir = tempfile::tempdir()?;
    let front = dir.path().join("not/yet/there/docker.sock");
    let endpoint = format!("unix://{}", front.display());
    let alone = Agent::start(None, &["--docker-endpoint", &endpoint, "--label-sources", "docker"])?;
    let all = Agent::start(None, &["--docker-endpoint", &endpoint])?;
    let watch = Watch::start(&alone);
    let (id, _) = docker.pod("prod", "late-0", 300)?;
    all.complete(&id, AT_ONCE)?;
    // After a minute without a socket, the agent must still detect it quickly.
    std::thread::sleep(Duration::from_secs(60));
    let explained = alone.container(&id)?.context("known by its path")?;
    assert_eq!(explained["missing"], json!(["name", "image"]));
    assert_eq!(alone.runtime_calls()?, 0.0, "there was no socket to query");
    assert!(sum(&alone.scrape()?, "gpu_sampler_label_missing", &[("label", "image")]).is_some_and(|n| n >= 1.0));
    std::fs::create_dir_all(front.parent().context("a folder")?)?;
    let _proxy = Proxy::start(docker.socket(), &front)?;
    let (_, took) = alone.complete(&id, SOON)?;
    println!("a minute late: complete {} ms after it appears (aim 2000)", took.as_millis());
    watch.end()?.check_speed()
}

#[test]
fn a_socket_that_moves_is_found_again() -> Result<()> {
    let mut engine = Engine::start(Layout::PureV2)?;
    // No endpoint is configured: the agent has to find the running engine.
    let agent = Agent::start_in(Layout::PureV2, None, &["--label-sources", "docker", "--docker-endpoint", ""])?;
    let (before, _) = engine.docker.run("before", &json!({}), "300")?;
    agent.complete(&before, SOON)?;
    engine.stop()?;
    // An agent that never got a response: its container lacks labels across the move.
    let late = Agent::start_in(Layout::PureV2, None, &["--label-sources", "docker", "--docker-endpoint", ""])?;
    wait_for("the container is known", AT_ONCE, || late.container(&before))?;
    engine.move_socket()?;
    let (_, took) = late.complete(&before, SOON)?;
    println!("moved: incomplete across it, complete {} ms after it responds (aim 2000)", took.as_millis());
    let (after, _) = engine.docker.run("after", &json!({}), "300")?;
    let (_, took) = agent.complete(&after, SOON)?;
    println!("moved: complete {} ms after the container's start (aim 2000)", took.as_millis());
    Ok(())
}

#[test]
fn labels_are_complete_after_dockerd_restarts_with_live_containers() -> Result<()> {
    let mut engine = Engine::start(Layout::PureV2)?;
    let endpoint = format!("unix://{}", engine.docker.socket().display());
    let agent = Agent::start_in(Layout::PureV2, None, &["--label-sources", "docker", "--docker-endpoint", &endpoint])?;
    let (id, pid) = engine.docker.run("kept", &json!({}), "300")?;
    agent.complete(&id, AT_ONCE)?;
    let all = Agent::start_in(Layout::PureV2, None, &["--docker-endpoint", &endpoint])?;
    let (before, _) = all.complete(&id, AT_ONCE)?;
    engine.stop()?;
    let late = Agent::start_in(Layout::PureV2, None, &["--label-sources", "docker", "--docker-endpoint", &endpoint])?;
    assert!(Path::new(&format!("/proc/{pid}")).exists(), "live-restore keeps containers");
    // Usually from the file, which is read sooner than the engine answers.
    assert_eq!(all.complete(&id, AT_ONCE)?.0["labels"], before["labels"], "with files nothing changes");
    engine.relaunch()?;
    let (_, took) = late.complete(&id, SOON)?;
    println!("dockerd restarted: complete {} ms after it responds (aim 2000)", took.as_millis());
    let (after, _) = engine.docker.run("after", &json!({}), "300")?;
    for agent in [&agent, &late] {
        agent.complete(&after, AT_ONCE)?;
    }
    Ok(())
}

#[test]
fn no_series_with_a_blank_label_is_filled_within_two_seconds() -> Result<()> {
    let (sim, docker) = (Sim::new("[[gpus]]")?, Docker::new()?);
    let front = Front::new(docker.socket())?;
    let endpoint = format!("unix://{}", front.dir.path().join("front.sock").display());
    // The socket alone, which is the slowest source, and with faults when the containers start.
    let agent = Agent::start(Some(&sim), &["--docker-endpoint", &endpoint, "--label-sources", "docker"])?;
    let watch = Watch::start(&agent);
    let mut loads = Vec::new();
    for n in 0..6 {
        front.proxy.set(if n % 2 == 0 { Fault::Status(500) } else { Fault::Pass })?;
        let (_, pid) = docker.pod("prod", &format!("held-{n}"), 300)?;
        loads.push(sim.load(pid, 0, 0.15, &[])?);
        std::thread::sleep(Duration::from_millis(500));
    }
    front.proxy.set(Fault::Pass)?;
    wait_for("all have series", SOON, || {
        let page = agent.scrape()?;
        let shown =
            page.iter().filter(|s| s.name == "container_gpu_seconds_total" && s.labels["pod"].starts_with("held-")).count();
        Ok((shown == loads.len()).then_some(()))
    })?;
    watch.end()?.check()
}
