//! A Docker Engine to test against: the machine's, or a new one with everything in one temporary folder.

use crate::{
    janitor::{self, Cleanup, Leftover, mounts},
    sys,
    tools::{on_path, path_with_daemons, progress, tail},
};
use anyhow::{Context, Result, bail};
use devkit::{http::Server, process::start_time};
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

pub const SYSTEM_SOCKET: &str = "/var/run/docker.sock";

/// dockerd and its containerd start in 1 to 3 s; the limit allows for a loaded machine.
const START_PATIENCE: Duration = Duration::from_secs(60);

pub fn responds(socket: &Path) -> bool {
    Server::unix(socket).get("/_ping").is_ok_and(|response| response.status == 200)
}

/// The `unix://..` address of an engine that responds, and the child if one was started for it.
pub fn ensure(cleanup: &mut Cleanup) -> Result<(String, Option<Child>)> {
    if responds(Path::new(SYSTEM_SOCKET)) {
        progress(format_args!("Docker: the engine behind {SYSTEM_SOCKET}"));
        return Ok((format!("unix://{SYSTEM_SOCKET}"), None));
    }
    let (socket, child) = start(cleanup)?;
    Ok((format!("unix://{}", socket.display()), Some(child)))
}

fn start(cleanup: &mut Cleanup) -> Result<(PathBuf, Child)> {
    let program = on_path("dockerd").context("dockerd is not installed: run `cargo xtask setup`")?;
    let dir = cleanup.temporary("gpu-sampler-engine")?;
    // The engine leaves the common parent cgroup of its containers.
    for root in mounts().into_iter().filter(janitor::Mount::is_cgroup) {
        let common = root.point.join("docker");
        if !common.exists() {
            cleanup.will_remove(&Leftover::Folder(common))?;
        }
    }
    let (socket, log) = (dir.join("docker.sock"), dir.join("dockerd.log"));
    progress(format_args!("Docker: no engine responds; starting one in {}", dir.display()));
    let mut command = Command::new(program);
    command
        .args(["--iptables=false", "--ip6tables=false", "--bridge=none"])
        .arg(option("--host=unix://", &socket))
        .arg(option("--data-root=", &dir.join("data")))
        .arg(option("--exec-root=", &dir.join("exec")))
        .arg(option("--pidfile=", &dir.join("dockerd.pid")))
        // dockerd searches for containerd, runc and iptables on PATH.
        .env("PATH", path_with_daemons())
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .stderr(fs::OpenOptions::new().append(true).open(&log)?);
    // In its own session: the terminal's Ctrl-C goes to this process, which ends the engine in the right order. SIGTERM, because only
    // dockerd itself stops its containers.
    sys::own_session(sys::dies_with_us(&mut command, libc::SIGTERM));
    let mut child = command.spawn().context("starting dockerd")?;
    let start = start_time(child.id()).context("dockerd ended at once")?;
    cleanup.will_remove(&Leftover::Engine { pid: child.id(), start, dir: dir.clone() })?;
    let from = Instant::now();
    while !responds(&socket) {
        if let Some(status) = child.try_wait()? {
            bail!("dockerd ended ({status}):\n{}", tail(&log));
        }
        if let Some(signal) = sys::interrupted() {
            bail!("interrupted by signal {signal}");
        }
        if from.elapsed() > START_PATIENCE {
            bail!("dockerd does not respond after {START_PATIENCE:?}:\n{}", tail(&log));
        }
        thread::sleep(Duration::from_millis(50));
    }
    progress(format_args!("Docker: ready after {:.1} s", from.elapsed().as_secs_f64()));
    Ok((socket, child))
}

fn option(name: &str, path: &Path) -> OsString {
    let mut option = OsString::from(name);
    option.push(path);
    option
}
