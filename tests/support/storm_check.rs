//! Process storms against a running agent: after each, its table of living processes must equal /proc, and its counted losses must be at
//! least the kernel's skips; other losses are printed.
//!
//! ```text
//! storm-check [--agent FILE] [--storms 10] [--lives 4000] [--parents 4] [--within 1]
//! ```
//! One storm: PARENTS processes together fork LIVES children, as fast as possible; every other child calls exec before it ends. Then
//! the agent's table must equal /proc within WITHIN seconds. The kernel's count is read from the agent's own descriptors, so an agent that
//! does not count fails here, too. Prints a line per storm and exits with 1 if a check failed. Needs root.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use gpu_sampler_tests::kernel::{ProcessTable, agent_table, cgroup2, lost_events, proc_table, skipped_runs};
use gpu_sampler_tests::{Agent, Running, sum};

/// Concurrent children of one parent.
const AT_ONCE: u32 = 32;
/// How long a differing table is polled, to show which differences stay.
const PATIENCE: Duration = Duration::from_secs(10);
/// The agent reads the counts 0.1 s to 0.35 s apart, and publishes them every 0.25 s; an emulated processor takes longer.
const PUBLISHED_WITHIN: Duration = Duration::from_secs(3);

struct StormOptions {
    agent: Option<String>,
    storms: u32,
    lives: u32,
    parents: u32,
    within: Duration,
}

impl StormOptions {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self { agent: None, storms: 10, lives: 4000, parents: 4, within: Duration::from_secs(1) };
        let mut words = args.iter();
        while let Some(name) = words.next() {
            let value = words.next().with_context(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--agent" => options.agent = Some(value.clone()),
                "--storms" => options.storms = value.parse()?,
                "--lives" => options.lives = value.parse()?,
                "--parents" => options.parents = value.parse()?,
                "--within" => options.within = Duration::from_secs_f64(value.parse()?),
                _ => bail!("unknown option {name}; the header of storm_check.rs lists them"),
            }
        }
        ensure!(options.parents > 0, "--parents must be at least 1");
        Ok(options)
    }
}

/// One parent of a storm; it forks `lives` children, [`AT_ONCE`] at a time.
fn parent(lives: u32) -> Result<()> {
    let mut running = 0;
    for n in 0..lives {
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            0 if n % 2 == 0 => {
                let error = Command::new("true").exec();
                eprintln!("storm-check: true: {error}");
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(127) }
            }
            // SAFETY: ends the child at once, nothing of the parent's is flushed twice.
            0 => unsafe { libc::_exit(0) },
            pid if pid < 0 => return Err(io::Error::last_os_error()).context("fork"),
            _ => running += 1,
        }
        if running == AT_ONCE {
            reap()?;
            running -= 1;
        }
    }
    (0..running).try_for_each(|_| reap())
}

fn reap() -> Result<()> {
    let mut status = 0;
    // SAFETY: any child of this process, a valid place for its status.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
    ensure!(pid > 0, "waitpid: {}", io::Error::last_os_error());
    ensure!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "a child ended with status {status:#x}");
    Ok(())
}

/// Runs one storm. Returns its duration.
fn storm(options: &StormOptions) -> Result<Duration> {
    let begun = Instant::now();
    let share = |n| options.lives / options.parents + u32::from(n < options.lives % options.parents);
    let start = |n: u32| Command::new(std::env::current_exe()?).args(["parent", &share(n).to_string()]).spawn();
    let mut parents = (0..options.parents).map(|n| start(n).map(Running)).collect::<io::Result<Vec<_>>>()?;
    for parent in &mut parents {
        let status = parent.0.wait()?;
        ensure!(status.success(), "a parent of the storm failed ({status})");
    }
    Ok(begun.elapsed())
}

/// The agent's losses and the kernel's skips, once both are equal or the agent had time to publish. The agent counts skips and events lost
/// to a full ring together.
fn counts(agent: &Agent) -> Result<(BTreeMap<&'static str, u64>, Option<u64>)> {
    let from = Instant::now();
    loop {
        let (lost, skips) = (lost_events(agent)?, skipped_runs(agent.process.0.id())?);
        if skips.is_none_or(|skips| skips == lost.values().sum::<u64>()) || from.elapsed() > PUBLISHED_WITHIN {
            return Ok((lost, skips));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The kernel's skips and the agent's other losses; the difference is exact while no event occurs.
fn causes(counted: u64, skips: Option<u64>) -> String {
    let Some(skips) = skips else { return "skips are not counted by this kernel".to_owned() };
    match counted.checked_sub(skips) {
        Some(rest) => format!("kernel's skips: {skips}; other losses, such as full rings: {rest}"),
        None => format!("kernel's skips: {skips}, of which {} are not counted by the agent", skips - counted),
    }
}

/// The time after which the agent's table equalled /proc; if it did not, the entries of the agent alone, and those of /proc alone.
fn settled(agent: &Agent) -> Result<Result<Duration, (ProcessTable, ProcessTable)>> {
    let (mount, from) = (cgroup2()?, Instant::now());
    loop {
        let at = from.elapsed();
        let (ours, theirs) = (agent_table(agent)?, proc_table(&mount)?);
        if ours == theirs {
            return Ok(Ok(at));
        }
        if at >= PATIENCE {
            return Ok(Err((&ours - &theirs, &theirs - &ours)));
        }
    }
}

/// Runs one storm and prints its line. Returns whether its checks passed.
fn run_one(n: u32, agent: &Agent, options: &StormOptions) -> Result<bool> {
    let took = storm(options)?;
    let settled = settled(agent)?;
    let (lost, skips) = counts(agent)?;
    let counted: u64 = lost.values().sum();
    let table = match &settled {
        Ok(after) => format!("table equals /proc after {:.2} s", after.as_secs_f64()),
        Err((dead, unknown)) => {
            format!("table differs from /proc: {} ended processes remain, {} are missing", dead.len(), unknown.len())
        }
    };
    let kinds: Vec<String> = lost.iter().filter(|(_, n)| **n > 0).map(|(kind, n)| format!("{kind} {n}")).collect();
    println!(
        "storm {n}: {} processes in {:.1} s; {table}; lost so far: {counted} ({}); {}",
        options.lives,
        took.as_secs_f64(),
        kinds.join(", "),
        causes(counted, skips)
    );
    let in_time = settled.is_ok_and(|after| after <= options.within);
    Ok(in_time && skips.is_none_or(|skips| counted >= skips))
}

fn check(options: &StormOptions) -> Result<bool> {
    if let Some(agent) = &options.agent {
        // SAFETY: this process has one thread so far.
        unsafe { std::env::set_var("GPU_SAMPLER_BIN", agent) };
    }
    let none = ["--docker-endpoint", "unix:///nonexistent/docker.sock", "--label-sources", "docker-file"];
    let agent = Agent::start(None, &[&["--kernel-mode", "raw_tracepoint"][..], &none].concat())?;
    let begun = Instant::now();
    let quiet =
        settled(&agent)?.map_err(|(dead, unknown)| anyhow::anyhow!("before any storm: {dead:?} ended, {unknown:?} missing"))?;
    // The reference for the times after a storm, where a processor is emulated.
    println!(
        "before: table equals /proc after {:.2} s, compared in {:.2} s",
        quiet.as_secs_f64(),
        (begun.elapsed() - quiet).as_secs_f64()
    );
    let mut good = 0;
    for n in 1..=options.storms {
        good += u32::from(run_one(n, &agent, options)?);
    }
    let page = agent.scrape()?;
    let total = |name| sum(&page, name, &[]).unwrap_or_default();
    println!("{} resyncs, {} repairs", total("gpu_sampler_resyncs_total"), total("gpu_sampler_resync_repairs_total"));
    println!("{good} passed, {} failed", options.storms - good);
    Ok(good == options.storms)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match &args[..] {
        [verb, lives] if verb == "parent" => lives.parse().map_err(Into::into).and_then(parent).map(|()| true),
        _ => StormOptions::parse(&args).and_then(|options| check(&options)),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("storm-check: {error:#}");
            ExitCode::FAILURE
        }
    }
}
