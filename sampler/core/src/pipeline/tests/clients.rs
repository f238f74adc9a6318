//! Processes that a driver never names, because they have ended by the read of their samples: with wait probes their first call shows them.

use super::*;
use crate::aggregate::Aggregate;
use crate::observation::{ProcessKind, RunningProcess};

/// What one sample of 60 % is.
const SAMPLE_S: f64 = 0.605 * PERIOD as f64 * 1e-9;

/// A process of the second container that works in the period of sample `k` and has ended by its read.
fn live(core: &mut Core, tgid: Tgid, k: usize) {
    let start = BootNs(taken(k) - 100_000_000);
    let membership = CgroupMembership { v2_id: 11, ..CgroupMembership::default() };
    for (change, at) in [(ProcessChange::Fork { parent: Tgid(101) }, start), (ProcessChange::Exit, BootNs(taken(k) + 5_000_000))]
    {
        core.observe(Observation::Process(ProcessFact { change, tgid, start, at, membership }));
    }
}

fn called(core: &mut Core, tgid: Tgid, k: usize) {
    core.observe(Observation::GpuClient { tgid, at: BootNs(taken(k) - 80_000_000) });
}

/// Seconds of the two containers and of `no_pid`; `busy` of all samples but that of the short process, which name the first container.
fn credited(busy: u32, is_client: bool, prepare: impl Fn(&mut Core)) -> (f64, f64, f64) {
    // By then the rule of the driver is known, if its samples show it.
    const WORKS: usize = 90;
    let mut core = core();
    prepare(&mut core);
    for k in 0..200 {
        if k == WORKS {
            live(&mut core, Tgid(200), k);
        }
        let (busy, pid) = if k == WORKS { (60, None) } else { (busy, (busy > 0).then_some(100)) };
        core.observe(Observation::from(sample_batch(k, busy, pid, 20_000_000)));
        // The thread that reads clients is later than the sample; the process may call again.
        if k > WORKS && k < WORKS + 3 && is_client {
            called(&mut core, Tgid(200), WORKS);
        }
    }
    let snapshot = core.snapshot();
    let [first, second] = seconds(&snapshot)[..] else { panic!("two containers") };
    (first, second, snapshot.gpus[0].unattributed[Reason::NoPid as usize])
}

fn is_near(found: f64, expect: f64) -> bool {
    (found - expect).abs() < 1e-6
}

#[test]
fn a_process_that_ended_before_the_read_is_credited_by_its_first_call() {
    let (without, with) = (credited(40, false, |_| {}), credited(40, true, |_| {}));
    assert!(is_near(with.1, SAMPLE_S) && without.1 == 0.0, "{with:?} {without:?}");
    assert!(is_near(without.0 - with.0, SAMPLE_S), "{with:?} {without:?}");
    assert_eq!((with.2, without.2), (0.0, 0.0));
}

#[test]
fn the_only_holder_has_time_for_which_nothing_is_known_of_the_driver() {
    let lists = |core: &mut Core| {
        let process = RunningProcess { pid: 100, memory_bytes: None, kind: ProcessKind::Compute };
        core.observe(Observation::from(GpuBatch { processes: Some(vec![process]), ..batch(taken(0)) }));
    };
    let held = credited(0, true, lists);
    assert!(is_near(held.0, SAMPLE_S) && held.1 == 0.0, "{held:?}");
    let free = credited(0, true, |_| {});
    assert!(is_near(free.1, SAMPLE_S) && free.0 == 0.0 && free.2 == 0.0, "{free:?}");
    assert!(is_near(credited(0, false, |_| {}).2, SAMPLE_S));
}

#[test]
fn a_client_counts_on_no_gpu_of_several_that_its_container_has_not_used() {
    let second = |core: &mut Core, info| core.observe(Observation::GpuFound { gpu: 1, info, at: BootNs(taken(0)) });
    assert_eq!(credited(40, true, |core| second(core, info())).1, 0.0);
    let gone = |core: &mut Core| {
        second(core, info());
        core.observe(Observation::GpuGone { gpu: 1, at: BootNs(taken(1)) });
    };
    assert_eq!(credited(40, true, gone).1, 0.0);
    let mig = Arc::new(GpuInfo { parent: Some(GpuUuid("GPU-1".into())), ..GpuInfo::clone(&info()) });
    assert_eq!(credited(40, true, |core| second(core, Arc::clone(&mig))).1, 0.0);
}

#[test]
fn a_user_that_starts_very_many_clients_makes_few_facts() {
    let mut core = Core::new(Settings::default(), true);
    prepare(&mut core);
    for n in 0..500 {
        live(&mut core, Tgid(1_000 + n), 10);
        called(&mut core, Tgid(1_000 + n), 10);
    }
    let is_client = |fact: &&Fact| matches!(fact, Fact::Gpu { fact: GpuFact::Client { .. }, .. });
    assert_eq!(core.take_facts().iter().filter(is_client).count(), 32);
}

#[test]
fn a_replay_of_clients_equals_live_use() {
    let mut core = Core::new(Settings::default(), true);
    prepare(&mut core);
    let mut facts = Vec::new();
    for k in 0..1_800 {
        let is_short = k >= 100 && k % 20 == 0;
        let tgid = Tgid(1_000 + k as u32);
        if is_short {
            live(&mut core, tgid, k);
        }
        let (busy, pid) = if is_short { (60, None) } else { (40, Some(100)) };
        core.observe(Observation::from(sample_batch(k, busy, pid, 20_000_000)));
        if is_short {
            called(&mut core, tgid, k);
        }
        if k % 2 == 0 {
            advance_time(&mut core, taken(k) + 30_000_000);
        }
        facts.append(&mut core.take_facts());
    }
    let live = core.snapshot();
    let mut replay = Aggregate::default();
    facts.iter().for_each(|fact| replay.apply(fact));
    let (_, gpu) = replay.gpus().next().unwrap();
    assert_eq!((gpu.time(), gpu.unattributed()), (live.gpus[0].time, live.gpus[0].unattributed));
    for container in &live.containers {
        let (credit, pair) = (gpu.credits()[&User::Container(container.record.key)], &container.gpus[0]);
        assert_eq!((credit.ns * 1e-9, credit.variance().sqrt() * 1e-9), (pair.seconds, pair.seconds_stderr));
    }
    // Of 85 processes; the last one waits for later samples.
    assert!((83.0..=85.1).contains(&(seconds(&live)[1] / SAMPLE_S)), "{}", seconds(&live)[1] / SAMPLE_S);
}
