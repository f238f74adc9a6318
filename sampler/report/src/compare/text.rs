//! A comparison for a terminal or a pipe.

use super::super::layout::{Column, Ink, Table, fit, safe, wrapped};
use super::super::text::TextOptions;
use super::super::words;
use super::*;

/// Users, and lone ones, that are told one by one.
const TOP: usize = 20;

impl Comparison {
    /// Ends with a newline.
    pub fn text(&self, options: &TextOptions) -> String {
        let width = options.width.unwrap_or(100).clamp(40, 240);
        let mut page = ComparisonPage { width, ink: Ink(options.colour), unicode: options.unicode, lines: Vec::new() };
        page.heads(self);
        page.headline(self);
        page.gpus(self);
        page.users(self);
        page.evidence(self);
        page.lone("Only in A", &self.only_a);
        page.lone("Only in B", &self.only_b);
        page.notes(self);
        page.lines.join("\n") + "\n"
    }
}

struct ComparisonPage {
    width: usize,
    ink: Ink,
    unicode: bool,
    lines: Vec<String>,
}

fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| words::UNKNOWN.to_owned(), words::percent)
}

fn rate(amount: &Amount) -> String {
    match (amount.rate, amount.rate_stderr) {
        (Some(rate), Some(stderr)) => format!("{rate:.3} ± {stderr:.3}"),
        _ => words::UNKNOWN.to_owned(),
    }
}

/// `+0.440 ± 0.012 *`, the star where it is more than two errors.
fn difference(pair: &UsagePair) -> String {
    match pair.difference.zip(pair.difference_stderr) {
        Some((difference, stderr)) => {
            format!("{difference:+.3} ± {stderr:.3} {}", if pair.exceeds_two_errors { "*" } else { " " })
        }
        None => words::UNKNOWN.to_owned(),
    }
}

fn both(of: impl Fn(&Amount) -> Option<f64>, pair: &UsagePair) -> String {
    format!("{} → {}", ratio(of(&pair.a)), ratio(of(&pair.b)))
}

impl ComparisonPage {
    fn wrap(&mut self, head: &str, text: &str) {
        self.lines.extend(wrapped(head, text, self.width, self.unicode));
    }

    fn heading(&mut self, text: &str) {
        self.lines.push(String::new());
        let lines = wrapped("", text, self.width, self.unicode);
        self.lines.extend(lines.iter().map(|line| self.ink.strong(line)));
    }

    fn heads(&mut self, comparison: &Comparison) {
        self.lines.push(self.ink.strong("Two GPU sessions"));
        for (name, side) in [("A", &comparison.a), ("B", &comparison.b)] {
            let duration = words::span(side.duration_seconds);
            self.wrap(&format!("  {name}  "), &format!("{}, {}, {duration}", words::node(&side.node), side.start));
            let mut alarms = Vec::new();
            if side.truncated || !side.damage.is_empty() {
                let damage = safe(&side.damage.join("; "));
                let words = if damage.is_empty() { "the file ends before the session did" } else { &damage };
                alarms.push(format!("{name} is INCOMPLETE: {words}"));
            }
            if side.gaps > 0 {
                alarms.push(format!("{name} has {}: unobserved time is left out", words::counted(side.gaps, "gap", "gaps")));
            }
            for alarm in alarms {
                let lines = wrapped("     ! ", &alarm, self.width, self.unicode);
                self.lines.extend(lines.iter().map(|line| self.ink.alarm(line)));
            }
        }
    }

    fn headline(&mut self, comparison: &Comparison) {
        self.heading("In short");
        let mut told = false;
        for user in &comparison.users {
            for pair in user.gpus.iter().filter(|pair| pair.exceeds_two_errors).take(TOP) {
                let (Some(a), Some(b)) = (pair.a.rate, pair.b.rate) else { continue };
                let what = if b > a { "more" } else { "less" };
                let text = format!(
                    "{} got {what} of GPU {} in B: {b:.3} instead of {a:.3} GPU-seconds per second, more than two errors of sampling",
                    user.name, pair.index
                );
                self.wrap("  - ", &text);
                told = true;
            }
        }
        if !told {
            self.wrap("  ", "No user of both got more or less GPU time than two errors of sampling.");
        }
        let note = "Utilization only: whether anybody's work took longer, or it asked for less, is not told by it.";
        for line in wrapped("  ", note, self.width, self.unicode) {
            self.lines.push(self.ink.faint(&line));
        }
    }

    fn gpus(&mut self, comparison: &Comparison) {
        if comparison.gpus.is_empty() {
            self.heading("No GPU is in both.");
            return;
        }
        self.heading("GPUs");
        let name = |gpu: &GpuPair| match gpu.matched_by {
            GpuMatch::Uuid => format!("GPU {} {}", gpu.index, words::short_uuid(&gpu.uuid_b)),
            GpuMatch::Index => format!("GPU {} (another card in B)", gpu.index),
        };
        let change = |a, b| format!("{} → {}", ratio(a), ratio(b));
        let table = Table {
            name: Column::new("", 0, comparison.gpus.iter().map(name).collect()),
            values: vec![
                Column::new("busy", 0, comparison.gpus.iter().map(|gpu| change(gpu.busy_ratio_a, gpu.busy_ratio_b)).collect()),
                Column::new(
                    "saturated",
                    1,
                    comparison.gpus.iter().map(|gpu| change(gpu.saturated_ratio_a, gpu.saturated_ratio_b)).collect(),
                ),
            ],
        };
        self.lines.extend(table.lines(2, self.width, self.unicode, self.ink));
    }

    fn users(&mut self, comparison: &Comparison) {
        self.heading("Users of both, in GPU-seconds per second (* more than two errors)");
        let rows: Vec<(&UserPair, &UsagePair)> =
            comparison.users.iter().flat_map(|user| user.gpus.iter().map(move |pair| (user, pair))).collect();
        if rows.is_empty() {
            self.lines.push("  none".to_owned());
            return;
        }
        let column = |head: &str, rank: u8, cell: &dyn Fn(&UsagePair) -> String| {
            Column::new(head, rank, rows.iter().take(TOP).map(|(_, pair)| cell(pair)).collect())
        };
        let table = Table {
            name: Column::new("user", 0, rows.iter().take(TOP).map(|(user, _)| user.name.clone()).collect()),
            values: vec![
                column("GPU", 1, &|pair| pair.index.to_string()),
                column("A", 5, &|pair| rate(&pair.a)),
                column("B", 4, &|pair| rate(&pair.b)),
                column("B - A", 0, &difference),
                column("of busy", 6, &|pair| both(|amount| amount.share_of_busy, pair)),
                column("coactive", 7, &|pair| both(|amount| amount.coactive_ratio, pair)),
                column("contended", 3, &|pair| both(|amount| amount.contended_ratio, pair)),
            ],
        };
        self.lines.extend(table.lines(2, self.width, self.unicode, self.ink));
        self.more(rows.len());
    }

    fn more(&mut self, all: usize) {
        if all > TOP {
            let dots = if self.unicode { "…" } else { "..." };
            self.lines.push(format!("  {dots} {} more", words::count(all - TOP)));
        }
    }

    fn evidence(&mut self, comparison: &Comparison) {
        let name = |evidence: Option<Evidence>| evidence.map_or("did not meet", Evidence::name);
        let rows: Vec<String> = comparison
            .users
            .iter()
            .flat_map(|user| user.gpus.iter().flat_map(move |pair| pair.evidence.iter().map(move |one| (user, pair, one))))
            .map(|(user, pair, one)| {
                format!("GPU {}: {} beside {}: {} → {}", pair.index, user.name, one.other, name(one.a), name(one.b))
            })
            .collect();
        if rows.is_empty() {
            return;
        }
        self.heading("Evidence, A → B");
        for row in rows.iter().take(TOP) {
            self.wrap("  - ", row);
        }
        self.more(rows.len());
    }

    fn lone(&mut self, heading: &str, users: &[Lone]) {
        if users.is_empty() {
            return;
        }
        self.heading(heading);
        for user in users.iter().take(TOP) {
            let text = format!("  {}: {} GPU-seconds", user.name, words::number(user.gpu_seconds));
            self.lines.push(fit(&text, self.width, self.unicode));
        }
        self.more(users.len());
    }

    fn notes(&mut self, comparison: &Comparison) {
        let mut notes: Vec<String> = comparison
            .users
            .iter()
            .filter(|user| user.id_a != user.id_b)
            .map(|user| format!("{} is another one in B: {}", user.name, user.matched_by.words()))
            .collect();
        notes.extend(comparison.ambiguous.iter().cloned());
        if notes.is_empty() {
            return;
        }
        self.heading("Who is who");
        for note in notes.iter().take(TOP) {
            self.wrap("  - ", note);
        }
        self.more(notes.len());
    }
}
