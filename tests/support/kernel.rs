//! Cgroups and processes for the tests of kernel tracking, on the machine's own layout or on one hierarchy alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Agent, Running, get, sum, wait_for};

/// The hierarchies that the agent sees mounted. They are the kernel's, so actors may be in another mount namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Machine,
    /// In a mount namespace with only cgroup2 on /sys/fs/cgroup.
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

/// Mount point of cgroup2 on this machine.
pub fn cgroup2() -> Result<PathBuf> {
    mounted("cgroup2", "rw")
}

/// A cgroup directory with all that is made below it; it is removed with its processes when dropped.
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

    /// Creates a directory below the root, with its parents.
    pub fn make(&self, path: &str) -> Result<PathBuf> {
        let path = self.root.join(path);
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Creates a cgroup named as runtimes name a container's root. Returns the container's id and the directory.
    pub fn container(&self, n: usize) -> Result<(String, PathBuf)> {
        self.container_in("", n)
    }

    /// As [`Self::container`], in a cgroup below the root of the tree, such as that of a pod.
    pub fn container_in(&self, path: &str, n: usize) -> Result<(String, PathBuf)> {
        let id = format!("{:08x}{n:056x}", std::process::id());
        Ok((id.clone(), self.make(&Path::new(path).join(&id).to_string_lossy())?))
    }

    /// What stands before the paths of its cgroups.
    pub fn prefix(&self) -> String {
        self.path_of(&self.root)
    }

    /// The path of a directory as `/proc/<pid>/cgroup` shows it.
    pub fn path_of(&self, dir: &Path) -> String {
        format!("/{}", dir.strip_prefix(&self.mount).unwrap_or(dir).display())
    }
}

/// Removes a cgroup and those below it, of which all processes have been ended.
pub fn remove_cgroups(dir: &Path) -> Result<()> {
    wait_for("the cgroups are removed", Duration::from_secs(10), || Ok(remove(dir).ok()))
        .with_context(|| dir.display().to_string())
}

fn remove(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        remove(&entry.path())?;
    }
    std::fs::remove_dir(dir)
}

impl Drop for CgroupTree {
    fn drop(&mut self) {
        // v1 has no such file; there the actors must have ended.
        let _v2_only = std::fs::write(self.root.join("cgroup.kill"), "1");
        if let Err(error) = remove_cgroups(&self.root) {
            eprintln!("{error:#}");
        }
    }
}

/// A running actor; `actor.rs` documents its verbs.
pub struct Actor {
    pub process: Running,
    out: BufReader<ChildStdout>,
}

impl Actor {
    pub fn start(program: &str, args: &[&str]) -> Result<Self> {
        let mut child = Command::new(program).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let out = BufReader::new(child.stdout.take().context("stdout is a pipe")?);
        Ok(Self { process: Running(child), out })
    }

    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.out.read_line(&mut line)? > 0, "the actor ended without output");
        Ok(line.trim().to_owned())
    }

    pub fn pid(&mut self) -> Result<u32> {
        self.line()?.parse().context("the actor prints a pid")
    }
}

pub fn attach(pid: u32, cgroup: &Path) -> Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).open(cgroup.join("cgroup.procs"))?;
    Ok(file.write_all(pid.to_string().as_bytes())?)
}

/// A process in this cgroup that does nothing.
pub fn sleeper(cgroup: &Path) -> Result<Running> {
    let running = Running(Command::new("sleep").arg("infinity").spawn()?);
    attach(running.0.id(), cgroup)?;
    Ok(running)
}

impl Agent {
    /// `/api/v1/explain?pid=`; `None` if the process is unknown.
    pub fn explain(&self, pid: u32) -> Result<Option<Value>> {
        match get(self.port, &format!("/api/v1/explain?pid={pid}")) {
            Ok(text) => Ok(Some(serde_json::from_str(&text)?)),
            Err(error) if error.to_string().contains(" 404 ") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Ids of the containers that a process was in, in order; blank for none. Moves within one container do not count.
    pub fn containers_of(&self, pid: u32) -> Result<Vec<String>> {
        let explained = self.explain(pid)?.with_context(|| format!("pid {pid} is unknown"))?;
        let stays = explained["process"]["lives"][0]["stays"].as_array().context("stays")?;
        let mut ids: Vec<String> = stays.iter().map(|s| s["container_id"].as_str().unwrap_or_default().to_owned()).collect();
        ids.dedup();
        Ok(ids)
    }
}

/// Kinds of kernel events, as `gpu_sampler_kernel_events_lost_total` names them.
pub const KINDS: [&str; 7] = ["fork", "exec", "exit", "attach", "mkdir", "rmdir", "rename"];

/// Kernel events that the agent has counted as lost, for any cause.
pub fn lost_events(agent: &Agent) -> Result<BTreeMap<&'static str, u64>> {
    let page = agent.scrape()?;
    let count = |kind| {
        let lost = sum(&page, "gpu_sampler_kernel_events_lost_total", &[("kind", kind)]);
        Ok((kind, lost.with_context(|| format!("no count of lost {kind} events"))? as u64))
    };
    KINDS.into_iter().map(count).collect()
}

/// Runs of this process's eBPF programs that the kernel skipped; `None` if the kernel does not count them.
pub fn skipped_runs(pid: u32) -> Result<Option<u64>> {
    let mut sum = None;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed meanwhile; those of the programs stay open.
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

/// The living processes in the agent's tables.
pub fn agent_table(agent: &Agent) -> Result<ProcessTable> {
    let list: Value = serde_json::from_str(&get(agent.port, "/api/v1/processes")?)?;
    let process = |p: &Value| Some((p["pid"].as_u64()?, p["start_ns"].as_u64()? / 10_000_000, p["v2_id"].as_u64()?));
    list.as_array().context("a list")?.iter().map(|p| process(p).context("a process")).collect()
}

/// The living processes in /proc, with the inode of their cgroup directory below `mount`, where cgroup2 is mounted.
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
