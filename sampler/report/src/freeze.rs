//! The freezing experiment: an outcome of the victim while the suspect is frozen, compared with the outcome while it runs.
//!
//! ```text
//!  burst        1                   2                   3
//!  suspect      [frozen ][runs   ]  [runs   ][frozen ]  [runs   ][frozen ]     drawn by coin before the first freeze
//!  counted       .======  .======    .======  .======    .======  .======      without the first part of each (GUARD_NS)
//!  difference   frozen - runs       frozen - runs       frozen - runs          one number for each burst
//! ```
//! - A **randomisation test**: if freezing changed nothing, another result of the coins would only have exchanged the two windows of a
//!   burst, and so the sign of its difference. `p` is the share of all results of the coins (all of them up to [`EXACT_BURSTS`] bursts,
//!   [`DRAWS`] drawn ones above) with a mean gain of at least the observed one. No distribution is assumed.
//!   A gain is more GPU time, or less waiting or latency.
//! - The **interval** inverts that test: the effects that it does not reject. Inversion needs no search. With an effect `e` taken off every
//!   difference, flipping a subset of the signs gives at least the observed mean exactly if the mean of the subset is at most `e`, so the
//!   limits are quantiles of the means of subsets (Hartigan 1969).
//! - A burst counts if the outcome was measured in both windows, **by its coin** and not by what was frozen (intention to treat): a burst
//!   without its freeze has the difference that it has. Would it be left out, only bursts with one result of the coin would be, since only
//!   the window that the coin has chosen can fail to be frozen, and the test would not be exact.
//! - More than one planned burst in ten without its freeze ([`UNREALISED`]), an experiment that ended early, or a suspect that had GPU time
//!   while it was frozen ([`MOST_WHILE_FROZEN`]) confirms nothing. These conditions only take confirmations away, so that the error of the
//!   test stays below its level.
//! - Within a window, time of samples with an unqueried process is divided in the proportions of the queried samples of that window only:
//!   division over neighbouring windows, as in the rest of a report, would carry time from one window into the other.
//!
//! GPU time is measured here, the other outcomes in `outcomes`.

use std::collections::BTreeMap;

use sampler_core::experiment::{BootSpan, ExperimentFact, ExperimentSchedule, SeededRandom};
use sampler_core::fact::{GpuFact, User};
use sampler_core::units::BootNs;

use super::model::{FreezeEffect, Outcome};

/// Not counted at the start of a window, or half of a window that is shorter than twice this: work that was queued before a freeze still
/// runs, and after a thaw queued work is made up for.
pub const GUARD_NS: u64 = 500_000_000;
/// The end of a freeze may be this much before the end of its window.
const EARLY_NS: u64 = 100_000_000;
/// The fraction of the counted part of a window that must have been observed.
pub const OBSERVED: f64 = 0.5;
/// Up to this number of bursts all results of the coins are counted.
const EXACT_BURSTS: usize = 16;
/// Drawn results of the coins above it; the error of a p-value of 0.01 is 0.0007.
const DRAWS: usize = 20_000;
/// The fraction of the planned bursts that may be without their freeze.
const UNREALISED: f64 = 0.1;
/// The p-value below which an effect is confirmed, divided by the number of [tests](Confirmation::tests).
const CONFIRMING_P: f64 = 0.01;
/// The least effect on GPU time that is confirmed, in GPU-seconds per second: utilization is rounded to a percent.
const LEAST_EFFECT: f64 = 0.02;
/// The least effect on waiting and latency that is confirmed, as a fraction of the mean while the suspect runs.
const LEAST_REDUCTION: f64 = 0.02;
/// A suspect that is frozen has at most this part of the GPU time that it has while it runs; the rest is work that was queued.
const MOST_WHILE_FROZEN: f64 = 0.5;
/// A sample covers a sixth of a second, of which a shorter part of a window says too little.
const LEAST_SAMPLED_NS: u64 = 500_000_000;
/// Two-sided confidence level of the interval.
const LEVEL: f64 = 0.95;
/// Experiments of one session; a file must not determine how much is computed.
const MAX_EXPERIMENTS: usize = 100;
/// Two numbers that differ by less are equal: sums in another order differ by rounding.
const ROUNDING: f64 = 1e-12;

/// An experiment of a session.
#[derive(Debug, Default)]
pub struct GatheredExperiment {
    pub schedule: ExperimentSchedule,
    /// When the suspect was frozen, by burst.
    pub frozen: BTreeMap<u32, BootSpan>,
}

/// What a confirmation depends on apart from the differences.
#[derive(Clone, Copy, Debug)]
pub struct Confirmation<'a> {
    /// Any one of these confirms: the outcomes that are tested (GPU time once for each GPU) in all experiments of the pair.
    pub tests: usize,
    /// End of the session, or of the range of the report.
    pub end: BootNs,
    /// Why nothing is, if so: from [`GatheredExperiment::still_ran`].
    pub still_ran: Option<&'a str>,
}

/// The user of the time of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleUser {
    Named(User),
    /// The process was not queried, or the driver reported none.
    Unknown,
}

/// Observed time of a GPU.
#[derive(Clone, Copy, Debug)]
pub struct ObservedTime {
    pub span: BootSpan,
    pub busy_ratio: f64,
    pub user: SampleUser,
}

/// Adds a fact to the experiments of a session. Reading a fact twice has no effect.
pub fn gather(experiments: &mut Vec<GatheredExperiment>, fact: &ExperimentFact) {
    match fact {
        ExperimentFact::Schedule(schedule) => {
            // A file may have been written by any program.
            let is_known = experiments.iter().any(|known| known.schedule.start == schedule.start);
            if schedule.problem().is_none() && !is_known && experiments.len() < MAX_EXPERIMENTS {
                experiments.push(GatheredExperiment { schedule: schedule.clone(), frozen: BTreeMap::new() });
            }
        }
        ExperimentFact::Frozen { experiment, burst, from, to } => {
            let known = experiments.iter_mut().find(|known| known.schedule.start == *experiment);
            if let Some(known) = known.filter(|known| *burst < known.schedule.len()) {
                known.frozen.insert(*burst, BootSpan { from: *from, to: *to });
            }
        }
    }
}

/// The time that a fact about a GPU observes; `None` if it observes none.
pub fn observed_time(at: BootNs, fact: &GpuFact) -> Option<ObservedTime> {
    let (ns, busy_ratio, user) = match fact {
        GpuFact::Utilization(sample) => {
            let named = sampler_core::aggregate::named(&sample.processes);
            let user = named.map_or(SampleUser::Unknown, SampleUser::Named);
            (sample.ns, f64::from(sample.busy_percent) / 100.0, user)
        }
        GpuFact::Unqueried(sampler_core::device::Engine::Compute, sample) => {
            (sample.ns, f64::from(sample.busy_percent) / 100.0, SampleUser::Unknown)
        }
        GpuFact::Idle { ns } => (*ns, 0.0, SampleUser::Unknown),
        GpuFact::Measured { ns, busy_ratio } => (*ns, *busy_ratio, SampleUser::Unknown),
        _ => return None,
    };
    Some(ObservedTime { span: BootSpan { from: at.minus(ns), to: at }, busy_ratio, user })
}

/// The counted part of a window.
fn counted(window: BootSpan) -> BootSpan {
    let guard_ns = GUARD_NS.min(window.ns() / 2);
    BootSpan { from: window.from.plus(guard_ns), to: window.to }
}

pub fn overlap_ns(one: BootSpan, other: BootSpan) -> u64 {
    one.to.min(other.to).saturating_since(one.from.max(other.from))
}

/// GPU-seconds per second of the victim in a span; `None` if too little of it was observed, or no sample shows the users.
pub fn gpu_rate(times: &[ObservedTime], is_victim: &dyn Fn(User) -> bool, span: BootSpan) -> Option<f64> {
    let first = times.partition_point(|time| time.span.to <= span.from);
    let (mut observed, mut busy, mut named, mut victim) = (0.0, 0.0, 0.0, 0.0);
    for time in times.iter().skip(first).take_while(|time| time.span.from < span.to) {
        let ns = overlap_ns(time.span, span) as f64;
        observed += ns;
        busy += ns * time.busy_ratio;
        if let SampleUser::Named(user) = time.user {
            named += ns * time.busy_ratio;
            victim += if is_victim(user) { ns * time.busy_ratio } else { 0.0 };
        }
    }
    if observed < OBSERVED * span.ns() as f64 || observed <= 0.0 {
        return None;
    }
    if busy <= 0.0 {
        return Some(0.0);
    }
    (named > 0.0).then(|| busy / observed * victim / named)
}

/// An outcome of the victim in one burst.
#[derive(Clone, Copy, Debug, PartialEq)]
struct BurstMeans {
    frozen: f64,
    running: f64,
}

impl GatheredExperiment {
    /// Whether the suspect was frozen as planned in this burst.
    fn is_as_planned(&self, burst: u32, frozen: BootSpan, running: BootSpan) -> bool {
        let Some(real) = self.frozen.get(&burst) else { return false };
        let wanted = counted(frozen);
        real.from <= wanted.from && real.to >= wanted.to.minus(EARLY_NS) && overlap_ns(*real, counted(running)) == 0
    }

    /// The outcome in the windows of every burst in which it was measured, by the coin of the burst.
    fn means(&self, measure: &dyn Fn(BootSpan) -> Option<f64>) -> Vec<BurstMeans> {
        let burst = |burst| {
            let (frozen, running) = (self.schedule.frozen_window(burst)?, self.schedule.running_window(burst)?);
            Some(BurstMeans { frozen: measure(counted(frozen))?, running: measure(counted(running))? })
        };
        (0..self.schedule.len()).filter_map(burst).collect()
    }

    /// Why no outcome of this experiment is confirmed; `None` if one may be.
    fn problem(&self, end: BootNs) -> Option<String> {
        let planned = self.schedule.len();
        // Who ends an experiment early may have seen its results.
        if end < self.schedule.end().minus(self.schedule.window_ns / 2) {
            return Some(format!("the experiment ended before the last of its {planned} bursts"));
        }
        let is_realised = |burst: &u32| {
            let windows = self.schedule.frozen_window(*burst).zip(self.schedule.running_window(*burst));
            windows.is_some_and(|(frozen, running)| self.is_as_planned(*burst, frozen, running))
        };
        let realised = (0..planned).filter(is_realised).count();
        let is_short = (f64::from(planned) - realised as f64) > UNREALISED * f64::from(planned) + ROUNDING;
        is_short.then(|| format!("the suspect was frozen as planned in {realised} of {planned} bursts only"))
    }

    /// Says so if the suspect used the GPUs while it was frozen: work of processes outside of its cgroup, or no freeze, whatever was
    /// reported. `rate`: its GPU time in a span.
    pub fn still_ran(&self, rate: &dyn Fn(BootSpan) -> Option<f64>) -> Option<String> {
        let is_short = self.schedule.frozen_window(0).is_none_or(|window| counted(window).ns() < LEAST_SAMPLED_NS);
        let all = if is_short { Vec::new() } else { self.means(rate) };
        let mean = |of: fn(&BurstMeans) -> f64| all.iter().map(of).sum::<f64>() / all.len().max(1) as f64;
        let (frozen, running) = (mean(|burst| burst.frozen), mean(|burst| burst.running));
        (frozen > LEAST_EFFECT && frozen > MOST_WHILE_FROZEN * running).then(|| {
            format!(
                "the suspect had {frozen:.2} GPU-seconds per second while it was frozen, and {running:.2} while it ran: its work was \
                 queued for long, or is not in the frozen cgroup, such as with an MPS server"
            )
        })
    }

    /// The effect on one outcome. `measure`: the outcome in a span; `None` if the span has too little data.
    pub fn evaluate(
        &self,
        outcome: Outcome,
        measure: &dyn Fn(BootSpan) -> Option<f64>,
        confirmation: Confirmation<'_>,
    ) -> FreezeEffect {
        let all = self.means(measure);
        if all.is_empty() || self.frozen.is_empty() {
            return FreezeEffect::not_confirmed(outcome, self.without_means(outcome));
        }
        let mean = |of: fn(&BurstMeans) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
        let (mean_frozen, mean_running) = (mean(|burst| burst.frozen), mean(|burst| burst.running));
        let sign = if outcome.is_gain() { 1.0 } else { -1.0 };
        let gains: Vec<f64> = all.iter().map(|burst| sign * (burst.frozen - burst.running)).collect();
        let test = RandomisationTest::new(&gains, self.schedule.seed);
        let least = if outcome.is_gain() { LEAST_EFFECT } else { LEAST_REDUCTION * mean_running };
        let still_ran = || confirmation.still_ran.map(str::to_owned);
        let why_not = if let Some(problem) = self.problem(confirmation.end).or_else(still_ran) {
            problem
        } else if sign * (mean_frozen - mean_running) > least {
            test.why_not(CONFIRMING_P / confirmation.tests.max(1) as f64)
        } else {
            no_effect(outcome)
        };
        let effect = mean(|burst| burst.frozen - burst.running);
        let interval = test.interval().map(|[low, high]| if outcome.is_gain() { [low, high] } else { [-high, -low] });
        FreezeEffect {
            mean_frozen: Some(mean_frozen),
            mean_running: Some(mean_running),
            effect: Some(effect),
            interval,
            interval_level: interval.map(|_| LEVEL),
            p_value: Some(test.p_value()),
            bursts: u32::try_from(all.len()).unwrap_or(u32::MAX),
            confirmed: why_not.is_empty(),
            ..FreezeEffect::not_confirmed(outcome, why_not)
        }
    }

    fn without_means(&self, outcome: Outcome) -> String {
        let freezes = self.frozen.len();
        let condition = match outcome {
            _ if freezes == 0 => return "the suspect was never frozen".into(),
            Outcome::GpuSeconds => "both windows were observed",
            Outcome::CallWait => "a blocking call returned in both windows",
            Outcome::TimeToFirstToken => "both windows had two readings of the engine and a first token between them",
        };
        format!("in none of {freezes} bursts with a freeze {condition}")
    }
}

fn no_effect(outcome: Outcome) -> String {
    if outcome.is_gain() {
        format!("no effect above {LEAST_EFFECT} {}", outcome.unit())
    } else {
        format!("not lower by more than {:.0} % while the suspect was frozen", LEAST_REDUCTION * 100.0)
    }
}

/// The means of subsets of the differences, one for each counted result of the coins other than the observed one.
struct RandomisationTest {
    /// Ascending.
    subset_means: Vec<f64>,
    bursts: usize,
}

impl RandomisationTest {
    fn new(differences: &[f64], seed: u64) -> Self {
        let mean_of = |is_flipped: &dyn Fn(usize) -> bool| {
            let flipped = differences.iter().enumerate().filter(|(n, _)| is_flipped(*n));
            let (sum, count) = flipped.fold((0.0, 0_u32), |(sum, count), (_, difference)| (sum + difference, count + 1));
            // The observed result itself was drawn: it is at least as large as itself for any effect.
            if count == 0 { f64::NEG_INFINITY } else { sum / f64::from(count) }
        };
        let mut subset_means: Vec<f64> = if differences.len() <= EXACT_BURSTS {
            (1_u32..1 << differences.len()).map(|subset| mean_of(&|n| subset >> n & 1 == 1)).collect()
        } else {
            // Not the stream that drew the schedule.
            let mut random = SeededRandom::new(!seed);
            let mut draw = || {
                let coins: Vec<bool> = differences.iter().map(|_| random.coin()).collect();
                mean_of(&|n| coins.get(n).copied().unwrap_or(false))
            };
            (0..DRAWS).map(|_| draw()).collect()
        };
        subset_means.sort_by(f64::total_cmp);
        Self { subset_means, bursts: differences.len() }
    }

    /// All counted results of the coins, with the observed one.
    fn results(&self) -> f64 {
        self.subset_means.len() as f64 + 1.0
    }

    /// One-sided: the share of the results with a mean difference of at least the observed one.
    fn p_value(&self) -> f64 {
        let at_least = self.subset_means.partition_point(|mean| *mean <= ROUNDING);
        (at_least as f64 + 1.0) / self.results()
    }

    /// Why the effect is not shown at this level; empty if it is.
    fn why_not(&self, level: f64) -> String {
        let p_value = self.p_value();
        if p_value < level {
            String::new()
        } else if self.least_p_value() >= level {
            format!("{} bursts cannot show an effect at p < {level:.4}: use more", self.bursts)
        } else {
            format!("p = {p_value:.4} is not below {level:.4}: chance may explain the difference")
        }
    }

    /// The p-value if every burst shows the effect.
    fn least_p_value(&self) -> f64 {
        (1.0 / self.results()).max(0.5_f64.powi(i32::try_from(self.bursts).unwrap_or(i32::MAX)))
    }

    /// The effects that a two-sided test at [`LEVEL`] does not reject; `None` if it cannot reject any.
    fn interval(&self) -> Option<[f64; 2]> {
        let rejected = (self.results() * (1.0 - LEVEL) / 2.0).floor() as usize;
        let low = self.subset_means.get(rejected.checked_sub(1)?)?;
        let high = self.subset_means.get(self.subset_means.len().checked_sub(rejected)?)?;
        (low.is_finite() && high.is_finite()).then_some([*low, *high])
    }
}

#[cfg(test)]
mod tests {
    use devkit::Random;
    use sampler_core::experiment::{ExperimentDesign, FreezeConsent};
    use sampler_core::units::ContainerKey;

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const PERIOD: u64 = 167_000_000;
    const VICTIM: User = User::Container(ContainerKey(1));
    const SUSPECT: User = User::Container(ContainerKey(2));
    const CONFIRMATION: Confirmation<'_> = Confirmation { tests: 1, end: BootNs(u64::MAX), still_ran: None };

    fn experiment(seed: u64, bursts: u32) -> GatheredExperiment {
        let design = ExperimentDesign { seed, bursts, window_ns: 3 * SECOND, pause_ns: SECOND, consent: FreezeConsent::Operator };
        let schedule = design.draw("/docker/1".into(), "/docker/2".into(), BootNs(100 * SECOND));
        let frozen = (0..bursts).map(|burst| (burst, schedule.frozen_window(burst).unwrap())).collect();
        GatheredExperiment { schedule, frozen }
    }

    /// Samples of a GPU on which the victim has these shares of the samples while the suspect runs and while it is frozen.
    fn times(experiment: &GatheredExperiment, seed: u64, running: f64, frozen: f64) -> Vec<ObservedTime> {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
        let samples = experiment.schedule.end().0.div_ceil(PERIOD) + 10;
        let sample = |n: u64| {
            let span = BootSpan { from: BootNs(n * PERIOD), to: BootNs((n + 1) * PERIOD) };
            let is_frozen = experiment.frozen.values().any(|freeze| overlap_ns(*freeze, span) > PERIOD / 2);
            let share = if is_frozen { frozen } else { running };
            let user = if random.unit() < share { VICTIM } else { SUSPECT };
            // The suspect has no samples while it is frozen: the rest of the time is idle.
            let busy_ratio = if is_frozen && user == SUSPECT { 0.0 } else { 1.0 };
            ObservedTime { span, busy_ratio, user: SampleUser::Named(user) }
        };
        (0..samples).map(sample).collect()
    }

    fn evaluate_times(experiment: &GatheredExperiment, times: &[ObservedTime]) -> FreezeEffect {
        experiment.evaluate(Outcome::GpuSeconds, &|span| gpu_rate(times, &|user| user == VICTIM, span), CONFIRMATION)
    }

    fn evaluate(seed: u64, bursts: u32, running: f64, frozen: f64) -> FreezeEffect {
        let experiment = experiment(seed, bursts);
        evaluate_times(&experiment, &times(&experiment, seed, running, frozen))
    }

    #[test]
    fn a_planted_effect_is_confirmed_and_is_in_the_interval() {
        let (mut confirmed, mut covered) = (0, 0);
        for seed in 0..200 {
            let effect = evaluate(seed, 20, 0.5, 0.9);
            assert_eq!(effect.confirmed, effect.why_not.is_empty());
            confirmed += u32::from(effect.confirmed);
            let [low, high] = effect.interval.unwrap();
            covered += u32::from((low..=high).contains(&0.4));
        }
        // Samples that straddle an edge carry a little of the other window, so that the effect is slightly smaller than the planted one.
        assert!(confirmed == 200 && covered >= 170, "{confirmed} {covered}");
    }

    #[test]
    fn no_effect_is_confirmed_in_at_most_fifteen_of_a_thousand() {
        for bursts in [8, 20] {
            let confirmed = (0..1000).filter(|seed| evaluate(*seed, bursts, 0.5, 0.5).confirmed).count();
            assert!(confirmed <= 15, "{bursts} bursts: {confirmed}");
        }
    }

    #[test]
    fn p_values_without_an_effect_are_uniform() {
        let p: Vec<f64> = (0..1000).map(|seed| evaluate(seed, 20, 0.4, 0.4).p_value.unwrap()).collect();
        for limit in [0.1, 0.25, 0.5, 0.9] {
            let below = p.iter().filter(|p| **p <= limit).count() as f64 / 1000.0;
            // Four standard errors.
            assert!((below - limit).abs() < 4.0 * (limit * (1.0 - limit) / 1000.0_f64).sqrt() + 0.002, "{limit}: {below}");
        }
    }

    #[test]
    fn a_negative_effect_is_not_confirmed() {
        let effect = evaluate(1, 20, 0.9, 0.5);
        assert!(!effect.confirmed && effect.p_value.unwrap() > 0.99 && effect.why_not.contains("no effect above"), "{effect:?}");
    }

    #[test]
    fn the_test_counts_all_results_of_the_coins() {
        let check = |differences: &[f64], p: f64, interval: Option<[f64; 2]>| {
            let test = RandomisationTest::new(differences, 1);
            assert!((test.p_value() - p).abs() < 1e-12, "{differences:?}: {}", test.p_value());
            assert_eq!(test.interval(), interval, "{differences:?}");
        };
        check(&[1.0, 2.0], 0.25, None);
        check(&[1.0, -1.0], 0.75, None);
        check(&[0.0; 6], 1.0, Some([0.0, 0.0]));
        check(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1.0 / 64.0, Some([1.0, 6.0]));
        // By hand: of the sixteen results, the observed one and the one with the sign of 1 flipped have a mean of 1.5 or more.
        check(&[-1.0, 2.0, 3.0, 4.0], 2.0 / 16.0, None);
        let many: Vec<f64> = (0..30).map(|n| f64::from(n) / 30.0 + 0.1).collect();
        let test = RandomisationTest::new(&many, 1);
        let [low, high] = test.interval().unwrap();
        assert!(test.p_value() <= 2.0 / 20_001.0 && low > 0.45 && high < 0.72, "{} {low} {high}", test.p_value());
    }

    #[test]
    fn too_few_bursts_are_named() {
        let effect = evaluate(1, 6, 0.1, 0.9);
        assert_eq!((effect.confirmed, effect.bursts), (false, 6));
        assert!(effect.why_not.contains("6 bursts cannot show an effect"), "{}", effect.why_not);
        assert!(evaluate(1, 8, 0.1, 0.9).confirmed);
    }

    #[test]
    fn every_observed_burst_counts_by_its_coin_and_more_than_a_tenth_without_a_freeze_confirm_nothing() {
        let check = |change: &dyn Fn(&mut GatheredExperiment), expect: (u32, &str)| {
            let mut experiment = experiment(4, 10);
            let times = times(&experiment, 4, 0.3, 0.9);
            change(&mut experiment);
            let effect = evaluate_times(&experiment, &times);
            assert_eq!((effect.bursts, effect.confirmed), (expect.0, expect.1.is_empty()), "{effect:?}");
            assert!(effect.why_not.contains(expect.1), "{effect:?}");
        };
        let later = |experiment: &mut GatheredExperiment, burst| experiment.frozen.get_mut(&burst).unwrap().from.0 += SECOND;
        let earlier = |experiment: &mut GatheredExperiment, burst| experiment.frozen.get_mut(&burst).unwrap().to.0 -= SECOND;
        check(&|_| {}, (10, ""));
        check(&|experiment| _ = experiment.frozen.remove(&3), (10, ""));
        check(&|experiment| later(experiment, 2), (10, ""));
        check(&|experiment| earlier(experiment, 2), (10, ""));
        let two = "frozen as planned in 8 of 10 bursts only";
        check(&|experiment| (later(experiment, 2), earlier(experiment, 5)).0, (10, two));
        check(&|experiment| experiment.frozen.clear(), (0, "the suspect was never frozen"));
        // Bursts after the end of the session were not observed.
        check(&|experiment| experiment.schedule.start = BootNs(10_000 * SECOND), (0, "both windows were observed"));
    }

    #[test]
    fn bursts_without_their_freeze_confirm_nothing_by_chance() {
        // Freezes fail more often if the coin chose the first window.
        let confirmed = (0..1000_u64).filter(|seed| {
            let mut experiment = experiment(*seed, 20);
            let times = times(&experiment, *seed, 0.5, 0.5);
            let failing: Vec<u32> =
                (0..20_u32).filter(|burst| experiment.schedule.bursts[*burst as usize].frozen_first).collect();
            failing.iter().take(2).for_each(|burst| _ = experiment.frozen.remove(burst));
            evaluate_times(&experiment, &times).confirmed
        });
        assert!(confirmed.count() <= 15);
    }

    #[test]
    fn an_experiment_that_ended_early_is_not_confirmed() {
        let experiment = experiment(4, 10);
        let times = times(&experiment, 4, 0.3, 0.9);
        let at_end = |end| {
            let confirmation = Confirmation { end, ..CONFIRMATION };
            experiment.evaluate(Outcome::GpuSeconds, &|span| gpu_rate(&times, &|user| user == VICTIM, span), confirmation)
        };
        assert!(at_end(experiment.schedule.end()).confirmed);
        let early = at_end(experiment.schedule.end().minus(2 * SECOND));
        assert!(!early.confirmed && early.why_not.contains("ended before the last of its 10 bursts"), "{early:?}");
    }

    #[test]
    fn time_without_a_user_is_divided_within_its_window() {
        let experiment = experiment(2, 8);
        let mut times = times(&experiment, 2, 0.5, 0.9);
        let whole = evaluate_times(&experiment, &times);
        for time in times.iter_mut().step_by(3) {
            time.user = SampleUser::Unknown;
        }
        let part = evaluate_times(&experiment, &times);
        assert_eq!(part.bursts, 8);
        let (whole, part) = (whole.effect.unwrap(), part.effect.unwrap());
        assert!((whole - part).abs() < 0.2, "{whole} {part}");
    }

    #[test]
    fn facts_that_are_read_twice_count_once() {
        let known = experiment(1, 8);
        let start = known.schedule.start;
        let frozen = |burst, to| ExperimentFact::Frozen { experiment: start, burst, from: start, to: BootNs(to) };
        let mut all = Vec::new();
        for _ in 0..2 {
            gather(&mut all, &ExperimentFact::Schedule(known.schedule.clone()));
            gather(&mut all, &frozen(1, 5));
            gather(&mut all, &frozen(8, 5));
            gather(&mut all, &ExperimentFact::Frozen { experiment: BootNs(1), burst: 1, from: start, to: start });
        }
        gather(&mut all, &ExperimentFact::Schedule(ExperimentSchedule::default()));
        assert_eq!((all.len(), all[0].frozen.len()), (1, 1));
    }
}
