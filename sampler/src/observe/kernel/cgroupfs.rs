//! Walks a cgroup file system.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sampler_core::observation::{CgroupChange, CgroupFact};
use sampler_core::units::{BootNs, CgroupKey};

use super::cgroup_id;

pub fn fact(key: CgroupKey, parent: Option<CgroupKey>, name: &std::ffi::OsStr, at: BootNs) -> CgroupFact {
    CgroupFact { change: CgroupChange::Seen, key, parent, name: name.to_string_lossy().into_owned(), at }
}

/// Whether the cgroup was removed during the walk; its removal is reported separately.
fn vanished(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Walks every cgroup of a hierarchy, parents first. `enter` is called before a directory is listed, so that a watch set there misses
/// nothing; `give` receives each cgroup with its directory. An error means that some cgroups were not found.
pub fn walk(
    hierarchy: u32,
    mount: &Path,
    at: BootNs,
    enter: &mut impl FnMut(&Path, CgroupKey),
    give: &mut impl FnMut(&Path, CgroupFact),
) -> io::Result<()> {
    let key = CgroupKey { hierarchy, id: cgroup_id::of(mount)? };
    give(mount, fact(key, None, "".as_ref(), at));
    below(mount.to_path_buf(), key, at, enter, give)
}

/// Walks every cgroup below the given one. Continues after an error and returns the first error.
pub fn below(
    folder: PathBuf,
    key: CgroupKey,
    at: BootNs,
    enter: &mut impl FnMut(&Path, CgroupKey),
    give: &mut impl FnMut(&Path, CgroupFact),
) -> io::Result<()> {
    let mut result = Ok(());
    let mut queue = vec![(folder, key)];
    while let Some((folder, parent)) = queue.pop() {
        enter(&folder, parent);
        if let Err(error) = list(&folder, parent, at, give, &mut queue)
            && !vanished(&error)
        {
            result = result.and(Err(error));
        }
    }
    result
}

fn list(
    folder: &Path,
    parent: CgroupKey,
    at: BootNs,
    give: &mut impl FnMut(&Path, CgroupFact),
    queue: &mut Vec<(PathBuf, CgroupKey)>,
) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let path = entry.path();
        let key = match entry.metadata().and_then(|meta| cgroup_id::of_known(&path, &meta)) {
            Ok(id) => CgroupKey { hierarchy: parent.hierarchy, id },
            Err(error) if vanished(&error) => continue,
            Err(error) => return Err(error),
        };
        give(&path, fact(key, Some(parent), &entry.file_name(), at));
        queue.push((path, key));
    }
    Ok(())
}
