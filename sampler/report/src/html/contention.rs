//! Findings, the matrix of GPU time received by contenders, and the evidence.

use super::super::model::*;
use super::super::ranking::{UserUsage, involved, received, sort_victims, split_contenders, strongest};
use super::super::{wait_words, words};
use super::markup::html_escape;
use super::{HtmlPage, SHOWN};

/// Contenders that are listed for each user, in addition to those with stronger evidence than coactivity.
const OTHERS: usize = 5;

impl HtmlPage<'_> {
    pub(super) fn findings(&mut self) {
        self.add("<section id=\"findings\"><h2>Findings</h2>");
        if self.report.findings.is_empty() {
            self.add(&format!("<p class=\"card quiet\">{}</p>", words::no_findings(self.report)));
        }
        for finding in &self.report.findings {
            let usage =
                self.report.user(&finding.victim).and_then(|user| user.gpus.iter().find(|usage| usage.uuid == finding.uuid));
            let contender = usage
                .zip(finding.aggressor.as_deref())
                .and_then(|(usage, id)| usage.contenders.iter().find(|contender| contender.id == id));
            let mut markup = format!(
                "<article class=\"card finding {}\"><p class=\"tags\">{}<span class=\"tag\">{}</span></p><p class=\"lead\">{}</p>",
                finding.evidence.map_or("own", Evidence::name),
                finding.evidence.map(badge).unwrap_or_default(),
                words::gpu_name(self.report, &finding.uuid),
                html_escape(&finding.text)
            );
            markup += &contender.map(|contender| self.wait_rate(&finding.victim, contender)).unwrap_or_default();
            markup += &contender.map(|contender| self.rates(&finding.victim, contender)).unwrap_or_default();
            markup += &usage.map(|usage| causes(&usage.causes)).unwrap_or_default();
            markup += "</article>";
            self.add(&markup);
        }
        self.add("</section>");
    }

    /// The experiments of the session; nothing without one.
    pub(super) fn experiments(&mut self) {
        if self.report.experiments.is_empty() {
            return;
        }
        self.add("<section id=\"experiments\"><h2>Experiments</h2>");
        for experiment in &self.report.experiments {
            let mut markup = format!(
                "<article class=\"card\"><p class=\"lead\">{} was frozen in {} of {} bursts, {} each; victim {}, {}, seed {}.</p>",
                self.user(&experiment.suspect),
                experiment.frozen_bursts,
                experiment.planned_bursts,
                words::seconds(experiment.freeze_seconds),
                self.user(&experiment.victim),
                words::consent(experiment.consent),
                experiment.seed
            );
            for gpu in &experiment.gpus {
                let name = format!("{}, ", words::gpu_name(self.report, &gpu.uuid));
                markup += &gpu.effects.iter().map(|effect| freeze_effect(&name, effect)).collect::<String>();
            }
            markup += &experiment.effects.iter().map(|effect| freeze_effect("", effect)).collect::<String>();
            self.add(&(markup + "</article>"));
        }
        self.add("</section>");
    }

    /// The victim's rate while the contender was off and on, as two bars.
    fn rates(&self, victim: &str, contender: &Contender) -> String {
        let (Some(before), Some(after)) = (contender.rate_before, contender.rate_after) else { return String::new() };
        let class = self.colour_of(victim).map_or_else(|| "busy".to_owned(), |colour| format!("c{colour}"));
        let bar = |head: &str, rate: f64| {
            format!(
                "<tr><th scope=\"row\">{head}</th><td><svg class=\"rate\" viewBox=\"0 0 100 10\" preserveAspectRatio=\"none\" \
                 aria-hidden=\"true\"><rect class=\"track\" width=\"100\" height=\"10\"/><rect class=\"{class}\" width=\"{:.1}\" \
                 height=\"10\"/></svg></td><td class=\"value\">{rate:.2}</td></tr>",
                (rate * 100.0).clamp(0.0, 100.0)
            )
        };
        let mut facts = vec![format!("difference <b>{:.2}</b>", before - after)];
        if let Some([low, high]) = contender.interval {
            let level = contender.interval_level.map(|level| format!("{} ", words::percent(level))).unwrap_or_default();
            facts.push(format!("{level}interval <b>{low:.2} to {high:.2}</b>"));
        }
        facts.push(format!("<b>{}</b>", words::counted(contender.transitions as usize, "change", "changes")));
        facts.push(format!("coactive for <b>{}</b>", words::seconds(contender.coactive_seconds)));
        format!(
            "<table class=\"rates\"><caption>GPU-seconds per second of {}</caption>{}{}</table><p class=\"facts\">{}</p>",
            self.user(victim),
            bar(&format!("while {} was off", self.user(&contender.id)), before),
            bar("while it was on", after),
            facts.join(" · ")
        )
    }

    /// Rows: the active user; columns: GPU time of other users in the same windows while the GPU was saturated.
    pub(super) fn matrix(&mut self, gpu: &GpuReport, users: &[UserUsage<'_>]) {
        let involved = involved(users.get(..SHOWN).unwrap_or(users));
        if involved.len() < 2 {
            return;
        }
        let most = involved.iter().flat_map(|row| involved.iter().map(|other| received(row, other))).fold(0.0, f64::max);
        self.add(
            "<h3>GPU time received by contenders</h3><p class=\"note\">GPU-seconds that the user of the column received while",
        );
        self.add("the user of the row was active and the GPU saturated.</p>");
        self.add("<div class=\"scroll\"><table class=\"matrix\"><thead><tr><td></td>");
        let heads: String = (1..=involved.len()).map(|nth| format!("<th scope=\"col\">{nth}</th>")).collect();
        self.add(&format!("{heads}</tr></thead><tbody>"));
        for (nth, row) in involved.iter().enumerate() {
            let mut line = format!("<tr><th scope=\"row\"><span class=\"nth\">{}</span> {}</th>", nth + 1, self.user(&row.0.id));
            for (column, other) in involved.iter().enumerate() {
                let value = received(row, other);
                line += &match value {
                    _ if nth == column => "<td class=\"self\"></td>".to_owned(),
                    0.0 => "<td class=\"none\">·</td>".to_owned(),
                    _ => {
                        let level = (value / most * 8.0).ceil().clamp(1.0, 8.0);
                        format!(
                            "<td class=\"h{level:.0}\" data-row=\"{nth}\" data-column=\"{column}\">{}</td>",
                            words::number(value)
                        )
                    }
                };
            }
            self.add(&(line + "</tr>"));
        }
        self.add("</tbody></table></div>");
        if users.len() > SHOWN {
            let note = format!(
                "The first {SHOWN} users of {}; the others are in the json format.",
                words::gpu_name(self.report, &gpu.uuid)
            );
            self.add(&format!("<p class=\"note\">{note}</p>"));
        }
    }

    pub(super) fn victims(&mut self, users: &[UserUsage<'_>]) {
        let mut victims: Vec<UserUsage<'_>> = users.to_vec();
        victims.retain(|(_, usage)| !usage.contenders.is_empty());
        if victims.is_empty() {
            return;
        }
        sort_victims(&mut victims);
        self.add("<h3>Evidence</h3><div class=\"victims\">");
        for (user, usage) in victims.iter().take(SHOWN) {
            let mut markup = format!(
                "<details><summary>{} {}<span class=\"aside\">{} contended of {} active</span></summary>",
                self.user(&user.id),
                strongest(usage).map(badge).unwrap_or_default(),
                words::seconds(usage.contended_seconds),
                words::seconds(usage.active_seconds)
            );
            let (listed, others) = split_contenders(usage, OTHERS);
            markup += &listed.iter().map(|contender| self.contender(contender)).collect::<String>();
            if !others.is_empty() {
                let n = words::count(others.len());
                markup += &format!("<p class=\"note\">{n} more contenders with less GPU time are in the json format.</p>");
            }
            self.add(&(markup + &causes(&usage.causes) + "</details>"));
        }
        self.add("</div>");
        if victims.len() > SHOWN {
            self.add(&format!(
                "<p class=\"note\">{} more users are in the json format.</p>",
                words::count(victims.len() - SHOWN)
            ));
        }
    }

    fn contender(&self, contender: &Contender) -> String {
        let reason = &contender.why_not_confirmed;
        let experiments = contender.experiment.iter().filter_map(|effect| words::freeze_means(effect, "the contender"));
        let parts = [
            words::rates(contender).map(|rates| format!("{rates}.")),
            (!reason.is_empty()).then(|| format!("Not confirmed: {}.", html_escape(reason).trim_end_matches('.'))),
            contender.demand.as_ref().map(|demand| format!("Waiting: {}.", html_escape(&wait_words::evidence(demand)))),
        ];
        let parts = parts.into_iter().flatten().chain(experiments.map(|means| format!("Experiment: {means}.")));
        format!(
            "<div class=\"contender\"><p>{} {}received <b>{}</b> GPU-seconds in the same windows, <b>{}</b> of them while the \
             GPU was saturated; coactive for <b>{}</b>.</p><p class=\"note\">{}</p></div>",
            self.user(&contender.id),
            if contender.evidence > Evidence::Coactive { badge(contender.evidence) } else { String::new() },
            words::with_error(contender.gpu_seconds, contender.gpu_seconds_stderr),
            words::number(contender.saturated_gpu_seconds),
            words::seconds(contender.coactive_seconds),
            parts.collect::<Vec<_>>().join(" ")
        )
    }
}

/// `gpu`: the name of the GPU with a comma; empty for an outcome that belongs to no single GPU.
fn freeze_effect(gpu: &str, effect: &FreezeEffect) -> String {
    let verdict = if effect.confirmed {
        badge(Evidence::ExperimentConfirmed)
    } else {
        format!("not confirmed: {} ", html_escape(&effect.why_not))
    };
    let means = words::freeze_means(effect, "the suspect").unwrap_or_default();
    format!("<p>{gpu}{}: {verdict}{means}</p>", effect.outcome.name())
}

fn badge(evidence: Evidence) -> String {
    format!("<span class=\"tag {0}\" title=\"{1}\">{0}</span> ", evidence.name(), words::sentence(words::meaning(evidence)))
}

/// Other causes: possible ones first, then unknown ones.
fn causes(all: &[Cause]) -> String {
    if all.is_empty() {
        return String::new();
    }
    let mut out = "<h4>Other causes</h4><ul class=\"causes\">".to_owned();
    for verdict in [Verdict::Possible, Verdict::Unknown, Verdict::RuledOut] {
        for cause in all.iter().filter(|cause| cause.verdict == verdict) {
            out += &format!(
                "<li class=\"{}\"><span class=\"verdict\">{}</span><b>{}</b><span class=\"detail\">{}</span></li>",
                verdict.name(),
                words::verdict(verdict),
                words::cause(cause.cause),
                html_escape(&cause.detail)
            );
        }
    }
    out + "</ul>"
}
