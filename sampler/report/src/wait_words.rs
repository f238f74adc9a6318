//! The wording of what wait probes measured, which all formats share.

use super::model::{CallSeconds, DemandBasis, DemandEvidence, Report, UserReport, UserWaits};
use super::words::{self, NB, UNKNOWN};

/// What the lanes of waiting show.
pub const LANE: &str =
    "part of the time in which the user was inside a blocking call of the driver library, summed over its processes";

/// The caption of the matrix of waiting.
pub const MATRIX: &str = "seconds that the user of the row waited longer in blocking calls, beyond its own work, while the user of the \
                          column was on; < where only the most is known; in parentheses if not confirmed";

pub fn has_waits(report: &Report) -> bool {
    report.users.iter().any(|user| user.waits.is_some())
}

/// The users with probed time, the longest waiting first.
pub fn probed(report: &Report) -> Vec<(&UserReport, &UserWaits)> {
    let mut all: Vec<(&UserReport, &UserWaits)> = report
        .users
        .iter()
        .filter_map(|user| Some((user, user.waits.as_ref()?)))
        .filter(|(_, waits)| waits.probed_seconds > 0.0)
        .collect();
    all.sort_by(|(_, one), (_, other)| other.wait_seconds.total_cmp(&one.wait_seconds));
    all
}

/// By user with processes without probes, or with calls that were not counted: how many, and the reasons. Not escaped.
pub fn unprobed(report: &Report) -> Vec<(&UserReport, String)> {
    let text = |waits: &UserWaits| {
        let (without, uncounted) = waits.problems.split_at(waits.unprobed_processes.min(waits.problems.len()));
        let mut parts = Vec::new();
        if waits.unprobed_processes > 0 {
            let processes = words::counted(waits.unprobed_processes, "process", "processes");
            let more = waits.unprobed_processes - without.len();
            let more = if more > 0 { format!("; and {} more", words::count(more)) } else { String::new() };
            parts.push(format!("{processes} had no wait probes: {}{more}", without.join("; ")));
        }
        if !uncounted.is_empty() {
            parts.push(format!("not all calls were counted: {}", uncounted.join("; ")));
        }
        parts.join("; ")
    };
    let with_waits = report.users.iter().filter_map(|user| Some((user, user.waits.as_ref()?)));
    with_waits.filter(|(_, waits)| !waits.problems.is_empty()).map(|(user, waits)| (user, text(waits))).collect()
}

/// `340 µs`, `1.4 ms`, `2.1 s`: two digits, because durations of calls are known to within a factor of two.
pub fn call_duration(seconds: f64) -> String {
    let (value, unit) = match seconds {
        _ if !seconds.is_finite() => return UNKNOWN.to_owned(),
        _ if seconds < 9.5e-4 => (seconds * 1e6, "µs"),
        _ if seconds < 0.95 => (seconds * 1e3, "ms"),
        _ => (seconds, "s"),
    };
    let decimals = usize::from(value < 9.95);
    format!("{value:.decimals$}{NB}{unit}")
}

/// The cells of the table of waiting, after the name of the user: those of [`HEADS`].
pub fn cells(waits: &UserWaits) -> [String; 6] {
    let call = |value: fn(&CallSeconds) -> f64| {
        waits.call_seconds.as_ref().map_or_else(|| UNKNOWN.to_owned(), |seconds| call_duration(value(seconds)))
    };
    [
        words::seconds(waits.wait_seconds),
        words::part(waits.wait_seconds, waits.probed_seconds),
        words::seconds(waits.probed_seconds),
        words::count(usize::try_from(waits.calls).unwrap_or(usize::MAX)),
        call(|seconds| seconds.p50),
        call(|seconds| seconds.p99),
    ]
}

pub const HEADS: [&str; 6] = ["Waited", "Of probed time", "Probed", "Calls", "Call p50", "Call p99"];

/// How much longer the victim waited while the contender was on, as a clause; what could not be compared otherwise. Not escaped.
pub fn evidence(demand: &DemandEvidence) -> String {
    let mut parts = Vec::new();
    let windows = words::counted(demand.windows_with, "window", "windows");
    if demand.basis == DemandBasis::Mutual {
        parts.push("both had work in flight at the same time, since it waited for this user".to_owned());
        parts.extend(demand.wait_rate_most.map(|most| format!("at most {most:.2}{NB}s of every second, over {windows}")));
        parts.extend(demand.most_seconds().map(|seconds| format!("at most {} in all", words::seconds(seconds))));
        return parts.join("; ");
    }
    let (than, without) = match demand.basis {
        DemandBasis::Quietest => (", than in its quietest windows, by its part of the GPU time of all that were on", "quietest"),
        _ => ("", "without it"),
    };
    if let Some(rate) = demand.wait_rate {
        let mut text = format!("{rate:.2}{NB}s of every second longer in blocking calls while it was on{than}");
        if let Some([low, high]) = demand.interval {
            text += &format!(", {}interval {low:.2} to {high:.2}{NB}s", level(demand));
        }
        parts.push(text);
    }
    let changes = words::counted(demand.transitions, "change", "changes");
    parts.push(format!("{windows} with it, {} {without}, {changes}", words::count(demand.windows_without)));
    if let Some(seconds) = demand.wait_seconds {
        parts.push(format!("{} in all", words::seconds(seconds)));
    }
    if !demand.why_not_confirmed.is_empty() {
        parts.push(format!("not confirmed: {}", demand.why_not_confirmed));
    }
    parts.join("; ")
}

/// `95 % `, with a space at the end.
pub fn level(demand: &DemandEvidence) -> String {
    demand.interval_level.map(|level| format!("{} ", words::percent(level))).unwrap_or_default()
}

/// A cell of the matrix of waiting.
pub fn matrix_cell(demand: Option<&DemandEvidence>) -> String {
    if let Some(most) = demand.and_then(DemandEvidence::most_seconds) {
        return format!("<{}", words::number(most));
    }
    match demand.and_then(|demand| Some((demand, demand.wait_seconds?))) {
        None => UNKNOWN.to_owned(),
        Some((demand, seconds)) if demand.why_not_confirmed.is_empty() => words::number(seconds),
        Some((_, seconds)) => format!("({})", words::number(seconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_calls_have_two_digits_and_a_unit() {
        let cases = [
            (0.0, "0.0 µs"),
            (3.4e-6, "3.4 µs"),
            (3.4e-4, "340 µs"),
            (9.6e-4, "1.0 ms"),
            (0.0234, "23 ms"),
            (0.96, "1.0 s"),
            (34.0, "34 s"),
            (f64::NAN, "-"),
        ];
        for (seconds, expect) in cases {
            assert_eq!(call_duration(seconds).replace(NB, " "), expect);
        }
    }

    #[test]
    fn a_value_of_the_matrix_that_is_not_confirmed_is_in_parentheses() {
        let confirmed = DemandEvidence { wait_seconds: Some(12.34), ..DemandEvidence::default() };
        let unsure = DemandEvidence { why_not_confirmed: "only once".to_owned(), ..confirmed.clone() };
        assert_eq!(matrix_cell(Some(&confirmed)), "12.3");
        assert_eq!(matrix_cell(Some(&unsure)), "(12.3)");
        assert_eq!(matrix_cell(Some(&DemandEvidence::default())), "-");
        let mutual = DemandEvidence {
            basis: DemandBasis::Mutual,
            wait_rate_most: Some(0.25),
            windows_with: 40,
            ..DemandEvidence::default()
        };
        assert_eq!(matrix_cell(Some(&mutual)), "<10.0");
        assert_eq!(
            evidence(&mutual).replace(NB, " "),
            "both had work in flight at the same time, since it waited for this user; at most 0.25 s of every second, over 40 windows; at \
             most 10.0 s in all"
        );
        let quietest = DemandEvidence { basis: DemandBasis::Quietest, windows_without: 12, transitions: 6, ..confirmed.clone() };
        assert_eq!(evidence(&quietest).replace(NB, " "), "0 windows with it, 12 quietest, 6 changes; 12.3 s in all");
        assert_eq!(matrix_cell(None), "-");
    }

    #[test]
    fn evidence_states_the_effect_the_windows_and_why_it_is_not_confirmed() {
        let demand = DemandEvidence {
            basis: DemandBasis::Changes,
            wait_rate_most: None,
            wait_rate: Some(0.41),
            interval: Some([0.38, 0.44]),
            interval_level: Some(0.95),
            wait_seconds: Some(10.7),
            windows_with: 26,
            windows_without: 28,
            transitions: 1,
            why_not_confirmed: "only once".to_owned(),
        };
        let expect = "0.41 s of every second longer in blocking calls while it was on, 95 % interval 0.38 to 0.44 s; 26 windows with it, 28 \
                      without it, 1 change; 10.7 s in all; not confirmed: only once";
        assert_eq!(evidence(&demand).replace(NB, " "), expect);
    }
}
