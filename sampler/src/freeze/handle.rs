//! The command's side of a guard: starts it, exchanges requests and replies, and thaws itself if the guard ends.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::freezer::{Freezer, FreezerError};
use super::guard::{GuardReply, GuardRequest};
use super::runtime_dir::{ExperimentLock, GuardId, RuntimeDir};
use crate::error::{display_chain, report_line};

/// The hidden command of a guard.
pub const COMMAND: &str = "freeze-guard";
/// For the guard to reply that it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// For the guard to thaw and end after its pipe was closed.
const END_TIMEOUT: Duration = Duration::from_millis(700);
/// For a killed guard to end: longer only if it is in a system call that cannot be interrupted.
const KILLED_TIMEOUT: Duration = Duration::from_millis(700);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A running guard. When this is dropped, the cgroup is thawed and the guard has ended, or its file is left for the agent.
pub struct GuardHandle {
    child: Child,
    /// Known when it is ready; it has frozen nothing before.
    id: Option<GuardId>,
    requests: Option<ChildStdin>,
    replies: UnboundedReceiver<GuardReply>,
    /// A freeze was requested, and the reply that ends it has not arrived.
    may_freeze: bool,
    freezer: Freezer,
    runtime_dir: RuntimeDir,
}

impl GuardHandle {
    /// Starts a guard and waits until it is ready.
    pub async fn start(freezer: Freezer, runtime_dir: &RuntimeDir, lock: &ExperimentLock, procfs: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot determine the path of this program")?;
        let mut command = Command::new(program);
        command.arg(COMMAND).arg("--runtime-dir").arg(runtime_dir.path()).arg("--path-procfs").arg(procfs);
        command.args(["--freezer", freezer.version.name(), "--cgroup", &freezer.path]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = lock.inherited(|| command.spawn()).context("cannot start the guard")?;
        let (requests, output) = (child.stdin.take(), child.stdout.take());
        let (to, replies) = unbounded_channel();
        let mut handle =
            Self { child, id: None, requests, replies, may_freeze: false, freezer, runtime_dir: runtime_dir.clone() };
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
            Ok(Some(GuardReply::Ready { start })) => {
                handle.id = Some(GuardId { pid: handle.child.id(), start });
                Ok(handle)
            }
            Ok(Some(other)) => bail!("the guard replied {other:?} instead of being ready"),
            Ok(None) => bail!("the guard ended before it was ready"),
            Err(_) => bail!("the guard was not ready within {} s", READY_TIMEOUT.as_secs()),
        }
    }

    pub fn request(&mut self, request: GuardRequest) -> anyhow::Result<()> {
        let requests = self.requests.as_mut().context("the guard was stopped")?;
        let mut line = serde_json::to_string(&request)?;
        line.push('\n');
        self.may_freeze |= matches!(request, GuardRequest::Freeze { .. });
        requests.write_all(line.as_bytes()).and_then(|()| requests.flush()).context("the guard has ended")
    }

    /// The next reply; `None` if the guard has ended. The cgroup may be frozen then, until [`GuardHandle::kill`].
    pub async fn reply(&mut self) -> Option<GuardReply> {
        let reply = self.replies.recv().await;
        if matches!(reply, Some(GuardReply::Thawed { .. } | GuardReply::Failed { .. })) {
            self.may_freeze = false;
        }
        reply
    }

    /// Waits until the guard has ended; `None` if it has not within this time.
    fn ended_within(&mut self, time: Duration) -> anyhow::Result<Option<ExitStatus>> {
        let asked = Instant::now();
        loop {
            match self.child.try_wait().context("cannot wait for the guard")? {
                None if asked.elapsed() < time => std::thread::sleep(POLL_INTERVAL),
                ended => return Ok(ended),
            }
        }
    }

    /// Kills the guard and thaws the cgroup here, unless the guard has not frozen it: another program may have. The file of a guard that does
    /// not end stays for the agent.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.requests = None;
        let killed = self.child.kill();
        // At once, whether the guard ends or not; the second thaw decides.
        let _first = self.thaw();
        let ended = self.ended_within(KILLED_TIMEOUT);
        // It may have been in the system call that freezes.
        self.thaw().with_context(|| format!("the cgroup {} may still be frozen", self.freezer.path))?;
        killed.context("cannot kill the guard")?;
        if ended?.is_none() {
            bail!(
                "the guard (process {}) does not end; {} was thawed, and is thawed again by the agent or the next experiment",
                self.child.id(),
                self.freezer.path
            );
        }
        match &self.id {
            Some(id) => Ok(self.runtime_dir.remove_state(id)?),
            None => Ok(()),
        }
    }

    fn thaw(&self) -> Result<(), FreezerError> {
        let is_noted = || self.id.is_some_and(|id| self.runtime_dir.may_have_frozen(&id));
        if self.may_freeze || is_noted() { self.freezer.thaw() } else { Ok(()) }
    }

    /// Closes the pipe: the guard thaws and ends. A guard that does not is killed, and the cgroup thawed here. Blocks, for one and a half
    /// seconds at most.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let Some(requests) = self.requests.take() else { return Ok(()) };
        drop(requests);
        match self.ended_within(END_TIMEOUT) {
            Ok(Some(status)) if status.success() => Ok(()),
            _ => self.kill(),
        }
    }
}

impl Drop for GuardHandle {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            report_line(&format!("gpu-sampler: {}", display_chain(error.as_ref())));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sampler_core::units::BootNs;

    use super::super::freezer::FreezerVersion;
    use super::super::runtime_dir::FrozenRecord;
    use super::*;
    use crate::observe::kernel::layout::Layout;

    #[test]
    fn a_guard_that_does_not_end_is_killed_and_its_file_removed_after_that() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        fs::write(dir.path().join("a/cgroup.freeze"), "1").unwrap();
        let layout = Layout { v2: Some(dir.path().to_owned()), ..Layout::default() };
        let freezer = Freezer::named(&layout, Path::new("/proc"), FreezerVersion::V2, "/a").unwrap().unwrap();
        let runtime_dir = RuntimeDir::new(&dir.path().join("run"));
        runtime_dir.create().unwrap();
        // Does not read its pipe.
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::piped()).spawn().unwrap();
        let (requests, pid, start) = (child.stdin.take(), child.id(), BootNs(50));
        let (version, path) = (FreezerVersion::V2, "/a".to_owned());
        runtime_dir.write_state(&FrozenRecord { guard_pid: pid, guard_start: start, version, path, until: BootNs(90) }).unwrap();
        let (_to, replies) = unbounded_channel();
        let mut handle =
            GuardHandle { child, id: Some(GuardId { pid, start }), requests, replies, may_freeze: false, freezer, runtime_dir };
        handle.stop().unwrap();
        assert!(handle.child.try_wait().unwrap().is_some_and(|status| !status.success()));
        assert_eq!(fs::read_to_string(dir.path().join("a/cgroup.freeze")).unwrap(), "0");
        assert!(handle.runtime_dir.read_state().unwrap().is_none());
        handle.stop().unwrap();
        // Without a request and without the guard's file it was frozen by another program.
        fs::write(dir.path().join("a/cgroup.freeze"), "1").unwrap();
        handle.kill().unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a/cgroup.freeze")).unwrap(), "1");
        handle.may_freeze = true;
        handle.kill().unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a/cgroup.freeze")).unwrap(), "0");
    }
}
