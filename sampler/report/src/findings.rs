//! The findings of a report, as sentences. They never claim a slowdown, because only GPU time is measured; except where a serving engine
//! reports its own latencies.

use super::engine_model::EngineReport;
use super::engine_words;
use super::model::{
    Cause, CauseKind, Contender, DemandBasis, Evidence, Finding, FreezeEffect, Outcome, Report, Usage, UserReport, Verdict,
};
use super::words;

/// Coactivity and GPU time of a contender on a saturated GPU, in seconds, from which a coactive pair is a finding.
const LEAST_SECONDS: f64 = 3.0;

fn possible(causes: &[Cause]) -> Vec<&Cause> {
    causes.iter().filter(|cause| cause.verdict == Verdict::Possible).collect()
}

fn other_causes(causes: &[Cause]) -> String {
    let possible: Vec<String> = possible(causes).iter().map(|c| format!("{} ({})", c.cause.name(), c.detail)).collect();
    let unknown = causes.iter().filter(|cause| cause.verdict == Verdict::Unknown).map(|c| c.cause.name());
    let unknown: Vec<&str> = unknown.collect();
    let mut text = if possible.is_empty() {
        " No other cause that was examined explains it".to_owned()
    } else {
        format!(" Also possible: {}", possible.join("; "))
    };
    if !unknown.is_empty() {
        text += &format!("; unknown: {}", unknown.join(", "));
    }
    text + "."
}

fn confirmed(victim: &UserReport, other: &str, usage: &Usage, contender: &Contender) -> Option<String> {
    let (before, after, [least, most]) = (contender.rate_before?, contender.rate_after?, contender.interval?);
    // It may have wanted less.
    let why_not = contender.demand.as_ref().map_or("", |demand| &demand.why_not_confirmed);
    let waiting = if why_not.is_empty() {
        String::new()
    } else {
        format!(" Its waiting in blocking calls does not confirm this: {why_not}.")
    };
    Some(format!(
        "{} received less GPU time while {other} was on: {before:.2} GPU-seconds per second without it, {after:.2} with it, over \
         {} changes; the drop is {least:.2} to {most:.2} (95 % interval), and the GPU was saturated at those times.{waiting}{}",
        victim.display_name(),
        contender.transitions,
        other_causes(&usage.causes),
    ))
}

fn demand_confirmed(victim: &UserReport, other: &str, usage: &Usage, contender: &Contender) -> Option<(f64, String)> {
    let demand = contender.demand.as_ref().filter(|demand| demand.why_not_confirmed.is_empty())?;
    let (name, changes) = (victim.display_name(), demand.transitions);
    let in_all = demand.wait_seconds.map(|seconds| format!(", {seconds:.1} s in all")).unwrap_or_default();
    let measured = || Some((demand.wait_rate?, demand.interval?));
    let (rate, what) = match demand.basis {
        DemandBasis::Changes => {
            let (rate, [least, most]) = measured()?;
            let what = format!(
                "{name} waited {rate:.2} s of every second longer in blocking calls while {other} was on (interval {least:.2} to {most:.2} \
                 s, 95 %), over {changes} changes{in_all}. Calls that took no longer in that time, or longer only by its own work, would \
                 have refuted this."
            );
            (rate, what)
        }
        DemandBasis::Quietest => {
            let (rate, [least, most]) = measured()?;
            let what = format!(
                "{name} waited {rate:.2} s of every second for {other} while that was on (interval {least:.2} to {most:.2} s, 95 %){in_all}: \
                 its blocking calls took longer than in its quietest windows, when {other} was off, over {changes} changes; of what was \
                 longer this is the part of {other}, by the GPU time of all that were on. Calls that took no longer than in the quietest \
                 windows, or longer only by its own work, would have refuted this."
            );
            (rate, what)
        }
        // Last of its grade: only the most is known.
        DemandBasis::Mutual => {
            let most = demand.wait_rate_most?;
            let what = format!(
                "{other} waited for {name}, so both had work in flight at the same time, and the GPU runs one of them at a time: {name} \
                 waited for {other} too, at most {most:.2} s of every second while that was on. If the blocking calls of {other} had taken \
                 no longer while {name} was on, this would be refuted."
            );
            (0.0, what)
        }
    };
    let text = format!("{what}{}{}", also_received_less(contender).unwrap_or_default(), other_causes(&usage.causes));
    Some((rate, text))
}

/// The comparison of GPU time, where it is confirmed as well.
fn also_received_less(contender: &Contender) -> Option<String> {
    let (before, after, [least, most]) = (contender.rate_before?, contender.rate_after?, contender.interval?);
    contender.on_off_confirmed.then(|| {
        format!(
            " It also received less GPU time: {before:.2} GPU-seconds per second without it, {after:.2} with it, over {} changes; the \
             drop is {least:.2} to {most:.2} (95 % interval), and the GPU was saturated at those times.",
            contender.transitions
        )
    })
}

fn gained(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::GpuSeconds => "received more GPU time",
        Outcome::CallWait => "waited less in blocking calls",
        Outcome::TimeToFirstToken => "had a shorter time to the first token",
    }
}

/// The largest effect, in GPU-seconds per second or as a fraction of the waiting or latency, and a sentence for each outcome.
fn experiment_confirmed(victim: &UserReport, other: &str, contender: &Contender) -> Option<(f64, String)> {
    let confirmed = contender.experiment.iter().filter(|effect| effect.confirmed);
    let size = |effect: &FreezeEffect| {
        let unit = if effect.outcome.is_gain() { 1.0 } else { effect.mean_running? };
        Some((effect.effect? / unit).abs())
    };
    let largest = confirmed.clone().filter_map(size).max_by(f64::total_cmp)?;
    let sentence = |effect: &FreezeEffect| {
        let means = words::freeze_means(effect, "it")?;
        let (name, gained) = (victim.display_name(), gained(effect.outcome));
        Some(format!("{name} {gained} whenever {other} was frozen, at times drawn at random: {means}."))
    };
    Some((largest, confirmed.filter_map(sentence).collect::<Vec<_>>().join(" ")))
}

fn coactive(victim: &UserReport, other: &str, contender: &Contender) -> String {
    format!(
        "{} and {other} were active in the same windows for {:.0} s; while the GPU was saturated, {other} received {:.1} \
         GPU-seconds. Whether {} had to wait for it is not shown: {}.",
        victim.display_name(),
        contender.coactive_seconds,
        contender.saturated_gpu_seconds,
        victim.display_name(),
        contender.why_not_confirmed,
    )
}

fn own_causes(victim: &UserReport, usage: &Usage) -> Option<String> {
    let own = possible(&usage.causes).into_iter().filter(|cause| CauseKind::OF_CONTAINER.contains(&cause.cause));
    let details: Vec<String> = own.map(|c| format!("{}: {}", c.cause.name(), c.detail)).collect();
    (!details.is_empty())
        .then(|| format!("{} waited for resources other than the GPU: {}.", victim.display_name(), details.join("; ")))
}

pub fn findings(report: &Report) -> Vec<Finding> {
    // Evidence of experiments first, then of demand, then of changes; the second number orders those of one rank.
    let mut all: Vec<(u8, f64, Finding)> = Vec::new();
    let display_name = |id: &str| report.user(id).map_or_else(|| id.to_owned(), UserReport::display_name);
    for gpu in &report.gpus {
        let limited: Vec<String> = report
            .users
            .iter()
            .flat_map(|user| &user.gpus)
            .find(|usage| usage.uuid == gpu.uuid && !usage.causes.is_empty())
            .into_iter()
            .flat_map(|usage| possible(&usage.causes))
            .filter(|cause| !CauseKind::OF_CONTAINER.contains(&cause.cause))
            .map(|cause| format!("{}: {}", cause.cause.name(), cause.detail))
            .collect();
        if !limited.is_empty() {
            let text = format!("The GPU itself was limited, for all of its users: {}.", limited.join("; "));
            let (uuid, victim) = (gpu.uuid.clone(), String::new());
            all.push((3, gpu.busy_seconds, Finding { uuid, victim, aggressor: None, evidence: None, text }));
        }
    }
    for user in &report.users {
        for usage in &user.gpus {
            let finding = |aggressor: Option<&str>, evidence, text| Finding {
                uuid: usage.uuid.clone(),
                victim: user.id.clone(),
                aggressor: aggressor.map(str::to_owned),
                evidence,
                text,
            };
            for contender in &usage.contenders {
                let other = display_name(&contender.id);
                if let Some((effect, text)) = experiment_confirmed(user, &other, contender) {
                    all.push((0, effect, finding(Some(&contender.id), Some(contender.evidence), text)));
                } else if let Some((rate, text)) = demand_confirmed(user, &other, usage, contender) {
                    all.push((1, rate, finding(Some(&contender.id), Some(contender.evidence), text)));
                } else if contender.evidence == Evidence::OnOffConfirmed
                    && let Some(text) = confirmed(user, &other, usage, contender)
                {
                    let drop = contender.rate_before.unwrap_or_default() - contender.rate_after.unwrap_or_default();
                    all.push((2, drop, finding(Some(&contender.id), Some(contender.evidence), text)));
                } else if contender.saturated_gpu_seconds >= LEAST_SECONDS && contender.coactive_seconds >= LEAST_SECONDS {
                    let text = coactive(user, &other, contender);
                    all.push((5, contender.saturated_gpu_seconds, finding(Some(&contender.id), Some(contender.evidence), text)));
                }
            }
            if let Some(text) = own_causes(user, usage) {
                all.push((4, usage.gpu_seconds, finding(None, None, text)));
            }
        }
    }
    for user in &report.users {
        for (engine, latency, contrast) in user.engines.iter().flat_map(EngineReport::contrasts) {
            if let Some(text) = engine_words::finding(user, &display_name(&contrast.id), engine, latency, contrast) {
                let (uuid, aggressor) = (contrast.uuid.clone(), Some(contrast.id.clone()));
                let finding = Finding { uuid, victim: user.id.clone(), aggressor, evidence: None, text };
                all.push((2, contrast.increase_ratio(), finding));
            }
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    all.into_iter().map(|(_, _, finding)| finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::UserKind;
    use crate::sample;

    #[test]
    fn demand_comes_before_changes_and_names_both_where_both_are_confirmed() {
        let mut report = sample::report();
        let on_off = Contender {
            evidence: Evidence::OnOffConfirmed,
            rate_before: Some(0.9),
            rate_after: Some(0.1),
            interval: Some([0.7, 0.9]),
            ..sample::contender(UserKind::Container, sample::TRAINER, 13.5, 28.0, 13.4)
        };
        report.users[1].gpus[0].contenders = vec![on_off];
        let found = findings(&report);
        let grades: Vec<Option<Evidence>> = found.iter().map(|finding| finding.evidence).collect();
        assert_eq!(grades, [Some(Evidence::DemandConfirmed), Some(Evidence::OnOffConfirmed), None], "the last is about the GPU");
        assert!(found[0].text.contains("(interval 0.38 to 0.44 s, 95 %), over 4 changes"), "{}", found[0].text);
        assert!(found[0].text.contains("would have refuted this. It also received less GPU time"), "{}", found[0].text);
        report.users[0].gpus[0].contenders[0].on_off_confirmed = false;
        assert!(!findings(&report)[0].text.contains("less GPU time"));
    }

    #[test]
    fn a_finding_says_what_its_evidence_rests_on() {
        let mut report = sample::report();
        for (basis, expect) in [
            (DemandBasis::Quietest, "waited 0.41 s of every second for"),
            (DemandBasis::Mutual, "at most 0.25 s of every second"),
        ] {
            if let Some(demand) = &mut report.users[0].gpus[0].contenders[0].demand {
                (demand.basis, demand.wait_rate_most) = (basis, Some(0.25));
            }
            let found = findings(&report);
            assert!(found[0].text.contains(expect), "{}", found[0].text);
        }
    }

    #[test]
    fn waits_without_a_confirmed_contender_are_not_a_finding() {
        let mut report = sample::report();
        let contender = &mut report.users[0].gpus[0].contenders[0];
        (contender.evidence, contender.saturated_gpu_seconds) = (Evidence::Coactive, 0.0);
        if let Some(demand) = &mut contender.demand {
            demand.why_not_confirmed = "the contender started or stopped only once, which may be a coincidence".to_owned();
        }
        assert!(findings(&report).iter().all(|finding| finding.victim != sample::TRAINER));
    }
}
