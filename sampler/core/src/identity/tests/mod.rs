//! Rows for the tables, and generated histories.

mod histories;
mod launches;
mod rows;

use super::*;
use crate::observation::{CgroupChange, CgroupMembership, ProcessChange};
use crate::units::{CgroupKey, Tgid};

const fn v2(id: u64) -> CgroupMembership {
    CgroupMembership { v2_id: id, v1_id: 0, v1_hierarchy: 0 }
}

fn fact(change: ProcessChange, tgid: u32, start: u64, at: u64, place: CgroupMembership) -> ProcessFact {
    ProcessFact { change, tgid: Tgid(tgid), start: BootNs(start), at: BootNs(at), place }
}

/// The event comes a little after the start time was set.
fn fork(tgid: u32, start: u64, place: CgroupMembership) -> ProcessFact {
    fact(ProcessChange::Fork { parent: Tgid(1) }, tgid, start, start + 5, place)
}

fn seen(tgid: u32, start: u64, began: u64, place: CgroupMembership) -> ProcessSeen {
    ProcessSeen { tgid: Tgid(tgid), start: BootNs(start), coarse_start: true, began: BootNs(began), place: Some(place) }
}

fn yes(_: &[ObservedInterval]) -> bool {
    true
}

/// Every place that who had the pid in the span had then, the newest life first, without doubles.
fn places(table: &Processes, pid: u32, from: u64, to: u64) -> Vec<CgroupMembership> {
    let candidates = table.candidates(Tgid(pid), (BootNs(from), BootNs(to)), |_| None);
    let mut places = Vec::new();
    for stay in candidates.iter().flat_map(Candidate::stays) {
        if !places.contains(&stay.place) {
            places.push(stay.place);
        }
    }
    places
}

fn cgroup(change: CgroupChange, hierarchy: u32, id: u64, parent: u64, name: &str, at: u64) -> CgroupFact {
    let key = |id| CgroupKey { hierarchy, id };
    CgroupFact { change, key: key(id), parent: (parent != 0).then(|| key(parent)), name: name.into(), at: BootNs(at) }
}
