//! Reports of simulated sessions with a known truth: a GPU with fair time slicing, sampled as the driver samples it.

use std::sync::Arc;

use super::*;
use devkit::Random;
use sampler_core::device::{DeviceReadings, GpuInfo, THROTTLE_REASONS, ThrottleTimes};
use sampler_core::fact::{
    AttributedProcess, ContainerFact, Fact, GpuFact, HostProcess, UnobservedReason, User, UtilizationSample,
};
use sampler_core::units::{BootNs, ContainerKey, GpuNs, GpuUuid, WallTime};
use sampler_session::{Header, Session, View};
use strum::VariantArray as _;

const SECOND: u64 = 1_000_000_000;
const PERIOD: u64 = 167_000_000;
const START: u64 = 1_000 * SECOND;

/// The demand of a user by time, in seconds since the start; its process exists while the demand is not `None`.
type DemandOverTime = Box<dyn Fn(f64) -> Option<f64>>;

pub struct SimulatedUser {
    pub user: User,
    pub demand: DemandOverTime,
}

pub fn container(n: u64, demand: impl Fn(f64) -> Option<f64> + 'static) -> SimulatedUser {
    SimulatedUser { user: User::Container(ContainerKey(n)), demand: Box::new(demand) }
}

fn host(demand: impl Fn(f64) -> Option<f64> + 'static) -> SimulatedUser {
    SimulatedUser { user: User::Host(HostProcess { pid: 900, start: BootNs(5) }), demand: Box::new(demand) }
}

/// Equal shares, limited by the demand of each user.
fn shares(demands: &[f64]) -> Vec<f64> {
    let mut remaining = 1.0;
    let mut order: Vec<usize> = (0..demands.len()).collect();
    order.sort_by(|a, b| demands[*a].total_cmp(&demands[*b]));
    let mut received = vec![0.0; demands.len()];
    for (n, user) in order.iter().enumerate() {
        received[*user] = demands[*user].min(remaining / (demands.len() - n) as f64);
        remaining -= received[*user];
    }
    received
}

/// The session, and the true GPU-seconds of each user.
pub fn simulate(users: &[SimulatedUser], seconds: u64, seed: u64) -> (Session, Vec<f64>) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
    let mut facts = Vec::new();
    let info = GpuInfo {
        uuid: GpuUuid("GPU-0".into()),
        model: "m".into(),
        pci_bus_id: "0".into(),
        driver_version: "1".into(),
        ..GpuInfo::default()
    };
    let gpu = |at, fact| Fact::Gpu { gpu: 0, at: BootNs(at), fact };
    facts.push(gpu(START, GpuFact::Opened(Arc::new(info))));
    for key in users.iter().filter_map(|simulated| simulated.user.container()) {
        facts.push(Fact::Container(ContainerFact {
            key,
            cgroup_path: format!("/docker/{}", key.0),
            container_id: Some(format!("{:064x}", key.0)),
            runtime: None,
            pod_uid: None,
            created: BootNs(1),
            creation_seen: true,
        }));
    }
    let mut truth = vec![0.0; users.len()];
    let mut since: Vec<Option<u64>> = vec![None; users.len()];
    for n in 1..=seconds * SECOND / PERIOD {
        let at = START + n * PERIOD;
        let t = (at - PERIOD / 2 - START) as f64 * 1e-9;
        let demands: Vec<Option<f64>> = users.iter().map(|simulated| (simulated.demand)(t)).collect();
        for (k, demand) in demands.iter().enumerate() {
            match (demand, since[k]) {
                (Some(_), None) => since[k] = Some(at - PERIOD),
                (None, Some(began)) => {
                    facts.push(gpu(at - PERIOD, GpuFact::Left { pid: 100 + k as u32, since: BootNs(began) }));
                    since[k] = None;
                }
                _ => {}
            }
        }
        let demands: Vec<f64> = demands.iter().map(|demand| demand.unwrap_or(0.0)).collect();
        let received = shares(&demands);
        let mut uniform = random.unit();
        let mut named = None;
        for (k, share) in received.iter().enumerate() {
            truth[k] += share * PERIOD as f64 * 1e-9;
            if named.is_none() && uniform < *share {
                named = Some(k);
            }
            uniform -= share;
        }
        let busy_percent = (100.0 * received.iter().sum::<f64>()).round() as u8;
        let process = |k: usize| AttributedProcess {
            pid: 100 + k as u32,
            percent: busy_percent.max(1),
            user: users[k].user,
            since: BootNs(since[k].unwrap_or(START)),
        };
        let sample =
            UtilizationSample { stamp: GpuNs(at), ns: PERIOD, busy_percent, processes: named.map(process).into_iter().collect() };
        facts.push(gpu(at, GpuFact::Utilization(sample)));
        if n % 6 == 0 {
            facts.push(Fact::Time { at: BootNs(at), wall: WallTime(at) });
        }
    }
    let start = BootNs(START);
    let header = Header { start, start_wall: WallTime(START), ..Header::default() };
    let end = Some(BootNs(START + seconds * SECOND));
    (Session { header, facts, end, damage: Vec::new() }, truth)
}

fn on_for(first: f64, on: f64, off: f64) -> impl Fn(f64) -> bool {
    move |t| t >= first && (t - first) % (on + off) < on
}

/// The contender `other` in the report of the victim.
fn contender<'a>(report: &'a Report, victim: &str, other: &str) -> Option<&'a Contender> {
    let usage = &report.user(victim).unwrap().gpus[0];
    usage.contenders.iter().find(|contender| contender.id == other)
}

/// The number of 20 sessions in which the evidence is confirmed. All shares are close to the truth.
fn count_confirmed(users: &dyn Fn() -> Vec<SimulatedUser>, victim: &str, other: &str) -> usize {
    let mut n = 0;
    for seed in 0..20 {
        let users = users();
        let (session, truth) = simulate(&users, 120, seed);
        let report = build(&session, &View::default());
        for (simulated, truth) in users.iter().zip(&truth) {
            let id = match simulated.user {
                User::Container(key) => format!("/docker/{}", key.0),
                _ => "pid:900@5".into(),
            };
            let usage = &report.user(&id).unwrap().gpus[0];
            let error = (usage.gpu_seconds - truth).abs();
            assert!(
                error < 4.0 * usage.gpu_seconds_stderr + 0.3,
                "{id}: {} {truth} ± {}",
                usage.gpu_seconds,
                usage.gpu_seconds_stderr
            );
        }
        let gpu = &report.gpus[0];
        let sum: f64 = report.users.iter().map(|user| user.gpus[0].gpu_seconds).sum();
        assert!((sum + gpu.unattributed_seconds - gpu.busy_seconds).abs() < 1e-6);
        let whole = gpu.busy_seconds + gpu.idle_seconds + gpu.unobserved_seconds;
        assert!((whole - report.duration_seconds).abs() < 0.4, "{whole} {}", report.duration_seconds);
        // Users that were never coactive are not contenders.
        let Some(found) = contender(&report, victim, other) else { continue };
        assert_eq!(found.evidence == Evidence::OnOffConfirmed, found.why_not_confirmed.is_empty());
        if found.evidence == Evidence::OnOffConfirmed {
            n += 1;
        }
    }
    n
}

#[test]
fn evidence_is_confirmed_only_for_causal_contention() {
    let always = |n: u64, demand: f64| container(n, move |_| Some(demand));
    let processes = |n: u64, demand: f64, on: fn(f64) -> bool| container(n, move |t| on(t).then_some(demand));
    let within = |n: u64, demand: f64, on: fn(f64) -> bool| container(n, move |t| Some(if on(t) { demand } else { 0.0 }));
    let thrice: fn(f64) -> bool = |t| on_for(20.0, 17.0, 16.0)(t);
    let late: fn(f64) -> bool = |t| t > 60.0;
    let early: fn(f64) -> bool = |t| t < 60.0;
    let jobs: fn(f64) -> bool = |t| on_for(10.0, 2.0, 1.0)(t);
    type Case<'a> = (&'a str, Box<dyn Fn() -> Vec<SimulatedUser>>, &'a str, std::ops::RangeInclusive<usize>);
    let cases: Vec<Case<'_>> = vec![
        ("a fair pair", Box::new(move || vec![always(1, 1.0), always(2, 1.0)]), "/docker/2", 0..=0),
        ("nine to one", Box::new(move || vec![always(1, 0.1), always(2, 1.0)]), "/docker/2", 0..=0),
        ("processes start and stop", Box::new(move || vec![always(1, 1.0), processes(2, 1.0, thrice)]), "/docker/2", 20..=20),
        ("one process starts and stops", Box::new(move || vec![always(1, 1.0), within(2, 1.0, thrice)]), "/docker/2", 20..=20),
        ("a host process", Box::new(move || vec![always(1, 1.0), host(move |t| thrice(t).then_some(1.0))]), "pid:900@5", 20..=20),
        ("never saturated", Box::new(move || vec![always(1, 0.3), within(2, 0.3, thrice)]), "/docker/2", 0..=0),
        ("its own phase ends", Box::new(move || vec![within(1, 1.0, early), within(2, 1.0, late)]), "/docker/2", 0..=0),
        (
            "its own phase ends, and its demand is small afterwards",
            Box::new(move || {
                vec![container(1, |t| Some(if t < 40.0 { 1.0 } else { 0.3 })), processes(2, 1.0, |t| (40.0..80.0).contains(&t))]
            }),
            "/docker/2",
            0..=0,
        ),
        ("one change", Box::new(move || vec![always(1, 1.0), processes(2, 1.0, late)]), "/docker/2", 0..=0),
        (
            "three users, of which the contender starts and stops",
            Box::new(move || vec![always(1, 1.0), processes(2, 1.0, thrice), always(3, 1.0)]),
            "/docker/2",
            15..=20,
        ),
        (
            "three users, of which the contender is always on",
            Box::new(move || vec![always(1, 1.0), processes(3, 1.0, thrice), always(2, 1.0)]),
            "/docker/2",
            0..=0,
        ),
        ("many short jobs", Box::new(move || vec![always(1, 1.0), processes(2, 1.0, jobs)]), "/docker/2", 0..=0),
        (
            "bursts of its own, and a contender that starts and stops without saturation",
            Box::new(move || vec![container(1, |t| Some(if t % 7.0 < 3.0 { 0.5 } else { 0.05 })), within(2, 0.4, thrice)]),
            "/docker/2",
            0..=0,
        ),
        (
            "starved by its own quota",
            Box::new(move || vec![container(1, |t| Some(if (30.0..70.0).contains(&t) { 0.1 } else { 0.6 })), always(2, 0.9)]),
            "/docker/2",
            0..=0,
        ),
    ];
    let mut wrong = Vec::new();
    for (name, users, other, expect) in cases {
        let n = count_confirmed(&*users, "/docker/1", other);
        wrong.extend((!expect.contains(&n)).then(|| format!("{name}: confirmed in {n} of 20, expected {expect:?}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn among_many_users_none_is_confirmed_by_chance() {
    // Constant, periodic and short users: 132 pairs, none of which waits for a particular other user.
    let demand = |n: u64| {
        move |t: f64| match n % 4 {
            0 => Some(1.0),
            1 => Some(if (t + n as f64) % 5.0 < 2.0 { 0.6 } else { 0.0 }),
            2 => ((t + 3.0 * n as f64) % 40.0 < 4.0).then_some(0.2),
            _ => Some(0.15),
        }
    };
    for seed in 0..8 {
        let users: Vec<SimulatedUser> = (1..13).map(|n| container(n, demand(n))).collect();
        let report = build(&simulate(&users, 240, seed).0, &View::default());
        let all = report.users.iter().flat_map(|user| user.gpus[0].contenders.iter().map(|other| (&user.id, other)));
        let confirmed: Vec<(&String, &Contender)> = all.filter(|(_, other)| other.evidence == Evidence::OnOffConfirmed).collect();
        assert!(confirmed.is_empty(), "{seed}: {confirmed:#?}");
    }
}

#[test]
fn a_view_is_a_consistent_part_of_the_session() {
    let users = || vec![container(1, |_| Some(1.0)), container(2, |t| Some(if t < 60.0 { 1.0 } else { 0.0 }))];
    let (session, _) = simulate(&users(), 120, 1);
    let report_of = |from: Option<u64>, to: Option<u64>| {
        let view = View { from_ns: from.map(|s| s * SECOND), to_ns: to.map(|s| s * SECOND), ..View::default() };
        build(&session, &view)
    };
    let seconds = |report: &Report| ["/docker/1", "/docker/2"].map(|id| report.user(id).unwrap().gpus[0].gpu_seconds);
    let (whole, first, second) = (report_of(None, None), report_of(None, Some(50)), report_of(Some(50), None));
    assert!((seconds(&whole).iter().sum::<f64>() - 120.0).abs() < 0.5, "{:?}", seconds(&whole));
    for (n, all) in seconds(&whole).into_iter().enumerate() {
        assert!((seconds(&first)[n] + seconds(&second)[n] - all).abs() < 1e-6);
    }
    assert!((first.duration_seconds - 50.0).abs() < 1e-9);
    let only = build(&session, &View { containers: vec!["/docker/2".into()], ..View::default() });
    assert_eq!(only.users.len(), 2);
    let (shown, narrowed) = (only.user("/docker/2").unwrap(), only.user("/docker/1").unwrap());
    assert_eq!(shown.gpus, whole.user("/docker/2").unwrap().gpus);
    assert!(narrowed.gpus[0].contenders.iter().all(|contender| contender.id == "/docker/2"));
}

#[test]
fn unobserved_time_is_a_gap_and_not_idle() {
    let (mut session, _) = simulate(&[container(1, |_| Some(1.0))], 60, 1);
    let gap = BootNs(START + 20 * SECOND)..BootNs(START + 30 * SECOND);
    session.facts.retain(|fact| !matches!(fact, Fact::Gpu { at, .. } if gap.contains(at)));
    let position = session.facts.iter().position(|fact| matches!(fact, Fact::Gpu { at, .. } if *at >= gap.end)).unwrap();
    let fact = GpuFact::Unobserved { ns: 10 * SECOND, why: UnobservedReason::NoAnswer };
    session.facts.insert(position, Fact::Gpu { gpu: 0, at: gap.end, fact });
    session.damage.push("a frame".into());
    let report = build(&session, &View::default());
    assert!(report.truncated);
    assert_eq!(report.gaps.len(), 1);
    assert_eq!(report.gaps[0].reason, "the driver did not respond");
    assert!((report.gpus[0].unobserved_seconds - 10.0).abs() < 1e-9);
    let timeline = &report.timelines[0];
    assert_eq!(timeline.busy[25], None);
    assert_eq!(timeline.busy[5], Some(1.0));
}

/// Files are not trusted: with any content, the report is built, in bounded time and size.
#[test]
fn impossible_numbers_are_survived() {
    let (session, _) = simulate(&[container(1, |_| Some(1.0)), container(2, |t| (t > 5.0).then_some(1.0))], 12, 1);
    let most = u64::MAX;
    for seed in 0..30 {
        let mut random = Random(seed + 1);
        let mut session = session.clone();
        let mut wild = |usual: u64| match (random.unit() * 12.0) as u32 {
            0 => most,
            1 => 0,
            2 => most / 2,
            3 => usual.wrapping_mul(1_000_003),
            _ => usual,
        };
        for fact in session.facts.iter_mut().skip(3) {
            if let Fact::Gpu { gpu, at, fact } = fact {
                (*gpu, *at) = (wild(0) as u32, BootNs(wild(at.0)));
                match fact {
                    GpuFact::Utilization(sample) => {
                        (sample.ns, sample.busy_percent) = (wild(sample.ns), wild(100) as u8);
                        for process in &mut sample.processes {
                            process.since = BootNs(wild(process.since.0));
                        }
                        match wild(1) {
                            0 => *fact = GpuFact::Idle { ns: wild(PERIOD) },
                            1 => {}
                            _ => {
                                let (user, since) = (User::Container(ContainerKey(wild(3))), BootNs(wild(START)));
                                *fact = GpuFact::Client { pid: wild(9) as u32, user, since };
                            }
                        }
                    }
                    GpuFact::Left { since, .. } => *since = BootNs(wild(since.0)),
                    _ => {}
                }
            }
        }
        let xid = GpuFact::Xid { xid: 31, count: most };
        let last = Fact::Gpu { gpu: 0, at: BootNs(START + 5 * SECOND), fact: xid };
        session.facts.extend([last.clone(), last]);
        session.end = (seed % 3 == 0).then_some(BootNs(wild(START + 12 * SECOND)));
        session.header.start = BootNs(wild(START));
        session.damage.extend((seed % 2 == 0).then(|| "wild".to_owned()));
        let report = build(&session, &View::default());
        assert!(report.duration_seconds <= 172_800.0, "{}", report.duration_seconds);
        if seed % 10 != 0 {
            continue;
        }
        let options = TextOptions { width: None, colour: false, unicode: true };
        for page in [text(&report, &options), json(&report), html(&report), csv(&report), perfetto(&report)] {
            assert!(page.len() < 200 << 20, "{seed}: {} bytes", page.len());
        }
    }
}

#[test]
fn limits_between_two_readings_are_those_of_the_drivers_counters() {
    let (mut session, _) = simulate(&[container(1, |_| Some(1.0))], 60, 1);
    let begin = session.facts.iter().find_map(|fact| if let Fact::Time { at, .. } = fact { Some(*at) } else { None }).unwrap();
    let power_cap = THROTTLE_REASONS.iter().position(|(bit, _)| *bit == 0x4).unwrap();
    // 200 ms of each second, never at a reading of the reasons.
    let facts_at = |fact: &Fact| {
        let Fact::Time { at, .. } = fact else { return Vec::new() };
        let readings = DeviceReadings { throttle_reasons: Some(0), ..DeviceReadings::default() };
        let mut times = ThrottleTimes::default();
        times.0[power_cap] = Some(7_000_000_000 + at.saturating_since(begin) / 5);
        let of_gpu = |fact| Fact::Gpu { gpu: 0, at: *at, fact };
        vec![of_gpu(GpuFact::Readings(readings)), of_gpu(GpuFact::ThrottleTimes(times))]
    };
    session.facts = session.facts.iter().flat_map(|fact| [vec![fact.clone()], facts_at(fact)].concat()).collect();
    let report = build(&session, &View::default());
    let seconds = report.gpus[0].throttle_seconds.as_ref().unwrap();
    assert!(
        matches!(&seconds[..], [one] if one.name == THROTTLE_REASONS[power_cap].1 && (one.value - 12.0).abs() < 0.5),
        "{seconds:?}"
    );
    let causes = &report.users[0].gpus[0].causes;
    let verdict = |kind| causes.iter().find(|cause| cause.cause == kind).unwrap().verdict;
    assert_eq!((verdict(CauseKind::GpuPower), verdict(CauseKind::GpuThermal)), (Verdict::Possible, Verdict::RuledOut));
}

#[test]
fn a_limited_device_is_a_possible_cause_and_an_unlimited_one_is_ruled_out() {
    let users = || vec![container(1, |_| Some(1.0)), container(2, |_| Some(1.0))];
    let verdict = |mask: Option<u64>, cause: CauseKind| {
        let (mut session, _) = simulate(&users(), 60, 1);
        let readings_at = |fact: &Fact| match fact {
            Fact::Time { at, .. } => {
                let readings = DeviceReadings { throttle_reasons: mask, ..DeviceReadings::default() };
                Some(Fact::Gpu { gpu: 0, at: *at, fact: GpuFact::Readings(readings) })
            }
            _ => None,
        };
        session.facts = session.facts.iter().flat_map(|fact| [Some(fact.clone()), readings_at(fact)]).flatten().collect();
        let report = build(&session, &View::default());
        let causes = report.users[0].gpus[0].causes.clone();
        causes.into_iter().find(|found| found.cause == cause).unwrap().verdict
    };
    assert_eq!(verdict(Some(0x4), CauseKind::GpuPower), Verdict::Possible);
    assert_eq!(verdict(Some(0x4), CauseKind::GpuThermal), Verdict::RuledOut);
    assert_eq!(verdict(Some(0x40), CauseKind::GpuThermal), Verdict::Possible);
    assert_eq!(verdict(None, CauseKind::GpuClocks), Verdict::Unknown);
    assert_eq!(verdict(Some(0), CauseKind::CpuQuota), Verdict::Unknown);
}

/// Facts in any order and with any numbers, as a damaged or foreign file may have them: every format is made, and is well-formed.
#[test]
fn fuzz_report() {
    devkit::fuzz(file!(), "report", move |bytes| {
        let Ok(facts) = serde_json::from_slice::<Vec<Fact>>(bytes) else { return };
        let damage = if bytes.len() % 2 == 0 { vec!["a frame is missing".to_owned()] } else { Vec::new() };
        let header = Header { start: BootNs(START), start_wall: WallTime(1_700_000_000 * SECOND), ..Header::default() };
        let session = Session { header, facts, damage, end: Some(BootNs(START + 60 * SECOND)) };
        let report = build(&session, &View::default());
        let options = TextOptions { width: Some(100), colour: false, unicode: true };
        for format in Format::VARIANTS {
            let text = format.render(&report, &options);
            let is_json = matches!(format, Format::Json | Format::Perfetto);
            assert!(!is_json || serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{format:?}");
            assert!(*format != Format::Text || !text.contains(['\u{1b}', '\r', '\u{202e}']), "{text}");
        }
        let all: f64 = report.gpus.iter().map(|gpu| gpu.busy_seconds + gpu.idle_seconds).sum();
        assert!(all.is_finite() && all >= 0.0, "{all}");
    });
}
