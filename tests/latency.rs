//! Driver calls that take milliseconds, with the default budgets: GPU time stays observed and attributed; shares are less precise.

use anyhow::Result;
use gpu_sampler_tests::latency::{Cell, rms, run};

/// The wait budget is the default; the processor budget is not, on a machine that is busy with tests.
const ARGS: [&str; 2] = ["--gpu-wait-percent", "2"];

fn check(cell: Cell) -> Result<()> {
    let outcome = run(cell, &ARGS)?;
    println!("{cell:?}: {outcome:?}");
    assert!(outcome.unobserved_ratio < 0.001, "{cell:?}: {} of the time is unobserved", outcome.unobserved_ratio);
    // Allows for a load's first seconds, before a queried sample names it.
    assert!(outcome.unattributed_ratio < 0.04, "{cell:?}: {} of the busy time is unattributed", outcome.unattributed_ratio);
    assert!(outcome.busy_off_ratio.abs() < 0.02, "{cell:?}: busy time is off by {}", outcome.busy_off_ratio);
    let (off, stated) = (rms(&outcome.errors, |error| error.off), rms(&outcome.errors, |error| error.stated));
    // There are a few users with some twenty queried samples each: their stated errors are rough, and so is the scatter of true errors.
    assert!(off < 4.0 * stated + 0.1, "{cell:?}: {off} s off, {stated} s stated: {:?}", outcome.errors);
    // Twenty samples determine a share of one half to within a ninth of the GPU.
    assert!(stated < 0.25 * cell.seconds as f64, "{cell:?}: {stated} s stated: {:?}", outcome.errors);
    Ok(())
}

#[test]
fn calls_of_ten_milliseconds_leave_no_time_unobserved() -> Result<()> {
    check(Cell { call_us: 10_000, gpus: 4, one_lock: false, seconds: 30, seed: 3 })
}

#[test]
fn calls_of_five_milliseconds_behind_one_lock_of_eight_gpus_leave_no_time_unobserved() -> Result<()> {
    check(Cell { call_us: 5_000, gpus: 8, one_lock: true, seconds: 30, seed: 4 })
}
