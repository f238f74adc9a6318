//! The freezing experiments of a session in its report: which GPUs they are tested on, and the evidence of the pairs that they are about.
//!
//! Victim and suspect are cgroups; the users of a report are at or below them. Several users of one victim (the containers of a pod) are
//! one victim: their GPU time is added up before it is compared.

use std::collections::BTreeSet;

use sampler_core::experiment::is_at_or_below;
use sampler_core::fact::User;
use sampler_core::units::{BootNs, ContainerKey, WallTime};

use super::freeze::{GatheredExperiment, SampleUser};
use super::gather::{Gathered, GatheredGpu};
use super::model::{Evidence, ExperimentGpu, ExperimentReport, FreezeEffect, Report};

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

/// Evaluates every experiment of the session on the GPUs that its victim used.
pub fn evaluate(gathered: &Gathered, gpus: &[(&str, &GatheredGpu)], wall: &dyn Fn(BootNs) -> WallTime) -> Vec<ExperimentReport> {
    let report = |experiment: &GatheredExperiment| {
        let schedule = &experiment.schedule;
        let victim = UsersBelow::new(gathered, &schedule.victim);
        let suspect = UsersBelow::new(gathered, &schedule.suspect);
        let used = gpus.iter().filter(|(_, gpu)| victim.used(gpu));
        let shared = used.clone().filter(|(_, gpu)| suspect.used(gpu)).count();
        let on_gpu = |(uuid, gpu): &(&str, &GatheredGpu)| {
            let effect = if suspect.used(gpu) {
                experiment.evaluate(&gpu.observed, &|user| victim.has(user), shared)
            } else {
                FreezeEffect { why_not: "the suspect has no sample on this GPU".into(), ..FreezeEffect::default() }
            };
            ExperimentGpu { uuid: (*uuid).to_owned(), effects: vec![effect] }
        };
        ExperimentReport {
            victim: schedule.victim.clone(),
            suspect: schedule.suspect.clone(),
            seed: schedule.seed,
            start: wall(schedule.start),
            freeze_seconds: schedule.window_ns as f64 * S,
            planned_bursts: schedule.len(),
            frozen_bursts: u32::try_from(experiment.frozen.len()).unwrap_or(u32::MAX),
            gpus: used.map(on_gpu).collect(),
        }
    };
    let mut all: Vec<ExperimentReport> = gathered.experiments.iter().map(report).collect();
    all.sort_by_key(|experiment| experiment.start);
    all
}

/// Adds the effects to the contenders of the report. Of several experiments with one pair, the one with the lowest p-value counts.
pub fn attach(report: &mut Report) {
    let experiments = std::mem::take(&mut report.experiments);
    for experiment in &experiments {
        let victims = report.users.iter_mut().filter(|user| is_at_or_below(&user.id, &experiment.victim));
        for usage in victims.flat_map(|user| &mut user.gpus) {
            let on_gpu = experiment.gpus.iter().filter(|gpu| gpu.uuid == usage.uuid);
            for effect in on_gpu.flat_map(|gpu| &gpu.effects) {
                for contender in usage.contenders.iter_mut().filter(|other| is_at_or_below(&other.id, &experiment.suspect)) {
                    let p_value = |effect: &FreezeEffect| effect.p_value.unwrap_or(f64::INFINITY);
                    if contender.experiment.as_ref().is_none_or(|known| p_value(effect) < p_value(known)) {
                        contender.experiment = Some(effect.clone());
                    }
                    if effect.confirmed {
                        contender.evidence = Evidence::ExperimentConfirmed;
                        contender.why_not_confirmed.clear();
                    }
                }
            }
        }
    }
    report.experiments = experiments;
}

#[cfg(test)]
mod tests {
    use super::super::model::Contender;
    use super::super::tests::{SimulatedUser, container, simulate};
    use super::super::*;
    use super::*;
    use sampler_core::experiment::{BootSpan, ExperimentDesign, ExperimentFact, ExperimentSchedule};
    use sampler_core::fact::Fact;
    use sampler_session::{Session, View};

    const SECOND: u64 = 1_000_000_000;
    const LASTS: u64 = 110;

    fn frozen_windows(schedule: &ExperimentSchedule) -> Vec<BootSpan> {
        (0..schedule.len()).filter_map(|burst| schedule.frozen_window(burst)).collect()
    }

    /// A session in which the second container is frozen as scheduled; with `stops`, its GPU time stops meanwhile.
    fn session(victim: f64, suspect: f64, stops: bool, seed: u64) -> Session {
        let design = ExperimentDesign { seed, bursts: 12, window_ns: 3 * SECOND, pause_ns: SECOND };
        let start = 1_005 * SECOND;
        let schedule = design.draw("/docker/1".into(), "/docker/2".into(), BootNs(start));
        let frozen = frozen_windows(&schedule);
        let windows = frozen.clone();
        let demand = move |t: f64| {
            let at = BootNs((t * 1e9) as u64 + 1_000 * SECOND);
            let is_frozen = stops && windows.iter().any(|window| (window.from..window.to).contains(&at));
            Some(if is_frozen { 0.0 } else { suspect })
        };
        let users: Vec<SimulatedUser> = vec![container(1, move |_| Some(victim)), container(2, demand)];
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
        let effect = contender.experiment.as_ref().unwrap();
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
