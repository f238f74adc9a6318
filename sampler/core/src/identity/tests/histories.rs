//! Generated histories: after any order of events, scans, losses and resyncs the tables end with the true state, and without losses
//! lookups are correct for every instant of the past.

use std::collections::{BTreeMap, HashMap, VecDeque};

use proptest::prelude::*;

use super::*;

/// The next step of the simulated kernel or agent; indices are taken modulo the number of items.
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
        cgroup: usize,
    },
    Attach {
        which: usize,
        cgroup: usize,
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
    /// The scan reads this many more cgroups or processes.
    Scan {
        n: usize,
    },
    /// The rings are drained, then the findings of the scan are applied.
    ScanMerges,
}

fn step(losses: bool) -> impl Strategy<Value = Step> {
    let n = 0..64usize;
    prop_oneof![
        3 => n.clone().prop_map(|parent| Step::Mkdir { parent }),
        1 => n.clone().prop_map(|which| Step::Rmdir { which }),
        1 => n.clone().prop_map(|which| Step::Rename { which }),
        6 => (n.clone(), n.clone()).prop_map(|(pid, cgroup)| Step::Fork { pid, cgroup }),
        3 => (n.clone(), n.clone()).prop_map(|(which, cgroup)| Step::Attach { which, cgroup }),
        2 => n.clone().prop_map(|which| Step::Exec { which }),
        5 => n.clone().prop_map(|which| Step::Exit { which }),
        3 => (1..6usize).prop_map(|n| Step::DrainCgroups { n }),
        3 => (1..6usize).prop_map(|n| Step::DrainProcesses { n }),
        1 => (1..5usize).prop_map(move |n| Step::Lose { n: if losses { n } else { 0 } }),
        1 => Just(Step::ScanBegins),
        4 => (1..8usize).prop_map(|n| Step::Scan { n }),
        1 => Just(Step::ScanMerges),
    ]
}

/// The true history of a process.
#[derive(Clone, Debug)]
struct TrueHistory {
    start: u64,
    end: Option<u64>,
    residencies: Vec<(u64, u64)>,
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
struct HistoryWorld {
    now: u64,
    /// id -> (parent, name).
    cgroups: BTreeMap<u64, (u64, String)>,
    next_id: u64,
    histories: HashMap<u32, Vec<TrueHistory>>,
    cgroup_ring: VecDeque<CgroupFact>,
    process_ring: VecDeque<ProcessFact>,
    lose: usize,
    scan: Option<Scan>,
    agent: Identity,
    /// A process that is visible before its fork event.
    forking: Option<u32>,
    /// From this time on, lookups in the past are correct.
    known_from: Option<u64>,
}

const PIDS: usize = 5;

impl HistoryWorld {
    fn new() -> Self {
        let mut world = HistoryWorld { now: 10_000_000_000, next_id: 2, ..HistoryWorld::default() };
        world.cgroups.insert(1, (0, String::new()));
        world
    }

    fn alive(&self) -> Vec<u32> {
        let mut pids: Vec<u32> =
            self.histories.iter().filter(|(_, l)| l.last().is_some_and(|l| l.end.is_none())).map(|(pid, _)| *pid).collect();
        pids.sort_unstable();
        pids
    }

    fn cgroup_of(&self, pid: u32) -> u64 {
        self.histories[&pid].last().unwrap().residencies.last().unwrap().1
    }

    fn report_cgroup(&mut self, change: CgroupChange, id: u64) {
        let (parent, name) = self.cgroups[&id].clone();
        if self.lose > 0 {
            self.lose -= 1;
        } else {
            self.cgroup_ring.push_back(cgroup(change, 0, id, parent, &name, self.now));
        }
    }

    fn report(&mut self, change: ProcessChange, pid: u32) {
        let start = self.histories[&pid].last().unwrap().start;
        let membership = v2(self.cgroup_of(pid));
        if self.lose > 0 {
            self.lose -= 1;
        } else {
            self.process_ring.push_back(fact(change, pid, start, self.now, membership));
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

    fn scan_next(&mut self, n: usize) {
        for _ in 0..n {
            let Some(scan) = &mut self.scan else { return };
            if let Some(id) = scan.cgroups.pop_front() {
                if let Some((parent, name)) = self.cgroups.get(&id) {
                    scan.found.push(Observed::Cgroup(cgroup(CgroupChange::Seen, 0, id, *parent, name, scan.began)));
                }
                continue;
            }
            let Some(pid) = scan.pids.pop_front() else { return };
            if let Some(history) = self.histories.get(&pid).and_then(|l| l.last()).filter(|l| l.end.is_none()) {
                // Until it is in its cgroup, it shows the root cgroup.
                let membership = v2(if self.forking == Some(pid) { 1 } else { history.residencies.last().unwrap().1 });
                let start = history.start / 10_000_000 * 10_000_000;
                scan.found.push(Observed::Process(seen(pid, start, self.now - 1, membership)));
            }
        }
    }

    fn merge(&mut self) {
        self.scan_next(usize::MAX);
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
        // Several steps for each clock tick of /proc.
        self.now += 3_000_000;
        if !matches!(step, Step::Scan { .. } | Step::ScanBegins | Step::ScanMerges) {
            self.report_fork();
        }
        let cgroups: Vec<u64> = self.cgroups.keys().copied().collect();
        let alive = self.alive();
        match step {
            Step::Mkdir { parent } => {
                let parent = cgroups[parent % cgroups.len()];
                let id = self.next_id;
                self.next_id += 1;
                let name = if id.is_multiple_of(2) { format!("{id:064x}") } else { format!("group-{id}") };
                self.cgroups.insert(id, (parent, name));
                self.report_cgroup(CgroupChange::Created, id);
            }
            Step::Rmdir { which } => {
                let used = |id: &u64| {
                    self.cgroups.values().any(|(parent, _)| parent == id) || alive.iter().any(|pid| self.cgroup_of(*pid) == *id)
                };
                let free: Vec<u64> = cgroups.iter().copied().filter(|id| *id != 1 && !used(id)).collect();
                if let Some(id) = Self::pick(&free, *which) {
                    self.report_cgroup(CgroupChange::Removed, id);
                    self.cgroups.remove(&id);
                }
            }
            Step::Rename { which } => {
                let id = cgroups[which % cgroups.len()];
                if id != 1 {
                    let now = self.now;
                    self.cgroups.get_mut(&id).unwrap().1 = format!("{:064x}", now);
                    self.report_cgroup(CgroupChange::Renamed, id);
                }
            }
            Step::Fork { pid, cgroup } => {
                let pid = 100 + (pid % PIDS) as u32;
                if !alive.contains(&pid) {
                    let history = TrueHistory {
                        start: self.now,
                        end: None,
                        residencies: vec![(self.now, cgroups[cgroup % cgroups.len()])],
                    };
                    self.histories.entry(pid).or_default().push(history);
                    self.forking = Some(pid);
                }
            }
            Step::Attach { which, cgroup } => {
                if let Some(pid) = Self::pick(&alive, *which) {
                    let residency = (self.now, cgroups[cgroup % cgroups.len()]);
                    self.histories.get_mut(&pid).unwrap().last_mut().unwrap().residencies.push(residency);
                    self.report(ProcessChange::Attach, pid);
                }
            }
            Step::Exec { which } => {
                if let Some(pid) = Self::pick(&alive, *which) {
                    self.report(ProcessChange::Exec, pid);
                }
            }
            Step::Exit { which } => {
                if let Some(pid) = Self::pick(&alive, *which) {
                    self.report(ProcessChange::Exit, pid);
                    self.histories.get_mut(&pid).unwrap().last_mut().unwrap().end = Some(self.now);
                }
            }
            Step::DrainCgroups { n } => self.drain_cgroups(*n),
            Step::DrainProcesses { n } => self.drain_processes(*n),
            Step::Lose { n } => self.lose = *n,
            Step::ScanBegins => self.begin_scan(),
            Step::Scan { n } => self.scan_next(*n),
            Step::ScanMerges => self.merge(),
        }
    }

    fn report_fork(&mut self) {
        if let Some(pid) = self.forking.take() {
            self.report(ProcessChange::Fork { parent: Tgid(1) }, pid);
        }
    }

    /// No more steps and losses, then one complete scan.
    fn resync(&mut self) {
        self.report_fork();
        self.lose = 0;
        self.merge();
        self.now += 20_000_000;
        self.begin_scan();
        self.now += 20_000_000;
        self.merge();
    }

    /// After any steps, one undisturbed scan leads to the same state as a fresh agent's scan.
    fn run_and_check(&mut self, steps: &[Step]) -> Result<(), TestCaseError> {
        for step in steps {
            self.step(step);
        }
        self.resync();
        self.check_equals_a_fresh_scan()
    }

    fn check_equals_a_fresh_scan(&self) -> Result<(), TestCaseError> {
        let mut got: Vec<(u32, u64)> = self.agent.processes.living().map(|(t, _, membership)| (t.0, membership.v2_id)).collect();
        got.sort_unstable();
        let want: Vec<(u32, u64)> = self.alive().into_iter().map(|pid| (pid, self.cgroup_of(pid))).collect();
        prop_assert_eq!(got, want);
        let mut got: Vec<(u64, String)> = self.agent.cgroups.living().map(|(key, name)| (key.id, name.to_owned())).collect();
        got.sort_unstable();
        let want: Vec<(u64, String)> = self.cgroups.iter().map(|(id, (_, name))| (*id, name.clone())).collect();
        prop_assert_eq!(got, want);
        self.check_containers_equal_a_fresh_scan()?;
        for pid in self.alive() {
            let key = CgroupKey { hierarchy: 0, id: self.cgroup_of(pid) };
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

    fn check_containers_equal_a_fresh_scan(&self) -> Result<(), TestCaseError> {
        let mut fresh = Identity::default();
        for (id, (parent, name)) in &self.cgroups {
            fresh.cgroup(&cgroup(CgroupChange::Seen, 0, *id, *parent, name, self.now));
        }
        let living = |identity: &Identity| {
            let mut ids: Vec<_> = identity
                .cgroups
                .containers()
                .filter(|c| c.gone.is_none())
                .map(|c| (c.record.identity.outer_container_id.clone(), c.record.identity.container_id.clone()))
                .collect();
            ids.sort();
            ids
        };
        prop_assert_eq!(living(&self.agent), living(&fresh));
        for id in self.cgroups.keys() {
            let container_id = |identity: &Identity| {
                let container = identity.cgroups.container_of(&v2(*id), BootNs(self.now)).expect("placed")?;
                identity.cgroups.container(container)?.record.identity.container_id.clone()
            };
            prop_assert_eq!(container_id(&self.agent), container_id(&fresh));
        }
        Ok(())
    }

    /// Checks lookups at every instant since the first scan was merged.
    fn check_the_past(&self) -> Result<(), TestCaseError> {
        let from = self.known_from.unwrap_or(self.now);
        let mut at = from;
        while at < self.now {
            for pid in (0..PIDS as u32).map(|n| 100 + n) {
                let histories = self.histories.get(&pid).map_or(&[][..], |l| l);
                let history = histories.iter().find(|l| l.start <= at && l.end.is_none_or(|end| at <= end));
                let want = history.map(|l| l.residencies.iter().rev().find(|(since, _)| *since <= at).unwrap().1);
                let memberships = memberships(&self.agent.processes, pid, at, at);
                prop_assert!(memberships.len() <= 1, "{} at {}: {:?}", pid, at, self.agent.processes.histories(Tgid(pid)));
                let got = memberships.first().map(|membership| membership.v2_id);
                prop_assert_eq!(got, want, "{} at {}: {:?}", pid, at, self.agent.processes.histories(Tgid(pid)));
            }
            at += 1_000_000;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn without_losses_the_whole_past_is_correct_in_any_order(steps in proptest::collection::vec(step(false), 1..120)) {
        // The agent attaches before any event, then it scans.
        let mut world = HistoryWorld::new();
        world.run_and_check(&steps)?;
        world.check_the_past()?;
    }

    #[test]
    fn processes_from_before_the_agent_are_found(
        before in proptest::collection::vec(step(false), 1..60),
        steps in proptest::collection::vec(step(false), 1..60),
    ) {
        let mut world = HistoryWorld::new();
        for step in before.iter().filter(|s| !matches!(s, Step::ScanBegins)) {
            world.step(step);
        }
        // No agent was running so far.
        world.report_fork();
        world.cgroup_ring.clear();
        world.process_ring.clear();
        world.agent = Identity::default();
        world.known_from = None;
        world.begin_scan();
        world.run_and_check(&steps)?;
        world.check_the_past()?;
    }

    #[test]
    fn with_losses_a_resync_restores_the_true_state(steps in proptest::collection::vec(step(true), 1..160)) {
        let mut world = HistoryWorld::new();
        world.run_and_check(&steps)?;
    }
}
