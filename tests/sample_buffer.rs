//! The driver's own sample buffer as the source, in a world that behaves like the real driver that was measured: slow calls, cut percentages,
//! averages over all samples, samples that lose the PID of ended processes.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{CgroupTree, Layout};
use gpu_sampler_tests::{Agent, Sample, Sim, sum, wait_for};

/// On the first GPU the buffer matches NVML, on the second the driver refuses it, on the third it names other processes.
const WORLD: &str = "nodes = true\ndriver_version = '580.159.04'\npid_rule = 'last'\nexited_pids = 'blank'\n\
                     average = 'over_all'\nnewer_by_us = 1000\nperiod_us = 100000\ncall_us = 1500\n\
                     [[gpus]]\nrm_samples = 'served'\n[[gpus]]\n[[gpus]]\nrm_samples = 'wrong'\n";
const GPUS: [&str; 3] = ["0", "1", "2"];

fn of_gpu(page: &[Sample], index: &str, name: &str, labels: &[(&str, &str)]) -> Result<Option<f64>> {
    let is_it = |s: &&Sample| s.name == "gpu_info" && s.labels["index"] == index;
    let uuid = &page.iter().find(is_it).with_context(|| format!("GPU {index}"))?.labels["uuid"];
    Ok(sum(page, name, &[&[("uuid", uuid.as_str())], labels].concat()))
}

#[test]
fn one_read_has_every_sample_with_its_process() -> Result<()> {
    let (sim, tree) = (Sim::new(WORLD)?, CgroupTree::new("buffer")?);
    let containers = [tree.container(1)?, tree.container(2)?];
    // A comparison requires samples.
    std::thread::sleep(Duration::from_millis(1_500));
    let mut command = Agent::command(Some(&sim))?;
    command.env("LD_PRELOAD", sim.library()).env("RUST_LOG", "info");
    let devices = sim.devices();
    let devices = devices.to_str().context("a path")?;
    // The budgets of the default configuration.
    let args = ["--path-devfs", devices, "--gpu-budget-percent", "1", "--gpu-wait-percent", "2"];
    let agent = Agent::start_as(Layout::Machine, command, &args)?;
    let mut lives = Vec::new();
    for gpu in GPUS {
        for ((_, dir), demand) in containers.iter().zip(["0.6", "0.3"]) {
            let args = ["--count", "1", "--at-once", "1", "--lasting", "30s..30s", "--gpus", gpu, "--demand", demand];
            lives.push(sim.lives(&[dir], &args)?);
        }
    }
    // Some busy samples are compared first.
    wait_for("the buffer is used", Duration::from_secs(15), || {
        Ok(agent.log()?.contains("samples are read from the driver's own buffer").then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(1));
    let before = agent.scrape()?;
    std::thread::sleep(Duration::from_secs(8));
    let page = agent.scrape()?;
    let queried = |gpu: &str| -> Result<f64> {
        let until = |page: &[Sample], name: &str| of_gpu(page, gpu, name, &[]).map(Option::unwrap_or_default);
        let count = |name: &str| -> Result<f64> { Ok(until(&page, name)? - until(&before, name)?) };
        ensure!(count("gpu_sampler_samples_total")? > 60.0, "samples of GPU {gpu}");
        Ok(count("gpu_sampler_queried_samples_total")? / count("gpu_sampler_samples_total")?)
    };
    let shares = [queried("0")?, queried("1")?, queried("2")?];
    println!("queried: {shares:?}");
    ensure!(shares[0] > 0.97, "one read has the process of every sample: {shares:?}");
    ensure!(shares[1] < 0.9 && shares[2] < 0.9, "through NVML, calls of 1.5 ms exceed the budget: {shares:?}");
    let log = agent.log()?;
    ensure!(log.matches("samples are read from the driver's own buffer").count() == 1, "{log}");
    let refused = wait_for("the wrong buffer is refused", Duration::from_secs(20), || {
        let log = agent.log()?;
        Ok((log.contains("it differs from NVML") && log.contains("status 0x56")).then_some(log))
    });
    refused.with_context(|| log.clone())?;
    // Reads of the buffer fail: NVML takes over, and nothing counts twice.
    let used = |page: &[Sample]| of_gpu(page, "0", "gpu_sampler_sample_buffer_used", &[]);
    ensure!(used(&page)? == Some(1.0), "{:?}", used(&page)?);
    sim.inject("fault", &["--gpu", "0", "--kind", "error", "--call", "rmSamples", "--error", "UNKNOWN"])?;
    wait_for("the buffer is no longer used", Duration::from_secs(10), || {
        let is_over = agent.log()?.contains("reads of it fail");
        Ok((is_over && used(&agent.scrape()?)? == Some(0.0)).then_some(()))
    })?;
    for life in lives {
        life.all()?;
    }
    // Until every sample is settled; a series begins at 0.
    std::thread::sleep(Duration::from_secs(12));
    agent.scrape()?;
    let page = agent.scrape()?;
    for gpu in GPUS {
        let mut credited = 0.0;
        for (id, _) in &containers {
            let seconds = |name: &str| of_gpu(&page, gpu, name, &[("container_id", id.as_str())]);
            credited += seconds("container_gpu_seconds_total")?.with_context(|| format!("{id} on GPU {gpu}"))?;
        }
        let unknown = of_gpu(&page, gpu, "gpu_unattributed_seconds_total", &[("reason", "pid_unknown")])?.unwrap_or_default();
        let busy = of_gpu(&page, gpu, "gpu_time_seconds_total", &[("state", "busy")])?.context("busy time")?;
        ensure!(credited > 0.97 * busy && unknown < 0.1, "GPU {gpu}: {credited} of {busy} s, {unknown} s of unknown processes");
    }
    let state = |state: &str| of_gpu(&page, "0", "gpu_time_seconds_total", &[("state", state)]);
    let (busy, unobserved) = (state("busy")?.context("busy time")?, state("unobserved")?.context("unobserved time")?);
    ensure!(busy > 20.0 && unobserved < 1.0, "{busy} s are busy, {unobserved} s are unobserved");
    // The simulated memory interface is busy for half of the time in which the compute engine is. The first read of its own buffer credits
    // nothing.
    let memory = of_gpu(&page, "0", "gpu_engine_seconds_total", &[("engine", "memory")])?.context("the memory engine")?;
    ensure!((0.2..0.53).contains(&(memory / busy)), "the memory interface: {memory} s of {busy} s");
    Ok(())
}
