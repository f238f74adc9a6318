//! Rows for the tables, and generated histories: whatever the order of events, scans, losses and resyncs, the tables end up with
//! the truth, and without losses they answer for every instant of the past.

use std::collections::{BTreeMap, HashMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::observation::{CgroupChange, Place, ProcessChange};
use crate::units::{CgroupKey, Tgid};

const fn v2(id: u64) -> Place {
    Place { v2_id: id, v1_id: 0, v1_hierarchy: 0 }
}

fn fact(change: ProcessChange, tgid: u32, start: u64, at: u64, place: Place) -> ProcessFact {
    ProcessFact { change, tgid: Tgid(tgid), start: BootNs(start), at: BootNs(at), place }
}

fn fork(tgid: u32, start: u64, place: Place) -> ProcessFact {
    fact(ProcessChange::Fork { parent: Tgid(1) }, tgid, start, start, place)
}

fn seen(tgid: u32, start: u64, began: u64, ended: u64, place: Place) -> ProcessSeen {
    ProcessSeen { tgid: Tgid(tgid), start: BootNs(start), began: BootNs(began), ended: BootNs(ended), place }
}

fn yes(_: &[Run]) -> bool {
    true
}

fn check(table: &Processes, pid: u32, from: u64, to: u64, expect: &[Place]) {
    let want = if expect.is_empty() { Owner::Unknown } else { Owner::Places(expect.to_vec()) };
    assert_eq!(table.owner(pid, BootNs(from), BootNs(to)), want, "{pid} in {from}..{to}");
}

fn table(facts: &[ProcessFact]) -> Processes {
    let mut table = Processes::default();
    for fact in facts {
        table.apply(fact, yes);
    }
    table
}

#[test]
fn lookups_are_as_of_their_time() {
    use ProcessChange::{Attach, Exec, Exit};
    let reuse = table(&[fork(7, 100, v2(1)), fact(Exit, 7, 100, 200, v2(1)), fork(7, 300, v2(2))]);
    check(&reuse, 7, 150, 160, &[v2(1)]);
    check(&reuse, 7, 310, 320, &[v2(2)]);
    check(&reuse, 7, 210, 290, &[]);
    check(&reuse, 7, 190, 310, &[v2(2), v2(1)]);
    check(&reuse, 8, 150, 160, &[]);
    let moved = table(&[fork(9, 100, v2(1)), fact(Attach, 9, 100, 500, v2(3)), fact(Exec, 9, 100, 600, v2(3))]);
    check(&moved, 9, 200, 300, &[v2(1)]);
    check(&moved, 9, 550, 700, &[v2(3)]);
    check(&moved, 9, 400, 600, &[v2(1), v2(3)]);
    // An exit seen without its fork still says where it was; a move without its fork does not say where from.
    check(&table(&[fact(Exit, 5, 100, 200, v2(4))]), 5, 120, 130, &[v2(4)]);
    check(&table(&[fact(Attach, 5, 100, 200, v2(4))]), 5, 120, 130, &[]);
    check(&table(&[fact(Attach, 5, 100, 200, v2(4)), fact(Exit, 5, 100, 300, v2(4))]), 5, 120, 130, &[]);
    // A fork whose predecessor's exit was lost ends it. Doubled and late events change nothing.
    check(&table(&[fork(6, 100, v2(1)), fork(6, 400, v2(2))]), 6, 450, 460, &[v2(2)]);
    let doubled = table(&[fork(6, 100, v2(1)), fact(Exit, 6, 100, 200, v2(1)), fact(Exit, 6, 100, 220, v2(1))]);
    check(&doubled, 6, 210, 215, &[]);
    assert_eq!(doubled.lives(Tgid(6)).len(), 1);
}

#[test]
fn a_move_that_was_lost_is_answered_with_both_places() {
    let mut t = table(&[fork(7, 100, v2(1)), fact(ProcessChange::Exec, 7, 100, 200, v2(1))]);
    assert!(t.seen(&seen(7, 100, 1_000, 1_100, v2(2)), yes));
    check(&t, 7, 150, 160, &[v2(1)]);
    check(&t, 7, 500, 510, &[v2(1), v2(2)]);
    check(&t, 7, 1_000, 1_010, &[v2(2)]);
    assert!(!t.seen(&seen(7, 100, 2_000, 2_100, v2(2)), yes));
}

#[test]
fn an_event_beats_the_scan() {
    let mut t = table(&[fork(7, 100, v2(1))]);
    t.seen(&seen(7, 100, 1_000, 1_100, v2(1)), yes);
    t.apply(&fact(ProcessChange::Attach, 7, 100, 1_050, v2(2)), yes);
    check(&t, 7, 1_040, 1_040, &[v2(1)]);
    check(&t, 7, 1_060, 1_060, &[v2(2)]);
    // Looked at before the move whose event came first.
    assert!(!t.seen(&seen(7, 100, 1_000, 1_100, v2(1)), yes));
    check(&t, 7, 1_060, 1_060, &[v2(2)]);
    // Ended since it was looked at.
    t.apply(&fact(ProcessChange::Exit, 7, 100, 1_200, v2(2)), yes);
    assert!(!t.seen(&seen(7, 100, 1_150, 1_300, v2(2)), yes));
    assert_eq!(t.size().living, 0);
}

#[test]
fn start_times_of_proc_and_kernel_are_one_process() {
    let mut t = Processes::default();
    assert!(t.seen(&seen(3, 1_230_000_000, 2_000_000_000, 2_000_000_001, v2(1)), yes));
    t.apply(&fact(ProcessChange::Exit, 3, 1_234_567_890, 3_000_000_000, v2(1)), yes);
    assert_eq!((t.size().living, t.size().exited), (0, 1));
    check(&t, 3, 2_500_000_000, 2_500_000_000, &[v2(1)]);
    check(&t, 3, 3_500_000_000, 3_600_000_000, &[]);
    t.expire(BootNs(3_000_000_000 + KEEP_EXITED_NS));
    assert_eq!(t.size().exited, 0);
}

#[test]
fn exited_processes_stay_within_their_bytes_and_those_of_containers_stay_longest() {
    let mut t = Processes::default();
    let second = 1_000_000_000;
    let mut largest = 0;
    let in_container = |runs: &[Run]| runs.iter().any(|run| run.place == v2(2));
    // 10,000 exits a second for 60 s, every tenth in a container, one in a hundred moved there; pids go round.
    for n in 0..600_000u64 {
        let (pid, at) = (300 + (n % 32_000) as u32, second + n * second / 10_000);
        let place = v2(1 + u64::from(n % 10 == 0));
        t.apply(&fork(pid, at, place), in_container);
        if n % 100 == 1 {
            t.apply(&fact(ProcessChange::Attach, pid, at, at + 10, v2(2)), in_container);
        }
        t.apply(&fact(ProcessChange::Exit, pid, at, at + 1000, place), in_container);
        if n % 1000 == 0 {
            t.expire(BootNs(at));
            largest = largest.max(t.size().exited_bytes);
        }
    }
    let end = second + 60 * second;
    assert!(largest <= EXITED_BYTES, "{largest} bytes");
    assert!(largest > EXITED_BYTES / 2, "the bound was not reached: {largest} bytes");
    assert!(t.size().evicted > 0);
    // Of a container, 35 s ago: there. Not of a container, just as long ago: given up.
    let n = 600_000 - 350_000;
    let at = |n: u64| second + n * second / 10_000;
    check(&t, 300 + (n % 32_000) as u32, at(n), at(n) + 500, &[v2(2)]);
    check(&t, 300 + ((n + 5) % 32_000) as u32, at(n + 5), at(n + 5) + 500, &[]);
    // What is not needed is given back.
    t.expire(BootNs(end + KEEP_EXITED_NS + second));
    assert_eq!(t.size().exited, 0);
    assert!(t.size().exited_bytes < EXITED_BYTES / 64, "{} bytes", t.size().exited_bytes);
}

fn cgroup(change: CgroupChange, hierarchy: u32, id: u64, parent: u64, name: &str, at: u64) -> CgroupFact {
    let key = |id| CgroupKey { hierarchy, id };
    CgroupFact { change, key: key(id), parent: (parent != 0).then(|| key(parent)), name: name.into(), at: BootNs(at) }
}

#[test]
fn cgroup_paths_join_in_any_order_and_hierarchies_share_a_container() {
    use CgroupChange::{Created, Removed, Seen};
    let id = "a".repeat(64);
    let mut table = Cgroups::default();
    for f in [
        cgroup(Seen, 0, 1, 0, "", 1),
        cgroup(Seen, 8, 1, 0, "", 1),
        cgroup(Created, 8, 20, 10, &id, 20),
        cgroup(Created, 8, 10, 1, "docker", 10),
        cgroup(Created, 0, 30, 1, "docker", 30),
        cgroup(Created, 0, 31, 30, &id, 31),
        cgroup(Created, 0, 32, 31, "init.scope", 32),
    ] {
        table.apply(&f);
    }
    let at = |v2: u64, v1: u64| table.container_of(&Place { v2_id: v2, v1_id: v1, v1_hierarchy: 8 }, BootNs(50));
    let by_v1 = at(1, 20).expect("known");
    assert!(by_v1.is_some());
    assert_eq!(by_v1, at(32, 1).expect("known"));
    assert_eq!(at(1, 1), Ok(None));
    assert_eq!(at(77, 78), Err(UnknownCgroup));
    assert_eq!(table.path(CgroupKey { hierarchy: 0, id: 32 }), Some(format!("/docker/{id}/init.scope")));
    let appeared = table.take_changes();
    assert!(
        matches!(&appeared[..], [ContainerChange::Appeared(r)] if r.creation_seen && r.created == BootNs(20)),
        "{appeared:?}"
    );
    table.apply(&cgroup(Removed, 8, 20, 10, &id, 99));
    table.apply(&cgroup(Removed, 0, 31, 30, &id, 99));
    assert!(matches!(table.take_changes()[..], [ContainerChange::Gone(_, BootNs(99))]));
    assert!(table.container_of(&v2(32), BootNs(50)).is_ok_and(|c| c.is_some()));
    // A removal that comes before the scan's word about it.
    table.apply(&cgroup(Removed, 0, 40, 30, &"b".repeat(64), 100));
    assert!(!table.apply(&cgroup(Seen, 0, 40, 30, &"b".repeat(64), 90)));
    assert!(!table.living().any(|(key, _)| key.id == 40));
}

#[test]
fn a_renamed_cgroup_is_told_as_of_the_time() {
    use CgroupChange::{Created, Renamed, Seen};
    let (a, b) = ("a".repeat(64), "b".repeat(64));
    let mut table = Cgroups::default();
    for f in [cgroup(Seen, 8, 1, 0, "", 1), cgroup(Created, 8, 2, 1, "docker", 2), cgroup(Created, 8, 3, 2, &a, 3)] {
        table.apply(&f);
    }
    table.apply(&cgroup(Created, 8, 4, 3, "sub", 4));
    table.apply(&cgroup(Renamed, 8, 3, 2, &b, 100));
    let place = Place { v2_id: 0, v1_id: 4, v1_hierarchy: 8 };
    let id = |at| {
        let key = table.container_of(&place, BootNs(at)).ok()??;
        table.container(key)?.record.identity.container_id.clone()
    };
    assert_eq!((id(50), id(150)), (Some(a), Some(b)));
}

#[test]
fn a_thousand_nested_cgroups_and_a_path_of_4000_characters() {
    let mut table = Cgroups::default();
    table.apply(&cgroup(CgroupChange::Seen, 0, 1, 0, "", 1));
    table.apply(&cgroup(CgroupChange::Created, 0, 2, 1, &"a".repeat(64), 2));
    table.apply(&cgroup(CgroupChange::Created, 0, 3, 1, &format!("docker-{}.scope", "c".repeat(64)), 2));
    for n in 4..1004 {
        table.apply(&cgroup(CgroupChange::Created, 0, n, n - 1, "xyz", n));
    }
    let path = table.path(CgroupKey { hierarchy: 0, id: 1003 }).expect("joined");
    assert!(path.len() > 4000, "{}", path.len());
    assert!(table.container_of(&v2(1003), BootNs(2000)).is_ok_and(|c| c.is_some()));
    assert_eq!(table.containers().count(), 2);
}

// --- generated histories -----------------------------------------------------------------------------------------------------

/// What a kernel does next; indices are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    Mkdir {
        parent: usize,
    },
    Rmdir {
        which: usize,
    },
    Rename {
        which: usize,
    },
    Fork {
        pid: usize,
        place: usize,
    },
    Attach {
        which: usize,
        place: usize,
    },
    Exec {
        which: usize,
    },
    Exit {
        which: usize,
    },
    /// The agent drains this many events of one ring.
    DrainCgroups {
        n: usize,
    },
    DrainProcesses {
        n: usize,
    },
    /// The ring is full for the next events.
    Lose {
        n: usize,
    },
    ScanBegins,
    /// The scan looks at this many more cgroups or processes.
    Look {
        n: usize,
    },
    /// The rings are drained, then the scan's findings are merged.
    ScanMerges,
}

fn step(losses: bool) -> impl Strategy<Value = Step> {
    let n = 0..64usize;
    prop_oneof![
        3 => n.clone().prop_map(|parent| Step::Mkdir { parent }),
        1 => n.clone().prop_map(|which| Step::Rmdir { which }),
        1 => n.clone().prop_map(|which| Step::Rename { which }),
        6 => (n.clone(), n.clone()).prop_map(|(pid, place)| Step::Fork { pid, place }),
        3 => (n.clone(), n.clone()).prop_map(|(which, place)| Step::Attach { which, place }),
        2 => n.clone().prop_map(|which| Step::Exec { which }),
        5 => n.clone().prop_map(|which| Step::Exit { which }),
        3 => (1..6usize).prop_map(|n| Step::DrainCgroups { n }),
        3 => (1..6usize).prop_map(|n| Step::DrainProcesses { n }),
        1 => (1..5usize).prop_map(move |n| Step::Lose { n: if losses { n } else { 0 } }),
        1 => Just(Step::ScanBegins),
        4 => (1..8usize).prop_map(|n| Step::Look { n }),
        1 => Just(Step::ScanMerges),
    ]
}

#[derive(Clone, Debug)]
struct True {
    start: u64,
    end: Option<u64>,
    stays: Vec<(u64, u64)>,
}

#[derive(Default)]
struct Scan {
    began: u64,
    cgroups: VecDeque<u64>,
    pids: VecDeque<u32>,
    found: Vec<Observed>,
}

#[derive(Clone)]
enum Observed {
    Cgroup(CgroupFact),
    Process(ProcessSeen),
}

/// A kernel with its rings, an agent with its tables.
#[derive(Default)]
struct World {
    now: u64,
    /// id -> (parent, name).
    cgroups: BTreeMap<u64, (u64, String)>,
    next_id: u64,
    lives: HashMap<u32, Vec<True>>,
    cgroup_ring: VecDeque<CgroupFact>,
    process_ring: VecDeque<ProcessFact>,
    lose: usize,
    scan: Option<Scan>,
    agent: Identity,
    /// From here on the tables answer for the past.
    known_from: Option<u64>,
}

const PIDS: usize = 5;

impl World {
    fn new() -> Self {
        let mut world = World { now: 10_000_000_000, next_id: 2, ..World::default() };
        world.cgroups.insert(1, (0, String::new()));
        world
    }

    fn alive(&self) -> Vec<u32> {
        let mut pids: Vec<u32> =
            self.lives.iter().filter(|(_, l)| l.last().is_some_and(|l| l.end.is_none())).map(|(pid, _)| *pid).collect();
        pids.sort_unstable();
        pids
    }

    fn place(&self, pid: u32) -> u64 {
        self.lives[&pid].last().unwrap().stays.last().unwrap().1
    }

    fn tell_cgroup(&mut self, change: CgroupChange, id: u64) {
        let (parent, name) = self.cgroups[&id].clone();
        if self.lose > 0 {
            self.lose -= 1;
        } else {
            self.cgroup_ring.push_back(cgroup(change, 0, id, parent, &name, self.now));
        }
    }

    fn tell(&mut self, change: ProcessChange, pid: u32) {
        let start = self.lives[&pid].last().unwrap().start;
        let place = v2(self.place(pid));
        if self.lose > 0 {
            self.lose -= 1;
        } else {
            self.process_ring.push_back(fact(change, pid, start, self.now, place));
        }
    }

    fn pick<T: Copy>(list: &[T], index: usize) -> Option<T> {
        (!list.is_empty()).then(|| list[index % list.len()])
    }

    fn drain_cgroups(&mut self, n: usize) {
        for _ in 0..n {
            let Some(fact) = self.cgroup_ring.pop_front() else { return };
            self.agent.cgroup(&fact);
        }
    }

    fn drain_processes(&mut self, n: usize) {
        for _ in 0..n {
            let Some(fact) = self.process_ring.pop_front() else { return };
            self.agent.process(&fact);
        }
    }

    fn look(&mut self, n: usize) {
        for _ in 0..n {
            let Some(scan) = &mut self.scan else { return };
            if let Some(id) = scan.cgroups.pop_front() {
                if let Some((parent, name)) = self.cgroups.get(&id) {
                    scan.found.push(Observed::Cgroup(cgroup(CgroupChange::Seen, 0, id, *parent, name, scan.began)));
                }
                continue;
            }
            let Some(pid) = scan.pids.pop_front() else { return };
            if let Some(life) = self.lives.get(&pid).and_then(|l| l.last()).filter(|l| l.end.is_none()) {
                let place = v2(life.stays.last().unwrap().1);
                let start = life.start / 10_000_000 * 10_000_000;
                scan.found.push(Observed::Process(seen(pid, start, self.now - 1, self.now + 1, place)));
            }
        }
    }

    fn merge(&mut self) {
        self.look(usize::MAX);
        let Some(scan) = self.scan.take() else { return };
        self.drain_cgroups(usize::MAX);
        self.drain_processes(usize::MAX);
        self.agent.scan_began();
        for found in &scan.found {
            match found {
                Observed::Cgroup(fact) => self.agent.cgroup(fact),
                Observed::Process(seen) => self.agent.process_seen(seen),
            }
        }
        let (began, ended) = (BootNs(scan.began), BootNs(self.now));
        let end = ScanEnd { began, ended, all_cgroups: true, all_processes: true, repairs_since: None };
        self.agent.scan_ended(&end);
        self.known_from.get_or_insert(self.now);
    }

    fn begin_scan(&mut self) {
        if self.scan.is_none() {
            let cgroups = self.cgroups.keys().copied().collect();
            let pids = (0..PIDS as u32).map(|n| 100 + n).collect();
            self.scan = Some(Scan { began: self.now, cgroups, pids, found: Vec::new() });
        }
    }

    fn step(&mut self, step: &Step) {
        // Several steps to a tick of /proc.
        self.now += 3_000_000;
        let cgroups: Vec<u64> = self.cgroups.keys().copied().collect();
        let alive = self.alive();
        match step {
            Step::Mkdir { parent } => {
                let parent = cgroups[parent % cgroups.len()];
                let id = self.next_id;
                self.next_id += 1;
                let name = if id.is_multiple_of(2) { format!("{id:064x}") } else { format!("group-{id}") };
                self.cgroups.insert(id, (parent, name));
                self.tell_cgroup(CgroupChange::Created, id);
            }
            Step::Rmdir { which } => {
                let used = |id: &u64| {
                    self.cgroups.values().any(|(parent, _)| parent == id) || alive.iter().any(|pid| self.place(*pid) == *id)
                };
                let free: Vec<u64> = cgroups.iter().copied().filter(|id| *id != 1 && !used(id)).collect();
                if let Some(id) = Self::pick(&free, *which) {
                    self.tell_cgroup(CgroupChange::Removed, id);
                    self.cgroups.remove(&id);
                }
            }
            Step::Rename { which } => {
                let id = cgroups[which % cgroups.len()];
                if id != 1 {
                    let now = self.now;
                    self.cgroups.get_mut(&id).unwrap().1 = format!("{:064x}", now);
                    self.tell_cgroup(CgroupChange::Renamed, id);
                }
            }
            Step::Fork { pid, place } => {
                let pid = 100 + (pid % PIDS) as u32;
                if !alive.contains(&pid) {
                    let life = True { start: self.now, end: None, stays: vec![(self.now, cgroups[place % cgroups.len()])] };
                    self.lives.entry(pid).or_default().push(life);
                    self.tell(ProcessChange::Fork { parent: Tgid(1) }, pid);
                }
            }
            Step::Attach { which, place } => {
                if let Some(pid) = Self::pick(&alive, *which) {
                    let stay = (self.now, cgroups[place % cgroups.len()]);
                    self.lives.get_mut(&pid).unwrap().last_mut().unwrap().stays.push(stay);
                    self.tell(ProcessChange::Attach, pid);
                }
            }
            Step::Exec { which } => {
                if let Some(pid) = Self::pick(&alive, *which) {
                    self.tell(ProcessChange::Exec, pid);
                }
            }
            Step::Exit { which } => {
                if let Some(pid) = Self::pick(&alive, *which) {
                    self.tell(ProcessChange::Exit, pid);
                    self.lives.get_mut(&pid).unwrap().last_mut().unwrap().end = Some(self.now);
                }
            }
            Step::DrainCgroups { n } => self.drain_cgroups(*n),
            Step::DrainProcesses { n } => self.drain_processes(*n),
            Step::Lose { n } => self.lose = *n,
            Step::ScanBegins => self.begin_scan(),
            Step::Look { n } => self.look(*n),
            Step::ScanMerges => self.merge(),
        }
    }

    /// All is quiet, nothing is lost any more, one whole scan.
    fn resync(&mut self) {
        self.lose = 0;
        self.merge();
        self.now += 20_000_000;
        self.begin_scan();
        self.now += 20_000_000;
        self.merge();
    }

    fn equals_a_fresh_scan(&self) -> Result<(), TestCaseError> {
        let mut got: Vec<(u32, u64)> = self.agent.processes.living().map(|(t, _, _, place)| (t.0, place.v2_id)).collect();
        got.sort_unstable();
        let want: Vec<(u32, u64)> = self.alive().into_iter().map(|pid| (pid, self.place(pid))).collect();
        prop_assert_eq!(got, want);
        let mut got: Vec<(u64, String)> = self.agent.cgroups.living().map(|(key, name)| (key.id, name.to_owned())).collect();
        got.sort_unstable();
        let want: Vec<(u64, String)> = self.cgroups.iter().map(|(id, (_, name))| (*id, name.clone())).collect();
        prop_assert_eq!(got, want);
        for pid in self.alive() {
            let key = CgroupKey { hierarchy: 0, id: self.place(pid) };
            let mut want = Vec::new();
            let mut at = key.id;
            while let Some((parent, name)) = self.cgroups.get(&at).filter(|(parent, _)| *parent != 0) {
                want.insert(0, name.clone());
                at = *parent;
            }
            prop_assert_eq!(self.agent.cgroups.path(key), Some(format!("/{}", want.join("/"))));
        }
        Ok(())
    }

    /// Every instant since the first scan was merged, for processes of then and later.
    fn tells_the_past(&self) -> Result<(), TestCaseError> {
        let from = self.known_from.unwrap_or(self.now);
        let mut at = from;
        while at < self.now {
            for pid in (0..PIDS as u32).map(|n| 100 + n) {
                let lives = self.lives.get(&pid).map_or(&[][..], |l| l);
                let life = lives.iter().find(|l| l.start <= at && l.end.is_none_or(|end| at <= end));
                let want = life.map(|l| l.stays.iter().rev().find(|(since, _)| *since <= at).unwrap().1);
                let got = match self.agent.processes.owner(pid, BootNs(at), BootNs(at)) {
                    Owner::Unknown => None,
                    Owner::Places(places) => {
                        prop_assert_eq!(places.len(), 1, "{} at {}: {:?}", pid, at, self.agent.processes.lives(Tgid(pid)));
                        Some(places[0].v2_id)
                    }
                };
                prop_assert_eq!(got, want, "{} at {}: {:?}", pid, at, self.agent.processes.lives(Tgid(pid)));
            }
            at += 1_000_000;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn without_losses_every_order_tells_the_whole_past(steps in proptest::collection::vec(step(false), 1..120)) {
        // The agent attaches first: no event is older than it. Then it scans.
        let mut world = World::new();
        for step in &steps {
            world.step(step);
        }
        world.resync();
        world.equals_a_fresh_scan()?;
        world.tells_the_past()?;
    }

    #[test]
    fn processes_from_before_the_agent_are_found(
        before in proptest::collection::vec(step(false), 1..60),
        steps in proptest::collection::vec(step(false), 1..60),
    ) {
        let mut world = World::new();
        for step in before.iter().filter(|s| !matches!(s, Step::ScanBegins)) {
            world.step(step);
        }
        // Nobody listened so far.
        world.cgroup_ring.clear();
        world.process_ring.clear();
        world.agent = Identity::default();
        world.known_from = None;
        world.begin_scan();
        for step in &steps {
            world.step(step);
        }
        world.resync();
        world.equals_a_fresh_scan()?;
        world.tells_the_past()?;
    }

    #[test]
    fn with_losses_a_resync_leads_back_to_the_truth(steps in proptest::collection::vec(step(true), 1..160)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
        }
        world.resync();
        world.equals_a_fresh_scan()?;
    }
}
