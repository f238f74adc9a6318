//! Processes that have ended before the driver reports them, and PIDs that are reused: every recorded sample against every credited one.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use gpu_sampler_tests::kernel::{CgroupTree, Layout};
use gpu_sampler_tests::record::{NamedSample, RecordedLife, RecordedProcesses, assert_same, credited, expected, id_of};
use gpu_sampler_tests::{Agent, Sample, Sim, sum};

/// Every sample has to be queried, on a machine that is busy with other things; the budget has a test of its own.
const ARGS: [&str; 4] = ["--kernel-mode", "raw_tracepoint", "--gpu-budget-percent", "50"];
const PERIOD_US: u64 = 100_000;
/// Longer than any process lives, so every process has ended when its sample is served.
const DELAY_US: u64 = 60_000;
/// Half of the GPUs name the process on the engine at the sample's instant, half the last one within its period.
const GPUS: usize = 8;

fn world(seed: u64) -> Result<Sim> {
    let rule = |gpu| if gpu < GPUS / 2 { "instant" } else { "last" };
    let gpus: String = (0..GPUS).map(|gpu| format!("[[gpus]]\npid_rule = '{}'\n", rule(gpu))).collect();
    Sim::new(&format!("seed = {seed}\nperiod_us = {PERIOD_US}\ndelay_us = {DELAY_US}\n{gpus}"))
}

/// Waits until everything recorded has been served, attributed and exported.
fn final_page(agent: &Agent) -> Result<Vec<Sample>> {
    // The last window closes at most 10 s after it began.
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

    let samples = sim.samples()?;
    let processes = RecordedProcesses::new(&lives, PERIOD_US);
    let gone_before_served = |t: &&NamedSample| processes.owner(t).is_some_and(|l| l.gone_us < t.at_us + DELAY_US);
    let gone = samples.iter().filter(gone_before_served).count();
    println!("{layout:?}: {} samples recorded, {gone} of them of processes that had ended when they were served", samples.len());
    assert!(gone >= 200, "only {gone} of {} samples were of processes that ended before the poll", samples.len());
    assert_same(&page, &credited(&page), &expected(&lives, &samples, PERIOD_US)?);
    for reason in ["invalid_pid", "pid_unknown", "host", "mps", "ambiguous", "lost"] {
        assert_eq!(unattributed(&page, reason), 0.0, "{reason}");
    }
    Ok(())
}

#[test]
fn every_sample_of_ten_thousand_short_processes_is_credited_to_its_container() -> Result<()> {
    every_sample(Layout::Machine)
}

#[test]
fn every_sample_of_ten_thousand_short_processes_is_credited_on_cgroup_v2_alone() -> Result<()> {
    every_sample(Layout::PureV2)
}

#[test]
fn a_reused_pid_never_leads_to_the_wrong_user() -> Result<()> {
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
    assert!(reuses >= 20, "the host pid was reused by another container on another GPU only {reuses} times");
    let page = final_page(&agent)?;

    // Each GPU named the PID while one process was on it: a sample credited to the process before or after is on a pair of container
    // and GPU that never existed. Close to the change of process, within the clocks' uncertainty, "ambiguous" is the right result.
    let samples = sim.samples()?;
    let (got, want) = (credited(&page), expected(&lives, &samples, PERIOD_US)?);
    for (pair, n) in &got {
        assert!(want.get(pair).is_some_and(|most| n <= most), "{pair:?}: {n} credited, {:?} recorded", want.get(pair));
    }
    let (credited, recorded): (u64, u64) = (got.values().sum(), want.values().sum());
    println!("{reuses} reuses by another: {credited} of {recorded} samples credited, the others ambiguous");
    assert!(credited >= recorded / 3, "{credited} of {recorded}: nearly everything is ambiguous");
    for reason in ["invalid_pid", "pid_unknown", "host", "lost"] {
        assert_eq!(unattributed(&page, reason), 0.0, "{reason}");
    }
    Ok(())
}

#[test]
fn a_killed_and_restarted_agent_attributes_again_and_credits_nothing_twice() -> Result<()> {
    let sim = world(13)?;
    let tree = CgroupTree::new("restart")?;
    let containers = (0..50).map(|n| tree.container(n)).collect::<Result<Vec<_>>>()?;
    let dirs: Vec<&Path> = containers.iter().map(|(_, dir)| dir.as_path()).collect();
    let mut first = Agent::start(Some(&sim), &ARGS)?;
    std::thread::sleep(Duration::from_secs(1));
    // On a quick machine for 27 s, so that it goes on for some seconds after the restart.
    let lives = sim.lives(&dirs, &["--count", "12000", "--at-once", "12", "--lasting", "5ms..50ms"])?;
    // Until the last window has closed once.
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

    let samples = sim.samples()?;
    let (after, record) = (credited(&page), expected(&lives, &samples, PERIOD_US)?);
    for pair in before.keys().chain(after.keys()) {
        let both = before.get(pair).unwrap_or(&0) + after.get(pair).unwrap_or(&0);
        assert!(record.get(pair).is_some_and(|n| both <= *n), "{pair:?}: {both} credited, {:?} recorded", record.get(pair));
    }
    // From one second after the start on, allowing for what the driver holds back, nothing may be missing.
    let late: Vec<NamedSample> = samples.into_iter().filter(|t| t.at_us >= started_us + 1_000_000).collect();
    let late = expected(&lives, &late, PERIOD_US)?;
    assert!(late.values().sum::<u64>() >= 200, "the load ended too early to judge: {} samples", late.values().sum::<u64>());
    for (pair, n) in &late {
        assert!(after.get(pair).is_some_and(|got| got >= n), "{pair:?}: {n} since the restart, {:?} credited", after.get(pair));
    }
    for reason in ["pid_unknown", "ambiguous", "lost", "host"] {
        // Less than two samples: one kernel event may be lost on a busy machine.
        let grown = unattributed(&page, reason) - unattributed(&early, reason);
        assert!(grown < 0.2, "{reason} has grown by {grown} s since the start: {}", shown(&early, &page, reason));
    }
    let known: Vec<String> = dirs.iter().map(|d| id_of(&d.to_string_lossy())).collect();
    assert!(after.keys().all(|(id, _)| known.contains(id)));
    Ok(())
}

/// What a failure is judged by: the growth of each GPU, and lost kernel events.
fn shown(early: &[Sample], page: &[Sample], reason: &str) -> String {
    let of = |page: &[Sample], uuid: &str| sum(page, "gpu_unattributed_seconds_total", &[("reason", reason), ("uuid", uuid)]);
    let gpus = page.iter().filter(|s| s.name == "gpu_info").map(|s| &*s.labels["uuid"]);
    let grown: Vec<f64> = gpus.map(|uuid| of(page, uuid).unwrap_or_default() - of(early, uuid).unwrap_or_default()).collect();
    let [lost, lost_early] = [page, early].map(|page| sum(page, "gpu_sampler_kernel_events_lost_total", &[]));
    format!("by GPU {grown:.2?}; {lost:?} kernel events were lost, {lost_early:?} before")
}

fn now_us() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}
