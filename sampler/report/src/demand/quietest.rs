//! Waiting beyond the quietest windows, booked to the users that are on by their GPU time.
//!
//! ```text
//!  quietest  the windows with the same other users on in which a call waited least; those without any other user if there are some
//!  W - c C   waiting beyond them: c is what a call waits there, or with no other user by regression if that is less
//!  booked    to each user that is on, by its part of the GPU time of all others on at the same time
//! ```
//! A GPU runs one user at a time, so while a call waits beyond its own work, it waits for those that the GPU runs meanwhile. That separates
//! users that replace each other, for which a comparison of on and off shows nothing. Nothing is booked to a user that is on in the quietest
//! windows too, unless the regression separates it: what is longer beyond them is due to others. That it may keep the victim waiting in the
//! quietest windows is not known.
//!
//! No user can have kept the victim waiting for longer than the victim waited, nor for longer than it was on the GPU: the most.

use std::collections::BTreeMap;

use super::regression::{is_solvable, long_run_sum, regress, rows};
use super::{
    DemandWindow, DemandWindows, LEAST_CALLS, LEAST_WINDOWS, MOST_OTHERS, NOT_OWN, OWN_ERRORS, SAMPLES, changes,
    not_next_to_a_change,
};

/// Windows of a group from which their scatter is known.
const LEAST_GROUP: usize = 4;

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
    pub longer: Option<Estimate>,
    /// That part is the larger one.
    pub is_own: bool,
    /// Beyond the own GPU time.
    pub beyond_own: Estimate,
    pub most: Estimate,
    pub windows: usize,
    pub quiet_windows: usize,
    /// Starts and ends of the quietest windows.
    pub changes: usize,
}

/// The windows in which the same other users are on.
struct SameUsers {
    users: Vec<usize>,
    windows: Vec<usize>,
    /// GPU time of each, and of all.
    times: Vec<f64>,
    all: f64,
}

#[derive(Default)]
struct Quiet {
    baseline: Baseline,
    /// The others that are on in them and could not be separated, so that the baseline includes what they cause.
    included: Vec<usize>,
    windows: usize,
    changes: usize,
}

/// What all comparisons of one victim have in common.
pub struct Quietest {
    groups: Vec<SameUsers>,
    quiet: Option<Quiet>,
}

impl Quietest {
    pub fn new(windows: &[DemandWindow], spans: &[Vec<bool>], by_time: &[usize]) -> Self {
        let mut by_users: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
        let users = |n: usize| by_time.iter().copied().filter(|user| spans[*user][n]).collect();
        (0..windows.len()).for_each(|n| by_users.entry(users(n)).or_default().push(n));
        let group = |(users, numbers): (Vec<usize>, Vec<usize>)| {
            let time = |user: &usize| numbers.iter().map(|n| windows[*n].others[*user]).sum::<f64>();
            let times: Vec<f64> = users.iter().map(time).collect();
            SameUsers { users, windows: numbers, all: times.iter().sum(), times }
        };
        let groups: Vec<SameUsers> = by_users.into_iter().map(group).collect();
        let quiet = quietest(windows, spans, by_time, &groups);
        Self { groups, quiet }
    }
}

fn quietest(windows: &[DemandWindow], spans: &[Vec<bool>], by_time: &[usize], groups: &[SameUsers]) -> Option<Quiet> {
    let mut of_window = vec![0; windows.len()];
    for (position, group) in groups.iter().enumerate() {
        group.windows.iter().for_each(|n| of_window[*n] = position);
    }
    let inside = not_next_to_a_change(&of_window);
    let mut inside_group: Vec<Vec<&DemandWindow>> = vec![Vec::new(); groups.len()];
    inside.iter().for_each(|n| inside_group[of_window[*n]].push(&windows[*n]));
    let judged = inside_group.iter().enumerate().filter_map(|(position, own)| Some((position, by_call(own)?, own.len())));
    let all: Vec<(usize, Baseline, usize)> = judged.collect();
    // Of several, one that is surely quiet; the least of many uncertain ones would be so by chance.
    let surely = |baseline: &Baseline| baseline.waited + 2.0 * baseline.error;
    let alone = all.iter().find(|(position, ..)| groups[*position].users.is_empty());
    let (quiet, baseline, n_windows) = *alone.or_else(|| all.iter().min_by(|a, b| surely(&a.1).total_cmp(&surely(&b.1))))?;
    let users = groups[quiet].users.clone();
    let regressed = if users.is_empty() { None } else { without_others(windows, spans, by_time, &inside) };
    let (baseline, included) = match regressed {
        Some((less, separated)) if less.waited < baseline.waited => {
            let sum = |value: fn(&DemandWindow) -> f64| windows.iter().map(value).sum::<f64>();
            // Not less than its own work.
            let own = sum(|window| window.own) / sum(|window| window.calls);
            let baseline = Baseline { waited: less.waited.max(own.min(baseline.waited)), ..less };
            (baseline, users.into_iter().filter(|user| !separated.contains(user)).collect())
        }
        _ => (baseline, users),
    };
    let is_quiet: Vec<bool> = of_window.iter().map(|group| *group == quiet).collect();
    Some(Quiet { baseline, included, windows: n_windows, changes: changes(&is_quiet) })
}

/// What a call takes if no other user is on, by regression on the users that can be separated; and which these are.
fn without_others(
    windows: &[DemandWindow],
    spans: &[Vec<bool>],
    by_time: &[usize],
    inside: &[usize],
) -> Option<(Baseline, Vec<usize>)> {
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
    let baseline = Baseline {
        waited: first(&waits.coefficients)?,
        error: first(&waits.errors)?,
        own: first(&works.coefficients)?,
        own_error: first(&works.errors)?,
    };
    Some((baseline, users))
}

/// A sum over windows in parts, for its error.
#[derive(Default)]
struct Scattered {
    sum: f64,
    parts: Vec<(u64, f64)>,
    /// Of groups that are too small to know their own scatter.
    few: Vec<(u64, f64)>,
}

impl Scattered {
    /// Adds this share of the values; they scatter around their mean. Returns the sum of all.
    fn add(&mut self, windows: &[&DemandWindow], share: f64, value: impl Fn(&DemandWindow) -> f64) -> f64 {
        let sum: f64 = windows.iter().map(|window| value(window)).sum();
        let n = windows.len() as f64;
        self.sum += share * sum;
        if windows.len() < LEAST_GROUP {
            self.few.extend(windows.iter().map(|window| (window.number, share * value(window))));
        } else {
            let (mean, scale) = (sum / n, (n / (n - 1.0)).sqrt());
            self.parts.extend(windows.iter().map(|window| (window.number, share * scale * (value(window) - mean))));
        }
        sum
    }

    fn variance(mut self) -> f64 {
        let mean = self.few.iter().map(|(_, value)| value).sum::<f64>() / self.few.len().max(1) as f64;
        self.parts.extend(self.few.iter().map(|(number, value)| (*number, value - mean)));
        self.parts.sort_by_key(|part| part.0);
        long_run_sum(&self.parts).max(0.0)
    }
}

impl DemandWindows {
    /// `None` if the `other`th user is hardly on.
    pub fn booked(&self, other: usize) -> Option<Booked> {
        let quietest = self.quietest.as_ref()?;
        let of_other = |group: &SameUsers| group.users.iter().position(|user| *user == other);
        let groups = || quietest.groups.iter().filter_map(|group| Some((group, of_other(group)?)));
        let n_windows: usize = groups().map(|(group, _)| group.windows.len()).sum();
        if n_windows < LEAST_WINDOWS {
            return None;
        }
        let quiet = quietest.quiet.as_ref().filter(|quiet| !quiet.included.contains(&other));
        let baseline = quiet.map(|quiet| quiet.baseline).unwrap_or_default();
        let (mut longer, mut own, mut beyond) = (Scattered::default(), Scattered::default(), Scattered::default());
        let (mut calls, mut longer_shares, mut beyond_shares, mut waited, mut on_gpu) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (group, position) in groups() {
            let windows: Vec<&DemandWindow> = group.windows.iter().map(|n| &self.windows[*n]).collect();
            waited += windows.iter().map(|window| window.waited).sum::<f64>();
            if group.all <= 0.0 {
                continue;
            }
            let time = group.times[position];
            on_gpu += time;
            let share = time / group.all;
            // The share is one of so many samples; none of them is not proof of none.
            let samples = (group.all * SAMPLES).max(1.0);
            let share_variance = if group.users.len() > 1 { (share * (1.0 - share)).max(1.0 / samples) / samples } else { 0.0 };
            let sum = longer.add(&windows, share, |window| window.waited - baseline.waited * window.calls);
            longer_shares += share_variance * sum.powi(2);
            let sum = beyond.add(&windows, share, |window| window.waited - window.own);
            beyond_shares += share_variance * sum.powi(2);
            own.add(&windows, share, |window| window.own - baseline.own * window.calls);
            calls += share * windows.iter().map(|window| window.calls).sum::<f64>();
        }
        let n = n_windows as f64;
        let most = Estimate { value: waited.min(on_gpu) / n, error: (on_gpu / SAMPLES).sqrt() / n };
        let (longer_sum, own_sum, beyond_sum) = (longer.sum, own.sum, beyond.sum);
        let own_variance = own.variance() + (calls * baseline.own_error).powi(2);
        let has_grown = own_sum > OWN_ERRORS * own_variance.sqrt();
        let (own, own_variance) = if has_grown { (own_sum, own_variance) } else { (0.0, 0.0) };
        let variance = longer.variance() + longer_shares + (calls * baseline.error).powi(2) + own_variance;
        let longer = Estimate { value: ((longer_sum - own) / n).min(most.value), error: variance.sqrt() / n };
        Some(Booked {
            longer: quiet.map(|_| longer),
            is_own: longer_sum - own < NOT_OWN * longer_sum,
            beyond_own: Estimate { value: beyond_sum / n, error: (beyond.variance() + beyond_shares).sqrt() / n },
            most,
            windows: n_windows,
            quiet_windows: quiet.map_or(0, |quiet| quiet.windows),
            changes: quiet.map_or(0, |quiet| quiet.changes),
        })
    }
}
