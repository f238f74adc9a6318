//! Loads held in the foreground: the process is watched through a pidfd, so its end is recorded as it happens.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nvidia_ml_sim::loads::{self, Load, Ways};
use nvidia_ml_sim::world::World;

use crate::freezer::ProcessFreezer;

/// A signal that arrives just before a wait is noticed after this time at most.
pub const CHECK_EVERY: Duration = Duration::from_millis(100);

/// A freeze lasts 100 ms or longer.
const FREEZER_EVERY: Duration = Duration::from_millis(10);

static SIGNAL: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    SIGNAL.store(signal, Ordering::Relaxed);
}

/// From here on SIGINT and SIGTERM set a flag instead of ending this process.
pub fn catch_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
    }
}

pub fn signalled() -> bool {
    SIGNAL.load(Ordering::Relaxed) != 0
}

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes a pid and flags only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor without another owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Waits until the process has ended; false if `wait` passed or a signal arrived first.
fn ended_within(process: &OwnedFd, wait: Duration) -> bool {
    let mut poll = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let ms = wait.as_millis().try_into().unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, ms) > 0 }
}

/// Records the load until the process ends, `lasts` passes or a signal arrives. With a freezer, it has no demand while that is frozen.
pub fn load(dir: &Path, load: Load, lasts: Option<Duration>, freezer: Option<&ProcessFreezer>) -> anyhow::Result<()> {
    catch_signals();
    let pid = load.pid;
    let process = pidfd(pid).with_context(|| format!("--pid {pid}: cannot watch the process"))?;
    let stopped = Load { demand: 0.0, ways: Ways::default(), ..load.clone() };
    let (mut id, _) = loads::begin(dir, load.clone())?;
    let mut is_stopped = false;
    let from = Instant::now();
    let check_every = if freezer.is_some() { FREEZER_EVERY } else { CHECK_EVERY };
    while !signalled() {
        let left = lasts.map_or(check_every, |lasts| lasts.saturating_sub(from.elapsed()).min(check_every));
        if left.is_zero() || ended_within(&process, left) {
            break;
        }
        let is_frozen = freezer.is_some_and(ProcessFreezer::is_frozen);
        if is_frozen != is_stopped {
            loads::end(dir, id)?;
            (id, _) = loads::begin(dir, if is_frozen { stopped.clone() } else { load.clone() })?;
            is_stopped = is_frozen;
        }
    }
    loads::end(dir, id).map(|_| ())
}

/// Starts the command stopped at its exec, records its load, and lets it continue. Returns its exit code, or 128 and the signal.
pub fn run(load: &super::Demand, command: &[String]) -> anyhow::Result<u8> {
    catch_signals();
    let [program, arguments @ ..] = command else { anyhow::bail!("a command is missing after --") };
    let (gate, release) = io::pipe()?;
    let closed_in_child = release.as_raw_fd();
    let mut child = Command::new(program);
    child.args(arguments);
    let gate_fd = gate.as_raw_fd();
    let nodes = nodes(&load.dir, load.gpu)?;
    // SAFETY: only close, read and fcntl, all async-signal-safe, on descriptors that the child inherited.
    unsafe {
        child.pre_exec(move || {
            libc::close(closed_in_child);
            for node in &nodes {
                libc::fcntl(node.as_raw_fd(), libc::F_SETFD, 0);
            }
            let mut byte = 0u8;
            libc::read(gate_fd, (&raw mut byte).cast(), 1);
            Ok(())
        });
    }
    // spawn returns only after the exec, so it runs in a thread while this one records the child's load.
    let (sender, receiver) = std::sync::mpsc::channel();
    let spawning = std::thread::spawn(move || sender.send(child.spawn()));
    let recorded = (|| {
        let pid = first_child()?;
        let process = pidfd(pid)?;
        Ok::<_, anyhow::Error>((loads::begin(&load.dir, super::declared(load, pid)?)?.0, process))
    })();
    drop(release);
    let spawned = receiver.recv().context("the spawning thread ended")?;
    drop(spawning);
    drop(gate);
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            if let Ok((id, _)) = recorded {
                loads::end(&load.dir, id)?;
            }
            return Err(error).with_context(|| format!("cannot start {program}"));
        }
    };
    let (id, process) = recorded?;
    while !ended_within(&process, CHECK_EVERY) {
        let signal = SIGNAL.swap(0, Ordering::Relaxed);
        if signal != 0 {
            // SAFETY: the child has not been waited for, so its pid is still its own.
            unsafe { libc::kill(child.id() as libc::pid_t, signal) };
        }
    }
    loads::end(&load.dir, id)?;
    let status = child.wait()?;
    Ok(status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1) as u8)
}

/// The device nodes that the command has open from its first instant, as a process that uses the GPU has.
fn nodes(dir: &Path, gpu: usize) -> anyhow::Result<Vec<std::fs::File>> {
    let open = |path: std::path::PathBuf| std::fs::File::open(&path).with_context(|| path.display().to_string());
    World::read(dir)?.nodes(dir, Some(gpu)).into_iter().map(open).collect()
}

/// The child that is held before its exec.
fn first_child() -> anyhow::Result<u32> {
    let from = Instant::now();
    while from.elapsed() < Duration::from_secs(5) {
        for task in std::fs::read_dir("/proc/self/task")?.flatten() {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            if let Some(pid) = children.split_whitespace().next().and_then(|pid| pid.parse().ok()) {
                return Ok(pid);
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    anyhow::bail!("the command did not start within 5 s")
}
