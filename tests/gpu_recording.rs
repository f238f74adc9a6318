//! What `cargo xtask gpu` records is replayed: recordings of real GPUs, where there are any, and one made of the simulator each time.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::recording::{self, MOST_BYTES, RecordedGpu, Recording};
use gpu_sampler_tests::{Sim, var};

/// Paces of polling below the grid, one above it that needs taking apart, and calls for rows that each poll may make.
const PACES: [(u64, usize); 4] = [(20_000, 4), (50_000, 4), (80_000, 4), (400_000, 12)];

fn replay(name: &str, gpu: &RecordedGpu) -> Result<()> {
    for (every_us, calls) in PACES {
        let told = recording::replay(&gpu.raw, every_us, calls);
        let told = told.with_context(|| format!("{name}, GPU {}, every {every_us} us", gpu.index))?;
        println!("{name}, GPU {}, every {every_us} us: {told:?}", gpu.index);
    }
    Ok(())
}

#[test]
fn recordings_of_real_gpus() -> Result<()> {
    let all = recording::all_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gpu"))?;
    println!("{} recordings", all.len());
    for (name, recording) in all {
        for gpu in &recording.gpus {
            replay(&name, gpu)?;
        }
    }
    Ok(())
}

#[test]
fn a_folder_with_none_is_no_failure() -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("README.md"), "none")?;
    assert_eq!(recording::all_in(folder.path())?.len(), 0);
    assert_eq!(recording::all_in(&folder.path().join("missing"))?.len(), 0);
    std::fs::write(folder.path().join("x.json"), "{}")?;
    assert!(recording::all_in(folder.path()).is_err());
    Ok(())
}

/// Records the simulated GPUs of a world by the verb; what it has written.
fn record(world: &str, seconds: &str) -> Result<(String, Recording)> {
    let sim = Sim::new(world)?;
    let folder = tempfile::tempdir()?;
    let output = Command::new(var("XTASK_BIN")?)
        .args(["gpu", "--for", seconds, "--nvml-lib"])
        .arg(sim.library())
        .arg("-o")
        .arg(folder.path())
        .stdin(Stdio::null())
        .output()?;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{table}{}", String::from_utf8_lossy(&output.stderr));
    let mut all = recording::all_in(folder.path())?;
    ensure!(all.len() == 1, "{} files", all.len());
    println!("{table}");
    let (name, recording) = all.remove(0);
    let text = std::fs::read_to_string(folder.path().join(&name))?;
    ensure!(text.len() <= MOST_BYTES && !text.contains("GPU-"), "{} bytes, or a UUID in it", text.len());
    ensure!(name == "550.54.14-simulated-card.json", "{name}");
    Ok((table, recording))
}

/// GPU 0 by one rule, GPU 1 by nobody; the verdicts have to be the world's.
fn check(world: &str, seconds: &str, expect: &[(&str, &str)]) -> Result<()> {
    let (table, recording) = record(&format!("driver_version = '550.54.14'\n{world}"), seconds)?;
    for gpu in &recording.gpus {
        replay("recorded now", gpu)?;
    }
    let gpu = recording.gpus.first().context("GPU 0")?;
    ensure!(gpu.raw.rows().count() > 20, "{} rows", gpu.raw.rows().count());
    for (about, seen) in expect {
        let finding = gpu.findings.iter().find(|finding| finding.about == *about).with_context(|| table.clone())?;
        ensure!(finding.seen.contains(seen) && finding.agrees != Some(false), "{about}: wants {seen}\n{table}");
    }
    for (call, bytes) in
        [("GetComputeRunningProcesses_v3", 24), ("GetProcessUtilization", 32), ("GetProcessesUtilizationInfo", 40)]
    {
        let stride = gpu.strides.get(&format!("nvmlDevice{call}")).with_context(|| format!("{call}: {table}"))?;
        ensure!(stride.length == Some(bytes) && stride.pids_live > 0, "{call}: {stride:?}");
    }
    costs(gpu).context(table)?;
    ensure!(gpu.again.iter().all(|(asked, again)| *asked > 0 && *again == 0), "lastSeen is strict: {:?}", gpu.again);
    ensure!(gpu.ended.0 > 20, "rows were looked up: {:?}", gpu.ended);
    let unprivileged = &recording.unprivileged;
    ensure!(unprivileged["problem"].is_null() && unprivileged["rows"].as_u64() > Some(0), "{unprivileged}");
    ensure!(recording.load["kind"] == "simulated" && recording.load["problem"].is_null(), "{}", recording.load);
    let agent = &recording.agent;
    ensure!(agent["ebpf_loaded"] == true, "{agent}");
    let containers = agent["containers"].as_array().context("containers")?;
    let named = |pod: &str| containers.iter().any(|c| c["pod"] == pod && c["seconds"].as_f64().is_some_and(|s| s > 0.5));
    ensure!(named("duty-60") && named("duty-30"), "{agent}");
    Ok(())
}

/// Every call that the agent makes was timed in both states of the GPU, and what this driver lacks is named.
fn costs(gpu: &RecordedGpu) -> Result<()> {
    let lacking = ["GetTotalEnergyConsumption", "GpmSampleGet", "GetMigMode"];
    ensure!(gpu.costs.len() > 20, "{} calls", gpu.costs.len());
    for (call, cost) in gpu.costs.iter().filter(|(call, _)| !lacking.contains(&call.as_str())) {
        for (state, of) in [("idle", cost.idle), ("loaded", cost.loaded)] {
            let ordered = of.p50_us > 0.0 && of.p50_us <= of.p99_us && of.p99_us <= of.max_us;
            ensure!(of.count >= 10 && ordered, "{call}, {state}: {of:?}, {:?}", cost.errors);
        }
    }
    let energy = gpu.costs.get(lacking[0]).context("energy")?;
    ensure!(energy.errors.get("NotSupported") == Some(&3) && energy.loaded.count == 0, "{energy:?}");
    Ok(())
}

#[test]
fn the_simulator_is_recorded_and_replayed() -> Result<()> {
    check(
        "[[gpus]]\nname = 'Simulated card'\nclock_offset_us = 12000000\n[[gpus]]\nidle_ring = 'dry'",
        "20s",
        &[
            ("grid", "median 167.1 ms"),
            ("whom a sample names", "who is there at the instant"),
            ("a row's stamp", "distance 50 %, 95 %: 0.0, 0.0 ms"),
            ("the stamps' clock", "since the epoch, 119"),
            ("the ring of an idle GPU", "goes on"),
        ],
    )
}

#[test]
fn what_differs_is_recorded_as_it_is() -> Result<()> {
    check(
        "[[gpus]]\nname = 'Simulated card'\npid_rule = 'last'\nperiod_us = 100000\nclock = 'boot'\nidle_ring = 'dry'\n\
         row_stamps = 'process'",
        "20s",
        &[
            ("grid", "median 100.0 ms"),
            ("whom a sample names", "the last of the period"),
            ("the stamps' clock", "since boot"),
            ("the ring of an idle GPU", "dry for up to"),
        ],
    )
}
