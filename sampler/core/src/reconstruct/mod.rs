//! Reconstruction of the raw (time, pid, utilization) tuples from the driver's responses: decides what to query next and interprets the
//! responses. No IO: the poller makes the calls.
//!
//! ```text
//!  samples_after()      -> read the device samples  -> samples() --is_ahead?--> read the device samples again
//!  next_process_query() -> read the process samples -> process_samples() -> next_process_query() .. None -> take()
//! ```
//! The driver keeps one sample for each period. For a query it aggregates the samples that are newer than `lastSeen` into one entry for
//! each pid: the time of its newest sample, and an average. If at most one sample is new, the entry is that sample. If more are new, one
//! query for each of them, from the newest back, separates them again (`split_aggregated`): a pid that is in a response for the first time
//! is in the oldest sample of that response. Samples that cannot be separated are marked as not queried, never guessed.
//!
//! `lastSeen` is the largest returned stamp, never a time of another clock. Stamps that go back mean that the clock was set. Then the whole
//! buffer is read again; otherwise the device would look idle until its clock had caught up.

mod grid;
mod split_aggregated;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

pub use grid::Grid;

use foldhash::{HashMap, HashSet};
use strum::EnumCount as _;

use crate::device::Engine;
use crate::observation::{DeviceSample, ProcessSample, Rejected};
use crate::units::{BootNs, GpuNs};

/// Without a new sample for this many periods the whole buffer is requested, in case the clock went back.
const SILENT_PERIODS: u64 = 3;
/// Without a new sample for this long a buffer counts as empty.
const DRY_NS: u64 = 1_500_000_000;
/// Maximum scheduling delay between a call and the recorded time.
const SLACK_NS: u64 = 400_000_000;
/// Number of stamps remembered, to distinguish a clock that went back from a buffer that is not returned oldest first: more than any
/// buffer holds.
const STAMPS: usize = 256;
/// Watermarks of pids that were not named for this long are dropped: no buffer holds samples that old.
const KEEP_PID_NS: u64 = 60_000_000_000;

/// A device sample as the driver returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSample {
    pub at_us: u64,
    pub percent: u32,
}

/// An entry of process utilization as the driver returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawProcessSample {
    pub at_us: u64,
    pub pid: u32,
    /// Indexed as [`Engine`].
    pub percent: [u32; Engine::COUNT],
}

/// The result of one poll.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recovered {
    pub samples: Vec<DeviceSample>,
    pub process_samples: Vec<ProcessSample>,
    pub rejected: [u32; Rejected::COUNT],
    pub stepped: bool,
}

#[derive(Debug, Default)]
pub struct Recovery {
    grid: Grid,
    newest: Option<GpuNs>,
    stamps: VecDeque<u64>,
    /// Start of the last poll that did not return the newest sample yet.
    before_newest: BootNs,
    polled: BootNs,
    /// Time at which a new sample was last read.
    last_fresh: BootNs,
    /// Process samples up to this time are known, or are not requested any more.
    process_mark: GpuNs,
    seen: HashMap<u32, GpuNs>,
    /// Stamps in the buffer from before its clock was set back: they are newer than the newest sample, and were already read.
    stale_stamps: HashSet<u64>,
    whole_buffer: bool,
    /// The previous poll returned samples: their process samples may be late.
    late: bool,
    fresh: Vec<DeviceSample>,
    before_fresh: GpuNs,
    responses: Vec<split_aggregated::SamplesByPid>,
    folding: split_aggregated::Folding,
    process_calls: usize,
    ahead: bool,
    out: Recovered,
}

impl Recovery {
    pub fn period_ns(&self) -> Option<u64> {
        self.grid.period_ns()
    }

    /// `lastSeen` for the query of device samples; 0 requests the whole buffer.
    pub fn samples_after(&mut self, now: BootNs) -> u64 {
        let Some(newest) = self.newest else { return 0 };
        self.whole_buffer = now.saturating_since(self.last_fresh) > SILENT_PERIODS * self.grid.period_or_most_ns();
        if self.whole_buffer { 0 } else { newest.0 / 1000 }
    }

    /// Whether there was no new sample for [`DRY_NS`].
    pub fn is_dry(&self, now: BootNs) -> bool {
        now.saturating_since(self.last_fresh) > DRY_NS
    }

    /// Takes the device samples that a call between `began` and `ended` returned.
    pub fn samples(&mut self, response: &[RawSample], began: BootNs, ended: BootNs) {
        let mut sane: Vec<RawSample> = response.iter().copied().filter(|s| s.percent <= 100 && s.at_us > 0).collect();
        self.out.rejected[Rejected::Utilization as usize] += (response.len() - sane.len()) as u32;
        sane.retain(|s| !self.stale_stamps.contains(&s.at_us));
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
                // An empty buffer: all later samples are newer than the start.
                self.newest = Some(GpuNs(0));
                self.last_fresh = began;
            }
            return;
        };
        if self.fresh.is_empty() {
            self.before_fresh = self.newest.unwrap_or(last.at);
        }
        self.newest = Some(last.at);
        self.before_newest = if not_yet.0 == 0 { began } else { not_yet };
        self.last_fresh = ended;
        self.fresh.extend(fresh);
        // The process samples are requested again, including those of the fresh samples.
        self.responses.clear();
        self.ahead = false;
    }

    /// Samples from before the start are not attributed: they set watermarks, and the grid learns from them.
    fn first(&mut self, sane: &[RawSample]) -> Vec<DeviceSample> {
        let mut stamps: Vec<u64> = sane.iter().map(|s| sample(s, true).at.0).collect();
        stamps.sort_unstable();
        for pair in stamps.windows(2) {
            self.grid.gap(pair[1] - pair[0]);
        }
        let newest = sane.iter().max_by_key(|s| s.at_us);
        self.process_mark = newest.map_or(GpuNs(0), |s| sample(s, true).at);
        newest.map(|s| sample(s, true)).into_iter().collect()
    }

    fn fresh_of(&mut self, sane: &[RawSample], newest: GpuNs, ended: BootNs) -> Vec<DeviceSample> {
        let period = self.grid.period_or_most_ns();
        if let Some(from) = self.went_back(sane, newest) {
            // At most as many as can have been taken since the last one.
            let room = (ended.saturating_since(self.before_newest) / period + 2) as usize;
            let after = &sane[from..];
            let after = &after[after.len().saturating_sub(room)..];
            self.step();
            self.stale_stamps.extend(sane[..from].iter().map(|s| s.at_us));
            return after.iter().map(|s| sample(s, false)).collect();
        }
        let mut fresh: Vec<DeviceSample> = sane.iter().map(|s| sample(s, false)).filter(|t| t.at > newest).collect();
        fresh.sort_by_key(|t| t.at);
        fresh.dedup_by_key(|t| t.at);
        // A gap longer than the elapsed time: the clock was set forward.
        let known = newest.0 > 0;
        let most = ended.saturating_since(self.before_newest) + period + SLACK_NS;
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

    /// Index of the first sample on the new clock, if the clock went back. The buffer is in the order in which samples were taken.
    fn went_back(&self, sane: &[RawSample], newest: GpuNs) -> Option<usize> {
        if !self.whole_buffer || sane.last().is_none_or(|s| s.at_us >= newest.0 / 1000 || self.stamps.contains(&s.at_us)) {
            return None;
        }
        let mut descents = (1..sane.len()).filter(|n| sane[*n].at_us < sane[n - 1].at_us);
        match (descents.next(), descents.next()) {
            // No sample of the old clock is left in the buffer.
            (None, _) => Some(0),
            (Some(at), None) => Some(at),
            // Unordered: not the effect of a clock that was set.
            _ => None,
        }
    }

    fn step(&mut self) {
        self.out.stepped = true;
        self.process_mark = GpuNs(0);
        self.stale_stamps.clear();
        self.seen.clear();
        self.fresh.clear();
    }

    /// Takes the process samples of a source that has the process of each sample: no further query is due.
    pub fn named(&mut self, process_samples: impl Iterator<Item = RawProcessSample>) {
        // The first read does not name processes.
        if self.fresh.first().is_some_and(|t| t.queried) {
            return;
        }
        for sample in &mut self.fresh {
            sample.queried = true;
        }
        for process in process_samples {
            let at = GpuNs(process.at_us.saturating_mul(1000));
            if !self.fresh.iter().any(|sample| sample.at == at) {
                continue;
            }
            if process.pid == 0 || process.pid == u32::MAX {
                self.out.rejected[Rejected::Pid as usize] += 1;
            }
            self.keep(ProcessSample { at, pid: process.pid, percent: process.percent.map(|p| p as u8) });
        }
    }

    /// Whether a process sample is newer than the newest device sample: another sample was taken between the two calls, and must be read
    /// before process samples are requested again.
    pub fn is_ahead(&self) -> bool {
        self.ahead
    }

    /// `lastSeen` for the next query of process samples, while one is due and fewer than `calls` were made in this poll.
    pub fn next_process_query(&mut self, calls: usize) -> Option<u64> {
        // The first read does not query processes.
        let first = self.fresh.first().is_some_and(|t| t.queried);
        if first || self.ahead || self.process_calls >= calls {
            return None;
        }
        let after = match (self.fresh.len(), self.responses.len()) {
            (0, 0) if self.late => self.process_mark,
            (0, _) => return None,
            (k, received) if received < k => match (k - received).checked_sub(2) {
                Some(older) => self.fresh[older].at,
                None => self.before_fresh_samples(),
            },
            _ => return None,
        };
        Some(after.0 / 1000)
    }

    /// With one new sample, the query also returns late process samples of the sample before.
    fn before_fresh_samples(&self) -> GpuNs {
        if self.out.stepped { GpuNs(self.fresh[0].at.0.saturating_sub(self.grid.near_ns())) } else { self.before_fresh }
    }

    /// Takes the response to the query of [`Recovery::next_process_query`].
    pub fn process_samples(&mut self, after_us: u64, response: &[RawProcessSample]) {
        self.process_calls += 1;
        let Some(newest) = self.newest else { return };
        let near = self.grid.near_ns();
        let mut process_samples = split_aggregated::SamplesByPid::default();
        let mut doubled = Vec::new();
        for sample in response {
            let at = GpuNs(sample.at_us.saturating_mul(1000));
            let mut reject = |reason: Rejected| self.out.rejected[reason as usize] += 1;
            if sample.percent.iter().any(|p| *p > 100) {
                reject(Rejected::Utilization);
            } else if sample.at_us <= after_us || self.stale_stamps.contains(&sample.at_us) {
                reject(Rejected::Stale);
            } else if at.0 > newest.0.saturating_add(near) {
                // One period later is a sample that was taken in between; anything later is implausible.
                if at.0 <= newest.0.saturating_add(4 * near) { self.ahead = true } else { reject(Rejected::Future) }
            } else {
                if sample.pid == 0 || sample.pid == u32::MAX {
                    reject(Rejected::Pid);
                }
                let kept = ProcessSample { at, pid: sample.pid, percent: sample.percent.map(|p| p as u8) };
                if let Some(other) = process_samples.insert(sample.pid, kept) {
                    self.out.rejected[Rejected::Duplicate as usize] += 1;
                    // Both may be samples of different times.
                    doubled.push(if other.at == kept.at { kept } else { other });
                }
            }
        }
        if self.ahead {
            self.responses.clear();
            return;
        }
        if self.fresh.is_empty() {
            self.late = false;
        }
        for sample in doubled {
            self.keep(sample);
        }
        self.responses.push(process_samples);
    }

    fn keep(&mut self, sample: ProcessSample) {
        let known = self.seen.get(&sample.pid).is_some_and(|at| *at >= sample.at);
        if !known {
            self.seen.insert(sample.pid, sample.at);
            self.process_mark = self.process_mark.max(sample.at);
            self.out.process_samples.push(sample);
        }
    }

    /// The tuples of this poll. Samples that were not queried are marked.
    pub fn take(&mut self) -> Recovered {
        let responses = std::mem::take(&mut self.responses);
        let mut fresh = std::mem::take(&mut self.fresh);
        if fresh.is_empty() {
            // The average of a small late sample and idle ones may be below one percent.
            let is_busy = |sample: &ProcessSample| sample.percent.iter().any(|percent| *percent > 0);
            for sample in responses.into_iter().flat_map(split_aggregated::SamplesByPid::into_values).filter(is_busy) {
                self.keep(sample);
            }
        } else {
            let mut process_samples = split_aggregated::separate(&mut fresh, &responses, self.grid.near_ns(), &mut self.folding);
            process_samples.sort_by_key(|sample| sample.at);
            for sample in process_samples {
                self.keep(sample);
            }
            self.late = true;
            // Process samples that were not returned by now are not requested again.
            self.process_mark = self.process_mark.max(self.before_fresh.min(fresh[0].at));
        }
        self.out.process_samples.sort_by_key(|sample| sample.at);
        let newest = self.newest.map_or(0, |at| at.0);
        self.seen.retain(|_, at| newest.saturating_sub(at.0) < KEEP_PID_NS);
        self.stale_stamps.retain(|stamp| stamp.saturating_mul(1000) > newest);
        (self.process_calls, self.ahead) = (0, false);
        self.out.samples = fresh;
        std::mem::take(&mut self.out)
    }
}

fn sample(sample: &RawSample, queried: bool) -> DeviceSample {
    DeviceSample { at: GpuNs(sample.at_us.saturating_mul(1000)), busy_percent: sample.percent, queried }
}
