//! The comparison as text, for a terminal or a pipe.

use super::super::layout::{Column, Ink, Table, fit, terminal_safe};
use super::super::page::{Page, TextOptions};
use super::super::words;
use super::*;

/// Entries of a list that are shown; the others are counted.
const TOP: usize = 20;

impl Comparison {
    /// Ends with a newline.
    pub fn text(&self, options: &TextOptions) -> String {
        let mut page = Page::new(options);
        sessions(&mut page, self);
        summary(&mut page, self);
        gpus(&mut page, self);
        users(&mut page, self);
        waiting(&mut page, self);
        evidence(&mut page, self);
        unmatched(&mut page, "Only in A", &self.only_a);
        unmatched(&mut page, "Only in B", &self.only_b);
        matching(&mut page, self);
        page.finish()
    }
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

/// `+0.440 ± 0.012 *`, with the star if the difference exceeds two standard errors.
fn difference(pair: &UsagePair) -> String {
    match pair.difference.zip(pair.difference_stderr) {
        Some((difference, stderr)) => {
            format!("{difference:+.3} ± {stderr:.3} {}", if pair.exceeds_two_errors { "*" } else { " " })
        }
        None => words::UNKNOWN.to_owned(),
    }
}

fn change(value: impl Fn(&Amount) -> Option<f64>, pair: &UsagePair) -> String {
    format!("{} → {}", ratio(value(&pair.a)), ratio(value(&pair.b)))
}

fn sessions(page: &mut Page, comparison: &Comparison) {
    page.painted("", "Comparison of two GPU sessions", Ink::strong);
    for (name, side) in [("A", &comparison.a), ("B", &comparison.b)] {
        let duration = words::span(side.duration_seconds);
        page.wrap(&format!("  {name}  "), &format!("{}, {}, {duration}", words::node(&side.node), side.start));
        if side.truncated || !side.damage.is_empty() {
            let damage = terminal_safe(&side.damage.join("; "));
            let detail = if damage.is_empty() { "the file ends before the session did" } else { &damage };
            page.painted("     ! ", &format!("{name} is INCOMPLETE: {detail}"), Ink::alarm);
        }
        if side.gaps > 0 {
            let gaps = words::counted(side.gaps, "gap", "gaps");
            page.painted("     ! ", &format!("{name} has {gaps}: unobserved time is excluded"), Ink::alarm);
        }
    }
}

fn summary(page: &mut Page, comparison: &Comparison) {
    page.heading("Summary");
    let pairs = comparison.users.iter().flat_map(|user| user.gpus.iter().map(move |pair| (user, pair)));
    let differences: Vec<String> = pairs
        .filter(|(_, pair)| pair.exceeds_two_errors)
        .filter_map(|(user, pair)| {
            let (a, b) = (pair.a.rate?, pair.b.rate?);
            let change = if b > a { "more" } else { "less" };
            Some(format!(
                "{} received {change} time on GPU {} in B: {b:.3} instead of {a:.3} GPU-seconds per second, a difference of more \
                 than two standard errors",
                user.name, pair.index
            ))
        })
        .collect();
    for text in differences.iter().take(TOP) {
        page.wrap("  - ", text);
    }
    page.more(differences.len(), TOP);
    if differences.is_empty() {
        page.wrap("  ", "No user in both sessions has a difference of more than two standard errors.");
    }
    let note = "Only utilization is compared: whether a workload took longer or requested less GPU time is not \
                known. Standard errors cover sampling only.";
    page.painted("  ", note, Ink::faint);
}

fn gpus(page: &mut Page, comparison: &Comparison) {
    if comparison.gpus.is_empty() {
        page.heading("No GPU is in both sessions.");
        return;
    }
    page.heading("GPUs");
    let name = |gpu: &GpuPair| match gpu.matched_by {
        GpuMatch::Uuid => format!("GPU {} {}", gpu.index, words::short_uuid(&gpu.uuid_b)),
        GpuMatch::Index => format!("GPU {} (different GPU in B)", gpu.index),
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
    page.table(table);
}

fn users(page: &mut Page, comparison: &Comparison) {
    page.heading("Users in both sessions, in GPU-seconds per second (*: more than two standard errors)");
    let rows: Vec<(&UserPair, &UsagePair)> =
        comparison.users.iter().flat_map(|user| user.gpus.iter().map(move |pair| (user, pair))).collect();
    if rows.is_empty() {
        page.line("  none");
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
            column("of busy", 6, &|pair| change(|amount| amount.share_of_busy, pair)),
            column("coactive", 7, &|pair| change(|amount| amount.coactive_ratio, pair)),
            column("contended", 3, &|pair| change(|amount| amount.contended_ratio, pair)),
        ],
    };
    page.table(table);
    page.more(rows.len(), TOP);
}

/// Users with wait probes in A or B.
fn waiting(page: &mut Page, comparison: &Comparison) {
    let users = comparison.users.iter().filter(|user| user.wait_ratio_a.or(user.wait_ratio_b).is_some());
    let users: Vec<&UserPair> = users.collect();
    if users.is_empty() {
        return;
    }
    page.heading("Waiting in blocking calls, in percent of the probed time");
    let column = |head: &str, value: fn(&UserPair) -> Option<f64>| {
        Column::new(head, 0, users.iter().take(TOP).map(|user| ratio(value(user))).collect())
    };
    let table = Table {
        name: Column::new("user", 0, users.iter().take(TOP).map(|user| user.name.clone()).collect()),
        values: vec![column("A", |user| user.wait_ratio_a), column("B", |user| user.wait_ratio_b)],
    };
    page.table(table);
    page.more(users.len(), TOP);
}

fn evidence(page: &mut Page, comparison: &Comparison) {
    let name = |evidence: Option<Evidence>| evidence.map_or("not coactive", Evidence::name);
    let rows: Vec<String> = comparison
        .users
        .iter()
        .flat_map(|user| user.gpus.iter().flat_map(move |pair| pair.evidence.iter().map(move |evidence| (user, pair, evidence))))
        .map(|(user, pair, evidence)| {
            format!("GPU {}: {} with {}: {} → {}", pair.index, user.name, evidence.other, name(evidence.a), name(evidence.b))
        })
        .collect();
    if rows.is_empty() {
        return;
    }
    page.heading("Evidence, A → B");
    for row in rows.iter().take(TOP) {
        page.wrap("  - ", row);
    }
    page.more(rows.len(), TOP);
}

fn unmatched(page: &mut Page, heading: &str, users: &[UnmatchedUser]) {
    if users.is_empty() {
        return;
    }
    page.heading(heading);
    for user in users.iter().take(TOP) {
        let text = format!("  {}: {} GPU-seconds", user.name, words::number(user.gpu_seconds));
        page.line(fit(&text, page.width, page.unicode));
    }
    page.more(users.len(), TOP);
}

fn matching(page: &mut Page, comparison: &Comparison) {
    let mut notes: Vec<String> = comparison
        .users
        .iter()
        .filter(|user| user.id_a != user.id_b)
        .map(|user| format!("{} has another id in B; matched by {}", user.name, user.matched_by.description()))
        .collect();
    notes.extend(comparison.ambiguous.iter().cloned());
    if notes.is_empty() {
        return;
    }
    page.heading("User matching");
    for note in notes.iter().take(TOP) {
        page.wrap("  - ", note);
    }
    page.more(notes.len(), TOP);
}
