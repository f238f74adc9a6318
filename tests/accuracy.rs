//! Accuracy of the estimator against the simulator's own record (exact timeline and recorded samples), for both pid rules, with a fixed
//! seed.

use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::record::busy_percent;
use gpu_sampler_tests::{Agent, Docker, Sim, sum};

const DEMANDS: [f64; 3] = [0.6, 0.3, 0.1];
/// Per GPU: the pid rule, and the index of the first container that uses the GPU.
const GPUS: [(&str, usize); 6] = [("instant", 0), ("last", 0), ("instant", 1), ("last", 1), ("instant", 2), ("last", 2)];
/// Rounding of samples to integer percent, and the partial slices at both ends of a load; seconds.
const ROUNDING: f64 = 0.1;

#[test]
fn credited_seconds_are_within_five_standard_errors_of_the_truth() -> Result<()> {
    let gpus: String = GPUS.iter().map(|(rule, _)| format!("[[gpus]]\npid_rule = '{rule}'\n")).collect();
    let sim = Sim::new(&format!("seed = 42\n{gpus}"))?;
    let docker = Docker::new()?;
    let agent = Agent::start(Some(&sim), &[])?;
    let pods = (0..DEMANDS.len()).map(|i| docker.pod("accuracy", &format!("pod-{i}"), 300)).collect::<Result<Vec<_>>>()?;
    let mut loads = Vec::new();
    for (gpu, (_, first)) in GPUS.iter().enumerate() {
        for i in *first..DEMANDS.len() {
            loads.push(sim.load(pods[i].1, gpu, DEMANDS[i], &["--for", "60s"])?);
        }
    }
    for load in &mut loads {
        assert!(load.0.wait()?.success());
    }
    // The last window closes at most 10 s after it began, and samples settle within half a second.
    std::thread::sleep(Duration::from_secs(12));
    agent.scrape()?;
    let page = agent.scrape()?;
    let truth = sim.truth(&[])?;
    let samples = sim.truth(&["--samples"])?;
    for (gpu, (rule, first)) in GPUS.iter().enumerate() {
        let true_gpu = &truth["gpus"][gpu];
        let uuid = true_gpu["uuid"].as_str().context("uuid")?;
        let total =
            |name: &str, labels: &[(&str, &str)]| sum(&page, name, &[&[("uuid", uuid)], labels].concat()).unwrap_or_default();
        let busy = total("gpu_time_seconds_total", &[("state", "busy")]);
        let recorded: f64 = samples.as_array().context("samples")?.iter().filter(|s| s["gpu"] == gpu).map(busy_percent).sum();
        let recorded = recorded / 100.0 * 0.167139;
        let credited = total("container_gpu_seconds_total", &[]);
        let unattributed = total("gpu_unattributed_seconds_total", &[]);
        assert!((busy - recorded).abs() < 0.02, "GPU {gpu} {rule}: busy {busy}, recorded {recorded}");
        assert!((credited + unattributed - busy).abs() < 1e-6, "GPU {gpu} {rule}: {credited} + {unattributed} is not {busy}");
        let n = total("container_gpu_samples_total", &[]);
        for (i, (id, pid)) in pods.iter().enumerate().skip(*first) {
            let processes = true_gpu["processes"].as_array().context("processes")?;
            let real = processes
                .iter()
                .find(|p| p["pid"] == *pid)
                .and_then(|p| p["gpu_seconds"].as_f64())
                .context("the process in truth")?;
            let got = total("container_gpu_seconds_total", &[("container_id", id)]);
            let all = true_gpu["busy_seconds"].as_f64().context("busy")?;
            let share = real / all;
            let stderr = all * (share * (1.0 - share) / n).sqrt();
            println!(
                "GPU {gpu} {rule} demand {}: estimated {got:.3} s, true {real:.3} s, standard error {stderr:.3} s, {n} samples",
                DEMANDS[i]
            );
            assert!(
                (got - real).abs() <= 5.0 * stderr + ROUNDING,
                "GPU {gpu} {rule}, demand {}: estimated {got}, true {real}, standard error {stderr}",
                DEMANDS[i]
            );
        }
    }
    Ok(())
}
