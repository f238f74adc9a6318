//! Which processes have breakpoints, and that none is left when a session, a selection or the agent ends.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::cuda::FIRST_CALL;
use gpu_sampler_tests::labels::{UID, bundle};
use gpu_sampler_tests::{Agent, wait_for};
use serde_json::json;

use super::{ATTACHES, GONE_WITHIN, WaitScene, number, report_of, user, waits_of};

const WORK: &str = "--kernel 2ms --every 20ms --for 200s";
/// Several turns of the thread that attaches.
const WATCHED: Duration = Duration::from_secs(2);
/// More than one reading.
const PROBED: Duration = Duration::from_millis(1_500);

#[test]
fn only_selected_processes_have_probes() -> Result<()> {
    let mut scene = WaitScene::new("waits-selected", "seed = 4\n[[gpus]]\n[[gpus]]\n[[gpus]]")?;
    let mut clients = Vec::new();
    for n in 0..3 {
        clients.push(scene.work(n + 1, &format!("{WORK} --gpu {n}"))?);
    }
    bundle(&scene.dir.path().join("root"), &clients[0].container_id, "trainer-0", UID)?;
    let agent = scene.agent(&[])?;
    let mut sessions = Vec::new();
    for (selection, selected) in [
        ("namespace=prod".to_owned(), 0),
        ("container=trainer-0".to_owned(), 0),
        (format!("container={}", clients[1].container_id), 1),
        (format!("pid={}", clients[2].pid), 2),
    ] {
        let session = agent.record_as(&json!({"duration_seconds": 60, "wait_probes": selection}))?;
        scene.wait_until_probed(&clients[selected]).context(selection.clone())?;
        let until = Instant::now() + WATCHED;
        while Instant::now() < until {
            for (n, client) in clients.iter().enumerate() {
                if n != selected {
                    scene.check_unprobed(client).context(selection.clone())?;
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        agent.stop(&session)?;
        scene.check_gone(&clients.iter().collect::<Vec<_>>(), &format!("the session with {selection} was stopped"))?;
        sessions.push((session, selected));
    }
    for (session, selected) in sessions {
        let report = report_of(&agent, &session)?;
        for (n, client) in clients.iter().enumerate() {
            let user = user(&report, client).with_context(|| format!("{client:?} is a user"))?;
            let probed_s = user["waits"]["probed_seconds"].as_f64();
            assert_eq!(probed_s.is_some_and(|seconds| seconds > 0.5), n == selected, "{n} of session {session}: {user}");
            assert_eq!(user.get("waits").is_some(), n == selected, "{user}");
        }
    }
    Ok(())
}

/// What the agent does when it is ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum EndMoment {
    /// Probes are attached, and were not read.
    Attached,
    Reading,
    /// The session has just been stopped.
    Ending,
    /// The agent has just been asked to end.
    Terminating,
}

fn wait_until(scene: &WaitScene, agent: &Agent, pids: &[u32], moment: EndMoment) -> Result<()> {
    let session = agent.record_as(&json!({"duration_seconds": 60, "wait_probes": true}))?;
    let from = Instant::now();
    // Faster than `wait_for`: the first read is within a second.
    while !pids.iter().map(|pid| scene.library.is_probed(*pid)).collect::<Result<Vec<_>>>()?.contains(&true) {
        ensure!(from.elapsed() < ATTACHES, "no process has probes");
        std::thread::sleep(Duration::from_millis(2));
    }
    if moment != EndMoment::Attached {
        std::thread::sleep(PROBED);
        for pid in pids {
            ensure!(scene.library.is_probed(*pid)?, "process {pid} has no probes");
        }
    }
    if moment == EndMoment::Ending {
        agent.stop(&session)?;
    }
    Ok(())
}

#[test]
fn no_breakpoint_is_left_when_the_agent_ends() -> Result<()> {
    let mut scene = WaitScene::new("waits-killed", "seed = 4\n[[gpus]]")?;
    let clients = [scene.work(1, WORK)?, scene.work(2, WORK)?];
    let pids = clients.each_ref().map(|client| client.pid);
    for (signal, moment) in [
        (libc::SIGKILL, EndMoment::Attached),
        (libc::SIGKILL, EndMoment::Reading),
        (libc::SIGKILL, EndMoment::Ending),
        (libc::SIGKILL, EndMoment::Terminating),
        (libc::SIGTERM, EndMoment::Attached),
        (libc::SIGTERM, EndMoment::Reading),
    ] {
        let mut agent = scene.agent(&[])?;
        wait_until(&scene, &agent, &pids, moment)?;
        if moment == EndMoment::Terminating {
            gpu_sampler_tests::leftovers::kill(agent.process.0.id(), libc::SIGTERM);
            std::thread::sleep(Duration::from_millis(5));
        }
        let from = Instant::now();
        agent.process.ends_with(signal)?;
        let ended = from.elapsed();
        scene.check_gone(&clients.each_ref(), &format!("signal {signal}, {moment:?}, ended after {ended:?}"))?;
    }
    // The work went on all the time.
    for client in &clients {
        let state = std::fs::read_to_string(format!("/proc/{}/stat", client.pid))?;
        ensure!(!state.contains(") Z "), "{state}");
    }
    Ok(())
}

/// With more processes of a library than have links of their own: not on Linux 6.11 to 6.13, which refuse the fifth.
#[test]
fn no_breakpoint_of_a_shared_link_is_left_when_the_agent_is_killed() -> Result<()> {
    let mut scene = WaitScene::new("waits-shared", "seed = 4\n[[gpus]]")?;
    let mut clients = Vec::new();
    for n in 1..=6 {
        clients.push(scene.work(n, WORK)?);
    }
    let pids: Vec<u32> = clients.iter().map(|client| client.pid).collect();
    for moment in [EndMoment::Reading, EndMoment::Ending] {
        let mut agent = scene.agent(&[])?;
        wait_until(&scene, &agent, &pids, moment)?;
        agent.process.ends_with(libc::SIGKILL)?;
        scene.check_gone(&clients.iter().collect::<Vec<_>>(), &format!("SIGKILL, {moment:?}"))?;
    }
    Ok(())
}

#[test]
fn the_setting_probes_without_a_session_and_new_processes_too() -> Result<()> {
    let mut scene = WaitScene::new("waits-setting", "seed = 4\n[[gpus]]")?;
    let first = scene.work(1, WORK)?;
    let mut agent = scene.agent(&["--wait-probes=all"])?;
    scene.wait_until_probed(&first)?;
    let second = scene.work(2, WORK)?;
    // The library's first call has a breakpoint in all of its processes, so the new client is known at once.
    wait_for("the first call is probed", GONE_WITHIN, || {
        Ok(scene.library.breakpoints(second.pid)?.contains(FIRST_CALL).then_some(()))
    })?;
    scene.wait_until_probed(&second)?;
    agent.process.ends_with(libc::SIGTERM)?;
    scene.check_gone(&[&first, &second], "SIGTERM")?;

    // Without a selection no process is touched.
    let agent = scene.agent(&[])?;
    wait_for("the process is known", ATTACHES, || Ok(agent.explain(first.pid)?.map(|_| ())))?;
    let until = Instant::now() + WATCHED;
    while Instant::now() < until {
        assert!(scene.library.breakpoints(first.pid)?.is_empty());
        std::thread::sleep(GONE_WITHIN / 10);
    }
    Ok(())
}

/// A thread that ends inside a call does not return from it, and its process waits no longer.
#[test]
fn a_thread_that_ends_inside_a_call_has_left_it() -> Result<()> {
    let mut scene = WaitScene::new("waits-ended", "seed = 4\n[[gpus]]")?;
    let client = scene.work(1, "--mode empty --kernel 1ms --every 50ms --for 200s --end-thread-on-usr1")?;
    let agent = scene.agent(&["--wait-probes=all"])?;
    let threads = || Ok::<usize, anyhow::Error>(std::fs::read_dir(format!("/proc/{}/task", client.pid))?.count());
    let mut rates = Vec::new();
    scene.wait_until_probed(&client)?;
    for ends in [false, true] {
        if ends {
            let before = threads()?;
            gpu_sampler_tests::leftovers::kill(client.pid, libc::SIGUSR1);
            wait_for("the thread has ended", ATTACHES, || Ok((threads()? < before).then_some(())))?;
            // The first reading of the session begins before it.
            std::thread::sleep(2 * PROBED);
        }
        let session = agent.record_as(&json!({"duration_seconds": 60, "wait_probes": true}))?;
        std::thread::sleep(Duration::from_secs(4));
        agent.stop(&session)?;
        let report = report_of(&agent, &session)?;
        let waits = waits_of(&report, &client)?;
        ensure!(number(waits, "probed_seconds")? > 2.0 && number(waits, "calls")? > 10.0, "{waits}");
        rates.push(number(waits, "wait_seconds")? / number(waits, "probed_seconds")?);
    }
    println!("waiting: {rates:.3?} of the time");
    assert!(rates[0] > 0.9, "while the thread waits: {rates:?}");
    assert!(rates[1] < 0.1, "after it has ended: {rates:?}");
    Ok(())
}

/// Each session has the waiting of its own time, of all processes that have probes then, and the probes stay for the one that still records.
#[test]
fn sessions_at_the_same_time_share_probes() -> Result<()> {
    let mut scene = WaitScene::new("waits-shared", "seed = 4\n[[gpus]]")?;
    let clients = [scene.work(1, WORK)?, scene.work(2, WORK)?];
    let agent = scene.agent(&[])?;
    let record = |selection: &str| agent.record_as(&json!({"duration_seconds": 60, "wait_probes": selection}));
    let first = record("all")?;
    for client in &clients {
        scene.wait_until_probed(client)?;
    }
    let from_first = Instant::now();
    std::thread::sleep(Duration::from_secs(4));
    let from_second = Instant::now();
    let second = record(&format!("container={}", clients[1].container_id))?;
    std::thread::sleep(Duration::from_secs(4));
    agent.stop(&first)?;
    let (of_first, shared) = (from_first.elapsed(), from_second.elapsed());
    // Selected by the first session only. That of the first call stays, as long as any process of the library is probed.
    wait_for("no probe in the other process", GONE_WITHIN, || Ok(scene.check_unprobed(&clients[0]).ok()))?;
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        ensure!(scene.library.is_probed(clients[1].pid)?, "the second session has lost its probes");
        std::thread::sleep(Duration::from_millis(100));
    }
    agent.stop(&second)?;
    let of_second = from_second.elapsed();
    scene.check_gone(&clients.each_ref(), "the second session was stopped")?;
    for (session, of_clients) in [(first, [of_first; 2]), (second, [shared, of_second])] {
        let report = report_of(&agent, &session)?;
        for (client, span) in clients.iter().zip(of_clients) {
            let waits = waits_of(&report, client)?;
            let (probed_s, span_s) = (number(waits, "probed_seconds")?, span.as_secs_f64());
            println!("probed {probed_s:.2} s of {span_s:.2} s");
            // A reading at each end, and what detaching takes.
            assert!((span_s - 1.5..span_s + 2.5).contains(&probed_s), "{probed_s} of {span_s} s: {waits}");
            assert!(number(waits, "calls")? > 20.0 * probed_s, "{waits}");
        }
    }
    Ok(())
}

/// As in an image: the path of the library leads to another file for a container with an overlay of its own.
#[test]
fn a_library_is_found_in_the_mounts_of_its_process() -> Result<()> {
    let mut scene = WaitScene::new("waits-overlay", "seed = 4\n[[gpus]]")?;
    let first = scene.work(1, WORK)?;
    let (library, layer) = (scene.sim.dir.path().join("lib/libcuda.so.1"), scene.dir.path().join("layer"));
    std::fs::create_dir(&layer)?;
    std::fs::copy(&library, layer.join("libcuda.so.1"))?;
    let below = library.parent().context("a folder")?.display().to_string();
    let mount = format!("mount -t overlay overlay -o lowerdir={}:{below} {below} && exec \"$@\"", layer.display());
    let mounted = ["unshare", "--mount", "sh", "-c", &mount, "sh"].map(str::to_owned);
    let words = [mounted.to_vec(), scene.sim.cuda_words(WORK)?].concat();
    let second = scene.start(2, &words)?;
    let inode = |pid: u32| -> Result<Option<String>> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let line = maps.lines().find(|line| line.ends_with("/libcuda.so.1"));
        Ok(line.and_then(|line| line.split_whitespace().nth(4)).map(str::to_owned))
    };
    let in_overlay = wait_for("the library of the overlay is mapped", ATTACHES, || inode(second.pid))?;
    ensure!(Some(&in_overlay) != inode(first.pid)?.as_ref(), "both map the same file");

    let agent = scene.agent(&[])?;
    let session = agent.record_as(&json!({"duration_seconds": 60, "wait_probes": true}))?;
    for client in [&first, &second] {
        scene.wait_until_probed(client)?;
    }
    std::thread::sleep(Duration::from_secs(3));
    agent.stop(&session)?;
    scene.check_gone(&[&first, &second], "the session was stopped")?;
    let report = report_of(&agent, &session)?;
    for client in [&first, &second] {
        let waits = waits_of(&report, client)?;
        ensure!(number(waits, "calls")? > 20.0 && waits["problems"].as_array().is_some_and(Vec::is_empty), "{waits}");
    }
    Ok(())
}
