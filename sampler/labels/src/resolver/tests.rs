//! One behaviour of the resolver per test.

use super::target::{BREAKER_ERRORS, SOCKET_IN_FLIGHT};
use super::*;
use crate::Label;
use sampler_core::cgroup_path::parse;
use strum::VariantArray as _;

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

pub(super) fn attempt(outcome: &Outcome) -> QueryAttempt {
    let status = match outcome {
        Outcome::Found(_) => QueryOutcome::Ok,
        Outcome::NotFound => QueryOutcome::NotFound,
        Outcome::NotQueried => QueryOutcome::NotTried,
        Outcome::Failed => QueryOutcome::Error,
    };
    QueryAttempt { status, at: None, detail: "".into() }
}

/// All labels that a container in a pod can have.
pub(super) fn all_labels() -> Facts {
    let mut facts = Facts { pod_status_known: true, ..Facts::default() };
    for &label in Label::VARIANTS {
        facts.set(label, Some(label.name()));
    }
    facts
}

fn plain() -> Outcome {
    let mut facts = Facts { pod_status_known: true, ..Facts::default() };
    facts.set(Label::Name, Some("n"));
    facts.set(Label::Image, Some("i"));
    Outcome::Found(facts)
}

fn resolver(sources: &[Source]) -> LabelResolver {
    let mut resolver = LabelResolver::default();
    for source in sources {
        resolver.add_target(*source, source.name(), true, BootNs(0));
    }
    resolver
}

fn ms(ms: u64) -> BootNs {
    BootNs(ms * MS)
}

/// Runs the clock from `from_ms` and completes each query with `reply`; returns the times of the queries in ms.
fn run_queries(
    resolver: &mut LabelResolver,
    from_ms: u64,
    until_ms: u64,
    reply: impl Fn(&Query, u64) -> Outcome,
) -> Vec<(u64, Source)> {
    let (mut queries, mut now) = (Vec::new(), ms(from_ms));
    loop {
        for query in resolver.due(now) {
            queries.push((now.0 / MS, query.source));
            let outcome = reply(&query, now.0 / MS);
            resolver.record_outcome(&query, &outcome, attempt(&outcome), now);
        }
        match resolver.next_due(now) {
            Some(next) if next.0 <= until_ms * MS => now = BootNs(next.0.max(now.0 + MS)),
            _ => return queries,
        }
    }
}

#[test]
fn files_are_queried_first_then_sockets_and_never_given_up() {
    let mut resolver = resolver(&[Source::DockerFile, Source::Docker]);
    resolver.appeared(docker(1), BootNs(0));
    let queries = run_queries(&mut resolver, 0, 400_000, |_, _| Outcome::NotFound);
    let files: Vec<u64> = queries.iter().filter(|a| a.1 == Source::DockerFile).map(|a| a.0).collect();
    assert_eq!(files[..2], [0, 250]);
    assert!((750..=1_250).contains(&files[2]) && files.iter().all(|at| at % 250 == 0), "{files:?}");
    assert_eq!(queries.iter().find(|a| a.1 == Source::Docker).map(|a| a.0), Some(250));
    assert!(files.windows(2).all(|w| w[1] - w[0] <= 30_000) && *files.last().unwrap() > 360_000, "{files:?}");
    assert!(files.windows(2).all(|w| w[1] - w[0] <= 1_000.max(w[0] / 4 + 1)), "a quarter of its age at most: {files:?}");
}

#[test]
fn complete_labels_end_the_queries_and_settle() {
    let mut resolver = resolver(&[Source::DockerFile, Source::Docker]);
    resolver.appeared(docker(1), BootNs(0));
    assert_eq!(run_queries(&mut resolver, 0, 100_000, |_, _| plain()), [(0, Source::DockerFile)]);
    let labels = resolver.labels(ContainerKey(1)).unwrap();
    assert!(labels.complete() && labels.settled && labels.resolved_after_ns == Some(0));
    assert_eq!((labels.text(Label::Name), labels.text(Label::Pod)), ("n", ""));
    let attempt = resolver.attempts(ContainerKey(1), ms(600));
    assert_eq!(
        attempt.iter().map(|t| (t.0, t.2.status)).collect::<Vec<_>>(),
        [(Source::DockerFile, QueryOutcome::Ok), (Source::Docker, QueryOutcome::NotTried)]
    );
}

#[test]
fn an_incomplete_pod_settles_after_two_seconds() {
    let mut resolver = resolver(&[Source::Bundle]);
    resolver.appeared(pod(1), BootNs(0));
    run_queries(&mut resolver, 0, 1_900, |_, _| Outcome::NotFound);
    assert!(!resolver.labels(ContainerKey(1)).unwrap().settled);
    resolver.due(ms(2_000));
    let labels = resolver.labels(ContainerKey(1)).unwrap();
    assert!(labels.settled && labels.missing().count() == 5 && labels.state() == "identified");
}

#[test]
fn sources_that_the_path_does_not_suggest_are_queried_later() {
    let mut resolver = resolver(&[Source::Docker, Source::Podman, Source::Cri, Source::Manifest]);
    resolver.appeared(docker(1), BootNs(0));
    let first = |queries: &[(u64, Source)], source| queries.iter().find(|a| a.1 == source).map(|a| a.0);
    let queries = run_queries(&mut resolver, 0, 10_000, |_, _| Outcome::NotFound);
    assert_eq!((first(&queries, Source::Docker), first(&queries, Source::Podman)), (Some(250), Some(5_000)));
    assert_eq!((first(&queries, Source::Cri), first(&queries, Source::Manifest)), (Some(5_000), None));
}

#[test]
fn a_hung_socket_is_queried_every_second_and_its_recovery_detected() {
    for fault in [3_000, 20_000, 50_000] {
        let mut resolver = resolver(&[Source::Docker]);
        resolver.appeared(docker(1), BootNs(0));
        let (mut now, mut queried_at, mut hung) = (BootNs(0), Vec::new(), Vec::<(BootNs, Query)>::new());
        while resolver.labels(ContainerKey(1)).is_some_and(|l| !l.complete()) && now < ms(90_000) {
            // The caller's timeout is 5 s.
            for (_, query) in hung.extract_if(.., |(record_sent, _)| now.saturating_since(*record_sent) >= 5_000 * MS) {
                resolver.record_outcome(&query, &Outcome::Failed, attempt(&Outcome::Failed), now);
            }
            for query in resolver.due(now) {
                queried_at.push(now.0 / MS);
                if now >= ms(fault) {
                    resolver.record_outcome(&query, &plain(), attempt(&plain()), now);
                } else {
                    hung.push((now, query));
                }
            }
            now = now.plus(10 * MS);
        }
        assert!(now < ms(fault + 1_200), "complete {} ms after a fault of {fault} ms", now.0 / MS - fault);
        assert!(queried_at.windows(2).all(|w| w[1] - w[0] >= 740), "{queried_at:?}");
    }
}

#[test]
fn all_containers_complete_two_seconds_after_a_fault_that_costs_a_probe_a_second() {
    for fault in [500, 5_000, 30_000] {
        let mut resolver = resolver(&[Source::Docker]);
        for key in 1..=50 {
            resolver.appeared(docker(key), BootNs(0));
        }
        let queries = run_queries(&mut resolver, 0, 60_000, |_, at| if at < fault { Outcome::Failed } else { plain() });
        let done = (1..=50).map(|k| resolver.labels(ContainerKey(k)).unwrap().resolved_after_ns.unwrap() / MS).max().unwrap();
        assert!(done <= fault + 1_100, "the last is complete at {done} ms after a fault of {fault} ms");
        let during = queries.iter().filter(|a| a.0 < fault).count() as u64;
        assert!(during <= 2 * u64::from(BREAKER_ERRORS) + fault / 700, "{during} queries in a fault of {fault} ms");
    }
}

#[test]
fn a_container_completes_two_seconds_after_the_endpoint_first_returns_it() {
    for fault in [300, 2_000, 5_000, 8_000] {
        let mut resolver = resolver(&[Source::Docker]);
        resolver.appeared(docker(1), BootNs(0));
        run_queries(&mut resolver, 0, 60_000, |_, at| if at < fault { Outcome::NotFound } else { plain() });
        let done = resolver.labels(ContainerKey(1)).unwrap().resolved_after_ns.unwrap() / MS;
        assert!(done <= fault + 2_000, "complete at {done} ms after a fault of {fault} ms");
    }
}

#[test]
fn a_socket_that_appears_after_an_hour_is_queried_for_all_containers_at_once() {
    let mut resolver = LabelResolver::default();
    let id = resolver.add_target(Source::Cri, "unix:///x", false, BootNs(0));
    for key in 1..=500 {
        resolver.appeared(pod(key), BootNs(0));
    }
    let hour = 3_600_000;
    assert_eq!(run_queries(&mut resolver, 0, hour, |_, _| Outcome::NotFound), [], "the endpoint is absent");
    assert_eq!(resolver.attempts(ContainerKey(1), ms(600))[0].2.status, QueryOutcome::NotTried);
    resolver.endpoint_present(id, ms(hour));
    let all = run_queries(&mut resolver, hour, hour, |_, _| Outcome::Found(all_labels()));
    // The others in steps of a millisecond, a few at a time.
    let more = run_queries(&mut resolver, hour, hour + 500, |_, _| Outcome::Found(all_labels()));
    assert_eq!(all.len() + more.len(), 500);
    assert!((1..=500).all(|k| resolver.labels(ContainerKey(k)).unwrap().complete()));
}

#[test]
fn containers_that_are_gone_are_queried_at_once_until_one_result_and_for_ten_seconds() {
    let mut resolver = resolver(&[Source::Docker]);
    for key in [1, 2] {
        resolver.appeared(docker(key), BootNs(0));
    }
    assert_eq!(run_queries(&mut resolver, 0, 200, |_, _| Outcome::NotFound), []);
    resolver.gone(ContainerKey(1), ms(200), ms(201));
    resolver.evicted(ContainerKey(2));
    let queries = run_queries(&mut resolver, 201, 60_000, |_, _| Outcome::Failed);
    assert_eq!(queries.first(), Some(&(201, Source::Docker)));
    assert!((8_000..10_201).contains(&queries.last().unwrap().0), "{queries:?}");
    resolver.evicted(ContainerKey(1));
    assert!(resolver.labels(ContainerKey(1)).is_none() && resolver.next_due(ms(90_000)).is_none());
    assert!(
        resolver.entries.is_empty() && resolver.by_id.is_empty() && resolver.queue.is_empty() && resolver.settling.is_empty()
    );
    assert!(resolver.unresolved.is_empty() && !resolver.has_unresolved(ms(90_000)));
}

/// An engine has the record of a container before it makes the cgroup.
#[test]
fn an_engine_that_did_not_know_a_container_is_not_queried_after_the_end() {
    let mut resolver = resolver(&[Source::Docker]);
    resolver.appeared(docker(1), BootNs(0));
    assert_eq!(run_queries(&mut resolver, 0, 400, |_, _| Outcome::NotFound), [(250, Source::Docker)]);
    resolver.gone(ContainerKey(1), ms(400), ms(401));
    assert_eq!(run_queries(&mut resolver, 401, 30_000, |_, _| Outcome::NotFound), []);
}

#[test]
fn a_runtime_that_records_late_is_queried_after_the_end() {
    let mut resolver = resolver(&[Source::Cri]);
    resolver.appeared(pod(1), BootNs(0));
    // A query that was sent before the end counts as before.
    let sent_before = resolver.due(ms(250)).remove(0);
    resolver.gone(ContainerKey(1), ms(300), ms(301));
    resolver.record_outcome(&sent_before, &Outcome::NotFound, attempt(&Outcome::NotFound), ms(302));
    let queries = run_queries(&mut resolver, 303, 30_000, |_, _| Outcome::NotFound);
    assert!(matches!(queries[..], [(303..1_000, Source::Cri)]), "{queries:?}");
}

#[test]
fn a_search_is_for_containers_that_stay_unresolved() {
    let mut resolver = resolver(&[Source::DockerFile]);
    resolver.appeared(docker(1), BootNs(0));
    resolver.appeared(docker(2), ms(300));
    assert!(!resolver.has_unresolved(ms(499)) && resolver.has_unresolved(ms(500)));
    let query = resolver.due(ms(500)).remove(0);
    resolver.record_outcome(&query, &Outcome::Found(all_labels()), attempt(&Outcome::Found(all_labels())), ms(500));
    assert!(!resolver.has_unresolved(ms(799)) && resolver.has_unresolved(ms(800)));
}

#[test]
fn files_of_containers_that_are_gone_are_read_until_one_result() {
    let mut resolver = resolver(&[Source::DockerFile]);
    resolver.appeared(docker(1), BootNs(0));
    resolver.gone(ContainerKey(1), ms(1), ms(1));
    let outcome = |_: &Query, at| if at < 1_000 { Outcome::Failed } else { Outcome::NotFound };
    let queries = run_queries(&mut resolver, 1, 60_000, outcome);
    assert!(queries.len() > 2 && queries.last().is_some_and(|a| (1_000..2_000).contains(&a.0)), "{queries:?}");
    // The location of the files is found only after the container's end.
    resolver.endpoint_present(TargetId(0), ms(4_000));
    assert_eq!(run_queries(&mut resolver, 4_000, 60_000, |_, _| plain()).len(), 1);
}

#[test]
fn hints_do_not_multiply_queries() {
    let mut resolver = resolver(&[Source::DockerFile, Source::Docker]);
    resolver.appeared(docker(1), BootNs(0));
    let mut queries = resolver.due(ms(0)).len();
    for at in 0..900 {
        resolver.hint(&format!("{:064x}", 1), ms(at));
        queries += resolver.due(ms(at)).len();
    }
    assert_eq!(queries, 2, "one file read and one socket query are pending");
    let target = &resolver.targets[1];
    assert_eq!(target.open_queries(), (1, 1));
    const { assert!(SOCKET_IN_FLIGHT > 1) };
}

#[test]
fn authority_decides_and_empty_values_never_overwrite() {
    let mut resolver = resolver(&[Source::Logs, Source::Kubelet, Source::Bundle, Source::Cri]);
    resolver.appeared(pod(1), BootNs(0));
    let reported = |name: &str, image: &str| {
        let mut facts = Facts::default();
        facts.set(Label::Pod, Some(name));
        facts.set(Label::Image, Some(image));
        Outcome::Found(facts)
    };
    let reply = |query: &Query, _| match query.source {
        Source::Logs => reported("from-logs", "logs"),
        Source::Kubelet => reported("from-kubelet", ""),
        Source::Bundle => reported("from-bundle", ""),
        _ => reported("", "from-cri"),
    };
    run_queries(&mut resolver, 0, 3_000, reply);
    let labels = resolver.labels(ContainerKey(1)).unwrap();
    assert_eq!((labels.text(Label::Pod), labels.text(Label::Image)), ("from-bundle", "from-cri"));
    assert_eq!(labels.state(), "partial");
}

#[test]
fn not_queried_does_not_count_as_a_response_of_the_endpoint() {
    let mut resolver = resolver(&[Source::Docker]);
    for key in 1..=10 {
        resolver.appeared(docker(key), BootNs(0));
    }
    let outcome = |query: &Query, _| if query.key.0 == 1 { Outcome::NotQueried } else { Outcome::Failed };
    run_queries(&mut resolver, 0, 5_000, outcome);
    assert!(resolver.targets[0].is_open(), "a container that is not queried does not keep the breaker closed");
}

#[test]
fn labels_are_queried_again_when_the_pod_is_learned_last() {
    let mut resolver = resolver(&[Source::Bundle, Source::Logs]);
    resolver.appeared(record(1, &format!("/x/{:064x}", 1)), BootNs(0));
    let first = resolver.due(ms(0)).remove(0);
    let second = resolver.due(ms(250)).remove(0);
    let mut named = Facts { runtime: Some(sampler_core::cgroup_path::Runtime::Docker), ..Facts::default() };
    named.set(Label::Name, Some("n"));
    named.set(Label::Image, Some("i"));
    assert!(resolver.record_outcome(&first, &Outcome::Found(named), attempt(&Outcome::NotFound), ms(260)));
    let uid = Facts { pod_uid: Some("u".into()), ..Facts::default() };
    assert!(!resolver.record_outcome(&second, &Outcome::Found(uid), attempt(&Outcome::NotFound), ms(270)));
    assert_eq!(resolver.labels(ContainerKey(1)).unwrap().missing().count(), 3);
    let repeated = run_queries(&mut resolver, 270, 3_000, |_, _| Outcome::NotFound);
    assert!(repeated.iter().any(|a| a.1 == Source::Bundle) && repeated.iter().any(|a| a.1 == Source::Logs), "{repeated:?}");
}

#[test]
fn a_cgroup_inside_a_container_does_not_get_the_labels_of_another() {
    let mut resolver = resolver(&[Source::Docker]);
    resolver.appeared(docker(1), BootNs(0));
    let inside = format!("/docker/{:064x}/docker-{:064x}.scope", 2, 1);
    resolver.appeared(record(3, &inside), BootNs(0));
    let queries = run_queries(&mut resolver, 0, 60_000, |_, _| plain());
    assert_eq!(queries.len(), 1);
    assert_eq!(resolver.labels(ContainerKey(3)).map(|labels| labels.state()), Some("identified"));
    // In the other order: labels that the nested container received meanwhile are removed.
    resolver.appeared(record(5, &format!("/docker/{:064x}/docker-{:064x}.scope", 2, 6)), ms(60_000));
    run_queries(&mut resolver, 60_000, 61_000, |_, _| plain());
    assert_eq!(resolver.labels(ContainerKey(5)).map(|labels| labels.state()), Some("complete"));
    resolver.appeared(docker(6), ms(61_000));
    assert_eq!(resolver.labels(ContainerKey(5)).map(|labels| labels.state()), Some("identified"));
    run_queries(&mut resolver, 61_000, 62_000, |_, _| plain());
    assert_eq!(resolver.labels(ContainerKey(6)).map(|labels| labels.state()), Some("complete"));
    // A query that was pending when the forgery was detected has no effect.
    resolver.appeared(record(7, &format!("/docker/{:064x}/docker-{:064x}.scope", 2, 8)), ms(62_000));
    let under_way = resolver.due(ms(62_300)).remove(0);
    resolver.appeared(docker(8), ms(62_400));
    resolver.record_outcome(&under_way, &plain(), attempt(&plain()), ms(62_500));
    assert_eq!(resolver.labels(ContainerKey(7)).map(|labels| labels.state()), Some("identified"));
    // A nested cgroup with a unique id may belong to the host's runtime: runners place their jobs in their own cgroup.
    resolver.appeared(record(4, &format!("/docker/{:064x}/{:064x}", 2, 4)), ms(60_000));
    assert!(resolver.entries[&ContainerKey(4)].needs_queries(ms(60_000)));
}

#[test]
fn a_retired_target_is_neither_queried_nor_listed() {
    let mut resolver = resolver(&[Source::Docker, Source::Cri]);
    resolver.appeared(pod(1), BootNs(0));
    resolver.retire(TargetId(0));
    assert_eq!(run_queries(&mut resolver, 0, 900, |_, _| Outcome::NotFound).iter().filter(|a| a.1 == Source::Docker).count(), 0);
    assert_eq!((resolver.targets().count(), resolver.attempts(ContainerKey(1), ms(600)).len()), (1, 1));
    resolver.appeared(pod(2), ms(900));
    assert_eq!(resolver.attempts(ContainerKey(2), ms(600)).len(), 1);
    resolver.endpoint_present(TargetId(0), ms(900));
    assert!(!resolver.is_present(TargetId(0)), "a retired target stays retired");
    assert_eq!(resolver.retired(Source::Docker, "docker"), Some(TargetId(0)));
    resolver.revive(TargetId(0), true, ms(10_000));
    let repeated = run_queries(&mut resolver, 10_000, 10_500, |_, _| Outcome::NotFound);
    assert_eq!(repeated.iter().filter(|a| a.1 == Source::Docker).count(), 2, "{repeated:?}");
}

#[test]
fn dockershim_names_fill_empty_values() {
    let mut facts = Facts::default();
    facts.from_dockershim_name("k8s_train_trainer-0_prod_8bb25662-de9a-11e9-84e7-f8f21e04010c_0");
    assert_eq!(facts.labels[Label::Namespace as usize].as_deref(), Some("prod"));
    assert_eq!(facts.labels[Label::Container as usize].as_deref(), Some("train"));
    let before = facts.clone();
    facts.from_dockershim_name("k8s_not_enough");
    assert_eq!(facts, before);
}

#[test]
fn a_pod_and_a_job_in_a_container_have_the_names_that_a_container_knows() {
    let container = pod(1);
    let id = container.identity.container_id.clone().unwrap();
    let mut resolver = resolver(&[Source::Bundle, Source::Logs, Source::Environ]);
    assert!(!resolver.appeared(Arc::clone(&container), BootNs(0)));
    let own_cgroup = "/kubepods/pod8bb25662-de9a-11e9-84e7-f8f21e04010c";
    assert!(!resolver.appeared(record(2, own_cgroup), BootNs(0)), "its names are missing");
    assert!(
        resolver.appeared(record(3, &format!("{own_cgroup}/{id}/slurmstepd.scope/job_7")), BootNs(0)),
        "a job has no names of its own"
    );
    assert!(resolver.appeared(record(4, "/system.slice/x.service"), BootNs(0)));
    let queried = run_queries(&mut resolver, 0, 1_000, |query, _| match query.source {
        Source::Bundle => Outcome::Found(all_labels()),
        _ => Outcome::NotFound,
    });
    let sources = |source: Source| queried.iter().filter(|(_, queried)| *queried == source).count();
    assert!(sources(Source::Bundle) == 1 && sources(Source::Environ) > 0, "{queried:?}");
    for (key, container_id) in [(2, "8bb25662-de9a-11e9-84e7-f8f21e04010c".to_owned()), (3, format!("{}/slurm/7", &id[..12]))] {
        let labels = resolver.labels(ContainerKey(key)).unwrap();
        assert_eq!(
            (labels.text(Label::Namespace), labels.text(Label::Pod), labels.text(Label::Container)),
            ("namespace", "pod", "")
        );
        assert!(labels.complete() && labels.settled && *labels.container_id == container_id, "{labels:?}");
    }
    // A pod that appears later has them at once.
    assert!(!resolver.appeared(record(5, own_cgroup), BootNs(0)));
    assert!(resolver.labels(ContainerKey(5)).unwrap().complete());
    assert_eq!(resolver.labels(ContainerKey(4)).unwrap().text(Label::Namespace), "");
}

#[test]
fn a_specification_is_looked_for_twice_also_if_a_socket_knows_the_container_first() {
    let mut resolver = resolver(&[Source::Bundle, Source::Cri]);
    // The second round of files is at 500, the socket's turn before.
    resolver.appeared(pod(1), ms(151));
    let reply = |query: &Query, _| match query.source {
        Source::Cri => Outcome::Found(all_labels()),
        _ => Outcome::NotFound,
    };
    let queries = run_queries(&mut resolver, 151, 60_000, reply);
    assert_eq!(queries, [(151, Source::Bundle), (401, Source::Cri), (500, Source::Bundle)]);
    assert!(resolver.labels(ContainerKey(1)).unwrap().complete());
    // New folders of runtimes may have it.
    resolver.endpoint_present(TargetId(0), ms(61_000));
    let queries = run_queries(&mut resolver, 61_000, 90_000, |_, _| Outcome::Found(Facts::default()));
    assert_eq!(queries, [(61_000, Source::Bundle)]);
}

#[test]
fn files_of_a_container_that_ends_early_are_read_again_once() {
    let mut resolver = resolver(&[Source::Bundle, Source::Mountinfo]);
    resolver.appeared(pod(1), ms(0));
    assert_eq!(run_queries(&mut resolver, 0, 40, |_, _| Outcome::NotFound), [(0, Source::Bundle)]);
    resolver.gone(ContainerKey(1), ms(50), ms(60));
    assert_eq!(run_queries(&mut resolver, 60, 20_000, |_, _| Outcome::NotFound), [(60, Source::Bundle)]);
}
