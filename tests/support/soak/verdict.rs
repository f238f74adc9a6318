//! The credits of all lives against the simulator's record: who ran where, and for how long.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use super::accounts::{Credit, CreditKey, LAG_SECONDS, LifeAccount, Problem, state_seconds};
use super::run::QuietSpan;
use super::world::{GPUS, HOST, SoakWorld, SteadyUser};
use crate::record::{NamedSample, RecordedProcesses, id_of};
use crate::{Sample, Sim, sum};

/// Stated errors by which a sum may differ from the truth: the chance is below 1 in 20,000 also where two stated errors cover 94 %.
pub const ERRORS: f64 = 5.0;
/// At the begin and at the end of a span counted time lags behind by different times.
const EDGE_SECONDS: f64 = 0.5;
/// The first read of a driver's buffer credits nothing.
const START_SECONDS: f64 = 1.0;
/// The driver cuts to whole percents; half a percent is added to each.
const ROUNDING_RATIO: f64 = 0.005;
/// Of the samples of short lives that were recorded while an agent ran, at least this part is credited, without the time that the agent
/// states not to know the user of; fewer than `JUDGED_FROM` are not judged.
const CREDITED_LEAST: f64 = 0.85;
const JUDGED_FROM: u64 = 300;
/// The longer of the two grids.
pub const PERIOD_US: u64 = 167_139;
const PERIOD_SECONDS: f64 = 0.167_139;

/// Credit and truth of one steady user.
#[derive(Clone, Debug, Default)]
pub struct SteadyVerdict {
    pub name: String,
    pub gpu: usize,
    pub credited: f64,
    pub real: f64,
    /// One standard error of `credited`.
    pub stated: f64,
    /// Time of the GPU that the agent states to be unobserved or unattributed.
    pub unknown: f64,
    /// In spans without a fault.
    pub quiet_credited: f64,
    pub quiet_real: f64,
    pub quiet_stated: f64,
    pub quiet_spans: u32,
}

impl SteadyVerdict {
    /// What is wrong with it.
    pub fn problems(&self, demand: f64) -> Vec<Problem> {
        let mut problems = Vec::new();
        let noise = ERRORS * self.stated + ROUNDING_RATIO * self.real + EDGE_SECONDS;
        let (off, name) = (self.credited - self.real, &self.name);
        if off > noise {
            let text = format!("{name}: {:.2} s credited, {:.2} s used, {noise:.2} s allowed", self.credited, self.real);
            problems.push(Problem::new(format!("too much credit {name}"), text));
        }
        if -off > noise + self.unknown {
            let text = format!(
                "{name}: {:.2} s credited, {:.2} s used, {noise:.2} s allowed and {:.2} s unknown",
                self.credited, self.real, self.unknown
            );
            problems.push(Problem::new(format!("too little credit {name}"), text));
        }
        let off = self.quiet_credited - self.quiet_real;
        // The lags of different spans have nothing to do with each other.
        let edges = EDGE_SECONDS * demand.max(0.2) * f64::from(self.quiet_spans).sqrt();
        let allowed = ERRORS * self.quiet_stated + ROUNDING_RATIO * self.quiet_real + edges;
        if off.abs() > allowed {
            let text = format!(
                "{name}: {:.2} s credited in {} spans without a fault, {:.2} s used, {allowed:.2} s allowed",
                self.quiet_credited, self.quiet_spans, self.quiet_real
            );
            problems.push(Problem::new(format!("quiet credit {name}"), text));
        }
        problems
    }
}

/// GPU-seconds by index of the GPU and PID.
type Used = BTreeMap<(usize, u32), f64>;

fn rfc3339(us: u64) -> String {
    humantime::format_rfc3339_micros(UNIX_EPOCH + Duration::from_micros(us)).to_string()
}

/// What processes used between two instants of the simulator's clock.
fn used(sim: &Sim, from_us: u64, to_us: u64) -> Result<Used> {
    let truth = sim.truth(&["--from", &rfc3339(from_us), "--to", &rfc3339(to_us)])?;
    let mut used = Used::new();
    for (gpu, device) in truth["gpus"].as_array().context("GPUs")?.iter().enumerate() {
        for process in device["processes"].as_array().map_or(&[][..], Vec::as_slice) {
            let (pid, seconds) = (process["pid"].as_u64(), process["gpu_seconds"].as_f64());
            *used.entry((gpu, pid.context("a pid")? as u32)).or_default() += seconds.context("seconds")?;
        }
    }
    Ok(used)
}

/// One life of the agent, for the comparison.
pub struct JudgedLife<'a> {
    pub account: &'a LifeAccount,
    /// Its last page.
    pub page: &'a [Sample],
    pub from_us: u64,
    /// The time of the last page.
    pub to_us: u64,
}

/// Time of a GPU that the agent states not to know the user of.
fn unknown_seconds(page: &[Sample], uuid: &str) -> f64 {
    let all = sum(page, "gpu_unattributed_seconds_total", &[("uuid", uuid)]).unwrap_or_default();
    let host = sum(page, "gpu_unattributed_seconds_total", &[("uuid", uuid), ("reason", "host")]).unwrap_or_default();
    all - host + state_seconds(page, uuid, "unobserved")
}

/// The part of the time of all GPUs of which the lives state not to know the user.
pub fn unknown_ratio(uuids: &[String], lives: &[JudgedLife<'_>]) -> f64 {
    let of_life = |life: &JudgedLife<'_>| uuids.iter().map(|uuid| unknown_seconds(life.page, uuid)).sum::<f64>();
    let seconds = |life: &JudgedLife<'_>| life.to_us.saturating_sub(life.from_us) as f64 / 1e6 * uuids.len() as f64;
    let (unknown, all): (f64, f64) = (lives.iter().map(of_life).sum(), lives.iter().map(seconds).sum());
    if all > 0.0 { (unknown / all).min(1.0) } else { 0.0 }
}

/// `second`: seconds of the run to the simulator's clock.
pub fn steady(
    world: &SoakWorld,
    lives: &[JudgedLife<'_>],
    spans: &[QuietSpan],
    second: impl Fn(f64) -> u64,
) -> Result<Vec<SteadyVerdict>> {
    let users: Vec<&SteadyUser> = world.steady.iter().filter(|user| user.id != HOST).collect();
    let new = |user: &&SteadyUser| SteadyVerdict { name: user.name.clone(), gpu: user.gpu, ..SteadyVerdict::default() };
    let mut verdicts: Vec<SteadyVerdict> = users.iter().map(new).collect();
    for life in lives {
        let used = used(&world.sim, life.from_us, life.to_us)?;
        for (user, verdict) in users.iter().zip(&mut verdicts) {
            let uuid = &world.uuids[user.gpu];
            let credit = life.account.credits.get(&(user.id.clone(), uuid.clone())).copied().unwrap_or_default();
            verdict.credited += credit.seconds;
            verdict.real += used.get(&(user.gpu, user.pid)).copied().unwrap_or_default();
            verdict.stated = verdict.stated.hypot(credit.stderr);
            let waiting = (START_SECONDS + LAG_SECONDS) * user.demand;
            verdict.unknown += unknown_seconds(life.page, uuid) + waiting;
        }
    }
    for span in spans {
        let used = used(&world.sim, second(span.from), second(span.to))?;
        for (user, verdict) in users.iter().zip(&mut verdicts) {
            let pair = (user.id.clone(), world.uuids[user.gpu].clone());
            let (Some(before), Some(after)) = (span.before.get(&pair), span.after.get(&pair)) else { continue };
            verdict.quiet_spans += 1;
            verdict.quiet_credited += after.seconds - before.seconds;
            verdict.quiet_real += used.get(&(user.gpu, user.pid)).copied().unwrap_or_default();
            verdict.quiet_stated = verdict.quiet_stated.hypot(stated(before, after, user.demand, span.to - span.from));
        }
    }
    Ok(verdicts)
}

/// One standard error of the credit of a span: what its sums state, and at least that of samples drawn at random.
fn stated(before: &Credit, after: &Credit, demand: f64, seconds: f64) -> f64 {
    let grown = after.stderr.powi(2) - before.stderr.powi(2);
    grown.max(seconds * PERIOD_SECONDS * demand * (1.0 - demand)).max(0.0).sqrt()
}

/// How many recorded samples were credited, and to which users they belonged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OwnerVerdict {
    pub recorded: u64,
    /// Of these, the ones of times in which an agent ran, without its first and last second.
    pub in_lives: u64,
    pub credited: u64,
    /// Those of users that are not steady: recorded while an agent ran, and credited.
    pub short: (u64, u64),
    /// Samples of processes outside of containers.
    pub host: u64,
    /// Recorded and credited samples of each.
    pub pairs: BTreeMap<CreditKey, (u64, u64)>,
}

impl OwnerVerdict {
    /// What is wrong with the credit of short lives. `unknown`: the part of the time of the GPUs of which the agent states not to know
    /// the user.
    pub fn short_problem(&self, unknown: f64) -> Option<Problem> {
        let (recorded, credited) = self.short;
        let least = recorded as f64 * CREDITED_LEAST * (1.0 - unknown);
        let text = || format!("{credited} of {recorded} samples are credited, {least:.0} at least are expected");
        (recorded >= JUDGED_FROM && (credited as f64) < least).then(|| Problem::new("credit of short lives", text()))
    }
}

/// Samples that the lives credited, by container and GPU, may not be more than the simulator recorded for it.
pub fn owners(
    processes: &RecordedProcesses,
    samples: &[NamedSample],
    accounts: &[LifeAccount],
    uuids: &[String],
    steady: &BTreeSet<String>,
    ran: &dyn Fn(u64) -> bool,
) -> (OwnerVerdict, Vec<Problem>) {
    let (mut verdict, mut problems, mut recorded) = (OwnerVerdict::default(), Vec::new(), BTreeMap::<CreditKey, u64>::new());
    for sample in samples {
        match processes.owner(sample) {
            Some(life) if life.cgroup == HOST => verdict.host += 1,
            Some(life) => {
                verdict.recorded += 1;
                let (id, is_observed) = (id_of(&life.cgroup), u64::from(ran(sample.at_us)));
                verdict.in_lives += is_observed;
                verdict.short.0 += if steady.contains(&id) { 0 } else { is_observed };
                *recorded.entry((id, sample.uuid.clone())).or_default() += 1;
            }
            None => problems.push(Problem::new("record", format!("no recorded process for {sample:?}"))),
        }
    }
    let mut credited: BTreeMap<CreditKey, u64> = BTreeMap::new();
    for (pair, credit) in accounts.iter().flat_map(|account| &account.credits) {
        *credited.entry(pair.clone()).or_default() += credit.samples as u64;
    }
    for (pair, n) in &credited {
        verdict.credited += n;
        verdict.short.1 += if steady.contains(&pair.0) { 0 } else { *n };
        let most = recorded.get(pair).copied().unwrap_or_default();
        if *n > most {
            let gpu = uuids.iter().position(|uuid| *uuid == pair.1).unwrap_or(GPUS);
            let text = format!("{} on GPU {gpu}: {n} samples credited, {most} recorded", pair.0);
            problems.push(Problem::new("wrong owner", text));
        }
    }
    for (pair, n) in recorded {
        verdict.pairs.insert(pair.clone(), (n, credited.get(&pair).copied().unwrap_or_default()));
    }
    (verdict, problems)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::RecordedLife;

    fn life(cgroup: &str, begin_us: u64) -> RecordedLife {
        RecordedLife { pid: 7, cgroup: cgroup.into(), gpu: 0, begin_us, end_us: begin_us + 900_000, gone_us: begin_us + 950_000 }
    }

    fn sample(at_us: u64) -> NamedSample {
        NamedSample { gpu: 0, uuid: "G".into(), pid: 7, at_us, stamp_us: at_us }
    }

    fn account(id: &str, samples: f64) -> LifeAccount {
        let credit = Credit { samples, ..Credit::default() };
        let mut account = LifeAccount::default();
        account.credits.insert((id.into(), "G".into()), credit);
        account
    }

    #[test]
    fn more_samples_than_a_container_had_are_found() {
        let lives = RecordedProcesses::new(&[life("/x/a", 1_000_000), life("/x/b", 5_000_000)], PERIOD_US);
        let uuids = ["G".to_owned()];
        let samples = [sample(1_200_000), sample(1_400_000), sample(5_200_000)];
        let judge = |accounts: &[LifeAccount]| {
            let (verdict, problems) = owners(&lives, &samples, accounts, &uuids, &BTreeSet::new(), &|_| true);
            (verdict.recorded, verdict.credited, problems.len())
        };
        assert_eq!(judge(&[account("a", 2.0), account("b", 1.0)]), (3, 3, 0));
        assert_eq!(judge(&[account("a", 2.0), account("b", 2.0)]), (3, 4, 1), "one sample of a went to b");
        assert_eq!(judge(&[account("a", 1.0), account("a", 2.0)]), (3, 3, 1), "two lives credited the same sample");
        assert_eq!(judge(&[account("c", 1.0)]), (3, 1, 1), "c never ran");
    }

    #[test]
    fn short_lives_without_credit_are_found() {
        let verdict = |short| OwnerVerdict { short, ..OwnerVerdict::default() };
        assert_eq!(verdict((2000, 1750)).short_problem(0.0), None);
        assert_eq!(verdict((10, 0)).short_problem(0.0), None, "too few");
        assert_eq!(verdict((2000, 1400)).short_problem(0.2), None, "a fifth of the time is unknown");
        assert_eq!(verdict((2000, 1400)).short_problem(0.1).unwrap().key, "credit of short lives");
        let lives = RecordedProcesses::new(&[life("/x/a", 1_000_000), life("/x/b", 5_000_000)], PERIOD_US);
        let samples = [sample(1_200_000), sample(5_200_000)];
        let credits = [account("a", 1.0), account("b", 1.0)];
        let (verdict, _) = owners(&lives, &samples, &credits, &["G".into()], &BTreeSet::from(["a".to_owned()]), &|_| true);
        assert_eq!(verdict.short, (1, 1), "a is steady");
    }

    #[test]
    fn a_sample_without_a_process_is_a_defect_of_the_record() {
        let (_, problems) = owners(&RecordedProcesses::new(&[], PERIOD_US), &[sample(1)], &[], &[], &BTreeSet::new(), &|_| true);
        assert_eq!(problems[0].key, "record");
    }

    #[test]
    fn credit_beyond_the_stated_error_is_found_on_both_sides() {
        let fair = SteadyVerdict {
            name: "u".into(),
            credited: 100.0,
            real: 101.0,
            stated: 1.0,
            unknown: 10.0,
            quiet_credited: 50.0,
            quiet_real: 50.0,
            quiet_stated: 1.0,
            quiet_spans: 2,
            ..SteadyVerdict::default()
        };
        let keys = |verdict: SteadyVerdict| verdict.problems(0.3).into_iter().map(|p| p.key).collect::<Vec<_>>();
        assert_eq!(keys(fair.clone()), [""; 0]);
        assert_eq!(keys(SteadyVerdict { credited: 110.0, ..fair.clone() }), ["too much credit u"]);
        assert_eq!(keys(SteadyVerdict { credited: 94.0, ..fair.clone() }), [""; 0], "unknown time explains it");
        assert_eq!(keys(SteadyVerdict { credited: 80.0, ..fair.clone() }), ["too little credit u"]);
        assert_eq!(keys(SteadyVerdict { quiet_credited: 60.0, ..fair.clone() }), ["quiet credit u"]);
        assert_eq!(keys(SteadyVerdict { quiet_credited: 40.0, ..fair }), ["quiet credit u"]);
    }
}
