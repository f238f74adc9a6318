//! Engines with known latencies, next to another user that is switched on and off.

use super::*;
use crate::tests::{container, simulate};
use crate::{Report, build, html, json, perfetto, text};
use devkit::Random;
use sampler_core::fact::Fact;
use sampler_core::units::ContainerKey;
use sampler_session::{Session, View};

const SECOND: u64 = 1_000_000_000;
const EVERY: u64 = 5;

fn is_on(t: f64) -> bool {
    (t / 30.0) as u64 % 2 == 1
}

/// Readings every [`EVERY`] seconds; `seconds_at`: the time to first token of requests at that time. `None`: the reading fails.
fn readings(start: BootNs, seconds: u64, seconds_at: &mut dyn FnMut(f64) -> Option<f64>) -> Vec<Fact> {
    let mut sum = LatencySum::default();
    let reading = |n: u64| {
        let latency = seconds_at((n * EVERY) as f64 - EVERY as f64 / 2.0);
        if let Some(latency) = latency {
            sum = LatencySum { sum_seconds: sum.sum_seconds + 10.0 * latency, count: sum.count + 10.0 };
        }
        Fact::Engine(EngineFact {
            key: ContainerKey(1),
            at: start.plus(n * EVERY * SECOND + SECOND / 10),
            engine: "vllm".into(),
            pid: 100,
            port: 8000,
            waiting: latency.map(|_| (n % 3) as f64),
            running: latency.map(|_| 4.0),
            time_to_first_token: latency.map(|_| sum),
            time_per_output_token: None,
            queue_time: None,
            problem: latency.is_none().then(|| "HTTP 500\u{1b}[2J<b>".to_owned()),
        })
    };
    (0..seconds / EVERY).map(reading).collect()
}

fn session(seconds: u64, seconds_at: &mut dyn FnMut(f64) -> Option<f64>) -> Session {
    let users = [container(1, |_| Some(0.6)), container(2, |t| Some(if is_on(t) { 0.6 } else { 0.0 }))];
    let (mut session, _) = simulate(&users, seconds, 3);
    session.facts.extend(readings(session.header.start, seconds, seconds_at));
    session
}

fn built(seconds: u64, seconds_at: &mut dyn FnMut(f64) -> Option<f64>) -> Report {
    build(&session(seconds, seconds_at), &View::default())
}

fn engine(report: &Report) -> &EngineReport {
    &report.user("/docker/1").unwrap().engines[0]
}

#[test]
fn a_latency_that_follows_another_user_is_a_finding_with_both_means() {
    let mut random = Random(7);
    let report = built(300, &mut |t| Some(if is_on(t) { 0.61 } else { 0.18 } + 0.01 * random.unit()));
    let contrast = &engine(&report).latencies[0].contrasts[0];
    assert_eq!((contrast.id.as_str(), contrast.is_longer), ("/docker/2", true), "{contrast:?}");
    assert!((contrast.without.mean_seconds.unwrap() - 0.185).abs() < 0.02, "{contrast:?}");
    assert!((contrast.with.mean_seconds.unwrap() - 0.615).abs() < 0.02, "{contrast:?}");
    assert!(contrast.changes >= 8, "{contrast:?}");
    let texts: Vec<&str> = report.findings.iter().map(|finding| finding.text.as_str()).collect();
    assert!(texts.iter().any(|text| text.starts_with("Time to first token of ") && text.contains(" without, ")), "{texts:?}");
}

#[test]
fn a_latency_that_does_not_follow_another_user_is_not_a_finding() {
    // Each session makes one comparison of the three that the level allows for: 0.8 of 100 are expected to show a difference.
    let is_longer = |seed: &u64| {
        let mut random = Random(seed + 1);
        let report = built(300, &mut |_| Some(0.2 + 0.1 * random.unit()));
        let contrast = &engine(&report).latencies[0].contrasts[0];
        assert!(contrast.interval.is_some() && contrast.is_longer == contrast.why_not.is_empty(), "seed {seed}: {contrast:?}");
        contrast.is_longer
    };
    let found = (0..100).filter(is_longer).count();
    assert!(found <= 6, "{found} of 100");
}

/// The comparisons of all containers share one rate of false findings.
#[test]
fn a_difference_close_to_chance_is_not_a_finding_if_other_containers_are_compared_too() {
    let found = |step: u32, others: u16| {
        let mut random = Random(11);
        let seconds_at = &mut |t| Some(0.2 + 0.1 * random.unit() + if is_on(t) { 0.002 * f64::from(step) } else { 0.0 });
        let mut session = session(300, seconds_at);
        let engines: Vec<EngineFact> = session
            .facts
            .iter()
            .filter_map(|fact| if let Fact::Engine(fact) = fact { Some(fact.clone()) } else { None })
            .collect();
        let of_other = |port| engines.iter().map(move |fact| EngineFact { key: ContainerKey(2), port, ..fact.clone() });
        session.facts.extend((1..=others).flat_map(of_other).map(Fact::Engine));
        engine(&build(&session, &View::default())).latencies[0].contrasts[0].is_longer
    };
    let count = |others| (0..40).filter(|step| found(*step, others)).count();
    let (alone, with_others) = (count(0), count(MOST_ENGINES as u16));
    assert!(with_others > 0 && with_others < alone && alone < 40, "{alone} alone, {with_others} with others");
}

#[test]
fn few_intervals_and_a_single_change_are_not_a_claim() {
    let few = built(50, &mut |t| Some(if is_on(t) { 0.6 } else { 0.2 }));
    let contrast = &engine(&few).latencies[0].contrasts[0];
    assert!(!contrast.is_longer && contrast.interval.is_none() && contrast.why_not.starts_with("fewer than 5"), "{contrast:?}");
    let once = built(60, &mut |t| Some(if is_on(t) { 0.6 } else { 0.2 }));
    let contrast = &engine(&once).latencies[0].contrasts[0];
    assert!(!contrast.is_longer && contrast.changes <= 1, "{contrast:?}");
}

#[test]
fn failed_readings_are_counted_by_their_reason_and_shown_without_control_characters() {
    let report = built(100, &mut |t| (t < 50.0).then_some(0.2));
    let engine = engine(&report);
    assert_eq!((engine.readings, engine.failed_readings, engine.problems.len()), (20, 9, 1));
    let options = crate::TextOptions { width: None, colour: false, unicode: true };
    let text = text(&report, &options);
    assert!(text.contains("vllm, port 8000") && text.contains("HTTP 500") && !text.contains('\u{1b}'), "{text}");
    let page = html(&report);
    assert!(page.contains("Serving engines") && !page.contains("HTTP 500\u{1b}[2J<b>"));
    let document: serde_json::Value = serde_json::from_str(&json(&report)).unwrap();
    let engines = document["users"].as_array().unwrap().iter().find_map(|user| user["engines"].get(0)).unwrap();
    assert_eq!((&engines["engine"], &engines["latencies"][0]["latency"]), (&"vllm".into(), &"time-to-first-token".into()));
    let trace = perfetto(&report);
    assert!(trace.contains("waiting requests") && trace.contains("time to first token"));
}

#[test]
fn a_restarted_engine_and_a_decreased_counter_make_no_interval() {
    let at = |pid, second: u64, sum_seconds, count| EngineFact {
        pid,
        at: BootNs(second * SECOND),
        time_to_first_token: Some(LatencySum { sum_seconds, count }),
        ..EngineFact::default()
    };
    let mean = |a, b| between(&a, &b, LatencyKind::TimeToFirstToken).map(|interval| interval.mean);
    assert_eq!(mean(at(1, 1, 1.0, 10.0), at(1, 2, 3.0, 20.0)), Some(0.2));
    for (a, b) in [
        (at(1, 1, 1.0, 10.0), at(2, 2, 3.0, 20.0)),
        (at(1, 1, 1.0, 10.0), at(1, 2, 0.5, 20.0)),
        (at(1, 1, 1.0, 10.0), at(1, 2, 3.0, 5.0)),
        (at(1, 1, 1.0, 10.0), at(1, 2, 1.0, 10.0)),
        (at(1, 1, 1.0, 10.0), at(1, 900, 3.0, 20.0)),
        (at(1, 1, 1.0, 10.0), at(1, 2, f64::INFINITY, 20.0)),
        (at(1, 1, f64::NAN, 10.0), at(1, 2, 3.0, 20.0)),
    ] {
        assert_eq!(mean(a.clone(), b.clone()), None, "{a:?} {b:?}");
    }
}

#[test]
fn similar_neighbours_increase_the_error() {
    let side = SideOfInterval::Without;
    let alternating: Vec<_> = (0..40).map(|n| (side, f64::from(n % 2))).collect();
    let drifting: Vec<_> = (0..40).map(|n| (side, f64::from(n / 20))).collect();
    assert_eq!(inflation(&alternating, (0.5, 0.0)), 1.0);
    assert!(inflation(&drifting, (0.5, 0.0)) > 10.0);
}
