//! The wording that all formats share: numbers with their units and errors, times, and what evidence means.
//!
//! Nothing here says that anybody was slowed down: how much of a GPU a user got is measured, how fast its work went is not.

use std::collections::HashMap;

use super::layout::safe;
use super::model::{CauseKind, Contender, Evidence, Report, Verdict};
use sampler_core::units::{WallTime, rfc3339};

/// Between a number and its unit or its error: no line ends there. [`super::layout`] makes spaces of it, which terminals copy as such.
pub const NB: char = '\u{a0}';

/// What stands where a value is not known.
pub const UNKNOWN: &str = "-";

/// `1234.56` as `1,234.6`: with one decimal, and two below 1, where one would leave nothing.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return UNKNOWN.to_owned();
    }
    let decimals = if value.abs() < 0.995 && value != 0.0 { 2 } else { 1 };
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

/// `1 GPU`, `2 GPUs`.
pub fn counted(n: usize, one: &str, many: &str) -> String {
    format!("{} {}", count(n), if n == 1 { one } else { many })
}

pub fn seconds(value: f64) -> String {
    format!("{}{NB}s", number(value))
}

/// A length of time as people say it: `42.5 s`, `1 min 30 s`, `2 h 05 min`.
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

/// A ratio in percent: whole from 10 on, with a decimal below; what is more than none is never `0 %`.
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

/// A part of a whole, in percent; nothing can be said of a whole that is none.
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

/// A moment, by its distance from another in seconds.
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

/// `GPU-5a1c0000`: enough of a UUID to tell GPUs of a machine apart.
pub fn short_uuid(uuid: &str) -> String {
    let head: String = uuid.chars().take(12).collect();
    safe(&head)
}

/// The machine, by what it calls itself.
pub fn node(name: &str) -> String {
    if name.is_empty() { "an unnamed node".to_owned() } else { safe(name) }
}

/// In place of findings, where there are none.
pub const NO_FINDINGS: &str = "Nobody was seen to get less GPU time while somebody else was on.";

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

/// What a level of evidence means, in a sentence of its own.
pub fn meaning(evidence: Evidence) -> &'static str {
    match evidence {
        Evidence::Coactive => "both were active in the same windows; that one kept the other waiting is possible, not shown",
        Evidence::OnOffConfirmed => "it got less GPU time while the other was on and the GPU saturated, over repeated changes",
        Evidence::DemandConfirmed => "the application itself told that it was waiting for the GPU meanwhile",
    }
}

/// What happened between a user and one contender, `other`, in numbers.
pub fn rates(contender: &Contender) -> Option<String> {
    let (before, after) = (contender.rate_before?, contender.rate_after?);
    let mut text = format!("{before:.2} GPU-seconds per second while it was off, {after:.2} while it was on");
    if let Some([low, high]) = contender.interval {
        let level = contender.interval_level.map(|level| format!("{} ", percent(level))).unwrap_or_default();
        text += &format!("; difference {:.2}, {level}interval {low:.2} to {high:.2}", before - after);
    }
    text += &format!("; {}", counted(contender.transitions as usize, "change", "changes"));
    Some(text)
}

/// What users are called, so that no two are called the same, and no name steers a terminal.
pub struct Names {
    by_id: HashMap<String, String>,
}

impl Names {
    pub fn new(report: &Report) -> Names {
        let mut how_often: HashMap<String, usize> = HashMap::new();
        for user in &report.users {
            *how_often.entry(user.called()).or_default() += 1;
        }
        let name = |user: &super::model::UserReport| {
            let called = user.called();
            let twin = how_often.get(&called).is_some_and(|n| *n > 1);
            // Of a restarted container, both lives have one name; the beginning of the container's id tells them apart.
            let mark = user.container_id.as_deref().unwrap_or(&user.id);
            if twin { format!("{called} [{}]", mark.chars().take(12).collect::<String>()) } else { called }
        };
        Names { by_id: report.users.iter().map(|user| (user.id.clone(), safe(&name(user)))).collect() }
    }

    /// A user that a view left out is known by its id alone.
    pub fn of(&self, id: &str) -> String {
        self.by_id.get(id).cloned().unwrap_or_else(|| safe(id))
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
    fn numbers_have_what_precision_they_need() {
        let rows =
            [(0.0, "0.0"), (0.034, "0.03"), (0.999, "1.0"), (41.23, "41.2"), (1_234_567.0, "1,234,567.0"), (-1234.0, "-1,234.0")];
        for (value, expect) in rows {
            assert_eq!(number(value), expect);
        }
        assert_eq!(number(f64::NAN), "-");
    }

    #[test]
    fn little_is_not_nothing() {
        let rows = [(0.0, "0 %"), (0.0001, "<0.1 %"), (0.034, "3.4 %"), (0.4949, "49 %"), (1.0, "100 %")];
        for (ratio, expect) in rows {
            assert_eq!(plain(percent(ratio)), expect);
        }
        assert_eq!(plain(percent_with_error(Some(0.49), Some(0.03))), "49 ± 3.0 %");
        assert_eq!(part(1.0, 0.0), "-");
    }

    #[test]
    fn lengths_of_time_read_as_people_say_them() {
        let rows = [(0.0, "0.0 s"), (42.5, "42.5 s"), (125.0, "2 min 05 s"), (3725.0, "62 min 05 s"), (7500.0, "2 h 05 min")];
        for (value, expect) in rows {
            assert_eq!(plain(span(value)), expect);
        }
    }

    #[test]
    fn bytes_are_binary() {
        let rows = [(0, "0"), (900, "900 B"), (512 << 20, "512 MiB"), (20 << 30, "20.0 GiB")];
        for (value, expect) in rows {
            assert_eq!(plain(bytes(value)), expect);
        }
    }

    #[test]
    fn times_before_the_start_are_told_too() {
        let start = WallTime(1_777_888_800_000_000_000);
        assert_eq!(date(start), "2026-05-04 10:00:00 UTC");
        assert_eq!(clock(after(start, -1.0)), "09:59:59");
        assert_eq!(clock_millis(after(start, 31.25)), "10:00:31.250");
    }

    #[test]
    fn two_lives_of_a_container_are_told_apart() {
        let mut report = sample::report();
        let mut again = report.users[0].clone();
        again.id = "/kubepods/pod1/second".to_owned();
        again.container_id = Some("feedfacefeedface".to_owned());
        report.users.push(again);
        let names = Names::new(&report);
        assert_eq!(names.of("/kubepods/pod1/second"), "ml/trainer-0/main [feedfacefeed]");
        assert_ne!(names.of("/kubepods/pod1/second"), names.of(&report.users[0].id));
    }
}
