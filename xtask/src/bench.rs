//! `bench`: speed and memory, as tables; each number beside its aim. Not part of `test`: machines are shared and noisy. `bench peers`
//! compares with what others run, and runs only when it is named: it fetches them first.

use crate::{build, build::Profile, dockerd, ebpf, janitor::Cleanup, sys, test, tools};
use anyhow::Result;

/// The bench that needs other people's programs.
const PEERS: &str = "peers";

pub fn verb(filters: &[String]) -> Result<()> {
    test::prepare(filters)?;
    let built = build::everything(Profile::Release)?;
    tools::run(&mut tools::cargo(&["build", "--release", "--locked", "--package", "gpu-sampler-tests", "--bin", "actor"])?)?;
    let actor = built.sampler.with_file_name("actor");
    let storage = ebpf::build_storage_bench()?;
    sys::catch_signals();
    let mut cleanup = Cleanup::start()?;
    let (docker, mut engine) = dockerd::ensure(&mut cleanup)?;
    let mut benches = tools::cargo(&["bench", "--package", "gpu-sampler-benches", "--locked"])?;
    let peers = filters.iter().any(|filter| filter == PEERS);
    let chosen: &[&str] = match filters {
        [] => &["core", "kernel", "labels", "reports", "tables"],
        [_] if peers => &[PEERS],
        // The pure core's are criterion's, which takes one filter at most.
        _ if peers => &["kernel", "labels", "reports", "tables", PEERS],
        _ => &["kernel", "labels", "reports", "tables"],
    };
    benches.args(chosen.iter().flat_map(|name| ["--bench", name]));
    if filters.is_empty() {
        tools::say("bench: `peers` is left out, it runs only when it is named: it fetches other programs first");
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
