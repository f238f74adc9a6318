//! One GPU's clock against boot time, and its sampling grid. Nothing ties the two clocks but what polls show.

use std::collections::VecDeque;

use crate::units::{BootNs, GpuNs};

/// Offsets seen over this many polls decide; older ones are forgotten, so drift and steps are followed.
const REMEMBERED_POLLS: usize = 256;
/// Gaps remembered to learn the grid.
const REMEMBERED_GAPS: usize = 64;

/// A sample cannot be read before it was taken, so every poll bounds the offset from above: `boot - gpu <= ended - newest`.
/// The smallest bound is the closest one; its error is at most the shortest delay between sample and read.
#[derive(Debug, Default)]
pub struct GpuClock {
    bounds: VecDeque<i128>,
    gaps: VecDeque<u64>,
}

impl GpuClock {
    pub fn polled(&mut self, newest: GpuNs, ended: BootNs) {
        if self.bounds.len() == REMEMBERED_POLLS {
            self.bounds.pop_front();
        }
        self.bounds.push_back(i128::from(ended.0) - i128::from(newest.0));
    }

    pub fn boot(&self, at: GpuNs) -> Option<BootNs> {
        let offset = self.bounds.iter().min()?;
        u64::try_from(i128::from(at.0) + offset).ok().map(BootNs)
    }

    /// How far `boot` may be late: a period's half, the poll's own cadence, until the grid is learned 100 ms.
    pub fn uncertainty_ns(&self) -> u64 {
        self.period_ns().map_or(100_000_000, |p| p / 2)
    }

    pub fn gap(&mut self, gap_ns: u64) {
        if self.gaps.len() == REMEMBERED_GAPS {
            self.gaps.pop_front();
        }
        self.gaps.push_back(gap_ns);
    }

    /// The median gap between consecutive ticks, once three were seen.
    pub fn period_ns(&self) -> Option<u64> {
        if self.gaps.len() < 3 {
            return None;
        }
        let mut sorted: Vec<u64> = self.gaps.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }
}
