//! Separates what the driver aggregated: several samples, one entry for each pid.

use std::collections::HashMap;

use strum::EnumCount as _;

use crate::device::Engine;
use crate::observation::{DeviceSample, ProcessSample};

/// One response, by pid.
pub type SamplesByPid = HashMap<u32, ProcessSample>;

const COMPUTE: usize = Engine::Compute as usize;
/// A sample without an idle instant names a process under any rule of the driver.
const SURELY_NAMED_PERCENT: u32 = 100;

/// What is known of a pid from the newer samples.
#[derive(Clone, Copy, Default)]
struct Known {
    sum: u32,
    samples: u32,
    /// It may have been in a sample that could not be separated.
    uncertain: bool,
}

/// `responses[0]` covers only the newest sample, each further one also the sample before. Marks the samples of which the pid, or its
/// absence, is known, and returns the tuples.
pub fn separate(samples: &mut [DeviceSample], responses: &[SamplesByPid]) -> Vec<ProcessSample> {
    let none = SamplesByPid::new();
    let mut out = Vec::new();
    let mut known: HashMap<u32, Known> = HashMap::new();
    let learn = |known: &mut HashMap<u32, Known>, pid: u32, percent: u32| {
        let k = known.entry(pid).or_default();
        (k.sum, k.samples) = (k.sum + percent, k.samples + 1);
    };
    for (n, sample) in samples.iter_mut().rev().enumerate() {
        let Some(response) = responses.get(n) else { return out };
        let newer = if n == 0 { &none } else { &responses[n - 1] };
        let mut compute = None;
        for process in response.values().filter(|process| !newer.contains_key(&process.pid)) {
            out.push(*process);
            if process.percent[COMPUTE] > 0 {
                compute = Some(process.pid);
                learn(&mut known, process.pid, sample.busy_percent);
            }
        }
        // An average that changed includes one more sample.
        let moved = |process: &&ProcessSample| {
            newer.get(&process.pid).is_some_and(|before| before.percent[COMPUTE] != process.percent[COMPUTE])
        };
        if compute.is_none()
            && let Some(process) = response.values().find(moved)
        {
            compute = Some(process.pid);
        } else if compute.is_none() && sample.busy_percent > 0 {
            // An unchanged average hides a sample only if the sample would not have changed it.
            let hidden: Vec<u32> = response
                .values()
                .filter(|process| hides(process, &known, sample.busy_percent))
                .map(|process| process.pid)
                .collect();
            match hidden[..] {
                [] => {}
                [pid] if sample.busy_percent >= SURELY_NAMED_PERCENT => compute = Some(pid),
                _ => {
                    for pid in hidden {
                        known.entry(pid).or_default().uncertain = true;
                    }
                    continue;
                }
            }
        }
        sample.queried = true;
        if let Some(pid) = compute.filter(|pid| newer.contains_key(pid)) {
            let mut percent = [0; Engine::COUNT];
            percent[COMPUTE] = sample.busy_percent.min(100) as u8;
            out.push(ProcessSample { at: sample.at, pid, percent });
            learn(&mut known, pid, sample.busy_percent);
        }
    }
    out
}

/// Whether a sample of `percent` could be part of this average without changing it.
fn hides(process: &ProcessSample, known: &HashMap<u32, Known>, percent: u32) -> bool {
    let Some(k) = known.get(&process.pid) else { return false };
    if k.uncertain {
        return true;
    }
    let average = f64::from(k.sum + percent) / f64::from(k.samples + 1);
    (average - f64::from(process.percent[COMPUTE])).abs() < 1.0
}
