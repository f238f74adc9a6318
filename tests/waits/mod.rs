//! Wait probes against the simulated CUDA driver: sums equal the truth, only selected processes have breakpoints, and none is left
//! whatever ends.

mod clients;
mod evidence;
mod experiment;
mod lifetime;
mod refusals;
mod truth;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::cuda::{CudaLibrary, FIRST_CALL};
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::{Agent, Sim, get, run_cli, var, wait_for};
use serde_json::Value;

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
/// Until a process that uses a GPU has probes: the agent has to find it and its library.
const ATTACHES: Duration = Duration::from_secs(15);
/// The bound of the product, from the end of a request to the last breakpoint.
const GONE_WITHIN: Duration = Duration::from_secs(1);
/// Time for a session to end: it waits up to 12 s for late facts.
const ENDS: Duration = Duration::from_secs(15);

/// A process in a container.
#[derive(Clone, Debug)]
struct CudaClient {
    pid: u32,
    /// Id of the container, and the path of its cgroup.
    container_id: String,
    path: String,
}

/// A world with the CUDA library, containers, and folders for the agent.
struct WaitScene {
    // Dropped in this order: the actors are inside the tree.
    actors: Vec<Actor>,
    sim: Sim,
    dir: tempfile::TempDir,
    library: CudaLibrary,
    tree: CgroupTree,
}

impl WaitScene {
    fn new(name: &str, world: &str) -> Result<Self> {
        let (sim, dir, tree) = (Sim::new(world)?, tempfile::tempdir()?, CgroupTree::new(name)?);
        let library = CudaLibrary::read(&sim.install_cuda()?)?;
        Ok(Self { actors: Vec::new(), sim, dir, library, tree })
    }

    /// A path for a file of the test.
    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// Starts a program in the `n`th container.
    fn start(&mut self, n: usize, words: &[String]) -> Result<CudaClient> {
        let (container_id, cgroup) = self.tree.container(n)?;
        let cgroup_path = cgroup.to_string_lossy();
        let args: Vec<&str> = ["in", &cgroup_path, "--"].into_iter().chain(words.iter().map(String::as_str)).collect();
        let mut actor = Actor::start(ACTOR, &args)?;
        let pid = actor.pid()?;
        self.actors.push(actor);
        Ok(CudaClient { pid, container_id, path: self.tree.path_of(&cgroup) })
    }

    /// Starts `cuda-work run` with these arguments in the `n`th container. Returns once it has mapped the library.
    fn work(&mut self, n: usize, arguments: &str) -> Result<CudaClient> {
        let client = self.start(n, &self.sim.cuda_words(arguments)?)?;
        wait_for("the library is mapped", ATTACHES, || {
            let maps = std::fs::read_to_string(format!("/proc/{}/maps", client.pid)).context("the program ended")?;
            Ok(maps.contains("/libcuda.so.1").then_some(()))
        })?;
        Ok(client)
    }

    fn agent(&self, args: &[&str]) -> Result<Agent> {
        let (store, root) = (self.file("store"), self.file("root"));
        std::fs::create_dir_all(&root)?;
        let own = ["--session-dir", &store, "--path-rootfs", &root, "--label-sources", "bundle"];
        Agent::start(Some(&self.sim), &[&own, args].concat())
    }

    fn wait_until_probed(&self, client: &CudaClient) -> Result<()> {
        wait_for(&format!("process {} has probes", client.pid), ATTACHES, || {
            Ok(self.library.is_probed(client.pid)?.then_some(()))
        })
    }

    /// No breakpoint is left in these processes, in time.
    fn check_gone(&self, clients: &[&CudaClient], what: &str) -> Result<()> {
        let from = std::time::Instant::now();
        for client in clients {
            wait_for(&format!("{what}: no breakpoint in process {}", client.pid), GONE_WITHIN, || {
                Ok(self.library.breakpoints(client.pid)?.is_empty().then_some(()))
            })?;
        }
        ensure!(from.elapsed() <= GONE_WITHIN, "{what}: after {:?}", from.elapsed());
        println!("{what}: no breakpoint after {:?}", from.elapsed());
        Ok(())
    }

    /// Fails if a process has a probe on a blocking call. That of the first call is in all processes of a library.
    fn check_unprobed(&self, client: &CudaClient) -> Result<()> {
        let found = self.library.breakpoints(client.pid)?;
        ensure!(found.iter().all(|name| name == FIRST_CALL), "process {} has breakpoints: {found:?}", client.pid);
        Ok(())
    }
}

/// Microseconds of the wall clock, as the truth has them.
fn now_us() -> Result<u64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_micros() as u64)
}

fn url(agent: &Agent) -> String {
    format!("http://127.0.0.1:{}", agent.port)
}

/// The report of a session that ends.
fn report_of(agent: &Agent, session: &str) -> Result<Value> {
    agent.session_is(session, "finished", ENDS)?;
    Ok(serde_json::from_str(&get(agent.port, &format!("/api/v1/sessions/{session}/report?format=json"))?)?)
}

/// The user of a report that is this process's container.
fn user<'r>(report: &'r Value, client: &CudaClient) -> Option<&'r Value> {
    report["users"].as_array()?.iter().find(|user| user["container_id"] == client.container_id)
}

/// The waiting of this process's container in a report.
fn waits_of<'r>(report: &'r Value, client: &CudaClient) -> Result<&'r Value> {
    Ok(&user(report, client).with_context(|| format!("{client:?} is a user"))?["waits"])
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().with_context(|| format!("{key} of {value}"))
}

/// The command fails with this code, and its error has these words.
fn check_rejected(args: &[&str], code: i32, words: &[&str]) -> Result<()> {
    let (got, out, err) = run_cli(args)?;
    ensure!(got == Some(code) && words.iter().all(|word| err.contains(word)), "{args:?}: {got:?}: {out}{err}");
    Ok(())
}

/// `record` of the agent's program, without a running agent.
fn record_alone(scene: &WaitScene, args: &[&str], file: &Path) -> Result<()> {
    let mut command = Command::new(var("GPU_SAMPLER_BIN")?);
    command.arg("record").args(args).arg("-o").arg(file).args(["--gpu-budget-percent", "50", "--gpu-wait-percent", "50"]);
    // No agent listens at this port, whatever else runs on this machine.
    command.args(["--listen", &format!("127.0.0.1:{}", gpu_sampler_tests::free_port()?), "--label-sources", "bundle"]);
    command.arg("--nvml-lib").arg(scene.sim.library()).env("NVML_SIM_DIR", scene.sim.dir.path());
    let output = command.env("GPU_SAMPLER_PATH_DEVFS", scene.sim.devices()).output()?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && err.contains("No agent runs at"), "{}: {err}", output.status);
    Ok(())
}
