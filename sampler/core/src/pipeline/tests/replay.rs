//! A replay of the facts gives exactly the same results as live use, to the last bit.

use super::*;
use crate::aggregate::Aggregate;
use crate::device::DeviceReadings;
use crate::fact::User;
use crate::observation::{ProcessKind, RunningProcess};

#[test]
fn a_replay_equals_live_use() {
    let mut core = Core::new(Settings::default(), true);
    prepare(&mut core);
    let mut last = None;
    let mut facts = Vec::new();
    for k in 0..900 {
        let pid = [Some(100), None, Some(101), Some(102), Some(999), Some(100), None][k * 5 % 7];
        let mut batch = sample_batch(k, 30 + (k * 13 % 70) as u32, pid, 20_000_000);
        match k % 50 {
            7 => batch.samples[0].queried = false,
            13 => {
                batch.samples.clear();
                batch.process_samples.clear();
            }
            20 => {
                let process = |pid| RunningProcess { pid, memory_bytes: Some(5), kind: ProcessKind::Compute };
                batch.processes = Some(vec![process(100), process(102)]);
                let energy_joules = Some(30.0 * k as f64);
                batch.readings = Some(DeviceReadings { throttle_reasons: Some(0x4), energy_joules, ..DeviceReadings::default() });
            }
            _ => {}
        }
        if k == 300 {
            let exit = ProcessChange::Exit;
            let (at, membership) = (BootNs(taken(k)), CgroupMembership { v2_id: 11, ..CgroupMembership::default() });
            core.observe(Observation::Process(ProcessFact { change: exit, tgid: Tgid(101), start: BootNs(5), at, membership }));
        }
        core.observe(Observation::from(batch));
        if k % 2 == 0 {
            advance_time(&mut core, taken(k) + 30_000_000);
        }
        if k == 500 {
            core.observe(Observation::GpuFound { gpu: 0, info: info(), at: BootNs(taken(k)) });
        }
        facts.append(&mut core.take_facts());
        last = Some(core.snapshot());
    }
    let (live, mut replay) = (last.unwrap(), Aggregate::default());
    for fact in &facts {
        replay.apply(fact);
    }
    let (_, gpu) = replay.gpus().next().unwrap();
    let expected = &live.gpus[0];
    assert!(expected.time.busy > 30.0 && expected.time.unobserved > 1.0, "{:?}", expected.time);
    assert_eq!((gpu.time(), gpu.unattributed()), (expected.time, expected.unattributed));
    let energy = expected.unattributed_energy.unwrap();
    assert!(energy.reasons[Reason::Lost as usize] > 100.0 && energy.reasons[Reason::Host as usize] > 1_000.0, "{energy:?}");
    assert_eq!(gpu.unattributed_energy(), expected.unattributed_energy);
    assert_eq!((gpu.throttle_seconds(), gpu.coactivity.coactive_ratio()), (expected.throttle_seconds, expected.coactive_ratio));
    for container in &live.containers {
        let (key, pair) = (container.record.key, &container.gpus[0]);
        let credit = gpu.credits()[&User::Container(key)];
        assert_eq!(
            (credit.ns * 1e-9, credit.variance().sqrt() * 1e-9, credit.samples),
            (pair.seconds, pair.seconds_stderr, pair.samples)
        );
        assert!(pair.energy_joules.unwrap() > 1_000.0, "{pair:?}");
        assert_eq!(gpu.energy_of(key), pair.energy_joules);
        let coactivity = gpu.coactivity.sums_of(key).unwrap();
        assert!(pair.coactive_seconds > 1.0, "{pair:?}");
        assert_eq!((coactivity.active, coactivity.coactive), (pair.active_seconds, pair.coactive_seconds));
    }
}
