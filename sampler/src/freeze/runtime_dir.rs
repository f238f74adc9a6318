//! The folder in which experiments of one machine find each other: the lock, and the file of the guard.
//!
//! It is below /run, which is empty after a boot, as all freezers are thawed then.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::geteuid;
use sampler_core::units::BootNs;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::freezer::FreezerVersion;

const LOCK: &str = "experiment.lock";
const STATE: &str = "frozen.json";
/// A path of a cgroup and some numbers.
const MAX_STATE_BYTES: u64 = 16 << 10;

#[derive(Debug, Error)]
pub enum RuntimeDirError {
    #[error("cannot create {path}; run this as root, or set --runtime-dir to a folder of this user", path = path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("{path} belongs to another user, or others may write to it: it must belong to root or to this user", path = path.display())]
    Foreign { path: PathBuf },
    #[error(
        "another experiment runs on this machine, or its guard does (it has locked {path}); wait until it has ended",
        path = path.display()
    )]
    Locked { path: PathBuf },
    #[error(
        "the guard of another experiment (process {guard_pid}) has not ended and may have frozen {cgroup}; wait until it has removed \
         {path}, or end the process",
        path = path.display()
    )]
    Guarded { path: PathBuf, guard_pid: u32, cgroup: String },
    #[error("cannot {action} {path}", path = path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is not the file of a guard; remove it after `cat` shows that nothing is frozen", path = path.display())]
    Content { path: PathBuf, source: serde_json::Error },
}

/// What a guard is about to freeze. Written before, removed after the thaw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenRecord {
    pub guard_pid: u32,
    /// Start of the guard in boot time, to 10 ms: a reused PID is another process.
    pub guard_start: BootNs,
    pub version: FreezerVersion,
    /// Path within the hierarchy of the freezer.
    pub path: String,
    /// When the guard thaws by itself.
    pub until: BootNs,
}

/// A guard: a process, also where its PID is reused later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardId {
    pub pid: u32,
    pub start: BootNs,
}

/// The runtime folder.
#[derive(Clone, Debug)]
pub struct RuntimeDir(PathBuf);

/// Held while an experiment runs; the kernel releases it when this process and the guard have ended.
#[derive(Debug)]
pub struct ExperimentLock(File);

fn is_trusted(meta: &fs::Metadata) -> bool {
    let is_own = meta.uid() == 0 || meta.uid() == geteuid().as_raw();
    is_own && meta.mode() & 0o022 == 0
}

impl ExperimentLock {
    /// Runs `spawn`. The process that it starts holds the lock, too.
    pub fn inherited<T>(&self, spawn: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        // Of the descriptor, not of the open file, so that only processes that are started meanwhile inherit it.
        fcntl_setfd(&self.0, FdFlags::empty())?;
        let spawned = spawn();
        fcntl_setfd(&self.0, FdFlags::CLOEXEC)?;
        spawned
    }
}

impl FrozenRecord {
    /// Whether both are of one guard.
    fn is_of(&self, guard: &GuardId) -> bool {
        self.guard_pid == guard.pid && self.guard_start == guard.start
    }

    pub fn guard(&self) -> GuardId {
        GuardId { pid: self.guard_pid, start: self.guard_start }
    }
}

impl RuntimeDir {
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    fn state_path(&self) -> PathBuf {
        self.0.join(STATE)
    }

    /// Creates the folder if it does not exist.
    pub fn create(&self) -> Result<(), RuntimeDirError> {
        let created = (|| {
            if self.0.is_dir() {
                return Ok(());
            }
            fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.0)?;
            // Whatever the umask: an agent of another user reads it.
            fs::set_permissions(&self.0, fs::Permissions::from_mode(0o755))
        })();
        created.map_err(|source| RuntimeDirError::Create { path: self.0.clone(), source })?;
        let meta = fs::metadata(&self.0).map_err(|source| self.error("read", self.0.clone(), source))?;
        if is_trusted(&meta) { Ok(()) } else { Err(RuntimeDirError::Foreign { path: self.0.clone() }) }
    }

    fn error(&self, action: &'static str, path: PathBuf, source: io::Error) -> RuntimeDirError {
        RuntimeDirError::File { action, path, source }
    }

    /// Locks the machine for one experiment. Does not wait.
    pub fn lock(&self) -> Result<ExperimentLock, RuntimeDirError> {
        let path = self.0.join(LOCK);
        let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = opened.map_err(|source| self.error("open", path.clone(), source))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(ExperimentLock(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RuntimeDirError::Locked { path }),
            Err(errno) => Err(self.error("lock", path, errno.into())),
        }
    }

    /// Writes the file of a guard; after this returns, the file is complete for every reader.
    pub fn write_state(&self, state: &FrozenRecord) -> Result<(), RuntimeDirError> {
        let (path, part) = (self.state_path(), self.0.join(format!(".{STATE}.{}", std::process::id())));
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&part)?;
            file.set_permissions(fs::Permissions::from_mode(0o644))?;
            file.write_all(&serde_json::to_vec(state)?)?;
            fs::rename(&part, &path)
        })();
        written.map_err(|source| self.error("write", path, source))
    }

    /// The file of a guard; `None` if there is none.
    pub fn read_state(&self) -> Result<Option<FrozenRecord>, RuntimeDirError> {
        let path = self.state_path();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.error("read", path, source)),
        };
        let meta = file.metadata().map_err(|source| self.error("read", path.clone(), source))?;
        if !meta.is_file() || !is_trusted(&meta) {
            return Err(RuntimeDirError::Foreign { path });
        }
        let text = io::read_to_string(io::Read::take(file, MAX_STATE_BYTES));
        let text = text.map_err(|source| self.error("read", path.clone(), source))?;
        serde_json::from_str(&text).map(Some).map_err(|source| RuntimeDirError::Content { path, source })
    }

    /// Whether this guard may have frozen its cgroup: it writes its file before. A file that cannot be read may be its own.
    pub fn may_have_frozen(&self, guard: &GuardId) -> bool {
        self.read_state().map_or(true, |state| state.is_some_and(|state| state.is_of(guard)))
    }

    /// Fails if there is the file of a guard.
    pub fn check_unguarded(&self) -> Result<(), RuntimeDirError> {
        match self.read_state()? {
            Some(state) => {
                Err(RuntimeDirError::Guarded { path: self.state_path(), guard_pid: state.guard_pid, cgroup: state.path })
            }
            None => Ok(()),
        }
    }

    /// Removes the file of this guard, if it exists; that of another guard stays.
    pub fn remove_state(&self, guard: &GuardId) -> Result<(), RuntimeDirError> {
        if !self.read_state()?.is_some_and(|state| state.is_of(guard)) {
            return Ok(());
        }
        match fs::remove_file(self.state_path()) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(self.error("remove", self.state_path(), source)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> FrozenRecord {
        FrozenRecord {
            guard_pid: 7,
            guard_start: BootNs(50),
            version: FreezerVersion::V1,
            path: "/docker/a".into(),
            until: BootNs(90),
        }
    }

    fn runtime_dir() -> (tempfile::TempDir, RuntimeDir) {
        let dir = tempfile::tempdir().unwrap();
        let runtime_dir = RuntimeDir::new(&dir.path().join("run/gpu-sampler"));
        runtime_dir.create().unwrap();
        (dir, runtime_dir)
    }

    #[test]
    fn one_experiment_holds_the_lock() {
        let (_dir, runtime_dir) = runtime_dir();
        let lock = runtime_dir.lock().unwrap();
        assert!(matches!(runtime_dir.lock(), Err(RuntimeDirError::Locked { .. })));
        // The guard holds it after the command has ended.
        let mut guard = lock.inherited(|| std::process::Command::new("sleep").arg("60").spawn()).unwrap();
        drop(lock);
        assert!(matches!(runtime_dir.lock(), Err(RuntimeDirError::Locked { .. })));
        guard.kill().unwrap();
        guard.wait().unwrap();
        runtime_dir.lock().unwrap();
    }

    #[test]
    fn the_file_of_a_guard_survives_and_is_removed() {
        let (_dir, runtime_dir) = runtime_dir();
        assert_eq!(runtime_dir.read_state().unwrap(), None);
        runtime_dir.write_state(&state()).unwrap();
        assert_eq!(runtime_dir.read_state().unwrap(), Some(state()));
        assert!(matches!(runtime_dir.check_unguarded(), Err(RuntimeDirError::Guarded { guard_pid: 7, .. })));
        runtime_dir.remove_state(&GuardId { pid: 7, start: BootNs(51) }).unwrap();
        assert_eq!(runtime_dir.read_state().unwrap(), Some(state()));
        runtime_dir.remove_state(&state().guard()).unwrap();
        runtime_dir.remove_state(&state().guard()).unwrap();
        runtime_dir.check_unguarded().unwrap();
        assert_eq!(runtime_dir.read_state().unwrap(), None);
    }

    #[test]
    fn a_file_that_others_may_write_is_not_trusted() {
        let (_dir, runtime_dir) = runtime_dir();
        runtime_dir.write_state(&state()).unwrap();
        fs::set_permissions(runtime_dir.state_path(), fs::Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(runtime_dir.read_state(), Err(RuntimeDirError::Foreign { .. })));
        fs::set_permissions(runtime_dir.state_path(), fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(runtime_dir.state_path(), "{}").unwrap();
        assert!(matches!(runtime_dir.read_state(), Err(RuntimeDirError::Content { .. })));
        fs::set_permissions(runtime_dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(runtime_dir.create(), Err(RuntimeDirError::Foreign { .. })));
    }
}
