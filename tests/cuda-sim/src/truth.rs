//! Prints the truth of waiting: the records of each process, joined with the spans in which processes were on the GPUs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use cuda_sim::gpu::{self, Gpu};
use cuda_sim::wait_log::{OF_CALLER, OF_LIBRARY, folder};
use cuda_sim::waits::Record;
use nvidia_ml_sim::follow::Follower;
use nvidia_ml_sim::time;
use nvidia_ml_sim::world::World;
use serde::Serialize;

/// PID and start time.
type Identity = (u32, u64);

#[derive(Serialize)]
struct Truth {
    from: String,
    to: String,
    processes: Vec<ProcessTruth>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct ProcessTruth {
    pid: u32,
    start_time: u64,
    wait_some_seconds: f64,
    wait_total_seconds: f64,
    /// `wait_some_seconds` by the caller's clock.
    caller_some_seconds: f64,
    calls: u64,
    gpu_seconds: f64,
    #[serde(rename = "while")]
    during: Vec<During>,
}

/// A process that was on the GPU during the waiting.
#[derive(Debug, PartialEq, Serialize)]
struct During {
    pid: u32,
    start_time: u64,
    seconds: f64,
}

/// A process's span on a GPU, microseconds.
#[derive(Clone, Copy, Debug)]
struct OnGpu {
    from_us: u64,
    to_us: u64,
    process: Identity,
}

/// The records of each process.
type Records = BTreeMap<Identity, Vec<Record>>;

#[derive(Default)]
struct Waits {
    of_library: Records,
    of_caller: Records,
}

/// The spans of each GPU, in the order of time.
type Spans = BTreeMap<usize, Vec<OnGpu>>;

/// The time of the report, microseconds.
#[derive(Clone, Copy, Debug)]
struct Range {
    from_us: u64,
    to_us: u64,
}

impl Range {
    /// The part of a span that lies within, microseconds.
    fn within_us(self, from_us: f64, to_us: f64) -> f64 {
        (to_us.min(self.to_us as f64) - from_us.max(self.from_us as f64)).max(0.0)
    }

    /// The part of a record that lies within.
    fn part_of(self, record: &Record) -> f64 {
        let (from_us, to_us) = (record.from_ns as f64 / 1e3, record.to_ns as f64 / 1e3);
        if to_us > from_us { self.within_us(from_us, to_us) / (to_us - from_us) } else { 0.0 }
    }
}

pub fn print(dir: &Path, from: Option<u64>, to: Option<u64>) -> anyhow::Result<()> {
    for gpu in Gpu::open_all(dir)? {
        gpu.flush()?;
    }
    let now_us = gpu::now_ns() / 1_000;
    let range = Range { from_us: from.unwrap_or(0), to_us: to.unwrap_or(now_us).min(now_us) };
    let mut log = Follower::new(dir, &World::read(dir)?)?;
    log.read()?;
    let waits = Waits { of_library: records(dir, OF_LIBRARY)?, of_caller: records(dir, OF_CALLER)? };
    let processes = join(&spans(&log), &waits, range);
    let truth = Truth { from: time::format(range.from_us), to: time::format(range.to_us), processes };
    println!("{}", serde_json::to_string_pretty(&truth)?);
    Ok(())
}

fn spans(log: &Follower) -> Spans {
    let mut spans = Spans::new();
    for load in log.loads.iter().filter(|load| load.ways.scheduled) {
        let process = (load.pid, load.start_time);
        let on_gpu = load.ways.ran.iter().map(|ran| OnGpu { from_us: ran.0, to_us: ran.1, process });
        spans.entry(load.gpu).or_default().extend(on_gpu);
    }
    spans.values_mut().for_each(|list| list.sort_unstable_by_key(|span| span.from_us));
    spans
}

fn records(dir: &Path, measured: &str) -> anyhow::Result<Records> {
    let folder = folder(dir, measured);
    let mut records = Records::new();
    if !folder.exists() {
        return Ok(records);
    }
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('-'));
        let identity = name.and_then(|(pid, start)| Some((pid.parse().ok()?, start.parse().ok()?)));
        let identity: Identity = identity.with_context(|| format!("{}: the name is not PID-STARTTIME", path.display()))?;
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        // A process may be killed while it writes its last line.
        records.insert(identity, text.lines().filter_map(Record::parse).collect());
    }
    Ok(records)
}

fn join(spans: &Spans, waits: &Waits, range: Range) -> Vec<ProcessTruth> {
    let mut processes: BTreeMap<Identity, ProcessTruth> = BTreeMap::new();
    let new = |(pid, start_time): Identity| ProcessTruth { pid, start_time, ..ProcessTruth::default() };
    for span in spans.values().flatten() {
        let process = processes.entry(span.process).or_insert_with(|| new(span.process));
        process.gpu_seconds += range.within_us(span.from_us as f64, span.to_us as f64) / 1e6;
    }
    for (identity, records) in &waits.of_library {
        let process = processes.entry(*identity).or_insert_with(|| new(*identity));
        let mut during = BTreeMap::new();
        for record in records {
            add(process, &mut during, record, spans, range);
        }
        let one = |((pid, start_time), seconds): (Identity, f64)| During { pid, start_time, seconds };
        process.during = during.into_iter().map(one).collect();
    }
    for (identity, records) in &waits.of_caller {
        let process = processes.entry(*identity).or_insert_with(|| new(*identity));
        for record in records {
            process.caller_some_seconds += record.some_ns as f64 / 1e9 * range.part_of(record);
        }
    }
    processes.into_values().collect()
}

/// Adds the part of a record that lies in the range; a call counts when it returns. Short calls that share a record are spread over it.
fn add(process: &mut ProcessTruth, during: &mut BTreeMap<Identity, f64>, record: &Record, spans: &Spans, range: Range) {
    let (from_us, to_us) = (record.from_ns as f64 / 1e3, record.to_ns as f64 / 1e3);
    let part = range.part_of(record);
    process.wait_some_seconds += record.some_ns as f64 / 1e9 * part;
    process.wait_total_seconds += record.total_ns as f64 / 1e9 * part;
    if to_us >= range.from_us as f64 && to_us < range.to_us as f64 {
        process.calls += record.calls;
    }
    if part == 0.0 {
        return;
    }
    let density = record.some_ns as f64 / 1e3 / (to_us - from_us);
    let clipped = Range { from_us: range.from_us.max(from_us as u64), to_us: range.to_us.min(to_us as u64) };
    for (_, list) in spans.iter().filter(|(gpu, _)| record.gpus & 1 << **gpu != 0) {
        let first = list.partition_point(|span| span.to_us <= clipped.from_us);
        for span in list.iter().skip(first).take_while(|span| span.from_us < clipped.to_us) {
            let seconds = clipped.within_us(span.from_us as f64, span.to_us as f64) / 1e6 * density;
            *during.entry(span.process).or_default() += seconds;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_joined_with_the_processes_on_the_gpu() {
        let on = |from_us, to_us, pid| OnGpu { from_us, to_us, process: (pid, 1) };
        let spans =
            Spans::from([(0, vec![on(0, 2_000, 7), on(2_000, 4_000, 8), on(6_000, 8_000, 7)]), (1, vec![on(0, 9_000, 9)])]);
        let record = |from_us: u64, to_us: u64, some_us: u64, calls| Record {
            from_ns: from_us * 1_000,
            to_ns: to_us * 1_000,
            some_ns: some_us * 1_000,
            total_ns: some_us * 2_000,
            calls,
            gpus: 1,
        };
        let waits = Waits {
            of_library: Records::from([((8, 1), vec![record(1_000, 4_000, 3_000, 1), record(6_000, 8_000, 500, 10)])]),
            of_caller: Records::from([((8, 1), vec![record(500, 4_500, 4_000, 1)])]),
        };
        let check = |from_us, to_us, some: f64, calls, expect: &[(u32, f64)]| {
            let processes = join(&spans, &waits, Range { from_us, to_us });
            let waiter = processes.iter().find(|process| process.pid == 8).unwrap();
            let during: Vec<(u32, f64)> = waiter.during.iter().map(|one| (one.pid, (one.seconds * 1e6).round())).collect();
            assert_eq!((waiter.calls, &during[..]), (calls, expect));
            assert!((waiter.wait_some_seconds - some).abs() < 1e-9 && (waiter.wait_total_seconds - 2.0 * some).abs() < 1e-9);
        };
        check(0, 10_000, 0.003_5, 11, &[(7, 1_500.0), (8, 2_000.0)]);
        check(0, 3_000, 0.002, 0, &[(7, 1_000.0), (8, 1_000.0)]);
        check(7_000, 8_001, 0.000_25, 10, &[(7, 250.0)]);
        let caller = |to_us| join(&spans, &waits, Range { from_us: 0, to_us })[1].caller_some_seconds;
        assert_eq!((caller(10_000), caller(2_500)), (0.004, 0.002));
        assert_eq!(join(&spans, &Waits::default(), Range { from_us: 0, to_us: 1_000 }).len(), 3);
    }
}
