//! Who is who: processes over time, cgroups, containers.

use crate::units::{BootNs, ContainerKey};
use crate::labels::CgroupIdentity;

/// A container as its cgroups tell it. Never changes; labels live elsewhere.
#[derive(Clone, Debug)]
pub struct ContainerRecord {
    pub key: ContainerKey,
    /// The `id` label: the container root's cgroup path. Never blank.
    pub cgroup_path: String,
    pub identity: CgroupIdentity,
    /// When its cgroup was created, or first seen by the startup scan.
    pub created: BootNs,
    /// False when it was there before the agent, so `created` is only "first seen".
    pub creation_seen: bool,
}
