//! The fleet report as text, for a terminal or a pipe.

use super::super::layout::{Column, Ink, Table, terminal_safe};
use super::super::page::{Page, TextOptions};
use super::super::words;
use super::{Fleet, FleetUser, JoinedBy};

/// Entries of a list that are shown; the others are counted.
const TOP: usize = 20;

impl Fleet {
    /// Ends with a newline.
    pub fn text(&self, options: &TextOptions) -> String {
        let mut page = Page::new(options);
        self.head(&mut page);
        self.node_table(&mut page);
        self.user_table(&mut page);
        self.by_node(&mut page);
        self.finding_list(&mut page);
        self.gap_list(&mut page);
        self.joins(&mut page);
        page.finish()
    }

    fn head(&self, page: &mut Page) {
        page.painted("", "GPU sessions of a fleet", Ink::strong);
        let (nodes, duration) = (words::counted(self.nodes.len(), "node", "nodes"), words::span(self.duration_seconds));
        page.wrap("  ", &format!("{nodes}, {}, {duration}", self.start));
        for problem in &self.problems {
            let node = problem.node.as_ref().map_or_else(String::new, |node| format!(" of {}", words::node(node)));
            let text = format!("NOT REPORTED: {}{node}: {}", terminal_safe(&problem.file), terminal_safe(&problem.problem));
            page.painted("  ! ", &text, Ink::alarm);
        }
        for node in self.nodes.iter().filter(|node| node.truncated) {
            page.painted("  ! ", &format!("the files of {} are INCOMPLETE", words::node(&node.node)), Ink::alarm);
        }
        for remark in &self.remarks {
            page.wrap("  - ", &terminal_safe(remark));
        }
        page.painted("  ", &self.clocks, Ink::faint);
    }

    fn node_table(&self, page: &mut Page) {
        page.heading("Nodes");
        let column = |head: &str, rank, value: &dyn Fn(&super::FleetNode) -> String| {
            Column::new(head, rank, self.nodes.iter().map(value).collect())
        };
        page.table(Table {
            name: column("", 0, &|node| words::node(&node.node)),
            values: vec![
                column("GPUs", 1, &|node| node.gpus.to_string()),
                column("files", 4, &|node| node.files.len().to_string()),
                column("covered", 2, &|node| words::span(node.covered_seconds)),
                column("busy s", 0, &|node| words::number(node.busy_seconds)),
                column("unattributed s", 5, &|node| words::number(node.unattributed_seconds)),
                column("unobserved s", 3, &|node| words::number(node.unobserved_seconds)),
            ],
        });
    }

    fn user_table(&self, page: &mut Page) {
        page.heading("Users");
        let shown: Vec<&FleetUser> = self.users.iter().take(TOP).collect();
        if shown.is_empty() {
            page.line("  none");
            return;
        }
        let column = |head: &str, rank, value: &dyn Fn(&FleetUser) -> String| {
            Column::new(head, rank, shown.iter().map(|user| value(user)).collect())
        };
        page.table(Table {
            name: column("", 0, &|user| terminal_safe(&user.name)),
            values: vec![
                column("GPU-seconds", 0, &|user| words::with_error(user.gpu_seconds, user.gpu_seconds_stderr)),
                column("nodes", 1, &|user| user.nodes.len().to_string()),
                column("GPUs", 2, &|user| user.gpus.to_string()),
                column("least/most", 3, &|user| {
                    user.imbalance.as_ref().map_or_else(|| words::UNKNOWN.to_owned(), |found| format!("{:.2}", found.ratio))
                }),
            ],
        });
        page.more(self.users.len(), TOP);
    }

    fn by_node(&self, page: &mut Page) {
        let several: Vec<&FleetUser> = self.users.iter().filter(|user| user.nodes.len() > 1).take(TOP).collect();
        for user in several {
            page.heading(&format!("{} by node, the slowest first", terminal_safe(&user.name)));
            let column = |head: &str, rank, value: &dyn Fn(&super::UserOnNode) -> String| {
                Column::new(head, rank, user.nodes.iter().take(TOP).map(value).collect())
            };
            page.table(Table {
                name: column("", 0, &|part| words::node(&part.node)),
                values: vec![
                    column("GPU-seconds", 0, &|part| words::with_error(part.gpu_seconds, part.gpu_seconds_stderr)),
                    column("GPUs", 2, &|part| part.gpus.to_string()),
                    column("active s", 3, &|part| words::number(part.active_seconds)),
                    column("contended s", 1, &|part| words::number(part.contended_seconds)),
                ],
            });
            page.more(user.nodes.len(), TOP);
            if let Some(found) = &user.imbalance {
                let compared = if found.is_comparable {
                    ""
                } else {
                    "; the nodes' files cover different spans, so this is not a comparison"
                };
                page.wrap(
                    "  ",
                    &format!(
                        "least {} on {}, most {} on {}: ratio {:.2}{compared}",
                        words::seconds(found.min_gpu_seconds),
                        words::node(&found.min_node),
                        words::seconds(found.max_gpu_seconds),
                        words::node(&found.max_node),
                        found.ratio
                    ),
                );
            }
        }
    }

    fn finding_list(&self, page: &mut Page) {
        page.heading("Findings");
        for finding in self.findings.iter().take(TOP) {
            page.wrap("  - ", &format!("{}: {}", words::node(&finding.node), terminal_safe(&finding.text)));
        }
        page.more(self.findings.len(), TOP);
        if self.findings.is_empty() {
            page.line("  none");
        }
    }

    fn gap_list(&self, page: &mut Page) {
        if self.gaps.is_empty() {
            return;
        }
        page.heading("Gaps");
        for gap in self.gaps.iter().take(TOP) {
            let gpu = gap.uuid.as_ref().map_or_else(|| "all GPUs".to_owned(), |uuid| words::short_uuid(uuid).to_string());
            let text = format!("{}, {gpu}: {} to {}: {}", words::node(&gap.node), gap.from, gap.to, terminal_safe(&gap.reason));
            page.painted("  ! ", &text, Ink::warn);
        }
        page.more(self.gaps.len(), TOP);
    }

    /// How the users were joined, for each way that was used.
    fn joins(&self, page: &mut Page) {
        let mut used: Vec<JoinedBy> = self.users.iter().map(|user| user.joined_by).collect();
        used.sort_unstable();
        used.dedup();
        if used.is_empty() {
            return;
        }
        page.heading("Users of different nodes are one by");
        for by in used {
            let users: Vec<&FleetUser> = self.users.iter().filter(|user| user.joined_by == by).collect();
            page.painted("  - ", &format!("{} ({})", by.description(), words::counted(users.len(), "user", "users")), Ink::faint);
        }
    }
}
