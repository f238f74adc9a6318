//! Replays what `cargo xtask gpu` records: files from real GPUs, where there are any, and one made from the simulator in each test.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::recording::{self, Average, MOST_BYTES, RecordedGpu, Recording};
use gpu_sampler_tests::{Sim, var};

/// Poll intervals below the grid and one above it, where answers must be split, with the process queries that each poll may make.
const PACES: [(u64, usize); 4] = [(20_000, 4), (50_000, 4), (80_000, 4), (400_000, 12)];

fn replay(name: &str, gpu: &RecordedGpu) -> Result<()> {
    for (every_us, calls) in PACES {
        for average in [Average::OverNamed, Average::OverAll] {
            let replayed = recording::replay(&gpu.raw, average, every_us, calls);
            let replayed = replayed.with_context(|| format!("{name}, GPU {}, every {every_us} us, {average:?}", gpu.index))?;
            println!("{name}, GPU {}, every {every_us} us, {average:?}: {replayed:?}", gpu.index);
        }
    }
    Ok(())
}

#[test]
fn recordings_of_real_gpus_replay_without_loss() -> Result<()> {
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
fn a_folder_without_recordings_is_accepted() -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("README.md"), "none")?;
    assert_eq!(recording::all_in(folder.path())?.len(), 0);
    assert_eq!(recording::all_in(&folder.path().join("missing"))?.len(), 0);
    std::fs::write(folder.path().join("x.json"), "{}")?;
    assert!(recording::all_in(folder.path()).is_err());
    Ok(())
}

/// Records the simulated GPUs of a world with `xtask gpu`. Returns the table and the file.
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

/// Records two GPUs, the first under load, the second idle; the findings have to match the world.
fn check(world: &str, seconds: &str, expect: &[(&str, &str)]) -> Result<()> {
    let (table, recording) = record(&format!("driver_version = '550.54.14'\n{world}"), seconds)?;
    for gpu in &recording.gpus {
        replay("recorded now", gpu)?;
    }
    let gpu = recording.gpus.first().context("GPU 0")?;
    ensure!(gpu.raw.process_samples().count() > 20, "{} process samples", gpu.raw.process_samples().count());
    for (about, seen) in expect {
        let finding = gpu.findings.iter().find(|finding| finding.about == *about).with_context(|| table.clone())?;
        ensure!(finding.seen.contains(seen) && finding.agrees != Some(false), "{about}: expected {seen}\n{table}");
    }
    for (call, bytes) in
        [("GetComputeRunningProcesses_v3", 24), ("GetProcessUtilization", 32), ("GetProcessesUtilizationInfo", 40)]
    {
        let stride = gpu.strides.get(&format!("nvmlDevice{call}")).with_context(|| format!("{call}: {table}"))?;
        ensure!(stride.length == Some(bytes) && stride.pids_live > 0, "{call}: {stride:?}");
    }
    costs(gpu).context(table)?;
    ensure!(
        gpu.again.iter().all(|(queries, again)| *queries > 0 && *again == 0),
        "lastSeen excludes its own stamp: {:?}",
        gpu.again
    );
    ensure!(gpu.ended.0 > 20, "processes of samples were looked up: {:?}", gpu.ended);
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

/// Asserts that every call of the agent was timed in both states of the GPU, and that calls this driver lacks are named.
fn costs(gpu: &RecordedGpu) -> Result<()> {
    let lacking = ["GetTotalEnergyConsumption", "GpmSampleGet", "GetMigMode"];
    ensure!(gpu.costs.len() > 20, "{} calls", gpu.costs.len());
    for (call, cost) in gpu.costs.iter().filter(|(call, _)| !lacking.contains(&call.as_str())) {
        for (state, times) in [("idle", cost.idle), ("loaded", cost.loaded)] {
            let ordered = times.p50_us > 0.0 && times.p50_us <= times.p99_us && times.p99_us <= times.max_us;
            ensure!(times.count >= 3 && ordered, "{call}, {state}: {times:?}, {:?}", cost.errors);
        }
    }
    let energy = gpu.costs.get(lacking[0]).context("energy")?;
    ensure!(energy.errors.get("NotSupported") == Some(&3) && energy.loaded.count == 0, "{energy:?}");
    Ok(())
}

#[test]
fn a_default_world_is_recorded_and_replayed() -> Result<()> {
    check(
        "[[gpus]]\nname = 'Simulated card'\nclock_offset_us = 12900000\n[[gpus]]\nidle_ring = 'dry'",
        "20s",
        &[
            ("grid", "median 167.1 ms"),
            ("pid rule", "the process at the instant"),
            ("stamp of a process sample", "distance 50 %, 95 %: 0.0, 0.0 ms"),
            ("clock of the stamps", "since the epoch, 12"),
            ("sample buffer of an idle GPU", "continues"),
        ],
    )
}

#[test]
fn a_world_with_other_rules_is_recorded_as_it_is() -> Result<()> {
    check(
        "[[gpus]]\nname = 'Simulated card'\npid_rule = 'last'\nperiod_us = 100000\nclock = 'boot'\nidle_ring = 'dry'\n\
         row_stamps = 'process'",
        "20s",
        &[
            ("grid", "median 100.0 ms"),
            ("pid rule", "the last process of the period"),
            ("clock of the stamps", "since boot"),
            ("sample buffer of an idle GPU", "dry for up to"),
        ],
    )
}
