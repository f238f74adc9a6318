//! Memory, descriptors, threads and log lines of the agent, sampled once a second, with their bounds.

use anyhow::{Context as _, Result};

use super::accounts::Problem;
use crate::kernel::CgroupTree;

const MIB: u64 = 1024 * 1024;
/// Anonymous memory: the tables of a node with some hundred containers, and the simulated driver, which runs in the agent's process.
pub const ANONYMOUS_BYTES: u64 = 64 * MIB;
/// Resident memory with the program's pages, those of a debug build included.
pub const RESIDENT_BYTES: u64 = 128 * MIB;
/// Memory may grow by this between the middle and the end of a life: the tables of exited processes and of removed containers fill up.
pub const GROWTH_BYTES: u64 = 16 * MIB;
/// A life that is shorter has tables that still fill up.
const FLAT_AFTER_SECONDS: f64 = 300.0;
/// Pressure files of containers stay open, up to seven of each; the rest are sockets, rings and programs of the kernel.
pub const DESCRIPTORS: u64 = 256;
pub const THREADS: u64 = 48;
/// Lines in any minute.
pub const LOG_LINES: usize = 60;

/// What the machine may use at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ResourceUse {
    pub at: f64,
    pub resident: u64,
    pub anonymous: u64,
    pub descriptors: u64,
    pub threads: u64,
    pub log_lines: usize,
}

impl ResourceUse {
    pub fn read(pid: u32, at: f64, log_lines: usize) -> Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).with_context(|| name.to_owned())
        };
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        let (resident, anonymous) = (number("VmRSS")? * 1024, number("RssAnon")? * 1024);
        Ok(Self { at, resident, anonymous, descriptors, threads: number("Threads")?, log_lines })
    }

    pub fn max(self, other: Self) -> Self {
        Self {
            at: self.at.max(other.at),
            resident: self.resident.max(other.resident),
            anonymous: self.anonymous.max(other.anonymous),
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
            log_lines: self.log_lines.max(other.log_lines),
        }
    }

    /// Values beyond their bounds.
    pub fn problems(&self) -> Vec<Problem> {
        let values = [
            ("anonymous memory", self.anonymous, ANONYMOUS_BYTES, "bytes"),
            ("resident memory", self.resident, RESIDENT_BYTES, "bytes"),
            ("descriptors", self.descriptors, DESCRIPTORS, "open"),
            ("threads", self.threads, THREADS, "running"),
        ];
        let beyond = values.into_iter().filter(|(_, value, bound, _)| value > bound);
        let text = |(name, value, bound, unit): (&str, u64, u64, &str)| {
            Problem::new(name, format!("at {:.1} s: {value} {unit}, the bound is {bound}", self.at))
        };
        beyond.map(text).collect()
    }
}

/// The largest number of log lines in any minute of one life.
pub fn lines_a_minute(life: &[ResourceUse]) -> usize {
    let minute = |n: usize| {
        let before = life[..n].iter().rev().find(|earlier| life[n].at - earlier.at >= 60.0);
        life[n].log_lines - before.map_or(0, |before| before.log_lines)
    };
    (0..life.len()).map(minute).max().unwrap_or_default()
}

/// Growth of anonymous memory from the middle of a life to its end, as the means of a tenth of the life each; `None` for one that is too
/// short.
pub fn growth(life: &[ResourceUse]) -> Option<i64> {
    let (first, last) = (life.first()?, life.last()?);
    if last.at - first.at < FLAT_AFTER_SECONDS {
        return None;
    }
    let mean = |part: &[ResourceUse]| part.iter().map(|used| used.anonymous as i64).sum::<i64>() / part.len().max(1) as i64;
    let tenth = life.len() / 10;
    let middle = life.len() / 2;
    Some(mean(&life[life.len() - tenth..]) - mean(&life[middle - tenth / 2..middle + tenth / 2]))
}

/// What must hold at the end of a life.
pub fn problems_of_life(life: &[ResourceUse]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let lines = lines_a_minute(life);
    if lines > LOG_LINES {
        problems.push(Problem::new("log volume", format!("{lines} lines in a minute, the bound is {LOG_LINES}")));
    }
    if let Some(growth) = growth(life).filter(|growth| *growth > GROWTH_BYTES as i64) {
        let text = format!("anonymous memory grew by {growth} bytes in the second half of a life");
        problems.push(Problem::new("memory growth", text));
    }
    problems
}

/// A cgroup of the memory controller that the agent is started in.
pub struct MemoryCgroup {
    _tree: CgroupTree,
    dir: std::path::PathBuf,
    is_v2: bool,
}

impl MemoryCgroup {
    pub fn new() -> Result<Self> {
        let (tree, is_v2) = match CgroupTree::with_controller("memory", "soak-memory") {
            Ok(tree) => (tree, false),
            Err(_) => (CgroupTree::new("soak-memory")?, true),
        };
        // On v2 the root of the tree has the controller if the machine's root passes it on.
        let dir = if is_v2 { tree.make("")? } else { tree.make("agent")? };
        let cgroup = Self { _tree: tree, dir, is_v2 };
        cgroup.usage().context("the memory controller is not available")?;
        Ok(cgroup)
    }

    pub fn procs(&self) -> std::path::PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// Bytes that are charged to it, the cache of files included.
    pub fn usage(&self) -> Result<u64> {
        let name = if self.is_v2 { "memory.current" } else { "memory.usage_in_bytes" };
        Ok(std::fs::read_to_string(self.dir.join(name))?.trim().parse()?)
    }

    /// How often memory was wanted beyond the limit.
    pub fn limited(&self) -> Result<u64> {
        let name = if self.is_v2 { "memory.events" } else { "memory.failcnt" };
        let text = std::fs::read_to_string(self.dir.join(name)).context(name)?;
        let line = text.lines().find_map(|line| if self.is_v2 { line.strip_prefix("max ") } else { Some(line) });
        line.with_context(|| format!("{name} has no count"))?.trim().parse().context(name)
    }

    /// `None`: no limit.
    pub fn limit(&self, bytes: Option<u64>) -> Result<()> {
        let (name, none) = if self.is_v2 { ("memory.max", "max") } else { ("memory.limit_in_bytes", "-1") };
        let text = bytes.map_or(none.to_owned(), |bytes| bytes.to_string());
        std::fs::write(self.dir.join(name), &text).with_context(|| format!("{name} = {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(at: f64, anonymous: u64, log_lines: usize) -> ResourceUse {
        ResourceUse { at, anonymous, log_lines, ..ResourceUse::default() }
    }

    fn keys(problems: &[Problem]) -> Vec<&str> {
        problems.iter().map(|problem| &*problem.key).collect()
    }

    #[test]
    fn values_beyond_their_bounds_are_found() {
        let used = ResourceUse { at: 1.0, resident: RESIDENT_BYTES, descriptors: DESCRIPTORS, threads: THREADS, ..at(1.0, 0, 0) };
        assert_eq!(keys(&used.problems()), [""; 0]);
        let beyond = ResourceUse { descriptors: DESCRIPTORS + 1, threads: THREADS + 1, ..at(1.0, ANONYMOUS_BYTES + 1, 0) };
        assert_eq!(keys(&beyond.problems()), ["anonymous memory", "descriptors", "threads"]);
    }

    #[test]
    fn growth_and_log_volume_of_a_life_are_found() {
        let flat: Vec<_> = (0..400).map(|s| at(f64::from(s), MIB, s as usize)).collect();
        assert_eq!((growth(&flat), lines_a_minute(&flat)), (Some(0), 60));
        assert_eq!(keys(&problems_of_life(&flat)), [""; 0]);
        assert_eq!(growth(&flat[..200]), None, "too short");
        let leak: Vec<_> = (0..400).map(|s| at(f64::from(s), u64::from(s as u32) * MIB, 3 * s as usize)).collect();
        assert_eq!(keys(&problems_of_life(&leak)), ["log volume", "memory growth"]);
    }

    #[test]
    fn the_own_process_can_be_read() {
        let used = ResourceUse::read(std::process::id(), 0.0, 0).unwrap();
        assert!(used.threads > 0 && used.descriptors > 0 && used.resident >= used.anonymous && used.anonymous > 0);
    }
}
