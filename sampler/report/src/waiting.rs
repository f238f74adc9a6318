//! The waiting of each user, by windows, from the facts of its wait probes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::demand::{self, Demand, DemandWindow, DemandWindows};
use super::gather::Gathered;
use super::model::{CallSeconds, Contender, DemandEvidence, Evidence, UserReport, UserWaits};
use sampler_core::aggregate::{Aggregate, COACTIVITY_WINDOW_NS, Window, window_parts};
use sampler_core::fact::{HostProcess, User, WaitProbeFact};
use sampler_core::observation::WaitProbeState;
use sampler_core::units::BootNs;

/// A window counts if processes had probes for at least this part of it.
const PROBED: f64 = 0.5;
const S: f64 = 1e-9;
/// Reasons that a report lists for one user.
const MAX_PROBLEMS: usize = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Waited {
    waited_s: f64,
    probed_s: f64,
    calls: f64,
}

/// What is known of the waiting of a user.
#[derive(Debug, Default)]
pub struct Waiting {
    pub report: UserWaits,
    windows: BTreeMap<u64, Waited>,
    /// Its GPU time on all GPUs, by window, and how many these are.
    own_s: BTreeMap<u64, f64>,
    n_gpus: usize,
}

/// The users with wait probes, or with processes that could not be probed.
pub fn of_users(gathered: &Gathered, aggregate: &Aggregate, (from, to): (BootNs, BootNs)) -> BTreeMap<User, Waiting> {
    let mut users: BTreeMap<User, Waiting> = BTreeMap::new();
    for (user, facts) in &gathered.waits {
        // A reading belongs to the time at which it ends.
        let mut facts = facts.iter().filter(|fact| fact.to > from && fact.to <= to).peekable();
        if facts.peek().is_none() {
            continue;
        }
        let waiting = users.entry(*user).or_default();
        let mut durations: BTreeMap<u8, u64> = BTreeMap::new();
        for fact in facts {
            let span_ns = fact.to.saturating_since(fact.from);
            let (waited_s, probed_s) = (fact.some_ns.min(span_ns) as f64 * S, span_ns as f64 * S);
            waiting.report.wait_seconds += waited_s;
            waiting.report.probed_seconds += probed_s;
            waiting.report.calls = waiting.report.calls.saturating_add(fact.calls);
            for (bucket, calls) in &fact.durations {
                let sum = durations.entry(*bucket).or_default();
                *sum = sum.saturating_add(*calls);
            }
            for (number, part) in window_parts(fact.from, fact.to) {
                let window = waiting.windows.entry(number).or_default();
                window.waited_s += waited_s * part;
                window.probed_s += probed_s * part;
                window.calls += fact.calls as f64 * part;
            }
        }
        waiting.report.call_seconds = call_seconds(&durations);
    }
    for (user, facts) in &gathered.wait_probes {
        let is_probed = users.get(user).is_some_and(|waiting| waiting.report.probed_seconds > 0.0);
        let problems = problems(facts, is_probed);
        if !problems.is_empty() {
            let report = &mut users.entry(*user).or_default().report;
            report.unprobed_processes = problems.iter().filter(|fact| fact.state != WaitProbeState::UncountedCalls).count();
            let text = |fact: &&WaitProbeFact| format!("process {} ({}): {}", fact.process.pid, fact.state.name(), fact.detail);
            report.problems = problems.iter().take(MAX_PROBLEMS).map(text).collect();
        }
    }
    for (_, device) in aggregate.gpus().filter(|(_, device)| device.info.is_leaf()) {
        let mut on_this: BTreeSet<User> = BTreeSet::new();
        for (number, window) in device.coactivity.history.iter().flatten() {
            for (user, part) in &window.users {
                if let Some(waiting) = users.get_mut(user) {
                    *waiting.own_s.entry(*number).or_default() += part.ns * S;
                    if on_this.insert(*user) {
                        waiting.n_gpus += 1;
                    }
                }
            }
        }
    }
    users
}

/// The last state of each process, if it is one without probes or with uncounted calls; these at the end. `is_probed`: processes of the user
/// have readings, though their probes may be from before the session.
fn problems(facts: &[WaitProbeFact], is_probed: bool) -> Vec<&WaitProbeFact> {
    let mut last: HashMap<HostProcess, &WaitProbeFact> = HashMap::new();
    for fact in facts.iter().filter(|fact| fact.state != WaitProbeState::Ended) {
        last.insert(fact.process, fact);
    }
    let has = |state| matches!(state, WaitProbeState::Attached | WaitProbeState::UncountedCalls);
    let has_probes = is_probed || last.values().any(|fact| has(fact.state));
    // Shells and helpers next to a probed process of the user are not a problem.
    let is_problem = |state: WaitProbeState| match state {
        WaitProbeState::Attached => false,
        WaitProbeState::NoLibrary => !has_probes,
        _ => true,
    };
    let mut without: Vec<&WaitProbeFact> = last.into_values().filter(|fact| is_problem(fact.state)).collect();
    let is_last = |fact: &WaitProbeFact| fact.state == WaitProbeState::UncountedCalls;
    without.sort_by_key(|fact| (is_last(fact), std::cmp::Reverse(fact.state), fact.process.pid));
    without
}

/// The middle of the bucket that contains the quantile.
fn call_seconds(durations: &BTreeMap<u8, u64>) -> Option<CallSeconds> {
    let total = durations.values().fold(0u64, |sum, calls| sum.saturating_add(*calls));
    let quantile = |part: f64| {
        let mut seen = 0.0;
        let bucket = durations.iter().find(|(_, calls)| {
            seen += **calls as f64;
            seen >= part * total as f64
        });
        // The geometric mean of its bounds; a file can state any bucket.
        bucket.map_or(0.0, |(bucket, _)| 2f64.powf(f64::from((*bucket).min(63)) + 0.5) * S)
    };
    (total > 0).then(|| CallSeconds { p50: quantile(0.5), p99: quantile(0.99) })
}

impl Waiting {
    /// Part of the probed time of the window in which it waited, over its processes; `None` without probes.
    pub fn waited(&self, number: u64) -> Option<f32> {
        let window = self.windows.get(&number).filter(|window| window.probed_s >= PROBED)?;
        Some((window.waited_s / window.probed_s) as f32)
    }

    /// The windows in which the user had probes and these GPUs, which it uses, were observed, with the time of these others on them.
    pub fn compared(&self, gpus: &[&BTreeMap<u64, Window>], others: &[User]) -> Vec<DemandWindow> {
        let is_known = |window: &&Window| window.observed_ns >= COACTIVITY_WINDOW_NS / 2 && window.shows_users();
        let window = |(number, waited): (&u64, &Waited)| {
            let on_gpus: Option<Vec<&Window>> = gpus.iter().map(|windows| windows.get(number).filter(is_known)).collect();
            let on_gpus = on_gpus.filter(|_| waited.probed_s >= PROBED)?;
            let parts = |other| on_gpus.iter().filter_map(move |window| window.users.get(other));
            Some(DemandWindow {
                number: *number,
                waited: waited.waited_s,
                calls: waited.calls,
                own: self.own_s.get(number).copied().unwrap_or_default(),
                others: others.iter().map(|other| parts(other).map(|part| part.ns * S).sum()).collect(),
                named: others.iter().map(|other| parts(other).map(|part| part.samples).sum()).collect(),
            })
        };
        self.windows.iter().filter_map(window).collect()
    }
}

/// The evidence from wait probes. Waiting is that of a user on all of its GPUs: it is compared once with all other users of these, and
/// the result stands at the GPU on which the other user received most.
pub fn add_demand(
    users: &mut BTreeMap<User, UserReport>,
    waits: &BTreeMap<User, Waiting>,
    histories: &[(&str, &BTreeMap<u64, Window>)],
) {
    let by_id: HashMap<String, User> = users.iter().map(|(user, report)| (report.id.clone(), *user)).collect();
    let mut found: BTreeMap<(User, User), DemandOnGpu> = BTreeMap::new();
    for (victim, waiting) in waits {
        let Some(report) = users.get(victim) else { continue };
        let uses = |uuid: &str| report.gpus.iter().any(|usage| usage.uuid == uuid);
        let gpus: Vec<&BTreeMap<u64, Window>> =
            histories.iter().filter(|(uuid, _)| uses(uuid)).map(|(_, windows)| *windows).collect();
        let mut most: BTreeMap<User, (f64, usize)> = BTreeMap::new();
        for (position, usage) in report.gpus.iter().enumerate() {
            for contender in &usage.contenders {
                let Some(other) = by_id.get(&contender.id) else { continue };
                let known = most.entry(*other).or_insert((contender.gpu_seconds, position));
                if contender.gpu_seconds > known.0 {
                    *known = (contender.gpu_seconds, position);
                }
            }
        }
        let others: Vec<User> = most.keys().copied().collect();
        let windows = DemandWindows::new(waiting.compared(&gpus, &others), waiting.n_gpus);
        for (position, (other, (_, gpu))) in most.iter().enumerate() {
            let demand = windows.evaluate(position, others.len());
            let if_mutual = if demand.confirmed { None } else { windows.mutual(position, others.len()) };
            found.insert((*victim, *other), DemandOnGpu { gpu: *gpu, demand, if_mutual });
        }
    }
    let confirmed: BTreeSet<(User, User)> =
        found.iter().filter(|(_, on_gpu)| on_gpu.demand.confirmed).map(|(pair, _)| *pair).collect();
    for ((victim, other), DemandOnGpu { gpu, demand, if_mutual }) in found {
        let mutual = if_mutual.filter(|_| confirmed.contains(&(other, victim)));
        let usage = users.get_mut(&victim).and_then(|report| report.gpus.get_mut(gpu));
        let is_other = |contender: &&mut Contender| by_id.get(&contender.id) == Some(&other);
        if let Some(contender) = usage.and_then(|usage| usage.contenders.iter_mut().find(is_other)) {
            set_demand(contender, mutual.unwrap_or(demand));
        }
    }
}

/// The evidence about one other user, at the position of the GPU where it stands.
struct DemandOnGpu {
    gpu: usize,
    demand: Demand,
    /// What holds if the other is confirmed to wait for this user.
    if_mutual: Option<Demand>,
}

fn set_demand(contender: &mut Contender, found: Demand) {
    let is_positive = found.interval.is_some_and(|[least, _]| least > 0.0);
    if found.confirmed {
        (contender.evidence, contender.why_not_confirmed) = (Evidence::DemandConfirmed, String::new());
    }
    contender.demand = Some(DemandEvidence {
        basis: found.basis,
        wait_rate: found.effect,
        interval: found.interval,
        interval_level: found.interval.map(|_| demand::LEVEL),
        wait_rate_most: found.most,
        wait_seconds: found.effect.filter(|_| is_positive).map(|effect| effect * found.windows_on as f64),
        windows_with: found.windows_with,
        windows_without: found.windows_without,
        transitions: found.changes,
        why_not_confirmed: found.why_not,
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::tests::{SimulatedUser, container, simulate};
    use super::super::{DemandBasis, Report, build};
    use super::*;
    use sampler_core::fact::{Fact, GpuFact, WaitFact};
    use sampler_core::units::{ContainerKey, GpuUuid};
    use sampler_session::{Session, View};

    const SECONDS: u64 = 120;
    const SECOND: u64 = 1_000_000_000;

    /// Whether the user that comes and goes is on.
    fn is_on(second: u64) -> bool {
        second.checked_sub(20).is_some_and(|since| since % 33 < 17)
    }

    /// Calls in each second, and the part of it in which one is in flight.
    fn add_calls(session: &mut Session, n: u64, calls: impl Fn(u64) -> (u64, f64)) {
        let start = session.header.start;
        for second in 0..SECONDS {
            let (calls, part) = calls(second);
            let some_ns = (part * SECOND as f64) as u64;
            let process = HostProcess { pid: 100 + n as u32, start: BootNs(1) };
            let (from, to) = (start.plus(second * SECOND), start.plus((second + 1) * SECOND));
            let user = User::Container(ContainerKey(n));
            let durations = Vec::new();
            session.facts.push(Fact::Waited(WaitFact { process, user, from, to, some_ns, total_ns: some_ns, calls, durations }));
        }
    }

    /// A call of the user is in flight all the time in which `calls` is not 0, which is that of a second.
    fn add_waits(session: &mut Session, n: u64, calls: impl Fn(u64) -> u64) {
        add_calls(session, n, |second| (calls(second), if calls(second) > 0 { 1.0 } else { 0.0 }));
    }

    /// A second GPU with these users.
    fn add_gpu(session: &mut Session, users: &[SimulatedUser]) {
        let (second, _) = simulate(users, SECONDS, 7);
        for fact in second.facts {
            match fact {
                Fact::Gpu { at, fact: GpuFact::Opened(info), .. } => {
                    let info =
                        Arc::new(sampler_core::device::GpuInfo { uuid: GpuUuid("GPU-1".into()), index: 1, ..(*info).clone() });
                    session.facts.push(Fact::Gpu { gpu: 1, at, fact: GpuFact::Opened(info) });
                }
                Fact::Gpu { at, fact, .. } => session.facts.push(Fact::Gpu { gpu: 1, at, fact }),
                Fact::Container(_) => session.facts.push(fact),
                _ => {}
            }
        }
    }

    fn contender<'r>(report: &'r Report, victim: &str, (gpu, other): (&str, &str)) -> Option<&'r Contender> {
        let usage = report.user(victim)?.gpus.iter().find(|usage| usage.uuid == gpu)?;
        usage.contenders.iter().find(|contender| contender.id == other)
    }

    /// The first container is always on and has twice the time of a call while the second one is on; both have wait probes, or the first.
    fn session(are_probed: [bool; 2]) -> Session {
        let users = [container(1, |_| Some(1.0)), container(2, |t| is_on(t as u64).then_some(1.0))];
        let (mut session, _) = simulate(&users, SECONDS, 3);
        if are_probed[0] {
            add_waits(&mut session, 1, |second| if is_on(second) { 50 } else { 100 });
        }
        if are_probed[1] {
            add_waits(&mut session, 2, |second| if is_on(second) { 50 } else { 0 });
        }
        session
    }

    fn check_confirmed(report: &Report, victim: &str, other: (&str, &str), basis: DemandBasis) {
        let found = contender(report, victim, other).unwrap();
        let demand = found.demand.as_ref().unwrap();
        assert_eq!((found.evidence, demand.basis), (Evidence::DemandConfirmed, basis), "{victim} {other:?}: {demand:?}");
    }

    /// The second stage of a pipeline has little work while the first one runs, so it gets less GPU time then. Its calls take no longer.
    #[test]
    fn a_pipeline_that_on_off_confirms_is_not_confirmed_by_its_waiting() {
        let demand = |second: u64| if is_on(second) { 0.1 } else { 0.9 };
        let users = [container(1, move |t| Some(demand(t as u64))), container(2, |t| is_on(t as u64).then_some(0.9))];
        let (mut session, _) = simulate(&users, SECONDS, 3);
        add_calls(&mut session, 1, |second| ((100.0 * demand(second)) as u64, demand(second)));
        add_calls(&mut session, 2, |second| if is_on(second) { (90, 0.9) } else { (0, 0.0) });
        let report = build(&session, &View::default());
        let found = contender(&report, "/docker/1", ("GPU-0", "/docker/2")).unwrap();
        assert!(found.on_off_confirmed, "the scenario is a decoy: {found:?}");
        let demand = found.demand.as_ref().unwrap();
        assert!(found.evidence != Evidence::DemandConfirmed && !demand.why_not_confirmed.is_empty(), "{found:?}");
        let finding = report.findings.iter().find(|finding| finding.victim == "/docker/1").unwrap();
        let says = format!(" Its waiting in blocking calls does not confirm this: {}.", demand.why_not_confirmed);
        assert!(finding.text.contains(&says), "{}", finding.text);
    }

    #[test]
    fn a_process_without_the_library_is_a_problem_only_where_no_other_is_probed() {
        let fact = |pid: u32, state| WaitProbeFact {
            at: BootNs(pid.into()),
            process: HostProcess { pid, start: BootNs(1) },
            user: User::Container(ContainerKey(1)),
            state,
            detail: String::new(),
        };
        let [shell, server] = [fact(1, WaitProbeState::NoLibrary), fact(2, WaitProbeState::Attached)];
        let n_problems = |facts: &[WaitProbeFact], is_probed| problems(facts, is_probed).len();
        assert_eq!(n_problems(std::slice::from_ref(&shell), false), 1);
        // Attached before the session.
        assert_eq!(n_problems(std::slice::from_ref(&shell), true), 0);
        assert_eq!(n_problems(&[shell.clone(), server], false), 0);
        assert_eq!(n_problems(&[shell, fact(3, WaitProbeState::Refused)], true), 1);
    }

    #[test]
    fn a_user_that_never_pauses_is_confirmed_by_the_wait_of_both() {
        let report = build(&session([true, true]), &View::default());
        check_confirmed(&report, "/docker/1", ("GPU-0", "/docker/2"), DemandBasis::Changes);
        check_confirmed(&report, "/docker/2", ("GPU-0", "/docker/1"), DemandBasis::Mutual);
        let rate = contender(&report, "/docker/1", ("GPU-0", "/docker/2")).and_then(|found| found.demand.as_ref()?.wait_rate);
        assert!((rate.unwrap() - 0.5).abs() < 0.1, "{rate:?}");
    }

    #[test]
    fn a_user_without_probes_has_no_evidence_and_confirms_none() {
        let report = build(&session([false, true]), &View::default());
        let of_first = contender(&report, "/docker/1", ("GPU-0", "/docker/2")).unwrap();
        assert!(of_first.demand.is_none() && of_first.evidence != Evidence::DemandConfirmed, "{of_first:?}");
        let of_second = contender(&report, "/docker/2", ("GPU-0", "/docker/1")).unwrap();
        assert!(of_second.demand.is_some() && of_second.evidence != Evidence::DemandConfirmed, "{of_second:?}");
    }

    #[test]
    fn evidence_stands_at_the_gpu_on_which_the_other_was_and_not_by_gpu_time_for_a_user_of_two() {
        let mut session = session([true, true]);
        add_gpu(&mut session, &[container(1, |_| Some(0.2)), container(3, |t| Some(if t % 20.0 < 10.0 { 0.9 } else { 0.0 }))]);
        let report = build(&session, &View::default());
        check_confirmed(&report, "/docker/1", ("GPU-0", "/docker/2"), DemandBasis::Changes);
        check_confirmed(&report, "/docker/2", ("GPU-0", "/docker/1"), DemandBasis::Mutual);
        let third = contender(&report, "/docker/1", ("GPU-1", "/docker/3")).unwrap();
        let demand = third.demand.as_ref().unwrap();
        assert!(third.evidence != Evidence::DemandConfirmed && demand.basis == DemandBasis::Changes, "{demand:?}");
        assert!(contender(&report, "/docker/1", ("GPU-0", "/docker/3")).is_none());
    }
}
