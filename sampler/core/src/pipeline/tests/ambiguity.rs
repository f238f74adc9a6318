//! The user of a sample, where the driver's process samples or lists are ambiguous.

use strum::VariantArray as _;

use super::*;
use crate::device::Engine;
use crate::observation::{EngineSample, ProcessKind, RunningProcess};

/// Samples of 50 % with these process samples: (pid, percent).
fn feed_with(core: &mut Core, process_samples: &[(u32, u32)], processes: &[(u32, ProcessKind)]) {
    let process = |(pid, kind): &(u32, ProcessKind)| RunningProcess { pid: *pid, memory_bytes: None, kind: *kind };
    for k in 0..150 {
        let mut batch = sample_batch(k, 50, None, 20_000_000);
        let at = batch.samples[0].at;
        batch.process_samples = process_samples.iter().map(|(pid, percent)| process_sample(at, *pid, *percent)).collect();
        batch.processes = (k == 0).then(|| processes.iter().map(process).collect());
        core.observe(Observation::from(batch));
    }
}

/// The user of all busy time: container 0 or 1, or the reason why it has no container.
fn sole_user(process_samples: &[(u32, u32)], processes: &[(u32, ProcessKind)]) -> Result<usize, Reason> {
    let mut core = core();
    feed_with(&mut core, process_samples, processes);
    let snapshot = core.snapshot();
    let busy = snapshot.gpus[0].time.busy;
    assert!(busy > 3.0, "{busy}");
    if let Some(n) = seconds(&snapshot).iter().position(|s| (s - busy).abs() < 1e-9) {
        return Ok(n);
    }
    let reason = Reason::VARIANTS.iter().copied().find(|r| (snapshot.gpus[0].unattributed[*r as usize] - busy).abs() < 1e-9);
    Err(reason.expect("all busy time has one user or reason"))
}

#[test]
fn ambiguous_process_samples_are_resolved_or_have_a_reason() {
    use ProcessKind::{Compute, Mps, MpsServer};
    // 100 and 101 are in containers, 102 is a host process, 999 does not exist.
    let check = |process_samples: &[(u32, u32)], processes: &[(u32, ProcessKind)], expect| {
        assert_eq!(sole_user(process_samples, processes), expect, "{process_samples:?} {processes:?}");
    };
    check(&[(100, 50)], &[], Ok(0));
    // An exited process, an invalid pid, a process on another engine only.
    check(&[(999, 50), (100, 50)], &[], Ok(0));
    check(&[(0, 50), (101, 50), (u32::MAX, 50)], &[], Ok(1));
    check(&[(0, 50), (999, 50)], &[], Err(Reason::PidUnknown));
    check(&[(u32::MAX, 50)], &[], Err(Reason::InvalidPid));
    check(&[(100, 0), (101, 50)], &[], Ok(1));
    // Two known processes: the driver names one per engine, so this is ambiguous.
    check(&[(100, 50), (101, 50)], &[], Err(Reason::Ambiguous));
    check(&[(102, 50)], &[], Err(Reason::Host));
    // Clients of the multi-process service: one is named for all.
    check(&[(100, 50)], &[(100, Mps), (101, Mps)], Err(Reason::Mps));
    check(&[(100, 50)], &[(100, Mps)], Ok(0));
    check(&[(102, 50)], &[(102, MpsServer), (100, Mps)], Ok(0));
    check(&[(102, 50)], &[(102, MpsServer), (100, Mps), (101, Mps)], Err(Reason::Mps));
    check(&[(101, 50)], &[(100, Mps), (101, Compute)], Ok(1));
    // No process is named: the only holder of the device, if there is exactly one.
    check(&[], &[(100, Compute)], Ok(0));
    check(&[], &[(102, Compute)], Err(Reason::Host));
    check(&[], &[(100, Compute), (101, Compute)], Err(Reason::NoPid));
}

#[test]
fn listed_mps_clients_are_counted_and_incomplete_memory_is_not_reported() {
    let mut core = core();
    let process = |pid, memory_bytes, kind| RunningProcess { pid, memory_bytes, kind };
    let processes = vec![
        process(100, Some(5), ProcessKind::Mps),
        process(101, Some(6), ProcessKind::Compute),
        process(101, None, ProcessKind::Graphics),
    ];
    core.observe(Observation::from(GpuBatch { processes: Some(processes), ..batch(taken(1)) }));
    let pairs: Vec<_> = core.snapshot().containers.iter().flat_map(|c| c.gpus.clone()).collect();
    let reported: Vec<_> = pairs.iter().map(|p| (p.mps_clients, p.memory_used_bytes)).collect();
    assert_eq!(reported, [(1, Some(5)), (0, None)]);
    // The processes have ended.
    core.observe(Observation::from(GpuBatch { processes: Some(Vec::new()), ..batch(taken(2)) }));
    assert!(core.snapshot().containers.iter().all(|c| c.gpus.is_empty()));
}

#[test]
fn each_engine_has_its_own_pid() {
    let mut core = core();
    for k in 0..80usize {
        let mut batch = sample_batch(k, 40, Some(100), 20_000_000);
        let at = batch.samples[0].at;
        batch.process_samples.push(ProcessSample { at, pid: 101, percent: [0, 0, 70, 0, 0, 0] });
        // The encoder's buffer is read every 2 s.
        if k % 12 == 11 {
            let encoder_sample =
                |k: usize| EngineSample { engine: Engine::Encoder, at: GpuNs(SKEW + taken(k)), busy_percent: 70 };
            batch.engine_samples = (k - 11..=k).map(encoder_sample).collect();
        }
        core.observe(Observation::from(batch));
    }
    let snapshot = core.snapshot();
    let engines: Vec<_> = snapshot.gpus[0].engines.iter().map(|e| (e.engine, e.unattributed.iter().sum::<f64>())).collect();
    assert_eq!(engines, [(Engine::Encoder, 0.0)]);
    let engines_of = |n: usize| snapshot.containers[n].gpus[0].engines.clone();
    assert!(engines_of(0).is_empty());
    let [(Engine::Encoder, seconds)] = engines_of(1)[..] else { panic!("{:?}", engines_of(1)) };
    assert!((seconds - snapshot.gpus[0].engines[0].busy).abs() < 1e-9);
    assert!((seconds - 72.0 * 0.167 * 0.7).abs() < 0.5, "{seconds}");
    // It was never on the compute engine.
    assert_eq!(snapshot.containers[1].gpus[0].seconds, 0.0);
}

#[test]
fn process_samples_that_match_no_device_sample_are_counted() {
    let mut core = core();
    for k in 0..100 {
        let mut batch = sample_batch(k, 50, Some(100), 20_000_000);
        if k == 30 {
            batch.process_samples[0].at = GpuNs(batch.process_samples[0].at.0 - PERIOD / 2 - 20_000_000 - 10 * PERIOD);
        }
        core.observe(Observation::from(batch));
    }
    assert_eq!(core.snapshot().gpus[0].off_grid, 1);
}

#[test]
fn pids_of_another_space_are_not_attributed_to_containers() {
    use crate::pid_space::PidSpace;
    for &space in PidSpace::VARIANTS {
        let mut core = core();
        core.observe(Observation::PidSpace(space));
        feed_with(&mut core, &[(100, 50)], &[(100, ProcessKind::Compute)]);
        let snapshot = core.snapshot();
        let (gpu, unknown) = (&snapshot.gpus[0], snapshot.gpus[0].unattributed[Reason::PidUnknown as usize]);
        if space.is_trusted() {
            assert_eq!((unknown, snapshot.containers[0].gpus.len()), (0.0, 1), "{space:?}");
        } else {
            assert!((unknown - gpu.time.busy).abs() < 1e-9 && unknown > 3.0, "{space:?} {unknown}");
            assert!(snapshot.containers.iter().all(|c| c.gpus.is_empty()), "no seconds and no memory: {space:?}");
        }
    }
    // A change of the pid space applies to waiting samples, from the first batch after it.
    let mut core = core();
    core.observe(Observation::PidSpace(PidSpace::Unsettled));
    core.observe(Observation::from(sample_batch(0, 50, Some(100), 20_000_000)));
    core.observe(Observation::from(sample_batch(1, 50, Some(100), 20_000_000)));
    core.observe(Observation::PidSpace(PidSpace::Local));
    for k in 2..150 {
        core.observe(Observation::from(sample_batch(k, 50, Some(100), 20_000_000)));
    }
    assert_eq!(core.snapshot().gpus[0].unattributed[Reason::PidUnknown as usize], 0.0);
}
