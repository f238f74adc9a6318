//! The rule by which a sample names a process, from the loads' own measurements: the time slices in which their kernels ran, by the GPU's
//! timer.
//!
//! The stamps of samples may be on that timer or on the machine's clock. The clock and its offset are found by the utilization, which must
//! equal the busy part of the time before the stamp.

use std::fmt;
use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

const MS: i64 = 1_000_000;
/// Search for the shift around each clock: range and step, first coarse, then fine around the best.
const COARSE: (i64, i64) = (3_000 * MS, 10 * MS);
const FINE: (i64, i64) = (10 * MS, MS);

/// Fewer samples than this give no result.
const ENOUGH: usize = 10;

/// The record of one load.
#[derive(Clone, Debug, Default)]
pub struct Load {
    pub pid: u32,
    /// The GPU's timer less the wall clock.
    pub ahead_of_wall_ns: i64,
    /// Begin and end of each slice by the GPU's timer, in order.
    pub slices: Vec<(i64, i64)>,
}

/// A sample: its stamp, the distance to the one before it, the busy part, the process that it names.
#[derive(Clone, Copy, Debug)]
pub struct TrueSample {
    pub stamp_ns: i64,
    pub gap_ns: i64,
    pub busy: f64,
    pub pid: Option<u32>,
}

/// How many samples each rule explains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rules {
    #[serde(rename = "ticks")]
    pub samples: usize,
    /// The process on the engine at the stamp.
    pub instant: usize,
    /// The last process on the engine between two stamps.
    pub period: usize,
    /// The last process on the engine at any time before.
    pub resident: usize,
    /// Added to stamps, it gives times of the GPU's timer.
    pub shift_ns: i64,
    /// Mean error of the utilization with that shift.
    pub mean_error: f64,
}

/// Why no rule is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    NoLoads,
    TooFewSamples,
    NoClock,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoLoads => "no CUDA load recorded its time slices",
            Self::TooFewSamples => "too few samples to compare with the loads' time slices",
            Self::NoClock => "the samples' stamps match neither the GPU's timer nor the wall clock nor the clock since boot",
        })
    }
}

impl Load {
    /// Parses lines `clock,NS` and `s,BEGIN,END`; a last line that is cut off is ignored.
    pub fn parse(pid: u32, text: &str) -> Self {
        let mut load = Self { pid, ..Self::default() };
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let fields: Vec<&str> = line.split(',').collect();
            match fields[..] {
                ["clock", ns] => load.ahead_of_wall_ns = ns.parse().unwrap_or_default(),
                ["s", begin, end] => load.slices.extend(begin.parse().ok().zip(end.parse().ok())),
                _ => {}
            }
        }
        load.slices.sort_unstable();
        load
    }

    /// Reads every file `PID.csv` in a folder.
    pub fn all_in(folder: &Path) -> anyhow::Result<Vec<Self>> {
        let mut loads = Vec::new();
        for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let pid = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
            if let Some(pid) = pid.filter(|_| path.extension().is_some_and(|extension| extension == "csv")) {
                loads.push(Self::parse(pid, &std::fs::read_to_string(&path)?));
            }
        }
        loads.retain(|load| !load.slices.is_empty());
        loads.sort_by_key(|load| load.pid);
        Ok(loads)
    }

    pub fn seconds(&self) -> f64 {
        self.slices.iter().map(|(begin, end)| (end - begin) as f64 * 1e-9).sum()
    }

    /// The slices that may overlap a time.
    fn around(&self, from: i64, to: i64) -> &[(i64, i64)] {
        let first = self.slices.partition_point(|(_, end)| *end <= from);
        let last = self.slices.partition_point(|(begin, _)| *begin < to);
        self.slices.get(first..last).unwrap_or_default()
    }

    fn busy(&self, from: i64, to: i64) -> i64 {
        self.around(from, to).iter().map(|(begin, end)| (*end).min(to) - (*begin).max(from)).sum()
    }

    fn last_on(&self, at: i64) -> Option<i64> {
        let begun = self.slices.partition_point(|(begin, _)| *begin <= at);
        self.slices.get(begun.checked_sub(1)?).map(|(_, end)| (*end).min(at))
    }

    fn is_on(&self, at: i64) -> bool {
        self.last_on(at) == Some(at)
    }
}

/// The samples within the loads' records, with stamps shifted by `shift_ns`.
fn within(samples: &[TrueSample], loads: &[Load], shift_ns: i64) -> Vec<TrueSample> {
    let begin = loads.iter().filter_map(|load| load.slices.first()).map(|(begin, _)| *begin).min().unwrap_or_default();
    let end = loads.iter().filter_map(|load| load.slices.last()).map(|(_, end)| *end).max().unwrap_or_default();
    let moved = samples.iter().map(|sample| TrueSample { stamp_ns: sample.stamp_ns + shift_ns, ..*sample });
    moved.filter(|sample| sample.stamp_ns - sample.gap_ns >= begin && sample.stamp_ns <= end).collect()
}

/// Mean error of the utilization; `None` where too few samples are left.
fn mean_error(samples: &[TrueSample], loads: &[Load], shift_ns: i64) -> Option<f64> {
    let inside = within(samples, loads, shift_ns);
    let error = |sample: &TrueSample| {
        let busy: i64 = loads.iter().map(|load| load.busy(sample.stamp_ns - sample.gap_ns, sample.stamp_ns)).sum();
        (sample.busy - busy as f64 / sample.gap_ns.max(1) as f64).abs()
    };
    let enough = inside.len() >= ENOUGH && inside.len() * 4 >= samples.iter().filter(|sample| sample.busy > 0.0).count();
    enough.then(|| inside.iter().map(error).sum::<f64>() / inside.len() as f64)
}

fn best(samples: &[TrueSample], loads: &[Load], around: &[i64], (reach, step): (i64, i64)) -> Option<(i64, f64)> {
    let tried = around.iter().flat_map(|base| (-reach / step..=reach / step).map(move |n| base + n * step));
    let errors = tried.filter_map(|shift| Some((shift, mean_error(samples, loads, shift)?)));
    errors.min_by(|a, b| a.1.total_cmp(&b.1))
}

/// The rule that samples follow. `wall_less_boot_ns`: the wall clock less the boot clock, for stamps of the latter.
pub fn rules(samples: &[TrueSample], loads: &[Load], wall_less_boot_ns: i64) -> Result<Rules, Unknown> {
    let ahead_of_wall_ns = loads.first().ok_or(Unknown::NoLoads)?.ahead_of_wall_ns;
    if samples.len() < ENOUGH {
        return Err(Unknown::TooFewSamples);
    }
    let clocks = [0, ahead_of_wall_ns, ahead_of_wall_ns.saturating_add(wall_less_boot_ns)];
    let (coarse, _) = best(samples, loads, &clocks, COARSE).ok_or(Unknown::NoClock)?;
    let (shift_ns, mean_error) = best(samples, loads, &[coarse], FINE).ok_or(Unknown::NoClock)?;
    let inside = within(samples, loads, shift_ns);
    let last = |at: i64| loads.iter().filter_map(|load| Some((load.last_on(at)?, load.pid))).max();
    let mut rules = Rules { samples: inside.len(), shift_ns, mean_error, ..Rules::default() };
    for sample in &inside {
        let at = sample.stamp_ns;
        let instant = loads.iter().find(|load| load.is_on(at)).map(|load| load.pid);
        let period = last(at).filter(|(end, _)| *end > at - sample.gap_ns).map(|(_, pid)| pid);
        rules.instant += usize::from(sample.pid == instant);
        rules.period += usize::from(sample.pid == period);
        rules.resident += usize::from(sample.pid == last(at).map(|(_, pid)| pid));
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use devkit::Random;

    const PERIOD: i64 = 167 * MS;
    /// The GPU's timer is this far ahead of the wall clock.
    const AHEAD: i64 = 12_000 * MS;

    /// The wall clock less the boot clock.
    const BOOT: i64 = 90_000_000 * MS;

    /// Two loads that take turns with random pauses, and the samples that a driver with this rule takes of them.
    fn world(rule: fn(&[Load], i64) -> Option<u32>, ahead: i64) -> (Vec<Load>, Vec<TrueSample>) {
        let (mut random, mut at) = (Random(7), 1_000 * MS + AHEAD);
        let mut below = |limit: i64| (random.unit() * limit as f64) as i64;
        let mut loads = [101, 102].map(|pid| Load { pid, ahead_of_wall_ns: AHEAD, slices: Vec::new() }).to_vec();
        while at < 61_000 * MS + AHEAD {
            let load = below(2) as usize;
            let lasts = 3 * MS + below(9 * MS);
            loads[load].slices.push((at, at + lasts));
            at += lasts + below(40 * MS);
        }
        let stamps = (0..350).map(|n| 2_000 * MS + AHEAD + n * PERIOD);
        let sample = |stamp: i64| {
            let busy: i64 = loads.iter().map(|load| load.busy(stamp - PERIOD, stamp)).sum();
            let percent = (busy as f64 / PERIOD as f64 * 100.0).round() / 100.0;
            TrueSample { stamp_ns: stamp - ahead, gap_ns: PERIOD, busy: percent, pid: rule(&loads, stamp) }
        };
        let samples = stamps.map(sample).collect();
        (loads, samples)
    }

    fn instant(loads: &[Load], at: i64) -> Option<u32> {
        loads.iter().find(|load| load.is_on(at)).map(|load| load.pid)
    }

    fn resident(loads: &[Load], at: i64) -> Option<u32> {
        loads.iter().filter_map(|load| Some((load.last_on(at)?, load.pid))).max().map(|(_, pid)| pid)
    }

    #[test]
    fn the_rule_and_the_clock_are_found() {
        for ahead in [0, AHEAD, AHEAD + BOOT] {
            let (loads, samples) = world(instant, ahead);
            let rules = rules(&samples, &loads, BOOT).unwrap();
            assert!((rules.shift_ns - ahead).abs() <= 2 * MS && rules.mean_error < 0.01, "{rules:?}");
            assert!(rules.samples > 300 && rules.instant * 100 >= rules.samples * 95, "{rules:?}");
            assert!(rules.period * 100 < rules.samples * 70, "{rules:?}");
        }
        let (loads, samples) = world(resident, 0);
        let rules = rules(&samples, &loads, BOOT).unwrap();
        assert!(rules.resident * 100 >= rules.samples * 95 && rules.instant * 100 < rules.samples * 60, "{rules:?}");
    }

    #[test]
    fn too_little_data_gives_an_error() {
        let (loads, samples) = world(instant, 0);
        assert_eq!(rules(&samples[..5], &loads, BOOT), Err(Unknown::TooFewSamples));
        assert_eq!(rules(&samples, &[], BOOT), Err(Unknown::NoLoads));
        assert_eq!(rules(&[], &loads, BOOT), Err(Unknown::TooFewSamples));
        let (loads, samples) = world(instant, AHEAD + BOOT / 2);
        assert_eq!(rules(&samples, &loads, BOOT), Err(Unknown::NoClock));
    }

    #[test]
    fn a_load_file_is_read_up_to_where_it_is_cut_off() {
        let load = Load::parse(7, "clock,-5\ns,30,40\ns,10,20\nnonsense\ns,50,6");
        assert_eq!((load.ahead_of_wall_ns, &load.slices[..]), (-5, &[(10, 20), (30, 40)][..]));
        assert!((load.seconds() - 20e-9).abs() < 1e-15);
        assert_eq!((load.busy(15, 35), load.last_on(25), load.last_on(5), load.is_on(35)), (10, Some(20), None, true));
    }
}
