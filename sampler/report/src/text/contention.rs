//! Contention: the matrices of GPU time received by contenders and of waiting, the evidence, and other causes.

use super::super::layout::{Column, Ink, Table, fit, right, terminal_safe};
use super::super::model::*;
use super::super::ranking::{UserUsage, demand, involved, received, sort_victims, split_contenders, strongest, waiters};
use super::super::wait_words;
use super::super::words;
use super::{TOP, TextPage};

/// Contenders that are listed for each user, in addition to those with stronger evidence than coactivity.
const OTHERS: usize = 3;

/// Users that are listed although nothing is confirmed for them; the matrix and the other formats have the rest.
const VICTIMS: usize = 3;

/// The label of a user in the matrix: A, B, .. Z, then numbers.
fn letter(nth: usize) -> String {
    u8::try_from(nth).ok().filter(|n| *n < 26).map_or_else(|| (nth + 1).to_string(), |n| char::from(b'A' + n).to_string())
}

fn colour(verdict: Verdict) -> fn(Ink, &str) -> String {
    match verdict {
        Verdict::Possible => Ink::warn,
        Verdict::RuledOut => Ink::good,
        Verdict::Unknown => Ink::faint,
    }
}

impl TextPage<'_> {
    /// Rows: the active user; columns: GPU time of other users in the same windows while the GPU was saturated.
    pub(super) fn matrix(&mut self, users: &[UserUsage<'_>]) {
        let involved = involved(users.get(..TOP).unwrap_or(users));
        if involved.len() < 2 {
            return;
        }
        self.page.line("");
        self.page.wrap(
            "  ",
            "GPU-seconds that the user of the column received while the user of the row was active and the GPU saturated",
        );
        let nothing = if self.page.unicode { "·" } else { "." };
        let columns = involved.iter().enumerate().map(|(nth, other)| {
            let cell = |row: &UserUsage<'_>| match received(row, other) {
                _ if row.0.id == other.0.id => String::new(),
                value if value > 0.0 => words::number(value),
                _ => nothing.to_owned(),
            };
            Column::new(&letter(nth), u8::try_from(nth).unwrap_or(u8::MAX), involved.iter().map(cell).collect())
        });
        let name = |(nth, row): (usize, &UserUsage<'_>)| format!("{}  {}", letter(nth), self.names.get(&row.0.id));
        let table =
            Table { name: Column::new("", 0, involved.iter().enumerate().map(name).collect()), values: columns.collect() };
        self.page.table(table);
    }

    /// Rows: users with wait probes; columns as in [`Self::matrix`].
    pub(super) fn waiting_matrix(&mut self, users: &[UserUsage<'_>]) {
        let involved = involved(users.get(..TOP).unwrap_or(users));
        let rows = waiters(&involved);
        if rows.is_empty() {
            return;
        }
        self.page.line("");
        self.page.wrap("  ", &words::sentence(wait_words::MATRIX));
        let columns = involved.iter().enumerate().map(|(nth, other)| {
            let cell = |(position, row): &(usize, UserUsage<'_>)| match *position == nth {
                true => String::new(),
                false => wait_words::matrix_cell(demand(row, other)),
            };
            Column::new(&letter(nth), u8::try_from(nth).unwrap_or(u8::MAX), rows.iter().map(cell).collect())
        });
        let name = |(nth, row): &(usize, UserUsage<'_>)| format!("{}  {}", letter(*nth), self.names.get(&row.0.id));
        let table = Table { name: Column::new("", 0, rows.iter().map(name).collect()), values: columns.collect() };
        self.page.table(table);
    }

    pub(super) fn victims(&mut self, users: &[UserUsage<'_>]) {
        let mut victims: Vec<UserUsage<'_>> = users.to_vec();
        victims.retain(|(_, usage)| !usage.contenders.is_empty() || !usage.causes.is_empty());
        sort_victims(&mut victims);
        let confirmed = victims.iter().filter(|(_, usage)| strongest(usage) > Some(Evidence::Coactive)).count();
        let shown = confirmed.clamp(VICTIMS, TOP).min(victims.len());
        for (user, usage) in victims.iter().take(shown) {
            self.victim(user, usage);
        }
        if victims.len() > shown {
            self.page.line("");
        }
        self.page.more(victims.len(), shown);
    }

    fn victim(&mut self, user: &UserReport, usage: &Usage) {
        self.page.line("");
        let name = self.page.ink.strong(&fit(&self.names.get(&user.id), self.page.width.saturating_sub(2), self.page.unicode));
        self.page.line(format!("  {name}"));
        let (active, coactive) = (words::seconds(usage.active_seconds), words::seconds(usage.coactive_seconds));
        let contended = words::seconds(usage.contended_seconds);
        self.page
            .wrap("    ", &format!("active for {active}, coactive for {coactive}, contended (GPU saturated) for {contended}"));
        let (listed, others) = split_contenders(usage, OTHERS);
        for contender in listed {
            self.contender(contender);
        }
        self.rest("    ", &others.iter().map(|contender| contender.gpu_seconds).collect::<Vec<_>>());
        self.causes(&usage.causes);
    }

    fn contender(&mut self, contender: &Contender) {
        let other = self.names.get(&contender.id);
        let received = words::with_error(contender.gpu_seconds, contender.gpu_seconds_stderr);
        let saturated = words::number(contender.saturated_gpu_seconds);
        let text = format!(
            "{other} received {received} GPU-seconds in the same windows, {saturated} of them while the GPU was saturated"
        );
        self.page.wrap("    - ", &text);
        let reason = &contender.why_not_confirmed;
        let rates = words::rates(contender).map(|rates| format!(": {rates}")).unwrap_or_default();
        let reason = if reason.is_empty() { String::new() } else { format!(", not confirmed: {}", terminal_safe(reason)) };
        // The grade stands before the numbers that it rests on.
        let demand = contender.demand.as_ref().map(|demand| terminal_safe(&wait_words::evidence(demand)));
        match demand {
            Some(demand) if contender.evidence == Evidence::DemandConfirmed => {
                self.page.wrap("      ", &format!("{}: {demand}", contender.evidence.name()));
                if !rates.is_empty() {
                    self.page.wrap("      ", &format!("GPU time{rates}"));
                }
            }
            demand => {
                self.page.wrap("      ", &format!("{}{rates}{reason}", contender.evidence.name()));
                if let Some(demand) = demand {
                    self.page.wrap("      ", &format!("waiting: {demand}"));
                }
            }
        }
        for means in contender.experiment.iter().filter_map(|effect| words::freeze_means(effect, "the contender")) {
            self.page.wrap("      ", &format!("experiment: {means}"));
        }
    }

    fn causes(&mut self, causes: &[Cause]) {
        if causes.is_empty() {
            return;
        }
        self.page.line("    Other causes:");
        for verdict in [Verdict::Possible, Verdict::Unknown, Verdict::RuledOut] {
            for cause in causes.iter().filter(|cause| cause.verdict == verdict) {
                let tag = right(words::verdict(verdict), "ruled out".len());
                let head = format!("    {tag}  ");
                let position = self.page.line_count();
                self.page.wrap(&head, &format!("{}: {}", words::cause(cause.cause), terminal_safe(&cause.detail)));
                self.page.paint_tag(position, &tag, colour(verdict));
            }
        }
    }
}
