//! States of device time: busy, idle, unobserved, unsupported. Time of unknown state is never idle.

use strum::EnumCount as _;

use super::*;
use crate::device::{DeviceReadings, ThrottleTimes};
use crate::fact::UnobservedReason;
use crate::observation::{BusyLatch, GpmInterval, ProcessKind, RunningProcess};
use crate::snapshot::GpuTime;

const SECOND: u64 = 1_000_000_000;

fn time(core: &Core) -> GpuTime {
    core.snapshot().gpus[0].time
}

fn sum(t: GpuTime) -> f64 {
    t.busy + t.idle + t.unobserved + t.unsupported
}

fn near(value: f64, expect: f64) -> bool {
    (value - expect).abs() < 0.035
}

#[test]
fn time_without_a_driver_response_is_unobserved_and_its_rates_are_unknown() {
    let mut core = core();
    feed(&mut core, (0..60).map(|_| (50, Some(100))));
    assert!(core.snapshot().gpus[0].utilization_ratio.is_some());
    let stalled = taken(60);
    advance_time(&mut core, stalled + 9 * SECOND);
    let snapshot = core.snapshot();
    assert_eq!(snapshot.gpus[0].utilization_ratio, None);
    assert!(snapshot.containers.iter().flat_map(|c| &c.gpus).all(|g| g.duty_cycle_percent.is_none()));
    // Time is in no state while the driver's buffer may still return its samples.
    assert!(near(time(&core).unobserved, 0.0));
    let before = time(&core);
    advance_time(&mut core, stalled + 60 * SECOND);
    let after = time(&core);
    assert_eq!((after.busy, after.idle), (before.busy, before.idle));
    assert!((44.0..46.0).contains(&after.unobserved), "{after:?}");
    // The driver responds again with a full buffer: time booked as unobserved stays so, and nothing is booked twice.
    for k in 360..432 {
        core.observe(Observation::from(sample_batch(k, 100, Some(100), (432 - k) as u64 * PERIOD)));
    }
    core.observe(Observation::from(batch(taken(432) + SECOND)));
    advance_time(&mut core, taken(432) + SECOND);
    let end = (taken(431) - taken(0)) as f64 * 1e-9;
    assert!((sum(time(&core)) - end).abs() < 0.2, "{:?} {end}", time(&core));
}

#[test]
fn unqueried_samples_are_observed_and_attributed_by_the_queried_ones() {
    let mut core = core();
    for k in 0..100 {
        let mut batch = sample_batch(k, 80, Some(100), 20_000_000);
        if k % 4 != 0 {
            batch.samples[0].queried = false;
            batch.process_samples.clear();
        }
        core.observe(Observation::from(batch));
    }
    assert!(time(&core).unobserved < 0.03, "{:?}", time(&core));
    // No more samples arrive: samples that wait for neighbours are divided.
    advance_time(&mut core, taken(100) + 30 * SECOND);
    let t = time(&core);
    assert!((14.0..16.0).contains(&t.unobserved), "{t:?}");
    assert!((t.busy / (t.busy + t.idle) - 0.805).abs() < 1e-6, "{t:?}");
    let snapshot = core.snapshot();
    let gpu = &snapshot.gpus[0];
    let credited: f64 = snapshot.containers.iter().flat_map(|c| &c.gpus).map(|g| g.seconds).sum();
    assert!((credited - t.busy).abs() < 1e-6 && gpu.unattributed == [0.0; Reason::COUNT], "{credited} of {t:?}");
    assert!((gpu.counts.queried * 4).abs_diff(gpu.counts.samples) < 4, "{:?}", gpu.counts);
}

#[test]
fn an_empty_buffer_means_idle_only_if_the_device_reports_idle() {
    for idle in [true, false] {
        let mut core = core();
        feed(&mut core, (0..30).map(|_| (100, Some(100))));
        for k in 31..90 {
            let status = if k < 41 { PollStatus::Samples } else { PollStatus::Dry { idle } };
            core.observe(Observation::from(GpuBatch { status, ..batch(taken(k)) }));
        }
        for k in 90..120 {
            core.observe(Observation::from(sample_batch(k, 100, Some(100), 20_000_000)));
        }
        let t = time(&core);
        let (dry, other) = if idle { (t.idle, t.unobserved) } else { (t.unobserved, t.idle) };
        assert!(near(dry, 60.0 * 0.167), "{idle} {t:?}");
        assert!(near(other, 0.0), "{idle} {t:?}");
        // No sample was lost.
        assert_eq!(core.snapshot().gpus[0].sample_gaps, 0);
    }
}

#[test]
fn no_sample_is_lost_after_an_initially_empty_buffer() {
    let mut core = core();
    for k in 0..20 {
        core.observe(Observation::from(GpuBatch { status: PollStatus::Dry { idle: true }, ..batch(taken(k)) }));
    }
    for k in 20..60 {
        core.observe(Observation::from(sample_batch(k, 100, Some(100), 20_000_000)));
    }
    core.observe(Observation::from(batch(taken(70))));
    let t = time(&core);
    assert!(near(t.busy, 40.0 * 0.167), "{t:?}");
    assert!(near(t.idle, 19.0 * 0.167), "{t:?}");
}

#[test]
fn lost_samples_are_a_gap_and_unobserved() {
    let mut core = core();
    for k in (0..100).filter(|k| !(40..50).contains(k)) {
        core.observe(Observation::from(sample_batch(k, 100, Some(100), 20_000_000)));
    }
    let snapshot = core.snapshot();
    assert_eq!((snapshot.gpus[0].sample_gaps, snapshot.gpus[0].ring_overruns), (1, 0));
    assert!(near(time(&core).unobserved, 10.0 * 0.167), "{:?}", time(&core));
}

#[test]
fn a_device_without_a_sample_buffer_is_unsupported() {
    let mut core = core();
    for k in 0..60 {
        core.observe(Observation::from(GpuBatch { status: PollStatus::Unsupported, ..batch(taken(k)) }));
    }
    let t = time(&core);
    assert!(near(t.unsupported, 59.0 * 0.167) && near(sum(t), t.unsupported), "{t:?}");
    assert_eq!(core.snapshot().gpus[0].utilization_ratio, None);
}

#[test]
fn a_mig_device_is_measured_and_credited_to_its_only_holder() {
    use crate::observation::{ProcessKind, RunningProcess};
    let process = |pid| RunningProcess { pid, memory_bytes: Some(7), kind: ProcessKind::Compute };
    for (pids, reason) in [(vec![100], None), (vec![100, 101], Some(Reason::Ambiguous)), (vec![], Some(Reason::NoPid))] {
        let mut core = core();
        for k in 1..60u64 {
            let at = |k: u64| BootNs(taken(0) + k * SECOND);
            let gpm = GpmInterval { from: at(k - 1), to: at(k), busy_ratio: 0.25 };
            let processes = Some(pids.iter().copied().map(process).collect());
            let status = PollStatus::Unsupported;
            core.observe(Observation::from(GpuBatch { gpm: Some(gpm), processes, status, ..batch(at(k).0) }));
        }
        let snapshot = core.snapshot();
        let gpu = &snapshot.gpus[0];
        assert!(near(gpu.time.busy, 59.0 * 0.25) && near(gpu.time.idle, 59.0 * 0.75), "{:?}", gpu.time);
        assert_eq!(gpu.utilization_ratio, Some(0.25));
        match reason {
            None => {
                assert!(near(seconds(&snapshot)[0], 59.0 * 0.25));
                assert_eq!(snapshot.containers[0].gpus[0].memory_used_bytes, Some(7));
            }
            Some(reason) => assert!(near(gpu.unattributed[reason as usize], 59.0 * 0.25), "{:?}", gpu.unattributed),
        }
    }
}

#[test]
fn a_reopened_device_keeps_its_seconds_and_credits_nothing_from_the_first_read() {
    let mut core = core();
    feed(&mut core, (0..60).map(|_| (100, Some(100))));
    core.observe(Observation::GpuFound { gpu: 0, info: info(), at: BootNs(taken(63)) });
    let before = time(&core);
    // The clock of the new driver starts again.
    for k in 64..100usize {
        let at = GpuNs(PERIOD * (k as u64 - 60));
        let samples = vec![DeviceSample { at, busy_percent: 100, queried: true }];
        core.observe(Observation::from(GpuBatch {
            samples,
            process_samples: vec![process_sample(at, 100, 100)],
            ..batch(taken(k))
        }));
    }
    core.observe(Observation::from(batch(taken(110))));
    let after = time(&core);
    assert!(near(after.busy - before.busy, 35.0 * 0.167), "{before:?} {after:?}");
    assert!((sum(after) - 99.0 * 0.167).abs() < 0.2, "{after:?}");
}

#[test]
fn a_device_that_disappears_keeps_its_last_values_for_a_while() {
    let mut core = core();
    feed(&mut core, (0..60).map(|_| (100, Some(100))));
    core.observe(Observation::GpuGone { gpu: 0, at: BootNs(taken(60)) });
    let busy = time(&core).busy;
    advance_time(&mut core, taken(60) + 200 * SECOND);
    let snapshot = core.snapshot();
    assert_eq!((snapshot.gpus[0].time.busy, snapshot.gpus[0].gone), (busy, Some(BootNs(taken(60)))));
    advance_time(&mut core, taken(60) + 400 * SECOND);
    assert!(core.snapshot().gpus.is_empty());
}

#[test]
fn the_time_of_a_released_device_is_unobserved_until_it_is_found_again() {
    let mut core = core();
    core.keep_facts = true;
    feed(&mut core, (0..60).map(|_| (100, Some(100))));
    let before = time(&core);
    let released = taken(60);
    core.observe(Observation::GpuReleased { gpu: 0, at: BootNs(released) });
    // A poll that was in progress changes nothing, and neither does a second release.
    core.observe(Observation::from(GpuBatch { status: PollStatus::Dry { idle: true }, ..batch(released + SECOND) }));
    core.observe(Observation::GpuReleased { gpu: 0, at: BootNs(released + SECOND) });
    advance_time(&mut core, released + 2 * SECOND);
    let during = time(&core);
    // At once, not after the time for which the driver's buffer could still return samples.
    assert!(during.unobserved - before.unobserved > 2.0 && during.unobserved - before.unobserved < 3.0, "{during:?}");
    assert_eq!((during.busy, during.idle), (before.busy, before.idle));
    core.observe(Observation::GpuFound { gpu: 0, info: info(), at: BootNs(released + 30 * SECOND) });
    let after = time(&core);
    assert!((after.unobserved - before.unobserved - 30.0).abs() < 1.0 && after.busy == before.busy, "{after:?}");
    assert!((sum(after) - sum(before) - 30.0).abs() < 1.0, "{before:?} {after:?}");
    let facts = core.take_facts();
    let why = facts.iter().filter_map(|fact| match fact {
        Fact::Gpu { fact: GpuFact::Unobserved { why, .. }, .. } => Some(*why),
        _ => None,
    });
    let why: Vec<UnobservedReason> = why.filter(|why| *why != UnobservedReason::Start).collect();
    assert!(!why.is_empty() && why.iter().all(|why| *why == UnobservedReason::Released), "{why:?}");
}

#[test]
fn a_device_that_stops_responding_loses_its_readings_and_holders() {
    let mut core = core();
    feed(&mut core, (0..60).map(|_| (100, Some(100))));
    let processes = vec![RunningProcess { pid: 100, memory_bytes: Some(7), kind: ProcessKind::Compute }];
    let readings = DeviceReadings { temperature_celsius: Some(60.0), ..DeviceReadings::default() };
    let full = GpuBatch { readings: Some(readings), processes: Some(processes), ..batch(taken(61)) };
    core.observe(Observation::from(full));
    let memory = |core: &Core| {
        let all = core.snapshot().containers;
        all.iter().flat_map(|c| &c.gpus).map(|g| g.memory_used_bytes).collect::<Vec<_>>()
    };
    assert_eq!(memory(&core), [Some(7)]);
    let failed = GpuBatch { status: PollStatus::Failed, readings: Some(DeviceReadings::default()), ..batch(taken(62)) };
    core.observe(Observation::from(failed));
    assert_eq!((memory(&core), core.snapshot().gpus[0].readings), (vec![None], DeviceReadings::default()));
}

#[test]
fn throttling_is_summed_by_reason_and_xids_are_counted() {
    let mut core = core();
    let none = core.snapshot().gpus[0].throttle_seconds;
    assert_eq!(none, None);
    for k in 0..60u64 {
        let mask = if k > 20 && k <= 40 { 0x4 | 0x20 } else { 0x1 };
        let readings = Some(DeviceReadings { throttle_reasons: Some(mask), ..DeviceReadings::default() });
        core.observe(Observation::from(GpuBatch { readings, ..batch(taken(0) + k * SECOND) }));
    }
    for count in [1, 1_000] {
        core.observe(Observation::Xid { gpu: 0, xid: 79, count });
    }
    let gpu = &core.snapshot().gpus[0];
    assert_eq!(gpu.throttle_seconds.unwrap().map(f64::round), [39.0, 0.0, 20.0, 0.0, 0.0, 20.0, 0.0, 0.0, 0.0]);
    assert_eq!(gpu.xids, [(79, 1_001)]);
}

#[test]
fn throttling_is_counted_by_the_driver_where_it_has_a_counter() {
    let mut core = core();
    for k in 0..60u64 {
        // Readings never show the power cap, which is in force for a fifth of each second; the thermal slowdown has no counter.
        let readings = Some(DeviceReadings { throttle_reasons: Some(0x20), ..DeviceReadings::default() });
        let mut times = ThrottleTimes::default();
        times.0[2] = Some(7 * SECOND + k * SECOND / 5);
        let throttle_times = k.is_multiple_of(5).then_some(times);
        core.observe(Observation::from(GpuBatch { readings, throttle_times, ..batch(taken(0) + k * SECOND) }));
    }
    let seconds = core.snapshot().gpus[0].throttle_seconds.unwrap();
    assert_eq!((seconds[2].round(), seconds[5].round()), (11.0, 59.0));
}

/// The idle container is the only holder of the device, so that time without a process would be its.
#[test]
fn time_of_a_latched_busy_counter_is_attributed_to_no_user() {
    let run = |latch: fn(usize) -> BusyLatch| {
        let mut core = core();
        let process = RunningProcess { pid: 100, memory_bytes: Some(1), kind: ProcessKind::Compute };
        for k in 0..300 {
            let processes = (k % 12 == 0).then(|| vec![process]);
            let status = sample_batch(k, 100, None, 20_000_000);
            core.observe(Observation::from(GpuBatch { processes, latch: latch(k), ..status }));
        }
        let snapshot = core.snapshot();
        (seconds(&snapshot)[0], snapshot.gpus[0].unattributed[Reason::NoPid as usize])
    };
    let (credited, no_pid) = run(|_| BusyLatch::Clear);
    assert!(credited > 30.0 && no_pid < 1.0, "{credited} {no_pid}");
    let (credited, no_pid) = run(|k| if k < 20 { BusyLatch::Suspected } else { BusyLatch::Latched });
    assert!(credited == 0.0 && no_pid > 45.0, "{credited} {no_pid}");
    // A suspicion that is not confirmed delays the time, and changes nothing.
    let (credited, no_pid) = run(|k| if k % 40 < 30 { BusyLatch::Suspected } else { BusyLatch::Clear });
    assert!(credited > 30.0 && no_pid < 1.0, "{credited} {no_pid}");
}

#[test]
fn drift_and_steps_of_a_clock_are_reported() {
    let mut core = core();
    // The GPU's clock gains 200 parts per million.
    let stamp = |k: usize, base: u64| GpuNs(base + taken(k) + taken(k) / 5_000);
    for k in 0..1_200 {
        // Polls happen at varying times after a sample.
        let late = 10_000_000 + (k as u64 * 7 % 80) * 1_000_000;
        let base = if k < 900 { SKEW } else { SKEW - 3 * SECOND };
        let at = stamp(k, base);
        let samples = vec![DeviceSample { at, busy_percent: 100, queried: true }];
        let process_samples = vec![process_sample(at, 100, 100)];
        core.observe(Observation::from(GpuBatch { samples, process_samples, stepped: k == 900, ..batch(taken(k) + late) }));
        if k == 899 {
            let clock = core.snapshot().gpus[0].clock;
            assert!((clock.drift_ratio.unwrap() - 2e-4).abs() < 5e-5, "{clock:?}");
            assert!((clock.ahead_of_boot_seconds.unwrap() - 12.37).abs() < 0.1, "{clock:?}");
            assert!((0.01..0.4).contains(&clock.uncertainty_seconds.unwrap()), "{clock:?}");
            assert_eq!(clock.steps, 0);
        }
    }
    let gpu = &core.snapshot().gpus[0];
    assert_eq!(gpu.clock.steps, 1);
    assert!(gpu.time.unobserved < 1.0, "{:?}", gpu.time);
    assert!((sum(gpu.time) - 1_199.0 * 0.167).abs() < 1.0, "{:?}", gpu.time);
}
