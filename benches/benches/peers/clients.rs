//! The clients: other exporters as published, with the settings that their authors recommend, and the agent.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use devkit::process::processor_time;
use gpu_sampler_tests::{Agent, Running, Sample, clients, free_port, get, wait_for};

use crate::world::Scene;

/// Environment variable with a folder for the clients' output and the last page of each, to examine the results in a table.
pub const LOG: &str = "PEERS_LOG";

/// Where a client's page has its numbers; utilizations are in percent.
pub struct Naming {
    /// Utilization of a device.
    pub device: &'static str,
    /// Utilization of a process; `None` if the client has none.
    pub process: Option<&'static str>,
    pub process_memory: &'static str,
    /// The label with the GPU's index.
    pub index: &'static str,
}

pub struct Client {
    pub name: &'static str,
    pub port: u16,
    pub naming: Option<Naming>,
    process: Process,
}

enum Process {
    Agent(Agent),
    Other(Running),
}

impl Client {
    pub fn all(scene: &Scene) -> Result<Vec<Self>> {
        let others = [Self::nvitop(scene)?, Self::all_smi(scene)?];
        let agent = Agent::start(Some(&scene.sim), &["--path-rootfs", &scene.root.path().to_string_lossy()])?;
        let agent = Self { name: "gpu-sampler", port: agent.port, naming: None, process: Process::Agent(agent) };
        Ok([agent].into_iter().chain(others).collect())
    }

    fn nvitop(scene: &Scene) -> Result<Self> {
        let bin = clients::venv(&["nvitop-exporter==1.7.2", "nvitop==1.7.2", "nvidia-ml-py==13.580.82"])?;
        let port = free_port()?;
        let mut command = scene.sim.client(&bin.join("python"));
        command.args(["-m", "nvitop_exporter", "--interval", "1", "--port", &port.to_string()]);
        let naming = Naming {
            device: "gpu_utilization_Percentage",
            process: Some("process_gpu_sm_utilization_Percentage"),
            process_memory: "process_gpu_memory_MiB",
            index: "index",
        };
        Self::start("nvitop-exporter 1.7.2", port, command, naming)
    }

    fn all_smi(scene: &Scene) -> Result<Self> {
        let program = clients::all_smi()?;
        // all-smi searches for GPUs only where `nvidia-smi -L` lists one.
        let folder: PathBuf = scene.sim.dir.path().join("bin");
        std::fs::create_dir_all(&folder)?;
        let listing = folder.join("nvidia-smi");
        std::fs::write(&listing, "#!/bin/sh\necho 'GPU 0: Tesla V100'\n")?;
        std::fs::set_permissions(&listing, std::fs::Permissions::from_mode(0o755))?;
        let port = free_port()?;
        let mut command = scene.sim.client(&program);
        command.env("PATH", format!("{}:{}", folder.display(), std::env::var("PATH")?));
        command.args(["api", "--interval", "1", "--processes", "--port", &port.to_string()]);
        let naming = Naming {
            device: "all_smi_gpu_utilization",
            process: None,
            process_memory: "all_smi_process_memory_used_bytes",
            index: "gpu_index",
        };
        Self::start("all-smi 0.22.0", port, command, naming)
    }

    fn start(name: &'static str, port: u16, mut command: Command, naming: Naming) -> Result<Self> {
        let log = std::env::var_os(LOG);
        let quiet = |command: &mut Command| -> Result<()> {
            command.stdin(Stdio::null()).stdout(Stdio::null());
            match &log {
                Some(folder) => command.stderr(std::fs::File::create(PathBuf::from(folder).join(format!("{name}.log")))?),
                None => command.stderr(Stdio::null()),
            };
            Ok(())
        };
        quiet(&mut command)?;
        let mut process = Running(command.spawn().with_context(|| name.to_owned())?);
        wait_for(name, Duration::from_secs(60), || {
            let ended = process.0.try_wait()?;
            anyhow::ensure!(ended.is_none(), "{name} ended: {ended:?}");
            Ok(get(port, "/metrics").ok().filter(|page| page.contains(naming.device)))
        })?;
        Ok(Self { name, port, naming: Some(naming), process: Process::Other(process) })
    }

    pub fn pid(&self) -> u32 {
        match &self.process {
            Process::Agent(agent) => agent.process.0.id(),
            Process::Other(process) => process.0.id(),
        }
    }

    /// Of the process and of its ended children.
    pub fn processor_seconds(&self) -> Result<f64> {
        let time = processor_time(self.pid()).context("times of a process")?;
        Ok(time.own + time.children)
    }

    pub fn resident_bytes(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
    }

    /// Whether it listens on every address, which /proc shows as `00000000`.
    pub fn listens_everywhere(&self) -> Result<bool> {
        let mut tables = String::new();
        for file in ["tcp", "tcp6"] {
            tables += &std::fs::read_to_string(format!("/proc/net/{file}")).unwrap_or_default();
        }
        let port = format!(":{:04X}", self.port);
        let local = tables.lines().filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (words.get(3) == Some(&"0A")).then(|| words.get(1).copied().unwrap_or_default().to_owned())
        });
        Ok(local
            .filter(|address| address.ends_with(&port))
            .any(|address| address.trim_end_matches(&port).chars().all(|c| c == '0')))
    }
}

/// The names of a page's families of this type.
pub fn families(page: &str, kind: &str) -> Vec<String> {
    let typed = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    typed.filter(|(_, found)| found.trim() == kind).map(|(name, _)| name.to_owned()).collect()
}

/// The label names of a family.
pub fn labels(samples: &[Sample], family: &str) -> Vec<String> {
    samples.iter().find(|s| s.name == family).map(|s| s.labels.keys().cloned().collect()).unwrap_or_default()
}
