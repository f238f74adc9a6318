//! The agent survives its driver: calls that hang, fail, are slow or missing; GPUs that are lost, added and removed; a driver that is
//! replaced. Time without samples is unobserved, never idle, and a fault of one GPU does not affect another.

use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Agent, Running, Sample, Sim, kernel::Layout, sum, wait_for};

const SECOND: Duration = Duration::from_secs(1);
/// No label sources and no kernel events: these tests are about the driver.
const ARGS: [&str; 4] = ["--kernel-mode", "procfs", "--docker-endpoint", "unix:///run/gpu-sampler-tests-none.sock"];
/// Counted time may lag behind the clock by the time that samples wait for their process samples.
const LAG: f64 = 1.5;

fn agent(sim: &Sim, more: &[&str]) -> Result<Agent> {
    let agent = Agent::start(Some(sim), &[&ARGS, more].concat())?;
    wait_for("samples are read", Duration::from_secs(10), || {
        Ok(sum(&agent.scrape()?, "gpu_sampler_sample_period_seconds", &[]).map(|_| ()))
    })?;
    Ok(agent)
}

fn sleeper() -> Result<Running> {
    Ok(Running(Command::new("sleep").arg("300").spawn()?))
}

fn uuid(page: &[Sample], index: usize) -> Option<String> {
    let index = index.to_string();
    let info = page.iter().find(|s| s.name == "gpu_info" && s.labels["index"] == index && !s.labels["uuid"].starts_with("MIG"));
    info.map(|s| s.labels["uuid"].clone())
}

fn uuids(agent: &Agent, n: usize) -> Result<Vec<String>> {
    let page = agent.scrape()?;
    (0..n).map(|index| uuid(&page, index).with_context(|| format!("GPU {index}"))).collect()
}

fn value(page: &[Sample], name: &str, uuid: &str) -> Option<f64> {
    sum(page, name, &[("uuid", uuid)])
}

fn time(page: &[Sample], uuid: &str, state: &str) -> f64 {
    sum(page, "gpu_time_seconds_total", &[("uuid", uuid), ("state", state)]).unwrap_or_default()
}

/// Age of the newest sample, seconds.
fn age(page: &[Sample], uuid: &str) -> Result<f64> {
    let at = value(page, "gpu_sampler_last_sample_timestamp_seconds", uuid).with_context(|| format!("no sample of {uuid}"))?;
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() - at)
}

fn call_seconds(page: &[Sample], uuid: &str) -> f64 {
    value(page, "gpu_sampler_nvml_call_seconds_sum", uuid).unwrap_or_default()
}

#[test]
fn a_hanging_call_on_one_of_eight_gpus_affects_that_gpu_alone() -> Result<()> {
    let sim = Sim::new(&"[[gpus]]\n".repeat(8))?;
    let mut agent = agent(&sim, &[])?;
    let gpus = uuids(&agent, 8)?;
    std::thread::sleep(SECOND);
    sim.inject("fault", &["--gpu", "3", "--kind", "stall", "--for", "5s"])?;
    let (from, mut stalled, mut longest) = (Instant::now(), false, Duration::ZERO);
    while from.elapsed() < Duration::from_millis(4500) {
        let begun = Instant::now();
        let page = agent.scrape()?;
        longest = longest.max(begun.elapsed());
        for (n, gpu) in gpus.iter().enumerate().filter(|(n, _)| *n != 3) {
            ensure!(age(&page, gpu)? < 3.0, "GPU {n}: the newest sample is {} s old", age(&page, gpu)?);
            ensure!(value(&page, "gpu_sampler_nvml_stalled", gpu) == Some(0.0), "GPU {n} is reported as stalled");
        }
        stalled |= value(&page, "gpu_sampler_nvml_stalled", &gpus[3]) == Some(1.0);
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("the longest scrape took {longest:?}");
    ensure!(longest < 3 * SECOND, "a scrape took {longest:?}");
    ensure!(stalled, "the stall was not reported");
    wait_for("GPU 3 is sampled again", Duration::from_secs(5), || {
        let page = agent.scrape()?;
        Ok((age(&page, &gpus[3])? < 1.0 && value(&page, "gpu_sampler_nvml_stalled", &gpus[3]) == Some(0.0)).then_some(()))
    })?;
    std::thread::sleep(SECOND);
    let page = agent.scrape()?;
    let all = |gpu: &str| ["busy", "idle", "unobserved"].iter().map(|state| time(&page, gpu, state)).sum::<f64>();
    for gpu in &gpus {
        ensure!((all(gpu) - all(&gpus[0])).abs() < LAG, "{gpu}: {} s are accounted for, {} s of GPU 0", all(gpu), all(&gpus[0]));
    }
    ensure!(time(&page, &gpus[0], "unobserved") < 1.0, "GPU 0 was not observed all the time");
    ensure!(agent.log()?.contains("has not returned"), "nothing in the log");
    // A hanging call does not keep the agent from ending either.
    sim.inject("fault", &["--gpu", "3", "--kind", "stall", "--for", "60s"])?;
    std::thread::sleep(SECOND);
    let begun = Instant::now();
    agent.process.ends_with(15)?;
    ensure!(begun.elapsed() < Duration::from_secs(8), "the end took {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_lost_gpu_is_found_again_and_the_time_between_is_unobserved() -> Result<()> {
    let sim = Sim::new("[[gpus]]\n[[gpus]]")?;
    let process = sleeper()?;
    let _load = sim.load(process.0.id(), 0, 0.7, &[])?;
    let agent = agent(&sim, &[])?;
    let gpus = uuids(&agent, 2)?;
    std::thread::sleep(SECOND);
    sim.inject("fault", &["--gpu", "0", "--kind", "lost", "--for", "4s"])?;
    std::thread::sleep(Duration::from_millis(1500));
    let (during, since) = (agent.scrape()?, Instant::now());
    let is_sampled = || Ok((age(&agent.scrape()?, &gpus[1])? < 1.0).then_some(()));
    wait_for("the other GPU is sampled meanwhile", Duration::from_secs(2), is_sampled)?;
    std::thread::sleep(Duration::from_secs(2).saturating_sub(since.elapsed()));
    let later = agent.scrape()?;
    for state in ["busy", "idle"] {
        let grown = time(&later, &gpus[0], state) - time(&during, &gpus[0], state);
        ensure!(grown < 0.01, "{grown} s of {state} while it was lost");
    }
    wait_for("the GPU is sampled again", Duration::from_secs(6), || Ok((age(&agent.scrape()?, &gpus[0])? < 0.5).then_some(())))?;
    std::thread::sleep(Duration::from_secs(4));
    let page = agent.scrape()?;
    ensure!(time(&page, &gpus[0], "unobserved") > 3.0, "{} s unobserved", time(&page, &gpus[0], "unobserved"));
    ensure!(time(&page, &gpus[0], "busy") > time(&later, &gpus[0], "busy") + 0.5, "busy time does not grow again");
    let log = agent.log()?;
    ensure!(log.contains("is lost") && log.contains("is back"), "{log}");
    Ok(())
}

#[test]
fn a_burst_of_xids_is_counted_completely_and_logged_once() -> Result<()> {
    let sim = Sim::new("[[gpus]]\n[[gpus]]")?;
    let agent = agent(&sim, &[])?;
    let gpus = uuids(&agent, 2)?;
    std::thread::sleep(Duration::from_millis(1500));
    for _ in 0..2 {
        sim.inject("xid", &["--gpu", "1", "--xid", "79", "--count", "3000"])?;
    }
    sim.inject("xid", &["--gpu", "0", "--xid", "13"])?;
    let count = |page: &[Sample], gpu: usize, xid| sum(page, "gpu_xid_errors_total", &[("uuid", &gpus[gpu]), ("xid", xid)]);
    wait_for("all errors are counted", Duration::from_secs(6), || {
        let page = agent.scrape()?;
        Ok((count(&page, 1, "79") == Some(6000.0) && count(&page, 0, "13") == Some(1.0)).then_some(()))
    })?;
    let page = agent.scrape()?;
    ensure!(count(&page, 0, "79").is_none(), "GPU 0 got GPU 1's errors");
    ensure!(age(&page, &gpus[1])? < 1.0, "samples stopped");
    let logged = agent.log()?.lines().filter(|line| line.contains("XID error") && line.contains("xid=79")).count();
    ensure!(logged == 1, "logged {logged} times");
    Ok(())
}

#[test]
fn a_replaced_driver_is_opened_again() -> Result<()> {
    let sim = Sim::new("[[gpus]]\n[[gpus]]")?;
    let process = sleeper()?;
    let _load = sim.load(process.0.id(), 0, 0.7, &[])?;
    let agent = agent(&sim, &[])?;
    let gpus = uuids(&agent, 2)?;
    std::thread::sleep(SECOND);
    let before = agent.scrape()?;
    sim.inject("fault", &["--kind", "reload", "--for", "6s"])?;
    wait_for("the driver is reported as down", Duration::from_secs(5), || {
        Ok((sum(&agent.scrape()?, "gpu_sampler_source_up", &[("source", "nvml")]) == Some(0.0)).then_some(()))
    })?;
    wait_for("both GPUs are sampled again", Duration::from_secs(20), || {
        let page = agent.scrape()?;
        let up = sum(&page, "gpu_sampler_source_up", &[("source", "nvml")]) == Some(1.0);
        Ok((up && age(&page, &gpus[0])? < 0.5 && age(&page, &gpus[1])? < 0.5).then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(3));
    let page = agent.scrape()?;
    for gpu in &gpus {
        let unobserved = time(&page, gpu, "unobserved") - time(&before, gpu, "unobserved");
        ensure!(unobserved > 2.0, "{unobserved} s unobserved");
        ensure!(time(&page, gpu, "idle") >= time(&before, gpu, "idle"), "a counter went back");
    }
    ensure!(time(&page, &gpus[0], "busy") > time(&before, &gpus[0], "busy") + 0.5, "busy time does not grow again");
    Ok(())
}

#[test]
fn a_driver_installed_after_the_agent_is_found() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let (library, away) = (sim.library(), sim.dir.path().join("away"));
    std::fs::rename(&library, &away)?;
    let mut command = Agent::command(None)?;
    command.env("LD_LIBRARY_PATH", library.parent().context("a folder")?).env("NVML_SIM_DIR", sim.dir.path());
    let agent = Agent::start_as(Layout::Machine, command, &ARGS)?;
    ensure!(sum(&agent.scrape()?, "gpu_sampler_source_up", &[("source", "nvml")]) == Some(0.0), "the driver is reported as up");
    std::fs::rename(&away, &library)?;
    wait_for("its GPU is sampled", Duration::from_secs(12), || {
        let page = agent.scrape()?;
        Ok(uuid(&page, 0).is_some_and(|gpu| age(&page, &gpu).is_ok_and(|age| age < 1.0)).then_some(()))
    })?;
    ensure!(sum(&agent.scrape()?, "gpu_sampler_source_up", &[("source", "nvml")]) == Some(1.0), "the driver is reported as down");
    Ok(())
}

#[test]
fn added_gpus_are_sampled_and_removed_gpus_disappear() -> Result<()> {
    let added = "[[faults]]\nkind = 'absent'\ngpu = 1\nfrom = '0s'\nlasts = '4s'\n";
    let sim = Sim::new(&format!("[[gpus]]\n[[gpus]]\n[[gpus]]\n{added}"))?;
    let agent = agent(&sim, &[])?;
    let gpus = |page: &[Sample]| page.iter().filter(|s| s.name == "gpu_info").count();
    ensure!(gpus(&agent.scrape()?) == 2, "GPU 1 is listed too early");
    let first = uuids(&agent, 1)?.remove(0);
    let removed =
        agent.scrape()?.iter().find(|s| s.name == "gpu_info" && s.labels["uuid"] != first).context("another")?.labels["uuid"]
            .clone();
    wait_for("the added GPU is found", Duration::from_secs(12), || Ok((gpus(&agent.scrape()?) == 3).then_some(())))?;
    sim.inject("fault", &["--gpu", "2", "--kind", "absent"])?;
    wait_for("the removed GPU has no series", Duration::from_secs(12), || {
        let page = agent.scrape()?;
        Ok((!page.iter().any(|s| s.name == "gpu_info" && s.labels["uuid"] == removed)).then_some(()))
    })?;
    let page = agent.scrape()?;
    ensure!(gpus(&page) == 2, "{} GPUs", gpus(&page));
    for sample in page.iter().filter(|s| s.name == "gpu_info") {
        ensure!(age(&page, &sample.labels["uuid"])? < 1.0, "{} is not sampled", sample.labels["uuid"]);
    }
    ensure!(value(&page, "gpu_sampler_nvml_stalled", &removed).is_none(), "the removed GPU is still queried");
    Ok(())
}

struct DriverVersion {
    version: &'static str,
    /// Symbols that it lacks.
    missing: &'static [&'static str],
    /// Calls that it therefore does not support, and some that it does.
    without: &'static [&'static str],
    with: &'static [&'static str],
}

const DRIVERS: [DriverVersion; 3] = [
    DriverVersion {
        version: "390.10",
        missing: &[
            "nvmlDeviceGetComputeRunningProcesses_v3",
            "nvmlDeviceGetComputeRunningProcesses_v2",
            "nvmlDeviceGetGraphicsRunningProcesses_v3",
            "nvmlDeviceGetMPSComputeRunningProcesses_v3",
            "nvmlDeviceGetMPSComputeRunningProcesses_v2",
            "nvmlDeviceGetMPSComputeRunningProcesses",
            "nvmlDeviceGetProcessesUtilizationInfo",
            "nvmlDeviceGetMemoryInfo_v2",
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetMigMode",
            "nvmlEventSetCreate",
        ],
        without: &["GetMemoryInfo_v2", "GetProcessesUtilizationInfo", "GetMPSComputeRunningProcesses"],
        with: &["GetMemoryInfo", "GetProcessUtilization", "GetComputeRunningProcesses", "GetCurrentClocksEventReasons"],
    },
    DriverVersion {
        version: "570.10",
        missing: &["nvmlDeviceGetProcessUtilization", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCurrentClocksThrottleReasons"],
        without: &[],
        with: &["GetProcessesUtilizationInfo", "GetMemoryInfo_v2", "GetCurrentClocksEventReasons"],
    },
    DriverVersion {
        version: "535.183.01",
        missing: &["nvmlDeviceGetProcessUtilization"],
        without: &["GetProcessUtilization"],
        with: &["GetSamples"],
    },
];

#[test]
fn missing_driver_functions_are_replaced_or_omitted() -> Result<()> {
    std::thread::scope(|scope| {
        let all = DRIVERS.each_ref().map(|driver| scope.spawn(|| driver.check()));
        all.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a driver's thread panicked"))?)
    })
}

impl DriverVersion {
    fn check(&self) -> Result<()> {
        let DriverVersion { version, missing, without, with } = self;
        let sim = Sim::new(&format!("driver_version = '{version}'\nmissing = {missing:?}\n[[gpus]]"))?;
        let process = sleeper()?;
        let _load = sim.load(process.0.id(), 0, 0.8, &[])?;
        let agent = agent(&sim, &[])?;
        let gpu = uuids(&agent, 1)?.remove(0);
        // Time of unnamed samples is counted when its window of 10 s is over.
        wait_for(&format!("{version}: busy time"), Duration::from_secs(15), || {
            Ok((time(&agent.scrape()?, &gpu, "busy") > 0.6).then_some(()))
        })?;
        std::thread::sleep(SECOND);
        let page = agent.scrape()?;
        let supported = |call: &str| sum(&page, "gpu_sampler_nvml_supported", &[("uuid", &gpu), ("call", call)]);
        for (calls, expected) in [(without, 0.0), (with, 1.0)] {
            for call in *calls {
                ensure!(supported(call) == Some(expected), "{version}: {call} is {:?}", supported(call));
            }
        }
        ensure!(time(&page, &gpu, "unobserved") < 1.0, "{version}: unobserved {} s", time(&page, &gpu, "unobserved"));
        ensure!(value(&page, "gpu_memory_used_bytes", &gpu) > Some(1e9), "{version}: no memory");
        ensure!(
            value(&page, "gpu_sampler_nvml_errors_total", &gpu).is_none(),
            "{version}: a missing function counts as an error"
        );
        let reason = |r| sum(&page, "gpu_unattributed_seconds_total", &[("uuid", &gpu), ("reason", r)]).unwrap_or_default();
        // The sleeper is outside containers; where no process sample names it, it is the only process on the list.
        ensure!(reason("host") > 0.5, "{version}: host {} s, no_pid {} s", reason("host"), reason("no_pid"));
        Ok(())
    }
}

#[test]
fn slow_calls_stay_within_the_budget_and_reduce_only_precision() -> Result<()> {
    const BUDGET: f64 = 0.02;
    let sim = Sim::new("[[gpus]]\n[[gpus]]\n[[faults]]\nkind = 'slow'\ngpu = 0\nfrom = '0s'\nmicros = 10000")?;
    let process = sleeper()?;
    let agent = agent(&sim, &["--gpu-wait-percent", "2"])?;
    let gpus = uuids(&agent, 2)?;
    // No busy time waits for neighbours while there is no load.
    let idle = agent.scrape()?;
    let loads = [sim.load(process.0.id(), 0, 0.7, &[])?, sim.load(process.0.id(), 1, 0.7, &[])?];
    std::thread::sleep(Duration::from_secs(4));
    let (from, before) = (Instant::now(), agent.scrape()?);
    std::thread::sleep(Duration::from_secs(20));
    let (over, page) = (from.elapsed().as_secs_f64(), agent.scrape()?);
    ensure!(sum(&page, "gpu_sampler_gpu_wait_budget_ratio", &[]) == Some(BUDGET), "the metric has a different budget");
    let spent = call_seconds(&page, &gpus[0]) - call_seconds(&before, &gpus[0]);
    let busy = value(&page, "gpu_sampler_nvml_busy_ratio", &gpus[0]).context("no busy ratio")?;
    println!("{spent:.3} s of {over:.1} s in calls, {busy:.4} recently");
    // One process list and one round of readings may fall into this time or not, and on a busy machine a call takes longer than the
    // simulated 10 ms. Without a budget it would be 4 s.
    ensure!(spent < over * 1.5 * BUDGET + 0.15, "{spent} s of {over} s in calls");
    // This ratio also covers the start, where everything is queried once.
    ensure!(busy < 2.0 * BUDGET, "a share of {busy} in calls");
    let interval = |gpu: &str| value(&page, "gpu_sampler_poll_interval_seconds", gpu).unwrap_or_default();
    ensure!(interval(&gpus[0]) > 0.3 && interval(&gpus[1]) < 0.1, "{} and {}", interval(&gpus[0]), interval(&gpus[1]));
    let queried = |gpu: &str| {
        let growth = |name| value(&page, name, gpu).unwrap_or_default() - value(&before, name, gpu).unwrap_or_default();
        growth("gpu_sampler_queried_samples_total") / growth("gpu_sampler_samples_total")
    };
    ensure!(queried(&gpus[0]) < 0.5 && queried(&gpus[1]) > 0.9, "{} and {}", queried(&gpus[0]), queried(&gpus[1]));
    let stderr = |gpu: &str| value(&page, "gpu_sampler_share_stderr_ratio", gpu).unwrap_or_default();
    ensure!(stderr(&gpus[0]) > 1.3 * stderr(&gpus[1]), "{} and {}", stderr(&gpus[0]), stderr(&gpus[1]));
    // Busy time that waits for neighbours is in no state; it is divided after 10 s at most.
    drop(loads);
    std::thread::sleep(Duration::from_secs(11));
    let settled = agent.scrape()?;
    let newest = |page: &[Sample], gpu: &str| value(page, "gpu_sampler_last_sample_timestamp_seconds", gpu).unwrap_or_default();
    let grown = |gpu: &str, state: &str| time(&settled, gpu, state) - time(&idle, gpu, state);
    for gpu in &gpus {
        ensure!(grown(gpu, "unobserved") < 0.2, "{} s unobserved", grown(gpu, "unobserved"));
        let all = ["busy", "idle"].iter().map(|state| grown(gpu, state)).sum::<f64>();
        // Between the newest samples of both pages: an idle GPU that responds slowly is polled every two seconds.
        let over = newest(&settled, gpu) - newest(&idle, gpu);
        println!("{all:.3} s of {over:.3} s are accounted for");
        ensure!(over > 30.0 && (all - over).abs() < LAG, "{all} s of {over} s are accounted for");
    }
    Ok(())
}

#[test]
fn a_frozen_sample_buffer_is_unobserved_and_never_idle() -> Result<()> {
    // The second GPU reports utilization rates of 0 under any load.
    let sim = Sim::new("[[gpus]]\n[[gpus]]\nutilization_rates = 'zero'")?;
    let process = sleeper()?;
    let _loads = [sim.load(process.0.id(), 0, 0.9, &[])?, sim.load(process.0.id(), 1, 0.9, &[])?];
    let agent = agent(&sim, &[])?;
    let gpus = uuids(&agent, 2)?;
    std::thread::sleep(Duration::from_secs(7));
    sim.inject("fault", &["--kind", "freeze", "--for", "6s"])?;
    std::thread::sleep(SECOND);
    let during = agent.scrape()?;
    std::thread::sleep(Duration::from_millis(4500));
    let later = agent.scrape()?;
    std::thread::sleep(Duration::from_millis(2500));
    let after = agent.scrape()?;
    for gpu in &gpus {
        let grown = |state| time(&later, gpu, state) - time(&during, gpu, state);
        ensure!(grown("idle") < 0.1 && grown("busy") < 0.7, "{gpu}: idle {} s, busy {} s", grown("idle"), grown("busy"));
        let unobserved = time(&after, gpu, "unobserved") - time(&during, gpu, "unobserved");
        ensure!(unobserved > 4.0, "{gpu}: {unobserved} s unobserved");
        ensure!(age(&after, gpu)? < 1.0, "{gpu} is not sampled after the fault");
    }
    Ok(())
}

#[test]
fn a_mig_device_is_measured_with_gpm_and_unsupported_without() -> Result<()> {
    let mig = |letter: &str| {
        format!("mig = ['MIG-{letter}0000000-0000-4000-8000-000000000000', 'MIG-{letter}1000000-0000-4000-8000-000000000000']")
    };
    let sim = Sim::new(&format!("driver_version = '570.10'\n[[gpus]]\ngpm = true\n{}\n[[gpus]]\n{}", mig("a"), mig("b")))?;
    let process = sleeper()?;
    let _load = sim.load(process.0.id(), 0, 0.6, &["--mig", "1"])?;
    let agent = Agent::start(Some(&sim), &ARGS)?;
    std::thread::sleep(Duration::from_secs(5));
    let page = agent.scrape()?;
    let device = |name: &str| format!("MIG-{name}000000-0000-4000-8000-000000000000");
    let (idle, used) = (device("a0"), device("a1"));
    let share = time(&page, &used, "busy") / (time(&page, &used, "busy") + time(&page, &used, "idle"));
    ensure!((share - 0.6).abs() < 0.1, "busy for a share of {share}");
    ensure!(time(&page, &idle, "idle") > 2.0 && time(&page, &idle, "busy") < 0.1, "the idle one is busy");
    ensure!(value(&page, "gpu_memory_used_bytes", &used) > Some(1e9), "no memory");
    let without = device("b1");
    ensure!(time(&page, &without, "unsupported") > 2.0 && time(&page, &without, "idle") == 0.0, "without GPM nothing is known");
    Ok(())
}
