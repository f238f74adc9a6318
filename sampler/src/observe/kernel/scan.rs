//! What is there now: cgroupfs (a directory's inode number is the cgroup's id) and /proc.
//!
//! Attach first, scan, drain the rings, then merge: events then beat the scan, and nothing falls between the two. The same scan
//! repairs the tables after lost events, and is all there is where kernel events cannot be had.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use procfs::ProcError;
use procfs::process::{MountInfo, MountInfos, Process};
use sampler_core::observation::{CgroupChange, CgroupFact, Observation, Place, ProcessSeen, ScanEnd};
use sampler_core::units::{BootNs, CgroupKey, Tgid};

use crate::observe::clock::boot_now;

/// v1 controllers worth following on a hybrid or v1 host, best first: every runtime puts its containers in these.
const V1_CONTROLLERS: [&str; 3] = ["pids", "memory", "cpu"];
/// /proc counts start times in these.
const CLOCK_TICK_NS: u64 = 10_000_000;
/// `PF_EXITING` of /proc/<pid>/stat's flags.
const EXITING: u32 = 0x4;
/// The root cgroup of every hierarchy has this inode number.
const ROOT_ID: u64 = 1;

/// The cgroup hierarchies to follow and where they are mounted.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    pub v2: Option<PathBuf>,
    /// Controller name, hierarchy id, mount point.
    pub v1: Option<(&'static str, u32, PathBuf)>,
}

impl Layout {
    pub fn name(&self) -> &'static str {
        match (&self.v2, &self.v1) {
            (Some(_), Some(_)) => "hybrid",
            (Some(_), None) => "v2",
            (None, Some(_)) => "v1",
            (None, None) => "none",
        }
    }

    /// Hierarchy and mount point of each that is followed.
    pub fn mounts(&self) -> impl Iterator<Item = (u32, &Path)> {
        let v2 = self.v2.as_deref().map(|mount| (0, mount));
        v2.into_iter().chain(self.v1.as_ref().map(|(_, id, mount)| (*id, mount.as_path())))
    }
}

/// A mount that another one covers cannot be walked.
fn visible(mount: &MountInfo) -> bool {
    let Ok(meta) = fs::metadata(&mount.mount_point) else { return false };
    let device = meta.dev();
    mount.majmin == format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

pub fn layout(procfs_root: &Path) -> Layout {
    let mounts: MountInfos = match Process::new_with_root(procfs_root.join("self")).and_then(|p| p.mountinfo()) {
        Ok(mounts) => mounts,
        Err(error) => {
            tracing::warn!(%error, "cannot read the mount table: no cgroup can be scanned");
            return Layout::default();
        }
    };
    let controllers = fs::read_to_string(procfs_root.join("cgroups")).unwrap_or_default();
    let v2 = mounts.0.iter().find(|m| m.fs_type == "cgroup2" && visible(m)).map(|m| m.mount_point.clone());
    let v1 = V1_CONTROLLERS.iter().find_map(|name| {
        let hierarchy: u32 = controllers.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(name)).then(|| words.next())??.parse().ok()
        })?;
        let wanted = |m: &&MountInfo| m.fs_type == "cgroup" && m.super_options.contains_key(*name) && visible(m);
        let mount = mounts.0.iter().find(wanted)?;
        (hierarchy != 0).then(|| (*name, hierarchy, mount.mount_point.clone()))
    });
    Layout { v2, v1 }
}

/// Path within its hierarchy to key, for reading `/proc/<pid>/cgroup`.
#[derive(Debug, Default)]
struct Paths(HashMap<(u32, String), CgroupKey>);

/// What a scan found. Merge it only after the rings were drained past `end.ended`.
pub struct Scan {
    pub facts: Vec<Observation>,
    pub end: ScanEnd,
    /// What could not be read; what vanished meanwhile is no problem.
    pub problems: Vec<String>,
}

/// Every cgroup, then every process.
pub fn scan(procfs_root: &Path, layout: &Layout) -> Scan {
    let began = boot_now();
    let (mut facts, mut problems) = (Vec::new(), Vec::new());
    let mut paths = Paths::default();
    if layout.v2.is_none() {
        // Everybody is in the root of a v2 that is mounted nowhere.
        facts.push(root(0, ROOT_ID, began));
    }
    for (hierarchy, mount) in layout.mounts() {
        let result = walk(hierarchy, mount, began, &mut |_, _| {}, &mut |path, fact| {
            paths.0.insert((hierarchy, path.to_owned()), fact.key);
            facts.push(Observation::Cgroup(fact));
        });
        if let Err(error) = result {
            problems.push(format!("{}: {error}", mount.display()));
        }
    }
    let all_cgroups = problems.is_empty();
    match pids(procfs_root) {
        Ok(pids) => {
            for pid in pids {
                match look(procfs_root, pid, layout, &paths) {
                    Ok(found) => facts.extend(found.map(Observation::ProcessSeen)),
                    Err(problem) => problems.push(problem),
                }
            }
        }
        Err(error) => problems.push(format!("{}: {error}", procfs_root.display())),
    }
    let all_processes = problems.is_empty();
    let end = ScanEnd { began, ended: boot_now(), all_cgroups, all_processes, repairs_since: None };
    Scan { facts, end, problems }
}

/// Looks at these processes only, each with the cgroups that it is in.
pub fn sight(procfs_root: &Path, layout: &Layout, pids: impl Iterator<Item = u32>) -> Scan {
    let began = boot_now();
    let (mut facts, mut problems) = (Vec::new(), Vec::new());
    let mut known = HashSet::new();
    for pid in pids {
        match look(procfs_root, pid, layout, &Paths::default()) {
            Ok(Some(seen)) => {
                above(procfs_root, pid, layout, began, &mut known, &mut facts);
                facts.push(Observation::ProcessSeen(seen));
            }
            Ok(None) => {}
            Err(problem) => problems.push(problem),
        }
    }
    let all_processes = problems.is_empty();
    Scan { facts, end: ScanEnd { began, ended: boot_now(), all_cgroups: false, all_processes, repairs_since: None }, problems }
}

/// The cgroups from the root down to where a process is: they may be newer than the last walk.
fn above(procfs: &Path, pid: u32, layout: &Layout, at: BootNs, known: &mut HashSet<CgroupKey>, to: &mut Vec<Observation>) {
    let Ok(memberships) = Process::new_with_root(procfs.join(pid.to_string())).and_then(|p| p.cgroups()) else { return };
    for (hierarchy, mount) in layout.mounts() {
        let Some(group) = memberships.0.iter().find(|c| c.hierarchy == hierarchy) else { continue };
        let (mut folder, mut parent) = (mount.to_path_buf(), None);
        for name in std::iter::once("").chain(group.pathname.split('/').filter(|name| !name.is_empty())) {
            folder.push(name);
            let Ok(meta) = fs::metadata(&folder) else { break };
            let key = CgroupKey { hierarchy, id: meta.ino() };
            if known.insert(key) {
                to.push(Observation::Cgroup(CgroupFact { change: CgroupChange::Seen, key, parent, name: name.to_owned(), at }));
            }
            parent = Some(key);
        }
    }
}

fn root(hierarchy: u32, id: u64, at: BootNs) -> Observation {
    let key = CgroupKey { hierarchy, id };
    Observation::Cgroup(CgroupFact { change: CgroupChange::Seen, key, parent: None, name: String::new(), at })
}

/// Every cgroup of a hierarchy, parents first. `enter` is called before a directory is listed, so a watch set there misses nothing.
pub fn walk(
    hierarchy: u32,
    mount: &Path,
    at: BootNs,
    enter: &mut impl FnMut(&Path, CgroupKey),
    give: &mut impl FnMut(&str, CgroupFact),
) -> io::Result<()> {
    let key = CgroupKey { hierarchy, id: fs::metadata(mount)?.ino() };
    give("/", CgroupFact { change: CgroupChange::Seen, key, parent: None, name: String::new(), at });
    below(mount.to_path_buf(), String::new(), key, at, enter, give);
    Ok(())
}

/// Every cgroup below one.
pub fn below(
    folder: PathBuf,
    path: String,
    key: CgroupKey,
    at: BootNs,
    enter: &mut impl FnMut(&Path, CgroupKey),
    give: &mut impl FnMut(&str, CgroupFact),
) {
    let mut queue = vec![(folder, path, key)];
    while let Some((folder, path, parent)) = queue.pop() {
        enter(&folder, parent);
        // A cgroup that is removed while we walk is no problem: its removal is reported on its own.
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let Ok(meta) = entry.metadata() else { continue };
            let name = entry.file_name().to_string_lossy().into_owned();
            let key = CgroupKey { hierarchy: parent.hierarchy, id: meta.ino() };
            let path = format!("{path}/{name}");
            give(&path, CgroupFact { change: CgroupChange::Seen, key, parent: Some(parent), name, at });
            queue.push((entry.path(), path, key));
        }
    }
}

fn pids(procfs_root: &Path) -> io::Result<Vec<u32>> {
    let entries = fs::read_dir(procfs_root)?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// `None` when it does not exist or is ending; an error when it is there and cannot be read.
fn look(procfs_root: &Path, pid: u32, layout: &Layout, paths: &Paths) -> Result<Option<ProcessSeen>, String> {
    let began = boot_now();
    let folder = procfs_root.join(pid.to_string());
    let gone = |error: ProcError| match error {
        ProcError::NotFound(_) => Ok(None),
        // ESRCH: it ended between open and read.
        ProcError::Io(error, _) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        error => Err(format!("{}: {error}", folder.display())),
    };
    let read = Process::new_with_root(folder.clone()).and_then(|process| Ok((process.stat()?, process.cgroups()?)));
    let (stat, memberships) = match read {
        Ok(read) => read,
        Err(error) => return gone(error),
    };
    // A leader that has ended stands for its group as long as other threads run.
    if stat.num_threads <= 1 && (stat.flags & EXITING != 0 || matches!(stat.state, 'Z' | 'X')) {
        return Ok(None);
    }
    let find = |hierarchy: u32, mount: &Path| {
        let path = &memberships.0.iter().find(|c| c.hierarchy == hierarchy)?.pathname;
        // Made since the walk: its directory says the id.
        let direct = || fs::metadata(mount.join(path.trim_start_matches('/'))).ok().map(|meta| meta.ino());
        paths.0.get(&(hierarchy, path.clone())).map(|key| key.id).or_else(direct)
    };
    let v2_id = match &layout.v2 {
        Some(mount) => find(0, mount),
        None => Some(ROOT_ID),
    };
    let (v1_hierarchy, v1_id) = match &layout.v1 {
        Some((_, id, mount)) => (*id, find(*id, mount)),
        None => (0, Some(0)),
    };
    // Moved or ended while we looked: events say where to.
    let (Some(v2_id), Some(v1_id)) = (v2_id, v1_id) else { return Ok(None) };
    let place = Place { v2_id, v1_id, v1_hierarchy };
    let start = BootNs(stat.starttime * CLOCK_TICK_NS);
    Ok(Some(ProcessSeen { tgid: Tgid(pid), start, began, ended: boot_now(), place }))
}
