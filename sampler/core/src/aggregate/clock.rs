//! One GPU's clock against boot time, and its sampling grid. Nothing ties the two clocks but what polls show.

use std::collections::VecDeque;

use crate::units::{BootNs, GpuNs};

/// Offsets seen over this many polls decide; older ones are forgotten, so drift and steps are followed.
const REMEMBERED_POLLS: usize = 256;
/// Gaps remembered to learn the grid.
const REMEMBERED_GAPS: usize = 64;

/// The grid while it is not learned: longer than any that was seen (167 to 170 ms).
const PERIOD_AT_MOST_NS: u64 = 200_000_000;
/// What the offset may have drifted since the poll that bounds it: 13 s at a few hundred ppm.
const DRIFT_NS: u64 = 5_000_000;

/// A sample cannot be read before it was taken, so every poll bounds the offset from above: `boot - gpu <= ended - newest`.
/// The smallest bound is the closest one. It is late by what the driver takes to serve a sample; nothing in the driver's answers
/// tells how long that is. Taken here: one period at most.
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

    /// When the process that a sample names was on the engine: at the sample's instant or within the period that ends there,
    /// the sample being as old as it can be or as young.
    pub fn named_within(&self, boot: BootNs, span_ns: u64) -> (BootNs, BootNs) {
        let late = self.period_ns().unwrap_or(PERIOD_AT_MOST_NS);
        (boot.minus(late).minus(span_ns), boot.plus(DRIFT_NS))
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
