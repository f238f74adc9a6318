//! The data of the script: shares and waiting in percent and memory in MiB, each series one string of runs.
//!
//! `-x3 0x12 49 48 .4`: three unknown windows, twelve of 0, one of 49, one of 48, and one above zero that would round to 0.

use serde_json::{Value, json};

use super::super::bins;
use super::super::layout::terminal_safe;
use super::super::model::*;
use super::super::words::{self, Names};

/// Maximum number of windows per GPU: more than a screen has columns.
const WINDOWS: usize = 3600;

/// JSON that is safe inside a script element.
pub fn embedded(report: &Report, names: &Names, colours: &[usize]) -> String {
    let users = report.users.iter().zip(colours).map(|(user, colour)| json!({"name": names.get(&user.id), "colour": colour}));
    let data = json!({
        "start": report.start.0 / 1_000_000,
        "saturation": report.saturation_ratio * 100.0,
        "users": users.collect::<Vec<_>>(),
        "timelines": report.timelines.iter().map(|timeline| timeline_data(report, timeline)).collect::<Vec<_>>(),
    });
    // `<` occurs only in strings; without it, no element can begin or end here.
    data.to_string().replace('<', "\\u003c")
}

fn timeline_data(report: &Report, timeline: &Timeline) -> Value {
    let n = timeline.busy.len().min(WINDOWS);
    let each = timeline.window_seconds * timeline.busy.len() as f64 / n.max(1) as f64;
    let usage = |lane: &Lane| {
        let user = report.users.get(lane.user)?;
        user.gpus.iter().find(|usage| usage.uuid == timeline.uuid)
    };
    let mut lanes: Vec<(&Lane, f64)> =
        timeline.lanes.iter().map(|lane| (lane, usage(lane).map_or(0.0, |usage| usage.gpu_seconds))).collect();
    lanes.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    let lanes = lanes.iter().map(|(lane, seconds)| {
        // Empty without probes.
        let waits = (!lane.waits.is_empty()).then(|| shares(&bins::means(&lane.waits, n)));
        let waited = report.users.get(lane.user).and_then(|user| user.waits.as_ref());
        json!({
            "user": lane.user, "total": words::seconds(*seconds),
            "waits": waits, "waited": waited.map(|waits| words::seconds(waits.wait_seconds)),
            "shares": shares(&bins::means(&bins::known_shares(timeline, lane), n)),
            "memory": memory(&bins::peaks(&lane.memory, n)),
        })
    });
    let peak = timeline.lanes.iter().flat_map(|lane| &lane.shares).copied().fold(0.0, f32::max);
    json!({
        "name": words::gpu_name(report, &timeline.uuid),
        "first": timeline.first_second, "window": each, "n": n,
        "busy": shares(&bins::means(&timeline.busy, n)),
        "memory": memory(&bins::peaks(&timeline.memory, n)),
        "peak": peak * 100.0,
        "lanes": lanes.collect::<Vec<_>>(),
        "marks": timeline.marks.iter().map(|(offset, mark)| json!([offset, terminal_safe(mark)])).collect::<Vec<_>>(),
    })
}

fn shares(values: &[Option<f32>]) -> String {
    runs(values.iter().map(|share| {
        share.map(|share| match (share * 100.0).round() {
            0.0 if share > 0.0 => ".4".to_owned(),
            percent => percent.to_string(),
        })
    }))
}

fn memory(values: &[Option<u64>]) -> String {
    runs(values.iter().map(|bytes| bytes.map(|bytes| (bytes >> 20).to_string())))
}

fn runs(values: impl Iterator<Item = Option<String>>) -> String {
    let values: Vec<String> = values.map(|value| value.unwrap_or_else(|| "-".to_owned())).collect();
    let run = |run: &[String]| match run.len() {
        1 => run[0].clone(),
        n => format!("{}x{n}", run[0]),
    };
    values.chunk_by(String::eq).map(run).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_encoded_as_runs() {
        let values = [None, None, Some(0.0), Some(0.001), Some(0.486), Some(0.489), Some(1.0)];
        assert_eq!(shares(&values), "-x2 0 .4 49x2 100");
        assert_eq!(shares(&[]), "");
        assert_eq!(memory(&[Some(5 << 20), Some(5 << 20), None]), "5x2 -");
    }
}
