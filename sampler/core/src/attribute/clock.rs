//! The offset of one GPU's clock from boot time, as polls bound it. There is no other relation between the two clocks.

use std::collections::VecDeque;

use crate::device::ClockView;
use crate::units::{BootNs, GpuNs};

/// The offset follows from the bounds of this many polls that returned a sample. Older bounds are dropped, so that it follows drift.
const REMEMBERED_POLLS: usize = 128;
/// How far the offset may have drifted since the poll that bounds it, in either direction: 250 ppm (1/4,000) of the time over which bounds
/// are remembered, and forward at least that of 20 s.
const DRIFT_PARTS: u64 = 4_000;
const DRIFT_NS: u64 = 5_000_000;
/// The smallest bound within this time is one point of the regression line for the drift.
const POINT_NS: u64 = 10_000_000_000;
/// Number of points remembered: 5 min.
const REMEMBERED_POINTS: usize = 30;
/// With fewer points the drift is not reported: within a minute, the error of the polls is as large as the drift.
const DRIFT_POINTS: usize = 6;

/// A sample cannot be read before it was taken, and it was first served after the last poll that did not return it. So each poll bounds
/// the offset `boot - gpu` on both sides. The lower bound depends on the age of a sample when it is first served. The driver does not
/// report that age; it is assumed to be at most one period.
#[derive(Debug, Default)]
pub struct GpuClock {
    /// By poll: time, lower bound, upper bound.
    bounds: VecDeque<(BootNs, i128, i128)>,
    points: VecDeque<(BootNs, i128)>,
    last_began: Option<BootNs>,
    pub steps: u64,
}

impl GpuClock {
    /// `oldest` and `newest` were read between `began` and `ended`, and were not served by the previous poll.
    pub fn polled(&mut self, (oldest, newest): (GpuNs, GpuNs), began: BootNs, ended: BootNs, period_ns: u64) {
        let most = i128::from(ended.0) - i128::from(newest.0);
        // Without a previous poll only the newest sample gives a bound: it may be as old as a period plus the delay.
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

    /// Records a poll that returned no new sample.
    pub fn silent(&mut self, began: BootNs) {
        self.last_began = Some(began);
    }

    /// The clock was set: all bounds are void.
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

    /// `boot - gpu`: the smallest upper bound is the closest.
    fn offset(&self) -> Option<i128> {
        self.bounds.iter().map(|(_, _, most)| *most).min()
    }

    /// Whether a poll has bounded the offset.
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

    /// Possible drift over the time for which bounds are remembered.
    fn drift_ns(&self) -> u64 {
        let remembered = self.bounds.back().zip(self.bounds.front()).map(|(last, first)| last.0.saturating_since(first.0));
        remembered.unwrap_or_default() / DRIFT_PARTS
    }

    /// The span in which the process that a sample names was on the engine: the sample's instant or the period that ends there, widened
    /// by the uncertainty of the sample's age.
    pub fn named_within(&self, boot: BootNs, span_ns: u64) -> (BootNs, BootNs) {
        let drift_ns = self.drift_ns();
        let earliest = boot.minus(self.uncertainty_ns().unwrap_or_default()).minus(drift_ns).minus(span_ns);
        (earliest, boot.plus(drift_ns.max(DRIFT_NS)))
    }

    /// Seconds gained per second, by least squares over the points.
    fn drift_ratio(&self) -> Option<f64> {
        // The last point is not complete.
        let n = self.points.len().saturating_sub(1);
        if n < DRIFT_POINTS {
            return None;
        }
        let (from, base) = *self.points.front()?;
        let point = |(at, most): &(BootNs, i128)| (at.saturating_since(from) as f64, (most - base) as f64);
        let points: Vec<(f64, f64)> = self.points.iter().take(n).map(point).collect();
        let mean = |coordinate: fn(&(f64, f64)) -> f64| points.iter().map(coordinate).sum::<f64>() / n as f64;
        let (x, y) = (mean(|p| p.0), mean(|p| p.1));
        let (xy, xx) = points.iter().fold((0.0, 0.0), |(xy, xx), p| (xy + (p.0 - x) * (p.1 - y), xx + (p.0 - x).powi(2)));
        // The offset decreases while the GPU's clock gains.
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
