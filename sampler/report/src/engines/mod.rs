//! Serving engines: latencies by interval, from the cumulative values of their own metrics, compared by which other users were active.
//!
//! ```text
//!  readings    |----|----|----|----|----|----|----|----|     an interval is between two readings; its mean is Δsum / Δcount
//!  other user  ..........AAAAAAAAAAAA......AAAAAAAAA...      windows of the GPU in which a sample names it
//!  interval     off  off  on   on   on  off  on   on
//! ```
//! An interval is *without* a user if none of its windows, also of those that it has only a part of, names the user; *with* it if half of
//! them or more do; otherwise it counts on neither side, as does an interval with a window that was not observed. Each interval is one
//! observation, whatever the number of its requests. Neighbouring intervals are similar, because requests queue: the error is increased by
//! their correlation.
//!
//! A latency is only called longer if both sides have [`LEAST_INTERVALS`], the user was switched at least twice, and the difference
//! exceeds what one in twenty sessions shows by chance over all comparisons of all of its containers. That the other user is the reason is not shown: load
//! that follows the same schedule looks the same.

use std::collections::{BTreeMap, BTreeSet};

use sampler_core::aggregate::{COACTIVITY_WINDOW_NS, Window};
use sampler_core::fact::User;
use sampler_core::observation::{EngineFact, LatencySum};
use sampler_core::units::BootNs;
use statrs::distribution::{ContinuousCDF as _, StudentsT};

use super::engine_model::{
    EnginePoint, EngineProblem, EngineReport, GaugeSummary, LatencyContrast, LatencyKind, LatencyReport, LatencySide,
};
use super::model::UserKind;
use super::onoff::LEVEL;

/// Intervals on each side below which nothing is claimed.
pub const LEAST_INTERVALS: u64 = 5;
/// Starts and stops of the other user below which a difference may be a coincidence.
const LEAST_CHANGES: u64 = 2;
/// Readings that are further apart are not one interval: the reading between them failed.
const LONGEST_NS: u64 = 120_000_000_000;
/// Maximum correlation of neighbouring intervals that is applied; beyond it the number of intervals means nothing.
const MOST_CORRELATION: f64 = 0.9;
/// A file has any numbers; larger ones are not requests, and their sums may not be finite.
const LARGEST: f64 = 1e15;
/// Engines of one container, and other users that each is compared with: those that were active most.
const MOST_ENGINES: usize = 16;
const MOST_USERS: usize = 64;
const S: f64 = 1e-9;

/// What the readings of one container are compared with.
pub struct EngineContext<'a> {
    pub user: User,
    /// The GPUs that the container used or held, with their windows.
    pub gpus: Vec<(&'a str, &'a BTreeMap<u64, Window>)>,
    /// Start of the report.
    pub start: BootNs,
    /// Kind and id of a user in the report.
    pub describe: &'a dyn Fn(User) -> (UserKind, String),
}

/// The mean of a latency between two readings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatencyInterval {
    pub from: BootNs,
    pub to: BootNs,
    pub mean: f64,
    /// Requests or tokens.
    pub count: f64,
}

/// The windows of the container's GPUs.
struct Activity<'a> {
    observed: BTreeSet<u64>,
    /// By user: windows in which it was active on any of the GPUs, and the GPU on which it was active most.
    users: BTreeMap<User, (BTreeSet<u64>, &'a str)>,
}

#[derive(Clone, Copy, PartialEq)]
enum SideOfInterval {
    Without,
    With,
}

fn latency_of(fact: &EngineFact, kind: LatencyKind) -> Option<LatencySum> {
    match kind {
        LatencyKind::TimeToFirstToken => fact.time_to_first_token,
        LatencyKind::TimePerOutputToken => fact.time_per_output_token,
        LatencyKind::QueueTime => fact.queue_time,
    }
}

/// The mean of a latency between two readings; `None` without a request, after a restart of the engine, or if values decreased.
fn between(before: &EngineFact, after: &EngineFact, kind: LatencyKind) -> Option<LatencyInterval> {
    if before.pid != after.pid || after.at.saturating_since(before.at) > LONGEST_NS || after.at <= before.at {
        return None;
    }
    let (earlier, later) = (latency_of(before, kind)?, latency_of(after, kind)?);
    let (sum, count) = (later.sum_seconds - earlier.sum_seconds, later.count - earlier.count);
    let mean = sum / count;
    let is_valid = count > 0.0 && count <= LARGEST && (0.0..=LARGEST).contains(&sum) && (0.0..=LARGEST).contains(&mean);
    is_valid.then_some(LatencyInterval { from: before.at, to: after.at, mean, count })
}

fn intervals(read: &[&EngineFact], kind: LatencyKind) -> Vec<LatencyInterval> {
    read.windows(2).filter_map(|pair| between(pair[0], pair[1], kind)).collect()
}

fn by_engine(facts: &[EngineFact]) -> BTreeMap<(&str, u16), Vec<&EngineFact>> {
    let mut by_engine: BTreeMap<(&str, u16), Vec<&EngineFact>> = BTreeMap::new();
    for fact in facts {
        by_engine.entry((&fact.engine, fact.port)).or_default().push(fact);
    }
    by_engine
}

/// The readings that succeeded.
fn successful<'a>(facts: &[&'a EngineFact]) -> Vec<&'a EngineFact> {
    facts.iter().copied().filter(|fact| fact.problem.is_none()).collect()
}

/// A latency of all engines of one container, from its readings in their order.
pub fn latency_intervals(facts: &[EngineFact], kind: LatencyKind) -> Vec<LatencyInterval> {
    let engines = by_engine(facts).into_values().take(MOST_ENGINES);
    engines.flat_map(|facts| intervals(&successful(&facts), kind)).collect()
}

/// The engines of one container, with what their latencies are compared with.
pub struct GatheredEngines<'a> {
    by_engine: BTreeMap<(&'a str, u16), Vec<&'a EngineFact>>,
    activity: Activity<'a>,
    context: EngineContext<'a>,
}

impl<'a> GatheredEngines<'a> {
    /// `facts`: the readings of the container in their order.
    pub fn new(facts: &'a [EngineFact], context: EngineContext<'a>) -> Self {
        Self { by_engine: by_engine(facts), activity: Activity::new(&context), context }
    }

    /// Every pair of a latency and another user of every engine is one comparison.
    pub fn comparisons(&self) -> usize {
        self.by_engine.len().min(MOST_ENGINES) * LatencyKind::all().count() * self.activity.users.len()
    }

    /// `comparisons`: those of the whole session.
    pub fn reports(&self, comparisons: usize) -> Vec<EngineReport> {
        let engines = self.by_engine.iter().take(MOST_ENGINES);
        engines.map(|((engine, port), facts)| report(engine, *port, facts, &self.context, &self.activity, comparisons)).collect()
    }
}

fn report(
    engine: &str,
    port: u16,
    facts: &[&EngineFact],
    context: &EngineContext<'_>,
    activity: &Activity<'_>,
    comparisons: usize,
) -> EngineReport {
    let read = successful(facts);
    let latency = |latency: LatencyKind| {
        let intervals = intervals(&read, latency);
        let count: f64 = intervals.iter().map(|interval| interval.count).sum();
        let sum: f64 = intervals.iter().map(|interval| interval.mean * interval.count).sum();
        (count > 0.0).then(|| LatencyReport {
            latency,
            mean_seconds: sum / count,
            count,
            intervals: intervals.len() as u64,
            contrasts: contrasts(&intervals, context, activity, comparisons),
        })
    };
    EngineReport {
        engine: engine.to_owned(),
        port,
        readings: facts.len() as u64,
        failed_readings: (facts.len() - read.len()) as u64,
        problems: problems(facts),
        waiting: gauge(read.iter().filter_map(|fact| fact.waiting)),
        running: gauge(read.iter().filter_map(|fact| fact.running)),
        latencies: LatencyKind::all().filter_map(latency).collect(),
        points: points(&read, context.start),
    }
}

fn is_number(value: f64) -> bool {
    (0.0..=LARGEST).contains(&value)
}

fn problems(facts: &[&EngineFact]) -> Vec<EngineProblem> {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for text in facts.iter().filter_map(|fact| fact.problem.as_deref()) {
        *counts.entry(text).or_default() += 1;
    }
    let mut all: Vec<EngineProblem> =
        counts.into_iter().map(|(text, readings)| EngineProblem { text: text.to_owned(), readings }).collect();
    all.sort_by_key(|engine| std::cmp::Reverse(engine.readings));
    all
}

fn gauge(values: impl Iterator<Item = f64>) -> Option<GaugeSummary> {
    let (mut sum, mut max, mut n) = (0.0, 0.0_f64, 0.0);
    for value in values.filter(|value| is_number(*value)) {
        (sum, max, n) = (sum + value, max.max(value), n + 1.0);
    }
    (n > 0.0).then(|| GaugeSummary { mean: sum / n, max })
}

fn points(read: &[&EngineFact], start: BootNs) -> Vec<EnginePoint> {
    let before = |n: usize| n.checked_sub(1).map(|n| read[n]);
    let point = |(n, fact): (usize, &&EngineFact)| {
        let mean = |kind| between(before(n)?, fact, kind).map(|interval| interval.mean);
        EnginePoint {
            second: (fact.at.0 as f64 - start.0 as f64) * S,
            waiting: fact.waiting.filter(|value| is_number(*value)),
            running: fact.running.filter(|value| is_number(*value)),
            time_to_first_token: mean(LatencyKind::TimeToFirstToken),
            time_per_output_token: mean(LatencyKind::TimePerOutputToken),
            queue_time: mean(LatencyKind::QueueTime),
        }
    };
    read.iter().enumerate().map(point).collect()
}

impl<'a> Activity<'a> {
    fn new(context: &EngineContext<'a>) -> Self {
        let mut unobserved: BTreeSet<u64> = BTreeSet::new();
        let mut observed: BTreeSet<u64> = BTreeSet::new();
        let mut by_gpu: BTreeMap<User, BTreeMap<&'a str, BTreeSet<u64>>> = BTreeMap::new();
        for (uuid, windows) in &context.gpus {
            for (n, window) in *windows {
                // Where samples were not queried, that none names a user does not mean that it was not active.
                let is_observed = window.observed_ns >= COACTIVITY_WINDOW_NS / 2 && window.shows_users();
                if is_observed { &mut observed } else { &mut unobserved }.insert(*n);
                for other in window.active().filter(|other| *other != context.user) {
                    by_gpu.entry(other).or_default().entry(uuid).or_default().insert(*n);
                }
            }
        }
        let mut users: Vec<(User, (BTreeSet<u64>, &'a str))> = by_gpu
            .into_iter()
            .filter_map(|(user, gpus)| {
                let most = gpus.iter().max_by_key(|(_, windows)| windows.len()).map(|(uuid, _)| *uuid)?;
                Some((user, (gpus.into_values().flatten().collect(), most)))
            })
            .collect();
        users.sort_by_key(|(_, (windows, _))| std::cmp::Reverse(windows.len()));
        users.truncate(MOST_USERS);
        Self { users: users.into_iter().collect(), observed: &observed - &unobserved }
    }

    /// `None` if the interval counts on neither side.
    fn side(&self, active: &BTreeSet<u64>, interval: &LatencyInterval) -> Option<SideOfInterval> {
        let (first, last) = (interval.from.0 / COACTIVITY_WINDOW_NS, interval.to.0.saturating_sub(1) / COACTIVITY_WINDOW_NS);
        let windows = last - first + 1;
        if self.observed.range(first..=last).count() as u64 != windows {
            return None;
        }
        match active.range(first..=last).count() as u64 {
            0 => Some(SideOfInterval::Without),
            n if 2 * n >= windows => Some(SideOfInterval::With),
            _ => None,
        }
    }
}

fn contrasts(
    intervals: &[LatencyInterval],
    context: &EngineContext<'_>,
    activity: &Activity<'_>,
    comparisons: usize,
) -> Vec<LatencyContrast> {
    let contrast = |(other, (active, uuid)): (&User, &(BTreeSet<u64>, &str))| {
        let sided: Vec<(SideOfInterval, f64)> =
            intervals.iter().filter_map(|interval| Some((activity.side(active, interval)?, interval.mean))).collect();
        // A user that was active in no interval cannot be compared.
        sided.iter().any(|(side, _)| *side == SideOfInterval::With).then(|| {
            let (kind, id) = (context.describe)(*other);
            compare(
                &sided,
                comparisons,
                LatencyContrast {
                    kind,
                    id,
                    uuid: (*uuid).to_owned(),
                    without: LatencySide::default(),
                    with: LatencySide::default(),
                    changes: 0,
                    interval: None,
                    interval_level: None,
                    is_longer: false,
                    why_not: String::new(),
                },
            )
        })
    };
    let mut all: Vec<LatencyContrast> = activity.users.iter().filter_map(contrast).collect();
    let difference = |contrast: &LatencyContrast| contrast.difference().unwrap_or(f64::NEG_INFINITY);
    all.sort_by(|a, b| b.is_longer.cmp(&a.is_longer).then(difference(b).total_cmp(&difference(a))).then(a.id.cmp(&b.id)));
    all
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Variance of a single interval; `None` with fewer than two.
fn variance(values: &[f64]) -> Option<f64> {
    let mean = mean(values)?;
    (values.len() > 1).then(|| values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64)
}

/// By how much the variance of a mean exceeds that of independent intervals: from the correlation of neighbours on the same side.
fn inflation(sided: &[(SideOfInterval, f64)], means: (f64, f64)) -> f64 {
    let residual = |(side, value): &(SideOfInterval, f64)| value - if *side == SideOfInterval::With { means.1 } else { means.0 };
    let square: f64 = sided.iter().map(|interval| residual(interval).powi(2)).sum();
    let pairs = sided.windows(2).filter(|pair| pair[0].0 == pair[1].0);
    let (products, n) = pairs.fold((0.0, 0.0), |(sum, n), pair| (sum + residual(&pair[0]) * residual(&pair[1]), n + 1.0));
    if square <= 0.0 || n == 0.0 {
        return 1.0;
    }
    let correlation = (products / n / (square / sided.len() as f64)).clamp(0.0, MOST_CORRELATION);
    (1.0 + correlation) / (1.0 - correlation)
}

fn compare(sided: &[(SideOfInterval, f64)], comparisons: usize, empty: LatencyContrast) -> LatencyContrast {
    let on = |wanted: SideOfInterval| -> Vec<f64> {
        sided.iter().filter(|(side, _)| *side == wanted).map(|(_, value)| *value).collect()
    };
    let (without, with) = (on(SideOfInterval::Without), on(SideOfInterval::With));
    let inflation = inflation(sided, (mean(&without).unwrap_or_default(), mean(&with).unwrap_or_default()));
    let squared_error = |values: &[f64]| variance(values).map(|variance| inflation * variance / values.len() as f64);
    let side = |values: &[f64]| LatencySide {
        intervals: values.len() as u64,
        mean_seconds: mean(values),
        stderr_seconds: squared_error(values).map(f64::sqrt),
    };
    let changes = sided.windows(2).filter(|pair| pair[0].0 != pair[1].0).count() as u64;
    let contrast = LatencyContrast { without: side(&without), with: side(&with), changes, ..empty };
    let enough = contrast.without.intervals >= LEAST_INTERVALS && contrast.with.intervals >= LEAST_INTERVALS;
    let errors = squared_error(&without).zip(squared_error(&with));
    let (Some(difference), Some(errors), true) = (contrast.difference(), errors, enough) else {
        let why_not = if contrast.without.intervals < LEAST_INTERVALS { "without" } else { "with" };
        return LatencyContrast { why_not: format!("fewer than {LEAST_INTERVALS} intervals {why_not} it"), ..contrast };
    };
    let freedom = welch_freedom(errors, (without.len() as f64 / inflation, with.len() as f64 / inflation));
    let half = |level: f64| student_quantile(level, freedom) * (errors.0 + errors.1).sqrt();
    let interval = Some([difference - half(LEVEL), difference + half(LEVEL)]);
    // Bonferroni: one in twenty sessions shows a difference by chance.
    let exceeds_chance = difference - half(1.0 - (1.0 - LEVEL) / comparisons.max(1) as f64) > 0.0;
    let why_not = if changes < LEAST_CHANGES {
        "only one change, which may be a coincidence"
    } else if !exceeds_chance {
        "no difference beyond the scatter of the intervals"
    } else {
        ""
    };
    LatencyContrast { interval, interval_level: Some(LEVEL), is_longer: why_not.is_empty(), why_not: why_not.into(), ..contrast }
}

/// Degrees of freedom by Welch and Satterthwaite, of the squared errors of two means and the numbers of independent values behind them.
fn welch_freedom(errors: (f64, f64), n: (f64, f64)) -> f64 {
    let least = (n.0.min(n.1) - 1.0).max(1.0);
    let part = |error: f64, n: f64| error * error / (n - 1.0).max(1.0);
    let freedom = (errors.0 + errors.1).powi(2) / (part(errors.0, n.0) + part(errors.1, n.1));
    // Without any scatter it is not a number.
    if freedom.is_finite() { freedom.max(least) } else { least }
}

/// The two-sided quantile of Student's t distribution; `freedom` is at least 1.
fn student_quantile(level: f64, freedom: f64) -> f64 {
    let student = StudentsT::new(0.0, 1.0, freedom.max(1.0)).expect("the degrees of freedom are positive");
    student.inverse_cdf((1.0 + level) / 2.0)
}

#[cfg(test)]
mod tests;
