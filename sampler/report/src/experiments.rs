//! The freezing experiments of a session in its report: which GPUs they are tested on, and the evidence of the pairs that they are about.
//!
//! Victim and suspect are cgroups; the users of a report are at or below them. Several users of one victim (the containers of a pod) are
//! one victim: their GPU time, waiting and requests are added up before they are compared.

use std::collections::BTreeSet;

use sampler_core::experiment::{BootSpan, is_at_or_below};
use sampler_core::fact::User;
use sampler_core::units::{BootNs, ContainerKey, WallTime};

use super::freeze::{Confirmation, GatheredExperiment, SampleUser, gpu_rate};
use super::gather::{Gathered, GatheredGpu};
use super::model::{Evidence, ExperimentGpu, ExperimentReport, FreezeEffect, Outcome, Report};
use super::outcomes::{VictimLatency, VictimWaits};

const S: f64 = 1e-9;

/// The users at or below a cgroup.
struct UsersBelow(BTreeSet<ContainerKey>);

impl UsersBelow {
    fn new(gathered: &Gathered, root: &str) -> Self {
        let below = gathered.containers.iter().filter(|(_, container)| is_at_or_below(&container.cgroup_path, root));
        Self(below.map(|(key, _)| *key).collect())
    }

    fn has(&self, user: User) -> bool {
        user.container().is_some_and(|key| self.0.contains(&key))
    }

    fn used(&self, gpu: &GatheredGpu) -> bool {
        gpu.observed.iter().any(|time| matches!(time.user, SampleUser::Named(user) if self.has(user)))
    }
}

/// An outcome of the victim that belongs to no single GPU.
struct VictimOutcome<'a> {
    outcome: Outcome,
    measure: &'a dyn Fn(BootSpan) -> Option<f64>,
}

/// Evaluates every experiment of the session on the GPUs that its victim used. `range`: that of the report.
pub fn evaluate(
    gathered: &Gathered,
    gpus: &[(&str, &GatheredGpu)],
    range: (BootNs, BootNs),
    wall: &dyn Fn(BootNs) -> WallTime,
) -> Vec<ExperimentReport> {
    let report = |experiment: &GatheredExperiment| {
        let schedule = &experiment.schedule;
        let (gpus, effects) = effects(experiment, gathered, gpus, range);
        ExperimentReport {
            victim: schedule.victim.clone(),
            suspect: schedule.suspect.clone(),
            consent: schedule.consent,
            seed: schedule.seed,
            start: wall(schedule.start),
            freeze_seconds: schedule.window_ns as f64 * S,
            planned_bursts: schedule.len(),
            frozen_bursts: u32::try_from(experiment.frozen.len()).unwrap_or(u32::MAX),
            gpus,
            effects,
        }
    };
    let mut all: Vec<ExperimentReport> = gathered.experiments.iter().map(report).collect();
    all.sort_by_key(|experiment| experiment.start);
    all
}

/// The number of experiments of the session with the same victim and suspect, or with a pod of one of them.
fn experiments_of_pair(gathered: &Gathered, of: &GatheredExperiment) -> usize {
    let overlap = |one: &str, other: &str| is_at_or_below(one, other) || is_at_or_below(other, one);
    let is_same = |other: &&GatheredExperiment| {
        overlap(&other.schedule.victim, &of.schedule.victim) && overlap(&other.schedule.suspect, &of.schedule.suspect)
    };
    gathered.experiments.iter().filter(is_same).count()
}

/// The effects by GPU, and those that belong to no single GPU.
fn effects(
    experiment: &GatheredExperiment,
    gathered: &Gathered,
    gpus: &[(&str, &GatheredGpu)],
    range: (BootNs, BootNs),
) -> (Vec<ExperimentGpu>, Vec<FreezeEffect>) {
    let victim = UsersBelow::new(gathered, &experiment.schedule.victim);
    let suspect = UsersBelow::new(gathered, &experiment.schedule.suspect);
    let waits = gathered.waits.iter().filter(|(user, _)| victim.has(**user)).flat_map(|(_, facts)| facts);
    let waits = VictimWaits::new(waits, range);
    let engines = gathered.engines.iter().filter(|(key, _)| victim.has(User::Container(**key)));
    let latency = VictimLatency::new(engines.map(|(_, facts)| facts.as_slice()));
    let (per_call, to_first_token) = (|span| waits.per_call(span), |span| latency.mean(span));
    let mut of_victim: Vec<VictimOutcome<'_>> = Vec::new();
    if waits.is_recorded() {
        of_victim.push(VictimOutcome { outcome: Outcome::CallWait, measure: &per_call });
    }
    if latency.is_recorded() {
        of_victim.push(VictimOutcome { outcome: Outcome::TimeToFirstToken, measure: &to_first_token });
    }
    let used = gpus.iter().filter(|(_, gpu)| victim.used(gpu));
    let shared = used.clone().filter(|(_, gpu)| suspect.used(gpu)).count();
    // Bonferroni: any one of them confirms the pair, in this experiment or in a repetition of it.
    let tests = (shared + of_victim.len()) * experiments_of_pair(gathered, experiment);
    let rate_of_suspect = |span| {
        let used = gpus.iter().filter(|(_, gpu)| suspect.used(gpu));
        // A GPU without data in the span says nothing; the others do.
        let rates = used.filter_map(|(_, gpu)| gpu_rate(&gpu.observed, &|user| suspect.has(user), span));
        rates.fold(None, |sum: Option<f64>, rate| Some(sum.unwrap_or(0.0) + rate))
    };
    let still_ran = experiment.still_ran(&rate_of_suspect);
    let confirmation = Confirmation { tests, end: range.1, still_ran: still_ran.as_deref() };
    let on_gpu = |(uuid, gpu): &(&str, &GatheredGpu)| {
        let rate = |span| gpu_rate(&gpu.observed, &|user| victim.has(user), span);
        let effect = if suspect.used(gpu) {
            experiment.evaluate(Outcome::GpuSeconds, &rate, confirmation)
        } else {
            FreezeEffect::not_confirmed(Outcome::GpuSeconds, "the suspect has no sample on this GPU")
        };
        ExperimentGpu { uuid: (*uuid).to_owned(), effects: vec![effect] }
    };
    let effect = |victim: &VictimOutcome<'_>| {
        if shared > 0 {
            experiment.evaluate(victim.outcome, victim.measure, confirmation)
        } else {
            FreezeEffect::not_confirmed(victim.outcome, "the suspect has no sample on a GPU of the victim")
        }
    };
    (used.map(on_gpu).collect(), of_victim.iter().map(effect).collect())
}

/// Adds the effects to the contenders of the report. Of several experiments with one pair, the one with the lowest p-value counts, for
/// each outcome.
pub fn attach(report: &mut Report) {
    let experiments = std::mem::take(&mut report.experiments);
    for experiment in &experiments {
        let victims = report.users.iter_mut().filter(|user| is_at_or_below(&user.id, &experiment.victim));
        for usage in victims.flat_map(|user| &mut user.gpus) {
            let on_gpu = experiment.gpus.iter().filter(|gpu| gpu.uuid == usage.uuid);
            let effects: Vec<&FreezeEffect> = on_gpu.flat_map(|gpu| &gpu.effects).chain(&experiment.effects).collect();
            for contender in usage.contenders.iter_mut().filter(|other| is_at_or_below(&other.id, &experiment.suspect)) {
                effects.iter().for_each(|effect| keep_strongest(&mut contender.experiment, effect));
                if effects.iter().any(|effect| effect.confirmed) {
                    contender.evidence = Evidence::ExperimentConfirmed;
                    contender.why_not_confirmed.clear();
                }
            }
        }
    }
    report.experiments = experiments;
}

fn keep_strongest(known: &mut Vec<FreezeEffect>, effect: &FreezeEffect) {
    let p_value = |effect: &FreezeEffect| effect.p_value.unwrap_or(f64::INFINITY);
    match known.iter_mut().find(|known| known.outcome == effect.outcome) {
        Some(known) if p_value(effect) < p_value(known) => *known = effect.clone(),
        Some(_) => {}
        None => known.push(effect.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::Contender;
    use super::super::tests::{SimulatedUser, container, simulate};
    use super::super::*;
    use super::*;
    use sampler_core::experiment::{BootSpan, ExperimentDesign, ExperimentFact, ExperimentSchedule, FreezeConsent};
    use sampler_core::fact::{Fact, HostProcess, WaitFact};
    use sampler_core::observation::{EngineFact, LatencySum};
    use sampler_session::{Session, View};

    const SECOND: u64 = 1_000_000_000;
    const LASTS: u64 = 110;

    fn frozen_windows(schedule: &ExperimentSchedule) -> Vec<BootSpan> {
        (0..schedule.len()).filter_map(|burst| schedule.frozen_window(burst)).collect()
    }

    /// A session in which the second container is frozen as scheduled: with `stops`. Without, it only is said to be, and the first one wants
    /// more meanwhile.
    fn session(victim: f64, suspect: f64, stops: bool, seed: u64) -> Session {
        let design =
            ExperimentDesign { seed, bursts: 12, window_ns: 3 * SECOND, pause_ns: SECOND, consent: FreezeConsent::Operator };
        let start = 1_005 * SECOND;
        let schedule = design.draw("/docker/1".into(), "/docker/2".into(), BootNs(start));
        let frozen = frozen_windows(&schedule);
        let windows = frozen.clone();
        let is_frozen = move |t: f64| {
            let at = BootNs((t * 1e9) as u64 + 1_000 * SECOND);
            windows.iter().any(|window| (window.from..window.to).contains(&at))
        };
        let is_within = is_frozen.clone();
        let of_victim = move |t: f64| Some(if stops || is_within(t) { victim } else { victim / 5.0 });
        let of_suspect = move |t: f64| Some(if stops && is_frozen(t) { 0.0 } else { suspect });
        let users: Vec<SimulatedUser> = vec![container(1, of_victim), container(2, of_suspect)];
        let (mut session, _) = simulate(&users, LASTS, seed);
        let freezes = (0_u32..).zip(&frozen).map(|(burst, window)| ExperimentFact::Frozen {
            experiment: BootNs(start),
            burst,
            from: window.from,
            to: window.to,
        });
        let facts = [ExperimentFact::Schedule(schedule)].into_iter().chain(freezes).map(Fact::Experiment);
        session.facts.splice(3..3, facts);
        session
    }

    fn contender(report: &Report) -> &Contender {
        let usage = &report.user("/docker/1").unwrap().gpus[0];
        usage.contenders.iter().find(|contender| contender.id == "/docker/2").unwrap()
    }

    #[test]
    fn a_contended_gpu_ends_experiment_confirmed_in_every_format() {
        let report = build(&session(1.0, 1.0, true, 5), &View::default());
        let (contender, experiment) = (contender(&report), &report.experiments[0]);
        assert_eq!(contender.evidence, Evidence::ExperimentConfirmed, "{experiment:?}");
        let effect = &contender.experiment[0];
        assert!(effect.confirmed && effect.bursts == 12 && effect.p_value.unwrap() < 0.001, "{effect:?}");
        assert!((0.3..0.6).contains(&effect.effect.unwrap()), "{effect:?}");
        assert_eq!((experiment.planned_bursts, experiment.frozen_bursts, experiment.gpus.len()), (12, 12, 1));
        assert!(report.findings[0].text.contains("received more GPU time whenever"), "{:?}", report.findings);
        let options = TextOptions { width: None, colour: false, unicode: true };
        for page in [text(&report, &options), experiments_text(&report, &options), html(&report)] {
            assert!(page.contains("experiment-confirmed") && page.contains("12 bursts"), "{page}");
        }
        let json: serde_json::Value = serde_json::from_str(&json(&report)).unwrap();
        let found = &json["users"][0]["gpus"][0]["contenders"][0];
        let found = if found.is_null() { &json["users"][1]["gpus"][0]["contenders"][0] } else { found };
        assert!(json["experiments"][0]["gpus"][0]["effects"][0]["p_value"].is_number(), "{found}");
        assert_eq!(json["experiments"][0]["gpus"][0]["effects"][0]["outcome"], "gpu-seconds");
    }

    /// Adds what wait probes and an engine say of the first container: both are half as long while the second is frozen.
    fn with_waits_and_engine(mut session: Session) -> Session {
        let schedule = session.facts.iter().find_map(|fact| match fact {
            Fact::Experiment(ExperimentFact::Schedule(schedule)) => Some(schedule.clone()),
            _ => None,
        });
        let frozen = frozen_windows(&schedule.unwrap());
        let key = ContainerKey(1);
        let process = HostProcess { pid: 100, start: BootNs(1) };
        let (mut sum_seconds, mut count) = (0.0, 0.0);
        for n in 1_001..1_000 + LASTS {
            let (from, to) = (BootNs(n * SECOND), BootNs((n + 1) * SECOND));
            let is_frozen = frozen.iter().any(|window| window.from < to && window.to > from.plus(SECOND / 2));
            let some_ns = SECOND / 2;
            let (calls, durations) = (if is_frozen { 100 } else { 50 }, Vec::new());
            let user = User::Container(key);
            session.facts.push(Fact::Waited(WaitFact { process, user, from, to, some_ns, total_ns: some_ns, calls, durations }));
            (sum_seconds, count) = (sum_seconds + if is_frozen { 1.0 } else { 2.0 }, count + 10.0);
            let time_to_first_token = Some(LatencySum { sum_seconds, count });
            let engine =
                EngineFact { key, at: to, engine: "vllm".into(), pid: 100, time_to_first_token, ..EngineFact::default() };
            session.facts.push(Fact::Engine(engine));
        }
        session
    }

    #[test]
    fn waiting_and_latency_confirm_an_experiment_in_every_format() {
        // Without contention for GPU time.
        let report = build(&with_waits_and_engine(session(0.3, 0.3, true, 3)), &View::default());
        let (contender, experiment) = (contender(&report), &report.experiments[0]);
        assert_eq!(contender.evidence, Evidence::ExperimentConfirmed, "{experiment:?}");
        let outcomes: Vec<(Outcome, bool)> =
            contender.experiment.iter().map(|effect| (effect.outcome, effect.confirmed)).collect();
        let expect = [(Outcome::GpuSeconds, false), (Outcome::CallWait, true), (Outcome::TimeToFirstToken, true)];
        assert_eq!(outcomes, expect, "{experiment:?}");
        assert_eq!(experiment.effects[..], contender.experiment[1..]);
        let finding = report.findings.iter().find(|finding| finding.evidence == Some(Evidence::ExperimentConfirmed));
        let text_of_finding = &finding.unwrap().text;
        for part in ["waited less in blocking calls whenever", "ms waited per blocking call", "a shorter time to the first token"]
        {
            assert!(text_of_finding.contains(part), "{text_of_finding}");
        }
        let options = TextOptions { width: None, colour: false, unicode: true };
        for page in [text(&report, &options), experiments_text(&report, &options), html(&report)] {
            for part in
                ["call-wait: ", "ms waited per blocking call while", "time-to-first-token: ", "ms to the first token while"]
            {
                assert!(page.contains(part), "{part}: {page}");
            }
        }
        let json: serde_json::Value = serde_json::from_str(&json(&report)).unwrap();
        let effects = &json["experiments"][0]["effects"];
        assert_eq!((&effects[0]["outcome"], &effects[0]["unit"]), (&"call-wait".into(), &"seconds per blocking call".into()));
        assert_eq!((&effects[1]["outcome"], &effects[1]["unit"]), (&"time-to-first-token".into(), &"seconds".into()));
        assert!(effects[1]["effect"].as_f64().unwrap() < 0.0, "{effects}");
    }

    #[test]
    fn a_suspect_that_goes_on_while_it_is_said_to_be_frozen_confirms_nothing() {
        let report = build(&session(1.0, 0.8, false, 5), &View::default());
        let effect = &contender(&report).experiment[0];
        assert!(effect.p_value.unwrap() < 0.001, "{effect:?}");
        assert!(!effect.confirmed && effect.why_not.contains("while it was frozen"), "{effect:?}");
        assert_ne!(contender(&report).evidence, Evidence::ExperimentConfirmed);
    }

    #[test]
    fn each_tested_outcome_makes_confirmation_harder() {
        let mut session = session(1.0, 1.0, true, 5);
        for fact in &mut session.facts {
            if let Fact::Experiment(ExperimentFact::Schedule(schedule)) = fact {
                // 1/128 is below 0.01, and not below a third of it.
                schedule.bursts.truncate(7);
            }
        }
        assert_eq!(contender(&build(&session, &View::default())).evidence, Evidence::ExperimentConfirmed);
        let report = build(&with_waits_and_engine(session), &View::default());
        let effect = &contender(&report).experiment[0];
        assert!(!effect.confirmed && effect.why_not.contains("7 bursts cannot show an effect at p < 0.0033"), "{effect:?}");
    }

    #[test]
    fn each_repetition_in_a_session_makes_confirmation_harder() {
        let mut session = session(1.0, 1.0, true, 5);
        let repeated = session.facts.iter_mut().find_map(|fact| match fact {
            Fact::Experiment(ExperimentFact::Schedule(schedule)) => {
                // 1/128 is below 0.01, and not below half of it.
                schedule.bursts.truncate(7);
                Some(ExperimentSchedule { start: schedule.start.plus(SECOND), ..schedule.clone() })
            }
            _ => None,
        });
        assert_eq!(contender(&build(&session, &View::default())).evidence, Evidence::ExperimentConfirmed);
        session.facts.insert(4, Fact::Experiment(ExperimentFact::Schedule(repeated.unwrap())));
        let report = build(&session, &View::default());
        let effect = &contender(&report).experiment[0];
        assert!(!effect.confirmed && effect.why_not.contains("7 bursts cannot show an effect at p < 0.0050"), "{effect:?}");
    }

    #[test]
    fn a_part_of_an_experiment_confirms_nothing() {
        let view = View { to_ns: Some(80 * SECOND), ..View::default() };
        let report = build(&session(1.0, 1.0, true, 5), &view);
        let effect = &report.experiments[0].gpus[0].effects[0];
        assert!(!effect.confirmed && effect.why_not.contains("ended before the last of its 12 bursts"), "{effect:?}");
    }

    #[test]
    fn freezing_a_user_that_does_not_take_time_confirms_nothing() {
        let confirmed = (0..20).filter(|seed| {
            let report = build(&session(0.4, 0.3, true, *seed), &View::default());
            contender(&report).evidence == Evidence::ExperimentConfirmed
        });
        // One in twenty would be confirmed by chance in one run of five.
        assert!(confirmed.count() <= 2);
    }

    #[test]
    fn a_suspect_without_samples_on_the_gpu_is_named() {
        let mut session = session(0.9, 0.0, true, 1);
        let report = build(&session, &View::default());
        let effect = &report.experiments[0].gpus[0].effects[0];
        assert!(!effect.confirmed && effect.why_not.contains("the suspect has no sample"), "{effect:?}");
        // A victim that the session does not have.
        for fact in &mut session.facts {
            if let Fact::Experiment(ExperimentFact::Schedule(schedule)) = fact {
                schedule.victim = "/docker/9".into();
            }
        }
        let report = build(&session, &View::default());
        assert_eq!(report.experiments[0].gpus, []);
        let options = TextOptions { width: None, colour: false, unicode: true };
        assert!(experiments_text(&report, &options).contains("the victim has no sample"));
    }
}
