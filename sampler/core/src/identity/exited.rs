//! Processes that have ended, for as long as samples may still name them.
//!
//! Two queues in the order of ending, one for processes of containers, one for all others: when [`EXITED_BYTES`] are reached the
//! others go first. Per queue an index to the newest life of a pid; each entry knows how far back the one before it stands.

use std::collections::VecDeque;

use super::processes::ObservedInterval;
use super::table::Table;
use crate::observation::CgroupMembership;
use crate::units::{BootNs, Tgid};

/// Three times NVML's ring of ~10 s, and a little.
pub const KEEP_EXITED_NS: u64 = 40_000_000_000;
/// All that exited processes may take, spare capacity included: 30 s of 10,000 exits a second.
pub const EXITED_BYTES: usize = 40 << 20;
/// A queue grows by a quarter, so at most that much of it is spare.
const GROWTH: usize = 4;
const SMALLEST: usize = 1024;
/// What one entry takes: itself, the spare room of its queue, and two slots of an index that has just doubled.
const ENTRY_BYTES: usize = size_of::<ExitedProcess>() + size_of::<ExitedProcess>() / GROWTH + 3 * (size_of::<(Tgid, u64)>() + 1);

/// How an end came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndedBy {
    /// The kernel said so; nothing that is seen later can be the same life.
    Event,
    /// It was not found, or another took its pid: it may turn out to live.
    Inference,
}

#[derive(Clone, Debug)]
struct ExitedProcess {
    start: BootNs,
    end: BootNs,
    tgid: Tgid,
    /// How many entries back in the queue the same pid's previous life is; 0 for none. The top bit: the end was only inferred.
    back: u32,
    /// The only place it ever had, unless there are more.
    place: CgroupMembership,
    /// The last; 0 for none.
    exec: BootNs,
    past: Option<Box<ExitedHistory>>,
}

/// Of one that moved, or called exec more than once: all places, and the execs before the last.
#[derive(Clone, Debug)]
struct ExitedHistory {
    runs: Box<[ObservedInterval]>,
    execs: Box<[BootNs]>,
}

/// Top bit of [`ExitedProcess::back`]; a queue is far shorter than what is left.
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
            size_of_val(past) + size_of_val::<[ObservedInterval]>(&past.runs) + size_of_val::<[BootNs]>(&past.execs)
        };
        // Each allocation has a head.
        self.past.as_deref().map_or(0, |past| bytes(past) + 3 * 16)
    }
}

#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<ExitedProcess>,
    /// Sequence number of the front.
    first: u64,
    newest: Table<Tgid, u64>,
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
        // Emptied while the other queue fills, it must give its room up; growing again costs no more than having shrunk.
        if self.entries.len() < self.entries.capacity() / 2 && self.entries.capacity() > 4 * SMALLEST {
            self.entries.shrink_to(self.entries.len() + self.entries.len() / GROWTH);
            self.newest.shrink_to(self.newest.len());
        }
        Some(entry)
    }

    /// The lives of a pid, newest first.
    fn of(&self, tgid: Tgid) -> impl Iterator<Item = &ExitedProcess> {
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

/// Slots of a hash table that offers this capacity: it fills seven eighths.
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
    /// `runs` and `execs`: all of them, oldest first.
    pub fn push(
        &mut self,
        tgid: Tgid,
        (start, end): (BootNs, BootNs),
        runs: &[ObservedInterval],
        execs: &[BootNs],
        ended_by: EndedBy,
        keep: bool,
    ) {
        let Some(first) = runs.first() else { return };
        let (exec, earlier) = execs.split_last().map_or((BootNs(0), &[][..]), |(last, earlier)| (*last, earlier));
        // A first place that begins with a move is not known before it.
        let simple = runs.len() == 1 && (!first.exact || first.first <= start) && earlier.is_empty();
        let past = (!simple).then(|| Box::new(ExitedHistory { runs: runs.into(), execs: earlier.into() }));
        let back = if ended_by == EndedBy::Event { 0 } else { INFERRED };
        let entry = ExitedProcess { start, end: end.max(start), tgid, back, place: first.place, exec, past };
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

    fn of(&self, tgid: Tgid) -> impl Iterator<Item = &ExitedProcess> {
        self.kept.of(tgid).chain(self.others.of(tgid))
    }

    /// Whether a life of that pid has ended like this.
    pub fn has(&self, tgid: Tgid, wanted: impl Fn(BootNs, EndedBy) -> bool) -> bool {
        self.of(tgid).any(|entry| wanted(entry.start, entry.ended_by()))
    }

    /// Gives start, end, places and execs of each life.
    pub fn each(&self, tgid: Tgid, mut give: impl FnMut(BootNs, BootNs, &[ObservedInterval], Vec<BootNs>)) {
        for entry in self.of(tgid) {
            let only = [ObservedInterval { place: entry.place, first: entry.start, last: entry.end, exact: false }];
            let runs = entry.past.as_ref().map_or(&only[..], |past| &past.runs);
            let earlier = entry.past.iter().flat_map(|past| past.execs.iter()).copied();
            let last = (entry.exec != BootNs(0)).then_some(entry.exec);
            give(entry.start, entry.end, runs, earlier.chain(last).collect());
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
