use sampler_core::device::GpuInfo;
use sampler_core::fact::{Fact, GpuFact};
use sampler_core::units::{BootNs, GpuUuid};
use sampler_session::Session;

use super::super::findings::findings;
use super::super::model::{Gap, GpuReport, Usage};
use super::super::page::TextOptions;
use super::super::sample;
use super::*;

/// 2026-05-04 10:00:00 UTC.
const START: WallTime = sample::START;

fn at(seconds: u64) -> WallTime {
    WallTime(START.0 + seconds * 1_000_000_000)
}

fn usage(uuid: &str, gpu_seconds: f64, stderr: f64) -> Usage {
    Usage {
        uuid: uuid.to_owned(),
        gpu_seconds,
        gpu_seconds_stderr: stderr,
        share_of_busy: None,
        share_stderr: None,
        samples: 1,
        active_seconds: gpu_seconds,
        coactive_seconds: 0.0,
        contended_seconds: 0.0,
        memory_max_bytes: None,
        contenders: Vec::new(),
        causes: Vec::new(),
    }
}

fn job(step: u32, gpus: Vec<Usage>) -> UserReport {
    let id = format!("/system.slice/slurmstepd.scope/job_77/step_{step}/user/task_0");
    UserReport { kind: UserKind::Job, id, user: "slurm/77".to_owned(), gpus, ..UserReport::default() }
}

/// A file of `node` that covers this span, in seconds after [`START`].
fn file(node: &str, (from, to): (u64, u64), users: Vec<UserReport>) -> FleetFile {
    let gpus: Vec<GpuReport> = users.iter().flat_map(|user| &user.gpus).map(|usage| gpu(&usage.uuid)).collect();
    let mut report =
        Report { start: at(from), duration_seconds: (to - from) as f64, node: node.to_owned(), gpus, users, ..Report::default() };
    report.findings = findings(&report);
    FleetFile { file: format!("{node}/{from}.gpus"), report }
}

fn gpu(uuid: &str) -> GpuReport {
    GpuReport { uuid: uuid.to_owned(), busy_seconds: 1.0, ..GpuReport::default() }
}

fn merged(files: &[FleetFile]) -> Fleet {
    fleet(files, Vec::new(), Vec::new(), &FleetOptions::default())
}

fn close(got: f64, expect: f64) {
    assert!((got - expect).abs() < 1e-9, "{got} instead of {expect}");
}

#[test]
fn a_job_on_three_nodes_is_one_user_with_its_slowest_node_first() {
    let files = [
        file("a", (0, 60), vec![job(0, vec![usage("GPU-a", 30.0, 3.0)])]),
        file("b", (0, 60), vec![job(0, vec![usage("GPU-b", 10.0, 4.0), usage("GPU-c", 10.0, 0.0)])]),
        file("c", (1, 61), vec![job(1, vec![usage("GPU-d", 40.0, 12.0)])]),
    ];
    let fleet = merged(&files);
    let [user] = fleet.users.as_slice() else { panic!("{:?}", fleet.users) };
    assert_eq!((&*user.name, user.joined_by, user.kind), ("slurm/77", JoinedBy::Job, UserKind::Job));
    close(user.gpu_seconds, 90.0);
    close(user.gpu_seconds_stderr, 13.0);
    assert_eq!((user.gpus, user.nodes.len()), (4, 3));
    let nodes: Vec<&str> = user.nodes.iter().map(|part| &*part.node).collect();
    assert_eq!(nodes, ["b", "a", "c"]);
    let found = user.imbalance.as_ref().unwrap();
    assert_eq!((&*found.min_node, &*found.max_node, found.is_comparable), ("b", "c", true));
    close(found.ratio, 0.5);
    close(fleet.duration_seconds, 61.0);
    // A second is the length of a window.
    assert!(fleet.gaps.is_empty(), "{:?}", fleet.gaps);
    let text = fleet.text(&TextOptions { width: None, colour: false, unicode: true });
    for expect in
        ["3 nodes", "slurm/77", "90.0 ± 13.0", "scheduler and job id", "least 20.0 s on b, most 40.0 s on c: ratio 0.50"]
    {
        assert!(text.contains(expect), "{expect}: {text}");
    }
}

#[test]
fn the_sum_of_the_fleet_is_the_sum_of_its_reports() {
    let files = [
        FleetFile { file: "x".into(), report: sample::report() },
        FleetFile { file: "y".into(), report: Report { node: "other".into(), ..sample::report() } },
    ];
    let fleet = merged(&files);
    let single: f64 = sample::report().users.iter().flat_map(|user| &user.gpus).map(|usage| usage.gpu_seconds).sum();
    close(fleet.users.iter().map(|user| user.gpu_seconds).sum(), 2.0 * single);
    assert_eq!(fleet.findings.len(), 2 * sample::report().findings.len());
    assert!(fleet.findings.iter().any(|finding| finding.node == "other"));
}

#[test]
fn containers_are_joined_by_workload_or_by_what_is_requested_or_not_at_all() {
    let pod = |pod: &str, image: &str| {
        let id = format!("/kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{}", "73e1".repeat(16));
        UserReport { gpus: vec![usage("GPU-x", 1.0, 0.0)], ..sample::pod(&id, "ml", pod, "main", image) }
    };
    let files = [file("a", (0, 60), vec![pod("t-0", "img:1")]), file("b", (0, 60), vec![pod("t-1", "img:1")])];
    let unlabelled = [file("a", (0, 60), vec![pod("t-0", "")]), file("b", (0, 60), vec![pod("t-0", "")])];
    let cases = [
        (&files, &[][..], vec![("ml/main (img:1)", JoinedBy::Workload)]),
        (&files, &[JoinField::Namespace][..], vec![("ml", JoinedBy::Requested)]),
        (&files, &[JoinField::Pod][..], vec![("t-0", JoinedBy::Requested), ("t-1", JoinedBy::Requested)]),
        (&unlabelled, &[][..], vec![("ml/t-0/main", JoinedBy::Node), ("ml/t-0/main", JoinedBy::Node)]),
    ];
    for (files, join_by, expect) in cases {
        let options = FleetOptions { join_by: join_by.to_vec(), ..FleetOptions::default() };
        let fleet = fleet(files, Vec::new(), Vec::new(), &options);
        let found: Vec<(&str, JoinedBy)> = fleet.users.iter().map(|user| (&*user.name, user.joined_by)).collect();
        assert_eq!(found, expect, "{join_by:?}");
    }
}

#[test]
fn processes_of_nodes_are_never_joined() {
    let host = || UserReport {
        kind: UserKind::Host,
        pid: Some(7),
        gpus: vec![usage("GPU-x", 1.0, 0.0)],
        id: "pid:7@1".into(),
        ..UserReport::default()
    };
    let fleet = merged(&[file("a", (0, 60), vec![host()]), file("b", (0, 60), vec![host()])]);
    assert_eq!(fleet.users.iter().map(|user| user.nodes.len()).collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn time_without_a_file_is_a_gap_and_spans_that_differ_are_not_compared() {
    let users = || vec![job(0, vec![usage("GPU-a", 5.0, 0.0)])];
    let mut last = file("a", (100, 120), users());
    last.report.gaps.push(Gap { uuid: "GPU-a".into(), from: at(101), to: at(102), reason: "lost".into() });
    let files = [file("a", (10, 60), users()), last, file("b", (0, 120), users())];
    let unreadable = FileProblem { file: "c/x.gpus".into(), node: Some("c".into()), problem: "damaged".into() };
    let fleet = fleet(&files, vec![unreadable], Vec::new(), &FleetOptions::default());
    let gaps: Vec<(&str, bool, &str, &str)> =
        fleet.gaps.iter().map(|gap| (&*gap.node, gap.uuid.is_none(), &gap.from[11..19], &gap.to[11..19])).collect();
    let expect = [
        ("a", true, "10:00:00", "10:00:10"),
        ("a", true, "10:01:00", "10:01:40"),
        ("a", false, "10:01:41", "10:01:42"),
        ("c", true, "10:00:00", "10:02:00"),
    ];
    assert_eq!(gaps, expect);
    assert_eq!(fleet.nodes[0].covered_seconds, 70.0);
    assert!(!fleet.users[0].imbalance.as_ref().unwrap().is_comparable);
    let text = fleet.text(&TextOptions { width: None, colour: false, unicode: true });
    for expect in ["NOT REPORTED: c/x.gpus of c: damaged", "no readable session file covers this time", "not a comparison"] {
        assert!(text.replace("\n    ", " ").contains(expect), "{expect}: {text}");
    }
}

#[test]
fn an_empty_fleet_is_a_report_without_users() {
    let fleet = merged(&[]);
    assert!(fleet.users.is_empty() && fleet.nodes.is_empty() && fleet.gaps.is_empty());
    assert!(fleet.text(&TextOptions { width: None, colour: false, unicode: false }).contains("0 nodes"));
    assert!(fleet.json().contains("\"users\": []"));
}

#[test]
fn files_of_one_gpu_are_cut_where_they_overlap() {
    let opened = |uuid: &str| {
        let info = GpuInfo { uuid: GpuUuid(uuid.into()), ..GpuInfo::default() };
        Session {
            facts: vec![Fact::Gpu { gpu: 0, at: BootNs(0), fact: GpuFact::Opened(std::sync::Arc::new(info)) }],
            ..Session::default()
        }
    };
    let mut coverage = Coverage::default();
    let first = file("a", (0, 60), vec![job(0, vec![usage("GPU-a", 5.0, 0.0)])]);
    coverage.add(&first.file, &first.report);
    let span = |from, to| WallSpan { from: at(from), to: at(to) };
    let cases = [
        ("GPU-a", (30, 90), Cut::After(at(60), first.file.clone())),
        ("GPU-a", (60, 90), Cut::Whole),
        ("GPU-a", (10, 60), Cut::Nothing(first.file.clone())),
        // Another machine with the same name, or another GPU of the same one.
        ("GPU-b", (30, 90), Cut::Whole),
    ];
    for (uuid, (from, to), expect) in cases {
        assert_eq!(coverage.cut(&opened(uuid), span(from, to)), expect, "{uuid} {from}");
    }
}

#[test]
fn csv_has_a_row_for_each_user_and_node() {
    let named = UserReport { user: "=cmd".to_owned(), ..job(0, vec![usage("GPU-b", 10.0, 0.5)]) };
    let files = [
        file("a", (0, 60), vec![job(0, vec![usage("GPU-a", 30.0, 3.0)])]),
        file("b", (0, 60), vec![named, job(0, vec![usage("GPU-c", 1.25, 0.0)])]),
    ];
    let text = merged(&files).csv();
    let rows: Vec<&str> = text.split_terminator("\r\n").collect();
    assert!(rows[0].starts_with("kind,user,joined_by,node,"), "{text}");
    assert_eq!(rows.len(), 3, "{text}");
    assert_eq!(rows[2], "job,slurm/77,job,a,slurm/77,1,30,3,30,0,0", "{text}");
    assert!(rows[1].starts_with("job,slurm/77,job,b,'=cmd;slurm/77,2,11.25,0.5,"), "{text}");
}
