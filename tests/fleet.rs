//! Sessions of several nodes: uploaded to a real S3 server, and one report of them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{Actor, CgroupTree, Layout};
use gpu_sampler_tests::s3::{self, S3Server};
use gpu_sampler_tests::{Agent, Running, Sim, free_port, sum, var, wait_for};
use serde_json::Value;

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
const STEP: &str = "system.slice/slurmstepd.scope/job_4711/step_0/user/task_0";
const JOB: &str = "slurm/4711";
const STORE: &str = "s3://sessions/gpu";
/// Time for a session to end, and for an upload that waits for its next attempt.
const ENDS: Duration = Duration::from_secs(60);
/// More than two parts of an upload.
const LARGE: usize = 20 << 20;
/// The sums have the same terms in another order.
const ROUNDING: f64 = 1e-6;

/// A node: a host name, simulated GPUs, a process of the job, a folder for sessions.
struct FleetNode {
    name: &'static str,
    _process: Actor,
    pid: u32,
    sim: Sim,
    dir: tempfile::TempDir,
}

impl FleetNode {
    fn new(name: &'static str, seed: u32, cgroup: &Path) -> Result<Self> {
        let (sim, dir) = (Sim::new(&format!("seed = {seed}\n[[gpus]]"))?, tempfile::tempdir()?);
        let mut process = Actor::start(ACTOR, &["in", &cgroup.to_string_lossy(), "--", "sleep", "600"])?;
        let pid = process.pid()?;
        Ok(Self { name, _process: process, pid, sim, dir })
    }

    /// An agent under this node's name; it uploads if `port` is that of an S3 server.
    fn agent(&self, port: Option<u16>) -> Result<Agent> {
        let plain = Agent::command(Some(&self.sim))?;
        let mut command = Command::new("unshare");
        command.args(["--uts", "sh", "-c", &format!("hostname {} && exec \"$@\"", self.name), "sh"]);
        command.arg(plain.get_program()).args(plain.get_args());
        command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let dir = self.dir.path().to_string_lossy().into_owned();
        let mut args = vec!["--session-dir", &*dir, "--label-sources", "bundle"];
        if let Some(port) = port {
            command.envs(s3::environment(port));
            args.extend(["--session-store", STORE]);
        }
        Agent::start_as(Layout::Machine, command, &args)
    }

    fn load(&self, demand: f64) -> Result<Running> {
        self.sim.load(self.pid, 0, demand, &["--for", "300s"])
    }
}

fn counted(agent: &Agent, outcome: &str) -> Result<f64> {
    Ok(sum(&agent.scrape()?, "gpu_sampler_session_uploads_total", &[("outcome", outcome)]).unwrap_or_default())
}

fn is_degraded(agent: &Agent) -> Result<bool> {
    Ok(sum(&agent.scrape()?, "gpu_sampler_degraded", &[("condition", "session-store")]) == Some(1.0))
}

fn wait_until_uploaded(agent: &Agent, n: f64) -> Result<()> {
    wait_for("the sessions are uploaded", ENDS, || Ok((counted(agent, "ok")? == n).then_some(())))
}

/// Records for 3 s, until the job has GPU time in it.
fn recorded(agent: &Agent) -> Result<String> {
    wait_for("the job is credited", ENDS, || {
        Ok(sum(&agent.scrape()?, "gpu_user_seconds_total", &[("user", JOB)]).filter(|seconds| *seconds > 0.2))
    })?;
    let id = agent.record(Duration::from_secs(3), Duration::ZERO)?;
    agent.session_is(&id, "finished", ENDS)?;
    Ok(id)
}

/// Runs a command with the environment of a client. Returns its exit code and both outputs.
fn run(port: u16, args: &[&str]) -> Result<(Option<i32>, String, String)> {
    let output = Command::new(var("GPU_SAMPLER_BIN")?).args(args).envs(s3::environment(port)).output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code(), text(output.stdout), text(output.stderr)))
}

fn report(port: u16, args: &[&str]) -> Result<Value> {
    let (code, out, err) = run(port, &[&["report", "--format", "json"], args].concat())?;
    ensure!(code == Some(0), "gpu-sampler report {args:?}: {code:?}: {err}");
    serde_json::from_str(&out).context("the report is JSON")
}

/// GPU-seconds of the job in the report of one session.
fn of_one_session(report: &Value) -> f64 {
    let users = report["users"].as_array().into_iter().flatten().filter(|user| user["user"] == JOB);
    users.flat_map(|user| user["gpus"].as_array().into_iter().flatten()).filter_map(|usage| usage["gpu_seconds"].as_f64()).sum()
}

fn of_fleet(report: &Value) -> Result<&Value> {
    let mut users = report["users"].as_array().into_iter().flatten();
    users.find(|user| user["name"] == JOB).with_context(|| format!("the job is a user: {report}"))
}

#[test]
fn sessions_of_two_nodes_are_uploaded_and_make_one_report() -> Result<()> {
    let tree = CgroupTree::new("fleet")?;
    let cgroup = tree.make(STEP)?;
    let nodes = [FleetNode::new("node-a", 7, &cgroup)?, FleetNode::new("node-b", 8, &cgroup)?];
    let _loads = [nodes[0].load(0.9)?, nodes[1].load(0.3)?];
    let port = free_port()?;
    let agents = [nodes[0].agent(Some(port))?, nodes[1].agent(Some(port))?];
    let mut urls = Vec::new();
    for (node, agent) in nodes.iter().zip(&agents) {
        assert_eq!(counted(agent, "error")?, 0.0, "the store is not accessed without sessions");
        urls.push(format!("{STORE}/{}/{}.gpus", node.name, recorded(agent)?));
    }

    // The server is down: that is visible, and nothing is lost.
    for agent in &agents {
        wait_for("the failure is visible", ENDS, || Ok(is_degraded(agent)?.then_some(())))?;
        assert!(counted(agent, "error")? >= 1.0);
        let log = agent.log()?;
        assert!(log.contains("sessions are not uploaded, and the local files remain"), "{log}");
        assert!(!log.contains("test-secret"), "{log}");
    }
    let (_, out, _) = run(port, &["doctor", "--session-store", STORE])?;
    assert!(out.contains("session store") && out.contains("correct session_store or its credentials"), "{out}");

    let server = S3Server::start(port)?;
    for agent in &agents {
        wait_until_uploaded(agent, 1.0)?;
        wait_for("the condition ends", ENDS, || Ok((!is_degraded(agent)?).then_some(())))?;
        let log = agent.log()?;
        assert_eq!(log.matches("sessions are not uploaded").count(), 1, "once for each change: {log}");
    }

    // A session of a run without a store is uploaded after a restart with one; the other one is not uploaded again.
    let [first, second] = agents;
    drop(first);
    let without = nodes[0].agent(None)?;
    urls.push(format!("{STORE}/node-a/{}.gpus", recorded(&without)?));
    drop(without);
    let restarted = nodes[0].agent(Some(port))?;
    wait_until_uploaded(&restarted, 1.0)?;
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!((counted(&restarted, "ok")?, counted(&restarted, "error")?), (1.0, 0.0));
    drop((restarted, second));

    // The sum of the one report is the sum of the single ones.
    let singles = urls.iter().map(|url| Ok(of_one_session(&report(port, &[url])?))).collect::<Result<Vec<f64>>>()?;
    let fleet = report(port, &["--fleet", STORE])?;
    let job = of_fleet(&fleet)?;
    let (total, parts) = (job["gpu_seconds"].as_f64().context("seconds")?, &job["nodes"]);
    println!("single reports: {singles:?}, fleet: {job}");
    assert!(singles.iter().all(|seconds| *seconds > 0.1));
    assert!((singles.iter().sum::<f64>() - total).abs() < ROUNDING, "{singles:?} and {total}");
    assert_eq!((&job["joined_by"], parts.as_array().map(Vec::len)), (&"job".into(), Some(2)));
    assert_eq!(job["imbalance"]["min_node"], "node-b", "{job}");
    assert_eq!(fleet["nodes"].as_array().map(Vec::len), Some(2));
    // node-b has one session, and nothing later.
    let gaps = fleet["gaps"].as_array().context("gaps")?;
    assert!(gaps.iter().any(|gap| gap["node"] == "node-b" && gap["uuid"].is_null()), "{gaps:?}");

    // The same from the folders of the nodes, with a file twice, which counts once.
    let folders: Vec<String> = nodes.iter().map(|node| node.dir.path().to_string_lossy().into_owned()).collect();
    let local = report(port, &["--fleet", &folders[0], &folders[1], &urls[0]])?;
    let seconds = of_fleet(&local)?["gpu_seconds"].as_f64().context("seconds")?;
    assert!((seconds - total).abs() < ROUNDING, "{seconds} and {total}");
    assert!(local["remarks"].to_string().contains("is not reported"), "{}", local["remarks"]);
    let part = report(port, &["--fleet", STORE, "--to", "1s"])?;
    assert!(of_fleet(&part)?["gpu_seconds"].as_f64() < Some(total));

    // A file that cannot be read is named, and the others are reported.
    server.put("/gpu/node-c/20260101-000000-00.gpus", b"not a session")?;
    let (code, out, err) = run(port, &["report", "--fleet", STORE])?;
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("node-c/20260101-000000-00.gpus is not reported"), "{err}");
    assert!(out.contains(JOB) && out.contains("NOT REPORTED") && out.contains("2 nodes"), "{out}");
    Ok(())
}

#[test]
fn interrupted_sessions_and_large_ones_are_uploaded() -> Result<()> {
    let tree = CgroupTree::new("uploads")?;
    let node = FleetNode::new("node-a", 9, &tree.make(STEP)?)?;
    let _load = node.load(0.5)?;
    let port = free_port()?;
    let server = S3Server::start(port)?;
    let mut agent = node.agent(Some(port))?;
    let finished = recorded(&agent)?;
    wait_until_uploaded(&agent, 1.0)?;
    let interrupted = agent.record(Duration::from_secs(300), Duration::ZERO)?;
    wait_for("the session has some seconds", ENDS, || {
        Ok(agent.session(&interrupted)?["elapsed_seconds"].as_f64().filter(|elapsed| *elapsed > 8.0))
    })?;
    agent.process.ends_with(libc::SIGKILL)?;

    // Larger than one part: of a session's file, only the beginning and the end are read before its upload.
    let dir = node.dir.path();
    let small = std::fs::read(dir.join(format!("{finished}.gpus")))?;
    let middle = small.len() - 64;
    let large = [&small[..middle], &vec![0; LARGE], &small[middle..]].concat();
    std::fs::write(dir.join("20260101-000000-00.gpus"), &large)?;
    let restarted = node.agent(Some(port))?;
    assert_eq!(restarted.session(&interrupted)?["state"], "interrupted");
    wait_until_uploaded(&restarted, 2.0)?;
    assert!(server.get("/gpu/node-a/20260101-000000-00.gpus")? == large, "the parts are the file");
    let url = format!("{STORE}/node-a/{interrupted}.gpus");
    assert!(of_one_session(&report(port, &[&url])?) > 0.1);
    let (code, out, err) = run(port, &["report", &url])?;
    assert!(code == Some(0) && out.contains("INCOMPLETE"), "{out}{err}");

    let (_, _, err) = run(port, &["report", "--fleet", "s3://missing/gpu"])?;
    assert!(err.contains("s3://missing/gpu does not exist; create the bucket"), "{err}");
    Ok(())
}

#[test]
fn wrong_urls_and_credentials_are_named_with_the_remedy() -> Result<()> {
    let port = free_port()?;
    let _server = S3Server::refusing(port)?;
    let cases: [(&[&str], &[&str]); 5] = [
        (&["report", "--fleet", STORE], &["access to s3://sessions/gpu was refused", "AWS_ACCESS_KEY_ID", "403 Forbidden"]),
        (&["report", "ftp://host/file"], &["\"ftp://host/file\" is invalid", "expected s3://BUCKET/PREFIX"]),
        (&["run", "--session-store", "s3://key:word@sessions"], &["session_store = \"s3://...\" is invalid", "environment"]),
        (&["report", "file:///no/such/session.gpus"], &["there is no object file:///no/such/session.gpus"]),
        (&["report", "--fleet", "file:///no/such"], &["there is no session file (*.gpus) below file:///no/such"]),
    ];
    for (args, expect) in cases {
        let (code, out, err) = run(port, args)?;
        assert_eq!(code, Some(1), "{args:?}: {out}{err}");
        for text in expect {
            assert!(err.contains(text), "{args:?}: {text}: {err}");
        }
        assert!(!err.contains("test-secret") && !err.contains("key:word"), "{err}");
    }
    Ok(())
}
