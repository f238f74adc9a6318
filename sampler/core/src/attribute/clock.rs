//! One GPU's clock against boot time. Nothing ties the two but what polls show.

use std::collections::VecDeque;

use crate::device::ClockView;
use crate::units::{BootNs, GpuNs};

/// Bounds seen over this many polls that brought a sample decide; older ones are forgotten, so drift is followed.
const REMEMBERED_POLLS: usize = 128;
/// What the offset may have drifted since the poll that bounds it, either way: 250 ppm of the time over which bounds are remembered, and
/// forward at least that of 20 s.
const DRIFT_PARTS: u64 = 4_000;
const DRIFT_NS: u64 = 5_000_000;
/// The least bound of so long is one point of the drift's line.
const POINT_NS: u64 = 10_000_000_000;
/// Points remembered: 5 min.
const REMEMBERED_POINTS: usize = 30;
/// Fewer points say nothing about drift: within a minute, what polls miss by is as large.
const DRIFT_POINTS: usize = 6;

/// A sample cannot be read before it was taken, and it was served after the last poll that did not have it. So each poll bounds the
/// offset `boot - gpu` on both sides, from below only as far as one knows how old a sample is when it is first served; nothing in
/// the driver's answers tells, and it is taken to be one period at most.
#[derive(Debug, Default)]
pub struct GpuClock {
    /// (when, least, most) by poll.
    bounds: VecDeque<(BootNs, i128, i128)>,
    points: VecDeque<(BootNs, i128)>,
    last_began: Option<BootNs>,
    pub steps: u64,
}

impl GpuClock {
    /// `oldest` and `newest` were read between `began` and `ended`, and not there at the poll before.
    pub fn polled(&mut self, (oldest, newest): (GpuNs, GpuNs), began: BootNs, ended: BootNs, period_ns: u64) {
        let most = i128::from(ended.0) - i128::from(newest.0);
        // Without a poll before, only the newest sample says something: it may be as old as a period and the delay.
        let (first_served, served) = match self.last_began.replace(began) {
            Some(before) => (before, oldest),
            None => (BootNs(began.0.saturating_sub(period_ns)), newest),
        };
        let least = i128::from(first_served.0) - i128::from(period_ns) - i128::from(served.0);
        if self.bounds.len() == REMEMBERED_POLLS {
            self.bounds.pop_front();
        }
        self.bounds.push_back((ended, least, most));
        match self.points.back_mut() {
            Some((at, least)) if ended.saturating_since(*at) < POINT_NS => *least = most.min(*least),
            _ => {
                if self.points.len() == REMEMBERED_POINTS {
                    self.points.pop_front();
                }
                self.points.push_back((ended, most));
            }
        }
    }

    /// A poll that brought nothing new.
    pub fn silent(&mut self, began: BootNs) {
        self.last_began = Some(began);
    }

    /// The clock was set: what was known of it is void.
    pub fn stepped(&mut self) {
        self.steps += 1;
        self.forget();
    }

    /// The device was opened again.
    pub fn forget(&mut self) {
        self.bounds.clear();
        self.points.clear();
        self.last_began = None;
    }

    /// The least of the bounds from above is the closest: `boot - gpu`.
    fn offset(&self) -> Option<i128> {
        self.bounds.iter().map(|(_, _, most)| *most).min()
    }

    /// A poll has bounded it.
    pub fn is_known(&self) -> bool {
        !self.bounds.is_empty()
    }

    fn uncertainty_ns(&self) -> Option<u64> {
        let least = self.bounds.iter().map(|(_, least, _)| *least).max()?;
        // Bounds of a drifting clock may cross.
        u64::try_from((self.offset()? - least).max(0)).ok()
    }

    pub fn boot(&self, at: GpuNs) -> Option<BootNs> {
        u64::try_from(i128::from(at.0) + self.offset()?).ok().map(BootNs)
    }

    /// Over the time for which bounds are remembered.
    fn drift_ns(&self) -> u64 {
        let remembered = self.bounds.back().zip(self.bounds.front()).map(|(last, first)| last.0.saturating_since(first.0));
        remembered.unwrap_or_default() / DRIFT_PARTS
    }

    /// When the process that a sample names was on the engine: at the sample's instant or within the period that ends there,
    /// the sample being as old as it can be or as young.
    pub fn named_within(&self, boot: BootNs, span_ns: u64) -> (BootNs, BootNs) {
        let drift_ns = self.drift_ns();
        let earliest = boot.minus(self.uncertainty_ns().unwrap_or_default()).minus(drift_ns).minus(span_ns);
        (earliest, boot.plus(drift_ns.max(DRIFT_NS)))
    }

    /// Seconds gained per second, by least squares over the points.
    fn drift_ratio(&self) -> Option<f64> {
        // The last one is not complete.
        let n = self.points.len().saturating_sub(1);
        if n < DRIFT_POINTS {
            return None;
        }
        let (from, base) = *self.points.front()?;
        let point = |(at, most): &(BootNs, i128)| (at.saturating_since(from) as f64, (most - base) as f64);
        let points: Vec<(f64, f64)> = self.points.iter().take(n).map(point).collect();
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n as f64;
        let (x, y) = (mean(|p| p.0), mean(|p| p.1));
        let (xy, xx) = points.iter().fold((0.0, 0.0), |(xy, xx), p| (xy + (p.0 - x) * (p.1 - y), xx + (p.0 - x).powi(2)));
        // The offset falls while the GPU's clock gains.
        (xx > 0.0).then(|| -xy / xx)
    }

    pub fn view(&self) -> ClockView {
        ClockView {
            ahead_of_boot_seconds: self.offset().map(|ns| -ns as f64 * 1e-9),
            uncertainty_seconds: self.uncertainty_ns().map(|ns| ns as f64 * 1e-9),
            drift_ratio: self.drift_ratio(),
            steps: self.steps,
        }
    }
}
