//! The timelines as one long table, for who computes with them.
//!
//! One row for each window, GPU and user: what pandas calls long format. RFC 4180: CRLF, a header, quotes where they are needed.
//! A field of what is not known is empty, never 0. A GPU that nobody used has its windows too, with the user's fields empty.
//!
//! Spreadsheets run text that begins with `= + - @` (or a tab or line break before it) as a formula, and names come from tenants. Such text,
//! and text that begins with an apostrophe itself, gets an apostrophe in front: `column.str.removeprefix("'")` gives it back exactly.

use std::fmt::Write as _;

use super::bins::known_shares;
use super::model::*;
use super::words;
use sampler_core::units::rfc3339;

const HEADER: &str =
    "time,offset_seconds,uuid,gpu_index,kind,id,namespace,pod,container,name,gpu_seconds,share,memory_bytes,gpu_busy_ratio";

pub fn csv(report: &Report) -> String {
    let mut out = format!("{HEADER}\r\n");
    for timeline in &report.timelines {
        let index = report.gpu(&timeline.uuid).map(|gpu| gpu.index.to_string()).unwrap_or_default();
        let gpu = format!("{},{index}", label(&timeline.uuid));
        let users: Vec<(String, Vec<Option<f32>>, &Lane)> =
            timeline.lanes.iter().map(|lane| (user(report.users.get(lane.user)), known_shares(timeline, lane), lane)).collect();
        for (at, busy) in timeline.busy.iter().enumerate() {
            let offset = timeline.first_second + at as f64 * timeline.window_seconds;
            let head = format!("{},{},{gpu}", rfc3339(words::after(report.start, offset)), ratio(Some(offset)));
            let busy = ratio(busy.map(f64::from));
            for (user, shares, lane) in &users {
                let share = shares.get(at).copied().flatten().map(f64::from);
                let seconds = ratio(share.map(|share| share * timeline.window_seconds));
                let memory = lane.memory.get(at).copied().flatten().map(|bytes| bytes.to_string()).unwrap_or_default();
                row(&mut out, &[&head, user, &seconds, &ratio(share), &memory, &busy]);
            }
            if users.is_empty() {
                row(&mut out, &[&head, &user(None), "", "", "", &busy]);
            }
        }
    }
    out
}

fn row(out: &mut String, parts: &[&str]) {
    for (nth, part) in parts.iter().enumerate() {
        if nth > 0 {
            out.push(',');
        }
        out.push_str(part);
    }
    out.push_str("\r\n");
}

/// Kind, id, namespace, pod, container, name.
fn user(user: Option<&UserReport>) -> String {
    let Some(user) = user else { return ",,,,,".to_owned() };
    let kind = match user.kind {
        UserKind::Container => "container",
        UserKind::Host => "host",
        UserKind::Unknown => "unknown",
    };
    // A host process has no name but the one it gave itself.
    let name = user.comm.as_deref().unwrap_or(&user.name);
    let labels = [&user.id, &user.namespace, &user.pod, &user.container, name].map(label);
    format!("{kind},{}", labels.join(","))
}

/// To the millionth: more than was measured, and no noise of binary fractions.
fn ratio(value: Option<f64>) -> String {
    let Some(value) = value.filter(|value| value.is_finite()) else { return String::new() };
    let mut text = String::new();
    let _ = write!(text, "{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn label(text: &str) -> String {
    let runs = text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '\'', '＝', '＋', '－', '＠']);
    let text = if runs { format!("'{text}") } else { text.to_owned() };
    if text.contains([',', '"', '\r', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    /// Reads RFC 4180 back, quotes and line breaks in fields included.
    fn parse(text: &str) -> Vec<Vec<String>> {
        let (mut rows, mut fields, mut field, mut quoted) = (Vec::new(), Vec::new(), String::new(), false);
        let mut rest = text.chars().peekable();
        while let Some(c) = rest.next() {
            match c {
                '"' if quoted && rest.peek() == Some(&'"') => field.push(rest.next().unwrap()),
                '"' => quoted = !quoted,
                ',' if !quoted => fields.push(std::mem::take(&mut field)),
                '\r' if !quoted => {
                    assert_eq!(rest.next(), Some('\n'));
                    fields.push(std::mem::take(&mut field));
                    rows.push(std::mem::take(&mut fields));
                }
                c => field.push(c),
            }
        }
        assert!(field.is_empty() && fields.is_empty() && !quoted);
        rows
    }

    #[test]
    fn is_read_back_with_as_many_fields_in_every_row() {
        for report in [sample::report(), sample::hostile(), sample::big(2, 8, 30)] {
            let rows = parse(&csv(&report));
            assert_eq!(rows[0].join(","), HEADER);
            let expect: usize = report.timelines.iter().map(|one| one.lanes.len() * one.busy.len()).sum();
            assert_eq!(rows.len(), expect + 1);
            assert!(rows.iter().all(|row| row.len() == 14));
        }
    }

    #[test]
    fn sums_are_the_report_s() {
        let report = sample::report();
        let rows = parse(&csv(&report));
        let mine = rows.iter().filter(|row| row[5] == sample::TRAINER);
        let sum: f64 = mine.map(|row| row[10].parse().unwrap_or(0.0)).sum();
        assert!((sum - report.users[0].gpus[0].gpu_seconds).abs() < 1e-3, "{sum}");
    }

    #[test]
    fn unknown_is_empty() {
        let rows = parse(&csv(&sample::report()));
        let gap = rows.iter().find(|row| row[1] == "34" && row[5] == sample::TRAINER).unwrap();
        assert_eq!(gap[10..], ["", "", "", ""]);
        assert_eq!(gap[0], "2026-05-04T10:00:34.000Z");
        let idle = rows.iter().find(|row| row[1] == "1" && row[5] == sample::TRAINER).unwrap();
        assert_eq!(idle[10..12], ["0", "0"]);
    }

    #[test]
    fn a_gpu_without_users_is_there() {
        let mut report = sample::report();
        report.timelines[1].lanes.clear();
        let rows = parse(&csv(&report));
        let empty: Vec<_> = rows.iter().filter(|row| row[2] == sample::GPUS[1]).collect();
        assert_eq!(empty.len(), 60);
        assert_eq!(empty[0][4..13], [""; 9]);
    }

    #[test]
    fn no_label_is_a_formula() {
        let rows = [
            ("plain", "plain"),
            ("=1+1", "'=1+1"),
            ("@x", "'@x"),
            ("-x", "'-x"),
            ("'x", "''x"),
            ("\t=1", "'\t=1"),
            ("a,b", "\"a,b\""),
            ("=\"a\"", "\"'=\"\"a\"\"\""),
            ("a\r\nb", "\"a\r\nb\""),
        ];
        for (from, expect) in rows {
            assert_eq!(label(from), expect);
        }
    }
}
