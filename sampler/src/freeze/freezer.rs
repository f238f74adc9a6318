//! The freezer of one cgroup: `cgroup.freeze` of version 2, `freezer.state` of version 1.
//!
//! A container has a freezer in the hierarchy that its runtime uses. On hosts with both versions its path in the hierarchy of the v1
//! freezer may differ from the one that is followed: it is that of its processes, from `/proc/PID/cgroup`. It is used only if the path
//! belongs to the same container or pod, since where a container has no cgroup, its processes are in the cgroup of another user.
//!
//! Version 2: Linux 5.2 (Documentation/admin-guide/cgroup-v2.rst, `cgroup.freeze`, `frozen` in `cgroup.events`). Version 1:
//! Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sampler_core::cgroup_path::{CgroupIdentity, parse};
use sampler_core::experiment::is_at_or_below;
use sampler_core::units::BootNs;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::observe::clock::boot_now;
use crate::observe::kernel::layout::{Layout, v1_freezer};
use crate::observe::kernel::proc::{directory, memberships};

/// How long a freeze may take. Processes in a system call that cannot be interrupted are frozen when it returns.
const FREEZES_WITHIN: Duration = Duration::from_millis(500);
/// How long a thaw may take.
const THAWS_WITHIN: Duration = Duration::from_millis(100);
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Cgroups that are searched for a process of the suspect.
const MAX_FOLDERS: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum FreezerVersion {
    V1,
    V2,
}

impl FreezerVersion {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

#[derive(Debug, Error)]
pub enum FreezerError {
    #[error("there is no cgroup {0}; name a running container")]
    NoCgroup(String),
    #[error(
        "the cgroup {0} cannot be frozen: it has neither cgroup.freeze (cgroup v2, Linux 5.2) nor a cgroup of its own in the v1 \
         hierarchy of the freezer"
    )]
    NoFreezer(String),
    #[error(
        "the hierarchy of the {} freezer is not mounted here with its root, or cannot be read, so the cgroup {path} cannot be found; run \
         this as root, where /sys/fs/cgroup is that of the host",
        version.name()
    )]
    NotMounted { version: FreezerVersion, path: String },
    #[error("{0:?} is not the path of a cgroup below the root of its hierarchy")]
    Path(String),
    #[error("the cgroup {0} has no process")]
    Empty(String),
    #[error("cannot {action} {path}; run this as root, with cgroupfs mounted writable", path = path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the cgroup {path} was not frozen within {ms} ms: a process is in a system call that cannot be interrupted")]
    NotFrozen { path: String, ms: u128 },
}

/// The freezer of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Freezer {
    pub version: FreezerVersion,
    /// The path within the hierarchy of the freezer.
    pub path: String,
    folder: PathBuf,
}

/// Whether the process is in the cgroup, or below it, in any hierarchy. `pid` is a folder of /proc: a number, or `self`.
pub fn contains_process(procfs: &Path, pid: &str, cgroup: &str) -> io::Result<bool> {
    let lines = memberships(&procfs.join(pid))?;
    Ok(lines.iter().any(|(_, path)| is_at_or_below(&String::from_utf8_lossy(path), cgroup)))
}

fn same_user(one: &CgroupIdentity, other: &CgroupIdentity) -> bool {
    let is_named = one.container_id.is_some() || one.pod_uid.is_some();
    is_named && one.kind == other.kind && one.container_id == other.container_id && one.pod_uid == other.pod_uid
}

/// A process in the cgroup or below it.
fn any_process(folder: &Path) -> Option<u32> {
    let mut folders = VecDeque::from([folder.to_owned()]);
    for _ in 0..MAX_FOLDERS {
        let folder = folders.pop_front()?;
        let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        if let Some(pid) = text.lines().find_map(|line| line.parse().ok()) {
            return Some(pid);
        }
        let below = fs::read_dir(&folder).into_iter().flatten().flatten();
        folders.extend(below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
    None
}

/// Fails if this cannot be determined, such as without the permission.
fn exists(path: PathBuf) -> Result<bool, FreezerError> {
    path.try_exists().map_err(|source| FreezerError::File { action: "find", path, source })
}

impl Freezer {
    /// The freezer of the cgroup at this path of a followed hierarchy.
    pub fn find(layout: &Layout, procfs: &Path, cgroup: &str) -> Result<Self, FreezerError> {
        let folders = layout.mounts().filter_map(|(_, mount)| directory(mount, cgroup.as_bytes()));
        let folders: Vec<PathBuf> = folders.filter(|folder| folder.is_dir()).collect();
        if folders.is_empty() {
            return Err(FreezerError::NoCgroup(cgroup.to_owned()));
        }
        if let Some(v2) = Self::v2(layout, cgroup) {
            return Ok(v2);
        }
        let pid = folders.iter().find_map(|folder| any_process(folder)).ok_or_else(|| FreezerError::Empty(cgroup.to_owned()))?;
        Self::v1(procfs, pid, cgroup).ok_or_else(|| FreezerError::NoFreezer(cgroup.to_owned()))
    }

    /// The freezer of version 2, if the cgroup has a process there.
    fn v2(layout: &Layout, cgroup: &str) -> Option<Self> {
        let freezer = Self::at(FreezerVersion::V2, layout.v2.as_deref()?, cgroup)?;
        any_process(&freezer.folder).is_some().then_some(freezer)
    }

    /// The freezer of version 1 that a process of the cgroup is in.
    fn v1(procfs: &Path, pid: u32, cgroup: &str) -> Option<Self> {
        let (hierarchy, mount) = v1_freezer(procfs)?;
        let lines = memberships(&procfs.join(pid.to_string())).ok()?;
        let (_, path) = lines.into_iter().find(|(id, _)| *id == hierarchy)?;
        let path = String::from_utf8(path).ok()?;
        let wanted = parse(cgroup);
        // The container of the process may be in the pod that is frozen: its cgroup is above.
        let above = path.char_indices().filter(|(_, c)| *c == '/').map(|(at, _)| &path[..at]).chain([path.as_str()]);
        let root = above.filter(|path| !path.is_empty()).find(|path| same_user(&parse(path), &wanted))?;
        Self::at(FreezerVersion::V1, &mount, root)
    }

    fn at(version: FreezerVersion, mount: &Path, path: &str) -> Option<Self> {
        let folder = directory(mount, path.as_bytes()).filter(|folder| folder != mount)?;
        let freezer = Self { version, path: path.to_owned(), folder };
        freezer.file().is_file().then_some(freezer)
    }

    /// The freezer that a file of a guard names; `None` only if its hierarchy is mounted here and the cgroup does not exist any more.
    pub fn named(layout: &Layout, procfs: &Path, version: FreezerVersion, path: &str) -> Result<Option<Self>, FreezerError> {
        let mount = match version {
            FreezerVersion::V2 => layout.v2.clone(),
            FreezerVersion::V1 => v1_freezer(procfs).map(|(_, mount)| mount),
        };
        // The root of a mounted hierarchy has this file; the folder of one that was unmounted does not.
        let mount = mount.filter(|mount| mount.join("cgroup.procs").exists());
        let mount = mount.ok_or_else(|| FreezerError::NotMounted { version, path: path.to_owned() })?;
        let folder = directory(&mount, path.as_bytes()).filter(|folder| *folder != mount);
        let freezer = Self { version, path: path.to_owned(), folder: folder.ok_or_else(|| FreezerError::Path(path.to_owned()))? };
        if exists(freezer.file())? {
            Ok(Some(freezer))
        } else if exists(freezer.folder)? {
            Err(FreezerError::NoFreezer(freezer.path))
        } else {
            Ok(None)
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.join(match self.version {
            FreezerVersion::V2 => "cgroup.freeze",
            FreezerVersion::V1 => "freezer.state",
        })
    }

    fn read(path: PathBuf) -> Result<String, FreezerError> {
        fs::read_to_string(&path).map_err(|source| FreezerError::File { action: "read", path, source })
    }

    fn write(&self, state: &str) -> Result<(), FreezerError> {
        let path = self.file();
        fs::write(&path, state).map_err(|source| FreezerError::File { action: "write", path, source })
    }

    /// Whether all of its processes are stopped, by this freezer or by one above it.
    pub fn is_frozen(&self) -> Result<bool, FreezerError> {
        match self.version {
            FreezerVersion::V2 => {
                let events = Self::read(self.folder.join("cgroup.events"))?;
                Ok(events.lines().any(|line| line == "frozen 1"))
            }
            FreezerVersion::V1 => Ok(Self::read(self.file())?.trim() == "FROZEN"),
        }
    }

    /// Whether it is thawed and is not about to be frozen.
    pub fn is_thawed(&self) -> Result<bool, FreezerError> {
        let state = Self::read(self.file())?;
        match self.version {
            FreezerVersion::V2 => Ok(state.trim() == "0" && !self.is_frozen()?),
            FreezerVersion::V1 => Ok(state.trim() == "THAWED"),
        }
    }

    /// Whether it is thawed, or is in a moment: its processes may not run yet when the thaw returns.
    pub fn becomes_thawed(&self) -> Result<bool, FreezerError> {
        let asked = Instant::now();
        while !self.is_thawed()? {
            if asked.elapsed() > THAWS_WITHIN {
                return Ok(false);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(true)
    }

    /// Fails if the freezer cannot be written, such as below a read-only mount. Does not change it.
    pub fn check_writable(&self) -> Result<(), FreezerError> {
        let path = self.file();
        let opened = fs::OpenOptions::new().write(true).open(&path);
        opened.map(drop).map_err(|source| FreezerError::File { action: "write", path, source })
    }

    /// Freezes the cgroup, and waits until its processes are stopped: the time from which they are. If they are not in time, it is thawed.
    pub fn freeze(&self) -> Result<BootNs, FreezerError> {
        self.write(match self.version {
            FreezerVersion::V2 => "1",
            FreezerVersion::V1 => "FROZEN",
        })?;
        let asked = Instant::now();
        let frozen = loop {
            match self.is_frozen() {
                Ok(true) => return Ok(boot_now()),
                Ok(false) if asked.elapsed() < FREEZES_WITHIN => std::thread::sleep(POLL_INTERVAL),
                Ok(false) => {
                    let (path, ms) = (self.path.clone(), FREEZES_WITHIN.as_millis());
                    break FreezerError::NotFrozen { path, ms };
                }
                Err(error) => break error,
            }
        };
        self.thaw()?;
        Err(frozen)
    }

    /// Thaws the cgroup; one that does not exist any more needs nothing.
    pub fn thaw(&self) -> Result<(), FreezerError> {
        let thawed = self.write(match self.version {
            FreezerVersion::V2 => "0",
            FreezerVersion::V1 => "THAWED",
        });
        match thawed {
            Err(FreezerError::File { source, .. })
                if source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(libc::ENODEV) =>
            {
                Ok(())
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn freezer(version: FreezerVersion, files: &[(&str, &str)]) -> (tempfile::TempDir, Freezer) {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("docker/a");
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
        let freezer = Freezer::at(version, dir.path(), "/docker/a").unwrap();
        (dir, freezer)
    }

    #[test]
    fn version_2_is_frozen_and_thawed_by_its_files() {
        let (dir, freezer) =
            freezer(FreezerVersion::V2, &[("cgroup.freeze", "0\n"), ("cgroup.events", "populated 1\nfrozen 1\n")]);
        let state = || fs::read_to_string(dir.path().join("docker/a/cgroup.freeze")).unwrap();
        // Frozen by a cgroup above it.
        assert!(freezer.is_frozen().unwrap() && !freezer.is_thawed().unwrap());
        freezer.freeze().unwrap();
        assert_eq!(state(), "1");
        freezer.thaw().unwrap();
        assert_eq!(state(), "0");
    }

    #[test]
    fn a_cgroup_that_does_not_freeze_in_time_is_thawed() {
        let (dir, freezer) =
            freezer(FreezerVersion::V2, &[("cgroup.freeze", "0\n"), ("cgroup.events", "populated 1\nfrozen 0\n")]);
        assert!(matches!(freezer.freeze(), Err(FreezerError::NotFrozen { .. })));
        assert_eq!(fs::read_to_string(dir.path().join("docker/a/cgroup.freeze")).unwrap(), "0");
    }

    #[test]
    fn version_1_has_one_file() {
        let (dir, freezer) = freezer(FreezerVersion::V1, &[("freezer.state", "THAWED\n")]);
        assert!(freezer.is_thawed().unwrap() && !freezer.is_frozen().unwrap());
        freezer.freeze().unwrap();
        assert!(!freezer.is_thawed().unwrap());
        freezer.thaw().unwrap();
        assert!(freezer.is_thawed().unwrap());
        drop(dir);
    }

    #[test]
    fn the_root_and_paths_outside_have_no_freezer() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.freeze"), "0").unwrap();
        for path in ["/", "", "/..", "/a/../..", "relative", "/no/such"] {
            assert_eq!(Freezer::at(FreezerVersion::V2, dir.path(), path), None, "{path}");
        }
    }

    #[test]
    fn only_a_cgroup_that_is_missing_in_a_mounted_hierarchy_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout { v2: Some(dir.path().to_owned()), ..Layout::default() };
        let named = |layout: &Layout, path| Freezer::named(layout, Path::new("/proc"), FreezerVersion::V2, path);
        fs::create_dir_all(dir.path().join("docker/a")).unwrap();
        assert!(matches!(named(&Layout::default(), "/docker/a"), Err(FreezerError::NotMounted { .. })));
        assert!(matches!(named(&layout, "/docker/gone"), Err(FreezerError::NotMounted { .. })));
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        assert_eq!(named(&layout, "/docker/gone").unwrap(), None);
        assert!(matches!(named(&layout, "/docker/a"), Err(FreezerError::NoFreezer(_))));
        fs::write(dir.path().join("docker/a/cgroup.freeze"), "0").unwrap();
        assert!(named(&layout, "/docker/a").unwrap().is_some());
        for path in ["/", "/../docker/a", "docker/a"] {
            assert!(matches!(named(&layout, path), Err(FreezerError::Path(_))), "{path}");
        }
        // A file in place of a folder: not "does not exist".
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(matches!(named(&layout, "/file/a"), Err(FreezerError::File { .. })));
    }

    #[test]
    fn the_cgroups_of_a_process_are_those_of_all_hierarchies() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("7")).unwrap();
        fs::write(dir.path().join("7/cgroup"), "9:freezer:/docker/a\n0::/user.slice/x.scope\n").unwrap();
        for (cgroup, expect) in
            [("/docker", true), ("/docker/a", true), ("/docker/a/b", false), ("/user.slice", true), ("/dock", false)]
        {
            assert_eq!(contains_process(dir.path(), "7", cgroup).unwrap(), expect, "{cgroup}");
        }
        assert!(contains_process(dir.path(), "8", "/").is_err());
    }
}
