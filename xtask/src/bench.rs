//! `bench`: measures speed and memory and prints them as tables, with targets. Not part of `test`, since machines are shared and noisy.
//! `bench peers` compares with other exporters, which it downloads first; `bench latency` runs worlds with slow drivers for half an hour;
//! `bench node` runs nodes with up to a thousand GPU processes; `bench waits` measures the cost of wait probes and judges random plays. They
//! run only when they are named.

use crate::{build, build::Profile, dockerd, ebpf, janitor::Cleanup, setup, sys, test, tools};
use anyhow::Result;

/// Benches that run only when they are named, with their first word: the first takes minutes, the second half an hour, the third needs
/// the programs of other projects, the fourth takes two minutes and keeps a processor busy.
const NAMED: [&str; 4] = ["node", "latency", "peers", "waits"];

pub fn verb(filters: &[String]) -> Result<()> {
    test::prepare(filters)?;
    let built = build::with_helpers(Profile::Release, &["actor"])?;
    let actor = built.sampler.with_file_name("actor");
    let storage = ebpf::build_storage_bench()?;
    sys::catch_signals();
    let mut cleanup = Cleanup::start()?;
    let (docker, mut engine) = dockerd::ensure(&mut cleanup)?;
    let mut benches = tools::cargo(&["bench", "--package", "gpu-sampler-benches", "--locked"])?;
    let first_words: Vec<&str> = filters.iter().filter_map(|filter| filter.split('-').next()).collect();
    if first_words.contains(&"peers") {
        setup::ensure(setup::Scope::Peers, true)?;
    }
    let named: Vec<&str> = NAMED.into_iter().filter(|bench| first_words.contains(bench)).collect();
    let chosen: Vec<&str> = match filters {
        [] => vec!["core", "kernel", "labels", "reports", "tables"],
        _ if first_words.iter().all(|word| NAMED.contains(word)) => named,
        // The bench of the pure core uses criterion, which takes at most one filter.
        _ => [&["kernel", "labels", "reports", "tables"][..], &named].concat(),
    };
    benches.args(chosen.iter().flat_map(|name| ["--bench", name]));
    if filters.is_empty() {
        tools::progress(format_args!("bench: {} are skipped: they run only when named", NAMED.join(", ")));
    } else {
        benches.arg("--").args(filters);
    }
    benches
        .env("GPU_SAMPLER_BIN", built.sampler)
        .env("GPU_ACCURACY_BIN", built.accuracy)
        .env("NVML_SIM_BIN", built.sim)
        .env("NVML_SIM_LIBRARY", built.sim_library)
        .env("CUDA_WORK_BIN", built.cuda_work)
        .env("CUDA_SIM_LIBRARY", built.cuda_library)
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
