//! What a driver really answers, recorded: the file that `cargo xtask gpu` writes and the tests replay.
//!
//! A recording names the driver and the card and nothing else of its machine: no UUID, no process's name. Stamps are the driver's own;
//! the times of calls are the machine's boot clock, in microseconds.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context as _, Result, ensure};
use sampler_core::device::Engine;
use sampler_core::observation::{DeviceSample, ProcessSample};
use sampler_core::reconstruct::{RawProcessSample, RawSample, Recovery};
use sampler_core::units::BootNs;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub mod findings;
pub mod stride;
pub mod truth;

pub const FORMAT: u32 = 2;
/// Small enough to lie in the repository.
pub const MOST_BYTES: usize = 200 << 10;
/// The driver's ring, as far as it is known.
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
    /// What loaded the GPUs, and what the agent made of it; `cargo xtask gpu` adds them.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub load: Value,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub agent: Value,
    /// What a user without privileges gets at the same time.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub unprivileged: Value,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecordedGpu {
    pub index: u32,
    pub name: String,
    pub mig: bool,
    /// Samples and their span when the whole ring was first read.
    pub ring: (usize, u64),
    pub calls: BTreeMap<String, Durations>,
    /// What each call costs that the agent makes.
    pub costs: BTreeMap<String, Cost>,
    /// How long the entries of answers are.
    pub strides: BTreeMap<String, stride::Stride>,
    /// Rows that were returned for the first time; of these, the ones of processes that had ended by then.
    pub ended: (u64, u64),
    /// Answers of samples, and of rows, since the stamp of one that is in the ring; of these, the ones that had it again.
    pub again: [(u64, u64); 2],
    /// By which rule samples name processes, from what CUDA loads measured themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<truth::Rules>,
    /// Why no rule is known, if loads were to note their time slices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_rules: Option<String>,
    /// By pid of a CUDA load, the sum of the time slices that it noted, in seconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub slices: BTreeMap<u32, f64>,
    /// Per call, how often each error came; NOT_FOUND is none.
    pub errors: BTreeMap<String, BTreeMap<String, u64>>,
    /// What a question without a buffer was answered, each answer once.
    pub sizes: BTreeMap<String, Vec<String>>,
    /// Processes listed, at most; and how often one's memory was all ones.
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

/// One call, while the GPU was idle and while it worked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cost {
    pub idle: Quantiles,
    pub loaded: Quantiles,
    /// In one answer, at most.
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

/// Answers in full, of as many seconds as there is room for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Raw {
    pub from_boot_us: u64,
    pub polls: Vec<Poll>,
    pub folds: Vec<Fold>,
}

/// One poll: when it began after `from_boot_us`, how long it took, the samples and rows that were newer than all before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Poll(pub u64, pub u64, pub Vec<RecordedSample>, pub Vec<RecordedProcess>);

/// Stamp, percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedSample(pub u64, pub u32);

/// Stamp, pid, percent of compute, memory, encoder, decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedProcess(pub u64, pub u32, pub [u32; 4]);

/// Rows asked for across several samples at once: `lastSeen`, the newest sample then known, the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fold(pub u64, pub u64, pub Vec<RecordedProcess>);

/// The value below which `part` of the values lie; the default if there is none.
fn quantile<T: Copy + Default>(sorted: &[T], part: f64) -> T {
    sorted.get(((sorted.len() as f64 - 1.0) * part).round() as usize).copied().unwrap_or_default()
}

/// How many values there are, and of these the median, the 99th percentile and the largest.
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

    pub fn rows(&self) -> impl Iterator<Item = RecordedProcess> {
        self.polls.iter().flat_map(|poll| poll.3.iter().copied())
    }

    /// So many seconds, from just before the first row on: that is where it gets interesting.
    pub fn cut(&self, seconds: f64) -> Self {
        let first = self.polls.iter().find(|poll| !poll.3.is_empty()).map_or(0, |poll| poll.0.saturating_sub(1_000_000));
        let last = self.polls.last().map_or(0, |poll| poll.0);
        let span = (seconds * 1e6) as u64;
        let from = first.min(last.saturating_sub(span));
        let kept: Vec<Poll> = self.polls.iter().filter(|p| (from..from + span).contains(&p.0)).cloned().collect();
        let begun = kept.first().map_or(0, |poll| poll.0);
        let stamps: HashSet<u64> = kept.iter().flat_map(|p| p.2.iter().map(|s| s.0)).collect();
        let folds = self.folds.iter().filter(|fold| stamps.contains(&fold.0) && stamps.contains(&fold.1)).cloned().collect();
        let polls = kept.into_iter().map(|Poll(at, took, samples, rows)| Poll(at - begun, took, samples, rows)).collect();
        Self { from_boot_us: self.from_boot_us + begun, polls, folds }
    }
}

impl Recording {
    /// As JSON within the bound: fewer seconds in full where many GPUs want room.
    pub fn encode(&self) -> Result<String> {
        let mut seconds = 12.0;
        loop {
            let mut small = self.clone();
            for gpu in &mut small.gpus {
                gpu.raw = gpu.raw.cut(seconds);
            }
            let text = serde_json::to_string(&small)?;
            // What is added later fits too.
            if text.len() + 8_192 <= MOST_BYTES {
                return Ok(text);
            }
            seconds *= 0.8;
            ensure!(seconds > 0.2, "{} bytes, however few answers are kept", text.len());
        }
    }

    pub fn parse(text: &str) -> Result<Self> {
        let recording: Self = serde_json::from_str(text)?;
        ensure!(recording.format == FORMAT, "format {} is not {FORMAT}", recording.format);
        Ok(recording)
    }
}

/// What a replay has shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Replayed {
    pub ticks: usize,
    pub queried: usize,
    pub rows: usize,
}

/// Plays a driver that has the recorded samples at the recorded times, and recovers them at that pace. Every sample has to come out
/// once, no tuple twice, and none that was not recorded.
pub fn replay(raw: &Raw, every_us: u64, calls: usize) -> Result<Replayed> {
    let driver = RecordedDriver::new(raw);
    let (Some(first), Some(last)) = (raw.polls.first(), raw.polls.last()) else { return Ok(Replayed::default()) };
    let mut recovery = Recovery::default();
    let (mut ticks, mut rows): (Vec<DeviceSample>, Vec<ProcessSample>) = (Vec::new(), Vec::new());
    // The first read sets the watermark; one poll more than there is to see, for what is late.
    let begin = first.0 + first.1;
    for now_us in (begin..=last.0 + last.1 + 2 * every_us).step_by(every_us as usize) {
        // Boot time 0 is none.
        let now = BootNs((raw.from_boot_us + now_us + 1) * 1000);
        let after = recovery.samples_after(now);
        recovery.samples(&driver.samples(after, now_us), now, now);
        while let Some(after) = recovery.next_process_query(calls) {
            recovery.process_samples(after, &driver.rows(after, now_us));
        }
        let got = recovery.take();
        ensure!(!got.stepped, "the clock is said to have been set at {now_us} us");
        ticks.extend(got.samples);
        rows.extend(got.process_samples);
    }
    let told: HashMap<u64, u32> = driver.samples.iter().map(|(_, s)| (s.0 * 1000, s.1)).collect();
    let mut seen = HashSet::new();
    for tick in &ticks {
        ensure!(seen.insert(tick.at), "{tick:?} twice");
        ensure!(told.get(&tick.at.0) == Some(&tick.busy_percent), "{tick:?} was not recorded so");
    }
    // The ring's first read is one tick, its newest.
    let start = ticks.first().map_or(0, |tick| tick.at.0);
    let wanted = told.keys().filter(|at| **at >= start).count();
    ensure!(ticks.len() == wanted, "{} samples recovered of {wanted}", ticks.len());
    let named: HashSet<(u64, u32)> = driver.rows.iter().map(|(_, row)| (row.0 * 1000, row.1)).collect();
    let stamps: HashSet<u64> = told.keys().copied().collect();
    let mut once = HashSet::new();
    for row in &rows {
        ensure!(once.insert((row.at, row.pid)), "{row:?} twice");
        // One that was folded stands at its tick's stamp, which is its own only where rows have their samples' stamps.
        let recorded = named.contains(&(row.at.0, row.pid)) || stamps.contains(&row.at.0);
        ensure!(recorded, "{row:?} was not recorded");
    }
    Ok(Replayed { ticks: ticks.len(), queried: ticks.iter().filter(|tick| tick.queried).count(), rows: rows.len() })
}

/// Answers as recorded, to questions that were not asked then.
struct RecordedDriver {
    /// From when on they were served.
    samples: Vec<(u64, RecordedSample)>,
    rows: Vec<(u64, RecordedProcess)>,
}

impl RecordedDriver {
    fn new(raw: &Raw) -> Self {
        let served = |poll: &Poll| poll.0 + poll.1;
        let mut samples: Vec<(u64, RecordedSample)> =
            raw.polls.iter().flat_map(|p| p.2.iter().map(move |s| (served(p), *s))).filter(|(_, s)| s.1 <= 100).collect();
        let mut once = HashSet::new();
        samples.retain(|(_, sample)| once.insert(sample.0));
        let mut once = HashSet::new();
        let mut rows: Vec<(u64, RecordedProcess)> =
            raw.polls.iter().flat_map(|p| p.3.iter().map(move |r| (served(p), *r))).collect();
        rows.retain(|(_, row)| once.insert((row.0, row.1)));
        Self { samples, rows }
    }

    fn samples(&self, after: u64, now_us: u64) -> Vec<RawSample> {
        let there: Vec<&RecordedSample> = self.samples.iter().filter(|(served, _)| *served <= now_us).map(|(_, s)| s).collect();
        let held = &there[there.len().saturating_sub(RING)..];
        held.iter().filter(|s| s.0 > after).map(|s| RawSample { at_us: s.0, percent: s.1 }).collect()
    }

    /// One row per pid: the time of its newest sample, the average of all.
    fn rows(&self, after: u64, now_us: u64) -> Vec<RawProcessSample> {
        let mut folded: BTreeMap<u32, (u64, [u32; 4], u32)> = BTreeMap::new();
        for (_, RecordedProcess(at, pid, percent)) in self.rows.iter().filter(|(served, row)| *served <= now_us && row.0 > after)
        {
            let row = folded.entry(*pid).or_insert((0, [0; 4], 0));
            row.0 = row.0.max(*at);
            for (sum, one) in row.1.iter_mut().zip(percent) {
                *sum = sum.saturating_add(*one);
            }
            row.2 += 1;
        }
        let row = |(pid, (at_us, sums, n)): (u32, (u64, [u32; 4], u32))| {
            let mut percent = [0; Engine::ALL.len()];
            for (one, sum) in percent.iter_mut().zip(sums) {
                *one = sum / n;
            }
            RawProcessSample { at_us, pid, percent }
        };
        folded.into_iter().map(row).collect()
    }
}

/// Every recording in a folder, by name; none where there is no folder.
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
