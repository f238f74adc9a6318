//! Contention analysis against the truth: scenarios with known users are run and recorded, and the report is verified.

mod runner;
mod scenarios;
mod verify;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Agent, run_cli};
use serde_json::{Value, json};

use runner::{Played, Runner, rfc3339};
use scenarios::{DURATION, Grade, Scenario};
use verify::{Truth, Verdicts, verify};

/// Time to start some forty processes in, on a busy machine.
const LEAD: Duration = Duration::from_secs(12);
/// The largest difference between the seconds that the demands imply and those that were simulated; processes start late by tens of ms.
const NOMINAL: f64 = 1.5;

/// Fails unless each user got the GPU time that its scenario declares.
fn played_as_declared(scenarios: &[Scenario], played: &[Vec<Played>], truth: &Truth<'_>) -> Result<()> {
    let mut wrong = Vec::new();
    for (gpu, (scenario, users)) in scenarios.iter().zip(played).enumerate() {
        for (declared, user) in scenario.users.iter().zip(users) {
            let seconds = truth.seconds(gpu, &user.pids());
            println!("{:<37} {:<10} {seconds:.2} s, declared {:.2} s", scenario.name, user.name, declared.seconds);
            if (seconds - declared.seconds).abs() > NOMINAL {
                wrong.push(format!("{}, {}: {seconds} s instead of {}", scenario.name, user.name, declared.seconds));
            }
        }
    }
    ensure!(wrong.is_empty(), "not played as declared:\n{}", wrong.join("\n"));
    Ok(())
}

/// All scenarios run at once, each on a GPU of its own.
#[test]
fn the_report_names_contenders_as_the_scenarios_declare_them() -> Result<()> {
    let scenarios = scenarios::all();
    let runner = Runner::new(scenarios.len(), LEAD)?;
    let agent = Agent::start(Some(&runner.sim), &[])?;
    let (session, played) = std::thread::scope(|scope| {
        let session = scope.spawn(|| {
            runner.wait_until(0.0);
            agent.record(Duration::from_secs_f64(DURATION), Duration::ZERO)
        });
        let played = runner.play(&scenarios);
        (session.join().expect("the recording thread does not panic"), played)
    });
    let played = played?;
    let end = runner.begin + Duration::from_secs_f64(DURATION);
    let truth = runner.sim.truth(&["--from", &rfc3339(runner.begin)?, "--to", &rfc3339(end)?])?;
    played_as_declared(&scenarios, &played, &Truth(&truth))?;

    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), agent.session_file(&session?, Duration::from_secs(60))?)?;
    let path = file.path().to_string_lossy().into_owned();
    let (code, out, err) = run_cli(&["report", &path, "--format", "json"])?;
    ensure!(code == Some(0), "gpu-sampler report: {err}");
    let report: Value = serde_json::from_str(&out).context("the report is JSON")?;
    let (from, to) = span(&report)?;
    let truth = runner.sim.truth(&["--from", &from, "--to", &to])?;
    let verdicts = verify(&scenarios, &played, &Truth(&truth), &report)?;
    println!("{}", verdicts.table);
    ensure!(verdicts.wrong.is_empty(), "{} lines are wrong:\n{}", verdicts.wrong.len(), verdicts.wrong.join("\n"));
    Ok(())
}

/// Begin and end of the time that a report covers.
fn span(report: &Value) -> Result<(String, String)> {
    let from = report["start"].as_str().context("start")?;
    let begun_us = nvidia_ml_sim::time::parse(from)?;
    let lasted = report["duration_seconds"].as_f64().context("duration_seconds")?;
    Ok((from.to_owned(), nvidia_ml_sim::time::format(begun_us + (lasted * 1e6) as u64)))
}

/// A report, made by hand, that is correct for every scenario.
fn perfect(scenarios: &[Scenario], played: &[Vec<Played>], truth: &Truth<'_>) -> Value {
    let id = |user: &Played| user.cgroup.clone().unwrap_or_else(|| format!("pid:{}@1", user.pids()[0]));
    let kind = |user: &Played| if user.cgroup.is_some() { "container" } else { "host" };
    let (mut containers, mut gpus) = (Vec::new(), Vec::new());
    for (gpu, (scenario, users)) in scenarios.iter().zip(played).enumerate() {
        let uuid = truth.uuid(gpu).expect("the truth has all GPUs");
        gpus.push(json!({"uuid": uuid, "unobserved_seconds": 0.0}));
        for user in users {
            let pairs = scenario.pairs.iter().filter(|pair| pair.victim == user.name).map(|pair| {
                let other = users.iter().find(|other| other.name == pair.aggressor).expect("the aggressor of the pair");
                let mut entry = json!({"kind": kind(other), "id": id(other), "evidence": "coactive", "transitions": 0,
                    "rate_before": null, "rate_after": null, "interval": null, "why_not_confirmed": "no change"});
                if let Grade::Confirmed(before, after) = pair.grade {
                    entry["evidence"] = json!("on-off-confirmed");
                    (entry["rate_before"], entry["rate_after"], entry["transitions"]) = (json!(before), json!(after), json!(6));
                    entry["interval"] = json!([before - after - 0.1, before - after + 0.1]);
                }
                entry
            });
            let causes = scenario.causes.iter().filter(|cause| cause.victim == user.name);
            let causes = causes.map(|cause| json!({"cause": cause.cause, "verdict": cause.verdict, "detail": "12.3 s of 90 s"}));
            let usage = json!({"uuid": uuid, "gpu_seconds": truth.seconds(gpu, &user.pids()), "gpu_seconds_stderr": 0.2,
                "contenders": pairs.collect::<Vec<_>>(), "causes": causes.collect::<Vec<_>>()});
            containers.push(json!({"kind": kind(user), "id": id(user), "gpus": [usage]}));
        }
    }
    json!({"format": 2, "users": containers, "gpus": gpus})
}

/// Users and truth as if the scenarios had been run.
fn imagined(scenarios: &[Scenario]) -> (Vec<Vec<Played>>, Value) {
    let mut pid = 100;
    let (mut played, mut gpus) = (Vec::new(), Vec::new());
    for (gpu, scenario) in scenarios.iter().enumerate() {
        let (mut users, mut processes) = (Vec::new(), Vec::new());
        for declared in &scenario.users {
            let acts: Vec<Vec<u32>> =
                declared.acts.iter().map(|_| std::iter::once(pid).inspect(|_| pid += 1).collect()).collect();
            let each = declared.seconds / acts.len() as f64;
            processes.extend(acts.iter().flatten().map(|pid| json!({"pid": pid, "gpu_seconds": each})));
            let cgroup = (declared.place != scenarios::CgroupPlace::Host).then(|| format!("/x/{pid:064x}"));
            users.push(Played { name: declared.name, cgroup, acts });
        }
        gpus.push(json!({"uuid": format!("GPU-{gpu}"), "processes": processes}));
        played.push(users);
    }
    (played, json!({"gpus": gpus}))
}

#[test]
fn a_correct_report_passes_and_errors_are_named() {
    let scenarios = scenarios::all();
    let (played, truth) = imagined(&scenarios);
    let truth = Truth(&truth);
    let right = perfect(&scenarios, &played, &truth);
    let verified = |report: &Value| -> Verdicts { verify(&scenarios, &played, &truth, report).unwrap() };
    let Verdicts { table, wrong } = verified(&right);
    println!("{table}");
    assert_eq!(wrong, [""; 0]);
    let check = |change: &dyn Fn(&mut Value), expect: &[&str]| {
        let mut report = right.clone();
        change(&mut report);
        let wrong = verified(&report).wrong;
        assert_eq!(wrong.len(), expect.len(), "{wrong:?}");
        wrong.iter().zip(expect).for_each(|(line, expect)| assert!(line.contains(expect), "{line:?}: {expect:?}"));
    };
    // The first user of the first scenario, and the victim of the third.
    let first = |report: &mut Value| std::mem::take(&mut report["users"][0]["gpus"][0]["gpu_seconds"]);
    let victim = "comes and goes as processes, victim";
    check(&|r| drop(first(r)), &["fair pair, a: NaN"]);
    check(&|r| r["users"][0]["gpus"][0]["gpu_seconds"] = json!(46.8), &["fair pair, a: 46.8"]);
    check(&|r| r["gpus"][0]["unobserved_seconds"] = json!(1.0), &[]);
    let set = |r: &mut Value, key: &str, value: Value| r["users"][4]["gpus"][0]["contenders"][0][key] = value;
    check(&|r| set(r, "evidence", json!("coactive")), &[&format!("{victim} <- comes: \"coactive\" instead of")]);
    check(&|r| set(r, "interval", json!([0.0, 0.1])), &[&format!("{victim} <- comes: a drop of 0.500")]);
    check(&|r| set(r, "interval", Value::Null), &[&format!("{victim} <- comes: a drop of 0.500")]);
    check(&|r| set(r, "id", json!("/another")), &[&format!("{victim} <- comes: it is not listed as a contender")]);
    check(&|r| r["users"][0]["gpus"][0]["causes"][0]["verdict"] = json!("unknown"), &["fair pair, a: gpu-clocks: unknown, not"]);
    check(&|r| r["users"][0]["gpus"][0]["contenders"][0]["evidence"] = json!("on-off-confirmed"), &["fair pair, a <- b"]);
    // A container with two lifetimes that the report separates, correctly and not.
    let last = right["users"].as_array().unwrap().len() - 2;
    let lives = |r: &mut Value, seconds: [f64; 2]| {
        let mut second = r["users"][last].clone();
        second["id"] = json!(format!("{}#2", second["id"].as_str().unwrap()));
        (second["gpus"][0]["gpu_seconds"], second["gpus"][0]["contenders"]) = (json!(seconds[1]), json!([]));
        r["users"][last]["gpus"][0]["gpu_seconds"] = json!(seconds[0]);
        r["users"].as_array_mut().unwrap().push(second);
    };
    check(&|r| lives(r, [9.75, 9.75]), &[]);
    check(&|r| lives(r, [12.0, 7.5]), &["restarted in between, restarted's lifetimes"]);
}

#[test]
fn scenarios_refer_to_their_own_users_and_fit_their_duration() {
    for scenario in scenarios::all() {
        let known = |name: &str| assert!(scenario.users.iter().any(|user| user.name == name), "{}: {name}", scenario.name);
        scenario.pairs.iter().for_each(|pair| [pair.victim, pair.aggressor].into_iter().for_each(known));
        scenario.causes.iter().for_each(|cause| known(cause.victim));
        let seconds: f64 = scenario.users.iter().map(|user| user.seconds).sum();
        assert!(seconds > 0.0 && seconds <= DURATION + 1e-9, "{}: {seconds}", scenario.name);
    }
}
