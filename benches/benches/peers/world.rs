//! The setup: eight simulated GPUs, and containers that use them in ways that users have reported.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::labels::bundle;
use gpu_sampler_tests::{Running, Sim, var};
use serde_json::Value;

use crate::read::Reader;

pub const SHARED: usize = 0;
pub const RESIDENT: usize = 1;
pub const BRIEF: usize = 2;
pub const AHEAD: usize = 3;
pub const IDLE: usize = 4;
pub const GARBAGE: usize = 5;
pub const FAILING: usize = 6;
pub const BEHIND: usize = 7;

const WORLD: &str = "
seed = 7
driver_version = '550.54.14'
[[gpus]]
[[gpus]]
[[gpus]]
[[gpus]]
clock_offset_us = 12000000
[[gpus]]
[[gpus]]
garbage = ['util', 'pid_zero', 'pid_max', 'stale', 'exited', 'zombies']
garbage_every = 7
[[gpus]]
[[gpus]]
clock_offset_us = -12000000
";

/// A container's processes on one GPU, for the whole run.
pub struct Role {
    pub pod: &'static str,
    pub gpu: usize,
    /// Demands, of one process each.
    pub demands: &'static [f64],
}

/// Small enough never to be on the engine; the process only holds memory.
const NOTHING: f64 = 1e-9;

pub const ROLES: [Role; 7] = [
    Role { pod: "trainer", gpu: SHARED, demands: &[0.6] },
    Role { pod: "notebook", gpu: SHARED, demands: &[0.3] },
    Role { pod: "resident", gpu: RESIDENT, demands: &[NOTHING] },
    Role { pod: "two-processes", gpu: AHEAD, demands: &[0.3, 0.2] },
    Role { pod: "next-to-garbage", gpu: GARBAGE, demands: &[0.5] },
    Role { pod: "on-a-failing-gpu", gpu: FAILING, demands: &[0.5] },
    Role { pod: "clock-behind", gpu: BEHIND, demands: &[0.5] },
];

/// Processes that begin and end between two reads that are 15 s apart.
pub const BRIEF_POD: &str = "brief";
const BRIEF_AT: [f64; 3] = [17.0, 32.0, 47.0];
pub const BRIEF_LASTS: f64 = 1.5;
const BRIEF_DEMAND: &str = "0.8";
/// The calls of a GPU fail from this time on, for this duration; seconds.
const FAILS_AT: f64 = 20.0;
const FAILS_FOR: f64 = 15.0;

pub struct Scene {
    pub sim: Sim,
    pub root: tempfile::TempDir,
    /// Pids by pod, with the GPU.
    pub pids: Vec<(&'static str, usize, u32)>,
    /// When calls failed: from and until, in the reader's time.
    pub failed: (f64, f64),
    begun_us: u64,
    actors: Vec<Actor>,
    briefs: Vec<(PathBuf, Option<Running>)>,
    containers: Vec<(&'static str, PathBuf)>,
    // Dropped after the actors: a cgroup can be removed when its processes have ended.
    _tree: CgroupTree,
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

impl Scene {
    /// The containers exist and sleep before any client reads.
    pub fn new() -> Result<Self> {
        let (sim, root) = (Sim::new(WORLD)?, tempfile::tempdir()?);
        let tree = CgroupTree::new("bench-peers")?;
        let (mut actors, mut pids, mut containers) = (Vec::new(), Vec::new(), Vec::new());
        let pods = ROLES.iter().map(|role| (role.pod, role.gpu, role.demands.len())).chain([(BRIEF_POD, BRIEF, 0)]);
        for (n, (pod, gpu, processes)) in pods.enumerate() {
            let (uid, id) = (format!("8bb25662-de9a-11e9-84e7-{n:012x}"), format!("{:08x}{n:056x}", std::process::id()));
            bundle(root.path(), &id, pod, &uid)?;
            let cgroup = tree.make(&format!("kubepods/pod{uid}/{id}"))?;
            for _ in 0..processes {
                let mut actor = Actor::start(&var("ACTOR_BIN")?, &["in", &cgroup.to_string_lossy(), "--", "sleep", "1000"])?;
                pids.push((pod, gpu, actor.pid()?));
                actors.push(actor);
            }
            containers.push((pod, cgroup));
        }
        let (failed, briefs) = ((0.0, 0.0), Vec::new());
        Ok(Self { sim, root, pids, failed, begun_us: 0, actors, briefs, containers, _tree: tree })
    }

    /// Loads the GPUs for this duration, with the short processes and the fault.
    pub fn play(&mut self, reader: &mut Reader, lasts: Duration) -> Result<()> {
        self.begun_us = now_us();
        let begun = Instant::now();
        let lasts_text = format!("{}ms", lasts.as_millis());
        let mut loads = Vec::new();
        let demands = ROLES.iter().flat_map(|role| role.demands);
        for ((_, gpu, pid), demand) in self.pids.iter().zip(demands) {
            loads.push(self.sim.load(*pid, *gpu, *demand, &["--for", &lasts_text])?);
        }
        let at = |seconds: f64| begun + Duration::from_secs_f64(seconds);
        let mut events: Vec<(f64, bool)> = BRIEF_AT.iter().map(|at| (*at, false)).chain([(FAILS_AT, true)]).collect();
        events.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (when, fails) in events {
            reader.until(at(when));
            if fails {
                self.fail()?;
                self.failed = (reader.mark(), reader.mark() + FAILS_FOR);
            } else {
                self.brief()?;
            }
        }
        for load in &mut loads {
            ensure!(load.0.wait()?.success(), "a load failed");
        }
        for (_, brief) in &mut self.briefs {
            if let Some(mut brief) = brief.take() {
                ensure!(brief.0.wait()?.success(), "a brief process failed");
            }
        }
        Ok(())
    }

    fn fail(&self) -> Result<()> {
        let mut fault = Command::new(var("NVML_SIM_BIN")?);
        fault.args(["fault", "--gpu", &FAILING.to_string(), "--kind", "error", "--error", "UNKNOWN", "--for"]);
        let status = fault.arg(format!("{FAILS_FOR}s")).arg("--dir").arg(self.sim.dir.path()).status()?;
        ensure!(status.success(), "nvml-sim fault failed");
        Ok(())
    }

    /// Starts a process inside its container, with a load from its first instant.
    fn brief(&mut self) -> Result<()> {
        let cgroup = self.containers.iter().find(|(pod, _)| *pod == BRIEF_POD).context("the brief container")?.1.clone();
        let sim = var("NVML_SIM_BIN")?;
        let mut command = Command::new(var("ACTOR_BIN")?);
        command.arg("in").arg(&cgroup).args(["--", &sim, "run", "--gpu", &BRIEF.to_string(), "--demand", BRIEF_DEMAND]);
        command.args(["--mem", "1GiB", "--dir"]).arg(self.sim.dir.path()).args(["--", "sleep", &BRIEF_LASTS.to_string()]);
        let running = Running(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?);
        self.briefs.push((cgroup, Some(running)));
        Ok(())
    }

    /// The truth from the begin of the loads on.
    pub fn truth(&self) -> Result<Truth> {
        let from = nvidia_ml_sim::time::format(self.begun_us);
        let gpus = self.sim.truth(&["--from", &from])?["gpus"].as_array().context("gpus")?.clone();
        Ok(Truth { gpus })
    }

    pub fn pids_of(&self, pod: &str) -> Vec<u32> {
        self.pids.iter().filter(|(name, ..)| *name == pod).map(|(.., pid)| *pid).collect()
    }

    pub fn living(&self) -> usize {
        self.actors.len()
    }
}

pub struct Truth {
    gpus: Vec<Value>,
}

impl Truth {
    pub fn busy(&self, gpu: usize) -> f64 {
        self.gpus.get(gpu).and_then(|g| g["busy_seconds"].as_f64()).unwrap_or_default()
    }

    /// GPU-seconds of these processes; of all processes if `pids` is empty.
    pub fn processes(&self, gpu: usize, pids: &[u32]) -> f64 {
        let all = self.gpus.get(gpu).and_then(|g| g["processes"].as_array());
        let wanted = |p: &&Value| pids.is_empty() || p["pid"].as_u64().is_some_and(|pid| pids.contains(&(pid as u32)));
        all.into_iter().flatten().filter(wanted).filter_map(|p| p["gpu_seconds"].as_f64()).sum()
    }
}
