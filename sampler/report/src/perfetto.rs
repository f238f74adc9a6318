//! Trace events (the JSON format of Chrome's tracing), which ui.perfetto.dev opens.
//!
//! A process for each GPU; in it counters of how busy it is and of its memory, a thread for each user with a slice for each span in
//! which it was active, and a counter of its share. Time is in microseconds since the report's start, whose wall time is in `otherData`.
//!
//! A counter keeps its value until the next one: the format has no "unknown". Where nothing was observed, no values are written, and the
//! first thread of the GPU has a slice that says so.

use serde_json::{Value, json};

use super::bins::known_shares;
use super::model::*;
use super::words::Names;
use sampler_core::units::rfc3339;

/// The thread of what concerns the GPU alone; users follow.
const GPU_THREAD: usize = 0;
/// Of a name, in the counter's: it is repeated in each of its events.
const COUNTER_NAME: usize = 32;

pub fn perfetto(report: &Report) -> String {
    let names = Names::new(report);
    let mut events = Vec::new();
    for (nth, timeline) in report.timelines.iter().enumerate() {
        // Process 0 is the idle task's to trace viewers.
        Track { report, names: &names, timeline, pid: nth + 1 }.write(&mut events);
    }
    let mut out = String::from("{\"displayTimeUnit\":\"ms\",\"otherData\":");
    let about = json!({
        "start": rfc3339(report.start), "node": report.node, "duration_seconds": report.duration_seconds,
        "truncated": report.truncated, "damage": report.damage, "agent_version": report.agent_version,
        // Once, and not with every slice.
        "users": report.users.iter().map(|user| json!({"name": names.of(&user.id), "id": user.id, "image": user.image})).collect::<Vec<_>>(),
    });
    out += &about.to_string();
    out += ",\"traceEvents\":[\n";
    // A line for each: so a broken copy can be repaired, and looked at.
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

    fn name(&self, events: &mut Vec<Value>, what: &str, tid: usize, name: &str, place: usize) {
        let event = |key: String, args: Value| json!({"ph": "M", "pid": self.pid, "tid": tid, "name": key, "args": args});
        events.push(event(format!("{what}_name"), json!({"name": name})));
        events.push(event(format!("{what}_sort_index"), json!({"sort_index": place})));
    }

    fn user(&self, events: &mut Vec<Value>, tid: usize, lane: &Lane) {
        let Some(user) = self.report.users.get(lane.user) else { return };
        let name = self.names.of(&user.id);
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
        // With its number: two names may begin alike, and counters of a process are told apart by name alone.
        self.counter(events, &format!("{tid} {short}"), "share %", &percents);
    }

    fn at(&self, window: usize) -> i64 {
        micros(self.timeline.first_second + window as f64 * self.timeline.window_seconds)
    }

    fn slice(&self, events: &mut Vec<Value>, tid: usize, name: &str, from: usize, to: usize, args: Value) {
        let (ts, end) = (self.at(from), self.at(to));
        events.push(json!({"ph": "X", "pid": self.pid, "tid": tid, "ts": ts, "dur": end - ts, "name": name, "args": args}));
    }

    /// An event where the value changes. Viewers call the track by its name and its unit.
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
        // So that the last value ends with the report.
        if let Some(last) = last {
            events.push(event(values.len(), last));
        }
    }
}

fn hundredths(share: f32) -> i64 {
    (share * 100.0).round() as i64
}

/// Not below zero: viewers drop what comes before their time begins.
fn micros(offset: f64) -> i64 {
    (offset.max(0.0) * 1e6).round() as i64
}

/// Runs of windows for which `is` holds, each with its end.
fn spans<T>(values: &[T], is: impl Fn(&T) -> bool) -> Vec<(usize, usize)> {
    let (mut out, mut from) = (Vec::new(), None);
    for (at, value) in values.iter().enumerate() {
        match (is(value), from) {
            (true, None) => from = Some(at),
            (false, Some(start)) => {
                out.push((start, at));
                from = None;
            }
            _ => {}
        }
    }
    out.extend(from.map(|start| (start, values.len())));
    out
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
    fn spans_are_runs() {
        assert_eq!(spans(&[0, 1, 1, 0, 1], |n| *n == 1), [(1, 3), (4, 5)]);
        assert_eq!(spans(&[1], |n| *n == 0), []);
    }

    #[test]
    fn every_event_is_one_that_viewers_know() {
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
    fn a_user_s_spans_have_its_seconds() {
        let report = sample::report();
        let mine = |event: &Value| event["ph"] == "X" && event["name"].as_str().is_some_and(|name| name.starts_with("serving/"));
        let spans: Vec<_> = events(&report).into_iter().filter(mine).collect();
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
    fn the_largest_stays_below_30_mb() {
        let size = perfetto(&sample::big(8, 64, 600)).len();
        assert!(size < 30_000_000, "{size}");
    }
}
