//! From the driver's answers to the raw (time, pid, utilization) tuples: what to ask for next, and what the answers tell. No IO: the
//! poller asks, this decides.
//!
//! ```text
//!  samples_after() -> ask the device's ring -> samples() --ahead?--> ask the ring again
//!      next_rows()  -> ask the process rows  -> rows()  -> next_rows() .. None -> take()
//! ```
//! The driver keeps one sample a period and folds those newer than `lastSeen` into one row per pid: the time of its newest, the
//! average of all. While one sample at most is new, a row is the sample. Where more are, asking once for each, from the newest
//! back, takes them apart again ([`unfold`]): a pid that is in an answer for the first time is in the oldest sample of that answer.
//! What cannot be told apart is marked as not looked at, never guessed.
//!
//! The largest stamp returned is `lastSeen`, never any other clock. Stamps that go back mean that the clock was set: then the whole
//! ring is read again, or the device would look idle until its clock had caught up.

mod grid;
mod split_aggregated;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};

pub use grid::Grid;

use crate::device::Engine;
use crate::observation::{DeviceSample, ProcessSample, Rejected};
use crate::units::{BootNs, GpuNs};

/// Without a new sample for so many periods the whole ring is asked for, in case the clock went back.
const SILENT_PERIODS: u64 = 3;
/// Without a new sample for so long a ring is dry.
const DRY_NS: u64 = 1_500_000_000;
/// A row belongs to a sample that is this many periods away at most.
const NEAR_PERIODS: f64 = 0.5;
/// What scheduling may add between a call and the time that was noted.
const SLACK_NS: u64 = 400_000_000;
/// Stamps remembered, to tell a clock that went back from a ring that is not told oldest first: more than any ring holds.
const STAMPS: usize = 256;
/// Watermarks of pids that were not named for so long are forgotten: no ring holds samples that old.
const KEEP_PID_NS: u64 = 60_000_000_000;

/// A sample of the device's ring as the driver gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSample {
    pub at_us: u64,
    pub percent: u32,
}

/// A row of process utilization as the driver gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawProcessSample {
    pub at_us: u64,
    pub pid: u32,
    /// Indexed as [`Engine::ALL`].
    pub percent: [u32; Engine::ALL.len()],
}

/// What one poll has brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recovered {
    pub samples: Vec<DeviceSample>,
    pub process_samples: Vec<ProcessSample>,
    pub rejected: [u32; Rejected::ALL.len()],
    pub stepped: bool,
}

#[derive(Debug, Default)]
pub struct Recovery {
    grid: Grid,
    newest: Option<GpuNs>,
    stamps: VecDeque<u64>,
    /// The newest sample was not there yet when this poll began.
    unseen: BootNs,
    polled: BootNs,
    /// When a new sample was last read.
    fed: BootNs,
    /// Up to here rows are known, or were given up.
    row_mark: GpuNs,
    seen: HashMap<u32, GpuNs>,
    /// Stamps that the ring has from before its clock was set back: they are newer than the newest, and were read.
    void: HashSet<u64>,
    asked_all: bool,
    /// The poll before this one brought samples: their rows may be late.
    late: bool,
    fresh: Vec<DeviceSample>,
    before_fresh: GpuNs,
    answers: Vec<split_aggregated::Rows>,
    row_calls: usize,
    ahead: bool,
    out: Recovered,
}

impl Recovery {
    pub fn period_ns(&self) -> Option<u64> {
        self.grid.period_ns()
    }

    /// `lastSeen` for the device's ring; 0 asks for all of it.
    pub fn samples_after(&mut self, now: BootNs) -> u64 {
        let Some(newest) = self.newest else { return 0 };
        self.asked_all = now.saturating_since(self.fed) > SILENT_PERIODS * self.grid.period_or_most_ns();
        if self.asked_all { 0 } else { newest.0 / 1000 }
    }

    /// No sample was new for a while.
    pub fn is_dry(&self, now: BootNs) -> bool {
        now.saturating_since(self.fed) > DRY_NS
    }

    /// What the device's ring answered to a call between `began` and `ended`.
    pub fn samples(&mut self, answer: &[RawSample], began: BootNs, ended: BootNs) {
        let mut sane: Vec<RawSample> = answer.iter().copied().filter(|s| s.percent <= 100 && s.at_us > 0).collect();
        self.out.rejected[Rejected::Utilization as usize] += (answer.len() - sane.len()) as u32;
        sane.retain(|s| !self.void.contains(&s.at_us));
        let fresh = match self.newest {
            None => {
                self.stamps.extend(sane.iter().rev().take(STAMPS).map(|s| s.at_us));
                self.first(&sane)
            }
            Some(newest) => self.fresh_of(&sane, newest, ended),
        };
        if self.newest.is_some() {
            self.stamps.extend(fresh.iter().map(|t| t.at.0 / 1000));
            self.stamps.drain(..self.stamps.len().saturating_sub(STAMPS));
        }
        let not_yet = std::mem::replace(&mut self.polled, began);
        let Some(last) = fresh.last() else {
            if self.newest.is_none() {
                // An empty ring: whatever comes is newer than the start.
                self.newest = Some(GpuNs(0));
                self.fed = began;
            }
            return;
        };
        if self.fresh.is_empty() {
            self.before_fresh = self.newest.unwrap_or(last.at);
        }
        self.newest = Some(last.at);
        self.unseen = if not_yet.0 == 0 { began } else { not_yet };
        self.fed = ended;
        self.fresh.extend(fresh);
        // The rows are asked for anew, with these.
        self.answers.clear();
        self.ahead = false;
    }

    /// What the ring held before the start is nobody's: it sets watermarks, and teaches the grid.
    fn first(&mut self, sane: &[RawSample]) -> Vec<DeviceSample> {
        let mut stamps: Vec<u64> = sane.iter().map(|s| sample(s, true).at.0).collect();
        stamps.sort_unstable();
        for pair in stamps.windows(2) {
            self.grid.gap(pair[1] - pair[0]);
        }
        let newest = sane.iter().max_by_key(|s| s.at_us);
        self.row_mark = newest.map_or(GpuNs(0), |s| sample(s, true).at);
        newest.map(|s| sample(s, true)).into_iter().collect()
    }

    fn fresh_of(&mut self, sane: &[RawSample], newest: GpuNs, ended: BootNs) -> Vec<DeviceSample> {
        let period = self.grid.period_or_most_ns();
        if let Some(from) = self.went_back(sane, newest) {
            // As many as time can have brought since the last.
            let room = (ended.saturating_since(self.unseen) / period + 2) as usize;
            let after = &sane[from..];
            let after = &after[after.len().saturating_sub(room)..];
            self.step();
            self.void.extend(sane[..from].iter().map(|s| s.at_us));
            return after.iter().map(|s| sample(s, false)).collect();
        }
        let mut fresh: Vec<DeviceSample> = sane.iter().map(|s| sample(s, false)).filter(|t| t.at > newest).collect();
        fresh.sort_by_key(|t| t.at);
        fresh.dedup_by_key(|t| t.at);
        // A longer gap than there was time for: the clock was set forward.
        let known = newest.0 > 0;
        let most = ended.saturating_since(self.unseen) + period + SLACK_NS;
        let mut last = newest;
        let mut stepped_at = None;
        for (n, sample) in fresh.iter().enumerate() {
            let gap = sample.at.0 - last.0;
            match known || n > 0 {
                true if gap > most => stepped_at = Some(n),
                true => self.grid.gap(gap),
                false => {}
            }
            last = sample.at;
        }
        if let Some(n) = stepped_at {
            self.step();
            fresh.drain(..n);
        }
        fresh
    }

    /// Where the samples on the new clock begin, if it went back. The ring is in the order in which samples were taken.
    fn went_back(&self, sane: &[RawSample], newest: GpuNs) -> Option<usize> {
        if !self.asked_all || sane.last().is_none_or(|s| s.at_us >= newest.0 / 1000 || self.stamps.contains(&s.at_us)) {
            return None;
        }
        let mut descents = (1..sane.len()).filter(|n| sane[*n].at_us < sane[n - 1].at_us);
        match (descents.next(), descents.next()) {
            // None of the old clock is left in the ring.
            (None, _) => Some(0),
            (Some(at), None) => Some(at),
            // Unordered: no clock does that.
            _ => None,
        }
    }

    fn step(&mut self) {
        self.out.stepped = true;
        self.row_mark = GpuNs(0);
        self.void.clear();
        self.seen.clear();
        self.fresh.clear();
    }

    /// A row is newer than the newest sample: another was taken between the two calls, and is wanted before rows are asked for again.
    pub fn is_ahead(&self) -> bool {
        self.ahead
    }

    /// `lastSeen` for the next question for rows, while one is open and `calls` of this poll are not used up.
    pub fn next_process_query(&mut self, calls: usize) -> Option<u64> {
        // The first read names nobody.
        let first = self.fresh.first().is_some_and(|t| t.queried);
        if first || self.ahead || self.row_calls >= calls {
            return None;
        }
        let after = match (self.fresh.len(), self.answers.len()) {
            (0, 0) if self.late => self.row_mark,
            (0, _) => return None,
            (k, asked) if asked < k => match (k - asked).checked_sub(2) {
                Some(older) => self.fresh[older].at,
                None => self.before_fresh_samples(),
            },
            _ => return None,
        };
        Some(after.0 / 1000)
    }

    /// With one new sample, rows of the one before that were late come along.
    fn before_fresh_samples(&self) -> GpuNs {
        let near = (self.grid.period_or_most_ns() as f64 * NEAR_PERIODS) as u64;
        if self.out.stepped { GpuNs(self.fresh[0].at.0.saturating_sub(near)) } else { self.before_fresh }
    }

    /// What came for [`Recovery::next_process_query`]' question.
    pub fn process_samples(&mut self, after_us: u64, answer: &[RawProcessSample]) {
        self.row_calls += 1;
        let Some(newest) = self.newest else { return };
        let near = (self.grid.period_or_most_ns() as f64 * NEAR_PERIODS) as u64;
        let mut process_samples = split_aggregated::Rows::new();
        let mut doubled = Vec::new();
        for row in answer {
            let at = GpuNs(row.at_us.saturating_mul(1000));
            let mut reject = |why: Rejected| self.out.rejected[why as usize] += 1;
            if row.percent.iter().any(|p| *p > 100) {
                reject(Rejected::Utilization);
            } else if row.at_us <= after_us || self.void.contains(&row.at_us) {
                reject(Rejected::Stale);
            } else if at.0 > newest.0.saturating_add(near) {
                // One sample later is one that was taken in between; later than that is none.
                if at.0 <= newest.0.saturating_add(4 * near) { self.ahead = true } else { reject(Rejected::Future) }
            } else {
                if row.pid == 0 || row.pid == u32::MAX {
                    reject(Rejected::Pid);
                }
                let kept = ProcessSample { at, pid: row.pid, percent: row.percent.map(|p| p as u8) };
                if let Some(other) = process_samples.insert(row.pid, kept) {
                    self.out.rejected[Rejected::Duplicate as usize] += 1;
                    // Both may be samples, at different times.
                    doubled.push(if other.at == kept.at { kept } else { other });
                }
            }
        }
        if self.ahead {
            self.answers.clear();
            return;
        }
        if self.fresh.is_empty() {
            self.late = false;
        }
        for row in doubled {
            self.keep(row);
        }
        self.answers.push(process_samples);
    }

    fn keep(&mut self, row: ProcessSample) {
        let known = self.seen.get(&row.pid).is_some_and(|at| *at >= row.at);
        if !known {
            self.seen.insert(row.pid, row.at);
            self.row_mark = self.row_mark.max(row.at);
            self.out.process_samples.push(row);
        }
    }

    /// The tuples of this poll. What was not asked for is marked.
    pub fn take(&mut self) -> Recovered {
        let answers = std::mem::take(&mut self.answers);
        let mut fresh = std::mem::take(&mut self.fresh);
        if fresh.is_empty() {
            for row in answers.into_iter().flat_map(split_aggregated::Rows::into_values) {
                self.keep(row);
            }
        } else {
            let mut process_samples = split_aggregated::unfold(&mut fresh, &answers);
            process_samples.sort_by_key(|row| row.at);
            for row in process_samples {
                self.keep(row);
            }
            self.late = true;
            // What was not told by now is not asked for again.
            self.row_mark = self.row_mark.max(self.before_fresh.min(fresh[0].at));
        }
        self.out.process_samples.sort_by_key(|row| row.at);
        let newest = self.newest.map_or(0, |at| at.0);
        self.seen.retain(|_, at| newest.saturating_sub(at.0) < KEEP_PID_NS);
        self.void.retain(|stamp| stamp.saturating_mul(1000) > newest);
        (self.row_calls, self.ahead) = (0, false);
        self.out.samples = fresh;
        std::mem::take(&mut self.out)
    }
}

fn sample(sample: &RawSample, queried: bool) -> DeviceSample {
    DeviceSample { at: GpuNs(sample.at_us.saturating_mul(1000)), busy_percent: sample.percent, queried }
}
