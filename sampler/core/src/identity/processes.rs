//! Processes as intervals: where each (tgid, start time) was, and when.
//!
//! ```text
//!            fork, exec, attach, seen            exit, swept, pid taken by another
//!  unknown ---------------------------> living ------------------------------------> exited --40 s, or the byte bound--> unknown
//! ```
//! Promises:
//! - A lookup is answered as of the time asked about, also for a process that has exited, moved, or whose pid was reused.
//! - Events come in the kernel's order. What a scan saw is given after the events up to then were, and an event beats it.
//! - An end that was told is final; one that was only inferred is taken back when the process turns out to live.
//! - Where a place was only found out later (its attach was lost), the time between is answered with both places.
//! - What a process was before an exec is out of question for GPU time, unless it had been seen on the GPU by then
//!   ([`Processes::candidates`]).
//! - Living processes are bounded by the kernel's own pid limit, exited ones by [`EXITED_BYTES`].
//!
//! Not here: what a cgroup means.

use std::ops::Range;

use super::exited::{EndedBy, Exited};
use super::table::Table;
use crate::observation::{CgroupMembership, ProcessChange, ProcessFact, ProcessSeen};
use crate::units::{BootNs, Tgid};

/// A process that is moved about remembers this many places.
const MAX_INTERVALS: usize = 64;
/// Execs before the last one that a process remembers.
const MAX_EXECS: usize = 8;

/// A stretch of time in which every look at a process found it in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObservedInterval {
    pub place: CgroupMembership,
    pub first: BootNs,
    pub last: BootNs,
    /// It began at `first`, not at some time before.
    pub exact: bool,
}

/// `[from, to)` in one place; `certain_from` is later than `from` where the move itself was not seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    pub place: CgroupMembership,
    pub from: BootNs,
    pub certain_from: BootNs,
    /// `None` while it lasts.
    pub to: Option<BootNs>,
}

/// One process and where it was, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessHistory {
    pub start: BootNs,
    pub end: Option<BootNs>,
    pub stays: Vec<Residency>,
    /// When it called exec, as far as events said so.
    pub execs: Vec<BootNs>,
}

/// A life in which a GPU's sample may have been taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub life: ProcessHistory,
    /// Its start, or the exec before which it cannot have used that GPU.
    pub begun: BootNs,
    /// Which of its stays the sample's span covers; at least one.
    pub covered: Range<usize>,
}

impl Candidate {
    pub fn stays(&self) -> &[Residency] {
        self.life.stays.get(self.covered.clone()).unwrap_or_default()
    }
}

impl ProcessHistory {
    /// What of it a sample of that span may mean. `seen`: when it had certainly been on the GPU first.
    ///
    /// The second part is true where another exec followed after the span, so that this image is out of question as well, if there is
    /// any other.
    fn candidate(self, from: BootNs, to: BootNs, seen: Option<BootNs>) -> Option<(Candidate, bool)> {
        if self.start > to || self.end.is_some_and(|end| end < from) {
            return None;
        }
        let supersedes = |exec: &&BootNs| seen.is_none_or(|seen| **exec < seen);
        let begun = self.execs.iter().filter(supersedes).rfind(|exec| **exec <= to).map_or(self.start, |exec| *exec);
        let superseded = self.execs.iter().any(|exec| *exec > to && supersedes(&exec));
        let after = from.max(begun);
        // The last stay includes the instant of the end.
        let over = |stay: &Residency| stay.to.is_some_and(|until| until <= after && Some(until) != self.end);
        let first = self.stays.iter().position(|stay| !over(stay))?;
        let last = self.stays.iter().rposition(|stay| stay.from <= to)?;
        let candidate = Candidate { life: self, begun, covered: first..last + 1 };
        (first <= last).then_some((candidate, superseded))
    }
}

/// The stays that runs stand for. The first reaches back to the start, unless it is a move out of a place nobody knows.
pub(super) fn stays(start: BootNs, end: Option<BootNs>, runs: &[ObservedInterval]) -> Vec<Residency> {
    let from = |i: usize, run: &ObservedInterval| match i.checked_sub(1).and_then(|before| runs.get(before)) {
        _ if run.exact => run.first,
        Some(before) => before.last,
        None => start,
    };
    let stay = |(i, run): (usize, &ObservedInterval)| Residency {
        place: run.place,
        from: from(i, run),
        certain_from: if run.exact { from(i, run) } else { run.first },
        to: runs.get(i + 1).map(|next| next.first).or(end),
    };
    runs.iter().enumerate().map(stay).collect()
}

/// Where a process was before, and its execs before the last one. Most have neither.
#[derive(Clone, Debug, Default)]
struct History {
    runs: Vec<ObservedInterval>,
    execs: Vec<BootNs>,
}

impl History {
    fn bytes(&self) -> usize {
        let (runs, execs) = (self.runs.capacity() * size_of::<ObservedInterval>(), self.execs.capacity() * size_of::<BootNs>());
        size_of::<Self>() + runs + execs
    }
}

#[derive(Clone, Debug)]
struct ProcessRecord {
    start: BootNs,
    now: ObservedInterval,
    /// The last that is known; 0 for none.
    exec: BootNs,
    past: Option<Box<History>>,
    generation: u32,
    coarse: bool,
}

impl ProcessRecord {
    fn is(&self, start: BootNs, coarse: bool) -> bool {
        same(self.start, self.coarse, start, coarse)
    }

    fn add(&mut self, run: ObservedInterval) {
        let now = &mut self.now;
        if now.place == run.place {
            now.last = now.last.max(run.last);
            return;
        }
        let before = &mut self.past.get_or_insert_default().runs;
        if run.first >= now.last {
            before.push(*now);
            *now = run;
        } else if now.first < run.first {
            // Out of order by the time between two processors' clocks.
            before.extend([ObservedInterval { last: now.first, ..*now }, run]);
            (now.first, now.exact) = (now.last, false);
        } else {
            let at = before.partition_point(|b| b.first <= run.first);
            before.insert(at, run);
        }
        while before.len() >= MAX_INTERVALS {
            before.remove(0);
        }
    }

    /// True when it contradicts what was known: an event must have been lost.
    fn look(&mut self, place: CgroupMembership, began: BootNs) -> bool {
        let news = self.now.last < began && self.now.place != place;
        if self.now.last < began {
            self.add(looked(place, began));
        }
        news
    }

    /// The child's place was read at the event, so what looks had shown until then was the parent's or nobody's.
    fn forked(&mut self, run: ObservedInterval) {
        if self.now.last <= run.last {
            (self.now, self.past) = (run, None);
        } else {
            self.add(run);
        }
    }

    fn execed(&mut self, at: BootNs) {
        let last = self.exec;
        self.exec = last.max(at);
        if last == BootNs(0) || last == at {
            return;
        }
        let execs = &mut self.past.get_or_insert_default().execs;
        // Out of order by the time between two processors' clocks.
        let earlier = last.min(at);
        execs.insert(execs.partition_point(|exec| *exec < earlier), earlier);
        while execs.len() > MAX_EXECS {
            execs.remove(0);
        }
    }

    fn runs(&self) -> Vec<ObservedInterval> {
        let before = self.past.iter().flat_map(|past| past.runs.iter());
        before.chain([&self.now]).copied().collect()
    }

    fn execs(&self) -> Vec<BootNs> {
        let earlier = self.past.iter().flat_map(|past| past.execs.iter());
        earlier.chain([&self.exec]).copied().filter(|exec| *exec != BootNs(0)).collect()
    }
}

fn looked(place: CgroupMembership, began: BootNs) -> ObservedInterval {
    ObservedInterval { place, first: began, last: began, exact: false }
}

fn same(a: BootNs, a_coarse: bool, b: BootNs, b_coarse: bool) -> bool {
    if a_coarse || b_coarse { a.proc_tick() == b.proc_tick() } else { a == b }
}

#[derive(Debug, Default)]
pub struct Processes {
    living: Table<Tgid, ProcessRecord>,
    exited: Exited,
    generation: u32,
}

impl Processes {
    /// `keep` is asked about the places of a process that ends: true for one worth keeping when memory is short.
    pub fn apply(&mut self, fact: &ProcessFact, keep: impl Fn(&[ObservedInterval]) -> bool) {
        let forked = matches!(fact.change, ProcessChange::Fork { .. });
        let first = if forked { fact.start } else { fact.at };
        let exact = forked || fact.change == ProcessChange::Attach;
        let run = ObservedInterval { place: fact.place, first, last: fact.at.max(first), exact };
        let execed = fact.change == ProcessChange::Exec;
        let exec = if execed { fact.at } else { BootNs(0) };
        let life = ProcessRecord { start: fact.start, now: run, exec, past: None, generation: self.generation, coarse: false };
        match self.living.get_mut(&fact.tgid) {
            Some(known) if known.is(fact.start, false) => {
                (known.start, known.coarse) = (fact.start, false);
                if forked {
                    known.forked(run)
                } else {
                    known.add(run)
                }
                if execed {
                    known.execed(fact.at);
                }
            }
            known => {
                // One that was taken for dead and is not lives on.
                if self.exited.has(fact.tgid, |start, by| start == fact.start && by == EndedBy::Event) {
                    return;
                }
                let successor = known.map(|known| known.start).filter(|start| *start > fact.start);
                if let Some(successor) = successor {
                    // Its end is all that can still be told.
                    if fact.change == ProcessChange::Exit {
                        self.retire(fact.tgid, &life, fact.at.min(successor), EndedBy::Event, &keep);
                    }
                    return;
                }
                // The kernel gives a pid to one process at a time: who had it has ended unseen.
                if let Some(before) = self.living.insert(fact.tgid, life) {
                    self.retire(fact.tgid, &before, fact.start, EndedBy::Inference, &keep);
                }
            }
        }
        if fact.change == ProcessChange::Exit {
            self.end(fact.tgid, fact.at, EndedBy::Event, &keep);
        }
    }

    /// What a look at a process showed. True when it contradicts the table, so an event must have been lost.
    pub fn seen(&mut self, seen: &ProcessSeen, keep: impl Fn(&[ObservedInterval]) -> bool) -> bool {
        let generation = self.generation;
        if let Some(life) = self.living.get_mut(&seen.tgid) {
            if life.is(seen.start, seen.coarse_start) {
                life.generation = generation;
                return seen.place.is_some_and(|place| life.look(place, seen.began));
            }
            // It has been followed by another since it was looked at.
            if life.start > seen.start {
                return false;
            }
            self.end(seen.tgid, seen.start, EndedBy::Inference, &keep);
        }
        // Not fully gone, but its end was told.
        let same = |start| same(start, false, seen.start, seen.coarse_start);
        if self.exited.has(seen.tgid, |start, by| same(start) && by == EndedBy::Event) {
            return false;
        }
        let Some(place) = seen.place else { return false };
        let now = looked(place, seen.began);
        let (start, exec, coarse) = (seen.start, BootNs(0), seen.coarse_start);
        self.living.insert(seen.tgid, ProcessRecord { start, now, exec, past: None, generation, coarse });
        true
    }

    /// A look that began then found nobody with that pid.
    pub fn not_found(&mut self, tgid: Tgid, began: BootNs, keep: impl Fn(&[ObservedInterval]) -> bool) {
        if self.living.get(&tgid).is_some_and(|life| life.now.last < began) {
            self.end(tgid, began, EndedBy::Inference, keep);
        }
    }

    /// From here on [`Processes::seen`] marks; [`Processes::sweep`] ends what stays unmarked.
    pub fn begin_scan(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Ends what the scan that began at `began` did not find and no event has spoken of since. Returns how many.
    pub fn sweep(&mut self, began: BootNs, keep: impl Fn(&[ObservedInterval]) -> bool) -> u64 {
        let stale = |life: &ProcessRecord| life.generation != self.generation && life.now.last < began;
        let gone: Vec<Tgid> = self.living.iter().filter(|(_, life)| stale(life)).map(|(tgid, _)| *tgid).collect();
        for tgid in &gone {
            self.end(*tgid, began, EndedBy::Inference, &keep);
        }
        gone.len() as u64
    }

    fn end(&mut self, tgid: Tgid, at: BootNs, by: EndedBy, keep: impl Fn(&[ObservedInterval]) -> bool) {
        if let Some(life) = self.living.remove(&tgid) {
            self.retire(tgid, &life, at, by, keep);
        }
    }

    fn retire(&mut self, tgid: Tgid, life: &ProcessRecord, at: BootNs, by: EndedBy, keep: impl Fn(&[ObservedInterval]) -> bool) {
        let (moved, again) = life.past.as_ref().map(|_| (life.runs(), life.execs())).unzip();
        let runs = moved.as_deref().unwrap_or(std::slice::from_ref(&life.now));
        let execs = again.as_deref().unwrap_or(std::slice::from_ref(&life.exec));
        self.exited.push(tgid, (life.start, at), runs, execs, by, keep(runs));
    }

    /// The lives that a GPU's sample of that span may mean, newest first. `seen` says when a life, by its start, had certainly been
    /// seen on that GPU first: an exec after that is no reason to leave out what was before it.
    ///
    /// A GPU context does not survive exec, and runtimes fork, move and then exec: so the image that is the last one counts before
    /// those that an exec has ended, also within the lives of a pid that was used again.
    pub fn candidates(&self, pid: Tgid, (from, to): (BootNs, BootNs), seen: impl Fn(BootNs) -> Option<BootNs>) -> Vec<Candidate> {
        let lives = self.lives(pid).into_iter();
        let all = lives.filter_map(|life| {
            let seen = seen(life.start);
            life.candidate(from, to, seen)
        });
        let (superseded, last): (Vec<_>, Vec<_>) = all.partition(|(_, superseded)| *superseded);
        let best = if last.is_empty() { superseded } else { last };
        best.into_iter().map(|(candidate, _)| candidate).collect()
    }

    /// Every known life of a pid, newest first.
    pub fn lives(&self, tgid: Tgid) -> Vec<ProcessHistory> {
        let mut found = Vec::new();
        if let Some(life) = self.living.get(&tgid) {
            let stays = stays(life.start, None, &life.runs());
            found.push(ProcessHistory { start: life.start, end: None, stays, execs: life.execs() });
        }
        self.exited.each(tgid, |start, end, runs, execs| {
            let stays = stays(start, Some(end), runs);
            found.push(ProcessHistory { start, end: Some(end), stays, execs });
        });
        found.sort_by_key(|life| std::cmp::Reverse(life.start));
        found
    }

    /// Living processes: pid, start, and where they are now.
    pub fn living(&self) -> impl Iterator<Item = (Tgid, BootNs, CgroupMembership)> {
        self.living.iter().map(|(tgid, life)| (*tgid, life.start, life.now.place))
    }

    /// When the process that has this pid now started.
    pub fn living_start(&self, tgid: Tgid) -> Option<BootNs> {
        self.living.get(&tgid).map(|life| life.start)
    }

    pub fn expire(&mut self, now: BootNs) {
        self.exited.expire(now);
    }

    pub fn size(&self) -> Size {
        let life = size_of::<(Tgid, ProcessRecord)>() + 1;
        let moves: usize = self.living.values().map(|life| life.past.as_ref().map_or(0, |past| past.bytes())).sum();
        Size {
            living: self.living.len(),
            exited: self.exited.len(),
            evicted: self.exited.evicted,
            living_bytes: super::exited::buckets(self.living.capacity()) * life + moves,
            exited_bytes: self.exited.bytes(),
        }
    }
}

/// What the table holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    pub living: usize,
    pub exited: usize,
    /// Exited processes given up before their time, since the start.
    pub evicted: u64,
    pub living_bytes: usize,
    pub exited_bytes: usize,
}
