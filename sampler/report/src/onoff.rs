//! The on/off experiment: another user of the GPU starts and stops, and the GPU-seconds per second of the victim change with it.
//!
//! ```text
//!  aggressor   ......AAAAAAAAAAAA........AAAAAAAAAA......      on: clusters of its samples
//!  victim      VVVVVVvVvVvVvVvVvVVVVVVVVVvVvVvVvVvVVVVVV
//!  compared       |off|  |on |      |off|  |on |               one side before and one after a change; off side minus on side
//! ```
//! Conditions for a change to count, and their reasons:
//! - *On* is a cluster of samples. Two clusters are separate only if the gap between them is too long for chance ([`GAP_MEDIANS`]), or if
//!   the kernel events show that no process of the user existed in between. Otherwise a random gap in the samples would be an "off" span,
//!   in which samples name the victim more often by the same chance.
//! - Rates are compared, not shares: the victim's share of busy time falls whenever another user starts, which proves nothing.
//! - The victim must be active on both sides. A victim that ends its own phase when the other user starts has no samples in the on side,
//!   and does not wait for that user.
//! - The GPU must be saturated while both are on.
//! - The processes of nearly all samples must have been queried: the time of the other samples is divided over 16 neighbours, and windows
//!   that are similar for that reason would appear as a small error.
//! - No third user may start or stop within the two sides: they are cut there, and dropped if too little remains.
//! - At least two changes must show the drop, each by itself, and three out of four; or four must show it together, with none that
//!   contradicts it. A single change may be a coincidence. The more pairs are examined, the clearer the drop must be.

use std::collections::{BTreeMap, BTreeSet};

use super::gather::GatheredGpu;
use sampler_core::aggregate::{COACTIVITY_WINDOW_NS, Window};
use sampler_core::fact::User;
use sampler_core::units::BootNs;
use statrs::distribution::{ContinuousCDF as _, Normal, StudentsT};

/// Half of all gaps are longer than the median; a gap of this many medians has a chance of one in a million.
const GAP_MEDIANS: usize = 20;
/// The shortest gap between two clusters, in samples.
const GAP_SAMPLES: usize = 12;
/// From this length on, a span in which no process of the user existed separates two clusters.
const DEAD_NS: u64 = 1_500_000_000;
/// The shortest cluster that is compared.
const ON_NS: u64 = 3_000_000_000;
/// The longest side of a change.
const SIDE_NS: u64 = 30_000_000_000;
/// The longest part of a span that the changes at both of its ends may share as a side.
const SIDE_SHARED_NS: u64 = 10_000_000_000;
/// The shortest side of a change.
const SIDE_LEAST_NS: u64 = 3_000_000_000;
/// Excluded on both sides of a change, of which the time is known to within a few samples only.
const GUARD_NS: u64 = 1_500_000_000;
/// The start or end of a user may differ from its first or last sample by this many mean gaps between its samples.
const GUARD_GAPS: f64 = 3.0;
/// Starts and stops of third users count if they used at least this fraction of the GPU while on.
const OTHER_RATE: f64 = 0.05;
/// The victim must have samples in at least this fraction of the windows of the on side.
const ACTIVE_RATIO: f64 = 0.25;
/// Two-sided confidence level of the intervals.
pub const LEVEL: f64 = 0.95;
/// The quantile of the standard normal distribution for [`LEVEL`].
const QUANTILE: f64 = 1.96;
/// At least this fraction of the evaluated changes must show the drop.
const AGREEING: f64 = 0.75;
/// The number of changes that show a drop together although none does by itself.
const TOGETHER: usize = 4;
/// Standard errors of the variance by which the scatter of the changes may exceed their own variances.
const SCATTER: f64 = 2.0;
/// The smallest error of a rate: utilization is rounded to a percent, and sides begin and end within a sample.
const FLOOR: f64 = 0.004;
/// The fraction of the windows of a side in which the processes of enough samples must have been queried.
const QUERIED_WINDOWS: f64 = 0.9;
/// Lags of the autocovariance: windows are similar to their neighbours because time is divided over them, and because loads are periodic.
const LAGS: usize = 3;

/// A span in which a user was on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnSpan {
    pub from: BootNs,
    pub to: BootNs,
    /// Uncertainty of its start and end.
    pub guard_ns: u64,
}

/// The result for a victim and an aggressor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExperimentResult {
    pub confirmed: bool,
    pub rate_before: Option<f64>,
    pub rate_after: Option<f64>,
    pub transitions: u32,
    pub interval: Option<[f64; 2]>,
    /// Why the drop is not confirmed; empty if it is.
    pub why_not: String,
}

/// The data of one GPU that all pairs share.
pub struct Experiment<'a> {
    gpu: &'a GatheredGpu,
    windows: &'a BTreeMap<u64, Window>,
    range: (BootNs, BootNs),
    on: BTreeMap<User, Vec<OnSpan>>,
    /// GPU-seconds per second of each user while on.
    rates: BTreeMap<User, f64>,
    saturation_ratio: f64,
    /// Normal quantile that a drop must exceed, given the number of pairs: one in twenty pairs shows a drop by chance at [`LEVEL`].
    chance_quantile: f64,
}

/// One side of a change.
#[derive(Clone, Copy, Debug)]
struct ChangeSide {
    from: u64,
    to: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    mean: f64,
    windows: f64,
    active: f64,
    busy: f64,
}

struct Change {
    off: Rate,
    on: Rate,
    variance: f64,
}

impl Change {
    fn drop(&self) -> f64 {
        self.off.mean - self.on.mean
    }

    fn shows(&self, quantile: f64) -> bool {
        self.drop() - quantile * self.variance.sqrt() > 0.0
    }
}

#[derive(PartialEq)]
enum NotEvaluable {
    /// A side is too short.
    Short,
    /// The processes of too few samples were queried: the time of each user is smoothed over many windows.
    Unqueried,
    /// A third user started or stopped at the same time.
    OtherChange,
    /// No process of the victim exists in a part of a side.
    VictimAbsent,
}

/// The clusters of the samples that name the user, as spans.
fn clusters(gpu: &GatheredGpu, user: User) -> Vec<OnSpan> {
    let positions: Vec<usize> =
        gpu.samples.iter().enumerate().filter(|(_, (_, named))| *named == Some(user)).map(|(n, _)| n).collect();
    let mut gaps: Vec<usize> = positions.windows(2).map(|pair| pair[1] - pair[0]).collect();
    gaps.sort_unstable();
    let median = gaps.get(gaps.len() / 2).copied().unwrap_or(1);
    let longest = (GAP_MEDIANS * median).max(GAP_SAMPLES);
    let time_of = |n: usize| gpu.samples.get(n).map_or(BootNs(0), |(at, _)| *at);
    let mut clusters: Vec<(usize, usize, usize)> = Vec::new();
    for position in positions {
        let continues = |last: usize| {
            let (from, to) = (time_of(last), time_of(position));
            let dead = to.saturating_since(from) >= DEAD_NS && dead_within(gpu, user, from, to) >= DEAD_NS;
            position - last <= longest && !dead
        };
        match clusters.last_mut() {
            Some((_, last, samples)) if continues(*last) => (*last, *samples) = (position, *samples + 1),
            _ => clusters.push((position, position, 1)),
        }
    }
    let span = |(first, last, samples): (usize, usize, usize)| {
        let ns = time_of(last).saturating_since(time_of(first));
        let gap_ns = ns as f64 / samples.saturating_sub(1).max(1) as f64;
        OnSpan { from: time_of(first), to: time_of(last), guard_ns: ((GUARD_GAPS * gap_ns) as u64).clamp(GUARD_NS, SIDE_NS) }
    };
    clusters.into_iter().map(span).collect()
}

/// The longest time within the span in which no process of the user is known to exist; zero if nothing is known.
fn dead_within(gpu: &GatheredGpu, user: User, from: BootNs, to: BootNs) -> u64 {
    let Some(lifetimes) = gpu.lifetimes.get(&user) else { return 0 };
    let mut alive: Vec<(BootNs, BootNs)> = lifetimes
        .iter()
        .map(|lifetime| (lifetime.since, lifetime.until.unwrap_or(to)))
        .filter(|(a, b)| *a <= to && *b >= from)
        .collect();
    alive.sort_unstable();
    let (mut dead, mut until) = (0, from);
    for (since, end) in alive {
        dead = dead.max(since.saturating_since(until));
        until = until.max(end);
    }
    dead.max(to.saturating_since(until))
}

impl<'a> Experiment<'a> {
    pub fn new(
        gpu: &'a GatheredGpu,
        windows: &'a BTreeMap<u64, Window>,
        range: (BootNs, BootNs),
        saturation_ratio: f64,
        pairs: usize,
    ) -> Self {
        let mut users: Vec<User> = gpu.samples.iter().filter_map(|(_, named)| *named).collect();
        users.sort_unstable();
        users.dedup();
        let on: BTreeMap<User, Vec<OnSpan>> = users.into_iter().map(|user| (user, clusters(gpu, user))).collect();
        let mut experiment = Self {
            gpu,
            windows,
            range,
            on,
            rates: BTreeMap::new(),
            saturation_ratio,
            chance_quantile: chance_quantile(pairs.max(1)),
        };
        experiment.rates = experiment.on.keys().map(|user| (*user, experiment.rate_while_on(*user))).collect();
        experiment
    }

    fn rate_while_on(&self, user: User) -> f64 {
        let spans = self.on.get(&user).into_iter().flatten();
        let (ns, seconds) = spans.fold((0.0, 0.0), |(ns, seconds), on| {
            let side = ChangeSide { from: on.from.0 / COACTIVITY_WINDOW_NS, to: on.to.0 / COACTIVITY_WINDOW_NS + 1 };
            let rate = self.rate(user, side);
            (ns + rate.mean * rate.windows, seconds + rate.windows)
        });
        if seconds > 0.0 { ns / seconds } else { 0.0 }
    }

    fn rate(&self, user: User, side: ChangeSide) -> Rate {
        self.rate_of(user, self.windows.range(side.from..side.to).map(|(_, window)| window))
    }

    fn rate_of<'w>(&self, user: User, windows: impl Iterator<Item = &'w Window>) -> Rate {
        let mut sum = Rate::default();
        let (mut observed, mut ns, mut busy) = (0.0, 0.0, 0.0);
        for window in windows {
            observed += window.observed_ns as f64;
            busy += window.busy_ns;
            if let Some(part) = window.users.get(&user) {
                ns += part.ns;
                sum.active += f64::from(part.samples > 0);
            }
            sum.windows += 1.0;
        }
        if observed > 0.0 {
            (sum.mean, sum.busy) = (ns / observed, busy / observed);
        }
        if sum.windows > 0.0 {
            sum.active /= sum.windows;
        }
        sum
    }

    fn union(&self, user: User, sides: &[ChangeSide]) -> Rate {
        let numbers: BTreeSet<u64> = sides.iter().flat_map(|side| side.from..side.to).collect();
        self.rate_of(user, numbers.iter().filter_map(|n| self.windows.get(n)))
    }

    /// The variance of the mean of `n` windows times `n`, over all sides: from the scatter of windows about the mean of their side and the
    /// covariance of neighbours.
    fn long_run_variance(&self, user: User, sides: &[ChangeSide]) -> f64 {
        let (mut products, mut freedom) = ([0.0; LAGS + 1], 0.0);
        for side in sides {
            let rate_in = |n: u64| {
                let window = self.windows.get(&n).filter(|window| window.observed_ns > 0)?;
                Some(window.users.get(&user).map_or(0.0, |part| part.ns / window.observed_ns as f64))
            };
            let rates: Vec<f64> = (side.from..side.to).filter_map(rate_in).collect();
            let mean = rates.iter().sum::<f64>() / rates.len().max(1) as f64;
            for (lag, sum) in products.iter_mut().enumerate() {
                *sum += rates.iter().zip(rates.iter().skip(lag)).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>();
            }
            freedom += (rates.len() as f64 - 1.0).max(0.0);
        }
        if freedom <= 0.0 {
            return 0.0;
        }
        let weight = |lag: usize| if lag == 0 { 1.0 } else { 2.0 * (1.0 - lag as f64 / (LAGS + 1) as f64) };
        let sum: f64 = products.iter().enumerate().map(|(lag, product)| weight(lag) * product).sum();
        // Negative covariance of neighbours does not reduce the variance.
        sum.max(products[0]) / freedom
    }

    /// The sides of the change where the aggressor's off span and on span meet; `starts`: the off span is first.
    fn sides(
        &self,
        victim: User,
        aggressor: User,
        off: (BootNs, BootNs),
        on: OnSpan,
        starts: bool,
    ) -> Result<(ChangeSide, ChangeSide), NotEvaluable> {
        let guard = on.guard_ns;
        // The off span may end at the limit of the range instead of at another change of the aggressor; then it needs no guard there.
        let edge = off.0 <= self.range.0 && starts || off.1 >= self.range.1 && !starts;
        let before = if edge { 0 } else { guard };
        // Two changes at the ends of a long span get one half each; of a short span, both get most of it.
        let half = |from: BootNs, to: BootNs| {
            let ns = to.saturating_since(from);
            (ns / 2).max(ns.min(SIDE_SHARED_NS)).min(SIDE_NS)
        };
        let (mut off_from, mut off_to, mut on_from, mut on_to);
        if starts {
            (off_from, off_to) = (off.1.minus(guard + half(off.0, off.1)).max(off.0.plus(before)), off.1.minus(guard));
            (on_from, on_to) = (on.from.plus(GUARD_NS), on.from.plus(GUARD_NS + half(on.from, on.to)).min(on.to.minus(GUARD_NS)));
        } else {
            (off_from, off_to) = (off.0.plus(guard), off.0.plus(guard + half(off.0, off.1)).min(off.1.minus(before)));
            (on_from, on_to) = (on.to.minus(GUARD_NS + half(on.from, on.to)).max(on.from.plus(GUARD_NS)), on.to.minus(GUARD_NS));
        }
        // Sides are cut where a third user starts or stops.
        for (other, spans) in self.on.iter().filter(|(other, _)| **other != victim && **other != aggressor) {
            if self.rates.get(other).is_none_or(|rate| *rate < OTHER_RATE) {
                continue;
            }
            for (at, margin) in spans.iter().flat_map(|on| [(on.from, on.guard_ns), (on.to, on.guard_ns)]) {
                if at <= self.range.0.plus(margin) || at.plus(margin) >= self.range.1 {
                    continue;
                }
                let (before, after) = (at.minus(margin), at.plus(margin));
                let (first_to, second_from) = if starts { (off_to, on_from) } else { (on_to, off_from) };
                let (first_from, second_to) = if starts { (&mut off_from, &mut on_to) } else { (&mut on_from, &mut off_to) };
                if after <= *first_from || before >= *second_to {
                    continue;
                }
                if before >= second_from {
                    *second_to = before;
                } else if after <= first_to {
                    *first_from = after;
                } else {
                    return Err(NotEvaluable::OtherChange);
                }
            }
        }
        let side = |from: BootNs, to: BootNs| {
            let side = ChangeSide { from: from.0.div_ceil(COACTIVITY_WINDOW_NS), to: to.0 / COACTIVITY_WINDOW_NS };
            (side.to > side.from && (side.to - side.from) * COACTIVITY_WINDOW_NS >= SIDE_LEAST_NS).then_some(side)
        };
        let (Some(off), Some(on)) = (side(off_from, off_to), side(on_from, on_to)) else { return Err(NotEvaluable::Short) };
        if !self.shows_users(off) || !self.shows_users(on) {
            return Err(NotEvaluable::Unqueried);
        }
        let lives_throughout = |side: ChangeSide| self.lives_throughout(victim, side);
        if lives_throughout(off) && lives_throughout(on) { Ok((off, on)) } else { Err(NotEvaluable::VictimAbsent) }
    }

    fn shows_users(&self, side: ChangeSide) -> bool {
        let windows = self.windows.range(side.from..side.to);
        let (n, all) = windows.fold((0, 0), |(n, all), (_, window)| (n + u64::from(window.shows_users()), all + 1));
        n as f64 >= QUERIED_WINDOWS * all as f64
    }

    /// Whether no part of the side is known to be without a process of the user.
    fn lives_throughout(&self, user: User, side: ChangeSide) -> bool {
        let (from, to) =
            (BootNs(side.from.saturating_mul(COACTIVITY_WINDOW_NS)), BootNs(side.to.saturating_mul(COACTIVITY_WINDOW_NS)));
        self.gpu.may_live(user, from, to) && dead_within(self.gpu, user, from, to) < DEAD_NS
    }

    pub fn evaluate(&self, victim: User, aggressor: User) -> ExperimentResult {
        let spans = self.on.get(&aggressor).map(Vec::as_slice).unwrap_or_default();
        let (mut sides, mut not_evaluable) = (Vec::new(), Vec::new());
        for (n, on) in spans.iter().enumerate() {
            if on.to.saturating_since(on.from) < ON_NS {
                continue;
            }
            let before = n.checked_sub(1).and_then(|n| spans.get(n)).map_or(self.range.0, |before| before.to);
            let after = spans.get(n + 1).map_or(self.range.1, |after| after.from);
            for (off, starts) in [((before, on.from), true), ((on.to, after), false)] {
                // The limits of the range are not changes.
                if off.1.saturating_since(off.0) < on.guard_ns + SIDE_LEAST_NS {
                    if n > 0 && starts || n + 1 < spans.len() && !starts {
                        not_evaluable.push(NotEvaluable::Short);
                    }
                    continue;
                }
                match self.sides(victim, aggressor, off, *on, starts) {
                    Ok(found) => sides.push(found),
                    Err(why) => not_evaluable.push(why),
                }
            }
        }
        if sides.is_empty() {
            return ExperimentResult { why_not: no_change(&not_evaluable), ..ExperimentResult::default() };
        }
        self.evaluate_changes(victim, &sides)
    }

    fn evaluate_changes(&self, victim: User, sides: &[(ChangeSide, ChangeSide)]) -> ExperimentResult {
        let (off, on): (Vec<ChangeSide>, Vec<ChangeSide>) = sides.iter().copied().unzip();
        let (of_off, of_on) = (self.long_run_variance(victim, &off), self.long_run_variance(victim, &on));
        let variance = |long_run: f64, windows: f64| long_run / windows.max(1.0) + FLOOR * FLOOR;
        let change = |(off, on): &(ChangeSide, ChangeSide)| {
            let (off, on) = (self.rate(victim, *off), self.rate(victim, *on));
            Change { off, on, variance: variance(of_off, off.windows) + variance(of_on, on.windows) }
        };
        let changes: Vec<Change> = sides.iter().map(change).collect();
        let k = changes.len() as f64;
        let mean = |of: fn(&Change) -> f64| changes.iter().map(of).sum::<f64>() / k;
        // Windows that two changes share count once.
        let (all_off, all_on) = (self.union(victim, &off), self.union(victim, &on));
        let (before, after) = (all_off.mean, all_on.mean);
        let drop = before - after;
        let mut stderr = (variance(of_off, all_off.windows) + variance(of_on, all_on.windows)).sqrt();
        if changes.len() >= 3 {
            let scatter = changes.iter().map(|c| (c.drop() - mean(Change::drop)).powi(2)).sum::<f64>() / (k - 1.0);
            // If the changes differ by more than their own errors allow, the error follows from their scatter alone.
            if scatter > mean(|c| c.variance) * (1.0 + SCATTER * (2.0 / (k - 1.0)).sqrt()) {
                stderr = stderr.max((scatter / k).sqrt() * student_quantile(changes.len() - 1) / QUANTILE);
            }
        }
        let interval = [drop - QUANTILE * stderr, drop + QUANTILE * stderr];
        // A victim that is not active while the other user is on does not wait for it.
        let active = |c: &&Change| c.on.active >= ACTIVE_RATIO;
        let saturated = |c: &&Change| c.on.busy >= self.saturation_ratio - FLOOR;
        let fit = || changes.iter().filter(active).filter(saturated);
        let showing = fit().filter(|c| c.shows(QUANTILE)).count();
        let each = showing >= 2 && showing as f64 >= AGREEING * k;
        // Many changes together show a small drop, if none of them contradicts it.
        let falling = fit().filter(|c| c.drop() > 0.0).count();
        let contradicted = changes.iter().any(|c| c.drop() + QUANTILE * c.variance.sqrt() < drop / 2.0);
        let together = falling >= TOGETHER && falling as f64 >= AGREEING * k && !contradicted;
        let exceeds_chance = drop - self.chance_quantile * stderr > 0.0;
        let confirmed = (each || together) && interval[0] > 0.0 && exceeds_chance;
        let (n_active, n_saturated) = (changes.iter().filter(active).count(), changes.iter().filter(saturated).count());
        let busy = 100.0 * mean(|c| c.on.busy);
        let why_not = if confirmed {
            String::new()
        } else if n_active == 0 {
            "the victim was hardly active while the contender was on, so it did not wait for it".into()
        } else if n_saturated == 0 {
            format!("the GPU was not saturated while the contender was on ({busy:.0} % busy)")
        } else if interval[0] <= 0.0 {
            "no drop beyond the sampling error".into()
        } else if changes.len() < 2 {
            "only one change, which may be a coincidence".into()
        } else if showing < 2 {
            format!("only {showing} of {} changes shows the drop by itself", changes.len())
        } else {
            format!("only {showing} of {} changes show the drop by themselves", changes.len())
        };
        ExperimentResult {
            confirmed,
            rate_before: Some(before),
            rate_after: Some(after),
            transitions: changes.len() as u32,
            interval: Some(interval),
            why_not,
        }
    }
}

fn no_change(not_evaluable: &[NotEvaluable]) -> String {
    let reason = if not_evaluable.is_empty() {
        "the contender neither started nor stopped while the victim was present: nothing to compare"
    } else if not_evaluable.contains(&NotEvaluable::Unqueried) {
        "driver calls were slow, so the processes of too few samples were queried: raise gpu_wait_percent and gpu_budget_percent for the \
         session"
    } else if not_evaluable.contains(&NotEvaluable::VictimAbsent) {
        "processes of the victim started or ended when the contender started or stopped"
    } else if not_evaluable.contains(&NotEvaluable::OtherChange) {
        "other users started or stopped at the same time, so the effect cannot be attributed"
    } else {
        "the pauses of the contender were too short to compare"
    };
    reason.into()
}

/// The two-sided quantile of Student's t distribution for [`LEVEL`]; `freedom` is at least 1.
fn student_quantile(freedom: usize) -> f64 {
    let student = StudentsT::new(0.0, 1.0, freedom as f64).expect("the degrees of freedom are positive");
    student.inverse_cdf((1.0 + LEVEL) / 2.0)
}

/// The normal quantile that any of `pairs` pairs exceeds by chance in one of forty sessions (Bonferroni); `pairs` is at least 1.
fn chance_quantile(pairs: usize) -> f64 {
    -Normal::standard().inverse_cdf((1.0 - LEVEL) / 2.0 / pairs as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_published_tables() {
        for (freedom, expect) in [(1, 12.71), (2, 4.30), (5, 2.57), (10, 2.23), (30, 2.04)] {
            assert!((student_quantile(freedom) - expect).abs() < 0.01, "{freedom} {}", student_quantile(freedom));
        }
        for (pairs, expect) in [(1, 1.96), (10, 2.81), (1_000, 4.06)] {
            assert!((chance_quantile(pairs) - expect).abs() < 0.01, "{pairs} {}", chance_quantile(pairs));
        }
    }
}
