//! The timelines as one long table, for analysis by programs.
//!
//! One row per window, GPU and user, which is the long format of pandas. RFC 4180 with CRLF and a header. The field of an unknown value
//! is empty, never 0. A GPU without users has rows as well, with empty user fields. `wait_seconds` of a user is the same on all of its GPUs:
//! for which of them a process waits is unknown.
//!
//! Spreadsheets evaluate text that begins with `= + - @` (or with a tab or line break before it) as a formula, and tenants choose the
//! names. Such text, and text that begins with an apostrophe, is prefixed with an apostrophe; `column.str.removeprefix("'")` restores it.

use csv::{Terminator, Writer, WriterBuilder};

use super::bins::known_shares;
use super::model::*;
use super::words;
use sampler_core::units::rfc3339;

const HEADER: [&str; 15] = [
    "time",
    "offset_seconds",
    "uuid",
    "gpu_index",
    "kind",
    "id",
    "namespace",
    "pod",
    "container",
    "name",
    "gpu_seconds",
    "share",
    "memory_bytes",
    "gpu_busy_ratio",
    "wait_seconds",
];

type LaneRows<'a> = ([String; 6], Vec<Option<f32>>, &'a Lane);

pub fn csv(report: &Report) -> String {
    let mut writer = writer();
    write_row(&mut writer, HEADER);
    for timeline in &report.timelines {
        let index = report.gpu(&timeline.uuid).map(|gpu| gpu.index.to_string()).unwrap_or_default();
        let uuid = without_formula(&timeline.uuid);
        let lanes: Vec<LaneRows<'_>> = timeline
            .lanes
            .iter()
            .map(|lane| (user_fields(report.users.get(lane.user)), known_shares(timeline, lane), lane))
            .collect();
        for (at, busy) in timeline.busy.iter().enumerate() {
            let offset = timeline.first_second + at as f64 * timeline.window_seconds;
            let (time, seconds) = (rfc3339(words::after(report.start, offset)), decimal(Some(offset)));
            let window = [time.as_str(), &seconds, &uuid, &index];
            let busy = decimal(busy.map(f64::from));
            for (user, shares, lane) in &lanes {
                let share = shares.get(at).copied().flatten().map(f64::from);
                let gpu_seconds = decimal(share.map(|share| share * timeline.window_seconds));
                let memory = lane.memory.get(at).copied().flatten().map(|bytes| bytes.to_string()).unwrap_or_default();
                let waited = lane.waits.get(at).copied().flatten().map(|waited| f64::from(waited) * timeline.window_seconds);
                let (values, waited) = ([gpu_seconds, decimal(share), memory], decimal(waited));
                let cells = user.iter().chain(&values).chain([&busy, &waited]).map(String::as_str);
                write_row(&mut writer, window.into_iter().chain(cells));
            }
            if lanes.is_empty() {
                write_row(&mut writer, window.into_iter().chain([""; 9]).chain([busy.as_str(), ""]));
            }
        }
    }
    finish(writer)
}

/// A table of rows that are known in full.
pub fn table<const COLUMNS: usize>(header: [&str; COLUMNS], rows: impl IntoIterator<Item = [String; COLUMNS]>) -> String {
    let mut writer = writer();
    write_row(&mut writer, header);
    rows.into_iter().for_each(|row| write_row(&mut writer, row.iter().map(String::as_str)));
    finish(writer)
}

fn writer() -> Writer<Vec<u8>> {
    WriterBuilder::new().terminator(Terminator::CRLF).from_writer(Vec::new())
}

fn finish(writer: Writer<Vec<u8>>) -> String {
    let bytes = writer.into_inner().expect("writing to memory does not fail");
    String::from_utf8(bytes).expect("all fields are UTF-8")
}

fn write_row<'a>(writer: &mut Writer<Vec<u8>>, fields: impl IntoIterator<Item = &'a str>) {
    writer.write_record(fields).expect("writing to memory does not fail, and all rows have the fields of the header");
}

/// Kind, id, namespace, pod, container, name.
fn user_fields(user: Option<&UserReport>) -> [String; 6] {
    let Some(user) = user else { return Default::default() };
    let kind: &str = user.kind.into();
    // The only name of a host process is its command name.
    let name = user.comm.as_deref().unwrap_or(&user.name);
    [kind, &user.id, &user.namespace, &user.pod, &user.container, name].map(without_formula)
}

/// Six decimals: more than the precision of the measurement, and without the noise of binary fractions.
pub fn decimal(value: Option<f64>) -> String {
    let Some(value) = value.filter(|value| value.is_finite()) else { return String::new() };
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Prefixes text that a spreadsheet would evaluate with an apostrophe.
pub fn without_formula(text: &str) -> String {
    let is_formula = text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '\'', '＝', '＋', '－', '＠']);
    if is_formula { format!("'{text}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    /// All rows, with the header.
    fn parse(text: &str) -> Vec<Vec<String>> {
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(text.as_bytes());
        reader.deserialize().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn every_row_is_read_back_with_all_fields() {
        for report in [sample::report(), sample::hostile(), sample::big(2, 8, 30)] {
            let text = csv(&report);
            assert!(text.ends_with("\r\n"));
            let rows = parse(&text);
            assert_eq!(rows[0], HEADER);
            let expect: usize = report.timelines.iter().map(|timeline| timeline.lanes.len() * timeline.busy.len()).sum();
            assert_eq!(rows.len(), expect + 1);
            assert!(rows.iter().all(|row| row.len() == HEADER.len()));
        }
    }

    #[test]
    fn rows_of_a_user_sum_to_its_gpu_seconds() {
        let report = sample::report();
        let rows = parse(&csv(&report));
        let of_trainer = rows.iter().filter(|row| row[5] == sample::TRAINER);
        let sum: f64 = of_trainer.map(|row| row[10].parse().unwrap_or(0.0)).sum();
        assert!((sum - report.users[0].gpus[0].gpu_seconds).abs() < 1e-3, "{sum}");
    }

    #[test]
    fn unknown_values_are_empty() {
        let rows = parse(&csv(&sample::report()));
        let gap = rows.iter().find(|row| row[1] == "34" && row[5] == sample::TRAINER).unwrap();
        assert_eq!(gap[10..14], ["", "", "", ""]);
        assert!(gap[14].starts_with("0.3"), "probes measure while the driver does not respond: {}", gap[14]);
        let unprobed = rows.iter().find(|row| row[1] == "0" && row[5] == sample::TRAINER).unwrap();
        assert_eq!(unprobed[14], "");
        assert_eq!(gap[0], "2026-05-04T10:00:34.000Z");
        let idle = rows.iter().find(|row| row[1] == "1" && row[5] == sample::TRAINER).unwrap();
        assert_eq!(idle[10..12], ["0", "0"]);
    }

    #[test]
    fn a_gpu_without_users_has_rows() {
        let mut report = sample::report();
        report.timelines[1].lanes.clear();
        let rows = parse(&csv(&report));
        let empty: Vec<_> = rows.iter().filter(|row| row[2] == sample::GPUS[1]).collect();
        assert_eq!(empty.len(), 60);
        assert_eq!(empty[0][4..13], [""; 9]);
    }

    #[test]
    fn names_are_quoted_and_never_formulas() {
        let cases = [
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
        for (name, expect) in cases {
            let mut report = sample::report();
            report.users[0].name = name.to_owned();
            let text = csv(&report);
            assert!(text.contains(&format!(",trainer-0,main,{expect},")), "{name:?}");
        }
    }
}
