//! The recording as a table: each observation next to the assumption.

use serde_json::Value;

/// Column in which details begin.
const INDENT: usize = 44;

pub fn lines(recording: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut lines = vec![format!(
        "driver {}, {}, {:.0} s polled every {} ms, load: {}",
        text(&recording["driver_version"]),
        text(&recording["card"]),
        recording["seconds"].as_f64().unwrap_or_default(),
        recording["poll_us"].as_u64().unwrap_or_default() / 1000,
        text(&recording["load"]["kind"]),
    )];
    for gpu in items(&recording["gpus"]) {
        lines.push(String::new());
        lines.push(format!("GPU {} {}{}", gpu["index"], text(&gpu["name"]), if gpu["mig"] == true { ", MIG" } else { "" }));
        for finding in items(&gpu["findings"]) {
            let verdict = match finding["agrees"].as_bool() {
                Some(true) => "agrees",
                Some(false) => "DIFFERS",
                None => "",
            };
            lines.push(format!("{verdict:<8}{:<35} {}", text(&finding["about"]), text(&finding["seen"])));
            if finding["agrees"] == false {
                lines.push(format!("{:INDENT$}assumed: {}", "", text(&finding["assumed"])));
            }
        }
        for (call, d) in gpu["calls"].as_object().into_iter().flatten() {
            let ms = |key: &str| d[key].as_f64().unwrap_or_default() / 1e3;
            let errors: Vec<String> = errors(&gpu["errors"][call]).map(|error| format!(", {error}")).collect();
            let durations = format!("50 % {:.3}, 99 % {:.3}, most {:.3} ms", ms("p50_us"), ms("p99_us"), ms("max_us"));
            lines.push(format!("{:8}{call:<36}{durations} of {}{}", "", d["count"], errors.concat()));
        }
        for (call, cost) in gpu["costs"].as_object().into_iter().flatten() {
            lines.push(format!("{:8}{call:<36}{}", "", cost_words(cost)));
        }
        for (call, responses) in gpu["sizes"].as_object().into_iter().flatten() {
            let responses: Vec<String> = items(responses).map(text).collect();
            lines.push(format!("{:8}{:<36}{}", "", format!("{call} without room"), responses.join("; ")));
        }
    }
    let agent = &recording["agent"];
    lines.push(String::new());
    if let Some(problem) = recording["load"]["problem"].as_str() {
        lines.push(format!("the load: {problem}"));
    }
    let loaded = if agent["ebpf_loaded"] == true { "eBPF loaded" } else { "eBPF not loaded" };
    match agent["problem"].as_str() {
        Some(problem) => lines.push(format!("the agent: {problem}")),
        None => lines.push(format!("the agent: {loaded}, kernel mode {}", text(&agent["kernel_mode"]))),
    }
    for (what, key) in [("containers", "pod"), ("unattributed", "reason"), ("time", "state")] {
        for entry in items(&agent[what]) {
            let seconds = entry["seconds"].as_f64().unwrap_or_default();
            let turn = items(&recording["load"]["turns"]).find(|turn| what == "containers" && turn["pod"] == entry["pod"]);
            let demand = turn.and_then(|turn| Some(turn["duty"].as_str()?.parse::<f64>().ok()? * turn["seconds"].as_f64()?));
            let demand = demand.map_or(String::new(), |demand| format!("; the load's demand was {demand:.1} s"));
            let measured = turn.and_then(|turn| turn["measured_seconds"].as_f64());
            let truth = measured.map_or(demand, |measured| format!("; the load measured {measured:.2} s"));
            let name = format!("GPU {} {what} {}", text(&entry["gpu"]), text(&entry[key]));
            lines.push(format!("{:8}{name:<36}{seconds:.2} s{truth}", ""));
        }
    }
    lines.push(format!("without privileges: {}", unprivileged(&recording["unprivileged"])));
    lines
}

/// The durations of a call in both states of the GPU, in microseconds, or its errors.
fn cost_words(cost: &Value) -> String {
    let number = |state: &Value, key: &str| state[key].as_f64().unwrap_or_default();
    let state = |name: &str| {
        let cost = &cost[name];
        let (p50, p99, count) = (number(cost, "p50_us"), number(cost, "p99_us"), number(cost, "count"));
        (count > 0.0).then(|| format!("{name} 50 % {p50:.1}, 99 % {p99:.1} us of {count}"))
    };
    let states: Vec<String> = ["idle", "loaded"].into_iter().filter_map(state).collect();
    states.into_iter().chain(errors(&cost["errors"])).collect::<Vec<_>>().join("; ")
}

/// Each error with its count.
fn errors(counts: &Value) -> impl Iterator<Item = String> {
    counts.as_object().into_iter().flatten().map(|(error, n)| format!("{n} {error}"))
}

fn unprivileged(counts: &Value) -> String {
    if let Some(problem) = counts["problem"].as_str() {
        return problem.to_owned();
    }
    if counts.is_null() {
        return "not recorded".to_owned();
    }
    let count = |key: &str| counts[key].as_u64().unwrap_or_default();
    let mut parts = vec![
        format!("{} samples", count("samples")),
        format!("{} process samples", count("rows")),
        format!("{} of them with a pid", count("rows_with_pid")),
        format!("{} listed", count("listed")),
    ];
    for (call, errors_of_call) in counts["errors"].as_object().into_iter().flatten() {
        parts.extend(errors(errors_of_call).map(|error| format!("{call}: {error}")));
    }
    parts.join(", ")
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_difference_is_printed_with_the_assumption() {
        let finding = |agrees: Value| json!({"about": "grid", "assumed": "learned", "seen": "none", "agrees": agrees});
        let gpu =
            json!({"index": 0, "name": "V100", "findings": [finding(json!(false)), finding(json!(true)), finding(json!(null))]});
        let table = lines(&json!({"gpus": [gpu]})).join("\n");
        assert_eq!(table.matches("assumed: learned").count(), 1, "{table}");
        assert_eq!((table.matches("DIFFERS").count(), table.matches("agrees").count()), (1, 1), "{table}");
    }

    #[test]
    fn costs_are_printed_for_both_states() {
        let cost =
            json!({"idle": {"count": 5, "p50_us": 1.0, "p99_us": 2.0}, "loaded": {"count": 0}, "errors": {"NotSupported": 3}});
        assert_eq!(cost_words(&cost), "idle 50 % 1.0, 99 % 2.0 us of 5; 3 NotSupported");
        assert_eq!(cost_words(&json!({})), "");
        assert_eq!(unprivileged(&Value::Null), "not recorded");
        assert_eq!(unprivileged(&json!({"problem": "refused"})), "refused");
        assert_eq!(
            unprivileged(&json!({"samples": 3, "errors": {"GetProcessUtilization": {"NoPermission": 9}}})),
            "3 samples, 0 process samples, 0 of them with a pid, 0 listed, GetProcessUtilization: 9 NoPermission"
        );
    }

    #[test]
    fn an_empty_recording_does_not_panic() {
        assert!(lines(&json!({})).iter().any(|line| line.contains("eBPF not loaded")));
    }
}
