//! `test`: runs everything: unit tests, then the privileged tests on the real kernel and real engines.

mod lanes;
mod noise;
mod outcome;

use crate::{
    arch::Arch,
    build::{self, Profile},
    dockerd,
    janitor::{self, Cleanup, Leftover},
    setup, sys,
    test::{lanes::Lanes, noise::Noise, outcome::Outcome},
    tools::{self, progress, shown},
};
use anyhow::{Context, Result, bail};
use devkit::process::start_time;
use std::{
    env,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The package of the tests that need root, a kernel and engines; those of its library need nothing.
const PRIVILEGED: &str = "gpu-sampler-tests";
/// More failed tests than this are not repeated: the machine is not the reason.
const REPEATED_MOST: usize = 5;
/// A failed test has to pass as many times in a row.
const REPEATS: usize = 2;
/// Time between asking the test runner to end and killing it.
const GRACE: Duration = Duration::from_secs(10);

/// The modules of tests that run while there is other work on the machine.
#[derive(Debug, PartialEq, Eq)]
enum Noisy {
    All,
    Modules(Vec<String>),
}

impl Noisy {
    /// `--noise` for all tests, `--noise=MODULE,..` for these; and the other arguments.
    fn of_arguments(args: &[String]) -> Result<(Self, &[String])> {
        match args.split_first() {
            Some((word, rest)) if word == "--noise" => Ok((Self::All, rest)),
            Some((word, rest)) => match word.strip_prefix("--noise=") {
                Some("") => bail!("--noise= names no module of tests, such as labels,doubles"),
                Some(modules) => Ok((Self::Modules(modules.split(',').map(str::to_owned).collect()), rest)),
                None => Ok((Self::Modules(Vec::new()), args)),
            },
            None => Ok((Self::Modules(Vec::new()), args)),
        }
    }

    /// The modules that none of these tests is in.
    fn unknown<'a>(&'a self, names: &[String]) -> Vec<&'a str> {
        let Self::Modules(modules) = self else { return Vec::new() };
        let is_known = |module: &str| names.iter().any(|name| name.split("::").next() == Some(module));
        modules.iter().map(String::as_str).filter(|module| !is_known(module)).collect()
    }

    /// `name`: as `module::test`.
    fn includes(&self, name: &str) -> bool {
        let module = name.split("::").next().unwrap_or(name);
        match self {
            Self::All => true,
            Self::Modules(modules) => modules.iter().any(|noisy| noisy == module),
        }
    }
}

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

pub fn verb(args: &[String]) -> Result<()> {
    let (noisy, filters) = Noisy::of_arguments(args)?;
    prepare(filters)?;
    let built = build::everything(Profile::Debug)?;

    sys::catch_signals();
    let mut cleanup = Cleanup::start()?;
    janitor::remove_test_cgroups()?;
    cleanup.will_remove(&Leftover::TestCgroups)?;
    let selections: [&[&str]; 2] = [&["--workspace", "--exclude", PRIVILEGED], &["--package", PRIVILEGED, "--lib"]];
    let unit = selections.iter().try_fold((), |(), selection| {
        let mut command = tools::cargo(&["test", "--locked", "--no-fail-fast"])?;
        command.args(*selection).arg("--").args(filters).env("GPU_SAMPLER_EBPF_OBJECT", Arch::host()?.ebpf_object());
        run(command, &mut cleanup)
    });
    if let Err(problem) = &unit {
        progress(format_args!("{problem:#}; continuing with the privileged tests"));
    }
    if let Some(signal) = sys::interrupted() {
        bail!("interrupted by signal {signal}");
    }

    let (docker, mut engine) = dockerd::ensure(&mut cleanup)?;
    let xtask = env::current_exe()?;
    let object = Arch::host()?.ebpf_object();
    let privileged = |program: &Path| {
        let mut command = Command::new(program);
        tools::forget_cargo(&mut command)
            .current_dir(tools::root().join("tests"))
            .env("GPU_SAMPLER_EBPF_OBJECT", &object)
            .env("GPU_SAMPLER_BIN", &built.sampler)
            .env("NVML_SIM_BIN", &built.sim)
            .env("NVML_SIM_LIBRARY", &built.sim_library)
            .env("GPU_ACCURACY_BIN", &built.accuracy)
            .env("CUDA_WORK_BIN", &built.cuda_work)
            .env("CUDA_SIM_LIBRARY", &built.cuda_library)
            .env("XTASK_BIN", &xtask)
            .env("DOCKER_HOST", &docker);
        // The line that a failed test ended at.
        if env::var_os("RUST_BACKTRACE").is_none() {
            command.env("RUST_BACKTRACE", "1");
        }
        command
    };
    let privileged = build::tests(PRIVILEGED).and_then(|program| {
        let lanes = Lanes::new(program, &privileged, &mut cleanup)?;
        let names = lanes.find(filters)?;
        progress(format_args!("{} privileged tests", names.len()));
        if names.is_empty() && filters.is_empty() {
            bail!("the program of the privileged tests has none");
        }
        let unknown = noisy.unknown(&names);
        if !unknown.is_empty() {
            bail!("--noise: no test to run is in the module {}", unknown.join(", "));
        }
        let (noisy, quiet): (Vec<String>, Vec<String>) = names.into_iter().partition(|name| noisy.includes(name));
        let done = run_and_repeat(&lanes, &quiet);
        if noisy.is_empty() {
            return done;
        }
        let noise = Noise::start(&privileged)?;
        progress(format_args!("{} tests while it runs", noisy.len()));
        let done = done.and(run_and_repeat(&lanes, &noisy));
        done.and(noise.end())
    });
    drop(cleanup);
    if let Some(engine) = &mut engine {
        let _reaped = engine.wait();
    }
    privileged.and(unit)
}

/// The privileged tests measure time on machines that are shared. If a few of them fail, each is repeated, alone, and has
/// to pass every time: a defect that shows in every second run passes the repeats in one of four cases. The output ends with the names of
/// such tests.
fn run_and_repeat(lanes: &Lanes<'_>, names: &[String]) -> Result<()> {
    let outcomes = lanes.run(names)?;
    lanes::report_slowest(&outcomes);
    let failed = report_failed(outcomes);
    if failed.is_empty() {
        return Ok(());
    }
    if failed.len() > REPEATED_MOST {
        bail!("{} tests failed; at most {REPEATED_MOST} are repeated", failed.len());
    }
    progress(format_args!("each failed test has to pass {REPEATS} times in a row now"));
    for _ in 0..REPEATS {
        let again = report_failed(lanes.run_alone(&failed)?);
        if !again.is_empty() {
            bail!("failed twice: {}", again.join(", "));
        }
    }
    for name in &failed {
        progress(format_args!("unsteady: {name} failed once and passed {REPEATS} times"));
    }
    Ok(())
}

/// Prints the failures. Returns the names of the tests that failed.
fn report_failed(outcomes: Vec<Outcome>) -> Vec<String> {
    let failed = outcomes.into_iter().filter_map(|outcome| {
        let message = outcome.failure?;
        let stolen = outcome
            .stolen
            .map_or_else(String::new, |share| format!(" ({:.0} % of the processors' time was stolen)", share * 100.0));
        progress(format_args!("failed: {}{stolen}", outcome.name));
        message.iter().for_each(|line| eprintln!("    {line}"));
        Some(outcome.name)
    });
    failed.collect()
}

/// Runs the command in a process group of its own, so that the whole group can be ended.
pub fn run(mut command: Command, cleanup: &mut Cleanup) -> Result<()> {
    progress(shown(&command));
    command.stdin(Stdio::null());
    sys::own_session(sys::dies_with_us(&mut command, libc::SIGKILL));
    let mut child = command.spawn().with_context(|| shown(&command))?;
    let pid = child.id();
    cleanup.will_remove(&Leftover::Group { pid, start: start_time(pid).unwrap_or_default() })?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if sys::interrupted().is_some() {
            break end_group(&mut child)?;
        }
        thread::sleep(Duration::from_millis(50));
    };
    if let Some(signal) = sys::interrupted() {
        bail!("interrupted by signal {signal}");
    }
    if !status.success() {
        bail!("`{}` failed ({status})", shown(&command));
    }
    Ok(())
}

/// Asks the process group of this child to end, and kills it after a while.
fn end_group(child: &mut Child) -> Result<ExitStatus> {
    let group = -(child.id() as i32);
    sys::kill(group, libc::SIGTERM);
    let since = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if since.elapsed() > GRACE {
            sys::kill(group, libc::SIGKILL);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_for_all_tests_or_for_modules() {
        let of = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            let (noisy, rest) = Noisy::of_arguments(&words).unwrap();
            (noisy.includes("labels::one"), noisy.includes("web::labels"), rest.len())
        };
        assert_eq!(of(&["--noise", "labels"]), (true, true, 1));
        assert_eq!(of(&["--noise=labels,doubles"]), (true, false, 0));
        assert_eq!(of(&["labels"]), (false, false, 1));
        assert_eq!(of(&[]), (false, false, 0));
        assert!(Noisy::of_arguments(&["--noise=".to_owned()]).is_err());
        let (noisy, names) = (Noisy::Modules(vec!["labels".into(), "label".into()]), ["labels::one".to_owned()]);
        assert_eq!((noisy.unknown(&names), Noisy::All.unknown(&[])), (vec!["label"], Vec::new()));
    }
}
