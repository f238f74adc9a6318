//! Processes that have ended before a sample of theirs is read: the driver does not name them, their call of cuInit does.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Agent, sum, wait_for};

use super::{CudaClient, WaitScene, now_us};

/// As measured on a card: a sample names the last process of its period, unless that has ended by the read.
const WORLD: &str = "seed = 4\n[[gpus]]\npid_rule = 'last'\nexited_pids = 'blank'";
/// The permanent process works at first, from which the agent learns the rule, and then keeps its context.
const PERMANENT: &str = "--kernel 20ms --every 100ms --phase 8s:300s --for 300s";
const WORKS: Duration = Duration::from_secs(8);
const SHORT: &str = "--kernel 10ms --back-to-back --for 100ms";
const LIVES: usize = 20;
const APART: Duration = Duration::from_secs(1);
/// Pid-less samples wait for 10 s for a sample that names a process.
const SETTLES: Duration = Duration::from_secs(13);
/// Of the time of the short processes. The driver names those that live when it is read, which is about every second one.
const WITH_PROBES: f64 = 0.85;
const GAIN: f64 = 0.1;
/// Several scrapes.
const EXPOSED: Duration = Duration::from_secs(5);

fn seconds(agent: &Agent, client: &CudaClient) -> Result<f64> {
    let labels = [("container_id", &*client.container_id)];
    // Series begin at 0 for each scraper, and one that connects again may be taken for an earlier one.
    let credited = || Ok(sum(&agent.scrape()?, "container_gpu_seconds_total", &labels).filter(|seconds| *seconds > 0.0));
    wait_for("the container is credited", EXPOSED, credited)
}

#[test]
fn short_processes_are_credited_by_their_first_call() -> Result<()> {
    let mut scene = WaitScene::new("waits-clients", WORLD)?;
    let (probing, plain) = (scene.agent(&["--wait-probes=all"])?, scene.agent(&[])?);
    let begun = Instant::now();
    let permanent = scene.work(1, PERMANENT)?;
    scene.wait_until_probed(&permanent)?;
    std::thread::sleep((WORKS + APART).saturating_sub(begun.elapsed()));
    let before = [seconds(&probing, &permanent)?, seconds(&plain, &permanent)?];
    let from_us = now_us()?;
    let mut lives = Vec::new();
    for _ in 0..LIVES {
        lives.push(scene.start(2, &scene.sim.cuda_words(SHORT)?)?);
        // It prints what it did at its end.
        scene.actors.pop().context("the process was started")?.line()?;
        std::thread::sleep(APART);
    }
    let to_us = now_us()?;
    std::thread::sleep(SETTLES);
    let used = lives.iter().map(|life| scene.sim.wait_truth(life.pid, (from_us, to_us)));
    let truth_s: f64 = used.map(|used| Ok(used?.map_or(0.0, |used| used.gpu_s))).sum::<Result<f64>>()?;
    let short = lives.first().context("a process was started")?;
    let (with, without) = (seconds(&probing, short)?, seconds(&plain, short)?);
    let after = [seconds(&probing, &permanent)?, seconds(&plain, &permanent)?];
    println!("{LIVES} processes of 0.1 s, {truth_s:.2} s on the GPU: {with:.2} s credited with probes, {without:.2} s without");
    println!("permanent process, idle meanwhile: {before:?}, then {after:?}");
    ensure!(truth_s > 0.05 * LIVES as f64, "the short processes worked for {truth_s} s");
    ensure!((WITH_PROBES * truth_s..=1.1 * truth_s).contains(&with), "{with} s of {truth_s}");
    ensure!(with - without > GAIN * truth_s, "{without} s without probes, and {with} s with them, of {truth_s}");
    Ok(())
}
