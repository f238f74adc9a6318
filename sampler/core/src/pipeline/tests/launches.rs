//! Containers' first processes: forked outside, moved inside, then exec'd; and what their samples say of since when and until when.

use super::*;
use crate::aggregate::Settings;
use crate::fact::AttributedProcess;
use crate::observation::{ProcessKind, RunningProcess};

const PID: u32 = 200;
const HOST: u64 = 1;
const CONTAINER: u64 = 10;
const MS: u64 = 1_000_000;

fn recorded() -> Core {
    let mut core = Core::new(Settings::default(), true);
    prepare(&mut core);
    core
}

/// What the kernel says of the process that began then: each change, when, and where it is then.
fn changes(core: &mut Core, start: u64, changes: &[(ProcessChange, u64, u64)]) {
    for (change, at, id) in changes {
        let place = CgroupMembership { v2_id: *id, ..CgroupMembership::default() };
        let (tgid, start, at, change) = (Tgid(PID), BootNs(start), BootNs(*at), *change);
        core.observe(Observation::Process(ProcessFact { change, tgid, start, at, place }));
    }
}

const FORK: ProcessChange = ProcessChange::Fork { parent: Tgid(1) };

/// The rows of all samples, and the exits of the process: since when it was its user's, and its end.
fn rows_and_exits(core: &mut Core) -> (Vec<AttributedProcess>, Vec<(u64, BootNs)>) {
    let (mut processes, mut left) = (Vec::new(), Vec::new());
    for fact in core.take_facts() {
        match fact {
            Fact::Gpu { fact: GpuFact::Utilization(tick), .. } => processes.extend(tick.processes),
            Fact::Gpu { fact: GpuFact::Left { since, pid: PID }, at, .. } => left.push((since.0, at)),
            _ => {}
        }
    }
    // A process that ended before it is named has one exit fact a row.
    left.dedup();
    (processes, left)
}

/// On the engine for these ticks of 100.
fn works(core: &mut Core, samples: std::ops::Range<u32>) {
    feed(core, (0..100).map(|k| if samples.contains(&k) { (90, Some(PID)) } else { (0, None) }));
}

fn ambiguous(core: &Core) -> f64 {
    core.snapshot().gpus[0].unattributed[Reason::Ambiguous as usize]
}

#[test]
fn a_launched_process_is_its_containers_from_its_exec_to_its_end() {
    use ProcessChange::{Attach, Exec, Exit};
    for late in [MS, 80 * MS, 160 * MS] {
        for held in [MS, 20 * MS, 300 * MS] {
            let mut core = recorded();
            let (exec, end) = (taken(40) + late, taken(44) + 10 * MS);
            let (start, moved) = (exec - held, exec - held / 2);
            let launch = [(FORK, start, HOST), (Attach, moved, CONTAINER), (Exec, exec, CONTAINER), (Exit, end, CONTAINER)];
            changes(&mut core, start, &launch);
            works(&mut core, 41..45);
            let (process_samples, left) = rows_and_exits(&mut core);
            assert_eq!(process_samples.len(), 4);
            assert!(
                process_samples.iter().all(|row| row.user == User::Container(ContainerKey(1)) && row.since == BootNs(exec)),
                "{process_samples:?}"
            );
            assert_eq!(left, [(exec, BootNs(end))]);
            assert_eq!(ambiguous(&core), 0.0);
        }
    }
}

#[test]
fn an_exec_while_it_works_in_its_container_changes_nothing() {
    use ProcessChange::{Attach, Exec};
    let mut core = recorded();
    let exec = taken(20);
    changes(&mut core, exec - MS, &[(FORK, exec - MS, HOST), (Attach, exec - MS, CONTAINER), (Exec, exec, CONTAINER)]);
    changes(&mut core, exec - MS, &[(Exec, taken(40), CONTAINER), (Exec, taken(60) + 5 * MS, CONTAINER)]);
    works(&mut core, 21..80);
    let (process_samples, left) = rows_and_exits(&mut core);
    assert_eq!(process_samples.len(), 59);
    // Of the first sample, nothing was seen before; so the others are of that process since then.
    assert!(process_samples.iter().all(|row| row.since == BootNs(exec)), "{process_samples:?}");
    assert_eq!((left.len(), ambiguous(&core)), (0, 0.0));
}

#[test]
fn what_was_on_the_gpu_before_the_exec_stays_in_question() {
    use ProcessChange::{Attach, Exec, Exit};
    let (start, moved) = (taken(10), taken(40) + 10 * MS);
    let life = [(FORK, start, HOST), (Attach, moved, CONTAINER), (Exec, moved + MS, CONTAINER), (Exit, taken(70), CONTAINER)];
    // Named by samples before.
    let mut core = recorded();
    changes(&mut core, start, &life);
    works(&mut core, 20..70);
    let (process_samples, left) = rows_and_exits(&mut core);
    let in_question = process_samples.iter().filter(|row| row.user == User::Nobody(Reason::Ambiguous)).count();
    assert!((1..=4).contains(&in_question), "{process_samples:?}");
    assert_eq!(left, [(start, BootNs(moved)), (moved, BootNs(taken(70)))]);
    // In a process list before.
    let mut core = recorded();
    changes(&mut core, start, &life);
    let processes = Some(vec![RunningProcess { pid: PID, memory_bytes: None, kind: ProcessKind::Compute }]);
    for k in 0..100 {
        let pid = (41..70).contains(&k).then_some(PID);
        let batch = tick(k, if pid.is_some() { 90 } else { 0 }, pid, 20 * MS);
        core.observe(Observation::from(GpuBatch { processes: processes.clone().filter(|_| k == 30), ..batch }));
    }
    assert!(ambiguous(&core) > 0.1, "{}", ambiguous(&core));
    // Neither.
    let mut core = recorded();
    changes(&mut core, start, &life);
    works(&mut core, 41..70);
    assert_eq!(ambiguous(&core), 0.0);
}

#[test]
fn a_move_without_an_exec_is_ambiguous_there() {
    use ProcessChange::{Attach, Exec};
    let mut core = recorded();
    let (start, moved) = (taken(10), taken(40) + 10 * MS);
    changes(&mut core, start, &[(FORK, start, HOST), (Exec, start + MS, HOST), (Attach, moved, CONTAINER)]);
    works(&mut core, 20..70);
    assert!(ambiguous(&core) > 0.1);
    let (_, left) = rows_and_exits(&mut core);
    assert_eq!(left, [(start + MS, BootNs(moved))]);
}
