//! Rows: one behaviour of the ladder each.

use super::target::{BREAKER_ERRORS, SOCKET_IN_FLIGHT};
use super::*;
use crate::Label;
use sampler_core::cgroup_path::parse;

pub(super) fn record(key: u64, path: &str) -> Arc<ContainerRecord> {
    let identity = parse(path);
    let (key, created) = (ContainerKey(key), BootNs(0));
    Arc::new(ContainerRecord { key, cgroup_path: path.into(), identity, created, creation_seen: true })
}

pub(super) fn docker(key: u64) -> Arc<ContainerRecord> {
    record(key, &format!("/docker/{key:064x}"))
}

pub(super) fn pod(key: u64) -> Arc<ContainerRecord> {
    record(key, &format!("/kubepods/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{key:064x}"))
}

pub(super) fn tried(outcome: &Outcome) -> QueryAttempt {
    let told = match outcome {
        Outcome::Found(_) => QueryOutcome::Ok,
        Outcome::NotFound => QueryOutcome::NotFound,
        Outcome::NotAsked => QueryOutcome::NotTried,
        Outcome::Failed => QueryOutcome::Error,
    };
    QueryAttempt { told, at: None, detail: "".into() }
}

/// Everything that a container in a pod can have.
pub(super) fn all_labels() -> Facts {
    let mut facts = Facts { knows_pods: true, ..Facts::default() };
    for label in Label::ALL {
        facts.set(label, Some(label.name()));
    }
    facts
}

fn plain() -> Outcome {
    let mut facts = Facts { knows_pods: true, ..Facts::default() };
    facts.set(Label::Name, Some("n"));
    facts.set(Label::Image, Some("i"));
    Outcome::Found(facts)
}

fn ladder(sources: &[Source]) -> LabelResolver {
    let mut ladder = LabelResolver::default();
    for source in sources {
        ladder.add_target(*source, source.name(), true, BootNs(0));
    }
    ladder
}

fn ms(ms: u64) -> BootNs {
    BootNs(ms * MS)
}

/// Runs the clock from `from_ms`, answering each question with `answer`; returns when each was asked, in ms.
fn asked(ladder: &mut LabelResolver, from_ms: u64, until_ms: u64, answer: impl Fn(&Query, u64) -> Outcome) -> Vec<(u64, Source)> {
    let (mut seen, mut now) = (Vec::new(), ms(from_ms));
    loop {
        for ask in ladder.due(now) {
            seen.push((now.0 / MS, ask.source));
            let outcome = answer(&ask, now.0 / MS);
            ladder.answered(&ask, &outcome, tried(&outcome), now);
        }
        match ladder.next_due(now) {
            Some(next) if next.0 <= until_ms * MS => now = BootNs(next.0.max(now.0 + MS)),
            _ => return seen,
        }
    }
}

#[test]
fn files_first_then_sockets_then_for_ever() {
    let mut ladder = ladder(&[Source::DockerFile, Source::Docker]);
    ladder.appeared(docker(1), BootNs(0));
    let asked = asked(&mut ladder, 0, 400_000, |_, _| Outcome::NotFound);
    let files: Vec<u64> = asked.iter().filter(|a| a.1 == Source::DockerFile).map(|a| a.0).collect();
    assert_eq!(files[..5], [0, 10, 30, 100, 300]);
    assert!((675..=801).contains(&files[5]), "{files:?}");
    assert_eq!(asked.iter().find(|a| a.1 == Source::Docker).map(|a| a.0), Some(250));
    assert!(files.windows(2).all(|w| w[1] - w[0] <= 30_000) && *files.last().unwrap() > 360_000, "{files:?}");
    assert!(files.windows(2).all(|w| w[1] - w[0] <= 500.max(w[0] / 4 + 1)), "a quarter of its age at most: {files:?}");
}

#[test]
fn complete_ends_the_asking_and_settles() {
    let mut ladder = ladder(&[Source::DockerFile, Source::Docker]);
    ladder.appeared(docker(1), BootNs(0));
    assert_eq!(asked(&mut ladder, 0, 100_000, |_, _| plain()), [(0, Source::DockerFile)]);
    let labels = ladder.labels(ContainerKey(1)).unwrap();
    assert!(labels.complete() && labels.settled && labels.resolved_after_ns == Some(0));
    assert_eq!((labels.text(Label::Name), labels.text(Label::Pod)), ("n", ""));
    let tried = ladder.tried(ContainerKey(1), ms(600));
    assert_eq!(
        tried.iter().map(|t| (t.0, t.2.told)).collect::<Vec<_>>(),
        [(Source::DockerFile, QueryOutcome::Ok), (Source::Docker, QueryOutcome::NotTried)]
    );
}

#[test]
fn a_pod_without_its_names_is_shown_after_two_seconds_and_counted() {
    let mut ladder = ladder(&[Source::Bundle]);
    ladder.appeared(pod(1), BootNs(0));
    asked(&mut ladder, 0, 1_900, |_, _| Outcome::NotFound);
    assert!(!ladder.labels(ContainerKey(1)).unwrap().settled);
    ladder.due(ms(2_000));
    let labels = ladder.labels(ContainerKey(1)).unwrap();
    assert!(labels.settled && labels.missing().count() == 5 && labels.state() == "identified");
}

#[test]
fn whom_the_path_does_not_suggest_is_asked_later_and_none_is_left_out() {
    let mut ladder = ladder(&[Source::Docker, Source::Podman, Source::Cri, Source::Manifest]);
    ladder.appeared(docker(1), BootNs(0));
    let first = |asked: &[(u64, Source)], source| asked.iter().find(|a| a.1 == source).map(|a| a.0);
    let asked = asked(&mut ladder, 0, 10_000, |_, _| Outcome::NotFound);
    assert_eq!((first(&asked, Source::Docker), first(&asked, Source::Podman)), (Some(250), Some(5_000)));
    assert_eq!((first(&asked, Source::Cri), first(&asked, Source::Manifest)), (Some(5_000), None));
}

#[test]
fn a_socket_that_hangs_is_asked_again_every_second_and_noticed_when_it_recovers() {
    for fault in [3_000, 20_000, 50_000] {
        let mut ladder = ladder(&[Source::Docker]);
        ladder.appeared(docker(1), BootNs(0));
        let (mut now, mut asked_at, mut hung) = (BootNs(0), Vec::new(), Vec::<(BootNs, Query)>::new());
        while ladder.labels(ContainerKey(1)).is_some_and(|l| !l.complete()) && now < ms(90_000) {
            // Whoever asks gives up after 5 s.
            for (_, ask) in hung.extract_if(.., |(put, _)| now.saturating_since(*put) >= 5_000 * MS) {
                ladder.answered(&ask, &Outcome::Failed, tried(&Outcome::Failed), now);
            }
            for ask in ladder.due(now) {
                asked_at.push(now.0 / MS);
                if now >= ms(fault) {
                    ladder.answered(&ask, &plain(), tried(&plain()), now);
                } else {
                    hung.push((now, ask));
                }
            }
            now = now.plus(10 * MS);
        }
        assert!(now < ms(fault + 1_200), "complete {} ms after a fault of {fault} ms", now.0 / MS - fault);
        assert!(asked_at.windows(2).all(|w| w[1] - w[0] >= 740), "{asked_at:?}");
    }
}

#[test]
fn an_error_ends_within_two_seconds_of_the_fault_for_all_and_costs_a_probe_a_second() {
    for fault in [500, 5_000, 30_000] {
        let mut ladder = ladder(&[Source::Docker]);
        for key in 1..=50 {
            ladder.appeared(docker(key), BootNs(0));
        }
        let asked = asked(&mut ladder, 0, 60_000, |_, at| if at < fault { Outcome::Failed } else { plain() });
        let done = (1..=50).map(|k| ladder.labels(ContainerKey(k)).unwrap().resolved_after_ns.unwrap() / MS).max().unwrap();
        assert!(done <= fault + 1_100, "the last is complete at {done} ms after a fault of {fault} ms");
        let during = asked.iter().filter(|a| a.0 < fault).count() as u64;
        assert!(during <= 2 * u64::from(BREAKER_ERRORS) + fault / 700, "{during} questions in a fault of {fault} ms");
    }
}

#[test]
fn a_container_that_an_endpoint_does_not_know_yet_is_complete_within_two_seconds_of_its_knowing() {
    for fault in [300, 2_000, 5_000, 8_000] {
        let mut ladder = ladder(&[Source::Docker]);
        ladder.appeared(docker(1), BootNs(0));
        asked(&mut ladder, 0, 60_000, |_, at| if at < fault { Outcome::NotFound } else { plain() });
        let done = ladder.labels(ContainerKey(1)).unwrap().resolved_after_ns.unwrap() / MS;
        assert!(done <= fault + 2_000, "complete at {done} ms after a fault of {fault} ms");
    }
}

#[test]
fn a_socket_that_appears_after_an_hour_is_asked_about_everyone_at_once() {
    let mut ladder = LabelResolver::default();
    let id = ladder.add_target(Source::Cri, "unix:///x", false, BootNs(0));
    for key in 1..=500 {
        ladder.appeared(pod(key), BootNs(0));
    }
    let hour = 3_600_000;
    assert_eq!(asked(&mut ladder, 0, hour, |_, _| Outcome::NotFound), [], "nobody is there to be asked");
    assert_eq!(ladder.tried(ContainerKey(1), ms(600))[0].2.told, QueryOutcome::NotTried);
    ladder.endpoint_back(id, ms(hour));
    let all = asked(&mut ladder, hour, hour, |_, _| Outcome::Found(all_labels()));
    // In steps of a millisecond, a few at a time.
    let more = asked(&mut ladder, hour, hour + 500, |_, _| Outcome::Found(all_labels()));
    assert_eq!(all.len() + more.len(), 500);
    assert!((1..=500).all(|k| ladder.labels(ContainerKey(k)).unwrap().complete()));
}

#[test]
fn the_gone_are_asked_about_at_once_and_for_ten_seconds() {
    let mut ladder = ladder(&[Source::Docker]);
    ladder.appeared(docker(1), BootNs(0));
    ladder.gone(ContainerKey(1), ms(50), ms(51));
    let asked = asked(&mut ladder, 51, 60_000, |_, _| Outcome::NotFound);
    assert_eq!(asked.first(), Some(&(51, Source::Docker)));
    assert!((8_000..10_051).contains(&asked.last().unwrap().0), "{asked:?}");
    ladder.evicted(ContainerKey(1));
    assert!(ladder.labels(ContainerKey(1)).is_none() && ladder.next_due(ms(60_000)).is_none());
    assert!(ladder.entries.is_empty() && ladder.by_id.is_empty() && ladder.queue.is_empty() && ladder.shown.is_empty());
}

#[test]
fn files_of_the_gone_are_looked_for_until_they_were_looked_at() {
    let mut ladder = ladder(&[Source::DockerFile]);
    ladder.appeared(docker(1), BootNs(0));
    ladder.gone(ContainerKey(1), ms(1), ms(1));
    let outcome = |_: &Query, at| if at < 1_000 { Outcome::Failed } else { Outcome::NotFound };
    let questions = asked(&mut ladder, 1, 60_000, outcome);
    assert!(questions.len() > 2 && questions.last().is_some_and(|a| (1_000..2_000).contains(&a.0)), "{questions:?}");
    // Where they are was found only after its end.
    ladder.endpoint_back(TargetId(0), ms(4_000));
    assert_eq!(asked(&mut ladder, 4_000, 60_000, |_, _| plain()).len(), 1);
}

#[test]
fn hints_do_not_multiply_questions() {
    let mut ladder = ladder(&[Source::DockerFile, Source::Docker]);
    ladder.appeared(docker(1), BootNs(0));
    let mut asks = ladder.due(ms(0)).len();
    for at in 0..900 {
        ladder.hint(&format!("{:064x}", 1), ms(at));
        asks += ladder.due(ms(at)).len();
    }
    assert_eq!(asks, 2, "one file read and one question are open");
    let target = &ladder.targets[1];
    assert_eq!(target.open_questions(), (1, 1));
    const { assert!(SOCKET_IN_FLIGHT > 1) };
}

#[test]
fn authority_decides_and_blank_never_overwrites() {
    let mut ladder = ladder(&[Source::Logs, Source::Kubelet, Source::Bundle, Source::Cri]);
    ladder.appeared(pod(1), BootNs(0));
    let say = |name: &str, image: &str| {
        let mut facts = Facts::default();
        facts.set(Label::Pod, Some(name));
        facts.set(Label::Image, Some(image));
        Outcome::Found(facts)
    };
    let told = |ask: &Query, _| match ask.source {
        Source::Logs => say("from-logs", "logs"),
        Source::Kubelet => say("from-kubelet", ""),
        Source::Bundle => say("from-bundle", ""),
        _ => say("", "from-cri"),
    };
    asked(&mut ladder, 0, 3_000, told);
    let labels = ladder.labels(ContainerKey(1)).unwrap();
    assert_eq!((labels.text(Label::Pod), labels.text(Label::Image)), ("from-bundle", "from-cri"));
    assert_eq!(labels.state(), "partial");
}

#[test]
fn what_was_not_asked_says_nothing_about_the_endpoint() {
    let mut ladder = ladder(&[Source::Docker]);
    for key in 1..=10 {
        ladder.appeared(docker(key), BootNs(0));
    }
    let outcome = |ask: &Query, _| if ask.key.0 == 1 { Outcome::NotAsked } else { Outcome::Failed };
    asked(&mut ladder, 0, 5_000, outcome);
    assert!(ladder.targets[0].is_open(), "one that could not be asked about keeps nobody's breaker closed");
}

#[test]
fn a_pod_that_is_told_of_late_is_asked_about_again() {
    let mut ladder = ladder(&[Source::Bundle, Source::Logs]);
    ladder.appeared(record(1, &format!("/x/{:064x}", 1)), BootNs(0));
    let first = ladder.due(ms(0)).remove(0);
    let second = ladder.due(ms(30)).remove(0);
    let mut named = Facts { runtime: Some(sampler_core::cgroup_path::Runtime::Docker), ..Facts::default() };
    named.set(Label::Name, Some("n"));
    named.set(Label::Image, Some("i"));
    assert!(ladder.answered(&first, &Outcome::Found(named), tried(&Outcome::NotFound), ms(40)));
    let uid = Facts { pod_uid: Some("u".into()), ..Facts::default() };
    assert!(!ladder.answered(&second, &Outcome::Found(uid), tried(&Outcome::NotFound), ms(50)));
    assert_eq!(ladder.labels(ContainerKey(1)).unwrap().missing().count(), 3);
    let again = asked(&mut ladder, 50, 3_000, |_, _| Outcome::NotFound);
    assert!(again.iter().any(|a| a.1 == Source::Bundle) && again.iter().any(|a| a.1 == Source::Logs), "{again:?}");
}

#[test]
fn a_cgroup_inside_a_container_does_not_get_the_labels_of_another() {
    let mut ladder = ladder(&[Source::Docker]);
    ladder.appeared(docker(1), BootNs(0));
    let inside = format!("/docker/{:064x}/docker-{:064x}.scope", 2, 1);
    ladder.appeared(record(3, &inside), BootNs(0));
    let questions = asked(&mut ladder, 0, 60_000, |_, _| plain());
    assert_eq!(questions.len(), 1);
    assert_eq!(ladder.labels(ContainerKey(3)).map(ContainerLabels::state), Some("identified"));
    // Seen in the other order: what it was given meanwhile is taken back.
    ladder.appeared(record(5, &format!("/docker/{:064x}/docker-{:064x}.scope", 2, 6)), ms(60_000));
    asked(&mut ladder, 60_000, 61_000, |_, _| plain());
    assert_eq!(ladder.labels(ContainerKey(5)).map(ContainerLabels::state), Some("complete"));
    ladder.appeared(docker(6), ms(61_000));
    assert_eq!(ladder.labels(ContainerKey(5)).map(ContainerLabels::state), Some("identified"));
    asked(&mut ladder, 61_000, 62_000, |_, _| plain());
    assert_eq!(ladder.labels(ContainerKey(6)).map(ContainerLabels::state), Some("complete"));
    // And what was under way when it was found out names nobody.
    ladder.appeared(record(7, &format!("/docker/{:064x}/docker-{:064x}.scope", 2, 8)), ms(62_000));
    let under_way = ladder.due(ms(62_300)).remove(0);
    ladder.appeared(docker(8), ms(62_400));
    ladder.answered(&under_way, &plain(), tried(&plain()), ms(62_500));
    assert_eq!(ladder.labels(ContainerKey(7)).map(ContainerLabels::state), Some("identified"));
    // Whose id nobody else has may have been made by the host's runtime: runners place their jobs in their own cgroup.
    ladder.appeared(record(4, &format!("/docker/{:064x}/{:064x}", 2, 4)), ms(60_000));
    assert!(ladder.entries[&ContainerKey(4)].is_asked_about(ms(60_000)));
}

#[test]
fn who_is_retired_is_not_spoken_of() {
    let mut ladder = ladder(&[Source::Docker, Source::Cri]);
    ladder.appeared(pod(1), BootNs(0));
    ladder.retire(TargetId(0));
    assert_eq!(asked(&mut ladder, 0, 900, |_, _| Outcome::NotFound).iter().filter(|a| a.1 == Source::Docker).count(), 0);
    assert_eq!((ladder.targets().count(), ladder.tried(ContainerKey(1), ms(600)).len()), (1, 1));
    ladder.appeared(pod(2), ms(900));
    assert_eq!(ladder.tried(ContainerKey(2), ms(600)).len(), 1);
    ladder.endpoint_back(TargetId(0), ms(900));
    assert!(!ladder.is_present(TargetId(0)), "the retired stay so");
    assert_eq!(ladder.retired(Source::Docker, "docker"), Some(TargetId(0)));
    ladder.revive(TargetId(0), true, ms(10_000));
    let again = asked(&mut ladder, 10_000, 10_500, |_, _| Outcome::NotFound);
    assert_eq!(again.iter().filter(|a| a.1 == Source::Docker).count(), 2, "{again:?}");
}

#[test]
fn dockershim_names_fill_what_is_empty() {
    let mut facts = Facts::default();
    facts.from_dockershim_name("k8s_train_trainer-0_prod_8bb25662-de9a-11e9-84e7-f8f21e04010c_0");
    assert_eq!(facts.labels[Label::Namespace as usize].as_deref(), Some("prod"));
    assert_eq!(facts.labels[Label::Container as usize].as_deref(), Some("train"));
    let before = facts.clone();
    facts.from_dockershim_name("k8s_not_enough");
    assert_eq!(facts, before);
}
