//! The grid on which a driver samples, learned from the samples' times.

use std::collections::VecDeque;

/// Gaps remembered.
const REMEMBERED_GAPS: usize = 64;
/// Fewer say nothing.
const LEARNED_GAPS: usize = 3;
/// No driver samples more often: stamps this close are no two samples.
const LEAST_GAP_NS: u64 = 10_000_000;
/// So many gaps, half of them this much alike, are the grid of this device. What is longer after that are samples that were lost,
/// or not kept.
const SURE_GAPS: usize = 16;
const ALIKE: f64 = 1.5;

#[derive(Clone, Debug, Default)]
pub struct Grid {
    gaps: VecDeque<u64>,
    period_ns: Option<u64>,
    sure_ns: Option<u64>,
}

impl Grid {
    /// The grid while it is not learned: longer than any that was seen (167 to 170 ms).
    pub const PERIOD_AT_MOST_NS: u64 = 200_000_000;

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
            // The median: a lost sample makes a long gap, which must not move it.
            self.period_ns = sorted.get(sorted.len() / 2).copied();
            let of = |quarter: usize| sorted.get(sorted.len() * quarter / 4).copied();
            if sorted.len() >= SURE_GAPS
                && let (Some(low), Some(high)) = (of(1), of(3))
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
        self.period_ns.unwrap_or(Self::PERIOD_AT_MOST_NS)
    }
}
