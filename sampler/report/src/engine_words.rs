//! Sentences about serving engines, which all formats share. Names are as they were recorded: a format escapes them.

use super::engine_model::{EngineReport, GaugeSummary, LatencyContrast, LatencyKind, LatencyReport, LatencySide};
use super::model::UserReport;
use super::words;

pub fn latency(kind: LatencyKind) -> &'static str {
    match kind {
        LatencyKind::TimeToFirstToken => "time to first token",
        LatencyKind::TimePerOutputToken => "time per output token",
        LatencyKind::QueueTime => "time in the queue",
    }
}

/// As `180 ms`, `8.30 ms`, `1.25 s`.
pub fn duration(seconds: f64) -> String {
    let ms = seconds * 1e3;
    match ms.abs() {
        size if size >= 1e3 => format!("{seconds:.2} s"),
        size if size >= 100.0 => format!("{ms:.0} ms"),
        size if size >= 10.0 => format!("{ms:.1} ms"),
        _ => format!("{ms:.2} ms"),
    }
}

fn side(side: &LatencySide) -> String {
    match (side.mean_seconds, side.stderr_seconds) {
        (Some(mean), Some(stderr)) => format!("{} ± {}", duration(mean), duration(stderr)),
        (Some(mean), None) => duration(mean),
        (None, _) => "unknown".into(),
    }
}

fn basis(contrast: &LatencyContrast) -> String {
    let [without, with] = [contrast.without.intervals, contrast.with.intervals];
    let changes = words::counted(contrast.changes as usize, "change", "changes");
    format!("{without} and {with} intervals, {changes}")
}

/// As `vllm, port 8000: 61 readings`.
pub fn head(engine: &EngineReport) -> String {
    let port = if engine.port == 0 { String::new() } else { format!(", port {}", engine.port) };
    let readings = words::counted(engine.readings as usize, "reading", "readings");
    let failed = if engine.failed_readings == 0 { String::new() } else { format!(", {} of them failed", engine.failed_readings) };
    format!("{}{port}: {readings}{failed}", engine.engine)
}

/// The requests at the readings; `None` if the engine does not report them.
pub fn requests(engine: &EngineReport) -> Option<String> {
    let part = |what: &str, gauge: Option<GaugeSummary>| {
        gauge.map(|gauge| format!("{} {what} (at most {})", words::number(gauge.mean), words::number(gauge.max)))
    };
    let parts: Vec<String> = part("waiting", engine.waiting).into_iter().chain(part("running", engine.running)).collect();
    (!parts.is_empty()).then(|| format!("requests: {}", parts.join(", ")))
}

pub fn mean(report: &LatencyReport) -> String {
    let unit = if report.latency == LatencyKind::TimePerOutputToken { ("value", "values") } else { ("request", "requests") };
    let count = words::counted(report.count.round() as usize, unit.0, unit.1);
    format!("{}: {} over {count}", latency(report.latency), duration(report.mean_seconds))
}

pub fn contrast(contrast: &LatencyContrast, other: &str) -> String {
    let interval = contrast.interval.map(|[low, high]| format!("; difference {} to {} (95 %)", duration(low), duration(high)));
    let why_not = if contrast.is_longer { String::new() } else { format!("; not claimed: {}", contrast.why_not) };
    format!(
        "{} without, {} with {other} ({}){}{why_not}",
        side(&contrast.without),
        side(&contrast.with),
        basis(contrast),
        interval.unwrap_or_default()
    )
}

/// `None` if the latency is not longer with the other user.
pub fn finding(
    victim: &UserReport,
    other: &str,
    engine: &EngineReport,
    kind: LatencyKind,
    contrast: &LatencyContrast,
) -> Option<String> {
    let (without, with) = (contrast.without.mean_seconds?, contrast.with.mean_seconds?);
    let [low, high] = contrast.interval.filter(|_| contrast.is_longer)?;
    Some(format!(
        "{} of {}, as its engine {} reports it: {} without, {} with {other}. It is {} to {} longer (95 % interval; {}).",
        capitalized(latency(kind)),
        victim.display_name(),
        engine.engine,
        duration(without),
        duration(with),
        duration(low),
        duration(high),
        basis(contrast),
    ))
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_three_digits() {
        for (seconds, expect) in [(0.18, "180 ms"), (0.0083, "8.30 ms"), (1.25, "1.25 s"), (0.0, "0.00 ms"), (0.0456, "45.6 ms")]
        {
            assert_eq!(duration(seconds), expect);
        }
    }
}
