mod ambiguity;
mod clients;
mod ends;
mod energy;
mod launches;
mod replay;
mod states;

use std::sync::Arc;

use super::*;
use crate::device::{GpuInfo, Reason};
use crate::observation::{
    CgroupChange, CgroupFact, CgroupMembership, DeviceSample, GpuBatch, PollStatus, ProcessChange, ProcessFact, ProcessSample,
    ProcessSeen,
};
use crate::units::{CgroupKey, GpuNs, GpuUuid, Tgid, WallTime};

const PERIOD: u64 = 167_000_000;
/// How far the GPU's clock is ahead of boot time.
const SKEW: u64 = 12_345_678_901;

fn v2(id: u64) -> CgroupKey {
    CgroupKey { hierarchy: 0, id }
}

fn core() -> Core {
    let mut core = Core::default();
    prepare(&mut core);
    core
}

fn prepare(core: &mut Core) {
    let mut cgroup = |id, parent: Option<u64>, name: &str| {
        core.observe(Observation::Cgroup(CgroupFact {
            change: CgroupChange::Seen,
            key: v2(id),
            parent: parent.map(v2),
            name: name.into(),
            at: BootNs(1),
        }));
    };
    cgroup(1, None, "");
    cgroup(2, Some(1), "docker");
    cgroup(10, Some(2), &"a".repeat(64));
    cgroup(11, Some(2), &"b".repeat(64));
    for (tgid, id) in [(100, 10), (101, 11), (102, 1)] {
        let membership = CgroupMembership { v2_id: id, ..CgroupMembership::default() };
        let (tgid, start) = (Tgid(tgid), BootNs(5));
        let seen = ProcessSeen { tgid, start, coarse_start: false, began: BootNs(6), membership: Some(membership) };
        core.observe(Observation::ProcessSeen(seen));
    }
    core.observe(Observation::GpuFound { gpu: 0, info: info(), at: BootNs(taken(0)) });
}

fn info() -> Arc<GpuInfo> {
    Arc::new(GpuInfo {
        uuid: GpuUuid("GPU-0".into()),
        model: "m".into(),
        pci_bus_id: "0".into(),
        driver_version: "1".into(),
        ..GpuInfo::default()
    })
}

/// An empty batch.
fn batch(ended: u64) -> GpuBatch {
    GpuBatch { wall: WallTime(1), ..GpuBatch::new(0, BootNs(ended), PollStatus::Samples) }
}

/// Polls once per sample; a sample is a busy percentage and the pid on the engine.
fn feed(core: &mut Core, samples: impl Iterator<Item = (u32, Option<u32>)>) {
    feed_late(core, samples, 20_000_000);
}

/// Boot time at which sample `k` is taken.
fn taken(k: usize) -> u64 {
    1_000_000_000 + PERIOD * k as u64
}

fn process_sample(at: GpuNs, pid: u32, percent: u32) -> ProcessSample {
    ProcessSample { at, pid, percent: [percent as u8, 0, 0, 0, 0, 0] }
}

/// Batch with sample `k`, polled `late_ns` after it was taken.
fn sample_batch(k: usize, busy: u32, pid: Option<u32>, late_ns: u64) -> GpuBatch {
    let at = GpuNs(SKEW + taken(k));
    let samples = vec![DeviceSample { at, busy_percent: busy, queried: true }];
    GpuBatch {
        samples,
        process_samples: pid.map(|pid| process_sample(at, pid, busy)).into_iter().collect(),
        ..batch(taken(k) + late_ns)
    }
}

fn feed_late(core: &mut Core, samples: impl Iterator<Item = (u32, Option<u32>)>, late_ns: u64) {
    for (k, (busy, pid)) in samples.enumerate() {
        core.observe(Observation::from(sample_batch(k, busy, pid, late_ns)));
    }
}

fn advance_time(core: &mut Core, at: u64) {
    core.observe(Observation::ClockAdvanced { at: BootNs(at), wall: WallTime(1) });
}

fn seconds(snapshot: &Snapshot) -> Vec<f64> {
    snapshot.containers.iter().map(|c| c.gpus.iter().map(|g| g.seconds).sum()).collect()
}

/// Units and jobs are in facts, but label sources hear of them, and snapshots have them, only once they use a GPU.
#[test]
fn units_are_announced_when_they_are_first_used() {
    let mut core = core();
    assert_eq!(core.take_container_changes().len(), 2);
    let unit = |core: &mut Core, change, id, name: &str, at| {
        let fact = CgroupFact { change, key: v2(id), parent: Some(v2(1)), name: name.into(), at: BootNs(at) };
        core.observe(Observation::Cgroup(fact));
    };
    for (id, name, pid) in [(20, "a.service", 200), (21, "b.service", 201)] {
        unit(&mut core, CgroupChange::Created, id, name, 10);
        let membership = Some(CgroupMembership { v2_id: id, ..CgroupMembership::default() });
        let (tgid, start) = (Tgid(pid), BootNs(15));
        core.observe(Observation::ProcessSeen(ProcessSeen { tgid, start, coarse_start: false, began: BootNs(16), membership }));
    }
    assert!(core.take_container_changes().is_empty());
    // One ends before its samples are attributed, the other one is never used.
    unit(&mut core, CgroupChange::Removed, 20, "a.service", taken(20));
    unit(&mut core, CgroupChange::Removed, 21, "b.service", taken(20));
    feed(&mut core, (0..20).map(|_| (50, Some(200))));
    let changes = core.take_container_changes();
    let [ContainerChange::Appeared(record), ContainerChange::Gone(key, _)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!((record.identity.short_name().as_str(), *key), ("a.service", record.key));
    advance_time(&mut core, taken(30));
    let snapshot = core.snapshot();
    let users: Vec<&str> = snapshot.containers.iter().map(|c| c.record.cgroup_path.as_str()).collect();
    assert_eq!((users.len(), users.last()), (3, Some(&"/a.service")), "{users:?}");
    assert!(seconds(&snapshot)[2] > 1.0);
}

#[test]
fn pidless_busy_time_is_divided_by_the_named_samples_around_it() {
    let mut core = core();
    // 40 to 41 % busy; of each 10 samples three name the first container, one the second, six no process.
    let pid = |k: u32| match k % 10 {
        0 | 3 | 6 => Some(100),
        5 => Some(101),
        _ => None,
    };
    feed(&mut core, (0..600).map(|k| (40, pid(k))));
    let snapshot = core.snapshot();
    let gpu = &snapshot.gpus[0];
    let credited: f64 = seconds(&snapshot).iter().sum();
    assert!((gpu.time.busy - credited - gpu.unattributed.iter().sum::<f64>()).abs() < 1e-6);
    let [a, b] = seconds(&snapshot)[..] else { panic!("two containers") };
    assert!((a / b - 3.0).abs() < 0.2, "{a} {b}");
    assert!(gpu.time.busy > 0.4 * 0.167 * 535.0, "{}", gpu.time.busy);
    let duty: f64 = snapshot.containers.iter().flat_map(|c| &c.gpus).filter_map(|g| g.duty_cycle_percent).sum();
    assert!((duty - 40.5).abs() < 1e-6, "{duty}");
}

#[test]
fn time_without_a_container_has_a_reason() {
    for (pid, reason) in
        [(Some(102), Reason::Host), (Some(999), Reason::PidUnknown), (Some(0), Reason::InvalidPid), (None, Reason::NoPid)]
    {
        let mut core = core();
        feed(&mut core, (0..200).map(|_| (50, pid)));
        let snapshot = core.snapshot();
        let gpu = &snapshot.gpus[0];
        assert!(gpu.unattributed[reason as usize] > 4.0, "{reason:?} {:?}", gpu.unattributed);
        assert!((gpu.unattributed[reason as usize] - gpu.time.busy).abs() < 1e-6);
        assert_eq!(seconds(&snapshot).iter().sum::<f64>(), 0.0);
    }
}

#[test]
fn the_first_read_credits_nothing() {
    let mut core = core();
    feed(&mut core, std::iter::once((100, Some(100))));
    assert_eq!(core.snapshot().gpus[0].time.busy, 0.0);
}

#[test]
fn a_reused_pid_is_ambiguous_at_the_change_and_never_misattributed() {
    const REUSED_AT: usize = 40;
    for late_ns in [0, 20_000_000, 90_000_000, 160_000_000] {
        for since_sample in [1_000_000, 80_000_000, 160_000_000] {
            let mut core = core();
            let at = BootNs(taken(REUSED_AT) + since_sample);
            let membership = |id| CgroupMembership { v2_id: id, ..CgroupMembership::default() };
            let (tgid, first) = (Tgid(100), BootNs(5));
            let mut send = |change, start, at, membership| {
                core.observe(Observation::Process(ProcessFact { change, tgid, start, at, membership }));
            };
            send(ProcessChange::Exit, first, at, membership(10));
            send(ProcessChange::Fork { parent: Tgid(1) }, at, at, membership(11));
            feed_late(&mut core, (0..100).map(|_| (100, Some(100))), late_ns);
            let samples: Vec<u64> = core.snapshot().containers.iter().map(|c| c.gpus.iter().map(|g| g.samples).sum()).collect();
            // The first sample sets the watermark, the last two are not settled yet. Up to and including sample 40 the pid belonged to the
            // first container.
            let [a, b] = samples[..] else { panic!("two containers") };
            let (of_a, of_b) = (REUSED_AT as u64, 100 - REUSED_AT as u64 - 1);
            assert!(a <= of_a && a + 2 >= of_a, "{late_ns} {since_sample}: {a} of {of_a}");
            assert!(b <= of_b && b + 7 >= of_b, "{late_ns} {since_sample}: {b} of {of_b}");
            assert!(core.snapshot().gpus[0].unattributed[Reason::Ambiguous as usize] > 0.1);
        }
    }
}
