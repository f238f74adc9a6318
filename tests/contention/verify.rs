//! What a report says, beside the truth and what the scenario expects: one table, and what is wrong with it.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::runner::Played;
use super::scenarios::{CauseOf, Grade, Pair, Scenario};

/// What a report and the truth may differ by beside sampling: a tick at each end.
pub const FLOOR: f64 = 2.0 * 0.167_139;
/// Stated standard errors.
const ERRORS: f64 = 4.0;

/// The truth within the report's time.
pub struct Truth<'a>(pub &'a Value);

impl Truth<'_> {
    pub fn uuid(&self, gpu: usize) -> Result<&str> {
        self.0["gpus"][gpu]["uuid"].as_str().context("the truth has its GPU")
    }

    pub fn seconds(&self, gpu: usize, pids: &[u32]) -> f64 {
        let processes = self.0["gpus"][gpu]["processes"].as_array().map_or(&[][..], Vec::as_slice);
        let of = |p: &&Value| p["pid"].as_u64().is_some_and(|pid| pids.iter().any(|known| u64::from(*known) == pid));
        processes.iter().filter(of).filter_map(|p| p["gpu_seconds"].as_f64()).sum()
    }
}

/// The table, and a line for each thing that is not as it should be.
#[derive(Default)]
pub struct Verdicts {
    pub table: String,
    pub wrong: Vec<String>,
}

impl Verdicts {
    fn row(&mut self, scenario: &str, what: &str, truth: &str, told: &str, problem: Option<String>) {
        let mark = if problem.is_some() { "WRONG" } else { "" };
        // A String takes all that is written to it.
        let _written = writeln!(self.table, "{scenario:<37} {what:<24} {truth:<26} {told:<58} {mark}");
        self.wrong.extend(problem.map(|problem| format!("{scenario}, {what}: {problem}")));
    }
}

/// Entries of the report that are this user: more than one where it had several lives.
fn entries<'r>(report: &'r Value, user: &Played) -> Vec<&'r Value> {
    let all = report["users"].as_array().map_or(&[][..], Vec::as_slice);
    all.iter().filter(|entry| is(entry, user)).collect()
}

/// Whether an entry, or a contender, is this user.
fn is(entry: &Value, user: &Played) -> bool {
    let id = entry["id"].as_str().unwrap_or_default();
    match &user.cgroup {
        // A later life may be told apart by what follows its path.
        Some(cgroup) => entry["kind"] == "container" && id.strip_prefix(&**cgroup).is_some_and(|rest| !rest.starts_with('/')),
        None => entry["kind"] == "host" && user.pids().iter().any(|pid| id.starts_with(&format!("pid:{pid}@"))),
    }
}

fn usage<'r>(entry: &'r Value, uuid: &str) -> Option<&'r Value> {
    entry["gpus"].as_array()?.iter().find(|usage| usage["uuid"] == uuid)
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or(f64::NAN)
}

pub fn verify(scenarios: &[Scenario], played: &[Vec<Played>], truth: &Truth<'_>, report: &Value) -> Result<Verdicts> {
    let mut verdicts = Verdicts::default();
    verdicts.row("scenario", "user, pair or cause", "truth, expected", "told", None);
    for (gpu, (scenario, users)) in scenarios.iter().zip(played).enumerate() {
        let uuid = truth.uuid(gpu)?;
        let device = report["gpus"].as_array().into_iter().flatten().find(|device| device["uuid"] == uuid);
        let unobserved = device.map_or(f64::NAN, |device| number(device, "unobserved_seconds"));
        for user in users {
            seconds(&mut verdicts, scenario, user, gpu, truth, report, unobserved)?;
        }
        let user = |name: &str| users.iter().find(|user| user.name == name).context("a user of the scenario");
        for pair in &scenario.pairs {
            grade(&mut verdicts, scenario, pair, (user(pair.victim)?, user(pair.aggressor)?), uuid, report);
        }
        for of in &scenario.causes {
            cause(&mut verdicts, scenario, of, user(of.victim)?, uuid, report);
        }
    }
    Ok(verdicts)
}

fn seconds(
    to: &mut Verdicts,
    scenario: &Scenario,
    user: &Played,
    gpu: usize,
    truth: &Truth<'_>,
    report: &Value,
    unobserved: f64,
) -> Result<()> {
    let uuid = truth.uuid(gpu)?;
    let usages: Vec<&Value> = entries(report, user).into_iter().filter_map(|entry| usage(entry, uuid)).collect();
    let got: f64 = usages.iter().map(|usage| number(usage, "gpu_seconds")).sum();
    let stderr = usages.iter().map(|usage| number(usage, "gpu_seconds_stderr").powi(2)).sum::<f64>().sqrt();
    let want = truth.seconds(gpu, &user.pids());
    let most = ERRORS * stderr + FLOOR + unobserved;
    // NaN is a missing number, and never right.
    let right = !usages.is_empty() && (got - want).abs() <= most;
    let told = format!("{got:.2} s, standard error {stderr:.2}, {:+.1} of it", (got - want) / stderr);
    let problem =
        (!right).then(|| format!("{got:.3} s told, {want:.3} s true, at most {most:.3} apart, {} entries", usages.len()));
    to.row(scenario.name, user.name, &format!("{want:.2} s"), &told, problem);
    // Lives that are told apart are each right.
    if usages.len() > 1 {
        let mut lives: Vec<f64> = user.acts.iter().map(|pids| truth.seconds(gpu, pids)).collect();
        let mut told: Vec<(f64, f64)> =
            usages.iter().map(|usage| (number(usage, "gpu_seconds"), number(usage, "gpu_seconds_stderr"))).collect();
        lives.sort_by(f64::total_cmp);
        told.sort_by(|a, b| a.0.total_cmp(&b.0));
        let near = |(want, (got, stderr)): (&f64, &(f64, f64))| (got - want).abs() <= ERRORS * stderr + FLOOR + unobserved;
        let right = lives.len() == told.len() && lives.iter().zip(&told).all(near);
        let problem = (!right).then(|| format!("lives of {told:?} s told, of {lives:?} s true"));
        to.row(scenario.name, &format!("{}'s lives", user.name), &format!("{lives:.1?}"), &format!("{told:.1?}"), problem);
    }
    Ok(())
}

/// The grades by which the victim's entries know the other, and one of the contenders.
fn grade(to: &mut Verdicts, scenario: &Scenario, pair: &Pair, users: (&Played, &Played), uuid: &str, report: &Value) {
    let (victim, aggressor) = users;
    let of = |entry| usage(entry, uuid)?["contenders"].as_array();
    let found: Vec<&Value> =
        entries(report, victim).into_iter().filter_map(of).flatten().filter(|contender| is(contender, aggressor)).collect();
    let what = format!("{} <- {}", pair.victim, pair.aggressor);
    let (name, expected) = match pair.grade {
        Grade::Coactive => ("coactive", "coactive".to_owned()),
        Grade::Confirmed(before, after) => ("on-off-confirmed", format!("confirmed, {before} to {after}")),
    };
    let strongest = found.iter().max_by_key(|contender| contender["evidence"] != "coactive");
    let Some(contender) = strongest else {
        to.row(scenario.name, &what, &expected, "", Some("it is no contender".into()));
        return;
    };
    let evidence = contender["evidence"].as_str().unwrap_or_default();
    let told = format!(
        "{evidence}, {} to {}, {} changes, interval {}",
        short(&contender["rate_before"]),
        short(&contender["rate_after"]),
        contender["transitions"],
        short(&contender["interval"])
    );
    let problem = if evidence == name {
        rates(pair.grade, contender)
    } else {
        Some(format!("{evidence:?} instead of {name:?}; {told}; {}", contender["why_not_confirmed"]))
    };
    to.row(scenario.name, &what, &expected, &told, problem);
}

fn short(value: &Value) -> String {
    match value {
        Value::Array(all) => format!("[{}]", all.iter().map(short).collect::<Vec<_>>().join(", ")),
        other => other.as_f64().map_or_else(|| "-".into(), |number| format!("{number:.2}")),
    }
}

/// The true drop is within twice the stated interval, which is about two standard errors wide to each side.
fn rates(grade: Grade, contender: &Value) -> Option<String> {
    let Grade::Confirmed(before, after) = grade else { return None };
    let drop = before - after;
    let bounds = [0, 1].map(|n| contender["interval"][n].as_f64().unwrap_or(f64::NAN));
    let (middle, half) = ((bounds[0] + bounds[1]) / 2.0, (bounds[1] - bounds[0]) / 2.0);
    let told = number(contender, "rate_before") - number(contender, "rate_after");
    let transitions = contender["transitions"].as_u64().unwrap_or_default();
    let right = (middle - drop).abs() <= 2.0 * half && (told - drop).abs() <= 2.0 * half && transitions >= 2;
    (!right).then(|| format!("a drop of {told:.3}, within {bounds:.3?}, over {transitions} changes; it was {drop:.3}"))
}

fn cause(to: &mut Verdicts, scenario: &Scenario, of: &CauseOf, victim: &Played, uuid: &str, report: &Value) {
    let usages = entries(report, victim).into_iter().filter_map(|entry| usage(entry, uuid));
    let found = usages.filter_map(|usage| usage["causes"].as_array()).flatten().find(|cause| cause["cause"] == of.cause);
    let verdict = found.and_then(|cause| cause["verdict"].as_str()).unwrap_or("nothing");
    let detail = found.and_then(|cause| cause["detail"].as_str()).unwrap_or_default();
    let problem = if verdict != of.verdict {
        Some(format!("{verdict}, not {}: {detail:?}", of.verdict))
    } else if verdict == "possible" && !detail.contains(|c: char| c.is_ascii_digit()) {
        Some(format!("possible, and without a number: {detail:?}"))
    } else {
        None
    };
    let told: String = format!("{verdict}: {detail}").chars().take(58).collect();
    to.row(scenario.name, &format!("{}: {}", of.victim, of.cause), of.verdict, &told, problem);
}
