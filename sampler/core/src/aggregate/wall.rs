//! A GPU's time by state, as a walk along boot time: everything before [`Wall::until`] is in a state, nothing twice.
//!
//! Ticks advance it by the GPU's own clock, so that their shares are what the driver recorded; where the two clocks drift apart it
//! is led back slowly, and what no tick covers is unobserved.

use crate::snapshot::GpuTime;
use crate::units::BootNs;

/// A gap above this many periods holds lost ticks.
const GAP_PERIODS: f64 = 1.5;
/// The two clocks may differ by this much: what is known of the offset is no better.
const DIFFER_NS: f64 = 150e6;
/// Beyond it a tick's span is stretched or shrunk by this part,
const SLEW: f64 = 0.002;
/// and beyond this it is not drift: time has passed that the GPU's clock does not show.
const JUMP_NS: f64 = 1e9;

/// What a tick covers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// The end of it.
    pub at: BootNs,
    pub ns: f64,
    /// Ticks are missing before it.
    pub gap: bool,
}

#[derive(Debug)]
pub struct Wall {
    until: f64,
    idle: f64,
    unobserved: f64,
    unsupported: f64,
}

impl Wall {
    pub fn new(from: BootNs) -> Self {
        Self { until: from.0 as f64, idle: 0.0, unobserved: 0.0, unsupported: 0.0 }
    }

    pub fn until(&self) -> BootNs {
        BootNs(self.until.max(0.0) as u64)
    }

    /// The device was away: that time is in no state.
    pub fn resume(&mut self, at: BootNs) {
        self.until = self.until.max(at.0 as f64);
    }

    /// A tick at `at`, `gap_ns` after the one before by the GPU's clock, if there is one before. `None` when its time is booked already.
    /// Its own span is left to the caller: as busy, idle or unobserved.
    pub fn tick(&mut self, at: BootNs, gap_ns: Option<u64>, period_ns: u64) -> Option<Span> {
        let to = at.0 as f64;
        let ahead = to - self.until;
        let mut ns = match gap_ns {
            None => ahead,
            Some(gap) => {
                let gap = gap as f64;
                let differ = ahead - gap;
                if differ.abs() <= DIFFER_NS {
                    gap
                } else if differ.abs() <= JUMP_NS {
                    gap + differ.signum() * (gap * SLEW).min(differ.abs())
                } else {
                    ahead
                }
            }
        };
        if ns <= 0.0 {
            return None;
        }
        let period = period_ns as f64;
        let gap = ns > GAP_PERIODS * period;
        if gap {
            self.unobserved += ns - period;
            self.until += ns - period;
            ns = period;
        }
        self.until += ns;
        Some(Span { at, ns, gap })
    }

    pub fn idle(&mut self, ns: f64) {
        self.idle += ns;
    }

    pub fn unobserved(&mut self, ns: f64) {
        self.unobserved += ns;
    }

    /// Everything up to there; how long that was.
    fn up_to(&mut self, at: BootNs) -> f64 {
        let ns = (at.0 as f64 - self.until).max(0.0);
        self.until += ns;
        ns
    }

    pub fn idle_until(&mut self, at: BootNs) -> f64 {
        let ns = self.up_to(at);
        self.idle += ns;
        ns
    }

    pub fn unobserved_until(&mut self, at: BootNs) -> f64 {
        let ns = self.up_to(at);
        self.unobserved += ns;
        ns
    }

    pub fn unsupported_until(&mut self, at: BootNs) {
        self.unsupported += self.up_to(at);
    }

    /// Everything up to there is measured: so much of it busy, which is returned; the rest idle.
    pub fn measured_until(&mut self, at: BootNs, busy_ratio: f64) -> f64 {
        let ns = self.up_to(at);
        let busy = ns * busy_ratio;
        self.idle += ns - busy;
        busy
    }

    pub fn view(&self, busy_ns: f64) -> GpuTime {
        let s = 1e-9;
        GpuTime { busy: busy_ns * s, idle: self.idle * s, unobserved: self.unobserved * s, unsupported: self.unsupported * s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: u64 = 167_000_000;

    fn sum(wall: &Wall, busy: f64) -> f64 {
        wall.view(busy).busy + wall.idle * 1e-9 + wall.unobserved * 1e-9 + wall.unsupported * 1e-9
    }

    /// `n` ticks of a GPU whose clock is so much off per second; busy, unobserved, sum, and what should be.
    fn walk(n: u64, drift: f64, lost: impl Fn(u64) -> bool) -> (f64, f64, f64, f64) {
        let mut wall = Wall::new(BootNs(0));
        let (mut busy, mut last) = (0.0, 0u64);
        for k in (1..=n).filter(|k| !lost(*k)) {
            let boot = BootNs((k as f64 * PERIOD as f64 * (1.0 + drift)) as u64);
            let span = wall.tick(boot, Some((k - last) * PERIOD), PERIOD).unwrap();
            (busy, last) = (busy + span.ns, k);
        }
        let end = n as f64 * PERIOD as f64 * (1.0 + drift) * 1e-9;
        (busy * 1e-9, wall.unobserved * 1e-9, sum(&wall, busy), end)
    }

    #[test]
    fn states_sum_to_boot_time_whatever_the_gpus_clock_does() {
        for drift in [0.0, 2e-4, -2e-4, 1e-3, -1e-3] {
            let (busy, unobserved, sum, end) = walk(6_000, drift, |_| false);
            assert!((sum - end).abs() < 0.2 && (busy - sum).abs() < 1e-6, "{drift}: {busy} {sum} {end}");
            assert_eq!(unobserved, 0.0);
        }
    }

    #[test]
    fn what_no_tick_covers_is_unobserved() {
        let (busy, unobserved, sum, end) = walk(600, 0.0, |k| k % 10 == 4 || (100..130).contains(&k));
        assert!((sum - end).abs() < 1e-6, "{sum} {end}");
        assert!((unobserved - 87.0 * 0.167).abs() < 1e-6, "{unobserved}");
        assert!((busy - 513.0 * 0.167).abs() < 1e-6, "{busy}");
    }

    #[test]
    fn nothing_is_booked_twice() {
        let mut wall = Wall::new(BootNs(0));
        wall.unobserved_until(BootNs(10 * PERIOD));
        // Ticks from before come out of the ring after all.
        assert_eq!(wall.tick(BootNs(4 * PERIOD), None, PERIOD), None);
        assert_eq!(wall.tick(BootNs(10 * PERIOD), None, PERIOD), None);
        let span = wall.tick(BootNs(11 * PERIOD), None, PERIOD).unwrap();
        assert_eq!((span.ns as u64, span.gap), (PERIOD, false));
        // The GPU's clock stood still for 5 s.
        let span = wall.tick(BootNs(12 * PERIOD + 5_000_000_000), Some(PERIOD), PERIOD).unwrap();
        assert!(span.gap);
        assert!((sum(&wall, 2.0 * PERIOD as f64) - (12.0 * 0.167 + 5.0)).abs() < 1e-6);
    }
}
