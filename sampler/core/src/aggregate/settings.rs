//! What is counted, and how.

use crate::units::BootNs;

/// Width of the window of duty cycles and shares.
pub const WINDOW_NS: u64 = 10_000_000_000;
/// A GPU that is busy for so much of a window is saturated.
pub const SATURATION_RATIO: f64 = 0.9;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub saturation_ratio: f64,
    /// Every window and every sum is kept: for a report, not for an agent that runs for years.
    pub keep_history: bool,
    /// What is counted; what lies outside only helps to tell whose it is.
    pub range: Range,
}

/// Later than the one and not later than the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub after: BootNs,
    pub to: BootNs,
}

impl Range {
    pub const ALL: Range = Range { after: BootNs(0), to: BootNs(u64::MAX) };

    pub fn has(&self, at: BootNs) -> bool {
        self.after < at && at <= self.to
    }

    /// How much of the span that ends at `at` is in it.
    pub fn part(&self, at: BootNs, ns: u64) -> u64 {
        at.min(self.to).saturating_since(at.minus(ns).max(self.after))
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self { saturation_ratio: SATURATION_RATIO, keep_history: false, range: Range::ALL }
    }
}
