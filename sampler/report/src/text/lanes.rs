//! The timeline of a GPU: a line of blocks for the GPU and one for each user, with one of its waiting if it had wait probes.

use super::super::bins;
use super::super::layout::{Ink, columns, fit, left, right, terminal_safe};
use super::super::model::Timeline;
use super::super::ranking::UserUsage;
use super::super::wait_words;
use super::super::words;
use super::{TOP, TextPage};

const BLOCKS: [&str; 8] = ["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
const ASCII: [&str; 8] = [".", ":", "-", "=", "+", "*", "%", "#"];

impl TextPage<'_> {
    pub(super) fn lanes(&mut self, timeline: &Timeline, users: &[UserUsage<'_>]) {
        let windows = timeline.busy.len();
        if windows == 0 {
            return;
        }
        let names: Vec<String> = users.iter().take(TOP).map(|(user, _)| self.names.get(&user.id)).collect();
        let longest = names.iter().map(|name| columns(name)).max().unwrap_or(0);
        let label = longest.clamp(8, (self.page.width / 3).max(12));
        let room = self.page.width.saturating_sub(label + 4);
        // A few windows are drawn several columns wide; many are merged.
        let (bins, columns_per_bin) = if windows <= room { (windows, (room / windows).clamp(1, 4)) } else { (room, 1) };
        let width = bins * columns_per_bin;

        self.page.line("");
        let clock = |offset: f64| words::clock(words::after(self.report.start, offset));
        let (from, to) = (clock(timeline.first_second), clock(timeline.first_second + windows as f64 * timeline.window_seconds));
        let axis = format!("{from}{}", right(&format!("{to} UTC"), width.saturating_sub(from.len())));
        let axis = self.page.ink.faint(&format!("  {}  {axis}", left("", label)));
        self.page.line(axis);
        // With many users, each share is small; one scale for all lanes keeps them comparable.
        let peak = timeline.lanes.iter().flat_map(|lane| &lane.shares).copied().fold(0.0, f32::max);
        let full = [0.05, 0.1, 0.25, 0.5].into_iter().find(|full| peak <= *full).unwrap_or(1.0);
        let busy = self.bar(&bins::means(&timeline.busy, bins), columns_per_bin, 1.0);
        self.page.line(format!("  {}  {}", left("GPU busy", label), busy.trim_end()));
        for (nth, ((user, _), name)) in users.iter().zip(&names).enumerate() {
            let lane =
                timeline.lanes.iter().find(|lane| self.report.users.get(lane.user).is_some_and(|listed| listed.id == user.id));
            let Some(lane) = lane else { continue };
            let bar = self.bar(&bins::means(&bins::known_shares(timeline, lane), bins), columns_per_bin, full);
            let name = left(&fit(name, label, self.page.unicode), label);
            let line = format!("  {name}  {}", self.page.ink.nth(nth, bar.trim_end()));
            self.page.line(line);
            if !lane.waits.is_empty() {
                let bar = self.bar(&bins::means(&lane.waits, bins), columns_per_bin, 1.0);
                let line = format!("  {}  {}", left("  waited", label), self.page.ink.wait(bar.trim_end()));
                self.page.line(line);
            }
        }
        if users.len() > TOP {
            let more = format!("{} {} more", self.page.dots(), words::count(users.len() - TOP));
            let bar = self.bar(&bins::means(&self.others(timeline, users), bins), columns_per_bin, 1.0);
            self.page.line(format!("  {}  {}", left(&more, label), bar.trim_end()));
        }
        self.marks(timeline);
        self.legend(timeline, bins, full);
    }

    /// The sum of the shares of the users that are not listed.
    fn others(&self, timeline: &Timeline, users: &[UserUsage<'_>]) -> Vec<Option<f32>> {
        let shown: Vec<&str> = users.iter().take(TOP).map(|(user, _)| user.id.as_str()).collect();
        let is_other = |user: usize| self.report.users.get(user).is_some_and(|user| !shown.contains(&user.id.as_str()));
        let others: Vec<_> = timeline.lanes.iter().filter(|lane| is_other(lane.user)).collect();
        let sum = |at: usize| others.iter().filter_map(|lane| lane.shares.get(at)).sum::<f32>();
        timeline.busy.iter().enumerate().map(|(at, busy)| busy.map(|_| sum(at))).collect()
    }

    fn bar(&self, shares: &[Option<f32>], width: usize, full: f32) -> String {
        let levels = if self.page.unicode { BLOCKS } else { ASCII };
        let cell = |share: &Option<f32>| match share {
            None if self.page.unicode => "╱",
            None => "?",
            Some(share) if *share <= 0.0 => " ",
            // Any share above zero is visible.
            Some(share) => levels[((share / full * 8.0).ceil() as usize).clamp(1, 8) - 1],
        };
        shares.iter().map(|share| cell(share).repeat(width)).collect()
    }

    fn marks(&mut self, timeline: &Timeline) {
        /// More marks would move the numbers off the screen.
        const MARKS: usize = 6;
        for (offset, mark) in timeline.marks.iter().take(MARKS) {
            let at = words::clock(words::after(self.report.start, *offset));
            self.page.wrap(&format!("  {at}  "), &terminal_safe(mark));
        }
        self.page.more(timeline.marks.len(), MARKS);
    }

    fn legend(&mut self, timeline: &Timeline, bins: usize, full: f32) {
        let symbol = if self.page.unicode { "╱" } else { "?" };
        let each = timeline.window_seconds * timeline.busy.len() as f64 / bins as f64;
        let has_gaps = timeline.busy.iter().any(Option::is_none);
        let note = if has_gaps { format!("; {symbol} is not observed") } else { String::new() };
        let scale =
            if full < 1.0 { format!(", with {} at full height for a user", words::percent(full.into())) } else { String::new() };
        let text = format!("height: busy fraction of each {}{scale}{note}", words::seconds(each));
        self.page.painted("  ", &text, Ink::faint);
        if timeline.lanes.iter().any(|lane| !lane.waits.is_empty()) {
            let unprobed = timeline.lanes.iter().flat_map(|lane| &lane.waits).any(Option::is_none);
            let note = if unprobed { format!("; {symbol} is without probes") } else { String::new() };
            self.page.painted("  ", &format!("waited: {}{note}", wait_words::LANE), Ink::faint);
        }
    }
}
