//! A freezing experiment with wait probes: calls take their kernel's time while the suspect is frozen, and longer while it runs.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::run_cli;
use serde_json::Value;

use super::{ATTACHES, WaitScene, number, url};

const WORLD: &str = "seed = 4\n[[gpus]]\njitter_us = 3300";
/// Of each call of the victim.
const KERNEL_S: f64 = 0.005;
/// What a call may take beyond its kernel while the victim is alone, on a busy machine.
const ALONE_TOLERANCE_S: f64 = 0.002;

#[test]
fn an_experiment_shows_that_calls_return_sooner_while_the_suspect_is_frozen() -> Result<()> {
    let mut scene = WaitScene::new("waits-experiment", WORLD)?;
    let victim = scene.work(1, "--kernel 5ms --every 25ms --for 170s")?;
    let suspect = scene.work(2, "--kernel 5ms --back-to-back --for 170s")?;
    let runtime = scene.file("run");
    let agent = scene.agent(&["--runtime-dir", &runtime])?;
    agent.wait_until_credited(&[&victim.container_id, &suspect.container_id], ATTACHES)?;

    let (file, selection) = (scene.file("experiment.gpus"), format!("--wait-probes=container={}", victim.container_id));
    let subjects = ["--victim", &victim.container_id, "--suspect", &suspect.container_id, "--i-may-freeze"];
    let design = ["--bursts", "8", "--freeze", "2s", "--pause", "500ms", "--seed", "11"];
    let access = ["--agent", &url(&agent), "--runtime-dir", &runtime, "-o", &file, &selection, "--json"];
    let (code, out, err) = run_cli(&[&["experiment"], &subjects[..], &design, &access].concat())?;
    ensure!(code == Some(0), "{code:?}: {out}{err}");

    let experiments: Value = serde_json::from_str(&out)?;
    let effects = experiments[0]["effects"].as_array().context("effects")?;
    let effect = effects.iter().find(|effect| effect["outcome"] == "call-wait").with_context(|| out.clone())?;
    println!("{effect}");
    assert_eq!(effect["confirmed"], true, "{effect}");
    // The GPU runs the two in turn, so that a call takes about twice its kernel; alone, it takes its kernel.
    let (frozen, running) = (number(effect, "mean_frozen")?, number(effect, "mean_running")?);
    assert!((KERNEL_S..KERNEL_S + ALONE_TOLERANCE_S).contains(&frozen), "{effect}");
    assert!(running > 1.5 * KERNEL_S, "{effect}");
    assert!((number(effect, "effect")? - (frozen - running)).abs() < 1e-6, "{effect}");

    scene.check_gone(&[&victim, &suspect], "the experiment has ended")?;
    let (_, cgroup) = scene.tree.container(2)?;
    assert_eq!(fs::read_to_string(cgroup.join("cgroup.freeze"))?.trim(), "0", "the suspect is thawed");
    Ok(())
}
