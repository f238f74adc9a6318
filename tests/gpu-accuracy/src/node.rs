//! A simulated node: GPUs, cgroups as the kubelet makes them, the files that containerd writes, and processes in them. All of it ends with
//! the value.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::mapping::Identity;
use crate::world::{ROLES, SHORT, SHORT_POD, World};

pub const NAMESPACE: &str = "accuracy";
pub const CONTAINER: &str = "main";
pub const IMAGE: &str = "registry.example/accuracy:1";
const REMOVED_WITHIN: Duration = Duration::from_secs(10);

/// Set by SIGINT, SIGTERM and SIGHUP.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Ends the run in order when it is interrupted.
pub fn catch_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(signal, interrupt as *const () as libc::sighandler_t) };
    }
}

/// Fails if the run is interrupted or the check fails.
pub fn sleep_until(end: Instant, check: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    loop {
        ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// A child process, in a process group of its own, that is ended with this value.
pub struct Running(pub Child);

impl Running {
    pub fn start(command: &mut Command) -> Result<Self> {
        let parent = std::process::id() as libc::pid_t;
        let die_with_parent = move || {
            // SAFETY: system calls on numbers only.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
                if libc::getppid() != parent {
                    libc::_exit(1);
                }
            }
            Ok(())
        };
        // SAFETY: the closure is async-signal-safe.
        unsafe { command.process_group(0).pre_exec(die_with_parent) };
        let child = command.stdin(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("cannot start {}", command.get_program().display()))?))
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        // SAFETY: the child has not been waited for, so its PID is its own.
        unsafe { libc::kill(self.0.id() as libc::pid_t, libc::SIGTERM) };
    }

    /// Waits for its end, which has to be in order.
    pub fn wait(&mut self, what: &str) -> Result<()> {
        let status = self.0.wait()?;
        ensure!(status.success(), "{what} failed ({status})");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let group = -(self.0.id() as libc::pid_t);
            // SAFETY: the child has not been waited for, so the number of its group is its own.
            unsafe { libc::kill(group, libc::SIGTERM) };
            let end = Instant::now() + Duration::from_secs(5);
            while Instant::now() < end && matches!(self.0.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(20));
            }
            // SAFETY: as above, if it still runs.
            unsafe { libc::kill(group, libc::SIGKILL) };
            let _reaped = self.0.wait();
        }
    }
}

/// A command in this cgroup.
pub fn inside(cgroup: &Path, words: &[String]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ >\"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"]).arg(cgroup).args(words);
    command
}

/// A user of GPUs.
pub struct Container {
    pub pod: &'static str,
    pub gpu: usize,
    pub id: String,
    pub cgroup: PathBuf,
    pub pids: Vec<u32>,
}

impl Container {
    /// Values of this identity that its series may have.
    pub fn values(&self, identity: Identity) -> Vec<String> {
        match identity {
            Identity::Pid => self.pids.iter().map(u32::to_string).collect(),
            Identity::ContainerId => vec![self.id.clone()],
            Identity::Pod => vec![self.pod.to_owned()],
            Identity::Namespace => vec![NAMESPACE.to_owned()],
            Identity::Container => vec![CONTAINER.to_owned()],
            Identity::Image => vec![IMAGE.to_owned()],
            Identity::Uuid | Identity::Index => Vec::new(),
        }
    }
}

/// Cgroups, removed with their processes.
struct Cgroups(PathBuf);

impl Cgroups {
    fn new() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mount = mounts.lines().find_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words.get(2) == Some(&"cgroup2")).then(|| words[1].to_owned())
        });
        let root = Path::new(&mount.context("no cgroup2 is mounted")?).join(format!("gpu-accuracy-{}", std::process::id()));
        fs::create_dir(&root).with_context(|| format!("cannot make the cgroup {}, which requires root", root.display()))?;
        Ok(Self(root))
    }
}

/// Kills all processes in a cgroup and below it.
fn kill_all(dir: &Path) {
    if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    // Kernels before 5.14.
    for entry in
        fs::read_dir(dir).into_iter().flatten().flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    {
        kill_all(&entry.path());
    }
    for pid in processes(dir) {
        // SAFETY: a process of this cgroup, which only this program fills.
        unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
    }
}

fn processes(cgroup: &Path) -> Vec<u32> {
    let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    procs.lines().filter_map(|line| line.parse().ok()).collect()
}

fn remove(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&entry.path())?;
    }
    fs::remove_dir(dir)
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        kill_all(&self.0);
        let end = Instant::now() + REMOVED_WITHIN;
        while let Err(error) = remove(&self.0) {
            if Instant::now() > end {
                eprintln!("gpu-accuracy: {} stays: {error}", self.0.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

pub struct Node {
    sim: PathBuf,
    dir: tempfile::TempDir,
    pub containers: Vec<Container>,
    processes: Vec<Running>,
    // Dropped after the processes.
    cgroups: Cgroups,
}

impl Node {
    /// `sim`: the program `nvml-sim`.
    pub fn new(sim: &Path, world: &World) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("gpu-accuracy").tempdir()?;
        let cgroups = Cgroups::new()?;
        let mut node = Self { sim: sim.to_owned(), dir, containers: Vec::new(), processes: Vec::new(), cgroups };
        let file = node.dir.path().join("wanted.toml");
        fs::write(&file, world.file())?;
        node.control(&["init", "--world", &file.to_string_lossy()])?;
        for role in &ROLES {
            node.container(role.pod, role.gpu, role.demands.len())?;
        }
        node.container(SHORT_POD, SHORT, 0)?;
        fs::create_dir(node.cost_folder())?;
        fs::create_dir(node.exporter_cgroup())?;
        fs::write(node.containers_file(), serde_json::to_string_pretty(&node.described()?)?)?;
        Ok(node)
    }

    /// The containers with their GPUs, as an assignment of devices to pods has them.
    fn described(&self) -> Result<Value> {
        let truth = self.truth(&nvidia_ml_sim::time::format(0))?;
        let container = |container: &Container| {
            let uuid = truth.get(container.gpu).map(|gpu| &*gpu.uuid);
            json!({"namespace": NAMESPACE, "pod": container.pod, "container": CONTAINER, "container_id": container.id,
                "gpu": container.gpu, "uuid": uuid})
        };
        Ok(self.containers.iter().map(container).collect())
    }

    pub fn containers_file(&self) -> PathBuf {
        self.dir.path().join("containers.json")
    }

    /// The folder of the simulated GPUs.
    pub fn gpus(&self) -> PathBuf {
        self.dir.path().join("gpus")
    }

    pub fn library(&self) -> PathBuf {
        self.gpus().join("lib/libnvidia-ml.so.1")
    }

    /// The folder in which the files of runtimes are, as below / of a node.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// The folder in which the library keeps its own processor time, by process.
    pub fn cost_folder(&self) -> PathBuf {
        self.dir.path().join("cost")
    }

    /// The cgroup of the exporter.
    pub fn exporter_cgroup(&self) -> PathBuf {
        self.cgroups.0.join("exporter")
    }

    /// Processor time of the exporter's cgroup without the simulated driver, which runs in its processes; seconds.
    pub fn exporter_seconds(&self) -> Result<f64> {
        let stat = fs::read_to_string(self.exporter_cgroup().join("cpu.stat"))?;
        let all: f64 =
            stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("usage_usec in cpu.stat")?.parse()?;
        let of_process = |entry: fs::DirEntry| Some(u64::from_ne_bytes(fs::read(entry.path()).ok()?.as_slice().try_into().ok()?));
        let driver: u64 = fs::read_dir(self.cost_folder())?.flatten().filter_map(of_process).sum();
        Ok(all * 1e-6 - driver as f64 * 1e-9)
    }

    /// Resident memory of all processes of the exporter.
    pub fn exporter_bytes(&self) -> f64 {
        let resident = |pid: u32| -> Option<f64> {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            line.trim().trim_end_matches(" kB").parse::<f64>().ok()
        };
        processes(&self.exporter_cgroup()).into_iter().filter_map(resident).sum::<f64>() * 1024.0
    }

    fn container(&mut self, pod: &'static str, gpu: usize, processes: usize) -> Result<()> {
        let n = self.containers.len();
        let (uid, id) = (format!("8bb25662-de9a-11e9-84e7-{n:012x}"), format!("{:08x}{n:056x}", std::process::id()));
        self.bundle(&id, pod, &uid)?;
        let cgroup = self.cgroups.0.join(format!("kubepods/burstable/pod{uid}/{id}"));
        fs::create_dir_all(&cgroup).with_context(|| cgroup.display().to_string())?;
        let mut pids = Vec::new();
        for _ in 0..processes {
            let process = Running::start(&mut inside(&cgroup, &["sleep".to_owned(), "86400".to_owned()]))?;
            pids.push(process.0.id());
            self.processes.push(process);
        }
        self.containers.push(Container { pod, gpu, id, cgroup, pids });
        Ok(())
    }

    /// Writes what containerd writes for a pod's container.
    fn bundle(&self, id: &str, pod: &str, uid: &str) -> Result<()> {
        let folder = self.root().join("run/containerd/io.containerd.runtime.v2.task/k8s.io").join(id);
        fs::create_dir_all(&folder)?;
        let cri = |name: &str| format!("io.kubernetes.cri.{name}");
        let annotations = json!({
            cri("container-type"): "container", cri("container-name"): CONTAINER, cri("sandbox-name"): pod,
            cri("sandbox-namespace"): NAMESPACE, cri("sandbox-uid"): uid, cri("image-name"): IMAGE,
        });
        Ok(fs::write(folder.join("config.json"), json!({"ociVersion": "1.0.2", "annotations": annotations}).to_string())?)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.sim);
        command.args(args).arg("--dir").arg(self.gpus());
        command
    }

    /// Runs a verb of nvml-sim to its end.
    pub fn control(&self, args: &[&str]) -> Result<Vec<u8>> {
        let output = self.command(args).output().with_context(|| format!("--nvml-sim {}", self.sim.display()))?;
        if !output.status.success() {
            bail!("nvml-sim {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(output.stdout)
    }

    /// Starts a verb of nvml-sim that lasts.
    pub fn start(&self, args: &[&str]) -> Result<Running> {
        Running::start(self.command(args).stdout(Stdio::null()))
    }

    /// GPU-seconds from this instant on: of each GPU, with its UUID and those of its processes.
    pub fn truth(&self, from: &str) -> Result<Vec<GpuTruth>> {
        let truth: Value = serde_json::from_slice(&self.control(&["truth", "--from", from])?)?;
        let gpu = |gpu: &Value| -> Option<GpuTruth> {
            let process = |process: &Value| Some((process["pid"].as_u64()? as u32, process["gpu_seconds"].as_f64()?));
            Some(GpuTruth {
                uuid: gpu["uuid"].as_str()?.to_owned(),
                busy: gpu["busy_seconds"].as_f64()?,
                processes: gpu["processes"].as_array()?.iter().filter_map(process).collect(),
            })
        };
        truth["gpus"].as_array().and_then(|gpus| gpus.iter().map(gpu).collect()).context("nvml-sim truth has GPUs")
    }
}

#[derive(Clone, Debug, Default)]
pub struct GpuTruth {
    pub uuid: String,
    pub busy: f64,
    /// By PID.
    pub processes: Vec<(u32, f64)>,
}

impl GpuTruth {
    /// GPU-seconds of a container; of all processes if it has none of its own.
    pub fn seconds(&self, container: &Container) -> f64 {
        let is_its = |pid: &u32| container.pids.is_empty() || container.pids.contains(pid);
        self.processes.iter().filter(|(pid, _)| is_its(pid)).map(|(_, seconds)| seconds).sum()
    }
}
