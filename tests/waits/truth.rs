//! Sums of wait probes against the truth of the simulated driver, for each way to wait.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::run_cli;
use gpu_sampler_tests::var;
use sampler_core::fact::Fact;
use sampler_core::units::BootNs;
use sampler_session::Session;
use serde_json::Value;

use super::{ATTACHES, CudaClient, WaitScene, check_rejected, number, record_alone, url, waits_of};

/// Largest difference, as a part of the probed time and of the waiting.
const WITHIN: f64 = 0.01;
/// What is probed of the counted span, at least: without a running agent the GPUs have to be found first.
const PROBED: f64 = 0.5;
/// Both sums have the same terms.
const ROUNDING_S: f64 = 1e-6;
/// Threads that may be inside a call at each end of the span, and others that return between two reads.
const CALLS_AT_ENDS: f64 = 8.0;

/// Each in a container of its own: GPU, arguments, processes. A GPU has work for half of the time, so that calls block for different times.
const WORK: [(usize, &str, usize); 7] = [
    (0, "--mode block --kernel 3ms --every 25ms --threads 2", 1),
    (0, "--mode event --kernel 3ms --every 29ms --threads 2", 1),
    (1, "--mode ctx --kernel 3ms --every 27ms --threads 2", 1),
    (1, "--mode copy --kernel 3ms --every 31ms --threads 2", 1),
    (2, "--mode graph --kernel 3ms --every 25ms --threads 2", 1),
    (2, "--mode spin --kernel 2ms --every 60ms", 1),
    (2, "--mode block --kernel 2ms --every 20ms --fork-after-init", 2),
];
const SPIN: usize = 5;

/// What the probes of one process counted.
#[derive(Clone, Copy, Debug)]
struct Counted {
    from: BootNs,
    to: BootNs,
    some_s: f64,
    calls: f64,
}

/// By PID, in the counted span of the session.
fn counted(session: &Session) -> Result<BTreeMap<u32, Counted>> {
    let (start, end) = (session.header.start, session.end.context("the session has an end")?);
    let mut all: BTreeMap<u32, Counted> = BTreeMap::new();
    for fact in &session.facts {
        let Fact::Waited(wait) = fact else { continue };
        if wait.to <= start || wait.to > end {
            continue;
        }
        let process = all.entry(wait.process.pid).or_insert(Counted { from: wait.from, to: wait.from, some_s: 0.0, calls: 0.0 });
        ensure!(process.to == wait.from, "readings of {} follow each other: {wait:?}", wait.process.pid);
        process.to = wait.to;
        process.some_s += wait.some_ns as f64 * 1e-9;
        process.calls += wait.calls as f64;
    }
    Ok(all)
}

/// The wall clock at a time of the session, in microseconds.
fn wall_us(session: &Session, at: BootNs) -> u64 {
    let header = &session.header;
    let offset_ns = i128::from(at.0) - i128::from(header.start.0);
    ((i128::from(header.start_wall.0) + offset_ns) / 1_000) as u64
}

fn check(scene: &WaitScene, clients: &[CudaClient], file: &Path, what: &str) -> Result<()> {
    let session = sampler_session::read(&std::fs::read(file)?)?;
    ensure!(session.damage.is_empty(), "{:?}", session.damage);
    let counted = counted(&session)?;
    let processes: usize = WORK.iter().map(|(_, _, processes)| processes).sum();
    ensure!(counted.len() == processes, "{what}: {} of {processes} processes had probes", counted.len());
    let length_s = (session.end.context("the end")?.0 - session.header.start.0) as f64 * 1e-9;
    for (pid, process) in &counted {
        let span = (wall_us(&session, process.from), wall_us(&session, process.to));
        let probed_s = (span.1 - span.0) as f64 * 1e-6;
        let truth = scene.sim.wait_truth(*pid, span)?.with_context(|| format!("{pid} used CUDA"))?;
        println!(
            "{what}: process {pid}: probed {probed_s:.2} s, waited {:.4} s, truth {:.4} s, of the caller {:.4} s, calls {}, truth {}",
            process.some_s, truth.wait_some_s, truth.caller_some_s, process.calls, truth.calls
        );
        assert!(probed_s >= PROBED * length_s, "{what}: {pid}: {probed_s} of {length_s} s are probed");
        // A thread passes the caller's clock, the probe, the library's clock, and again in the other order: what a probe costs, and time
        // in which the thread is preempted between them, is in the sum of the caller alone or also in that of the probe.
        assert!(truth.wait_some_s <= truth.caller_some_s, "{what}: {pid}: {truth:?}");
        let all = truth.wait_some_s..=truth.caller_some_s;
        let outside_s = (all.start() - process.some_s).max(process.some_s - all.end());
        assert!(outside_s <= WITHIN * probed_s, "{what}: {pid}: {process:?}, {truth:?}");
        // Of the waiting itself as well, but for a call at each end.
        let at_ends_s = 2.0 * truth.wait_some_s / truth.calls.max(1.0);
        assert!(outside_s <= WITHIN * truth.wait_some_s + at_ends_s, "{what}: {pid}: {process:?}, {truth:?}");
        assert!((process.calls - truth.calls).abs() <= CALLS_AT_ENDS, "{what}: {pid}: {process:?}, {truth:?}");
    }
    let spin = counted[&clients[SPIN].pid];
    assert_eq!((spin.some_s, spin.calls), (0.0, 0.0), "polling is not a blocking call");
    let others = clients.iter().filter(|client| client.pid != clients[SPIN].pid);
    assert!(others.clone().all(|client| counted[&client.pid].calls > 20.0), "{counted:?}");
    check_report(clients, &counted, file)
}

/// The report has the sums of the facts, by user.
fn check_report(clients: &[CudaClient], counted: &BTreeMap<u32, Counted>, file: &Path) -> Result<()> {
    let (code, out, err) = run_cli(&["report", &file.to_string_lossy(), "--format", "json"])?;
    ensure!(code == Some(0), "{err}");
    let report: Value = serde_json::from_str(&out)?;
    for (n, client) in clients.iter().enumerate() {
        let waits = waits_of(&report, client)?;
        // The forked child has another PID.
        if WORK[n].2 == 1 {
            let counted = counted[&client.pid];
            assert!((number(waits, "wait_seconds")? - counted.some_s).abs() < ROUNDING_S, "{waits} {counted:?}");
            assert_eq!(number(waits, "calls")?, counted.calls, "{waits}");
        }
        let probed_s = counted.get(&client.pid).map_or(0.0, |process| (process.to.0 - process.from.0) as f64 * 1e-9);
        assert!(number(waits, "probed_seconds")? > WORK[n].2 as f64 * probed_s * 0.8, "{waits}");
        assert_eq!(waits["problems"].as_array().map(Vec::len), Some(0), "{waits}");
        if n != SPIN {
            let median_s = number(&waits["call_seconds"], "p50")?;
            assert!((0.001..0.1).contains(&median_s), "calls block for some milliseconds: {waits}");
        }
    }
    let all_s: f64 = counted.values().map(|process| process.some_s).sum();
    let users = report["users"].as_array().context("users")?;
    let reported_s: f64 = users.iter().filter_map(|user| user["waits"]["wait_seconds"].as_f64()).sum();
    assert!((reported_s - all_s).abs() < ROUNDING_S, "{reported_s} of {all_s} s of waiting are in the report");
    Ok(())
}

#[test]
fn waiting_equals_the_truth_with_an_agent_and_without_one() -> Result<()> {
    let mut scene = WaitScene::new("waits-truth", "seed = 3\n[[gpus]]\n[[gpus]]\n[[gpus]]")?;
    let mut clients = Vec::new();
    for (n, (gpu, arguments, _)) in WORK.iter().enumerate() {
        clients.push(scene.work(n + 1, &format!("{arguments} --gpu {gpu} --for 200s"))?);
    }
    let agent = scene.agent(&[])?;
    let known = |client: &CudaClient| Ok(agent.explain(client.pid)?.map(|_| ()));
    for client in &clients {
        gpu_sampler_tests::wait_for("the process is known", ATTACHES, || known(client))?;
    }
    let file = scene.file("with-agent.gpus");
    let (code, out, err) = run_cli(&["record", "--wait-probes", "--duration", "8s", "-o", &file, "--agent", &url(&agent)])?;
    ensure!(code == Some(0), "{out}{err}");
    check(&scene, &clients, Path::new(&file), "with an agent")?;
    scene.check_gone(&clients.iter().collect::<Vec<_>>(), "the session has ended")?;
    drop(agent);

    let file = scene.file("alone.gpus");
    record_alone(&scene, &["--wait-probes", "--duration", "6s"], Path::new(&file))?;
    scene.check_gone(&clients.iter().collect::<Vec<_>>(), "record has ended")?;
    check(&scene, &clients, Path::new(&file), "without an agent")
}

#[test]
fn invalid_selections_name_the_remedy() -> Result<()> {
    let remedy = "expected all, container=NAME, namespace=NAME, job=ID or pid=NUMBER";
    for text in ["image=x", "pid=0", "pid=x", "container=", "ALL"] {
        let option = format!("--wait-probes={text}");
        for verb in ["run", "record"] {
            check_rejected(&[verb, &option], 1, &["wait_probes", &format!("{text:?}"), remedy])?;
        }
    }
    check_rejected(&["run", "--wait-probe-budget", "5"], 1, &["wait_probe_budget", "\"5\"", "10 to 1000000 calls a second"])?;
    check_rejected(&["run", "--wait-probe-budget", "many"], 2, &["--wait-probe-budget"])?;
    // The value follows `=`, since the option has a default: a separate word is not its value.
    check_rejected(&["record", "--wait-probes", "container=x"], 2, &["container=x"])?;
    let environment = Command::new(var("GPU_SAMPLER_BIN")?).arg("run").env("GPU_SAMPLER_WAIT_PROBES", "image=x").output()?;
    let err = String::from_utf8_lossy(&environment.stderr);
    assert!(environment.status.code() == Some(1) && err.contains(remedy), "{err}");

    let scene = WaitScene::new("waits-invalid", "seed = 3\n[[gpus]]")?;
    let agent = scene.agent(&[])?;
    let body = serde_json::json!({"duration_seconds": 1, "wait_probes": "image=x"});
    let error = format!("{:#}", agent.record_as(&body).err().context("the request is refused")?);
    assert!(error.contains(" 400 ") && error.contains(remedy), "{error}");
    assert!(agent.sessions()?.is_empty());
    // `false` is not a selection.
    let id = agent.record_as(&serde_json::json!({"duration_seconds": 1, "wait_probes": false}))?;
    agent.stop(&id)
}
