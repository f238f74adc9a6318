//! Trace events (the JSON format of Chrome's tracing), which ui.perfetto.dev opens.
//!
//! Each GPU is a process with counters of its busy share and memory. Each of its users is a thread with a slice for each span of activity,
//! and a counter of its share. Each serving engine is a process with a counter of each of its metrics. The waiting of all users is one
//! process, with a counter of each. Times are in microseconds since the start of the report; `otherData` has the wall time of the start.
//!
//! A counter keeps its value until the next event: the format has no "unknown". In unobserved time, no values are written, and the first
//! thread of the GPU has a slice `not observed`.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::bins::known_shares;
use super::engine_model::EngineReport;
use super::model::*;
use super::words::Names;
use sampler_core::units::rfc3339;

/// The thread for events of the GPU itself; the threads of users follow.
const GPU_THREAD: usize = 0;
/// Length of user names in counter names, which are repeated in each event.
const COUNTER_NAME: usize = 32;

pub fn perfetto(report: &Report) -> String {
    let names = Names::new(report);
    let mut events = Vec::new();
    for (nth, timeline) in report.timelines.iter().enumerate() {
        // Trace viewers treat process 0 as the idle task.
        Track { report, names: &names, timeline, pid: nth + 1 }.write(&mut events);
    }
    let n_engines: usize = report.users.iter().map(|user| user.engines.len()).sum();
    write_waits(report, &names, report.timelines.len() + n_engines + 1, &mut events);
    let engines = report.users.iter().flat_map(|user| user.engines.iter().map(move |engine| (user, engine)));
    for (nth, (user, engine)) in engines.enumerate() {
        write_engine(&names.get(&user.id), engine, report.timelines.len() + nth + 1, &mut events);
    }
    let mut out = String::from("{\"displayTimeUnit\":\"ms\",\"otherData\":");
    let about = json!({
        "start": rfc3339(report.start), "node": report.node, "duration_seconds": report.duration_seconds,
        "truncated": report.truncated, "damage": report.damage, "agent_version": report.agent_version,
        // Once, not in each slice.
        "users": report.users.iter().map(|user| json!({"name": names.get(&user.id), "id": user.id, "image": user.image})).collect::<Vec<_>>(),
    });
    out += &about.to_string();
    out += ",\"traceEvents\":[\n";
    // One line per event, so that a damaged copy can be read and repaired.
    out += &events.iter().map(Value::to_string).collect::<Vec<_>>().join(",\n");
    out += "\n]}\n";
    out
}

struct Track<'a> {
    report: &'a Report,
    names: &'a Names,
    timeline: &'a Timeline,
    pid: usize,
}

impl Track<'_> {
    fn write(&self, events: &mut Vec<Value>) {
        let timeline = self.timeline;
        self.name(events, "process", GPU_THREAD, &self.gpu_name(), self.pid);
        self.name(events, "thread", GPU_THREAD, "GPU", GPU_THREAD);
        let busy: Vec<Option<i64>> = timeline.busy.iter().map(|share| share.map(hundredths)).collect();
        self.counter(events, "busy", "%", &busy);
        let mib: Vec<Option<i64>> = timeline.memory.iter().map(|bytes| bytes.map(|bytes| (bytes >> 20) as i64)).collect();
        self.counter(events, "memory", "MiB", &mib);
        for (from, to) in spans(&timeline.busy, |share| share.is_none()) {
            self.slice(events, GPU_THREAD, "not observed", from, to, json!({}));
        }
        for (offset, words) in &timeline.marks {
            let ts = micros(*offset);
            events.push(json!({"ph": "i", "s": "p", "pid": self.pid, "tid": GPU_THREAD, "ts": ts, "name": words}));
        }
        for (nth, lane) in timeline.lanes.iter().enumerate() {
            self.user(events, nth + 1, lane);
        }
    }

    fn gpu_name(&self) -> String {
        match self.report.gpu(&self.timeline.uuid) {
            Some(gpu) => format!("GPU {} {} {}", gpu.index, gpu.model, gpu.uuid),
            None => self.timeline.uuid.clone(),
        }
    }

    fn name(&self, events: &mut Vec<Value>, kind: &str, tid: usize, name: &str, position: usize) {
        let event = |key: String, args: Value| json!({"ph": "M", "pid": self.pid, "tid": tid, "name": key, "args": args});
        events.push(event(format!("{kind}_name"), json!({"name": name})));
        events.push(event(format!("{kind}_sort_index"), json!({"sort_index": position})));
    }

    fn user(&self, events: &mut Vec<Value>, tid: usize, lane: &Lane) {
        let Some(user) = self.report.users.get(lane.user) else { return };
        let name = self.names.get(&user.id);
        self.name(events, "thread", tid, &name, tid);
        let shares = known_shares(self.timeline, lane);
        for (from, to) in spans(&shares, |share| share.is_some_and(|share| share > 0.0)) {
            let part = shares.get(from..to).unwrap_or_default();
            let sum: f64 = part.iter().flatten().map(|share| f64::from(*share)).sum();
            let memory = lane.memory.get(from..to).and_then(|part| part.iter().flatten().max());
            let args = json!({
                "share_percent": hundredths((sum / part.len() as f64) as f32),
                "gpu_seconds": (sum * self.timeline.window_seconds * 1e3).round() / 1e3,
                "memory_max_bytes": memory,
            });
            self.slice(events, tid, &name, from, to, args);
        }
        let percents: Vec<Option<i64>> = shares.iter().map(|share| share.map(hundredths)).collect();
        let short: String = name.chars().take(COUNTER_NAME).collect();
        // With the thread number: names may have the same beginning, and counters of a process are distinguished only by name.
        self.counter(events, &format!("{tid} {short}"), "share %", &percents);
    }

    fn at(&self, window: usize) -> i64 {
        micros(self.timeline.first_second + window as f64 * self.timeline.window_seconds)
    }

    fn slice(&self, events: &mut Vec<Value>, tid: usize, name: &str, from: usize, to: usize, args: Value) {
        let (ts, end) = (self.at(from), self.at(to));
        events.push(json!({"ph": "X", "pid": self.pid, "tid": tid, "ts": ts, "dur": end - ts, "name": name, "args": args}));
    }

    /// Writes an event where the value changes. Viewers name the track by name and unit.
    fn counter(&self, events: &mut Vec<Value>, name: &str, unit: &str, values: &[Option<i64>]) {
        let event =
            |at: usize, value: i64| json!({"ph": "C", "pid": self.pid, "ts": self.at(at), "name": name, "args": {unit: value}});
        let mut last = None;
        for (at, value) in values.iter().enumerate() {
            if let Some(value) = value.filter(|value| Some(*value) != last) {
                events.push(event(at, value));
                last = Some(value);
            }
        }
        // Ends the last value at the end of the report.
        if let Some(last) = last {
            events.push(event(values.len(), last));
        }
    }
}

/// The waiting of each user with wait probes, once: for which of its GPUs a process waits is unknown.
fn write_waits(report: &Report, names: &Names, pid: usize, events: &mut Vec<Value>) {
    let mut users = BTreeSet::new();
    for timeline in &report.timelines {
        let track = Track { report, names, timeline, pid };
        for lane in timeline.lanes.iter().filter(|lane| !lane.waits.is_empty()) {
            let Some(user) = report.users.get(lane.user).filter(|_| users.insert(lane.user)) else { continue };
            if users.len() == 1 {
                track.name(events, "process", GPU_THREAD, "Waiting in blocking calls", pid);
            }
            let short: String = names.get(&user.id).chars().take(COUNTER_NAME).collect();
            let percents: Vec<Option<i64>> = lane.waits.iter().map(|part| part.map(hundredths)).collect();
            track.counter(events, &format!("{} {short}", users.len()), "waited %", &percents);
        }
    }
}

/// The metrics of a serving engine, with an event at each reading. Latencies are means since the reading before, in microseconds, because
/// values are whole numbers.
fn write_engine(user: &str, engine: &EngineReport, pid: usize, events: &mut Vec<Value>) {
    let name = format!("{user} {} :{}", engine.engine, engine.port);
    for (key, args) in [("process_name", json!({"name": name})), ("process_sort_index", json!({"sort_index": pid}))] {
        events.push(json!({"ph": "M", "pid": pid, "tid": 0, "name": key, "args": args}));
    }
    for point in &engine.points {
        let micros_of = |seconds: Option<f64>| seconds.map(|seconds| seconds * 1e6);
        let counters = [
            ("waiting requests", "requests", point.waiting),
            ("running requests", "requests", point.running),
            ("time to first token", "µs", micros_of(point.time_to_first_token)),
            ("time per output token", "µs", micros_of(point.time_per_output_token)),
            ("queue time", "µs", micros_of(point.queue_time)),
        ];
        for (name, unit, value) in counters {
            if let Some(value) = value {
                let ts = micros(point.second);
                events.push(json!({"ph": "C", "pid": pid, "ts": ts, "name": name, "args": {unit: value.round() as i64}}));
            }
        }
    }
}

fn hundredths(share: f32) -> i64 {
    (share * 100.0).round() as i64
}

/// Clamped at zero: viewers drop events with a negative time.
fn micros(offset: f64) -> i64 {
    (offset.max(0.0) * 1e6).round() as i64
}

/// Runs of values for which `matches` holds, as (start, end).
fn spans<T>(values: &[T], matches: impl Fn(&T) -> bool) -> Vec<(usize, usize)> {
    let mut to = 0;
    let span = |run: &[T]| {
        let from = to;
        to += run.len();
        matches(&run[0]).then_some((from, to))
    };
    values.chunk_by(|value, next| matches(value) == matches(next)).filter_map(span).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn events(report: &Report) -> Vec<Value> {
        let trace: Value = serde_json::from_str(&perfetto(report)).unwrap();
        assert_eq!(trace["otherData"]["start"], "2026-05-04T10:00:00.000Z");
        trace["traceEvents"].as_array().unwrap().clone()
    }

    #[test]
    fn spans_are_runs_of_matching_values() {
        assert_eq!(spans(&[0, 1, 1, 0, 1], |n| *n == 1), [(1, 3), (4, 5)]);
        assert_eq!(spans(&[1], |n| *n == 0), []);
    }

    #[test]
    fn every_event_has_a_type_and_fields_that_viewers_support() {
        for event in events(&sample::hostile()) {
            assert!(event["pid"].as_u64().is_some_and(|pid| pid > 0), "{event}");
            match event["ph"].as_str().unwrap() {
                "X" => assert!(event["dur"].as_i64().is_some_and(|dur| dur > 0) && event["tid"].is_u64(), "{event}"),
                "C" => {
                    let value = event["args"].as_object().and_then(|args| args.values().next().cloned());
                    assert!(
                        value.is_some_and(|value| value.is_i64()) && event["ts"].as_i64().is_some_and(|ts| ts >= 0),
                        "{event}"
                    );
                }
                "i" => assert_eq!(event["s"], "p"),
                "M" => assert!(event["args"].is_object()),
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn the_slices_of_a_user_sum_to_its_gpu_seconds() {
        let report = sample::report();
        let of_server =
            |event: &Value| event["ph"] == "X" && event["name"].as_str().is_some_and(|name| name.starts_with("serving/"));
        let spans: Vec<_> = events(&report).into_iter().filter(of_server).collect();
        assert_eq!(spans.len(), 2);
        assert_eq!((spans[0]["ts"].as_i64(), spans[0]["dur"].as_i64()), (Some(15_000_000), Some(15_000_000)));
        let sum: f64 = spans.iter().filter_map(|span| span["args"]["gpu_seconds"].as_f64()).sum();
        assert!((sum - report.users[1].gpus[0].gpu_seconds).abs() < 0.01);
    }

    #[test]
    fn unobserved_time_has_no_values() {
        let all = events(&sample::report());
        assert!(
            all.iter().any(|event| event["name"] == "not observed" && event["ts"] == 33_000_000 && event["dur"] == 4_000_000)
        );
        let inside = |event: &&Value| event["pid"] == 1 && (33_000_000..37_000_000).contains(&event["ts"].as_i64().unwrap_or(0));
        assert_eq!(all.iter().filter(inside).filter(|event| event["ph"] == "C").count(), 0);
    }

    #[test]
    fn the_waiting_of_a_user_is_one_counter() {
        let mut report = sample::report();
        let lane = report.timelines[0].lanes[0].clone();
        report.timelines[1].lanes.push(lane);
        let all = events(&report);
        let values: Vec<&Value> = all.iter().filter(|event| event["args"].get("waited %").is_some()).collect();
        assert_eq!(
            (&values[0]["ts"], &values[0]["name"]),
            (&json!(2_000_000), &json!("1 ml/trainer-0/main")),
            "probed from then"
        );
        assert!(values.iter().all(|event| event["pid"] == 3 && event["name"] == values[0]["name"]), "{values:?}");
        assert!(values.iter().any(|event| event["ts"] == 34_000_000), "probes do not depend on the driver");
    }

    #[test]
    fn the_largest_trace_is_below_40_mb() {
        let size = perfetto(&sample::big(8, 64, 600)).len();
        assert!(size < 40_000_000, "{size}");
    }
}
