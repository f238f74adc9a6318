//! Reports for tests: one of a typical node, one of the largest size, and one with hostile names.

use super::findings::findings;
use super::model::*;
use super::words;
use sampler_core::units::WallTime;

const GIB: u64 = 1 << 30;
/// 2026-05-04 10:00:00 UTC.
pub const START: WallTime = WallTime(1_777_888_800_000_000_000);
pub const GPUS: [&str; 2] = ["GPU-5a1c0000-1111-2222-3333-444444444444", "GPU-7be20000-1111-2222-3333-444444444444"];

pub const TRAINER: &str = "/kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/73e1a9c0ffee";
pub const SERVER: &str = "/kubepods/burstable/pod9cc36773-de9a-11e9-84e7-f8f21e04010c/91b2d0badf00";
pub const NOTEBOOK: &str = "/docker/5f00ba4400dd";
pub const XORG: &str = "pid:1841@99120";

fn user(kind: UserKind, id: &str) -> UserReport {
    UserReport { kind, id: id.to_owned(), ..UserReport::default() }
}

pub fn pod(id: &str, namespace: &str, pod: &str, container: &str, image: &str) -> UserReport {
    UserReport {
        container_id: id.rsplit('/').next().map(str::to_owned),
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        container: container.to_owned(),
        name: format!("k8s_{container}_{pod}_{namespace}_0"),
        image: image.to_owned(),
        ..user(UserKind::Container, id)
    }
}

fn users() -> Vec<UserReport> {
    vec![
        pod(TRAINER, "ml", "trainer-0", "main", "registry.example.com/ml/trainer:2.4.1"),
        pod(SERVER, "serving", "llm-server-6d5f7c9b8-x2x7q", "server", "registry.example.com/serving/llm:0.9"),
        UserReport {
            container_id: Some("5f00ba4400dd".to_owned()),
            name: "anna-notebook".to_owned(),
            image: "jupyter/tensorflow-notebook:latest".to_owned(),
            ..user(UserKind::Container, NOTEBOOK)
        },
        UserReport { pid: Some(1841), comm: Some("Xorg".to_owned()), ..user(UserKind::Host, XORG) },
        user(UserKind::Unknown, "pid_unknown"),
    ]
}

fn on(at: f64, spans: &[(f64, f64)]) -> bool {
    spans.iter().any(|(from, to)| (*from..*to).contains(&at))
}

/// Deterministic noise between -1 and 1.
fn noise(at: usize, seed: usize) -> f32 {
    let mixed = (at as u64 * 2_654_435_761 + seed as u64 * 40_503).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (mixed % 2001) as f32 / 1000.0 - 1.0
}

const SERVER_ON: [(f64, f64); 2] = [(15.0, 30.0), (42.0, 55.0)];

fn timeline(gpu: usize, lanes: &[usize], gaps: &[(f64, f64)], share: impl Fn(usize, f64, usize) -> f32) -> Timeline {
    let unobserved = |at: usize| on(at as f64, gaps);
    let lanes: Vec<Lane> = lanes
        .iter()
        .map(|&user| Lane {
            user,
            shares: (0..60).map(|at| if unobserved(at) { 0.0 } else { share(user, at as f64, at).clamp(0.0, 1.0) }).collect(),
            memory: (0..60)
                .map(|at| (user < 3 && !unobserved(at)).then_some((18 + 7 * user as u64 + (at as u64 / 20)) * GIB))
                .collect(),
            waits: if user == 0 { trainer_waits() } else { Vec::new() },
        })
        .collect();
    let sum = |at: usize| lanes.iter().filter_map(|lane| lane.shares.get(at)).sum::<f32>();
    Timeline {
        uuid: GPUS[gpu].to_owned(),
        first_second: 0.0,
        window_seconds: 1.0,
        busy: (0..60).map(|at| (!unobserved(at)).then(|| sum(at).min(1.0))).collect(),
        memory: (0..60).map(|at| (!unobserved(at)).then(|| lanes.iter().filter_map(|lane| lane.memory[at]).sum())).collect(),
        lanes,
        marks: Vec::new(),
    }
}

/// The trainer waits for its own work, and longer while the server is on; its probes were attached after two seconds.
fn trainer_waits() -> Vec<Option<f32>> {
    let waited = |at: usize| match on(at as f64, &SERVER_ON) {
        true => 0.76 + 0.05 * noise(at, 5),
        false => 0.36 + 0.04 * noise(at, 6),
    };
    (0..60).map(|at| (at >= 2).then(|| waited(at))).collect()
}

fn trainer_report() -> UserWaits {
    let known: Vec<f64> = trainer_waits().into_iter().flatten().map(f64::from).collect();
    UserWaits {
        probed_seconds: known.len() as f64,
        wait_seconds: known.iter().sum(),
        calls: 11_740,
        call_seconds: Some(CallSeconds { p50: 0.0015, p99: 0.012 }),
        unprobed_processes: 10,
        problems: vec!["process 4711 (static): the program contains the driver library".to_owned()],
    }
}

fn trainer_demand() -> DemandEvidence {
    DemandEvidence {
        basis: DemandBasis::Changes,
        wait_rate_most: None,
        wait_rate: Some(0.41),
        interval: Some([0.38, 0.44]),
        interval_level: Some(0.95),
        wait_seconds: Some(11.5),
        windows_with: 24,
        windows_without: 26,
        transitions: 4,
        why_not_confirmed: String::new(),
    }
}

fn timelines() -> Vec<Timeline> {
    let mut first = timeline(0, &[0, 1, 3, 4], &[(33.0, 37.0)], |user, at, n| match (user, on(at, &SERVER_ON)) {
        (0, true) => 0.48 + 0.04 * noise(n, 1),
        (0, false) if at >= 3.0 => 0.92 + 0.03 * noise(n, 2),
        (1, true) => 0.47 + 0.03 * noise(n, 3),
        (3, _) if n % 9 == 4 => 0.02,
        (4, _) if (48.0..51.0).contains(&at) => 0.03,
        _ => 0.0,
    });
    first.marks =
        vec![(15.0, "serving/llm-server-6d5f7c9b8-x2x7q/server started".to_owned()), (49.0, "power cap reached".to_owned())];
    let second =
        timeline(1, &[2], &[], |_, at, n| if (at as u32 / 10).is_multiple_of(2) { 0.3 + 0.25 * noise(n, 4) } else { 0.0 });
    vec![first, second]
}

fn causes() -> Vec<Cause> {
    let causes = [
        (CauseKind::GpuClocks, Verdict::RuledOut, "SM clock 1,410 MHz throughout, as before"),
        (CauseKind::GpuPower, Verdict::Possible, "at the power cap for 3.0 s of the 28.0 s in which the contender was on"),
        (CauseKind::GpuThermal, Verdict::RuledOut, "64 degrees at most; the limit is 85"),
        (CauseKind::GpuError, Verdict::RuledOut, "no XID"),
        (CauseKind::CpuQuota, Verdict::RuledOut, "throttled for 0.0 s of 60.0 s"),
        (CauseKind::CpuPressure, Verdict::Unknown, "the kernel does not report pressure by cgroup"),
    ];
    causes.into_iter().map(|(cause, verdict, detail)| Cause { cause, verdict, detail: detail.to_owned() }).collect()
}

pub fn contender(kind: UserKind, id: &str, gpu_seconds: f64, coactive_seconds: f64, saturated: f64) -> Contender {
    Contender {
        kind,
        id: id.to_owned(),
        gpu_seconds,
        gpu_seconds_stderr: gpu_seconds.sqrt() * 0.08,
        saturated_gpu_seconds: saturated,
        coactive_seconds,
        evidence: Evidence::Coactive,
        on_off_confirmed: false,
        rate_before: None,
        rate_after: None,
        transitions: 0,
        interval: None,
        interval_level: None,
        why_not_confirmed: "the contender was on throughout, or never while the GPU was saturated: no change to compare"
            .to_owned(),
        demand: None,
        experiment: Vec::new(),
    }
}

/// The usage of a GPU by a user, from its timeline.
fn usage(timeline: &Timeline, lane: &Lane) -> Usage {
    let busy: f64 = timeline.busy.iter().flatten().map(|share| f64::from(*share)).sum();
    let active = |lane: &Lane, at: usize| lane.shares.get(at).is_some_and(|share| *share > 0.0);
    let own: Vec<usize> = (0..lane.shares.len()).filter(|at| active(lane, *at)).collect();
    let coactive = |at: &&usize| timeline.lanes.iter().filter(|other| active(other, **at)).count() > 1;
    let saturated = |at: &&usize| timeline.busy[**at].is_some_and(|busy| busy >= 0.9);
    let gpu_seconds: f64 = lane.shares.iter().map(|share| f64::from(*share)).sum();
    Usage {
        uuid: timeline.uuid.clone(),
        gpu_seconds,
        gpu_seconds_stderr: gpu_seconds.sqrt() * 0.08,
        share_of_busy: Some(gpu_seconds / busy),
        share_stderr: Some(gpu_seconds.sqrt() * 0.08 / busy),
        samples: own.len() as u64 * 6,
        active_seconds: own.len() as f64,
        coactive_seconds: own.iter().filter(coactive).count() as f64,
        contended_seconds: own.iter().filter(coactive).filter(saturated).count() as f64,
        memory_max_bytes: lane.memory.iter().flatten().max().copied(),
        contenders: Vec::new(),
        causes: Vec::new(),
    }
}

fn gpu(index: u32, timeline: &Timeline) -> GpuReport {
    let busy: f64 = timeline.busy.iter().flatten().map(|share| f64::from(*share)).sum();
    let unobserved = timeline.busy.iter().filter(|share| share.is_none()).count() as f64;
    GpuReport {
        uuid: timeline.uuid.clone(),
        index,
        model: "NVIDIA A100-SXM4-80GB".to_owned(),
        busy_seconds: busy,
        idle_seconds: timeline.busy.len() as f64 - busy - unobserved,
        unobserved_seconds: unobserved,
        unattributed_seconds: if index == 0 { 0.09 } else { 0.0 },
        unattributed: vec![Named { name: "pid_unknown".to_owned(), value: if index == 0 { 0.09 } else { 0.0 } }],
        saturated_seconds: timeline.busy.iter().filter(|share| share.is_some_and(|share| share >= 0.9)).count() as f64,
        memory_total_bytes: Some(80 * GIB),
        memory_used_max_bytes: timeline.memory.iter().flatten().max().copied(),
        throttle_seconds: (index == 0).then(|| vec![Named { name: "sw_power_cap".to_owned(), value: 3.0 }]),
        ..GpuReport::default()
    }
}

/// One minute of two GPUs: a trainer and a server that shares its GPU twice, a notebook, Xorg, and a little time of an unknown user.
pub fn report() -> Report {
    let timelines = timelines();
    let mut users = users();
    for timeline in &timelines {
        for lane in &timeline.lanes {
            users[lane.user].gpus.push(usage(timeline, lane));
        }
    }
    let confirmed = Contender {
        evidence: Evidence::DemandConfirmed,
        on_off_confirmed: true,
        demand: Some(trainer_demand()),
        rate_before: Some(0.92),
        rate_after: Some(0.48),
        transitions: 4,
        interval: Some([0.41, 0.47]),
        interval_level: Some(0.95),
        why_not_confirmed: String::new(),
        ..contender(UserKind::Container, SERVER, 13.2, 28.0, 13.1)
    };
    let unsure = DemandEvidence {
        windows_with: 5,
        windows_without: 45,
        why_not_confirmed: "the contender was on, or off, for too short a time while the waiting was measured".to_owned(),
        ..DemandEvidence::default()
    };
    let xorg = Contender { demand: Some(unsure), ..contender(UserKind::Host, XORG, 0.1, 6.0, 0.06) };
    users[0].gpus[0].contenders = vec![confirmed, xorg];
    users[0].waits = Some(trainer_report());
    users[0].gpus[0].causes = causes();
    users[1].gpus[0].contenders = vec![contender(UserKind::Container, TRAINER, 13.5, 28.0, 13.4)];
    let report = Report {
        experiments: Vec::new(),
        format: FORMAT,
        start: START,
        duration_seconds: 60.0,
        truncated: false,
        damage: Vec::new(),
        node: "gpu-node-07".to_owned(),
        agent_version: "0.1.0".to_owned(),
        window_seconds: 1.0,
        saturation_ratio: 0.9,
        gaps: vec![Gap {
            uuid: GPUS[0].to_owned(),
            from: words::after(START, 33.0),
            to: words::after(START, 37.0),
            reason: "the driver did not respond".to_owned(),
        }],
        gpus: timelines.iter().enumerate().map(|(index, timeline)| gpu(index as u32, timeline)).collect(),
        users,
        findings: Vec::new(),
        timelines,
    };
    // Only the confirmed one: a page is complete without the others.
    let findings = findings(&report).into_iter().filter(|finding| finding.evidence > Some(Evidence::Coactive)).collect();
    Report { findings, ..report }
}

pub fn damaged() -> Report {
    Report {
        truncated: true,
        damage: vec![
            "record 211 at byte 81920: its checksum differs; 2048 bytes left out".to_owned(),
            "the file ends in the middle of a record".to_owned(),
        ],
        ..report()
    }
}

/// Names, images and reasons that try to inject scripts, formulas and control sequences.
pub fn hostile() -> Report {
    let mut report = report();
    let hostile = "</script><script>alert(1)</script><!--\" onload='x' \x1b[2J\u{202e}";
    let user = &mut report.users[0];
    (user.namespace, user.pod, user.container) = (hostile.to_owned(), "=cmd|' /C calc'!A0".to_owned(), "日本語".repeat(40));
    (user.name, user.image) = (hostile.to_owned(), hostile.to_owned());
    report.users[1].gpus[0].contenders[0].why_not_confirmed = hostile.to_owned();
    report.users[0].waits = Some(UserWaits { problems: vec![hostile.to_owned()], ..trainer_report() });
    if let Some(demand) = &mut report.users[0].gpus[0].contenders[1].demand {
        demand.why_not_confirmed = hostile.to_owned();
    }
    report.users[0].gpus[0].causes[0].detail = hostile.to_owned();
    report.node = hostile.to_owned();
    report.findings[0].text = hostile.to_owned();
    report.gaps[0].reason = hostile.to_owned();
    report.damage = vec![hostile.to_owned()];
    report.gpus[0].model = hostile.to_owned();
    report.timelines[0].marks[0].1 = hostile.to_owned();
    report
}

/// `gpus` GPUs with `users` containers each; all shares change in every window, and every user is a contender of every other. A third of
/// the users has wait probes.
pub fn big(gpus: usize, users: usize, windows: usize) -> Report {
    let mut report = Report { duration_seconds: windows as f64, findings: Vec::new(), gaps: Vec::new(), ..self::report() };
    (report.gpus, report.users, report.timelines) = Default::default();
    for gpu in 0..gpus {
        let uuid = format!("GPU-{gpu:08x}-1111-2222-3333-444444444444");
        let lanes: Vec<Lane> = (0..users)
            .map(|user| Lane {
                user: gpu * users + user,
                shares: (0..windows).map(|at| (noise(at, gpu * 1000 + user) / (6.0 + user as f32 / 4.0)).max(0.0)).collect(),
                memory: (0..windows).map(|at| Some(GIB + (at as u64 / 7 + user as u64) * 3_000_000)).collect(),
                waits: if user % 3 == 0 { (0..windows).map(|at| Some(noise(at, user).abs())).collect() } else { Vec::new() },
            })
            .collect();
        let timeline = Timeline {
            uuid: uuid.clone(),
            first_second: 0.0,
            window_seconds: 1.0,
            busy: (0..windows).map(|at| Some(lanes.iter().map(|lane| lane.shares[at]).sum::<f32>().min(1.0))).collect(),
            memory: (0..windows).map(|at| Some(40 * GIB + at as u64 * 1_000_000)).collect(),
            lanes,
            marks: Vec::new(),
        };
        let id =
            |user: usize| format!("/kubepods/burstable/pod{gpu:04}{user:04}-de9a-11e9-84e7-f8f21e04010c/{gpu:06x}{user:06x}");
        for (user, lane) in timeline.lanes.iter().enumerate() {
            let pod_name = format!("job-{gpu}-{user}-7c9b8d6f5-x2x7q");
            let mut report_user =
                pod(&id(user), &format!("team-{}", user % 7), &pod_name, "worker", "registry.example.com/job:1");
            let mut usage = usage(&timeline, lane);
            let others = (0..users).filter(|other| *other != user);
            usage.contenders = others.map(|other| contender(UserKind::Container, &id(other), 4.0, 90.0, 1.5)).collect();
            if user % 3 == 0 {
                usage.contenders.iter_mut().for_each(|contender| contender.demand = Some(trainer_demand()));
                report_user.waits = Some(trainer_report());
            }
            usage.causes = causes();
            report_user.gpus = vec![usage];
            report.users.push(report_user);
        }
        report.gpus.push(self::gpu(gpu as u32, &timeline));
        report.timelines.push(timeline);
    }
    report
}
