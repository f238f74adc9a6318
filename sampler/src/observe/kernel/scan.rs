//! Scans the current state: cgroupfs, and processes from the kernel's task iterator or from /proc.
//!
//! The order is attach, scan, drain the rings, merge. Events then take precedence over the scan, and nothing is missed between the two.
//! The same scan repairs the tables after lost events, and is the only source where kernel events are not available.

use std::collections::HashSet;
use std::path::Path;

use sampler_core::observation::{Observation, ProcessSeen, ScanEnd};
use sampler_core::units::{BootNs, CgroupKey, Tgid};

use super::cgroup_id;
use super::cgroupfs::{fact, walk};
use super::layout::Layout;
use super::proc::{Directories, directory, memberships, pids, read_process, thread_group};
use crate::observe::clock::boot_now;

/// The result of a scan. Merge it only after the rings have been drained past `end.ended`.
pub struct Scan {
    pub facts: Vec<Observation>,
    pub end: ScanEnd,
    /// Read failures; a process or cgroup that vanished during the scan is not a problem.
    pub problems: Vec<String>,
}

impl Scan {
    /// Whether everything was read, so that what was not found no longer exists.
    pub fn complete(&self) -> bool {
        self.end.all_cgroups && self.end.all_processes && self.problems.is_empty()
    }

    fn begin() -> Self {
        let at = boot_now();
        let end = ScanEnd { began: at, ended: at, all_cgroups: false, all_processes: false, repairs_since: None };
        Self { facts: Vec::new(), end, problems: Vec::new() }
    }

    fn ended(mut self) -> Self {
        self.end.ended = boot_now();
        self
    }

    fn cgroups(&mut self, layout: &Layout) -> Directories {
        let at = self.end.began;
        let mut directories = Directories::new();
        self.end.all_cgroups = true;
        for (hierarchy, mount) in layout.mounts() {
            let facts = &mut self.facts;
            let result = walk(hierarchy, mount, at, &mut |_, _| {}, &mut |path, fact| {
                directories.insert(path.to_path_buf(), fact.key);
                facts.push(Observation::Cgroup(fact));
            });
            if let Err(error) = result {
                self.end.all_cgroups = false;
                self.problems.push(format!("{}: {error}", mount.display()));
            }
        }
        if layout.v2.is_none() {
            // Where v2 is not mounted, every process is in its root. Its id has the form that the walk has found on other hierarchies.
            let key = CgroupKey { hierarchy: 0, id: cgroup_id::of_root() };
            self.facts.push(Observation::Cgroup(fact(key, None, "".as_ref(), at)));
        }
        directories
    }

    /// Adds the processes in /proc that are not in `known`.
    fn processes(&mut self, procfs_root: &Path, layout: &Layout, directories: &Directories, known: &HashSet<u32>) {
        let pids = match pids(procfs_root) {
            Ok(pids) => pids,
            Err(error) => {
                self.problems.push(format!("{}: {error}", procfs_root.display()));
                return;
            }
        };
        self.end.all_processes = true;
        for pid in pids.into_iter().filter(|pid| !known.contains(pid)) {
            match read_process(procfs_root, pid, layout, directories) {
                Ok(found) => self.facts.extend(found.map(Observation::ProcessSeen)),
                Err(problem) => {
                    self.problems.push(problem);
                    // The process exists and must not be treated as exited.
                    self.end.all_processes = false;
                }
            }
        }
    }
}

/// Scans every cgroup, then every process in /proc.
pub fn of_proc(procfs_root: &Path, layout: &Layout) -> Scan {
    of_kernel(procfs_root, layout, || Ok(Vec::new()))
}

/// Scans every cgroup, then every process from the task iterator. /proc is read for processes that the iterator does not list (some
/// kernels hide the init process from programs) and for those that started during the scan.
pub fn of_kernel(procfs_root: &Path, layout: &Layout, tasks: impl FnOnce() -> Result<Vec<ProcessSeen>, String>) -> Scan {
    let mut scan = Scan::begin();
    let directories = scan.cgroups(layout);
    let listed = tasks().unwrap_or_else(|problem| {
        scan.problems.push(problem);
        Vec::new()
    });
    let known: HashSet<u32> = listed.iter().map(|seen| seen.tgid.0).collect();
    scan.facts.extend(listed.into_iter().map(Observation::ProcessSeen));
    scan.processes(procfs_root, layout, &directories, &known);
    scan.ended()
}

/// Scans every cgroup and no process.
pub fn of_cgroups(layout: &Layout) -> Scan {
    let mut scan = Scan::begin();
    scan.cgroups(layout);
    scan.ended()
}

/// Scans only these processes, each with its cgroups. A process that is not found has exited.
pub fn of_processes(procfs_root: &Path, layout: &Layout, pids: impl Iterator<Item = u32>) -> Scan {
    let mut scan = Scan::begin();
    let mut known = HashSet::new();
    for pid in pids {
        let began = boot_now();
        if thread_group(procfs_root, pid).is_some_and(|thread_group| thread_group != pid) {
            continue;
        }
        match read_process(procfs_root, pid, layout, &Directories::new()) {
            Ok(Some(seen)) => {
                add_cgroups(procfs_root, pid, layout, began, &mut known, &mut scan.facts);
                scan.facts.push(Observation::ProcessSeen(seen));
            }
            Ok(None) => scan.facts.push(Observation::ProcessGone { tgid: Tgid(pid), began }),
            Err(problem) => scan.problems.push(problem),
        }
    }
    scan.ended()
}

/// Adds the cgroups from the root down to that of a process: they may be newer than the last walk.
fn add_cgroups(procfs: &Path, pid: u32, layout: &Layout, at: BootNs, known: &mut HashSet<CgroupKey>, to: &mut Vec<Observation>) {
    let Ok(lines) = memberships(&procfs.join(pid.to_string())) else { return };
    for (hierarchy, mount) in layout.mounts() {
        let path = lines.iter().find(|(id, _)| *id == hierarchy).and_then(|(_, path)| directory(mount, path));
        let Some(path) = path else { continue };
        let Ok(below) = path.strip_prefix(mount) else { continue };
        let (mut folder, mut parent) = (mount.to_path_buf(), None);
        for name in std::iter::once("".as_ref()).chain(below.iter()) {
            folder.push(name);
            let Ok(id) = cgroup_id::of(&folder) else { break };
            let key = CgroupKey { hierarchy, id };
            if known.insert(key) {
                to.push(Observation::Cgroup(fact(key, parent, name, at)));
            }
            parent = Some(key);
        }
    }
}
