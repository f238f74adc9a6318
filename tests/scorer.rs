//! The program that scores exporters, with the real agent as its exporter.

use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{kernel, var};
use serde_json::Value;

/// Shortest duration of the loads. The simulated driver then takes some 120 samples of each GPU.
const LASTS: &str = "20s";

fn gpu_accuracy(world: &str, exporter: &[&str]) -> Result<Output> {
    let mut command = Command::new(var("GPU_ACCURACY_BIN")?);
    let mapping = concat!(env!("CARGO_MANIFEST_DIR"), "/gpu-accuracy/mappings/gpu-sampler.toml");
    command.args(["run", "--json", "--for", LASTS, "--mapping", mapping, "--world", world, "--nvml-sim", &var("NVML_SIM_BIN")?]);
    command.arg("--").args(exporter).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = command.spawn()?;
    let cgroups = kernel::cgroup2()?.join(format!("gpu-accuracy-{}", run.id()));
    let output = run.wait_with_output()?;
    ensure!(!cgroups.exists(), "cgroups of the run were left");
    Ok(output)
}

#[test]
fn the_agent_is_scored_against_the_truth() -> Result<()> {
    let (agent, docker) = (var("GPU_SAMPLER_BIN")?, var("DOCKER_HOST")?);
    let run = ["run", "--listen", "127.0.0.1:{port}", "--nvml-lib", "{library}", "--path-rootfs", "{root}"];
    let budgets = ["--gpu-budget-percent", "50", "--gpu-wait-percent", "50", "--docker-endpoint", &docker];
    let output = gpu_accuracy("driver-580", &[&[&*agent], &run[..], &budgets].concat())?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let scores: Value = serde_json::from_slice(&output.stdout)?;
    let score = &scores["worlds"][0];
    let value = |key: &str| score[key].as_f64().with_context(|| format!("no {key} in {score:#}"));
    // Everything that does not depend on which samples were drawn.
    for (key, most) in [("device_error", 0.03), ("labels_wrong", 0.0), ("false_zeros", 0.0), ("failed_scrapes", 0.0)] {
        ensure!(value(key)? <= most, "{key} of {score:#}");
    }
    // 120 samples for two users: an error of the share of at most 25 points, with a chance of less than 1 in 10 million.
    ensure!(value("share_error")? < 0.25, "{score:#}");
    ensure!(value("short_lost")? < 0.35, "{score:#}");
    ensure!(value("page_bytes")? > 10_000.0 && value("series")? > 100.0, "{score:#}");
    Ok(())
}

#[test]
fn what_cannot_be_scored_is_named() -> Result<()> {
    for (world, exporter, expect) in [
        ("moon", &["true"][..], "there is no world moon"),
        ("plain", &["/nonexistent/exporter"], "/nonexistent/exporter: not found"),
        ("plain", &["sh", "-c", "echo no port left >&2; exit 3"], "no port left"),
    ] {
        let output = gpu_accuracy(world, exporter)?;
        let problem = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && problem.contains(expect), "{exporter:?}: {problem}");
    }
    Ok(())
}
