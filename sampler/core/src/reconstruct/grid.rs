//! The grid of a driver's samples, learned from their times.

use std::collections::VecDeque;

/// Number of gaps remembered.
const REMEMBERED_GAPS: usize = 64;
/// With fewer gaps the period is not known.
const LEARNED_GAPS: usize = 3;
/// No driver samples more often: stamps closer than this are not two samples.
const LEAST_GAP_NS: u64 = 10_000_000;
/// With this many gaps, the middle half of them within the ratio [`ALIKE`], the grid of the device is certain. Longer gaps after that are
/// samples that were lost, or that the driver did not keep.
const SURE_GAPS: usize = 16;
const ALIKE: f64 = 1.5;
/// Assumed period until it is learned: longer than any observed one (167 to 170 ms).
const PERIOD_AT_MOST_NS: u64 = 200_000_000;

#[derive(Clone, Debug, Default)]
pub struct Grid {
    gaps: VecDeque<u64>,
    period_ns: Option<u64>,
    sure_ns: Option<u64>,
}

impl Grid {
    /// The time between two consecutive samples.
    pub fn gap(&mut self, gap_ns: u64) {
        if gap_ns < LEAST_GAP_NS || self.sure_ns.is_some_and(|sure| gap_ns as f64 > ALIKE * sure as f64) {
            return;
        }
        if self.gaps.len() == REMEMBERED_GAPS {
            self.gaps.pop_front();
        }
        self.gaps.push_back(gap_ns);
        if self.gaps.len() >= LEARNED_GAPS {
            let mut sorted: Vec<u64> = self.gaps.iter().copied().collect();
            sorted.sort_unstable();
            // The median: a lost sample causes a long gap, which must not change the period.
            self.period_ns = sorted.get(sorted.len() / 2).copied();
            let quartile = |quarter: usize| sorted.get(sorted.len() * quarter / 4).copied();
            if sorted.len() >= SURE_GAPS
                && let (Some(low), Some(high)) = (quartile(1), quartile(3))
                && high as f64 <= ALIKE * low as f64
            {
                self.sure_ns = self.period_ns;
            }
        }
    }

    pub fn period_ns(&self) -> Option<u64> {
        self.period_ns
    }

    pub fn period_or_most_ns(&self) -> u64 {
        self.period_ns.unwrap_or(PERIOD_AT_MOST_NS)
    }

    /// A process sample belongs to a device sample that is at most this far away.
    pub fn near_ns(&self) -> u64 {
        self.period_or_most_ns() / 2
    }
}
