//! Processes that a driver never names, because they have ended by the read of their samples: with wait probes their first call shows them.

use super::*;

const SHORT: Tgid = Tgid(200);
/// The sample in the period of which the short process works; by then the rule of the driver is known.
const WORKS: usize = 90;

/// Seconds of the two containers and of `no_pid`; the first one is named in all samples but that of the short process of the second.
fn credited(gpus: usize, is_client: bool) -> (f64, f64, f64) {
    let mut core = core();
    for gpu in 1..gpus {
        core.observe(Observation::GpuFound { gpu, info: info(), at: BootNs(taken(0)) });
    }
    let event = |core: &mut Core, change, at| {
        let membership = CgroupMembership { v2_id: 11, ..CgroupMembership::default() };
        let start = BootNs(taken(WORKS) - 100_000_000);
        core.observe(Observation::Process(ProcessFact { change, tgid: SHORT, start, at: BootNs(at), membership }));
    };
    for k in 0..120 {
        if k == WORKS {
            event(&mut core, ProcessChange::Fork { parent: Tgid(101) }, taken(WORKS) - 100_000_000);
            event(&mut core, ProcessChange::Exit, taken(WORKS) + 5_000_000);
        }
        let (busy, pid) = if k == WORKS { (60, None) } else { (40, Some(100)) };
        core.observe(Observation::from(sample_batch(k, busy, pid, 20_000_000)));
        // The thread that reads clients is later than the sample.
        if k == WORKS + 1 && is_client {
            core.observe(Observation::GpuClient { tgid: SHORT, at: BootNs(taken(WORKS) - 80_000_000) });
        }
    }
    let snapshot = core.snapshot();
    let [first, second] = seconds(&snapshot)[..] else { panic!("two containers") };
    (first, second, snapshot.gpus[0].unattributed[Reason::NoPid as usize])
}

#[test]
fn a_process_that_ended_before_the_read_is_credited_by_its_first_call() {
    let sample_s = 0.605 * PERIOD as f64 * 1e-9;
    let (without, with) = (credited(1, false), credited(1, true));
    assert!((with.1 - sample_s).abs() < 1e-6 && without.1 == 0.0, "{with:?} {without:?}");
    assert!((without.0 - with.0 - sample_s).abs() < 1e-6, "{with:?} {without:?}");
    assert_eq!((with.2, without.2), (0.0, 0.0));
}

#[test]
fn a_client_counts_on_no_gpu_of_several_that_its_container_has_not_used() {
    assert_eq!(credited(2, true).1, 0.0);
}
