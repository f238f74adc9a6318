//! Processes that have ended, kept for as long as samples may still name them.
//!
//! Two queues in the order of ending, one for processes of containers, one for all others: when [`EXITED_BYTES`] is reached, the others are
//! dropped first. Each queue has an index to the newest process of a pid; each entry stores the distance to the previous process of its
//! pid.

use std::collections::VecDeque;

use foldhash::HashMap;

use super::processes::ObservedInterval;
use crate::observation::CgroupMembership;
use crate::units::{BootNs, Tgid};

/// Three times the length of NVML's sample buffer (about 10 s), plus a margin.
pub const KEEP_EXITED_NS: u64 = 40_000_000_000;
/// Memory limit of exited processes, including spare capacity: 30 s of 10,000 exits a second.
pub const EXITED_BYTES: usize = 40 << 20;
/// A queue grows by a quarter, so at most a quarter of it is spare.
const GROWTH: usize = 4;
const SMALLEST: usize = 1024;
/// Memory of one entry: itself, its part of the spare capacity of the queue, and its slots in an index that has just doubled.
const ENTRY_BYTES: usize = size_of::<ExitedProcess>() + size_of::<ExitedProcess>() / GROWTH + 3 * (size_of::<(Tgid, u64)>() + 1);

/// How the end of a process was detected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndedBy {
    /// By a kernel event; no later sighting can be the same process.
    Event,
    /// It was not found, or its pid was reused: it may turn out to be alive.
    Inference,
}

#[derive(Clone, Debug)]
struct ExitedProcess {
    start: BootNs,
    end: BootNs,
    tgid: Tgid,
    /// Distance, in entries of the queue, to the previous process with the same pid; 0 for none. The top bit is set if the end was
    /// inferred.
    back: u32,
    /// Its only membership, unless `past` has several.
    membership: CgroupMembership,
    /// The last exec; 0 for none.
    exec: BootNs,
    past: Option<Box<ExitedHistory>>,
}

/// For a process that moved or called exec more than once: all intervals, and the execs before the last one.
#[derive(Clone, Debug)]
struct ExitedHistory {
    intervals: Box<[ObservedInterval]>,
    execs: Box<[BootNs]>,
}

/// Top bit of [`ExitedProcess::back`]; a queue is far shorter than the remaining bits can count.
const INFERRED: u32 = 1 << 31;

impl ExitedProcess {
    fn back(&self) -> u64 {
        u64::from(self.back & !INFERRED)
    }

    fn ended_by(&self) -> EndedBy {
        if self.back & INFERRED == 0 { EndedBy::Event } else { EndedBy::Inference }
    }

    fn extra(&self) -> usize {
        let bytes = |past: &ExitedHistory| {
            size_of_val(past) + size_of_val::<[ObservedInterval]>(&past.intervals) + size_of_val::<[BootNs]>(&past.execs)
        };
        // Each allocation has a header.
        self.past.as_deref().map_or(0, |past| bytes(past) + 3 * 16)
    }
}

#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<ExitedProcess>,
    /// Sequence number of the front.
    first: u64,
    newest: HashMap<Tgid, u64>,
}

impl Queue {
    fn push(&mut self, mut entry: ExitedProcess) {
        if self.entries.len() == self.entries.capacity() {
            self.entries.reserve_exact((self.entries.len() / GROWTH).max(SMALLEST));
        }
        let seq = self.first + self.entries.len() as u64;
        if let Some(before) = self.newest.insert(entry.tgid, seq) {
            entry.back |= u32::try_from(seq - before).ok().filter(|back| back & INFERRED == 0).unwrap_or(0);
        }
        self.entries.push_back(entry);
    }

    fn pop(&mut self) -> Option<ExitedProcess> {
        let entry = self.entries.pop_front()?;
        if self.newest.get(&entry.tgid) == Some(&self.first) {
            self.newest.remove(&entry.tgid);
        }
        self.first += 1;
        // A queue that empties while the other one fills must release its memory; growing again costs no more than shrinking did.
        if self.entries.len() < self.entries.capacity() / 2 && self.entries.capacity() > 4 * SMALLEST {
            self.entries.shrink_to(self.entries.len() + self.entries.len() / GROWTH);
            self.newest.shrink_to(self.newest.len());
        }
        Some(entry)
    }

    /// The processes with that pid, newest first.
    fn with_pid(&self, tgid: Tgid) -> impl Iterator<Item = &ExitedProcess> {
        let entry = |seq: u64| Some((seq, self.entries.get(usize::try_from(seq.checked_sub(self.first)?).ok()?)?));
        let newest = self.newest.get(&tgid).and_then(|seq| entry(*seq));
        let before = move |(seq, found): &(u64, &ExitedProcess)| match found.back() {
            0 => None,
            back => entry(seq.checked_sub(back)?),
        };
        std::iter::successors(newest, before).map(|(_, found)| found)
    }

    fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<ExitedProcess>() + buckets(self.newest.capacity()) * (size_of::<(Tgid, u64)>() + 1)
    }
}

/// Number of slots of a hash table with this capacity: seven eighths of the slots are usable.
pub(super) fn buckets(capacity: usize) -> usize {
    if capacity == 0 { 0 } else { (capacity * 8 / 7).next_power_of_two() }
}

#[derive(Debug, Default)]
pub(super) struct Exited {
    kept: Queue,
    others: Queue,
    extra_bytes: usize,
    pub evicted: u64,
}

impl Exited {
    /// `intervals` and `execs`: all of them, oldest first.
    pub fn push(
        &mut self,
        tgid: Tgid,
        (start, end): (BootNs, BootNs),
        intervals: &[ObservedInterval],
        execs: &[BootNs],
        ended_by: EndedBy,
        keep: bool,
    ) {
        let Some(first) = intervals.first() else { return };
        let (exec, earlier) = execs.split_last().map_or((BootNs(0), &[][..]), |(last, earlier)| (*last, earlier));
        // If the first interval begins with a move, the membership before it is not known.
        let simple = intervals.len() == 1 && (!first.exact || first.first <= start) && earlier.is_empty();
        let past = (!simple).then(|| Box::new(ExitedHistory { intervals: intervals.into(), execs: earlier.into() }));
        let back = if ended_by == EndedBy::Event { 0 } else { INFERRED };
        let entry = ExitedProcess { start, end: end.max(start), tgid, back, membership: first.membership, exec, past };
        self.extra_bytes += entry.extra();
        if keep {
            self.kept.push(entry)
        } else {
            self.others.push(entry)
        }
        while self.len() * ENTRY_BYTES + self.extra_bytes > EXITED_BYTES || self.bytes() > EXITED_BYTES {
            let Some(entry) = self.others.pop().or_else(|| self.kept.pop()) else { break };
            self.extra_bytes -= entry.extra();
            self.evicted += 1;
        }
    }

    fn with_pid(&self, tgid: Tgid) -> impl Iterator<Item = &ExitedProcess> {
        self.kept.with_pid(tgid).chain(self.others.with_pid(tgid))
    }

    /// Whether a process with that pid matches, by its start and the way its end was detected.
    pub fn has(&self, tgid: Tgid, wanted: impl Fn(BootNs, EndedBy) -> bool) -> bool {
        self.with_pid(tgid).any(|entry| wanted(entry.start, entry.ended_by()))
    }

    /// Calls `visit` with start, end, intervals and execs of each process with that pid.
    pub fn each(&self, tgid: Tgid, mut visit: impl FnMut(BootNs, BootNs, &[ObservedInterval], Vec<BootNs>)) {
        for entry in self.with_pid(tgid) {
            let only = [ObservedInterval { membership: entry.membership, first: entry.start, last: entry.end, exact: false }];
            let intervals = entry.past.as_ref().map_or(&only[..], |past| &past.intervals);
            let earlier = entry.past.iter().flat_map(|past| past.execs.iter()).copied();
            let last = (entry.exec != BootNs(0)).then_some(entry.exec);
            visit(entry.start, entry.end, intervals, earlier.chain(last).collect());
        }
    }

    pub fn expire(&mut self, now: BootNs) {
        for queue in [&mut self.kept, &mut self.others] {
            while queue.entries.front().is_some_and(|e| now.saturating_since(e.end) >= KEEP_EXITED_NS) {
                let Some(entry) = queue.pop() else { break };
                self.extra_bytes -= entry.extra();
            }
        }
    }

    pub fn len(&self) -> usize {
        self.kept.entries.len() + self.others.entries.len()
    }

    pub fn bytes(&self) -> usize {
        self.kept.bytes() + self.others.bytes() + self.extra_bytes
    }
}
