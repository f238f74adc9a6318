//! Whom a user kept waiting: who got what meanwhile, the evidence, and what else could explain it.

use super::super::layout::{Column, Table, fit, right, safe};
use super::super::model::*;
use super::super::words;
use super::{TOP, TextPage, UserUsage};

/// Others that are told one by one for each user, besides those with more evidence than coactivity.
const OTHERS: usize = 3;

/// Users of whom nothing is confirmed that are told one by one; the matrix and the other formats have the rest.
const VICTIMS: usize = 3;

/// With its letter in the matrix: A, B, .. Z, then numbers.
fn letter(nth: usize) -> String {
    u8::try_from(nth).ok().filter(|n| *n < 26).map_or_else(|| (nth + 1).to_string(), |n| char::from(b'A' + n).to_string())
}

impl TextPage<'_> {
    /// Rows: those who were active; columns: what others got meanwhile, with the GPU saturated.
    pub(super) fn matrix(&mut self, users: &[UserUsage<'_>]) {
        let got = |row: &UserUsage<'_>, other: &UserUsage<'_>| {
            row.1.contenders.iter().find(|one| one.id == other.0.id).map_or(0.0, |one| one.saturated_gpu_seconds)
        };
        let involved: Vec<&UserUsage<'_>> = {
            let all: Vec<&UserUsage<'_>> = users.iter().take(TOP).collect();
            all.iter().copied().filter(|one| all.iter().any(|other| got(one, other) > 0.0 || got(other, one) > 0.0)).collect()
        };
        if involved.len() < 2 {
            return;
        }
        self.line("");
        self.wrap("  ", "GPU-seconds that the column's user got while the row's was active and the GPU saturated");
        let nothing = if self.unicode { "·" } else { "." };
        let columns = involved.iter().enumerate().map(|(nth, other)| {
            let cell = |row: &&UserUsage<'_>| match got(row, other) {
                _ if row.0.id == other.0.id => String::new(),
                value if value > 0.0 => words::number(value),
                _ => nothing.to_owned(),
            };
            Column::new(&letter(nth), u8::try_from(nth).unwrap_or(u8::MAX), involved.iter().map(cell).collect())
        });
        let name = |(nth, row): (usize, &&UserUsage<'_>)| format!("{}  {}", letter(nth), self.names.of(&row.0.id));
        let table =
            Table { name: Column::new("", 0, involved.iter().enumerate().map(name).collect()), values: columns.collect() };
        let lines = table.lines(2, self.width, self.unicode, self.ink);
        self.lines.extend(lines);
    }

    pub(super) fn victims(&mut self, users: &[UserUsage<'_>]) {
        let strongest = |usage: &Usage| usage.contenders.iter().map(|one| one.evidence).max();
        let mut victims: Vec<&UserUsage<'_>> =
            users.iter().filter(|(_, usage)| !usage.contenders.is_empty() || !usage.causes.is_empty()).collect();
        victims.sort_by(|(_, one), (_, other)| {
            let waited = other.contended_seconds.total_cmp(&one.contended_seconds);
            strongest(other).cmp(&strongest(one)).then(waited)
        });
        let confirmed = victims.iter().filter(|(_, usage)| strongest(usage) > Some(Evidence::Coactive)).count();
        let shown = confirmed.clamp(VICTIMS, TOP).min(victims.len());
        for (user, usage) in victims.iter().take(shown) {
            self.victim(user, usage);
        }
        if victims.len() > shown {
            self.line("");
        }
        self.more(victims.len(), shown, "  ");
    }

    fn victim(&mut self, user: &UserReport, usage: &Usage) {
        self.line("");
        let name = self.ink.strong(&fit(&self.names.of(&user.id), self.width.saturating_sub(2), self.unicode));
        self.line(format!("  {name}"));
        let (active, coactive) = (words::seconds(usage.active_seconds), words::seconds(usage.coactive_seconds));
        let contended = words::seconds(usage.contended_seconds);
        self.wrap(
            "    ",
            &format!("active for {active}, {coactive} of them with others, {contended} with the GPU saturated besides"),
        );
        let (told, rest): (Vec<_>, Vec<_>) =
            usage.contenders.iter().enumerate().partition(|(nth, one)| *nth < OTHERS || one.evidence > Evidence::Coactive);
        for (_, contender) in told {
            self.contender(contender);
        }
        self.rest("    ", &rest.iter().map(|(_, one)| one.gpu_seconds).collect::<Vec<_>>());
        self.causes(&usage.causes);
    }

    fn contender(&mut self, contender: &Contender) {
        let other = self.names.of(&contender.id);
        let got = words::with_error(contender.gpu_seconds, contender.gpu_seconds_stderr);
        let saturated = words::number(contender.saturated_gpu_seconds);
        let text = format!("{other} got {got} GPU-seconds meanwhile, {saturated} of them with the GPU saturated");
        self.wrap("    - ", &text);
        let why = &contender.why_not_confirmed;
        let rates = words::rates(contender).map(|rates| format!(": {rates}")).unwrap_or_default();
        let why = if why.is_empty() { String::new() } else { format!(", not confirmed: {}", safe(why)) };
        self.wrap("      ", &format!("{}{rates}{why}", contender.evidence.name()));
    }

    fn causes(&mut self, causes: &[Cause]) {
        if causes.is_empty() {
            return;
        }
        self.line("    What else could explain it:");
        for verdict in [Verdict::Possible, Verdict::Unknown, Verdict::RuledOut] {
            for cause in causes.iter().filter(|cause| cause.verdict == verdict) {
                let tag = right(words::verdict(verdict), "ruled out".len());
                let head = format!("    {tag}  ");
                let from = self.lines.len();
                self.wrap(&head, &format!("{}: {}", words::cause(cause.cause), safe(&cause.detail)));
                self.paint(from, &tag, verdict);
            }
        }
    }

    /// Colours the tag of the line at `from`: afterwards, so that the width was counted without.
    fn paint(&mut self, from: usize, tag: &str, verdict: Verdict) {
        let painted = match verdict {
            Verdict::Possible => self.ink.warn(tag),
            Verdict::RuledOut => self.ink.good(tag),
            Verdict::Unknown => self.ink.faint(tag),
        };
        if let Some(line) = self.lines.get_mut(from) {
            *line = line.replacen(tag, &painted, 1);
        }
    }
}
