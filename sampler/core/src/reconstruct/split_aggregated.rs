//! Separates what the driver aggregated: several samples, one entry for each pid.
//!
//! Drivers differ in the average that an entry has: over the samples that name the pid, or over all samples of the response (measured on an
//! H200 with driver 580.159.04), so that an entry changes with each further sample, whichever pid that names. For each further sample,
//! every pid that it may name is tried: the entries that would result are compared with the response. Exactly one match is the answer.
//! Which average a driver has is learned from responses that only one of them explains.

use foldhash::HashMap;
use strum::EnumCount as _;

use crate::device::Engine;
use crate::observation::{DeviceSample, ProcessSample};

/// One response, by pid.
pub type SamplesByPid = HashMap<u32, ProcessSample>;

const COMPUTE: usize = Engine::Compute as usize;
/// A sample without an idle instant names a process under any rule of the driver.
const SURELY_NAMED_PERCENT: u32 = 100;
/// Responses that only one average explains, for it to be known. More than one, because responses can contain invalid entries.
const CONFIRMATIONS: u32 = 3;

/// The average that an entry has of its pid's utilization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Average {
    OverNamed,
    OverAll,
}

/// What is known of the driver's average: the responses that only the one or the other explains.
#[derive(Clone, Copy, Debug, Default)]
pub struct Folding {
    over_named: u32,
    over_all: u32,
}

/// What is known of a pid from the newer samples.
#[derive(Clone, Copy, Default)]
struct Known {
    sum: u32,
    samples: u32,
}

impl Folding {
    fn possible(self) -> impl Iterator<Item = Average> {
        let named = self.over_all < self.over_named + CONFIRMATIONS;
        let all = self.over_named < self.over_all + CONFIRMATIONS;
        [(Average::OverNamed, named), (Average::OverAll, all)].into_iter().filter_map(|(average, is)| is.then_some(average))
    }

    fn explained_by(&mut self, averages: [bool; 2]) {
        match averages {
            [true, false] => self.over_named = self.over_named.saturating_add(1),
            [false, true] => self.over_all = self.over_all.saturating_add(1),
            _ => {}
        }
    }
}

impl Average {
    /// The entry of a pid in a response of `samples` samples, of which a further one names it with `more` percent, or not.
    fn of(self, known: Known, more: Option<u32>, samples: u32) -> f64 {
        let sum = f64::from(known.sum + more.unwrap_or(0));
        let over = match self {
            Average::OverNamed => known.samples + u32::from(more.is_some()),
            Average::OverAll => samples,
        };
        sum / f64::from(over.max(1))
    }

    /// Whether the entry is this average, of which the driver cuts the fraction.
    fn fits(self, process: &ProcessSample, known: Known, more: Option<u32>, samples: u32) -> bool {
        (self.of(known, more, samples) - f64::from(process.percent[COMPUTE])).abs() < 1.0
    }
}

/// `responses[0]` covers only the newest sample, each further one also the sample before. Marks the samples of which the pid, or its
/// absence, is known, and returns the tuples. An entry belongs to a sample that is less than `near_ns` away.
pub fn separate(
    samples: &mut [DeviceSample],
    responses: &[SamplesByPid],
    near_ns: u64,
    folding: &mut Folding,
) -> Vec<ProcessSample> {
    let none = SamplesByPid::default();
    let mut out = Vec::new();
    let mut known: HashMap<u32, Known> = HashMap::default();
    // Whether the pid of every newer sample is known.
    let mut is_complete = true;
    for (n, sample) in samples.iter_mut().rev().enumerate() {
        let Some(response) = responses.get(n) else { return out };
        let newer = if n == 0 { &none } else { &responses[n - 1] };
        let covered = n as u32 + 1;
        let new = || response.values().filter(|process| !newer.contains_key(&process.pid));
        let of_sample = || new().filter(|process| process.at.0.abs_diff(sample.at.0) < near_ns);
        // The average of one small sample and others may be below one percent.
        let is_small = sample.busy_percent > 0 && sample.busy_percent < covered && of_sample().count() == 1;
        let names = |process: &&ProcessSample| {
            process.percent[COMPUTE] > 0 || is_small && process.percent.iter().all(|percent| *percent == 0)
        };
        let candidates: Vec<&ProcessSample> = of_sample().filter(names).collect();
        let is_alone = |process: &&&ProcessSample| {
            folding.possible().any(|average| average.fits(process, Known::default(), Some(sample.busy_percent), covered))
        };
        // A sample names one process. Others are invalid entries, or the driver has another rule.
        let mut compute = match candidates.as_slice() {
            [only] => Some(only.pid),
            several => {
                let mut alone = several.iter().filter(is_alone);
                alone.next().filter(|_| alone.next().is_none()).map(|process| process.pid)
            }
        };
        let is_ambiguous = compute.is_none() && !candidates.is_empty();
        for process in new() {
            let mut process = *process;
            if compute == Some(process.pid) {
                process.percent[COMPUTE] = sample.busy_percent.min(100) as u8;
            }
            out.push(process);
        }
        if is_ambiguous {
            (sample.queried, is_complete) = (true, false);
            continue;
        }
        if compute.is_none() && sample.busy_percent > 0 {
            // Not those that no newer sample named, though they are entries of it: they are invalid.
            let is_named = |process: &&ProcessSample| {
                let newer = newer.get(&process.pid);
                newer.is_some_and(|newer| !is_complete || newer.percent[COMPUTE] == 0 || known.contains_key(&process.pid))
            };
            let old = || response.values().filter(is_named);
            let fits = |average: Average, named: Option<u32>| {
                old().all(|process| {
                    let more = (named == Some(process.pid)).then_some(sample.busy_percent);
                    let known = known.get(&process.pid).copied().unwrap_or_default();
                    average.fits(process, known, more, covered)
                })
            };
            let mut pids: Vec<u32> = old().map(|process| process.pid).collect();
            pids.sort_unstable();
            let no_pid = (sample.busy_percent < SURELY_NAMED_PERCENT || pids.is_empty()).then_some(None);
            let named: Vec<Option<u32>> = no_pid.into_iter().chain(pids.into_iter().map(Some)).collect();
            let explained = [Average::OverNamed, Average::OverAll].map(|average| named.iter().any(|pid| fits(average, *pid)));
            if is_complete && old().next().is_some() {
                folding.explained_by(explained);
            }
            let possible: Vec<Average> = folding.possible().collect();
            let mut fitting = named.iter().filter(|pid| possible.iter().any(|average| fits(*average, **pid)));
            match (is_complete, fitting.next(), fitting.next()) {
                (true, Some(pid), None) => compute = *pid,
                _ => {
                    is_complete = false;
                    continue;
                }
            }
        }
        sample.queried = true;
        let Some(pid) = compute else { continue };
        let of_pid = known.entry(pid).or_default();
        (of_pid.sum, of_pid.samples) = (of_pid.sum + sample.busy_percent, of_pid.samples + 1);
        if newer.contains_key(&pid) {
            let mut percent = [0; Engine::COUNT];
            percent[COMPUTE] = sample.busy_percent.min(100) as u8;
            out.push(ProcessSample { at: sample.at, pid, percent });
        }
    }
    out
}
