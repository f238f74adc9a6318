//! `test`: runs everything: unit tests, then the privileged tests on the real kernel and real engines.

use crate::{
    build::{self, Profile},
    dockerd,
    failures::{Failure, Failures},
    janitor::{self, Cleanup, Leftover},
    setup, sys,
    tools::{self, progress, shown},
};
use anyhow::{Context, Result, bail};
use devkit::process::start_time;
use std::{
    env,
    io::{self, BufRead as _, BufReader, Write as _},
    process::{ChildStdout, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// The package of the tests that need root, a kernel and engines.
const PRIVILEGED: &str = "gpu-sampler-tests";
/// More failed tests than this are not repeated: the machine is not the reason.
const REPEATED_MOST: usize = 5;
/// A failed test has to pass as many times in a row.
const REPEATS: usize = 2;
/// Time for the rest of a command's output after its end.
const REST: Duration = Duration::from_secs(5);
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
    let privileged = |words: &[String]| -> Result<Command> {
        let args = ["test", "--package", PRIVILEGED, "--locked", "--no-fail-fast", "--", "--test-threads=1", "--show-output"];
        let mut command = tools::cargo(&args)?;
        command
            .args(words)
            .env("GPU_SAMPLER_EBPF_OBJECT", tools::ebpf_object())
            .env("GPU_SAMPLER_BIN", &built.sampler)
            .env("NVML_SIM_BIN", &built.sim)
            .env("NVML_SIM_LIBRARY", &built.sim_library)
            .env("XTASK_BIN", env::current_exe()?)
            .env("DOCKER_HOST", &docker);
        // The line that a failed test ended at.
        if env::var_os("RUST_BACKTRACE").is_none() {
            command.env("RUST_BACKTRACE", "1");
        }
        Ok(command)
    };
    let privileged = run_and_repeat(privileged, filters, &mut cleanup);
    drop(cleanup);
    if let Some(engine) = &mut engine {
        let _reaped = engine.wait();
    }
    privileged.and(unit)
}

/// The privileged tests measure time on machines that are shared. If a few of them fail, each is repeated and has to pass every time: a
/// defect that shows in every second run passes the repeats in one of four cases. The output ends with the names of such tests.
fn run_and_repeat(command: impl Fn(&[String]) -> Result<Command>, filters: &[String], cleanup: &mut Cleanup) -> Result<()> {
    let (ended, observed) = run_observed(command(filters)?, cleanup);
    let (Err(problem), Some(failures)) = (&ended, observed.finish()) else { return ended };
    if failures.is_empty() || sys::interrupted().is_some() {
        return ended;
    }
    report(&failures);
    if failures.len() > REPEATED_MOST {
        progress(format_args!("{} tests failed; at most {REPEATED_MOST} are repeated", failures.len()));
        return ended;
    }
    progress(format_args!("{problem:#}; each failed test has to pass {REPEATS} times in a row now"));
    let words: Vec<String> = ["--exact".to_owned()].into_iter().chain(failures.iter().map(|f| f.name.clone())).collect();
    for _ in 0..REPEATS {
        let (ended, observed) = run_observed(command(&words)?, cleanup);
        let passed = observed.passed;
        report(observed.finish().as_deref().unwrap_or_default());
        ended?;
        // A runner that finds no test of a name succeeds.
        if passed < failures.len() {
            bail!("{} tests failed, and only {passed} of them were found for the repeat", failures.len());
        }
    }
    for failure in &failures {
        progress(format_args!("unsteady: {} failed once and passed {REPEATS} times", failure.name));
    }
    Ok(())
}

fn report(failures: &[Failure]) {
    for failure in failures {
        let stolen = failure
            .stolen
            .map_or_else(String::new, |share| format!(" ({:.0} % of the processors' time was stolen)", share * 100.0));
        progress(format_args!("failed: {}{stolen}", failure.name));
        failure.message.iter().for_each(|line| eprintln!("    {line}"));
    }
}

/// Like [`run`]. The second value is what the output shows.
fn run_observed(mut command: Command, cleanup: &mut Cleanup) -> (Result<()>, Failures) {
    let failures = Arc::new(Mutex::new(Failures::default()));
    let mut reader = None;
    command.stdout(Stdio::piped());
    let ended = run_with(command, cleanup, |stdout| {
        let failures = Arc::clone(&failures);
        reader = Some(thread::spawn(move || pass_on(stdout, &failures)));
    });
    // A process that outlives its test may keep the pipe open.
    let since = Instant::now();
    while reader.as_ref().is_some_and(|reader| !reader.is_finished()) && since.elapsed() < REST {
        thread::sleep(Duration::from_millis(50));
    }
    let observed = std::mem::take(&mut *failures.lock().unwrap_or_else(PoisonError::into_inner));
    (ended, observed)
}

fn pass_on(stdout: ChildStdout, failures: &Mutex<Failures>) -> io::Result<()> {
    let (mut from, mut line) = (BufReader::new(stdout), Vec::new());
    while from.read_until(b'\n', &mut line)? > 0 {
        io::stdout().write_all(&line)?;
        let text = String::from_utf8_lossy(&line);
        failures.lock().unwrap_or_else(PoisonError::into_inner).line(text.trim_end_matches('\n'));
        line.clear();
    }
    Ok(())
}

/// Runs the command in a process group of its own, so that the whole group can be ended.
pub fn run(command: Command, cleanup: &mut Cleanup) -> Result<()> {
    run_with(command, cleanup, |_| {})
}

fn run_with(mut command: Command, cleanup: &mut Cleanup, piped: impl FnOnce(ChildStdout)) -> Result<()> {
    progress(shown(&command));
    command.stdin(Stdio::null());
    sys::own_session(sys::dies_with_us(&mut command, libc::SIGKILL));
    let mut child = command.spawn().with_context(|| shown(&command))?;
    child.stdout.take().map(piped);
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
