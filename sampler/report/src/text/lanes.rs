//! A GPU over time: a line of blocks for the GPU, and one for each user.

use super::super::bins;
use super::super::layout::{columns, fit, left, right};
use super::super::model::Timeline;
use super::super::words;
use super::{TOP, TextPage, UserUsage};

const BLOCKS: [&str; 8] = ["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
const ASCII: [&str; 8] = [".", ":", "-", "=", "+", "*", "%", "#"];

impl TextPage<'_> {
    pub(super) fn lanes(&mut self, timeline: &Timeline, users: &[UserUsage<'_>]) {
        let windows = timeline.busy.len();
        if windows == 0 {
            return;
        }
        let names: Vec<String> = users.iter().take(TOP).map(|(user, _)| self.names.of(&user.id)).collect();
        let longest = names.iter().map(|name| columns(name)).max().unwrap_or(0);
        let label = longest.clamp(8, (self.width / 3).max(12));
        let room = self.width.saturating_sub(label + 4);
        // A few windows are drawn broad; many are taken together.
        let (bins, broad) = if windows <= room { (windows, (room / windows).clamp(1, 4)) } else { (room, 1) };
        let width = bins * broad;

        self.line("");
        let at = |offset: f64| words::clock(words::after(self.report.start, offset));
        let (from, to) = (at(timeline.first_second), at(timeline.first_second + windows as f64 * timeline.window_seconds));
        let axis = format!("{from}{}", right(&format!("{to} UTC"), width.saturating_sub(from.len())));
        let axis = self.ink.faint(&format!("  {}  {axis}", left("", label)));
        self.line(axis);
        // Of many users none has much; one scale for all lanes, so that they can be compared.
        let peak = timeline.lanes.iter().flat_map(|lane| &lane.shares).copied().fold(0.0, f32::max);
        let full = [0.05, 0.1, 0.25, 0.5].into_iter().find(|full| peak <= *full).unwrap_or(1.0);
        let busy = self.bar(&bins::means(&timeline.busy, bins), broad, 1.0);
        self.line(format!("  {}  {}", left("GPU busy", label), busy.trim_end()));
        for (nth, ((user, _), name)) in users.iter().zip(&names).enumerate() {
            let lane = timeline.lanes.iter().find(|lane| self.report.users.get(lane.user).is_some_and(|one| one.id == user.id));
            let Some(lane) = lane else { continue };
            let bar = self.bar(&bins::means(&bins::known_shares(timeline, lane), bins), broad, full);
            let name = left(&fit(name, label, self.unicode), label);
            let line = format!("  {name}  {}", self.ink.nth(nth, bar.trim_end()));
            self.line(line);
        }
        if users.len() > TOP {
            let more = format!("{} {} more", self.dots(), words::count(users.len() - TOP));
            let bar = self.bar(&bins::means(&self.others(timeline, users), bins), broad, 1.0);
            self.line(format!("  {}  {}", left(&more, label), bar.trim_end()));
        }
        self.marks(timeline);
        self.legend(timeline, bins, full);
    }

    /// What all but the first users got together.
    fn others(&self, timeline: &Timeline, users: &[UserUsage<'_>]) -> Vec<Option<f32>> {
        let shown: Vec<&str> = users.iter().take(TOP).map(|(user, _)| user.id.as_str()).collect();
        let is_other = |user: usize| self.report.users.get(user).is_some_and(|one| !shown.contains(&one.id.as_str()));
        let others: Vec<_> = timeline.lanes.iter().filter(|lane| is_other(lane.user)).collect();
        let sum = |at: usize| others.iter().filter_map(|lane| lane.shares.get(at)).sum::<f32>();
        timeline.busy.iter().enumerate().map(|(at, busy)| busy.map(|_| sum(at))).collect()
    }

    fn bar(&self, shares: &[Option<f32>], broad: usize, full: f32) -> String {
        let levels = if self.unicode { BLOCKS } else { ASCII };
        let cell = |share: &Option<f32>| match share {
            None if self.unicode => "╱",
            None => "?",
            Some(share) if *share <= 0.0 => " ",
            // What is more than nothing is drawn.
            Some(share) => levels[((share / full * 8.0).ceil() as usize).clamp(1, 8) - 1],
        };
        shares.iter().map(|share| cell(share).repeat(broad)).collect()
    }

    fn marks(&mut self, timeline: &Timeline) {
        /// More would push the numbers off the screen.
        const MARKS: usize = 6;
        for (offset, words) in timeline.marks.iter().take(MARKS) {
            let at = words::clock(words::after(self.report.start, *offset));
            self.wrap(&format!("  {at}  "), &super::safe(words));
        }
        self.more(timeline.marks.len(), MARKS, "  ");
    }

    fn legend(&mut self, timeline: &Timeline, bins: usize, full: f32) {
        let unseen = if self.unicode { "╱" } else { "?" };
        let each = timeline.window_seconds * timeline.busy.len() as f64 / bins as f64;
        let gone = timeline.busy.iter().any(Option::is_none);
        let note = if gone { format!("; {unseen} is not observed") } else { String::new() };
        let scale =
            if full < 1.0 { format!(", {} for a user at full height", words::percent(full.into())) } else { String::new() };
        let text = format!("height: part of {} in which it kept the GPU busy{scale}{note}", words::seconds(each));
        for line in super::wrapped("  ", &text, self.width, self.unicode) {
            let line = self.ink.faint(&line);
            self.line(line);
        }
    }
}
