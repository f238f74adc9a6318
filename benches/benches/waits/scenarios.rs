//! Random users of one GPU with a known truth, judged by reports of sessions with wait probes, and without them by the on/off experiment.
//!
//! Each ordered pair of users of a play is one decision: did the first wait for the second? The truth is the time in which it did, by the
//! time in which the second was on.

use std::collections::BTreeMap;
use std::sync::Arc;

use devkit::Random;
use devkit::gpu_users::{Phase, Played, SAMPLE_S, Second, User as PlayedUser, Wait, is_on, play, play_without, scenario};
use gpu_sampler_benches::quantile;
use sampler_core::device::GpuInfo;
use sampler_core::fact::{AttributedProcess, ContainerFact, Fact, GpuFact, HostProcess, User, UtilizationSample, WaitFact};
use sampler_core::units::{BootNs, ContainerKey, GpuNs, GpuUuid, WallTime};
use sampler_report::{Contender, DemandBasis, Evidence, Report, build};
use sampler_session::{Header, Session, View};

/// Not those of the unit tests, with which constants were chosen.
const SEEDS: std::ops::Range<u64> = 10_000..10_200;
const SECONDS: u32 = 120;
/// Steps of the time to confirm.
const PREFIX: u32 = 10;
/// The least precision of `demand-confirmed`, its recall, and the part of the intervals of `changes` that are right.
const LEAST_PRECISION: f64 = 0.97;
const LEAST_RECALL: f64 = 0.5;
const LEAST_WITHIN: f64 = 0.9;
/// Truth from which the reasons of pairs that are not confirmed are counted.
const MISSED: f64 = 0.05;
/// Truths from which a pair counts as waiting.
const TRUTHS: [f64; 4] = [0.02, 0.05, 0.1, 0.2];
const SECOND_NS: u64 = 1_000_000_000;
const START: u64 = 1_000 * SECOND_NS;

fn boot(seconds: f64) -> BootNs {
    BootNs(START + (seconds * 1e9) as u64)
}

fn id(user: usize) -> String {
    format!("/docker/{}", user + 1)
}

fn container(user: usize) -> User {
    User::Container(ContainerKey(user as u64 + 1))
}

fn process(user: usize) -> HostProcess {
    HostProcess { pid: 100 + user as u32, start: BootNs(START) }
}

fn opening(n_users: usize) -> Vec<Fact> {
    let info = GpuInfo { uuid: GpuUuid("GPU-0".into()), model: "m".into(), ..GpuInfo::default() };
    let opened = Fact::Gpu { gpu: 0, at: BootNs(START), fact: GpuFact::Opened(Arc::new(info)) };
    let container = |user: usize| {
        Fact::Container(ContainerFact {
            key: ContainerKey(user as u64 + 1),
            cgroup_path: id(user),
            container_id: Some(format!("{:064x}", user + 1)),
            runtime: None,
            pod_uid: None,
            created: BootNs(1),
            creation_seen: true,
        })
    };
    std::iter::once(opened).chain((0..n_users).map(container)).collect()
}

/// The facts that an agent would record of the play.
fn session(played: &Played, is_probed: bool) -> Session {
    let n_users = played.on_s.len();
    let mut facts = opening(n_users);
    let mut samples = played.samples.iter().peekable();
    for (n, second) in played.seconds.iter().enumerate() {
        let (from, to) = (boot(n as f64), boot(n as f64 + 1.0));
        while let Some(sample) = samples.next_if(|sample| boot(sample.at_s) <= to) {
            let at = boot(sample.at_s);
            let busy_percent = (100.0 * sample.busy_s / SAMPLE_S).round().min(100.0) as u8;
            let HostProcess { pid, start: since } = process(sample.user);
            let named = AttributedProcess { pid, percent: busy_percent, user: container(sample.user), since };
            let processes = if busy_percent > 0 { vec![named] } else { Vec::new() };
            let sample = UtilizationSample { stamp: GpuNs(at.0), ns: (SAMPLE_S * 1e9) as u64, busy_percent, processes };
            facts.push(Fact::Gpu { gpu: 0, at, fact: GpuFact::Utilization(sample) });
        }
        let waited = |user: usize| {
            let some_ns = (second.waited_s[user] * 1e9) as u64;
            let calls = second.calls[user] as u64;
            let (process, user) = (process(user), container(user));
            Fact::Waited(WaitFact { process, user, from, to, some_ns, total_ns: some_ns, calls, durations: Vec::new() })
        };
        if is_probed {
            facts.extend((0..n_users).map(waited));
        }
        facts.push(Fact::Time { at: to, wall: WallTime(to.0) });
    }
    let header = Header { start: BootNs(START), start_wall: WallTime(START), ..Header::default() };
    Session { header, facts, end: Some(boot(played.seconds.len() as f64)), damage: Vec::new() }
}

fn contender(report: &Report, victim: usize, other: usize) -> Option<&Contender> {
    let user = report.users.iter().find(|user| user.id == id(victim))?;
    user.gpus.first()?.contenders.iter().find(|contender| contender.id == id(other))
}

fn is_confirmed(report: &Report, (victim, other): (usize, usize), grade: Evidence) -> bool {
    contender(report, victim, other).is_some_and(|contender| contender.evidence == grade)
}

/// One pair of one play.
struct Judged {
    truth: f64,
    is_blocking: bool,
    by_demand: bool,
    by_onoff: bool,
    /// They are contenders without probes, of any grade.
    by_coactive: bool,
    basis: Option<DemandBasis>,
    /// Whether the interval contains the truth, if there is one.
    is_within: Option<bool>,
    /// Whether it contains what the other made longer, by a play without it, where no other user's work depends on that one.
    is_within_difference: Option<bool>,
    why_not: String,
    /// The other was off for a tenth of the time or more, and on for as long.
    is_comparable: bool,
    /// The shortest prefix with which a report confirms demand, if the whole does.
    confirmed_after_s: Option<u32>,
}

/// The parts of the seconds of a play in which a user's phase is on.
fn parts_on(users: &[PlayedUser], user: usize) -> Vec<f64> {
    const STEPS: u32 = 50;
    let part = |second: u32| {
        let at_s = |step: u32| f64::from(second) + (f64::from(step) + 0.5) / f64::from(STEPS);
        (0..STEPS).filter(|step| is_on(users, user, at_s(*step))).count() as f64 / f64::from(STEPS)
    };
    (0..SECONDS).map(part).collect()
}

/// How much longer the calls of the victim took while the other was on than in a play without it, in seconds per second.
fn difference(parts_on: &[f64], played: &Played, without: &Played, victim: usize) -> f64 {
    let on: Vec<usize> = (0..parts_on.len()).filter(|n| parts_on[*n] > 0.0).collect();
    let sum = |played: &Played, of: fn(&Second) -> &[f64]| on.iter().map(|n| of(&played.seconds[*n])[victim]).sum::<f64>();
    let (calls, waited) =
        (|played: &Played| sum(played, |second| &second.calls), |played: &Played| sum(played, |second| &second.waited_s));
    (waited(played) - waited(without) * calls(played) / calls(without).max(1.0)) / parts_on.iter().sum::<f64>().max(1.0)
}

/// Whether no user works by what this one does or by when it is on: a play without it would have others without work.
fn is_independent(users: &[PlayedUser], other: usize) -> bool {
    let follows = |user: &PlayedUser| match user.phase {
        Phase::WhileOn(first) | Phase::WhileOff(first) | Phase::After(first) => first == other,
        _ => false,
    };
    !users.iter().any(follows) && !matches!(users[other].phase, Phase::After(_))
}

/// `random`: with which the play began.
fn judge(users: &[PlayedUser], played: &Played, random: Random) -> Vec<Judged> {
    let (probed, unprobed) = (session(played, true), session(played, false));
    let (demand, onoff) = (build(&probed, &View::default()), build(&unprobed, &View::default()));
    let prefix = |seconds: u32| View { to_ns: Some(u64::from(seconds) * SECOND_NS), ..View::default() };
    let prefixes: Vec<(u32, Report)> =
        (1..=SECONDS / PREFIX).map(|n| (n * PREFIX, build(&probed, &prefix(n * PREFIX)))).collect();
    let n = users.len();
    let without = |other: usize| {
        let play = || (parts_on(users, other), play_without(users, Some(other), SECONDS, &mut Random(random.0)));
        is_independent(users, other).then(play)
    };
    let without: Vec<Option<(Vec<f64>, Played)>> = (0..n).map(without).collect();
    let pairs = (0..n).flat_map(|victim| (0..n).filter(move |other| *other != victim).map(move |other| (victim, other)));
    let one = |(victim, other): (usize, usize)| {
        let pair = (victim, other);
        let confirms = |report: &Report| is_confirmed(report, pair, Evidence::DemandConfirmed);
        let evidence = contender(&demand, victim, other).and_then(|contender| contender.demand.as_ref());
        let by_demand = confirms(&demand);
        let truth = played.kept_waiting_s[victim][other] / played.on_s[other].max(1.0);
        let interval = evidence.and_then(|evidence| evidence.interval);
        Judged {
            truth,
            is_within: interval.map(|[least, most]| least <= truth && truth <= most),
            is_within_difference: interval.zip(without[other].as_ref()).map(|([least, most], (on, without))| {
                let difference = difference(on, played, without, victim);
                least <= difference && difference <= most
            }),
            why_not: evidence.map(|evidence| evidence.why_not_confirmed.clone()).unwrap_or_default(),
            is_blocking: users[victim].wait != Wait::Poll,
            by_demand,
            by_onoff: is_confirmed(&onoff, pair, Evidence::OnOffConfirmed),
            by_coactive: contender(&onoff, victim, other).is_some(),
            basis: evidence.filter(|_| by_demand).map(|evidence| evidence.basis),
            is_comparable: (0.1..=0.9).contains(&(played.on_s[other] / f64::from(SECONDS))),
            confirmed_after_s: prefixes.iter().find(|(_, report)| by_demand && confirms(report)).map(|(seconds, _)| *seconds),
        }
    };
    pairs.map(one).collect()
}

fn percent(part: usize, whole: usize) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1} %", 100.0 * part as f64 / whole as f64) }
}

fn count<'j>(all: impl IntoIterator<Item = &'j Judged>, is_counted: impl Fn(&Judged) -> bool) -> usize {
    all.into_iter().filter(|judged| is_counted(judged)).count()
}

/// A row of the table: precision, recall, recall of comparable pairs, and the part of all decisions that are right.
fn row(judged: &[&Judged], grade: &str, by: fn(&Judged) -> bool, truth: f64) {
    let all = || judged.iter().copied();
    let waits = |judged: &Judged| judged.truth >= truth;
    let right = count(all(), |judged| by(judged) && waits(judged));
    let agree = count(all(), |judged| by(judged) == waits(judged));
    let comparable = |judged: &Judged| waits(judged) && judged.is_comparable;
    println!(
        "| {grade} | {truth} | {} of {} | {} | {} | {} | {} |",
        count(all(), waits),
        judged.len(),
        percent(right, count(all(), by)),
        percent(right, count(all(), waits)),
        percent(count(all(), |judged| by(judged) && comparable(judged)), count(all(), comparable)),
        percent(agree, judged.len()),
    );
}

fn precision(confirmed: &[&Judged]) -> String {
    percent(count(confirmed.iter().copied(), |judged| judged.truth >= TRUTHS[0]), confirmed.len())
}

fn print_grades(all: &[&Judged]) {
    println!("| grade | waits from | pairs | precision | recall | recall if the other comes and goes | right of all |");
    println!("|---|---|---|---|---|---|---|");
    let blocking: Vec<&Judged> = all.iter().copied().filter(|judged| judged.is_blocking).collect();
    for truth in TRUTHS {
        row(all, Evidence::DemandConfirmed.name(), |judged| judged.by_demand, truth);
    }
    for truth in TRUTHS {
        row(&blocking, Evidence::OnOffConfirmed.name(), |judged| judged.by_onoff, truth);
    }
    for truth in TRUTHS {
        row(all, "coactive, or more", |judged| judged.by_coactive, truth);
    }
    println!("| published: diagnosis from the host (arXiv 2510.16946) | - | - | - | - | - | 81-88 % |");
}

/// The part of the intervals that contain what they state, and how many there are.
fn within<'j>(all: impl Iterator<Item = &'j Judged>, is_within: fn(&Judged) -> Option<bool>) -> (usize, usize) {
    let judged: Vec<bool> = all.filter_map(is_within).collect();
    (judged.iter().filter(|is_within| **is_within).count(), judged.len())
}

fn print_bases(all: &[&Judged]) {
    println!(
        "\n| confirmed by | pairs | precision | intervals with the truth | with the difference to a play without the other |"
    );
    println!("|---|---|---|---|---|");
    let part = |(right, all): (usize, usize)| format!("{} of {all}", percent(right, all));
    for basis in [DemandBasis::Changes, DemandBasis::Quietest, DemandBasis::Mutual] {
        let of_basis: Vec<&Judged> = all.iter().copied().filter(|judged| judged.basis == Some(basis)).collect();
        let (name, of): (&str, _) = (basis.into(), || of_basis.iter().copied());
        let [truth, difference] = [within(of(), |judged| judged.is_within), within(of(), |judged| judged.is_within_difference)];
        println!("| {name} | {} | {} | {} | {} |", of_basis.len(), precision(&of_basis), part(truth), part(difference));
    }
    let not = || all.iter().copied().filter(|judged| !judged.by_demand);
    let [truth, difference] = [within(not(), |judged| judged.is_within), within(not(), |judged| judged.is_within_difference)];
    println!("| not confirmed | {} | - | {} | {} |", not().count(), part(truth), part(difference));
}

/// Why pairs that waited are not confirmed.
fn print_missed(all: &[&Judged]) {
    println!("\n| why a pair that waited {MISSED} or more is not confirmed | pairs |\n|---|---|");
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for judged in all.iter().filter(|judged| judged.truth >= MISSED && !judged.by_demand) {
        *reasons.entry(&judged.why_not).or_default() += 1;
    }
    let mut reasons: Vec<(&str, usize)> = reasons.into_iter().collect();
    reasons.sort_by_key(|(_, pairs)| std::cmp::Reverse(*pairs));
    reasons.iter().for_each(|(reason, pairs)| println!("| {reason} | {pairs} |"));
}

fn print_times(all: &[&Judged]) {
    println!("\n| waits from | confirmed pairs | shortest span that confirms, s: p50 | p90 |");
    println!("|---|---|---|---|");
    for truth in TRUTHS {
        let confirmed = all.iter().filter(|judged| judged.truth >= truth).filter_map(|judged| judged.confirmed_after_s);
        let mut seconds: Vec<f64> = confirmed.map(f64::from).collect();
        seconds.sort_by(f64::total_cmp);
        println!("| {truth} | {} | {} | {} |", seconds.len(), quantile(&seconds, 0.5), quantile(&seconds, 0.9));
    }
}

fn assert_part(right: usize, all: usize, least: f64, what: &str) {
    assert!(all > 0 && right as f64 >= least * all as f64, "{right} of {all} {what}, at least {least} have to be");
}

fn check(all: &[&Judged]) {
    let waits = |judged: &Judged| judged.truth >= TRUTHS[0];
    let confirmed: Vec<&Judged> = all.iter().copied().filter(|judged| judged.by_demand).collect();
    let right = count(confirmed.iter().copied(), waits);
    assert_part(right, confirmed.len(), LEAST_PRECISION, "confirmed pairs waited");
    assert_part(right, count(all.iter().copied(), waits), LEAST_RECALL, "pairs that waited are confirmed");
    let by_changes = confirmed.iter().copied().filter(|judged| judged.basis == Some(DemandBasis::Changes));
    let (right, all) = within(by_changes, |judged| judged.is_within_difference);
    assert_part(right, all, LEAST_WITHIN, "intervals of changes contain the difference");
}

pub fn run() {
    let judged: Vec<Judged> = SEEDS
        .flat_map(|seed| {
            let mut random = Random(seed);
            let users = scenario(&mut random);
            let begin = Random(random.0);
            let played = play(&users, SECONDS, &mut random);
            judge(&users, &played, begin)
        })
        .collect();
    println!(
        "\n{} random plays of two to six users, {SECONDS} s each; a pair waits if it did for this part of the time in which the",
        SEEDS.end - SEEDS.start
    );
    println!("other was on. The on/off experiment concerns GPU time, so only users that block are counted for it.\n");
    let all: Vec<&Judged> = judged.iter().collect();
    print_grades(&all);
    print_bases(&all);
    print_missed(&all);
    print_times(&all);
    check(&all);
}
