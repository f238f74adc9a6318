//! The host's file system: at `/` on the host itself, at a mount such as `/host` in a container.
//!
//! Symlinks are resolved as on the host: below a mounted root, an absolute symlink would otherwise lead to the agent's own files
//! (`/var/run -> /run`, `/var/lib/docker -> /data/docker`).

use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// The kernel's limit.
pub const MAX_LINKS: usize = 40;

#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    pub fn new(root: &Path) -> Self {
        Self(root.to_owned())
    }

    /// Translates a path of the host to this mount namespace. Components that do not exist are kept.
    pub fn path(&self, host: &Path) -> PathBuf {
        if self.0.parent().is_none() {
            return host.to_owned();
        }
        let mut todo: Vec<OsString> = names(host);
        let mut done: Vec<OsString> = Vec::new();
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == ".." {
                done.pop();
                continue;
            }
            done.push(name);
            let here: PathBuf = self.0.components().map(Component::as_os_str).chain(done.iter().map(|n| n.as_os_str())).collect();
            // Not a symlink, or absent.
            let Ok(target) = fs::read_link(&here) else { continue };
            links += 1;
            if links > MAX_LINKS {
                break;
            }
            done.pop();
            if target.is_absolute() {
                done.clear();
            }
            todo.extend(names(&target));
        }
        done.extend(todo.into_iter().rev());
        self.0.components().map(Component::as_os_str).chain(done.iter().map(|n| n.as_os_str())).collect()
    }
}

/// The components of a path, last first; `..` is kept.
pub fn names(path: &Path) -> Vec<OsString> {
    let is_name = |c: &Component<'_>| matches!(c, Component::Normal(_) | Component::ParentDir);
    path.components().rev().filter(is_name).map(|c| c.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_stay_below_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let below = |path: &str| dir.path().join(path);
        fs::create_dir_all(below("run")).unwrap();
        fs::create_dir_all(below("var/lib")).unwrap();
        fs::create_dir_all(below("data/docker/containers")).unwrap();
        symlink("/run", below("var/run")).unwrap();
        symlink("../../../../data/docker", below("var/lib/docker")).unwrap();
        symlink("loop", below("loop")).unwrap();
        let root = Root::new(dir.path());
        for (host, here) in [
            ("/var/run/docker.sock", "run/docker.sock"),
            ("/var/lib/docker/containers/x/config.v2.json", "data/docker/containers/x/config.v2.json"),
            ("/no/such/./file", "no/such/file"),
            ("/../../etc", "etc"),
        ] {
            assert_eq!(root.path(Path::new(host)), below(here), "{host}");
        }
        assert!(root.path(Path::new("/loop/x")).starts_with(dir.path()));
        assert_eq!(Root::new(Path::new("/")).path(Path::new("/var/run/x")), Path::new("/var/run/x"));
    }
}
