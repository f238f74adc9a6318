//! `bench`: speed and memory, as tables; each number beside its aim. Not part of `test`: machines are shared and noisy.

use crate::{build, build::Profile, dockerd, ebpf, janitor::Cleanup, sys, test, tools};
use anyhow::Result;

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
    if !filters.is_empty() {
        // The pure core's are criterion's, which takes one filter at most.
        benches.args(["--bench", "kernel", "--bench", "labels", "--bench", "tables", "--"]).args(filters);
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
