//! Recorded responses of a real driver: the file that `cargo xtask gpu` writes and the tests replay.
//!
//! A recording contains the driver's version and the card's name and nothing else of its machine: no UUID, no process name. Time stamps
//! are the driver's own; call times are on the machine's boot clock, in microseconds.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context as _, Result, ensure};
use sampler_core::observation::{DeviceSample, ProcessSample};
use sampler_core::reconstruct::{RawProcessSample, RawSample, Recovery};
use sampler_core::units::BootNs;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub mod findings;
pub mod stride;
pub mod truth;

pub const FORMAT: u32 = 2;
/// Small enough for the repository.
pub const MOST_BYTES: usize = 200 << 10;
/// Known size of the driver's sample buffer.
const RING: usize = 72;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recording {
    pub format: u32,
    pub driver_version: String,
    pub nvml_version: String,
    pub card: String,
    pub seconds: f64,
    pub poll_us: u64,
    pub gpus: Vec<RecordedGpu>,
    /// The loads on the GPUs, and what the agent measured meanwhile; `cargo xtask gpu` adds both.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub load: Value,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub agent: Value,
    /// Responses to a user without privileges, of the same time.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub unprivileged: Value,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecordedGpu {
    pub index: u32,
    pub name: String,
    pub mig: bool,
    /// Number of samples and their span when the whole sample buffer was first read.
    pub ring: (usize, u64),
    pub calls: BTreeMap<String, Durations>,
    /// Durations of each call that the agent makes.
    pub costs: BTreeMap<String, Cost>,
    /// Lengths of the entries in responses.
    pub strides: BTreeMap<String, stride::Stride>,
    /// Process samples returned for the first time; of these, those of processes that had ended by then.
    pub ended: (u64, u64),
    /// Responses with samples, and with process samples, newer than the stamp of one in the buffer; of these, those that contained it
    /// again.
    pub again: [(u64, u64); 2],
    /// The rule by which samples name processes, from the CUDA loads' own measurements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<truth::Rules>,
    /// Why no rule is known, if loads were to record their time slices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_rules: Option<String>,
    /// By pid of a CUDA load, the sum of its time slices, in seconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub slices: BTreeMap<u32, f64>,
    /// Per call, the number of each error; NOT_FOUND does not count.
    pub errors: BTreeMap<String, BTreeMap<String, u64>>,
    /// Responses to calls without a buffer, each once.
    pub sizes: BTreeMap<String, Vec<String>>,
    /// Largest number of listed processes, and how often the memory of one was all ones.
    pub listed: (usize, u64),
    /// Wall clock less boot clock, at the begin and at the end.
    pub wall_less_boot_us: (u64, u64),
    pub findings: Vec<findings::Finding>,
    pub raw: Raw,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Durations {
    pub count: usize,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

/// Durations of one call, while the GPU was idle and while it was busy.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cost {
    pub idle: Quantiles,
    pub loaded: Quantiles,
    /// Most entries in one response.
    pub entries: usize,
    pub errors: BTreeMap<String, u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    pub count: usize,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
}

/// Complete responses, of a minute or as many seconds as fit.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Raw {
    pub from_boot_us: u64,
    pub polls: Vec<Poll>,
    pub folds: Vec<Fold>,
}

/// One poll: begin after `from_boot_us`, duration, and the samples and process samples newer than all before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Poll(pub u64, pub u64, pub Vec<RecordedSample>, pub Vec<RecordedProcess>);

/// Stamp, percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedSample(pub u64, pub u32);

/// Stamp, pid, percent of compute, memory, encoder, decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedProcess(pub u64, pub u32, pub [u32; 4]);

/// Process samples requested across several samples at once: `lastSeen`, the newest sample known then, the response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fold(pub u64, pub u64, pub Vec<RecordedProcess>);

/// The value below which the share `part` of the values lies; the default if there are no values.
fn quantile<T: Copy + Default>(sorted: &[T], part: f64) -> T {
    sorted.get(((sorted.len() as f64 - 1.0) * part).round() as usize).copied().unwrap_or_default()
}

/// The number of values, and of these the median, the 99th percentile and the largest.
fn summary(mut values: Vec<u64>) -> (usize, [u64; 3]) {
    values.sort_unstable();
    (values.len(), [0.5, 0.99, 1.0].map(|part| quantile(&values, part)))
}

impl Durations {
    pub fn of(us: Vec<u64>) -> Self {
        let (count, [p50_us, p99_us, max_us]) = summary(us);
        Self { count, p50_us, p99_us, max_us }
    }
}

impl Quantiles {
    pub fn of_ns(ns: Vec<u64>) -> Self {
        let (count, quantiles) = summary(ns);
        // Tenths of microseconds: more is noise.
        let [p50_us, p99_us, max_us] = quantiles.map(|ns| (ns as f64 / 100.0).round() / 10.0);
        Self { count, p50_us, p99_us, max_us }
    }
}

impl Raw {
    pub fn samples(&self) -> impl Iterator<Item = RecordedSample> {
        self.polls.iter().flat_map(|poll| poll.2.iter().copied())
    }

    pub fn process_samples(&self) -> impl Iterator<Item = RecordedProcess> {
        self.polls.iter().flat_map(|poll| poll.3.iter().copied())
    }

    /// The given number of seconds, from one second before the first process sample on.
    pub fn cut(&self, seconds: f64) -> Self {
        let first = self.polls.iter().find(|poll| !poll.3.is_empty()).map_or(0, |poll| poll.0.saturating_sub(1_000_000));
        let last = self.polls.last().map_or(0, |poll| poll.0);
        let span = (seconds * 1e6) as u64;
        let from = first.min(last.saturating_sub(span));
        let kept: Vec<Poll> = self.polls.iter().filter(|p| (from..from + span).contains(&p.0)).cloned().collect();
        let begun = kept.first().map_or(0, |poll| poll.0);
        let stamps: HashSet<u64> = kept.iter().flat_map(|p| p.2.iter().map(|s| s.0)).collect();
        let folds = self.folds.iter().filter(|fold| stamps.contains(&fold.0) && stamps.contains(&fold.1)).cloned().collect();
        let polls = kept.into_iter().map(|Poll(at, took, samples, rest)| Poll(at - begun, took, samples, rest)).collect();
        Self { from_boot_us: self.from_boot_us + begun, polls, folds }
    }
}

impl Recording {
    /// As JSON within the size limit: with many GPUs, fewer seconds are kept completely.
    pub fn encode(&self) -> Result<String> {
        let mut seconds = 60.0;
        loop {
            let mut small = self.clone();
            for gpu in &mut small.gpus {
                gpu.raw = gpu.raw.cut(seconds);
            }
            let text = serde_json::to_string(&small)?;
            // Leaves room for what is added later.
            if text.len() + 8_192 <= MOST_BYTES {
                return Ok(text);
            }
            seconds *= 0.8;
            ensure!(seconds > 0.2, "{} bytes, even with few responses", text.len());
        }
    }

    pub fn parse(text: &str) -> Result<Self> {
        let recording: Self = serde_json::from_str(text)?;
        ensure!(recording.format == FORMAT, "format {} is not {FORMAT}", recording.format);
        Ok(recording)
    }
}

/// Result of a replay.
#[derive(Clone, Copy, Debug, Default)]
pub struct Replayed {
    pub samples: usize,
    pub queried: usize,
    pub process_samples: usize,
}

/// Replays a driver with the recorded samples at the recorded times, and reconstructs them at this pace. Fails unless every sample is
/// reconstructed exactly once, no process sample twice, and none that was not recorded.
pub fn replay(raw: &Raw, average: Average, every_us: u64, calls: usize) -> Result<Replayed> {
    let driver = RecordedDriver::new(raw, average);
    let (Some(first), Some(last)) = (raw.polls.first(), raw.polls.last()) else { return Ok(Replayed::default()) };
    let mut recovery = Recovery::default();
    let (mut samples, mut processes): (Vec<DeviceSample>, Vec<ProcessSample>) = (Vec::new(), Vec::new());
    // The first read sets the watermark; two polls follow the end, for late samples.
    let begin = first.0 + first.1;
    for now_us in (begin..=last.0 + last.1 + 2 * every_us).step_by(every_us as usize) {
        // Boot time 0 means none.
        let now = BootNs((raw.from_boot_us + now_us + 1) * 1000);
        let after = recovery.samples_after(now);
        recovery.samples(&driver.samples(after, now_us), now, now);
        while let Some(after) = recovery.next_process_query(calls) {
            recovery.process_samples(after, &driver.process_samples(after, now_us));
        }
        let got = recovery.take();
        ensure!(!got.stepped, "a clock change was detected at {now_us} us");
        samples.extend(got.samples);
        processes.extend(got.process_samples);
    }
    let recorded: HashMap<u64, u32> = driver.samples.iter().map(|(_, s)| (s.0 * 1000, s.1)).collect();
    let mut seen = HashSet::new();
    for sample in &samples {
        ensure!(seen.insert(sample.at), "{sample:?} twice");
        ensure!(recorded.get(&sample.at.0) == Some(&sample.busy_percent), "{sample:?} was not recorded so");
    }
    // The first read of the sample buffer gives one sample, its newest.
    let start = samples.first().map_or(0, |sample| sample.at.0);
    let wanted = recorded.keys().filter(|at| **at >= start).count();
    ensure!(samples.len() == wanted, "{} samples reconstructed of {wanted}", samples.len());
    let named: HashSet<(u64, u32)> = driver.process_samples.iter().map(|(_, process)| (process.0 * 1000, process.1)).collect();
    let stamps: HashSet<u64> = recorded.keys().copied().collect();
    let mut once = HashSet::new();
    for process in &processes {
        ensure!(once.insert((process.at, process.pid)), "{process:?} twice");
        // A folded process sample has its sample's stamp, which equals its own only where the driver gives both the same stamp.
        let is_recorded = named.contains(&(process.at.0, process.pid)) || stamps.contains(&process.at.0);
        ensure!(is_recorded, "{process:?} was not recorded");
    }
    let queried = samples.iter().filter(|sample| sample.queried).count();
    Ok(Replayed { samples: samples.len(), queried, process_samples: processes.len() })
}

/// What a process sample over several samples is the average of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Average {
    OverNamed,
    OverAll,
}

/// Responds as recorded, also to queries that were not made then.
struct RecordedDriver {
    average: Average,
    /// With the time from which on they were served.
    samples: Vec<(u64, RecordedSample)>,
    process_samples: Vec<(u64, RecordedProcess)>,
}

impl RecordedDriver {
    fn new(raw: &Raw, average: Average) -> Self {
        let served = |poll: &Poll| poll.0 + poll.1;
        let mut samples: Vec<(u64, RecordedSample)> =
            raw.polls.iter().flat_map(|p| p.2.iter().map(move |s| (served(p), *s))).filter(|(_, s)| s.1 <= 100).collect();
        let mut once = HashSet::new();
        samples.retain(|(_, sample)| once.insert(sample.0));
        let mut once = HashSet::new();
        let mut process_samples: Vec<(u64, RecordedProcess)> =
            raw.polls.iter().flat_map(|p| p.3.iter().map(move |r| (served(p), *r))).collect();
        process_samples.retain(|(_, process)| once.insert((process.0, process.1)));
        Self { average, samples, process_samples }
    }

    fn samples(&self, after: u64, now_us: u64) -> Vec<RawSample> {
        let known: Vec<&RecordedSample> = self.samples.iter().filter(|(served, _)| *served <= now_us).map(|(_, s)| s).collect();
        let held = &known[known.len().saturating_sub(RING)..];
        held.iter().filter(|s| s.0 > after).map(|s| RawSample { at_us: s.0, percent: s.1 }).collect()
    }

    /// One process sample per pid: the time of its newest one, the average.
    fn process_samples(&self, after: u64, now_us: u64) -> Vec<RawProcessSample> {
        let mut folded: BTreeMap<u32, (u64, [u32; 4], u32)> = BTreeMap::new();
        let served = self.process_samples.iter().filter(|(served, process)| *served <= now_us && process.0 > after);
        let all = self.samples(after, now_us).len() as u32;
        for (_, RecordedProcess(at, pid, percent)) in served {
            let entry = folded.entry(*pid).or_insert((0, [0; 4], 0));
            entry.0 = entry.0.max(*at);
            for (sum, one) in entry.1.iter_mut().zip(percent) {
                *sum = sum.saturating_add(*one);
            }
            entry.2 += 1;
        }
        let average = |(pid, (at_us, sums, n)): (u32, (u64, [u32; 4], u32))| {
            let mut percent = [0; _];
            for (one, sum) in percent.iter_mut().zip(sums) {
                *one = sum / if self.average == Average::OverAll { all.max(1) } else { n };
            }
            RawProcessSample { at_us, pid, percent }
        };
        folded.into_iter().map(average).collect()
    }
}

/// Every recording in a folder, by name; none if the folder does not exist.
pub fn all_in(folder: &std::path::Path) -> Result<Vec<(String, Recording)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "json") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path).with_context(|| name.clone())?;
            ensure!(text.len() <= MOST_BYTES, "{name}: {} bytes are more than {MOST_BYTES}", text.len());
            found.push((name.clone(), Recording::parse(&text).context(name)?));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}
