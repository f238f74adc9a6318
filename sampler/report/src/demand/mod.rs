//! Evidence of demand: a user had work in flight and waited for it longer while another user of the GPU was on.
//!
//! ```text
//!  waited W, calls C (both exact), own GPU time G (sampled), by windows of one second
//!  on      spans of samples that named the other user; a gap separates two only if it is too long for chance
//!  W = C (d + sum of e on)   over all other users at once, so that each answers for its own time only
//!          d: what a call waits when no other is on; e: what it waits longer while the other is on
//!  G = C (g + sum of h on)   h: how much longer the own work of a call is meanwhile
//!  effect  (e - h, if the own work grew) times calls per second: seconds of waiting per second
//! ```
//! Why this is not fooled:
//! - A user that works less while the other is on (a pipeline, a user that yields) makes fewer calls that are as long: `e` is 0.
//! - A user that polls makes no calls. One that submits more work per call waits longer, and so does its own work grow.
//! - A call waits for each other user in turn, so that the parts of several add up, which those of GPU shares do not.
//! - The share of a window comes from six samples, and a sample of one user is missing from the other. So shares decide only when a user
//!   is on, over spans.
//! - Others that start and stop together cannot be separated: their equations have no solution, or a wide interval. What they cause
//!   together is divided by GPU time ([`quietest`]).
//!
//! Errors follow from the scatter of the windows, with their correlation over neighbouring windows, and from what a call takes besides GPU
//! time. Intervals also from the spans in which the same users are on: what a user causes depends on who else is on.

mod quietest;
mod regression;

use super::model::DemandBasis;
use quietest::{Estimate, Quietest};
use regression::{Regression, is_solvable, regress, rows};
use statrs::distribution::{ContinuousCDF as _, Normal};

/// Samples of a GPU a second.
const SAMPLES: f64 = 6.0;
/// A gap separates two spans of a user if chance makes such a gap once in ten thousand.
const GAP_CHANCE: f64 = 1e-4;
/// Rounds in which the spans of a user are joined; each makes its share smaller, and the gaps that chance makes longer.
const ROUNDS: usize = 8;
/// Windows with the other user and without it that a comparison needs.
const LEAST_WINDOWS: usize = 6;
/// Windows that the user must be on, or off, for a change to count.
const LEAST_RUN: usize = 3;
/// A third user starts or stops once by chance at the same time; not each time.
const LEAST_CHANGES: usize = 2;
/// Calls without the other, in all.
const LEAST_CALLS: f64 = 30.0;
/// Own work has grown if it did by more than this many of its errors.
const OWN_ERRORS: f64 = 2.0;
/// Standard error of the waiting beyond the scatter of the windows, as a part of it: what a call takes besides GPU time, such as waking the
/// thread, is another while the other user loads the machine.
const OVERHEAD_ERROR: f64 = 0.01;
/// The part of a longer wait that is not the user's own work has to be at least this.
const NOT_OWN: f64 = 0.5;
/// Waiting per second from which it matters.
pub const LEAST_EFFECT: f64 = 0.02;
/// Waiting per second beyond the own GPU time from which a user that keeps the other waiting is said to wait for it.
const LEAST_MUTUAL: f64 = 0.03;
/// Two users are on together if one is on for a larger part of the other's time than of the remaining time, by this.
const TOGETHER: f64 = 0.1;
/// Other users in one regression.
const MOST_OTHERS: usize = 12;
pub const LEVEL: f64 = 0.95;

const TOO_SHORT: &str = "the contender was on, or off, for too short a time while the waiting was measured";

/// One window of the victim; the numbers are seconds per second.
#[derive(Clone, Debug, Default)]
pub struct DemandWindow {
    pub number: u64,
    pub waited: f64,
    pub calls: f64,
    pub own: f64,
    /// By other user, in one order for all windows.
    pub others: Vec<f64>,
    /// By other user, samples that named it. Time without a PID is divided among those that are present, also where no sample named them.
    pub named: Vec<u32>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demand {
    pub confirmed: bool,
    pub basis: DemandBasis,
    /// Seconds of waiting per second beyond the own work, while the other was on.
    pub effect: Option<f64>,
    pub interval: Option<[f64; 2]>,
    /// What the waiting for the other is at most, by the time that it was on the GPU and that the victim waited.
    pub most: Option<f64>,
    /// Windows in which the other was on, in all.
    pub windows_on: usize,
    /// Windows that were compared: those next to a change are not.
    pub windows_with: usize,
    pub windows_without: usize,
    pub changes: usize,
    /// Why it is not confirmed; empty if it is.
    pub why_not: String,
}

/// In which windows a user is on: between its first and its last sample of each span.
fn on_spans(windows: &[DemandWindow], user: usize) -> Vec<bool> {
    let mut on: Vec<bool> = windows.iter().map(|window| window.named[user] > 0).collect();
    let named: Vec<usize> = (0..windows.len()).filter(|n| on[*n]).collect();
    let samples: f64 = windows.iter().map(|window| f64::from(window.named[user])).sum();
    for _ in 0..ROUNDS {
        let n = on.iter().filter(|on| **on).count();
        let share = (samples / (SAMPLES * n.max(1) as f64)).clamp(1e-6, 1.0 - 1e-6);
        let longest = GAP_CHANCE.ln() / (SAMPLES * (1.0 - share).ln());
        let mut joined = on.clone();
        for pair in named.windows(2) {
            let gap = windows[pair[1]].number - windows[pair[0]].number - 1;
            if gap as f64 <= longest {
                joined[pair[0]..pair[1]].fill(true);
            }
        }
        if joined == on {
            break;
        }
        on = joined;
    }
    on
}

/// Windows like both of their neighbours: a change is somewhere in the windows next to it.
fn not_next_to_a_change<T: PartialEq>(windows: &[T]) -> Vec<usize> {
    let is_inside = |n: &usize| {
        let is_same = |at: usize| windows.get(at).is_none_or(|then| *then == windows[*n]);
        is_same(n.wrapping_sub(1)) && is_same(n + 1)
    };
    (0..windows.len()).filter(is_inside).collect()
}

/// Starts and stops between spans of at least [`LEAST_RUN`] windows.
fn changes(on: &[bool]) -> usize {
    let mut runs: Vec<bool> = Vec::new();
    for run in on.chunk_by(|one, next| one == next).filter(|run| run.len() >= LEAST_RUN) {
        if runs.last() != Some(&run[0]) {
            runs.push(run[0]);
        }
    }
    runs.len().saturating_sub(1)
}

/// The windows of a victim, with what is the same for each comparison of it: there may be many other users.
pub struct DemandWindows {
    windows: Vec<DemandWindow>,
    /// By other user, in which windows it is on.
    spans: Vec<Vec<bool>>,
    /// The other users with GPU time, the one with the most first.
    by_time: Vec<usize>,
    /// `None` if the victim uses several GPUs: only one runs one user at a time.
    quietest: Option<Quietest>,
}

impl DemandWindows {
    /// `windows`: in ascending order, with the time on `n_gpus` GPUs, which are all that the victim uses.
    pub fn new(windows: Vec<DemandWindow>, n_gpus: usize) -> Self {
        let n_others = windows.first().map_or(0, |window| window.others.len());
        let spans: Vec<Vec<bool>> = (0..n_others).map(|user| on_spans(&windows, user)).collect();
        let total = |user: usize| windows.iter().map(|window| window.others[user]).sum::<f64>();
        let mut totals: Vec<(usize, f64)> = (0..n_others).map(|user| (user, total(user))).collect();
        totals.retain(|(_, total)| *total > 0.0);
        totals.sort_by(|a, b| b.1.total_cmp(&a.1));
        let by_time: Vec<usize> = totals.into_iter().map(|(user, _)| user).collect();
        let quietest = (n_gpus == 1).then(|| Quietest::new(&windows, &spans, &by_time));
        Self { windows, spans, by_time, quietest }
    }

    /// Whether the victim waited more while the `other`th user was on, or than in its quietest windows. `contenders`: how many are examined.
    pub fn evaluate(&self, other: usize, contenders: usize) -> Demand {
        let compared = self.compare_changes(other, contenders);
        if compared.confirmed {
            return compared;
        }
        self.beyond_quietest(other, &compared, contenders).unwrap_or(compared)
    }

    fn beyond_quietest(&self, other: usize, compared: &Demand, contenders: usize) -> Option<Demand> {
        let booked = self.booked(other)?;
        let longer = booked.longer?;
        let is_sure = surely(longer.value, longer.error, contenders) > LEAST_EFFECT && !booked.is_own;
        let most = booked.most.value + half(booked.most.error);
        (is_sure && booked.changes.min(compared.changes) >= LEAST_CHANGES).then(|| Demand {
            confirmed: true,
            basis: DemandBasis::Quietest,
            effect: Some(longer.value),
            interval: Some([(longer.value - half(longer.error)).max(LEAST_EFFECT), most]),
            most: Some(most),
            windows_with: booked.windows,
            windows_without: booked.quiet_windows,
            changes: booked.changes,
            ..self.counted(other)
        })
    }

    /// What is known if the `other`th user is confirmed to wait for the victim: both had work in flight at the same time, and a GPU that
    /// runs one at a time makes each wait for the other.
    pub fn mutual(&self, other: usize, contenders: usize) -> Option<Demand> {
        let booked = self.booked(other)?;
        let is_sure = |estimate: Estimate| surely(estimate.value, estimate.error, contenders) > LEAST_MUTUAL;
        (is_sure(booked.beyond_own) && is_sure(booked.most)).then(|| Demand {
            confirmed: true,
            basis: DemandBasis::Mutual,
            most: Some(booked.most.value + half(booked.most.error)),
            windows_with: booked.windows,
            ..self.counted(other)
        })
    }

    fn counted(&self, other: usize) -> Demand {
        let windows_on = self.spans.get(other).map_or(0, |on| on.iter().filter(|on| **on).count());
        Demand { windows_on, ..Demand::default() }
    }

    fn compare_changes(&self, other: usize, contenders: usize) -> Demand {
        let Some(on) = self.spans.get(other) else { return Demand { why_not: TOO_SHORT.to_owned(), ..Demand::default() } };
        let counted = Demand { changes: changes(on), ..self.counted(other) };
        let inside = not_next_to_a_change(on);
        // The shares of others are in the spans.
        let window = |n: &usize| DemandWindow { others: Vec::new(), named: Vec::new(), ..self.windows[*n] };
        let windows: Vec<DemandWindow> = inside.iter().map(window).collect();
        let spans: Vec<Vec<bool>> = self.spans.iter().map(|on| inside.iter().map(|n| on[*n]).collect()).collect();
        let candidates: Vec<usize> = self.by_time.iter().copied().filter(|user| *user != other).collect();
        let while_on = |value: fn(&DemandWindow) -> f64| mean_while_on(&self.windows, on, value);
        let (calls, waited) = (while_on(|window| window.calls), while_on(|window| window.waited));
        let pair = Compared { other, candidates: &candidates, contenders, calls, waited };
        compare(&windows, &spans, &pair, &counted)
    }
}

fn normal_quantile(level: f64) -> f64 {
    Normal::standard().inverse_cdf((1.0 + level) / 2.0)
}

/// Half of the interval.
fn half(error: f64) -> f64 {
    normal_quantile(LEVEL) * error
}

/// What the effect is at least: one-sided; the more contenders are examined, each in two ways, the clearer it has to be.
fn surely(effect: f64, error: f64, contenders: usize) -> f64 {
    effect - normal_quantile(1.0 - 2.0 * (1.0 - LEVEL) / (2 * contenders.max(1)) as f64) * error
}

/// What is compared: a victim and another user.
struct Compared<'p> {
    other: usize,
    /// The users that may have to be separated from it.
    candidates: &'p [usize],
    /// How many are examined.
    contenders: usize,
    /// Of the victim while the other user is on, a second.
    calls: f64,
    waited: f64,
}

/// The mean of the windows in which a user is on, for a half in those in which it begins or ends.
fn mean_while_on(windows: &[DemandWindow], on: &[bool], value: fn(&DemandWindow) -> f64) -> f64 {
    let (mut sum, mut weights) = (0.0, 0.0);
    for (n, window) in windows.iter().enumerate().filter(|(n, _)| on[*n]) {
        let is_end = |at: usize| on.get(at).is_some_and(|on| !on);
        let ends = u8::from(is_end(n.wrapping_sub(1))) + u8::from(is_end(n + 1));
        let weight = 0.5_f64.powi(i32::from(ends));
        sum += weight * value(window);
        weights += weight;
    }
    if weights > 0.0 { sum / weights } else { 0.0 }
}

/// The interval of an effect, if half of its width is known. A confirmed wait is longer than what confirms it, and none is longer than what
/// the user waited.
fn interval(effect: f64, half: Option<f64>, confirmed: bool, waited: f64) -> Option<[f64; 2]> {
    let [least, most] = match half {
        Some(half) => [effect - half, (effect + half).min(waited)],
        None if confirmed => [LEAST_EFFECT, waited],
        None => return None,
    };
    let least = if confirmed { least.max(LEAST_EFFECT) } else { least };
    Some([least, most.max(least)])
}

fn compare(windows: &[DemandWindow], spans: &[Vec<bool>], pair: &Compared<'_>, counted: &Demand) -> Demand {
    let (other, calls) = (pair.other, pair.calls);
    let on = &spans[other];
    let with = on.iter().filter(|on| **on).count();
    let without = on.len() - with;
    let counted = Demand { windows_with: with, windows_without: without, ..counted.clone() };
    let not = |why_not: &str| Demand { why_not: why_not.to_owned(), ..counted.clone() };
    if with < LEAST_WINDOWS || without < LEAST_WINDOWS {
        return not(TOO_SHORT);
    }
    let sum = |chosen: bool, value: fn(&DemandWindow) -> f64| {
        windows.iter().zip(on).filter(|(_, on)| **on == chosen).map(|(window, _)| value(window)).sum::<f64>()
    };
    if sum(true, |window| window.waited) < LEAST_EFFECT * with as f64 {
        return not("the user did not wait in blocking calls while the contender was on");
    }
    if sum(false, |window| window.calls) < LEAST_CALLS {
        return not("the user made too few blocking calls while the contender was off, so nothing can be compared");
    }
    let Some(users) = regressors(windows, spans, other, pair.candidates) else {
        return not("another user started and stopped at the same times, so the effect cannot be attributed");
    };
    let x = rows(windows, spans, &users);
    let numbers: Vec<u64> = windows.iter().map(|window| window.number).collect();
    let fit = |value: fn(&DemandWindow) -> f64| regress(&numbers, &windows.iter().map(value).collect::<Vec<f64>>(), &x);
    let (Some(waits), Some(works)) = (fit(|window| window.waited), fit(|window| window.own)) else {
        return not("another user started and stopped at the same times, so the effect cannot be attributed");
    };
    let (longer, own) = ((waits.coefficients[1] * calls).min(pair.waited), works.coefficients[1] * calls);
    let overhead_error = OVERHEAD_ERROR * pair.waited;
    let (error, own_error) = ((waits.errors[1] * calls).hypot(overhead_error), works.errors[1] * calls);
    // Own work that seems to have grown by the chance of its samples is not subtracted: waiting is measured, own work is sampled.
    let has_grown = own > OWN_ERRORS * own_error;
    let (own, stderr) = if has_grown { (own, error.hypot(own_error)) } else { (0.0, error) };
    let effect = longer - own;
    let surely = surely(effect, stderr, pair.contenders);
    let why_not = if counted.changes < LEAST_CHANGES {
        "the contender started or stopped only once, which may be a coincidence"
    } else if surely > LEAST_EFFECT && effect < NOT_OWN * longer {
        "the calls of the user were longer while the contender was on, and so was its own work"
    } else if surely <= LEAST_EFFECT {
        "the user waited no more while the contender was on, beyond the error"
    } else {
        ""
    };
    let confirmed = why_not.is_empty();
    let half_of = |fit: &Regression| fit.halves[1].map(|half| half * calls);
    let spread = half_of(&waits).and_then(|half| Some(if has_grown { half.hypot(half_of(&works)?) } else { half }));
    let spread = spread.map(|spread| spread.max(half(stderr)).hypot(half(overhead_error)));
    let interval = interval(effect, spread, confirmed, pair.waited);
    Demand { confirmed, effect: Some(effect), interval, why_not: why_not.into(), ..counted }
}

/// The users in the regression: this one, and those candidates that are neither always on nor always off while the victim
/// makes calls. `None` if one of them is on when this one is, and cannot be separated. One that is on when this one is off can be left out:
/// its effect only makes the other one seem smaller. Beyond [`MOST_OTHERS`] none is separated.
fn regressors(windows: &[DemandWindow], spans: &[Vec<bool>], other: usize, candidates: &[usize]) -> Option<Vec<usize>> {
    let mut users = vec![other];
    if !is_solvable(&rows(windows, spans, &users)) {
        return None;
    }
    let calls = |chosen: &dyn Fn(usize) -> bool| {
        windows.iter().enumerate().filter(|(n, _)| chosen(*n)).map(|(_, window)| window.calls).sum::<f64>()
    };
    let (with, without) = (calls(&|n| spans[other][n]), calls(&|n| !spans[other][n]));
    for &user in candidates.iter().filter(|user| spans[**user].iter().any(|on| *on != spans[**user][0])) {
        let all = [users.clone(), vec![user]].concat();
        if users.len() < MOST_OTHERS && is_solvable(&rows(windows, spans, &all)) {
            users = all;
            continue;
        }
        let within = calls(&|n| spans[other][n] && spans[user][n]) / with;
        let outside = calls(&|n| !spans[other][n] && spans[user][n]) / without;
        if within > outside + TOGETHER {
            return None;
        }
    }
    Some(users)
}

#[cfg(test)]
mod tests;
