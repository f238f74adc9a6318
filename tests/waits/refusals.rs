//! Processes that lose their probes or get none, each with its reason, next to others that keep theirs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use gpu_sampler_tests::cuda::CudaLibrary;
use gpu_sampler_tests::{get, sum, var, wait_for};
use serde_json::{Value, json};

use super::{ATTACHES, CudaClient, GONE_WITHIN, WaitScene, report_of, user};

/// The bound of the product: a process over the budget loses its probes with the next reading.
const DETACHES: Duration = Duration::from_secs(3);
const CONDITION: &str = "wait-probes";

/// Puts a copy of a library into a folder of its own.
fn copy(scene: &WaitScene, library: &Path, folder: &str) -> Result<PathBuf> {
    let folder = scene.dir.path().join(folder);
    fs::create_dir(&folder)?;
    let path = folder.join("libcuda.so.1");
    fs::copy(library, &path).with_context(|| library.display().to_string())?;
    Ok(path)
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

/// Why a user has no probes; empty if all of its processes have them.
fn problems(report: &Value, client: &CudaClient) -> Result<String> {
    let waits = &user(report, client).with_context(|| format!("{client:?} is a user"))?["waits"];
    let all = waits["problems"].as_array().with_context(|| format!("{waits}"))?;
    Ok(all.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n"))
}

fn probed_s(report: &Value, client: &CudaClient) -> f64 {
    user(report, client).and_then(|user| user["waits"]["probed_seconds"].as_f64()).unwrap_or_default()
}

#[test]
fn refused_processes_have_a_reason_and_others_keep_their_probes() -> Result<()> {
    let mut scene = WaitScene::new("waits-refused", "seed = 6\n[[gpus]]\n[[gpus]]")?;
    let work = "--kernel 2ms --every 20ms --for 120s --threads 2";
    let steady = scene.work(1, work)?;
    let other_copy = copy(&scene, &scene.library.path.clone(), "other")?;
    let with_other_copy = scene.work(2, &format!("{work} --library {}", other_copy.display()))?;
    let other_library = CudaLibrary::read(&other_copy)?;
    let empty = scene.work(3, "--mode empty --rate 20000 --threads 2 --gpu 1 --for 120s")?;
    let replaced_copy = copy(&scene, &scene.library.path.clone(), "replaced")?;
    let replaced = scene.work(4, &format!("{work} --gpu 1 --library {}", replaced_copy.display()))?;
    let next = copy(&scene, &scene.library.path.clone(), "next")?;
    fs::rename(next, &replaced_copy)?;
    let without_symbols = copy(&scene, Path::new(&var("NVML_SIM_LIBRARY")?), "without-symbols")?;
    let without_symbols = scene.start(5, &words(&format!("env LD_PRELOAD={} sleep 120", without_symbols.display())))?;
    let without_library = scene.start(6, &words("sleep 120"))?;
    // They do not use CUDA, and the driver lists them all the same.
    let _loads = [scene.sim.load(without_symbols.pid, 1, 0.2, &[])?, scene.sim.load(without_library.pid, 1, 0.2, &[])?];

    let agent = scene.agent(&[])?;
    let session = agent.record_as(&json!({"duration_seconds": 60, "wait_probes": true}))?;
    // A test that polls slowly may miss the short time with probes.
    let from = Instant::now();
    while !scene.library.is_probed(empty.pid)? && from.elapsed() < ATTACHES {
        std::thread::sleep(Duration::from_millis(5));
    }
    let from = Instant::now();
    wait_for("the process over the budget has no probes", DETACHES, || Ok((!scene.library.is_probed(empty.pid)?).then_some(())))?;
    println!("detached after {:?}", from.elapsed());
    wait_for("both libraries are probed", ATTACHES, || {
        Ok((scene.library.is_probed(steady.pid)? && other_library.is_probed(with_other_copy.pid)?).then_some(()))
    })?;
    // A condition keeps its first message; which of the three processes is examined first is not known.
    wait_for("the condition wait-probes", ATTACHES, || {
        let live = get(agent.port, "/api/v1/live")?;
        Ok(live.contains("selected processes without wait probes: ").then_some(()))
    })
    .with_context(|| get(agent.port, "/api/v1/live").unwrap_or_default())?;
    assert!(sum(&agent.scrape()?, "gpu_sampler_degraded", &[("condition", CONDITION)]).is_some());
    // A process without the library is examined again before it is reported.
    std::thread::sleep(DETACHES);
    for client in [&empty, &replaced] {
        scene.check_unprobed(client)?;
    }
    assert!(scene.library.is_probed(steady.pid)?, "others keep their probes");
    agent.stop(&session)?;
    let stopped = Instant::now();
    scene.check_gone(&[&steady, &empty], "the session was stopped")?;
    // The kernel detaches one library after the other.
    wait_for("no breakpoint in the other library", GONE_WITHIN.saturating_sub(stopped.elapsed()), || {
        Ok(other_library.breakpoints(with_other_copy.pid)?.is_empty().then_some(()))
    })?;

    let report = report_of(&agent, &session)?;
    for client in [&steady, &with_other_copy] {
        assert_eq!((problems(&report, client)?, probed_s(&report, client) > 2.0), (String::new(), true), "{client:?}");
    }
    for (client, state, reason) in [
        (&empty, "over-budget", "more than 2000 blocking calls a second; wait_probe_budget permits more"),
        (&replaced, "refused", "libcuda.so.1 was replaced after the process had mapped it; restart the process to probe it"),
        (&without_symbols, "no-symbols", "has none of the blocking calls, such as cuStreamSynchronize"),
        (&without_library, "no-library", "the process maps no libcuda.so"),
    ] {
        let problems = problems(&report, client)?;
        let begin = format!("process {} ({state}): ", client.pid);
        assert!(problems.starts_with(&begin) && problems.contains(reason), "{client:?}: {problems:?}");
    }
    wait_for("the condition ends with the session", ATTACHES, || {
        Ok(sum(&agent.scrape()?, "gpu_sampler_degraded", &[("condition", CONDITION)]).is_none().then_some(()))
    })
}
