//! Serving engines in network namespaces of their own: found, read and reported, by an agent that has given up CAP_SYS_ADMIN.
//!
//! The engines are stand-ins: a real one needs a GPU and gigabytes. The stand-in has the command line of an engine, and serves pages with
//! the names and labels of vLLM and Triton.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::{Agent, Running, Sim, free_port, run_cli, var, wait_for};
use serde_json::{Value, json};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
/// Time for a session to end: it waits for late facts.
const ENDS: Duration = Duration::from_secs(30);
/// How long the other user is on, and off; of each, several intervals of a second are completely inside.
const PHASE: Duration = Duration::from_secs(8);
const PHASES: usize = 3;
/// Seconds to the first token without and with the other user.
const ALONE: f64 = 0.18;
const SHARED: f64 = 0.61;
/// An interval in which the other user starts or stops has requests of both kinds.
const TOLERANCE: f64 = 0.12;
/// CAP_SYS_ADMIN in a set of capabilities.
const SYS_ADMIN: u64 = 1 << 21;

/// A stand-in for an engine in a container with a GPU.
struct StandIn {
    _actor: Actor,
    _load: Running,
    /// Path of the container's cgroup.
    id: String,
    /// What its server does.
    file: PathBuf,
}

struct EngineScene {
    // Dropped in this order: processes are inside the tree.
    engines: Vec<StandIn>,
    sim: Sim,
    dir: tempfile::TempDir,
    tree: CgroupTree,
}

impl EngineScene {
    fn new(name: &str) -> Result<Self> {
        let (sim, dir, tree) = (Sim::new("seed = 11\n[[gpus]]")?, tempfile::tempdir()?, CgroupTree::new(name)?);
        Ok(Self { engines: Vec::new(), sim, dir, tree })
    }

    /// Starts an engine with the command line `PROGRAM serve FLAG PORT FILE`.
    fn start(&mut self, program: &str, flag: &str, port: u16, behaviour: &str, demand: f64) -> Result<()> {
        let n = self.engines.len() + 1;
        let folder = self.dir.path().join(n.to_string());
        std::fs::create_dir(&folder)?;
        let (link, file) = (folder.join(program), folder.join("behaviour"));
        symlink(ACTOR, &link)?;
        write(&file, behaviour)?;
        let (_, cgroup) = self.tree.container(n)?;
        let words = [&link.to_string_lossy(), "serve", flag, &port.to_string(), &file.to_string_lossy()].map(str::to_owned);
        let mut args = vec!["in".to_owned(), cgroup.to_string_lossy().into_owned(), "--".to_owned()];
        args.extend([ACTOR, "netns", "--"].map(str::to_owned));
        args.extend(words);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut actor = Actor::start(ACTOR, &args)?;
        let load = self.sim.load(actor.pid()?, 0, demand, &["--for", "300s"])?;
        self.engines.push(StandIn { _actor: actor, _load: load, id: self.tree.path_of(&cgroup), file });
        Ok(())
    }

    fn agent(&self, access: bool) -> Result<Agent> {
        let access = access.to_string();
        let runtime = self.runtime_dir();
        Agent::start(Some(&self.sim), &["--engine-access", &access, "--label-sources", "bundle", "--runtime-dir", &runtime])
    }

    fn runtime_dir(&self) -> String {
        self.dir.path().join("run").to_string_lossy().into_owned()
    }

    /// The report of a file, and as text.
    fn reports(&self, file: &Path) -> Result<(Value, String)> {
        let file = file.to_string_lossy();
        let of = |format: &str| {
            let (code, out, err) = run_cli(&["report", &file, "--format", format])?;
            ensure!(code == Some(0), "gpu-sampler report: {code:?}: {err}");
            anyhow::Ok(out)
        };
        Ok((serde_json::from_str(&of("json")?)?, of("text")?))
    }
}

/// Replaces the file at once, so that no request reads half of it.
fn write(file: &Path, text: &str) -> Result<()> {
    let part = file.with_extension("part");
    std::fs::write(&part, text)?;
    Ok(std::fs::rename(&part, file)?)
}

fn engine_of<'a>(report: &'a Value, id: &str) -> Result<&'a Value> {
    let users = report["users"].as_array().context("no users")?;
    let user = users.iter().find(|user| user["id"] == id).with_context(|| format!("no user {id}"))?;
    ensure!(user["engines"].as_array().is_some_and(|engines| engines.len() == 1), "{id}: {}", user["engines"]);
    Ok(&user["engines"][0])
}

/// Requests of a vLLM stand-in: twenty a second, each with the time to first token of its moment.
struct Requests {
    seconds: Arc<Mutex<f64>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Requests {
    fn start(file: PathBuf) -> Self {
        let (seconds, stop) = (Arc::new(Mutex::new(ALONE)), Arc::new(AtomicBool::new(false)));
        let (now, stopped) = (Arc::clone(&seconds), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let (mut sum, mut count) = (0.0, 0_u64);
            while !stopped.load(Ordering::Relaxed) {
                let latency = *now.lock().unwrap_or_else(PoisonError::into_inner);
                (sum, count) = (sum + 2.0 * latency, count + 2);
                write(&file, &vllm_page(sum, count))?;
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        });
        Self { seconds, stop, thread: Some(thread) }
    }

    fn set(&self, seconds: f64) {
        *self.seconds.lock().unwrap_or_else(PoisonError::into_inner) = seconds;
    }

    fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().context("it runs")?.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn vllm_page(sum: f64, count: u64) -> String {
    let labels = "{engine=\"0\",model_name=\"a/b}\\\"c\"}";
    format!(
        "page\n# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{labels} 3.0\n\
         vllm:num_requests_running{labels} 16.0\n\
         vllm:time_to_first_token_seconds_bucket{{engine=\"0\",le=\"+Inf\",model_name=\"a\"}} {count}\n\
         vllm:time_to_first_token_seconds_count{labels} {count}\nvllm:time_to_first_token_seconds_sum{labels} {sum}\n"
    )
}

const TRITON_PAGE: &str = "page\nnv_inference_request_success{model=\"m\",version=\"1\"} 20\n\
                           nv_inference_queue_duration_us{model=\"m\",version=\"1\"} 5000000\n\
                           nv_inference_pending_request_count{model=\"m\",version=\"1\"} 6\n";

fn effective(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff")?;
    Ok(u64::from_str_radix(line.trim(), 16)?)
}

#[test]
fn a_latency_that_rises_while_another_user_is_active_is_reported_with_both_means() -> Result<()> {
    let mut scene = EngineScene::new("serving")?;
    scene.start("vllm", "--port", 8000, &vllm_page(0.0, 0), 0.4)?;
    let (_, cgroup) = scene.tree.container(9)?;
    let mut other = Actor::start(ACTOR, &["in", &cgroup.to_string_lossy(), "--", "sleep", "300"])?;
    let (other_pid, other_id) = (other.pid()?, scene.tree.path_of(&cgroup));
    let mut agent = scene.agent(true)?;
    ensure!(effective(agent.process.0.id())? & SYS_ADMIN == 0, "the agent itself keeps CAP_SYS_ADMIN");
    let requests = Requests::start(scene.engines[0].file.clone());
    let id = agent.record_as(&json!({"duration_seconds": 300, "engine_metrics": {"every_seconds": 1}}))?;
    for _ in 0..PHASES {
        requests.set(ALONE);
        std::thread::sleep(PHASE);
        requests.set(SHARED);
        let _load = scene.sim.load(other_pid, 0, 0.5, &["--for", "300s"])?;
        std::thread::sleep(PHASE);
    }
    requests.set(ALONE);
    std::thread::sleep(PHASE);
    agent.stop(&id)?;
    let file = scene.dir.path().join("session.gpus");
    std::fs::write(&file, agent.session_file(&id, ENDS)?)?;
    requests.end()?;
    let agent_pid = agent.process.0.id();
    let children = std::fs::read_to_string(format!("/proc/{agent_pid}/task/{agent_pid}/children"))?;
    let helper = children.split_whitespace().next().context("the agent has no helper")?;
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    assert_eq!(namespace(helper)?, namespace(&agent_pid.to_string())?, "the helper stayed in the namespace of a container");
    let (report, text) = scene.reports(&file)?;
    let engine = engine_of(&report, &scene.engines[0].id)?;
    assert_eq!((&engine["engine"], &engine["port"], &engine["failed_readings"]), (&json!("vllm"), &json!(8000), &json!(0)));
    assert_eq!((&engine["waiting"]["max"], &engine["running"]["max"]), (&json!(3.0), &json!(16.0)));
    let latency = &engine["latencies"][0];
    assert_eq!(latency["latency"], "time-to-first-token", "{engine}");
    let contrasts = latency["contrasts"].as_array().context("no contrasts")?;
    let contrast = contrasts.iter().find(|contrast| contrast["id"] == other_id.as_str()).context("no contrast")?;
    let mean = |side: &str| contrast[side]["mean_seconds"].as_f64().context("no mean");
    assert!((mean("without")? - ALONE).abs() < TOLERANCE && (mean("with")? - SHARED).abs() < TOLERANCE, "{contrast}");
    assert_eq!(contrast["is_longer"], true, "{contrast}");
    let findings = report["findings"].as_array().context("no findings")?;
    let sentence = |finding: &Value| finding["text"].as_str().is_some_and(|text| text.starts_with("Time to first token of "));
    let finding = findings.iter().find(|finding| sentence(finding)).context("no finding")?;
    assert_eq!((&finding["victim"], &finding["aggressor"]), (&json!(scene.engines[0].id), &json!(other_id)));
    assert!(text.contains("time to first token") && text.contains("Serving engines"), "{text}");
    agent.process.ends_with(libc::SIGKILL)?;
    let has_ended = || {
        let stat = std::fs::read_to_string(format!("/proc/{helper}/stat")).unwrap_or_default();
        Ok((stat.is_empty() || stat.contains(") Z ")).then_some(()))
    };
    wait_for("the helper has ended with the agent", Duration::from_secs(1), has_ended)
}

#[test]
fn an_experiment_shows_that_first_tokens_come_sooner_while_the_suspect_is_frozen() -> Result<()> {
    let mut scene = EngineScene::new("serving-experiment")?;
    scene.start("vllm", "--port", 8000, &vllm_page(0.0, 0), 0.4)?;
    let (_, cgroup) = scene.tree.container(9)?;
    let mut suspect = Actor::start(ACTOR, &["in", &cgroup.to_string_lossy(), "--", "sleep", "300"])?;
    let (suspect_pid, suspect_id) = (suspect.pid()?, scene.tree.path_of(&cgroup));
    let _load = scene.sim.load(suspect_pid, 0, 0.5, &["--for", "300s", "--stops-while-frozen"])?;
    let agent = scene.agent(true)?;
    let ids = [&*scene.engines[0].id, &suspect_id].map(|path| path.rsplit('/').next().unwrap_or_default());
    agent.wait_until_credited(&ids, ENDS)?;

    let requests = Requests::start(scene.engines[0].file.clone());
    let (file, url) = (scene.dir.path().join("experiment.gpus"), format!("http://127.0.0.1:{}", agent.port));
    let (ended, freezer) = (AtomicBool::new(false), cgroup.join("cgroup.freeze"));
    let run = || {
        let (runtime, file) = (scene.runtime_dir(), file.to_string_lossy());
        let subjects = ["--victim", &scene.engines[0].id, "--suspect", &suspect_id, "--i-may-freeze", "--engine-metrics"];
        let design = ["--bursts", "8", "--pause", "500ms", "--seed", "11"];
        let access = ["--agent", &url, "--runtime-dir", &runtime, "-o", &file, "--json"];
        let result = run_cli(&[&["experiment"], &subjects[..], &design, &access].concat());
        ended.store(true, Ordering::Relaxed);
        result
    };
    // The engine is slower while the suspect runs.
    let follow = || {
        while !ended.load(Ordering::Relaxed) {
            let is_frozen = std::fs::read_to_string(&freezer)?.trim() == "1";
            requests.set(if is_frozen { ALONE } else { SHARED });
            std::thread::sleep(Duration::from_millis(20));
        }
        anyhow::Ok(())
    };
    let (result, followed) = std::thread::scope(|scope| {
        let follower = scope.spawn(follow);
        (run(), follower.join())
    });
    followed.map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    requests.end()?;
    let (code, out, err) = result?;
    ensure!(code == Some(0), "{code:?}: {out}{err}");
    let experiments: Value = serde_json::from_str(&out)?;
    let effects = experiments[0]["effects"].as_array().context("effects")?;
    let effect = effects.iter().find(|effect| effect["outcome"] == "time-to-first-token").with_context(|| out.clone())?;
    println!("{effect}");
    let number = |key: &str| effect[key].as_f64().with_context(|| key.to_owned());
    assert!(effect["confirmed"] == true && effect["unit"] == "seconds", "{effect}");
    assert!(
        (number("mean_frozen")? - ALONE).abs() < TOLERANCE && (number("mean_running")? - SHARED).abs() < TOLERANCE,
        "{effect}"
    );
    let (code, text, err) = run_cli(&["report", &file.to_string_lossy()])?;
    ensure!(code == Some(0) && text.contains("experiment-confirmed"), "{text}{err}");
    Ok(())
}

#[test]
fn an_endpoint_that_misbehaves_is_named_and_the_others_are_read() -> Result<()> {
    let mut scene = EngineScene::new("endpoints")?;
    let failing = [
        ("hang", "no complete page within"),
        ("huge", "more than 1048576 bytes"),
        ("error", "HTTP 500"),
        ("redirect", "not followed"),
        ("garbage", "none of the metrics of vllm"),
    ];
    for (behaviour, _) in failing {
        scene.start("vllm", "--port", 8000, behaviour, 0.1)?;
    }
    scene.start("tritonserver", "--metrics-port", 8002, TRITON_PAGE, 0.1)?;
    let agent = scene.agent(true)?;
    let id = agent.record_as(&json!({"duration_seconds": 15, "engine_metrics": {"every_seconds": 1}}))?;
    let file = scene.dir.path().join("session.gpus");
    std::fs::write(&file, agent.session_file(&id, Duration::from_secs(15) + ENDS)?)?;
    let (report, text) = scene.reports(&file)?;
    // Lines are wrapped.
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for ((behaviour, expect), engine) in failing.iter().zip(&scene.engines) {
        let engine = engine_of(&report, &engine.id)?;
        let problems = engine["problems"].to_string();
        assert!(engine["readings"] == engine["failed_readings"] && problems.contains(expect), "{behaviour}: {engine}");
        assert!(text.contains(expect), "{behaviour}: {text}");
    }
    let triton = engine_of(&report, &scene.engines[failing.len()].id)?;
    assert_eq!((&triton["engine"], &triton["failed_readings"]), (&json!("triton"), &json!(0)), "{triton}");
    assert!(triton["readings"].as_u64().is_some_and(|readings| readings >= 4) && triton["waiting"]["max"] == 6.0, "{triton}");
    Ok(())
}

#[test]
fn an_agent_without_access_refuses_with_the_remedy() -> Result<()> {
    let scene = EngineScene::new("refused")?;
    let agent = scene.agent(false)?;
    let url = format!("http://127.0.0.1:{}", agent.port);
    let file = scene.dir.path().join("session.gpus");
    let (code, _, error) =
        run_cli(&["record", "--engine-metrics", "--duration", "1s", "--agent", &url, "-o", &file.to_string_lossy()])?;
    ensure!(code == Some(1) && error.contains("engine_access = true"), "{code:?}: {error}");
    Ok(())
}

#[test]
fn record_without_an_agent_reads_engines_by_itself() -> Result<()> {
    let mut scene = EngineScene::new("alone")?;
    scene.start("tritonserver", "--metrics-port", 8002, TRITON_PAGE, 0.4)?;
    let file = scene.dir.path().join("session.gpus");
    let mut command = Command::new(var("GPU_SAMPLER_BIN")?);
    command.args(["record", "--engine-metrics", "--engine-every", "1s", "--duration", "8s", "-o"]).arg(&file);
    command.args(["--gpu-budget-percent", "50", "--gpu-wait-percent", "50", "--docker-endpoint", &var("DOCKER_HOST")?]);
    command.args(["--listen", &format!("127.0.0.1:{}", free_port()?)]);
    command.arg("--nvml-lib").arg(scene.sim.library()).env("NVML_SIM_DIR", scene.sim.dir.path());
    command.env("GPU_SAMPLER_PATH_DEVFS", scene.sim.devices());
    let output = command.output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{stderr}");
    let (report, _) = scene.reports(&file)?;
    let triton = engine_of(&report, &scene.engines[0].id)?;
    assert!(triton["readings"].as_u64().is_some_and(|readings| readings >= 3), "{triton}");
    Ok(())
}
