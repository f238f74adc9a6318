//! Divides boot time into spans: everything before [`Timeline::until`] has been reported as a span, and nothing is reported twice.
//!
//! A sample advances the timeline by the GPU's own clock, so that shares are what the driver recorded. Where the two clocks drift apart,
//! the timeline is corrected slowly. Time that no sample covers is a gap before the next sample.

use crate::units::BootNs;

/// A gap of more than this many periods contains lost samples.
const GAP_PERIODS: f64 = 1.5;
/// The two clocks may differ by this much: the offset is not known more accurately.
const DIFFER_NS: u64 = 150_000_000;
/// Beyond [`DIFFER_NS`] the span of a sample is stretched or shrunk by this ratio.
const SLEW: f64 = 0.002;
/// A larger difference is not drift: time has passed that the GPU's clock does not show.
const JUMP_NS: u64 = 1_000_000_000;

/// The span that a sample covers, and the gap before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub ns: u64,
    /// Length of the gap before it.
    pub missing_ns: u64,
}

#[derive(Debug, Default)]
pub struct Timeline {
    until: BootNs,
}

impl Timeline {
    pub fn new(from: BootNs) -> Self {
        Self { until: from }
    }

    pub fn until(&self) -> BootNs {
        self.until
    }

    /// The device was absent: that time is in no state.
    pub fn resume(&mut self, at: BootNs) {
        self.until = self.until.max(at);
    }

    /// Adds a sample at `at`, `gap_ns` after the previous one by the GPU's clock, if there is a previous one. `None` when its time has
    /// already been reported.
    pub fn advance_by_sample(&mut self, at: BootNs, gap_ns: Option<u64>, period_ns: u64) -> Option<Span> {
        let ahead = at.0 as i64 - self.until.0 as i64;
        let ns = match gap_ns {
            None => ahead,
            Some(gap) => {
                let gap = gap as i64;
                let differ = ahead - gap;
                if differ.unsigned_abs() <= DIFFER_NS {
                    gap
                } else if differ.unsigned_abs() <= JUMP_NS {
                    let correction = (gap as f64 * SLEW).round() as i64;
                    gap + differ.signum() * correction.min(differ.abs())
                } else {
                    ahead
                }
            }
        };
        let ns = u64::try_from(ns).ok().filter(|ns| *ns > 0)?;
        self.until = self.until.plus(ns);
        if ns as f64 > GAP_PERIODS * period_ns as f64 {
            return Some(Span { ns: period_ns, missing_ns: ns - period_ns });
        }
        Some(Span { ns, missing_ns: 0 })
    }

    /// Advances to `at` and returns the length of the time up to it.
    pub fn advance_to(&mut self, at: BootNs) -> u64 {
        let ns = at.saturating_since(self.until);
        self.until = self.until.max(at);
        ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: u64 = 167_000_000;

    /// `n` samples of a GPU with a clock that deviates by `drift` seconds per second. Returns the covered and the missing time, the end of
    /// the timeline, and its expected end, in seconds.
    fn walk(n: u64, drift: f64, lost: impl Fn(u64) -> bool) -> (f64, f64, f64, f64) {
        let mut timeline = Timeline::new(BootNs(0));
        let (mut covered, mut missing, mut last) = (0, 0, 0u64);
        for k in (1..=n).filter(|k| !lost(*k)) {
            let boot = BootNs((k as f64 * PERIOD as f64 * (1.0 + drift)) as u64);
            let span = timeline.advance_by_sample(boot, Some((k - last) * PERIOD), PERIOD).unwrap();
            (covered, missing, last) = (covered + span.ns, missing + span.missing_ns, k);
        }
        assert_eq!(covered + missing, timeline.until().0);
        let end = n as f64 * PERIOD as f64 * (1.0 + drift) * 1e-9;
        (covered as f64 * 1e-9, missing as f64 * 1e-9, timeline.until().0 as f64 * 1e-9, end)
    }

    #[test]
    fn spans_sum_to_boot_time_for_any_gpu_clock_drift() {
        for drift in [0.0, 2e-4, -2e-4, 1e-3, -1e-3] {
            let (_, missing, sum, end) = walk(6_000, drift, |_| false);
            assert!((sum - end).abs() < 0.2, "{drift}: {sum} {end}");
            assert_eq!(missing, 0.0);
        }
    }

    #[test]
    fn time_without_a_sample_is_missing() {
        let (covered, missing, sum, end) = walk(600, 0.0, |k| k % 10 == 4 || (100..130).contains(&k));
        assert!((sum - end).abs() < 1e-6, "{sum} {end}");
        assert!((missing - 87.0 * 0.167).abs() < 1e-6, "{missing}");
        assert!((covered - 513.0 * 0.167).abs() < 1e-6, "{covered}");
    }

    #[test]
    fn nothing_is_reported_twice() {
        let mut timeline = Timeline::new(BootNs(0));
        assert_eq!(timeline.advance_to(BootNs(10 * PERIOD)), 10 * PERIOD);
        // The buffer returns samples from before after all.
        assert_eq!(timeline.advance_by_sample(BootNs(4 * PERIOD), None, PERIOD), None);
        assert_eq!(timeline.advance_by_sample(BootNs(10 * PERIOD), None, PERIOD), None);
        assert_eq!(timeline.advance_by_sample(BootNs(11 * PERIOD), None, PERIOD), Some(Span { ns: PERIOD, missing_ns: 0 }));
        // The GPU's clock stood still for 5 s.
        let span = timeline.advance_by_sample(BootNs(12 * PERIOD + 5_000_000_000), Some(PERIOD), PERIOD);
        assert_eq!(span, Some(Span { ns: PERIOD, missing_ns: 5_000_000_000 }));
    }
}
