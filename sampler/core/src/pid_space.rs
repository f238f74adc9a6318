//! Whether the pids that the driver returns are pids of this kernel.
//!
//! Driver calls can be forwarded to another kernel (nvproxy of gVisor, some virtual machines). The driver's pids then belong to another
//! space, and one of them may equal the pid of an unrelated local process. A process that uses a GPU holds a device node open, so checking
//! the processes that the driver names settles the question.
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
//! A module of this kernel that serves the nodes counts as a holder until three pids contradict it. Without such a module, processes that
//! cannot be read leave the state unsettled.
//!
//! Pure: the time and the contents of /proc are inputs.
//!
//! Evidence against local pids: a process that the driver names twice, at least a second apart, and that is alive and holds no node at both
//! times according to /proc; or a pid that is in the driver's process lists twice and does not exist. Not evidence: a process that has
//! ended (samples are served after their time), one that started after the driver named it, one that cannot be read.
//!
//! Limits. A process that ended stays in the lists while a child holds its descriptors: such pids count only while there is no evidence for
//! local pids. In another space, a local process that holds a node and by chance has a named pid counts as a holder.

use foldhash::HashMap;

use crate::units::BootNs;

/// Number of contradictions, of distinct processes, that settles the question; a single one may be a reused pid.
pub const CONTRADICTIONS: usize = 3;
/// Minimum time between the two sightings of a contradiction: a sample is served within this time, and a process may have released the
/// GPU since it was taken.
const CONFIRM_NS: u64 = 1_000_000_000;
/// A suspect that was not named again within this time is dropped.
const FORGET_NS: u64 = 60_000_000_000;
/// If none of the named pids could be checked for this long, it is reported.
const UNCHECKED_NS: u64 = 30_000_000_000;
/// Maximum number of suspects, and of contradictions.
const MOST: usize = 256;

/// The space of the driver's pids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum PidSpace {
    Local,
    Foreign,
    Unsettled,
    /// There are no device nodes: pids are taken as local.
    #[default]
    Unverifiable,
}

impl PidSpace {
    /// The `state` label.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether a pid of the driver may be resolved to a local process.
    pub fn is_trusted(self) -> bool {
        matches!(self, PidSpace::Local | PidSpace::Unverifiable)
    }
}

/// The state in /proc of a pid that the driver named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PidSighting {
    /// It holds a device node open or mapped.
    Holder,
    /// It is alive and holds none; `start` is rounded down to 10 ms.
    Bystander { start: BootNs },
    /// There is no living process with that pid.
    Absent,
    /// The agent may not read its descriptors.
    Unreadable,
}

/// A pid that one response of the driver named.
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

/// The evidence so far.
#[derive(Debug, Default)]
pub struct Evidence {
    nodes: bool,
    /// This kernel runs the NVIDIA module.
    module: bool,
    holder: Option<u32>,
    unreadable: Option<u32>,
    /// Since when the driver has named pids.
    unchecked_since: Option<BootNs>,
    /// Processes seen once without a node, with the time.
    suspects: HashMap<u32, (PidRole, BootNs)>,
    /// Confirmed since the last holder, in that order.
    contradictions: Vec<(u32, PidRole)>,
}

impl Evidence {
    /// For a driver that was just opened. `nodes`: there are device nodes; `module`: a module of this kernel serves them.
    pub fn new(nodes: bool, module: bool) -> Self {
        Self { nodes, module, ..Self::default() }
    }

    /// Whether there are device nodes.
    pub fn has_nodes(&self) -> bool {
        self.nodes
    }

    /// Adds a sighting; /proc was read at `read_at`.
    pub fn record(&mut self, named: NamedPid, read_at: BootNs, sighting: PidSighting) {
        let pid = named.pid;
        self.unchecked_since.get_or_insert(named.at);
        let kind = match sighting {
            PidSighting::Holder => {
                self.holder = Some(pid);
                self.unreadable = None;
                self.suspects.clear();
                self.contradictions.clear();
                return;
            }
            PidSighting::Unreadable => {
                self.unreadable = Some(pid);
                self.suspects.remove(&pid);
                return;
            }
            PidSighting::Absent if named.listed => PidRole::Absent,
            PidSighting::Bystander { start } if start <= named.at => PidRole::Bystander { start },
            // A sample may have been taken before the process ended, so it does not clear the suspicion that a list raised.
            PidSighting::Absent if matches!(self.suspects.get(&pid), Some((PidRole::Absent, _))) => return,
            PidSighting::Absent | PidSighting::Bystander { .. } => {
                self.suspects.remove(&pid);
                return;
            }
        };
        match self.suspects.get(&pid) {
            Some((before, since)) if *before == kind => {
                let confirmed = named.at.saturating_since(*since) >= CONFIRM_NS;
                if confirmed && self.contradictions.len() < MOST && self.contradictions.iter().all(|(known, _)| *known != pid) {
                    self.contradictions.push((pid, kind));
                }
            }
            _ => {
                self.suspects.retain(|_, (_, since)| read_at.saturating_since(*since) < FORGET_NS);
                if self.suspects.len() < MOST {
                    self.suspects.insert(pid, (kind, read_at));
                }
            }
        }
    }

    pub fn verdict(&self) -> PidSpace {
        let contradicted = self.contradictions.len() >= CONTRADICTIONS;
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
        self.contradictions.iter().filter(|(_, kind)| matches!(kind, PidRole::Bystander { .. })).map(|(pid, _)| *pid)
    }

    /// A named process that holds a node.
    pub fn holder(&self) -> Option<u32> {
        self.holder
    }

    /// Whether, at `now`, the driver has named pids for some time and none of them could be checked: they end too soon or do not exist.
    pub fn is_unchecked(&self, now: BootNs) -> bool {
        let since = self.unchecked_since.filter(|_| self.holder.is_none() && self.contradictions.is_empty());
        since.is_some_and(|since| now.saturating_since(since) >= UNCHECKED_NS)
    }

    /// A named process that could not be read.
    pub fn unreadable(&self) -> Option<u32> {
        self.unreadable
    }

    /// Number of processes that contradict local pids, and the pid of the first, preferably of a living one.
    pub fn contradictions(&self) -> Option<(usize, u32)> {
        let example = self.bystanders().next().or_else(|| self.contradictions.first().map(|(pid, _)| *pid))?;
        Some((self.contradictions.len(), example))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn nodes() -> Evidence {
        Evidence::new(true, false)
    }

    /// Named at `second`, and checked 5 ms later.
    fn record(evidence: &mut Evidence, second: u64, pid: u32, listed: bool, sighting: PidSighting) -> PidSpace {
        let at = BootNs(second * S);
        evidence.record(NamedPid { pid, listed, at }, at.plus(5_000_000), sighting);
        evidence.verdict()
    }

    fn living_bystander() -> PidSighting {
        PidSighting::Bystander { start: BootNs(S) }
    }

    /// In the process lists at two times.
    fn list_twice(evidence: &mut Evidence, from: u64, pids: &[u32], sighting: PidSighting) -> PidSpace {
        for second in [from, from + 2] {
            for pid in pids {
                record(evidence, second, *pid, true, sighting);
            }
        }
        evidence.verdict()
    }

    #[test]
    fn one_holder_proves_local_pids() {
        let mut evidence = nodes();
        assert_eq!(evidence.verdict(), PidSpace::Unsettled);
        assert_eq!(record(&mut evidence, 10, 100, false, PidSighting::Holder), PidSpace::Local);
        assert_eq!(evidence.holder(), Some(100));
    }

    #[test]
    fn without_nodes_the_space_is_unverifiable() {
        let mut evidence = Evidence::new(false, false);
        assert_eq!(evidence.verdict(), PidSpace::Unverifiable);
        assert_eq!(list_twice(&mut evidence, 10, &[1, 2, 3, 4], living_bystander()), PidSpace::Unverifiable);
    }

    #[test]
    fn three_processes_without_a_node_prove_a_foreign_space() {
        for sighting in [living_bystander(), PidSighting::Absent] {
            let mut evidence = nodes();
            assert_eq!(list_twice(&mut evidence, 10, &[1, 2], sighting), PidSpace::Unsettled);
            assert_eq!(evidence.contradictions(), Some((2, 1)));
            assert_eq!(list_twice(&mut evidence, 20, &[3], sighting), PidSpace::Foreign);
            // Repeated sightings of the same processes do not count again.
            assert_eq!(list_twice(&mut evidence, 30, &[1], sighting), PidSpace::Foreign);
            assert_eq!(evidence.contradictions().map(|(n, _)| n), Some(3));
        }
    }

    #[test]
    fn samples_between_two_lists_do_not_clear_absent_processes() {
        let mut evidence = nodes();
        for (second, listed) in [(10, false), (11, true), (12, false), (13, true)] {
            for pid in 1..=3 {
                record(&mut evidence, second, pid, listed, PidSighting::Absent);
            }
        }
        assert_eq!(evidence.verdict(), PidSpace::Foreign);
    }

    #[test]
    fn a_single_sighting_or_a_repeat_within_a_second_is_not_evidence() {
        let mut evidence = nodes();
        for pid in 1..=9 {
            record(&mut evidence, 10, pid, true, living_bystander());
            record(&mut evidence, 10, pid, true, living_bystander());
        }
        assert_eq!((evidence.verdict(), evidence.contradictions()), (PidSpace::Unsettled, None));
    }

    #[test]
    fn ended_young_and_unreadable_processes_are_not_evidence() {
        let check = |listed, first, second| {
            let mut evidence = nodes();
            for pid in 1..=5 {
                record(&mut evidence, 10, pid, listed, first);
                record(&mut evidence, 12, pid, listed, second);
            }
            assert_eq!(evidence.contradictions(), None, "{listed} {first:?} {second:?}");
        };
        // It has ended: samples still name it for a while.
        check(false, PidSighting::Absent, PidSighting::Absent);
        check(true, living_bystander(), PidSighting::Absent);
        // Its pid has been reused since.
        check(true, living_bystander(), PidSighting::Bystander { start: BootNs(11 * S) });
        // It started after it was named.
        let young = PidSighting::Bystander { start: BootNs(60 * S) };
        check(true, young, young);
        check(true, PidSighting::Unreadable, living_bystander());
        check(true, living_bystander(), PidSighting::Unreadable);
    }

    #[test]
    fn samples_of_living_processes_count_like_lists() {
        let mut evidence = nodes();
        for second in [10, 12] {
            for pid in 1..=3 {
                record(&mut evidence, second, pid, false, living_bystander());
            }
        }
        assert_eq!(evidence.verdict(), PidSpace::Foreign);
    }

    #[test]
    fn a_holder_revokes_a_foreign_verdict() {
        let mut evidence = nodes();
        assert_eq!(list_twice(&mut evidence, 10, &[1, 2, 3], living_bystander()), PidSpace::Foreign);
        assert_eq!(record(&mut evidence, 20, 9, true, PidSighting::Holder), PidSpace::Local);
        assert_eq!(evidence.contradictions(), None);
        // List entries of processes that ended while a child holds their descriptors.
        assert_eq!(list_twice(&mut evidence, 30, &[4, 5, 6, 7], PidSighting::Absent), PidSpace::Local);
        assert_eq!(list_twice(&mut evidence, 40, &[11, 12, 13], living_bystander()), PidSpace::Foreign);
        assert_eq!(record(&mut evidence, 50, 9, true, PidSighting::Holder), PidSpace::Local);
    }

    #[test]
    fn a_module_of_this_kernel_means_local_pids_until_three_processes_contradict() {
        let mut evidence = Evidence::new(true, true);
        assert_eq!(evidence.verdict(), PidSpace::Local);
        assert_eq!(list_twice(&mut evidence, 10, &[1, 2], PidSighting::Absent), PidSpace::Local);
        assert_eq!(list_twice(&mut evidence, 20, &[3, 4], PidSighting::Absent), PidSpace::Unsettled);
        assert_eq!(record(&mut evidence, 25, 9, true, PidSighting::Holder), PidSpace::Local);
        assert_eq!(list_twice(&mut evidence, 30, &[5, 6, 7], living_bystander()), PidSpace::Foreign);
    }

    #[test]
    fn unreadable_processes_leave_the_space_unsettled() {
        let mut evidence = nodes();
        assert_eq!(record(&mut evidence, 10, 1, true, PidSighting::Unreadable), PidSpace::Unsettled);
        assert_eq!((evidence.unreadable(), evidence.is_unchecked(BootNs(39 * S))), (Some(1), false));
        assert!(evidence.is_unchecked(BootNs(40 * S)));
        // Some processes can be read.
        assert_eq!(list_twice(&mut evidence, 20, &[2], living_bystander()), PidSpace::Unsettled);
        assert_eq!(record(&mut evidence, 30, 3, true, PidSighting::Holder), PidSpace::Local);
        assert_eq!(evidence.unreadable(), None);
    }

    #[test]
    fn suspects_are_bounded() {
        let mut evidence = nodes();
        for pid in 0..10_000 {
            record(&mut evidence, 10, pid, true, living_bystander());
        }
        assert_eq!(evidence.suspects.len(), MOST);
        // Old suspects are dropped.
        record(&mut evidence, 100, 20_000, true, living_bystander());
        assert_eq!(evidence.suspects.len(), 1);
    }
}
