//! Which cgroup hierarchies there are, and where they can be walked.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use procfs::process::{MountInfo, MountInfos, Process};

/// v1 controllers worth following on a hybrid or v1 host, best first: every runtime puts its containers in these.
const V1_CONTROLLERS: [&str; 3] = ["pids", "memory", "cpu"];
/// The root cgroup of every hierarchy has this inode number.
pub const ROOT_ID: u64 = 1;
/// The initial cgroup namespace has this inode (PROC_CGROUP_INIT_INO): in any other, paths are relative to somewhere.
const INIT_CGROUP_NAMESPACE: &str = "cgroup:[4026531835]";

/// The cgroup hierarchies to follow and where they are mounted.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    pub v2: Option<PathBuf>,
    /// Controller name, hierarchy id, mount point.
    pub v1: Option<(&'static str, u32, PathBuf)>,
    /// Hierarchy id and mount point of v1's cpu controller, followed or not. Where there is none, v2 may have the controller.
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

    /// Hierarchy and mount point of each that is followed.
    pub fn mounts(&self) -> impl Iterator<Item = (u32, &Path)> {
        let v2 = self.v2.as_deref().map(|mount| (0, mount));
        v2.into_iter().chain(self.v1.as_ref().map(|(_, id, mount)| (*id, mount.as_path())))
    }

    /// What keeps cgroups from being told apart; `None` where everything is right.
    pub fn problem(&self) -> Option<String> {
        if self.v2.is_none() && self.v1.is_none() {
            return Some("no cgroup hierarchy is mounted here with its root: no process can be told to be a container's".into());
        }
        match fs::read_link("/proc/self/ns/cgroup") {
            Ok(link) if link.as_os_str() == INIT_CGROUP_NAMESPACE => None,
            Ok(_) => Some("in a cgroup namespace of its own: /proc shows every cgroup's path as seen from there".into()),
            Err(error) => Some(format!("cannot tell the cgroup namespace: /proc/self/ns/cgroup: {error}")),
        }
    }
}

/// What to do about [`Layout::problem`].
pub const REMEDY: &str = "mount cgroup2 on /sys/fs/cgroup; in a container, mount the host's /sys/fs/cgroup and run in its cgroup namespace (--cgroupns=host)";

/// Shows the whole hierarchy: not covered by another mount, and not a part of it, as a container is given.
fn whole(mount: &MountInfo) -> bool {
    let Ok(meta) = fs::metadata(&mount.mount_point) else { return false };
    let device = meta.dev();
    meta.ino() == ROOT_ID && mount.majmin == format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
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
    let v2 = mounts.0.iter().find(|m| m.fs_type == "cgroup2" && whole(m)).map(|m| m.mount_point.clone());
    let of_controller = |name: &str| {
        let hierarchy: u32 = controllers.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(name)).then(|| words.next())??.parse().ok()
        })?;
        let wanted = |m: &&MountInfo| m.fs_type == "cgroup" && m.super_options.contains_key(name) && whole(m);
        let mount = mounts.0.iter().find(wanted)?;
        (hierarchy != 0).then(|| (hierarchy, mount.mount_point.clone()))
    };
    let v1 = V1_CONTROLLERS.iter().find_map(|name| of_controller(name).map(|(hierarchy, mount)| (*name, hierarchy, mount)));
    Layout { v2, v1, v1_cpu: of_controller("cpu") }
}
