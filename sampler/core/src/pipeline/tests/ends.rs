//! Invalid samples, faults, and processes and devices that end: accounting continues and reports its errors correctly.

use super::*;
use crate::device::{DeviceReadings, Engine, MigMode};
use crate::observation::{EngineSample, ProcessKind, RunningProcess};

const SECOND: u64 = 1_000_000_000;

#[test]
fn an_engine_sample_from_the_future_does_not_block_later_ones() {
    for garbage in [u64::MAX, SKEW + taken(40) + 3_600 * SECOND] {
        let mut core = core();
        for k in 0..80usize {
            let mut batch = sample_batch(k, 40, Some(100), 20_000_000);
            let at = batch.samples[0].at;
            batch.process_samples[0].percent[Engine::Encoder as usize] = 50;
            batch.engine_samples.push(EngineSample { engine: Engine::Encoder, at, busy_percent: 50 });
            if k == 5 {
                batch.engine_samples.insert(0, EngineSample { engine: Engine::Encoder, at: GpuNs(garbage), busy_percent: 50 });
            }
            core.observe(Observation::from(batch));
        }
        let busy = core.snapshot().gpus[0].engines.first().map_or(0.0, |e| e.busy);
        assert!((busy - 76.0 * 0.167 * 0.5).abs() < 0.3, "{busy}");
    }
}

#[test]
fn a_gpu_in_mig_mode_that_hangs_has_no_readings() {
    let mut core = core();
    core.observe(Observation::GpuFound {
        gpu: 0,
        info: Arc::new(GpuInfo { mig_mode: MigMode::Enabled, ..GpuInfo::clone(&info()) }),
        at: BootNs(taken(0)),
    });
    let readings = Some(DeviceReadings { power_watts: Some(99.0), ..DeviceReadings::default() });
    core.observe(Observation::from(GpuBatch { readings, status: PollStatus::Unsupported, ..batch(taken(1)) }));
    assert_eq!(core.snapshot().gpus[0].readings.power_watts, Some(99.0));
    advance_time(&mut core, taken(1) + 60 * SECOND);
    assert_eq!(core.snapshot().gpus[0].readings.power_watts, None);
}

#[test]
fn a_batch_that_arrives_after_its_gpu_is_gone_is_ignored() {
    let mut core = core();
    feed(&mut core, (0..60).map(|_| (100, Some(100))));
    core.observe(Observation::GpuGone { gpu: 0, at: BootNs(taken(60)) });
    let readings = Some(DeviceReadings { power_watts: Some(99.0), ..DeviceReadings::default() });
    core.observe(Observation::from(GpuBatch { readings, ..sample_batch(60, 100, Some(100), 20_000_000) }));
    assert_eq!(core.snapshot().gpus[0].readings.power_watts, None);
}

#[test]
fn waiting_samples_are_divided_when_no_more_samples_arrive() {
    for status in [PollStatus::Unsupported, PollStatus::Failed] {
        let mut core = core();
        feed(&mut core, (0..40).map(|k| (50, (k < 36).then_some(100))));
        let before = core.snapshot().gpus[0].time;
        for k in 41..200 {
            core.observe(Observation::from(GpuBatch { status, ..batch(taken(k)) }));
            advance_time(&mut core, taken(k));
        }
        let t = core.snapshot().gpus[0].time;
        // The last samples name no process: they wait for 10 s, and are credited to the user before them.
        assert!(t.busy > before.busy + 2.9 * 0.167 * 0.5, "{status:?}: {before:?} {t:?}");
    }
}

#[test]
fn a_gpu_reopened_while_its_buffer_is_empty_is_not_idle_where_samples_are_lost() {
    let mut core = core();
    for k in 0..40 {
        core.observe(Observation::from(GpuBatch { status: PollStatus::Dry { idle: true }, ..batch(taken(k)) }));
    }
    core.observe(Observation::GpuFound { gpu: 0, info: info(), at: BootNs(taken(41)) });
    core.observe(Observation::from(sample_batch(42, 100, Some(100), 20_000_000)));
    let before = core.snapshot().gpus[0].time.idle;
    for k in 60..80 {
        core.observe(Observation::from(sample_batch(k, 100, Some(100), 20_000_000)));
    }
    let t = core.snapshot().gpus[0].time;
    assert!(t.idle - before < 0.01, "{before} {t:?}");
}

#[test]
fn a_short_lived_process_has_a_standard_error() {
    let mut core = core();
    let ended = 42;
    for k in 0..90usize {
        let a = (34..ended).contains(&k) && k % 2 == 0;
        core.observe(Observation::from(sample_batch(k, 100, Some(if a { 100 } else { 101 }), 20_000_000)));
        if k == ended {
            core.observe(Observation::Process(ProcessFact {
                change: ProcessChange::Exit,
                tgid: Tgid(100),
                start: BootNs(5),
                at: BootNs(taken(ended) - PERIOD / 2),
                membership: CgroupMembership { v2_id: 10, ..CgroupMembership::default() },
            }));
        }
    }
    let snapshot = core.snapshot();
    let pair = &snapshot.containers[0].gpus[0];
    // 4 of 8 samples: about 167 ms times the square root of 8 * 0.5 * 0.5.
    assert!(pair.samples >= 3 && pair.seconds_stderr > 0.2, "{pair:?}");
}

#[test]
fn a_forgotten_container_is_not_credited_any_more() {
    let mut core = core();
    let process = RunningProcess { pid: 100, memory_bytes: None, kind: ProcessKind::Compute };
    // The process list is read once and never again; then the container is removed.
    core.observe(Observation::from(GpuBatch { processes: Some(vec![process]), ..sample_batch(0, 50, Some(100), 20_000_000) }));
    core.observe(Observation::Process(ProcessFact {
        change: ProcessChange::Exit,
        tgid: Tgid(100),
        start: BootNs(5),
        at: BootNs(taken(2)),
        membership: CgroupMembership { v2_id: 10, ..CgroupMembership::default() },
    }));
    core.observe(Observation::Cgroup(CgroupFact {
        change: CgroupChange::Removed,
        key: v2(10),
        parent: Some(v2(2)),
        name: "a".repeat(64),
        at: BootNs(taken(3)),
    }));
    for k in 1..5_000usize {
        core.observe(Observation::from(sample_batch(k, 50, None, 20_000_000)));
        if k % 6 == 0 {
            advance_time(&mut core, taken(k) + 20_000_000);
        }
    }
    let snapshot = core.snapshot();
    let gpu = &snapshot.gpus[0];
    assert!(gpu.unattributed[Reason::NoPid as usize] > 100.0, "{:?}", gpu.unattributed);
}

#[test]
fn a_sole_user_that_is_seldom_named_is_busy_in_every_window() {
    let mut core = core();
    let process = RunningProcess { pid: 100, memory_bytes: None, kind: ProcessKind::Compute };
    for k in 0..200usize {
        let mut batch = sample_batch(k, 2, (k % 90 == 30).then_some(100), 20_000_000);
        batch.processes = (k == 0).then(|| vec![process]);
        core.observe(Observation::from(batch));
        if k > 70 {
            let duty = core.snapshot().containers[0].gpus[0].duty_cycle_percent.unwrap();
            assert!((duty - 2.5).abs() < 1e-6, "{k}: {duty}");
        }
    }
}

#[test]
fn a_buffer_without_idle_samples_does_not_lengthen_the_learned_period() {
    let mut core = core();
    // First busy, then one period of 90 % a second; the driver keeps no samples of 0 %.
    for k in (0..120).chain((120..1_200).filter(|k| k % 6 == 0)) {
        core.observe(Observation::from(sample_batch(k, 90, Some(100), 20_000_000)));
    }
    let t = core.snapshot().gpus[0].time;
    let most = (120 + 180) as f64 * 0.167 * 0.9;
    assert!(t.busy <= most + 0.1, "{t:?}, at most {most}");
}
