//! The cgroup hierarchies of the host and their mount points.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use procfs::process::{MountInfo, MountInfos, Process};

use super::cgroup_id::ROOT_INODE;

/// v1 controllers to follow on a hybrid or v1 host, in order of preference: every runtime creates its cgroups in these.
const V1_CONTROLLERS: [&str; 3] = ["pids", "memory", "cpu"];
/// The inode of the initial cgroup namespace (PROC_CGROUP_INIT_INO). In any other namespace, paths are relative to another root.
const INIT_CGROUP_NAMESPACE: &str = "cgroup:[4026531835]";

/// The cgroup hierarchies to follow and their mount points.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    pub v2: Option<PathBuf>,
    /// Controller name, hierarchy id, mount point.
    pub v1: Option<(&'static str, u32, PathBuf)>,
    /// Hierarchy id and mount point of the v1 cpu controller, whether it is followed or not. If it is absent, v2 may have the controller.
    pub v1_cpu: Option<(u32, PathBuf)>,
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

    /// Id and mount point of each followed hierarchy.
    pub fn mounts(&self) -> impl Iterator<Item = (u32, &Path)> {
        let v2 = self.v2.as_deref().map(|mount| (0, mount));
        v2.into_iter().chain(self.v1.as_ref().map(|(_, id, mount)| (*id, mount.as_path())))
    }

    /// Why cgroups cannot be identified; `None` if they can. The remedy is that of the condition `cgroups`.
    pub fn problem(&self) -> Option<String> {
        if self.v2.is_none() && self.v1.is_none() {
            return Some("no cgroup hierarchy is mounted here with its root: processes cannot be matched to containers".into());
        }
        namespace_problem()
    }
}

/// Why paths in /proc/PID/cgroup are not those of the host; `None` if they are.
pub fn namespace_problem() -> Option<String> {
    match fs::read_link("/proc/self/ns/cgroup") {
        Ok(link) if link.as_os_str() == INIT_CGROUP_NAMESPACE => None,
        Ok(_) => Some("in a private cgroup namespace: /proc shows cgroup paths relative to its root".into()),
        Err(error) => Some(format!("cannot determine the cgroup namespace: /proc/self/ns/cgroup: {error}")),
    }
}

/// Whether the mount shows the whole hierarchy: not covered by another mount, and not a subtree, as in a container.
fn shows_all(mount: &MountInfo) -> bool {
    let Ok(meta) = fs::metadata(&mount.mount_point) else { return false };
    let device = meta.dev();
    meta.ino() == ROOT_INODE && mount.majmin == format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

/// The mount table; `None` if it cannot be read.
fn mount_table(procfs_root: &Path) -> Option<MountInfos> {
    match Process::new_with_root(procfs_root.join("self")).and_then(|process| process.mountinfo()) {
        Ok(mounts) => Some(mounts),
        Err(error) => {
            tracing::warn!(%error, "cannot read the mount table; cgroups cannot be scanned");
            None
        }
    }
}

/// Hierarchy id and mount point of a v1 controller; `controllers` is the content of /proc/cgroups.
fn v1_controller(mounts: &MountInfos, controllers: &str, name: &str) -> Option<(u32, PathBuf)> {
    let hierarchy: u32 = controllers.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(name)).then(|| words.next())??.parse().ok()
    })?;
    let wanted = |m: &&MountInfo| m.fs_type == "cgroup" && m.super_options.contains_key(name) && shows_all(m);
    let mount = mounts.0.iter().find(wanted)?;
    (hierarchy != 0).then(|| (hierarchy, mount.mount_point.clone()))
}

/// The roots of all mounted hierarchies.
pub fn roots(procfs_root: &Path) -> Vec<PathBuf> {
    let mounts = mount_table(procfs_root).map_or_else(Vec::new, |mounts| mounts.0);
    let is_root = |mount: &MountInfo| ["cgroup", "cgroup2"].contains(&&*mount.fs_type) && shows_all(mount);
    mounts.into_iter().filter(is_root).map(|mount| mount.mount_point).collect()
}

/// Hierarchy id and mount point of the v1 freezer, which need not be a followed hierarchy.
pub fn v1_freezer(procfs_root: &Path) -> Option<(u32, PathBuf)> {
    let controllers = fs::read_to_string(procfs_root.join("cgroups")).unwrap_or_default();
    v1_controller(&mount_table(procfs_root)?, &controllers, "freezer")
}

pub fn layout(procfs_root: &Path) -> Layout {
    let Some(mounts) = mount_table(procfs_root) else { return Layout::default() };
    let controllers = fs::read_to_string(procfs_root.join("cgroups")).unwrap_or_default();
    let v2 = mounts.0.iter().find(|m| m.fs_type == "cgroup2" && shows_all(m)).map(|m| m.mount_point.clone());
    let of_controller = |name: &str| v1_controller(&mounts, &controllers, name);
    let v1 = V1_CONTROLLERS.iter().find_map(|name| of_controller(name).map(|(hierarchy, mount)| (*name, hierarchy, mount)));
    Layout { v2, v1, v1_cpu: of_controller("cpu") }
}
