//! A node: simulated GPUs, containers with and without processes on them, and containers that come and go.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{CgroupTree, Layout};
use gpu_sampler_tests::labels::bundle;
use gpu_sampler_tests::record::Lives;
use gpu_sampler_tests::{Agent, Running, Sim, var, wait_for};

/// The agent's own defaults, which the tests' agents do not have.
const DEFAULTS: [&str; 4] = ["--gpu-wait-percent", "2", "--gpu-budget-percent", "1"];
/// Demands of the processes: 64 of them keep a GPU busy for most of the time.
const DEMAND: &str = "0.005..0.025";
/// How long the process of a container that comes and goes uses its GPU, in seconds.
const BRIEF: &str = "0.5";

#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub gpus: usize,
    /// Processes on each GPU.
    pub processes: usize,
    /// Containers that they are in.
    pub containers: usize,
    /// Containers that use no GPU.
    pub others: usize,
}

pub struct World {
    pub sim: Sim,
    pub size: Size,
    root: tempfile::TempDir,
    dirs: Vec<PathBuf>,
    starts: usize,
    lives: Vec<Lives>,
    brief: Vec<(Child, PathBuf)>,
    tree: CgroupTree,
}

impl World {
    /// Every container has a bundle on disk, as containerd leaves it.
    pub fn new(size: Size) -> Result<Self> {
        let sim = Sim::new(&"[[gpus]]\n".repeat(size.gpus))?;
        let (root, tree) = (tempfile::tempdir()?, CgroupTree::new("bench-node")?);
        let mut world = Self { sim, size, root, dirs: Vec::new(), starts: 0, lives: Vec::new(), brief: Vec::new(), tree };
        for _ in 0..size.containers {
            let dir = world.container(true)?;
            world.dirs.push(dir);
        }
        for _ in 0..size.others {
            world.container(true)?;
        }
        Ok(world)
    }

    fn container(&mut self, is_named: bool) -> Result<PathBuf> {
        let n = self.starts;
        self.starts += 1;
        let (uid, id) = (format!("8bb25662-de9a-11e9-84e7-{n:012x}"), format!("{:08x}{n:056x}", std::process::id()));
        if is_named {
            bundle(self.root.path(), &id, &format!("trainer-{n}"), &uid)?;
        }
        self.tree.make(&format!("kubepods/burstable/pod{uid}/{id}"))
    }

    pub fn agent(&self) -> Result<Agent> {
        let mut command = Agent::command(Some(&self.sim))?;
        command.env("NVML_SIM_COST_FILE", self.cost_file()).arg("--path-rootfs").arg(self.root.path());
        Agent::start_as(Layout::Machine, command, &DEFAULTS)
    }

    /// What stands before the cgroup paths of this world, and not before those of a node.
    pub fn path_prefix(&self) -> String {
        self.tree.prefix()
    }

    fn cost_file(&self) -> PathBuf {
        self.sim.dir.path().join("cost")
    }

    /// Processor time of the simulated driver so far, in seconds: it runs in the agent's GPU threads.
    pub fn driver_seconds(&self) -> Result<f64> {
        let bytes = fs::read(self.cost_file())?;
        let ns = bytes.as_slice().try_into().map(u64::from_ne_bytes).context("the simulated driver's cost file has 8 bytes")?;
        Ok(ns as f64 / 1e9)
    }

    /// Puts so many processes on each GPU, in these containers in turn: each is another (container, GPU) pair while there are enough.
    pub fn use_gpus(&mut self, processes: usize, containers: Range<usize>) -> Result<()> {
        let count = (self.size.gpus * processes).to_string();
        let dirs: Vec<&Path> = self.dirs[containers].iter().map(PathBuf::as_path).collect();
        let args = ["--count", &count, "--at-once", &count, "--lasting", "3600s..3600s", "--demand", DEMAND, "--mem", "64MiB"];
        self.lives.push(self.sim.lives(&dirs, &[&args[..], &["--in-turn"]].concat())?);
        Ok(())
    }

    /// Each container has a process on a GPU for some seconds. They begin with those of the first GPU, so that more are on a GPU at once than
    /// its lists are read for, and part of them are seen.
    pub fn use_gpus_once(&self) -> Result<()> {
        let count = self.dirs.len().to_string();
        let dirs: Vec<&Path> = self.dirs.iter().map(PathBuf::as_path).collect();
        let args = ["--count", &count, "--at-once", "512", "--lasting", "12s..13s", "--demand", "0.01", "--mem", "64MiB"];
        self.sim.lives(&dirs, &[&args[..], &["--in-turn"]].concat())?.all()?;
        Ok(())
    }

    /// Waits until the page has this many (container, GPU) pairs.
    pub fn settled(&self, agent: &Agent, pairs: usize) -> Result<()> {
        wait_for("all pairs are exposed", Duration::from_secs(120), || {
            std::thread::sleep(Duration::from_secs(2));
            Ok((super::measure::page(agent, self)?.pairs >= pairs).then_some(()))
        })
    }

    /// Starts a container that uses a GPU for a moment.
    pub fn start_one(&mut self, is_named: bool) -> Result<()> {
        let dir = self.container(is_named)?;
        let gpu = (self.starts % self.size.gpus.max(1)).to_string();
        let script = "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(&dir).arg(var("NVML_SIM_BIN")?).args(["run", "--dir"]).arg(self.sim.dir.path());
        command.args(["--gpu", &gpu, "--demand", "0.3", "--", "sleep", BRIEF]);
        let child = command.stdin(Stdio::null()).spawn()?;
        self.brief.push((child, dir));
        Ok(())
    }

    /// Removes the containers after their process has ended.
    pub fn remove_ended(&mut self) -> Result<()> {
        for (mut child, dir) in std::mem::take(&mut self.brief) {
            match child.try_wait()? {
                Some(_) => {
                    fs::remove_dir(&dir).with_context(|| dir.display().to_string())?;
                    // The pod's cgroup.
                    dir.parent().map_or(Ok(()), fs::remove_dir)?;
                }
                None => self.brief.push((child, dir)),
            }
        }
        Ok(())
    }

    /// Starts containers at these rates for this duration: named and unnamed, a second. Returns how many.
    pub fn churn(&mut self, named: u32, unnamed: u32, lasts: Duration) -> Result<u32> {
        let (from, mut started) = (Instant::now(), 0);
        let rate = named + unnamed;
        while from.elapsed() < lasts {
            self.start_one(started % rate < named)?;
            started += 1;
            self.remove_ended()?;
            let due = Duration::from_secs_f64(f64::from(started) / f64::from(rate));
            std::thread::sleep(due.saturating_sub(from.elapsed()));
        }
        wait_for("the last containers end", Duration::from_secs(30), || {
            self.remove_ended()?;
            Ok(self.brief.is_empty().then_some(()))
        })?;
        Ok(started)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (child, _) in self.brief.drain(..) {
            drop(Running(child));
        }
    }
}
