//! The report as text, for a terminal or a pipe: problems first, then the findings, then each GPU.

mod contention;
mod engines;
mod experiments;
mod lanes;
mod waits;

use super::layout::{Column, Ink, Table, fit, terminal_safe};
use super::model::*;
use super::page::{Page, TextOptions};
use super::ranking::{UserUsage, users_of};
use super::words::{self, Names};

/// Users of a GPU that are listed, as many as fit a screen; the others are shown as a sum.
const TOP: usize = 10;
/// Damaged parts and gaps that are listed; the others are counted.
const PROBLEMS: usize = 8;

/// The page with the state that all of its parts share.
struct TextPage<'a> {
    report: &'a Report,
    names: Names,
    page: Page,
}

/// Ends with a newline. Characters of names that control a terminal are escaped.
pub fn text(report: &Report, options: &TextOptions) -> String {
    let mut page = TextPage { report, names: Names::new(report), page: Page::new(options) };
    page.summary();
    page.problems();
    page.findings();
    page.experiments();
    for gpu in &report.gpus {
        page.gpu(gpu);
    }
    if report.gpus.is_empty() {
        page.page.heading("The report has no GPU.");
    }
    page.waiting();
    page.engines();
    page.explanations();
    page.page.finish()
}

/// The experiments of the report alone, as `gpu-sampler experiment` prints them.
pub fn experiments_text(report: &Report, options: &TextOptions) -> String {
    let mut page = TextPage { report, names: Names::new(report), page: Page::new(options) };
    page.problems();
    page.experiments();
    page.page.finish()
}

impl TextPage<'_> {
    fn summary(&mut self) {
        let report = self.report;
        let head = format!("GPU session on {}", words::node(&report.node));
        let line = self.page.ink.strong(&fit(&head, self.page.width, self.page.unicode));
        self.page.line(line);
        let text = format!(
            "{}, {}, {}, {}",
            words::date(report.start),
            words::span(report.duration_seconds),
            words::counted(report.gpus.len(), "GPU", "GPUs"),
            words::counted(report.users.len(), "user", "users")
        );
        self.page.wrap("", &text);
    }

    /// Prominent, because all numbers below refer to the remaining data only.
    fn problems(&mut self) {
        let report = self.report;
        if report.truncated || !report.damage.is_empty() {
            self.page.line("");
            let text = if report.damage.is_empty() {
                "INCOMPLETE: the file ends before the session did; the report covers what was recorded until then"
            } else {
                "DAMAGED: parts of the file cannot be read; the report covers the readable parts"
            };
            self.page.painted("", text, Ink::alarm);
            for damage in report.damage.iter().take(PROBLEMS) {
                self.page.wrap("  ! ", &terminal_safe(damage));
            }
            self.page.more(report.damage.len(), PROBLEMS);
        }
        if !report.gaps.is_empty() {
            self.page.line("");
            let lost: f64 = report.gaps.iter().map(|gap| (gap.to.seconds() - gap.from.seconds()).max(0.0)).sum();
            let gaps = words::counted(report.gaps.len(), "gap", "gaps");
            let text = format!("{gaps}: {} not observed and not counted as idle", words::span(lost));
            self.page.painted("", &text, Ink::alarm);
            for gap in report.gaps.iter().take(PROBLEMS) {
                let (gpu, from, to) =
                    (words::gpu_name(self.report, &gap.uuid), words::clock_millis(gap.from), words::clock_millis(gap.to));
                self.page.wrap("  ! ", &format!("{gpu}, {from} to {to}: {}", terminal_safe(&gap.reason)));
            }
            self.page.more(report.gaps.len(), PROBLEMS);
        }
    }

    fn findings(&mut self) {
        let report = self.report;
        self.page.heading("Findings");
        if report.findings.is_empty() {
            self.page.wrap("  ", words::no_findings(report));
            return;
        }
        for (at, finding) in report.findings.iter().enumerate().take(TOP) {
            let tag = finding.evidence.map(|evidence| format!(" [{}]", evidence.name())).unwrap_or_default();
            let text = format!("{}: {}{tag}", words::gpu_name(self.report, &finding.uuid), terminal_safe(&finding.text));
            self.page.wrap(&format!("  {}. ", at + 1), &text);
        }
        self.page.more(report.findings.len(), TOP);
    }

    fn gpu(&mut self, gpu: &GpuReport) {
        let users = users_of(self.report, &gpu.uuid);
        let head =
            format!("{}  {}  {}", words::gpu_name(self.report, &gpu.uuid), terminal_safe(&gpu.model), terminal_safe(&gpu.uuid));
        let head = fit(&head, self.page.width, self.page.unicode);
        self.page.heading(&head);
        self.states(gpu);
        if let Some(timeline) = self.report.timelines.iter().find(|timeline| timeline.uuid == gpu.uuid) {
            self.lanes(timeline, &users);
        }
        if users.is_empty() {
            self.page.line("");
            self.page.line("  No users.");
            return;
        }
        self.table(&users);
        self.matrix(&users);
        self.waiting_matrix(&users);
        self.victims(&users);
    }

    /// Explains the grades of evidence.
    fn explanations(&mut self) {
        let has_contenders = self.report.users.iter().flat_map(|user| &user.gpus).any(|usage| !usage.contenders.is_empty());
        if has_contenders {
            self.page.line("");
            for evidence in words::explained_grades(self.report) {
                self.page.wrap("", &format!("{}: {}", evidence.name(), words::meaning(evidence)));
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
        self.page.wrap("  ", &text);
        let mut further = Vec::new();
        if let Some(used) = gpu.memory_used_max_bytes {
            let total = gpu.memory_total_bytes.map(|total| format!(" of {}", words::bytes(total))).unwrap_or_default();
            further.push(format!("memory up to {}{total}", words::bytes(used)));
        }
        let list = |all: &[Named]| {
            let nonzero = all.iter().filter(|named| named.value > 0.0);
            nonzero
                .map(|named| format!("{} {} s", terminal_safe(&named.name), words::number(named.value)))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let throttled = gpu.throttle_seconds.as_deref().unwrap_or_default();
        for (head, all) in [("clocks limited", throttled), ("unattributed", &gpu.unattributed)] {
            let seconds = list(all);
            if !seconds.is_empty() {
                further.push(format!("{head}: {seconds}"));
            }
        }
        for xid in &gpu.xids {
            further.push(format!("XID {} {} times", terminal_safe(&xid.name), words::count(xid.value as usize)));
        }
        if !further.is_empty() {
            self.page.wrap("  ", &further.join("; "));
        }
    }

    fn table(&mut self, users: &[UserUsage<'_>]) {
        self.page.line("");
        let shown = || users.iter().take(TOP);
        let column = |head: &str, rank: u8, cell: &dyn Fn(&Usage) -> String| {
            Column::new(head, rank, shown().map(|(_, usage)| cell(usage)).collect())
        };
        let plain = |value: f64| if value > 0.0 { words::number(value) } else { "0".to_owned() };
        self.page.table(Table {
            name: Column::new("user", 0, shown().map(|(user, _)| self.names.get(&user.id)).collect()),
            values: vec![
                column("GPU-seconds", 0, &|usage| words::with_error(usage.gpu_seconds, usage.gpu_seconds_stderr)),
                column("of busy", 1, &|usage| words::percent_with_error(usage.share_of_busy, usage.share_stderr)),
                column("active s", 4, &|usage| plain(usage.active_seconds)),
                column("coactive s", 5, &|usage| plain(usage.coactive_seconds)),
                column("contended s", 2, &|usage| plain(usage.contended_seconds)),
                column("memory max", 3, &|usage| words::maybe_bytes(usage.memory_max_bytes)),
            ],
        });
        self.rest("  ", &users.iter().skip(TOP).map(|(_, usage)| usage.gpu_seconds).collect::<Vec<_>>());
    }

    /// `… 54 more: 12.3 GPU-seconds`
    fn rest(&mut self, indent: &str, seconds: &[f64]) {
        if !seconds.is_empty() {
            let (n, sum) = (words::count(seconds.len()), words::number(seconds.iter().sum()));
            let line = self.page.ink.faint(&format!("{indent}{} {n} more: {sum} GPU-seconds", self.page.dots()));
            self.page.line(line);
        }
    }
}

#[cfg(test)]
mod tests;
