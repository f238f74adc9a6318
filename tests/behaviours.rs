//! Every way in which a process can enter a cgroup: the agent that observed it and an agent that was started later and only scanned both
//! report its container, and its samples are credited to that container; on the machine's cgroup layout and on cgroup v2 alone.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{Actor, CgroupTree, Layout, attach};
use gpu_sampler_tests::record::credited;
use gpu_sampler_tests::{Agent, Engine, Running, Sim, wait_for};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
const GPUS: usize = 8;

const DOCKER_EXEC: &str = "docker exec";

/// A process, and the containers it was in, in order.
struct Case {
    name: &'static str,
    pid: u32,
    containers: Vec<String>,
}

fn check(agent: &Agent, case: &Case, scanned: bool) -> Result<()> {
    // A scan shows only the current cgroup, not earlier ones.
    let want = if scanned { &case.containers[case.containers.len() - 1..] } else { &case.containers[..] };
    let mut got = agent.containers_of(case.pid).with_context(|| case.name)?;
    if case.name == DOCKER_EXEC && got.len() > 1 {
        // Some versions of runc start the process outside and move it in, others start it inside.
        got.retain(|id| !id.is_empty());
    }
    assert_eq!(got, want, "{}, pid {}, scanned: {scanned}: {:?}", case.name, case.pid, agent.explain(case.pid)?);
    Ok(())
}

fn behaviours(layout: Layout) -> Result<()> {
    let gpus = "[[gpus]]\n".repeat(GPUS);
    let sim = Sim::new(&format!("seed = 3\nperiod_us = 100000\npid_rule = 'last'\n{gpus}"))?;
    let tree = CgroupTree::new("behaviours")?;
    let engine = Engine::start(layout)?;
    let (docker_id, _) = engine.docker.pod("prod", "exec-0", 300)?;
    let agent = Agent::start_in(layout, Some(&sim), &["--kernel-mode", "raw_tracepoint"])?;
    let mut cases = Vec::new();
    let mut actors = Vec::new();

    let (id, dir) = tree.container(1)?;
    let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", "sleep", "300"])?;
    cases.push(Case { name: "CLONE_INTO_CGROUP", pid: actor.pid()?, containers: vec![id] });
    actors.push(actor);

    cases.push(Case { name: DOCKER_EXEC, pid: engine.docker.exec(&docker_id, 300)?, containers: vec![docker_id] });

    let (from, from_dir) = tree.container(2)?;
    let (to, to_dir) = tree.container(3)?;
    let mut actor = Actor::start(ACTOR, &["in", &from_dir.to_string_lossy(), "--", "sleep", "300"])?;
    let pid = actor.pid()?;
    actors.push(actor);
    // It runs in its first cgroup for a while before it is moved to the second.
    std::thread::sleep(Duration::from_millis(300));
    attach(pid, &to_dir)?;
    cases.push(Case { name: "moved", pid, containers: vec![from, to] });

    let (id, dir) = tree.container(4)?;
    let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", ACTOR, "thread-exec", "300"])?;
    let pid = actor.pid()?;
    actors.push(actor);
    let execed = || Ok(std::fs::read_to_string(format!("/proc/{pid}/comm"))?.starts_with("sleep").then_some(()));
    wait_for("the thread has called exec", Duration::from_secs(10), execed)?;
    cases.push(Case { name: "exec by a thread that is not the leader", pid, containers: vec![id] });

    let (id, dir) = tree.container(5)?;
    let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", ACTOR, "vfork", "300"])?;
    actor.pid()?;
    cases.push(Case { name: "vfork and exec", pid: actor.pid()?, containers: vec![id] });
    actors.push(actor);

    let (id, dir) = tree.container(6)?;
    let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", ACTOR, "zombie", "12"])?;
    actor.pid()?;
    let zombie = Case { name: "zombie", pid: actor.pid()?, containers: vec![id] };
    actors.push(actor);

    let (id, dir) = tree.container(7)?;
    let nested = tree.make(&format!("{id}/{}", vec!["n"; 1000].join("/")))?;
    let mut actor = Actor::start(ACTOR, &["in", &nested.to_string_lossy(), "--", "sleep", "300"])?;
    cases.push(Case { name: "1,000 nested cgroups", pid: actor.pid()?, containers: vec![id] });
    actors.push(actor);
    drop(dir);

    let (id, _) = tree.container(8)?;
    // The longest path below the mount point that can still be opened by name.
    let room = 4090 - tree.make(&id)?.to_string_lossy().len();
    let long: Vec<String> = (0..room / 200).map(|n| format!("{n:0>199}")).collect();
    let long = tree.make(&format!("{id}/{}", long.join("/")))?;
    let mut actor = Actor::start(ACTOR, &["in", &long.to_string_lossy(), "--", "sleep", "300"])?;
    let pid = actor.pid()?;
    actors.push(actor);
    let explained = agent.explain(pid)?.context("the process is known")?;
    assert_eq!(explained["cgroup"], tree.path_of(&long), "the path is complete");
    assert!(tree.path_of(&long).len() > 3800, "{}", tree.path_of(&long).len());
    cases.push(Case { name: "a path of 4,000 characters", pid, containers: vec![id] });

    let leaderless = leaderless(&tree, &mut actors)?;
    check(&agent, &leaderless, false)?;

    cases.push(zombie);
    let mut loads = Vec::new();
    for (gpu, case) in cases.iter().enumerate() {
        check(&agent, case, false)?;
        loads.push(sim.load(case.pid, gpu, 1.0, &["--for", "3s"])?);
    }
    for load in &mut loads {
        assert!(load.0.wait()?.success());
    }
    zombie_has_ended(&agent, &cases[cases.len() - 1])?;
    assert_samples_credited_to_containers(&agent, &sim, &cases)?;

    let later = Agent::start_in(layout, Some(&sim), &["--kernel-mode", "raw_tracepoint"])?;
    let (zombie, living) = cases.split_last().context("cases")?;
    for case in living.iter().chain([&leaderless]) {
        check(&later, case, true)?;
    }
    assert!(later.explain(zombie.pid)?.is_none(), "an agent started later does not list a zombie as a living process");
    Ok(())
}

/// A process with a first thread that has ended and stays in its cgroup when the other threads are moved.
fn leaderless(tree: &CgroupTree, actors: &mut Vec<Actor>) -> Result<Case> {
    let ((from, from_dir), (to, to_dir)) = (tree.container(9)?, tree.container(10)?);
    let mut actor = Actor::start(ACTOR, &["in", &from_dir.to_string_lossy(), "--", ACTOR, "leaderless", "300"])?;
    let pid = actor.pid()?;
    actors.push(actor);
    wait_for("its first thread has ended", Duration::from_secs(10), || {
        Ok(std::fs::read_to_string(format!("/proc/{pid}/stat"))?.contains(") Z ").then_some(()))
    })?;
    attach(pid, &to_dir)?;
    Ok(Case { name: "a leader that has ended", pid, containers: vec![from, to] })
}

fn zombie_has_ended(agent: &Agent, zombie: &Case) -> Result<()> {
    let is_zombie = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", zombie.pid))?;
        Ok(stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')).then_some(()))
    };
    wait_for("it is a zombie", Duration::from_secs(20), is_zombie)?;
    let explained = agent.explain(zombie.pid)?.context("the ended process is known")?;
    assert!(explained["process"]["lives"][0]["end"].is_string(), "{explained}");
    check(agent, zombie, false)
}

fn assert_samples_credited_to_containers(agent: &Agent, sim: &Sim, cases: &[Case]) -> Result<()> {
    std::thread::sleep(Duration::from_secs(3));
    agent.scrape()?;
    let got = credited(&agent.scrape()?);

    let samples = sim.samples()?;
    for (gpu, case) in cases.iter().enumerate() {
        let recorded = samples.iter().filter(|s| s.gpu == gpu).count() as u64;
        let uuid = &samples.iter().find(|s| s.gpu == gpu).context("a recorded sample")?.uuid;
        let on_gpu: Vec<_> = got.iter().filter(|((_, on), _)| on == uuid).map(|((id, _), n)| (id.clone(), *n)).collect();
        let want = vec![(case.containers[case.containers.len() - 1].clone(), recorded)];
        assert_eq!(on_gpu, want, "{}", case.name);
    }
    Ok(())
}

#[test]
fn all_behaviours_are_attributed_on_the_machines_layout() -> Result<()> {
    behaviours(Layout::Machine)
}

#[test]
fn all_behaviours_are_attributed_on_cgroup_v2_alone() -> Result<()> {
    behaviours(Layout::PureV2)
}

#[test]
fn samples_before_and_after_a_move_go_to_different_containers() -> Result<()> {
    let sim = Sim::new("seed = 5\nperiod_us = 100000\npid_rule = 'last'\n[[gpus]]")?;
    let tree = CgroupTree::new("move")?;
    let agent = Agent::start(Some(&sim), &["--kernel-mode", "raw_tracepoint"])?;
    let (from, from_dir) = tree.container(1)?;
    let (to, to_dir) = tree.container(2)?;
    let mut actor = Actor::start(ACTOR, &["in", &from_dir.to_string_lossy(), "--", "sleep", "300"])?;
    let pid = actor.pid()?;
    std::thread::sleep(Duration::from_secs(1));
    let mut load = sim.load(pid, 0, 1.0, &["--for", "6s"])?;
    std::thread::sleep(Duration::from_secs(3));
    let moved_us = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_micros() as u64;
    attach(pid, &to_dir)?;
    load.0.wait()?;
    std::thread::sleep(Duration::from_secs(3));
    agent.scrape()?;
    let got = credited(&agent.scrape()?);
    let samples = sim.samples()?;
    let (before, after): (Vec<_>, Vec<_>) = samples.iter().partition(|s| s.at_us < moved_us);
    let count = |id: &str| got.iter().filter(|((c, _), _)| c == id).map(|(_, n)| *n as usize).sum::<usize>();
    // Samples within the clocks' uncertainty around the move are ambiguous.
    for (id, recorded) in [(&from, before.len()), (&to, after.len())] {
        assert!(count(id) <= recorded && count(id) + 3 >= recorded, "{id}: {} credited, {recorded} recorded", count(id));
    }
    drop(actor);
    Ok(())
}

/// v1 has no CLONE_INTO_CGROUP, but there cgroups can be renamed.
fn on_v1(layout: Layout) -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let tree = CgroupTree::v1("v1")?;
    let (scanned, scanned_dir) = tree.container(1)?;
    let mut processes = Vec::new();
    let mut start = |dir: &std::path::Path| -> Result<u32> {
        let process = Running(Command::new("sleep").arg("300").stdin(Stdio::null()).spawn()?);
        let pid = process.0.id();
        attach(pid, dir)?;
        processes.push(process);
        Ok(pid)
    };
    let before = start(&scanned_dir)?;
    let agent = Agent::start_in(layout, Some(&sim), &["--kernel-mode", "raw_tracepoint"])?;
    let (watched, watched_dir) = tree.container(2)?;
    let below = start(&tree.make(&format!("{watched}/init.scope"))?)?;
    assert_eq!(agent.containers_of(before)?, [scanned]);
    assert_eq!(agent.containers_of(below)?, ["".to_owned(), watched]);
    let renamed = format!("{:064x}", 0xabc);
    std::fs::rename(&watched_dir, watched_dir.with_file_name(&renamed))?;
    wait_for("the rename is known, also for cgroups below", Duration::from_secs(5), || {
        Ok((agent.explain(below)?.context("the process is known")?["container_id"] == renamed.as_str()).then_some(()))
    })?;
    drop(processes);
    Ok(())
}

#[test]
fn moves_and_renames_are_followed_on_v1_next_to_v2() -> Result<()> {
    on_v1(Layout::Machine)
}

#[test]
fn moves_and_renames_are_followed_on_v1_alone() -> Result<()> {
    on_v1(Layout::PureV1)
}
