//! Waiting beyond the quietest windows, booked to the users that are on by their GPU time.
//!
//! ```text
//!  quietest  the windows with the same other users on in which a call waited least; best those without any
//!  W - c C   waiting beyond them: c is what a call waits there, or with no other user by regression if that is less
//!  booked    to each user that is on, by its part of the GPU time of all others on at the same time
//! ```
//! A GPU runs one user at a time, so while a call waits beyond its own work, it waits for those that the GPU runs meanwhile. That needs no
//! window without the contender, and separates users that replace each other, for which a comparison of on and off shows nothing.
//! Others can be on in the quietest windows, and keep the victim waiting there: what is booked is then the least that is due to them. The
//! most is all waiting beyond the own GPU time. Both are the interval.

use std::collections::BTreeMap;

use super::regression::{is_solvable, long_run_sum, regress, rows};
use super::{DemandWindow, DemandWindows, LEAST_CALLS, LEAST_WINDOWS, MOST_OTHERS, NOT_OWN, OWN_ERRORS, SAMPLES, changes};

/// What a call takes with the fewest others.
#[derive(Clone, Copy, Debug, Default)]
struct Baseline {
    waited: f64,
    error: f64,
    own: f64,
    own_error: f64,
}

/// Sums over windows by call, with errors.
fn by_call(windows: &[&DemandWindow]) -> Option<Baseline> {
    let calls: f64 = windows.iter().map(|window| window.calls).sum();
    if windows.len() < LEAST_WINDOWS || calls < LEAST_CALLS {
        return None;
    }
    let mean = |value: fn(&DemandWindow) -> f64| {
        let mean = windows.iter().map(|window| value(window)).sum::<f64>() / calls;
        let residual = |window: &&DemandWindow| (window.number, value(window) - mean * window.calls);
        let residuals: Vec<(u64, f64)> = windows.iter().map(residual).collect();
        (mean, long_run_sum(&residuals).max(0.0).sqrt() / calls)
    };
    let ((waited, error), (own, own_error)) = (mean(|window| window.waited), mean(|window| window.own));
    Some(Baseline { waited, error, own, own_error })
}

/// Seconds per second, with its standard error.
#[derive(Clone, Copy, Debug, Default)]
pub struct Estimate {
    pub value: f64,
    pub error: f64,
}

/// The part of the waiting that is due to one other user.
#[derive(Clone, Copy, Debug)]
pub struct Booked {
    /// Beyond the quietest windows, and without the part that longer own work explains; `None` without windows to compare with.
    pub least: Option<Estimate>,
    /// That part is the larger one.
    pub is_own: bool,
    /// Beyond the own GPU time.
    pub most: Estimate,
    pub windows: usize,
    pub quiet_windows: usize,
    /// Starts and ends of the quietest windows.
    pub changes: usize,
}

/// What all comparisons of one victim have in common.
pub struct Quietest {
    /// By window, the other users that are on.
    sets: Vec<Vec<usize>>,
    baseline: Option<Baseline>,
    quiet_windows: usize,
    changes: usize,
}

impl Quietest {
    pub fn new(windows: &[DemandWindow], spans: &[Vec<bool>], by_time: &[usize]) -> Self {
        let set = |n: usize| -> Vec<usize> { by_time.iter().copied().filter(|user| spans[*user][n]).collect() };
        let sets: Vec<Vec<usize>> = (0..windows.len()).map(set).collect();
        // A change is somewhere in its windows.
        let is_inside = |n: &usize| {
            let is_same = |at: usize| sets.get(at).is_none_or(|then| *then == sets[*n]);
            is_same(n.wrapping_sub(1)) && is_same(n + 1)
        };
        let inside: Vec<usize> = (0..windows.len()).filter(is_inside).collect();
        let mut by_set: BTreeMap<&[usize], Vec<&DemandWindow>> = BTreeMap::new();
        for n in &inside {
            by_set.entry(&sets[*n]).or_default().push(&windows[*n]);
        }
        let judged = || by_set.iter().filter_map(|(set, windows)| Some((*set, by_call(windows)?, windows.len())));
        // Of several, one that is surely quiet; the least of many uncertain ones would be so by chance.
        let surely = |baseline: &Baseline| baseline.waited + 2.0 * baseline.error;
        let alone = judged().find(|(set, ..)| set.is_empty());
        let chosen = alone.or_else(|| judged().min_by(|a, b| surely(&a.1).total_cmp(&surely(&b.1))));
        let (quiet_windows, changes) = chosen.map_or((0, 0), |(quiet, _, n)| {
            let is_quiet: Vec<bool> = sets.iter().map(|set| set == quiet).collect();
            (n, changes(&is_quiet))
        });
        let baseline = chosen.map(|(set, baseline, _)| {
            let chosen = if set.is_empty() { None } else { without_others(windows, spans, by_time, &inside) };
            // Not less than its own work.
            let own = |windows: &[DemandWindow]| {
                let sum = |value: fn(&DemandWindow) -> f64| windows.iter().map(value).sum::<f64>();
                sum(|window| window.own) / sum(|window| window.calls)
            };
            match chosen {
                Some(less) if less.waited < baseline.waited => {
                    Baseline { waited: less.waited.max(own(windows).min(baseline.waited)), ..less }
                }
                _ => baseline,
            }
        });
        Self { sets, baseline, quiet_windows, changes }
    }
}

/// What a call takes if no other user is on, by regression on the users that can be separated.
fn without_others(windows: &[DemandWindow], spans: &[Vec<bool>], by_time: &[usize], inside: &[usize]) -> Option<Baseline> {
    let windows: Vec<DemandWindow> = inside.iter().map(|n| windows[*n].clone()).collect();
    let spans: Vec<Vec<bool>> = spans.iter().map(|on| inside.iter().map(|n| on[*n]).collect()).collect();
    let mut users: Vec<usize> = Vec::new();
    for user in by_time.iter().take(MOST_OTHERS) {
        users.push(*user);
        if !is_solvable(&rows(&windows, &spans, &users)) {
            users.pop();
        }
    }
    if users.is_empty() {
        return None;
    }
    let numbers: Vec<u64> = windows.iter().map(|window| window.number).collect();
    let x = rows(&windows, &spans, &users);
    let fit = |value: fn(&DemandWindow) -> f64| regress(&numbers, &windows.iter().map(value).collect::<Vec<f64>>(), &x);
    let (waits, works) = (fit(|window| window.waited)?, fit(|window| window.own)?);
    let first = |values: &[f64]| values.first().copied();
    Some(Baseline {
        waited: first(&waits.coefficients)?,
        error: first(&waits.errors)?,
        own: first(&works.coefficients)?,
        own_error: first(&works.errors)?,
    })
}

/// A sum over windows in parts, for its error.
#[derive(Default)]
struct Scattered {
    sum: f64,
    parts: Vec<(u64, f64)>,
}

impl Scattered {
    /// Adds this share of the values; they scatter around their mean. Returns the sum of all.
    fn add(&mut self, windows: &[&DemandWindow], share: f64, value: impl Fn(&DemandWindow) -> f64) -> f64 {
        let sum: f64 = windows.iter().map(|window| value(window)).sum();
        let mean = sum / windows.len() as f64;
        self.sum += share * sum;
        self.parts.extend(windows.iter().map(|window| (window.number, share * (value(window) - mean))));
        sum
    }

    fn variance(&mut self) -> f64 {
        self.parts.sort_by_key(|part| part.0);
        long_run_sum(&self.parts).max(0.0)
    }
}

impl DemandWindows {
    /// `None` if the `other`th user is hardly on.
    pub fn booked(&self, other: usize) -> Option<Booked> {
        let mut by_set: BTreeMap<&[usize], Vec<&DemandWindow>> = BTreeMap::new();
        for (window, set) in self.windows.iter().zip(&self.quietest.sets).filter(|(_, set)| set.contains(&other)) {
            by_set.entry(set).or_default().push(window);
        }
        let n_windows: usize = by_set.values().map(Vec::len).sum();
        if n_windows < LEAST_WINDOWS {
            return None;
        }
        let baseline = self.quietest.baseline.unwrap_or_default();
        let (mut longer, mut own, mut beyond) = (Scattered::default(), Scattered::default(), Scattered::default());
        let (mut calls, mut longer_shares, mut beyond_shares) = (0.0, 0.0, 0.0);
        for (set, windows) in &by_set {
            let time = |user: usize| windows.iter().map(|window| window.others[user]).sum::<f64>();
            let all: f64 = set.iter().map(|user| time(*user)).sum();
            if all <= 0.0 {
                continue;
            }
            let share = time(other) / all;
            // The share is one of so many samples; none of them is not proof of none.
            let samples = (all * SAMPLES).max(1.0);
            let share_variance = if set.len() > 1 { (share * (1.0 - share)).max(1.0 / samples) / samples } else { 0.0 };
            let sum = longer.add(windows, share, |window| window.waited - baseline.waited * window.calls);
            longer_shares += share_variance * sum.powi(2);
            let sum = beyond.add(windows, share, |window| window.waited - window.own);
            beyond_shares += share_variance * sum.powi(2);
            own.add(windows, share, |window| window.own - baseline.own * window.calls);
            calls += share * windows.iter().map(|window| window.calls).sum::<f64>();
        }
        let n = n_windows as f64;
        let own_variance = own.variance() + (calls * baseline.own_error).powi(2);
        let has_grown = own.sum > OWN_ERRORS * own_variance.sqrt();
        let (own, own_variance) = if has_grown { (own.sum, own_variance) } else { (0.0, 0.0) };
        let variance = longer.variance() + longer_shares + (calls * baseline.error).powi(2) + own_variance;
        let least = Estimate { value: (longer.sum - own) / n, error: variance.sqrt() / n };
        Some(Booked {
            least: self.quietest.baseline.map(|_| least),
            is_own: longer.sum - own < NOT_OWN * longer.sum,
            most: Estimate { value: beyond.sum / n, error: (beyond.variance() + beyond_shares).sqrt() / n },
            windows: n_windows,
            quiet_windows: self.quietest.quiet_windows,
            changes: self.quietest.changes,
        })
    }
}
