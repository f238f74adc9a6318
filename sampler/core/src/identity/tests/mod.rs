//! Lookups in the tables, case by case, and generated histories.

mod histories;
mod launches;
mod lookups;

use super::*;
use crate::observation::{CgroupChange, CgroupMembership, ProcessChange};
use crate::units::{CgroupKey, Tgid};

const fn v2(id: u64) -> CgroupMembership {
    CgroupMembership { v2_id: id, v1_id: 0, v1_hierarchy: 0 }
}

fn fact(change: ProcessChange, tgid: u32, start: u64, at: u64, membership: CgroupMembership) -> ProcessFact {
    ProcessFact { change, tgid: Tgid(tgid), start: BootNs(start), at: BootNs(at), membership }
}

/// The event is slightly later than the start time.
fn fork(tgid: u32, start: u64, membership: CgroupMembership) -> ProcessFact {
    fact(ProcessChange::Fork { parent: Tgid(1) }, tgid, start, start + 5, membership)
}

fn seen(tgid: u32, start: u64, began: u64, membership: CgroupMembership) -> ProcessSeen {
    ProcessSeen { tgid: Tgid(tgid), start: BootNs(start), coarse_start: true, began: BootNs(began), membership: Some(membership) }
}

fn keep_all(_: &[ObservedInterval]) -> bool {
    true
}

/// Every membership of the processes that had the pid in the span, newest process first, without duplicates.
fn memberships(table: &Processes, pid: u32, from: u64, to: u64) -> Vec<CgroupMembership> {
    let candidates = table.candidates(Tgid(pid), (BootNs(from), BootNs(to)), |_| None);
    let mut memberships = Vec::new();
    for residency in candidates.iter().flat_map(Candidate::residencies) {
        if !memberships.contains(&residency.membership) {
            memberships.push(residency.membership);
        }
    }
    memberships
}

fn cgroup(change: CgroupChange, hierarchy: u32, id: u64, parent: u64, name: &str, at: u64) -> CgroupFact {
    let key = |id| CgroupKey { hierarchy, id };
    CgroupFact { change, key: key(id), parent: (parent != 0).then(|| key(parent)), name: name.into(), at: BootNs(at) }
}
