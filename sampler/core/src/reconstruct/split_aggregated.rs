//! Takes apart what the driver folded: several samples, one row per pid.

use std::collections::HashMap;

use crate::device::Engine;
use crate::observation::{DeviceSample, ProcessSample};

/// One answer, by pid.
pub type Rows = HashMap<u32, ProcessSample>;

const COMPUTE: usize = Engine::Compute as usize;
/// A tick without an idle instant names somebody, whatever the rule of the driver.
const SURELY_NAMED_PERCENT: u32 = 100;

/// What is known of a pid from the newer ticks.
#[derive(Clone, Copy, Default)]
struct Known {
    sum: u32,
    samples: u32,
    /// It may have been in a tick that could not be told.
    unsure: bool,
}

/// `answers[0]` is about the newest tick alone, each further one reaches back one tick more. Marks the ticks whose pid, or absence of
/// one, is told; the rows are the tuples.
pub fn unfold(samples: &mut [DeviceSample], answers: &[Rows]) -> Vec<ProcessSample> {
    let none = Rows::new();
    let mut out = Vec::new();
    let mut known: HashMap<u32, Known> = HashMap::new();
    let learn = |known: &mut HashMap<u32, Known>, pid: u32, percent: u32| {
        let k = known.entry(pid).or_default();
        (k.sum, k.samples) = (k.sum + percent, k.samples + 1);
    };
    for (n, sample) in samples.iter_mut().rev().enumerate() {
        let Some(answer) = answers.get(n) else { return out };
        let newer = if n == 0 { &none } else { &answers[n - 1] };
        let mut compute = None;
        for row in answer.values().filter(|row| !newer.contains_key(&row.pid)) {
            out.push(*row);
            if row.percent[COMPUTE] > 0 {
                compute = Some(row.pid);
                learn(&mut known, row.pid, sample.busy_percent);
            }
        }
        // An average that moved has had a sample added.
        let moved =
            |row: &&ProcessSample| newer.get(&row.pid).is_some_and(|before| before.percent[COMPUTE] != row.percent[COMPUTE]);
        if compute.is_none()
            && let Some(row) = answer.values().find(moved)
        {
            compute = Some(row.pid);
        } else if compute.is_none() && sample.busy_percent > 0 {
            // One that did not move hides a sample only where it would not have moved it.
            let hidden: Vec<u32> =
                answer.values().filter(|row| hides(row, &known, sample.busy_percent)).map(|row| row.pid).collect();
            match hidden[..] {
                [] => {}
                [pid] if sample.busy_percent >= SURELY_NAMED_PERCENT => compute = Some(pid),
                _ => {
                    for pid in hidden {
                        known.entry(pid).or_default().unsure = true;
                    }
                    continue;
                }
            }
        }
        sample.queried = true;
        if let Some(pid) = compute.filter(|pid| newer.contains_key(pid)) {
            let mut percent = [0; Engine::ALL.len()];
            percent[COMPUTE] = sample.busy_percent.min(100) as u8;
            out.push(ProcessSample { at: sample.at, pid, percent });
            learn(&mut known, pid, sample.busy_percent);
        }
    }
    out
}

/// Whether a sample of `percent` could be in this row's average unseen.
fn hides(row: &ProcessSample, known: &HashMap<u32, Known>, percent: u32) -> bool {
    let Some(k) = known.get(&row.pid) else { return false };
    if k.unsure {
        return true;
    }
    let average = f64::from(k.sum + percent) / f64::from(k.samples + 1);
    (average - f64::from(row.percent[COMPUTE])).abs() < 1.0
}
