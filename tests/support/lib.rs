//! Shared parts of the privileged tests: the real agent, the simulated driver, a real Docker Engine. `cargo xtask test` passes their
//! paths; a test that lacks one fails.

pub mod browser;
pub mod certificates;
pub mod clients;
pub mod containerd;
pub mod cri;
pub mod crio;
pub mod cuda;
mod docker;
pub mod grpc;
mod http;
pub mod image;
pub mod kernel;
pub mod kubelet;
pub mod labels;
pub mod latency;
pub mod leftovers;
pub mod oci;
pub mod podman;
pub mod prometheus;
pub mod proxy;
pub mod record;
pub mod recording;
pub mod s3;
mod session;
pub mod soak;

pub use docker::{Docker, Engine};

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use devkit::http::Server;
use serde_json::Value;

pub fn var(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set; run the tests with `cargo xtask test`"))
}

/// Runs a verb of the agent. Returns its exit code, standard output and standard error.
pub fn run_cli(args: &[&str]) -> Result<(Option<i32>, String, String)> {
    let output = Command::new(var("GPU_SAMPLER_BIN")?).args(args).output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code(), text(output.stdout), text(output.stderr)))
}

pub fn wait_for<T>(what: &str, patience: Duration, mut poll: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let from = Instant::now();
    loop {
        if let Some(found) = poll()? {
            return Ok(found);
        }
        ensure!(from.elapsed() < patience, "not within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A child process that is ended when the value is dropped.
pub struct Running(pub Child);

impl Running {
    pub fn ends_with(&mut self, signal: i32) -> Result<std::process::ExitStatus> {
        // SAFETY: the child has not been waited for, so its pid is its own.
        unsafe { libc::kill(self.0.id() as i32, signal) };
        Ok(self.0.wait()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ended = self.ends_with(libc::SIGTERM);
        }
    }
}

/// A server on this machine.
fn local(port: u16) -> Server {
    Server::tcp(([127, 0, 0, 1], port).into())
}

pub fn get(port: u16, path: &str) -> Result<String> {
    Ok(String::from_utf8(local(port).get(path)?.ok()?)?)
}

/// `accept`: the header of this name.
pub fn get_accepting(port: u16, path: &str, accept: &str) -> Result<String> {
    Ok(String::from_utf8(local(port).get_accepting(path, accept)?.ok()?)?)
}

/// One sample line of an exposition.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// Parses names, labels and values without escapes, which is all that the tests use.
pub fn parse(page: &str) -> Vec<Sample> {
    let line = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels.strip_suffix('}')?.split("\",").filter(|l| !l.is_empty());
        let pair = |l: &str| l.split_once("=\"").map(|(k, v)| (k.trim().to_owned(), v.trim_end_matches('"').to_owned()));
        Some(Sample { name: name.into(), labels: labels.filter_map(pair).collect(), value: value.parse().ok()? })
    };
    page.lines().filter(|l| !l.starts_with('#')).filter_map(line).collect()
}

/// The sum of a family's series with these labels; `None` if there is none.
pub fn sum(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let wanted = |s: &&Sample| s.name == name && labels.iter().all(|(k, v)| s.labels.get(*k).map(String::as_str) == Some(*v));
    samples.iter().filter(wanted).map(|s| s.value).reduce(|a, b| a + b)
}

/// The simulated GPUs of one test.
pub struct Sim {
    pub dir: tempfile::TempDir,
}

impl Sim {
    pub fn new(world: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("wanted.toml");
        std::fs::write(&file, world)?;
        let status =
            Command::new(var("NVML_SIM_BIN")?).args(["init", "--dir"]).arg(dir.path()).arg("--world").arg(&file).status()?;
        ensure!(status.success(), "nvml-sim init failed");
        Ok(Self { dir })
    }

    pub fn library(&self) -> PathBuf {
        self.dir.path().join("lib/libnvidia-ml.so.1")
    }

    /// Stand-ins for the device nodes, in a world that has them.
    pub fn devices(&self) -> PathBuf {
        self.dir.path().join("dev")
    }

    pub fn load(&self, pid: u32, gpu: usize, demand: f64, more: &[&str]) -> Result<Running> {
        let mut command = Command::new(var("NVML_SIM_BIN")?);
        command.args(["load", "--pid", &pid.to_string(), "--gpu", &gpu.to_string(), "--demand", &demand.to_string()]);
        command.args(["--mem", "1GiB", "--dir"]).arg(self.dir.path()).args(more);
        Ok(Running(command.spawn()?))
    }

    /// Declares a load with these arguments to `nvml-sim load`.
    pub fn loads(&self, pid: u32, gpu: usize, args: &[&str]) -> Result<Running> {
        let mut command = Command::new(var("NVML_SIM_BIN")?);
        command.args(["load", "--pid", &pid.to_string(), "--gpu", &gpu.to_string(), "--dir"]).arg(self.dir.path()).args(args);
        Ok(Running(command.spawn()?))
    }

    /// Injects a fault: the verbs `fault` and `xid` of nvml-sim.
    pub fn inject(&self, verb: &str, args: &[&str]) -> Result<()> {
        let output = Command::new(var("NVML_SIM_BIN")?).arg(verb).arg("--dir").arg(self.dir.path()).args(args).output()?;
        ensure!(output.status.success(), "nvml-sim {verb} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    pub fn truth(&self, more: &[&str]) -> Result<Value> {
        let output = Command::new(var("NVML_SIM_BIN")?).args(["truth", "--dir"]).arg(self.dir.path()).args(more).output()?;
        ensure!(output.status.success(), "nvml-sim truth: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// A running agent that has reported itself ready.
pub struct Agent {
    pub port: u16,
    pub process: Running,
    log: tempfile::NamedTempFile,
    /// Removed after the process has ended.
    _sessions: tempfile::TempDir,
}

impl Agent {
    pub fn command(sim: Option<&Sim>) -> Result<Command> {
        let mut command = Command::new(var("GPU_SAMPLER_BIN")?);
        command.arg("run").stdin(Stdio::null());
        if let Some(sim) = sim {
            command.arg("--nvml-lib").arg(sim.library()).env("NVML_SIM_DIR", sim.dir.path());
            // The machine's own device nodes do not belong to this driver.
            command.env("GPU_SAMPLER_PATH_DEVFS", sim.devices());
        }
        Ok(command)
    }

    pub fn start(sim: Option<&Sim>, args: &[&str]) -> Result<Self> {
        Self::start_in(kernel::Layout::Machine, sim, args)
    }

    pub fn start_in(layout: kernel::Layout, sim: Option<&Sim>, args: &[&str]) -> Result<Self> {
        Self::start_as(layout, Self::command(sim)?, args)
    }

    /// As [`Agent::start`], with a prepared command.
    pub fn start_as(layout: kernel::Layout, command: Command, args: &[&str]) -> Result<Self> {
        Self::start_when(layout, command, args, &|port| get(port, "/readyz").is_ok())
    }

    /// As [`Agent::start_as`], for an agent that does not serve plain HTTP.
    pub fn start_when(
        layout: kernel::Layout,
        mut command: Command,
        args: &[&str],
        is_ready: &dyn Fn(u16) -> bool,
    ) -> Result<Self> {
        let port = free_port()?;
        command.args(["--listen", &format!("127.0.0.1:{port}")]).args(args);
        // On a machine busy with tests, the duration of a poll is meaningless; the budgets have tests of their own.
        for budget in ["--gpu-budget-percent", "--gpu-wait-percent"] {
            if !args.contains(&budget) {
                command.args([budget, "50"]);
            }
        }
        if !args.contains(&"--docker-endpoint") {
            command.args(["--docker-endpoint", &var("DOCKER_HOST")?]);
        }
        // Only one agent may use a folder, and tests run side by side.
        let sessions = tempfile::tempdir()?;
        if !args.contains(&"--session-dir") {
            command.arg("--session-dir").arg(sessions.path());
        }
        layout.enter(&mut command);
        let log = tempfile::NamedTempFile::new()?;
        let process = Running(command.stderr(log.reopen()?).spawn()?);
        let mut agent = Self { port, process, log, _sessions: sessions };
        wait_for("the agent is ready", Duration::from_secs(30), || {
            if let Some(status) = agent.process.0.try_wait()? {
                bail!("the agent ended: {status}: {}", agent.log()?);
            }
            Ok(is_ready(port).then_some(()))
        })?;
        Ok(agent)
    }

    /// The log so far.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.log.path())?)
    }

    /// The families that a scraper gets by default.
    pub fn page(&self) -> Result<String> {
        get(self.port, "/metrics")
    }

    pub fn page_with_all_families(&self) -> Result<String> {
        get(self.port, "/metrics?collect%5B%5D=all")
    }

    /// The series of all families.
    pub fn scrape(&self) -> Result<Vec<Sample>> {
        Ok(parse(&self.page_with_all_families()?))
    }

    /// Waits until each of these containers has received GPU time.
    pub fn wait_until_credited(&self, container_ids: &[&str], within: Duration) -> Result<()> {
        wait_for("all containers are credited", within, || {
            let page = self.scrape()?;
            let seconds = |id: &str| sum(&page, "container_gpu_seconds_total", &[("container_id", id)]).unwrap_or_default();
            Ok(container_ids.iter().all(|id| seconds(id) > 0.2).then_some(()))
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // With a failure, the agent's log is printed.
        if std::thread::panicking()
            && let Ok(log) = self.log()
        {
            eprintln!("the agent's log:\n{log}");
        }
    }
}
