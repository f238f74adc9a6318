//! Processes that are gone before the driver reports them, and pids that are used again: every recorded sample against every
//! credited one.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use gpu_sampler_tests::kernel::{CgroupTree, Layout};
use gpu_sampler_tests::record::{NamedSample, RecordedLife, assert_same, credited, expected, id_of, owner};
use gpu_sampler_tests::{Agent, Sample, Sim, sum};

/// Every sample is wanted, on a machine that is busy with other things; the budget has a test of its own.
const ARGS: [&str; 4] = ["--kernel-mode", "raw_tracepoint", "--gpu-budget-percent", "50"];
const PERIOD_US: u64 = 100_000;
/// Longer than any process lives, so none is there any more when its sample is served.
const DELAY_US: u64 = 60_000;
/// Half of the GPUs name who was on the engine at the sample's instant, half who was last within its period.
const GPUS: usize = 8;

fn world(seed: u64) -> Result<Sim> {
    let rule = |gpu| if gpu < GPUS / 2 { "instant" } else { "last" };
    let gpus: String = (0..GPUS).map(|gpu| format!("[[gpus]]\npid_rule = '{}'\n", rule(gpu))).collect();
    Sim::new(&format!("seed = {seed}\nperiod_us = {PERIOD_US}\ndelay_us = {DELAY_US}\n{gpus}"))
}

/// When everything recorded has been served, attributed and shown.
fn final_page(agent: &Agent) -> Result<Vec<Sample>> {
    // The last window of the ledger closes 10 s after it began at most.
    std::thread::sleep(Duration::from_secs(12));
    agent.scrape()?;
    agent.scrape()
}

fn unattributed(page: &[Sample], reason: &str) -> f64 {
    sum(page, "gpu_unattributed_seconds_total", &[("reason", reason)]).unwrap_or(f64::NAN)
}

fn every_sample(layout: Layout) -> Result<()> {
    let sim = world(7)?;
    let tree = CgroupTree::new("lives")?;
    let containers = (0..50).map(|n| tree.container(n)).collect::<Result<Vec<_>>>()?;
    let agent = Agent::start_in(layout, Some(&sim), &ARGS)?;
    // The first read of the driver's rings only sets the watermarks.
    std::thread::sleep(Duration::from_secs(1));
    let dirs: Vec<&Path> = containers.iter().map(|(_, dir)| dir.as_path()).collect();
    let lives = sim.lives(&dirs, &["--count", "10000", "--at-once", "12", "--lasting", "5ms..50ms"])?.all()?;
    assert_eq!(lives.len(), 10_000);
    let page = final_page(&agent)?;

    let ticks = sim.ticks()?;
    let gone_before_served = |t: &&NamedSample| owner(&lives, t, PERIOD_US).is_some_and(|l| l.gone_us < t.at_us + DELAY_US);
    let gone = ticks.iter().filter(gone_before_served).count();
    println!("{layout:?}: {} samples recorded, {gone} of them of processes that were gone when they were served", ticks.len());
    assert!(gone >= 200, "only {gone} of {} samples were of processes gone before the poll", ticks.len());
    assert_same(&page, &credited(&page), &expected(&lives, &ticks, PERIOD_US)?);
    for reason in ["invalid_pid", "pid_unknown", "host", "mps", "ambiguous", "lost"] {
        assert_eq!(unattributed(&page, reason), 0.0, "{reason}");
    }
    Ok(())
}

#[test]
fn every_sample_of_ten_thousand_short_lives_is_on_its_container() -> Result<()> {
    every_sample(Layout::Machine)
}

#[test]
fn every_sample_of_ten_thousand_short_lives_is_on_its_container_on_cgroup_v2_alone() -> Result<()> {
    every_sample(Layout::PureV2)
}

#[test]
fn a_pid_used_again_never_leads_to_the_wrong_owner() -> Result<()> {
    let sim = world(11)?;
    let tree = CgroupTree::new("reuse")?;
    let containers = (0..50).map(|n| tree.container(n)).collect::<Result<Vec<_>>>()?;
    let agent = Agent::start(Some(&sim), &ARGS)?;
    std::thread::sleep(Duration::from_secs(1));
    let dirs: Vec<&Path> = containers.iter().map(|(_, dir)| dir.as_path()).collect();
    let lives = sim.lives(&dirs, &["--count", "40", "--reuse-pid", "--lasting", "300ms..600ms"])?.all()?;
    let handed_on =
        |pair: &&[RecordedLife]| pair[0].pid == pair[1].pid && pair[0].cgroup != pair[1].cgroup && pair[0].gpu != pair[1].gpu;
    let reuses = lives.windows(2).filter(handed_on).count();
    assert!(reuses >= 20, "the host pid was used again by another container on another GPU only {reuses} times");
    let page = final_page(&agent)?;

    // Each GPU named the pid while one life was on it: a sample that went to the life before or after is on a pair of container
    // and GPU that never was. Close to the change of owner, within what the clocks leave open, "ambiguous" is the right answer.
    let ticks = sim.ticks()?;
    let (got, want) = (credited(&page), expected(&lives, &ticks, PERIOD_US)?);
    for (pair, n) in &got {
        assert!(want.get(pair).is_some_and(|most| n <= most), "{pair:?}: {n} credited, {:?} recorded", want.get(pair));
    }
    let (credited, recorded): (u64, u64) = (got.values().sum(), want.values().sum());
    println!("{reuses} reuses by another: {credited} of {recorded} samples credited, the others ambiguous");
    assert!(credited >= recorded / 2, "{credited} of {recorded}: nearly everything is ambiguous");
    for reason in ["invalid_pid", "pid_unknown", "host", "lost"] {
        assert_eq!(unattributed(&page, reason), 0.0, "{reason}");
    }
    Ok(())
}

#[test]
fn killed_and_restarted_under_load_it_attributes_again_and_counts_nothing_twice() -> Result<()> {
    let sim = world(13)?;
    let tree = CgroupTree::new("restart")?;
    let containers = (0..50).map(|n| tree.container(n)).collect::<Result<Vec<_>>>()?;
    let dirs: Vec<&Path> = containers.iter().map(|(_, dir)| dir.as_path()).collect();
    let mut first = Agent::start(Some(&sim), &ARGS)?;
    std::thread::sleep(Duration::from_secs(1));
    let lives = sim.lives(&dirs, &["--count", "8000", "--at-once", "12", "--lasting", "5ms..50ms"])?;
    // The last window of the ledger must have closed once.
    std::thread::sleep(Duration::from_secs(13));
    first.scrape()?;
    let before = credited(&first.scrape()?);
    first.process.ends_with(libc::SIGKILL)?;
    let second = Agent::start(Some(&sim), &ARGS)?;
    let started_us = now_us();
    std::thread::sleep(Duration::from_secs(3));
    let early = second.scrape()?;
    let lives = lives.all()?;
    let page = final_page(&second)?;

    let ticks = sim.ticks()?;
    let (after, record) = (credited(&page), expected(&lives, &ticks, PERIOD_US)?);
    for pair in before.keys().chain(after.keys()) {
        let both = before.get(pair).unwrap_or(&0) + after.get(pair).unwrap_or(&0);
        assert!(record.get(pair).is_some_and(|n| both <= *n), "{pair:?}: {both} credited, {:?} recorded", record.get(pair));
    }
    // From a second after the start on, with what the driver holds back: nothing is missing.
    let late: Vec<NamedSample> = ticks.into_iter().filter(|t| t.at_us >= started_us + 1_000_000).collect();
    let late = expected(&lives, &late, PERIOD_US)?;
    assert!(late.values().sum::<u64>() >= 200, "the load ended too early to tell: {} samples", late.values().sum::<u64>());
    for (pair, n) in &late {
        assert!(after.get(pair).is_some_and(|got| got >= n), "{pair:?}: {n} since the restart, {:?} credited", after.get(pair));
    }
    for reason in ["pid_unknown", "ambiguous", "lost", "host"] {
        assert_eq!(unattributed(&page, reason), unattributed(&early, reason), "{reason} has grown since the start");
    }
    let known: Vec<String> = dirs.iter().map(|d| id_of(&d.to_string_lossy())).collect();
    assert!(after.keys().all(|(id, _)| known.contains(id)));
    Ok(())
}

fn now_us() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}
