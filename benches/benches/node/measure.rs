//! What one process costs: processor time by thread, memory, and the scrapes of its page.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use devkit::process::processor_time;
use gpu_sampler_benches::quantile;
use gpu_sampler_tests::{Agent, parse};

use crate::world::World;

const SCRAPES: u32 = 100;
/// More often than scrapers do: what the agent spends without scrapes varies by some milliseconds a second.
const INTERVAL: Duration = Duration::from_millis(200);

/// Seconds by thread name; threads that differ only in a number count as one name.
pub type ThreadTimes = BTreeMap<String, f64>;

/// Processor time of the agent so far, in seconds.
pub struct Spent {
    at: Instant,
    /// Also of threads that have ended, as those of the IO runtime do when they are idle; without the simulated driver's.
    pub all: f64,
    pub driver: f64,
    /// Of the living threads, with the simulated driver's.
    pub threads: ThreadTimes,
}

impl Spent {
    pub fn now(agent: &Agent, world: &World) -> Result<Self> {
        let (pid, driver) = (agent.process.0.id(), world.driver_seconds()?);
        let all = processor_time(pid).with_context(|| format!("processor time of process {pid}"))?.own - driver;
        Ok(Self { at: Instant::now(), all, driver, threads: thread_times(pid)? })
    }

    pub fn of_thread(&self, name: &str) -> f64 {
        self.threads.get(name).copied().unwrap_or_default()
    }

    pub fn seconds_until(&self, later: &Self) -> f64 {
        (later.at - self.at).as_secs_f64()
    }

    /// Processor time in a second, of what `of` selects.
    pub fn rate_until(&self, later: &Self, of: impl Fn(&Self) -> f64) -> f64 {
        (of(later) - of(self)) / self.seconds_until(later)
    }
}

/// Processor time of the living threads so far. The kernel counts it in nanoseconds.
fn thread_times(pid: u32) -> Result<ThreadTimes> {
    let mut times = ThreadTimes::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // A thread may end meanwhile.
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let (name, time) = (read("comm"), read("schedstat"));
        let Some(ns) = time.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()) else { continue };
        let name = name.trim().trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches(['-', '.', ':']);
        *times.entry(name.to_owned()).or_default() += ns / 1e9;
    }
    Ok(times)
}

/// Resident memory of the process, in MiB.
pub struct Memory {
    pub all: f64,
    /// The program and libraries, of which the system drops what is not used.
    pub code: f64,
    /// Rings of kernel events. The kernel maps their records twice, and both mappings count.
    pub rings: f64,
    /// Tables, histograms, kept text, stacks.
    pub own: f64,
}

impl Memory {
    pub fn of(pid: u32) -> Result<Self> {
        let mut memory = Self { all: 0.0, code: 0.0, rings: 0.0, own: 0.0 };
        let mut name = String::new();
        for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["Rss:", kib, "kB"] => {
                    let mib = kib.parse::<f64>()? / 1024.0;
                    memory.all += mib;
                    match &*name {
                        rings if rings.contains("bpf") => memory.rings += mib,
                        file if file.starts_with('/') => memory.code += mib,
                        _ => memory.own += mib,
                    }
                }
                [range, _, _, _, _, path @ ..] if range.contains('-') => name = path.concat(),
                _ => {}
            }
        }
        Ok(memory)
    }
}

/// The page as a scraper gets it.
pub struct PageSize {
    /// As on a node: without what the bench has before its cgroup paths.
    pub bytes: usize,
    pub series: usize,
    /// Series about the agent itself.
    pub own_series: usize,
    /// (container, GPU) pairs.
    pub pairs: usize,
    /// Series of containers and GPUs.
    pub pair_series: usize,
    /// Of the tables of processes and cgroups, as the agent reports them.
    pub table_bytes: f64,
}

pub fn page(agent: &Agent, world: &World) -> Result<PageSize> {
    let text = agent.page()?.replace(&world.path_prefix(), "");
    let samples = parse(&text);
    let tables = samples.iter().filter(|sample| sample.name == "gpu_sampler_identity_bytes");
    let count = |is: &dyn Fn(&str) -> bool| samples.iter().filter(|sample| is(&sample.name)).count();
    Ok(PageSize {
        bytes: text.len(),
        series: samples.len(),
        own_series: count(&|name| name.starts_with("gpu_sampler_")),
        pairs: count(&|name| name == "container_gpu_seconds_total"),
        pair_series: count(&|name| name.starts_with("container_") && name != "container_gpu_info"),
        table_bytes: tables.map(|sample| sample.value).sum(),
    })
}

/// The cost of a scrape, in milliseconds.
pub struct ScrapeCost {
    pub p50: f64,
    pub p99: f64,
    /// Processor time of the agent beyond what it spends without scrapes.
    pub cpu: f64,
}

/// `quiet` is the agent's percentage of a processor without scrapes.
pub fn scrapes(agent: &Agent, world: &World, quiet: f64) -> Result<ScrapeCost> {
    let (from, before) = (Instant::now(), Spent::now(agent, world)?);
    let mut took = Vec::new();
    for n in 1..=SCRAPES {
        let begun = Instant::now();
        agent.page()?;
        took.push(begun.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep((INTERVAL * n).saturating_sub(from.elapsed()));
    }
    let after = Spent::now(agent, world)?;
    let spent = after.all - before.all - before.seconds_until(&after) * quiet / 100.0;
    took.sort_by(f64::total_cmp);
    Ok(ScrapeCost { p50: quantile(&took, 0.5), p99: quantile(&took, 0.99), cpu: spent * 1e3 / f64::from(SCRAPES) })
}
