//! Combines the throttling counters of several cgroups into one: that of the container and those of its ancestors with a shared quota.
//!
//! A process is stopped as soon as any cgroup above it has used up its quota. Stops of two levels may overlap, so their sum would be
//! too large. In each interval the wait was at least that of the most throttled level, and that amount is added. The most throttled
//! level since creation would be wrong: a pod that was throttled for a long time before hides the present throttling of its container.

use sampler_core::observation::CpuQuota;

/// The counter of one container, over the run time of the agent.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    /// By level, from the container up; `None` if never read.
    last: Vec<Option<CpuQuota>>,
    sum: Option<CpuQuota>,
}

/// The change of a level between two readings, with its present limit.
fn step(before: CpuQuota, now: CpuQuota) -> CpuQuota {
    // Smaller numbers belong to another cgroup of the same name.
    CpuQuota {
        limit_ns: now.limit_ns,
        periods: now.periods.saturating_sub(before.periods),
        throttled_periods: now.throttled_periods.saturating_sub(before.throttled_periods),
        throttled_ns: now.throttled_ns.saturating_sub(before.throttled_ns),
    }
}

/// The number of processors that the quota allows; infinite without a limit.
fn processors(quota: &CpuQuota) -> f64 {
    quota.limit_ns.map_or(f64::INFINITY, |(quota, period)| quota as f64 / period.max(1) as f64)
}

impl Throttle {
    /// Adds the present counters of each level. Counts begin with those of the level that was throttled most until then. The limit is
    /// that of the level that was throttled most since the last reading, or the tightest if none was throttled.
    pub fn add(&mut self, levels: &[Option<CpuQuota>]) -> Option<CpuQuota> {
        self.last.resize(levels.len().max(self.last.len()), None);
        let mut steps = Vec::new();
        for (before, now) in self.last.iter_mut().zip(levels) {
            let Some(now) = *now else { continue };
            steps.push(step(before.unwrap_or(now), now));
            *before = Some(now);
        }
        // Among equals the innermost level.
        let most = steps.into_iter().rev().max_by(|a, b| {
            let by_limit = || processors(b).total_cmp(&processors(a));
            a.throttled_ns.cmp(&b.throttled_ns).then_with(by_limit)
        })?;
        self.sum = Some(match self.sum {
            None => {
                let begin = levels.iter().flatten().rev().max_by_key(|quota| quota.throttled_ns)?;
                CpuQuota { limit_ns: most.limit_ns, ..*begin }
            }
            Some(sum) => CpuQuota {
                limit_ns: most.limit_ns,
                periods: sum.periods.saturating_add(most.periods),
                throttled_periods: sum.throttled_periods.saturating_add(most.throttled_periods),
                throttled_ns: sum.throttled_ns.saturating_add(most.throttled_ns),
            },
        });
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(limit_ms: Option<u64>, periods: u64, throttled: u64, ns: u64) -> Option<CpuQuota> {
        let limit_ns = limit_ms.map(|ms| (ms * 1_000_000, 100_000_000));
        Some(CpuQuota { limit_ns, periods, throttled_periods: throttled, throttled_ns: ns })
    }

    /// Expects the limit in ms per 100 ms, periods, throttled periods and ns after the last reading.
    fn check(readings: &[&[Option<CpuQuota>]], expect: Option<(Option<u64>, u64, u64, u64)>) {
        let mut throttle = Throttle::default();
        let sum = readings.iter().map(|levels| throttle.add(levels)).last().flatten();
        let sum = sum.map(|q| (q.limit_ns.map(|(quota, _)| quota / 1_000_000), q.periods, q.throttled_periods, q.throttled_ns));
        assert_eq!(sum, expect, "{readings:?}");
    }

    #[test]
    fn the_most_throttled_level_counts_in_each_interval() {
        check(&[], None);
        check(&[&[None, None]], None);
        check(&[&[level(Some(20), 5, 3, 300)]], Some((Some(20), 5, 3, 300)));
        check(&[&[level(Some(20), 5, 3, 300)], &[level(Some(20), 15, 9, 900)]], Some((Some(20), 15, 9, 900)));
        // The pod was throttled for a long time before; then the container is.
        let (pod, own) = (level(Some(50), 100, 90, 90_000), level(Some(20), 5, 3, 300));
        check(&[&[own, pod], &[level(Some(20), 15, 9, 900), pod]], Some((Some(20), 110, 96, 90_600)));
        // Both at once: not their sum.
        let later = level(Some(50), 110, 95, 90_500);
        check(&[&[own, pod], &[level(Some(20), 15, 9, 900), later]], Some((Some(20), 110, 96, 90_600)));
        // A container without a limit in a pod with one.
        let free = level(None, 0, 0, 0);
        check(&[&[free, pod], &[free, level(Some(50), 110, 95, 95_000)]], Some((Some(50), 110, 95, 95_000)));
    }

    #[test]
    fn without_throttling_the_tightest_limit_is_reported() {
        check(&[&[level(Some(80), 1, 0, 0), level(Some(40), 1, 0, 0)]], Some((Some(40), 1, 0, 0)));
        check(&[&[level(None, 0, 0, 0), None]], Some((None, 0, 0, 0)));
    }

    #[test]
    fn a_level_that_is_missing_once_or_restarts_causes_no_jump() {
        let own = |ns| level(Some(20), ns, ns, ns);
        check(&[&[own(10)], &[None], &[own(15)]], Some((Some(20), 15, 15, 15)));
        check(&[&[own(10)], &[own(2)], &[own(5)]], Some((Some(20), 13, 13, 13)));
        // Its pod is found later.
        check(&[&[own(10)], &[own(11), own(5000)], &[own(12), own(5007)]], Some((Some(20), 18, 18, 18)));
    }
}
