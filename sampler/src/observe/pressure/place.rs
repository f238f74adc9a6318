//! Locates the cgroups of a container in the hierarchies that are read here, which need not be the followed ones.
//!
//! A runtime uses the same path for a container in every hierarchy, so that path is tried first. If it does not exist, the cgroups of
//! the container's processes are used, but only if their path belongs to the same container: in a hierarchy where the container has no
//! cgroup, its processes are in the cgroup of another user, and the waiting time there is not that of the container.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};

use sampler_core::cgroup_path::{CgroupIdentity, Kind, parse};
use sampler_core::identity::ContainerRecord;

use super::files::CgroupVersion;
use crate::observe::kernel::layout::Layout;
use crate::observe::kernel::proc::{directory, memberships};

/// Maximum number of cgroups of which the quota is read: that of the container and its ancestors (pod, sandbox, outer containers).
/// Tenants control the nesting depth, and deeper nesting must not cost more.
pub const MAX_LEVELS: usize = 4;
/// Limits of the search for processes of a container, when its path is missing in a hierarchy.
const MAX_FOLDERS: usize = 16;
const MAX_PIDS: usize = 8;

#[derive(Clone, Debug)]
struct Hierarchy {
    id: u32,
    mount: PathBuf,
}

/// The hierarchies that are read for every container.
#[derive(Clone, Debug)]
pub struct Hierarchies {
    cpu: Option<(CgroupVersion, Hierarchy)>,
    /// Only v2 has PSI of cgroups.
    v2: Option<Hierarchy>,
    /// Mount points of the followed hierarchies, where containers and their processes are found.
    followed: Vec<PathBuf>,
    procfs: PathBuf,
}

/// The cgroups of one container. Empty or `None` if there is no such cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PressurePaths {
    pub version: CgroupVersion,
    /// Directories with a cpu quota, from that of the container up to that of its pod.
    pub levels: Vec<PathBuf>,
    pub v2: Option<PathBuf>,
}

impl Hierarchies {
    pub fn new(layout: &Layout, procfs: &Path) -> Self {
        let v2 = layout.v2.clone().map(|mount| Hierarchy { id: 0, mount });
        let v1_cpu = layout.v1_cpu.clone().map(|(id, mount)| (CgroupVersion::V1, Hierarchy { id, mount }));
        // A controller is in one hierarchy; if v1 does not have it, v2 may.
        let cpu = v1_cpu.or_else(|| Some((CgroupVersion::V2, v2.clone()?)));
        let followed = layout.mounts().map(|(_, mount)| mount.to_path_buf()).collect();
        Self { cpu, v2, followed, procfs: procfs.to_path_buf() }
    }

    /// Whether there is nothing to read.
    pub fn none(&self) -> bool {
        self.cpu.is_none() && self.v2.is_none()
    }

    pub fn find(&self, record: &ContainerRecord) -> PressurePaths {
        let mut pids = None;
        let cpu = self.cpu.as_ref().and_then(|(version, on)| Some((*version, on, self.path_on(on, record, &mut pids)?)));
        let (version, levels) = match &cpu {
            Some((version, on, path)) => (*version, levels(path).filter_map(|p| directory(&on.mount, p.as_bytes())).collect()),
            None => (CgroupVersion::V2, Vec::new()),
        };
        let v2 = self.v2.as_ref().and_then(|on| directory(&on.mount, self.path_on(on, record, &mut pids)?.as_bytes()));
        PressurePaths { version, levels, v2 }
    }

    /// Whether a cgroup that may exist was not found.
    pub fn is_incomplete(&self, paths: &PressurePaths) -> bool {
        (self.cpu.is_some() && paths.levels.is_empty()) || (self.v2.is_some() && paths.v2.is_none())
    }

    /// `pids`: the processes of the container, once they were read.
    fn path_on(&self, on: &Hierarchy, record: &ContainerRecord, pids: &mut Option<Vec<u32>>) -> Option<String> {
        let same_path = directory(&on.mount, record.cgroup_path.as_bytes())?;
        if same_path.is_dir() {
            return Some(record.cgroup_path.clone());
        }
        pids.get_or_insert_with(|| self.processes(record)).iter().find_map(|pid| {
            let lines = memberships(&self.procfs.join(pid.to_string())).ok()?;
            let (_, path) = lines.into_iter().find(|(id, _)| *id == on.id)?;
            let path = String::from_utf8(path).ok()?;
            let identity = parse(&path);
            same(&identity, &record.identity).then(|| path.get(..identity.root_len).map(str::to_owned))?
        })
    }

    fn processes(&self, record: &ContainerRecord) -> Vec<u32> {
        let roots = self.followed.iter().filter_map(|mount| directory(mount, record.cgroup_path.as_bytes()));
        let mut folders: VecDeque<PathBuf> = roots.collect();
        let mut pids = Vec::new();
        for _ in 0..MAX_FOLDERS {
            let Some(folder) = folders.pop_front() else { break };
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).take(MAX_PIDS));
            if pids.len() >= MAX_PIDS {
                break;
            }
            let below = fs::read_dir(&folder).into_iter().flatten().flatten();
            folders.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).take(MAX_FOLDERS));
        }
        pids.truncate(MAX_PIDS);
        pids
    }
}

fn same(a: &CgroupIdentity, b: &CgroupIdentity) -> bool {
    a.container_id.is_some() && a.container_id == b.container_id && a.name == b.name
}

fn parent(path: &str) -> Option<&str> {
    path.rsplit_once('/').map(|(parent, _)| parent).filter(|parent| !parent.is_empty())
}

/// The path of a container, and the paths above it that belong to a pod or a container. Of a unit, job or login session all paths above:
/// quotas are often those of slices.
fn levels(path: &str) -> impl Iterator<Item = &str> {
    let is_host_user = parse(path).host_user.is_some();
    let bounds = move |path: &&str| is_host_user || matches!(parse(path).kind, Kind::Container | Kind::Sandbox | Kind::Pod);
    let above = std::iter::successors(parent(path), |path| parent(path)).take_while(bounds);
    std::iter::once(path).chain(above).take(MAX_LEVELS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_core::units::{BootNs, ContainerKey};

    const ID: &str = "73e1b2f0c4d5968778695a4b3c2d1e0f73e1b2f0c4d5968778695a4b3c2d1e0f";
    const POD: &str = "/kubepods/besteffort/pod8bb25662-de9a-11e9-84e7-f8f21e04010c";

    fn record(path: &str) -> ContainerRecord {
        let (identity, created) = (parse(path), BootNs(0));
        ContainerRecord { key: ContainerKey(1), cgroup_path: path.into(), identity, created, creation_seen: true }
    }

    #[test]
    fn quota_levels_end_at_the_pod() {
        let check = |path: &str, expect: &[&str]| assert_eq!(levels(path).collect::<Vec<_>>(), expect, "{path}");
        let in_pod = format!("{POD}/{ID}");
        check(&in_pod, &[&in_pod, POD]);
        check(&format!("/docker/{ID}"), &[&format!("/docker/{ID}")]);
        check("/", &["/"]);
        let login = "/user.slice/user-1000.slice";
        check(login, &[login, "/user.slice"]);
        let outer = format!("/docker/{}", ID.replace('7', "8"));
        let inner = format!("{outer}/docker/{ID}");
        check(&inner, &[&inner, &format!("{outer}/docker"), &outer]);
        let deep = format!("{outer}/{}/docker/{ID}", vec!["n"; 1000].join("/"));
        assert_eq!(levels(&deep).count(), MAX_LEVELS);
    }

    /// A hybrid host: v2 is followed, v1 has the cpu controller.
    fn host(dir: &Path) -> Hierarchies {
        let layout = Layout { v2: Some(dir.join("v2")), v1: None, v1_cpu: Some((3, dir.join("cpu"))) };
        Hierarchies::new(&layout, &dir.join("proc"))
    }

    #[test]
    fn cgroups_of_a_container_are_located_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let absolute = |path: &str| dir.path().join(path.trim_start_matches('/'));
        let hierarchies = host(dir.path());
        let path = format!("{POD}/{ID}");
        let record = record(&path);
        fs::create_dir_all(absolute(&format!("v2{path}"))).unwrap();
        let paths = hierarchies.find(&record);
        let v2 = Some(absolute(&format!("v2{path}")));
        assert_eq!(paths, PressurePaths { version: CgroupVersion::V2, levels: Vec::new(), v2 });
        assert!(hierarchies.is_incomplete(&paths));
        fs::create_dir_all(absolute(&format!("cpu{path}"))).unwrap();
        let paths = hierarchies.find(&record);
        assert_eq!(
            (paths.version, paths.levels.clone()),
            (CgroupVersion::V1, vec![absolute(&format!("cpu{path}")), absolute(&format!("cpu{POD}"))])
        );
        assert!(!hierarchies.is_incomplete(&paths));
    }

    #[test]
    fn cgroups_are_located_through_processes_if_the_path_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let absolute = |path: &str| dir.path().join(path.trim_start_matches('/'));
        let check = |memberships: &str, expect: &[&str]| {
            let write = |path: &str, text: &str| {
                let path = absolute(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            };
            // The process is in a cgroup below that of the container.
            write(&format!("v2/docker/{ID}/cgroup.procs"), "");
            write(&format!("v2/docker/{ID}/init/cgroup.procs"), "77\n");
            write("proc/77/cgroup", memberships);
            let found = host(dir.path()).find(&record(&format!("/docker/{ID}"))).levels;
            assert_eq!(found, expect.iter().map(|path| absolute(path)).collect::<Vec<_>>(), "{memberships}");
        };
        let elsewhere = format!("/system.slice/docker-{ID}.scope");
        check(&format!("3:cpu:{elsewhere}/init\n0::/docker/{ID}/init\n"), &[&format!("cpu{elsewhere}")]);
        check(&format!("4:memory:{elsewhere}\n3:cpu:/\n"), &[]);
        check("3:cpu:/user.slice\n", &[]);
        check(&format!("3:cpu:/docker/{}\n", ID.replace('7', "8")), &[]);
        check("", &[]);
    }
}
