//! The whole agent on drivers with slow calls and default budgets: the time it observes, the precision of shares, and its cost.

use anyhow::Result;
use gpu_sampler_benches::wanted;
use gpu_sampler_tests::latency::{Cell, ShareError, rms, run};

const CALLS_US: [u64; 5] = [50, 500, 2_000, 5_000, 10_000];
/// (GPUs, one lock for all of them).
const NODES: [(usize, bool); 4] = [(1, false), (8, false), (8, true), (16, true)];
const SECONDS: u64 = 40;
/// Errors are pooled by the share of samples with a queried process, in percent.
const QUERIED: [(f64, f64); 4] = [(0.0, 10.0), (10.0, 40.0), (40.0, 95.0), (95.0, 101.0)];

/// Sum of the errors relative to the true seconds, and its standard error; percent.
fn bias(errors: &[ShareError]) -> (f64, f64) {
    let real: f64 = errors.iter().map(|error| error.real).sum();
    let off: f64 = errors.iter().map(|error| error.off).sum();
    let scatter = rms(errors, |error| error.off) * (errors.len() as f64).sqrt();
    (100.0 * off / real, 100.0 * scatter / real)
}

fn run_cell(cell: Cell) -> Result<(f64, Vec<ShareError>)> {
    let outcome = run(cell, &["--gpu-wait-percent", "2", "--gpu-budget-percent", "1"])?;
    println!(
        "{:>7} {:>5} {:>4} | {:>8.2} % {:>11.2} % {:>6.0} % {:>8.2} {:>9.2} | {:>7.1} {:>8.2} % {:>5.2} %",
        cell.call_us as f64 / 1e3,
        cell.gpus,
        if cell.one_lock { "one" } else { "-" },
        outcome.unobserved_ratio * 100.0,
        outcome.unattributed_ratio * 100.0,
        outcome.queried_ratio * 100.0,
        rms(&outcome.errors, |error| error.off),
        rms(&outcome.errors, |error| error.stated),
        outcome.calls_a_second,
        outcome.wait_ratio * 100.0,
        outcome.cpu_ratio * 100.0,
    );
    Ok((outcome.queried_ratio * 100.0, outcome.errors))
}

fn main() -> Result<()> {
    if !wanted("latency") {
        return Ok(());
    }
    println!(
        "errors are of shares of a GPU that two containers share over {SECONDS} s, root mean square; CPU is of one processor, including"
    );
    println!("the simulated driver; waited is the share of time that one GPU's thread is in calls");
    println!("call ms  GPUs lock | unobserved  no container  queried  error s  stated s | calls/s     waited     CPU");
    let mut errors = Vec::new();
    for (gpus, one_lock) in NODES {
        for call_us in CALLS_US {
            let cell = Cell { call_us, gpus, one_lock, seconds: SECONDS, seed: call_us };
            match run_cell(cell) {
                Ok(of_cell) => errors.push(of_cell),
                Err(error) => println!("{cell:?} failed: {error:#}"),
            }
        }
    }
    println!("  queried | shares     bias %  error s  stated s  within one  within two");
    for (from, to) in QUERIED {
        let pooled =
            |(queried, errors): &(f64, Vec<ShareError>)| if (from..to).contains(queried) { errors.clone() } else { Vec::new() };
        let all: Vec<ShareError> = errors.iter().flat_map(pooled).collect();
        if all.is_empty() {
            continue;
        }
        let (n, (bias, bias_error)) = (all.len(), bias(&all));
        let within = |k: f64| 100.0 * all.iter().filter(|error| error.is_within(k)).count() as f64 / n as f64;
        println!(
            "{from:>3.0}-{:>3.0} % | {n:>6} {bias:>+5.1} ± {bias_error:>3.1} {:>8.2} {:>9.2} {:>9.0} % {:>9.0} %",
            to.min(100.0),
            rms(&all, |error| error.off),
            rms(&all, |error| error.stated),
            within(1.0),
            within(2.0)
        );
    }
    Ok(())
}
