//! The command's side of a guard: starts it, exchanges requests and replies, and thaws itself if the guard ends.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::freezer::{Freezer, FreezerVersion};
use super::guard::{GuardReply, GuardRequest};
use super::runtime_dir::RuntimeDir;
use crate::error::display_chain;

/// The hidden command of a guard.
pub const COMMAND: &str = "freeze-guard";
/// For the guard to reply that it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// For the guard to thaw and end after its pipe was closed.
const END_TIMEOUT: Duration = Duration::from_millis(700);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A running guard. When this is dropped, the cgroup is thawed and the guard has ended.
pub struct GuardHandle {
    child: Child,
    requests: Option<ChildStdin>,
    replies: UnboundedReceiver<GuardReply>,
    freezer: Freezer,
    runtime_dir: RuntimeDir,
}

impl GuardHandle {
    /// Starts a guard and waits until it is ready.
    pub async fn start(freezer: Freezer, runtime_dir: &RuntimeDir, procfs: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot determine the path of this program")?;
        let version = match freezer.version {
            FreezerVersion::V1 => "v1",
            FreezerVersion::V2 => "v2",
        };
        let mut command = Command::new(program);
        command.arg(COMMAND).arg("--runtime-dir").arg(runtime_dir.path()).arg("--path-procfs").arg(procfs);
        command.args(["--freezer", version, "--cgroup", &freezer.path]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the guard")?;
        let (requests, output) = (child.stdin.take(), child.stdout.take());
        let (to, replies) = unbounded_channel();
        let mut handle = Self { child, requests, replies, freezer, runtime_dir: runtime_dir.clone() };
        let output = BufReader::new(output.context("the guard has no standard output")?);
        let read = move || {
            for line in output.lines() {
                let reply = line.ok().and_then(|line| serde_json::from_str(&line).ok());
                if reply.is_none_or(|reply| to.send(reply).is_err()) {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("guard-replies".into()).spawn(read).context("cannot start the thread guard-replies")?;
        match tokio::time::timeout(READY_TIMEOUT, handle.reply()).await {
            Ok(Some(GuardReply::Ready)) => Ok(handle),
            Ok(Some(other)) => bail!("the guard replied {other:?} instead of being ready"),
            Ok(None) => bail!("the guard ended before it was ready"),
            Err(_) => bail!("the guard was not ready within {} s", READY_TIMEOUT.as_secs()),
        }
    }

    pub fn request(&mut self, request: GuardRequest) -> anyhow::Result<()> {
        let requests = self.requests.as_mut().context("the guard was stopped")?;
        let mut line = serde_json::to_string(&request)?;
        line.push('\n');
        requests.write_all(line.as_bytes()).and_then(|()| requests.flush()).context("the guard has ended")
    }

    /// The next reply; `None` if the guard has ended. The cgroup may be frozen then, until [`GuardHandle::thaw`].
    pub async fn reply(&mut self) -> Option<GuardReply> {
        self.replies.recv().await
    }

    /// Thaws the cgroup without the guard.
    pub fn thaw(&self) -> anyhow::Result<()> {
        self.freezer.thaw().with_context(|| format!("the cgroup {} may still be frozen", self.freezer.path))?;
        Ok(self.runtime_dir.remove_state()?)
    }

    /// Closes the pipe: the guard thaws and ends. A guard that does not is killed, and the cgroup thawed here.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let Some(requests) = self.requests.take() else { return Ok(()) };
        drop(requests);
        let asked = Instant::now();
        while asked.elapsed() < END_TIMEOUT {
            match self.child.try_wait().context("cannot wait for the guard")? {
                Some(status) if status.success() => return Ok(()),
                Some(_) => return self.thaw(),
                None => std::thread::sleep(POLL_INTERVAL),
            }
        }
        let killed = self.child.kill();
        // Thawed first: a guard in a system call that hangs is not reaped.
        self.thaw()?;
        killed.context("cannot kill the guard")?;
        self.child.wait().context("cannot wait for the guard")?;
        Ok(())
    }
}

impl Drop for GuardHandle {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("gpu-sampler: {}", display_chain(error.as_ref()));
        }
    }
}
