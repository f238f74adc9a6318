//! Containers of a runtime that itself runs in a container (kind, docker in docker): the runtime's files are below the root of the shim,
//! which is the parent of the container's processes.
//!
//! A tenant controls the content of that root. So it is used only for containers with a parent process in another container, and never
//! for the container that the root belongs to.

use std::fs;
use std::path::{Path, PathBuf};

use sampler_core::cgroup_path::parse;
use sampler_core::identity::ContainerRecord;

use super::pods::pids_of;
use crate::labels::root::Root;
use crate::observe::kernel::proc::memberships;

/// Processes of the container to try: the parent of the first is most likely the shim.
const MAX_PIDS: usize = 4;

/// The root of the container's runtime; `None` if the runtime runs on the host, which is the usual case.
pub fn root(procfs: &Path, cgroups: &[PathBuf], record: &ContainerRecord) -> Option<Root> {
    let id = record.identity.container_id.as_deref()?;
    pids_of(cgroups, &record.cgroup_path).iter().take(MAX_PIDS).find_map(|pid| {
        let folder = procfs.join(parent(&procfs.join(pid))?);
        let lines = memberships(&folder).unwrap_or_default();
        let mut around = lines.iter().filter_map(|(_, path)| parse(&String::from_utf8_lossy(path)).container_id).peekable();
        (around.peek().is_some() && around.all(|other| other != id)).then(|| Root::new(&folder.join("root")))
    })
}

/// Field 4 of `stat`, after the name, which may contain any characters.
fn parent(folder: &Path) -> Option<String> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?;
    (parent != "0").then(|| parent.to_owned())
}
