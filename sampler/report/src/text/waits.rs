//! Waiting in blocking calls: a table of users, and the processes that had no wait probes.

use super::super::layout::{Column, Ink, Table, terminal_safe};
use super::super::wait_words;
use super::{PROBLEMS, TOP, TextPage};

impl TextPage<'_> {
    /// Nothing without wait probes.
    pub(super) fn waiting(&mut self) {
        let report = self.report;
        if !wait_words::has_waits(report) {
            return;
        }
        self.page.heading("Waiting in blocking calls of the driver library");
        let users = wait_words::probed(report);
        if !users.is_empty() {
            let cells: Vec<[String; 6]> = users.iter().take(TOP).map(|(_, waits)| wait_words::cells(waits)).collect();
            let ranks = [0, 0, 3, 2, 1, 4];
            let columns = wait_words::HEADS.iter().zip(ranks).enumerate().map(|(at, (head, rank))| {
                Column::new(&head.to_lowercase(), rank, cells.iter().map(|cells| cells[at].clone()).collect())
            });
            let names = users.iter().take(TOP).map(|(user, _)| self.names.get(&user.id)).collect();
            self.page.table(Table { name: Column::new("user", 0, names), values: columns.collect() });
            self.page.more(users.len(), TOP);
        }
        let unprobed = wait_words::unprobed(report);
        for (user, text) in unprobed.iter().take(PROBLEMS) {
            let text = format!("{}: {}", self.names.get(&user.id), terminal_safe(text));
            self.page.painted("  ! ", &text, Ink::warn);
        }
        self.page.more(unprobed.len(), PROBLEMS);
    }
}
