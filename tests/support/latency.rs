//! An agent on simulated GPUs with slow driver calls: the share of time that is observed, and the errors of shares against the truth.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use devkit::process::processor_time;

use crate::kernel::{CgroupTree, attach};
use crate::{Agent, Running, Sample, Sim, sum};

/// Demands of the containers on each GPU; a GPU of the third kind has one container, of the last kind two with full demand.
const DEMANDS: [&[f64]; 4] = [&[0.6, 0.3], &[0.9, 0.1], &[0.3], &[1.0, 1.0]];
/// Until every sample is settled and the time that waits for neighbours is divided.
const SETTLED: Duration = Duration::from_secs(14);

/// The parameters of one world.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    pub call_us: u64,
    pub gpus: usize,
    /// The calls of all GPUs share one lock.
    pub one_lock: bool,
    pub seconds: u64,
    pub seed: u64,
}

/// The results over all GPUs.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Share of the time from before the loads until everything is settled.
    pub unobserved_ratio: f64,
    /// Share of samples.
    pub queried_ratio: f64,
    /// Share of busy time that no container is credited with.
    pub unattributed_ratio: f64,
    /// Busy time less the driver's own, as a share of the latter.
    pub busy_off_ratio: f64,
    /// Error of the greater of the two users of each shared GPU; the other's has the opposite sign.
    pub errors: Vec<ShareError>,
    pub calls_a_second: f64,
    /// Share of one processor, for all GPUs: the whole agent, including the simulated driver, which runs in its process.
    pub cpu_ratio: f64,
    /// Share of time in calls, the mean of the GPUs.
    pub wait_ratio: f64,
}

/// Error of one user's seconds.
#[derive(Clone, Copy, Debug)]
pub struct ShareError {
    /// Estimated less true.
    pub off: f64,
    /// One standard error.
    pub stated: f64,
    pub real: f64,
}

impl ShareError {
    /// Whether the error is within `k` stated errors, which do not include the driver's rounding to whole percents.
    pub fn is_within(&self, k: f64) -> bool {
        self.off.abs() <= k * self.stated + 0.05
    }
}

/// The root mean square.
pub fn rms(errors: &[ShareError], value: impl Fn(&ShareError) -> f64) -> f64 {
    (errors.iter().map(|error| value(error).powi(2)).sum::<f64>() / errors.len().max(1) as f64).sqrt()
}

fn world(cell: &Cell) -> String {
    let mut toml =
        format!("seed = {}\ncall_us = {}\nlist_us = {}\none_lock = {}\n", cell.seed, cell.call_us, cell.call_us, cell.one_lock);
    for gpu in 0..cell.gpus {
        let rule = if gpu % 2 == 0 { "instant" } else { "last" };
        // Writing to a String cannot fail.
        let _ok = writeln!(toml, "[[gpus]]\npid_rule = '{rule}'");
    }
    toml
}

/// Runs one world; `args` set the agent's budgets.
pub fn run(cell: Cell, args: &[&str]) -> Result<Outcome> {
    let sim = Sim::new(&world(&cell))?;
    let tree = CgroupTree::new(&format!("latency-{}-{}", cell.call_us, cell.gpus))?;
    let mut users = Vec::new();
    for gpu in 0..cell.gpus {
        for demand in DEMANDS[gpu % DEMANDS.len()] {
            let (id, dir) = tree.container(users.len())?;
            let process = Running(std::process::Command::new("sleep").arg("3600").spawn()?);
            attach(process.0.id(), &dir)?;
            users.push((gpu, *demand, id, process));
        }
    }
    let agent = Agent::start(Some(&sim), &[&["--kernel-mode", "raw_tracepoint"], args].concat())?;
    crate::wait_for("the GPUs are found", Duration::from_secs(60), || {
        let page = agent.scrape()?;
        let found = page.iter().filter(|s| s.name == "gpu_sampler_sample_period_seconds").count();
        Ok((found == cell.gpus).then_some(()))
    })?;
    let before = agent.scrape()?;
    let cpu_seconds = || Ok::<_, anyhow::Error>(processor_time(agent.process.0.id()).context("the agent's processor time")?.own);
    let (from, cpu) = (Instant::now(), cpu_seconds()?);
    let lasts = format!("{}s", cell.seconds);
    let loads: Result<Vec<Running>> =
        users.iter().map(|(gpu, demand, _, process)| sim.load(process.0.id(), *gpu, *demand, &["--for", &lasts])).collect();
    for load in &mut loads? {
        load.0.wait()?;
    }
    let (over, during) = (from.elapsed().as_secs_f64(), agent.scrape()?);
    let cpu_ratio = (cpu_seconds()? - cpu) / over;
    std::thread::sleep(SETTLED);
    agent.scrape()?;
    let page = agent.scrape()?;
    let mut outcome = compare(&sim, &page, &users)?;
    let grown = |page: &[Sample], name: &str, labels: &[(&str, &str)]| {
        let value = |page: &[Sample]| sum(page, name, labels).with_context(|| format!("no series {name} {labels:?}"));
        anyhow::Ok(value(page)? - value(&before)?)
    };
    let unobserved = grown(&page, "gpu_time_seconds_total", &[("state", "unobserved")])?;
    outcome.unobserved_ratio = unobserved / (over + SETTLED.as_secs_f64()) / cell.gpus as f64;
    outcome.queried_ratio =
        grown(&page, "gpu_sampler_queried_samples_total", &[])? / grown(&page, "gpu_sampler_samples_total", &[])?.max(1.0);
    outcome.calls_a_second = grown(&during, "gpu_sampler_nvml_call_seconds_count", &[])? / over;
    outcome.wait_ratio = grown(&during, "gpu_sampler_nvml_call_seconds_sum", &[])? / over / cell.gpus as f64;
    outcome.cpu_ratio = cpu_ratio;
    Ok(outcome)
}

fn compare(sim: &Sim, page: &[Sample], users: &[(usize, f64, String, Running)]) -> Result<Outcome> {
    let truth = sim.truth(&[])?;
    let (mut outcome, mut busy, mut real_busy, mut unattributed) = (Outcome::default(), 0.0, 0.0, 0.0);
    for (gpu, demands) in (0..).zip(DEMANDS.iter().cycle().take(truth["gpus"].as_array().context("gpus")?.len())) {
        let true_gpu = &truth["gpus"][gpu];
        let uuid = true_gpu["uuid"].as_str().context("uuid")?;
        real_busy += true_gpu["busy_seconds"].as_f64().context("busy")?;
        busy += sum(page, "gpu_time_seconds_total", &[("uuid", uuid), ("state", "busy")]).unwrap_or_default();
        unattributed += sum(page, "gpu_unattributed_seconds_total", &[("uuid", uuid)]).unwrap_or_default();
        for (_, _, id, process) in users.iter().filter(|(on, ..)| *on == gpu).take(1).filter(|_| demands.len() > 1) {
            let pid = process.0.id();
            let own = true_gpu["processes"].as_array().context("processes")?.iter().find(|p| p["pid"] == pid);
            let real = own.and_then(|p| p["gpu_seconds"].as_f64()).context("true seconds of a load")?;
            let labels = [("uuid", uuid), ("container_id", id.as_str())];
            let got = sum(page, "container_gpu_seconds_total", &labels).unwrap_or_default();
            let stated = sum(page, "container_gpu_seconds_stderr", &labels).unwrap_or_default();
            outcome.errors.push(ShareError { off: got - real, stated, real });
        }
    }
    outcome.unattributed_ratio = unattributed / busy;
    outcome.busy_off_ratio = (busy - real_busy) / real_busy;
    Ok(outcome)
}
