//! Compares a report with the truth and with what each scenario expects: one table, and a list of the errors.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::runner::Played;
use super::scenarios::{CauseOf, Grade, Pair, Scenario};

/// Allowed difference between report and truth besides sampling error: one sample at each end.
pub const FLOOR: f64 = 2.0 * 0.167_139;
/// Allowed difference, in stated standard errors.
const ERRORS: f64 = 5.0;

/// The truth for the time that the report covers.
pub struct Truth<'a>(pub &'a Value);

impl Truth<'_> {
    pub fn uuid(&self, gpu: usize) -> Result<&str> {
        self.0["gpus"][gpu]["uuid"].as_str().context("the truth has its GPU")
    }

    pub fn seconds(&self, gpu: usize, pids: &[u32]) -> f64 {
        let processes = self.0["gpus"][gpu]["processes"].as_array().map_or(&[][..], Vec::as_slice);
        let is_users = |p: &&Value| p["pid"].as_u64().is_some_and(|pid| pids.iter().any(|known| u64::from(*known) == pid));
        processes.iter().filter(is_users).filter_map(|p| p["gpu_seconds"].as_f64()).sum()
    }
}

/// The table, and a line for each error.
#[derive(Default)]
pub struct Verdicts {
    pub table: String,
    pub wrong: Vec<String>,
}

impl Verdicts {
    fn row(&mut self, scenario: &str, what: &str, truth: &str, reported: &str, problem: Option<String>) {
        let mark = if problem.is_some() { "WRONG" } else { "" };
        // Writing to a String cannot fail.
        let _written = writeln!(self.table, "{scenario:<37} {what:<24} {truth:<26} {reported:<58} {mark}");
        self.wrong.extend(problem.map(|problem| format!("{scenario}, {what}: {problem}")));
    }
}

/// Entries of the report for this user: more than one if it had several lifetimes.
fn entries<'r>(report: &'r Value, user: &Played) -> Vec<&'r Value> {
    let all = report["users"].as_array().map_or(&[][..], Vec::as_slice);
    all.iter().filter(|entry| is_entry_of(entry, user)).collect()
}

/// Whether an entry, or a contender, is this user.
fn is_entry_of(entry: &Value, user: &Played) -> bool {
    let id = entry["id"].as_str().unwrap_or_default();
    match &user.cgroup {
        // A suffix of the path distinguishes later lifetimes.
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
    verdicts.row("scenario", "user, pair or cause", "truth, expected", "reported", None);
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
        for expected in &scenario.causes {
            cause(&mut verdicts, scenario, expected, user(expected.victim)?, uuid, report);
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
    // NaN is a missing number; it never compares as right.
    let right = !usages.is_empty() && (got - want).abs() <= most;
    let reported = format!("{got:.2} s, standard error {stderr:.2}, {:+.1} of it", (got - want) / stderr);
    let problem =
        (!right).then(|| format!("{got:.3} s reported, {want:.3} s true, at most {most:.3} apart, {} entries", usages.len()));
    to.row(scenario.name, user.name, &format!("{want:.2} s"), &reported, problem);
    // Where the report separates lifetimes, each must be right.
    if usages.len() > 1 {
        let mut lives: Vec<f64> = user.acts.iter().map(|pids| truth.seconds(gpu, pids)).collect();
        let mut reported: Vec<(f64, f64)> =
            usages.iter().map(|usage| (number(usage, "gpu_seconds"), number(usage, "gpu_seconds_stderr"))).collect();
        lives.sort_by(f64::total_cmp);
        reported.sort_by(|a, b| a.0.total_cmp(&b.0));
        let near = |(want, (got, stderr)): (&f64, &(f64, f64))| (got - want).abs() <= ERRORS * stderr + FLOOR + unobserved;
        let right = lives.len() == reported.len() && lives.iter().zip(&reported).all(near);
        let problem = (!right).then(|| format!("lifetimes of {reported:?} s reported, of {lives:?} s true"));
        let name = format!("{}'s lifetimes", user.name);
        to.row(scenario.name, &name, &format!("{lives:.1?}"), &format!("{reported:.1?}"), problem);
    }
    Ok(())
}

/// Checks the grade that the victim's entries give the aggressor.
fn grade(to: &mut Verdicts, scenario: &Scenario, pair: &Pair, users: (&Played, &Played), uuid: &str, report: &Value) {
    let (victim, aggressor) = users;
    let contenders = |entry| usage(entry, uuid)?["contenders"].as_array();
    let all = entries(report, victim).into_iter().filter_map(contenders).flatten();
    let found: Vec<&Value> = all.filter(|contender| is_entry_of(contender, aggressor)).collect();
    let what = format!("{} <- {}", pair.victim, pair.aggressor);
    let (name, expected) = match pair.grade {
        Grade::Coactive => ("coactive", "coactive".to_owned()),
        Grade::Confirmed(before, after) => ("on-off-confirmed", format!("confirmed, {before} to {after}")),
    };
    let strongest = found.iter().max_by_key(|contender| contender["evidence"] != "coactive");
    let Some(contender) = strongest else {
        to.row(scenario.name, &what, &expected, "", Some("it is not listed as a contender".into()));
        return;
    };
    let evidence = contender["evidence"].as_str().unwrap_or_default();
    let reported = format!(
        "{evidence}, {} to {}, {} changes, interval {}",
        short(&contender["rate_before"]),
        short(&contender["rate_after"]),
        contender["transitions"],
        short(&contender["interval"])
    );
    let problem = if evidence == name {
        rates(pair.grade, contender)
    } else {
        Some(format!("{evidence:?} instead of {name:?}; {reported}; {}", contender["why_not_confirmed"]))
    };
    to.row(scenario.name, &what, &expected, &reported, problem);
}

fn short(value: &Value) -> String {
    match value {
        Value::Array(all) => format!("[{}]", all.iter().map(short).collect::<Vec<_>>().join(", ")),
        other => other.as_f64().map_or_else(|| "-".into(), |number| format!("{number:.2}")),
    }
}

/// The true drop must be within three times the stated interval, which extends about two standard errors to each side.
fn rates(grade: Grade, contender: &Value) -> Option<String> {
    let Grade::Confirmed(before, after) = grade else { return None };
    let drop = before - after;
    let bounds = [0, 1].map(|n| contender["interval"][n].as_f64().unwrap_or(f64::NAN));
    let (middle, half) = ((bounds[0] + bounds[1]) / 2.0, (bounds[1] - bounds[0]) / 2.0);
    let reported = number(contender, "rate_before") - number(contender, "rate_after");
    let transitions = contender["transitions"].as_u64().unwrap_or_default();
    let right = (middle - drop).abs() <= 3.0 * half && (reported - drop).abs() <= 3.0 * half && transitions >= 2;
    (!right).then(|| format!("a drop of {reported:.3}, within {bounds:.3?}, over {transitions} changes; it was {drop:.3}"))
}

fn cause(to: &mut Verdicts, scenario: &Scenario, expected: &CauseOf, victim: &Played, uuid: &str, report: &Value) {
    let usages = entries(report, victim).into_iter().filter_map(|entry| usage(entry, uuid));
    let found = usages.filter_map(|usage| usage["causes"].as_array()).flatten().find(|cause| cause["cause"] == expected.cause);
    let verdict = found.and_then(|cause| cause["verdict"].as_str()).unwrap_or("nothing");
    let detail = found.and_then(|cause| cause["detail"].as_str()).unwrap_or_default();
    let problem = if verdict != expected.verdict {
        Some(format!("{verdict}, not {}: {detail:?}", expected.verdict))
    } else if verdict == "possible" && !detail.contains(|c: char| c.is_ascii_digit()) {
        Some(format!("possible, without a number: {detail:?}"))
    } else {
        None
    };
    let reported: String = format!("{verdict}: {detail}").chars().take(58).collect();
    to.row(scenario.name, &format!("{}: {}", expected.victim, expected.cause), expected.verdict, &reported, problem);
}
