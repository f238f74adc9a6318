//! Processes as intervals: where each (tgid, start time) was, and when.
//!
//! Promise: a lookup is answered as of the time asked about, also for a process that has exited, moved, or whose pid was
//! reused, for at least [`KEEP_EXITED_NS`] after its end. Not here: what a cgroup means.

use std::collections::{HashMap, VecDeque};

use crate::observation::{ProcessChange, ProcessFact};
use crate::units::{BootNs, CgroupKey, Tgid};

/// Three times NVML's ring of ~10 s, and a little.
pub const KEEP_EXITED_NS: u64 = 40_000_000_000;
/// More exited processes than this are dropped, oldest first, and counted.
pub const MAX_EXITED: usize = 200_000;
/// /proc start times are ticks of 10 ms.
const PROC_TICK_NS: u64 = 10_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub v2: CgroupKey,
    pub v1: Option<CgroupKey>,
}

#[derive(Clone, Debug)]
struct Life {
    start: BootNs,
    end: Option<BootNs>,
    /// `(since, place)`, oldest first; a place holds until the next one begins.
    places: Vec<(BootNs, Place)>,
    /// `start` is known only to 10 ms.
    coarse: bool,
}

impl Life {
    fn is(&self, start: BootNs, coarse: bool) -> bool {
        if self.coarse || coarse { self.start.0 / PROC_TICK_NS == start.0 / PROC_TICK_NS } else { self.start == start }
    }

    fn overlaps(&self, from: BootNs, to: BootNs) -> bool {
        self.start <= to && self.end.is_none_or(|end| end >= from)
    }

    /// A place recorded out of order must not hide a newer one.
    fn add_place(&mut self, since: BootNs, place: Place) {
        let at = self.places.partition_point(|(t, _)| *t <= since);
        if at > 0 && self.places[at - 1].1 == place {
            return;
        }
        self.places.insert(at, (since, place));
    }
}

/// Who had a pid in a span of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// No process with that pid is known for the time.
    Unknown,
    /// Every place that an owner of the pid had in the span, without doubles; one entry means certainty.
    Places(Vec<Place>),
}

#[derive(Debug, Default)]
pub struct Processes {
    lives: HashMap<Tgid, Vec<Life>>,
    exited: VecDeque<(BootNs, Tgid, BootNs)>,
    pub dropped_exited: u64,
}

impl Processes {
    pub fn apply(&mut self, fact: &ProcessFact) {
        let place = Place { v2: fact.v2, v1: fact.v1 };
        let lives = self.lives.entry(fact.tgid).or_default();
        let found = lives.iter().rposition(|l| l.is(fact.start, fact.coarse_start));
        let index = match found {
            Some(index) => index,
            None => {
                // The kernel gives a pid to one process at a time: an older life without an end has ended unseen.
                for life in lives.iter_mut().filter(|l| l.end.is_none() && l.start < fact.start) {
                    life.end = Some(fact.start);
                    self.exited.push_back((fact.start, fact.tgid, life.start));
                }
                let since = match fact.change {
                    ProcessChange::Fork { .. } => fact.start,
                    // Where it was before is not known; the first place seen is the best answer since its start.
                    _ => fact.start,
                };
                lives.push(Life { start: fact.start, end: None, places: vec![(since, place)], coarse: fact.coarse_start });
                lives.sort_by_key(|l| l.start);
                lives.iter().rposition(|l| l.is(fact.start, fact.coarse_start)).unwrap_or(0)
            }
        };
        let Some(life) = lives.get_mut(index) else { return };
        if life.coarse && !fact.coarse_start {
            life.start = fact.start;
            life.coarse = false;
        }
        match fact.change {
            ProcessChange::Exit => {
                if life.end.is_none() {
                    life.end = Some(fact.at);
                    self.exited.push_back((fact.at, fact.tgid, life.start));
                }
            }
            ProcessChange::Seen if life.end.is_some() => {}
            ProcessChange::Fork { .. } => life.add_place(life.start, place),
            ProcessChange::Seen if life.places.len() > 1 => {}
            _ => life.add_place(fact.at, place),
        }
    }

    pub fn owner(&self, pid: u32, from: BootNs, to: BootNs) -> Owner {
        let Some(lives) = self.lives.get(&Tgid(pid)) else { return Owner::Unknown };
        let mut places: Vec<Place> = Vec::new();
        for life in lives.iter().filter(|l| l.overlaps(from, to)) {
            for (i, (since, place)) in life.places.iter().enumerate() {
                let until = life.places.get(i + 1).map(|next| next.0);
                let begun = *since <= to || i == 0;
                if begun && until.is_none_or(|u| u > from) && !places.contains(place) {
                    places.push(*place);
                }
            }
        }
        if places.is_empty() { Owner::Unknown } else { Owner::Places(places) }
    }

    pub fn expire(&mut self, now: BootNs) {
        while let Some(&(ended, tgid, start)) = self.exited.front() {
            let over = self.exited.len() > MAX_EXITED;
            if !over && now.saturating_since(ended) < KEEP_EXITED_NS {
                break;
            }
            self.exited.pop_front();
            self.dropped_exited += u64::from(over);
            if let Some(lives) = self.lives.get_mut(&tgid) {
                lives.retain(|l| l.start != start || l.end.is_none());
                if lives.is_empty() {
                    self.lives.remove(&tgid);
                }
            }
        }
    }

    pub fn len(&self) -> usize {
        self.lives.values().map(Vec::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.lives.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn v2(id: u64) -> Place {
        Place { v2: CgroupKey { hierarchy: 0, id }, v1: None }
    }

    fn fact(change: ProcessChange, tgid: u32, start: u64, at: u64, place: Place) -> ProcessFact {
        ProcessFact {
            change,
            tgid: Tgid(tgid),
            start: BootNs(start),
            coarse_start: false,
            at: BootNs(at),
            v2: place.v2,
            v1: place.v1,
        }
    }

    fn check(facts: &[ProcessFact], pid: u32, from: u64, to: u64, expect: &[Place]) {
        let mut table = Processes::default();
        for f in facts {
            table.apply(f);
        }
        let want = if expect.is_empty() { Owner::Unknown } else { Owner::Places(expect.to_vec()) };
        assert_eq!(table.owner(pid, BootNs(from), BootNs(to)), want);
    }

    #[test]
    fn as_of_lookups() {
        let parent = Tgid(1);
        let fork = |tgid, start, place| fact(ProcessChange::Fork { parent }, tgid, start, start, place);
        let exit = |tgid, start, at, place| fact(ProcessChange::Exit, tgid, start, at, place);
        let reuse = [fork(7, 100, v2(1)), exit(7, 100, 200, v2(1)), fork(7, 300, v2(2))];
        check(&reuse, 7, 150, 160, &[v2(1)]);
        check(&reuse, 7, 310, 320, &[v2(2)]);
        check(&reuse, 7, 210, 290, &[]);
        check(&reuse, 7, 190, 310, &[v2(1), v2(2)]);
        check(&reuse, 8, 150, 160, &[]);
        let moved = [fork(9, 100, v2(1)), fact(ProcessChange::Attach, 9, 100, 500, v2(3))];
        check(&moved, 9, 200, 300, &[v2(1)]);
        check(&moved, 9, 600, 700, &[v2(3)]);
        check(&moved, 9, 400, 600, &[v2(1), v2(3)]);
        // An exit seen without its fork still says where it was.
        check(&[exit(5, 100, 200, v2(4))], 5, 120, 130, &[v2(4)]);
        // A fork whose predecessor's exit was lost ends it.
        check(&[fork(6, 100, v2(1)), fork(6, 400, v2(2))], 6, 450, 460, &[v2(2)]);
    }

    #[test]
    fn coarse_and_exact_starts_are_one_process() {
        let mut table = Processes::default();
        let mut seen = fact(ProcessChange::Seen, 3, 1_230_000_000, 2_000_000_000, v2(1));
        seen.coarse_start = true;
        table.apply(&seen);
        table.apply(&fact(ProcessChange::Exit, 3, 1_234_567_890, 3_000_000_000, v2(1)));
        assert_eq!(table.len(), 1);
        assert_eq!(table.owner(3, BootNs(3_500_000_000), BootNs(3_600_000_000)), Owner::Unknown);
        table.expire(BootNs(3_000_000_000 + KEEP_EXITED_NS));
        assert!(table.is_empty());
    }
}
