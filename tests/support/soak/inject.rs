//! How each kind of fault begins, lasts and ends.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::accounts::{AllowedUser, Problem};
use super::board::lock;
use super::faults::{FaultKind, PlannedFault};
use super::run::SoakRun;
use super::world::{EngineFront, GPUS, now_us};
use crate::proxy::Fault;
use crate::record::RecordedLife;
use crate::{Running, sum};

/// Driver calls that fail, by GPU.
const FAILING_CALLS: [&str; 3] =
    ["nvmlDeviceGetSamples", "nvmlDeviceGetProcessUtilization", "nvmlDeviceGetComputeRunningProcesses_v3"];
/// Above what the agent uses.
const SPARE_BYTES: u64 = 256 * 1024;
/// An agent that needs no more in this time gets a limit above what it uses then.
const LIMIT_AGAIN: Duration = Duration::from_millis(500);
/// A session on a full disk fails with the next frame.
const FAILS_WITHIN: Duration = Duration::from_secs(15);
/// Parents of a storm, and the children of each.
const STORM_PARENTS: u32 = 4;
const STORM_LIVES: &str = "1500";
/// Load of a container that starts during a fault of the runtime.
const LATE_DEMAND: f64 = 0.05;
const LATE_SECONDS: u64 = 20;

/// What happened.
#[derive(Debug, Default)]
pub struct Injected {
    /// Why there was no fault.
    pub refused: Option<String>,
    pub note: String,
    /// A container that was started during the fault, and needs labels.
    pub late: Option<String>,
}

impl Injected {
    fn not(reason: impl Into<String>) -> Result<Self> {
        Ok(Self { refused: Some(reason.into()), ..Self::default() })
    }

    fn noted(note: impl Into<String>) -> Result<Self> {
        Ok(Self { note: note.into(), ..Self::default() })
    }
}

/// Injects a fault, and returns at its end.
pub fn inject(run: &mut SoakRun<'_>, fault: PlannedFault) -> Result<Injected> {
    match fault.kind {
        FaultKind::Storm => storm(run, fault.lasts),
        FaultKind::Stop => stop(run, fault.lasts),
        FaultKind::Kill => kill(run),
        FaultKind::MemoryLimit => memory_limit(run, fault.lasts),
        FaultKind::DiskFull => disk_full(run, fault.lasts),
        FaultKind::ClockStep => clock_step(run),
        FaultKind::XidBurst => {
            run.world.sim.inject("xid", &["--gpu", &fault.gpu.to_string(), "--xid", "79", "--count", "2000"])?;
            run.wait(fault.lasts)?;
            Ok(Injected::default())
        }
        kind if kind.is_of_runtime() => runtime(run, kind, fault.lasts),
        _ => driver(run, fault),
    }
}

fn driver(run: &mut SoakRun<'_>, fault: PlannedFault) -> Result<Injected> {
    let (gpu, lasts) = (fault.gpu.to_string(), format!("{}ms", fault.lasts.as_millis()));
    let call = FAILING_CALLS[fault.gpu % FAILING_CALLS.len()];
    let options: &[&str] = match fault.kind {
        FaultKind::GpuStall => &["--gpu", &gpu, "--kind", "stall"],
        FaultKind::DriverStall => &["--kind", "stall"],
        FaultKind::GpuSlow => &["--gpu", &gpu, "--kind", "slow", "--micros", "20000"],
        FaultKind::GpuLost => &["--gpu", &gpu, "--kind", "lost"],
        FaultKind::GpuAbsent => &["--gpu", &gpu, "--kind", "absent"],
        FaultKind::DriverReload => &["--kind", "reload"],
        FaultKind::GpuFreeze => &["--gpu", &gpu, "--kind", "freeze"],
        _ => &["--gpu", &gpu, "--kind", "error", "--error", "UNKNOWN", "--call", call],
    };
    run.world.sim.inject("fault", &[options, &["--for", &lasts]].concat())?;
    run.wait(fault.lasts)?;
    if fault.kind == FaultKind::GpuError { Injected::noted(call) } else { Ok(Injected::default()) }
}

fn lost_events(run: &SoakRun<'_>) -> f64 {
    let latest = lock(&run.board.state).latest.clone();
    latest.and_then(|page| sum(&page.samples, "gpu_sampler_kernel_events_lost_total", &[])).unwrap_or_default()
}

fn storm(run: &mut SoakRun<'_>, lasts: Duration) -> Result<Injected> {
    let (before, until) = (lost_events(run), run.board.now() + lasts.as_secs_f64());
    let own = std::env::current_exe()?;
    let mut storms = 0;
    while run.board.now() < until {
        let start = |_| Ok(Running(Command::new(&own).args(["storm", STORM_LIVES]).stdin(Stdio::null()).spawn()?));
        let parents = (0..STORM_PARENTS).map(start).collect::<Result<Vec<_>>>()?;
        for mut parent in parents {
            ensure!(parent.0.wait()?.success(), "a parent of the storm failed");
        }
        storms += STORM_PARENTS;
        run.wait(Duration::from_millis(10))?;
    }
    // The counts are read and published within a third of a second.
    run.wait(Duration::from_millis(1500))?;
    let lost = lost_events(run) - before;
    if lost <= 0.0 {
        let text = format!("{storms} x {STORM_LIVES} processes, and no kernel event was lost");
        lock(&run.board.state).report(Problem::new("storm without effect", text));
    }
    Injected::noted(format!("{storms} x {STORM_LIVES} processes, {lost} events lost"))
}

fn stop(run: &mut SoakRun<'_>, lasts: Duration) -> Result<Injected> {
    lock(&run.board.state).excuse(true, run.board.now());
    run.subject.signal(libc::SIGSTOP)?;
    let waited = run.wait(lasts);
    run.subject.signal(libc::SIGCONT)?;
    lock(&run.board.state).excuse(false, run.board.now());
    waited.map(|()| Injected::default())
}

fn kill(run: &mut SoakRun<'_>) -> Result<Injected> {
    run.subject.end("kill -9", libc::SIGKILL)?;
    run.subject.start()?;
    Ok(Injected::default())
}

fn memory_limit(run: &mut SoakRun<'_>, lasts: Duration) -> Result<Injected> {
    if let Err(error) = run.subject.memory() {
        return Injected::not(format!("{error:#}"));
    }
    lock(&run.board.state).excuse(true, run.board.now());
    run.may_end = true;
    let limited = limit_memory(run, lasts);
    let lifted = run.subject.memory()?.limit(None);
    let ended = run.subject.restart_if_ended(true)? || run.has_ended;
    (run.may_end, run.has_ended) = (false, false);
    lock(&run.board.state).excuse(false, run.board.now());
    lifted?;
    let (limit, times) = limited?;
    if times == 0 {
        let text = format!("{limit} bytes were enough");
        run.board.report(Problem::new("memory-limit without effect", text));
    }
    let end = if ended { "killed by it, started again" } else { "survived" };
    Injected::noted(format!("{limit} bytes, reached {times} times; {end}"))
}

/// Returns the last limit, and how often memory was wanted beyond one.
fn limit_memory(run: &mut SoakRun<'_>, lasts: Duration) -> Result<(u64, u64)> {
    let (until, mut limit, before) = (run.board.now() + lasts.as_secs_f64(), 0, run.subject.memory()?.limited()?);
    loop {
        let memory = run.subject.memory()?;
        let times = memory.limited()? - before;
        if run.board.now() >= until {
            return Ok((limit, times));
        }
        if times == 0 {
            limit = memory.usage()? + SPARE_BYTES;
            memory.limit(Some(limit))?;
        }
        run.wait(LIMIT_AGAIN)?;
    }
}

fn disk_full(run: &mut SoakRun<'_>, lasts: Duration) -> Result<Injected> {
    let id = run.subject.agent()?.record(Duration::from_secs(60), Duration::ZERO)?;
    run.wait(Duration::from_secs(1))?;
    run.world.disk.fill()?;
    let failed = run.wait(lasts).and_then(|()| run.subject.agent()?.session_is(&id, "failed", FAILS_WITHIN));
    run.world.disk.free()?;
    let reason = failed?["error"].as_str().context("a session that failed has a reason")?.to_owned();
    ensure!(reason.contains("No space left"), "the session failed for another reason: {reason}");
    Injected::noted("the session failed with a reason")
}

fn clock_step(run: &mut SoakRun<'_>) -> Result<Injected> {
    let Some(left) = run.world.next_step() else { return Injected::not("the world has no further step") };
    run.wait(left + Duration::from_millis(500))?;
    Injected::noted(format!("GPU {}", GPUS - 1))
}

fn runtime(run: &mut SoakRun<'_>, kind: FaultKind, lasts: Duration) -> Result<Injected> {
    let world = run.world;
    let Some(engine) = &world.engine else { return Injected::not("DOCKER_HOST names no engine") };
    match kind {
        FaultKind::RuntimeHang => engine.proxy.set(Fault::Hang)?,
        FaultKind::RuntimeNotFound => engine.proxy.set(Fault::Status(404))?,
        FaultKind::RuntimeGarbage => engine.proxy.set(Fault::Garbage)?,
        FaultKind::RuntimeHalf => engine.proxy.set(Fault::CloseHalfWay)?,
        _ => engine.proxy.disappear()?,
    }
    let before = engine.proxy.count();
    let late = late_container(run, engine).and_then(|id| run.wait(lasts).map(|()| id));
    let requests = engine.proxy.count() - before;
    if kind != FaultKind::RuntimeRestart && requests == 0 {
        run.board.report(Problem::new(format!("{} without effect", kind.name()), "the agent made no request meanwhile"));
    }
    engine.proxy.set(Fault::Pass)?;
    if kind == FaultKind::RuntimeRestart {
        engine.proxy.appear()?;
    }
    Ok(Injected { late: Some(late?), note: format!("{requests} requests"), ..Injected::default() })
}

/// Starts a container during a fault. Only the runtime knows its name.
fn late_container(run: &mut SoakRun<'_>, engine: &EngineFront) -> Result<String> {
    let (n, gpu) = (run.faults.len(), run.faults.len() % GPUS);
    let (id, pid) = engine.docker.run(&format!("late-{n}"), &json!({}), "60")?;
    let gpus = BTreeSet::from([run.world.uuids[gpu].clone()]);
    lock(&run.board.state).allowed.insert(id.clone(), AllowedUser { gpus, ..AllowedUser::default() });
    let begin_us = now_us();
    let load = run.world.sim.load(pid, gpu, LATE_DEMAND, &["--for", &format!("{LATE_SECONDS}s")])?;
    run.loads.push(load);
    let end_us = begin_us + (LATE_SECONDS + 1) * 1_000_000;
    lock(run.lives).push(RecordedLife { pid, cgroup: id.clone(), gpu, begin_us, end_us, gone_us: end_us });
    Ok(id)
}

/// The parent of a storm: forks processes that end at once.
pub fn storm_parent(lives: u32) {
    // SAFETY: ignoring SIGCHLD makes the kernel reap.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    for _ in 0..lives {
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            // SAFETY: ends the child at once, nothing of the parent's is flushed twice.
            0 => unsafe { libc::_exit(0) },
            // The process limit: ended children are reaped in a moment.
            pid if pid < 0 => std::thread::sleep(Duration::from_millis(1)),
            _ => {}
        }
    }
}
