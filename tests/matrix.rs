//! Eight GPUs at once, each with quirks of its own and 1 to 64 processes, against the simulator's recorded samples and its timeline.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::CgroupTree;
use gpu_sampler_tests::record::{RecordedLife, busy_percent, credited, expected, id_of};
use gpu_sampler_tests::{Agent, Sample, Sim, sum};
use serde_json::Value;

/// A GPU's keys in the world file, its number of processes, their demand.
struct MatrixGpu {
    keys: &'static str,
    processes: usize,
    demand: &'static str,
    /// The clock is set during the run: samples are lost around it.
    stepped: bool,
}

const fn gpu(keys: &'static str, processes: usize, demand: &'static str) -> MatrixGpu {
    MatrixGpu { keys, processes, demand, stepped: false }
}

const GPUS: [MatrixGpu; 8] = [
    gpu("period_us = 100000\njitter_us = 5000\nclock_offset_us = 12000000", 64, "0.01..0.4"),
    gpu("pid_rule = 'last'\njitter_us = 8000\nclock_offset_us = -12000000\nclock_drift_ppm = 200.0", 32, "0.01..0.06"),
    gpu(
        "period_us = 200000\nrow_order = 'shuffled'\ngarbage_every = 3\n\
         garbage = ['util', 'pid_zero', 'pid_max', 'stale', 'exited', 'zombies']",
        8,
        "0.02..0.3",
    ),
    gpu("clock = 'boot'\nrow_probe = 4096\nrows_grow = true\nclock_drift_ppm = -200.0", 64, "0.01..0.1"),
    gpu("pid_rule = 'last'\nrow_stamps = 'process'\nrow_order = 'shuffled'", 16, "0.02..0.1"),
    gpu("ring = 20\nidle_ring = 'dry'\nutilization_rates = 'zero'", 1, "0.1"),
    MatrixGpu { keys: "[[gpus.clock_steps]]\nat = '30s'\nby_us = -3000000", processes: 4, demand: "0.1..0.4", stepped: true },
    MatrixGpu {
        keys: "period_us = 100000\n[[gpus.clock_steps]]\nat = '30s'\nby_us = 3000000",
        processes: 2,
        demand: "0.3..0.9",
        stepped: true,
    },
];
const LASTING: &str = "70s..70s";
const PERIOD_S: f64 = 0.167;
/// Least share of the samples naming a process that must be credited.
const RECOVERED: f64 = 0.995;

fn value(page: &[Sample], uuid: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    sum(page, name, &[&[("uuid", uuid)], labels].concat()).unwrap_or_default()
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[test]
fn with_all_quirks_at_once_no_sample_is_lost_or_counted_twice() -> Result<()> {
    let gpus: String = GPUS.iter().map(|gpu| format!("[[gpus]]\n{}\n", gpu.keys)).collect();
    let sim = Sim::new(&format!("seed = 2024\n{gpus}"))?;
    let tree = CgroupTree::new("matrix")?;
    // This tests reconstruction, on a machine that is busy with other tests; the budget has a test of its own.
    let agent = Agent::start(Some(&sim), &["--kernel-mode", "raw_tracepoint", "--gpu-budget-percent", "50"])?;
    // The first read of the driver's rings only sets the watermarks.
    std::thread::sleep(Duration::from_secs(1));
    let before = (agent.scrape()?, now());
    let mut lives = Vec::new();
    let mut number = 0;
    for (index, gpu) in GPUS.iter().enumerate() {
        let dirs = (0..gpu.processes)
            .map(|_| {
                number += 1;
                tree.container(number)
            })
            .collect::<Result<Vec<_>>>()?;
        let dirs: Vec<&Path> = dirs.iter().map(|(_, dir)| dir.as_path()).collect();
        let (count, index) = (gpu.processes.to_string(), index.to_string());
        lives.push(sim.lives(
            &dirs,
            &[
                "--count",
                &count,
                "--at-once",
                &count,
                "--lasting",
                LASTING,
                "--demand",
                gpu.demand,
                "--gpus",
                &index,
                "--mem",
                "64MiB",
            ],
        )?);
    }
    let lives: Vec<RecordedLife> = lives.into_iter().map(|lives| lives.all()).collect::<Result<Vec<_>>>()?.concat();
    // What settles late settles within 10 s.
    std::thread::sleep(Duration::from_secs(13));
    let after = (agent.scrape()?, now());
    let page = agent.scrape()?;
    let (truth, all) = (sim.truth(&[])?, sim.truth(&["--samples"])?);
    let mut owners: HashMap<u32, String> = HashMap::new();
    for life in &lives {
        owners.insert(life.pid, id_of(&life.cgroup));
    }
    let got = credited(&page);
    let mut errors = Vec::new();
    println!("GPU processes  recorded recovered  busy s   of truth  credited unattributed unobserved idle");
    for (index, gpu) in GPUS.iter().enumerate() {
        let uuid = truth["gpus"][index]["uuid"].as_str().context("uuid")?;
        let samples: Vec<_> = sim.samples()?.into_iter().filter(|s| s.gpu == index).collect();
        let want = expected(&lives, &samples, 250_000)?;
        let (mut recorded, mut recovered) = (0, 0);
        for (key, n) in &want {
            let mine = got.get(key).copied().unwrap_or_default();
            assert!(mine <= *n, "GPU {index}: {key:?} has {mine} samples of {n}");
            (recorded, recovered) = (recorded + n, recovered + mine);
        }
        let state = |page: &[Sample], state: &str| value(page, uuid, "gpu_time_seconds_total", &[("state", state)]);
        let [busy, idle, unobserved] = ["busy", "idle", "unobserved"].map(|s| state(&page, s));
        let credited = value(&page, uuid, "container_gpu_seconds_total", &[]);
        let unattributed = value(&page, uuid, "gpu_unattributed_seconds_total", &[]);
        let recorded_busy: f64 = record_busy(&all, index)?;
        println!(
            "{index:>3} {:>9} {recorded:>9} {recovered:>9} {busy:>8.2} {:>9.2} {credited:>9.2} {unattributed:>12.2} {unobserved:>10.2} {idle:>6.2}",
            gpu.processes,
            truth["gpus"][index]["busy_seconds"].as_f64().unwrap_or_default(),
        );
        let least = if gpu.stepped { 0.97 } else { RECOVERED };
        assert!(recovered as f64 >= least * recorded as f64, "GPU {index}: {recovered} of {recorded}");
        assert!((credited + unattributed - busy).abs() < 1e-6, "GPU {index}: {credited} + {unattributed} is not {busy}");
        assert!((busy - recorded_busy).abs() < 0.01 * recorded_busy + 0.1, "GPU {index}: busy {busy}, recorded {recorded_busy}");
        assert!(unobserved < 2.5, "GPU {index}: {unobserved} s unobserved");
        // The states sum to wall time between any two scrapes.
        let states = |page: &[Sample]| value(page, uuid, "gpu_time_seconds_total", &[]);
        let (states, wall) = (states(&after.0) - states(&before.0), after.1 - before.1);
        assert!((states - wall).abs() < 1.0, "GPU {index}: states {states}, wall {wall}");
        errors.extend(shares(&page, &truth["gpus"][index], uuid, &owners)?);
    }
    let within =
        |k: f64| errors.iter().filter(|(off, stderr)| off.abs() <= k * stderr + 0.05).count() as f64 / errors.len() as f64;
    println!("{} containers: within one standard error {:.3}, two {:.3}", errors.len(), within(1.0), within(2.0));
    assert!(within(1.0) > 0.53 && within(2.0) > 0.84, "{errors:?}");
    Ok(())
}

/// Busy seconds by the recorded samples.
fn record_busy(all: &Value, gpu: usize) -> Result<f64> {
    let mut last: Option<u64> = None;
    let mut busy = 0.0;
    for sample in all.as_array().context("samples")?.iter().filter(|s| s["gpu"] == gpu) {
        let at = sample["time_us"].as_u64().context("time_us")?;
        if let Some(last) = last {
            busy += busy_percent(sample) / 100.0 * (at - last) as f64 / 1e6;
        }
        last = Some(at);
    }
    Ok(busy)
}

/// Per container: credited less true seconds, and the stated standard error.
fn shares(page: &[Sample], truth: &Value, uuid: &str, owners: &HashMap<u32, String>) -> Result<Vec<(f64, f64)>> {
    let mut containers: BTreeMap<&str, f64> = BTreeMap::new();
    for process in truth["processes"].as_array().context("processes")? {
        let id = &owners[&(process["pid"].as_u64().context("pid")? as u32)];
        *containers.entry(id).or_default() += process["gpu_seconds"].as_f64().context("gpu_seconds")?;
    }
    let mut errors = Vec::new();
    for (id, real) in containers {
        let got = value(page, uuid, "container_gpu_seconds_total", &[("container_id", id)]);
        let stderr = value(page, uuid, "container_gpu_seconds_stderr", &[("container_id", id)]);
        // With only a handful of samples, their spread is a poor estimate of the error; a bound from the truth is used then.
        let least = (real * PERIOD_S).sqrt();
        let bound = 4.5 * stderr.max(least) + 0.15;
        assert!((got - real).abs() <= bound, "{uuid} {id}: estimated {got}, true {real}, standard error {stderr}");
        errors.push((got - real, stderr));
    }
    Ok(errors)
}
