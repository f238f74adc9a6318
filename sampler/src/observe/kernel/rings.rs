//! Drains the two ring buffers into observations. Records are decoded field by field from their bytes, without unsafe.

use aya::maps::{MapData, RingBuf};
use sampler_common::{CgroupEvent, NAME_BYTES, ProcessEvent, kind};
use sampler_core::observation::{CgroupChange, CgroupFact, CgroupMembership, ProcessChange, ProcessFact, ProcessSeen};
use sampler_core::units::{BootNs, CgroupKey, Tgid};
use std::mem::offset_of;
use std::time::Duration;

use crate::observe::clock::cpu_now;

/// The content of an event. Smaller than an observation, because there may be 100,000 events a second.
pub enum KernelFact {
    Process(ProcessFact),
    Cgroup(CgroupFact),
}

pub struct Rings {
    pub(super) cgroups: RingBuf<MapData>,
    pub(super) processes: RingBuf<MapData>,
    v1_hierarchy: Option<u32>,
    /// Events read so far, per kind.
    pub seen: [u64; kind::COUNT as usize],
    /// Processor time spent on draining, including the updates of the tables.
    pub drained: Duration,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

impl Rings {
    pub fn new(cgroups: RingBuf<MapData>, processes: RingBuf<MapData>, v1_hierarchy: Option<u32>) -> Self {
        Self { cgroups, processes, v1_hierarchy, seen: [0; kind::COUNT as usize], drained: Duration::ZERO }
    }

    /// Reads at least the events up to `until` and stops at the first later event of each ring, so that it ends even if events arrive
    /// faster than they are read. Cgroups first: a process may be in a cgroup of which the mkdir event is still in the other ring.
    pub fn drain(&mut self, until: BootNs, mut give: impl FnMut(KernelFact)) {
        let begun = cpu_now();
        while let Some(item) = self.cgroups.next() {
            if let Some((kind, fact)) = cgroup(&item) {
                count(&mut self.seen, kind);
                // A container has a cgroup in every v1 hierarchy; only scanned hierarchies have a known root.
                let over = fact.at > until;
                if fact.key.hierarchy == 0 || Some(fact.key.hierarchy) == self.v1_hierarchy {
                    give(KernelFact::Cgroup(fact));
                }
                if over {
                    break;
                }
            }
        }
        while let Some(item) = self.processes.next() {
            if let Some((kind, fact)) = process(&item, self.v1_hierarchy) {
                count(&mut self.seen, kind);
                let over = fact.at > until;
                give(KernelFact::Process(fact));
                if over {
                    break;
                }
            }
        }
        self.drained += cpu_now().saturating_sub(begun);
    }
}

fn count(seen: &mut [u64], kind: u32) {
    if let Some(n) = seen.get_mut(kind as usize) {
        *n += 1;
    }
}

fn cgroup(bytes: &[u8]) -> Option<(u32, CgroupFact)> {
    let kind = u32_at(bytes, offset_of!(CgroupEvent, kind))?;
    let hierarchy = u32_at(bytes, offset_of!(CgroupEvent, hierarchy))?;
    let parent_id = u64_at(bytes, offset_of!(CgroupEvent, parent_id))?;
    let len = (u32_at(bytes, offset_of!(CgroupEvent, name_len))? as usize).min(NAME_BYTES);
    let start = offset_of!(CgroupEvent, name);
    let change = match kind {
        kind::MKDIR => CgroupChange::Created,
        kind::RMDIR => CgroupChange::Removed,
        kind::RENAME => CgroupChange::Renamed,
        _ => return None,
    };
    let fact = CgroupFact {
        change,
        key: CgroupKey { hierarchy, id: u64_at(bytes, offset_of!(CgroupEvent, id))? },
        parent: (parent_id != 0).then_some(CgroupKey { hierarchy, id: parent_id }),
        name: String::from_utf8_lossy(bytes.get(start..start + len)?).into_owned(),
        at: BootNs(u64_at(bytes, offset_of!(CgroupEvent, at_ns))?),
    };
    Some((kind, fact))
}

/// The process described by a record of an event or of the task iterator.
pub fn describe(bytes: &[u8], v1_hierarchy: Option<u32>) -> Option<ProcessSeen> {
    let membership = CgroupMembership {
        v2_id: u64_at(bytes, offset_of!(ProcessEvent, v2_id))?,
        v1_id: u64_at(bytes, offset_of!(ProcessEvent, v1_id))?,
        v1_hierarchy: v1_hierarchy.unwrap_or(0),
    };
    Some(ProcessSeen {
        tgid: Tgid(u32_at(bytes, offset_of!(ProcessEvent, tgid))?),
        start: BootNs(u64_at(bytes, offset_of!(ProcessEvent, start_ns))?),
        coarse_start: false,
        began: BootNs(u64_at(bytes, offset_of!(ProcessEvent, at_ns))?),
        membership: Some(membership),
    })
}

fn process(bytes: &[u8], v1_hierarchy: Option<u32>) -> Option<(u32, ProcessFact)> {
    let kind = u32_at(bytes, offset_of!(ProcessEvent, kind))?;
    let change = match kind {
        kind::FORK => ProcessChange::Fork { parent: Tgid(u32_at(bytes, offset_of!(ProcessEvent, parent_tgid))?) },
        kind::EXEC => ProcessChange::Exec,
        kind::EXIT => ProcessChange::Exit,
        kind::ATTACH => ProcessChange::Attach,
        _ => return None,
    };
    let ProcessSeen { tgid, start, began: at, membership, .. } = describe(bytes, v1_hierarchy)?;
    Some((kind, ProcessFact { change, tgid, start, at, membership: membership? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records of the kernel's rings: a short one is skipped, and names are bounded.
    #[test]
    fn fuzz_kernel_records() {
        devkit::fuzz(file!(), "kernel_records", move |bytes| {
            if let Some((kind, fact)) = cgroup(bytes) {
                assert!(bytes.len() >= offset_of!(CgroupEvent, name) && kind < kind::COUNT);
                // Bytes that are not UTF-8 become longer.
                assert!(fact.name.len() <= 3 * NAME_BYTES);
            }
            for v1_hierarchy in [None, Some(4)] {
                let Some((kind, fact)) = process(bytes, v1_hierarchy) else { continue };
                assert!(kind < kind::COUNT && fact.membership.v1_hierarchy == v1_hierarchy.unwrap_or(0));
                assert_eq!(describe(bytes, v1_hierarchy).map(|seen| (seen.tgid, seen.start)), Some((fact.tgid, fact.start)));
            }
        });
    }
}
