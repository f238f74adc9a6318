//! Generated launches: forks, moves and execs as runtimes and schedulers do them, with GPU work at known instants. A sample is never
//! attributed to a wrong user, it is ambiguous only where its span contains two images that can have used the GPU, and it is attributed
//! correctly everywhere else.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;
const PID: u32 = 100;
/// Cgroups: the root, a slice of the host, two containers, each with a cgroup below it.
const CGROUPS: [u64; 6] = [1, 2, 10, 11, 20, 21];
/// The user of each cgroup; 0 is the host.
const USERS: [usize; 6] = [0, 0, 1, 1, 2, 2];

/// The next action of a process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    /// A move to this index of [`CGROUPS`].
    Move(usize),
    /// By its leader, by another thread, or after vfork: the kernel event is the same.
    Exec,
    /// Use of the GPU for an instant.
    Work,
}

#[derive(Clone, Debug)]
struct Launch {
    /// Cgroup of the fork, or of CLONE_INTO_CGROUP.
    born: usize,
    /// Actions, each with the time since the previous one.
    acts: Vec<(u64, Act)>,
    /// Time from its end to the next process with this pid.
    gap: u64,
}

fn after() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 20_000..5 * MS, 3 => 5 * MS..60 * MS, 1 => 60 * MS..900 * MS]
}

fn work(most: usize) -> impl Strategy<Value = Vec<(u64, Act)>> {
    proptest::collection::vec((after(), Just(Act::Work)), 0..most)
}

fn any_cgroup() -> impl Strategy<Value = usize> {
    0..CGROUPS.len()
}

fn moves(most: usize) -> impl Strategy<Value = Vec<(u64, Act)>> {
    proptest::collection::vec((after(), any_cgroup().prop_map(Act::Move)), 0..most)
}

/// No GPU work before the last exec, and no move after it.
fn clean() -> impl Strategy<Value = Launch> {
    let exec = || after().prop_map(|after| (after, Act::Exec));
    let runtime = (any_cgroup(), moves(4), proptest::collection::vec(exec(), 1..4), work(6));
    let runtime = runtime.prop_map(|(born, moves, execs, work)| (born, [moves, execs, work].concat()));
    // `runc init`: an exec before it is moved. slurmstepd: moves to job, step and task in sequence.
    let init = (any_cgroup(), exec(), moves(5), exec(), work(6));
    let init = init.prop_map(|(born, first, moves, last, work)| (born, [vec![first], moves, vec![last], work].concat()));
    // Forked and working without an exec; `docker exec` directly inside; `unshare`, which execs without a move.
    let forked = (any_cgroup(), work(6));
    (prop_oneof![4 => runtime, 2 => init, 1 => forked], after()).prop_map(|((born, acts), gap)| Launch { born, acts, gap })
}

/// Anything in any order.
fn wild() -> impl Strategy<Value = Launch> {
    let act = prop_oneof![2 => any_cgroup().prop_map(Act::Move), 2 => Just(Act::Exec), 4 => Just(Act::Work)];
    (any_cgroup(), proptest::collection::vec((after(), act), 0..12), after()).prop_map(|(born, acts, gap)| Launch {
        born,
        acts,
        gap,
    })
}

/// A process between two execs.
#[derive(Clone, Debug)]
struct Image {
    from: u64,
    to: u64,
    /// Its cgroups, each with the time of the move.
    cgroups: Vec<(u64, usize)>,
    work: Vec<u64>,
    last: bool,
    /// The process, with this or an earlier image, had been seen on the GPU by then.
    seen: Option<u64>,
}

impl Image {
    fn user_at(&self, at: u64) -> usize {
        self.cgroups.iter().rev().find(|(since, _)| *since <= at).map_or(0, |(_, cgroup)| USERS[*cgroup])
    }

    /// Every user of the image in a span.
    fn users(&self, from: u64, to: u64) -> Vec<usize> {
        let until = |n: usize| self.cgroups.get(n + 1).map_or(self.to, |(next, _)| *next);
        let within = |(n, (since, _)): &(usize, &(u64, usize))| *since <= to && until(*n) >= from;
        self.cgroups.iter().enumerate().filter(within).map(|(_, (_, cgroup))| USERS[*cgroup]).collect()
    }

    fn can_have_used_the_gpu(&self) -> bool {
        self.last || self.seen.is_some_and(|seen| seen <= self.to)
    }
}

struct LaunchWorld {
    agent: Identity,
    images: Vec<Image>,
    /// First time in a process list, by the start of the process.
    seen: HashMap<u64, u64>,
}

impl LaunchWorld {
    fn new(launches: &[Launch]) -> Self {
        let mut world = LaunchWorld { agent: Identity::default(), images: Vec::new(), seen: HashMap::new() };
        let name = |id: u64| if id.is_multiple_of(10) { format!("{id:064x}") } else { format!("below-{id}") };
        for (id, parent) in [(1, 0), (2, 1), (10, 1), (11, 10), (20, 1), (21, 20)] {
            world.agent.cgroup(&cgroup(CgroupChange::Seen, 0, id, parent, &name(id), 1));
        }
        let mut now = 10_000 * MS;
        for launch in launches {
            now = world.run(launch, now + launch.gap);
        }
        world
    }

    /// Runs a process, and returns the time of its end.
    fn run(&mut self, launch: &Launch, start: u64) -> u64 {
        let (mut now, mut cgroup) = (start, launch.born);
        self.agent.process(&fork(PID, start, v2(CGROUPS[cgroup])));
        let image = |from, cgroup| Image { from, to: from, cgroups: vec![(from, cgroup)], work: vec![], last: false, seen: None };
        let mut images = vec![image(start, cgroup)];
        for (after, act) in &launch.acts {
            now += after.max(&20_000);
            let image_now = images.last_mut().expect("one at least");
            match act {
                Act::Move(to) => {
                    cgroup = *to;
                    image_now.cgroups.push((now, cgroup));
                    self.apply(ProcessChange::Attach, start, now, cgroup);
                }
                Act::Exec => {
                    image_now.to = now;
                    images.push(image(now, cgroup));
                    self.apply(ProcessChange::Exec, start, now, cgroup);
                }
                Act::Work => image_now.work.push(now),
            }
        }
        now += 50_000;
        self.apply(ProcessChange::Exit, start, now, cgroup);
        let last = images.last_mut().expect("one at least");
        (last.to, last.last) = (now, true);
        // A process list is read during the first work.
        let seen = images.iter().find_map(|image| image.work.first()).map(|first| first + 10_000);
        for image in &mut images {
            image.seen = seen;
        }
        self.seen.extend(seen.map(|seen| (start, seen)));
        self.images.extend(images);
        now
    }

    fn apply(&mut self, change: ProcessChange, start: u64, at: u64, cgroup: usize) {
        self.agent.process(&fact(change, PID, start, at, v2(CGROUPS[cgroup])));
    }

    fn verdict(&self, (from, to): (u64, u64)) -> Option<usize> {
        let seen = |start: BootNs| self.seen.get(&start.0).copied().map(BootNs);
        match self.agent.resolve(Tgid(PID), (BootNs(from), BootNs(to)), seen) {
            Verdict::Host => Some(0),
            Verdict::Container(key) => {
                let id = self.agent.cgroups.container(key).and_then(|c| c.record.identity.container_id.clone());
                Some(if id == Some(format!("{:064x}", 10)) { 1 } else { 2 })
            }
            Verdict::Ambiguous => None,
            other => panic!("{other:?} in {from}..{to}"),
        }
    }

    /// Checks every sample; its span reaches from `before` the work that it names to `past` it. Returns the number of ambiguous samples.
    fn check_every_sample(&self, before: u64, past: u64) -> Result<usize, TestCaseError> {
        let mut ambiguous = 0;
        for image in &self.images {
            for at in &image.work {
                let span = (at - before, at + past);
                let mut users: Vec<usize> = self
                    .images
                    .iter()
                    .filter(|image| image.can_have_used_the_gpu() && image.from <= span.1 && image.to >= span.0)
                    .flat_map(|image| image.users(span.0, span.1))
                    .collect();
                users.sort_unstable();
                users.dedup();
                let (got, truth) = (self.verdict(span), image.user_at(*at));
                prop_assert!(got.is_none_or(|got| got == truth), "{got:?}, not {truth}, at {at} in {span:?}: {:?}", self.images);
                prop_assert!(got.is_some() || users.len() > 1, "ambiguous at {at} in {span:?}: {:?}", self.images);
                ambiguous += usize::from(got.is_none());
                self.check_residency(image, span, got)?;
            }
        }
        Ok(ambiguous)
    }

    /// `since` is not before the image, unless an earlier image had been seen; and it leads to the end of the residency.
    fn check_residency(&self, image: &Image, span: (u64, u64), got: Option<usize>) -> Result<(), TestCaseError> {
        let seen = |start: BootNs| self.seen.get(&start.0).copied().map(BootNs);
        let residency = self.agent.residency(Tgid(PID), (BootNs(span.0), BootNs(span.1)), seen).expect("it has been found");
        let end = self.agent.residency_end(Tgid(PID), residency.since);
        prop_assert_eq!(end, residency.until, "since {:?}: {:?}", residency, self.images);
        let only = self.images.iter().filter(|other| other.from <= span.1 && other.to >= span.0).count() == 1;
        if got.is_some() && only && image.seen.is_none_or(|seen| seen > image.from) {
            prop_assert!(residency.since.0 >= image.from, "{residency:?}: {:?}", self.images);
        }
        Ok(())
    }
}

/// How far the span of a sample reaches before and past the work: a period, the uncertainty of the clock, and the slack.
fn span() -> impl Strategy<Value = (u64, u64)> {
    (0..400 * MS, 0..180 * MS)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn images_before_the_last_exec_do_not_make_samples_ambiguous(launch in clean(), (before, past) in span()) {
        let world = LaunchWorld::new(&[launch]);
        prop_assert_eq!(world.check_every_sample(before, past)?, 0);
    }

    #[test]
    fn a_pid_that_is_reused_repeatedly_is_never_misattributed(launches in proptest::collection::vec(clean(), 1..5), (before, past) in span()) {
        LaunchWorld::new(&launches).check_every_sample(before, past)?;
    }

    #[test]
    fn moves_and_execs_during_work_are_never_misattributed(launches in proptest::collection::vec(wild(), 1..4), (before, past) in span()) {
        LaunchWorld::new(&launches).check_every_sample(before, past)?;
    }
}

#[test]
fn a_launch_is_attributed_to_its_container_unless_it_was_seen_before() {
    let launch = |acts: &[(u64, Act)]| LaunchWorld::new(&[Launch { born: 0, acts: acts.to_vec(), gap: 0 }]);
    let start = 10_000 * MS;
    let span = (start, start + 300 * MS);
    use Act::{Exec, Move, Work};
    let check = |acts: &[(u64, Act)], expect: Option<usize>| assert_eq!(launch(acts).verdict(span), expect, "{acts:?}");
    check(&[(MS, Move(2)), (MS, Exec), (MS, Work)], Some(1));
    check(&[(MS, Move(2)), (MS, Exec), (MS, Exec), (MS, Work)], Some(1));
    // Moved after its exec, or without one.
    check(&[(MS, Exec), (MS, Work), (MS, Move(2))], None);
    check(&[(MS, Move(2)), (MS, Work)], None);
    // Working before it is moved and execs.
    check(&[(MS, Work), (MS, Move(2)), (MS, Exec), (MS, Work)], None);
    // Seen only after the exec.
    check(&[(MS, Exec), (MS, Move(2)), (MS, Exec), (MS, Work)], Some(1));
}

#[test]
fn execs_of_exited_processes_are_kept_and_bounded() {
    let mut table = Processes::default();
    table.apply(&fork(7, 100, v2(1)), keep_all);
    for n in 0..50 {
        table.apply(&fact(ProcessChange::Exec, 7, 100, 1_000 + n, v2(1)), keep_all);
    }
    // Duplicate and late events.
    table.apply(&fact(ProcessChange::Exec, 7, 100, 1_049, v2(1)), keep_all);
    table.apply(&fact(ProcessChange::Exec, 7, 100, 1_047, v2(1)), keep_all);
    let living = table.histories(Tgid(7))[0].execs.clone();
    assert!(living.len() < 12 && living.is_sorted() && living.last() == Some(&BootNs(1_049)), "{living:?}");
    table.apply(&fact(ProcessChange::Exit, 7, 100, 2_000, v2(1)), keep_all);
    assert_eq!(table.histories(Tgid(7))[0].execs, living);
    // A single exec takes no additional memory.
    let exited = |exec: bool| {
        let mut table = Processes::default();
        table.apply(&fork(8, 100, v2(1)), keep_all);
        if exec {
            table.apply(&fact(ProcessChange::Exec, 8, 100, 300, v2(1)), keep_all);
        }
        table.apply(&fact(ProcessChange::Exit, 8, 100, 400, v2(1)), keep_all);
        (table.histories(Tgid(8))[0].execs.clone(), table.size().exited_bytes)
    };
    assert_eq!((exited(true).0, exited(false).0), (vec![BootNs(300)], vec![]));
    assert_eq!(exited(true).1, exited(false).1);
}

#[test]
fn a_move_of_a_process_found_by_a_scan_is_uncertain_until_its_exec() {
    let mut table = Processes::default();
    table.record_sighting(&seen(7, 100_000_000, 200_000_000, v2(1)), keep_all);
    table.apply(&fact(ProcessChange::Attach, 7, 100_000_007, 300_000_000, v2(2)), keep_all);
    let in_span = |table: &Processes| memberships(table, 7, 250_000_000, 400_000_000);
    assert_eq!(in_span(&table), [v2(1), v2(2)]);
    table.apply(&fact(ProcessChange::Exec, 7, 100_000_007, 310_000_000, v2(2)), keep_all);
    assert_eq!(in_span(&table), [v2(2)]);
}
