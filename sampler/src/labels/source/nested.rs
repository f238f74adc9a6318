//! Containers of a runtime that itself runs in a container (kind, docker in docker): the runtime's files are below the root of the shim,
//! which is the parent of the container's processes.
//!
//! A tenant controls the content of that root. So it is used only for containers with a parent process in another container, and never
//! for the container that the root belongs to.

use std::fs;
use std::path::Path;

use sampler_core::cgroup_path::parse;
use sampler_core::identity::ContainerRecord;

use crate::labels::root::Root;
use crate::observe::kernel::proc::memberships;

/// Processes of the container to try: the parent of the first is most likely the shim.
const MAX_PIDS: usize = 4;

/// Where the runtime of a container runs.
#[derive(Clone, Debug)]
pub enum RuntimePlace {
    Host,
    /// In a container with this root.
    Inside(Root),
    /// The container has no process that shows it.
    Unknown,
}

/// `pids`: the processes of the container.
pub fn place(procfs: &Path, pids: &[String], record: &ContainerRecord) -> RuntimePlace {
    let Some(id) = record.identity.container_id.as_deref() else { return RuntimePlace::Unknown };
    let mut place = RuntimePlace::Unknown;
    for pid in pids.iter().take(MAX_PIDS) {
        let Some(folder) = parent(&procfs.join(pid)).map(|parent| procfs.join(parent)) else { continue };
        let Ok(lines) = memberships(&folder) else { continue };
        let mut around = lines.iter().filter_map(|(_, path)| parse(&String::from_utf8_lossy(path)).container_id).peekable();
        if around.peek().is_none() {
            place = RuntimePlace::Host;
        } else if around.all(|other| other != id) {
            return RuntimePlace::Inside(Root::new(&folder.join("root")));
        }
    }
    place
}

/// Field 4 of `stat`, after the name, which may contain any characters.
pub(super) fn parent(folder: &Path) -> Option<String> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?;
    (parent != "0").then(|| parent.to_owned())
}
