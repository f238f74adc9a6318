//! The guard: a process that freezes a cgroup on request, and thaws it whatever happens to the command that started it.
//!
//! ```text
//!             Freeze{ns}                    deadline, Thaw, pipe closed, SIGTERM, thawed by another program
//!  [thawed] --file, freeze--> [frozen] ------------thaw, remove file------------> [thawed]
//!     '------------ pipe closed, SIGTERM: ends ------------'
//! ```
//! It is in a session of its own, so that signals of a terminal do not reach it, and SIGINT and SIGHUP have no effect; and in the root
//! cgroup, so that it does not end with the command's, which a session manager or an out-of-memory daemon may kill. Requests and replies are
//! lines of JSON on standard input and output.

use std::fs;
use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use sampler_core::experiment::FREEZE_NS;
use sampler_core::units::BootNs;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep_until};

use super::freezer::{Freezer, FreezerVersion, contains_process};
use super::runtime_dir::{FrozenRecord, RuntimeDir};
use crate::error::{display_chain, report_line};
use crate::observe::clock::boot_now;
use crate::observe::kernel::layout::{layout, roots};
use crate::observe::kernel::proc::living_thread;

/// How often a freeze is checked to last.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// How often a failed thaw is tried again.
const THAW_INTERVAL: Duration = Duration::from_millis(100);
/// After this many failed attempts the guard ends, and leaves its file for the agent.
const MAX_THAWS: u32 = 50;

#[derive(clap::Args)]
pub struct GuardOptions {
    #[arg(long)]
    pub runtime_dir: PathBuf,
    #[arg(long)]
    pub path_procfs: PathBuf,
    #[arg(long)]
    pub freezer: FreezerVersion,
    /// Path within the hierarchy of the freezer
    #[arg(long)]
    pub cgroup: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardRequest {
    /// Freezes for this long at most.
    Freeze {
        ns: u64,
    },
    Thaw,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardReply {
    Ready {
        /// When the guard started, as in its file.
        start: BootNs,
    },
    Frozen {
        from: BootNs,
    },
    Thawed {
        from: BootNs,
        to: BootNs,
    },
    /// The cgroup is not frozen by this guard.
    Failed {
        message: String,
    },
}

struct GuardProcess {
    freezer: Freezer,
    runtime_dir: RuntimeDir,
    state: FrozenRecord,
    /// Since when it is frozen, and until when.
    frozen: Option<(BootNs, Instant)>,
}

/// Runs until the pipe closes.
pub fn run(options: &GuardOptions) -> anyhow::Result<()> {
    // Fails only for the leader of a process group, which a child of the command never is.
    rustix::process::setsid().context("cannot leave the session of the terminal")?;
    let (procfs, cgroup) = (&options.path_procfs, &options.cgroup);
    let freezer = Freezer::named(&layout(procfs), procfs, options.freezer, cgroup)?;
    let freezer = freezer.with_context(|| format!("the cgroup {cgroup} has no freezer any more"))?;
    if contains_process(procfs, "self", cgroup).context("cannot read the cgroups of this process")? {
        bail!("the cgroup {cgroup} contains this process, which would stop with it");
    }
    leave_cgroup(procfs);
    let pid = std::process::id();
    let started = living_thread(&procfs.join("self")).map_err(anyhow::Error::msg)?;
    let (_, guard_start) = started.context("cannot read the start time of this process")?;
    let state = FrozenRecord { guard_pid: pid, guard_start, version: options.freezer, path: cgroup.clone(), until: BootNs(0) };
    let guard = GuardProcess { freezer, runtime_dir: RuntimeDir::new(&options.runtime_dir), state, frozen: None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
    let result = runtime.block_on(guard.serve());
    // The thread that reads the pipe may still wait for it.
    runtime.shutdown_background();
    result
}

/// Moves this process to the root of each hierarchy, and asks the kernel to spare it when memory is short. Reports what it cannot.
fn leave_cgroup(procfs: &Path) {
    let write = |path: &Path, text: &str, what: &str| {
        if let Err(error) = fs::write(path, text) {
            report_line(&format!("gpu-sampler: freeze-guard: {what}: cannot write {}: {error}", path.display()));
        }
    };
    for root in roots(procfs) {
        let what = "the guard stays in a cgroup of the command, and ends with it if that is killed";
        write(&root.join("cgroup.procs"), "0", what);
    }
    write(Path::new("/proc/self/oom_score_adj"), "-1000", "the kernel may end the guard when memory is short");
}

/// The requests of the pipe; the channel closes with it.
fn requests() -> anyhow::Result<UnboundedReceiver<GuardRequest>> {
    let (to, from) = unbounded_channel();
    let read = move || {
        for line in std::io::stdin().lock().lines() {
            // A line that cannot be read is not from the command: the guard ends, thawed.
            let request = line.ok().and_then(|line| serde_json::from_str(&line).ok());
            if request.is_none_or(|request| to.send(request).is_err()) {
                return;
            }
        }
    };
    std::thread::Builder::new().name("requests".into()).spawn(read).context("cannot start the thread requests")?;
    Ok(from)
}

fn reply(reply: &GuardReply) {
    let mut line = serde_json::to_string(reply).unwrap_or_default();
    line.push('\n');
    let mut out = std::io::stdout().lock();
    // A command that has ended does not read; the closed pipe ends the guard.
    let _written = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

impl GuardProcess {
    async fn serve(mut self) -> anyhow::Result<()> {
        let handler = |kind| signal(kind).context("cannot install a signal handler");
        let (mut interrupt, mut hangup) = (handler(SignalKind::interrupt())?, handler(SignalKind::hangup())?);
        let mut terminate = handler(SignalKind::terminate())?;
        let mut requests = requests()?;
        reply(&GuardReply::Ready { start: self.state.guard_start });
        loop {
            let checked = self.frozen.map(|(_, until)| until.min(Instant::now() + CHECK_INTERVAL));
            let is_due = async {
                match checked {
                    Some(checked) => sleep_until(checked).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = is_due => self.check().await?,
                _ = terminate.recv() => break,
                request = requests.recv() => match request {
                    Some(GuardRequest::Freeze { ns }) => self.freeze(ns).await?,
                    Some(GuardRequest::Thaw) => self.thaw().await?,
                    None => break,
                },
                // The command decides what these signals mean.
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
        }
        self.thaw().await
    }

    async fn freeze(&mut self, ns: u64) -> anyhow::Result<()> {
        if self.frozen.is_some() {
            return Ok(());
        }
        if let Err(message) = self.is_free() {
            reply(&GuardReply::Failed { message });
            return Ok(());
        }
        let ns = ns.min(*FREEZE_NS.end());
        let until = Instant::now() + Duration::from_nanos(ns);
        self.state.until = boot_now().plus(ns);
        // The file exists before the cgroup is frozen: without it, the freeze would have the guard only.
        if let Err(error) = self.runtime_dir.write_state(&self.state) {
            reply(&GuardReply::Failed { message: display_chain(&error) });
            return Ok(());
        }
        match self.freezer.freeze() {
            Ok(from) => {
                self.frozen = Some((from, until));
                reply(&GuardReply::Frozen { from });
            }
            Err(error) => {
                self.thaw_freezer().await?;
                reply(&GuardReply::Failed { message: display_chain(&error) });
            }
        }
        Ok(())
    }

    /// Thaws at the deadline, and if the cgroup is not frozen any more.
    async fn check(&mut self) -> anyhow::Result<()> {
        let is_over = self.frozen.is_some_and(|(_, until)| until <= Instant::now());
        if is_over || self.lasts().is_err() { self.thaw().await } else { Ok(()) }
    }

    /// Fails with the reason if another program has frozen the cgroup: the thaw of this guard would end that, too.
    fn is_free(&self) -> Result<(), String> {
        match self.freezer.becomes_thawed() {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("another program has frozen the cgroup {}, which stays as it is", self.freezer.path)),
            Err(error) => Err(display_chain(&error)),
        }
    }

    /// Fails with the reason if the cgroup is not frozen.
    fn lasts(&self) -> Result<(), String> {
        match self.freezer.is_frozen() {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("the cgroup {} did not stay frozen: another program has thawed it", self.freezer.path)),
            Err(error) => Err(display_chain(&error)),
        }
    }

    async fn thaw(&mut self) -> anyhow::Result<()> {
        let Some((from, _)) = self.frozen else { return Ok(()) };
        let (lasted, to) = (self.lasts(), boot_now());
        self.thaw_freezer().await?;
        self.frozen = None;
        reply(&match lasted {
            Ok(()) => GuardReply::Thawed { from, to },
            Err(message) => GuardReply::Failed { message },
        });
        Ok(())
    }

    /// Thaws the cgroup, again if that fails, and removes the file.
    async fn thaw_freezer(&self) -> anyhow::Result<()> {
        for _ in 0..MAX_THAWS {
            match self.freezer.thaw() {
                Ok(()) => return Ok(self.runtime_dir.remove_state(&self.state.guard())?),
                Err(error) => report_line(&format!("gpu-sampler: freeze-guard: {}", display_chain(&error))),
            }
            tokio::time::sleep(THAW_INTERVAL).await;
        }
        bail!("cannot thaw the cgroup {}: thaw it by hand", self.freezer.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::kernel::layout::Layout;

    /// A guard of the cgroup `a`, which is frozen, and the file of the guard.
    fn guard(dir: &Path) -> GuardProcess {
        fs::create_dir(dir.join("a")).unwrap();
        let write = |file: &str, text: &str| fs::write(dir.join(file), text).unwrap();
        [("cgroup.procs", ""), ("a/cgroup.freeze", "1"), ("a/cgroup.events", "frozen 1\n")].iter().for_each(|(f, t)| write(f, t));
        let layout = Layout { v2: Some(dir.to_owned()), ..Layout::default() };
        let freezer = Freezer::named(&layout, Path::new("/proc"), FreezerVersion::V2, "/a").unwrap().unwrap();
        let runtime_dir = RuntimeDir::new(&dir.join("run"));
        runtime_dir.create().unwrap();
        let (version, path) = (FreezerVersion::V2, "/a".to_owned());
        let state = FrozenRecord { guard_pid: 7, guard_start: BootNs(50), version, path, until: BootNs(90) };
        runtime_dir.write_state(&state).unwrap();
        let frozen = Some((BootNs(1), Instant::now() + Duration::from_secs(60)));
        GuardProcess { freezer, runtime_dir, state, frozen }
    }

    #[tokio::test]
    async fn what_another_program_has_frozen_stays_so() {
        let dir = tempfile::tempdir().unwrap();
        let mut guard = guard(dir.path());
        guard.runtime_dir.remove_state(&guard.state.guard()).unwrap();
        guard.frozen = None;
        assert!(guard.is_free().unwrap_err().contains("another program has frozen the cgroup /a"));
        guard.freeze(1_000_000_000).await.unwrap();
        guard.thaw().await.unwrap();
        assert!(guard.frozen.is_none() && guard.runtime_dir.read_state().unwrap().is_none());
        assert_eq!(fs::read_to_string(dir.path().join("a/cgroup.freeze")).unwrap(), "1");
    }

    #[tokio::test]
    async fn a_freeze_that_does_not_last_is_ended_and_has_no_span() {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        let mut guard = guard(dir.path());
        guard.check().await.unwrap();
        assert!(guard.frozen.is_some() && guard.lasts().is_ok());
        write("a/cgroup.events", "frozen 0\n");
        assert!(guard.lasts().unwrap_err().contains("another program has thawed it"));
        guard.check().await.unwrap();
        assert!(guard.frozen.is_none() && guard.runtime_dir.read_state().unwrap().is_none());
        assert_eq!(fs::read_to_string(dir.path().join("a/cgroup.freeze")).unwrap(), "0");
    }
}
