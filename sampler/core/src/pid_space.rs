//! Whether the pids that the driver returns are pids of this kernel.
//!
//! Driver calls can be forwarded to another kernel (nvproxy of gVisor, some virtual machines). Its pids then belong to another space, and
//! one of them may equal the pid of an unrelated local process. A process that uses a GPU holds a device node open, so the processes
//! that the driver names settle the question.
//!
//! ```text
//!                       a named process holds a device node
//!  unsettled -----------------------------------------------------> local
//!      |                                                             |  ^
//!      | 3 named processes hold none                                 |  | a named process holds one
//!      v                                                             |  |
//!   foreign <--- 3 living ones hold none since the last holder ------/  |
//!      \----------------------------------------------------------------/
//!  unverifiable: there are no device nodes
//! ```
//! A module of this kernel that serves the nodes counts as a holder until three pids contradict it. Without one, processes that cannot be
//! read leave it unsettled.
//!
//! Pure: the time and what /proc shows come from outside.
//!
//! What counts against local pids: a process that the driver names twice, a second apart at least, of which /proc shows both times that
//! it lives and holds no node; or a pid that is in the driver's process lists twice and does not exist. What does not count: a process
//! that has ended (samples are served after their time), one that started after the driver named it, one that cannot be read.
//!
//! Limits. A process that ended leaves its entry in the lists while a child holds its descriptors: such pids count only as long as
//! nothing supports local pids. In another space, a local process that holds a node and has a named number by chance counts as a holder.

use std::collections::HashMap;

use crate::units::BootNs;

/// So many contradictions of distinct processes: one may be a reused pid.
pub const CONTRADICTIONS: usize = 3;
/// Between the two sightings of a contradiction: a sample is served within this time, and a process may have released the GPU since.
const CONFIRM_NS: u64 = 1_000_000_000;
/// A process that was not named again for so long is not waited for.
const FORGET_NS: u64 = 60_000_000_000;
/// Named pids of which none could be checked for so long are worth a word.
const UNCHECKED_NS: u64 = 30_000_000_000;
/// Processes under suspicion, and contradictions kept, at most.
const MOST: usize = 256;

/// The verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PidSpace {
    Local,
    Foreign,
    Unsettled,
    /// There are no device nodes: pids are taken as local.
    #[default]
    Unverifiable,
}

impl PidSpace {
    pub const ALL: [PidSpace; 4] = [PidSpace::Local, PidSpace::Foreign, PidSpace::Unsettled, PidSpace::Unverifiable];

    /// The `state` label.
    pub fn name(self) -> &'static str {
        match self {
            PidSpace::Local => "local",
            PidSpace::Foreign => "foreign",
            PidSpace::Unsettled => "unsettled",
            PidSpace::Unverifiable => "unverifiable",
        }
    }

    /// Whether a pid of the driver may be resolved to a local process.
    pub fn is_trusted(self) -> bool {
        matches!(self, PidSpace::Local | PidSpace::Unverifiable)
    }
}

/// What /proc showed of a pid that the driver had named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PidSighting {
    /// It holds a device node open or mapped.
    Holder,
    /// It lives and holds none; `start` is rounded down to 10 ms.
    Bystander { start: BootNs },
    /// There is no living process with that pid.
    Absent,
    /// Its descriptors may not be read.
    Unreadable,
}

/// A pid, as one answer of the driver named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamedPid {
    pub pid: u32,
    /// In a process list, not only in a sample.
    pub listed: bool,
    /// When the driver call began.
    pub at: BootNs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PidRole {
    Bystander { start: BootNs },
    Absent,
}

/// What is known so far.
#[derive(Debug, Default)]
pub struct Evidence {
    nodes: bool,
    /// This kernel runs the NVIDIA module.
    module: bool,
    holder: Option<u32>,
    unreadable: Option<u32>,
    /// Since when the driver names pids of which none could be checked.
    unchecked_since: Option<BootNs>,
    /// Seen once without a node, and when.
    suspects: HashMap<u32, (PidRole, BootNs)>,
    /// Confirmed since the last holder, in that order.
    against: Vec<(u32, PidRole)>,
}

impl Evidence {
    /// Of a driver that was opened just now. `nodes`: there are device nodes to hold; `module`: they are served by a module of this kernel.
    pub fn new(nodes: bool, module: bool) -> Self {
        Self { nodes, module, ..Self::default() }
    }

    /// There are device nodes to hold, since now or still.
    pub fn has_nodes(&self) -> bool {
        self.nodes
    }

    /// `looked` is when /proc was read.
    pub fn see(&mut self, named: NamedPid, looked: BootNs, sighting: PidSighting) {
        let pid = named.pid;
        self.unchecked_since.get_or_insert(named.at);
        let kind = match sighting {
            PidSighting::Holder => {
                self.holder = Some(pid);
                self.unreadable = None;
                self.suspects.clear();
                self.against.clear();
                return;
            }
            PidSighting::Unreadable => {
                self.unreadable = Some(pid);
                self.suspects.remove(&pid);
                return;
            }
            PidSighting::Absent if named.listed => PidRole::Absent,
            PidSighting::Bystander { start } if start <= named.at => PidRole::Bystander { start },
            // A sample may be of before its end, whatever lists say.
            PidSighting::Absent if matches!(self.suspects.get(&pid), Some((PidRole::Absent, _))) => return,
            PidSighting::Absent | PidSighting::Bystander { .. } => {
                self.suspects.remove(&pid);
                return;
            }
        };
        match self.suspects.get(&pid) {
            Some((before, since)) if *before == kind => {
                let confirmed = named.at.saturating_since(*since) >= CONFIRM_NS;
                if confirmed && self.against.len() < MOST && self.against.iter().all(|(known, _)| *known != pid) {
                    self.against.push((pid, kind));
                }
            }
            _ => {
                self.suspects.retain(|_, (_, since)| looked.saturating_since(*since) < FORGET_NS);
                if self.suspects.len() < MOST {
                    self.suspects.insert(pid, (kind, looked));
                }
            }
        }
    }

    pub fn verdict(&self) -> PidSpace {
        let contradicted = self.against.len() >= CONTRADICTIONS;
        if !self.nodes {
            PidSpace::Unverifiable
        } else if self.bystanders().count() >= CONTRADICTIONS {
            PidSpace::Foreign
        } else if self.holder.is_some() {
            PidSpace::Local
        } else if contradicted && !self.module {
            PidSpace::Foreign
        } else if self.module && !contradicted {
            PidSpace::Local
        } else {
            PidSpace::Unsettled
        }
    }

    fn bystanders(&self) -> impl Iterator<Item = u32> {
        self.against.iter().filter(|(_, kind)| matches!(kind, PidRole::Bystander { .. })).map(|(pid, _)| *pid)
    }

    /// A named process that held a node.
    pub fn holder(&self) -> Option<u32> {
        self.holder
    }

    /// Whether the driver has named pids for a while at `now` and none of them could be checked: they end too soon or do not exist.
    pub fn is_unchecked(&self, now: BootNs) -> bool {
        let since = self.unchecked_since.filter(|_| self.holder.is_none() && self.against.is_empty());
        since.is_some_and(|since| now.saturating_since(since) >= UNCHECKED_NS)
    }

    /// A named process that could not be read.
    pub fn unreadable(&self) -> Option<u32> {
        self.unreadable
    }

    /// Processes that contradict local pids, and the first of them, a living one if possible.
    pub fn against(&self) -> Option<(usize, u32)> {
        let example = self.bystanders().next().or_else(|| self.against.first().map(|(pid, _)| *pid))?;
        Some((self.against.len(), example))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn nodes() -> Evidence {
        Evidence::new(true, false)
    }

    /// Named at `second`, and looked at 5 ms later.
    fn see(evidence: &mut Evidence, second: u64, pid: u32, listed: bool, sighting: PidSighting) -> PidSpace {
        let at = BootNs(second * S);
        evidence.see(NamedPid { pid, listed, at }, at.plus(5_000_000), sighting);
        evidence.verdict()
    }

    fn bystander() -> PidSighting {
        PidSighting::Bystander { start: BootNs(S) }
    }

    /// Named by lists at two times.
    fn twice(evidence: &mut Evidence, from: u64, pids: &[u32], sighting: PidSighting) -> PidSpace {
        for second in [from, from + 2] {
            for pid in pids {
                see(evidence, second, *pid, true, sighting);
            }
        }
        evidence.verdict()
    }

    #[test]
    fn one_holder_settles_it() {
        let mut evidence = nodes();
        assert_eq!(evidence.verdict(), PidSpace::Unsettled);
        assert_eq!(see(&mut evidence, 10, 100, false, PidSighting::Holder), PidSpace::Local);
        assert_eq!(evidence.holder(), Some(100));
    }

    #[test]
    fn without_nodes_nothing_can_be_said() {
        let mut evidence = Evidence::new(false, false);
        assert_eq!(evidence.verdict(), PidSpace::Unverifiable);
        assert_eq!(twice(&mut evidence, 10, &[1, 2, 3, 4], bystander()), PidSpace::Unverifiable);
    }

    #[test]
    fn three_processes_without_a_node_are_of_another_space() {
        for sighting in [bystander(), PidSighting::Absent] {
            let mut evidence = nodes();
            assert_eq!(twice(&mut evidence, 10, &[1, 2], sighting), PidSpace::Unsettled);
            assert_eq!(evidence.against(), Some((2, 1)));
            assert_eq!(twice(&mut evidence, 20, &[3], sighting), PidSpace::Foreign);
            // The same ones again are no more than before.
            assert_eq!(twice(&mut evidence, 30, &[1], sighting), PidSpace::Foreign);
            assert_eq!(evidence.against().map(|(n, _)| n), Some(3));
        }
    }

    #[test]
    fn samples_between_two_lists_do_not_excuse_who_is_absent() {
        let mut evidence = nodes();
        for (second, listed) in [(10, false), (11, true), (12, false), (13, true)] {
            for pid in 1..=3 {
                see(&mut evidence, second, pid, listed, PidSighting::Absent);
            }
        }
        assert_eq!(evidence.verdict(), PidSpace::Foreign);
    }

    #[test]
    fn what_is_seen_once_or_too_soon_again_says_nothing() {
        let mut evidence = nodes();
        for pid in 1..=9 {
            see(&mut evidence, 10, pid, true, bystander());
            see(&mut evidence, 10, pid, true, bystander());
        }
        assert_eq!((evidence.verdict(), evidence.against()), (PidSpace::Unsettled, None));
    }

    #[test]
    fn what_does_not_count() {
        let check = |listed, first, second| {
            let mut evidence = nodes();
            for pid in 1..=5 {
                see(&mut evidence, 10, pid, listed, first);
                see(&mut evidence, 12, pid, listed, second);
            }
            assert_eq!(evidence.against(), None, "{listed} {first:?} {second:?}");
        };
        // It has ended: samples name it for a while.
        check(false, PidSighting::Absent, PidSighting::Absent);
        check(true, bystander(), PidSighting::Absent);
        // Its pid is another's since.
        check(true, bystander(), PidSighting::Bystander { start: BootNs(11 * S) });
        // It began after it was named.
        let young = PidSighting::Bystander { start: BootNs(60 * S) };
        check(true, young, young);
        check(true, PidSighting::Unreadable, bystander());
        check(true, bystander(), PidSighting::Unreadable);
    }

    #[test]
    fn samples_count_as_lists_do_for_the_living() {
        let mut evidence = nodes();
        for second in [10, 12] {
            for pid in 1..=3 {
                see(&mut evidence, second, pid, false, bystander());
            }
        }
        assert_eq!(evidence.verdict(), PidSpace::Foreign);
    }

    #[test]
    fn a_holder_takes_it_back() {
        let mut evidence = nodes();
        assert_eq!(twice(&mut evidence, 10, &[1, 2, 3], bystander()), PidSpace::Foreign);
        assert_eq!(see(&mut evidence, 20, 9, true, PidSighting::Holder), PidSpace::Local);
        assert_eq!(evidence.against(), None);
        // Entries of processes that ended while a child holds on.
        assert_eq!(twice(&mut evidence, 30, &[4, 5, 6, 7], PidSighting::Absent), PidSpace::Local);
        assert_eq!(twice(&mut evidence, 40, &[11, 12, 13], bystander()), PidSpace::Foreign);
        assert_eq!(see(&mut evidence, 50, 9, true, PidSighting::Holder), PidSpace::Local);
    }

    #[test]
    fn a_module_of_this_kernel_is_believed_until_the_living_contradict() {
        let mut evidence = Evidence::new(true, true);
        assert_eq!(evidence.verdict(), PidSpace::Local);
        assert_eq!(twice(&mut evidence, 10, &[1, 2], PidSighting::Absent), PidSpace::Local);
        assert_eq!(twice(&mut evidence, 20, &[3, 4], PidSighting::Absent), PidSpace::Unsettled);
        assert_eq!(see(&mut evidence, 25, 9, true, PidSighting::Holder), PidSpace::Local);
        assert_eq!(twice(&mut evidence, 30, &[5, 6, 7], bystander()), PidSpace::Foreign);
    }

    #[test]
    fn who_may_read_nothing_cannot_verify() {
        let mut evidence = nodes();
        assert_eq!(see(&mut evidence, 10, 1, true, PidSighting::Unreadable), PidSpace::Unsettled);
        assert_eq!((evidence.unreadable(), evidence.is_unchecked(BootNs(39 * S))), (Some(1), false));
        assert!(evidence.is_unchecked(BootNs(40 * S)));
        // Some can be read after all.
        assert_eq!(twice(&mut evidence, 20, &[2], bystander()), PidSpace::Unsettled);
        assert_eq!(see(&mut evidence, 30, 3, true, PidSighting::Holder), PidSpace::Local);
        assert_eq!(evidence.unreadable(), None);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut evidence = nodes();
        for pid in 0..10_000 {
            see(&mut evidence, 10, pid, true, bystander());
        }
        assert_eq!(evidence.suspects.len(), MOST);
        // The old give way.
        see(&mut evidence, 100, 20_000, true, bystander());
        assert_eq!(evidence.suspects.len(), 1);
    }
}
