//! Thaws what a dead guard has left frozen: the agent does so every half second, and an experiment before it begins.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sampler_core::units::{BootNs, Tgid};
use thiserror::Error;

use super::freezer::{Freezer, FreezerError};
use super::runtime_dir::{RuntimeDir, RuntimeDirError};
use crate::error::display_chain;
use crate::observe::clock::boot_now;
use crate::observe::kernel::layout::Layout;
use crate::observe::kernel::proc::is_alive;

const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// A living guard that is this late does not run: it was stopped, or waits for a disk.
const LATE_NS: u64 = 500_000_000;

#[derive(Debug, Error)]
pub enum RecoverError {
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(
        "cannot thaw the cgroup {path} that a dead or late guard has left frozen: write the thawed state to its freezer as root"
    )]
    Thaw { path: String, source: FreezerError },
}

/// Thaws the cgroup of a guard that has ended or is late. Returns its path; `None` if there is nothing to thaw. The file of a guard that
/// has not ended stays, since it may freeze the cgroup once more.
pub fn recover(runtime_dir: &RuntimeDir, layout: &Layout, procfs: &Path, now: BootNs) -> Result<Option<String>, RecoverError> {
    let Some(state) = runtime_dir.read_state()? else { return Ok(None) };
    let is_late = now > state.until.plus(LATE_NS);
    let is_alive = is_alive(procfs, Tgid(state.guard_pid), state.guard_start);
    if !is_late && is_alive {
        return Ok(None);
    }
    let failed = |source| RecoverError::Thaw { path: state.path.clone(), source };
    // A cgroup that was removed has nothing to thaw.
    if let Some(freezer) = Freezer::named(layout, procfs, state.version, &state.path).map_err(failed)? {
        freezer.thaw().map_err(failed)?;
    }
    if !is_alive {
        runtime_dir.remove_state(&state.guard())?;
    }
    Ok(Some(state.path))
}

/// The thread of the agent.
pub struct ThawWatch {
    pub runtime_dir: RuntimeDir,
    pub layout: Layout,
    pub procfs: PathBuf,
    pub stop: Arc<AtomicBool>,
}

impl ThawWatch {
    pub fn start(self) -> std::io::Result<()> {
        std::thread::Builder::new().name("thaw-watch".into()).spawn(move || self.run()).map(|_| ())
    }

    fn run(self) {
        // Each once, until it changes.
        let mut reported: Option<Result<String, String>> = None;
        while !self.stop.load(Ordering::Relaxed) {
            let recovered = recover(&self.runtime_dir, &self.layout, &self.procfs, boot_now());
            let found = recovered.map_err(|error| display_chain(&error)).transpose();
            if found != reported {
                match &found {
                    Some(Ok(cgroup)) => {
                        tracing::warn!(
                            cgroup,
                            "thawed a cgroup that an experiment had left frozen: its guard has ended or is late"
                        );
                    }
                    Some(Err(error)) => tracing::error!(error, "cannot check for a cgroup that an experiment has left frozen"),
                    None => {}
                }
                reported = found;
            }
            std::thread::sleep(CHECK_INTERVAL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::freezer::FreezerVersion;
    use super::super::runtime_dir::FrozenRecord;
    use super::*;

    #[test]
    fn only_a_dead_or_late_guard_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir.path().join("cgroup/docker/a");
        std::fs::create_dir_all(&cgroup).unwrap();
        std::fs::write(cgroup.join("cgroup.freeze"), "1").unwrap();
        std::fs::write(dir.path().join("cgroup/cgroup.procs"), "").unwrap();
        let layout = Layout { v2: Some(dir.path().join("cgroup")), ..Layout::default() };
        let runtime_dir = RuntimeDir::new(&dir.path().join("run"));
        runtime_dir.create().unwrap();
        let procfs = Path::new("/proc");
        let own = crate::observe::kernel::proc::living_thread(Path::new("/proc/self")).unwrap().unwrap().1;
        let state = |guard_pid, guard_start, path: &str| FrozenRecord {
            guard_pid,
            guard_start,
            version: FreezerVersion::V2,
            path: path.into(),
            until: BootNs(100),
        };
        let recovered = |state: &FrozenRecord, now| {
            runtime_dir.write_state(state).unwrap();
            recover(&runtime_dir, &layout, procfs, BootNs(now)).unwrap()
        };
        let freeze = || std::fs::read_to_string(cgroup.join("cgroup.freeze")).unwrap();
        let (alive, path) = (std::process::id(), Some("/docker/a".to_owned()));
        assert_eq!((recovered(&state(alive, own, "/docker/a"), 99), freeze()), (None, "1".into()));
        assert_eq!((recovered(&state(alive, own, "/docker/a"), 100 + 2 * LATE_NS), freeze()), (path.clone(), "0".into()));
        // A living guard may freeze once more.
        assert!(runtime_dir.read_state().unwrap().is_some());
        std::fs::write(cgroup.join("cgroup.freeze"), "1").unwrap();
        assert_eq!((recovered(&state(alive, BootNs(0), "/docker/a"), 99), freeze()), (path, "0".into()));
        assert_eq!(recovered(&state(alive, BootNs(0), "/docker/gone"), 99), Some("/docker/gone".into()));
        assert_eq!(recover(&runtime_dir, &layout, procfs, BootNs(0)).unwrap(), None);
        // Where the hierarchy is not mounted, the file stays for a process that can thaw.
        runtime_dir.write_state(&state(alive, BootNs(0), "/docker/a")).unwrap();
        assert!(matches!(recover(&runtime_dir, &Layout::default(), procfs, BootNs(99)), Err(RecoverError::Thaw { .. })));
        assert!(runtime_dir.read_state().unwrap().is_some());
    }
}
