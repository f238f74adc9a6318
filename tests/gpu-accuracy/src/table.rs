//! Scores as Markdown tables.

use crate::score::{ExporterScores, Score};

const NOT_SHOWN: &str = "not shown";
/// Values that differ by less than this part of the scale of their row are equal: runs are not equal.
const EQUAL_WITHIN: f64 = 0.005;

enum Unit {
    Percent,
    /// Percentage points.
    Points,
    /// Of one processor.
    Processor,
    Bytes,
    Number,
    Seconds,
}

impl Unit {
    fn shown(&self, value: Option<f64>) -> String {
        let Some(value) = value else { return NOT_SHOWN.to_owned() };
        match self {
            Unit::Percent => format!("{:.1} %", value * 100.0),
            Unit::Processor => format!("{:.2} %", value * 100.0),
            Unit::Points => format!("{:.1} points", value * 100.0),
            Unit::Bytes if value < 1e6 => format!("{:.0} kB", value / 1e3),
            Unit::Bytes => format!("{:.0} MB", value / 1e6),
            Unit::Number => format!("{value:.0}"),
            Unit::Seconds => format!("{:.1} ms", value * 1e3),
        }
    }
}

/// A measure; less is better. One that an exporter does not show is worse than any value.
struct Row {
    name: &'static str,
    unit: Unit,
    value: fn(&Score) -> Option<f64>,
}

const ROWS: [Row; 16] = [
    Row { name: "busy time of GPUs: error", unit: Unit::Percent, value: |score| score.device_error },
    Row { name: "time of containers: error", unit: Unit::Percent, value: |score| score.user_error },
    Row { name: "share of a shared GPU: largest error", unit: Unit::Points, value: |score| score.share_error },
    Row { name: "processes of 0.1 to 2 s: time lost", unit: Unit::Percent, value: |score| score.short_lost },
    Row { name: "processes of 0.1 to 2 s: time in excess", unit: Unit::Percent, value: |score| score.short_excess },
    Row { name: "series of users with blank or wrong labels", unit: Unit::Percent, value: |score| score.labels_wrong },
    Row { name: "utilization of a busy GPU shown as 0", unit: Unit::Percent, value: |score| score.false_zeros },
    Row { name: "utilization of a busy GPU not shown", unit: Unit::Percent, value: |score| score.absent },
    Row { name: "energy of GPUs: error", unit: Unit::Percent, value: |score| score.device_energy_error },
    Row { name: "energy of containers above idle: error", unit: Unit::Percent, value: |score| score.user_energy_error },
    Row { name: "processor time, of one processor", unit: Unit::Processor, value: |score| Some(score.processor_ratio) },
    Row { name: "resident memory", unit: Unit::Bytes, value: |score| Some(score.resident_bytes) },
    Row { name: "page", unit: Unit::Bytes, value: |score| score.page_bytes },
    Row { name: "series", unit: Unit::Number, value: |score| score.series },
    Row { name: "scrape, median", unit: Unit::Seconds, value: |score| score.scrape_seconds },
    Row { name: "scrapes that failed", unit: Unit::Number, value: |score| Some(score.failed_scrapes as f64) },
];

fn table(head: &str, columns: &[(&str, &Score)]) -> String {
    let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    let mut text = format!("| {head} | {} |\n|---{}|\n", names.join(" | "), "|---".repeat(names.len()));
    for row in &ROWS {
        let cells: Vec<String> = columns.iter().map(|(_, score)| row.unit.shown((row.value)(score))).collect();
        text += &format!("| {} | {} |\n", row.name, cells.join(" | "));
    }
    text
}

/// A column for each world.
pub fn of_exporter(scores: &ExporterScores) -> String {
    let columns: Vec<(&str, &Score)> = scores.worlds.iter().map(|score| (&*score.world, score)).collect();
    table(&scores.exporter, &columns)
}

/// A table for each world with a column for each exporter, and before them where the first one is not the best.
pub fn compared(all: &[ExporterScores]) -> String {
    let Some(first) = all.first() else { return String::new() };
    let (mut behind, mut tables) = (String::new(), String::new());
    for world in first.worlds.iter().map(|score| &score.world) {
        let find = |scores: &'_ ExporterScores| scores.worlds.iter().position(|score| score.world == *world);
        let columns: Vec<(&str, &Score)> =
            all.iter().filter_map(|scores| Some((&*scores.exporter, &scores.worlds[find(scores)?]))).collect();
        tables += &format!("\n{}", table(world, &columns));
        for row in &ROWS {
            if let Some((name, best)) = better(row, &columns) {
                let own = row.unit.shown(columns.first().and_then(|(_, score)| (row.value)(score)));
                behind += &format!("- {world}: {}: {own}; {name}: {}\n", row.name, row.unit.shown(Some(best)));
            }
        }
    }
    if behind.is_empty() {
        behind = "nothing\n".to_owned();
    }
    format!("{} is not the best in:\n\n{behind}{tables}", first.exporter)
}

/// The best exporter, if it is clearly better than the first.
fn better<'a>(row: &Row, columns: &[(&'a str, &Score)]) -> Option<(&'a str, f64)> {
    let value = |score: &Score| (row.value)(score);
    let shown = columns.iter().filter_map(|(name, score)| Some((*name, value(score)?)));
    let (name, best) = shown.min_by(|a, b| a.1.total_cmp(&b.1))?;
    let own = columns.first().and_then(|(_, score)| value(score));
    let scale = match row.unit {
        Unit::Percent | Unit::Points => 1.0,
        _ => best.abs().max(1e-3) * 20.0,
    };
    own.is_none_or(|own| own - best > EQUAL_WITHIN * scale).then_some((name, best))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(exporter: &str, user_error: Option<f64>) -> ExporterScores {
        let worlds = vec![Score { world: "w".to_owned(), user_error, ..Score::default() }];
        ExporterScores { exporter: exporter.to_owned(), worlds, ..ExporterScores::default() }
    }

    #[test]
    fn rows_in_which_another_is_better_come_first() {
        let text = compared(&[scores("a", Some(0.05)), scores("b", Some(0.02)), scores("c", None)]);
        assert!(
            text.starts_with("a is not the best in:\n\n- w: time of containers: error: 5.0 %; b: 2.0 %\n\n| w | a | b | c |\n"),
            "{text}"
        );
        assert!(text.contains("| time of containers: error | 5.0 % | 2.0 % | not shown |"), "{text}");
        assert!(compared(&[scores("a", Some(0.022)), scores("b", Some(0.02))]).contains("in:\n\nnothing\n"));
        assert!(compared(&[scores("a", None), scores("b", Some(0.9))]).contains("error: not shown; b: 90.0 %"));
    }
}
