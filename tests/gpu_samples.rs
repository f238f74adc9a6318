//! The estimator on samples of real GPUs, against the time that each load measured for itself on the GPU.
//!
//! `fixtures/gpu-samples` has, for each phase, the samples of the driver's buffer and the time of each load in the same span, from the
//! slices that the loads recorded by the GPU's own timer.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use sampler_core::observation::{DeviceSample, GpuBatch, Observation, PollStatus, ProcessSample};
use sampler_core::units::{BootNs, GpuNs, WallTime};
use serde::Deserialize;

use crate::estimator::{self, EstimatorUser};

#[derive(Deserialize)]
struct File {
    driver: String,
    card: String,
    phases: Vec<Phase>,
}

#[derive(Deserialize)]
struct Phase {
    name: String,
    loads: String,
    pids: Vec<u32>,
    samples: Vec<LoggedSample>,
}

/// Stamp and distance to the sample before, in microseconds; utilization in hundredths of a percent; the pid that the driver names; the
/// microseconds of each load in that span.
#[derive(Deserialize)]
struct LoggedSample(u64, u64, u32, Option<u32>, Vec<u64>);

struct Shown {
    estimated: f64,
    real: f64,
    stated: f64,
}

/// Feeds the samples to the core as NVML gives them: cut to whole percents, with the pid where the engine was busy.
fn replay(phase: &Phase) -> Result<Vec<Shown>> {
    let users: Vec<EstimatorUser> = phase.pids.iter().map(|_| estimator::steady(1.0)).collect();
    let mut core = estimator::core(&users);
    let first = phase.samples.first().context("no sample")?.0;
    let boot = |us: u64| BootNs((us - first + estimator::START_US) * 1000);
    let mut poll = |sample: Option<&LoggedSample>, ended: BootNs| {
        let pid = |pid: u32| phase.pids.iter().position(|one| *one == pid).map(estimator::pid);
        let named = |s: &LoggedSample| {
            Some((GpuNs(s.0 * 1000), (s.2 / 100) as u8, s.3.and_then(pid)?)).filter(|(_, percent, _)| *percent > 0)
        };
        let process_sample = |(at, percent, pid)| ProcessSample { at, pid, percent: [percent, 0, 0, 0, 0, 0] };
        let device_sample = |s: &LoggedSample| DeviceSample { at: GpuNs(s.0 * 1000), busy_percent: s.2 / 100, queried: true };
        core.observe(Observation::from(GpuBatch {
            wall: WallTime(1),
            samples: sample.map(device_sample).into_iter().collect(),
            process_samples: sample.and_then(named).map(process_sample).into_iter().collect(),
            ..GpuBatch::new(0, ended, PollStatus::Samples)
        }));
        core.observe(Observation::ClockAdvanced { at: ended, wall: WallTime(1) });
    };
    for sample in &phase.samples {
        poll(Some(sample), boot(sample.0 + 20_000));
    }
    let last = phase.samples.last().map_or(0, |sample| sample.0);
    poll(None, boot(last + 15_000_000));
    let snapshot = core.snapshot();
    // The first read credits nothing.
    let credited = &phase.samples[1..];
    let busy: f64 = credited.iter().map(|s| s.1 as f64 * f64::from(s.2) / 1e4).sum();
    let own: u64 = credited.iter().flat_map(|s| &s.4).sum();
    let shown = |(n, _): (usize, &u32)| {
        let pair = estimator::pair(&snapshot, n);
        let real: u64 = credited.iter().map(|s| s.4[n]).sum();
        Shown {
            estimated: pair.map_or(0.0, |pair| pair.seconds),
            // The driver counts the switching between contexts as busy; the loads do not.
            real: real as f64 * 1e-6 * busy / own.max(1) as f64,
            stated: pair.map_or(0.0, |pair| pair.seconds_stderr),
        }
    };
    Ok(phase.pids.iter().enumerate().map(shown).collect())
}

#[test]
fn stated_errors_cover_the_errors_on_real_gpus() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gpu-samples");
    let mut files = 0;
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        files += 1;
        let file: File = serde_json::from_slice(&std::fs::read(&path)?).with_context(|| path.display().to_string())?;
        println!("{}, driver {}", file.card, file.driver);
        println!("{:<14} {:<42} {:>6} {:>9} {:>9} {:>8}", "phase", "loads", "named", "measured", "credited", "stated");
        let (mut one, mut all) = (0, 0);
        for phase in &file.phases {
            for (n, user) in replay(phase)?.iter().enumerate() {
                let named = phase.samples.iter().filter(|s| s.3 == Some(phase.pids[n]) && s.2 > 0).count();
                println!(
                    "{:<14} {:<42} {named:>6} {:>7.2} s {:>7.2} s {:>6.2} s",
                    phase.name, phase.loads, user.real, user.estimated, user.stated
                );
                let off = (user.estimated - user.real).abs();
                // Samples at the ends of a phase are partly of the time before it.
                let edges = 0.1;
                ensure!(off <= 2.5 * user.stated + edges, "{}: {:.2} s are {:.2} s", phase.name, user.real, user.estimated);
                (one, all) = (one + usize::from(off <= user.stated + edges), all + 1);
            }
        }
        println!("{one} of {all} within one stated error");
        ensure!(one * 3 >= all * 2, "{one} of {all} within one stated error");
    }
    ensure!(files > 0, "no file in {}", folder.display());
    Ok(())
}
