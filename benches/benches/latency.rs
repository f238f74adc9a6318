//! The whole agent on drivers whose calls take time: what it still observes, how precise shares are, and what it costs. Default budgets.

use anyhow::Result;
use gpu_sampler_benches::wanted;
use gpu_sampler_tests::latency::{Cell, Outcome, run};

const CALLS_US: [u64; 5] = [50, 500, 2_000, 5_000, 10_000];
/// (GPUs, one lock for all of them).
const NODES: [(usize, bool); 4] = [(1, false), (8, false), (8, true), (16, true)];
const SECONDS: u64 = 40;

fn main() -> Result<()> {
    if !wanted("latency") {
        return Ok(());
    }
    println!(
        "call ms  GPUs lock | unobserved  no container  queried  bias %  error s  stated s  in 1  in 2 | calls/s  waited %  CPU %"
    );
    for (gpus, one_lock) in NODES {
        for call_us in CALLS_US {
            // A GPU alone has one pair of users: several seeds.
            let seeds = if gpus == 1 { 3 } else { 1 };
            let mut all = Outcome::default();
            for seed in 0..seeds {
                let cell = Cell { call_us, gpus, one_lock, seconds: SECONDS, seed };
                let one = run(cell, &["--gpu-wait-percent", "2", "--gpu-budget-percent", "1"])?;
                let errors = [std::mem::take(&mut all.errors), one.errors.clone()].concat();
                let part = |sum: f64, of: f64| sum + of / seeds as f64;
                all = Outcome {
                    unobserved_ratio: part(all.unobserved_ratio, one.unobserved_ratio),
                    queried_ratio: part(all.queried_ratio, one.queried_ratio),
                    unattributed_ratio: part(all.unattributed_ratio, one.unattributed_ratio),
                    busy_off_ratio: part(all.busy_off_ratio, one.busy_off_ratio),
                    bias_ratio: part(all.bias_ratio, one.bias_ratio),
                    calls_a_second: part(all.calls_a_second, one.calls_a_second),
                    cpu_ratio: part(all.cpu_ratio, one.cpu_ratio),
                    wait_ratio: part(all.wait_ratio, one.wait_ratio),
                    errors,
                };
            }
            println!(
                "{:>7} {gpus:>5} {:>4} | {:>8.2} % {:>11.2} % {:>6.0} % {:>+7.1} {:>8.2} {:>9.2} {:>5.2} {:>5.2} | {:>7.1} {:>9.2} {:>6.2}",
                call_us as f64 / 1e3,
                if one_lock { "one" } else { "-" },
                all.unobserved_ratio * 100.0,
                all.unattributed_ratio * 100.0,
                all.queried_ratio * 100.0,
                all.bias_ratio * 100.0,
                all.rms(|one| one.0),
                all.rms(|one| one.1),
                all.within(1.0),
                all.within(2.0),
                all.calls_a_second,
                all.wait_ratio * 100.0,
                all.cpu_ratio * 100.0,
            );
        }
    }
    Ok(())
}
