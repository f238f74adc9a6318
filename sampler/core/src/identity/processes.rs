//! The process table: the cgroup memberships of each (tgid, start time) over time.
//!
//! ```text
//!            fork, exec, attach, seen            exit, swept, pid taken by another
//!  unknown ---------------------------> living ------------------------------------> exited --40 s, or the byte bound--> unknown
//! ```
//! Guarantees:
//! - A lookup returns the state at the requested time, also for a process that has exited or moved, or with a pid that was reused.
//! - Events arrive in the kernel's order. Sightings of a scan arrive after the events up to then, and an event takes precedence over them.
//! - An end that an event reported is final. An inferred end is revoked when the process turns out to be alive.
//! - Where a membership was detected late (its attach event was lost), the time between is uncertain and has both memberships.
//! - The image of a process before an exec is not a candidate for GPU time, unless it had been seen on the GPU by then
//!   ([`Processes::candidates`]).
//! - Living processes are bounded by the kernel's pid limit, exited ones by [`super::EXITED_BYTES`].
//!
//! The meaning of a cgroup is not determined here.

use std::ops::Range;

use foldhash::HashMap;

use super::exited::{EndedBy, Exited};
use crate::observation::{CgroupMembership, ProcessChange, ProcessFact, ProcessSeen};
use crate::units::{BootNs, Tgid};

/// Maximum number of intervals kept for a process.
const MAX_INTERVALS: usize = 64;
/// Maximum number of execs kept for a process, in addition to the last one.
const MAX_EXECS: usize = 8;

/// A span in which every sighting of a process found the same membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObservedInterval {
    pub membership: CgroupMembership,
    pub first: BootNs,
    pub last: BootNs,
    /// It began exactly at `first`, not at some earlier time.
    pub exact: bool,
}

/// `[from, to)` with one membership; `certain_from` is later than `from` where the move itself was not observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    pub membership: CgroupMembership,
    pub from: BootNs,
    pub certain_from: BootNs,
    /// `None` while it lasts.
    pub to: Option<BootNs>,
}

/// One process with its residencies and execs, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessHistory {
    pub start: BootNs,
    pub end: Option<BootNs>,
    pub residencies: Vec<Residency>,
    /// Times of its execs, as far as events reported them.
    pub execs: Vec<BootNs>,
}

/// A process that a GPU's sample may mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub history: ProcessHistory,
    /// Its start, or the exec before which it cannot have used that GPU.
    pub begun: BootNs,
    /// Its residencies that the sample's span covers; at least one.
    pub covered: Range<usize>,
}

impl Candidate {
    pub fn residencies(&self) -> &[Residency] {
        self.history.residencies.get(self.covered.clone()).unwrap_or_default()
    }
}

impl ProcessHistory {
    /// The part of the history that a sample of that span may mean. `seen`: the first time at which it had certainly used the GPU.
    ///
    /// The second value is true where another exec followed after the span. Then this image is superseded: it is a candidate only if there
    /// are not any others.
    fn candidate(self, from: BootNs, to: BootNs, seen: Option<BootNs>) -> Option<(Candidate, bool)> {
        if self.start > to || self.end.is_some_and(|end| end < from) {
            return None;
        }
        let supersedes = |exec: &&BootNs| seen.is_none_or(|seen| **exec < seen);
        let begun = self.execs.iter().filter(supersedes).rfind(|exec| **exec <= to).map_or(self.start, |exec| *exec);
        let superseded = self.execs.iter().any(|exec| *exec > to && supersedes(&exec));
        let after = from.max(begun);
        // The last residency includes the instant of the end.
        let over = |residency: &Residency| residency.to.is_some_and(|until| until <= after && Some(until) != self.end);
        let first = self.residencies.iter().position(|residency| !over(residency))?;
        let last = self.residencies.iter().rposition(|residency| residency.from <= to)?;
        let candidate = Candidate { history: self, begun, covered: first..last + 1 };
        (first <= last).then_some((candidate, superseded))
    }
}

/// The residencies that follow from observed intervals. The first begins at the start of the process, unless it began with a move from an
/// unknown membership.
pub(super) fn residencies(start: BootNs, end: Option<BootNs>, intervals: &[ObservedInterval]) -> Vec<Residency> {
    let from = |i: usize, interval: &ObservedInterval| match i.checked_sub(1).and_then(|before| intervals.get(before)) {
        _ if interval.exact => interval.first,
        Some(before) => before.last,
        None => start,
    };
    let residency = |(i, interval): (usize, &ObservedInterval)| Residency {
        membership: interval.membership,
        from: from(i, interval),
        certain_from: if interval.exact { from(i, interval) } else { interval.first },
        to: intervals.get(i + 1).map(|next| next.first).or(end),
    };
    intervals.iter().enumerate().map(residency).collect()
}

/// Earlier intervals of a process, and its execs before the last one. Most processes have neither.
#[derive(Clone, Debug, Default)]
struct EarlierHistory {
    intervals: Vec<ObservedInterval>,
    execs: Vec<BootNs>,
}

impl EarlierHistory {
    fn bytes(&self) -> usize {
        let (intervals, execs) =
            (self.intervals.capacity() * size_of::<ObservedInterval>(), self.execs.capacity() * size_of::<BootNs>());
        size_of::<Self>() + intervals + execs
    }
}

#[derive(Clone, Debug)]
struct ProcessRecord {
    start: BootNs,
    now: ObservedInterval,
    /// The last known exec; 0 for none.
    exec: BootNs,
    past: Option<Box<EarlierHistory>>,
    generation: u32,
    coarse: bool,
}

impl ProcessRecord {
    fn is_same(&self, start: BootNs, coarse: bool) -> bool {
        same_start(self.start, self.coarse, start, coarse)
    }

    fn add(&mut self, interval: ObservedInterval) {
        let now = &mut self.now;
        if now.membership == interval.membership {
            now.last = now.last.max(interval.last);
            return;
        }
        let before = &mut self.past.get_or_insert_default().intervals;
        if interval.first >= now.last {
            before.push(*now);
            *now = interval;
        } else if now.first < interval.first {
            // Out of order by the offset between the clocks of two processors.
            before.extend([ObservedInterval { last: now.first, ..*now }, interval]);
            (now.first, now.exact) = (now.last, false);
        } else {
            let at = before.partition_point(|b| b.first <= interval.first);
            before.insert(at, interval);
        }
        while before.len() >= MAX_INTERVALS {
            before.remove(0);
        }
    }

    /// Returns true when the sighting contradicts the record: an event must have been lost.
    fn record_sighting(&mut self, membership: CgroupMembership, began: BootNs) -> bool {
        let contradicts = self.now.last < began && self.now.membership != membership;
        if self.now.last < began {
            self.add(sighting(membership, began));
        }
        contradicts
    }

    /// The child's membership was read at the event, so sightings before it showed the parent's membership or none.
    fn record_fork(&mut self, interval: ObservedInterval) {
        if self.now.last <= interval.last {
            (self.now, self.past) = (interval, None);
        } else {
            self.add(interval);
        }
    }

    fn record_exec(&mut self, at: BootNs) {
        let last = self.exec;
        self.exec = last.max(at);
        if last == BootNs(0) || last == at {
            return;
        }
        let execs = &mut self.past.get_or_insert_default().execs;
        // Out of order by the offset between the clocks of two processors.
        let earlier = last.min(at);
        execs.insert(execs.partition_point(|exec| *exec < earlier), earlier);
        while execs.len() > MAX_EXECS {
            execs.remove(0);
        }
    }

    fn intervals(&self) -> Vec<ObservedInterval> {
        let before = self.past.iter().flat_map(|past| past.intervals.iter());
        before.chain([&self.now]).copied().collect()
    }

    fn execs(&self) -> Vec<BootNs> {
        let earlier = self.past.iter().flat_map(|past| past.execs.iter());
        earlier.chain([&self.exec]).copied().filter(|exec| *exec != BootNs(0)).collect()
    }
}

fn sighting(membership: CgroupMembership, began: BootNs) -> ObservedInterval {
    ObservedInterval { membership, first: began, last: began, exact: false }
}

fn same_start(a: BootNs, a_coarse: bool, b: BootNs, b_coarse: bool) -> bool {
    if a_coarse || b_coarse { a.proc_tick() == b.proc_tick() } else { a == b }
}

#[derive(Debug, Default)]
pub struct Processes {
    living: HashMap<Tgid, ProcessRecord>,
    exited: Exited,
    generation: u32,
}

impl Processes {
    /// `keep` decides by the intervals of a process that ends whether it is kept in preference to others when memory is short.
    pub fn apply(&mut self, fact: &ProcessFact, keep: impl Fn(&[ObservedInterval]) -> bool) {
        let forked = matches!(fact.change, ProcessChange::Fork { .. });
        let first = if forked { fact.start } else { fact.at };
        let exact = forked || fact.change == ProcessChange::Attach;
        let interval = ObservedInterval { membership: fact.membership, first, last: fact.at.max(first), exact };
        let execed = fact.change == ProcessChange::Exec;
        let exec = if execed { fact.at } else { BootNs(0) };
        let record =
            ProcessRecord { start: fact.start, now: interval, exec, past: None, generation: self.generation, coarse: false };
        match self.living.get_mut(&fact.tgid) {
            Some(known) if known.is_same(fact.start, false) => {
                (known.start, known.coarse) = (fact.start, false);
                if forked {
                    known.record_fork(interval)
                } else {
                    known.add(interval)
                }
                if execed {
                    known.record_exec(fact.at);
                }
            }
            known => {
                // An inferred end is revoked; one that an event reported is final.
                if self.exited.has(fact.tgid, |start, by| start == fact.start && by == EndedBy::Event) {
                    return;
                }
                let successor = known.map(|known| known.start).filter(|start| *start > fact.start);
                if let Some(successor) = successor {
                    // Only its end is still of use.
                    if fact.change == ProcessChange::Exit {
                        self.retire(fact.tgid, &record, fact.at.min(successor), EndedBy::Event, &keep);
                    }
                    return;
                }
                // The kernel assigns a pid to one process at a time: the previous process has ended unobserved.
                if let Some(before) = self.living.insert(fact.tgid, record) {
                    self.retire(fact.tgid, &before, fact.start, EndedBy::Inference, &keep);
                }
            }
        }
        if fact.change == ProcessChange::Exit {
            self.end(fact.tgid, fact.at, EndedBy::Event, &keep);
        }
    }

    /// Applies a sighting. Returns true when it contradicts the table, so an event must have been lost.
    pub fn record_sighting(&mut self, seen: &ProcessSeen, keep: impl Fn(&[ObservedInterval]) -> bool) -> bool {
        let generation = self.generation;
        if let Some(record) = self.living.get_mut(&seen.tgid) {
            if record.is_same(seen.start, seen.coarse_start) {
                record.generation = generation;
                return seen.membership.is_some_and(|membership| record.record_sighting(membership, seen.began));
            }
            // It has been followed by another process since the sighting.
            if record.start > seen.start {
                return false;
            }
            self.end(seen.tgid, seen.start, EndedBy::Inference, &keep);
        }
        // Not fully gone, but its end was reported.
        let is_same = |start| same_start(start, false, seen.start, seen.coarse_start);
        if self.exited.has(seen.tgid, |start, by| is_same(start) && by == EndedBy::Event) {
            return false;
        }
        let Some(membership) = seen.membership else { return false };
        let now = sighting(membership, seen.began);
        let (start, exec, coarse) = (seen.start, BootNs(0), seen.coarse_start);
        self.living.insert(seen.tgid, ProcessRecord { start, now, exec, past: None, generation, coarse });
        true
    }

    /// A check that began at `began` found no process with that pid.
    pub fn not_found(&mut self, tgid: Tgid, began: BootNs, keep: impl Fn(&[ObservedInterval]) -> bool) {
        if self.living.get(&tgid).is_some_and(|record| record.now.last < began) {
            self.end(tgid, began, EndedBy::Inference, keep);
        }
    }

    /// Begins a scan: [`Processes::record_sighting`] marks processes; [`Processes::sweep`] ends those that are not marked.
    pub fn begin_scan(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Ends processes that the scan that began at `began` did not find and that no later event reported. Returns their number.
    pub fn sweep(&mut self, began: BootNs, keep: impl Fn(&[ObservedInterval]) -> bool) -> u64 {
        let stale = |record: &ProcessRecord| record.generation != self.generation && record.now.last < began;
        let gone: Vec<Tgid> = self.living.iter().filter(|(_, record)| stale(record)).map(|(tgid, _)| *tgid).collect();
        for tgid in &gone {
            self.end(*tgid, began, EndedBy::Inference, &keep);
        }
        gone.len() as u64
    }

    fn end(&mut self, tgid: Tgid, at: BootNs, by: EndedBy, keep: impl Fn(&[ObservedInterval]) -> bool) {
        if let Some(record) = self.living.remove(&tgid) {
            self.retire(tgid, &record, at, by, keep);
        }
    }

    fn retire(
        &mut self,
        tgid: Tgid,
        record: &ProcessRecord,
        at: BootNs,
        by: EndedBy,
        keep: impl Fn(&[ObservedInterval]) -> bool,
    ) {
        let (moved, again) = record.past.as_ref().map(|_| (record.intervals(), record.execs())).unzip();
        let intervals = moved.as_deref().unwrap_or(std::slice::from_ref(&record.now));
        let execs = again.as_deref().unwrap_or(std::slice::from_ref(&record.exec));
        self.exited.push(tgid, (record.start, at), intervals, execs, by, keep(intervals));
    }

    /// The processes that a GPU's sample of that span may mean, newest first. `seen` returns, by the start of a process, the first time at
    /// which it had certainly used that GPU: an exec after that time does not exclude the image before it.
    ///
    /// A GPU context does not survive exec, and runtimes fork, move and then exec. So the last image takes precedence over those that an
    /// exec has replaced, also among the processes of a reused pid.
    pub fn candidates(&self, pid: Tgid, (from, to): (BootNs, BootNs), seen: impl Fn(BootNs) -> Option<BootNs>) -> Vec<Candidate> {
        let all = self.histories(pid).into_iter().filter_map(|history| {
            let seen = seen(history.start);
            history.candidate(from, to, seen)
        });
        let (superseded, last): (Vec<_>, Vec<_>) = all.partition(|(_, superseded)| *superseded);
        let best = if last.is_empty() { superseded } else { last };
        best.into_iter().map(|(candidate, _)| candidate).collect()
    }

    /// Every known process with that pid, newest first.
    pub fn histories(&self, tgid: Tgid) -> Vec<ProcessHistory> {
        let mut found = Vec::new();
        if let Some(record) = self.living.get(&tgid) {
            let residencies = residencies(record.start, None, &record.intervals());
            found.push(ProcessHistory { start: record.start, end: None, residencies, execs: record.execs() });
        }
        self.exited.each(tgid, |start, end, intervals, execs| {
            let residencies = residencies(start, Some(end), intervals);
            found.push(ProcessHistory { start, end: Some(end), residencies, execs });
        });
        found.sort_by_key(|history| std::cmp::Reverse(history.start));
        found
    }

    /// Living processes: pid, start, and current membership.
    pub fn living(&self) -> impl Iterator<Item = (Tgid, BootNs, CgroupMembership)> {
        self.living.iter().map(|(tgid, record)| (*tgid, record.start, record.now.membership))
    }

    /// Whether the process that had this pid at that time lives, and never changed its membership.
    pub fn is_where_it_began(&self, tgid: Tgid, at: BootNs) -> bool {
        let never_moved = |record: &ProcessRecord| record.past.as_ref().is_none_or(|past| past.intervals.is_empty());
        self.living.get(&tgid).is_some_and(|record| record.start <= at && never_moved(record))
    }

    /// Start of the process that currently has this pid.
    pub fn living_start(&self, tgid: Tgid) -> Option<BootNs> {
        self.living.get(&tgid).map(|record| record.start)
    }

    pub fn expire(&mut self, now: BootNs) {
        self.exited.expire(now);
    }

    pub fn size(&self) -> Size {
        let record_bytes = size_of::<(Tgid, ProcessRecord)>() + 1;
        let moves: usize = self.living.values().map(|record| record.past.as_ref().map_or(0, |past| past.bytes())).sum();
        Size {
            living: self.living.len(),
            exited: self.exited.len(),
            evicted: self.exited.evicted,
            living_bytes: super::exited::buckets(self.living.capacity()) * record_bytes + moves,
            exited_bytes: self.exited.bytes(),
        }
    }
}

/// Size of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    pub living: usize,
    pub exited: usize,
    /// Exited processes dropped before their time, since the start.
    pub evicted: u64,
    pub living_bytes: usize,
    pub exited_bytes: usize,
}
