//! Settings of aggregation.

use crate::units::BootNs;

/// Width of the window of duty cycles and shares.
pub const WINDOW_NS: u64 = 10_000_000_000;
/// A GPU that is busy for at least this part of a window is saturated.
pub const SATURATION_RATIO: f64 = 0.9;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub saturation_ratio: f64,
    /// Keep every window and every sum: for a report, not for an agent that runs for years.
    pub keep_history: bool,
    /// The range that is counted. Samples outside it only serve as neighbours for attribution.
    pub range: Range,
}

/// The half-open range `(after, to]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub after: BootNs,
    pub to: BootNs,
}

/// The unlimited range.
impl Default for Range {
    fn default() -> Self {
        Self { after: BootNs(0), to: BootNs(u64::MAX) }
    }
}

impl Range {
    pub fn has(&self, at: BootNs) -> bool {
        self.after < at && at <= self.to
    }

    /// Length of the part of the span of `ns` that ends at `at` and is in the range.
    pub fn part(&self, at: BootNs, ns: u64) -> u64 {
        at.min(self.to).saturating_since(at.minus(ns).max(self.after))
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self { saturation_ratio: SATURATION_RATIO, keep_history: false, range: Range::default() }
    }
}
