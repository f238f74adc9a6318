//! `test`: runs everything: unit tests, then the privileged tests on the real kernel and real engines.

use crate::{
    build::{self, Profile},
    dockerd,
    janitor::{self, Cleanup, Leftover},
    setup, sys,
    tools::{self, progress, shown},
};
use anyhow::{Context, Result, bail};
use devkit::process::start_time;
use std::{
    env,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The package of the tests that need root, a kernel and engines.
const PRIVILEGED: &str = "gpu-sampler-tests";
/// Time between asking the test runner to end and killing it.
const GRACE: Duration = Duration::from_secs(10);

/// Checks the preconditions of tests and benches that use the kernel and engines.
pub fn prepare(filters: &[String]) -> Result<()> {
    if let Some(option) = filters.iter().find(|word| word.starts_with('-')) {
        return Err(tools::unknown(option));
    }
    if !sys::is_root() {
        bail!("loading programs into the kernel and starting containers requires root");
    }
    setup::ensure(setup::Scope::Tests, true)
}

pub fn verb(filters: &[String]) -> Result<()> {
    prepare(filters)?;
    let built = build::everything(Profile::Debug)?;

    sys::catch_signals();
    let mut cleanup = Cleanup::start()?;
    janitor::remove_test_cgroups()?;
    cleanup.will_remove(&Leftover::TestCgroups)?;
    let mut unit = tools::cargo(&["test", "--workspace", "--exclude", PRIVILEGED, "--locked", "--no-fail-fast", "--"])?;
    unit.args(filters).env("GPU_SAMPLER_EBPF_OBJECT", tools::ebpf_object());
    let unit = run(unit, &mut cleanup);
    if let Err(problem) = &unit {
        progress(format_args!("{problem:#}; continuing with the privileged tests"));
    }
    if let Some(signal) = sys::interrupted() {
        bail!("interrupted by signal {signal}");
    }

    let (docker, mut engine) = dockerd::ensure(&mut cleanup)?;
    let mut privileged = tools::cargo(&["test", "--package", PRIVILEGED, "--locked", "--", "--test-threads=1", "--show-output"])?;
    privileged
        .args(filters)
        .env("GPU_SAMPLER_EBPF_OBJECT", tools::ebpf_object())
        .env("GPU_SAMPLER_BIN", built.sampler)
        .env("NVML_SIM_BIN", built.sim)
        .env("NVML_SIM_LIBRARY", built.sim_library)
        .env("XTASK_BIN", env::current_exe()?)
        .env("DOCKER_HOST", docker);
    let privileged = run(privileged, &mut cleanup);
    drop(cleanup);
    if let Some(engine) = &mut engine {
        let _reaped = engine.wait();
    }
    privileged.and(unit)
}

/// Runs the command in a process group of its own, so that the whole group can be ended.
pub fn run(mut command: Command, cleanup: &mut Cleanup) -> Result<()> {
    progress(shown(&command));
    command.stdin(Stdio::null());
    sys::own_session(sys::dies_with_us(&mut command, libc::SIGKILL));
    let mut child = command.spawn().with_context(|| shown(&command))?;
    let pid = child.id();
    cleanup.will_remove(&Leftover::Group { pid, start: start_time(pid).unwrap_or_default() })?;
    let mut ending_since: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait()? {
            if let Some(signal) = sys::interrupted() {
                bail!("interrupted by signal {signal}");
            }
            if !status.success() {
                bail!("`{}` failed ({status})", shown(&command));
            }
            return Ok(());
        }
        match ending_since {
            None if sys::interrupted().is_some() => {
                sys::kill(-(pid as i32), libc::SIGTERM);
                ending_since = Some(Instant::now());
            }
            Some(when) if when.elapsed() > GRACE => {
                sys::kill(-(pid as i32), libc::SIGKILL);
            }
            _ => {}
        }
        thread::sleep(Duration::from_millis(50));
    }
}
