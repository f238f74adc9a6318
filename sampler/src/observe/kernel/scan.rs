//! What was there before the first event: cgroupfs (a directory's inode number is the cgroup's id) and /proc.
//!
//! Run it after attaching and before draining the rings: events then beat the scan, and nothing falls between the two.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use procfs::process::{MountInfos, Process};
use sampler_core::observation::{CgroupChange, CgroupFact, Observation, ProcessChange, ProcessFact};
use sampler_core::units::{BootNs, CgroupKey, Tgid};

/// v1 controllers worth following on a hybrid or v1 host, best first: every runtime puts its containers in these.
const V1_CONTROLLERS: [&str; 3] = ["pids", "memory", "cpu"];
/// /proc counts start times in these.
const CLOCK_TICK_NS: u64 = 10_000_000;

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
    let mut found = Layout::default();
    for mount in &mounts.0 {
        if mount.fs_type == "cgroup2" && found.v2.is_none() {
            found.v2 = Some(mount.mount_point.clone());
        }
    }
    found.v1 = V1_CONTROLLERS.iter().find_map(|name| {
        let hierarchy: u32 = controllers.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(name)).then(|| words.next())??.parse().ok()
        })?;
        let mount = mounts.0.iter().find(|m| m.fs_type == "cgroup" && m.super_options.contains_key(*name))?;
        (hierarchy != 0).then(|| (*name, hierarchy, mount.mount_point.clone()))
    });
    found
}

/// Path within its hierarchy to key, for reading `/proc/<pid>/cgroup`.
#[derive(Debug, Default)]
struct Paths(HashMap<(u32, String), CgroupKey>);

/// Feeds every cgroup, then every process. Returns the problems met; what vanished meanwhile is none.
pub fn scan(procfs_root: &Path, layout: &Layout, at: BootNs, mut give: impl FnMut(Observation)) -> Vec<String> {
    let mut problems = Vec::new();
    let mut paths = Paths::default();
    let mounts = layout.v2.iter().map(|m| (0, m)).chain(layout.v1.iter().map(|(_, id, m)| (*id, m)));
    for (hierarchy, mount) in mounts {
        if let Err(error) = cgroups(hierarchy, mount, at, &mut paths, &mut give) {
            problems.push(format!("{}: {error}", mount.display()));
        }
    }
    match fs::read_dir(procfs_root) {
        Ok(entries) => {
            for entry in entries.flatten() {
                let tgid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
                if let Some(tgid) = tgid
                    && let Some(fact) = process(entry.path(), tgid, layout, &paths, at)
                {
                    give(Observation::Process(fact));
                }
            }
        }
        Err(error) => problems.push(format!("{}: {error}", procfs_root.display())),
    }
    problems
}

fn cgroups(hierarchy: u32, mount: &Path, at: BootNs, paths: &mut Paths, give: &mut impl FnMut(Observation)) -> io::Result<()> {
    let root = CgroupKey { hierarchy, id: fs::metadata(mount)?.ino() };
    let change = CgroupChange::Seen;
    give(Observation::Cgroup(CgroupFact { change, key: root, parent: None, name: String::new(), at }));
    paths.0.insert((hierarchy, "/".to_owned()), root);
    let mut queue = vec![(mount.to_path_buf(), String::new(), root)];
    while let Some((folder, path, parent)) = queue.pop() {
        // A cgroup that is removed while we walk is no problem: its removal is in the ring.
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if !meta.is_dir() {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            let key = CgroupKey { hierarchy, id: meta.ino() };
            let path = format!("{path}/{name}");
            give(Observation::Cgroup(CgroupFact { change: CgroupChange::Seen, key, parent: Some(parent), name, at }));
            paths.0.insert((hierarchy, path.clone()), key);
            queue.push((entry.path(), path, key));
        }
    }
    Ok(())
}

fn process(folder: PathBuf, tgid: u32, layout: &Layout, paths: &Paths, at: BootNs) -> Option<ProcessFact> {
    let process = Process::new_with_root(folder).ok()?;
    let start_ticks = process.stat().ok()?.starttime;
    let memberships = process.cgroups().ok()?;
    let find = |hierarchy: u32, mount: &Path| {
        let path = &memberships.0.iter().find(|c| c.hierarchy == hierarchy)?.pathname;
        // Made since the walk: its directory says the id.
        let direct = || fs::metadata(mount.join(path.trim_start_matches('/'))).ok().map(|m| CgroupKey { hierarchy, id: m.ino() });
        paths.0.get(&(hierarchy, path.clone())).copied().or_else(direct)
    };
    let v2 = layout.v2.as_deref().and_then(|mount| find(0, mount)).unwrap_or(CgroupKey { hierarchy: 0, id: 0 });
    let v1 = layout.v1.as_ref().and_then(|(_, id, mount)| find(*id, mount));
    Some(ProcessFact {
        change: ProcessChange::Seen,
        tgid: Tgid(tgid),
        start: BootNs(start_ticks * CLOCK_TICK_NS),
        coarse_start: true,
        at,
        v2,
        v1,
    })
}
