//! Containers whose runtime runs in a container itself (kind, docker in docker): what their runtime leaves in files is below the root of
//! their shim, the parent of their processes.
//!
//! A tenant owns that root and can write what he likes there; so it is believed only about containers of which a process in another
//! container is the parent, and a container is never its own witness.

use std::fs;
use std::path::{Path, PathBuf};

use sampler_core::cgroup_path::parse;
use sampler_core::identity::ContainerRecord;

use super::pods::pids_of;
use crate::labels::root::Root;
use crate::observe::kernel::proc::memberships;

/// Any of its processes has the shim for a parent, or an ancestor of its own; the first is the likeliest.
const PIDS_LOOKED_AT: usize = 4;

/// `None` for a container whose runtime runs on the host, which is the usual case.
pub fn root(procfs: &Path, cgroups: &[PathBuf], record: &ContainerRecord) -> Option<Root> {
    let id = record.identity.container_id.as_deref()?;
    for pid in pids_of(cgroups, &record.cgroup_path).iter().take(PIDS_LOOKED_AT) {
        let Some(parent) = parent(&procfs.join(pid)) else { continue };
        let folder = procfs.join(parent);
        let lines = memberships(&folder).unwrap_or_default();
        let around = lines.iter().filter_map(|(_, path)| parse(&String::from_utf8_lossy(path)).container_id);
        let around: Vec<String> = around.collect();
        if !around.is_empty() && around.iter().all(|other| other != id) {
            return Some(Root::new(&folder.join("root")));
        }
    }
    None
}

/// Field 4 of `stat`, behind a name that may hold anything.
fn parent(folder: &Path) -> Option<String> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?;
    (parent != "0").then(|| parent.to_owned())
}
