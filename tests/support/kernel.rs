//! Cgroups and processes for the tests of kernel tracking, on the machine's own layout or on cgroup v2 alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Agent, Running, get, sum, wait_for};

/// What the agent sees mounted. The hierarchies are the kernel's, so actors need not be in the same mount namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Machine,
    /// In a mount namespace with nothing but cgroup2 on /sys/fs/cgroup.
    PureV2,
    /// In a mount namespace without the machine's cgroup2.
    PureV1,
}

impl Layout {
    /// Makes the command run in this layout; its pid stays the same.
    pub fn enter(self, command: &mut Command) {
        let change = match self {
            Layout::Machine => return,
            Layout::PureV2 => "mount -t cgroup2 none /sys/fs/cgroup",
            Layout::PureV1 => "umount -a -t cgroup2",
        };
        let mut inner = Command::new("unshare");
        inner.args(["--mount", "--propagation", "private", "sh", "-c"]);
        inner.arg(format!("{change} && exec \"$@\"")).arg("sh").arg(command.get_program());
        inner.args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inner.env(name, value),
                None => inner.env_remove(name),
            };
        }
        inner.stdin(Stdio::null());
        *command = inner;
    }
}

fn mounted(kind: &str, option: &str) -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, point, of_kind, options, ..] = words[..] else { return None };
        (of_kind == kind && options.split(',').any(|o| o == option)).then(|| PathBuf::from(point))
    });
    mount.with_context(|| format!("no {kind} with the option {option} is mounted; mount it to test"))
}

/// Where cgroup2 is mounted on this machine.
pub fn cgroup2() -> Result<PathBuf> {
    mounted("cgroup2", "rw")
}

/// A cgroup directory with all that is made below it; removed with its processes when dropped.
pub struct CgroupTree {
    mount: PathBuf,
    root: PathBuf,
}

impl CgroupTree {
    /// On cgroup v2.
    pub fn new(name: &str) -> Result<Self> {
        Self::on(cgroup2()?, name)
    }

    /// On the v1 hierarchy of the `pids` controller.
    pub fn v1(name: &str) -> Result<Self> {
        Self::with_controller("pids", name)
    }

    /// On the v1 hierarchy of this controller.
    pub fn with_controller(controller: &str, name: &str) -> Result<Self> {
        Self::on(mounted("cgroup", controller)?, name)
    }

    fn on(mount: PathBuf, name: &str) -> Result<Self> {
        let root = mount.join(format!("gpu-sampler-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&root).with_context(|| root.display().to_string())?;
        Ok(Self { mount, root })
    }

    /// Makes a directory, and those above it, below the root.
    pub fn make(&self, path: &str) -> Result<PathBuf> {
        let path = self.root.join(path);
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// A container's root as runtimes name it, numbered.
    pub fn container(&self, n: usize) -> Result<(String, PathBuf)> {
        let id = format!("{:08x}{n:056x}", std::process::id());
        Ok((id.clone(), self.make(&id)?))
    }

    /// As `/proc/<pid>/cgroup` names it.
    pub fn path_of(&self, dir: &Path) -> String {
        format!("/{}", dir.strip_prefix(&self.mount).unwrap_or(dir).display())
    }
}

fn remove(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        remove(&entry.path())?;
    }
    std::fs::remove_dir(dir)
}

impl Drop for CgroupTree {
    fn drop(&mut self) {
        // v1 has no such file; there the actors have to be gone.
        let _v2_only = std::fs::write(self.root.join("cgroup.kill"), "1");
        if let Err(error) = wait_for("the cgroups are removed", Duration::from_secs(10), || Ok(remove(&self.root).ok())) {
            eprintln!("{}: {error:#}", self.root.display());
        }
    }
}

/// A running actor; its verbs are in `actor.rs`.
pub struct Actor {
    pub process: Running,
    out: BufReader<ChildStdout>,
}

impl Actor {
    pub fn start(program: &str, args: &[&str]) -> Result<Self> {
        let mut child = Command::new(program).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let out = BufReader::new(child.stdout.take().context("a pipe was asked for")?);
        Ok(Self { process: Running(child), out })
    }

    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.out.read_line(&mut line)? > 0, "the actor ended without a word");
        Ok(line.trim().to_owned())
    }

    pub fn pid(&mut self) -> Result<u32> {
        self.line()?.parse().context("the actor names a pid")
    }
}

pub fn attach(pid: u32, cgroup: &Path) -> Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).open(cgroup.join("cgroup.procs"))?;
    Ok(file.write_all(pid.to_string().as_bytes())?)
}

impl Agent {
    /// `/api/v1/explain?pid=`; `None` when it knows no such process.
    pub fn explain(&self, pid: u32) -> Result<Option<Value>> {
        match get(self.port, &format!("/api/v1/explain?pid={pid}")) {
            Ok(text) => Ok(Some(serde_json::from_str(&text)?)),
            Err(error) if error.to_string().contains(" 404 ") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The container ids that a process was in, in order; blank for none. Moves within one container are none.
    pub fn stays(&self, pid: u32) -> Result<Vec<String>> {
        let told = self.explain(pid)?.with_context(|| format!("pid {pid} is unknown"))?;
        let stays = told["process"]["lives"][0]["stays"].as_array().context("stays")?;
        let mut ids: Vec<String> = stays.iter().map(|s| s["container_id"].as_str().unwrap_or_default().to_owned()).collect();
        ids.dedup();
        Ok(ids)
    }
}

/// Kinds of kernel events, as `gpu_sampler_kernel_events_lost_total` names them.
pub const KINDS: [&str; 7] = ["fork", "exec", "exit", "attach", "mkdir", "rmdir", "rename"];

/// Kernel events that the agent has counted as lost, for whatever cause.
pub fn lost_events(agent: &Agent) -> Result<BTreeMap<&'static str, u64>> {
    let page = agent.scrape()?;
    let of = |kind| {
        let count = sum(&page, "gpu_sampler_kernel_events_lost_total", &[("kind", kind)]);
        Ok((kind, count.with_context(|| format!("no count of lost {kind} events"))? as u64))
    };
    KINDS.into_iter().map(of).collect()
}

/// Runs of all eBPF programs of this process that the kernel skipped; `None` if the kernel does not count them.
pub fn skipped_runs(pid: u32) -> Result<Option<u64>> {
    let mut sum = None;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed meanwhile; those of programs stay open.
        let Ok(text) = std::fs::read_to_string(entry?.path()) else { continue };
        let skipped = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
        if let Some(skipped) = skipped {
            *sum.get_or_insert(0) += skipped.trim().parse::<u64>()?;
        }
    }
    Ok(sum)
}

/// pid, start time in clock ticks, inode of its v2 cgroup.
pub type ProcessTable = BTreeSet<(u64, u64, u64)>;

/// Living processes in the agent's tables.
pub fn agent_table(agent: &Agent) -> Result<ProcessTable> {
    let list: Value = serde_json::from_str(&get(agent.port, "/api/v1/processes")?)?;
    let one = |p: &Value| Some((p["pid"].as_u64()?, p["start_ns"].as_u64()? / 10_000_000, p["v2_id"].as_u64()?));
    list.as_array().context("a list")?.iter().map(|p| one(p).context("a process")).collect()
}

/// Living processes in /proc, with the inode of their directory below `mount`, where cgroup2 is mounted.
pub fn proc_table(mount: &Path) -> Result<ProcessTable> {
    let mut table = ProcessTable::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u64>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        if fields.next().is_none_or(|state| "ZX".contains(state)) {
            continue;
        }
        let start = fields.nth(18).and_then(|f| f.parse().ok()).context("start time")?;
        let cgroup = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let Some(path) = cgroup.lines().find_map(|l| l.strip_prefix("0::/")) else { continue };
        let Ok(meta) = std::fs::metadata(mount.join(path)) else { continue };
        table.insert((pid, start, meta.ino()));
    }
    Ok(table)
}
