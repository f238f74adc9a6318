//! Processes launched as container runtimes do it (forked outside, moved into the container's cgroup, exec'd) that use their GPU from the
//! exec on: every sample that names one is credited to its container, however short the process runs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{CgroupTree, Layout};
use gpu_sampler_tests::oci::Oci;
use gpu_sampler_tests::record::{NamedSample, RecordedLife, Samples, assert_same, credited, expected};
use gpu_sampler_tests::{Agent, Sample, Sim, sum};

/// Every sample has to be queried, on a machine that is busy with other things.
const ARGS: [&str; 4] = ["--kernel-mode", "raw_tracepoint", "--gpu-budget-percent", "50"];
/// The period of most boards, and the simulator's default.
const PERIOD_US: u64 = 167_139;
/// Lifetime, concurrent processes, and processes in about 20 s; one kind per GPU.
const KINDS: [(&str, &str, &str); 6] = [
    ("100ms..100ms", "1", "150"),
    ("100ms..100ms", "4", "400"),
    ("300ms..300ms", "1", "60"),
    ("300ms..300ms", "4", "220"),
    ("2s..2s", "1", "10"),
    ("2s..2s", "4", "40"),
];
/// Largest share of busy time without a process that could be named.
const NO_PID_RATIO: f64 = 0.02;
/// Reasons for time outside containers that must not occur.
const REASONS: [&str; 6] = ["invalid_pid", "pid_unknown", "host", "mps", "ambiguous", "lost"];

/// Waits until everything recorded has been served, attributed and exported.
fn final_page(agent: &Agent) -> Result<Vec<Sample>> {
    std::thread::sleep(Duration::from_secs(12));
    agent.scrape()?;
    agent.scrape()
}

fn print_credited(title: &str, uuid: &str, got: &Samples, want: &Samples) {
    let on_gpu = |samples: &Samples| samples.iter().filter(|((_, on), _)| on == uuid).map(|(_, n)| n).sum::<u64>();
    let (got, want) = (on_gpu(got), on_gpu(want));
    println!("{title}: {got} of {want} samples credited, {:.0} %", 100.0 * got as f64 / want as f64);
}

fn launches(layout: Layout, tree: &CgroupTree) -> Result<()> {
    let rule = |gpu| if gpu % 4 == 0 || gpu % 4 == 3 { "instant" } else { "last" };
    let gpus: String = (0..KINDS.len()).map(|gpu| format!("[[gpus]]\npid_rule = '{}'\n", rule(gpu))).collect();
    let sim = Sim::new(&format!("seed = 17\nperiod_us = {PERIOD_US}\n{gpus}"))?;
    let containers = (0..24).map(|n| tree.container(n)).collect::<Result<Vec<_>>>()?;
    let agent = Agent::start_in(layout, Some(&sim), &ARGS)?;
    // The first read of the driver's rings only sets the watermarks.
    std::thread::sleep(Duration::from_secs(1));
    let dirs: Vec<&Path> = containers.iter().map(|(_, dir)| dir.as_path()).collect();
    let start = |(gpu, (lasting, at_once, count)): (usize, &(&str, &str, &str))| {
        let gpu = gpu.to_string();
        let args = ["--launch", "0ms..20ms", "--lasting", lasting, "--at-once", at_once, "--count", count];
        sim.lives(&dirs, &[&args[..], &["--gpus", &gpu, "--seed", &gpu]].concat())
    };
    let running = KINDS.iter().enumerate().map(start).collect::<Result<Vec<_>>>()?;
    let mut lives: Vec<RecordedLife> = Vec::new();
    for each in running {
        lives.extend(each.all()?);
    }
    let page = final_page(&agent)?;

    let samples: Vec<NamedSample> = sim.samples()?;
    let (got, want) = (credited(&page), expected(&lives, &samples, PERIOD_US)?);
    for (gpu, (lasting, at_once, _)) in KINDS.iter().enumerate() {
        if let Some(sample) = samples.iter().find(|sample| sample.gpu == gpu) {
            print_credited(&format!("{layout:?}, {at_once} at once for {lasting}"), &sample.uuid, &got, &want);
            let value = |name: &str, key: &str, value: &str| sum(&page, name, &[("uuid", &sample.uuid), (key, value)]);
            let no_pid = value("gpu_unattributed_seconds_total", "reason", "no_pid").context("seconds of no_pid")?;
            let busy = value("gpu_time_seconds_total", "state", "busy").context("busy seconds")?;
            println!("  no_pid: {no_pid:.2} s of {busy:.2} s busy, {:.1} %", 100.0 * no_pid / busy);
            assert!(no_pid <= NO_PID_RATIO * busy, "no_pid: {no_pid} s of {busy} s busy");
        }
    }
    assert_all_credited(&page, &got, &want);
    Ok(())
}

fn assert_all_credited(page: &[Sample], got: &Samples, want: &Samples) {
    for reason in REASONS {
        let seconds = sum(page, "gpu_unattributed_seconds_total", &[("reason", reason)]).unwrap_or(f64::NAN);
        assert_eq!(seconds, 0.0, "{reason}");
    }
    assert_same(page, got, want);
}

#[test]
fn launched_processes_are_credited_from_their_exec_on() -> Result<()> {
    launches(Layout::Machine, &CgroupTree::new("launches")?)
}

#[test]
fn launched_processes_are_credited_from_their_exec_on_with_cgroup_v2_alone() -> Result<()> {
    launches(Layout::PureV2, &CgroupTree::new("launches-v2")?)
}

#[test]
fn launched_processes_are_credited_from_their_exec_on_with_cgroup_v1() -> Result<()> {
    launches(Layout::Machine, &CgroupTree::v1("launches-v1")?)
}

/// Three ways in which engines let a runtime start a process, each on a GPU of its own, at the same time.
fn runtimes(runtime: &str, layout: Layout) -> Result<()> {
    const LIVES: usize = 16;
    let sim = Sim::new(&format!("seed = 19\nperiod_us = {PERIOD_US}\n[[gpus]]\n[[gpus]]\n[[gpus]]\npid_rule = 'last'"))?;
    let oci = Oci::new(runtime, layout, &sim)?;
    let agent = Agent::start_in(layout, Some(&sim), &ARGS)?;
    let waits = oci.wait(0)?;
    std::thread::sleep(Duration::from_secs(1));
    let lasting = |n: usize| if n.is_multiple_of(2) { "100ms" } else { "300ms" };
    let run = |n: usize| oci.run(1 + n, 0, &oci.work(0, lasting(n))?);
    let start = |n: usize| oci.create_and_start(1 + LIVES + n, 1, &oci.work(1, lasting(n))?);
    let exec = |n: usize| oci.exec(&waits, 2, &oci.work(2, lasting(n))?);
    let ways: [&(dyn Fn(usize) -> Result<RecordedLife> + Sync); 3] = [&run, &start, &exec];
    let lives: Vec<RecordedLife> = std::thread::scope(|scope| {
        let threads = ways.map(|way| scope.spawn(move || (0..LIVES).map(way).collect::<Result<Vec<_>>>()));
        let lived = threads.map(|thread| thread.join().expect("the launching thread does not panic"));
        lived.into_iter().collect::<Result<Vec<_>>>().map(|lives| lives.concat())
    })?;
    oci.delete(&waits)?;
    let page = final_page(&agent)?;

    let samples = sim.samples()?;
    let (got, want) = (credited(&page), expected(&lives, &samples, PERIOD_US)?);
    for (gpu, way) in ["run", "create and start", "exec"].iter().enumerate() {
        let sample = samples.iter().find(|sample| sample.gpu == gpu).context("no sample was recorded")?;
        print_credited(&format!("{runtime} {way}, {layout:?}"), &sample.uuid, &got, &want);
    }
    assert!(samples.len() >= 2 * LIVES, "only {} samples were recorded", samples.len());
    assert_all_credited(&page, &got, &want);
    Ok(())
}

#[test]
fn containers_of_runc_are_credited_from_their_exec_on() -> Result<()> {
    [Layout::Machine, Layout::PureV1, Layout::PureV2].into_iter().try_for_each(|layout| runtimes("runc", layout))
}

/// crun rejects a v2 hierarchy with controllers next to v1.
#[test]
fn containers_of_crun_are_credited_from_their_exec_on() -> Result<()> {
    [Layout::PureV1, Layout::PureV2].into_iter().try_for_each(|layout| runtimes("crun", layout))
}
