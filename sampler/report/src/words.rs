//! The wording that all formats share: numbers with units and errors, times, names, and explanations of evidence.
//!
//! No text claims a slowdown: the GPU time of a user is measured, the progress of its work is not.

use std::collections::HashMap;

use super::engine_words;
use super::layout::terminal_safe;
use super::model::{CauseKind, Contender, Evidence, FreezeEffect, Outcome, Report, Verdict};
use super::wait_words;
use sampler_core::experiment::FreezeConsent;
use sampler_core::units::{WallTime, rfc3339};

/// Separates a number from its unit or error, so that no line breaks there. [`super::layout`] replaces it by a plain space after wrapping.
pub const NB: char = '\u{a0}';

/// Placeholder of an unknown value.
pub const UNKNOWN: &str = "-";

/// `1234.56` as `1,234.6`: one decimal; two below 1.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return UNKNOWN.to_owned();
    }
    let decimals = if value.abs() < 0.995 && value != 0.0 { 2 } else { 1 };
    // An empty sum is -0.0, which adding zero makes 0.0.
    let value = value + 0.0;
    grouped(&format!("{value:.decimals$}"))
}

fn grouped(digits: &str) -> String {
    let (whole, rest) = digits.split_once('.').map_or((digits, String::new()), |(whole, rest)| (whole, format!(".{rest}")));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |whole| ("-", whole));
    let mut out = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    format!("{sign}{out}{rest}")
}

pub fn count(n: usize) -> String {
    grouped(&n.to_string())
}

/// A count with its noun: `1 GPU`, `2 GPUs`.
pub fn counted(n: usize, one: &str, many: &str) -> String {
    format!("{} {}", count(n), if n == 1 { one } else { many })
}

pub fn seconds(value: f64) -> String {
    format!("{}{NB}s", number(value))
}

/// A duration: `42.5 s`, `2 min 05 s`, `2 h 05 min`.
pub fn span(value: f64) -> String {
    let whole = value.round().max(0.0) as u64;
    match whole {
        0..120 => seconds(value),
        120..7200 => format!("{}{NB}min{NB}{:02}{NB}s", whole / 60, whole % 60),
        _ => format!("{}{NB}h{NB}{:02}{NB}min", whole / 3600, whole % 3600 / 60),
    }
}

/// `20.1 ± 0.6`
pub fn with_error(value: f64, stderr: f64) -> String {
    format!("{}{NB}±{NB}{}", number(value), number(stderr))
}

/// A ratio in percent: one decimal below 10 %, none above. A ratio above zero is never shown as `0 %`.
pub fn percent(ratio: f64) -> String {
    format!("{}{NB}%", percent_number(ratio))
}

fn percent_number(ratio: f64) -> String {
    let value = ratio * 100.0;
    match value {
        _ if !value.is_finite() => UNKNOWN.to_owned(),
        0.0 => "0".to_owned(),
        _ if value.abs() < 0.05 => "<0.1".to_owned(),
        _ if value.abs() < 9.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// `49 ± 3.0 %`
pub fn percent_with_error(ratio: Option<f64>, stderr: Option<f64>) -> String {
    match (ratio, stderr) {
        (Some(ratio), Some(stderr)) => format!("{}{NB}±{NB}{}{NB}%", percent_number(ratio), percent_number(stderr)),
        (Some(ratio), None) => percent(ratio),
        (None, _) => UNKNOWN.to_owned(),
    }
}

/// A part of a whole, in percent; unknown if the whole is zero.
pub fn part(part: f64, whole: f64) -> String {
    if whole > 0.0 { percent(part / whole) } else { UNKNOWN.to_owned() }
}

const MIB: f64 = 1024.0 * 1024.0;

pub fn bytes(value: u64) -> String {
    let mib = value as f64 / MIB;
    match value {
        0 => "0".to_owned(),
        _ if mib >= 1024.0 => format!("{:.1}{NB}GiB", mib / 1024.0),
        _ if mib >= 1.0 => format!("{mib:.0}{NB}MiB"),
        _ => format!("{}{NB}B", count(value as usize)),
    }
}

pub fn maybe_bytes(value: Option<u64>) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), bytes)
}

/// The time `offset` seconds after `start`, or before it if negative.
pub fn after(start: WallTime, offset: f64) -> WallTime {
    let ns = (offset.abs() * 1e9).round() as u64;
    WallTime(if offset < 0.0 { start.0.saturating_sub(ns) } else { start.0.saturating_add(ns) })
}

/// `10:00:31`, UTC.
pub fn clock(at: WallTime) -> String {
    rfc3339(after(at, 0.0)).get(11..19).unwrap_or_default().to_owned()
}

/// `10:00:31.250`, UTC.
pub fn clock_millis(at: WallTime) -> String {
    rfc3339(at).get(11..23).unwrap_or_default().to_owned()
}

/// `2026-05-04 10:00:31 UTC`
pub fn date(at: WallTime) -> String {
    let text = rfc3339(at);
    format!("{} {} UTC", text.get(..10).unwrap_or_default(), clock(at))
}

/// `GPU-5a1c0000`: the part of a UUID that distinguishes the GPUs of a machine.
pub fn short_uuid(uuid: &str) -> String {
    let head: String = uuid.chars().take(12).collect();
    terminal_safe(&head)
}

/// `GPU 0`, or `MIG MIG-5a1c0000` of a MIG device; the short UUID of a device that the report lacks.
pub fn gpu_name(report: &Report, uuid: &str) -> String {
    match report.gpu(uuid) {
        Some(gpu) if gpu.gpu_uuid.is_some() => format!("MIG {}", short_uuid(uuid)),
        Some(gpu) => format!("GPU {}", gpu.index),
        None => short_uuid(uuid),
    }
}

/// Host name of the machine, escaped.
pub fn node(name: &str) -> String {
    if name.is_empty() { "an unnamed node".to_owned() } else { terminal_safe(name) }
}

/// Shown if there are no findings.
pub fn no_findings(report: &Report) -> &'static str {
    if wait_words::has_waits(report) {
        "No user was observed to receive less GPU time, or to wait longer in blocking calls, while another user was on."
    } else {
        "No user was observed to receive less GPU time while another user was on."
    }
}

pub fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::RuledOut => "ruled out",
        Verdict::Possible => "possible",
        Verdict::Unknown => "unknown",
    }
}

pub fn cause(cause: CauseKind) -> &'static str {
    match cause {
        CauseKind::GpuClocks => "GPU clocks",
        CauseKind::GpuPower => "GPU power cap",
        CauseKind::GpuThermal => "GPU temperature",
        CauseKind::GpuError => "GPU errors",
        CauseKind::GpuMemory => "GPU memory",
        CauseKind::CpuQuota => "CPU quota",
        CauseKind::CpuPressure => "CPU pressure",
        CauseKind::MemoryPressure => "memory pressure",
        CauseKind::IoPressure => "IO pressure",
    }
}

/// The meaning of a grade of evidence, as a clause.
pub fn meaning(evidence: Evidence) -> &'static str {
    match evidence {
        Evidence::Coactive => {
            "both users were active in the same windows; that one had to wait for the other is possible, but not shown"
        }
        Evidence::OnOffConfirmed => {
            "the user received less GPU time while the contender was on and the GPU saturated, over repeated changes"
        }
        Evidence::DemandConfirmed => {
            "blocking calls of the user took longer while the contender was on, beyond its own work, over repeated changes, or the \
             contender waited for the user: both had work in flight, and the user waited"
        }
        Evidence::ExperimentConfirmed => {
            "the user received more GPU time, waited less or had shorter latencies whenever the contender was frozen, at random times"
        }
    }
}

/// Capitalizes the first letter.
pub fn sentence(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| first.to_uppercase().chain(rest).collect())
}

/// The rates of a user with and without one contender; `None` if no change could be compared.
pub fn rates(contender: &Contender) -> Option<String> {
    let (before, after) = (contender.rate_before?, contender.rate_after?);
    let mut text = format!("{before:.2} GPU-seconds per second while the contender was off, {after:.2} while it was on");
    if let Some([low, high]) = contender.interval {
        let level = contender.interval_level.map(|level| format!("{} ", percent(level))).unwrap_or_default();
        text += &format!("; difference {:.2}, {level}interval {low:.2} to {high:.2}", before - after);
    }
    text += &format!("; {}", counted(contender.transitions as usize, "change", "changes"));
    Some(text)
}

/// As `0.42`, or as `8.30 ms` for an outcome that is a time.
pub fn outcome_value(outcome: Outcome, value: f64) -> String {
    match outcome {
        Outcome::GpuSeconds => format!("{value:.2}"),
        Outcome::CallWait | Outcome::TimeToFirstToken => engine_words::duration(value),
    }
}

/// What a value of the outcome is, to follow the value.
fn outcome_noun(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::GpuSeconds => "GPU-seconds per second",
        Outcome::CallWait => "waited per blocking call",
        Outcome::TimeToFirstToken => "to the first token",
    }
}

/// Why the suspect of an experiment might be frozen.
pub fn consent(consent: FreezeConsent) -> &'static str {
    match consent {
        FreezeConsent::Annotation => "consent by annotation",
        FreezeConsent::Operator => "consent by --i-may-freeze",
    }
}

/// An outcome of the victim while `suspect` was frozen and while it ran; `None` without a burst that counts.
pub fn freeze_means(effect: &FreezeEffect, suspect: &str) -> Option<String> {
    let (frozen, running, p_value) = (effect.mean_frozen?, effect.mean_running?, effect.p_value?);
    let value = |value| outcome_value(effect.outcome, value);
    let mut text = format!(
        "{} {} while {suspect} was frozen, {} while it ran; difference {}",
        value(frozen),
        outcome_noun(effect.outcome),
        value(running),
        value(frozen - running)
    );
    if let Some([low, high]) = effect.interval {
        let level = effect.interval_level.map(|level| format!("{} ", percent(level))).unwrap_or_default();
        text += &format!(", {level}interval {} to {}", value(low), value(high));
    }
    Some(text + &format!("; {}, p = {p_value:.4}", counted(effect.bursts as usize, "burst", "bursts")))
}

/// The grades that are explained: those of every report, and those for which it has the data.
pub fn explained_grades(report: &Report) -> Vec<Evidence> {
    let demand = wait_words::has_waits(report).then_some(Evidence::DemandConfirmed);
    let experiment = (!report.experiments.is_empty()).then_some(Evidence::ExperimentConfirmed);
    [Evidence::Coactive, Evidence::OnOffConfirmed].into_iter().chain(demand).chain(experiment).collect()
}

/// The names of users: unique, and without characters that control a terminal.
pub struct Names {
    by_id: HashMap<String, String>,
}

impl Names {
    pub fn new(report: &Report) -> Names {
        let mut counts: HashMap<String, usize> = HashMap::new();
        for user in &report.users {
            *counts.entry(user.display_name()).or_default() += 1;
        }
        let name = |user: &super::model::UserReport| {
            let display_name = user.display_name();
            let duplicate = counts.get(&display_name).is_some_and(|n| *n > 1);
            // A restarted container has the same name; the beginning of the container id distinguishes the two.
            let suffix = user.container_id.as_deref().unwrap_or(&user.id);
            if duplicate { format!("{display_name} [{}]", suffix.chars().take(12).collect::<String>()) } else { display_name }
        };
        Names { by_id: report.users.iter().map(|user| (user.id.clone(), terminal_safe(&name(user)))).collect() }
    }

    /// The name of the user with this id; the escaped id if the view excludes the user.
    pub fn get(&self, id: &str) -> String {
        self.by_id.get(id).cloned().unwrap_or_else(|| terminal_safe(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn plain(text: String) -> String {
        text.replace(NB, " ")
    }

    #[test]
    fn numbers_have_one_decimal_and_two_below_one() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "0.0"),
            (0.034, "0.03"),
            (0.999, "1.0"),
            (41.23, "41.2"),
            (1_234_567.0, "1,234,567.0"),
            (-1234.0, "-1,234.0"),
        ];
        for (value, expect) in cases {
            assert_eq!(number(value), expect);
        }
        assert_eq!(number(f64::NAN), "-");
    }

    #[test]
    fn a_small_ratio_is_not_zero_percent() {
        let cases = [(0.0, "0 %"), (0.0001, "<0.1 %"), (0.034, "3.4 %"), (0.4949, "49 %"), (1.0, "100 %")];
        for (ratio, expect) in cases {
            assert_eq!(plain(percent(ratio)), expect);
        }
        assert_eq!(plain(percent_with_error(Some(0.49), Some(0.03))), "49 ± 3.0 %");
        assert_eq!(part(1.0, 0.0), "-");
    }

    #[test]
    fn durations_have_the_units_of_their_size() {
        let cases = [(0.0, "0.0 s"), (42.5, "42.5 s"), (125.0, "2 min 05 s"), (3725.0, "62 min 05 s"), (7500.0, "2 h 05 min")];
        for (value, expect) in cases {
            assert_eq!(plain(span(value)), expect);
        }
    }

    #[test]
    fn bytes_have_binary_units() {
        let cases = [(0, "0"), (900, "900 B"), (512 << 20, "512 MiB"), (20 << 30, "20.0 GiB")];
        for (value, expect) in cases {
            assert_eq!(plain(bytes(value)), expect);
        }
    }

    #[test]
    fn times_before_the_start_are_formatted() {
        let start = WallTime(1_777_888_800_000_000_000);
        assert_eq!(date(start), "2026-05-04 10:00:00 UTC");
        assert_eq!(clock(after(start, -1.0)), "09:59:59");
        assert_eq!(clock_millis(after(start, 31.25)), "10:00:31.250");
    }

    #[test]
    fn a_restarted_container_has_a_name_of_its_own() {
        let mut report = sample::report();
        let mut restarted = report.users[0].clone();
        restarted.id = "/kubepods/pod1/second".to_owned();
        restarted.container_id = Some("feedfacefeedface".to_owned());
        report.users.push(restarted);
        let names = Names::new(&report);
        assert_eq!(names.get("/kubepods/pod1/second"), "ml/trainer-0/main [feedfacefeed]");
        assert_ne!(names.get("/kubepods/pod1/second"), names.get(&report.users[0].id));
    }
}
