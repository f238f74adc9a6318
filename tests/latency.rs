//! Driver calls that take milliseconds, with the default budgets: GPU time stays observed and attributed, shares are less precise.

use anyhow::Result;
use gpu_sampler_tests::latency::{Cell, rms, run};

/// The wait budget is the default one. That of processor time is not, on a machine that is busy with tests.
const ARGS: [&str; 2] = ["--gpu-wait-percent", "2"];

fn check(cell: Cell) -> Result<()> {
    let outcome = run(cell, &ARGS)?;
    println!("{cell:?}: {outcome:?}");
    assert!(outcome.unobserved_ratio < 0.001, "{cell:?}: {} of the time is unobserved", outcome.unobserved_ratio);
    // A load's first seconds, before a queried sample names it.
    assert!(outcome.unattributed_ratio < 0.04, "{cell:?}: {} of the busy time is on no container", outcome.unattributed_ratio);
    assert!(outcome.busy_off_ratio.abs() < 0.02, "{cell:?}: busy time is off by {}", outcome.busy_off_ratio);
    let (off, stated) = (rms(&outcome.errors, |one| one.off), rms(&outcome.errors, |one| one.stated));
    // Of a few users with a score of queried samples each: what those say of their own error is rough, and so is what errors scatter.
    assert!(off < 3.0 * stated + 0.1, "{cell:?}: {off} s off, {stated} s stated: {:?}", outcome.errors);
    // A share of one half of a score of samples is known to a ninth of the GPU.
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
