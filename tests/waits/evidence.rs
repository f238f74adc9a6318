//! The judgement of waiting: a contender that comes and goes is confirmed, a pipeline is not, and the pressure of a running agent shows it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::browser::Browser;
use gpu_sampler_tests::cuda::WaitTruth;
use gpu_sampler_tests::{Agent, sum, wait_for};
use serde_json::Value;

use super::{CudaClient, WaitScene, now_us, number, report_of, url, user};

/// The grid of samples has the jitter of a real card (199.9 ms, 196.9 to 203.5): without any it is in step with work that repeats exactly,
/// as this one does on a quiet machine, and all samples of a phase then name the same user.
const WORLD: &str = "seed = 8\n[[gpus]]\njitter_us = 3300\n[[gpus]]\njitter_us = 3300";
/// Phases of the users that come and go.
const ON: Duration = Duration::from_secs(8);
const RECORDED: Duration = Duration::from_secs(60);
/// Until the first pressure: windows settle after 15 s, and five of them make a baseline.
const FIRST_PRESSURE: Duration = Duration::from_secs(45);
/// Alone, and at its most while the other comes and goes: it is half of the time then, of which a mean over ten windows has most.
const ALONE_AT_MOST: f64 = 0.1;
/// Of its error: next to other work of the processors the windows differ.
const STDERR_AT_MOST: f64 = 0.2;
const TOGETHER_AT_LEAST: f64 = 0.2;
/// Of an interval; the test accepts one of twice its width, which chance exceeds once in 15,000 times.
const WIDEST: f64 = 0.4;
/// Waiting per second from which a report confirms.
const LEAST_EFFECT: f64 = 0.02;

/// Seconds of the span in which a user is on that begins at this time, and is off for as long, in turn.
fn on_s(begin_us: u64, (from_us, to_us): (u64, u64)) -> f64 {
    let on_us = ON.as_micros() as u64;
    let starts = (0..).map(|n| begin_us + 2 * n * on_us).take_while(|start| *start < to_us);
    let within = |start: u64| (start + on_us).min(to_us).saturating_sub(start.max(from_us));
    starts.map(within).sum::<u64>() as f64 * 1e-6
}

fn family(agent: &Agent, name: &str, client: &CudaClient) -> Result<Option<f64>> {
    Ok(sum(&agent.scrape()?, name, &[("container_id", &client.container_id)]))
}

fn pressure(agent: &Agent, client: &CudaClient) -> Result<Option<f64>> {
    family(agent, "container_gpu_pressure_ratio", client)
}

/// The other user as a contender of this one; `None` if they were never active together.
fn contender<'r>(report: &'r Value, client: &CudaClient, other: &CudaClient) -> Result<Option<&'r Value>> {
    let user = user(report, client).with_context(|| format!("{client:?} is a user"))?;
    let contenders = user["gpus"][0]["contenders"].as_array().context("contenders")?;
    Ok(contenders.iter().find(|contender| contender["id"] == other.path))
}

/// Those that are on in turn, all on one clock.
struct PlayedUsers {
    victim: CudaClient,
    other: CudaClient,
    /// A user that works half as much while another one is on, and does not wait for it.
    stage: CudaClient,
    first_stage: CudaClient,
    begin_us: u64,
}

/// Starts the users that come and go; the victim runs.
fn play(scene: &mut WaitScene, victim: CudaClient) -> Result<PlayedUsers> {
    let begin_us = now_us()? + 3_000_000;
    let at = |us: u64| nvidia_ml_sim::time::format(us);
    let phase = format!("--phase {0}s:{0}s --for 100s", ON.as_secs());
    let on = format!("{phase} --static-start {}", at(begin_us));
    let off = format!("{phase} --static-start {}", at(begin_us + ON.as_micros() as u64));
    let other = scene.work(2, &format!("--kernel 5ms --back-to-back {on}"))?;
    let first_stage = scene.work(3, &format!("--kernel 1ms --every 13ms --gpu 1 {on}"))?;
    let stage = scene.work(4, "--kernel 4ms --every 50ms --gpu 1 --for 110s")?;
    // In the same container.
    scene.work(4, &format!("--kernel 4ms --every 10ms --gpu 1 {off}"))?;
    ensure!(now_us()? < begin_us, "the users start in time");
    Ok(PlayedUsers { victim, other, stage, first_stage, begin_us })
}

#[test]
fn a_contender_that_comes_and_goes_is_confirmed_and_a_pipeline_is_not() -> Result<()> {
    let mut scene = WaitScene::new("waits-evidence", WORLD)?;
    let victim = scene.work(1, "--kernel 5ms --back-to-back --for 170s")?;
    let agent = scene.agent(&["--wait-probes"])?;
    scene.wait_until_probed(&victim)?;
    let alone = wait_for("the pressure of a user alone", FIRST_PRESSURE, || pressure(&agent, &victim))?;
    println!("pressure alone: {alone:.3}");
    assert!((0.0..ALONE_AT_MOST).contains(&alone), "{alone}");
    let stderr = family(&agent, "container_gpu_pressure_stderr_ratio", &victim)?.context("the error of the pressure")?;
    assert!((0.0..STDERR_AT_MOST).contains(&stderr), "{stderr}");

    let played = play(&mut scene, victim)?;
    let session = agent.record(RECORDED, Duration::ZERO)?;
    let (mut most, mut by_others, mut ends_us) = (0.0, None, now_us()? + RECORDED.as_micros() as u64);
    while now_us()? < ends_us {
        let page = agent.scrape()?;
        let of_victim = ("container_id", &*played.victim.container_id);
        let by = |labels: &[(&str, &str)]| sum(&page, "container_gpu_contender_pressure_ratio", labels);
        let by_both = by(&[of_victim]).zip(by(&[of_victim, ("other_container_id", &played.other.container_id)]));
        let found = sum(&page, "container_gpu_pressure_ratio", &[of_victim]).unwrap_or_default();
        if found > most && by_both.is_some() {
            (most, by_others) = (found, by_both);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    let (by_all, by_other) = by_others.context("the pressure is attributed to others")?;
    println!(
        "pressure at its most: {most:.3}, of which {by_all:.3} is that of others, {by_other:.3} that of the one that came and went"
    );
    assert!(by_all <= most + 1e-6 && by_other > 0.8 * most, "{by_all}, {by_other} of {most}");
    check_totals(&agent, &played.victim)?;
    let report = report_of(&agent, &session)?;
    let start_us = nvidia_ml_sim::time::parse(report["start"].as_str().context("start")?)?;
    ends_us = start_us + (number(&report, "duration_seconds")? * 1e6) as u64;
    let span = (start_us, ends_us);
    check_confirmed(&scene, &report, &played, span)?;
    check_pipeline(&scene, &report, &played, span)?;
    assert!(most > TOGETHER_AT_LEAST, "the pressure while the other came and went was at most {most}");
    check_page(&agent, &played)
}

/// The agent's page has a column of pressure with a tooltip: the waiting, and the pressure by user. The other still comes and goes.
fn check_page(agent: &Agent, played: &PlayedUsers) -> Result<()> {
    let browser = Browser::start(1280, 1000)?;
    browser.open(&url(agent))?;
    browser.shows("#users", &["Pressure", &played.victim.container_id[..12]])?;
    let tooltips = "return [...document.querySelectorAll('#users td[data-label=Pressure]')].map((cell) => cell.innerText + ': ' + cell.title)";
    let by_other = format!("; pressure by {}", &played.other.container_id[..12]);
    let shown = wait_for("the page has the pressure by the other", FIRST_PRESSURE, || {
        let cells: Vec<String> = serde_json::from_value(browser.script(tooltips)?)?;
        Ok(cells.into_iter().find(|cell| cell.contains(&by_other)))
    })?;
    println!("page: {shown}");
    assert!(shown.contains("%: waited ") && shown.contains(" with wait probes; "), "{shown}");
    browser.assert_no_errors()
}

/// A user that always waits for its own work or for that of another.
fn check_totals(agent: &Agent, victim: &CudaClient) -> Result<()> {
    let seconds = |name: &str| family(agent, name, victim)?.with_context(|| name.to_owned());
    let (waited, probed) = (seconds("container_gpu_wait_seconds_total")?, seconds("container_gpu_wait_probed_seconds_total")?);
    println!("waited {waited:.1} of {probed:.1} s");
    assert!(probed > RECORDED.as_secs_f64() && waited > 0.8 * probed && waited <= probed, "{waited} of {probed} s");
    Ok(())
}

fn check_confirmed(scene: &WaitScene, report: &Value, played: &PlayedUsers, span: (u64, u64)) -> Result<()> {
    let truth = scene.sim.wait_truth(played.victim.pid, span)?.context("the victim used CUDA")?;
    let truth = truth.during(played.other.pid) / on_s(played.begin_us, span);
    let found = contender(report, &played.victim, &played.other)?.context("the other is a contender")?;
    println!("truth {truth:.3} s/s: {found}");
    assert_eq!(found["evidence"], "demand-confirmed", "{found}");
    assert_eq!(found["why_not_confirmed"], "", "{found}");
    let demand = &found["demand"];
    let ends = demand["interval"].as_array().context("interval")?;
    let [least, most] = [0, 1].map(|n| ends.get(n).and_then(Value::as_f64).unwrap_or(f64::NAN));
    let (rate, width) = (number(demand, "wait_rate")?, most - least);
    assert!(least <= rate && rate <= most && width < WIDEST, "{demand}");
    let accepted = least - width / 2.0..=most + width / 2.0;
    assert!(accepted.contains(&truth), "{demand}: the truth is {truth}");
    assert!(number(demand, "transitions")? >= 4.0 && number(demand, "wait_seconds")? > 5.0, "{demand}");
    let findings = report["findings"].as_array().context("findings")?;
    assert!(findings.iter().any(|finding| finding["evidence"] == "demand-confirmed"), "{findings:?}");
    Ok(())
}

fn check_pipeline(scene: &WaitScene, report: &Value, played: &PlayedUsers, span: (u64, u64)) -> Result<()> {
    let truth: WaitTruth = scene.sim.wait_truth(played.stage.pid, span)?.context("the stage used CUDA")?;
    let truth = truth.during(played.first_stage.pid) / on_s(played.begin_us, span);
    let found = contender(report, &played.stage, &played.first_stage)?.context("the first stage is a contender")?;
    println!("the pipeline: truth {truth:.4} s/s: {found}");
    ensure!(truth < LEAST_EFFECT, "the scenario is not a decoy: its second stage waited {truth} s/s for the first");
    assert!(found["evidence"] != "demand-confirmed", "{found}");
    assert!(found["demand"]["why_not_confirmed"].as_str().is_some_and(|reason| !reason.is_empty()), "{found}");
    Ok(())
}
