//! The natural experiment: another user of the GPU comes and goes, and the victim's GPU-seconds per second change with it.
//!
//! ```text
//!  aggressor   ......AAAAAAAAAAAA........AAAAAAAAAA......      on: its samples, in clusters
//!  victim      VVVVVVvVvVvVvVvVvVVVVVVVVVvVvVvVvVvVVVVVV
//!  compared       |off|  |on |      |off|  |on |               a side on each side of a change, off side less on side
//! ```
//! What makes a change count, and why:
//! - *On* is a cluster of samples. Two clusters are apart only if no chance gap could be that long ([`GAP_MEDIANS`]), or if the kernel
//!   told that no process of the user lived in between: otherwise a lull in the samples would be an "off" in which the victim was
//!   named by the very same chance.
//! - Rates are compared, not shares: the victim's share of busy time falls whenever anybody joins, and proves nothing.
//! - The victim has to be active on both sides. One whose own phase ends as another starts has no samples beside it, and is not
//!   kept waiting by it.
//! - The GPU has to be saturated while both are on.
//! - Nearly all samples have to have had their process queried: the time of the others is divided over 16 neighbours, and windows that
//!   are alike for that reason would look like a small error.
//! - Nobody else may come or go within the two sides: they are cut there, and dropped if too little is left.
//! - Two changes at least have to show it, each by itself, and three of four; or four together, of which none denies it. One can be a
//!   coincidence. The more pairs are looked at, the clearer it has to be.

use std::collections::{BTreeMap, BTreeSet};

use super::gather::GatheredGpu;
use sampler_core::aggregate::{TOGETHER_NS, Window};
use sampler_core::fact::User;
use sampler_core::units::BootNs;

/// Half of all gaps are longer than the median; so many times as long is one in a million.
const GAP_MEDIANS: usize = 20;
/// The shortest gap between two clusters, in ticks.
const GAP_TICKS: usize = 12;
/// A gap in which no process of the user lived is an end however short, from here on.
const DEAD_NS: u64 = 1_500_000_000;
/// A user whose cluster is shorter was not on for long enough to be compared.
const ON_NS: u64 = 3_000_000_000;
/// Sides of a change: at most, and at least.
const SIDE_NS: u64 = 30_000_000_000;
/// Up to so much two changes may share.
const SIDE_SHARED_NS: u64 = 10_000_000_000;
const SIDE_LEAST_NS: u64 = 3_000_000_000;
/// Left out next to a change: it is known to a few samples only.
const GUARD_NS: u64 = 1_500_000_000;
/// Gaps between its samples that a user's coming may have gone unnoticed for.
const GUARD_GAPS: f64 = 3.0;
/// Others count as coming or going if they had this part of the GPU while on.
const OTHER_RATE: f64 = 0.05;
/// The victim had samples in this part of the windows of the on side.
const ACTIVE_RATIO: f64 = 0.25;
/// Two-sided level of the intervals, and its quantile.
pub const LEVEL: f64 = 0.95;
const QUANTILE: f64 = 1.96;
/// Of changes that could be judged, this part has to show the drop.
const AGREEING: f64 = 0.75;
/// Changes that show a drop together where none does by itself.
const TOGETHER: usize = 4;
/// Standard errors of a variance by which changes may differ from what their errors allow.
const SCATTER: f64 = 2.0;
/// Utilization is rounded to a percent, and sides begin and end within a tick: no rate is known better.
const FLOOR: f64 = 0.004;
/// Of the windows of a side, the part in which enough samples had their process queried.
const QUERIED_WINDOWS: f64 = 0.9;
/// Windows that may be alike: what is divided over neighbours makes them so, and loads have their own rhythm.
const LAGS: usize = 3;

/// A span in which a user was on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct On {
    pub from: BootNs,
    pub to: BootNs,
    /// What its coming or going may be off by.
    pub guard_ns: u64,
}

/// What came of it for a victim and an aggressor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged {
    pub confirmed: bool,
    pub rate_before: Option<f64>,
    pub rate_after: Option<f64>,
    pub transitions: u32,
    pub interval: Option<[f64; 2]>,
    pub why_not: String,
}

/// Everything about one GPU that is asked for each pair.
pub struct Experiment<'a> {
    gpu: &'a GatheredGpu,
    windows: &'a BTreeMap<u64, Window>,
    range: (BootNs, BootNs),
    on: BTreeMap<User, Vec<On>>,
    /// GPU-seconds per second of each user while on.
    rates: BTreeMap<User, f64>,
    saturation_ratio: f64,
    /// Pairs that are judged: of so many, one in twenty would seem to show something.
    pairs: usize,
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

enum Unjudged {
    Short,
    /// Too few samples had their process queried: what each user had is smoothed over many windows.
    Unqueried,
    /// Others came or went, too.
    With,
    VictimAway,
}

/// Spans of one user's samples. `samples`: all ticks of the device in order, with whom they name.
fn clusters(gpu: &GatheredGpu, user: User) -> Vec<On> {
    let places: Vec<usize> =
        gpu.samples.iter().enumerate().filter(|(_, (_, named))| *named == Some(user)).map(|(n, _)| n).collect();
    let mut gaps: Vec<usize> = places.windows(2).map(|pair| pair[1] - pair[0]).collect();
    gaps.sort_unstable();
    let median = gaps.get(gaps.len() / 2).copied().unwrap_or(1);
    let longest = (GAP_MEDIANS * median).max(GAP_TICKS);
    let at = |n: usize| gpu.samples.get(n).map_or(BootNs(0), |(at, _)| *at);
    let mut on: Vec<(usize, usize, usize)> = Vec::new();
    for place in places {
        let same = |last: usize| {
            let (from, to) = (at(last), at(place));
            let dead = to.saturating_since(from) >= DEAD_NS && dead_within(gpu, user, from, to) >= DEAD_NS;
            place - last <= longest && !dead
        };
        match on.last_mut() {
            Some((_, last, samples)) if same(*last) => (*last, *samples) = (place, *samples + 1),
            _ => on.push((place, place, 1)),
        }
    }
    let span = |(first, last, samples): (usize, usize, usize)| {
        let ns = at(last).saturating_since(at(first));
        let gap_ns = ns as f64 / samples.saturating_sub(1).max(1) as f64;
        On { from: at(first), to: at(last), guard_ns: ((GUARD_GAPS * gap_ns) as u64).clamp(GUARD_NS, SIDE_NS) }
    };
    on.into_iter().map(span).collect()
}

/// The longest time within the span in which no process of the user was known to live.
fn dead_within(gpu: &GatheredGpu, user: User, from: BootNs, to: BootNs) -> u64 {
    let Some(lives) = gpu.lives.get(&user) else { return 0 };
    let mut alive: Vec<(BootNs, BootNs)> =
        lives.iter().map(|life| (life.since, life.until.unwrap_or(to))).filter(|(a, b)| *a <= to && *b >= from).collect();
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
        let on: BTreeMap<User, Vec<On>> = users.into_iter().map(|user| (user, clusters(gpu, user))).collect();
        let mut experiment = Self { gpu, windows, range, on, rates: BTreeMap::new(), saturation_ratio, pairs: pairs.max(1) };
        experiment.rates = experiment.on.keys().map(|user| (*user, experiment.rate_while_on(*user))).collect();
        experiment
    }

    fn rate_while_on(&self, user: User) -> f64 {
        let spans = self.on.get(&user).into_iter().flatten();
        let (ns, seconds) = spans.fold((0.0, 0.0), |(ns, seconds), on| {
            let side = ChangeSide { from: on.from.0 / TOGETHER_NS, to: on.to.0 / TOGETHER_NS + 1 };
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

    /// Variance of the mean of `n` windows times `n`, from how windows scatter about the mean of their side and how much neighbours
    /// are alike; of all sides together.
    fn long_run_variance(&self, user: User, sides: &[ChangeSide]) -> f64 {
        let (mut products, mut freedom) = ([0.0; LAGS + 1], 0.0);
        for side in sides {
            let of = |n: u64| {
                let window = self.windows.get(&n).filter(|window| window.observed_ns > 0)?;
                Some(window.users.get(&user).map_or(0.0, |part| part.ns / window.observed_ns as f64))
            };
            let rates: Vec<f64> = (side.from..side.to).filter_map(of).collect();
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
        // Neighbours that differ on purpose are no better known.
        sum.max(products[0]) / freedom
    }

    /// The sides of the change at `change`, where the aggressor's off span and on span meet.
    fn sides(
        &self,
        victim: User,
        aggressor: User,
        off: (BootNs, BootNs),
        on: On,
        comes: bool,
    ) -> Result<(ChangeSide, ChangeSide), Unjudged> {
        let guard = on.guard_ns;
        // Next to the aggressor's other change, or to the end of what was seen.
        let edge = off.0 <= self.range.0 && comes || off.1 >= self.range.1 && !comes;
        let before = if edge { 0 } else { guard };
        // Of a long span with changes at both ends each gets a half; of a short one both get most of it.
        let half = |from: BootNs, to: BootNs| {
            let ns = to.saturating_since(from);
            (ns / 2).max(ns.min(SIDE_SHARED_NS)).min(SIDE_NS)
        };
        let (mut off_from, mut off_to, mut on_from, mut on_to);
        if comes {
            (off_from, off_to) = (off.1.minus(guard + half(off.0, off.1)).max(off.0.plus(before)), off.1.minus(guard));
            (on_from, on_to) = (on.from.plus(GUARD_NS), on.from.plus(GUARD_NS + half(on.from, on.to)).min(on.to.minus(GUARD_NS)));
        } else {
            (off_from, off_to) = (off.0.plus(guard), off.0.plus(guard + half(off.0, off.1)).min(off.1.minus(before)));
            (on_from, on_to) = (on.to.minus(GUARD_NS + half(on.from, on.to)).max(on.from.plus(GUARD_NS)), on.to.minus(GUARD_NS));
        }
        // Who else comes or goes cuts the sides off there.
        for (other, spans) in self.on.iter().filter(|(other, _)| **other != victim && **other != aggressor) {
            if self.rates.get(other).is_none_or(|rate| *rate < OTHER_RATE) {
                continue;
            }
            for (at, margin) in spans.iter().flat_map(|on| [(on.from, on.guard_ns), (on.to, on.guard_ns)]) {
                if at <= self.range.0.plus(margin) || at.plus(margin) >= self.range.1 {
                    continue;
                }
                let (before, after) = (at.minus(margin), at.plus(margin));
                let (first_to, second_from) = if comes { (off_to, on_from) } else { (on_to, off_from) };
                let (first_from, second_to) = if comes { (&mut off_from, &mut on_to) } else { (&mut on_from, &mut off_to) };
                if after <= *first_from || before >= *second_to {
                    continue;
                }
                if before >= second_from {
                    *second_to = before;
                } else if after <= first_to {
                    *first_from = after;
                } else {
                    return Err(Unjudged::With);
                }
            }
        }
        let side = |from: BootNs, to: BootNs| {
            let side = ChangeSide { from: from.0.div_ceil(TOGETHER_NS), to: to.0 / TOGETHER_NS };
            (side.to > side.from && (side.to - side.from) * TOGETHER_NS >= SIDE_LEAST_NS).then_some(side)
        };
        let (Some(off), Some(on)) = (side(off_from, off_to), side(on_from, on_to)) else { return Err(Unjudged::Short) };
        if !self.shows_users(off) || !self.shows_users(on) {
            return Err(Unjudged::Unqueried);
        }
        let lives = |side: ChangeSide| self.lives_throughout(victim, side);
        if lives(off) && lives(on) { Ok((off, on)) } else { Err(Unjudged::VictimAway) }
    }

    fn shows_users(&self, side: ChangeSide) -> bool {
        let shows = |window: &Window| window.shows_users();
        let (n, all) = self.windows.range(side.from..side.to).fold((0, 0), |(n, all), (_, w)| (n + u64::from(shows(w)), all + 1));
        n as f64 >= QUERIED_WINDOWS * all as f64
    }

    /// No part of the side is known to be without a process of the user.
    fn lives_throughout(&self, user: User, side: ChangeSide) -> bool {
        let (from, to) = (BootNs(side.from.saturating_mul(TOGETHER_NS)), BootNs(side.to.saturating_mul(TOGETHER_NS)));
        self.gpu.may_live(user, from, to) && dead_within(self.gpu, user, from, to) < DEAD_NS
    }

    pub fn judge(&self, victim: User, aggressor: User) -> Judged {
        let spans: Vec<On> = self.on.get(&aggressor).into_iter().flatten().copied().collect();
        let (mut sides, mut unjudged) = (Vec::new(), Vec::new());
        for (n, on) in spans.iter().enumerate() {
            if on.to.saturating_since(on.from) < ON_NS {
                continue;
            }
            let before = n.checked_sub(1).and_then(|n| spans.get(n)).map_or(self.range.0, |before| before.to);
            let after = spans.get(n + 1).map_or(self.range.1, |after| after.from);
            for (off, comes) in [((before, on.from), true), ((on.to, after), false)] {
                // On from the first to the last moment that was seen is no change.
                if off.1.saturating_since(off.0) < on.guard_ns + SIDE_LEAST_NS {
                    if n > 0 && comes || n + 1 < spans.len() && !comes {
                        unjudged.push(Unjudged::Short);
                    }
                    continue;
                }
                match self.sides(victim, aggressor, off, *on, comes) {
                    Ok(found) => sides.push(found),
                    Err(why) => unjudged.push(why),
                }
            }
        }
        if sides.is_empty() {
            return Judged { why_not: no_change(&unjudged), ..Judged::default() };
        }
        self.verdict(victim, &sides)
    }

    fn verdict(&self, victim: User, sides: &[(ChangeSide, ChangeSide)]) -> Judged {
        let off: Vec<ChangeSide> = sides.iter().map(|(off, _)| *off).collect();
        let on: Vec<ChangeSide> = sides.iter().map(|(_, on)| *on).collect();
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
            // Changes that differ by more than their own errors allow: then only their scatter tells the error.
            if scatter > mean(|c| c.variance) * (1.0 + SCATTER * (2.0 / (k - 1.0)).sqrt()) {
                stderr = stderr.max((scatter / k).sqrt() * student(changes.len() - 1) / QUANTILE);
            }
        }
        let interval = [drop - QUANTILE * stderr, drop + QUANTILE * stderr];
        // A victim that was not there beside the other did not wait for it.
        let active = |c: &&Change| c.on.active >= ACTIVE_RATIO;
        let saturated = |c: &&Change| c.on.busy >= self.saturation_ratio - FLOOR;
        let fit = || changes.iter().filter(active).filter(saturated);
        let showing = fit().filter(|c| c.shows(QUANTILE)).count();
        let each = showing >= 2 && showing as f64 >= AGREEING * k;
        // Small drops are seen in many changes together, if none of them denies it.
        let falling = fit().filter(|c| c.drop() > 0.0).count();
        let denied = changes.iter().any(|c| c.drop() + QUANTILE * c.variance.sqrt() < drop / 2.0);
        let together = falling >= TOGETHER && falling as f64 >= AGREEING * k && !denied;
        let of_all = drop - chance_quantile(self.pairs) * stderr > 0.0;
        let confirmed = (each || together) && interval[0] > 0.0 && of_all;
        let (n_active, n_saturated) = (changes.iter().filter(active).count(), changes.iter().filter(saturated).count());
        let busy = 100.0 * mean(|c| c.on.busy);
        let why_not = if confirmed {
            String::new()
        } else if n_active == 0 {
            "the victim was hardly active while the other was on: it was not there to be kept waiting".into()
        } else if n_saturated == 0 {
            format!("the GPU was not saturated while the other was on ({busy:.0} % busy)")
        } else if interval[0] <= 0.0 {
            "no drop that sampling error could not explain".into()
        } else if changes.len() < 2 {
            "one change only: it may be a coincidence".into()
        } else if showing < 2 {
            format!("of {} changes {showing} shows the drop by itself", changes.len())
        } else {
            format!("of {} changes only {showing} show the drop", changes.len())
        };
        Judged {
            confirmed,
            rate_before: Some(before),
            rate_after: Some(after),
            transitions: changes.len() as u32,
            interval: Some(interval),
            why_not,
        }
    }
}

fn no_change(unjudged: &[Unjudged]) -> String {
    let with = unjudged.iter().any(|why| matches!(why, Unjudged::With));
    let unqueried = unjudged.iter().any(|why| matches!(why, Unjudged::Unqueried));
    let away = unjudged.iter().any(|why| matches!(why, Unjudged::VictimAway));
    let why = if unjudged.is_empty() {
        "the other neither came nor went while the victim was there: nothing to compare with"
    } else if unqueried {
        "driver calls were slow: too few samples had their process queried; raise gpu_wait_percent and gpu_budget_percent for a session"
    } else if away {
        "the victim's own processes began or ended as the other came or went"
    } else if with {
        "others came or went at the same time: whose effect it is cannot be told"
    } else {
        "the other's pauses were too short to compare"
    };
    why.into()
}

/// Two-sided 95 % quantile of Student's t.
fn student(freedom: usize) -> f64 {
    const TABLE: [f64; 10] = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23];
    freedom.checked_sub(1).and_then(|n| TABLE.get(n)).copied().unwrap_or(2.23)
}

/// The normal quantile that one of so many pairs exceeds by chance in one of forty sessions.
fn chance_quantile(pairs: usize) -> f64 {
    // Mills' ratio, turned round twice: within 0.02 from 1.96 up.
    let tail = 0.025 / pairs as f64;
    let mut z = (-2.0 * tail.ln()).sqrt();
    for _ in 0..20 {
        z = (-2.0 * (tail * z * (2.0 * std::f64::consts::PI).sqrt() / (1.0 - 1.0 / (z * z + 2.0))).ln()).max(1.0).sqrt();
    }
    z.max(QUANTILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        for (pairs, expect) in [(1, 1.96), (10, 2.81), (1_000, 4.06)] {
            assert!((chance_quantile(pairs) - expect).abs() < 0.03, "{pairs} {}", chance_quantile(pairs));
        }
    }
}
