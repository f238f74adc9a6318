//! Waiting in blocking calls: a table of users, the matrix, and the evidence of a contender as a bar.

use super::super::model::*;
use super::super::ranking::{UserUsage, demand, involved, waiters};
use super::super::{wait_words, words};
use super::markup::html_escape;
use super::{HtmlPage, PROBLEMS, SHOWN};

impl HtmlPage<'_> {
    /// Nothing without wait probes.
    pub(super) fn waiting(&mut self) {
        let report = self.report;
        if !wait_words::has_waits(report) {
            return;
        }
        self.add("<section class=\"card\" id=\"waiting\"><h2>Waiting</h2>");
        self.add("<p class=\"note\">In blocking calls of the driver library, by wait probes. A process waits for its own work as well.</p>");
        let users = wait_words::probed(report);
        if !users.is_empty() {
            let heads: String = wait_words::HEADS.iter().map(|head| format!("<th scope=\"col\">{head}</th>")).collect();
            self.add(&format!(
                "<div class=\"scroll\"><table class=\"numbers waits\"><thead><tr><th scope=\"col\">User</th>{heads}</tr></thead><tbody>"
            ));
            for (user, waits) in &users {
                let cells: String = wait_words::cells(waits).iter().map(|cell| format!("<td>{cell}</td>")).collect();
                let row = format!("<tr><th scope=\"row\">{}</th>{cells}</tr>", self.user(&user.id));
                self.add(&row);
            }
            self.add("</tbody></table></div>");
        }
        let unprobed = wait_words::unprobed(report);
        if !unprobed.is_empty() {
            let item = |(user, text): &(&UserReport, String)| format!("<li>{}: {}</li>", self.user(&user.id), html_escape(text));
            let items: String = unprobed.iter().take(PROBLEMS).map(item).collect();
            let more = unprobed.len().saturating_sub(PROBLEMS);
            let more = if more > 0 { format!("<li>… {} more</li>", words::count(more)) } else { String::new() };
            self.add(&format!("<h3>Without wait probes</h3><ul class=\"processes note\">{items}{more}</ul>"));
        }
        self.add("</section>");
    }

    /// Rows: users with wait probes; columns as in [`HtmlPage::matrix`].
    pub(super) fn waiting_matrix(&mut self, users: &[UserUsage<'_>]) {
        let involved = involved(users.get(..SHOWN).unwrap_or(users));
        let rows = waiters(&involved);
        if rows.is_empty() {
            return;
        }
        let seconds = |row: &UserUsage<'_>, other: &UserUsage<'_>| {
            demand(row, other).and_then(|demand| demand.wait_seconds.or(demand.most_seconds()))
        };
        let most = rows.iter().flat_map(|(_, row)| involved.iter().filter_map(|other| seconds(row, other))).fold(0.0, f64::max);
        let name = |user: &UserUsage<'_>| html_escape(&self.names.get(&user.0.id));
        let heads = involved.iter().enumerate();
        let heads: String =
            heads.map(|(nth, other)| format!("<th scope=\"col\" title=\"{}\">{}</th>", name(other), nth + 1)).collect();
        let mut out = format!(
            "<h3>Waiting, by contender</h3><p class=\"note\">{}.</p>\n<div class=\"scroll\"><table class=\"matrix waiting\"><thead>\
             <tr><td></td>{heads}</tr></thead><tbody>\n",
            html_escape(&words::sentence(wait_words::MATRIX))
        );
        for (position, row) in &rows {
            out += &format!("<tr><th scope=\"row\"><span class=\"nth\">{}</span> {}</th>", position + 1, self.user(&row.0.id));
            for (column, other) in involved.iter().enumerate() {
                let text = html_escape(&wait_words::matrix_cell(demand(row, other)));
                out += &match seconds(row, other) {
                    _ if *position == column => "<td class=\"self\"></td>".to_owned(),
                    None => format!("<td class=\"none\">{text}</td>"),
                    Some(value) => {
                        let level = (value / most * 8.0).ceil().clamp(1.0, 8.0);
                        let title = format!("{} waited {text} s longer while {} was on", name(row), name(other));
                        format!("<td class=\"w{level:.0}\" title=\"{title}\">{text}</td>")
                    }
                };
            }
            out += "</tr>\n";
        }
        self.add(&(out + "</tbody></table></div>"));
    }

    /// How much longer the victim waited while the contender was on, as a bar; nothing if it is not confirmed.
    pub(super) fn wait_rate(&self, victim: &str, contender: &Contender) -> String {
        let Some(demand) = contender.demand.as_ref().filter(|demand| demand.why_not_confirmed.is_empty()) else {
            return String::new();
        };
        let (Some(rate), Some([low, high])) = (demand.wait_rate, demand.interval) else { return String::new() };
        let (than, without) = match demand.basis {
            DemandBasis::Quietest => (", than in its quietest windows", "quietest"),
            _ => ("", "without it"),
        };
        let mut facts = vec![
            format!("{}interval <b>{low:.2} to {high:.2}</b>", wait_words::level(demand)),
            format!("<b>{}</b>", words::counted(demand.transitions, "change", "changes")),
            format!("<b>{}</b> windows with it, <b>{}</b> {without}", demand.windows_with, demand.windows_without),
        ];
        facts.extend(demand.wait_seconds.map(|seconds| format!("<b>{}</b> in all", words::seconds(seconds))));
        format!(
            "<table class=\"rates\"><caption>Longer in blocking calls, in seconds per second of {}{than}</caption><tr><th scope=\"row\">while {} \
             was on</th><td><svg class=\"rate\" viewBox=\"0 0 100 10\" preserveAspectRatio=\"none\" aria-hidden=\"true\"><rect \
             class=\"track\" width=\"100\" height=\"10\"/><rect class=\"waited\" width=\"{:.1}\" height=\"10\"/></svg></td>\
             <td class=\"value\">{rate:.2}</td></tr></table><p class=\"facts\">{}</p>",
            self.user(victim),
            self.user(&contender.id),
            (rate * 100.0).clamp(0.0, 100.0),
            facts.join(" · ")
        )
    }
}
