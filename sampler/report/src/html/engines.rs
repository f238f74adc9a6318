//! Serving engines: what their own metrics say, and how it differs while other users are active.

use super::super::engine_words;
use super::super::model::UserReport;
use super::super::words;
use super::markup::html_escape;
use super::{HtmlPage, PROBLEMS, SHOWN};
use crate::engine_model::EngineReport;

impl HtmlPage<'_> {
    pub(super) fn engines(&mut self) {
        let report = self.report;
        let all: Vec<(&UserReport, &EngineReport)> =
            report.users.iter().flat_map(|user| user.engines.iter().map(move |engine| (user, engine))).collect();
        if all.is_empty() {
            return;
        }
        self.add("<section class=\"card\" id=\"engines\"><h2>Serving engines</h2>");
        self.add("<p class=\"note\">By their own metrics, which the agent read from the container.</p>");
        for (user, engine) in &all {
            let markup = self.engine(user, engine);
            self.add(&markup);
        }
        self.add("</section>");
    }

    fn engine(&self, user: &UserReport, engine: &EngineReport) -> String {
        let mut markup = format!("<h3>{} {}</h3><ul>", self.user(&user.id), html_escape(&engine_words::head(engine)));
        for problem in engine.problems.iter().take(PROBLEMS) {
            let readings = words::counted(problem.readings as usize, "reading", "readings");
            markup += &format!("<li><b>{readings}</b> failed: {}</li>", html_escape(&problem.text));
        }
        markup += &engine_words::requests(engine).map(|requests| format!("<li>{requests}</li>")).unwrap_or_default();
        for latency in &engine.latencies {
            markup += &format!("<li>{}<ul>", html_escape(&engine_words::mean(latency)));
            for contrast in latency.contrasts.iter().take(SHOWN) {
                let text = engine_words::contrast(contrast, &self.names.get(&contrast.id));
                markup += &format!("<li>{}</li>", html_escape(&text));
            }
            markup += "</ul></li>";
        }
        markup + "</ul>"
    }
}
