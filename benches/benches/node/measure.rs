//! What one process costs: processor time by thread, memory, and the scrapes of its page.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use devkit::process::processor_time;
use gpu_sampler_benches::quantile;
use gpu_sampler_tests::{Agent, parse};

const SCRAPES: u32 = 30;
const INTERVAL: Duration = Duration::from_secs(1);

/// Seconds by thread name; threads that differ only in a number count as one name.
pub type ThreadTimes = BTreeMap<String, f64>;

/// Processor time of the process so far, in seconds, also of its threads that have ended: those of the IO runtime do when they are idle.
pub fn processor_seconds(pid: u32) -> Result<f64> {
    Ok(processor_time(pid).with_context(|| format!("processor time of process {pid}"))?.own)
}

/// Processor time of the living threads so far. The kernel counts it in nanoseconds.
pub fn thread_times(pid: u32) -> Result<ThreadTimes> {
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

/// Percent of one processor over `lasts`: by thread name, the largest first, and of the process.
pub fn load(pid: u32, lasts: Duration) -> Result<(Vec<(String, f64)>, f64)> {
    let (from, before, all_before) = (Instant::now(), thread_times(pid)?, processor_seconds(pid)?);
    std::thread::sleep(lasts);
    let (after, over) = (thread_times(pid)?, from.elapsed().as_secs_f64());
    let percent = |(name, time): (String, f64)| {
        let grown = time - before.get(&name).copied().unwrap_or_default();
        (name, 100.0 * grown / over)
    };
    let mut threads: Vec<(String, f64)> = after.into_iter().map(percent).collect();
    threads.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok((threads, 100.0 * (processor_seconds(pid)? - all_before) / over))
}

/// Memory of the process in MiB: resident, and the part of it that is not of files.
pub fn memory(pid: u32) -> Result<(f64, f64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mib = |key: &str| {
        let kib = status.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
        kib.map(|kib| kib / 1024.0).with_context(|| format!("{key} in /proc/{pid}/status"))
    };
    Ok((mib("VmRSS:")?, mib("RssAnon:")?))
}

/// The page as a scraper gets it.
pub struct PageSize {
    pub bytes: usize,
    pub series: usize,
    /// Series about the agent itself.
    pub own_series: usize,
    /// (container, GPU) pairs.
    pub pairs: usize,
    /// Series of containers and GPUs.
    pub pair_series: usize,
}

pub fn page(agent: &Agent) -> Result<PageSize> {
    let text = agent.page()?;
    let samples = parse(&text);
    let count = |is: &dyn Fn(&str) -> bool| samples.iter().filter(|sample| is(&sample.name)).count();
    Ok(PageSize {
        bytes: text.len(),
        series: samples.len(),
        own_series: count(&|name| name.starts_with("gpu_sampler_")),
        pairs: count(&|name| name == "container_gpu_seconds_total"),
        pair_series: count(&|name| name.starts_with("container_") && name != "container_gpu_info"),
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
pub fn scrapes(agent: &Agent, quiet: f64) -> Result<ScrapeCost> {
    let pid = agent.process.0.id();
    let (from, before) = (Instant::now(), processor_seconds(pid)?);
    let mut took = Vec::new();
    for n in 1..=SCRAPES {
        let begun = Instant::now();
        agent.page()?;
        took.push(begun.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep((INTERVAL * n).saturating_sub(from.elapsed()));
    }
    let spent = processor_seconds(pid)? - before - from.elapsed().as_secs_f64() * quiet / 100.0;
    took.sort_by(f64::total_cmp);
    Ok(ScrapeCost { p50: quantile(&took, 0.5), p99: quantile(&took, 0.99), cpu: spent * 1e3 / f64::from(SCRAPES) })
}
