use super::super::layout::columns;
use super::super::page::TextOptions;
use super::super::sample;
use super::*;

const WIDE: TextOptions = TextOptions { width: None, colour: false, unicode: true };

/// The session of the next day: the server has a new pod, the notebook is absent, and the trainer is mostly alone.
fn next_day() -> Report {
    let mut report = sample::report();
    report.start.0 += 86_400_000_000_000;
    report.gaps.clear();
    let server = &mut report.users[1];
    server.id = "/kubepods/burstable/podfeed/01".to_owned();
    server.pod = "llm-server-6d5f7c9b8-abcde".to_owned();
    server.gpus[0].gpu_seconds = 3.1;
    let trainer = &mut report.users[0].gpus[0];
    trainer.gpu_seconds = 49.0;
    trainer.contenders[0].id = "/kubepods/burstable/podfeed/01".to_owned();
    trainer.contenders[0].evidence = Evidence::Coactive;
    report.users.remove(2);
    report
}

#[test]
fn comparison_texts_match_the_golden_files() {
    let comparison = compare(&sample::report(), &next_day());
    insta::assert_snapshot!("compare", comparison.text(&WIDE));
    insta::assert_snapshot!("compare_narrow", comparison.text(&TextOptions { width: Some(60), unicode: false, ..WIDE }));
}

#[test]
fn a_report_does_not_differ_from_itself() {
    let report = sample::report();
    let comparison = compare(&report, &report);
    assert_eq!(comparison.users.len(), report.users.len());
    assert!(comparison.only_a.is_empty() && comparison.only_b.is_empty() && comparison.ambiguous.is_empty());
    assert!(comparison.users.iter().all(|user| user.matched_by == UserMatch::Id));
    assert!(
        comparison.users.iter().flat_map(|user| &user.gpus).all(|pair| !pair.exceeds_two_errors && pair.difference == Some(0.0))
    );
}

#[test]
fn users_are_matched_by_the_most_certain_key() {
    let cases = [
        // (id, namespace, pod, container, image) in A and in B.
        (["/1", "ns", "p-1", "c", "i"], ["/1", "", "", "", ""], Some(UserMatch::Id)),
        (["/1", "ns", "p-1", "c", "i"], ["/2", "ns", "p-1", "c", "j"], Some(UserMatch::Pod)),
        (["/1", "ns", "p-1", "c", "i"], ["/2", "ns", "p-2", "c", "i"], Some(UserMatch::Image)),
        (["/1", "ns", "p-1", "c", "i"], ["/2", "other", "p-1", "c", "i"], None),
        (["/1", "", "", "", ""], ["/2", "", "", "", ""], None),
    ];
    let report_of = |[id, namespace, pod, container, image]: [&str; 5]| {
        let mut user = sample::pod(id, namespace, pod, container, image);
        user.name = format!("{namespace} {pod}").trim().to_owned();
        Report { users: vec![user], ..sample::report() }
    };
    for (a, b, expect) in cases {
        let comparison = compare(&report_of(a), &report_of(b));
        assert_eq!(comparison.users.first().map(|user| user.matched_by), expect, "{a:?} {b:?}");
        assert_eq!(comparison.only_a.len(), usize::from(expect.is_none()));
    }
}

#[test]
fn indistinguishable_replicas_are_not_matched() {
    let replicas = |from: usize, n: usize| {
        let pods = (from..from + n).map(|i| sample::pod(&format!("/{i}"), "ns", &format!("web-{i}"), "c", "i")).collect();
        Report { users: pods, ..sample::report() }
    };
    let comparison = compare(&replicas(0, 2), &replicas(10, 3));
    assert!(comparison.users.is_empty());
    assert_eq!((comparison.only_a.len(), comparison.only_b.len(), comparison.ambiguous.len()), (2, 3, 1));
}

#[test]
fn a_gap_does_not_change_the_rate() {
    let (a, mut b) = (sample::report(), sample::report());
    // Half of the time is unobserved, and all amounts are half: the rate is the same.
    b.gpus[1].busy_seconds /= 2.0;
    b.gpus[1].idle_seconds /= 2.0;
    b.gpus[1].unobserved_seconds = 30.0;
    b.users[2].gpus[0].gpu_seconds /= 2.0;
    let comparison = compare(&a, &b);
    let notebook = comparison.users.iter().find(|user| user.id_a == sample::NOTEBOOK).unwrap();
    assert!(notebook.gpus[0].difference.unwrap().abs() < 1e-9);
}

#[test]
fn a_different_gpu_with_the_same_index_is_compared() {
    let mut b = sample::report();
    b.gpus[0].uuid = "GPU-other".to_owned();
    let comparison = compare(&sample::report(), &b);
    let by: Vec<GpuMatch> = comparison.gpus.iter().map(|gpu| gpu.matched_by).collect();
    assert_eq!(by, [GpuMatch::Index, GpuMatch::Uuid]);
}

#[test]
fn json_and_text_are_valid_with_hostile_names() {
    let comparison = compare(&sample::hostile(), &next_day());
    let value: serde_json::Value = serde_json::from_str(&comparison.json()).unwrap();
    assert_eq!(value["format"], FORMAT);
    assert!(value["users"].is_array() && value["only_a"].is_array());
    for width in [40, 60, 100] {
        let page = comparison.text(&TextOptions { width: Some(width), ..WIDE });
        assert!(page.lines().all(|line| columns(line) <= width), "{page}");
        assert!(page.chars().all(|c| c == '\n' || !c.is_control()));
    }
}
