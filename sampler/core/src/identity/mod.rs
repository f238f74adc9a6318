//! Identity: processes over time, cgroups, containers.
//!
//! Pure: time and events are inputs, so the property tests in `tests/histories.rs` can generate every order of events, scans, losses and
//! resyncs.

mod cgroups;
mod containers;
mod exited;
mod liveness;
mod processes;
#[cfg(test)]
mod tests;

pub use cgroups::{Cgroups, KEEP_REMOVED_NS, UnknownCgroup};
pub use containers::{Container, ContainerChange, ContainerRecord, KEEP_GONE_NS};
pub use exited::{EXITED_BYTES, KEEP_EXITED_NS};
pub use liveness::{Liveness, PidEntry};
pub use processes::{Candidate, ObservedInterval, ProcessHistory, Processes, Residency, Size};

use std::collections::VecDeque;

use crate::observation::{CgroupFact, Observation, ProcessFact, ProcessSeen, ScanEnd};
use crate::pid_space::PidSpace;
use crate::units::{BootNs, ContainerKey, Tgid};

/// What the GPU time of a pid is attributed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Container(ContainerKey),
    Host,
    /// No process is known with that pid at that time, or its cgroup is unknown.
    Unknown,
    /// As `Unknown`, at a time from which kernel events were lost.
    Lost,
    /// The span covers several users.
    Ambiguous,
}

/// A span in which a process belonged to one user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserResidency {
    /// Start of the process.
    pub start: BootNs,
    /// Since when it belonged to the user, or the exec before which it cannot have used the GPU.
    pub since: BootNs,
    /// `None` while it lasts.
    pub until: Option<BootNs>,
}

/// The tables of processes and cgroups.
#[derive(Debug, Default)]
pub struct Identity {
    pub processes: Processes,
    pub cgroups: Cgroups,
    /// Whether a pid that the driver names is one of `processes`.
    pub driver_pids: PidSpace,
    /// Spans in which kernel events were lost, each up to the end of the scan that repaired the tables.
    losses: VecDeque<(BootNs, BootNs)>,
    /// Contradictions found by the current scan.
    found: u64,
    /// Entries that resyncs have repaired.
    pub repairs: u64,
}

/// Whether a process is kept when memory is short: those of containers, pods and jobs, and those that are not known yet not to be.
fn keep(cgroups: &Cgroups, intervals: &[ObservedInterval]) -> bool {
    intervals.iter().any(|interval| match cgroups.container_of(&interval.membership, interval.last) {
        Ok(container) => container.is_some_and(|key| cgroups.is_workload(key)),
        Err(UnknownCgroup) => true,
    })
}

impl Identity {
    /// Applies the observations that concern identity, ignores others.
    pub fn observe(&mut self, observation: Observation) {
        match observation {
            Observation::Process(fact) => self.process(&fact),
            Observation::ProcessSeen(seen) => self.process_seen(&seen),
            Observation::ProcessGone { tgid, began } => {
                let cgroups = &self.cgroups;
                self.processes.not_found(tgid, began, |intervals| keep(cgroups, intervals));
            }
            Observation::Cgroup(fact) => self.cgroup(&fact),
            Observation::ScanBegan => self.scan_began(),
            Observation::ScanEnded(scan) => self.scan_ended(&scan),
            Observation::PidSpace(space) => self.driver_pids = space,
            Observation::GpuFound { .. }
            | Observation::GpuGone { .. }
            | Observation::GpuReleased { .. }
            | Observation::Xid { .. }
            | Observation::Gpu(_)
            | Observation::Pressure(_)
            | Observation::GpuClient { .. }
            | Observation::Waited(_)
            | Observation::WaitProbe(_)
            | Observation::Engine(_)
            | Observation::ClockAdvanced { .. } => {}
        }
    }

    pub fn process(&mut self, fact: &ProcessFact) {
        let cgroups = &self.cgroups;
        self.processes.apply(fact, |intervals| keep(cgroups, intervals));
    }

    pub fn process_seen(&mut self, seen: &ProcessSeen) {
        let cgroups = &self.cgroups;
        self.found += u64::from(self.processes.record_sighting(seen, |intervals| keep(cgroups, intervals)));
    }

    pub fn cgroup(&mut self, fact: &CgroupFact) {
        self.found += u64::from(self.cgroups.apply(fact));
    }

    pub fn scan_began(&mut self) {
        self.processes.begin_scan();
        self.cgroups.begin_scan();
        self.found = 0;
    }

    /// Removes what the scan should have found and did not.
    pub fn scan_ended(&mut self, scan: &ScanEnd) {
        let mut changed = self.found;
        if scan.all_cgroups {
            changed += self.cgroups.sweep(scan.began);
        }
        if scan.all_processes {
            let cgroups = &self.cgroups;
            changed += self.processes.sweep(scan.began, |intervals| keep(cgroups, intervals));
        }
        if let Some(since) = scan.repairs_since {
            self.repairs += changed;
            self.losses.push_back((since, scan.ended));
        }
    }

    /// The user of the process that a GPU's sample named as `pid`; the sample was taken at some instant of the span. With several users in
    /// the span the result is ambiguous, because which of them was meant cannot be known. `seen` as in [`Processes::candidates`].
    pub fn resolve(&self, pid: Tgid, span: (BootNs, BootNs), seen: impl Fn(BootNs) -> Option<BootNs>) -> Verdict {
        let (from, to) = span;
        let candidates = self.processes.candidates(pid, span, seen);
        let mut found: Option<Verdict> = None;
        // A rename within the span can give one membership two users.
        let residencies = candidates.iter().flat_map(Candidate::residencies);
        for (residency, at) in residencies.flat_map(|residency| [(residency, from), (residency, to)]) {
            let verdict = match self.cgroups.container_of(&residency.membership, at) {
                Ok(Some(key)) => Verdict::Container(key),
                Ok(None) => Verdict::Host,
                Err(UnknownCgroup) => self.unknown(from, to),
            };
            if found.is_some_and(|f| f != verdict) {
                return Verdict::Ambiguous;
            }
            found = Some(verdict);
        }
        found.unwrap_or_else(|| self.unknown(from, to))
    }

    /// The uninterrupted residency, with one user, of the process that [`Identity::resolve`] finds for the span (the last one if there are
    /// several), as far as it can have used the GPU.
    pub fn residency(&self, pid: Tgid, span: (BootNs, BootNs), seen: impl Fn(BootNs) -> Option<BootNs>) -> Option<UserResidency> {
        let candidates = self.processes.candidates(pid, span, seen);
        let Candidate { history, begun, covered } = candidates.first()?;
        let residency = self.unbroken(history, covered.end.checked_sub(1)?);
        Some(UserResidency { since: residency.since.max(*begun), ..residency })
    }

    /// The end of the residency that began at `since`; `None` while it lasts, or where it is not known.
    pub fn residency_end(&self, pid: Tgid, since: BootNs) -> Option<BootNs> {
        // That of most processes, for each of which this is called with every batch.
        if self.processes.is_where_it_began(pid, since) {
            return None;
        }
        let histories = self.processes.histories(pid);
        let ended_later = |history: &ProcessHistory| history.end.is_none_or(|end| end >= since);
        let began_before = |history: &&ProcessHistory| ended_later(history) && history.start <= since;
        // A start that was only known to the clock tick of /proc may since have been refined to a slightly later one.
        let began_by_tick = |history: &&ProcessHistory| ended_later(history) && history.start.proc_tick() <= since.proc_tick();
        let history = histories.iter().find(began_before).or_else(|| histories.iter().find(began_by_tick))?;
        // It began with a residency, or with an exec within one.
        let residencies = || history.residencies.iter();
        let n = residencies().position(|r| r.from == since).or_else(|| residencies().rposition(|r| r.from <= since));
        self.unbroken(history, n.unwrap_or(0)).until
    }

    /// The consecutive residencies around the `n`th in which the process belonged to the same user.
    fn unbroken(&self, history: &ProcessHistory, n: usize) -> UserResidency {
        let user = |residency: &Residency| self.cgroups.container_of(&residency.membership, residency.from).ok();
        let expected = history.residencies.get(n).map(user);
        let same = |residency: &&Residency| Some(user(residency)) == expected;
        let (before, after) = history.residencies.split_at(n.min(history.residencies.len()));
        let since = before.iter().rev().take_while(same).last().or(after.first()).map_or(history.start, |r| r.from);
        let until = after.iter().take_while(same).last().map_or(history.end, |r| r.to);
        UserResidency { start: history.start, since, until }
    }

    fn unknown(&self, from: BootNs, to: BootNs) -> Verdict {
        let lost = self.losses.iter().any(|(lost_from, lost_to)| *lost_from <= to && *lost_to >= from);
        if lost { Verdict::Lost } else { Verdict::Unknown }
    }

    /// `used`: containers with GPU time.
    pub fn expire(&mut self, now: BootNs, used: impl Fn(ContainerKey) -> bool) {
        self.processes.expire(now);
        self.cgroups.expire(now, used);
        while self.losses.front().is_some_and(|(_, to)| now.saturating_since(*to) > KEEP_EXITED_NS) {
            self.losses.pop_front();
        }
    }
}
