//! What is there now: cgroupfs, and processes from the kernel's task iterator or from /proc.
//!
//! Attach first, scan, drain the rings, then merge: events then beat the scan, and nothing falls between the two. The same scan
//! repairs the tables after lost events, and is all there is where kernel events cannot be had.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use sampler_core::observation::{Observation, ProcessSeen, ScanEnd};
use sampler_core::units::{BootNs, CgroupKey, Tgid};

use super::cgroupfs::{fact, walk};
use super::layout::{Layout, ROOT_ID};
use super::proc::{Directories, directory, group, look, memberships, pids};
use crate::observe::clock::boot_now;

/// What a scan found. Merge it only after the rings were drained past `end.ended`.
pub struct Scan {
    pub facts: Vec<Observation>,
    pub end: ScanEnd,
    /// What could not be read; what vanished meanwhile is no problem.
    pub problems: Vec<String>,
}

impl Scan {
    /// Everything was looked at, so what was not found is gone.
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
        if layout.v2.is_none() {
            // Everybody is in the root of a v2 that is mounted nowhere.
            let key = CgroupKey { hierarchy: 0, id: ROOT_ID };
            self.facts.push(Observation::Cgroup(fact(key, None, "".as_ref(), at)));
        }
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
        directories
    }

    /// Those in /proc that are not known.
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
            match look(procfs_root, pid, layout, directories) {
                Ok(found) => self.facts.extend(found.map(Observation::ProcessSeen)),
                Err(problem) => {
                    self.problems.push(problem);
                    // There, whatever it is: it must not be taken for gone.
                    self.end.all_processes = false;
                }
            }
        }
    }
}

/// Every cgroup, then every process in /proc.
pub fn of_proc(procfs_root: &Path, layout: &Layout) -> Scan {
    let mut scan = Scan::begin();
    let directories = scan.cgroups(layout);
    scan.processes(procfs_root, layout, &directories, &HashSet::new());
    scan.ended()
}

/// Every cgroup, then every process as the kernel lists them; /proc is looked at for those that the kernel keeps to itself (some
/// hide the init process from programs) or that came meanwhile.
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

/// Every cgroup and no process.
pub fn of_cgroups(layout: &Layout) -> Scan {
    let mut scan = Scan::begin();
    scan.cgroups(layout);
    scan.ended()
}

/// Looks at these processes only, each with the cgroups that it is in. One that is not found has ended.
pub fn sight(procfs_root: &Path, layout: &Layout, pids: impl Iterator<Item = u32>) -> Scan {
    let mut scan = Scan::begin();
    let mut known = HashSet::new();
    for pid in pids {
        let began = boot_now();
        if group(procfs_root, pid).is_some_and(|group| group != pid) {
            continue;
        }
        match look(procfs_root, pid, layout, &Directories::new()) {
            Ok(Some(seen)) => {
                above(procfs_root, pid, layout, began, &mut known, &mut scan.facts);
                scan.facts.push(Observation::ProcessSeen(seen));
            }
            Ok(None) => scan.facts.push(Observation::ProcessGone { tgid: Tgid(pid), began }),
            Err(problem) => scan.problems.push(problem),
        }
    }
    scan.ended()
}

/// The cgroups from the root down to where a process is: they may be newer than the last walk.
fn above(procfs: &Path, pid: u32, layout: &Layout, at: BootNs, known: &mut HashSet<CgroupKey>, to: &mut Vec<Observation>) {
    let Ok(lines) = memberships(&procfs.join(pid.to_string())) else { return };
    for (hierarchy, mount) in layout.mounts() {
        let path = lines.iter().find(|(id, _)| *id == hierarchy).and_then(|(_, path)| directory(mount, path));
        let Some(path) = path else { continue };
        let Ok(below) = path.strip_prefix(mount) else { continue };
        let (mut folder, mut parent) = (mount.to_path_buf(), None);
        for name in std::iter::once("".as_ref()).chain(below.iter()) {
            folder.push(name);
            let Ok(meta) = fs::metadata(&folder) else { break };
            let key = CgroupKey { hierarchy, id: meta.ino() };
            if known.insert(key) {
                to.push(Observation::Cgroup(fact(key, parent, name, at)));
            }
            parent = Some(key);
        }
    }
}
