//! GPUs that the agent lets go of: on request, and lost ones. The simulated library holds device nodes open as the real one does, until its
//! last shutdown, so the descriptors of the agent show which handles exist. GPUs that cannot be opened are tried ever more rarely.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use devkit::http::Server;
use gpu_sampler_tests::{Agent, Running, Sample, Sim, run_cli, sum, var, wait_for};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);
/// No label sources and no kernel events: these tests are about the driver.
const ARGS: [&str; 4] = ["--kernel-mode", "procfs", "--docker-endpoint", "unix:///run/gpu-sampler-tests-none.sock"];
/// Counted time may lag behind the clock by the time that samples wait for their process samples.
const LAG: f64 = 1.5;
const WORLD: &str = "kernel_files = true\n[[gpus]]\n[[gpus]]";

struct Stage {
    sim: Sim,
    agent: Agent,
    gpus: Vec<String>,
    _loads: Vec<Running>,
}

impl Stage {
    /// An agent that samples two GPUs under load.
    fn start() -> Result<Self> {
        let sim = Sim::new(WORLD)?;
        let mut loads = Vec::new();
        for gpu in ["0", "1"] {
            let mut command = Command::new(var("NVML_SIM_BIN")?);
            command.args(["run", "--gpu", gpu, "--demand", "0.7", "--dir"]).arg(sim.dir.path()).args(["--", "sleep", "300"]);
            loads.push(Running(command.spawn()?));
        }
        let sessions = sim.dir.path().join("sessions").to_string_lossy().into_owned();
        let agent = Agent::start(Some(&sim), &[&ARGS[..], &["--session-dir", &sessions]].concat())?;
        let gpus = wait_for("samples of both GPUs", Duration::from_secs(20), || {
            let page = agent.scrape()?;
            let sampled = page.iter().filter(|s| s.name == "gpu_sampler_last_sample_timestamp_seconds").count();
            Ok((sampled == 2).then(|| [uuid(&page, 0), uuid(&page, 1)].into_iter().flatten().collect::<Vec<_>>()))
        })?;
        ensure!(gpus.len() == 2, "two GPUs");
        std::thread::sleep(3 * SECOND);
        Ok(Self { sim, agent, gpus, _loads: loads })
    }

    fn nodes(&self) -> Vec<String> {
        open_nodes(&self.agent, &self.sim)
    }

    /// Waits until the agent has exactly these nodes open; returns the time from `from`.
    fn wait_for_nodes(&self, expect: &[&str], from: Instant, at_most: Duration) -> Result<Duration> {
        wait_for(&format!("the open nodes are {expect:?}, not {:?}", self.nodes()), at_most, || {
            Ok((self.nodes() == expect).then_some(()))
        })?;
        Ok(from.elapsed())
    }

    fn post(&self, body: &str) -> Result<(u16, Value)> {
        let server = Server::tcp(([127, 0, 0, 1], self.agent.port).into());
        let response = server.request("POST", "/api/v1/gpus/release", "application/json", body.as_bytes())?;
        Ok((response.status, serde_json::from_slice(&response.body)?))
    }

    fn cli(&self, args: &[&str]) -> Result<(Option<i32>, String, String)> {
        let url = format!("http://127.0.0.1:{}", self.agent.port);
        run_cli(&[args, &["--agent", &url]].concat())
    }
}

fn open_nodes(agent: &Agent, sim: &Sim) -> Vec<String> {
    let folder = Path::new("/proc").join(agent.process.0.id().to_string()).join("fd");
    let links = fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|link| fs::read_link(link.path()).ok());
    let devices = sim.devices();
    let mut nodes: Vec<String> =
        links.filter_map(|path| Some(path.strip_prefix(&devices).ok()?.to_string_lossy().into_owned())).collect();
    nodes.sort();
    nodes.dedup();
    nodes
}

fn uuid(page: &[Sample], index: usize) -> Option<String> {
    let index = index.to_string();
    page.iter().find(|s| s.name == "gpu_info" && s.labels["index"] == index).map(|s| s.labels["uuid"].clone())
}

fn time(page: &[Sample], uuid: &str, state: &str) -> f64 {
    sum(page, "gpu_time_seconds_total", &[("uuid", uuid), ("state", state)]).unwrap_or_default()
}

fn all_time(page: &[Sample], uuid: &str) -> f64 {
    sum(page, "gpu_time_seconds_total", &[("uuid", uuid)]).unwrap_or_default()
}

fn age(page: &[Sample], uuid: &str) -> Result<f64> {
    let at = sum(page, "gpu_sampler_last_sample_timestamp_seconds", &[("uuid", uuid)]).context("no sample")?;
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() - at)
}

/// Credited and unattributed time is busy time.
fn assert_sums(page: &[Sample]) -> Result<()> {
    let busy = sum(page, "gpu_time_seconds_total", &[("state", "busy")]).context("busy")?;
    let credited = sum(page, "gpu_credited_seconds_total", &[]).unwrap_or_default();
    let unattributed = sum(page, "gpu_unattributed_seconds_total", &[]).context("unattributed")?;
    ensure!((busy - credited - unattributed).abs() < 1e-6, "{credited} + {unattributed} is not {busy}");
    Ok(())
}

#[test]
fn a_release_closes_every_handle_under_load_and_sampling_resumes() -> Result<()> {
    let stage = Stage::start()?;
    stage.wait_for_nodes(&["nvidia0", "nvidia1", "nvidiactl"], Instant::now(), SECOND)?;
    let (before, from) = (stage.agent.scrape()?, Instant::now());
    let (code, text, error) = stage.cli(&["release", "--for", "6s"])?;
    let took = stage.wait_for_nodes(&[], from, SECOND)?;
    println!("closed within {took:?}\n{text}");
    ensure!(code == Some(0), "{error}");
    ensure!(took < SECOND, "closed after {took:?}");
    for expect in ["GPU 0 GPU-", "GPU 1 GPU-", "dev/nvidiactl", "dev/nvidia1", "the agent samples again at 20"] {
        ensure!(text.contains(expect), "{expect:?} is not in {text}");
    }
    std::thread::sleep(SECOND);
    let early = stage.agent.scrape()?;
    while from.elapsed() < Duration::from_millis(5_500) {
        ensure!(stage.nodes().is_empty(), "{:?} are open {:?} after the request", stage.nodes(), from.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    let late = stage.agent.scrape()?;
    for (slot, gpu) in stage.gpus.iter().enumerate() {
        for state in ["busy", "idle"] {
            ensure!(time(&late, gpu, state) == time(&early, gpu, state), "{state} time of a released GPU grows");
        }
        let unobserved = time(&late, gpu, "unobserved") - time(&early, gpu, "unobserved");
        ensure!(unobserved > 2.0, "{unobserved} s unobserved");
        let condition = format!("gpu-{slot}-released");
        ensure!(sum(&late, "gpu_sampler_degraded", &[("condition", &condition)]).is_some(), "no condition {condition}");
    }
    let resumed = stage.wait_for_nodes(&["nvidia0", "nvidia1", "nvidiactl"], from, 5 * SECOND)?;
    ensure!(resumed > Duration::from_millis(5_900) && resumed < 8 * SECOND, "resumed after {resumed:?}");
    wait_for("both GPUs are sampled", 5 * SECOND, || {
        let page = stage.agent.scrape()?;
        Ok((age(&page, &stage.gpus[0])? < 0.6 && age(&page, &stage.gpus[1])? < 0.6).then_some(()))
    })?;
    std::thread::sleep(4 * SECOND);
    let (after, elapsed) = (stage.agent.scrape()?, from.elapsed().as_secs_f64());
    for gpu in &stage.gpus {
        let unobserved = time(&after, gpu, "unobserved") - time(&before, gpu, "unobserved");
        ensure!(unobserved > 5.0 && unobserved < 9.0, "{unobserved} s unobserved");
        let all = all_time(&after, gpu) - all_time(&before, gpu);
        ensure!((all - elapsed).abs() < LAG, "{all} of {elapsed} s are in a state");
        ensure!(time(&after, gpu, "busy") > time(&before, gpu, "busy") + 0.8, "busy time does not grow again");
    }
    [&before, &early, &late, &after].into_iter().try_for_each(|page| assert_sums(page))?;
    let released = after.iter().find(|s| s.name == "gpu_sampler_degraded" && s.labels["condition"].ends_with("released"));
    ensure!(released.is_none(), "{released:?}");
    // Sessions show the time with its own reason.
    let file = stage.sim.dir.path().join("session.gpus").to_string_lossy().into_owned();
    let (code, _, error) = stage.cli(&["record", "--duration", "1s", "--lookback", "20s", "-o", &file])?;
    ensure!(code == Some(0), "{error}");
    let (_, report, error) = run_cli(&["report", &file, "--format", "json"])?;
    let report: Value = serde_json::from_str(&report).context(error)?;
    let gaps = report["gaps"].as_array().context("gaps")?;
    ensure!(gaps.iter().any(|gap| gap["reason"].as_str().is_some_and(|r| r.contains("released"))), "{gaps:?}");
    Ok(())
}

#[test]
fn one_of_two_gpus_is_released_and_the_other_one_is_sampled() -> Result<()> {
    let stage = Stage::start()?;
    let from = Instant::now();
    let (status, reply) = stage.post(r#"{"gpu": 1, "seconds": 5}"#)?;
    ensure!(status == 200 && reply["released"][0]["uuid"] == *stage.gpus[1], "{status} {reply}");
    ensure!(reply["released"].as_array().map(Vec::len) == Some(1) && reply["seconds"] == 5, "{reply}");
    let took = from.elapsed();
    println!("released within {took:?}: {reply}");
    ensure!(took < 2 * SECOND && !stage.nodes().contains(&"nvidia1".to_owned()), "{took:?} {:?}", stage.nodes());
    stage.wait_for_nodes(&["nvidia0", "nvidiactl"], from, 2 * SECOND)?;
    wait_for("the other GPU is sampled", 3 * SECOND, || Ok((age(&stage.agent.scrape()?, &stage.gpus[0])? < 0.6).then_some(())))?;
    while from.elapsed() < Duration::from_millis(4_800) {
        ensure!(!stage.nodes().contains(&"nvidia1".to_owned()), "the released GPU is open after {:?}", from.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(age(&stage.agent.scrape()?, &stage.gpus[1])? > 4.0, "the released GPU was sampled");
    stage.wait_for_nodes(&["nvidia0", "nvidia1", "nvidiactl"], from, 5 * SECOND)?;
    wait_for("it is sampled again", 5 * SECOND, || Ok((age(&stage.agent.scrape()?, &stage.gpus[1])? < 0.6).then_some(())))?;
    // By UUID, through the command.
    let (code, reply, error) = stage.cli(&["release", "--gpu", &stage.gpus[0], "--for", "1s", "--json"])?;
    let reply: Value = serde_json::from_str(&reply).with_context(|| error.clone())?;
    ensure!(code == Some(0) && reply["released"][0]["index"] == 0, "{reply} {error}");
    wait_for("both are sampled", 8 * SECOND, || {
        let page = stage.agent.scrape()?;
        Ok((age(&page, &stage.gpus[0])? < 0.6 && age(&page, &stage.gpus[1])? < 0.6).then_some(()))
    })
}

#[test]
fn invalid_releases_are_refused_with_the_reason() -> Result<()> {
    let stage = Stage::start()?;
    for (body, status, expect) in [
        (r#"{"gpu": 7}"#, 404, "there is no GPU 7; the agent knows 0 (GPU-"),
        (r#"{"gpu": "GPU-x"}"#, 404, "there is no GPU \"GPU-x\""),
        (r#"{"gpu": -1}"#, 400, "gpu"),
        (r#"{"seconds": 0}"#, 400, "give whole seconds from 1 to 3600"),
        (r#"{"seconds": 3601}"#, 400, "invalid seconds = 3601"),
        (r#"{"second": 5}"#, 400, "unknown field `second`"),
        ("{", 400, "EOF"),
    ] {
        let (found, reply) = stage.post(body)?;
        let error = reply["error"].as_str().unwrap_or_default();
        ensure!(found == status && error.contains(expect), "{body}: {found} {reply}");
    }
    let (code, _, error) = stage.cli(&["release", "--gpu", "7"])?;
    ensure!(code == Some(1) && error.contains("there is no GPU \"7\""), "{code:?} {error}");
    let (code, _, error) = stage.cli(&["release", "--for", "0s"])?;
    ensure!(code == Some(2) && error.contains("expected whole seconds from 1s to 1h"), "{code:?} {error}");
    let (code, _, error) = run_cli(&["release", "--agent", "http://127.0.0.1:1"])?;
    ensure!(code == Some(1) && error.contains("no agent is reachable"), "{code:?} {error}");
    ensure!(stage.nodes().len() == 3, "a refused request closed nodes: {:?}", stage.nodes());
    Ok(())
}

#[test]
fn a_lost_gpu_is_let_go_of_and_opened_again_when_it_is_back() -> Result<()> {
    let stage = Stage::start()?;
    stage.sim.inject("fault", &["--gpu", "0", "--kind", "lost"])?;
    stage.sim.inject("xid", &["--gpu", "0", "--xid", "79"])?;
    let closed = stage.wait_for_nodes(&["nvidia1", "nvidiactl"], Instant::now(), 5 * SECOND)?;
    println!("closed within {closed:?}");
    wait_for("the other GPU is sampled", 5 * SECOND, || Ok((age(&stage.agent.scrape()?, &stage.gpus[1])? < 0.6).then_some(())))?;
    // Tries that fail leave no node open, and disturb the other GPU less and less.
    let from = Instant::now();
    while from.elapsed() < 8 * SECOND {
        ensure!(stage.nodes() == ["nvidia1", "nvidiactl"], "{:?} are open", stage.nodes());
        ensure!(age(&stage.agent.scrape()?, &stage.gpus[1])? < 2.0, "the other GPU is not sampled");
        std::thread::sleep(Duration::from_millis(100));
    }
    let page = stage.agent.scrape()?;
    ensure!(sum(&page, "gpu_sampler_degraded", &[("condition", "gpu-0")]).is_some(), "no condition of the lost GPU");
    stage.sim.inject("fault", &["--clear"])?;
    wait_for("it is sampled again", 20 * SECOND, || Ok((age(&stage.agent.scrape()?, &stage.gpus[0])? < 0.6).then_some(())))?;
    let log = stage.agent.log()?;
    ensure!(log.contains("is lost") && log.contains("is back"), "{log}");
    ensure!(stage.nodes().len() == 3, "{:?}", stage.nodes());
    Ok(())
}

#[test]
fn a_gpu_that_is_lost_before_the_agent_starts_is_let_go_of() -> Result<()> {
    let fault = "[[faults]]\ngpu = 0\nkind = 'lost'\nfrom = '0s'";
    let sim = Sim::new(&format!("{WORLD}\n{fault}"))?;
    let agent = Agent::start(Some(&sim), &ARGS)?;
    let of_other = ["nvidia1", "nvidiactl"];
    wait_for("the node of the lost GPU is closed", 10 * SECOND, || Ok((open_nodes(&agent, &sim) == of_other).then_some(())))?;
    let page = wait_for("the other GPU is sampled", 10 * SECOND, || {
        let page = agent.scrape()?;
        let is_sampled = page.iter().any(|s| s.name == "gpu_sampler_last_sample_timestamp_seconds");
        Ok(is_sampled.then_some(page))
    })?;
    ensure!(sum(&page, "gpu_sampler_degraded", &[("condition", "gpu-index-0")]).is_some(), "no condition of the lost GPU");
    let from = Instant::now();
    while from.elapsed() < 3 * SECOND {
        ensure!(open_nodes(&agent, &sim) == of_other, "{:?} are open", open_nodes(&agent, &sim));
        std::thread::sleep(Duration::from_millis(100));
    }
    sim.inject("fault", &["--clear"])?;
    wait_for("it is opened once it is back", 30 * SECOND, || Ok((open_nodes(&agent, &sim).len() == 3).then_some(())))
}

#[test]
fn a_gpu_that_cannot_be_opened_is_tried_ever_more_rarely_and_holds_up_nothing() -> Result<()> {
    let fault = "[[faults]]\ngpu = 1\nkind = 'error'\nerror = 'UNKNOWN'\ncall = 'nvmlDeviceGetUUID'\nfrom = '0s'";
    let sim = Sim::new(&format!("kernel_files = true\n[[gpus]]\n[[gpus]]\n[[gpus]]\n{fault}"))?;
    let agent = Agent::start(Some(&sim), &ARGS)?;
    let from = Instant::now();
    let tries = || Ok::<_, anyhow::Error>(fs::read(sim.dir.path().join("opens/nvidia1")).map_or(0, |bytes| bytes.len()));
    let infos = || Ok::<_, anyhow::Error>(agent.scrape()?.iter().filter(|s| s.name == "gpu_info").count());
    wait_for("the other GPUs are sampled", 10 * SECOND, || Ok((infos()? == 2).then_some(())))?;
    let page = agent.scrape()?;
    ensure!(sum(&page, "gpu_sampler_degraded", &[("condition", "gpu-index-1")]).is_some(), "no condition");
    let other = uuid(&page, 0).context("GPU 0")?;
    while from.elapsed() < 17 * SECOND {
        std::thread::sleep(SECOND);
        ensure!(age(&agent.scrape()?, &other)? < 2.0, "the other GPU is held up");
    }
    // Tries after 0, 5 and 15 s; one every 5 s would be four.
    let early = tries()?;
    ensure!((2..=3).contains(&early), "{early} tries in 17 s");
    // Another GPU is removed in the meantime; with another number of GPUs, the indices are tried again.
    sim.inject("fault", &["--gpu", "2", "--kind", "absent"])?;
    wait_for("the removed GPU ends", 15 * SECOND, || Ok(agent.log()?.contains("GPU gone").then_some(())))?;
    ensure!(uuid(&agent.scrape()?, 0).is_some(), "the wrong GPU ended");
    sim.inject("fault", &["--clear", "--gpu", "1"])?;
    wait_for("it is opened", 45 * SECOND, || {
        Ok(sum(&agent.scrape()?, "gpu_sampler_degraded", &[("condition", "gpu-index-1")]).is_none().then_some(()))
    })?;
    println!("{} tries within {:?}", tries()?, from.elapsed());
    Ok(())
}
