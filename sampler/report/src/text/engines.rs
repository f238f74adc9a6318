//! Serving engines: what their own metrics say, and how it differs while other users are active.

use super::super::engine_words;
use super::super::layout::{Ink, fit, terminal_safe};
use super::TextPage;

/// Comparisons of a latency that are listed, and reasons of failed readings; the others are counted.
const LISTED: usize = 5;

impl TextPage<'_> {
    pub(super) fn engines(&mut self) {
        let report = self.report;
        if report.users.iter().all(|user| user.engines.is_empty()) {
            return;
        }
        self.page.heading("Serving engines, by their own metrics");
        for user in &report.users {
            for engine in &user.engines {
                let head = format!("{}: {}", self.names.get(&user.id), terminal_safe(&engine_words::head(engine)));
                let head = fit(&head, self.page.width.saturating_sub(2), self.page.unicode);
                let head = self.page.ink.strong(&head);
                self.page.line(format!("  {head}"));
                for problem in engine.problems.iter().take(LISTED) {
                    let text = format!("    ! {} readings: {}", problem.readings, terminal_safe(&problem.text));
                    self.page.painted("", &text, Ink::alarm);
                }
                self.page.more(engine.problems.len(), LISTED);
                if let Some(requests) = engine_words::requests(engine) {
                    self.page.wrap("    ", &requests);
                }
                for latency in &engine.latencies {
                    self.page.wrap("    ", &engine_words::mean(latency));
                    for contrast in latency.contrasts.iter().take(LISTED) {
                        let text = engine_words::contrast(contrast, &self.names.get(&contrast.id));
                        self.page.wrap("      - ", &terminal_safe(&text));
                    }
                    self.page.more(latency.contrasts.len(), LISTED);
                }
            }
        }
    }
}
