//! A replay of the facts gives what live gave, to the last bit.

use super::*;
use crate::aggregate::Aggregate;
use crate::device::DeviceReadings;
use crate::fact::User;
use crate::observation::{ProcessKind, RunningProcess};

#[test]
fn a_replay_is_what_was_live() {
    let mut core = Core::new(Settings::default(), true);
    prepare(&mut core);
    let mut last = None;
    let mut facts = Vec::new();
    for k in 0..900 {
        let pid = [Some(100), None, Some(101), Some(102), Some(999), Some(100), None][k * 5 % 7];
        let mut batch = tick(k, 30 + (k * 13 % 70) as u32, pid, 20_000_000);
        match k % 50 {
            7 => batch.samples[0].queried = false,
            13 => {
                batch.samples.clear();
                batch.process_samples.clear();
            }
            20 => {
                let process = |pid| RunningProcess { pid, memory_bytes: Some(5), kind: ProcessKind::Compute };
                batch.processes = Some(vec![process(100), process(102)]);
                batch.readings = Some(DeviceReadings { throttle_reasons: Some(0x4), ..DeviceReadings::default() });
            }
            _ => {}
        }
        if k == 300 {
            let exit = ProcessChange::Exit;
            let (at, place) = (BootNs(taken(k)), CgroupMembership { v2_id: 11, ..CgroupMembership::default() });
            core.observe(Observation::Process(ProcessFact { change: exit, tgid: Tgid(101), start: BootNs(5), at, place }));
        }
        core.observe(Observation::from(batch));
        if k % 2 == 0 {
            passes(&mut core, taken(k) + 30_000_000);
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
    let of = &live.gpus[0];
    assert!(of.time.busy > 30.0 && of.time.unobserved > 1.0, "{:?}", of.time);
    assert_eq!((gpu.time(), gpu.unattributed()), (of.time, of.unattributed));
    assert_eq!((gpu.throttle_seconds(), gpu.together.coactive_ratio()), (of.throttle_seconds, of.coactive_ratio));
    for container in &live.containers {
        let (key, pair) = (container.record.key, &container.gpus[0]);
        let credit = gpu.credits()[&User::Container(key)];
        assert_eq!(
            (credit.ns * 1e-9, credit.variance().sqrt() * 1e-9, credit.samples),
            (pair.seconds, pair.seconds_stderr, pair.samples)
        );
        let together = gpu.together.of(key).unwrap();
        assert!(pair.coactive_seconds > 1.0, "{pair:?}");
        assert_eq!((together.active, together.coactive), (pair.active_seconds, pair.coactive_seconds));
    }
}
