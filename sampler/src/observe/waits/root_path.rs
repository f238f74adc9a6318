//! Opens a path in the root of another process without an effect, and never outside of that root.
//!
//! Each component is opened by itself, and a symlink is read and resolved here. openat2 does so in one call, which service managers forbid
//! with `RestrictSUIDSGID=`: a filter of system calls cannot read its arguments.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat, readlinkat};
use rustix::io::Errno;

use crate::host_root::{MAX_LINKS, names};

/// Folders around the file; each is a descriptor while the path is followed.
const MAX_DEPTH: usize = 256;

/// A reference to whatever is at the path: to open a device may have effects.
pub fn open_in_root(root: &Path, path: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    // The last component is a link of the kernel to the root of the process.
    let root = openat(CWD, root, flags | OFlags::DIRECTORY, Mode::empty())?;
    // From the root to where the path has led so far; those above `here`.
    let (mut above, mut here): (Vec<OwnedFd>, OwnedFd) = (Vec::new(), root);
    let mut todo = names(path);
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == ".." {
            here = above.pop().unwrap_or(here);
            continue;
        }
        let found = openat(here.as_fd(), name.as_os_str(), flags | OFlags::NOFOLLOW, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&found)?.st_mode) != FileType::Symlink {
            if above.len() >= MAX_DEPTH {
                return Err(Errno::NAMETOOLONG.into());
            }
            above.push(std::mem::replace(&mut here, found));
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = readlinkat(&found, c"", Vec::new())?;
        let target = Path::new(OsStr::from_bytes(target.as_bytes()));
        if target.is_absolute() && !above.is_empty() {
            above.truncate(1);
            here = above.pop().unwrap_or(here);
        }
        todo.extend(names(target));
    }
    Ok(here.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    #[test]
    fn links_are_those_of_the_root_and_never_lead_out_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("usr/lib")).unwrap();
        std::fs::write(at("usr/lib/libcuda.so.580"), "x").unwrap();
        std::fs::write(at("etc"), "x").unwrap();
        for (target, name) in [
            ("libcuda.so.580", "usr/lib/libcuda.so.1"),
            ("/usr/lib", "lib"),
            ("/../../usr/./lib/../lib", "usr/round"),
            ("../../../../../../etc", "usr/outside"),
            ("/proc/self/exe", "magic"),
            ("loop", "loop"),
            ("missing", "dangling"),
        ] {
            symlink(target, at(name)).unwrap();
        }
        let inode = |name: &str| std::fs::symlink_metadata(at(name)).unwrap().ino();
        let open = |path: &str| open_in_root(folder.path(), Path::new(path)).and_then(|file| Ok(file.metadata()?.ino()));
        for (path, file) in [
            ("/usr/lib/libcuda.so.1", "usr/lib/libcuda.so.580"),
            ("/lib/libcuda.so.1", "usr/lib/libcuda.so.580"),
            ("/usr/round/libcuda.so.580", "usr/lib/libcuda.so.580"),
            ("/usr/../../../etc", "etc"),
            ("/usr/outside", "etc"),
            ("/usr/lib", "usr/lib"),
            ("/", "."),
        ] {
            assert_eq!(open(path).ok(), Some(inode(file)), "{path}");
        }
        for (path, error) in [
            ("/loop", Errno::LOOP),
            ("/dangling", Errno::NOENT),
            ("/magic", Errno::NOENT),
            ("/etc/x", Errno::NOTDIR),
            ("/lib/../etc", Errno::NOENT),
        ] {
            assert_eq!(open(path).unwrap_err().raw_os_error(), Some(error.raw_os_error()), "{path}");
        }
    }

    #[test]
    fn the_descriptors_of_a_path_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let deep = vec!["d"; MAX_DEPTH + 1].join("/");
        std::fs::create_dir_all(folder.path().join(&deep)).unwrap();
        let error = open_in_root(folder.path(), Path::new(&deep)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NAMETOOLONG.raw_os_error()));
        assert!(open_in_root(folder.path(), Path::new(&deep[2..])).is_ok());
    }
}
