//! The report for a terminal or a pipe: what is wrong with it first, then the findings, then each GPU.

mod lanes;
mod waiting;

use super::layout::{Column, Ink, Table, fit, safe, wrapped};
use super::model::*;
use super::words::{self, Names};

/// Users of a GPU that are shown one by one; a screen holds no more, and what follows is told as a sum.
const TOP: usize = 10;
/// Damages and gaps that are told one by one.
const PROBLEMS: usize = 8;

#[derive(Clone, Copy, Debug)]
pub struct TextOptions {
    /// Columns; `None` for a pipe, which gets 100.
    pub width: Option<usize>,
    pub colour: bool,
    /// Block characters; without, ASCII alone is drawn with (names stay what they are).
    pub unicode: bool,
}

/// What every part of the page needs.
struct TextPage<'a> {
    report: &'a Report,
    names: Names,
    ink: Ink,
    width: usize,
    unicode: bool,
    lines: Vec<String>,
}

/// Ends with a newline. Names of users are shown with what would steer a terminal escaped.
pub fn text(report: &Report, options: &TextOptions) -> String {
    let mut page = TextPage {
        report,
        names: Names::new(report),
        ink: Ink(options.colour),
        width: options.width.unwrap_or(100).clamp(40, 240),
        unicode: options.unicode,
        lines: Vec::new(),
    };
    page.summary();
    page.problems();
    page.findings();
    for gpu in &report.gpus {
        page.gpu(gpu);
    }
    if report.gpus.is_empty() {
        page.heading("No GPU is in it.");
    }
    page.note();
    page.lines.join("\n") + "\n"
}

/// A user with what it had of the GPU in question.
type UserUsage<'a> = (&'a UserReport, &'a Usage);

impl<'a> TextPage<'a> {
    fn line(&mut self, line: impl Into<String>) {
        self.lines.push(line.into());
    }

    fn wrap(&mut self, head: &str, text: &str) {
        self.lines.extend(wrapped(head, text, self.width, self.unicode));
    }

    fn heading(&mut self, text: &str) {
        self.line("");
        let text = self.ink.strong(text);
        self.line(text);
    }

    /// Users of one GPU, most GPU-seconds first.
    fn users(&self, uuid: &str) -> Vec<UserUsage<'a>> {
        let mut all: Vec<UserUsage<'a>> =
            self.report.users.iter().flat_map(|user| user.gpus.iter().map(move |usage| (user, usage))).collect();
        all.retain(|(_, usage)| usage.uuid == uuid);
        all.sort_by(|(_, one), (_, other)| other.gpu_seconds.total_cmp(&one.gpu_seconds));
        all
    }

    fn gpu_name(&self, uuid: &str) -> String {
        match self.report.gpu(uuid) {
            Some(gpu) if gpu.gpu_uuid.is_some() => format!("MIG {}", words::short_uuid(uuid)),
            Some(gpu) => format!("GPU {}", gpu.index),
            None => words::short_uuid(uuid),
        }
    }

    fn summary(&mut self) {
        let report = self.report;
        let head = format!("GPU session on {}", words::node(&report.node));
        let line = self.ink.strong(&fit(&head, self.width, self.unicode));
        self.line(line);
        let text = format!(
            "{}, {}, {}, {}",
            words::date(report.start),
            words::span(report.duration_seconds),
            words::counted(report.gpus.len(), "GPU", "GPUs"),
            words::counted(report.users.len(), "user", "users")
        );
        self.wrap("", &text);
    }

    /// Loud, because every number below is only of what is left.
    fn problems(&mut self) {
        let report = self.report;
        if report.truncated || !report.damage.is_empty() {
            self.line("");
            self.alarm(if report.damage.is_empty() {
                "INCOMPLETE: the file ends before the session did; this is what was recorded until then"
            } else {
                "DAMAGED: parts of the file cannot be read; this is what could be"
            });
            for words in report.damage.iter().take(PROBLEMS) {
                self.wrap("  ! ", &safe(words));
            }
            self.more(report.damage.len(), PROBLEMS, "  ");
        }
        if !report.gaps.is_empty() {
            self.line("");
            let lost: f64 = report.gaps.iter().map(|gap| (gap.to.seconds() - gap.from.seconds()).max(0.0)).sum();
            let gaps = words::counted(report.gaps.len(), "gap", "gaps");
            self.alarm(&format!("{gaps}: nothing is known of {}, which is not counted as idle", words::span(lost)));
            for gap in report.gaps.iter().take(PROBLEMS) {
                let (gpu, from, to) = (self.gpu_name(&gap.uuid), words::clock_millis(gap.from), words::clock_millis(gap.to));
                self.wrap("  ! ", &format!("{gpu}, {from} to {to}: {}", safe(&gap.reason)));
            }
            self.more(report.gaps.len(), PROBLEMS, "  ");
        }
    }

    fn alarm(&mut self, text: &str) {
        for line in wrapped("", text, self.width, self.unicode) {
            let line = self.ink.alarm(&line);
            self.line(line);
        }
    }

    fn more(&mut self, all: usize, shown: usize, indent: &str) {
        if all > shown {
            let line = format!("{indent}{} {} more", self.dots(), words::count(all - shown));
            self.line(line);
        }
    }

    fn dots(&self) -> &'static str {
        if self.unicode { "…" } else { "..." }
    }

    fn findings(&mut self) {
        let report = self.report;
        self.heading("Findings");
        if report.findings.is_empty() {
            self.wrap("  ", words::NO_FINDINGS);
            return;
        }
        for (at, finding) in report.findings.iter().enumerate().take(TOP) {
            let tag = finding.evidence.map(|evidence| format!(" [{}]", evidence.name())).unwrap_or_default();
            let text = format!("{}: {}{tag}", self.gpu_name(&finding.uuid), safe(&finding.text));
            self.wrap(&format!("  {}. ", at + 1), &text);
        }
        self.more(report.findings.len(), TOP, "  ");
    }

    fn gpu(&mut self, gpu: &GpuReport) {
        let users = self.users(&gpu.uuid);
        let head = format!("{}  {}  {}", self.gpu_name(&gpu.uuid), safe(&gpu.model), safe(&gpu.uuid));
        let head = fit(&head, self.width, self.unicode);
        self.heading(&head);
        self.states(gpu);
        if let Some(timeline) = self.report.timelines.iter().find(|timeline| timeline.uuid == gpu.uuid) {
            self.lanes(timeline, &users);
        }
        if users.is_empty() {
            self.line("");
            self.line("  Nobody used it.");
            return;
        }
        self.table(&users);
        self.matrix(&users);
        self.victims(&users);
    }

    /// What the words of the evidence mean, once.
    fn note(&mut self) {
        let met = self.report.users.iter().flat_map(|user| &user.gpus).any(|usage| !usage.contenders.is_empty());
        if met {
            self.line("");
            for evidence in [Evidence::Coactive, Evidence::OnOffConfirmed] {
                self.wrap("", &format!("{}: {}", evidence.name(), words::meaning(evidence)));
            }
        }
    }

    fn states(&mut self, gpu: &GpuReport) {
        let whole = gpu.busy_seconds + gpu.idle_seconds + gpu.unobserved_seconds + gpu.unsupported_seconds;
        let state = |name: &str, value: f64| format!("{name} {} ({})", words::seconds(value), words::part(value, whole));
        let mut text = format!("{}, {}", state("busy", gpu.busy_seconds), state("idle", gpu.idle_seconds));
        for (name, value) in [("NOT OBSERVED", gpu.unobserved_seconds), ("not supported", gpu.unsupported_seconds)] {
            if value > 0.0 {
                text += &format!(", {}", state(name, value));
            }
        }
        text += &format!("; saturated for {}", words::seconds(gpu.saturated_seconds));
        self.wrap("  ", &text);
        let mut further = Vec::new();
        if let Some(used) = gpu.memory_used_max_bytes {
            let of = gpu.memory_total_bytes.map(|total| format!(" of {}", words::bytes(total))).unwrap_or_default();
            further.push(format!("memory up to {}{of}", words::bytes(used)));
        }
        let named = |all: &[Named], unit: &str| {
            let each = all.iter().filter(|one| one.value > 0.0);
            each.map(|one| format!("{} {}{unit}", safe(&one.name), words::number(one.value))).collect::<Vec<_>>().join(", ")
        };
        for (head, all, unit) in [
            ("clocks held down: ", gpu.throttle_seconds.as_deref().unwrap_or_default(), " s"),
            ("nobody's: ", &gpu.unattributed, " s"),
        ] {
            let told = named(all, unit);
            if !told.is_empty() {
                further.push(format!("{head}{told}"));
            }
        }
        for xid in &gpu.xids {
            further.push(format!("XID {} {} times", safe(&xid.name), words::count(xid.value as usize)));
        }
        if !further.is_empty() {
            self.wrap("  ", &further.join("; "));
        }
    }

    fn table(&mut self, users: &[UserUsage<'_>]) {
        self.line("");
        let shown = || users.iter().take(TOP);
        let column = |head: &str, rank: u8, cell: &dyn Fn(&Usage) -> String| {
            Column::new(head, rank, shown().map(|(_, usage)| cell(usage)).collect())
        };
        let plain = |value: f64| if value > 0.0 { words::number(value) } else { "0".to_owned() };
        let table = Table {
            name: Column::new("user", 0, shown().map(|(user, _)| self.names.of(&user.id)).collect()),
            values: vec![
                column("GPU-seconds", 0, &|usage| words::with_error(usage.gpu_seconds, usage.gpu_seconds_stderr)),
                column("of busy", 1, &|usage| words::percent_with_error(usage.share_of_busy, usage.share_stderr)),
                column("active s", 4, &|usage| plain(usage.active_seconds)),
                column("coactive s", 5, &|usage| plain(usage.coactive_seconds)),
                column("contended s", 2, &|usage| plain(usage.contended_seconds)),
                column("memory max", 3, &|usage| words::maybe_bytes(usage.memory_max_bytes)),
            ],
        };
        let lines = table.lines(2, self.width, self.unicode, self.ink);
        self.lines.extend(lines);
        self.rest("  ", &users.iter().skip(TOP).map(|(_, usage)| usage.gpu_seconds).collect::<Vec<_>>());
    }

    /// `… 54 more: 12.3 GPU-seconds`
    fn rest(&mut self, indent: &str, seconds: &[f64]) {
        if !seconds.is_empty() {
            let (n, sum) = (words::count(seconds.len()), words::number(seconds.iter().sum()));
            let line = self.ink.faint(&format!("{indent}{} {n} more: {sum} GPU-seconds", self.dots()));
            self.line(line);
        }
    }
}

#[cfg(test)]
mod tests;
