//! `soak`: runs the agent for a long time with random faults and checks what must always hold; docs/soak.md describes it.

use crate::{
    build::{self, Profile},
    dockerd,
    janitor::{self, Cleanup, Leftover},
    sys, test, tools,
};
use anyhow::{Result, bail};
use std::process::Command;

/// Builds what the tests use, and passes the arguments on.
pub fn verb(args: &[String]) -> Result<()> {
    if args.iter().any(|word| matches!(word.as_str(), "--help" | "-h")) {
        println!("cargo xtask soak [--for 30m] [--seed N] [--faults NAME,..]");
        return Ok(());
    }
    test::prepare(&[])?;
    let built = build::everything(Profile::Debug)?;
    let program = build::debug_helper("soak")?;

    sys::catch_signals();
    let mut cleanup = Cleanup::start()?;
    janitor::remove_test_cgroups()?;
    cleanup.will_remove(&Leftover::TestCgroups)?;
    let tmp = cleanup.temporary("gpu-sampler-soak")?;
    let (docker, mut engine) = dockerd::ensure(&mut cleanup)?;
    let mut soak = Command::new(program);
    // The world, the disk of sessions and the logs are below this folder.
    tools::forget_cargo(&mut soak)
        .args(args)
        .env("TMPDIR", &tmp)
        .env("GPU_SAMPLER_BIN", &built.sampler)
        .env("NVML_SIM_BIN", &built.sim)
        .env("NVML_SIM_LIBRARY", &built.sim_library)
        .env("DOCKER_HOST", &docker);
    let done = test::run(soak, &mut cleanup);
    drop(cleanup);
    if let Some(engine) = &mut engine {
        let _reaped = engine.wait();
    }
    if let Some(signal) = sys::interrupted() {
        bail!("interrupted by signal {signal}");
    }
    done
}
