//! Kubelets of nodes in containers (kind).

use std::path::{Path, PathBuf};

use sampler_core::cgroup_path::parse;

use super::discover::{HostPaths, KUBELET_ROOTS};
use super::root::Root;
use crate::observe::kernel::proc::memberships;

/// A kubelet in a container, with its folder in this mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InnerKubelet {
    pub container_id: String,
    pub root: PathBuf,
}

impl InnerKubelet {
    /// `folder`: that of its process in /proc.
    pub fn of(folder: &Path) -> Option<Self> {
        let lines = memberships(folder).ok()?;
        let container_id = lines.iter().find_map(|(_, path)| parse(&String::from_utf8_lossy(path)).container_id)?;
        let (inner, mut own) = (Root::new(&folder.join("root")), HostPaths::default());
        own.add_from_process(folder, "kubelet", None, &inner);
        let root = own.kubelet_roots.first().map_or_else(|| Path::new(KUBELET_ROOTS[0]), PathBuf::as_path);
        Some(Self { container_id, root: inner.path(root) })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_kubelet_in_a_container_is_found_with_its_container() {
        let procfs = tempfile::tempdir().unwrap();
        let folder = procfs.path().join("7");
        fs::create_dir_all(folder.join("root/etc")).unwrap();
        let id = "a".repeat(64);
        let set = |cmdline: &str, cgroup: &str| {
            for (file, text) in [("comm", "kubelet\n"), ("cmdline", cmdline), ("cgroup", cgroup)] {
                fs::write(folder.join(file), text).unwrap();
            }
        };
        let kubelet = || HostPaths::of_process(procfs.path(), 7, &Root::new(Path::new("/"))).unwrap();
        let in_node = format!("0::/docker/{id}/kubelet.slice/kubelet.service\n");
        set("kubelet", &in_node);
        let root = folder.join("root/var/lib/kubelet");
        assert_eq!(kubelet().inner_kubelets, [InnerKubelet { container_id: id.clone(), root }]);
        set("kubelet\0--root-dir=/k\0", &in_node);
        assert_eq!(kubelet().inner_kubelets, [InnerKubelet { container_id: id, root: folder.join("root/k") }]);
        assert_eq!(kubelet().kubelet_roots, [""; 0].map(PathBuf::from));
        set("kubelet\0--root-dir=/k\0", "0::/system.slice/kubelet.service\n");
        assert_eq!(kubelet().inner_kubelets, []);
    }
}
