//! Processes that use the simulated CUDA driver at the same time: the truth agrees with the processes' own clocks, with the model and with
//! the simulated NVML.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cuda_sim::nvml_log::CONTEXT_BYTES;
use nvidia_ml_sim::driver::Driver;
use nvidia_ml_sim::follow::Follower;
use nvidia_ml_sim::model::{DriverSample, Model};
use nvidia_ml_sim::processes::List;
use nvidia_ml_sim::world::{self, World};
use nvidia_ml_sim::{loads, time};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cuda-work");

/// The library that cargo built for this test.
fn library() -> PathBuf {
    let folder = Path::new(PROGRAM).parent().unwrap();
    let found = ["libcuda_sim.so", "deps/libcuda_sim.so"].map(|name| folder.join(name)).into_iter().find(|path| path.exists());
    found.expect("cargo builds the library with its tests")
}

struct Sim {
    dir: tempfile::TempDir,
    begun_us: u64,
}

/// A program that is ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Running {
    /// The summaries of the process and of its forked child.
    fn finish(mut self) -> Vec<Value> {
        let mut out = String::new();
        std::io::Read::read_to_string(self.0.stdout.as_mut().unwrap(), &mut out).unwrap();
        assert!(self.0.wait().unwrap().success());
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Sim {
    fn new() -> Self {
        let (dir, begun_us) = (tempfile::tempdir().unwrap(), loads::now_us());
        fs::write(dir.path().join(world::FILE), format!("begun_us = {begun_us}\n[[gpus]]\n")).unwrap();
        fs::write(dir.path().join(loads::FILE), "").unwrap();
        let sim = Self { dir, begun_us };
        assert!(sim.command("install").status().unwrap().success());
        sim
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg(verb).arg("--dir").arg(self.dir.path()).env("CUDA_SIM_LIBRARY", library()).env_remove("NVML_SIM_DIR");
        command
    }

    fn run(&self, arguments: &str) -> Running {
        let mut command = self.command("run");
        Running(command.args(arguments.split(' ')).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// The truth of each process, in the order of PIDs.
    fn truth(&self, arguments: &[&str]) -> Vec<Value> {
        let output = self.command("truth").args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let truth: Value = serde_json::from_slice(&output.stdout).unwrap();
        truth["processes"].as_array().unwrap().clone()
    }

    /// GPU-seconds of a process as the simulated NVML reports them.
    fn nvml_seconds(&self, pid: &Value) -> f64 {
        let world = World::read(self.dir.path()).unwrap();
        let mut log = Follower::new(self.dir.path(), &world).unwrap();
        log.read().unwrap();
        let model = Model { world: &world, unit: 0.into(), loads: log.loads.of(0.into()), faults: &log.faults };
        let spent = model.truth(self.begun_us, loads::now_us());
        spent.iter().filter(|spent| u64::from(spent.load.pid) == *pid).map(|spent| spent.seconds[0]).sum()
    }
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} in {value}"))
}

/// Seconds of the waiting in which the process with this PID was on the GPU.
fn during(process: &Value, pid: &Value) -> f64 {
    let list = process["while"].as_array().unwrap();
    list.iter().filter(|one| one["pid"] == *pid).map(|one| number(one, "seconds")).sum()
}

fn assert_near(left: f64, right: f64, within: f64, what: &str) {
    assert!((left - right).abs() <= within, "{what}: {left} and {right} differ by more than {within}");
}

#[test]
fn two_processes_wait_for_each_other_as_the_model_states() {
    let sim = Sim::new();
    let running = [4, 6].map(|ms| sim.run(&format!("--kernel {ms}ms --back-to-back --for 2s")));
    let summaries: Vec<Value> = running.into_iter().flat_map(Running::finish).collect();
    let truth = sim.truth(&[]);
    assert_eq!(truth.len(), 2);
    for process in &truth {
        let summary = summaries.iter().find(|summary| summary["pid"] == process["pid"]).unwrap();
        assert_eq!((&process["calls"], &process["start_time"]), (&summary["calls"], &summary["start_time"]));
        let waited = number(process, "wait_some_seconds");
        assert_near(waited, number(summary, "wait_total_seconds"), 0.05, "truth and the process's own clock");
        assert_near(waited, number(process, "wait_total_seconds"), 1e-6, "one thread");
        let caller = number(process, "caller_some_seconds");
        assert!(caller >= waited, "the caller has its thread inside for longer: {process}");
        assert_near(caller, number(summary, "wait_total_seconds"), 0.05, "the process's two clocks");
        // Work is done only while it is waited for, so all of it is in the waiting.
        let own = during(process, &process["pid"]);
        assert_near(own, number(process, "gpu_seconds"), 0.02, "own work during the waiting");
        let kernel = if summary == &summaries[0] { 0.004 } else { 0.006 };
        assert_near(own, number(process, "calls") * kernel, 0.02, "work that was launched");
        let other = truth.iter().find(|other| other["pid"] != process["pid"]).unwrap();
        let all = own + during(process, &other["pid"]);
        assert!(all <= waited + 0.01 && all >= waited * 0.8, "{all} of {waited} s of waiting have a process on the GPU");
        assert!(during(process, &other["pid"]) > 0.4, "{process}");
        assert_near(sim.nvml_seconds(&process["pid"]), number(process, "gpu_seconds"), 0.01, "NVML and CUDA");
    }
}

#[test]
fn the_simulated_nvml_lists_the_processes_and_its_samples_stay_true() {
    let sim = Sim::new();
    let running = [0, 1].map(|_| sim.run("--kernel 8ms --every 20ms --for 2s"));
    let mut driver = Driver::open(sim.dir.path()).unwrap();
    let mut served = BTreeMap::new();
    while loads::now_us() < sim.begun_us + 1_700_000 {
        served.extend(driver.latest(0).unwrap().map(|sample| (sample.at_us, sample)));
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut listed: Vec<(u32, u64)> =
        driver.processes(0.into(), List::Compute).unwrap().iter().map(|process| (process.pid, process.bytes)).collect();
    let mut expect = running.each_ref().map(|running| (running.0.id(), CONTEXT_BYTES));
    listed.sort_unstable();
    expect.sort_unstable();
    assert_eq!(listed, expect);
    running.into_iter().for_each(|running| assert_eq!(running.finish().len(), 1));
    let world = World::read(sim.dir.path()).unwrap();
    let mut log = Follower::new(sim.dir.path(), &world).unwrap();
    log.read().unwrap();
    let model = Model { world: &world, unit: 0.into(), loads: log.loads.of(0.into()), faults: &log.faults };
    let (first, last) = (*served.keys().next().unwrap(), *served.keys().last().unwrap());
    let true_samples: Vec<DriverSample> = model.grid(first - 1, last).map(|span| model.sample(span)).collect();
    let differing =
        true_samples.iter().filter(|sample| served.get(&sample.at_us).is_some_and(|served| served != *sample)).count();
    assert!(
        true_samples.len() >= 8 && true_samples.iter().filter(|sample| sample.util[0] >= 70).count() >= 5,
        "{true_samples:?}"
    );
    // A machine that stops a process for 10 ms delays its lines.
    assert!(differing <= true_samples.len() / 4, "{differing} of {} samples: {true_samples:?} {served:?}", true_samples.len());
}

#[test]
fn all_modes_wait_for_their_kernels_and_only_blocking_ones_count() {
    let sim = Sim::new();
    for mode in ["block", "event", "ctx", "copy", "graph", "spin"] {
        let threads = if mode == "copy" || mode == "ctx" { 1 } else { 2 };
        let running = sim.run(&format!("--mode {mode} --kernel 3ms --every 30ms --threads {threads} --for 300ms"));
        let summary = running.finish().remove(0);
        let truth = sim.truth(&[]).into_iter().find(|process| process["pid"] == summary["pid"]).unwrap();
        let (gpu, waited) = (number(&truth, "gpu_seconds"), number(&truth, "wait_some_seconds"));
        let launched = number(&summary, "launches") * 0.003;
        assert!(launched > 0.0, "{mode}: {summary}");
        match mode {
            // The copy does not wait for the thread's own stream only.
            "spin" => {
                let none = (waited, &truth["calls"], number(&truth, "caller_some_seconds"));
                assert_eq!(none, (0.0, &Value::from(0), 0.0), "{truth}");
            }
            _ => {
                assert!(waited >= launched * 0.9 && truth["calls"] == summary["calls"], "{mode}: {truth} {summary}");
                assert!(number(&truth, "caller_some_seconds") >= waited, "{mode}: {truth}");
            }
        }
        assert_near(gpu, launched, 0.012, mode);
    }
}

#[test]
fn a_killed_process_stops_soon_and_does_not_stop_others() {
    let sim = Sim::new();
    let mut killed = sim.run("--kernel 30s --back-to-back --for 60s");
    let other = sim.run("--kernel 4ms --every 20ms --for 2s");
    std::thread::sleep(Duration::from_millis(700));
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    let killed_us = loads::now_us();
    let summary = other.finish().remove(0);
    let truth = sim.truth(&["--from", &time::format(killed_us + 100_000)]);
    let process = |pid: &Value| truth.iter().find(|process| process["pid"] == *pid).unwrap();
    assert_eq!(number(process(&Value::from(killed.0.id())), "gpu_seconds"), 0.0);
    let other = process(&summary["pid"]);
    let calls = number(other, "calls");
    assert!(calls > 20.0 && number(other, "wait_some_seconds") < calls * 0.015, "{other}");
    let before = sim.truth(&["--to", &time::format(killed_us)]);
    let waited = before.iter().find(|process| process["pid"] == killed.0.id()).map(|one| number(one, "wait_some_seconds"));
    assert!(waited.is_some_and(|seconds| (0.2..0.9).contains(&seconds)), "{before:?}");
}

#[test]
fn a_forked_child_initialises_again_and_waits_for_its_parent() {
    let sim = Sim::new();
    let summaries = sim.run("--kernel 5ms --back-to-back --for 1s --fork-after-init").finish();
    assert_eq!(summaries.len(), 2);
    assert_ne!(summaries[0]["pid"], summaries[1]["pid"]);
    for process in sim.truth(&[]) {
        let others = process["while"].as_array().unwrap().iter().filter(|one| one["pid"] != process["pid"]);
        let others: f64 = others.map(|one| number(one, "seconds")).sum();
        assert!(others > 0.2 && number(&process, "calls") > 20.0, "{process}");
    }
}

#[test]
fn calls_without_work_are_counted_at_high_rates() {
    let sim = Sim::new();
    let summary = sim.run("--mode empty --rate 20000 --for 1s --threads 2").finish().remove(0);
    let truth = sim.truth(&[]).remove(0);
    assert_eq!(truth["calls"], summary["calls"]);
    assert!(number(&truth, "calls") > 5_000.0, "{truth}");
    assert_eq!(number(&truth, "gpu_seconds"), 0.0);
}
