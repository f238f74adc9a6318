//! The simulated node of a run: GPUs, containers that bundles name and others that nothing names, an engine behind a proxy, and users
//! that want a known share of a GPU for the whole run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::accounts::{Allowed, AllowedUser};
use crate::kernel::{CgroupTree, attach};
use crate::labels::{UID, bundle};
use crate::proxy::Proxy;
use crate::record::RecordedLife;
use crate::{Docker, Running, Sim};

/// Faults are injected into the first ones; the clock of the last one is set now and then.
pub const GPUS: usize = 4;
pub const FAULTY_GPUS: usize = 3;
/// Clock of the last GPU: set after this time and then every so often, back and forth.
const FIRST_STEP_SECONDS: u64 = 25;
const STEP_EVERY_SECONDS: u64 = 240;
const STEPS: u64 = 60;
/// No multiple of a period: otherwise samples after it would have the stamps of ones before it.
const STEP_US: i64 = 2_987_654;

/// Processes outside of containers, in the record of who ran where.
pub const HOST: &str = "host";

/// One that wants the same share of a GPU for the whole run.
pub struct SteadyUser {
    pub name: String,
    /// The container's id; for a unit its name.
    pub id: String,
    /// Whether a bundle has its pod's name.
    pub is_named: bool,
    pub gpu: usize,
    pub demand: f64,
    pub pid: u32,
    pub since_us: u64,
}

/// Where a steady user runs.
#[derive(Clone, Copy, PartialEq)]
enum UserHome {
    Named,
    Unnamed,
    Unit,
    Engine,
    Host,
}

/// Demands of a GPU sum to at least 0.4, so that named samples are frequent, and leave room for the churn.
const STEADY: [(&str, UserHome, usize, f64); 9] = [
    ("trainer-0", UserHome::Named, 0, 0.35),
    ("unnamed-0", UserHome::Unnamed, 0, 0.15),
    ("engine-1", UserHome::Engine, 1, 0.4),
    ("trainer-1", UserHome::Named, 1, 0.1),
    ("trainer-2", UserHome::Named, 2, 0.3),
    ("soak.service", UserHome::Unit, 2, 0.2),
    ("host-2", UserHome::Host, 2, 0.05),
    ("trainer-3", UserHome::Named, 3, 0.3),
    ("unnamed-3", UserHome::Unnamed, 3, 0.2),
];

/// A small disk for sessions.
pub struct SessionDisk(pub PathBuf);

impl SessionDisk {
    fn new(at: PathBuf) -> Result<Self> {
        std::fs::create_dir(&at)?;
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "none"]).arg(&at).status()?;
        ensure!(status.success(), "mount -t tmpfs {} failed", at.display());
        Ok(Self(at))
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Takes all the space that is left.
    pub fn fill(&self) -> Result<()> {
        let mut file = std::fs::File::create(self.filler())?;
        match std::io::copy(&mut std::io::repeat(1), &mut file) {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => Ok(()),
            other => other.map(drop).context("the disk does not fill up"),
        }
    }

    pub fn free(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.filler())?)
    }
}

impl Drop for SessionDisk {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("--lazy").arg(&self.0).status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}

/// The engine's containers; without an engine there are none, and its socket cannot fail.
pub struct EngineFront {
    pub proxy: Proxy,
    pub docker: Docker,
}

pub struct SoakWorld {
    // Dropped in this order: loads and processes, the engine's containers, cgroups, folders.
    loads: Vec<Running>,
    processes: Vec<Running>,
    pub engine: Option<EngineFront>,
    pub steady: Vec<SteadyUser>,
    pub tree: CgroupTree,
    pub disk: SessionDisk,
    pub sim: Sim,
    /// UUIDs by index.
    pub uuids: Vec<String>,
    /// When the world began, on the simulator's clock.
    pub begun_us: u64,
    pub dir: tempfile::TempDir,
}

pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

fn world_file(seed: u64, steps: u64) -> String {
    let mut text = format!("seed = {}\n", seed % 1_000_000);
    for gpu in 0..GPUS {
        // Both rules of drivers, and two grids.
        let (rule, period) = if gpu % 2 == 0 { ("instant", 167_139) } else { ("last", 100_000) };
        text.push_str(&format!("[[gpus]]\npid_rule = '{rule}'\nperiod_us = {period}\nenergy = true\n"));
    }
    for step in 0..steps {
        let (at, by) = (FIRST_STEP_SECONDS + step * STEP_EVERY_SECONDS, if step % 2 == 0 { -STEP_US } else { STEP_US });
        text.push_str(&format!("[[gpus.clock_steps]]\nat = '{at}s'\nby_us = {by}\n"));
    }
    text
}

impl SoakWorld {
    /// Without `DOCKER_HOST` there is no engine; `has_steps`: whether the clock of the last GPU is set now and then.
    pub fn new(seed: u64, lasts: Duration, has_steps: bool) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let begun_us = now_us();
        let sim = Sim::new(&world_file(seed, if has_steps { STEPS } else { 0 }))?;
        let truth = sim.truth(&[])?;
        let gpus = truth["gpus"].as_array().context("GPUs")?;
        let uuids = gpus.iter().filter_map(|gpu| gpu["uuid"].as_str().map(str::to_owned)).collect();
        let engine = std::env::var_os("DOCKER_HOST").map(|_| engine(dir.path())).transpose()?;
        let disk = SessionDisk::new(dir.path().join("sessions"))?;
        std::fs::create_dir(dir.path().join("root"))?;
        let (tree, steady) = (CgroupTree::new("soak")?, Vec::new());
        let (loads, processes) = (Vec::new(), Vec::new());
        let mut world = Self { loads, processes, engine, steady, tree, disk, sim, uuids, begun_us, dir };
        for (n, (name, home, gpu, demand)) in STEADY.into_iter().enumerate() {
            world.start(n, name, home, gpu, demand, lasts)?;
        }
        Ok(world)
    }

    /// The root of the host's file system, as the agent gets it.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.dir.path().join("front.sock").display())
    }

    fn start(&mut self, n: usize, name: &str, home: UserHome, gpu: usize, demand: f64, lasts: Duration) -> Result<()> {
        // Longer than the run, which may wait for the end of its last fault.
        let seconds = (lasts.as_secs() + 600).to_string();
        let (id, pid) = match (home, &self.engine) {
            (UserHome::Engine, Some(engine)) => engine.docker.run(name, &json!({}), &seconds)?,
            (UserHome::Engine, None) => return Ok(()),
            _ => {
                let process = Running(Command::new("sleep").arg(&seconds).spawn()?);
                let pid = process.0.id();
                self.processes.push(process);
                (self.housed(n, name, home, pid)?, pid)
            }
        };
        let since_us = now_us();
        self.loads.push(self.sim.load(pid, gpu, demand, &[])?);
        self.steady.push(SteadyUser { name: name.into(), id, is_named: home == UserHome::Named, gpu, demand, pid, since_us });
        Ok(())
    }

    /// Moves a process to where it belongs. Returns its user.
    fn housed(&self, n: usize, name: &str, home: UserHome, pid: u32) -> Result<String> {
        if home == UserHome::Host {
            return Ok(HOST.into());
        }
        if home == UserHome::Unit {
            attach(pid, &self.tree.make(name)?)?;
            return Ok(name.into());
        }
        let (id, dir) = self.tree.container(n)?;
        if home == UserHome::Named {
            bundle(&self.root(), &id, name, UID)?;
        }
        attach(pid, &dir)?;
        Ok(id)
    }

    /// The GPUs that steady users may be credited on.
    pub fn allowed(&self) -> Allowed {
        let user = |user: &SteadyUser| {
            let pod = if user.is_named { user.name.clone() } else { String::new() };
            (user.id.clone(), AllowedUser { gpus: BTreeSet::from([self.uuids[user.gpu].clone()]), pod, since: 0.0 })
        };
        self.steady.iter().filter(|user| user.id != HOST).map(user).collect()
    }

    /// Their processes, in the form of the record of the churn.
    pub fn steady_lives(&self) -> Vec<RecordedLife> {
        let life = |user: &SteadyUser| RecordedLife {
            pid: user.pid,
            cgroup: user.id.clone(),
            gpu: user.gpu,
            begin_us: user.since_us,
            end_us: u64::MAX / 2,
            gone_us: u64::MAX / 2,
        };
        self.steady.iter().map(life).collect()
    }

    /// Time until the next step of the last GPU's clock.
    pub fn next_step(&self) -> Option<Duration> {
        let now = now_us();
        let steps = (0..STEPS).map(|n| self.begun_us + (FIRST_STEP_SECONDS + n * STEP_EVERY_SECONDS) * 1_000_000);
        steps.filter(|at| *at > now).map(|at| Duration::from_micros(at - now)).next()
    }
}

fn engine(dir: &Path) -> Result<EngineFront> {
    let docker = Docker::new()?;
    let proxy = Proxy::start(docker.socket(), &dir.join("front.sock"))?;
    Ok(EngineFront { proxy, docker })
}
