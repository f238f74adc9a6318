//! Mistakes of other exporters, each in a test that fails for their method. Watermarks, clocks and the order of process samples are in
//! `matrix`, processes that have ended in `lives`, drivers that fail in `survival`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::CgroupTree;
use gpu_sampler_tests::record::Lives;
use gpu_sampler_tests::{Agent, Running, Sample, Sim, sum, wait_for};

const PLENTY: [&str; 4] = ["--kernel-mode", "raw_tracepoint", "--gpu-budget-percent", "50"];

/// Containers that hold a GPU, and the page when everything has settled.
struct QuirkStage {
    sim: Sim,
    tree: CgroupTree,
    agent: Agent,
    made: usize,
    lives: Vec<Lives>,
}

impl QuirkStage {
    fn new(name: &str, world: &str) -> Result<Self> {
        let (sim, tree) = (Sim::new(world)?, CgroupTree::new(name)?);
        let agent = Agent::start(Some(&sim), &PLENTY)?;
        std::thread::sleep(Duration::from_secs(1));
        Ok(Self { sim, tree, agent, made: 0, lives: Vec::new() })
    }

    fn container(&mut self) -> Result<(String, PathBuf)> {
        self.made += 1;
        self.tree.container(self.made)
    }

    /// Starts this number of processes in a container, on a GPU, for 14 s.
    fn hold(&mut self, dir: &Path, gpu: &str, count: &str, ways: &[&str]) -> Result<()> {
        let args = ["--count", count, "--at-once", count, "--lasting", "14s..14s", "--gpus", gpu, "--mem", "1GiB"];
        self.lives.push(self.sim.lives(&[dir], &[&args, ways].concat())?);
        Ok(())
    }

    /// The page while the processes run.
    fn page(&self) -> Result<Vec<Sample>> {
        std::thread::sleep(Duration::from_secs(10));
        // A series begins at 0.
        self.agent.scrape()?;
        std::thread::sleep(Duration::from_secs(1));
        self.agent.scrape()
    }

    fn end(self) -> Result<()> {
        self.lives.into_iter().try_for_each(|lives| lives.all().map(|_| ()))
    }
}

fn uuid(page: &[Sample], index: usize) -> Result<String> {
    let is_gpu =
        |s: &&Sample| s.name == "gpu_info" && s.labels["index"] == index.to_string() && !s.labels.contains_key("gpu_uuid");
    Ok(page.iter().find(is_gpu).with_context(|| format!("GPU {index}"))?.labels["uuid"].clone())
}

#[test]
fn idle_failing_unsupported_host_mps_and_mig_gpus_are_distinguished() -> Result<()> {
    let failing = "kind = 'error'\nfrom = '0s'";
    let world = format!(
        "{}[[gpus]]\ngpm = true\nmig = ['MIG-1', 'MIG-2']\n\
         [[faults]]\ngpu = 1\n{failing}\nerror = 'UNKNOWN'\ncall = 'nvmlDeviceGetSamples'\n\
         [[faults]]\ngpu = 2\n{failing}\nerror = 'NOT_SUPPORTED'\ncall = 'nvmlDeviceGetSamples'\n\
         [[faults]]\ngpu = 2\n{failing}\nerror = 'NOT_SUPPORTED'\ncall = 'nvmlDeviceGetProcessUtilization'\n",
        "[[gpus]]\n".repeat(5)
    );
    let mut stage = QuirkStage::new("six", &world)?;
    let containers = (0..7).map(|_| stage.container()).collect::<Result<Vec<_>>>()?;
    let busy = ["--demand", "0.5"];
    stage.hold(&containers[0].1, "0", "1", &["--demand", "0.5", "--every", "10000000000s", "--on", "2ms"])?;
    stage.hold(&containers[1].1, "1", "1", &busy)?;
    stage.hold(&containers[2].1, "2", "1", &busy)?;
    let host = Running(std::process::Command::new("sleep").arg("60").spawn()?);
    let _load = stage.sim.load(host.0.id(), 3, 0.5, &[])?;
    stage.hold(&containers[3].1, "4", "1", &["--demand", "0.5", "--mps"])?;
    stage.hold(&containers[4].1, "4", "1", &["--demand", "0.3", "--mps"])?;
    stage.hold(&containers[5].1, "5", "1", &["--demand", "0.5", "--mig", "0"])?;
    let page = stage.page()?;
    let gpus = (0..6).map(|n| uuid(&page, n)).collect::<Result<Vec<_>>>()?;
    let duty =
        |n: usize, gpu: &str| sum(&page, "container_gpu_utilization_ratio", &[("container_id", &containers[n].0), ("uuid", gpu)]);
    let memory =
        |n: usize, gpu: &str| sum(&page, "container_gpu_memory_used_bytes", &[("container_id", &containers[n].0), ("uuid", gpu)]);
    let state = |gpu: &str, state: &str| sum(&page, "gpu_time_seconds_total", &[("uuid", gpu), ("state", state)]);
    let reason = |gpu: &str, reason: &str| sum(&page, "gpu_unattributed_seconds_total", &[("uuid", gpu), ("reason", reason)]);
    let value = |name: &str, gpu: &str| sum(&page, name, &[("uuid", gpu)]);
    let gib = Some(f64::from(1u32 << 30));

    // Idle: observed zero.
    assert_eq!((duty(0, &gpus[0]), memory(0, &gpus[0])), (Some(0.0), gib));
    assert!(state(&gpus[0], "idle") > Some(8.0));
    // Its calls fail: its time is unknown; only what is known is exported.
    assert_eq!((duty(1, &gpus[1]), memory(1, &gpus[1])), (None, gib));
    assert_eq!((value("gpu_utilization_ratio", &gpus[1]), state(&gpus[1], "idle")), (None, Some(0.0)));
    assert!(value("gpu_sampler_nvml_errors_total", &gpus[1]) > Some(2.0));
    // The driver does not support samples of this GPU.
    assert_eq!((duty(2, &gpus[2]), memory(2, &gpus[2])), (None, gib));
    assert!(state(&gpus[2], "unsupported") > Some(8.0) && state(&gpus[2], "idle") == Some(0.0));
    assert_eq!(value("gpu_sampler_nvml_errors_total", &gpus[2]), None);
    // Busy for a process outside containers.
    assert!(reason(&gpus[3], "host") > Some(3.0) && value("container_gpu_seconds_total", &gpus[3]).is_none());
    // Two clients of the multi-process service, which no sample distinguishes.
    assert!(reason(&gpus[4], "mps") > Some(3.0), "{:?}", reason(&gpus[4], "mps"));
    // A sample may come before the list of MPS clients is read for the first time.
    assert!(value("container_gpu_seconds_total", &gpus[4]).is_some_and(|seconds| seconds < 0.5));
    assert_eq!(value("container_gpu_mps_clients", &gpus[4]), Some(2.0));
    // MIG devices are devices; a container that holds one has series for it alone, and is counted once.
    let mig = duty(5, "MIG-1").context("the MIG device's container")?;
    assert!((mig - 0.5).abs() < 0.1, "{mig}");
    assert_eq!(memory(5, "MIG-1"), gib);
    assert_eq!(value("gpu_utilization_ratio", "MIG-2"), Some(0.0));
    assert_eq!(value("gpu_time_seconds_total", &gpus[5]), None);
    let of_parent = sum(&page, "container_gpu_seconds_total", &[("gpu_uuid", &gpus[5])]);
    assert!(of_parent > Some(4.0) && of_parent == value("container_gpu_seconds_total", "MIG-1"), "{of_parent:?}");
    assert!(value("gpu_power_watts", &gpus[5]) > Some(10.0));
    // "Not found" from an idle GPU is not a failure.
    assert_eq!(value("gpu_sampler_nvml_errors_total", &gpus[0]), None);
    stage.end()
}

/// Read with the documented size, the lists of the other drivers have PIDs of no process, and memory of 0.
#[test]
fn lists_with_entries_of_every_size_have_the_memory_of_their_processes() -> Result<()> {
    let gpu = |bytes: u32| format!("[[gpus]]\nlist_entry_bytes = {bytes}\n");
    let mut stage = QuirkStage::new("entries", &[16, 24, 32].map(gpu).concat())?;
    let containers = (0..3).map(|_| stage.container()).collect::<Result<Vec<_>>>()?;
    for index in ["0", "1", "2"] {
        for (_, dir) in &containers {
            stage.hold(dir, index, "1", &["--demand", "0.2"])?;
        }
    }
    let page = stage.page()?;
    let gib = f64::from(1u32 << 30);
    for index in 0..3 {
        let gpu = uuid(&page, index)?;
        for (id, _) in &containers {
            let memory = sum(&page, "container_gpu_memory_used_bytes", &[("container_id", id), ("uuid", &gpu)]);
            assert_eq!(memory, Some(gib), "GPU {index}");
        }
    }
    stage.end()
}

/// With the call that works on other drivers alone, all of their time would be without a process, and credited by the process list.
#[test]
fn processes_are_named_by_whichever_call_of_the_driver_works() -> Result<()> {
    let silent = [
        "processes_utilization_info = 'zeros'",
        "processes_utilization_info = 'empty'",
        "process_utilization = 'unsupported'",
        "process_utilization = 'zeros'",
    ];
    let gpus = silent.map(|keys| format!("[[gpus]]\n{keys}\n")).concat();
    let mut stage = QuirkStage::new("calls", &format!("driver_version = '580.95.05'\n{gpus}"))?;
    let (busy, idle) = (stage.container()?, stage.container()?);
    for gpu in 0..silent.len() {
        stage.hold(&busy.1, &gpu.to_string(), "1", &["--demand", "0.9"])?;
        stage.hold(&idle.1, &gpu.to_string(), "1", &["--demand", "0.01"])?;
    }
    let page = stage.page()?;
    let log = stage.agent.log()?;
    for (gpu, keys) in silent.iter().enumerate() {
        let uuid = uuid(&page, gpu)?;
        let seconds = |id: &str| sum(&page, "container_gpu_seconds_total", &[("container_id", id), ("uuid", &uuid)]);
        let no_pid = sum(&page, "gpu_unattributed_seconds_total", &[("uuid", &uuid), ("reason", "no_pid")]);
        ensure!(seconds(&busy.0) > Some(7.0), "{keys}: {:?}", seconds(&busy.0));
        ensure!(seconds(&idle.0).is_none_or(|seconds| seconds < 1.0), "{keys}: {:?}", seconds(&idle.0));
        ensure!(no_pid < Some(2.5), "{keys}: {no_pid:?} without a process");
        let is_logged = log
            .lines()
            .any(|line| line.contains(&uuid) && line.contains("names no process") && line.contains("GetProcessUtilization"));
        ensure!(is_logged == keys.starts_with("processes_"), "{keys}: {log}");
    }
    stage.end()
}

#[test]
fn the_processes_of_a_container_are_summed_and_containers_sum_to_the_device() -> Result<()> {
    let mut stage = QuirkStage::new("several", "[[gpus]]\n[[gpus]]\npid_rule = 'last'")?;
    let (three, one) = (stage.container()?, stage.container()?);
    for gpu in ["0", "1"] {
        stage.hold(&three.1, gpu, "3", &["--demand", "0.2"])?;
        stage.hold(&one.1, gpu, "1", &["--demand", "0.2"])?;
    }
    let page = stage.page()?;
    for index in 0..2 {
        let uuid = uuid(&page, index)?;
        let value = |name: &str, labels: &[(&str, &str)]| sum(&page, name, &[&[("uuid", &*uuid)], labels].concat());
        let share = |id: &str| value("container_gpu_utilization_ratio", &[("container_id", id)]).context("a share");
        let stderr = value("container_gpu_utilization_stderr_ratio", &[("container_id", &three.0)]).context("its error")?;
        let (all, single) = (share(&three.0)?, share(&one.0)?);
        // The stated error comes from the same samples and is wrong together with them. The binomial error of 60 independent samples
        // bounds it from below. Four of these exclude 0.2, the share of one process.
        let of_sixty = 0.8 * (0.75_f64 * 0.25 / 60.0).sqrt();
        ensure!((all - 0.6).abs() < 4.0 * stderr.max(of_sixty), "three of 0.2 have {all}, standard error {stderr}");
        // Only the containers' shares, once each: they sum to the device's.
        let device = value("gpu_utilization_ratio", &[]).context("the device's")?;
        ensure!((all + single - device).abs() < 1e-9, "{all} + {single} is not {device}");
        let duty = sum(&page, "container_accelerator_duty_cycle", &[("acc_id", &uuid)]).context("duty cycles")?;
        ensure!((duty / 100.0 - device).abs() < 1e-9, "{duty} is not {device}");
        ensure!(value("container_gpu_memory_used_bytes", &[]) == Some(4.0 * f64::from(1u32 << 30)));
    }
    stage.end()
}

#[test]
fn invalid_data_of_the_driver_reaches_no_series() -> Result<()> {
    let garbage = "garbage = ['util', 'pid_zero', 'pid_max', 'stale', 'exited', 'zombies']\ngarbage_every = 2";
    let quirks = "list_memory = 'unknown'\nutilization_rates = 'zero'\nrows_grow = true\nrow_order = 'shuffled'";
    let mut stage = QuirkStage::new("garbage", &format!("[[gpus]]\n{garbage}\n{quirks}"))?;
    let (id, dir) = stage.container()?;
    stage.hold(&dir, "0", "1", &["--demand", "0.9"])?;
    let page = stage.page()?;
    let value = |name: &str, labels: &[(&str, &str)]| sum(&page, name, labels);
    let share = value("container_gpu_utilization_ratio", &[("container_id", &id)]).context("its share")?;
    // The device's own utilization rates are 0.
    ensure!((0.65..0.95).contains(&share), "{share}");
    ensure!(value("container_gpu_memory_used_bytes", &[("container_id", &id)]).is_none(), "unknown memory is shown");
    ensure!(page.iter().filter(|s| s.name == "container_gpu_samples_total").count() == 1, "another container has a series");
    let wrong = |s: &&Sample| s.name.ends_with("_ratio") && s.value > 1.0 || s.name.ends_with("duty_cycle") && s.value > 100.0;
    ensure!(page.iter().find(wrong).is_none(), "{:?}", page.iter().find(wrong));
    for reason in ["utilization", "pid", "stale"] {
        let rejected = value("gpu_sampler_rejected_samples_total", &[("reason", reason)]);
        ensure!(rejected > Some(0.0), "nothing was rejected for {reason}");
    }
    // An unnamed sample may get one of the invalid process samples.
    let unattributed = value("gpu_unattributed_seconds_total", &[]).context("reasons")?;
    ensure!(unattributed < 2.5, "{unattributed} s unattributed");
    // Each recorded sample is counted once.
    let recorded = stage.sim.samples()?.len() as f64;
    let samples = value("container_gpu_samples_total", &[]).context("samples")?;
    ensure!(samples <= recorded && samples > 0.9 * recorded - 5.0, "{samples} of {recorded}");
    stage.end()
}

#[test]
fn every_engine_is_sampled_on_its_own() -> Result<()> {
    let mut stage = QuirkStage::new("engines", "driver_version = '550.54.14'\n[[gpus]]")?;
    let (computes, encodes) = (stage.container()?, stage.container()?);
    stage.hold(&computes.1, "0", "1", &["--demand", "0.5", "--jpeg", "0.2"])?;
    stage.hold(&encodes.1, "0", "1", &["--demand", "0.01", "--enc", "0.6", "--ofa", "0.2"])?;
    let _early = stage.page()?;
    std::mem::take(&mut stage.lives).into_iter().try_for_each(|lives| lives.all().map(|_| ()))?;
    // The sample buffers of other engines are read every 2 s, and their unnamed samples wait for 10 s.
    std::thread::sleep(Duration::from_secs(13));
    let page = stage.agent.scrape()?;
    let engine =
        |id: &str, engine: &str| sum(&page, "container_gpu_engine_seconds_total", &[("container_id", id), ("engine", engine)]);
    let near = |seconds: Option<f64>, expect: f64| seconds.is_some_and(|s| s > 0.8 * expect && s < 1.2 * expect);
    ensure!(near(engine(&encodes.0, "encoder"), 8.4), "{:?}", engine(&encodes.0, "encoder"));
    ensure!(near(engine(&encodes.0, "ofa"), 2.8), "{:?}", engine(&encodes.0, "ofa"));
    ensure!(near(engine(&computes.0, "jpeg"), 2.8), "{:?}", engine(&computes.0, "jpeg"));
    ensure!(engine(&computes.0, "encoder").is_none(), "it never encoded");
    // It hardly uses the compute engine.
    let seconds = |id: &str| sum(&page, "container_gpu_seconds_total", &[("container_id", id)]);
    ensure!(seconds(&encodes.0) < Some(1.5) && seconds(&computes.0) > Some(5.5), "{:?}", seconds(&encodes.0));
    let busy = sum(&page, "gpu_engine_seconds_total", &[("engine", "encoder")]).context("the encoder's")?;
    let unattributed = sum(&page, "gpu_engine_unattributed_seconds_total", &[("engine", "encoder")])
        .context("the encoder's unattributed time")?;
    let credited = engine(&encodes.0, "encoder").unwrap_or_default();
    ensure!((busy - unattributed - credited).abs() < 1e-9, "{credited} + {unattributed} is not {busy}");
    stage.end()
}

/// Time without a process is that of the only holder, which holds memory and is idle.
#[test]
fn a_busy_counter_that_is_latched_after_a_kill_is_billed_to_no_container() -> Result<()> {
    let mut stage =
        QuirkStage::new("latch", "driver_version = '580.95.05'\n[[gpus]]\n[[gpus]]\npid_rule = 'last'\nexited_pids = 'blank'")?;
    let (holder, killed) = (stage.container()?, stage.container()?);
    for gpu in ["0", "1"] {
        // Idle for all of the test.
        stage.hold(&holder.1, gpu, "1", &["--demand", "0.5", "--every", "10000000000s", "--on", "2ms"])?;
        let args = ["--count", "1", "--at-once", "1", "--lasting", "4s..4s", "--gpus", gpu, "--demand", "1.0"];
        stage.lives.push(stage.sim.lives(&[&killed.1], &args)?);
    }
    std::thread::sleep(Duration::from_secs(2));
    stage.sim.inject("fault", &["--kind", "latch"])?;
    std::thread::sleep(Duration::from_secs(10));
    let page = stage.agent.scrape()?;
    for index in 0..2 {
        let uuid = uuid(&page, index)?;
        let value = |name: &str, labels: &[(&str, &str)]| sum(&page, name, &[&[("uuid", &*uuid)], labels].concat());
        let seconds = |id: &str| value("container_gpu_seconds_total", &[("container_id", id)]);
        ensure!(seconds(&holder.0) == Some(0.0), "GPU {index}: the holder has {:?} s", seconds(&holder.0));
        ensure!(seconds(&killed.0).is_some_and(|s| (3.0..4.8).contains(&s)), "GPU {index}: {:?} of 4 s", seconds(&killed.0));
        let no_pid = value("gpu_unattributed_seconds_total", &[("reason", "no_pid")]);
        ensure!(no_pid > Some(4.0), "GPU {index}: {no_pid:?} without a process");
        let condition = format!("gpu-{index}-latched");
        ensure!(sum(&page, "gpu_sampler_degraded", &[("condition", &condition)]) == Some(1.0), "{condition}");
        ensure!(stage.agent.log()?.contains("nvidia-smi --gpu-reset"), "no remedy in the log");
    }
    stage.sim.inject("fault", &["--clear", "--kind", "latch"])?;
    wait_for("the end of the condition", Duration::from_secs(5), || {
        let page = stage.agent.scrape()?;
        Ok(sum(&page, "gpu_sampler_degraded", &[("condition", "gpu-0-latched")]).is_none_or(|value| value == 0.0).then_some(()))
    })?;
    stage.end()
}

#[test]
fn a_gpu_that_appears_late_is_sampled_like_the_others() -> Result<()> {
    let mut stage =
        QuirkStage::new("late", "[[gpus]]\n[[gpus]]\n[[faults]]\ngpu = 1\nkind = 'absent'\nfrom = '0s'\nlasts = '2s'")?;
    let (id, dir) = stage.container()?;
    wait_for("the second GPU", Duration::from_secs(12), || Ok(uuid(&stage.agent.scrape()?, 1).ok()))?;
    std::thread::sleep(Duration::from_secs(1));
    for gpu in ["0", "1"] {
        stage.hold(&dir, gpu, "1", &["--demand", "0.5"])?;
    }
    let page = stage.page()?;
    for index in 0..2 {
        let seconds = sum(&page, "container_gpu_seconds_total", &[("container_id", &id), ("uuid", &uuid(&page, index)?)]);
        ensure!(seconds > Some(2.5), "GPU {index}: {seconds:?}");
    }
    stage.end()
}
