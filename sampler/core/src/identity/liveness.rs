//! Liveness checks: which living processes of the table to check against /proc, and when one of them counts as dead.
//!
//! ```text
//!            checked, alive                       checked again a second later, still absent
//!  unsuspected ----------> unsuspected    suspected -----------------------------------------> dead
//!            checked, absent                      checked again, alive: the first check was wrong
//!  unsuspected ----------> suspected      suspected -----------------------------------------> unsuspected
//! ```
//! Events keep the table correct, and counted losses cause a scan. This check detects losses that no counter reports. A process with an
//! exit event that is still in a ring must not count as dead, hence two checks, each after the rings were drained.
//!
//! Bounds: a round takes [`ROUND`] seconds, or longer if that would be more than [`MOST_A_SECOND`] entries a second.
//!
//! Reading /proc and ending the entry are the caller's tasks.

use std::collections::VecDeque;

use super::processes::Processes;
use crate::units::{BootNs, Tgid};

/// Seconds in which the whole table is checked.
pub const ROUND: usize = 120;
/// A check takes some 15 us of processor time, so this many take 0.15 % of a core (`cargo xtask bench counters`).
pub const MOST_A_SECOND: usize = 100;
/// An exit event is read long before this time, even if the BPF program was preempted before it submitted the event.
const CONFIRM_AFTER_NS: u64 = 1_000_000_000;

/// An entry of the table: a process identified by pid and start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PidEntry {
    pub tgid: Tgid,
    pub start: BootNs,
}

#[derive(Clone, Copy, Debug)]
struct Suspect {
    entry: PidEntry,
    since: BootNs,
}

/// State of the current round, and the suspects.
#[derive(Debug, Default)]
pub struct Liveness {
    /// Still to be checked in this round.
    left: Vec<Tgid>,
    a_second: usize,
    /// Longest suspected first. At most as many as are checked in a few seconds.
    suspects: VecDeque<Suspect>,
}

impl Liveness {
    /// The entries to check now. Call it once a second, after the rings were drained.
    pub fn due(&mut self, now: BootNs, processes: &Processes) -> Vec<PidEntry> {
        if self.left.is_empty() {
            self.left.extend(processes.living().map(|(tgid, ..)| tgid));
            self.a_second = self.left.len().div_ceil(ROUND).min(MOST_A_SECOND);
        }
        let old = |suspect: &Suspect| now.saturating_since(suspect.since) >= CONFIRM_AFTER_NS;
        let again = self.suspects.iter().filter(|suspect| old(suspect)).map(|suspect| suspect.entry);
        let mut due: Vec<PidEntry> = again.collect();
        let next = self.left.split_off(self.left.len().saturating_sub(self.a_second));
        let entry = |tgid| processes.living_start(tgid).map(|start| PidEntry { tgid, start });
        let fresh = next.into_iter().filter_map(entry);
        due.extend(fresh.filter(|entry| !self.suspects.iter().any(|suspect| suspect.entry == *entry)));
        // Entries with an end that was reported in the meantime, or that a successor has replaced, need no check.
        due.retain(|entry| processes.living_start(entry.tgid) == Some(entry.start));
        self.suspects.retain(|suspect| processes.living_start(suspect.entry.tgid) == Some(suspect.entry.start));
        due
    }

    /// Records the result of a check of a due entry at `now`. Returns true when the process is certainly dead.
    pub fn checked(&mut self, entry: PidEntry, alive: bool, now: BootNs) -> bool {
        let Some(at) = self.suspects.iter().position(|suspect| suspect.entry == entry) else {
            if !alive {
                self.suspects.push_back(Suspect { entry, since: now });
            }
            return false;
        };
        let confirmed = !alive && now.saturating_since(self.suspects[at].since) >= CONFIRM_AFTER_NS;
        if alive || confirmed {
            self.suspects.remove(at);
        }
        confirmed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::{CgroupMembership, ProcessChange, ProcessFact};

    const SECOND: u64 = 1_000_000_000;
    const MEMBERSHIP: CgroupMembership = CgroupMembership { v2_id: 1, v1_id: 0, v1_hierarchy: 0 };

    fn apply_event(processes: &mut Processes, change: ProcessChange, pid: u32, start: u64, at: u64) {
        let fact = ProcessFact { change, tgid: Tgid(pid), start: BootNs(start), at: BootNs(at), membership: MEMBERSHIP };
        processes.apply(&fact, |_| true);
    }

    fn living(pids: std::ops::Range<u32>) -> Processes {
        let mut processes = Processes::default();
        for pid in pids {
            apply_event(&mut processes, ProcessChange::Fork { parent: Tgid(1) }, pid, u64::from(pid), u64::from(pid));
        }
        processes
    }

    fn entry(pid: u32) -> PidEntry {
        PidEntry { tgid: Tgid(pid), start: BootNs(u64::from(pid)) }
    }

    #[test]
    fn a_round_covers_the_table_evenly_in_two_minutes() {
        let check = |n: u32, seconds: usize, most: usize| {
            let (processes, mut liveness) = (living(1..n + 1), Liveness::default());
            let mut seen = Vec::new();
            for second in 0..seconds {
                let due = liveness.due(BootNs(second as u64 * SECOND), &processes);
                assert!(due.len() <= most, "{n} entries: {} due", due.len());
                seen.extend(due.into_iter().map(|entry| entry.tgid.0));
            }
            seen.sort_unstable();
            assert_eq!(seen, (1..n + 1).collect::<Vec<_>>(), "{n} entries");
        };
        check(1, 1, 1);
        check(120, ROUND, 1);
        check(600, ROUND, 5);
        // Bounded: the round takes longer.
        check(20_000, 200, MOST_A_SECOND);
    }

    #[test]
    fn an_empty_table_has_nothing_due() {
        assert_eq!(Liveness::default().due(BootNs(0), &Processes::default()), []);
    }

    #[test]
    fn a_process_is_dead_only_after_two_checks_a_second_apart() {
        let (processes, mut liveness) = (living(7..8), Liveness::default());
        let at = BootNs(10 * SECOND);
        assert_eq!(liveness.due(at, &processes), [entry(7)]);
        assert!(!liveness.checked(entry(7), false, at));
        // The next round contains it too, but too early.
        assert_eq!(liveness.due(BootNs(at.0 + SECOND / 2), &processes), []);
        assert!(!liveness.checked(entry(7), false, BootNs(at.0 + SECOND / 2)), "half a second is too early");
        assert_eq!(liveness.due(BootNs(at.0 + SECOND), &processes), [entry(7)]);
        assert!(liveness.checked(entry(7), false, BootNs(at.0 + SECOND)));
    }

    #[test]
    fn a_process_that_is_found_again_starts_unsuspected() {
        let (processes, mut liveness) = (living(7..8), Liveness::default());
        assert!(!liveness.checked(entry(7), false, BootNs(0)));
        assert!(!liveness.checked(entry(7), true, BootNs(SECOND)));
        assert!(!liveness.checked(entry(7), false, BootNs(2 * SECOND)), "the first suspicion was wrong");
        assert_eq!(liveness.due(BootNs(3 * SECOND), &processes), [entry(7)]);
        assert!(liveness.checked(entry(7), false, BootNs(3 * SECOND)));
    }

    #[test]
    fn a_late_exit_event_ends_the_suspicion() {
        let (mut processes, mut liveness) = (living(7..8), Liveness::default());
        assert!(!liveness.checked(entry(7), false, BootNs(0)));
        apply_event(&mut processes, ProcessChange::Exit, 7, 7, 20);
        assert_eq!(liveness.due(BootNs(SECOND), &processes), []);
        assert!(liveness.suspects.is_empty());
    }

    #[test]
    fn a_successor_with_the_same_pid_is_not_suspected_for_its_predecessor() {
        let (mut processes, mut liveness) = (living(7..8), Liveness::default());
        assert!(!liveness.checked(entry(7), false, BootNs(0)));
        apply_event(&mut processes, ProcessChange::Fork { parent: Tgid(1) }, 7, 30, 30);
        let successor = PidEntry { tgid: Tgid(7), start: BootNs(30) };
        assert_eq!(liveness.due(BootNs(SECOND), &processes), [successor]);
        assert!(!liveness.checked(successor, false, BootNs(SECOND)));
    }
}
