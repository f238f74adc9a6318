//! `bench`: measures speed and memory and prints them as tables, with targets. Not part of `test`, since machines are shared and noisy.
//! `bench peers` compares with other exporters, which it downloads first; `bench latency` runs worlds with slow drivers for half an hour.
//! Both run only when they are named.

use crate::{build, build::Profile, dockerd, ebpf, janitor::Cleanup, sys, test, tools};
use anyhow::Result;

/// The bench that needs the programs of other projects.
const PEERS: &str = "peers";
/// The bench that takes half an hour.
const LATENCY: &str = "latency";

pub fn verb(filters: &[String]) -> Result<()> {
    test::prepare(filters)?;
    let built = build::with_helpers(Profile::Release, &["actor"])?;
    let actor = built.sampler.with_file_name("actor");
    let storage = ebpf::build_storage_bench()?;
    sys::catch_signals();
    let mut cleanup = Cleanup::start()?;
    let (docker, mut engine) = dockerd::ensure(&mut cleanup)?;
    let mut benches = tools::cargo(&["bench", "--package", "gpu-sampler-benches", "--locked"])?;
    let peers = filters.iter().any(|filter| filter == PEERS);
    let latency = filters.iter().any(|filter| filter == LATENCY);
    let chosen: &[&str] = match filters {
        [] => &["core", "kernel", "labels", "reports", "tables"],
        [_] if peers => &[PEERS],
        [_] if latency => &[LATENCY],
        // The bench of the pure core uses criterion, which takes at most one filter.
        _ if latency => &["kernel", "labels", "reports", "tables", LATENCY],
        _ if peers => &["kernel", "labels", "reports", "tables", PEERS],
        _ => &["kernel", "labels", "reports", "tables"],
    };
    benches.args(chosen.iter().flat_map(|name| ["--bench", name]));
    if filters.is_empty() {
        tools::progress("bench: `peers` and `latency` are skipped: they run only when named");
    } else {
        benches.arg("--").args(filters);
    }
    benches
        .env("GPU_SAMPLER_BIN", built.sampler)
        .env("NVML_SIM_BIN", built.sim)
        .env("NVML_SIM_LIBRARY", built.sim_library)
        .env("ACTOR_BIN", actor)
        .env("STORAGE_BENCH_OBJECT", storage)
        .env("DOCKER_HOST", docker);
    let done = test::run(benches, &mut cleanup);
    drop(cleanup);
    if let Some(engine) = &mut engine {
        let _reaped = engine.wait();
    }
    done
}
