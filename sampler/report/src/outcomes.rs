//! The outcomes of an experiment that belong to no single GPU: waiting in blocking calls, and the time to the first token.
//!
//! ```text
//!  counted part of a window      |==================|
//!  readings of wait probes    |-----|-----|-----|-----|      the first and the last count in proportion of their time inside
//!  readings of an engine      |-----|-----|-----|-----|      only intervals that are wholly inside: here the second and the third
//! ```
//! Readings of probes are a second long, so that the time of a call at an edge may count in the neighbouring window. That makes an effect
//! smaller, and no effect larger. The sums of an engine do not say when in an interval a request ended, so those across an edge are left out.

use sampler_core::experiment::BootSpan;
use sampler_core::fact::WaitFact;
use sampler_core::observation::EngineFact;
use sampler_core::units::BootNs;

use super::engine_model::LatencyKind;
use super::engines::{LatencyInterval, latency_intervals};
use super::freeze::{OBSERVED, overlap_ns};

/// A longer reading does not show in which window was waited.
const LONGEST_READING_NS: u64 = 10_000_000_000;
/// Calls, and requests, that a window needs for a mean.
const LEAST_COUNT: f64 = 1.0;
const S: f64 = 1e-9;

/// What the wait probes of the victim's processes counted.
#[derive(Debug, Default)]
pub struct VictimWaits {
    /// By their end.
    readings: Vec<WaitReading>,
}

#[derive(Clone, Copy, Debug)]
struct WaitReading {
    span: BootSpan,
    waited_s: f64,
    calls: f64,
}

impl VictimWaits {
    /// `range`: that of the report.
    pub fn new<'a>(facts: impl Iterator<Item = &'a WaitFact>, range: (BootNs, BootNs)) -> Self {
        let reading = |fact: &WaitFact| {
            let span = BootSpan { from: fact.from, to: fact.to };
            let is_counted = fact.from < fact.to && span.ns() <= LONGEST_READING_NS && fact.from >= range.0 && fact.to <= range.1;
            let waited_s = fact.some_ns.min(span.ns()) as f64 * S;
            is_counted.then_some(WaitReading { span, waited_s, calls: fact.calls as f64 })
        };
        let mut readings: Vec<WaitReading> = facts.filter_map(reading).collect();
        readings.sort_by_key(|reading| (reading.span.to, reading.span.from));
        Self { readings }
    }

    pub fn is_recorded(&self) -> bool {
        !self.readings.is_empty()
    }

    /// Seconds waited per blocking call in a span; `None` if it was probed for too little of the time, or no call returned.
    pub fn per_call(&self, span: BootSpan) -> Option<f64> {
        let first = self.readings.partition_point(|reading| reading.span.to <= span.from);
        let last_end = span.to.plus(LONGEST_READING_NS);
        let (mut probed_s, mut waited_s, mut calls) = (0.0, 0.0, 0.0);
        for reading in self.readings.iter().skip(first).take_while(|reading| reading.span.to < last_end) {
            let inside_ns = overlap_ns(reading.span, span) as f64;
            let part = inside_ns / reading.span.ns() as f64;
            probed_s += inside_ns * S;
            waited_s += reading.waited_s * part;
            calls += reading.calls * part;
        }
        let is_measured = probed_s >= OBSERVED * span.ns() as f64 * S && calls >= LEAST_COUNT;
        is_measured.then(|| waited_s / calls)
    }
}

/// The latencies of the victim's serving engines.
#[derive(Debug, Default)]
pub struct VictimLatency {
    /// By their start.
    intervals: Vec<LatencyInterval>,
    is_recorded: bool,
}

impl VictimLatency {
    /// Of the readings of several containers.
    pub fn new<'a>(containers: impl Iterator<Item = &'a [EngineFact]> + Clone) -> Self {
        let kind = LatencyKind::TimeToFirstToken;
        let is_recorded = containers.clone().flatten().any(|fact| fact.time_to_first_token.is_some());
        let mut intervals: Vec<LatencyInterval> = containers.flat_map(|facts| latency_intervals(facts, kind)).collect();
        intervals.sort_by_key(|interval| (interval.from, interval.to));
        Self { intervals, is_recorded }
    }

    pub fn is_recorded(&self) -> bool {
        self.is_recorded
    }

    /// Mean seconds of the requests in a span; `None` if no interval with a request is wholly in it.
    pub fn mean(&self, span: BootSpan) -> Option<f64> {
        let first = self.intervals.partition_point(|interval| interval.from < span.from);
        let inside = self.intervals.iter().skip(first).take_while(|interval| interval.from < span.to);
        let inside = inside.filter(|interval| interval.to <= span.to);
        let (sum, count) =
            inside.fold((0.0, 0.0), |(sum, count), interval| (sum + interval.mean * interval.count, count + interval.count));
        (count >= LEAST_COUNT).then(|| sum / count)
    }
}

#[cfg(test)]
mod tests {
    use devkit::Random;
    use sampler_core::experiment::{ExperimentDesign, FreezeConsent};
    use sampler_core::fact::{HostProcess, User};
    use sampler_core::observation::LatencySum;
    use sampler_core::units::ContainerKey;

    use super::super::freeze::{Confirmation, GatheredExperiment};
    use super::super::model::{FreezeEffect, Outcome};
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const KEY: ContainerKey = ContainerKey(1);
    const ALL: (BootNs, BootNs) = (BootNs(0), BootNs(u64::MAX));
    const CONFIRMATION: Confirmation<'_> = Confirmation { tests: 2, end: BootNs(u64::MAX), still_ran: None };

    fn experiment(seed: u64, bursts: u32) -> GatheredExperiment {
        let design = ExperimentDesign { seed, bursts, window_ns: 3 * SECOND, pause_ns: SECOND, consent: FreezeConsent::Operator };
        let schedule = design.draw("/docker/1".into(), "/docker/2".into(), BootNs(100 * SECOND + 123_456_789));
        let frozen = (0..bursts).map(|burst| (burst, schedule.frozen_window(burst).unwrap())).collect();
        GatheredExperiment { schedule, frozen }
    }

    fn wait(from: u64, to: u64, some_ns: u64, calls: u64) -> WaitFact {
        let process = HostProcess { pid: 7, start: BootNs(1) };
        let (from, to) = (BootNs(from), BootNs(to));
        WaitFact { process, user: User::Container(KEY), from, to, some_ns, total_ns: some_ns, calls, durations: Vec::new() }
    }

    /// One reading a second of a victim that calls without a pause; a call takes these seconds while the suspect runs, and while it is
    /// frozen, times a random factor.
    fn waits(experiment: &GatheredExperiment, seed: u64, running: f64, frozen: f64) -> Vec<WaitFact> {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
        let reading = |n: u64| {
            let span = BootSpan { from: BootNs(n * SECOND), to: BootNs((n + 1) * SECOND) };
            let frozen_s = experiment.frozen.values().map(|freeze| overlap_ns(*freeze, span)).sum::<u64>() as f64 * S;
            let factor = 0.5 + random.unit();
            let calls = (frozen_s / (frozen * factor) + (1.0 - frozen_s) / (running * factor)).round();
            wait(span.from.0, span.to.0, SECOND, calls as u64)
        };
        (0..experiment.schedule.end().0 / SECOND + 5).map(reading).collect()
    }

    fn call_wait(seed: u64, bursts: u32, running: f64, frozen: f64) -> FreezeEffect {
        let experiment = experiment(seed, bursts);
        let waits = VictimWaits::new(waits(&experiment, seed, running, frozen).iter(), ALL);
        experiment.evaluate(Outcome::CallWait, &|span| waits.per_call(span), CONFIRMATION)
    }

    fn reading(at: u64, sum_seconds: f64, count: f64) -> EngineFact {
        let time_to_first_token = Some(LatencySum { sum_seconds, count });
        EngineFact {
            key: KEY,
            at: BootNs(at),
            engine: "vllm".into(),
            pid: 9,
            port: 8000,
            time_to_first_token,
            ..EngineFact::default()
        }
    }

    /// One reading each `every` with ten requests since the last one.
    fn latency(seed: u64, bursts: u32, every: u64, running: f64, frozen: f64) -> FreezeEffect {
        let experiment = experiment(seed, bursts);
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
        let (mut sum, mut facts) = (0.0, Vec::new());
        for n in 0..experiment.schedule.end().0 / every + 5 {
            let span = BootSpan { from: BootNs(n * every).minus(every), to: BootNs(n * every) };
            let is_frozen = experiment.frozen.values().any(|freeze| overlap_ns(*freeze, span) > every / 2);
            sum += 10.0 * (if is_frozen { frozen } else { running }) * (0.5 + random.unit());
            facts.push(reading(n * every, sum, 10.0 * n as f64));
        }
        let latency = VictimLatency::new([facts.as_slice()].into_iter());
        experiment.evaluate(Outcome::TimeToFirstToken, &|span| latency.mean(span), CONFIRMATION)
    }

    #[test]
    fn a_planted_reduction_is_confirmed_and_has_its_sign() {
        for seed in 0..100 {
            for effect in [call_wait(seed, 20, 0.010, 0.004), latency(seed, 20, SECOND, 0.5, 0.2)] {
                let [low, high] = effect.interval.unwrap();
                let mean = effect.effect.unwrap();
                assert!(effect.confirmed && effect.bursts == 20 && effect.p_value.unwrap() < 0.005, "{effect:?}");
                assert!(low <= mean && mean <= high && high < 0.0, "{effect:?}");
                let difference = effect.mean_frozen.unwrap() - effect.mean_running.unwrap();
                assert!((difference - mean).abs() < 1e-9, "{effect:?}");
            }
        }
    }

    #[test]
    fn without_an_effect_and_with_an_increase_nothing_is_confirmed() {
        let by_chance = |confirmed: usize| assert!(confirmed <= 15, "{confirmed} of 1000");
        by_chance((0..1000).filter(|seed| call_wait(*seed, 10, 0.01, 0.01).confirmed).count());
        by_chance((0..1000).filter(|seed| latency(*seed, 10, SECOND, 0.3, 0.3).confirmed).count());
        for effect in [call_wait(1, 20, 0.004, 0.010), latency(1, 20, SECOND, 0.2, 0.5)] {
            assert!(!effect.confirmed && effect.p_value.unwrap() > 0.99 && effect.why_not.contains("not lower"), "{effect:?}");
        }
    }

    #[test]
    fn a_waiting_of_a_window_is_in_proportion_of_the_time_of_its_readings() {
        let of = |facts: &[WaitFact], from: u64, to: u64| {
            VictimWaits::new(facts.iter(), ALL).per_call(BootSpan { from: BootNs(from), to: BootNs(to) })
        };
        let two = [wait(SECOND, 2 * SECOND, SECOND / 2, 10), wait(2 * SECOND, 3 * SECOND, SECOND, 10)];
        assert_eq!(of(&two, SECOND, 2 * SECOND), Some(0.05));
        assert_eq!(of(&two, SECOND, 3 * SECOND), Some(0.075));
        assert_eq!(of(&two, SECOND + SECOND / 2, 2 * SECOND + SECOND / 2), Some(0.075));
        // Too little of the span is probed; no call returned; a reading that is too long, or empty.
        assert_eq!(of(&two, 2 * SECOND, 5 * SECOND), None);
        assert_eq!(of(&[wait(SECOND, 2 * SECOND, SECOND, 0)], SECOND, 2 * SECOND), None);
        assert_eq!(of(&[wait(0, 11 * SECOND, SECOND, 99)], SECOND, 2 * SECOND), None);
        assert_eq!(of(&[wait(SECOND, SECOND, SECOND, 99)], SECOND, 2 * SECOND), None);
        // Outside the range of the report.
        let narrow = VictimWaits::new(two.iter(), (BootNs(2 * SECOND), BootNs(3 * SECOND)));
        assert_eq!(narrow.per_call(BootSpan { from: BootNs(SECOND), to: BootNs(2 * SECOND) }), None);
    }

    #[test]
    fn only_intervals_that_are_wholly_in_a_window_count() {
        let facts = [reading(SECOND, 1.0, 10.0), reading(2 * SECOND, 3.0, 20.0), reading(3 * SECOND, 9.0, 30.0)];
        let latency = VictimLatency::new([&facts[..], &facts[..2]].into_iter());
        let of = |from: u64, to: u64| latency.mean(BootSpan { from: BootNs(from), to: BootNs(to) });
        assert_eq!(of(SECOND, 2 * SECOND), Some(0.2));
        assert_eq!(of(SECOND + 1, 3 * SECOND), Some(0.6));
        assert_eq!(of(SECOND + 1, 3 * SECOND - 1), None);
        // Three requests of ten seconds: the mean is over requests, not over intervals.
        assert_eq!(of(0, 4 * SECOND), Some(10.0 / 30.0));
        // Readings that are further apart than half of a window.
        let effect = super::tests::latency(1, 10, 5 * SECOND, 0.5, 0.2);
        assert!(effect.bursts == 0 && effect.why_not.contains("two readings"), "{effect:?}");
    }
}
