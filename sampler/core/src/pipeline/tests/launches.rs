//! First processes of containers: forked outside, moved inside, then exec'd; and the residency that their samples are attributed to.

use super::*;
use crate::aggregate::Settings;
use crate::fact::AttributedProcess;
use crate::observation::{ProcessKind, RunningProcess};

const PID: u32 = 200;
const HOST: u64 = 1;
const CONTAINER: u64 = 10;
const MS: u64 = 1_000_000;

fn core_with_facts() -> Core {
    let mut core = Core::new(Settings::default(), true);
    prepare(&mut core);
    core
}

/// Kernel events of the process that started at `start`: each change with its time and the cgroup at that time.
fn changes(core: &mut Core, start: u64, changes: &[(ProcessChange, u64, u64)]) {
    for (change, at, id) in changes {
        let membership = CgroupMembership { v2_id: *id, ..CgroupMembership::default() };
        let (tgid, start, at, change) = (Tgid(PID), BootNs(start), BootNs(*at), *change);
        core.observe(Observation::Process(ProcessFact { change, tgid, start, at, membership }));
    }
}

const FORK: ProcessChange = ProcessChange::Fork { parent: Tgid(1) };

/// The attributed processes of all samples, and the residencies of the process that ended: start and end.
fn attributed_and_ended(core: &mut Core) -> (Vec<AttributedProcess>, Vec<(u64, BootNs)>) {
    let (mut processes, mut left) = (Vec::new(), Vec::new());
    for fact in core.take_facts() {
        match fact {
            Fact::Gpu { fact: GpuFact::Utilization(sample), .. } => processes.extend(sample.processes),
            Fact::Gpu { fact: GpuFact::Left { since, pid: PID }, at, .. } => left.push((since.0, at)),
            _ => {}
        }
    }
    // A process that ended before it is named has one `Left` fact for each sample.
    left.dedup();
    (processes, left)
}

/// The process is on the engine for these of 100 samples.
fn add_work(core: &mut Core, samples: std::ops::Range<u32>) {
    feed(core, (0..100).map(|k| if samples.contains(&k) { (90, Some(PID)) } else { (0, None) }));
}

fn ambiguous(core: &Core) -> f64 {
    core.snapshot().gpus[0].unattributed[Reason::Ambiguous as usize]
}

#[test]
fn a_launched_process_is_attributed_to_its_container_from_its_exec_to_its_end() {
    use ProcessChange::{Attach, Exec, Exit};
    for late in [MS, 80 * MS, 160 * MS] {
        for held in [MS, 20 * MS, 300 * MS] {
            let mut core = core_with_facts();
            let (exec, end) = (taken(40) + late, taken(44) + 10 * MS);
            let (start, moved) = (exec - held, exec - held / 2);
            let launch = [(FORK, start, HOST), (Attach, moved, CONTAINER), (Exec, exec, CONTAINER), (Exit, end, CONTAINER)];
            changes(&mut core, start, &launch);
            add_work(&mut core, 41..45);
            let (processes, left) = attributed_and_ended(&mut core);
            assert_eq!(processes.len(), 4);
            assert!(
                processes.iter().all(|process| process.user == User::Container(ContainerKey(1)) && process.since == BootNs(exec)),
                "{processes:?}"
            );
            assert_eq!(left, [(exec, BootNs(end))]);
            assert_eq!(ambiguous(&core), 0.0);
        }
    }
}

#[test]
fn an_exec_within_the_container_while_working_changes_nothing() {
    use ProcessChange::{Attach, Exec};
    let mut core = core_with_facts();
    let exec = taken(20);
    changes(&mut core, exec - MS, &[(FORK, exec - MS, HOST), (Attach, exec - MS, CONTAINER), (Exec, exec, CONTAINER)]);
    changes(&mut core, exec - MS, &[(Exec, taken(40), CONTAINER), (Exec, taken(60) + 5 * MS, CONTAINER)]);
    add_work(&mut core, 21..80);
    let (processes, left) = attributed_and_ended(&mut core);
    assert_eq!(processes.len(), 59);
    // Nothing was seen on the GPU before the first sample, so all samples start at the first exec.
    assert!(processes.iter().all(|process| process.since == BootNs(exec)), "{processes:?}");
    assert_eq!((left.len(), ambiguous(&core)), (0, 0.0));
}

#[test]
fn an_image_that_was_on_the_gpu_before_the_exec_stays_a_candidate() {
    use ProcessChange::{Attach, Exec, Exit};
    let (start, moved) = (taken(10), taken(40) + 10 * MS);
    let events = [(FORK, start, HOST), (Attach, moved, CONTAINER), (Exec, moved + MS, CONTAINER), (Exit, taken(70), CONTAINER)];
    // Named by samples before the exec.
    let mut core = core_with_facts();
    changes(&mut core, start, &events);
    add_work(&mut core, 20..70);
    let (processes, left) = attributed_and_ended(&mut core);
    let ambiguous_samples = processes.iter().filter(|process| process.user == User::Unattributed(Reason::Ambiguous)).count();
    assert!((1..=4).contains(&ambiguous_samples), "{processes:?}");
    assert_eq!(left, [(start, BootNs(moved)), (moved, BootNs(taken(70)))]);
    // In a process list before the exec.
    let mut core = core_with_facts();
    changes(&mut core, start, &events);
    let processes = Some(vec![RunningProcess { pid: PID, memory_bytes: None, kind: ProcessKind::Compute }]);
    for k in 0..100 {
        let pid = (41..70).contains(&k).then_some(PID);
        let batch = sample_batch(k, if pid.is_some() { 90 } else { 0 }, pid, 20 * MS);
        core.observe(Observation::from(GpuBatch { processes: processes.clone().filter(|_| k == 30), ..batch }));
    }
    assert!(ambiguous(&core) > 0.1, "{}", ambiguous(&core));
    // Neither.
    let mut core = core_with_facts();
    changes(&mut core, start, &events);
    add_work(&mut core, 41..70);
    assert_eq!(ambiguous(&core), 0.0);
}

#[test]
fn a_move_without_an_exec_is_ambiguous_around_it() {
    use ProcessChange::{Attach, Exec};
    let mut core = core_with_facts();
    let (start, moved) = (taken(10), taken(40) + 10 * MS);
    changes(&mut core, start, &[(FORK, start, HOST), (Exec, start + MS, HOST), (Attach, moved, CONTAINER)]);
    add_work(&mut core, 20..70);
    assert!(ambiguous(&core) > 0.1);
    let (_, left) = attributed_and_ended(&mut core);
    assert_eq!(left, [(start + MS, BootNs(moved))]);
}
