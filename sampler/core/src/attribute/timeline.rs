//! A walk along boot time: everything before [`Wall::until`] has been told as a span, nothing twice.
//!
//! Ticks advance it by the GPU's own clock, so that their shares are what the driver recorded; where the two clocks drift apart it
//! is led back slowly, and what no tick covers is a gap before the tick.

use crate::units::BootNs;

/// A gap above this many periods holds lost ticks.
const GAP_PERIODS: f64 = 1.5;
/// The two clocks may differ by this much: what is known of the offset is no better.
const DIFFER_NS: u64 = 150_000_000;
/// Beyond it a tick's span is stretched or shrunk by this part,
const SLEW: f64 = 0.002;
/// and beyond this it is not drift: time has passed that the GPU's clock does not show.
const JUMP_NS: u64 = 1_000_000_000;

/// What a tick covers, and what is missing before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub ns: u64,
    /// Ticks are missing for so long before it.
    pub missing_ns: u64,
}

#[derive(Debug)]
pub struct Wall {
    until: BootNs,
}

impl Wall {
    pub fn new(from: BootNs) -> Self {
        Self { until: from }
    }

    pub fn until(&self) -> BootNs {
        self.until
    }

    /// The device was away: that time is in no state.
    pub fn resume(&mut self, at: BootNs) {
        self.until = self.until.max(at);
    }

    /// A tick at `at`, `gap_ns` after the one before by the GPU's clock, if there is one before. `None` when its time is told already.
    pub fn tick(&mut self, at: BootNs, gap_ns: Option<u64>, period_ns: u64) -> Option<Span> {
        let ahead = at.0 as i64 - self.until.0 as i64;
        let ns = match gap_ns {
            None => ahead,
            Some(gap) => {
                let gap = gap as i64;
                let differ = ahead - gap;
                if differ.unsigned_abs() <= DIFFER_NS {
                    gap
                } else if differ.unsigned_abs() <= JUMP_NS {
                    let led = (gap as f64 * SLEW).round() as i64;
                    gap + differ.signum() * led.min(differ.abs())
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

    /// Everything up to there; how long that is.
    pub fn up_to(&mut self, at: BootNs) -> u64 {
        let ns = at.saturating_since(self.until);
        self.until = self.until.max(at);
        ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: u64 = 167_000_000;

    /// `n` ticks of a GPU whose clock is so much off per second: what ticks cover, what is missing, where it ends, where it should.
    fn walk(n: u64, drift: f64, lost: impl Fn(u64) -> bool) -> (f64, f64, f64, f64) {
        let mut wall = Wall::new(BootNs(0));
        let (mut covered, mut missing, mut last) = (0, 0, 0u64);
        for k in (1..=n).filter(|k| !lost(*k)) {
            let boot = BootNs((k as f64 * PERIOD as f64 * (1.0 + drift)) as u64);
            let span = wall.tick(boot, Some((k - last) * PERIOD), PERIOD).unwrap();
            (covered, missing, last) = (covered + span.ns, missing + span.missing_ns, k);
        }
        assert_eq!(covered + missing, wall.until().0);
        let end = n as f64 * PERIOD as f64 * (1.0 + drift) * 1e-9;
        (covered as f64 * 1e-9, missing as f64 * 1e-9, wall.until().0 as f64 * 1e-9, end)
    }

    #[test]
    fn spans_sum_to_boot_time_whatever_the_gpus_clock_does() {
        for drift in [0.0, 2e-4, -2e-4, 1e-3, -1e-3] {
            let (_, missing, sum, end) = walk(6_000, drift, |_| false);
            assert!((sum - end).abs() < 0.2, "{drift}: {sum} {end}");
            assert_eq!(missing, 0.0);
        }
    }

    #[test]
    fn what_no_tick_covers_is_missing() {
        let (covered, missing, sum, end) = walk(600, 0.0, |k| k % 10 == 4 || (100..130).contains(&k));
        assert!((sum - end).abs() < 1e-6, "{sum} {end}");
        assert!((missing - 87.0 * 0.167).abs() < 1e-6, "{missing}");
        assert!((covered - 513.0 * 0.167).abs() < 1e-6, "{covered}");
    }

    #[test]
    fn nothing_is_told_twice() {
        let mut wall = Wall::new(BootNs(0));
        assert_eq!(wall.up_to(BootNs(10 * PERIOD)), 10 * PERIOD);
        // Ticks from before come out of the ring after all.
        assert_eq!(wall.tick(BootNs(4 * PERIOD), None, PERIOD), None);
        assert_eq!(wall.tick(BootNs(10 * PERIOD), None, PERIOD), None);
        assert_eq!(wall.tick(BootNs(11 * PERIOD), None, PERIOD), Some(Span { ns: PERIOD, missing_ns: 0 }));
        // The GPU's clock stood still for 5 s.
        let span = wall.tick(BootNs(12 * PERIOD + 5_000_000_000), Some(PERIOD), PERIOD);
        assert_eq!(span, Some(Span { ns: PERIOD, missing_ns: 5_000_000_000 }));
    }
}
